//! An image of the store, to a registry.
//!
//! ```text
//!  blobs (configs, layers, what else is named)   several at a time
//!  manifests                                     several at a time, by their digests
//!  indexes                                       innermost first
//!  the image itself                              last, by its tag
//! ```
//!
//! Invariants: nothing is sent before all that is to be sent is known to be in the store. A document is sent after what it
//! names, so that a push that ends early leaves nothing by the tag that is not whole. Layers that may not be given on are not
//! sent.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use futures::FutureExt as _;
use futures::future::try_join_all;
use oci::Digest;
use oci::image::{Descriptor, MANIFEST_LIMIT, media_type};
use parking_lot::Mutex;
use proto::containerd::types::transfer::{ImageStore, Progress as Event};
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;

use super::blobs::{Blobs, Children, is_foreign, label};
use super::progress::Progress;
use super::{Platforms, Transfers, given_up, wire};
use crate::content::parse_digest;
use crate::context::RequestContext;
use crate::error::{Error, Result, blocking};
use crate::remotes::{Pushed, Repository, Source};

/// How deep indexes may be nested.
const DEPTH: usize = 6;
/// How often the progress of uploads is told.
const TELL: Duration = Duration::from_millis(300);
/// The longest value that a label may have beside its key.
const LABEL_MAX: usize = 4096;

impl Transfers {
    /// Pushes an image.
    pub(super) async fn push(
        &self,
        context: &RequestContext,
        from: &ImageStore,
        to: &Repository,
        stop: &CancellationToken,
        progress: &Progress,
    ) -> Result<()> {
        tokio::select! {
            pushed = self.push_image(context, from, to, stop, progress) => pushed,
            () = stop.cancelled() => Err(given_up()),
        }
    }

    async fn push_image(
        &self,
        context: &RequestContext,
        from: &ImageStore,
        to: &Repository,
        stop: &CancellationToken,
        progress: &Progress,
    ) -> Result<()> {
        let image = self.images.get(context, &from.name)?;
        let record = image.target.unwrap_or_default();
        let digest = parse_digest(&record.digest)?;
        let target = Descriptor {
            annotations: record.annotations.clone(),
            ..Descriptor::new(&record.media_type, digest, u64::try_from(record.size).unwrap_or(0))
        };
        let registry = format!("OCI Registry ({})", to.reference());
        progress.say(&format!("Pushing to {registry}"));
        let of_image = |event: &str| Event {
            event: event.to_owned(),
            name: image.name.clone(),
            desc: Some(wire(&target)),
            ..Event::default()
        };
        progress.tell(of_image("pushing content"));
        let blobs = Blobs::new(self.content.clone(), context.clone(), stop.clone());
        let (platforms, label, root) = (Platforms::new(&from.platforms), to.source_label(), target.clone());
        let repository = to.reference().path().to_owned();
        let plan = blocking(move || {
            let mut plan = Plan::default();
            plan.walk(&blobs, &platforms, &root, 0)?;
            plan.narrow(&root.digest);
            for digest in plan.steps.keys() {
                // What is being sent is not collected.
                blobs.hold(digest)?;
            }
            plan.find_sources(&blobs, &label, &repository)?;
            Ok(plan)
        })
        .await
        .map_err(|error| error.context(format!("push {:?}", image.name)))?;
        let push = Push {
            transfers: self,
            context,
            to,
            plan: &plan,
            target: plan.top.as_ref().unwrap_or(&target.digest),
            name: &image.name,
            progress,
            sent: Mutex::default(),
        };
        tokio::select! {
            pushed = push.all() => pushed.map_err(|error| error.context(format!("push {:?}", image.name)))?,
            () = push.tell() => {}
        }
        progress.tell(of_image("pushed content"));
        progress.tell(Event {
            event: format!("Completed push to {registry}"),
            desc: Some(wire(&target)),
            ..Event::default()
        });
        Ok(())
    }
}

/// Something that is to be sent.
struct Step {
    descriptor: Descriptor,
    /// The names of what names it, as progress has them.
    parents: Vec<String>,
    /// Other repositories of the registry that may have it.
    sources: Vec<String>,
}

/// All that is to be sent, by its digest, and in which order.
#[derive(Default)]
struct Plan {
    steps: HashMap<Digest, Step>,
    blobs: Vec<Digest>,
    manifests: Vec<Digest>,
    /// Outermost first.
    indexes: Vec<Digest>,
    /// Whether something that an index names is left out.
    partial: bool,
    /// What is pushed under the reference's tag, where that is not what the image's record names.
    top: Option<Digest>,
}

impl Plan {
    fn walk(&mut self, blobs: &Blobs, platforms: &Platforms, node: &Descriptor, depth: usize) -> Result<()> {
        blobs.go_on()?;
        if depth > DEPTH {
            return Err(Error::invalid_argument(format!("indexes are nested more than {DEPTH} deep")));
        }
        if self.steps.contains_key(&node.digest) {
            return Ok(());
        }
        let missing = |digest: &Digest, kind: &str, error: Error| match error {
            Error::NotFound(_) => Error::not_found(format!(
                "{digest} ({kind}) is not in the store: pull the image for all platforms first, or push only the platforms \
                 that are here"
            )),
            error => error,
        };
        let children =
            blobs.children(node).map_err(|error| missing(&node.digest, &node.media_type, error))?;
        let step = Step { descriptor: node.clone(), parents: Vec::new(), sources: Vec::new() };
        self.steps.insert(node.digest.clone(), step);
        let wanted: Vec<&Descriptor> = match &children {
            Children::Index(index) => {
                self.indexes.push(node.digest.clone());
                index.manifests.iter().filter(|child| platforms.rank(child).is_some()).collect()
            }
            Children::Manifest(_) => {
                self.manifests.push(node.digest.clone());
                children.all().into_iter().filter(|child| !is_foreign(&child.media_type)).collect()
            }
            Children::None => {
                self.blobs.push(node.digest.clone());
                blobs
                    .content
                    .info(&blobs.context, &node.digest)
                    .map_err(|error| missing(&node.digest, &node.media_type, error))?;
                return Ok(());
            }
        };
        self.partial |= matches!(&children, Children::Index(index) if wanted.len() < index.manifests.len());
        for child in wanted {
            self.walk(blobs, platforms, child, depth + 1)?;
            if let Some(step) = self.steps.get_mut(&child.digest) {
                step.parents.push(key(node));
            }
        }
        Ok(())
    }

    /// One platform of an index is pushed as what it is, a manifest: registries take no index of which they lack a part.
    fn narrow(&mut self, root: &Digest) {
        if let ([index], [manifest], true) = (&self.indexes[..], &self.manifests[..], self.partial)
            && index == root
        {
            self.top = Some(manifest.clone());
            self.steps.remove(root);
            self.indexes.clear();
        }
    }

    /// Where the registry may take blobs from, by the labels of the blobs.
    fn find_sources(&mut self, blobs: &Blobs, label: &str, repository: &str) -> Result<()> {
        for digest in &self.blobs {
            let labels = blobs.content.info(&blobs.context, digest)?.labels;
            let annotated = self.steps.get(digest).and_then(|step| step.descriptor.annotations.get(label));
            let said = labels.get(label).into_iter().chain(annotated);
            let sources = candidates(said.flat_map(|list| list.split(',')), repository);
            if let Some(step) = self.steps.get_mut(digest) {
                step.sources = sources;
            }
        }
        Ok(())
    }
}

/// Other repositories, those with the most of the path in common first. Pure.
fn candidates<'a>(said: impl Iterator<Item = &'a str>, repository: &str) -> Vec<String> {
    let common = |name: &str| {
        let pairs = name.split('/').zip(repository.split('/'));
        pairs.take_while(|(one, other)| one == other).count()
    };
    let mut names: Vec<&str> = said.filter(|name| !name.is_empty() && *name != repository).collect();
    names.sort_unstable();
    names.dedup();
    names.sort_by_key(|name| std::cmp::Reverse(common(name)));
    names.into_iter().map(str::to_owned).collect()
}

/// What progress calls something.
fn key(descriptor: &Descriptor) -> String {
    let kind = match descriptor.media_type.as_str() {
        kind if media_type::is_manifest(kind) => "manifest",
        kind if media_type::is_index(kind) => "index",
        kind if media_type::is_layer(kind) => "layer",
        kind if media_type::is_config(kind) => "config",
        _ => "unknown",
    };
    match descriptor.annotations.get(super::store::TAG) {
        Some(name) => format!("{kind}-{name}@{}", descriptor.digest),
        None => format!("{kind}-{}", descriptor.digest),
    }
}

/// Does it once there is a slot.
async fn within(slots: &Semaphore, work: impl Future<Output = Result<()>>) -> Result<()> {
    let _slot = slots.acquire().await.map_err(|_| Error::internal("the slots of a push are closed"))?;
    work.await
}

/// A blob, how much of it went out, and how much of that was told.
type Sending = (Digest, Arc<AtomicU64>, u64);

/// A push that is under way.
struct Push<'a> {
    transfers: &'a Transfers,
    context: &'a RequestContext,
    to: &'a Repository,
    plan: &'a Plan,
    target: &'a Digest,
    name: &'a str,
    progress: &'a Progress,
    /// Uploads that are under way: how far they are, and how far they were when that was told.
    sent: Mutex<BTreeMap<String, Sending>>,
}

impl Push<'_> {
    async fn all(&self) -> Result<()> {
        let at_a_time = self.transfers.remotes.settings().concurrent_uploads.max(1);
        let mut seen = HashSet::new();
        for digest in self.plan.indexes.iter().chain(&self.plan.manifests).chain(&self.plan.blobs) {
            if seen.insert(digest) {
                self.event("waiting", digest, 0);
            }
        }
        let slots = Semaphore::new(at_a_time);
        let mut blobs = Vec::new();
        for digest in &self.plan.blobs {
            blobs.push(within(&slots, self.blob(digest)).boxed());
        }
        try_join_all(blobs).await?;
        let mut manifests = Vec::new();
        for digest in &self.plan.manifests {
            manifests.push(within(&slots, self.document(digest)).boxed());
        }
        try_join_all(manifests).await?;
        for digest in self.plan.indexes.iter().rev() {
            self.document(digest).await.map_err(|error| {
                if self.plan.partial {
                    error.context(
                        "the index names manifests of other platforms, which the registry may want first: push all platforms",
                    )
                } else {
                    error
                }
            })?;
        }
        Ok(())
    }

    async fn blob(&self, digest: &Digest) -> Result<()> {
        let Some(step) = self.plan.steps.get(digest) else { return Ok(()) };
        let (content, context, wanted) =
            (self.transfers.content.clone(), self.context.clone(), digest.clone());
        let (file, size) = blocking(move || content.open_blob(&context, &wanted)).await?;
        if size != step.descriptor.size {
            return Err(Error::data_loss(format!(
                "{digest} has {size} bytes in the store, but {} by its manifest; the image is damaged",
                step.descriptor.size
            )));
        }
        let source = Source { file: Arc::new(file), sent: Arc::default() };
        let name = key(&step.descriptor);
        self.sent.lock().insert(name.clone(), (digest.clone(), source.sent.clone(), 0));
        let pushed = self.to.push_blob(&step.descriptor, &source, &step.sources).await;
        self.sent.lock().remove(&name);
        self.done(digest, &pushed?, size);
        self.label(digest).await;
        Ok(())
    }

    async fn document(&self, digest: &Digest) -> Result<()> {
        let Some(step) = self.plan.steps.get(digest) else { return Ok(()) };
        let (content, context, wanted) =
            (self.transfers.content.clone(), self.context.clone(), digest.clone());
        let bytes = blocking(move || content.read_document(&context, &wanted, MANIFEST_LIMIT)).await?;
        let bytes = Bytes::from(bytes);
        let size = bytes.len() as u64;
        let pushed = self.to.push_manifest(&step.descriptor, bytes, digest == self.target).await?;
        self.done(digest, &pushed, size);
        self.label(digest).await;
        Ok(())
    }

    fn done(&self, digest: &Digest, pushed: &Pushed, size: u64) {
        let event = if *pushed == Pushed::Exists { "already exists" } else { "complete" };
        self.event(event, digest, size);
    }

    fn event(&self, event: &str, digest: &Digest, sent: u64) {
        let Some(step) = self.plan.steps.get(digest) else { return };
        let parents = if step.parents.is_empty() { vec![self.name.to_owned()] } else { step.parents.clone() };
        self.progress.tell(Event {
            event: event.to_owned(),
            name: key(&step.descriptor),
            parents,
            progress: i64::try_from(sent).unwrap_or(i64::MAX),
            total: i64::try_from(step.descriptor.size).unwrap_or(i64::MAX),
            desc: Some(wire(&step.descriptor)),
        });
    }

    /// Tells how far uploads are, for as long as it is let.
    async fn tell(&self) {
        loop {
            tokio::time::sleep(TELL).await;
            let mut grown = Vec::new();
            for (digest, sent, told) in self.sent.lock().values_mut() {
                let now = sent.load(Ordering::Relaxed);
                if now > *told {
                    *told = now;
                    grown.push((digest.clone(), now));
                }
            }
            for (digest, now) in grown {
                self.event("uploading", &digest, now);
            }
        }
    }

    /// Notes that the registry has it now, so that other repositories can take it from there.
    async fn label(&self, digest: &Digest) {
        let key = self.to.source_label();
        let own = self.to.reference().path();
        let labels = self.transfers.content.info(self.context, digest).map(|info| info.labels);
        let before = labels.ok().and_then(|mut labels| labels.remove(&key)).unwrap_or_default();
        let mut names: Vec<&str> = before.split(',').filter(|name| !name.is_empty()).collect();
        if names.contains(&own) {
            return;
        }
        names.push(own);
        names.sort_unstable();
        let value = names.join(",");
        if key.len() + value.len() > LABEL_MAX {
            return;
        }
        let labels = [(key, value)].into();
        if let Err(error) = label(&self.transfers.content, self.context, digest, labels).await {
            tracing::debug!(%error, "the source of a blob is not noted");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blobs_are_mounted_from_the_nearest_repository() {
        let said = "z/other,team/app/base,team/app,team/tool,team/app,";
        assert_eq!(
            candidates(said.split(','), "team/app"),
            ["team/app/base", "team/tool", "z/other"],
            "never from itself"
        );
        assert_eq!(candidates("".split(','), "a"), [""; 0]);
    }

    #[test]
    fn steps_are_called_as_containerd_calls_them() {
        let of = |kind: &str| key(&Descriptor::of(kind, b"x")).split_once('-').unwrap().0.to_owned();
        assert_eq!(of(media_type::OCI_LAYER_GZIP), "layer");
        assert_eq!(of(media_type::DOCKER_LIST), "index");
        assert_eq!(of(media_type::OCI_MANIFEST), "manifest");
        assert_eq!(of(media_type::DOCKER_CONFIG), "config");
        assert_eq!(of("application/x"), "unknown");
    }
}
