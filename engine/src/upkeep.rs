//! The upkeep of images: to find and mend damage, to convert, to see where the bytes are, and to have them back.
//!
//! ```text
//!  verify   name -> index -> manifest -> config, layers -> diff ids -> snapshots -> files     upkeep/{tree,verify,compare}.rs
//!  repair   a blob from where it came from; a snapshot from its layer                         upkeep/repair.rs
//!  convert  documents and layers -> documents and layers -> name                              upkeep/convert.rs
//!  usage    the collector's graph of who holds what, with sizes                               upkeep/{usage,prune}.rs
//!  drop     layers' blobs, on request                                                         upkeep/layers.rs
//! ```
//!
//! Invariants: what is made here is under a lease until something holds it. What is damaged is replaced only by what has been
//! checked, and what containers stand on is never touched. Sizes come from records and what snapshotters have stored: only
//! writable snapshots are measured.

mod compare;
mod convert;
mod layers;
mod prune;
mod repair;
mod tree;
mod usage;
mod verify;

use std::future::Future;
use std::path::PathBuf;
use std::time::{Duration, SystemTime};

use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

pub(crate) use compare::Tree;
pub use convert::Conversion;
pub use prune::{Pruned, Unneeded};
pub use verify::Wanted;
pub(crate) use verify::{BUFFER, Hashing, drain, read_layer};

use crate::content::Content;
use crate::context::RequestContext;
use crate::error::{Error, Result, outlive};
use crate::events::Exchange;
use crate::gc::Gc;
use crate::images::Images;
use crate::leases::Leases;
use crate::metadata::Metadata;
use crate::remotes::Remotes;
use crate::snapshots::Snapshots;
use crate::transfer::Transfers;

/// How long a lease lives when the engine dies before it ends it.
const LEASE: Duration = Duration::from_secs(24 * 3600);
/// Messages that wait for a client.
const PENDING: usize = 64;

/// The parts that images are made of, for their upkeep; cheap to clone.
#[derive(Clone)]
pub struct Upkeep {
    /// The engine's folders.
    pub folders: Folders,
    /// Blobs.
    pub content: Content,
    /// For how much they take.
    pub events: Exchange,
    /// What nothing holds.
    pub gc: Gc,
    /// Names.
    pub images: Images,
    /// Leases.
    pub leases: Leases,
    /// All records.
    pub metadata: Metadata,
    /// Where blobs come from.
    pub remotes: Remotes,
    /// Unpacked layers.
    pub snapshots: Snapshots,
    /// Unpacks layers.
    pub transfers: Transfers,
}

/// Where the engine writes to.
#[derive(Debug, Clone)]
pub struct Folders {
    /// Durable.
    pub root: PathBuf,
    /// Till the host is started again.
    pub state: PathBuf,
}

impl Upkeep {
    /// Does work under the request's lease, or under one of its own. It outlives its caller.
    async fn leased<T, F, W>(&self, context: &RequestContext, work: F) -> Result<T>
    where
        T: Send + 'static,
        F: FnOnce(Upkeep, RequestContext) -> W + Send + 'static,
        W: Future<Output = Result<T>> + Send + 'static,
    {
        context.namespace()?;
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            if context.lease().is_some() {
                return work(this, context).await;
            }
            let end = OffsetDateTime::from(SystemTime::now() + LEASE).format(&Rfc3339).unwrap_or_default();
            let labels = [("containerd.io/gc.expire".to_owned(), end)].into();
            let lease = this.leases.create(&context, String::new(), labels).await?.id;
            let done = work(this.clone(), context.clone().with_lease(&lease)).await;
            if let Err(error) = this.leases.delete(&context, lease).await {
                tracing::warn!(%error, "the lease of work on images stays until it expires");
            }
            done
        })
        .await
    }
}

fn gone() -> Error {
    Error::cancelled("given up: its caller has gone")
}
