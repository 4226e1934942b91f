//! `containerd.services.diff.v1.Diff`

use proto::containerd::services::diff::v1::{
    self as api, ApplyRequest, ApplyResponse, DiffRequest, DiffResponse,
};
use proto::containerd::types;
use sys::mount::Mount;
use tonic::{Request, Response, Status};

use super::required;
use crate::context::RequestContext;
use crate::diff::{Comparison, Diff, Layer};

/// The service over the domain's layers.
pub struct Service {
    /// The domain.
    pub diff: Diff,
}

#[tonic::async_trait]
impl api::diff_server::Diff for Service {
    async fn apply(&self, request: Request<ApplyRequest>) -> Result<Response<ApplyResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let layer = Layer {
            descriptor: required(request.diff, "diff")?,
            mounts: mounts(request.mounts),
            payloads: request.payloads,
            sync: request.sync_fs,
        };
        let applied = self.diff.apply(&context, layer).await?;
        Ok(Response::new(ApplyResponse { applied: Some(applied) }))
    }

    async fn diff(&self, request: Request<DiffRequest>) -> Result<Response<DiffResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let comparison = Comparison {
            left: mounts(request.left),
            right: mounts(request.right),
            media_type: request.media_type,
            reference: request.r#ref,
            labels: request.labels,
            epoch: request.source_date_epoch.and_then(|epoch| epoch.try_into().ok()),
        };
        let diff = self.diff.compare(&context, comparison).await?;
        Ok(Response::new(DiffResponse { diff: Some(diff) }))
    }
}

fn mounts(mounts: Vec<types::Mount>) -> Vec<Mount> {
    mounts
        .into_iter()
        .map(|mount| Mount {
            kind: mount.r#type,
            source: mount.source,
            target: mount.target,
            options: mount.options,
        })
        .collect()
}
