//! `ctr events`.

use clap::Args;
use proto::containerd::services::events::v1::SubscribeRequest;

use crate::args::Format;
use crate::client::{Client, Failure, Tried};
use crate::{json, output};

/// Show events as they happen, of all namespaces
///
/// One line each: time, namespace, topic, and the event as JSON. Ends with Ctrl-C.
#[derive(Debug, Args)]
pub(crate) struct Events {
    /// Show only events that match one of these, as topic==/tasks/exit or namespace==default
    filters: Vec<String>,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
}

impl Events {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let request = SubscribeRequest { filters: self.filters };
        let mut events = client.events().subscribe(request).await.tried(|| "subscribe to events")?;
        while let Some(envelope) =
            events.message().await.map_err(|status| Failure::new("follow the events", status))?
        {
            match self.format {
                Format::Table => {
                    let event = envelope.event.as_ref().map(json::of_any).unwrap_or_default();
                    let time = output::time(envelope.timestamp.as_ref());
                    output::line(format!("{time} {} {} {event}", envelope.namespace, envelope.topic))?;
                }
                // One object a line, so that a reader need not wait for the end.
                Format::Json => output::line(json::of(&envelope).to_string())?,
            }
        }
        Ok(())
    }
}
