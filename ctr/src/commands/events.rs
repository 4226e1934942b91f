//! `ctr events`.

use clap::Args;
use proto::containerd::services::events::v1::SubscribeRequest;
use proto::containerd::types::Envelope;
use proto::gantry::events::v1::{self as journal, Gap, subscribe_response::Entry};

use crate::args::Format;
use crate::client::{Client, Failure, Tried};
use crate::{json, output};

/// Show events as they happen, of all namespaces
///
/// One line each: time, namespace, topic, and the event as JSON. Ends with Ctrl-C.
#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Show only events that match one of these, as topic=="/tasks/exit" or namespace==default
    filters: Vec<String>,
    /// Begin with the event of this number, of those that gantryd keeps (0: the oldest), and show numbers
    ///
    /// Where events are missing a line says which: they were too old, or could not be kept. An engine other than gantryd
    /// keeps none.
    #[arg(long, value_name = "NUMBER")]
    from: Option<u64>,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Events {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        match self.from {
            Some(from) => self.from(&client, from).await,
            None => self.live(&client).await,
        }
    }

    async fn live(self, client: &Client) -> anyhow::Result<()> {
        let request = SubscribeRequest { filters: self.filters };
        let mut events = client.events().subscribe(request).await.tried(|| "subscribe to events")?;
        while let Some(envelope) = events.message().await.map_err(lost)? {
            match self.format {
                Format::Table => output::line(line(&envelope))?,
                // One object a line, so that a reader need not wait for the end.
                Format::Json => output::line(json::of(&envelope).to_string())?,
            }
        }
        Ok(())
    }

    async fn from(self, client: &Client, from: u64) -> anyhow::Result<()> {
        let request = journal::SubscribeRequest { from: Some(from), filters: self.filters };
        let what = || format!("read events from {from} on");
        let mut entries = client.journal().subscribe(request).await.tried(what)?;
        while let Some(entry) = entries.message().await.map_err(lost)?.and_then(|answer| answer.entry) {
            match (self.format, entry) {
                (Format::Table, Entry::Event(event)) => {
                    let envelope = event.envelope.unwrap_or_default();
                    output::line(format!("{} {}", event.sequence, line(&envelope)))?;
                }
                (Format::Table, Entry::Gap(gap)) => {
                    let Gap { from, next } = gap;
                    output::line(format!("{from} missing: events from here to before {next} are not kept"))?;
                }
                (Format::Json, Entry::Event(event)) => output::line(json::of(&event).to_string())?,
                (Format::Json, Entry::Gap(gap)) => {
                    output::line(serde_json::json!({ "gap": json::of(&gap) }).to_string())?;
                }
            }
        }
        Ok(())
    }
}

fn lost(status: tonic::Status) -> anyhow::Error {
    Failure::new("follow the events", status).into()
}

fn line(envelope: &Envelope) -> String {
    let event = envelope.event.as_ref().map(json::of_any).unwrap_or_default();
    let time = output::time(envelope.timestamp.as_ref());
    format!("{time} {} {} {event}", envelope.namespace, envelope.topic)
}
