//! `gantryd publish`: how a shim that has no ttrpc address publishes an event: an Any on stdin, one call, done.

use std::path::Path;
use std::time::SystemTime;

use anyhow::Context as _;
use prost::Message as _;
use prost_types::Any;
use proto::containerd::services::events::v1::ForwardRequest;
use proto::containerd::services::events::v1::events_client::EventsClient;
use proto::containerd::types::Envelope;
use tokio::io::AsyncReadExt as _;

/// The largest event, in bytes.
const EVENT_MAX: u64 = 1 << 20;

/// What to publish where.
#[derive(clap::Args)]
pub struct Publish {
    /// The event's topic, as /tasks/exit
    #[arg(long)]
    topic: String,
    /// The namespace the event belongs to
    #[arg(long)]
    namespace: String,
}

impl Publish {
    /// Reads the event from stdin and hands it to the engine that listens on `address`.
    pub async fn run(self, address: &Path) -> anyhow::Result<()> {
        let mut bytes = Vec::new();
        tokio::io::stdin().take(EVENT_MAX + 1).read_to_end(&mut bytes).await.context("cannot read stdin")?;
        anyhow::ensure!(bytes.len() as u64 <= EVENT_MAX, "the event on stdin exceeds {EVENT_MAX} bytes");
        let event = Any::decode(bytes.as_slice()).context("stdin is no protobuf Any")?;
        let channel = tonic::transport::Endpoint::try_from(format!("unix://{}", address.display()))?
            .connect()
            .await
            .with_context(|| format!("cannot reach gantryd at {}; is it running?", address.display()))?;
        let envelope = Envelope {
            timestamp: Some(SystemTime::now().into()),
            namespace: self.namespace,
            topic: self.topic,
            event: Some(event),
        };
        let request = ForwardRequest { envelope: Some(envelope) };
        let answer = EventsClient::new(channel).forward(request).await;
        answer.map_err(|status| anyhow::anyhow!("the event was refused: {}", status.message()))?;
        Ok(())
    }
}
