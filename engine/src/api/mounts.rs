//! `containerd.services.mounts.v1.Mounts`

use std::pin::Pin;

use futures::Stream;
use proto::containerd::services::mounts::v1::{
    self as api, ActivateRequest, ActivateResponse, DeactivateRequest, InfoRequest, InfoResponse,
    ListMessage, ListRequest, UpdateRequest, UpdateResponse,
};
use tonic::{Request, Response, Status};

use super::{mask, required};
use crate::context::RequestContext;
use crate::mounts::{Activation, Mounts};

/// The service over the domain's mounts.
pub struct Service {
    /// The domain.
    pub mounts: Mounts,
}

#[tonic::async_trait]
impl api::mounts_server::Mounts for Service {
    type ListStream = Pin<Box<dyn Stream<Item = Result<ListMessage, Status>> + Send>>;

    async fn activate(
        &self,
        request: Request<ActivateRequest>,
    ) -> Result<Response<ActivateResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let ActivateRequest { name, mounts, labels, temporary } = request;
        let info = self.mounts.activate(&context, Activation { name, mounts, labels, temporary }).await?;
        Ok(Response::new(ActivateResponse { info: Some(info) }))
    }

    async fn deactivate(&self, request: Request<DeactivateRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        self.mounts.deactivate(&context, request.name).await?;
        Ok(Response::new(()))
    }

    async fn info(&self, request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let info = self.mounts.info(&context, &request.name)?;
        Ok(Response::new(InfoResponse { info: Some(info) }))
    }

    async fn update(&self, request: Request<UpdateRequest>) -> Result<Response<UpdateResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let info = required(request.info, "info")?;
        let info = self.mounts.update(&context, info, mask(request.update_mask)).await?;
        Ok(Response::new(UpdateResponse { info: Some(info) }))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<Self::ListStream>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let infos = self.mounts.list(&context, &request.filters)?;
        let messages = infos.into_iter().map(|info| Ok(ListMessage { info: Some(info) }));
        Ok(Response::new(Box::pin(futures::stream::iter(messages))))
    }
}
