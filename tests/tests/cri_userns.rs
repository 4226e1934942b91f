//! Pods with users of their own: who they are inside and outside, what they own, what holds for them, and what is refused.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, chown};
use std::path::{Path, PathBuf};

use proto::runtime::v1::{
    ContainerConfig, IdMapping, ImageSpec, Int64Value, LinuxContainerResources, Mount, MountPropagation,
    NamespaceMode, NamespaceOption, PodSandboxConfig, StatusRequest, UserNamespace,
};
use tests::cri::{Node, Pod, container, idle, pause, security, shell};
use tests::host::{Kind, RUNC};
use tests::image::{self, BUSYBOX, Layer};
use tests::network::{IP, IPTABLES, PLUGINS};
use tests::ready;
use tonic::Code;

/// Whom a pod's root is outside.
const UID: u32 = 100_000;
const GID: u32 = 200_000;

async fn node(settings: &str, sections: &str) -> Option<Node> {
    if !ready(&[RUNC, BUSYBOX, IP, IPTABLES, &format!("{PLUGINS}/bridge")]) {
        return None;
    }
    let node = Node::with(Kind::Gantry, settings, sections).await;
    // Who is root in a container passes through here, as through a real engine's folders.
    fs::set_permissions(node.host.folder(), fs::Permissions::from_mode(0o711)).unwrap();
    Some(node)
}

fn range(host_id: u32) -> Vec<IdMapping> {
    vec![IdMapping { host_id, container_id: 0, length: 65_536 }]
}

fn users() -> Option<UserNamespace> {
    Some(UserNamespace { mode: NamespaceMode::Pod.into(), uids: range(UID), gids: range(GID) })
}

fn options(config: &mut PodSandboxConfig) -> &mut NamespaceOption {
    let linux = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    linux.namespace_options.get_or_insert_default()
}

/// How a pod of this name is asked for that has users of its own.
fn pod(node: &Node, name: &str) -> PodSandboxConfig {
    let mut config = node.pod(name);
    options(&mut config).userns_options = users();
    config
}

/// The same container as one of such a pod.
fn within(mut config: ContainerConfig) -> ContainerConfig {
    security(&mut config).namespace_options.get_or_insert_default().userns_options = users();
    config
}

fn mount(container_path: &str, host_path: &Path) -> Mount {
    let host_path = host_path.display().to_string();
    Mount { container_path: container_path.to_owned(), host_path, ..Mount::default() }
}

/// One whose files have the owners in the pod that they have outside.
fn mapped(container_path: &str, host_path: &Path) -> Mount {
    Mount { uid_mappings: range(UID), gid_mappings: range(GID), ..mount(container_path, host_path) }
}

fn owner(path: &Path) -> (u32, u32) {
    let metadata = fs::symlink_metadata(path).unwrap();
    (metadata.uid(), metadata.gid())
}

/// The processes in a container's control group.
fn processes(node: &Node, id: &str) -> Vec<u32> {
    let folders = [format!("memory/{}/{id}", node.host.namespace), format!("{}/{id}", node.host.namespace)];
    let files = folders.map(|folder| Path::new("/sys/fs/cgroup").join(folder).join("cgroup.procs"));
    let text = files.iter().find_map(|file| fs::read_to_string(file).ok()).expect("it has a control group");
    text.lines().map(|line| line.parse().unwrap()).collect()
}

fn is_empty(folder: &Path) -> bool {
    fs::read_dir(folder).unwrap().next().is_none()
}

async fn remove(node: &Node, pod: &Pod) {
    node.remove_pod(&pod.id).await;
    node.assert_nothing_left();
    for folder in ["netns", "userns", "pods", "mapped"] {
        assert!(is_empty(&node.host.state().join("cri").join(folder)), "{folder}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_a_pods_root_sees_is_its_own() {
    let Some(node) = node("", "").await else { return };
    let files = "docker.io/library/files:latest";
    let layer = Layer::default().folder("top", 0o755).file("top/file", 0o600, b"from an image\n").finish();
    node.import(&image::image(files, &["none"], &[layer]), files).await;
    let name = "docker.io/library/volumes:latest";
    let layers =
        [image::base_layer(), Layer::default().folder("full", 0o755).file("full/file", 0o600, b"").finish()];
    let volumes = serde_json::json!({"Volumes": {"/full": {}, "/empty": {}}});
    node.import(&image::image_with(name, &["none"], &layers, &volumes), name).await;

    let folder = node.host.folder().join("volumes");
    for name in ["plain", "data", "tmpfs"] {
        fs::create_dir_all(folder.join(name)).unwrap();
        fs::write(folder.join(name).join("file"), "x\n").unwrap();
    }
    fs::write(folder.join("single"), "one\n").unwrap();
    chown(folder.join("data/file"), Some(1000), Some(1001)).unwrap();

    let mut config = pod(&node, "p1");
    let sysctls = [("kernel.shm_rmid_forced", "1"), ("net.ipv4.ip_unprivileged_port_start", "80")];
    config.linux.as_mut().unwrap().sysctls =
        sysctls.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
    let p1 = node.run_pod(config).await;
    let mut config = within(idle("c1"));
    config.image = Some(ImageSpec { image: name.into(), ..ImageSpec::default() });
    config.mounts = vec![
        mount("/plain", &folder.join("plain")),
        mapped("/data", &folder.join("data")),
        Mount { readonly: true, ..mapped("/fixed", &folder.join("data")) },
        mapped("/single", &folder.join("single")),
        Mount {
            image: Some(ImageSpec { image: files.to_owned(), ..ImageSpec::default() }),
            host_path: String::new(),
            readonly: true,
            ..mapped("/files", Path::new(""))
        },
    ];
    let c1 = node.run(&p1, &config).await;

    let seen = node.sh(&c1, "cat /proc/self/uid_map /proc/self/gid_map; id -u").await;
    let words: Vec<_> = seen.split_whitespace().collect();
    assert_eq!(words, ["0", "100000", "65536", "0", "200000", "65536", "0"]);
    for path in [
        "/",
        "/bin/busybox",
        "/etc/passwd",
        "/etc/hosts",
        "/etc/hostname",
        "/etc/resolv.conf",
        "/dev/shm",
        "/data",
        "/single",
        "/files/top/file",
        "/full",
        "/full/file",
        "/empty",
        "/proc/sys/net/ipv4/ip_forward",
    ] {
        assert_eq!(node.sh(&c1, &format!("stat -c %u:%g {path}")).await, "0:0\n", "{path}");
    }
    assert_eq!(node.sh(&c1, "stat -c %u:%g /data/file /fixed/file").await, "1000:1001\n1000:1001\n");
    assert_eq!(
        node.sh(&c1, "stat -c %u:%g /plain/file").await,
        "65534:65534\n",
        "nobody's who is in the pod"
    );
    assert_eq!(node.sh(&c1, "hostname; cat /etc/hostname /files/top/file").await, "p1\np1\nfrom an image\n");
    for (key, value) in sysctls {
        let path = format!("/proc/sys/{}", key.replace('.', "/"));
        assert_eq!(node.sh(&c1, &format!("cat {path}")).await.trim(), value, "{key}");
    }
    let table = node.sh(&c1, "cat /proc/mounts").await;
    for kind in ["proc /proc proc", "sysfs /sys sysfs", "mqueue /dev/mqueue mqueue"] {
        assert!(table.contains(kind), "{kind}: {table}");
    }

    // What it writes is its own outside, and in a mapped volume what it says.
    node.sh(&c1, "echo more >> /etc/hosts; touch /new /dev/shm/x /full/new /empty/new").await;
    node.sh(&c1, "touch /data/new /data/given; chown 5:6 /data/given; echo two > /single").await;
    assert_eq!(owner(&folder.join("data/new")), (0, 0));
    assert_eq!(owner(&folder.join("data/given")), (5, 6));
    assert_eq!(fs::read_to_string(folder.join("single")).unwrap(), "two\n");
    assert_ne!(node.exec(&c1, &["touch", "/plain/new"]).await.code, 0);
    assert_ne!(node.exec(&c1, &["touch", "/fixed/new"]).await.code, 0);
    let files_of = node.host.state().join("cri/pods").join(&p1.id);
    assert_eq!(owner(&files_of.join("hosts")), (UID, GID));
    assert_eq!(owner(&files_of.join("shm/x")), (UID, GID));
    let status = fs::read_to_string(format!("/proc/{}/status", processes(&node, &c1)[0])).unwrap();
    assert!(status.contains(&format!("Uid:\t{UID}\t{UID}\t{UID}\t{UID}\n")), "{status}");
    assert!(status.contains(&format!("Gid:\t{GID}\t")), "{status}");
    // The container has its mounts; what they were made from would keep the volumes busy.
    assert!(is_empty(&node.host.state().join("cri/mapped")));

    // Streams may be opened again, by whoever runs.
    let mut config = within(shell("c2", "id -u; echo out > /dev/stdout; echo err > /dev/stderr"));
    security(&mut config).run_as_user = Some(Int64Value { value: 1000 });
    let ended = node.run_to_end(&p1, config).await;
    assert_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (0, "1000\nout\n", "err\n"));

    // All containers of a pod are in one namespace, another pod's in another.
    let c3 = node.run(&p1, &within(idle("c3"))).await;
    let p2 = node.run_pod(pod(&node, "p2")).await;
    let other = node.run(&p2, &within(idle("c1"))).await;
    let of = async |id: &str| node.sh(id, "readlink /proc/self/ns/user").await.trim().to_owned();
    let own = of(&c1).await;
    assert_eq!(own, of(&c3).await);
    assert_ne!(own, of(&other).await);
    assert_ne!(Path::new(&own), fs::read_link("/proc/self/ns/user").unwrap());

    // Its network works, and is its own to change.
    let address = node.address(&p1.id).await;
    let server = within(container("c4", &["nc", "-ll", "-p", "80", "-e", "cat"]));
    node.run(&p1, &server).await;
    let client =
        within(shell("c2", &format!("until echo hello | nc {address} 80; do sleep 0.1; done 2>/dev/null")));
    assert_eq!(node.run_to_end(&p2, client).await.stdout, "hello\n");
    let mut config = within(idle("c5"));
    let capabilities =
        proto::runtime::v1::Capability { add_capabilities: vec!["NET_ADMIN".into()], ..Default::default() };
    security(&mut config).capabilities = Some(capabilities);
    let c5 = node.run(&p2, &config).await;
    node.sh(&c5, "ip address add 127.0.0.9/8 dev lo").await;

    node.remove_pod(&p2.id).await;
    remove(&node, &p1).await;
    assert!(folder.join("data/given").exists());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn limits_hold_for_it() {
    let Some(node) = node("", "").await else { return };
    let p1 = node.run_pod(pod(&node, "p1")).await;
    let limit = 32 << 20;
    let limited = |mut config: ContainerConfig| {
        config.linux.as_mut().unwrap().resources = Some(LinuxContainerResources {
            memory_limit_in_bytes: limit,
            memory_swap_limit_in_bytes: limit,
            ..LinuxContainerResources::default()
        });
        within(config)
    };
    // It is in a group beneath its pod's, and may not change what that says.
    let c1 = node.run(&p1, &limited(idle("c1"))).await;
    let pid = processes(&node, &c1)[0];
    let groups = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
    let parent = format!("/{}/{c1}", node.host.namespace);
    assert!(groups.lines().all(|line| line.ends_with(&parent)), "{groups}");
    let raise = "for file in /sys/fs/cgroup/memory/memory.limit_in_bytes /sys/fs/cgroup/memory.max; do \
                 test -e $file && echo 1000000000 > $file && exit 5; done 2>/dev/null; exit 0";
    assert_eq!(node.exec(&c1, &["sh", "-c", raise]).await.code, 0);
    // An exec is in the group, too.
    let exec = node.exec(&c1, &["sh", "-c", "cat /proc/self/cgroup"]).await.stdout;
    assert!(exec.lines().all(|line| line.ends_with(&parent) || line.ends_with(":/")), "{exec}");
    let c2 = node.run(&p1, &limited(container("c2", &["tail", "/dev/zero"]))).await;
    let status = node.ended(&c2).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{status:?}");
    remove(&node, &p1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_outlives_the_engine() {
    let Some(mut node) = node("", "").await else { return };
    let mut config = pod(&node, "p1");
    options(&mut config).set_pid(NamespaceMode::Pod);
    let p1 = node.run_pod(config).await;
    let shared = |config: ContainerConfig| {
        let mut config = within(config);
        security(&mut config).namespace_options.as_mut().unwrap().set_pid(NamespaceMode::Pod);
        config
    };
    let data = node.host.folder().join("data");
    fs::create_dir(&data).unwrap();
    let with_data = |mut config: ContainerConfig| {
        config.mounts = vec![mapped("/data", &data)];
        shared(config)
    };
    let c1 = node.run(&p1, &with_data(container("c1", &["sleep", "1111"]))).await;
    let made = node.create(&p1, &with_data(idle("c2"))).await;
    node.kill_and_start().await;
    assert_eq!(node.pods().await, [(p1.id.clone(), true)]);
    node.begin(&made).await;
    assert!(node.sh(&made, "ps -o args").await.contains("sleep 1111"), "they share process ids");
    node.sh(&made, "touch /data/new").await;
    assert_eq!(owner(&data.join("new")), (0, 0));
    // Its first process is the shim's, which nobody in the pod may look into.
    assert!(node.sh(&made, "readlink /proc/self/ns/user").await.starts_with("user:"));
    assert_ne!(node.exec(&made, &["readlink", "/proc/1/ns/user"]).await.code, 0);
    assert_eq!(node.exec(&made, &["sh", "-c", "kill -9 1; true"]).await.code, 0);
    assert_eq!(node.pods().await, [(p1.id.clone(), true)]);

    // What is half made when the engine dies is not left.
    node.stop(&c1, 0).await;
    let mut runtime = node.runtime.clone();
    let request = proto::runtime::v1::RunPodSandboxRequest {
        config: Some(pod(&node, "p2")),
        runtime_handler: String::new(),
    };
    let asked = tokio::spawn(async move { runtime.run_pod_sandbox(request).await });
    let userns = node.host.state().join("cri/userns");
    tests::wait_for("a second namespace of users", || fs::read_dir(&userns).unwrap().count() == 2);
    node.kill_and_start().await;
    let _ = asked.await.unwrap();
    tests::cri::until("the half-made pod to be gone", || async {
        // It may have been made in time.
        for (id, _) in node.pods().await.into_iter().filter(|(id, _)| *id != p1.id) {
            node.remove_pod(&id).await;
        }
        fs::read_dir(&userns).unwrap().count() == 1
    })
    .await;
    remove(&node, &p1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pause_container_may_hold_it() {
    let (image, name) = pause();
    let Some(node) = node(&format!("sandbox_image = '{name}'"), "").await else { return };
    node.import(&image, name).await;
    let mut config = pod(&node, "p1");
    options(&mut config).set_pid(NamespaceMode::Pod);
    config.linux.as_mut().unwrap().sysctls = [("kernel.shm_rmid_forced".into(), "1".into())].into();
    let p1 = node.run_pod(config).await;
    let data = node.host.folder().join("data");
    fs::create_dir(&data).unwrap();
    let mut config = within(idle("c1"));
    security(&mut config).namespace_options.as_mut().unwrap().set_pid(NamespaceMode::Pod);
    config.mounts = vec![mapped("/data", &data)];
    let c1 = node.run(&p1, &config).await;
    assert!(node.sh(&c1, "ps -o args").await.contains("sleep 1000000"));
    assert_eq!(node.sh(&c1, "stat -c %u /bin/busybox /data; hostname").await, "0\n0\np1\n");
    assert_eq!(node.sh(&c1, "cat /proc/sys/kernel/shm_rmid_forced").await, "1\n");
    assert_eq!(
        fs::read_to_string(format!("/proc/{}/uid_map", processes(&node, &p1.id)[0]))
            .unwrap()
            .split_whitespace()
            .nth(1),
        Some("100000")
    );
    assert!(node.address(&p1.id).await.starts_with("10.88."));
    remove(&node, &p1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn it_may_be_in_the_machines_network() {
    let Some(node) = node("", "").await else { return };
    let mut config = pod(&node, "p1");
    config.hostname = String::new();
    options(&mut config).set_network(NamespaceMode::Node);
    let p1 = node.run_pod(config).await;
    let mut config = within(idle("c1"));
    security(&mut config).namespace_options.as_mut().unwrap().set_network(NamespaceMode::Node);
    let c1 = node.run(&p1, &config).await;
    let of_engine = fs::read_link(PathBuf::from(format!("/proc/{}/ns/net", node.host.pid()))).unwrap();
    assert_eq!(node.sh(&c1, "readlink /proc/self/ns/net").await.trim(), of_engine.to_str().unwrap());
    assert_eq!(
        node.sh(&c1, "cut -c 1-30 /proc/self/uid_map").await.split_whitespace().nth(1),
        Some("100000")
    );
    assert_ne!(
        node.exec(&c1, &["ip", "link", "set", "lo", "down"]).await.code,
        0,
        "the network is not its own"
    );
    assert!(node.sh(&c1, "ls /sys").await.contains("kernel"));
    remove(&node, &p1).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_is_refused() {
    let sections = "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\n\
                    [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.copies]\nsnapshotter = 'native'\n";
    let Some(node) = node("", sections).await else { return };
    let status = node.runtime.clone().status(StatusRequest { verbose: false }).await.unwrap().into_inner();
    let can = |name: &str| {
        let handler = status.runtime_handlers.iter().find(|handler| handler.name == name).unwrap();
        handler.features.unwrap().user_namespaces
    };
    assert!(can("") && can("runc") && !can("copies"));

    let refused = async |change: fn(&mut NamespaceOption), why: &str| {
        let mut config = pod(&node, "wrong");
        change(options(&mut config));
        let error = node.try_run_pod(&config).await.unwrap_err();
        assert!(error.code() == Code::InvalidArgument && error.message().contains(why), "{error}");
    };
    refused(|of| of.userns_options.as_mut().unwrap().uids.extend(range(300_000)), "one is supported").await;
    refused(|of| of.userns_options.as_mut().unwrap().gids[0].container_id = 1, "root").await;
    refused(|of| of.userns_options.as_mut().unwrap().gids.clear(), "missing").await;
    refused(|of| of.userns_options.as_mut().unwrap().uids[0].length = 0, "no length").await;
    refused(|of| of.userns_options.as_mut().unwrap().uids[0].host_id = u32::MAX - 7, "last id").await;
    refused(|of| of.userns_options.as_mut().unwrap().set_mode(NamespaceMode::Container), "CONTAINER").await;
    refused(|of| of.userns_options.as_mut().unwrap().set_mode(NamespaceMode::Target), "TARGET").await;
    refused(|of| of.userns_options.as_mut().unwrap().set_mode(NamespaceMode::Node), "NODE").await;
    refused(|of| of.set_pid(NamespaceMode::Node), "process ids").await;
    refused(|of| of.set_ipc(NamespaceMode::Node), "message queues").await;
    let request = proto::runtime::v1::RunPodSandboxRequest {
        config: Some(pod(&node, "wrong")),
        runtime_handler: "copies".into(),
    };
    let error = node.runtime.clone().run_pod_sandbox(request).await.unwrap_err();
    assert!(error.code() == Code::FailedPrecondition && error.message().contains("native"), "{error}");
    assert_eq!(node.pods().await, []);

    let p1 = node.run_pod(pod(&node, "p1")).await;
    let without = node.try_create(&p1, &idle("c1")).await.unwrap_err();
    assert!(without.message().contains("not its pod's"), "{without}");
    let mut config = within(idle("c1"));
    security(&mut config).run_as_user = Some(Int64Value { value: 70_000 });
    let beyond = node.try_create(&p1, &config).await.unwrap_err();
    assert!(beyond.code() == Code::InvalidArgument && beyond.message().contains("70000"), "{beyond}");
    let mut config = within(idle("c1"));
    let propagation = MountPropagation::PropagationBidirectional.into();
    config.mounts = vec![Mount { propagation, ..mount("/m", node.host.folder()) }];
    let shared = node.try_create(&p1, &config).await.unwrap_err();
    assert!(shared.message().contains("users of its own"), "{shared}");
    // A file system that takes no mapping is named.
    config.mounts = vec![mapped("/m", Path::new("/proc/sys"))];
    let c1 = node.create(&p1, &config).await;
    let error = node.try_begin(&c1).await.unwrap_err();
    assert!(error.message().contains("proc") && error.message().contains("id-mapped"), "{error}");
    assert!(is_empty(&node.host.state().join("cri/mapped")));
    remove(&node, &p1).await;
}
