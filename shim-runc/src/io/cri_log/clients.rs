//! Those who come to a log's socket: to have the log opened anew, or to join the streams.
//!
//! Invariant: whoever writes the log never waits for long. Each client has a queue of its own. One whose queue is full and stays
//! so for [`PATIENCE`] is let go of, with an error behind what it has not read, and with a last time limit.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use shim_api::logs::{Message, Reader, Request, Stdin, Stream, Streams, encode_output, listen};
use shim_api::{Error, Result};
use tokio::io::AsyncWriteExt;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::{Notify, oneshot, watch};
use tokio::task::AbortHandle;

use super::input::Input;

/// How much a client may be behind.
const QUEUE: usize = 1 << 20;
/// How long all clients together may hold up a batch of output: whoever reads, and waits for its turn at the processor
/// only, is not to be taken for one who does not read.
const PATIENCE: Duration = Duration::from_millis(50);
/// What is sent at once: as room for more is counted.
const PIECE: usize = 64 * 1024;
/// How many may have joined at once.
const CLIENTS: usize = 64;
/// How long a client may take to say what it wants.
const REQUEST_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to read the last we have for it.
const LAST_WORDS: Duration = Duration::from_secs(10);
/// Out of descriptors: how long until some may be free.
const ACCEPT_AGAIN: Duration = Duration::from_millis(100);

/// What the clients and the writer of a log share.
pub(super) struct Shared {
    pub(super) input: Input,
    stdin: Stdin,
    terminal: bool,
    state: Mutex<State>,
    /// There is something for the writer to do.
    wake: Notify,
    /// Held by everyone who is being served.
    served: watch::Sender<()>,
}

#[derive(Default)]
struct State {
    commands: Vec<Command>,
    clients: Vec<Arc<Client>>,
    /// All output has been sent.
    ended: bool,
    /// The task is no more.
    closed: bool,
}

/// For the writer of the log. An answer whose asker has gone is nobody's.
pub(super) enum Command {
    Reopen(oneshot::Sender<Result<()>>),
    /// Say when all that has been written to the pipes by now is in the log.
    Flush(oneshot::Sender<()>),
}

struct Client {
    wanted: Streams,
    queue: Mutex<Queue>,
    more: Notify,
    less: Condvar,
    let_go: Notify,
}

#[derive(Default)]
struct Queue {
    /// Frames.
    pending: Vec<u8>,
    /// Bytes that are being sent.
    sending: usize,
    /// Nothing follows.
    last: bool,
}

impl Shared {
    pub(super) fn new(input: Input, stdin: Stdin, terminal: bool) -> Self {
        let served = watch::Sender::new(());
        Self { input, stdin, terminal, state: Mutex::default(), wake: Notify::new(), served }
    }

    /// Resolves when there may be something to do.
    pub(super) async fn woken(&self) {
        self.wake.notified().await;
    }

    pub(super) fn commands(&self) -> Vec<Command> {
        std::mem::take(&mut self.lock().commands)
    }

    /// Asks the writer; an error when it is gone.
    pub(super) async fn ask<T>(&self, command: impl FnOnce(oneshot::Sender<T>) -> Command) -> Result<T> {
        let (reply, answer) = oneshot::channel();
        {
            let mut state = self.lock();
            if !state.closed {
                state.commands.push(command(reply));
            }
        }
        self.wake.notify_one();
        answer.await.map_err(|_| Error::failed_precondition("the task whose log this was is no more"))
    }

    /// Hands output to those who want it. May block for [`PATIENCE`].
    pub(super) fn feed(&self, stream: Stream, data: &[u8]) {
        let mut clients = self.lock().clients.clone();
        if clients.is_empty() {
            return;
        }
        let until = Instant::now() + PATIENCE;
        clients.retain(|client| client.wanted.wants(stream) && !client.push(stream, data, until));
        clients.iter().for_each(|client| self.leave(client));
    }

    /// Tells everyone that there will be no more output.
    pub(super) fn end(&self) {
        let clients = {
            let mut state = self.lock();
            state.ended = true;
            std::mem::take(&mut state.clients)
        };
        clients.iter().for_each(|client| client.say_last(&Message::End));
    }

    /// The task is no more: the writer is to end.
    pub(super) fn close(&self) {
        self.lock().closed = true;
        self.wake.notify_one();
    }

    pub(super) fn is_closed(&self) -> bool {
        self.lock().closed
    }

    /// Waits until everyone who is being served has gone.
    pub(super) async fn all_served(&self) {
        self.served.closed().await;
    }

    /// Whether the process's input ends with the client that has it.
    fn ends_with_client(&self) -> bool {
        self.stdin == Stdin::Once && !self.terminal
    }

    fn join(&self, wanted: Streams) -> Result<Arc<Client>> {
        let client = Arc::new(Client {
            wanted,
            queue: Mutex::default(),
            more: Notify::new(),
            less: Condvar::new(),
            let_go: Notify::new(),
        });
        let mut state = self.lock();
        if state.clients.len() >= CLIENTS {
            return Err(Error::resource_exhausted(format!("{CLIENTS} clients have joined already")));
        }
        // Its answer goes into the queue first, so that nothing can come before it.
        client.lock_and(|queue| Message::Done.encode(&mut queue.pending));
        if state.ended {
            client.say_last(&Message::End);
        } else {
            state.clients.push(Arc::clone(&client));
        }
        Ok(client)
    }

    fn leave(&self, client: &Arc<Client>) {
        self.lock().clients.retain(|other| !Arc::ptr_eq(other, client));
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Client {
    /// Queues output; false when the client is let go of, as it has been behind until that time.
    fn push(&self, stream: Stream, data: &[u8], until: Instant) -> bool {
        let full =
            |queue: &mut Queue| !queue.last && queue.pending.len() + queue.sending + data.len() > QUEUE;
        let queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
        let left = until.saturating_duration_since(Instant::now());
        let waited = self.less.wait_timeout_while(queue, left, full);
        let (mut queue, waited) = waited.unwrap_or_else(PoisonError::into_inner);
        if queue.last {
            return true;
        }
        if waited.timed_out() {
            drop(queue);
            self.say_last(&Message::Failed(Error::resource_exhausted(
                "this client is 1 MiB of output behind; the task goes on without it",
            )));
            return false;
        }
        encode_output(stream, data, &mut queue.pending);
        drop(queue);
        self.more.notify_one();
        true
    }

    fn say_last(&self, message: &Message) {
        self.lock_and(|queue| {
            if !queue.last {
                message.encode(&mut queue.pending);
                queue.last = true;
            }
        });
        self.let_go.notify_one();
        self.more.notify_one();
    }

    fn lock_and<T>(&self, change: impl FnOnce(&mut Queue) -> T) -> T {
        change(&mut self.queue.lock().unwrap_or_else(PoisonError::into_inner))
    }

    /// Sends what is queued until the last of it.
    async fn send(&self, mut to: OwnedWriteHalf) {
        loop {
            let (frames, last) = {
                let mut queue = self.queue.lock().unwrap_or_else(PoisonError::into_inner);
                queue.sending = queue.pending.len();
                (std::mem::take(&mut queue.pending), queue.last)
            };
            if frames.is_empty() {
                if last {
                    return;
                }
                self.more.notified().await;
            }
            for piece in frames.chunks(PIECE) {
                if to.write_all(piece).await.is_err() {
                    return;
                }
                self.lock_and(|queue| queue.sending -= piece.len());
                self.less.notify_one();
            }
        }
    }

    /// Resolves some time after the client was let go of.
    async fn too_slow(&self) {
        self.let_go.notified().await;
        tokio::time::sleep(LAST_WORDS).await;
    }
}

/// The socket. Dropping it removes it; those who are being served are served to their end.
pub(super) struct Server {
    path: PathBuf,
    accepting: Option<AbortHandle>,
    listener: Option<UnixListener>,
}

impl Server {
    pub(super) fn bind(path: &Path) -> std::io::Result<Self> {
        Ok(Self { path: path.to_owned(), accepting: None, listener: Some(listen(path)?) })
    }

    pub(super) fn serve(&mut self, shared: &Arc<Shared>) {
        let Some(listener) = self.listener.take() else { return };
        let shared = Arc::clone(shared);
        let accepting = tokio::spawn(async move {
            loop {
                match listener.accept().await {
                    Ok((stream, _)) => {
                        let shared = Arc::clone(&shared);
                        tokio::spawn(async move {
                            let _served = shared.served.subscribe();
                            talk(stream, &shared).await;
                        });
                    }
                    Err(error) => {
                        tracing::warn!(%error, "accept on the socket of a log failed; trying again");
                        tokio::time::sleep(ACCEPT_AGAIN).await;
                    }
                }
            }
        });
        self.accepting = Some(accepting.abort_handle());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if let Some(accepting) = &self.accepting {
            accepting.abort();
        }
        let _ = std::fs::remove_file(&self.path);
    }
}

async fn talk(stream: UnixStream, shared: &Arc<Shared>) {
    let (from, mut to) = stream.into_split();
    let mut from = Reader::new(from);
    let request = match tokio::time::timeout(REQUEST_LIMIT, from.request()).await {
        Ok(request) => request,
        Err(_) => Err(Error::deadline_exceeded("nothing was asked within 10 s")),
    };
    let answer = match request {
        Ok(Request::Attach(wanted)) => match shared.join(wanted) {
            Ok(client) => return serve(&client, from, to, shared).await,
            Err(error) => Err(error),
        },
        Ok(Request::Reopen) => shared.ask(Command::Reopen).await.flatten(),
        Err(error) => Err(error),
    };
    let mut bytes = Vec::new();
    match answer {
        Ok(()) => Message::Done.encode(&mut bytes),
        Err(error) => Message::Failed(error).encode(&mut bytes),
    }
    let _ = tokio::time::timeout(LAST_WORDS, to.write_all(&bytes)).await;
}

async fn serve(client: &Arc<Client>, from: Reader<OwnedReadHalf>, to: OwnedWriteHalf, shared: &Arc<Shared>) {
    // Two ways that do not wait for each other: a process may write while it does not read.
    tokio::select! {
        () = client.send(to) => {}
        () = listen_to(client, from, shared) => {}
        () = client.too_slow() => {}
    }
    shared.leave(client);
    if client.wanted.stdin && shared.ends_with_client() {
        shared.input.close();
    }
}

/// Reads what a client says, until it goes.
async fn listen_to(client: &Arc<Client>, mut from: Reader<OwnedReadHalf>, shared: &Arc<Shared>) {
    loop {
        match from.message().await {
            Ok(Some(Message::Stdin(data))) if client.wanted.stdin => shared.input.write(&data).await,
            Ok(Some(Message::CloseStdin)) if client.wanted.stdin => {
                if shared.ends_with_client() {
                    shared.input.close();
                } else if shared.stdin != Stdin::No {
                    shared.leave(client);
                    client.say_last(&Message::End);
                }
            }
            Ok(None) => return,
            Ok(Some(other)) => {
                let error = Error::invalid_argument(format!("a client that has joined says {other:?}"));
                return dismiss(client, shared, error).await;
            }
            Err(error) => return dismiss(client, shared, error).await,
        }
    }
}

/// Says the error, and waits for the sending, which ends with it.
async fn dismiss(client: &Arc<Client>, shared: &Shared, error: Error) {
    shared.leave(client);
    client.say_last(&Message::Failed(error));
    std::future::pending::<()>().await;
}
