//! `ctr tasks attach`.

use std::process::ExitCode;

use clap::Args;
use proto::containerd::services::tasks::v1::GetRequest;

use crate::client::{Client, Tried};
use crate::process::{Process, exit_code};
use crate::signals::Received;
use crate::stdio::{Addresses, Streams, Terminal, remove_leftovers};

/// Take over the streams of a container that was started detached
///
/// ctr exits with the code of the process, and deletes the task when it has ended.
#[derive(Debug, Args)]
pub(crate) struct Attach {
    #[arg(value_name = "CONTAINER")]
    id: String,
}

impl Attach {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<ExitCode> {
        let request = GetRequest { container_id: self.id.clone(), exec_id: String::new() };
        let task = client.tasks().get(request).await.tried(|| format!("find task {}", self.id))?;
        let task = task.process.unwrap_or_default();
        let mut signals = Received::listen()?;
        let streams = Streams::existing(Addresses {
            stdin: task.stdin.clone(),
            stdout: task.stdout.clone(),
            stderr: task.stderr.clone(),
            terminal: task.terminal,
        })?;
        let terminal = task.terminal.then(Terminal::take).transpose()?;
        let process = Process::init(&client, &self.id);
        let waiting = process.wait();
        let mut copies = streams.copy()?;
        copies.feed()?;
        let _input = process.close_input_after(&copies);
        let _window = match &terminal {
            Some(_) => Some(process.follow_window().await?),
            None => None,
        };
        process.follow(waiting, &mut signals).await?;
        let status = process.delete().await?;
        copies.finish().await;
        drop(terminal);
        remove_leftovers([task.stdin.as_str(), &task.stdout, &task.stderr]);
        Ok(exit_code(status))
    }
}
