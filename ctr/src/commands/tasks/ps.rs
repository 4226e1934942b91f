//! `ctr tasks ps`.

use clap::Args;
use proto::containerd::services::tasks::v1::ListPidsRequest;

use crate::args::Format;
use crate::client::{Client, Tried};
use crate::json;
use crate::output::{self, Table};

/// List the processes in a container, by their ids on the host
#[derive(Debug, Args)]
pub(crate) struct Ps {
    /// Print only the process ids
    #[arg(short, long)]
    quiet: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t, conflicts_with = "quiet")]
    format: Format,
    #[arg(value_name = "CONTAINER")]
    id: String,
}

impl Ps {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let request = ListPidsRequest { container_id: self.id.clone() };
        let answer = client.tasks().list_pids(request).await;
        let processes = answer.tried(|| format!("list the processes of {}", self.id))?.processes;
        if self.quiet {
            return processes.iter().try_for_each(|process| output::line(process.pid.to_string()));
        }
        if self.format == Format::Json {
            return json::print_list(&processes);
        }
        let mut table = Table::spaced(1, 4, &["PID", "INFO"]);
        for process in processes {
            let info =
                process.info.as_ref().map_or_else(|| "-".to_owned(), |info| json::of_any(info).to_string());
            table.row([process.pid.to_string(), info]);
        }
        table.print()
    }
}
