//! The floor: what running a program in a container costs at the least, with nobody but the kernel at work.
//!
//! ```text
//! not measured   a mount namespace, a tmpfs for the overlay's upper folder (an overlay may not lie in its own lower one)
//! measured       unshare (mounts, host name, IPC, network, process ids, control groups), overlay over /, pivot_root, exec, wait
//! ```
//!
//! A thread of its own does it, which takes all of it away as it ends: no other thread notices, and nothing is left behind.

use std::fs;
use std::io;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use nix::mount::{MntFlags, MsFlags, mount, umount2};
use nix::sched::{CloneFlags, unshare};
use nix::unistd::{chdir, pivot_root};

/// What is run: it ends at once.
const PROGRAM: &str = "/bin/true";

/// Does it once, as root; how long it took. Blocks.
///
/// # Errors
/// Those of the system calls, with what was tried.
pub fn measure() -> io::Result<Duration> {
    let thread = std::thread::Builder::new().name("floor".into()).spawn(run)?;
    thread.join().unwrap_or_else(|_| Err(io::Error::other("the thread of the floor has panicked")))
}

fn run() -> io::Result<Duration> {
    const NONE: Option<&str> = None;
    let failed = |what: &'static str| move |error: nix::Error| io::Error::other(format!("{what}: {error}"));
    let private = MsFlags::MS_REC | MsFlags::MS_PRIVATE;
    unshare(CloneFlags::CLONE_NEWNS).map_err(failed("unshare mounts"))?;
    mount(NONE, "/", NONE, private, NONE).map_err(failed("make the mounts private"))?;
    // Any folder that is there on every system serves; what is in it is hidden from this thread alone.
    let folder = Path::new("/tmp");
    mount(Some("tmpfs"), folder, Some("tmpfs"), MsFlags::empty(), NONE).map_err(failed("mount a tmpfs"))?;
    let [upper, work, merged] = ["upper", "work", "merged"].map(|name| folder.join(name));
    for path in [&upper, &work, &merged] {
        fs::create_dir(path)?;
    }

    let began = Instant::now();
    let namespaces = CloneFlags::CLONE_NEWNS
        | CloneFlags::CLONE_NEWUTS
        | CloneFlags::CLONE_NEWIPC
        | CloneFlags::CLONE_NEWNET
        | CloneFlags::CLONE_NEWPID
        | CloneFlags::CLONE_NEWCGROUP;
    unshare(namespaces).map_err(failed("unshare"))?;
    let options = format!("lowerdir=/,upperdir={},workdir={}", upper.display(), work.display());
    mount(Some("overlay"), &merged, Some("overlay"), MsFlags::empty(), Some(options.as_str()))
        .map_err(failed("mount an overlay over /"))?;
    chdir(&merged).map_err(failed("enter the overlay"))?;
    // The old root ends up on top of the new one, from where it is taken away.
    pivot_root(".", ".").map_err(failed("pivot_root"))?;
    umount2(".", MntFlags::MNT_DETACH).map_err(failed("unmount the old root"))?;
    chdir("/").map_err(failed("enter the new root"))?;
    let mut child = Command::new(PROGRAM)
        .stdin(Stdio::inherit())
        .stdout(Stdio::inherit())
        .stderr(Stdio::inherit())
        .env_clear()
        .spawn()
        .map_err(|error| io::Error::other(format!("run {PROGRAM} in the new root: {error}")))?;
    let status = child.wait()?;
    let took = began.elapsed();
    if status.success() { Ok(took) } else { Err(io::Error::other(format!("{PROGRAM} ended with {status}"))) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_is_measured_and_leaves_nothing() {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "this test cannot run here");
            println!("skipped: needs root to mount");
            return;
        }
        let own = || fs::read_link("/proc/self/ns/mnt").unwrap();
        let (before, mounts) = (own(), fs::read_to_string("/proc/self/mounts").unwrap());
        let took = measure().unwrap();
        assert!(took > Duration::ZERO && took < Duration::from_secs(20), "{took:?}");
        assert_eq!(own(), before);
        assert!(!mounts.contains("/tmp/merged"));
        assert!(!fs::read_to_string("/proc/self/mounts").unwrap().contains("/tmp/merged"));
    }
}
