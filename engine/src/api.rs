//! The gRPC services, one file each. A handler decodes the request, calls the domain, encodes the answer.
//!
//! To add a method see `docs/adding-an-rpc.md`.

pub mod containers;
pub mod content;
pub mod cri_images;
pub mod cri_runtime;
pub mod diff;
pub mod events;
pub mod gc;
pub mod images;
pub mod introspection;
pub mod journal;
pub mod leases;
pub mod mounts;
pub mod namespaces;
pub mod registry;
pub mod sandboxes;
pub mod shim_events;
pub mod snapshots;
pub mod streaming;
pub mod tasks;
pub mod transfer;
pub mod upkeep;
pub mod version;

use crate::error::{Error, Result};

/// A message that a request must carry; InvalidArgument names it when it does not.
fn required<T>(message: Option<T>, name: &str) -> Result<T> {
    message.ok_or_else(|| Error::invalid_argument(format!("the request has no {name}")))
}

/// The paths of an update mask, empty when there is none.
fn mask(mask: Option<prost_types::FieldMask>) -> Vec<String> {
    mask.map(|mask| mask.paths).unwrap_or_default()
}
