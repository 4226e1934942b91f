//! Faults of what the engine stands on and of those it works with: disks that are full, read-only or failing; shims that stop
//! or talk nonsense; runtimes that fail, hang or are missing; clients by the thousand; clocks that jump; no descriptors left.
//!
//! The end-to-end tests hold more of these, and are not repeated here; docs/reliability.md says which.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use harness::client::{Ctr, channel, finish, in_namespace};
use harness::cri::{Node, container, idle, shell};
use harness::host::{Host, Kind, RUNC, STOCK_CTR};
use harness::image::{self, BUSYBOX, Layer};
use harness::network::{IP, IPTABLES, PLUGINS};
use harness::registry::{done, noise};
use harness::{LIMIT, left, ready, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::containerd::services::leases::v1::CreateRequest;
use proto::containerd::services::leases::v1::leases_client::LeasesClient;
use proto::runtime::v1::{ContainerState, PodSandboxState};

use crate::check;
use crate::disk::{Disk, MKFS};
use crate::kills::has_ended;
use crate::run::Run;

/// What makes a program's clock another.
const FAKETIME: &str = "/usr/lib/x86_64-linux-gnu/faketime/libfaketimeMT.so.1";
/// What makes system calls slow, and fail.
const STRACE: &str = "/usr/bin/strace";
/// The name under which this program is a shim that talks nonsense.
pub(crate) const BAD_SHIM: &str = "containerd-shim-nonsense-v1";

/// A name, the programs that it needs, and what it does.
type Case = (&'static str, &'static [&'static str], fn());

pub(crate) fn all(run: &mut Run) {
    let usual: &'static [&'static str] = &[STOCK_CTR, RUNC, BUSYBOX];
    let disks: &'static [&'static str] = &[STOCK_CTR, RUNC, BUSYBOX, MKFS, "/usr/bin/mount"];
    let pods: &'static [&'static str] = &[STOCK_CTR, RUNC, BUSYBOX, IP, IPTABLES, PLUGINS];
    let cases: [Case; 17] = [
        ("disk-full-of-data", disks, full_of_data),
        ("disk-full-for-metadata", disks, full_for_metadata),
        ("disk-full-and-killed", disks, full_and_killed),
        ("disk-full-for-a-large-record", disks, full_for_a_large_record),
        ("disk-read-only", disks, read_only),
        ("disk-input-output-errors", disks, failing_disk),
        ("writes-that-fail-late", &[STOCK_CTR, RUNC, BUSYBOX, STRACE], failing_late),
        ("shim-stopped", usual, shim_stopped),
        ("shims-killed", usual, shims_killed),
        ("shim-talks-nonsense", usual, shim_talks_nonsense),
        ("runtime-missing", usual, runtime_missing),
        ("runtime-fails", usual, runtime_fails),
        ("runtime-hangs", usual, runtime_hangs),
        ("clients-that-drop", usual, clients_that_drop),
        ("descriptors-exhausted", usual, descriptors_exhausted),
        ("out-of-memory", usual, out_of_memory),
        ("out-of-memory-in-a-pod", pods, out_of_memory_in_a_pod),
    ];
    for (name, programs, case) in cases {
        let name = format!("fault/{name}");
        if !run.wants(&name) {
            continue;
        }
        if ready(programs) {
            run.one(&name, case);
        } else {
            run.skip(&name, "programs are missing");
        }
    }
    if Path::new(FAKETIME).exists() && ready(usual) {
        run.one("fault/clock-jumps", clock_jumps);
    } else if run.wants("fault/clock-jumps") {
        run.skip("fault/clock-jumps", "the package faketime is not installed");
    }
}

/// An engine with its root on a small disk of its own, with the usual image.
fn on_disk(bytes: u64) -> (Host, Disk) {
    let mut host = Host::new(Kind::Gantry);
    host.collects_by_itself = true;
    let disk = Disk::make(host.folder().join("disk"), host.root(), bytes);
    host.start();
    host.import();
    (host, disk)
}

/// Ends it, after a look at what is there.
fn end(mut host: Host, disk: Disk) {
    check::check(&mut host, false);
    drop(disk);
    drop(host);
}

fn works(host: &Host) {
    assert_eq!(host.ctr().ok(&["run", "--rm", image::NAME, "works", "echo", "well"]), "well\n");
}

/// An image with so many bytes that cannot be compressed, as an archive.
fn archive(host: &Host, name: &str, bytes: usize) -> String {
    let layer = Layer::default().file("noise", 0o644, &noise(11, bytes)).finish();
    let path = host.folder().join(format!("{bytes}.tar"));
    image::image(name, &["sh"], &[image::base_layer(), layer]).write(&path).unwrap();
    path.display().to_string()
}

/// Makes leases until that fails; why it did.
fn exhaust(ctr: &Ctr) -> String {
    let end = Instant::now() + LIMIT;
    loop {
        // Large ones: a lease's labels are all it has.
        let labels: Vec<String> =
            (0..20).map(|number| format!("label-{number}={}", "x".repeat(3000))).collect();
        let mut arguments = vec!["leases", "create"];
        arguments.extend(labels.iter().map(String::as_str));
        let made = ctr.run(&arguments);
        if made.code != 0 {
            return made.stderr;
        }
        assert!(Instant::now() < end, "the disk does not fill up");
    }
}

/// All that takes away works on a full disk, and gives its space back.
fn deletes_work(host: &Host, disk: &Disk) {
    let ctr = host.ctr();
    ctr.run(&["tasks", "rm", "-f", "c1"]);
    wait_for("the task to be gone", || {
        ctr.run(&["tasks", "rm", "-f", "c1"]);
        !ctr.ok(&["tasks", "ls", "-q"]).contains("c1")
    });
    ctr.ok(&["containers", "rm", "c1"]);
    ctr.ok(&["snapshots", "rm", "s1"]);
    ctr.ok(&["leases", "rm", "l1"]);
    ctr.ok(&["images", "rm", "--sync", "example.org/two:1"]);
    ctr.ok(&["gc"]);
    wait_for("the space to be free again", || disk.free() > 8 << 20);
}

/// What there is before the disk is full.
fn furnish(host: &Host) {
    let ctr = host.ctr();
    ctr.ok(&["images", "import", &archive(host, "example.org/two:1", 6 << 20)]);
    ctr.ok(&["run", "-d", image::NAME, "c1", "sleep", "3600"]);
    ctr.ok(&["snapshots", "prepare", "s1"]);
    ctr.ok(&["leases", "create", "--id", "l1"]);
}

fn still_there(host: &Host) {
    let ctr = host.ctr();
    assert!(ctr.ok(&["images", "ls", "-q"]).contains("example.org/two:1"));
    assert!(ctr.ok(&["containers", "ls", "-q"]).contains("c1"));
    assert!(ctr.ok(&["leases", "ls", "-q"]).contains("l1"));
    assert!(ctr.ok(&["tasks", "ls"]).contains("RUNNING"));
    assert_eq!(ctr.run(&["tasks", "exec", "--exec-id", "e", "c1", "true"]).code, 0);
    // To verify them takes a lease, which is something new.
    ctr.ok(&["images", "check"]);
}

fn full_of_data() {
    let (mut host, disk) = on_disk(96 << 20);
    furnish(&host);
    let ctr = host.ctr();
    let big = archive(&host, "example.org/big:1", 8 << 20);
    let filler = disk.fill();
    let error = ctr.fails(&["images", "import", &big]);
    assert!(error.contains("space"), "{error}");
    still_there(&host);
    // It stops and starts as if nothing were.
    host.stop();
    host.start();
    still_there(&host);
    deletes_work(&host, &disk);
    fs::remove_dir_all(filler).unwrap();
    ctr.ok(&["images", "import", &big]);
    works(&host);
    end(host, disk);
}

fn full_for_metadata() {
    let (mut host, disk) = on_disk(96 << 20);
    furnish(&host);
    let ctr = host.ctr();
    let filler = disk.fill();
    let error = exhaust(&ctr);
    assert!(error.contains("space"), "{error}");
    still_there(&host);
    host.stop();
    host.start();
    still_there(&host);
    deletes_work(&host, &disk);
    // What it kept for that is taken again, and then a second time it is as the first.
    for lease in ctr.ok(&["leases", "ls", "-q"]).lines() {
        ctr.ok(&["leases", "rm", lease]);
    }
    ctr.ok(&["leases", "create", "--id", "after"]);
    fs::remove_dir_all(filler).unwrap();
    furnish(&host);
    let filler = disk.fill();
    exhaust(&ctr);
    deletes_work(&host, &disk);
    fs::remove_dir_all(filler).unwrap();
    works(&host);
    end(host, disk);
}

fn full_and_killed() {
    let (mut host, disk) = on_disk(96 << 20);
    furnish(&host);
    let ctr = host.ctr();
    let filler = disk.fill();
    exhaust(&ctr);
    for _ in 0..4 {
        host.kill();
        host.start();
        still_there(&host);
        exhaust(&ctr);
        // Whoever fills the disk goes on, and takes what the engine has given up.
        disk.fill_more();
    }
    deletes_work(&host, &disk);
    fs::remove_dir_all(filler).unwrap();
    works(&host);
    end(host, disk);
}

fn read_only() {
    let (mut host, disk) = on_disk(96 << 20);
    furnish(&host);
    host.stop();
    disk.remount("ro");
    let output = {
        let mut command = host.command();
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        wait_for("the engine to give up", || child.try_wait().unwrap().is_some());
        finish(child, "an engine on a disk that cannot be written to")
    };
    assert_ne!(output.code, 0);
    let said = output.stdout + &output.stderr;
    assert!(said.contains("Read-only") && said.contains(&host.root().display().to_string()), "{said}");
    disk.remount("rw");
    host.start();
    still_there(&host);
    deletes_work(&host, &disk);
    end(host, disk);
}

/// A disk of which no more blocks can be written: a loop device over a file with holes, in a full tmpfs.
fn failing_disk() {
    let mut host = Host::new(Kind::Gantry);
    host.collects_by_itself = true;
    let memory = host.folder().join("memory");
    fs::create_dir(&memory).unwrap();
    done(Command::new("mount").args(["-t", "tmpfs", "-o", "size=48m", "tmpfs"]).arg(&memory));
    let file = memory.join("disk");
    {
        let disk = Disk::make(file.clone(), host.root(), 96 << 20);
        host.start();
        host.import();
        let ctr = host.ctr();
        ctr.ok(&["run", "-d", image::NAME, "c1", "sleep", "3600"]);
        ctr.ok(&["leases", "create", "--id", "l1"]);
        // From here on a block that was never written fails.
        let mut ballast = fs::File::create(memory.join("ballast")).unwrap();
        while std::io::Write::write_all(&mut ballast, &[1; 4096]).is_ok() {}
        let big = archive(&host, "example.org/big:1", 20 << 20);
        let ended = ctr.run(&["images", "import", &big]);
        assert_ne!(ended.code, 0, "{ended:?}");
        // It still answers, its containers run, and what cannot be kept is refused with the reason.
        assert!(ctr.ok(&["leases", "ls", "-q"]).contains("l1"));
        assert!(ctr.ok(&["tasks", "ls"]).contains("RUNNING"));
        assert_eq!(ctr.run(&["tasks", "exec", "--exec-id", "e", "c1", "true"]).code, 0);
        let refused = ctr.run(&["leases", "create", "--id", "l2"]);
        println!("       a lease on a failing disk: {} {}", refused.code, refused.stderr.trim());
        // Its files are on that disk: it is to end before that can be mended.
        wait_for("the task to be removed", || {
            ctr.run(&["tasks", "rm", "-f", "c1"]);
            !ctr.ok(&["tasks", "ls", "-q"]).contains("c1")
        });
        host.stop();
        drop(ballast);
        fs::remove_file(memory.join("ballast")).unwrap();
        done(Command::new("mount").args(["-o", "remount,size=200m"]).arg(&memory));
        drop(disk);
        let _ = Command::new("/usr/sbin/e2fsck").args(["-fy"]).arg(&file).output();
        let disk = Disk::mount(file, host.root());
        host.start();
        let leases = ctr.ok(&["leases", "ls", "-q"]);
        assert!(leases.contains("l1"), "{leases}");
        assert_eq!(refused.code == 0, leases.contains("l2"), "what was said is so");
        ctr.ok(&["images", "verify", image::NAME]);
        ctr.ok(&["containers", "rm", "c1"]);
        works(&host);
        check::check(&mut host, false);
        drop(disk);
    }
    done(Command::new("umount").arg(&memory));
}

/// A record that is larger than what is free: sled cannot be closed after that, and the engine ends rather than wait for it.
fn full_for_a_large_record() {
    let (mut host, disk) = on_disk(96 << 20);
    furnish(&host);
    let filler = disk.fill();
    // As much as makes the disk not full yet.
    let ballast = filler.join("0");
    let length = fs::metadata(&ballast).unwrap().len();
    fs::File::options().write(true).open(ballast).unwrap().set_len(length - (5 << 19)).unwrap();
    // More than fits into a command line.
    let labels = (0..800).map(|number| (format!("label-{number}"), "x".repeat(4000))).collect();
    let request = CreateRequest { id: "large".to_owned(), labels };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let made = runtime.block_on(async {
        let mut leases = LeasesClient::new(channel(&host.address()).await);
        tokio::time::timeout(LIMIT, leases.create(in_namespace(&host.namespace, request))).await
    });
    made.expect("an answer").expect_err("more than there is room for");
    if has_ended(host.pid()) {
        println!("       the engine ended, as it may");
        host.kill();
        host.start();
    }
    still_there(&host);
    deletes_work(&host, &disk);
    fs::remove_dir_all(filler).unwrap();
    works(&host);
    end(host, disk);
}

/// Writes of records that fail when whoever asked for them has been waiting for a while. One of sled's threads alone, so that of
/// the two writes of a commit one may fail after the other: sled wakes nobody then.
fn failing_late() {
    let host = started(&["well"]);
    let ctr = host.ctr();
    ctr.ok(&["leases", "create", "--id", "l1"]);
    let tasks = fs::read_dir(format!("/proc/{}/task", host.pid())).unwrap().flatten();
    let of_sled =
        |path: &Path| fs::read_to_string(path.join("comm")).is_ok_and(|name| name.trim() == "sled-io-0");
    let thread = tasks.map(|task| task.path()).find(|path| of_sled(path)).expect("sled has threads");
    let traced = || {
        let status = fs::read_to_string(thread.join("status")).unwrap();
        status.lines().any(|line| line.starts_with("TracerPid:") && !line.ends_with("\t0"))
    };
    let mut kept = vec!["l1".to_owned()];
    for error in ["ENOSPC", "EIO"] {
        let inject = format!("inject=pwrite64:error={error}:delay_enter=300000");
        let mut tracer = Command::new(STRACE)
            .args(["-q", "-o", "/dev/null", "-e", "trace=pwrite64", "-e", &inject, "-p"])
            .arg(thread.file_name().unwrap())
            .stderr(Stdio::null())
            .spawn()
            .unwrap();
        wait_for("the thread to be traced", traced);
        let (begun, mut refused) = (Instant::now(), 0);
        for number in 0.. {
            let id = format!("{error}-{number}");
            let ended = ctr.run(&["leases", "create", "--id", &id]);
            if ended.code == 0 {
                kept.push(id);
            } else {
                let words = if error == "EIO" { "nput/output error" } else { "space" };
                assert!(ended.stderr.contains(words), "{ended:?}");
                refused += 1;
            }
            // Several, since it is the other write that fails in half of them.
            if refused == 6 || begun.elapsed() > LIMIT {
                break;
            }
        }
        kill(Pid::from_raw(tracer.id() as i32), Signal::SIGTERM).unwrap();
        tracer.wait().unwrap();
        wait_for("the thread not to be traced", || !traced());
        println!("       {refused} commits failed late with {error} in {:?}", begun.elapsed());
        assert!(refused > 0, "no write failed");
        // It goes on, with all that was acknowledged.
        works(&host);
        let leases = ctr.ok(&["leases", "ls", "-q"]);
        let lost: Vec<_> = kept.iter().filter(|id| !leases.lines().any(|line| line == *id)).collect();
        assert!(lost.is_empty(), "lost: {lost:?}");
    }
    for lease in ctr.ok(&["leases", "ls", "-q"]).lines() {
        ctr.ok(&["leases", "rm", lease]);
    }
    remove(&host, &["well"]);
}

/// The shim of a container.
fn shim(host: &Host, id: &str) -> Pid {
    let wanted = format!("-id {id} ");
    let all = left::processes(host.folder());
    let found: Vec<i32> = all
        .into_iter()
        .filter(|(_, command)| format!("{command} ").contains(&wanted))
        .map(|(pid, _)| pid)
        .collect();
    assert_eq!(found.len(), 1, "{id}");
    Pid::from_raw(found[0])
}

fn started(containers: &[&str]) -> Host {
    let host = Host::collecting();
    host.import();
    for id in containers {
        host.ctr().ok(&["run", "-d", image::NAME, id, "sleep", "3600"]);
    }
    host
}

fn status(ctr: &Ctr, id: &str) -> String {
    let list = ctr.ok(&["tasks", "ls"]);
    let line = list.lines().find(|line| line.split_whitespace().next() == Some(id));
    line.and_then(|line| line.split_whitespace().last()).unwrap_or_default().to_owned()
}

fn remove(host: &Host, ids: &[&str]) {
    let ctr = host.ctr();
    for id in ids {
        wait_for("the task to be removed", || {
            ctr.run(&["tasks", "rm", "-f", id]);
            status(&ctr, id).is_empty()
        });
        ctr.ok(&["containers", "rm", id]);
    }
    host.assert_nothing_left();
}

fn shim_stopped() {
    let mut host = started(&["still", "well"]);
    let ctr = host.ctr();
    let still = shim(&host, "still");
    harness::suspend(still.as_raw());
    let begun = Instant::now();
    assert_eq!((status(&ctr, "still").as_str(), status(&ctr, "well").as_str()), ("UNKNOWN", "RUNNING"));
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert_eq!(ctr.run(&["tasks", "exec", "--exec-id", "e", "well", "true"]).code, 0);
    works(&host);
    // An engine that starts does not wait for it either.
    host.kill();
    let begun = Instant::now();
    host.start();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    assert_eq!((status(&ctr, "still").as_str(), status(&ctr, "well").as_str()), ("UNKNOWN", "RUNNING"));
    kill(still, Signal::SIGCONT).unwrap();
    wait_for("the shim to answer again", || status(&ctr, "still") == "RUNNING");
    assert_eq!(ctr.run(&["tasks", "exec", "--exec-id", "e", "still", "true"]).code, 0);
    remove(&host, &["still", "well"]);
}

fn shims_killed() {
    let ids = ["c1", "c2", "c3", "c4", "c5"];
    let host = started(&ids);
    let ctr = host.ctr();
    for id in ids {
        kill(shim(&host, id), Signal::SIGKILL).unwrap();
    }
    for id in ids {
        wait_for("the task of a dead shim to be stopped", || status(&ctr, id) == "STOPPED");
    }
    // What it was running is gone as well.
    wait_for("the processes to be gone", || {
        left::cgroups(&host.namespace)
            .iter()
            .all(|group| fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default().is_empty())
    });
    for id in ids {
        ctr.run(&["tasks", "rm", id]);
        ctr.ok(&["tasks", "start", "-d", id]);
    }
    remove(&host, &ids);
}

/// This program as a shim: it starts well, and answers whatever it is asked with what is no answer.
pub(crate) fn nonsense() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let last = arguments.last().map(String::as_str);
    if arguments.iter().any(|argument| argument == "delete") {
        return;
    }
    if last == Some("start") {
        // The bundle's path is too long for a socket.
        let socket = std::env::temp_dir().join(format!("gt-n-{}", std::process::id()));
        let own = std::env::current_exe().unwrap();
        let mut command = Command::new("setsid");
        command.arg("--fork").arg(own).arg("serve").arg(&socket);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).status().unwrap();
        let end = Instant::now() + Duration::from_secs(5);
        while UnixStream::connect(&socket).is_err() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(5));
        }
        print!("unix://{}", socket.display());
    } else if let [.., serve, socket] = &arguments[..]
        && serve == "serve"
    {
        serve_nonsense(Path::new(socket));
    }
}

/// Serves nonsense at this socket until nobody has asked for a while.
fn serve_nonsense(socket: &Path) {
    use std::io::{Read as _, Write as _};
    let listener = UnixListener::bind(socket).unwrap();
    std::thread::spawn({
        let socket = socket.to_owned();
        move || {
            std::thread::sleep(Duration::from_secs(20));
            let _ = fs::remove_file(socket);
            std::process::exit(0);
        }
    });
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || {
            let mut stream = stream;
            let mut buffer = [0; 256];
            while stream.read(&mut buffer).is_ok_and(|count| count > 0) {
                let _ = stream.write_all(&noise(3, 4096));
            }
        });
    }
}

fn shim_talks_nonsense() {
    let mut host = Host::new(Kind::Gantry);
    host.collects_by_itself = true;
    let programs = host.folder().join("bin");
    fs::create_dir(&programs).unwrap();
    fs::hard_link(std::env::current_exe().unwrap(), programs.join(BAD_SHIM))
        .or_else(|_| fs::copy(std::env::current_exe().unwrap(), programs.join(BAD_SHIM)).map(drop))
        .unwrap();
    host.start();
    host.import();
    let ctr = host.ctr();
    let runtime = programs.join(BAD_SHIM).display().to_string();
    ctr.ok(&["containers", "create", "--runtime", &runtime, image::NAME, "bad", "true"]);
    let begun = Instant::now();
    let error = ctr.fails(&["tasks", "start", "-d", "bad"]);
    assert!(!error.is_empty() && begun.elapsed() < Duration::from_secs(50), "{:?}: {error}", begun.elapsed());
    println!("       it is told of so: {}", error.trim());
    works(&host);
    assert!(!ctr.ok(&["tasks", "ls", "-q"]).contains("bad"));
    ctr.ok(&["containers", "rm", "bad"]);
    // One that prints nonsense instead of an address.
    let script = programs.join("containerd-shim-prints-v1");
    write_script(&script, "head -c 100000 /dev/urandom");
    let runtime = script.display().to_string();
    let error = ctr.fails(&["run", "--rm", "--runtime", &runtime, image::NAME, "bad2", "true"]);
    assert!(error.contains("containerd-shim-prints-v1"), "{error}");
    works(&host);
    ctr.run(&["containers", "rm", "bad2"]);
    ctr.run(&["snapshots", "rm", "bad2"]);
    wait_for("the bad shim to end", || {
        !left::processes(host.folder()).iter().any(|(_, command)| command.contains(BAD_SHIM))
    });
    host.assert_nothing_left();
}

fn write_script(path: &Path, text: &str) {
    fs::write(path, format!("#!/bin/sh\n{text}\n")).unwrap();
    fs::set_permissions(path, fs::Permissions::from_mode(0o755)).unwrap();
}

/// A runtime of a case's own in the engine's folder.
fn runtime(host: &Host, name: &str, text: &str) -> PathBuf {
    let path = host.folder().join(name);
    write_script(&path, text);
    path
}

fn runtime_missing() {
    let host = started(&["well"]);
    let ctr = host.ctr();
    let error = ctr.fails(&["run", "--rm", "--runc-binary", "/nowhere/runc", image::NAME, "c1", "true"]);
    assert!(error.contains("/nowhere/runc"), "{error}");
    works(&host);
    // One that is gone when its container is to be ended.
    let own = runtime(&host, "runc-own", &format!("exec {RUNC} \"$@\""));
    let own_text = own.display().to_string();
    ctr.ok(&["run", "-d", "--runc-binary", &own_text, image::NAME, "c2", "sleep", "3600"]);
    let away = host.folder().join("away");
    fs::rename(&own, &away).unwrap();
    let error = ctr.fails(&["tasks", "exec", "--exec-id", "e", "c2", "true"]);
    assert!(error.contains("runc-own"), "{error}");
    // A signal needs no runtime; the removal of what it keeps does.
    ctr.ok(&["tasks", "kill", "-s", "KILL", "c2"]);
    wait_for("the task to stop", || status(&ctr, "c2") == "STOPPED");
    let error = ctr.fails(&["tasks", "rm", "c2"]);
    assert!(error.contains("runc-own"), "{error}");
    assert_eq!(status(&ctr, "c2"), "STOPPED");
    fs::rename(&away, &own).unwrap();
    remove(&host, &["c2", "well"]);
}

fn runtime_fails() {
    let host = started(&["well"]);
    let ctr = host.ctr();
    for (verb, code) in [("create", 1), ("create", 139)] {
        let text = format!(
            "case \" $* \" in *\" {verb} \"*) echo 'a runtime that fails' >&2; exit {code};; esac\nexec {RUNC} \"$@\""
        );
        let bad = runtime(&host, &format!("runc-{verb}-{code}"), &text).display().to_string();
        let error = ctr.fails(&["run", "--rm", "--runc-binary", &bad, image::NAME, "c1", "true"]);
        assert!(error.contains(verb) || error.contains("fails"), "{error}");
        // Nothing is left, and the name is free.
        ctr.run(&["tasks", "rm", "-f", "c1"]);
        ctr.run(&["containers", "rm", "c1"]);
        assert_eq!(ctr.ok(&["run", "--rm", image::NAME, "c1", "echo", "well"]), "well\n", "{verb} {code}");
    }
    // One that fails to run something more in a container, which goes on.
    let text = format!(
        "case \" $* \" in *\" exec \"*) echo 'a runtime that fails' >&2; exit 1;; esac\nexec {RUNC} \"$@\""
    );
    let bad = runtime(&host, "runc-exec", &text).display().to_string();
    ctr.ok(&["run", "-d", "--runc-binary", &bad, image::NAME, "c2", "sleep", "3600"]);
    let error = ctr.fails(&["tasks", "exec", "--exec-id", "e", "c2", "true"]);
    assert!(error.contains("runc-exec"), "{error}");
    assert_eq!(status(&ctr, "c2"), "RUNNING");
    ctr.ok(&["tasks", "rm", "-f", "c2"]);
    ctr.ok(&["containers", "rm", "c2"]);
    // One that fails to delete: the name is not set free by a lie, and is when it works again.
    let flag = host.folder().join("fail");
    let text = format!(
        "case \" $* \" in *\" delete \"*) [ ! -e {} ] || {{ echo no >&2; exit 1; }};; esac\nexec {RUNC} \"$@\"",
        flag.display()
    );
    let bad = runtime(&host, "runc-delete", &text).display().to_string();
    ctr.ok(&["run", "-d", "--runc-binary", &bad, image::NAME, "c3", "sleep", "3600"]);
    fs::write(&flag, "").unwrap();
    ctr.ok(&["tasks", "kill", "-s", "KILL", "c3"]);
    wait_for("the task to stop", || status(&ctr, "c3") == "STOPPED");
    let ended = ctr.run(&["tasks", "rm", "c3"]);
    assert!(ended.stderr.contains("delete"), "{ended:?}");
    assert_eq!(status(&ctr, "c3"), "STOPPED");
    fs::remove_file(&flag).unwrap();
    remove(&host, &["c3", "well"]);
}

fn runtime_hangs() {
    let mut host = started(&["well"]);
    let ctr = host.ctr();
    let flag = host.folder().join("hang");
    let text = format!(
        "case \" $* \" in *\" create \"*) while [ -e {} ]; do sleep 0.05; done;; esac\nexec {RUNC} \"$@\"",
        flag.display()
    );
    let slow = runtime(&host, "runc-slow", &text).display().to_string();
    for restart in [false, true] {
        fs::write(&flag, "").unwrap();
        let mut client =
            ctr.spawn(&["run", "-d", "--runc-binary", &slow, image::NAME, "c1", "sleep", "3600"]);
        wait_for("the runtime to hang", || {
            left::processes(host.folder()).iter().any(|(_, command)| command.contains("runc-slow"))
        });
        // Nobody else waits for it.
        let begun = Instant::now();
        works(&host);
        assert_eq!(status(&ctr, "well"), "RUNNING");
        assert_eq!(ctr.run(&["tasks", "exec", "--exec-id", "e", "well", "true"]).code, 0);
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
        kill(Pid::from_raw(client.id() as i32), Signal::SIGKILL).unwrap();
        client.wait().unwrap();
        if restart {
            let begun = Instant::now();
            host.kill();
            host.start();
            assert!(begun.elapsed() < Duration::from_secs(30), "{:?}", begun.elapsed());
            works(&host);
        }
        fs::remove_file(&flag).unwrap();
        // Then it comes to its end, or is undone; in both cases the name can be had.
        wait_for("the name to be free", || {
            ctr.run(&["tasks", "rm", "-f", "c1"]);
            ctr.run(&["containers", "rm", "c1"]);
            ctr.run(&["snapshots", "rm", "c1"]);
            ctr.run(&["run", "--rm", image::NAME, "c1", "true"]).code == 0
        });
    }
    remove(&host, &["well"]);
}

/// How many descriptors a process has.
fn descriptors(pid: i32) -> usize {
    fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count)
}

/// Seconds of CPU that a process has used.
fn cpu(pid: i32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(')').next().unwrap().split_whitespace().collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

fn clients_that_drop() {
    use std::io::Write as _;
    let host = started(&["well"]);
    let ctr = host.ctr();
    let before = descriptors(host.pid());
    std::thread::scope(|scope| {
        for of in 0..8 {
            let address = host.address();
            scope.spawn(move || {
                for number in 0..125 {
                    let Ok(mut stream) = UnixStream::connect(&address) else { continue };
                    // Nothing; half a preface; all of it and settings; nonsense.
                    let _ = match (of + number) % 4 {
                        0 => Ok(()),
                        1 => stream.write_all(b"PRI * HT"),
                        2 => stream.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0"),
                        _ => stream.write_all(&noise(number, 500)),
                    };
                }
            });
        }
        // Who behaves is served meanwhile.
        for _ in 0..3 {
            works(&host);
        }
    });
    // Those that go in the middle of a call.
    for _ in 0..30 {
        let mut client = ctr.spawn(&["events"]);
        let mut other = ctr.spawn(&["tasks", "attach", "well"]);
        for client in [&mut client, &mut other] {
            client.kill().unwrap();
            client.wait().unwrap();
        }
    }
    wait_for("their descriptors to be closed", || descriptors(host.pid()) <= before + 4);
    works(&host);
    remove(&host, &["well"]);
}

fn descriptors_exhausted() {
    let host = started(&["well"]);
    let ctr = host.ctr();
    let pid = host.pid();
    let limit = descriptors(pid) + 40;
    let limits = fs::read_to_string(format!("/proc/{pid}/limits")).unwrap();
    let of_files = limits.lines().find(|line| line.starts_with("Max open files")).unwrap();
    let usual = of_files.split_whitespace().nth(3).unwrap().to_owned();
    let set = |limit: &str| {
        done(Command::new("prlimit").args(["--pid", &pid.to_string(), &format!("--nofile={limit}:")]));
    };
    set(&limit.to_string());
    let clients: Vec<UnixStream> =
        (0..200).filter_map(|_| UnixStream::connect(host.address()).ok()).collect();
    wait_for("the engine to have no descriptor left", || descriptors(pid) + 1 >= limit);
    // It neither ends nor spins.
    let before = cpu(pid);
    std::thread::sleep(Duration::from_secs(3));
    let used = cpu(pid) - before;
    assert!(!has_ended(pid), "the engine ended");
    assert!(used < 1.0, "{used} seconds of CPU in 3 seconds");
    drop(clients);
    wait_for("it to serve again", || ctr.run(&["--connect-timeout", "2s", "version"]).code == 0);
    assert_eq!(status(&ctr, "well"), "RUNNING");
    works(&host);
    // So few that there is not enough for a container: an error, and nothing is left of it.
    set(&(descriptors(pid) + 3).to_string());
    let ended = ctr.run(&["--timeout", "50s", "run", "--rm", image::NAME, "c1", "true"]);
    println!("       a container without descriptors: {} {}", ended.code, ended.stderr.trim());
    set(&usual);
    wait_for("the name to be free", || {
        ctr.run(&["tasks", "rm", "-f", "c1"]);
        ctr.run(&["containers", "rm", "c1"]);
        ctr.run(&["snapshots", "rm", "c1"]);
        ctr.run(&["run", "--rm", image::NAME, "c1", "true"]).code == 0
    });
    remove(&host, &["well"]);
}

fn out_of_memory() {
    let host = started(&["well"]);
    let ctr = host.ctr();
    // A shell that keeps doubling a string.
    let hungry = "a=0123456789abcdef; while true; do a=$a$a; done";
    let limited = ["--memory-limit", "33554432"];
    let run = [&["run"][..], &limited, &["--rm", image::NAME, "hungry", "sh", "-c", hungry]].concat();
    let ended = ctr.run(&run);
    assert_eq!(ended.code, 137, "{ended:?}");
    // Of an exec it is the exec that goes, and the container is there.
    let run = [&["run", "-d"][..], &limited, &[image::NAME, "c1", "sleep", "3600"]].concat();
    ctr.ok(&run);
    let ended = ctr.run(&["tasks", "exec", "--exec-id", "e", "c1", "sh", "-c", hungry]);
    assert_eq!(ended.code, 137, "{ended:?}");
    assert_eq!((status(&ctr, "c1").as_str(), status(&ctr, "well").as_str()), ("RUNNING", "RUNNING"));
    works(&host);
    wait_for("both to be told of", || host.log().matches("topic=/tasks/oom").count() >= 2);
    remove(&host, &["c1", "well"]);
}

/// A pod whose group has the limit, made as the kubelet makes it.
fn out_of_memory_in_a_pod() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(async {
        let node = Node::start(Kind::Gantry).await;
        let group = format!("{}/limited", node.host.namespace);
        let root = Path::new("/sys/fs/cgroup");
        let (folder, file) = match root.join("memory").is_dir() {
            true => (root.join("memory").join(&group), "memory.limit_in_bytes"),
            false => (root.join(&group), "memory.max"),
        };
        if file == "memory.max" {
            fs::create_dir_all(folder.parent().unwrap()).unwrap();
            fs::write(folder.parent().unwrap().join("cgroup.subtree_control"), "+memory").unwrap();
        }
        fs::create_dir_all(&folder).unwrap();
        fs::write(folder.join(file), "67108864").unwrap();
        let mut config = node.pod("limited");
        config.linux.as_mut().unwrap().cgroup_parent = format!("/{group}");
        let (limited, other) = (node.run_pod(config).await, node.run_pod(node.pod("other")).await);
        let others = [node.run(&limited, &idle("waits")).await, node.run(&other, &idle("well")).await];
        let hungry = node.run(&limited, &container("hungry", &["tail", "/dev/zero"])).await;
        let status = node.ended(&hungry).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{status:?}");
        // It is the one that took it that goes, and the pod goes on.
        for id in &others {
            assert_eq!(node.status(id).await.state(), ContainerState::ContainerRunning);
        }
        assert_eq!(node.pod_status(&limited.id).await.state(), PodSandboxState::SandboxReady);
        assert_eq!(node.run_to_end(&limited, shell("again", "echo well")).await.stdout, "well\n");
        for pod in [limited, other] {
            node.remove_pod(&pod.id).await;
        }
        // The kubelet's own, in every hierarchy.
        for hierarchy in fs::read_dir(root).unwrap().flatten().map(|entry| entry.path()).chain([root.into()])
        {
            let _ = fs::remove_dir(hierarchy.join(&group));
        }
        node.assert_nothing_left();
    });
}

fn clock_jumps() {
    // Collections are asked for: leases of clients whose clock does not jump have expired before they begin.
    let mut host = Host::new(Kind::Gantry);
    let file = host.folder().join("clock");
    let set = |offset: &str| {
        let new = file.with_extension("new");
        fs::write(&new, format!("{offset}\n")).unwrap();
        fs::rename(new, &file).unwrap();
    };
    set("+0d");
    host.environment = vec![
        ("LD_PRELOAD".into(), FAKETIME.into()),
        ("FAKETIME_TIMESTAMP_FILE".into(), file.display().to_string()),
        ("FAKETIME_NO_CACHE".into(), "1".into()),
        // The kernel's monotonic clock does not jump either.
        ("FAKETIME_DONT_FAKE_MONOTONIC".into(), "1".into()),
        ("DONT_FAKE_MONOTONIC".into(), "1".into()),
    ];
    host.start();
    host.import();
    let ctr = host.ctr();
    ctr.ok(&["run", "-d", image::NAME, "well", "sleep", "3600"]);
    for jump in ["-400d", "+1h", "+400d", "-1h", "+0d"] {
        set(jump);
        assert_eq!(status(&ctr, "well"), "RUNNING", "{jump}");
        assert_eq!(ctr.run(&["tasks", "exec", "--exec-id", "e", "well", "true"]).code, 0, "{jump}");
        works(&host);
        ctr.ok(&["gc"]);
        ctr.ok(&["images", "verify", image::NAME]);
        let id = format!("lease{jump}").replace(['+', '-'], "x");
        // The client, whose clock does not jump, says when it ends.
        ctr.ok(&["leases", "create", "--id", &id, "-x", "20000h"]);
        host.kill();
        host.start();
        assert_eq!(status(&ctr, "well"), "RUNNING", "{jump}");
        works(&host);
        assert!(ctr.ok(&["leases", "ls", "-q"]).contains(&id), "{jump}");
        ctr.ok(&["leases", "rm", &id]);
    }
    remove(&host, &["well"]);
    check::check(&mut host, true);
}
