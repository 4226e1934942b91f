//! The journal: events on disk, in the order in which subscribers got them, each with a number.
//!
//! ```text
//!  append --> queue --> writer thread: frames of all that wait, one write; one fdatasync when anyone waits for it, else
//!                       within LAZY; then the watermark goes up and those who wait are answered
//!
//!  segments   [1 ..] [3811 ..] [7702 ..]  <-- frames are appended to the newest; the oldest go whole
//!                        ^            ^
//!                     readers      watermark: numbers below are on disk, and readers see no others
//! ```
//!
//! Invariants:
//! - Numbers increase by one from frame to frame. None that a reader has seen is given again: what is seen is on disk, and
//!   where the newest segment is lost or damaged, numbers go on at a bound that was noted elsewhere when it was begun.
//! - Nothing is missing in silence. Where events could not be written there is a frame that says so, and an end that is not
//!   whole at the open is replaced by such frames; where frames are missing the reader says so.
//! - Readers have no queue. They read segments, so that one that is slow costs nothing, until what it reads has gone.
//! - A write that fails never fails a publisher. Events are lost to the journal, with one line in the log, until there is
//!   room again. The room for the frame that says so is taken with the segment.

use std::collections::VecDeque;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use parking_lot::Mutex;
use prost::Message as _;
use proto::containerd::types::Envelope;
use rustix::fs::FallocateFlags;
use tokio::sync::{oneshot, watch};

use super::segment::{HEAD, MAGIC, PAYLOAD_MAX, Parsed, Segment, parse, put_frame, scan};
use crate::error::{Error, Result, blocking};

/// How long an event may be in the file before it is synced, when nobody waits for it.
const LAZY: Duration = Duration::from_millis(20);
/// Between two tries to write again after one that failed.
const RETRY: Duration = Duration::from_secs(1);
/// The most bytes that wait for the writer.
const QUEUE_BYTES: usize = 64 << 20;
/// The most bytes that are written at once.
const GROUP_BYTES: usize = 1 << 20;
/// How many numbers a segment may have at most.
const SPAN: u64 = 1 << 16;
/// What is read of a segment at once.
const CHUNK: usize = 64 << 10;
/// The largest segment, but for one that holds a single larger event.
const SEGMENT_MAX: u64 = 4 << 20;

/// The journal, open.
pub(super) struct Journal {
    shared: Arc<Shared>,
    /// None once it closes.
    queue: Option<mpsc::Sender<Job>>,
    load: Arc<Load>,
    writer: Option<std::thread::JoinHandle<()>>,
}

struct Shared {
    segments: Mutex<VecDeque<Arc<Segment>>>,
    /// Every number below is on disk.
    next: watch::Sender<u64>,
    retention: u64,
}

/// What the queue holds.
#[derive(Default)]
struct Load {
    bytes: AtomicUsize,
    /// It was too much, and the writer has still to say so in the journal.
    lost: AtomicBool,
}

struct Job {
    what: What,
    /// Answered when all up to here is on disk, or known to be missing there.
    done: Option<oneshot::Sender<()>>,
}

enum What {
    Event(Vec<u8>),
    /// Events that had no room in the queue.
    Lost,
    Nothing,
}

/// Notes elsewhere, for good, that numbers below this one may be in use.
pub(super) type Reserve = Box<dyn FnMut(u64) -> Result<()> + Send>;

/// What is in the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Range {
    /// The first number there is; `next` when there is none.
    pub first: u64,
    /// The next number.
    pub next: u64,
    /// What it takes on disk.
    pub bytes: u64,
    /// What it may take.
    pub retention: u64,
}

/// One thing that a reader learns.
#[derive(Debug, Clone, PartialEq)]
pub enum Entry {
    /// An event and its number.
    Event(u64, Envelope),
    /// Events from the first number to before the second are not there.
    Gap(u64, u64),
}

/// One reader's way through the journal and along its end.
pub(super) struct Reader {
    shared: Arc<Shared>,
    watch: watch::Receiver<u64>,
    place: Place,
}

/// Where a reader is.
#[derive(Debug, Clone, Copy)]
struct Place {
    next: u64,
    /// A segment, by its first number, and the place of `next` in it.
    hint: Option<(u64, u64)>,
}

impl Journal {
    /// Opens the journal in `dir`, or makes it. `reserved` is what `reserve` noted last. `show` gets the payloads of the
    /// newest two segments. Blocks.
    pub(super) fn open(
        dir: &Path,
        retention: u64,
        reserved: u64,
        reserve: Reserve,
        mut show: impl FnMut(&[u8]),
    ) -> Result<Self> {
        sys::fs::create_dir_all(dir, 0o700).map_err(|error| Error::io("create folder", dir, &error))?;
        let mut firsts = numbers(dir).map_err(|error| Error::io("list", dir, &error))?;
        firsts.sort_unstable();
        let segment_bytes = (retention / 8).min(SEGMENT_MAX);
        let mut segments = VecDeque::new();
        let mut next = reserved.max(1);
        let mut active = None;
        let count = firsts.len();
        for (index, first) in firsts.into_iter().enumerate() {
            let segment = Arc::new(open_segment(dir, first)?);
            segments.push_back(segment.clone());
            if index + 2 < count {
                continue;
            }
            let bytes = fs::read(&segment.path)
                .map_err(|error| Error::io("read events in", &segment.path, &error))?;
            let (found, length) = scan(&bytes, first, &mut show);
            if index + 1 < count {
                continue;
            }
            // Noted when a segment is begun, before it has a frame.
            let noted = first.saturating_add(SPAN);
            if length == 0 {
                next = if noted > reserved { first } else { next.max(first) };
                segments.pop_back();
                remove(&segment.path);
                continue;
            }
            // If more is noted there was a later one, which has gone with its numbers.
            next = if noted >= reserved { found } else { next.max(found) };
            let settled = settle(&segment, found, &bytes[length..], length as u64);
            let (after, length) =
                settled.map_err(|error| Error::io("settle events in", &segment.path, &error))?;
            next = next.max(after);
            if noted == reserved {
                let taken = take_room(&segment.file, segment_bytes);
                let limit = if taken.is_ok() { segment_bytes } else { 0 };
                active = Some(Active { segment, written: length, synced: length, limit });
            }
        }
        let shared =
            Arc::new(Shared { segments: Mutex::new(segments), next: watch::Sender::new(next), retention });
        let load = Arc::new(Load::default());
        let writer = Writer {
            dir: dir.to_owned(),
            shared: shared.clone(),
            load: load.clone(),
            reserve,
            segment_bytes,
            active,
            buffer: Vec::new(),
            next,
            written: next,
            failing: None,
            told: false,
        };
        writer.drop_old(0);
        let (queue, jobs) = mpsc::channel();
        let thread = std::thread::Builder::new()
            .name("events".into())
            .spawn(move || writer.run(&jobs))
            .map_err(|error| Error::io("start the writer thread of", dir, &error))?;
        Ok(Journal { shared, queue: Some(queue), load, writer: Some(thread) })
    }

    /// Whether an event of this size can wait for the writer now; what is handed over by others is refused otherwise.
    pub(super) fn room_for(&self, bytes: usize) -> Result<()> {
        if bytes > PAYLOAD_MAX {
            return Err(Error::invalid_argument(format!(
                "an event of {bytes} bytes is too large; {PAYLOAD_MAX} bytes are the most"
            )));
        }
        if self.load.bytes.load(Ordering::Acquire) + bytes > QUEUE_BYTES {
            return Err(Error::unavailable(
                "the disk does not keep up with the events that wait for it; send this one again",
            ));
        }
        Ok(())
    }

    /// Puts an event behind those that wait. Never waits: when there are too many, it is lost to the journal, which says so.
    pub(super) fn append(&self, payload: Vec<u8>, done: Option<oneshot::Sender<()>>) {
        let what = if self.room_for(payload.len()).is_ok() {
            self.load.bytes.fetch_add(payload.len(), Ordering::AcqRel);
            What::Event(payload)
        } else if self.load.lost.swap(true, Ordering::AcqRel) {
            What::Nothing
        } else {
            What::Lost
        };
        self.send(Job { what, done });
    }

    /// Answers when all that was appended before is on disk, or known to be missing there.
    pub(super) fn mark(&self, done: Option<oneshot::Sender<()>>) {
        self.send(Job { what: What::Nothing, done });
    }

    fn send(&self, job: Job) {
        if !matches!((&job.what, &job.done), (What::Nothing, None))
            && let Some(queue) = &self.queue
        {
            // A failed send drops the job and with it the sender: who waits then hears of it.
            let _ = queue.send(job);
        }
    }

    /// What is in it.
    pub(super) fn range(&self) -> Range {
        let next = *self.shared.next.borrow();
        let segments = self.shared.segments.lock();
        Range {
            first: segments.front().map_or(next, |segment| segment.first.min(next)),
            next,
            bytes: segments.iter().map(|segment| segment.length.load(Ordering::Acquire)).sum(),
            retention: self.shared.retention,
        }
    }

    /// A reader from this number on; 0 for the oldest, None for what comes. OutOfRange for numbers that are still to come.
    pub(super) fn reader(&self, from: Option<u64>) -> Result<Reader> {
        let watch = self.shared.next.subscribe();
        let next = *watch.borrow();
        let from = match from {
            None => next,
            Some(0) => self.range().first,
            Some(from) if from > next => {
                return Err(Error::out_of_range(format!(
                    "no event has the number {from}: the next one gets {next}; is the number another engine's?"
                )));
            }
            Some(from) => from,
        };
        Ok(Reader { shared: self.shared.clone(), watch, place: Place { next: from, hint: None } })
    }
}

impl Drop for Journal {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(writer) = self.writer.take() {
            let _ = writer.join();
        }
    }
}

impl Reader {
    /// The next entries, of which `wanted` tells the events apart; none of them may be wanted. Waits at the end.
    pub(super) async fn next(
        &mut self,
        wanted: impl Fn(&Envelope) -> bool + Send + 'static,
    ) -> Result<Vec<Entry>> {
        let next = self.place.next;
        let end = self.watch.wait_for(|end| *end > next).await.map(|end| *end);
        let end = end.map_err(|_| Error::unavailable("the journal of events is closed"))?;
        let (shared, mut place) = (self.shared.clone(), self.place);
        let (place, entries) = blocking(move || {
            let mut entries = shared.read(&mut place, end);
            entries.retain(|entry| match entry {
                Entry::Event(_, envelope) => wanted(envelope),
                Entry::Gap(..) => true,
            });
            Ok((place, entries))
        })
        .await?;
        self.place = place;
        Ok(entries)
    }
}

impl Shared {
    /// Reads some of what is between the place and `end`, at least one number, and moves the place behind it. Blocks.
    fn read(&self, place: &mut Place, end: u64) -> Vec<Entry> {
        let mut entries = Vec::new();
        let (segment, follows) = {
            let segments = self.segments.lock();
            let after = segments.partition_point(|segment| segment.first <= place.next);
            let follows = segments.get(after).map_or(end, |segment| segment.first.min(end));
            (after.checked_sub(1).and_then(|at| segments.get(at).cloned()), follows)
        };
        let Some(segment) = segment else {
            push_gap(&mut entries, place.next, follows);
            place.next = follows;
            return entries;
        };
        let mut offset = match place.hint {
            Some((first, offset)) if first == segment.first => offset,
            _ => MAGIC.len() as u64,
        };
        let mut size = CHUNK;
        while entries.is_empty() && place.next < follows {
            let mut buffer = vec![0; size];
            let read = segment.read(&mut buffer, offset);
            let mut rest = &buffer[..*read.as_ref().unwrap_or(&0)];
            let whole = rest.len();
            let damaged = loop {
                if place.next == follows {
                    break false;
                }
                match parse(rest) {
                    Parsed::Frame { number, payload } if number <= place.next => {
                        rest = &rest[HEAD + payload.len()..];
                        if number == place.next {
                            push_entry(&mut entries, number, payload);
                            place.next += 1;
                        }
                    }
                    // There is more of it in the file; a long frame is then read at once.
                    Parsed::Partial(wanted) if whole == size => {
                        size = wanted.max(CHUNK);
                        break false;
                    }
                    _ => break true,
                }
            };
            offset += (whole - rest.len()) as u64;
            if damaged {
                if !segment.told.swap(true, Ordering::AcqRel) {
                    let error = read.err().map_or_else(|| "damaged".to_owned(), |error| error.to_string());
                    tracing::error!(
                        segment = %segment.path.display(), from = place.next, error,
                        "a part of the journal of events cannot be read and is set aside"
                    );
                }
                push_gap(&mut entries, place.next, follows);
                place.next = follows;
            }
        }
        place.hint = Some((segment.first, offset));
        entries
    }
}

fn push_entry(entries: &mut Vec<Entry>, number: u64, payload: &[u8]) {
    match Envelope::decode(payload) {
        Ok(envelope) if !payload.is_empty() => entries.push(Entry::Event(number, envelope)),
        Ok(_) => push_gap(entries, number, number + 1),
        Err(error) => {
            tracing::error!(%error, number, "an event in the journal cannot be decoded");
            push_gap(entries, number, number + 1);
        }
    }
}

/// Adds a gap, to the one before it if there is one.
fn push_gap(entries: &mut Vec<Entry>, from: u64, next: u64) {
    match entries.last_mut() {
        Some(Entry::Gap(_, end)) if *end == from => *end = next,
        _ => entries.push(Entry::Gap(from, next)),
    }
}

/// The writer thread's state.
struct Writer {
    dir: PathBuf,
    shared: Arc<Shared>,
    load: Arc<Load>,
    reserve: Reserve,
    segment_bytes: u64,
    /// Where frames are appended; None when a segment is to be begun.
    active: Option<Active>,
    /// Frames that are not written yet.
    buffer: Vec<u8>,
    /// The number of the next frame.
    next: u64,
    /// Numbers below are written.
    written: u64,
    /// While events are lost.
    failing: Option<Failing>,
    /// The log has a line of the failure; until something was synced again.
    told: bool,
}

struct Active {
    segment: Arc<Segment>,
    /// Bytes that are written.
    written: u64,
    /// Bytes that are on disk.
    synced: u64,
    /// What it may grow to, but for a frame that says that events are missing.
    limit: u64,
}

struct Failing {
    retry: Instant,
    /// The journal says so already.
    noted: bool,
    lost: u64,
}

impl Writer {
    fn run(mut self, jobs: &mpsc::Receiver<Job>) {
        let mut due: Option<Instant> = None;
        loop {
            let first = match due {
                Some(due) => jobs.recv_timeout(due.saturating_duration_since(Instant::now())),
                None => jobs.recv().map_err(|_| mpsc::RecvTimeoutError::Disconnected),
            };
            let mut waiting = Vec::new();
            match first {
                Ok(job) => self.group(job, jobs, &mut waiting),
                Err(mpsc::RecvTimeoutError::Timeout) => {}
                Err(mpsc::RecvTimeoutError::Disconnected) => return self.sync(),
            }
            if !waiting.is_empty() || due.is_some_and(|due| due <= Instant::now()) {
                self.sync();
            }
            due = if self.is_synced() { None } else { due.or_else(|| Some(Instant::now() + LAZY)) };
            for done in waiting {
                let _ = done.send(());
            }
        }
    }

    /// Writes what is queued; who waits for it.
    fn group(&mut self, first: Job, jobs: &mpsc::Receiver<Job>, waiting: &mut Vec<oneshot::Sender<()>>) {
        let mut next = Some(first);
        let mut bytes = 0;
        while let Some(job) = next.take() {
            match job.what {
                What::Event(payload) => {
                    self.append(&payload);
                    bytes += HEAD + payload.len();
                    self.load.bytes.fetch_sub(payload.len(), Ordering::AcqRel);
                }
                What::Lost => {
                    self.load.lost.store(false, Ordering::Release);
                    tracing::warn!(
                        "more events wait for the disk than there is room for; some are missing in the journal"
                    );
                    self.append(&[]);
                }
                What::Nothing => {}
            }
            waiting.extend(job.done);
            if bytes < GROUP_BYTES {
                next = jobs.try_recv().ok();
            }
        }
        self.flush();
    }

    /// Adds a frame to those that are to be written, or loses its event.
    fn append(&mut self, payload: &[u8]) {
        if self.recovers() {
            let size = (HEAD + payload.len()) as u64;
            let made = if self.fits(size) { Ok(()) } else { self.rotate(size) };
            match made {
                Ok(()) if self.failing.is_none() => return self.put(payload),
                // On the way there, what waited could not be written.
                Ok(()) => {}
                Err(error) => self.fail(&error),
            }
        }
        if let Some(failing) = &mut self.failing {
            failing.lost += 1;
        }
    }

    fn put(&mut self, payload: &[u8]) {
        put_frame(&mut self.buffer, self.next, payload);
        self.next += 1;
    }

    fn fits(&self, size: u64) -> bool {
        self.active.as_ref().is_some_and(|active| {
            active.written + self.buffer.len() as u64 + size <= active.limit
                // One is left for the frame that says that events are missing.
                && self.next + 1 < active.segment.first + SPAN
        })
    }

    /// Whether events can be written: as a rule, or now again.
    fn recovers(&mut self) -> bool {
        let Some(failing) = &self.failing else { return true };
        if Instant::now() < failing.retry {
            return false;
        }
        if let Err(error) = self.rotate(HEAD as u64) {
            self.fail(&error);
            return false;
        }
        if let Some(Failing { noted, lost, .. }) = self.failing.take() {
            if !noted {
                self.put(&[]);
            }
            tracing::info!(lost, "events are written to the journal again; some are missing in it");
        }
        true
    }

    /// From now on events are lost, until a later try.
    fn fail(&mut self, error: &Error) {
        if !self.told {
            self.told = true;
            tracing::warn!(%error, "events cannot be written to the journal; they go to those who listen, and are missing in it");
        }
        let (noted, lost) = match self.failing.take() {
            Some(failing) => (failing.noted, failing.lost),
            None => (self.note_loss().is_ok(), 0),
        };
        self.failing = Some(Failing { retry: Instant::now() + RETRY, noted, lost });
    }

    /// Writes the frame that says that events are missing, for which every segment has room.
    fn note_loss(&mut self) -> io::Result<()> {
        let Some(active) = &mut self.active else { return Err(io::ErrorKind::StorageFull.into()) };
        let mut frame = Vec::new();
        put_frame(&mut frame, self.next, &[]);
        active.write(&frame)?;
        self.next += 1;
        self.written = self.next;
        Ok(())
    }

    /// Writes the frames that wait.
    fn flush(&mut self) {
        let buffer = std::mem::take(&mut self.buffer);
        if buffer.is_empty() {
            return;
        }
        let Some(active) = &mut self.active else { return };
        match active.write(&buffer) {
            Ok(()) => {
                sys::failpoint!("events.journal.written");
                self.written = self.next;
            }
            Err(error) => {
                let error = Error::io("write events to", &active.segment.path, &error);
                let lost = self.next - self.written;
                self.next = self.written;
                self.fail(&error);
                if let Some(failing) = &mut self.failing {
                    failing.lost += lost;
                }
            }
        }
    }

    fn is_synced(&self) -> bool {
        self.next == *self.shared.next.borrow()
    }

    /// Puts on disk what has been appended, and lets readers see it.
    fn sync(&mut self) {
        self.flush();
        let Some(active) = &mut self.active else { return };
        if active.synced == active.written {
            return;
        }
        match active.segment.file.sync_data() {
            Ok(()) => {
                sys::failpoint!("events.journal.synced");
                active.synced = active.written;
                self.told &= self.failing.is_some();
                self.shared.next.send_replace(self.written);
            }
            Err(error) => {
                // What became of the bytes is not known, and they would pass for written at the next sync. Nobody has
                // seen their numbers.
                let error = Error::io("sync events in", &active.segment.path, &error);
                let synced = active.synced;
                let _ = active.segment.file.set_len(synced);
                active.segment.length.store(synced, Ordering::Release);
                self.active = None;
                let durable = *self.shared.next.borrow();
                let lost = self.written - durable;
                (self.next, self.written) = (durable, durable);
                self.failing = None;
                self.fail(&error);
                if let Some(failing) = &mut self.failing {
                    failing.lost += lost;
                }
            }
        }
    }

    /// Begins a segment that has room for a frame of this size.
    fn rotate(&mut self, size: u64) -> Result<()> {
        self.sync();
        if !self.is_synced() {
            return Err(Error::unavailable("the last segment of the journal could not be synced"));
        }
        let limit = self.segment_bytes.max(MAGIC.len() as u64 + size);
        if let Some(active) = &mut self.active
            && active.segment.first == self.next
        {
            // It has no frame yet: there is no number for another.
            let path = &active.segment.path;
            take_room(&active.segment.file, limit)
                .map_err(|error| Error::io("take room for", path, &error))?;
            active.limit = limit;
            return Ok(());
        }
        self.drop_old(limit);
        let path = self.dir.join(format!("{:020}", self.next));
        let segment = self.begin(&path, limit).inspect_err(|_| remove(&path))?;
        if let Some(active) = &self.active {
            // What was taken for it and not used.
            let _ = active.segment.file.set_len(active.written);
        }
        {
            let mut segments = self.shared.segments.lock();
            // One that could not be synced and has no frame: it was truncated.
            segments.retain(|segment| segment.first != self.next);
            segments.push_back(segment.clone());
        }
        let length = MAGIC.len() as u64;
        self.active = Some(Active { segment, written: length, synced: length, limit });
        self.drop_old(0);
        Ok(())
    }

    fn begin(&mut self, path: &Path, limit: u64) -> Result<Arc<Segment>> {
        let to_error = |error: io::Error| Error::io("begin the segment of events", path, &error);
        let mut options = OpenOptions::new();
        let file = options.read(true).write(true).create(true).truncate(true).mode(0o600).open(path);
        let file = file.map_err(to_error)?;
        take_room(&file, limit).map_err(to_error)?;
        file.write_all_at(MAGIC, 0).and_then(|()| file.sync_data()).map_err(to_error)?;
        sys::fs::sync_dir(&self.dir).map_err(to_error)?;
        (self.reserve)(self.next + SPAN)?;
        Ok(Arc::new(Segment {
            first: self.next,
            path: path.to_owned(),
            file,
            length: (MAGIC.len() as u64).into(),
            told: AtomicBool::new(false),
        }))
    }

    /// Drops the oldest segments until there is room for so much more. The newest stays.
    fn drop_old(&self, more: u64) {
        let mut segments = self.shared.segments.lock();
        let mut bytes: u64 = segments.iter().map(|segment| segment.length.load(Ordering::Acquire)).sum();
        let mut old = Vec::new();
        while segments.len() > 1
            && bytes + more > self.shared.retention
            && let Some(segment) = segments.pop_front()
        {
            bytes -= segment.length.load(Ordering::Acquire);
            old.push(segment);
        }
        drop(segments);
        for segment in old {
            remove(&segment.path);
        }
    }
}

impl Active {
    fn write(&mut self, frames: &[u8]) -> io::Result<()> {
        if let Err(error) = self.segment.file.write_all_at(frames, self.written) {
            // Whatever of it was written.
            let _ = self.segment.file.set_len(self.written);
            return Err(error);
        }
        self.written += frames.len() as u64;
        self.segment.length.store(self.written, Ordering::Release);
        Ok(())
    }
}

/// Puts frames that say that events are missing in the place of what is not whole at the end of a segment: a write that was
/// cut short or damage, of frames that a reader may have seen. Syncs it, as an earlier engine may not have got to that. The
/// number after the last, and the length.
fn settle(segment: &Segment, found: u64, rest: &[u8], length: u64) -> io::Result<(u64, u64)> {
    // There was not more than that in it, nor in any segment.
    let lost = (rest.len().div_ceil(HEAD) as u64).min((segment.first + SPAN).saturating_sub(found));
    let after = found + lost;
    let mut frames = Vec::new();
    for number in found..after {
        put_frame(&mut frames, number, &[]);
    }
    let length = length + frames.len() as u64;
    if !rest.is_empty() {
        tracing::warn!(
            segment = %segment.path.display(), from = found, bytes = rest.len(),
            "cut off the end of the journal of events, which was not whole"
        );
        segment.file.write_all_at(&frames, length - frames.len() as u64)?;
        segment.file.set_len(length)?;
    }
    segment.file.sync_data()?;
    segment.length.store(length, Ordering::Release);
    Ok((after, length))
}

/// Takes room on the disk for a segment that grows to `limit`, and for a frame behind it that says that events are missing:
/// it is to fit when nothing else does. Where the file system cannot do that, room is taken as it is written.
fn take_room(file: &File, limit: u64) -> io::Result<()> {
    match rustix::fs::fallocate(file, FallocateFlags::KEEP_SIZE, 0, limit + HEAD as u64) {
        Ok(()) | Err(rustix::io::Errno::OPNOTSUPP | rustix::io::Errno::NOSYS) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The first numbers of the segments in a folder.
fn numbers(dir: &Path) -> io::Result<Vec<u64>> {
    let mut numbers = Vec::new();
    for entry in fs::read_dir(dir)? {
        let name = entry?.file_name();
        let name = name.to_str().filter(|name| name.len() == 20 && name.bytes().all(|b| b.is_ascii_digit()));
        numbers.extend(name.and_then(|name| name.parse::<u64>().ok()));
    }
    Ok(numbers)
}

fn open_segment(dir: &Path, first: u64) -> Result<Segment> {
    let path = dir.join(format!("{first:020}"));
    let open = || {
        let file = File::options().read(true).write(true).open(&path)?;
        let length = file.metadata()?.len();
        io::Result::Ok((file, length))
    };
    let (file, length) = open().map_err(|error| Error::io("open events in", &path, &error))?;
    Ok(Segment { first, path, file, length: length.into(), told: AtomicBool::new(false) })
}

/// Removes a segment; one that stays goes with the next start.
fn remove(path: &Path) {
    if let Err(error) = fs::remove_file(path)
        && error.kind() != io::ErrorKind::NotFound
    {
        tracing::warn!(%error, path = %path.display(), "a segment of the journal of events stays");
    }
}

#[cfg(test)]
mod tests;
