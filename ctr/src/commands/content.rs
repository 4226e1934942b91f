//! `ctr content …`: the blobs in the store.

use clap::{Args, Subcommand};
use oci::Digest;
use proto::containerd::services::content::v1::{DeleteContentRequest, ListStatusesRequest};

use crate::args::{Format, Listing, joined, labels};
use crate::client::{Client, Tried};
use crate::content::{self, Wanted, set_labels, write};
use crate::json;
use crate::output::{self, Table, or_dash};

mod edit;
mod fetch;
mod objects;
mod prune;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Active(Active),
    #[command(visible_aliases = ["del", "remove", "rm"])]
    Delete(Delete),
    Edit(edit::Edit),
    Fetch(Box<fetch::Fetch>),
    FetchBlob(Box<objects::FetchBlob>),
    FetchObject(Box<objects::FetchObject>),
    Get(Get),
    Ingest(Ingest),
    Label(Label),
    #[command(visible_alias = "ls")]
    List(List),
    /// Let go of what is kept
    #[command(subcommand)]
    Prune(prune::Prune),
    PushObject(Box<objects::PushObject>),
}

impl Command {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        match self {
            Command::Active(command) => command.run(client).await,
            Command::Delete(command) => command.run(client).await,
            Command::Edit(command) => command.run(client).await,
            Command::Fetch(command) => command.run(client).await,
            Command::FetchBlob(command) => command.run(client).await,
            Command::FetchObject(command) => command.run(client).await,
            Command::Get(command) => command.run(client).await,
            Command::Ingest(command) => command.run(client).await,
            Command::Label(command) => command.run(client).await,
            Command::List(command) => command.run(client).await,
            Command::Prune(command) => command.run(client).await,
            Command::PushObject(command) => command.run(client).await,
        }
    }
}

/// List ingests: writes that are not yet committed
#[derive(Debug, Args)]
pub(crate) struct Active {
    #[command(flatten)]
    listing: Listing,
    /// Show only those that match one of these, as ref~=^layer
    filters: Vec<String>,
}

impl Active {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let request = ListStatusesRequest { filters: self.filters };
        let statuses = client.content().list_statuses(request).await.tried(|| "list ingests")?.statuses;
        if self.listing.quiet {
            return statuses.iter().try_for_each(|status| output::line(&status.r#ref));
        }
        if self.listing.format == Format::Json {
            return json::print_list(&statuses);
        }
        let mut table = Table::new(&["REF", "SIZE", "AGE"]);
        for status in statuses {
            let age = output::age(status.started_at.as_ref());
            table.row([status.r#ref, output::decimal_bytes(status.offset), age]);
        }
        table.print()
    }
}

/// Delete blobs, whether or not anything needs them
#[derive(Debug, Args)]
pub(crate) struct Delete {
    #[arg(value_name = "DIGEST", required = true)]
    digests: Vec<Digest>,
}

impl Delete {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        for digest in self.digests {
            let request = DeleteContentRequest { digest: digest.to_string() };
            client.content().delete(request).await.tried(|| format!("delete content {digest}"))?;
            output::line(&digest)?;
        }
        Ok(())
    }
}

/// Write a blob to stdout
#[derive(Debug, Args)]
pub(crate) struct Get {
    digest: Digest,
}

impl Get {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        content::to_stdout(&client, self.digest.as_str()).await
    }
}

/// Store a blob from stdin
#[derive(Debug, Args)]
pub(crate) struct Ingest {
    /// Store it only if it has this size, in bytes
    #[arg(long, value_name = "BYTES")]
    expected_size: Option<u64>,
    /// Store it only if it has this digest
    #[arg(long, value_name = "DIGEST")]
    expected_digest: Option<Digest>,
    /// Label the blob; without labels that keep it, it goes with the next collection
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Name of the ingest, under which two writers exclude each other
    #[arg(value_name = "REF")]
    reference: String,
}

impl Ingest {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let wanted = Wanted {
            name: None,
            reference: Some(self.reference),
            size: self.expected_size,
            digest: self.expected_digest,
            labels: labels(&self.label),
        };
        let written = tokio::task::spawn_blocking(move || {
            write(&client, &mut std::io::stdin().lock(), &wanted, |_| {})
        })
        .await??;
        output::line(&written)
    }
}

/// Set labels of a blob; an empty value clears one
#[derive(Debug, Args)]
pub(crate) struct Label {
    digest: Digest,
    #[arg(value_name = "KEY=VALUE", required = true)]
    labels: Vec<String>,
}

impl Label {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        output::line(joined(&set_labels(&client, &self.digest, labels(&self.labels)).await?))
    }
}

/// List blobs
#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    listing: Listing,
    /// Show only those that match one of these, as labels."containerd.io/uncompressed"~=.
    filters: Vec<String>,
}

impl List {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let blobs = content::list(&client, self.filters).await?;
        if self.listing.quiet {
            return blobs.iter().try_for_each(|blob| output::line(&blob.digest));
        }
        if self.listing.format == Format::Json {
            return json::print_list(&blobs);
        }
        let mut table = Table::new(&["DIGEST", "SIZE", "AGE", "LABELS"]);
        for blob in blobs {
            let age = output::age(blob.created_at.as_ref());
            table.row([blob.digest, output::decimal_bytes(blob.size), age, or_dash(&joined(&blob.labels))]);
        }
        table.print()
    }
}
