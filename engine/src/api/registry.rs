//! `gantry.registry.v1.Registry`

use futures::stream::BoxStream;
use proto::gantry::registry::v1::{self as api, FetchRequest, FetchResponse, PushRequest, PushResponse};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use super::required;
use crate::content::parse_digest;
use crate::context::RequestContext;
use crate::error::Result;
use crate::remotes::Pushed;
use crate::transfer::Transfers;

/// The service over the domain's transfers.
pub struct Service {
    /// The domain.
    pub transfers: Transfers,
}

#[tonic::async_trait]
impl api::registry_server::Registry for Service {
    type FetchStream = BoxStream<'static, Result<FetchResponse, Status>>;

    async fn fetch(&self, request: Request<FetchRequest>) -> Result<Response<Self::FetchStream>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let registry = required(request.registry, "registry")?;
        let digests = request.digests.iter().map(|digest| parse_digest(digest)).collect::<Result<_>>()?;
        let pieces = self.transfers.fetch_objects(&context, registry, digests, request.media_type)?;
        let pieces = ReceiverStream::new(pieces)
            .map(|piece| piece.map(|data| FetchResponse { data }).map_err(Status::from));
        Ok(Response::new(Box::pin(pieces)))
    }

    async fn push(&self, request: Request<PushRequest>) -> Result<Response<PushResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let registry = required(request.registry, "registry")?;
        let digest = parse_digest(&request.digest)?;
        let pushed = self.transfers.push_object(&context, registry, digest, &request.media_type).await?;
        Ok(Response::new(PushResponse { existed: pushed == Pushed::Exists }))
    }
}
