//! Connections as those who use them see them, whichever protocol is spoken: streams that bytes come from and go to.
//!
//! ```text
//!  client --> reader --Feeder==room==> Input     whoever serves the stream
//!  client <-- writer <--queue--------- Output
//! ```
//!
//! Invariants: what is kept for a client is bounded, for each stream and for the connection, and so is what is kept from it: who does
//! not read holds up who writes. What nobody reads any more is thrown away and holds up nothing. A stream's token is cancelled when
//! the client has left it: reset it, or gone.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use bytes::Bytes;
use parking_lot::Mutex;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc};
use tokio::time::Instant;
use tokio_util::sync::{CancellationToken, DropGuard};

use super::spdy::headers::Headers;

/// What waits in a stream for its reader, in bytes.
const STREAM_ROOM: usize = 1 << 20;
/// What waits in all streams of a connection.
const CONNECTION_ROOM: usize = 16 << 20;
/// The longest piece that goes one way or the other.
pub(crate) const PIECE: usize = 32 << 10;
/// Pieces that wait to be written.
const QUEUE: usize = 16;
/// Streams that nobody has looked at.
const OPENED: usize = 16;
/// Bytes that are read before the client hears that there is room for more.
const CREDIT: u32 = 32 << 10;
/// How long a client may take to go once all is said, until it is told to, and then until the connection is cut.
const LINGER: Duration = Duration::from_secs(3);

/// What is to be written, and on which stream.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Outgoing {
    /// The stream is accepted.
    Accept(u32),
    /// Bytes.
    Data(u32, Bytes),
    /// No more bytes.
    End(u32),
    /// The stream is over, both ways; for one that the client may think is there.
    Reset(u32, u32),
    /// The stream is over, both ways, unless it is already.
    Leave(u32),
    /// An answer to a ping.
    Pong(u32),
    /// All streams are over.
    ResetAll,
    /// The connection is over, for this reason: nothing is written after it.
    GoAway(u32),
}

/// A client's connection. Dropped, it is cut.
pub(crate) struct Connection {
    /// The streams that the client opens.
    pub(super) opened: mpsc::Receiver<Stream>,
    queue: mpsc::Sender<Outgoing>,
    over: CancellationToken,
    _cut: DropGuard,
}

/// The other side of a [`Connection`]: what moves its bytes.
pub(super) struct Driver {
    /// Takes the streams that the client opens.
    pub(super) opened: mpsc::Sender<Stream>,
    /// What goes out.
    pub(super) outgoing: mpsc::Receiver<Outgoing>,
    /// How much room there is again, and in which stream. Not bounded, since it grows by what the client sends, slowly.
    pub(super) credits: mpsc::UnboundedReceiver<(u32, u32)>,
    /// What the streams are made of.
    pub(super) maker: Maker,
    /// Cancelled when nobody wants the connection any more.
    pub(super) cut: CancellationToken,
}

/// Makes streams.
pub(super) struct Maker {
    pub(super) queue: mpsc::Sender<Outgoing>,
    credits: mpsc::UnboundedSender<(u32, u32)>,
    room: Arc<Semaphore>,
    /// Cancelled by the driver when the connection is over; parent of the streams' tokens.
    pub(super) over: CancellationToken,
    /// The room that the client has for the whole connection.
    pub(super) windows: Arc<Windows>,
    pub(super) activity: Arc<Activity>,
}

/// A connection, both sides of it. One on which nothing moves for `idle` is over; zero means no limit.
pub(super) fn connection(idle: Duration) -> (Connection, Driver) {
    let (opened, opened_by) = mpsc::channel(OPENED);
    let (queue, outgoing) = mpsc::channel(QUEUE);
    let (credits, credited) = mpsc::unbounded_channel();
    let (over, cut) = (CancellationToken::new(), CancellationToken::new());
    let room = Arc::new(Semaphore::new(CONNECTION_ROOM));
    let (windows, activity) = (Arc::default(), Arc::new(Activity::new(idle)));
    let maker = Maker { queue: queue.clone(), credits, room, over: over.clone(), windows, activity };
    let driver = Driver { opened, outgoing, credits: credited, maker, cut: cut.clone() };
    (Connection { opened: opened_by, queue, over, _cut: cut.drop_guard() }, driver)
}

impl Connection {
    /// The next stream that the client opens; None when it has gone.
    pub(super) async fn next(&mut self) -> Option<Stream> {
        self.opened.recv().await
    }

    /// Cancelled when the client has gone.
    pub(super) fn over(&self) -> CancellationToken {
        self.over.clone()
    }

    /// Refuses what the client opens from here on.
    pub(super) fn refuse_more(&mut self) {
        self.opened.close();
    }

    /// Ends it once all that was sent has arrived, or the client takes too long.
    pub(super) async fn finish(mut self) {
        self.refuse_more();
        let told = async {
            for last in [Outgoing::ResetAll, Outgoing::GoAway(0)] {
                let _ = self.queue.send(last).await;
                // It goes by itself, once it has read all. Hanging up on one that still writes could take from it what it has not
                // read yet.
                let _ = tokio::time::timeout(LINGER, self.over.cancelled()).await;
            }
        };
        // One that does not read lets nothing be sent.
        let _ = tokio::time::timeout(3 * LINGER, told).await;
    }
}

/// A stream of a connection.
pub(crate) struct Stream {
    /// Its number.
    pub(super) id: u32,
    /// What the client says of it.
    pub(super) headers: Headers,
    /// What the client writes.
    pub(super) input: Input,
    /// What the client reads.
    pub(super) output: Output,
}

impl Maker {
    /// A stream, and what fills its input. Its client has room for as much as `window` says, and has left when `gone` is cancelled,
    /// which is to be a child of [`Maker::over`].
    pub(super) fn stream(
        &self,
        id: u32,
        headers: Headers,
        window: Arc<Window>,
        gone: CancellationToken,
    ) -> (Stream, Feeder) {
        let (queue, waiting) = mpsc::unbounded_channel();
        let room = Arc::new(Semaphore::new(STREAM_ROOM));
        let credit = Credit { stream: id, used: 0, to: self.credits.clone() };
        let input = Input { queue: waiting, room: room.clone(), credit, gone: gone.clone() };
        let (queue_out, windows) = (self.queue.clone(), self.windows.clone());
        let output = Output { stream: id, queue: queue_out, window, windows, gone };
        let feeder = Feeder { queue, room, total: self.room.clone() };
        (Stream { id, headers, input, output }, feeder)
    }
}

struct Piece {
    bytes: Bytes,
    _room: OwnedSemaphorePermit,
    _total: OwnedSemaphorePermit,
}

struct Credit {
    stream: u32,
    used: u32,
    to: mpsc::UnboundedSender<(u32, u32)>,
}

/// What a client writes into a stream.
pub(crate) struct Input {
    queue: mpsc::UnboundedReceiver<Piece>,
    room: Arc<Semaphore>,
    credit: Credit,
    gone: CancellationToken,
}

impl Input {
    /// The next bytes; None when there will be no more: the client has ended them, or left, as [`Input::left`] says.
    pub(crate) async fn next(&mut self) -> Option<Bytes> {
        let bytes = self.queue.recv().await?.bytes;
        self.credit.used += bytes.len() as u32;
        if self.credit.used >= CREDIT {
            let _ = self.credit.to.send((self.credit.stream, std::mem::take(&mut self.credit.used)));
        }
        Some(bytes)
    }

    /// Whether the client has left the stream, and not just ended it.
    pub(crate) fn left(&self) -> bool {
        self.gone.is_cancelled()
    }
}

impl Drop for Input {
    /// The feeder is not to wait for room.
    fn drop(&mut self) {
        self.room.close();
    }
}

/// Fills an [`Input`]; dropped, it ends it.
pub(super) struct Feeder {
    queue: mpsc::UnboundedSender<Piece>,
    room: Arc<Semaphore>,
    total: Arc<Semaphore>,
}

impl Feeder {
    /// Passes bytes on, once there is room. What nobody reads is thrown away.
    pub(super) async fn feed(&self, mut bytes: Bytes) {
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(PIECE));
            let size = piece.len() as u32;
            let Ok(_room) = self.room.clone().acquire_many_owned(size).await else { return };
            let total = tokio::select! {
                total = self.total.clone().acquire_many_owned(size) => total,
                () = self.queue.closed() => return,
            };
            let Ok(_total) = total else { return };
            let _ = self.queue.send(Piece { bytes: piece, _room, _total });
        }
    }
}

/// What a client reads from a stream.
#[derive(Clone)]
pub(crate) struct Output {
    stream: u32,
    queue: mpsc::Sender<Outgoing>,
    window: Arc<Window>,
    windows: Arc<Windows>,
    gone: CancellationToken,
}

/// The client has left the stream.
#[derive(Debug)]
pub(crate) struct Gone;

impl Output {
    /// Sends bytes, once there is room.
    pub(crate) async fn send(&self, mut bytes: Bytes) -> Result<(), Gone> {
        while !bytes.is_empty() {
            let wanted = bytes.len().min(PIECE);
            let size = tokio::select! {
                biased;
                () = self.gone.cancelled() => return Err(Gone),
                size = self.windows.take(&self.window, wanted) => size,
            };
            self.put(Outgoing::Data(self.stream, bytes.split_to(size))).await?;
        }
        Ok(())
    }

    /// Sends a message without bytes, which says by itself that the stream is there.
    pub(super) async fn greet(&self) {
        let _ = self.put(Outgoing::Data(self.stream, Bytes::new())).await;
    }

    /// Says that the stream is accepted.
    pub(super) async fn accept(&self) {
        let _ = self.put(Outgoing::Accept(self.stream)).await;
    }

    /// Says that no more bytes come.
    pub(crate) async fn end(&self) {
        let _ = self.put(Outgoing::End(self.stream)).await;
    }

    /// Ends the stream both ways, when all that was sent is.
    pub(super) async fn leave(&self) {
        let _ = self.put(Outgoing::Leave(self.stream)).await;
    }

    /// Ends the stream both ways: it is not wanted.
    pub(super) async fn reset(&self, why: super::spdy::frame::Reset) {
        let _ = self.put(Outgoing::Reset(self.stream, why as u32)).await;
    }

    /// Resolves when the client has left the stream.
    pub(crate) async fn left(&self) {
        self.gone.cancelled().await;
    }

    async fn put(&self, outgoing: Outgoing) -> Result<(), Gone> {
        tokio::select! {
            biased;
            () = self.gone.cancelled() => Err(Gone),
            sent = self.queue.send(outgoing) => sent.map_err(|_| Gone),
        }
    }
}

/// How many bytes a client has room for, as it says itself. Below zero when it came to say so late.
#[derive(Debug)]
pub(super) struct Window {
    left: Mutex<i64>,
    more: Notify,
}

/// The windows of a connection.
///
/// The clients that there are, of the kubelet and of kubectl, neither open windows nor keep to them: whoever waited for them would
/// wait for ever. So they count from the moment on at which a client is seen to open one.
#[derive(Debug)]
pub(super) struct Windows {
    kept: AtomicBool,
    connection: Window,
}

/// What a window has at first.
pub(super) const INITIAL_WINDOW: i64 = 64 << 10;

impl Default for Windows {
    fn default() -> Self {
        Windows { kept: AtomicBool::new(false), connection: Window::new(INITIAL_WINDOW) }
    }
}

impl Windows {
    /// From now on windows count.
    pub(super) fn keep(&self) {
        self.kept.store(true, Ordering::Release);
    }

    /// The window of the connection itself.
    pub(super) fn connection(&self) -> &Window {
        &self.connection
    }

    /// Takes room for `wanted` bytes or fewer, but at least one.
    async fn take(&self, window: &Window, wanted: usize) -> usize {
        let size = window.take(wanted, &self.kept).await;
        let fits = self.connection.take(size, &self.kept).await;
        if fits < size {
            window.add((size - fits) as i64);
        }
        fits
    }
}

impl Window {
    pub(super) fn new(left: i64) -> Self {
        Window { left: Mutex::new(left), more: Notify::new() }
    }

    /// Adds room, or takes it away. False when it is more than a window may have.
    pub(super) fn add(&self, delta: i64) -> bool {
        let mut left = self.left.lock();
        *left += delta;
        self.more.notify_waiters();
        *left <= i64::from(i32::MAX)
    }

    async fn take(&self, wanted: usize, kept: &AtomicBool) -> usize {
        loop {
            let more = self.more.notified();
            tokio::pin!(more);
            more.as_mut().enable();
            {
                let mut left = self.left.lock();
                let size = match kept.load(Ordering::Acquire) {
                    true => wanted.min(usize::try_from(*left).unwrap_or(0)),
                    false => wanted,
                };
                if size > 0 {
                    *left -= size as i64;
                    return size;
                }
            }
            more.await;
        }
    }
}

/// When something last moved.
pub(super) struct Activity {
    limit: Duration,
    last: Mutex<Instant>,
}

impl Activity {
    fn new(limit: Duration) -> Self {
        Activity { limit, last: Mutex::new(Instant::now()) }
    }

    /// Something moves.
    pub(super) fn touch(&self) {
        *self.last.lock() = Instant::now();
    }

    /// Resolves when nothing has moved for as long as the limit says.
    pub(super) async fn idle(&self) {
        if self.limit.is_zero() {
            return std::future::pending().await;
        }
        loop {
            let end = *self.last.lock() + self.limit;
            if end <= Instant::now() {
                return;
            }
            tokio::time::sleep_until(end).await;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stream() -> (Connection, Driver, Stream, Feeder) {
        let (connection, driver) = connection(Duration::ZERO);
        let (window, gone) = (Arc::new(Window::new(INITIAL_WINDOW)), driver.maker.over.child_token());
        let (stream, feeder) = driver.maker.stream(1, Headers::new(), window, gone);
        (connection, driver, stream, feeder)
    }

    #[tokio::test]
    async fn who_does_not_read_holds_up_the_feeder_until_it_goes() {
        let (_connection, _driver, mut stream, feeder) = stream();
        feeder.feed(vec![1; STREAM_ROOM].into()).await;
        let more = feeder.feed(vec![2; 10].into());
        tokio::pin!(more);
        assert!(futures::poll!(&mut more).is_pending());
        assert_eq!(stream.input.next().await.unwrap().len(), PIECE);
        more.await;
        let more = feeder.feed(vec![3; STREAM_ROOM].into());
        tokio::pin!(more);
        assert!(futures::poll!(&mut more).is_pending());
        drop(stream);
        more.await;
    }

    #[tokio::test]
    async fn an_input_ends_with_its_feeder_and_says_why() {
        let (_connection, _driver, mut ended, feeder) = stream();
        feeder.feed(Bytes::from_static(b"last")).await;
        drop(feeder);
        assert_eq!(ended.input.next().await.unwrap(), "last");
        assert!(ended.input.next().await.is_none() && !ended.input.left());
        let (_connection, driver, mut left, feeder) = stream();
        driver.maker.over.cancel();
        drop(feeder);
        assert!(left.input.next().await.is_none() && left.input.left());
        assert!(left.output.send(Bytes::from_static(b"x")).await.is_err());
    }

    #[tokio::test]
    async fn what_is_read_gives_credit() {
        let (_connection, mut driver, mut stream, feeder) = stream();
        feeder.feed(vec![1; PIECE - 1].into()).await;
        stream.input.next().await.unwrap();
        assert!(driver.credits.try_recv().is_err());
        feeder.feed(vec![1; 1].into()).await;
        stream.input.next().await.unwrap();
        assert_eq!(driver.credits.try_recv().unwrap(), (1, CREDIT));
    }

    #[tokio::test]
    async fn windows_count_once_a_client_opens_one() {
        let window = Window::new(10);
        let windows = Windows::default();
        assert_eq!(windows.take(&window, 30).await, 30);
        windows.keep();
        let taking = windows.take(&window, 30);
        tokio::pin!(taking);
        assert!(futures::poll!(&mut taking).is_pending());
        assert!(window.add(21));
        assert_eq!(taking.await, 1);
        assert!(!window.add(i64::from(i32::MAX) + 1));
        // That of the connection is the smaller one now.
        windows.connection().add(-INITIAL_WINDOW + 30 + 1 + 5);
        assert_eq!(windows.take(&window, 100).await, 5);
    }

    #[tokio::test]
    async fn a_connection_is_idle_when_nothing_moves() {
        let activity = Activity::new(Duration::from_millis(300));
        let begin = Instant::now();
        let idle = activity.idle();
        tokio::pin!(idle);
        assert!(futures::poll!(&mut idle).is_pending());
        tokio::time::sleep(Duration::from_millis(100)).await;
        activity.touch();
        idle.await;
        assert!(begin.elapsed() >= Duration::from_millis(400), "{:?}", begin.elapsed());
    }
}
