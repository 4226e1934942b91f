//! Small file systems of a case's own: ext4 in a file, over a loop device.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use harness::registry::done;
use harness::{left, wait_for};
use nix::sys::statvfs::statvfs;

/// The program that makes file systems.
pub(crate) const MKFS: &str = "/usr/sbin/mkfs.ext4";
const MOUNT: &str = "/usr/bin/mount";
const UMOUNT: &str = "/usr/bin/umount";

/// A mounted file system, which goes with this.
pub(crate) struct Disk {
    pub(crate) file: PathBuf,
    pub(crate) folder: PathBuf,
}

impl Disk {
    /// Makes one of this size in a new file, and mounts it on the folder.
    pub(crate) fn make(file: PathBuf, folder: PathBuf, bytes: u64) -> Self {
        File::create(&file).unwrap().set_len(bytes).unwrap();
        // No room that root alone may use.
        done(Command::new(MKFS).args(["-q", "-F", "-m", "0"]).arg(&file));
        Disk::mount(file, folder)
    }

    /// Mounts the one in the file.
    pub(crate) fn mount(file: PathBuf, folder: PathBuf) -> Self {
        fs::create_dir_all(&folder).unwrap();
        done(Command::new(MOUNT).args(["-o", "loop"]).arg(&file).arg(&folder));
        Disk { file, folder }
    }

    /// Mounts it anew with these options.
    pub(crate) fn remount(&self, options: &str) {
        done(Command::new(MOUNT).args(["-o", &format!("remount,{options}")]).arg(&self.folder));
    }

    /// Bytes that can still be written.
    pub(crate) fn free(&self) -> u64 {
        let disk = statvfs(&self.folder).unwrap();
        disk.blocks_available() * disk.fragment_size()
    }

    /// Fills it to the last byte with files of nobody's, in a folder of their own; that folder.
    pub(crate) fn fill(&self) -> PathBuf {
        let folder = self.folder.join("filler");
        fs::create_dir_all(&folder).unwrap();
        // The engine may give up what it keeps while this goes on.
        wait_for("the disk to be full", || {
            self.fill_in(&folder);
            self.free() < 4096
        });
        folder
    }

    /// Fills what has become free since then, and another time, as many times as it likes.
    pub(crate) fn fill_more(&self) {
        self.fill_in(&self.folder.join("filler"));
    }

    fn fill_in(&self, folder: &Path) {
        use std::io::Write as _;
        // Large writes first, then small ones for what these left.
        for (number, size) in [1 << 20, 64 << 10, 4096, 1].into_iter().enumerate() {
            let path = folder.join(number.to_string());
            let mut file = File::options().create(true).append(true).open(path).unwrap();
            let bytes = vec![1_u8; size];
            while file.write_all(&bytes).is_ok() {}
            let _ = file.sync_all();
        }
    }

    fn unmount(&self) -> bool {
        Command::new(UMOUNT).arg(&self.folder).output().unwrap().status.success()
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        if std::thread::panicking() {
            let _ = Command::new(UMOUNT).arg("-l").arg(&self.folder).output();
            return;
        }
        wait_for("the file system to be free", || self.unmount());
        let of = self.file.parent().unwrap_or(Path::new("/")).to_owned();
        wait_for("the loop device to go", || {
            let name = self.file.display().to_string();
            !left::loop_devices(&of).iter().any(|device| device.ends_with(&name))
        });
    }
}
