//! What the Open Container Initiative's documents define, as plain values: digests, image
//! references, platforms, image documents, and the runtime spec with the options that shape it.
//!
//! Invariant: nothing here does I/O. Whoever needs a file (a manifest, /etc/passwd) reads it
//! with its own limits and hands the bytes in.

#![forbid(unsafe_code)]

pub mod digest;
pub mod image;
pub mod platform;
pub mod reference;
pub mod runtime;
pub mod seccomp;
pub mod signal;
pub mod spec;
pub mod user;

pub use digest::{Algorithm, Digest, Hasher};
pub use platform::Platform;
pub use reference::Reference;
