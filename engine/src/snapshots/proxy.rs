//! A snapshotter in another process, behind the same trait as those that are built in.
//!
//! It may come and go. What a crash left between it and the records is brought in order when it first answers, not when the
//! engine starts: until then it is as if each of its snapshots took long.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;
use proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use proto::containerd::services::snapshots::v1::{
    CleanupRequest, CommitSnapshotRequest, Info as InfoMessage, Kind as KindMessage, ListSnapshotsRequest,
    MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest, UpdateSnapshotRequest,
    UsageRequest, ViewSnapshotRequest,
};
use proto::containerd::types::Mount as MountMessage;
use snapshotter::{Error, Info, Kind, Labels, Mount, Result, Snapshotter, Usage};
use tonic::transport::Channel;
use tonic::{Code, Status};

use crate::proxy::{Proxy, request};

/// What every snapshot is labelled with at the other end: where that is an engine, it has a collector of its own, which is not
/// to collect what this one holds.
const KEPT: &str = "containerd.io/gc.root";

/// What brings records and snapshotter together.
type Reconcile = Box<dyn Fn(&dyn Snapshotter) -> Result<()> + Send + Sync>;

/// The snapshotter behind a socket.
pub(super) struct Remote {
    proxy: Proxy,
    /// What it is called there.
    name: String,
    /// None while it is being put in order.
    order: Option<Order>,
}

/// That it is in order, or how it comes to be.
struct Order {
    reconcile: Reconcile,
    /// One at a time does it; the others wait.
    reconciling: Mutex<()>,
    done: AtomicBool,
}

impl Remote {
    pub(super) fn new(proxy: Proxy, name: String, reconcile: Reconcile) -> Self {
        let order = Order { reconcile, reconciling: Mutex::new(()), done: AtomicBool::new(false) };
        Remote { proxy, name, order: Some(order) }
    }

    fn put_in_order(&self) -> Result<()> {
        let Some(order) = self.order.as_ref().filter(|order| !order.done.load(Ordering::Acquire)) else {
            return Ok(());
        };
        let _one = order.reconciling.lock();
        if !order.done.load(Ordering::Acquire) {
            (order.reconcile)(&Remote { proxy: self.proxy.clone(), name: self.name.clone(), order: None })?;
            order.done.store(true, Ordering::Release);
        }
        Ok(())
    }

    fn client(&self) -> SnapshotsClient<Channel> {
        SnapshotsClient::new(self.proxy.channel())
    }

    /// The plugin's words in the trait's classes.
    fn failure(&self, key: &str, status: &Status) -> Error {
        let message = status.message().to_owned();
        match status.code() {
            Code::NotFound => Error::NotFound(key.to_owned()),
            Code::AlreadyExists => Error::AlreadyExists(key.to_owned()),
            Code::FailedPrecondition => Error::FailedPrecondition(message),
            Code::InvalidArgument => Error::InvalidArgument(message),
            Code::Unimplemented => Error::Unsupported(message),
            Code::Unavailable | Code::DeadlineExceeded => Error::Unavailable(message),
            Code::DataLoss => Error::Lost(message),
            _ => Error::Io {
                what: "ask the snapshotter at",
                path: self.proxy.address().to_owned(),
                source: std::io::Error::other(format!("{:?}: {message}", status.code())),
            },
        }
    }

    fn ask<T>(
        &self,
        key: &str,
        call: impl AsyncFnOnce(&mut SnapshotsClient<Channel>) -> std::result::Result<tonic::Response<T>, Status>,
    ) -> Result<T> {
        self.put_in_order()?;
        let mut client = self.client();
        self.proxy.ask_blocking(call(&mut client)).map_err(|status| self.failure(key, &status))
    }
}

fn mounts(messages: Vec<MountMessage>) -> Vec<Mount> {
    let mounts = messages.into_iter().map(|mount| Mount {
        kind: mount.r#type,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    });
    mounts.collect()
}

fn kept(labels: &Labels) -> Labels {
    let mut labels = labels.clone();
    labels.insert(KEPT.to_owned(), "another engine's".to_owned());
    labels
}

fn info(mut message: InfoMessage) -> Info {
    message.labels.remove(KEPT);
    let time = |time: Option<prost_types::Timestamp>| {
        time.and_then(|time| SystemTime::try_from(time).ok()).unwrap_or(SystemTime::UNIX_EPOCH)
    };
    let kind = match message.kind() {
        KindMessage::View => Kind::View,
        KindMessage::Committed => Kind::Committed,
        KindMessage::Active | KindMessage::Unknown => Kind::Active,
    };
    Info {
        key: message.name,
        kind,
        parent: message.parent,
        labels: message.labels,
        created: time(message.created_at),
        updated: time(message.updated_at),
    }
}

impl Snapshotter for Remote {
    fn prepare(&self, key: &str, parent: &str, labels: &Labels) -> Result<Vec<Mount>> {
        let message = PrepareSnapshotRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: kept(labels),
        };
        let answer = self.ask(key, async |client| client.prepare(request(message)).await);
        answer.map(|answer| mounts(answer.mounts)).map_err(|error| of_parent(error, parent))
    }

    fn view(&self, key: &str, parent: &str, labels: &Labels) -> Result<Vec<Mount>> {
        let message = ViewSnapshotRequest {
            snapshotter: self.name.clone(),
            key: key.to_owned(),
            parent: parent.to_owned(),
            labels: kept(labels),
        };
        let answer = self.ask(key, async |client| client.view(request(message)).await);
        answer.map(|answer| mounts(answer.mounts)).map_err(|error| of_parent(error, parent))
    }

    fn mounts(&self, key: &str) -> Result<Vec<Mount>> {
        let message = MountsRequest { snapshotter: self.name.clone(), key: key.to_owned() };
        Ok(mounts(self.ask(key, async |client| client.mounts(request(message)).await)?.mounts))
    }

    fn commit(&self, name: &str, key: &str, labels: &Labels) -> Result<()> {
        let message = CommitSnapshotRequest {
            snapshotter: self.name.clone(),
            name: name.to_owned(),
            key: key.to_owned(),
            labels: kept(labels),
            ..CommitSnapshotRequest::default()
        };
        self.ask(key, async |client| client.commit(request(message)).await)
    }

    fn remove(&self, key: &str) -> Result<()> {
        let message = RemoveSnapshotRequest { snapshotter: self.name.clone(), key: key.to_owned() };
        self.ask(key, async |client| client.remove(request(message)).await)
    }

    fn stat(&self, key: &str) -> Result<Info> {
        let message = StatSnapshotRequest { snapshotter: self.name.clone(), key: key.to_owned() };
        let answer = self.ask(key, async |client| client.stat(request(message)).await)?;
        answer.info.map(info).ok_or_else(|| Error::NotFound(key.to_owned()))
    }

    fn update(&self, new: &Info, paths: &[String]) -> Result<Info> {
        let message = UpdateSnapshotRequest {
            snapshotter: self.name.clone(),
            info: Some(InfoMessage {
                name: new.key.clone(),
                labels: kept(&new.labels),
                ..InfoMessage::default()
            }),
            update_mask: Some(prost_types::FieldMask { paths: paths.to_vec() }),
        };
        let answer = self.ask(&new.key, async |client| client.update(request(message)).await)?;
        answer.info.map(info).ok_or_else(|| Error::NotFound(new.key.clone()))
    }

    fn walk(&self, visit: &mut dyn FnMut(Info) -> Result<()>) -> Result<()> {
        let message = ListSnapshotsRequest { snapshotter: self.name.clone(), filters: Vec::new() };
        let mut pages = self.ask("", async |client| client.list(request(message)).await)?;
        while let Some(page) =
            self.proxy.block_on(pages.message()).map_err(|status| self.failure("", &status))?
        {
            page.info.into_iter().try_for_each(|found| visit(info(found)))?;
        }
        Ok(())
    }

    fn usage(&self, key: &str) -> Result<Usage> {
        let message = UsageRequest { snapshotter: self.name.clone(), key: key.to_owned() };
        let answer = self.ask(key, async |client| client.usage(request(message)).await)?;
        Ok(Usage { size: answer.size, inodes: answer.inodes })
    }

    fn cleanup(&self) -> Result<()> {
        let message = CleanupRequest { snapshotter: self.name.clone() };
        match self.ask("", async |client| client.cleanup(request(message)).await) {
            // Not all of them have something to clean up.
            Err(Error::Unsupported(_)) => Ok(()),
            cleaned => cleaned,
        }
    }
}

/// What is not there when one is made is its parent.
fn of_parent(error: Error, parent: &str) -> Error {
    match error {
        Error::NotFound(_) => Error::NotFound(parent.to_owned()),
        error => error,
    }
}
