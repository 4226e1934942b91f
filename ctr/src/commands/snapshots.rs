//! `ctr snapshots …`.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use prost_types::FieldMask;
use proto::containerd::services::snapshots::v1::{
    CommitSnapshotRequest, Info, Kind, ListSnapshotsRequest, MountsRequest, PrepareSnapshotRequest,
    RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest, UsageRequest, ViewSnapshotRequest,
};
use proto::containerd::types::Mount;
use serde_json::json;

use crate::args::{Format, Listing, Snapshotter, joined, labels};
use crate::client::{Client, Failure, Tried};
use crate::json as messages;
use crate::output::{self, Table};

mod diff;
mod tree;
mod unpack;

/// Manage snapshots
#[derive(Debug, Args)]
pub(crate) struct Snapshots {
    #[command(flatten)]
    snapshotter: Snapshotter,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    Commit(Commit),
    #[command(visible_aliases = ["del", "remove", "rm"])]
    Delete(Delete),
    Diff(diff::Diff),
    /// Show all that is known of a snapshot, as JSON
    Info(Key),
    Label(Label),
    #[command(visible_alias = "ls")]
    List(List),
    #[command(visible_aliases = ["m", "mount"])]
    Mounts(Mounts),
    /// Make a writable snapshot on top of a committed one
    Prepare(Make),
    Tree(tree::Tree),
    Unpack(unpack::Unpack),
    Usage(Usage),
    /// Make a read-only snapshot of a committed one
    View(Make),
}

impl Snapshots {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let snapshotter = client.snapshotter(&self.snapshotter.snapshotter).await?;
        match self.command {
            Command::Commit(command) => command.run(client, snapshotter).await,
            Command::Delete(command) => command.run(client, snapshotter).await,
            Command::Diff(command) => command.run(client, snapshotter).await,
            Command::Info(command) => command.info(client, snapshotter).await,
            Command::Label(command) => command.run(client, snapshotter).await,
            Command::List(command) => command.run(client, snapshotter).await,
            Command::Mounts(command) => command.run(client, snapshotter).await,
            Command::Prepare(command) => command.prepare(client, snapshotter).await,
            Command::Tree(command) => command.run(client, snapshotter).await,
            Command::Unpack(command) => command.run(client, snapshotter).await,
            Command::Usage(command) => command.run(client, snapshotter).await,
            Command::View(command) => command.view(client, snapshotter).await,
        }
    }
}

/// Make a writable snapshot immutable under a new name
#[derive(Debug, Args)]
struct Commit {
    /// The new name
    key: String,
    /// The writable snapshot
    active: String,
}

impl Commit {
    async fn run(self, client: Client, snapshotter: String) -> anyhow::Result<()> {
        // Without this the collector would take what no image refers to.
        let root =
            ("containerd.io/gc.root".to_owned(), output::time(Some(&std::time::SystemTime::now().into())));
        let request = CommitSnapshotRequest {
            snapshotter,
            name: self.key.clone(),
            key: self.active.clone(),
            labels: [root].into(),
            parent: String::new(),
        };
        client
            .snapshots()
            .commit(request)
            .await
            .tried(|| format!("commit snapshot {} as {}", self.active, self.key))?;
        Ok(())
    }
}

/// Remove snapshots
#[derive(Debug, Args)]
struct Delete {
    #[arg(value_name = "KEY", required = true)]
    keys: Vec<String>,
}

impl Delete {
    async fn run(self, client: Client, snapshotter: String) -> anyhow::Result<()> {
        for key in self.keys {
            let request = RemoveSnapshotRequest { snapshotter: snapshotter.clone(), key: key.clone() };
            client.snapshots().remove(request).await.tried(|| format!("remove snapshot {key}"))?;
        }
        Ok(())
    }
}

#[derive(Debug, Args)]
struct Key {
    key: String,
}

impl Key {
    async fn info(self, client: Client, snapshotter: String) -> anyhow::Result<()> {
        let request = StatSnapshotRequest { snapshotter, key: self.key.clone() };
        let answer =
            client.snapshots().stat(request).await.tried(|| format!("find snapshot {}", self.key))?;
        let info = answer.info.unwrap_or_default();
        // Keys, and that empty ones are left out, are as with containerd's ctr, for scripts.
        let mut shown = json!({
            "Kind": kind(&info),
            "Name": info.name,
            "Created": output::time(info.created_at.as_ref()),
            "Updated": output::time(info.updated_at.as_ref()),
        });
        if !info.parent.is_empty() {
            shown["Parent"] = info.parent.into();
        }
        if !info.labels.is_empty() {
            shown["Labels"] = json!(info.labels);
        }
        messages::print(&shown)
    }
}

/// Set labels of a snapshot; an empty value clears one
#[derive(Debug, Args)]
struct Label {
    key: String,
    #[arg(value_name = "KEY=VALUE", required = true)]
    labels: Vec<String>,
}

impl Label {
    async fn run(self, client: Client, snapshotter: String) -> anyhow::Result<()> {
        let labels = labels(&self.labels);
        let paths = labels.keys().map(|key| format!("labels.{key}")).collect();
        let request = UpdateSnapshotRequest {
            snapshotter,
            info: Some(Info { name: self.key.clone(), labels, ..Info::default() }),
            update_mask: Some(FieldMask { paths }),
        };
        let updated =
            client.snapshots().update(request).await.tried(|| format!("label snapshot {}", self.key))?;
        output::line(joined(&updated.info.unwrap_or_default().labels))
    }
}

/// List snapshots
#[derive(Debug, Args)]
struct List {
    #[command(flatten)]
    listing: Listing,
    /// Show only those that match one of these, as kind==active
    filters: Vec<String>,
}

impl List {
    async fn run(self, client: Client, snapshotter: String) -> anyhow::Result<()> {
        let snapshots = all(&client, &snapshotter, self.filters).await?;
        if self.listing.quiet {
            return snapshots.iter().try_for_each(|snapshot| output::line(&snapshot.name));
        }
        if self.listing.format == Format::Json {
            return messages::print_list(&snapshots);
        }
        let mut table = Table::new(&["KEY", "PARENT", "KIND"]);
        for snapshot in snapshots {
            let kind = kind(&snapshot).to_owned();
            table.row([snapshot.name, snapshot.parent, kind]);
        }
        table.print()
    }
}

async fn all(client: &Client, snapshotter: &str, filters: Vec<String>) -> anyhow::Result<Vec<Info>> {
    let what = || format!("list the snapshots of {snapshotter}");
    let request = ListSnapshotsRequest { snapshotter: snapshotter.to_owned(), filters };
    let mut stream = client.snapshots().list(request).await.tried(what)?;
    let mut snapshots = Vec::new();
    while let Some(part) = stream.message().await.map_err(|status| Failure::new(what(), status))? {
        snapshots.extend(part.info);
    }
    Ok(snapshots)
}

fn kind(info: &Info) -> &'static str {
    match info.kind() {
        Kind::View => "View",
        Kind::Active => "Active",
        Kind::Committed => "Committed",
        Kind::Unknown => "Unknown",
    }
}

/// Print the commands that mount a snapshot
#[derive(Debug, Args)]
struct Mounts {
    /// Where to mount it
    target: PathBuf,
    key: String,
}

impl Mounts {
    async fn run(self, client: Client, snapshotter: String) -> anyhow::Result<()> {
        let request = MountsRequest { snapshotter, key: self.key.clone() };
        let answer = client.snapshots().mounts(request).await;
        let mounts = answer.tried(|| format!("get the mounts of snapshot {}", self.key))?.mounts;
        print_commands(&self.target, &mounts)
    }
}

fn print_commands(target: &std::path::Path, mounts: &[Mount]) -> anyhow::Result<()> {
    for mount in mounts {
        let at = target.join(mount.target.trim_start_matches('/'));
        let options = match mount.options.is_empty() {
            true => String::new(),
            false => format!(" -o {}", mount.options.join(",")),
        };
        let at = at.display().to_string();
        let at = if mount.target.is_empty() { target.display().to_string() } else { at };
        output::line(format!("mount -t {} {} {at}{options}", mount.r#type, mount.source))?;
    }
    Ok(())
}

#[derive(Debug, Args)]
struct Make {
    /// Print the commands that mount it on this path
    #[arg(short, long, value_name = "PATH")]
    target: Option<PathBuf>,
    /// Print the mounts as JSON
    #[arg(long)]
    mounts: bool,
    key: String,
    /// A committed snapshot; without one the new snapshot is empty
    #[arg(default_value = "", hide_default_value = true)]
    parent: String,
}

impl Make {
    async fn prepare(self, client: Client, snapshotter: String) -> anyhow::Result<()> {
        let request = PrepareSnapshotRequest {
            snapshotter,
            key: self.key.clone(),
            parent: self.parent.clone(),
            labels: self.labels(),
        };
        let answer = client.snapshots().prepare(request).await;
        self.print(answer.tried(|| format!("prepare snapshot {}", self.key))?.mounts)
    }

    async fn view(self, client: Client, snapshotter: String) -> anyhow::Result<()> {
        let request = ViewSnapshotRequest {
            snapshotter,
            key: self.key.clone(),
            parent: self.parent.clone(),
            labels: self.labels(),
        };
        let answer = client.snapshots().view(request).await;
        self.print(answer.tried(|| format!("make view {}", self.key))?.mounts)
    }

    /// Keeps the snapshot from the collector: nothing else refers to it.
    fn labels(&self) -> std::collections::BTreeMap<String, String> {
        let now = output::time(Some(&std::time::SystemTime::now().into()));
        [("containerd.io/gc.root".to_owned(), now)].into()
    }

    fn print(&self, mounts: Vec<Mount>) -> anyhow::Result<()> {
        if let Some(target) = &self.target {
            print_commands(target, &mounts)?;
        }
        if self.mounts {
            let mounts: Vec<_> = mounts
                .into_iter()
                .map(|mount| {
                    json!({"Type": mount.r#type, "Source": mount.source, "Target": mount.target, "Options": mount.options})
                })
                .collect();
            messages::print(&json!(mounts))?;
        }
        Ok(())
    }
}

/// Show how much space snapshots take up, without their parents
#[derive(Debug, Args)]
struct Usage {
    /// Print sizes in bytes
    #[arg(short)]
    bytes: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    /// Snapshots to show [default: all]
    #[arg(value_name = "KEY")]
    keys: Vec<String>,
}

impl Usage {
    async fn run(self, client: Client, snapshotter: String) -> anyhow::Result<()> {
        let keys = match self.keys.is_empty() {
            true => all(&client, &snapshotter, Vec::new()).await?.into_iter().map(|info| info.name).collect(),
            false => self.keys,
        };
        let mut table = Table::new(&["KEY", "SIZE", "INODES"]);
        let mut list = Vec::new();
        for key in keys {
            let request = UsageRequest { snapshotter: snapshotter.clone(), key: key.clone() };
            let usage =
                client.snapshots().usage(request).await.tried(|| format!("measure snapshot {key}"))?;
            list.push(json!({"key": key, "size": usage.size, "inodes": usage.inodes}));
            let size = if self.bytes { usage.size.to_string() } else { output::bytes(usage.size) };
            table.row([key, size, usage.inodes.to_string()]);
        }
        match self.format {
            Format::Table => table.print(),
            Format::Json => messages::print(&list.into()),
        }
    }
}
