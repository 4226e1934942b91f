//! What an image is made of, as its documents say: from its target to its layers.
//!
//! Invariant: a document is read with a limit, and believed only if its bytes have its digest.

use oci::Digest;
use oci::image::{
    CONFIG_LIMIT, Descriptor, ImageConfig, Index, Kind, MANIFEST_LIMIT, Manifest, kind_of, media_type,
};
use proto::containerd::services::images::v1::Image;
use proto::containerd::types;

use crate::content::{Content, parse_digest};
use crate::context::RequestContext;
use crate::error::{Error, Result, blocking};

/// How deep indexes may be nested in one another.
pub(super) const DEPTH: usize = 4;

/// An index or a manifest.
pub(super) enum Document {
    Index(Index),
    Manifest(Box<Manifest>),
}

impl Document {
    /// Reads one; what is wrong with it is told in words.
    pub(super) fn parse(bytes: &[u8]) -> Result<Document, String> {
        let wrong = |error: oci::image::ImageError| error.to_string();
        Ok(match kind_of(bytes).map_err(wrong)? {
            Kind::Index => Document::Index(Index::parse(bytes).map_err(wrong)?),
            Kind::Manifest => Document::Manifest(Box::new(Manifest::parse(bytes).map_err(wrong)?)),
        })
    }
}

/// The most bytes of a document of this type.
pub(super) fn limit(kind: &str) -> u64 {
    if media_type::is_config(kind) { CONFIG_LIMIT } else { MANIFEST_LIMIT }
}

/// A whole blob of at most `limit` bytes. NotFound when there is none, DataLoss when its bytes have another digest.
pub(super) async fn read(
    content: &Content,
    context: &RequestContext,
    digest: &Digest,
    limit: u64,
) -> Result<Vec<u8>> {
    let (content, context, digest) = (content.clone(), context.clone(), digest.clone());
    blocking(move || content.read_document(&context, &digest, limit)).await
}

/// The config of a manifest, where it is an image's.
pub(super) async fn config(
    content: &Content,
    context: &RequestContext,
    manifest: &Manifest,
) -> Result<Option<ImageConfig>> {
    if !media_type::is_config(&manifest.config.media_type) {
        return Ok(None);
    }
    let bytes = read(content, context, &manifest.config.digest, CONFIG_LIMIT).await?;
    let wrong = |error| Error::invalid_argument(format!("config {}: {error}", manifest.config.digest));
    ImageConfig::parse(&bytes).map(Some).map_err(wrong)
}

/// The manifests of an image that are there and can be read, each with its descriptor.
pub(super) async fn manifests(
    content: &Content,
    context: &RequestContext,
    target: Descriptor,
) -> Result<Vec<(Descriptor, Manifest)>> {
    let mut found = Vec::new();
    let mut todo = vec![(target, 0)];
    while let Some((descriptor, depth)) = todo.pop() {
        if content.info(context, &descriptor.digest).is_err() {
            continue;
        }
        let bytes = read(content, context, &descriptor.digest, MANIFEST_LIMIT).await?;
        let wrong = |what| Error::invalid_argument(format!("{}: {what}", descriptor.digest));
        match Document::parse(&bytes).map_err(wrong)? {
            Document::Manifest(manifest) => found.push((descriptor, *manifest)),
            Document::Index(_) if depth == DEPTH => {
                return Err(wrong(format!("indexes are nested deeper than {DEPTH}")));
            }
            Document::Index(index) => {
                todo.extend(index.manifests.into_iter().map(|entry| (entry, depth + 1)));
            }
        }
    }
    Ok(found)
}

/// What an image's name points at.
pub(super) fn target(image: &Image) -> Result<Descriptor> {
    let target = image.target.clone().unwrap_or_default();
    Ok(Descriptor {
        annotations: target.annotations,
        ..Descriptor::new(
            &target.media_type,
            parse_digest(&target.digest)?,
            u64::try_from(target.size).unwrap_or(0),
        )
    })
}

/// A descriptor as records and messages have it.
pub(super) fn wire(descriptor: &Descriptor) -> types::Descriptor {
    types::Descriptor {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.to_string(),
        size: i64::try_from(descriptor.size).unwrap_or(i64::MAX),
        annotations: descriptor.annotations.clone(),
    }
}
