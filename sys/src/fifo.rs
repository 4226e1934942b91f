//! Named pipes, opened so that either side may come and go.
//!
//! Invariant: no open here blocks, and a writer never sees EPIPE for want of a reader: it holds both ends.

use std::io;
use std::os::fd::{BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::Duration;

use rustix::fs::{FileType, Mode, OFlags};
use tokio::io::unix::AsyncFd;

/// True when the path is a named pipe; false when it is something else or nothing.
#[must_use]
pub fn is_fifo(path: &Path) -> bool {
    rustix::fs::stat(path).is_ok_and(|stat| FileType::from_raw_mode(stat.st_mode) == FileType::Fifo)
}

/// Makes a named pipe; one that is there already is fine.
///
/// # Errors
/// Those of mkfifo(3).
pub fn create(path: &Path, mode: u32) -> io::Result<()> {
    match rustix::fs::mknodat(rustix::fs::CWD, path, FileType::Fifo, Mode::from_raw_mode(mode), 0) {
        Err(rustix::io::Errno::EXIST) if is_fifo(path) => Ok(()),
        other => Ok(other?),
    }
}

/// Opens for writing while holding the reading end too, as Linux allows with `O_RDWR`: what is written waits in
/// the pipe (64 KiB) for a reader that may come, go and come again. Non-blocking.
///
/// # Errors
/// Those of open(2).
pub fn open_lasting_writer(path: &Path) -> io::Result<OwnedFd> {
    open(path, OFlags::RDWR)
}

/// Opens for reading; without a writer a read answers end-of-file. Non-blocking.
///
/// # Errors
/// Those of open(2).
pub fn open_reader(path: &Path) -> io::Result<OwnedFd> {
    open(path, OFlags::RDONLY)
}

/// Opens for writing; while this lives, readers do not see end-of-file. Non-blocking.
///
/// # Errors
/// ENXIO when nobody reads, else those of open(2).
pub fn open_writer(path: &Path) -> io::Result<OwnedFd> {
    open(path, OFlags::WRONLY)
}

/// Registers a non-blocking descriptor (a pipe, a terminal, an eventfd) with the current tokio runtime.
///
/// # Errors
/// Those of epoll_ctl(2); PermissionDenied (EPERM) for regular files, which are always ready.
pub fn watch(descriptor: OwnedFd) -> io::Result<AsyncFd<OwnedFd>> {
    // SAFETY: an `OwnedFd` answers the same descriptor for as long as it lives, and the AsyncFd, which gives no
    // mutable access to it here, deregisters before it drops it.
    Ok(unsafe { AsyncFd::register(descriptor) }?)
}

/// Makes a descriptor non-blocking.
///
/// # Errors
/// Those of fcntl(2).
pub fn set_nonblocking(descriptor: &OwnedFd) -> io::Result<()> {
    let flags = rustix::fs::fcntl_getfl(descriptor)?;
    Ok(rustix::fs::fcntl_setfl(descriptor, flags | OFlags::NONBLOCK)?)
}

/// The error a terminal's master reads when the last user of the other side has closed it.
pub const EIO: i32 = libc::EIO;

/// Reads what is there.
///
/// # Errors
/// WouldBlock when there is nothing yet, else those of read(2).
pub fn read(descriptor: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<usize> {
    Ok(rustix::io::read(descriptor, buffer)?)
}

/// Writes what fits.
///
/// # Errors
/// WouldBlock when nothing does, else those of write(2).
pub fn write(descriptor: BorrowedFd<'_>, data: &[u8]) -> io::Result<usize> {
    Ok(rustix::io::write(descriptor, data)?)
}

/// Waits until some can be read, or are at their end, for at most `limit`: their positions as bits.
///
/// # Errors
/// Those of poll(2).
pub fn wait_readable(descriptors: &[BorrowedFd<'_>], limit: Duration) -> io::Result<u64> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut all: Vec<_> =
        descriptors.iter().map(|descriptor| PollFd::from_borrowed_fd(*descriptor, PollFlags::IN)).collect();
    let limit = Timespec {
        tv_sec: limit.as_secs().try_into().unwrap_or(i64::MAX),
        tv_nsec: limit.subsec_nanos().into(),
    };
    match poll(&mut all, Some(&limit)) {
        Ok(_) | Err(rustix::io::Errno::INTR) => {}
        Err(error) => return Err(error.into()),
    }
    let ready = all.iter().enumerate().filter(|(_, one)| !one.revents().is_empty());
    Ok(ready.fold(0, |bits, (position, _)| bits | 1 << position))
}

fn open(path: &Path, access: OFlags) -> io::Result<OwnedFd> {
    let flags = access | OFlags::NONBLOCK | OFlags::CLOEXEC | OFlags::NOCTTY;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_writer_survives_its_readers() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("out");
        create(&path, 0o600).unwrap();
        create(&path, 0o600).unwrap();
        assert!(is_fifo(&path) && !is_fifo(dir.path()));
        let writer = open_lasting_writer(&path).unwrap();
        assert_eq!(rustix::io::write(&writer, b"one").unwrap(), 3);
        drop(open_reader(&path).unwrap());
        assert_eq!(rustix::io::write(&writer, b"two").unwrap(), 3);
        let reader = open_reader(&path).unwrap();
        let mut buffer = [0; 16];
        assert_eq!(rustix::io::read(&reader, &mut buffer).unwrap(), 6);
        assert_eq!(&buffer[..6], b"onetwo");
        drop(writer);
        assert_eq!(rustix::io::read(&reader, &mut buffer).unwrap(), 0);
    }

    #[test]
    fn what_can_be_read_or_has_ended_is_told_apart_from_what_waits() {
        use std::io::Write;
        use std::os::fd::AsFd;
        let (quiet, _kept) = io::pipe().unwrap();
        let (full, mut writer) = io::pipe().unwrap();
        let (ended, gone) = io::pipe().unwrap();
        let all = [quiet.as_fd(), full.as_fd(), ended.as_fd()];
        assert_eq!(wait_readable(&all[..2], Duration::ZERO).unwrap(), 0);
        writer.write_all(b"x").unwrap();
        drop(gone);
        assert_eq!(wait_readable(&all, Duration::from_secs(10)).unwrap(), 0b110);
    }
}
