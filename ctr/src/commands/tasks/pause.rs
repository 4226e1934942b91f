//! `ctr tasks pause`.

use clap::Args;
use proto::containerd::services::tasks::v1::PauseTaskRequest;

use crate::client::{Client, Tried};

/// Stop every process of a container from running
#[derive(Debug, Args)]
pub(crate) struct Pause {
    #[arg(value_name = "CONTAINER")]
    id: String,
}

impl Pause {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let request = PauseTaskRequest { container_id: self.id.clone() };
        client.tasks().pause(request).await.tried(|| format!("pause task {}", self.id))?;
        Ok(())
    }
}
