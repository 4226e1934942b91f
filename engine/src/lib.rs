//! The engine of Gantry: metadata, content, snapshots, tasks and events behind containerd's gRPC API.
//!
//! The rooms, from the outside in: `api` (one file per gRPC service: decode, call, encode), the domain
//! (`containers`, `images`, `leases`, `namespaces`, `content`, `snapshots`, `diff`, `tasks`, `events`, `gc`), and `metadata`,
//! the one place that opens the database. Calls only descend. `daemon` wires it all by hand, top to bottom.

pub mod api;
pub mod config;
pub mod containers;
pub mod content;
pub mod context;
pub mod daemon;
pub mod diff;
pub mod error;
pub mod events;
pub mod filters;
pub mod gc;
pub mod images;
pub mod introspection;
pub mod labels;
pub mod leases;
pub mod metadata;
pub mod metrics;
pub mod namespaces;
pub mod publish;
pub mod restart;
pub mod sandboxes;
pub mod serving;
pub mod snapshots;
pub mod tasks;

/// The engine's version.
pub const VERSION: &str = env!("CARGO_PKG_VERSION");
/// The revision it was built from, empty when the build did not know.
pub const REVISION: &str = match option_env!("GANTRY_REVISION") {
    Some(revision) => revision,
    None => "",
};
