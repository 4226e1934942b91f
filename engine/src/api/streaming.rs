//! `containerd.services.streaming.v1.Streaming`

use std::time::Duration;

use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use prost_types::Any;
use proto::any;
use proto::containerd::services::streaming::v1::{self as api, StreamInit};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use crate::context::RequestContext;
use crate::error::Error;
use crate::streaming::Streams;

/// How long a client may take to say which stream it opens.
const INIT: Duration = Duration::from_secs(10);

/// The service over the domain's streams.
pub struct Service {
    /// The domain.
    pub streams: Streams,
}

#[tonic::async_trait]
impl api::streaming_server::Streaming for Service {
    type StreamStream = BoxStream<'static, Result<Any, Status>>;

    async fn stream(&self, request: Request<Streaming<Any>>) -> Result<Response<Self::StreamStream>, Status> {
        let context = RequestContext::from_headers(request.metadata())?;
        let mut requests = request.into_inner();
        let first = tokio::time::timeout(INIT, requests.message()).await.map_err(|_| {
            Error::deadline_exceeded(format!("a stream begins with a StreamInit; none came within {INIT:?}"))
        })??;
        let init = first.ok_or_else(|| {
            Error::invalid_argument("a stream begins with a StreamInit; the client has closed it at once")
        })?;
        let init: StreamInit = any::unpack(&init).map_err(|error| {
            Error::invalid_argument(format!("a stream begins with a StreamInit: {error}"))
        })?;
        let client = self.streams.open(&context, init.id)?;
        let (answers, stream) = mpsc::channel(1);
        // Says that the stream is there: the client may name it from now on.
        let _ = answers.try_send(Ok(any::pack(&())));
        let requests = requests.map_err(|status| Error::cancelled(status.message()));
        tokio::spawn(client.serve(requests, answers));
        let answers = ReceiverStream::new(stream).map(|answer| answer.map_err(Status::from));
        Ok(Response::new(answers.boxed()))
    }
}
