//! A new file system for each run: ext4 in a sparse file, over a loop device that passes the page cache by.
//!
//! On one that is kept, a run would pay for the one before: ext4 does not give out inodes again within minutes of their deletion,
//! and looks at each of them when it makes a file. With ten thousand files a run that came to more than the work itself.

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context as _, Result, ensure};

/// As large as it may grow; of the file, only what is written takes space.
const SIZE: u64 = 16 << 30;

/// A file system that goes with this.
pub(crate) struct Disk {
    file: PathBuf,
    folder: PathBuf,
}

impl Disk {
    /// Makes one with its file in `runs`.
    pub(crate) fn make(runs: &Path) -> Result<Self> {
        fs::create_dir_all(runs).with_context(|| format!("cannot make {}", runs.display()))?;
        let disk = Disk { file: runs.join("disk"), folder: runs.join("on-disk") };
        fs::create_dir_all(&disk.folder)?;
        File::create(&disk.file)?.set_len(SIZE)?;
        let file = disk.file.to_str().context("a path that is not text")?;
        run("mkfs.ext4", &["-q", "-F", "-E", "nodiscard", file])?;
        let device = run("losetup", &["--find", "--show", "--direct-io=on", file])
            .or_else(|_| run("losetup", &["--find", "--show", file]))?;
        // Nothing but the runs is to write to it.
        let mounted = run("mount", &["-o", "noinit_itable", &device, &disk.folder.display().to_string()]);
        // From here on the device goes when the file system is unmounted.
        run("losetup", &["--detach", &device])?;
        mounted?;
        Ok(disk)
    }

    /// Where it is mounted.
    pub(crate) fn folder(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let folder = self.folder.display().to_string();
        if run("umount", &[&folder]).is_err() {
            // Its failure was told by whoever left something there.
            let _ = run("umount", &["--lazy", &folder]);
        }
        let _ = fs::remove_file(&self.file);
    }
}

/// Runs a program; what it printed.
fn run(program: &str, arguments: &[&str]) -> Result<String> {
    let output = Command::new(program).args(arguments).output();
    let output = output.with_context(|| format!("cannot run {program}"))?;
    let said = String::from_utf8_lossy(&output.stderr);
    ensure!(output.status.success(), "{program} {}: {}", arguments.join(" "), said.trim());
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}
