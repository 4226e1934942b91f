//! What is sampled beside the requests: how large writable layers are, and how fast processor time is used.
//!
//! ```text
//!  asked --> rounds, one every AGE: layers that are due measured one after the other, processor times read
//!        `-> answered from the table          nobody asked for IDLE --> the rounds end, the table is empty
//! ```
//!
//! Invariants: no request walks a file system; the walks are one at a time, and of one layer take a twentieth of the time at
//! most. A layer that has never been measured is waited for, up to PATIENCE per request.

use std::collections::{HashMap, HashSet};
use std::sync::Arc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use tokio::sync::{Notify, watch};

use super::super::context;
use super::super::store::{Container, Store};
use crate::containers::Containers;
use crate::error::Result;
use crate::metadata::cri::ContainerStage;
use crate::snapshots::Snapshots;

/// How old a sample may be before it is taken anew.
const AGE: Duration = Duration::from_secs(10);
/// For how long samples are taken after somebody asked.
const IDLE: Duration = Duration::from_secs(120);
/// How long a request waits for what has never been measured.
const PATIENCE: Duration = Duration::from_millis(250);
/// A layer is left alone for so many times what its measurement took.
const REST: u32 = 20;
/// The shortest time over which a rate is told.
const WINDOW: i64 = 1_000_000_000;

/// A writable layer, as it was measured.
#[derive(Clone, Debug)]
pub(super) struct Layer {
    /// When, in Unix nanoseconds.
    pub at: i64,
    /// Its snapshotter.
    pub snapshotter: String,
    /// Bytes and inodes; unset when that could not be told.
    pub usage: Option<(u64, u64)>,
    measured: Instant,
    took: Duration,
    /// Its container had ended: it does not change any more.
    last: bool,
}

/// Processor time at one time, and how much of it went by each second before.
#[derive(Clone, Copy, Debug)]
struct Rate {
    at: i64,
    total: u64,
    per_second: Option<u64>,
}

#[derive(Default)]
struct Table {
    asked: Option<Instant>,
    running: bool,
    layers: HashMap<String, Layer>,
    rates: HashMap<String, Rate>,
}

/// The samples; cheap to clone.
#[derive(Clone)]
pub(super) struct Sampler {
    store: Store,
    containers: Containers,
    snapshots: Snapshots,
    /// Reads processor times, as (id, when, nanoseconds).
    times: Arc<dyn Fn() -> Vec<(String, i64, u64)> + Send + Sync>,
    table: Arc<Mutex<Table>>,
    wake: Arc<Notify>,
    measured: Arc<watch::Sender<()>>,
}

impl Sampler {
    pub(super) fn new(
        store: Store,
        containers: Containers,
        snapshots: Snapshots,
        times: impl Fn() -> Vec<(String, i64, u64)> + Send + Sync + 'static,
    ) -> Self {
        Sampler {
            store,
            containers,
            snapshots,
            times: Arc::new(times),
            table: Arc::default(),
            wake: Arc::default(),
            measured: Arc::default(),
        }
    }

    /// The writable layers of these containers, by their ids; those that have never been measured are missing.
    pub(super) async fn layers(&self, of: &[Arc<Container>]) -> HashMap<String, Layer> {
        let end = tokio::time::Instant::now() + PATIENCE;
        let mut measured = self.measured.subscribe();
        self.ask();
        loop {
            {
                let table = self.table.lock();
                let found: HashMap<_, _> = of
                    .iter()
                    .filter_map(|container| {
                        Some((container.id.clone(), table.layers.get(&container.id)?.clone()))
                    })
                    .collect();
                if found.len() == of.len() || tokio::time::Instant::now() >= end {
                    return found;
                }
            }
            self.wake.notify_one();
            // Either way the table says how it stands.
            let _ = tokio::time::timeout_at(end, measured.changed()).await;
        }
    }

    /// Notes that somebody wants samples, and begins to take them if nobody did lately.
    fn ask(&self) {
        let mut table = self.table.lock();
        table.asked = Some(Instant::now());
        if !std::mem::replace(&mut table.running, true) {
            drop(tokio::spawn(self.clone().run()));
        }
    }

    /// The rate of processor time in nanoseconds each second, by this sample and an earlier one, if there is any.
    pub(super) fn rate(&self, id: &str, at: i64, total: u64) -> Option<u64> {
        self.table.lock().rate(id, at, total)
    }

    async fn run(self) {
        loop {
            for container in self.due() {
                let layer = self.measure(&container).await;
                self.table.lock().layers.insert(container.id.clone(), layer);
                self.measured.send_replace(());
            }
            let times = self.times.clone();
            let times = crate::error::blocking(move || Ok(times())).await.unwrap_or_default();
            let known: HashSet<String> = {
                let containers = self.store.containers().into_iter().map(|container| container.id.clone());
                containers.chain(self.store.pods().into_iter().map(|pod| pod.id.clone())).collect()
            };
            {
                let mut table = self.table.lock();
                for (id, at, total) in times {
                    table.rate(&id, at, total);
                }
                table.layers.retain(|id, _| known.contains(id));
                table.rates.retain(|id, _| known.contains(id));
                if table.asked.is_none_or(|asked| asked.elapsed() > IDLE) {
                    *table = Table::default();
                    return;
                }
            }
            let _ = tokio::time::timeout(AGE, self.wake.notified()).await;
        }
    }

    /// The containers whose layers are to be measured now; first those that have never been.
    fn due(&self) -> Vec<Arc<Container>> {
        let table = self.table.lock();
        let mut due = self.store.containers();
        due.retain(|container| match container.stage() {
            ContainerStage::Making | ContainerStage::Removing => false,
            _ => table
                .layers
                .get(&container.id)
                .is_none_or(|layer| !layer.last && layer.measured.elapsed() >= AGE.max(layer.took * REST)),
        });
        due.sort_by_key(|container| table.layers.contains_key(&container.id));
        due
    }

    async fn measure(&self, container: &Container) -> Layer {
        // Before it is measured: what is written meanwhile by its last process is seen the next time.
        let last = container.stage() == ContainerStage::Exited;
        let begun = Instant::now();
        let (snapshotter, usage) = match self.usage(&container.id).await {
            Ok((snapshotter, usage)) => (snapshotter, Some(usage)),
            Err(error) => {
                tracing::debug!(id = %container.id, %error, "a container's writable layer could not be measured");
                (container.record().snapshotter.clone(), None)
            }
        };
        Layer { at: super::now(), snapshotter, usage, measured: Instant::now(), took: begun.elapsed(), last }
    }

    async fn usage(&self, id: &str) -> Result<(String, (u64, u64))> {
        let context = context()?;
        let container = self.containers.get(&context, id)?;
        let usage = self.snapshots.usage(&context, &container.snapshotter, &container.snapshot_key).await?;
        let natural = |number: i64| u64::try_from(number).unwrap_or(0);
        Ok((container.snapshotter, (natural(usage.size), natural(usage.inodes))))
    }
}

impl Table {
    fn rate(&mut self, id: &str, at: i64, total: u64) -> Option<u64> {
        let Some(rate) = self.rates.get_mut(id) else {
            self.rates.insert(id.to_owned(), Rate { at, total, per_second: None });
            return None;
        };
        if total < rate.total {
            // Another group of the same name: it has begun anew.
            *rate = Rate { at, total, per_second: None };
        } else if at - rate.at >= WINDOW {
            let used = u128::from(total - rate.total) * 1_000_000_000;
            let per_second = used / u128::from((at - rate.at).unsigned_abs());
            *rate = Rate { at, total, per_second: u64::try_from(per_second).ok() };
        }
        rate.per_second
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_rate_takes_two_samples_that_are_apart() {
        const S: i64 = 1_000_000_000;
        let mut table = Table::default();
        assert_eq!(table.rate("a", 10 * S, 500), None);
        assert_eq!(table.rate("a", 10 * S + S / 2, 600), None, "too soon");
        assert_eq!(table.rate("a", 12 * S, 500 + S as u64), Some(S as u64 / 2));
        assert_eq!(table.rate("a", 12 * S + 1, 501 + S as u64), Some(S as u64 / 2), "the last that is known");
        assert_eq!(table.rate("b", 12 * S, 1), None);
        assert_eq!(table.rate("a", 20 * S, 0), None, "it has begun anew");
        assert_eq!(table.rate("a", 22 * S, 10), Some(5));
    }
}
