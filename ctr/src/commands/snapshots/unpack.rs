//! `ctr snapshots unpack`.

use anyhow::Context;
use clap::Args;
use oci::platform::Matcher;
use oci::{Digest, Platform};

use crate::client::Client;
use crate::progress::Progress;
use crate::{image, lease, output, unpack};

/// Unpack an image's layers into snapshots
#[derive(Debug, Args)]
pub(super) struct Unpack {
    /// Write the snapshotter's file system to disk after each layer
    #[arg(long)]
    sync_fs: bool,
    /// Snapshotter to use, as before the command
    #[arg(long, value_name = "NAME")]
    snapshotter: Option<String>,
    /// Digest of an image's target, as `ctr images ls` shows it
    digest: Digest,
}

impl Unpack {
    pub(super) async fn run(self, client: Client, snapshotter: String) -> anyhow::Result<()> {
        let snapshotter = self.snapshotter.unwrap_or(snapshotter);
        lease::within(&client, |client| async move {
            let images = image::list(&client, vec![format!("target.digest=={}", self.digest)]).await?;
            let found = images.first().with_context(|| {
                format!(
                    "no image in namespace {} has the digest {}; `ctr images ls` shows those there are",
                    client.namespace(),
                    self.digest
                )
            })?;
            let (host, target) = (Platform::host(), image::target(found)?);
            let resolved = image::resolve(&client, &target, &Matcher::only(&host), &host).await?;
            unpack::unpack(&client, &resolved, &snapshotter, self.sync_fs, &Progress::new()).await?;
            output::line(format!("unpacking {} ({})...done", target.digest, target.media_type))
        })
        .await
    }
}
