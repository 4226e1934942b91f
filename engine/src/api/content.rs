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
    loop {
        let request = match requests.message().await {
            Ok(Some(request)) => request,
            Ok(None) => break session.end().await,
            Err(status) => {
                // The client has gone, or has sent what cannot be read, and then it has to hear of it: the end of the
                // stream without an error would say that all went well. The ingest is free by then.
                session.end().await;
                let _ = answers.send(Err(status)).await;
                break;
            }
        };
        let answer = session.step(request).await;
        let last = answer.is_err() || session.is_over();
        if answers.send(answer.map_err(Status::from)).await.is_err() || last {
            break session.end().await;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::pin::Pin;

    use api::content_server::ContentServer;
    use axum::body::{Body, HttpBody as _};
    use prost::Message as _;
    use tower::Service as _;

    use super::*;
    use crate::content::FOLDER;
    use crate::context::Namespace;
    use crate::metadata::Metadata;

    #[tokio::test]
    async fn a_request_that_cannot_be_read_ends_the_stream_with_an_error() {
        let dir = tempfile::tempdir().unwrap();
        let root = dir.path().to_owned();
        let content = tokio::task::spawn_blocking(move || {
            let metadata = Metadata::open(&root.join("metadata")).unwrap();
            Content::open(&root.join(FOLDER), metadata, crate::events::Exchange::default()).unwrap()
        });
        let content = content.await.unwrap();
        let begin = WriteContentRequest {
            action: api::WriteAction::Write.into(),
            r#ref: "ref".into(),
            data: b"part".to_vec().into(),
            ..WriteContentRequest::default()
        };
        let begin = begin.encode_to_vec();
        let mut bytes = vec![0];
        bytes.extend_from_slice(&u32::try_from(begin.len()).unwrap().to_be_bytes());
        bytes.extend_from_slice(&begin);
        // A message of nine bytes that is cut off after two.
        bytes.extend_from_slice(&[0, 0, 0, 0, 9, 8, 1]);
        let request = http::Request::post("/containerd.services.content.v1.Content/Write")
            .header("containerd-namespace", "a")
            .header("content-type", "application/grpc")
            .body(Body::from(bytes))
            .unwrap();
        let mut server = ContentServer::new(Service { content: content.clone() });
        let mut body = server.call(request).await.unwrap().into_body();
        let (mut answers, mut trailers) = (0, None);
        while let Some(frame) = std::future::poll_fn(|context| Pin::new(&mut body).poll_frame(context)).await
        {
            match frame.unwrap().into_trailers() {
                Ok(found) => trailers = Some(found),
                Err(_) => answers += 1,
            }
        }
        assert_eq!(answers, 1);
        assert_ne!(trailers.unwrap()["grpc-status"], "0");
        // What was written before is there, and another may go on with it at once.
        let context = RequestContext::internal(Namespace::new("a").unwrap());
        let writer = content.writer(&context, "ref".into(), 0, None).await.unwrap();
        assert_eq!(writer.digest(), oci::Digest::sha256_of(b"part"));
    }
}
