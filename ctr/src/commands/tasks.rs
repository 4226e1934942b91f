//! `ctr tasks …`: the running side of containers.

use std::process::ExitCode;

use clap::Subcommand;

use crate::client::Client;

mod attach;
mod checkpoint;
mod delete;
mod exec;
mod kill;
mod list;
mod metrics;
mod pause;
mod ps;
mod resume;
pub(crate) mod start;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Attach(attach::Attach),
    Checkpoint(checkpoint::Checkpoint),
    #[command(visible_aliases = ["del", "remove", "rm"])]
    Delete(delete::Delete),
    Exec(exec::Exec),
    Kill(kill::Kill),
    #[command(visible_alias = "ls")]
    List(list::List),
    #[command(visible_alias = "metric")]
    Metrics(metrics::Metrics),
    Pause(pause::Pause),
    Ps(ps::Ps),
    Resume(resume::Resume),
    Start(start::Start),
}

impl Command {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<ExitCode> {
        let done = match self {
            // These end with the code of a process.
            Command::Attach(command) => return command.run(client).await,
            Command::Delete(command) => return command.run(client).await,
            Command::Exec(command) => return command.run(client).await,
            Command::Start(command) => return command.run(client).await,
            Command::Checkpoint(command) => command.run(client).await,
            Command::Kill(command) => command.run(client).await,
            Command::List(command) => command.run(client).await,
            Command::Metrics(command) => command.run(client).await,
            Command::Pause(command) => command.run(client).await,
            Command::Ps(command) => command.run(client).await,
            Command::Resume(command) => command.run(client).await,
        };
        done.map(|()| ExitCode::SUCCESS)
    }
}
