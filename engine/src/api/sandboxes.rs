//! `containerd.services.sandbox.v1.Store` and `Controller`

use proto::containerd::services::sandbox::v1::{
    self as api, ControllerCreateRequest, ControllerCreateResponse, ControllerMetricsRequest,
    ControllerMetricsResponse, ControllerPlatformRequest, ControllerPlatformResponse,
    ControllerShutdownRequest, ControllerShutdownResponse, ControllerStartRequest, ControllerStartResponse,
    ControllerStatusRequest, ControllerStatusResponse, ControllerStopRequest, ControllerStopResponse,
    ControllerUpdateRequest, ControllerUpdateResponse, ControllerWaitRequest, ControllerWaitResponse,
    StoreCreateRequest, StoreCreateResponse, StoreDeleteRequest, StoreDeleteResponse, StoreGetRequest,
    StoreGetResponse, StoreListRequest, StoreListResponse, StoreUpdateRequest, StoreUpdateResponse,
};
use tonic::{Request, Response, Status};

use super::required;
use crate::context::RequestContext;
use crate::sandboxes::Sandboxes;
use crate::tasks::{Tasks, check_controller};

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

/// The service over the sandboxes that shims make.
pub struct Controller {
    /// The domain.
    pub tasks: Tasks,
}

#[tonic::async_trait]
impl api::controller_server::Controller for Controller {
    async fn create(
        &self,
        request: Request<ControllerCreateRequest>,
    ) -> Result<Response<ControllerCreateResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        check_controller(&request.sandboxer)?;
        let sandbox_id = request.sandbox_id.clone();
        self.tasks.create_sandbox(&context, request).await?;
        Ok(Response::new(ControllerCreateResponse { sandbox_id }))
    }

    async fn start(
        &self,
        request: Request<ControllerStartRequest>,
    ) -> Result<Response<ControllerStartResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        check_controller(&request.sandboxer)?;
        Ok(Response::new(self.tasks.start_sandbox(&context, &request.sandbox_id).await?))
    }

    async fn platform(
        &self,
        request: Request<ControllerPlatformRequest>,
    ) -> Result<Response<ControllerPlatformResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        check_controller(&request.sandboxer)?;
        let platform = self.tasks.sandbox_platform(&context, &request.sandbox_id).await?;
        Ok(Response::new(ControllerPlatformResponse { platform: Some(platform) }))
    }

    async fn stop(
        &self,
        request: Request<ControllerStopRequest>,
    ) -> Result<Response<ControllerStopResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        check_controller(&request.sandboxer)?;
        self.tasks.stop_sandbox(&context, &request.sandbox_id, request.timeout_secs).await?;
        Ok(Response::new(ControllerStopResponse {}))
    }

    async fn wait(
        &self,
        request: Request<ControllerWaitRequest>,
    ) -> Result<Response<ControllerWaitResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        check_controller(&request.sandboxer)?;
        let exit = self.tasks.wait_sandbox(&context, &request.sandbox_id).await?;
        Ok(Response::new(ControllerWaitResponse { exit_status: exit.status, exited_at: exit.at }))
    }

    async fn status(
        &self,
        request: Request<ControllerStatusRequest>,
    ) -> Result<Response<ControllerStatusResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        check_controller(&request.sandboxer)?;
        Ok(Response::new(self.tasks.sandbox_status(&context, &request.sandbox_id, request.verbose).await?))
    }

    async fn shutdown(
        &self,
        request: Request<ControllerShutdownRequest>,
    ) -> Result<Response<ControllerShutdownResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        check_controller(&request.sandboxer)?;
        self.tasks.shutdown_sandbox(&context, &request.sandbox_id).await?;
        Ok(Response::new(ControllerShutdownResponse {}))
    }

    async fn metrics(
        &self,
        request: Request<ControllerMetricsRequest>,
    ) -> Result<Response<ControllerMetricsResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        check_controller(&request.sandboxer)?;
        let metrics = self.tasks.sandbox_metrics(&context, &request.sandbox_id).await?;
        Ok(Response::new(ControllerMetricsResponse { metrics }))
    }

    async fn update(
        &self,
        request: Request<ControllerUpdateRequest>,
    ) -> Result<Response<ControllerUpdateResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        check_controller(&request.sandboxer)?;
        required(request.sandbox, "sandbox")?;
        self.tasks.update_sandbox(&context, &request.sandbox_id)?;
        Ok(Response::new(ControllerUpdateResponse {}))
    }
}
