//! An image from a registry, into the store and, as it arrives, onto snapshots.
//!
//! ```text
//!  resolve --> verifiers --> index, manifests, configs (small, whole, checked)
//!          --> layers, several at a time:  registry --> ingest --> snapshot     (fetch.rs, arrival.rs, unpack.rs)
//!          --> all there and unpacked: one sync --> snapshots --> blobs, with their labels --> names
//! ```
//!
//! Invariants: nothing is named before all of it is on disk. A pull that fails, or whose caller goes, leaves ingests that the next
//! goes on with, and nothing else; one that ran into a full disk leaves not even those.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;

use futures::future::{BoxFuture, join_all};
use oci::Digest;
use oci::image::{CONFIG_LIMIT, Descriptor, Index, MANIFEST_LIMIT, Manifest, media_type};
use parking_lot::Mutex;
use proto::containerd::types::transfer::ImageStore;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::arrival::Arrival;
use super::blobs::{Children, is_foreign};
use super::fetch::{self, Fetch};
use super::progress::{Job, Jobs, Progress};
use super::store::names;
use super::unpack::{self, Arriving, Image};
use super::{Platforms, Transfers, given_up, unpackers, wire};
use crate::context::RequestContext;
use crate::error::{Error, Result};
use crate::remotes::Repository;

/// How deep indexes may be nested in one another.
const DEPTH: usize = 4;
/// Docker's manifests of old, which nothing writes any more.
const SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1+";
/// A label of the image that is to be made: its layers' blobs may go once they are unpacked.
const DISCARD: &str = "containerd.io/discard-unpacked-layers";

/// A label of what is asked for, which the image does not get: no platform is wanted, so that with `all_metadata` there are
/// manifests and configs alone.
const METADATA_ONLY: &str = "gantry.io/metadata-only";

/// What of an image is wanted.
struct Wanted<'a> {
    store: &'a ImageStore,
    platforms: Platforms,
    /// Whether layers may come from the addresses that the image names for them.
    foreign: bool,
    fetch: &'a Fetch,
    jobs: &'a Jobs,
    plan: Mutex<Plan>,
}

/// What is found in its documents.
#[derive(Default)]
struct Plan {
    seen: HashSet<Digest>,
    /// Everything that is not a document of the image, in order.
    blobs: Vec<(Descriptor, Arriving)>,
    images: Vec<Image>,
    documents: Vec<Descriptor>,
}

impl Transfers {
    /// Pulls an image.
    pub(super) async fn pull(
        &self,
        context: &RequestContext,
        from: &Repository,
        mut to: ImageStore,
        stop: &CancellationToken,
        progress: &Progress,
    ) -> Result<()> {
        let name = from.reference().to_string();
        progress.say(&format!("Resolving from OCI Registry ({name})"));
        let target = tokio::select! {
            () = stop.cancelled() => return Err(given_up()),
            target = from.resolve() => target.map_err(|error| error.context(format!("resolve {name}")))?,
        };
        if target.media_type.starts_with(SCHEMA_1) {
            return Err(Error::invalid_argument(format!(
                "{name} has a manifest of Docker's schema 1, which is not supported; push it again with a newer client"
            )));
        }
        if let Some(verifiers) = &self.verifiers {
            verifiers.allow(&name, &target).await?;
        }
        progress.say(&format!("Pulling from OCI Registry ({name})"));
        let of = wire(&target);
        progress.of("fetching image content", &name, &of);
        // Ends what is under way when a part of it fails.
        let stop = stop.child_token();
        let settings = self.remotes.settings();
        let (downloads, piece) = (settings.concurrent_downloads, settings.fetch_buffer);
        let (content, of_caller) = (self.content.clone(), context.clone());
        let fetch = Fetch::new(content, of_caller, from.clone(), downloads, piece, stop.clone());
        let jobs = Jobs::default();
        let pulled = tokio::select! {
            pulled = self.pull_all(context, &to, &target, &name, &fetch, &jobs) => pulled,
            () = jobs.run(progress) => Err(given_up()),
        };
        stop.cancel();
        jobs.tell(progress);
        pulled.map_err(|error| error.context(format!("pull {name}")))?;
        to.labels.remove(METADATA_ONLY);
        let names = names(&to, &of.digest, None);
        for name in self.store(context, &to, &of, names).await? {
            progress.saved(&name, &of);
        }
        progress.say(&format!("Completed pull from OCI Registry ({name})"));
        Ok(())
    }

    /// All but the names.
    async fn pull_all(
        &self,
        context: &RequestContext,
        to: &ImageStore,
        target: &Descriptor,
        name: &str,
        fetch: &Fetch,
        jobs: &Jobs,
    ) -> Result<()> {
        let wanted = Wanted {
            store: to,
            foreign: self.remotes.settings().foreign_layers,
            platforms: Platforms::new(&to.platforms),
            fetch,
            jobs,
            plan: Mutex::default(),
        };
        let pulled = async {
            let whole = !to.labels.contains_key(METADATA_ONLY);
            wanted.visit(target, whole, 0, vec![name.to_owned()]).await?;
            self.pull_layers(context, &wanted).await
        }
        .await;
        let Err(error) = pulled else { return Ok(()) };
        fetch.leave().await;
        if matches!(error, Error::ResourceExhausted(_)) {
            // A disk is full: what was fetched is in the way.
            let plan = std::mem::take(&mut *wanted.plan.lock());
            let blobs = plan.blobs.into_iter().map(|(blob, _)| blob).chain(plan.documents);
            for blob in blobs {
                let _ = self.content.abort(context, fetch::reference(&blob)).await;
            }
        }
        Err(error)
    }

    async fn pull_layers(&self, context: &RequestContext, wanted: &Wanted<'_>) -> Result<()> {
        let (blobs, images) = {
            let plan = wanted.plan.lock();
            (plan.blobs.clone(), plan.images.clone())
        };
        let fetch = wanted.fetch;
        let arriving: BTreeMap<&Digest, &Arriving> =
            blobs.iter().map(|(blob, arriving)| (&blob.digest, arriving)).collect();
        let gate = Arc::new(Semaphore::new(unpackers()));
        let first = Mutex::new(None);
        let failed = |error: Error| {
            let mut first = first.lock();
            // What was given up was so for another reason.
            if !matches!(*first, Some(ref first) if !matches!(first, Error::Cancelled(_))) {
                *first = Some(error);
            }
            fetch.stop.cancel();
        };
        let fetching = join_all(blobs.iter().map(async |(blob, arriving)| {
            if let Some(job) = &arriving.job
                && let Err(error) = fetch.fetch(blob, &arriving.blob, job).await
            {
                failed(error);
            }
        }));
        let (here, elsewhere): (Vec<_>, Vec<_>) =
            images.iter().partition(|image| self.unpacks_arriving(image));
        let unpacking = join_all(here.iter().map(async |image| {
            let layers: Vec<_> = image
                .manifest
                .layers
                .iter()
                .filter_map(|layer| arriving.get(&layer.digest).copied().cloned())
                .collect();
            let unpacked = self.unpack_arriving(context, image, &layers, &gate, &fetch.stop).await;
            unpacked.map_err(failed).ok()
        }));
        let (_, ready) = tokio::join!(fetching, unpacking);
        let mut ready: Vec<_> = ready.into_iter().flatten().collect();
        if let Some(error) = first.into_inner() {
            for ready in ready {
                self.give_up(context, ready).await;
            }
            return Err(error);
        }
        for image in &here {
            for (layer, labels) in image.uncompressed() {
                fetch.label(&layer.digest, labels);
            }
            fetch.label(&image.manifest.config.digest, image.keeps().into_iter().collect());
        }
        let mut synced = false;
        while let Some(next) = ready.pop() {
            let shared = self.shares_disk(&next.image.snapshotter);
            match self.commit_layers(context, next).await {
                Ok(made) => synced |= made && shared,
                Err(error) => {
                    for ready in ready {
                        self.give_up(context, ready).await;
                    }
                    return Err(error);
                }
            }
        }
        fetch.commit(synced).await?;
        for image in elsewhere {
            self.unpack(context, image, &gate, &fetch.stop).await?;
        }
        Ok(())
    }

    /// Whether a snapshotter's files are on the file system that has the blobs, so that one sync is for both.
    fn shares_disk(&self, snapshotter: &str) -> bool {
        use std::os::unix::fs::MetadataExt as _;
        let device = |path: &std::path::Path| std::fs::metadata(path).map(|metadata| metadata.dev()).ok();
        let root = self.snapshots.opened().find(|(name, ..)| *name == snapshotter).map(|(_, root, _)| root);
        root.and_then(device).is_some_and(|root| device(self.content.root()) == Some(root))
    }
}

impl Wanted<'_> {
    /// Fetches a document and what it names, but layers, which are noted. One that is not `wanted` is there for its metadata
    /// alone.
    fn visit<'a>(
        &'a self,
        parent: &'a Descriptor,
        wanted: bool,
        depth: usize,
        parents: Vec<String>,
    ) -> BoxFuture<'a, Result<()>> {
        Box::pin(async move {
            if !self.plan.lock().seen.insert(parent.digest.clone()) {
                return Ok(());
            }
            if depth > DEPTH {
                return Err(Error::invalid_argument(format!("its indexes are nested deeper than {DEPTH}")));
            }
            self.plan.lock().documents.push(parent.clone());
            let job = self.jobs.add(parent, parents);
            let bytes = self.fetch.document(parent, MANIFEST_LIMIT, &job).await?;
            let wrong = |error: oci::image::ImageError| {
                Error::invalid_argument(format!("{} ({}): {error}", parent.digest, parent.media_type))
            };
            let name = vec![fetch::reference(parent)];
            if media_type::is_index(&parent.media_type) {
                let index = Index::parse(&bytes).map_err(wrong)?;
                self.index(parent, index, wanted, depth, name).await
            } else if media_type::is_manifest(&parent.media_type) {
                let manifest = Manifest::parse(&bytes).map_err(wrong)?;
                self.manifest(parent, manifest, wanted, name).await
            } else {
                Err(Error::invalid_argument(format!(
                    "{} is of type {:?}, which is neither an index nor a manifest",
                    parent.digest, parent.media_type
                )))
            }
        })
    }

    async fn index(
        &self,
        parent: &Descriptor,
        index: Index,
        wanted: bool,
        depth: usize,
        name: Vec<String>,
    ) -> Result<()> {
        let children = Children::Index(index);
        self.fetch.label(&parent.digest, children.labels());
        let Children::Index(index) = children else { return Ok(()) };
        let mut chosen = self.platforms.select(&index);
        if self.store.manifest_limit > 0 {
            chosen.truncate(self.store.manifest_limit as usize);
        }
        // Inside of another index, one without manifests is odd, but in nobody's way.
        if wanted && chosen.is_empty() && (depth == 0 || !index.manifests.is_empty()) {
            let asked = self.platforms.wanted.first().cloned().unwrap_or_default();
            return Err(Error::not_found(format!("index {}: {}", parent.digest, index.no_platform(&asked))));
        }
        let chosen: HashSet<&Digest> = chosen.into_iter().map(|child| &child.digest).collect();
        for child in &index.manifests {
            let chosen = wanted && chosen.contains(&child.digest);
            if chosen || self.store.all_metadata {
                self.visit(child, chosen, depth + 1, name.clone()).await?;
            }
        }
        Ok(())
    }

    async fn manifest(
        &self,
        parent: &Descriptor,
        manifest: Manifest,
        wanted: bool,
        name: Vec<String>,
    ) -> Result<()> {
        let children = Children::Manifest(Box::new(manifest));
        let mut labels = children.labels();
        let Children::Manifest(manifest) = children else { return Ok(()) };
        let mut images = Vec::new();
        if unpack::is_image(&manifest) {
            self.plan.lock().documents.push(manifest.config.clone());
            let job = self.jobs.add(&manifest.config, name.clone());
            let config = self.fetch.document(&manifest.config, CONFIG_LIMIT, &job).await?;
            if wanted {
                images = unpack::plan(&config, &manifest, &self.store.unpacks)?;
            }
        }
        let discard = self.store.labels.get(DISCARD).is_some_and(|value| value == "true");
        if discard && !images.is_empty() {
            labels.retain(|key, _| !key.starts_with("containerd.io/gc.ref.content.l."));
        }
        self.fetch.label(&parent.digest, labels);
        if !wanted {
            return Ok(());
        }
        let mut plan = self.plan.lock();
        let config = std::iter::once(&manifest.config).filter(|_| !unpack::is_image(&manifest));
        for blob in config.chain(&manifest.layers) {
            if is_foreign(&blob.media_type) && !self.foreign {
                return Err(Error::failed_precondition(format!(
                    "layer {} of manifest {} is foreign ({}): it would be fetched from addresses that the image names, which is \
                     refused; import an archive of the image that has the layer, or set foreign_layers = true in \
                     plugins.\"io.containerd.transfer.v1.local\" for images that you trust",
                    blob.digest, parent.digest, blob.media_type
                )));
            }
            if plan.seen.insert(blob.digest.clone()) {
                let job: Arc<Job> = self.jobs.add(blob, name.clone());
                let arriving = Arriving { blob: Arc::new(Arrival::new()), job: Some(job) };
                plan.blobs.push((blob.clone(), arriving));
            }
        }
        plan.images.extend(images);
        Ok(())
    }
}
