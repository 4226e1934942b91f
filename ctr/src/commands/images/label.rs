//! `ctr images label`.

use clap::Args;
use prost_types::FieldMask;
use proto::containerd::services::images::v1::{Image, UpdateImageRequest};

use crate::args::{joined, labels};
use crate::client::{Client, Tried};
use crate::output;

/// Set labels of an image; an empty value clears one
#[derive(Debug, Args)]
pub(crate) struct Label {
    /// Put these in the place of all labels
    #[arg(short, long)]
    replace_all: bool,
    name: String,
    #[arg(value_name = "KEY=VALUE", required = true)]
    labels: Vec<String>,
}

impl Label {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let labels = labels(&self.labels);
        let paths = match self.replace_all {
            true => vec!["labels".to_owned()],
            false => labels.keys().map(|key| format!("labels.{key}")).collect(),
        };
        let request = UpdateImageRequest {
            image: Some(Image { name: self.name.clone(), labels, ..Image::default() }),
            update_mask: Some(FieldMask { paths }),
            ..UpdateImageRequest::default()
        };
        let updated = client.images().update(request).await.tried(|| format!("label image {}", self.name))?;
        output::line(joined(&updated.image.unwrap_or_default().labels))
    }
}
