//! One layer into a snapshot, and the least that this can cost.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{self, Cursor, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _, symlink};
use std::path::Path;
use std::time::{Duration, Instant, SystemTime};

use anyhow::{Context as _, Result, ensure};
use flate2::read::GzDecoder;
use harness::client::{channel, in_namespace};
use proto::containerd::services::content::v1::ListContentRequest;
use proto::containerd::services::content::v1::content_client::ContentClient;
use proto::containerd::services::diff::v1::ApplyRequest;
use proto::containerd::services::diff::v1::diff_client::DiffClient;
use proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use proto::containerd::services::snapshots::v1::{CommitSnapshotRequest, PrepareSnapshotRequest};
use proto::containerd::types::Descriptor;
use tar::{Archive, EntryType};

use super::Bench;
use crate::image::Image;
use crate::measure::{Detail, Measure, Sample, own_time, sync};
use crate::peers::Engine;

pub(super) fn unpack(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    engine.ctr(&["images", "import", "--no-unpack", bench.image.one_layer().to_str().unwrap_or_default()])?;
    let size = fs::metadata(bench.image.layer().0)?.len() as i64;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let channel = runtime.block_on(channel(&engine.address()));
    let layer = runtime.block_on(async {
        let mut content = ContentClient::new(channel.clone());
        let request = in_namespace(&engine.namespace, ListContentRequest::default());
        let mut list = content.list(request).await?.into_inner();
        while let Some(part) = list.message().await? {
            if let Some(info) = part.info.into_iter().find(|info| info.size == size) {
                return Ok(info.digest);
            }
        }
        anyhow::bail!("the layer was not imported")
    })?;
    // In the page cache for everyone, as it was just written; read once more all the same.
    Image::warm(&engine.folder.join("root/io.containerd.content.v1.content/blobs"))?;
    let sample = engine.measure(Detail::Sampled, |_| {
        runtime.block_on(async {
            let mut snapshots = SnapshotsClient::new(channel.clone());
            let held = BTreeMap::from([("containerd.io/gc.root".to_owned(), "bench".to_owned())]);
            let prepared = PrepareSnapshotRequest {
                snapshotter: "overlayfs".into(),
                key: "bench".into(),
                labels: held.clone(),
                ..Default::default()
            };
            let mounts =
                snapshots.prepare(in_namespace(&engine.namespace, prepared)).await?.into_inner().mounts;
            let diff = Descriptor {
                media_type: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
                digest: layer,
                size,
                ..Default::default()
            };
            let apply = ApplyRequest { diff: Some(diff), mounts, ..Default::default() };
            DiffClient::new(channel.clone()).apply(in_namespace(&engine.namespace, apply)).await?;
            let commit = CommitSnapshotRequest {
                snapshotter: "overlayfs".into(),
                name: "bench-done".into(),
                key: "bench".into(),
                labels: held,
                ..Default::default()
            };
            snapshots.commit(in_namespace(&engine.namespace, commit)).await?;
            Ok(())
        })
    })?;
    Ok(vec![sample])
}

/// The decompressor alone, and the writes alone, one after the other.
pub(super) fn floor(bench: &Bench<'_>, folder: &Path) -> Result<Vec<Sample>> {
    let (packed, plain) = bench.image.layer();
    Image::warm(&packed)?;
    let tree = Tree::read(&plain)?;
    let target = folder.join("tree");
    fs::create_dir_all(&target)?;
    sync(folder)?;
    let (began, time) = (Instant::now(), own_time()?);
    decompress(&packed, tree.size)?;
    tree.write(&target)?;
    let (wall, time) = (began.elapsed(), own_time()? - time);
    let flush = Instant::now();
    sync(folder)?;
    let synced = wall + flush.elapsed();
    Ok(vec![Sample::of([
        (Measure::Wall, wall.as_secs_f64()),
        (Measure::Synced, synced.as_secs_f64()),
        (Measure::Cpu, time.as_secs_f64()),
    ])])
}

fn decompress(packed: &Path, size: u64) -> Result<()> {
    let mut decoder = GzDecoder::new(File::open(packed)?);
    let mut null = File::options().write(true).open("/dev/null")?;
    let (mut buffer, mut sum) = (vec![0; 256 << 10], 0);
    loop {
        let read = decoder.read(&mut buffer)?;
        if read == 0 {
            break;
        }
        null.write_all(&buffer[..read])?;
        sum += read as u64;
    }
    ensure!(sum == size, "{} has {sum} bytes inside, expected {size}", packed.display());
    Ok(())
}

/// A layer's tree in memory.
struct Tree {
    size: u64,
    entries: Vec<Entry>,
}

struct Entry {
    path: String,
    mode: u32,
    time: SystemTime,
    what: What,
}

enum What {
    Folder,
    File(Vec<u8>),
    Link(String),
}

impl Tree {
    fn read(plain: &Path) -> Result<Self> {
        let bytes = fs::read(plain)?;
        let (size, mut entries) = (bytes.len() as u64, Vec::new());
        for entry in Archive::new(Cursor::new(bytes)).entries()? {
            let mut entry = entry?;
            let path = entry.path()?.to_str().context("a name that is not text")?.to_owned();
            let (mode, time) = (entry.header().mode()?, entry.header().mtime()?);
            let what = match entry.header().entry_type() {
                EntryType::Directory => What::Folder,
                EntryType::Symlink => {
                    let target = entry.link_name()?.context("a link to nothing")?;
                    What::Link(target.to_str().context("a name that is not text")?.to_owned())
                }
                _ => {
                    let mut bytes = Vec::with_capacity(entry.size() as usize);
                    entry.read_to_end(&mut bytes)?;
                    What::File(bytes)
                }
            };
            entries.push(Entry {
                path,
                mode,
                time: SystemTime::UNIX_EPOCH + Duration::from_secs(time),
                what,
            });
        }
        Ok(Tree { size, entries })
    }

    fn write(&self, target: &Path) -> io::Result<()> {
        for entry in &self.entries {
            let path = target.join(&entry.path);
            match &entry.what {
                What::Folder => fs::DirBuilder::new().mode(entry.mode).create(&path)?,
                What::Link(to) => symlink(to, &path)?,
                What::File(bytes) => {
                    let mut file =
                        File::options().write(true).create_new(true).mode(entry.mode).open(&path)?;
                    file.write_all(bytes)?;
                    file.set_modified(entry.time)?;
                }
            }
        }
        // After what is in them, which changes their times.
        for folder in self.entries.iter().rev().filter(|entry| matches!(entry.what, What::Folder)) {
            File::open(target.join(&folder.path))?.set_modified(folder.time)?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_floor_writes_the_tree_that_the_layer_has() {
        let folder = tempfile::tempdir().unwrap();
        let image = Image::get(folder.path(), 2).unwrap();
        let tree = Tree::read(&image.layer().1).unwrap();
        let target = folder.path().join("tree");
        fs::create_dir(&target).unwrap();
        tree.write(&target).unwrap();
        decompress(&image.layer().0, tree.size).unwrap();
        assert_eq!(tree.entries.len(), image.about.layers[0].entries);
        for entry in &tree.entries {
            let path = target.join(&entry.path);
            match &entry.what {
                What::Folder => assert_eq!(path.metadata().unwrap().modified().unwrap(), entry.time),
                What::File(bytes) => assert_eq!(&fs::read(&path).unwrap(), bytes),
                What::Link(to) => assert_eq!(fs::read_link(&path).unwrap(), Path::new(to)),
            }
        }
    }
}
