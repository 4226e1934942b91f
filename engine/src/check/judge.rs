//! What is wrong in a picture of the machine. Pure: a picture in, findings out.
//!
//! ```text
//!  lost      acknowledged, and not there or not whole
//!  leaked    there, without an owner, and nothing that the engine does by itself would take it away
//!  pending   what the next start of the engine mends: no fault
//!  awaiting  what the next collection takes: counted, no fault
//! ```
//!
//! Invariant: what is to be repaired has no owner, or is of no use to its owner: nothing that a container, an image or a lease
//! can still use is ever in an action.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::path::{Path, PathBuf};

use oci::image::{Descriptor, media_type};
use oci::platform::Matcher;
use oci::{Digest, Platform};
use proto::containerd::services::containers::v1::Container;
use proto::containerd::services::images::v1::Image;
use proto::containerd::services::leases::v1::Lease;
use proto::containerd::types::Sandbox;
use snapshotter::{Kind, Stored, StoredSnapshot};

use super::world::{Document, End, Group, Of, Socket, Unread, World};
use super::{Action, Class, Finding};
use crate::content::dropped::is_dropped;
use crate::context::{Namespace, validate_identifier};
use crate::cri::NAMESPACE as PODS;
use crate::gc;
use crate::metadata::Read as _;
use crate::metadata::content::{BlobRecord, IngestRecord};
use crate::metadata::cri::{ContainerStage, PodContainerRecord, PodRecord, PodStage};
use crate::metadata::leases::LeaseResource;
use crate::metadata::mounts::MountRecord;
use crate::metadata::namespaces::NamespaceRecord;
use crate::metadata::snapshots::{CommitRecord, SnapshotChild, SnapshotRecord};

/// How deep indexes may be nested in one another.
const DEPTH: usize = 4;
/// What the next start does, in the words of a finding.
const START: &str = "the next start of gantryd";

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Judgement {
    pub(super) findings: Vec<Finding>,
    /// What the next collection takes, by kind.
    pub(super) awaiting: BTreeMap<&'static str, u64>,
    /// How much was looked at, by kind.
    pub(super) checked: BTreeMap<&'static str, u64>,
    /// What was not, and why.
    pub(super) not_checked: BTreeSet<String>,
}

struct Judge<'a> {
    world: &'a World,
    out: Judgement,
}

/// Finds the faults.
pub(super) fn judge(world: &World) -> Judgement {
    let mut judge = Judge { world, out: Judgement::default() };
    judge.records();
    judge.content();
    judge.images();
    judge.snapshots();
    judge.containers();
    judge.pods();
    judge.bundles();
    judge.runtimes();
    judge.sockets();
    judge.activations();
    judge.mounts();
    judge.garbage();
    judge.deep();
    let mut out = judge.out;
    out.findings.sort_by(|a, b| (a.class, a.kind, &a.name).cmp(&(b.class, b.kind, &b.name)));
    out
}

fn name(parts: &[String]) -> String {
    parts.join("/")
}

fn is_foreign(kind: &str) -> bool {
    media_type::is_layer(kind) && (kind.contains("foreign") || kind.contains("nondistributable"))
}

impl Judge<'_> {
    fn count(&mut self, kind: &'static str, number: usize) {
        *self.out.checked.entry(kind).or_default() += number as u64;
    }

    fn await_collection(&mut self, kind: &'static str, number: usize) {
        if number > 0 {
            *self.out.awaiting.entry(kind).or_default() += number as u64;
        }
    }

    fn found(
        &mut self,
        class: Class,
        kind: &'static str,
        name: impl Into<String>,
        what: impl Into<String>,
    ) -> &mut Finding {
        self.out.findings.push(Finding {
            class,
            kind,
            name: name.into(),
            what: what.into(),
            repair: None,
            remedy: String::new(),
        });
        // Pushed just now.
        let last = self.out.findings.len() - 1;
        &mut self.out.findings[last]
    }

    fn pending(&mut self, kind: &'static str, name: impl Into<String>, what: &str, then: &str) {
        self.found(Class::Pending, kind, name, what).remedy = format!("{START} {then}");
    }

    fn namespaces(&self) -> Vec<String> {
        self.world.view.keys::<NamespaceRecord>(&[]).into_iter().map(|parts| parts.concat()).collect()
    }

    /// Every record, and what records say of each other.
    fn records(&mut self) {
        let world = self.world;
        for broken in &world.broken {
            let finding = self.found(Class::Lost, "record", &broken.name, &broken.why);
            finding.repair = Some(Action::SetAside { key: broken.key.clone() });
        }
        let view = &world.view;
        let named: BTreeSet<String> = self.namespaces().into_iter().collect();
        let mut unnamed = BTreeSet::new();
        macro_rules! count {
            ($($kind:literal => $record:ty),+ $(,)?) => {
                $(
                    let keys = view.keys::<$record>(&[]);
                    self.count($kind, keys.len());
                    unnamed.extend(keys.into_iter().filter_map(|parts| parts.into_iter().next()));
                )+
            };
        }
        count!(
            "containers" => Container,
            "images" => Image,
            "blobs" => BlobRecord,
            "ingests" => IngestRecord,
            "leases" => Lease,
            "mounts" => MountRecord,
            "pods" => PodRecord,
            "pod containers" => PodContainerRecord,
            "sandboxes" => Sandbox,
            "snapshots" => SnapshotRecord,
        );
        for namespace in unnamed.difference(&named) {
            let what = "it has records, and none of its own, so that nothing in it is ever collected";
            let finding = self.found(Class::Lost, "namespace", namespace, what);
            finding.repair = Some(Action::NameNamespace { namespace: namespace.clone() });
        }
        for parts in view.keys::<LeaseResource>(&[]) {
            let [namespace, lease, ..] = &parts[..] else { continue };
            if !view.has::<Lease>(&[namespace, lease]).unwrap_or(true) {
                let finding =
                    self.found(Class::Leaked, "lease resource", name(&parts), "the lease is not there");
                finding.repair = Some(Action::DeleteResource { parts });
            }
        }
    }

    /// Files of blobs and ingests.
    fn content(&mut self) {
        let world = self.world;
        let content = &world.content;
        let mut named: BTreeSet<String> = BTreeSet::new();
        if content.elsewhere {
            self.out.not_checked.insert("blobs, which another process has".into());
        }
        for (parts, record) in world.view.list::<BlobRecord>(&[]) {
            let [namespace, digest] = &parts[..] else { continue };
            named.insert(digest.clone());
            if content.elsewhere {
                continue;
            }
            let damaged = world.deep.as_ref().and_then(|deep| deep.damaged.get(digest));
            let wrong = match content.blobs.get(digest) {
                None => Some("it has a record, and no file".to_owned()),
                Some(None) => Some("what is in its place is no file".to_owned()),
                Some(Some(size)) if i64::try_from(*size).ok() != Some(record.size) => {
                    Some(format!("it has {size} bytes instead of {}", record.size))
                }
                Some(Some(_)) => {
                    damaged.map(|found| format!("its bytes have the digest {found}")).or_else(|| {
                        let document =
                            digest.parse().ok().and_then(|digest: Digest| content.documents.get(&digest));
                        match document {
                            Some(Err(Unread::Damaged(why))) => Some(why.clone()),
                            _ => None,
                        }
                    })
                }
            };
            if let Some(wrong) = wrong {
                let finding = self.found(Class::Lost, "blob", format!("{namespace}/{digest}"), wrong);
                finding.repair = Some(Action::ForgetBlob { digest: digest.clone() });
                finding.remedy = "pull or import what it is a part of again".into();
            }
        }
        let mut known = BTreeSet::new();
        for (parts, record) in world.view.list::<IngestRecord>(&[]) {
            let folder = Digest::sha256_of(record.key.as_bytes()).hex().to_owned();
            named.extend(Some(record.shared.clone()).filter(|shared| !shared.is_empty()));
            if record.shared.is_empty() && content.ingests.get(&folder) != Some(&true) {
                self.pending("ingest", name(&parts), "it has a record, and no data", "forgets it");
            }
            known.insert(folder);
        }
        for folder in content.ingests.keys().filter(|folder| !known.contains(*folder)) {
            self.pending("ingest", folder, "it has no record", "removes it");
        }
        for path in &content.strays {
            let what = "it lies among the blobs, and is none";
            let finding = self.found(Class::Leaked, "file", path.display().to_string(), what);
            finding.repair = Some(Action::RemoveTree { path: path.clone() });
        }
        let unnamed = content.blobs.keys().filter(|digest| !named.contains(*digest)).count();
        self.await_collection("files of blobs", unnamed + content.removed);
    }

    /// What images are made of is there.
    fn images(&mut self) {
        let world = self.world;
        if world.content.elsewhere {
            return;
        }
        for (parts, image) in world.view.list::<Image>(&[]) {
            let [namespace, _] = &parts[..] else { continue };
            let target = image.target.unwrap_or_default();
            let mut missing = Vec::new();
            match target.digest.parse::<Digest>() {
                Ok(digest) => {
                    let size = u64::try_from(target.size).unwrap_or(0);
                    let target = Descriptor::new(&target.media_type, digest, size);
                    self.walk(namespace, &target, 0, &mut missing);
                }
                Err(error) => missing.push(format!("its target {:?} is no digest: {error}", target.digest)),
            }
            for what in missing {
                self.found(Class::Lost, "image", name(&parts), what).remedy =
                    "pull or import it again".into();
            }
        }
    }

    /// Looks for what a descriptor stands for. What is recorded and has no whole file is a finding of its own.
    fn walk(&self, namespace: &str, descriptor: &Descriptor, depth: usize, missing: &mut Vec<String>) {
        let has = |digest: &Digest| {
            self.world.view.has::<BlobRecord>(&[namespace, digest.as_str()]).unwrap_or(true)
        };
        let host = Matcher::only(&Platform::host());
        let runs = |of: &Descriptor| of.platform.as_ref().is_none_or(|of| host.matches(of));
        let digest = &descriptor.digest;
        if !has(digest) {
            return missing.push(format!("{digest}, which it is made of, is not there"));
        }
        match self.world.content.documents.get(digest) {
            Some(Ok(Document::Index(index))) if depth < DEPTH => {
                let mut here: Vec<_> = index.manifests.iter().filter(|of| has(&of.digest)).collect();
                // Those of other platforms need not be here, if this one's is.
                if !here.iter().any(|of| runs(of))
                    && let Some(wanted) = index.select(&host).into_iter().next().or(index.manifests.first())
                    && (here.is_empty() || runs(wanted))
                {
                    here.push(wanted);
                }
                for manifest in here {
                    self.walk(namespace, manifest, depth + 1, missing);
                }
            }
            Some(Ok(Document::Manifest(manifest))) => {
                let record = self.world.view.get::<BlobRecord>(&[namespace, digest.as_str()]);
                let record = record.ok().flatten().unwrap_or_default();
                // Clients that throw layers away once they are unpacked do not name them here either.
                let kept = |digest: &Digest| record.labels.values().any(|value| value == digest.as_str());
                if kept(&manifest.config.digest) && !has(&manifest.config.digest) {
                    missing.push(format!("its config {} is not there", manifest.config.digest));
                }
                // Of another platform there may be the documents alone.
                let whole = runs(descriptor) || manifest.layers.iter().any(|layer| has(&layer.digest));
                for layer in manifest.layers.iter().filter(|_| whole) {
                    let wanted = !is_foreign(&layer.media_type)
                        && !is_dropped(&record, &layer.digest)
                        && kept(&layer.digest);
                    if wanted && !has(&layer.digest) {
                        missing.push(format!("its layer {} is not there", layer.digest));
                    }
                }
            }
            Some(Err(Unread::Wrong(why))) => missing.push(format!("{digest}: {why}")),
            _ => {}
        }
    }

    /// Records of snapshots, the snapshotters' own, and folders.
    fn snapshots(&mut self) {
        let world = self.world;
        let mut records: BTreeMap<String, Vec<(Vec<String>, SnapshotRecord)>> = BTreeMap::new();
        for (parts, record) in world.view.list::<SnapshotRecord>(&[]) {
            if let [_, snapshotter, _] = &parts[..] {
                records.entry(snapshotter.clone()).or_default().push((parts, record));
            }
        }
        self.children(&records);
        let names: BTreeSet<&String> = records.keys().chain(world.snapshotters.keys()).collect();
        let none = Vec::new();
        for snapshotter in names {
            let of = records.get(snapshotter).unwrap_or(&none);
            if world.proxies.contains(snapshotter) || !snapshotter::NAMES.contains(&snapshotter.as_str()) {
                self.out.not_checked.insert(format!("snapshots of {snapshotter}, which another process has"));
                continue;
            }
            match world.snapshotters.get(snapshotter) {
                Some(Ok(stored)) if !stored.snapshots.is_empty() || of.is_empty() => {
                    self.snapshotter(snapshotter, stored, of);
                }
                Some(Err(why)) => {
                    self.found(Class::Lost, "snapshotter", snapshotter, why);
                }
                _ => {
                    let what = format!("it holds no snapshot, but {} are recorded", of.len());
                    let finding = self.found(Class::Lost, "snapshotter", snapshotter, what);
                    finding.remedy =
                        "if its disk is not mounted, mount it; if the snapshots are gone for good, remove \
                                      their records with `ctr snapshots rm`"
                            .into();
                }
            }
        }
    }

    /// Who is stacked on whom, as it is recorded twice.
    fn children(&mut self, records: &BTreeMap<String, Vec<(Vec<String>, SnapshotRecord)>>) {
        let view = &self.world.view;
        for (parts, record) in records.values().flatten() {
            let [namespace, snapshotter, key] = &parts[..] else { continue };
            if record.parent.is_empty() {
                continue;
            }
            if !view.has::<SnapshotRecord>(&[namespace, snapshotter, &record.parent]).unwrap_or(true) {
                let what = format!("its parent {} is not recorded", record.parent);
                self.found(Class::Lost, "snapshot", name(parts), what);
            }
            if !view.has::<SnapshotChild>(&[namespace, snapshotter, &record.parent, key]).unwrap_or(true) {
                let what = format!("{} does not know that this is stacked on it", record.parent);
                let finding = self.found(Class::Lost, "snapshot", name(parts), what);
                let child = [namespace, snapshotter, &record.parent, key].map(Clone::clone);
                finding.repair = Some(Action::NoteChild { child });
            }
        }
        for parts in view.keys::<SnapshotChild>(&[]) {
            let Ok([namespace, snapshotter, parent, child]) = <[String; 4]>::try_from(parts) else {
                continue;
            };
            let record = view.get::<SnapshotRecord>(&[&namespace, &snapshotter, &child]).ok().flatten();
            if record.is_none_or(|record| record.parent != parent) {
                let what = format!("is said to have {child} stacked on it, which is not so");
                let finding = self.found(
                    Class::Leaked,
                    "snapshot",
                    format!("{namespace}/{snapshotter}/{parent}"),
                    what,
                );
                finding.repair = Some(Action::ForgetChild { child: [namespace, snapshotter, parent, child] });
            }
        }
    }

    fn snapshotter(&mut self, snapshotter: &str, stored: &Stored, records: &[(Vec<String>, SnapshotRecord)]) {
        let world = self.world;
        let there: HashMap<&str, &StoredSnapshot> =
            stored.snapshots.iter().map(|one| (one.info.key.as_str(), one)).collect();
        let mut named: HashMap<&str, &[String]> =
            records.iter().map(|(parts, record)| (record.inner.as_str(), &parts[..])).collect();
        let commits: Vec<_> = world
            .view
            .list::<CommitRecord>(&[])
            .into_iter()
            .filter(|(parts, _)| parts.get(1).is_some_and(|of| of == snapshotter))
            .collect();
        if stored.torn > 0 {
            self.pending("snapshotter", snapshotter, "a record was half written", "cuts it off");
        }
        for (parts, record) in records {
            let [namespace, _, key] = &parts[..] else { continue };
            let Some(one) = there.get(record.inner.as_str()) else {
                let under_way = commits.iter().any(|(commit, intent)| {
                    intent.inner == record.inner
                        && commit.last().is_some_and(|made| there.contains_key(made.as_str()))
                });
                if under_way {
                    self.pending("snapshot", name(parts), "its commit was cut short", "ends it");
                } else {
                    let what = format!("{snapshotter} does not have it any more");
                    self.lost_snapshot(parts, &record.inner, stored, &named, what);
                }
                continue;
            };
            let parent = (!record.parent.is_empty())
                .then(|| {
                    world.view.get::<SnapshotRecord>(&[namespace, snapshotter, &record.parent]).ok().flatten()
                })
                .flatten();
            if let Some(parent) = parent
                && parent.inner != one.info.parent
            {
                let what =
                    format!("it is recorded on {}, and stacked on {:?}", record.parent, one.info.parent);
                self.found(Class::Lost, "snapshot", name(parts), what);
            }
            if !one.there {
                let what = format!("{} is gone", one.content.display());
                self.lost_snapshot(parts, &record.inner, stored, &named, what);
            }
            let differing = world.deep.iter().flat_map(|deep| &deep.differing);
            let differing: Vec<&String> = differing
                .filter(|(ns, of, layer, _)| ns == namespace && of == snapshotter && layer == key)
                .map(|(.., what)| what)
                .collect();
            if let Some(first) = differing.first() {
                let more = match differing.len() {
                    1 => String::new(),
                    many => format!(", and {} more", many - 1),
                };
                self.lost_snapshot(parts, &record.inner, stored, &named, format!("{first}{more}"));
            }
        }
        for (commit, intent) in &commits {
            if let [namespace, _, made] = &commit[..] {
                let shown = format!("{namespace}/{snapshotter}/{}", intent.layer);
                self.pending("snapshot", shown, "its commit was not ended", "ends it");
                named.entry(made.as_str()).or_default();
            }
        }
        for one in &stored.snapshots {
            if !one.info.parent.is_empty() && !there.contains_key(one.info.parent.as_str()) {
                let what = format!("{snapshotter} does not have its parent {}", one.info.parent);
                self.found(Class::Lost, "snapshot", format!("{snapshotter}:{}", one.info.key), what);
            }
            if !named.contains_key(one.info.key.as_str()) {
                let shown = format!("{snapshotter}:{}", one.info.key);
                self.pending("snapshot", shown, "it was made or removed halfway", "removes it");
            }
        }
        let numbers: BTreeSet<u64> = stored.snapshots.iter().map(|one| one.id).collect();
        let folder = world.root.join(format!("io.containerd.snapshotter.v1.{snapshotter}/snapshots"));
        for entry in &stored.folders {
            let path = folder.join(entry);
            match entry.parse::<u64>() {
                Ok(number) if numbers.contains(&number) => {}
                Ok(_) => self.pending(
                    "snapshot folder",
                    path.display().to_string(),
                    "no snapshot is recorded in it",
                    "removes it",
                ),
                Err(_) if entry.starts_with('.') => {
                    self.pending(
                        "snapshot folder",
                        path.display().to_string(),
                        "its snapshot was removed",
                        "removes it",
                    );
                }
                // A file system's own.
                Err(_) if entry == "lost+found" => {}
                Err(_) => {
                    let what = "it lies among snapshots' folders, and is none";
                    let finding =
                        self.found(Class::Leaked, "snapshot folder", path.display().to_string(), what);
                    finding.repair = Some(Action::RemoveTree { path });
                }
            }
        }
    }

    /// A snapshot that is of no use any more. With what is stacked on it, it is forgotten, so that it can be made anew,
    /// unless a container stands on it.
    fn lost_snapshot(
        &mut self,
        parts: &[String],
        inner: &str,
        stored: &Stored,
        named: &HashMap<&str, &[String]>,
        what: String,
    ) {
        let [namespace, snapshotter, key] = parts else { return };
        // Those at the top last.
        let (mut stack, mut at) = (vec![inner.to_owned()], 0);
        while let Some(below) = stack.get(at).cloned() {
            stack.extend(
                stored
                    .snapshots
                    .iter()
                    .filter(|one| one.info.parent == below)
                    .map(|one| one.info.key.clone()),
            );
            at += 1;
        }
        let mut keys: BTreeSet<&str> =
            stack.iter().filter_map(|inner| named.get(inner.as_str())?.get(2).map(String::as_str)).collect();
        keys.insert(key);
        let containers: Vec<String> = self
            .world
            .view
            .list::<Container>(&[namespace])
            .into_iter()
            .filter(|(_, container)| {
                container.snapshotter == *snapshotter && keys.contains(container.snapshot_key.as_str())
            })
            .map(|(parts, _)| parts.concat())
            .collect();
        // Somebody's, who has yet to say what it is for.
        let written = stored.snapshots.iter().any(|one| {
            one.info.kind != Kind::Committed && one.info.key != inner && stack.contains(&one.info.key)
        });
        let finding = self.found(Class::Lost, "snapshot", name(parts), what);
        if !containers.is_empty() {
            finding.remedy = format!(
                "`ctr images verify --repair` if an image has it as a layer; else remove what stands on it: container {}",
                containers.join(", ")
            );
        } else if written {
            finding.remedy =
                "`ctr images verify --repair` if an image has it as a layer; else remove the snapshots that \
                              stand on it (`ctr snapshots tree`)"
                    .into();
        } else {
            stack.reverse();
            let mut names: Vec<(String, String)> = Vec::new();
            for inner in stack {
                let key = named.get(inner.as_str()).and_then(|parts| parts.get(2)).cloned();
                names.push((key.unwrap_or_default(), inner));
            }
            if let Some(last) = names.last_mut() {
                last.0.clone_from(key);
            }
            finding.repair = Some(Action::ForgetSnapshots {
                namespace: namespace.clone(),
                snapshotter: snapshotter.clone(),
                names,
            });
        }
    }

    fn containers(&mut self) {
        let view = &self.world.view;
        for (parts, container) in view.list::<Container>(&[]) {
            let [namespace, id] = &parts[..] else { continue };
            let (of, key) = (&container.snapshotter, &container.snapshot_key);
            if of.is_empty()
                || key.is_empty()
                || view.has::<SnapshotRecord>(&[namespace, of, key]).unwrap_or(true)
            {
                continue;
            }
            if self.is_in_between(namespace, id) {
                self.pending("container", name(&parts), "it was made or removed halfway", "takes it down");
                continue;
            }
            let what = format!("its snapshot {of}/{key} is not recorded");
            self.found(Class::Lost, "container", name(&parts), what).remedy =
                "remove the container, and make it anew".into();
        }
    }

    /// Whether a container is the kubelet's, and was being made or removed.
    fn is_in_between(&self, namespace: &str, id: &str) -> bool {
        let record = self.world.view.get::<PodContainerRecord>(&[namespace, id]).ok().flatten();
        let pod = self.world.view.get::<PodRecord>(&[namespace, id]).ok().flatten();
        record.is_some_and(|of| matches!(of.stage(), ContainerStage::Making | ContainerStage::Removing))
            || pod.is_some_and(|of| matches!(of.stage(), PodStage::Making | PodStage::Removing))
    }

    fn pods(&mut self) {
        let world = self.world;
        let view = &world.view;
        let pods: BTreeMap<String, PodRecord> = view
            .list::<PodRecord>(&[PODS])
            .into_iter()
            .map(|(parts, record)| (parts.concat(), record))
            .collect();
        for (id, pod) in &pods {
            match pod.stage() {
                PodStage::Making | PodStage::Removing => {
                    self.pending("pod", id, "it was made or removed halfway", "takes it down");
                }
                PodStage::Stopped => {
                    self.pending("pod", id, "it was stopped halfway", "lets go of what it has");
                }
                PodStage::Ready if !pod.netns.is_empty() && !self.is_mounted(Path::new(&pod.netns)) => {
                    self.pending("pod", id, "its network namespace is gone", "says that it has ended");
                }
                PodStage::Ready | PodStage::Released => {}
            }
        }
        let containers: BTreeMap<String, PodContainerRecord> = view
            .list::<PodContainerRecord>(&[PODS])
            .into_iter()
            .map(|(parts, record)| (parts.concat(), record))
            .collect();
        for (id, container) in &containers {
            match container.stage() {
                ContainerStage::Making | ContainerStage::Removing => {
                    self.pending("pod container", id, "it was made or removed halfway", "takes it down");
                }
                _ if !view.has::<Container>(&[PODS, id]).unwrap_or(true) => {
                    let what = "containerd's record of it is not there";
                    self.found(Class::Lost, "pod container", id, what).remedy =
                        format!("remove it: `crictl rm {id}`");
                }
                _ if !pods.contains_key(&container.pod) => {
                    let what = format!("its pod {} is not there", container.pod);
                    self.found(Class::Leaked, "pod container", id, what).remedy =
                        format!("remove it: `crictl rm --force {id}`");
                }
                _ => {}
            }
        }
        let on_machine = &world.pods;
        let of = |ids: &[String]| -> Vec<String> {
            ids.iter().filter(|id| !pods.contains_key(*id)).cloned().collect()
        };
        for (kind, ids) in
            [("pod folder", &on_machine.folders), ("network namespace", &on_machine.namespaces)]
        {
            for id in of(ids) {
                self.pending(kind, id, "there is no pod of this id", "removes it");
            }
        }
        for (kind, ids) in
            [("container folder", &on_machine.containers), ("stream socket", &on_machine.streams)]
        {
            for id in ids.iter().filter(|id| !containers.contains_key(*id)) {
                self.pending(kind, id, "there is no container of this id", "removes it");
            }
        }
        for look in &on_machine.looks {
            self.pending("image mount", look, "nobody looks into it any more", "takes it down");
        }
        for exec in &on_machine.execs {
            match exec.split_once('@') {
                Some((_, container)) if containers.contains_key(container) => {}
                Some(_) => self.pending("fifo folder", exec, "its container is gone", "removes it"),
                None => {
                    let path = world.state.join("cri/execs").join(exec);
                    let what = "it is no exec's";
                    let finding = self.found(Class::Leaked, "fifo folder", path.display().to_string(), what);
                    finding.repair = Some(Action::RemoveTree { path });
                }
            }
        }
        for (id, file) in &on_machine.attached {
            if pods.get(id).is_none_or(|pod| pod.stage() >= PodStage::Released) {
                let shown = file.display().to_string();
                self.pending("network attachment", shown, "its pod is gone", "has its plugins let it go");
            }
        }
    }

    fn is_mounted(&self, path: &Path) -> bool {
        let path = self.world.real(path);
        self.world.mounts.iter().any(|mount| mount.at == path)
    }

    fn bundles(&mut self) {
        let world = self.world;
        self.count("bundles", world.bundles.len());
        for path in &world.no_bundles {
            let finding = self.found(
                Class::Leaked,
                "bundle",
                path.display().to_string(),
                "it lies among bundles, and is none",
            );
            finding.repair = Some(Action::RemoveTree { path: path.clone() });
        }
        for bundle in &world.bundles {
            let shown = bundle.path.display().to_string();
            let key = [bundle.namespace.as_str(), bundle.id.as_str()];
            let recorded = match bundle.of {
                Of::Container => world.view.has::<Container>(&key),
                Of::Sandbox => world.view.has::<Sandbox>(&key),
            };
            let recorded = recorded.unwrap_or(true);
            if bundle.id.starts_with('.') {
                self.pending("bundle", shown, "its removal was cut short", "ends it");
            } else if bundle.end == Some(End::Deleted) {
                self.pending("bundle", shown, "its task was deleted", "removes it");
            } else if !recorded && bundle.served {
                let what = "its shim serves, and no record names it";
                let finding = self.found(Class::Leaked, "bundle", shown, what);
                finding.remedy = match bundle.of {
                    Of::Container => format!(
                        "start gantryd, and delete the task: `ctr -n {} tasks rm --force {}`",
                        bundle.namespace, bundle.id
                    ),
                    Of::Sandbox => "start gantryd, and shut the sandbox down".into(),
                };
            } else if !recorded {
                self.pending("bundle", shown, "no record names it", "removes it");
            } else if bundle.end.is_none() && !bundle.served {
                self.pending("bundle", shown, "its shim is gone", "cleans up after it, and tells its end");
            }
        }
        for (of, namespace, id) in &world.work {
            let has = |bundle: &super::world::Bundle| {
                bundle.of == *of && bundle.namespace == *namespace && bundle.id == *id
            };
            if !world.bundles.iter().any(has) {
                self.pending("work folder", format!("{namespace}/{id}"), "it has no bundle", "removes it");
            }
        }
    }

    fn has_bundle(&self, namespace: &str, id: &str) -> bool {
        let of = |bundle: &super::world::Bundle| {
            bundle.namespace == namespace && bundle.id.strip_prefix('.').unwrap_or(&bundle.id) == id
        };
        self.world.bundles.iter().any(of)
    }

    /// What runs, or did.
    fn runtimes(&mut self) {
        let world = self.world;
        self.count("shims", world.shims.len());
        self.count("control groups", world.groups.len());
        let addresses: BTreeSet<&PathBuf> =
            world.bundles.iter().filter_map(|of| of.socket.as_ref()).collect();
        for shim in &world.shims {
            let in_bundle =
                shim.bundle.as_ref().is_some_and(|at| world.bundles.iter().any(|bundle| bundle.path == *at));
            if in_bundle || shim.sockets.iter().any(|socket| addresses.contains(socket)) {
                continue;
            }
            let shown = format!("{} of {}/{}", shim.pid, shim.namespace, shim.id);
            let finding = self.found(Class::Leaked, "shim", shown, "it has no bundle any more");
            finding.repair = Some(Action::KillShim { pid: shim.pid, started: shim.started });
        }
        for state in &world.runtimes {
            if world.bundles.iter().any(|bundle| bundle.path == state.bundle) {
                continue;
            }
            let shown = state.root.join(&state.id).display().to_string();
            let what = format!("the runtime has it, and its bundle {} is gone", state.bundle.display());
            let finding = self.found(Class::Leaked, "container", shown, what);
            finding.repair = Some(Action::DeleteContainer { root: state.root.clone(), id: state.id.clone() });
        }
        for Group { namespace, id, folders, used } in &world.groups {
            let owned = *used
                || self.has_bundle(namespace, id)
                || world.runtimes.iter().any(|of| of.namespace == *namespace && of.id == *id);
            if owned {
                continue;
            }
            for folder in folders {
                let what = "no process is in it, and its container has no task";
                let finding = self.found(Class::Leaked, "control group", folder.display().to_string(), what);
                finding.repair = Some(Action::RemoveGroup { folder: folder.clone() });
            }
        }
    }

    fn sockets(&mut self) {
        let world = self.world;
        self.count("shims' sockets", world.sockets.len());
        for (path, Socket { namespace, id, served }) in &world.sockets {
            if *served {
                continue;
            }
            let shown = path.display().to_string();
            if world.bundles.iter().any(|bundle| bundle.socket.as_ref() == Some(path)) {
                // Told of with its bundle, and removed by the shim's delete.
                continue;
            }
            let what = format!("nobody listens, and {namespace}/{id} has no bundle");
            let finding = self.found(Class::Leaked, "shim socket", shown, what);
            finding.repair = Some(Action::RemoveSocket { path: path.clone() });
        }
    }

    /// Mounts that are kept for clients.
    fn activations(&mut self) {
        let world = self.world;
        let records = world.view.list::<MountRecord>(&[]);
        for (parts, record) in &records {
            let stands = record.complete
                && record.active.iter().all(|active| {
                    let at = Path::new(&active.mount_point);
                    let is_loop = active.mount.as_ref().is_some_and(|mount| mount.r#type == "loop");
                    is_loop || self.is_mounted(at)
                });
            if !stands {
                self.pending("mount", name(parts), "not all of it is mounted", "forgets it");
            }
        }
        for folder in &world.activations {
            if !records.iter().any(|(_, record)| record.folder == *folder) {
                self.pending("mount", format!("folder {folder}"), "no record names it", "takes it down");
            }
        }
    }

    fn mounts(&mut self) {
        let world = self.world;
        self.count("mounts beneath root and state", world.mounts.len());
        for mount in &world.mounts {
            let shown = mount.at.display().to_string();
            match self.owner(&mount.at) {
                Owner::Known => {}
                Owner::Start => self.pending("mount", shown, "nobody uses it any more", "takes it down"),
                Owner::Nobody => {
                    let finding = self.found(Class::Leaked, "mount", shown, "it is nobody's");
                    finding.repair = Some(Action::Unmount { path: mount.at.clone() });
                }
            }
        }
        for (device, file) in &world.loops {
            let source = device.to_string_lossy();
            if world.linked.contains(device) || world.mounts.iter().any(|mount| mount.source == source) {
                continue;
            }
            let what = format!("it holds {}, and nothing is mounted from it", file.display());
            let finding = self.found(Class::Leaked, "loop device", source.clone(), what);
            finding.repair = Some(Action::Detach { device: device.clone(), file: file.clone() });
        }
    }

    /// Whose a mount is, by its place.
    fn owner(&self, at: &Path) -> Owner {
        let parts = |base: &Path| -> Option<Vec<String>> {
            let rest = at.strip_prefix(base).ok()?;
            Some(rest.components().map(|part| part.as_os_str().to_string_lossy().into_owned()).collect())
        };
        let start_unless = |known: bool| if known { Owner::Known } else { Owner::Start };
        if let Some(parts) = parts(&self.world.state) {
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            return match parts[..] {
                // The machine's owner may have a disk of his own for any of them.
                [] | [_] => Owner::Known,
                ["cri", "pods" | "netns", id, ..] => {
                    start_unless(self.world.view.has::<PodRecord>(&[PODS, id]).unwrap_or(true))
                }
                ["cri", "mounts", ..] => Owner::Start,
                // Told of with the activations.
                [folder, "t", _, ..] if folder == crate::mounts::FOLDER => Owner::Known,
                // Told of with the bundle.
                [_, _, _, ..] if self.world.bundles.iter().any(|bundle| at.starts_with(&bundle.path)) => {
                    Owner::Known
                }
                _ => Owner::Nobody,
            };
        }
        let Some(parts) = parts(&self.world.root) else { return Owner::Known };
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        match parts[..] {
            [] | [_] => Owner::Known,
            ["mounts", ..] => Owner::Start,
            [snapshotter, "probe", ..] if snapshotter.starts_with("io.containerd.snapshotter.v1.") => {
                Owner::Start
            }
            ["io.containerd.snapshotter.v1.erofs", "layers", layer] => start_unless(self.is_stood_on(layer)),
            _ => Owner::Nobody,
        }
    }

    /// Whether an active snapshot or a view stands on the EROFS layer of this number.
    fn is_stood_on(&self, layer: &str) -> bool {
        let Some(Ok(stored)) = self.world.snapshotters.get("erofs") else { return true };
        let by_key: HashMap<&str, &StoredSnapshot> =
            stored.snapshots.iter().map(|one| (one.info.key.as_str(), one)).collect();
        stored.snapshots.iter().filter(|one| one.info.kind != Kind::Committed).any(|one| {
            let mut below = by_key.get(one.info.parent.as_str());
            while let Some(one) = below {
                if one.id.to_string() == layer {
                    return true;
                }
                below = by_key.get(one.info.parent.as_str());
            }
            false
        })
    }

    /// What reading everything has shown besides.
    fn deep(&mut self) {
        let Some(deep) = &self.world.deep else { return };
        for (image, what) in &deep.wrong_layers {
            self.found(Class::Lost, "image", image, what).remedy = "pull or import it again".into();
        }
        self.out.not_checked.extend(deep.not_compared.iter().cloned());
        let checked = [
            ("bytes of blobs", deep.bytes),
            ("layers compared", deep.layers),
            ("files compared", deep.files),
            ("bytes of active snapshots", deep.active.size.try_into().unwrap_or(0)),
        ];
        self.out.checked.extend(checked);
    }

    /// What the next collection takes.
    fn garbage(&mut self) {
        for namespace in self.namespaces() {
            if Namespace::new(&namespace).is_err() {
                continue;
            }
            // What cannot be decoded has been told of; then nothing in the namespace is collected.
            let Ok(graph) = gc::graph(&self.world.view, &namespace, self.world.now) else { continue };
            for id in graph.unmarked(&graph.mark()) {
                let kind = graph.node(id).kind();
                self.await_collection(kind, 1);
            }
        }
    }
}

/// Whose a mount is.
enum Owner {
    /// Somebody's, or told of elsewhere.
    Known,
    /// Nobody's, and the next start takes it down.
    Start,
    Nobody,
}

/// Whether a name may be a bundle's.
pub(super) fn may_be_bundle(namespace: &str, id: &str) -> bool {
    Namespace::new(namespace).is_ok()
        && validate_identifier("container id", id.strip_prefix('.').unwrap_or(id)).is_ok()
}
