//! The kubelet's images.
//!
//! ```text
//!  record TAG     \
//!  record NAME@D   > target D --(platform)--> manifest --> config C     one image: id C, its tags, its digests
//!  record C       /
//! ```
//!
//! An image is its config: all records whose targets lead there are its names. The records are the truth, whoever wrote them;
//! what documents say is remembered by their digest, since that never changes.
//!
//! Invariants: pulls of the same reference with the same credentials are one pull, which goes on when its callers have gone,
//! so that a retry finds its work done. Credentials are for the registry they were sent for, and are kept nowhere.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::SystemTime;

use async_trait::async_trait;
use base64::Engine as _;
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared};
use oci::image::{
    CONFIG_LIMIT, ContainerDefaults, Descriptor, ImageConfig, Index, MANIFEST_LIMIT, Manifest, chain_ids,
};
use oci::image::{Kind as DocumentKind, kind_of};
use oci::platform::Matcher;
use oci::{Digest, Reference};
use parking_lot::Mutex;
use prost::Message as _;
use proto::containerd::services::images::v1::Image as Record;
use proto::containerd::types;
use proto::containerd::types::transfer::{ImageStore, UnpackConfiguration};
use proto::runtime::v1::{
    AuthConfig, FilesystemIdentifier, FilesystemUsage, Image, ImageFilter, ImageFsInfoResponse, ImageSpec,
    ImageStatusResponse, Int64Value, PodSandboxConfig, UInt64Value,
};
use snapshotter::Kind;

use super::context;
use super::settings::Settings;
use crate::content::{Content, parse_digest};
use crate::context::RequestContext;
use crate::error::{Error, Result, blocking, outlive};
use crate::gc::Gc;
use crate::labels::Labels;
use crate::remotes::{Access, Credential, Credentials};
use crate::snapshots::Snapshots;
use crate::transfer::Transfers;

/// The label of names that this service gave.
const MANAGED: (&str, &str) = ("io.cri-containerd.image", "managed");
/// The label of names whose image the kubelet shall not collect.
const PINNED: (&str, &str) = ("io.cri-containerd.pinned", "pinned");
/// The annotation of a pod by which clients older than the field of it name the runtime handler that an image is for.
const HANDLER: &str = "io.containerd.cri.runtime-handler";
/// The fewest digits of an id that name an image.
const SHORT: usize = 4;

/// What the configuration says of images.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Options {
    /// Where images are unpacked.
    pub snapshotter: String,
    /// Where those are that are pulled for a runtime handler, by its name.
    pub handlers: BTreeMap<String, String>,
    /// The images that the kubelet shall not collect.
    pub pinned: Vec<String>,
}

impl From<&Settings> for Options {
    fn from(settings: &Settings) -> Self {
        let handlers = settings.handlers.iter();
        // A name that is none pins nothing.
        let names = settings.pinned.iter().filter_map(|name| Reference::parse_normalized(name).ok());
        Options {
            snapshotter: settings.snapshotter.clone(),
            handlers: handlers.map(|(name, handler)| (name.clone(), handler.snapshotter.clone())).collect(),
            pinned: names.map(|name| canonical(name).to_string()).collect(),
        }
    }
}

/// The kubelet's images; cheap to clone.
#[derive(Clone)]
pub struct Images {
    images: crate::images::Images,
    content: Content,
    snapshots: Snapshots,
    transfers: Transfers,
    gc: Gc,
    options: Arc<Options>,
    /// What is known of targets.
    known: Arc<Mutex<HashMap<Digest, Arc<Facts>>>>,
    pulls: Arc<Mutex<HashMap<Pull, Pulling>>>,
}

/// What makes two pulls the same.
#[derive(Clone, PartialEq, Eq, Hash)]
struct Pull {
    reference: String,
    snapshotter: String,
    /// The credentials' bytes.
    auth: Vec<u8>,
}

type Pulling = Shared<BoxFuture<'static, Result<String>>>;

/// What the documents of an image say.
struct Facts {
    id: Digest,
    /// Bytes of content.
    size: u64,
    manifest: Manifest,
    config: ImageConfig,
    /// The config as it is.
    document: serde_json::Value,
}

/// An image that is here, as its containers need it.
#[derive(Debug, Clone)]
pub struct Local {
    /// Its id.
    pub id: String,
    /// The name to show: by tag, else by digest, else the id.
    pub name: String,
    /// Its name by digest, where it has one; else the id.
    pub by_digest: String,
    /// Its first name with a tag.
    pub tag: Option<String>,
    /// What its config says of containers.
    pub defaults: ContainerDefaults,
    /// The digest that its whole file system is called by; none for an image without layers.
    pub chain: Option<Digest>,
}

/// An image and its names.
#[derive(Clone)]
struct Found {
    facts: Arc<Facts>,
    names: Vec<String>,
    pinned: bool,
}

/// What an image is asked for by.
enum Wanted {
    /// An image's id, or the beginning of one.
    Id(String),
    Name(String),
}

impl Images {
    /// Images over these.
    pub fn new(
        images: crate::images::Images,
        content: Content,
        snapshots: Snapshots,
        transfers: Transfers,
        gc: Gc,
        options: Options,
    ) -> Self {
        Images {
            images,
            content,
            snapshots,
            transfers,
            gc,
            options: Arc::new(options),
            known: Arc::default(),
            pulls: Arc::default(),
        }
    }

    /// The images that are here, or the one that the filter names.
    pub async fn list(&self, filter: Option<ImageFilter>) -> Result<Vec<Image>> {
        let wanted = filter.and_then(|filter| filter.image).filter(|image| !image.image.is_empty());
        let all = self.all().await?;
        Ok(match wanted {
            Some(image) => find(&all, &image.image)?.iter().map(Found::message).collect(),
            None => all.iter().map(Found::message).collect(),
        })
    }

    /// One image, if it is here; with `verbose` what its config says, too.
    pub async fn status(&self, image: Option<ImageSpec>, verbose: bool) -> Result<ImageStatusResponse> {
        let Some(found) = find(&self.all().await?, name_of(&image)?)? else {
            return Ok(ImageStatusResponse::default());
        };
        let mut info = BTreeMap::new();
        if verbose {
            let chain = chain_ids(&found.facts.config.rootfs.diff_ids);
            let text = serde_json::json!({
                "chainID": chain.last().map(ToString::to_string).unwrap_or_default(),
                "imageSpec": found.facts.document,
            });
            info.insert("info".to_owned(), text.to_string());
        }
        // The same whatever it was asked for by: only what the kubelet says besides is given back.
        let mut message = found.message();
        let annotations = image.map(|image| image.annotations).unwrap_or_default();
        message.spec = Some(ImageSpec { annotations, ..ImageSpec::default() });
        Ok(ImageStatusResponse { image: Some(message), info: info.into_iter().collect() })
    }

    /// The image that a name, an id or the beginning of an id means, if it is here.
    pub async fn local(&self, name: &str) -> Result<Option<Local>> {
        Ok(find(&self.all().await?, name)?.map(|found| found.local()))
    }

    /// Pulls an image and unpacks it where the containers of its runtime handler, or of the pod that it is for, have their files;
    /// its id. Joins a pull of the same that is under way.
    pub async fn pull(
        &self,
        image: Option<ImageSpec>,
        auth: Option<AuthConfig>,
        pod: Option<&PodSandboxConfig>,
    ) -> Result<String> {
        let name = name_of(&image)?;
        let reference = Reference::parse_normalized(name)
            .map_err(|error| Error::invalid_argument(format!("pull image {name:?}: {error}")))?;
        let reference = canonical(reference);
        let auth = auth.unwrap_or_default();
        let handler = image.as_ref().map_or("", |image| image.runtime_handler.as_str());
        let snapshotter = self.snapshotter_for(handler, pod);
        let key = Pull {
            reference: reference.to_string(),
            snapshotter: snapshotter.clone(),
            auth: auth.encode_to_vec(),
        };
        let pulling = {
            let mut pulls = self.pulls.lock();
            match pulls.get(&key) {
                Some(pulling) => pulling.clone(),
                None => {
                    let (this, ended) = (self.clone(), key.clone());
                    let work = outlive(async move {
                        let done = this.pull_now(&reference, snapshotter, auth).await;
                        this.pulls.lock().remove(&ended);
                        done
                    });
                    let pulling = work.boxed().shared();
                    pulls.insert(key, pulling.clone());
                    pulling
                }
            }
        };
        pulling.await
    }

    /// The snapshotter of a runtime handler; one that is not known has the usual one, as in containerd.
    fn snapshotter_for(&self, handler: &str, pod: Option<&PodSandboxConfig>) -> String {
        let handler = match (handler, pod.and_then(|pod| pod.annotations.get(HANDLER))) {
            ("", Some(older)) => older,
            (handler, _) => handler,
        };
        self.options.handlers.get(handler).unwrap_or(&self.options.snapshotter).clone()
    }

    /// Unpacks an image with a snapshotter that it was not pulled for.
    pub async fn unpack(&self, id: &str, snapshotter: &str) -> Result<()> {
        let found = by_id(&self.all().await?, id)?
            .ok_or_else(|| Error::not_found(format!("image {id} is not here any more")))?;
        let (this, snapshotter) = (self.clone(), snapshotter.to_owned());
        outlive(async move {
            let (manifest, diff_ids) = (&found.facts.manifest, &found.facts.config.rootfs.diff_ids);
            this.transfers.unpack_image(&context()?, &snapshotter, manifest, diff_ids).await
        })
        .await
    }

    async fn pull_now(&self, reference: &Reference, snapshotter: String, auth: AuthConfig) -> Result<String> {
        let context = context()?;
        let name = reference.to_string();
        let mut labels: Labels = [(MANAGED.0.to_owned(), MANAGED.1.to_owned())].into();
        if self.options.pinned.contains(&name) {
            labels.insert(PINNED.0.to_owned(), PINNED.1.to_owned());
        }
        let host = platform();
        let store = ImageStore {
            name: name.clone(),
            labels: labels.clone(),
            platforms: vec![host.clone()],
            unpacks: vec![UnpackConfiguration { platform: Some(host), snapshotter }],
            ..ImageStore::default()
        };
        let access = Access {
            credentials: Some(Arc::new(Given { auth, domain: reference.domain().to_owned() })),
            ..Access::anonymous(reference.clone())
        };
        self.transfers.pull_image(&context, access, store).await?;
        let record = self.images.get(&context, &name)?;
        let target = record.target.unwrap_or_default();
        let facts = self.facts(&context, &target).await?;
        let by_digest = format!("{}@{}", reference.name(), target.digest);
        for name in [by_digest, facts.id.to_string()] {
            if name != record.name {
                self.transfers.put(&context, &name, labels.clone(), &target).await?;
            }
        }
        Ok(facts.id.to_string())
    }

    /// Removes an image with all its names, and waits until its space is free. None is no error.
    pub async fn remove(&self, image: Option<ImageSpec>) -> Result<()> {
        let wanted = name_of(&image)?;
        let Some(found) = find(&self.all().await?, wanted)? else {
            return Ok(());
        };
        let this = self.clone();
        outlive(async move {
            let context = context()?;
            for name in &found.names {
                match this.images.delete(&context, name.clone(), None).await {
                    // Somebody else removes it, too.
                    Ok(()) | Err(Error::NotFound(_)) => {}
                    Err(error) => return Err(error),
                }
            }
            this.gc.collect().await.map(drop)
        })
        .await
    }

    /// What the layers of images take, by snapshotter; the one for new images first. Of containers' own files, nothing.
    pub async fn usage(&self) -> Result<ImageFsInfoResponse> {
        let context = context()?;
        let mut systems = Vec::new();
        let roots: Vec<_> =
            self.snapshots.opened().map(|(name, root, _)| (name.to_owned(), root.to_owned())).collect();
        for (name, root) in roots {
            let layers = match self.snapshots.list(&context, &name, &["kind==Committed".into()]).await {
                Ok(layers) => layers,
                // Another process serves it, which does not answer now.
                Err(error) => {
                    tracing::warn!(snapshotter = %name, %error, "what its images take is not known");
                    continue;
                }
            };
            let default = name == self.options.snapshotter;
            if layers.is_empty() && !default {
                continue;
            }
            let layers = layers.into_iter().filter(|layer| layer.kind == Kind::Committed);
            let layers = layers.map(|layer| (name.clone(), layer.record.inner)).collect();
            let (mut bytes, mut inodes) = (0_u64, 0_u64);
            for usage in self.snapshots.usages(layers).await?.into_iter().flatten() {
                bytes += u64::try_from(usage.size).unwrap_or(0);
                inodes += u64::try_from(usage.inodes).unwrap_or(0);
            }
            let system = FilesystemUsage {
                timestamp: now(),
                fs_id: Some(FilesystemIdentifier { mountpoint: root.display().to_string() }),
                used_bytes: Some(UInt64Value { value: bytes }),
                inodes_used: Some(UInt64Value { value: inodes }),
            };
            // The kubelet looks at the first alone.
            systems.insert(if default { 0 } else { systems.len() }, system);
        }
        Ok(ImageFsInfoResponse { container_filesystems: systems.clone(), image_filesystems: systems })
    }

    /// All images. A record whose documents are not here, or are for other machines, is none.
    async fn all(&self) -> Result<Vec<Found>> {
        let context = context()?;
        let mut all: BTreeMap<String, Found> = BTreeMap::new();
        let mut seen = Vec::new();
        for record in self.images.list(&context, &[])? {
            let Record { name, labels, target, .. } = record;
            let target = target.unwrap_or_default();
            let facts = match self.facts(&context, &target).await {
                Ok(facts) => facts,
                Err(error) => {
                    tracing::debug!(image = %name, %error, "no image for the kubelet");
                    continue;
                }
            };
            seen.extend(target.digest.parse::<Digest>());
            let found = all.entry(facts.id.to_string()).or_insert_with(|| Found {
                facts,
                names: Vec::new(),
                pinned: false,
            });
            found.pinned |= labels.get(PINNED.0).is_some_and(|value| value == PINNED.1)
                || self.options.pinned.contains(&name);
            found.names.push(name);
        }
        self.known.lock().retain(|target, _| seen.contains(target));
        Ok(all.into_values().collect())
    }

    /// What the documents of a target say, for this machine's platform.
    async fn facts(&self, context: &RequestContext, target: &types::Descriptor) -> Result<Arc<Facts>> {
        let digest = parse_digest(&target.digest)?;
        // The config is asked for again each time: what is remembered must be here.
        if let Some(facts) = self.known.lock().get(&digest).cloned()
            && self.content.info(context, &facts.id).is_ok()
        {
            return Ok(facts);
        }
        let (content, context, target) = (self.content.clone(), context.clone(), digest.clone());
        let facts = Arc::new(blocking(move || read_facts(&content, &context, &target)).await?);
        self.known.lock().insert(digest, facts.clone());
        Ok(facts)
    }
}

/// Reads an image's documents. Blocks.
fn read_facts(content: &Content, context: &RequestContext, target: &Digest) -> Result<Facts> {
    let matcher = Matcher::only(&oci::Platform::host());
    let wrong = |digest: &Digest, error: &dyn std::fmt::Display| {
        Error::invalid_argument(format!("{digest}: {error}"))
    };
    let mut size = 0;
    let mut digest = target.clone();
    let mut refused = None;
    // An index of indexes is as deep as this.
    let mut candidates: Vec<Digest> = Vec::new();
    for _ in 0..64 {
        let bytes = match content.read_document(context, &digest, MANIFEST_LIMIT) {
            Ok(bytes) => bytes,
            // Only one of the manifests of an index needs to be here.
            Err(error @ Error::NotFound(_)) => match candidates.pop() {
                Some(next) => {
                    refused.get_or_insert(error);
                    digest = next;
                    continue;
                }
                None => return Err(refused.unwrap_or(error)),
            },
            Err(error) => return Err(error),
        };
        size += bytes.len() as u64;
        match kind_of(&bytes).map_err(|error| wrong(&digest, &error))? {
            DocumentKind::Index => {
                let index = Index::parse(&bytes).map_err(|error| wrong(&digest, &error))?;
                // The best is taken first, so it comes last.
                candidates.extend(index.select(&matcher).into_iter().rev().map(|entry| entry.digest.clone()));
                digest = candidates
                    .pop()
                    .ok_or_else(|| Error::not_found(index.no_platform(&oci::Platform::host()).to_string()))?;
            }
            DocumentKind::Manifest => {
                let manifest = Manifest::parse(&bytes).map_err(|error| wrong(&digest, &error))?;
                let config = &manifest.config;
                let bytes = content.read_document(context, &config.digest, CONFIG_LIMIT)?;
                let wrong = |error: &dyn std::fmt::Display| wrong(&config.digest, error);
                let document = serde_json::from_slice(&bytes).map_err(|error| wrong(&error))?;
                let layers: u64 = manifest.layers.iter().map(|layer: &Descriptor| layer.size).sum();
                return Ok(Facts {
                    id: config.digest.clone(),
                    size: size + bytes.len() as u64 + layers,
                    config: ImageConfig::parse(&bytes).map_err(|error| wrong(&error))?,
                    document,
                    manifest,
                });
            }
        }
    }
    Err(Error::invalid_argument(format!("{target}: its indexes lead to no manifest")))
}

/// A reference as images are called by it: with a tag and a digest, the digest counts; with neither, the usual tag.
fn canonical(reference: Reference) -> Reference {
    let reference = reference.with_default_tag();
    match reference.digest() {
        Some(digest) => reference.with_digest(digest.clone()),
        None => reference,
    }
}

/// What a request asks for; InvalidArgument when it names nothing.
fn name_of(image: &Option<ImageSpec>) -> Result<&str> {
    match image.as_ref().map(|image| image.image.as_str()) {
        None | Some("") => Err(Error::invalid_argument("the request names no image")),
        Some(name) => Ok(name),
    }
}

/// The image that a name, an id or the beginning of an id means.
fn find(all: &[Found], name: &str) -> Result<Option<Found>> {
    let by_name =
        |name: &str| all.iter().find(|found| found.names.iter().any(|other| other == name)).cloned();
    let wanted = match Reference::parse_normalized(name) {
        _ if name.starts_with("sha256:") => Wanted::Id(name.to_owned()),
        Ok(reference) => Wanted::Name(reference.with_default_tag().to_string()),
        Err(_) => Wanted::Id(format!("sha256:{name}")),
    };
    match wanted {
        Wanted::Name(full) => {
            if let Some(found) = by_name(&full).or_else(|| by_name(name)) {
                return Ok(Some(found));
            }
            // Hex digits could be a name as well.
            by_id(all, &format!("sha256:{name}"))
        }
        Wanted::Id(id) => by_id(all, &id),
    }
}

fn by_id(all: &[Found], id: &str) -> Result<Option<Found>> {
    let digits = id.trim_start_matches("sha256:");
    if digits.len() < SHORT || !digits.bytes().all(|digit| digit.is_ascii_hexdigit()) {
        return Ok(None);
    }
    let mut fit = all.iter().filter(|found| found.facts.id.as_str().starts_with(id));
    match (fit.next(), fit.next()) {
        (Some(_), Some(_)) => {
            Err(Error::invalid_argument(format!("image {id:?}: the ids of several images begin so")))
        }
        (found, _) => Ok(found.cloned()),
    }
}

impl Found {
    fn local(&self) -> Local {
        let Image { id, repo_tags, repo_digests, .. } = self.message();
        let tag = repo_tags.into_iter().next();
        let digest = repo_digests.into_iter().next();
        Local {
            name: tag.clone().or_else(|| digest.clone()).unwrap_or_else(|| id.clone()),
            by_digest: digest.unwrap_or_else(|| id.clone()),
            tag,
            defaults: self.facts.config.config.clone(),
            chain: chain_ids(&self.facts.config.rootfs.diff_ids).pop(),
            id,
        }
    }

    fn message(&self) -> Image {
        let (mut repo_tags, mut repo_digests) = (Vec::new(), Vec::new());
        for name in &self.names {
            match Reference::parse_normalized(name) {
                _ if name.starts_with("sha256:") => {}
                Ok(reference) if reference.digest().is_some() => repo_digests.push(name.clone()),
                Ok(reference) if reference.tag().is_some() => repo_tags.push(name.clone()),
                _ => {}
            }
        }
        let user = self.facts.config.config.user.split(':').next().unwrap_or_default();
        let uid = user.parse::<i64>().ok();
        Image {
            id: self.facts.id.to_string(),
            repo_tags,
            repo_digests,
            size: self.facts.size,
            uid: uid.map(|value| Int64Value { value }),
            username: if uid.is_some() { String::new() } else { user.to_owned() },
            spec: None,
            pinned: self.pinned,
        }
    }
}

/// This machine's platform, as messages have it.
fn platform() -> types::Platform {
    let host = oci::Platform::host();
    types::Platform {
        os: host.os,
        architecture: host.architecture,
        variant: host.variant,
        os_version: host.os_version,
        os_features: host.os_features,
    }
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// The credentials of one request.
struct Given {
    auth: AuthConfig,
    /// The registry of the image.
    domain: String,
}

#[async_trait]
impl Credentials for Given {
    async fn ask(&self, host: &str, _challenges: &[String]) -> Result<Credential> {
        credential(&self.auth, &self.domain, host)
    }
}

/// What of a request's credentials is for a host: nothing where they are for another.
fn credential(auth: &AuthConfig, domain: &str, host: &str) -> Result<Credential> {
    if !auth.server_address.is_empty() {
        let address = auth.server_address.as_str();
        let address = address.split_once("://").map_or(address, |(_, rest)| rest);
        let server = address.split('/').next().unwrap_or(address);
        // Docker Hub is known by several names.
        let hub = |name: &str| matches!(name, "docker.io" | "index.docker.io" | "registry-1.docker.io");
        if server != host && !(hub(server) && hub(host)) && !(server == domain && hub(domain) && hub(host)) {
            return Ok(Credential::Anonymous);
        }
    }
    if !auth.username.is_empty() {
        return Ok(Credential::Password { username: auth.username.clone(), secret: auth.password.clone() });
    }
    if !auth.identity_token.is_empty() {
        return Ok(Credential::Refresh(auth.identity_token.clone()));
    }
    if !auth.registry_token.is_empty() {
        return Ok(Credential::Header(format!("Bearer {}", auth.registry_token)));
    }
    if auth.auth.is_empty() {
        return Ok(Credential::Anonymous);
    }
    // The secret stays out of the message.
    let wrong = || Error::invalid_argument("the request's auth is not USER:PASSWORD in base64");
    let bytes = base64::engine::general_purpose::STANDARD.decode(auth.auth.trim()).map_err(|_| wrong())?;
    let text = String::from_utf8(bytes).map_err(|_| wrong())?;
    let (username, secret) = text.split_once(':').ok_or_else(wrong)?;
    Ok(Credential::Password {
        username: username.to_owned(),
        secret: secret.trim_end_matches('\0').to_owned(),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn found(id: &str, names: &[&str]) -> Found {
        let facts = Facts {
            id: format!("sha256:{}", id.repeat(64 / id.len())).parse().unwrap(),
            size: 1,
            manifest: Manifest::parse(
                br#"{"schemaVersion":2,"config":{"mediaType":"application/vnd.oci.image.config.v1+json","size":2,
                "digest":"sha256:44136fa355b3678a1146ad16f7e8649e94fb4fc21fe77e8310c060f61caaff8a"},"layers":[]}"#,
            )
            .unwrap(),
            config: ImageConfig::default(),
            document: serde_json::Value::Null,
        };
        Found {
            facts: Arc::new(facts),
            names: names.iter().map(|name| (*name).to_owned()).collect(),
            pinned: false,
        }
    }

    #[test]
    fn an_image_is_found_by_each_of_its_names_and_its_id() {
        let digest = format!("docker.io/library/a@sha256:{}", "d".repeat(64));
        let all = [
            found("ab12", &["docker.io/library/a:latest", &digest]),
            found("ab34", &["r.io/b:1", "odd name"]),
        ];
        let id =
            |name: &str| find(&all, name).unwrap().map(|found| found.facts.id.to_string()[7..11].to_owned());
        for name in ["a", "a:latest", "docker.io/library/a", &digest, "ab12", "sha256:ab12ab"] {
            assert_eq!(id(name).as_deref(), Some("ab12"), "{name}");
        }
        assert_eq!(id("r.io/b:1").as_deref(), Some("ab34"));
        assert_eq!(id("odd name"), None);
        assert_eq!(id("r.io/b"), None, "latest is another");
        assert_eq!(id("ab"), None, "too short");
        let twins = [found("ab12", &[]), found("ab12cd34", &[])];
        assert!(find(&twins, "ab12").is_err(), "more than one begins so");
    }

    #[test]
    fn names_are_told_apart() {
        let digest = format!("r.io/a@sha256:{}", "d".repeat(64));
        let image = found("ab12", &["r.io/a:1", &digest, &format!("sha256:{}", "ab12".repeat(16))]).message();
        assert_eq!((image.repo_tags, image.repo_digests), (vec!["r.io/a:1".to_owned()], vec![digest]));
    }

    #[test]
    fn credentials_go_where_they_are_meant_for_alone() {
        let password = |auth: &AuthConfig, host: &str| match credential(auth, "r.io", host).unwrap() {
            Credential::Password { username, secret } => format!("{username} {secret}"),
            Credential::Refresh(token) => format!("refresh {token}"),
            Credential::Header(value) => value,
            Credential::Anonymous => String::new(),
        };
        let mut auth = AuthConfig { username: "u".into(), password: "p".into(), ..AuthConfig::default() };
        assert_eq!(password(&auth, "r.io"), "u p");
        auth.server_address = "https://other.io/v1/".into();
        assert_eq!(password(&auth, "r.io"), "");
        auth.server_address = "https://r.io".into();
        assert_eq!(password(&auth, "r.io"), "u p");
        auth.server_address = "https://index.docker.io/v1/".into();
        assert_eq!(password(&auth, "registry-1.docker.io"), "u p");
        let encoded = AuthConfig { auth: "dTpwOnE=".into(), ..AuthConfig::default() };
        assert_eq!(password(&encoded, "r.io"), "u p:q");
        let broken = AuthConfig { auth: "dTpwOnE".into(), ..AuthConfig::default() };
        assert!(!credential(&broken, "r.io", "r.io").err().unwrap().to_string().contains("dTpw"));
        let token = AuthConfig { identity_token: "t".into(), ..AuthConfig::default() };
        assert_eq!(password(&token, "r.io"), "refresh t");
        let token = AuthConfig { registry_token: "t".into(), ..AuthConfig::default() };
        assert_eq!(password(&token, "r.io"), "Bearer t");
    }
}
