//! The engine of Gantry: metadata, content, snapshots, tasks and events behind containerd's gRPC API.
//!
//! The rooms, from the outside in: `api` (one file per gRPC service: decode, call, encode), the domain
//! (`containers`, `images`, `leases`, `namespaces`, `content`, `snapshots`, `diff`, `transfer`, `streaming`,
//! `tasks`, `events`, `gc`, `upkeep`), and `metadata`,
//! the one place that opens the database. Calls only descend. `daemon` wires it all by hand, top to bottom.

pub mod api;
pub mod check;
pub mod config;
pub mod containers;
pub mod content;
pub mod context;
pub mod cri;
pub mod daemon;
pub mod diff;
pub mod error;
pub mod events;
pub mod filters;
#[cfg(any(test, fuzzing))]
#[doc(hidden)]
pub mod fuzzing;
pub mod gc;
pub mod hooks;
pub mod http;
pub mod images;
pub mod introspection;
pub mod labels;
pub mod leases;
pub mod metadata;
pub mod metrics;
pub mod mounts;
pub mod namespaces;
mod proxy;
pub mod publish;
mod random;
pub mod remotes;
pub mod restart;
pub mod sandboxes;
pub mod serving;
pub mod snapshots;
pub mod streaming;
pub mod tasks;
pub mod transfer;
pub mod upkeep;

/// The engine's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The revision it was built from, empty when the build did not know.
pub const REVISION: &str = match option_env!("GANTRY_REVISION") {
    Some(revision) => revision,
    None => "",
};
