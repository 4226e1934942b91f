//! Garbage collection: what nothing holds any more goes. The scheduler in here is the only one that sweeps.
//!
//! ```text
//!  mutations, requests, times --> Schedule --> collection, one at a time:
//!
//!    view ----> mark (gc/mark.rs), off the writer ----> unmarked ----+
//!      |                                                             v
//!      +---- what has changed since the view, on the writer ----> one commit: spare, delete the records of the rest
//!                                                                    |
//!                                                                    v
//!                                     events; files of blobs and ingests, snapshots
//! ```
//!
//! Nobody waits for the marking, which works on a view while others commit. Why it is sound to delete afterwards what was
//! not marked in that view: say that something is held in the state that the commit finds. Then there is a chain of links
//! from a root to it, and each link is what a record says: that of the holder, for a back reference that of the held one, for
//! a condition both, for a resource of a lease the one that puts it there; that a root is one says its own record. If all
//! these records are as they were in the view, the chain was there and was followed: it is marked. Else take the last one on
//! the chain that has changed. What it is about is an additional root, which spares all that can be reached from it, and the
//! rest of the chain is just that. So what goes is held by nothing. Whether anything has expired is asked of one and the
//! same moment in both. What has been deleted since can only have held things, so that to count it in spares too much for
//! once, and never too little. The changes are found where two maps do not share their parts, at a cost that does not grow
//! with the number of records.
//!
//! Invariants: one collection runs at a time. Nothing goes whose record was made or changed since the view. Records go before
//! files, so that a kill between the two leaves files without a record: the next start removes ingests and snapshots, and
//! the first collection after it blobs.

mod mark;
mod records;

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, SystemTime};

use oci::Digest;
use proto::containerd::events::{ContentDelete, SnapshotRemove};
use proto::containerd::services::images::v1::ImageDelete;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::Instant;

pub(crate) use mark::{Graph, Node, Step, parse_duration};
pub(crate) use records::graph;
use records::{Marked, Removed};

use crate::content::Content;
use crate::context::{Namespace, RequestContext};
use crate::error::{Error, Result, blocking};
use crate::events::Exchange;
use crate::metadata::namespaces::NamespaceRecord;
use crate::metadata::{Metadata, Mutations, Read, View};
use crate::mounts::Mounts;
use crate::snapshots::Snapshots;

/// The longest time after a change until a collection.
const CHANGED_LIMIT: Duration = Duration::from_secs(600);
/// The longest time that anything is put off, whatever the settings say; and that an expiry is waited for, since clocks
/// are set.
const DELAY_MAX: Duration = Duration::from_secs(24 * 3600);
/// The time between collections until it is known how long one takes.
const FIRST_INTERVAL: Duration = Duration::from_secs(1);
/// What a collection counts for at least, when the time between them is derived from how long they take.
const LEAST_TIME: Duration = Duration::from_millis(5);
/// The largest part of the time that collections may take.
const PAUSE_MAX: f64 = 0.5;

/// When collections run. The names, defaults and meanings are those of containerd's scheduler.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The part of the time that collections may take: the time between two is derived from it.
    pub pause_threshold: f64,
    /// After so many deletions one is begun at once; fewer, or 0, leave it to the end of an interval.
    pub deletion_threshold: u64,
    /// After so many changes of any kind one is begun; 0 does not count them.
    pub mutation_threshold: u64,
    /// How long a collection that is begun at once is put off, for more of the same to come.
    pub schedule_delay: Duration,
    /// When the first one begins after the engine has started; 0 leaves it to the first change.
    pub startup_delay: Duration,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            pause_threshold: 0.02,
            deletion_threshold: 0,
            mutation_threshold: 100,
            schedule_delay: Duration::ZERO,
            startup_delay: Duration::from_millis(100),
        }
    }
}

/// What a collection removed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Collected {
    /// Blobs, counted once for each namespace that had one.
    pub content: u64,
    /// Snapshots.
    pub snapshots: u64,
    /// Images that had expired.
    pub images: u64,
    /// Leases that had expired.
    pub leases: u64,
    /// Ingests.
    pub ingests: u64,
    /// Mounts that the engine kept for clients.
    pub mounts: u64,
    /// How long it took, files included.
    pub took: Duration,
}

/// Why something is kept, or that it is not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Explanation {
    /// Whether anything holds it.
    pub(crate) held: bool,
    /// From a root to the object; the object alone when nothing holds it.
    pub(crate) chain: Vec<Step>,
}

type Answer = oneshot::Sender<Result<Collected>>;

/// The way to ask for collections; cheap to clone.
#[derive(Clone)]
pub struct Gc {
    requests: mpsc::UnboundedSender<Answer>,
    settings: watch::Sender<Settings>,
    metadata: Metadata,
}

/// Runs the collections, until nobody is left to ask for one.
pub struct Scheduler {
    settings: watch::Receiver<Settings>,
    requests: mpsc::UnboundedReceiver<Answer>,
    collector: Collector,
}

/// What a collection works on.
#[derive(Clone)]
struct Collector {
    metadata: Metadata,
    events: Exchange,
    content: Content,
    snapshots: Snapshots,
    mounts: Mounts,
}

/// A collection that has ended.
struct Outcome {
    collected: Collected,
    /// How long it took until the records were deleted.
    records: Duration,
    /// What had been committed when it began, and what it has committed itself.
    seen: Mutations,
    /// When something expires next.
    turn: Option<SystemTime>,
}

impl Gc {
    /// The way to ask, and the scheduler, which is to be run.
    pub fn new(
        settings: Settings,
        metadata: Metadata,
        events: Exchange,
        content: Content,
        snapshots: Snapshots,
        mounts: Mounts,
    ) -> (Gc, Scheduler) {
        let (sender, requests) = mpsc::unbounded_channel();
        let collector = Collector { metadata: metadata.clone(), events, content, snapshots, mounts };
        let (set, settings) = watch::channel(settings);
        (Gc { requests: sender, settings: set, metadata }, Scheduler { settings, requests, collector })
    }

    /// Has collections run by these settings from now on.
    pub fn set(&self, settings: Settings) {
        self.settings.send_replace(settings);
    }

    /// A collection of all namespaces that begins after this call, once it has ended, files included.
    pub async fn collect(&self) -> Result<Collected> {
        let stopping = || {
            Error::unavailable("garbage cannot be collected: the engine is stopping; it is when it starts")
        };
        let (answer, collected) = oneshot::channel();
        self.requests.send(answer).map_err(|_| stopping())?;
        collected.await.unwrap_or_else(|_| Err(stopping()))
    }

    /// What holds an object: a digest, an image's name, a lease's or container's id, an ingest's ref, or the key of a
    /// snapshot, of this snapshotter if one is named. None when there is no such object.
    pub(crate) async fn explain(
        &self,
        context: &RequestContext,
        key: String,
        snapshotter: String,
    ) -> Result<Option<Explanation>> {
        let namespace = context.namespace()?.clone();
        let view = self.metadata.view();
        blocking(move || {
            let graph = records::graph(&view, namespace.as_str(), SystemTime::now())?;
            let Some(node) = graph.find(&key, &snapshotter) else { return Ok(None) };
            Ok(Some(match graph.chain(&node) {
                Some(chain) => Explanation { held: true, chain },
                None => Explanation { held: false, chain: vec![Step { node, why: mark::Why::Nothing }] },
            }))
        })
        .await
    }
}

impl Scheduler {
    /// Runs until the last [`Gc`] is gone.
    pub async fn run(mut self) {
        let mut mutations = self.collector.metadata.mutations();
        let mut seen = *mutations.borrow();
        let first_settings = self.settings.borrow_and_update().clone();
        let mut schedule = Schedule::new(first_settings, Instant::now());
        let mut waiting: Vec<Answer> = Vec::new();
        let mut first = true;
        loop {
            let pending = mutations.borrow_and_update().since(&seen);
            schedule.mutated(Instant::now(), pending);
            tokio::select! {
                request = self.requests.recv() => match request {
                    Some(answer) => {
                        waiting.push(answer);
                        schedule.requested(Instant::now());
                        continue;
                    }
                    None => return,
                },
                changed = self.settings.changed() => match changed {
                    Ok(()) => {
                        schedule.set(self.settings.borrow_and_update().clone());
                        continue;
                    }
                    Err(_) => return,
                },
                changed = mutations.changed() => match changed {
                    Ok(()) => continue,
                    Err(_) => return,
                },
                () = at(schedule.next) => {}
            }
            // Whoever asks from here on waits for the next one: this one may not see what they have done.
            let answer = match self.collector.clone().collect(first).await {
                Ok(outcome) => {
                    (seen, first) = (outcome.seen, false);
                    schedule.collected(Instant::now(), outcome.records, outcome.turn.map(in_future));
                    Ok(outcome.collected)
                }
                Err(error) => {
                    tracing::error!(%error, "garbage was not collected");
                    schedule.failed(Instant::now());
                    Err(error)
                }
            };
            for waiter in waiting.drain(..) {
                // Who does not wait any more does not matter.
                let _ = waiter.send(answer.clone());
            }
        }
    }
}

async fn at(time: Option<Instant>) {
    match time {
        Some(time) => tokio::time::sleep_until(time).await,
        None => std::future::pending().await,
    }
}

/// How long until a moment, and a bit: what expires then has expired after it.
fn in_future(time: SystemTime) -> Duration {
    time.duration_since(SystemTime::now()).unwrap_or_default().min(DELAY_MAX) + Duration::from_millis(1)
}

/// When the next collection runs. Pure: it is told what happens and what time it is.
#[derive(Debug)]
struct Schedule {
    settings: Settings,
    next: Option<Instant>,
    last: Option<Instant>,
    interval: Duration,
    /// The time that all collections took, and how many they are.
    spent: (Duration, u32),
}

impl Schedule {
    fn new(settings: Settings, now: Instant) -> Self {
        let settings = limited(settings);
        let next = (!settings.startup_delay.is_zero()).then(|| now + settings.startup_delay);
        Schedule { settings, next, last: None, interval: FIRST_INTERVAL, spent: (Duration::ZERO, 0) }
    }

    /// Goes on by other settings; what is due already stays due.
    fn set(&mut self, settings: Settings) {
        self.settings = limited(settings);
    }

    fn by(&mut self, time: Instant) {
        self.next = Some(self.next.map_or(time, |next| next.min(time)));
    }

    /// Somebody waits for a collection.
    fn requested(&mut self, now: Instant) {
        self.by(now + self.settings.schedule_delay);
    }

    /// So much has been committed since the last collection began.
    fn mutated(&mut self, now: Instant, since: Mutations) {
        let reaches = |count: u64, threshold: u64| threshold > 0 && count >= threshold;
        if since.commits == 0 {
            return;
        }
        if reaches(since.releases, self.settings.deletion_threshold) {
            self.by(now + self.settings.schedule_delay);
        }
        if self.last.is_none() && self.next.is_some() {
            // The start of the engine comes first.
            return;
        }
        let counted = self.settings.deletion_threshold > 0 && self.last.is_none();
        let released = since.releases > 0 && !counted;
        if released || reaches(since.commits, self.settings.mutation_threshold) {
            self.by(now + self.interval.max(self.settings.schedule_delay));
        }
        self.by(now + CHANGED_LIMIT);
    }

    /// A collection has ended, whose records took so long; something expires after so long a time.
    fn collected(&mut self, now: Instant, took: Duration, expiry: Option<Duration>) {
        self.spent = (self.spent.0.saturating_add(took), self.spent.1.saturating_add(1));
        let part = self.settings.pause_threshold.clamp(0.0, PAUSE_MAX);
        if part > 0.0 {
            let average = (self.spent.0 / self.spent.1).max(LEAST_TIME);
            let interval = Duration::try_from_secs_f64(average.as_secs_f64() * (1.0 / part - 1.0));
            self.interval = interval.unwrap_or(DELAY_MAX).min(DELAY_MAX);
        }
        self.last = Some(now);
        self.next = expiry.map(|expiry| now + expiry.clamp(self.interval, DELAY_MAX));
    }

    /// A collection has failed.
    fn failed(&mut self, now: Instant) {
        self.last = Some(now);
        self.next = Some(now + self.interval + FIRST_INTERVAL);
    }
}

fn limited(mut settings: Settings) -> Settings {
    for delay in [&mut settings.schedule_delay, &mut settings.startup_delay] {
        *delay = (*delay).min(DELAY_MAX);
    }
    settings
}

impl Collector {
    async fn collect(self, first: bool) -> Result<Outcome> {
        let began = Instant::now();
        // Before the view, which then has all that is counted.
        let mut seen = *self.metadata.mutations().borrow();
        let view = self.metadata.view();
        let now = SystemTime::now();
        let of = view.clone();
        let (marked, turn) = blocking(move || Ok(mark_all(&of, now))).await?;
        sys::failpoint!("gc.marked");
        let removed = if marked.is_empty() { Vec::new() } else { self.remove(view, marked, now).await? };
        sys::failpoint!("gc.records-removed");
        let records = began.elapsed();
        let mut collected = count(&removed);
        // Its own commit is no reason for another collection.
        seen.commits += u64::from(collected != Collected::default());
        self.announce(&removed);
        self.remove_files(removed, first).await;
        collected.took = began.elapsed();
        tracing::debug!(?collected, "garbage collected");
        Ok(Outcome { collected, records, seen, turn })
    }

    /// Deletes the records of what is still unmarked.
    async fn remove(&self, view: View, mut marked: Vec<Marked>, now: SystemTime) -> Result<Vec<Removed>> {
        let (removed, marked) = self
            .metadata
            .commit(move |txn| {
                let changes = txn.changes_since(&view);
                let mut by_namespace: BTreeMap<&str, Vec<&[String]>> = BTreeMap::new();
                for key in &changes {
                    if let [_, namespace, ..] = &key[..] {
                        by_namespace.entry(namespace).or_default().push(key);
                    }
                }
                let mut removed = Vec::with_capacity(marked.len());
                for marked in &mut marked {
                    let changes = by_namespace.remove(marked.namespace()).unwrap_or_default();
                    removed.push(marked.remove(txn, &changes, now)?);
                }
                Ok((removed, (marked, view)))
            })
            .await?;
        // To let go of large graphs takes longer than what the writer had to do with them, and longer than the reactor has.
        tokio::task::spawn_blocking(move || drop(marked));
        Ok(removed)
    }

    /// Says what went, as if each had been deleted by itself.
    fn announce(&self, removed: &[Removed]) {
        for Removed { namespace, content, snapshots, images, .. } in removed {
            for digest in content {
                let event = ContentDelete { digest: digest.clone() };
                self.events.publish(namespace, "/content/delete", &event);
            }
            for (snapshotter, key, _) in snapshots {
                let event = SnapshotRemove { key: key.clone(), snapshotter: snapshotter.clone() };
                self.events.publish(namespace, "/snapshot/remove", &event);
            }
            for name in images {
                self.events.publish(namespace, "/images/delete", &ImageDelete { name: name.clone() });
            }
        }
    }

    async fn remove_files(&self, removed: Vec<Removed>, first: bool) {
        let mut digests: BTreeSet<Digest> = removed.iter().flat_map(Removed::digests).collect();
        if first {
            digests.extend(self.content.unknown_blobs().await);
        }
        let (mut ingests, mut snapshots) = (Vec::new(), Vec::new());
        let mounts = removed.iter().any(|removed| !removed.mounts.is_empty());
        for removed in removed {
            ingests.extend(removed.ingests.into_iter().map(|ingest| ingest.key));
            snapshots
                .extend(removed.snapshots.into_iter().map(|(snapshotter, _, inner)| (snapshotter, inner)));
        }
        // Before the snapshots that may be beneath them.
        if mounts && let Err(error) = self.mounts.sweep().await {
            tracing::warn!(%error, "collected mounts stay until the next start");
        }
        if !ingests.is_empty() {
            self.content.remove_ingests(ingests).await;
        }
        sys::failpoint!("gc.ingests-removed");
        if !digests.is_empty() {
            self.content.remove_unused(digests.into_iter().collect()).await;
        }
        sys::failpoint!("gc.blobs-removed");
        if !snapshots.is_empty() {
            self.snapshots.remove_collected(snapshots).await;
        }
        sys::failpoint!("gc.snapshots-removed");
    }
}

/// Marks all namespaces; those in which not everything is held, and when something expires next.
fn mark_all(read: &impl Read, now: SystemTime) -> (Vec<Marked>, Option<SystemTime>) {
    let (mut all, mut turn) = (Vec::new(), None);
    for (parts, _) in read.list::<NamespaceRecord>(&[]) {
        let name = parts.concat();
        match Namespace::new(&name).and_then(|namespace| Marked::of(read, namespace, now)) {
            Ok((marked, next)) => {
                all.extend(marked);
                turn = [turn, next].into_iter().flatten().min();
            }
            Err(error) => {
                tracing::error!(namespace = name, %error, "the garbage of a namespace is left alone");
            }
        }
    }
    (all, turn)
}

fn count(removed: &[Removed]) -> Collected {
    let mut all = Collected::default();
    for removed in removed {
        all.content += removed.content.len() as u64;
        all.snapshots += removed.snapshots.len() as u64;
        all.images += removed.images.len() as u64;
        all.leases += removed.leases.len() as u64;
        all.ingests += removed.ingests.len() as u64;
        all.mounts += removed.mounts.len() as u64;
    }
    all
}

#[cfg(test)]
mod tests;
