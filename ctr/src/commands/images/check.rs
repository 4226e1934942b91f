//! `ctr images check`.

use clap::Args;
use oci::Platform;
use oci::image::ImageError;
use oci::platform::Matcher;
use proto::containerd::services::images::v1::Image;
use tonic::Code;

use crate::args::Snapshotter;
use crate::client::{Client, code_of};
use crate::output::{self, Table};
use crate::{content, image, unpack};

/// Check that all content of images is there, and whether they are unpacked
#[derive(Debug, Args)]
pub(crate) struct Check {
    /// Print only the names of images that are complete and unpacked
    #[arg(short, long)]
    quiet: bool,
    #[command(flatten)]
    snapshotter: Snapshotter,
    /// Check only those that match one of these, as name~=busybox
    filters: Vec<String>,
}

/// What a check found of one image.
struct Found {
    status: String,
    size: String,
    complete: bool,
}

impl Check {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let snapshotter = client.snapshotter(&self.snapshotter.snapshotter).await?;
        let mut table = Table::new(&["REF", "TYPE", "DIGEST", "STATUS", "SIZE", "UNPACKED"]);
        let mut failed: Option<anyhow::Error> = None;
        // One broken image must not hide the others; the first error is the one to exit with.
        let mut fail = |error: anyhow::Error| match failed {
            None => failed = Some(error),
            Some(_) => eprintln!("ctr: {error:#}"),
        };
        for image in image::list(&client, self.filters).await? {
            let found = check(&client, &image).await.unwrap_or_else(|error| {
                fail(error.context(format!("cannot check image {}", image.name)));
                Found { status: "error".to_owned(), size: "-".to_owned(), complete: false }
            });
            let unpacked = is_unpacked(&client, &image, &snapshotter).await.unwrap_or_else(|error| {
                fail(error.context(format!("cannot tell whether image {} is unpacked", image.name)));
                false
            });
            let target = image.target.unwrap_or_default();
            if !self.quiet {
                let Found { status, size, .. } = found;
                table.row([image.name, target.media_type, target.digest, status, size, unpacked.to_string()]);
            } else if found.complete && unpacked {
                output::line(&image.name)?;
            }
        }
        if !self.quiet {
            table.print()?;
        }
        failed.map_or(Ok(()), Err)
    }
}

/// Counts the blobs of the host's platform.
async fn check(client: &Client, image: &Image) -> anyhow::Result<Found> {
    let host = Platform::host();
    let target = image::target(image)?;
    let manifest = match image::manifest(client, &target, &Matcher::only(&host), &host).await {
        Ok(manifest) => manifest,
        Err(error) if code_of(&error) == Some(Code::NotFound) || is_elsewhere(&error) => {
            let (status, size) = ("unavailable (0/?)", format!("{}/?", output::bytes(0)));
            return Ok(Found { status: status.to_owned(), size, complete: false });
        }
        Err(error) => return Err(error),
    };
    let (mut blobs, mut there) = (0, 0);
    let (mut size, mut size_there) = (0, 0);
    for blob in std::iter::once(&manifest.config).chain(&manifest.layers) {
        (blobs, size) = (blobs + 1, size + blob.size as i64);
        if content::info(client, &blob.digest).await?.is_some() {
            (there, size_there) = (there + 1, size_there + blob.size as i64);
        }
    }
    let complete = there == blobs;
    let word = if complete { "complete" } else { "incomplete" };
    Ok(Found {
        status: format!("{word} ({there}/{blobs})"),
        size: format!("{}/{}", output::bytes(size_there), output::bytes(size)),
        complete,
    })
}

/// Whether the image is for other platforms alone.
fn is_elsewhere(error: &anyhow::Error) -> bool {
    matches!(error.downcast_ref(), Some(ImageError::NoPlatform { .. }))
}

async fn is_unpacked(client: &Client, image: &Image, snapshotter: &str) -> anyhow::Result<bool> {
    let host = Platform::host();
    let resolved = image::resolve(client, &image::target(image)?, &Matcher::only(&host), &host).await?;
    match resolved.chain_ids()?.last() {
        Some(top) => unpack::exists(client, snapshotter, top.as_str()).await,
        None => Ok(true),
    }
}
