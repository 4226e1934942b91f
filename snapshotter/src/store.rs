//! The records of a snapshotter: key, parent, kind, labels, usage, and the number of its folder.
//!
//! An append-only journal beside the snapshots, with everything in memory as well:
//!
//! ```text
//! <root>/journal    "gantry snapshots 1\n"  frame  frame ...
//! frame             length u32 LE | CRC-32 of the payload u32 LE | payload: JSON list of changes
//! change            {"Put":["key",{record}]}  |  {"Delete":"key"}
//! <root>/lock       held while a process has the store open
//! ```
//!
//! Invariants: the changes of one frame happen together or not at all. A change is answered after its frame is on disk;
//! changes that come together share one sync. A change whose sync failed is in memory, and on disk or not: whoever asks
//! for it here sees it, and nothing more is written. A frame that a crash cut short is cut off at the next open: it was
//! never answered. A bad frame before a good one is damage, and the journal is not opened: what it would be without its
//! damaged part is not what it was. When most of the journal is past, it is written anew beside the old one and renamed
//! over it.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::fs::{self, File, OpenOptions};
use std::io::{self, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use parking_lot::Mutex;
use rustix::fs::FallocateFlags;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use crate::{Commit, Error, Info, Kind, Labels, Result, Usage, io};

const MAGIC: &[u8] = b"gantry snapshots 1\n";
/// A longer frame is damage: labels are limited far below.
const FRAME_MAX: usize = 16 << 20;
/// So much is taken on the disk behind the journal's end, for removals to be recorded on a full disk.
const ROOM: u64 = 256 << 10;
/// The journal is not written anew below this size, in bytes.
const COMPACT_MIN: u64 = 1 << 20;
/// How long our own lock may outlive its file: a program that is being started has copies of all files until its exec.
const FORK_LIMIT: Duration = Duration::from_secs(2);

/// What is stored of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Record {
    /// The number of its folder, unique among the living.
    pub(crate) id: u64,
    pub(crate) kind: Kind,
    pub(crate) parent: String,
    pub(crate) labels: Labels,
    created: u64,
    updated: u64,
    size: i64,
    inodes: i64,
}

#[derive(Debug, Serialize, Deserialize)]
enum Change {
    Put(String, Record),
    Delete(String),
}

pub(crate) struct Store {
    root: PathBuf,
    state: Mutex<State>,
    synced: Mutex<u64>,
    _lock: File,
}

struct State {
    records: BTreeMap<String, Record>,
    /// How many records name each parent.
    children: HashMap<String, usize>,
    next_id: u64,
    /// Folders that are being made and have no record yet.
    making: BTreeSet<u64>,
    journal: File,
    length: u64,
    /// Up to where the disk has room for it; 0 where that cannot be had.
    room: u64,
    /// Bytes of frames that the records now in memory would take.
    live: u64,
    /// Counts frames, across rewrites of the journal.
    sequence: u64,
    /// Set when what is on disk may not be what is in memory; nothing is written after that.
    broken: Option<String>,
}

impl Record {
    pub(crate) fn info(&self, key: &str) -> Info {
        let time = |nanoseconds| UNIX_EPOCH + Duration::from_nanos(nanoseconds);
        Info {
            key: key.to_owned(),
            kind: self.kind,
            parent: self.parent.clone(),
            labels: self.labels.clone(),
            created: time(self.created),
            updated: time(self.updated),
        }
    }

    pub(crate) fn usage(&self) -> Usage {
        Usage { size: self.size, inodes: self.inodes }
    }
}

fn now() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_nanos() as u64)
}

impl State {
    fn apply(&mut self, change: Change) {
        let count = |children: &mut HashMap<String, usize>, parent: &str, up: bool| {
            if parent.is_empty() {
                return;
            }
            let children_of = children.entry(parent.to_owned()).or_default();
            *children_of = if up { *children_of + 1 } else { children_of.saturating_sub(1) };
            if *children_of == 0 {
                children.remove(parent);
            }
        };
        let size = |key: &str, record: &Record| {
            (key.len() + record.parent.len() + 200) as u64
                + record.labels.iter().map(|(k, v)| k.len() + v.len() + 6).sum::<usize>() as u64
        };
        let (key, new) = match change {
            Change::Put(key, record) => (key, Some(record)),
            Change::Delete(key) => (key, None),
        };
        if let Some(old) = self.records.remove(&key) {
            count(&mut self.children, &old.parent, false);
            self.live = self.live.saturating_sub(size(&key, &old));
        }
        if let Some(record) = new {
            count(&mut self.children, &record.parent, true);
            self.next_id = self.next_id.max(record.id + 1);
            self.live += size(&key, &record);
            self.records.insert(key, record);
        }
    }

    /// Refuses when what is in memory may not be what is on disk.
    fn check_whole(&self, root: &Path) -> Result<()> {
        match &self.broken {
            None => Ok(()),
            Some(why) => Err(Error::FailedPrecondition(format!(
                "the snapshots in {} cannot change after a failed write ({why}); restart gantryd",
                root.display()
            ))),
        }
    }

    /// Takes room behind the journal's end, whose length stays; an error when the disk is full.
    fn take_room(&mut self) -> io::Result<()> {
        match rustix::fs::fallocate(&self.journal, FallocateFlags::KEEP_SIZE, self.length, ROOM) {
            Ok(()) => self.room = self.length + ROOM,
            Err(error @ (Errno::NOSPC | Errno::DQUOT)) => return Err(error.into()),
            // There is none to be had, full or not.
            Err(_) => {}
        }
        Ok(())
    }

    /// Appends one frame and applies it; the number to sync up to. On a failed write the journal is as before.
    fn write(&mut self, root: &Path, changes: Vec<Change>) -> Result<u64> {
        let frame = encode(&changes).map_err(io("encode a record for", root))?;
        let removes = changes.iter().any(|change| matches!(change, Change::Delete(_)));
        if self.length + frame.len() as u64 + ROOM / 2 > self.room
            && let Err(error) = self.take_room()
            && !removes
        {
            // The rest is for those that give space back.
            return Err(io("take room for the journal in", root)(error));
        }
        if let Err(error) = self.journal.write_all(&frame) {
            let restored =
                self.journal.set_len(self.length).and_then(|()| self.journal.seek(SeekFrom::End(0)));
            if let Err(again) = restored {
                self.broken = Some(format!("{error}; {again}"));
            }
            return Err(io("write the journal in", root)(error));
        }
        self.length += frame.len() as u64;
        self.sequence += 1;
        changes.into_iter().for_each(|change| self.apply(change));
        Ok(self.sequence)
    }
}

fn encode(changes: &[Change]) -> io::Result<Vec<u8>> {
    let payload = serde_json::to_vec(changes)?;
    if payload.len() > FRAME_MAX {
        return Err(io::Error::new(io::ErrorKind::InvalidInput, "the labels are too long"));
    }
    let mut frame = Vec::with_capacity(payload.len() + 8);
    frame.extend_from_slice(&(payload.len() as u32).to_le_bytes());
    frame.extend_from_slice(&crc32fast::hash(&payload).to_le_bytes());
    frame.extend_from_slice(&payload);
    Ok(frame)
}

/// The first frame of `bytes`: its changes and its length. None where the frame is torn.
fn decode(bytes: &[u8]) -> Option<(Vec<Change>, usize)> {
    let word = |at: usize| bytes.get(at..at + 4)?.try_into().ok().map(u32::from_le_bytes);
    let (length, sum) = (word(0)? as usize, word(4)?);
    if length > FRAME_MAX {
        return None;
    }
    let payload = bytes.get(8..8 + length)?;
    (crc32fast::hash(payload) == sum).then_some(())?;
    Some((serde_json::from_slice(payload).ok()?, 8 + length))
}

/// Whether a whole frame begins anywhere in `bytes`. Text, as payloads are, is no length that a frame may have, so that
/// few places are looked at closely.
fn any_frame(bytes: &[u8]) -> bool {
    (0..bytes.len()).any(|at| decode(&bytes[at..]).is_some())
}

/// The records in `root`, of which nothing is changed, and how many bytes a crash left half written behind them; None where
/// there is no journal.
pub(crate) fn read(root: &Path) -> Result<Option<(BTreeMap<String, Record>, u64)>> {
    let path = root.join("journal");
    let bytes = match fs::read(&path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        read => read.map_err(io("read", &path))?,
    };
    if !bytes.starts_with(MAGIC) {
        return Err(foreign(root));
    }
    let mut records = BTreeMap::new();
    let length = replay(root, &bytes, |change| match change {
        Change::Put(key, record) => drop(records.insert(key, record)),
        Change::Delete(key) => drop(records.remove(&key)),
    })?;
    Ok(Some((records, bytes.len() as u64 - length)))
}

/// Goes through the changes of a journal's bytes; the length of its whole frames, behind which there is at most the one that a
/// crash cut short. To take damage before other frames for that would undo acknowledged changes, and have the folders of what
/// they made removed.
fn replay(root: &Path, bytes: &[u8], mut each: impl FnMut(Change)) -> Result<u64> {
    let mut at = MAGIC.len();
    while let Some((changes, length)) = decode(&bytes[at..]) {
        at += length;
        changes.into_iter().for_each(&mut each);
    }
    if at < bytes.len() && any_frame(&bytes[at + 1..]) {
        return Err(damaged(root, at as u64));
    }
    Ok(at as u64)
}

/// That there is no journal where there are folders.
pub(crate) fn missing(root: &Path) -> Error {
    Error::Lost(format!(
        "{} is missing, while folders of snapshots are there; put the journal back, or move {} away to begin anew without \
         its snapshots",
        root.join("journal").display(),
        root.display()
    ))
}

fn damaged(root: &Path, good: u64) -> Error {
    Error::Lost(format!(
        "{path} is damaged at byte {good}, and goes on behind that; put {root} back from a backup, or move it away to begin \
         anew without its snapshots; `truncate -s {good} {path}` gives up every change behind the damage",
        path = root.join("journal").display(),
        root = root.display()
    ))
}

fn foreign(root: &Path) -> Error {
    Error::FailedPrecondition(format!(
        "{} is not a snapshot journal of this version; move the folder away to begin anew",
        root.join("journal").display()
    ))
}

impl Store {
    /// Opens, or begins, the records in `root`. `taken` is the highest number of a folder that is there, 0 for none:
    /// where there are folders, records there were.
    pub(crate) fn open(root: &Path, taken: u64) -> Result<Self> {
        let lock_path = root.join("lock");
        let lock = sys::fs::lock(&lock_path, FORK_LIMIT).map_err(io("lock", &lock_path))?;
        let lock = lock.ok_or_else(|| Error::InUse(root.to_owned()))?;
        let path = root.join("journal");
        let bytes = match fs::read(&path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound && taken > 0 => {
                return Err(missing(root));
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {
                sys::fs::write_atomic(&path, MAGIC, 0o600).map_err(io("create", &path))?;
                MAGIC.to_vec()
            }
            Err(error) => return Err(io("read", &path)(error)),
        };
        if !bytes.starts_with(MAGIC) {
            return Err(foreign(root));
        }
        let journal = OpenOptions::new().write(true).open(&path).map_err(io("open", &path))?;
        let mut state = State {
            records: BTreeMap::new(),
            children: HashMap::new(),
            next_id: taken + 1,
            making: BTreeSet::new(),
            journal,
            length: MAGIC.len() as u64,
            room: 0,
            live: 0,
            sequence: 0,
            broken: None,
        };
        state.length = replay(root, &bytes, |change| state.apply(change))?;
        let torn = bytes.len() as u64 - state.length;
        if torn > 0 {
            tracing::warn!(journal = %path.display(), torn, "cut off a record that a crash left half written");
            state
                .journal
                .set_len(state.length)
                .and_then(|()| state.journal.sync_all())
                .map_err(io("cut", &path))?;
        }
        state.journal.seek(SeekFrom::End(0)).map_err(io("seek in", &path))?;
        // On a full disk it is what an earlier process took.
        let _ = state.take_room();
        Ok(Store { root: root.to_owned(), state: Mutex::new(state), synced: Mutex::new(0), _lock: lock })
    }

    /// Waits until the frame `sequence` is on disk. Whoever comes first syncs for all who wrote before.
    fn sync(&self, sequence: u64) -> Result<()> {
        let mut synced = self.synced.lock();
        if *synced >= sequence {
            return Ok(());
        }
        let (journal, upto) = {
            let state = self.state.lock();
            // The kernel tells of a failed write back once: a sync after that one would succeed, with nothing of it on
            // disk. Whoever failed said so here before giving `synced` back.
            state.check_whole(&self.root)?;
            (state.journal.try_clone(), state.sequence)
        };
        if let Err(error) = journal.and_then(|journal| journal.sync_data()) {
            self.state.lock().broken = Some(error.to_string());
            return Err(io("sync the journal in", &self.root)(error));
        }
        *synced = upto;
        Ok(())
    }

    /// Runs `decide` on the records, writes what it wants changed, and returns once that is on disk. After an error the
    /// records here tell whether the change may be on disk: it is if they have it.
    fn change<T>(&self, decide: impl FnOnce(&State) -> Result<(Vec<Change>, T)>) -> Result<T> {
        let (sequence, value) = {
            let mut state = self.state.lock();
            state.check_whole(&self.root)?;
            let (changes, value) = decide(&state)?;
            (state.write(&self.root, changes)?, value)
        };
        sys::failpoint!("snapshots.journal.written");
        self.sync(sequence)?;
        sys::failpoint!("snapshots.journal.synced");
        // The change is on disk, whichever of the two journals a crash from here on leaves: it does not fail with this.
        let mut state = self.state.lock();
        if state.broken.is_none() && state.length > COMPACT_MIN && state.length > state.live * 4 {
            compact(&mut state, &self.root);
        }
        Ok(value)
    }

    /// A number for the folder of a new snapshot; [`Store::made`] ends the making, well or not.
    pub(crate) fn begin(&self) -> u64 {
        let mut state = self.state.lock();
        let id = state.next_id;
        state.next_id += 1;
        state.making.insert(id);
        id
    }

    /// Ends the making of a folder.
    pub(crate) fn made(&self, id: u64) {
        self.state.lock().making.remove(&id);
    }

    /// The least number that may belong to a folder that is being made, or will be.
    pub(crate) fn making_from(&self) -> u64 {
        let state = self.state.lock();
        state.making.first().copied().unwrap_or(state.next_id)
    }

    /// Whether a snapshot of this key, over this parent, could be made now: what to find out before work is done.
    pub(crate) fn check_new(&self, key: &str, parent: &str) -> Result<()> {
        let state = self.state.lock();
        state.check_whole(&self.root)?;
        check_new(&state, key, parent)
    }

    pub(crate) fn create(&self, key: &str, id: u64, kind: Kind, parent: &str, labels: &Labels) -> Result<()> {
        let now = now();
        self.change(|state| {
            check_new(state, key, parent)?;
            let (parent, labels) = (parent.to_owned(), labels.clone());
            let record = Record { id, kind, parent, labels, created: now, updated: now, size: 0, inodes: 0 };
            Ok((vec![Change::Put(key.to_owned(), record)], ()))
        })
    }

    /// Whether the active snapshot `key` could be committed as `name` now; its record.
    pub(crate) fn check_commit(&self, name: &str, key: &str) -> Result<Record> {
        let state = self.state.lock();
        state.check_whole(&self.root)?;
        check_commit(&state, name, key)
    }

    pub(crate) fn commit(&self, name: &str, key: &str, usage: Usage, labels: &Labels) -> Result<()> {
        let (name, key, labels) = (name.to_owned(), key.to_owned(), labels.clone());
        self.commit_stack(&[(&Commit { name, key, parent: None, labels }, usage)])
    }

    /// Commits several in one frame, of which one may be the parent of a later one.
    pub(crate) fn commit_stack(&self, commits: &[(&Commit, Usage)]) -> Result<()> {
        self.change(|state| {
            let (mut changes, mut names) = (Vec::new(), BTreeSet::new());
            for (Commit { name, key, parent, labels }, usage) in commits {
                let mut record = check_commit(state, name, key)?;
                if let Some(parent) = parent {
                    if !parent.is_empty()
                        && !names.contains(parent)
                        && find(state, parent)?.kind != Kind::Committed
                    {
                        return Err(not_a_layer(parent, key));
                    }
                    record.parent.clone_from(parent);
                }
                if !names.insert(name) {
                    return Err(Error::AlreadyExists(name.clone()));
                }
                record.kind = Kind::Committed;
                record.labels = labels.clone();
                record.updated = now();
                (record.size, record.inodes) = (usage.size, usage.inodes);
                changes.extend([Change::Delete(key.clone()), Change::Put(name.clone(), record)]);
            }
            Ok((changes, ()))
        })
    }

    /// Deletes a record, whose folder is now nobody's.
    pub(crate) fn remove(&self, key: &str) -> Result<Record> {
        self.change(|state| {
            let record = find(state, key)?.clone();
            if let Some(count) = state.children.get(key) {
                return Err(Error::FailedPrecondition(format!(
                    "snapshot {key:?} cannot be removed: {count} other snapshot(s) are stacked on it; remove these first"
                )));
            }
            Ok((vec![Change::Delete(key.to_owned())], record))
        })
    }

    pub(crate) fn update(&self, info: &Info, paths: &[String]) -> Result<Info> {
        self.change(|state| {
            let mut record = find(state, &info.key)?.clone();
            if paths.is_empty() {
                record.labels = info.labels.clone();
            }
            for path in paths {
                match path.split_once('.') {
                    None if path == "labels" => record.labels = info.labels.clone(),
                    Some(("labels", label)) => match info.labels.get(label).filter(|value| !value.is_empty())
                    {
                        Some(value) => drop(record.labels.insert(label.to_owned(), value.clone())),
                        None => drop(record.labels.remove(label)),
                    },
                    _ => {
                        return Err(Error::InvalidArgument(format!(
                            "field {path:?} of snapshot {:?} cannot be updated; only labels can",
                            info.key
                        )));
                    }
                }
            }
            record.labels.retain(|_, value| !value.is_empty());
            record.updated = now();
            let updated = record.info(&info.key);
            Ok((vec![Change::Put(info.key.clone(), record)], updated))
        })
    }

    pub(crate) fn get(&self, key: &str) -> Result<Record> {
        find(&self.state.lock(), key).cloned()
    }

    /// All records as of one instant.
    pub(crate) fn all(&self) -> Vec<(String, Record)> {
        self.state.lock().records.iter().map(|(key, record)| (key.clone(), record.clone())).collect()
    }

    /// The layer `parent` and what is beneath it, from the top: keys, and the numbers of their folders.
    pub(crate) fn chain(&self, parent: &str) -> Result<Vec<(String, u64)>> {
        let state = self.state.lock();
        let mut chain = Vec::new();
        let mut parent = parent;
        while !parent.is_empty() {
            let record = find(&state, parent)?;
            chain.push((parent.to_owned(), record.id));
            parent = &record.parent;
        }
        Ok(chain)
    }
}

fn find<'a>(state: &'a State, key: &str) -> Result<&'a Record> {
    state.records.get(key).ok_or_else(|| Error::NotFound(key.to_owned()))
}

fn check_new(state: &State, key: &str, parent: &str) -> Result<()> {
    if key.is_empty() {
        return Err(Error::InvalidArgument("a snapshot's key must not be empty".into()));
    }
    if state.records.contains_key(key) {
        return Err(Error::AlreadyExists(key.to_owned()));
    }
    if !parent.is_empty() && find(state, parent)?.kind != Kind::Committed {
        return Err(not_a_layer(parent, key));
    }
    Ok(())
}

fn not_a_layer(parent: &str, key: &str) -> Error {
    Error::InvalidArgument(format!(
        "snapshot {parent:?} is not committed, so that {key:?} cannot be stacked on it"
    ))
}

fn check_commit(state: &State, name: &str, key: &str) -> Result<Record> {
    if name.is_empty() {
        return Err(Error::InvalidArgument("the name to commit as must not be empty".into()));
    }
    let record = find(state, key)?;
    if record.kind != Kind::Active {
        return Err(Error::FailedPrecondition(format!(
            "snapshot {key:?} is not active, so that it cannot be committed"
        )));
    }
    if state.records.contains_key(name) {
        return Err(Error::AlreadyExists(name.to_owned()));
    }
    Ok(record.clone())
}

/// Writes the journal anew with what lives, and puts it in the place of the old one.
fn compact(state: &mut State, root: &Path) {
    let path = root.join("journal");
    let rewritten = state
        .records
        .iter()
        .try_fold(MAGIC.to_vec(), |mut bytes, (key, record)| {
            bytes.extend(encode(&[Change::Put(key.clone(), record.clone())])?);
            Ok(bytes)
        })
        .and_then(|bytes| sys::fs::write_atomic(&path, &bytes, 0o600).map(|()| bytes.len() as u64))
        .and_then(|length| Ok((length, OpenOptions::new().write(true).open(&path)?)))
        .and_then(|(length, mut journal)| journal.seek(SeekFrom::End(0)).map(|_| (length, journal)));
    match rewritten {
        Ok((length, journal)) => {
            (state.journal, state.length, state.room) = (journal, length, 0);
            let _ = state.take_room();
        }
        Err(error) => {
            tracing::error!(journal = %path.display(), %error, "the journal could not be written anew");
            // After the rename, what is written on to the old file would be lost.
            let same =
                |old: fs::Metadata, new: fs::Metadata| (old.dev(), old.ino()) == (new.dev(), new.ino());
            let in_place = state.journal.metadata().and_then(|old| Ok(same(old, fs::metadata(&path)?)));
            if !in_place.unwrap_or(false) {
                state.broken = Some(error.to_string());
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn open(root: &Path) -> Result<Store> {
        Store::open(root, 0)
    }

    fn active(store: &Store, key: &str) -> Result<()> {
        store.create(key, store.begin(), Kind::Active, "", &Labels::new())
    }

    fn contents(store: &Store) -> Vec<(String, String, Kind, Labels)> {
        store.all().into_iter().map(|(key, r)| (key, r.parent, r.kind, r.labels)).collect()
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(64))]
        /// Whatever happens and wherever the file is cut, the store opens and holds a state that it once had: the one
        /// after the last whole frame.
        #[test]
        fn survives_a_cut_anywhere(steps in prop::collection::vec((0..5_u8, "[a-c]", "[a-c]?"), 1..40), cut in 0.0..1.0_f64) {
            let dir = tempfile::tempdir().unwrap();
            let store = open(dir.path()).unwrap();
            let journal = dir.path().join("journal");
            let mut history = vec![(MAGIC.len() as u64, contents(&store))];
            for (step, key, other) in steps {
                let labels = Labels::from([("l".into(), other.clone())]);
                let _ = match step {
                    0 => store.create(&key, store.begin(), Kind::Active, &other, &labels),
                    1 => store.create(&key, store.begin(), Kind::View, &other, &labels),
                    2 => store.commit(&other, &key, Usage::default(), &labels),
                    3 => store.remove(&key).map(drop),
                    _ => store.get(&key).and_then(|r| store.update(&Info { labels, ..r.info(&key) }, &[])).map(drop),
                };
                history.push((fs::metadata(&journal).unwrap().len(), contents(&store)));
            }
            drop(store);
            let length = fs::metadata(&journal).unwrap().len();
            let at = MAGIC.len() as u64 + ((length - MAGIC.len() as u64) as f64 * cut) as u64;
            OpenOptions::new().write(true).open(&journal).unwrap().set_len(at).unwrap();
            let store = open(dir.path()).unwrap();
            let expected = &history.iter().rev().find(|(length, _)| *length <= at).unwrap().1;
            prop_assert_eq!(&contents(&store), expected);
            // And goes on from there.
            store.create("z", store.begin(), Kind::Active, "", &Labels::new()).unwrap();
            drop(store);
            prop_assert!(open(dir.path()).unwrap().get("z").is_ok());
        }
    }

    /// A journal of three frames, and where each ends.
    fn three(root: &Path) -> (PathBuf, Vec<u8>, Vec<usize>) {
        let (store, journal) = (open(root).unwrap(), root.join("journal"));
        let ends = ["a", "b", "c"].map(|key| {
            active(&store, key).unwrap();
            fs::metadata(&journal).unwrap().len() as usize
        });
        let bytes = fs::read(&journal).unwrap();
        (journal, bytes, ends.to_vec())
    }

    #[test]
    fn damage_before_a_whole_frame_is_refused_and_touches_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, bytes, ends) = three(dir.path());
        // Any byte of the second: its length, its sum, its payload.
        for at in ends[0]..ends[1] {
            let mut damaged = bytes.clone();
            damaged[at] ^= 0x40;
            fs::write(&journal, &damaged).unwrap();
            match open(dir.path()) {
                Err(Error::Lost(text)) => assert!(text.contains(&format!("byte {}", ends[0])), "{text}"),
                other => panic!("{at}: {:?}", other.map(|store| contents(&store))),
            }
            assert_eq!(fs::read(&journal).unwrap(), damaged);
        }
        fs::write(&journal, &bytes).unwrap();
        assert_eq!(contents(&open(dir.path()).unwrap()).len(), 3);
    }

    #[test]
    fn a_bad_last_frame_is_cut_off() {
        let dir = tempfile::tempdir().unwrap();
        let (journal, bytes, ends) = three(dir.path());
        let mut damaged = bytes.clone();
        damaged[ends[1] + 20] ^= 1;
        // Half of a page that was never written reads as zeros.
        let mut zeros = bytes[..ends[1] + 3].to_vec();
        zeros.resize(bytes.len() + 4096, 0);
        for torn in [damaged, zeros] {
            fs::write(&journal, torn).unwrap();
            assert_eq!(contents(&open(dir.path()).unwrap()).len(), 2);
            assert_eq!(fs::read(&journal).unwrap(), bytes[..ends[1]]);
        }
    }

    #[test]
    fn without_its_journal_a_folder_is_not_begun_anew() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(Store::open(dir.path(), 3), Err(Error::Lost(_))));
        assert!(!dir.path().join("journal").exists());
        active(&open(dir.path()).unwrap(), "a").unwrap();
        assert_eq!(
            Store::open(dir.path(), 7).unwrap().begin(),
            8,
            "a number that is taken is not given again"
        );
    }

    /// Puts a file in the place of the journal that takes writes, and fails to sync.
    fn fail_syncs(store: &Store) -> File {
        let null = OpenOptions::new().write(true).open("/dev/null").unwrap();
        std::mem::replace(&mut store.state.lock().journal, null)
    }

    #[test]
    fn a_failed_sync_is_told_to_all_who_wrote_before_it() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).unwrap();
        active(&store, "a").unwrap();
        let journal = fail_syncs(&store);
        assert!(matches!(active(&store, "b"), Err(Error::Io { .. })));
        assert!(store.get("b").is_ok(), "what may be on disk is to be seen");
        // The kernel has told of it: the next sync succeeds.
        store.state.lock().journal = journal;
        let sequence = store.state.lock().sequence;
        assert!(matches!(store.sync(sequence), Err(Error::FailedPrecondition(_))));
        assert!(store.sync(sequence - 1).is_ok(), "what was on disk before stays so");
        for refused in [active(&store, "c"), store.check_new("c", ""), store.check_commit("n", "a").map(drop)]
        {
            assert!(matches!(refused, Err(Error::FailedPrecondition(_))));
        }
    }

    #[test]
    fn a_change_does_not_fail_with_the_rewriting_of_the_journal() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).unwrap();
        // In the way of the new journal.
        let temporary = dir.path().join(".journal.new");
        fs::create_dir(&temporary).unwrap();
        let labels = Labels::from([("l".into(), "x".repeat(100_000))]);
        let fill = |from: usize| {
            for number in from..from + 8 {
                store.create(&format!("{number}"), store.begin(), Kind::Active, "", &labels).unwrap();
                store.remove(&format!("{number}")).unwrap();
            }
        };
        fill(0);
        fill(8);
        active(&store, "a").unwrap();
        let length = || fs::metadata(dir.path().join("journal")).unwrap().len();
        assert!(length() > COMPACT_MIN);
        fs::remove_dir(&temporary).unwrap();
        active(&store, "b").unwrap();
        assert!(length() < COMPACT_MIN);
        drop(store);
        assert_eq!(contents(&open(dir.path()).unwrap()).len(), 2);
    }

    #[test]
    fn one_process_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let _store = open(dir.path()).unwrap();
        assert!(matches!(open(dir.path()), Err(Error::InUse(_))));
    }

    #[test]
    fn the_journal_does_not_grow_with_its_past() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).unwrap();
        let labels = Labels::from([("l".into(), "x".repeat(4000))]);
        store.create("base", store.begin(), Kind::Active, "", &labels).unwrap();
        for _ in 0..400 {
            store.create("k", store.begin(), Kind::Active, "", &labels).unwrap();
            store.remove("k").unwrap();
        }
        let length = fs::metadata(dir.path().join("journal")).unwrap().len();
        assert!(length < 2 * COMPACT_MIN, "{length}");
        drop(store);
        assert_eq!(contents(&open(dir.path()).unwrap()).len(), 1);
    }

    #[test]
    fn many_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let store = open(dir.path()).unwrap();
        std::thread::scope(|scope| {
            for thread in 0..8 {
                let store = &store;
                scope.spawn(move || {
                    for i in 0..25 {
                        let id = store.begin();
                        store.create(&format!("{thread}-{i}"), id, Kind::Active, "", &Labels::new()).unwrap();
                    }
                });
            }
        });
        let ids: BTreeSet<u64> = store.all().iter().map(|(_, record)| record.id).collect();
        assert_eq!(ids.len(), 200);
        drop(store);
        assert_eq!(open(dir.path()).unwrap().all().len(), 200);
    }
}
