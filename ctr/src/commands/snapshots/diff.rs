//! `ctr snapshots diff`: what one snapshot changed against another, as a layer.

use clap::Args;
use proto::containerd::services::diff::v1::DiffRequest;

use crate::args::labels;
use crate::client::Client;
use crate::{content, difference, lease, output};

/// Write what changed between two snapshots to stdout, as a layer
#[derive(Debug, Args)]
pub(super) struct Diff {
    /// Media type of the layer
    #[arg(long, value_name = "TYPE", default_value = oci::image::media_type::OCI_LAYER_GZIP)]
    media_type: String,
    /// Name of the ingest the layer is written by [default: made up]
    #[arg(long, value_name = "REF", default_value = "", hide_default_value = true)]
    r#ref: String,
    /// Keep the layer in the store; removing it is then up to you
    #[arg(long)]
    keep: bool,
    /// Label the layer
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// The snapshot to compare; alone, the changed one
    first: String,
    /// The changed snapshot [default: FIRST, compared to its parent]
    second: Option<String>,
}

impl Diff {
    pub(super) async fn run(self, client: Client, snapshotter: String) -> anyhow::Result<()> {
        let mut labels = labels(&self.label);
        if self.keep {
            let now = output::time(Some(&std::time::SystemTime::now().into()));
            labels.insert("containerd.io/gc.root".to_owned(), now);
        }
        let request =
            DiffRequest { media_type: self.media_type, r#ref: self.r#ref, labels, ..DiffRequest::default() };
        let (from, to) = match self.second {
            Some(second) => (Some(self.first), second),
            None => (None, self.first),
        };
        lease::within(&client, |client| async move {
            let layer = difference::compare(&client, &snapshotter, from.as_deref(), &to, request).await?;
            content::to_stdout(&client, &layer.digest).await
        })
        .await
    }
}
