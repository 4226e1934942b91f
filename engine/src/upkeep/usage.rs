//! Where the bytes are: of one image, and of all.
//!
//! What an image takes is what can be reached from it in the collector's graph; what is its own is what nothing else would
//! hold without it. So both say what a collection would do, labels and leases included.
//!
//! Invariant: sizes are what records and snapshotters have stored, but for writable snapshots, which are measured.

use std::collections::{BTreeMap, BTreeSet, HashMap, HashSet};
use std::time::SystemTime;

use proto::containerd::services::containers::v1::Container;
use proto::containerd::services::images::v1::Image;
use proto::gantry::images::v1::{DiskUsageResponse, FileSystem, ImageUsage, Space};

use super::Upkeep;
use crate::context::RequestContext;
use crate::error::{Error, Result, blocking};
use crate::gc::{Graph, Node, graph};
use crate::metadata::content::{BlobRecord, IngestRecord};
use crate::metadata::leases::LeaseResource;
use crate::metadata::namespaces::NamespaceRecord;
use crate::metadata::snapshots::SnapshotRecord;
use crate::metadata::{Read, View};

/// One namespace, with what its objects take.
pub(super) struct Sized {
    pub(super) graph: Graph,
    pub(super) images: BTreeMap<String, Image>,
    pub(super) containers: BTreeMap<String, Container>,
    /// Bytes of blobs and snapshots.
    sizes: HashMap<Node, u64>,
}

/// Blobs and snapshots, counted.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Sum {
    /// Blobs.
    pub blobs: u64,
    /// Their bytes.
    pub content: u64,
    /// Snapshots.
    pub snapshots: u64,
    /// Their bytes.
    pub unpacked: u64,
}

impl Sized {
    pub(super) fn size(&self, node: &Node) -> u64 {
        self.sizes.get(node).copied().unwrap_or(0)
    }

    pub(super) fn sum<'a>(&self, nodes: impl IntoIterator<Item = &'a Node>) -> Sum {
        let mut sum = Sum::default();
        for node in nodes {
            match node {
                Node::Content(_) => (sum.blobs, sum.content) = (sum.blobs + 1, sum.content + self.size(node)),
                Node::Snapshot { .. } => {
                    (sum.snapshots, sum.unpacked) = (sum.snapshots + 1, sum.unpacked + self.size(node));
                }
                _ => {}
            }
        }
        sum
    }

    /// What nothing would hold without these images, beyond what nothing holds now.
    pub(super) fn freed(&mut self, images: &[String]) -> Vec<Node> {
        let before: HashSet<Node> = self.graph.unheld_without(&[]).into_iter().collect();
        let images: Vec<Node> = images.iter().cloned().map(Node::Image).collect();
        let after = self.graph.unheld_without(&images);
        after.into_iter().filter(|node| !before.contains(node)).collect()
    }

    /// The images that containers were made from: by the name that they have, and all with the same target.
    pub(super) fn used(&self) -> HashSet<String> {
        let names: HashSet<&str> =
            self.containers.values().map(|container| container.image.as_str()).collect();
        let digest =
            |image: &Image| image.target.as_ref().map(|target| target.digest.clone()).unwrap_or_default();
        let named = self.images.values().filter(|image| names.contains(image.name.as_str()));
        let digests: HashSet<String> = named.map(digest).collect();
        let used = self.images.values().filter(|image| digests.contains(&digest(image)));
        used.map(|image| image.name.clone()).collect()
    }
}

impl Upkeep {
    /// A namespace as it is in a view, with sizes.
    pub(super) async fn sized(&self, view: &View, namespace: &str) -> Result<Sized> {
        let (read, of) = (view.clone(), namespace.to_owned());
        let graph = blocking(move || graph(&read, &of, SystemTime::now())).await?;
        let mut sizes = HashMap::new();
        for (parts, record) in view.list::<BlobRecord>(&[namespace]) {
            sizes.insert(Node::Content(parts.concat()), u64::try_from(record.size).unwrap_or(0));
        }
        let (mut nodes, mut inner) = (Vec::new(), Vec::new());
        for (parts, record) in view.list::<SnapshotRecord>(&[namespace]) {
            let Ok([snapshotter, key]) = <[String; 2]>::try_from(parts) else { continue };
            inner.push((snapshotter.clone(), record.inner));
            nodes.push(Node::Snapshot { snapshotter, key });
        }
        let usages = self.snapshots.usages(inner).await?;
        for (node, usage) in nodes.into_iter().zip(usages) {
            sizes.insert(node, u64::try_from(usage.unwrap_or_default().size).unwrap_or(0));
        }
        let images =
            view.list::<Image>(&[namespace]).into_iter().map(|(parts, image)| (parts.concat(), image));
        let containers = view.list::<Container>(&[namespace]).into_iter();
        let containers = containers.map(|(parts, container)| (parts.concat(), container));
        Ok(Sized { graph, images: images.collect(), containers: containers.collect(), sizes })
    }

    /// What images take; all of the namespace when none is named.
    pub async fn usage(&self, context: &RequestContext, names: Vec<String>) -> Result<Vec<ImageUsage>> {
        let namespace = context.namespace()?.clone();
        for name in &names {
            self.images.get(context, name)?;
        }
        let view = self.metadata.view();
        let mut sized = self.sized(&view, namespace.as_str()).await?;
        blocking(move || {
            let all: Vec<Image> = sized.images.values().cloned().collect();
            let wanted: BTreeSet<&String> = names.iter().collect();
            let mut usages = Vec::new();
            for image in all.iter().filter(|image| wanted.is_empty() || wanted.contains(&image.name)) {
                usages.push(image_usage(&mut sized, image));
            }
            Ok(usages)
        })
        .await
    }

    /// What all namespaces take.
    pub async fn disk_usage(&self) -> Result<DiskUsageResponse> {
        let view = self.metadata.view();
        let mut all = Spaces::default();
        // What has gone from one namespace is on disk for as long as another has it.
        let (mut blobs, mut kept) = (HashMap::new(), HashSet::new());
        for (parts, _) in view.list::<NamespaceRecord>(&[]) {
            let namespace = parts.concat();
            let mut sized = self.sized(&view, &namespace).await?;
            let ingests = self.ingests(&namespace).await?;
            let of = namespace.clone();
            let leases =
                view.keys::<proto::containerd::services::leases::v1::Lease>(&[&namespace]).len() as u64;
            let held = view.keys::<LeaseResource>(&[&namespace]).len() as u64;
            let counted = blocking(move || Ok(Counted::of(&of, &mut sized))).await?;
            for (digest, size, freed) in &counted.blobs {
                blobs.insert(digest.clone(), *size);
                if !freed {
                    kept.insert(digest.clone());
                }
            }
            for space in counted.spaces {
                all.add(&space);
            }
            let space = |kind: &str, count, bytes| Space {
                namespace: namespace.clone(),
                kind: kind.to_owned(),
                count,
                active: count,
                bytes,
                ..Space::default()
            };
            all.add(&space("ingests", ingests.0, ingests.1));
            // Of leases, those are active that hold anything.
            all.add(&Space { active: leases.min(held), ..space("leases", leases, 0) });
        }
        let total = Space {
            kind: "content".to_owned(),
            count: blobs.len() as u64,
            active: kept.len() as u64,
            bytes: blobs.values().sum(),
            reclaimable: blobs
                .iter()
                .filter(|(digest, _)| !kept.contains(*digest))
                .map(|(_, size)| size)
                .sum(),
            ..Space::default()
        };
        all.put(total);
        self.engine(&mut all).await?;
        let file_systems = self.file_systems().await?;
        Ok(DiskUsageResponse { spaces: all.0.into_values().collect(), file_systems })
    }

    /// Ingests of a namespace, and their bytes so far.
    async fn ingests(&self, namespace: &str) -> Result<(u64, u64)> {
        let context = RequestContext::internal(crate::context::Namespace::new(namespace)?);
        let statuses = self.content.list_statuses(&context, &[]).await?;
        let records: HashMap<String, IngestRecord> = self
            .metadata
            .view()
            .list::<IngestRecord>(&[namespace])
            .into_iter()
            .map(|(parts, record)| (parts.concat(), record))
            .collect();
        // What is another namespace's blob takes nothing.
        let own =
            statuses.iter().filter(|status| records.get(&status.r#ref).is_none_or(|of| of.shared.is_empty()));
        Ok((statuses.len() as u64, own.map(|status| u64::try_from(status.offset).unwrap_or(0)).sum()))
    }

    /// What the engine takes for itself.
    async fn engine(&self, all: &mut Spaces) -> Result<()> {
        let metadata = self.folders.root.join(crate::daemon::METADATA_FOLDER);
        let usage = blocking(move || {
            sys::fs::usage(&metadata).map_err(|error| Error::io("measure", &metadata, &error))
        })
        .await?;
        let space = |kind: &str, count: u64, bytes: u64| Space {
            kind: kind.to_owned(),
            count,
            active: count,
            bytes,
            ..Space::default()
        };
        let files = u64::try_from(usage.inodes).unwrap_or(0);
        all.put(space("metadata", files, u64::try_from(usage.size).unwrap_or(0)));
        let range = self.events.range()?;
        all.put(space("events", range.next.saturating_sub(range.first), range.bytes));
        Ok(())
    }

    async fn file_systems(&self) -> Result<Vec<FileSystem>> {
        let folders = [self.folders.root.clone(), self.folders.state.clone()];
        blocking(move || {
            let mut all = Vec::new();
            for path in folders {
                let stat = rustix::fs::statvfs(&path)
                    .map_err(|error| Error::io("look at the file system of", &path, &error.into()))?;
                let of = |blocks: u64| blocks.saturating_mul(stat.f_frsize);
                let path = path.display().to_string();
                all.push(FileSystem { path, size: of(stat.f_blocks), free: of(stat.f_bavail) });
            }
            Ok(all)
        })
        .await
    }
}

fn image_usage(sized: &mut Sized, image: &Image) -> ImageUsage {
    let reached: Vec<Node> =
        sized.graph.reach(&Node::Image(image.name.clone())).into_iter().cloned().collect();
    let freed = sized.freed(std::slice::from_ref(&image.name));
    let (all, own) = (sized.sum(&reached), sized.sum(&freed));
    let mut unpacked = BTreeMap::new();
    for node in &reached {
        if let Node::Snapshot { snapshotter, .. } = node {
            *unpacked.entry(snapshotter.clone()).or_default() += sized.size(node);
        }
    }
    let unique = own.content + own.unpacked;
    ImageUsage {
        name: image.name.clone(),
        digest: image.target.as_ref().map(|target| target.digest.clone()).unwrap_or_default(),
        blobs: all.blobs,
        content: all.content,
        unpacked: unpacked.into_iter().collect(),
        shared: (all.content + all.unpacked).saturating_sub(unique),
        unique,
        containers: sized.containers.values().filter(|container| container.image == image.name).count()
            as u64,
    }
}

/// One namespace's part.
struct Counted {
    spaces: Vec<Space>,
    /// Each blob with its size, and whether a prune would free it here.
    blobs: Vec<(String, u64, bool)>,
}

impl Counted {
    fn of(namespace: &str, sized: &mut Sized) -> Counted {
        let used = sized.used();
        let unused: Vec<String> = sized.images.keys().filter(|name| !used.contains(*name)).cloned().collect();
        // What is garbage already is had back by the same.
        let images: Vec<Node> = unused.iter().cloned().map(Node::Image).collect();
        let freed: HashSet<Node> = sized.graph.unheld_without(&images).into_iter().collect();
        let writable: HashSet<Node> = sized
            .containers
            .values()
            .filter(|container| !container.snapshot_key.is_empty())
            .map(|container| Node::snapshot(container.snapshotter.clone(), container.snapshot_key.clone()))
            .collect();
        let mut spaces = Spaces::default();
        let new = |kind: &str, name: &str| Space {
            namespace: namespace.to_owned(),
            kind: kind.to_owned(),
            name: name.to_owned(),
            count: 1,
            ..Space::default()
        };
        for name in sized.images.keys() {
            spaces.put_in(&Space { active: u64::from(used.contains(name)), ..new("images", "") });
        }
        let mut blobs = Vec::new();
        for (node, &bytes) in &sized.sizes {
            let gone = freed.contains(node);
            let (active, reclaimable) = if gone { (0, bytes) } else { (1, 0) };
            let sized = |space: Space| Space { active, bytes, reclaimable, ..space };
            match node {
                Node::Content(digest) => {
                    blobs.push((digest.clone(), bytes, gone));
                    spaces.put_in(&sized(new("content", "")));
                }
                Node::Snapshot { snapshotter, .. } if writable.contains(node) => {
                    spaces.put_in(&sized(new("containers", snapshotter)));
                }
                Node::Snapshot { snapshotter, .. } => spaces.put_in(&sized(new("snapshots", snapshotter))),
                _ => {}
            }
        }
        Counted { spaces: spaces.0.into_values().collect(), blobs }
    }
}

/// Rows by namespace, kind and name.
#[derive(Default)]
struct Spaces(BTreeMap<(String, String, String), Space>);

impl Spaces {
    fn key(space: &Space) -> (String, String, String) {
        (space.namespace.clone(), space.kind.clone(), space.name.clone())
    }

    /// Adds to the row of this namespace.
    fn put_in(&mut self, space: &Space) {
        let row = self.0.entry(Self::key(space)).or_insert_with(|| Space {
            count: 0,
            active: 0,
            bytes: 0,
            reclaimable: 0,
            ..space.clone()
        });
        row.count += space.count;
        row.active += space.active;
        row.bytes += space.bytes;
        row.reclaimable += space.reclaimable;
    }

    /// Adds to the row of this namespace, and to that of all.
    fn add(&mut self, space: &Space) {
        self.put_in(&Space { namespace: String::new(), ..space.clone() });
        self.put_in(space);
    }

    /// Sets a row.
    fn put(&mut self, space: Space) {
        self.0.insert(Self::key(&space), space);
    }
}
