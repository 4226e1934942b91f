//! `ctr images …`.

use clap::Subcommand;

use crate::client::Client;

mod check;
mod convert;
mod drop_layers;
mod export;
mod import;
mod inspect;
mod label;
mod list;
mod mount;
mod prune;
pub(crate) mod pull;
mod push;
mod remove;
mod tag;
mod unmount;
mod usage;
mod verify;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Check(check::Check),
    Convert(convert::Convert),
    DropLayers(drop_layers::DropLayers),
    Export(export::Export),
    Import(import::Import),
    #[command(visible_alias = "i")]
    Inspect(inspect::Inspect),
    Label(label::Label),
    #[command(visible_alias = "ls")]
    List(list::List),
    Mount(mount::Mount),
    Prune(prune::Prune),
    Pull(Box<pull::Pull>),
    Push(Box<push::Push>),
    #[command(visible_aliases = ["del", "delete", "rm"])]
    Remove(remove::Remove),
    Tag(tag::Tag),
    Unmount(unmount::Unmount),
    Usage(usage::Usage),
    Verify(verify::Verify),
}

impl Command {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        match self {
            Command::Check(command) => command.run(client).await,
            Command::Convert(command) => command.run(client).await,
            Command::DropLayers(command) => command.run(client).await,
            Command::Export(command) => command.run(client).await,
            Command::Import(command) => command.run(client).await,
            Command::Inspect(command) => command.run(client).await,
            Command::Label(command) => command.run(client).await,
            Command::List(command) => command.run(client).await,
            Command::Mount(command) => command.run(client).await,
            Command::Prune(command) => command.run(client).await,
            Command::Pull(command) => command.run(client).await,
            Command::Push(command) => command.run(client).await,
            Command::Remove(command) => command.run(client).await,
            Command::Tag(command) => command.run(client).await,
            Command::Unmount(command) => command.run(client).await,
            Command::Usage(command) => command.run(client).await,
            Command::Verify(command) => command.run(client).await,
        }
    }
}
