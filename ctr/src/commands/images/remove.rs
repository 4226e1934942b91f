//! `ctr images remove`.

use clap::Args;
use proto::containerd::services::images::v1::DeleteImageRequest;
use tonic::Code;

use crate::client::{Client, Failure};
use crate::output;

/// Remove images by name; their content goes with the next collection
#[derive(Debug, Args)]
pub(crate) struct Remove {
    /// Return when all that only these images kept has been removed
    #[arg(long)]
    sync: bool,
    #[arg(value_name = "IMAGE", required = true)]
    names: Vec<String>,
}

impl Remove {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let last = self.names.len() - 1;
        let mut failed: Option<anyhow::Error> = None;
        for (number, name) in self.names.into_iter().enumerate() {
            let request =
                DeleteImageRequest { name: name.clone(), sync: self.sync && number == last, target: None };
            match client.images().delete(request).await {
                Ok(_) => output::line(&name)?,
                // As containerd's ctr: what is gone is what was wanted.
                Err(status) if status.code() == Code::NotFound => eprintln!("ctr: there is no image {name}"),
                Err(status) => {
                    let error = Failure::new(format!("remove image {name}"), status);
                    match failed {
                        None => failed = Some(error.into()),
                        Some(_) => eprintln!("ctr: {error}"),
                    }
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }
}
