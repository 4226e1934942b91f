//! `ctr tasks start`, and the part of `ctr run` that is the same.

use std::os::fd::OwnedFd;
use std::process::ExitCode;

use anyhow::Context;
use clap::Args;
use oci::image::Descriptor;
use proto::containerd::services::containers::v1::Container;
use proto::containerd::services::tasks::v1::StartRequest;

use crate::client::{Client, Tried};
use crate::commands::run::TaskArgs;
use crate::container;
use crate::process::{Process, exit_code};
use crate::signals::Received;
use crate::stdio::{Copies, Streams, Terminal};

/// Start a container that has been created
#[derive(Debug, Args)]
pub(crate) struct Start {
    #[command(flatten)]
    task: TaskArgs,
    #[arg(value_name = "CONTAINER")]
    id: String,
}

impl Start {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<ExitCode> {
        let container = container::get(&client, &self.id).await?;
        start(&client, &container, &self.task, None).await.map(Started::exit_code)
    }
}

/// What happens with a process's output.
enum Output {
    /// It stays in the fifos for whoever attaches. The ends are held open until the process runs.
    Kept(Vec<OwnedFd>, Streams),
    Copied(Copies),
}

/// What became of a start.
pub(crate) enum Started {
    /// It runs on without ctr.
    Detached,
    /// It ran and ended with this status; its task is deleted.
    Ended(u32),
}

impl Started {
    pub(crate) fn exit_code(self) -> ExitCode {
        match self {
            Started::Detached => ExitCode::SUCCESS,
            Started::Ended(status) => exit_code(status),
        }
    }
}

/// Creates and starts the task of `container`, from the processes of a checkpoint if that is given; in the foreground, follows it to its end. Where that
/// fails on the way, no task is left.
pub(crate) async fn start(
    client: &Client,
    container: &Container,
    args: &TaskArgs,
    checkpoint: Option<&Descriptor>,
) -> anyhow::Result<Started> {
    let wants_terminal = container::spec_of(container)?.process.is_some_and(|process| process.terminal);
    let choice = args.choice(wants_terminal)?;
    // From here on a signal must not end ctr before it has cleaned up.
    let mut signals = Received::listen()?;
    let streams = Streams::create(&container.id, &choice)?;
    let terminal = (wants_terminal && !args.detach).then(Terminal::take).transpose()?;
    let process = Process::init(client, &container.id);

    let addresses = streams.addresses();
    let output =
        if args.detach { Output::Kept(streams.hold()?, streams) } else { Output::Copied(streams.copy()?) };
    let pid = container::create_task(client, container, addresses, args.no_pivot, checkpoint).await?;
    let begun = async {
        if let Some(path) = &args.pid_file {
            std::fs::write(path, pid.to_string())
                .with_context(|| format!("cannot write {}", path.display()))?;
        }
        let mut copies = match output {
            Output::Kept(ends, streams) => {
                run(client, container).await?;
                streams.keep();
                drop(ends);
                return Ok(Started::Detached);
            }
            Output::Copied(copies) => copies,
        };
        copies.feed()?;
        let _input = process.close_input_after(&copies);
        let waiting = process.wait();
        run(client, container).await?;
        let _window = match &terminal {
            Some(_) => Some(process.follow_window().await?),
            None => None,
        };
        process.follow(waiting, &mut signals).await?;
        let status = process.delete().await?;
        copies.finish().await;
        Ok(Started::Ended(status))
    }
    .await;
    drop(terminal);
    if begun.is_err() {
        // The first error is the one that tells something.
        let _ = process.delete_by_force().await;
    }
    begun
}

async fn run(client: &Client, container: &Container) -> anyhow::Result<()> {
    let request = StartRequest { container_id: container.id.clone(), exec_id: String::new() };
    client.tasks().start(request).await.tried(|| format!("start task {}", container.id))?;
    Ok(())
}
