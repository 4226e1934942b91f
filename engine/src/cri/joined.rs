//! What is under way: who asks for the same again joins it, and who wants another thing of the same object waits.
//!
//! Invariants: an operation goes on when its callers have gone. Once it has ended, the next caller begins a new one. A
//! [`Turns`] holds no data, only order.

use std::collections::HashMap;
use std::future::Future;
use std::hash::Hash;
use std::sync::{Arc, Weak};

use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use parking_lot::Mutex;
use tokio::sync::OwnedMutexGuard;
use tracing::Instrument as _;

use crate::error::Result;

type Operation<T> = Shared<BoxFuture<'static, Result<T>>>;

/// Operations under way, by what makes two of them the same.
pub struct Joined<K, T: Clone> {
    under_way: Arc<Mutex<HashMap<K, Operation<T>>>>,
}

impl<K, T: Clone> Default for Joined<K, T> {
    fn default() -> Self {
        Joined { under_way: Arc::default() }
    }
}

impl<K, T> Joined<K, T>
where
    K: Clone + Eq + Hash + Send + Sync + 'static,
    T: Clone + Send + Sync + 'static,
{
    /// Joins the operation of this key, or begins it.
    pub async fn join<F>(&self, key: K, begin: impl FnOnce() -> F) -> Result<T>
    where
        F: Future<Output = Result<T>> + Send + 'static,
    {
        let operation = {
            let mut under_way = self.under_way.lock();
            match under_way.get(&key) {
                Some(operation) => operation.clone(),
                None => {
                    let (work, ended, all) = (begin(), key.clone(), self.under_way.clone());
                    let work = async move {
                        let _ended = Ended { key: ended, all };
                        work.await
                    };
                    // Spawned at once: the one who asked may be gone before it is polled.
                    let spawned = tokio::spawn(work.in_current_span()).map(|done| -> Result<T> { done? });
                    let operation = spawned.boxed().shared();
                    under_way.insert(key, operation.clone());
                    operation
                }
            }
        };
        operation.await
    }
}

/// Makes room for the next, however the operation ends.
struct Ended<K: Eq + Hash, T: Clone> {
    key: K,
    all: Arc<Mutex<HashMap<K, Operation<T>>>>,
}

impl<K: Eq + Hash, T: Clone> Drop for Ended<K, T> {
    fn drop(&mut self) {
        self.all.lock().remove(&self.key);
    }
}

/// One at a time for each object.
#[derive(Debug, Default)]
pub struct Turns {
    of: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

impl Turns {
    /// Waits until it is our turn with this object.
    pub async fn of(&self, id: &str) -> OwnedMutexGuard<()> {
        let turn = {
            let mut of = self.of.lock();
            of.retain(|_, turn| turn.strong_count() > 0);
            of.get(id).and_then(Weak::upgrade).unwrap_or_else(|| {
                let turn = Arc::default();
                of.insert(id.to_owned(), Arc::downgrade(&turn));
                turn
            })
        };
        turn.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::error::Error;
    use std::sync::atomic::{AtomicU32, Ordering};

    #[tokio::test]
    async fn the_same_is_joined_and_begun_anew_afterwards() {
        let (joined, begun) = (Joined::<u8, u32>::default(), Arc::new(AtomicU32::new(0)));
        let (go, gate) = tokio::sync::watch::channel(false);
        let operation = || {
            let (begun, mut gate) = (begun.clone(), gate.clone());
            async move {
                let count = begun.fetch_add(1, Ordering::Relaxed);
                let _ = gate.wait_for(|open| *open).await;
                if count == 1 { Err(Error::unknown("second")) } else { Ok(count) }
            }
        };
        {
            // One who gives up does not end it.
            let given_up = joined.join(1, operation);
            futures::pin_mut!(given_up);
            assert!(futures::poll!(given_up).is_pending());
        }
        let (a, b) = (joined.join(1, operation), joined.join(1, operation));
        let opened = async { go.send_replace(true) };
        let (a, b, _) = tokio::join!(a, b, opened);
        assert_eq!((a, b), (Ok(0), Ok(0)));
        assert!(joined.join(1, operation).await.is_err());
        assert_eq!(joined.join(1, operation).await, Ok(2));
        assert!(joined.under_way.lock().is_empty());
    }

    #[tokio::test]
    async fn turns_are_taken_one_after_the_other() {
        let turns = Turns::default();
        let first = turns.of("a").await;
        let second = turns.of("a");
        futures::pin_mut!(second);
        assert!(futures::poll!(second.as_mut()).is_pending());
        drop(turns.of("b").await);
        drop(first);
        drop(second.await);
        drop(turns.of("b").await);
        assert_eq!(turns.of.lock().len(), 1);
    }
}
