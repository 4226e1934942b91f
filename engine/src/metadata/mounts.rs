//! Records of mounts that the engine keeps for clients: `mounts NAMESPACE NAME`.

use std::collections::BTreeMap;

use prost_types::Timestamp;
use proto::containerd::types::{ActiveMount, Mount};

use super::Record;

/// An activation as one namespace knows it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct MountRecord {
    /// The name of its folder, which no other activation ever had.
    #[prost(string, tag = "1")]
    pub folder: String,
    /// Whether all is mounted. One that is not is being activated, or was when the engine was killed.
    #[prost(bool, tag = "2")]
    pub complete: bool,
    /// What the engine mounted, in this order.
    #[prost(message, repeated, tag = "3")]
    pub active: Vec<ActiveMount>,
    /// What is left for the client to mount.
    #[prost(message, repeated, tag = "4")]
    pub system: Vec<Mount>,
    /// Its labels.
    #[prost(btree_map = "string, string", tag = "5")]
    pub labels: BTreeMap<String, String>,
    /// When it was made.
    #[prost(message, optional, tag = "6")]
    pub created: Option<Timestamp>,
    /// When it last changed.
    #[prost(message, optional, tag = "7")]
    pub updated: Option<Timestamp>,
}

impl Record for MountRecord {
    const TABLE: &'static str = "mounts";
}
