//! `ctr images export`.

use std::fs::File;
use std::io::{self, Write};
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};

use anyhow::Context;
use clap::Args;
use oci::Platform;
use proto::any;
use proto::containerd::types::transfer::{ImageExportStream, ImageReference, ImageStore};

use crate::client::Client;
use crate::display::Display;
use crate::streams::Stream;
use crate::transfer::{Transfer, wire};

/// Export images into an archive: an OCI layout that `docker load` takes as well
#[derive(Debug, Args)]
#[command(
    after_help = "Examples:\n  ctr images export two.tar docker.io/library/busybox:1 example.org/app:2\n  \
                        ctr images export - example.org/app:2 | docker load"
)]
pub(crate) struct Export {
    /// Leave out Docker's manifest.json
    #[arg(long)]
    skip_manifest_json: bool,
    /// Leave out layers that may not be passed on, as Windows's
    #[arg(long)]
    skip_non_distributable: bool,
    /// Export the content of these platforms [default: the host's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Vec<Platform>,
    /// Export the content of all platforms
    #[arg(long, conflicts_with = "platform")]
    all_platforms: bool,
    /// Accepted for containerd's sake: the engine exports
    #[arg(long, hide = true)]
    local: bool,
    /// Print nothing
    #[arg(short, long)]
    quiet: bool,
    /// The archive; - is stdout
    #[arg(value_name = "FILE")]
    archive: String,
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
}

impl Export {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        if self.archive == "-" {
            return self.export(&client, io::stdout()).await;
        }
        // Under another name until it is whole: a failed export leaves nothing that looks like an archive.
        let partial = PathBuf::from(format!("{}.partial", self.archive));
        let file = File::create(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
        let whole = file.try_clone()?;
        let done = self.export(&client, file).await.and_then(|()| {
            whole.sync_all().with_context(|| format!("cannot write {}", partial.display()))?;
            std::fs::rename(&partial, &self.archive)
                .with_context(|| format!("cannot create {}", self.archive))
        });
        if done.is_err() {
            let _ = std::fs::remove_file(&partial);
        }
        done
    }

    async fn export(&self, client: &Client, out: impl Write + Send + 'static) -> anyhow::Result<()> {
        let stream = Stream::open(client, "export").await?;
        let to = ImageExportStream {
            stream: stream.id.clone(),
            media_type: String::new(),
            platforms: self.platform.iter().map(wire).collect(),
            all_platforms: self.all_platforms,
            skip_compatibility_manifest: self.skip_manifest_json,
            skip_non_distributable: self.skip_non_distributable,
        };
        let named = |name: &String| ImageReference { name: name.clone(), ..ImageReference::default() };
        let from =
            ImageStore { extra_references: self.images.iter().map(named).collect(), ..ImageStore::default() };
        let display = Display::new(self.quiet, self.archive == "-");
        let (counted, name, received) = (display.clone(), self.archive.clone(), AtomicU64::new(0));
        let receiving = stream.receive_all(out, move |count| {
            let received = received.fetch_add(count, Ordering::Relaxed) + count;
            counted.count(&name, "receiving", received, 0);
        });
        let transfer = Transfer {
            source: any::pack(&from),
            destination: any::pack(&to),
            what: format!("export {}", self.images.join(", ")),
            note: "; what was written is no archive",
            display: &display,
        };
        let beside =
            async { receiving.await.with_context(|| format!("cannot write archive {}", self.archive)) };
        transfer.run(client, beside).await.map(drop)
    }
}
