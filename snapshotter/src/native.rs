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

use crate::folders::{CONTENT, Folders, PLAIN, Way, bind, sync_filesystem};
use crate::store::Record;
use crate::{Kind, Labels, Mount, Result, io};

pub(crate) const NAME: &str = "native";

/// The copying snapshotter.
pub struct Native {
    folders: Folders,
}

impl Native {
    /// Opens, or makes, the snapshots in `root`.
    pub fn open(root: &Path) -> Result<Self> {
        Ok(Native { folders: Folders::open(root, PLAIN)? })
    }
}

impl Way for Native {
    fn folders(&self) -> &Folders {
        &self.folders
    }

    fn make(&self, key: &str, kind: Kind, parent: &str, labels: &Labels) -> Result<()> {
        self.folders.make(key, kind, parent, labels, |folder, _| {
            // Each is whole, so that those further beneath do not matter.
            let beneath = self.folders.layer(parent)?;
            let own = folder.join(CONTENT);
            sys::fs::create_dir(&own, 0o755).map_err(io("create", &own))?;
            match beneath {
                // A view without changes of its own shows its parent's folder.
                Some(parent) if kind == Kind::Active => {
                    copy_tree(&parent, &own).map_err(io("copy into a snapshot", &parent))?;
                    // The copy is a part of what is acknowledged: a power cut must not leave half of it.
                    sync_filesystem(&own)
                }
                _ => Ok(()),
            }
        })
    }

    fn mounts_of(&self, key: &str, record: &Record) -> Result<Vec<Mount>> {
        let shown = match (record.kind, self.folders.layer(&record.parent)?) {
            (Kind::View, Some(parent)) => parent,
            _ => self.folders.content(key, record.id, record.kind)?,
        };
        let mode = if record.kind == Kind::View { "ro" } else { "rw" };
        Ok(vec![bind(&shown, mode)])
    }
}

/// Copies a tree into the folder `to`: data (shared or in the kernel where that goes), owner, mode, times, extended
/// attributes, hard links within the tree, symlinks, devices and fifos. What is in `to` already must not be in the way.
pub fn copy_tree(from: &Path, to: &Path) -> io::Result<()> {
    let mut links = HashMap::new();
    // Not by recursion: a tree can be as deep as a path has names, which is more than a thread's stack may hold.
    let mut todo = vec![Step::Enter(from.to_owned(), to.to_owned())];
    while let Some(step) = todo.pop() {
        match step {
            Step::Enter(from, to) => {
                let folders = copy_entries(&from, &to, &mut links)?;
                todo.push(Step::Leave(from, to));
                todo.extend(folders);
            }
            // Last, since each entry made changes the folder's time.
            Step::Leave(from, to) => copy_attributes(&fs::symlink_metadata(&from)?, &from, &to)?,
        }
    }
    Ok(())
}

/// What is to be done with a folder and its copy.
enum Step {
    Enter(PathBuf, PathBuf),
    Leave(PathBuf, PathBuf),
}

/// The first copy of each file with several links, by device and inode of its source.
type Links = HashMap<(u64, u64), PathBuf>;

/// Copies what is in a folder; the folders among it are made, and left to be entered.
fn copy_entries(from: &Path, to: &Path, links: &mut Links) -> io::Result<Vec<Step>> {
    let mut folders = Vec::new();
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
            folders.push(Step::Enter(source, target));
            continue;
        }
        if kind.is_file() {
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
        copy_attributes(&metadata, &source, &target)?;
    }
    Ok(folders)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_tree_as_deep_as_a_path_is_long_is_copied() {
        let dir = tempfile::tempdir().unwrap();
        let (from, to) = (dir.path().join("from"), dir.path().join("to"));
        let deep = ["a"; 1900].join("/");
        fs::create_dir_all(from.join(&deep)).unwrap();
        fs::write(from.join(&deep).join("end"), "x").unwrap();
        fs::create_dir(&to).unwrap();
        // An eighth of what the engine's threads have.
        let small = std::thread::Builder::new().stack_size(256 << 10);
        small.spawn(move || copy_tree(&from, &to).unwrap()).unwrap().join().unwrap();
        assert_eq!(fs::read_to_string(dir.path().join("to").join(&deep).join("end")).unwrap(), "x");
    }
}
