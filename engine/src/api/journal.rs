//! `gantry.events.v1.Events`

use futures::stream::{self, BoxStream, StreamExt as _};
use proto::gantry::events::v1::{
    self as api, Event, Gap, InfoRequest, InfoResponse, SubscribeRequest, SubscribeResponse,
    subscribe_response,
};
use tonic::{Request, Response, Status};

use crate::events::{Entry, Exchange, Range};

/// The service over the journal.
pub struct Service {
    /// The domain.
    pub events: Exchange,
}

impl From<Entry> for SubscribeResponse {
    fn from(entry: Entry) -> Self {
        let entry = match entry {
            Entry::Event(sequence, envelope) => {
                subscribe_response::Entry::Event(Event { sequence, envelope: Some(envelope) })
            }
            Entry::Gap(from, next) => subscribe_response::Entry::Gap(Gap { from, next }),
        };
        SubscribeResponse { entry: Some(entry) }
    }
}

#[tonic::async_trait]
impl api::events_server::Events for Service {
    type SubscribeStream = BoxStream<'static, Result<SubscribeResponse, Status>>;

    async fn subscribe(
        &self,
        request: Request<SubscribeRequest>,
    ) -> Result<Response<Self::SubscribeStream>, Status> {
        let request = request.into_inner();
        let replay = self.events.replay(request.from, &request.filters)?;
        let entries = stream::try_unfold(replay, |mut replay| async move {
            let entry = replay.next().await?;
            Ok(Some((entry.into(), replay)))
        });
        Ok(Response::new(entries.boxed()))
    }

    async fn info(&self, _: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let Range { first, next, bytes, retention } = self.events.range()?;
        Ok(Response::new(InfoResponse { first, next, bytes, retention_bytes: retention }))
    }
}
