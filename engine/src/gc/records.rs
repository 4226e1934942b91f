//! From records to graphs: what the records of a namespace say about who holds whom, and how what is left over is deleted.
//!
//! Invariant: a record that cannot be decoded stops the collection of its namespace. To pass it over would be to forget
//! what it holds.

use std::time::SystemTime;

use oci::Digest;
use proto::containerd::services::containers::v1::Container;
use proto::containerd::services::images::v1::Image;
use proto::containerd::services::leases::v1::Lease;
use proto::containerd::types::Sandbox;

use super::mark::{Graph, Marks, Node, Object};
use crate::context::Namespace;
use crate::error::Result;
use crate::leases;
use crate::metadata::content::{BlobRecord, IngestRecord};
use crate::metadata::leases::LeaseResource;
use crate::metadata::mounts::MountRecord;
use crate::metadata::snapshots::SnapshotRecord;
use crate::metadata::{Read, Record, Transaction};
use crate::snapshots;

/// What a collection deleted from the records of one namespace.
#[derive(Debug)]
pub(super) struct Removed {
    pub(super) namespace: Namespace,
    pub(super) content: Vec<String>,
    /// Snapshotter, key, and the snapshotter's own key.
    pub(super) snapshots: Vec<(String, String, String)>,
    pub(super) images: Vec<String>,
    pub(super) leases: Vec<String>,
    /// Names; what they mounted has no record any more.
    pub(super) mounts: Vec<String>,
    /// Keys on disk.
    pub(super) ingests: Vec<IngestRecord>,
}

/// A namespace that has been marked, and what was not.
pub(super) struct Marked {
    namespace: Namespace,
    graph: Graph,
    marks: Marks,
    unmarked: Vec<usize>,
}

/// All objects of a namespace.
pub(crate) fn graph(read: &impl Read, namespace: &str, now: SystemTime) -> Result<Graph> {
    let mut graph = Graph::new(now);
    let of = [namespace];
    for (parts, record) in read.list_all::<Container>(&of)? {
        graph.add(Node::Container(name(parts)), container(record));
    }
    for (parts, record) in read.list_all::<Sandbox>(&of)? {
        graph.add(Node::Sandbox(name(parts)), Object::sandbox(&record.labels));
    }
    for (parts, record) in read.list_all::<BlobRecord>(&of)? {
        graph.add(Node::Content(name(parts)), Object::content(&record.labels));
    }
    for (parts, record) in read.list_all::<Image>(&of)? {
        graph.add(Node::Image(name(parts)), image(record, now));
    }
    for (parts, record) in read.list_all::<IngestRecord>(&of)? {
        graph.add(Node::Ingest(name(parts)), ingest(record, now));
    }
    for (parts, record) in read.list_all::<MountRecord>(&of)? {
        graph.add(Node::Mount(name(parts)), Object::mount(record.complete, &record.labels));
    }
    for (mut parts, record) in read.list_all::<SnapshotRecord>(&of)? {
        let snapshotter = parts.remove(0);
        let object = Object::snapshot(&snapshotter, record.parent, &record.labels);
        graph.add(Node::Snapshot { snapshotter, key: name(parts) }, object);
    }
    for (parts, record) in read.list_all::<Lease>(&of)? {
        let id = name(parts);
        let object = lease(read, namespace, &id, &record, now)?;
        graph.add(Node::Lease(id), object);
    }
    Ok(graph)
}

/// What remains of a key after the parts that say what it is; no name has a NUL in it, so that there is one part.
fn name(parts: Vec<String>) -> String {
    parts.into_iter().next().unwrap_or_default()
}

fn container(record: Container) -> Object {
    let snapshot = Some((record.snapshotter, record.snapshot_key));
    Object::container(&record.labels, snapshot.filter(|(snapshotter, _)| !snapshotter.is_empty()))
}

fn image(record: Image, now: SystemTime) -> Object {
    let target = record.target.map(|target| target.digest).unwrap_or_default();
    Object::image(target, &record.labels, now)
}

fn ingest(record: IngestRecord, now: SystemTime) -> Object {
    let expires = record.expires_at.and_then(|time| SystemTime::try_from(time).ok());
    Object::ingest(record.shared, expires, now)
}

fn lease(read: &impl Read, namespace: &str, id: &str, record: &Lease, now: SystemTime) -> Result<Object> {
    let resources = read.list_all::<LeaseResource>(&[namespace, id])?;
    let resources = resources.into_iter().filter_map(|(parts, _)| match <[String; 2]>::try_from(parts) {
        Ok([kind, id]) => resource(&kind, id),
        Err(_) => None,
    });
    Ok(Object::lease(resources.collect(), &record.labels, now))
}

fn resource(kind: &str, id: String) -> Option<Node> {
    match kind {
        leases::CONTENT => Some(Node::Content(id)),
        leases::INGESTS => Some(Node::Ingest(id)),
        leases::IMAGES => Some(Node::Image(id)),
        leases::MOUNTS => Some(Node::Mount(id)),
        _ => kind.strip_prefix(leases::SNAPSHOTS).map(|snapshotter| Node::snapshot(snapshotter, id)),
    }
}

impl Marked {
    /// Marks a namespace; None when everything in it is held. The next moment at which something expires is told besides.
    pub(super) fn of(
        read: &impl Read,
        namespace: Namespace,
        now: SystemTime,
    ) -> Result<(Option<Self>, Option<SystemTime>)> {
        let graph = graph(read, namespace.as_str(), now)?;
        let turn = graph.next_turn();
        let marks = graph.mark();
        let unmarked = graph.unmarked(&marks);
        let marked = (!unmarked.is_empty()).then_some(Marked { namespace, graph, marks, unmarked });
        Ok((marked, turn))
    }

    pub(super) fn namespace(&self) -> &str {
        self.namespace.as_str()
    }

    /// Within a commit: deletes what is still unmarked once `changes` count as roots, the keys of this namespace's records
    /// that are not as they were marked. Once only; what remains is to be dropped elsewhere, since that takes long, too.
    pub(super) fn remove(
        &mut self,
        txn: &mut Transaction,
        changes: &[&[String]],
        now: SystemTime,
    ) -> Result<Removed> {
        let mut roots = Vec::with_capacity(changes.len());
        for key in changes {
            roots.extend(self.change(txn, key, now)?);
        }
        self.graph.spare(&mut self.marks, &roots);
        let mut removed = Removed {
            namespace: self.namespace.clone(),
            content: Vec::new(),
            snapshots: Vec::new(),
            images: Vec::new(),
            leases: Vec::new(),
            mounts: Vec::new(),
            ingests: Vec::new(),
        };
        for id in self.unmarked.iter().filter(|id| !self.marks.has(**id)) {
            removed.delete(txn, self.graph.node(*id))?;
        }
        Ok(removed)
    }

    /// Brings the graph up to a record that has changed; the number of the object that this is about.
    fn change(&mut self, txn: &Transaction, key: &[String], now: SystemTime) -> Result<Option<usize>> {
        let key: Vec<&str> = key.iter().map(String::as_str).collect();
        let Some((table, parts)) = key.split_first() else { return Ok(None) };
        Ok(match (*table, parts) {
            (Container::TABLE, [_, id]) => txn
                .get::<Container>(parts)?
                .map(|record| self.graph.add(Node::Container((*id).into()), container(record))),
            (Sandbox::TABLE, [_, id]) => txn
                .get::<Sandbox>(parts)?
                .map(|record| self.graph.add(Node::Sandbox((*id).into()), Object::sandbox(&record.labels))),
            (BlobRecord::TABLE, [_, digest]) => txn.get::<BlobRecord>(parts)?.map(|record| {
                self.graph.add(Node::Content((*digest).into()), Object::content(&record.labels))
            }),
            (Image::TABLE, [_, name]) => txn
                .get::<Image>(parts)?
                .map(|record| self.graph.add(Node::Image((*name).into()), image(record, now))),
            (IngestRecord::TABLE, [_, reference]) => txn
                .get::<IngestRecord>(parts)?
                .map(|record| self.graph.add(Node::Ingest((*reference).into()), ingest(record, now))),
            (MountRecord::TABLE, [_, name]) => txn.get::<MountRecord>(parts)?.map(|record| {
                let object = Object::mount(record.complete, &record.labels);
                self.graph.add(Node::Mount((*name).into()), object)
            }),
            (SnapshotRecord::TABLE, [_, snapshotter, key]) => {
                txn.get::<SnapshotRecord>(parts)?.map(|record| {
                    let object = Object::snapshot(snapshotter, record.parent, &record.labels);
                    self.graph.add(Node::snapshot(*snapshotter, *key), object)
                })
            }
            (Lease::TABLE, [namespace, id]) => match txn.get::<Lease>(parts)? {
                Some(record) => {
                    let object = lease(txn, namespace, id, &record, now)?;
                    Some(self.graph.add(Node::Lease((*id).into()), object))
                }
                None => None,
            },
            // The resource itself: its lease may be one that was marked as it was before.
            (LeaseResource::TABLE, [_, _, kind, id]) => {
                resource(kind, (*id).to_owned()).map(|node| self.graph.id(node))
            }
            // Other tables hold nothing.
            _ => None,
        })
    }
}

impl Removed {
    fn delete(&mut self, txn: &mut Transaction, node: &Node) -> Result<()> {
        let namespace = self.namespace.as_str();
        match node {
            // Roots, always.
            Node::Container(_) | Node::Sandbox(_) => {}
            Node::Content(digest) => {
                if txn.delete::<BlobRecord>(&[namespace, digest])? {
                    self.content.push(digest.clone());
                }
            }
            Node::Image(name) => {
                if txn.delete::<Image>(&[namespace, name])? {
                    self.images.push(name.clone());
                }
            }
            Node::Ingest(reference) => {
                if let Some(record) = txn.get::<IngestRecord>(&[namespace, reference])? {
                    txn.delete::<IngestRecord>(&[namespace, reference])?;
                    self.ingests.push(record);
                }
            }
            Node::Lease(id) => {
                if txn.delete::<Lease>(&[namespace, id])? {
                    txn.delete_all::<LeaseResource>(&[namespace, id])?;
                    self.leases.push(id.clone());
                }
            }
            Node::Mount(name) => {
                if txn.delete::<MountRecord>(&[namespace, name])? {
                    self.mounts.push(name.clone());
                }
            }
            Node::Snapshot { snapshotter, key } => {
                if let Some(record) = snapshots::forget(txn, namespace, snapshotter, key)? {
                    self.snapshots.push((snapshotter.clone(), key.clone(), record.inner));
                }
            }
        }
        Ok(())
    }

    /// The blobs whose files may have become useless: those that went, and those that an ingest shared.
    pub(super) fn digests(&self) -> impl Iterator<Item = Digest> {
        let shared = self.ingests.iter().map(|ingest| &ingest.shared);
        self.content.iter().chain(shared).filter_map(|digest| digest.parse().ok())
    }
}
