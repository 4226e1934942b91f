//! `containerd.services.tasks.v1.Tasks`

use proto::containerd::services::tasks::v1::{
    self as api, CheckpointTaskRequest, CheckpointTaskResponse, CloseIoRequest, CreateTaskRequest,
    CreateTaskResponse, DeleteProcessRequest, DeleteResponse, DeleteTaskRequest, ExecProcessRequest,
    GetRequest, GetResponse, KillRequest, ListPidsRequest, ListPidsResponse, ListTasksRequest,
    ListTasksResponse, MetricsRequest, MetricsResponse, PauseTaskRequest, ResizePtyRequest,
    ResumeTaskRequest, StartRequest, StartResponse, UpdateTaskRequest, WaitRequest, WaitResponse,
};
use tonic::{Request, Response, Status};

use crate::context::RequestContext;
use crate::tasks::{Exit, Tasks};

/// The service over the domain's tasks.
pub struct Service {
    /// The domain.
    pub tasks: Tasks,
}

fn deleted(id: String, exit: Exit) -> DeleteResponse {
    DeleteResponse { id, pid: exit.pid, exit_status: exit.status, exited_at: exit.at }
}

#[tonic::async_trait]
impl api::tasks_server::Tasks for Service {
    async fn create(
        &self,
        request: Request<CreateTaskRequest>,
    ) -> Result<Response<CreateTaskResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let container_id = request.container_id.clone();
        let pid = self.tasks.create(&context, request).await?;
        Ok(Response::new(CreateTaskResponse { container_id, pid }))
    }

    async fn start(&self, request: Request<StartRequest>) -> Result<Response<StartResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let pid = self.tasks.start(&context, &request.container_id, &request.exec_id).await?;
        Ok(Response::new(StartResponse { pid }))
    }

    async fn delete(&self, request: Request<DeleteTaskRequest>) -> Result<Response<DeleteResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let exit = self.tasks.delete(&context, &request.container_id).await?;
        Ok(Response::new(deleted(String::new(), exit)))
    }

    async fn delete_process(
        &self,
        request: Request<DeleteProcessRequest>,
    ) -> Result<Response<DeleteResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let exit = self.tasks.delete_process(&context, &request.container_id, &request.exec_id).await?;
        Ok(Response::new(deleted(request.exec_id, exit)))
    }

    async fn get(&self, request: Request<GetRequest>) -> Result<Response<GetResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let process = self.tasks.get(&context, &request.container_id, &request.exec_id).await?;
        Ok(Response::new(GetResponse { process: Some(process) }))
    }

    async fn list(&self, request: Request<ListTasksRequest>) -> Result<Response<ListTasksResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        // containerd takes no notice of the request's filter.
        let ListTasksRequest { filter: _ } = request;
        let tasks = self.tasks.list(&context).await?;
        Ok(Response::new(ListTasksResponse { tasks }))
    }

    async fn kill(&self, request: Request<KillRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let KillRequest { container_id, exec_id, signal, all } = request;
        self.tasks.kill(&context, &container_id, &exec_id, signal, all).await?;
        Ok(Response::new(()))
    }

    async fn exec(&self, request: Request<ExecProcessRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        self.tasks.exec(&context, request).await?;
        Ok(Response::new(()))
    }

    async fn resize_pty(&self, request: Request<ResizePtyRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let ResizePtyRequest { container_id, exec_id, width, height } = request;
        self.tasks.resize_pty(&context, &container_id, &exec_id, width, height).await?;
        Ok(Response::new(()))
    }

    async fn close_io(&self, request: Request<CloseIoRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        self.tasks.close_io(&context, &request.container_id, &request.exec_id, request.stdin).await?;
        Ok(Response::new(()))
    }

    async fn pause(&self, request: Request<PauseTaskRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        self.tasks.pause(&context, &request.container_id).await?;
        Ok(Response::new(()))
    }

    async fn resume(&self, request: Request<ResumeTaskRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        self.tasks.resume(&context, &request.container_id).await?;
        Ok(Response::new(()))
    }

    async fn list_pids(
        &self,
        request: Request<ListPidsRequest>,
    ) -> Result<Response<ListPidsResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let processes = self.tasks.pids(&context, &request.container_id).await?;
        Ok(Response::new(ListPidsResponse { processes }))
    }

    async fn checkpoint(
        &self,
        request: Request<CheckpointTaskRequest>,
    ) -> Result<Response<CheckpointTaskResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let descriptors = self.tasks.checkpoint(&context, &request.container_id, request.options).await?;
        Ok(Response::new(CheckpointTaskResponse { descriptors }))
    }

    async fn update(&self, request: Request<UpdateTaskRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let UpdateTaskRequest { container_id, resources, annotations } = request;
        self.tasks.update(&context, &container_id, resources, annotations).await?;
        Ok(Response::new(()))
    }

    async fn metrics(&self, request: Request<MetricsRequest>) -> Result<Response<MetricsResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let metrics = self.tasks.metrics(&context, &request.filters).await?;
        Ok(Response::new(MetricsResponse { metrics }))
    }

    async fn wait(&self, request: Request<WaitRequest>) -> Result<Response<WaitResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let exit = self.tasks.wait(&context, &request.container_id, &request.exec_id).await?;
        Ok(Response::new(WaitResponse { exit_status: exit.status, exited_at: exit.at }))
    }
}
