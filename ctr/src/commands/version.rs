//! `ctr version`.

use std::process::ExitCode;

use clap::Args;

use crate::args::Format;
use crate::client::{Client, Tried};
use crate::{json, output};

/// Print the versions of ctr and of the engine
#[derive(Debug, Args)]
pub(crate) struct Version {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Version {
    /// ctr's own version is shown even where no engine answers.
    pub(crate) async fn run(
        self,
        connecting: impl Future<Output = anyhow::Result<Client>>,
    ) -> anyhow::Result<ExitCode> {
        let own = env!("CARGO_PKG_VERSION");
        if self.format == Format::Table {
            output::print(&format!("Client:\n  Version:  {own}\n\n"))?;
        }
        let client = connecting.await?;
        let engine = client.version().version(()).await.tried(|| "ask for the engine's version")?;
        let server = client.introspection().server(()).await.tried(|| "ask for the engine's identity")?;
        match self.format {
            Format::Table => output::print(&format!(
                "Server:\n  Version:  {}\n  Revision: {}\n  UUID: {}\n",
                engine.version, engine.revision, server.uuid
            ))?,
            Format::Json => json::print(&serde_json::json!({
                "client": {"version": own},
                "server": {"version": engine.version, "revision": engine.revision, "uuid": server.uuid},
            }))?,
        }
        Ok(ExitCode::SUCCESS)
    }
}
