//! Records of blobs: `blobs NAMESPACE DIGEST`.

use super::Record;

/// A blob as one namespace knows it.
#[derive(Clone, PartialEq, prost::Message)]
pub struct BlobRecord {}

impl Record for BlobRecord {
    const TABLE: &'static str = "blobs";
}
