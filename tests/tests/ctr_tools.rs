//! Our own ctr against gantryd: sandboxes, shims without the engine, installs, specs, profiles, checkpoints.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use proto::containerd::services::sandbox::v1::StoreCreateRequest;
use proto::containerd::services::sandbox::v1::store_client::StoreClient;
use proto::containerd::types::Sandbox;
use proto::containerd::types::sandbox::Runtime;
use serde_json::{Value, json};
use tar::EntryType;
use tests::client::{channel, in_namespace};
use tests::host::{Host, RUNC, STOCK_CTR, STOCK_SHIM};
use tests::image::{self, BUSYBOX, Layer, NAME};
use tests::{ready, wait_for};

fn gantry() -> Option<Host> {
    ready(&[STOCK_CTR, RUNC, BUSYBOX]).then(Host::gantry)
}

/// An engine with the image.
fn with_image() -> Option<Host> {
    let host = gantry()?;
    host.import();
    Some(host)
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

fn file(host: &Host, name: &str, text: &str) -> String {
    let path = host.folder().join(name);
    fs::write(&path, text).unwrap();
    path.to_str().unwrap().to_owned()
}

#[tokio::test]
async fn sandboxes_are_managed() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    let mut store = StoreClient::new(channel(&host.address()).await);
    for id in ["pod1", "pod2"] {
        let sandbox = Sandbox {
            sandbox_id: id.into(),
            runtime: Some(Runtime { name: "io.containerd.runc.v2".into(), options: None }),
            spec: Some(proto::any::wrap(proto::any::SPEC, *b"{\"hostname\":\"pod\"}")),
            labels: [("name".to_owned(), id.to_owned())].into(),
            ..Sandbox::default()
        };
        let request = StoreCreateRequest { sandbox: Some(sandbox) };
        store.create(in_namespace(&host.namespace, request)).await.unwrap();
    }
    let list = ctr.ok(&["sandboxes", "ls"]);
    let rows: Vec<Vec<&str>> = list.lines().map(|line| line.split_whitespace().collect()).collect();
    assert_eq!(rows[0], ["ID", "CREATED", "RUNTIME"]);
    assert_eq!((rows[1][0], rows[1][2], rows.len()), ("pod1", "io.containerd.runc.v2", 3));
    assert_eq!(ctr.ok(&["sandbox", "list", "-q", "--filters", "labels.name==pod2"]).trim(), "pod2");
    assert_eq!(json(&ctr.ok(&["sb", "ls", "--format", "json"])).as_array().unwrap().len(), 2);
    let info = json(&ctr.ok(&["sandboxes", "info", "pod1"]));
    assert_eq!((&info["ID"], &info["Spec"]["hostname"]), (&json!("pod1"), &json!("pod")));
    assert_eq!(info["Runtime"]["Name"], "io.containerd.runc.v2");
    assert!(ctr.fails(&["sandboxes", "info", "pod3"]).contains("pod3"));
    // A record that no controller knows of is removed; the first error decides, and the others go all the same.
    assert!(ctr.fails(&["sandboxes", "rm", "pod3", "pod1"]).contains("pod3"));
    assert_eq!(ctr.ok(&["sandboxes", "ls", "-q"]).trim(), "pod2");
    assert_eq!(ctr.ok(&["sandboxes", "rm", "--force", "pod2"]).trim(), "pod2");
    assert_eq!(ctr.ok(&["sandboxes", "ls", "-q"]), "");
    host.assert_nothing_left();
}

#[test]
fn a_sandbox_runs_until_it_is_removed() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    let spec = r#"{"ociVersion": "1.0.2", "hostname": "pod", "linux": {"namespaces": [{"type": "uts"}]}}"#;
    let spec = file(&host, "pod.json", spec);
    assert_eq!(ctr.ok(&["sandboxes", "run", &spec, "pod"]).trim(), "pod");
    assert!(ctr.fails(&["sandboxes", "run", &spec, "pod"]).contains("exists already"));
    assert_eq!(tests::left::mounts(&host.state()).len(), 1, "its one namespace");
    assert_eq!(ctr.ok(&["sandboxes", "rm", "pod"]).trim(), "pod");
    assert_eq!(ctr.ok(&["sandboxes", "ls", "-q"]), "");
    host.assert_nothing_left();
}

#[test]
fn a_sandbox_that_does_not_start_leaves_no_record() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    let spec = file(&host, "pod.json", "{\"ociVersion\": \"1.0.2\"}");
    let error = ctr.fails(&["sandboxes", "run", "--runtime", "io.containerd.no-such.v1", &spec, "pod"]);
    assert!(error.contains("sandbox pod"), "{error}");
    assert_eq!(ctr.ok(&["sandboxes", "ls", "-q"]), "");
    assert!(ctr.fails(&["sandboxes", "run", "/no/such/file", "pod"]).contains("/no/such/file"));
    let noise = file(&host, "noise", "[]");
    assert!(ctr.fails(&["sandboxes", "run", &noise, "pod"]).contains("not a runtime spec"));
    host.assert_nothing_left();
}

#[test]
fn the_default_spec_is_containerds() {
    let Some(host) = gantry() else { return };
    let (ctr, stock) = (host.ctr(), host.stock_ctr());
    let ours = json(&ctr.ok(&["oci", "spec"]));
    let mut theirs = json(&stock.ok(&["oci", "spec"]));
    // Debian's 1.6 has not got all that later ones mask.
    for path in ours["linux"]["maskedPaths"].as_array().unwrap() {
        let masked = theirs["linux"]["maskedPaths"].as_array_mut().unwrap();
        if !masked.contains(path) {
            masked.push(path.clone());
        }
    }
    let sorted = |spec: &Value| {
        let mut spec = spec.clone();
        let masked = spec["linux"]["maskedPaths"].as_array_mut().unwrap();
        masked.sort_by_key(Value::to_string);
        spec
    };
    assert_eq!(sorted(&ours), sorted(&theirs));
    assert_eq!(json(&ctr.ok(&["oci", "spec", "--platform", "linux/arm64"])), ours);
    assert!(ctr.fails(&["oci", "spec", "--platform", "windows/amd64"]).contains("windows"));
    assert_eq!(ctr.ok(&["deprecations", "list"]), "", "nothing is deprecated");
    assert_eq!(ctr.ok(&["deprecations", "list", "--format", "json"]), "");
}

/// An image with programs and libraries, of which the upper layer changes some.
fn tools(host: &Host, name: &str, broken: bool) {
    let base = Layer::default()
        .folder("bin", 0o755)
        .file("bin/tool", 0o4755, b"#!/bin/sh\necho tool\n")
        .file("bin/dropped", 0o755, b"dropped")
        .symlink("bin/link", "tool")
        .entry(EntryType::Link, "bin/hard", "bin/tool", 0o755, b"")
        .folder("bin/deeper", 0o755)
        .file("bin/deeper/file", 0o755, b"not installed")
        .folder("lib", 0o755)
        .file("lib/library.so", 0o644, b"library")
        .file("etc/file", 0o644, b"not installed")
        .finish();
    let top = Layer::default()
        .file("bin/.wh.dropped", 0o644, b"")
        .file("bin/.wh.on-the-host", 0o644, b"")
        .file("bin/added", 0o700, b"added");
    let top = match broken {
        true => top.entry(EntryType::Link, "bin/escape", "../../etc/passwd", 0o755, b""),
        false => top,
    };
    let archive = host.folder().join("tools.tar");
    image::image(name, &["tool"], &[base, top.finish()]).write(&archive).unwrap();
    host.ctr().ok(&["images", "import", "--no-unpack", archive.to_str().unwrap()]);
}

/// Names beneath a folder, in order.
fn names(folder: &Path) -> Vec<String> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    let mut names: Vec<String> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn programs_are_installed() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    let name = "example.org/tools:1";
    tools(&host, name, false);
    let path = host.folder().join("opt");
    let at = path.to_str().unwrap();
    assert!(ctr.fails(&["install", name]).contains("--path"));
    fs::create_dir_all(path.join("bin")).unwrap();
    fs::write(path.join("bin/on-the-host"), "stays").unwrap();
    let said = ctr.ok(&["install", "--path", at, name]);
    assert_eq!(said.lines().count(), 4, "{said}");
    assert!(said.contains(&format!("{at}/bin/tool\n")), "{said}");
    assert_eq!(names(&path.join("bin")), ["added", "hard", "link", "on-the-host", "tool"]);
    assert_eq!(names(&path), ["bin"], "neither a library nor what was being unpacked");
    let tool = path.join("bin/tool").metadata().unwrap();
    assert_eq!((tool.permissions().mode() & 0o7777, tool.mtime()), (0o4755, 1_600_000_000));
    assert_eq!(tool.ino(), path.join("bin/hard").metadata().unwrap().ino());
    assert_eq!(fs::read_link(path.join("bin/link")).unwrap(), PathBuf::from("tool"));
    // Twice needs to be said.
    fs::write(path.join("bin/tool"), "changed").unwrap();
    let error = ctr.fails(&["install", "--libs", "--path", at, name]);
    assert!(error.contains("bin/") && error.contains("--replace"), "{error}");
    assert_eq!(
        (names(&path), fs::read(path.join("bin/tool")).unwrap()),
        (vec!["bin".into()], b"changed".to_vec())
    );
    ctr.ok(&["install", "--libs", "--replace", "--path", at, name]);
    assert_eq!(fs::read(path.join("bin/tool")).unwrap(), b"#!/bin/sh\necho tool\n");
    assert_eq!(
        (names(&path), names(&path.join("lib"))),
        (vec!["bin".into(), "lib".into()], vec!["library.so".into()])
    );
    assert_eq!(fs::read(path.join("bin/on-the-host")).unwrap(), b"stays");
    // An image that is refused, or not whole, installs nothing.
    tools(&host, "example.org/tools:broken", true);
    let other = host.folder().join("other");
    let elsewhere = other.to_str().unwrap();
    let error = ctr.fails(&["install", "--path", elsewhere, "example.org/tools:broken"]);
    assert!(error.contains("escape") || error.contains("passwd"), "{error}");
    assert_eq!(names(&other), Vec::<String>::new());
    let empty =
        image::image("example.org/empty:1", &["x"], &[Layer::default().file("x", 0o755, b"x").finish()]);
    let archive = host.folder().join("empty.tar");
    empty.write(&archive).unwrap();
    ctr.ok(&["images", "import", "--no-unpack", archive.to_str().unwrap()]);
    assert!(ctr.fails(&["install", "--path", elsewhere, "example.org/empty:1"]).contains("/bin"));
    assert_eq!((names(&other), ctr.ok(&["leases", "ls", "-q"])), (vec![], String::new()));
    host.assert_nothing_left();
}

#[test]
fn our_shim_answers_without_its_engine() {
    shim_alone("io.containerd.runc.v2");
}

#[test]
fn debians_shim_answers_without_its_engine() {
    if ready(&[STOCK_SHIM]) {
        shim_alone(STOCK_SHIM);
    }
}

fn shim_alone(runtime: &str) {
    let Some(host) = with_image() else { return };
    let ctr = host.ctr();
    ctr.ok(&["run", "-d", "--runtime", runtime, NAME, "c", "sleep", "1000"]);
    let tasks = ctr.ok(&["tasks", "ls"]);
    let pid = tasks.lines().nth(1).unwrap().split_whitespace().nth(1).unwrap();
    let state = json(&ctr.ok(&["shim", "--id", "c", "state"]));
    assert_eq!((state["status"].as_str(), state["pid"].to_string()), (Some("RUNNING"), pid.to_owned()));
    let process = |script: &str| {
        let process = json!({"args": ["sh", "-c", script], "cwd": "/", "env": ["PATH=/bin"], "user": {"uid": 0, "gid": 0}});
        file(&host, "process.json", &process.to_string())
    };
    // Detached: the exec runs, ends, and is deleted with its exit code.
    let spec = process("test \"$A\" = b && exit 9");
    let said = ctr.ok(&["shim", "--id", "c", "exec", "--spec", &spec, "--env", "A=b", "e1"]);
    assert!(said.starts_with("exec running with pid "), "{said}");
    wait_for("the exec to stop", || {
        json(&ctr.ok(&["shim", "--id", "c", "state", "--exec-id", "e1"]))["status"] == "STOPPED"
    });
    let said = ctr.ok(&["shim", "--id", "c", "delete", "--exec-id", "e1"]);
    assert_eq!(said, "container deleted and returned exit status 9\n");
    // Attached, by fifos that we make.
    let fifos: Vec<String> = ["in", "out", "err"]
        .map(|name| {
            let path = host.folder().join(name);
            nix::unistd::mkfifo(&path, nix::sys::stat::Mode::S_IRWXU).unwrap();
            path.to_str().unwrap().to_owned()
        })
        .into();
    let spec = process("pwd; cat; echo bad >&2; exit 7");
    let mut arguments = vec!["shim", "--id", "c", "exec", "--attach", "--cwd", "/tmp", "--spec", &spec];
    for (flag, fifo) in ["--stdin", "--stdout", "--stderr"].into_iter().zip(&fifos) {
        arguments.extend([flag, fifo]);
    }
    arguments.push("e2");
    let ended = ctr.with_input(&arguments, b"read\n");
    assert_eq!((ended.code, ended.stdout.as_str()), (7, "/tmp\nread\n"), "{ended:?}");
    assert!(ended.stderr.contains("bad\n"), "{ended:?}");
    // What it cannot do, it says.
    let error = ctr.fails(&["shim", "--id", "c", "start", "--exec-id", "no-such"]);
    assert!(error.contains("cannot start"), "{error}");
    assert!(ctr.fails(&["shim", "--id", "other", "state"]).contains("--shim-address"));
    assert!(ctr.fails(&["shim", "--shim-address", "/no/such.sock", "state"]).contains("/no/such.sock"));
    assert_eq!(ctr.run(&["shim", "state"]).code, 2, "a shim must be named");
    // Its engine is down: it answers all the same, and does not go while it has a container.
    let mut host = host;
    host.stop();
    ctr.ok(&["shim", "--id", "c", "shutdown"]);
    assert_eq!(json(&ctr.ok(&["shim", "--id", "c", "state"]))["status"], "RUNNING");
    host.start();
    ctr.ok(&["tasks", "rm", "-f", "c"]);
    ctr.ok(&["containers", "rm", "c"]);
    host.assert_nothing_left();
}

#[test]
fn system_calls_are_confined() {
    let Some(host) = with_image() else { return };
    let ctr = host.ctr();
    let run = |flags: &[&str], script: &str| {
        ctr.run(&[&["run", "--rm"], flags, &[NAME, "c", "sh", "-c", script]].concat())
    };
    let mode = "grep '^Seccomp:' /proc/self/status | cut -f 2";
    assert_eq!(run(&[], mode).stdout, "0\n");
    assert_eq!(run(&["--seccomp"], mode).stdout, "2\n");
    // The default profile lets a shell work, and refuses what needs a capability even to whom has another.
    assert_eq!(run(&["--seccomp"], "mkdir /x && echo y > /x/y && cat /x/y").stdout, "y\n");
    let profile = json!({"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [
        {"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO"},
    ]});
    let profile = file(&host, "profile.json", &profile.to_string());
    let ended = run(&["--seccomp", "--seccomp-profile", &profile], "mkdir /x");
    assert!(ended.code != 0 && ended.stderr.contains("not permitted"), "{ended:?}");
    assert_eq!(ctr.run(&["run", "--seccomp-profile", &profile, NAME, "c", "true"]).code, 2);
    let noise = file(&host, "noise", "no JSON");
    assert!(
        run(&["--seccomp", "--seccomp-profile", &noise], "true").stderr.contains("not a seccomp profile")
    );
    ctr.ok(&["containers", "create", "--apparmor-profile", "mine", "--rdt-class", "gold", NAME, "c", "true"]);
    let spec = json(&ctr.ok(&["containers", "info", "--spec", "c"]));
    assert_eq!(spec["process"]["apparmorProfile"], "mine");
    assert_eq!(spec["linux"]["intelRdt"]["closID"], "gold");
    ctr.ok(&["containers", "rm", "c"]);
    host.assert_nothing_left();
}

#[test]
fn a_checkpoint_goes_to_a_folder() {
    let Some(host) = with_image() else { return };
    let ctr = host.ctr();
    ctr.ok(&["run", "-d", NAME, "c", "sleep", "1000"]);
    let folder = host.folder().join("checkpoint");
    let ended = ctr.run(&["tasks", "checkpoint", "--image-path", folder.to_str().unwrap(), "c"]);
    // CRIU is seldom there. What cannot be saved goes on running.
    match ended.code {
        0 => assert!(!names(&folder).is_empty(), "{ended:?}"),
        _ => assert!(ended.stderr.contains("cannot checkpoint task c"), "{ended:?}"),
    }
    assert!(ctr.ok(&["tasks", "ls"]).contains("RUNNING"));
    ctr.ok(&["tasks", "rm", "-f", "c"]);
    ctr.ok(&["containers", "rm", "c"]);
    host.assert_nothing_left();
}

#[test]
fn a_runtime_is_inspected_where_the_engine_can() {
    let Some(host) = gantry() else { return };
    let ended = host.ctr().run(&["plugins", "inspect-runtime", "--runc-binary", "runc"]);
    match ended.code {
        0 => assert!(json(&ended.stdout)["name"].is_string(), "{ended:?}"),
        _ => assert!(ended.stderr.contains("not implemented by this engine"), "{ended:?}"),
    }
    let error = host.ctr().fails(&["plugins", "inspect-runtime", "--runtime", "other", "--runc-binary", "x"]);
    assert!(error.contains("--runc-binary"), "{error}");
}

/// What Debian's ctr takes and ours does not, by command: the reasons are in docs/ctr.md.
const LEFT_OUT: &[(&str, &str)] = &[
    ("containers create", "--apparmor-default-profile --gpus --no-pivot --pid-file"),
    ("content active", "--root --timeout -t"),
    (
        "images mount",
        "--hosts-dir --http-dump --http-trace --plain-http --refresh --skip-verify --tlscacert --tlscert --tlskey \
         --user -k -u",
    ),
    (
        "images unmount",
        "--hosts-dir --http-dump --http-trace --label --plain-http --refresh --skip-verify --tlscacert --tlscert \
         --tlskey --user -k -u",
    ),
    ("images push", "--allow-non-distributable-blobs"),
    ("", "pprof"),
    ("run", "--apparmor-default-profile --cni --gpus"),
];

/// The words that begin the lines of a section of a help text, up to the columns that explain them.
fn heads<'a>(help: &'a str, section: &str) -> Vec<&'a str> {
    let lines = help.lines().skip_while(|line| !line.ends_with(section)).skip(1);
    let lines = lines.take_while(|line| line.starts_with("   ") && !line.trim().is_empty());
    lines.map(|line| line.trim().split("  ").next().unwrap()).collect()
}

fn flags<'a>(heads: impl IntoIterator<Item = &'a str>) -> std::collections::BTreeSet<String> {
    let words = heads.into_iter().flat_map(|head| head.split([' ', ',', '=', '[']));
    words.filter(|word| word.starts_with('-') && word.len() > 1).map(str::to_owned).collect()
}

#[test]
fn what_debians_ctr_takes_ours_takes() {
    let Some(host) = gantry() else { return };
    let (ctr, stock) = (host.ctr(), host.stock_ctr());
    let mut missing: Vec<(String, String)> = Vec::new();
    let mut pending: Vec<Vec<String>> = vec![vec![]];
    let mut commands = 0;
    while let Some(path) = pending.pop() {
        commands += 1;
        let arguments: Vec<&str> = path.iter().map(String::as_str).chain(["--help"]).collect();
        let (theirs, ours) = (stock.ok(&arguments), ctr.ok(&arguments));
        let own = flags(ours.lines().map(str::trim).filter(|line| line.starts_with('-')));
        let mut lacks = flags(heads(&theirs, "OPTIONS:"));
        lacks.retain(|flag| !own.contains(flag));
        let name = path.join(" ");
        missing.extend(lacks.into_iter().map(|flag| (name.clone(), flag)));
        for names in heads(&theirs, "COMMANDS:") {
            let names: Vec<&str> = names.split(", ").filter(|name| !matches!(*name, "help" | "h")).collect();
            let Some(first) = names.first() else { continue };
            let mut all_there = true;
            for known in &names {
                let deeper: Vec<&str> = path.iter().map(String::as_str).chain([*known, "--help"]).collect();
                if ctr.run(&deeper).code != 0 {
                    missing.push((name.clone(), (*known).to_owned()));
                    all_there = false;
                }
            }
            if all_there {
                pending.push(path.iter().cloned().chain([(*first).to_owned()]).collect());
            }
        }
    }
    assert!(commands > 50, "{commands} commands were compared");
    let mut left_out: Vec<(String, String)> = LEFT_OUT
        .iter()
        .flat_map(|(command, words)| words.split_whitespace().map(|word| ((*command).into(), word.into())))
        .collect();
    missing.sort();
    left_out.sort();
    assert_eq!(missing, left_out);
}

/// Makes a container by Debian's ctr and by ours, and compares the specs.
fn same_spec(host: &Host, command: &[&str], flags: &[&str], what: &[&str]) {
    let spec = |ctr: &tests::client::Ctr| {
        ctr.ok(&[command, flags, what].concat());
        let mut spec = json(&ctr.ok(&["containers", "info", "--spec", "c"]));
        ctr.ok(&["containers", "rm", "c"]);
        // Debian's 1.6 does not mask it yet.
        if let Some(masked) = spec["linux"]["maskedPaths"].as_array_mut() {
            masked.retain(|path| path != "/sys/devices/virtual/powercap");
        }
        // Their order means nothing, and Debian's is another each time.
        if let Some(namespaces) = spec["linux"]["namespaces"].as_array_mut() {
            namespaces.sort_by_key(Value::to_string);
        }
        spec
    };
    let (ours, theirs) = (spec(&host.ctr()), spec(&host.stock_ctr()));
    if ours != theirs {
        let lines = |spec: &Value| format!("{spec:#}").lines().map(str::to_owned).collect::<Vec<_>>();
        let (ours, theirs) = (lines(&ours), lines(&theirs));
        let only = |these: &[String], those: &[String]| {
            these.iter().filter(|line| !those.contains(line)).cloned().collect::<Vec<_>>().join("\n")
        };
        panic!(
            "{flags:?} {what:?}\nours alone:\n{}\ntheirs alone:\n{}",
            only(&ours, &theirs),
            only(&theirs, &ours)
        );
    }
}

#[test]
fn flags_make_the_specs_that_containerds_ctr_makes() {
    let Some(host) = with_image() else { return };
    let create = ["containers", "create"];
    let env = file(&host, "env", "A=1\nB=two words\nFROM_IMAGE=no\n");
    for flags in [
        &[][..],
        &["--env", "A=b c", "--env", "FROM_IMAGE=no"],
        &["--env", "FROM_IMAGE"],
        &["--env-file", &env],
        &["--cwd", "/tmp"],
        &["--net-host"],
        &["--read-only"],
        &["--tty"],
        &["--privileged"],
        &["--allow-new-privs"],
        &["--label", "a=b", "--annotation", "c=d"],
        &["--mount", "type=bind,src=/tmp,dst=/host,options=rbind:ro"],
        &["--mount", "type=tmpfs,dst=/scratch,options=size=1m"],
        &["--with-ns", "network:/proc/self/ns/net", "--with-ns", "pid:/proc/1/ns/pid"],
        &["--memory-limit", "67108864"],
        &["--cap-add", "CAP_SYS_ADMIN", "--cap-drop", "CAP_CHOWN"],
        &["--cap-add", "CAP_CHOWN"],
        &["--device", "/dev/null"],
        &["--device", "/dev/net"],
        &["--rootfs-propagation", "shared"],
        &["--apparmor-profile", "mine"],
        &["--rdt-class", "gold"],
        &["--snapshotter", "native"],
    ] {
        if flags == ["--device", "/dev/net"] && !Path::new("/dev/net").exists() {
            continue;
        }
        same_spec(&host, &create, flags, &[NAME, "c", "sleep", "1000"]);
    }
    let platform = oci::Platform::host().to_string();
    let cgroup = format!("/{}/one", host.namespace);
    for flags in [
        &[][..],
        &["--cpus", "0.5"],
        &["--cpu-shares", "10"],
        &["--cpu-quota", "50000", "--cpu-period", "200000"],
        &["--cgroup", &cgroup],
        &["--platform", &platform],
        &["--read-only", "--net-host", "--null-io"],
    ] {
        same_spec(&host, &["run"], flags, &[NAME, "c", "true"]);
    }
    same_spec(&host, &create, &[], &[NAME, "c"]);
    let spec = file(&host, "config.json", &host.stock_ctr().ok(&["oci", "spec"]));
    same_spec(&host, &create, &["--config", &spec], &["c"]);
    host.assert_nothing_left();
}
