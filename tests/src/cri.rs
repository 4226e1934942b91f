//! A node as a kubelet has it: an engine with a network for pods, and what a kubelet asks of it.
//!
//! The same on gantryd and on Debian's containerd. All pods of a node are in the cgroup `/NAMESPACE` of its host, so that
//! what is left of them is seen.

use std::collections::BTreeSet;
use std::future::Future;
use std::net::{SocketAddr, TcpStream};
use std::ops::Deref;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::time::{Duration, Instant};
use std::{fs, process};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::runtime::v1::image_service_client::ImageServiceClient;
use proto::runtime::v1::runtime_service_client::RuntimeServiceClient;
use proto::runtime::v1::{
    ContainerConfig, ContainerMetadata, ContainerState, ContainerStatus, ContainerStatusRequest,
    CreateContainerRequest, ExecSyncRequest, ImageSpec, ImageStatusRequest, LinuxContainerConfig,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, ListContainersRequest,
    ListPodSandboxRequest, NamespaceMode, NamespaceOption, PodSandboxConfig, PodSandboxMetadata,
    PodSandboxState, PodSandboxStatus, PodSandboxStatusRequest, RemoveContainerRequest,
    RemovePodSandboxRequest, RunPodSandboxRequest, StartContainerRequest, StatusRequest,
    StopContainerRequest, StopPodSandboxRequest,
};
use tonic::Status;
use tonic::transport::Channel;

use crate::client::{Ctr, channel};
use crate::host::{Host, Kind, RUNC};
use crate::network::{From, Network};
use crate::{LIMIT, image, wait_for};

/// The namespace of the kubelet's objects.
pub const NAMESPACE: &str = "k8s.io";
/// The image of pause containers under Debian's containerd.
const PAUSE: &str = "docker.io/library/pause:latest";

/// The kubelet's calls.
pub type Runtime = RuntimeServiceClient<Channel>;

/// What a kubelet asks of an engine.
pub struct Kubelet {
    /// The client.
    pub runtime: Runtime,
    /// Its folder.
    folder: PathBuf,
    /// The cgroup of its pods.
    group: String,
    /// All pods and containers that there have been.
    ids: Mutex<BTreeSet<String>>,
}

/// An engine that serves a kubelet, its network, and the kubelet. Dropped, the test fails when anything is left.
pub struct Node {
    /// The engine.
    pub host: Host,
    /// Its network.
    pub network: Network,
    kubelet: Kubelet,
}

/// A pod that runs, and how it was asked for.
#[derive(Debug, Clone)]
pub struct Pod {
    /// Its id.
    pub id: String,
    /// How it was asked for.
    pub config: PodSandboxConfig,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ended {
    /// Its exit code.
    pub code: i32,
    /// What it wrote.
    pub stdout: String,
    /// What it complained of.
    pub stderr: String,
}

/// Waits until `condition` holds, and fails with `what` when it does not within the limit.
pub async fn until<F: Future<Output = bool>>(what: &str, mut condition: impl FnMut() -> F) {
    let end = Instant::now() + LIMIT;
    while !condition().await {
        assert!(Instant::now() < end, "waited {LIMIT:?} for {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

impl Node {
    /// A node with the image of busybox.
    pub async fn start(kind: Kind) -> Self {
        Node::with(kind, "", "").await
    }

    /// A node whose plugin has these further settings, and these further sections.
    pub async fn with(kind: Kind, settings: &str, sections: &str) -> Self {
        let mut host = Host::new(kind);
        host.collects_by_itself = true;
        let network = Network::new(host.folder());
        host.network = Some(network.file(From::Host));
        host.settings = Some(configuration(kind, &network, settings, sections));
        host.start();
        let kubelet = Kubelet::new(&host.address(), host.folder(), &host.namespace).await;
        let node = Node { host, network, kubelet };
        node.serves().await;
        node.import(&image::busybox(), image::NAME).await;
        if kind == Kind::Containerd {
            let (image, name) = pause();
            node.import(&image, name).await;
        }
        node
    }

    /// Starts the engine again after its end.
    pub async fn start_again(&mut self) {
        self.host.start();
        self.kubelet.runtime = runtime(&self.host.address()).await;
        self.serves().await;
    }

    /// Kills the engine and starts it again.
    pub async fn kill_and_start(&mut self) {
        self.host.kill();
        self.start_again().await;
    }

    /// Debian's client where the kubelet's objects are.
    pub fn ctr(&self) -> Ctr {
        let mut ctr = self.host.stock_ctr();
        ctr.namespace = NAMESPACE.into();
        ctr
    }

    /// Imports an image, and waits until the kubelet sees it.
    pub async fn import(&self, image: &image::Image, name: &str) {
        let archive = self.host.folder().join("image.tar");
        image.write(&archive).unwrap();
        self.ctr().ok(&["images", "import", archive.to_str().unwrap()]);
        let images = ImageServiceClient::new(channel(&self.host.address()).await);
        until("the image to be seen", || {
            let mut images = images.clone();
            let image = Some(ImageSpec { image: name.to_owned(), ..ImageSpec::default() });
            async move {
                let status = images.image_status(ImageStatusRequest { image, verbose: false }).await;
                status.unwrap().into_inner().image.is_some()
            }
        })
        .await;
    }

    /// Connects from the neighbour to a port of the engine's host.
    pub fn connect(&self, port: u16) -> std::io::Result<TcpStream> {
        let host: std::net::IpAddr = crate::network::HOST.parse().unwrap();
        self.network.connect(From::Outside, SocketAddr::from((host, port)))
    }

    /// Connects to the streaming server, at an address that the engine gave.
    pub fn open(&self, url: &str) -> tokio::net::TcpStream {
        let server = url.split('/').nth(2).and_then(|server| server.parse().ok()).unwrap();
        let stream = self.network.connect(From::Host, server).unwrap();
        stream.set_nonblocking(true).unwrap();
        tokio::net::TcpStream::from_std(stream).unwrap()
    }

    /// What is left of pods on the machine, one line each.
    pub fn left(&self) -> Vec<String> {
        let mut left = self.host.left();
        left.extend(self.network.addresses().into_iter().map(|address| format!("address {address}")));
        left.extend(self.network.mapped_ports().into_iter().map(|rule| format!("port {rule}")));
        left.extend(self.network.ports().into_iter().map(|port| format!("interface {port}")));
        for id in self.ids.lock().unwrap().iter() {
            let state = Path::new("/run/containerd/runc").join(NAMESPACE).join(id);
            left.extend(state.exists().then(|| format!("runtime state {}", state.display())));
        }
        left
    }

    /// Waits until nothing is left of pods on the machine.
    pub fn assert_nothing_left(&self) {
        let mut left = Vec::new();
        let end = Instant::now() + Duration::from_secs(10);
        loop {
            left.clone_from(&self.left());
            if left.is_empty() {
                return;
            }
            assert!(Instant::now() < end, "left behind:\n{}", left.join("\n"));
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    /// Ends whatever there is, so that a failed test leaves nothing for the next.
    fn clean(&self) {
        for cgroup in crate::left::cgroups(&self.host.namespace) {
            for pid in processes_of(&cgroup) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        for id in self.ids.lock().unwrap().iter() {
            let _ = process::Command::new(RUNC)
                .args(["--root", "/run/containerd/runc/k8s.io", "delete", "--force", id])
                .output();
        }
        for cgroup in crate::left::cgroups(&self.host.namespace) {
            let _ = fs::remove_dir(cgroup);
        }
    }
}

impl Kubelet {
    /// One of this engine. Its logs are in the folder, its pods' containers in the cgroup of this name.
    pub async fn new(address: &Path, folder: &Path, group: &str) -> Self {
        Kubelet {
            runtime: runtime(address).await,
            folder: folder.to_owned(),
            group: group.to_owned(),
            ids: Mutex::default(),
        }
    }

    /// Waits until pods can be run.
    pub async fn serves(&self) {
        let runtime = &self.runtime;
        until("runtime and network to be ready", || {
            let mut runtime = runtime.clone();
            async move {
                let status = runtime.status(StatusRequest { verbose: false }).await;
                let conditions = status.ok().and_then(|status| status.into_inner().status);
                let conditions = conditions.map(|status| status.conditions).unwrap_or_default();
                conditions.len() >= 2 && conditions.iter().all(|condition| condition.status)
            }
        })
        .await;
    }

    /// The folder of a pod's logs.
    pub fn logs(&self, pod: &str) -> PathBuf {
        self.folder.join("logs").join(pod)
    }

    /// How a pod of this name is asked for.
    pub fn pod(&self, name: &str) -> PodSandboxConfig {
        let logs = self.logs(name);
        fs::create_dir_all(&logs).unwrap();
        PodSandboxConfig {
            metadata: Some(PodSandboxMetadata {
                name: name.to_owned(),
                uid: format!("uid-{name}"),
                namespace: "tests".to_owned(),
                attempt: 0,
            }),
            hostname: name.to_owned(),
            log_directory: logs.display().to_string(),
            labels: [("pod".to_owned(), name.to_owned())].into(),
            linux: Some(LinuxPodSandboxConfig {
                cgroup_parent: format!("/{}", self.group),
                security_context: Some(LinuxSandboxSecurityContext {
                    namespace_options: Some(namespaces()),
                    ..LinuxSandboxSecurityContext::default()
                }),
                ..LinuxPodSandboxConfig::default()
            }),
            ..PodSandboxConfig::default()
        }
    }

    /// Runs a pod.
    pub async fn run_pod(&self, config: PodSandboxConfig) -> Pod {
        let id = self.try_run_pod(&config).await.unwrap();
        Pod { id, config }
    }

    /// Runs a pod, or says why not.
    pub async fn try_run_pod(&self, config: &PodSandboxConfig) -> Result<String, Status> {
        let request = RunPodSandboxRequest { config: Some(config.clone()), runtime_handler: String::new() };
        let answer = self.runtime.clone().run_pod_sandbox(request).await?;
        Ok(self.note(answer.into_inner().pod_sandbox_id))
    }

    fn note(&self, id: String) -> String {
        self.ids.lock().unwrap().insert(id.clone());
        id
    }

    /// Makes a container in a pod.
    pub async fn create(&self, pod: &Pod, config: &ContainerConfig) -> String {
        self.try_create(pod, config).await.unwrap()
    }

    /// Makes a container in a pod, or says why not.
    pub async fn try_create(&self, pod: &Pod, config: &ContainerConfig) -> Result<String, Status> {
        let request = CreateContainerRequest {
            pod_sandbox_id: pod.id.clone(),
            config: Some(config.clone()),
            sandbox_config: Some(pod.config.clone()),
        };
        let answer = self.runtime.clone().create_container(request).await?;
        Ok(self.note(answer.into_inner().container_id))
    }

    /// Starts a container.
    pub async fn begin(&self, id: &str) {
        self.try_begin(id).await.unwrap();
    }

    /// Starts a container, or says why not.
    pub async fn try_begin(&self, id: &str) -> Result<(), Status> {
        let request = StartContainerRequest { container_id: id.to_owned() };
        self.runtime.clone().start_container(request).await.map(drop)
    }

    /// Makes a container and starts it.
    pub async fn run(&self, pod: &Pod, config: &ContainerConfig) -> String {
        let id = self.create(pod, config).await;
        self.begin(&id).await;
        id
    }

    /// Makes a container, starts it, and waits for its end; how it ended, and what it has logged of each stream.
    pub async fn run_to_end(&self, pod: &Pod, mut config: ContainerConfig) -> Ended {
        let name = config.metadata.as_ref().unwrap().name.clone();
        config.log_path = format!("{name}.log");
        let log = Path::new(&pod.config.log_directory).join(&config.log_path);
        let id = self.run(pod, &config).await;
        let status = self.ended(&id).await;
        self.remove(&id).await;
        let lines = log_lines(&log);
        let text = |stream| lines.iter().filter(|line| line.stream == stream).map(Line::written).collect();
        Ended { code: status.exit_code, stdout: text("stdout"), stderr: text("stderr") }
    }

    /// Stops a container; how many seconds it has for that.
    pub async fn stop(&self, id: &str, timeout: i64) {
        let request = StopContainerRequest { container_id: id.to_owned(), timeout };
        self.runtime.clone().stop_container(request).await.unwrap();
    }

    /// Removes a container.
    pub async fn remove(&self, id: &str) {
        let request = RemoveContainerRequest { container_id: id.to_owned() };
        self.runtime.clone().remove_container(request).await.unwrap();
    }

    /// Stops a pod and removes it with its containers.
    pub async fn remove_pod(&self, id: &str) {
        self.try_remove_pod(id).await.unwrap();
    }

    /// Stops a pod and removes it, or says why not.
    pub async fn try_remove_pod(&self, id: &str) -> Result<(), Status> {
        let mut runtime = self.runtime.clone();
        runtime.stop_pod_sandbox(StopPodSandboxRequest { pod_sandbox_id: id.to_owned() }).await?;
        runtime.remove_pod_sandbox(RemovePodSandboxRequest { pod_sandbox_id: id.to_owned() }).await?;
        Ok(())
    }

    /// A container's status.
    pub async fn status(&self, id: &str) -> ContainerStatus {
        let request = ContainerStatusRequest { container_id: id.to_owned(), verbose: false };
        self.runtime.clone().container_status(request).await.unwrap().into_inner().status.unwrap()
    }

    /// A pod's status.
    pub async fn pod_status(&self, id: &str) -> PodSandboxStatus {
        let request = PodSandboxStatusRequest { pod_sandbox_id: id.to_owned(), verbose: false };
        self.runtime.clone().pod_sandbox_status(request).await.unwrap().into_inner().status.unwrap()
    }

    /// Waits for a container's end; its status then.
    pub async fn ended(&self, id: &str) -> ContainerStatus {
        until("the container to end", || async {
            self.status(id).await.state() == ContainerState::ContainerExited
        })
        .await;
        self.status(id).await
    }

    /// The ids of all containers, with those of their pods.
    pub async fn containers(&self) -> Vec<(String, String)> {
        let request = ListContainersRequest { filter: None };
        let all = self.runtime.clone().list_containers(request).await.unwrap().into_inner().containers;
        all.into_iter().map(|container| (container.id, container.pod_sandbox_id)).collect()
    }

    /// The ids of all pods, and whether they are ready.
    pub async fn pods(&self) -> Vec<(String, bool)> {
        let request = ListPodSandboxRequest { filter: None };
        let all = self.runtime.clone().list_pod_sandbox(request).await.unwrap().into_inner().items;
        let ready = |state| state == PodSandboxState::SandboxReady;
        all.into_iter().map(|pod| (pod.id.clone(), ready(pod.state()))).collect()
    }

    /// The address of a pod.
    pub async fn address(&self, pod: &str) -> String {
        self.pod_status(pod).await.network.unwrap().ip
    }

    /// Runs a command in a container to its end.
    pub async fn exec(&self, id: &str, command: &[&str]) -> Ended {
        self.try_exec(id, command, 60).await.unwrap()
    }

    /// Runs a shell's command in a container to its end; what it wrote, when it succeeded.
    pub async fn sh(&self, id: &str, command: &str) -> String {
        let ended = self.exec(id, &["sh", "-c", command]).await;
        assert_eq!((ended.code, ended.stderr.as_str()), (0, ""), "{command}: {ended:?}");
        ended.stdout
    }

    /// Runs a command in a container, or says why not.
    pub async fn try_exec(&self, id: &str, command: &[&str], timeout: i64) -> Result<Ended, Status> {
        let request = ExecSyncRequest { container_id: id.to_owned(), cmd: strings(command), timeout };
        let answer = self.runtime.clone().exec_sync(request).await?.into_inner();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        Ok(Ended { code: answer.exit_code, stdout: text(&answer.stdout), stderr: text(&answer.stderr) })
    }

    /// Removes all pods that there are.
    pub async fn remove_all(&self) {
        for (pod, _) in self.pods().await {
            self.remove_pod(&pod).await;
        }
    }
}

impl Deref for Node {
    type Target = Kubelet;

    fn deref(&self) -> &Kubelet {
        &self.kubelet
    }
}

fn processes_of(cgroup: &Path) -> Vec<i32> {
    let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
    text.lines().filter_map(|line| line.parse().ok()).collect()
}

impl Drop for Node {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("--- left of pods ---\n{}", self.left().join("\n"));
            self.clean();
        } else {
            // What the test has not removed is a defect of the test, or of the engine.
            let left = self.left();
            if !left.is_empty() {
                self.clean();
            }
            assert!(left.is_empty(), "left behind by {:?}:\n{}", self.host.kind, left.join("\n"));
        }
    }
}

/// The kubelet's plugin of a configuration of version 2, with these further settings, and these further sections.
pub fn configuration(kind: Kind, network: &Network, settings: &str, sections: &str) -> String {
    let sandbox = match kind {
        Kind::Gantry => String::new(),
        Kind::Containerd => format!("sandbox_image = '{PAUSE}'"),
    };
    format!(
        "[plugins.'io.containerd.grpc.v1.cri']\nrestrict_oom_score_adj = true\nstream_server_address = '127.0.0.1'\n\
         stream_server_port = '0'\n{sandbox}\n{settings}\n[plugins.'io.containerd.grpc.v1.cri'.cni]\nbin_dir = '{}'\n\
         conf_dir = '{}'\n{sections}\n",
        crate::network::PLUGINS,
        network.configuration().display(),
    )
}

/// The image of pause containers, and its name.
pub fn pause() -> (image::Image, &'static str) {
    (image::image(PAUSE, &["sleep", "1000000"], &[image::base_layer()]), PAUSE)
}

/// A client of the kubelet's calls.
pub async fn runtime(address: &Path) -> Runtime {
    RuntimeServiceClient::new(channel(address).await).max_decoding_message_size(64 << 20)
}

/// The namespaces that pods have where nothing else is asked for: all but that of process ids are the pod's.
pub fn namespaces() -> NamespaceOption {
    NamespaceOption {
        network: NamespaceMode::Pod.into(),
        pid: NamespaceMode::Container.into(),
        ipc: NamespaceMode::Pod.into(),
        ..NamespaceOption::default()
    }
}

/// How a container of this name is asked for, of busybox, that runs this.
pub fn container(name: &str, command: &[&str]) -> ContainerConfig {
    ContainerConfig {
        metadata: Some(ContainerMetadata { name: name.to_owned(), attempt: 0 }),
        image: Some(ImageSpec { image: image::NAME.to_owned(), ..ImageSpec::default() }),
        command: strings(command),
        labels: [("container".to_owned(), name.to_owned())].into(),
        log_path: format!("{name}.log"),
        linux: Some(LinuxContainerConfig {
            security_context: Some(LinuxContainerSecurityContext {
                namespace_options: Some(namespaces()),
                ..LinuxContainerSecurityContext::default()
            }),
            ..LinuxContainerConfig::default()
        }),
        ..ContainerConfig::default()
    }
}

/// How a container of this name is asked for that runs a shell's command.
pub fn shell(name: &str, command: &str) -> ContainerConfig {
    container(name, &["sh", "-c", command])
}

/// How a container of this name is asked for that does nothing until it is stopped.
pub fn idle(name: &str) -> ContainerConfig {
    shell(name, "trap 'exit 0' TERM; while :; do sleep 1000 & wait $!; done")
}

/// The security context of a container's configuration.
pub fn security(config: &mut ContainerConfig) -> &mut LinuxContainerSecurityContext {
    config.linux.get_or_insert_default().security_context.get_or_insert_default()
}

fn strings(words: &[&str]) -> Vec<String> {
    words.iter().map(|word| (*word).to_owned()).collect()
}

/// A line of a container's log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Line {
    /// When, as text.
    pub at: String,
    /// `stdout` or `stderr`.
    pub stream: String,
    /// Whether it ended with a newline.
    pub full: bool,
    /// What was written.
    pub text: String,
}

impl Line {
    fn written(&self) -> String {
        format!("{}{}", self.text, if self.full { "\n" } else { "" })
    }
}

/// The lines of a container's log. Every one must have the kubelet's form.
pub fn log_lines(path: &Path) -> Vec<Line> {
    let text = fs::read_to_string(path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
    assert!(text.is_empty() || text.ends_with('\n'), "{} ends within a line", path.display());
    let line = |line: &str| {
        let mut words = line.splitn(4, ' ');
        let mut word = || words.next().unwrap_or_else(|| panic!("{}: {line:?}", path.display())).to_owned();
        let (at, stream, tag, text) = (word(), word(), word(), word());
        assert!(at.len() >= 20 && at.as_bytes()[10] == b'T', "{line:?}");
        assert!(["stdout", "stderr"].contains(&stream.as_str()), "{line:?}");
        assert!(["F", "P"].contains(&tag.as_str()), "{line:?}");
        Line { at, stream, full: tag == "F", text }
    };
    text.lines().map(line).collect()
}

/// What a container has written to stdout so far; nothing before there is a log.
pub fn logged(path: &Path) -> String {
    if !path.exists() {
        return String::new();
    }
    log_lines(path).iter().filter(|line| line.stream == "stdout").map(Line::written).collect()
}

/// Waits until a container's log has this on stdout.
pub fn wait_for_log(path: &Path, text: &str) {
    wait_for(&format!("{text:?} in {}", path.display()), || {
        // Its last line may be being written.
        fs::read_to_string(path).is_ok_and(|all| all.ends_with('\n')) && logged(path).contains(text)
    });
}
