//! The task service end to end: the engine's binary, real shims, real runc, seen from a client.
//!
//! `lifecycle`: what a container's life looks like to a client, and the codes it branches on. `restart`: the engine ends
//! while containers run. `sandboxes`: what a pod shares, made by the shim. `faults`: shims that die, hang, lie; specs that runc refuses; bad input.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

mod bench;
mod faults;
mod lifecycle;
mod restart;
mod sandboxes;

/// Runs a test on a runtime of its own, once for each shim, or says why it cannot.
macro_rules! with_each_shim {
    ($($(#[$doc:meta])* $name:ident($bench:ident, $shim:ident) $body:block)*) => {$(
        $(#[$doc])*
        #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
        async fn $name() {
            if !crate::bench::ready() {
                return;
            }
            for shim in crate::bench::shims() {
                println!("with {shim}");
                #[allow(unused_mut)]
                let mut $bench = crate::bench::Bench::start().await;
                let $shim: &str = &shim;
                $body
                $bench.finish().await;
            }
        }
    )*};
}
pub(crate) use with_each_shim;
