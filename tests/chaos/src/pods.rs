//! Kill points of what kubelets ask for: pods and their containers, with their shim, their network and their logs.
//!
//! As in kills.rs: a verb is traced once, then done with each of its points armed. What was acknowledged before is there
//! after the kill, what was half made is gone or can be asked for again, and after the removal of all nothing is left: no
//! address, no port, no namespace, no mount, no process.

use std::time::Duration;

use futures::FutureExt as _;
use futures::future::BoxFuture;
use harness::client::Ctr;
use harness::cri::{NAMESPACE, Node, Pod, idle, until};
use harness::host::{Kind, RUNC, STOCK_CTR};
use harness::image::BUSYBOX;
use harness::network::{IP, IPTABLES, PLUGINS};
use harness::{ready, wait_for};
use proto::runtime::v1::{
    ContainerState, ContainerStatusRequest, RemoveContainerRequest, RemovePodSandboxRequest,
    StopContainerRequest, StopPodSandboxRequest,
};

use tonic::Status;

use crate::kills::{LATE, chosen, fired, has_ended};
use crate::points::{self, Action, Point};
use crate::run::{Outcome, Run};
use crate::{check, state};

/// How long one call of a verb may take.
const CALL_MAX: Duration = Duration::from_secs(60);

/// Our client, where the kubelet's objects are.
fn ours(node: &Node) -> Ctr {
    let mut ctr = node.host.ctr();
    ctr.namespace = NAMESPACE.into();
    ctr
}

/// What a verb is done to.
#[derive(Default, Clone)]
struct Made {
    pod: Option<Pod>,
    container: Option<String>,
}

/// How far what a verb is done to has come before it.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Nothing,
    Pod,
    Created,
    Running,
    Stopped,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Verb {
    Run,
    Create,
    Start,
    Exec,
    Stop,
    Remove,
    StopPod,
    RemovePod,
}

const VERBS: [(&str, Verb, Stage); 8] = [
    ("pod-run", Verb::Run, Stage::Nothing),
    ("pod-container-create", Verb::Create, Stage::Pod),
    ("pod-container-start", Verb::Start, Stage::Created),
    ("pod-container-exec", Verb::Exec, Stage::Running),
    ("pod-container-stop", Verb::Stop, Stage::Running),
    ("pod-container-remove", Verb::Remove, Stage::Stopped),
    ("pod-stop", Verb::StopPod, Stage::Running),
    ("pod-remove", Verb::RemovePod, Stage::Running),
];

struct World {
    // Dropped last: it runs what the node needs for its end.
    node: Node,
    runtime: tokio::runtime::Runtime,
}

impl World {
    fn new() -> Self {
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let node = runtime.block_on(Node::start(Kind::Gantry));
        World { node, runtime }
    }
}

async fn prepare(node: &Node, stage: Stage) -> Made {
    let mut made = Made::default();
    if stage >= Stage::Pod {
        made.pod = Some(node.run_pod(node.pod("p1")).await);
    }
    if let Some(pod) = made.pod.as_ref().filter(|_| stage >= Stage::Created) {
        let container = node.create(pod, &idle("c1")).await;
        if stage >= Stage::Running {
            node.begin(&container).await;
        }
        if stage >= Stage::Stopped {
            node.stop(&container, 0).await;
        }
        made.container = Some(container);
    }
    made
}

/// Asks; whether it was acknowledged.
async fn act(node: &Node, verb: Verb, made: &mut Made) -> bool {
    let asked = act_now(node, verb, made);
    tokio::time::timeout(CALL_MAX, asked).await.expect("a call that hangs")
}

fn act_now<'a>(node: &'a Node, verb: Verb, made: &'a mut Made) -> BoxFuture<'a, bool> {
    async move {
        let mut runtime = node.runtime.clone();
        let container = made.container.clone().unwrap_or_default();
        let pod_sandbox_id = made.pod.as_ref().map(|pod| pod.id.clone()).unwrap_or_default();
        match verb {
            Verb::Run => {
                let config = node.pod("p1");
                let made_pod = node.try_run_pod(&config).await;
                made_pod.map(|id| made.pod = Some(Pod { id, config })).is_ok()
            }
            Verb::Create => {
                let created = node.try_create(made.pod.as_ref().unwrap(), &idle("c1")).await;
                created.map(|id| made.container = Some(id)).is_ok()
            }
            Verb::Start => node.try_begin(&container).await.is_ok(),
            Verb::Exec => node.try_exec(&container, &["true"], 20).await.is_ok_and(|ended| ended.code == 0),
            Verb::Stop => {
                let request = StopContainerRequest { container_id: container, timeout: 1 };
                runtime.stop_container(request).await.is_ok()
            }
            Verb::Remove => {
                runtime.remove_container(RemoveContainerRequest { container_id: container }).await.is_ok()
            }
            Verb::StopPod => runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id }).await.is_ok(),
            Verb::RemovePod => {
                let stop = StopPodSandboxRequest { pod_sandbox_id: pod_sandbox_id.clone() };
                runtime.stop_pod_sandbox(stop).await.is_ok()
                    && runtime.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id }).await.is_ok()
            }
        }
    }
    .boxed()
}

/// Looks whether what was acknowledged is there: what the verb was done to, and what it did.
async fn verify(node: &Node, verb: Verb, made: &Made, acknowledged: bool, shim_died: bool) {
    let (pods, containers) = (node.pods().await, node.containers().await);
    assert!(pods.len() <= 1 && containers.len() <= 1, "{pods:?} {containers:?}");
    let pod_ready = pods.first().is_some_and(|(_, ready)| *ready);
    let state = match containers.first() {
        Some((id, _)) => Some(node.status(id).await.state()),
        None => None,
    };
    assert_ne!(state, Some(ContainerState::ContainerUnknown));
    // A pod that a removal has begun to take away may be gone.
    if made.pod.is_some() && verb != Verb::RemovePod {
        assert_eq!(pods.len(), 1, "a pod is lost");
        assert!(pod_ready || shim_died || verb == Verb::StopPod, "a pod is not ready any more");
    }
    if made.container.is_some() && !matches!(verb, Verb::Remove | Verb::RemovePod) {
        assert_eq!(containers.len(), 1, "a container is lost");
    }
    if !acknowledged {
        return;
    }
    match verb {
        Verb::Run => assert!(pod_ready || shim_died),
        Verb::Create => assert!(state.is_some()),
        Verb::Start | Verb::Exec => {
            assert!(shim_died || state == Some(ContainerState::ContainerRunning), "{state:?}");
        }
        Verb::Stop => assert_eq!(state, Some(ContainerState::ContainerExited)),
        Verb::Remove => assert_eq!(state, None, "a removed container is back"),
        Verb::StopPod => assert!(!pod_ready),
        Verb::RemovePod => assert!(pods.is_empty(), "a removed pod is back"),
    }
}

/// Does as a kubelet does that finds things as they are: what is not as wanted is removed, then all is made anew.
async fn again(node: &Node, verb: Verb, made: &Made) {
    match verb {
        Verb::Stop | Verb::Remove | Verb::StopPod | Verb::RemovePod => {
            until("the verb to be done", || {
                let mut made = made.clone();
                async move { act(node, verb, &mut made).await }
            })
            .await;
        }
        Verb::Run | Verb::Create | Verb::Start | Verb::Exec => {
            // That a shim is gone may become known between two calls: whatever fails is looked at anew.
            until("all to be there again", || async { make_anew(node).await.unwrap_or(false) }).await;
        }
    }
}

/// Removes what is not as wanted, and makes what is missing; whether all is there and works.
async fn make_anew(node: &Node) -> Result<bool, Status> {
    for (pod, _) in node.pods().await.iter().filter(|(_, ready)| !ready) {
        node.try_remove_pod(pod).await?;
    }
    let mut runtime = node.runtime.clone();
    for (container_id, _) in node.containers().await {
        let request = ContainerStatusRequest { container_id: container_id.clone(), verbose: false };
        let status = runtime.container_status(request).await?.into_inner().status.unwrap_or_default();
        if status.state() == ContainerState::ContainerExited {
            runtime.remove_container(RemoveContainerRequest { container_id }).await?;
        }
    }
    let config = node.pod("p1");
    let pod = Pod { id: node.try_run_pod(&config).await?, config };
    let container = match node.containers().await.first() {
        Some((id, _)) => id.clone(),
        None => node.try_create(&pod, &idle("c1")).await?,
    };
    let request = ContainerStatusRequest { container_id: container.clone(), verbose: false };
    let status = runtime.container_status(request).await?.into_inner().status.unwrap_or_default();
    if status.state() == ContainerState::ContainerCreated {
        node.try_begin(&container).await?;
    }
    let ended = node.try_exec(&container, &["hostname"], 20).await?;
    Ok(ended.code == 0 && ended.stdout == "p1\n")
}

async fn clean(node: &Node) {
    until("all pods to be removed", || async {
        for (pod, _) in node.pods().await {
            let _ = node.try_remove_pod(&pod).await;
        }
        node.pods().await.is_empty()
    })
    .await;
    assert_eq!(node.containers().await, []);
}

pub(crate) fn all(run: &mut Run) {
    for (name, verb, stage) in VERBS {
        let prefix = format!("kill/{name}/");
        if !run.wants_of(&prefix) {
            continue;
        }
        if !ready(&[STOCK_CTR, RUNC, BUSYBOX, IP, IPTABLES, &format!("{PLUGINS}/bridge")]) {
            run.skip(&prefix, "programs are missing");
            continue;
        }
        let found = run.always(&format!("{prefix}trace"), move |found: &mut dyn FnMut(Vec<Point>)| {
            let world = World::new();
            let node = &world.node;
            let before = state::before(&node.host, &ours(node));
            let mut made = world.runtime.block_on(prepare(node, stage));
            found(points::traced(|| {
                assert!(world.runtime.block_on(act(node, verb, &mut made)), "the verb fails");
                std::thread::sleep(LATE);
            }));
            world.runtime.block_on(async {
                verify(node, verb, &made, true, false).await;
                again(node, verb, &made).await;
                clean(node).await;
            });
            node.assert_nothing_left();
            state::assert_back(&node.host, &ours(node), &before);
        });
        let mut world: Option<World> = None;
        for point in chosen(found, run.quick) {
            let name = format!("{prefix}{}.{}", point.name, point.count);
            if !run.wants(&name) {
                continue;
            }
            let fresh = world.take().unwrap_or_else(World::new);
            world = run.case(&name, fresh, move |world| at_point(world, verb, stage, &point));
            points::disarm();
        }
        if let Some(world) = world {
            run.case(&format!("{prefix}check"), world, |world| {
                check::check(&mut world.node.host, false);
                world.runtime.block_on(world.node.start_again());
                Outcome::Passed
            });
        }
    }
}

fn at_point(world: &mut World, verb: Verb, stage: Stage, point: &Point) -> Outcome {
    let World { node, runtime } = world;
    let before = state::before(&node.host, &ours(node));
    let mut made = runtime.block_on(prepare(node, stage));
    points::arm(point, Action::Kill);
    let before_verb = made.clone();
    let acknowledged = runtime.block_on(act(node, verb, &mut made));
    let reached = fired();
    points::disarm();
    if reached && !point.is_of_shim() {
        let pid = node.host.pid();
        wait_for("the engine to die", || has_ended(pid));
        node.host.kill();
        runtime.block_on(node.start_again());
    }
    let shim_died = reached && point.is_of_shim();
    runtime.block_on(async {
        let known = if acknowledged { &made } else { &before_verb };
        verify(node, verb, known, acknowledged, shim_died).await;
        again(node, verb, known).await;
        clean(node).await;
    });
    node.assert_nothing_left();
    state::assert_back(&node.host, &ours(node), &before);
    if reached {
        Outcome::Passed
    } else {
        Outcome::Moot(format!("not passed again; acknowledged: {acknowledged}"))
    }
}
