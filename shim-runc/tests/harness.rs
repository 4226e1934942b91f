//! A shim under test: its own folder, a busybox root file system, a place for its events, and everything cleaned up.
#![allow(dead_code, clippy::unwrap_used)]

use std::fs;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use async_trait::async_trait;
use prost::Name;
use proto::containerd::types::{Envelope, Mount};
use serde_json::{Value, json};
use shim_api::bootstrap::{Answer, Generation, Launch};
use shim_api::events::EventsService;
use shim_api::task::*;
use shim_api::transport::{Server, Services};
use tokio::sync::Notify;

pub(crate) const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-runc-v2");
pub(crate) const NAMESPACE: &str = "shimtest";
/// No step of a test takes longer unless something hangs.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);

/// The engine's part in a test.
pub(crate) struct Engine {
    pub(crate) folder: tempfile::TempDir,
    pub(crate) events: Arc<Events>,
    server: Option<Server>,
}

/// Collects what the shim publishes.
#[derive(Default)]
pub(crate) struct Events {
    seen: Mutex<Vec<Envelope>>,
    more: Notify,
}

#[async_trait]
impl EventsService for Events {
    async fn forward(&self, envelope: Envelope) -> shim_api::Result<()> {
        assert_eq!(envelope.namespace, NAMESPACE);
        assert!(envelope.timestamp.is_some());
        self.seen.lock().unwrap().push(envelope);
        self.more.notify_waiters();
        Ok(())
    }
}

impl Events {
    pub(crate) fn topics(&self) -> Vec<String> {
        self.seen.lock().unwrap().iter().map(|envelope| envelope.topic.clone()).collect()
    }

    pub(crate) fn all<M: Name + Default>(&self) -> Vec<M> {
        let seen = self.seen.lock().unwrap();
        let events = seen.iter().filter_map(|envelope| envelope.event.as_ref());
        events.filter(|any| proto::any::is::<M>(any)).map(|any| proto::any::unpack(any).unwrap()).collect()
    }

    /// Waits for an event of this kind that fits.
    pub(crate) async fn wait<M: Name + Default>(&self, fits: impl Fn(&M) -> bool) -> M {
        let found = async {
            loop {
                let more = self.more.notified();
                tokio::pin!(more);
                more.as_mut().enable();
                if let Some(event) = self.all::<M>().into_iter().find(|event| fits(event)) {
                    return event;
                }
                more.await;
            }
        };
        match tokio::time::timeout(LIMIT, found).await {
            Ok(event) => event,
            Err(_) => panic!("no {} came; there were {:?}", M::full_name(), self.topics()),
        }
    }
}

impl Engine {
    pub(crate) async fn start() -> Self {
        let folder = tempfile::Builder::new().prefix("gantry-shim-").tempdir().unwrap();
        let mut engine = Self { folder, events: Arc::default(), server: None };
        engine.listen().await;
        engine
    }

    pub(crate) fn ttrpc_address(&self) -> PathBuf {
        self.folder.path().join("engine.sock.ttrpc")
    }

    /// Takes events, from now on.
    pub(crate) async fn listen(&mut self) {
        let _ = fs::remove_file(self.ttrpc_address());
        let listener = tokio::net::UnixListener::bind(self.ttrpc_address()).unwrap();
        let mut services = Services::new();
        shim_api::events::register(&mut services, &self.events);
        self.server = Some(services.serve(listener).await.unwrap());
    }

    /// Takes no more events, as an engine that restarts.
    pub(crate) async fn stop_listening(&mut self) {
        self.server.take().unwrap().stop().await;
        fs::remove_file(self.ttrpc_address()).unwrap();
    }

    /// Makes a bundle: busybox as root file system, a config that runs `args`, changed by `change`.
    pub(crate) fn bundle(&self, id: &str, args: &[&str], change: impl FnOnce(&mut Value)) -> Bundle {
        let path = self.folder.path().join(id);
        fs::create_dir(&path).unwrap();
        let source = self.rootfs();
        fs::create_dir(path.join("rootfs")).unwrap();
        let mut config = json!({
            "ociVersion": "1.0.2",
            "process": {
                "terminal": false,
                "user": {"uid": 0, "gid": 0},
                "args": args,
                "env": ["PATH=/bin", "TERM=xterm"],
                "cwd": "/",
                "capabilities": {"bounding": ["CAP_KILL"], "effective": ["CAP_KILL"], "permitted": ["CAP_KILL"]},
            },
            "root": {"path": "rootfs"},
            "hostname": id,
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["mode=755"]},
                {"destination": "/dev/pts", "type": "devpts", "source": "devpts",
                 "options": ["newinstance", "ptmxmode=0666"]},
            ],
            "linux": {
                "cgroupsPath": format!("/{}-{id}", self.folder.path().file_name().unwrap().to_str().unwrap()),
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}],
            },
        });
        change(&mut config);
        fs::write(path.join("config.json"), serde_json::to_vec(&config).unwrap()).unwrap();
        let rootfs = Mount {
            r#type: "bind".into(),
            source: source.to_str().unwrap().into(),
            target: String::new(),
            options: vec!["rbind".into(), "rw".into()],
        };
        Bundle { path, id: id.to_owned(), rootfs }
    }

    /// The shared root file system: static busybox and its applets.
    fn rootfs(&self) -> PathBuf {
        let root = self.folder.path().join("busybox");
        if !root.exists() {
            for folder in ["bin", "proc", "dev", "tmp"] {
                fs::create_dir_all(root.join(folder)).unwrap();
            }
            fs::copy("/bin/busybox", root.join("bin/busybox")).expect("these tests need busybox-static");
            for applet in ["sh", "sleep", "cat", "echo", "kill", "true", "stty", "dd", "tail", "wc", "ps"] {
                std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
            }
        }
        root
    }

    pub(crate) fn launch(&self, id: &str) -> Launch {
        Launch {
            id: id.to_owned(),
            namespace: NAMESPACE.to_owned(),
            ttrpc_address: self.ttrpc_address().to_str().unwrap().to_owned(),
            grpc_address: self.folder.path().join("engine.sock").to_str().unwrap().to_owned(),
            engine_version: "test".to_owned(),
            publish_binary: "/bin/false".to_owned(),
            socket_dir: Some(self.folder.path().join("s")),
            ..Launch::default()
        }
    }

    pub(crate) fn run(&self, bundle: &Bundle, action: &str, stdin: &[u8]) -> Output {
        self.run_shim(SHIM, bundle, action, stdin)
    }

    /// Runs an action of any shim.
    pub(crate) fn run_shim(&self, shim: &str, bundle: &Bundle, action: &str, stdin: &[u8]) -> Output {
        self.spawn(shim, bundle, action, stdin).wait_with_output().unwrap()
    }

    /// Begins one.
    pub(crate) fn spawn(&self, shim: &str, bundle: &Bundle, action: &str, stdin: &[u8]) -> Child {
        let launch = self.launch(&bundle.id);
        let for_delete = (action == "delete").then_some(bundle.path.as_path());
        let mut command = Command::new(shim);
        command.args(shim_api::bootstrap::arguments(&launch, for_delete, action));
        command.envs(shim_api::bootstrap::environment(&launch)).current_dir(&bundle.path);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = command.spawn().unwrap();
        child.stdin.take().unwrap().write_all(stdin).unwrap();
        child
    }

    /// Starts a shim, or finds the one of the bundle's group.
    pub(crate) async fn shim(&self, bundle: &Bundle) -> (TaskClient, Answer) {
        let output = self.run(bundle, "start", &self.launch(&bundle.id).encode(Generation::Params));
        assert!(output.status.success(), "start: {}", String::from_utf8_lossy(&output.stderr));
        assert!(output.stderr.is_empty(), "start said {:?}", String::from_utf8_lossy(&output.stderr));
        let answer = Answer::parse(&output.stdout).unwrap();
        let client = TaskClient::connect(&answer.address, answer.version).await.unwrap();
        (client.with_deadline(LIMIT), answer)
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        // runc's folder of the namespace; other tests may still use it.
        let _ = fs::remove_dir(Path::new("/run/containerd/runc").join(NAMESPACE));
        // A test that failed halfway: end what it left, by name of its own folder.
        if std::thread::panicking() {
            for entry in fs::read_dir("/proc").unwrap().flatten() {
                let cwd = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
                let pid = entry.file_name().to_string_lossy().parse::<i32>();
                let exe = fs::read_link(entry.path().join("exe")).unwrap_or_default();
                if let (Ok(pid), true) = (
                    pid,
                    cwd.starts_with(self.folder.path()) && exe.file_name() == Path::new(SHIM).file_name(),
                ) {
                    let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
                }
            }
            for entry in fs::read_dir(self.folder.path()).unwrap().flatten() {
                let path = entry.path();
                if path.join("config.json").exists() {
                    let id = entry.file_name().to_string_lossy().into_owned();
                    let rootfs = Mount::default();
                    self.run(&Bundle { path, id, rootfs }, "delete", b"");
                }
            }
        }
    }
}

/// A container's folder.
pub(crate) struct Bundle {
    pub(crate) path: PathBuf,
    pub(crate) id: String,
    pub(crate) rootfs: Mount,
}

impl Bundle {
    pub(crate) fn create(&self) -> CreateTaskRequest {
        CreateTaskRequest {
            id: self.id.clone(),
            bundle: self.path.to_str().unwrap().to_owned(),
            rootfs: vec![self.rootfs.clone()],
            ..CreateTaskRequest::default()
        }
    }

    /// Makes a fifo in the bundle and starts reading it to its end.
    pub(crate) fn output(&self, name: &str) -> (String, tokio::task::JoinHandle<String>) {
        let path = self.fifo(name);
        let reading = path.clone();
        let reader = tokio::task::spawn_blocking(move || fs::read_to_string(reading).unwrap());
        (path, reader)
    }

    pub(crate) fn fifo(&self, name: &str) -> String {
        let path = self.path.join(name);
        assert!(Command::new("mkfifo").arg(&path).status().unwrap().success());
        fs::set_permissions(&path, fs::Permissions::from_mode(0o600)).unwrap();
        path.to_str().unwrap().to_owned()
    }

    pub(crate) fn is_mounted(&self) -> bool {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        mounts.contains(self.path.join("rootfs").to_str().unwrap())
    }
}

/// An OCI process for exec.
pub(crate) fn process(args: &[&str]) -> prost_types::Any {
    let process = json!({"args": args, "env": ["PATH=/bin"], "cwd": "/", "user": {"uid": 0, "gid": 0}});
    prost_types::Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/Process".into(),
        value: serde_json::to_vec(&process).unwrap(),
    }
}

pub(crate) fn of(id: &str) -> String {
    id.to_owned()
}

/// Short forms of the requests.
pub(crate) async fn start(shim: &TaskClient, id: &str, exec_id: &str) -> shim_api::Result<u32> {
    Ok(shim.start(StartRequest { id: of(id), exec_id: of(exec_id) }).await?.pid)
}

pub(crate) async fn wait(shim: &TaskClient, id: &str, exec_id: &str) -> shim_api::Result<u32> {
    let wait = shim.wait(WaitRequest { id: of(id), exec_id: of(exec_id) });
    let answer = tokio::time::timeout(LIMIT, wait).await.expect("the process does not end")?;
    assert!(answer.exited_at.is_some());
    Ok(answer.exit_status)
}

pub(crate) async fn delete(shim: &TaskClient, id: &str, exec_id: &str) -> shim_api::Result<DeleteResponse> {
    shim.delete(DeleteRequest { id: of(id), exec_id: of(exec_id) }).await
}

pub(crate) async fn kill(
    shim: &TaskClient,
    id: &str,
    exec_id: &str,
    signal: u32,
    all: bool,
) -> shim_api::Result<()> {
    shim.kill(KillRequest { id: of(id), exec_id: of(exec_id), signal, all }).await
}

pub(crate) async fn state(shim: &TaskClient, id: &str, exec_id: &str) -> shim_api::Result<StateResponse> {
    shim.state(StateRequest { id: of(id), exec_id: of(exec_id) }).await
}

pub(crate) async fn exec(shim: &TaskClient, id: &str, exec_id: &str, args: &[&str]) -> shim_api::Result<()> {
    let request = ExecProcessRequest {
        id: of(id),
        exec_id: of(exec_id),
        spec: Some(process(args)),
        ..ExecProcessRequest::default()
    };
    shim.exec(request).await
}

/// Open descriptors of the shim.
pub(crate) async fn descriptors(shim: &TaskClient) -> usize {
    let pid = shim.connect_shim(ConnectRequest { id: of("any") }).await.unwrap().shim_pid;
    fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count()
}

/// Ends the shim and checks that it is gone with its socket.
pub(crate) async fn shutdown(shim: &TaskClient, answer: &Answer) {
    let _ = shim.shutdown(ShutdownRequest { id: String::new(), now: false }).await;
    tokio::time::timeout(LIMIT, shim.closed()).await.expect("the shim does not end");
    assert!(!shim_api::transport::socket_path(&answer.address).unwrap().exists(), "the socket is left");
}
