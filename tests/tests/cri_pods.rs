//! Pods as a kubelet has them, in real networks, by real plugins. What containerd does as well is asked of Debian's, too,
//! which shows that the cases ask for what kubelets are used to.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use futures::{SinkExt as _, StreamExt as _};
use proto::runtime::v1::{
    ContainerState, DnsConfig, ImageSpec, Int64Value, KeyValue, LinuxContainerResources, Mount,
    MountPropagation, NamespaceMode, PortMapping, ReopenContainerLogRequest, RunPodSandboxRequest,
    SecurityProfile, StatusRequest, SupplementalGroupsPolicy, UpdateContainerResourcesRequest,
    security_profile::ProfileType,
};
use tests::cri::{
    Node, Pod, container, idle, log_lines, logged, namespaces, pause, security, shell, until, wait_for_log,
};
use tests::host::{CONTAINERD, Kind, RUNC, STOCK_CTR, STOCK_SHIM};
use tests::image::{self, BUSYBOX, Layer};
use tests::network::{From, IP, IPTABLES, PLUGINS};
use tests::spdy::Spdy;
use tests::{LIMIT, ready, wait_for};
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::{WebSocketStream, client_async};
use tonic::Code;

macro_rules! on {
    ($module:ident, $node:expr, $($test:ident),* $(,)?) => {
        mod $module {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $test() {
                    if let Some(node) = $node.await {
                        super::$test(node).await;
                    }
                }
            )*
        }
    };
}

macro_rules! on_both {
    ($($test:ident),* $(,)?) => {
        on!(gantry, super::node(super::Kind::Gantry), $($test),*);
        on!(containerd, super::node(super::Kind::Containerd), $($test),*);
    };
}

on_both!(
    containers_of_a_pod_share_its_network_and_nothing_else,
    ports_of_the_host_lead_to_pods,
    a_pod_may_be_in_the_hosts_network,
    a_pod_may_have_one_namespace_of_process_ids,
    volumes_are_seen_on_both_sides,
    containers_run_as_who_they_are_told,
    a_root_may_be_read_only_and_calls_may_be_filtered,
    memory_that_runs_out_is_the_reason,
    limits_change_while_it_runs,
    a_stop_is_polite_at_first,
    logs_have_the_kubelets_form,
    a_log_is_opened_again,
    commands_run_in_containers,
    streams_are_opened_by_both_protocols,
    what_is_used_is_counted,
);

on!(
    ours,
    super::node(super::Kind::Gantry),
    images_are_volumes,
    groups_of_the_image_may_be_left_out,
    metrics_are_as_they_are_described,
    lists_come_in_pieces_too,
);

// Our engine with Debian's shim, which has no sandboxes and does not write logs: a pause container and a logger do it.
on!(stock_shim, super::with_stock_shim(), logs_have_the_kubelets_form, a_log_is_opened_again,);

async fn node(kind: Kind) -> Option<Node> {
    if ready(&[CONTAINERD, STOCK_CTR, RUNC, BUSYBOX, IP, IPTABLES, &format!("{PLUGINS}/bridge")]) {
        Some(Node::start(kind).await)
    } else {
        None
    }
}

async fn with_stock_shim() -> Option<Node> {
    if !ready(&[STOCK_SHIM, RUNC, BUSYBOX, IP, IPTABLES, &format!("{PLUGINS}/bridge")]) {
        return None;
    }
    let (image, name) = pause();
    let runtime = format!(
        "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\nruntime_type = 'io.containerd.runc.v2'\n\
         runtime_path = '{STOCK_SHIM}'\n"
    );
    let node = Node::with(Kind::Gantry, &format!("sandbox_image = '{name}'"), &runtime).await;
    node.import(&image, name).await;
    Some(node)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_runtime_handler_may_have_networks_of_its_own() {
    if !ready(&[RUNC, BUSYBOX, IP, IPTABLES, &format!("{PLUGINS}/bridge")]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let (conf, addresses) = (folder.path().join("net.d"), folder.path().join("ipam"));
    fs::create_dir(&conf).unwrap();
    let network = |name: &str, subnet: &str| {
        serde_json::json!({
            "cniVersion": "1.0.0", "name": name,
            "plugins": [{
                "type": "bridge", "bridge": name, "isGateway": true,
                "ipam": {"type": "host-local", "dataDir": addresses, "ranges": [[{"subnet": subnet}]]},
            }],
        })
    };
    fs::write(conf.join("10-own.conflist"), network("own0", "10.77.0.0/16").to_string()).unwrap();
    let handlers = format!(
        "[plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.runc]\n\
         [plugins.'io.containerd.grpc.v1.cri'.containerd.runtimes.apart]\ncni_conf_dir = '{}'\ncni_max_conf_num = 1\n",
        conf.display()
    );
    let mut node = Node::with(Kind::Gantry, "", &handlers).await;
    let usual = node.run_pod(node.pod("p1")).await;
    assert!(node.address(&usual.id).await.starts_with("10.88."));
    let mut runtime = node.runtime.clone();
    let mut run = async |name: &str| {
        let config = node.pod(name);
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: "apart".into() };
        let id = runtime.run_pod_sandbox(request).await.unwrap().into_inner().pod_sandbox_id;
        Pod { id, config }
    };
    let apart = run("p2").await;
    assert!(node.address(&apart.id).await.starts_with("10.77."));
    assert_eq!(node.pod_status(&apart.id).await.runtime_handler, "apart");
    assert_eq!(run("p2").await.id, apart.id);
    // Who asks for another handler is not given this one's.
    let request = RunPodSandboxRequest { config: Some(apart.config.clone()), runtime_handler: String::new() };
    let refused = node.runtime.clone().run_pod_sandbox(request).await.unwrap_err();
    assert!(
        refused.code() == tonic::Code::AlreadyExists && refused.message().contains(&apart.id),
        "{refused}"
    );
    let c1 = node.run(&apart, &idle("c1")).await;
    assert!(node.sh(&c1, "ip -o address show eth0").await.contains(" 10.77."));
    // Its folder is watched as the usual one is.
    fs::write(conf.join("05-first.conflist"), network("own1", "10.78.0.0/16").to_string()).unwrap();
    let end = Instant::now() + LIMIT;
    for number in 3.. {
        let pod = run(&format!("p{number}")).await;
        let address = node.address(&pod.id).await;
        node.remove_pod(&pod.id).await;
        if address.starts_with("10.78.") {
            break;
        }
        assert!(Instant::now() < end, "{address}");
    }
    // What was attached by it is detached by it, also by the next engine.
    node.kill_and_start().await;
    node.remove_pod(&apart.id).await;
    node.remove_pod(&usual.id).await;
    node.assert_nothing_left();
    for network in ["own0", "own1"] {
        let left = fs::read_dir(addresses.join(network)).unwrap().flatten();
        let left: Vec<_> =
            left.filter(|entry| entry.file_name().to_string_lossy().starts_with("10.")).collect();
        assert!(left.is_empty(), "{left:?}");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn commands_wait_for_their_place_unless_too_many_do() {
    if !ready(&[RUNC, BUSYBOX, IP, IPTABLES, &format!("{PLUGINS}/bridge")]) {
        return;
    }
    let node = Node::with(Kind::Gantry, "max_execs_per_container = 1", "").await;
    let folder = node.host.folder().join("volume");
    fs::create_dir(&folder).unwrap();
    let pod = node.run_pod(node.pod("p1")).await;
    let mut config = idle("c1");
    config.mounts = vec![mount("/volume", &folder)];
    let id = node.run(&pod, &config).await;
    let other = node.run(&pod, &idle("c2")).await;

    // One runs, four wait, and what is more is refused at once: nothing else ends before it may.
    let work = "echo >> /volume/begun; until test -e /volume/go; do sleep 0.1; done";
    let command = ["sh", "-c", work];
    let mut calls: futures::stream::FuturesUnordered<_> =
        (0..6).map(|_| node.try_exec(&id, &command, 60)).collect();
    let refused = calls.next().await.unwrap().unwrap_err();
    assert_eq!(refused.code(), Code::ResourceExhausted, "{refused:?}");
    assert!(refused.message().contains("max_execs_per_container"), "{refused:?}");
    let begun = || fs::read(folder.join("begun")).unwrap_or_default().len();
    assert!(begun() <= 1, "one at a time");
    assert_eq!(node.sh(&other, "echo free").await, "free\n", "another container is not kept waiting");
    fs::write(folder.join("go"), "").unwrap();
    while let Some(ended) = calls.next().await {
        assert_eq!(ended.unwrap().code, 0);
    }
    assert_eq!(begun(), 5);
    node.remove_pod(&pod.id).await;
    node.assert_nothing_left();
}

/// A container that sends back whatever it gets at port 8080.
fn echo() -> proto::runtime::v1::ContainerConfig {
    container("echo", &["nc", "-ll", "-p", "8080", "-e", "cat"])
}

/// What comes back for a word that is sent.
fn echoed(mut stream: TcpStream) -> String {
    stream.set_read_timeout(Some(Duration::from_secs(10))).unwrap();
    stream.write_all(b"hello").unwrap();
    stream.shutdown(Shutdown::Write).unwrap();
    let mut back = String::new();
    stream.read_to_string(&mut back).unwrap();
    back
}

async fn containers_of_a_pod_share_its_network_and_nothing_else(node: Node) {
    let mut config = node.pod("p1");
    config.dns_config = Some(DnsConfig {
        servers: vec!["10.0.0.53".into()],
        searches: vec!["example.org".into()],
        options: vec!["ndots:3".into()],
    });
    config.linux.as_mut().unwrap().sysctls =
        [("net.ipv4.ip_unprivileged_port_start".into(), "80".into())].into();
    let pod = node.run_pod(config).await;
    let server = node.run(&pod, &echo()).await;
    let address = node.address(&pod.id).await;
    assert!(node.network.addresses().iter().any(|own| own.to_string() == address), "{address}");

    let client = shell("client", "until echo hello | nc 127.0.0.1 8080; do sleep 0.1; done 2>/dev/null");
    let ended = node.run_to_end(&pod, client).await;
    assert_eq!((ended.code, ended.stdout.as_str()), (0, "hello\n"), "{ended:?}");
    let from_host = node.network.connect(From::Host, format!("{address}:8080").parse().unwrap());
    assert_eq!(echoed(from_host.unwrap()), "hello");

    // One name, one network, one set of queues; own processes and files.
    let other = node.run(&pod, &idle("other")).await;
    for (what, same) in [
        ("hostname", true),
        ("readlink /proc/self/ns/net", true),
        ("readlink /proc/self/ns/ipc", true),
        ("readlink /proc/self/ns/uts", true),
        ("readlink /proc/self/ns/pid", false),
        ("readlink /proc/self/ns/mnt", false),
        ("stat -c %d /dev/shm", true),
    ] {
        assert_eq!(node.sh(&server, what).await == node.sh(&other, what).await, same, "{what}");
    }
    assert_eq!(node.sh(&server, "hostname; cat /etc/hostname").await, "p1\np1\n");
    assert!(node.sh(&other, "ip -o address show eth0").await.contains(&format!(" {address}/")));
    assert!(node.sh(&other, "ip -o link show lo").await.contains("LOOPBACK,UP"));
    let resolv = node.sh(&other, "cat /etc/resolv.conf").await;
    assert_eq!(resolv, "search example.org\nnameserver 10.0.0.53\noptions ndots:3\n");
    assert_eq!(node.sh(&other, "cat /proc/sys/net/ipv4/ip_unprivileged_port_start").await, "80\n");
    node.sh(&server, "echo mine > /tmp/file").await;
    assert_ne!(node.exec(&other, &["cat", "/tmp/file"]).await.code, 0);

    // Another pod has a network and an address of its own, and is reached.
    let neighbour = node.run_pod(node.pod("p2")).await;
    assert_ne!(node.address(&neighbour.id).await, address);
    let client = shell("client", &format!("echo over there | nc {address} 8080"));
    assert_eq!(node.run_to_end(&neighbour, client).await.stdout, "over there\n");
    let client = shell("local", "echo here | nc -w 1 127.0.0.1 8080");
    assert_ne!(node.run_to_end(&neighbour, client).await.code, 0);

    // What the other clients of the engine see.
    let ctr = node.ctr();
    let seen = ctr.ok(&["containers", "ls", "-q"]);
    assert!(seen.contains(&server) && seen.contains(&other), "{seen}");
    let labels = ctr.ok(&["containers", "info", &server]);
    assert!(labels.contains("io.cri-containerd.kind"), "{labels}");

    node.remove_pod(&pod.id).await;
    assert_eq!(node.pods().await.len(), 1);
    assert_eq!(node.containers().await, []);
    node.remove_pod(&neighbour.id).await;
    node.assert_nothing_left();
}

async fn ports_of_the_host_lead_to_pods(node: Node) {
    let mut config = node.pod("p1");
    config.port_mappings =
        vec![PortMapping { container_port: 8080, host_port: 18080, ..PortMapping::default() }];
    let pod = node.run_pod(config.clone()).await;
    node.run(&pod, &echo()).await;
    wait_for("the port to answer", || node.connect(18080).is_ok());
    assert_eq!(echoed(node.connect(18080).unwrap()), "hello");
    assert!(node.connect(8080).is_err(), "the host itself has no such port");
    assert_eq!(node.network.mapped_ports().len(), 1);

    // A pod that takes its place has its port.
    node.remove_pod(&pod.id).await;
    assert!(node.connect(18080).is_err());
    node.assert_nothing_left();
    config.metadata.as_mut().unwrap().attempt = 1;
    let pod = node.run_pod(config).await;
    node.run(&pod, &echo()).await;
    wait_for("the port to answer", || node.connect(18080).is_ok());
    assert_eq!(echoed(node.connect(18080).unwrap()), "hello");
    node.remove_pod(&pod.id).await;
    node.assert_nothing_left();
}

async fn a_pod_may_be_in_the_hosts_network(node: Node) {
    let mut config = node.pod("p1");
    config.hostname = String::new();
    let options = |options: &mut proto::runtime::v1::NamespaceOption| {
        options.set_network(NamespaceMode::Node);
        options.set_ipc(NamespaceMode::Node);
        options.set_pid(NamespaceMode::Node);
    };
    let linux = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    options(linux.namespace_options.as_mut().unwrap());
    let pod = node.run_pod(config).await;
    let mut of_host = idle("c1");
    options(security(&mut of_host).namespace_options.as_mut().unwrap());
    let c1 = node.run(&pod, &of_host).await;
    assert_eq!(node.pod_status(&pod.id).await.network.unwrap_or_default().ip, "");
    assert_eq!(node.network.addresses(), Vec::<std::net::IpAddr>::new());
    let engine = PathBuf::from(format!("/proc/{}/ns", node.host.pid()));
    for namespace in ["net", "ipc", "uts", "pid"] {
        let own = node.sh(&c1, &format!("readlink /proc/self/ns/{namespace}")).await;
        let of_engine = fs::read_link(engine.join(namespace)).unwrap();
        // A pod in the host's network has the host's name, though not always its namespace.
        if namespace != "uts" {
            assert_eq!(own.trim(), of_engine.to_str().unwrap(), "{namespace}");
        }
    }
    assert_eq!(node.sh(&c1, "hostname").await, fs::read_to_string("/proc/sys/kernel/hostname").unwrap());
    node.remove_pod(&pod.id).await;
    node.assert_nothing_left();
}

async fn a_pod_may_have_one_namespace_of_process_ids(node: Node) {
    let mut config = node.pod("p1");
    let linux = config.linux.as_mut().unwrap().security_context.as_mut().unwrap();
    linux.namespace_options.as_mut().unwrap().set_pid(NamespaceMode::Pod);
    let pod = node.run_pod(config).await;
    let shared = |mut config: proto::runtime::v1::ContainerConfig| {
        security(&mut config).namespace_options.as_mut().unwrap().set_pid(NamespaceMode::Pod);
        config
    };
    let c1 = node.run(&pod, &shared(container("c1", &["sleep", "1111"]))).await;
    let c2 = node.run(&pod, &shared(idle("c2"))).await;
    assert!(node.sh(&c2, "ps -o args").await.contains("sleep 1111"));
    // What its parent has left is waited for by the pod's first process; that of the tests under containerd is no init.
    if node.host.kind == Kind::Gantry {
        node.sh(&c2, "(sh -c 'sleep 0.2 & echo $! > /tmp/orphan') & wait; sleep 0.5").await;
        until("the orphan to be gone", || async {
            node.exec(&c2, &["sh", "-c", "test -e /proc/$(cat /tmp/orphan)"]).await.code != 0
        })
        .await;
    }
    // The end of one ends nobody else.
    node.stop(&c1, 0).await;
    assert_eq!(node.status(&c2).await.state(), ContainerState::ContainerRunning);
    let again = node.run(&pod, &shared(container("c3", &["sleep", "2222"]))).await;
    assert!(node.sh(&c2, "ps -o args").await.contains("sleep 2222"));
    node.stop(&again, 0).await;
    node.remove_pod(&pod.id).await;
    node.assert_nothing_left();
}

fn run(program: &str, arguments: &[&str]) {
    let ended = std::process::Command::new(program).args(arguments).status();
    assert!(ended.unwrap().success(), "{program} {}", arguments.join(" "));
}

fn mount(container_path: &str, host_path: &std::path::Path) -> Mount {
    Mount {
        container_path: container_path.to_owned(),
        host_path: host_path.display().to_string(),
        ..Mount::default()
    }
}

async fn volumes_are_seen_on_both_sides(node: Node) {
    let volumes = node.host.folder().join("volumes");
    for name in ["data", "fixed", "below/late"] {
        fs::create_dir_all(volumes.join(name)).unwrap();
    }
    fs::write(volumes.join("fixed/file"), "from the host\n").unwrap();
    let below = volumes.join("below");
    run("mount", &["--bind", below.to_str().unwrap(), below.to_str().unwrap()]);
    run("mount", &["--make-shared", below.to_str().unwrap()]);
    fs::write(volumes.join("single"), "one file\n").unwrap();
    let pod = node.run_pod(node.pod("p1")).await;
    let mut config = idle("c1");
    config.mounts = vec![
        mount("/data", &volumes.join("data")),
        Mount { readonly: true, ..mount("/fixed", &volumes.join("fixed")) },
        mount("/etc/single", &volumes.join("single")),
        Mount {
            propagation: MountPropagation::PropagationHostToContainer.into(),
            ..mount("/below", &volumes.join("below"))
        },
    ];
    config.envs = vec![KeyValue { key: "MINE".into(), value: "a b".into() }];
    config.working_dir = "/data".into();
    let c1 = node.run(&pod, &config).await;
    assert_eq!(
        node.sh(&c1, "cat /fixed/file /etc/single; echo $MINE; pwd").await,
        "from the host\none file\na b\n/data\n"
    );
    assert_ne!(node.exec(&c1, &["touch", "/fixed/other"]).await.code, 0);
    node.sh(&c1, "echo from within > /data/file").await;
    assert_eq!(fs::read_to_string(volumes.join("data/file")).unwrap(), "from within\n");

    // Another container of the pod has the same volume, and it outlives both.
    let mut config = shell("c2", "cat /shared/file");
    config.mounts = vec![mount("/shared", &volumes.join("data"))];
    assert_eq!(node.run_to_end(&pod, config).await.stdout, "from within\n");
    let mounts = node.status(&c1).await.mounts;
    assert!(mounts.iter().any(|mount| mount.container_path == "/fixed" && mount.readonly), "{mounts:?}");

    // A mount that the host makes later shows up where that was asked for.
    let late = volumes.join("below/late");
    run("mount", &["-t", "tmpfs", "late", late.to_str().unwrap()]);
    fs::write(late.join("file"), "late\n").unwrap();
    let seen = node.exec(&c1, &["cat", "/below/late/file"]).await;
    run("umount", &[late.to_str().unwrap()]);
    assert_eq!(seen.stdout, "late\n");
    node.remove_pod(&pod.id).await;
    run("umount", &[below.to_str().unwrap()]);
    node.assert_nothing_left();
    assert!(volumes.join("data/file").exists());
}

async fn containers_run_as_who_they_are_told(node: Node) {
    let pod = node.run_pod(node.pod("p1")).await;
    let who = |name: &str| shell(name, "id -u; id -g; id -G; grep NoNewPrivs /proc/self/status | cut -f 2");
    assert_eq!(node.run_to_end(&pod, who("c1")).await.stdout, "0\n0\n0\n0\n");
    let mut config = who("c2");
    security(&mut config).run_as_user = Some(Int64Value { value: 1234 });
    security(&mut config).run_as_group = Some(Int64Value { value: 5678 });
    security(&mut config).supplemental_groups = vec![3000];
    security(&mut config).no_new_privs = true;
    assert_eq!(node.run_to_end(&pod, config).await.stdout, "1234\n5678\n5678 3000\n1\n");
    // The image knows this one, and its groups.
    let mut config = who("c3");
    security(&mut config).run_as_username = "app".into();
    assert_eq!(node.run_to_end(&pod, config).await.stdout, "1000\n1001\n1001 2000\n0\n");
    let mut config = who("c4");
    security(&mut config).run_as_username = "nobody-knows".into();
    assert!(node.try_create(&pod, &config).await.is_err());
    assert_eq!(node.containers().await, []);
    node.remove_pod(&pod.id).await;
}

async fn a_root_may_be_read_only_and_calls_may_be_filtered(node: Node) {
    let pod = node.run_pod(node.pod("p1")).await;
    let mut config = shell("c1", "touch /file; touch /dev/shm/file && echo but not all");
    security(&mut config).readonly_rootfs = true;
    let ended = node.run_to_end(&pod, config).await;
    assert!(ended.stderr.contains("Read-only") && ended.stdout == "but not all\n", "{ended:?}");

    let filtered = |name: &str, profile: ProfileType| {
        let mut config =
            shell(name, "grep Seccomp: /proc/self/status | cut -f 2; busybox unshare -U true && echo apart");
        security(&mut config).seccomp =
            Some(SecurityProfile { profile_type: profile.into(), ..SecurityProfile::default() });
        config
    };
    let ended = node.run_to_end(&pod, filtered("c2", ProfileType::RuntimeDefault)).await;
    assert!(ended.stdout == "2\n" && ended.stderr.contains("not permitted"), "{ended:?}");
    let ended = node.run_to_end(&pod, filtered("c3", ProfileType::Unconfined)).await;
    assert_eq!(ended.stdout, "0\napart\n", "{ended:?}");

    // A profile of the node's own.
    let profile = node.host.folder().join("profile.json");
    let text = r#"{"defaultAction": "SCMP_ACT_ALLOW", "syscalls": [{"names": ["mkdir", "mkdirat"], "action": "SCMP_ACT_ERRNO", "errnoRet": 28}]}"#;
    fs::write(&profile, text).unwrap();
    let mut config = shell("c4", "mkdir /tmp/folder; touch /tmp/file && echo made");
    security(&mut config).seccomp = Some(SecurityProfile {
        profile_type: ProfileType::Localhost.into(),
        localhost_ref: profile.display().to_string(),
    });
    let ended = node.run_to_end(&pod, config).await;
    assert!(ended.stdout == "made\n" && ended.stderr.contains("No space"), "{ended:?}");
    node.remove_pod(&pod.id).await;
}

async fn memory_that_runs_out_is_the_reason(node: Node) {
    let pod = node.run_pod(node.pod("p1")).await;
    let mut config = container("c1", &["tail", "/dev/zero"]);
    let limit = 32 << 20;
    config.linux.as_mut().unwrap().resources = Some(LinuxContainerResources {
        memory_limit_in_bytes: limit,
        memory_swap_limit_in_bytes: limit,
        ..LinuxContainerResources::default()
    });
    let c1 = node.run(&pod, &config).await;
    let status = node.ended(&c1).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "OOMKilled"), "{status:?}");
    assert!(status.finished_at > status.started_at && status.started_at >= status.created_at, "{status:?}");
    // The others of the pod are not touched, and others end for other reasons.
    for (name, command, code, reason) in [
        ("c2", "exit 0", 0, "Completed"),
        ("c3", "exit 3", 3, "Error"),
        ("c4", "sleep 100 & kill -9 $!; wait $!", 137, "Error"),
    ] {
        let id = node.run(&pod, &shell(name, command)).await;
        let status = node.ended(&id).await;
        assert_eq!((status.exit_code, status.reason.as_str()), (code, reason), "{status:?}");
        // containerd looks at the clock when the start has answered, and the end may have come before.
        let in_order = status.finished_at >= status.started_at || matches!(node.host.kind, Kind::Containerd);
        assert!(in_order, "{status:?}");
    }
    node.remove_pod(&pod.id).await;
    node.assert_nothing_left();
}

/// The text of a file of a container's cgroup: the first of these (controller, file) that there is.
fn cgroup_file(node: &Node, id: &str, files: [(&str, &str); 2]) -> String {
    let read = |(controller, file): (&str, &str)| {
        let top = std::path::Path::new("/sys/fs/cgroup").join(controller);
        fs::read_to_string(top.join(&node.host.namespace).join(id).join(file)).ok()
    };
    files.into_iter().find_map(read).unwrap_or_else(|| panic!("no {files:?} of {id}")).trim().to_owned()
}

async fn limits_change_while_it_runs(node: Node) {
    let pod = node.run_pod(node.pod("p1")).await;
    let mut config = idle("c1");
    let resources = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 64 << 20,
        ..LinuxContainerResources::default()
    };
    config.linux.as_mut().unwrap().resources = Some(resources.clone());
    let c1 = node.run(&pod, &config).await;
    let memory = || cgroup_file(&node, &c1, [("memory", "memory.limit_in_bytes"), ("", "memory.max")]);
    let quota = || cgroup_file(&node, &c1, [("cpu", "cpu.cfs_quota_us"), ("", "cpu.max")]);
    assert_eq!(memory(), (64 << 20).to_string());
    assert!(quota().starts_with("50000"), "{}", quota());
    let update = |change: LinuxContainerResources| UpdateContainerResourcesRequest {
        container_id: c1.clone(),
        linux: Some(change),
        ..UpdateContainerResourcesRequest::default()
    };
    let change =
        LinuxContainerResources { memory_limit_in_bytes: 128 << 20, ..LinuxContainerResources::default() };
    node.runtime.clone().update_container_resources(update(change)).await.unwrap();
    assert_eq!(memory(), (128 << 20).to_string());
    assert!(quota().starts_with("50000"), "what is not said stays: {}", quota());
    let change = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 20_000,
        ..LinuxContainerResources::default()
    };
    node.runtime.clone().update_container_resources(update(change)).await.unwrap();
    assert!(quota().starts_with("20000"), "{}", quota());
    if node.host.kind == Kind::Gantry {
        let told = node.status(&c1).await.resources.unwrap().linux.unwrap();
        assert_eq!((told.memory_limit_in_bytes, told.cpu_quota, told.cpu_shares), (128 << 20, 20_000, 512));
    }
    // A limit below what is in use is refused, and changes nothing.
    let change =
        LinuxContainerResources { memory_limit_in_bytes: 4096, ..LinuxContainerResources::default() };
    assert!(node.runtime.clone().update_container_resources(update(change)).await.is_err());
    assert_eq!(memory(), (128 << 20).to_string());
    node.remove_pod(&pod.id).await;
}

async fn a_stop_is_polite_at_first(node: Node) {
    let pod = node.run_pod(node.pod("p1")).await;
    let log = node.logs("p1");
    let polite = node
        .run(&pod, &shell("polite", "trap 'echo bye; exit 7' TERM; echo up; while :; do sleep 0.1; done"))
        .await;
    wait_for_log(&log.join("polite.log"), "up\n");
    let begun = Instant::now();
    node.stop(&polite, 50).await;
    assert!(begun.elapsed() < Duration::from_secs(20));
    assert_eq!(node.status(&polite).await.exit_code, 7);
    assert_eq!(logged(&log.join("polite.log")), "up\nbye\n");

    let stubborn =
        node.run(&pod, &shell("stubborn", "trap 'echo no' TERM; echo up; while :; do sleep 0.1; done")).await;
    wait_for_log(&log.join("stubborn.log"), "up\n");
    let begun = Instant::now();
    node.stop(&stubborn, 1).await;
    assert!(begun.elapsed() >= Duration::from_secs(1) && begun.elapsed() < Duration::from_secs(20));
    assert_eq!(node.status(&stubborn).await.exit_code, 137);
    assert_eq!(logged(&log.join("stubborn.log")), "up\nno\n");

    // Without any time it is not asked at all. One that has ended, or is not there, is no error.
    let asked =
        node.run(&pod, &shell("asked", "trap 'echo asked' TERM; echo up; while :; do sleep 0.1; done")).await;
    wait_for_log(&log.join("asked.log"), "up\n");
    node.stop(&asked, 0).await;
    assert_eq!(logged(&log.join("asked.log")), "up\n");
    node.stop(&asked, 10).await;
    node.remove(&asked).await;
    node.remove(&asked).await;
    node.remove_pod(&pod.id).await;
    // Debian's containerd knows no pod that is gone.
    if node.host.kind == Kind::Gantry {
        node.remove_pod(&pod.id).await;
    }
    node.assert_nothing_left();
}

async fn logs_have_the_kubelets_form(node: Node) {
    let pod = node.run_pod(node.pod("p1")).await;
    let command = "echo one; echo two >&2; echo; echo 'with  blanks '; head -c 40000 /dev/zero | tr '\\0' x; echo; printf end";
    let id = node.run(&pod, &shell("c1", command)).await;
    node.ended(&id).await;
    let path = node.logs("p1").join("c1.log");
    assert_eq!(node.status(&id).await.log_path, path.display().to_string());
    wait_for_log(&path, "end");
    let lines = log_lines(&path);
    let stdout: Vec<_> = lines.iter().filter(|line| line.stream == "stdout").collect();
    let long: String = stdout[3..stdout.len() - 1].iter().map(|line| line.text.as_str()).collect();
    assert_eq!(
        (stdout[0].text.as_str(), stdout[1].text.as_str(), stdout[2].text.as_str()),
        ("one", "", "with  blanks ")
    );
    assert_eq!(long, "x".repeat(40000));
    assert_eq!(stdout[3].text.len(), 16 << 10, "cut at the limit");
    let parts: Vec<bool> = stdout[3..].iter().map(|line| line.full).collect();
    assert_eq!(parts, [false, false, true, false], "the last has no newline");
    let stderr: Vec<_> = lines.iter().filter(|line| line.stream == "stderr").collect();
    assert_eq!((stderr.len(), stderr[0].text.as_str(), stderr[0].full), (1, "two", true));
    assert!(
        lines
            .windows(2)
            .all(|two| two[0].at.len() < 20 || two[0].at <= two[1].at || two[0].at[..19] == two[1].at[..19])
    );
    assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o640);
    node.remove(&id).await;
    assert!(path.exists(), "a log is the kubelet's");
    node.remove_pod(&pod.id).await;
}

async fn a_log_is_opened_again(node: Node) {
    let pod = node.run_pod(node.pod("p1")).await;
    let (path, rotated) = (node.logs("p1").join("c1.log"), node.logs("p1").join("c1.log.1"));
    let command = "i=0; while [ ! -e /tmp/enough ]; do i=$((i+1)); echo $i; sleep 0.01; done; echo last $i";
    let id = node.run(&pod, &shell("c1", command)).await;
    wait_for_log(&path, "5\n");
    fs::rename(&path, &rotated).unwrap();
    let reopen = async || {
        let request = ReopenContainerLogRequest { container_id: id.clone() };
        node.runtime.clone().reopen_container_log(request).await
    };
    let seen = fs::read_to_string(&rotated).unwrap().lines().count();
    wait_for("it to go on in the old file", || fs::read_to_string(&rotated).unwrap().lines().count() > seen);
    reopen().await.unwrap();
    wait_for("the new file", || path.exists());
    wait_for("it to go on in the new file", || fs::read_to_string(&path).unwrap().lines().count() > 5);
    // The container's end may be this command's, too.
    let _ = node.try_exec(&id, &["touch", "/tmp/enough"], 60).await;
    node.ended(&id).await;
    wait_for_log(&path, "last");
    let all: Vec<String> =
        [&rotated, &path].into_iter().flat_map(|file| log_lines(file)).map(|line| line.text).collect();
    let (last, numbers) = all.split_last().unwrap();
    let wanted: Vec<String> = (1..=numbers.len()).map(|number| number.to_string()).collect();
    assert_eq!(numbers, wanted);
    assert_eq!(*last, format!("last {}", numbers.len()));
    // It runs no more: no new log is made.
    fs::rename(&path, node.logs("p1").join("c1.log.2")).unwrap();
    assert!(reopen().await.is_err());
    assert!(!path.exists());
    node.remove_pod(&pod.id).await;
}

async fn commands_run_in_containers(node: Node) {
    let pod = node.run_pod(node.pod("p1")).await;
    let id = node.run(&pod, &idle("c1")).await;
    let ended = node.exec(&id, &["sh", "-c", "echo out; echo bad >&2; exit 3"]).await;
    assert_eq!((ended.code, ended.stdout.as_str(), ended.stderr.as_str()), (3, "out\n", "bad\n"));
    assert_eq!(
        node.sh(&id, "echo $FROM_IMAGE; pwd; cat").await,
        "yes\n/\n",
        "as the container is; without input"
    );
    let big = node.exec(&id, &["sh", "-c", "head -c 1000000 /dev/zero | tr '\\0' y"]).await;
    assert_eq!(big.stdout.len(), 1_000_000);
    let missing = node.try_exec(&id, &["no-such-program"], 10).await;
    assert!(missing.as_ref().is_err() || missing.as_ref().unwrap().code != 0, "{missing:?}");

    // One that takes too long is ended, with all that it has begun.
    let begun = Instant::now();
    let error = node.try_exec(&id, &["sh", "-c", "sleep 4321"], 1).await.unwrap_err();
    assert_eq!(error.code(), Code::DeadlineExceeded, "{error:?}");
    assert!(begun.elapsed() < Duration::from_secs(20));
    until("its process to be gone", || async { !node.sh(&id, "ps -o args").await.contains("sleep 4321") })
        .await;

    node.stop(&id, 0).await;
    assert!(node.try_exec(&id, &["true"], 10).await.is_err());
    assert_eq!(node.try_exec("0123456789abcdef", &["true"], 10).await.unwrap_err().code(), Code::NotFound);
    node.remove_pod(&pod.id).await;
}

/// All that comes over a WebSocket of Kubernetes, by channel.
async fn all_of(mut socket: WebSocketStream<tokio::net::TcpStream>) -> BTreeMap<u8, Vec<u8>> {
    let mut all = BTreeMap::<u8, Vec<u8>>::new();
    while let Some(Ok(message)) = tokio::time::timeout(LIMIT, socket.next()).await.unwrap() {
        if let Message::Binary(bytes) = message {
            all.entry(bytes[0]).or_default().extend(&bytes[1..]);
        }
    }
    all
}

async fn streams_are_opened_by_both_protocols(node: Node) {
    use proto::runtime::v1::{AttachRequest, ExecRequest, PortForwardRequest};
    let mut runtime = node.runtime.clone();
    let pod = node.run_pod(node.pod("p1")).await;
    let mut config = shell("c1", "while read line; do echo got $line; done; echo over");
    config.stdin = true;
    let reader = node.run(&pod, &config).await;
    let server = node.run(&pod, &echo()).await;
    let request = ExecRequest {
        container_id: server.clone(),
        cmd: ["sh", "-c", "cat; echo oops >&2; exit 7"].map(str::to_owned).into(),
        stdin: true,
        stdout: true,
        stderr: true,
        tty: false,
    };

    // A command, as kubectl has it through a kubelet.
    let url = runtime.exec(request.clone()).await.unwrap().into_inner().url;
    let mut client = Spdy::upgrade(node.open(&url), &url, &["v4.channel.k8s.io"]).await.unwrap();
    let streams = client.open_all(&["error", "stdin", "stdout", "stderr"]).await;
    client.send(streams["stdin"], b"hello\n", true).await;
    let all = client.all(&[streams["error"], streams["stdout"], streams["stderr"]]).await;
    let text = |kind: &str| String::from_utf8_lossy(&all[&streams[kind]]).into_owned();
    assert_eq!((text("stdout").as_str(), text("stderr").as_str()), ("hello\n", "oops\n"));
    assert!(
        text("error").contains("NonZeroExitCode") && text("error").contains("\"7\""),
        "{}",
        text("error")
    );

    // Its address was good for once. Over a WebSocket; the fifth version, which ends its input, is not known to containerd.
    assert!(Spdy::upgrade(node.open(&url), &url, &["v4.channel.k8s.io"]).await.is_err());
    let (protocol, cmd) = match node.host.kind {
        Kind::Gantry => ("v5.channel.k8s.io", "cat; echo oops >&2; exit 7"),
        Kind::Containerd => ("v4.channel.k8s.io", "read x; echo $x; echo oops >&2; exit 7"),
    };
    let cmd = ["sh", "-c", cmd].map(str::to_owned).into();
    let url = runtime.exec(ExecRequest { cmd, ..request }).await.unwrap().into_inner().url;
    let mut upgrade = url.replace("http://", "ws://").into_client_request().unwrap();
    upgrade.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
    let mut socket = client_async(upgrade, node.open(&url)).await.unwrap().0;
    socket.send(Message::binary(&b"\0hello\n"[..])).await.unwrap();
    if node.host.kind == Kind::Gantry {
        socket.send(Message::binary(&[255, 0][..])).await.unwrap();
    }
    let all = all_of(socket).await;
    assert_eq!((&all[&1][..], &all[&2][..]), (&b"hello\n"[..], &b"oops\n"[..]));
    assert!(String::from_utf8_lossy(&all[&3]).contains("NonZeroExitCode"), "{all:?}");

    // The container's own streams: they are joined and left, and its log has all of it.
    for (word, protocol) in [("first", "v4.channel.k8s.io"), ("second", "v4.channel.k8s.io")] {
        let request = AttachRequest {
            container_id: reader.clone(),
            stdin: true,
            stdout: true,
            stderr: true,
            tty: false,
        };
        let url = runtime.attach(request).await.unwrap().into_inner().url;
        let mut client = Spdy::upgrade(node.open(&url), &url, &[protocol]).await.unwrap();
        let streams = client.open_all(&["error", "stdin", "stdout", "stderr"]).await;
        client.send(streams["stdin"], format!("{word}\n").as_bytes(), false).await;
        assert_eq!(client.until(streams["stdout"], "\n").await, format!("got {word}\n"));
    }
    wait_for_log(&node.logs("p1").join("c1.log"), "got first\ngot second\n");
    assert_eq!(node.status(&reader).await.state(), ContainerState::ContainerRunning);

    // A port of the pod: a pair of streams for each connection.
    wait_for("the pod's port", || {
        let state = cgroup_file(&node, &server, [("pids", "cgroup.procs"), ("", "cgroup.procs")]);
        let pid = state.lines().next().unwrap().to_owned();
        // 1F90 is 8080, and 0A is LISTEN.
        fs::read_to_string(format!("/proc/{pid}/net/tcp6")).unwrap_or_default().contains(":1F90 ")
            || fs::read_to_string(format!("/proc/{pid}/net/tcp")).unwrap_or_default().contains(":1F90 ")
    });
    let request = PortForwardRequest { pod_sandbox_id: pod.id.clone(), port: vec![8080] };
    let url = runtime.port_forward(request).await.unwrap().into_inner().url;
    let mut client = Spdy::upgrade(node.open(&url), &url, &["portforward.k8s.io"]).await.unwrap();
    for id in ["0", "1"] {
        let headers = |kind| [("streamtype", kind), ("port", "8080"), ("requestid", id)];
        let error = client.open(&headers("error")).await;
        let data = client.open(&headers("data")).await;
        client.send(error, b"", true).await;
        client.send(data, b"through\n", true).await;
        let all = client.all(&[data]).await;
        assert_eq!(all[&data], b"through\n", "{all:?}");
    }
    node.remove_pod(&pod.id).await;
    node.assert_nothing_left();
}

async fn what_is_used_is_counted(node: Node) {
    use proto::runtime::v1::{ContainerStatsFilter, ContainerStatsRequest, ListContainerStatsRequest};
    let pod = node.run_pod(node.pod("p1")).await;
    let busy = node
        .run(&pod, &shell("busy", "dd if=/dev/zero of=/file bs=1M count=5 2>/dev/null; while :; do :; done"))
        .await;
    let calm = node.run(&pod, &idle("calm")).await;
    let stats = |id: &str| {
        let (mut runtime, request) =
            (node.runtime.clone(), ContainerStatsRequest { container_id: id.to_owned() });
        async move { runtime.container_stats(request).await.unwrap().into_inner().stats.unwrap() }
    };
    until("its file to be counted", || async {
        let layer = stats(&busy).await.writable_layer.unwrap_or_default();
        layer.used_bytes.is_some_and(|bytes| bytes.value >= 5 << 20) && layer.inodes_used.unwrap().value >= 1
    })
    .await;
    until("its processor time to be counted", || async {
        let cpu = stats(&busy).await.cpu.unwrap();
        cpu.usage_core_nano_seconds.unwrap().value > 200_000_000
            && cpu.usage_nano_cores.unwrap_or_default().value > 100_000_000
    })
    .await;
    let of_calm = stats(&calm).await;
    let attributes = of_calm.attributes.unwrap();
    assert_eq!((attributes.id.as_str(), attributes.metadata.unwrap().name.as_str()), (calm.as_str(), "calm"));
    assert_eq!(attributes.labels["container"], "calm");
    let memory = of_calm.memory.unwrap();
    let (working_set, usage) = (memory.working_set_bytes.unwrap().value, memory.usage_bytes.unwrap().value);
    assert!(working_set > 0 && working_set <= usage && memory.timestamp > 0, "{memory:?}");
    assert!(of_calm.cpu.unwrap().usage_core_nano_seconds.unwrap().value < 10_000_000_000);

    let list = |filter: Option<ContainerStatsFilter>| {
        let (mut runtime, request) = (node.runtime.clone(), ListContainerStatsRequest { filter });
        async move {
            let stats = runtime.list_container_stats(request).await.unwrap().into_inner().stats;
            let mut names: Vec<String> =
                stats.into_iter().map(|stats| stats.attributes.unwrap().metadata.unwrap().name).collect();
            names.sort();
            names.join(" ")
        }
    };
    let by = ContainerStatsFilter::default;
    assert_eq!(list(None).await, "busy calm");
    assert_eq!(list(Some(by())).await, "busy calm");
    assert_eq!(list(Some(ContainerStatsFilter { id: calm[..13].to_owned(), ..by() })).await, "calm");
    assert_eq!(
        list(Some(ContainerStatsFilter { pod_sandbox_id: pod.id.clone(), ..by() })).await,
        "busy calm"
    );
    let labels = [("container".to_owned(), "busy".to_owned())].into();
    assert_eq!(list(Some(ContainerStatsFilter { label_selector: labels, ..by() })).await, "busy");
    node.remove_pod(&pod.id).await;
    assert_eq!(list(None).await, "");
}

async fn metrics_are_as_they_are_described(node: Node) {
    use proto::runtime::v1::{
        ListMetricDescriptorsRequest, ListPodSandboxMetricsRequest, ListPodSandboxStatsRequest,
        PodSandboxStatsRequest, StreamContainerStatsRequest, StreamPodSandboxMetricsRequest,
        StreamPodSandboxStatsRequest,
    };
    let mut runtime = node.runtime.clone();
    // A group of its own, as a kubelet makes it.
    let mut config = node.pod("p1");
    config.linux.as_mut().unwrap().cgroup_parent = format!("/{}/p1", node.host.namespace);
    let pod = node.run_pod(config).await;
    let other = node.run_pod(node.pod("p2")).await;
    let c1 = node.run(&pod, &shell("c1", "echo x > /file; while :; do sleep 1000; done")).await;
    let c2 = node.run(&pod, &echo()).await;
    let address: SocketAddr = format!("{}:8080", node.address(&pod.id).await).parse().unwrap();
    wait_for("the pod's port", || node.network.connect(From::Host, address).is_ok());
    assert_eq!(echoed(node.network.connect(From::Host, address).unwrap()), "hello");

    let described =
        runtime.list_metric_descriptors(ListMetricDescriptorsRequest {}).await.unwrap().into_inner();
    let keys: BTreeMap<_, _> =
        described.descriptors.iter().map(|kind| (kind.name.as_str(), &kind.label_keys)).collect();
    let all = runtime
        .list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {})
        .await
        .unwrap()
        .into_inner()
        .pod_metrics;
    assert_eq!(all.len(), 2);
    let of_pod = all.iter().find(|metrics| metrics.pod_sandbox_id == pod.id).unwrap();
    assert_eq!(of_pod.container_metrics.len(), 2);
    let of_c1 = of_pod.container_metrics.iter().find(|metrics| metrics.container_id == c1).unwrap();
    for metric in of_pod.metrics.iter().chain(&of_c1.metrics) {
        let keys =
            keys.get(metric.name.as_str()).unwrap_or_else(|| panic!("{} is not described", metric.name));
        assert_eq!(keys.len(), metric.label_values.len(), "{metric:?}");
        let label = |key: &str| {
            let at = keys.iter().position(|of| of == key).unwrap();
            metric.label_values[at].as_str()
        };
        assert_eq!((label("pod"), label("namespace")), ("p1", "tests"), "{metric:?}");
    }
    let value = |metrics: &[proto::runtime::v1::Metric], name: &str| {
        let metric = metrics.iter().find(|metric| metric.name == name);
        metric.unwrap_or_else(|| panic!("no {name}")).value.unwrap().value
    };
    for name in ["container_threads", "container_processes"] {
        assert_eq!(value(&of_c1.metrics, name), 2, "{name}: a shell and its sleep");
    }
    for name in [
        "container_memory_usage_bytes",
        "container_memory_working_set_bytes",
        "container_file_descriptors",
        "container_fs_usage_bytes",
        "container_fs_limit_bytes",
        "container_fs_inodes_total",
        "container_last_seen",
        "container_start_time_seconds",
        "container_spec_cpu_shares",
        "container_spec_cpu_period",
    ] {
        assert!(value(&of_c1.metrics, name) > 0, "{name}");
    }
    assert!(value(&of_pod.metrics, "container_network_receive_bytes_total") > 100);
    assert!(value(&of_pod.metrics, "container_network_transmit_packets_total") > 1);
    assert!(value(&of_pod.metrics, "container_memory_usage_bytes") > 0, "of the pod's group");

    let stats =
        runtime.pod_sandbox_stats(PodSandboxStatsRequest { pod_sandbox_id: pod.id.clone() }).await.unwrap();
    let stats = stats.into_inner().stats.unwrap();
    let linux = stats.linux.unwrap();
    assert_eq!(stats.attributes.unwrap().metadata.unwrap().name, "p1");
    assert_eq!(linux.containers.len(), 2);
    assert_eq!(linux.process.unwrap().process_count.unwrap().value, 3);
    let default = linux.network.unwrap().default_interface.unwrap();
    assert!(default.name == "eth0" && default.rx_bytes.unwrap().value > 100, "{default:?}");
    let total = linux.cpu.unwrap().usage_core_nano_seconds.unwrap().value;
    let parts =
        linux.containers.iter().map(|stats| stats.cpu.unwrap().usage_core_nano_seconds.unwrap().value);
    assert!(total > 0 && parts.sum::<u64>() > 0);
    // One without a group of its own is the sum of nothing.
    let stats = runtime.list_pod_sandbox_stats(ListPodSandboxStatsRequest { filter: None }).await.unwrap();
    assert_eq!(stats.into_inner().stats.len(), 2);

    let mut stream = runtime
        .stream_container_stats(StreamContainerStatsRequest { filter: None })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().container_stats.len(), 2);
    assert!(stream.message().await.unwrap().is_none());
    let mut stream = runtime
        .stream_pod_sandbox_stats(StreamPodSandboxStatsRequest { filter: None })
        .await
        .unwrap()
        .into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().pod_sandbox_stats.len(), 2);
    let mut stream =
        runtime.stream_pod_sandbox_metrics(StreamPodSandboxMetricsRequest {}).await.unwrap().into_inner();
    assert_eq!(stream.message().await.unwrap().unwrap().pod_sandbox_metrics.len(), 2);

    node.stop(&c2, 0).await;
    let all = runtime
        .list_pod_sandbox_metrics(ListPodSandboxMetricsRequest {})
        .await
        .unwrap()
        .into_inner()
        .pod_metrics;
    assert_eq!(all.iter().map(|metrics| metrics.container_metrics.len()).sum::<usize>(), 1);
    node.remove_pod(&pod.id).await;
    node.remove_pod(&other.id).await;
    // The kubelet's group goes with the kubelet's pod.
    for hierarchy in fs::read_dir("/sys/fs/cgroup")
        .unwrap()
        .flatten()
        .map(|entry| entry.path())
        .chain(["/sys/fs/cgroup".into()])
    {
        let _ = fs::remove_dir(hierarchy.join(&node.host.namespace).join("p1"));
    }
    node.assert_nothing_left();
}

async fn images_are_volumes(node: Node) {
    let name = "docker.io/library/files:latest";
    let layer = Layer::default()
        .folder("top", 0o755)
        .file("top/file", 0o644, b"from an image\n")
        .folder("top/below", 0o755)
        .file("top/below/deep", 0o644, b"deep\n")
        .finish();
    node.import(&image::image(name, &["none"], &[layer]), name).await;
    let pod = node.run_pod(node.pod("p1")).await;
    let volume = |container_path: &str, sub_path: &str| Mount {
        container_path: container_path.to_owned(),
        image: Some(ImageSpec { image: name.to_owned(), ..ImageSpec::default() }),
        image_sub_path: sub_path.to_owned(),
        readonly: true,
        ..Mount::default()
    };
    let mut config = idle("c1");
    config.mounts = vec![volume("/whole", ""), volume("/part", "top/below")];
    config.mounts[0].mount_options = vec!["noexec".into()];
    let c1 = node.run(&pod, &config).await;
    let status = node.runtime.clone().status(StatusRequest { verbose: false }).await.unwrap().into_inner();
    assert!(status.features.unwrap().mount_options);
    for (path, bound) in [("/whole", true), ("/part", false)] {
        let options = node.sh(&c1, &format!("grep ' {path} ' /proc/mounts")).await;
        assert_eq!(options.contains("noexec"), bound, "{options}");
    }
    assert_eq!(node.sh(&c1, "cat /whole/top/file /part/deep").await, "from an image\ndeep\n");
    assert_ne!(node.exec(&c1, &["touch", "/whole/other"]).await.code, 0);
    let mounts = node.status(&c1).await.mounts;
    let whole = mounts.iter().find(|mount| mount.container_path == "/whole").unwrap();
    assert!(!whole.image.as_ref().unwrap().image.is_empty(), "{whole:?}");
    // A second container has the same image, and the first may go.
    let mut config = shell("c2", "cat /whole/top/file");
    config.mounts = vec![volume("/whole", "")];
    assert_eq!(node.run_to_end(&pod, config).await.stdout, "from an image\n");
    assert_eq!(node.sh(&c1, "cat /whole/top/file").await, "from an image\n");
    let mut config = idle("c3");
    config.mounts = vec![volume("/part", "top/absent")];
    assert!(node.try_create(&pod, &config).await.is_err());
    let mut config = idle("c4");
    config.mounts = vec![volume("/part", "../../etc")];
    assert!(node.try_create(&pod, &config).await.is_err());
    assert_eq!(node.containers().await.len(), 1);
    node.remove_pod(&pod.id).await;
    node.assert_nothing_left();
}

async fn lists_come_in_pieces_too(node: Node) {
    use proto::runtime::v1::{
        ContainerFilter, PodSandboxFilter, StreamContainersRequest, StreamPodSandboxesRequest,
        UpdatePodSandboxResourcesRequest,
    };
    let mut runtime = node.runtime.clone();
    let (pod, other) = (node.run_pod(node.pod("p1")).await, node.run_pod(node.pod("p2")).await);
    let container = node.run(&pod, &idle("c1")).await;
    let elsewhere = node.run(&other, &idle("c1")).await;
    let one = PodSandboxFilter { id: pod.id.clone(), ..PodSandboxFilter::default() };
    for (filter, mut expected) in [(None, vec![&pod.id, &other.id]), (Some(one), vec![&pod.id])] {
        let request = StreamPodSandboxesRequest { filter };
        let mut stream = runtime.stream_pod_sandboxes(request).await.unwrap().into_inner();
        let pods = stream.message().await.unwrap().unwrap().pod_sandboxes;
        let mut found: Vec<_> = pods.iter().map(|pod| &pod.id).collect();
        found.sort();
        expected.sort();
        assert_eq!(found, expected);
        assert!(stream.message().await.unwrap().is_none());
    }
    let one = ContainerFilter { pod_sandbox_id: other.id.clone(), ..ContainerFilter::default() };
    let none = ContainerFilter { pod_sandbox_id: "none".into(), ..ContainerFilter::default() };
    for (filter, mut expected) in
        [(None, vec![&container, &elsewhere]), (Some(one), vec![&elsewhere]), (Some(none), vec![])]
    {
        let request = StreamContainersRequest { filter };
        let mut stream = runtime.stream_containers(request).await.unwrap().into_inner();
        let containers = stream.message().await.unwrap().unwrap_or_default().containers;
        let mut found: Vec<_> = containers.iter().map(|container| &container.id).collect();
        found.sort();
        expected.sort();
        assert_eq!(found, expected);
        assert!(stream.message().await.unwrap().is_none());
    }

    // What the kubelet says of a pod's resources is noted, of one that is there.
    let said = |id: &str| UpdatePodSandboxResourcesRequest {
        pod_sandbox_id: id.to_owned(),
        overhead: None,
        resources: Some(LinuxContainerResources { cpu_shares: 512, ..LinuxContainerResources::default() }),
    };
    runtime.update_pod_sandbox_resources(said(&pod.id)).await.unwrap();
    let unknown = runtime.update_pod_sandbox_resources(said("none")).await.unwrap_err();
    assert_eq!(unknown.code(), Code::NotFound, "{unknown:?}");
    node.remove_all().await;
    node.assert_nothing_left();
}

async fn groups_of_the_image_may_be_left_out(node: Node) {
    let pod = node.run_pod(node.pod("p1")).await;
    let mut config = idle("c1");
    security(&mut config).run_as_username = "app".into();
    security(&mut config).supplemental_groups = vec![3000];
    security(&mut config).set_supplemental_groups_policy(SupplementalGroupsPolicy::Strict);
    security(&mut config).namespace_options = Some(namespaces());
    let c1 = node.run(&pod, &config).await;
    assert_eq!(node.sh(&c1, "id -G").await, "1001 3000\n");
    let user = node.status(&c1).await.user.unwrap().linux.unwrap();
    assert_eq!((user.uid, user.gid, user.supplemental_groups), (1000, 1001, vec![1001, 3000]));
    node.remove_pod(&pod.id).await;
}
