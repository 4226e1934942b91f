//! `containerd.services.content.v1.Content`

use futures::stream::BoxStream;
use futures::{StreamExt as _, TryStreamExt as _};
use proto::containerd::services::content::v1::{
    self as api, AbortRequest, DeleteContentRequest, InfoRequest, InfoResponse, ListContentRequest,
    ListContentResponse, ListStatusesRequest, ListStatusesResponse, ReadContentRequest, ReadContentResponse,
    StatusRequest, StatusResponse, UpdateRequest, UpdateResponse, WriteContentRequest, WriteContentResponse,
};
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status, Streaming};

use super::{mask, required};
use crate::content::{Content, Session, parse_digest};
use crate::context::RequestContext;

/// Blobs in one message of List.
const PAGE: usize = 100;

/// The service over the domain's content.
pub struct Service {
    /// The domain.
    pub content: Content,
}

#[tonic::async_trait]
impl api::content_server::Content for Service {
    type ListStream = BoxStream<'static, Result<ListContentResponse, Status>>;
    type ReadStream = BoxStream<'static, Result<ReadContentResponse, Status>>;
    type WriteStream = ReceiverStream<Result<WriteContentResponse, Status>>;

    async fn info(&self, request: Request<InfoRequest>) -> Result<Response<InfoResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let info = self.content.info(&context, &parse_digest(&request.digest)?)?;
        Ok(Response::new(InfoResponse { info: Some(info) }))
    }

    async fn update(&self, request: Request<UpdateRequest>) -> Result<Response<UpdateResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let info = required(request.info, "info")?;
        let info = self.content.update(&context, info, mask(request.update_mask)).await?;
        Ok(Response::new(UpdateResponse { info: Some(info) }))
    }

    async fn list(&self, request: Request<ListContentRequest>) -> Result<Response<Self::ListStream>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let infos = self.content.list(&context, &request.filters)?;
        let pages = futures::stream::iter(infos).chunks(PAGE);
        Ok(Response::new(pages.map(|info| Ok(ListContentResponse { info })).boxed()))
    }

    async fn delete(&self, request: Request<DeleteContentRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        self.content.delete(&context, parse_digest(&request.digest)?).await?;
        Ok(Response::new(()))
    }

    async fn read(&self, request: Request<ReadContentRequest>) -> Result<Response<Self::ReadStream>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let digest = parse_digest(&request.digest)?;
        // Negative numbers mean the beginning, and all.
        let (offset, size) =
            (u64::try_from(request.offset).unwrap_or(0), u64::try_from(request.size).unwrap_or(0));
        let pieces = self.content.read(&context, digest, offset, size).await?;
        let pieces = pieces
            .map_ok(|(offset, data)| ReadContentResponse {
                offset: i64::try_from(offset).unwrap_or(i64::MAX),
                data,
            })
            .map_err(Status::from);
        Ok(Response::new(pieces.boxed()))
    }

    async fn status(&self, request: Request<StatusRequest>) -> Result<Response<StatusResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let status = self.content.status(&context, &request.r#ref).await?;
        Ok(Response::new(StatusResponse { status: Some(status) }))
    }

    async fn list_statuses(
        &self,
        request: Request<ListStatusesRequest>,
    ) -> Result<Response<ListStatusesResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let statuses = self.content.list_statuses(&context, &request.filters).await?;
        Ok(Response::new(ListStatusesResponse { statuses }))
    }

    async fn write(
        &self,
        request: Request<Streaming<WriteContentRequest>>,
    ) -> Result<Response<Self::WriteStream>, Status> {
        let context = RequestContext::from_headers(request.metadata())?;
        let session = Session::new(self.content.clone(), context);
        let (answers, stream) = mpsc::channel(1);
        // In a task of its own: a commit runs to its end even when the client has gone.
        tokio::spawn(write(session, request.into_inner(), answers));
        Ok(Response::new(ReceiverStream::new(stream)))
    }

    async fn abort(&self, request: Request<AbortRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        self.content.abort(&context, request.r#ref).await?;
        Ok(Response::new(()))
    }
}

async fn write(
    mut session: Session,
    mut requests: Streaming<WriteContentRequest>,
    answers: mpsc::Sender<Result<WriteContentResponse, Status>>,
) {
    // An error in place of a request: the client has gone, and nobody is left to be told.
    while let Ok(Some(request)) = requests.message().await {
        let answer = session.step(request).await;
        let last = answer.is_err() || session.is_over();
        if answers.send(answer.map_err(Status::from)).await.is_err() || last {
            break;
        }
    }
    session.end().await;
}
