//! `ctr tasks delete`.

use std::process::ExitCode;

use anyhow::ensure;
use clap::Args;
use proto::containerd::services::tasks::v1::GetRequest;
use proto::containerd::v1::types::Status;

use crate::client::{Client, Tried};
use crate::process::{Process, exit_code};
use crate::stdio::remove_leftovers;

/// Delete tasks that have ended
///
/// With --exec-id, deletes that process and exits with its code.
#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Kill the process first
    #[arg(short, long)]
    force: bool,
    /// Delete this exec instead of the task
    #[arg(long, value_name = "ID")]
    exec_id: Option<String>,
    #[arg(value_name = "CONTAINER", required = true)]
    ids: Vec<String>,
}

impl Delete {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<ExitCode> {
        if let Some(exec) = &self.exec_id {
            ensure!(self.ids.len() == 1, "--exec-id goes with one container");
            let status = self.delete(&client, &self.ids[0], exec).await?;
            return Ok(exit_code(status));
        }
        let mut failed = None;
        for id in &self.ids {
            match self.delete(&client, id, "").await {
                Ok(0) => {}
                Ok(status) => eprintln!("ctr: task {id} ended with exit code {status}"),
                Err(error) => match failed {
                    None => failed = Some(error),
                    Some(_) => eprintln!("ctr: {error:#}"),
                },
            }
        }
        failed.map_or(Ok(ExitCode::SUCCESS), Err)
    }

    async fn delete(&self, client: &Client, id: &str, exec: &str) -> anyhow::Result<u32> {
        let request = GetRequest { container_id: id.to_owned(), exec_id: exec.to_owned() };
        let found = client.tasks().get(request).await.tried(|| format!("find task {id}"))?;
        let found = found.process.unwrap_or_default();
        let process = Process::exec(client, id, exec);
        let status = if self.force {
            process.delete_by_force().await?.unwrap_or_default()
        } else {
            ensure!(
                !matches!(found.status(), Status::Running | Status::Pausing | Status::Paused),
                "cannot delete task {id}: it still runs; stop it with `ctr tasks kill {id}`, or use --force"
            );
            process.delete().await?
        };
        remove_leftovers([found.stdin.as_str(), &found.stdout, &found.stderr]);
        Ok(status)
    }
}
