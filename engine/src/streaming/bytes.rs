//! Bytes over a stream: containerd's protocol for archives.
//!
//! ```text
//!  receiver                        sender
//!     | -- WindowUpdate 1048576 -->  |   so many more bytes may come
//!     | <-------- Data ------------  |   at most 262144 bytes in one, and as many as may come
//!     | -- WindowUpdate 1048576 -->  |   whenever less than a window is left
//!     | <----- end of stream ------  |
//! ```
//!
//! The numbers are each side's own. containerd's are 65536 and 32768, which leaves both sides waiting for each other most of the
//! time.
//!
//! Both ends here block: they are read and written by tar, off the runtime's own threads. Neither waits longer than a time
//! limit for the other side, nor after its work was given up.

use std::io::{self, Read, Write};
use std::time::Duration;

use prost_types::Any;
use proto::any;
use proto::containerd::types::transfer::{Data, WindowUpdate};
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::End;
use crate::error::{Error, Result};

/// What a receiver allows at a time.
const WINDOW: i32 = 1 << 20;
/// The most bytes in one message that we send.
const DATA_MAX: usize = 256 << 10;

/// How long one side waits for the other.
#[derive(Debug, Clone)]
pub struct Patience {
    /// Without any message.
    pub idle: Duration,
    /// Ends the wait at once.
    pub stop: CancellationToken,
}

impl Patience {
    /// Waits for an event of the stream; DeadlineExceeded after the limit, Cancelled when the work was given up.
    async fn wait<T>(&self, event: impl Future<Output = Result<T>>) -> Result<T> {
        tokio::select! {
            happened = tokio::time::timeout(self.idle, event) => happened.unwrap_or_else(|_| {
                let idle = self.idle;
                Err(Error::deadline_exceeded(format!("the stream stood still for {idle:?} and was given up")))
            }),
            () = self.stop.cancelled() => Err(Error::cancelled("the client's call has ended before its stream")),
        }
    }
}

/// Bytes that may still come, or go. Pure.
#[derive(Debug, Default, PartialEq, Eq)]
struct Window(i64);

impl Window {
    /// The update that the receiver owes, if any; it counts from now on.
    fn owed(&mut self) -> Option<WindowUpdate> {
        if self.0 >= i64::from(WINDOW) {
            return None;
        }
        self.0 += i64::from(WINDOW);
        Some(WindowUpdate { update: WINDOW })
    }

    /// The receiver has got so many. More than it allowed is borne, as containerd does: the stream beneath is bounded.
    fn received(&mut self, count: usize) {
        self.0 = self.0.saturating_sub(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// The receiver allows more.
    fn update(&mut self, update: &WindowUpdate) -> Result<()> {
        if update.update < 0 {
            return Err(Error::invalid_argument(format!("a window update of {} bytes", update.update)));
        }
        self.0 = self.0.saturating_add(i64::from(update.update));
        Ok(())
    }

    /// How many of `wanted` bytes the sender may send in one message.
    fn room(&self, wanted: usize) -> usize {
        wanted.min(DATA_MAX).min(usize::try_from(self.0).unwrap_or(0))
    }

    fn sent(&mut self, count: usize) {
        self.0 -= i64::try_from(count).unwrap_or(i64::MAX);
    }
}

/// An error on its way through readers and writers that know only I/O errors; [`error_of`] finds it again.
fn carried(error: Error) -> io::Error {
    io::Error::other(error)
}

/// The error that a stream met, out of the I/O error in which it came.
pub fn error_of(error: &io::Error) -> Option<Error> {
    error.get_ref()?.downcast_ref::<Error>().cloned()
}

/// Receives. Reading blocks.
#[derive(Debug)]
pub struct Receiver {
    end: End,
    patience: Patience,
    runtime: Handle,
    window: Window,
    data: Vec<u8>,
    /// How much of `data` was read.
    at: usize,
}

impl Receiver {
    /// To be called on the runtime.
    pub fn new(end: End, patience: Patience) -> Self {
        Receiver {
            end,
            patience,
            runtime: Handle::current(),
            window: Window::default(),
            data: Vec::new(),
            at: 0,
        }
    }

    /// The bytes of the next message; None at the end.
    async fn next(&mut self) -> Result<Option<Vec<u8>>> {
        loop {
            // A client that has sent all its data need not read updates any more: what is to come was said before.
            while let Some(update) = self.window.owed() {
                if self.patience.wait(self.end.send(any::pack(&update))).await.is_err() {
                    break;
                }
            }
            let Some(message) = self.patience.wait(self.end.recv()).await? else { return Ok(None) };
            if !any::is::<Data>(&message) {
                tracing::debug!(kind = message.type_url, "a message that is no data is passed over");
                continue;
            }
            let data = decode::<Data>(&message)?.data;
            self.window.received(data.len());
            if !data.is_empty() {
                return Ok(Some(data));
            }
        }
    }
}

impl Read for Receiver {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        if self.at == self.data.len() {
            let runtime = self.runtime.clone();
            (self.data, self.at) = match runtime.block_on(self.next()).map_err(carried)? {
                Some(data) => (data, 0),
                None => return Ok(0),
            };
        }
        let count = buffer.len().min(self.data.len() - self.at);
        buffer[..count].copy_from_slice(&self.data[self.at..self.at + count]);
        self.at += count;
        Ok(count)
    }
}

/// Sends. Writing blocks.
#[derive(Debug)]
pub struct Sender {
    end: End,
    patience: Patience,
    runtime: Handle,
    window: Window,
}

impl Sender {
    /// To be called on the runtime.
    pub fn new(end: End, patience: Patience) -> Self {
        Sender { end, patience, runtime: Handle::current(), window: Window::default() }
    }

    fn update(&mut self, message: Option<Any>) -> Result<()> {
        match message {
            Some(message) if any::is::<WindowUpdate>(&message) => self.window.update(&decode(&message)?),
            Some(message) => {
                tracing::debug!(kind = message.type_url, "a message that is no window update is passed over");
                Ok(())
            }
            // It may have allowed enough before it fell silent.
            None => Ok(()),
        }
    }

    async fn send(&mut self, bytes: &[u8]) -> Result<usize> {
        while let Some(message) = self.end.try_recv() {
            self.update(message?)?;
        }
        loop {
            let room = self.window.room(bytes.len());
            if room > 0 || bytes.is_empty() {
                let data = Data { data: bytes[..room].to_vec() };
                self.patience.wait(self.end.send(any::pack(&data))).await?;
                self.window.sent(room);
                return Ok(room);
            }
            let message = self.patience.wait(self.end.recv()).await?;
            if message.is_none() {
                return Err(Error::cancelled("the client has closed the stream before all was sent"));
            }
            self.update(message)?;
        }
    }
}

impl Write for Sender {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.is_empty() {
            return Ok(0);
        }
        let runtime = self.runtime.clone();
        runtime.block_on(self.send(bytes)).map_err(carried)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn decode<M: prost::Message + prost::Name + Default>(message: &Any) -> Result<M> {
    M::decode(message.value.as_slice())
        .map_err(|error| Error::invalid_argument(format!("a {} of the stream: {error}", M::full_name())))
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use proptest::prelude::*;
    use tokio::sync::mpsc;

    use super::*;
    use crate::streaming::Streams;
    use crate::streaming::tests::{client, context};

    fn patience(idle: Duration) -> Patience {
        Patience { idle, stop: CancellationToken::new() }
    }

    const LONG: Duration = Duration::from_secs(30);

    async fn update(answers: &mut mpsc::Receiver<Result<Any>>) -> i32 {
        any::unpack::<WindowUpdate>(&answers.recv().await.unwrap().unwrap()).unwrap().update
    }

    fn data(bytes: &[u8]) -> Result<Any> {
        Ok(any::pack(&Data { data: bytes.to_vec() }))
    }

    #[test]
    fn a_receiver_allows_one_window_and_another_when_it_has_less() {
        let mut window = Window::default();
        assert_eq!(window.owed().unwrap().update, WINDOW);
        assert!(window.owed().is_none());
        window.received(1);
        assert_eq!(window.owed().unwrap().update, WINDOW);
        assert!(window.owed().is_none());
        // Sent against the rules: updates are owed until there is a window again.
        window.received(4 * WINDOW as usize);
        assert_eq!(std::iter::from_fn(|| window.owed()).count(), 4);
    }

    #[test]
    fn a_sender_keeps_to_the_window() {
        let mut window = Window::default();
        assert_eq!(window.room(10), 0);
        window.update(&WindowUpdate { update: 5 }).unwrap();
        assert_eq!(window.room(10), 5);
        window.sent(5);
        assert_eq!(window.room(10), 0);
        for _ in 0..3 {
            window.update(&WindowUpdate { update: i32::MAX }).unwrap();
        }
        assert_eq!(window.room(usize::MAX), DATA_MAX);
        assert!(window.update(&WindowUpdate { update: -1 }).is_err());
    }

    proptest! {
        /// Sender and receiver never stand still, and the sender never has more under way than was allowed.
        #[test]
        fn two_windows_carry_everything(reads in prop::collection::vec(1usize..2_000_000, 1..50)) {
            let (mut sender, mut receiver) = (Window::default(), Window::default());
            let mut way = VecDeque::new();
            let (mut allowed, mut sent) = (0_i64, 0_i64);
            for wanted in reads {
                while let Some(update) = receiver.owed() {
                    allowed += i64::from(update.update);
                    sender.update(&update).unwrap();
                }
                let room = sender.room(wanted);
                prop_assert!(room > 0);
                sender.sent(room);
                sent += room as i64;
                prop_assert!(sent <= allowed);
                way.push_back(room);
                if let Some(count) = way.pop_front() {
                    receiver.received(count);
                }
            }
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn bytes_arrive_in_order_and_the_window_is_renewed() {
        let streams = Streams::default();
        let (requests, mut answers) = client(&streams, "s");
        let receiver = Receiver::new(streams.take(&context("a"), "s").unwrap(), patience(LONG));
        let reading = tokio::task::spawn_blocking(move || {
            let mut receiver = receiver;
            let mut bytes = Vec::new();
            receiver.read_to_end(&mut bytes).map(|_| bytes)
        });
        assert_eq!(update(&mut answers).await, WINDOW);
        requests.send(data(b"one ")).await.unwrap();
        requests.send(data(b"")).await.unwrap();
        requests.send(Ok(any::wrap("something.Else", []))).await.unwrap();
        assert_eq!(update(&mut answers).await, WINDOW);
        requests.send(data(b"two")).await.unwrap();
        drop(requests);
        assert_eq!(reading.await.unwrap().unwrap(), b"one two");
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn a_sender_waits_for_the_window() {
        let streams = Streams::default();
        let (requests, mut answers) = client(&streams, "s");
        let sender = Sender::new(streams.take(&context("a"), "s").unwrap(), patience(LONG));
        let writing = tokio::task::spawn_blocking(move || {
            let mut sender = sender;
            sender.write_all(&[7; 100_000])
        });
        let mut got = Vec::new();
        for window in [1, 40_000, 59_999] {
            assert!(answers.try_recv().is_err(), "nothing comes unasked");
            requests.send(Ok(any::pack(&WindowUpdate { update: window }))).await.unwrap();
            let end = got.len() + window as usize;
            while got.len() < end {
                let piece = any::unpack::<Data>(&answers.recv().await.unwrap().unwrap()).unwrap().data;
                assert!(piece.len() <= DATA_MAX);
                got.extend(piece);
            }
            assert_eq!(got.len(), end);
        }
        writing.await.unwrap().unwrap();
        assert_eq!(got, vec![7; 100_000]);
        assert!(answers.recv().await.is_none());
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn nobody_waits_for_ever() {
        let streams = Streams::default();
        let read = |receiver: Receiver| {
            tokio::task::spawn_blocking(move || {
                let mut receiver = receiver;
                error_of(&receiver.read(&mut [0]).unwrap_err()).unwrap()
            })
        };
        let (_requests, _answers) = client(&streams, "still");
        let end = streams.take(&context("a"), "still").unwrap();
        let error = read(Receiver::new(end, patience(Duration::from_millis(20)))).await.unwrap();
        assert!(matches!(error, Error::DeadlineExceeded(_)), "{error}");

        let (_requests, _answers) = client(&streams, "stopped");
        let patience = patience(LONG);
        let receiver = Receiver::new(streams.take(&context("a"), "stopped").unwrap(), patience.clone());
        let reading = read(receiver);
        patience.stop.cancel();
        assert!(matches!(reading.await.unwrap(), Error::Cancelled(_)));

        let (requests, answers) = client(&streams, "closed");
        let sender = Sender::new(streams.take(&context("a"), "closed").unwrap(), self::patience(LONG));
        drop(requests);
        let written = tokio::task::spawn_blocking(move || {
            let mut sender = sender;
            error_of(&sender.write(b"x").unwrap_err()).unwrap()
        });
        assert!(matches!(written.await.unwrap(), Error::Cancelled(_)));
        drop(answers);

        let (requests, _answers) = client(&streams, "nonsense");
        let receiver = Receiver::new(streams.take(&context("a"), "nonsense").unwrap(), self::patience(LONG));
        requests.send(Ok(any::wrap("containerd.types.transfer.Data", [0x0a, 9]))).await.unwrap();
        assert!(matches!(read(receiver).await.unwrap(), Error::InvalidArgument(_)));
    }
}
