//! Unpacking an image: each layer on a snapshot of its own, committed under its chain id.
//!
//! ```text
//!  snapshotter rebases, layers are unpacked here:
//!    prepare all, over nothing --> apply each as it arrives, side by side --> settle from the bottom --> one commit of all
//!  else, layers are unpacked here:
//!    one after the other: prepare over its parent, apply as it arrives, commit
//!  else (a proxy, a stream processor): the same, of blobs that are committed
//! ```
//!
//! A layer that another image has unpacked is there under that name already, with all beneath it. A snapshot in the making has a
//! key of its own, in the form of containerd's, and goes when its layer fails. The config's label keeps the topmost snapshot.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use futures::future::join_all;
use oci::Digest;
use oci::image::{Descriptor, ImageConfig, Manifest, chain_ids, media_type};
use oci::platform::Matcher;
use proto::containerd::types::transfer::UnpackConfiguration;
use snapshotter::{Kind, Mount};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::arrival::{Arrival, Growth};
use super::blobs::{label, unique};
use super::progress::Job;
use super::{Transfers, given_up, platform, wire};
use crate::context::RequestContext;
use crate::diff::{self, Applied, Unsettled};
use crate::error::{Error, Result, blocking};
use crate::labels::Labels;
use crate::snapshots::{Layer, New};

/// Where an image is unpacked that does not say it.
const SNAPSHOTTER: &str = "overlayfs";
/// The label that names the snapshot that another is to become.
const TARGET: &str = "containerd.io/snapshot.ref";
/// Annotations of layers that are labels of their snapshots begin so.
const INHERITED: &str = "containerd.io/snapshot/";
/// How often a snapshot is tried for that is there and then is not.
const TRIES: usize = 3;

/// An image to be unpacked.
#[derive(Clone)]
pub(super) struct Image {
    pub(super) manifest: Manifest,
    diff_ids: Vec<Digest>,
    pub(super) snapshotter: String,
}

/// A layer on its way.
#[derive(Clone)]
pub(super) struct Arriving {
    pub(super) blob: Arc<Arrival>,
    pub(super) job: Option<Arc<Job>>,
}

/// An image whose layers are unpacked. Those that have yet to be committed are so together.
pub(super) struct Ready {
    pub(super) image: Image,
    /// From the bottom.
    layers: Vec<Unpacked>,
    /// The layer on which the lowest of them stands; empty for none.
    base: String,
}

/// A layer in a snapshot of its own, over nothing.
struct Unpacked {
    commit: Layer,
    upper: PathBuf,
    unsettled: Unsettled,
}

/// Whether a manifest's image may be one to unpack, so that its config is looked at.
pub(super) fn is_image(manifest: &Manifest) -> bool {
    !manifest.layers.is_empty() && media_type::is_config(&manifest.config.media_type)
}

/// What of a manifest's image is to be unpacked, and where to. `document` is its config.
pub(super) fn plan(
    document: &[u8],
    manifest: &Manifest,
    configurations: &[UnpackConfiguration],
) -> Result<Vec<Image>> {
    let config = &manifest.config;
    if configurations.is_empty() || !is_image(manifest) {
        return Ok(Vec::new());
    }
    let wrong = |error| Error::invalid_argument(format!("config {}: {error}", config.digest));
    let document = ImageConfig::parse(document).map_err(wrong)?;
    let diff_ids = document.diff_ids_for(manifest).map_err(wrong)?;
    let mut images: Vec<Image> = Vec::new();
    for wanted in configurations {
        let matcher = match &wanted.platform {
            Some(wanted) if !wanted.os.is_empty() || !wanted.architecture.is_empty() => {
                Matcher::only(&platform(wanted.clone()))
            }
            _ => Matcher::only(&oci::Platform::host()),
        };
        let snapshotter = match wanted.snapshotter.as_str() {
            "" => SNAPSHOTTER,
            name => name,
        };
        let known = images.iter().any(|image| image.snapshotter == snapshotter);
        if !known && matcher.matches(&document.platform) {
            images.push(Image {
                manifest: manifest.clone(),
                diff_ids: diff_ids.to_vec(),
                snapshotter: snapshotter.to_owned(),
            });
        }
    }
    Ok(images)
}

impl Image {
    /// The label of the config that keeps the topmost snapshot.
    pub(super) fn keeps(&self) -> Option<(String, String)> {
        let top = chain_ids(&self.diff_ids).pop()?;
        Some((format!("containerd.io/gc.ref.snapshot.{}", self.snapshotter), top.to_string()))
    }

    /// The layers with what each is when uncompressed.
    pub(super) fn uncompressed(&self) -> impl Iterator<Item = (&Descriptor, Labels)> {
        let label =
            |diff_id: &Digest| [("containerd.io/uncompressed".to_owned(), diff_id.to_string())].into();
        self.manifest.layers.iter().zip(self.diff_ids.iter().map(label))
    }
}

impl Arriving {
    /// A layer that is there.
    pub(super) fn there(file: std::fs::File, size: u64) -> Self {
        let blob = Arrival::new();
        blob.begin(Growth::whole(file, size));
        Arriving { blob: Arc::new(blob), job: None }
    }
}

impl Transfers {
    /// Unpacks those of a manifest's layers that are not unpacked yet, for work on images that is no transfer.
    pub(crate) async fn unpack_layers(
        &self,
        context: &RequestContext,
        snapshotter: &str,
        manifest: &Manifest,
        diff_ids: &[Digest],
        stop: &CancellationToken,
    ) -> Result<()> {
        let image = Image {
            manifest: manifest.clone(),
            diff_ids: diff_ids.to_vec(),
            snapshotter: snapshotter.to_owned(),
        };
        let gate = Arc::new(Semaphore::new(super::unpackers()));
        self.unpack(context, &image, &gate, stop).await
    }

    /// Whether an image's layers are unpacked here as they arrive.
    pub(super) fn unpacks_arriving(&self, image: &Image) -> bool {
        image.manifest.layers.iter().all(|layer| self.diff.is_built_in(&layer.media_type))
    }

    /// Unpacks what is not unpacked yet, as it arrives. What fails leaves nothing.
    pub(super) async fn unpack_arriving(
        &self,
        context: &RequestContext,
        image: &Image,
        arriving: &[Arriving],
        gate: &Arc<Semaphore>,
        stop: &CancellationToken,
    ) -> Result<Ready> {
        if !self.snapshots.rebases(&image.snapshotter) {
            let sources: Vec<_> = arriving.iter().map(Some).collect();
            self.unpack_in_order(context, image, &sources, stop).await?;
            return Ok(Ready { image: image.clone(), layers: Vec::new(), base: String::new() });
        }
        let chain = chain_ids(&image.diff_ids);
        let mut first = chain.len();
        while first > 0
            && !self.snapshots.join(context, &image.snapshotter, chain[first - 1].as_str()).await?
        {
            first -= 1;
        }
        let unpacking = (first..chain.len()).map(|at| {
            let parent = if at > 0 { chain[at - 1].as_str() } else { "" };
            self.unpack_alone(context, image, at, &chain[at], parent, &arriving[at], gate, stop)
        });
        // All of them, so that no snapshot is being written to when they are removed.
        let unpacked = join_all(unpacking.map(async |unpacking| {
            let unpacked = unpacking.await;
            if unpacked.is_err() {
                stop.cancel();
            }
            unpacked
        }));
        let (mut layers, mut failed) = (Vec::new(), None);
        for unpacked in unpacked.await {
            match (unpacked, &failed) {
                (Ok(unpacked), _) => layers.extend(unpacked),
                // What was given up was so for another reason.
                (Err(error), None | Some(Error::Cancelled(_))) => failed = Some(error),
                (Err(_), Some(_)) => {}
            }
        }
        let base = if first > 0 { chain[first - 1].to_string() } else { String::new() };
        let ready = Ready { image: image.clone(), layers, base };
        match failed {
            None => Ok(ready),
            Some(error) => {
                self.give_up(context, ready).await;
                Err(error)
            }
        }
    }

    /// Unpacks one layer, whatever is beneath it; None when it is there meanwhile.
    #[allow(clippy::too_many_arguments, reason = "of one caller, whose arguments they are")]
    async fn unpack_alone(
        &self,
        context: &RequestContext,
        image: &Image,
        at: usize,
        name: &Digest,
        parent: &str,
        arriving: &Arriving,
        gate: &Arc<Semaphore>,
        stop: &CancellationToken,
    ) -> Result<Option<Unpacked>> {
        let (layer, diff_id) = (&image.manifest.layers[at], &image.diff_ids[at]);
        let seen = arriving.job.as_ref().map(|job| job.unpacked.clone()).unwrap_or_default();
        let reader = tokio::select! {
            reader = arriving.blob.reader(seen) => reader?,
            () = stop.cancelled() => return Err(given_up()),
        };
        let _permit = tokio::select! {
            permit = gate.acquire() => permit.map_err(|_| given_up())?,
            () = stop.cancelled() => return Err(given_up()),
        };
        let what =
            |error: Error| error.context(format!("unpack layer {} with {}", layer.digest, image.snapshotter));
        let labels = snapshot_labels(layer, name);
        let prepared = self.prepare(context, &image.snapshotter, "", &labels, name).await.map_err(what)?;
        let Some((key, mounts)) = prepared else { return Ok(None) };
        let done = async {
            let upper = sys::mount::as_plain_dir(&mounts).ok_or_else(|| {
                Error::internal(format!("snapshotter {} rebases what is no folder", image.snapshotter))
            })?;
            let (kind, size, folder) = (layer.media_type.clone(), layer.size, upper.clone());
            let base = parent.is_empty();
            let (applied, unsettled) =
                blocking(move || diff::apply_alone(reader, &kind, size, &folder, base)).await?;
            check(&applied, diff_id)?;
            Ok((upper, unsettled))
        };
        match done.await {
            Ok((upper, unsettled)) => {
                if let Some(job) = &arriving.job {
                    job.extracted();
                }
                let parent = Some(parent.to_owned());
                let commit = Layer { key, layer: name.to_string(), parent, labels };
                Ok(Some(Unpacked { commit, upper, unsettled }))
            }
            Err(error) => {
                self.throw_away(context, &image.snapshotter, key, &mounts).await;
                Err(what(error))
            }
        }
    }

    /// Removes a snapshot that was to become a layer. Best effort: without the lease it goes by itself.
    async fn throw_away(&self, context: &RequestContext, snapshotter: &str, key: String, mounts: &[Mount]) {
        if let Some(folder) = sys::mount::as_plain_dir(mounts) {
            // Its files first: where they have filled the disk, nothing can be committed before they are gone.
            let emptied = blocking(move || {
                let entries =
                    std::fs::read_dir(&folder).map_err(|error| Error::io("read", &folder, &error))?;
                for path in entries.flatten().map(|entry| entry.path()) {
                    sys::fs::remove_tree(&path).map_err(|error| Error::io("remove", &path, &error))?;
                }
                Ok(())
            });
            if let Err(error) = emptied.await {
                tracing::debug!(%error, "a layer that failed goes with its snapshot");
            }
        }
        let _ = self.snapshots.remove(context, snapshotter, key).await;
    }

    /// Commits an image's unpacked layers; whether there were any, whose files are on disk now as is all else of their file
    /// system. What fails leaves nothing.
    pub(super) async fn commit_layers(&self, context: &RequestContext, mut ready: Ready) -> Result<bool> {
        if ready.layers.is_empty() {
            return Ok(false);
        }
        let committed = self.settle_and_commit(context, &mut ready).await;
        // Those that another has made before, too.
        match committed {
            Ok(made) => {
                let (mut at, any) = (0, made.contains(&true));
                ready.layers.retain(|_| {
                    at += 1;
                    !made[at - 1]
                });
                self.give_up(context, ready).await;
                Ok(any)
            }
            Err(error) => {
                self.give_up(context, ready).await;
                Err(error)
            }
        }
    }

    async fn settle_and_commit(&self, context: &RequestContext, ready: &mut Ready) -> Result<Vec<bool>> {
        let snapshotter = &ready.image.snapshotter;
        if ready.layers.iter().any(|layer| !layer.unsettled.is_empty()) {
            let mut lower = match ready.base.as_str() {
                "" => Vec::new(),
                base => self.snapshots.layers(context, snapshotter, base).await?,
            };
            let unsettled: Vec<_> = ready
                .layers
                .iter_mut()
                .map(|layer| (layer.upper.clone(), std::mem::take(&mut layer.unsettled)))
                .collect();
            blocking(move || {
                for (upper, unsettled) in unsettled {
                    diff::settle(&upper, &lower, unsettled)?;
                    lower.insert(0, upper);
                }
                Ok(())
            })
            .await?;
        }
        sys::failpoint!("transfer.unpack.settled");
        let layers = ready.layers.iter().map(|layer| layer.commit.clone()).collect();
        self.snapshots.commit_stack(context, snapshotter, layers).await
    }

    /// Removes unpacked layers that are not to be committed.
    pub(super) async fn give_up(&self, context: &RequestContext, ready: Ready) {
        for layer in ready.layers {
            // Best effort: without the lease it goes by itself.
            let _ = self.snapshots.remove(context, &ready.image.snapshotter, layer.commit.key).await;
        }
    }

    /// Unpacks blobs that are there, and labels them; `gate` limits how many at a time.
    pub(super) async fn unpack(
        &self,
        context: &RequestContext,
        image: &Image,
        gate: &Arc<Semaphore>,
        stop: &CancellationToken,
    ) -> Result<()> {
        if self.unpacks_arriving(image) {
            let (content, of) = (self.content.clone(), context.clone());
            let layers = image.manifest.layers.clone();
            let arriving = blocking(move || {
                let open = |layer: &Descriptor| {
                    content.open_blob(&of, &layer.digest).map(|(file, size)| Arriving::there(file, size))
                };
                layers.iter().map(open).collect::<Result<Vec<_>>>()
            });
            let arriving = arriving.await?;
            let ready = self.unpack_arriving(context, image, &arriving, gate, stop).await?;
            self.commit_layers(context, ready).await?;
        } else {
            let none: Vec<_> = image.manifest.layers.iter().map(|_| None).collect();
            self.unpack_in_order(context, image, &none, stop).await?;
        }
        let config = (&image.manifest.config, image.keeps().into_iter().collect());
        let labels = image.uncompressed().chain(std::iter::once(config));
        let labelled = labels.map(|(blob, labels)| label(&self.content, context, &blob.digest, labels));
        futures::future::try_join_all(labelled).await.map(drop)
    }

    /// Unpacks one layer after the other, as it arrives or, for None, from the committed blob.
    async fn unpack_in_order(
        &self,
        context: &RequestContext,
        image: &Image,
        sources: &[Option<&Arriving>],
        stop: &CancellationToken,
    ) -> Result<()> {
        let chain = chain_ids(&image.diff_ids);
        let mut parent = String::new();
        let layers = image.manifest.layers.iter().zip(&image.diff_ids).zip(&chain).zip(sources);
        for (((layer, diff_id), name), source) in layers {
            if stop.is_cancelled() {
                return Err(given_up());
            }
            self.unpack_layer(context, &image.snapshotter, &parent, layer, diff_id, name, *source)
                .await
                .map_err(|error| {
                    error.context(format!("unpack layer {} with {}", layer.digest, image.snapshotter))
                })?;
            parent = name.to_string();
        }
        Ok(())
    }

    #[allow(clippy::too_many_arguments, reason = "of one caller, whose arguments they are")]
    async fn unpack_layer(
        &self,
        context: &RequestContext,
        snapshotter: &str,
        parent: &str,
        layer: &Descriptor,
        diff_id: &Digest,
        name: &Digest,
        source: Option<&Arriving>,
    ) -> Result<()> {
        let labels = snapshot_labels(layer, name);
        let prepared = self.prepare(context, snapshotter, parent, &labels, name).await?;
        let Some((key, mounts)) = prepared else { return Ok(()) };
        let unpacked_onto = mounts.clone();
        let applied = async {
            match source {
                Some(arriving) => {
                    let seen = arriving.job.as_ref().map(|job| job.unpacked.clone()).unwrap_or_default();
                    let reader = arriving.blob.reader(seen).await?;
                    let (kind, temporary) = (layer.media_type.clone(), self.diff.temporary().to_owned());
                    let size = layer.size;
                    let applied =
                        blocking(move || diff::apply(reader, &kind, Some(size), &mounts, &temporary, false))
                            .await?;
                    check(&applied, diff_id)?;
                    if let Some(job) = &arriving.job {
                        job.extracted();
                    }
                }
                None => {
                    let layer = diff::Layer { descriptor: wire(layer), mounts, ..diff::Layer::default() };
                    let applied = self.diff.apply(context, layer).await?;
                    check_digest(&applied.digest, diff_id)?;
                }
            }
            let layer = Layer { key: key.clone(), layer: name.to_string(), parent: None, labels };
            self.snapshots.commit(context, snapshotter, layer).await
        }
        .await;
        if let Err(error) = applied {
            self.throw_away(context, snapshotter, key, &unpacked_onto).await;
            if !matches!(error, Error::AlreadyExists(_)) {
                return Err(error);
            }
        }
        Ok(())
    }

    /// A snapshot for a layer; None when the layer is there. Our lease holds what there is.
    async fn prepare(
        &self,
        context: &RequestContext,
        snapshotter: &str,
        parent: &str,
        labels: &Labels,
        name: &Digest,
    ) -> Result<Option<(String, Vec<Mount>)>> {
        let mut tries = 0;
        loop {
            tries += 1;
            let key = format!("extract-{} {name}", unique());
            let new = New {
                key: key.clone(),
                parent: parent.to_owned(),
                labels: labels.clone(),
                kind: Kind::Active,
            };
            match self.snapshots.create(context, snapshotter, new).await {
                Ok(mounts) => return Ok(Some((key, mounts))),
                // Somebody has unpacked it, if it is not just being removed.
                Err(error @ Error::AlreadyExists(_)) => {
                    match self.snapshots.stat(context, snapshotter, name.as_str()).await {
                        Ok(_) => return Ok(None),
                        Err(Error::NotFound(_)) if tries < TRIES => {}
                        Err(Error::NotFound(_)) => return Err(error),
                        Err(error) => return Err(error),
                    }
                }
                Err(error) => return Err(error),
            }
        }
    }
}

fn snapshot_labels(layer: &Descriptor, name: &Digest) -> Labels {
    let annotations = layer.annotations.iter().filter(|(key, _)| key.starts_with(INHERITED));
    let mut labels: BTreeMap<_, _> = annotations.map(|(key, value)| (key.clone(), value.clone())).collect();
    labels.insert(TARGET.into(), name.to_string());
    labels
}

fn check(applied: &Applied, diff_id: &Digest) -> Result<()> {
    check_digest(applied.digest.as_str(), diff_id)
}

fn check_digest(found: &str, diff_id: &Digest) -> Result<()> {
    if found == diff_id.as_str() {
        return Ok(());
    }
    Err(Error::invalid_argument(format!(
        "uncompressed it has the digest {found}, but the image's config says {diff_id}"
    )))
}
