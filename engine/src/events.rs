//! Events: what happened, to whoever listens, and to the journal for those who come later.
//!
//! ```text
//! publish (engine) ----\                         /--> subscription 1: filters, queue --> client
//! forward (shims) ------+--> one ordered fan-out +--> subscription 2 ...
//!                                                 \--> journal: numbers, disk --> replay 1: filters --> client
//! ```
//!
//! Invariants: every subscriber sees the events that pass its filters in one and the same order, which is the journal's. A
//! slow subscriber never holds up a publisher: its queue has a bound, and at the bound the subscription ends with an error
//! that says so; a replay has no queue. All namespaces are delivered, whatever namespace the subscriber is in; it filters by
//! `namespace` if it wants one. What a shim or a client hands over is answered once it is in the journal, on disk, and what
//! a shim sends again for want of an answer is in the journal once. What the engine publishes follows a record that is on
//! disk, and waits for nothing.

use std::borrow::Cow;
use std::collections::{HashMap, VecDeque};
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use prost::{Message as _, Name};
use proto::containerd::types::Envelope;
use tokio::sync::{mpsc, oneshot};

use self::journal::{Journal, Reader};
use crate::context::Namespace;
use crate::error::{Error, Result};
use crate::filters::Filter;
use crate::metadata::{self, Metadata};

mod fields;
mod journal;
mod mentioned;
mod segment;

pub use self::journal::{Entry, Range};
pub use self::mentioned::mentioned;

/// The folder of the journal beneath the root.
pub const FOLDER: &str = "events";
/// The most events that wait for one subscriber.
const QUEUE_MAX: usize = 16 * 1024;
/// The most bytes of events that are held for those who come soon after the start.
const HELD_BYTES: usize = 4 << 20;
/// How many of the last events are known again when a shim sends them again. A shim has one on the way at a time.
const RECENT: usize = 16 * 1024;

/// The fan-out; cheap to clone.
#[derive(Clone, Default)]
pub struct Exchange {
    state: Arc<Mutex<State>>,
    /// None where nothing is kept.
    journal: Option<Arc<Journal>>,
}

#[derive(Default)]
struct State {
    subscribers: Vec<Subscriber>,
    /// What nobody could hear, kept for those who come soon; None when it is not kept.
    held: Option<Held>,
    recent: Recent,
}

#[derive(Default)]
struct Held {
    envelopes: Vec<Arc<Envelope>>,
    bytes: usize,
}

/// Fingerprints of the last events, each with whether this engine has told its subscribers.
#[derive(Default)]
struct Recent {
    told: HashMap<u64, bool>,
    order: VecDeque<u64>,
}

/// Whose an event is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Sender {
    Engine,
    Client,
    /// It sends an event again until it is answered.
    Shim,
}

/// One reader of the journal, from a number on and then along with what comes; dropping it ends it.
pub struct Replay {
    reader: Reader,
    filter: Arc<Filter>,
    ready: VecDeque<Entry>,
}

struct Subscriber {
    filter: Filter,
    queue: mpsc::Sender<Arc<Envelope>>,
    overrun: Arc<AtomicBool>,
    /// Whether it is a client's, and not a part of the engine.
    client: bool,
}

/// One subscriber's stream; dropping it ends the subscription.
pub struct Subscription {
    queue: mpsc::Receiver<Arc<Envelope>>,
    overrun: Arc<AtomicBool>,
}

impl Exchange {
    /// One that keeps its events in the folder beneath the root, as many as fit into `retention` bytes. Blocks.
    pub fn open(root: &Path, retention: u64, metadata: &Metadata) -> Result<Self> {
        let mut recent = Recent::default();
        let reserved = metadata::events::reserved(metadata)?;
        let metadata = metadata.clone();
        let reserve = Box::new(move |number| metadata::events::reserve(&metadata, number));
        let journal = Journal::open(&root.join(FOLDER), retention, reserved, reserve, |payload| {
            recent.add(fingerprint(payload), false);
        })?;
        let state = State { recent, ..State::default() };
        Ok(Exchange { state: Arc::new(Mutex::new(state)), journal: Some(Arc::new(journal)) })
    }

    /// Publishes what the engine did. `topic` is one of containerd's, such as `/containers/create`.
    pub fn publish<M: prost::Message + Name>(&self, namespace: &Namespace, topic: &str, event: &M) {
        let envelope = Envelope {
            timestamp: Some(std::time::SystemTime::now().into()),
            namespace: namespace.to_string(),
            topic: topic.to_owned(),
            event: Some(proto::any::pack(event)),
        };
        // Only what others hand over is ever refused.
        let _ = self.deliver(envelope, Sender::Engine, None);
    }

    /// Passes on an event of a client; InvalidArgument when its envelope is not complete. Answers when it is in the journal.
    pub async fn forward(&self, envelope: Envelope) -> Result<()> {
        self.take(envelope, Sender::Client).await
    }

    /// The same for a shim's, of which one that was taken before is known again and not kept twice.
    pub async fn forward_once(&self, envelope: Envelope) -> Result<()> {
        self.take(envelope, Sender::Shim).await
    }

    /// Publishes a client's own event in its namespace.
    pub async fn publish_any(
        &self,
        namespace: &Namespace,
        topic: String,
        event: Option<prost_types::Any>,
    ) -> Result<()> {
        let timestamp = Some(std::time::SystemTime::now().into());
        self.forward(Envelope { timestamp, namespace: namespace.to_string(), topic, event }).await
    }

    async fn take(&self, envelope: Envelope, sender: Sender) -> Result<()> {
        Namespace::new(&envelope.namespace).map_err(|error| error.context("event envelope"))?;
        validate_topic(&envelope.topic)?;
        if envelope.timestamp.is_none() {
            return Err(Error::invalid_argument("an event's envelope must have a time"));
        }
        let (done, answer) = oneshot::channel();
        self.deliver(envelope, sender, Some(done))?;
        answered(answer).await
    }

    /// Answers when all that was published before is in the journal, on disk.
    pub async fn settled(&self) -> Result<()> {
        let Some(journal) = &self.journal else { return Ok(()) };
        let (done, answer) = oneshot::channel();
        journal.mark(Some(done));
        answered(answer).await
    }

    /// The journal's events from this number on that pass any of the filters, and then those that come. 0 begins with the
    /// oldest, None with what comes. OutOfRange for a number that is still to come.
    pub fn replay(&self, from: Option<u64>, filters: &[String]) -> Result<Replay> {
        let filter = Arc::new(Filter::parse_all(filters)?);
        Ok(Replay { reader: self.journal()?.reader(from)?, filter, ready: VecDeque::new() })
    }

    /// What is in the journal.
    pub fn range(&self) -> Result<Range> {
        Ok(self.journal()?.range())
    }

    fn journal(&self) -> Result<&Journal> {
        self.journal.as_deref().ok_or_else(|| Error::unimplemented("this engine keeps no events"))
    }

    /// Events from now on that pass any of the filters (`topic`, `namespace`, `event.FIELD`).
    pub fn subscribe(&self, filters: &[String]) -> Result<Subscription> {
        self.add(filters, true)
    }

    /// The same for a part of the engine: what only such a part heard, no client could hear.
    pub fn watch(&self, filters: &[String]) -> Result<Subscription> {
        self.add(filters, false)
    }

    fn add(&self, filters: &[String], client: bool) -> Result<Subscription> {
        let filter = Filter::parse_all(filters)?;
        let (sender, queue) = mpsc::channel(QUEUE_MAX);
        let overrun = Arc::new(AtomicBool::new(false));
        let subscriber = Subscriber { filter, queue: sender, overrun: overrun.clone(), client };
        let mut state = self.state.lock();
        if state.held.iter().flat_map(|held| &held.envelopes).all(|envelope| subscriber.offer(envelope)) {
            state.subscribers.push(subscriber);
        }
        Ok(Subscription { queue, overrun })
    }

    fn deliver(&self, envelope: Envelope, sender: Sender, done: Option<oneshot::Sender<()>>) -> Result<()> {
        tracing::debug!(topic = %envelope.topic, namespace = %envelope.namespace, "event");
        let Some(journal) = &self.journal else {
            self.state.lock().fan_out(envelope);
            if let Some(done) = done {
                let _ = done.send(());
            }
            return Ok(());
        };
        let payload = envelope.encode_to_vec();
        let print = (sender == Sender::Shim).then(|| fingerprint(&payload));
        // Under the lock, so that all see one order; nothing in here waits.
        let mut state = self.state.lock();
        if let Some(print) = print
            && let Some(told) = state.recent.told.get_mut(&print)
        {
            // An earlier engine took it, and ended before its answer: perhaps before anyone heard of it, too.
            if !std::mem::replace(told, true) {
                state.fan_out(envelope);
            }
            journal.mark(done);
            return Ok(());
        }
        if sender != Sender::Engine {
            journal.room_for(payload.len())?;
        }
        if let Some(print) = print {
            state.recent.add(print, true);
        }
        state.fan_out(envelope);
        journal.append(payload, done);
        Ok(())
    }

    /// Keeps, from now until [`Exchange::release`], what is published while there is no subscriber; those who come get it
    /// first. For the start: shims tell what happened while there was no engine before anyone can have subscribed.
    pub fn hold(&self) {
        self.state.lock().held = Some(Held::default());
    }

    /// Ends what [`Exchange::hold`] began.
    pub fn release(&self) {
        self.state.lock().held = None;
    }
}

impl State {
    fn fan_out(&mut self, envelope: Envelope) {
        let envelope = Arc::new(envelope);
        self.subscribers.retain(|subscriber| subscriber.offer(&envelope));
        if !self.subscribers.iter().any(|subscriber| subscriber.client)
            && let Some(held) = &mut self.held
            && held.envelopes.len() < QUEUE_MAX
            && held.bytes < HELD_BYTES
        {
            held.bytes += envelope.encoded_len();
            held.envelopes.push(envelope);
        }
    }
}

impl Recent {
    fn add(&mut self, print: u64, told: bool) {
        if self.told.insert(print, told).is_none() {
            self.order.push_back(print);
        }
        if self.order.len() > RECENT
            && let Some(oldest) = self.order.pop_front()
        {
            self.told.remove(&oldest);
        }
    }
}

impl Replay {
    /// What comes next in the journal; waits at its end.
    pub async fn next(&mut self) -> Result<Entry> {
        loop {
            if let Some(entry) = self.ready.pop_front() {
                return Ok(entry);
            }
            let filter = self.filter.clone();
            let wanted = move |envelope: &Envelope| filter.matches(|path| field(envelope, path));
            self.ready = self.reader.next(wanted).await?.into();
        }
    }
}

/// The writer's answer; without one, whoever sent the event may send it again.
async fn answered(answer: oneshot::Receiver<()>) -> Result<()> {
    answer.await.map_err(|_| {
        Error::unavailable("the journal took no event: the engine is stopping, or its log names a defect")
    })
}

/// What an event is known again by. It is made anew at each start.
fn fingerprint(payload: &[u8]) -> u64 {
    let mut hasher = DefaultHasher::new();
    payload.hash(&mut hasher);
    hasher.finish()
}

impl Subscriber {
    /// Puts an event into the queue if it passes the filter; whether the subscription goes on.
    fn offer(&self, envelope: &Arc<Envelope>) -> bool {
        if self.queue.is_closed() {
            return false;
        }
        if !self.filter.matches(|path| field(envelope, path)) {
            return true;
        }
        match self.queue.try_send(envelope.clone()) {
            Ok(()) => true,
            Err(mpsc::error::TrySendError::Full(_)) => {
                self.overrun.store(true, Ordering::Release);
                false
            }
            Err(mpsc::error::TrySendError::Closed(_)) => false,
        }
    }
}

impl Subscription {
    /// The next event. None when the engine ends; ResourceExhausted, once, when the subscriber read too slowly.
    pub async fn next(&mut self) -> Option<Result<Arc<Envelope>>> {
        match self.queue.recv().await {
            Some(envelope) => Some(Ok(envelope)),
            None if self.overrun.swap(false, Ordering::AcqRel) => {
                Some(Err(Error::resource_exhausted(format!(
                    "the subscriber fell more than {QUEUE_MAX} events behind and was cut off; subscribe again and list anew"
                ))))
            }
            None => None,
        }
    }
}

/// Checks a topic: `/` and runs of letters, digits, `-`, `_`, `.`, joined by `/`.
fn validate_topic(topic: &str) -> Result<()> {
    let valid = topic.strip_prefix('/').is_some_and(|rest| {
        rest.split('/').all(|part| {
            !part.is_empty()
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.'))
        })
    });
    if valid {
        Ok(())
    } else {
        Err(Error::invalid_argument(format!(
            "event topic {topic:?} is not valid: it begins with '/' and has parts of letters and digits, as /tasks/start"
        )))
    }
}

fn field<'a>(envelope: &'a Envelope, path: &[&str]) -> Option<Cow<'a, str>> {
    match path {
        ["namespace"] => Some(envelope.namespace.as_str().into()),
        ["topic"] => Some(envelope.topic.as_str().into()),
        ["event", rest @ ..] => fields::of(envelope.event.as_ref()?, rest),
        _ => None,
    }
}

/// A segment of the journal as it may be after a power cut: what is shown is its whole beginning, and is written as it stands there.
#[cfg(any(test, fuzzing))]
pub fn fuzz(data: &[u8]) {
    let mut shown = Vec::new();
    let (next, length) = segment::scan(data, 7, |payload| shown.push(payload.to_vec()));
    assert!(length <= data.len());
    assert_eq!(next, 7 + shown.len() as u64);
    let mut written = Vec::new();
    for (number, payload) in (7..).zip(&shown) {
        segment::put_frame(&mut written, number, payload);
    }
    assert!(data[..length].ends_with(&written));
    // Made by us, it is read to its end.
    let mut whole = segment::MAGIC.to_vec();
    segment::put_frame(&mut whole, 7, &data[..data.len().min(1 << 10)]);
    assert_eq!(segment::scan(&whole, 7, |_| ()), (8, whole.len()));
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::containerd::events::{TaskExit, TaskStart};

    fn start(id: &str) -> TaskStart {
        TaskStart { container_id: id.into(), pid: 7 }
    }

    #[tokio::test]
    async fn order_and_filters() {
        let exchange = Exchange::default();
        let ns = Namespace::new("a").unwrap();
        let mut all = exchange.subscribe(&[]).unwrap();
        let mut one =
            exchange.subscribe(&[r#"topic=="/tasks/start",event.container_id==c5"#.into()]).unwrap();
        let mut exits = exchange.subscribe(&["event.exit_status==3".into(), "namespace==b".into()]).unwrap();
        for i in 0..10 {
            exchange.publish(&ns, "/tasks/start", &start(&format!("c{i}")));
        }
        exchange.publish(&ns, "/tasks/exit", &TaskExit { exit_status: 3, ..Default::default() });
        exchange.publish(&Namespace::new("b").unwrap(), "/tasks/start", &start("x"));
        for i in 0..10 {
            let event = all.next().await.unwrap().unwrap();
            let event: TaskStart = proto::any::unpack(event.event.as_ref().unwrap()).unwrap();
            assert_eq!(event.container_id, format!("c{i}"));
        }
        let event = one.next().await.unwrap().unwrap();
        let event: TaskStart = proto::any::unpack(event.event.as_ref().unwrap()).unwrap();
        assert_eq!(event.container_id, "c5");
        assert_eq!(exits.next().await.unwrap().unwrap().topic, "/tasks/exit");
        assert_eq!(exits.next().await.unwrap().unwrap().namespace, "b");
    }

    #[tokio::test]
    async fn a_slow_reader_is_cut_off_and_the_others_are_not() {
        let exchange = Exchange::default();
        let ns = Namespace::new("a").unwrap();
        let mut slow = exchange.subscribe(&[]).unwrap();
        let mut other = exchange.subscribe(&["event.pid==8".into()]).unwrap();
        for _ in 0..=QUEUE_MAX {
            exchange.publish(&ns, "/tasks/start", &start("c"));
        }
        exchange.publish(&ns, "/tasks/start", &TaskStart { container_id: "d".into(), pid: 8 });
        assert!(other.next().await.unwrap().is_ok());
        for _ in 0..QUEUE_MAX {
            assert!(slow.next().await.unwrap().is_ok());
        }
        assert!(matches!(slow.next().await, Some(Err(Error::ResourceExhausted(_)))));
        assert!(slow.next().await.is_none());
    }

    #[tokio::test]
    async fn incomplete_envelopes_are_refused() {
        let exchange = Exchange::default();
        let good = Envelope {
            timestamp: Some(std::time::SystemTime::now().into()),
            namespace: "a".into(),
            topic: "/x/y".into(),
            event: None,
        };
        exchange.forward(good.clone()).await.unwrap();
        for bad in [
            Envelope { timestamp: None, ..good.clone() },
            Envelope { namespace: String::new(), ..good.clone() },
            Envelope { namespace: "a/b".into(), ..good.clone() },
            Envelope { topic: String::new(), ..good.clone() },
            Envelope { topic: "x".into(), ..good.clone() },
            Envelope { topic: "/x//y".into(), ..good },
        ] {
            assert!(matches!(exchange.forward(bad).await, Err(Error::InvalidArgument(_))));
        }
    }

    #[tokio::test]
    async fn what_nobody_could_hear_is_held_for_those_who_come_soon() {
        let exchange = Exchange::default();
        let ns = Namespace::new("a").unwrap();
        exchange.publish(&ns, "/tasks/start", &start("lost"));
        exchange.hold();
        exchange.publish(&ns, "/tasks/start", &start("c1"));
        exchange.publish(&ns, "/tasks/exit", &TaskExit::default());
        let mut watched = exchange.watch(&[]).unwrap();
        let mut starts = exchange.subscribe(&[r#"topic=="/tasks/start""#.into()]).unwrap();
        exchange.publish(&ns, "/tasks/start", &start("c2"));
        let mut all = exchange.subscribe(&[]).unwrap();
        exchange.release();
        let mut late = exchange.subscribe(&[]).unwrap();
        exchange.publish(&ns, "/tasks/start", &start("c3"));
        assert!(watched.next().await.unwrap().is_ok());
        let mut ids = Vec::new();
        for _ in 0..3 {
            let event = starts.next().await.unwrap().unwrap();
            ids.push(proto::any::unpack::<TaskStart>(event.event.as_ref().unwrap()).unwrap().container_id);
        }
        assert_eq!(ids, ["c1", "c2", "c3"]);
        let topics =
            [all.next().await, all.next().await, all.next().await].map(|e| e.unwrap().unwrap().topic.clone());
        assert_eq!(topics, ["/tasks/start", "/tasks/exit", "/tasks/start"]);
        let event = late.next().await.unwrap().unwrap();
        assert_eq!(
            proto::any::unpack::<TaskStart>(event.event.as_ref().unwrap()).unwrap().container_id,
            "c3"
        );
    }

    #[tokio::test]
    async fn what_a_shim_sends_again_is_kept_once_and_heard_once_of_each_engine() {
        let folder = tempfile::tempdir().unwrap();
        let open = || {
            let root = folder.path().to_owned();
            let opened = tokio::task::spawn_blocking(move || {
                let metadata = Metadata::open(&root.join("metadata")).unwrap();
                Exchange::open(&root, 1 << 20, &metadata).unwrap()
            });
            async { opened.await.unwrap() }
        };
        let envelope = |seconds| Envelope {
            timestamp: Some(prost_types::Timestamp { seconds, nanos: 5 }),
            namespace: "a".into(),
            topic: "/tasks/exit".into(),
            event: Some(proto::any::pack(&TaskExit::default())),
        };
        for round in 0..2 {
            let exchange = open().await;
            let mut live = exchange.subscribe(&[]).unwrap();
            // The second engine gets it for the third and fourth time.
            exchange.forward_once(envelope(1)).await.unwrap();
            exchange.forward_once(envelope(1)).await.unwrap();
            exchange.forward_once(envelope(2 + round)).await.unwrap();
            for seconds in [1, 2 + round] {
                let event = live.next().await.unwrap().unwrap();
                assert_eq!(event.timestamp.unwrap().seconds, seconds);
            }
        }
        let exchange = open().await;
        // A client that says the same twice means it.
        exchange.forward(envelope(1)).await.unwrap();
        exchange.publish(&Namespace::new("b").unwrap(), "/tasks/start", &start("c"));
        exchange.settled().await.unwrap();
        let Range { first, next, .. } = exchange.range().unwrap();
        assert_eq!((first, next), (1, 6));
        let mut replay = exchange.replay(Some(1), &["namespace==a".into()]).unwrap();
        for expected in [(1, 1), (2, 2), (3, 3), (4, 1)] {
            let Entry::Event(number, event) = replay.next().await.unwrap() else { panic!("a gap") };
            assert_eq!((number, event.timestamp.unwrap().seconds), expected);
        }
        let mut all = exchange.replay(Some(5), &[]).unwrap();
        assert!(matches!(all.next().await.unwrap(), Entry::Event(5, event) if event.topic == "/tasks/start"));
        let from_now = exchange.replay(None, &[]).unwrap();
        drop((replay, all, from_now));
        assert!(matches!(exchange.replay(Some(7), &[]), Err(Error::OutOfRange(_))));
        assert!(matches!(Exchange::default().replay(None, &[]), Err(Error::Unimplemented(_))));
    }

    #[test]
    fn subscribers_that_left_are_forgotten() {
        let exchange = Exchange::default();
        drop(exchange.subscribe(&[]).unwrap());
        exchange.publish(&Namespace::new("a").unwrap(), "/tasks/start", &start("c"));
        assert!(exchange.state.lock().subscribers.is_empty());
    }
}
