//! The database file: opening it after anything, and the one thread that writes it.
//!
//! Four things sled 0.34 does not do by itself: its flush leaves the data in the disk's cache (so each flush is
//! followed by `sync_data` on its log); a kill while it writes a snapshot of its page table leaves a
//! `snap.*.generating` file that it then trips over (so those go before it opens, under our lock); a flush
//! may wait for ever for a write that failed (flush.rs); and after a failed write it stays failed (so it is closed and opened
//! again, which drops what was never acknowledged).

use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError, Sender};
use std::time::{Duration, Instant};

use arc_swap::ArcSwap;
use shim_api::trace;
use tokio::sync::{oneshot, watch};

use super::flush::Flusher;
use super::reserve::Reserve;
use super::{MIGRATIONS, Map, Mutations, SCHEMA_VERSION, Transaction, View, Write};
use crate::error::{Error, Result};

/// Key of the schema's version; it sorts apart from every table, since those keys go on with a NUL.
pub(super) const SCHEMA_KEY: &[u8] = b"schema";
/// Bytes of sled's page cache. Reads never come here, so the least that keeps writes quick is enough.
const CACHE_BYTES: u64 = 16 << 20;
/// The most closures that share one sync.
const GROUP_MAX: usize = 256;

/// How long our own lock may outlive its file: a program that is being started has copies of all files until its exec.
const FORK_LIMIT: Duration = Duration::from_millis(500);
/// How long sled may take to let go of a database that was dropped.
const RELEASE_LIMIT: Duration = Duration::from_secs(10);
/// How long sled may take to close a database of which a write failed.
const CLOSE_LIMIT: Duration = Duration::from_secs(10);

/// Waits until sled's own lock on its file is free: its threads hold it for a moment after a database was dropped, and
/// it does not wait itself. Nobody else has it, which our own lock says.
fn await_release(file: &Path) -> std::io::Result<()> {
    let file = match File::open(file) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(error) => return Err(error),
    };
    let deadline = Instant::now() + RELEASE_LIMIT;
    while let Err(std::fs::TryLockError::WouldBlock) = file.try_lock() {
        if Instant::now() > deadline {
            break;
        }
        std::thread::sleep(Duration::from_millis(2));
    }
    file.unlock()
}

/// Why a database could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// Another process holds the lock.
    #[error(
        "metadata in {} is in use by another process; is gantryd running on this root already? stop it, or choose \
         another folder with --root",
        .0.display()
    )]
    InUse(PathBuf),
    /// The database was written by a newer engine.
    #[error(
        "metadata in {} has schema version {found}, and this gantryd knows versions up to {SCHEMA_VERSION}; run the \
         newer gantryd, or move to it by `gantryd metadata export`",
        path.display()
    )]
    TooNew {
        /// The database.
        path: PathBuf,
        /// Its version.
        found: u32,
    },
    /// The file system refused.
    #[error("cannot {what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
    /// sled refused, or a migration failed.
    #[error("cannot open the metadata in {}: {why}", path.display())]
    Broken {
        /// The database.
        path: PathBuf,
        /// Why.
        why: String,
    },
}

/// A handle on the database; all clones share one writer thread. When the last is dropped, the thread ends and the
/// lock is given back.
#[derive(Clone)]
pub struct Metadata {
    shared: Arc<Shared>,
}

struct Shared {
    published: Arc<ArcSwap<Map>>,
    mutations: watch::Receiver<Mutations>,
    // Both are there until the drop, which closes the queue before it waits for the thread.
    queue: Option<Sender<Job>>,
    writer: Option<std::thread::JoinHandle<()>>,
}

/// One commit: runs the closure, and gives back how to answer its caller. With an error in place of a transaction the
/// closure does not run.
type Job = Box<dyn FnOnce(Result<&mut Transaction>) -> Verdict + Send>;

struct Verdict {
    write: bool,
    /// Called once the group is on disk (or is known not to be, which is then the answer).
    answer: Box<dyn FnOnce(Result<()>)>,
}

impl Metadata {
    /// Opens, or makes, the database in the folder `dir`, and brings its schema up to date.
    pub fn open(dir: &Path) -> std::result::Result<Self, OpenError> {
        let mut reserve = Reserve::of(dir);
        let disk = open_with(dir, &mut reserve)?;
        reserve.keep_room(&disk.log);
        reserve.take();
        let published = Arc::new(ArcSwap::from_pointee(disk.load()?));
        let (queue, jobs) = mpsc::channel();
        let (counter, mutations) = watch::channel(Mutations::default());
        let writer = Writer {
            dir: dir.to_owned(),
            disk: Some(disk),
            reserve,
            published: published.clone(),
            mutations: counter,
        };
        let thread =
            std::thread::Builder::new().name("metadata".into()).spawn(move || writer.run(&jobs)).map_err(
                |source| OpenError::Io { what: "start the writer thread of", path: dir.to_owned(), source },
            )?;
        let metadata = Metadata {
            shared: Arc::new(Shared { published, mutations, queue: Some(queue), writer: Some(thread) }),
        };
        metadata.migrate(dir)?;
        Ok(metadata)
    }

    /// The state after the last commit that is on disk.
    pub fn view(&self) -> View {
        View(Map::clone(&self.shared.published.load()))
    }

    /// The count of commits, to look at or to wait for. What it counts is in a view taken after it was read.
    pub(crate) fn mutations(&self) -> watch::Receiver<Mutations> {
        self.shared.mutations.clone()
    }

    /// Runs the closure on the newest state, on the writer thread, and returns once what it wrote, and what it may have
    /// read, is on disk. When it fails, nothing that it wrote stays. It must not block: everybody's commits wait behind it.
    pub async fn commit<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Transaction) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        trace::span("commit", self.submit(change)).await.unwrap_or_else(|_| Err(writer_gone()))
    }

    /// The same for a caller that is not on the reactor.
    pub fn commit_blocking<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Transaction) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        self.submit(change).blocking_recv().unwrap_or_else(|_| Err(writer_gone()))
    }

    fn submit<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Transaction) -> Result<T> + Send + 'static,
    ) -> oneshot::Receiver<Result<T>> {
        let (job, receiver) = job(change);
        if let Some(queue) = &self.shared.queue {
            // A failed send drops the job and with it the sender: the receiver then says so.
            let _ = queue.send(job);
        }
        receiver
    }

    fn migrate(&self, dir: &Path) -> std::result::Result<(), OpenError> {
        let found = self.view().0.get(SCHEMA_KEY).map(|value| schema_version(value));
        let broken = |why: String| OpenError::Broken { path: dir.to_owned(), why };
        let start = match found {
            Some(None) => return Err(broken("the schema's version is not a number of 4 bytes".into())),
            Some(Some(found)) if found > SCHEMA_VERSION => {
                return Err(OpenError::TooNew { path: dir.to_owned(), found });
            }
            Some(Some(SCHEMA_VERSION)) => return Ok(()),
            Some(Some(found)) => found,
            None => SCHEMA_VERSION,
        };
        self.commit_blocking(move |transaction| {
            for step in &MIGRATIONS[(start.max(1) - 1) as usize..] {
                step(transaction)?;
            }
            transaction.put_raw(SCHEMA_KEY, &SCHEMA_VERSION.to_le_bytes());
            Ok(())
        })
        .map_err(|error| broken(error.to_string()))
    }
}

/// A closure as the writer takes it, and where its answer comes.
fn job<T: Send + 'static>(
    change: impl FnOnce(&mut Transaction) -> Result<T> + Send + 'static,
) -> (Job, oneshot::Receiver<Result<T>>) {
    let (sender, receiver) = oneshot::channel();
    let job = Box::new(move |transaction: Result<&mut Transaction>| {
        let result = transaction.and_then(change);
        Verdict {
            write: result.is_ok(),
            answer: Box::new(move |durable| {
                let _ = sender.send(durable.and(result));
            }),
        }
    });
    (job, receiver)
}

impl Drop for Shared {
    fn drop(&mut self) {
        self.queue = None;
        if let Some(writer) = self.writer.take() {
            // Never from the writer itself: it owns no handle.
            let _ = writer.join();
        }
    }
}

pub(super) fn schema_version(value: &[u8]) -> Option<u32> {
    value.try_into().ok().map(u32::from_le_bytes)
}

fn writer_gone() -> Error {
    Error::unavailable("a metadata commit got no answer: the engine is stopping, or its log names a defect")
}

/// The writer thread's state.
struct Writer {
    dir: PathBuf,
    /// None after a failed write, until it could be opened again.
    disk: Option<Disk>,
    reserve: Reserve,
    published: Arc<ArcSwap<Map>>,
    mutations: watch::Sender<Mutations>,
}

impl Writer {
    fn run(mut self, jobs: &Receiver<Job>) {
        while let Ok(first) = jobs.recv() {
            if let Err(error) = self.ensure_open() {
                // What is published may be behind what is on disk, so the closure does not even run.
                (first(Err(error.clone())).answer)(Err(error));
                continue;
            }
            self.group(first, jobs);
        }
    }

    /// Runs what is queued, writes all of it as one batch, and answers.
    fn group(&mut self, first: Job, jobs: &Receiver<Job>) {
        let durable = Map::clone(&self.published.load());
        let mut map = durable.clone();
        let mut writes: Vec<Write> = Vec::new();
        let mut answers = Vec::new();
        let mut wrote = false;
        if let Some(disk) = &self.disk {
            self.reserve.keep_room(&disk.log);
        }
        let may_add = self.reserve.take();
        let mut count = Mutations::default();
        let mut next = Some(first);
        while let Some(job) = next.take() {
            let mut transaction = Transaction::new(map.clone(), durable.clone());
            // A panic in a closure is that caller's defect (it sees its sender dropped), not the others' loss.
            match std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| job(Ok(&mut transaction)))) {
                Ok(verdict) if verdict.write && !may_add && transaction.only_adds() => {
                    (verdict.answer)(Err(self.full()));
                }
                Ok(verdict) if verdict.write => {
                    wrote |= !transaction.writes.is_empty();
                    count.commits += u64::from(!transaction.writes.is_empty());
                    count.releases += u64::from(transaction.released);
                    writes.extend(transaction.writes);
                    map = transaction.map;
                    answers.push(verdict.answer);
                }
                // It may have failed for what an earlier closure wrote, which is no answer before it is on disk.
                Ok(verdict) if wrote => answers.push(verdict.answer),
                Ok(verdict) => (verdict.answer)(Ok(())),
                Err(_) => tracing::error!("a metadata commit panicked and was left out"),
            }
            if answers.len() < GROUP_MAX {
                next = jobs.try_recv().ok();
            }
        }
        let durable = if wrote { self.write(&writes) } else { Ok(()) };
        if durable.is_ok() && wrote {
            self.published.store(Arc::new(map));
            sys::failpoint!("metadata.commit.published");
            self.mutations.send_modify(|all| {
                all.commits += count.commits;
                all.releases += count.releases;
            });
        }
        for answer in answers {
            answer(durable.clone());
        }
    }

    fn write(&mut self, writes: &[Write]) -> Result<()> {
        let Some(disk) = &self.disk else { return Err(writer_gone()) };
        let Err(error) = disk.apply(batch(writes)) else { return Ok(()) };
        let why = Error::io("write the metadata in", &self.dir, &error);
        tracing::error!(error = %why, "a metadata commit failed; the database is opened anew");
        // First the space, since to close the database writes, too.
        let released = self.reserve.release();
        self.close();
        if !released {
            return Err(why);
        }
        // The same once more: whether it is there already or not, it is there then.
        let disk = Disk::open(&self.dir).map_err(|error| Error::unavailable(error.to_string()))?;
        disk.apply(batch(writes)).map_err(|error| Error::io("write the metadata in", &self.dir, &error))?;
        self.disk = Some(disk);
        Ok(())
    }

    /// Closes the database after a failed write. When the file of a large value cannot be written, sled keeps the place that it
    /// had claimed for it in its log, and then waits for that place to be filled for as long as it is open, and when it is closed.
    /// It cannot be told to let go, nor opened a second time; but an engine that is started anew finds all that was acknowledged.
    fn close(&mut self) {
        let Some(disk) = self.disk.take() else { return };
        let (sender, closed) = mpsc::channel();
        let closing = std::thread::Builder::new().name("metadata-close".into()).spawn(move || {
            drop(disk);
            let _ = sender.send(());
        });
        if closing.is_ok() && closed.recv_timeout(CLOSE_LIMIT) == Err(RecvTimeoutError::Timeout) {
            let dir = self.dir.display();
            tracing::error!(%dir, "the database cannot be closed after a failed write; the engine ends, to be started anew");
            std::process::exit(1);
        }
    }

    /// Why nothing is added.
    fn full(&self) -> Error {
        Error::io("add to the metadata in", &self.dir, &std::io::ErrorKind::StorageFull.into())
    }

    fn ensure_open(&mut self) -> Result<()> {
        if self.disk.is_some() {
            return Ok(());
        }
        let disk =
            open_with(&self.dir, &mut self.reserve).map_err(|error| Error::unavailable(error.to_string()))?;
        // What is on disk is the truth: a batch whose sync failed may be there or not, but whole in either case.
        self.published.store(Arc::new(disk.load().map_err(|error| Error::unavailable(error.to_string()))?));
        self.disk = Some(disk);
        Ok(())
    }
}

fn batch(writes: &[Write]) -> sled::Batch {
    let mut batch = sled::Batch::default();
    for (key, value) in writes {
        match value {
            Some(value) => batch.insert(&key[..], &value[..]),
            None => batch.remove(&key[..]),
        }
    }
    batch
}

/// Opens the database, with what is kept for a full disk if that is what it takes.
fn open_with(dir: &Path, reserve: &mut Reserve) -> std::result::Result<Disk, OpenError> {
    match Disk::open(dir) {
        // Another process's lock says nothing of the disk, and a log that is damaged is left as it is.
        Err(error) if !matches!(error, OpenError::InUse(_)) && reserve.is_disk_full() => {
            // Nobody writes to the log while it lets go of what is behind its end.
            let given_up = reserve.release()
                || (await_release(&log_of(dir)).is_ok() && reserve.give_up_room(&log_of(dir)));
            if !given_up {
                return Err(error);
            }
            tracing::warn!(%error, "the database is opened with the space that is kept for a full disk");
            Disk::open(dir)
        }
        opened => opened,
    }
}

/// The file that the database writes to.
fn log_of(dir: &Path) -> PathBuf {
    dir.join("sled/db")
}

/// sled, with what it lacks.
pub(super) struct Disk {
    // Declared first: it has the database open as well.
    flusher: Flusher,
    db: sled::Db,
    log: File,
    dir: PathBuf,
    // Declared last, so that it is given back after sled has closed.
    _lock: File,
}

impl Disk {
    pub(super) fn open(dir: &Path) -> std::result::Result<Self, OpenError> {
        let io = |what: &'static str, path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::Io { what, path, source }
        };
        fs::create_dir_all(dir).map_err(io("create the folder", dir))?;
        let lock_path = dir.join("lock");
        let lock = sys::fs::lock(&lock_path, FORK_LIMIT).map_err(io("lock", &lock_path))?;
        let lock = lock.ok_or_else(|| OpenError::InUse(dir.to_owned()))?;
        let path = dir.join("sled");
        for entry in fs::read_dir(&path).into_iter().flatten().flatten() {
            let name = entry.file_name();
            let name = name.to_string_lossy();
            if name.starts_with("snap.") && name.ends_with(".generating") {
                tracing::warn!(file = %entry.path().display(), "removed a half-written file of an earlier crash");
                fs::remove_file(entry.path()).map_err(io("remove", &entry.path()))?;
            }
        }
        let broken = |error: sled::Error| OpenError::Broken { path: path.clone(), why: error.to_string() };
        await_release(&log_of(dir)).map_err(io("lock", &path))?;
        let db = sled::Config::default()
            .path(&path)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(None)
            .open()
            .map_err(broken)?;
        let log_path = log_of(dir);
        let log = File::options().read(true).write(true).open(&log_path).map_err(io("open", &log_path))?;
        let flusher = Flusher::of(&db).map_err(io("start a thread for", &path))?;
        let disk = Disk { flusher, db, log, dir: dir.to_owned(), _lock: lock };
        // Once, so that the names of new files survive a power cut: sled's folder, ours, and our name in the parent.
        disk.flusher.flush(&disk.db).map_err(broken)?;
        disk.log.sync_all().map_err(io("sync", &log_path))?;
        for folder in [Some(path.as_path()), Some(dir), dir.parent()].into_iter().flatten() {
            File::open(folder).and_then(|folder| folder.sync_all()).map_err(io("sync the folder", folder))?;
        }
        Ok(disk)
    }

    pub(super) fn load(&self) -> std::result::Result<Map, OpenError> {
        let mut map = Map::new();
        for entry in self.db.iter() {
            let (key, value) = entry
                .map_err(|error| OpenError::Broken { path: self.dir.clone(), why: error.to_string() })?;
            map.insert(Arc::from(&key[..]), Arc::from(&value[..]));
        }
        Ok(map)
    }

    pub(super) fn apply(&self, batch: sled::Batch) -> std::io::Result<()> {
        let to_io = |error: sled::Error| match error {
            sled::Error::Io(error) => error,
            other => std::io::Error::other(other.to_string()),
        };
        sys::failpoint!("metadata.commit.begin");
        self.db.apply_batch(batch).map_err(to_io)?;
        sys::failpoint!("metadata.commit.applied");
        self.flusher.flush(&self.db).map_err(to_io)?;
        sys::failpoint!("metadata.commit.flushed");
        self.log.sync_data()?;
        sys::failpoint!("metadata.commit.synced");
        Ok(())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        // What sled flushes when it is closed, while there is somebody who wakes it. Nothing of it was acknowledged.
        let _ = self.flusher.flush(&self.db);
    }
}

#[cfg(test)]
mod tests {
    use super::super::Read as _;
    use super::super::namespaces::NamespaceRecord;
    use super::*;

    fn put(txn: &mut Transaction, name: &str) -> Result<()> {
        txn.put(&[name], &NamespaceRecord::default())
    }

    /// A writer whose disk failed.
    fn broken(dir: &Path) -> Writer {
        Writer {
            dir: dir.to_owned(),
            disk: None,
            reserve: Reserve::of(dir),
            published: Arc::default(),
            mutations: watch::Sender::default(),
        }
    }

    #[test]
    fn an_error_drawn_from_what_was_never_written_is_not_told() {
        let (queue, jobs) = mpsc::channel();
        let (first, wrote) = job(|txn| put(txn, "a"));
        let (second, failed) = job(|txn| -> Result<()> {
            assert!(txn.has::<NamespaceRecord>(&["a"])? && !txn.durable().has::<NamespaceRecord>(&["a"])?);
            Err(Error::already_exists("a"))
        });
        queue.send(second).unwrap();
        broken(Path::new("/nowhere")).group(first, &jobs);
        assert_eq!(failed.blocking_recv().unwrap(), Err(writer_gone()));
        assert_eq!(wrote.blocking_recv().unwrap(), Err(writer_gone()));
    }

    #[test]
    fn nothing_runs_on_a_state_that_may_be_old() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let (queue, jobs) = mpsc::channel();
        let (refused, answer) = job(|_| -> Result<()> { panic!("it ran") });
        queue.send(refused).unwrap();
        drop(queue);
        // A file where the folder should be: it cannot be opened again.
        broken(file.path()).run(&jobs);
        assert!(matches!(answer.blocking_recv().unwrap(), Err(Error::Unavailable(_))));
    }
}
