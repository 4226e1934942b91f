//! The wire: containerd's API, the CRI, and our own additions to them (packages `gantry.*`), as messages, gRPC clients and
//! gRPC servers.
//!
//! Modules follow the protobuf packages: `containerd.services.tasks.v1` is [`containerd::services::tasks::v1`],
//! the CRI's `runtime.v1` is `runtime::v1`. Each service has a `<name>_client` and a `<name>_server` module. The
//! `.proto` files beside this crate say what every field means.
//!
//! Invariant: names, numbers and types of `containerd.*` are containerd's; only the words around them are ours. There is no I/O
//! here and no behaviour beyond conversions, so every other crate may depend on this one.
//!
//! What generation adds to plain prost and tonic:
//! - every message implements [`prost::Name`]; [`any`] needs it;
//! - maps are `BTreeMap`, so that equal messages have equal bytes;
//! - a blob's data in the content service is [`bytes::Bytes`];
//! - clients have no `connect()` (the task service has an rpc of that name): build a channel, pass it to `new`.

pub mod any;
pub mod time;

pub use generated::*;

// What prost and tonic write is not ours to style; the lints hold for everything else.
#[allow(
    clippy::all,
    clippy::needless_pass_by_value,
    clippy::semicolon_if_nothing_returned,
    missing_docs,
    unreachable_pub,
    rust_2018_idioms,
    rustdoc::all
)]
mod generated {
    include!(concat!(env!("OUT_DIR"), "/packages.rs"));
}

/// The descriptors of every file here and of what they import, services included, as an encoded
/// `google.protobuf.FileDescriptorSet`: what gRPC reflection serves.
pub const FILE_DESCRIPTOR_SET: &[u8] = include_bytes!(concat!(env!("OUT_DIR"), "/descriptors.bin"));
