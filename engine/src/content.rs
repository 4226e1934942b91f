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
//! Invariants: a record commits after its blob, and the blob's name in its folder, are on disk. A blob's file goes after
//! the last record that names it is gone, on disk as well. That a file is there, and that nobody needs it, is looked at on
//! the metadata's writer thread, so a commit and a removal of the same blob cannot cross. One writer at a time has an
//! ingest; only those who would commit another namespace's blob as it is may be several. A ref is reused, a key never: a
//! writer touches the ref's record only while that has the writer's key.

pub(crate) mod dropped;
mod mend;
mod remote;
mod session;
mod store;

use std::borrow::Cow;
use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use futures::Stream;
use oci::{Algorithm, Digest};
use proto::containerd::events::{ContentCreate, ContentDelete};
use proto::containerd::services::content::v1::{Info, Status};

pub use remote::Plugin;
use remote::Remote;
pub use session::Session;
use store::{Finished, Held, Ingest, Store, Taken};

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
/// How long the end of another writer is waited for before the ingest is tried again: other reasons end untold.
const RETRY: Duration = Duration::from_secs(1);

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
    data: Data,
    held: Held,
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
    Ingest {
        held: Held,
        /// Another namespace's blob, which is what the ingest is to be.
        shared: Option<(Digest, u64)>,
        /// The blob that it was to be before, and is not any more.
        released: Option<Digest>,
    },
}

/// What became of a commit.
enum Recorded {
    /// The namespace has a record now, or had one already.
    Done {
        existed: bool,
        /// The blob that the ingest was to be when it was opened, and did not become.
        released: Option<Digest>,
    },
    /// The ingest is not this writer's any more.
    Aborted,
    /// The blob's file is not there.
    Gone,
}

impl Content {
    /// Opens the store under `root` and tidies up: ingests whose time is over, and ingests that no record knows. Blocks.
    pub fn open(root: &Path, metadata: Metadata, events: Exchange) -> Result<Self> {
        Self::open_with(root, metadata, events, None)
    }

    /// The same with a plugin, which has the bytes of blobs, so that `root` has ingests alone. To be called within the
    /// runtime.
    pub fn open_with(
        root: &Path,
        metadata: Metadata,
        events: Exchange,
        plugin: Option<&Plugin>,
    ) -> Result<Self> {
        let mut store = Store::open(root)?;
        if let Some(plugin) = plugin {
            let unseen = store.blobs()?.len();
            if unseen > 0 {
                tracing::warn!(
                    unseen, folder = %root.display(), plugin = plugin.name,
                    "blobs in the engine's own folder are not looked at while a plugin has the content"
                );
            }
            store = store.with(Remote::new(plugin)?);
        }
        let ingests = metadata.view().list::<IngestRecord>(&[]);
        let folders = store.ingests()?;
        // Past what is on disk, too: what could not be removed must not become another ingest's beginning.
        let keys = ingests.iter().map(|(_, ingest)| &ingest.key);
        let keys = keys.chain(folders.iter().filter_map(|(_, key)| key.as_ref()));
        let highest = keys.filter_map(|key| sequence_of(key)).max().unwrap_or(0);
        let content = Content { metadata, events, store, sequence: Arc::new(AtomicU64::new(highest + 1)) };
        content.tidy(ingests, folders)?;
        Ok(content)
    }

    /// What cannot be looked at or removed is left with a line in the log: the engine starts all the same.
    ///
    /// Files of blobs that no record names are the collector's to remove, after the start.
    fn tidy(
        &self,
        ingests: Vec<(Vec<String>, IngestRecord)>,
        folders: Vec<(PathBuf, Option<String>)>,
    ) -> Result<()> {
        let now = SystemTime::now();
        let (mut over, mut released) = (Vec::new(), Vec::new());
        let mut known = HashSet::new();
        for (parts, ingest) in ingests {
            let expired = ingest
                .expires_at
                .is_some_and(|time| SystemTime::try_from(time).is_ok_and(|time| time <= now));
            let lost = ingest.shared.is_empty()
                && self.store.status(&ingest.key).map_or_else(
                    |error| {
                        tracing::warn!(%error, "an ingest cannot be looked at and is kept");
                        false
                    },
                    |status| status.is_none(),
                );
            if expired || lost {
                over.push(parts);
                released.extend(shared_blob(&ingest));
            } else {
                known.insert(self.store.ingest_folder(&ingest.key));
            }
        }
        for (folder, _) in folders.into_iter().filter(|(folder, _)| !known.contains(folder)) {
            tracing::info!(folder = %folder.display(), "removing an ingest that is over");
            if let Err(error) = sys::fs::remove_tree(&folder) {
                tracing::warn!(folder = %folder.display(), %error, "an ingest that is over stays");
            }
        }
        if over.is_empty() {
            return Ok(());
        }
        if !self.store.is_here() {
            // The start does not wait for another process; they are the collector's.
            released.clear();
        }
        self.metadata.commit_blocking(move |txn| {
            for parts in &over {
                let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
                txn.delete::<IngestRecord>(&parts)?;
            }
            Ok(())
        })?;
        let store = self.store.clone();
        let unused = self.metadata.commit_blocking(move |txn| take_unused(&store, txn, &released))?;
        delete_taken(unused.taken);
        Ok(())
    }

    /// Where the store is.
    pub fn root(&self) -> &Path {
        self.store.root()
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

    /// Removes the files of those of the blobs that no record names any more.
    pub(crate) async fn remove_unused(&self, mut digests: Vec<Digest>) {
        while !digests.is_empty() {
            let store = self.store.clone();
            let unused = self.metadata.commit(move |txn| take_unused(&store, txn, &digests)).await;
            let removed = match unused {
                Ok(Unused { taken, later }) => {
                    // Once this was answered, what had yet to come to disk is there.
                    digests = later;
                    blocking(move || {
                        delete_taken(taken);
                        Ok(())
                    })
                    .await
                }
                Err(error) => {
                    digests = Vec::new();
                    Err(error)
                }
            };
            if let Err(error) = removed {
                tracing::warn!(%error, "the files of deleted blobs stay until they are collected");
            }
        }
    }

    /// Opens a blob's file; its size. Blocks: for as long as an open takes or, where another process has the blob, as fetching it.
    pub fn open_blob(&self, context: &RequestContext, digest: &Digest) -> Result<(File, u64)> {
        let info = self.info(context, digest).map_err(|error| {
            let namespace = context.namespace().map_or("", Namespace::as_str);
            let why = dropped::why_missing(&self.metadata.view(), namespace, digest);
            why.map_or(error, Error::not_found)
        })?;
        let size = u64::try_from(info.size).unwrap_or(0);
        Ok((self.store.open_blob(digest, size)?, size))
    }

    /// A whole blob of at most `limit` bytes (a manifest, a config), its digest checked: DataLoss when its file is damaged. Blocks,
    /// as [`Content::open_blob`] does.
    pub fn read_document(&self, context: &RequestContext, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        let (file, size) = self.open_blob(context, digest)?;
        if size > limit {
            return Err(Error::invalid_argument(format!(
                "{digest} of {size} bytes is larger than the limit of {limit} for its kind"
            )));
        }
        let mut bytes = Vec::new();
        file.take(limit + 1)
            .read_to_end(&mut bytes)
            .map_err(|error| Error::data_loss(format!("blob {digest} cannot be read: {error}")))?;
        let mut hasher = digest.algorithm().hasher();
        hasher.update(&bytes);
        let found = hasher.finish();
        if found != *digest {
            return Err(Error::data_loss(format!(
                "blob {digest} is damaged: its bytes have the digest {found}; `ctr images verify --repair` fetches it again"
            )));
        }
        Ok(bytes)
    }

    /// A blob from `offset` on, `size` bytes or, for 0, all: pieces with their offsets. OutOfRange past the end.
    pub async fn read(
        &self,
        context: &RequestContext,
        digest: Digest,
        offset: u64,
        size: u64,
    ) -> Result<impl Stream<Item = Result<(u64, Bytes)>> + Send + 'static> {
        let length = u64::try_from(self.info(context, &digest)?.size).unwrap_or(0);
        if offset > length {
            return Err(Error::out_of_range(format!(
                "blob {digest} has {length} bytes; there is nothing at {offset}"
            )));
        }
        let end = if size == 0 { length } else { length.min(offset.saturating_add(size)) };
        self.store.read(digest, offset, end).await
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
        self.abort_ingest(context, reference, None).await
    }

    /// The same for the ingest of this key alone, and not for one that has come to have its ref.
    async fn abort_ingest(
        &self,
        context: &RequestContext,
        reference: String,
        key: Option<String>,
    ) -> Result<()> {
        let namespace = context.namespace()?.clone();
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            let record = this
                .metadata
                .commit(move |txn| {
                    let parts = [namespace.as_str(), &reference];
                    let record = txn
                        .get::<IngestRecord>(&parts)?
                        .filter(|record| key.as_ref().is_none_or(|key| record.key == *key))
                        .ok_or_else(|| missing_ingest(&reference))?;
                    txn.delete::<IngestRecord>(&parts)?;
                    leave_lease(txn, &context, leases::INGESTS, &reference)?;
                    Ok(record)
                })
                .await?;
            let (store, released) = (this.store.clone(), shared_blob(&record));
            blocking(move || store.remove_ingest(&record.key)).await?;
            this.remove_unused(released.into_iter().collect()).await;
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
        self.open_writer(context, reference, total, expected, true).await
    }

    /// The same for a transfer: the ingest is not of the caller's lease, so that it outlives a transfer that fails, and the
    /// next goes on with it. While another writer has the ingest, this waits for it.
    pub async fn resumable_writer(
        &self,
        context: &RequestContext,
        reference: &str,
        total: u64,
        expected: &Digest,
    ) -> Result<Writer> {
        loop {
            let released = self.store.released.notified();
            tokio::pin!(released);
            released.as_mut().enable();
            let (reference, expected) = (reference.to_owned(), Some(expected.clone()));
            match self.open_writer(context, reference, total, expected, false).await {
                Err(Error::Unavailable(_)) => drop(tokio::time::timeout(RETRY, released).await),
                opened => return opened,
            }
        }
    }

    async fn open_writer(
        &self,
        context: &RequestContext,
        reference: String,
        total: u64,
        expected: Option<Digest>,
        leased: bool,
    ) -> Result<Writer> {
        let namespace = context.namespace()?.clone();
        if reference.is_empty() {
            return Err(Error::invalid_argument("an ingest needs a ref"));
        }
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            let algorithm = expected.as_ref().map_or(Algorithm::Sha256, Digest::algorithm);
            let opened = {
                let (store, sequence) = (this.store.clone(), this.sequence.clone());
                let (namespace, reference) = (namespace.clone(), reference.clone());
                let (context, expected) = (context.clone(), expected.clone());
                let open = move |txn: &mut Transaction| {
                    open_ingest(
                        &store, &sequence, txn, &context, leased, &namespace, &reference, total, expected,
                    )
                };
                this.metadata.commit(open).await?
            };
            let (held, shared, released) = match opened {
                Opened::Exists => {
                    let digest = expected.map(|digest| digest.to_string()).unwrap_or_default();
                    return Err(Error::already_exists(format!("blob {digest} exists already")));
                }
                Opened::Ingest { held, shared, released } => (held, shared, released),
            };
            this.remove_unused(released.into_iter().collect()).await;
            let (held, data) = match shared {
                Some((digest, size)) => (held, Data::Shared { digest, size, started_at: SystemTime::now() }),
                None => {
                    let store = this.store.clone();
                    blocking(move || {
                        let data = store.writer(&held, total, algorithm)?;
                        Ok((held, Data::Own(Box::new(data))))
                    })
                    .await?
                }
            };
            Ok(Writer { content: this, context, namespace, reference, data, held })
        })
        .await
    }
}

/// Within a commit: opens or makes the record of an ingest, and takes hold of it.
#[allow(clippy::too_many_arguments, reason = "of one caller, whose arguments they are")]
fn open_ingest(
    store: &Store,
    sequence: &AtomicU64,
    txn: &mut Transaction,
    context: &RequestContext,
    leased: bool,
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
        let size = shared_size(store, txn, &digest)?;
        shared = size.filter(|size| total == 0 || total == *size).map(|size| (digest, size));
    }
    let now = SystemTime::now();
    let before = txn.get::<IngestRecord>(&[namespace.as_str(), reference])?;
    let mut record = before.unwrap_or_else(|| {
        let sequence = sequence.fetch_add(1, Ordering::Relaxed);
        IngestRecord {
            key: format!("{namespace}/{sequence}/{reference}"),
            started_at: Some(now.into()),
            ..IngestRecord::default()
        }
    });
    let held = store.hold(&record.key, shared.is_some())?;
    let leased = leased && context.lease().is_some();
    if leased {
        leases::join(txn, context, leases::INGESTS, reference)?;
    }
    record.expires_at = (!leased).then(|| (now + INGEST_LIFE).into());
    let released =
        shared_blob(&record).filter(|blob| shared.as_ref().is_none_or(|(digest, _)| digest != blob));
    record.shared = shared.as_ref().map(|(digest, _)| digest.to_string()).unwrap_or_default();
    txn.put(&[namespace.as_str(), reference], &record)?;
    Ok(Opened::Ingest { held, shared, released })
}

/// Within a commit: the size of a blob that some namespace has. Where blobs are another process's, which no commit may wait for,
/// it is the records that tell.
fn shared_size(store: &Store, state: &impl Read, digest: &Digest) -> Result<Option<u64>> {
    if store.is_here() {
        return store.blob_size(digest);
    }
    for namespace in state.keys::<NamespaceRecord>(&[]) {
        if let Some(record) = state.get::<BlobRecord>(&[&namespace.concat(), digest.as_str()])? {
            return Ok(u64::try_from(record.size).ok());
        }
    }
    Ok(None)
}

/// The blob of another namespace that an ingest is to be.
fn shared_blob(ingest: &IngestRecord) -> Option<Digest> {
    ingest.shared.parse().ok()
}

/// Blobs that nobody needs any more.
struct Unused {
    /// Out of the store, to be deleted.
    taken: Vec<Taken>,
    /// Those that are needed on disk: the commit that lets them go is under way.
    later: Vec<Digest>,
}

/// Within a commit, which is where it holds that nobody needs a blob: takes the files of those that nobody needs out of the
/// store. A file cannot be taken back, so what is on disk must not name it either.
fn take_unused(store: &Store, txn: &Transaction, digests: &[Digest]) -> Result<Unused> {
    let (named, on_disk) = (named(txn, digests)?, named(&txn.durable(), digests)?);
    let mut unused = Unused { taken: Vec::new(), later: Vec::new() };
    for digest in digests.iter().filter(|digest| !named.contains(digest)) {
        if on_disk.contains(digest) {
            unused.later.push(digest.clone());
            continue;
        }
        match store.take_out(digest) {
            Ok(taken) => unused.taken.extend(taken),
            Err(error) => tracing::warn!(%error, "the file of a deleted blob stays"),
        }
    }
    Ok(unused)
}

/// Those of the blobs that a record or an ingest of any namespace names.
fn named<'a>(state: &impl Read, digests: &'a [Digest]) -> Result<HashSet<&'a Digest>> {
    let namespaces: Vec<String> =
        state.keys::<NamespaceRecord>(&[]).into_iter().map(|parts| parts.concat()).collect();
    let ingests = state.list::<IngestRecord>(&[]);
    let shared: HashSet<&str> = ingests.iter().map(|(_, ingest)| ingest.shared.as_str()).collect();
    let mut named = HashSet::new();
    for digest in digests {
        let mut found = shared.contains(digest.as_str());
        for namespace in &namespaces {
            found |= state.has::<BlobRecord>(&[namespace, digest.as_str()])?;
        }
        if found {
            named.insert(digest);
        }
    }
    Ok(named)
}

fn delete_taken(taken: Vec<Taken>) {
    for blob in taken {
        if let Err(error) = blob.delete() {
            tracing::warn!(%error, "a deleted blob's bytes stay until they are collected");
        }
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
        if let Data::Shared { digest, size, .. } = &self.data {
            let store = &self.content.store;
            self.held.write()?;
            let mut ingest = store.writer(&self.held, 0, digest.algorithm())?;
            ingest.truncate()?;
            if copy {
                ingest.write_from(&mut store.open_blob(digest, *size)?)?;
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

    /// The file that has the bytes, to be read at any offset while it grows. Blocks.
    pub fn reader(&self) -> Result<File> {
        match &self.data {
            Data::Own(ingest) => ingest
                .reader()
                .map_err(|error| Error::unknown(format!("read ingest {:?}: {error}", self.reference))),
            Data::Shared { digest, size, .. } => self.content.store.open_blob(digest, *size),
        }
    }

    /// Comes back once another waits for this ingest to end.
    pub fn wanted(&self) -> impl Future<Output = ()> + Send + 'static {
        self.held.wanted()
    }

    /// Throws the ingest away.
    pub async fn discard(self) -> Result<()> {
        let Writer { content, context, reference, held, .. } = self;
        let key = held.key.clone();
        let thrown = content.abort_ingest(&context, reference, Some(key)).await;
        drop(held);
        match thrown {
            Err(Error::NotFound(_)) => Ok(()),
            thrown => thrown,
        }
    }

    /// Makes the ingest a blob of the namespace. `size` 0 and `expected` None are not checked. FailedPrecondition when they
    /// are and do not fit, which leaves the ingest; AlreadyExists when the namespace has the blob, which ends it.
    pub async fn commit(self, size: u64, expected: Option<Digest>, labels: Labels) -> Result<Digest> {
        labels::validate_all(&labels)?;
        outlive(self.commit_now(size, expected, labels)).await
    }

    async fn commit_now(self, size: u64, expected: Option<Digest>, labels: Labels) -> Result<Digest> {
        let Writer { content, context, namespace, reference, data, held } = self;
        let (digest, size, mut finished) = match data {
            Data::Own(ingest) => {
                let finished = blocking(move || ingest.finish(size, expected.as_ref())).await?;
                (finished.digest.clone(), finished.size, Some(finished))
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
        let record = Recording { context, namespace, reference, key: held.key.clone(), digest, size, labels };
        let recorded = content.publish_and_record(&mut finished, &record).await;
        sys::failpoint!("content.commit.recorded");
        // The pin goes before anything is looked at for removal.
        drop(finished);
        let Recording { namespace, reference, digest, .. } = record;
        let (existed, released) = match recorded {
            Ok(Recorded::Done { existed, released }) => (existed, released),
            Ok(Recorded::Aborted) => {
                content.end_ingest(held).await;
                content.remove_unused(vec![digest]).await;
                return Err(missing_ingest(&reference).context("it was aborted before its commit"));
            }
            Ok(Recorded::Gone) => {
                return Err(Error::failed_precondition(format!(
                    "blob {digest} was removed meanwhile; abort the ingest and write it anew"
                )));
            }
            Err(error) => {
                // The ingest still has the data; the store shall not have a blob that nobody knows.
                content.remove_unused(vec![digest]).await;
                return Err(error);
            }
        };
        content.end_ingest(held).await;
        content.remove_unused(released.into_iter().collect()).await;
        if existed {
            return Err(Error::already_exists(format!("blob {digest} exists already")));
        }
        let event =
            ContentCreate { digest: digest.to_string(), size: signed(size), media_type: String::new() };
        content.events.publish(&namespace, "/content/create", &event);
        Ok(digest)
    }
}

/// An ingest that is whole, and what it is to become.
pub struct Complete {
    /// The ingest.
    pub writer: Writer,
    /// The size of the blob.
    pub size: u64,
    /// Its digest.
    pub digest: Digest,
    /// Its labels, unless it is there.
    pub labels: Labels,
}

impl Content {
    /// Makes many ingests blobs of the namespace: one sync for all of them, and one commit of their records. Those that are
    /// there meanwhile, or that were aborted, are left out. `synced` says that what was written before is on disk.
    pub async fn commit_all(&self, complete: Vec<Complete>, synced: bool) -> Result<()> {
        let this = self.clone();
        outlive(async move { this.commit_all_now(complete, synced).await }).await
    }

    async fn commit_all_now(&self, complete: Vec<Complete>, synced: bool) -> Result<()> {
        let store = self.store.clone();
        let (finished, records, helds) = blocking(move || {
            let (mut finished, mut records, mut helds) = (Vec::new(), Vec::new(), Vec::new());
            for Complete { writer, size, digest, labels } in complete {
                labels::validate_all(&labels)?;
                let Writer { context, namespace, reference, data, held, .. } = writer;
                finished.extend(match data {
                    Data::Own(ingest) => Some(ingest.check(size, Some(&digest))?),
                    Data::Shared { .. } => None,
                });
                let key = held.key.clone();
                records.push(Recording { context, namespace, reference, key, digest, size, labels });
                helds.push(held);
            }
            if !synced {
                store.sync_all()?;
            }
            Ok((finished, records, helds))
        })
        .await?;
        sys::failpoint!("content.commit-all.synced");
        let (recorded, finished) = self.publish_and_record_all(finished, &records).await;
        sys::failpoint!("content.commit-all.recorded");
        // The pins go before anything is looked at for removal.
        drop(finished);
        let all: Vec<Digest> = records.iter().map(|record| record.digest.clone()).collect();
        let recorded = match recorded {
            Ok(recorded) => recorded,
            Err(error) => {
                self.remove_unused(all).await;
                return Err(error);
            }
        };
        let store = self.store.clone();
        let ended = blocking(move || {
            for held in helds {
                if let Err(error) = store.remove_ingest(&held.key) {
                    tracing::warn!(%error, "an ingest that is over stays until the next start");
                }
            }
            Ok(())
        });
        ended.await?;
        let (mut unused, mut gone) = (Vec::new(), None);
        for (record, recorded) in records.into_iter().zip(recorded) {
            match recorded {
                Recorded::Done { existed, released } => {
                    unused.extend(released);
                    if !existed {
                        let event = ContentCreate {
                            digest: record.digest.to_string(),
                            size: signed(record.size),
                            media_type: String::new(),
                        };
                        self.events.publish(&record.namespace, "/content/create", &event);
                    }
                }
                Recorded::Aborted | Recorded::Gone => {
                    unused.push(record.digest);
                    gone = gone.or(Some(record.reference));
                }
            }
        }
        self.remove_unused(unused).await;
        match gone {
            None => Ok(()),
            Some(reference) => {
                Err(missing_ingest(&reference).context("it was aborted or removed before its commit"))
            }
        }
    }

    /// Brings the names of blobs to disk, and then their records; what became of each.
    async fn publish_and_record_all(
        &self,
        mut finished: Vec<Finished>,
        records: &[Recording],
    ) -> (Result<Vec<Recorded>>, Vec<Finished>) {
        // A removal that had begun before the pins may take a file once; there can be no other then.
        for _ in 0..2 {
            let store = self.store.clone();
            let digests: Vec<Digest> = records.iter().map(|record| record.digest.clone()).collect();
            let published = blocking(move || {
                let linked = finished.iter().try_for_each(Finished::link);
                // One folder holds all of one algorithm.
                let folders: BTreeMap<&str, &Digest> =
                    digests.iter().map(|digest| (digest.algorithm().as_str(), digest)).collect();
                let named = linked
                    .and_then(|()| folders.into_values().try_for_each(|digest| store.sync_name(digest)));
                Ok((named, finished))
            });
            let published = match published.await {
                Ok((published, back)) => {
                    finished = back;
                    published
                }
                Err(error) => return (Err(error), Vec::new()),
            };
            if let Err(error) = published {
                return (Err(error), finished);
            }
            let (store, all) = (self.store.clone(), records.to_vec());
            let recorded = self.metadata.commit(move |txn| {
                // A file that is not there shall not leave the others recorded without it.
                let there = |record: &Recording| -> Result<bool> {
                    // One in another process's store was put there under a pin.
                    Ok(!store.is_here() || store.blob_size(&record.digest)? == Some(record.size))
                };
                for record in &all {
                    if !there(record)? {
                        return Ok(None);
                    }
                }
                let write = |record: Recording| record.write(&store, txn);
                all.into_iter().map(write).collect::<Result<Vec<_>>>().map(Some)
            });
            match recorded.await {
                Ok(Some(recorded)) => return (Ok(recorded), finished),
                Ok(None) => {}
                Err(error) => return (Err(error), finished),
            }
        }
        let gone = Error::failed_precondition("blobs were removed while they were committed; try again");
        (Err(gone), finished)
    }
}

/// A blob about to be recorded.
#[derive(Clone)]
struct Recording {
    context: RequestContext,
    namespace: Namespace,
    reference: String,
    /// The ingest's.
    key: String,
    digest: Digest,
    size: u64,
    labels: Labels,
}

impl Recording {
    /// Within a commit: makes the blob's record, if its file is there, and ends the ingest.
    fn write(self, store: &Store, txn: &mut Transaction) -> Result<Recorded> {
        let Recording { context, namespace, reference, key, digest, size, labels } = self;
        let (ingest, blob) = ([namespace.as_str(), &reference], [namespace.as_str(), digest.as_str()]);
        let ours = txn.get::<IngestRecord>(&ingest)?.filter(|record| record.key == key);
        let existed = txn.has::<BlobRecord>(&blob)?;
        if !existed {
            if ours.is_none() {
                return Ok(Recorded::Aborted);
            }
            // One in another process's store was put there under a pin, or is kept by the ingest that is to be it.
            if store.is_here() && store.blob_size(&digest)? != Some(size) {
                return Ok(Recorded::Gone);
            }
            let now = Some(SystemTime::now().into());
            txn.put(&blob, &BlobRecord { size: signed(size), created_at: now, updated_at: now, labels })?;
        }
        if ours.is_some() {
            txn.delete::<IngestRecord>(&ingest)?;
            leave_lease(txn, &context, leases::INGESTS, &reference)?;
        }
        leases::join(txn, &context, leases::CONTENT, digest.as_str())?;
        let released = ours.as_ref().and_then(shared_blob).filter(|blob| *blob != digest);
        Ok(Recorded::Done { existed, released })
    }
}

impl Content {
    /// Brings a blob's file to disk, and then its record.
    async fn publish_and_record(
        &self,
        finished: &mut Option<Finished>,
        record: &Recording,
    ) -> Result<Recorded> {
        loop {
            let (own, store, digest) = (finished.take(), self.store.clone(), record.digest.clone());
            *finished = blocking(move || {
                match &own {
                    Some(finished) => finished.publish()?,
                    None => store.sync_name(&digest)?,
                }
                Ok(own)
            })
            .await?;
            let (store, record) = (self.store.clone(), record.clone());
            match self.metadata.commit(move |txn| record.write(&store, txn)).await? {
                // A removal that had begun before the pin took the file; there can be no other now.
                Recorded::Gone if finished.is_some() => {}
                recorded => return Ok(recorded),
            }
        }
    }

    /// Removes what an ingest without a record has on disk: its own data, or what it had before it was to be a blob of
    /// another namespace.
    async fn end_ingest(&self, held: Held) {
        let store = self.store.clone();
        if let Err(error) = blocking(move || store.remove_ingest(&held.key)).await {
            tracing::warn!(%error, "an ingest that is over stays until the next start");
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
