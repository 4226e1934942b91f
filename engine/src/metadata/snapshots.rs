//! Records of snapshots: `snapshots NAMESPACE SNAPSHOTTER KEY`, the children of each:
//! `snapshot-children NAMESPACE SNAPSHOTTER PARENT CHILD`, and commits under way:
//! `snapshot-commits NAMESPACE SNAPSHOTTER INNER`, with the new layer's inner key.

use std::collections::BTreeMap;

use prost_types::Timestamp;

use super::Record;

/// A snapshot as one namespace knows it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SnapshotRecord {
    /// The snapshotter's own key, `NAMESPACE/NUMBER/KEY`, so that namespaces do not meet there.
    #[prost(string, tag = "1")]
    pub inner: String,
    /// The parent, by its name in this namespace; empty for none.
    #[prost(string, tag = "2")]
    pub parent: String,
    /// Its labels, also those that the snapshotter does not see.
    #[prost(btree_map = "string, string", tag = "3")]
    pub labels: BTreeMap<String, String>,
    /// When it was made.
    #[prost(message, optional, tag = "4")]
    pub created: Option<Timestamp>,
    /// When it last changed.
    #[prost(message, optional, tag = "5")]
    pub updated: Option<Timestamp>,
}

impl Record for SnapshotRecord {
    const TABLE: &'static str = "snapshots";
}

/// That a snapshot is stacked on another; the key says all.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SnapshotChild {}

impl Record for SnapshotChild {
    const TABLE: &'static str = "snapshot-children";
}

/// A commit that has begun: written before the snapshotter is asked, so that a restart can tell what to make of it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct CommitRecord {
    /// The key of the active snapshot.
    #[prost(string, tag = "1")]
    pub key: String,
    /// The inner key of the active snapshot.
    #[prost(string, tag = "2")]
    pub inner: String,
    /// The name of the layer.
    #[prost(string, tag = "3")]
    pub layer: String,
    /// The labels of the layer.
    #[prost(btree_map = "string, string", tag = "4")]
    pub labels: BTreeMap<String, String>,
    /// The lease of the request; empty for none.
    #[prost(string, tag = "5")]
    pub lease: String,
    /// The name of the parent that the layer gets with its commit; none where it keeps the one it was prepared over.
    #[prost(string, optional, tag = "6")]
    pub parent: Option<String>,
}

impl Record for CommitRecord {
    const TABLE: &'static str = "snapshot-commits";
}
