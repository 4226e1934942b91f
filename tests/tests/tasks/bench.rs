//! The bench: an engine of its own per test (root, state, socket, namespace), and what a client of its task service does.
//!
//! Invariant: whatever a test does, also when it panics, nothing stays on the host: no engine, shim, container, mount
//! or control group. [`Bench::finish`] fails a test that left any of these by itself; dropping cleans up in any case.
//!
//! The engine is the built `gantryd`, or what GANTRY_TEST_ENGINE names: stock containerd passes the tests that say what
//! clients rely on, which keeps the tests themselves honest.

use std::collections::BTreeMap;
use std::fs;
use std::future::Future;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::containerd::services::containers::v1::containers_client::ContainersClient;
use proto::containerd::services::containers::v1::{
    Container, CreateContainerRequest, DeleteContainerRequest, container::Runtime,
};
use proto::containerd::services::events::v1::SubscribeRequest;
use proto::containerd::services::events::v1::events_client::EventsClient;
use proto::containerd::services::tasks::v1 as tasks;
use proto::containerd::services::tasks::v1::tasks_client::TasksClient;
use proto::containerd::services::version::v1::version_client::VersionClient;
use proto::containerd::types::{Envelope, Mount};
use proto::containerd::v1::types::{Process, Status};
use serde_json::{Value, json};
use tonic::transport::{Channel, Endpoint};
use tonic::{Code, Request};

/// The longest that anything here may take.
pub(crate) const LIMIT: Duration = Duration::from_secs(30);
/// Debian's shim, of containerd 1.6.
pub(crate) const STOCK_SHIM: &str = "/usr/bin/containerd-shim-runc-v2";

type Answer<T> = Result<T, tonic::Status>;

/// One engine and one namespace on it.
pub(crate) struct Bench {
    dir: tempfile::TempDir,
    /// The namespace, unique on this host.
    pub(crate) namespace: String,
    engine: Option<Child>,
    channel: Option<Channel>,
    events: Arc<Mutex<Vec<Envelope>>>,
    /// What is put before PATH for the engine.
    path: Option<PathBuf>,
}

/// Whether these tests can run here; what is missing is said.
pub(crate) fn ready() -> bool {
    tests::ready(&[tests::host::RUNC, tests::image::BUSYBOX, STOCK_SHIM])
}

/// The shims to test with: Debian's and ours.
pub(crate) fn shims() -> Vec<String> {
    vec![STOCK_SHIM.to_owned(), tests::binary("containerd-shim-runc-v2").display().to_string()]
}

/// Whether the engine under test is ours.
pub(crate) fn is_ours() -> bool {
    std::env::var_os("GANTRY_TEST_ENGINE").is_none()
}

/// Asks until the answer is yes, or the limit passes.
pub(crate) async fn eventually<F: Future<Output = bool>>(what: &str, mut ask: impl FnMut() -> F) {
    let deadline = Instant::now() + LIMIT;
    while !ask().await {
        assert!(Instant::now() < deadline, "not within {LIMIT:?}: {what}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

impl Bench {
    /// An engine that has just started.
    pub(crate) async fn start() -> Self {
        let mut bench = Self::prepare();
        bench.start_engine().await;
        bench
    }

    /// All but the engine.
    pub(crate) fn prepare() -> Self {
        static COUNT: AtomicU32 = AtomicU32::new(0);
        let namespace = format!("tt{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::Builder::new().prefix("gantry-tasks-").tempdir().unwrap();
        let bench = Bench { dir, namespace, engine: None, channel: None, events: Arc::default(), path: None };
        bench.make_rootfs();
        fs::write(
            bench.path("config.toml"),
            "version = 2\ndisabled_plugins = [\"io.containerd.grpc.v1.cri\", \"io.containerd.snapshotter.v1.btrfs\", \
             \"io.containerd.snapshotter.v1.zfs\", \"io.containerd.snapshotter.v1.aufs\", \
             \"io.containerd.snapshotter.v1.devmapper\"]\n",
        )
        .unwrap();
        bench
    }

    fn make_rootfs(&self) {
        let rootfs = self.path("rootfs");
        for folder in ["bin", "dev", "proc", "sys", "tmp"] {
            fs::create_dir_all(rootfs.join(folder)).unwrap();
        }
        fs::copy("/usr/bin/busybox", rootfs.join("bin/busybox")).unwrap();
        for applet in ["sh", "sleep", "echo", "cat", "true", "kill"] {
            std::os::unix::fs::symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
    }

    /// A path in the bench's own folder.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// The bundle of a container.
    pub(crate) fn bundle(&self, id: &str) -> PathBuf {
        self.bundles().join(&self.namespace).join(id)
    }

    /// The folder of all bundles.
    pub(crate) fn bundles(&self) -> PathBuf {
        self.path("state/io.containerd.runtime.v2.task")
    }

    /// Puts a folder before PATH for engines started from now on.
    pub(crate) fn prepend_path(&mut self, folder: PathBuf) {
        self.path = Some(folder);
    }

    /// Starts the engine and waits until it answers and its events arrive.
    pub(crate) async fn start_engine(&mut self) {
        let binary =
            std::env::var_os("GANTRY_TEST_ENGINE").map_or_else(|| tests::binary("gantryd"), PathBuf::from);
        assert!(binary.exists(), "{} is not there: build it first (cargo build)", binary.display());
        let log = fs::OpenOptions::new().create(true).append(true).open(self.path("engine.log")).unwrap();
        let mut command = Command::new(binary);
        command
            .arg("--config")
            .arg(self.path("config.toml"))
            .arg("--address")
            .arg(self.path("engine.sock"))
            .arg("--root")
            .arg(self.path("root"))
            .arg("--state")
            .arg(self.path("state"))
            .args(["--log-level", "debug"])
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .process_group(0);
        if let Some(folder) = &self.path {
            command.env("PATH", format!("{}:{}", folder.display(), std::env::var("PATH").unwrap()));
        }
        self.engine = Some(command.spawn().unwrap());
        let channel = Endpoint::try_from(format!("unix://{}", self.path("engine.sock").display()))
            .unwrap()
            .connect_lazy();
        eventually("the engine answers", || {
            let mut client = VersionClient::new(channel.clone());
            async move { client.version(()).await.is_ok() }
        })
        .await;
        self.channel = Some(channel.clone());
        let request = self.request(SubscribeRequest { filters: vec![] });
        tokio::spawn(collect(EventsClient::new(channel), request, Arc::clone(&self.events)));
        self.first_event().await;
    }

    /// Publishes until the subscription delivers, so that no event of the test can be missed.
    async fn first_event(&self) {
        let topic = format!("/bench/{}", self.events.lock().unwrap().len());
        let client = EventsClient::new(self.channel());
        eventually("events arrive", || {
            let mut client = client.clone();
            let request = self.request(proto::containerd::services::events::v1::PublishRequest {
                topic: topic.clone(),
                event: Some(proto::any::pack(&proto::containerd::events::TaskOom::default())),
            });
            let (events, topic) = (Arc::clone(&self.events), topic.clone());
            async move {
                client.publish(request).await.unwrap();
                events.lock().unwrap().iter().any(|event| event.topic == topic)
            }
        })
        .await;
    }

    /// Ends the engine with this signal and waits until it is gone.
    pub(crate) fn end_engine(&mut self, signal: Signal) {
        let mut engine = self.engine.take().expect("the engine runs");
        kill(Pid::from_raw(engine.id().cast_signed()), signal).unwrap();
        let deadline = Instant::now() + LIMIT;
        while engine.try_wait().unwrap().is_none() {
            assert!(Instant::now() < deadline, "the engine does not end on {signal}");
            std::thread::sleep(Duration::from_millis(10));
        }
        self.channel = None;
    }

    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone().expect("the engine runs")
    }

    /// A request in the bench's namespace.
    pub(crate) fn request<T>(&self, message: T) -> Request<T> {
        let mut request = Request::new(message);
        request.metadata_mut().insert("containerd-namespace", self.namespace.parse().unwrap());
        request
    }

    /// A client of the task service.
    pub(crate) fn tasks(&self) -> TasksClient<Channel> {
        TasksClient::new(self.channel())
    }

    /// What the engine has logged.
    pub(crate) fn log(&self) -> String {
        fs::read_to_string(self.path("engine.log")).unwrap_or_default()
    }

    // ---- events

    /// The topics of this container's task events so far, in order.
    pub(crate) fn topics(&self, id: &str) -> Vec<String> {
        self.task_events(id).into_iter().map(|(topic, _)| topic).collect()
    }

    /// Topic and exit status (0 where it has none) of this container's task events, in order.
    pub(crate) fn task_events(&self, id: &str) -> Vec<(String, u32)> {
        use proto::containerd::events as e;
        let events = self.events.lock().unwrap();
        let mut found = Vec::new();
        for event in events.iter().filter(|event| event.namespace == self.namespace) {
            let Some(any) = &event.event else { continue };
            macro_rules! of {
                ($($type:ident $(.$status:ident)?),*) => {$(
                    if let Ok(event_) = proto::any::unpack::<e::$type>(any) {
                        if event_.container_id == id {
                            #[allow(unused_mut, unused_assignments)]
                            let mut status = 0;
                            $(status = event_.$status;)?
                            found.push((event.topic.clone(), status));
                        }
                        continue;
                    }
                )*};
            }
            of!(
                TaskCreate,
                TaskStart,
                TaskExit.exit_status,
                TaskDelete.exit_status,
                TaskExecAdded,
                TaskExecStarted,
                TaskPaused,
                TaskResumed
            );
        }
        found
    }

    /// Waits until this container's events hold the topic.
    pub(crate) async fn event(&self, id: &str, topic: &str) {
        eventually(&format!("event {topic} of {id}"), || async {
            self.topics(id).iter().any(|t| t == topic)
        })
        .await;
    }

    // ---- containers and tasks

    /// The spec of a container that runs this command.
    pub(crate) fn spec(&self, id: &str, args: &[&str]) -> Value {
        json!({
            "ociVersion": "1.0.2",
            "process": process(args),
            "root": {"path": "rootfs"},
            "hostname": id,
            "mounts": [
                {"destination": "/proc", "type": "proc", "source": "proc"},
                {"destination": "/dev", "type": "tmpfs", "source": "tmpfs", "options": ["nosuid", "mode=755"]},
            ],
            "linux": {
                "cgroupsPath": format!("/{}/{id}", self.namespace),
                "namespaces": [{"type": "pid"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "network"}],
            },
        })
    }

    /// Makes the container record.
    pub(crate) async fn container(&self, id: &str, runtime: &str, spec: &Value) {
        let container = Container {
            id: id.into(),
            runtime: Some(Runtime { name: runtime.into(), options: None }),
            spec: Some(proto::any::wrap(proto::any::SPEC, spec.to_string())),
            labels: BTreeMap::from([("test".to_owned(), "tasks".to_owned())]).into_iter().collect(),
            ..Container::default()
        };
        let request = self.request(CreateContainerRequest { container: Some(container) });
        ContainersClient::new(self.channel()).create(request).await.unwrap();
    }

    /// Removes the container record.
    pub(crate) async fn remove_container(&self, id: &str) {
        let request = self.request(DeleteContainerRequest { id: id.into() });
        ContainersClient::new(self.channel()).delete(request).await.unwrap();
    }

    /// What a client sends to create the task of a container: the shared root, and output to the file `ID.out`.
    pub(crate) fn create_request(&self, id: &str) -> tasks::CreateTaskRequest {
        tasks::CreateTaskRequest {
            container_id: id.into(),
            rootfs: vec![Mount {
                r#type: "bind".into(),
                source: self.path("rootfs").display().to_string(),
                options: vec!["rbind".into(), "rw".into()],
                ..Mount::default()
            }],
            stdout: format!("file://{}", self.path(&format!("{id}.out")).display()),
            // Both, as clients do: the stock shim panics otherwise.
            stderr: format!("file://{}", self.path(&format!("{id}.out")).display()),
            ..tasks::CreateTaskRequest::default()
        }
    }

    /// Creates the task.
    pub(crate) async fn create(&self, id: &str) -> Answer<u32> {
        let answer = self.tasks().create(self.request(self.create_request(id))).await?.into_inner();
        assert_eq!(answer.container_id, id);
        Ok(answer.pid)
    }

    /// Makes a container and its task and starts it; its init's pid.
    pub(crate) async fn run(&self, id: &str, runtime: &str, args: &[&str]) -> u32 {
        self.container(id, runtime, &self.spec(id, args)).await;
        let pid = self.create(id).await.unwrap();
        assert_eq!(self.start_process(id, "").await.unwrap(), pid);
        pid
    }

    /// Starts the init (exec id "") or an exec.
    pub(crate) async fn start_process(&self, id: &str, exec_id: &str) -> Answer<u32> {
        let request = tasks::StartRequest { container_id: id.into(), exec_id: exec_id.into() };
        Ok(self.tasks().start(self.request(request)).await?.into_inner().pid)
    }

    /// Waits for the exit of the init (exec id "") or an exec.
    pub(crate) async fn wait(&self, id: &str, exec_id: &str) -> Answer<u32> {
        let request = tasks::WaitRequest { container_id: id.into(), exec_id: exec_id.into() };
        let answer = tokio::time::timeout(LIMIT, self.tasks().wait(self.request(request))).await;
        let answer =
            answer.unwrap_or_else(|_| panic!("wait for {id} {exec_id} did not return"))?.into_inner();
        assert!(answer.exited_at.is_some());
        Ok(answer.exit_status)
    }

    /// Sends a signal.
    pub(crate) async fn kill(&self, id: &str, exec_id: &str, signal: u32) -> Answer<()> {
        let (container_id, exec_id) = (id.into(), exec_id.into());
        let request = tasks::KillRequest { container_id, exec_id, signal, all: false };
        self.tasks().kill(self.request(request)).await?;
        Ok(())
    }

    /// Deletes the task; its exit status.
    pub(crate) async fn delete(&self, id: &str) -> Answer<u32> {
        let request = tasks::DeleteTaskRequest { container_id: id.into() };
        Ok(self.tasks().delete(self.request(request)).await?.into_inner().exit_status)
    }

    /// Deletes an exec; its exit status.
    pub(crate) async fn delete_exec(&self, id: &str, exec_id: &str) -> Answer<u32> {
        let request = tasks::DeleteProcessRequest { container_id: id.into(), exec_id: exec_id.into() };
        Ok(self.tasks().delete_process(self.request(request)).await?.into_inner().exit_status)
    }

    /// The init (exec id "") or an exec, as the engine tells it.
    pub(crate) async fn get(&self, id: &str, exec_id: &str) -> Answer<Process> {
        let request = tasks::GetRequest { container_id: id.into(), exec_id: exec_id.into() };
        Ok(self.tasks().get(self.request(request)).await?.into_inner().process.unwrap())
    }

    /// The state of the init.
    pub(crate) async fn status(&self, id: &str) -> Status {
        self.get(id, "").await.unwrap().status()
    }

    /// The state of the init, None when there is no such task.
    pub(crate) async fn status_or_none(&self, id: &str) -> Option<Status> {
        match self.get(id, "").await {
            Ok(process) => Some(process.status()),
            Err(status) => {
                assert_eq!(status.code(), Code::NotFound, "{}", status.message());
                None
            }
        }
    }

    /// The ids of all tasks of the namespace.
    pub(crate) async fn list(&self) -> Vec<String> {
        let answer = self.tasks().list(self.request(tasks::ListTasksRequest::default())).await.unwrap();
        let mut ids: Vec<String> = answer.into_inner().tasks.into_iter().map(|task| task.id).collect();
        ids.sort();
        ids
    }

    /// Adds an exec, with output to the file `ID.EXEC.out`.
    pub(crate) async fn exec(&self, id: &str, exec_id: &str, args: &[&str]) -> Answer<()> {
        let request = tasks::ExecProcessRequest {
            container_id: id.into(),
            exec_id: exec_id.into(),
            stdout: format!("file://{}", self.path(&format!("{id}.{exec_id}.out")).display()),
            // Both, as clients do: the stock shim panics otherwise.
            stderr: format!("file://{}", self.path(&format!("{id}.{exec_id}.out")).display()),
            spec: Some(proto::any::wrap(proto::any::PROCESS, process(args).to_string())),
            ..tasks::ExecProcessRequest::default()
        };
        self.tasks().exec(self.request(request)).await?;
        Ok(())
    }

    /// Kills, waits for and deletes a running task, and removes its container.
    pub(crate) async fn clear(&self, id: &str) {
        self.kill(id, "", 9).await.unwrap();
        assert_eq!(self.wait(id, "").await.unwrap(), 137);
        assert_eq!(self.delete(id).await.unwrap(), 137);
        self.remove_container(id).await;
    }

    /// The output of a container (`ID`) or an exec (`ID.EXEC`).
    pub(crate) fn output(&self, name: &str) -> String {
        fs::read_to_string(self.path(&format!("{name}.out"))).unwrap_or_default()
    }

    // ---- the host

    /// The shims that serve this bench's engine.
    pub(crate) fn shim_pids(&self) -> Vec<i32> {
        let address = self.path("engine.sock").display().to_string();
        processes(|arguments| {
            arguments.contains(&address)
                && arguments[0].contains("shim")
                && !arguments.contains(&"delete".to_owned())
        })
    }

    /// What of this bench's tasks is on the host: bundles, mounts, shims, control groups, runc's records.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut left = Vec::new();
        if let Ok(bundles) = fs::read_dir(self.bundles().join(&self.namespace)) {
            left.extend(bundles.map(|bundle| format!("bundle {}", bundle.unwrap().path().display())));
        }
        if let Ok(work) = fs::read_dir(self.path("root/io.containerd.runtime.v2.task").join(&self.namespace))
        {
            left.extend(work.map(|work| format!("work folder {}", work.unwrap().path().display())));
        }
        left.extend(self.mounts().into_iter().map(|mount| format!("mount {mount}")));
        left.extend(self.shim_pids().into_iter().map(|pid| format!("shim {pid}")));
        if let Ok(records) = fs::read_dir(self.runc_root()) {
            left.extend(records.map(|record| format!("runc's {}", record.unwrap().path().display())));
        }
        for groups in self.cgroups() {
            left.push(format!("control group {}", groups.display()));
        }
        left
    }

    /// Whether any process of this container runs, by its control groups.
    pub(crate) fn runs(&self, id: &str) -> bool {
        let name = id;
        self.cgroups().iter().filter(|group| group.file_name().is_some_and(|n| n == name)).any(|group| {
            fs::read_to_string(group.join("cgroup.procs")).is_ok_and(|processes| !processes.trim().is_empty())
        })
    }

    fn runc_root(&self) -> PathBuf {
        Path::new("/run/containerd/runc").join(&self.namespace)
    }

    fn mounts(&self) -> Vec<String> {
        let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
        let dir = self.dir.path().display().to_string();
        mounts
            .lines()
            .filter_map(|line| line.split(' ').nth(4))
            .filter(|m| m.starts_with(&dir))
            .map(Into::into)
            .collect()
    }

    fn cgroups(&self) -> Vec<PathBuf> {
        tests::left::cgroups(&self.namespace)
    }

    /// The end of a test: no task of it may be left anywhere.
    pub(crate) async fn finish(mut self) {
        eventually("shims and bundles are gone", || async {
            self.leftovers().is_empty() || !self.settling()
        })
        .await;
        assert_eq!(self.leftovers(), Vec::<String>::new());
        self.end_engine(Signal::SIGTERM);
    }

    /// Whether what is left may still go by itself within a moment.
    fn settling(&self) -> bool {
        static SINCE: Mutex<BTreeMap<String, Instant>> = Mutex::new(BTreeMap::new());
        let mut since = SINCE.lock().unwrap();
        since.entry(self.namespace.clone()).or_insert_with(Instant::now).elapsed() < Duration::from_secs(10)
    }
}

/// Collects events until the engine ends. Stock containerd answers the call only with the first event.
async fn collect(
    mut client: EventsClient<Channel>,
    request: Request<SubscribeRequest>,
    events: Arc<Mutex<Vec<Envelope>>>,
) {
    let Ok(answer) = client.subscribe(request).await else { return };
    let mut stream = answer.into_inner();
    while let Ok(Some(event)) = stream.message().await {
        events.lock().unwrap().push(event);
    }
}

/// A process of a container.
fn process(args: &[&str]) -> Value {
    json!({
        "user": {"uid": 0, "gid": 0},
        "args": args,
        "env": ["PATH=/bin"],
        "cwd": "/",
    })
}

/// The processes whose arguments pass.
fn processes(passes: impl Fn(&[String]) -> bool) -> Vec<i32> {
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Ok(pid) = entry.file_name().to_string_lossy().parse::<i32>() else { continue };
        let Ok(line) = fs::read(entry.path().join("cmdline")) else { continue };
        let arguments: Vec<String> =
            line.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned()).collect();
        if arguments.len() > 1 && passes(&arguments) {
            found.push(pid);
        }
    }
    found
}

impl Drop for Bench {
    fn drop(&mut self) {
        tests::host::keep_log(&self.log());
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(60).collect();
            for line in tail.into_iter().rev() {
                println!("engine: {line}");
            }
        }
        if let Some(mut engine) = self.engine.take() {
            let _ = engine.kill();
            let _ = engine.wait();
        }
        let sockets = tests::left::shim_sockets(&self.path("state"));
        // Our shims and scripts all carry the address of this bench's engine.
        let address = self.path("engine.sock").display().to_string();
        for pid in processes(|arguments| arguments.contains(&address)) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        for socket in sockets {
            let _ = fs::remove_file(socket);
        }
        if let Ok(records) = fs::read_dir(self.runc_root()) {
            for record in records.flatten() {
                let _ = Command::new("runc")
                    .arg("--root")
                    .arg(self.runc_root())
                    .args(["delete", "--force"])
                    .arg(record.file_name())
                    .stderr(Stdio::null())
                    .status();
            }
        }
        let _ = fs::remove_dir_all(self.runc_root());
        for mount in self.mounts().iter().rev() {
            let _ = nix::mount::umount2(mount.as_str(), nix::mount::MntFlags::MNT_DETACH);
        }
        for group in self.cgroups() {
            let _ = fs::remove_dir(group);
        }
        tests::left::remove_empty_parents(&self.namespace);
    }
}

/// Asserts the class of a refusal; its message.
#[track_caller]
pub(crate) fn refused<T: std::fmt::Debug>(answer: Answer<T>, code: Code) -> String {
    let status = answer.expect_err("it should have been refused");
    assert_eq!(status.code(), code, "{}", status.message());
    status.message().to_owned()
}
