//! `containerd.services.events.v1.Events`

use futures::stream::{self, BoxStream, StreamExt as _};
use proto::containerd::services::events::v1::{
    self as api, ForwardRequest, PublishRequest, SubscribeRequest,
};
use proto::containerd::types::Envelope;
use tonic::{Request, Response, Status};

use super::required;
use crate::context::RequestContext;
use crate::events::Exchange;
use crate::tasks::Tasks;

/// The service over the exchange; forwarded events pass the tasks, which learn of exits.
pub struct Service {
    /// The fan-out.
    pub events: Exchange,
    /// The domain's tasks.
    pub tasks: Tasks,
}

#[tonic::async_trait]
impl api::events_server::Events for Service {
    async fn publish(&self, request: Request<PublishRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        self.events.publish_any(context.namespace()?, request.topic, request.event).await?;
        Ok(Response::new(()))
    }

    async fn forward(&self, request: Request<ForwardRequest>) -> Result<Response<()>, Status> {
        let (_, request) = RequestContext::split(request)?;
        self.tasks.forward(required(request.envelope, "envelope")?).await?;
        Ok(Response::new(()))
    }

    type SubscribeStream = BoxStream<'static, Result<Envelope, Status>>;

    async fn subscribe(
        &self,
        request: Request<SubscribeRequest>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let (_, request) = RequestContext::split(request)?;
        let subscription = self.events.subscribe(&request.filters)?;
        let events = stream::unfold(subscription, |mut subscription| async move {
            let event = subscription.next().await?;
            Some((event.map(|event| (*event).clone()).map_err(Status::from), subscription))
        });
        Ok(Response::new(events.boxed()))
    }
}
