//! `ctr tasks list`.

use clap::Args;
use proto::containerd::services::tasks::v1::ListTasksRequest;

use crate::args::{Format, Listing};
use crate::client::{Client, Tried};
use crate::json;
use crate::output::{self, Table};

/// List tasks
#[derive(Debug, Args)]
pub(crate) struct List {
    #[command(flatten)]
    listing: Listing,
}

impl List {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let tasks = client.tasks().list(ListTasksRequest::default()).await.tried(|| "list tasks")?.tasks;
        if self.listing.quiet {
            return tasks.iter().try_for_each(|task| output::line(&task.id));
        }
        if self.listing.format == Format::Json {
            return json::print_list(&tasks);
        }
        let mut table = Table::spaced(4, 4, &["TASK", "PID", "STATUS"]);
        for task in tasks {
            let status = task.status().as_str_name().to_owned();
            table.row([task.id, task.pid.to_string(), status]);
        }
        table.print()
    }
}
