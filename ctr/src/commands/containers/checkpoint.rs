//! `ctr containers checkpoint`.

use anyhow::ensure;
use clap::Args;
use proto::containerd::runc::v1::CheckpointOptions;

use crate::checkpoint::{self, Named, Parts};
use crate::client::Client;
use crate::{container, lease};

/// Save a container as an image, from which `ctr containers restore` makes one
#[derive(Debug, Args)]
pub(crate) struct Checkpoint {
    /// Save what it changed of its image's files
    #[arg(long)]
    rw: bool,
    /// Name its image, too, so that both can be exported together
    #[arg(long)]
    image: bool,
    /// Save its processes; needs CRIU on the engine's host
    #[arg(long)]
    task: bool,
    #[arg(value_name = "CONTAINER")]
    id: String,
    /// Name of the new image
    #[arg(value_name = "REF")]
    reference: String,
}

impl Checkpoint {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let container = container::get(&client, &self.id).await?;
        ensure!(
            !container.image.is_empty(),
            "container {} was not made from an image, without which it cannot be restored",
            self.id
        );
        let options = CheckpointOptions { file_locks: true, ..CheckpointOptions::default() };
        let parts = Parts { image: self.image, rw: self.rw, task: self.task.then_some(options) };
        let named = Named { name: self.reference, ..Named::default() };
        let made = lease::within(&client, |client| async move {
            checkpoint::make(&client, &container, parts, named).await
        });
        checkpoint::while_paused(&client, &self.id, false, made).await
    }
}
