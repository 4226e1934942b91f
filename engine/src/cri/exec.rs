//! Processes beside a container's first one, and what else joins a running container or pod from outside: its streams, its ports.
//!
//! ```text
//!  exec, exec_sync   add --> start --> wait --> drain --> remove      a process of the container's task; shim and fifos as for any client
//!  attach            the socket of the container's log
//!  port_forward      a connection made in the pod's network
//! ```
//!
//! As in containerd, a process goes on when the client that asked for it with [`Execs::exec`] has gone: its input ends, and its
//! output is read and thrown away. That of [`Execs::exec_sync`] is killed when its time is over or its caller gone.
//!
//! Format: `FOLDER/KIND-RANDOM@CONTAINER/{stdin,stdout,stderr}`, fifos, in a folder for root alone, for as long as the process
//! is in the shim. Those that an engine left behind are known by it to the next one, see [`Execs::restore`].
//!
//! Invariants: an exec's name is never used twice. Whatever happens, an exec that was added is removed from its shim when it has ended.
//! There are no more of them at a time than [`Limits`] says; those that an earlier engine left do not count.

mod bound;
mod connect;
mod fifos;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use prost_types::Any;
use proto::containerd::services::tasks::v1::ExecProcessRequest;
use serde::Deserialize;
use serde_json::value::RawValue;
use shim_api::logs::{self, Frame};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::sync::watch;
use tokio_util::sync::CancellationToken;
use tokio_util::task::AbortOnDropHandle;

pub use self::bound::Limits;
use self::bound::{Bound, Place};
use self::fifos::{Fifos, Sink};
use super::store::{Container, Pod, Store};
use super::streaming::{Input, Output, PIECE};
use crate::containers::Containers;
use crate::context::RequestContext;
use crate::error::{Error, Result, blocking, outlive};
use crate::metadata::cri::{ContainerStage, PodStage};
use crate::random::random;
use crate::tasks::{Tasks, from_shim};

/// How long a killed process may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);
/// How long what is under way from a client to a pod may take once the pod has ended the connection.
const LAST_BYTES: Duration = Duration::from_secs(1);
/// How long a container may take to hear that a client who joined it has gone.
const LAST_WORD: Duration = Duration::from_secs(1);
const SIGKILL: u32 = 9;

/// How execs are run.
#[derive(Debug, Clone)]
pub struct Options {
    /// Where fifos are: a folder beneath the engine's state.
    pub folder: PathBuf,
    /// How long output may take to end once its process has; None or zero for no limit.
    pub drain: Option<Duration>,
    /// How many may run at a time: of those that are waited for, and again of those that clients follow.
    pub limits: Limits,
}

/// Execs, attachments and forwarded ports of all containers and pods; cheap to clone.
#[derive(Clone)]
pub struct Execs(Arc<Inner>);

struct Inner {
    options: Options,
    store: Store,
    tasks: Tasks,
    containers: Containers,
    context: RequestContext,
    followed: Bound,
    waited_for: Bound,
}

/// What a process has said, and how it ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Synced {
    /// Its output; what is beyond 16 MiB was thrown away.
    pub stdout: Vec<u8>,
    /// The same of its errors.
    pub stderr: Vec<u8>,
    /// Its exit code.
    pub exit_code: u32,
}

/// A terminal's size, in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Size {
    pub(crate) width: u32,
    pub(crate) height: u32,
}

/// The streams of a client.
pub(crate) struct Streams {
    pub(crate) stdin: Option<Input>,
    pub(crate) stdout: Option<Output>,
    pub(crate) stderr: Option<Output>,
    /// The size of its terminal, and its changes.
    pub(crate) sizes: Option<watch::Receiver<Option<Size>>>,
    /// Cancelled when the client has gone.
    pub(crate) gone: CancellationToken,
}

/// Why a process was added, as its name says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// For a client that follows it.
    Exec,
    /// For a caller that waits for it.
    Sync,
}

impl Execs {
    /// Makes the folder. Blocks.
    pub fn new(options: Options, store: Store, tasks: Tasks, containers: Containers) -> Result<Self> {
        sys::fs::create_dir_all(&options.folder, 0o700)
            .map_err(|error| Error::io("create folder", &options.folder, &error))?;
        let (followed, waited_for) = (Bound::new(options.limits), Bound::new(options.limits));
        let context = super::context()?;
        Ok(Execs(Arc::new(Inner { options, store, tasks, containers, context, followed, waited_for })))
    }

    /// Looks after what an earlier engine left running, for which nobody waits any more: to be called when tasks are restored.
    pub fn restore(&self) -> Result<()> {
        let folder = &self.0.options.folder;
        let failed = |error: std::io::Error| Error::io("read folder", folder, &error);
        for entry in std::fs::read_dir(folder).map_err(failed)? {
            let path = entry.map_err(failed)?.path();
            let name = path.file_name().and_then(|name| name.to_str()).and_then(|name| name.split_once('@'));
            if let Some((exec, container)) = name {
                let (exec, container) = (exec.to_owned(), container.to_owned());
                tokio::spawn(self.clone().adopt(exec, container, path));
            }
        }
        Ok(())
    }

    async fn adopt(self, exec: String, container: String, path: PathBuf) {
        let is_sync = exec.starts_with("sync-");
        let mut process = Process::known(self, exec, container, path.clone());
        let copies = fifos::outputs_left(&path)
            .map(|fifo| AbortOnDropHandle::new(tokio::spawn(fifos::copy(fifo, Sink::Nothing))))
            .collect::<Vec<_>>();
        if is_sync {
            process.kill().await;
        }
        process.close_stdin().await;
        if let Err(error) = process.wait().await {
            tracing::debug!(%error, exec = process.exec, container = process.container, "an exec is gone");
        }
        drop((copies, process));
    }

    /// A running container.
    pub fn running(&self, container: &str) -> Result<Arc<Container>> {
        let container = self.0.store.container(container)?;
        match container.stage() {
            ContainerStage::Running => Ok(container),
            stage => Err(Error::failed_precondition(format!(
                "container {:?} does not run; it is {}",
                container.id,
                format!("{stage:?}").to_lowercase()
            ))),
        }
    }

    /// A pod that is ready.
    pub fn ready(&self, pod: &str) -> Result<Arc<Pod>> {
        let pod = self.0.store.pod(pod)?;
        match pod.stage() {
            PodStage::Ready => Ok(pod),
            stage => Err(Error::failed_precondition(format!(
                "pod sandbox {:?} is not ready; it is {}",
                pod.id,
                format!("{stage:?}").to_lowercase()
            ))),
        }
    }

    /// Runs a command in a container and answers what it has said. DeadlineExceeded when it takes longer than `timeout`; it is killed
    /// then.
    pub async fn exec_sync(
        &self,
        container: &str,
        command: Vec<String>,
        timeout: Option<Duration>,
    ) -> Result<Synced> {
        let gone = CancellationToken::new();
        let _cancels = gone.clone().drop_guard();
        let (this, container) = (self.clone(), container.to_owned());
        outlive(async move { this.sync(&container, command, timeout, gone).await }).await
    }

    async fn sync(
        self,
        container: &str,
        command: Vec<String>,
        timeout: Option<Duration>,
        gone: CancellationToken,
    ) -> Result<Synced> {
        let wanted = fifos::Wanted { stdin: false, stdout: true, stderr: true };
        let (mut process, fifos) = self.add(Kind::Sync, container, &command, false, wanted, &gone).await?;
        let copies = copies(
            fifos.stdout.zip(Some(Sink::Kept(Vec::new()))),
            fifos.stderr.zip(Some(Sink::Kept(Vec::new()))),
        );
        process.start().await?;
        let late = async {
            match timeout {
                Some(limit) => tokio::time::sleep(limit).await,
                None => std::future::pending().await,
            }
        };
        let ended = async {
            let exit_code = process.wait().await?;
            let [stdout, stderr] = self.drained(&process, copies).await?;
            Ok(Synced { stdout, stderr, exit_code })
        };
        let why = tokio::select! {
            ended = ended => return ended,
            () = late => Error::deadline_exceeded(format!(
                "{command:?} in container {container:?} took longer than {:?} and was killed",
                timeout.unwrap_or_default()
            )),
            () = gone.cancelled() => Error::cancelled("the caller has gone"),
        };
        process.kill().await;
        Err(why)
    }

    /// Runs a command in a container with a client's streams, and answers its exit code.
    pub(crate) async fn exec(
        &self,
        container: &str,
        command: Vec<String>,
        terminal: bool,
        streams: Streams,
    ) -> Result<u32> {
        let (this, container) = (self.clone(), container.to_owned());
        outlive(async move { this.with_streams(&container, &command, terminal, streams).await }).await
    }

    async fn with_streams(
        self,
        container: &str,
        command: &[String],
        terminal: bool,
        streams: Streams,
    ) -> Result<u32> {
        let Streams { stdin, stdout, stderr, sizes, gone } = streams;
        // Older shims take all outputs or none, so that each has a fifo; a terminal has one.
        let wanted = fifos::Wanted { stdin: stdin.is_some(), stdout: true, stderr: !terminal };
        let (mut process, fifos) = self.add(Kind::Exec, container, command, terminal, wanted, &gone).await?;
        let sink = |output: Option<Output>| Some(output.map_or(Sink::Nothing, Sink::Client));
        let copies = copies(fifos.stdout.zip(sink(stdout)), fifos.stderr.zip(sink(stderr)));
        process.start().await?;
        let _feeding = stdin.zip(fifos.stdin).map(|(input, fifo)| {
            let process = process.handle();
            AbortOnDropHandle::new(tokio::spawn(async move {
                fifos::feed(input, fifo).await;
                process.close_stdin().await;
            }))
        });
        let _sizing = sizes.map(|sizes| AbortOnDropHandle::new(tokio::spawn(process.handle().follow(sizes))));
        let exit_code = process.wait().await?;
        self.drained(&process, copies).await?;
        Ok(exit_code)
    }

    /// What was copied, once there is no more. A child of the process may hold its output open.
    async fn drained(&self, process: &Process, copies: Copies) -> Result<[Vec<u8>; 2]> {
        let copied = match self.0.options.drain.filter(|limit| !limit.is_zero()) {
            None => copies.await,
            Some(limit) => tokio::time::timeout(limit, copies).await.map_err(|_| {
                Error::unknown(format!(
                    "exec {} in container {:?} has ended, and another process still holds its output after {limit:?}",
                    process.exec, process.container
                ))
            })?,
        };
        Ok(copied?)
    }

    /// Adds a process to a running container's task, once there is a place for it, unless its client has gone by then.
    async fn add(
        &self,
        kind: Kind,
        container: &str,
        command: &[String],
        terminal: bool,
        wanted: fifos::Wanted,
        gone: &CancellationToken,
    ) -> Result<(Process, Fifos)> {
        let container = self.running(container)?.id.clone();
        if command.is_empty() {
            return Err(Error::invalid_argument("the command to run is missing"));
        }
        let inner = &self.0;
        let bound = if kind == Kind::Sync { &inner.waited_for } else { &inner.followed };
        let place = tokio::select! {
            place = bound.place(&container) => place?,
            () = gone.cancelled() => return Err(Error::cancelled("the caller has gone")),
        };
        let spec = inner.containers.get(&inner.context, &container)?.spec.unwrap_or_default();
        let spec = process_of(&spec, command, terminal)
            .map_err(|error| Error::internal(format!("read the spec of container {container:?}: {error}")))?;
        let prefix = if kind == Kind::Sync { "sync" } else { "exec" };
        let exec = format!("{prefix}-{}", hex::encode(random::<16>()?));
        let folder = inner.options.folder.join(format!("{exec}@{container}"));
        let at = folder.clone();
        // Dropped when something fails, which removes the folder.
        let mut process = Process::known(self.clone(), exec, container, folder);
        process.added = false;
        process.place = Some(place);
        let paths = blocking(move || fifos::create(&at, wanted)).await?;
        let fifos = paths.open()?;
        let request = ExecProcessRequest {
            container_id: process.container.clone(),
            exec_id: process.exec.clone(),
            stdin: paths.stdin,
            stdout: paths.stdout,
            stderr: paths.stderr,
            terminal,
            spec: Some(proto::any::wrap(proto::any::PROCESS, spec)),
        };
        inner.tasks.exec(&inner.context, request).await?;
        process.added = true;
        Ok((process, fifos))
    }

    /// Joins the streams of a container's first process, until that has ended, or the client has gone, or has ended the input of a
    /// container that others may write to after it.
    pub(crate) async fn attach(&self, container: &str, streams: Streams) -> Result<()> {
        let container = self.running(container)?;
        let Streams { stdin, stdout, stderr, sizes, gone } = streams;
        let wanted =
            logs::Streams { stdin: stdin.is_some(), stdout: stdout.is_some(), stderr: stderr.is_some() };
        let socket = container.record().streams.clone();
        let joined = logs::attach(Path::new(&socket), wanted).await.map_err(from_shim);
        let (mut from, mut to) = joined
            .map_err(|error| error.context(format!("join the streams of container {:?}", container.id)))?
            .split();
        let init = Handle { execs: self.clone(), exec: String::new(), container: container.id.clone() };
        let _sizing = sizes.map(|sizes| AbortOnDropHandle::new(tokio::spawn(init.follow(sizes))));
        let reading = async {
            loop {
                let (output, bytes) = match from.recv().await {
                    Some(Frame::Stdout(bytes)) => (&stdout, bytes),
                    Some(Frame::Stderr(bytes)) => (&stderr, bytes),
                    // Without a word: the shim has ended, and the container before it.
                    Some(Frame::End) | None => return Ok(()),
                    Some(Frame::Failed(error)) => return Err(from_shim(error)),
                };
                if let Some(output) = output
                    && output.send(bytes).await.is_err()
                {
                    return Ok(());
                }
            }
        };
        let feeding = async {
            if let Some(mut stdin) = stdin {
                while let Some(bytes) = stdin.next().await {
                    if to.send_stdin(bytes).await.is_err() {
                        return;
                    }
                }
                // What it ends is for the shim to say: it knows whether there is input once, or again.
                let _ = to.close_stdin().await;
            }
        };
        tokio::pin!(reading, feeding);
        let mut fed = false;
        let ended = loop {
            tokio::select! {
                ended = &mut reading => break ended,
                () = &mut feeding, if !fed => fed = true,
                () = gone.cancelled() => {
                    if !fed {
                        // The end of its input is to arrive all the same.
                        let _ = tokio::time::timeout(LAST_WORD, feeding).await;
                    }
                    break Ok(());
                }
            }
        };
        for output in [&stdout, &stderr].into_iter().flatten() {
            output.end().await;
        }
        ended
    }

    /// Forwards a connection to a port of a pod, until either side has ended it.
    pub(crate) async fn port_forward(
        &self,
        pod: &str,
        port: u16,
        mut input: Input,
        output: &Output,
    ) -> Result<()> {
        let pod = self.ready(pod)?;
        let netns = Some(pod.record().netns.clone()).filter(|path| !path.is_empty());
        let stream = tokio::select! {
            stream = connect::localhost(netns.as_deref().map(Path::new), port) => {
                stream.map_err(|error| error.context(format!("forward port {port} of pod sandbox {:?}", pod.id)))?
            }
            () = output.left() => return Ok(()),
        };
        let (mut from_pod, mut to_pod) = stream.into_split();
        let up = async {
            while let Some(bytes) = input.next().await {
                if to_pod.write_all(&bytes).await.is_err() {
                    return;
                }
            }
            if !input.left() {
                // The client waits for the rest.
                let _ = to_pod.shutdown().await;
            }
        };
        let down = async {
            let mut buffer = bytes::BytesMut::new();
            loop {
                buffer.reserve(PIECE);
                match from_pod.read_buf(&mut buffer).await {
                    Ok(1..) if output.send(buffer.split().freeze()).await.is_ok() => {}
                    _ => break,
                }
            }
            output.end().await;
        };
        tokio::pin!(up, down);
        tokio::select! {
            () = &mut down => drop(tokio::time::timeout(LAST_BYTES, up).await),
            () = &mut up => {
                tokio::select! {
                    () = down => {}
                    () = output.left() => {}
                }
            }
            () = output.left() => {}
        }
        Ok(())
    }
}

/// Both outputs of a process, being copied.
type Copies = AbortOnDropHandle<[Vec<u8>; 2]>;

fn copies(stdout: Option<(fifos::Fifo, Sink)>, stderr: Option<(fifos::Fifo, Sink)>) -> Copies {
    let copy = async |from: Option<(fifos::Fifo, Sink)>| match from {
        Some((fifo, sink)) => fifos::copy(fifo, sink).await,
        None => Vec::new(),
    };
    AbortOnDropHandle::new(tokio::spawn(async move { tokio::join!(copy(stdout), copy(stderr)).into() }))
}

/// The process that a container's spec describes, with other arguments.
fn process_of(spec: &Any, command: &[String], terminal: bool) -> serde_json::Result<Vec<u8>> {
    #[derive(Deserialize)]
    struct Spec<'a> {
        #[serde(borrow)]
        process: &'a RawValue,
    }
    let spec: Spec<'_> = serde_json::from_slice(&spec.value)?;
    let mut process: serde_json::Map<_, _> = serde_json::from_str(spec.process.get())?;
    process.insert("args".into(), command.into());
    process.insert("terminal".into(), terminal.into());
    process.remove("commandLine");
    process.remove("consoleSize");
    if terminal {
        let env = process.entry("env").or_insert_with(|| serde_json::json!([]));
        if let Some(env) = env.as_array_mut() {
            env.retain(|variable| !variable.as_str().is_some_and(|variable| variable.starts_with("TERM=")));
            env.push("TERM=xterm".into());
        }
    }
    serde_json::to_vec(&process)
}

/// A process that was added. Dropped, it is removed: from its shim, after it was killed should it run, and from its folder.
struct Process {
    execs: Execs,
    exec: String,
    container: String,
    folder: PathBuf,
    added: bool,
    ended: bool,
    /// Others wait for it.
    place: Option<Place>,
}

/// A process, for a while.
#[derive(Clone)]
struct Handle {
    execs: Execs,
    exec: String,
    container: String,
}

impl Process {
    fn known(execs: Execs, exec: String, container: String, folder: PathBuf) -> Self {
        Process { execs, exec, container, folder, added: true, ended: false, place: None }
    }

    fn handle(&self) -> Handle {
        Handle { execs: self.execs.clone(), exec: self.exec.clone(), container: self.container.clone() }
    }

    async fn start(&self) -> Result<()> {
        let inner = &self.execs.0;
        inner.tasks.start(&inner.context, &self.container, &self.exec).await.map(drop)
    }

    async fn wait(&mut self) -> Result<u32> {
        let status = self.handle().wait().await?;
        self.ended = true;
        Ok(status)
    }

    async fn close_stdin(&self) {
        self.handle().close_stdin().await;
    }

    async fn kill(&mut self) {
        self.handle().kill().await;
        self.ended = true;
    }
}

impl Handle {
    async fn wait(&self) -> Result<u32> {
        let inner = &self.execs.0;
        Ok(inner.tasks.wait(&inner.context, &self.container, &self.exec).await?.status)
    }

    /// Lets it see the end of its input. It may have ended already.
    async fn close_stdin(&self) {
        let inner = &self.execs.0;
        let _ = inner.tasks.close_io(&inner.context, &self.container, &self.exec, true).await;
    }

    /// Ends it, and waits until it has.
    async fn kill(&self) {
        let inner = &self.execs.0;
        match inner.tasks.kill(&inner.context, &self.container, &self.exec, SIGKILL, false).await {
            Ok(()) => {
                if tokio::time::timeout(KILL_LIMIT, self.wait()).await.is_err() {
                    tracing::warn!(exec = self.exec, container = self.container, "an exec does not end");
                }
            }
            // It has ended by itself.
            Err(Error::NotFound(_)) => {}
            Err(error) => {
                tracing::warn!(%error, exec = self.exec, container = self.container, "an exec was not killed");
            }
        }
    }

    /// Passes the sizes of a client's terminal on.
    async fn follow(self, mut sizes: watch::Receiver<Option<Size>>) {
        let inner = &self.execs.0;
        loop {
            let size = *sizes.borrow_and_update();
            if let Some(Size { width, height }) = size {
                let resized =
                    inner.tasks.resize_pty(&inner.context, &self.container, &self.exec, width, height);
                if let Err(error) = resized.await {
                    tracing::debug!(%error, exec = self.exec, container = self.container, "a terminal keeps its size");
                }
            }
            if sizes.changed().await.is_err() {
                return;
            }
        }
    }

    /// Removes it from its shim.
    async fn delete(&self) {
        let inner = &self.execs.0;
        match inner.tasks.delete_process(&inner.context, &self.container, &self.exec).await {
            Ok(_) | Err(Error::NotFound(_)) => {}
            Err(error) => {
                tracing::warn!(%error, exec = self.exec, container = self.container, "an exec is left in its shim");
            }
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        // At the engine's end there is nobody to do it: the next start does.
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (handle, added, ended) = (self.handle(), self.added, self.ended);
        let folder = std::mem::take(&mut self.folder);
        let place = self.place.take();
        runtime.spawn(async move {
            if added && !ended {
                handle.kill().await;
            }
            if added {
                handle.delete().await;
            }
            drop(place);
            let removed = blocking(move || {
                sys::fs::remove_tree(&folder).map_err(|error| Error::io("remove folder", &folder, &error))
            });
            if let Err(error) = removed.await {
                tracing::warn!(%error, "the fifos of an exec are left; the next start removes them");
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_process_is_the_containers_with_other_arguments() {
        let spec = serde_json::json!({
            "ociVersion": "1.0.2",
            "process": {
                "user": { "uid": 7 }, "cwd": "/", "args": ["sleep"], "consoleSize": { "height": 1, "width": 1 },
                "env": ["A=b", "TERM=dumb"], "terminal": true,
            },
            "root": { "path": "rootfs" },
        });
        let spec = Any { type_url: String::new(), value: spec.to_string().into() };
        let made = |terminal| -> serde_json::Value {
            serde_json::from_slice(&process_of(&spec, &["id".into(), "-u".into()], terminal).unwrap())
                .unwrap()
        };
        let expected = serde_json::json!({
            "user": { "uid": 7 }, "cwd": "/", "args": ["id", "-u"], "env": ["A=b", "TERM=dumb"], "terminal": false,
        });
        assert_eq!(made(false), expected);
        assert_eq!(made(true)["env"], serde_json::json!(["A=b", "TERM=xterm"]));
        assert!(process_of(&Any::default(), &[], false).is_err());
    }
}
