//! `ctr namespaces …`.

use clap::{Args, Subcommand};
use prost_types::FieldMask;
use proto::containerd::services::namespaces::v1::{
    CreateNamespaceRequest, DeleteNamespaceRequest, ListNamespacesRequest, Namespace, UpdateNamespaceRequest,
};

use crate::args::{Format, Listing, joined, labels};
use crate::client::{Client, Tried};
use crate::json;
use crate::output::{self, Table};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(visible_alias = "c")]
    Create(Create),
    Label(Label),
    #[command(visible_alias = "ls")]
    List(List),
    #[command(visible_aliases = ["rm", "delete"])]
    Remove(Remove),
}

impl Command {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        match self {
            Command::Create(command) => command.run(client).await,
            Command::Label(command) => command.run(client).await,
            Command::List(command) => command.run(client).await,
            Command::Remove(command) => command.run(client).await,
        }
    }
}

/// Create a namespace
#[derive(Debug, Args)]
pub(crate) struct Create {
    name: String,
    #[arg(value_name = "KEY=VALUE")]
    labels: Vec<String>,
}

impl Create {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let namespace = Namespace { name: self.name.clone(), labels: labels(&self.labels) };
        let request = CreateNamespaceRequest { namespace: Some(namespace) };
        client.namespaces().create(request).await.tried(|| format!("create namespace {}", self.name))?;
        Ok(())
    }
}

/// Set labels of a namespace; an empty value clears one
#[derive(Debug, Args)]
pub(crate) struct Label {
    name: String,
    #[arg(value_name = "KEY=VALUE", required = true)]
    labels: Vec<String>,
}

impl Label {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let labels = labels(&self.labels);
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let request = UpdateNamespaceRequest {
            namespace: Some(Namespace { name: self.name.clone(), labels }),
            update_mask: Some(FieldMask { paths }),
        };
        client.namespaces().update(request).await.tried(|| format!("label namespace {}", self.name))?;
        Ok(())
    }
}

/// List namespaces
#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    listing: Listing,
}

impl List {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let request = ListNamespacesRequest::default();
        let namespaces = client.namespaces().list(request).await.tried(|| "list namespaces")?.namespaces;
        if self.listing.quiet {
            return namespaces.iter().try_for_each(|namespace| output::line(&namespace.name));
        }
        if self.listing.format == Format::Json {
            return json::print_list(&namespaces);
        }
        let mut table = Table::new(&["NAME", "LABELS"]);
        for namespace in namespaces {
            table.row([namespace.name, joined(&namespace.labels)]);
        }
        table.print()
    }
}

/// Remove namespaces, which must be empty
#[derive(Debug, Args)]
pub(crate) struct Remove {
    /// Also remove the namespace's cgroup
    #[arg(short, long)]
    cgroup: bool,
    #[arg(required = true)]
    names: Vec<String>,
}

impl Remove {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        for name in self.names {
            let request = DeleteNamespaceRequest { name: name.clone() };
            client.namespaces().delete(request).await.tried(|| format!("remove namespace {name}"))?;
            if self.cgroup {
                remove_cgroups(&name);
            }
            output::line(&name)?;
        }
        Ok(())
    }
}

/// Removes the namespace's now empty folder from every hierarchy; the kernel keeps one that is in use.
fn remove_cgroups(name: &str) {
    let root = std::path::Path::new("/sys/fs/cgroup");
    let hierarchies = std::fs::read_dir(root).into_iter().flatten().flatten().map(|entry| entry.path());
    for hierarchy in std::iter::once(root.to_owned()).chain(hierarchies) {
        let _ = std::fs::remove_dir(hierarchy.join(name));
    }
}
