//! `gantry.images.v1.Images`

use std::time::Duration;

use proto::gantry::images::v1::{
    self as api, Compression, ConvertRequest, ConvertResponse, DiskUsageRequest, DiskUsageResponse,
    DropLayersRequest, DropLayersResponse, PruneRequest, PruneResponse, PrunedImage, UsageRequest,
    UsageResponse, VerifyRequest, VerifyResponse,
};
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::ReceiverStream;
use tonic::{Request, Response, Status};

use crate::context::RequestContext;
use crate::error::{Error, Result};
use crate::upkeep::{Conversion, Pruned, Unneeded, Upkeep, Wanted};

/// The service over the upkeep of images.
pub struct Service {
    /// The domain.
    pub upkeep: Upkeep,
}

type Stream<T> = std::pin::Pin<Box<dyn futures::Stream<Item = Result<T, Status>> + Send>>;

fn answers<T: Send + 'static>(answers: tokio::sync::mpsc::Receiver<Result<T>>) -> Response<Stream<T>> {
    Response::new(Box::pin(ReceiverStream::new(answers).map(|answer| answer.map_err(Status::from))))
}

#[tonic::async_trait]
impl api::images_server::Images for Service {
    type VerifyStream = Stream<VerifyResponse>;
    type ConvertStream = Stream<ConvertResponse>;

    async fn verify(&self, request: Request<VerifyRequest>) -> Result<Response<Self::VerifyStream>, Status> {
        let (context, VerifyRequest { names, quick, repair, from }) = RequestContext::split(request)?;
        Ok(answers(self.upkeep.verify(&context, Wanted { names, quick, repair, from })?))
    }

    async fn convert(
        &self,
        request: Request<ConvertRequest>,
    ) -> Result<Response<Self::ConvertStream>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let compression = Compression::try_from(request.compression).map_err(|_| {
            Error::invalid_argument(format!("compression {} is not known", request.compression))
        })?;
        let conversion = Conversion {
            source: request.source,
            target: request.target,
            platforms: request.platforms.into_iter().map(crate::transfer::platform).collect(),
            all_platforms: request.all_platforms,
            oci: request.oci,
            compression,
            level: request.level,
        };
        Ok(answers(self.upkeep.convert(&context, conversion)?))
    }

    async fn usage(&self, request: Request<UsageRequest>) -> Result<Response<UsageResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        Ok(Response::new(UsageResponse { images: self.upkeep.usage(&context, request.names).await? }))
    }

    async fn disk_usage(&self, _: Request<DiskUsageRequest>) -> Result<Response<DiskUsageResponse>, Status> {
        Ok(Response::new(self.upkeep.disk_usage().await?))
    }

    async fn prune(&self, request: Request<PruneRequest>) -> Result<Response<PruneResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let older_than = request.older_than.map(|age| {
            Duration::try_from(age).map_err(|_| Error::invalid_argument("older_than must not be negative"))
        });
        let which = Unneeded {
            filters: request.filters,
            older_than: older_than.transpose()?,
            larger_than: request.larger_than,
            keep_last: usize::try_from(request.keep_last).unwrap_or(usize::MAX),
            all: request.all,
            dry_run: request.dry_run,
        };
        let Pruned { images, freed } = self.upkeep.prune(&context, which).await?;
        let image = |image: proto::containerd::services::images::v1::Image| PrunedImage {
            name: image.name,
            digest: image.target.map(|target| target.digest).unwrap_or_default(),
        };
        Ok(Response::new(PruneResponse {
            images: images.into_iter().map(image).collect(),
            blobs: freed.blobs,
            content: freed.content,
            snapshots: freed.snapshots,
            unpacked: freed.unpacked,
        }))
    }

    async fn drop_layers(
        &self,
        request: Request<DropLayersRequest>,
    ) -> Result<Response<DropLayersResponse>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let dropped = self.upkeep.drop_layers(&context, &request.name).await?;
        Ok(Response::new(DropLayersResponse { blobs: dropped.blobs, content: dropped.content }))
    }
}
