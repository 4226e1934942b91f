//! The files of the content store, in containerd's layout.
//!
//! ```text
//! blobs/sha256/HEX                 whole, verified, synced; never changed (mode 0444)
//! ingest/HEX/                      HEX = sha256 of the ingest's key, NAMESPACE/SEQUENCE/REF
//!            ref                   the key
//!            data                  the bytes so far; its length is the offset to go on at
//!            startedat updatedat   RFC 3339
//!            total                 the announced size in decimal, where there is one
//! removed/HEX                      taken out of blobs/, about to be deleted
//! ```
//!
//! ```text
//!  ingest/HEX/data --sync--> link to blobs/... --sync folder--> [the record commits] --> ingest/HEX removed
//! ```
//!
//! The data is linked, not moved, so that a kill before the record commits leaves an ingest that can be resumed.
//!
//! Invariants: what is in blobs/ has the digest of its name and is on disk; its name there is on disk once
//! [`Store::sync_name`] was called. A blob's file that is pinned stays. Everything here blocks: callers stay off the
//! reactor.

use std::collections::{HashMap, HashSet};
use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Read, Seek, SeekFrom, Write};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use bytes::Bytes;
use futures::{Stream, StreamExt as _};
use oci::{Algorithm, Digest, Hasher};
use parking_lot::Mutex;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::{Notify, watch};

use super::remote::{Leaving, Remote};
use crate::error::{Error, Result, blocking};

/// Bytes in one piece of a blob that is read.
pub(super) const PIECE: u64 = 1 << 20;
/// Bytes read at a time when an ingest is hashed again or a blob copied.
const BUFFER: usize = 1 << 20;

/// The folders of the store; cheap to clone.
#[derive(Clone)]
pub(super) struct Store {
    root: Arc<Path>,
    /// Who has the ingests that are open, by key.
    open: Arc<Mutex<HashMap<String, Holders>>>,
    /// Told whenever somebody lets go of an ingest.
    pub(super) released: Arc<Notify>,
    /// How many commits under way want a blob's file to stay.
    pinned: Arc<Mutex<HashMap<Digest, usize>>>,
    /// Where blobs are, when they are not in the folder.
    remote: Option<Arc<Remote>>,
}

/// A blob that nobody needs, out of the store or about to be.
pub(super) enum Taken {
    /// Its file, under another name.
    File(PathBuf),
    /// It is in another process's store.
    There(Leaving),
}

impl Taken {
    /// Deletes it. Blocks.
    pub(super) fn delete(self) -> Result<()> {
        match self {
            Taken::File(path) => match std::fs::remove_file(&path) {
                Err(error) if error.kind() != io::ErrorKind::NotFound => {
                    Err(Error::io("remove", &path, &error))
                }
                _ => {
                    sys::failpoint!("content.blob.deleted");
                    Ok(())
                }
            },
            Taken::There(leaving) => leaving.delete(),
        }
    }
}

/// An ingest as it is on disk.
pub(super) struct IngestStatus {
    pub(super) started_at: SystemTime,
    pub(super) updated_at: SystemTime,
    pub(super) offset: u64,
    pub(super) total: u64,
}

/// The bytes of an ingest, in the hands of its one writer. Dropping it leaves the ingest to be resumed.
pub(super) struct Ingest {
    store: Store,
    key: String,
    folder: PathBuf,
    data: File,
    algorithm: Algorithm,
    hasher: Hasher,
    pub(super) status: IngestStatus,
}

/// Who has an ingest open.
enum Holders {
    /// The one that writes it, and whether others wait for it to end.
    Writer(watch::Sender<bool>),
    /// So many that have nothing to write, since another namespace has the blob.
    Shared(usize),
}

/// An open ingest.
pub(super) struct Held {
    store: Store,
    pub(super) key: String,
}

impl Held {
    /// The right to write, for one that had nothing to write so far; Unavailable when others have the ingest, too.
    pub(super) fn write(&mut self) -> Result<()> {
        let mut open = self.store.open.lock();
        match open.get_mut(&self.key) {
            Some(holders @ Holders::Shared(1)) => *holders = Holders::Writer(watch::Sender::new(false)),
            Some(Holders::Shared(_)) => return Err(in_use(&self.key)),
            Some(Holders::Writer(_)) | None => {}
        }
        Ok(())
    }

    /// Comes back once another waits for this ingest to end.
    pub(super) fn wanted(&self) -> impl Future<Output = ()> + Send + 'static {
        let wanted = match self.store.open.lock().get(&self.key) {
            Some(Holders::Writer(wanted)) => Some(wanted.subscribe()),
            _ => None,
        };
        async move {
            if let Some(mut wanted) = wanted
                && wanted.wait_for(|wanted| *wanted).await.is_ok()
            {
                return;
            }
            std::future::pending::<()>().await;
        }
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        let mut open = self.store.open.lock();
        match open.get_mut(&self.key) {
            Some(Holders::Shared(count)) if *count > 1 => *count -= 1,
            _ => drop(open.remove(&self.key)),
        }
        drop(open);
        self.store.released.notify_waiters();
    }
}

fn in_use(key: &str) -> Error {
    Error::unavailable(format!(
        "ingest {key:?} is being written by another client; try again when that has ended"
    ))
}

/// While it is there, [`Store::take_out`] leaves the blob alone.
struct Pin {
    store: Store,
    digest: Digest,
}

impl Pin {
    fn new(store: &Store, digest: &Digest) -> Self {
        *store.pinned.lock().entry(digest.clone()).or_default() += 1;
        Pin { store: store.clone(), digest: digest.clone() }
    }
}

impl Drop for Pin {
    fn drop(&mut self) {
        let mut pinned = self.store.pinned.lock();
        if let Some(count) = pinned.get_mut(&self.digest) {
            *count -= 1;
            if *count == 0 {
                pinned.remove(&self.digest);
            }
        }
    }
}

impl Store {
    /// Opens or makes the folders, and removes what an earlier run was about to remove, as far as that can be done.
    pub(super) fn open(root: &Path) -> Result<Self> {
        let removed = root.join("removed");
        if let Err(error) = sys::fs::remove_tree(&removed) {
            tracing::warn!(folder = %removed.display(), %error, "files of deleted blobs stay until the next start");
        }
        for folder in [root, &root.join("blobs"), &root.join("blobs/sha256"), &root.join("ingest"), &removed]
        {
            make_folder(folder)?;
        }
        for folder in [root, &root.join("blobs")] {
            sys::fs::sync_dir(folder).map_err(|error| Error::io("sync folder", folder, &error))?;
        }
        Ok(Store {
            root: root.into(),
            open: Arc::default(),
            released: Arc::default(),
            pinned: Arc::default(),
            remote: None,
        })
    }

    /// The same with the blobs in another process's store.
    pub(super) fn with(mut self, remote: Remote) -> Self {
        self.remote = Some(Arc::new(remote));
        self
    }

    /// Whether blobs are in the folder, so that a commit of records may look at them.
    pub(super) fn is_here(&self) -> bool {
        self.remote.is_none()
    }

    pub(super) fn root(&self) -> &Path {
        &self.root
    }

    pub(super) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.root.join("blobs").join(digest.algorithm().as_str()).join(digest.hex())
    }

    /// A path for what is removed at the next start, if it is there by then.
    pub(super) fn removed_path(&self, name: &str) -> PathBuf {
        self.root.join("removed").join(name)
    }

    /// The size of a blob's file; None when there is none.
    pub(super) fn blob_size(&self, digest: &Digest) -> Result<Option<u64>> {
        if let Some(remote) = &self.remote {
            return remote.size(digest);
        }
        let path = self.blob_path(digest);
        match std::fs::metadata(&path) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("look at", &path, &error)),
        }
    }

    /// A blob's bytes as a file; `size` is what its record says.
    pub(super) fn open_blob(&self, digest: &Digest, size: u64) -> Result<File> {
        if let Some(remote) = &self.remote {
            return remote.fetch(digest, size, &self.root.join("removed"));
        }
        let path = self.blob_path(digest);
        File::open(&path).map_err(|error| Error::io("open the blob", &path, &error))
    }

    /// A blob's bytes from `from` to `end`, with their offsets. One piece at a time: a slow reader holds one piece of memory
    /// and no thread.
    pub(super) async fn read(
        &self,
        digest: Digest,
        from: u64,
        end: u64,
    ) -> Result<impl Stream<Item = Result<(u64, Bytes)>> + Send + 'static> {
        if let Some(remote) = &self.remote {
            return Ok(remote.clone().read(digest, from, end).await?.left_stream());
        }
        let this = self.clone();
        let file = blocking(move || {
            let mut file = this.open_blob(&digest, 0)?;
            let path = this.blob_path(&digest);
            file.seek(SeekFrom::Start(from)).map_err(|error| Error::io("read", path, &error))?;
            Ok(file)
        })
        .await?;
        let pieces = futures::stream::try_unfold((file, from), move |(file, offset)| async move {
            if offset >= end {
                return Ok(None);
            }
            let (file, piece) = blocking(move || read_piece(file, PIECE.min(end - offset))).await?;
            let next = offset + piece.len() as u64;
            Ok(Some(((offset, piece), (file, next))))
        });
        Ok(pieces.right_stream())
    }

    /// Makes sure that a blob's name in its folder is on disk, whoever put it there; of another process's store, that it is
    /// there.
    pub(super) fn sync_name(&self, digest: &Digest) -> Result<()> {
        if let Some(remote) = &self.remote {
            let gone = || Error::failed_precondition(format!("blob {digest} was removed meanwhile"));
            return remote.size(digest)?.map(drop).ok_or_else(gone);
        }
        let path = self.blob_path(digest);
        // The other algorithms' folders are made with their first blob.
        let folders = if digest.algorithm() == Algorithm::Sha256 { 1 } else { 2 };
        for folder in path.ancestors().skip(1).take(folders) {
            sys::fs::sync_dir(folder).map_err(|error| Error::io("sync folder", folder, &error))?;
        }
        sys::failpoint!("content.blob.name-synced");
        Ok(())
    }

    /// Takes a blob's file out of the store, at the speed of a rename, to be deleted. None when there is no file, or when a
    /// commit under way has pinned it.
    pub(super) fn take_out(&self, digest: &Digest) -> Result<Option<Taken>> {
        let pinned = self.pinned.lock();
        if pinned.contains_key(digest) {
            return Ok(None);
        }
        if let Some(remote) = &self.remote {
            // Under the lock: who pins it from now on sees that it is leaving.
            return Ok(remote.leave(digest).map(Taken::There));
        }
        drop(pinned);
        let (from, to) = (self.blob_path(digest), self.root.join("removed").join(digest.hex()));
        match std::fs::rename(&from, &to) {
            Ok(()) => {
                sys::failpoint!("content.blob.taken-out");
                Ok(Some(Taken::File(to)))
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(Error::io("remove", &from, &error)),
        }
    }

    /// All blobs.
    pub(super) fn blobs(&self) -> Result<HashSet<Digest>> {
        if let Some(remote) = &self.remote {
            return remote.blobs();
        }
        let root = self.root.join("blobs");
        let failed = |error: io::Error| Error::io("read folder", &root, &error);
        let mut blobs = HashSet::new();
        for folder in std::fs::read_dir(&root).map_err(failed)?.flatten() {
            for file in std::fs::read_dir(folder.path()).map_err(failed)?.flatten() {
                let name = format!("{}:{}", folder.file_name().display(), file.file_name().display());
                blobs.extend(name.parse::<Digest>());
            }
        }
        Ok(blobs)
    }

    /// Puts everything that was written to this file system on disk.
    pub(super) fn sync_all(&self) -> Result<()> {
        sys::fs::sync_filesystem(&self.root)
            .map_err(|error| Error::io("sync the file system of", &*self.root, &error))
    }

    pub(super) fn ingest_folder(&self, key: &str) -> PathBuf {
        self.root.join("ingest").join(Digest::sha256_of(key.as_bytes()).hex())
    }

    /// The folders of all ingests, with the key of each where it can be read.
    pub(super) fn ingests(&self) -> Result<Vec<(PathBuf, Option<String>)>> {
        let root = self.root.join("ingest");
        let entries = std::fs::read_dir(&root).map_err(|error| Error::io("read folder", &root, &error))?;
        Ok(entries
            .flatten()
            .map(|entry| (entry.path(), std::fs::read_to_string(entry.path().join("ref")).ok()))
            .collect())
    }

    /// The state of an ingest; None when nothing of it is on disk.
    pub(super) fn status(&self, key: &str) -> Result<Option<IngestStatus>> {
        let folder = self.ingest_folder(key);
        let data = match std::fs::metadata(folder.join("data")) {
            Ok(data) => data,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(Error::io("look at the data of", &folder, &error)),
        };
        let modified = data.modified().unwrap_or(SystemTime::UNIX_EPOCH);
        let total = std::fs::read_to_string(folder.join("total")).ok().and_then(|total| total.parse().ok());
        Ok(Some(IngestStatus {
            started_at: read_time(&folder.join("startedat")).unwrap_or(modified),
            // Not written at every step, so the file's own time may be the newer one.
            updated_at: read_time(&folder.join("updatedat")).map_or(modified, |time| time.max(modified)),
            offset: data.len(),
            total: total.unwrap_or(0),
        }))
    }

    /// Takes an ingest, to write it or to commit what is shared; Unavailable while another client writes it, and, for
    /// one that is to write, while any other has it. Does not block.
    pub(super) fn hold(&self, key: &str, shared: bool) -> Result<Held> {
        let mut open = self.open.lock();
        match open.get_mut(key) {
            Some(Holders::Shared(count)) if shared => *count += 1,
            Some(Holders::Writer(wanted)) => {
                wanted.send_replace(true);
                return Err(in_use(key));
            }
            Some(Holders::Shared(_)) => return Err(in_use(key)),
            None => {
                let holders =
                    if shared { Holders::Shared(1) } else { Holders::Writer(watch::Sender::new(false)) };
                open.insert(key.to_owned(), holders);
            }
        }
        Ok(Held { store: self.clone(), key: key.to_owned() })
    }

    /// Begins or resumes an ingest, whose writer the caller is. What is there already is hashed again.
    pub(super) fn writer(&self, held: &Held, total: u64, algorithm: Algorithm) -> Result<Ingest> {
        let key = held.key.as_str();
        let folder = self.ingest_folder(key);
        let failed = |error: io::Error| Error::io("open ingest", &folder, &error);
        let ours = |_: &IngestStatus| {
            std::fs::read_to_string(folder.join("ref")).is_ok_and(|written| written == key)
        };
        // A different total cannot be the same content: begin anew.
        let fits = |status: &IngestStatus| total == 0 || status.total == 0 || status.total == total;
        let before = self.status(key)?.filter(ours).filter(fits);
        if before.is_none() {
            make_folder(&folder)?;
            sys::failpoint!("content.ingest.folder");
            let now = show_time(SystemTime::now());
            for (name, text) in [("startedat", now.as_str()), ("updatedat", &now), ("ref", key)] {
                std::fs::write(folder.join(name), text).map_err(failed)?;
            }
        }
        let total = before.as_ref().map_or(0, |status| status.total).max(total);
        if total > 0 {
            std::fs::write(folder.join("total"), total.to_string()).map_err(failed)?;
        }
        let mut data = open_data(&folder, before.is_none()).map_err(failed)?;
        sys::failpoint!("content.ingest.opened");
        let mut hasher = algorithm.hasher();
        let offset = hash_rest(&mut data, &mut hasher).map_err(failed)?;
        let now = SystemTime::now();
        let mut status =
            before.unwrap_or(IngestStatus { started_at: now, updated_at: now, offset: 0, total: 0 });
        (status.offset, status.total) = (offset, total);
        Ok(Ingest { store: self.clone(), key: key.to_owned(), folder, data, algorithm, hasher, status })
    }

    /// Removes an ingest, under its writer too, whose commit will then fail. False when there was none.
    pub(super) fn remove_ingest(&self, key: &str) -> Result<bool> {
        let folder = self.ingest_folder(key);
        let existed = folder.exists();
        sys::fs::remove_tree(&folder).map_err(|error| Error::io("remove ingest", &folder, &error))?;
        sys::failpoint!("content.ingest.removed");
        Ok(existed)
    }
}

impl Ingest {
    pub(super) fn write(&mut self, bytes: &[u8]) -> Result<()> {
        self.data.write_all(bytes).map_err(|error| {
            // What was written in part is cut off again: file, hash and offset stay one.
            let _ = self.data.set_len(self.status.offset);
            let _ = self.data.seek(SeekFrom::Start(self.status.offset));
            Error::io("write to ingest", &self.folder, &error)
        })?;
        self.hasher.update(bytes);
        self.status.offset += bytes.len() as u64;
        self.status.updated_at = SystemTime::now();
        sys::failpoint!("content.ingest.written");
        Ok(())
    }

    /// Appends a whole file.
    pub(super) fn write_from(&mut self, file: &mut File) -> Result<()> {
        let mut buffer = vec![0; BUFFER];
        loop {
            match file.read(&mut buffer) {
                Ok(0) => return Ok(()),
                Ok(count) => self.write(&buffer[..count])?,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(error) => return Err(Error::io("copy a blob to ingest", &self.folder, &error)),
            }
        }
    }

    /// Begins anew with nothing.
    pub(super) fn truncate(&mut self) -> Result<()> {
        self.data
            .set_len(0)
            .and_then(|()| self.data.rewind())
            .map_err(|error| Error::io("cut ingest", &self.folder, &error))?;
        self.hasher = self.algorithm.hasher();
        self.status.offset = 0;
        Ok(())
    }

    /// The digest of the bytes so far.
    pub(super) fn digest(&self) -> Digest {
        self.hasher.clone().finish()
    }

    /// Leaves the ingest to be resumed.
    pub(super) fn suspend(self) {
        // Best effort: a resumed ingest is hashed again from what is really there.
        let _ = self.data.sync_data();
        let _ = std::fs::write(self.folder.join("updatedat"), show_time(self.status.updated_at));
    }

    /// The file of the data, to be read at any offset while it grows.
    pub(super) fn reader(&self) -> io::Result<File> {
        self.data.try_clone()
    }

    /// Checks size and digest, syncs the data and pins the blob, which is then to be published; the ingest stays.
    pub(super) fn finish(self, size: u64, expected: Option<&Digest>) -> Result<Finished> {
        let finished = self.check(size, expected)?;
        let Ingest { data, folder, .. } = &finished.ingest;
        data.sync_all().map_err(|error| Error::io("sync ingest", folder, &error))?;
        sys::failpoint!("content.ingest.synced");
        Ok(finished)
    }

    /// The same without the sync, which is to come before the blob is published.
    pub(super) fn check(mut self, size: u64, expected: Option<&Digest>) -> Result<Finished> {
        if size > 0 && size != self.status.offset {
            return Err(Error::failed_precondition(format!(
                "ingest {:?}: {} bytes were written and {size} were announced",
                self.key, self.status.offset
            )));
        }
        if let Some(expected) = expected
            && expected.algorithm() != self.algorithm
        {
            let mut hasher = expected.algorithm().hasher();
            self.data
                .rewind()
                .and_then(|()| hash_rest(&mut self.data, &mut hasher))
                .map_err(|error| Error::io("read ingest", &self.folder, &error))?;
            (self.algorithm, self.hasher) = (expected.algorithm(), hasher);
        }
        let digest = self.digest();
        if let Some(expected) = expected
            && *expected != digest
        {
            return Err(Error::failed_precondition(format!(
                "ingest {:?}: the data has the digest {digest}, expected was {expected}",
                self.key
            )));
        }
        let pin = Pin::new(&self.store, &digest);
        Ok(Finished { digest, size: self.status.offset, ingest: self, _pin: pin })
    }
}

/// A whole and verified ingest whose blob's record has yet to commit.
pub(super) struct Finished {
    pub(super) digest: Digest,
    pub(super) size: u64,
    ingest: Ingest,
    _pin: Pin,
}

impl Finished {
    /// Makes sure that the blob's file is in the store and that this is on disk. To be called before the record's commit,
    /// and again when the commit finds that the file is gone: a removal that had begun before the pin took it.
    pub(super) fn publish(&self) -> Result<()> {
        self.link()?;
        self.ingest.store.sync_name(&self.digest)
    }

    /// The same, but what it is called in its folder has yet to come to disk.
    pub(super) fn link(&self) -> Result<()> {
        let Ingest { store, folder, data, key, .. } = &self.ingest;
        if let Some(remote) = &store.remote {
            return remote.put(key, &self.digest, self.size, data);
        }
        let path = store.blob_path(&self.digest);
        let failed = |error: io::Error| Error::io("put a blob into the store at", &path, &error);
        let existing = store.blob_size(&self.digest)?;
        if existing == Some(self.size) {
            // Another writer's, who may not have come to sync its name yet.
            return Ok(());
        }
        let parent = path.parent().unwrap_or(&path);
        make_folder(parent)?;
        data.set_permissions(Permissions::from_mode(0o444)).map_err(failed)?;
        if existing.is_none() {
            match std::fs::hard_link(folder.join("data"), &path) {
                // Another writer of the same content was faster.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                linked => linked.map_err(failed)?,
            }
        } else {
            // Of a wrong size, so damaged, while what we have has been verified.
            let new = folder.join("blob");
            std::fs::hard_link(folder.join("data"), &new)
                .and_then(|()| std::fs::rename(&new, &path))
                .map_err(failed)?;
        }
        sys::failpoint!("content.blob.linked");
        Ok(())
    }
}

/// Opens an ingest's data, which must never be a blob's own file: a commit that got as far as linking it into blobs/ and
/// was then cut off is gone on with in a copy.
fn open_data(folder: &Path, anew: bool) -> io::Result<File> {
    let path = folder.join("data");
    if anew {
        match std::fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            _ => {}
        }
    } else if std::fs::metadata(&path)?.nlink() > 1 {
        let copy = folder.join("copy");
        std::fs::copy(&path, &copy)?;
        std::fs::set_permissions(&copy, Permissions::from_mode(0o644))?;
        std::fs::rename(&copy, &path)?;
    }
    OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)
}

fn read_piece(mut file: File, length: u64) -> Result<(File, Bytes)> {
    let mut piece = Vec::with_capacity(usize::try_from(length).unwrap_or(0));
    (&mut file)
        .take(length)
        .read_to_end(&mut piece)
        .map_err(|error| Error::unknown(format!("read a blob: {error}")))?;
    if piece.len() as u64 == length {
        Ok((file, piece.into()))
    } else {
        Err(Error::data_loss(
            "a blob's file is shorter than its record says; delete the blob and fetch it again",
        ))
    }
}

/// Hashes the rest of a file; its length.
fn hash_rest(file: &mut File, hasher: &mut Hasher) -> io::Result<u64> {
    let mut buffer = Vec::new();
    let mut length = 0;
    loop {
        buffer.clear();
        let count = file.take(BUFFER as u64).read_to_end(&mut buffer)?;
        if count == 0 {
            return Ok(length);
        }
        hasher.update(&buffer);
        length += count as u64;
    }
}

fn make_folder(path: &Path) -> Result<()> {
    match sys::fs::create_dir(path, 0o755) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
            Err(Error::io("create folder", path, &error))
        }
        _ => Ok(()),
    }
}

fn show_time(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_default()
}

fn read_time(path: &Path) -> Option<SystemTime> {
    let text = std::fs::read_to_string(path).ok()?;
    OffsetDateTime::parse(text.trim(), &Rfc3339).ok().map(SystemTime::from)
}
