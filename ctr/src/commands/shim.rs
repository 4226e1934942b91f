//! `ctr shim …`: a shim's task service, without the engine.
//!
//! For a look at a shim whose engine is down or says something else. What is changed here the engine learns by the shim's events alone.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, bail};
use clap::{Args, Subcommand};
use oci::runtime::Process;
use oci::spec::merge_env;
use shim_api::Code;
use shim_api::task::{
    CloseIoRequest, ConnectRequest, DeleteRequest, ExecProcessRequest, ResizePtyRequest, ShutdownRequest,
    StartRequest, StateRequest, TaskClient, WaitRequest,
};

use crate::process::{AbortOnDrop, exit_code};
use crate::stdio::{Addresses, Streams, Terminal};
use crate::{json, output};

/// Where shims put their sockets.
const SOCKETS: &str = "/run/containerd/s";

/// Talk to a shim directly, without the engine
#[derive(Debug, Args)]
pub(crate) struct Shim {
    /// The shim's id: that of its first container
    #[arg(long, required_unless_present = "shim_address")]
    id: Option<String>,
    /// The shim's socket, unix:///path [default: told by --id, --namespace and --address]
    #[arg(long, value_name = "ADDRESS")]
    shim_address: Option<String>,
    /// Version of the task service [default: 3, else 2]
    #[arg(long, global = true, value_name = "2|3", value_parser = clap::value_parser!(u32).range(2..=3))]
    api_version: Option<u32>,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Delete(Delete),
    Exec(Exec),
    Start(Start),
    State(State),
    /// End the shim if it has no container left
    Shutdown,
}

/// Which process of which container.
#[derive(Debug, Args)]
struct Which {
    /// The exec instead of the container's first process
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    exec_id: String,
    /// The container [default: --id]
    #[arg(value_name = "CONTAINER")]
    container: Option<String>,
}

/// Delete a process that has ended
#[derive(Debug, Args)]
struct Delete {
    #[command(flatten)]
    which: Which,
}

/// Start a process that was created
#[derive(Debug, Args)]
struct Start {
    #[command(flatten)]
    which: Which,
}

/// Show the state of a process, as JSON
#[derive(Debug, Args)]
struct State {
    /// The container [default: --id]
    #[arg(short, long, value_name = "CONTAINER")]
    task_id: Option<String>,
    #[command(flatten)]
    which: Which,
}

/// Run another process in a container
#[derive(Debug, Args)]
struct Exec {
    /// The container [default: --id]
    #[arg(long, value_name = "CONTAINER")]
    task_id: Option<String>,
    /// Fifo for the process's input
    #[arg(long, value_name = "FIFO", default_value = "", hide_default_value = true)]
    stdin: String,
    /// Fifo, or URI, for its output
    #[arg(long, value_name = "FIFO", default_value = "", hide_default_value = true)]
    stdout: String,
    /// Fifo, or URI, for its errors
    #[arg(long, value_name = "FIFO", default_value = "", hide_default_value = true)]
    stderr: String,
    /// Give the process a terminal
    #[arg(short, long)]
    tty: bool,
    /// Copy between the fifos and here until the process has ended, and exit with its code
    #[arg(short, long)]
    attach: bool,
    /// Set an environment variable; a name alone unsets it
    #[arg(short, long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Working directory of the process
    #[arg(long, value_name = "PATH")]
    cwd: Option<String>,
    /// The process, as the part of that name in a runtime spec: a file
    #[arg(long, value_name = "FILE")]
    spec: PathBuf,
    /// Id for the process, unique in its container
    exec_id: String,
}

impl Shim {
    /// Asks no engine; `address` and `namespace` are what the shim was started with.
    pub(crate) async fn run(self, address: &str, namespace: &str) -> anyhow::Result<ExitCode> {
        let client = self.connect(address, namespace).await?;
        let own = self.id;
        let id = |named: Option<String>| {
            named.or_else(|| own.clone()).context("which container? name it, or the shim by --id")
        };
        match self.command {
            Command::Delete(Delete { which }) => {
                let request = DeleteRequest { id: id(which.container)?, exec_id: which.exec_id };
                let answer = client.delete(request).await.context("the shim cannot delete the process")?;
                output::line(format!("container deleted and returned exit status {}", answer.exit_status))?;
            }
            Command::Start(Start { which }) => {
                let request = StartRequest { id: id(which.container)?, exec_id: which.exec_id };
                client.start(request).await.context("the shim cannot start the process")?;
            }
            Command::State(State { task_id, which }) => {
                let id = id(task_id.or(which.container))?;
                let request = StateRequest { id, exec_id: which.exec_id };
                let state = client.state(request).await.context("the shim cannot tell the state")?;
                json::print(&json::of(&state))?;
            }
            Command::Shutdown => {
                let request = ShutdownRequest { id: own.unwrap_or_default(), now: false };
                match client.shutdown(request).await {
                    // It may be gone before its answer is through.
                    Ok(()) => {}
                    Err(error) if error.code == Code::Closed => {}
                    Err(error) => return Err(error).context("the shim cannot shut down"),
                }
            }
            Command::Exec(mut command) => {
                let id = id(command.task_id.take())?;
                return command.run(client, id).await;
            }
        }
        Ok(ExitCode::SUCCESS)
    }

    async fn connect(&self, address: &str, namespace: &str) -> anyhow::Result<TaskClient> {
        let socket = match (&self.shim_address, &self.id) {
            (Some(address), _) => address.clone(),
            (None, id) => {
                format!("unix://{SOCKETS}/{}", socket_name(address, namespace, id.as_deref().unwrap_or("")))
            }
        };
        let mut version = self.api_version.unwrap_or(3);
        loop {
            let client = TaskClient::connect(&socket, version).await.with_context(|| {
                format!("no shim of namespace {namespace} and engine {address}; does it run? --shim-address names another socket")
            })?;
            let client = client.with_namespace(namespace);
            let request = ConnectRequest { id: self.id.clone().unwrap_or_default() };
            match client.connect_shim(request).await {
                // Shims of containerd 1.x.
                Err(error)
                    if error.code == Code::Unimplemented && self.api_version.is_none() && version == 3 =>
                {
                    version = 2;
                }
                // What else it says is the command's own business.
                _ => return Ok(client),
            }
        }
    }
}

/// The file name of a shim's socket: every shim derives it so from the engine's socket, the namespace and its id.
fn socket_name(address: &str, namespace: &str, id: &str) -> String {
    let key = format!("{}/{namespace}/{id}", address.trim_end_matches('/'));
    oci::Digest::sha256_of(key.as_bytes()).hex().to_owned()
}

impl Exec {
    async fn run(self, shim: TaskClient, id: String) -> anyhow::Result<ExitCode> {
        let file = self.spec.display();
        let document = std::fs::read(&self.spec).with_context(|| format!("cannot read process {file}"))?;
        let mut process: Process = serde_json::from_slice(&document)
            .with_context(|| format!("{file} is not the process part of a runtime spec"))?;
        process.terminal = self.tty;
        process.env = merge_env(&process.env, &self.env);
        if let Some(cwd) = &self.cwd {
            process.cwd.clone_from(cwd);
        }
        let streams = [&self.stdin, &self.stdout, &self.stderr];
        if self.attach && streams.iter().all(|path| path.is_empty()) {
            bail!("--attach needs fifos: name them with --stdin, --stdout and --stderr");
        }
        let streams = match streams.iter().any(|path| sys::fifo::is_fifo(path.as_ref())) {
            true => Some(Streams::existing(Addresses {
                stdin: self.stdin.clone(),
                stdout: self.stdout.clone(),
                stderr: self.stderr.clone(),
                terminal: self.tty,
            })?),
            false => None,
        };
        let terminal = (self.tty && self.attach).then(Terminal::take).transpose()?;
        // Somebody must have the fifos open while the shim opens its own ends; see Streams::hold.
        let (ends, copies) = match (streams, self.attach) {
            (Some(streams), true) => (Vec::new(), Some(streams.copy()?)),
            (Some(streams), false) => (streams.hold()?, None),
            (None, _) => (Vec::new(), None),
        };
        let exec_id = self.exec_id;
        let request = ExecProcessRequest {
            id: id.clone(),
            exec_id: exec_id.clone(),
            terminal: self.tty,
            stdin: self.stdin,
            stdout: self.stdout,
            stderr: self.stderr,
            spec: Some(proto::any::wrap(proto::any::PROCESS, serde_json::to_vec(&process)?)),
        };
        shim.exec(request).await.with_context(|| format!("the shim cannot add exec {exec_id} to {id}"))?;
        let request = StartRequest { id: id.clone(), exec_id: exec_id.clone() };
        let started = match shim.start(request).await {
            Ok(started) => started,
            Err(error) => {
                // The first error is the one that tells something.
                let _ = shim.delete(DeleteRequest { id, exec_id: exec_id.clone() }).await;
                return Err(error).with_context(|| format!("the shim cannot start exec {exec_id}"));
            }
        };
        let running = format!("exec running with pid {}", started.pid);
        drop(ends);
        let Some(mut copies) = copies else {
            output::line(running)?;
            return Ok(ExitCode::SUCCESS);
        };
        // What goes to stdout is the process's.
        eprintln!("{running}");
        copies.feed()?;
        let (closed, closing) = (copies.input_closed(), shim.clone());
        let request = CloseIoRequest { id: id.clone(), exec_id: exec_id.clone(), stdin: true };
        let _input = AbortOnDrop::spawn(async move {
            closed.notified().await;
            // The process may just have gone.
            let _ = closing.close_io(request).await;
        });
        if let (Some(_), Some((width, height))) = (&terminal, Terminal::size()) {
            let request = ResizePtyRequest { id: id.clone(), exec_id: exec_id.clone(), width, height };
            shim.resize_pty(request).await.context("the shim cannot set the terminal's size")?;
        }
        let request = WaitRequest { id: id.clone(), exec_id: exec_id.clone() };
        let status = shim.wait(request).await.context("the shim cannot wait for the process")?.exit_status;
        let request = DeleteRequest { id, exec_id };
        shim.delete(request).await.context("the shim cannot delete the process")?;
        copies.finish().await;
        drop(terminal);
        Ok(exit_code(status))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sockets_are_where_shims_put_them() {
        // The same name as `printf /run/containerd/containerd.sock/default/c | sha256sum`.
        assert_eq!(
            socket_name("/run/containerd/containerd.sock", "default", "c"),
            "9cb583b155a36d5eb6ede9fb14dbf6eb7e8a23b3e803e95a337ba133e3043d85"
        );
    }
}
