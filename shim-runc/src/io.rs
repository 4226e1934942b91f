//! A process's standard streams: from what a client names (fifos, files, a logging program, nothing) to what the
//! runtime is given, and the copying in between.
//!
//! ```text
//!   stdin fifo --> copy --> pipe -->              --> pipe --> copy --> stdout fifo or file
//!     (kept open until close-io)       process    --> pipe --> copy --> stderr fifo or file
//!   stdin fifo --> copy --> terminal <->          --> terminal --> copy --> stdout fifo or file
//!                                                 --> pipe --> logging program (no copying)
//!                                                 --> pipe or terminal --> log, and clients of its socket (cri_log.rs)
//! ```
//!
//! Invariants: opening never waits for a client. Both ends of an output fifo are held here, so clients may come, go
//! and come again; when its 64 KiB are full and nobody reads, the process waits as it would on any pipe. Buffers
//! exist only while data is moving.

mod console;
mod cri_log;
mod logger;
mod uri;

use std::fs::{File, OpenOptions};
use std::future::Future;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::process::Stdio as Stream;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use shim_api::logs::{LogSpec, Stdin as LogStdin, Stream as Output};
use shim_api::{Error, Result};
use sys::fifo;
use sys::reaper::Reaper;
use tokio::io::unix::AsyncFd;
use tokio::sync::watch;
use tokio::task::AbortHandle;

use crate::runc::{ConsoleSocket, Streams};
use console::Console;
pub(crate) use cri_log::run_logger;
use cri_log::{CriLog, Opened};
use logger::Logger;
use uri::Target;

const BUFFER: usize = 32 * 1024;
/// How long the end of a process may wait for its log: the disk may hang, or somebody else write without a pause.
const FLUSH_LIMIT: Duration = Duration::from_millis(500);

type Watched = AsyncFd<OwnedFd>;

/// What a client named; empty means none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Stdio {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// What is needed beside the names.
pub(crate) struct Surroundings<'a> {
    pub(crate) reaper: &'a Reaper,
    pub(crate) namespace: &'a str,
    /// The container's id, or the exec's; logging programs are told.
    pub(crate) id: &'a str,
    /// Owner of the pipes the process gets.
    pub(crate) uid: u32,
    pub(crate) gid: u32,
}

/// Streams ready for a runtime; dropping it closes everything.
pub(crate) struct Prepared {
    streams: Option<Streams>,
    console: Option<Console>,
    stdin: Option<Stdin>,
    outputs: Vec<(OwnedFd, Sink)>,
    /// For a terminal: where its output goes.
    terminal_sink: Option<Sink>,
    logger: Option<Logger>,
    log: Option<Log>,
}

/// A log, and our ends of the process's pipes; a terminal has none.
struct Log {
    opened: Opened,
    sources: Vec<(Output, OwnedFd)>,
    input: Option<OwnedFd>,
}

/// The fifo a client writes standard input to.
struct Stdin {
    fifo: OwnedFd,
    /// While it lives the fifo has a writer, so that clients may go without ending the process's input.
    keeper: OwnedFd,
    /// The end of the process's pipe to write to; a terminal has none.
    pipe: Option<OwnedFd>,
}

enum Sink {
    Pipe(OwnedFd),
    File(File),
}

/// The streams of a process that runs. Dropping it ends the copying.
pub(crate) struct ProcessIo {
    keeper: Mutex<Option<OwnedFd>>,
    terminal: Option<Arc<Watched>>,
    /// Its senders are the output's copying tasks.
    copying: watch::Receiver<()>,
    tasks: Vec<AbortHandle>,
    _logger: Option<Logger>,
    log: Option<CriLog>,
}

/// Opens everything a process's streams need.
///
/// # Errors
/// InvalidArgument for a URI nobody knows, NotFound when a fifo or program is missing.
pub(crate) async fn prepare(stdio: &Stdio, around: &Surroundings<'_>) -> Result<Prepared> {
    let mut prepared = Prepared {
        streams: None,
        console: None,
        stdin: None,
        outputs: Vec::new(),
        terminal_sink: None,
        logger: None,
        log: None,
    };
    let stdin = if stdio.stdin.is_empty() { None } else { Some(open_stdin(Path::new(&stdio.stdin))?) };
    let stdout = Target::parse(&stdio.stdout)?;
    if stdio.terminal {
        prepared.console = Some(Console::listen()?);
        prepared.stdin = stdin;
        prepared.terminal_sink = match stdout {
            Target::Program(program) => {
                let (logger, stdout, _stderr) = Logger::start(&program, around).await?;
                prepared.logger = Some(logger);
                fifo::set_nonblocking(&stdout)
                    .map_err(|error| io_error("set up the logger's pipe", &error))?;
                Some(Sink::Pipe(stdout))
            }
            Target::Log(spec) => {
                let opened = Opened::open(LogSpec { terminal: true, ..spec }).await?;
                prepared.log = Some(Log { opened, sources: Vec::new(), input: None });
                None
            }
            other => Sink::open(&other)?,
        };
        return Ok(prepared);
    }
    let mut streams = Streams { stdin: Stream::null(), stdout: Stream::null(), stderr: Stream::null() };
    if let Some(stdin) = stdin {
        let (theirs, ours) = pipe(around)?;
        fifo::set_nonblocking(&ours).map_err(|error| io_error("set up a pipe", &error))?;
        streams.stdin = theirs.into();
        prepared.stdin = Some(Stdin { pipe: Some(ours), ..stdin });
    }
    if let Target::Log(spec) = stdout {
        let mut log = Log {
            opened: Opened::open(LogSpec { terminal: false, ..spec }).await?,
            sources: Vec::new(),
            input: None,
        };
        for (output, stream) in [(Output::Stdout, &mut streams.stdout), (Output::Stderr, &mut streams.stderr)]
        {
            let (ours, theirs) = pipe(around)?;
            *stream = theirs.into();
            log.sources.push((output, ours));
        }
        if log.opened.spec().stdin != LogStdin::No {
            let (theirs, ours) = pipe(around)?;
            fifo::set_nonblocking(&ours).map_err(|error| io_error("set up a pipe", &error))?;
            streams.stdin = theirs.into();
            log.input = Some(ours);
        }
        prepared.log = Some(log);
    } else if let Target::Program(program) = stdout {
        let (logger, stdout, stderr) = Logger::start(&program, around).await?;
        prepared.logger = Some(logger);
        streams.stdout = stdout.into();
        streams.stderr = stderr.into();
    } else {
        let stderr = Target::parse(&stdio.stderr)?;
        for (target, stream) in [(stdout, &mut streams.stdout), (stderr, &mut streams.stderr)] {
            if let Some(sink) = Sink::open(&target)? {
                let (ours, theirs) = pipe(around)?;
                fifo::set_nonblocking(&ours).map_err(|error| io_error("set up a pipe", &error))?;
                *stream = theirs.into();
                prepared.outputs.push((ours, sink));
            }
        }
    }
    prepared.streams = Some(streams);
    Ok(prepared)
}

impl Prepared {
    /// The streams for the runtime, once; none when the process gets a terminal.
    pub(crate) fn take_streams(&mut self) -> Option<Streams> {
        self.streams.take()
    }

    pub(crate) fn console_socket(&self) -> ConsoleSocket<'_> {
        self.console.as_ref().map(Console::path)
    }

    /// Starts the copying; the runtime has made the process.
    ///
    /// # Errors
    /// When the runtime sent no terminal though it was to.
    pub(crate) async fn attach(self) -> Result<ProcessIo> {
        let (alive, copying) = watch::channel(());
        let mut io = ProcessIo {
            keeper: Mutex::new(None),
            terminal: None,
            copying,
            tasks: Vec::new(),
            _logger: self.logger,
            log: None,
        };
        let failed = |error: io::Error| io_error("watch a stream", &error);
        if let Some(console) = self.console {
            let master = Arc::new(fifo::watch(console.receive().await?).map_err(failed)?);
            if let Some(log) = self.log {
                let sources = vec![(Output::Stdout, Arc::clone(&master))];
                io.log = Some(log.opened.start(sources, Some(Arc::clone(&master)), alive.clone()));
            }
            if let Some(sink) = self.terminal_sink {
                let source = Arc::clone(&master);
                let sink = sink.watch().map_err(failed)?;
                io.run(alive.clone(), async move { copy(&source, &sink).await });
            }
            if let Some(stdin) = self.stdin {
                let source = fifo::watch(stdin.fifo).map_err(failed)?;
                *io.keeper() = Some(stdin.keeper);
                let terminal = Arc::clone(&master);
                io.run((), async move {
                    copy_to(&source, &terminal).await?;
                    // What a person would type: a terminal has no other end-of-file.
                    write_all(&terminal, &[sys::pty::end_of_file(terminal.get_ref())]).await
                });
            }
            io.terminal = Some(master);
            return Ok(io);
        }
        if let Some(log) = self.log {
            let input = log.input.map(fifo::watch).transpose().map_err(failed)?;
            let sources = cri_log::watched(log.sources)?;
            io.log = Some(log.opened.start(sources, input.map(Arc::new), alive.clone()));
        }
        for (source, sink) in self.outputs {
            let source = fifo::watch(source).map_err(failed)?;
            let sink = sink.watch().map_err(failed)?;
            io.run(alive.clone(), async move { copy(&source, &sink).await });
        }
        if let Some(Stdin { fifo: source, keeper, pipe: Some(pipe) }) = self.stdin {
            let source = fifo::watch(source).map_err(failed)?;
            let pipe = fifo::watch(pipe).map_err(failed)?;
            *io.keeper() = Some(keeper);
            io.run((), async move { copy_to(&source, &pipe).await });
        }
        Ok(io)
    }
}

impl ProcessIo {
    /// Lets the process see the end of its input once every client has closed the fifo, too.
    pub(crate) fn close_stdin(&self) {
        self.keeper().take();
        if let Some(log) = &self.log {
            log.close_stdin();
        }
    }

    /// Sets the terminal's size in characters; a process without one does not care.
    pub(crate) fn resize(&self, columns: u32, rows: u32) -> Result<()> {
        let Some(terminal) = &self.terminal else { return Ok(()) };
        let small = |size: u32| u16::try_from(size).unwrap_or(u16::MAX);
        sys::pty::resize(terminal.get_ref(), small(columns), small(rows))
            .map_err(|error| io_error("resize the terminal", &error))
    }

    /// Waits until all output has been passed on, for at most `limit`: something else may hold the pipe open, or
    /// nobody may read.
    pub(crate) fn drained(&self, limit: Duration) -> impl Future<Output = bool> + Send + use<> {
        let mut copying = self.copying.clone();
        async move {
            tokio::time::timeout(limit, async { while copying.changed().await.is_ok() {} }).await.is_ok()
        }
    }

    /// What has to be waited for before the process's end is told: the rest of its output, for at most `limit`. With a log
    /// that is what it has written, however long somebody else holds the pipe.
    pub(crate) fn drained_for_exit(&self, limit: Duration) -> impl Future<Output = ()> + Send + use<> {
        let flusher = self.log.as_ref().map(CriLog::flusher);
        let drained = self.drained(limit);
        async move {
            match flusher {
                Some(flusher) => flusher.flush(FLUSH_LIMIT).await,
                None => drop(drained.await),
            }
        }
    }

    fn keeper(&self) -> std::sync::MutexGuard<'_, Option<OwnedFd>> {
        self.keeper.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Runs a copying task; `until_done` is dropped when it ends.
    fn run(
        &mut self,
        until_done: impl Send + 'static,
        task: impl Future<Output = io::Result<()>> + Send + 'static,
    ) {
        let task = tokio::spawn(async move {
            if let Err(error) = task.await {
                tracing::debug!(%error, "a stream ended early");
            }
            drop(until_done);
        });
        self.tasks.push(task.abort_handle());
    }
}

impl Drop for ProcessIo {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

impl Sink {
    fn open(target: &Target) -> Result<Option<Self>> {
        let failed = |path: &Path| {
            let path = path.display().to_string();
            move |error: io::Error| io_error(&format!("open {path} for a process's output"), &error)
        };
        match target {
            Target::Nothing | Target::Program(_) => Ok(None),
            Target::Log(_) => {
                Err(Error::invalid_argument("a cri:// URI stands in stdout, and is for stderr as well"))
            }
            Target::Path(path) if fifo::is_fifo(path) => {
                Ok(Some(Self::Pipe(fifo::open_lasting_writer(path).map_err(failed(path))?)))
            }
            Target::Path(path) => {
                Ok(Some(Self::File(OpenOptions::new().append(true).open(path).map_err(failed(path))?)))
            }
            Target::LogFile(path) => {
                if let Some(folder) = path.parent() {
                    std::fs::create_dir_all(folder).map_err(failed(path))?;
                }
                let file = OpenOptions::new().append(true).create(true).open(path).map_err(failed(path))?;
                Ok(Some(Self::File(file)))
            }
        }
    }

    fn watch(self) -> io::Result<WatchedSink> {
        Ok(match self {
            Self::Pipe(pipe) => WatchedSink::Pipe(fifo::watch(pipe)?),
            Self::File(file) => WatchedSink::File(file),
        })
    }
}

enum WatchedSink {
    Pipe(Watched),
    /// Regular files cannot be watched; writes go to the page cache.
    File(File),
}

fn open_stdin(path: &Path) -> Result<Stdin> {
    let failed = |error: io::Error| io_error(&format!("open stdin {}", path.display()), &error);
    // In this order: a non-blocking writer can only be opened when there is a reader.
    let fifo = fifo::open_reader(path).map_err(failed)?;
    let keeper = fifo::open_writer(path).map_err(failed)?;
    Ok(Stdin { fifo, keeper, pipe: None })
}

/// A pipe (reading end, writing end) that belongs to the container's user.
fn pipe(around: &Surroundings<'_>) -> Result<(OwnedFd, OwnedFd)> {
    let failed = |error: io::Error| io_error("make a pipe", &error);
    let (reader, writer) = io::pipe().map_err(failed)?;
    if (around.uid, around.gid) != (0, 0) {
        std::os::unix::fs::fchown(&reader, Some(around.uid), Some(around.gid)).map_err(failed)?;
    }
    Ok((reader.into(), writer.into()))
}

/// Copies until the source ends; then, and not before, the sink may be closed.
async fn copy(source: &Watched, sink: &WatchedSink) -> io::Result<()> {
    match sink {
        WatchedSink::Pipe(sink) => copy_to(source, sink).await,
        WatchedSink::File(file) => {
            while let Some(data) = read(source).await? {
                (&*file).write_all(&data)?;
            }
            Ok(())
        }
    }
}

async fn copy_to(source: &Watched, sink: &Watched) -> io::Result<()> {
    while let Some(data) = read(source).await? {
        write_all(sink, &data).await?;
    }
    Ok(())
}

/// The next piece of data, `None` at the end.
async fn read(source: &Watched) -> io::Result<Option<Vec<u8>>> {
    loop {
        let mut ready = source.readable().await?;
        let mut buffer = vec![0; BUFFER];
        match ready.try_io(|source| sys::fifo::read(source.as_fd(), &mut buffer)) {
            Ok(Ok(0)) => return Ok(None),
            Ok(Ok(length)) => {
                buffer.truncate(length);
                return Ok(Some(buffer));
            }
            // A terminal whose last user closed it.
            Ok(Err(error)) if error.raw_os_error() == Some(sys::fifo::EIO) => return Ok(None),
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
}

async fn write_all(sink: &Watched, mut data: &[u8]) -> io::Result<()> {
    while !data.is_empty() {
        let mut ready = sink.writable().await?;
        match ready.try_io(|sink| sys::fifo::write(sink.as_fd(), data)) {
            Ok(Ok(length)) => data = &data[length..],
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
            Ok(Err(error)) => return Err(error),
            Err(_would_block) => {}
        }
    }
    Ok(())
}

fn io_error(what: &str, error: &io::Error) -> Error {
    match error.kind() {
        io::ErrorKind::NotFound => Error::not_found(format!("{what}: {error}")),
        io::ErrorKind::PermissionDenied => Error::permission_denied(format!("{what}: {error}")),
        _ => Error::internal(format!("{what}: {error}")),
    }
}
