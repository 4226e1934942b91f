//! How many processes may be in containers beside their first ones, so that nobody's use up the machine.
//!
//! ```text
//!  admit --> queue of the container --> its places --> places of all containers --> the process, until it is removed
//! ```
//!
//! Invariants: who waits is served in order, and nobody waits longer than [`Limits::wait`]. A container takes no more than its own
//! places from all others, nor do its waiters: they stand in its own queue. What a caller waits for (probes) and what a client
//! follows, for hours perhaps, are bounded apart, so that neither keeps the other away.

use std::collections::HashMap;
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::error::{Error, Result};

/// How many may wait for a place, for each that there is.
const QUEUE: usize = 4;

/// The most processes of a kind at a time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// In one container; zero for no limit.
    pub container: usize,
    /// In all containers; zero for no limit.
    pub all: usize,
    /// How long one may wait for its place.
    pub wait: Duration,
}

impl Default for Limits {
    /// A kubelet has three probes and two hooks for a container at the most, on 110 pods. Its own time limit for a call is two minutes
    /// more than the probe's.
    fn default() -> Self {
        Limits { container: 32, all: 512, wait: Duration::from_secs(60) }
    }
}

/// The places of one kind of processes.
pub(super) struct Bound {
    limits: Limits,
    all: Places,
    of: Mutex<HashMap<String, Weak<Places>>>,
}

/// Places, and with them room for those who wait.
struct Places {
    admitted: Arc<Semaphore>,
    taken: Arc<Semaphore>,
}

/// A place, until it is dropped.
pub(super) struct Place {
    _permits: [OwnedSemaphorePermit; 4],
    /// Keeps them in the map.
    _places: Arc<Places>,
}

impl Places {
    fn new(limit: usize) -> Self {
        let limit = if limit == 0 { Semaphore::MAX_PERMITS } else { limit.min(Semaphore::MAX_PERMITS) };
        let admitted = limit.saturating_mul(QUEUE + 1).min(Semaphore::MAX_PERMITS);
        Places { admitted: Arc::new(Semaphore::new(admitted)), taken: Arc::new(Semaphore::new(limit)) }
    }
}

impl Bound {
    pub(super) fn new(limits: Limits) -> Self {
        Bound { limits, all: Places::new(limits.all), of: Mutex::default() }
    }

    /// A place in a container; ResourceExhausted when too many wait, or none comes free in time.
    pub(super) async fn place(&self, container: &str) -> Result<Place> {
        let Limits { container: each, all, wait } = self.limits;
        let own = self.places(container);
        let in_one = || format!("as many commands run in container {container:?} as may at a time ({each})");
        let in_all = || format!("as many commands run in all containers as may at a time ({all})");
        let admit = |places: &Places| places.admitted.clone().try_acquire_owned();
        let crowded = |what: String| exhausted(&what, "and too many wait");
        let first = admit(&own).map_err(|_| crowded(in_one()))?;
        let second = admit(&self.all).map_err(|_| crowded(in_all()))?;
        let late = format!("and none has ended in {wait:?}");
        let end = tokio::time::Instant::now() + wait;
        // Nobody closes them.
        let taken = |places: &Places| tokio::time::timeout_at(end, places.taken.clone().acquire_owned());
        let Ok(Ok(third)) = taken(&own).await else { return Err(exhausted(&in_one(), &late)) };
        let Ok(Ok(fourth)) = taken(&self.all).await else { return Err(exhausted(&in_all(), &late)) };
        Ok(Place { _permits: [first, second, third, fourth], _places: own })
    }

    fn places(&self, container: &str) -> Arc<Places> {
        let mut of = self.of.lock();
        if let Some(places) = of.get(container).and_then(Weak::upgrade) {
            return places;
        }
        of.retain(|_, places| places.strong_count() > 0);
        let places = Arc::new(Places::new(self.limits.container));
        of.insert(container.to_owned(), Arc::downgrade(&places));
        places
    }
}

fn exhausted(what: &str, more: &str) -> Error {
    Error::resource_exhausted(format!(
        "{what}, {more}; end some, try again later, or raise max_execs_per_container or max_execs in the configuration"
    ))
}

#[cfg(test)]
mod tests {
    use futures::poll;
    use futures::stream::{FuturesUnordered, StreamExt as _};

    use super::*;

    const LONG: Duration = Duration::from_secs(600);

    fn why(place: Result<Place>) -> String {
        match place {
            Err(Error::ResourceExhausted(why)) => why,
            Err(error) => panic!("{error}"),
            Ok(_) => panic!("there was a place"),
        }
    }

    #[tokio::test]
    async fn who_finds_no_place_waits_for_one_and_is_served_in_order() {
        let bound = Bound::new(Limits { container: 1, all: 2, wait: LONG });
        let first = bound.place("a").await.unwrap();
        let (second, third) = (bound.place("a"), bound.place("a"));
        futures::pin_mut!(second, third);
        assert!(poll!(second.as_mut()).is_pending());
        assert!(poll!(third.as_mut()).is_pending());
        // Another container's is free, and is the last of all.
        let other = bound.place("b").await.unwrap();
        let elsewhere = bound.place("c");
        futures::pin_mut!(elsewhere);
        assert!(poll!(elsewhere.as_mut()).is_pending());
        drop(first);
        // It has its place in the container now; that of all is for who came first.
        assert!(poll!(second.as_mut()).is_pending());
        let elsewhere = elsewhere.await.unwrap();
        drop(other);
        let second = second.await.unwrap();
        assert!(poll!(third.as_mut()).is_pending());
        drop((second, elsewhere));
        drop(third.await.unwrap());
        drop(bound.place("d").await.unwrap());
        assert_eq!(bound.of.lock().len(), 1, "those without commands are forgotten");
    }

    #[tokio::test]
    async fn nobody_waits_for_ever_or_among_too_many() {
        let bound = Bound::new(Limits { container: 1, all: 0, wait: Duration::from_millis(20) });
        let _first = bound.place("a").await.unwrap();
        let late = why(bound.place("a").await);
        assert!(
            late.contains("\"a\" as may at a time (1)")
                && late.contains("20ms")
                && late.contains("max_execs"),
            "{late}"
        );

        let bound = Bound::new(Limits { container: 2, all: 1, wait: LONG });
        let first = bound.place("a").await.unwrap();
        {
            let waiting: Vec<_> = (0..QUEUE).map(|_| Box::pin(bound.place("a"))).collect();
            let mut waiting: FuturesUnordered<_> = waiting.into_iter().collect();
            assert!(poll!(waiting.next()).is_pending());
            let crowded = why(bound.place("b").await);
            assert!(
                crowded.contains("all containers as may at a time (1)") && crowded.contains("too many wait"),
                "{crowded}"
            );
        }
        // Those who left have left the queue.
        let waiting = bound.place("b");
        futures::pin_mut!(waiting);
        assert!(poll!(waiting.as_mut()).is_pending());
        drop(first);
        waiting.await.unwrap();
    }

    #[tokio::test]
    async fn zero_is_no_limit() {
        let bound = Bound::new(Limits { container: 0, all: 0, wait: Duration::ZERO });
        let mut places = Vec::new();
        for _ in 0..10_000 {
            places.push(bound.place("a").await.unwrap());
        }
        assert_eq!(bound.of.lock().len(), 1);
    }
}
