//! Snapshots as subvolumes of a btrfs, which share what they have in common.
//!
//! ```text
//! <root>/snapshots/<id>/fs      a subvolume with the whole tree; frozen when it is a layer
//! ```
//!
//! They are mounted from the file system's device by the subvolume's number, as containerd's are.
//!
//! Invariant: a subvolume is frozen before its record says that it is a layer. One that an active snapshot's record names
//! is thawed at the next open: the commit did not come to its end.

use std::path::Path;

use crate::folders::{CONTENT, Folders, Layout, Way, sync_filesystem};
use crate::store::Record;
use crate::{Error, Kind, Labels, Mount, Result, Usage, io};

pub(crate) const NAME: &str = "btrfs";

pub(crate) const SUBVOLUMES: Layout = Layout { layer: CONTENT, remove: sys::btrfs::remove_tree };

/// The btrfs snapshotter.
pub struct Btrfs {
    folders: Folders,
    device: String,
}

impl Btrfs {
    /// Opens, or makes, the snapshots in `root`; Unsupported when it does not lie on btrfs.
    pub fn open(root: &Path) -> Result<Self> {
        if !sys::btrfs::holds(root).map_err(io("ask for the file system of", root))? {
            return Err(Error::Unsupported(format!(
                "{} must be on a btrfs file system to be used with the btrfs snapshotter",
                root.display()
            )));
        }
        let folders = Folders::open(root, SUBVOLUMES)?;
        let (_, device) = sys::mount::filesystem_of(root).map_err(io("ask for the mount of", root))?;
        for (key, record) in folders.store.all() {
            let Ok(own) = folders.content(&key, record.id, record.kind) else { continue };
            let frozen = sys::btrfs::is_read_only(&own).map_err(io("look at the subvolume", &own))?;
            if record.kind == Kind::Active && frozen {
                sys::btrfs::set_read_only(&own, false).map_err(io("thaw the subvolume", &own))?;
            }
        }
        Ok(Btrfs { folders, device })
    }
}

impl Way for Btrfs {
    fn folders(&self) -> &Folders {
        &self.folders
    }

    fn make(&self, key: &str, kind: Kind, parent: &str, labels: &Labels) -> Result<()> {
        self.folders.make(key, kind, parent, labels, |folder, _| {
            let own = folder.join(CONTENT);
            match self.folders.layer(parent)? {
                // A view without changes of its own shows its parent's.
                Some(parent) if kind == Kind::Active => sys::btrfs::snapshot(&parent, &own)
                    .map_err(io("make a snapshot of the subvolume", &parent)),
                _ => {
                    sys::btrfs::create(&own).map_err(io("create the subvolume", &own))?;
                    sys::fs::create_dir_all(&own, 0o755).map_err(io("set the mode of", &own))
                }
            }
        })
    }

    fn mounts_of(&self, key: &str, record: &Record) -> Result<Vec<Mount>> {
        let shown = match (record.kind, self.folders.layer(&record.parent)?) {
            (Kind::View, Some(parent)) => parent,
            _ => self.folders.content(key, record.id, record.kind)?,
        };
        let id = sys::btrfs::id(&shown).map_err(io("ask for the number of the subvolume", &shown))?;
        let mut options = vec![format!("subvolid={id}")];
        if record.kind == Kind::View {
            options.push("ro".into());
        }
        Ok(vec![Mount { kind: NAME.into(), source: self.device.clone(), target: String::new(), options }])
    }

    fn commit(&self, name: &str, key: &str, labels: &Labels) -> Result<()> {
        let mut frozen = None;
        let committed = self.folders.commit(name, key, labels, |folder, record| {
            let own = folder.join(CONTENT);
            sys::btrfs::set_read_only(&own, true).map_err(io("freeze the subvolume", &own))?;
            frozen = Some((own, record.id));
            let usage = self.measure(folder, record)?;
            sync_filesystem(folder)?;
            Ok(usage)
        });
        // Unless the layer may be on disk, the snapshot goes on as it was.
        if let (Err(_), Some((own, id))) = (&committed, frozen)
            && self.folders.store.get(key).is_ok_and(|record| record.id == id && record.kind == Kind::Active)
            && let Err(error) = sys::btrfs::set_read_only(&own, false)
        {
            tracing::warn!(subvolume = %own.display(), %error, "a snapshot that was not committed stays frozen");
        }
        committed
    }

    /// By looking at each file: quotas, where they are on, know no number of files, and not at once.
    fn measure(&self, folder: &Path, record: &Record) -> Result<Usage> {
        let own = folder.join(CONTENT);
        let measured = match self.folders.layer(&record.parent)? {
            Some(parent) => sys::fs::usage_beyond(&own, &parent),
            None => sys::fs::usage(&own),
        };
        measured.map_err(io("measure", &own))
    }
}
