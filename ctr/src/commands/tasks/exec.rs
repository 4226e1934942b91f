//! `ctr tasks exec`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use proto::containerd::services::tasks::v1::{ExecProcessRequest, StartRequest};

use crate::client::{Client, Tried};
use crate::process::{Process, exit_code};
use crate::signals::Received;
use crate::stdio::{Choice, Streams, Terminal};
use crate::{container, rootfs};

/// Run another process in a running container
///
/// ctr exits with the code of the process.
#[derive(Debug, Args)]
pub(crate) struct Exec {
    /// Id for the process, unique in its container
    #[arg(long, value_name = "ID")]
    exec_id: String,
    /// Working directory of the process
    #[arg(long, value_name = "PATH")]
    cwd: Option<String>,
    /// Set an environment variable; a name alone unsets it
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Give the process a terminal
    #[arg(short, long, conflicts_with = "log_uri")]
    tty: bool,
    /// Leave the process running and return
    #[arg(short, long)]
    detach: bool,
    /// Where to make the fifos for the process's streams [default: /run/containerd/fifo]
    #[arg(long, value_name = "FOLDER", conflicts_with = "log_uri")]
    fifo_dir: Option<PathBuf>,
    /// Send output to a file:///path or a binary:///path?key=value
    #[arg(long, value_name = "URI")]
    log_uri: Option<String>,
    /// User to run as
    #[arg(short, long, value_name = "NAME|UID[:GROUP|GID]")]
    user: Option<String>,
    #[arg(value_name = "CONTAINER")]
    id: String,
    /// Command and arguments
    #[arg(required = true, trailing_var_arg = true, allow_hyphen_values = true)]
    command: Vec<String>,
}

impl Exec {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<ExitCode> {
        let container = container::get(&client, &self.id).await?;
        let mut spec = container::spec_of(&container)?;
        if let Some(user) = self.user.clone() {
            let mounts = container::mounts(&client, &container).await?;
            let root = spec.root.clone().unwrap_or_default().path;
            let resolved = tokio::task::spawn_blocking(move || match mounts.is_empty() {
                true => rootfs::resolve_in_folder(root.as_ref(), &user),
                false => rootfs::resolve_in_mounts(mounts, &user),
            });
            spec.set_user(resolved.await??);
        }
        spec.set_env(&self.env)?;
        let process = spec.process_mut();
        process.terminal = self.tty;
        process.args.clone_from(&self.command);
        if let Some(cwd) = &self.cwd {
            process.cwd.clone_from(cwd);
        }
        let document = serde_json::to_vec(process).context("cannot encode the process")?;

        let mut signals = Received::listen()?;
        let choice = Choice {
            null: false,
            log_uri: self.log_uri.clone(),
            fifo_dir: self.fifo_dir.clone(),
            terminal: self.tty,
        };
        let streams = Streams::create(&self.exec_id, &choice)?;
        let terminal = (self.tty && !self.detach).then(Terminal::take).transpose()?;
        let addresses = streams.addresses();
        // Ends that somebody must hold while the shim opens its own; see Streams::hold.
        let (ends, streams, copies) = match self.detach {
            true => (streams.hold()?, Some(streams), None),
            false => (Vec::new(), None, Some(streams.copy()?)),
        };
        let request = ExecProcessRequest {
            container_id: self.id.clone(),
            exec_id: self.exec_id.clone(),
            stdin: addresses.stdin,
            stdout: addresses.stdout,
            stderr: addresses.stderr,
            terminal: self.tty,
            spec: Some(proto::any::wrap(proto::any::PROCESS, document)),
        };
        client.tasks().exec(request).await.tried(|| format!("add exec {} to {}", self.exec_id, self.id))?;
        let process = Process::exec(&client, &self.id, &self.exec_id);
        let ended = async {
            let Some(mut copies) = copies else {
                self.begin(&client).await?;
                if let Some(streams) = streams {
                    streams.keep();
                }
                drop(ends);
                return Ok(ExitCode::SUCCESS);
            };
            copies.feed()?;
            let _input = process.close_input_after(&copies);
            let waiting = process.wait();
            self.begin(&client).await?;
            let _window = match &terminal {
                Some(_) => Some(process.follow_window().await?),
                None => None,
            };
            process.follow(waiting, &mut signals).await?;
            let status = process.delete().await?;
            copies.finish().await;
            Ok(exit_code(status))
        }
        .await;
        drop(terminal);
        if ended.is_err() {
            // The first error is the one that tells something.
            let _ = process.delete_by_force().await;
        }
        ended
    }

    async fn begin(&self, client: &Client) -> anyhow::Result<()> {
        let request = StartRequest { container_id: self.id.clone(), exec_id: self.exec_id.clone() };
        client
            .tasks()
            .start(request)
            .await
            .tried(|| format!("start exec {} in {}", self.exec_id, self.id))?;
        Ok(())
    }
}
