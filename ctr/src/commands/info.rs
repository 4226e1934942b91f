//! `ctr info`.

use clap::Args;

use crate::client::{Client, Tried};
use crate::json;

/// Print the engine's identity
#[derive(Debug, Args)]
pub(crate) struct Info;

impl Info {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let server = client.introspection().server(()).await.tried(|| "ask for the engine's identity")?;
        json::print(&json::of(&server))
    }
}
