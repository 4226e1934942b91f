//! `ctr images tag`.

use anyhow::Context;
use clap::Args;
use prost_types::FieldMask;
use proto::containerd::services::images::v1::{CreateImageRequest, UpdateImageRequest};
use tonic::Code;

use crate::client::{Client, Failure, Tried};
use crate::{image, output};

/// Give an image further names
#[derive(Debug, Args)]
pub(crate) struct Tag {
    /// Take names that other images have
    #[arg(long)]
    force: bool,
    /// Take names that are no references, too
    #[arg(long)]
    skip_reference_check: bool,
    /// Accepted for containerd's sake: tag always runs in ctr
    #[arg(long, hide = true)]
    local: bool,
    #[arg(value_name = "SOURCE")]
    source: String,
    #[arg(value_name = "TARGET", required = true)]
    targets: Vec<String>,
}

impl Tag {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        for name in self.targets.iter().filter(|_| !self.skip_reference_check) {
            oci::Reference::parse_normalized(name).with_context(|| {
                format!("{name:?} is not a reference; take it all the same with --skip-reference-check")
            })?;
        }
        let found = image::get(&client, &self.source).await?;
        for name in self.targets {
            let mut tagged = found.clone();
            tagged.name.clone_from(&name);
            (tagged.created_at, tagged.updated_at) = (None, None);
            let request = CreateImageRequest { image: Some(tagged), ..CreateImageRequest::default() };
            match client.images().create(request.clone()).await {
                Ok(_) => {}
                Err(status) if status.code() == Code::AlreadyExists && self.force => {
                    let request = UpdateImageRequest {
                        image: request.image,
                        update_mask: Some(FieldMask { paths: vec!["target".into(), "labels".into()] }),
                        ..UpdateImageRequest::default()
                    };
                    client.images().update(request).await.tried(|| format!("replace image {name}"))?;
                }
                Err(status) if status.code() == Code::AlreadyExists => {
                    let failure = Failure::new(format!("tag image {name}"), status);
                    return Err(
                        anyhow::Error::from(failure).context("the name is taken; replace it with --force")
                    );
                }
                Err(status) => return Err(Failure::new(format!("tag image {name}"), status).into()),
            }
            output::line(&name)?;
        }
        Ok(())
    }
}
