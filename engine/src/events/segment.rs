//! One file of the journal: its form, and what is whole in it.
//!
//! ```text
//! <root>/events/NUMBER   "gantry events 1\n"  frame  frame ...       NUMBER: of the first frame, 20 digits
//! frame                  length of the payload u32 LE | CRC-32 of what follows u32 LE | number u64 LE | payload
//! payload                an Envelope; empty: events are missing here
//! ```
//!
//! Invariant: the numbers of a segment's frames begin with the segment's and have no holes. Whatever breaks that is damage.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicU64};

/// How a segment begins.
pub(super) const MAGIC: &[u8] = b"gantry events 1\n";
/// What a frame has before its payload.
pub(super) const HEAD: usize = 16;
/// The longest payload, in bytes: what a gRPC message may be, unless that is set higher.
pub(super) const PAYLOAD_MAX: usize = 16 << 20;

/// A segment that is open.
pub(super) struct Segment {
    /// The number of its first frame.
    pub(super) first: u64,
    pub(super) path: PathBuf,
    pub(super) file: File,
    /// Its bytes.
    pub(super) length: AtomicU64,
    /// Whether the log has a line of its damage.
    pub(super) told: AtomicBool,
}

/// What stands at the beginning of some bytes.
pub(super) enum Parsed<'a> {
    Frame {
        number: u64,
        payload: &'a [u8],
    },
    /// Perhaps a frame, of which there are to be so many bytes.
    Partial(usize),
    Bad,
}

/// Appends a frame.
pub(super) fn put_frame(bytes: &mut Vec<u8>, number: u64, payload: &[u8]) {
    let mut hash = crc32fast::Hasher::new();
    hash.update(&number.to_le_bytes());
    hash.update(payload);
    // Callers keep to PAYLOAD_MAX.
    bytes.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    bytes.extend_from_slice(&hash.finalize().to_le_bytes());
    bytes.extend_from_slice(&number.to_le_bytes());
    bytes.extend_from_slice(payload);
}

/// Reads the frame at the beginning of these bytes.
pub(super) fn parse(bytes: &[u8]) -> Parsed<'_> {
    let Some((head, rest)) = bytes.split_first_chunk::<HEAD>() else { return Parsed::Partial(HEAD) };
    let [a, b, c, d, e, f, g, h, number @ ..] = *head;
    let length = u32::from_le_bytes([a, b, c, d]) as usize;
    if length > PAYLOAD_MAX {
        return Parsed::Bad;
    }
    let Some(payload) = rest.get(..length) else { return Parsed::Partial(HEAD + length) };
    let mut hash = crc32fast::Hasher::new();
    hash.update(&number);
    hash.update(payload);
    if hash.finalize() != u32::from_le_bytes([e, f, g, h]) {
        return Parsed::Bad;
    }
    Parsed::Frame { number: u64::from_le_bytes(number), payload }
}

/// Looks through a segment's bytes, and shows each payload of its whole beginning: the number after it, and its length in
/// bytes, which is 0 when not even the first line is there.
pub(super) fn scan(bytes: &[u8], first: u64, mut show: impl FnMut(&[u8])) -> (u64, usize) {
    if !bytes.starts_with(MAGIC) {
        return (first, 0);
    }
    let (mut next, mut at) = (first, MAGIC.len());
    while let Parsed::Frame { number, payload } = parse(&bytes[at..])
        && number == next
    {
        show(payload);
        at += HEAD + payload.len();
        next += 1;
    }
    (next, at)
}

impl Segment {
    /// Reads up to `buffer.len()` bytes at `offset`; how many there were.
    pub(super) fn read(&self, buffer: &mut [u8], offset: u64) -> io::Result<usize> {
        let mut read = 0;
        while read < buffer.len() {
            match self.file.read_at(&mut buffer[read..], offset + read as u64) {
                Ok(0) => break,
                Ok(count) => read += count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(error),
            }
        }
        Ok(read)
    }
}
