//! A lease around a piece of work: what the engine makes meanwhile is not collected.

use std::time::{Duration, SystemTime};

use proto::containerd::services::leases::v1::{CreateRequest, DeleteRequest};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;
use tokio::signal::unix::{Signal, SignalKind, signal};
use tonic::Code;

use crate::client::{Client, Tried, code_of};
use crate::transfer::Interrupted;

/// How long a lease lives when ctr dies before it ends it.
const EXPIRY: Duration = Duration::from_secs(24 * 3600);

/// The label of a lease that ends by itself.
pub(crate) const EXPIRE_LABEL: &str = "containerd.io/gc.expire";

/// The moment `after` from now, as labels have it.
pub(crate) fn expiry(after: Duration) -> anyhow::Result<String> {
    Ok(OffsetDateTime::from(SystemTime::now() + after).format(&Rfc3339)?)
}

/// Does `work` with a client whose requests are under a new lease, and ends the lease whatever comes of it.
pub(crate) async fn within<T, F: Future<Output = anyhow::Result<T>>>(
    client: &Client,
    work: impl FnOnce(Client) -> F,
) -> anyhow::Result<T> {
    let labels = [(EXPIRE_LABEL.to_owned(), expiry(EXPIRY)?)].into();
    let id = unique("ctr");
    let created = client.leases().create(CreateRequest { id, labels }).await.tried(|| "create a lease")?;
    let id = created.lease.unwrap_or_default().id;
    let leased = client.with_lease(&id)?;
    // What is half made has no name yet: without the lease it goes with the next collection.
    let result = unless_interrupted(work(leased)).await;
    let ended = client.leases().delete(DeleteRequest { id: id.clone(), sync: false }).await;
    let ended = match ended.tried(|| format!("delete lease {id}")) {
        // It has expired by the engine's clock, or somebody was quicker.
        Err(error) if code_of(&error) == Some(Code::NotFound) => Ok(()),
        ended => ended,
    };
    match (result, ended) {
        (Ok(value), Ok(())) => Ok(value),
        (Ok(_), Err(error)) | (Err(error), _) => Err(error),
    }
}

/// Does `work` unless ctr is asked to end before it is done: then the caller can still clean up.
pub(crate) async fn unless_interrupted<T>(
    work: impl Future<Output = anyhow::Result<T>>,
) -> anyhow::Result<T> {
    let mut interruption = Interruption::listen()?;
    tokio::select! {
        result = work => result,
        signal = interruption.next() => Err(Interrupted { signal, note: "" }.into()),
    }
}

/// The signals by which ctr is asked to end.
pub(crate) struct Interruption {
    terminate: Signal,
    interrupt: Signal,
}

impl Interruption {
    /// From now on they do not end ctr by themselves.
    pub(crate) fn listen() -> anyhow::Result<Interruption> {
        Ok(Interruption {
            terminate: signal(SignalKind::terminate())?,
            interrupt: signal(SignalKind::interrupt())?,
        })
    }

    /// The next one's number.
    pub(crate) async fn next(&mut self) -> u8 {
        tokio::select! {
            _ = self.terminate.recv() => 15,
            _ = self.interrupt.recv() => 2,
        }
    }
}

/// A name nobody else uses: prefix, process and time.
pub(crate) fn unique(prefix: &str) -> String {
    use std::sync::atomic::{AtomicU64, Ordering};
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |time| time.as_nanos());
    format!("{prefix}-{}-{nanos}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed))
}
