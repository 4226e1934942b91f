//! One container: an actor that owns its [`State`] and does what [`transition`] says.
//!
//! Invariant: the actor itself never waits for the runtime, a disk or a client. What takes time runs in a task that
//! reports back as a message, so a kill is never behind a start, and events go out in the order of the state's
//! changes.

use std::collections::HashMap;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use proto::containerd::events as published;
use shim_api::publisher::Publisher;
use shim_api::task::CreateTaskRequest;
use shim_api::{Error, Result, trace};
use sys::cgroup::Cgroup;
use sys::reaper::{ExitOf, Reaper};
use tokio::sync::{mpsc, oneshot, watch};

use crate::bundle::Config;
use crate::io::{self, Prepared, ProcessIo, Stdio, Surroundings};
use crate::options::Options;
use crate::rootfs;
use crate::runc::{Runtime, process_with_terminal};
use crate::state::{
    Answer, Caller, Effect, Event, Exit, Freezer, Notice, Phase, ProcessKey, State, transition,
};

/// How long an exit may wait for the rest of the output: a grandchild may hold the pipe for ever.
const DRAIN_BEFORE_EXIT: Duration = Duration::from_millis(500);
/// How long a removal may wait for it: a client may have stopped reading.
const DRAIN_BEFORE_DELETE: Duration = Duration::from_secs(10);

/// What all containers of a shim share.
#[derive(Clone)]
pub(crate) struct Shim {
    pub(crate) namespace: Arc<str>,
    pub(crate) reaper: Reaper,
    pub(crate) publisher: Publisher,
}

/// Handle to a container's actor; clones share it.
#[derive(Clone)]
pub(crate) struct Container {
    facts: Arc<Facts>,
    inbox: mpsc::UnboundedSender<Message>,
}

/// What does not change in a container's life.
pub(crate) struct Facts {
    pub(crate) shim: Shim,
    pub(crate) id: String,
    pub(crate) bundle: PathBuf,
    pub(crate) runtime: Runtime,
    pub(crate) options: Options,
    rootfs: Option<PathBuf>,
    /// Whether the runtime's `start` runs programs.
    poststart_hooks: bool,
    /// Whether the runtime's `delete` runs programs, which may want to see the root file system.
    poststop_hooks: bool,
    /// Whether the kernel ends all of the container with its init.
    own_pid_namespace: bool,
}

/// What can be asked of a container.
pub(crate) enum Request {
    Start(ProcessKey),
    /// Adds an exec; `process` is OCI's, as JSON.
    Exec {
        key: ProcessKey,
        stdio: Stdio,
        process: Vec<u8>,
    },
    Delete(ProcessKey),
    Signal {
        key: ProcessKey,
        signal: u32,
        all: bool,
    },
    Pause,
    Resume,
}

/// A process as it is now.
pub(crate) struct View {
    pub(crate) phase: Phase,
    pub(crate) pid: u32,
    pub(crate) freezer: Freezer,
    pub(crate) stdio: Stdio,
    pub(crate) io: Option<Arc<ProcessIo>>,
    pub(crate) exit: watch::Receiver<Option<Exit>>,
    pub(crate) cgroup: Option<Cgroup>,
    /// Pids of the execs that run.
    pub(crate) execs: Vec<(u32, String)>,
}

enum Message {
    Ask {
        request: Request,
        reply: oneshot::Sender<Result<Answer>>,
        trace: Option<trace::Context>,
    },
    Event(Event),
    /// The runtime made a process late: an exec, or the init of a restored container.
    Running {
        caller: Caller,
        key: ProcessKey,
        running: Running,
    },
    Done {
        caller: Caller,
        result: Result<()>,
    },
    Look {
        key: ProcessKey,
        reply: oneshot::Sender<Result<View>>,
    },
}

/// A process the runtime has just made.
struct Running {
    pid: u32,
    io: ProcessIo,
    exit: ExitOf,
}

/// A process's belongings.
struct Live {
    stdio: Stdio,
    process: Vec<u8>,
    io: Option<Arc<ProcessIo>>,
    handle: Option<Arc<OwnedFd>>,
    exit: watch::Sender<Option<Exit>>,
}

impl Live {
    fn new(stdio: Stdio, process: Vec<u8>) -> Self {
        Self { stdio, process, io: None, handle: None, exit: watch::Sender::new(None) }
    }
}

/// What restoring a container needs when it is started.
#[derive(Clone)]
struct Restore {
    image: PathBuf,
    parent: String,
}

impl Container {
    /// Mounts the root file system and makes the container; its init waits for the start. Answers its pid too, 0
    /// for a container to be restored from a checkpoint, whose init comes with the start.
    ///
    /// # Errors
    /// The runtime's, with nothing of the container left.
    pub(crate) async fn create(shim: Shim, request: CreateTaskRequest) -> Result<(Self, u32)> {
        let options = Options::from_any(request.options.as_ref())?;
        let bundle = PathBuf::from(&request.bundle);
        let config = Config::read(&bundle)?;
        options.write(&bundle)?;
        sys::failpoint!("shim.create.options");
        let rootfs = trace::span("mount", rootfs::mount(&bundle, &request.rootfs)).await?;
        sys::failpoint!("shim.create.mounted");
        let runtime = Runtime::new(shim.reaper.clone(), &shim.namespace, &request.id, &bundle, &options);
        let id = request.id.clone();
        let (poststart_hooks, poststop_hooks) = (config.has_poststart_hooks(), config.has_poststop_hooks());
        let facts = Arc::new(Facts {
            shim,
            id,
            bundle,
            runtime,
            options,
            rootfs,
            poststart_hooks,
            poststop_hooks,
            own_pid_namespace: config.has_own_pid_namespace(),
        });
        match Self::make(&facts, &request).await {
            Ok(made) => Ok(made),
            Err(error) => {
                // A container that was there before us is someone else's.
                if error.code != shim_api::Code::AlreadyExists {
                    let _ = facts.runtime.delete(true).await;
                }
                facts.unmount().await;
                Err(error)
            }
        }
    }

    async fn make(facts: &Arc<Facts>, request: &CreateTaskRequest) -> Result<(Self, u32)> {
        let stdio = Stdio {
            stdin: request.stdin.clone(),
            stdout: request.stdout.clone(),
            stderr: request.stderr.clone(),
            terminal: request.terminal,
        };
        let restore = (!request.checkpoint.is_empty()).then(|| Restore {
            image: PathBuf::from(&request.checkpoint),
            parent: request.parent_checkpoint.clone(),
        });
        let mut live = Live::new(stdio, Vec::new());
        let mut running = None;
        if restore.is_none() {
            // From here the init's exit is kept until it is claimed.
            let _expectation = facts.shim.reaper.expect();
            let mut prepared = trace::span("open streams", facts.prepare(&live.stdio, &facts.id)).await?;
            let streams = prepared.take_streams();
            sys::failpoint!("shim.create.streams");
            let pid = facts.runtime.create(&facts.options, streams, prepared.console_socket()).await?;
            running = Some(Running { pid, exit: facts.shim.reaper.claim(pid), io: prepared.attach().await? });
        }
        let pid = running.as_ref().map_or(0, |running| running.pid);
        let (inbox, messages) = mpsc::unbounded_channel();
        sys::failpoint!("shim.create.pid");
        facts.publish_created(request, pid);
        let mut actor = Actor {
            facts: Arc::clone(facts),
            state: State::created(pid, !facts.own_pid_namespace),
            restore,
            cgroup: None,
            lives: HashMap::new(),
            asked: HashMap::new(),
            next_caller: 0,
            inbox: inbox.downgrade(),
        };
        if let Some(running) = running {
            actor.adopt(&ProcessKey::init(), &mut live, running);
        }
        actor.lives.insert(ProcessKey::init(), live);
        // The map's handle goes with the container; the tasks' weak ones do not keep the actor alive.
        tokio::spawn(actor.run(messages));
        Ok((Self { facts: Arc::clone(facts), inbox }, pid))
    }

    pub(crate) fn facts(&self) -> &Facts {
        &self.facts
    }

    /// Asks for a change and waits until it is made.
    pub(crate) async fn ask(&self, request: Request) -> Result<Answer> {
        let (reply, answer) = oneshot::channel();
        let _ = self.inbox.send(Message::Ask { request, reply, trace: trace::current() });
        answer.await.unwrap_or_else(|_| Err(self.gone()))
    }

    /// A process as it is now.
    pub(crate) async fn look(&self, key: &ProcessKey) -> Result<View> {
        let (reply, answer) = oneshot::channel();
        let _ = self.inbox.send(Message::Look { key: key.clone(), reply });
        answer.await.unwrap_or_else(|_| Err(self.gone()))
    }

    fn gone(&self) -> Error {
        Error::not_found(format!("container {} is deleted", self.facts.id))
    }
}

impl Facts {
    async fn prepare(&self, stdio: &Stdio, id: &str) -> Result<Prepared> {
        let around = Surroundings {
            reaper: &self.shim.reaper,
            namespace: &self.shim.namespace,
            id,
            uid: self.options.io_uid,
            gid: self.options.io_gid,
        };
        io::prepare(stdio, &around).await
    }

    async fn exec(&self, key: &ProcessKey, stdio: &Stdio, process: &[u8]) -> Result<Running> {
        let _expectation = self.shim.reaper.expect();
        let process = process_with_terminal(process, stdio.terminal)?;
        let mut prepared = self.prepare(stdio, &key.0).await?;
        let streams = prepared.take_streams();
        let pid = self.runtime.exec(&key.0, &process, streams, prepared.console_socket()).await?;
        let handle = sys::pidfd::open(pid);
        match prepared.attach().await {
            Ok(io) => Ok(Running { pid, exit: self.shim.reaper.claim(pid), io }),
            Err(error) => {
                // It runs, but nobody could talk to it.
                let _ = handle.and_then(|process| sys::pidfd::send_signal(&process, 9));
                Err(error)
            }
        }
    }

    async fn restore(&self, stdio: &Stdio, restore: &Restore) -> Result<Running> {
        let _expectation = self.shim.reaper.expect();
        let mut prepared = self.prepare(stdio, &self.id).await?;
        let streams = prepared.take_streams();
        let work = self.criu_work(&self.options.criu_work_path);
        let (options, console) = (&self.options, prepared.console_socket());
        let pid =
            self.runtime.restore(options, &restore.image, &restore.parent, &work, streams, console).await?;
        Ok(Running { pid, exit: self.shim.reaper.claim(pid), io: prepared.attach().await? })
    }

    /// Where CRIU may put its logs: as asked, else in the container's own working folder.
    pub(crate) fn criu_work(&self, asked: &str) -> PathBuf {
        if asked.is_empty() { self.bundle.join("work").join("criu-work") } else { PathBuf::from(asked) }
    }

    async fn unmount(&self) {
        if let Some(rootfs) = &self.rootfs
            && let Err(error) = rootfs::unmount(rootfs).await
        {
            tracing::warn!(id = self.id, %error, "the container's root file system stays mounted");
        }
    }

    async fn delete(&self, never_started: bool) -> Result<()> {
        let unmounted = async {
            match &self.rootfs {
                Some(rootfs) => trace::span("unmount", rootfs::unmount(rootfs)).await,
                None => Ok(()),
            }
        };
        let deleted = async {
            let nothing_else = !never_started && !self.poststop_hooks && self.own_pid_namespace;
            if nothing_else && trace::span("forget the container", self.runtime.forget()).await {
                return Ok(());
            }
            self.runtime.delete(never_started).await
        };
        if never_started || self.poststop_hooks {
            deleted.await?;
            unmounted.await?;
        } else {
            // Nothing runs in it any more. The end of an overlay waits until all of the disk beneath it is written, for
            // which the runtime need not wait.
            let (deleted, unmounted) = tokio::join!(deleted, unmounted);
            deleted.and(unmounted)?;
        }
        sys::failpoint!("shim.delete.unmounted");
        Ok(())
    }

    fn publish_created(&self, request: &CreateTaskRequest, pid: u32) {
        self.shim.publisher.publish(
            "/tasks/create",
            &published::TaskCreate {
                container_id: self.id.clone(),
                bundle: request.bundle.clone(),
                rootfs: request.rootfs.clone(),
                io: Some(published::TaskIo {
                    stdin: request.stdin.clone(),
                    stdout: request.stdout.clone(),
                    stderr: request.stderr.clone(),
                    terminal: request.terminal,
                }),
                checkpoint: request.checkpoint.clone(),
                pid,
            },
        );
    }

    fn publish(&self, notice: Notice) {
        let publisher = &self.shim.publisher;
        let container_id = self.id.clone();
        match notice {
            Notice::Started { key, pid } if key.is_init() => {
                publisher.publish("/tasks/start", &published::TaskStart { container_id, pid });
            }
            Notice::Started { key, pid } => {
                let event = published::TaskExecStarted { container_id, exec_id: key.0, pid };
                publisher.publish("/tasks/exec-started", &event);
            }
            Notice::Exited { key, pid, exit } => {
                let id = if key.is_init() { container_id.clone() } else { key.0 };
                let exited_at = Some(exit.at.into());
                let event =
                    published::TaskExit { container_id, id, pid, exit_status: exit.status, exited_at };
                publisher.publish("/tasks/exit", &event);
            }
            Notice::Added { key } => {
                let event = published::TaskExecAdded { container_id, exec_id: key.0 };
                publisher.publish("/tasks/exec-added", &event);
            }
            Notice::Deleted { pid, exit } => {
                let event = published::TaskDelete {
                    container_id: container_id.clone(),
                    pid,
                    exit_status: exit.map_or(0, |exit| exit.status),
                    exited_at: exit.map(|exit| exit.at.into()),
                    id: String::new(),
                };
                publisher.publish("/tasks/delete", &event);
            }
            Notice::Paused => publisher.publish("/tasks/paused", &published::TaskPaused { container_id }),
            Notice::Resumed => publisher.publish("/tasks/resumed", &published::TaskResumed { container_id }),
        }
    }
}

struct Actor {
    facts: Arc<Facts>,
    state: State,
    restore: Option<Restore>,
    cgroup: Option<Cgroup>,
    lives: HashMap<ProcessKey, Live>,
    asked: HashMap<Caller, Asked>,
    next_caller: Caller,
    inbox: mpsc::WeakUnboundedSender<Message>,
}

/// Who waits for an answer, and the trace that the question is part of.
struct Asked {
    reply: oneshot::Sender<Result<Answer>>,
    trace: Option<trace::Context>,
}

impl Actor {
    async fn run(mut self, mut messages: mpsc::UnboundedReceiver<Message>) {
        while let Some(message) = messages.recv().await {
            match message {
                Message::Ask { request, reply, trace } => self.asked(request, Asked { reply, trace }),
                Message::Event(event) => self.step(event),
                Message::Running { caller, key, running } => self.running(caller, key, running),
                Message::Done { caller, result } => self.answer(caller, result.map(|()| Answer::Done)),
                Message::Look { key, reply } => {
                    let _ = reply.send(self.look(&key));
                }
            }
            if !self.lives.contains_key(&ProcessKey::init()) {
                return;
            }
        }
    }

    fn asked(&mut self, request: Request, asked: Asked) {
        self.next_caller += 1;
        let caller = self.next_caller;
        self.asked.insert(caller, asked);
        let event = match request {
            Request::Start(key) => Event::Start { caller, key },
            Request::Delete(key) => Event::Delete { caller, key },
            Request::Signal { key, signal, all } => Event::Signal { caller, key, signal, all },
            Request::Pause => Event::Pause { caller },
            Request::Resume => Event::Resume { caller },
            Request::Exec { key, stdio, process } => {
                // Only a name that is new may take the place.
                if self.state.process(&key).is_none() {
                    self.lives.insert(key.clone(), Live::new(stdio, process));
                }
                self.step(Event::Add { caller, key: key.clone() });
                if self.state.process(&key).is_none() {
                    self.lives.remove(&key);
                }
                return;
            }
        };
        self.step(event);
    }

    fn step(&mut self, event: Event) {
        let failed_start = match &event {
            Event::Started { key, result: Err(_), .. } => Some(key.clone()),
            _ => None,
        };
        // The state is moved through the function; what is left here meanwhile is never seen.
        let before = std::mem::replace(&mut self.state, State::created(0, false));
        let (after, effects) = transition(before, event);
        self.state = after;
        for effect in effects {
            self.perform(effect);
        }
        // An exec that could not be started has no exit to publish, but someone may be waiting for one.
        if let Some(key) = failed_start
            && let Some(Phase::Stopped(exit)) = self.state.process(&key).map(|process| process.phase)
            && let Some(live) = self.lives.get(&key)
        {
            live.exit.send_replace(Some(exit));
        }
    }

    fn perform(&mut self, effect: Effect) {
        let facts = Arc::clone(&self.facts);
        match effect {
            Effect::Reply { caller, result } => self.answer(caller, result),
            Effect::Publish(notice) => {
                if let Notice::Exited { key, exit, .. } = &notice
                    && let Some(live) = self.lives.get(key)
                {
                    live.exit.send_replace(Some(*exit));
                    sys::failpoint!("shim.exit.recorded");
                }
                facts.publish(notice);
                sys::failpoint!("shim.event.queued");
            }
            Effect::Forget(key) => {
                self.lives.remove(&key);
            }
            Effect::Start { caller, key } => self.start(caller, key),
            Effect::Delete { caller, key } => {
                let io = self.lives.get_mut(&key).and_then(|live| live.io.clone());
                let never_started = matches!(
                    self.state.process(&key).map(|process| process.phase),
                    Some(Phase::Deleting { exit: None, .. })
                );
                self.spawn_for(caller, async move {
                    if let Some(io) = io.filter(|_| !never_started)
                        && !trace::span("wait for output", io.drained(DRAIN_BEFORE_DELETE)).await
                    {
                        tracing::warn!(id = facts.id, exec = key.0, "output is lost: nobody reads it");
                    }
                    let result = if key.is_init() { facts.delete(never_started).await } else { Ok(()) };
                    Message::Event(Event::Deleted { caller, key, result })
                });
            }
            Effect::Signal { caller, key, signal, all } => {
                let handle = self.lives.get(&key).and_then(|live| live.handle.clone());
                // What a signal to the init does beyond the signal is the runtime's: others die with it, a frozen one
                // is thawed.
                let alone = !all && !self.state.kill_rest_on_exit && self.state.freezer == Freezer::Thawed;
                self.spawn_for(caller, async move {
                    let result = match handle {
                        Some(process) if alone || !key.is_init() => signal_process(&process, signal),
                        _ => facts.runtime.kill(signal, all).await,
                    };
                    Message::Done { caller, result }
                });
            }
            Effect::Pause { caller } => self.spawn(async move {
                Message::Event(Event::Paused { caller, result: facts.runtime.pause().await })
            }),
            Effect::Resume { caller } => self.spawn(async move {
                Message::Event(Event::Resumed { caller, result: facts.runtime.resume().await })
            }),
            Effect::KillRest => {
                tokio::spawn(async move {
                    if let Err(error) = facts.runtime.kill(9, true).await {
                        tracing::warn!(id = facts.id, %error, "cannot kill what the container's init left");
                    }
                });
            }
        }
    }

    fn start(&mut self, caller: Caller, key: ProcessKey) {
        let Some(live) = self.lives.get(&key) else { return };
        let facts = Arc::clone(&self.facts);
        let restore = self.restore.clone().filter(|_| key.is_init() && self.state.init.pid == 0);
        if key.is_init() && restore.is_none() {
            let pid = self.state.init.pid;
            let handle = live.handle.clone().filter(|_| !facts.poststart_hooks);
            self.spawn_for(caller, async move {
                let result = facts.runtime.start(handle.as_deref()).await;
                let result = result.map(|()| pid).map_err(|error| (error, SystemTime::now()));
                Message::Event(Event::Started { caller, key, result })
            });
            return;
        }
        let (stdio, process) = (live.stdio.clone(), live.process.clone());
        self.spawn_for(caller, async move {
            let running = match restore {
                Some(restore) => facts.restore(&stdio, &restore).await,
                None => facts.exec(&key, &stdio, &process).await,
            };
            match running {
                Ok(running) => Message::Running { caller, key, running },
                Err(error) => {
                    let result = Err((error, SystemTime::now()));
                    Message::Event(Event::Started { caller, key, result })
                }
            }
        });
    }

    fn running(&mut self, caller: Caller, key: ProcessKey, running: Running) {
        let Some(mut live) = self.lives.remove(&key) else { return };
        let pid = running.pid;
        self.adopt(&key, &mut live, running);
        self.lives.insert(key.clone(), live);
        self.step(Event::Started { caller, key, result: Ok(pid) });
    }

    /// Takes in a process: its streams, a handle that no other process will ever have, and its exit when it comes.
    fn adopt(&mut self, key: &ProcessKey, live: &mut Live, running: Running) {
        let Running { pid, io, exit } = running;
        live.handle = sys::pidfd::open(pid).ok().map(Arc::new);
        if key.is_init() {
            self.watch_memory(pid);
        }
        // Killing what the init left is more urgent than its output, which that may be holding up.
        let wait = !(key.is_init() && self.state.kill_rest_on_exit);
        let drained = io.drained_for_exit(if wait { DRAIN_BEFORE_EXIT } else { Duration::ZERO });
        live.io = Some(Arc::new(io));
        let key = key.clone();
        let traced = trace::current().map(|trace| (trace, trace::now()));
        self.spawn(async move {
            let exit = match exit.await {
                Some(exit) => Exit { status: exit.status, at: exit.at },
                None => Exit { status: 255, at: SystemTime::now() },
            };
            if let Some((trace, began)) = traced {
                trace.note("container", pid, "process, until its end", began);
            }
            sys::failpoint!("shim.exit.seen");
            drained.await;
            sys::failpoint!("shim.exit.drained");
            Message::Event(Event::Exited { key, exit })
        });
    }

    fn watch_memory(&mut self, pid: u32) {
        let own = Cgroup::of_process(std::process::id()).ok();
        // Without a group of its own the numbers would be the shim's.
        self.cgroup = Cgroup::of_process(pid).ok().filter(|group| Some(group) != own.as_ref());
        let watch = self.cgroup.as_ref().map(Cgroup::watch_oom);
        let facts = Arc::clone(&self.facts);
        match watch {
            Some(Ok(mut watch)) => {
                tokio::spawn(async move {
                    while watch.next().await.is_some() {
                        let event = published::TaskOom { container_id: facts.id.clone() };
                        facts.shim.publisher.publish("/tasks/oom", &event);
                    }
                });
            }
            Some(Err(error)) => tracing::warn!(id = facts.id, %error, "cannot watch for OOM"),
            None => {}
        }
    }

    fn look(&self, key: &ProcessKey) -> Result<View> {
        let found = self.state.process(key).zip(self.lives.get(key));
        let (process, live) = found.ok_or_else(|| {
            Error::not_found(format!("process {} does not exist in container {}", key.0, self.facts.id))
        })?;
        let execs = self.state.execs.iter().filter(|(_, exec)| exec.pid != 0);
        Ok(View {
            phase: process.phase,
            pid: process.pid,
            freezer: self.state.freezer,
            stdio: live.stdio.clone(),
            io: live.io.clone(),
            exit: live.exit.subscribe(),
            cgroup: self.cgroup.clone(),
            execs: execs.map(|(key, exec)| (exec.pid, key.0.clone())).collect(),
        })
    }

    fn answer(&mut self, caller: Caller, result: Result<Answer>) {
        if let Some(asked) = self.asked.remove(&caller) {
            let _ = asked.reply.send(result);
        }
    }

    /// [`Self::spawn`] for what somebody asked for, as a part of their trace.
    fn spawn_for(&self, caller: Caller, task: impl Future<Output = Message> + Send + 'static) {
        let trace = self.asked.get(&caller).and_then(|asked| asked.trace.clone());
        self.spawn(trace::carry(trace, task));
    }

    /// Runs what takes time; its message comes back to the actor, if that still lives.
    fn spawn(&self, task: impl Future<Output = Message> + Send + 'static) {
        let inbox = self.inbox.clone();
        tokio::spawn(async move {
            let message = task.await;
            if let Some(inbox) = inbox.upgrade() {
                let _ = inbox.send(message);
            }
        });
    }
}

fn signal_process(process: &OwnedFd, signal: u32) -> Result<()> {
    sys::pidfd::send_signal(process, signal).map_err(|error| match error.kind() {
        std::io::ErrorKind::NotFound => Error::not_found("process already finished"),
        std::io::ErrorKind::InvalidInput => Error::invalid_argument(format!("no such signal: {signal}")),
        _ => Error::internal(format!("send signal {signal}: {error}")),
    })
}

/// The bundle of a container, absolute.
pub(crate) fn absolute_bundle(bundle: &str) -> Result<&Path> {
    let bundle = Path::new(bundle);
    if bundle.is_absolute() {
        return Ok(bundle);
    }
    Err(Error::invalid_argument(format!("bundle {} is not an absolute path", bundle.display())))
}
