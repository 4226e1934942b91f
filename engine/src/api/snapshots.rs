//! `containerd.services.snapshots.v1.Snapshots`

use futures::StreamExt as _;
use futures::stream::{self, BoxStream};
use proto::containerd::services::snapshots::v1::{
    self as api, CleanupRequest, CommitSnapshotRequest, Info, ListSnapshotsRequest, ListSnapshotsResponse,
    MountsRequest, MountsResponse, PrepareSnapshotRequest, PrepareSnapshotResponse, RemoveSnapshotRequest,
    StatSnapshotRequest, StatSnapshotResponse, UpdateSnapshotRequest, UpdateSnapshotResponse, UsageRequest,
    UsageResponse, ViewSnapshotRequest, ViewSnapshotResponse,
};
use proto::containerd::types::Mount;
use snapshotter::Kind;
use tonic::{Request, Response, Status};

use super::{mask, required};
use crate::context::RequestContext;
use crate::snapshots::{self, Layer, New, Snapshots};

/// Snapshots in one message of a list.
const PAGE: usize = 100;

/// The service over the domain's snapshots.
pub struct Service {
    /// The domain.
    pub snapshots: Snapshots,
}

impl From<snapshots::Info> for Info {
    fn from(info: snapshots::Info) -> Self {
        let kind = match info.kind {
            Kind::View => api::Kind::View,
            Kind::Active => api::Kind::Active,
            Kind::Committed => api::Kind::Committed,
        };
        Info {
            name: info.key,
            parent: info.record.parent,
            kind: kind.into(),
            created_at: info.record.created,
            updated_at: info.record.updated,
            labels: info.record.labels,
        }
    }
}

fn mounts(mounts: Vec<sys::mount::Mount>) -> Vec<Mount> {
    mounts
        .into_iter()
        .map(|mount| Mount {
            r#type: mount.kind,
            source: mount.source,
            target: mount.target,
            options: mount.options,
        })
        .collect()
}

#[tonic::async_trait]
impl api::snapshots_server::Snapshots for Service {
    async fn prepare(
        &self,
        request: Request<PrepareSnapshotRequest>,
    ) -> Result<Response<PrepareSnapshotResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let new =
            New { key: request.key, parent: request.parent, labels: request.labels, kind: Kind::Active };
        let made = self.snapshots.create(&context, &request.snapshotter, new).await?;
        Ok(Response::new(PrepareSnapshotResponse { mounts: mounts(made) }))
    }

    async fn view(
        &self,
        request: Request<ViewSnapshotRequest>,
    ) -> Result<Response<ViewSnapshotResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let new = New { key: request.key, parent: request.parent, labels: request.labels, kind: Kind::View };
        let made = self.snapshots.create(&context, &request.snapshotter, new).await?;
        Ok(Response::new(ViewSnapshotResponse { mounts: mounts(made) }))
    }

    async fn mounts(&self, request: Request<MountsRequest>) -> Result<Response<MountsResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let found = self.snapshots.mounts(&context, &request.snapshotter, &request.key).await?;
        Ok(Response::new(MountsResponse { mounts: mounts(found) }))
    }

    async fn commit(&self, request: Request<CommitSnapshotRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let CommitSnapshotRequest { snapshotter, name, key, labels, parent } = request;
        let parent = Some(parent).filter(|parent| !parent.is_empty());
        let layer = Layer { key, layer: name, parent, labels };
        self.snapshots.commit(&context, &snapshotter, layer).await?;
        Ok(Response::new(()))
    }

    async fn remove(&self, request: Request<RemoveSnapshotRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        self.snapshots.remove(&context, &request.snapshotter, request.key).await?;
        Ok(Response::new(()))
    }

    async fn stat(
        &self,
        request: Request<StatSnapshotRequest>,
    ) -> Result<Response<StatSnapshotResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let info = self.snapshots.stat(&context, &request.snapshotter, &request.key).await?;
        Ok(Response::new(StatSnapshotResponse { info: Some(info.into()) }))
    }

    async fn update(
        &self,
        request: Request<UpdateSnapshotRequest>,
    ) -> Result<Response<UpdateSnapshotResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let new = required(request.info, "info")?;
        let info = self
            .snapshots
            .update(&context, &request.snapshotter, new.name, new.labels, mask(request.update_mask))
            .await?;
        Ok(Response::new(UpdateSnapshotResponse { info: Some(info.into()) }))
    }

    type ListStream = BoxStream<'static, Result<ListSnapshotsResponse, Status>>;

    async fn list(
        &self,
        request: Request<ListSnapshotsRequest>,
    ) -> Result<Response<Self::ListStream>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let infos = self.snapshots.list(&context, &request.snapshotter, &request.filters).await?;
        let pages = stream::iter(infos.into_iter().map(Info::from)).chunks(PAGE);
        Ok(Response::new(pages.map(|info| Ok(ListSnapshotsResponse { info })).boxed()))
    }

    async fn usage(&self, request: Request<UsageRequest>) -> Result<Response<UsageResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let usage = self.snapshots.usage(&context, &request.snapshotter, &request.key).await?;
        Ok(Response::new(UsageResponse { size: usage.size, inodes: usage.inodes }))
    }

    async fn cleanup(&self, request: Request<CleanupRequest>) -> Result<Response<()>, Status> {
        self.snapshots.cleanup(&request.into_inner().snapshotter).await?;
        Ok(Response::new(()))
    }
}
