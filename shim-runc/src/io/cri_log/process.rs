//! The log in a process of its own: a logger, which somebody else's shim starts by `binary://`.
//!
//! Contract, which is containerd's: descriptor 3 is the container's stdout or what its terminal shows, 4 its stderr; 5 is
//! closed when we are ready; the arguments are ours ([`LogSpec::to_binary_uri`]). SIGTERM comes when the task is deleted,
//! and SIGKILL 12 s later.
//!
//! Invariant: once it is ready it reads until the end, whatever becomes of file and socket: else the container would be
//! stopped by a broken pipe.

use std::sync::Arc;
use std::time::Duration;

use shim_api::logs::{LogSpec, Stream};
use shim_api::{Error, Result};
use sys::fifo;
use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::watch;

use super::super::io_error;
use super::{Opened, watched};

/// How long the output may go on after SIGTERM.
const LAST_OUTPUT: Duration = Duration::from_secs(9);
/// How long clients may take to read the last of it.
const LAST_CLIENTS: Duration = Duration::from_secs(2);

/// Runs as a logger, until both streams have ended.
pub(crate) fn run(arguments: &[String]) -> Result<()> {
    sys::process::keep_allocator_small(1, 64 * 1024);
    let spec = LogSpec::of_arguments(arguments)?;
    let taken = sys::process::take_descriptors(3, 3);
    let taken = taken.map_err(|error| io_error("take the descriptors 3, 4 and 5 of a logger", &error))?;
    let [stdout, stderr, ready] =
        taken.try_into().map_err(|_| Error::internal("three descriptors were asked for, and others came"))?;
    let mut sources = vec![(Stream::Stdout, stdout)];
    // Beside a terminal there is nothing, and shims keep it open.
    if !spec.terminal {
        sources.push((Stream::Stderr, stderr));
    }
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .thread_keep_alive(Duration::from_secs(1))
        .build()
        .map_err(|error| Error::internal(format!("start tokio: {error}")))?;
    let result = runtime.block_on(async {
        let mut terminate =
            signal(SignalKind::terminate()).map_err(|error| io_error("watch SIGTERM", &error))?;
        let fifo = spec.stdin_fifo.as_deref().map(fifo::open_lasting_writer).transpose();
        let fifo = fifo.and_then(|fifo| fifo.map(fifo::watch).transpose());
        let input = fifo.map_err(|error| io_error("open the fifo for the container's stdin", &error))?;
        let sources = watched(sources)?;
        let (alive, mut writing) = watch::channel(());
        let log = Opened::open_leniently(spec).start(sources, input.map(Arc::new), alive);
        drop(ready);
        let ended = async { while writing.changed().await.is_ok() {} };
        tokio::pin!(ended);
        tokio::select! {
            () = &mut ended => {}
            _ = terminate.recv() => {
                let _ = tokio::time::timeout(LAST_OUTPUT, ended).await;
            }
        }
        let _ = tokio::time::timeout(LAST_CLIENTS, log.finish()).await;
        Ok(())
    });
    // A disk that hangs must not keep us.
    runtime.shutdown_background();
    result
}
