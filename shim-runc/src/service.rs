//! The task service: which container a request is for, and what its answer looks like.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError, Weak};

use async_trait::async_trait;
use proto::containerd::events::TaskCheckpointed;
use proto::containerd::runc::v1::{CheckpointOptions, ProcessDetails};
use proto::containerd::v1::types::{ProcessInfo, Status};
use shim_api::task::*;
use shim_api::{Error, Result};
use tokio::sync::Notify;

use crate::container::{Container, Request, Shim, View, absolute_bundle};
use crate::io::Stdio;
use crate::metrics;
use crate::sandbox::{self, Sandbox};
use crate::state::{Answer, Exit, Freezer, Phase, ProcessKey};

/// The containers of this shim.
pub(crate) struct Service {
    shim: Shim,
    containers: Mutex<HashMap<String, Slot>>,
    done: Arc<Notify>,
    /// The sandbox that this shim may be, which keeps it when the last container has gone.
    sandbox: OnceLock<Weak<Sandbox>>,
}

enum Slot {
    /// Its creation is under way.
    Reserved,
    Ready(Container),
}

impl Service {
    /// `done` is notified when the shim may end.
    pub(crate) fn new(shim: Shim, done: Arc<Notify>) -> Self {
        Self { shim, containers: Mutex::default(), done, sandbox: OnceLock::new() }
    }

    pub(crate) fn belongs_to(&self, sandbox: &Arc<Sandbox>) {
        let _ = self.sandbox.set(Arc::downgrade(sandbox));
    }

    /// Whether it has no container.
    pub(crate) fn is_empty(&self) -> bool {
        self.lock().is_empty()
    }

    /// Whether nobody needs the shim.
    pub(crate) fn may_end(&self) -> bool {
        let sandbox = self.sandbox.get().and_then(Weak::upgrade);
        self.is_empty() && !sandbox.is_some_and(|sandbox| sandbox::is_one(&sandbox))
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<String, Slot>> {
        self.containers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn container(&self, id: &str) -> Result<Container> {
        match self.lock().get(id) {
            Some(Slot::Ready(container)) => Ok(container.clone()),
            Some(Slot::Reserved) | None => Err(Error::not_found(format!("container {id} not created"))),
        }
    }

    async fn look(&self, id: &str, exec_id: String) -> Result<View> {
        self.container(id)?.look(&ProcessKey(exec_id)).await
    }

    async fn ask(&self, id: &str, request: Request) -> Result<Answer> {
        self.container(id)?.ask(request).await
    }
}

/// An exec's id becomes part of file names.
fn checked_exec_id(id: String) -> Result<ProcessKey> {
    let part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if id.is_empty() || id.len() > 128 || id.starts_with('.') || !id.chars().all(part) {
        return Err(Error::invalid_argument(format!("{id:?} cannot be an exec's id")));
    }
    Ok(ProcessKey(id))
}

fn status(view: &View) -> Status {
    match (view.phase, view.freezer) {
        (Phase::Stopped(_) | Phase::Deleting { exit: Some(_), .. }, _) => Status::Stopped,
        (_, Freezer::Pausing) => Status::Pausing,
        (_, Freezer::Paused | Freezer::Resuming) => Status::Paused,
        (Phase::Created | Phase::Starting { .. } | Phase::Deleting { .. }, _) => Status::Created,
        (Phase::Running | Phase::Exiting(_), _) => Status::Running,
    }
}

fn exit_of(view: &View) -> Option<Exit> {
    match view.phase {
        Phase::Stopped(exit) | Phase::Deleting { exit: Some(exit), .. } => Some(exit),
        _ => None,
    }
}

#[async_trait]
impl TaskService for Service {
    async fn state(&self, request: StateRequest) -> Result<StateResponse> {
        let container = self.container(&request.id)?;
        let view = container.look(&ProcessKey(request.exec_id.clone())).await?;
        let exit = exit_of(&view);
        Ok(StateResponse {
            // containerd's shim names the process here, not the container.
            id: if request.exec_id.is_empty() { request.id } else { request.exec_id.clone() },
            bundle: container.facts().bundle.to_string_lossy().into_owned(),
            pid: view.pid,
            status: status(&view).into(),
            stdin: view.stdio.stdin,
            stdout: view.stdio.stdout,
            stderr: view.stdio.stderr,
            terminal: view.stdio.terminal,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| exit.at.into()),
            exec_id: request.exec_id,
        })
    }

    async fn create(&self, request: CreateTaskRequest) -> Result<CreateTaskResponse> {
        absolute_bundle(&request.bundle)?;
        let id = request.id.clone();
        {
            let mut containers = self.lock();
            if containers.contains_key(&id) {
                return Err(Error::already_exists(format!("container {id} exists in this shim already")));
            }
            containers.insert(id.clone(), Slot::Reserved);
        }
        let created = Container::create(self.shim.clone(), request).await;
        let mut containers = self.lock();
        match created {
            Ok((container, pid)) => {
                containers.insert(id, Slot::Ready(container));
                sys::failpoint!("shim.create.done");
                Ok(CreateTaskResponse { pid })
            }
            Err(error) => {
                containers.remove(&id);
                Err(error)
            }
        }
    }

    async fn start(&self, request: StartRequest) -> Result<StartResponse> {
        match self.ask(&request.id, Request::Start(ProcessKey(request.exec_id))).await? {
            Answer::Started { pid } => Ok(StartResponse { pid }),
            other => Err(Error::internal(format!("a start answered {other:?}"))),
        }
    }

    async fn delete(&self, request: DeleteRequest) -> Result<DeleteResponse> {
        let key = ProcessKey(request.exec_id);
        let is_init = key.is_init();
        let Answer::Deleted { pid, exit } = self.ask(&request.id, Request::Delete(key)).await? else {
            return Err(Error::internal("a delete did not answer as one"));
        };
        if is_init {
            self.lock().remove(&request.id);
            sys::failpoint!("shim.delete.done");
            // What a container leaves free in the allocator would be kept for the shim's life.
            sys::process::trim_memory();
        }
        Ok(DeleteResponse {
            pid,
            exit_status: exit.map_or(0, |exit| exit.status),
            exited_at: exit.map(|exit| exit.at.into()),
        })
    }

    async fn pids(&self, request: PidsRequest) -> Result<PidsResponse> {
        let view = self.look(&request.id, String::new()).await?;
        let mut pids = match &view.cgroup {
            Some(group) => group.processes().unwrap_or_default(),
            None => Vec::new(),
        };
        if pids.is_empty() && exit_of(&view).is_none() && view.pid != 0 {
            pids.push(view.pid);
        }
        let details = |pid: u32| {
            let (_, exec_id) = view.execs.iter().find(|(exec, _)| *exec == pid)?;
            Some(proto::any::pack(&ProcessDetails { exec_id: exec_id.clone() }))
        };
        Ok(PidsResponse {
            processes: pids.into_iter().map(|pid| ProcessInfo { pid, info: details(pid) }).collect(),
        })
    }

    async fn pause(&self, request: PauseRequest) -> Result<()> {
        self.ask(&request.id, Request::Pause).await.map(drop)
    }

    async fn resume(&self, request: ResumeRequest) -> Result<()> {
        self.ask(&request.id, Request::Resume).await.map(drop)
    }

    async fn checkpoint(&self, request: CheckpointTaskRequest) -> Result<()> {
        let container = self.container(&request.id)?;
        let view = container.look(&ProcessKey::init()).await?;
        if !matches!(view.phase, Phase::Running) {
            return Err(Error::failed_precondition("cannot checkpoint a container that does not run"));
        }
        let options = match &request.options {
            Some(any) => proto::any::unpack::<CheckpointOptions>(any).map_err(|error| {
                Error::invalid_argument(format!("the checkpoint options cannot be decoded: {error}"))
            })?,
            None => CheckpointOptions::default(),
        };
        let facts = container.facts();
        let work = facts.criu_work(&options.work_path);
        let result = facts.runtime.checkpoint(&PathBuf::from(&request.path), &work, &options).await;
        result
            .map_err(|error| Error::new(error.code, format!("{error} (CRIU's logs: {})", work.display())))?;
        if options.work_path.is_empty() {
            let _ = std::fs::remove_dir_all(&work);
        }
        let event = TaskCheckpointed { container_id: request.id, checkpoint: request.path };
        self.shim.publisher.publish("/tasks/checkpointed", &event);
        Ok(())
    }

    async fn kill(&self, request: KillRequest) -> Result<()> {
        let KillRequest { id, exec_id, signal, all } = request;
        self.ask(&id, Request::Signal { key: ProcessKey(exec_id), signal, all }).await.map(drop)
    }

    async fn exec(&self, request: ExecProcessRequest) -> Result<()> {
        let key = checked_exec_id(request.exec_id)?;
        let process = request.spec.ok_or_else(|| Error::invalid_argument("the exec has no process"))?.value;
        let stdio = Stdio {
            stdin: request.stdin,
            stdout: request.stdout,
            stderr: request.stderr,
            terminal: request.terminal,
        };
        self.ask(&request.id, Request::Exec { key, stdio, process }).await.map(drop)
    }

    async fn resize_pty(&self, request: ResizePtyRequest) -> Result<()> {
        let view = self.look(&request.id, request.exec_id).await?;
        match view.io {
            Some(io) => io.resize(request.width, request.height),
            None => Ok(()),
        }
    }

    async fn close_io(&self, request: CloseIoRequest) -> Result<()> {
        let view = self.look(&request.id, request.exec_id).await?;
        if let Some(io) = view.io.filter(|_| request.stdin) {
            io.close_stdin();
        }
        Ok(())
    }

    async fn update(&self, request: UpdateTaskRequest) -> Result<()> {
        let container = self.container(&request.id)?;
        let view = container.look(&ProcessKey::init()).await?;
        if exit_of(&view).is_some() {
            return Err(Error::failed_precondition("cannot update a stopped container"));
        }
        let resources =
            request.resources.ok_or_else(|| Error::invalid_argument("the update has no resources"))?;
        container.facts().runtime.update(&resources.value).await
    }

    async fn wait(&self, request: WaitRequest) -> Result<WaitResponse> {
        let mut view = self.look(&request.id, request.exec_id).await?;
        let exit = match exit_of(&view) {
            Some(exit) => exit,
            None => {
                let exit = view.exit.wait_for(Option::is_some).await;
                let exit = exit.map_err(|_| Error::not_found("the process was deleted before it ran"))?;
                exit.ok_or_else(|| Error::internal("no exit in an exit"))?
            }
        };
        Ok(WaitResponse { exit_status: exit.status, exited_at: Some(exit.at.into()) })
    }

    async fn stats(&self, request: StatsRequest) -> Result<StatsResponse> {
        let view = self.look(&request.id, String::new()).await?;
        match view.cgroup {
            Some(group) if group_exists(&group) => Ok(StatsResponse { stats: Some(metrics::of(&group)) }),
            _ => Err(Error::not_found(format!("container {} has no control group now", request.id))),
        }
    }

    async fn connect_shim(&self, request: ConnectRequest) -> Result<ConnectResponse> {
        let task_pid = match self.look(&request.id, String::new()).await {
            Ok(view) => view.pid,
            Err(_) => 0,
        };
        Ok(ConnectResponse { shim_pid: std::process::id(), task_pid, version: String::new() })
    }

    async fn shutdown(&self, request: ShutdownRequest) -> Result<()> {
        if request.now || self.may_end() {
            self.done.notify_one();
        }
        Ok(())
    }
}

/// Whether the group still exists.
fn group_exists(group: &sys::cgroup::Cgroup) -> bool {
    group.processes().is_ok()
}
