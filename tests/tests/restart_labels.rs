//! Containers that are started again as their labels ask for.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::client::Ctr;
use tests::host::{Host, RUNC, STOCK_CTR};
use tests::image::BUSYBOX;
use tests::{ready, wait_for};

/// The pid of a running task.
fn pid(ctr: &Ctr, id: &str) -> Option<i32> {
    let list = ctr.ok(&["tasks", "ls"]);
    let line = list.lines().find(|line| line.starts_with(&format!("{id} ")) && line.contains("RUNNING"))?;
    line.split_whitespace().nth(1)?.parse().ok()
}

#[test]
fn labels_keep_a_container_running() {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX]) {
        return;
    }
    let mut host = Host::gantry();
    let image = host.import();
    let ctr = host.stock_ctr();
    let log = host.folder().join("output");
    let uri = format!("containerd.io/restart.loguri=file://{}", log.display());
    let script = "echo up; sleep 1000";
    ctr.ok(&["run", "-d", "--label", &uri, image, "kept", "sh", "-c", script]);
    ctr.ok(&["containers", "label", "kept", "containerd.io/restart.status=running"]);
    let retried = ["run", "-d", "--label", "containerd.io/restart.policy=on-failure:1"];
    ctr.ok(&[&retried[..], &[image, "retried", "sh", "-c", "sleep 1000"]].concat());
    ctr.ok(&["containers", "label", "retried", "containerd.io/restart.status=running"]);

    let first = pid(&ctr, "kept").unwrap();
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    wait_for("the container to run again", || pid(&ctr, "kept").is_some_and(|pid| pid != first));
    assert!(ctr.ok(&["containers", "info", "kept"]).contains("\"containerd.io/restart.count\": \"1\""));
    wait_for("its output", || std::fs::read_to_string(&log).is_ok_and(|text| text == "up\n"));

    // Once, as its policy says, and not again.
    let first = pid(&ctr, "retried").unwrap();
    kill(Pid::from_raw(first), Signal::SIGKILL).unwrap();
    wait_for("the one retry", || pid(&ctr, "retried").is_some_and(|pid| pid != first));
    kill(Pid::from_raw(pid(&ctr, "retried").unwrap()), Signal::SIGKILL).unwrap();
    wait_for("it to stay stopped", || ctr.ok(&["tasks", "ls"]).contains("STOPPED"));

    // It ends while there is no engine.
    let second = pid(&ctr, "kept").unwrap();
    host.kill();
    kill(Pid::from_raw(second), Signal::SIGKILL).unwrap();
    host.start();
    wait_for("the container to run once more", || pid(&ctr, "kept").is_some_and(|pid| pid != second));
    assert!(pid(&ctr, "retried").is_none());

    ctr.ok(&["containers", "label", "kept", "containerd.io/restart.status=stopped"]);
    wait_for("the container to be ended", || !ctr.ok(&["tasks", "ls", "-q"]).contains("kept"));
    ctr.run(&["tasks", "rm", "retried"]);
    ctr.ok(&["containers", "rm", "kept", "retried"]);
    host.assert_nothing_left();
}
