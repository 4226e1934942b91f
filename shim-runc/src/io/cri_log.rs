//! A process's output as a CRI log, written here, beside the process, so that nothing of it depends on the engine; and
//! the same output for clients that join at a socket (`shim_api::logs` has the protocol).
//!
//! ```text
//!   stdout --pipe--.                                    .--> log file        lines.rs, file.rs
//!   stderr --pipe---+--> writer: a thread while data --<
//!   or a terminal -'     moves, a task while it rests   `--> clients' queues  clients.rs
//!   stdin <--pipe, terminal or fifo-- input.rs <------------ clients
//! ```
//!
//! Invariants: a container waits for nobody but the writer, and that for nobody but the disk; a disk that hangs holds up
//! this log alone, for the writing is not done on the shim's own thread. What is read is written before the next is
//! read, so that a log opened anew gets each line once. Between bursts of output there is no thread and no buffer.

mod clients;
mod file;
mod input;
mod lines;
mod process;

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use shim_api::Result;
use shim_api::logs::{LogSpec, Stdin, Stream};
use sys::fifo;
use tokio::sync::{oneshot, watch};

use super::{Watched, io_error};
use clients::{Command, Server, Shared};
use file::LogFile;
use input::Input;
use lines::Lines;
pub(crate) use process::run as run_logger;

/// As much as a pipe holds.
const BUFFER: usize = 64 * 1024;
/// How long the writer's thread waits for more before it ends. Also how long it may take to hear of a command.
const LINGER: Duration = Duration::from_millis(20);

/// A log whose file and socket are there, and which nobody writes yet.
pub(crate) struct Opened {
    spec: LogSpec,
    file: LogFile,
    server: Option<Server>,
}

/// A log that is being written. Dropping it ends that, and removes the socket.
pub(crate) struct CriLog {
    shared: Arc<Shared>,
    _server: Option<Server>,
}

/// Waits for what has been written so far; does not keep the log.
pub(crate) struct Flusher(Arc<Shared>);

impl Opened {
    /// Opens the file and binds the socket.
    ///
    /// # Errors
    /// When either cannot be done.
    pub(crate) async fn open(spec: LogSpec) -> Result<Self> {
        let mut file = LogFile::new(spec.path.clone());
        let opening = tokio::task::spawn_blocking(move || file.open().map(|()| file));
        let path = spec.path.as_deref().unwrap_or(std::path::Path::new("")).display();
        let file = opening.await.unwrap_or_else(|error| Err(io::Error::other(error)));
        let file = file.map_err(|error| io_error(&format!("open the log {path}"), &error))?;
        let server = Server::bind(&spec.socket)
            .map_err(|error| io_error(&format!("listen on {}", spec.socket.display()), &error))?;
        Ok(Self { spec, file, server: Some(server) })
    }

    /// As far as it can be done: the file is tried again with the first output.
    pub(crate) fn open_leniently(spec: LogSpec) -> Self {
        let mut file = LogFile::new(spec.path.clone());
        let _ = file.open();
        let server = Server::bind(&spec.socket).ok();
        Self { spec, file, server }
    }

    pub(crate) fn spec(&self) -> &LogSpec {
        &self.spec
    }

    /// Starts writing what comes from the sources, until all of them end; `until_done` is dropped then. Clients' input
    /// goes to `input`.
    pub(crate) fn start(
        self,
        sources: Vec<(Stream, Arc<Watched>)>,
        input: Option<Arc<Watched>>,
        until_done: watch::Sender<()>,
    ) -> CriLog {
        let Self { spec, file, mut server } = self;
        let input = Input::new(input.filter(|_| spec.stdin != Stdin::No), spec.terminal);
        let shared = Arc::new(Shared::new(input, spec.stdin, spec.terminal));
        if let Some(server) = &mut server {
            server.serve(&shared);
        }
        let writer = Writer { sources, lines: Lines::new(spec.cut()), file, shared: Arc::clone(&shared) };
        tokio::spawn(write(writer, until_done));
        CriLog { shared, _server: server }
    }
}

impl CriLog {
    /// Lets the process see the end of its input.
    pub(crate) fn close_stdin(&self) {
        self.shared.input.close();
    }

    pub(crate) fn flusher(&self) -> Flusher {
        Flusher(Arc::clone(&self.shared))
    }

    /// Ends the log; waits until all is written and all clients have been told.
    pub(crate) async fn finish(self) {
        let shared = Arc::clone(&self.shared);
        drop(self);
        shared.all_served().await;
    }
}

impl Drop for CriLog {
    fn drop(&mut self) {
        self.shared.close();
    }
}

impl Flusher {
    /// Waits until what the process has written by now is in the log, for at most `limit`: something may go on writing.
    pub(crate) async fn flush(&self, limit: Duration) {
        let _ = tokio::time::timeout(limit, self.0.ask(Command::Flush)).await;
    }
}

struct Writer {
    /// Those that have not ended.
    sources: Vec<(Stream, Arc<Watched>)>,
    lines: Lines,
    file: LogFile,
    shared: Arc<Shared>,
}

async fn write(mut writer: Writer, until_done: watch::Sender<()>) {
    let shared = Arc::clone(&writer.shared);
    let mut until_done = Some(until_done);
    loop {
        writer.rest().await;
        let closed = shared.is_closed();
        let working = tokio::task::spawn_blocking(move || {
            writer.work();
            if closed {
                writer.finish();
            }
            writer
        });
        writer = match working.await {
            Ok(writer) => writer,
            Err(error) => {
                tracing::error!(%error, "a container's log is written no more");
                shared.close();
                break;
            }
        };
        if writer.sources.is_empty() && until_done.take().is_some() {
            shared.end();
        }
        if closed {
            break;
        }
    }
    shared.end();
    // Nobody will answer them.
    drop(shared.commands());
}

impl Writer {
    /// Waits until there is something to do.
    async fn rest(&self) {
        let source = |number: usize| {
            let source = self.sources.get(number).map(|(_, source)| Arc::clone(source));
            async move {
                match source {
                    Some(source) => readable(&source).await,
                    None => std::future::pending().await,
                }
            }
        };
        tokio::select! {
            () = self.shared.woken() => {}
            () = source(0) => {}
            () = source(1) => {}
        }
    }

    /// Reads and writes until nothing has come for a while. Blocks.
    fn work(&mut self) {
        let (mut buffer, mut out) = (Vec::new(), Vec::new());
        let mut flushes = Vec::new();
        loop {
            for command in self.shared.commands() {
                match command {
                    Command::Reopen(reply) => {
                        let _ = reply.send(self.reopen());
                    }
                    Command::Flush(reply) => flushes.push(reply),
                }
            }
            let closed = self.shared.is_closed();
            let limit = if flushes.is_empty() && !closed { LINGER } else { Duration::ZERO };
            let ready = self.wait(limit);
            if ready == 0 || closed {
                if flushes.is_empty() {
                    break;
                }
                for reply in flushes.drain(..) {
                    let _ = oneshot::Sender::send(reply, ());
                }
                continue;
            }
            if buffer.is_empty() {
                // Each by itself above what the allocator takes from the heap: nothing of them is kept.
                buffer = vec![0; BUFFER];
                out.reserve(lines::BATCH + BUFFER);
            }
            self.lines.at(SystemTime::now());
            self.read(ready, &mut buffer, &mut out);
            self.put(&mut out);
        }
        self.lines.shrink();
    }

    /// Which sources can be read, as bits.
    fn wait(&self, limit: Duration) -> u64 {
        let sources: Vec<BorrowedFd<'_>> = self.sources.iter().map(|(_, source)| source.as_fd()).collect();
        if sources.is_empty() {
            return 0;
        }
        // An error of poll is one of memory: a read will tell.
        fifo::wait_readable(&sources, limit).unwrap_or(u64::MAX)
    }

    fn read(&mut self, ready: u64, buffer: &mut [u8], out: &mut Vec<u8>) {
        let mut sources = std::mem::take(&mut self.sources);
        let mut number = 0;
        sources.retain(|(stream, source)| {
            number += 1;
            if ready & (1 << (number - 1)) == 0 {
                return true;
            }
            let ended = match fifo::read(source.as_fd(), buffer) {
                Ok(0) => true,
                Ok(length) => {
                    self.take(*stream, &buffer[..length], out);
                    false
                }
                Err(error) => match error.kind() {
                    io::ErrorKind::Interrupted | io::ErrorKind::WouldBlock => false,
                    // A terminal whose last user closed it.
                    _ if error.raw_os_error() == Some(fifo::EIO) => true,
                    _ => {
                        tracing::warn!(%error, "a container's output cannot be read");
                        true
                    }
                },
            };
            if ended {
                self.lines.end(*stream, out);
            }
            !ended
        });
        self.sources = sources;
    }

    fn take(&mut self, stream: Stream, mut data: &[u8], out: &mut Vec<u8>) {
        self.shared.feed(stream, data);
        if !self.file.is_wanted() {
            return;
        }
        while !data.is_empty() {
            data = &data[self.lines.push(stream, data, out)..];
            if out.len() >= lines::BATCH {
                self.put(out);
            }
        }
    }

    /// Writes lines to the file, after what has to be said of lines that are missing before them.
    fn put(&mut self, out: &mut Vec<u8>) {
        let lost = self.file.lost();
        if lost > 0 {
            let text = format!("gantry: {lost} lines are missing here: they could not be written");
            let line = self.lines.note(&text, out);
            if !self.file.tell(&line) {
                self.file.lose(out, &io::ErrorKind::Other.into());
                out.clear();
                return;
            }
        }
        self.file.append(out);
        out.clear();
    }

    fn reopen(&mut self) -> Result<()> {
        let opened = self.file.open();
        self.lines.at(SystemTime::now());
        self.put(&mut Vec::new());
        opened.map_err(|error| io_error(&format!("open the log {} anew", self.file.name()), &error))
    }

    /// Writes down what has not ended: whatever comes now is not read any more.
    fn finish(&mut self) {
        self.lines.at(SystemTime::now());
        let mut out = Vec::new();
        for (stream, _) in std::mem::take(&mut self.sources) {
            self.lines.end(stream, &mut out);
        }
        self.put(&mut out);
    }
}

async fn readable(source: &Watched) {
    loop {
        // It fails when the runtime ends, as this does then.
        let Ok(mut ready) = source.readable().await else { return };
        let really = ready.try_io(|source| match fifo::wait_readable(&[source.as_fd()], Duration::ZERO)? {
            0 => Err(io::ErrorKind::WouldBlock.into()),
            _ => Ok(()),
        });
        if really.is_ok() {
            return;
        }
    }
}

/// Descriptors that can be read, as sources of a log.
pub(crate) fn watched(sources: Vec<(Stream, OwnedFd)>) -> Result<Vec<(Stream, Arc<Watched>)>> {
    let watch = |(stream, source)| {
        fifo::set_nonblocking(&source)?;
        Ok((stream, Arc::new(fifo::watch(source)?)))
    };
    let all = sources.into_iter().map(watch).collect::<io::Result<_>>();
    all.map_err(|error| io_error("watch a container's output", &error))
}
