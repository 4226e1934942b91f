//! `containerd.services.transfer.v1.Transfer`

use prost_types::Any;
use proto::any::{self, UnpackError};
use proto::containerd::services::transfer::v1::{self as api, TransferRequest};
use proto::containerd::types::transfer::{ImageExportStream, ImageImportStream, ImageStore, OciRegistry};
use tonic::{Request, Response, Status};

use super::required;
use crate::context::RequestContext;
use crate::error::{Error, Result};
use crate::transfer::{Place, Transfers};

/// The service over the domain's transfers.
pub struct Service {
    /// The domain.
    pub transfers: Transfers,
}

#[tonic::async_trait]
impl api::transfer_server::Transfer for Service {
    async fn transfer(&self, request: Request<TransferRequest>) -> Result<Response<()>, Status> {
        let (context, request) = RequestContext::split(request)?;
        let source = place(&required(request.source, "source")?)?;
        let destination = place(&required(request.destination, "destination")?)?;
        let progress = request.options.unwrap_or_default().progress_stream;
        self.transfers.transfer(&context, source, destination, &progress).await?;
        Ok(Response::new(()))
    }
}

fn place(value: &Any) -> Result<Place> {
    let malformed = |error: UnpackError| Error::invalid_argument(error.to_string());
    if any::is::<ImageStore>(value) {
        any::unpack(value).map(Place::Store).map_err(malformed)
    } else if any::is::<ImageImportStream>(value) {
        any::unpack(value).map(Place::Import).map_err(malformed)
    } else if any::is::<ImageExportStream>(value) {
        any::unpack(value).map(Place::Export).map_err(malformed)
    } else if any::is::<OciRegistry>(value) {
        any::unpack(value).map(Place::Registry).map_err(malformed)
    } else {
        Ok(Place::Other(any::name(value).to_owned()))
    }
}
