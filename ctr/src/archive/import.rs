//! Reading an archive into the content store.
//!
//! The tar is read once, as it comes, so a pipe will do. Blobs go straight to the store, each checked against
//! the digest its name promises; only the few documents that say what is what are held in memory.
//!
//! An archive is hostile: names that leave it, special files, duplicates and oversize documents are refused,
//! links are followed within the archive only, and an end that comes too early is an error.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Read};
use std::path::{Component, Path};

use anyhow::{Context, bail, ensure};
use oci::image::{CONFIG_LIMIT, Descriptor, ImageConfig, Index, MANIFEST_LIMIT, Manifest, media_type};
use oci::{Digest, Reference};
use serde::Deserialize;

use crate::archive::{NAME_ANNOTATION, REF_ANNOTATION};
use crate::client::Client;
use crate::content::{self, Wanted, Written};
use crate::progress::{Progress, short};

/// Most members an archive may have.
const MEMBER_LIMIT: usize = 100_000;
/// Longest chain of links that is followed.
const LINK_LIMIT: usize = 16;

/// An image the archive holds, with the name it gives, if any.
#[derive(Debug)]
pub(crate) struct Entry {
    /// Full name.
    pub(crate) name: Option<String>,
    /// A bare tag, to be put after a base name.
    pub(crate) tag: Option<String>,
    pub(crate) target: Descriptor,
}

/// What an archive held; its blobs are in the store now.
#[derive(Debug)]
pub(crate) struct Contents {
    pub(crate) entries: Vec<Entry>,
    /// The index over all entries.
    pub(crate) index: Vec<u8>,
}

/// Opens an archive: a file, or `-` for stdin; gzip and zstd are seen through.
pub(crate) fn open(path: &str) -> anyhow::Result<Box<dyn Read>> {
    let raw: Box<dyn Read> = match path {
        "-" => Box::new(std::io::stdin().lock()),
        path => Box::new(std::fs::File::open(path).with_context(|| format!("cannot open archive {path}"))?),
    };
    decompress(raw).with_context(|| format!("cannot read archive {path}"))
}

fn decompress(raw: Box<dyn Read>) -> std::io::Result<Box<dyn Read>> {
    let mut raw = BufReader::with_capacity(256 << 10, raw);
    let head = raw.fill_buf()?;
    if head.starts_with(&[0x1f, 0x8b]) {
        return Ok(Box::new(flate2::bufread::MultiGzDecoder::new(raw)));
    }
    if head.starts_with(&[0x28, 0xb5, 0x2f, 0xfd]) {
        return Ok(Box::new(zstd::stream::read::Decoder::with_buffer(raw)?));
    }
    Ok(Box::new(raw))
}

/// Stores blobs. The real one talks to an engine; tests have one in memory.
pub(crate) trait Store {
    /// Stores `source`, which must be as `wanted`.
    fn put(&mut self, source: &mut dyn Read, wanted: &Wanted, name: &str) -> anyhow::Result<Written>;
    /// Reads a blob back.
    fn get(&mut self, digest: &Digest, limit: u64) -> anyhow::Result<Vec<u8>>;
}

/// Stores blobs in an engine. To be used off the runtime's own threads.
pub(crate) struct Remote {
    pub(crate) client: Client,
    pub(crate) progress: Progress,
}

impl Store for Remote {
    fn put(&mut self, source: &mut dyn Read, wanted: &Wanted, name: &str) -> anyhow::Result<Written> {
        let label = short(wanted.digest.as_ref().map_or(name, |digest| digest.as_str())).to_owned();
        let item = self.progress.start("import", &label, wanted.size);
        let written = content::write(&self.client, source, wanted, |bytes| item.advance(bytes));
        item.finish(match &written {
            Ok(Written { existed: true, .. }) => "exists",
            Ok(_) => "imported",
            Err(_) => "failed",
        });
        written
    }

    fn get(&mut self, digest: &Digest, limit: u64) -> anyhow::Result<Vec<u8>> {
        tokio::runtime::Handle::current().block_on(content::read(&self.client, digest, limit))
    }
}

/// A regular member that went to the store under a digest of our own finding.
#[derive(Clone, Debug)]
struct Stored {
    descriptor: Descriptor,
    /// The first bytes, by which compression is known.
    head: Vec<u8>,
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

/// Reads the whole archive into `store`.
pub(crate) fn read(archive: Box<dyn Read>, store: &mut dyn Store) -> anyhow::Result<Contents> {
    let mut documents: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    let mut stored: BTreeMap<String, Stored> = BTreeMap::new();
    let mut links: BTreeMap<String, String> = BTreeMap::new();
    let mut tar = tar::Archive::new(archive);
    let mut members = 0;
    for member in tar.entries().context("the archive is no tar")? {
        let mut member = member.context("the archive is no tar, or is cut short")?;
        members += 1;
        ensure!(members <= MEMBER_LIMIT, "the archive has more than {MEMBER_LIMIT} members");
        let kind = member.header().entry_type();
        if kind.is_pax_global_extensions() {
            continue;
        }
        let path = member.path().context("a member of the archive has an unreadable name")?.into_owned();
        let name = inside("", &path)?;
        if kind.is_dir() {
            continue;
        }
        if kind.is_symlink() || kind.is_hard_link() {
            let target =
                member.link_name()?.with_context(|| format!("link {name} has no target"))?.into_owned();
            // A symbolic link counts from its own folder, a hard link from the root.
            let base =
                if kind.is_symlink() { name.rsplit_once('/').map_or("", |(folder, _)| folder) } else { "" };
            let target = inside(base, &target)?;
            links.insert(name, target);
            continue;
        }
        ensure!(
            kind.is_file(),
            "member {name} is neither a file nor a link; an image archive has no such thing"
        );
        let size = member.size();
        let duplicate = documents.contains_key(&name) || stored.contains_key(&name);
        ensure!(!duplicate, "member {name} is there twice");
        if matches!(name.as_str(), "oci-layout" | "index.json" | "manifest.json") {
            ensure!(
                size <= MANIFEST_LIMIT,
                "{name} of {size} bytes is larger than the limit of {MANIFEST_LIMIT}"
            );
            let mut bytes = Vec::new();
            member.read_to_end(&mut bytes)?;
            ensure!(bytes.len() as u64 == size, "the archive is cut short within {name}");
            documents.insert(name, bytes);
        } else if let Some(blob) = name.strip_prefix("blobs/") {
            let digest =
                blob.replacen('/', ":", 1).parse::<Digest>().with_context(|| format!("member {name}"))?;
            let blob = put(store, &mut member, size, Some(digest), &name)?;
            stored.insert(name, blob);
        } else if name.ends_with(".tar") || name.ends_with(".tar.gz") || name.ends_with(".json") {
            let blob = put(store, &mut member, size, None, &name)?;
            stored.insert(name, blob);
        }
    }
    ensure!(members > 0, "the archive is empty");
    if let (Some(layout), Some(index)) = (documents.get("oci-layout"), documents.get("index.json")) {
        let layout: Layout = serde_json::from_slice(layout).context("oci-layout is unreadable")?;
        let version = layout.image_layout_version;
        ensure!(version.starts_with("1."), "OCI layout version {version} is not supported, only 1.x");
        return from_layout(index);
    }
    if let Some(manifest) = documents.get("manifest.json") {
        return from_docker(manifest, &stored, &links, store);
    }
    bail!("the archive is no image: it has neither oci-layout with index.json nor manifest.json")
}

fn put(
    store: &mut dyn Store,
    member: &mut dyn Read,
    size: u64,
    digest: Option<Digest>,
    name: &str,
) -> anyhow::Result<Stored> {
    let mut head = [0; 4];
    let mut filled = 0;
    while filled < head.len() {
        match member.read(&mut head[filled..])? {
            0 => break,
            count => filled += count,
        }
    }
    let head = head[..filled].to_vec();
    let wanted = Wanted { name: Some(name.to_owned()), size: Some(size), digest, ..Wanted::default() };
    let written = store.put(&mut (&head[..]).chain(member), &wanted, name)?;
    Ok(Stored { descriptor: Descriptor::new("", written.digest, written.size), head })
}

/// The name of a member or of a link's target, from the archive's root; refuses what leads out of it.
fn inside(base: &str, path: &Path) -> anyhow::Result<String> {
    let refused =
        || format!("the archive names {:?}, which leads out of it; refused", path.display().to_string());
    let mut parts: Vec<&str> = base.split('/').filter(|part| !part.is_empty()).collect();
    let linked = !base.is_empty();
    for component in path.components() {
        match component {
            Component::CurDir => {}
            Component::Normal(part) => parts.push(part.to_str().with_context(refused)?),
            // docker save links a layer to a sibling's folder; a member's own name never goes up.
            Component::ParentDir if linked => {
                parts.pop().with_context(refused)?;
            }
            _ => bail!(refused()),
        }
    }
    Ok(parts.join("/"))
}

fn from_layout(index: &[u8]) -> anyhow::Result<Contents> {
    let parsed = Index::parse(index).context("index.json")?;
    let entries = parsed
        .manifests
        .into_iter()
        .map(|target| Entry {
            name: target.annotations.get(NAME_ANNOTATION).filter(|name| !name.is_empty()).cloned(),
            tag: target.annotations.get(REF_ANNOTATION).filter(|tag| !tag.is_empty()).cloned(),
            target,
        })
        .collect();
    Ok(Contents { entries, index: index.to_vec() })
}

/// Builds the manifests that Docker's form does without.
fn from_docker(
    manifest: &[u8],
    stored: &BTreeMap<String, Stored>,
    links: &BTreeMap<String, String>,
    store: &mut dyn Store,
) -> anyhow::Result<Contents> {
    let images: Vec<DockerImage> = serde_json::from_slice(manifest).context("manifest.json is unreadable")?;
    let find = |path: &str| -> anyhow::Result<&Stored> {
        let mut name = inside("", Path::new(path))?;
        for _ in 0..LINK_LIMIT {
            match links.get(&name) {
                Some(target) => name.clone_from(target),
                None => break,
            }
        }
        stored.get(&name).with_context(|| format!("manifest.json names {path}, which the archive lacks"))
    };
    let mut entries = Vec::new();
    let mut targets = Vec::new();
    for image in images {
        let config = find(&image.config)?.descriptor.clone();
        let config = Descriptor { media_type: media_type::DOCKER_CONFIG.into(), ..config };
        let document = ImageConfig::parse(&store.get(&config.digest, CONFIG_LIMIT)?)
            .with_context(|| format!("config {}", image.config))?;
        let mut layers = Vec::new();
        for path in image.layers.unwrap_or_default() {
            let layer = find(&path)?;
            let media_type = match &layer.head[..] {
                [0x1f, 0x8b, ..] => media_type::DOCKER_LAYER_GZIP,
                [0x28, 0xb5, 0x2f, 0xfd] => media_type::DOCKER_LAYER_ZSTD,
                _ => media_type::DOCKER_LAYER,
            };
            layers.push(Descriptor { media_type: media_type.into(), ..layer.descriptor.clone() });
        }
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(media_type::DOCKER_MANIFEST.into()),
            config,
            layers,
            annotations: BTreeMap::new(),
        };
        document.diff_ids_for(&manifest)?;
        let bytes = serde_json::to_vec(&manifest)?;
        let digest = Digest::sha256_of(&bytes);
        let wanted =
            Wanted { size: Some(bytes.len() as u64), digest: Some(digest.clone()), ..Wanted::default() };
        store.put(&mut &bytes[..], &wanted, "manifest")?;
        let mut target = Descriptor::of(media_type::DOCKER_MANIFEST, &bytes);
        target.platform = (!document.platform.os.is_empty()).then_some(document.platform);
        targets.push(target.clone());
        let tags = image.repo_tags.unwrap_or_default();
        if tags.is_empty() {
            entries.push(Entry { name: None, tag: None, target });
            continue;
        }
        for tag in tags {
            let name = Reference::parse_normalized(&tag)
                .with_context(|| format!("image name {tag:?} in manifest.json"))?;
            let name = name.with_default_tag().to_string();
            entries.push(Entry { name: Some(name), tag: None, target: target.clone() });
        }
    }
    let index = Index {
        schema_version: 2,
        media_type: Some(media_type::OCI_INDEX.into()),
        manifests: targets,
        annotations: BTreeMap::new(),
    };
    Ok(Contents { entries, index: serde_json::to_vec(&index)? })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[derive(Debug, Default)]
    struct Memory(BTreeMap<Digest, Vec<u8>>);

    impl Store for Memory {
        fn put(&mut self, source: &mut dyn Read, wanted: &Wanted, name: &str) -> anyhow::Result<Written> {
            let mut bytes = Vec::new();
            source.read_to_end(&mut bytes)?;
            let digest = Digest::sha256_of(&bytes);
            let size = bytes.len() as u64;
            ensure!(wanted.size.is_none_or(|wanted| wanted == size), "{name} is cut short");
            ensure!(
                wanted.digest.as_ref().is_none_or(|wanted| *wanted == digest),
                "{name} has digest {digest}"
            );
            let existed = self.0.insert(digest.clone(), bytes).is_some();
            Ok(Written { digest, size, existed })
        }

        fn get(&mut self, digest: &Digest, _: u64) -> anyhow::Result<Vec<u8>> {
            self.0.get(digest).cloned().context("no such blob")
        }
    }

    enum Member<'a> {
        File(&'a str, &'a [u8]),
        Link(&'a str, &'a str),
        Fifo(&'a str),
    }

    fn tar(members: &[Member<'_>]) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        for member in members {
            let mut header = tar::Header::new_gnu();
            header.set_mode(0o644);
            let (name, data): (&str, &[u8]) = match member {
                Member::File(name, data) => (name, data),
                Member::Link(name, target) => {
                    header.set_entry_type(tar::EntryType::Symlink);
                    header.set_link_name_literal(target).unwrap();
                    (name, b"")
                }
                Member::Fifo(name) => {
                    header.set_entry_type(tar::EntryType::Fifo);
                    (name, b"")
                }
            };
            header.set_size(data.len() as u64);
            // The builder refuses hostile names, so they are written by hand.
            header.as_gnu_mut().unwrap().name[..name.len()].copy_from_slice(name.as_bytes());
            header.set_cksum();
            builder.append(&header, data).unwrap();
        }
        builder.into_inner().unwrap()
    }

    fn import(bytes: Vec<u8>) -> anyhow::Result<(Contents, Memory)> {
        let mut memory = Memory::default();
        let archive = decompress(Box::new(std::io::Cursor::new(bytes)))?;
        read(archive, &mut memory).map(|contents| (contents, memory))
    }

    fn docker(config: &[u8]) -> Vec<u8> {
        tar(&[
            Member::File("abc.json", config),
            Member::File("one/layer.tar", b"layer one"),
            Member::Link("two/layer.tar", "../one/layer.tar"),
            Member::File("one/VERSION", b"1.0"),
            Member::File(
                "manifest.json",
                br#"[{"Config":"abc.json","RepoTags":["busybox:test"],"Layers":["one/layer.tar","two/layer.tar"]}]"#,
            ),
        ])
    }

    fn config() -> Vec<u8> {
        let id = Digest::sha256_of(b"layer one");
        format!(r#"{{"architecture":"amd64","os":"linux","rootfs":{{"type":"layers","diff_ids":["{id}","{id}"]}}}}"#).into()
    }

    #[test]
    fn reads_what_docker_save_wrote() {
        let (contents, memory) = import(docker(&config())).unwrap();
        assert_eq!(contents.entries.len(), 1);
        assert_eq!(contents.entries[0].name.as_deref(), Some("docker.io/library/busybox:test"));
        let manifest = Manifest::parse(&memory.0[&contents.entries[0].target.digest]).unwrap();
        assert_eq!(manifest.layers.len(), 2);
        assert_eq!(manifest.layers[0], manifest.layers[1]);
        assert_eq!(manifest.layers[0].media_type, media_type::DOCKER_LAYER);
        // Twice the same archive is twice the same image.
        let (again, _) = import(docker(&config())).unwrap();
        assert_eq!(again.entries[0].target, contents.entries[0].target);
        assert!(import(docker(b"{}")).is_err(), "layers and diff ids must pair");
    }

    #[test]
    fn compression_is_seen_through() {
        let plain = docker(&config());
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gzip, &plain).unwrap();
        assert_eq!(import(gzip.finish().unwrap()).unwrap().0.entries.len(), 1);
        assert_eq!(import(zstd::encode_all(&plain[..], 1).unwrap()).unwrap().0.entries.len(), 1);
    }

    #[test]
    fn reads_an_oci_layout() {
        let blob = b"{}";
        let digest = Digest::sha256_of(blob);
        let path = format!("blobs/sha256/{}", digest.hex());
        let index = format!(
            r#"{{"schemaVersion":2,"manifests":[{{"mediaType":"m","digest":"{digest}","size":2,"annotations":{{"{REF_ANNOTATION}":"v1"}}}}]}}"#
        );
        let layout = Member::File("./oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#);
        let (contents, memory) =
            import(tar(&[Member::File(&path, blob), layout, Member::File("index.json", index.as_bytes())]))
                .unwrap();
        assert_eq!(contents.entries[0].tag.as_deref(), Some("v1"));
        assert!(memory.0.contains_key(&digest));
        let error = import(tar(&[Member::File(&path, b"other")])).unwrap_err();
        assert!(format!("{error:#}").contains("has digest"), "{error:#}");
    }

    #[test]
    fn hostile_members_are_refused() {
        for (members, why) in [
            (vec![Member::File("../evil.tar", b"x")], "leads out"),
            (vec![Member::File("a/../../evil.tar", b"x")], "leads out"),
            (vec![Member::File("/etc/evil.tar", b"x")], "leads out"),
            (vec![Member::Link("a/layer.tar", "../../../etc/passwd")], "leads out"),
            (vec![Member::Link("a/layer.tar", "/etc/passwd")], "leads out"),
            (vec![Member::Fifo("f.tar")], "neither a file nor a link"),
            (vec![Member::File("a.tar", b"x"), Member::File("a.tar", b"y")], "twice"),
            (vec![Member::File("blobs/sha256/zz", b"x")], "digest"),
            (vec![Member::File("readme", b"x")], "no image"),
            (vec![Member::File("manifest.json", br#"[{"Config":"no.json"}]"#)], "lacks"),
        ] {
            let error = format!("{:#}", import(tar(&members)).unwrap_err());
            assert!(error.contains(why), "{error} lacks {why:?}");
        }
    }

    #[test]
    fn short_archives_are_refused() {
        let whole = docker(&config());
        for cut in [0, 100, 600, 1100, 1700] {
            assert!(import(whole[..cut].to_vec()).is_err(), "{cut}");
        }
        assert!(import(b"this is no tar at all".repeat(100)).is_err());
    }

    proptest! {
        #[test]
        fn noise_never_panics(bytes in prop::collection::vec(any::<u8>(), 0..2000)) {
            let _ = import(bytes);
        }

        #[test]
        fn a_damaged_archive_never_panics(at in 0usize..4000, byte in any::<u8>()) {
            let mut bytes = docker(&config());
            let at = at % bytes.len();
            bytes[at] = byte;
            let _ = import(bytes);
        }
    }
}
