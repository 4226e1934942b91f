//! What a process does to itself and to those it starts: detach, close descriptors, adopt orphans, tell the OOM
//! killer its worth.

use std::fs;
use std::io::{self, Seek, Write};
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd, RawFd};
use std::os::unix::net::UnixListener;
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::Command;

/// The lowest worth the kernel knows: never killed.
const OOM_SCORE_MIN: i32 = -1000;
const OOM_SCORE_MAX: i32 = 1000;

/// Closes every descriptor of this process above `last`.
///
/// # Errors
/// Those of close_range(2).
pub fn close_descriptors_above(last: u32) -> io::Result<()> {
    // SAFETY: callers do this before they open anything, so no owned descriptor is closed behind its owner's back.
    match unsafe { libc::syscall(libc::SYS_close_range, last + 1, u32::MAX, 0) } {
        0 => Ok(()),
        _ => Err(io::Error::last_os_error()),
    }
}

/// Gives the program exactly these descriptors as 3, 4, 5, ... and none of ours beyond them.
pub fn pass_descriptors(command: &mut Command, descriptors: Vec<OwnedFd>) {
    let first_free = 3 + RawFd::try_from(descriptors.len()).unwrap_or(RawFd::MAX / 2);
    // SAFETY: between fork and exec only system calls are made, and no memory is allocated: `moved` has its place
    // already. The descriptors live until the command, which owns them through the closure, is dropped.
    unsafe {
        let mut moved: Vec<RawFd> = Vec::with_capacity(descriptors.len());
        command.pre_exec(move || {
            moved.clear();
            // Out of the way first: one may sit at another's target.
            for descriptor in &descriptors {
                let copy = libc::fcntl(descriptor.as_raw_fd(), libc::F_DUPFD_CLOEXEC, first_free);
                if copy < 0 {
                    return Err(io::Error::last_os_error());
                }
                moved.push(copy);
            }
            for (target, copy) in (3..).zip(&moved) {
                if libc::dup2(*copy, target) < 0 {
                    return Err(io::Error::last_os_error());
                }
            }
            // std's own error pipe is close-on-exec and must live until then, so mark instead of close.
            libc::syscall(libc::SYS_close_range, first_free, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
            Ok(())
        });
    }
}

/// Raises this process's limit of open descriptors to what it may have; the limit before.
///
/// # Errors
/// Those of setrlimit(2).
pub fn raise_descriptor_limit() -> io::Result<u64> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let before = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: before.maximum, maximum: before.maximum })?;
    Ok(before.current.unwrap_or(u64::MAX))
}

/// Gives the program this soft limit of open descriptors instead of ours: many programs loop over all they may have.
pub fn set_descriptor_limit(command: &mut Command, soft: u64) {
    // SAFETY: getrlimit and setrlimit are system calls and allocate nothing.
    unsafe {
        command.pre_exec(move || {
            use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
            let maximum = getrlimit(Resource::Nofile).maximum;
            setrlimit(Resource::Nofile, Rlimit { current: Some(soft), maximum })?;
            Ok(())
        });
    }
}

/// Makes the program lead a session of its own, so that no terminal and no group signal of ours reaches it.
pub fn detach(command: &mut Command) {
    // SAFETY: setsid is async-signal-safe and allocates nothing.
    unsafe {
        command.pre_exec(|| {
            libc::setsid();
            Ok(())
        });
    }
}

/// Takes over a listening Unix socket that this process was started with, at a known descriptor.
///
/// # Errors
/// InvalidInput when there is no socket at that number.
pub fn take_listener(descriptor: RawFd) -> io::Result<UnixListener> {
    // SAFETY: fcntl on any number is harmless.
    let flags = unsafe { libc::fcntl(descriptor, libc::F_GETFD) };
    if flags < 0 {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    // SAFETY: it is open, and by the contract with whoever started this process nothing else here owns it.
    let owned = unsafe { OwnedFd::from_raw_fd(descriptor) };
    rustix::io::fcntl_setfd(&owned, rustix::io::FdFlags::CLOEXEC)?;
    if !rustix::net::sockopt::socket_acceptconn(&owned)? {
        return Err(io::ErrorKind::InvalidInput.into());
    }
    Ok(owned.into())
}

/// Makes orphaned descendants this process's children, so that it can reap them.
///
/// # Errors
/// Those of prctl(2).
pub fn become_subreaper() -> io::Result<()> {
    Ok(nix::sys::prctl::set_child_subreaper(true)?)
}

/// The worth the OOM killer gives a process; `None` means this one.
///
/// # Errors
/// When /proc cannot be read.
pub fn oom_score_adj(pid: Option<u32>) -> io::Result<i32> {
    let text = fs::read_to_string(oom_score_path(pid))?;
    text.trim().parse().map_err(|_| io::ErrorKind::InvalidData.into())
}

/// Sets that worth. Lowering it below its owner's takes CAP_SYS_RESOURCE; without, it stays as it is.
///
/// # Errors
/// When /proc cannot be written for another reason.
pub fn set_oom_score_adj(pid: Option<u32>, score: i32) -> io::Result<()> {
    let score = score.clamp(OOM_SCORE_MIN, OOM_SCORE_MAX);
    match fs::write(oom_score_path(pid), score.to_string()) {
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Ok(()),
        other => other,
    }
}

fn oom_score_path(pid: Option<u32>) -> String {
    match pid {
        Some(pid) => format!("/proc/{pid}/oom_score_adj"),
        None => "/proc/self/oom_score_adj".to_owned(),
    }
}

/// Tells glibc's allocator to stay small: one arena, and free memory back to the kernel soon.
pub fn keep_allocator_small() {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt only sets parameters; called while the process has one thread.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, 1);
        libc::mallopt(libc::M_TRIM_THRESHOLD, 64 * 1024);
        libc::mallopt(libc::M_MMAP_THRESHOLD, 64 * 1024);
    }
}

/// Gives free memory back to the kernel now.
pub fn trim_memory() {
    #[cfg(target_env = "gnu")]
    // SAFETY: malloc_trim takes the allocator's own locks.
    unsafe {
        libc::malloc_trim(0);
    }
}

/// A file that exists in memory only.
///
/// # Errors
/// Those of memfd_create(2).
pub fn memory_file(name: &str) -> io::Result<OwnedFd> {
    Ok(rustix::fs::memfd_create(name, rustix::fs::MemfdFlags::CLOEXEC)?)
}

/// Such a file with this content, to be read from its beginning.
///
/// # Errors
/// Those of memfd_create(2) and write(2).
pub fn memory_file_of(content: &[u8]) -> io::Result<fs::File> {
    let mut file = fs::File::from(memory_file("content")?);
    file.write_all(content)?;
    file.rewind()?;
    Ok(file)
}

/// Holds a folder against everyone else who locks it so, until the descriptor is closed. Waits for its turn.
///
/// # Errors
/// Those of open(2) and flock(2).
pub fn lock_folder(folder: &Path) -> io::Result<OwnedFd> {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::DIRECTORY | rustix::fs::OFlags::CLOEXEC;
    let folder = rustix::fs::open(folder, flags, rustix::fs::Mode::empty())?;
    rustix::fs::flock(&folder, rustix::fs::FlockOperation::LockExclusive)?;
    Ok(folder)
}
