//! An archive from a stream, into the store.
//!
//! ```text
//!  stream --gzip, zstd or plain--> tar --> blobs, checked against the digests that they are named by
//!                                      --> oci-layout, index.json, manifest.json: in memory, with a limit
//!  then: index --> manifests of the wanted platforms --> labels that keep their children --> unpacked --> named
//! ```
//!
//! The archive is read once, as it comes. It is hostile: names that lead out of it, special files, contradictions and
//! documents of any size are refused, links lead to its own members only, and an end that comes too early is an error.

use std::collections::{BTreeMap, HashSet};
use std::io::{BufRead, BufReader, Cursor, Read};
use std::sync::Arc;

use flate2::Compression;
use flate2::read::GzEncoder;
use oci::image::{
    CONFIG_LIMIT, Descriptor, INDEX_LIMIT, ImageConfig, Index, MANIFEST_LIMIT, Manifest, media_type,
};
use oci::{Digest, Reference};
use proto::containerd::types::transfer::{ImageImportStream, ImageStore, UnpackConfiguration};
use serde::Deserialize;
use tokio::sync::Semaphore;

use super::blobs::{Blobs, Children, Wanted, is_foreign, read_error};
use super::progress::Progress;
use super::store::{NAME, TAG, names};
use super::{Platforms, Transfers, given_up, unpack, unpackers, wire};
use crate::context::RequestContext;
use crate::diff::archive::{Archive, ArchiveError, Kind};
use crate::error::{Error, Result, blocking};
use crate::labels::Labels;
use crate::streaming::End;
use crate::streaming::bytes::{Patience, Receiver, error_of};

/// The most members of an archive.
const MEMBERS: usize = 100_000;
/// The longest name of a member, in bytes.
const NAME_MAX: usize = 4096;
/// The longest chain of links.
const LINKS: usize = 16;
/// How deep indexes may be nested in one another.
const DEPTH: usize = 4;
/// What is read after the end of the tar: padding, and what a compressed stream checks itself by.
const REST: u64 = 16 << 20;
/// Bytes read from the stream at a time.
const BUFFER: usize = 256 << 10;
/// The label of a layer's uncompressed form.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// What containerd notes on an archive's images for itself; never stored.
const SOURCE: &str = "io.containerd.import.ref-source";
const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// What an archive held; its blobs are in the store.
#[derive(Debug)]
pub(super) struct Contents {
    /// The archive as a whole: an index.
    pub(super) index: Descriptor,
    pub(super) document: Index,
}

/// One entry of Docker's manifest.json.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct DockerImage {
    config: String,
    #[serde(default)]
    repo_tags: Option<Vec<String>>,
    #[serde(default)]
    layers: Option<Vec<String>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Layout {
    image_layout_version: String,
}

/// An image of the archive that is to be named, and what is to be unpacked.
pub(super) struct Kept {
    targets: Vec<Descriptor>,
    unpacks: Vec<unpack::Image>,
}

impl Transfers {
    /// Imports an archive's images.
    pub(super) async fn import(
        &self,
        context: &RequestContext,
        from: &ImageImportStream,
        end: End,
        to: ImageStore,
        patience: Patience,
        progress: &Progress,
    ) -> Result<()> {
        progress.say("Importing");
        // Ends what is under way when a part of it fails.
        let stop = patience.stop.child_token();
        let blobs = Blobs::new(self.content.clone(), context.clone(), stop.clone());
        let receiver = Receiver::new(end, patience);
        let (see_through, compress, store) = (from.media_type.is_empty(), from.force_compress, to.clone());
        let (contents, kept) = blocking(move || {
            let mut blobs = blobs;
            let contents = read(receiver, &mut blobs, see_through, compress)?;
            let kept = keep(&blobs, &contents, &store)?;
            Ok((contents, kept))
        })
        .await
        .map_err(|error| error.context("import the archive"))?;
        let gate = Arc::new(Semaphore::new(unpackers()));
        for image in &kept.unpacks {
            self.unpack(context, image, &gate, &stop).await?;
        }
        let whole = names(&to, contents.index.digest.as_str(), None);
        let named = |target: &Descriptor| names(&to, target.digest.as_str(), Some(&target.annotations));
        let mut images = vec![(&contents.index, whole)];
        images.extend(kept.targets.iter().map(|target| (target, named(target))));
        images.retain(|(_, names)| !names.is_empty());
        if images.is_empty() {
            return Err(Error::not_found(
                "the archive has images, but none gets a name: name the destination, or give it a prefix that fits",
            ));
        }
        if stop.is_cancelled() {
            return Err(given_up());
        }
        for (target, names) in images {
            let mut target = wire(target);
            target.annotations.remove(SOURCE);
            for name in self.store(context, &to, &target, names).await? {
                progress.saved(&name, &target);
            }
        }
        progress.say("Completed import");
        Ok(())
    }
}

fn decompress(mut raw: impl Read + 'static) -> Result<Box<dyn BufRead>> {
    let mut head = Vec::new();
    (&mut raw).take(4).read_to_end(&mut head).map_err(|error| read_error("the archive", &error))?;
    let (zipped, zstd) = (head.starts_with(GZIP), head.starts_with(ZSTD));
    let raw = BufReader::with_capacity(BUFFER, Cursor::new(head).chain(raw));
    if zipped {
        let decoder = flate2::bufread::MultiGzDecoder::new(raw);
        return Ok(Box::new(BufReader::with_capacity(BUFFER, decoder)));
    }
    if zstd {
        let decoder = zstd::stream::read::Decoder::with_buffer(raw)
            .map_err(|error| Error::unknown(format!("start the zstd decoder: {error}")))?;
        return Ok(Box::new(BufReader::with_capacity(BUFFER, decoder)));
    }
    Ok(Box::new(raw))
}

fn invalid(message: impl Into<String>) -> Error {
    Error::invalid_argument(message)
}

fn archive_error(error: ArchiveError) -> Error {
    match error {
        ArchiveError::Io(error) => {
            error_of(&error).unwrap_or_else(|| invalid(format!("it is no tar, or is cut short: {error}")))
        }
        error => invalid(format!("it is no tar, or is damaged: {error}")),
    }
}

/// The members of an archive, as far as they matter.
#[derive(Default)]
struct Members {
    /// oci-layout, index.json and manifest.json.
    documents: BTreeMap<String, Vec<u8>>,
    stored: BTreeMap<String, (Digest, u64)>,
    links: BTreeMap<String, String>,
}

/// Reads the whole archive into the store.
pub(super) fn read(
    stream: impl Read + 'static,
    blobs: &mut Blobs,
    see_through: bool,
    compress: bool,
) -> Result<Contents> {
    let stream: Box<dyn BufRead> =
        if see_through { decompress(stream)? } else { Box::new(BufReader::with_capacity(BUFFER, stream)) };
    let mut archive = Archive::new(stream);
    let members = members(&mut archive, blobs)?;
    let mut rest = archive.into_input().take(REST);
    std::io::copy(&mut rest, &mut std::io::sink()).map_err(|error| read_error("its end", &error))?;
    let documents = &members.documents;
    if let (Some(layout), Some(index)) = (documents.get("oci-layout"), documents.get("index.json")) {
        let layout: Layout =
            serde_json::from_slice(layout).map_err(|error| invalid(format!("oci-layout: {error}")))?;
        let version = layout.image_layout_version;
        if !version.starts_with("1.") {
            return Err(invalid(format!("OCI layout version {version} is not supported, 1.x is")));
        }
        let document = Index::parse(index).map_err(|error| invalid(format!("index.json: {error}")))?;
        let index = blobs.put_bytes(index, media_type::OCI_INDEX, "index.json")?;
        return Ok(Contents { index, document });
    }
    match documents.get("manifest.json") {
        Some(manifest) => from_docker(manifest, &members, blobs, compress),
        None if documents.contains_key("oci-layout") => {
            Err(invalid("it has an oci-layout, but no index.json"))
        }
        None => Err(invalid("it has no image: neither oci-layout with index.json nor manifest.json")),
    }
}

fn members(archive: &mut Archive<Box<dyn BufRead>>, blobs: &mut Blobs) -> Result<Members> {
    let mut members = Members::default();
    let mut count = 0;
    while let Some(member) = archive.next().map_err(archive_error)? {
        blobs.go_on()?;
        count += 1;
        if count > MEMBERS {
            return Err(invalid(format!("it has more than {MEMBERS} members")));
        }
        let name = inside("", &member.path)?;
        match member.kind {
            Kind::Folder => {}
            // A symbolic link counts from its own folder, a hard link from the root.
            Kind::Symlink(target) => {
                let base = name.rsplit_once('/').map_or("", |(folder, _)| folder);
                let target = inside(base, &target)?;
                members.links.insert(name, target);
            }
            Kind::HardLink(target) => {
                let target = inside("", &target)?;
                members.links.insert(name, target);
            }
            Kind::File if member.holes.is_none() => members.file(archive, blobs, name, member.size)?,
            _ => return Err(invalid(format!("member {name:?} is neither a plain file nor a link"))),
        }
    }
    if count == 0 {
        return Err(invalid("it is empty"));
    }
    Ok(members)
}

impl Members {
    fn file(&mut self, data: &mut impl Read, blobs: &mut Blobs, name: String, size: u64) -> Result<()> {
        let twice = || invalid(format!("member {name:?} is there twice"));
        if matches!(name.as_str(), "oci-layout" | "index.json" | "manifest.json") {
            if size > MANIFEST_LIMIT {
                return Err(invalid(format!(
                    "{name} of {size} bytes is larger than the limit of {MANIFEST_LIMIT}"
                )));
            }
            let mut bytes = Vec::new();
            data.take(size).read_to_end(&mut bytes).map_err(|error| read_error(&name, &error))?;
            if bytes.len() as u64 != size {
                return Err(invalid(format!("it is cut short within {name}")));
            }
            if self.documents.contains_key(&name) {
                return Err(twice());
            }
            self.documents.insert(name, bytes);
            return Ok(());
        }
        let digest = match name.strip_prefix("blobs/") {
            Some(blob) => {
                let digest = blob.replacen('/', ":", 1);
                Some(Digest::parse(&digest).map_err(|error| invalid(format!("member {name:?}: {error}")))?)
            }
            None => None,
        };
        let wanted = Wanted { size: Some(size), digest, labels: Labels::new() };
        let stored = blobs.put(&mut data.take(size), &wanted, &format!("member {name:?}"))?;
        match self.stored.insert(name.clone(), stored.clone()) {
            Some(before) if before != stored => Err(twice()),
            _ => Ok(()),
        }
    }

    fn find(&self, path: &str) -> Result<&(Digest, u64)> {
        let mut name = inside("", path.as_bytes())?;
        for _ in 0..LINKS {
            match self.links.get(&name) {
                Some(target) => name.clone_from(target),
                None => break,
            }
        }
        self.stored
            .get(&name)
            .ok_or_else(|| invalid(format!("manifest.json names {path:?}, which the archive lacks")))
    }
}

/// The name of a member, or of what a link in the folder `base` leads to, from the archive's root.
fn inside(base: &str, path: &[u8]) -> Result<String> {
    let shown = || {
        let head: String = String::from_utf8_lossy(path).chars().take(80).collect();
        format!("the name {head:?}")
    };
    if path.len() > NAME_MAX {
        return Err(invalid(format!("{} is longer than {NAME_MAX} bytes", shown())));
    }
    let text = std::str::from_utf8(path).map_err(|_| invalid(format!("{} is not UTF-8", shown())))?;
    let out = || invalid(format!("{} leads out of the archive", shown()));
    if text.starts_with('/') {
        return Err(out());
    }
    let mut parts: Vec<&str> = base.split('/').filter(|part| !part.is_empty()).collect();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            // `docker save` links a layer to a sibling's folder; a member's own name never goes up.
            ".." if !base.is_empty() => {
                parts.pop().ok_or_else(out)?;
            }
            ".." => return Err(out()),
            part => parts.push(part),
        }
    }
    Ok(parts.join("/"))
}

/// Makes the manifests, and the index of them, that Docker's form does without.
fn from_docker(manifest: &[u8], members: &Members, blobs: &mut Blobs, compress: bool) -> Result<Contents> {
    let images: Vec<DockerImage> =
        serde_json::from_slice(manifest).map_err(|error| invalid(format!("manifest.json: {error}")))?;
    let mut manifests = Vec::new();
    for image in images {
        let (digest, size) = members.find(&image.config)?.clone();
        let config = Descriptor::new(media_type::DOCKER_CONFIG, digest, size);
        let wrong = |error| invalid(format!("config {:?}: {error}", image.config));
        let document = ImageConfig::parse(&blobs.read(&config.digest, CONFIG_LIMIT)?).map_err(wrong)?;
        let mut layers = Vec::new();
        for path in image.layers.unwrap_or_default() {
            let (digest, size) = members.find(&path)?.clone();
            layers.push(layer(blobs, digest, size, compress)?);
        }
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media_type::DOCKER_MANIFEST.into()),
            config,
            layers,
            annotations: BTreeMap::new(),
        };
        document.diff_ids_for(&manifest).map_err(wrong)?;
        let bytes = json(&manifest)?;
        let mut target = blobs.put_bytes(&bytes, media_type::DOCKER_MANIFEST, "the image's manifest")?;
        target.platform = (!document.platform.os.is_empty()).then_some(document.platform);
        let tags = image.repo_tags.unwrap_or_default();
        if tags.is_empty() {
            manifests.push(target.clone());
        }
        for tag in tags {
            let name = Reference::parse_normalized(&tag)
                .map_err(|error| invalid(format!("image name {tag:?} in manifest.json: {error}")))?
                .with_default_tag();
            let mut target = target.clone();
            let short = name.tag().map_or_else(|| name.to_string(), str::to_owned);
            target.annotations.insert(TAG.into(), short);
            target.annotations.insert(NAME.into(), name.to_string());
            manifests.push(target);
        }
        if manifests.len() > INDEX_LIMIT {
            return Err(invalid(format!("manifest.json has more than {INDEX_LIMIT} names of images")));
        }
    }
    let document = Index { schema_version: 2, media_type: None, manifests, annotations: BTreeMap::new() };
    let index = blobs.put_bytes(&json(&document)?, media_type::OCI_INDEX, "the archive's index")?;
    Ok(Contents { index, document })
}

fn json(document: &impl serde::Serialize) -> Result<Vec<u8>> {
    serde_json::to_vec(document).map_err(|error| Error::internal(format!("encode a document: {error}")))
}

/// A layer of Docker's form: as it is, or compressed, or what is known to be the same compressed.
fn layer(blobs: &mut Blobs, digest: Digest, size: u64, compress: bool) -> Result<Descriptor> {
    let same = format!("labels.\"{UNCOMPRESSED}\"=={digest}");
    for info in blobs.content.list(&blobs.context, &[same])? {
        let Ok(other) = info.digest.parse::<Digest>() else { continue };
        if other != digest && blobs.hold(&other)? {
            let (kind, _) = layer_kind(blobs, &other)?;
            return Ok(Descriptor::new(kind, other, u64::try_from(info.size).unwrap_or(0)));
        }
    }
    let (kind, plain) = layer_kind(blobs, &digest)?;
    if !plain || !compress {
        return Ok(Descriptor::new(kind, digest, size));
    }
    let (file, _) = blobs.open(&digest)?;
    let mut gzip = GzEncoder::new(BufReader::with_capacity(BUFFER, file), Compression::default());
    let labels = [(UNCOMPRESSED.to_owned(), digest.to_string())].into();
    let wanted = Wanted { labels, ..Wanted::default() };
    let (digest, size) = blobs.put(&mut gzip, &wanted, "a compressed layer")?;
    Ok(Descriptor::new(media_type::DOCKER_LAYER_GZIP, digest, size))
}

/// The media type of a layer by its first bytes, and whether it is not compressed.
fn layer_kind(blobs: &Blobs, digest: &Digest) -> Result<(&'static str, bool)> {
    let (file, _) = blobs.open(digest)?;
    let mut head = Vec::new();
    file.take(4).read_to_end(&mut head).map_err(|error| Error::unknown(format!("read {digest}: {error}")))?;
    Ok(match () {
        () if head.starts_with(GZIP) => (media_type::DOCKER_LAYER_GZIP, false),
        () if head.starts_with(ZSTD) => (media_type::DOCKER_LAYER_ZSTD, false),
        () => (media_type::DOCKER_LAYER, true),
    })
}

/// Labels what is wanted so that its children stay, and sees that all of it is there.
pub(super) fn keep(blobs: &Blobs, contents: &Contents, store: &ImageStore) -> Result<Kept> {
    let platforms = Platforms::new(&store.platforms);
    let mut walk =
        Walk { blobs, store, platforms, seen: HashSet::new(), missing: Vec::new(), unpacks: Vec::new() };
    let whole = Children::Index(contents.document.clone());
    blobs.label(&contents.index.digest, whole.labels())?;
    // The archive's list of images is not an image: the limit is for those in it.
    let targets: Vec<Descriptor> = contents
        .document
        .manifests
        .iter()
        .filter(|target| walk.platforms.rank(target).is_some())
        .cloned()
        .collect();
    if targets.is_empty() {
        return Err(Error::not_found("it has no image for the platforms that are wanted"));
    }
    for target in &targets {
        if target.media_type.is_empty() {
            return Err(invalid(format!("its index does not say what {} is", target.digest)));
        }
        if !walk.hold(target)? {
            walk.missing.push(target.clone());
            continue;
        }
        walk.visit(target, true, 0)?;
    }
    if let Some(first) = walk.missing.first() {
        return Err(invalid(format!(
            "it lacks {} of the blobs that its manifests name, first {} ({})",
            walk.missing.len(),
            first.digest,
            first.media_type
        )));
    }
    Ok(Kept { targets, unpacks: walk.unpacks })
}

/// A walk over the documents of an archive.
struct Walk<'a> {
    blobs: &'a Blobs,
    store: &'a ImageStore,
    platforms: Platforms,
    seen: HashSet<Digest>,
    missing: Vec<Descriptor>,
    unpacks: Vec<unpack::Image>,
}

impl Walk<'_> {
    /// Whether a blob is there, and then is what the archive says: it stays from now on.
    fn hold(&self, blob: &Descriptor) -> Result<bool> {
        if !self.blobs.hold(&blob.digest)? {
            return Ok(false);
        }
        let (_, size) = self.blobs.open(&blob.digest)?;
        if size != blob.size {
            return Err(invalid(format!(
                "{} has {size} bytes, but is said to have {}",
                blob.digest, blob.size
            )));
        }
        Ok(true)
    }

    /// Visits a document that is there. One that is not `wanted` is kept for its metadata alone.
    fn visit(&mut self, parent: &Descriptor, wanted: bool, depth: usize) -> Result<()> {
        self.blobs.go_on()?;
        if !self.seen.insert(parent.digest.clone()) {
            return Ok(());
        }
        if depth > DEPTH {
            return Err(invalid(format!("its indexes are nested deeper than {DEPTH}")));
        }
        let children = self.blobs.children(parent)?;
        self.blobs.label(&parent.digest, children.labels())?;
        match children {
            Children::None => {}
            Children::Index(index) => {
                let mut chosen = self.platforms.select(&index);
                if self.store.manifest_limit > 0 {
                    chosen.truncate(self.store.manifest_limit as usize);
                }
                let chosen: HashSet<&Digest> = chosen.into_iter().map(|child| &child.digest).collect();
                let mut found = 0;
                for child in &index.manifests {
                    let chosen = wanted && chosen.contains(&child.digest);
                    // An archive may have some platforms of an index alone; what it has is to be whole.
                    if (chosen || self.store.all_metadata) && self.hold(child)? {
                        found += usize::from(chosen);
                        self.visit(child, chosen, depth + 1)?;
                    }
                }
                if wanted && found == 0 && !index.manifests.is_empty() {
                    return Err(Error::not_found(format!(
                        "index {} has no manifest for the platforms that are wanted, or the archive lacks it",
                        parent.digest
                    )));
                }
            }
            Children::Manifest(manifest) => {
                let layers = manifest.layers.iter().filter(|_| wanted);
                for child in std::iter::once(&manifest.config).chain(layers) {
                    if !self.hold(child)? && wanted && !is_foreign(&child.media_type) {
                        self.missing.push(child.clone());
                    }
                }
                if wanted && self.missing.is_empty() {
                    let unpacks: &[UnpackConfiguration] = &self.store.unpacks;
                    if !unpacks.is_empty() && unpack::is_image(&manifest) {
                        let document = self.blobs.read(&manifest.config.digest, CONFIG_LIMIT)?;
                        self.unpacks.extend(unpack::plan(&document, &manifest, unpacks)?);
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::content::{Content, FOLDER};
    use crate::context::Namespace;
    use crate::metadata::Metadata;

    #[test]
    fn names_stay_in_the_archive() {
        for (base, path, inside_is) in [
            ("", "a/./b//c", Some("a/b/c")),
            ("", "./oci-layout", Some("oci-layout")),
            ("", "a/../b", None),
            ("", "../a", None),
            ("", "/a", None),
            ("a", "../b/layer.tar", Some("b/layer.tar")),
            ("a", "../../b", None),
            ("a", "/b", None),
            ("a/b", "../../c", Some("c")),
        ] {
            assert_eq!(inside(base, path.as_bytes()).ok().as_deref(), inside_is, "{path}");
        }
        assert!(inside("", b"a\xff").is_err());
        assert!(inside("", "x".repeat(NAME_MAX + 1).as_bytes()).is_err());
    }

    /// A store of its own, and an archive in Docker's form.
    struct Fixture {
        _folder: tempfile::TempDir,
        content: Content,
        runtime: tokio::runtime::Runtime,
    }

    impl Fixture {
        fn new() -> Self {
            let folder = tempfile::tempdir().unwrap();
            let metadata = Metadata::open(&folder.path().join("metadata")).unwrap();
            let content =
                Content::open(&folder.path().join(FOLDER), metadata, crate::events::Exchange::default());
            let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
            Fixture { _folder: folder, content: content.unwrap(), runtime }
        }

        fn read(&self, bytes: Vec<u8>, compress: bool) -> Result<Contents> {
            let context = RequestContext::internal(Namespace::new("a").unwrap());
            let entered = self.runtime.enter();
            let mut blobs = Blobs::new(self.content.clone(), context, CancellationToken::new());
            drop(entered);
            read(Cursor::new(bytes), &mut blobs, true, compress)
        }
    }

    fn docker() -> Vec<u8> {
        let id = Digest::sha256_of(b"layer one");
        let config = format!(
            r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{id}","{id}"]}}}}"#
        );
        let manifest =
            br#"[{"Config":"c.json","RepoTags":["busybox"],"Layers":["1/layer.tar","2/layer.tar"]}]"#;
        let mut tar = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        for (name, bytes) in
            [("c.json", config.as_bytes()), ("1/layer.tar", b"layer one"), ("manifest.json", &manifest[..])]
        {
            header.set_size(bytes.len() as u64);
            tar.append_data(&mut header, name, bytes).unwrap();
        }
        header.set_size(0);
        header.set_entry_type(tar::EntryType::Symlink);
        tar.append_link(&mut header, "2/layer.tar", "../1/layer.tar").unwrap();
        tar.into_inner().unwrap()
    }

    #[test]
    fn dockers_form_makes_the_same_manifest_every_time() {
        let fixture = Fixture::new();
        let contents = fixture.read(docker(), false).unwrap();
        let entry = &contents.document.manifests[0];
        assert_eq!(entry.annotations[NAME], "docker.io/library/busybox:latest");
        assert_eq!(entry.annotations[TAG], "latest");
        assert_eq!(fixture.read(docker(), false).unwrap().index, contents.index);
        let compressed = fixture.read(docker(), true).unwrap();
        assert_ne!(compressed.index, contents.index);
        assert_eq!(
            fixture.read(docker(), false).unwrap().index,
            compressed.index,
            "the same is known compressed"
        );
    }

    #[test]
    fn damaged_archives_never_panic() {
        let fixture = Fixture::new();
        let whole = docker();
        let config = ProptestConfig { cases: 64, failure_persistence: None, ..ProptestConfig::default() };
        proptest!(config, |(at in 0..whole.len(), byte in any::<u8>(), cut in 0..whole.len())| {
            let mut bytes = whole.clone();
            bytes[at] = byte;
            let _ = fixture.read(bytes, false);
            // The links come last and are needed, so that no beginning is an image.
            if cut < whole.len() - 1536 {
                prop_assert!(fixture.read(whole[..cut].to_vec(), false).is_err());
            }
        });
    }
}
