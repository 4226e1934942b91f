//! `ctr images drop-layers`.

use clap::Args;
use proto::gantry::images::v1::DropLayersRequest;

use crate::client::{Client, Tried};
use crate::output;

/// Remove the layers' blobs of images that are unpacked
///
/// Containers run and start as before: they need the unpacked layers alone. To export, push or unpack the image elsewhere, pull
/// it again. Layers that other images need stay. An engine other than gantryd does not know this command.
#[derive(Debug, Args)]
pub(crate) struct DropLayers {
    #[arg(value_name = "IMAGE", required = true)]
    names: Vec<String>,
}

impl DropLayers {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        for name in self.names {
            let request = DropLayersRequest { name: name.clone() };
            let went = client.image_care().drop_layers(request).await;
            let went = went.tried(|| format!("drop the layers of image {name}"))?;
            output::line(format!("{name}: {} blobs, {}", went.blobs, output::bytes(went.content as i64)))?;
        }
        Ok(())
    }
}
