//! The kubelet's side of the engine: the Container Runtime Interface, over the same domain as containerd's services.
//!
//! Objects are in the namespace [`NAMESPACE`] and seen there through containerd's API; what others make there is seen through
//! this one.

pub mod checkpoint;
pub mod cni;
pub mod containers;
pub mod events;
pub mod exec;
pub mod handlers;
mod image_mounts;
pub mod images;
pub mod joined;
mod pause;
pub mod places;
pub mod pods;
pub mod recovery;
pub mod runtime;
pub mod settings;
pub mod spec;
pub mod stats;
pub mod store;
pub mod streaming;

use crate::context::{Namespace, RequestContext};
use crate::error::Result;

/// The namespace of all that the kubelet has made.
pub const NAMESPACE: &str = "k8s.io";

/// The context of the kubelet's calls, which name none.
fn context() -> Result<RequestContext> {
    Ok(RequestContext::internal(Namespace::new(NAMESPACE)?))
}
