//! Images in and out, by each engine's own client: whatever part the client has in it is counted.

use std::fs;

use anyhow::{Result, ensure};

use super::Bench;
use crate::image::{Image, NAME, Packing};
use crate::measure::{Detail, Sample};
use crate::peers::{Engine, Kind};
use crate::registry::Registry;

pub(super) fn pull_gzip(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    pull(bench, engine, Packing::Gzip)
}

pub(super) fn pull_zstd(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    pull(bench, engine, Packing::Zstd)
}

fn pull(bench: &Bench<'_>, engine: &Engine, packing: Packing) -> Result<Vec<Sample>> {
    Image::warm(&bench.image.registry())?;
    let name = bench.registry.name(packing.tag());
    let command = engine.command(&["images", "pull", "--plain-http", &name]);
    let sample = engine.measure(Detail::Sampled, |watch| watch.client(command).map(drop))?;
    unpacked(engine, &name)?;
    Ok(vec![sample])
}

pub(super) fn import(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    let archive = bench.image.docker_archive();
    Image::warm(&archive)?;
    let command = engine.command(&["images", "import", archive.to_str().unwrap_or_default()]);
    let sample = engine.measure(Detail::Sampled, |watch| watch.client(command).map(drop))?;
    unpacked(engine, NAME)?;
    Ok(vec![sample])
}

pub(super) fn export(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    engine.ctr(&[
        "images",
        "import",
        "--no-unpack",
        bench.image.docker_archive().to_str().unwrap_or_default(),
    ])?;
    let out = engine.folder.join("exported.tar");
    let command = engine.command(&["images", "export", out.to_str().unwrap_or_default(), NAME]);
    let sample = engine.measure(Detail::Sampled, |watch| watch.client(command).map(drop))?;
    let (size, expected) = (fs::metadata(&out)?.len(), fs::metadata(bench.image.docker_archive())?.len());
    ensure!(size.abs_diff(expected) < 1 << 20, "the export has {size} bytes, the import had {expected}");
    Ok(vec![sample])
}

pub(super) fn push(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    engine.ctr(&[
        "images",
        "import",
        "--no-unpack",
        bench.image.docker_archive().to_str().unwrap_or_default(),
    ])?;
    let folder = engine.folder.join("registry");
    let registry = Registry::start(&folder.join("storage"), &folder)?;
    let name = registry.name("pushed");
    let command = engine.command(&["images", "push", "--plain-http", &name, NAME]);
    let sample = engine.measure(Detail::Sampled, |watch| watch.client(command).map(drop))?;
    let tag = folder.join("storage/docker/registry/v2/repositories/bench/five/_manifests/tags/pushed");
    ensure!(tag.exists(), "the registry does not have {name}");
    Ok(vec![sample])
}

/// That the image is there, complete, with a snapshot for each layer.
fn unpacked(engine: &Engine, name: &str) -> Result<()> {
    let list = engine.ctr(&["images", "check", &format!("name=={name}")])?;
    ensure!(list.contains("complete (6/6)"), "{name} is not complete: {list}");
    let snapshots =
        engine.ctr(&["snapshots", "ls"])?.lines().skip(1).filter(|line| line.contains("sha256:")).count();
    // containerd may keep views of its own; fewer than the layers are too few for either.
    let right = if engine.peer.kind == Kind::Gantry { snapshots == 5 } else { snapshots >= 5 };
    ensure!(right, "{name} has {snapshots} snapshots");
    Ok(())
}
