//! Room on the disk for what takes things away when the disk is full.
//!
//! ```text
//! <root>/metadata/reserve    8 MiB that hold nothing; not there while they are in use
//!
//!   kept --a commit finds the disk full--> in use --there is room for it again, at a later commit--> kept
//! ```
//!
//! The look before each commit matters: sled cannot be closed after some of the writes that fail (db.rs).
//!
//! Invariant: while it is in use, records are changed and deleted, and none is added but by a change that deletes others. So
//! it is for deletions, collections and the ends of containers, and lasts until one of them has given space back.

use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;

/// Sixteen segments of the database's log.
const BYTES: u64 = 8 << 20;
/// A disk with less than this is full: the database takes its space by segments, and large values have files of their own.
const FULL: u64 = 2 << 20;

/// The reserve of one database.
pub(super) struct Reserve {
    path: PathBuf,
    state: State,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Kept,
    InUse,
    /// This file system gives none.
    Never,
}

impl Reserve {
    /// That of the database in this folder, as an earlier engine left it.
    pub(super) fn of(dir: &Path) -> Self {
        let path = dir.join("reserve");
        let kept = fs::metadata(&path).is_ok_and(|file| file.len() >= BYTES);
        Reserve { path, state: if kept { State::Kept } else { State::InUse } }
    }

    /// Gives it back to the disk, if that is what a failed write needs; whether it did.
    pub(super) fn release(&mut self) -> bool {
        if self.state != State::Kept || !self.is_disk_full() {
            return false;
        }
        tracing::warn!(reserve = %self.path.display(), "the disk is full: until there is space, nothing new is taken");
        // Not to be kept, if it cannot be removed, is no worse than to be kept for nothing.
        self.state = State::InUse;
        fs::remove_file(&self.path).is_ok()
    }

    /// Looks before a commit: gives it back when the disk has become full, takes it again where it is in use and there is room.
    /// Whether new records may be written.
    pub(super) fn take(&mut self) -> bool {
        self.release();
        if self.state == State::InUse && self.room() >= BYTES + FULL {
            self.state = match self.allocate() {
                Ok(()) => State::Kept,
                Err(error) if error.kind() == io::ErrorKind::StorageFull => State::InUse,
                Err(error) => {
                    tracing::info!(reserve = %self.path.display(), %error, "no space is kept for a full disk");
                    State::Never
                }
            };
            if self.state != State::Kept {
                // What was allocated of it before there was no more.
                let _ = fs::remove_file(&self.path);
            }
        }
        self.state != State::InUse
    }

    fn allocate(&self) -> io::Result<()> {
        let file = File::create(&self.path)?;
        match fallocate(&file, FallocateFlags::empty(), 0, BYTES) {
            Err(Errno::DQUOT) => Err(io::ErrorKind::StorageFull.into()),
            allocated => Ok(allocated?),
        }
    }

    fn is_disk_full(&self) -> bool {
        self.room() < FULL
    }

    /// Bytes that can still be written; where that is not known, as many as one likes.
    fn room(&self) -> u64 {
        let folder = self.path.parent().unwrap_or(&self.path);
        statvfs(folder).map_or(u64::MAX, |disk| disk.f_bavail.saturating_mul(disk.f_frsize))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_taken_once_and_kept_while_the_disk_has_room() {
        let dir = tempfile::tempdir().unwrap();
        let mut reserve = Reserve::of(dir.path());
        assert!(reserve.take());
        let length = || fs::metadata(dir.path().join("reserve")).map(|file| file.len()).ok();
        if reserve.state == State::Never {
            assert_eq!(length(), None);
            return;
        }
        assert_eq!(length(), Some(BYTES));
        assert!(!reserve.release(), "the disk is not full");
        assert_eq!(Reserve::of(dir.path()).state, State::Kept);
        fs::write(dir.path().join("reserve"), "cut short").unwrap();
        let mut reserve = Reserve::of(dir.path());
        assert!(reserve.take());
        assert_eq!(length(), Some(BYTES));
    }
}
