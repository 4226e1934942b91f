//! `ctr images push`.

use anyhow::Context;
use clap::Args;
use oci::image::media_type;
use oci::{Digest, Platform};
use proto::any;
use proto::containerd::services::images::v1::{CreateImageRequest, DeleteImageRequest, Image};
use proto::containerd::types::Descriptor;
use proto::containerd::types::transfer::ImageStore;

use crate::client::{Client, Tried};
use crate::display::Display;
use crate::lease::{EXPIRE_LABEL, expiry, unique};
use crate::transfer::{Transfer, wire};
use crate::{content, output, registry};

/// Push an image to a registry
///
/// What the registry has already is not sent again, and what another of its repositories has is mounted from there where the
/// registry lets us.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  ctr images push registry.example/team/app:1\n  \
                        ctr images push --user me registry.example/team/app:1 example.org/built:1\n  \
                        ctr images push --platform linux/arm64 registry.example/team/app:1-arm64 registry.example/team/app:1")]
pub(crate) struct Push {
    /// Push this manifest, of which there need be no image
    #[arg(long, value_name = "DIGEST", conflicts_with = "local_name")]
    manifest: Option<Digest>,
    /// Media type of --manifest
    #[arg(long, value_name = "TYPE", default_value = media_type::OCI_MANIFEST, requires = "manifest")]
    manifest_type: String,
    /// Push the content of these platforms [default: all of the image]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Vec<Platform>,
    /// Accepted for containerd's sake: the engine sends as many at a time as the registry bears
    #[arg(long, value_name = "COUNT")]
    max_concurrent_uploaded_layers: Option<u32>,
    /// Accepted for containerd's sake: the engine pushes
    #[arg(long, hide = true)]
    local: bool,
    /// Print nothing but the image's name
    #[arg(short, long)]
    quiet: bool,
    /// Where to, in full or as docker shortens it
    #[arg(value_name = "REMOTE")]
    remote: String,
    /// Name of the image here [default: the same]
    #[arg(value_name = "LOCAL")]
    local_name: Option<String>,
    // The last: its heading is for all that follow.
    #[command(flatten)]
    registry: registry::Flags,
}

impl Push {
    pub(crate) async fn run(mut self, client: Client) -> anyhow::Result<()> {
        let Some(manifest) = self.manifest.take() else { return self.push(&client, None).await };
        // The protocol knows images by their names alone: it gets one for as long as it takes.
        let info = content::info(&client, &manifest).await?.with_context(|| {
            format!("there is no content {manifest}; `ctr content ls` shows what there is")
        })?;
        let target = Descriptor {
            media_type: self.manifest_type.clone(),
            digest: manifest.to_string(),
            size: info.size,
            ..Descriptor::default()
        };
        let name = unique("ctr-push");
        let labels = [(EXPIRE_LABEL.to_owned(), expiry(std::time::Duration::from_secs(24 * 3600))?)].into();
        let image = Image { name: name.clone(), labels, target: Some(target), ..Image::default() };
        let request = CreateImageRequest { image: Some(image), ..CreateImageRequest::default() };
        client.images().create(request).await.tried(|| format!("name {manifest} for the push"))?;
        let done = self.push(&client, Some(name.clone())).await;
        let request = DeleteImageRequest { name, ..DeleteImageRequest::default() };
        let removed = client.images().delete(request).await.tried(|| "take the push's name away").map(drop);
        done.and(removed)
    }

    /// Pushes the image of this name, or else what the command line names.
    async fn push(self, client: &Client, name: Option<String>) -> anyhow::Result<()> {
        let reference = registry::reference(&self.remote)?;
        let name = name.or(self.local_name).unwrap_or_else(|| reference.to_string());
        let registry = self.registry.open(client, &reference).await?;
        let from =
            ImageStore { name, platforms: self.platform.iter().map(wire).collect(), ..ImageStore::default() };
        let display = Display::new(self.quiet, false);
        let transfer = Transfer {
            source: any::pack(&from),
            destination: any::pack(&registry.wire),
            what: format!("push {reference}"),
            note: "; the registry keeps what it got for a while, the same push goes on from there",
            display: &display,
        };
        let done = transfer.run(client, async { Ok(()) }).await;
        registry.finish().await;
        done?;
        match self.quiet {
            true => output::line(reference.to_string()),
            false => output::line(format!("pushed {reference}")),
        }
    }
}
