//! `ctr run`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;

use crate::client::Client;
use crate::commands::tasks::start::{Started, start};
use crate::container::{self, SpecArgs};
use crate::stdio::Choice;

/// Run a container
///
/// Creates a container from an image and starts its task. In the foreground, signals, window size and
/// stdin go to the process, and ctr exits with its code.
#[derive(Debug, Args)]
#[command(
    override_usage = "ctr run [OPTIONS] IMAGE|ROOTFS ID [COMMAND] [ARG]...\n       ctr run [OPTIONS] --config FILE ID"
)]
pub(crate) struct Run {
    /// Remove the container when its process has ended
    #[arg(long, conflicts_with = "detach")]
    pub(crate) rm: bool,
    #[command(flatten)]
    pub(crate) task: TaskArgs,
    /// Write the generated runtime spec to a file
    #[arg(long, value_name = "FILE")]
    dump_config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) spec: SpecArgs,
}

/// Flags that `run` and `tasks start` share.
#[derive(Debug, Args)]
pub(crate) struct TaskArgs {
    /// Leave the container running and return
    #[arg(short, long)]
    pub(crate) detach: bool,
    /// Send all output to /dev/null
    #[arg(long, conflicts_with = "log_uri")]
    null_io: bool,
    /// Send output to a file:///path or a binary:///path?key=value
    #[arg(long, value_name = "URI")]
    log_uri: Option<String>,
    /// Where to make the fifos for the process's streams [default: /run/containerd/fifo]
    #[arg(long, value_name = "FOLDER", conflicts_with = "log_uri")]
    fifo_dir: Option<PathBuf>,
    /// Write the process id to a file
    #[arg(long, value_name = "FILE")]
    pub(crate) pid_file: Option<PathBuf>,
    /// Do not use pivot_root
    #[arg(long)]
    pub(crate) no_pivot: bool,
}

impl TaskArgs {
    /// Where the process's streams go.
    pub(crate) fn choice(&self, terminal: bool) -> anyhow::Result<Choice> {
        anyhow::ensure!(
            !(terminal && (self.null_io || self.log_uri.is_some())),
            "a terminal cannot be used together with --null-io or --log-uri"
        );
        Ok(Choice {
            null: self.null_io,
            log_uri: self.log_uri.clone(),
            fifo_dir: self.fifo_dir.clone(),
            terminal,
        })
    }
}

impl Run {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<ExitCode> {
        let container = container::create(&client, &self.spec).await?;
        let outcome = async {
            if let Some(path) = &self.dump_config {
                let spec = container.spec.clone().unwrap_or_default();
                std::fs::write(path, spec.value)
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
            start(&client, &container, &self.task).await
        }
        .await;
        // A container whose process never ran is of no use to anybody, and would block its name.
        if self.rm || outcome.is_err() {
            let deleted = container::delete(&client, &container, false).await;
            if outcome.is_ok() {
                deleted?;
            }
        }
        outcome.map(Started::exit_code)
    }
}
