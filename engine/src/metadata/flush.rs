//! Flushes of sled 0.34 that come to an end when their writes fail.
//!
//! ```text
//! flush:  seal the buffer -> wait until it is written <----------------- nobody wakes it
//! sled's thread:                write -> fails -> note the error
//! watcher:                          a flush takes longer than STALL -> another flush: it finds the note, and wakes all
//! ```
//!
//! Invariant: a flush ends when its writes have, well or not, at the latest after twice as long as they took.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::{self, JoinHandle};
use std::time::Duration;

/// A flush that takes longer may be one that nobody wakes, or the disk is slow.
const STALL: Duration = Duration::from_millis(500);

/// Flushes one database.
pub(super) struct Flusher {
    state: Arc<State>,
    watcher: Option<JoinHandle<()>>,
}

#[derive(Default)]
struct State {
    /// How often a flush has begun or ended: odd while one is under way.
    turns: AtomicU64,
    /// Whether the watcher sleeps until there is a flush.
    sleeps: AtomicBool,
    closed: AtomicBool,
}

impl Flusher {
    /// That of this database, which it keeps open until it is dropped.
    pub(super) fn of(db: &sled::Db) -> std::io::Result<Self> {
        let state = Arc::new(State::default());
        let watcher = thread::Builder::new().name("metadata-flush".into()).spawn({
            let (db, state) = (db.clone(), state.clone());
            move || watch(&db, &state)
        })?;
        Ok(Flusher { state, watcher: Some(watcher) })
    }

    /// Gives to the kernel whatever was written. One at a time.
    pub(super) fn flush(&self, db: &sled::Db) -> sled::Result<()> {
        self.state.turns.fetch_add(1, Ordering::SeqCst);
        if self.state.sleeps.swap(false, Ordering::SeqCst) {
            self.wake();
        }
        let flushed = db.flush();
        self.state.turns.fetch_add(1, Ordering::SeqCst);
        flushed.map(drop)
    }

    fn wake(&self) {
        if let Some(watcher) = &self.watcher {
            watcher.thread().unpark();
        }
    }
}

impl Drop for Flusher {
    fn drop(&mut self) {
        self.state.closed.store(true, Ordering::SeqCst);
        self.wake();
        if let Some(watcher) = self.watcher.take() {
            let _ = watcher.join();
        }
    }
}

fn watch(db: &sled::Db, state: &State) {
    let mut others: Vec<JoinHandle<()>> = Vec::new();
    let mut seen = 0;
    let mut wait = STALL;
    while !state.closed.load(Ordering::SeqCst) {
        if seen % 2 == 0 {
            state.sleeps.store(true, Ordering::SeqCst);
            if state.turns.load(Ordering::SeqCst) == seen {
                thread::park();
            }
        } else {
            thread::park_timeout(wait);
        }
        let now = state.turns.load(Ordering::SeqCst);
        if now != seen {
            (seen, wait) = (now, STALL);
        } else if now % 2 == 1 {
            // In a thread of its own: where no error is noted yet, it waits as well.
            let db = db.clone();
            others
                .extend(thread::Builder::new().name("metadata-wake".into()).spawn(move || drop(db.flush())));
            // On a disk that is merely slow there are not to be many of them.
            wait *= 2;
        }
        others.retain(|other| !other.is_finished());
    }
    // The flush that they joined has ended, and so do they.
    for other in others {
        let _ = other.join();
    }
}
