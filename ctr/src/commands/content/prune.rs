//! `ctr content prune`.

use clap::{Args, Subcommand};
use oci::Digest;
use proto::containerd::services::leases::v1::{CreateRequest, DeleteRequest};

use crate::client::{Client, Tried};
use crate::{content, lease, output};

#[derive(Debug, Subcommand)]
pub(crate) enum Prune {
    References(References),
}

/// Let the blobs of all layers go
///
/// Takes the labels off manifests that keep their layers. Containers run on, and start: they need snapshots alone. Exporting an
/// image, or unpacking it for another snapshotter, then needs its layers to be imported again.
#[derive(Debug, Args)]
pub(crate) struct References {
    /// Return before what nothing keeps any more has been removed
    #[arg(long = "async")]
    later: bool,
    /// Only show the labels that would go
    #[arg(long)]
    dry: bool,
}

impl Prune {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let Prune::References(command) = self;
        command.run(client).await
    }
}

impl References {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        for blob in content::list(&client, Vec::new()).await? {
            if self.dry {
                let keeping = blob.labels.keys().filter(|key| content::keeps_layer(key));
                keeping.into_iter().try_for_each(|key| output::line(format!("{} {key}", blob.digest)))?;
            } else {
                let digest = blob.digest.parse::<Digest>()?;
                content::release_layers(&client, &digest).await?;
            }
        }
        if self.dry {
            return Ok(());
        }
        // The end of a lease is what a client can start a collection with.
        let request = CreateRequest { id: lease::unique("ctr-prune"), labels: Default::default() };
        let id =
            client.leases().create(request).await.tried(|| "create a lease")?.lease.unwrap_or_default().id;
        let request = DeleteRequest { id: id.clone(), sync: !self.later };
        client.leases().delete(request).await.tried(|| format!("delete lease {id}"))?;
        Ok(())
    }
}
