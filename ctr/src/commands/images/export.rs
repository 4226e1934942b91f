//! `ctr images export`.

use std::io::BufWriter;
use std::path::PathBuf;

use anyhow::{Context, bail};
use clap::Args;
use oci::Platform;
use oci::image::media_type;
use oci::platform::Matcher;

use crate::archive::export::{Image, write};
use crate::client::Client;
use crate::progress::{Progress, short};
use crate::{image, lease};

/// Export images into an archive: an OCI layout that `docker load` takes as well
#[derive(Debug, Args)]
pub(crate) struct Export {
    /// Leave out Docker's manifest.json
    #[arg(long)]
    skip_manifest_json: bool,
    /// Export the content of this platform [default: the host's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<Platform>,
    /// Export the content of all platforms
    #[arg(long, conflicts_with = "platform")]
    all_platforms: bool,
    /// Accepted for containerd's sake: export always runs in ctr
    #[arg(long, hide = true)]
    local: bool,
    /// The archive; - is stdout
    #[arg(value_name = "FILE")]
    archive: String,
    #[arg(value_name = "IMAGE", required = true)]
    images: Vec<String>,
}

impl Export {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        // Nothing of what is being read may be collected meanwhile.
        lease::within(&client, |client| async move {
            let mut images = Vec::new();
            for name in &self.images {
                images
                    .push(self.gather(&client, name).await.with_context(|| format!("cannot export {name}"))?);
            }
            let archive = self.archive.clone();
            tokio::task::spawn_blocking(move || to_file(&client, &images, &archive)).await?
        })
        .await
    }

    async fn gather(&self, client: &Client, name: &str) -> anyhow::Result<Image> {
        let platform = self.platform.clone().unwrap_or_else(Platform::host);
        let matcher = if self.all_platforms { Matcher::all() } else { Matcher::only(&platform) };
        let target = image::target(&image::get(client, name).await?)?;
        let mut survey = image::survey(client, &target, &matcher).await?;
        let whole_index = media_type::is_index(&target.media_type);
        if whole_index && !self.all_platforms {
            survey.missing.retain(|blob| !media_type::is_manifest(&blob.media_type));
        }
        if let Some(first) = survey.missing.first() {
            bail!("{} of its blobs are not in the store, first {}", survey.missing.len(), first.digest);
        }
        let manifest = match self.skip_manifest_json || self.all_platforms && whole_index {
            true => None,
            false => Some(image::resolve(client, &target, &matcher, &platform).await?.manifest),
        };
        Ok(Image { name: name.to_owned(), target, blobs: survey.blobs, manifest })
    }
}

fn to_file(client: &Client, images: &[Image], archive: &str) -> anyhow::Result<()> {
    if archive == "-" {
        return write(client, images, std::io::stdout().lock(), |_| {});
    }
    let progress = Progress::new();
    // Under another name until it is whole: a failed export leaves nothing that looks like an archive.
    let partial = PathBuf::from(format!("{archive}.partial"));
    let file =
        std::fs::File::create(&partial).with_context(|| format!("cannot create {}", partial.display()))?;
    let written = write(client, images, BufWriter::new(&file), |blob| {
        progress.start("export", short(blob.digest.as_str()), Some(blob.size)).finish("exported");
    });
    let done = written.and_then(|()| {
        file.sync_all()?;
        std::fs::rename(&partial, archive).with_context(|| format!("cannot create {archive}"))
    });
    if done.is_err() {
        let _ = std::fs::remove_file(&partial);
    }
    done
}
