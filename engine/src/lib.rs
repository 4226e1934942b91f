//! The engine of Gantry: metadata, content, snapshots, tasks and events behind containerd's gRPC API.
//!
//! The rooms, from the outside in: `api` (one file per gRPC service: decode, call, encode), the domain
//! (`containers`, `images`, `leases`, `namespaces`, `content`, `snapshots`, `diff`, `tasks`, `events`), and `metadata`,
//! the one place that opens the database. Calls only descend. `daemon` wires it all by hand, top to bottom.

pub mod context;
pub mod error;
pub mod filters;
pub mod labels;
pub mod leases;

pub mod metadata;
