//! Following a process to its end: signals and window sizes go to it, its exit code comes back.

use std::process::ExitCode;

use proto::containerd::services::tasks::v1::{
    CloseIoRequest, DeleteProcessRequest, DeleteTaskRequest, KillRequest, ResizePtyRequest, WaitRequest,
    WaitResponse,
};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinHandle;
use tonic::{Code, Response, Status};

use crate::client::{Client, Failure, Tried};
use crate::signals::Received;
use crate::stdio::{Copies, Terminal};

/// A process of a task: the container's first one, or an exec.
#[derive(Clone, Debug)]
pub(crate) struct Process {
    client: Client,
    container: String,
    /// Empty for the first process.
    exec: String,
}

/// A process's end, to be awaited. Begun before the start, so that no exit is missed.
pub(crate) struct Waiting(JoinHandle<Result<Response<WaitResponse>, Status>>);

impl Process {
    /// The first process of a container's task.
    pub(crate) fn init(client: &Client, container: &str) -> Process {
        Process { client: client.clone(), container: container.to_owned(), exec: String::new() }
    }

    /// An exec.
    pub(crate) fn exec(client: &Client, container: &str, exec: &str) -> Process {
        Process { exec: exec.to_owned(), ..Process::init(client, container) }
    }

    fn name(&self) -> String {
        match self.exec.is_empty() {
            true => format!("task {}", self.container),
            false => format!("exec {} in {}", self.exec, self.container),
        }
    }

    /// Begins to wait.
    pub(crate) fn wait(&self) -> Waiting {
        let mut tasks = self.client.tasks();
        let request = WaitRequest { container_id: self.container.clone(), exec_id: self.exec.clone() };
        let trace = shim_api::trace::current();
        Waiting(tokio::spawn(shim_api::trace::carry(trace, async move { tasks.wait(request).await })))
    }

    /// Sends a signal.
    pub(crate) async fn kill(&self, signal: u32, all: bool) -> anyhow::Result<()> {
        let request =
            KillRequest { container_id: self.container.clone(), exec_id: self.exec.clone(), signal, all };
        self.client.tasks().kill(request).await.tried(|| format!("signal {}", self.name()))?;
        Ok(())
    }

    /// Deletes the process and returns its exit code.
    pub(crate) async fn delete(&self) -> anyhow::Result<u32> {
        let mut tasks = self.client.tasks();
        let container_id = self.container.clone();
        let answer = match self.exec.is_empty() {
            true => tasks.delete(DeleteTaskRequest { container_id }).await,
            false => {
                tasks.delete_process(DeleteProcessRequest { container_id, exec_id: self.exec.clone() }).await
            }
        };
        Ok(answer.tried(|| format!("delete {}", self.name()))?.exit_status)
    }

    /// Kills and deletes, in whatever state it is; one that is gone is fine.
    pub(crate) async fn delete_by_force(&self) -> anyhow::Result<Option<u32>> {
        let waiting = self.wait();
        match self.kill(9, self.exec.is_empty()).await {
            Ok(()) => {
                // A task that was created and never started has an exit too; a lost one has none.
                let _ = tokio::time::timeout(std::time::Duration::from_secs(10), waiting.0).await;
            }
            Err(_) => waiting.0.abort(),
        }
        match self.delete().await {
            Ok(code) => Ok(Some(code)),
            Err(error) if crate::client::code_of(&error) == Some(Code::NotFound) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn resize(&self, (width, height): (u32, u32)) {
        let request = ResizePtyRequest {
            container_id: self.container.clone(),
            exec_id: self.exec.clone(),
            width,
            height,
        };
        // The process may just have gone.
        let _ = self.client.tasks().resize_pty(request).await;
    }

    /// Passes ctr's window size and its changes on. The task ends with the returned guard.
    pub(crate) async fn follow_window(&self) -> anyhow::Result<AbortOnDrop> {
        let mut changes = signal(SignalKind::window_change())?;
        if let Some(size) = Terminal::size() {
            self.resize(size).await;
        }
        let process = self.clone();
        Ok(AbortOnDrop(tokio::spawn(async move {
            while changes.recv().await.is_some() {
                if let Some(size) = Terminal::size() {
                    process.resize(size).await;
                }
            }
        })))
    }

    /// Tells the engine that no more input comes, once `copies` has passed on all there was.
    pub(crate) fn close_input_after(&self, copies: &Copies) -> AbortOnDrop {
        let closed = copies.input_closed();
        let process = self.clone();
        AbortOnDrop(tokio::spawn(async move {
            closed.notified().await;
            let request = CloseIoRequest {
                container_id: process.container.clone(),
                exec_id: process.exec.clone(),
                stdin: true,
            };
            // The process may just have gone.
            let _ = process.client.tasks().close_io(request).await;
        }))
    }

    /// Waits for the end, passing on the signals that ctr receives meanwhile.
    pub(crate) async fn follow(&self, waiting: Waiting, signals: &mut Received) -> anyhow::Result<u32> {
        let mut waiting = waiting.0;
        loop {
            tokio::select! {
                answer = &mut waiting => {
                    let answer = answer?.map_err(|status| Failure::new(format!("wait for {}", self.name()), status))?;
                    return Ok(answer.into_inner().exit_status);
                }
                signal = signals.next() => {
                    // One that comes as the process goes is of no use to it.
                    if let Err(error) = self.kill(signal, false).await
                        && crate::client::code_of(&error) != Some(Code::NotFound)
                    {
                        eprintln!("ctr: {error:#}");
                    }
                }
            }
        }
    }
}

/// A background task that ends with its owner.
pub(crate) struct AbortOnDrop(JoinHandle<()>);

impl AbortOnDrop {
    /// Begins the task.
    pub(crate) fn spawn(task: impl Future<Output = ()> + Send + 'static) -> AbortOnDrop {
        AbortOnDrop(tokio::spawn(task))
    }
}

impl Drop for AbortOnDrop {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// A process's exit status as ctr's own: the low eight bits are all a parent can see.
pub(crate) fn exit_code(status: u32) -> ExitCode {
    match u8::try_from(status) {
        Ok(code) => ExitCode::from(code),
        // What does not fit must not look like success.
        Err(_) => ExitCode::from(255),
    }
}
