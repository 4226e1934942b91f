//! Blobs of a registry, into ingests that outlive what interrupts them.
//!
//! ```text
//!  ingest REF (containerd's: layer-DIGEST, manifest-DIGEST ...)
//!    open, or go on at its offset --> chunks of the registry --> file and hash --> whole: size and digest checked
//!    held by another writer: wait; then the blob is there, or the ingest is ours
//!  whole ingests stay open until [`Fetch::commit`] makes all of them blobs; one that another waits for, at once
//! ```
//!
//! Invariants: no byte of an ingest is fetched twice, and none of a blob that is there. More bytes than were announced are
//! cut off at once. What turns out not to have its digest is thrown away, so that no later try goes on with it; everything
//! else that fails leaves the ingest. Who waits for another's ingest holds none that the other could wait for: those that
//! are whole are given up on demand, and the others end by themselves.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use futures::stream::{self, StreamExt as _};
use oci::Digest;
use oci::image::{Descriptor, media_type};
use parking_lot::Mutex;
use proto::containerd::services::content::v1::Info;
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::arrival::{Arrival, Growth};
use super::blobs::label;
use super::given_up;
use super::progress::Job;
use crate::content::{Complete, Content, Writer};
use crate::context::RequestContext;
use crate::error::{Error, Result, blocking};
use crate::labels::Labels;
use crate::remotes::Repository;

/// Bytes that are written at a time, at least: what one read of a connection brings is at most some 400 KiB, and all of it is kept until then.
const BATCH: usize = 128 << 10;
/// The longest label that tells a blob's sources; those that do not fit are left out.
const SOURCES: usize = 4000;

/// What a transfer fetches. Its blobs become so together, at its end.
pub(super) struct Fetch {
    pub(super) content: Content,
    pub(super) context: RequestContext,
    repository: Repository,
    downloads: Arc<Semaphore>,
    /// How much of a blob is fetched by one of several requests; 0 for all of it.
    piece: u64,
    /// How many of them are under way for one blob.
    pieces: usize,
    pub(super) stop: CancellationToken,
    held: Arc<Mutex<BTreeMap<Digest, Held>>>,
    /// Ends with the transfer: those who watch for others then do no more.
    over: CancellationToken,
    watching: Mutex<JoinSet<()>>,
    /// Labels that blobs are to have at the end.
    labels: Mutex<BTreeMap<Digest, Labels>>,
}

/// A whole ingest.
struct Held {
    writer: Writer,
    size: u64,
}

impl Fetch {
    /// So many downloads at a time, each by so many requests for pieces of this size, or for 0 by one for all.
    pub(super) fn new(
        content: Content,
        context: RequestContext,
        repository: Repository,
        downloads: usize,
        piece: u64,
        stop: CancellationToken,
    ) -> Self {
        Fetch {
            content,
            context,
            repository,
            downloads: Arc::new(Semaphore::new(downloads.max(1))),
            piece,
            pieces: downloads.max(1),
            stop,
            held: Arc::default(),
            over: CancellationToken::new(),
            watching: Mutex::default(),
            labels: Mutex::default(),
        }
    }

    /// Fetches one blob, unless it is there. The reader of `arrival` gets it as it comes.
    pub(super) async fn fetch(&self, wanted: &Descriptor, arrival: &Arrival, job: &Job) -> Result<()> {
        let fetched = tokio::select! {
            () = self.stop.cancelled() => Err(given_up()),
            opened = self.open(wanted) => match opened {
                Ok(Some(writer)) => self.write(writer, wanted, arrival, job).await,
                Ok(None) => self.find(wanted, arrival, job).await,
                Err(error) => Err(error),
            },
        };
        fetched.map_err(|error| {
            let error = error.context(format!("fetch {} ({})", wanted.digest, wanted.media_type));
            arrival.fail(&error);
            error
        })
    }

    /// A whole document of at most `limit` bytes.
    pub(super) async fn document(&self, wanted: &Descriptor, limit: u64, job: &Job) -> Result<Vec<u8>> {
        use std::io::Read as _;
        if wanted.size > limit {
            return Err(Error::invalid_argument(format!(
                "{} ({}) of {} bytes is larger than the limit of {limit} for its kind",
                wanted.digest, wanted.media_type, wanted.size
            )));
        }
        let arrival = Arrival::new();
        self.fetch(wanted, &arrival, job).await?;
        let reader = arrival.reader(Arc::default()).await?;
        let digest = wanted.digest.clone();
        blocking(move || {
            let mut bytes = Vec::new();
            reader
                .take(limit)
                .read_to_end(&mut bytes)
                .map_err(|error| Error::unknown(format!("read {digest}: {error}")))?;
            let mut hasher = digest.algorithm().hasher();
            hasher.update(&bytes);
            if hasher.finish() != digest {
                return Err(Error::data_loss(format!(
                    "blob {digest} is damaged in the store; delete it and pull again"
                )));
            }
            Ok(bytes)
        })
        .await
    }

    async fn open(&self, wanted: &Descriptor) -> Result<Option<Writer>> {
        // Fetched by this transfer before.
        if self.held.lock().contains_key(&wanted.digest) {
            return Ok(None);
        }
        let reference = reference(wanted);
        let opened = self.content.resumable_writer(&self.context, &reference, wanted.size, &wanted.digest);
        match opened.await {
            Ok(writer) => Ok(Some(writer)),
            Err(Error::AlreadyExists(_)) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// A blob that is there.
    async fn find(&self, wanted: &Descriptor, arrival: &Arrival, job: &Job) -> Result<()> {
        let held = {
            let held = self.held.lock();
            held.get(&wanted.digest).map(|held| held.writer.reader().map(|file| (file, held.size)))
        };
        let (file, size) = match held {
            Some(held) => held?,
            None => {
                let (content, context) = (self.content.clone(), self.context.clone());
                let digest = wanted.digest.clone();
                blocking(move || content.open_blob(&context, &digest)).await?
            }
        };
        check_size(wanted, size)?;
        arrival.begin(Growth::whole(file, size));
        job.exists();
        Ok(())
    }

    async fn write(
        &self,
        mut writer: Writer,
        wanted: &Descriptor,
        arrival: &Arrival,
        job: &Job,
    ) -> Result<()> {
        if writer.offset() > wanted.size {
            writer = blocking(move || writer.truncate().map(|()| writer)).await?;
        }
        // What was there as a whole is told to nobody before it has been checked.
        let growth = Growth::new(writer.reader()?, writer.offset());
        job.progress.store(writer.offset(), Ordering::Relaxed);
        if writer.offset() < wanted.size {
            let permit = self.downloads.acquire().await.map_err(|_| given_up())?;
            arrival.begin(growth.clone());
            let downloaded = self.download(writer, wanted, &growth, job).await;
            drop(permit);
            writer = downloaded?;
        }
        let found = writer.digest();
        if found != wanted.digest {
            if let Err(error) = writer.discard().await {
                tracing::warn!(%error, "an ingest with a wrong digest stays");
            }
            return Err(Error::failed_precondition(format!(
                "the bytes that came have the digest {found}; the registry, or who stands before it, gave something else"
            )));
        }
        growth.end(Ok(()));
        arrival.begin(growth);
        job.complete();
        self.hold(writer, wanted);
        Ok(())
    }

    /// Fetches what an ingest lacks. After an error it stays as far as it has come.
    async fn download(
        &self,
        mut writer: Writer,
        wanted: &Descriptor,
        growth: &Arc<Growth>,
        job: &Job,
    ) -> Result<Writer> {
        let offset = writer.offset();
        if self.piece > 0 && wanted.size - offset > self.piece && self.is_ranged(wanted, offset).await? {
            return self.download_pieces(writer, wanted, growth, job).await;
        }
        let mut body = tokio::select! {
            () = self.stop.cancelled() => return Err(given_up()),
            body = self.repository.fetch(wanted, offset, None) => body?,
        };
        let mut skip = offset.checked_sub(body.offset()).ok_or_else(|| {
            Error::internal(format!("a body begins at {} and was to at {offset}", body.offset()))
        })?;
        let mut over = false;
        while !over {
            let (mut batch, mut length) = (Vec::new(), 0);
            let mut failed = None;
            while length < BATCH {
                let chunk = tokio::select! {
                    () = self.stop.cancelled() => Err(given_up()),
                    chunk = body.chunk() => chunk,
                };
                match chunk {
                    Ok(Some(mut chunk)) => {
                        let unwanted =
                            usize::try_from(skip).map_or(chunk.len(), |skip| skip.min(chunk.len()));
                        drop(chunk.split_to(unwanted));
                        skip -= unwanted as u64;
                        length += chunk.len();
                        batch.push(chunk);
                    }
                    Ok(None) => {
                        over = true;
                        break;
                    }
                    Err(error) => {
                        failed = Some(error);
                        break;
                    }
                }
            }
            if writer.offset() + length as u64 > wanted.size {
                // None of it can be what was announced.
                writer.discard().await?;
                return Err(Error::failed_precondition(format!(
                    "the registry sends more than the {} bytes that were announced",
                    wanted.size
                )));
            }
            writer = self.append(writer, batch).await?;
            growth.grow(writer.offset());
            job.progress.store(writer.offset(), Ordering::Relaxed);
            if let Some(error) = failed {
                return Err(error);
            }
        }
        if writer.offset() < wanted.size {
            return Err(Error::unavailable(format!(
                "the registry ended after {} of {} bytes; pull again to go on there",
                writer.offset(),
                wanted.size
            )));
        }
        Ok(writer)
    }

    /// Whether the registry gives parts of a blob, so that several can be asked for at a time.
    async fn is_ranged(&self, wanted: &Descriptor, offset: u64) -> Result<bool> {
        tokio::select! {
            () = self.stop.cancelled() => Err(given_up()),
            body = self.repository.fetch(wanted, offset, Some(1)) => Ok(body?.is_ranged()),
        }
    }

    /// Fetches what an ingest lacks by several requests at a time, each for one piece. They are written in order, so that no
    /// more than so many pieces are in memory, and the ingest has no gaps.
    async fn download_pieces(
        &self,
        mut writer: Writer,
        wanted: &Descriptor,
        growth: &Arc<Growth>,
        job: &Job,
    ) -> Result<Writer> {
        let mut from = writer.offset();
        let pieces = std::iter::from_fn(|| {
            let piece = (from, self.piece.min(wanted.size - from));
            from += piece.1;
            (piece.1 > 0).then_some(piece)
        });
        let fetched = stream::iter(pieces.map(|(offset, length)| self.piece(wanted, offset, length)));
        let fetched = fetched.buffered(self.pieces);
        tokio::pin!(fetched);
        loop {
            let next = tokio::select! {
                () = self.stop.cancelled() => return Err(given_up()),
                next = fetched.next() => next,
            };
            let Some(bytes) = next else { return Ok(writer) };
            writer = self.append(writer, bytes?).await?;
            growth.grow(writer.offset());
            job.progress.store(writer.offset(), Ordering::Relaxed);
        }
    }

    /// One piece of a blob, all of it.
    async fn piece(&self, wanted: &Descriptor, offset: u64, length: u64) -> Result<Vec<Bytes>> {
        let mut body = self.repository.fetch(wanted, offset, Some(length)).await?;
        let (mut at, end) = (body.offset(), offset + length);
        let mut bytes = Vec::new();
        while at < end {
            let Some(mut chunk) = body.chunk().await? else {
                return Err(Error::unavailable(format!(
                    "the registry ended after {at} of {} bytes; pull again to go on there",
                    wanted.size
                )));
            };
            let begin = at;
            at += chunk.len() as u64;
            if at > end {
                chunk.truncate(chunk.len() - usize::try_from(at - end).unwrap_or(chunk.len()));
            }
            if begin < offset {
                let before =
                    usize::try_from(offset - begin).map_or(chunk.len(), |skip| skip.min(chunk.len()));
                drop(chunk.split_to(before));
            }
            bytes.push(chunk);
        }
        Ok(bytes)
    }

    async fn append(&self, mut writer: Writer, batch: Vec<Bytes>) -> Result<Writer> {
        let written = blocking(move || {
            let written = batch.iter().try_for_each(|bytes| writer.write(bytes));
            Ok((writer, written))
        });
        match written.await? {
            (writer, Ok(())) => Ok(writer),
            (writer, Err(error)) => {
                // A disk is full: give back what this ingest has of it.
                if matches!(error, Error::ResourceExhausted(_)) {
                    writer.discard().await?;
                }
                Err(error)
            }
        }
    }

    /// Keeps a whole ingest for the end, or until another waits for it.
    fn hold(&self, writer: Writer, wanted: &Descriptor) {
        let (digest, over) = (wanted.digest.clone(), self.over.clone());
        let asked = writer.wanted();
        self.held.lock().insert(digest.clone(), Held { writer, size: wanted.size });
        let held = self.held.clone();
        self.watching.lock().spawn(async move {
            tokio::select! {
                () = over.cancelled() => return,
                () = asked => {}
            }
            let Some(Held { writer, size }) = held.lock().remove(&digest) else { return };
            match writer.commit(size, Some(digest), Labels::new()).await {
                Ok(_) | Err(Error::AlreadyExists(_)) => {}
                // It stays as a whole ingest; what needs it says what is missing.
                Err(error) => {
                    tracing::warn!(%error, "a blob that another pull waits for cannot be committed");
                }
            }
        });
    }

    /// Says that a blob is to have these labels at the end, besides those it has.
    pub(super) fn label(&self, digest: &Digest, labels: Labels) {
        self.labels.lock().entry(digest.clone()).or_default().extend(labels);
    }

    /// Makes all that was fetched blobs with their labels. `synced`: what they consist of is on disk.
    pub(super) async fn commit(&self, synced: bool) -> Result<()> {
        let held = self.settle().await;
        let mut labels = std::mem::take(&mut *self.labels.lock());
        let source = self.repository.source_label();
        let path = self.repository.reference().path().to_owned();
        let complete = held.into_iter().map(|(digest, Held { writer, size })| {
            let mut labels = labels.remove(&digest).unwrap_or_default();
            labels.insert(source.clone(), path.clone());
            Complete { writer, size, digest, labels }
        });
        self.content.commit_all(complete.collect(), synced).await?;
        // Those that were there before.
        let rest = labels.into_iter().map(|(digest, labels)| self.relabel(digest, labels, &source, &path));
        futures::future::try_join_all(rest).await.map(drop)
    }

    async fn relabel(&self, digest: Digest, mut labels: Labels, source: &str, path: &str) -> Result<()> {
        let Info { labels: before, .. } = self.content.info(&self.context, &digest)?;
        let known = before.get(source).map_or("", String::as_str);
        if !known.split(',').any(|known| known == path) {
            let all = if known.is_empty() { path.to_owned() } else { format!("{known},{path}") };
            if source.len() + all.len() <= SOURCES {
                labels.insert(source.to_owned(), all);
            }
        }
        labels.retain(|key, value| before.get(key) != Some(value));
        if labels.is_empty() {
            return Ok(());
        }
        label(&self.content, &self.context, &digest, labels).await
    }

    /// Leaves what was fetched as ingests, for the next pull. They are not synced: what a power cut leaves of them is hashed
    /// again, and who gives up is not to wait for the disk.
    pub(super) async fn leave(&self) {
        drop(self.settle().await);
    }

    /// What is held, once nobody else takes of it.
    async fn settle(&self) -> BTreeMap<Digest, Held> {
        self.over.cancel();
        let mut watching = std::mem::take(&mut *self.watching.lock());
        while watching.join_next().await.is_some() {}
        std::mem::take(&mut *self.held.lock())
    }
}

fn check_size(wanted: &Descriptor, size: u64) -> Result<()> {
    if size == wanted.size {
        return Ok(());
    }
    Err(Error::failed_precondition(format!(
        "{} has {size} bytes, but is said to have {}",
        wanted.digest, wanted.size
    )))
}

/// What the ingest of a blob is called, as containerd's clients look for it.
pub(super) fn reference(blob: &Descriptor) -> String {
    const NAME: &str = "org.opencontainers.image.ref.name";
    let kind = match blob.media_type.as_str() {
        kind if media_type::is_manifest(kind) => "manifest",
        kind if media_type::is_index(kind) => "index",
        kind if media_type::is_layer(kind) => "layer",
        kind if media_type::is_config(kind) => "config",
        kind if kind.starts_with("application/vnd.in-toto") => "attestation",
        _ => "unknown",
    };
    match blob.annotations.get(NAME) {
        Some(name) => format!("{kind}-{name}@{}", blob.digest),
        None => format!("{kind}-{}", blob.digest),
    }
}
