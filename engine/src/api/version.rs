//! `containerd.services.version.v1.Version`

use proto::containerd::services::version::v1::{self as api, VersionResponse};
use tonic::{Request, Response, Status};

/// The service; it knows its answer from the build.
pub struct Service;

#[tonic::async_trait]
impl api::version_server::Version for Service {
    async fn version(&self, _: Request<()>) -> Result<Response<VersionResponse>, Status> {
        Ok(Response::new(VersionResponse {
            version: crate::VERSION.to_owned(),
            revision: crate::REVISION.to_owned(),
        }))
    }
}
