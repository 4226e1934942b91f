//! One task: its phase, its shim, and asking it.

use std::collections::HashMap;
use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use parking_lot::Mutex;
use prost_types::Timestamp;
use proto::containerd::v1::types::{Process, Status};
use serde::{Deserialize, Serialize};
use shim_api::bootstrap::Answer;
use shim_api::task::{StateRequest, TaskClient, WaitRequest, WaitResponse};
use shim_api::{Code, Error as ShimError};
use tokio::sync::watch;

use super::bundle::{Bundle, Of};
use super::launch::ShimLog;
use super::no_task;
use crate::context::Namespace;
use crate::error::{Error, Result};

/// How long it may take until the clean-up after a dead shim is done; its parts have limits of their own, shorter.
const DIED_LIMIT: Duration = Duration::from_secs(60);

/// A task, in one of its phases.
pub(super) struct Task {
    pub(super) of: Of,
    pub(super) namespace: Namespace,
    pub(super) id: String,
    pub(super) bundle: Bundle,
    phase: watch::Sender<Phase>,
    /// Where the shim listens, from the moment it said so.
    address: Mutex<Option<Arc<str>>>,
    /// Somebody has taken it upon them to end the task.
    ending: watch::Sender<bool>,
    /// The init's pid, 0 while it is not known.
    pid: AtomicU32,
    /// The init's exit, once the shim has published it.
    exit: Mutex<Option<Exit>>,
    /// One wait at the shim for each process, however many clients wait.
    waits: Mutex<HashMap<String, Waiting>>,
    log: Mutex<Option<ShimLog>>,
}

/// A wait at the shim that is under way, for as long as its sender is there; then its answer.
type Waiting = watch::Receiver<Option<Result<WaitResponse, ShimError>>>;

/// Where a task is in its life; the diagram is in [`super`].
#[derive(Clone)]
pub(super) enum Phase {
    /// The name is taken.
    Creating,
    /// The shim knows the rest.
    Live(Live),
    /// The shim may be alive, and there is no way to it now; it is tried again until there is one, or the shim is gone.
    Unreachable(Arc<str>),
    /// The shim is dead. Whether the clean-up after it succeeded; a delete tries again.
    Dead { exit: Exit, clean: bool },
    /// No task any more.
    Gone,
}

/// A shim that was reached.
#[derive(Clone)]
pub(super) struct Live {
    pub(super) client: TaskClient,
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(from = "NotedExit", into = "NotedExit")]
pub struct Exit {
    /// Its pid, where that is known, else 0.
    pub pid: u32,
    /// The exit code, or 128 + the signal.
    pub status: u32,
    /// When.
    pub at: Option<Timestamp>,
}

/// An exit as it is noted in a bundle.
#[derive(Serialize, Deserialize)]
struct NotedExit {
    pid: u32,
    status: u32,
    seconds: i64,
    nanos: i32,
}

impl From<NotedExit> for Exit {
    fn from(noted: NotedExit) -> Self {
        let at = Timestamp { seconds: noted.seconds, nanos: noted.nanos };
        Exit { pid: noted.pid, status: noted.status, at: Some(at) }
    }
}

impl From<Exit> for NotedExit {
    fn from(exit: Exit) -> Self {
        let at = exit.at.unwrap_or_default();
        NotedExit { pid: exit.pid, status: exit.status, seconds: at.seconds, nanos: at.nanos }
    }
}

/// Why a shim was not reached.
pub(super) enum Connect {
    /// Nobody listens there: the shim is dead.
    Dead(Error),
    /// It may be alive.
    Failed(Error),
}

impl Exit {
    pub(super) fn of(pid: u32, status: u32, at: Option<Timestamp>) -> Self {
        Exit { pid, status, at }
    }
}

impl Live {
    /// Reaches a shim where its answer says.
    pub(super) async fn connect(answer: &Answer, namespace: &Namespace) -> Result<Self, Connect> {
        let client = TaskClient::reach(answer).await.map_err(|error| match error.code {
            Code::Refused => Connect::Dead(from_shim(error)),
            _ => Connect::Failed(from_shim(error)),
        })?;
        Ok(Live { client: client.with_namespace(namespace.as_str()) })
    }
}

impl Task {
    pub(super) fn new(of: Of, namespace: Namespace, id: String, bundle: Bundle) -> Arc<Self> {
        Arc::new(Task {
            of,
            namespace,
            id,
            bundle,
            phase: watch::Sender::new(Phase::Creating),
            address: Mutex::new(None),
            ending: watch::Sender::new(false),
            pid: AtomicU32::new(0),
            exit: Mutex::new(None),
            waits: Mutex::default(),
            log: Mutex::new(None),
        })
    }

    pub(super) fn phase(&self) -> Phase {
        self.phase.borrow().clone()
    }

    pub(super) fn set(&self, phase: Phase) {
        self.phase.send_replace(phase);
    }

    /// Sets the way to the shim, or that there is none, unless the task has ended meanwhile.
    pub(super) fn set_reached(&self, reached: Phase) {
        self.phase.send_if_modified(|phase| {
            let goes_on = matches!(phase, Phase::Creating | Phase::Live(_) | Phase::Unreachable(_));
            if goes_on {
                *phase = reached;
            }
            goes_on
        });
    }

    /// Resolves when the task is no more, or dead.
    pub(super) async fn over(&self) {
        let mut phase = self.phase.subscribe();
        // The sender is this task's, so that it is there.
        let _ = phase.wait_for(|phase| matches!(phase, Phase::Dead { .. } | Phase::Gone)).await;
    }

    /// Resolves when the task is no longer unreachable.
    pub(super) async fn reached(&self) {
        let mut phase = self.phase.subscribe();
        let _ = phase.wait_for(|phase| !matches!(phase, Phase::Unreachable(_))).await;
    }

    pub(super) fn is_over(&self) -> bool {
        matches!(*self.phase.borrow(), Phase::Dead { .. } | Phase::Gone)
    }

    pub(super) fn note_address(&self, address: &str) {
        *self.address.lock() = Some(address.into());
    }

    pub(super) fn address(&self) -> Option<Arc<str>> {
        self.address.lock().clone()
    }

    pub(super) fn note_pid(&self, pid: u32) {
        self.pid.store(pid, Ordering::Release);
    }

    /// Resolves when nobody is ending this task: at once, or when who was has given that up.
    pub(super) async fn goes_on(&self) {
        let mut ending = self.ending.subscribe();
        // The sender is this task's, so that it is there.
        let _ = ending.wait_for(|ending| !ending).await;
    }

    pub(super) fn live(&self) -> Option<Live> {
        match &*self.phase.borrow() {
            Phase::Live(live) => Some(live.clone()),
            _ => None,
        }
    }

    /// Whether the caller is the first to end this task, and thus the one who does.
    pub(super) fn claim_end(&self) -> bool {
        self.ending.send_if_modified(|ending| !std::mem::replace(ending, true))
    }

    /// Gives up ending this task, which its shim has refused.
    pub(super) fn disclaim_end(&self) {
        self.ending.send_replace(false);
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

    /// Remembers the exit that the shim has published, if it is the init's: an exec may have the container's name, and
    /// a late event may be of an earlier task.
    pub(super) fn saw_exit(&self, exit: Exit) {
        let pid = self.pid.load(Ordering::Acquire);
        if pid == 0 || exit.pid == pid {
            *self.exit.lock() = Some(exit);
        }
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
                Err(error) if error.code == Code::Closed => Err(self.interrupted(&error).await),
                answer => answer.map_err(from_shim),
            },
            Phase::Unreachable(why) => Err(self.unreachable(&why)),
            Phase::Dead { .. } => Err(self.without_shim()),
            Phase::Creating | Phase::Gone => Err(no_task(&self.id)),
        }
    }

    fn without_shim(&self) -> Error {
        Error::not_found(format!(
            "the shim of task {:?} is gone, and the container with it; delete the task and create it again",
            self.id
        ))
    }

    pub(super) fn unreachable(&self, why: &str) -> Error {
        Error::unavailable(format!(
            "the shim of task {:?} cannot be reached: {why}; it is tried again",
            self.id
        ))
    }

    /// The answer to a call whose connection ended: what became of the shim.
    async fn interrupted(&self, error: &ShimError) -> Error {
        match self.died().await {
            Ok(_) => self.without_shim(),
            Err(Error::Unavailable(_)) => Error::unavailable(format!(
                "{}; whether task {:?} was changed is not known, look before you try again",
                error.message, self.id
            )),
            Err(error) => error,
        }
    }

    /// Asks the shim for a process's end, once for all who wait. None when the connection ended first.
    pub(super) async fn exit_of(&self, live: &Live, exec_id: &str) -> Result<Option<Exit>> {
        let mut answer = {
            let mut waits = self.waits.lock();
            let running = waits.get(exec_id).filter(|wait| wait.has_changed().is_ok());
            match running {
                Some(wait) => wait.clone(),
                None => {
                    let (sender, wait) = watch::channel(None);
                    let request = WaitRequest { id: self.id.clone(), exec_id: exec_id.to_owned() };
                    let client = live.client.clone();
                    // Ends with the process, or with the connection. Its answer is not kept: an exec's name may be
                    // used again.
                    tokio::spawn(async move {
                        let answer = client.wait(request).await;
                        sender.send_replace(Some(answer));
                    });
                    waits.retain(|_, wait| wait.has_changed().is_ok());
                    waits.insert(exec_id.to_owned(), wait.clone());
                    wait
                }
            }
        };
        let answer = match answer.wait_for(Option::is_some).await {
            Ok(answer) => answer.clone(),
            Err(_) => return Err(Error::internal("a wait for a process ended without an answer")),
        };
        match answer {
            Some(Ok(answer)) => Ok(Some(Exit::of(0, answer.exit_status, answer.exited_at))),
            Some(Err(error)) if error.code != Code::Closed => Err(from_shim(error)),
            _ => Ok(None),
        }
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
            Phase::Unreachable(why) => return Err(self.unreachable(&why)),
            Phase::Dead { exit, .. } if exec_id.is_empty() => return Ok(stopped(exit)),
            Phase::Dead { .. } => return Err(no_exec()),
            Phase::Creating | Phase::Gone => return Err(no_task(&self.id)),
        };
        let request = StateRequest { id: self.id.clone(), exec_id: exec_id.to_owned() };
        let asked = async {
            match live.client.state(request).await {
                Err(error) if error.code == Code::Closed => match self.died().await {
                    Ok(exit) => Err(Ok(exit)),
                    Err(error) => Err(Err(error)),
                },
                answer => answer.map_err(|error| Err(from_shim(error))),
            }
        };
        match tokio::time::timeout(limit, asked).await {
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
            Ok(Err(Ok(exit))) if exec_id.is_empty() => Ok(stopped(exit)),
            Ok(Err(Ok(_))) => Err(no_exec()),
            Ok(Err(Err(error))) => Err(error),
            Err(_) => Err(Error::deadline_exceeded(format!(
                "the shim of task {:?} did not answer within {limit:?}; is it stopped, or the machine overloaded?",
                self.id
            ))),
        }
    }

    /// After a connection ended: waits until it is known what became of the shim. How the task ended if the shim is dead
    /// and cleaned up after; Unavailable when it is alive after all.
    pub(super) async fn died(&self) -> Result<Exit> {
        let mut phase = self.phase.subscribe();
        let settled = phase.wait_for(|phase| match phase {
            Phase::Live(live) => !live.client.is_closed(),
            _ => true,
        });
        match tokio::time::timeout(DIED_LIMIT, settled).await {
            Ok(Ok(phase)) => match &*phase {
                Phase::Dead { exit, .. } => Ok(*exit),
                Phase::Live(_) => Err(Error::unavailable(format!(
                    "the connection to the shim of task {:?} was lost and made anew",
                    self.id
                ))),
                Phase::Unreachable(why) => Err(self.unreachable(why)),
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
pub(crate) fn from_shim(error: ShimError) -> Error {
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
        Code::Unavailable | Code::Closed | Code::Refused => Error::Unavailable(message),
        Code::DataLoss => Error::DataLoss(message),
        Code::Unknown => Error::Unknown(message),
    }
}
