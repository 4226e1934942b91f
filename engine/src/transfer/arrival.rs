//! A blob on its way: written by one, and read by any number of others as it grows.
//!
//! ```text
//!  download --write--> ingest's file --(page cache)--> pread --> decompressed, hashed, unpacked
//!           --grow---> length, end   --(condvar)-----> a reader that has read all so far waits
//! ```
//!
//! Invariants: a reader never sees a byte that was not written, and no end before the blob's. It holds no bytes: what it is
//! behind is in the file. Whoever waits is woken by the end, whatever it is. The file is open, so that a name that goes
//! when the ingest becomes a blob matters to nobody.

use std::fs::File;
use std::io::{self, Read};
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use parking_lot::{Condvar, Mutex};
use tokio::sync::watch;

use super::given_up;
use crate::error::{Error, Result};

/// A blob, from before its first byte is there.
pub(super) struct Arrival {
    growth: watch::Sender<Option<Result<Arc<Growth>>>>,
}

/// A blob's file, and how much of it is there.
pub(super) struct Growth {
    file: File,
    state: Mutex<State>,
    changed: Condvar,
}

struct State {
    length: u64,
    end: Option<Result<()>>,
}

/// Reads a blob from its beginning, as far as it has come, and waits for the rest.
pub(super) struct Growing {
    growth: Arc<Growth>,
    at: u64,
    /// How far it is, for others to see.
    seen: Arc<AtomicU64>,
}

impl Arrival {
    /// One of which nothing is known yet.
    pub(super) fn new() -> Self {
        Arrival { growth: watch::Sender::new(None) }
    }

    /// There is a file now.
    pub(super) fn begin(&self, growth: Arc<Growth>) {
        self.growth.send_replace(Some(Ok(growth)));
    }

    /// There is none, or no more of it.
    pub(super) fn fail(&self, error: &Error) {
        self.growth.send_modify(|growth| match growth {
            Some(Ok(growth)) => growth.end(Err(error.clone())),
            _ => *growth = Some(Err(error.clone())),
        });
    }

    /// Waits for the file. `seen` is told how far the reader is.
    pub(super) async fn reader(&self, seen: Arc<AtomicU64>) -> Result<Growing> {
        let mut growth = self.growth.subscribe();
        let begun = growth.wait_for(Option::is_some).await.map_err(|_| given_up())?;
        match begun.as_ref() {
            Some(Ok(growth)) => Ok(Growing { growth: growth.clone(), at: 0, seen }),
            Some(Err(error)) => Err(error.clone()),
            None => Err(given_up()),
        }
    }
}

impl Growth {
    /// A file of which so many bytes are there.
    pub(super) fn new(file: File, length: u64) -> Arc<Self> {
        let state = Mutex::new(State { length, end: None });
        Arc::new(Growth { file, state, changed: Condvar::new() })
    }

    /// A file that is whole.
    pub(super) fn whole(file: File, length: u64) -> Arc<Self> {
        let growth = Growth::new(file, length);
        growth.end(Ok(()));
        growth
    }

    /// So many bytes are there now.
    pub(super) fn grow(&self, length: u64) {
        self.state.lock().length = length;
        self.changed.notify_all();
    }

    /// No more come: all are there, or will never be. The first end counts.
    pub(super) fn end(&self, end: Result<()>) {
        self.state.lock().end.get_or_insert(end);
        self.changed.notify_all();
    }

    /// Waits until there is more than `at`; how much, which is `at` at the end.
    fn beyond(&self, at: u64) -> Result<u64> {
        let mut state = self.state.lock();
        loop {
            match &state.end {
                Some(Err(error)) => return Err(error.clone()),
                _ if state.length > at => return Ok(state.length),
                Some(Ok(())) => return Ok(at),
                None => self.changed.wait(&mut state),
            }
        }
    }
}

impl Read for Growing {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let there = self.growth.beyond(self.at).map_err(io::Error::other)? - self.at;
        let want = usize::try_from(there).map_or(buffer.len(), |there| there.min(buffer.len()));
        if want == 0 {
            return Ok(0);
        }
        let count = self.growth.file.read_at(&mut buffer[..want], self.at)?;
        if count == 0 {
            return Err(io::Error::new(
                io::ErrorKind::UnexpectedEof,
                "the blob's file is shorter than it was",
            ));
        }
        self.at += count as u64;
        self.seen.store(self.at, Ordering::Relaxed);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;

    use proptest::prelude::*;

    use super::*;

    fn reader(growth: &Arc<Growth>) -> Growing {
        Growing { growth: growth.clone(), at: 0, seen: Arc::default() }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(32))]
        /// However the bytes come, every reader gets all of them, whenever it begins.
        #[test]
        fn readers_get_what_is_written(pieces in prop::collection::vec(1..5000_usize, 0..30), ahead in 0..30_usize) {
            let mut file = tempfile::tempfile().unwrap();
            let bytes: Vec<u8> = (0..pieces.iter().sum::<usize>()).map(|at| (at * 31 + at / 253) as u8).collect();
            let growth = Growth::new(file.try_clone().unwrap(), 0);
            let mut written = 0;
            let mut readers = Vec::new();
            for (number, piece) in pieces.iter().enumerate() {
                if number == ahead || number == 0 {
                    let mut reader = reader(&growth);
                    readers.push(std::thread::spawn(move || {
                        let mut read = Vec::new();
                        reader.read_to_end(&mut read).map(|_| read)
                    }));
                }
                file.write_all(&bytes[written..written + piece]).unwrap();
                written += piece;
                growth.grow(written as u64);
            }
            growth.end(Ok(()));
            for reader in readers {
                prop_assert!(reader.join().unwrap().unwrap() == bytes);
            }
            let mut late = Vec::new();
            reader(&growth).read_to_end(&mut late).unwrap();
            prop_assert!(late == bytes);
        }
    }

    #[tokio::test]
    async fn a_failed_download_is_what_its_readers_see() {
        let arrival = Arc::new(Arrival::new());
        let waiting = tokio::spawn({
            let arrival = arrival.clone();
            async move { arrival.reader(Arc::default()).await.map(drop) }
        });
        tokio::task::yield_now().await;
        let growth = Growth::new(tempfile::tempfile().unwrap(), 0);
        arrival.begin(growth);
        waiting.await.unwrap().unwrap();
        let mut reader = arrival.reader(Arc::default()).await.unwrap();
        let reading = tokio::task::spawn_blocking(move || reader.read(&mut [0; 8]));
        arrival.fail(&Error::unavailable("cut off"));
        let error = reading.await.unwrap().unwrap_err();
        assert_eq!(
            error.get_ref().and_then(|error| error.downcast_ref::<Error>()),
            Some(&Error::unavailable("cut off"))
        );
        let never = Arrival::new();
        never.fail(&Error::unavailable("none"));
        assert!(never.reader(Arc::default()).await.is_err());
    }
}
