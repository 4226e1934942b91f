//! Leases: what they hold is not collected, whoever else has forgotten it.
//!
//! Invariant: a resource of a lease is recorded in the same commit as the change that makes or uses the resource.

use proto::containerd::services::leases::v1::{Lease, Resource};

use crate::context::{Namespace, RequestContext};
use crate::error::{Error, Result};
use crate::filters::{self, Filter};
use crate::labels::{self, Labels};
use crate::metadata::leases::LeaseResource;
use crate::metadata::{Metadata, Read, Transaction};
use crate::random::random;

/// The type of resource that a blob is; its id is the digest.
pub const CONTENT: &str = "content";
/// The type of resource that an ingest is; its id is the ref.
pub const INGESTS: &str = "ingests";
/// The type of resource that an image is; its id is the name.
pub const IMAGES: &str = "images";
/// The type of resource that a mount of the engine's is; its id is the name.
pub const MOUNTS: &str = "mounts";
/// The type of resource that a snapshot is, followed by the snapshotter's name; its id is the key.
pub const SNAPSHOTS: &str = "snapshots/";

/// The leases of all namespaces.
#[derive(Clone)]
pub struct Leases {
    metadata: Metadata,
}

impl Leases {
    /// Leases over this database.
    pub fn new(metadata: Metadata) -> Self {
        Leases { metadata }
    }

    /// Makes a lease; without an id it gets one. AlreadyExists when the id is taken.
    pub async fn create(&self, context: &RequestContext, id: String, labels: Labels) -> Result<Lease> {
        let namespace = context.namespace()?.clone();
        labels::validate_all(&labels)?;
        let id = if id.is_empty() { random_id()? } else { id };
        self.metadata
            .commit(move |txn| {
                let key = [namespace.as_str(), &id];
                if txn.has::<Lease>(&key)? {
                    return Err(Error::already_exists(format!("lease {id:?} exists already")));
                }
                let lease =
                    Lease { id: id.clone(), created_at: Some(std::time::SystemTime::now().into()), labels };
                txn.put(&key, &lease)?;
                Ok(lease)
            })
            .await
    }

    /// Deletes a lease and its hold on everything; NotFound when there is none.
    pub async fn delete(&self, context: &RequestContext, id: String) -> Result<()> {
        let namespace = context.namespace()?.clone();
        self.metadata
            .commit(move |txn| {
                if !txn.delete::<Lease>(&[namespace.as_str(), &id])? {
                    return Err(missing(&id));
                }
                txn.release();
                txn.delete_all::<LeaseResource>(&[namespace.as_str(), &id])
            })
            .await
    }

    /// The leases that pass the filters (`id`, `labels.KEY`).
    pub fn list(&self, context: &RequestContext, filters: &[String]) -> Result<Vec<Lease>> {
        let namespace = context.namespace()?;
        let filter = Filter::parse_all(filters)?;
        let leases = self.metadata.view().list::<Lease>(&[namespace.as_str()]);
        Ok(leases
            .into_iter()
            .map(|(_, lease)| lease)
            .filter(|lease| {
                filter.matches(|path| match path {
                    ["id"] => Some(lease.id.as_str().into()),
                    ["labels", rest @ ..] => filters::label(&lease.labels, rest),
                    _ => None,
                })
            })
            .collect())
    }

    /// Puts a resource under a lease. It need not exist yet.
    pub async fn add_resource(&self, context: &RequestContext, id: String, resource: Resource) -> Result<()> {
        let namespace = context.namespace()?.clone();
        self.metadata
            .commit(move |txn| add_resource(txn, &namespace, &id, &resource.r#type, &resource.id))
            .await
    }

    /// Takes a resource from a lease; a resource that it does not hold is no error.
    pub async fn delete_resource(
        &self,
        context: &RequestContext,
        id: String,
        resource: Resource,
    ) -> Result<()> {
        let namespace = context.namespace()?.clone();
        validate_type(&resource.r#type)?;
        self.metadata
            .commit(move |txn| {
                if !txn.has::<Lease>(&[namespace.as_str(), &id])? {
                    return Err(missing(&id));
                }
                txn.delete::<LeaseResource>(&[namespace.as_str(), &id, &resource.r#type, &resource.id])?;
                txn.release();
                Ok(())
            })
            .await
    }

    /// What a lease holds.
    pub fn list_resources(&self, context: &RequestContext, id: &str) -> Result<Vec<Resource>> {
        let namespace = context.namespace()?;
        let view = self.metadata.view();
        if !view.has::<Lease>(&[namespace.as_str(), id])? {
            return Err(missing(id));
        }
        Ok(view
            .list::<LeaseResource>(&[namespace.as_str(), id])
            .into_iter()
            .filter_map(|(parts, _)| match <[String; 2]>::try_from(parts) {
                Ok([r#type, id]) => Some(Resource { id, r#type }),
                Err(_) => None,
            })
            .collect())
    }
}

/// Within a commit: puts a resource under a lease; NotFound when there is no such lease, InvalidArgument for a type
/// that leases do not know.
pub fn add_resource(
    txn: &mut Transaction,
    namespace: &Namespace,
    lease: &str,
    kind: &str,
    id: &str,
) -> Result<()> {
    validate_type(kind)?;
    if !txn.has::<Lease>(&[namespace.as_str(), lease])? {
        return Err(missing(lease));
    }
    if id.is_empty() {
        return Err(Error::invalid_argument(format!("a resource of type {kind:?} needs an id")));
    }
    txn.put(&[namespace.as_str(), lease, kind, id], &LeaseResource {})
}

/// Within a commit: the same for the lease of a request, if it has one.
pub fn join(txn: &mut Transaction, context: &RequestContext, kind: &str, id: &str) -> Result<()> {
    match context.lease() {
        Some(lease) => add_resource(txn, context.namespace()?, lease, kind, id),
        None => Ok(()),
    }
}

fn validate_type(kind: &str) -> Result<()> {
    match kind {
        CONTENT | INGESTS | IMAGES | MOUNTS => Ok(()),
        _ if kind.strip_prefix(SNAPSHOTS).is_some_and(|name| !name.is_empty()) => Ok(()),
        _ => Err(Error::invalid_argument(format!(
            "lease resource type {kind:?} is not known: use content, ingests, images, mounts or snapshots/NAME"
        ))),
    }
}

fn missing(id: &str) -> Error {
    Error::not_found(format!("lease {id:?} does not exist"))
}

/// An id that is unique and sorts by time, in the shape containerd's clients make: seconds and randomness.
fn random_id() -> Result<String> {
    let random = random::<6>()?;
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap_or_default();
    Ok(format!("{}-{}", now.as_nanos(), hex::encode(random)))
}
