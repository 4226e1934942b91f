//! Power cuts: the engine's disk as it was at an instant, in a new engine after a reboot.
//!
//! ```text
//! btrfs (loop) --holds--> file of an ext4 --loop, mounted--> the root of an engine, while clients write
//!                              | clone of the file: one instant
//!                              v
//!                         a copy --loop, mounted (its journal is replayed)--> the root of another engine, state empty
//! ```
//!
//! What is in the clone is what the inner file system had given to its disk by then: what was still in its page cache is lost,
//! and so is what it was about to do. Everything that a client had an answer for before the clone must be in it.
//! What this does not show: a disk that loses, on a cut, what it took and was not told to flush. docs/reliability.md has more.

use std::collections::BTreeSet;
use std::fs;
use std::process::Command;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use harness::client::Ctr;
use harness::host::{Host, Kind, RUNC, STOCK_CTR};
use harness::image::{self, BUSYBOX};
use harness::registry::done;
use harness::{ready, wait_for};

use crate::check;
use crate::disk::{Disk, MKFS};
use crate::points::{self, Action, Point};
use crate::run::Run;
use crate::soak::Stop;

const BTRFS: &str = "/usr/sbin/mkfs.btrfs";
/// As large as the outer file system must be.
const OUTER: u64 = 2 << 30;
/// The engine's disk.
const INNER: u64 = 400 << 20;

/// What clients were told of, as they would ask for it.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
enum Told {
    Lease(String),
    Removed(String),
    Container(String),
    Blob { digest: String, bytes: String },
    Layer(String),
    Image(String),
}

struct Outer {
    mounted: std::path::PathBuf,
    _holder: tempfile::TempDir,
}

impl Outer {
    /// A file system whose files can be cloned.
    fn new() -> Self {
        let holder = tempfile::Builder::new().prefix("gt-cut-").tempdir_in("/tmp").unwrap();
        let (file, mounted) = (holder.path().join("btrfs"), holder.path().join("outer"));
        fs::File::create(&file).unwrap().set_len(OUTER).unwrap();
        done(Command::new(BTRFS).args(["-q"]).arg(&file));
        fs::create_dir(&mounted).unwrap();
        done(Command::new("/usr/bin/mount").args(["-o", "loop"]).arg(&file).arg(&mounted));
        Outer { mounted, _holder: holder }
    }
}

impl Drop for Outer {
    fn drop(&mut self) {
        for _ in 0..100 {
            if Command::new("/usr/bin/umount").arg(&self.mounted).output().unwrap().status.success() {
                return;
            }
            std::thread::sleep(Duration::from_millis(50));
        }
        let _ = Command::new("/usr/bin/umount").arg("-l").arg(&self.mounted).output();
    }
}

/// A client that asks for one thing after the other until it is told to stop, or the engine is.
fn client(ctr: &Ctr, of: usize, next: &AtomicUsize, stop: &AtomicBool, told: &Mutex<BTreeSet<Told>>) {
    let note = |what: Told| {
        told.lock().unwrap().insert(what);
    };
    let mut last_lease: Option<String> = None;
    while !stop.load(Ordering::Relaxed) {
        let number = next.fetch_add(1, Ordering::Relaxed);
        let name = format!("n{number}");
        match (of + number) % 6 {
            0 => {
                if ctr.run(&["leases", "create", "--id", &name]).code == 0 {
                    note(Told::Lease(name.clone()));
                    last_lease = Some(name);
                }
            }
            1 => {
                if let Some(lease) = last_lease.take() {
                    // From when it is asked for, either is right.
                    told.lock().unwrap().remove(&Told::Lease(lease.clone()));
                    if ctr.run(&["leases", "rm", &lease]).code == 0 {
                        note(Told::Removed(lease));
                    }
                }
            }
            2 => {
                if ctr.run(&["containers", "create", image::NAME, &name, "true"]).code == 0 {
                    note(Told::Container(name));
                }
            }
            3 => {
                let bytes = format!("blob {number}");
                let digest = oci::Digest::sha256_of(bytes.as_bytes()).to_string();
                let label = "containerd.io/gc.root=2020-01-01T00:00:00Z";
                let ended = ctr.with_input(&["content", "ingest", "--label", label, &name], bytes.as_bytes());
                if ended.code == 0 {
                    note(Told::Blob { digest, bytes });
                }
            }
            4 => {
                let key = format!("{name}-active");
                if ctr.run(&["snapshots", "prepare", &key]).code == 0
                    && ctr.run(&["snapshots", "commit", &name, &key]).code == 0
                {
                    note(Told::Layer(name));
                }
            }
            _ => {
                let name = format!("example.org/cut:{number}");
                if ctr.run(&["images", "tag", image::NAME, &name]).code == 0 {
                    note(Told::Image(name));
                }
            }
        }
    }
}

/// Looks whether all of it is in an engine.
fn assert_there(ctr: &Ctr, told: &BTreeSet<Told>) {
    let lines = |arguments: &[&str]| -> BTreeSet<String> {
        ctr.ok(arguments)
            .lines()
            .filter_map(|line| line.split_whitespace().next())
            .map(str::to_owned)
            .collect()
    };
    let leases = lines(&["leases", "ls", "-q"]);
    let containers = lines(&["containers", "ls", "-q"]);
    let images = lines(&["images", "ls", "-q"]);
    let snapshots = lines(&["snapshots", "ls"]);
    for what in told {
        match what {
            Told::Lease(id) => assert!(leases.contains(id), "lost: {what:?}"),
            Told::Removed(id) => assert!(!leases.contains(id), "back: {what:?}"),
            Told::Container(id) => {
                assert!(containers.contains(id) && snapshots.contains(id), "lost: {what:?}");
            }
            Told::Blob { digest, bytes } => assert_eq!(&ctr.ok(&["content", "get", digest]), bytes),
            Told::Layer(key) => assert!(snapshots.contains(key), "lost: {what:?}"),
            Told::Image(name) => assert!(images.contains(name), "lost: {what:?}"),
        }
    }
    ctr.ok(&["images", "verify", image::NAME]);
}

/// Runs clients, takes the disk at an instant, and looks what a new engine finds on it.
fn cut(point: Option<&Point>, wait: Duration) {
    let outer = Outer::new();
    let mut host = Host::new(Kind::Gantry);
    host.collects_by_itself = true;
    let file = outer.mounted.join("disk");
    let disk = Disk::make(file.clone(), host.root(), INNER);
    host.start();
    host.import();
    let (next, stop, told) = (AtomicUsize::new(0), AtomicBool::new(false), Mutex::default());
    let copy = outer.mounted.join("copy");
    let mut before = BTreeSet::new();
    std::thread::scope(|scope| {
        // Whatever becomes of the rest, the clients end with it.
        let _stop = Stop(&stop);
        for of in 0..3 {
            let (next, stop, told, ctr) = (&next, &stop, &told, host.ctr());
            scope.spawn(move || client(&ctr, of, next, stop, told));
        }
        wait_for("clients to be told of something", || told.lock().unwrap().len() > 10);
        std::thread::sleep(wait);
        if let Some(point) = point {
            points::arm(point, Action::Stop);
            wait_for("the engine to stand still at the point", points::fired);
        }
        before = told.lock().unwrap().clone();
        done(Command::new("cp").arg("--reflink=always").arg(&file).arg(&copy));
        stop.store(true, Ordering::Relaxed);
        if point.is_some() {
            let pid = nix::unistd::Pid::from_raw(host.pid());
            nix::sys::signal::kill(pid, nix::sys::signal::Signal::SIGCONT).unwrap();
            points::disarm();
        }
    });
    let mut other = Host::new(Kind::Gantry);
    other.collects_by_itself = true;
    other.namespace.clone_from(&host.namespace);
    host.kill();
    let again = Disk::mount(copy, other.root());
    other.start();
    assert_there(&other.ctr(), &before);
    // It works on.
    other.ctr().ok(&["run", "--rm", image::NAME, "afterwards", "true"]);
    other.ctr().ok(&["gc"]);
    assert_there(&other.ctr(), &before);
    check::check(&mut other, false);
    drop(again);
    drop(disk);
}

pub(crate) fn all(run: &mut Run) {
    if !run.wants_of("cut/") {
        return;
    }
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX, MKFS, BTRFS]) {
        run.skip("cut/", "programs are missing");
        return;
    }
    let moments = if run.quick { 2 } else { 10 };
    for number in 0..moments {
        // No two the same, and the same in each run.
        let wait = Duration::from_millis(number * 173);
        run.one(&format!("cut/moment-{number}"), move || cut(None, wait));
    }
    for name in [
        "metadata.commit.applied",
        "metadata.commit.flushed",
        "metadata.commit.synced",
        "content.ingest.synced",
        "content.blob.linked",
        "content.blob.name-synced",
        "snapshots.make.settled",
        "snapshots.journal.written",
        "snapshots.journal.synced",
        "snapshots.commit.sealed",
        "events.journal.written",
    ] {
        let point = Point { name: name.to_owned(), count: 3 };
        run.one(&format!("cut/{name}"), move || cut(Some(&point), Duration::ZERO));
    }
}
