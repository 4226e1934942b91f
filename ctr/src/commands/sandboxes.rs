//! `ctr sandboxes …`: records by the sandbox store, what runs by the controller.
//!
//! The controller is the one that the record names; without a name, the one that drives shims.

use std::path::PathBuf;

use anyhow::Context;
use clap::{Args, Subcommand};
use oci::runtime::Spec;
use proto::containerd::services::sandbox::v1::{
    ControllerCreateRequest, ControllerShutdownRequest, ControllerStartRequest, ControllerStopRequest,
    StoreCreateRequest, StoreDeleteRequest, StoreGetRequest, StoreListRequest,
};
use proto::containerd::types::Sandbox;
use proto::containerd::types::sandbox::Runtime;
use serde_json::json;
use tonic::Code;

use crate::args::{Format, Listing, labels};
use crate::client::{Client, Failure, Tried};
use crate::container::RuntimeArgs;
use crate::json as messages;
use crate::lease::unless_interrupted;
use crate::output::{self, Table};

/// What drives sandboxes by their shims.
const CONTROLLER: &str = "shim";

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(visible_alias = "i")]
    Info(Info),
    #[command(visible_alias = "ls")]
    List(List),
    #[command(visible_aliases = ["rm", "delete", "del"])]
    Remove(Remove),
    #[command(visible_aliases = ["create", "c", "r"])]
    Run(Run),
}

impl Command {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        match self {
            Command::Info(command) => command.run(client).await,
            Command::List(command) => command.run(client).await,
            Command::Remove(command) => command.run(client).await,
            Command::Run(command) => command.run(client).await,
        }
    }
}

/// Create a sandbox and start it
#[derive(Debug, Args)]
pub(crate) struct Run {
    #[command(flatten)]
    runtime: RuntimeArgs,
    /// Label the sandbox
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// The sandbox's runtime spec, a file
    #[arg(value_name = "FILE")]
    spec: PathBuf,
    #[arg(value_name = "ID")]
    id: String,
}

impl Run {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let spec =
            std::fs::read(&self.spec).with_context(|| format!("cannot read spec {}", self.spec.display()))?;
        let _: Spec = serde_json::from_slice(&spec)
            .with_context(|| format!("{} is not a runtime spec", self.spec.display()))?;
        let runtime = self.runtime.resolve(&client, false).await?;
        let sandbox = Sandbox {
            sandbox_id: self.id.clone(),
            runtime: Some(Runtime { name: runtime.name, options: runtime.options }),
            spec: Some(proto::any::wrap(proto::any::SPEC, spec)),
            labels: labels(&self.label),
            sandboxer: CONTROLLER.to_owned(),
            ..Sandbox::default()
        };
        let request = StoreCreateRequest { sandbox: Some(sandbox.clone()) };
        let created = client.sandboxes().create(request).await;
        let sandbox = created.tried(|| format!("create sandbox {}", self.id))?.sandbox.unwrap_or(sandbox);
        let started = unless_interrupted(self.start(&client, sandbox)).await;
        if started.is_err() {
            // The first error is the one that tells something.
            let _ = remove(&client, &self.id, true).await;
        }
        started?;
        output::line(&self.id)
    }

    async fn start(&self, client: &Client, sandbox: Sandbox) -> anyhow::Result<()> {
        let id = &self.id;
        let request = ControllerCreateRequest {
            sandbox_id: id.clone(),
            sandboxer: sandbox.sandboxer.clone(),
            sandbox: Some(sandbox.clone()),
            ..ControllerCreateRequest::default()
        };
        client
            .sandbox_controller()
            .create(request)
            .await
            .tried(|| format!("make the shim of sandbox {id}"))?;
        let request = ControllerStartRequest { sandbox_id: id.clone(), sandboxer: sandbox.sandboxer };
        client.sandbox_controller().start(request).await.tried(|| format!("start sandbox {id}"))?;
        Ok(())
    }
}

/// List sandboxes
#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    listing: Listing,
    /// Show only those that match one of these, as labels.a==b
    #[arg(long = "filters", value_name = "FILTER")]
    more: Vec<String>,
    /// The same
    filters: Vec<String>,
}

impl List {
    async fn run(mut self, client: Client) -> anyhow::Result<()> {
        self.filters.append(&mut self.more);
        let request = StoreListRequest { filters: self.filters };
        let sandboxes = client.sandboxes().list(request).await.tried(|| "list sandboxes")?.list;
        if self.listing.quiet {
            return sandboxes.iter().try_for_each(|sandbox| output::line(&sandbox.sandbox_id));
        }
        if self.listing.format == Format::Json {
            return messages::print_list(&sandboxes);
        }
        let mut table = Table::new(&["ID", "CREATED", "RUNTIME"]);
        for sandbox in sandboxes {
            let created = output::time(sandbox.created_at.as_ref());
            table.row([sandbox.sandbox_id, created, sandbox.runtime.unwrap_or_default().name]);
        }
        table.print()
    }
}

/// Stop sandboxes and remove them
#[derive(Debug, Args)]
pub(crate) struct Remove {
    /// Remove it even where it cannot be stopped
    #[arg(short, long)]
    force: bool,
    #[arg(value_name = "ID", required = true)]
    ids: Vec<String>,
}

impl Remove {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let mut failed: Option<anyhow::Error> = None;
        for id in self.ids {
            match remove(&client, &id, self.force).await {
                Ok(()) => output::line(&id)?,
                Err(error) => match failed {
                    None => failed = Some(error),
                    Some(_) => eprintln!("ctr: {error:#}"),
                },
            }
        }
        failed.map_or(Ok(()), Err)
    }
}

async fn remove(client: &Client, id: &str, force: bool) -> anyhow::Result<()> {
    let mut sandboxer = get(client, id).await?.sandboxer;
    if sandboxer.is_empty() {
        sandboxer = CONTROLLER.to_owned();
    }
    let mut controller = client.sandbox_controller();
    let request =
        ControllerStopRequest { sandbox_id: id.to_owned(), timeout_secs: 0, sandboxer: sandboxer.clone() };
    let stopped = ended(controller.stop(request).await);
    if let Err(status) = stopped {
        let failure = Failure::new(format!("stop sandbox {id}"), status);
        if !force {
            return Err(anyhow::Error::from(failure).context("remove it all the same with --force"));
        }
        eprintln!("ctr: {failure}");
    }
    let request = ControllerShutdownRequest { sandbox_id: id.to_owned(), sandboxer };
    if let Err(status) = ended(controller.shutdown(request).await) {
        let failure = Failure::new(format!("shut down sandbox {id}"), status);
        if !force {
            return Err(failure.into());
        }
        eprintln!("ctr: {failure}");
    }
    let request = StoreDeleteRequest { sandbox_id: id.to_owned() };
    match client.sandboxes().delete(request).await {
        Ok(_) => Ok(()),
        // The controller may have removed the record with the rest.
        Err(status) if status.code() == Code::NotFound => Ok(()),
        Err(status) => Err(Failure::new(format!("remove sandbox {id}"), status).into()),
    }
}

/// What does not run, or is not even known to the controller, has ended.
fn ended<T>(answer: Result<T, tonic::Status>) -> Result<(), tonic::Status> {
    match answer {
        Err(status) if !matches!(status.code(), Code::NotFound | Code::Unimplemented) => Err(status),
        _ => Ok(()),
    }
}

async fn get(client: &Client, id: &str) -> anyhow::Result<Sandbox> {
    let request = StoreGetRequest { sandbox_id: id.to_owned() };
    let answer = client.sandboxes().get(request).await;
    Ok(answer.tried(|| format!("find sandbox {id}"))?.sandbox.unwrap_or_default())
}

/// Show all that is known of a sandbox, as JSON
#[derive(Debug, Args)]
pub(crate) struct Info {
    id: String,
}

impl Info {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let sandbox = get(&client, &self.id).await?;
        let runtime = sandbox.runtime.unwrap_or_default();
        let extensions: serde_json::Map<String, serde_json::Value> =
            sandbox.extensions.iter().map(|(name, any)| (name.clone(), messages::of_any(any))).collect();
        // The keys are those of containerd's ctr, which scripts read.
        messages::print(&json!({
            "ID": sandbox.sandbox_id,
            "Labels": sandbox.labels,
            "Runtime": {"Name": runtime.name, "Options": runtime.options.as_ref().map(messages::of_any)},
            "Spec": sandbox.spec.as_ref().map(messages::of_any),
            "Sandboxer": sandbox.sandboxer,
            "CreatedAt": output::time(sandbox.created_at.as_ref()),
            "UpdatedAt": output::time(sandbox.updated_at.as_ref()),
            "Extensions": extensions,
        }))
    }
}
