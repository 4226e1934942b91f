//! `ctr tasks checkpoint`.

use std::path::PathBuf;
use std::time::SystemTime;

use clap::Args;
use proto::containerd::runc::v1::CheckpointOptions;
use proto::containerd::services::tasks::v1::CheckpointTaskRequest;
use time::OffsetDateTime;
use time::macros::format_description;

use crate::checkpoint::{self, Named, Parts};
use crate::client::{Client, Tried};
use crate::{container, lease, output};

/// Save a container with its processes as an image, or the processes to a folder; needs CRIU on the engine's host
#[derive(Debug, Args)]
pub(crate) struct Checkpoint {
    /// Stop the container once it is saved
    #[arg(long)]
    exit: bool,
    /// Save the processes alone, to this folder [default: an image, whose name is printed]
    #[arg(long, value_name = "FOLDER")]
    image_path: Option<PathBuf>,
    /// Folder for CRIU's work files and logs
    #[arg(long, value_name = "FOLDER")]
    work_path: Option<PathBuf>,
    #[arg(value_name = "CONTAINER")]
    id: String,
}

impl Checkpoint {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        // The engine and its shims work in other folders than we do.
        let absolute =
            |path: PathBuf| Ok::<_, std::io::Error>(std::path::absolute(path)?.display().to_string());
        let options = CheckpointOptions {
            exit: self.exit,
            image_path: self.image_path.map(absolute).transpose()?.unwrap_or_default(),
            work_path: self.work_path.map(absolute).transpose()?.unwrap_or_default(),
            ..CheckpointOptions::default()
        };
        if !options.image_path.is_empty() {
            let request = CheckpointTaskRequest {
                container_id: self.id.clone(),
                options: Some(proto::any::pack(&options)),
                ..CheckpointTaskRequest::default()
            };
            client.tasks().checkpoint(request).await.tried(|| format!("checkpoint task {}", self.id))?;
            return Ok(());
        }
        let container = container::get(&client, &self.id).await?;
        let now = OffsetDateTime::from(SystemTime::now());
        let now = now.format(format_description!("[month]-[day]-[year]-[hour]:[minute]:[second]"))?;
        let name = format!("containerd.io/checkpoint/{}:{now}", self.id);
        let parts = Parts {
            image: !container.image.is_empty(),
            rw: !container.snapshot_key.is_empty(),
            task: Some(options),
        };
        let named = Named {
            name: name.clone(),
            labels: [("containerd.io/checkpoint".to_owned(), "true".to_owned())].into(),
            annotations: [("image.name".to_owned(), container.image.clone())].into(),
        };
        let made = lease::within(&client, |client| async move {
            checkpoint::make(&client, &container, parts, named).await
        });
        checkpoint::while_paused(&client, &self.id, self.exit, made).await?;
        output::line(name)
    }
}
