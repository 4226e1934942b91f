//! `ctr plugins …`.

use anyhow::Context;
use clap::{Args, Subcommand};
use proto::containerd::services::introspection::v1::{Plugin, PluginInfoRequest, PluginsRequest};
use proto::containerd::types::RuntimeRequest;

use crate::args::{Format, Listing};
use crate::client::{Client, Tried};
use crate::container::RuntimeArgs;
use crate::json;
use crate::output::{self, Table, or_dash};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(visible_alias = "ls")]
    List(List),
    InspectRuntime(InspectRuntime),
}

impl Command {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        match self {
            Command::List(command) => command.run(client).await,
            Command::InspectRuntime(command) => command.run(client).await,
        }
    }
}

/// List the parts of the engine and their state
#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    listing: Listing,
    /// Show all that is known of each
    #[arg(short, long)]
    detailed: bool,
    /// Show only those that match one of these, as type==io.containerd.snapshotter.v1
    filters: Vec<String>,
}

impl List {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let request = PluginsRequest { filters: self.filters };
        let plugins = client.introspection().plugins(request).await.tried(|| "list plugins")?.plugins;
        if self.listing.quiet {
            return plugins.iter().try_for_each(|plugin| output::line(&plugin.id));
        }
        if self.listing.format == Format::Json {
            return json::print_list(&plugins);
        }
        if self.detailed {
            for plugin in &plugins {
                detail(plugin)?;
            }
            return Ok(());
        }
        let mut table = Table::spaced(4, 4, &["TYPE", "ID", "PLATFORMS", "STATUS"]);
        for plugin in plugins {
            let status = match &plugin.init_err {
                None => "ok",
                // Left out on purpose.
                Some(error) if error.message.contains("skip plugin") => "skip",
                Some(_) => "error",
            };
            let platforms = or_dash(&platforms(&plugin));
            table.row([plugin.r#type, plugin.id, platforms, status.to_owned()]);
        }
        table.print()
    }
}

fn platforms(plugin: &Plugin) -> String {
    let mut names: Vec<String> = plugin
        .platforms
        .iter()
        .map(|platform| {
            oci::Platform::new(&platform.os, &platform.architecture, &platform.variant).to_string()
        })
        .collect();
    names.sort();
    names.dedup();
    names.join(",")
}

fn detail(plugin: &Plugin) -> anyhow::Result<()> {
    let mut text = format!("Type:          {}\nID:            {}\n", plugin.r#type, plugin.id);
    let mut field = |name: &str, value: String| {
        if !value.is_empty() {
            text.push_str(&format!("{:<15}{value}\n", format!("{name}:")));
        }
    };
    field("Requires", plugin.requires.join(", "));
    field("Platforms", platforms(plugin));
    field("Exports", crate::args::joined(&plugin.exports));
    field("Capabilities", plugin.capabilities.join(","));
    if let Some(error) = &plugin.init_err {
        field("Error", format!("code {}: {}", error.code, error.message));
    }
    output::line(text)
}

/// Show what a runtime says of itself, as JSON
#[derive(Debug, Args)]
pub(crate) struct InspectRuntime {
    #[command(flatten)]
    runtime: RuntimeArgs,
}

impl InspectRuntime {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let runtime = self.runtime.resolve(&client, true).await?;
        let options = RuntimeRequest { runtime_path: runtime.name.clone(), options: runtime.options };
        let request = PluginInfoRequest {
            r#type: "io.containerd.runtime.v2".to_owned(),
            id: "task".to_owned(),
            options: Some(proto::any::pack(&options)),
        };
        let answer = client.introspection().plugin_info(request).await;
        let answer = answer.tried(|| format!("ask for runtime {}", runtime.name))?;
        let info = answer.extra.with_context(|| format!("the engine says nothing of {}", runtime.name))?;
        json::print(&json::of_any(&info))
    }
}
