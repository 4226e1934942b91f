//! Sandboxes that a shim makes: what the containers of a pod share, by the shim's sandbox API.
//!
//! A sandbox's shim is kept as a task's is: the same phases, the same bundles (in a folder of their own), the same clean-up
//! when it dies. Containers that name the sandbox join its shim without running the shim's program again.
//!
//! Invariant: the end of a sandbox is told once, whoever waits for it: by the shim, or by its death.

use std::sync::Arc;
use std::time::SystemTime;

use proto::containerd::events::{SandboxCreate, SandboxExit, SandboxStart};
use proto::containerd::services::containers::v1::Container;
use proto::containerd::services::sandbox::v1::{
    ControllerCreateRequest, ControllerStartResponse, ControllerStatusResponse,
};
use proto::containerd::types::{Metric, Platform, Sandbox};
use shim_api::sandbox as shim;
use shim_api::{Code, Error as ShimError};

use super::bundle::Of;
use super::task::{Connect, Exit, Live, Phase, Task, from_shim};
use super::{STATE_LIMIT, Tasks};
use crate::context::{Namespace, RequestContext, validate_identifier};
use crate::error::{Error, Result, blocking, outlive};
use crate::metadata::Read as _;

/// The one controller that there is.
const CONTROLLER: &str = "shim";
/// What a sandbox is called that does not run.
const NOT_READY: &str = "SANDBOX_NOTREADY";
const READY: &str = "SANDBOX_READY";

/// Checks the name of a controller; NotFound for another than `shim`.
pub fn check_controller(name: &str) -> Result<()> {
    match name {
        CONTROLLER => Ok(()),
        "" => Err(Error::invalid_argument(format!("no sandbox controller is named; use {CONTROLLER:?}"))),
        _ => Err(Error::not_found(format!("sandbox controller {name:?} is not known; use {CONTROLLER:?}"))),
    }
}

impl Tasks {
    /// Starts the shim of a sandbox and hands the sandbox over to it. AlreadyExists while there is one of this id, NotFound
    /// when neither the request nor the store says what it is.
    pub async fn create_sandbox(
        &self,
        context: &RequestContext,
        request: ControllerCreateRequest,
    ) -> Result<()> {
        let namespace = context.namespace()?.clone();
        let id = request.sandbox_id.clone();
        validate_identifier("sandbox id", &id)?;
        let sandbox = match request.sandbox.clone() {
            Some(sandbox) => sandbox,
            None => self.metadata.view().get::<Sandbox>(&[namespace.as_str(), &id])?.ok_or_else(|| {
                Error::not_found(format!("sandbox {id:?} is neither in the request nor in the store"))
            })?,
        };
        let taken = || Error::already_exists(format!("sandbox {id:?} has a shim already"));
        let task = self.take_name(Of::Sandbox, &namespace, &id).ok_or_else(taken)?;
        let this = self.clone();
        outlive(async move {
            if let Err(error) = this.make_sandbox(&task, sandbox, request).await {
                this.forget(&task);
                return Err(error.context(format!("create sandbox {}", task.id)));
            }
            let event = SandboxCreate { sandbox_id: task.id.clone() };
            this.events.publish(&task.namespace, "/sandboxes/create", &event);
            Ok(())
        })
        .await
    }

    async fn make_sandbox(
        &self,
        task: &Arc<Task>,
        sandbox: Sandbox,
        request: ControllerCreateRequest,
    ) -> Result<()> {
        let runtime = sandbox.runtime.unwrap_or_default();
        let program = self.launcher.find(&runtime.name)?;
        let spec = sandbox.spec.map(|any| any.value).unwrap_or_default();
        self.make_bundle(task, spec, &program).await?;
        let options = runtime.options.filter(|any| !any.value.is_empty());
        let live = match self.start_shim(task, &program, options).await {
            Ok(live) => live,
            Err(error) => {
                self.kill_shim(task).await;
                self.remove_bundle(task).await;
                return Err(error);
            }
        };
        let create = shim::CreateSandboxRequest {
            sandbox_id: task.id.clone(),
            bundle_path: task.bundle.path.display().to_string(),
            rootfs: request.rootfs,
            options: request.options,
            netns_path: request.netns_path,
            annotations: request.annotations,
        };
        if let Err(error) = live.client.sandbox().create_sandbox(create).await {
            let unoffered = error.code == Code::Unimplemented;
            let error = from_shim(error);
            self.end_shim(task, &live).await;
            self.remove_bundle(task).await;
            return Err(match unoffered {
                true => Error::unimplemented(format!(
                    "runtime {:?} does not serve sandboxes: {error}; use one that does, or put the containers into one \
                     shim by their annotations",
                    runtime.name
                )),
                false => error,
            });
        }
        sys::failpoint!("sandbox.create.created");
        self.went_live(task, live);
        Ok(())
    }

    /// Makes the sandbox. When that fails, it and its shim are gone.
    pub async fn start_sandbox(&self, context: &RequestContext, id: &str) -> Result<ControllerStartResponse> {
        let task = self.sandbox(context, id)?;
        let this = self.clone();
        outlive(async move {
            let request = shim::StartSandboxRequest { sandbox_id: task.id.clone() };
            let asked = task.ask(|shim| async move { shim.sandbox().start_sandbox(request).await });
            let started = match asked.await {
                Ok(started) => started,
                // It is not this start that failed.
                Err(error @ (Error::AlreadyExists(_) | Error::Unavailable(_) | Error::NotFound(_))) => {
                    return Err(error);
                }
                Err(error) => {
                    if let Err(error) = this.end_sandbox(&task).await {
                        tracing::error!(%error, id = task.id, "a sandbox that failed to start stays");
                    }
                    return Err(error.context(format!("start sandbox {}", task.id)));
                }
            };
            sys::failpoint!("sandbox.start.answered");
            task.note_pid(started.pid);
            tokio::spawn(this.clone().await_end(task.clone()));
            let event = SandboxStart { sandbox_id: task.id.clone() };
            this.events.publish(&task.namespace, "/sandboxes/start", &event);
            let answer = task.bundle.shim_address()?;
            Ok(ControllerStartResponse {
                sandbox_id: task.id.clone(),
                pid: started.pid,
                created_at: started.created_at,
                labels: Default::default(),
                address: answer.address,
                version: answer.version,
                spec: started.spec,
            })
        })
        .await
    }

    /// Ends the sandbox; its shim stays. One that is not there, or not there any more, is no error.
    pub async fn stop_sandbox(&self, context: &RequestContext, id: &str, timeout_secs: u32) -> Result<()> {
        let task = match self.sandbox(context, id) {
            Err(Error::NotFound(_)) => return Ok(()),
            task => task?,
        };
        let request = shim::StopSandboxRequest { sandbox_id: id.to_owned(), timeout_secs };
        outlive(async move {
            match task.ask(|shim| async move { shim.sandbox().stop_sandbox(request).await }).await {
                Ok(_) | Err(Error::NotFound(_)) => Ok(()),
                Err(error) => Err(error),
            }
        })
        .await
    }

    /// Answers when the sandbox has ended, also when its shim ends first.
    pub async fn wait_sandbox(&self, context: &RequestContext, id: &str) -> Result<Exit> {
        let task = self.sandbox(context, id)?;
        wait(&task).await
    }

    /// What the sandbox is now; one that is not there is not ready.
    pub async fn sandbox_status(
        &self,
        context: &RequestContext,
        id: &str,
        verbose: bool,
    ) -> Result<ControllerStatusResponse> {
        let ended = |exit: Option<Exit>| ControllerStatusResponse {
            sandbox_id: id.to_owned(),
            pid: exit.map_or(0, |exit| exit.pid),
            state: NOT_READY.to_owned(),
            exited_at: exit.and_then(|exit| exit.at).or_else(|| Some(SystemTime::now().into())),
            ..ControllerStatusResponse::default()
        };
        let task = match self.sandbox(context, id) {
            Err(Error::NotFound(_)) => return Ok(ended(None)),
            task => task?,
        };
        if let Phase::Dead { exit, .. } = task.phase() {
            return Ok(ended(Some(exit)));
        }
        let request = shim::SandboxStatusRequest { sandbox_id: id.to_owned(), verbose };
        let asked = task.ask(|shim| async move { shim.sandbox().sandbox_status(request).await });
        let status = tokio::time::timeout(STATE_LIMIT, asked).await.map_err(|_| {
            Error::deadline_exceeded(format!(
                "the shim of sandbox {id:?} did not answer within {STATE_LIMIT:?}"
            ))
        })?;
        let status = match status {
            Err(Error::NotFound(_)) => return Ok(ended(None)),
            status => status?,
        };
        let answer = task.bundle.shim_address()?;
        Ok(ControllerStatusResponse {
            sandbox_id: status.sandbox_id,
            pid: status.pid,
            state: status.state,
            info: status.info,
            created_at: status.created_at,
            exited_at: status.exited_at,
            extra: status.extra,
            address: answer.address,
            version: answer.version,
        })
    }

    /// What the sandbox's containers run on.
    pub async fn sandbox_platform(&self, context: &RequestContext, id: &str) -> Result<Platform> {
        let request = shim::PlatformRequest { sandbox_id: id.to_owned() };
        let task = self.sandbox(context, id)?;
        let answer = task.ask(|shim| async move { shim.sandbox().platform(request).await }).await?;
        Ok(answer.platform.unwrap_or_default())
    }

    /// Resource use of the sandbox, as its shim counts it.
    pub async fn sandbox_metrics(&self, context: &RequestContext, id: &str) -> Result<Option<Metric>> {
        let request = shim::SandboxMetricsRequest { sandbox_id: id.to_owned() };
        let task = self.sandbox(context, id)?;
        let answer = task.ask(|shim| async move { shim.sandbox().sandbox_metrics(request).await }).await?;
        Ok(answer.metrics)
    }

    /// Says whether the sandbox is there: shims have no call that changes one, and containerd asks none either.
    pub fn update_sandbox(&self, context: &RequestContext, id: &str) -> Result<()> {
        self.sandbox(context, id).map(drop)
    }

    /// Ends the sandbox and its shim, and forgets it. FailedPrecondition while it has containers, where the shim says so.
    pub async fn shutdown_sandbox(&self, context: &RequestContext, id: &str) -> Result<()> {
        let task = self.sandbox(context, id)?;
        let this = self.clone();
        outlive(async move { this.end_sandbox(&task).await }).await
    }

    async fn end_sandbox(&self, task: &Arc<Task>) -> Result<()> {
        match task.phase() {
            Phase::Live(live) => {
                if !task.claim_end() {
                    // It died, and is being cleaned up after, or another call ends it.
                    task.over().await;
                    if !task.leaves() {
                        return Ok(());
                    }
                } else {
                    let request = shim::ShutdownSandboxRequest { sandbox_id: task.id.clone() };
                    match live.client.sandbox().shutdown_sandbox(request).await {
                        // Its connection may end before its answer comes.
                        Ok(_) => {}
                        Err(error) if matches!(error.code, Code::Closed | Code::NotFound) => {}
                        Err(error) => {
                            task.disclaim_end();
                            return Err(from_shim(error));
                        }
                    }
                    if !self.end_shim(task, &live).await
                        && let Err(error) = self.run_delete(task).await
                    {
                        task.disclaim_end();
                        return Err(error);
                    }
                }
            }
            Phase::Unreachable(why) => return Err(task.unreachable(&why)),
            Phase::Dead { clean, .. } => {
                if !clean {
                    self.run_delete(task).await?;
                }
            }
            Phase::Creating | Phase::Gone => return Err(missing(&task.id)),
        }
        let exit = Exit::of(0, 0, Some(SystemTime::now().into()));
        sys::failpoint!("sandbox.end.shim-ended");
        self.announce_end(task, exit).await;
        sys::failpoint!("sandbox.end.announced");
        self.remove_bundle(task).await;
        sys::failpoint!("sandbox.end.removed");
        self.forget(task);
        Ok(())
    }

    /// Tells the end of a sandbox when it comes.
    async fn await_end(self, task: Arc<Task>) {
        if let Ok(exit) = wait(&task).await {
            self.announce_end(&task, exit).await;
        }
    }

    /// Tells the end of a sandbox, unless that has been done.
    pub(super) async fn announce_end(&self, task: &Arc<Task>, exit: Exit) {
        let bundle = task.bundle.clone();
        match blocking(move || bundle.note_exited()).await {
            Ok(true) => {}
            Ok(false) => return,
            // Rather twice than never.
            Err(error) => tracing::warn!(%error, id = task.id, "that a sandbox ended was not noted"),
        }
        let event = SandboxExit { sandbox_id: task.id.clone(), exit_status: exit.status, exited_at: exit.at };
        self.events.publish(&task.namespace, "/sandboxes/exit", &event);
    }

    /// After a restart: the pid of the sandbox, if there is one in this shim; its end is waited for again.
    pub(super) async fn sandbox_restored(&self, task: &Arc<Task>, live: &Live) -> Result<u32, ShimError> {
        let request = shim::SandboxStatusRequest { sandbox_id: task.id.clone(), verbose: false };
        let status = live.client.sandbox().sandbox_status(request).await?;
        let exit = status.exited_at.map(|at| Exit::of(status.pid, 0, Some(at)));
        match exit {
            Some(exit) => self.announce_end(task, exit).await,
            None if status.state == READY => drop(tokio::spawn(self.clone().await_end(task.clone()))),
            None => {}
        }
        Ok(status.pid)
    }

    /// The sandbox that a container names, if it has a shim.
    pub(super) fn sandbox_to_join(&self, task: &Task, container: &Container) -> Option<Arc<Task>> {
        let key = (Of::Sandbox, task.namespace.clone(), container.sandbox.clone());
        self.tasks.lock().get(&key).filter(|sandbox| sandbox.live().is_some()).cloned()
    }

    /// Reaches the shim of a sandbox for one of its containers.
    pub(super) async fn join(&self, task: &Arc<Task>, sandbox: &Task) -> Result<Live> {
        let answer = sandbox.bundle.shim_address()?;
        task.note_address(&answer.address);
        let live = match Live::connect(&answer, &task.namespace).await {
            Ok(live) => live,
            Err(Connect::Dead(error) | Connect::Failed(error)) => {
                return Err(error.context(format!("join sandbox {}", sandbox.id)));
            }
        };
        let (bundle, id) = (task.bundle.clone(), sandbox.id.clone());
        blocking(move || {
            bundle.note_sandbox(&id)?;
            bundle.note_shim(&answer)
        })
        .await?;
        Ok(live)
    }

    fn sandbox(&self, context: &RequestContext, id: &str) -> Result<Arc<Task>> {
        let namespace: &Namespace = context.namespace()?;
        let task = self.tasks.lock().get(&(Of::Sandbox, namespace.clone(), id.to_owned())).cloned();
        task.filter(|task| !matches!(task.phase(), Phase::Creating)).ok_or_else(|| missing(id))
    }
}

async fn wait(task: &Task) -> Result<Exit> {
    loop {
        match task.phase() {
            Phase::Live(live) => {
                let request = shim::WaitSandboxRequest { sandbox_id: task.id.clone() };
                match live.client.sandbox().wait_sandbox(request).await {
                    Ok(answer) => return Ok(Exit::of(0, answer.exit_status, answer.exited_at)),
                    Err(error) if error.code != Code::Closed => return Err(from_shim(error)),
                    Err(_) => match task.died().await {
                        Err(Error::Unavailable(_)) => {}
                        settled => return settled,
                    },
                }
            }
            Phase::Unreachable(_) => task.reached().await,
            Phase::Dead { exit, .. } => return Ok(exit),
            Phase::Creating | Phase::Gone => return Err(missing(&task.id)),
        }
    }
}

fn missing(id: &str) -> Error {
    Error::not_found(format!("sandbox {id:?} has no shim; create it first"))
}
