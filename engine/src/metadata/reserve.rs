//! Room on the disk for what takes things away when the disk is full.
//!
//! ```text
//! <root>/metadata/reserve    8 MiB that hold nothing; not there while they are in use
//!
//!   kept --a commit finds the disk full--> in use --there is room for it again, at a later commit--> kept
//!
//! <root>/metadata/sled/db    the database's log, with 4 MiB allocated behind its end
//! ```
//!
//! What is given up is anybody's, and whoever fills the disk may take that, too. What is behind the end of the log is not: commits
//! are written into it. An open needs a new file, for which that room is given up and taken again at once.
//!
//! The look before each commit matters: sled cannot be closed after some of the writes that fail (db.rs).
//!
//! Invariant: while it is in use, records are changed and deleted, and none is added but by a change that deletes others. So
//! it is for deletions, collections and the ends of containers, and lasts until one of them has given space back.

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{FallocateFlags, fallocate, statvfs};
use rustix::io::Errno;

/// Sixteen segments of the database's log.
const BYTES: u64 = 8 << 20;
/// A disk with less than this is full: the database takes its space by segments, and large values have files of their own.
const FULL: u64 = 2 << 20;
/// What is kept behind the end of the log, and taken anew when half of it is used: eight segments.
const ROOM: u64 = 4 << 20;

/// The reserve of one database.
pub(super) struct Reserve {
    path: PathBuf,
    state: State,
    /// Up to where the log has room, and how long it was then; a log that has become shorter has lost it.
    room: (u64, u64),
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
        Reserve { path, state: if kept { State::Kept } else { State::InUse }, room: (0, 0) }
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

    /// Looks, before a commit, whether there is room behind the end of the log, and takes it. On a full disk it is as much as
    /// there is; on file systems without fallocate(2) there is none.
    pub(super) fn keep_room(&mut self, log: &File) {
        let Ok(length) = log.metadata().map(|log| log.len()) else { return };
        let (end, before) = self.room;
        if length >= before && length + ROOM / 2 <= end {
            return;
        }
        match fallocate(log, FallocateFlags::KEEP_SIZE, length, ROOM) {
            Ok(()) | Err(Errno::OPNOTSUPP) => self.room = (length + ROOM, length),
            // At the next commit again.
            Err(_) => self.room = (0, 0),
        }
    }

    /// Gives up the room behind the end of the log, for an open of the database; whether there was any.
    pub(super) fn give_up_room(&mut self, log: &Path) -> bool {
        self.room = (0, 0);
        let given_up = File::options().write(true).open(log).and_then(|log| {
            let (length, allocated) = log.metadata().map(|log| (log.len(), log.blocks() * 512))?;
            // To set the length that it has lets go of all that is behind it.
            log.set_len(length)?;
            Ok(log.metadata()?.blocks() * 512 < allocated)
        });
        given_up.unwrap_or(false)
    }

    fn allocate(&self) -> io::Result<()> {
        let file = File::create(&self.path)?;
        match fallocate(&file, FallocateFlags::empty(), 0, BYTES) {
            Err(Errno::DQUOT) => Err(io::ErrorKind::StorageFull.into()),
            allocated => Ok(allocated?),
        }
    }

    pub(super) fn is_disk_full(&self) -> bool {
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

    #[test]
    fn the_log_has_room_that_goes_and_comes_back() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("db");
        fs::write(&path, [1; 1000]).unwrap();
        let log = File::options().write(true).open(&path).unwrap();
        let allocated = || log.metadata().unwrap().blocks() * 512;
        let mut reserve = Reserve::of(dir.path());
        reserve.keep_room(&log);
        if allocated() < ROOM {
            println!("SKIPPED: this file system allocates nothing ahead");
            return;
        }
        assert_eq!(log.metadata().unwrap().len(), 1000);
        assert!(reserve.give_up_room(&path));
        assert!(allocated() < ROOM && !reserve.give_up_room(&path));
        assert_eq!(fs::read(&path).unwrap(), [1; 1000]);
        // sled cuts off what it does not need.
        reserve.keep_room(&log);
        log.set_len(500).unwrap();
        assert!(allocated() < ROOM);
        reserve.keep_room(&log);
        assert!(allocated() >= ROOM);
    }
}
