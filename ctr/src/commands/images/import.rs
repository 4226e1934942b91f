//! `ctr images import`.

use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use anyhow::{Context, bail};
use clap::Args;
use oci::Platform;
use proto::any;
use proto::containerd::types::transfer::{
    ImageImportStream, ImageReference, ImageStore, UnpackConfiguration,
};
use time::OffsetDateTime;

use crate::args::{Snapshotter, labels};
use crate::client::Client;
use crate::display::Display;
use crate::streams::Stream;
use crate::transfer::{self, Transfer, discard_layers, wire};

/// Import images from an archive: OCI layout or `docker save`, plain, gzip or zstd
///
/// Where the archive has bare tags only, --base-name goes before them; without it they become
/// import-YYYY-MM-DD:TAG.
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  ctr images import busybox.tar\n  docker save app:1 | ctr images import -\n  \
                        ctr images import --base-name example.org/app layout.tar.gz"
)]
pub(crate) struct Import {
    /// Name to put before bare tags; of fully named images, only those of this name are taken
    #[arg(long, value_name = "NAME")]
    base_name: Option<String>,
    /// Also name each image by its digest
    #[arg(long)]
    digests: bool,
    /// With --digests, leave out images that have a name
    #[arg(long, requires = "digests")]
    skip_digest_for_named: bool,
    /// Keep the archive's index as an image of this name
    #[arg(long, value_name = "NAME")]
    index_name: Option<String>,
    /// Keep the content of all platforms
    #[arg(long, conflicts_with = "platform")]
    all_platforms: bool,
    /// Keep the content of this platform [default: the host's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<Platform>,
    /// Do not unpack the layers
    #[arg(long)]
    no_unpack: bool,
    /// Store plain layers as gzip, of archives in Docker's form
    #[arg(long)]
    compress_blobs: bool,
    /// Accepted for containerd's sake: what is unpacked is on disk before its image has a name
    #[arg(long, hide = true)]
    sync_fs: bool,
    /// Let the layers' blobs go once they are unpacked
    #[arg(long, conflicts_with = "no_unpack")]
    discard_unpacked_layers: bool,
    /// Label the images
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Accepted for containerd's sake: the engine imports
    #[arg(long, hide = true)]
    local: bool,
    /// Print nothing but the images' names
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    snapshotter: Snapshotter,
    /// The archive; - is stdin
    #[arg(value_name = "FILE")]
    archive: String,
}

impl Import {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let (source, size) = open(&self.archive)?;
        let stream = Stream::open(&client, "import").await?;
        let from = ImageImportStream {
            stream: stream.id.clone(),
            media_type: String::new(),
            force_compress: self.compress_blobs,
        };
        let snapshotter = client.snapshotter(&self.snapshotter.snapshotter).await?;
        let display = Display::new(self.quiet, false);
        let (counted, name, sent) = (display.clone(), self.archive.clone(), AtomicU64::new(0));
        let sending = stream.send_all(source, move |count| {
            let sent = sent.fetch_add(count, Ordering::Relaxed) + count;
            counted.count(
                &name,
                if size == Some(sent) { "complete" } else { "sending" },
                sent,
                size.unwrap_or(0),
            );
        });
        let transfer = Transfer {
            source: any::pack(&from),
            destination: any::pack(&self.store(&snapshotter)),
            what: format!("import {}", self.archive),
            note: "; nothing was imported",
            display: &display,
        };
        let beside = async { sending.await.with_context(|| format!("cannot read archive {}", self.archive)) };
        let saved = transfer.run(&client, beside).await?;
        if self.discard_unpacked_layers {
            discard_layers(&client, &saved).await?;
        }
        transfer::tell(&saved, self.quiet)
    }

    /// What is to become of the archive.
    fn store(&self, snapshotter: &str) -> ImageStore {
        let today = OffsetDateTime::from(SystemTime::now()).date();
        let platform = wire(&self.platform.clone().unwrap_or_else(Platform::host));
        let prefix = ImageReference {
            name: self.base_name.clone().unwrap_or_else(|| format!("import-{today}")),
            is_prefix: true,
            // A name of our making gives way to one that the archive has.
            allow_overwrite: self.base_name.is_none(),
            add_digest: self.digests,
            skip_named_digest: self.skip_digest_for_named,
        };
        let unpack =
            UnpackConfiguration { platform: Some(platform.clone()), snapshotter: snapshotter.to_owned() };
        ImageStore {
            name: self.index_name.clone().unwrap_or_default(),
            labels: labels(&self.label),
            platforms: if self.all_platforms { Vec::new() } else { vec![platform] },
            extra_references: vec![prefix],
            unpacks: if self.no_unpack { Vec::new() } else { vec![unpack] },
            ..ImageStore::default()
        }
    }
}

/// The archive, and its size where it has one.
fn open(path: &str) -> anyhow::Result<(Box<dyn Read + Send>, Option<u64>)> {
    if path == "-" {
        return Ok((Box::new(io::stdin()), None));
    }
    let file = File::open(path).with_context(|| format!("cannot open archive {path}"))?;
    let kind = file.metadata().with_context(|| format!("cannot open archive {path}"))?;
    if kind.is_dir() {
        bail!(
            "archive {path} is a folder; an unpacked layout comes in as `tar -C {path} -c . | ctr images import -`"
        );
    }
    Ok((Box::new(file), kind.is_file().then_some(kind.len())))
}
