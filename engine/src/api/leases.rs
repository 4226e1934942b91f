//! `containerd.services.leases.v1.Leases`

use proto::containerd::services::leases::v1::{
    self as api, AddResourceRequest, CreateRequest, CreateResponse, DeleteRequest, DeleteResourceRequest,
    ListRequest, ListResourcesRequest, ListResourcesResponse, ListResponse,
};
use tonic::{Request, Response, Status};

use super::required;
use crate::context::RequestContext;
use crate::gc::Gc;
use crate::leases::Leases;

/// The service over the domain's leases.
pub struct Service {
    /// The domain.
    pub leases: Leases,
    /// What a synchronous deletion waits for.
    pub gc: Gc,
}

#[tonic::async_trait]
impl api::leases_server::Leases for Service {
    async fn create(&self, request: Request<CreateRequest>) -> Result<Response<CreateResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let lease = self.leases.create(&context, request.id, request.labels).await?;
        Ok(Response::new(CreateResponse { lease: Some(lease) }))
    }

    async fn delete(&self, request: Request<DeleteRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        self.leases.delete(&context, request.id).await?;
        if request.sync {
            self.gc.collect().await?;
        }
        Ok(Response::new(()))
    }

    async fn list(&self, request: Request<ListRequest>) -> Result<Response<ListResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let leases = self.leases.list(&context, &request.filters)?;
        Ok(Response::new(ListResponse { leases }))
    }

    async fn add_resource(&self, request: Request<AddResourceRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        self.leases.add_resource(&context, request.id, required(request.resource, "resource")?).await?;
        Ok(Response::new(()))
    }

    async fn delete_resource(&self, request: Request<DeleteResourceRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        self.leases.delete_resource(&context, request.id, required(request.resource, "resource")?).await?;
        Ok(Response::new(()))
    }

    async fn list_resources(
        &self,
        request: Request<ListResourcesRequest>,
    ) -> Result<Response<ListResourcesResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let resources = self.leases.list_resources(&context, &request.id)?;
        Ok(Response::new(ListResourcesResponse { resources }))
    }
}
