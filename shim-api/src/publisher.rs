//! A shim's events on their way to the engine: one queue, one event in flight, in the order they happened.
//!
//! ```text
//!   publish() --> [ e5 e4 e3 e2 ] --> e1 in flight --> the engine's ttrpc socket
//!                                       | engine away: back off (50 ms .. 2 s), connect again, same event again
//!                                       ` engine says the event itself is bad: logged and given up
//! ```
//!
//! Invariant: while the engine is away or restarting nothing is lost and nothing overtakes. The queue is bounded
//! ([`QUEUE_LIMIT`]); beyond it the newest event is the one refused, with a log line, so that what is there stays
//! a true beginning of the story. An event may arrive twice when the connection ends between its arrival and the
//! answer.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime};

use async_trait::async_trait;
use proto::containerd::services::events::ttrpc::v1::ForwardRequest;
use proto::containerd::types::Envelope;
use tokio::sync::Notify;

use crate::transport::Connection;
use crate::{Error, Result, events};

/// Events kept while the engine is away: days of restarts for most, and some megabytes at worst.
pub const QUEUE_LIMIT: usize = 16 * 1024;

const FORWARD_LIMIT: Duration = Duration::from_secs(5);
const FIRST_PAUSE: Duration = Duration::from_millis(50);
const LONGEST_PAUSE: Duration = Duration::from_secs(2);
/// How often an event is tried that the engine answers with an error of no clear class.
const TRIES_ON_UNCLEAR_ERRORS: u32 = 5;

/// A way to the engine. Two exist: its ttrpc socket, and the publish binary for engines without one.
#[async_trait]
pub trait Route: Send + 'static {
    /// Delivers one event, or says why not; temporary errors are tried again.
    async fn deliver(&mut self, envelope: &Envelope) -> Result<()>;
}

/// The engine's ttrpc socket; connects when needed.
pub struct TtrpcRoute {
    address: String,
    connection: Option<Connection>,
}

impl TtrpcRoute {
    /// A route to the socket at this path or `unix://` address.
    #[must_use]
    pub fn new(address: impl Into<String>) -> Self {
        Self { address: address.into(), connection: None }
    }
}

#[async_trait]
impl Route for TtrpcRoute {
    async fn deliver(&mut self, envelope: &Envelope) -> Result<()> {
        let request = ForwardRequest { envelope: Some(envelope.clone()) };
        // The engine may have gone and come back since the last event: that is no failure.
        if let Some(connection) = self.connection.take_if(|connection| !connection.is_closed()) {
            let result = self.forward(connection, &request).await;
            if !result.as_ref().is_err_and(|error| error.code == crate::Code::Closed) {
                return result;
            }
        }
        let fresh = Connection::connect(&self.address).await?.with_namespace(&envelope.namespace);
        self.forward(fresh, &request).await
    }
}

impl TtrpcRoute {
    /// Keeps the connection when it may be used again.
    async fn forward(&mut self, connection: Connection, request: &ForwardRequest) -> Result<()> {
        let result = connection.call(events::SERVICE_NAME, "Forward", request, Some(FORWARD_LIMIT)).await;
        if !result.as_ref().is_err_and(Error::is_temporary) {
            self.connection = Some(connection);
        }
        result
    }
}

/// The queue; clones feed the same one.
#[derive(Clone)]
pub struct Publisher {
    shared: Arc<Shared>,
}

struct Shared {
    namespace: String,
    queue: Mutex<Queue>,
    changed: Notify,
}

#[derive(Default)]
struct Queue {
    waiting: VecDeque<Envelope>,
    in_flight: bool,
    refused: u64,
}

impl Publisher {
    /// Starts the task that delivers. Events are of this namespace.
    #[must_use]
    pub fn start(namespace: impl Into<String>, route: Box<dyn Route>) -> Self {
        let shared =
            Arc::new(Shared { namespace: namespace.into(), queue: Mutex::default(), changed: Notify::new() });
        tokio::spawn(deliver_all(Arc::clone(&shared), route));
        Self { shared }
    }

    /// Puts an event behind those published before. Never waits.
    pub fn publish<M: prost::Name>(&self, topic: &str, event: &M) {
        let envelope = Envelope {
            timestamp: Some(SystemTime::now().into()),
            namespace: self.shared.namespace.clone(),
            topic: topic.to_owned(),
            event: Some(proto::any::pack(event)),
        };
        {
            let mut queue = self.shared.lock();
            if queue.waiting.len() >= QUEUE_LIMIT {
                queue.refused += 1;
                tracing::error!(
                    topic,
                    refused = queue.refused,
                    "the event queue is full; this event is lost"
                );
                return;
            }
            queue.waiting.push_back(envelope);
        }
        self.shared.changed.notify_waiters();
    }

    /// Events not delivered yet.
    #[must_use]
    pub fn pending(&self) -> usize {
        let queue = self.shared.lock();
        queue.waiting.len() + usize::from(queue.in_flight)
    }

    /// Waits until all is delivered or the time is up; tells how many events are left.
    pub async fn drain(&self, limit: Duration) -> usize {
        let empty = async {
            loop {
                let changed = self.shared.changed.notified();
                tokio::pin!(changed);
                changed.as_mut().enable();
                if self.pending() == 0 {
                    return;
                }
                changed.await;
            }
        };
        let _ = tokio::time::timeout(limit, empty).await;
        self.pending()
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn next(&self) -> Envelope {
        loop {
            let changed = self.changed.notified();
            tokio::pin!(changed);
            changed.as_mut().enable();
            {
                let mut queue = self.lock();
                if let Some(envelope) = queue.waiting.pop_front() {
                    queue.in_flight = true;
                    return envelope;
                }
            }
            changed.await;
        }
    }
}

async fn deliver_all(shared: Arc<Shared>, mut route: Box<dyn Route>) {
    loop {
        let envelope = shared.next().await;
        deliver_one(&mut *route, &envelope).await;
        shared.lock().in_flight = false;
        shared.changed.notify_waiters();
    }
}

async fn deliver_one(route: &mut dyn Route, envelope: &Envelope) {
    let mut pause = FIRST_PAUSE;
    let mut unclear = 0;
    let mut told = false;
    while let Err(error) = route.deliver(envelope).await {
        if !error.is_temporary() {
            unclear += 1;
            let is_final = !matches!(error.code, crate::Code::Unknown | crate::Code::Internal);
            if is_final || unclear >= TRIES_ON_UNCLEAR_ERRORS {
                tracing::error!(topic = envelope.topic, %error, "the engine does not take this event; it is given up");
                return;
            }
        }
        if !told {
            told = true;
            tracing::warn!(topic = envelope.topic, %error, "cannot deliver an event; it and those behind it wait");
        }
        tokio::time::sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}
