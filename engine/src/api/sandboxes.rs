//! `containerd.services.sandbox.v1.Store`

use proto::containerd::services::sandbox::v1::{
    self as api, StoreCreateRequest, StoreCreateResponse, StoreDeleteRequest, StoreDeleteResponse,
    StoreGetRequest, StoreGetResponse, StoreListRequest, StoreListResponse, StoreUpdateRequest,
    StoreUpdateResponse,
};
use tonic::{Request, Response, Status};

use super::required;
use crate::context::RequestContext;
use crate::sandboxes::Sandboxes;

/// The service over the domain's sandboxes.
pub struct Store {
    /// The domain.
    pub sandboxes: Sandboxes,
}

#[tonic::async_trait]
impl api::store_server::Store for Store {
    async fn create(
        &self,
        request: Request<StoreCreateRequest>,
    ) -> Result<Response<StoreCreateResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let sandbox = self.sandboxes.create(&context, required(request.sandbox, "sandbox")?).await?;
        Ok(Response::new(StoreCreateResponse { sandbox: Some(sandbox) }))
    }

    async fn update(
        &self,
        request: Request<StoreUpdateRequest>,
    ) -> Result<Response<StoreUpdateResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let sandbox = required(request.sandbox, "sandbox")?;
        let sandbox = self.sandboxes.update(&context, sandbox, request.fields).await?;
        Ok(Response::new(StoreUpdateResponse { sandbox: Some(sandbox) }))
    }

    async fn delete(
        &self,
        request: Request<StoreDeleteRequest>,
    ) -> Result<Response<StoreDeleteResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        self.sandboxes.delete(&context, request.sandbox_id).await?;
        Ok(Response::new(StoreDeleteResponse {}))
    }

    async fn list(&self, request: Request<StoreListRequest>) -> Result<Response<StoreListResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let list = self.sandboxes.list(&context, &request.filters)?;
        Ok(Response::new(StoreListResponse { list }))
    }

    async fn get(&self, request: Request<StoreGetRequest>) -> Result<Response<StoreGetResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let sandbox = self.sandboxes.get(&context, &request.sandbox_id)?;
        Ok(Response::new(StoreGetResponse { sandbox: Some(sandbox) }))
    }
}
