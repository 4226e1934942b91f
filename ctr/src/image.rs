//! From an image's name to what it is made of: target, manifest for a platform, config, layers.

use std::collections::BTreeSet;

use anyhow::{Context, bail};
use oci::image::{
    CONFIG_LIMIT, Descriptor, ImageConfig, Index, Kind, MANIFEST_LIMIT, Manifest, kind_of, media_type,
};
use oci::platform::Matcher;
use oci::{Digest, Platform, Reference};
use proto::containerd::services::images::v1::{GetImageRequest, Image, ListImagesRequest};
use tonic::Code;

use crate::client::{Client, Failure, Tried};
use crate::content;

/// How deep indexes may be nested in one another.
const DEPTH_LIMIT: usize = 4;

/// One image for one platform.
pub(crate) struct Resolved {
    pub(crate) manifest: Manifest,
    pub(crate) config: ImageConfig,
}

impl Resolved {
    /// Names of the committed snapshots of its layers, base first.
    pub(crate) fn chain_ids(&self) -> anyhow::Result<Vec<Digest>> {
        Ok(oci::image::chain_ids(self.config.diff_ids_for(&self.manifest)?))
    }
}

/// The record of an image by name.
pub(crate) async fn get(client: &Client, name: &str) -> anyhow::Result<Image> {
    let what = || format!("find image {name:?} in namespace {}", client.namespace());
    let request = |name: &str| GetImageRequest { name: name.to_owned() };
    let status = match client.images().get(request(name)).await {
        Ok(response) => {
            let found = response.into_inner().image;
            return found.with_context(|| format!("the engine's answer about image {name:?} is empty"));
        }
        Err(status) => status,
    };
    if status.code() != Code::NotFound {
        return Err(Failure::new(what(), status).into());
    }
    let full = Reference::parse_normalized(name).map(|name| name.with_default_tag().to_string());
    let full = full.ok().filter(|full| full != name);
    let remedy = match full {
        Some(full) if client.images().get(request(&full)).await.is_ok() => {
            format!("there is {full}; name it in full")
        }
        full => format!(
            "get it with `ctr images pull {}`; `ctr images ls` lists what is there",
            full.as_deref().unwrap_or(name)
        ),
    };
    Err(Failure::new(what(), status).with_remedy(remedy).into())
}

/// The records of all images that match a filter.
pub(crate) async fn list(client: &Client, filters: Vec<String>) -> anyhow::Result<Vec<Image>> {
    Ok(client.images().list(ListImagesRequest { filters }).await.tried(|| "list images")?.images)
}

/// What an image record points at.
pub(crate) fn target(image: &Image) -> anyhow::Result<Descriptor> {
    let target = image.target.clone().unwrap_or_default();
    descriptor(&target).with_context(|| format!("image {} has no usable target", image.name))
}

/// A descriptor that the API gave.
pub(crate) fn descriptor(wire: &proto::containerd::types::Descriptor) -> anyhow::Result<Descriptor> {
    let size = u64::try_from(wire.size).unwrap_or(0);
    Ok(Descriptor {
        annotations: wire.annotations.clone(),
        ..Descriptor::new(&wire.media_type, Digest::parse(&wire.digest)?, size)
    })
}

/// A descriptor as the API has it.
pub(crate) fn wire(descriptor: &Descriptor) -> proto::containerd::types::Descriptor {
    proto::containerd::types::Descriptor {
        media_type: descriptor.media_type.clone(),
        digest: descriptor.digest.to_string(),
        size: descriptor.size as i64,
        annotations: descriptor.annotations.clone(),
    }
}

/// Finds the best manifest under `target` for what `matcher` wants, with its config.
pub(crate) async fn resolve(
    client: &Client,
    target: &Descriptor,
    matcher: &Matcher,
    wanted: &Platform,
) -> anyhow::Result<Resolved> {
    let manifest = manifest(client, target, matcher, wanted).await?;
    let config = config_of(client, &manifest).await?;
    // An index may leave its entries without platform; then the config has the word.
    if !matcher.matches(&config.platform) && !config.platform.os.is_empty() {
        bail!(
            "the image is for platform {}, not {wanted}; choose it with --platform {}",
            config.platform,
            config.platform
        );
    }
    Ok(Resolved { manifest, config })
}

/// Finds the best manifest under `target` for what `matcher` wants; its config may be for another platform.
pub(crate) async fn manifest(
    client: &Client,
    target: &Descriptor,
    matcher: &Matcher,
    wanted: &Platform,
) -> anyhow::Result<Manifest> {
    let mut descriptor = target.clone();
    for _ in 0..=DEPTH_LIMIT {
        let bytes = content::read(client, &descriptor.digest, MANIFEST_LIMIT).await?;
        match kind_of(&bytes)? {
            Kind::Manifest => return Ok(Manifest::parse(&bytes)?),
            Kind::Index => {
                let index = Index::parse(&bytes)?;
                // An import may have left other platforms' manifests out.
                let mut present = None;
                for candidate in index.select(matcher) {
                    if content::info(client, &candidate.digest).await?.is_some() {
                        present = Some(candidate.clone());
                        break;
                    }
                }
                descriptor = present.ok_or_else(|| index.no_platform(wanted))?;
            }
        }
    }
    bail!("indexes are nested deeper than {DEPTH_LIMIT}")
}

/// The config of a manifest.
pub(crate) async fn config_of(client: &Client, manifest: &Manifest) -> anyhow::Result<ImageConfig> {
    if !media_type::is_config(&manifest.config.media_type) && !manifest.config.media_type.is_empty() {
        bail!("not a container image: its config has media type {}", manifest.config.media_type);
    }
    let bytes = content::read(client, &manifest.config.digest, CONFIG_LIMIT).await?;
    Ok(ImageConfig::parse(&bytes)?)
}

/// What an image comprises as far as the store has it.
#[derive(Default)]
pub(crate) struct Survey {
    /// Platforms whose manifests are there.
    pub(crate) platforms: BTreeSet<String>,
    /// Bytes of the blobs on the host's platform.
    pub(crate) size: i64,
    /// Blobs there and their sizes, of the wanted platforms; parents after their children.
    pub(crate) blobs: Vec<Descriptor>,
    /// Blobs that should be there and are not.
    pub(crate) missing: Vec<Descriptor>,
}

/// Walks everything under `target` on the platforms that `matcher` wants.
pub(crate) async fn survey(
    client: &Client,
    target: &Descriptor,
    matcher: &Matcher,
) -> anyhow::Result<Survey> {
    let mut survey = Survey::default();
    let mut seen = BTreeSet::new();
    // A stack entry is visited (its children go on top), then, once they are done, listed.
    let mut stack = vec![(target.clone(), 0, false)];
    let host = Matcher::only(&Platform::host());
    while let Some((descriptor, depth, expanded)) = stack.pop() {
        if expanded {
            survey.blobs.push(descriptor);
            continue;
        }
        if !seen.insert(descriptor.digest.clone()) {
            continue;
        }
        if content::info(client, &descriptor.digest).await?.is_none() {
            survey.missing.push(descriptor);
            continue;
        }
        survey.size = survey.size.saturating_add(descriptor.size as i64);
        let documents =
            media_type::is_index(&descriptor.media_type) || media_type::is_manifest(&descriptor.media_type);
        let mut children = Vec::new();
        if documents && depth <= DEPTH_LIMIT {
            let bytes = content::read(client, &descriptor.digest, MANIFEST_LIMIT).await?;
            match kind_of(&bytes)? {
                Kind::Index => {
                    let index = Index::parse(&bytes)?;
                    for entry in &index.manifests {
                        if let Some(platform) = &entry.platform
                            && content::info(client, &entry.digest).await?.is_some()
                        {
                            survey.platforms.insert(platform.normalized().to_string());
                        }
                    }
                    let some = index.select(matcher);
                    children.extend(some.into_iter().cloned());
                }
                Kind::Manifest => {
                    let manifest = Manifest::parse(&bytes)?;
                    if content::info(client, &manifest.config.digest).await?.is_some()
                        && let Ok(config) = config_of(client, &manifest).await
                        && !config.platform.os.is_empty()
                    {
                        survey.platforms.insert(config.platform.normalized().to_string());
                        if !host.matches(&config.platform) && depth > 0 {
                            survey.size -= descriptor.size as i64;
                        }
                    }
                    children.push(manifest.config);
                    children.extend(manifest.layers);
                }
            }
        }
        stack.push((descriptor, depth, true));
        stack.extend(children.into_iter().rev().map(|child| (child, depth + 1, false)));
    }
    Ok(survey)
}
