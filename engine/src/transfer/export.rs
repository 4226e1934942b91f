//! Images from the store, as an archive over a stream.
//!
//! The archive is an OCI layout, with Docker's manifest.json for those who know nothing else. The same images make the same
//! bytes, and one image the bytes that containerd makes of it: members sorted by name, owner and time zero.

use std::collections::{BTreeMap, HashSet};
use std::io::{BufWriter, Read, Write};

use oci::image::{Descriptor, Index, Manifest, media_type};
use oci::{Digest, Reference};
use proto::containerd::services::images::v1::Image;
use proto::containerd::types::transfer::{ImageExportStream, ImageStore};
use serde_json::json;

use super::blobs::{Blobs, Children, is_foreign};
use super::progress::Progress;
use super::store::{NAME, TAG};
use super::{Platforms, Transfers};
use crate::context::RequestContext;
use crate::error::{Error, Result, blocking};
use crate::streaming::End;
use crate::streaming::bytes::{Patience, Sender, error_of};

/// Labels of blobs that begin so are annotations in archives: where they were fetched from.
const SOURCE: &str = "containerd.io/distribution.source";
/// How deep documents may be nested in one another.
const DEPTH: usize = 6;
/// Bytes gathered before they are sent: one message.
const BUFFER: usize = 256 << 10;

impl Transfers {
    /// Exports images by their names.
    pub(super) async fn export(
        &self,
        context: &RequestContext,
        from: &ImageStore,
        to: ImageExportStream,
        end: End,
        patience: Patience,
        progress: &Progress,
    ) -> Result<()> {
        progress.say("Exporting");
        let images = self.lookup(context, from)?;
        let blobs = Blobs::new(self.content.clone(), context.clone(), patience.stop.clone());
        let sender = Sender::new(end, patience);
        blocking(move || {
            let plan = Plan::of(&blobs, &images, &to)?;
            plan.write(&blobs, BufWriter::with_capacity(BUFFER, sender))
        })
        .await
        .map_err(|error| error.context("export"))?;
        progress.say("Completed export");
        Ok(())
    }

    fn lookup(&self, context: &RequestContext, from: &ImageStore) -> Result<Vec<Image>> {
        if from.extra_references.iter().any(|reference| reference.is_prefix) {
            return Err(Error::unimplemented("export by a prefix of names: name each image"));
        }
        let own = Some(&from.name).filter(|name| !name.is_empty());
        let names = own.into_iter().chain(from.extra_references.iter().map(|reference| &reference.name));
        let images = names.map(|name| self.images.get(context, name)).collect::<Result<Vec<_>>>()?;
        if images.is_empty() {
            return Err(Error::invalid_argument("export: the source names no image"));
        }
        Ok(images)
    }
}

/// What an archive is to hold, all of it known to be there.
#[derive(Default)]
struct Plan {
    blobs: BTreeMap<Digest, Descriptor>,
    /// What index.json lists.
    targets: Vec<Descriptor>,
    /// What manifest.json lists: manifests, with the names of their images.
    docker: Vec<(Manifest, Vec<String>)>,
    skip_docker: bool,
}

impl Plan {
    fn of(blobs: &Blobs, images: &[Image], to: &ImageExportStream) -> Result<Plan> {
        let mut platforms = Platforms::new(&to.platforms);
        if platforms.wanted.is_empty() {
            platforms = Platforms::of(vec![oci::Platform::host()]);
        }
        let mut plan = Plan { skip_docker: to.skip_compatibility_manifest, ..Plan::default() };
        let mut walk = Walk { blobs, seen: HashSet::new(), skip_foreign: to.skip_non_distributable };
        let mut listed: Vec<Digest> = Vec::new();
        for image in images {
            let target = target(blobs, image)?;
            let best = match walk.document(&mut plan.blobs, &target)? {
                Children::Manifest(manifest) => {
                    walk.all(&mut plan.blobs, &target, 0)?;
                    Some((target.digest.clone(), *manifest))
                }
                Children::Index(index) => {
                    for child in &index.manifests {
                        let fits = platforms.rank(child).is_some();
                        if fits || to.all_platforms {
                            walk.all(&mut plan.blobs, child, 0)?;
                        }
                    }
                    let best = platforms.select(&index).into_iter().next().cloned();
                    match best {
                        Some(best) => match blobs.children(&best)? {
                            Children::Manifest(manifest) => Some((best.digest, *manifest)),
                            _ => None,
                        },
                        None => {
                            return Err(Error::not_found(format!(
                                "image {:?}: {}",
                                image.name,
                                index.no_platform(&platforms.wanted[0])
                            )));
                        }
                    }
                }
                Children::None => {
                    return Err(Error::invalid_argument(format!(
                        "image {:?} is a {}: only indexes and manifests can be exported",
                        image.name, target.media_type
                    )));
                }
            };
            if let Some((digest, manifest)) = best {
                let name = familiar(&image.name);
                match listed.iter().position(|known| *known == digest) {
                    Some(at) => plan.docker[at].1.push(name),
                    None => {
                        listed.push(digest);
                        plan.docker.push((manifest, vec![name]));
                    }
                }
            }
            plan.targets.push(target);
        }
        Ok(plan)
    }

    fn write(&self, blobs: &Blobs, out: impl Write) -> Result<()> {
        let mut tar = tar::Builder::new(out);
        let failed = |what: &str, error: std::io::Error| {
            error_of(&error).unwrap_or_else(|| Error::unknown(format!("{what}: {error}")))
        };
        let mut folders: Vec<String> =
            self.blobs.keys().map(|digest| format!("blobs/{}/", digest.algorithm())).collect();
        folders.push("blobs/".into());
        folders.sort();
        folders.dedup();
        for folder in folders {
            append(&mut tar, &folder, 0o755, 0, &mut std::io::empty())
                .map_err(|error| failed(&folder, error))?;
        }
        for (digest, descriptor) in &self.blobs {
            blobs.go_on()?;
            let (file, _) = blobs.open(digest)?;
            let mut source = Checked { file, hasher: digest.algorithm().hasher() };
            append(&mut tar, &path(digest), 0o444, descriptor.size, &mut source)
                .map_err(|error| failed(digest.as_str(), error))?;
            if source.hasher.finish() != *digest {
                return Err(Error::data_loss(format!(
                    "blob {digest} is damaged; delete it and fetch it again"
                )));
            }
        }
        for (name, mode, bytes) in self.documents()? {
            append(&mut tar, name, mode, bytes.len() as u64, &mut &bytes[..])
                .map_err(|error| failed(name, error))?;
        }
        tar.into_inner().and_then(|mut out| out.flush()).map_err(|error| failed("end the archive", error))
    }

    /// index.json, manifest.json and oci-layout.
    fn documents(&self) -> Result<Vec<(&'static str, u32, Vec<u8>)>> {
        let index = Index {
            schema_version: 2,
            media_type: Some(media_type::OCI_INDEX.into()),
            manifests: self.targets.clone(),
            annotations: BTreeMap::new(),
        };
        let encoded = |error| Error::internal(format!("encode a document: {error}"));
        let mut documents = vec![("index.json", 0o644, serde_json::to_vec(&index).map_err(encoded)?)];
        if !self.skip_docker && !self.docker.is_empty() {
            let entries: Vec<String> = self
                .docker
                .iter()
                .map(|(manifest, names)| {
                    let layers: Vec<String> =
                        manifest.layers.iter().map(|layer| path(&layer.digest)).collect();
                    // In containerd's order of the fields.
                    format!(
                        r#"{{"Config":{},"RepoTags":{},"Layers":{}}}"#,
                        json!(path(&manifest.config.digest)),
                        json!(names),
                        if layers.is_empty() { json!(null) } else { json!(layers) }
                    )
                })
                .collect();
            documents.push(("manifest.json", 0o644, format!("[{}]", entries.join(",")).into_bytes()));
        }
        documents.push(("oci-layout", 0o444, br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
        Ok(documents)
    }
}

/// A walk over an image, which gathers its blobs.
struct Walk<'a> {
    blobs: &'a Blobs,
    seen: HashSet<Digest>,
    skip_foreign: bool,
}

impl Walk<'_> {
    /// Takes one blob, which must be there and as large as it is said to be, and from now on stays.
    fn take(&self, taken: &mut BTreeMap<Digest, Descriptor>, blob: &Descriptor) -> Result<()> {
        if self.skip_foreign && is_foreign(&blob.media_type) {
            return Ok(());
        }
        self.blobs.go_on()?;
        if !self.blobs.hold(&blob.digest)? {
            return Err(Error::not_found(format!(
                "blob {} ({}) of the image is not here; fetch or import it, or choose other platforms",
                blob.digest, blob.media_type
            )));
        }
        let (_, size) = self.blobs.open(&blob.digest)?;
        if size != blob.size {
            return Err(Error::failed_precondition(format!(
                "blob {} has {size} bytes, but the image says {}",
                blob.digest, blob.size
            )));
        }
        taken.insert(blob.digest.clone(), blob.clone());
        Ok(())
    }

    /// Takes one document, and reads it.
    fn document(&self, taken: &mut BTreeMap<Digest, Descriptor>, target: &Descriptor) -> Result<Children> {
        self.take(taken, target)?;
        self.blobs.children(target)
    }

    /// Takes a blob and everything beneath it.
    fn all(
        &mut self,
        taken: &mut BTreeMap<Digest, Descriptor>,
        blob: &Descriptor,
        depth: usize,
    ) -> Result<()> {
        if !self.seen.insert(blob.digest.clone()) {
            return Ok(());
        }
        if depth > DEPTH {
            return Err(Error::invalid_argument(format!("its documents are nested deeper than {DEPTH}")));
        }
        self.take(taken, blob)?;
        for child in self.blobs.children(blob)?.all() {
            self.all(taken, child, depth + 1)?;
        }
        Ok(())
    }
}

/// What an image's record points at, named in the annotations.
fn target(blobs: &Blobs, image: &Image) -> Result<Descriptor> {
    let target = image.target.clone().unwrap_or_default();
    let wrong = |error| Error::data_loss(format!("the target of image {:?}: {error}", image.name));
    let digest = Digest::parse(&target.digest).map_err(wrong)?;
    let mut annotations = target.annotations;
    let info = blobs.content.info(&blobs.context, &digest).map_err(|error| error.context(&image.name))?;
    annotations.extend(info.labels.into_iter().filter(|(key, _)| key.starts_with(SOURCE)));
    annotations.insert(NAME.into(), image.name.clone());
    annotations.insert(TAG.into(), tag(&image.name).to_owned());
    let size = u64::try_from(target.size).unwrap_or(0);
    Ok(Descriptor { annotations, ..Descriptor::new(&target.media_type, digest, size) })
}

/// What stands for a name in an OCI layout: its tag, or all of it when it has none.
fn tag(name: &str) -> &str {
    let Some((_, path)) = name.split_once('/') else { return name };
    match path.find([':', '@']) {
        Some(at) if path[at..].len() > 1 && path[at..].starts_with(':') => &path[at + 1..],
        _ => name,
    }
}

/// The name as Docker shows it.
fn familiar(name: &str) -> String {
    Reference::parse_normalized(name)
        .map_or_else(|_| name.to_owned(), |name| name.with_default_tag().familiar())
}

fn path(digest: &Digest) -> String {
    format!("blobs/{}/{}", digest.algorithm(), digest.hex())
}

/// Appends a member in the bytes that Go's archive/tar writes, as far as the old header goes.
fn append(
    tar: &mut tar::Builder<impl Write>,
    name: &str,
    mode: u32,
    size: u64,
    source: &mut dyn Read,
) -> std::io::Result<()> {
    let mut header = tar::Header::new_ustar();
    let folder = name.ends_with('/');
    header.set_entry_type(if folder { tar::EntryType::Directory } else { tar::EntryType::Regular });
    header.set_mode(mode);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header.set_device_major(0)?;
    header.set_device_minor(0)?;
    let mut source = source.take(size);
    if header.set_path(name).is_err() {
        // The hash is too long for it.
        tar.append_data(&mut header, name, &mut source)?;
    } else {
        header.set_cksum();
        let sum = header.cksum()?;
        header.as_mut_bytes()[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        tar.append(&header, &mut source)?;
    }
    if source.limit() > 0 {
        return Err(std::io::Error::other("it is shorter than it was"));
    }
    Ok(())
}

/// A blob's file, hashed as it is read.
struct Checked {
    file: std::fs::File,
    hasher: oci::Hasher,
}

impl Read for Checked {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        let count = self.file.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_a_tag_or_all_of_itself() {
        for (name, short) in [
            ("docker.io/library/busybox:latest", "latest"),
            ("a.b:5000/c:1", "1"),
            ("a.b:5000/c", "a.b:5000/c"),
            ("a.b/c@sha256:00", "a.b/c@sha256:00"),
            ("a.b/c:1@sha256:00", "1@sha256:00"),
            ("a.b/c:", "a.b/c:"),
            ("busybox:1", "busybox:1"),
        ] {
            assert_eq!(tag(name), short);
        }
    }

    #[test]
    fn documents_have_containerds_bytes() {
        let config = Descriptor::of(media_type::OCI_CONFIG, b"c");
        let manifest = Manifest {
            schema_version: 2,
            media_type: None,
            config: config.clone(),
            layers: vec![config],
            annotations: BTreeMap::new(),
        };
        let plan = Plan {
            targets: vec![Descriptor::of(media_type::OCI_MANIFEST, b"m")],
            docker: vec![(manifest, vec![familiar("docker.io/library/busybox"), familiar("No Reference")])],
            ..Plan::default()
        };
        let documents = plan.documents().unwrap();
        let text = |n: usize| String::from_utf8(documents[n].2.clone()).unwrap();
        assert!(text(0).starts_with(r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.index.v1+json","manifests":[{"mediaType":"#));
        assert!(
            text(1).contains(r#","RepoTags":["busybox:latest","No Reference"],"Layers":["blobs/sha256/"#),
            "{}",
            text(1)
        );
        assert_eq!(text(2), r#"{"imageLayoutVersion":"1.0.0"}"#);
        let plan = Plan { skip_docker: true, ..plan };
        assert_eq!(plan.documents().unwrap().len(), 2);
    }

    #[test]
    fn headers_have_gos_checksum() {
        let mut tar = tar::Builder::new(Vec::new());
        append(&mut tar, "blobs/", 0o755, 0, &mut std::io::empty()).unwrap();
        append(&mut tar, &format!("blobs/sha512/{}", "0".repeat(128)), 0o444, 1, &mut &b"x"[..]).unwrap();
        assert!(append(&mut tar, "short", 0o444, 2, &mut &b"x"[..]).is_err());
        let bytes = tar.into_inner().unwrap();
        assert_eq!(&bytes[..7], b"blobs/\0");
        assert_eq!((bytes[154], bytes[155], bytes[156]), (0, b' ', b'5'));
        assert_eq!(&bytes[257..265], b"ustar\x0000");
        let names: Vec<String> = tar::Archive::new(&bytes[..])
            .entries()
            .unwrap()
            .map_while(|entry| Some(entry.ok()?.path().ok()?.to_string_lossy().into_owned()))
            .collect();
        assert_eq!(names[..2], ["blobs/".to_owned(), format!("blobs/sha512/{}", "0".repeat(128))]);
    }
}
