//! The shim itself: serves the task service on the socket it was given until it is told to end.
//!
//! One thread does everything but mounting and writing logs, which may wait for disks: a shim stands beside every container, so its memory counts as often.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use prost::Message;
use proto::containerd::types::Envelope;
use shim_api::publisher::{Publisher, Route, TtrpcRoute};
use shim_api::transport::Services;
use shim_api::{Error, Result, sandbox, task, trace};
use sys::reaper::Reaper;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::Notify;

use crate::args::Args;
use crate::container::Shim;
use crate::log;
use crate::sandbox::Sandbox;
use crate::service::Service;

/// The descriptor `start` passes the socket as.
const LISTENER: i32 = 3;
/// How long the end may wait for the last events to be taken.
const LAST_EVENTS: Duration = Duration::from_secs(5);
/// How long it may wait for connections to close.
const LAST_ANSWERS: Duration = Duration::from_millis(200);

/// Serves until a Shutdown, or until SIGTERM finds no container.
pub(crate) fn serve(args: &Args) -> Result<()> {
    sys::process::keep_allocator_small(1, 64 * 1024);
    // Whoever starts us may have left more open than we were given; the next thing we open must not be closed.
    let given = if args.socket.as_os_str().is_empty() { LISTENER } else { LISTENER - 1 };
    sys::process::close_descriptors_above(given.unsigned_abs())
        .map_err(|error| Error::internal(format!("close inherited descriptors: {error}")))?;
    let listener = listener(args)?;
    sys::process::become_subreaper()
        .map_err(|error| Error::internal(format!("become a subreaper: {error}")))?;
    let bundle =
        std::env::current_dir().map_err(|error| Error::internal(format!("find the bundle: {error}")))?;
    log::start(&bundle, args.debug);
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .map_err(|error| Error::internal(format!("start tokio: {error}")))?;
    let result = runtime.block_on(serve_on(args, listener));
    // A mount that hangs must not keep us.
    runtime.shutdown_background();
    result
}

fn listener(args: &Args) -> Result<UnixListener> {
    if args.socket.as_os_str().is_empty() {
        return sys::process::take_listener(LISTENER).map_err(|error| {
            Error::invalid_argument(format!(
                "no listening socket at descriptor {LISTENER} ({error}): this program is started by an engine"
            ))
        });
    }
    UnixListener::bind(&args.socket)
        .map_err(|error| Error::internal(format!("listen on {}: {error}", args.socket.display())))
}

async fn serve_on(args: &Args, listener: UnixListener) -> Result<()> {
    let internal =
        |what: &'static str| move |error: std::io::Error| Error::internal(format!("{what}: {error}"));
    let socket = SocketFile::of(&listener);
    listener.set_nonblocking(true).map_err(internal("set up the socket"))?;
    let listener = tokio::net::UnixListener::from_std(listener).map_err(internal("set up the socket"))?;
    let reaper = Reaper::start().map_err(internal("watch SIGCHLD"))?;
    let publisher = Publisher::start(&*args.namespace, route(args, &reaper));
    let shim = Shim { namespace: args.namespace.as_str().into(), reaper, publisher: publisher.clone() };

    let done = Arc::new(Notify::new());
    let reaper = shim.reaper.clone();
    let service = Arc::new(Service::new(shim, Arc::clone(&done)));
    let pod = Sandbox::new(reaper, Arc::clone(&service), Arc::clone(&done));
    service.belongs_to(&pod);
    let mut services = Services::new();
    task::register(&mut services, &service);
    sandbox::register(&mut services, &pod);
    sys::failpoint!("shim.serve.begin");
    let server = services.serve(listener).await?;
    // From here on it answers; what it was started for says that it comes.
    drop(trace::Context::of_environment().map(|trace| trace.open("begin").since(trace::process_began())));
    tracing::info!(id = args.id, namespace = args.namespace, pid = std::process::id(), "shim is up");

    let mut terminate = signal(SignalKind::terminate()).map_err(internal("watch SIGTERM"))?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(internal("watch SIGINT"))?;
    loop {
        tokio::select! {
            () = done.notified() => break,
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
        // Stopping the engine's unit may signal us too: containers go on.
        if service.may_end() {
            break;
        }
        tracing::warn!("a signal asks the shim to end, but it has containers, or is a sandbox: it goes on");
    }
    // First the name, then the listener: whoever finds the name must find us behind it.
    sys::failpoint!("shim.end.begin");
    socket.remove();
    sys::failpoint!("shim.end.socket-gone");
    let left = publisher.drain(LAST_EVENTS).await;
    sys::failpoint!("shim.end.drained");
    if left > 0 {
        tracing::error!(left, "events are lost: the engine did not take them");
    }
    // The answer to the Shutdown goes out meanwhile.
    let _ = tokio::time::timeout(LAST_ANSWERS, server.stop()).await;
    Ok(())
}

/// The file of our socket, as long as it is ours.
struct SocketFile {
    path: Option<PathBuf>,
    identity: Option<(u64, u64)>,
}

impl SocketFile {
    fn of(listener: &UnixListener) -> Self {
        let path = listener.local_addr().ok().and_then(|name| name.as_pathname().map(Path::to_owned));
        let identity = path.as_deref().and_then(identity);
        Self { path, identity }
    }

    fn remove(&self) {
        if let Some(path) = &self.path {
            // Another shim may have found us dead too early and taken the name.
            if identity(path) == self.identity {
                let _ = fs::remove_file(path);
            }
        }
    }
}

fn identity(path: &Path) -> Option<(u64, u64)> {
    fs::symlink_metadata(path).ok().map(|file| (file.dev(), file.ino()))
}

fn route(args: &Args, reaper: &Reaper) -> Box<dyn Route> {
    match std::env::var("TTRPC_ADDRESS") {
        Ok(address) if !address.is_empty() => Box::new(TtrpcRoute::new(address)),
        _ => Box::new(PublishBinary {
            binary: args.publish_binary.clone().into(),
            address: args.address.clone(),
            reaper: reaper.clone(),
        }),
    }
}

/// The way for engines without a ttrpc socket: their own binary passes the event on.
struct PublishBinary {
    binary: PathBuf,
    address: String,
    reaper: Reaper,
}

#[async_trait]
impl Route for PublishBinary {
    async fn deliver(&mut self, envelope: &Envelope) -> Result<()> {
        let event = envelope.event.as_ref().map(Message::encode_to_vec).unwrap_or_default();
        let stdin = sys::process::memory_file_of(&event)
            .map_err(|error| Error::internal(format!("keep an event for the publish binary: {error}")))?;
        let mut command = Command::new(&self.binary);
        command.args(["--address", &self.address, "publish"]);
        command.args(["--topic", &envelope.topic, "--namespace", &envelope.namespace]);
        command.stdin(stdin).stdout(Stdio::null()).stderr(Stdio::null());
        let (_, exit) = self
            .reaper
            .spawn(&mut command)
            .map_err(|error| Error::internal(format!("run {}: {error}", self.binary.display())))?;
        match exit.await.map(|exit| exit.status) {
            Some(0) => Ok(()),
            status => {
                Err(Error::unavailable(format!("{} publish ended with {status:?}", self.binary.display())))
            }
        }
    }
}
