//! Reading ahead: a stream is decompressed on a thread of its own while what came of it is hashed and unpacked here.
//!
//! ```text
//!  thread: stream --read--> buffer --full--> [bounded queue] --> hash, limit, BufRead
//!                              ^----------- empty -------------------'
//! ```
//!
//! Invariants: so many buffers, and no more, are ever made. What was read ahead is hashed once, in order. Who gives up reading
//! leaves the thread to end with its next read.

use std::io::{self, BufRead, Read};
use std::sync::mpsc::{Receiver, Sender, SyncSender, channel, sync_channel};

use oci::digest::{Algorithm, Hasher};

/// Bytes in one buffer: as much as stays in the processor's caches.
const BUFFER: usize = 128 * 1024;
/// Full buffers that wait.
const AHEAD: usize = 2;

/// A stream that is read ahead, counted and hashed.
pub(super) struct Ahead {
    full: Receiver<io::Result<Vec<u8>>>,
    empty: Sender<Vec<u8>>,
    current: Vec<u8>,
    at: usize,
    ended: bool,
    limit: u64,
    hasher: Hasher,
    /// Bytes so far.
    pub(super) size: u64,
}

impl Ahead {
    /// Begins to read. Longer than `limit` bytes the stream must not be.
    pub(super) fn new(stream: impl Read + Send + 'static, limit: u64) -> io::Result<Self> {
        let (full_in, full) = sync_channel(AHEAD);
        let (empty, empty_out) = channel();
        std::thread::Builder::new()
            .name("decompress".into())
            .spawn(move || read_ahead(stream, &full_in, &empty_out))?;
        let hasher = Algorithm::Sha256.hasher();
        Ok(Ahead { full, empty, current: Vec::new(), at: 0, ended: false, limit, hasher, size: 0 })
    }

    /// The digest of all that was read.
    pub(super) fn digest(self) -> oci::Digest {
        self.hasher.finish()
    }

    fn advance(&mut self) -> io::Result<()> {
        let next = self.full.recv().map_err(|_| io::Error::other("the decompression ended abnormally"))??;
        self.hasher.update(&next);
        self.size += next.len() as u64;
        self.ended = next.is_empty();
        if self.size > self.limit {
            return Err(io::Error::new(
                io::ErrorKind::InvalidData,
                format!(
                    "it is more than {} bytes long when uncompressed, which is too much for its size",
                    self.limit
                ),
            ));
        }
        // The thread may have ended.
        let _ = self.empty.send(std::mem::replace(&mut self.current, next));
        self.at = 0;
        Ok(())
    }
}

impl BufRead for Ahead {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        if self.at == self.current.len() && !self.ended {
            self.advance()?;
        }
        Ok(&self.current[self.at..])
    }

    fn consume(&mut self, count: usize) {
        self.at = (self.at + count).min(self.current.len());
    }
}

impl Read for Ahead {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.fill_buf()?.read(buffer)?;
        self.consume(count);
        Ok(count)
    }
}

/// Sends what the stream has, an empty buffer at its end, and nothing after an error.
fn read_ahead(mut stream: impl Read, full: &SyncSender<io::Result<Vec<u8>>>, empty: &Receiver<Vec<u8>>) {
    loop {
        let mut buffer = empty.try_recv().unwrap_or_default();
        buffer.resize(BUFFER, 0);
        let (filled, failed) = fill(&mut stream, &mut buffer);
        buffer.truncate(filled);
        if (filled > 0 || failed.is_none()) && full.send(Ok(buffer)).is_err() {
            return;
        }
        if let Some(error) = failed {
            let _ = full.send(Err(error));
            return;
        }
        if filled == 0 {
            return;
        }
    }
}

/// Reads until `buffer` is full or the source ends; a decoder may not say twice why it failed.
fn fill(source: &mut impl Read, buffer: &mut [u8]) -> (usize, Option<io::Error>) {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return (filled, Some(error)),
        }
    }
    (filled, None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_of_a_stream_comes_through_in_order_and_is_hashed() {
        for length in [0, 1, BUFFER - 1, BUFFER, BUFFER * 9 + 7] {
            let bytes: Vec<u8> = (0..length).map(|at| (at * 7 + at / 251) as u8).collect();
            let mut ahead = Ahead::new(io::Cursor::new(bytes.clone()), u64::MAX).unwrap();
            let mut read = Vec::new();
            ahead.read_to_end(&mut read).unwrap();
            assert!(read == bytes && ahead.read(&mut [0]).unwrap() == 0);
            assert_eq!(ahead.size, length as u64);
            assert_eq!(ahead.digest(), oci::Digest::sha256_of(&bytes));
        }
    }

    #[test]
    fn what_is_longer_than_its_limit_is_an_error() {
        let mut ahead = Ahead::new(io::repeat(0), BUFFER as u64 * 4).unwrap();
        let error = io::copy(&mut ahead, &mut io::sink()).unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::InvalidData);
    }

    #[test]
    fn an_error_comes_after_what_was_read_before_it() {
        struct Fails;
        impl Read for Fails {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::ErrorKind::ConnectionReset.into())
            }
        }
        let mut ahead = Ahead::new(io::repeat(1).take(BUFFER as u64).chain(Fails), u64::MAX).unwrap();
        let mut read = Vec::new();
        assert_eq!(ahead.read_to_end(&mut read).unwrap_err().kind(), io::ErrorKind::ConnectionReset);
        assert_eq!(read.len(), BUFFER);
    }
}
