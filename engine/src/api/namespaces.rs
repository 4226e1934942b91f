//! `containerd.services.namespaces.v1.Namespaces`

use proto::containerd::services::namespaces::v1::{
    self as api, CreateNamespaceRequest, CreateNamespaceResponse, DeleteNamespaceRequest,
    GetNamespaceRequest, GetNamespaceResponse, ListNamespacesRequest, ListNamespacesResponse, Namespace,
    UpdateNamespaceRequest, UpdateNamespaceResponse,
};
use tonic::{Request, Response, Status};

use super::{mask, required};
use crate::namespaces::{NamespaceInfo, Namespaces};

/// The service over the domain's namespaces.
pub struct Service {
    /// The domain.
    pub namespaces: Namespaces,
}

impl From<NamespaceInfo> for Namespace {
    fn from(info: NamespaceInfo) -> Self {
        Namespace { name: info.name, labels: info.labels }
    }
}

#[tonic::async_trait]
impl api::namespaces_server::Namespaces for Service {
    async fn get(
        &self,
        request: Request<GetNamespaceRequest>,
    ) -> Result<Response<GetNamespaceResponse>, Status> {
        let namespace = self.namespaces.get(&request.into_inner().name)?;
        Ok(Response::new(GetNamespaceResponse { namespace: Some(namespace.into()) }))
    }

    async fn list(
        &self,
        _: Request<ListNamespacesRequest>,
    ) -> Result<Response<ListNamespacesResponse>, Status> {
        let namespaces = self.namespaces.list().into_iter().map(Into::into).collect();
        Ok(Response::new(ListNamespacesResponse { namespaces }))
    }

    async fn create(
        &self,
        request: Request<CreateNamespaceRequest>,
    ) -> Result<Response<CreateNamespaceResponse>, Status> {
        let new = required(request.into_inner().namespace, "namespace")?;
        let namespace = self.namespaces.create(&new.name, new.labels).await?;
        Ok(Response::new(CreateNamespaceResponse { namespace: Some(namespace.into()) }))
    }

    async fn update(
        &self,
        request: Request<UpdateNamespaceRequest>,
    ) -> Result<Response<UpdateNamespaceResponse>, Status> {
        let request = request.into_inner();
        let new = required(request.namespace, "namespace")?;
        let namespace = self.namespaces.update(&new.name, new.labels, mask(request.update_mask)).await?;
        Ok(Response::new(UpdateNamespaceResponse { namespace: Some(namespace.into()) }))
    }

    async fn delete(&self, request: Request<DeleteNamespaceRequest>) -> Result<Response<()>, Status> {
        self.namespaces.delete(&request.into_inner().name).await?;
        Ok(Response::new(()))
    }
}
