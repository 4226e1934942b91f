//! `ctr containers …`.

use std::collections::BTreeMap;
use std::process::ExitCode;

use anyhow::bail;
use clap::{Args, Subcommand};
use prost_types::FieldMask;
use proto::containerd::services::containers::v1::{Container, ListContainersRequest, UpdateContainerRequest};
use proto::containerd::services::tasks::v1::GetRequest;
use proto::containerd::v1::types::Status;
use serde_json::{Value, json};
use tonic::Code;

use crate::args::{Format, Listing, joined, labels};
use crate::client::{Client, Failure, Tried};
use crate::container::{self, SpecArgs};
use crate::output::{self, Table, or_dash};
use crate::process::Process;
use crate::{json as messages, stdio};

mod checkpoint;
mod restore;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Checkpoint(checkpoint::Checkpoint),
    Create(Box<Create>),
    #[command(visible_aliases = ["del", "remove", "rm"])]
    Delete(Delete),
    Info(Info),
    #[command(visible_alias = "ls")]
    List(List),
    Label(Label),
    Restore(restore::Restore),
}

impl Command {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<ExitCode> {
        let done = match self {
            // This may end with the code of a process.
            Command::Restore(command) => return command.run(client).await,
            Command::Checkpoint(command) => command.run(client).await,
            Command::Create(command) => command.run(client).await,
            Command::Delete(command) => command.run(client).await,
            Command::Info(command) => command.run(client).await,
            Command::List(command) => command.run(client).await,
            Command::Label(command) => command.run(client).await,
        };
        done.map(|()| ExitCode::SUCCESS)
    }
}

/// Create a container without starting it
#[derive(Debug, Args)]
#[command(override_usage = "ctr containers create [OPTIONS] IMAGE|ROOTFS ID [COMMAND] [ARG]...")]
pub(crate) struct Create {
    #[command(flatten)]
    spec: SpecArgs,
}

impl Create {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        container::create(&client, &self.spec).await?;
        Ok(())
    }
}

/// Delete containers that do not run
#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Leave the container's snapshot
    #[arg(long)]
    keep_snapshot: bool,
    #[arg(value_name = "CONTAINER", required = true)]
    ids: Vec<String>,
}

impl Delete {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let mut failed = None;
        for id in &self.ids {
            if let Err(error) = delete_one(&client, id, self.keep_snapshot).await {
                // The others are deleted all the same; the first error is the one to exit with.
                match failed {
                    None => failed = Some(error),
                    Some(_) => eprintln!("ctr: {error:#}"),
                }
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

async fn delete_one(client: &Client, id: &str, keep_snapshot: bool) -> anyhow::Result<()> {
    let container = container::get(client, id).await?;
    let request = GetRequest { container_id: id.to_owned(), exec_id: String::new() };
    match client.tasks().get(request).await {
        Ok(answer) => {
            let task = answer.into_inner().process.unwrap_or_default();
            if !matches!(task.status(), Status::Stopped | Status::Created) {
                bail!("container {id} still runs; stop it first with `ctr tasks kill {id}`");
            }
            Process::init(client, id).delete_by_force().await?;
            stdio::remove_leftovers([task.stdin.as_str(), &task.stdout, &task.stderr]);
        }
        Err(status) if status.code() == Code::NotFound => {}
        Err(status) => return Err(Failure::new(format!("look up the task of {id}"), status).into()),
    }
    container::delete(client, &container, keep_snapshot).await
}

/// Show all that is known of a container, as JSON
#[derive(Debug, Args)]
pub(crate) struct Info {
    /// Show only the runtime spec
    #[arg(long)]
    spec: bool,
    #[arg(value_name = "CONTAINER")]
    id: String,
}

impl Info {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let container = container::get(&client, &self.id).await?;
        let spec = container.spec.as_ref().map(messages::of_any).unwrap_or_default();
        if self.spec {
            return messages::print(&spec);
        }
        messages::print(&shown(&container, &spec))
    }
}

/// The keys are those of containerd's ctr, which scripts read.
fn shown(container: &Container, spec: &Value) -> Value {
    let runtime = container.runtime.clone().unwrap_or_default();
    let extensions: BTreeMap<&String, Value> =
        container.extensions.iter().map(|(name, any)| (name, messages::of_any(any))).collect();
    json!({
        "ID": container.id,
        "Labels": container.labels,
        "Image": container.image,
        "Runtime": {"Name": runtime.name, "Options": runtime.options.as_ref().map(messages::of_any)},
        "SnapshotKey": container.snapshot_key,
        "Snapshotter": container.snapshotter,
        "CreatedAt": output::time(container.created_at.as_ref()),
        "UpdatedAt": output::time(container.updated_at.as_ref()),
        "Extensions": extensions,
        "SandboxID": container.sandbox,
        "Spec": spec,
    })
}

/// List containers
#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    listing: Listing,
    /// Show only those that match one of these, as labels.a==b or image==name
    filters: Vec<String>,
}

impl List {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let request = ListContainersRequest { filters: self.filters };
        let containers = client.containers().list(request).await.tried(|| "list containers")?.containers;
        if self.listing.quiet {
            return containers.iter().try_for_each(|container| output::line(&container.id));
        }
        if self.listing.format == Format::Json {
            return messages::print_list(&containers);
        }
        let mut table = Table::spaced(4, 4, &["CONTAINER", "IMAGE", "RUNTIME"]);
        for container in containers {
            let runtime = container.runtime.unwrap_or_default().name;
            table.row([container.id, or_dash(&container.image), runtime]);
        }
        table.print()
    }
}

/// Set labels of a container; an empty value clears one
#[derive(Debug, Args)]
pub(crate) struct Label {
    #[arg(value_name = "CONTAINER")]
    id: String,
    #[arg(value_name = "KEY=VALUE", required = true)]
    labels: Vec<String>,
}

impl Label {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let labels = labels(&self.labels);
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let request = UpdateContainerRequest {
            container: Some(Container { id: self.id.clone(), labels, ..Container::default() }),
            update_mask: Some(FieldMask { paths }),
        };
        let updated =
            client.containers().update(request).await.tried(|| format!("label container {}", self.id))?;
        output::line(joined(&updated.container.unwrap_or_default().labels))
    }
}
