//! Pods and an engine that is killed: nothing half made is left, nothing that runs is lost, no line of a log is lost or
//! doubled. And what a kubelet asks for twice happens once.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use futures::future::join_all;
use proto::runtime::v1::{
    ContainerEventType, ContainerState, GetEventsRequest, PodSandboxConfig, ReopenContainerLogRequest,
    StartContainerRequest, StopPodSandboxRequest,
};
use tests::cri::{Node, Pod, idle, log_lines, shell, until, wait_for_log};
use tests::host::{Kind, RUNC, STOCK_CTR};
use tests::image::BUSYBOX;
use tests::network::{IP, IPTABLES, PLUGINS};
use tests::{LIMIT, ready, wait_for};
use tonic::Code;

async fn node() -> Option<Node> {
    if ready(&[STOCK_CTR, RUNC, BUSYBOX, IP, IPTABLES, &format!("{PLUGINS}/bridge")]) {
        Some(Node::start(Kind::Gantry).await)
    } else {
        None
    }
}

/// What the addresses of all ready pods are, and what is given out.
async fn addresses(node: &Node) -> (BTreeSet<String>, BTreeSet<String>) {
    let mut of_pods = BTreeSet::new();
    for (pod, ready) in node.pods().await {
        if ready {
            of_pods.insert(node.address(&pod).await);
        }
    }
    (of_pods, node.network.addresses().iter().map(ToString::to_string).collect())
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn fifty_pods_are_there_after_a_kill() {
    let Some(mut node) = node().await else { return };
    const PODS: usize = 50;
    const AT_A_TIME: usize = 8;
    let configs: Vec<PodSandboxConfig> = (0..PODS).map(|number| node.pod(&format!("p{number}"))).collect();
    let mut made: Vec<(Pod, String)> = Vec::new();
    for some in configs.chunks(AT_A_TIME) {
        let run = some.iter().map(|config| async {
            let pod = node.run_pod(config.clone()).await;
            let container = node.run(&pod, &idle("c1")).await;
            (pod, container)
        });
        made.extend(join_all(run).await);
    }
    let (before, given) = addresses(&node).await;
    assert_eq!((before.len(), &before), (PODS, &given));

    node.host.kill();
    // One ends while nobody looks.
    let (_, ended) = &made[7];
    let group =
        tests::left::cgroups(&node.host.namespace).into_iter().find(|path| path.ends_with(ended)).unwrap();
    let processes = fs::read_to_string(group.join("cgroup.procs")).unwrap();
    for pid in processes.lines().filter_map(|line| line.parse().ok()) {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    node.start_again().await;

    let pods = node.pods().await;
    assert_eq!(pods.len(), PODS);
    assert!(pods.iter().all(|(_, ready)| *ready), "{pods:?}");
    assert_eq!(addresses(&node).await, (before, given));
    until("the end of one to be known", || async {
        node.status(ended).await.state() == ContainerState::ContainerExited
    })
    .await;
    let status = node.status(ended).await;
    assert_eq!((status.exit_code, status.reason.as_str()), (137, "Error"), "{status:?}");
    for (_, container) in made.iter().filter(|(_, container)| container != ended) {
        assert_eq!(node.status(container).await.state(), ContainerState::ContainerRunning, "{container}");
    }
    let (pod, container) = &made[3];
    assert_eq!(node.sh(container, "hostname").await, "p3\n");
    // A container may join an old pod, and its name is known to the new engine.
    let late = node.run(pod, &shell("late", "exit 5")).await;
    assert_eq!(node.ended(&late).await.exit_code, 5);

    for some in made.chunks(AT_A_TIME) {
        join_all(some.iter().map(|(pod, _)| node.remove_pod(&pod.id))).await;
    }
    assert_eq!((node.pods().await, node.containers().await), (vec![], vec![]));
    node.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn nothing_half_made_is_left_by_a_kill() {
    const ROUNDS: u64 = 16;
    let Some(mut node) = node().await else { return };
    let seed = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().subsec_nanos();
    println!("seed {seed}");
    let mut random = u64::from(seed) | 1;
    for round in 0..ROUNDS {
        let config = node.pod(&format!("p{round}"));
        let mut runtime = node.runtime.clone();
        // The kubelet's verbs, one after the other, each as far as it comes.
        let (asked, container) = (config.clone(), idle("c1"));
        let verbs = tokio::spawn(async move {
            use proto::runtime::v1::{CreateContainerRequest, RunPodSandboxRequest};
            let request =
                RunPodSandboxRequest { config: Some(asked.clone()), runtime_handler: String::new() };
            let pod_sandbox_id = runtime.run_pod_sandbox(request).await?.into_inner().pod_sandbox_id;
            let request = CreateContainerRequest {
                pod_sandbox_id: pod_sandbox_id.clone(),
                config: Some(container),
                sandbox_config: Some(asked),
            };
            let container_id = runtime.create_container(request).await?.into_inner().container_id;
            runtime.start_container(StartContainerRequest { container_id }).await?;
            runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id }).await?;
            Ok::<_, tonic::Status>(())
        });
        random ^= random << 13;
        random ^= random >> 7;
        random ^= random << 17;
        let moment = Duration::from_millis(random % 700);
        tokio::time::sleep(moment).await;
        node.host.kill();
        let done = verbs.await.unwrap();
        println!(
            "round {round}: killed after {moment:?}: {:?}",
            done.map_err(|status| status.message().to_owned())
        );
        node.start_again().await;

        // What is said to be there is there, and nothing else.
        until("half a pod to be gone", || async {
            let (of_pods, given) = addresses(&node).await;
            of_pods == given || node.pods().await.iter().any(|(_, ready)| !ready)
        })
        .await;
        let pods = node.pods().await;
        assert!(pods.len() <= 1, "{pods:?}");
        for (container, pod) in node.containers().await {
            assert!(pods.iter().any(|(id, _)| *id == pod), "{container} has no pod");
            assert_ne!(node.status(&container).await.state(), ContainerState::ContainerUnknown);
        }
        match &pods[..] {
            // The name is free, or still that pod's.
            [] => {
                node.assert_nothing_left();
                let pod = node.run_pod(config).await;
                node.run(&pod, &idle("c1")).await;
            }
            [(id, true)] => {
                let pod = node.run_pod(config).await;
                assert_eq!(pod.id, *id);
                // One that has been started is not made again by the same name.
                let there = node.containers().await;
                let container = match there.first() {
                    Some((id, _)) if node.status(id).await.state() != ContainerState::ContainerCreated => {
                        id.clone()
                    }
                    _ => node.create(&pod, &idle("c1")).await,
                };
                if node.status(&container).await.state() == ContainerState::ContainerCreated {
                    node.begin(&container).await;
                }
                assert_eq!(node.sh(&container, "hostname").await, format!("p{round}\n"));
            }
            _ => {}
        }
        node.remove_all().await;
        assert_eq!((node.pods().await, node.containers().await), (vec![], vec![]));
        node.assert_nothing_left();
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn no_line_of_a_log_is_lost_or_doubled() {
    const LINES: usize = 100_000;
    let Some(mut node) = node().await else { return };
    let pod = node.run_pod(node.pod("p1")).await;
    let folder = node.logs("p1");
    let path = folder.join("c1.log");
    // It takes some seconds, so that all that follows happens meanwhile.
    let command = "for i in $(seq 0 199); do seq $((i*500+1)) $((i*500+500)); sleep 0.05; done";
    let id = node.run(&pod, &shell("c1", command)).await;
    wait_for_log(&path, "10\n");
    let mut rotated: Vec<PathBuf> = Vec::new();
    let running = async |node: &Node| node.status(&id).await.state() == ContainerState::ContainerRunning;
    let mut kills = 0;
    while running(&node).await {
        let old = folder.join(format!("c1.log.{}", rotated.len()));
        fs::rename(&path, &old).unwrap();
        rotated.push(old);
        // Twice, the engine dies with the log renamed and not yet opened again.
        if [3, 6].contains(&rotated.len()) {
            node.host.kill();
            kills += 1;
            let written = fs::metadata(rotated.last().unwrap()).unwrap().len();
            wait_for("the log to go on without an engine", || {
                fs::metadata(rotated.last().unwrap()).unwrap().len() > written
            });
            node.start_again().await;
        }
        let request = ReopenContainerLogRequest { container_id: id.clone() };
        if let Err(error) = node.runtime.clone().reopen_container_log(request).await {
            // The only reason there may be.
            assert_eq!(error.code(), Code::FailedPrecondition, "{error:?}");
            assert!(!running(&node).await, "{error:?}");
            break;
        }
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    assert_eq!(kills, 2, "it ended too soon: {} rotations", rotated.len());
    node.ended(&id).await;
    let files = || rotated.iter().chain([&path]).filter(|file| file.exists());
    wait_for("the last line", || {
        files().any(|file| fs::read_to_string(file).unwrap().ends_with(&format!(" {LINES}\n")))
    });
    let mut next = 1;
    for file in files() {
        for line in log_lines(file) {
            assert_eq!(line.text, next.to_string(), "{}", file.display());
            next += 1;
        }
    }
    assert_eq!(next, LINES + 1);
    println!("{} files", rotated.len() + 1);
    node.remove_pod(&pod.id).await;
    node.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_is_asked_twice_happens_once() {
    let Some(node) = node().await else { return };
    let many = 0..8;
    let same = |ids: Vec<String>| {
        assert!(ids.iter().all(|id| *id == ids[0]), "{ids:?}");
        ids[0].clone()
    };
    let config = node.pod("p1");
    let id = same(join_all(many.clone().map(|_| async { node.run_pod(config.clone()).await.id })).await);
    assert_eq!(node.run_pod(config.clone()).await.id, id);
    assert_eq!(node.network.addresses().len(), 1);
    let pod = Pod { id: id.clone(), config };
    let asked = shell("c1", "echo started >> /tmp/times; trap 'exit 0' TERM; while :; do sleep 0.1; done");
    let container = same(join_all(many.clone().map(|_| node.create(&pod, &asked))).await);
    assert_eq!(node.create(&pod, &asked).await, container);
    join_all(many.clone().map(|_| node.begin(&container))).await;
    node.begin(&container).await;
    assert_eq!(node.sh(&container, "cat /tmp/times").await, "started\n");
    assert_eq!((node.pods().await.len(), node.containers().await.len()), (1, 1));
    join_all(many.clone().map(|_| node.stop(&container, 10))).await;
    assert_eq!(node.status(&container).await.exit_code, 0);
    join_all(many.clone().map(|_| node.remove(&container))).await;
    assert_eq!(node.containers().await, []);
    // Its name is free for another.
    assert_ne!(node.run(&pod, &asked).await, container);
    join_all(many.map(|_| node.remove_pod(&id))).await;
    assert_eq!((node.pods().await, node.containers().await), (vec![], vec![]));
    node.assert_nothing_left();
    // And so is the pod's.
    let pod = node.run_pod(pod.config).await;
    assert_ne!(pod.id, id);
    node.remove_pod(&pod.id).await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_client_that_goes_away_ends_nothing() {
    let Some(node) = node().await else { return };
    let config = node.pod("p1");
    // It gives up before there is a pod; who asks again joins it, or finds it.
    let gone = tokio::time::timeout(Duration::from_millis(20), node.try_run_pod(&config)).await;
    let pod = node.run_pod(config).await;
    assert!(gone.is_err() || gone.unwrap().unwrap() == pod.id);
    assert_eq!(node.pods().await, [(pod.id.clone(), true)]);
    assert_eq!(node.network.addresses().len(), 1);
    let gone = tokio::time::timeout(Duration::from_millis(20), node.try_create(&pod, &idle("c1"))).await;
    let container = node.create(&pod, &idle("c1")).await;
    assert!(gone.is_err() || gone.unwrap().unwrap() == container);
    drop(tokio::time::timeout(Duration::from_millis(5), node.try_begin(&container)).await);
    until("it to run", || async {
        node.status(&container).await.state() == ContainerState::ContainerRunning
    })
    .await;
    drop(tokio::time::timeout(Duration::from_millis(5), node.stop(&container, 30)).await);
    assert_eq!(node.ended(&container).await.exit_code, 0);
    node.remove_pod(&pod.id).await;
    node.assert_nothing_left();
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn events_reach_every_client() {
    let Some(node) = node().await else { return };
    let mut clients = Vec::new();
    for _ in 0..2 {
        let mut runtime = tests::cri::runtime(&node.host.address()).await;
        let mut stream = runtime.get_container_events(GetEventsRequest {}).await.unwrap().into_inner();
        clients.push(tokio::spawn(async move {
            let mut seen = Vec::new();
            loop {
                let event = tokio::time::timeout(LIMIT, stream.message()).await.unwrap().unwrap().unwrap();
                let kind = event.container_event_type();
                let states: Vec<_> = event.containers_statuses.iter().map(|status| status.state()).collect();
                seen.push((event.container_id.clone(), kind, states));
                assert!(event.created_at > 0);
                // The pod's end is the last.
                let gone = |(id, kind, _): &(String, ContainerEventType, _)| {
                    *kind == ContainerEventType::ContainerDeletedEvent && *id == seen[0].0
                };
                if gone(&seen[seen.len() - 1]) {
                    return seen;
                }
            }
        }));
    }
    let pod = node.run_pod(node.pod("p1")).await;
    let container = node.run(&pod, &shell("c1", "sleep 0.3; exit 4")).await;
    node.ended(&container).await;
    node.remove(&container).await;
    node.remove_pod(&pod.id).await;
    for client in clients {
        use ContainerEventType::{
            ContainerCreatedEvent as Created, ContainerDeletedEvent as Deleted,
            ContainerStartedEvent as Started, ContainerStoppedEvent as Stopped,
        };
        let seen = client.await.unwrap();
        let of = |wanted: &str| {
            seen.iter().filter(|(id, ..)| id == wanted).map(|(_, kind, _)| *kind).collect::<Vec<_>>()
        };
        assert_eq!(of(&pod.id), [Created, Started, Stopped, Deleted], "{seen:?}");
        assert_eq!(of(&container), [Created, Started, Stopped, Deleted], "{seen:?}");
        let stopped = seen.iter().find(|(id, kind, _)| *id == container && *kind == Stopped).unwrap();
        assert_eq!(stopped.2, [ContainerState::ContainerExited], "{seen:?}");
    }
    node.assert_nothing_left();
}
