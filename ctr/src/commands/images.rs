//! `ctr images …`.

use clap::Subcommand;

use crate::client::Client;

mod export;
mod import;
mod label;
mod list;
mod remove;
mod tag;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Export(export::Export),
    Import(import::Import),
    Label(label::Label),
    #[command(visible_alias = "ls")]
    List(list::List),
    #[command(visible_aliases = ["del", "delete", "rm"])]
    Remove(remove::Remove),
    Tag(tag::Tag),
}

impl Command {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        match self {
            Command::Export(command) => command.run(client).await,
            Command::Import(command) => command.run(client).await,
            Command::Label(command) => command.run(client).await,
            Command::List(command) => command.run(client).await,
            Command::Remove(command) => command.run(client).await,
            Command::Tag(command) => command.run(client).await,
        }
    }
}
