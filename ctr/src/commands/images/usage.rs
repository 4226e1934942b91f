//! `ctr images usage`.

use anyhow::bail;
use clap::Args;
use oci::Platform;
use oci::platform::Matcher;
use proto::containerd::services::snapshots::v1::UsageRequest;
use proto::gantry::images::v1::UsageRequest as AllRequest;

use crate::args::Snapshotter;
use crate::client::{Client, Tried};
use crate::output::{self, Table};
use crate::{image, unpack};

/// Show how much space an image's snapshots take up, the topmost first; without an image, what each image takes
///
/// Without an image: UNIQUE is what the deletion of this image alone would free, SHARED what others hold, too. An engine other
/// than gantryd does not know that.
#[derive(Debug, Args)]
pub(crate) struct Usage {
    #[command(flatten)]
    snapshotter: Snapshotter,
    #[arg(value_name = "IMAGE")]
    name: Option<String>,
}

impl Usage {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let Some(name) = self.name else { return all(&client).await };
        let snapshotter = client.snapshotter(&self.snapshotter.snapshotter).await?;
        let host = Platform::host();
        let target = image::target(&image::get(&client, &name).await?)?;
        let resolved = image::resolve(&client, &target, &Matcher::only(&host), &host).await?;
        let chain = resolved.chain_ids()?;
        if let Some(top) = chain.last()
            && !unpack::exists(&client, &snapshotter, top.as_str()).await?
        {
            bail!(
                "image {} is not unpacked in {snapshotter}; unpack it with `ctr snapshots --snapshotter {snapshotter} unpack {}`",
                name,
                target.digest
            );
        }
        let mut table = Table::new(&["KEY", "SIZE", "INODES"]);
        for key in chain.iter().rev().map(ToString::to_string) {
            let request = UsageRequest { snapshotter: snapshotter.clone(), key: key.clone() };
            let usage =
                client.snapshots().usage(request).await.tried(|| format!("measure snapshot {key}"))?;
            table.row([key, output::bytes(usage.size), usage.inodes.to_string()]);
        }
        table.print()
    }
}

async fn all(client: &Client) -> anyhow::Result<()> {
    let images =
        client.image_care().usage(AllRequest::default()).await.tried(|| "see what images take")?.images;
    let mut table = Table::new(&["REF", "BLOBS", "CONTENT", "UNPACKED", "SHARED", "UNIQUE", "CONTAINERS"]);
    for image in images {
        let bytes = |bytes: u64| output::bytes(bytes as i64);
        let unpacked: Vec<String> = image
            .unpacked
            .iter()
            .map(|(snapshotter, size)| format!("{snapshotter} {}", bytes(*size)))
            .collect();
        table.row([
            image.name,
            image.blobs.to_string(),
            bytes(image.content),
            output::or_dash(&unpacked.join(", ")),
            bytes(image.shared),
            bytes(image.unique),
            image.containers.to_string(),
        ]);
    }
    table.print()
}
