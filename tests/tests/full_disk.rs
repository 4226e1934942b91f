//! A disk with no byte left: what is there stays and runs, the engine starts, and what takes things away works and gives space
//! back. `make chaos` has more of it, on ext4.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::io::Write as _;
use std::process::Command;

use tests::client::Ctr;
use tests::host::{Host, Kind, RUNC, STOCK_CTR};
use tests::image::{self, BUSYBOX};
use tests::{ready, wait_for};

const MOUNT: &str = "/usr/bin/mount";

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Makes leases until there is no room for another; why.
fn fill_records(ctr: &Ctr) -> String {
    let labels: Vec<String> = (0..20).map(|number| format!("label-{number}={}", "x".repeat(3000))).collect();
    let mut arguments = vec!["leases", "create"];
    arguments.extend(labels.iter().map(String::as_str));
    let mut refused = None;
    wait_for("the disk to be full for records, too", || {
        let made = ctr.run(&arguments);
        refused = (made.code != 0).then_some(made.stderr);
        refused.is_some()
    });
    refused.unwrap()
}

#[test]
fn deletions_and_restarts_need_no_free_space() {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX, MOUNT]) {
        return;
    }
    let mut host = Host::new(Kind::Gantry);
    let root = host.root();
    fs::create_dir(&root).unwrap();
    run(MOUNT, &["-t", "tmpfs", "-o", "size=64m", "tmpfs", root.to_str().unwrap()]);
    host.start();
    let (ctr, name) = (host.ctr(), host.import());
    ctr.ok(&["images", "tag", name, "example.org/other:1"]);
    ctr.ok(&["leases", "create", "--id", "kept"]);
    ctr.ok(&["run", "-d", name, "c", "sleep", "3600"]);
    let filler = root.join("filler");
    let fill = || {
        let mut file = File::options().create(true).append(true).open(&filler).unwrap();
        while file.write_all(&[1; 4096]).is_ok() {}
    };
    fill();
    let error = fill_records(&ctr);
    assert!(error.contains("space"), "{error}");

    let still_there = |host: &Host| {
        assert!(ctr.ok(&["leases", "ls", "-q"]).contains("kept"));
        assert!(ctr.ok(&["images", "ls", "-q"]).contains("example.org/other:1"));
        assert!(ctr.ok(&["tasks", "ls"]).contains("RUNNING"), "{}", host.log());
        assert_eq!(ctr.run(&["tasks", "exec", "--exec-id", "e", "c", "true"]).code, 0);
    };
    still_there(&host);
    // Whoever fills the disk takes what the engine has given up for itself.
    fill();
    still_there(&host);
    host.stop();
    host.start();
    still_there(&host);
    fill();
    host.kill();
    host.start();
    still_there(&host);
    fill();

    ctr.ok(&["images", "rm", "--sync", "example.org/other:1"]);
    ctr.run(&["tasks", "rm", "-f", "c"]);
    ctr.ok(&["containers", "rm", "c"]);
    for lease in ctr.ok(&["leases", "ls", "-q"]).lines() {
        ctr.ok(&["leases", "rm", lease]);
    }
    ctr.ok(&["gc"]);
    assert_eq!(image::NAME, name);
    fs::remove_file(filler).unwrap();
    // As before, and what is kept for the next time is there again.
    assert_eq!(ctr.ok(&["run", "--rm", name, "after", "echo", "well"]), "well\n");
    assert!(root.join("metadata/reserve").exists());
    host.stop();
    run("/usr/bin/umount", &[root.to_str().unwrap()]);
    host.assert_nothing_left();
}
