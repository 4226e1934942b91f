//! Debian's `ctr` 1.6, unchanged, against gantryd. The same tests run against Debian's containerd, which shows that they
//! ask for what containerd does.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::io::BufRead as _;

use tests::host::{CONTAINERD, Host, Kind, RUNC, STOCK_CTR};
use tests::image::{BUSYBOX, NAME};
use tests::terminal::Terminal;
use tests::{ready, wait_for};

macro_rules! on_both {
    ($($test:ident),* $(,)?) => {
        mod gantry { $(#[test] fn $test() { super::run(super::Kind::Gantry, super::$test); })* }
        mod containerd { $(#[test] fn $test() { super::run(super::Kind::Containerd, super::$test); })* }
    };
}

on_both!(
    version_and_plugins,
    images_come_and_go,
    a_container_runs_and_is_gone,
    exit_codes_arrive,
    a_terminal,
    a_detached_container_is_managed,
    events_are_seen,
    snapshots_are_managed,
    content_is_managed,
    leases_and_namespaces,
    layers_are_unpacked_right,
    resources_and_metrics,
);

fn run(kind: Kind, test: fn(&Host)) {
    if ready(&[CONTAINERD, STOCK_CTR, RUNC, BUSYBOX]) {
        // Much of what these tests make is held by nothing.
        test(&Host::started(kind));
    }
}

fn version_and_plugins(host: &Host) {
    let ctr = host.stock_ctr();
    let version = ctr.ok(&["version"]);
    assert!(
        version.contains("Client:") && version.contains("Server:") && version.contains("UUID:"),
        "{version}"
    );
    let plugins = ctr.ok(&["plugins", "ls"]);
    for (kind, id) in [
        ("io.containerd.content.v1", "content"),
        ("io.containerd.snapshotter.v1", "overlayfs"),
        ("io.containerd.snapshotter.v1", "native"),
        ("io.containerd.grpc.v1", "tasks"),
    ] {
        let line = plugins.lines().find(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words.first() == Some(&kind) && words.get(1) == Some(&id)
        });
        assert!(line.is_some_and(|line| line.trim_end().ends_with("ok")), "{kind} {id}:\n{plugins}");
    }
    assert!(ctr.ok(&["plugins", "ls", "-d", "id==overlayfs"]).contains("overlayfs"));
}

fn images_come_and_go(host: &Host) {
    let ctr = host.stock_ctr();
    host.import();
    assert_eq!(ctr.ok(&["images", "ls", "-q"]).trim(), NAME);
    let list = ctr.ok(&["images", "ls"]);
    assert!(list.contains("application/vnd.oci.image.manifest.v1+json") && list.contains("linux/"), "{list}");
    let check = ctr.ok(&["images", "check"]);
    assert!(check.contains("complete (3/3)") && check.contains("true"), "{check}");
    ctr.ok(&["images", "tag", NAME, "example.org/other:1"]);
    ctr.ok(&["images", "label", NAME, "a=b"]);
    assert!(ctr.ok(&["images", "ls", "name==example.org/other:1"]).contains("example.org/other:1"));
    assert!(ctr.ok(&["images", "ls", "-q", "labels.a==b"]).contains(NAME));
    assert_eq!(ctr.ok(&["images", "ls", "-q", "labels.a==c"]).trim(), "");
    assert!(ctr.fails(&["images", "tag", NAME, "example.org/other:1"]).contains("exists"));
    let exported = host.folder().join("exported.tar");
    ctr.ok(&["images", "export", exported.to_str().unwrap(), NAME]);
    ctr.ok(&["images", "rm", NAME, "example.org/other:1"]);
    assert_eq!(ctr.ok(&["images", "ls", "-q"]).trim(), "");
    ctr.ok(&["images", "import", exported.to_str().unwrap()]);
    assert_eq!(ctr.ok(&["images", "ls", "-q"]).trim(), NAME);
    assert!(ctr.fails(&["images", "import", "/dev/null"]).contains("ctr:"));
}

fn a_container_runs_and_is_gone(host: &Host) {
    let ctr = host.stock_ctr();
    let image = host.import();
    let said = ctr.ok(&[
        "run",
        "--rm",
        image,
        "c1",
        "sh",
        "-c",
        "echo out; echo $FROM_IMAGE; id -u; cat /proc/self/cgroup",
    ]);
    assert!(said.starts_with("out\nyes\n0\n"), "{said}");
    let ended = ctr.run(&[
        "run",
        "--rm",
        "--env",
        "A=b c",
        "--cwd",
        "/tmp",
        image,
        "c2",
        "sh",
        "-c",
        "echo $A; pwd; echo bad >&2",
    ]);
    assert_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (0, "b c\n/tmp\n", "bad\n"));
    // Not `cat`: Debian's ctr may close the input before the process has begun, and containerd's shim then loses that.
    let said = ctr.with_input(&["run", "--rm", image, "c3", "head", "-c", "5"], b"typed");
    assert_eq!(said.stdout, "typed");
    let said =
        ctr.ok(&["run", "--rm", "--read-only", image, "c4", "sh", "-c", "touch /x 2>&1 || echo refused"]);
    assert!(said.contains("refused"), "{said}");
    let said = ctr.ok(&["run", "--rm", "--net-host", image, "c5", "readlink", "/proc/self/ns/net"]);
    assert_eq!(said.trim(), std::fs::read_link("/proc/self/ns/net").unwrap().to_str().unwrap());
    let said = ctr.ok(&[
        "run",
        "--rm",
        "--mount",
        "type=bind,src=/etc,dst=/mnt,options=rbind:ro",
        image,
        "c6",
        "cat",
        "/mnt/hostname",
    ]);
    assert_eq!(said, std::fs::read_to_string("/etc/hostname").unwrap());
    assert_eq!(ctr.ok(&["containers", "ls", "-q"]).trim(), "");
    assert_eq!(ctr.ok(&["tasks", "ls", "-q"]).trim(), "");
    // Of the snapshots, the image's two layers stay.
    assert_eq!(ctr.ok(&["snapshots", "ls"]).lines().count(), 3);
    host.assert_nothing_left();
}

fn exit_codes_arrive(host: &Host) {
    let ctr = host.stock_ctr();
    let image = host.import();
    for code in [0, 1, 42, 255] {
        let ended = ctr.run(&["run", "--rm", image, "c", "sh", "-c", &format!("exit {code}")]);
        assert_eq!(ended.code, code, "{ended:?}");
    }
    assert_eq!(ctr.run(&["run", "--rm", image, "c", "sh", "-c", "sh -c 'kill -9 $$'; exit $?"]).code, 137);
    let refused = ctr.fails(&["run", "--rm", image, "c", "/no/such/program"]);
    assert!(refused.contains("no such file or directory"), "{refused}");
    assert_eq!(ctr.ok(&["containers", "ls", "-q"]).trim(), "");
    host.assert_nothing_left();
}

fn a_terminal(host: &Host) {
    let ctr = host.stock_ctr();
    let image = host.import();
    let mut terminal = Terminal::start(&ctr.command(&["run", "--rm", "-t", image, "tty", "sh"]), 31, 97);
    terminal.expect("# ");
    terminal.expect_size("31 97");
    terminal.send("tty; echo mar''ker\n");
    terminal.expect("marker");
    assert!(terminal.shown().contains("/dev/pts/"), "{}", terminal.shown());
    let sizes = |terminal: &mut Terminal| {
        // Again and again, since this client does not hear of a change right after the start: it asks for the size first,
        // and for changes then.
        terminal.resize(40, 119);
        terminal.resize(40, 120);
        terminal.send("stty size\n");
        terminal.shown().contains("40 120")
    };
    wait_for("the new size of the window", || sizes(&mut terminal));
    terminal.send("exit 7\n");
    assert_eq!(terminal.wait(), 7);
    host.assert_nothing_left();
}

fn a_detached_container_is_managed(host: &Host) {
    let ctr = host.stock_ctr();
    let image = host.import();
    ctr.ok(&[
        "run",
        "-d",
        "--label",
        "a=b",
        image,
        "c1",
        "sh",
        "-c",
        "trap 'exit 3' TERM; while true; do sleep 0.1; done",
    ]);
    let list = ctr.ok(&["tasks", "ls"]);
    assert!(list.lines().any(|line| line.starts_with("c1 ") && line.contains("RUNNING")), "{list}");
    assert!(ctr.ok(&["containers", "ls"]).contains(image));
    assert_eq!(ctr.ok(&["containers", "ls", "-q", "labels.a==b"]).trim(), "c1");
    let info = ctr.ok(&["containers", "info", "c1"]);
    assert!(info.contains("\"ID\": \"c1\"") && info.contains("io.containerd.runc.v2"), "{info}");
    ctr.ok(&["containers", "label", "c1", "x=y"]);

    // Execs, with their exit codes, input and errors.
    assert_eq!(
        ctr.ok(&["tasks", "exec", "--exec-id", "e1", "c1", "sh", "-c", "echo $$; hostname"]).lines().count(),
        2
    );
    assert_eq!(ctr.run(&["tasks", "exec", "--exec-id", "e2", "c1", "sh", "-c", "exit 9"]).code, 9);
    let ended = ctr.with_input(&["tasks", "exec", "--exec-id", "e3", "c1", "head", "-c", "7"], b"through");
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "through"));
    assert!(ctr.fails(&["tasks", "exec", "--exec-id", "e4", "c1", "/nothing"]).contains("no such file"));
    let ps = ctr.ok(&["tasks", "ps", "c1"]);
    assert!(ps.lines().count() >= 2, "{ps}");

    ctr.ok(&["tasks", "pause", "c1"]);
    assert!(ctr.ok(&["tasks", "ls"]).contains("PAUSED"));
    ctr.ok(&["tasks", "resume", "c1"]);
    assert!(ctr.ok(&["tasks", "ls"]).contains("RUNNING"));

    assert!(ctr.fails(&["containers", "rm", "c1"]).contains("c1"), "a running container is not removed");
    ctr.ok(&["tasks", "kill", "-s", "SIGTERM", "c1"]);
    wait_for("the task to stop", || ctr.ok(&["tasks", "ls"]).contains("STOPPED"));
    ctr.ok(&["tasks", "rm", "c1"]);
    // The container stays, and can be started again.
    ctr.ok(&["tasks", "start", "-d", "c1"]);
    ctr.ok(&["tasks", "kill", "-s", "KILL", "--all", "c1"]);
    wait_for("the task to stop", || ctr.ok(&["tasks", "ls"]).contains("STOPPED"));
    ctr.run(&["tasks", "rm", "c1"]);
    ctr.ok(&["containers", "rm", "c1"]);
    assert_eq!(ctr.ok(&["containers", "ls", "-q"]).trim(), "");
    assert!(
        ctr.fails(&["tasks", "kill", "c1"]).contains("not found")
            || ctr.fails(&["tasks", "kill", "c1"]).contains("c1")
    );
    host.assert_nothing_left();
}

fn events_are_seen(host: &Host) {
    let ctr = host.stock_ctr();
    let image = host.import();
    let mut events = ctr.spawn(&["events"]);
    let output = std::io::BufReader::new(events.stdout.take().unwrap());
    // Of the last run at the least, everything, in order.
    let mine = std::thread::spawn(move || {
        let mut mine = Vec::new();
        for line in output.lines().map(Result::unwrap).filter(|line| line.contains("\"c4\"")) {
            let last = line.contains(" /containers/delete ");
            mine.push(line);
            if last {
                break;
            }
        }
        mine
    });
    for number in 0..5 {
        ctr.ok(&["run", "--rm", image, &format!("c{number}"), "true"]);
    }
    wait_for("the last event", || mine.is_finished());
    events.kill().unwrap();
    events.wait().unwrap();
    let mine = mine.join().unwrap();
    let mut topics =
        mine.iter().filter_map(|line| line.split_whitespace().find(|word| word.starts_with('/')));
    for topic in [
        "/snapshot/prepare",
        "/containers/create",
        "/tasks/create",
        "/tasks/start",
        "/tasks/exit",
        "/tasks/delete",
        "/containers/delete",
    ] {
        assert!(topics.any(|seen| seen == topic), "{topic} in order:\n{}", mine.join("\n"));
    }
}

fn snapshots_are_managed(host: &Host) {
    let ctr = host.stock_ctr();
    host.import();
    let list = ctr.ok(&["snapshots", "ls"]);
    let top = list
        .lines()
        .skip(1)
        .map(|line| line.split_whitespace().collect::<Vec<_>>())
        .find(|words| words.len() == 3);
    let top = top.unwrap_or_else(|| panic!("a layer with a parent:\n{list}"))[0].to_owned();
    let mounts = ctr.ok(&["snapshots", "prepare", "--mounts", "work", &top]);
    assert!(mounts.contains("lowerdir=") || mounts.is_empty(), "{mounts}");
    assert!(ctr.ok(&["snapshots", "mounts", "/mnt", "work"]).contains("mount -t overlay overlay /mnt"));
    assert!(ctr.fails(&["snapshots", "prepare", "work", &top]).contains("exists"));
    assert!(ctr.ok(&["snapshots", "info", "work"]).contains("\"Kind\": \"Active\""));
    ctr.ok(&["snapshots", "label", "work", "a=b"]);
    assert!(ctr.ok(&["snapshots", "info", "work"]).contains("\"a\": \"b\""));
    ctr.ok(&["snapshots", "commit", "layer", "work"]);
    ctr.ok(&["snapshots", "view", "look", "layer"]);
    assert!(ctr.ok(&["snapshots", "usage"]).contains("layer"));
    assert!(ctr.ok(&["snapshots", "tree"]).contains("look"));
    let refused = ctr.fails(&["snapshots", "rm", "layer"]);
    assert!(refused.contains("cannot"), "{refused}");
    ctr.ok(&["snapshots", "rm", "look"]);
    ctr.ok(&["snapshots", "rm", "layer"]);
    assert!(ctr.fails(&["snapshots", "rm", "layer"]).contains("not"));
    assert!(ctr.fails(&["snapshots", "--snapshotter", "zfs", "prepare", "x"]).contains("zfs"));
}

fn content_is_managed(host: &Host) {
    let ctr = host.stock_ctr();
    host.import();
    host.collect();
    // Two layers, a config, a manifest; not the index, which nothing holds.
    let digests = ctr.ok(&["content", "ls", "-q"]);
    assert_eq!(digests.lines().count(), 4, "{digests}");
    for digest in digests.lines() {
        let blob = ctr.command(&["content", "get", digest]).output().unwrap();
        assert_eq!(oci::Digest::sha256_of(&blob.stdout).to_string(), digest);
    }
    let body = "some bytes";
    let digest = oci::Digest::sha256_of(body.as_bytes()).to_string();
    let ended =
        ctr.with_input(&["content", "ingest", "--expected-digest", &digest, "ref-1"], body.as_bytes());
    assert_eq!(ended.code, 0, "{ended:?}");
    assert_eq!(ctr.ok(&["content", "get", &digest]), body);
    let wrong = ctr.with_input(
        &["content", "ingest", "--expected-digest", &digest.replace(&digest[7..9], "00"), "ref-2"],
        b"other",
    );
    assert_ne!(wrong.code, 0);
    assert!(wrong.stderr.contains("unexpected") || wrong.stderr.contains("expected"), "{wrong:?}");
    ctr.ok(&["content", "label", &digest, "k=v"]);
    assert!(ctr.ok(&["content", "ls", "labels.k==v"]).contains(&digest));
    ctr.ok(&["content", "rm", &digest]);
    assert!(ctr.fails(&["content", "get", &digest]).contains("not"));
    ctr.ok(&["content", "active"]);
}

fn leases_and_namespaces(host: &Host) {
    let ctr = host.stock_ctr();
    ctr.ok(&["leases", "create", "--id", "l1", "a=b"]);
    assert!(ctr.ok(&["leases", "ls"]).contains("l1"));
    assert!(ctr.fails(&["leases", "create", "--id", "l1"]).contains("exists"));
    ctr.ok(&["leases", "rm", "l1"]);
    assert!(!ctr.ok(&["leases", "ls"]).contains("l1"));

    ctr.ok(&["namespaces", "create", "other", "k=v"]);
    assert!(ctr.fails(&["namespaces", "create", "other"]).contains("exists"));
    assert!(ctr.fails(&["namespaces", "create", "not/valid"]).contains("not/valid"));
    let list = ctr.ok(&["namespaces", "ls"]);
    assert!(list.lines().any(|line| line.starts_with("other") && line.contains("k=v")), "{list}");
    ctr.ok(&["namespaces", "label", "other", "k="]);
    assert!(!ctr.ok(&["namespaces", "ls"]).contains("k=v"));
    host.import();
    let refused = ctr.fails(&["namespaces", "rm", &host.namespace]);
    assert!(
        refused.contains("images") && refused.contains("blobs") && refused.contains("snapshots"),
        "{refused}"
    );
    ctr.ok(&["namespaces", "rm", "other"]);
    assert!(!ctr.ok(&["namespaces", "ls", "-q"]).lines().any(|line| line == "other"));
}

fn layers_are_unpacked_right(host: &Host) {
    let ctr = host.stock_ctr();
    let image = host.import();
    let said = ctr.ok(&[
        "run", "--rm", image, "c", "sh", "-c",
        "ls /etc | sort; cat /etc/replaced-above; ls -a /var/opaque | sort; stat -c '%h %a %Y' /var/first /var/second; \
         stat -c %a /tmp; readlink /bin/sh",
    ]);
    for line in ["group", "passwd", "replaced-above", "new", "shown", "2 640 1600000000", "1777", "busybox"] {
        assert!(said.lines().any(|said| said == line), "{line:?} in:\n{said}");
    }
    assert_eq!(said.lines().filter(|line| *line == "2 640 1600000000").count(), 2, "{said}");
    for line in ["removed-above", "hidden"] {
        assert!(!said.lines().any(|said| said == line), "{line:?} in:\n{said}");
    }
    let key = ctr.ok(&["run", "-d", image, "held", "sleep", "600"]);
    assert_eq!(key, "");
    let root = host.state().join("io.containerd.runtime.v2.task").join(&host.namespace).join("held/rootfs");
    let mut value = [0; 16];
    let length = rustix::fs::getxattr(root.join("var/attribute"), "user.gantry", &mut value[..]).unwrap();
    assert_eq!(&value[..length], b"value");
    ctr.ok(&["tasks", "kill", "-s", "KILL", "held"]);
    wait_for("the task to stop", || ctr.ok(&["tasks", "ls"]).contains("STOPPED"));
    ctr.run(&["tasks", "rm", "held"]);
    ctr.ok(&["containers", "rm", "held"]);
}

fn resources_and_metrics(host: &Host) {
    let ctr = host.stock_ctr();
    let image = host.import();
    ctr.ok(&["run", "-d", "--memory-limit", "50000000", image, "c", "sleep", "600"]);
    let metrics = ctr.ok(&["tasks", "metrics", "c"]);
    assert!(metrics.contains("memory.usage") || metrics.contains("memory"), "{metrics}");
    let limits: Vec<String> = ["memory/memory.limit_in_bytes", "memory.max"]
        .iter()
        .filter_map(|file| {
            let (hierarchy, name) = file.split_once('/').unwrap_or(("", file));
            let path = std::path::Path::new("/sys/fs/cgroup")
                .join(hierarchy)
                .join(&host.namespace)
                .join("c")
                .join(name);
            std::fs::read_to_string(path).ok()
        })
        .collect();
    let limit: u64 = limits.first().expect("a memory cgroup").trim().parse().unwrap();
    assert!(limit <= 50_000_000 && limit > 49_000_000, "{limit}");
    ctr.ok(&["tasks", "kill", "-s", "KILL", "c"]);
    wait_for("the task to stop", || ctr.ok(&["tasks", "ls"]).contains("STOPPED"));
    ctr.run(&["tasks", "rm", "c"]);
    ctr.ok(&["containers", "rm", "c"]);
    host.assert_nothing_left();
}
