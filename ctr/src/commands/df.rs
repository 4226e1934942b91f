//! `ctr df`.

use clap::Args;
use proto::gantry::images::v1::{DiskUsageRequest, Space};
use serde_json::{Value, json};

use crate::args::Format;
use crate::client::{Client, Tried};
use crate::json as messages;
use crate::output::{self, Table};

/// Show where the bytes are, and what could be had back
///
/// RECLAIMABLE is what `ctr images prune --all` in each namespace would free. A blob that several namespaces have is on disk
/// once, and counts once in the total. An engine other than gantryd does not know this command.
#[derive(Debug, Args)]
pub(crate) struct Df {
    /// Show each namespace besides
    #[arg(short, long)]
    verbose: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Df {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let request = DiskUsageRequest {};
        let usage = client.image_care().disk_usage(request).await.tried(|| "see where the bytes are")?;
        let shown: Vec<&Space> =
            usage.spaces.iter().filter(|space| self.verbose || space.namespace.is_empty()).collect();
        if self.format == Format::Json {
            let space = |space: &&Space| {
                json!({
                    "namespace": space.namespace, "kind": space.kind, "name": space.name, "count": space.count,
                    "active": space.active, "bytes": space.bytes, "reclaimable": space.reclaimable,
                })
            };
            let systems = usage
                .file_systems
                .iter()
                .map(|system| json!({"path": system.path, "size": system.size, "free": system.free}));
            return messages::print(&json!({
                "spaces": shown.iter().map(space).collect::<Vec<Value>>(),
                "fileSystems": systems.collect::<Vec<Value>>(),
            }));
        }
        let heading = ["KIND", "COUNT", "ACTIVE", "SIZE", "RECLAIMABLE"];
        let row = |space: &Space| {
            let name = if space.name.is_empty() { String::new() } else { format!("/{}", space.name) };
            let bytes = |bytes: u64| output::bytes(bytes as i64);
            [
                format!("{}{name}", space.kind),
                space.count.to_string(),
                space.active.to_string(),
                bytes(space.bytes),
                bytes(space.reclaimable),
            ]
        };
        if self.verbose {
            let mut table = Table::new(&["NAMESPACE", "KIND", "COUNT", "ACTIVE", "SIZE", "RECLAIMABLE"]);
            for space in &shown {
                let [kind, count, active, size, reclaimable] = row(space);
                let namespace = if space.namespace.is_empty() { "(total)" } else { &space.namespace };
                table.row([namespace.to_owned(), kind, count, active, size, reclaimable]);
            }
            table.print()?;
        } else {
            let mut table = Table::new(&heading);
            shown.iter().for_each(|space| table.row(row(space)));
            table.print()?;
        }
        output::line("")?;
        let mut table = Table::new(&["FILE SYSTEM OF", "SIZE", "FREE"]);
        for system in &usage.file_systems {
            let bytes = |bytes: u64| output::bytes(bytes as i64);
            table.row([system.path.clone(), bytes(system.size), bytes(system.free)]);
        }
        table.print()
    }
}
