//! Containers: the records that say what a task will be made of. Runtime state is the task's, not theirs.

use std::borrow::Cow;

use proto::containerd::events::{ContainerCreate, ContainerDelete, ContainerUpdate, container_create};
use proto::containerd::services::containers::v1::Container;

use crate::context::{RequestContext, validate_identifier};
use crate::error::{Error, Result, outlive};
use crate::events::Exchange;
use crate::filters::{self, Filter};
use crate::labels;
use crate::metadata::{Metadata, Read};

/// What an update without a mask replaces.
const UPDATABLE: [&str; 5] = ["labels", "spec", "extensions", "image", "snapshotkey"];

/// The containers of all namespaces.
#[derive(Clone)]
pub struct Containers {
    metadata: Metadata,
    events: Exchange,
}

impl Containers {
    /// Containers over this database, announcing changes on `events`.
    pub fn new(metadata: Metadata, events: Exchange) -> Self {
        Containers { metadata, events }
    }

    /// One container; NotFound when there is none of this id.
    pub fn get(&self, context: &RequestContext, id: &str) -> Result<Container> {
        let namespace = context.namespace()?;
        self.metadata.view().get::<Container>(&[namespace.as_str(), id])?.ok_or_else(|| missing(id))
    }

    /// The containers that pass the filters (`id`, `image`, `runtime.name`, `labels.KEY`).
    pub fn list(&self, context: &RequestContext, filters: &[String]) -> Result<Vec<Container>> {
        let namespace = context.namespace()?;
        let filter = Filter::parse_all(filters)?;
        let all = self.metadata.view().list::<Container>(&[namespace.as_str()]);
        Ok(all
            .into_iter()
            .map(|(_, container)| container)
            .filter(|c| filter.matches(|path| field(c, path)))
            .collect())
    }

    /// Makes a container; AlreadyExists when the id is taken. The times in `container` are ignored.
    pub async fn create(&self, context: &RequestContext, mut container: Container) -> Result<Container> {
        let namespace = context.namespace()?.clone();
        validate(&container).map_err(|error| error.context("create container"))?;
        let now = std::time::SystemTime::now().into();
        (container.created_at, container.updated_at) = (Some(now), Some(now));
        let this = self.clone();
        outlive(async move {
            let record = container.clone();
            let key = namespace.clone();
            this.metadata
                .commit(move |txn| {
                    let key = [key.as_str(), &record.id];
                    if txn.has::<Container>(&key)? {
                        return Err(Error::already_exists(format!(
                            "container {:?} exists already",
                            record.id
                        )));
                    }
                    txn.put(&key, &record)
                })
                .await?;
            let event = ContainerCreate {
                id: container.id.clone(),
                image: container.image.clone(),
                runtime: container.runtime.as_ref().map(|runtime| container_create::Runtime {
                    name: runtime.name.clone(),
                    options: runtime.options.clone(),
                }),
            };
            this.events.publish(&namespace, "/containers/create", &event);
            Ok(container)
        })
        .await
    }

    /// Replaces what the mask names, or all that may change when it names nothing.
    pub async fn update(
        &self,
        context: &RequestContext,
        new: Container,
        mask: Vec<String>,
    ) -> Result<Container> {
        let namespace = context.namespace()?.clone();
        if new.id.is_empty() {
            return Err(Error::invalid_argument("the id of the container to update is missing"));
        }
        let this = self.clone();
        outlive(async move {
            let key = namespace.clone();
            let updated = this
                .metadata
                .commit(move |txn| {
                    let key = [key.as_str(), &new.id];
                    let mut container = txn.get::<Container>(&key)?.ok_or_else(|| missing(&new.id))?;
                    apply_update(&mut container, &new, &mask)?;
                    validate(&container).map_err(|error| error.context("update container"))?;
                    container.updated_at = Some(std::time::SystemTime::now().into());
                    txn.put(&key, &container)?;
                    Ok(container)
                })
                .await?;
            let event = ContainerUpdate {
                id: updated.id.clone(),
                image: updated.image.clone(),
                labels: updated.labels.clone(),
                snapshot_key: updated.snapshot_key.clone(),
            };
            this.events.publish(&namespace, "/containers/update", &event);
            Ok(updated)
        })
        .await
    }

    /// Deletes the record; NotFound when there is none. Its task, if any, is not touched.
    pub async fn delete(&self, context: &RequestContext, id: String) -> Result<()> {
        let namespace = context.namespace()?.clone();
        let this = self.clone();
        outlive(async move {
            let (key, name) = (namespace.clone(), id.clone());
            this.metadata
                .commit(move |txn| {
                    if !txn.delete::<Container>(&[key.as_str(), &name])? {
                        return Err(missing(&name));
                    }
                    txn.release();
                    Ok(())
                })
                .await?;
            this.events.publish(&namespace, "/containers/delete", &ContainerDelete { id });
            Ok(())
        })
        .await
    }
}

fn missing(id: &str) -> Error {
    Error::not_found(format!("container {id:?} does not exist"))
}

fn field<'a>(container: &'a Container, path: &[&str]) -> Option<Cow<'a, str>> {
    match path {
        ["id"] => Some(container.id.as_str().into()),
        ["image"] => Some(container.image.as_str()).filter(|image| !image.is_empty()).map(Into::into),
        ["runtime", "name"] => container.runtime.as_ref().map(|runtime| runtime.name.as_str().into()),
        ["labels", rest @ ..] => filters::label(&container.labels, rest),
        _ => None,
    }
}

fn validate(container: &Container) -> Result<()> {
    validate_identifier("container id", &container.id)?;
    labels::validate_all(&container.labels)?;
    if container.extensions.keys().any(String::is_empty) {
        return Err(Error::invalid_argument("the key of an extension must not be empty"));
    }
    if container.runtime.as_ref().is_none_or(|runtime| runtime.name.is_empty()) {
        return Err(Error::invalid_argument(format!(
            "container {:?} names no runtime; give one, e.g. io.containerd.runc.v2",
            container.id
        )));
    }
    if container.spec.is_none() {
        return Err(Error::invalid_argument(format!("container {:?} has no OCI runtime spec", container.id)));
    }
    if !container.snapshot_key.is_empty() && container.snapshotter.is_empty() {
        return Err(Error::invalid_argument(format!(
            "container {:?} names the snapshot {:?} and no snapshotter",
            container.id, container.snapshot_key
        )));
    }
    Ok(())
}

fn apply_update(container: &mut Container, new: &Container, mask: &[String]) -> Result<()> {
    let whole = UPDATABLE.map(String::from);
    let mask = if mask.is_empty() {
        for (what, old, new) in [
            ("snapshotter", container.snapshotter.as_str(), new.snapshotter.as_str()),
            (
                "runtime name",
                container.runtime.as_ref().map_or("", |runtime| runtime.name.as_str()),
                new.runtime.as_ref().map_or("", |runtime| runtime.name.as_str()),
            ),
        ] {
            if old != new {
                return Err(Error::invalid_argument(format!(
                    "the {what} of container {:?} cannot change (from {old:?} to {new:?})",
                    container.id
                )));
            }
        }
        &whole[..]
    } else {
        mask
    };
    for path in mask {
        match labels::split_path(path) {
            ("labels", key) => labels::update_map(&mut container.labels, &new.labels, key),
            ("extensions", None) => container.extensions = new.extensions.clone(),
            ("extensions", Some(key)) => {
                match new.extensions.get(key) {
                    Some(value) => container.extensions.insert(key.to_owned(), value.clone()),
                    None => container.extensions.remove(key),
                };
            }
            ("spec", None) => container.spec = new.spec.clone(),
            ("image", None) => container.image.clone_from(&new.image),
            ("snapshotkey", None) => container.snapshot_key.clone_from(&new.snapshot_key),
            _ => {
                return Err(Error::invalid_argument(format!(
                    "field {path:?} of container {:?} cannot be updated; these can: {}",
                    container.id,
                    UPDATABLE.join(", ")
                )));
            }
        }
    }
    Ok(())
}
