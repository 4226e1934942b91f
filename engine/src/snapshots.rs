//! Snapshots: each namespace's own view of the snapshotters.
//!
//! ```text
//! client's key  --record-->  inner key NAMESPACE/NUMBER/KEY  --snapshotter-->  mounts
//! ```
//!
//! Invariants: a record names a snapshot that the snapshotter has, because it is written after the snapshot is there and
//! deleted before it goes. What a crash leaves between the two has no record, and goes at the next start. A commit, which
//! takes one inner key away for another, is recorded before it begins, and is brought to its end at the next start; the
//! record of it goes before only when the snapshotter is known to have done it, or not to have.

mod proxy;
mod reconcile;

use std::collections::{BTreeMap, HashSet};
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::SystemTime;

use self::proxy::Remote;
use crate::proxy::Proxy;
use parking_lot::Mutex;
use proto::containerd::events::{SnapshotCommit, SnapshotPrepare, SnapshotRemove};
use shim_api::trace;
use snapshotter::{Commit, Error as InnerError, Kind, Mount, Snapshotter, Usage};
use tokio::sync::Notify;

use crate::context::{Namespace, RequestContext};
use crate::error::{Error, Result, blocking, outlive};
use crate::events::Exchange;
use crate::filters::{self, Filter};
use crate::labels::{self, Labels};
use crate::leases;
use crate::metadata::leases::LeaseResource;
use crate::metadata::snapshots::{CommitRecord, SnapshotChild, SnapshotRecord};
use crate::metadata::{Metadata, Read, Transaction};

/// The label that names the snapshot that a prepared one is to become.
const REF_LABEL: &str = "containerd.io/snapshot.ref";
/// Labels that begin so, and [`REF_LABEL`], are the snapshotter's to see; the others are ours alone.
const INHERITED: &str = "containerd.io/snapshot/";

/// The snapshots of all namespaces; cheap to clone.
#[derive(Clone)]
pub struct Snapshots {
    snapshotters: Arc<BTreeMap<String, Opened>>,
    failed: Arc<BTreeMap<String, String>>,
    metadata: Metadata,
    events: Exchange,
    /// The number for the next inner key.
    number: Arc<AtomicU64>,
    committing: Arc<Committing>,
}

/// The layers that are being committed, by namespace, snapshotter and name: one at a time is made, so that what is stacked
/// on it in the same commit stands on the one that is recorded.
#[derive(Default)]
struct Committing {
    layers: Mutex<HashSet<[String; 3]>>,
    ended: Notify,
}

/// Layers in the hands of one commit.
struct Claim {
    committing: Arc<Committing>,
    layers: Vec<[String; 3]>,
}

impl Committing {
    /// Takes all of them, once nobody has any.
    async fn claim(self: &Arc<Self>, layers: Vec<[String; 3]>) -> Claim {
        loop {
            let ended = self.ended.notified();
            tokio::pin!(ended);
            ended.as_mut().enable();
            {
                let mut claimed = self.layers.lock();
                if !layers.iter().any(|layer| claimed.contains(layer)) {
                    claimed.extend(layers.iter().cloned());
                    return Claim { committing: self.clone(), layers };
                }
            }
            ended.await;
        }
    }
}

impl Drop for Claim {
    fn drop(&mut self) {
        let mut claimed = self.committing.layers.lock();
        claimed.retain(|layer| !self.layers.contains(layer));
        drop(claimed);
        self.committing.ended.notify_waiters();
    }
}

struct Opened {
    root: PathBuf,
    snapshotter: Arc<dyn Snapshotter>,
    /// Whether every record had its snapshot at the start.
    intact: bool,
}

/// A snapshot as a client sees it.
#[derive(Debug, Clone, PartialEq)]
pub struct Info {
    /// Its key, or its name once committed.
    pub key: String,
    /// What it is.
    pub kind: Kind,
    /// What is recorded of it.
    pub record: SnapshotRecord,
}

/// A snapshotter in another process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plugin {
    /// Its name here.
    pub name: String,
    /// Its name there.
    pub there: String,
    /// Its socket.
    pub address: PathBuf,
    /// Where it keeps its snapshots, as far as it says so.
    pub root: Option<PathBuf>,
}

/// What a new snapshot is to be.
#[derive(Debug, Clone)]
pub struct New {
    /// Its key.
    pub key: String,
    /// The committed snapshot it is stacked on; empty for none.
    pub parent: String,
    /// Its labels.
    pub labels: Labels,
    /// [`Kind::Active`], or [`Kind::View`].
    pub kind: Kind,
}

/// What an active snapshot is to become.
#[derive(Debug, Clone, Default)]
pub struct Layer {
    /// The key of the active snapshot.
    pub key: String,
    /// The name of the layer.
    pub layer: String,
    /// The name of the layer it is put onto, where that is not what it was prepared over (snapshotters that rebase).
    pub parent: Option<String>,
    /// The labels of the layer.
    pub labels: Labels,
}

impl Snapshots {
    /// Opens every built-in snapshotter beneath `root`, and those of other processes. One that this file system cannot carry, that is damaged, or that
    /// is not the one that the records speak of, is left out with its reason; the rest serve.
    pub fn open(root: &Path, metadata: Metadata, events: Exchange, plugins: &[Plugin]) -> Result<Self> {
        let (mut opened, mut failed) = (BTreeMap::new(), BTreeMap::new());
        let number = Arc::new(AtomicU64::new(1));
        for plugin in plugins {
            let proxied = proxied(plugin, &metadata, &number);
            opened.insert(plugin.name.clone(), proxied);
        }
        // Side by side: each tries what the host can carry, with mounts and namespaces of its own.
        let tried = std::thread::scope(|scope| {
            let threads = snapshotter::NAMES.map(|name| {
                let root = root.join(format!("io.containerd.snapshotter.v1.{name}"));
                let (metadata, number) = (&metadata, &number);
                (name, scope.spawn(move || try_open(name, root, metadata, number)))
            });
            threads.map(|(name, thread)| (name, thread.join().unwrap_or_else(|panic| resume_unwind(panic))))
        });
        for (name, tried) in tried {
            match tried {
                Ok(found) => {
                    opened.insert(name.to_owned(), found);
                }
                Err(why) => {
                    failed.insert(name.to_owned(), why);
                }
            }
        }
        Ok(Snapshots {
            snapshotters: Arc::new(opened),
            failed: Arc::new(failed),
            metadata,
            events,
            number,
            committing: Arc::default(),
        })
    }

    /// The snapshotters that are open, with their folders and what they can.
    pub fn opened(&self) -> impl Iterator<Item = (&str, &Path, &[&str])> {
        let opened = self.snapshotters.iter();
        opened.map(|(name, of)| (name.as_str(), of.root.as_path(), of.snapshotter.capabilities()))
    }

    /// The snapshotters that could not be opened, and why.
    pub fn failed(&self) -> impl Iterator<Item = (&str, &str)> {
        self.failed.iter().map(|(name, why)| (name.as_str(), why.as_str()))
    }

    fn snapshotter(&self, name: &str) -> Result<Arc<dyn Snapshotter>> {
        if let Some(opened) = self.snapshotters.get(name) {
            return Ok(opened.snapshotter.clone());
        }
        if let Some(why) = self.failed.get(name) {
            return Err(Error::invalid_argument(format!(
                "snapshotter {name:?} is not available here: {why}"
            )));
        }
        let known: Vec<&str> = self.snapshotters.keys().map(String::as_str).collect();
        Err(Error::invalid_argument(format!(
            "snapshotter {name:?} is not known; these are: {}",
            known.join(", ")
        )))
    }

    fn record(&self, context: &RequestContext, name: &str, key: &str) -> Result<SnapshotRecord> {
        let record =
            self.metadata.view().get::<SnapshotRecord>(&[context.namespace()?.as_str(), name, key])?;
        record.ok_or_else(|| missing(key))
    }

    /// What a snapshotter said of the snapshot that `record` names as `key`. One that it does not have, while the record
    /// stays, it has lost.
    fn failure(
        &self,
        namespace: &Namespace,
        name: &str,
        key: &str,
        record: &SnapshotRecord,
        error: &InnerError,
    ) -> Error {
        if !matches!(error, InnerError::NotFound(_)) {
            return convert(key, error);
        }
        // Taken after the snapshotter was asked: what a removal or a commit took away is not in it any more, or is in a
        // commit's record.
        let view = self.metadata.view();
        let stays = view.get::<SnapshotRecord>(&[namespace.as_str(), name, key]);
        let commits = view.list::<CommitRecord>(&[namespace.as_str(), name]);
        match stays {
            Ok(Some(stays))
                if stays.inner == record.inner
                    && commits.iter().all(|(_, intent)| intent.inner != record.inner) =>
            {
                Error::data_loss(format!(
                    "snapshot {key:?} is recorded, but snapshotter {name} has lost it; remove it and what is stacked on \
                     it, and make them anew (unpack the image again)"
                ))
            }
            _ => missing(key),
        }
    }

    /// Makes an active snapshot or a view; its mounts. AlreadyExists for a key that is taken, and for a target (the label
    /// containerd.io/snapshot.ref) that exists; what exists joins the lease in both cases.
    pub async fn create(&self, context: &RequestContext, name: &str, new: New) -> Result<Vec<Mount>> {
        let namespace = context.namespace()?.clone();
        let snapshotter = self.snapshotter(name)?;
        labels::validate_all(&new.labels)?;
        if new.key.is_empty() {
            return Err(Error::invalid_argument("a snapshot's key must not be empty"));
        }
        let (this, context, name) = (self.clone(), context.clone(), name.to_owned());
        outlive(async move {
            if let Some(existing) = this.existing(&namespace, &name, &new)? {
                return Err(this.join_existing(context, name, existing).await);
            }
            let parent = match new.parent.as_str() {
                "" => SnapshotRecord::default(),
                parent => this.record(&context, &name, parent).map_err(|error| error.context("parent"))?,
            };
            let number = this.number.fetch_add(1, Ordering::Relaxed);
            let inner = format!("{namespace}/{number}/{}", new.key);
            let mounts = {
                let (inner, inner_parent) = (inner.clone(), parent.inner.clone());
                let (labels, kind) = (inherited(&new.labels), new.kind);
                let made = blocking(move || {
                    Ok(match kind {
                        Kind::View => snapshotter.view(&inner, &inner_parent, &labels),
                        _ => snapshotter.prepare(&inner, &inner_parent, &labels),
                    })
                });
                let made = trace::span("the snapshotter makes", made).await?;
                if matches!(made, Err(InnerError::AlreadyExists(_)))
                    && let Some(target) = new.labels.get(REF_LABEL)
                    && this.adopt(&context, &name, target.clone(), &parent, &new.parent).await?
                {
                    return Err(exists(target));
                }
                made.map_err(|error| match error {
                    // The only one that it was to find.
                    InnerError::NotFound(_) => {
                        this.failure(&namespace, &name, &new.parent, &parent, &error).context("parent")
                    }
                    error => convert(&new.key, &error),
                })?
            };
            sys::failpoint!("snapshots.create.made");
            let accepted = Arc::new(AtomicBool::new(false));
            let recorded = {
                let (namespace, name, new, inner) =
                    (namespace.clone(), name.clone(), new.clone(), inner.clone());
                let accepted = accepted.clone();
                this.metadata
                    .commit(move |txn| {
                        let key = [namespace.as_str(), &name, &new.key];
                        leases::join(txn, &context, &resource_type(&name), &new.key)?;
                        if txn.has::<SnapshotRecord>(&key)? {
                            return Ok(false);
                        }
                        let now = Some(SystemTime::now().into());
                        let record = SnapshotRecord {
                            inner,
                            parent: new.parent.clone(),
                            labels: new.labels,
                            created: now,
                            updated: now,
                        };
                        put_record(txn, namespace.as_str(), &name, &new.key, &record)?;
                        accepted.store(true, Ordering::Relaxed);
                        Ok(true)
                    })
                    .await
            };
            let refused = match recorded {
                Ok(true) => None,
                // Another call was faster.
                Ok(false) => Some(exists(&new.key)),
                // Whether the record is on disk is seen at the next start, which removes the snapshot if it is not.
                Err(error) if accepted.load(Ordering::Relaxed) => return Err(error),
                Err(error) => Some(error),
            };
            if let Some(error) = refused {
                this.remove_collected(vec![(name, inner)]).await;
                return Err(error);
            }
            sys::failpoint!("snapshots.create.recorded");
            if new.kind == Kind::Active {
                let event = SnapshotPrepare { key: new.key, parent: new.parent, snapshotter: name };
                this.events.publish(&namespace, "/snapshot/prepare", &event);
            }
            Ok(mounts)
        })
        .await
    }

    /// A snapshotter may have made what a snapshot is prepared for by itself, as one that mounts layers from a registry does,
    /// and says that it exists. Records such a layer under the name that the label gave it; whether there was one.
    async fn adopt(
        &self,
        context: &RequestContext,
        name: &str,
        target: String,
        parent: &SnapshotRecord,
        parent_key: &str,
    ) -> Result<bool> {
        let (namespace, snapshotter) = (context.namespace()?.clone(), self.snapshotter(name)?);
        let (of, inner_parent, wanted) = (name.to_owned(), parent.inner.clone(), target.clone());
        let found = blocking(move || {
            let mut found = None;
            let walked = snapshotter.walk(&mut |info| {
                let is_it = info.kind == Kind::Committed
                    && info.parent == inner_parent
                    && info.labels.get(REF_LABEL) == Some(&wanted);
                if is_it {
                    found = Some(info);
                }
                Ok(())
            });
            walked.map_err(|error| convert(&wanted, &error))?;
            Ok(found)
        });
        let Some(layer) = found.await? else { return Ok(false) };
        let (context, parent) = (context.clone(), parent_key.to_owned());
        self.metadata
            .commit(move |txn| {
                leases::join(txn, &context, &resource_type(&of), &target)?;
                if txn.has::<SnapshotRecord>(&[namespace.as_str(), &of, &target])? {
                    return Ok(true);
                }
                let now = Some(SystemTime::now().into());
                let record = SnapshotRecord {
                    inner: layer.key,
                    parent,
                    labels: layer.labels,
                    created: now,
                    updated: now,
                };
                put_record(txn, namespace.as_str(), &of, &target, &record)?;
                Ok(true)
            })
            .await
    }

    /// The snapshot that is in the way of a new one: its target, or one with its key.
    fn existing(&self, namespace: &Namespace, name: &str, new: &New) -> Result<Option<String>> {
        let view = self.metadata.view();
        for key in new.labels.get(REF_LABEL).into_iter().chain([&new.key]) {
            if view.has::<SnapshotRecord>(&[namespace.as_str(), name, key])? {
                return Ok(Some(key.clone()));
            }
        }
        Ok(None)
    }

    async fn join_existing(&self, context: RequestContext, name: String, key: String) -> Error {
        let exists = exists(&key);
        if context.lease().is_none() {
            return exists;
        }
        let joined =
            self.metadata.commit(move |txn| leases::join(txn, &context, &resource_type(&name), &key)).await;
        joined.err().unwrap_or(exists)
    }

    /// Asks the snapshotter about the snapshot with this key.
    async fn ask<T: Send + 'static>(
        &self,
        context: &RequestContext,
        name: &str,
        key: &str,
        question: impl FnOnce(&dyn Snapshotter, &str) -> snapshotter::Result<T> + Send + 'static,
    ) -> Result<T> {
        let (namespace, snapshotter) = (context.namespace()?.clone(), self.snapshotter(name)?);
        let record = self.record(context, name, key)?;
        let (this, name, key) = (self.clone(), name.to_owned(), key.to_owned());
        blocking(move || {
            question(&*snapshotter, &record.inner)
                .map_err(|error| this.failure(&namespace, &name, &key, &record, &error))
        })
        .await
    }

    /// The mounts of an active snapshot or a view.
    pub async fn mounts(&self, context: &RequestContext, name: &str, key: &str) -> Result<Vec<Mount>> {
        self.ask(context, name, key, |snapshotter, inner| snapshotter.mounts(inner)).await
    }

    /// Makes the active snapshot `key` the layer `layer`, with these labels, and puts it onto another parent where one is
    /// given.
    pub async fn commit(&self, context: &RequestContext, name: &str, layer: Layer) -> Result<()> {
        let wanted = layer.layer.clone();
        match self.commit_stack(context, name, vec![layer]).await?[..] {
            [true] => Ok(()),
            _ => Err(exists(&wanted)),
        }
    }

    /// Commits several active snapshots, of which one may be the parent of a later one, with one sync for all of them:
    /// whether each was made a layer, or another has made that layer before. The lease holds the layers in both cases.
    pub async fn commit_stack(
        &self,
        context: &RequestContext,
        name: &str,
        layers: Vec<Layer>,
    ) -> Result<Vec<bool>> {
        let namespace = context.namespace()?.clone();
        let snapshotter = self.snapshotter(name)?;
        for layer in &layers {
            labels::validate_all(&layer.labels)?;
            if layer.layer.is_empty() {
                return Err(Error::invalid_argument("the name to commit a snapshot as must not be empty"));
            }
        }
        let (this, context, name) = (self.clone(), context.clone(), name.to_owned());
        outlive(async move {
            let claimed =
                layers.iter().map(|layer| [namespace.to_string(), name.clone(), layer.layer.clone()]);
            let _claim = this.committing.claim(claimed.collect()).await;
            let (intents, inners, commits) = this.begin_commits(&context, &namespace, &name, &layers)?;
            this.record_commits(context, &namespace, &name, &layers, &intents, &inners).await?;
            if intents.is_empty() {
                return Ok(vec![false; layers.len()]);
            }
            sys::failpoint!("snapshots.commit.intended");
            let keys = layers.iter().map(|layer| layer.key.as_str()).collect::<Vec<_>>().join(", ");
            let committed = {
                let (snapshotter, keys) = (snapshotter.clone(), keys.clone());
                blocking(move || snapshotter.commit_stack(&commits).map_err(|error| convert(&keys, &error)))
                    .await
            };
            if let Err(error) = &committed {
                // After a failed sync the journal may have it or not: the record of this commit must be there for the
                // start that finds out. It has all of them or none.
                let inner = inners[0].clone();
                let known = blocking(move || Ok(snapshotter.stat(&inner))).await;
                if !matches!(known, Ok(Err(InnerError::NotFound(_)))) {
                    return Err(error.clone().context(format!(
                        "whether snapshot {keys:?} became a layer is seen when gantryd is started again"
                    )));
                }
            }
            sys::failpoint!("snapshots.commit.done");
            let done = committed.is_ok();
            let ended = {
                let (name, namespace, inners) = (name.clone(), namespace.clone(), inners.clone());
                let end = move |txn: &mut Transaction| {
                    let end = |inner: &String| end_commit(txn, namespace.as_str(), &name, inner, done);
                    inners.iter().map(end).collect::<Result<Vec<_>>>()
                };
                this.metadata.commit(end).await
            };
            sys::failpoint!("snapshots.commit.ended");
            committed?;
            let mut made = BTreeMap::new();
            let mut gone = None;
            for ((intent, inner), ended) in intents.into_iter().zip(inners).zip(ended?) {
                let CommitRecord { key, layer, .. } = intent;
                match ended {
                    Ended::Committed => {
                        let event = SnapshotCommit { key, name: layer.clone(), snapshotter: name.clone() };
                        this.events.publish(&namespace, "/snapshot/commit", &event);
                        made.insert(layer, true);
                    }
                    Ended::Exists => this.remove_collected(vec![(name.clone(), inner)]).await,
                    Ended::Gone => {
                        this.remove_collected(vec![(name.clone(), inner)]).await;
                        gone = gone.or(Some(missing(&key)));
                    }
                }
            }
            match gone {
                Some(error) => Err(error),
                None => Ok(layers.iter().map(|layer| made.contains_key(&layer.layer)).collect()),
            }
        })
        .await
    }

    /// What of these is to be committed, for those that do not exist yet: records of it, the inner keys of the layers, and
    /// what to ask of the snapshotter.
    fn begin_commits(
        &self,
        context: &RequestContext,
        namespace: &Namespace,
        name: &str,
        layers: &[Layer],
    ) -> Result<(Vec<CommitRecord>, Vec<String>, Vec<Commit>)> {
        let (mut intents, mut inners, mut commits) = (Vec::new(), Vec::new(), Vec::new());
        let mut new: BTreeMap<&str, String> = BTreeMap::new();
        let view = self.metadata.view();
        for Layer { key, layer, parent, labels } in layers {
            if new.contains_key(layer.as_str())
                || view.has::<SnapshotRecord>(&[namespace.as_str(), name, layer])?
            {
                continue;
            }
            let active = self.record(context, name, key)?.inner;
            let number = self.number.fetch_add(1, Ordering::Relaxed);
            let inner = format!("{namespace}/{number}/{layer}");
            let inner_parent = match parent.as_deref() {
                None => None,
                Some("") => Some(String::new()),
                Some(parent) => Some(match new.get(parent) {
                    Some(inner) => inner.clone(),
                    None => {
                        self.record(context, name, parent).map_err(|error| error.context("parent"))?.inner
                    }
                }),
            };
            commits.push(Commit {
                name: inner.clone(),
                key: active.clone(),
                parent: inner_parent,
                labels: inherited(labels),
            });
            intents.push(CommitRecord {
                key: key.clone(),
                inner: active,
                layer: layer.clone(),
                labels: labels.clone(),
                lease: context.lease().unwrap_or_default().to_owned(),
                parent: parent.clone(),
            });
            new.insert(layer, inner.clone());
            inners.push(inner);
        }
        Ok((intents, inners, commits))
    }

    /// Records commits that are about to begin. The layers join the lease, those that exist as well.
    async fn record_commits(
        &self,
        context: RequestContext,
        namespace: &Namespace,
        name: &str,
        layers: &[Layer],
        intents: &[CommitRecord],
        inners: &[String],
    ) -> Result<()> {
        let (namespace, name) = (namespace.clone(), name.to_owned());
        let layers: Vec<String> = layers.iter().map(|layer| layer.layer.clone()).collect();
        let intents: Vec<_> = inners.iter().cloned().zip(intents.iter().cloned()).collect();
        self.metadata
            .commit(move |txn| {
                for layer in &layers {
                    leases::join(txn, &context, &resource_type(&name), layer)?;
                }
                for (inner, intent) in &intents {
                    txn.put(&[namespace.as_str(), &name, inner], intent)?;
                }
                Ok(())
            })
            .await
    }

    /// Whether the snapshotter puts layers onto their parents when they are committed.
    pub fn rebases(&self, name: &str) -> bool {
        self.snapshotters
            .get(name)
            .is_some_and(|opened| opened.snapshotter.capabilities().contains(&snapshotter::REBASE))
    }

    /// The folders of a layer and of those beneath it, from the top, of a snapshotter that rebases.
    pub async fn layers(&self, context: &RequestContext, name: &str, layer: &str) -> Result<Vec<PathBuf>> {
        self.ask(context, name, layer, |snapshotter, inner| snapshotter.layers(inner)).await
    }

    /// Whether there is a snapshot of this key; if so, the caller's lease now holds it.
    pub async fn join(&self, context: &RequestContext, name: &str, key: &str) -> Result<bool> {
        let namespace = context.namespace()?.clone();
        let here = self.metadata.view().has::<SnapshotRecord>(&[namespace.as_str(), name, key])?;
        if !here || context.lease().is_none() {
            return Ok(here);
        }
        let (context, name, key) = (context.clone(), name.to_owned(), key.to_owned());
        self.metadata
            .commit(move |txn| {
                let here = txn.has::<SnapshotRecord>(&[namespace.as_str(), &name, &key])?;
                if here {
                    leases::join(txn, &context, &resource_type(&name), &key)?;
                }
                Ok(here)
            })
            .await
    }

    /// Removes a snapshot; FailedPrecondition while others are stacked on it. Of a snapshotter that could not be opened,
    /// what is recorded: the way to be rid of what is lost for good.
    pub async fn remove(&self, context: &RequestContext, name: &str, key: String) -> Result<()> {
        let namespace = context.namespace()?.clone();
        if !self.failed.contains_key(name) {
            self.snapshotter(name)?;
        }
        let (this, context, name) = (self.clone(), context.clone(), name.to_owned());
        outlive(async move {
            let event = SnapshotRemove { key: key.clone(), snapshotter: name.clone() };
            let (of, from) = (namespace.clone(), name.clone());
            let record = this
                .metadata
                .commit(move |txn| {
                    let namespace = of.as_str();
                    if txn.any::<SnapshotChild>(&[namespace, &name, &key]) {
                        return Err(Error::failed_precondition(format!(
                            "snapshot {key:?} cannot be removed: others are stacked on it; remove these first"
                        )));
                    }
                    let record = forget(txn, namespace, &name, &key)?.ok_or_else(|| missing(&key))?;
                    if let Some(lease) = context.lease() {
                        txn.delete::<LeaseResource>(&[namespace, lease, &resource_type(&name), &key])?;
                    }
                    txn.release();
                    Ok(record)
                })
                .await?;
            sys::failpoint!("snapshots.remove.forgotten");
            let removed = this.remove_collected(vec![(from, record.inner)]);
            trace::span("the snapshotter removes", removed).await;
            sys::failpoint!("snapshots.remove.done");
            this.events.publish(&namespace, "/snapshot/remove", &event);
            Ok(())
        })
        .await
    }

    /// Removes snapshots, as (snapshotter, inner key), that no record names any more: children before parents, whatever
    /// order they come in. What fails now is found again at the next start.
    pub(crate) async fn remove_collected(&self, removed: Vec<(String, String)>) {
        let mut of: BTreeMap<String, Vec<String>> = BTreeMap::new();
        for (name, inner) in removed {
            of.entry(name).or_default().push(inner);
        }
        let this = self.clone();
        let ended = outlive(blocking(move || {
            for (name, keys) in of {
                let Some(opened) = this.snapshotters.get(&name) else {
                    tracing::info!(
                        snapshotter = name,
                        ?keys,
                        "removed, and to be cleaned up when it is open"
                    );
                    continue;
                };
                let stay = reconcile::remove_unnamed(&this.metadata, &name, &*opened.snapshotter, keys);
                for (key, error) in stay {
                    tracing::warn!(snapshotter = name, key, %error, "a snapshot without a record stays for now");
                }
            }
            Ok(())
        }));
        if let Err(error) = ended.await {
            tracing::warn!(%error, "snapshots without a record are left for the next start");
        }
    }

    /// What is known of a snapshot.
    pub async fn stat(&self, context: &RequestContext, name: &str, key: &str) -> Result<Info> {
        let (namespace, snapshotter) = (context.namespace()?.clone(), self.snapshotter(name)?);
        let record = self.record(context, name, key)?;
        let (this, name, key) = (self.clone(), name.to_owned(), key.to_owned());
        blocking(move || match snapshotter.stat(&record.inner) {
            Ok(inner) => Ok(Info { key, kind: inner.kind, record }),
            Err(error) => Err(this.failure(&namespace, &name, &key, &record, &error)),
        })
        .await
    }

    /// Sets labels: those that the mask names (`labels`, `labels.KEY`), or all of them.
    pub async fn update(
        &self,
        context: &RequestContext,
        name: &str,
        key: String,
        new: Labels,
        mask: Vec<String>,
    ) -> Result<Info> {
        let namespace = context.namespace()?.clone();
        let snapshotter = self.snapshotter(name)?;
        let (this, name) = (self.clone(), name.to_owned());
        outlive(async move {
            let (namespace_of, name_of, of) = (namespace.clone(), name.clone(), key.clone());
            let record = this
                .metadata
                .commit(move |txn| {
                    let parts = [namespace_of.as_str(), &name_of, &of];
                    let mut record = txn.get::<SnapshotRecord>(&parts)?.ok_or_else(|| missing(&of))?;
                    if mask.is_empty() {
                        labels::update_map(&mut record.labels, &new, None);
                    }
                    for path in &mask {
                        match labels::split_path(path) {
                            ("labels", label) => labels::update_map(&mut record.labels, &new, label),
                            _ => {
                                return Err(Error::invalid_argument(format!(
                                    "field {path:?} of snapshot {of:?} cannot be updated; only labels can"
                                )));
                            }
                        }
                    }
                    labels::validate_all(&record.labels)?;
                    record.updated = Some(SystemTime::now().into());
                    txn.put(&parts, &record)?;
                    Ok(record)
                })
                .await?;
            blocking(move || {
                let updated = snapshotter.stat(&record.inner).and_then(|mut inner| {
                    inner.labels = inherited(&record.labels);
                    snapshotter.update(&inner, &["labels".into()])
                });
                match updated {
                    Ok(inner) => Ok(Info { key, kind: inner.kind, record }),
                    Err(error) => Err(this.failure(&namespace, &name, &key, &record, &error)),
                }
            })
            .await
        })
        .await
    }

    /// The snapshots that pass the filters (`name`, `parent`, `kind`, `labels.KEY`).
    pub async fn list(&self, context: &RequestContext, name: &str, filters: &[String]) -> Result<Vec<Info>> {
        let namespace = context.namespace()?;
        let filter = Filter::parse_all(filters)?;
        let snapshotter = self.snapshotter(name)?;
        let records = self.metadata.view().list::<SnapshotRecord>(&[namespace.as_str(), name]);
        blocking(move || {
            let mut list = Vec::new();
            for (parts, record) in records {
                let key = parts.concat();
                let info = match snapshotter.stat(&record.inner) {
                    Ok(inner) => Info { key, kind: inner.kind, record },
                    // Removed since the list was taken; or lost, which is no reason to hide the rest.
                    Err(InnerError::NotFound(_)) => continue,
                    Err(error) => return Err(convert(&key, &error)),
                };
                let passes = filter.matches(|path| match path {
                    ["name"] => Some(info.key.as_str().into()),
                    ["parent"] => {
                        Some(info.record.parent.as_str()).filter(|parent| !parent.is_empty()).map(Into::into)
                    }
                    ["kind"] => Some(format!("{:?}", info.kind).into()),
                    ["labels", rest @ ..] => filters::label(&info.record.labels, rest),
                    _ => None,
                });
                if passes {
                    list.push(info);
                }
            }
            Ok(list)
        })
        .await
    }

    /// What a snapshot itself takes, without its parents.
    pub async fn usage(&self, context: &RequestContext, name: &str, key: &str) -> Result<Usage> {
        self.ask(context, name, key, |snapshotter, inner| snapshotter.usage(inner)).await
    }

    /// What these snapshots, as (snapshotter, inner key), themselves take, without their parents; None where that cannot be told.
    pub(crate) async fn usages(&self, wanted: Vec<(String, String)>) -> Result<Vec<Option<Usage>>> {
        let this = self.clone();
        blocking(move || {
            let usage = |(name, inner): (String, String)| {
                let opened = this.snapshotters.get(&name)?;
                opened.snapshotter.usage(&inner).ok()
            };
            Ok(wanted.into_iter().map(usage).collect())
        })
        .await
    }

    /// Removes what removed snapshots may have left on disk.
    pub async fn cleanup(&self, name: &str) -> Result<()> {
        let (snapshotter, name) = (self.snapshotter(name)?, name.to_owned());
        if self.snapshotters.get(&name).is_some_and(|opened| !opened.intact) {
            return Err(Error::failed_precondition(format!(
                "snapshotter {name} has lost snapshots that are recorded, so that nothing is cleaned up; remove these, \
                 which gantryd's log names, and restart gantryd"
            )));
        }
        outlive(blocking(move || snapshotter.cleanup().map_err(|error| convert(&name, &error)))).await
    }
}

/// Opens a built-in snapshotter and brings it and its records together, or says why it is left out.
fn try_open(
    name: &str,
    root: PathBuf,
    metadata: &Metadata,
    number: &AtomicU64,
) -> std::result::Result<Opened, String> {
    let inner = snapshotter::open(name, &root);
    // Few hosts can carry all of them.
    let expected = matches!(inner, Err(InnerError::Unsupported(_)));
    let tried = inner.map_err(|error| error.to_string()).and_then(|snapshotter| {
        let intact = reconcile::reconcile(metadata, number, name, &root, &*snapshotter);
        intact.map(|intact| Opened { root, snapshotter, intact }).map_err(|error| error.to_string())
    });
    tried.inspect_err(|error| match expected {
        true => tracing::info!(snapshotter = name, error, "left out"),
        false => tracing::warn!(snapshotter = name, error, "left out"),
    })
}

/// A snapshotter of another process, put in order when it first answers.
fn proxied(plugin: &Plugin, metadata: &Metadata, number: &Arc<AtomicU64>) -> Opened {
    let (metadata, number, name) = (metadata.clone(), number.clone(), plugin.name.clone());
    let root = plugin.root.clone().unwrap_or_else(|| plugin.address.clone());
    let place = root.clone();
    let reconcile = Box::new(move |snapshotter: &dyn Snapshotter| {
        let done = reconcile::reconcile(&metadata, &number, &name, &place, snapshotter);
        done.map(drop).map_err(|error| InnerError::Unavailable(error.to_string()))
    });
    let proxy = Proxy::new(plugin.address.clone());
    let snapshotter = Arc::new(Remote::new(proxy, plugin.there.clone(), reconcile));
    Opened { root, snapshotter, intact: true }
}

fn missing(key: &str) -> Error {
    Error::not_found(format!("snapshot {key:?} does not exist"))
}

fn exists(key: &str) -> Error {
    Error::already_exists(format!("snapshot {key:?} exists already"))
}

fn resource_type(snapshotter: &str) -> String {
    format!("{}{snapshotter}", leases::SNAPSHOTS)
}

fn inherited(labels: &Labels) -> Labels {
    let passes = |key: &str| key == REF_LABEL || key.starts_with(INHERITED);
    labels.iter().filter(|(key, _)| passes(key)).map(|(key, value)| (key.clone(), value.clone())).collect()
}

/// How the commit of a snapshot ended in the records.
enum Ended {
    Committed,
    /// Another was faster to make this layer.
    Exists,
    /// The snapshotter refused, or the active snapshot was removed meanwhile.
    Gone,
}

/// Within a commit: ends the commit of a snapshot, which the snapshotter has `done` or not. The active snapshot is gone
/// from the snapshotter when it has, whatever becomes of the layer.
fn end_commit(txn: &mut Transaction, namespace: &str, name: &str, inner: &str, done: bool) -> Result<Ended> {
    let intent = txn.get::<CommitRecord>(&[namespace, name, inner])?;
    txn.delete::<CommitRecord>(&[namespace, name, inner])?;
    let Some(intent) = intent.filter(|_| done) else { return Ok(Ended::Gone) };
    let active = txn.get::<SnapshotRecord>(&[namespace, name, &intent.key])?;
    if active.is_none_or(|active| active.inner != intent.inner) {
        return Ok(Ended::Gone);
    }
    let Some(mut record) = forget(txn, namespace, name, &intent.key)? else { return Ok(Ended::Gone) };
    if let Some(parent) = intent.parent {
        if !parent.is_empty() && !txn.has::<SnapshotRecord>(&[namespace, name, &parent])? {
            return Ok(Ended::Gone);
        }
        record.parent = parent;
    }
    if !intent.lease.is_empty() {
        txn.delete::<LeaseResource>(&[namespace, &intent.lease, &resource_type(name), &intent.key])?;
    }
    if txn.has::<SnapshotRecord>(&[namespace, name, &intent.layer])? {
        return Ok(Ended::Exists);
    }
    (record.inner, record.labels) = (inner.to_owned(), intent.labels);
    let now = Some(SystemTime::now().into());
    (record.created, record.updated) = (now, now);
    put_record(txn, namespace, name, &intent.layer, &record)?;
    Ok(Ended::Committed)
}

/// Within a commit: writes a record, and that its parent has a child.
fn put_record(
    txn: &mut Transaction,
    namespace: &str,
    name: &str,
    key: &str,
    record: &SnapshotRecord,
) -> Result<()> {
    if !record.parent.is_empty() {
        if !txn.has::<SnapshotRecord>(&[namespace, name, &record.parent])? {
            return Err(missing(&record.parent).context("parent"));
        }
        txn.put(&[namespace, name, &record.parent, key], &SnapshotChild {})?;
    }
    txn.put(&[namespace, name, key], record)
}

/// Within a commit: deletes a record, and that its parent has this child; what was recorded, if anything.
/// [`Snapshots::remove_collected`] is for what it named, after the commit.
pub(crate) fn forget(
    txn: &mut Transaction,
    namespace: &str,
    name: &str,
    key: &str,
) -> Result<Option<SnapshotRecord>> {
    let parts = [namespace, name, key];
    let Some(record) = txn.get::<SnapshotRecord>(&parts)? else { return Ok(None) };
    txn.delete::<SnapshotRecord>(&parts)?;
    if !record.parent.is_empty() {
        txn.delete::<SnapshotChild>(&[namespace, name, &record.parent, key])?;
    }
    Ok(Some(record))
}

/// A snapshotter's error in the engine's class, with the client's key in the place of the inner one.
fn convert(key: &str, error: &InnerError) -> Error {
    match error {
        InnerError::NotFound(_) => missing(key),
        InnerError::AlreadyExists(_) => Error::already_exists(format!("snapshot {key:?} exists already")),
        InnerError::FailedPrecondition(_) | InnerError::InUse(_) => {
            Error::failed_precondition(format!("snapshot {key:?}: {error}"))
        }
        InnerError::InvalidArgument(_) => Error::invalid_argument(format!("snapshot {key:?}: {error}")),
        InnerError::Lost(_) => Error::data_loss(format!("snapshot {key:?}: {error}")),
        InnerError::Unsupported(_) => Error::unimplemented(error.to_string()),
        InnerError::Unavailable(_) => Error::unavailable(format!("snapshot {key:?}: {error}")),
        InnerError::Io { what, path, source } => Error::io(format!("snapshot {key:?}: {what}"), path, source),
    }
}

#[cfg(test)]
mod tests;
