//! `runtime.v1.ImageService`

use futures::stream::BoxStream;
use proto::runtime::v1::{
    self as api, ImageFsInfoRequest, ImageFsInfoResponse, ImageStatusRequest, ImageStatusResponse,
    ListImagesRequest, ListImagesResponse, PullImageRequest, PullImageResponse, RemoveImageRequest,
    RemoveImageResponse, StreamImagesRequest, StreamImagesResponse,
};
use tonic::{Request, Response, Status};

use crate::cri::images::Images;

/// Images in one message of a stream.
const PIECE: usize = 256;

/// The service over the kubelet's images.
pub struct Service {
    /// The domain.
    pub images: Images,
}

#[tonic::async_trait]
impl api::image_service_server::ImageService for Service {
    type StreamImagesStream = BoxStream<'static, Result<StreamImagesResponse, Status>>;

    async fn list_images(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let images = self.images.list(request.into_inner().filter).await?;
        Ok(Response::new(ListImagesResponse { images }))
    }

    async fn stream_images(
        &self,
        request: Request<StreamImagesRequest>,
    ) -> Result<Response<Self::StreamImagesStream>, Status> {
        let images = self.images.list(request.into_inner().filter).await?;
        let pieces: Vec<_> =
            images.chunks(PIECE).map(|images| Ok(StreamImagesResponse { images: images.to_vec() })).collect();
        Ok(Response::new(Box::pin(futures::stream::iter(pieces))))
    }

    async fn image_status(
        &self,
        request: Request<ImageStatusRequest>,
    ) -> Result<Response<ImageStatusResponse>, Status> {
        let request = request.into_inner();
        Ok(Response::new(self.images.status(request.image, request.verbose).await?))
    }

    async fn pull_image(
        &self,
        request: Request<PullImageRequest>,
    ) -> Result<Response<PullImageResponse>, Status> {
        let request = request.into_inner();
        let image_ref =
            self.images.pull(request.image, request.auth, request.sandbox_config.as_ref()).await?;
        Ok(Response::new(PullImageResponse { image_ref }))
    }

    async fn remove_image(
        &self,
        request: Request<RemoveImageRequest>,
    ) -> Result<Response<RemoveImageResponse>, Status> {
        self.images.remove(request.into_inner().image).await?;
        Ok(Response::new(RemoveImageResponse {}))
    }

    async fn image_fs_info(
        &self,
        _: Request<ImageFsInfoRequest>,
    ) -> Result<Response<ImageFsInfoResponse>, Status> {
        Ok(Response::new(self.images.usage().await?))
    }
}
