//! `gantryd check`: nothing is found where nothing is wrong; what is damaged by hand is found, told by its class, and mended.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use oci::Digest;
use serde_json::Value;
use tests::cri::{Node, idle};
use tests::host::{Host, Kind, RUNC, STOCK_CTR};
use tests::image::{self, BUSYBOX};
use tests::network::{IP, IPTABLES, PLUGINS};
use tests::{left, ready, wait_for};

/// What a check says, with its exit code.
struct Checked {
    code: i32,
    said: Value,
    stderr: String,
}

fn check(host: &Host, arguments: &[&str]) -> Checked {
    let output = host.command().args(["check", "--json"]).args(arguments).output().unwrap();
    let stderr = String::from_utf8(output.stderr).unwrap();
    let said = serde_json::from_slice(&output.stdout).unwrap_or_default();
    Checked { code: output.status.code().unwrap(), said, stderr }
}

impl Checked {
    /// Class and kind of what was found, and a part of its name, one line each.
    fn found(&self) -> Vec<String> {
        let text = |finding: &Value, field: &str| finding[field].as_str().unwrap().to_owned();
        let findings = self.said["findings"].as_array().unwrap_or_else(|| panic!("{}", self.stderr));
        let line = |of: &Value| format!("{} {} {}", text(of, "class"), text(of, "kind"), text(of, "name"));
        findings.iter().map(line).collect()
    }

    fn assert_found(&self, class: &str, kind: &str, name: &str) {
        let found = self.found();
        let fits = |line: &String| line.starts_with(&format!("{class} {kind} ")) && line.contains(name);
        assert!(found.iter().any(fits), "{class} {kind} {name} is not among:\n{}", found.join("\n"));
    }

    /// Asserts that nothing at all was found.
    fn assert_sound(&self) {
        assert_eq!((self.code, self.found()), (0, vec![]), "{}", self.stderr);
    }
}

fn content(host: &Host) -> PathBuf {
    host.root().join("io.containerd.content.v1.content")
}

fn blob(host: &Host, digest: &Digest) -> PathBuf {
    content(host).join("blobs/sha256").join(digest.hex())
}

fn snapshots(host: &Host) -> PathBuf {
    host.root().join("io.containerd.snapshotter.v1.overlayfs/snapshots")
}

fn bundles(host: &Host) -> PathBuf {
    host.state().join("io.containerd.runtime.v2.task").join(&host.namespace)
}

/// Where the shim of a container listens.
fn socket(host: &Host, id: &str) -> PathBuf {
    let key = format!("{}/{}/{id}", host.address().display(), host.namespace);
    Path::new("/run/containerd/s").join(Digest::sha256_of(key.as_bytes()).hex())
}

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
}

/// Puts bytes in the place of a record that are none.
fn damage_record(host: &Host, table: &str, id: &str) {
    let (file, metadata) = (host.folder().join("export"), host.root().join("metadata"));
    let gantryd = |verb: &str| {
        let status = host.command().args(["metadata", verb]).arg(&file).status().unwrap();
        assert!(status.success());
    };
    gantryd("export");
    let text = fs::read_to_string(&file).unwrap();
    let mut damaged = 0;
    let lines = text.lines().map(|line| {
        let mut entry: Value = serde_json::from_str(line).unwrap();
        if entry["key"][0] == table && entry["key"][2] == id {
            entry["value"] = "//8=".into();
            damaged += 1;
        }
        format!("{entry}\n")
    });
    fs::write(&file, lines.collect::<String>()).unwrap();
    assert_eq!(damaged, 1, "{table} {id}");
    fs::remove_dir_all(&metadata).unwrap();
    gantryd("import");
    fs::remove_file(&file).unwrap();
}

#[test]
fn damage_is_found_and_mended() {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX]) {
        return;
    }
    let mut host = Host::gantry();
    let (stock, ours) = (host.stock_ctr(), host.ctr());
    let image = host.import();
    for id in ["runs", "wild", "past"] {
        stock.ok(&["run", "-d", image, id, "sleep", "1000"]);
    }
    stock.ok(&["run", "-d", image, "ended", "true"]);
    wait_for("a container to end", || stock.ok(&["tasks", "ls"]).contains("STOPPED"));
    stock.ok(&["tasks", "rm", "-f", "past"]);
    stock.ok(&["containers", "rm", "past"]);
    ours.ok(&["leases", "create", "--id", "kept"]);
    ours.ok(&["leases", "create", "--id", "unreadable"]);
    ours.ok(&["snapshots", "prepare", "loose"]);
    let loose = Digest::sha256_of(b"loose");
    let ended =
        ours.with_input(&["content", "ingest", "--label", "containerd.io/gc.root=yes", "loose"], b"loose");
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    let part = stock.with_input(&["content", "ingest", "--expected-size", "99", "part"], b"part");
    assert_ne!(part.code, 0);
    assert!(ours.ok(&["content", "active"]).contains("part"));

    let refused = check(&host, &[]);
    assert_eq!(refused.code, 2);
    assert!(
        refused.stderr.contains("is running") && refused.stderr.contains("stop it"),
        "{}",
        refused.stderr
    );
    host.stop();
    check(&host, &[]).assert_sound();
    let deep = check(&host, &["--deep"]);
    deep.assert_sound();
    assert_eq!(deep.said["checked"]["layers compared"], 2, "{}", deep.said);
    let nowhere = host.folder().join("nowhere");
    let elsewhere = host.command().arg("--root").arg(nowhere).args(["check"]).output().unwrap();
    assert_eq!(elsewhere.status.code(), Some(2), "{}", String::from_utf8_lossy(&elsewhere.stdout));

    // Lost.
    fs::File::options().write(true).open(blob(&host, &loose)).unwrap().set_len(3).unwrap();
    let blobs = image::busybox().blobs;
    let (layer, bytes) = blobs.iter().max_by_key(|(_, bytes)| bytes.len()).unwrap();
    fs::remove_file(blob(&host, layer)).unwrap();
    let entries = fs::read_dir(snapshots(&host)).unwrap().flatten();
    let numbers = entries.filter_map(|entry| entry.file_name().to_str()?.parse::<u64>().ok());
    let newest = snapshots(&host).join(numbers.max().unwrap().to_string());
    fs::remove_dir_all(newest).unwrap();
    damage_record(&host, "leases", "unreadable");
    // Leaked.
    for folder in ["odd", "999/fs"] {
        fs::create_dir_all(snapshots(&host).join(folder)).unwrap();
    }
    let place = host.state().join("some/place");
    fs::create_dir_all(&place).unwrap();
    run("mount", &["-t", "tmpfs", "tmpfs", place.to_str().unwrap()]);
    let group = left::cgroups(&host.namespace)[0].with_file_name("past");
    fs::create_dir(&group).unwrap();
    fs::create_dir_all(host.state().join("cri/execs/odd")).unwrap();
    drop(UnixListener::bind(socket(&host, "past")).unwrap());
    let wild = bundles(&host).join("wild");
    run("umount", &[wild.join("rootfs").to_str().unwrap()]);
    fs::remove_dir_all(&wild).unwrap();
    fs::write(bundles(&host).join("no~bundle"), "").unwrap();
    // For the next start.
    fs::create_dir(bundles(&host).join("orphan")).unwrap();
    let network = host.state().join("cri/netns/orphan");
    fs::write(&network, "").unwrap();
    run("unshare", &[&format!("--net={}", network.display()), "true"]);

    let expected = [
        ("lost", "blob", loose.as_str()),
        ("lost", "blob", layer.as_str()),
        ("lost", "snapshot", "loose"),
        ("lost", "record", "unreadable"),
        ("leaked", "snapshot folder", "odd"),
        ("leaked", "mount", "some/place"),
        ("leaked", "control group", "past"),
        ("leaked", "fifo folder", "odd"),
        ("leaked", "shim socket", "/run/containerd/s/"),
        ("leaked", "shim", "wild"),
        ("leaked", "container", "wild"),
        ("leaked", "bundle", "no~bundle"),
        ("pending", "snapshot folder", "999"),
        ("pending", "bundle", "orphan"),
        ("pending", "network namespace", "orphan"),
        ("pending", "mount", "netns/orphan"),
        ("pending", "work folder", "wild"),
    ];
    let damaged = check(&host, &[]);
    for (class, kind, name) in expected {
        damaged.assert_found(class, kind, name);
    }
    assert_eq!((damaged.code, damaged.found().len()), (1, expected.len()), "{:#?}", damaged.found());
    assert_eq!(check(&host, &[]).found(), damaged.found(), "a check changes nothing");
    let lines = host.command().arg("check").output().unwrap();
    let lines = String::from_utf8(lines.stdout).unwrap();
    assert_eq!(lines.lines().count(), expected.len() + 1, "{lines}");
    assert!(lines.lines().last().unwrap().starts_with("4 lost, 8 leaked, 5 pending"), "{lines}");

    let mended = check(&host, &["--repair"]);
    let repairs = mended.said["repairs"].as_array().unwrap();
    assert!(repairs.iter().all(|repair| repair["mended"] == true), "{repairs:#?}");
    assert!(left::mounts(&place).is_empty() && !group.exists() && !socket(&host, "past").exists());
    let aside = fs::read_to_string(host.root().join("metadata/aside.jsonl")).unwrap();
    assert!(aside.contains("unreadable"), "{aside}");
    // The image has to be had again; the next start mends the rest.
    assert_eq!(mended.code, 1);
    let (lost, rest): (Vec<_>, Vec<_>) =
        mended.found().into_iter().partition(|line| !line.starts_with("pending"));
    assert_eq!(lost, [format!("lost image {}/{image}", host.namespace)]);
    assert_eq!(rest.len(), 5, "{rest:?}");

    host.start();
    wait_for("what is left of a pod to go", || !network.exists());
    assert!(!bundles(&host).join("orphan").exists() && !snapshots(&host).join("999").exists());
    host.import();
    assert_eq!(fs::read(blob(&host, layer)).unwrap(), *bytes);
    assert_eq!(ours.ok(&["run", "--rm", image, "new", "echo", "works"]), "works\n");
    assert_eq!(ours.ok(&["tasks", "exec", "--exec-id", "e", "runs", "echo", "alive"]), "alive\n");
    host.stop();
    check(&host, &[]).assert_sound();
    check(&host, &["--deep"]).assert_sound();

    host.start();
    ours.ok(&["tasks", "rm", "-f", "runs", "ended"]);
    ours.ok(&["containers", "rm", "runs", "ended", "wild"]);
    host.assert_nothing_left();
}

#[test]
fn changed_bytes_are_found_by_reading_them() {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX]) {
        return;
    }
    let mut host = Host::gantry();
    let ours = host.ctr();
    let image = host.import();
    assert_eq!(ours.ok(&["run", "--rm", image, "c", "echo", "one"]), "one\n");
    let loose = Digest::sha256_of(b"loose");
    let ended =
        ours.with_input(&["content", "ingest", "--label", "containerd.io/gc.root=yes", "loose"], b"loose");
    assert_eq!(ended.code, 0, "{}", ended.stderr);
    host.stop();
    // Of the same size, so that only reading shows it.
    fs::remove_file(blob(&host, &loose)).unwrap();
    fs::write(blob(&host, &loose), b"goose").unwrap();
    let folders = fs::read_dir(snapshots(&host)).unwrap().flatten();
    let layer: Vec<PathBuf> =
        folders.map(|folder| folder.path().join("fs/bin/busybox")).filter(|file| file.exists()).collect();
    let [busybox] = &layer[..] else { panic!("{layer:?}") };
    let mut bytes = fs::read(busybox).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(busybox, bytes).unwrap();

    check(&host, &[]).assert_sound();
    let deep = check(&host, &["--deep"]);
    deep.assert_found("lost", "blob", loose.as_str());
    deep.assert_found("lost", "snapshot", "overlayfs/sha256:");
    assert_eq!((deep.code, deep.found().len()), (1, 2), "{:?}", deep.found());
    check(&host, &["--deep", "--repair"]).assert_sound();
    // Layers are made anew of their blobs.
    host.start();
    assert_eq!(ours.ok(&["run", "--rm", image, "c", "echo", "two"]), "two\n");
    host.stop();
    let deep = check(&host, &["--deep"]);
    deep.assert_sound();
    assert_eq!(deep.said["checked"]["layers compared"], 2, "{}", deep.said);
}

#[test]
fn a_delete_that_a_kill_cut_off_leaves_no_shim() {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX]) {
        return;
    }
    let mut host = Host::gantry();
    let (stock, ours) = (host.stock_ctr(), host.ctr());
    let image = host.import();
    stock.ok(&["run", "-d", image, "c", "true"]);
    wait_for("the container to end", || stock.ok(&["tasks", "ls"]).contains("STOPPED"));
    host.kill();
    // What the engine does before it lets the shim go.
    ours.ok(&["shim", "--id", "c", "delete"]);
    fs::write(bundles(&host).join("c/end.json"), r#""Deleted""#).unwrap();
    let cut_off = check(&host, &[]);
    cut_off.assert_found("pending", "bundle", "/c");
    assert_eq!((cut_off.code, cut_off.found().len()), (0, 1), "{:?}", cut_off.found());
    host.start();
    assert!(!bundles(&host).join("c").exists() && !socket(&host, "c").exists());
    ours.ok(&["containers", "rm", "c"]);
    host.assert_nothing_left();
    host.stop();
    check(&host, &[]).assert_sound();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_node_with_pods_is_sound_after_a_stop_and_after_a_kill() {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX, IP, IPTABLES, &format!("{PLUGINS}/bridge")]) {
        return;
    }
    let mut node = Node::start(Kind::Gantry).await;
    let pod = node.run_pod(node.pod("p")).await;
    let container = node.run(&pod, &idle("c")).await;
    let created = node.create(&pod, &idle("created")).await;
    node.host.stop();
    check(&node.host, &[]).assert_sound();
    node.start_again().await;
    let gone = node.run_pod(node.pod("gone")).await;
    node.run(&gone, &idle("c")).await;
    node.remove_pod(&gone.id).await;
    node.host.kill();
    let killed = check(&node.host, &[]);
    assert_eq!(killed.code, 0, "{:?}", killed.found());
    node.start_again().await;
    assert_eq!(node.sh(&container, "hostname").await, "p\n");
    node.remove(&created).await;
    node.remove_pod(&pod.id).await;
    node.host.stop();
    check(&node.host, &[]).assert_sound();
    node.assert_nothing_left();
}
