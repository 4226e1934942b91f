//! `containerd.services.images.v1.Images`

use proto::containerd::services::images::v1::{
    self as api, CreateImageRequest, CreateImageResponse, DeleteImageRequest, GetImageRequest,
    GetImageResponse, ListImagesRequest, ListImagesResponse, UpdateImageRequest, UpdateImageResponse,
};
use tonic::{Request, Response, Status};

use super::{mask, required};
use crate::context::RequestContext;
use crate::gc::Gc;
use crate::images::Images;

/// The service over the domain's images.
pub struct Service {
    /// The domain.
    pub images: Images,
    /// What a synchronous deletion waits for.
    pub gc: Gc,
}

#[tonic::async_trait]
impl api::images_server::Images for Service {
    async fn get(&self, request: Request<GetImageRequest>) -> Result<Response<GetImageResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let image = self.images.get(&context, &request.name)?;
        Ok(Response::new(GetImageResponse { image: Some(image) }))
    }

    async fn list(
        &self,
        request: Request<ListImagesRequest>,
    ) -> Result<Response<ListImagesResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let images = self.images.list(&context, &request.filters)?;
        Ok(Response::new(ListImagesResponse { images }))
    }

    async fn create(
        &self,
        request: Request<CreateImageRequest>,
    ) -> Result<Response<CreateImageResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let image = required(request.image, "image")?;
        let image = self.images.create(&context, image, request.source_date_epoch).await?;
        Ok(Response::new(CreateImageResponse { image: Some(image) }))
    }

    async fn update(
        &self,
        request: Request<UpdateImageRequest>,
    ) -> Result<Response<UpdateImageResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let image = required(request.image, "image")?;
        let image =
            self.images.update(&context, image, mask(request.update_mask), request.source_date_epoch).await?;
        Ok(Response::new(UpdateImageResponse { image: Some(image) }))
    }

    async fn delete(&self, request: Request<DeleteImageRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        self.images.delete(&context, request.name, request.target).await?;
        if request.sync {
            self.gc.collect().await?;
        }
        Ok(Response::new(()))
    }
}
