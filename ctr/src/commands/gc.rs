//! `ctr gc`.

use clap::Args;
use proto::gantry::gc::v1::{CollectRequest, ExplainRequest};
use serde_json::{Value, json};

use crate::args::Format;
use crate::client::{Client, Tried};
use crate::json as messages;
use crate::output::{self, Table};

/// Collect garbage now, or say why something is kept
///
/// Removes what no container, image, lease or label holds, in all namespaces, and shows how much that was. The engine does
/// so by itself, too. With --explain nothing is removed. An engine other than gantryd does not know this command.
#[derive(Debug, Args)]
pub(crate) struct Gc {
    /// Show what holds this: a digest, an image, a lease, a container, an ingest, or the key of a snapshot
    #[arg(long, value_name = "DIGEST|KEY")]
    explain: Option<String>,
    /// Snapshotter of the snapshot to explain; without it the key may name anything
    #[arg(long, value_name = "NAME", requires = "explain", default_value = "", hide_default_value = true)]
    snapshotter: String,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Gc {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        match &self.explain {
            Some(key) => self.explain(&client, key).await,
            None => self.collect(&client).await,
        }
    }

    async fn collect(&self, client: &Client) -> anyhow::Result<()> {
        let went = client.gc().collect(CollectRequest {}).await.tried(|| "collect garbage")?;
        let took = went.took.and_then(|took| std::time::Duration::try_from(took).ok()).unwrap_or_default();
        let counts = [
            ("content", went.content),
            ("snapshots", went.snapshots),
            ("images", went.images),
            ("leases", went.leases),
            ("ingests", went.ingests),
        ];
        if self.format == Format::Json {
            let mut all: serde_json::Map<String, Value> =
                counts.iter().map(|(kind, count)| ((*kind).to_owned(), (*count).into())).collect();
            all.insert("milliseconds".into(), (took.as_secs_f64() * 1000.0).into());
            return messages::print(&all.into());
        }
        let mut table = Table::new(&["KIND", "REMOVED"]);
        for (kind, count) in counts {
            table.row([kind.to_owned(), count.to_string()]);
        }
        table.print()?;
        output::line(format!("in {took:.1?}"))
    }

    async fn explain(&self, client: &Client, key: &str) -> anyhow::Result<()> {
        let request = ExplainRequest { key: key.to_owned(), snapshotter: self.snapshotter.clone() };
        let answer = client.gc().explain(request).await.tried(|| format!("explain {key}"))?;
        if !answer.found {
            let what = match self.snapshotter.as_str() {
                "" => key.to_owned(),
                snapshotter => format!("snapshot {key} of {snapshotter}"),
            };
            anyhow::bail!("there is no {what} in namespace {}", client.namespace());
        }
        if self.format == Format::Json {
            let chain: Vec<Value> = answer
                .chain
                .iter()
                .map(|step| json!({"kind": step.kind, "id": step.id, "why": step.why}))
                .collect();
            return messages::print(&json!({"held": answer.held, "chain": chain}));
        }
        let mut table = Table::new(&["KIND", "ID", "WHY"]);
        for step in answer.chain {
            table.row([step.kind, step.id, step.why]);
        }
        table.print()
    }
}
