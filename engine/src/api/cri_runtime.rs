//! `runtime.v1.RuntimeService`

use std::pin::Pin;
use std::time::Duration;

use futures::stream::{self, BoxStream, StreamExt as _};
use proto::runtime::v1::*;
use tokio::sync::broadcast::error::RecvError;
use tonic::{Request, Response, Status};

use crate::cri::events::cut_off;
use crate::cri::exec::{Execs, Synced};
use crate::cri::runtime::Runtime;
use crate::cri::stats::Stats;
use crate::cri::streaming::Server;
use crate::error::Error;

/// Objects in one message of a stream.
const PIECE: usize = 256;
/// The version of the kubelet's own interface, which is not CRI's.
const KUBELET_VERSION: &str = "0.1.0";

/// The service over pods and containers.
pub struct Service {
    /// Pods and containers.
    pub runtime: Runtime,
    /// What they use.
    pub stats: Stats,
    /// Processes in containers.
    pub execs: Execs,
    /// Where their streams are.
    pub server: Server,
}

/// The objects, some in each message.
fn pieces<T, M>(all: Vec<T>, message: impl Fn(Vec<T>) -> M) -> BoxStream<'static, Result<M, Status>>
where
    T: Send + 'static,
    M: Send + 'static,
{
    let mut all = all.into_iter().peekable();
    let mut messages = Vec::new();
    while all.peek().is_some() {
        messages.push(Ok(message(all.by_ref().take(PIECE).collect())));
    }
    stream::iter(messages).boxed()
}

type Answer<T> = Result<Response<T>, Status>;
type Pieces<T> = Pin<Box<dyn futures::Stream<Item = Result<T, Status>> + Send>>;

#[tonic::async_trait]
impl runtime_service_server::RuntimeService for Service {
    type StreamPodSandboxesStream = Pieces<StreamPodSandboxesResponse>;
    type StreamContainersStream = Pieces<StreamContainersResponse>;
    type StreamContainerStatsStream = Pieces<StreamContainerStatsResponse>;
    type StreamPodSandboxStatsStream = Pieces<StreamPodSandboxStatsResponse>;
    type StreamPodSandboxMetricsStream = Pieces<StreamPodSandboxMetricsResponse>;
    type GetContainerEventsStream = Pieces<ContainerEventResponse>;

    async fn version(&self, _: Request<VersionRequest>) -> Answer<VersionResponse> {
        Ok(Response::new(VersionResponse {
            version: KUBELET_VERSION.to_owned(),
            runtime_name: "gantry".to_owned(),
            runtime_version: crate::VERSION.to_owned(),
            runtime_api_version: "v1".to_owned(),
        }))
    }

    async fn run_pod_sandbox(&self, request: Request<RunPodSandboxRequest>) -> Answer<RunPodSandboxResponse> {
        let pod_sandbox_id = self.runtime.run_pod(request.into_inner()).await?;
        Ok(Response::new(RunPodSandboxResponse { pod_sandbox_id }))
    }

    async fn stop_pod_sandbox(
        &self,
        request: Request<StopPodSandboxRequest>,
    ) -> Answer<StopPodSandboxResponse> {
        self.runtime.stop_pod(&request.into_inner().pod_sandbox_id).await?;
        Ok(Response::new(StopPodSandboxResponse {}))
    }

    async fn remove_pod_sandbox(
        &self,
        request: Request<RemovePodSandboxRequest>,
    ) -> Answer<RemovePodSandboxResponse> {
        self.runtime.remove_pod(&request.into_inner().pod_sandbox_id).await?;
        Ok(Response::new(RemovePodSandboxResponse {}))
    }

    async fn pod_sandbox_status(
        &self,
        request: Request<PodSandboxStatusRequest>,
    ) -> Answer<PodSandboxStatusResponse> {
        let request = request.into_inner();
        Ok(Response::new(self.runtime.pod_status(&request.pod_sandbox_id, request.verbose).await?))
    }

    async fn list_pod_sandbox(
        &self,
        request: Request<ListPodSandboxRequest>,
    ) -> Answer<ListPodSandboxResponse> {
        Ok(Response::new(ListPodSandboxResponse {
            items: self.runtime.list_pods(request.into_inner().filter),
        }))
    }

    async fn stream_pod_sandboxes(
        &self,
        request: Request<StreamPodSandboxesRequest>,
    ) -> Answer<Self::StreamPodSandboxesStream> {
        let pods = self.runtime.list_pods(request.into_inner().filter);
        Ok(Response::new(pieces(pods, |pod_sandboxes| StreamPodSandboxesResponse { pod_sandboxes })))
    }

    async fn create_container(
        &self,
        request: Request<CreateContainerRequest>,
    ) -> Answer<CreateContainerResponse> {
        let container_id = self.runtime.create_container(request.into_inner()).await?;
        Ok(Response::new(CreateContainerResponse { container_id }))
    }

    async fn start_container(
        &self,
        request: Request<StartContainerRequest>,
    ) -> Answer<StartContainerResponse> {
        self.runtime.start_container(&request.into_inner().container_id).await?;
        Ok(Response::new(StartContainerResponse {}))
    }

    async fn stop_container(&self, request: Request<StopContainerRequest>) -> Answer<StopContainerResponse> {
        let request = request.into_inner();
        self.runtime.stop_container(&request.container_id, request.timeout).await?;
        Ok(Response::new(StopContainerResponse {}))
    }

    async fn remove_container(
        &self,
        request: Request<RemoveContainerRequest>,
    ) -> Answer<RemoveContainerResponse> {
        self.runtime.remove_container(&request.into_inner().container_id).await?;
        Ok(Response::new(RemoveContainerResponse {}))
    }

    async fn list_containers(
        &self,
        request: Request<ListContainersRequest>,
    ) -> Answer<ListContainersResponse> {
        let containers = self.runtime.list_containers(request.into_inner().filter);
        Ok(Response::new(ListContainersResponse { containers }))
    }

    async fn stream_containers(
        &self,
        request: Request<StreamContainersRequest>,
    ) -> Answer<Self::StreamContainersStream> {
        let containers = self.runtime.list_containers(request.into_inner().filter);
        Ok(Response::new(pieces(containers, |containers| StreamContainersResponse { containers })))
    }

    async fn container_status(
        &self,
        request: Request<ContainerStatusRequest>,
    ) -> Answer<ContainerStatusResponse> {
        let request = request.into_inner();
        Ok(Response::new(self.runtime.container_status(&request.container_id, request.verbose).await?))
    }

    async fn update_container_resources(
        &self,
        request: Request<UpdateContainerResourcesRequest>,
    ) -> Answer<UpdateContainerResourcesResponse> {
        self.runtime.update_container(request.into_inner()).await?;
        Ok(Response::new(UpdateContainerResourcesResponse {}))
    }

    async fn reopen_container_log(
        &self,
        request: Request<ReopenContainerLogRequest>,
    ) -> Answer<ReopenContainerLogResponse> {
        self.runtime.reopen_log(&request.into_inner().container_id).await?;
        Ok(Response::new(ReopenContainerLogResponse {}))
    }

    async fn exec_sync(&self, request: Request<ExecSyncRequest>) -> Answer<ExecSyncResponse> {
        let ExecSyncRequest { container_id, cmd, timeout } = request.into_inner();
        let limit = u64::try_from(timeout).ok().filter(|seconds| *seconds > 0).map(Duration::from_secs);
        let Synced { stdout, stderr, exit_code } = self.execs.exec_sync(&container_id, cmd, limit).await?;
        let exit_code = i32::try_from(exit_code).unwrap_or(i32::MAX);
        Ok(Response::new(ExecSyncResponse { stdout, stderr, exit_code }))
    }

    async fn exec(&self, request: Request<ExecRequest>) -> Answer<ExecResponse> {
        let url = self.server.exec_url(request.into_inner())?;
        Ok(Response::new(ExecResponse { url }))
    }

    async fn attach(&self, request: Request<AttachRequest>) -> Answer<AttachResponse> {
        let url = self.server.attach_url(request.into_inner())?;
        Ok(Response::new(AttachResponse { url }))
    }

    async fn port_forward(&self, request: Request<PortForwardRequest>) -> Answer<PortForwardResponse> {
        let url = self.server.port_forward_url(request.into_inner())?;
        Ok(Response::new(PortForwardResponse { url }))
    }

    async fn container_stats(
        &self,
        request: Request<ContainerStatsRequest>,
    ) -> Answer<ContainerStatsResponse> {
        let stats = self.stats.container_stats(&request.into_inner().container_id).await?;
        Ok(Response::new(ContainerStatsResponse { stats: Some(stats) }))
    }

    async fn list_container_stats(
        &self,
        request: Request<ListContainerStatsRequest>,
    ) -> Answer<ListContainerStatsResponse> {
        let stats = self.stats.list_container_stats(request.into_inner().filter).await?;
        Ok(Response::new(ListContainerStatsResponse { stats }))
    }

    async fn stream_container_stats(
        &self,
        request: Request<StreamContainerStatsRequest>,
    ) -> Answer<Self::StreamContainerStatsStream> {
        let stats = self.stats.list_container_stats(request.into_inner().filter).await?;
        Ok(Response::new(pieces(stats, |container_stats| StreamContainerStatsResponse { container_stats })))
    }

    async fn pod_sandbox_stats(
        &self,
        request: Request<PodSandboxStatsRequest>,
    ) -> Answer<PodSandboxStatsResponse> {
        let stats = self.stats.pod_stats(&request.into_inner().pod_sandbox_id).await?;
        Ok(Response::new(PodSandboxStatsResponse { stats: Some(stats) }))
    }

    async fn list_pod_sandbox_stats(
        &self,
        request: Request<ListPodSandboxStatsRequest>,
    ) -> Answer<ListPodSandboxStatsResponse> {
        let stats = self.stats.list_pod_stats(request.into_inner().filter).await?;
        Ok(Response::new(ListPodSandboxStatsResponse { stats }))
    }

    async fn stream_pod_sandbox_stats(
        &self,
        request: Request<StreamPodSandboxStatsRequest>,
    ) -> Answer<Self::StreamPodSandboxStatsStream> {
        let stats = self.stats.list_pod_stats(request.into_inner().filter).await?;
        Ok(Response::new(pieces(stats, |pod_sandbox_stats| StreamPodSandboxStatsResponse {
            pod_sandbox_stats,
        })))
    }

    /// All that the kubelet says is where pods' addresses come from, and those are CNI's affair.
    async fn update_runtime_config(
        &self,
        _: Request<UpdateRuntimeConfigRequest>,
    ) -> Answer<UpdateRuntimeConfigResponse> {
        Ok(Response::new(UpdateRuntimeConfigResponse {}))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Answer<StatusResponse> {
        Ok(Response::new(self.runtime.status(request.into_inner().verbose).await?))
    }

    async fn checkpoint_container(
        &self,
        request: Request<CheckpointContainerRequest>,
    ) -> Answer<CheckpointContainerResponse> {
        self.runtime.checkpoint(request.into_inner()).await?;
        Ok(Response::new(CheckpointContainerResponse {}))
    }

    async fn checkpoint_pod(&self, _: Request<CheckpointPodRequest>) -> Answer<CheckpointPodResponse> {
        Err(later("pods are not checkpointed whole; checkpoint their containers, one by one"))
    }

    async fn restore_pod(&self, _: Request<RestorePodRequest>) -> Answer<RestorePodResponse> {
        Err(later("pods are not restored from checkpoints"))
    }

    async fn get_container_events(
        &self,
        _: Request<GetEventsRequest>,
    ) -> Answer<Self::GetContainerEventsStream> {
        let events = self.runtime.happenings();
        let events = stream::try_unfold(events, |mut events| async move {
            match events.recv().await {
                Ok(event) => Ok(Some((event.as_ref().clone(), events))),
                Err(RecvError::Lagged(missed)) => Err(Status::from(cut_off(missed))),
                Err(RecvError::Closed) => Ok(None),
            }
        });
        Ok(Response::new(events.boxed()))
    }

    async fn list_metric_descriptors(
        &self,
        _: Request<ListMetricDescriptorsRequest>,
    ) -> Answer<ListMetricDescriptorsResponse> {
        Ok(Response::new(ListMetricDescriptorsResponse { descriptors: self.stats.descriptors() }))
    }

    async fn list_pod_sandbox_metrics(
        &self,
        _: Request<ListPodSandboxMetricsRequest>,
    ) -> Answer<ListPodSandboxMetricsResponse> {
        let pod_metrics = self.stats.pod_metrics().await?;
        Ok(Response::new(ListPodSandboxMetricsResponse { pod_metrics }))
    }

    async fn stream_pod_sandbox_metrics(
        &self,
        _: Request<StreamPodSandboxMetricsRequest>,
    ) -> Answer<Self::StreamPodSandboxMetricsStream> {
        let metrics = self.stats.pod_metrics().await?;
        let message = |pod_sandbox_metrics| StreamPodSandboxMetricsResponse { pod_sandbox_metrics };
        Ok(Response::new(pieces(metrics, message)))
    }

    async fn runtime_config(&self, _: Request<RuntimeConfigRequest>) -> Answer<RuntimeConfigResponse> {
        Ok(Response::new(self.runtime.runtime_config()))
    }

    async fn update_pod_sandbox_resources(
        &self,
        request: Request<UpdatePodSandboxResourcesRequest>,
    ) -> Answer<UpdatePodSandboxResourcesResponse> {
        self.runtime.update_pod_resources(request.into_inner()).await?;
        Ok(Response::new(UpdatePodSandboxResourcesResponse {}))
    }
}

fn later(what: &str) -> Status {
    Error::unimplemented(what).into()
}
