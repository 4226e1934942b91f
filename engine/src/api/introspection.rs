//! `containerd.services.introspection.v1.Introspection`

use proto::containerd::services::introspection::v1::{
    self as api, PluginInfoRequest, PluginInfoResponse, PluginsRequest, PluginsResponse, ServerResponse,
};
use tonic::{Request, Response, Status};

use crate::introspection::Introspection;

/// The service over what the engine knows of itself.
pub struct Service {
    /// The domain.
    pub introspection: Introspection,
}

#[tonic::async_trait]
impl api::introspection_server::Introspection for Service {
    async fn plugins(&self, request: Request<PluginsRequest>) -> Result<Response<PluginsResponse>, Status> {
        let plugins = self.introspection.plugins(&request.into_inner().filters)?;
        Ok(Response::new(PluginsResponse { plugins }))
    }

    async fn server(&self, _: Request<()>) -> Result<Response<ServerResponse>, Status> {
        Ok(Response::new(self.introspection.server()?))
    }

    async fn plugin_info(
        &self,
        request: Request<PluginInfoRequest>,
    ) -> Result<Response<PluginInfoResponse>, Status> {
        let request = request.into_inner();
        let plugin = self.introspection.plugin(&request.r#type, &request.id, request.options.is_some())?;
        Ok(Response::new(PluginInfoResponse { plugin: Some(plugin), extra: None }))
    }
}
