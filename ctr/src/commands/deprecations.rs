//! `ctr deprecations …`.

use clap::{Args, Subcommand, ValueEnum};
use proto::containerd::services::introspection::v1::DeprecationWarning;
use serde_json::{Value, json};

use crate::client::{Client, Tried};
use crate::json as messages;
use crate::output::{self, Table};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    #[command(visible_alias = "ls")]
    List(List),
}

impl Command {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let Command::List(command) = self;
        command.run(client).await
    }
}

/// How the list is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
enum Format {
    /// Aligned columns under a heading.
    #[default]
    #[value(alias = "table")]
    Default,
    /// A JSON array.
    Json,
}

/// List what the engine has been used for that a later one will not do; nothing when there is nothing
#[derive(Debug, Args)]
pub(crate) struct List {
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl List {
    async fn run(self, client: Client) -> anyhow::Result<()> {
        let server = client.introspection().server(()).await.tried(|| "ask for deprecations")?;
        output::print(&text(&server.deprecations, self.format)?)
    }
}

fn text(warnings: &[DeprecationWarning], format: Format) -> anyhow::Result<String> {
    if warnings.is_empty() {
        return Ok(String::new());
    }
    let last = |warning: &DeprecationWarning| output::time(warning.last_occurrence.as_ref());
    match format {
        Format::Json => {
            let list: Vec<Value> = warnings
                .iter()
                .map(|warning| json!({"id": warning.id, "message": warning.message, "lastOccurrence": last(warning)}))
                .collect();
            messages::text(&list.into())
        }
        Format::Default => {
            let mut table = Table::spaced(4, 4, &["ID", "LAST OCCURRENCE", "MESSAGE"]);
            for warning in warnings {
                table.row([warning.id.clone(), last(warning), warning.message.clone()]);
            }
            Ok(table.text())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn warnings_are_listed() {
        assert_eq!(text(&[], Format::Json).unwrap(), "");
        let warning = DeprecationWarning {
            id: "io.containerd.deprecation/x".into(),
            message: "do not".into(),
            last_occurrence: Some(prost_types::Timestamp::default()),
        };
        let table = text(std::slice::from_ref(&warning), Format::Default).unwrap();
        assert!(table.starts_with("ID ") && table.contains("1970-01-01T00:00:00Z    do not"), "{table}");
        let list: Value = serde_json::from_str(&text(&[warning], Format::Json).unwrap()).unwrap();
        assert_eq!(list[0]["lastOccurrence"], "1970-01-01T00:00:00Z");
    }
}
