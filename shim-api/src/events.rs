//! The engine's side of a shim's events: the ttrpc service `Events` with its one method, Forward.

use std::sync::Arc;

use async_trait::async_trait;
use proto::containerd::services::events::ttrpc::v1::ForwardRequest;
use proto::containerd::types::Envelope;

use crate::transport::{OnHangUp, Services};
use crate::{Error, Result};

/// Name of the service on the wire.
pub const SERVICE_NAME: &str = "containerd.services.events.ttrpc.v1.Events";

/// Takes the events shims send.
#[async_trait]
pub trait EventsService: Send + Sync + 'static {
    /// Takes over one event. When this returns Ok the shim forgets it; a temporary error makes it send the event
    /// again, any other makes it give the event up.
    async fn forward(&self, envelope: Envelope) -> Result<()>;
}

/// Adds an events service to what a server offers.
pub fn register<S: EventsService>(services: &mut Services, service: &Arc<S>) {
    let service = Arc::clone(service);
    services.method(SERVICE_NAME, "Forward", OnHangUp::Finish, move |request: ForwardRequest| {
        let service = Arc::clone(&service);
        async move {
            let envelope = request
                .envelope
                .ok_or_else(|| Error::invalid_argument("Forward: the envelope is missing"))?;
            service.forward(envelope).await
        }
    });
}
