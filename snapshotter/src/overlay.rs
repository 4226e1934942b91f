//! Snapshots as overlay mounts: each has a folder for what it changed, stacked by the kernel.
//!
//! ```text
//! <root>/snapshots/<id>/fs      what the snapshot itself holds: the upper folder, and a lower one of its children
//! <root>/snapshots/<id>/work    overlayfs' scratch folder, for an active snapshot
//! <root>/snapshots/.<id>        removed, to be deleted
//! <root>/journal, lock          the records: see `store`
//! ```
//!
//! A folder without a record is a leftover and goes at the next clean-up; a record is written after its folder is on disk
//! and deleted before it goes, so that the records are the truth. A record without a folder is therefore no work of a
//! power cut: something that was there has been lost, which is said and never papered over with an empty folder.

use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::store::{Record, Store};
use crate::{Error, Info, Kind, Labels, Mount, Result, Snapshotter, Usage, io};

pub(crate) const NAME: &str = "overlayfs";

/// The overlay snapshotter.
pub struct Overlay {
    folders: Folders,
    /// Options for every overlay mount.
    options: Vec<String>,
}

impl Overlay {
    /// Opens, or makes, the snapshots in `root`; Unsupported when its file system cannot be a layer of an overlay.
    pub fn open(root: &Path) -> Result<Self> {
        let folders = Folders::open(root)?;
        probe(root)?;
        // With the index, a lower folder that moves (a restored backup, a new device number) makes mounts fail.
        let index = Path::new("/sys/module/overlay/parameters/index").exists();
        Ok(Overlay { folders, options: if index { vec!["index=off".into()] } else { Vec::new() } })
    }

    fn mounts_of(&self, key: &str, record: &Record) -> Result<Vec<Mount>> {
        let own = self.folders.path(record.id);
        let lowers = self.folders.layers(&record.parent)?;
        if record.kind == Kind::Active || lowers.is_empty() {
            self.folders.content(key, record.id)?;
        }
        let mount = match (record.kind, &lowers[..]) {
            (Kind::Committed, _) => return Err(not_mountable(key)),
            (Kind::Active, []) => bind(&own.join("fs"), "rw"),
            (Kind::View, []) => bind(&own.join("fs"), "ro"),
            (Kind::View, [only]) => bind(only, "ro"),
            (kind, lowers) => {
                let mut options = self.options.clone();
                if kind == Kind::Active {
                    options.push(format!("workdir={}", own.join("work").display()));
                    options.push(format!("upperdir={}", own.join("fs").display()));
                }
                let lowers: Vec<_> = lowers
                    .iter()
                    .map(|lower| sys::mount::escape_lower(lower.as_os_str()).to_string_lossy().into_owned())
                    .collect();
                options.push(format!("lowerdir={}", lowers.join(":")));
                Mount { kind: "overlay".into(), source: "overlay".into(), target: String::new(), options }
            }
        };
        Ok(vec![mount])
    }

    fn make(&self, key: &str, kind: Kind, parent: &str, labels: &Labels) -> Result<Vec<Mount>> {
        self.folders.make(key, kind, parent, labels, |folder| {
            // All of them, or what is made here could not be mounted.
            let lowers = self.folders.layers(parent)?;
            let upper = folder.join("fs");
            sys::fs::create_dir(&upper, 0o755).map_err(io("create", &upper))?;
            if kind == Kind::Active {
                let work = folder.join("work");
                sys::fs::create_dir(&work, 0o711).map_err(io("create", &work))?;
            }
            // The top folder of the merged tree is the upper one: it must look like the parent's.
            if let Some(parent) = lowers.first() {
                let metadata = fs::metadata(parent).map_err(io("look at", parent))?;
                copy_ownership(&metadata, &upper).map_err(io("set the owner of", &upper))?;
            }
            Ok(())
        })?;
        self.mounts(key)
    }
}

impl Snapshotter for Overlay {
    fn prepare(&self, key: &str, parent: &str, labels: &Labels) -> Result<Vec<Mount>> {
        self.make(key, Kind::Active, parent, labels)
    }

    fn view(&self, key: &str, parent: &str, labels: &Labels) -> Result<Vec<Mount>> {
        self.make(key, Kind::View, parent, labels)
    }

    fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        self.mounts_of(key, &self.folders.mountable(key)?)
    }

    fn commit(&self, name: &str, key: &str, labels: &Labels) -> Result<()> {
        self.folders.commit(name, key, labels)
    }

    fn remove(&self, key: &str) -> Result<()> {
        self.folders.remove(key)
    }

    fn stat(&self, key: &str) -> Result<Info> {
        self.folders.store.get(key).map(|record| record.info(key))
    }

    fn update(&self, info: &Info, paths: &[String]) -> Result<Info> {
        self.folders.store.update(info, paths)
    }

    fn walk(&self, visit: &mut dyn FnMut(Info) -> Result<()>) -> Result<()> {
        self.folders.store.all().into_iter().try_for_each(|(key, record)| visit(record.info(&key)))
    }

    fn usage(&self, key: &str) -> Result<Usage> {
        self.folders.usage(key)
    }

    fn cleanup(&self) -> Result<()> {
        self.folders.cleanup()
    }
}

/// What the snapshotters of this crate share: a folder for each snapshot, in step with the records.
pub(crate) struct Folders {
    root: PathBuf,
    pub(crate) store: Store,
}

impl Folders {
    /// Opens the records. Removes nothing: that is for [`Folders::cleanup`].
    pub(crate) fn open(root: &Path) -> Result<Self> {
        let snapshots = root.join("snapshots");
        sys::fs::create_dir_all(root, 0o700).map_err(io("create", root))?;
        sys::fs::create_dir_all(&snapshots, 0o700).map_err(io("create", &snapshots))?;
        let mut taken = 0;
        for entry in fs::read_dir(&snapshots).map_err(io("list", &snapshots))? {
            let name = entry.map_err(io("list", &snapshots))?.file_name();
            let name = name.to_string_lossy();
            taken = taken.max(name.trim_start_matches('.').parse().unwrap_or(0));
        }
        let folders = Folders { root: root.to_owned(), store: Store::open(root, taken)? };
        for (key, record) in folders.store.all() {
            if let Err(error) = folders.content(&key, record.id) {
                tracing::error!(kind = ?record.kind, %error, "a snapshot is lost");
            }
        }
        Ok(folders)
    }

    /// What the snapshot `key` holds, in the folder of this number; Lost when that is not there.
    pub(crate) fn content(&self, key: &str, id: u64) -> Result<PathBuf> {
        let content = self.path(id).join("fs");
        match fs::symlink_metadata(&content) {
            Ok(_) => Ok(content),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Err(Error::Lost(format!(
                "{}, which holds snapshot {key:?}, is not there any more; put it back, or remove the snapshot and what is \
                 stacked on it, and make them anew (unpack the image again)",
                content.display()
            ))),
            Err(error) => Err(io("look at", &content)(error)),
        }
    }

    /// What the layer `parent` and those beneath it hold, from the top.
    pub(crate) fn layers(&self, parent: &str) -> Result<Vec<PathBuf>> {
        self.store.chain(parent)?.into_iter().map(|(key, id)| self.content(&key, id)).collect()
    }

    pub(crate) fn path(&self, id: u64) -> PathBuf {
        self.root.join("snapshots").join(id.to_string())
    }

    /// The record of a snapshot that has mounts; a layer has none.
    pub(crate) fn mountable(&self, key: &str) -> Result<Record> {
        let record = self.store.get(key)?;
        if record.kind == Kind::Committed { Err(not_mountable(key)) } else { Ok(record) }
    }

    /// Makes a snapshot: first its folder, with `fs` in it, which `fill` makes; then its record.
    pub(crate) fn make(
        &self,
        key: &str,
        kind: Kind,
        parent: &str,
        labels: &Labels,
        fill: impl FnOnce(&Path) -> Result<()>,
    ) -> Result<()> {
        self.store.check_new(key, parent)?;
        let id = self.store.begin();
        let folder = self.path(id);
        let made = sys::fs::create_dir(&folder, 0o700)
            .map_err(io("create", &folder))
            .and_then(|()| fill(&folder))
            .and_then(|()| self.settle(&folder))
            .and_then(|()| self.store.create(key, id, kind, parent, labels));
        // A record that may be on disk keeps its folder.
        if made.is_err() && self.store.get(key).map_or(true, |record| record.id != id) {
            self.discard(id);
        }
        self.store.made(id);
        made
    }

    /// Puts a new folder and its `fs` on disk, for the record that comes next: not every file system does so with the
    /// journal's sync.
    fn settle(&self, folder: &Path) -> Result<()> {
        for folder in [&folder.join("fs"), folder, &self.root.join("snapshots")] {
            sys::fs::sync_dir(folder).map_err(io("sync", folder))?;
        }
        Ok(())
    }

    /// Commits a snapshot once everything in it is on disk.
    pub(crate) fn commit(&self, name: &str, key: &str, labels: &Labels) -> Result<()> {
        let record = self.store.check_commit(name, key)?;
        let content = self.content(key, record.id)?;
        let usage = sys::fs::usage(&content).map_err(io("measure", &content))?;
        // One sync of the file system, not one a file: a layer has thousands, and each sync is a commit of the
        // file system's own journal. docs/decisions/0004-snapshots.md has the figures.
        sys::fs::sync_filesystem(&content).map_err(io("sync the file system of", &content))?;
        self.store.commit(name, key, usage, labels)
    }

    pub(crate) fn remove(&self, key: &str) -> Result<()> {
        let id = self.store.remove(key)?;
        self.discard(id);
        Ok(())
    }

    pub(crate) fn usage(&self, key: &str) -> Result<Usage> {
        let record = self.store.get(key)?;
        if record.kind != Kind::Active {
            return Ok(record.usage());
        }
        let content = self.content(key, record.id)?;
        sys::fs::usage(&content).map_err(io("measure", &content))
    }

    /// Deletes the folder of a snapshot that has no record (any more). What cannot be deleted now, a clean-up will.
    fn discard(&self, id: u64) {
        let (folder, trash) = (self.path(id), self.root.join("snapshots").join(format!(".{id}")));
        match fs::rename(&folder, &trash).and_then(|()| sys::fs::remove_tree(&trash)) {
            Ok(()) => {}
            // It was lost.
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => {
                tracing::warn!(folder = %folder.display(), %error, "a removed snapshot's folder is left for a later clean-up");
            }
        }
    }

    /// Deletes folders that no record names.
    pub(crate) fn cleanup(&self) -> Result<()> {
        let snapshots = self.root.join("snapshots");
        // Numbers from here on may belong to snapshots that are being made, whose records come last.
        let bound = self.store.making_from();
        let known: std::collections::HashSet<u64> =
            self.store.all().iter().map(|(_, record)| record.id).collect();
        for entry in fs::read_dir(&snapshots).map_err(io("list", &snapshots))? {
            let entry = entry.map_err(io("list", &snapshots))?;
            let name = entry.file_name();
            let name = name.to_string_lossy();
            let leftover = match name.parse::<u64>() {
                Ok(id) => id < bound && !known.contains(&id),
                Err(_) => name.starts_with('.'),
            };
            if leftover {
                tracing::info!(folder = %entry.path().display(), "removing a leftover of a snapshot");
                sys::fs::remove_tree(&entry.path()).map_err(io("remove", &entry.path()))?;
            }
        }
        Ok(())
    }
}

fn not_mountable(key: &str) -> Error {
    Error::FailedPrecondition(format!(
        "snapshot {key:?} is committed, and has no mounts; prepare or view one over it"
    ))
}

pub(crate) fn bind(source: &Path, mode: &str) -> Mount {
    Mount {
        kind: "bind".into(),
        source: source.display().to_string(),
        target: String::new(),
        options: vec![mode.into(), "rbind".into()],
    }
}

pub(crate) fn copy_ownership(from: &fs::Metadata, to: &Path) -> io::Result<()> {
    std::os::unix::fs::lchown(to, Some(from.uid()), Some(from.gid()))?;
    fs::set_permissions(to, fs::Permissions::from_mode(from.mode() & 0o7777))
}

/// Tries a small overlay on the file system of `root`.
fn probe(root: &Path) -> Result<()> {
    let folder = root.join("probe");
    sys::fs::remove_tree(&folder).map_err(io("remove", &folder))?;
    let tried = (|| {
        let mut paths = Vec::new();
        for name in ["lower", "lower2", "upper", "work"] {
            let path = folder.join(name);
            sys::fs::create_dir_all(&path, 0o700)?;
            paths.push(path.display().to_string());
        }
        let options = vec![
            format!("lowerdir={}:{}", paths[0], paths[1]),
            format!("upperdir={}", paths[2]),
            format!("workdir={}", paths[3]),
        ];
        let mount =
            Mount { kind: "overlay".into(), source: "overlay".into(), target: String::new(), options };
        sys::mount::Mounted::new(&[mount], &folder).map(drop)
    })();
    let removed = sys::fs::remove_tree(&folder);
    tried.map_err(|error| {
        Error::Unsupported(format!(
            "{} cannot hold overlay layers: {error}; put the root on ext4 or xfs (with d_type), or use the native \
             snapshotter",
            root.display()
        ))
    })?;
    removed.map_err(io("remove", &folder))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_without_mounts_is_called_by_its_own_name() {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "this test cannot run here");
            println!("SKIPPED: the probe mounts, which needs root");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let overlay = Overlay::open(dir.path()).unwrap();
        for (name, parent) in [("one", ""), ("two", "one")] {
            overlay.prepare("k", parent, &Labels::new()).unwrap();
            overlay.commit(name, "k", &Labels::new()).unwrap();
        }
        let refused = overlay.mounts_of("two", &overlay.folders.store.get("two").unwrap());
        assert!(
            matches!(&refused, Err(Error::FailedPrecondition(text)) if text.contains("\"two\"")),
            "{refused:?}"
        );
    }

    #[test]
    fn a_new_number_is_none_that_a_folder_has() {
        let dir = tempfile::tempdir().unwrap();
        let folders = Folders::open(dir.path()).unwrap();
        drop(folders);
        for leftover in ["7/fs", ".9/fs", "lost+found"] {
            fs::create_dir_all(dir.path().join("snapshots").join(leftover)).unwrap();
        }
        let folders = Folders::open(dir.path()).unwrap();
        assert!(folders.path(7).exists(), "an open removes nothing");
        folders.cleanup().unwrap();
        assert!(!folders.path(7).exists());
        assert_eq!(folders.store.begin(), 10);
    }
}
