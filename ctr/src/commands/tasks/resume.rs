//! `ctr tasks resume`.

use clap::Args;
use proto::containerd::services::tasks::v1::ResumeTaskRequest;

use crate::client::{Client, Tried};

/// Let a paused container go on
#[derive(Debug, Args)]
pub(crate) struct Resume {
    #[arg(value_name = "CONTAINER")]
    id: String,
}

impl Resume {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let request = ResumeTaskRequest { container_id: self.id.clone() };
        client.tasks().resume(request).await.tried(|| format!("resume task {}", self.id))?;
        Ok(())
    }
}
