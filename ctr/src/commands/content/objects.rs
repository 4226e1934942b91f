//! `ctr content fetch-object`, `fetch-blob` and `push-object`: what a registry has, one object at a time.
//!
//! The engine asks the registry, by its own mirrors and tokens, and checks what comes; nothing of it is kept.

use std::io::Write as _;

use clap::Args;
use oci::Digest;
use proto::gantry::registry::v1::{FetchRequest, PushRequest};

use crate::client::{Client, Failure, Tried};
use crate::lease::unless_interrupted;
use crate::{output, registry};

/// Write what a registry has by a name to stdout, as it has it
#[derive(Debug, Args)]
#[command(after_help = "Example:\n  ctr content fetch-object docker.io/library/busybox:latest | jq .")]
pub(crate) struct FetchObject {
    /// The image
    #[arg(value_name = "REMOTE")]
    reference: String,
    /// Objects of its repository instead of what the name stands for
    #[arg(value_name = "DIGEST")]
    digests: Vec<Digest>,
    #[command(flatten)]
    registry: registry::Flags,
}

/// Write blobs that a registry has to stdout, as it has them
#[derive(Debug, Args)]
pub(crate) struct FetchBlob {
    /// Media type to ask for [default: the one that the registry says]
    #[arg(long, value_name = "TYPE", default_value = "", hide_default_value = true)]
    media_type: String,
    /// An image of the repository
    #[arg(value_name = "REMOTE")]
    reference: String,
    #[arg(value_name = "DIGEST", required = true)]
    digests: Vec<Digest>,
    #[command(flatten)]
    registry: registry::Flags,
}

/// Send one blob of the store to a registry
#[derive(Debug, Args)]
pub(crate) struct PushObject {
    /// The repository; a manifest or an index is given the tag of this
    #[arg(value_name = "REMOTE")]
    reference: String,
    digest: Digest,
    /// What it is: that of a manifest or an index makes it one there, any other a blob
    #[arg(value_name = "TYPE")]
    media_type: String,
    #[command(flatten)]
    registry: registry::Flags,
}

impl FetchObject {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        fetch(&client, self.registry, &self.reference, &self.digests, String::new()).await
    }
}

impl FetchBlob {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        fetch(&client, self.registry, &self.reference, &self.digests, self.media_type).await
    }
}

async fn fetch(
    client: &Client,
    registry: registry::Flags,
    reference: &str,
    digests: &[Digest],
    media_type: String,
) -> anyhow::Result<()> {
    let reference = registry::reference(reference)?;
    // Interrupted, what was made for the registry's sake is removed.
    unless_interrupted(async {
        let registry = registry.open(client, &reference).await?;
        let request = FetchRequest {
            registry: Some(registry.wire.clone()),
            digests: digests.iter().map(Digest::to_string).collect(),
            media_type,
        };
        let fetched = async {
            let what = || format!("fetch from {reference}");
            let mut pieces = client.registry().fetch(request).await.tried(what)?;
            while let Some(piece) = pieces.message().await.map_err(|status| Failure::new(what(), status))? {
                std::io::stdout().write_all(&piece.data)?;
            }
            Ok(std::io::stdout().flush()?)
        }
        .await;
        registry.finish().await;
        fetched
    })
    .await
}

impl PushObject {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let reference = registry::reference(&self.reference)?;
        let (digest, media_type) = (self.digest, self.media_type);
        let answer = unless_interrupted(async {
            let registry = self.registry.open(&client, &reference).await?;
            let request = PushRequest {
                registry: Some(registry.wire.clone()),
                digest: digest.to_string(),
                media_type: media_type.clone(),
            };
            let pushed = client.registry().push(request).await;
            registry.finish().await;
            pushed.tried(|| format!("push {digest} to {reference}"))
        })
        .await?;
        output::line(format!("{} {digest} {media_type}", if answer.existed { "Exists" } else { "Pushed" }))
    }
}
