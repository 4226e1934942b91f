//! `containerd.services.events.ttrpc.v1.Events`: where shims publish, on a listener of their own.

use std::sync::Arc;

use proto::containerd::types::Envelope;
use shim_api::events::{EventsService, register};
use shim_api::transport::Services;
use tokio::net::UnixListener;

use crate::error::Error;
use crate::tasks::Tasks;

struct Service {
    tasks: Tasks,
}

#[async_trait::async_trait]
impl EventsService for Service {
    async fn forward(&self, envelope: Envelope) -> shim_api::Result<()> {
        self.tasks.forward_once(envelope).await.map_err(|error| match error {
            Error::InvalidArgument(message) => shim_api::Error::invalid_argument(message),
            // It is sent again.
            Error::Unavailable(message) => shim_api::Error::unavailable(message),
            error => shim_api::Error::unknown(error),
        })
    }
}

/// Serves for as long as this is polled; an error when it cannot begin.
pub async fn serve(listener: UnixListener, tasks: Tasks) -> shim_api::Result<()> {
    let mut services = Services::new();
    register(&mut services, &Arc::new(Service { tasks }));
    let _server = services.serve(listener).await?;
    std::future::pending().await
}
