//! Images: names for content. A record is a name, labels and the descriptor of an index or a manifest.

use std::borrow::Cow;

use prost_types::Timestamp;
use proto::containerd::services::images::v1::{Image, ImageCreate, ImageDelete, ImageUpdate};
use proto::containerd::types::Descriptor;

use crate::context::RequestContext;
use crate::error::{Error, Result, outlive};
use crate::events::Exchange;
use crate::filters::{self, Filter};
use crate::labels::{self, Labels};
use crate::leases;
use crate::metadata::{Metadata, Read};

/// The images of all namespaces.
#[derive(Clone)]
pub struct Images {
    metadata: Metadata,
    events: Exchange,
}

impl Images {
    /// Images over this database, announcing changes on `events`.
    pub fn new(metadata: Metadata, events: Exchange) -> Self {
        Images { metadata, events }
    }

    /// One image; NotFound when there is none of this name.
    pub fn get(&self, context: &RequestContext, name: &str) -> Result<Image> {
        let namespace = context.namespace()?;
        self.metadata.view().get::<Image>(&[namespace.as_str(), name])?.ok_or_else(|| missing(name))
    }

    /// The images that pass the filters (`name`, `target.digest`, `target.mediatype`, `labels.KEY`).
    pub fn list(&self, context: &RequestContext, filters: &[String]) -> Result<Vec<Image>> {
        let namespace = context.namespace()?;
        let filter = Filter::parse_all(filters)?;
        let all = self.metadata.view().list::<Image>(&[namespace.as_str()]);
        Ok(all
            .into_iter()
            .map(|(_, image)| image)
            .filter(|i| filter.matches(|path| field(i, path)))
            .collect())
    }

    /// Makes an image; AlreadyExists when the name is taken. `epoch` stands for now where builds must be reproducible.
    pub async fn create(
        &self,
        context: &RequestContext,
        mut image: Image,
        epoch: Option<Timestamp>,
    ) -> Result<Image> {
        let namespace = context.namespace()?.clone();
        validate(&image)?;
        let now = epoch.unwrap_or_else(|| std::time::SystemTime::now().into());
        (image.created_at, image.updated_at) = (Some(now), Some(now));
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            let record = image.clone();
            let key = namespace.clone();
            this.metadata
                .commit(move |txn| {
                    let key = [key.as_str(), &record.name];
                    if txn.has::<Image>(&key)? {
                        return Err(Error::already_exists(format!("image {:?} exists already", record.name)));
                    }
                    join_lease(txn, &context, &record)?;
                    txn.put(&key, &record)
                })
                .await?;
            let event = ImageCreate { name: image.name.clone(), labels: image.labels.clone() };
            this.events.publish(&namespace, "/images/create", &event);
            Ok(image)
        })
        .await
    }

    /// Replaces what the mask names, or the whole record when it names nothing.
    pub async fn update(
        &self,
        context: &RequestContext,
        new: Image,
        mask: Vec<String>,
        epoch: Option<Timestamp>,
    ) -> Result<Image> {
        let namespace = context.namespace()?.clone();
        if new.name.is_empty() {
            return Err(Error::invalid_argument("the name of the image to update is missing"));
        }
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            let key = namespace.clone();
            let updated = this
                .metadata
                .commit(move |txn| {
                    let key = [key.as_str(), &new.name];
                    let mut image = txn.get::<Image>(&key)?.ok_or_else(|| missing(&new.name))?;
                    apply_update(&mut image, new.clone(), &mask)?;
                    validate(&image)?;
                    join_lease(txn, &context, &image)?;
                    image.updated_at = Some(epoch.unwrap_or_else(|| std::time::SystemTime::now().into()));
                    txn.put(&key, &image)?;
                    Ok(image)
                })
                .await?;
            let event = ImageUpdate { name: updated.name.clone(), labels: updated.labels.clone() };
            this.events.publish(&namespace, "/images/update", &event);
            Ok(updated)
        })
        .await
    }

    /// Deletes the name. With `target`, only while it still points there; NotFound otherwise.
    pub async fn delete(
        &self,
        context: &RequestContext,
        name: String,
        target: Option<Descriptor>,
    ) -> Result<()> {
        let namespace = context.namespace()?.clone();
        let this = self.clone();
        outlive(async move {
            let (key, image) = (namespace.clone(), name.clone());
            this.metadata
                .commit(move |txn| {
                    let key = [key.as_str(), &image];
                    let found = txn.get::<Image>(&key)?.ok_or_else(|| missing(&image))?;
                    let digest = found.target.map(|target| target.digest).unwrap_or_default();
                    if let Some(want) = target.map(|target| target.digest).filter(|want| !want.is_empty())
                        && want != digest
                    {
                        return Err(Error::not_found(format!(
                            "image {image:?} has the target {digest}, not {want}"
                        )));
                    }
                    txn.delete::<Image>(&key)?;
                    txn.release();
                    Ok(())
                })
                .await?;
            this.events.publish(&namespace, "/images/delete", &ImageDelete { name });
            Ok(())
        })
        .await
    }
}

fn missing(name: &str) -> Error {
    Error::not_found(format!("image {name:?} does not exist"))
}

/// An image joins its creator's lease only when it may be collected, which its expiry label says.
fn join_lease(txn: &mut crate::metadata::Transaction, context: &RequestContext, image: &Image) -> Result<()> {
    if image.labels.contains_key("containerd.io/gc.expire") {
        leases::join(txn, context, leases::IMAGES, &image.name)?;
    }
    Ok(())
}

fn field<'a>(image: &'a Image, path: &[&str]) -> Option<Cow<'a, str>> {
    let target = image.target.as_ref();
    match path {
        ["name"] => Some(image.name.as_str().into()),
        ["target", "digest"] => target.map(|target| target.digest.as_str().into()),
        ["target", "mediatype"] => target.map(|target| target.media_type.as_str().into()),
        ["labels", rest @ ..] => filters::label(&image.labels, rest),
        ["annotations", rest @ ..] => target.and_then(|target| filters::label(&target.annotations, rest)),
        _ => None,
    }
}

fn validate(image: &Image) -> Result<()> {
    if image.name.is_empty() {
        return Err(Error::invalid_argument("an image's name must not be empty"));
    }
    labels::validate_all(&image.labels)?;
    let problem =
        |what: String| Err(Error::invalid_argument(format!("the target of image {:?} {what}", image.name)));
    let Some(target) = &image.target else { return problem("is missing".into()) };
    if let Err(error) = target.digest.parse::<oci::Digest>() {
        return problem(format!("has the digest {:?}, which is not valid: {error}", target.digest));
    }
    if target.size <= 0 {
        return problem(format!("has the size {}; it must be greater than zero", target.size));
    }
    if target.media_type.is_empty() {
        return problem("has no media type".into());
    }
    Ok(())
}

fn apply_update(image: &mut Image, new: Image, mask: &[String]) -> Result<()> {
    if mask.is_empty() {
        image.target = new.target;
        labels::update_map(&mut image.labels, &new.labels, None);
        return Ok(());
    }
    for path in mask {
        match labels::split_path(path) {
            ("labels", key) => labels::update_map(&mut image.labels, &new.labels, key),
            ("target", None) => image.target.clone_from(&new.target),
            ("annotations", key) => {
                let none = Labels::new();
                let from = new.target.as_ref().map_or(&none, |target| &target.annotations);
                if let Some(target) = &mut image.target {
                    labels::update_map(&mut target.annotations, from, key);
                }
            }
            _ => {
                return Err(Error::invalid_argument(format!(
                    "field {path:?} of image {:?} cannot be updated; these can: labels, target, annotations",
                    image.name
                )));
            }
        }
    }
    Ok(())
}
