//! What hostile images and clients try, and what comes of it: docs/threats.md has the whole list, and where the rest is tested.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use proto::runtime::v1::{AttachRequest, ContainerConfig, ImageSpec, KeyValue, PodSandboxConfig};
use serde_json::json;
use tar::EntryType;
use tests::cri::{Node, idle, shell};
use tests::host::{CONTAINERD, Host, Kind, RUNC, STOCK_CTR};
use tests::image::{self, BUSYBOX, Layer};
use tests::network::{IP, IPTABLES, PLUGINS};
use tests::spdy::Spdy;
use tests::{ready, wait_for};
use tonic::Code;

async fn node() -> Option<Node> {
    if ready(&[CONTAINERD, STOCK_CTR, RUNC, BUSYBOX, IP, IPTABLES, &format!("{PLUGINS}/bridge")]) {
        Some(Node::start(Kind::Gantry).await)
    } else {
        None
    }
}

/// An image of busybox, a further layer, and further fields of its config, as the node's `docker.io/library/hostile:latest`.
async fn import(node: &Node, layer: Option<Layer>, further: serde_json::Value) {
    let mut layers = vec![image::base_layer()];
    layers.extend(layer.map(Layer::finish));
    node.import(&image::image_with(HOSTILE, &["sh"], &layers, &further), HOSTILE).await;
}

const HOSTILE: &str = "docker.io/library/hostile:latest";

fn of_hostile(mut config: ContainerConfig) -> ContainerConfig {
    config.image = Some(ImageSpec { image: HOSTILE.into(), ..ImageSpec::default() });
    config
}

/// CVE-2026-53488: a label of an image is no order to the engine.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_images_labels_steer_nothing() {
    let Some(node) = node().await else { return };
    let (program, mark) = (node.host.folder().join("logger"), node.host.folder().join("mark"));
    fs::write(&program, format!("#!/bin/sh\necho ran >{}\n", mark.display())).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    let labels = json!({
        "containerd.io/restart.status": "running",
        "containerd.io/restart.loguri": format!("binary://{}", program.display()),
        "containerd.io/gc.ref.content.x": "sha256:00",
        "io.cri-containerd.kind": "sandbox",
        "org.example.made-by": "a stranger",
    });
    import(&node, None, json!({"Labels": labels})).await;
    // Nor is one of a pod, which whoever may make pods names as they like.
    let steering =
        || [("containerd.io/gc.ref.snapshot.overlayfs/x".to_owned(), "another's".to_owned())].into();
    let pod = node.run_pod(PodSandboxConfig { labels: steering(), ..node.pod("p1") }).await;
    let id =
        node.run(&pod, &ContainerConfig { labels: steering(), ..of_hostile(shell("c1", "exit 3")) }).await;
    assert_eq!(node.ended(&id).await.exit_code, 3);
    let info: serde_json::Value = serde_json::from_str(&node.ctr().ok(&["containers", "info", &id])).unwrap();
    let labels = info["Labels"].as_object().unwrap();
    assert_eq!(labels["org.example.made-by"], "a stranger");
    assert_eq!(labels["io.cri-containerd.kind"], "container");
    assert!(labels.keys().all(|key| !key.starts_with("containerd.io/")), "{labels:?}");
    let mut ours = node.host.ctr();
    ours.namespace = node.ctr().namespace;
    let sandbox: serde_json::Value = serde_json::from_str(&ours.ok(&["sandboxes", "info", &pod.id])).unwrap();
    let labels = sandbox["Labels"].as_object().unwrap();
    assert!(!labels.is_empty() && labels.keys().all(|key| !key.starts_with("containerd.io/")), "{labels:?}");
    assert_eq!(node.ctr().ok(&["tasks", "ls"]).matches(&id).count(), 0);
    assert!(!mark.exists());
    node.remove_all().await;
    node.assert_nothing_left();
}

/// CVE-2022-23648: where an image wants a volume, what is there in the image is copied, and nothing of the host.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_images_volumes_hold_nothing_of_the_host() {
    let Some(node) = node().await else { return };
    let secret = node.host.folder().join("secret");
    fs::create_dir(&secret).unwrap();
    fs::write(secret.join("key"), "of the host").unwrap();
    let target = secret.to_str().unwrap();
    let layer = Layer::default()
        .symlink("absolute", target)
        .symlink("climbing", &format!("../../../../../../../..{target}"))
        .folder("inside", 0o755)
        .file("inside/own", 0o644, b"of the image")
        .symlink("inside/absolute", target);
    let climbing = format!("/../../../../../../../..{target}");
    let volumes = json!({"/absolute": {}, "/climbing/": {}, "/inside": {}, climbing: {}});
    import(&node, Some(layer), json!({"Volumes": volumes})).await;
    let pod = node.run_pod(node.pod("p1")).await;
    match node.try_create(&pod, &of_hostile(idle("c1"))).await {
        Ok(id) => {
            node.begin(&id).await;
            assert_eq!(node.sh(&id, "cat /inside/own").await, "of the image");
            let found = node
                .exec(&id, &["grep", "-rs", "of the host", "/absolute", "/climbing", "/inside", target])
                .await;
            assert_eq!(found.stdout, "");
        }
        Err(status) => panic!("{status}"),
    }
    let mut copied = Vec::new();
    files(&node.host.root().join("cri"), &mut copied);
    assert!(copied.iter().all(|path| path.file_name().unwrap() != "key"), "{copied:?}");
    assert_eq!(fs::read_to_string(secret.join("key")).unwrap(), "of the host");
    node.remove_all().await;
    node.assert_nothing_left();
}

fn files(folder: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
        match entry.metadata().is_ok_and(|metadata| metadata.is_dir()) {
            true => files(&entry.path(), found),
            false => found.push(entry.path()),
        }
    }
}

/// CVE-2026-47262: account files of any size and kind cost a message, and no memory; CVE-2024-40635 and CVE-2026-46680: an id that is
/// out of range is nobody's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_images_accounts_are_bounded() {
    let Some(node) = node().await else { return };
    let pod = node.run_pod(node.pod("p1")).await;
    let huge = vec![b'x'; 5 << 20];
    let line = b"big:x:4294967296:0::/:\nneg:x:-1:0::/:\n";
    let layers = [
        (Layer::default().file("etc/passwd", 0o644, &huge), "0", Some("larger than")),
        (Layer::default().file("etc/group", 0o644, &huge), "app", Some("larger than")),
        (Layer::default().entry(EntryType::Fifo, "etc/passwd", "", 0o644, b""), "app", Some("etc/passwd")),
        (Layer::default().symlink("etc/passwd", "/proc/self/environ"), "app", Some("etc/passwd")),
        (Layer::default().file("etc/passwd", 0o644, line), "big", Some("etc/passwd")),
        (Layer::default().file("etc/passwd", 0o644, line), "neg", Some("etc/passwd")),
        (Layer::default(), "4294967296", Some("out of range")),
        (Layer::default(), "2147483648", Some("out of range")),
        (Layer::default(), "-1", Some("out of range")),
        (Layer::default(), "1000", None),
    ];
    let before = memory(node.host.pid());
    for (at, (layer, user, refused)) in layers.into_iter().enumerate() {
        import(&node, Some(layer), json!({"User": user})).await;
        let config = of_hostile(idle(&format!("c{at}")));
        match (node.try_create(&pod, &config).await, refused) {
            (Err(status), Some(words)) => {
                assert!(status.message().contains(words), "{user}: {status}");
                assert!(
                    matches!(status.code(), Code::InvalidArgument | Code::FailedPrecondition),
                    "{status:?}"
                );
            }
            (Ok(id), None) => {
                node.begin(&id).await;
                // CVE-2023-25173, CVE-2022-24769: the image's groups, and no capability that is inherited.
                assert_eq!(node.sh(&id, "id -u; id -g; id -G").await, "1000\n1001\n1001 2000\n");
                let inherited = node.sh(&id, "grep -E 'CapInh|CapAmb|CapEff' /proc/self/status").await;
                assert!(inherited.lines().all(|line| line.ends_with("0000000000000000")), "{inherited}");
            }
            (made, _) => panic!("{user}: {made:?}"),
        }
    }
    let grown = memory(node.host.pid()).saturating_sub(before);
    assert!(grown < 200 << 20, "the engine has grown by {grown} bytes");
    node.remove_all().await;
    node.assert_nothing_left();
}

/// Bytes of a process that are in memory.
fn memory(pid: i32) -> u64 {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap();
    line.trim().trim_end_matches(" kB").parse::<u64>().unwrap() * 1024
}

/// CVE-2021-21334: containers of one image have each its own environment, begun at once or not; and none the engine's.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn environments_are_not_shared() {
    let Some(node) = node().await else { return };
    let pod = node.run_pod(node.pod("p1")).await;
    let run = |at: usize| {
        let mut config = shell(&format!("c{at}"), "env");
        config.envs = vec![
            KeyValue { key: "MINE".into(), value: format!("value{at}").into() },
            KeyValue { key: format!("ONLY_{at}"), value: "1".into() },
        ];
        node.run_to_end(&pod, config)
    };
    let ended = futures::future::join_all((0..4).map(run)).await;
    for (at, ended) in ended.iter().enumerate() {
        let variables: Vec<&str> = ended.stdout.lines().collect();
        assert!(variables.contains(&format!("MINE=value{at}").as_str()), "{variables:?}");
        let only: Vec<_> = variables.iter().filter(|line| line.starts_with("ONLY_")).collect();
        assert_eq!(only, [&format!("ONLY_{at}=1").as_str()]);
        let names: Vec<&str> = variables.iter().filter_map(|line| line.split('=').next()).collect();
        let known = ["PATH", "FROM_IMAGE", "MINE", "HOSTNAME", "HOME", "PWD", "SHLVL"];
        assert!(names.iter().all(|name| known.contains(name) || name.starts_with("ONLY_")), "{names:?}");
    }
    node.remove_all().await;
    node.assert_nothing_left();
}

/// CVE-2025-64329 and CVE-2022-23471: clients that join and go, and terminals that are resized without end, leave nothing behind.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn clients_that_come_and_go_cost_nothing() {
    let Some(node) = node().await else { return };
    let pod = node.run_pod(node.pod("p1")).await;
    let mut config = idle("c1");
    config.tty = true;
    config.stdin = true;
    let id = node.run(&pod, &config).await;
    let shim = shim_of(&node, &pod.id);
    let attach = || async {
        let request =
            AttachRequest { container_id: id.clone(), stdin: true, tty: true, stdout: true, stderr: false };
        let url = node.runtime.clone().attach(request).await.unwrap().into_inner().url;
        let mut client = Spdy::upgrade(node.open(&url), &url, &["v4.channel.k8s.io"]).await.unwrap();
        let streams = client.open_all(&["error", "stdin", "stdout", "resize"]).await;
        for at in 0..200 {
            let size = format!("{{\"Width\":{},\"Height\":{}}}", 10 + at, 20 + at);
            client.send(streams["resize"], size.as_bytes(), false).await;
        }
        // It goes without a word.
        drop(client);
    };
    for _ in 0..3 {
        attach().await;
    }
    let before = [node.host.pid(), shim].map(taken);
    for _ in 0..40 {
        attach().await;
    }
    // What a client leaves is tidied up in the background.
    let slack = |(descriptors, threads): (usize, usize)| (descriptors + 6, threads + 6);
    wait_for("what 40 clients took to be given back", || {
        [node.host.pid(), shim].map(taken).iter().zip(before).all(|(now, before)| {
            let most = slack(before);
            now.0 <= most.0 && now.1 <= most.1
        })
    });
    assert_eq!(node.sh(&id, "echo well").await, "well\n");
    node.remove_all().await;
    node.assert_nothing_left();
}

/// Descriptors and threads of a process.
fn taken(pid: i32) -> (usize, usize) {
    let count = |what: &str| fs::read_dir(format!("/proc/{pid}/{what}")).unwrap().count();
    (count("fd"), count("task"))
}

/// The shim of a pod.
fn shim_of(node: &Node, pod: &str) -> i32 {
    let shims = tests::left::processes(node.host.folder());
    let found = shims
        .iter()
        .find(|(pid, line)| *pid != node.host.pid() && line.contains("shim") && line.contains(pod));
    found.unwrap_or_else(|| panic!("no shim of {pod}: {shims:?}")).0
}

/// CVE-2021-41103, CVE-2024-25621, CVE-2020-15257: whatever the umask, nobody but root reads or changes what the engine and its
/// containers have, and no socket is without a file that says who may use it.
#[test]
fn folders_are_closed_whatever_the_umask() {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX]) {
        return;
    }
    let mut host = Host::new(Kind::Gantry);
    // The engine becomes of the shell, and keeps its process id.
    host.before = vec!["sh".into(), "-c".into(), "umask 0; exec \"$@\"".into(), "sh".into()];
    host.start();
    let image = host.import();
    host.stock_ctr().ok(&["run", "-d", image, "c", "sleep", "1000"]);
    let mut seen = 0;
    for top in [host.root(), host.state()] {
        open_to_others(&top, &mut seen);
    }
    assert!(seen > 10, "only {seen} were looked at");
    let sockets = fs::read_to_string("/proc/net/unix").unwrap();
    let ours = |line: &&str| {
        line.split_whitespace()
            .nth(7)
            .is_some_and(|path| path.starts_with('@') && line.contains("containerd"))
    };
    assert_eq!(sockets.lines().filter(ours).count(), 0, "{sockets}");
    let socket = fs::read_dir("/run/containerd/s").unwrap().flatten();
    for socket in socket.filter(|entry| entry.metadata().is_ok_and(|of| of.mode() & 0o170_000 == 0o140_000)) {
        assert_eq!(socket.metadata().unwrap().mode() & 0o077, 0, "{:?}", socket.path());
    }
    host.stock_ctr().ok(&["tasks", "rm", "--force", "c"]);
    host.stock_ctr().ok(&["containers", "rm", "c"]);
    host.assert_nothing_left();
}

/// Of a folder that others may pass: they may not list or change it, nor read or change what is in it.
fn open_to_others(folder: &Path, seen: &mut usize) {
    let mode = fs::symlink_metadata(folder).unwrap().mode();
    *seen += 1;
    assert_eq!(mode & 0o022, 0, "{} has mode {mode:o}", folder.display());
    assert_eq!(mode & 0o004, 0, "{} has mode {mode:o}", folder.display());
    let passable = mode & 0o001 != 0;
    for entry in fs::read_dir(folder).unwrap().flatten() {
        let metadata = entry.metadata().unwrap();
        let name = entry.file_name();
        if metadata.is_dir() {
            // What is in there is the container's own.
            if !matches!(name.to_str(), Some("rootfs" | "fs" | "work")) && passable {
                open_to_others(&entry.path(), seen);
            }
        } else if !metadata.is_symlink() {
            *seen += 1;
            assert!(
                !passable || metadata.mode() & 0o007 == 0,
                "{} has mode {:o}",
                entry.path().display(),
                metadata.mode()
            );
        }
    }
}
