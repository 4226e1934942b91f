//! `containerd.services.containers.v1.Containers`

use futures::stream::{self, BoxStream, StreamExt as _};
use proto::containerd::services::containers::v1::{
    self as api, CreateContainerRequest, CreateContainerResponse, DeleteContainerRequest,
    GetContainerRequest, GetContainerResponse, ListContainerMessage, ListContainersRequest,
    ListContainersResponse, UpdateContainerRequest, UpdateContainerResponse,
};
use tonic::{Request, Response, Status};

use super::{mask, required};
use crate::containers::Containers;
use crate::context::RequestContext;

/// The service over the domain's containers.
pub struct Service {
    /// The domain.
    pub containers: Containers,
}

#[tonic::async_trait]
impl api::containers_server::Containers for Service {
    async fn get(
        &self,
        request: Request<GetContainerRequest>,
    ) -> Result<Response<GetContainerResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let container = self.containers.get(&context, &request.id)?;
        Ok(Response::new(GetContainerResponse { container: Some(container) }))
    }

    async fn list(
        &self,
        request: Request<ListContainersRequest>,
    ) -> Result<Response<ListContainersResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let containers = self.containers.list(&context, &request.filters)?;
        Ok(Response::new(ListContainersResponse { containers }))
    }

    type ListStreamStream = BoxStream<'static, Result<ListContainerMessage, Status>>;

    async fn list_stream(
        &self,
        request: Request<ListContainersRequest>,
    ) -> Result<Response<Self::ListStreamStream>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let containers = self.containers.list(&context, &request.filters)?;
        let messages = containers.into_iter().map(|c| Ok(ListContainerMessage { container: Some(c) }));
        Ok(Response::new(stream::iter(messages).boxed()))
    }

    async fn create(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Result<Response<CreateContainerResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let container = self.containers.create(&context, required(request.container, "container")?).await?;
        Ok(Response::new(CreateContainerResponse { container: Some(container) }))
    }

    async fn update(
        &self,
        request: Request<UpdateContainerRequest>,
    ) -> Result<Response<UpdateContainerResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let container = required(request.container, "container")?;
        let container = self.containers.update(&context, container, mask(request.update_mask)).await?;
        Ok(Response::new(UpdateContainerResponse { container: Some(container) }))
    }

    async fn delete(&self, request: Request<DeleteContainerRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        self.containers.delete(&context, request.id).await?;
        Ok(Response::new(()))
    }
}
