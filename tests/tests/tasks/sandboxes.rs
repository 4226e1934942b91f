//! Sandboxes made by our shim: namespaces without a process, containers that join, and an end that is told once.

use std::path::Path;

use proto::containerd::events::SandboxExit;
use proto::containerd::services::containers::v1::containers_client::ContainersClient;
use proto::containerd::services::containers::v1::{Container, CreateContainerRequest, container};
use proto::containerd::services::events::v1::SubscribeRequest;
use proto::containerd::services::events::v1::events_client::EventsClient;
use proto::containerd::services::sandbox::v1::controller_client::ControllerClient;
use proto::containerd::services::sandbox::v1::store_client::StoreClient;
use proto::containerd::services::sandbox::v1::*;
use proto::containerd::types::Sandbox;
use proto::containerd::types::sandbox::Runtime;
use serde_json::{Value, json};
use tonic::Code;
use tonic::transport::Channel;

use super::bench::{Bench, STOCK_SHIM, eventually, ready};

struct Client<'a> {
    bench: &'a Bench,
    controller: ControllerClient<Channel>,
}

/// The arguments of every method: the sandbox, and the controller.
macro_rules! call {
    ($client:expr, $method:ident, $request:ident { $($field:ident: $value:expr),* $(,)? }) => {{
        let mut request = $request { sandboxer: "shim".into(), ..Default::default() };
        $(request.$field = $value;)*
        let request = $client.bench.request(request);
        $client.controller.clone().$method(request).await.map(tonic::Response::into_inner)
    }};
}

impl<'a> Client<'a> {
    fn of(bench: &'a Bench) -> Self {
        Client { bench, controller: ControllerClient::new(bench.channel()) }
    }

    async fn store(&self, id: &str, runtime: &str, spec: Option<Value>) {
        let sandbox = Sandbox {
            sandbox_id: id.into(),
            runtime: Some(Runtime { name: runtime.into(), options: None }),
            spec: spec.map(|spec| proto::any::wrap(proto::any::SPEC, spec.to_string())),
            ..Sandbox::default()
        };
        let request = self.bench.request(StoreCreateRequest { sandbox: Some(sandbox) });
        StoreClient::new(self.bench.channel()).create(request).await.unwrap();
    }

    async fn create(&self, id: &str) -> Result<(), tonic::Status> {
        call!(self, create, ControllerCreateRequest { sandbox_id: id.into() }).map(drop)
    }

    async fn start(&self, id: &str) -> Result<ControllerStartResponse, tonic::Status> {
        call!(self, start, ControllerStartRequest { sandbox_id: id.into() })
    }

    async fn status(&self, id: &str) -> ControllerStatusResponse {
        call!(self, status, ControllerStatusRequest { sandbox_id: id.into(), verbose: true }).unwrap()
    }

    async fn shutdown(&self, id: &str) -> Result<(), tonic::Status> {
        call!(self, shutdown, ControllerShutdownRequest { sandbox_id: id.into() }).map(drop)
    }

    /// A container of the sandbox, in the namespaces that its status names.
    async fn container(&self, id: &str, sandbox: &str, args: &[&str]) {
        let info = self.status(sandbox).await.info;
        let mut spec = self.bench.spec(id, args);
        spec.as_object_mut().unwrap().remove("hostname");
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        for namespace in namespaces {
            let kind = match namespace["type"].as_str().unwrap() {
                "network" => "net",
                kind => kind,
            };
            if let Some(path) = info.get(&format!("namespace.{kind}")) {
                namespace["path"] = json!(path);
            }
        }
        let container = Container {
            id: id.into(),
            sandbox: sandbox.into(),
            runtime: Some(container::Runtime { name: our_shim(), options: None }),
            spec: Some(proto::any::wrap(proto::any::SPEC, spec.to_string())),
            ..Container::default()
        };
        let request = self.bench.request(CreateContainerRequest { container: Some(container) });
        ContainersClient::new(self.bench.channel()).create(request).await.unwrap();
    }
}

fn our_shim() -> String {
    tests::binary("containerd-shim-runc-v2").display().to_string()
}

fn spec(namespaces: &[&str]) -> Value {
    let namespaces: Vec<_> = namespaces.iter().map(|kind| json!({"type": kind})).collect();
    json!({
        "ociVersion": "1.0.2",
        "hostname": "pod",
        "linux": {"namespaces": namespaces, "sysctl": {"kernel.shmmni": "77", "net.ipv4.ip_unprivileged_port_start": "7"}},
    })
}

/// The ends of this sandbox that were told.
fn ends(events: &tokio::sync::mpsc::UnboundedReceiver<SandboxExit>) -> usize {
    events.len()
}

/// Collects ends from now on.
async fn listen(bench: &Bench) -> tokio::sync::mpsc::UnboundedReceiver<SandboxExit> {
    let (sender, receiver) = tokio::sync::mpsc::unbounded_channel();
    let request = bench.request(SubscribeRequest { filters: vec![r#"topic=="/sandboxes/exit""#.into()] });
    let mut stream = EventsClient::new(bench.channel()).subscribe(request).await.unwrap().into_inner();
    tokio::spawn(async move {
        while let Ok(Some(event)) = stream.message().await {
            let exit = proto::any::unpack::<SandboxExit>(event.event.as_ref().unwrap()).unwrap();
            let _ = sender.send(exit);
        }
    });
    receiver
}

fn inode(path: impl AsRef<Path>) -> u64 {
    use std::os::unix::fs::MetadataExt as _;
    std::fs::metadata(path.as_ref()).unwrap().ino()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_without_a_process_is_shared_by_its_containers() {
    if !ready() {
        return;
    }
    let mut bench = Bench::start().await;
    let client = Client::of(&bench);
    let told = listen(&bench).await;
    client.store("pod", &our_shim(), Some(spec(&["ipc", "uts", "network", "mount"]))).await;
    client.create("pod").await.unwrap();
    assert_eq!(client.create("pod").await.unwrap_err().code(), Code::AlreadyExists);
    assert_eq!(client.status("pod").await.state, "SANDBOX_NOTREADY");
    let started = client.start("pod").await.unwrap();
    assert_eq!(started.pid, 0, "nothing in it needs a process");
    assert!(started.address.starts_with("unix://"));
    assert_eq!(client.start("pod").await.unwrap_err().code(), Code::AlreadyExists);
    let status = client.status("pod").await;
    assert_eq!(status.state, "SANDBOX_READY");
    assert_eq!(status.info.keys().filter(|key| key.starts_with("namespace.")).count(), 3);
    let platform = call!(client, platform, ControllerPlatformRequest { sandbox_id: "pod".into() }).unwrap();
    assert_eq!(platform.platform.unwrap().os, "linux");

    // Two containers, no more shims.
    let says = "cat /proc/sys/kernel/hostname /proc/sys/kernel/shmmni /proc/sys/net/ipv4/ip_unprivileged_port_start; exec sleep 1000";
    let mut pids = Vec::new();
    for id in ["a", "b"] {
        client.container(id, "pod", &["sh", "-c", says]).await;
        pids.push(bench.create(id).await.unwrap());
        bench.start_process(id, "").await.unwrap();
        let out = bench.path(&format!("{id}.out"));
        eventually("the container says what it sees", || async {
            std::fs::read_to_string(&out).unwrap_or_default() == "pod\n77\n7\n"
        })
        .await;
        assert_eq!(std::fs::read_to_string(bench.bundle(id).join("sandbox")).unwrap(), "pod");
    }
    for kind in ["net", "ipc", "uts"] {
        let shared = inode(&status.info[&format!("namespace.{kind}")]);
        for pid in &pids {
            assert_eq!(inode(format!("/proc/{pid}/ns/{kind}")), shared, "{kind} of {pid}");
        }
    }
    assert_eq!(client.shutdown("pod").await.unwrap_err().code(), Code::FailedPrecondition);

    // The engine is killed; sandbox and containers are as they were.
    drop(client);
    bench.end_engine(nix::sys::signal::Signal::SIGKILL);
    bench.start_engine().await;
    let client = Client::of(&bench);
    let told_later = listen(&bench).await;
    assert_eq!(client.status("pod").await.state, "SANDBOX_READY");
    let waiting = {
        let mut controller = client.controller.clone();
        let wait = ControllerWaitRequest { sandbox_id: "pod".into(), sandboxer: "shim".into() };
        let request = bench.request(wait);
        tokio::spawn(async move { controller.wait(request).await.map(tonic::Response::into_inner) })
    };
    for id in ["a", "b"] {
        bench.clear(id).await;
    }
    call!(client, stop, ControllerStopRequest { sandbox_id: "pod".into() }).unwrap();
    assert_eq!(waiting.await.unwrap().unwrap().exit_status, 0);
    assert_eq!(client.status("pod").await.state, "SANDBOX_NOTREADY");
    client.shutdown("pod").await.unwrap();
    assert_eq!(client.shutdown("pod").await.unwrap_err().code(), Code::NotFound);
    assert_eq!(client.status("pod").await.state, "SANDBOX_NOTREADY");
    call!(client, stop, ControllerStopRequest { sandbox_id: "pod".into() }).unwrap();
    eventually("its end is told", || async { ends(&told_later) > 0 }).await;
    assert_eq!((ends(&told), ends(&told_later)), (0, 1));
    bench.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_pod_that_shares_its_process_ids_has_an_init() {
    if !ready() {
        return;
    }
    let bench = Bench::start().await;
    let client = Client::of(&bench);
    let mut told = listen(&bench).await;
    client.store("pod", &our_shim(), Some(spec(&["ipc", "uts", "network", "pid"]))).await;
    client.create("pod").await.unwrap();
    let pid = client.start("pod").await.unwrap().pid;
    assert_eq!(client.status("pod").await.pid, pid);
    client.container("a", "pod", &["sh", "-c", "sh -c 'true & exit' & echo $$; exec sleep 1000"]).await;
    bench.create("a").await.unwrap();
    bench.start_process("a", "").await.unwrap();
    let out = bench.path("a.out");
    eventually("the container has a pid in the pod", || async {
        std::fs::read_to_string(&out).unwrap_or_default().trim().parse::<u32>().is_ok_and(|pid| pid > 1)
    })
    .await;
    // What its processes leave is reaped by the pod's init.
    let children = format!("/proc/{pid}/task/{pid}/children");
    eventually("the orphan is reaped", || async {
        std::fs::read_to_string(&children).unwrap().split_whitespace().count() == 0
    })
    .await;
    // It ends with its init, and its containers with it.
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid.cast_signed()), nix::sys::signal::Signal::SIGKILL)
        .unwrap();
    let wait = call!(client, wait, ControllerWaitRequest { sandbox_id: "pod".into() }).unwrap();
    assert_eq!(wait.exit_status, 137);
    assert_eq!(told.recv().await.unwrap().exit_status, 137);
    bench.event("a", "/tasks/exit").await;
    assert_eq!(client.status("pod").await.state, "SANDBOX_NOTREADY");
    assert_eq!(bench.delete("a").await.unwrap(), 137);
    bench.remove_container("a").await;
    client.shutdown("pod").await.unwrap();
    assert_eq!(ends(&told), 0);
    bench.finish().await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_cannot_be_a_sandbox_is_said_and_leaves_nothing() {
    if !ready() {
        return;
    }
    let bench = Bench::start().await;
    let client = Client::of(&bench);
    assert_eq!(client.create("nowhere").await.unwrap_err().code(), Code::NotFound);
    client.store("empty", &our_shim(), None).await;
    client
        .store(
            "bad",
            &our_shim(),
            Some(json!({
                "linux": {"namespaces": [{"type": "uts"}], "sysctl": {"kernel.panic": "1"}},
            })),
        )
        .await;
    client.store("stock", STOCK_SHIM, Some(spec(&["ipc"]))).await;
    client.store("none", "io.containerd.nosuch.v9", None).await;
    // A shim without a sandbox API says so, one that is not there too.
    assert_eq!(client.create("stock").await.unwrap_err().code(), Code::Unimplemented);
    assert_eq!(client.create("none").await.unwrap_err().code(), Code::NotFound);
    client.create("bad").await.unwrap();
    let error = client.start("bad").await.unwrap_err();
    assert!(error.code() == Code::InvalidArgument && error.message().contains("kernel.panic"), "{error}");
    assert_eq!(client.start("bad").await.unwrap_err().code(), Code::NotFound);
    client.create("empty").await.unwrap();
    assert_eq!(client.start("empty").await.unwrap().pid, 0);
    for sandboxer in ["", "podsandbox"] {
        let request = ControllerStatusRequest { sandboxer: sandboxer.into(), ..Default::default() };
        let code = client.controller.clone().status(bench.request(request)).await.unwrap_err().code();
        assert_eq!(code, if sandboxer.is_empty() { Code::InvalidArgument } else { Code::NotFound });
    }
    // Its shim is killed: the end is told, and the name is free again.
    let mut told = listen(&bench).await;
    let shim: i32 = client.status("empty").await.info["shim.pid"].parse().unwrap();
    nix::sys::signal::kill(nix::unistd::Pid::from_raw(shim), nix::sys::signal::Signal::SIGKILL).unwrap();
    assert_eq!(told.recv().await.unwrap().sandbox_id, "empty");
    eventually("it is known to be dead", || async {
        client.status("empty").await.state == "SANDBOX_NOTREADY"
    })
    .await;
    client.shutdown("empty").await.unwrap();
    client.create("empty").await.unwrap();
    client.shutdown("empty").await.unwrap();
    bench.finish().await;
}
