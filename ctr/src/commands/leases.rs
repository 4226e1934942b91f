//! `ctr leases …`.

use std::time::Duration;

use clap::{Args, Subcommand};
use proto::containerd::services::leases::v1::{CreateRequest, DeleteRequest, ListRequest};

use crate::args::{Format, Listing, joined, labels, parse_duration};
use crate::client::{Client, Tried};
use crate::json;
use crate::lease::{EXPIRE_LABEL, expiry, unique};
use crate::output::{self, Table, or_dash};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(visible_alias = "ls")]
    List(List),
    Create(Create),
    #[command(visible_aliases = ["del", "remove", "rm"])]
    Delete(Delete),
}

impl Command {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        match self {
            Command::List(command) => command.run(client).await,
            Command::Create(command) => command.run(client).await,
            Command::Delete(command) => command.run(client).await,
        }
    }
}

/// List leases
#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    listing: Listing,
    /// Show only those that match one of these, as labels.a==b
    filters: Vec<String>,
}

impl List {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let leases = client.leases().list(ListRequest { filters: self.filters }).await;
        let leases = leases.tried(|| "list leases")?.leases;
        if self.listing.quiet {
            return leases.iter().try_for_each(|lease| output::line(&lease.id));
        }
        if self.listing.format == Format::Json {
            return json::print_list(&leases);
        }
        let mut table = Table::new(&["ID", "CREATED AT", "LABELS"]);
        for lease in leases {
            let created = output::seconds(lease.created_at.as_ref());
            table.row([lease.id, created, or_dash(&joined(&lease.labels))]);
        }
        table.print()
    }
}

/// Create a lease and print its id
#[derive(Debug, Args)]
pub(crate) struct Create {
    /// Id of the lease [default: made up]
    #[arg(long)]
    id: Option<String>,
    /// When the lease ends by itself; 0 is never
    #[arg(short = 'x', long, value_name = "DURATION", default_value = "24h", value_parser = parse_duration)]
    expires: Duration,
    #[arg(value_name = "KEY=VALUE")]
    labels: Vec<String>,
}

impl Create {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let mut labels = labels(&self.labels);
        if !self.expires.is_zero() {
            labels.insert(EXPIRE_LABEL.to_owned(), expiry(self.expires)?);
        }
        let id = self.id.unwrap_or_else(|| unique("lease"));
        let created =
            client.leases().create(CreateRequest { id, labels }).await.tried(|| "create a lease")?;
        output::line(created.lease.unwrap_or_default().id)
    }
}

/// Delete leases
#[derive(Debug, Args)]
pub(crate) struct Delete {
    /// Return when what only these leases kept has been removed
    #[arg(long)]
    sync: bool,
    #[arg(required = true)]
    ids: Vec<String>,
}

impl Delete {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let last = self.ids.len() - 1;
        for (number, id) in self.ids.into_iter().enumerate() {
            let request = DeleteRequest { id: id.clone(), sync: self.sync && number == last };
            client.leases().delete(request).await.tried(|| format!("delete lease {id}"))?;
            output::line(&id)?;
        }
        Ok(())
    }
}
