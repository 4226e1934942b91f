//! The way to plugins in other processes: one lazy gRPC connection to a unix socket, made anew whenever it is needed.
//!
//! Invariant: a plugin that is not there is no error before somebody asks it something, and asking ends within a limit.

use std::path::{Path, PathBuf};
use std::time::Duration;

use tokio::runtime::Handle;
use tonic::transport::{Channel, Endpoint};
use tonic::{Request, Response, Status};

use crate::context::NAMESPACE_HEADER;

/// The namespace of what the engine asks: the names it asks for have the clients' namespaces in them already.
const NAMESPACE: &str = "default";
/// How long an answer may take: a remote snapshotter fetches layers while it prepares.
const LIMIT: Duration = Duration::from_secs(600);

/// A plugin's socket.
#[derive(Clone)]
pub(crate) struct Proxy {
    address: PathBuf,
    channel: Channel,
    runtime: Handle,
    limit: Duration,
}

impl Proxy {
    /// The plugin at this socket. Nothing is connected yet. To be called within the runtime.
    pub(crate) fn new(address: PathBuf) -> Self {
        let path = address.clone();
        let connector = tower::service_fn(move |_: http::Uri| {
            let path = path.clone();
            async move {
                Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(
                    tokio::net::UnixStream::connect(path).await?,
                ))
            }
        });
        let channel = Endpoint::from_static("http://plugin").connect_with_connector_lazy(connector);
        Proxy { address, channel, runtime: Handle::current(), limit: LIMIT }
    }

    /// The same with another limit for an answer.
    #[must_use]
    pub(crate) fn within(self, limit: Duration) -> Self {
        Proxy { limit, ..self }
    }

    /// Its socket.
    pub(crate) fn address(&self) -> &Path {
        &self.address
    }

    /// The connection, for a client of a service.
    pub(crate) fn channel(&self) -> Channel {
        self.channel.clone()
    }

    /// Asks, and waits for the answer. Unavailable when nobody listens.
    pub(crate) async fn ask<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        let limit = self.limit;
        let late = |_| Status::deadline_exceeded(format!("the plugin did not answer within {limit:?}"));
        let answer = tokio::time::timeout(limit, call).await.map_err(late)?;
        answer.map(Response::into_inner).map_err(|status| {
            // A status that this side made, of a connection that failed.
            if std::error::Error::source(&status).is_some() {
                Status::unavailable(format!(
                    "the plugin at {} cannot be reached: {}; is it running?",
                    self.address.display(),
                    reason(&status)
                ))
            } else {
                status
            }
        })
    }

    /// The same for a thread that may block.
    pub(crate) fn ask_blocking<T>(
        &self,
        call: impl Future<Output = Result<Response<T>, Status>>,
    ) -> Result<T, Status> {
        self.runtime.block_on(self.ask(call))
    }

    /// Runs to its end what a thread that may block waits for.
    pub(crate) fn block_on<T>(&self, future: impl Future<Output = T>) -> T {
        self.runtime.block_on(future)
    }
}

/// A request, with the namespace that plugins ask for.
pub(crate) fn request<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.metadata_mut().insert(NAMESPACE_HEADER, tonic::metadata::MetadataValue::from_static(NAMESPACE));
    request
}

/// The innermost cause, which says more than "transport error".
fn reason(status: &Status) -> String {
    let mut cause: &dyn std::error::Error = status;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}
