//! Making a layer of what one tree changed against another.

use std::time::SystemTime;

use proto::containerd::types::Descriptor;
use sys::mount::Mount;

use super::Diff;
use crate::context::RequestContext;
use crate::error::{Error, Result};
use crate::labels::Labels;

/// What to compare, and what to make of it.
#[derive(Debug, Clone, Default)]
pub struct Comparison {
    /// The parent's mounts; none compares to nothing.
    pub left: Vec<Mount>,
    /// The changed tree's mounts.
    pub right: Vec<Mount>,
    /// Of the layer; empty for tar+gzip.
    pub media_type: String,
    /// The ingest to write by; made up when empty.
    pub reference: String,
    /// Labels of the blob.
    pub labels: Labels,
    /// No time in the layer is later than this.
    pub epoch: Option<SystemTime>,
}

impl Diff {
    /// Makes a layer.
    pub async fn compare(&self, context: &RequestContext, comparison: Comparison) -> Result<Descriptor> {
        let _ = (context.namespace()?, comparison);
        Err(Error::unimplemented("layers cannot be compared yet"))
    }
}
