//! `ctr images list`.

use clap::Args;
use oci::Platform;
use oci::platform::Matcher;

use crate::args::{Format, Listing, joined};
use crate::client::Client;
use crate::image::{self, Survey, survey, target};
use crate::json;
use crate::output::{self, Table, or_dash};

/// List images
#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    listing: Listing,
    /// Show only those that match one of these, as name~=busybox
    filters: Vec<String>,
}

impl List {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let images = image::list(&client, self.filters).await?;
        if self.listing.quiet {
            return images.iter().try_for_each(|image| output::line(&image.name));
        }
        if self.listing.format == Format::Json {
            return json::print_list(&images);
        }
        let mut table = Table::new(&["REF", "TYPE", "DIGEST", "SIZE", "PLATFORMS", "LABELS"]);
        let host = Matcher::only(&Platform::host());
        for image in images {
            // One image whose documents are gone or broken must not hide the others.
            let found = match target(&image) {
                Ok(target) => survey(&client, &target, &host).await,
                Err(error) => Err(error),
            };
            let found = found.unwrap_or_else(|error| {
                eprintln!("ctr: image {}: {error:#}", image.name);
                Survey::default()
            });
            let platforms = found.platforms.into_iter().collect::<Vec<_>>().join(",");
            let target = image.target.unwrap_or_default();
            table.row([
                image.name,
                target.media_type,
                target.digest,
                output::bytes(found.size),
                or_dash(&platforms),
                or_dash(&joined(&image.labels)),
            ]);
        }
        table.print()
    }
}
