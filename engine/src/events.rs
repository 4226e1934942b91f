//! Events: what happened, to whoever listens.
//!
//! ```text
//! publish (engine) ----\                         /--> subscription 1: filters, queue --> client
//! forward (shims) ------+--> one ordered fan-out +--> subscription 2 ...
//! ```
//!
//! Invariants: every subscriber sees the events that pass its filters in one and the same order. A slow subscriber
//! never holds up a publisher: its queue has a bound, and at the bound the subscription ends with an error that says so.
//! All namespaces are delivered, whatever namespace the subscriber is in; it filters by `namespace` if it wants one.

use std::borrow::Cow;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use parking_lot::Mutex;
use prost::Name;
use proto::containerd::types::Envelope;
use tokio::sync::mpsc;

use crate::context::Namespace;
use crate::error::{Error, Result};
use crate::filters::Filter;

mod fields;

/// The most events that wait for one subscriber.
const QUEUE_MAX: usize = 16 * 1024;

/// The fan-out; cheap to clone.
#[derive(Clone, Default)]
pub struct Exchange {
    state: Arc<Mutex<State>>,
}

#[derive(Default)]
struct State {
    subscribers: Vec<Subscriber>,
    /// What nobody could hear, kept for those who come soon; None when it is not kept.
    held: Option<Vec<Arc<Envelope>>>,
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
    /// Publishes what the engine did. `topic` is one of containerd's, such as `/containers/create`.
    pub fn publish<M: prost::Message + Name>(&self, namespace: &Namespace, topic: &str, event: &M) {
        self.deliver(Envelope {
            timestamp: Some(std::time::SystemTime::now().into()),
            namespace: namespace.to_string(),
            topic: topic.to_owned(),
            event: Some(proto::any::pack(event)),
        });
    }

    /// Passes on an event of a shim or a client; InvalidArgument when its envelope is not complete.
    pub fn forward(&self, envelope: Envelope) -> Result<()> {
        Namespace::new(&envelope.namespace).map_err(|error| error.context("event envelope"))?;
        validate_topic(&envelope.topic)?;
        if envelope.timestamp.is_none() {
            return Err(Error::invalid_argument("an event's envelope must have a time"));
        }
        self.deliver(envelope);
        Ok(())
    }

    /// Publishes a client's own event in its namespace.
    pub fn publish_any(
        &self,
        namespace: &Namespace,
        topic: String,
        event: Option<prost_types::Any>,
    ) -> Result<()> {
        let timestamp = Some(std::time::SystemTime::now().into());
        self.forward(Envelope { timestamp, namespace: namespace.to_string(), topic, event })
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
        if state.held.iter().flatten().all(|envelope| subscriber.offer(envelope)) {
            state.subscribers.push(subscriber);
        }
        Ok(Subscription { queue, overrun })
    }

    fn deliver(&self, envelope: Envelope) {
        tracing::debug!(topic = %envelope.topic, namespace = %envelope.namespace, "event");
        let envelope = Arc::new(envelope);
        // Under the lock, so that all see one order; nothing in here waits.
        let mut state = self.state.lock();
        state.subscribers.retain(|subscriber| subscriber.offer(&envelope));
        if !state.subscribers.iter().any(|subscriber| subscriber.client)
            && let Some(held) = &mut state.held
            && held.len() < QUEUE_MAX
        {
            held.push(envelope);
        }
    }

    /// Keeps, from now until [`Exchange::release`], what is published while there is no subscriber; those who come get it
    /// first. For the start: shims tell what happened while there was no engine before anyone can have subscribed.
    pub fn hold(&self) {
        self.state.lock().held = Some(Vec::new());
    }

    /// Ends what [`Exchange::hold`] began.
    pub fn release(&self) {
        self.state.lock().held = None;
    }
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
        exchange.forward(good.clone()).unwrap();
        for bad in [
            Envelope { timestamp: None, ..good.clone() },
            Envelope { namespace: String::new(), ..good.clone() },
            Envelope { namespace: "a/b".into(), ..good.clone() },
            Envelope { topic: String::new(), ..good.clone() },
            Envelope { topic: "x".into(), ..good.clone() },
            Envelope { topic: "/x//y".into(), ..good },
        ] {
            assert!(matches!(exchange.forward(bad), Err(Error::InvalidArgument(_))));
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

    #[test]
    fn subscribers_that_left_are_forgotten() {
        let exchange = Exchange::default();
        drop(exchange.subscribe(&[]).unwrap());
        exchange.publish(&Namespace::new("a").unwrap(), "/tasks/start", &start("c"));
        assert!(exchange.state.lock().subscribers.is_empty());
    }
}
