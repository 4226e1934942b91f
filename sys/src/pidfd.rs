//! A process by descriptor: unlike a pid it never comes to mean another process.

use std::io;
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::process::{Pid, PidfdFlags};

/// Opens a process; the descriptor becomes readable when it exits.
///
/// # Errors
/// NotFound (ESRCH) when there is none, InvalidInput for pid 0 or beyond i32, else those of pidfd_open(2).
pub fn open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw).ok_or(io::ErrorKind::InvalidInput)?;
    rustix::process::pidfd_open(pid, PidfdFlags::empty()).map_err(not_found)
}

/// Sends a signal by number, realtime ones included.
///
/// # Errors
/// NotFound when the process has exited, else those of pidfd_send_signal(2).
pub fn send_signal(process: impl AsFd, signal: u32) -> io::Result<()> {
    // rustix takes named signals only.
    // SAFETY: the descriptor is borrowed for the call; a null siginfo is allowed and means "as kill(2) would".
    let result = unsafe {
        libc::syscall(
            libc::SYS_pidfd_send_signal,
            process.as_fd().as_raw_fd(),
            signal,
            std::ptr::null::<libc::siginfo_t>(),
            0,
        )
    };
    if result == 0 {
        return Ok(());
    }
    match io::Error::last_os_error() {
        error if error.raw_os_error() == Some(libc::ESRCH) => Err(io::ErrorKind::NotFound.into()),
        error => Err(error),
    }
}

fn not_found(error: rustix::io::Errno) -> io::Error {
    match error {
        rustix::io::Errno::SRCH => io::ErrorKind::NotFound.into(),
        other => other.into(),
    }
}
