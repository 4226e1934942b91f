//! Shims and engines of different makers: ours under Debian's containerd, Debian's under gantryd.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use tests::host::{CONTAINERD, Host, RUNC, STOCK_CTR, STOCK_SHIM};
use tests::image::BUSYBOX;
use tests::terminal::Terminal;
use tests::{binary, left, ready, wait_for};

const PROGRAMS: [&str; 5] = [CONTAINERD, STOCK_CTR, STOCK_SHIM, RUNC, BUSYBOX];

#[test]
fn our_shim_under_stock_containerd() {
    if ready(&PROGRAMS) {
        let mut host = Host::containerd_with_our_shim();
        let shim = binary("containerd-shim-runc-v2");
        life(&mut host, "io.containerd.runc.v2", shim.to_str().unwrap());
    }
}

#[test]
fn stock_shim_under_gantryd() {
    if ready(&PROGRAMS) {
        life(&mut Host::gantry(), STOCK_SHIM, STOCK_SHIM);
    }
}

#[test]
fn our_shim_under_gantryd() {
    if ready(&PROGRAMS) {
        let shim = binary("containerd-shim-runc-v2");
        life(&mut Host::gantry(), "io.containerd.runc.v2", shim.to_str().unwrap());
    }
}

/// What a shim has to do under an engine, a restart of the engine included.
fn life(host: &mut Host, runtime: &str, program: &str) {
    let ctr = host.stock_ctr();
    let image = host.import();
    let run = |more: &[&str]| {
        let mut arguments = vec!["run", "--runtime", runtime];
        arguments.extend_from_slice(more);
        ctr.run(&arguments)
    };
    let ended = run(&["--rm", image, "c0", "sh", "-c", "echo out; echo err >&2; exit 5"]);
    assert_eq!(
        (ended.code, ended.stdout.as_str(), ended.stderr.as_str()),
        (5, "out\n", "err\n"),
        "{ended:?}"
    );
    let mut terminal = Terminal::start(
        &ctr.command(&["run", "--runtime", runtime, "--rm", "-t", image, "tty", "sh"]),
        24,
        80,
    );
    terminal.expect("# ");
    terminal.expect_size("24 80");
    terminal.send("exit 6\n");
    assert_eq!(terminal.wait(), 6);

    let ended = run(&["-d", image, "c1", "sh", "-c", "trap 'exit 4' TERM; while true; do sleep 0.1; done"]);
    assert_eq!(ended.code, 0, "{ended:?}");
    let shims = |id: &str| -> Vec<i32> {
        let wanted = format!("-id {id} ");
        let all = left::processes(host_folder(&ctr));
        all.into_iter()
            .filter(|(_, command)| format!("{command} ").contains(&wanted))
            .map(|(pid, _)| pid)
            .collect()
    };
    let running = shims("c1");
    assert_eq!(running.len(), 1, "{:?}", left::processes(host.folder()));
    let exe = std::fs::read_link(format!("/proc/{}/exe", running[0])).unwrap();
    assert_eq!(
        exe.canonicalize().unwrap(),
        std::path::Path::new(program).canonicalize().unwrap(),
        "the shim meant"
    );

    assert_eq!(ctr.run(&["tasks", "exec", "--exec-id", "e1", "c1", "sh", "-c", "exit 8"]).code, 8);
    host.kill();
    assert_eq!(shims("c1"), running, "the shim outlives the engine");
    host.start();
    let list = ctr.ok(&["tasks", "ls"]);
    assert!(list.lines().any(|line| line.starts_with("c1 ") && line.contains("RUNNING")), "{list}");
    assert_eq!(ctr.run(&["tasks", "exec", "--exec-id", "e2", "c1", "sh", "-c", "exit 9"]).code, 9);
    ctr.ok(&["tasks", "kill", "-s", "TERM", "c1"]);
    wait_for("the task to stop", || ctr.ok(&["tasks", "ls"]).contains("STOPPED"));
    ctr.ok(&["tasks", "rm", "c1"]);
    ctr.ok(&["containers", "rm", "c1"]);
    host.assert_nothing_left();
}

/// The folder of the engine that this client talks to.
fn host_folder(ctr: &tests::client::Ctr) -> &std::path::Path {
    ctr.address().parent().unwrap()
}
