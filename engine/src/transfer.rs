//! Transfers: images from where they are to where they are wanted, done by the engine.
//!
//! ```text
//!  ImageStore        -> ImageStore          another name for an image
//!  ImageImportStream -> ImageStore          archive --import--> content --unpack--> snapshots; then names
//!  ImageStore        -> ImageExportStream   content --export--> archive
//!  OCIRegistry       -> ImageStore          registry --pull--> content and, as it arrives, snapshots; then names
//!  ImageStore        -> OCIRegistry         content --push--> registry
//! ```
//!
//! Beside these, objects.rs reads and sends single objects of a registry.
//!
//! Invariants: everything that a transfer makes is under a lease, the caller's or one that ends with the transfer. An image
//! gets its name last, when all of it is there: a transfer that fails leaves nothing but what the next collection takes. A
//! transfer whose caller has gone is given up at the next look at its stream, and ends in order.

mod arrival;
mod blobs;
mod export;
mod fetch;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod import;
mod objects;
mod progress;
mod pull;
mod push;
mod registry;
mod store;
mod unpack;
pub mod verifier;

use std::sync::Arc;
use std::time::{Duration, SystemTime};

use oci::Digest;
use oci::image::{Descriptor, Index, Manifest};
use oci::platform::Matcher;
use proto::containerd::types;
use proto::containerd::types::transfer::{ImageExportStream, ImageImportStream, ImageStore, OciRegistry};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio_util::sync::CancellationToken;

use crate::content::{Content, parse_digest};
use crate::context::RequestContext;
use crate::diff::Diff;
use crate::error::{Error, Result, outlive};
use crate::images::Images;
use crate::leases::Leases;
use crate::remotes::{Access, Remotes, Repository};
use crate::snapshots::Snapshots;
use crate::streaming::bytes::Patience;
use crate::streaming::{End, Streams};
use progress::Progress;
use verifier::Verifiers;

/// The label of what goes by itself.
const EXPIRE: &str = "containerd.io/gc.expire";
/// How long a transfer's lease lives when the engine dies before it ends it.
const LEASE: Duration = Duration::from_secs(24 * 3600);
/// How long a stream may stand still.
const IDLE: Duration = Duration::from_secs(300);
/// The most transfers at a time. Each has a thread of those that all work on files shares.
const MOST: usize = 64;

/// One side of a transfer.
#[derive(Debug, Clone, PartialEq)]
pub enum Place {
    /// Images of the engine.
    Store(ImageStore),
    /// An archive that comes over a stream.
    Import(ImageImportStream),
    /// An archive that goes over a stream.
    Export(ImageExportStream),
    /// A repository of a registry.
    Registry(OciRegistry),
    /// Anything else, by its type's name.
    Other(String),
}

impl Place {
    fn kind(&self) -> &str {
        match self {
            Place::Store(_) => "containerd.types.transfer.ImageStore",
            Place::Import(_) => "containerd.types.transfer.ImageImportStream",
            Place::Export(_) => "containerd.types.transfer.ImageExportStream",
            Place::Registry(_) => "containerd.types.transfer.OCIRegistry",
            Place::Other(kind) => kind,
        }
    }
}

/// The transfers of all namespaces; cheap to clone.
#[derive(Clone)]
pub struct Transfers {
    content: Content,
    diff: Diff,
    images: Images,
    leases: Leases,
    remotes: Remotes,
    snapshots: Snapshots,
    streams: Streams,
    slots: Arc<Semaphore>,
    verifiers: Option<Arc<Verifiers>>,
}

/// What is to be done, with the streams it is done over.
enum Work {
    Tag(ImageStore, ImageStore),
    Import(ImageImportStream, End, ImageStore),
    Export(ImageStore, ImageExportStream, End),
    Pull(Repository, ImageStore),
    Push(ImageStore, Repository),
    /// With this snapshotter, layers by their digests when unpacked.
    Unpack(String, Manifest, Vec<Digest>),
}

impl Transfers {
    /// Transfers between these.
    pub fn new(
        content: Content,
        diff: Diff,
        images: Images,
        leases: Leases,
        remotes: Remotes,
        snapshots: Snapshots,
        streams: Streams,
    ) -> Self {
        Transfers {
            content,
            diff,
            images,
            leases,
            remotes,
            snapshots,
            streams,
            slots: Arc::new(Semaphore::new(MOST)),
            verifiers: None,
        }
    }

    /// The same, but these say what may be pulled.
    #[must_use]
    pub fn with_verifiers(mut self, verifiers: Verifiers) -> Self {
        self.verifiers = Some(Arc::new(verifiers));
        self
    }

    /// Transfers from one place to the other, and tells of it on the stream `progress`, unless that is empty. Unimplemented
    /// for a pair of places that the engine cannot serve.
    pub async fn transfer(
        &self,
        context: &RequestContext,
        source: Place,
        destination: Place,
        progress: &str,
    ) -> Result<()> {
        context.namespace()?;
        let progress = match progress {
            "" => None,
            name => Some(self.streams.take(context, name)?),
        };
        let work = match (source, destination) {
            (Place::Store(from), Place::Store(to)) => Work::Tag(from, to),
            (Place::Import(from), Place::Store(to)) => {
                let end = self.streams.take(context, &from.stream)?;
                Work::Import(from, end, to)
            }
            (Place::Store(from), Place::Export(to)) => {
                let end = self.streams.take(context, &to.stream)?;
                Work::Export(from, to, end)
            }
            (Place::Registry(from), Place::Store(to)) => Work::Pull(self.repository(context, from)?, to),
            (Place::Store(from), Place::Registry(to)) => Work::Push(from, self.repository(context, to)?),
            (from, to) => {
                return Err(Error::unimplemented(format!(
                    "transfer from {:?} to {:?}: this engine transfers from image store, import stream or registry to image \
                     store, and from image store to export stream or registry",
                    from.kind(),
                    to.kind()
                )));
            }
        };
        let slot = self.slot(context)?;
        let stop = CancellationToken::new();
        let _caller_is_there = stop.clone().drop_guard();
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            let _slot = slot;
            let progress = Progress::new(progress);
            let done = this.leased(&context, work, Patience { idle: IDLE, stop }, &progress).await;
            progress.finish().await;
            done
        })
        .await
    }

    /// The right to be under way, for a request of a namespace.
    fn slot(&self, context: &RequestContext) -> Result<OwnedSemaphorePermit> {
        context.namespace()?;
        self.slots.clone().try_acquire_owned().map_err(|_| {
            Error::resource_exhausted(format!("{MOST} transfers are under way; try again when one has ended"))
        })
    }

    /// Pulls an image for a part of the engine, which has credentials itself and outlives its caller.
    pub async fn pull_image(&self, context: &RequestContext, from: Access, to: ImageStore) -> Result<()> {
        let patience = Patience { idle: IDLE, stop: CancellationToken::new() };
        let work = Work::Pull(self.remotes.repository(from)?, to);
        self.leased(context, work, patience, &Progress::new(None)).await
    }

    /// Unpacks an image that is here, for a part of the engine.
    pub async fn unpack_image(
        &self,
        context: &RequestContext,
        snapshotter: &str,
        manifest: &Manifest,
        diff_ids: &[Digest],
    ) -> Result<()> {
        let patience = Patience { idle: IDLE, stop: CancellationToken::new() };
        let work = Work::Unpack(snapshotter.to_owned(), manifest.clone(), diff_ids.to_vec());
        self.leased(context, work, patience, &Progress::new(None)).await
    }

    /// Does the work under the request's lease, or under one of its own.
    async fn leased(
        &self,
        context: &RequestContext,
        work: Work,
        patience: Patience,
        progress: &Progress,
    ) -> Result<()> {
        if context.lease().is_some() {
            return self.work(context, work, patience, progress).await;
        }
        let labels = [(EXPIRE.to_owned(), moment(SystemTime::now() + LEASE))].into();
        let lease = self.leases.create(context, String::new(), labels).await?.id;
        let done = self.work(&context.clone().with_lease(&lease), work, patience, progress).await;
        if let Err(error) = self.leases.delete(context, lease).await {
            tracing::warn!(%error, "the lease of a transfer stays until it expires");
        }
        done
    }

    async fn work(
        &self,
        context: &RequestContext,
        work: Work,
        patience: Patience,
        progress: &Progress,
    ) -> Result<()> {
        match work {
            Work::Tag(from, to) => {
                let image = self.images.get(context, &from.name)?;
                let target = image.target.unwrap_or_default();
                // Should the image go meanwhile, its content does not.
                self.content.join(context, &parse_digest(&target.digest)?).await?;
                let names = store::names(&to, &target.digest, None);
                self.store(context, &to, &target, names).await?;
                Ok(())
            }
            Work::Import(from, end, to) => self.import(context, &from, end, to, patience, progress).await,
            Work::Export(from, to, end) => self.export(context, &from, to, end, patience, progress).await,
            Work::Pull(from, to) => self.pull(context, &from, to, &patience.stop, progress).await,
            Work::Push(from, to) => self.push(context, &from, &to, &patience.stop, progress).await,
            Work::Unpack(snapshotter, manifest, diff_ids) => {
                self.unpack_layers(context, &snapshotter, &manifest, &diff_ids, &patience.stop).await
            }
        }
    }
}

/// How many layers are unpacked at a time: as many as there are cores, and two at least, since one that is still on its way has to
/// wait for it now and then. Each has two threads, and its decompressor's window in memory.
fn unpackers() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from).max(2)
}

/// A moment as labels have it.
fn moment(time: SystemTime) -> String {
    OffsetDateTime::from(time).format(&Rfc3339).unwrap_or_default()
}

/// The platforms that a transfer is for, exactly, best first.
struct Platforms {
    wanted: Vec<oci::Platform>,
    matchers: Vec<Matcher>,
}

impl Platforms {
    /// These; all where there are none.
    fn new(wanted: &[types::Platform]) -> Self {
        Self::of(wanted.iter().cloned().map(platform).collect())
    }

    fn of(wanted: Vec<oci::Platform>) -> Self {
        let matchers = wanted.iter().map(Matcher::strict).collect();
        Platforms { wanted, matchers }
    }

    /// How well a manifest fits, 0 best; None when it does not. One that does not say what it is for fits, if nothing else.
    fn rank(&self, manifest: &Descriptor) -> Option<usize> {
        match &manifest.platform {
            None => Some(usize::MAX),
            Some(_) if self.matchers.is_empty() => Some(0),
            Some(platform) => self.matchers.iter().position(|matcher| matcher.matches(platform)),
        }
    }

    /// The manifests that fit, best first.
    fn select<'a>(&self, index: &'a Index) -> Vec<&'a Descriptor> {
        let ranked = index.manifests.iter().filter_map(|entry| Some((self.rank(entry)?, entry)));
        let mut ranked: Vec<_> = ranked.collect();
        ranked.sort_by_key(|(rank, _)| *rank);
        ranked.into_iter().map(|(_, entry)| entry).collect()
    }
}

/// A platform of a request.
pub(crate) fn platform(wanted: types::Platform) -> oci::Platform {
    oci::Platform {
        architecture: wanted.architecture,
        os: wanted.os,
        os_version: wanted.os_version,
        os_features: wanted.os_features,
        variant: wanted.variant,
    }
}

/// A descriptor as records and messages have it.
fn wire(descriptor: &Descriptor) -> types::Descriptor {
    types::Descriptor {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.to_string(),
        size: i64::try_from(descriptor.size).unwrap_or(i64::MAX),
        annotations: descriptor.annotations.clone(),
    }
}

fn given_up() -> Error {
    Error::cancelled("the transfer was given up: its caller has gone")
}

#[cfg(test)]
mod tests;
