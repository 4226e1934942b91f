//! Content: blobs by digest, and the ingests that make them.
//!
//! ```text
//!            open (Writer)                 commit
//!  (nothing) --------------> ingest REF -----------> blob DIGEST of this namespace
//!                              |    ^  write, suspend, resume
//!                              v    |
//!                            (abort, or 24 hours without a lease)
//! ```
//!
//! The bytes of a blob are stored once for all namespaces; each namespace has a record of those it has. A namespace that
//! opens an ingest for a digest which another has gets an ingest that is complete already, and need only commit it.
//!
//! Invariants: a record commits after its blob is synced. A blob's file goes after the last record that names it is gone;
//! both are decided on the metadata's writer thread, so a commit and a removal of the same blob cannot cross. One writer at
//! a time has an ingest.

mod session;
mod store;

use std::borrow::Cow;
use std::fs::File;
use std::io::{Read as _, Seek as _, SeekFrom};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::Stream;
use oci::{Algorithm, Digest};
use proto::containerd::events::{ContentCreate, ContentDelete};
use proto::containerd::services::content::v1::{Info, Status};

pub use session::Session;
use store::{Finished, Ingest, Store};

use crate::context::{Namespace, RequestContext};
use crate::error::{Error, Result, blocking, outlive};
use crate::events::Exchange;
use crate::filters::{self, Filter};
use crate::labels::{self, Labels};
use crate::leases;
use crate::metadata::content::{BlobRecord, IngestRecord};
use crate::metadata::leases::LeaseResource;
use crate::metadata::namespaces::NamespaceRecord;
use crate::metadata::{Metadata, Read, Transaction};

/// The store's folder beneath the engine's root; clients know it.
pub const FOLDER: &str = "io.containerd.content.v1.content";
/// How long an ingest without a lease is kept.
const INGEST_LIFE: Duration = Duration::from_secs(24 * 3600);
/// Bytes in one piece of a blob that is read.
const PIECE: u64 = 1 << 20;

/// The content of all namespaces; cheap to clone.
#[derive(Clone)]
pub struct Content {
    metadata: Metadata,
    events: Exchange,
    store: Store,
    /// Sequence number of the next ingest's key.
    sequence: Arc<AtomicU64>,
}

/// An open ingest. Dropping it, or better [`Writer::suspend`], leaves the ingest to be resumed.
pub struct Writer {
    content: Content,
    context: RequestContext,
    namespace: Namespace,
    reference: String,
    key: String,
    data: Data,
}

/// Where the bytes of an ingest are.
enum Data {
    Own(Box<Ingest>),
    /// Another namespace's blob, all of it.
    Shared {
        digest: Digest,
        size: u64,
        started_at: SystemTime,
    },
}

enum Opened {
    Exists,
    Shared { key: String, digest: Digest, size: u64 },
    Own { key: String },
}

impl Content {
    /// Opens the store under `root` and tidies up: ingests whose time is over, and files that no record knows. Blocks.
    pub fn open(root: &Path, metadata: Metadata, events: Exchange) -> Result<Self> {
        let store = Store::open(root)?;
        let ingests = metadata.view().list::<IngestRecord>(&[]);
        let highest = ingests.iter().filter_map(|(_, ingest)| sequence_of(&ingest.key)).max().unwrap_or(0);
        let content = Content { metadata, events, store, sequence: Arc::new(AtomicU64::new(highest + 1)) };
        content.tidy(ingests)?;
        Ok(content)
    }

    fn tidy(&self, ingests: Vec<(Vec<String>, IngestRecord)>) -> Result<()> {
        let now = SystemTime::now();
        let mut over = Vec::new();
        let mut known = std::collections::HashSet::new();
        for (parts, ingest) in ingests {
            let expired = ingest
                .expires_at
                .is_some_and(|time| SystemTime::try_from(time).is_ok_and(|time| time <= now));
            if expired || (ingest.shared.is_empty() && self.store.status(&ingest.key)?.is_none()) {
                over.push(parts);
            } else {
                known.insert(ingest.key);
            }
        }
        for (folder, key) in self.store.ingests()? {
            if !key.is_some_and(|key| known.contains(&key)) {
                tracing::info!(folder = %folder.display(), "removing an ingest that is over");
                sys::fs::remove_tree(&folder).map_err(|error| Error::io("remove ingest", &folder, &error))?;
            }
        }
        if over.is_empty() {
            return Ok(());
        }
        self.metadata.commit_blocking(move |txn| {
            for parts in &over {
                let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
                txn.delete::<IngestRecord>(&parts)?;
            }
            Ok(())
        })
    }

    /// One blob; NotFound when this namespace has none of this digest.
    pub fn info(&self, context: &RequestContext, digest: &Digest) -> Result<Info> {
        let namespace = context.namespace()?;
        let record = self.metadata.view().get::<BlobRecord>(&[namespace.as_str(), digest.as_str()])?;
        record.map(|record| info(digest.as_str(), record)).ok_or_else(|| missing(digest))
    }

    /// The blobs that pass the filters (`digest`, `size`, `labels.KEY`).
    pub fn list(&self, context: &RequestContext, filters: &[String]) -> Result<Vec<Info>> {
        let namespace = context.namespace()?;
        let filter = Filter::parse_all(filters)?;
        let all = self.metadata.view().list::<BlobRecord>(&[namespace.as_str()]);
        Ok(all
            .into_iter()
            .map(|(parts, record)| info(&parts.concat(), record))
            .filter(|info| filter.matches(|path| info_field(info, path)))
            .collect())
    }

    /// Changes a blob's labels: all of them, or those that the mask names (`labels`, `labels.KEY`).
    pub async fn update(&self, context: &RequestContext, new: Info, mask: Vec<String>) -> Result<Info> {
        let namespace = context.namespace()?.clone();
        let digest = parse_digest(&new.digest)?;
        let this = self.clone();
        outlive(async move {
            this.metadata
                .commit(move |txn| {
                    let key = [namespace.as_str(), digest.as_str()];
                    let mut record = txn.get::<BlobRecord>(&key)?.ok_or_else(|| missing(&digest))?;
                    update_labels(&mut record.labels, &new.labels, &mask, "content")?;
                    record.updated_at = Some(SystemTime::now().into());
                    txn.put(&key, &record)?;
                    Ok(info(digest.as_str(), record))
                })
                .await
        })
        .await
    }

    /// Takes a blob from this namespace; its file goes when no namespace has it any more.
    pub async fn delete(&self, context: &RequestContext, digest: Digest) -> Result<()> {
        let namespace = context.namespace()?.clone();
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            let (key, blob) = (namespace.clone(), digest.clone());
            this.metadata
                .commit(move |txn| {
                    if !txn.delete::<BlobRecord>(&[key.as_str(), blob.as_str()])? {
                        return Err(missing(&blob));
                    }
                    txn.release();
                    leave_lease(txn, &context, leases::CONTENT, blob.as_str())
                })
                .await?;
            this.events.publish(&namespace, "/content/delete", &ContentDelete { digest: digest.to_string() });
            this.remove_unused(vec![digest]).await;
            Ok(())
        })
        .await
    }

    /// Removes the files of those of these blobs that no record names.
    pub(crate) async fn remove_unused(&self, digests: Vec<Digest>) {
        for digest in digests {
            self.remove_unused_blob(digest).await;
        }
    }

    /// Removes the file of a blob that no record names. That nobody needs it holds on the metadata's writer thread, so
    /// that is where it is taken out of the store.
    async fn remove_unused_blob(&self, digest: Digest) {
        let store = self.store.clone();
        let taken = self.metadata.commit(move |txn| {
            let namespaces = txn.list::<NamespaceRecord>(&[]);
            for (parts, _) in namespaces {
                if txn.has::<BlobRecord>(&[&parts.concat(), digest.as_str()])? {
                    return Ok(None);
                }
            }
            if txn.list::<IngestRecord>(&[]).iter().any(|(_, ingest)| ingest.shared == digest.as_str()) {
                return Ok(None);
            }
            store.take_out(&digest)
        });
        let removed = match taken.await {
            Ok(Some(path)) => {
                blocking(move || {
                    std::fs::remove_file(&path).map_err(|error| Error::io("remove", &path, &error))
                })
                .await
            }
            Ok(None) => Ok(()),
            Err(error) => Err(error),
        };
        if let Err(error) = removed {
            tracing::warn!(%error, "the file of a deleted blob stays until it is collected");
        }
    }

    /// Opens a blob's file; its size. Blocks for as long as an open takes.
    pub fn open_blob(&self, context: &RequestContext, digest: &Digest) -> Result<(File, u64)> {
        let info = self.info(context, digest)?;
        let path = self.store.blob_path(digest);
        let file = File::open(&path).map_err(|error| Error::io("open the blob", &path, &error))?;
        Ok((file, u64::try_from(info.size).unwrap_or(0)))
    }

    /// A blob from `offset` on, `size` bytes or, for 0, all: pieces with their offsets. OutOfRange past the end.
    pub async fn read(
        &self,
        context: &RequestContext,
        digest: Digest,
        offset: u64,
        size: u64,
    ) -> Result<impl Stream<Item = Result<(u64, Bytes)>> + Send + 'static> {
        let (this, context) = (self.clone(), context.clone());
        let (file, length) = blocking(move || {
            let (mut file, length) = this.open_blob(&context, &digest)?;
            if offset > length {
                return Err(Error::out_of_range(format!(
                    "blob {digest} has {length} bytes; there is nothing at {offset}"
                )));
            }
            let path = this.store.blob_path(&digest);
            file.seek(SeekFrom::Start(offset)).map_err(|error| Error::io("read", path, &error))?;
            Ok((file, length))
        })
        .await?;
        let end = if size == 0 { length } else { length.min(offset.saturating_add(size)) };
        // One piece at a time: a slow reader holds one piece of memory and no thread.
        Ok(futures::stream::try_unfold((file, offset), move |(file, offset)| async move {
            if offset >= end {
                return Ok(None);
            }
            let (file, piece) = blocking(move || read_piece(file, PIECE.min(end - offset))).await?;
            let next = offset + piece.len() as u64;
            Ok(Some(((offset, piece), (file, next))))
        }))
    }

    /// One ingest; NotFound when there is none of this ref.
    pub async fn status(&self, context: &RequestContext, reference: &str) -> Result<Status> {
        let namespace = context.namespace()?;
        let record = self
            .metadata
            .view()
            .get::<IngestRecord>(&[namespace.as_str(), reference])?
            .ok_or_else(|| missing_ingest(reference))?;
        let (store, reference) = (self.store.clone(), reference.to_owned());
        blocking(move || status_of(&store, &reference, &record)?.ok_or_else(|| missing_ingest(&reference)))
            .await
    }

    /// The ingests that pass the filters (`ref`).
    pub async fn list_statuses(&self, context: &RequestContext, filters: &[String]) -> Result<Vec<Status>> {
        let namespace = context.namespace()?;
        let filter = Filter::parse_all(filters)?;
        let all = self.metadata.view().list::<IngestRecord>(&[namespace.as_str()]);
        let store = self.store.clone();
        blocking(move || {
            let mut statuses = Vec::new();
            for (parts, record) in all {
                let reference = parts.concat();
                let passes =
                    filter.matches(|path| (path == ["ref"]).then_some(Cow::Borrowed(reference.as_str())));
                if passes && let Some(status) = status_of(&store, &reference, &record)? {
                    statuses.push(status);
                }
            }
            Ok(statuses)
        })
        .await
    }

    /// Throws an ingest away; NotFound when there is none.
    pub async fn abort(&self, context: &RequestContext, reference: String) -> Result<()> {
        let namespace = context.namespace()?.clone();
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            let record = this
                .metadata
                .commit(move |txn| {
                    let key = [namespace.as_str(), &reference];
                    let record = txn.get::<IngestRecord>(&key)?.ok_or_else(|| missing_ingest(&reference))?;
                    txn.delete::<IngestRecord>(&key)?;
                    leave_lease(txn, &context, leases::INGESTS, &reference)?;
                    Ok(record)
                })
                .await?;
            let store = this.store.clone();
            blocking(move || store.remove_ingest(&record.key)).await?;
            if let Ok(digest) = record.shared.parse::<Digest>() {
                this.remove_unused(vec![digest]).await;
            }
            Ok(())
        })
        .await
    }

    /// The blobs in the store that no record names: what is left of a removal that a kill cut off, or about to be committed.
    pub(crate) async fn unknown_blobs(&self) -> Vec<Digest> {
        let (store, view) = (self.store.clone(), self.metadata.view());
        let found = blocking(move || {
            let mut blobs = store.blobs()?;
            for (parts, _) in view.list::<BlobRecord>(&[]) {
                if let Some(Ok(digest)) = parts.last().map(|digest| digest.parse()) {
                    blobs.remove(&digest);
                }
            }
            Ok(blobs.into_iter().collect())
        });
        found.await.unwrap_or_else(|error| {
            tracing::warn!(%error, "blobs that no record names could not be looked for");
            Vec::new()
        })
    }

    /// Removes the files of ingests whose records are deleted, from under their writers too. Blobs that they shared are
    /// not looked at.
    pub(crate) async fn remove_ingests(&self, keys: Vec<String>) {
        let store = self.store.clone();
        let removed = blocking(move || {
            for key in keys {
                if let Err(error) = store.remove_ingest(&key) {
                    tracing::warn!(key, %error, "an ingest without a record is left for the next start");
                }
            }
            Ok(())
        });
        if let Err(error) = removed.await {
            tracing::warn!(%error, "ingests without records are left for the next start");
        }
    }

    /// Whether this namespace has the blob; if so, the caller's lease now holds it.
    pub async fn join(&self, context: &RequestContext, digest: &Digest) -> Result<bool> {
        let namespace = context.namespace()?.clone();
        let here = self.metadata.view().has::<BlobRecord>(&[namespace.as_str(), digest.as_str()])?;
        if !here || context.lease().is_none() {
            return Ok(here);
        }
        let (context, digest) = (context.clone(), digest.clone());
        self.metadata
            .commit(move |txn| {
                let here = txn.has::<BlobRecord>(&[namespace.as_str(), digest.as_str()])?;
                if here {
                    leases::join(txn, &context, leases::CONTENT, digest.as_str())?;
                }
                Ok(here)
            })
            .await
    }

    /// Opens or resumes an ingest. `total` 0: not known. AlreadyExists when this namespace has the expected blob, which
    /// then joins the caller's lease; Unavailable while another writer has the ingest.
    pub async fn writer(
        &self,
        context: &RequestContext,
        reference: String,
        total: u64,
        expected: Option<Digest>,
    ) -> Result<Writer> {
        let namespace = context.namespace()?.clone();
        if reference.is_empty() {
            return Err(Error::invalid_argument("an ingest needs a ref"));
        }
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            let algorithm = expected.as_ref().map_or(Algorithm::Sha256, Digest::algorithm);
            let opened = {
                let (this, namespace, reference) = (this.clone(), namespace.clone(), reference.clone());
                let (context, expected) = (context.clone(), expected.clone());
                this.metadata
                    .clone()
                    .commit(move |txn| {
                        this.open_ingest(txn, &context, &namespace, &reference, total, expected)
                    })
                    .await?
            };
            let (key, data) = match opened {
                Opened::Exists => {
                    let digest = expected.map(|digest| digest.to_string()).unwrap_or_default();
                    return Err(Error::already_exists(format!("blob {digest} exists already")));
                }
                Opened::Shared { key, digest, size } => {
                    (key, Data::Shared { digest, size, started_at: SystemTime::now() })
                }
                Opened::Own { key } => {
                    let (store, ingest) = (this.store.clone(), key.clone());
                    let data = blocking(move || store.writer(&ingest, total, algorithm)).await?;
                    (key, Data::Own(Box::new(data)))
                }
            };
            Ok(Writer { content: this, context, namespace, reference, key, data })
        })
        .await
    }

    fn open_ingest(
        &self,
        txn: &mut Transaction,
        context: &RequestContext,
        namespace: &Namespace,
        reference: &str,
        total: u64,
        expected: Option<Digest>,
    ) -> Result<Opened> {
        let mut shared = None;
        if let Some(digest) = expected {
            if txn.has::<BlobRecord>(&[namespace.as_str(), digest.as_str()])? {
                leases::join(txn, context, leases::CONTENT, digest.as_str())?;
                return Ok(Opened::Exists);
            }
            let size = self.store.blob_size(&digest)?;
            shared = size.filter(|size| total == 0 || total == *size).map(|size| (digest, size));
        }
        let now = SystemTime::now();
        let before = txn.get::<IngestRecord>(&[namespace.as_str(), reference])?;
        let mut record = before.unwrap_or_else(|| {
            let sequence = self.sequence.fetch_add(1, Ordering::Relaxed);
            IngestRecord {
                key: format!("{namespace}/{sequence}/{reference}"),
                started_at: Some(now.into()),
                ..IngestRecord::default()
            }
        });
        leases::join(txn, context, leases::INGESTS, reference)?;
        record.expires_at = context.lease().is_none().then(|| (now + INGEST_LIFE).into());
        record.shared = shared.as_ref().map(|(digest, _)| digest.to_string()).unwrap_or_default();
        txn.put(&[namespace.as_str(), reference], &record)?;
        Ok(match shared {
            Some((digest, size)) => Opened::Shared { key: record.key, digest, size },
            None => Opened::Own { key: record.key },
        })
    }
}

impl Writer {
    /// The ingest's state.
    pub fn status(&self) -> Status {
        let (started, updated, offset, total) = match &self.data {
            Data::Own(ingest) => {
                let status = &ingest.status;
                (status.started_at, status.updated_at, status.offset, status.total)
            }
            Data::Shared { size, started_at, .. } => (*started_at, *started_at, *size, *size),
        };
        Status {
            started_at: Some(started.into()),
            updated_at: Some(updated.into()),
            r#ref: self.reference.clone(),
            offset: signed(offset),
            total: signed(total),
            expected: String::new(),
        }
    }

    /// Bytes so far.
    pub fn offset(&self) -> u64 {
        match &self.data {
            Data::Own(ingest) => ingest.status.offset,
            Data::Shared { size, .. } => *size,
        }
    }

    /// The digest of the bytes so far.
    pub fn digest(&self) -> Digest {
        match &self.data {
            Data::Own(ingest) => ingest.digest(),
            Data::Shared { digest, .. } => digest.clone(),
        }
    }

    /// Appends. Blocks.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        if bytes.is_empty() {
            return Ok(());
        }
        self.own(true)?.write(bytes)
    }

    /// Begins anew with nothing. Blocks.
    pub fn truncate(&mut self) -> Result<()> {
        self.own(false)?.truncate()
    }

    /// The ingest's own data; what was shared till now becomes so, with a copy of the bytes when they are wanted.
    fn own(&mut self, copy: bool) -> Result<&mut Ingest> {
        if let Data::Shared { digest, .. } = &self.data {
            let store = &self.content.store;
            let mut ingest = store.writer(&self.key, 0, digest.algorithm())?;
            ingest.truncate()?;
            if copy {
                let path = store.blob_path(digest);
                let mut blob =
                    File::open(&path).map_err(|error| Error::io("open the blob", &path, &error))?;
                ingest.write_from(&mut blob)?;
            }
            self.data = Data::Own(Box::new(ingest));
        }
        match &mut self.data {
            Data::Own(ingest) => Ok(ingest),
            Data::Shared { .. } => Err(Error::internal("a shared ingest stayed shared")),
        }
    }

    /// Leaves the ingest to be resumed. Blocks.
    pub fn suspend(self) {
        if let Data::Own(ingest) = self.data {
            ingest.suspend();
        }
    }

    /// Makes the ingest a blob of the namespace. `size` 0 and `expected` None are not checked. FailedPrecondition when they
    /// are and do not fit, which leaves the ingest; AlreadyExists when the namespace has the blob, which ends it.
    pub async fn commit(self, size: u64, expected: Option<Digest>, labels: Labels) -> Result<Digest> {
        labels::validate_all(&labels)?;
        outlive(self.commit_now(size, expected, labels)).await
    }

    async fn commit_now(self, size: u64, expected: Option<Digest>, labels: Labels) -> Result<Digest> {
        let Writer { content, context, namespace, reference, data, .. } = self;
        let (digest, size, finished) = match data {
            Data::Own(ingest) => {
                let finished = blocking(move || ingest.finish(size, expected.as_ref())).await?;
                (finished.digest.clone(), finished.size, Some(Arc::new(finished)))
            }
            Data::Shared { digest, size: have, .. } => {
                if (size > 0 && size != have) || expected.is_some_and(|expected| expected != digest) {
                    return Err(Error::failed_precondition(format!(
                        "ingest {reference:?}: the data is {digest} of {have} bytes, which is not what was announced"
                    )));
                }
                (digest, have, None)
            }
        };
        let committed = {
            let (content, digest, namespace) = (content.clone(), digest.clone(), namespace.clone());
            let finished = finished.clone();
            content
                .metadata
                .clone()
                .commit(move |txn| {
                    if !txn.has::<IngestRecord>(&[namespace.as_str(), &reference])? {
                        return Err(missing_ingest(&reference).context("it was aborted before its commit"));
                    }
                    content.check_present(finished.as_deref(), &digest)?;
                    let key = [namespace.as_str(), digest.as_str()];
                    let exists = txn.has::<BlobRecord>(&key)?;
                    if !exists {
                        let now = Some(SystemTime::now().into());
                        let size = signed(size);
                        txn.put(&key, &BlobRecord { size, created_at: now, updated_at: now, labels })?;
                    }
                    txn.delete::<IngestRecord>(&[namespace.as_str(), &reference])?;
                    leave_lease(txn, &context, leases::INGESTS, &reference)?;
                    leases::join(txn, &context, leases::CONTENT, digest.as_str())?;
                    Ok(exists)
                })
                .await
        };
        let exists = match committed {
            Ok(exists) => exists,
            Err(error) => {
                // The ingest still has the data; the store shall not have a blob that nobody knows.
                content.remove_unused(vec![digest]).await;
                return Err(error);
            }
        };
        if let Some(finished) = finished.and_then(Arc::into_inner) {
            blocking(move || {
                finished.clean();
                Ok(())
            })
            .await?;
        }
        if exists {
            return Err(Error::already_exists(format!("blob {digest} exists already")));
        }
        let event =
            ContentCreate { digest: digest.to_string(), size: signed(size), media_type: String::new() };
        content.events.publish(&namespace, "/content/create", &event);
        Ok(digest)
    }
}

impl Content {
    /// Within a commit: that the blob about to be recorded is in the store.
    fn check_present(&self, finished: Option<&Finished>, digest: &Digest) -> Result<()> {
        match finished {
            Some(finished) => finished.publish(),
            None if self.store.blob_size(digest)?.is_some() => Ok(()),
            None => Err(Error::failed_precondition(format!(
                "blob {digest} was removed meanwhile; abort the ingest and write it anew"
            ))),
        }
    }
}

/// Changes labels as an update mask says, for blobs and snapshots, where nothing else can be changed.
pub(crate) fn update_labels(current: &mut Labels, new: &Labels, mask: &[String], what: &str) -> Result<()> {
    if mask.is_empty() {
        labels::update_map(current, new, None);
    }
    for path in mask {
        match labels::split_path(path) {
            ("labels", key) => labels::update_map(current, new, key),
            _ => {
                return Err(Error::invalid_argument(format!(
                    "field {path:?} of {what} cannot be updated; only labels can"
                )));
            }
        }
    }
    labels::validate_all(&*current)
}

/// Within a commit: takes a resource from the request's lease.
pub(crate) fn leave_lease(
    txn: &mut Transaction,
    context: &RequestContext,
    kind: &str,
    id: &str,
) -> Result<()> {
    if let Some(lease) = context.lease() {
        txn.delete::<LeaseResource>(&[context.namespace()?.as_str(), lease, kind, id])?;
    }
    Ok(())
}

/// Parses a digest of a request; InvalidArgument says what is wrong with it.
pub fn parse_digest(text: &str) -> Result<Digest> {
    text.parse().map_err(|error: oci::digest::DigestError| Error::invalid_argument(error.to_string()))
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

fn status_of(store: &Store, reference: &str, record: &IngestRecord) -> Result<Option<Status>> {
    Ok(store.status(&record.key)?.map(|status| Status {
        started_at: Some(status.started_at.into()),
        updated_at: Some(status.updated_at.into()),
        r#ref: reference.to_owned(),
        offset: signed(status.offset),
        total: signed(status.total),
        expected: String::new(),
    }))
}

fn info(digest: &str, record: BlobRecord) -> Info {
    let BlobRecord { size, created_at, updated_at, labels } = record;
    Info { digest: digest.to_owned(), size, created_at, updated_at, labels }
}

fn info_field<'a>(info: &'a Info, path: &[&str]) -> Option<Cow<'a, str>> {
    match path {
        ["digest"] => Some(info.digest.as_str().into()),
        ["size"] => Some(info.size.to_string().into()),
        ["labels", rest @ ..] => filters::label(&info.labels, rest),
        _ => None,
    }
}

/// The number in a key `NAMESPACE/SEQUENCE/NAME`.
pub(crate) fn sequence_of(key: &str) -> Option<u64> {
    key.split('/').nth(1)?.parse().ok()
}

fn signed(number: u64) -> i64 {
    i64::try_from(number).unwrap_or(i64::MAX)
}

fn missing(digest: &Digest) -> Error {
    Error::not_found(format!("blob {digest} does not exist in this namespace"))
}

fn missing_ingest(reference: &str) -> Error {
    Error::not_found(format!("ingest {reference:?} does not exist"))
}

#[cfg(test)]
mod tests;
