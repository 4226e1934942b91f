//! `ctr images pull`.

use anyhow::Context;
use clap::Args;
use oci::Platform;
use oci::platform::Matcher;
use proto::any;
use proto::containerd::types::transfer::{ImageStore, UnpackConfiguration};

use crate::args::{Snapshotter, labels};
use crate::client::Client;
use crate::display::Display;
use crate::transfer::{self, Transfer, discard_layers, wire};
use crate::{image, output, registry};

/// Pull an image from a registry
///
/// The engine fetches what is not there and unpacks it as it comes. The image has its name when all of it is there; a pull that was
/// interrupted goes on where it was when it is repeated.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  ctr images pull docker.io/library/busybox:latest\n  \
                        ctr images pull --user me registry.example/team/app:1\n  \
                        ctr images pull --platform linux/arm64 --no-unpack registry.example/team/app:1\n  \
                        ctr images pull --tlscacert ca.crt registry.example:5000/app:1")]
pub(crate) struct Pull {
    /// Do not unpack the layers
    #[arg(long, visible_alias = "skip-unpack")]
    no_unpack: bool,
    /// Let the layers' blobs go once they are unpacked
    #[arg(long, conflicts_with = "no_unpack")]
    discard_unpacked_layers: bool,
    /// Print the name of the image's topmost snapshot
    #[arg(long, conflicts_with = "no_unpack")]
    print_chainid: bool,
    /// Accepted for containerd's sake: the engine fetches as many at a time as the registry bears
    #[arg(long, value_name = "COUNT")]
    max_concurrent_downloads: Option<u32>,
    /// Accepted for containerd's sake: what is unpacked is on disk before its image has a name
    #[arg(long, hide = true)]
    sync_fs: bool,
    /// Accepted for containerd's sake: the engine pulls
    #[arg(long, hide = true)]
    local: bool,
    #[command(flatten)]
    snapshotter: Snapshotter,
    #[command(flatten)]
    fetch: Fetch,
}

/// What `images pull` and `content fetch` share.
#[derive(Debug, Args)]
#[group(skip)]
pub(crate) struct Fetch {
    /// Fetch the content of these platforms [default: the host's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Vec<Platform>,
    /// Fetch the content of all platforms
    #[arg(long, conflicts_with = "platform")]
    all_platforms: bool,
    /// Leave out manifests and configs of other platforms; such an image cannot be pushed as a whole
    #[arg(long)]
    skip_metadata: bool,
    /// Accepted for containerd's sake: it is what is done
    #[arg(long, conflicts_with = "skip_metadata")]
    all_metadata: bool,
    /// Label the image
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Print nothing but the image's name
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// The image, in full or as docker shortens it
    #[arg(value_name = "IMAGE")]
    reference: String,
    // The last: its heading is for all that follow.
    #[command(flatten)]
    registry: registry::Flags,
}

impl Fetch {
    /// The same, but no layers: a label that the engine takes for itself.
    pub(crate) fn of_metadata(mut self) -> Fetch {
        self.label.push("gantry.io/metadata-only=true".to_owned());
        self
    }

    /// Fetches, and unpacks with this snapshotter unless that is None.
    pub(crate) async fn run(
        self,
        client: &Client,
        snapshotter: Option<String>,
    ) -> anyhow::Result<Vec<transfer::Saved>> {
        let reference = registry::reference(&self.reference)?;
        let registry = self.registry.open(client, &reference).await?;
        let wanted = match (self.all_platforms, self.platform.is_empty()) {
            (true, _) => Vec::new(),
            (false, true) => vec![wire(&Platform::host())],
            (false, false) => self.platform.iter().map(wire).collect(),
        };
        // Of all platforms, only this host's is unpacked.
        let unpacked = if self.all_platforms { vec![wire(&Platform::host())] } else { wanted.clone() };
        let unpack = |snapshotter: String| {
            let each =
                |platform| UnpackConfiguration { platform: Some(platform), snapshotter: snapshotter.clone() };
            unpacked.into_iter().map(each).collect()
        };
        let to = ImageStore {
            name: reference.to_string(),
            labels: labels(&self.label),
            platforms: wanted,
            all_metadata: !self.skip_metadata,
            unpacks: snapshotter.map(unpack).unwrap_or_default(),
            ..ImageStore::default()
        };
        let display = Display::new(self.quiet, false);
        let transfer = Transfer {
            source: any::pack(&registry.wire),
            destination: any::pack(&to),
            what: format!("pull {reference}"),
            note: "; what was fetched is kept, the same pull goes on from there",
            display: &display,
        };
        let done = transfer.run(client, async { Ok(()) }).await;
        registry.finish().await;
        let saved = done?;
        // An engine that tells of no name has given the one it was told.
        match saved.is_empty() {
            false => Ok(saved),
            true => {
                let found = image::get(client, &to.name).await?;
                let digest = found.target.unwrap_or_default().digest;
                Ok(vec![transfer::Saved { name: found.name, digest }])
            }
        }
    }
}

impl Pull {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let snapshotter = match self.no_unpack {
            true => None,
            false => Some(client.snapshotter(&self.snapshotter.snapshotter).await?),
        };
        let quiet = self.fetch.quiet;
        let platform = self.fetch.platform.first().cloned().unwrap_or_else(Platform::host);
        let saved = self.fetch.run(&client, snapshotter).await?;
        if self.print_chainid {
            for image in &saved {
                let target = image::target(&image::get(&client, &image.name).await?)?;
                let resolved = image::resolve(&client, &target, &Matcher::only(&platform), &platform).await?;
                let top =
                    resolved.chain_ids()?.pop().context("the image has no layers, and so no chain ID")?;
                output::line(format!("image chain ID: {top}"))?;
            }
        }
        if self.discard_unpacked_layers {
            discard_layers(&client, &saved).await?;
        }
        transfer::tell(&saved, quiet)
    }
}
