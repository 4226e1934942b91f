//! Our own `ctr` against gantryd: commands, exit codes, signals, terminals, forms of output.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use serde_json::Value;
use tests::client::finish;
use tests::host::{Host, RUNC, STOCK_CTR};
use tests::image::{self, BUSYBOX, NAME};
use tests::terminal::Terminal;
use tests::{left, ready, wait_for};

fn gantry() -> Option<Host> {
    ready(&[STOCK_CTR, RUNC, BUSYBOX]).then(Host::gantry)
}

/// An engine with the image, imported by our ctr.
fn with_image() -> Option<Host> {
    let host = gantry()?;
    let archive = host.folder().join("image.tar");
    image::busybox().write(&archive).unwrap();
    let said = host.ctr().run(&["images", "import", archive.to_str().unwrap()]);
    assert_eq!(said.code, 0, "{said:?}");
    assert!(format!("{}{}", said.stdout, said.stderr).contains(NAME), "{said:?}");
    Some(host)
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

#[test]
fn help_version_and_mistakes() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    for group in [
        "run",
        "images",
        "containers",
        "tasks",
        "snapshots",
        "content",
        "events",
        "gc",
        "namespaces",
        "leases",
        "plugins",
        "sandboxes",
        "shim",
        "oci",
        "install",
        "deprecations",
    ] {
        assert!(ctr.ok(&[group, "--help"]).contains("Usage:"), "{group}");
    }
    let version = ctr.ok(&["version"]);
    assert!(version.contains("Client") && version.contains("Server"), "{version}");
    assert!(ctr.ok(&["info"]).contains("uuid") || ctr.ok(&["info"]).contains("UUID"));
    let plugins = json(&ctr.ok(&["plugins", "ls", "--format", "json"]));
    assert!(plugins.as_array().unwrap().len() > 10, "{plugins}");
    assert_ne!(ctr.run(&["no-such-command"]).code, 0);
    assert_ne!(ctr.run(&["run"]).code, 0);
    let nobody = std::process::Command::new(tests::binary("ctr"))
        .args(["--address", "/nonexistent.sock", "version"])
        .output()
        .unwrap();
    let error = String::from_utf8(nobody.stderr).unwrap();
    assert!(
        !nobody.status.success() && error.contains("/nonexistent.sock") && error.contains("gantryd"),
        "{error}"
    );
    assert!(error.starts_with("ctr: "), "{error}");
}

#[test]
fn images_round_trip() {
    let Some(host) = with_image() else { return };
    let ctr = host.ctr();
    assert_eq!(ctr.ok(&["images", "ls", "-q"]).trim(), NAME);
    let list = json(&ctr.ok(&["images", "ls", "--format", "json"]));
    assert_eq!(list.as_array().unwrap().len(), 1);
    let exported = host.folder().join("out.tar");
    ctr.ok(&["images", "export", exported.to_str().unwrap(), NAME]);
    let again = host.folder().join("again.tar");
    ctr.ok(&["images", "export", again.to_str().unwrap(), NAME]);
    assert_eq!(
        std::fs::read(&exported).unwrap(),
        std::fs::read(&again).unwrap(),
        "an export is the same each time"
    );
    ctr.ok(&["images", "rm", NAME]);
    assert!(
        ctr.run(&["images", "rm", NAME]).stderr.contains(NAME),
        "containerd's ctr tells it, and does not fail"
    );
    // What we export, Debian's ctr imports, and the other way round; from stdin and compressed, too.
    host.stock_ctr().ok(&["images", "import", exported.to_str().unwrap()]);
    host.stock_ctr().ok(&["images", "export", again.to_str().unwrap(), NAME]);
    ctr.ok(&["images", "rm", NAME]);
    ctr.ok(&["images", "import", again.to_str().unwrap()]);
    ctr.ok(&["images", "rm", NAME]);
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    std::io::Write::write_all(&mut gzip, &std::fs::read(&exported).unwrap()).unwrap();
    let ended = ctr.with_input(&["images", "import", "-"], &gzip.finish().unwrap());
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(ctr.ok(&["images", "ls", "-q"]).trim(), NAME);
    assert_eq!(ctr.ok(&["run", "--rm", NAME, "c", "echo", "runs"]), "runs\n");
    host.assert_nothing_left();
}

#[test]
fn run_passes_everything_on() {
    let Some(host) = with_image() else { return };
    let ctr = host.ctr();
    let run = |flags: &[&str], script: &str| {
        let mut arguments = vec!["run", "--rm"];
        arguments.extend_from_slice(flags);
        arguments.extend_from_slice(&[NAME, "c", "sh", "-c", script]);
        ctr.run(&arguments)
    };
    for code in [0, 3, 255] {
        assert_eq!(run(&[], &format!("exit {code}")).code, code);
    }
    let said = |flags: &[&str], script: &str| {
        let ended = run(flags, script);
        assert_eq!(ended.code, 0, "{flags:?}: {ended:?}");
        ended.stdout.trim().to_owned()
    };
    assert_eq!(said(&["--env", "A=b c"], "echo \"$A-$FROM_IMAGE\""), "b c-yes");
    assert_eq!(said(&["--cwd", "/tmp"], "pwd"), "/tmp");
    assert_eq!(said(&["--hostname", "named"], "hostname"), "named");
    assert_eq!(said(&["--user", "1000:1001"], "id -u; id -g"), "1000\n1001");
    assert_eq!(said(&["--user", "app"], "id -u; id -g; id -G"), "1000\n1001\n1001 2000");
    assert_eq!(said(&["--read-only"], "touch /x 2>/dev/null || echo refused"), "refused");
    let own = std::fs::read_link("/proc/self/ns/net").unwrap();
    assert_eq!(said(&["--net-host"], "readlink /proc/self/ns/net"), own.to_str().unwrap());
    assert_ne!(said(&[], "readlink /proc/self/ns/net"), own.to_str().unwrap());
    let caps = "grep CapEff /proc/self/status | cut -f 2";
    let number = |text: String| u64::from_str_radix(&text, 16).unwrap();
    let (plain, added) = (number(said(&[], caps)), number(said(&["--cap-add", "CAP_SYS_ADMIN"], caps)));
    assert_eq!(added ^ plain, 1 << 21);
    let dropped = number(said(&["--cap-drop", "CAP_CHOWN"], caps));
    assert_eq!(dropped ^ plain, 1);
    assert!(number(said(&["--privileged"], caps)).count_ones() > plain.count_ones());
    let mount = "type=bind,src=/etc,dst=/mnt,options=rbind:ro";
    assert_eq!(
        said(&["--mount", mount], "cat /mnt/hostname"),
        std::fs::read_to_string("/etc/hostname").unwrap().trim()
    );
    ctr.ok(&["run", "-d", "--memory-limit", "67108864", NAME, "limited", "sleep", "1000"]);
    let limits: Vec<String> = left::cgroups(&host.namespace)
        .iter()
        .flat_map(|cgroup| [cgroup.join("memory.limit_in_bytes"), cgroup.join("memory.max")])
        .filter_map(|file| std::fs::read_to_string(file).ok())
        .collect();
    assert_eq!(limits, ["67108864\n"]);
    ctr.ok(&["tasks", "rm", "-f", "limited"]);
    ctr.ok(&["containers", "rm", "limited"]);
    let native = said(&["--snapshotter", "native"], "cat /etc/replaced-above");
    assert_eq!(native, "new");
    assert_eq!(ctr.with_input(&["run", "--rm", NAME, "c", "cat"], b"to the end").stdout, "to the end");
    assert!(ctr.fails(&["run", "--rm", "--user", "nobody-here", NAME, "c", "true"]).contains("nobody-here"));
    assert_eq!(ctr.ok(&["containers", "ls", "-q"]), "");
    host.assert_nothing_left();
}

/// The lines of a time line that are of a process: start, length and what it did, without indentation.
fn of_process<'a>(text: &'a str, process: &str) -> Vec<(f64, f64, &'a str)> {
    let line = |line: &'a str| {
        let mut words = line.split_whitespace();
        let (start, length) = (words.next()?.parse().ok()?, words.next()?.parse().ok()?);
        let what = line.split_once(process)?.1.split_once('|')?.0.trim();
        (words.next()? == process).then_some((start, length, what))
    };
    text.lines().filter_map(line).collect()
}

#[test]
fn a_run_shows_where_its_time_went() {
    let Some(host) = with_image() else { return };
    let ctr = host.ctr();
    let ended = ctr.run(&["run", "--rm", "--trace", NAME, "traced", "sh", "-c", "echo out; exit 3"]);
    assert_eq!((ended.code, ended.stdout.as_str()), (3, "out\n"), "{ended:?}");
    let text = &ended.stderr;
    let named = |process: &str| -> Vec<&str> {
        of_process(text, process).into_iter().map(|(_, _, what)| what).collect()
    };
    assert_eq!(named("runc"), ["create"], "the shim does the rest itself: {text}");
    for (process, what) in [
        ("ctr", "Tasks/Create"),
        ("ctr", "Tasks/Wait"),
        ("engine", "Tasks/Create"),
        ("engine", "start the shim"),
        ("engine", "commit"),
        ("shim", "start"),
        ("shim", "begin"),
        ("shim", "Create"),
        ("shim", "mount"),
        ("shim", "Start"),
        ("shim", "let the program run"),
        ("shim", "Delete"),
        ("shim", "forget the container"),
        ("container", "process, until its end"),
    ] {
        assert!(named(process).contains(&what), "{process} {what}: {text}");
    }
    // One clock: what a runtime does lies within what its shim does, and that within what the engine does.
    let find = |process: &str, name: &str| {
        let (start, length, _) =
            of_process(text, process).into_iter().find(|(_, _, what)| *what == name).unwrap();
        (start, start + length)
    };
    let ways = [find("ctr", "Tasks/Create"), find("engine", "Tasks/Create"), find("shim", "Create")];
    let ways = ways.into_iter().chain([find("runc", "create")]).collect::<Vec<_>>();
    assert!(ways.is_sorted_by(|outer, inner| outer.0 <= inner.0 && outer.1 >= inner.1), "{ways:?}: {text}");
    assert!(text.contains("The program runs after ") && text.contains("The floor"), "{text}");
    // Without the flag nobody says anything; and nothing is left of the one that did.
    assert_eq!(ctr.run(&["run", "--rm", NAME, "quiet", "true"]).stderr, "");
    assert_eq!(std::fs::read_dir(host.state().join("traces")).unwrap().count(), 0);
    host.assert_nothing_left();
}

#[test]
fn beside_containerd_a_trace_has_the_spans_of_ctr_alone() {
    if !tests::ready(&[tests::host::CONTAINERD, STOCK_CTR, RUNC, BUSYBOX]) {
        return;
    }
    let host = Host::containerd();
    host.import();
    let ended = host.ctr().run(&["run", "--rm", "--trace", NAME, "traced", "true"]);
    assert_eq!(ended.code, 0, "{ended:?}");
    assert!(ended.stderr.contains("The engine knows no traces"), "{}", ended.stderr);
    assert!(!of_process(&ended.stderr, "ctr").is_empty() && of_process(&ended.stderr, "engine").is_empty());
    host.assert_nothing_left();
}

#[test]
fn signals_and_terminals_pass_through() {
    let Some(host) = with_image() else { return };
    let ctr = host.ctr();
    let script = "trap 'exit 33' TERM; trap 'exit 44' INT; echo ready; while true; do sleep 0.05; done";
    for (signal, code) in [(Signal::SIGTERM, 33), (Signal::SIGINT, 44)] {
        let mut child = ctr.spawn(&["run", "--rm", NAME, "c", "sh", "-c", script]);
        let mut first = [0; 6];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut first).unwrap();
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        assert_eq!(finish(child, "run").code, code, "{signal}");
    }
    let mut terminal = Terminal::start(&ctr.command(&["run", "--rm", "-t", NAME, "tty", "sh"]), 30, 90);
    terminal.expect("# ");
    terminal.expect_size("30 90");
    terminal.send("tty\n");
    terminal.expect("/dev/pts/");
    terminal.resize(41, 123);
    terminal.expect_size("41 123");
    // Ctrl-C ends what runs in the container, not the client.
    terminal.send("sleep 1000\n");
    terminal.expect("sleep 1000");
    terminal.send("\u{3}");
    terminal.send("echo al''ive; exit 12\n");
    terminal.expect("alive");
    assert_eq!(terminal.wait(), 12);
    host.assert_nothing_left();
}

#[test]
fn a_task_is_managed() {
    let Some(host) = with_image() else { return };
    let ctr = host.ctr();
    ctr.ok(&[
        "run",
        "-d",
        "--label",
        "a=b",
        NAME,
        "c",
        "sh",
        "-c",
        "trap 'exit 3' TERM; while true; do sleep 0.05; done",
    ]);
    assert_eq!(ctr.ok(&["tasks", "ls", "-q"]).trim(), "c");
    let tasks = json(&ctr.ok(&["tasks", "ls", "--format", "json"]));
    assert_eq!(tasks.as_array().unwrap().len(), 1, "{tasks}");
    assert_eq!(ctr.ok(&["containers", "ls", "-q", "labels.a==b"]).trim(), "c");
    assert!(json(&ctr.ok(&["containers", "ls", "--format", "json"])).is_array());
    assert!(ctr.ok(&["containers", "info", "c"]).contains("io.containerd.runc.v2"));
    ctr.ok(&["containers", "label", "c", "x=y"]);
    assert_eq!(ctr.ok(&["containers", "ls", "-q", "labels.x==y"]).trim(), "c");
    assert_eq!(ctr.run(&["tasks", "exec", "--exec-id", "e1", "c", "sh", "-c", "exit 21"]).code, 21);
    assert_eq!(ctr.with_input(&["tasks", "exec", "--exec-id", "e2", "c", "cat"], b"x").stdout, "x");
    let mut terminal =
        Terminal::start(&ctr.command(&["tasks", "exec", "-t", "--exec-id", "e3", "c", "sh"]), 20, 70);
    terminal.expect("# ");
    terminal.expect_size("20 70");
    terminal.send("exit 5\n");
    assert_eq!(terminal.wait(), 5);
    assert!(ctr.ok(&["tasks", "ps", "c"]).lines().count() >= 2);
    assert!(ctr.ok(&["tasks", "metrics", "c"]).contains("memory"));
    assert!(json(&ctr.ok(&["tasks", "metrics", "--format", "json", "c"])).to_string().contains("emory"));
    ctr.ok(&["tasks", "pause", "c"]);
    assert!(ctr.ok(&["tasks", "ls"]).contains("PAUSED"));
    ctr.ok(&["tasks", "resume", "c"]);
    assert!(ctr.ok(&["tasks", "ls"]).contains("RUNNING"));
    assert!(ctr.fails(&["containers", "rm", "c"]).contains("c"));
    assert!(ctr.fails(&["tasks", "rm", "c"]).contains("c"), "a running task is not removed");
    ctr.ok(&["tasks", "kill", "c"]);
    wait_for("the task to stop", || ctr.ok(&["tasks", "ls"]).contains("STOPPED"));
    ctr.run(&["tasks", "rm", "c"]);
    ctr.ok(&["containers", "rm", "c"]);
    assert!(ctr.fails(&["containers", "info", "c"]).contains("\"c\""));
    host.assert_nothing_left();
}

#[test]
fn the_rest_of_the_tree() {
    let Some(host) = with_image() else { return };
    let ctr = host.ctr();
    let snapshots = ctr.ok(&["snapshots", "ls", "-q"]);
    assert_eq!(snapshots.lines().count(), 2, "{snapshots}");
    assert_eq!(json(&ctr.ok(&["snapshots", "ls", "--format", "json"])).as_array().unwrap().len(), 2);
    let top = snapshots.lines().last().unwrap();
    assert!(ctr.ok(&["snapshots", "info", top]).contains("Committed"));
    // What the import needed on its way alone must not go while we look.
    ctr.ok(&["gc"]);
    let digests = ctr.ok(&["content", "ls", "-q"]);
    for digest in digests.lines() {
        let blob = ctr.command(&["content", "get", digest]).output().unwrap();
        assert_eq!(oci::Digest::sha256_of(&blob.stdout).to_string(), digest);
    }
    assert!(json(&ctr.ok(&["content", "ls", "--format", "json"])).as_array().unwrap().len() >= 4);
    ctr.ok(&["namespaces", "create", "other", "k=v"]);
    assert!(ctr.ok(&["namespaces", "ls"]).contains("k=v"));
    assert!(ctr.ok(&["namespaces", "ls", "-q"]).lines().any(|line| line == "other"));
    ctr.ok(&["namespaces", "rm", "other"]);
    ctr.ok(&["leases", "create", "--id", "l1"]);
    assert!(ctr.ok(&["leases", "ls", "-q"]).contains("l1"));
    ctr.ok(&["leases", "rm", "l1"]);
    // Events, as they happen.
    let events = ctr.spawn(&["events"]);
    let pid = events.id();
    for number in 0..3 {
        ctr.ok(&["run", "--rm", NAME, &format!("c{number}"), "true"]);
    }
    kill(Pid::from_raw(pid as i32), Signal::SIGTERM).unwrap();
    let seen = finish(events, "events").stdout;
    assert!(seen.contains("/tasks/exit") && seen.contains("c2"), "{seen}");
    host.assert_nothing_left();
}
