//! Records of snapshots: `snapshots NAMESPACE SNAPSHOTTER KEY`, and the children of each:
//! `snapshot-children NAMESPACE SNAPSHOTTER PARENT CHILD`.

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
