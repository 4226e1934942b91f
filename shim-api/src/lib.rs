//! The shim-v2 interface, both sides of it: how a shim is started ([`bootstrap`]), how the engine drives its
//! tasks ([`task`]) and its sandbox ([`sandbox`]), and how it tells the engine what happened ([`publisher`], served by [`events`]). Logs that a shim
//! writes itself are in [`logs`]; how all processes tell where the time goes, in [`trace`].
//!
//! Everything here speaks ttrpc over Unix sockets that are files. The frames and the connection handling are the
//! `ttrpc` crate's; messages are the prost types of the `proto` crate, carried as opaque payloads by [`transport`].
//!
//! Invariant: a call that reached a service runs to its end even when its caller hangs up. Only waiting ends early.

pub mod bootstrap;
mod error;
pub mod events;
pub mod logs;
pub mod publisher;
pub mod sandbox;
mod service;
pub mod task;
pub mod trace;
pub mod transport;

pub use error::{Code, Error, Result};
