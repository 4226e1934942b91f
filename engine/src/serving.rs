//! Listeners, and the layers around every gRPC call: span, metrics, and the limit of calls in flight.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use futures::Stream;
use shim_api::trace;
use tokio::net::{UnixListener, UnixStream};
use tower::{Layer, Service};
use tracing::Instrument as _;

use crate::config::Socket;
use crate::context::NAMESPACE_HEADER;
use crate::metrics::Metrics;

/// The most calls in flight. A stream counts as one for as long as its first answer takes, so that subscribers and
/// waiters, which are cheap, are not what reaches it.
const IN_FLIGHT_MAX: i64 = 8192;
/// The longest path that a unix socket may have, in bytes.
const SOCKET_PATH_MAX: usize = 107;
/// After a client that could not be taken.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// The sockets that the service manager opened for this engine (systemd's socket activation), by their paths.
#[derive(Default)]
pub struct Activated(HashMap<PathBuf, UnixListener>);

impl Activated {
    /// Takes them over. To be called once, before anything else is opened.
    pub fn take() -> anyhow::Result<Self> {
        let mut sockets = HashMap::new();
        let passed = sd_notify::listen_fds().context("cannot read the sockets that LISTEN_FDS passes")?;
        for descriptor in passed {
            let listener = sys::process::take_listener(descriptor).with_context(|| {
                format!("descriptor {descriptor} of LISTEN_FDS is no listening unix socket")
            })?;
            listener.set_nonblocking(true)?;
            let address = listener.local_addr()?;
            let path = address.as_pathname().context("a socket of LISTEN_FDS has no path")?.to_owned();
            sockets.insert(path, UnixListener::from_std(listener)?);
        }
        Ok(Activated(sockets))
    }

    /// The listener for a socket: the passed one, or a new one.
    pub fn bind(&mut self, socket: &Socket) -> anyhow::Result<Listening> {
        match self.0.remove(&socket.path) {
            Some(listener) => Ok(Listening { listener, ours: None }),
            None => Ok(Listening { listener: bind(socket)?, ours: Some(socket.path.clone()) }),
        }
    }

    /// Says which of them nobody wanted.
    pub fn report_rest(&self) {
        for path in self.0.keys() {
            tracing::warn!(path = %path.display(), "this socket was passed and is in no setting; nobody serves it");
        }
    }
}

/// A listener, with the file of its socket if that is to go with the engine.
pub struct Listening {
    /// The listener.
    pub listener: UnixListener,
    /// The file, unless the service manager keeps it.
    pub ours: Option<PathBuf>,
}

/// Binds a unix socket with its mode and owner, whatever the umask. A socket that a dead engine left is replaced;
/// one that answers is an error.
pub fn bind(socket: &Socket) -> anyhow::Result<UnixListener> {
    let path = &socket.path;
    let shown = path.display();
    if path.as_os_str().len() > SOCKET_PATH_MAX {
        bail!(
            "the socket path {shown} is longer than {SOCKET_PATH_MAX} bytes, the kernel's limit; choose a shorter one"
        );
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot create the folder of the socket {shown}"))?;
    }
    remove_stale(path)?;
    let listener = UnixListener::bind(path).with_context(|| format!("cannot listen on {shown}"))?;
    std::os::unix::fs::chown(path, Some(socket.uid), Some(socket.gid))
        .with_context(|| format!("cannot give {shown} to {}:{}", socket.uid, socket.gid))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(socket.mode))
        .with_context(|| format!("cannot set the mode of {shown}"))?;
    Ok(listener)
}

fn remove_stale(path: &Path) -> anyhow::Result<()> {
    let shown = path.display();
    match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error).with_context(|| format!("cannot look at {shown}")),
        Ok(metadata) if !metadata.file_type().is_socket() => {
            bail!("{shown} exists and is not a socket; move it away, or choose another --address")
        }
        Ok(_) => {}
    }
    match std::os::unix::net::UnixStream::connect(path) {
        Ok(_) => bail!("{shown} is in use by another process; stop that one, or choose another --address"),
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => {}
        Err(error) => return Err(error).with_context(|| format!("cannot tell whether {shown} is in use")),
    }
    std::fs::remove_file(path).with_context(|| format!("cannot remove the stale socket {shown}"))
}

/// The clients of a listener. While one cannot be taken, since no descriptor is left, the listener stays ready: who asked it
/// again at once would do nothing else.
pub fn incoming(listener: UnixListener) -> impl Stream<Item = io::Result<UnixStream>> + Send + 'static {
    futures::stream::unfold(listener, |listener| async move {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => return Some((Ok(stream), listener)),
                Err(error) => {
                    tracing::warn!(%error, "a client cannot be taken; trying again in {ACCEPT_AGAIN:?}");
                    tokio::time::sleep(ACCEPT_AGAIN).await;
                }
            }
        }
    })
}

/// The folder beneath the state where clients begin traces.
pub const TRACES_FOLDER: &str = "traces";

/// The layer around every call: what it counts in, and where traces are.
#[derive(Clone)]
pub struct Observe(pub Metrics, pub Arc<Path>);

impl<S> Layer<S> for Observe {
    type Service = Observed<S>;

    fn layer(&self, service: S) -> Observed<S> {
        Observed { service, metrics: self.0.clone(), traces: self.1.clone() }
    }
}

/// A service with a span, metrics and a limit around each call.
#[derive(Clone)]
pub struct Observed<S> {
    service: S,
    metrics: Metrics,
    traces: Arc<Path>,
}

/// Takes the call off the count when its answer is there, or when it is dropped because the client went away.
struct InFlight(Metrics);

impl Drop for InFlight {
    fn drop(&mut self) {
        self.0.leave();
    }
}

impl<S, B> Service<http::Request<B>> for Observed<S>
where
    S: Service<http::Request<B>, Response = http::Response<tonic::body::Body>>,
    S::Future: Send + 'static,
{
    type Response = S::Response;
    type Error = S::Error;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, Self::Error>> + Send>>;

    fn poll_ready(&mut self, context: &mut Context<'_>) -> Poll<Result<(), Self::Error>> {
        self.service.poll_ready(context)
    }

    fn call(&mut self, request: http::Request<B>) -> Self::Future {
        let in_flight = self.metrics.begin();
        let guard = InFlight(self.metrics.clone());
        if in_flight > IN_FLIGHT_MAX {
            let status = tonic::Status::resource_exhausted(format!(
                "the engine is working on {IN_FLIGHT_MAX} calls already; try again later"
            ));
            return Box::pin(async move {
                drop(guard);
                Ok(status.into_http())
            });
        }
        let path = request.uri().path().to_owned();
        let namespace =
            request.headers().get(NAMESPACE_HEADER).and_then(|value| value.to_str().ok()).unwrap_or("");
        let span = tracing::info_span!("rpc", method = %path, namespace);
        let metrics = self.metrics.clone();
        let parent = request.headers().get(trace::PARENT_HEADER).and_then(|value| value.to_str().ok());
        let traced = parent.and_then(|parent| trace::Context::join(parent, &self.traces));
        let traced = traced.map(|trace| trace.open(path.rsplit('.').next().unwrap_or(&path)));
        let call = trace::carry(traced.as_ref().map(trace::Open::inside), self.service.call(request));
        let begun = Instant::now();
        Box::pin(
            async move {
                let answer = call.await;
                drop((guard, traced));
                if let Ok(response) = &answer {
                    // An error of a unary call is in the headers; a stream's comes later, in its trailers.
                    let code = response
                        .headers()
                        .get("grpc-status")
                        .map_or(tonic::Code::Ok, |code| tonic::Code::from_bytes(code.as_bytes()));
                    let took = begun.elapsed();
                    metrics.answered(&path, code, took);
                    tracing::debug!(?code, ?took, "answered");
                }
                answer
            }
            .instrument(span),
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn socket(path: &Path) -> Socket {
        Socket {
            path: path.to_owned(),
            uid: rustix::process::getuid().as_raw(),
            gid: rustix::process::getgid().as_raw(),
            mode: 0o660,
        }
    }

    #[tokio::test]
    async fn sockets() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a/s.sock");
        let listener = bind(&socket(&path)).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o660);
        assert!(bind(&socket(&path)).unwrap_err().to_string().contains("in use"));
        drop(listener);
        // What a dead engine left does not hinder the next.
        bind(&socket(&path)).unwrap();
        let file = folder.path().join("file");
        std::fs::write(&file, "precious").unwrap();
        assert!(bind(&socket(&file)).unwrap_err().to_string().contains("not a socket"));
        assert_eq!(std::fs::read(&file).unwrap(), b"precious");
        assert!(
            bind(&socket(&folder.path().join("x".repeat(120)))).unwrap_err().to_string().contains("longer")
        );
    }
}
