//! Streams: one call of a client opens a stream under a name, another call of the client names it and uses it.
//!
//! ```text
//!  client ==gRPC==> Client::serve --4 messages--> End   whoever has taken the stream: a transfer
//!  client <==gRPC== Client::serve <--32 messages-- End
//!
//!  open --> waiting --take--> taken --> over: the end was dropped, or the client has gone
//!              \--> over: nobody took it in time, or the client has gone
//! ```
//!
//! Invariants: a name stands for one stream at a time in its namespace, until that stream is over. A stream is taken once.
//! Between the two sides there are never more messages than the numbers say: who does not read holds up the other side,
//! and who waits for it does so within a time limit of its own.

pub mod bytes;

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt as _};
use parking_lot::Mutex;
use prost_types::Any;
use tokio::sync::mpsc;

use crate::context::{Namespace, RequestContext};
use crate::error::{Error, Result};

/// How long a stream waits for someone to take it.
const CLAIM: Duration = Duration::from_secs(120);
/// Messages from the client that the engine has not looked at.
const INCOMING: usize = 4;
/// Messages to the client that are not sent.
const OUTGOING: usize = 32;
/// The longest name, in bytes.
const NAME_MAX: usize = 512;

type Key = (Namespace, String);

/// The streams of all namespaces; cheap to clone.
#[derive(Clone)]
pub struct Streams {
    /// None: taken.
    open: Arc<Mutex<HashMap<Key, Option<End>>>>,
    /// How long a stream waits for someone to take it.
    claim: Duration,
}

impl Default for Streams {
    fn default() -> Self {
        Streams { open: Arc::default(), claim: CLAIM }
    }
}

/// The client's side of a stream, to be served.
pub struct Client {
    streams: Streams,
    key: Key,
    incoming: mpsc::Sender<Incoming>,
    outgoing: mpsc::Receiver<Any>,
}

/// The engine's side of a stream. Dropped, it ends the stream; what was sent before arrives.
#[derive(Debug)]
pub struct End {
    incoming: mpsc::Receiver<Incoming>,
    outgoing: mpsc::Sender<Any>,
    finished: bool,
}

#[derive(Debug)]
enum Incoming {
    Message(Any),
    /// The client will send no more. A channel that closes without this means that the client has gone.
    Finished,
}

impl Streams {
    /// Opens a stream; AlreadyExists while the name is taken.
    pub fn open(&self, context: &RequestContext, name: String) -> Result<Client> {
        let namespace = context.namespace()?.clone();
        if name.is_empty() || name.len() > NAME_MAX {
            return Err(Error::invalid_argument(format!(
                "a stream's id has {} bytes; 1 to {NAME_MAX} are allowed",
                name.len()
            )));
        }
        let (to_engine, incoming) = mpsc::channel(INCOMING);
        let (outgoing, to_client) = mpsc::channel(OUTGOING);
        let key = (namespace, name);
        match self.open.lock().entry(key.clone()) {
            Entry::Occupied(_) => Err(Error::already_exists(format!("stream {:?} exists already", key.1))),
            Entry::Vacant(vacant) => {
                vacant.insert(Some(End { incoming, outgoing, finished: false }));
                Ok(Client { streams: self.clone(), key, incoming: to_engine, outgoing: to_client })
            }
        }
    }

    /// Takes a stream; NotFound when there is none of this name, FailedPrecondition when it is in use.
    pub fn take(&self, context: &RequestContext, name: &str) -> Result<End> {
        let key = (context.namespace()?.clone(), name.to_owned());
        match self.open.lock().get_mut(&key) {
            None => Err(Error::not_found(format!(
                "stream {name:?} does not exist; open it with Streaming.Stream in this namespace first"
            ))),
            Some(end) => end.take().ok_or_else(|| {
                Error::failed_precondition(format!("stream {name:?} is in use; open one for each purpose"))
            }),
        }
    }

    fn is_waiting(&self, key: &Key) -> bool {
        self.open.lock().get(key).is_some_and(Option::is_some)
    }
}

impl Client {
    /// Carries messages both ways until the stream is over.
    pub async fn serve(
        mut self,
        mut requests: impl Stream<Item = Result<Any>> + Unpin,
        answers: mpsc::Sender<Result<Any>>,
    ) {
        let limit = self.streams.claim;
        let claim = tokio::time::sleep(limit);
        tokio::pin!(claim);
        let (mut claimed, mut reading) = (false, true);
        loop {
            tokio::select! {
                (permit, request) = next(&self.incoming, &mut requests), if reading => match request {
                    Some(Ok(message)) => permit.send(Incoming::Message(message)),
                    Some(Err(error)) => {
                        tracing::debug!(stream = self.key.1, %error, "the client of a stream has gone");
                        return;
                    }
                    None => {
                        permit.send(Incoming::Finished);
                        reading = false;
                    }
                },
                message = self.outgoing.recv() => match message {
                    Some(message) => if answers.send(Ok(message)).await.is_err() { return },
                    None => return,
                },
                () = answers.closed() => return,
                () = &mut claim, if !claimed => {
                    claimed = true;
                    if self.streams.is_waiting(&self.key) {
                        let error = Error::deadline_exceeded(format!(
                            "stream {:?}: nobody used it for {limit:?}; open it right before the call that names it",
                            self.key.1
                        ));
                        let _ = answers.try_send(Err(error));
                        return;
                    }
                }
            }
        }
    }
}

impl Drop for Client {
    fn drop(&mut self) {
        self.streams.open.lock().remove(&self.key);
    }
}

/// The next request, once there is room for it. Never when the engine's side has gone, which is seen elsewhere.
async fn next<'a>(
    incoming: &'a mpsc::Sender<Incoming>,
    requests: &mut (impl Stream<Item = Result<Any>> + Unpin),
) -> (mpsc::Permit<'a, Incoming>, Option<Result<Any>>) {
    match incoming.reserve().await {
        Ok(permit) => (permit, requests.next().await),
        Err(_) => std::future::pending().await,
    }
}

impl End {
    /// The next message; None when the client has no more, Cancelled when it has gone.
    pub async fn recv(&mut self) -> Result<Option<Any>> {
        if self.finished {
            return Ok(None);
        }
        match self.incoming.recv().await {
            Some(Incoming::Message(message)) => Ok(Some(message)),
            Some(Incoming::Finished) => {
                self.finished = true;
                Ok(None)
            }
            None => Err(gone()),
        }
    }

    /// What has come already, as [`End::recv`]; None when nothing has.
    fn try_recv(&mut self) -> Option<Result<Option<Any>>> {
        if self.finished {
            return None;
        }
        match self.incoming.try_recv() {
            Ok(Incoming::Message(message)) => Some(Ok(Some(message))),
            Ok(Incoming::Finished) => {
                self.finished = true;
                Some(Ok(None))
            }
            Err(mpsc::error::TryRecvError::Empty) => None,
            Err(mpsc::error::TryRecvError::Disconnected) => Some(Err(gone())),
        }
    }

    /// Sends a message, once there is room for it; Cancelled when the client has gone.
    pub async fn send(&self, message: Any) -> Result<()> {
        self.outgoing.send(message).await.map_err(|_| gone())
    }
}

fn gone() -> Error {
    Error::cancelled("the client of the stream has gone")
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn context(namespace: &str) -> RequestContext {
        RequestContext::internal(Namespace::new(namespace).unwrap())
    }

    /// A served stream, as a client has it: the way in, and the way out.
    pub(crate) fn client(
        streams: &Streams,
        name: &str,
    ) -> (mpsc::Sender<Result<Any>>, mpsc::Receiver<Result<Any>>) {
        let served = streams.open(&context("a"), name.into()).unwrap();
        let (requests, from_client) = mpsc::channel(1);
        let (answers, to_client) = mpsc::channel(1);
        tokio::spawn(served.serve(tokio_stream::wrappers::ReceiverStream::new(from_client), answers));
        (requests, to_client)
    }

    fn message(text: &str) -> Any {
        proto::any::wrap(text, [])
    }

    #[tokio::test]
    async fn a_name_stands_for_one_stream_which_is_taken_once() {
        let streams = Streams::default();
        let (_requests, mut answers) = client(&streams, "s");
        assert!(matches!(streams.open(&context("a"), "s".into()), Err(Error::AlreadyExists(_))));
        assert!(streams.open(&context("b"), "s".into()).is_ok(), "another namespace is another name");
        assert!(matches!(streams.take(&context("b"), "s"), Err(Error::NotFound(_))), "and it was dropped");
        assert!(matches!(streams.take(&context("a"), "t"), Err(Error::NotFound(_))));
        let end = streams.take(&context("a"), "s").unwrap();
        assert!(matches!(streams.take(&context("a"), "s"), Err(Error::FailedPrecondition(_))));
        assert!(matches!(streams.open(&context("a"), "s".into()), Err(Error::AlreadyExists(_))));
        drop(end);
        assert!(answers.recv().await.is_none());
        assert!(streams.open(&context("a"), "s".into()).is_ok());
        assert!(matches!(streams.open(&context("a"), String::new()), Err(Error::InvalidArgument(_))));
    }

    #[tokio::test]
    async fn messages_go_both_ways_and_the_last_arrive() {
        let streams = Streams::default();
        let (requests, mut answers) = client(&streams, "s");
        let mut end = streams.take(&context("a"), "s").unwrap();
        requests.send(Ok(message("one"))).await.unwrap();
        drop(requests);
        assert_eq!(end.recv().await.unwrap().unwrap().type_url, "one");
        assert!(end.recv().await.unwrap().is_none());
        assert!(end.recv().await.unwrap().is_none());
        for _ in 0..3 {
            end.send(message("back")).await.unwrap();
        }
        drop(end);
        for _ in 0..3 {
            assert_eq!(answers.recv().await.unwrap().unwrap().type_url, "back");
        }
        assert!(answers.recv().await.is_none());
    }

    #[tokio::test]
    async fn a_client_that_goes_is_told_from_one_that_is_done() {
        let streams = Streams::default();
        let (requests, answers) = client(&streams, "s");
        let mut end = streams.take(&context("a"), "s").unwrap();
        drop((answers, requests.clone()));
        assert!(matches!(end.recv().await, Err(Error::Cancelled(_))));
        let (requests, _answers) = client(&streams, "t");
        let mut end = streams.take(&context("a"), "t").unwrap();
        requests.send(Err(Error::cancelled("reset"))).await.unwrap();
        assert!(matches!(end.recv().await, Err(Error::Cancelled(_))));
    }

    #[tokio::test]
    async fn a_stream_that_nobody_takes_ends() {
        let streams = Streams { claim: Duration::from_millis(50), ..Streams::default() };
        let (_requests, mut answers) = client(&streams, "s");
        assert!(matches!(answers.recv().await, Some(Err(Error::DeadlineExceeded(_)))));
        assert!(answers.recv().await.is_none());
        assert!(matches!(streams.take(&context("a"), "s"), Err(Error::NotFound(_))));
        let (requests, mut answers) = client(&streams, "t");
        let mut end = streams.take(&context("a"), "t").unwrap();
        tokio::time::sleep(streams.claim * 2).await;
        requests.send(Ok(message("late"))).await.unwrap();
        assert_eq!(end.recv().await.unwrap().unwrap().type_url, "late");
        drop(end);
        assert!(answers.recv().await.is_none());
    }

    #[tokio::test]
    async fn nobody_buffers_without_limit() {
        let streams = Streams::default();
        let (requests, _answers) = client(&streams, "s");
        let end = streams.take(&context("a"), "s").unwrap();
        let limit = Duration::from_millis(50);
        let mut sent = 0;
        while tokio::time::timeout(limit, requests.send(Ok(message("in")))).await.is_ok() {
            sent += 1;
        }
        // What the client's own channel and the one to the engine hold.
        assert_eq!(sent, INCOMING + 1);
        let mut sent = 0;
        while tokio::time::timeout(limit, end.send(message("out"))).await.is_ok() {
            sent += 1;
        }
        assert_eq!(sent, OUTGOING + 2);
    }
}
