//! One task: its phase, its shim, and asking it.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use prost_types::Timestamp;
use proto::containerd::v1::types::{Process, Status};
use shim_api::bootstrap::Answer;
use shim_api::task::{StateRequest, TaskClient};
use shim_api::{Code, Error as ShimError};
use tokio::sync::watch;

use super::bundle::Bundle;
use super::launch::ShimLog;
use super::no_task;
use crate::context::Namespace;
use crate::error::{Error, Result};

/// How long it may take until the clean-up after a dead shim is done; its parts have limits of their own, shorter.
const DIED_LIMIT: Duration = Duration::from_secs(60);

/// A task, in one of its phases.
pub(super) struct Task {
    pub(super) namespace: Namespace,
    pub(super) id: String,
    pub(super) bundle: Bundle,
    phase: watch::Sender<Phase>,
    /// Somebody has taken it upon them to end the task.
    ending: AtomicBool,
    /// The init's exit, once the shim has published it.
    exit: Mutex<Option<Exit>>,
    log: Mutex<Option<ShimLog>>,
}

/// Where a task is in its life; the diagram is in [`super`].
#[derive(Clone)]
pub(super) enum Phase {
    /// The name is taken.
    Creating,
    /// The shim knows the rest.
    Live(Live),
    /// The shim is dead. Whether the clean-up after it succeeded; a delete tries again.
    Dead { exit: Exit, clean: bool },
    /// No task any more.
    Gone,
}

/// A shim that was reached.
#[derive(Clone)]
pub(super) struct Live {
    pub(super) client: TaskClient,
    pub(super) address: Arc<str>,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Exit {
    /// Its pid, where that is known, else 0.
    pub pid: u32,
    /// The exit code, or 128 + the signal.
    pub status: u32,
    /// When.
    pub at: Option<Timestamp>,
}

impl Exit {
    pub(super) fn of(pid: u32, status: u32, at: Option<Timestamp>) -> Self {
        Exit { pid, status, at }
    }
}

impl Live {
    /// Reaches a shim where its answer says.
    pub(super) async fn connect(answer: &Answer, namespace: &Namespace) -> Result<Self> {
        if answer.protocol != "ttrpc" {
            return Err(Error::unimplemented(format!(
                "the shim at {} speaks {}; shims are driven over ttrpc",
                answer.address, answer.protocol
            )));
        }
        let client = TaskClient::connect(&answer.address, answer.version).await.map_err(from_shim)?;
        Ok(Live {
            client: client.with_namespace(namespace.as_str()),
            address: answer.address.as_str().into(),
        })
    }
}

impl Task {
    pub(super) fn new(namespace: Namespace, id: String, bundle: Bundle) -> Arc<Self> {
        Arc::new(Task {
            namespace,
            id,
            bundle,
            phase: watch::Sender::new(Phase::Creating),
            ending: AtomicBool::new(false),
            exit: Mutex::new(None),
            log: Mutex::new(None),
        })
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    pub(super) fn set(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    pub(super) fn live(&self) -> Option<Live> {
        match &*self.phase.borrow() {
            Phase::Live(live) => Some(live.clone()),
            _ => None,
        }
    }

    /// Whether the caller is the first to end this task, and thus the one who does.
    pub(super) fn claim_end(&self) -> bool {
        !self.ending.swap(true, Ordering::AcqRel)
    }

    /// Whether the caller is the first to take the task away. Its name stays taken until it is forgotten.
    pub(super) fn leaves(&self) -> bool {
        self.phase.send_if_modified(|phase| {
            let is_first = !matches!(phase, Phase::Gone);
            *phase = Phase::Gone;
            is_first
        })
    }

    /// Keeps the reader of the shim's log as long as the task.
    pub(super) fn follows(&self, log: ShimLog) {
        *self.log.lock() = Some(log);
    }

    pub(super) fn saw_exit(&self, exit: Exit) {
        *self.exit.lock() = Some(exit);
    }

    /// The init's exit, if the shim has published it.
    pub(super) fn seen_exit(&self) -> Option<Exit> {
        *self.exit.lock()
    }

    /// Calls the shim. When it dies over the call, the answer is that of a task without one.
    pub(super) async fn ask<T, F>(&self, call: impl FnOnce(TaskClient) -> F) -> Result<T>
    where
        F: Future<Output = Result<T, ShimError>>,
    {
        match self.phase() {
            Phase::Live(live) => match call(live.client).await {
                Err(error) if error.code == Code::Closed => Err(self.without_shim()),
                answer => answer.map_err(from_shim),
            },
            Phase::Dead { .. } => Err(self.without_shim()),
            Phase::Creating | Phase::Gone => Err(no_task(&self.id)),
        }
    }

    fn without_shim(&self) -> Error {
        Error::failed_precondition(format!(
            "the shim of task {:?} is gone, and the container with it; delete the task and create it again",
            self.id
        ))
    }

    /// What a process is now, asked within a limit.
    pub(super) async fn process(&self, exec_id: &str, limit: Duration) -> Result<Process> {
        let stopped = |exit: Exit| Process {
            id: self.id.clone(),
            pid: exit.pid,
            status: Status::Stopped.into(),
            exit_status: exit.status,
            exited_at: exit.at,
            ..Default::default()
        };
        let no_exec = || Error::not_found(format!("task {:?} has no exec {exec_id:?}", self.id));
        let live = match self.phase() {
            Phase::Live(live) => live,
            Phase::Dead { exit, .. } if exec_id.is_empty() => return Ok(stopped(exit)),
            Phase::Dead { .. } => return Err(no_exec()),
            Phase::Creating | Phase::Gone => return Err(no_task(&self.id)),
        };
        let request = StateRequest { id: self.id.clone(), exec_id: exec_id.to_owned() };
        match tokio::time::timeout(limit, live.client.state(request)).await {
            Ok(Ok(state)) => Ok(Process {
                // Which of the two a shim says in `id` differs between shims.
                container_id: String::new(),
                id: if exec_id.is_empty() { self.id.clone() } else { exec_id.to_owned() },
                pid: state.pid,
                status: state.status,
                stdin: state.stdin,
                stdout: state.stdout,
                stderr: state.stderr,
                terminal: state.terminal,
                exit_status: state.exit_status,
                exited_at: state.exited_at,
            }),
            Ok(Err(error)) if error.code == Code::Closed => match self.died().await? {
                exit if exec_id.is_empty() => Ok(stopped(exit)),
                _ => Err(no_exec()),
            },
            Ok(Err(error)) => Err(from_shim(error)),
            Err(_) => Err(Error::deadline_exceeded(format!(
                "the shim of task {:?} did not answer within {limit:?}; is it stopped, or the machine overloaded?",
                self.id
            ))),
        }
    }

    /// Waits until the clean-up after the shim's death is done; how the task ended.
    pub(super) async fn died(&self) -> Result<Exit> {
        let mut phase = self.phase.subscribe();
        let settled = phase.wait_for(|phase| !matches!(phase, Phase::Live(_)));
        match tokio::time::timeout(DIED_LIMIT, settled).await {
            Ok(Ok(phase)) => match &*phase {
                Phase::Dead { exit, .. } => Ok(*exit),
                _ => Err(no_task(&self.id)),
            },
            Ok(Err(_)) => Err(no_task(&self.id)),
            Err(_) => Err(Error::unavailable(format!(
                "the shim of task {:?} is gone and the clean-up is under way; try again",
                self.id
            ))),
        }
    }
}

/// A shim's status in the engine's classes, in the shim's words.
pub(super) fn from_shim(error: ShimError) -> Error {
    let message = error.message;
    match error.code {
        Code::Cancelled => Error::Cancelled(message),
        Code::InvalidArgument => Error::InvalidArgument(message),
        Code::DeadlineExceeded => Error::DeadlineExceeded(message),
        Code::NotFound => Error::NotFound(message),
        Code::AlreadyExists => Error::AlreadyExists(message),
        Code::PermissionDenied | Code::Unauthenticated => Error::PermissionDenied(message),
        Code::ResourceExhausted => Error::ResourceExhausted(message),
        Code::FailedPrecondition => Error::FailedPrecondition(message),
        Code::Aborted => Error::Aborted(message),
        Code::OutOfRange => Error::OutOfRange(message),
        Code::Unimplemented => Error::Unimplemented(message),
        Code::Internal => Error::Internal(message),
        Code::Unavailable | Code::Closed => Error::Unavailable(message),
        Code::DataLoss => Error::DataLoss(message),
        Code::Unknown => Error::Unknown(message),
    }
}
