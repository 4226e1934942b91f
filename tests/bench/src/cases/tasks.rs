//! Containers, by each engine's own client.

use std::path::Path;
use std::process::Command;

use anyhow::Result;

use super::Bench;
use crate::measure::{Detail, Measure, Sample};
use crate::peers::Engine;

pub(super) fn run_true(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    let archive = engine.folder.join("busybox.tar");
    harness::image::busybox().write(&archive)?;
    engine.ctr(&["images", "import", archive.to_str().unwrap_or_default()])?;
    repeat(bench, engine, |name| engine.command(&["run", "--rm", harness::image::NAME, name, "true"]))
}

/// The same by dockerd's client, of an image of busybox and no more.
pub(super) fn run_true_by_docker(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    let archive = engine.folder.join("busybox.tar");
    let mut layer = tar::Builder::new(std::fs::File::create(&archive)?);
    for path in ["bin/busybox", "bin/true"] {
        layer.append_path_with_name(harness::image::BUSYBOX, path)?;
    }
    layer.finish()?;
    engine.ctr(&["import", archive.to_str().unwrap_or_default(), "busybox"])?;
    let options = ["run", "--rm", "--network", "none", "--name"];
    repeat(bench, engine, |name| engine.command(&[&options[..], &[name, "busybox", "/bin/true"]].concat()))
}

/// Runs a command again and again, each time with another name.
fn repeat(bench: &Bench<'_>, engine: &Engine, command: impl Fn(&str) -> Command) -> Result<Vec<Sample>> {
    let (first, count) = if bench.quick { (1, 10) } else { (3, 40) };
    let mut samples = Vec::new();
    for number in 0..first + count {
        let command = command(&format!("c{number}"));
        let sample = engine.measure(Detail::Short, |watch| watch.client(command).map(drop))?;
        if number >= first {
            samples.push(sample);
        }
    }
    Ok(samples)
}

/// What nobody gets around: the kernel's part alone.
pub(super) fn floor(bench: &Bench<'_>, _folder: &Path) -> Result<Vec<Sample>> {
    let count = if bench.quick { 5 } else { 40 };
    let one = || Ok(Sample::of([(Measure::Wall, sys::floor::measure()?.as_secs_f64())]));
    (0..count).map(|_| one()).collect()
}
