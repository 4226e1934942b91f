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

/// Raises this process's limit of open descriptors to what it may have; the limit before, if it was another.
///
/// # Errors
/// Those of setrlimit(2).
pub fn raise_descriptor_limit() -> io::Result<Option<u64>> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let before = getrlimit(Resource::Nofile);
    if before.current == before.maximum {
        return Ok(None);
    }
    setrlimit(Resource::Nofile, Rlimit { current: before.maximum, maximum: before.maximum })?;
    Ok(Some(before.current.unwrap_or(u64::MAX)))
}

/// Gives the program this soft limit of open descriptors instead of ours: many programs loop over all they may have.
/// Such a program is started by a fork of all our memory, not by vfork: not to be called for the limit that we have.
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

/// Takes over descriptors that this process was started with, at known numbers, and closes all above them.
///
/// # Errors
/// InvalidInput when one of them is not open; those of close_range(2).
pub fn take_descriptors(first: RawFd, count: RawFd) -> io::Result<Vec<OwnedFd>> {
    close_descriptors_above((first + count - 1).unsigned_abs())?;
    let all = (first..first + count).map(|descriptor| {
        // SAFETY: fcntl on any number is harmless.
        if unsafe { libc::fcntl(descriptor, libc::F_SETFD, libc::FD_CLOEXEC) } < 0 {
            return Err(io::ErrorKind::InvalidInput.into());
        }
        // SAFETY: it is open, and by the contract with whoever started this process nothing else here owns it.
        Ok(unsafe { OwnedFd::from_raw_fd(descriptor) })
    });
    all.collect()
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

/// Tells glibc's allocator to stay small: so many arenas, and what is free in pieces of `threshold` bytes goes back to the kernel
/// soon. To be called while the process has one thread.
pub fn keep_allocator_small(arenas: i32, threshold: i32) {
    #[cfg(target_env = "gnu")]
    // SAFETY: mallopt only sets parameters, and glibc takes its own lock for that.
    unsafe {
        libc::mallopt(libc::M_ARENA_MAX, arenas);
        libc::mallopt(libc::M_TRIM_THRESHOLD, threshold);
        libc::mallopt(libc::M_MMAP_THRESHOLD, threshold);
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

/// Takes the pages of this program's own code and constants out of its memory; the kernel's cache of files still has them, and
/// those that are needed again come back with a page fault. Shared libraries stay: others have them as well.
pub fn unmap_program() {
    extern "C" fn unmap(info: *mut libc::dl_phdr_info, _: libc::size_t, _: *mut libc::c_void) -> libc::c_int {
        let page = rustix::param::page_size();
        // SAFETY: the loader passes an object with as many program headers as it says.
        let (base, headers) = unsafe {
            let info = &*info;
            // A kernel without program headers to show has a loader without them.
            if info.dlpi_phdr.is_null() {
                return 1;
            }
            (info.dlpi_addr as usize, std::slice::from_raw_parts(info.dlpi_phdr, info.dlpi_phnum.into()))
        };
        for header in headers {
            // What the loader may write to has relocations, which are not in the file.
            if header.p_type != libc::PT_LOAD || header.p_flags & libc::PF_W != 0 {
                continue;
            }
            // Whole pages: a page at either end may be the neighbour's as well.
            let begin = (base + header.p_vaddr as usize).next_multiple_of(page);
            let end = (base + header.p_vaddr as usize + header.p_filesz as usize) / page * page;
            if begin >= end {
                continue;
            }
            // SAFETY: pages of a file that were never written to: when they are read again, they are the same. It fails for
            // pages that are locked in memory, which then stay.
            unsafe {
                libc::madvise(begin as *mut libc::c_void, end - begin, libc::MADV_DONTNEED);
            }
        }
        // The first object is the program.
        1
    }
    // SAFETY: the function is for this call only, and gets no data.
    unsafe {
        libc::dl_iterate_phdr(Some(unmap), std::ptr::null_mut());
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

/// Kills a process; one that is gone is no error.
pub fn kill(pid: u32) -> io::Result<()> {
    let Some(pid) = i32::try_from(pid).ok().and_then(rustix::process::Pid::from_raw) else { return Ok(()) };
    match rustix::process::kill_process(pid, rustix::process::Signal::KILL) {
        Err(error) if error != rustix::io::Errno::SRCH => Err(error.into()),
        _ => Ok(()),
    }
}

/// Makes the first process of the namespace of process ids that this one's children are in: it does nothing but reap. It is no copy
/// of a program that was started there, so that nobody in the namespace may look into it. For a process of one thread.
///
/// # Errors
/// Those of fork(2).
pub fn fork_init() -> io::Result<u32> {
    // SAFETY: by the contract there is one thread, so that no lock is held by another that the child does not have.
    match unsafe { nix::unistd::fork() }? {
        nix::unistd::ForkResult::Parent { child } => Ok(child.as_raw().unsigned_abs()),
        nix::unistd::ForkResult::Child => {
            let _ = nix::unistd::setsid();
            // Its parent's pipes would seem open for as long as it lives.
            if close_descriptors_above(0).is_err() {
                std::process::abort();
            }
            let null = fs::OpenOptions::new().read(true).write(true).open("/dev/null");
            match null {
                Ok(null) if rustix::stdio::dup2_stdin(&null).is_ok() => reap_for_ever(),
                _ => std::process::abort(),
            }
        }
    }
}

/// For the first process of a pid namespace: reaps what is left to it, until it is killed.
pub fn reap_for_ever() -> ! {
    use nix::sys::signal::{SigSet, Signal};
    use nix::sys::wait::{WaitPidFlag, WaitStatus, waitpid};
    let mut child = SigSet::empty();
    child.add(Signal::SIGCHLD);
    // Blocked, so that one that comes before the wait is not lost.
    let _ = child.thread_block();
    loop {
        while matches!(waitpid(None, Some(WaitPidFlag::WNOHANG)), Ok(status) if status != WaitStatus::StillAlive)
        {
        }
        let _ = child.wait();
    }
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

#[cfg(test)]
mod tests {
    use super::*;

    /// What of this program's code and constants is mapped, in KiB.
    fn mapped() -> u64 {
        let program = std::env::current_exe().unwrap().display().to_string();
        let text = fs::read_to_string("/proc/self/smaps").unwrap();
        let mut ours = false;
        let mut sum = 0;
        for line in text.lines() {
            if let Some(size) = line.strip_prefix("Rss:") {
                let size: u64 = size.trim().trim_end_matches(" kB").parse().unwrap();
                sum += if ours { size } else { 0 };
            } else if !line.split(' ').next().unwrap_or_default().ends_with(':') {
                ours = line.ends_with(&program) && line.contains(" r-xp ");
            }
        }
        sum
    }

    #[test]
    fn a_program_goes_on_without_its_pages() {
        // Other tests run meanwhile, and map some of it again.
        let fewer = (0..100).any(|_| {
            let before = mapped();
            unmap_program();
            mapped() < before
        });
        assert!(fewer, "{} KiB are mapped", mapped());
        // What the loader wrote is still there.
        assert_eq!(format!("{:?}", vec!["a"; 2]), r#"["a", "a"]"#);
    }
}
