//! Image documents: index, manifest, config, and the media types of OCI and Docker.
//!
//! Unknown fields are tolerated when reading. Documents are immutable and addressed by
//! the digest of their bytes, so nothing re-writes one: whoever stores a document stores the bytes it came as.
//!
//! Invariant: a document is an index or a manifest, never both. [`kind_of`] refuses what could
//! be read as either, since two readers could then see two images under one digest; for the same reason it refuses names
//! that only readers which ignore case (Go's) take for ours.

use std::collections::BTreeMap;

use serde::de::{IgnoredAny, MapAccess, SeqAccess, Visitor};
use serde::{Deserialize, Serialize};

use crate::digest::Digest;
use crate::platform::{Matcher, Platform};

/// The media types that images are made of.
pub mod media_type {
    /// OCI image index.
    pub const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
    /// OCI image manifest.
    pub const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
    /// OCI image config.
    pub const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
    /// OCI layer, plain tar.
    pub const OCI_LAYER: &str = "application/vnd.oci.image.layer.v1.tar";
    /// OCI layer, gzip.
    pub const OCI_LAYER_GZIP: &str = "application/vnd.oci.image.layer.v1.tar+gzip";
    /// OCI layer, zstd.
    pub const OCI_LAYER_ZSTD: &str = "application/vnd.oci.image.layer.v1.tar+zstd";
    /// Docker's manifest list.
    pub const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
    /// Docker's manifest, schema 2.
    pub const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
    /// Docker's image config.
    pub const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
    /// Docker's layer, plain tar.
    pub const DOCKER_LAYER: &str = "application/vnd.docker.image.rootfs.diff.tar";
    /// Docker's layer, gzip.
    pub const DOCKER_LAYER_GZIP: &str = "application/vnd.docker.image.rootfs.diff.tar.gzip";
    /// Docker's layer, zstd.
    pub const DOCKER_LAYER_ZSTD: &str = "application/vnd.docker.image.rootfs.diff.tar.zstd";

    /// Whether `media_type` is an index or a manifest list.
    pub fn is_index(media_type: &str) -> bool {
        matches!(media_type, OCI_INDEX | DOCKER_LIST)
    }

    /// Whether `media_type` is an image manifest.
    pub fn is_manifest(media_type: &str) -> bool {
        matches!(media_type, OCI_MANIFEST | DOCKER_MANIFEST)
    }

    /// Whether `media_type` is an image config.
    pub fn is_config(media_type: &str) -> bool {
        matches!(media_type, OCI_CONFIG | DOCKER_CONFIG)
    }

    /// Whether `media_type` is a file system layer, foreign and non-distributable ones included.
    pub fn is_layer(media_type: &str) -> bool {
        media_type.starts_with("application/vnd.oci.image.layer.")
            || media_type.starts_with("application/vnd.docker.image.rootfs.")
    }
}

/// Largest index or manifest that is read, in bytes; registries have the same limit.
pub const MANIFEST_LIMIT: u64 = 4 << 20;
/// Largest image config that is read, in bytes.
pub const CONFIG_LIMIT: u64 = 8 << 20;
/// Most layers a manifest may have. overlayfs stacks no more than 500 folders.
pub const LAYER_LIMIT: usize = 500;
/// Most manifests an index may have.
pub const INDEX_LIMIT: usize = 4096;

/// String pairs on descriptors and documents.
pub type Annotations = BTreeMap<String, String>;

/// Names one blob: type, digest, size.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What the blob is.
    #[serde(default)]
    pub media_type: String,
    /// Its address.
    pub digest: Digest,
    /// Its length in bytes; never negative.
    pub size: u64,
    /// Where else it may be fetched from. The engine never follows these with credentials.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub urls: Vec<String>,
    /// Free-form pairs.
    #[serde(default, skip_serializing_if = "Annotations::is_empty")]
    pub annotations: Annotations,
    /// What it runs on, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub platform: Option<Platform>,
    /// What kind of artifact it is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
}

impl Descriptor {
    /// A descriptor without annotations or platform.
    pub fn new(media_type: &str, digest: Digest, size: u64) -> Descriptor {
        Descriptor {
            media_type: media_type.to_owned(),
            digest,
            size,
            urls: Vec::new(),
            annotations: Annotations::new(),
            platform: None,
            artifact_type: None,
        }
    }

    /// Describes `bytes`.
    pub fn of(media_type: &str, bytes: &[u8]) -> Descriptor {
        Descriptor::new(media_type, Digest::sha256_of(bytes), bytes.len() as u64)
    }
}

/// An image index: manifests for several platforms.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// The index's own media type; older files leave it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The manifests (or nested indexes).
    #[serde(default, deserialize_with = "null_is_default")]
    pub manifests: Vec<Descriptor>,
    /// Free-form pairs.
    #[serde(default, skip_serializing_if = "Annotations::is_empty", deserialize_with = "null_is_default")]
    pub annotations: Annotations,
}

/// An image manifest: one config and its layers, base first.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// The manifest's own media type; older files leave it out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// The image config.
    pub config: Descriptor,
    /// The layers, base first.
    #[serde(default, deserialize_with = "null_is_default")]
    pub layers: Vec<Descriptor>,
    /// Free-form pairs.
    #[serde(default, skip_serializing_if = "Annotations::is_empty", deserialize_with = "null_is_default")]
    pub annotations: Annotations,
}

/// An image config: what the file system is made of, and how to run it.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageConfig {
    /// What it runs on.
    #[serde(flatten)]
    pub platform: Platform,
    /// RFC 3339 time of creation.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub created: Option<String>,
    /// Defaults for a container.
    #[serde(default, deserialize_with = "null_is_default")]
    pub config: ContainerDefaults,
    /// The uncompressed layers.
    #[serde(default)]
    pub rootfs: RootFs,
}

/// The layers as they are when uncompressed.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct RootFs {
    /// Always `layers`.
    #[serde(default, rename = "type")]
    pub kind: String,
    /// Digests of the uncompressed tars, base first.
    #[serde(default, deserialize_with = "null_is_default")]
    pub diff_ids: Vec<Digest>,
}

/// How to run an image; the `config` object of an image config.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct ContainerDefaults {
    /// `user[:group]`, by name or number.
    #[serde(default, skip_serializing_if = "String::is_empty", deserialize_with = "null_is_default")]
    pub user: String,
    /// `KEY=value` pairs.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub env: Vec<String>,
    /// First part of the command line.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub entrypoint: Vec<String>,
    /// Rest of the command line, unless the caller gives one.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub cmd: Vec<String>,
    /// Working folder in the container.
    #[serde(default, skip_serializing_if = "String::is_empty", deserialize_with = "null_is_default")]
    pub working_dir: String,
    /// Paths that want a volume, as the keys of an object.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty", deserialize_with = "null_is_default")]
    pub volumes: BTreeMap<String, serde_json::Value>,
    /// Free-form pairs.
    #[serde(default, skip_serializing_if = "Annotations::is_empty", deserialize_with = "null_is_default")]
    pub labels: Annotations,
    /// Signal that asks the container to stop, by name or number.
    #[serde(default, skip_serializing_if = "String::is_empty", deserialize_with = "null_is_default")]
    pub stop_signal: String,
}

// Docker and Go tools write `null` for an empty list.
fn null_is_default<'de, D, T>(deserializer: D) -> Result<T, D::Error>
where
    D: serde::Deserializer<'de>,
    T: Deserialize<'de> + Default,
{
    Ok(Option::<T>::deserialize(deserializer)?.unwrap_or_default())
}

/// Whether a document lists manifests or layers.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// An [`Index`].
    Index,
    /// A [`Manifest`].
    Manifest,
}

/// Why a document is refused.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// Larger than the limit for its kind.
    #[error("{what} of {size} bytes is larger than the limit of {limit}")]
    TooLarge {
        /// Which document.
        what: &'static str,
        /// Its size, in bytes or entries.
        size: u64,
        /// The limit, in the same unit.
        limit: u64,
    },
    /// Not JSON, or a field of the wrong type.
    #[error("{what} cannot be read: {source}")]
    Json {
        /// Which document.
        what: &'static str,
        /// The parser's message, with line and column.
        source: serde_json::Error,
    },
    /// Could be read as an index and as a manifest.
    #[error("document claims to be both an image index and an image manifest")]
    Ambiguous,
    /// Docker's schema 1, obsolete and unsigned in effect.
    #[error("manifests of schema version {0} are not supported; push the image again with a current tool")]
    SchemaVersion(u32),
    /// The document's own media type contradicts its content or its descriptor.
    #[error("document says media type {found:?}, but {expected} is expected")]
    MediaType {
        /// What the document says.
        found: String,
        /// What it should be.
        expected: &'static str,
    },
    /// Layers and diff ids do not pair up.
    #[error("manifest has {layers} layers, but its config names {diff_ids}")]
    LayerCount {
        /// Layers in the manifest.
        layers: usize,
        /// Diff ids in the config.
        diff_ids: usize,
    },
    /// The index has nothing for the wanted platform.
    #[error("no manifest for platform {wanted}; the image has: {has}")]
    NoPlatform {
        /// The wanted platform.
        wanted: String,
        /// What the index has.
        has: String,
    },
}

/// Whether a label of this name steers an engine (a logger to run, what a collection spares): neither an image nor a pod is an
/// authority, so that none of their labels becomes one of a container's.
pub fn is_reserved_label(key: &str) -> bool {
    ["containerd.io/", "io.containerd.", "io.cri-containerd.", "io.kubernetes.cri.", "gantry."]
        .iter()
        .any(|prefix| key.starts_with(prefix))
}

/// Only what tells the documents apart.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Outline {
    #[serde(default)]
    schema_version: Option<u32>,
    #[serde(default)]
    media_type: Option<String>,
    #[serde(default)]
    manifests: Option<IgnoredAny>,
    #[serde(default)]
    config: Option<IgnoredAny>,
    #[serde(default)]
    layers: Option<IgnoredAny>,
    #[serde(default, rename = "fsLayers")]
    fs_layers: Option<IgnoredAny>,
}

/// The names that documents and their descriptors have.
const NAMES: [&str; 20] = [
    "schemaVersion",
    "mediaType",
    "manifests",
    "config",
    "layers",
    "fsLayers",
    "subject",
    "annotations",
    "artifactType",
    "digest",
    "size",
    "urls",
    "data",
    "platform",
    "os",
    "architecture",
    "variant",
    "os.version",
    "os.features",
    "features",
];

/// A part of a document of which no object has a name that is one of [`NAMES`] but for the case of its letters.
struct Exact;

/// The name of something in a document, and not one of [`NAMES`] in other letters.
struct Name(String);

impl<'de> Deserialize<'de> for Name {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Name, D::Error> {
        let name = String::deserialize(deserializer)?;
        if NAMES.contains(&name.as_str()) {
            return Ok(Name(name));
        }
        // Both ways, as Go does: the long s and the Kelvin sign are an s and a k there.
        let folded: String = name.chars().flat_map(char::to_uppercase).flat_map(char::to_lowercase).collect();
        match NAMES.iter().find(|ours| ours.eq_ignore_ascii_case(&folded)) {
            None => Ok(Name(name)),
            Some(ours) => Err(serde::de::Error::custom(format_args!(
                "the name {name:?} is {ours:?} for readers that ignore the case of letters, and for them alone"
            ))),
        }
    }
}

impl<'de> Deserialize<'de> for Exact {
    fn deserialize<D: serde::Deserializer<'de>>(deserializer: D) -> Result<Exact, D::Error> {
        deserializer.deserialize_any(Exact)
    }
}

impl<'de> Visitor<'de> for Exact {
    type Value = Exact;

    fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("a part of an image document")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Exact, A::Error> {
        while let Some(Name(name)) = map.next_key()? {
            if ["manifests", "config", "layers", "subject", "platform"].contains(&name.as_str()) {
                map.next_value::<Exact>()?;
            } else {
                map.next_value::<IgnoredAny>()?;
            }
        }
        Ok(self)
    }

    fn visit_seq<A: SeqAccess<'de>>(self, mut list: A) -> Result<Exact, A::Error> {
        while list.next_element::<Exact>()?.is_some() {}
        Ok(self)
    }

    fn visit_bool<E>(self, _: bool) -> Result<Exact, E> {
        Ok(self)
    }

    fn visit_i64<E>(self, _: i64) -> Result<Exact, E> {
        Ok(self)
    }

    fn visit_u64<E>(self, _: u64) -> Result<Exact, E> {
        Ok(self)
    }

    fn visit_f64<E>(self, _: f64) -> Result<Exact, E> {
        Ok(self)
    }

    fn visit_str<E>(self, _: &str) -> Result<Exact, E> {
        Ok(self)
    }

    fn visit_unit<E>(self) -> Result<Exact, E> {
        Ok(self)
    }
}

/// Tells an index from a manifest by what the document holds, and refuses what could be both.
pub fn kind_of(bytes: &[u8]) -> Result<Kind, ImageError> {
    check_size("image document", bytes, MANIFEST_LIMIT)?;
    let unreadable = |source| ImageError::Json { what: "image document", source };
    serde_json::from_slice::<Exact>(bytes).map_err(unreadable)?;
    let outline: Outline = serde_json::from_slice(bytes).map_err(unreadable)?;
    match outline.schema_version {
        None | Some(2) => {}
        Some(other) => return Err(ImageError::SchemaVersion(other)),
    }
    let lists = outline.manifests.is_some();
    let layered = outline.config.is_some() || outline.layers.is_some() || outline.fs_layers.is_some();
    if lists && layered {
        return Err(ImageError::Ambiguous);
    }
    let named = outline.media_type.unwrap_or_default();
    let kind = match (lists, layered) {
        (true, false) => Kind::Index,
        (false, true) => Kind::Manifest,
        _ if media_type::is_index(&named) => Kind::Index,
        _ => Kind::Manifest,
    };
    match kind {
        Kind::Index if media_type::is_manifest(&named) => {
            Err(ImageError::MediaType { found: named, expected: "an image index" })
        }
        Kind::Manifest if media_type::is_index(&named) => {
            Err(ImageError::MediaType { found: named, expected: "an image manifest" })
        }
        kind => Ok(kind),
    }
}

fn check_size(what: &'static str, bytes: &[u8], limit: u64) -> Result<(), ImageError> {
    if bytes.len() as u64 > limit {
        return Err(ImageError::TooLarge { what, size: bytes.len() as u64, limit });
    }
    Ok(())
}

fn check_count(what: &'static str, count: usize, limit: usize) -> Result<(), ImageError> {
    if count > limit {
        return Err(ImageError::TooLarge { what, size: count as u64, limit: limit as u64 });
    }
    Ok(())
}

impl Index {
    /// Reads an index; refuses a manifest and what could be both.
    pub fn parse(bytes: &[u8]) -> Result<Index, ImageError> {
        if kind_of(bytes)? != Kind::Index {
            return Err(ImageError::MediaType {
                found: "an image manifest".into(),
                expected: "an image index",
            });
        }
        let index: Index = serde_json::from_slice(bytes)
            .map_err(|source| ImageError::Json { what: "image index", source })?;
        check_count("list of manifests in the index", index.manifests.len(), INDEX_LIMIT)?;
        Ok(index)
    }

    /// The manifests that `matcher` wants, best first. An entry without a platform matches
    /// everything but comes last; attestations (platform `unknown/unknown`) match only when all are wanted.
    pub fn select(&self, matcher: &Matcher) -> Vec<&Descriptor> {
        let mut ranked: Vec<(usize, &Descriptor)> = self
            .manifests
            .iter()
            .filter_map(|entry| match &entry.platform {
                Some(platform) => matcher.rank(platform).map(|rank| (rank, entry)),
                None => Some((usize::MAX, entry)),
            })
            .collect();
        ranked.sort_by_key(|(rank, _)| *rank);
        ranked.into_iter().map(|(_, entry)| entry).collect()
    }

    /// An error naming what the index has instead of `wanted`.
    pub fn no_platform(&self, wanted: &Platform) -> ImageError {
        let has: Vec<String> = self
            .manifests
            .iter()
            .filter_map(|m| m.platform.as_ref())
            .map(Platform::to_string)
            .take(32)
            .collect();
        ImageError::NoPlatform {
            wanted: wanted.to_string(),
            has: if has.is_empty() { "none".into() } else { has.join(", ") },
        }
    }
}

impl Manifest {
    /// Reads a manifest; refuses an index, what could be both, and too many layers.
    pub fn parse(bytes: &[u8]) -> Result<Manifest, ImageError> {
        if kind_of(bytes)? != Kind::Manifest {
            return Err(ImageError::MediaType {
                found: "an image index".into(),
                expected: "an image manifest",
            });
        }
        let manifest: Manifest = serde_json::from_slice(bytes)
            .map_err(|source| ImageError::Json { what: "image manifest", source })?;
        check_count("list of layers in the manifest", manifest.layers.len(), LAYER_LIMIT)?;
        Ok(manifest)
    }
}

impl ImageConfig {
    /// Reads a config.
    pub fn parse(bytes: &[u8]) -> Result<ImageConfig, ImageError> {
        check_size("image config", bytes, CONFIG_LIMIT)?;
        let config: ImageConfig = serde_json::from_slice(bytes)
            .map_err(|source| ImageError::Json { what: "image config", source })?;
        check_count("list of diff ids in the config", config.rootfs.diff_ids.len(), LAYER_LIMIT)?;
        Ok(config)
    }

    /// The diff ids, checked to pair with the layers of `manifest`.
    pub fn diff_ids_for(&self, manifest: &Manifest) -> Result<&[Digest], ImageError> {
        let (layers, diff_ids) = (manifest.layers.len(), self.rootfs.diff_ids.len());
        if layers != diff_ids {
            return Err(ImageError::LayerCount { layers, diff_ids });
        }
        Ok(&self.rootfs.diff_ids)
    }
}

/// Chain ids: entry n names the file system that the layers 0 to n make together, and with it
/// the committed snapshot that holds it. One layer's chain id is its diff id.
pub fn chain_ids(diff_ids: &[Digest]) -> Vec<Digest> {
    let mut chain: Vec<Digest> = Vec::with_capacity(diff_ids.len());
    for diff_id in diff_ids {
        let next = match chain.last() {
            None => diff_id.clone(),
            Some(parent) => Digest::sha256_of(format!("{parent} {diff_id}").as_bytes()),
        };
        chain.push(next);
    }
    chain
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn digest(n: u8) -> Digest {
        Digest::sha256_of(&[n])
    }

    #[test]
    fn tells_documents_apart() {
        let d = digest(0);
        let manifest = format!(
            r#"{{"schemaVersion":2,"config":{{"mediaType":"{}","digest":"{d}","size":3}},"layers":null,"future":{{}}}}"#,
            media_type::OCI_CONFIG
        );
        assert_eq!(kind_of(manifest.as_bytes()).unwrap(), Kind::Manifest);
        assert!(Manifest::parse(manifest.as_bytes()).unwrap().layers.is_empty());
        assert!(Index::parse(manifest.as_bytes()).is_err());
        let index = r#"{"schemaVersion":2,"manifests":[]}"#;
        assert_eq!(kind_of(index.as_bytes()).unwrap(), Kind::Index);
        let both = format!(r#"{{"schemaVersion":2,"manifests":[],"config":{{"digest":"{d}","size":1}}}}"#);
        assert!(matches!(kind_of(both.as_bytes()), Err(ImageError::Ambiguous)));
        let lying =
            format!(r#"{{"schemaVersion":2,"mediaType":"{}","manifests":[]}}"#, media_type::OCI_MANIFEST);
        assert!(matches!(kind_of(lying.as_bytes()), Err(ImageError::MediaType { .. })));
        assert!(matches!(
            kind_of(br#"{"schemaVersion":1,"fsLayers":[]}"#),
            Err(ImageError::SchemaVersion(1))
        ));
        assert!(matches!(kind_of(&vec![b' '; 5 << 20]), Err(ImageError::TooLarge { .. })));
        let negative = format!(r#"{{"schemaVersion":2,"manifests":[{{"digest":"{d}","size":-1}}]}}"#);
        assert!(Index::parse(negative.as_bytes()).is_err());
    }

    #[test]
    fn a_name_in_other_letters_is_refused() {
        let (d, other) = (digest(0), digest(1));
        let manifest = |more: &str| {
            format!(r#"{{"schemaVersion":2,"config":{{"digest":"{d}","size":1}},"layers":[]{more}}}"#)
        };
        let index = |entry: &str| {
            format!(
                r#"{{"schemaVersion":2,"manifests":[{{"digest":"{d}","size":1{entry}}}],"annotations":{{"Digest":"x"}}}}"#
            )
        };
        // What is not ours, and what people name as they like, may be in any letters.
        assert_eq!(kind_of(manifest(r#","Future":{"Layers":1}"#).as_bytes()).unwrap(), Kind::Manifest);
        let free = r#","annotations":{"Size":"1"},"platform":{"os":"linux","architecture":"amd64"},"x":[true,-1,1.5,null,"s"]"#;
        assert_eq!(kind_of(index(free).as_bytes()).unwrap(), Kind::Index);
        for hostile in [
            manifest(r#","Manifests":[]"#),
            manifest(r#","manife\u017fts":[]"#),
            manifest(r#","LAYERS":null"#),
            manifest(r#","MediaType":"application/vnd.oci.image.index.v1+json""#),
            index(&format!(r#","Digest":"{other}""#)),
            index(r#","platform":{"OS":"windows","os":"linux","architecture":"amd64"}"#),
            format!(r#"{{"schemaVersion":2,"manifests":[],"Config":{{"digest":"{d}","size":1}}}}"#),
        ] {
            let error = kind_of(hostile.as_bytes()).unwrap_err().to_string();
            assert!(error.contains("ignore the case of letters"), "{hostile}: {error}");
            assert!(
                Manifest::parse(hostile.as_bytes()).is_err() && Index::parse(hostile.as_bytes()).is_err()
            );
        }
    }

    #[test]
    fn reads_docker_configs() {
        let config = ImageConfig::parse(
            format!(
                r#"{{"architecture":"amd64","os":"linux","config":{{"Env":["A=b"],"Cmd":null,"Entrypoint":["/x"],"User":"1:2",
                "Labels":null,"StopSignal":"SIGINT","Volumes":{{"/data":{{}}}}}},"rootfs":{{"type":"layers","diff_ids":["{}"]}},"docker_version":"1"}}"#,
                digest(1)
            )
            .as_bytes(),
        )
        .unwrap();
        assert_eq!(config.config.entrypoint, ["/x"]);
        assert_eq!(config.config.stop_signal, "SIGINT");
        assert_eq!(config.platform, Platform::new("linux", "amd64", ""));
        assert_eq!(config.rootfs.diff_ids, [digest(1)]);
    }

    #[test]
    fn chains_as_the_image_spec_says() {
        assert!(chain_ids(&[]).is_empty());
        let ids = [digest(1), digest(2), digest(3)];
        let chain = chain_ids(&ids);
        assert_eq!(chain[0], ids[0]);
        assert_eq!(chain[1], Digest::sha256_of(format!("{} {}", ids[0], ids[1]).as_bytes()));
        assert_eq!(chain[2], Digest::sha256_of(format!("{} {}", chain[1], ids[2]).as_bytes()));
    }

    #[test]
    fn selects_by_platform_best_first() {
        let entry = |n: u8, platform: Option<&str>| Descriptor {
            platform: platform.map(|p| Platform::parse(p).unwrap()),
            ..Descriptor::new(media_type::OCI_MANIFEST, digest(n), 1)
        };
        let index = Index {
            schema_version: 2,
            media_type: None,
            manifests: vec![
                entry(0, None),
                entry(1, Some("linux/arm/v6")),
                entry(2, Some("linux/arm/v7")),
                entry(3, Some("linux/amd64")),
            ],
            annotations: Annotations::new(),
        };
        let chosen = index.select(&Matcher::only(&Platform::parse("linux/arm/v7").unwrap()));
        assert_eq!(
            chosen.iter().map(|d| &d.digest).collect::<Vec<_>>(),
            [&digest(2), &digest(1), &digest(0)]
        );
        assert!(index.no_platform(&Platform::new("linux", "s390x", "")).to_string().contains("linux/arm/v6"));
    }

    proptest! {
        #[test]
        fn hostile_bytes_never_panic(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
            let _ = kind_of(&bytes);
            let _ = ImageConfig::parse(&bytes);
        }
    }
}
