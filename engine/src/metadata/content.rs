//! Records of blobs, `blobs NAMESPACE DIGEST`, and of unfinished ones, `ingests NAMESPACE REF`.
//!
//! A blob's bytes are shared by all namespaces; each namespace has its own record of it.

use std::collections::BTreeMap;

use prost_types::Timestamp;

use super::Record;

/// A blob as one namespace knows it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BlobRecord {
    /// Bytes.
    #[prost(int64, tag = "1")]
    pub size: i64,
    /// When this namespace got it.
    #[prost(message, optional, tag = "2")]
    pub created_at: Option<Timestamp>,
    /// When its labels last changed.
    #[prost(message, optional, tag = "3")]
    pub updated_at: Option<Timestamp>,
    /// Its labels.
    #[prost(btree_map = "string, string", tag = "4")]
    pub labels: BTreeMap<String, String>,
}

impl Record for BlobRecord {
    const TABLE: &'static str = "blobs";
}

/// A write that has begun and is not committed.
#[derive(Clone, PartialEq, prost::Message)]
pub struct IngestRecord {
    /// Its name on disk, `NAMESPACE/SEQUENCE/REF`, whose SHA-256 names the folder.
    #[prost(string, tag = "1")]
    pub key: String,
    /// The digest of a blob that another namespace has and that this ingest will only have to commit; the blob's file
    /// stays as long as this record. Empty for an ingest with data of its own.
    #[prost(string, tag = "2")]
    pub shared: String,
    /// When it may be thrown away; none while a lease holds it.
    #[prost(message, optional, tag = "3")]
    pub expires_at: Option<Timestamp>,
    /// When it began.
    #[prost(message, optional, tag = "4")]
    pub started_at: Option<Timestamp>,
}

impl Record for IngestRecord {
    const TABLE: &'static str = "ingests";
}
