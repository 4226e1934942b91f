//! Logs that a shim writes itself, and the socket at which its streams are joined: how the engine says what it wants
//! ([`LogSpec`], a URI in the place of a fifo's path), what travels over the socket ([`Message`]), and the engine's
//! side of it ([`reopen`], [`attach`]).
//!
//! ```text
//!   container --pipe--> shim, or a logger beside somebody else's shim --> log file
//!                          |  ^
//!                          v  |  socket: reopen, attach
//!                         engine
//! ```
//!
//! Format: a client's first byte is the version of the protocol, [`VERSION`]. All else, in both directions, is frames:
//! a byte that says what it is, the payload's length as four bytes, big-endian, at most [`PAYLOAD_MAX`], the payload.
//!
//! ```text
//!   client   R                  open the log anew: answered D or X, then closed
//!            A streams          join: a byte, 1 stdin + 2 stdout + 4 stderr; answered D or X
//!            I bytes            standard input
//!            C                  there is no more of it
//!   shim     D                  done
//!            O bytes, E bytes   output since the client joined
//!            Z                  all of it has been sent, and there will be no more
//!            X code text        an error, a gRPC code in four bytes; closed behind it
//! ```
//!
//! Invariants: whoever breaks the format gets an X and loses the connection, and nothing is kept for it beyond one frame.
//! A client that does not read is let go of; nobody waits for it.

mod client;
mod spec;
mod wire;

pub use client::{Attached, Frame, Input, Output, attach, reopen};
pub use spec::{LONGEST_LINE, LogSpec, MAX_LINE, Stdin, percent_decoded};
pub use wire::{Message, PAYLOAD_MAX, Reader, Request, Stream, Streams, VERSION, encode_output, listen};
