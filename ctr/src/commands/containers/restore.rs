//! `ctr containers restore`.

use std::process::ExitCode;

use clap::Args;

use crate::checkpoint::Checkpoint;
use crate::client::Client;
use crate::commands::run::TaskArgs;
use crate::commands::tasks::start::{Started, start};
use crate::{container, lease};

/// Make a container from a checkpoint, and start it
///
/// The checkpoint says what is run, and with which rights: restore only those that you trust. A container without a terminal goes on
/// by itself; one with a terminal is followed to its end.
#[derive(Debug, Args)]
pub(crate) struct Restore {
    /// Restore what the container had changed of its image's files
    #[arg(long)]
    rw: bool,
    /// Let its processes go on where they were, instead of starting anew; needs CRIU on the engine's host
    #[arg(long)]
    live: bool,
    #[arg(value_name = "CONTAINER")]
    id: String,
    /// The checkpoint's name
    #[arg(value_name = "REF")]
    reference: String,
}

impl Restore {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<ExitCode> {
        let checkpoint = Checkpoint::read(&client, &self.reference).await?;
        let state = self.live.then(|| checkpoint.state()).transpose()?;
        let (id, rw, from) = (&self.id, self.rw, &checkpoint);
        let container =
            lease::within(&client, |client| async move { from.container(&client, id, rw).await }).await?;
        let started = async {
            let process = container::spec_of(&container)?.process;
            let task = TaskArgs::detached(!process.is_some_and(|process| process.terminal));
            start(&client, &container, &task, state).await
        }
        .await;
        if started.is_err() {
            // A container that is not what it was is of no use. The first error is the one that tells something.
            let _ = container::delete(&client, &container, false).await;
        }
        started.map(Started::exit_code)
    }
}
