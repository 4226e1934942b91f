//! What the snapshotters of this crate share: a folder for each snapshot, in step with the records.
//!
//! ```text
//! <root>/snapshots/<id>/        what a snapshot holds; `fs` in it, or what the [`Layout`] says
//! <root>/snapshots/.<id>        removed, to be deleted
//! <root>/journal, lock          the records: see `store`
//! ```
//!
//! A folder without a record is a leftover and goes at the next clean-up; a record is written after its folder is on disk
//! and deleted before it goes, so that the records are the truth. A record without a folder is therefore no work of a
//! power cut: something that was there has been lost, which is said and never papered over with an empty folder.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use crate::store::{Record, Store};
use crate::{Commit, Error, Info, Kind, Labels, Mount, REBASE, REMAP, Result, Snapshotter, Usage, io};

/// What each snapshotter does in a way of its own. The rest is the same for all.
pub(crate) trait Way: Send + Sync {
    fn folders(&self) -> &Folders;
    /// Makes an active snapshot or a view.
    fn make(&self, key: &str, kind: Kind, parent: &str, labels: &Labels) -> Result<()>;
    /// The mounts of an active snapshot or a view.
    fn mounts_of(&self, key: &str, record: &Record) -> Result<Vec<Mount>>;
    fn commit(&self, name: &str, key: &str, labels: &Labels) -> Result<()> {
        self.folders().commit(name, key, labels, |folder, record| {
            let usage = self.measure(folder, record)?;
            sync_filesystem(folder)?;
            Ok(usage)
        })
    }
    /// Whether a layer is nothing but its own folder, so that its parent may come with its commit; then `rebase` makes
    /// what of it looks like its parent, whose topmost folder is `lower`.
    fn rebases(&self) -> bool {
        false
    }
    fn rebase(&self, _folder: &Path, _lower: &Path, _labels: &Labels) -> Result<()> {
        Ok(())
    }
    fn remove(&self, key: &str) -> Result<()> {
        self.folders().remove(key).map(drop)
    }
    /// What an active snapshot takes, whose folder this is.
    fn measure(&self, folder: &Path, _record: &Record) -> Result<Usage> {
        let content = folder.join(CONTENT);
        sys::fs::usage(&content).map_err(io("measure", &content))
    }
    fn cleanup(&self) -> Result<()> {
        self.folders().cleanup()
    }
    /// Whether a snapshot's labels may say that it has other owners.
    fn remaps(&self) -> bool {
        false
    }
}

impl<W: Way> Snapshotter for W {
    fn prepare(&self, key: &str, parent: &str, labels: &Labels) -> Result<Vec<Mount>> {
        self.make(key, Kind::Active, parent, labels)?;
        self.mounts(key)
    }

    fn view(&self, key: &str, parent: &str, labels: &Labels) -> Result<Vec<Mount>> {
        self.make(key, Kind::View, parent, labels)?;
        self.mounts(key)
    }

    fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let record = self.folders().store.get(key)?;
        if record.kind == Kind::Committed {
            return Err(Error::FailedPrecondition(format!(
                "snapshot {key:?} is committed, and has no mounts; prepare or view one over it"
            )));
        }
        self.mounts_of(key, &record)
    }

    fn commit(&self, name: &str, key: &str, labels: &Labels) -> Result<()> {
        Way::commit(self, name, key, labels)
    }

    fn commit_stack(&self, commits: &[Commit]) -> Result<()> {
        match commits {
            [Commit { name, key, parent: None, labels }] => Way::commit(self, name, key, labels),
            _ if self.rebases() => self.folders().commit_stack(
                commits,
                |folder, lower, labels| self.rebase(folder, lower, labels),
                |folder, record| self.measure(folder, record),
            ),
            _ => Err(Error::Unsupported("this snapshotter does not put layers onto other parents".into())),
        }
    }

    fn layers(&self, parent: &str) -> Result<Vec<PathBuf>> {
        if self.rebases() {
            return self.folders().layers(parent);
        }
        Err(Error::Unsupported(format!("the layers of {parent:?} are no plain folders")))
    }

    fn remove(&self, key: &str) -> Result<()> {
        Way::remove(self, key)
    }

    fn stat(&self, key: &str) -> Result<Info> {
        self.folders().store.get(key).map(|record| record.info(key))
    }

    fn update(&self, info: &Info, paths: &[String]) -> Result<Info> {
        self.folders().store.update(info, paths)
    }

    fn walk(&self, visit: &mut dyn FnMut(Info) -> Result<()>) -> Result<()> {
        self.folders().store.all().into_iter().try_for_each(|(key, record)| visit(record.info(&key)))
    }

    fn usage(&self, key: &str) -> Result<Usage> {
        let folders = self.folders();
        let record = folders.store.get(key)?;
        if record.kind != Kind::Active {
            return Ok(record.usage());
        }
        folders.content(key, record.id, record.kind)?;
        self.measure(&folders.path(record.id), &record)
    }

    fn cleanup(&self) -> Result<()> {
        Way::cleanup(self)
    }

    fn capabilities(&self) -> &'static [&'static str] {
        match (self.rebases(), self.remaps()) {
            (true, true) => &[REBASE, REMAP],
            (true, false) => &[REBASE],
            (false, true) => &[REMAP],
            (false, false) => &[],
        }
    }
}

/// What holds a snapshot, in its folder.
pub(crate) const CONTENT: &str = "fs";

/// How a snapshotter keeps snapshots in their folders.
pub(crate) struct Layout {
    /// What holds a layer; of the others it is [`CONTENT`].
    pub(crate) layer: &'static str,
    /// Removes a folder.
    pub(crate) remove: fn(&Path) -> io::Result<()>,
}

/// Plain folders.
pub(crate) const PLAIN: Layout = Layout { layer: CONTENT, remove: sys::fs::remove_tree };

/// The folders, with their records.
pub(crate) struct Folders {
    pub(crate) root: PathBuf,
    pub(crate) store: Store,
    layout: Layout,
}

impl Folders {
    /// Opens the records. Removes nothing: that is for [`Folders::cleanup`].
    pub(crate) fn open(root: &Path, layout: Layout) -> Result<Self> {
        let snapshots = root.join("snapshots");
        sys::fs::create_dir_all(root, 0o700).map_err(io("create", root))?;
        sys::fs::create_dir_all(&snapshots, 0o700).map_err(io("create", &snapshots))?;
        let mut taken = 0;
        for entry in fs::read_dir(&snapshots).map_err(io("list", &snapshots))? {
            let name = entry.map_err(io("list", &snapshots))?.file_name();
            let name = name.to_string_lossy();
            taken = taken.max(name.trim_start_matches('.').parse().unwrap_or(0));
        }
        let folders = Folders { root: root.to_owned(), store: Store::open(root, taken)?, layout };
        for (key, record) in folders.store.all() {
            if let Err(error) = folders.content(&key, record.id, record.kind) {
                tracing::error!(kind = ?record.kind, %error, "a snapshot is lost");
            }
        }
        Ok(folders)
    }

    /// What the snapshot `key` holds, in the folder of this number; Lost when that is not there.
    pub(crate) fn content(&self, key: &str, id: u64, kind: Kind) -> Result<PathBuf> {
        let name = if kind == Kind::Committed { self.layout.layer } else { CONTENT };
        let content = self.path(id).join(name);
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

    /// What the layer `parent` itself holds; None where there is no parent.
    pub(crate) fn layer(&self, parent: &str) -> Result<Option<PathBuf>> {
        let chain = self.store.chain(parent)?;
        chain.first().map(|(key, id)| self.content(key, *id, Kind::Committed)).transpose()
    }

    /// What the layer `parent` and those beneath it hold, from the top.
    pub(crate) fn layers(&self, parent: &str) -> Result<Vec<PathBuf>> {
        let chain = self.store.chain(parent)?;
        chain.into_iter().map(|(key, id)| self.content(&key, id, Kind::Committed)).collect()
    }

    pub(crate) fn path(&self, id: u64) -> PathBuf {
        self.root.join("snapshots").join(id.to_string())
    }

    /// Makes a snapshot: first its folder, with `fs` in it, which `fill` makes, given the folder and its number; then its
    /// record.
    pub(crate) fn make(
        &self,
        key: &str,
        kind: Kind,
        parent: &str,
        labels: &Labels,
        fill: impl FnOnce(&Path, u64) -> Result<()>,
    ) -> Result<()> {
        self.store.check_new(key, parent)?;
        let id = self.store.begin();
        let folder = self.path(id);
        let made = sys::fs::create_dir(&folder, 0o700)
            .map_err(io("create", &folder))
            .and_then(|()| {
                sys::failpoint!("snapshots.make.folder");
                fill(&folder, id)
            })
            .and_then(|()| {
                sys::failpoint!("snapshots.make.filled");
                self.settle(&folder)
            })
            .and_then(|()| {
                sys::failpoint!("snapshots.make.settled");
                self.store.create(key, id, kind, parent, labels)
            });
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
        for folder in [&folder.join(CONTENT), folder, &self.root.join("snapshots")] {
            sys::fs::sync_dir(folder).map_err(io("sync", folder))?;
        }
        Ok(())
    }

    /// Commits a snapshot once `seal` has put everything in its folder on disk, and said what it takes.
    pub(crate) fn commit(
        &self,
        name: &str,
        key: &str,
        labels: &Labels,
        seal: impl FnOnce(&Path, &Record) -> Result<Usage>,
    ) -> Result<()> {
        let record = self.store.check_commit(name, key)?;
        self.content(key, record.id, record.kind)?;
        let usage = seal(&self.path(record.id), &record)?;
        sys::failpoint!("snapshots.commit.sealed");
        self.store.commit(name, key, usage, labels)
    }

    /// Commits snapshots that are plain folders, which may get other parents with that. `look` is given a snapshot's folder,
    /// the content of its new parent, and the snapshot's labels; `measure` says what one takes.
    fn commit_stack(
        &self,
        commits: &[Commit],
        look: impl Fn(&Path, &Path, &Labels) -> Result<()>,
        measure: impl Fn(&Path, &Record) -> Result<Usage>,
    ) -> Result<()> {
        let mut made = HashMap::new();
        let mut sealed = Vec::new();
        for commit in commits {
            let record = self.store.check_commit(&commit.name, &commit.key)?;
            let content = self.content(&commit.key, record.id, record.kind)?;
            let folder = self.path(record.id);
            if let Some(parent) = commit.parent.as_deref().filter(|parent| !parent.is_empty()) {
                let lower = match made.get(parent) {
                    Some(lower) => Some(PathBuf::clone(lower)),
                    None => self.layer(parent)?,
                };
                if let Some(lower) = lower {
                    look(&folder, &lower, &record.labels)?;
                }
            }
            made.insert(commit.name.as_str(), content);
            sealed.push((commit, measure(&folder, &record)?));
        }
        sync_filesystem(&self.root)?;
        sys::failpoint!("snapshots.commit-stack.sealed");
        self.store.commit_stack(&sealed)
    }

    /// Removes a snapshot; the record that it had.
    pub(crate) fn remove(&self, key: &str) -> Result<Record> {
        let record = self.store.remove(key)?;
        sys::failpoint!("snapshots.remove.recorded");
        self.discard(record.id);
        Ok(record)
    }

    /// Deletes the folder of a snapshot that has no record (any more). What cannot be deleted now, a clean-up will.
    fn discard(&self, id: u64) {
        let (folder, trash) = (self.path(id), self.root.join("snapshots").join(format!(".{id}")));
        let removed = fs::rename(&folder, &trash).and_then(|()| {
            sys::failpoint!("snapshots.remove.renamed");
            (self.layout.remove)(&trash)
        });
        match removed {
            Ok(()) => sys::failpoint!("snapshots.remove.removed"),
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
                (self.layout.remove)(&entry.path()).map_err(io("remove", &entry.path()))?;
            }
        }
        Ok(())
    }
}

/// Puts everything of the file system that holds `path` on disk. One sync, not one a file: a layer has thousands, and each
/// is a commit of the file system's own journal. docs/decisions/0004-snapshots.md has the figures.
pub(crate) fn sync_filesystem(path: &Path) -> Result<()> {
    sys::fs::sync_filesystem(path).map_err(io("sync the file system of", path))
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_new_number_is_none_that_a_folder_has() {
        let dir = tempfile::tempdir().unwrap();
        let folders = Folders::open(dir.path(), PLAIN).unwrap();
        drop(folders);
        for leftover in ["7/fs", ".9/fs", "lost+found"] {
            fs::create_dir_all(dir.path().join("snapshots").join(leftover)).unwrap();
        }
        let folders = Folders::open(dir.path(), PLAIN).unwrap();
        assert!(folders.path(7).exists(), "an open removes nothing");
        folders.cleanup().unwrap();
        assert!(!folders.path(7).exists());
        assert_eq!(folders.store.begin(), 10);
    }
}
