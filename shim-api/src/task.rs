//! The task service of a shim: client, server trait and the table that binds both to the wire.
//!
//! Versions 2 and 3 have the same methods and the same messages under two names, so that one set of types
//! (version 3's) serves both; a server offers both names.

use std::time::Duration;

use crate::bootstrap::Answer;
use crate::sandbox::SandboxClient;
use crate::service::define_service;
use crate::transport::Connection;
use crate::{Error, Result};

pub use proto::containerd::task::v3::{
    CheckpointTaskRequest, CloseIoRequest, ConnectRequest, ConnectResponse, CreateTaskRequest,
    CreateTaskResponse, DeleteRequest, DeleteResponse, ExecProcessRequest, KillRequest, PauseRequest,
    PidsRequest, PidsResponse, ResizePtyRequest, ResumeRequest, ShutdownRequest, StartRequest, StartResponse,
    StateRequest, StateResponse, StatsRequest, StatsResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};

/// Names of the service on the wire, version 2 and version 3.
pub const SERVICE_NAMES: [&str; 2] = ["containerd.task.v2.Task", "containerd.task.v3.Task"];

/// How long a call other than wait may take unless [`TaskClient::with_deadline`] says otherwise.
pub const DEFAULT_DEADLINE: Duration = Duration::from_secs(120);

/// A connection to one shim's task service; clones share it.
#[derive(Clone)]
pub struct TaskClient {
    connection: Connection,
    service: &'static str,
    deadline: Duration,
}

impl TaskClient {
    /// Connects to the shim at `address` (`unix:///path`), speaking version 2 or 3 of the service.
    ///
    /// # Errors
    /// InvalidArgument for another version or an unusable address, else those of [`Connection::connect`].
    pub async fn connect(address: &str, version: u32) -> Result<Self> {
        let service = Self::service_name(version)?;
        Ok(Self { connection: Connection::connect(address).await?, service, deadline: DEFAULT_DEADLINE })
    }

    /// Connects to where a shim's answer says, by the protocol that it names.
    ///
    /// # Errors
    /// As [`TaskClient::connect`].
    pub async fn reach(answer: &Answer) -> Result<Self> {
        let connection = match answer.protocol.as_str() {
            "grpc" => Connection::connect_grpc(&answer.address).await?,
            _ => Connection::connect(&answer.address).await?,
        };
        Self::over(connection, answer.version)
    }

    /// Uses a connection that is there already.
    ///
    /// # Errors
    /// InvalidArgument for a version other than 2 and 3.
    pub fn over(connection: Connection, version: u32) -> Result<Self> {
        Ok(Self { connection, service: Self::service_name(version)?, deadline: DEFAULT_DEADLINE })
    }

    fn service_name(version: u32) -> Result<&'static str> {
        match version {
            2 => Ok(SERVICE_NAMES[0]),
            3 => Ok(SERVICE_NAMES[1]),
            other => {
                Err(Error::invalid_argument(format!("task API version {other} is not known: 2 and 3 are")))
            }
        }
    }

    /// The same client, whose calls carry this namespace in their metadata.
    #[must_use]
    pub fn with_namespace(mut self, namespace: &str) -> Self {
        self.connection = self.connection.with_namespace(namespace);
        self
    }

    /// The same client with another limit for every call but wait.
    #[must_use]
    pub fn with_deadline(mut self, deadline: Duration) -> Self {
        self.deadline = deadline;
        self
    }

    /// The sandbox service at the other end of the same connection, where a shim offers it.
    #[must_use]
    pub fn sandbox(&self) -> SandboxClient {
        SandboxClient::over(self.connection.clone(), self.deadline)
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.connection.is_closed()
    }

    /// Resolves when the connection has ended, as it does when the shim dies.
    pub async fn closed(&self) {
        self.connection.closed().await;
    }
}

define_service! {
    /// What a shim does for its engine. Errors travel as they are; see the table of codes in [`crate::Code`].
    trait TaskService, client TaskClient, names SERVICE_NAMES;

    /// What a process is, and how it ended.
    state "State" StateRequest StateResponse, limited Finish;
    /// Makes a container with its init process, which waits for start.
    create "Create" CreateTaskRequest CreateTaskResponse, limited Finish;
    /// Starts the init process, or an exec added before.
    start "Start" StartRequest StartResponse, limited Finish;
    /// Removes a stopped process, with the container when it is the init; tells how it ended.
    delete "Delete" DeleteRequest DeleteResponse, limited Finish;
    /// All processes of a container.
    pids "Pids" PidsRequest PidsResponse, limited Finish;
    /// Freezes a container.
    pause "Pause" PauseRequest (), limited Finish;
    /// Thaws a container.
    resume "Resume" ResumeRequest (), limited Finish;
    /// Writes a container's state to a folder.
    checkpoint "Checkpoint" CheckpointTaskRequest (), limited Finish;
    /// Sends a signal to one process, or to all of a container.
    kill "Kill" KillRequest (), limited Finish;
    /// Adds a process to a container; start runs it.
    exec "Exec" ExecProcessRequest (), limited Finish;
    /// Sets the size of a process's terminal.
    resize_pty "ResizePty" ResizePtyRequest (), limited Finish;
    /// Lets a process see the end of its standard input.
    close_io "CloseIO" CloseIoRequest (), limited Finish;
    /// Changes a container's resource limits.
    update "Update" UpdateTaskRequest (), limited Finish;
    /// Answers when a process has exited.
    wait "Wait" WaitRequest WaitResponse, unlimited Drop;
    /// Resource use of a container.
    stats "Stats" StatsRequest StatsResponse, limited Finish;
    /// Who the shim is.
    connect_shim "Connect" ConnectRequest ConnectResponse, limited Finish;
    /// Ends the shim when it has no container left, or at once when told so.
    shutdown "Shutdown" ShutdownRequest (), limited Finish;
}
