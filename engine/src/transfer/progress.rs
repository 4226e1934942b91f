//! What a transfer tells of itself, on a stream of its client.
//!
//! Invariant: telling never waits. Who reads slowly misses events, who does not read at all holds nothing up but the end of
//! the transfer, and that for a moment.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use oci::image::Descriptor as Blob;
use parking_lot::Mutex;
use proto::any;
use proto::containerd::types::Descriptor;
use proto::containerd::types::transfer::Progress as Event;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::{fetch, wire};
use crate::streaming::End;

/// Events that wait for the reader.
const PENDING: usize = 1024;
/// How long the last events may take to be read.
const LAST: Duration = Duration::from_secs(2);
/// How often it is told how far blobs are.
const TICK: Duration = Duration::from_millis(300);

/// The way to tell; without a stream nothing is told.
pub(super) struct Progress(Option<(mpsc::Sender<Event>, JoinHandle<()>)>);

impl Progress {
    /// Tells on this stream. To be called on the runtime.
    pub(super) fn new(stream: Option<End>) -> Self {
        Progress(stream.map(|end| {
            let (sender, mut events) = mpsc::channel(PENDING);
            let telling = tokio::spawn(async move {
                while let Some(event) = events.recv().await {
                    if end.send(any::pack::<Event>(&event)).await.is_err() {
                        break;
                    }
                }
            });
            (sender, telling)
        }))
    }

    /// Tells of the whole transfer.
    pub(super) fn say(&self, event: &str) {
        self.tell(Event { event: event.to_owned(), ..Event::default() });
    }

    /// Tells of a document that all else of an image belongs to.
    pub(super) fn of(&self, event: &str, name: &str, target: &Descriptor) {
        self.tell(Event {
            event: event.to_owned(),
            name: name.to_owned(),
            desc: Some(target.clone()),
            ..Event::default()
        });
    }

    /// Tells of an image that has its name now.
    pub(super) fn saved(&self, name: &str, target: &Descriptor) {
        self.tell(Event {
            event: "saved".to_owned(),
            name: name.to_owned(),
            desc: Some(target.clone()),
            ..Event::default()
        });
    }

    /// Tells of anything.
    pub(super) fn tell(&self, event: Event) {
        if let Some((events, _)) = &self.0 {
            // Full: the reader is slow. Closed: it has gone.
            let _ = events.try_send(event);
        }
    }

    /// Sees the last events off and closes the stream.
    pub(super) async fn finish(self) {
        if let Some((events, mut telling)) = self.0 {
            drop(events);
            if tokio::time::timeout(LAST, &mut telling).await.is_err() {
                telling.abort();
            }
        }
    }
}

/// The blobs of a transfer, and how far each is.
///
/// ```text
///  waiting --> downloading ... --> complete ------+--> extracting ... --> extracted
///         \--> already exists ---------------------'
/// ```
#[derive(Default)]
pub(super) struct Jobs(Mutex<Vec<Arc<Job>>>);

/// How far one blob is; written by who works on it, read now and then.
pub(super) struct Job {
    name: String,
    parents: Vec<String>,
    blob: Blob,
    /// Bytes that are there.
    pub(super) progress: AtomicU64,
    /// Bytes that are unpacked, of [`Job::blob`].
    pub(super) unpacked: Arc<AtomicU64>,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    here: Option<Here>,
    extracted: bool,
    /// How many of the steps have been told, and how far it was then.
    told: (u8, u64),
}

#[derive(Clone, Copy, PartialEq)]
enum Here {
    Before,
    Now,
}

impl Job {
    /// The blob was there before.
    pub(super) fn exists(&self) {
        self.state.lock().here.get_or_insert(Here::Before);
    }

    /// The blob is there now.
    pub(super) fn complete(&self) {
        self.state.lock().here.get_or_insert(Here::Now);
    }

    /// The layer is unpacked.
    pub(super) fn extracted(&self) {
        self.state.lock().extracted = true;
    }

    fn event(&self, event: &str, progress: u64) -> Event {
        Event {
            event: event.to_owned(),
            name: self.name.clone(),
            parents: self.parents.clone(),
            progress: i64::try_from(progress).unwrap_or(i64::MAX),
            total: i64::try_from(self.blob.size).unwrap_or(i64::MAX),
            desc: Some(wire(&self.blob)),
        }
    }

    /// What has come about since it was last told.
    fn news(&self) -> Vec<Event> {
        const WAITING: u8 = 1;
        const HERE: u8 = 2;
        const EXTRACTED: u8 = 3;
        let mut state = self.state.lock();
        let (mut step, mut at) = state.told;
        let mut news = Vec::new();
        if step == 0 {
            news.push(self.event("waiting", 0));
            (step, at) = (WAITING, 0);
        }
        if step == WAITING {
            let progress = self.progress.load(Ordering::Relaxed);
            match state.here {
                Some(here) => {
                    let what = if here == Here::Before { "already exists" } else { "complete" };
                    news.push(self.event(what, self.blob.size));
                    (step, at) = (HERE, 0);
                }
                None if progress > at => {
                    news.push(self.event("downloading", progress));
                    at = progress;
                }
                None => {}
            }
        }
        if step == HERE {
            let unpacked = self.unpacked.load(Ordering::Relaxed);
            if state.extracted {
                news.push(self.event("extracted", self.blob.size));
                step = EXTRACTED;
            } else if unpacked > at {
                news.push(self.event("extracting", unpacked));
                at = unpacked;
            }
        }
        state.told = (step, at);
        news
    }
}

impl Jobs {
    /// A blob that belongs to these others, by their names.
    pub(super) fn add(&self, blob: &Blob, parents: Vec<String>) -> Arc<Job> {
        let job = Arc::new(Job {
            name: fetch::reference(blob),
            parents,
            blob: blob.clone(),
            progress: AtomicU64::new(0),
            unpacked: Arc::default(),
            state: Mutex::default(),
        });
        self.0.lock().push(job.clone());
        job
    }

    /// Tells how far each is, again and again.
    pub(super) async fn run(&self, progress: &Progress) {
        loop {
            self.tell(progress);
            tokio::time::sleep(TICK).await;
        }
    }

    /// Tells how far each is.
    pub(super) fn tell(&self, progress: &Progress) {
        if progress.0.is_some() {
            let jobs = self.0.lock();
            jobs.iter().flat_map(|job| job.news()).for_each(|event| progress.tell(event));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::streaming::Streams;
    use crate::streaming::tests::{client, context};

    #[tokio::test]
    async fn events_are_told_in_order_to_the_last() {
        let streams = Streams::default();
        let (_requests, mut answers) = client(&streams, "p");
        let progress = Progress::new(Some(streams.take(&context("a"), "p").unwrap()));
        for number in 0..100 {
            progress.say(&number.to_string());
        }
        let reading = tokio::spawn(async move {
            let mut events = Vec::new();
            while let Some(message) = answers.recv().await {
                events.push(any::unpack::<Event>(&message.unwrap()).unwrap().event);
            }
            events
        });
        progress.finish().await;
        assert_eq!(reading.await.unwrap(), (0..100).map(|number| number.to_string()).collect::<Vec<_>>());
    }

    #[tokio::test]
    async fn a_reader_that_does_not_read_holds_nothing_up() {
        let streams = Streams::default();
        let (_requests, _answers) = client(&streams, "p");
        let progress = Progress::new(Some(streams.take(&context("a"), "p").unwrap()));
        for _ in 0..10 * PENDING {
            progress.say("again");
        }
        let began = tokio::time::Instant::now();
        progress.finish().await;
        assert!(began.elapsed() < LAST * 2);
        Progress::new(None).finish().await;
    }
}
