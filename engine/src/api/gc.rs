//! `gantry.gc.v1.GC`

use proto::gantry::gc::v1::{self as api, CollectRequest, CollectResponse, ExplainRequest, ExplainResponse};
use tonic::{Request, Response, Status};

use crate::context::RequestContext;
use crate::gc::{Collected, Gc, Step};

/// The service over the collector.
pub struct Service {
    /// The domain.
    pub gc: Gc,
}

impl From<Collected> for CollectResponse {
    fn from(collected: Collected) -> Self {
        let Collected { content, snapshots, images, leases, ingests, mounts, took } = collected;
        let took = took.try_into().ok();
        CollectResponse { content, snapshots, images, leases, ingests, took, mounts }
    }
}

impl From<Step> for api::Step {
    fn from(step: Step) -> Self {
        api::Step { kind: step.node.kind().to_owned(), id: step.node.id(), why: step.why.to_string() }
    }
}

#[tonic::async_trait]
impl api::gc_server::Gc for Service {
    async fn collect(&self, _: Request<CollectRequest>) -> Result<Response<CollectResponse>, Status> {
        Ok(Response::new(self.gc.collect().await?.into()))
    }

    async fn explain(&self, request: Request<ExplainRequest>) -> Result<Response<ExplainResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let explained = self.gc.explain(&context, request.key, request.snapshotter).await?;
        Ok(Response::new(explained.map_or_else(ExplainResponse::default, |explained| ExplainResponse {
            found: true,
            held: explained.held,
            chain: explained.chain.into_iter().map(Into::into).collect(),
        })))
    }
}
