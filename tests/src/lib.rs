//! What the end-to-end tests share: the engines under test, the clients, an image, and the check that nothing is left.
//!
//! Everything is real: gantryd, Debian's containerd, both their shims, runc, the kernel. Each engine has folders, sockets
//! and a namespace of its own, so that tests run beside each other. Tests wait for conditions, up to a limit.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

pub mod client;
pub mod cri;
pub mod faults;
pub mod host;
pub mod image;
pub mod left;
pub mod network;
pub mod registry;
pub mod spdy;
pub mod terminal;

use std::path::PathBuf;
use std::time::{Duration, Instant};

/// How long anything may take before a test gives it up. Generous: the machine may be small and busy.
pub const LIMIT: Duration = Duration::from_secs(60);

/// Waits until `condition` holds, and fails with `what` when it does not within the limit.
pub fn wait_for(what: &str, condition: impl FnMut() -> bool) {
    assert!(holds_within(LIMIT, condition), "waited {LIMIT:?} for {what}");
}

/// Waits until `condition` holds; whether it does within `limit`.
pub fn holds_within(limit: Duration, mut condition: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + limit;
    while !condition() {
        if Instant::now() >= end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// Stops a process, and returns when each of its threads has stopped: a signal alone leaves them a moment to go on.
pub fn suspend(pid: i32) {
    use nix::sys::signal::{Signal, kill};
    kill(nix::unistd::Pid::from_raw(pid), Signal::SIGSTOP).unwrap();
    wait_for("a process to stop", || {
        std::fs::read_dir(format!("/proc/{pid}/task")).unwrap().all(|thread| {
            // PID (NAME) STATE; a name may hold anything. One that has ended does not go on either.
            std::fs::read_to_string(thread.unwrap().path().join("stat"))
                .map_or(true, |stat| stat.rsplit_once(") ").unwrap().1.starts_with('T'))
        })
    });
}

/// A binary of this workspace, as cargo built it.
pub fn binary(name: &str) -> PathBuf {
    let test = std::env::current_exe().unwrap();
    // target/PROFILE/deps/test-HASH, or target/PROFILE/binary.
    let folder = test.ancestors().skip(1).find(|folder| !folder.ends_with("deps")).unwrap();
    let path = folder.join(name);
    assert!(path.exists(), "{} is not there; run `cargo build --workspace --bins` first", path.display());
    path
}

/// Whether the tests of this file can run: as root, with these programs. What is missing is said, and fails the test
/// under `make test`, which installs everything.
pub fn ready(programs: &[&str]) -> bool {
    let mut missing: Vec<String> = programs
        .iter()
        .filter(|program| !std::path::Path::new(program).exists())
        .map(|program| format!("{program} is not installed"))
        .collect();
    if !nix::unistd::geteuid().is_root() {
        missing.push("not root".into());
    }
    if missing.is_empty() {
        return true;
    }
    let why = missing.join(", ");
    assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "cannot run: {why}");
    println!("SKIPPED: {why}");
    false
}
