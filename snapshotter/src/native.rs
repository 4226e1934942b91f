//! Snapshots as plain folders, copied whole from the parent: for a file system that overlayfs does not take.
//!
//! ```text
//! <root>/snapshots/<id>/fs      the whole tree
//! ```
//!
//! Where the file system can share blocks (btrfs, xfs), copies share them.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags};

use crate::overlay::{Folders, bind};
use crate::{Info, Kind, Labels, Mount, Result, Snapshotter, Usage, io};

pub(crate) const NAME: &str = "native";

/// The copying snapshotter.
pub struct Native {
    folders: Folders,
}

impl Native {
    /// Opens, or makes, the snapshots in `root`.
    pub fn open(root: &Path) -> Result<Self> {
        Ok(Native { folders: Folders::open(root)? })
    }

    fn make(&self, key: &str, kind: Kind, parent: &str, labels: &Labels) -> Result<Vec<Mount>> {
        self.folders.make(key, kind, parent, labels, |folder| {
            // Each is whole, so that those further beneath do not matter.
            let beneath = match self.folders.store.chain(parent)?.first() {
                Some((parent, id)) => Some(self.folders.content(parent, *id)?),
                None => None,
            };
            let own = folder.join("fs");
            sys::fs::create_dir(&own, 0o755).map_err(io("create", &own))?;
            match beneath {
                // A view without changes of its own shows its parent's folder.
                Some(parent) if kind == Kind::Active => {
                    copy_tree(&parent, &own).map_err(io("copy into a snapshot", &parent))?;
                    // The copy is a part of what is acknowledged: a power cut must not leave half of it.
                    sys::fs::sync_filesystem(&own).map_err(io("sync the file system of", &own))
                }
                _ => Ok(()),
            }
        })?;
        self.mounts(key)
    }
}

impl Snapshotter for Native {
    fn prepare(&self, key: &str, parent: &str, labels: &Labels) -> Result<Vec<Mount>> {
        self.make(key, Kind::Active, parent, labels)
    }

    fn view(&self, key: &str, parent: &str, labels: &Labels) -> Result<Vec<Mount>> {
        self.make(key, Kind::View, parent, labels)
    }

    fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let record = self.folders.mountable(key)?;
        let shown = match (record.kind, self.folders.store.chain(&record.parent)?.first()) {
            (Kind::View, Some((parent, id))) => self.folders.content(parent, *id)?,
            _ => self.folders.content(key, record.id)?,
        };
        let mode = if record.kind == Kind::View { "ro" } else { "rw" };
        Ok(vec![bind(&shown, mode)])
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

/// Copies a tree into the folder `to`: data (shared or in the kernel where that goes), owner, mode, times, extended
/// attributes, hard links within the tree, symlinks, devices and fifos.
fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    let mut links = HashMap::new();
    copy_folder(from, to, &mut links)
}

/// The first copy of each file with several links, by device and inode of its source.
type Links = HashMap<(u64, u64), PathBuf>;

fn copy_folder(from: &Path, to: &Path, links: &mut Links) -> io::Result<()> {
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let (source, target) = (entry.path(), to.join(entry.file_name()));
        let metadata = fs::symlink_metadata(&source)?;
        if !metadata.is_dir() && metadata.nlink() > 1 {
            if let Some(first) = links.get(&(metadata.dev(), metadata.ino())) {
                fs::hard_link(first, &target)?;
                continue;
            }
            links.insert((metadata.dev(), metadata.ino()), target.clone());
        }
        let kind = metadata.file_type();
        if kind.is_dir() {
            fs::create_dir(&target)?;
            copy_folder(&source, &target, links)?;
        } else if kind.is_file() {
            copy_file(&source, &target)?;
        } else if kind.is_symlink() {
            std::os::unix::fs::symlink(fs::read_link(&source)?, &target)?;
        } else {
            let kind = if kind.is_char_device() {
                FileType::CharacterDevice
            } else if kind.is_block_device() {
                FileType::BlockDevice
            } else if kind.is_fifo() {
                FileType::Fifo
            } else {
                FileType::Socket
            };
            rustix::fs::mknodat(CWD, &target, kind, Mode::from_raw_mode(0o600), metadata.rdev())?;
        }
        if !metadata.is_dir() {
            copy_attributes(&metadata, &source, &target)?;
        }
    }
    // Last, since each entry made changes the folder's time.
    copy_attributes(&fs::symlink_metadata(from)?, from, to)
}

fn copy_file(from: &Path, to: &Path) -> io::Result<()> {
    let source = File::open(from)?;
    let mut target = OpenOptions::new().write(true).create_new(true).mode(0o600).open(to)?;
    if rustix::fs::ioctl_ficlone(&target, &source).is_ok() {
        return Ok(());
    }
    // The standard library copies within the kernel where it can.
    io::copy(&mut &source, &mut target).map(drop)
}

fn copy_attributes(metadata: &fs::Metadata, from: &Path, to: &Path) -> io::Result<()> {
    std::os::unix::fs::lchown(to, Some(metadata.uid()), Some(metadata.gid()))?;
    if !metadata.is_symlink() {
        fs::set_permissions(to, fs::Permissions::from_mode(metadata.mode() & 0o7777))?;
    }
    // After the owner, whose change takes file capabilities away.
    let mut names = vec![0_u8; 64 * 1024];
    let length = match rustix::fs::llistxattr(from, &mut names[..]) {
        Ok(length) => length,
        Err(rustix::io::Errno::OPNOTSUPP) => 0,
        Err(error) => return Err(error.into()),
    };
    for name in names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty()) {
        let name = std::ffi::OsStr::from_bytes(name);
        let mut value = vec![0_u8; 64 * 1024];
        let length = rustix::fs::lgetxattr(from, name, &mut value[..])?;
        rustix::fs::lsetxattr(to, name, &value[..length], XattrFlags::empty())?;
    }
    let times = Timestamps {
        last_access: Timespec { tv_sec: metadata.atime(), tv_nsec: metadata.atime_nsec() },
        last_modification: Timespec { tv_sec: metadata.mtime(), tv_nsec: metadata.mtime_nsec() },
    };
    rustix::fs::utimensat(CWD, to, &times, AtFlags::SYMLINK_NOFOLLOW)?;
    Ok(())
}
