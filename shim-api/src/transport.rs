//! ttrpc with prost payloads: one way to call a method, one way to serve one, for every service of this crate. Calls can
//! also go over gRPC, to shims that speak it.
//!
//! What the `ttrpc` crate does: framing (4 MiB at most), matching answers to requests, many calls at once on a
//! connection. What is added here:
//! - a connection whose end can be waited for;
//! - handlers run in tasks of their own, because the crate drops a handler when its caller disconnects, and a
//!   half-done create or exec must not be left behind. A handler that only waits may say so and is then dropped;
//! - a handler that panics answers Internal instead of never;
//! - an accept loop that pauses when the process is out of descriptors instead of spinning.

mod grpc;

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::path::Path;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use async_trait::async_trait;
use prost::Message;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Semaphore, watch};
use ttrpc::r#async::transport::{Listener, Socket};
use ttrpc::r#async::{MethodHandler, TtrpcContext};
use ttrpc::{Request, Response};

use crate::trace::{self, Context as TraceContext};
use crate::{Code, Error, Result};

/// The ttrpc header that carries the namespace.
pub const NAMESPACE_HEADER: &str = "containerd-namespace-ttrpc";

/// How long to wait for a Unix socket to take a connection; its listener may be alive but stuck.
const CONNECT_LIMIT: Duration = Duration::from_secs(10);

/// The most calls that may be unanswered on a connection. Calls are not given up in mid-write, so that those of a peer
/// that hangs stay until it answers or goes.
const UNANSWERED_MAX: usize = 1024;

/// The path in an address of the form `unix:///path`, `ttrpc+unix:///path` or a bare absolute path.
///
/// # Errors
/// InvalidArgument for anything else; abstract sockets (`unix://@name`, `\0name`) are refused, as any process of
/// the same network namespace could connect to one (CVE-2020-15257).
pub fn socket_path(address: &str) -> Result<&Path> {
    let rest = address.strip_prefix("ttrpc+").unwrap_or(address);
    let path = rest.strip_prefix("unix://").unwrap_or(rest);
    if path.starts_with('/') && !path.contains('\0') {
        return Ok(Path::new(path));
    }
    Err(Error::invalid_argument(format!(
        "socket address {address:?} is not usable: expected unix:///absolute/path"
    )))
}

/// How calls travel on one connection: ttrpc, or gRPC, which some shims speak.
#[async_trait]
trait Wire: Send + Sync {
    /// Sends a request, encoded; the answer, encoded. Closed when no status came, for whatever reason.
    async fn exchange(
        &self,
        namespace: Option<&str>,
        service: &str,
        method: &str,
        payload: Vec<u8>,
    ) -> Result<Vec<u8>>;
}

/// A connection to a peer; clones share it.
#[derive(Clone)]
pub struct Connection {
    wire: Arc<dyn Wire>,
    ended: watch::Receiver<()>,
    namespace: Option<Arc<str>>,
    unanswered: Arc<Semaphore>,
}

impl Connection {
    /// Connects to a Unix socket address (see [`socket_path`]), to speak ttrpc.
    ///
    /// # Errors
    /// Refused when nobody listens there, Unavailable when there is no way to it now, DeadlineExceeded when the peer does not accept within 10 s.
    pub async fn connect(address: &str) -> Result<Self> {
        Ok(Self::over(stream(address).await?))
    }

    /// Connects to a Unix socket address, to speak gRPC.
    ///
    /// # Errors
    /// As [`Connection::connect`].
    pub async fn connect_grpc(address: &str) -> Result<Self> {
        let (socket, ended) = WatchedStream::new(stream(address).await?);
        Ok(Self::on(Arc::new(grpc::connect(address, socket).await?), ended))
    }

    /// Speaks ttrpc over a stream that is connected already.
    #[must_use]
    pub fn over(stream: UnixStream) -> Self {
        let (socket, ended) = WatchedStream::new(stream);
        Self::on(Arc::new(Ttrpc(ttrpc::r#async::Client::new(Socket::new(socket)))), ended)
    }

    fn on(wire: Arc<dyn Wire>, ended: watch::Receiver<()>) -> Self {
        Self { wire, ended, namespace: None, unanswered: Arc::new(Semaphore::new(UNANSWERED_MAX)) }
    }

    /// The same connection, whose calls carry this namespace in their metadata.
    #[must_use]
    pub fn with_namespace(mut self, namespace: &str) -> Self {
        self.namespace = Some(namespace.into());
        self
    }

    /// Resolves when the connection has ended, whoever ended it.
    pub async fn closed(&self) {
        let mut ended = self.ended.clone();
        // Nothing is ever sent: the only change is that the stream, and with it the sender, was dropped.
        while ended.changed().await.is_ok() {}
    }

    /// Whether the connection has ended.
    #[must_use]
    pub fn is_closed(&self) -> bool {
        self.ended.has_changed().is_err()
    }

    /// Calls a method and decodes its answer. Without a limit it waits as long as the connection lives.
    ///
    /// # Errors
    /// The peer's status; Closed when the connection ended first; DeadlineExceeded after `limit`.
    pub async fn call<Q: Message, A: Message + Default>(
        &self,
        service: &str,
        method: &str,
        request: &Q,
        limit: Option<Duration>,
    ) -> Result<A> {
        let payload = request.encode_to_vec();
        if payload.len() > ttrpc::proto::MESSAGE_LENGTH_MAX - 4096 {
            return Err(Error::resource_exhausted(format!(
                "call {service}/{method}: the request of {} bytes exceeds ttrpc's limit of 4 MiB",
                payload.len()
            )));
        }
        // The deadline stays on this side: it would be passed on, and a Go shim kills a running runc when its time is up,
        // which leaves half a container.
        let answer = match limit {
            Some(limit) => self.exchange_within(limit, service, method, payload).await,
            // Ends with its caller, and so with the connection: for waits.
            None => self.exchange(service, method, payload).await,
        };
        A::decode(answer?.as_slice()).map_err(|error| {
            Error::internal(format!("call {service}/{method}: the answer cannot be decoded: {error}"))
        })
    }

    async fn exchange_within(
        &self,
        limit: Duration,
        service: &str,
        method: &str,
        payload: Vec<u8>,
    ) -> Result<Vec<u8>> {
        let what = || format!("call {service}/{method}");
        let Ok(running) = self.unanswered.clone().try_acquire_owned() else {
            return Err(Error::unavailable(format!(
                "{}: {UNANSWERED_MAX} calls are unanswered; is the peer stopped?",
                what()
            )));
        };
        // In a task of its own: the ttrpc crate closes the connection when a request is dropped in mid-write, and a gRPC
        // peer is told to give up, which a caller that gives up must not cause.
        let (this, to, name) = (self.clone(), service.to_owned(), method.to_owned());
        let request = tokio::spawn(trace::carry(trace::current(), async move {
            let _running = running;
            this.exchange(&to, &name, payload).await
        }));
        match tokio::time::timeout(limit, request).await {
            Ok(answered) => answered.unwrap_or_else(|error| Err(Error::internal(error))),
            Err(_) => Err(Error::deadline_exceeded(format!("{}: no answer within {limit:?}", what()))),
        }
    }

    async fn exchange(&self, service: &str, method: &str, payload: Vec<u8>) -> Result<Vec<u8>> {
        match self.wire.exchange(self.namespace.as_deref(), service, method, payload).await {
            // Also what is said when the connection goes on, and which of the two it is tells the stream's end; the task of
            // the connection may be about to drop it.
            Err(error) if error.code == Code::Closed => {
                match tokio::time::timeout(Duration::from_millis(50), self.closed()).await {
                    Ok(()) => Err(Error::closed(format!("the connection closed: {}", error.message))),
                    Err(_) => Err(Error::unknown(error.message)),
                }
            }
            answer => answer,
        }
    }
}

async fn stream(address: &str) -> Result<UnixStream> {
    let path = socket_path(address)?;
    tokio::time::timeout(CONNECT_LIMIT, UnixStream::connect(path))
        .await
        .map_err(|_| Error::deadline_exceeded(format!("connect to {address}: not accepted within 10 s")))?
        .map_err(|error| {
            let gone = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
            let code = if gone { Code::Refused } else { Code::Unavailable };
            Error::new(code, format!("connect to {address}: {error}"))
        })
}

struct Ttrpc(ttrpc::r#async::Client);

#[async_trait]
impl Wire for Ttrpc {
    async fn exchange(
        &self,
        namespace: Option<&str>,
        service: &str,
        method: &str,
        payload: Vec<u8>,
    ) -> Result<Vec<u8>> {
        let mut envelope = Request::new();
        envelope.service = service.to_owned();
        envelope.method = method.to_owned();
        envelope.payload = payload;
        if let Some(namespace) = namespace {
            let mut pair = ttrpc::proto::KeyValue::new();
            pair.key = NAMESPACE_HEADER.to_owned();
            pair.value = namespace.to_owned();
            envelope.metadata.push(pair);
        }
        if let Some(trace) = trace::current() {
            for (key, value) in [
                (trace::PARENT_HEADER, trace.parent()),
                (trace::FILE_HEADER, trace.path().display().to_string()),
            ] {
                let mut pair = ttrpc::proto::KeyValue::new();
                pair.key = key.to_owned();
                pair.value = value;
                envelope.metadata.push(pair);
            }
        }
        match self.0.request(envelope).await {
            Ok(answer) => Ok(answer.payload),
            Err(ttrpc::Error::Others(message)) => Err(Error::closed(message)),
            Err(error) => Err(error.into()),
        }
    }
}

/// A stream that lets others know when it was dropped, as it is when a connection ends.
struct WatchedStream {
    stream: UnixStream,
    _alive: watch::Sender<()>,
}

impl WatchedStream {
    fn new(stream: UnixStream) -> (Self, watch::Receiver<()>) {
        let (alive, ended) = watch::channel(());
        (WatchedStream { stream, _alive: alive }, ended)
    }
}

impl AsyncRead for WatchedStream {
    fn poll_read(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        buf: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_read(cx, buf)
    }
}

impl AsyncWrite for WatchedStream {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buf: &[u8]) -> Poll<io::Result<usize>> {
        Pin::new(&mut self.stream).poll_write(cx, buf)
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_flush(cx)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(cx)
    }
}

/// What becomes of a handler whose caller hangs up.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OnHangUp {
    /// It runs to its end.
    Finish,
    /// It is dropped: it only waits and changes nothing.
    Drop,
}

/// The methods of one or more services, ready to be served.
pub struct Services {
    by_name: HashMap<String, HashMap<String, Box<dyn MethodHandler + Send + Sync>>>,
    /// Dropped when the server stops, which handlers that only wait notice.
    serving: watch::Sender<()>,
}

impl Default for Services {
    fn default() -> Self {
        Self { by_name: HashMap::new(), serving: watch::Sender::new(()) }
    }
}

impl Services {
    /// No service yet.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds one method: `run` gets the decoded request, its answer is encoded.
    pub fn method<Q, A, F, R>(&mut self, service: &str, method: &str, on_hang_up: OnHangUp, run: R)
    where
        Q: Message + Default + 'static,
        A: Message + 'static,
        F: Future<Output = Result<A>> + Send + 'static,
        R: Fn(Q) -> F + Send + Sync + 'static,
    {
        let handler = Handler {
            run: Box::new(run),
            on_hang_up,
            serving: self.serving.subscribe(),
            types: std::marker::PhantomData,
        };
        self.by_name.entry(service.to_owned()).or_default().insert(method.to_owned(), Box::new(handler));
    }

    /// Serves on the listener until [`Server::stop`]; each connection and each call gets a task of its own.
    ///
    /// # Errors
    /// Internal when the ttrpc server does not start.
    pub async fn serve(self, listener: UnixListener) -> Result<Server> {
        let services = self
            .by_name
            .into_iter()
            .map(|(name, methods)| (name, ttrpc::r#async::Service { methods, streams: HashMap::new() }))
            .collect();
        let mut server = ttrpc::r#async::Server::new()
            .register_service(services)
            .add_listener(Listener::new(accepted(listener)));
        server.start().await?;
        Ok(Server { server, serving: self.serving })
    }
}

/// Connections as they come. Out of descriptors (EMFILE) is not the end: it waits for some to be closed.
fn accepted(listener: UnixListener) -> impl futures::Stream<Item = io::Result<UnixStream>> + Send + 'static {
    futures::stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return Some((Ok(stream), listener)),
                Err(error) => {
                    tracing::warn!(%error, "accept on the ttrpc socket failed; trying again in 100 ms");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                }
            }
        }
    })
}

/// A running ttrpc server.
pub struct Server {
    server: ttrpc::r#async::Server,
    serving: watch::Sender<()>,
}

impl Server {
    /// Stops accepting, ends the connections and closes the listener. The socket file is the caller's to remove.
    /// Calls that only wait answer Unavailable; for others it waits, up to 5 s.
    pub async fn stop(mut self) {
        // The crate waits for running handlers before it closes a connection.
        drop(self.serving);
        if let Err(error) = self.server.shutdown().await {
            tracing::warn!(%error, "stopping the ttrpc server");
        }
    }
}

/// The trace that a request is part of.
fn trace_of(metadata: &HashMap<String, Vec<String>>) -> Option<TraceContext> {
    let first = |name: &str| metadata.get(name)?.first();
    TraceContext::open_file(first(trace::PARENT_HEADER)?, Path::new(first(trace::FILE_HEADER)?))
}

struct Handler<Q, R> {
    run: Box<R>,
    on_hang_up: OnHangUp,
    serving: watch::Receiver<()>,
    types: std::marker::PhantomData<fn(Q)>,
}

#[async_trait]
impl<Q, A, F, R> MethodHandler for Handler<Q, R>
where
    Q: Message + Default + 'static,
    A: Message + 'static,
    F: Future<Output = Result<A>> + Send + 'static,
    R: Fn(Q) -> F + Send + Sync + 'static,
{
    async fn handler(&self, context: TtrpcContext, request: Request) -> ttrpc::Result<Response> {
        // The span has to outlive the answer's making; it ends with this call.
        let open = trace_of(&context.metadata).map(|trace| trace.open(&request.method));
        let trace = open.as_ref().map(trace::Open::inside);
        let result = match Q::decode(request.payload.as_slice()) {
            Err(error) => Err(Error::invalid_argument(format!(
                "{}/{}: the request cannot be decoded: {error}",
                request.service, request.method
            ))),
            Ok(message) => {
                let answer = trace::carry(trace, (self.run)(message));
                match self.on_hang_up {
                    OnHangUp::Drop => {
                        let mut serving = self.serving.clone();
                        tokio::select! {
                            answer = answer => answer,
                            _ = serving.changed() => Err(Error::unavailable("the server is stopping")),
                        }
                    }
                    OnHangUp::Finish => tokio::spawn(answer).await.unwrap_or_else(|error| {
                        Err(Error::internal(format!("{}/{}: {error}", request.service, request.method)))
                    }),
                }
            }
        };
        let mut response = Response::new();
        match result {
            Ok(answer) => {
                response.set_status(ttrpc::get_status(ttrpc::Code::OK, ""));
                response.payload = answer.encode_to_vec();
            }
            Err(error) => response.set_status(error.to_status()),
        }
        Ok(response)
    }
}
