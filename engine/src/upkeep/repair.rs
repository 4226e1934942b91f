//! Mending: a blob is fetched again from where it came from, a snapshot is unpacked again from its layer.
//!
//! ```text
//!  blob       registry --> file beside the store --size, digest, sync--> renamed over the damaged one
//!             no record: an ingest like any other
//!  snapshot   damaged one and all above it, topmost first: removed, unless containers stand on one of them
//!             then every image that lost a layer by that is unpacked again
//! ```
//!
//! Invariants: nothing is replaced by what has not been checked. Where a container's snapshot, or a view, stands on what would
//! have to go, nothing goes.

use std::collections::BTreeSet;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use oci::image::{Descriptor, ImageConfig, Manifest, chain_ids};
use oci::{Digest, Reference};
use snapshotter::Kind;
use tokio_util::sync::CancellationToken;

use super::{Upkeep, tree};
use crate::context::RequestContext;
use crate::error::{Error, Result};
use crate::labels::Labels;
use crate::metadata::Read as _;
use crate::metadata::content::BlobRecord;
use crate::metadata::snapshots::SnapshotChild;
use crate::remotes::Access;

/// The beginning of labels that say where a blob came from: the host follows, the value has its repositories.
const SOURCE: &str = "containerd.io/distribution.source.";

/// Where an image's blobs may be had.
pub(super) struct Sources {
    references: Vec<Reference>,
    labels: Labels,
}

impl Sources {
    /// What the request says, and what the labels of a blob of the image say.
    pub(super) fn new(upkeep: &Upkeep, context: &RequestContext, of: &Digest, from: &str) -> Result<Sources> {
        let mut sources = Sources { references: Vec::new(), labels: Labels::new() };
        if !from.is_empty() {
            sources.references.push(parse_reference(from)?);
        }
        if let Some(record) = record(upkeep, context, of)? {
            sources.add(&record.labels);
        }
        Ok(sources)
    }

    fn add(&mut self, labels: &Labels) {
        for (label, repositories) in labels {
            let Some(host) = label.strip_prefix(SOURCE) else { continue };
            self.labels.insert(label.clone(), repositories.clone());
            for repository in repositories.split(',').filter(|repository| !repository.is_empty()) {
                // A label that names nothing is none.
                let Ok(reference) = Reference::parse_normalized(&format!("{host}/{repository}")) else {
                    continue;
                };
                if !self.references.iter().any(|known| known.name() == reference.name()) {
                    self.references.push(reference);
                }
            }
        }
    }
}

/// A reference of a request.
pub(super) fn parse_reference(text: &str) -> Result<Reference> {
    Reference::parse_normalized(text)
        .map_err(|error| Error::invalid_argument(format!("reference {text:?} to fetch from: {error}")))
}

fn record(upkeep: &Upkeep, context: &RequestContext, digest: &Digest) -> Result<Option<BlobRecord>> {
    upkeep.metadata.view().get(&[context.namespace()?.as_str(), digest.as_str()])
}

/// What nothing else of this engine, or of an earlier one, has for a name.
pub(super) fn unique() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}", now.as_nanos(), COUNT.fetch_add(1, Ordering::Relaxed))
}

impl Upkeep {
    /// Fetches a blob anew, wherever it can be had.
    pub(super) async fn mend_blob(
        &self,
        context: &RequestContext,
        wanted: &Descriptor,
        sources: &Sources,
    ) -> Result<()> {
        let recorded = record(self, context, &wanted.digest)?;
        let mut all = Sources { references: sources.references.clone(), labels: sources.labels.clone() };
        if let Some(record) = &recorded {
            all.add(&record.labels);
        }
        let mut failed = Error::not_found(
            "no label says which registry it came from; name one with --from, or import the image again",
        );
        for reference in &all.references {
            match self.fetch(context, wanted, reference, recorded.is_some(), &all.labels).await {
                Ok(()) => return Ok(()),
                Err(error) => failed = error.context(format!("fetch it from {}", reference.name())),
            }
        }
        Err(failed)
    }

    async fn fetch(
        &self,
        context: &RequestContext,
        wanted: &Descriptor,
        reference: &Reference,
        recorded: bool,
        labels: &Labels,
    ) -> Result<()> {
        let access = Access::anonymous(reference.with_digest(wanted.digest.clone()));
        let mut body = self.remotes.repository(access)?.fetch(wanted, 0, None).await?;
        let too_long = || Error::data_loss(format!("the registry sent more than its {} bytes", wanted.size));
        if recorded {
            let mut mending = self.content.mend(&wanted.digest, wanted.size).await?;
            let mut length = 0;
            while let Some(chunk) = body.chunk().await? {
                length += chunk.len() as u64;
                if length > wanted.size {
                    return Err(too_long());
                }
                mending = mending.write(chunk).await?;
            }
            return mending.finish().await;
        }
        let name = format!("mend-{}", unique());
        let opened =
            self.content.writer(context, name.clone(), wanted.size, Some(wanted.digest.clone())).await;
        let mut writer = match opened {
            Ok(writer) => writer,
            Err(Error::AlreadyExists(_)) => return Ok(()),
            Err(error) => return Err(error),
        };
        let written = async {
            // Another namespace's, which needs only to be committed.
            let mut length = writer.offset();
            while length < wanted.size
                && let Some(chunk) = body.chunk().await?
            {
                length += chunk.len() as u64;
                if length > wanted.size {
                    return Err(too_long());
                }
                writer = crate::error::blocking(move || writer.write(&chunk).map(|()| writer)).await?;
            }
            match writer.commit(wanted.size, Some(wanted.digest.clone()), labels.clone()).await {
                Ok(_) | Err(Error::AlreadyExists(_)) => Ok(()),
                Err(error) => Err(error),
            }
        }
        .await;
        if written.is_err() {
            // Best effort: without the lease it goes by itself.
            let _ = self.content.abort(context, name).await;
        }
        written
    }

    /// Unpacks the layers from `lowest` on again. FailedPrecondition when containers stand on any of their snapshots.
    pub(super) async fn mend_snapshots(
        &self,
        context: &RequestContext,
        snapshotter: &str,
        manifest: &Manifest,
        config: &ImageConfig,
        lowest: usize,
    ) -> Result<()> {
        let chain = chain_ids(&config.rootfs.diff_ids);
        let Some(damaged) = chain.get(lowest) else { return Ok(()) };
        // From the damaged one up; the last are the topmost.
        let mut above = vec![damaged.to_string()];
        let mut at = 0;
        while at < above.len() {
            let key = above[at].clone();
            let namespace = context.namespace()?.clone();
            let children =
                self.metadata.view().keys::<SnapshotChild>(&[namespace.as_str(), snapshotter, &key]);
            above.extend(children.into_iter().map(|parts| parts.concat()));
            at += 1;
        }
        let mut there = Vec::new();
        for key in above {
            match self.snapshots.stat(context, snapshotter, &key).await {
                Ok(info) if info.kind == Kind::Committed => there.push(key),
                Ok(_) => {
                    return Err(Error::failed_precondition(format!(
                        "snapshot {key} stands on it: remove the container or the mount that uses it, and check again; what \
                         the container has written stays"
                    )));
                }
                // Lost, or gone meanwhile.
                Err(Error::DataLoss(_)) => there.push(key),
                Err(Error::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
        }
        let lost: BTreeSet<String> = there.iter().cloned().collect();
        for key in there.into_iter().rev() {
            match self.snapshots.remove(context, snapshotter, key).await {
                Ok(()) | Err(Error::NotFound(_)) => {}
                // A container came to stand on it. What has been removed is made again all the same.
                Err(error) => {
                    self.unpack_again(context, snapshotter, manifest, config, &lost).await?;
                    return Err(error);
                }
            }
        }
        self.unpack_again(context, snapshotter, manifest, config, &lost).await
    }

    /// Unpacks an image, and the others that have any of the layers that were lost.
    async fn unpack_again(
        &self,
        context: &RequestContext,
        snapshotter: &str,
        manifest: &Manifest,
        config: &ImageConfig,
        lost: &BTreeSet<String>,
    ) -> Result<()> {
        let stop = CancellationToken::new();
        self.transfers.unpack_layers(context, snapshotter, manifest, &config.rootfs.diff_ids, &stop).await?;
        for image in self.images.list(context, &[])? {
            let Ok(target) = tree::target(&image) else { continue };
            // An image that cannot be read was not unpacked either, or is told of when it is checked itself.
            let Ok(manifests) = tree::manifests(&self.content, context, target).await else { continue };
            for (_, other) in manifests {
                let Ok(Some(config)) = tree::config(&self.content, context, &other).await else { continue };
                let has = chain_ids(&config.rootfs.diff_ids).iter().any(|key| lost.contains(key.as_str()));
                if other.config == manifest.config || !has || config.diff_ids_for(&other).is_err() {
                    continue;
                }
                let unpacked = self.transfers.unpack_layers(
                    context,
                    snapshotter,
                    &other,
                    &config.rootfs.diff_ids,
                    &stop,
                );
                unpacked.await.map_err(|error| {
                    error.context(format!("image {:?}, which has the damaged layer, too", image.name))
                })?;
            }
        }
        Ok(())
    }
}
