//! Writing images into an archive.
//!
//! The tar is the same for the same images: members are sorted, and owner, time and mode are fixed. It is an
//! OCI layout, with Docker's manifest.json where an image has one manifest, so that `docker load` takes it.

use std::collections::BTreeMap;
use std::io::{Read, Write};

use anyhow::{Context, ensure};
use bytes::Bytes;
use oci::Reference;
use oci::image::{Descriptor, Index, Manifest, media_type};
use proto::containerd::services::content::v1::{ReadContentRequest, ReadContentResponse};
use tokio::runtime::Handle;

use crate::archive::{NAME_ANNOTATION, REF_ANNOTATION};
use crate::client::{Client, Failure};

/// An image to be written.
pub(crate) struct Image {
    pub(crate) name: String,
    pub(crate) target: Descriptor,
    /// Every blob of it.
    pub(crate) blobs: Vec<Descriptor>,
    /// Its manifest, where Docker's form can have it.
    pub(crate) manifest: Option<Manifest>,
}

/// Writes the archive. Blocks: call it off the runtime's own threads.
pub(crate) fn write(
    client: &Client,
    images: &[Image],
    out: impl Write,
    mut advance: impl FnMut(&Descriptor),
) -> anyhow::Result<()> {
    let mut tar = tar::Builder::new(out);
    let blobs: BTreeMap<&str, &Descriptor> =
        images.iter().flat_map(|image| &image.blobs).map(|blob| (blob.digest.as_str(), blob)).collect();
    for blob in blobs.values() {
        let mut source = Blob::open(client, blob)?;
        tar.append_data(&mut header(blob.size), blob_path(blob), &mut source)
            .with_context(|| format!("cannot export content {}", blob.digest))?;
        source.check()?;
        advance(blob);
    }
    for (name, bytes) in documents(images)? {
        tar.append_data(&mut header(bytes.len() as u64), name, &bytes[..])?;
    }
    tar.into_inner()?.flush()?;
    Ok(())
}

fn blob_path(blob: &Descriptor) -> String {
    format!("blobs/{}/{}", blob.digest.algorithm(), blob.digest.hex())
}

fn header(size: u64) -> tar::Header {
    let mut header = tar::Header::new_gnu();
    header.set_mode(0o444);
    header.set_size(size);
    header.set_mtime(0);
    header.set_uid(0);
    header.set_gid(0);
    header
}

/// index.json, manifest.json and oci-layout, in order of their names.
fn documents(images: &[Image]) -> anyhow::Result<Vec<(&'static str, Vec<u8>)>> {
    let manifests = images
        .iter()
        .map(|image| {
            let mut target = image.target.clone();
            target.annotations.insert(NAME_ANNOTATION.into(), image.name.clone());
            let tag =
                Reference::parse_normalized(&image.name).ok().and_then(|name| name.tag().map(str::to_owned));
            if let Some(tag) = tag {
                target.annotations.insert(REF_ANNOTATION.into(), tag);
            }
            target
        })
        .collect();
    let index = Index {
        schema_version: 2,
        media_type: Some(media_type::OCI_INDEX.into()),
        manifests,
        annotations: BTreeMap::new(),
    };
    let mut documents = vec![("index.json", serde_json::to_vec(&index)?)];
    let mut docker: Vec<(String, Vec<String>, Vec<String>)> = Vec::new();
    for image in images {
        let Some(manifest) = &image.manifest else { continue };
        let config = blob_path(&manifest.config);
        let name = Reference::parse_normalized(&image.name)
            .map_or_else(|_| image.name.clone(), |name| name.familiar());
        match docker.iter_mut().find(|(known, _, _)| *known == config) {
            Some((_, names, _)) => names.push(name),
            None => docker.push((config, vec![name], manifest.layers.iter().map(blob_path).collect())),
        }
    }
    if !docker.is_empty() {
        let entries: Vec<_> = docker
            .into_iter()
            .map(|(config, names, layers)| serde_json::json!({"Config": config, "RepoTags": names, "Layers": layers}))
            .collect();
        documents.push(("manifest.json", serde_json::to_vec(&entries)?));
    }
    documents.push(("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#.to_vec()));
    Ok(documents)
}

/// A blob as it comes from the engine, checked on the way.
struct Blob {
    stream: tonic::Streaming<ReadContentResponse>,
    pending: Bytes,
    descriptor: Descriptor,
    hasher: oci::Hasher,
}

impl Blob {
    fn open(client: &Client, descriptor: &Descriptor) -> anyhow::Result<Blob> {
        let request = ReadContentRequest { digest: descriptor.digest.to_string(), offset: 0, size: 0 };
        let stream = Handle::current()
            .block_on(client.content().read(request))
            .map_err(|status| Failure::new(format!("read content {}", descriptor.digest), status))?
            .into_inner();
        let hasher = descriptor.digest.algorithm().hasher();
        Ok(Blob { stream, pending: Bytes::new(), descriptor: descriptor.clone(), hasher })
    }

    fn check(self) -> anyhow::Result<()> {
        let found = self.hasher.finish();
        let wanted = &self.descriptor.digest;
        ensure!(
            found == *wanted,
            "content {wanted} is damaged in the store, or of another size than its manifest says"
        );
        Ok(())
    }
}

impl Read for Blob {
    fn read(&mut self, buffer: &mut [u8]) -> std::io::Result<usize> {
        while self.pending.is_empty() {
            match Handle::current().block_on(self.stream.message()) {
                Ok(Some(part)) => self.pending = part.data,
                Ok(None) => return Ok(0),
                Err(status) => return Err(std::io::Error::other(status.message().to_owned())),
            }
        }
        let count = buffer.len().min(self.pending.len());
        let part = self.pending.split_to(count);
        buffer[..count].copy_from_slice(&part);
        self.hasher.update(&part);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn documents_name_the_images() {
        let config = Descriptor::of(media_type::OCI_CONFIG, b"c");
        let manifest = Manifest {
            schema_version: 2,
            media_type: None,
            config: config.clone(),
            layers: vec![],
            annotations: BTreeMap::new(),
        };
        let image = |name: &str| Image {
            name: name.into(),
            target: Descriptor::of(media_type::OCI_MANIFEST, b"m"),
            blobs: vec![],
            manifest: Some(manifest.clone()),
        };
        let documents = documents(&[image("docker.io/library/busybox:1"), image("not a reference")]).unwrap();
        let text = |n: usize| serde_json::from_slice::<serde_json::Value>(&documents[n].1).unwrap();
        assert_eq!(text(0)["manifests"][0]["annotations"][REF_ANNOTATION], "1");
        assert_eq!(text(0)["manifests"][1]["annotations"][NAME_ANNOTATION], "not a reference");
        assert_eq!(text(1)[0]["RepoTags"], serde_json::json!(["busybox:1", "not a reference"]));
        assert_eq!(text(1)[0]["Config"], format!("blobs/sha256/{}", config.digest.hex()));
        assert_eq!(documents[2].0, "oci-layout");
    }
}
