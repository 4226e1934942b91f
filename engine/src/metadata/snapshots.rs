//! Records of snapshots: `snapshots NAMESPACE SNAPSHOTTER KEY`.

use super::Record;

/// A snapshot as one namespace knows it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct SnapshotRecord {}

impl Record for SnapshotRecord {
    const TABLE: &'static str = "snapshots";
}
