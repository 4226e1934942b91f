//! `ctr content fetch`.

use clap::Args;

use crate::client::Client;
use crate::commands::images::pull;
use crate::transfer;

/// Fetch an image's content and give it a name, without unpacking
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  ctr content fetch --all-platforms docker.io/library/busybox:latest")]
pub(crate) struct Fetch {
    /// Fetch manifests and configs alone, those of all platforms
    #[arg(long, conflicts_with_all = ["all_platforms", "platform", "skip_metadata"])]
    metadata_only: bool,
    #[command(flatten)]
    fetch: pull::Fetch,
}

impl Fetch {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let quiet = self.fetch.quiet;
        let fetch = if self.metadata_only { self.fetch.of_metadata() } else { self.fetch };
        let saved = fetch.run(&client, None).await?;
        transfer::tell(&saved, quiet)
    }
}
