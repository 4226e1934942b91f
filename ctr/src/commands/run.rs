//! `ctr run`.

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use proto::containerd::services::tasks::v1::GetRequest;

use crate::client::Client;
use crate::commands::tasks::start::{Started, start};
use crate::container::{self, SpecArgs};
use crate::stdio::Choice;
use crate::trace::Tracing;

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
    /// Show on stderr where the time went, in ctr, the engine, the shim and the runtime, as a time line
    #[arg(long)]
    trace: bool,
    #[command(flatten)]
    pub(crate) task: TaskArgs,
    /// Write the generated runtime spec to a file
    #[arg(long, value_name = "FILE")]
    dump_config: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) spec: SpecArgs,
}

/// Flags that `run` and `tasks start` share.
#[derive(Debug, Default, Args)]
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
    /// No flags but, perhaps, `--detach`.
    pub(crate) fn detached(detach: bool) -> TaskArgs {
        TaskArgs { detach, ..TaskArgs::default() }
    }

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
        if !self.trace {
            return self.follow(client).await;
        }
        let trace = Tracing::begin(&client).await?;
        let outcome = trace.of(self.follow(client)).await;
        trace.print()?;
        outcome
    }

    async fn follow(mut self, client: Client) -> anyhow::Result<ExitCode> {
        self.spec.cpu_shares.get_or_insert(1024);
        let container =
            shim_api::trace::span("create the container", container::create(&client, &self.spec)).await?;
        let outcome = async {
            if let Some(path) = &self.dump_config {
                let spec = container.spec.clone().unwrap_or_default();
                std::fs::write(path, spec.value)
                    .with_context(|| format!("cannot write {}", path.display()))?;
            }
            let started = start(&client, &container, &self.task, None);
            shim_api::trace::span("run its task", started).await
        }
        .await;
        // A container whose process never ran is of no use to anybody, and would block its name. One whose task could
        // not be deleted is what the task is found by.
        let request = GetRequest { container_id: container.id.clone(), exec_id: String::new() };
        if outcome.is_err() && client.tasks().get(request).await.is_ok() {
            eprintln!(
                "ctr: container {id} is kept, since its task is still there; remove both with `ctr tasks rm --force {id}` \
                 and `ctr containers rm {id}`",
                id = container.id
            );
        } else if self.rm || outcome.is_err() {
            let deleted = container::delete(&client, &container, false);
            let deleted = shim_api::trace::span("delete the container", deleted).await;
            if outcome.is_ok() {
                deleted?;
            }
        }
        outcome.map(Started::exit_code)
    }
}
