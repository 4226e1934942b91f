//! Tasks: the running side of containers, each in the hands of a shim.
//!
//! ```text
//!            create                           delete
//!  (no task) ------> Creating --------> Live -----------> (no task)
//!                        |             ^    | the connection ends
//!                        | fails       |    v
//!                        v     reached +-- Unreachable
//!                    (no task)              | nobody listens: the shim is dead
//!                                           v
//!                                          Dead ---------> (no task)
//!                                              delete
//! ```
//!
//! `Creating` takes the name and is not visible. A `Live` task is what its shim says, asked each time: the engine keeps
//! nothing that could be out of date. A connection that ends says nothing of the shim, so that it is made anew; while that
//! fails, calls answer Unavailable. A `Dead` task lost its shim: it is cleaned up, its exit and delete are published, and it
//! stays as a stopped task until it is deleted.
//!
//! Invariants: a name is free again as soon as a failed create or a delete has answered, with nothing left of the task.
//! Nothing here waits for a slow create but that create itself. No lock is held while a shim is waited for.

pub(crate) mod bundle;
mod checkpoint;
pub(crate) mod launch;
mod restore;
mod sandbox;
mod task;

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures::stream::{self, StreamExt as _};
use parking_lot::Mutex;
use prost_types::Any;
use proto::containerd::events::TaskExit;
use proto::containerd::services::containers::v1::Container;
use proto::containerd::services::tasks::v1::{CreateTaskRequest, ExecProcessRequest};
use proto::containerd::types::{Envelope, Metric, RuntimeInfo};
use proto::containerd::v1::types::{Process, ProcessInfo, Status};
use shim_api::{Code, task as shim, trace};

use self::bundle::{Bundles, End, Of};
use self::launch::{Launcher, ShimLog};
use self::task::{Connect, Live, Phase, Task};
use crate::context::{Namespace, RequestContext, validate_identifier};
use crate::diff::Diff;
use crate::error::{Error, Result, blocking, outlive};
use crate::events::Exchange;
use crate::filters::Filter;
use crate::hooks::{self, Hooks};
use crate::metadata::{Metadata, Read as _};

pub use self::sandbox::check_controller;
pub use self::task::Exit;
pub(crate) use self::task::from_shim;

/// How long a shim may take to say what a process is; one that hangs is not to hang its callers.
const STATE_LIMIT: Duration = Duration::from_secs(2);
/// How long a shim may take to go once it has no container left.
const SHUTDOWN_LIMIT: Duration = Duration::from_secs(3);
/// How long a killed shim may take to be gone, and between two looks at it.
const KILL_LIMIT: Duration = Duration::from_secs(2);
const KILL_PAUSE: Duration = Duration::from_millis(2);
/// How long a shim may take over removing what a failed create left in it.
const UNDO_LIMIT: Duration = Duration::from_secs(10);
/// Between two tries to reach a shim that may be alive, at first and at most.
const RECONNECT_FIRST: Duration = Duration::from_millis(50);
const RECONNECT_LAST: Duration = Duration::from_secs(5);
/// How many shims are asked at once for a list.
const LIST_WIDTH: usize = 32;

/// Where tasks are kept, and how their shims find the engine.
#[derive(Debug, Clone)]
pub struct TasksOptions {
    /// The engine's root: work folders of runtimes.
    pub root: PathBuf,
    /// The engine's state: bundles.
    pub state: PathBuf,
    /// The gRPC socket.
    pub grpc_address: PathBuf,
    /// The ttrpc socket, where shims publish events.
    pub ttrpc_address: PathBuf,
    /// Where shims are looked for before PATH.
    pub shim_dirs: Vec<PathBuf>,
    /// The soft limit of descriptors for shims; None for the engine's own.
    pub descriptors: Option<u64>,
    /// The hooks that containers get.
    pub hooks: hooks::Settings,
}

/// The tasks of all namespaces; cheap to clone.
#[derive(Clone)]
pub struct Tasks {
    bundles: Arc<[Bundles; 2]>,
    /// Where checkpoints are made.
    checkpoints: PathBuf,
    diff: Diff,
    hooks: Hooks,
    launcher: Launcher,
    metadata: Metadata,
    events: Exchange,
    tasks: Arc<Mutex<BTreeMap<Key, Arc<Task>>>>,
}

type Key = (Of, Namespace, String);

impl Tasks {
    /// Tasks with these folders. Those of an earlier engine have their names, and are brought back by
    /// [`Tasks::restore`]. Blocks.
    pub fn open(options: TasksOptions, metadata: Metadata, events: Exchange, diff: Diff) -> Result<Self> {
        let bundles = Of::ALL.map(|of| Bundles::new(of, &options.root, &options.state));
        for folder in bundles.iter().flat_map(|bundles| [&bundles.state, &bundles.work]) {
            sys::fs::create_dir_all(folder, 0o711)
                .map_err(|error| Error::io("create folder", folder, &error))?;
        }
        let checkpoints = options.root.join(checkpoint::FOLDER);
        sys::fs::remove_tree(&checkpoints)
            .and_then(|()| sys::fs::create_dir(&checkpoints, 0o700))
            .map_err(|error| Error::io("empty the folder", &checkpoints, &error))?;
        let TasksOptions { grpc_address, ttrpc_address, shim_dirs, descriptors, hooks, .. } = options;
        let hooks = Hooks::new(hooks);
        let launcher = Launcher::new(grpc_address, ttrpc_address, shim_dirs, descriptors);
        let (bundles, tasks) = (Arc::new(bundles), Arc::default());
        let tasks = Tasks { bundles, checkpoints, diff, hooks, launcher, metadata, events, tasks };
        tasks.find_bundles();
        Ok(tasks)
    }

    /// What a runtime, named like `io.containerd.runc.v2` or by its shim's path, can do with these options.
    pub async fn runtime_info(&self, runtime: &str, options: Option<Any>) -> Result<RuntimeInfo> {
        self.launcher.info(&self.launcher.find(runtime)?, options).await
    }

    /// The program of a runtime's shim.
    pub fn program(&self, runtime: &str) -> Result<PathBuf> {
        self.launcher.find(runtime)
    }

    /// Makes the task of a container: its bundle, its shim, its init process, which waits for a start. The init's pid.
    /// AlreadyExists while the container has a task, NotFound when the container or its runtime does not exist.
    pub async fn create(&self, context: &RequestContext, request: CreateTaskRequest) -> Result<u32> {
        let namespace = context.namespace()?.clone();
        let id = request.container_id.clone();
        validate_identifier("container id", &id)?;
        let container = self.container(&namespace, &id)?;
        let taken = || Error::already_exists(format!("container {id:?} has a task already"));
        let task = self.take_name(Of::Container, &namespace, &id).ok_or_else(taken)?;
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            let created = this.make(&context, &task, &container, request).await;
            if created.is_err() {
                this.forget(&task);
            }
            created.map_err(|error| error.context(format!("create task {}", task.id)))
        })
        .await
    }

    async fn make(
        &self,
        context: &RequestContext,
        task: &Arc<Task>,
        container: &Container,
        request: CreateTaskRequest,
    ) -> Result<u32> {
        let runtime = container.runtime.clone().unwrap_or_default();
        let name = if request.runtime_path.is_empty() { &runtime.name } else { &request.runtime_path };
        let program = self.launcher.find(name)?;
        let options = request.options.filter(|any| !any.value.is_empty()).or(runtime.options);
        let spec = container.spec.as_ref().map(|any| any.value.clone()).unwrap_or_default();
        let hooks = self.hooks.clone();
        let spec = blocking(move || hooks.add_to(spec)).await?;
        trace::span("make the bundle", self.make_bundle(task, spec, &program)).await?;
        sys::failpoint!("tasks.create.bundle");
        let checkpoint = self.restore_from(context, task, request.checkpoint, options.as_ref()).await;
        let checkpoint = match checkpoint {
            Ok(checkpoint) => checkpoint,
            Err(error) => {
                self.remove_bundle(task).await;
                return Err(error);
            }
        };
        let request = shim::CreateTaskRequest {
            id: task.id.clone(),
            bundle: task.bundle.path.display().to_string(),
            rootfs: request.rootfs,
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            checkpoint,
            options: options.clone(),
            ..Default::default()
        };
        let reached = match self.sandbox_to_join(task, container) {
            Some(sandbox) => self.join(task, &sandbox).await,
            None => self.start_shim(task, &program, options).await,
        };
        let live = match reached {
            Ok(live) => live,
            Err(error) => {
                // It was never asked for a container, so that there is no more than the shim.
                self.kill_shim(task).await;
                self.remove_bundle(task).await;
                return Err(error);
            }
        };
        match trace::span("the shim creates", live.client.create(request)).await {
            Ok(created) => {
                sys::failpoint!("tasks.create.created");
                task.note_pid(created.pid);
                self.went_live(task, live);
                Ok(created.pid)
            }
            Err(error) => {
                self.undo(task, &live, error.code).await;
                Err(from_shim(error))
            }
        }
    }

    /// Takes a name, for what is being made; None when it is taken already.
    fn take_name(&self, of: Of, namespace: &Namespace, id: &str) -> Option<Arc<Task>> {
        let bundles = self.bundles.iter().find(|bundles| bundles.of == of)?;
        let task = Task::new(of, namespace.clone(), id.to_owned(), bundles.bundle(namespace, id));
        match self.tasks.lock().entry((of, namespace.clone(), id.to_owned())) {
            Entry::Occupied(_) => None,
            Entry::Vacant(vacant) => Some(vacant.insert(task).clone()),
        }
    }

    /// Makes the bundle, after what an earlier one of the name left has been cleaned up.
    async fn make_bundle(&self, task: &Task, spec: Vec<u8>, program: &Path) -> Result<()> {
        if task.bundle.path.exists() {
            // Its clean-up failed; the container may still run.
            let cleaned = self.run_delete(task).await;
            cleaned.map_err(|error| error.context(format!("clean up after an earlier {:?}", task.id)))?;
        }
        let (bundle, program) = (task.bundle.clone(), program.to_owned());
        blocking(move || {
            bundle.create(&spec)?;
            // Before the shim starts, so that whatever happens from here on can be cleaned up by it.
            bundle.note_program(&program).inspect_err(|_| {
                let _ = bundle.remove();
            })
        })
        .await
    }

    async fn start_shim(&self, task: &Arc<Task>, program: &Path, options: Option<Any>) -> Result<Live> {
        match ShimLog::follow(&task.bundle, &task.namespace, &task.id) {
            Ok(log) => task.follows(log),
            Err(error) => tracing::warn!(%error, id = task.id, "the shim's log cannot be read"),
        }
        let mut tries = 0;
        let (answer, live) = loop {
            let options = options.clone();
            let answer = self.launcher.start(program, &task.bundle, &task.namespace, &task.id, options);
            let answer = trace::span("start the shim", answer).await?;
            sys::failpoint!("tasks.shim.started");
            task.note_address(&answer.address);
            match trace::span("connect", Live::connect(&answer, &task.namespace)).await {
                Ok(live) => break (answer, live),
                // It named the shim of its group, which was about to end.
                Err(Connect::Dead(_)) if tries == 0 => tries += 1,
                Err(Connect::Dead(error) | Connect::Failed(error)) => return Err(error),
            }
        };
        sys::failpoint!("tasks.shim.connected");
        let bundle = task.bundle.clone();
        trace::span("note the shim", blocking(move || bundle.note_shim(&answer))).await?;
        sys::failpoint!("tasks.shim.noted");
        Ok(live)
    }

    /// Makes the task visible, and keeps the way to its shim.
    fn went_live(&self, task: &Arc<Task>, live: Live) {
        task.set_reached(Phase::Live(live.clone()));
        tokio::spawn(self.clone().keep(task.clone(), Some(live)));
    }

    /// Keeps the way to a shim for as long as the task lives. A connection that ends says nothing of the shim: it is dead
    /// when nobody listens at its socket any more.
    async fn keep(self, task: Arc<Task>, mut live: Option<Live>) {
        let mut pause = RECONNECT_FIRST;
        loop {
            if let Some(live) = live.take() {
                let since = Instant::now();
                tokio::select! {
                    () = live.client.closed() => {}
                    () = task.over() => return,
                }
                if since.elapsed() > RECONNECT_LAST {
                    pause = RECONNECT_FIRST;
                }
            }
            // Who ends it looks after its shim, too, unless the shim refuses.
            tokio::select! {
                biased;
                () = task.goes_on() => {}
                () = task.over() => return,
            }
            let error = match task.bundle.shim_address() {
                Ok(answer) => match Live::connect(&answer, &task.namespace).await {
                    Ok(new) => {
                        tracing::info!(id = task.id, namespace = %task.namespace, "connected to the shim again");
                        task.set_reached(Phase::Live(new.clone()));
                        live = Some(new);
                        None
                    }
                    Err(Connect::Dead(_)) => {
                        if task.claim_end() {
                            self.clean_up_dead(&task).await;
                        }
                        return;
                    }
                    Err(Connect::Failed(error)) => Some(error),
                },
                Err(error) => Some(error),
            };
            if let Some(error) = error {
                tracing::warn!(%error, id = task.id, namespace = %task.namespace, "the shim cannot be reached");
                task.set_reached(Phase::Unreachable(error.to_string().into()));
            }
            tokio::select! {
                () = tokio::time::sleep(pause) => {}
                () = task.over() => return,
            }
            pause = (pause * 2).min(RECONNECT_LAST);
        }
    }

    /// Removes everything of a task whose create failed. What fails here is logged: the caller has an error already.
    async fn undo(&self, task: &Arc<Task>, live: &Live, failure: Code) {
        // A shim that answered has taken back what it began, and knows no such container. One that did not may
        // still be at it.
        let answered = !matches!(failure, Code::DeadlineExceeded | Code::Closed | Code::Unavailable);
        let deadline = Instant::now() + UNDO_LIMIT;
        let deleted = loop {
            let request = shim::DeleteRequest { id: task.id.clone(), ..Default::default() };
            let left = deadline.saturating_duration_since(Instant::now());
            match tokio::time::timeout(left, live.client.delete(request)).await {
                Ok(Ok(_)) => break true,
                Ok(Err(error)) if error.code == Code::NotFound && answered => break true,
                Ok(Err(error)) if error.code == Code::NotFound => {
                    tokio::time::sleep(RECONNECT_FIRST).await;
                }
                Ok(Err(_)) | Err(_) => break false,
            }
        };
        let ended = self.end_shim(task, live).await;
        if !(deleted && ended)
            && let Err(error) = self.run_delete(task).await
        {
            tracing::error!(
                %error, id = task.id, namespace = %task.namespace,
                "what a failed create left could not be cleaned up; the next create or start tries again"
            );
            return;
        }
        self.remove_bundle(task).await;
    }

    /// Lets a shim go that has this task no more; one that others share stays. Whether it went by itself.
    async fn end_shim(&self, task: &Task, live: &Live) -> bool {
        let request = shim::ShutdownRequest { id: task.id.clone(), now: false };
        let ended = tokio::time::timeout(SHUTDOWN_LIMIT, async {
            // Its connection may end before its answer comes.
            let _ = live.client.shutdown(request).await;
            if !self.is_shared(task) {
                live.client.closed().await;
            }
        });
        if ended.await.is_ok() {
            return true;
        }
        tracing::warn!(id = task.id, namespace = %task.namespace, "the shim did not end within {SHUTDOWN_LIMIT:?}");
        self.kill_shim(task).await
    }

    /// Whether another task lives, or is being made, in the same shim.
    fn is_shared(&self, task: &Task) -> bool {
        let Some(address) = task.address() else { return false };
        let others: Vec<_> = self.tasks.lock().values().cloned().collect();
        others
            .iter()
            .filter(|other| !std::ptr::eq(&raw const ***other, task))
            .any(|other| !other.is_over() && other.address().is_some_and(|of| of == address))
    }

    /// Kills what was started for this bundle and still runs in it: a shim that hangs, with the runtimes it started.
    /// Not one that others share, which is said by the answer.
    async fn kill_shim(&self, task: &Task) -> bool {
        if self.is_shared(task) {
            return true;
        }
        let (path, id, namespace) = (task.bundle.path.clone(), task.id.clone(), task.namespace.clone());
        let killed = blocking(move || {
            for pid in restore::processes_in(&path) {
                tracing::warn!(pid, id, %namespace, "killing a shim that does not end");
                restore::kill(pid);
            }
            // Until then it listens.
            let deadline = Instant::now() + KILL_LIMIT;
            while !restore::processes_in(&path).is_empty() && Instant::now() < deadline {
                std::thread::sleep(KILL_PAUSE);
            }
            Ok(())
        });
        if let Err(error) = killed.await {
            tracing::error!(%error, "killing a shim");
        }
        false
    }

    async fn remove_bundle(&self, task: &Task) {
        let (bundle, launcher) = (task.bundle.clone(), self.launcher.clone());
        let (namespace, id) = (task.namespace.clone(), task.id.clone());
        let removed = blocking(move || {
            // While the bundle still says where.
            launcher.remove_dead_sockets(&bundle, &namespace, &id);
            bundle.remove()
        });
        if let Err(error) = removed.await {
            tracing::error!(%error, id = task.id, namespace = %task.namespace, "a bundle is left; the next start removes it");
        }
    }

    /// Notes in the bundle how the task ended; where that fails, the next start finds it out anew.
    async fn note_end(&self, task: &Task, end: End) {
        let bundle = task.bundle.clone();
        if let Err(error) = blocking(move || bundle.note_end(&end)).await {
            tracing::warn!(%error, id = task.id, namespace = %task.namespace, "the end of a task was not noted");
        }
    }

    fn forget(&self, task: &Arc<Task>) {
        task.set(Phase::Gone);
        let key = (task.of, task.namespace.clone(), task.id.clone());
        let mut tasks = self.tasks.lock();
        if tasks.get(&key).is_some_and(|other| Arc::ptr_eq(other, task)) {
            tasks.remove(&key);
        }
    }

    /// Starts the init process, or an exec added before; its pid.
    pub async fn start(&self, context: &RequestContext, id: &str, exec_id: &str) -> Result<u32> {
        let task = self.task(context, id)?;
        let request = shim::StartRequest { id: id.to_owned(), exec_id: exec_id.to_owned() };
        let started = async move {
            let started = task.ask(|shim| async move { shim.start(request).await }).await?;
            sys::failpoint!("tasks.start.answered");
            Ok(started.pid)
        };
        outlive(trace::span("the shim starts", started)).await
    }

    /// Removes a stopped task, with its shim when no other needs it; how its init ended.
    pub async fn delete(&self, context: &RequestContext, id: &str) -> Result<Exit> {
        let task = self.task(context, id)?;
        let this = self.clone();
        outlive(async move {
            let request = shim::DeleteRequest { id: task.id.clone(), ..Default::default() };
            let exit = match task.phase() {
                Phase::Live(live) => match trace::span("the shim deletes", live.client.delete(request)).await {
                    Ok(answer) => {
                        let exit = Exit::of(answer.pid, answer.exit_status, answer.exited_at);
                        sys::failpoint!("tasks.delete.answered");
                        if !task.claim_end() {
                            // The shim died as it answered: what is left is being cleaned up.
                            task.over().await;
                            if !task.leaves() {
                                return Ok(exit);
                            }
                        } else {
                            trace::span("note the end", this.note_end(&task, End::Deleted)).await;
                            sys::failpoint!("tasks.delete.noted");
                            trace::span("end the shim", this.end_shim(&task, &live)).await;
                            sys::failpoint!("tasks.delete.shim-ended");
                        }
                        trace::span("remove the bundle", this.remove_bundle(&task)).await;
                        sys::failpoint!("tasks.delete.removed");
                        this.forget(&task);
                        return Ok(exit);
                    }
                    Err(error) if error.code == Code::Closed => task.died().await?,
                    Err(error) => {
                        // The shim has lost it, as after an earlier delete that was not waited for: nobody else will
                        // set the name free.
                        if error.code == Code::NotFound && task.claim_end() {
                            this.end_shim(&task, &live).await;
                            if let Err(error) = this.run_delete(&task).await {
                                tracing::warn!(%error, id = task.id, "cleaning up after a task that its shim has lost");
                            }
                            this.remove_bundle(&task).await;
                            this.forget(&task);
                        }
                        return Err(from_shim(error));
                    }
                },
                Phase::Unreachable(why) => return Err(task.unreachable(&why)),
                Phase::Dead { exit, clean } => {
                    if !clean {
                        this.run_delete(&task).await?;
                    }
                    exit
                }
                Phase::Creating | Phase::Gone => return Err(no_task(&task.id)),
            };
            // Of several that delete a dead task, one does.
            if !task.leaves() {
                return Err(no_task(&task.id));
            }
            this.remove_bundle(&task).await;
            this.forget(&task);
            Ok(exit)
        })
        .await
    }

    /// Removes a stopped exec; how it ended.
    pub async fn delete_process(&self, context: &RequestContext, id: &str, exec_id: &str) -> Result<Exit> {
        if exec_id.is_empty() {
            return Err(Error::invalid_argument("the exec id is missing; a task is removed by Delete"));
        }
        let task = self.task(context, id)?;
        let request = shim::DeleteRequest { id: id.to_owned(), exec_id: exec_id.to_owned() };
        let answer = task.ask(|shim| async move { shim.delete(request).await }).await?;
        sys::failpoint!("tasks.delete-process.answered");
        Ok(Exit::of(answer.pid, answer.exit_status, answer.exited_at))
    }

    /// What a process is now.
    pub async fn get(&self, context: &RequestContext, id: &str, exec_id: &str) -> Result<Process> {
        self.task(context, id)?.process(exec_id, STATE_LIMIT).await
    }

    /// The tasks of the namespace. One whose shim does not answer in time is listed with the status UNKNOWN.
    pub async fn list(&self, context: &RequestContext) -> Result<Vec<Process>> {
        let tasks = self.of_namespace(context.namespace()?);
        let found = stream::iter(tasks).map(|task| async move {
            match task.process("", STATE_LIMIT).await {
                Ok(process) => Some(process),
                // Gone between listing and asking.
                Err(Error::NotFound(_)) => None,
                Err(error) => {
                    tracing::warn!(%error, id = task.id, namespace = %task.namespace, "a task does not answer");
                    Some(Process { id: task.id.clone(), status: Status::Unknown.into(), ..Default::default() })
                }
            }
        });
        Ok(found.buffered(LIST_WIDTH).filter_map(std::future::ready).collect().await)
    }

    /// Sends a signal to a process, or to all of the container. NotFound when the process is gone.
    pub async fn kill(
        &self,
        context: &RequestContext,
        id: &str,
        exec_id: &str,
        signal: u32,
        all: bool,
    ) -> Result<()> {
        let task = self.task(context, id)?;
        let request = shim::KillRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), signal, all };
        task.ask(|shim| async move { shim.kill(request).await }).await?;
        sys::failpoint!("tasks.kill.answered");
        Ok(())
    }

    /// Adds a process to a running container; a start runs it. AlreadyExists when the exec id is taken.
    pub async fn exec(&self, context: &RequestContext, request: ExecProcessRequest) -> Result<()> {
        validate_identifier("exec id", &request.exec_id)?;
        let task = self.task(context, &request.container_id)?;
        if request.spec.is_none() {
            return Err(Error::invalid_argument("the spec of the process to exec is missing"));
        }
        let request = shim::ExecProcessRequest {
            id: request.container_id,
            exec_id: request.exec_id,
            terminal: request.terminal,
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            spec: request.spec,
        };
        task.ask(|shim| async move { shim.exec(request).await }).await?;
        sys::failpoint!("tasks.exec.answered");
        Ok(())
    }

    /// Sets the size of a process's terminal, in characters.
    pub async fn resize_pty(
        &self,
        context: &RequestContext,
        id: &str,
        exec_id: &str,
        width: u32,
        height: u32,
    ) -> Result<()> {
        let task = self.task(context, id)?;
        let request =
            shim::ResizePtyRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), width, height };
        task.ask(|shim| async move { shim.resize_pty(request).await }).await
    }

    /// Lets a process see the end of its standard input.
    pub async fn close_io(
        &self,
        context: &RequestContext,
        id: &str,
        exec_id: &str,
        stdin: bool,
    ) -> Result<()> {
        let task = self.task(context, id)?;
        let request = shim::CloseIoRequest { id: id.to_owned(), exec_id: exec_id.to_owned(), stdin };
        task.ask(|shim| async move { shim.close_io(request).await }).await
    }

    /// Freezes a container.
    pub async fn pause(&self, context: &RequestContext, id: &str) -> Result<()> {
        let request = shim::PauseRequest { id: id.to_owned() };
        self.task(context, id)?.ask(|shim| async move { shim.pause(request).await }).await
    }

    /// Thaws a container.
    pub async fn resume(&self, context: &RequestContext, id: &str) -> Result<()> {
        let request = shim::ResumeRequest { id: id.to_owned() };
        self.task(context, id)?.ask(|shim| async move { shim.resume(request).await }).await
    }

    /// All processes of a container.
    pub async fn pids(&self, context: &RequestContext, id: &str) -> Result<Vec<ProcessInfo>> {
        let request = shim::PidsRequest { id: id.to_owned() };
        let answer = self.task(context, id)?.ask(|shim| async move { shim.pids(request).await }).await?;
        Ok(answer.processes)
    }

    /// Changes a container's resource limits.
    pub async fn update(
        &self,
        context: &RequestContext,
        id: &str,
        resources: Option<Any>,
        annotations: BTreeMap<String, String>,
    ) -> Result<()> {
        let task = self.task(context, id)?;
        let request = shim::UpdateTaskRequest { id: id.to_owned(), resources, annotations };
        outlive(async move { task.ask(|shim| async move { shim.update(request).await }).await }).await
    }

    /// The resource use of the tasks that pass the filters (`id`); those that cannot say are left out.
    pub async fn metrics(&self, context: &RequestContext, filters: &[String]) -> Result<Vec<Metric>> {
        let namespace = context.namespace()?;
        let filter = Filter::parse_all(filters)?;
        let tasks = self.of_namespace(namespace).into_iter().filter(|task| {
            filter.matches(|path| match path {
                ["id"] => Some(task.id.as_str().into()),
                ["namespace"] => Some(namespace.as_str().into()),
                _ => None,
            })
        });
        let found = stream::iter(tasks.collect::<Vec<_>>()).map(|task| async move {
            let request = shim::StatsRequest { id: task.id.clone() };
            let asked = task.ask(|shim| async move { shim.stats(request).await });
            match tokio::time::timeout(STATE_LIMIT, asked).await {
                Ok(Ok(answer)) => Some(Metric {
                    timestamp: Some(SystemTime::now().into()),
                    id: task.id.clone(),
                    data: answer.stats,
                }),
                Ok(Err(error)) => {
                    tracing::debug!(%error, id = task.id, namespace = %task.namespace, "no metrics");
                    None
                }
                Err(_) => None,
            }
        });
        Ok(found.buffered(LIST_WIDTH).filter_map(std::future::ready).collect().await)
    }

    /// Answers when a process has ended, also when its shim ends first.
    pub async fn wait(&self, context: &RequestContext, id: &str, exec_id: &str) -> Result<Exit> {
        let task = self.task(context, id)?;
        loop {
            match task.phase() {
                Phase::Live(live) => {
                    if let Some(exit) = task.exit_of(&live, exec_id).await? {
                        return Ok(exit);
                    }
                    match task.died().await {
                        Err(Error::Unavailable(_)) => {}
                        // An exec does not outlive its container.
                        settled => return settled,
                    }
                }
                Phase::Unreachable(_) => task.reached().await,
                Phase::Dead { exit, .. } => return Ok(exit),
                Phase::Creating | Phase::Gone => return Err(no_task(id)),
            }
        }
    }

    /// Passes on what a shim publishes, and remembers exits: should the shim die, its exit is known and not told twice.
    /// The shim sends it again until it is answered.
    pub async fn forward_once(&self, envelope: Envelope) -> Result<()> {
        self.note_exit(&envelope);
        sys::failpoint!("tasks.event.arrived");
        self.events.forward_once(envelope).await?;
        sys::failpoint!("tasks.event.kept");
        Ok(())
    }

    /// The same for what comes by way of a client, as that of shims that run one for each event.
    pub async fn forward(&self, envelope: Envelope) -> Result<()> {
        self.note_exit(&envelope);
        self.events.forward(envelope).await
    }

    fn note_exit(&self, envelope: &Envelope) {
        let exit = (envelope.topic == "/tasks/exit")
            .then(|| proto::any::unpack::<TaskExit>(envelope.event.as_ref()?).ok())
            .flatten()
            .filter(|exit| exit.id == exit.container_id);
        if let Some(exit) = exit
            && let Ok(namespace) = Namespace::new(&envelope.namespace)
            && let Some(task) = self.tasks.lock().get(&(Of::Container, namespace, exit.container_id.clone()))
        {
            task.saw_exit(Exit::of(exit.pid, exit.exit_status, exit.exited_at));
        }
    }

    fn container(&self, namespace: &Namespace, id: &str) -> Result<Container> {
        let record = self.metadata.view().get::<Container>(&[namespace.as_str(), id])?;
        record.ok_or_else(|| Error::not_found(format!("container {id:?} does not exist")))
    }

    fn task(&self, context: &RequestContext, id: &str) -> Result<Arc<Task>> {
        let key = (Of::Container, context.namespace()?.clone(), id.to_owned());
        let task = self.tasks.lock().get(&key).cloned();
        task.filter(|task| !matches!(task.phase(), Phase::Creating)).ok_or_else(|| no_task(id))
    }

    fn of_namespace(&self, namespace: &Namespace) -> Vec<Arc<Task>> {
        let tasks = self.tasks.lock();
        let from = (Of::Container, namespace.clone(), String::new());
        let after = tasks.range(from..);
        let of_it = after.take_while(|((of, name, _), _)| *of == Of::Container && name == namespace);
        of_it.map(|(_, task)| task.clone()).collect()
    }
}

fn no_task(id: &str) -> Error {
    Error::not_found(format!("container {id:?} has no task"))
}
