//! Exec, attach and port-forward, over SPDY and over WebSockets, with containers of both shims: what runs behind the addresses
//! that the kubelet is given.
//!
//! The engine's own rooms are used here, without its socket: what is tested is what a client meets at such an address.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use engine::api::shim_events;
use engine::containers::Containers;
use engine::content::Content;
use engine::context::{Namespace, RequestContext};
use engine::cri::NAMESPACE;
use engine::cri::exec::{Execs, Options};
use engine::cri::store::Store;
use engine::cri::streaming::{Server, Settings};
use engine::diff::Diff;
use engine::error::Error;
use engine::events::Exchange;
use engine::metadata::Metadata;
use engine::metadata::cri::{ContainerStage, PodContainerRecord, PodRecord, PodStage};
use engine::tasks::{Tasks, TasksOptions};
use futures::{SinkExt as _, StreamExt as _};
use nix::sys::signal::Signal;
use nix::unistd::Pid;
use oci::runtime::Spec;
use proto::containerd::services::containers::v1::Container;
use proto::containerd::services::containers::v1::container::Runtime;
use proto::containerd::services::tasks::v1::{CreateTaskRequest, ExecProcessRequest};
use proto::containerd::types::Mount;
use proto::runtime::v1::{AttachRequest, ExecRequest, PortForwardRequest};
use shim_api::logs::{LogSpec, Stdin};
use tests::host::{RUNC, STOCK_SHIM};
use tests::image::BUSYBOX;
use tests::spdy::{Said, Spdy};
use tests::{LIMIT, binary, left};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::client::IntoClientRequest as _;
use tokio_tungstenite::{WebSocketStream, client_async};

/// What a container is run with.
struct Setup<'a> {
    shim: &'a str,
    command: &'a str,
    netns: Option<PathBuf>,
    drain: Option<Duration>,
    /// Whether its streams can be joined.
    attach: bool,
}

impl Default for Setup<'_> {
    fn default() -> Self {
        Setup { shim: "", command: "exec sleep 1000", netns: None, drain: None, attach: false }
    }
}

/// The rooms of an engine, and one running container.
struct Rig {
    dir: tempfile::TempDir,
    id: String,
    context: RequestContext,
    tasks: Tasks,
    containers: Containers,
    store: Store,
    execs: Execs,
    server: Server,
}

impl Rig {
    async fn start(shim: &str) -> Rig {
        Rig::set_up(Setup { shim, ..Setup::default() }).await
    }

    async fn set_up(setup: Setup<'_>) -> Rig {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let id = format!("cs{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let dir = tempfile::Builder::new().prefix("gt-").tempdir_in("/tmp").unwrap();
        let (folder, drain) = (dir.path().to_owned(), setup.drain);
        let opened = tokio::task::spawn_blocking(move || {
            let path = |name: &str| folder.join(name);
            let metadata = Metadata::open(&path("metadata")).unwrap();
            let events = Exchange::open(&folder, 1 << 20, &metadata).unwrap();
            let content = Content::open(&path("content"), metadata.clone(), events.clone()).unwrap();
            let diff = Diff::open(content, path("mounts")).unwrap();
            let options = TasksOptions {
                root: path("r"),
                state: path("s"),
                grpc_address: path("e.sock"),
                ttrpc_address: path("e.sock.ttrpc"),
                shim_dirs: Vec::new(),
                descriptors: None,
                hooks: Default::default(),
            };
            let tasks = Tasks::open(options, metadata.clone(), events.clone(), diff).unwrap();
            let containers = Containers::new(metadata.clone(), events);
            let store = Store::open(metadata);
            let limits = Default::default();
            let options = Options { folder: path("s/cri/execs"), drain, limits };
            let execs = Execs::new(options, store.clone(), tasks.clone(), containers.clone()).unwrap();
            (tasks, containers, store, execs)
        });
        let (tasks, containers, store, execs) = opened.await.unwrap();
        let listener = tokio::net::UnixListener::bind(dir.path().join("e.sock.ttrpc")).unwrap();
        tokio::spawn(shim_events::serve(listener, tasks.clone()));
        let server = Server::start(Settings::default(), execs.clone()).await.unwrap();
        let context = RequestContext::internal(Namespace::new(NAMESPACE).unwrap());
        let rig = Rig { dir, id, context, tasks, containers, store, execs, server };
        rig.run(setup).await;
        rig
    }

    async fn run(&self, setup: Setup<'_>) {
        let rootfs = self.dir.path().join("rootfs");
        for folder in ["bin", "dev", "proc", "sys", "tmp", "run"] {
            std::fs::create_dir_all(rootfs.join(folder)).unwrap();
        }
        std::fs::copy(BUSYBOX, rootfs.join("bin/busybox")).unwrap();
        for applet in ["sh", "sleep", "cat", "true", "seq", "stty", "nc", "dd", "kill", "test", "wc"] {
            symlink("busybox", rootfs.join("bin").join(applet)).unwrap();
        }
        let mut spec = Spec::linux(NAMESPACE, &self.id);
        spec.process_mut().args = ["sh", "-c", setup.command].map(String::from).to_vec();
        spec.process_mut().env = vec!["PATH=/bin".into()];
        if let Some(netns) = &setup.netns {
            spec.set_namespace("network", netns.to_str().unwrap()).unwrap();
        }
        let container = Container {
            id: self.id.clone(),
            runtime: Some(Runtime { name: setup.shim.to_owned(), options: None }),
            spec: Some(proto::any::wrap(proto::any::SPEC, serde_json::to_vec(&spec).unwrap())),
            ..Default::default()
        };
        self.containers.create(&self.context, container).await.unwrap();
        let mount = Mount {
            r#type: "bind".into(),
            source: rootfs.display().to_string(),
            options: vec!["rbind".into(), "rw".into()],
            ..Default::default()
        };
        let mut log = LogSpec::new(None, self.dir.path().join("s/cri/streams").join(&self.id));
        log.stdin = Stdin::Once;
        let request = CreateTaskRequest {
            container_id: self.id.clone(),
            rootfs: vec![mount],
            stdout: if setup.attach { log.to_uri() } else { String::new() },
            ..Default::default()
        };
        self.tasks.create(&self.context, request).await.unwrap();
        self.tasks.start(&self.context, &self.id, "").await.unwrap();
        let netns = setup.netns.map(|path| path.display().to_string()).unwrap_or_default();
        let pod = PodRecord { stage: PodStage::Ready.into(), netns, ..Default::default() };
        self.store.add_pod("pod", pod).await.unwrap();
        let stage = ContainerStage::Running.into();
        let streams = log.socket.display().to_string();
        let record = PodContainerRecord { pod: "pod".into(), stage, streams, ..Default::default() };
        self.store.add_container(&self.id, record).await.unwrap();
    }

    /// Where this command has its streams: `i`n, `o`ut, `e`rr, `t`erminal.
    fn exec(&self, streams: &str, command: &str) -> String {
        let has = |of: char| streams.contains(of);
        let request = ExecRequest {
            container_id: self.id.clone(),
            cmd: ["sh", "-c", command].map(String::from).to_vec(),
            tty: has('t'),
            stdin: has('i'),
            stdout: has('o'),
            stderr: has('e'),
        };
        self.server.exec_url(request).unwrap()
    }

    async fn sync(&self, command: &str, timeout: Option<Duration>) -> Result<(String, String, u32), Error> {
        let command = ["sh", "-c", command].map(String::from).to_vec();
        let synced = self.execs.exec_sync(&self.id, command, timeout).await?;
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Ok((text(synced.stdout), text(synced.stderr), synced.exit_code))
    }

    /// How many processes the container has.
    async fn processes(&self) -> usize {
        self.tasks.pids(&self.context, &self.id).await.unwrap().len()
    }

    /// Waits until no exec is left: neither its processes nor its fifos.
    async fn quiet(&self) {
        let folder = self.dir.path().join("s/cri/execs");
        eventually("no exec is left", async || {
            std::fs::read_dir(&folder).unwrap().count() == 0 && self.processes().await == 1
        })
        .await;
    }

    async fn end(self) {
        self.quiet().await;
        self.tasks.kill(&self.context, &self.id, "", 9, true).await.unwrap();
        self.gone().await;
    }

    /// Its container has ended: nothing is left of it.
    async fn gone(self) {
        self.tasks.wait(&self.context, &self.id, "").await.unwrap();
        self.tasks.delete(&self.context, &self.id).await.unwrap();
        self.containers.delete(&self.context, self.id.clone()).await.unwrap();
        eventually("nothing is left", async || {
            left::processes(self.dir.path()).is_empty()
                && left::mounts(self.dir.path()).is_empty()
                && self.cgroups().is_empty()
        })
        .await;
        left::remove_empty_parents(NAMESPACE);
    }

    /// Those of its container.
    fn cgroups(&self) -> Vec<PathBuf> {
        let all = left::cgroups(NAMESPACE).into_iter();
        all.filter(|cgroup| cgroup.ends_with(&self.id)).collect()
    }
}

/// Ends whatever there is, so that a test that failed leaves nothing on the machine.
impl Drop for Rig {
    fn drop(&mut self) {
        for (shim, _) in left::processes(self.dir.path()) {
            let _ = nix::sys::signal::kill(Pid::from_raw(shim), Signal::SIGKILL);
        }
        let root = Path::new("/run/containerd/runc").join(NAMESPACE);
        if root.join(&self.id).exists() {
            let mut delete = std::process::Command::new(RUNC);
            let _ = delete.arg("--root").arg(root).args(["delete", "--force", &self.id]).output();
        }
        for mount in left::mounts(self.dir.path()) {
            let _ = rustix::mount::unmount(&mount, rustix::mount::UnmountFlags::DETACH);
        }
        for cgroup in self.cgroups() {
            let _ = std::fs::remove_dir(cgroup);
        }
    }
}

async fn eventually(what: &str, mut holds: impl AsyncFnMut() -> bool) {
    let end = Instant::now() + LIMIT;
    while !holds().await {
        assert!(Instant::now() < end, "waited {LIMIT:?} until {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

fn shims() -> Vec<String> {
    if !tests::ready(&[RUNC, BUSYBOX, STOCK_SHIM]) {
        return Vec::new();
    }
    vec![STOCK_SHIM.to_owned(), binary("containerd-shim-runc-v2").display().to_string()]
}

fn json(bytes: &[u8]) -> serde_json::Value {
    serde_json::from_slice(bytes)
        .unwrap_or_else(|error| panic!("{error}: {}", String::from_utf8_lossy(bytes)))
}

const V4: &[&str] = &["v4.channel.k8s.io"];

#[tokio::test(flavor = "multi_thread")]
async fn a_command_has_its_streams_over_spdy() {
    for shim in shims() {
        let rig = Rig::start(&shim).await;
        let url = rig.exec("ioe", "cat; echo oops >&2; exit 7");
        let mut client = Spdy::connect(&url, &["v9.channel.k8s.io", "v4.channel.k8s.io"]).await.unwrap();
        assert_eq!(client.protocol, "v4.channel.k8s.io");
        let streams = client.open_all(&["error", "stdin", "stdout", "stderr"]).await;
        client.send(streams["stdin"], b"hello\n", false).await;
        assert_eq!(client.until(streams["stdout"], "\n").await, "hello\n");
        // Its input ends; its output does not.
        client.send(streams["stdin"], b"again\n", true).await;
        let all = client.all(&[streams["error"], streams["stdout"], streams["stderr"]]).await;
        assert_eq!(all[&streams["stdout"]], b"again\n");
        assert_eq!(all[&streams["stderr"]], b"oops\n");
        let status = json(&all[&streams["error"]]);
        assert_eq!((&status["status"], &status["reason"]), (&"Failure".into(), &"NonZeroExitCode".into()));
        assert_eq!(status["details"]["causes"][0]["message"], "7");

        // Much, both ways.
        let mut client = Spdy::connect(&rig.exec("io", "cat"), V4).await.unwrap();
        let streams = client.open_all(&["error", "stdin", "stdout"]).await;
        let sent: Vec<u8> = (0..3_000_000_u32).map(|at| (at % 251) as u8).collect();
        let mut received = 0;
        for (number, part) in sent.chunks(200_000).enumerate() {
            client.send(streams["stdin"], part, number == 14).await;
            while received < part.len() * number {
                let Said::Data(_, bytes, false) = client.said().await else { panic!("it ended early") };
                assert_eq!(bytes, sent[received..received + bytes.len()]);
                received += bytes.len();
            }
        }
        let all = client.all(&[streams["error"], streams["stdout"]]).await;
        assert!(all[&streams["stdout"]] == sent[received..]);
        assert_eq!(json(&all[&streams["error"]])["status"], "Success");
        rig.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn older_versions_are_told_in_words() {
    for shim in shims() {
        let rig = Rig::start(&shim).await;
        for version in ["v3.channel.k8s.io", "v2.channel.k8s.io", "channel.k8s.io"] {
            let mut client = Spdy::connect(&rig.exec("o", "echo hi; exit 3"), &[version]).await.unwrap();
            let streams = client.open_all(&["error", "stdout"]).await;
            let all = client.all(&[streams["error"], streams["stdout"]]).await;
            assert_eq!(all[&streams["stdout"]], b"hi\n");
            assert_eq!(all[&streams["error"]], b"command terminated with exit code 3");
        }
        let mut client = Spdy::connect(&rig.exec("o", "true"), &["v2.channel.k8s.io"]).await.unwrap();
        let streams = client.open_all(&["error", "stdout"]).await;
        assert_eq!(client.all(&[streams["error"], streams["stdout"]]).await[&streams["error"]], b"");
        let refused = Spdy::connect(&rig.exec("o", "true"), &["v9.channel.k8s.io"]).await.err().unwrap();
        assert!(refused.starts_with("HTTP/1.1 403 "), "{refused}");
        rig.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_terminal_has_the_size_that_its_client_says() {
    for shim in shims() {
        let rig = Rig::start(&shim).await;
        let mut client =
            Spdy::connect(&rig.exec("iot", "stty size; read x; stty size; echo $TERM"), V4).await.unwrap();
        let streams = client.open_all(&["error", "stdin", "stdout", "resize"]).await;
        let (size, out) = (streams["resize"], streams["stdout"]);
        // The first size may come before the process has its terminal, and may come late.
        client.until(out, "\n").await;
        client.send(size, br#"{"Width":99,"Height":33}"#, false).await;
        client.send(size, b"{\"Width\":101,\"Height\":35}\n", false).await;
        // A size has no answer: it is asked for until it is there.
        eventually("the terminal has its size", async || {
            rig.sync("stty size < /dev/pts/0", None).await.is_ok_and(|(out, ..)| out == "35 101\n")
        })
        .await;
        client.send(streams["stdin"], b"go\n", false).await;
        let all = client.all(&[streams["error"], out]).await;
        let text = String::from_utf8_lossy(&all[&out]).replace('\r', "");
        assert!(text.ends_with("35 101\nxterm\n"), "{text:?}");
        assert_eq!(json(&all[&streams["error"]])["status"], "Success");
        rig.end().await;
    }
}

/// A WebSocket to an address that the engine gave.
async fn websocket(url: &str, protocol: &str) -> WebSocketStream<TcpStream> {
    let mut request = url.replace("http://", "ws://").into_client_request().unwrap();
    request.headers_mut().insert("sec-websocket-protocol", protocol.parse().unwrap());
    let stream = TcpStream::connect(url.split('/').nth(2).unwrap()).await.unwrap();
    client_async(request, stream).await.unwrap().0
}

/// All that comes until the server has said goodbye, by channel.
async fn all_of(mut socket: WebSocketStream<TcpStream>) -> [Vec<u8>; 5] {
    let mut all = [const { Vec::new() }; 5];
    loop {
        match tokio::time::timeout(LIMIT, socket.next()).await.expect("the server says nothing") {
            Some(Ok(Message::Binary(bytes))) => all[usize::from(bytes[0])].extend(&bytes[1..]),
            Some(Ok(Message::Text(text))) => {
                use base64::Engine as _;
                let bytes = base64::engine::general_purpose::STANDARD.decode(&text[1..]).unwrap();
                all[usize::from(text.as_bytes()[0] - b'0')].extend(bytes);
            }
            Some(Ok(Message::Close(Some(close)))) => {
                assert_eq!(u16::from(close.code), 1000);
                return all;
            }
            other => panic!("{other:?}; so far: {all:?}"),
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_has_its_streams_over_a_websocket() {
    for shim in shims() {
        let rig = Rig::start(&shim).await;
        // The fifth version ends its input.
        let mut socket = websocket(&rig.exec("ioe", "cat; echo oops >&2; exit 7"), "v5.channel.k8s.io").await;
        socket.send(Message::binary(&b"\0hello"[..])).await.unwrap();
        socket.send(Message::binary(&[255, 0][..])).await.unwrap();
        let [_, stdout, stderr, error, _] = all_of(socket).await;
        assert_eq!((&stdout[..], &stderr[..]), (&b"hello"[..], &b"oops\n"[..]));
        assert_eq!(json(&error)["details"]["causes"][0]["message"], "7");
        // Others have no way to; base64 is text.
        let mut socket = websocket(&rig.exec("io", "read x; echo $x"), "v4.base64.channel.k8s.io").await;
        socket.send(Message::text("0aGV5Cg==")).await.unwrap();
        let [_, stdout, _, error, _] = all_of(socket).await;
        assert_eq!((&stdout[..], &json(&error)["status"]), (&b"hey\n"[..], &"Success".into()));
        let [_, stdout, _, error, _] =
            all_of(websocket(&rig.exec("o", "echo hi; exit 3"), "channel.k8s.io").await).await;
        assert_eq!((&stdout[..], &error[..]), (&b"hi\n"[..], &b"command terminated with exit code 3"[..]));
        // A terminal, sized on its channel.
        let mut socket = websocket(&rig.exec("iot", "read x; stty size"), "v4.channel.k8s.io").await;
        socket.send(Message::binary(&b"\x04{\"Width\":70,\"Height\":20}"[..])).await.unwrap();
        eventually("the terminal has its size", async || {
            rig.sync("stty size < /dev/pts/0", None).await.is_ok_and(|(out, ..)| out == "20 70\n")
        })
        .await;
        socket.send(Message::binary(&b"\0go\n"[..])).await.unwrap();
        let [_, stdout, ..] = all_of(socket).await;
        assert!(String::from_utf8_lossy(&stdout).contains("20 70"), "{stdout:?}");
        rig.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_goes_on_without_its_client_and_its_input_ends() {
    for shim in shims() {
        let rig = Rig::start(&shim).await;
        let command = "cat > /tmp/in; seq 100000; echo done > /tmp/done; exit 5";
        let mut client = Spdy::connect(&rig.exec("io", command), V4).await.unwrap();
        let streams = client.open_all(&["error", "stdin", "stdout"]).await;
        client.send(streams["stdin"], b"half", false).await;
        eventually("it has begun", async || {
            rig.sync("cat /tmp/in", None).await.is_ok_and(|(out, ..)| out == "half")
        })
        .await;
        drop(client);
        // More than a fifo holds is written by now, and nobody reads it.
        eventually("it has ended", async || rig.sync("cat /tmp/done", None).await.unwrap().0 == "done\n")
            .await;
        rig.end().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_command_that_is_waited_for_is_bounded_in_size_and_time() {
    for shim in shims() {
        let rig =
            Rig::set_up(Setup { shim: &shim, drain: Some(Duration::from_secs(2)), ..Setup::default() }).await;
        assert_eq!(
            rig.sync("echo a; echo b >&2; exit 4", None).await.unwrap(),
            ("a\n".into(), "b\n".into(), 4)
        );
        assert_eq!(rig.sync("cat", None).await.unwrap(), (String::new(), String::new(), 0));
        let (out, ..) = rig.sync("dd if=/dev/zero bs=1000000 count=20 2>/dev/null", None).await.unwrap();
        assert_eq!(out.len(), 16 << 20);
        let begin = Instant::now();
        let late = rig.sync("exec sleep 1000", Some(Duration::from_secs(1))).await.unwrap_err();
        assert!(matches!(late, Error::DeadlineExceeded(_)), "{late:?}");
        assert!(begin.elapsed() < Duration::from_secs(20));
        rig.quiet().await;
        // Its caller goes.
        let execs = (rig.execs.clone(), rig.id.clone());
        let waiting = tokio::spawn(async move {
            execs.0.exec_sync(&execs.1, ["sleep", "1000"].map(String::from).to_vec(), None).await
        });
        eventually("it runs", async || rig.processes().await == 2).await;
        waiting.abort();
        rig.quiet().await;
        // Somebody else holds its output.
        let held = rig.sync("sleep 1000 & echo $! > /tmp/pid; echo x", None).await.unwrap_err();
        assert!(held.to_string().contains("still holds its output"), "{held}");
        rig.sync("kill $(cat /tmp/pid)", None).await.unwrap();
        assert!(rig.execs.exec_sync(&rig.id, vec!["/no/such".into()], None).await.is_err());
        assert!(matches!(rig.execs.exec_sync("none", vec!["x".into()], None).await, Err(Error::NotFound(_))));
        rig.end().await;
    }
}

/// The bytes that messages carry.
fn tunnel(mut socket: WebSocketStream<TcpStream>) -> DuplexStream {
    let (ours, mut theirs) = tokio::io::duplex(1 << 16);
    tokio::spawn(async move {
        let mut buffer = vec![0; 1 << 16];
        loop {
            tokio::select! {
                length = theirs.read(&mut buffer) => match length.unwrap() {
                    0 => return,
                    length => socket.send(Message::binary(buffer[..length].to_vec())).await.unwrap(),
                },
                message = socket.next() => match message {
                    Some(Ok(Message::Binary(bytes))) => theirs.write_all(&bytes).await.unwrap(),
                    _ => return,
                },
            }
        }
    });
    ours
}

#[tokio::test(flavor = "multi_thread")]
async fn what_an_earlier_engine_left_running_is_looked_after() {
    for shim in shims() {
        let rig = Rig::start(&shim).await;
        let folder = rig.dir.path().join("s/cri/execs");
        // As an engine leaves them that is killed: one that was waited for, one whose output nobody reads, one that is gone.
        for (exec, command) in
            [("sync-1", "exec sleep 1000"), ("exec-2", "seq 100000; echo done > /tmp/done")]
        {
            let fifos = folder.join(format!("{exec}@{}", rig.id));
            std::fs::create_dir(&fifos).unwrap();
            let paths = ["stdout", "stderr"].map(|name| fifos.join(name));
            let mkfifo = std::process::Command::new("mkfifo").args(&paths).status().unwrap();
            assert!(mkfifo.success());
            // Shims wait for a reader, which there was.
            let readers = paths.each_ref().map(|path| {
                let nonblocking = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::NONBLOCK;
                rustix::fs::open(path, nonblocking, rustix::fs::Mode::empty()).unwrap()
            });
            let [stdout, stderr] = paths.map(|path| path.display().to_string());
            let process = serde_json::json!({
                "user": { "uid": 0, "gid": 0 }, "cwd": "/", "env": ["PATH=/bin"], "args": ["sh", "-c", command],
            });
            let request = ExecProcessRequest {
                container_id: rig.id.clone(),
                exec_id: exec.into(),
                stdout,
                stderr,
                spec: Some(proto::any::wrap(proto::any::PROCESS, process.to_string())),
                ..Default::default()
            };
            rig.tasks.exec(&rig.context, request).await.unwrap();
            rig.tasks.start(&rig.context, &rig.id, exec).await.unwrap();
            drop(readers);
        }
        std::fs::create_dir(folder.join("exec-3@none")).unwrap();
        rig.execs.restore().unwrap();
        rig.quiet().await;
        assert_eq!(rig.sync("cat /tmp/done", None).await.unwrap().0, "done\n");
        rig.end().await;
    }
}

/// A network namespace with its own localhost, bound to a file in the folder.
fn network(folder: &Path) -> PathBuf {
    let path = folder.join("net");
    std::fs::write(&path, "").unwrap();
    let script = format!("ip link set lo up && mount --bind /proc/self/ns/net {}", path.display());
    let mut command = std::process::Command::new("unshare");
    // The mount has to be seen outside.
    assert!(command.args(["--net", "sh", "-c", &script]).status().unwrap().success());
    path
}

#[tokio::test(flavor = "multi_thread")]
async fn ports_of_a_pod_are_forwarded() {
    for shim in shims() {
        let folder = tempfile::tempdir().unwrap();
        let netns = network(folder.path());
        let rig = Rig::set_up(Setup { shim: &shim, netns: Some(netns.clone()), ..Setup::default() }).await;
        // What listens there answers what it hears, and says so when that has ended.
        let mut servers = Vec::new();
        for port in [8080, 8081] {
            let command = format!("echo $$ >> /tmp/pids; exec nc -ll -p {port} -e sh -c 'cat; echo over'");
            let mut server = Spdy::connect(&rig.exec("o", &command), V4).await.unwrap();
            server.open_all(&["error", "stdout"]).await;
            servers.push(server);
        }
        eventually("they listen", async || {
            let (out, ..) = rig.sync("cat /proc/net/tcp /proc/net/tcp6", None).await.unwrap();
            out.contains(":1F90 ") && out.contains(":1F91 ")
        })
        .await;
        let forward = |port: Vec<i32>| {
            rig.server.port_forward_url(PortForwardRequest { pod_sandbox_id: "pod".into(), port }).unwrap()
        };
        let mut client = Spdy::connect(&forward(vec![]), &["portforward.k8s.io"]).await.unwrap();
        let mut pairs = Vec::new();
        for (request, port) in [("a", "8080"), ("b", "8081"), ("c", "9")] {
            let headers = |kind| [("streamtype", kind), ("port", port), ("requestid", request)];
            let (error, data) = (client.open(&headers("error")).await, client.open(&headers("data")).await);
            pairs.push((error, data));
        }
        for (_, data) in &pairs[..2] {
            client.send(*data, b"ping", true).await;
        }
        let all =
            client.all(&pairs.iter().flat_map(|(error, data)| [*error, *data]).collect::<Vec<_>>()).await;
        let text = |stream: u32| {
            all.get(&stream).map(|bytes| String::from_utf8_lossy(bytes).into_owned()).unwrap_or_default()
        };
        assert_eq!((text(pairs[0].1), text(pairs[0].0)), ("pingover\n".into(), String::new()));
        assert_eq!((text(pairs[1].1), text(pairs[1].0)), ("pingover\n".into(), String::new()));
        assert!(text(pairs[2].0).contains("refused"), "{}", text(pairs[2].0));
        drop(client);
        // The same through a WebSocket.
        let tunneled = websocket(&forward(vec![]), "SPDY/3.1+portforward.k8s.io").await;
        let mut client = Spdy::over(tunnel(tunneled));
        let headers = |kind| [("streamtype", kind), ("port", "8081"), ("requestid", "0")];
        let (error, data) = (client.open(&headers("error")).await, client.open(&headers("data")).await);
        client.send(data, b"ping", true).await;
        assert_eq!(client.all(&[error, data]).await[&data], b"pingover\n");
        drop(client);
        // And by numbers.
        let mut socket = websocket(&forward(vec![8081, 9]), "v4.channel.k8s.io").await;
        socket.send(Message::binary(&b"\0pong"[..])).await.unwrap();
        let mut seen = [const { Vec::new() }; 4];
        while !(seen[0].ends_with(b"pong") && seen[3].len() > 2) {
            match tokio::time::timeout(LIMIT, socket.next()).await.unwrap().unwrap().unwrap() {
                Message::Binary(bytes) => seen[usize::from(bytes[0])].extend(&bytes[1..]),
                other => panic!("{other:?}"),
            }
        }
        assert_eq!(seen.each_ref().map(|bytes| u16::from_le_bytes([bytes[0], bytes[1]])), [8081, 8081, 9, 9]);
        drop(socket);
        rig.sync("kill $(cat /tmp/pids)", None).await.unwrap();
        rig.end().await;
        assert!(std::process::Command::new("umount").arg(&netns).status().unwrap().success());
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_streams_of_a_container_are_joined_and_left() {
    if shims().is_empty() {
        return;
    }
    let shim = binary("containerd-shim-runc-v2").display().to_string();
    let command = "while read x; do echo got $x; echo oops $x >&2; done; echo bye";
    let rig = Rig::set_up(Setup { shim: &shim, command, attach: true, ..Setup::default() }).await;
    let attach = |stdin| {
        let request = AttachRequest {
            container_id: rig.id.clone(),
            stdin,
            stdout: true,
            stderr: true,
            ..Default::default()
        };
        rig.server.attach_url(request).unwrap()
    };
    let mut reader = Spdy::connect(&attach(false), V4).await.unwrap();
    let read = reader.open_all(&["error", "stdout", "stderr"]).await;
    let mut writer = Spdy::connect(&attach(true), V4).await.unwrap();
    let written = writer.open_all(&["error", "stdin", "stdout", "stderr"]).await;
    let (seen, stdout) = (read["stdout"], written["stdout"]);
    let taken_in = tokio::spawn(async move {
        reader.until(seen, "got 1\n").await;
        reader
    });
    // Whoever joins gets what comes from then on.
    while !taken_in.is_finished() {
        writer.send(written["stdin"], b"1\n", false).await;
        writer.until(stdout, "got 1\n").await;
    }
    let mut reader = taken_in.await.unwrap();
    let left = websocket(&attach(false), "v5.channel.k8s.io").await;
    drop(left);
    writer.send(written["stdin"], b"2\n", true).await;
    for (client, streams) in [(&mut reader, &read), (&mut writer, &written)] {
        let all = client.all(&[streams["error"], streams["stdout"], streams["stderr"]]).await;
        let text = |kind: &str| String::from_utf8_lossy(&all[&streams[kind]]).into_owned();
        assert!(text("stdout").ends_with("got 2\nbye\n"), "{:?}", text("stdout"));
        assert!(text("stderr").ends_with("oops 2\n"), "{:?}", text("stderr"));
        assert_eq!(json(&all[&streams["error"]])["status"], "Success");
    }
    rig.gone().await;
}
