//! `ctr tasks kill`.

use clap::Args;

use crate::client::Client;
use crate::container::{self, STOP_SIGNAL_LABEL};
use crate::process::Process;
use crate::signals;

/// Send a signal to a container's process
#[derive(Debug, Args)]
pub(crate) struct Kill {
    /// Signal to send [default: what the image asks for, else SIGTERM]
    #[arg(short, long, value_parser = signals::parse)]
    signal: Option<u32>,
    /// Send it to this exec
    #[arg(long, value_name = "ID", conflicts_with = "all")]
    exec_id: Option<String>,
    /// Send it to every process in the container
    #[arg(short, long)]
    all: bool,
    #[arg(value_name = "CONTAINER")]
    id: String,
}

impl Kill {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let signal = match self.signal {
            Some(signal) => signal,
            None => {
                let labels = container::get(&client, &self.id).await?.labels;
                labels.get(STOP_SIGNAL_LABEL).and_then(|name| signals::parse(name).ok()).unwrap_or(15)
            }
        };
        Process::exec(&client, &self.id, self.exec_id.as_deref().unwrap_or_default())
            .kill(signal, self.all)
            .await
    }
}
