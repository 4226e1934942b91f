//! Blobs for a transfer: written as they come, read with a limit, labelled for what they refer to.
//!
//! All of it blocks: it is called by tar, off the runtime's own threads.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, Read};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use oci::Digest;
use oci::image::{Descriptor, Index, MANIFEST_LIMIT, Manifest, media_type};
use proto::containerd::services::content::v1::Info;
use tokio::runtime::Handle;
use tokio_util::sync::CancellationToken;

use super::given_up;
use crate::content::{Content, Writer};
use crate::context::RequestContext;
use crate::error::{Error, Result};
use crate::labels::Labels;
use crate::streaming::bytes::error_of;

/// Bytes given to the store at a time.
const CHUNK: usize = 1 << 20;
/// The beginning of labels that keep other blobs.
const REFERENCE: &str = "containerd.io/gc.ref.content";

/// What a blob must turn out to be.
#[derive(Debug, Default)]
pub(super) struct Wanted {
    pub(super) size: Option<u64>,
    pub(super) digest: Option<Digest>,
    /// Labels that it gets if it is new.
    pub(super) labels: Labels,
}

/// The content of one namespace, under the transfer's lease.
pub(super) struct Blobs {
    pub(super) content: Content,
    pub(super) context: RequestContext,
    runtime: Handle,
    stop: CancellationToken,
    /// What the refs of this transfer's ingests begin with.
    prefix: String,
    count: u64,
}

impl Blobs {
    /// To be called on the runtime.
    pub(super) fn new(content: Content, context: RequestContext, stop: CancellationToken) -> Self {
        Blobs {
            content,
            context,
            runtime: Handle::current(),
            stop,
            prefix: format!("transfer-{}", unique()),
            count: 0,
        }
    }

    /// Cancelled once the caller has gone.
    pub(super) fn go_on(&self) -> Result<()> {
        if self.stop.is_cancelled() { Err(given_up()) } else { Ok(()) }
    }

    /// Stores what `source` has, which must be as wanted, and `what` in messages. The source is read to its end even if the
    /// blob is there: it is checked, and an archive goes on behind it.
    pub(super) fn put(
        &mut self,
        source: &mut dyn Read,
        wanted: &Wanted,
        what: &str,
    ) -> Result<(Digest, u64)> {
        self.count += 1;
        let reference = format!("{}-{}", self.prefix, self.count);
        let opened = self.runtime.block_on(self.content.writer(
            &self.context,
            reference.clone(),
            wanted.size.unwrap_or(0),
            wanted.digest.clone(),
        ));
        let writer = match opened {
            Ok(writer) => Some(writer),
            Err(Error::AlreadyExists(_)) => None,
            Err(error) => return Err(error.context(what)),
        };
        let begun = writer.is_some();
        let written = self.write(source, wanted, writer, what);
        if written.is_err() && begun {
            // Best effort: without the lease it goes by itself.
            let _ = self.runtime.block_on(self.content.abort(&self.context, reference));
        }
        written
    }

    fn write(
        &self,
        source: &mut dyn Read,
        wanted: &Wanted,
        mut writer: Option<Writer>,
        what: &str,
    ) -> Result<(Digest, u64)> {
        let algorithm = wanted.digest.as_ref().map_or(oci::Algorithm::Sha256, Digest::algorithm);
        // Another namespace's blob, complete as it is.
        let complete = writer.as_ref().is_some_and(|writer| writer.offset() > 0);
        let mut hasher = algorithm.hasher();
        let mut size = 0_u64;
        let mut chunk = vec![0; CHUNK.min(wanted.size.map_or(CHUNK, |size| size.max(1) as usize))];
        loop {
            self.go_on()?;
            let filled = fill(source, &mut chunk).map_err(|error| read_error(what, &error))?;
            if filled == 0 {
                break;
            }
            size += filled as u64;
            hasher.update(&chunk[..filled]);
            if let Some(writer) = writer.as_mut().filter(|_| !complete) {
                writer.write(&chunk[..filled]).map_err(|error| error.context(what))?;
            }
        }
        if let Some(wanted) = wanted.size.filter(|wanted| *wanted != size) {
            return Err(Error::invalid_argument(format!("{what} is cut short: {size} of {wanted} bytes")));
        }
        let digest = hasher.finish();
        if let Some(wanted) = wanted.digest.as_ref().filter(|wanted| **wanted != digest) {
            return Err(Error::invalid_argument(format!(
                "{what}: its bytes have the digest {digest}, not {wanted}"
            )));
        }
        if let Some(writer) = writer {
            let committed =
                self.runtime.block_on(writer.commit(size, Some(digest.clone()), wanted.labels.clone()));
            match committed {
                Ok(_) | Err(Error::AlreadyExists(_)) => {}
                Err(error) => return Err(error.context(what)),
            }
        }
        Ok((digest, size))
    }

    /// Stores bytes that are in memory.
    pub(super) fn put_bytes(&mut self, bytes: &[u8], media_type: &str, what: &str) -> Result<Descriptor> {
        let descriptor = Descriptor::of(media_type, bytes);
        let wanted = Wanted {
            size: Some(descriptor.size),
            digest: Some(descriptor.digest.clone()),
            labels: Labels::new(),
        };
        self.put(&mut &bytes[..], &wanted, what)?;
        Ok(descriptor)
    }

    /// A blob's file, and its size.
    pub(super) fn open(&self, digest: &Digest) -> Result<(File, u64)> {
        self.content.open_blob(&self.context, digest)
    }

    /// A whole blob of at most `limit` bytes, its digest checked.
    pub(super) fn read(&self, digest: &Digest, limit: u64) -> Result<Vec<u8>> {
        self.content.read_document(&self.context, digest, limit)
    }

    /// Whether the namespace has a blob, which the transfer's lease holds from now on.
    pub(super) fn hold(&self, digest: &Digest) -> Result<bool> {
        self.runtime.block_on(self.content.join(&self.context, digest))
    }

    /// Sets labels of a blob, and leaves its others.
    pub(super) fn label(&self, digest: &Digest, labels: Labels) -> Result<()> {
        if labels.is_empty() {
            return Ok(());
        }
        self.runtime.block_on(label(&self.content, &self.context, digest, labels))
    }

    /// What a blob refers to: manifests of an index, config and layers of a manifest, nothing of anything else.
    pub(super) fn children(&self, parent: &Descriptor) -> Result<Children> {
        let wrong = |error: oci::image::ImageError| {
            Error::invalid_argument(format!("{} ({}): {error}", parent.digest, parent.media_type))
        };
        if media_type::is_index(&parent.media_type) {
            let bytes = self.read(&parent.digest, MANIFEST_LIMIT)?;
            return Ok(Children::Index(Index::parse(&bytes).map_err(wrong)?));
        }
        if media_type::is_manifest(&parent.media_type) {
            let bytes = self.read(&parent.digest, MANIFEST_LIMIT)?;
            return Ok(Children::Manifest(Box::new(Manifest::parse(&bytes).map_err(wrong)?)));
        }
        Ok(Children::None)
    }
}

/// Sets labels of a blob, and leaves its others.
pub(super) async fn label(
    content: &Content,
    context: &RequestContext,
    digest: &Digest,
    labels: Labels,
) -> Result<()> {
    let mask = labels.keys().map(|key| format!("labels.{key}")).collect();
    let info = Info { digest: digest.to_string(), labels, ..Info::default() };
    content.update(context, info, mask).await.map(drop)
}

/// What a document is, and so what it refers to.
pub(super) enum Children {
    Index(Index),
    Manifest(Box<Manifest>),
    None,
}

impl Children {
    /// All of them.
    pub(super) fn all(&self) -> Vec<&Descriptor> {
        match self {
            Children::Index(index) => index.manifests.iter().collect(),
            Children::Manifest(manifest) => {
                std::iter::once(&manifest.config).chain(&manifest.layers).collect()
            }
            Children::None => Vec::new(),
        }
    }

    /// The labels that keep them: `m.0...` for manifests, `config`, `l.0...` for layers, a number for others.
    pub(super) fn labels(&self) -> Labels {
        let mut labels = Labels::new();
        let mut counts: BTreeMap<&str, usize> = BTreeMap::new();
        for child in self.all() {
            let kind = match child.media_type.as_str() {
                kind if media_type::is_config(kind) => ".config",
                kind if media_type::is_manifest(kind) => ".m.",
                kind if media_type::is_layer(kind) => ".l.",
                _ => ".",
            };
            let count = counts.entry(kind).or_default();
            let number = if *count > 0 || kind.ends_with('.') { count.to_string() } else { String::new() };
            labels.insert(format!("{REFERENCE}{kind}{number}"), child.digest.to_string());
            *count += 1;
        }
        labels
    }
}

/// Whether a layer may not be given on, so that archives may lack it.
pub(super) fn is_foreign(kind: &str) -> bool {
    kind.starts_with("application/vnd.docker.image.rootfs.foreign.diff.tar")
        || kind.starts_with("application/vnd.oci.image.layer.nondistributable.v1.tar")
}

/// What went wrong with reading an archive: its stream, or what it is made of.
pub(super) fn read_error(what: &str, error: &io::Error) -> Error {
    error_of(error).unwrap_or_else(|| Error::invalid_argument(format!("{what} cannot be read: {error}")))
}

/// What no other transfer, of this engine or an earlier one, has for a name.
pub(super) fn unique() -> String {
    static COUNT: AtomicU64 = AtomicU64::new(0);
    let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    format!("{}-{}", now.as_nanos(), COUNT.fetch_add(1, Ordering::Relaxed))
}

/// Reads until `buffer` is full or the source ends.
fn fill(source: &mut dyn Read, buffer: &mut [u8]) -> io::Result<usize> {
    let mut filled = 0;
    while filled < buffer.len() {
        match source.read(&mut buffer[filled..]) {
            Ok(0) => break,
            Ok(count) => filled += count,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
    Ok(filled)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn labels_keep_children_under_containerds_names() {
        let of = |kind: &str, text: &str| Descriptor::of(kind, text.as_bytes());
        let manifest = Children::Manifest(Box::new(Manifest {
            schema_version: 2,
            media_type: None,
            config: of(media_type::OCI_CONFIG, "c"),
            layers: vec![
                of(media_type::OCI_LAYER, "0"),
                of("application/what", "x"),
                of(media_type::OCI_LAYER_ZSTD, "1"),
            ],
            annotations: BTreeMap::new(),
        }));
        let keys: Vec<String> = manifest.labels().into_keys().collect();
        assert_eq!(
            keys,
            ["", "config", "l.0", "l.1"].map(|key| match key {
                "" => format!("{REFERENCE}.0"),
                key => format!("{REFERENCE}.{key}"),
            })
        );
        let index = Children::Index(Index {
            schema_version: 2,
            media_type: None,
            manifests: vec![
                of(media_type::OCI_MANIFEST, "0"),
                of(media_type::OCI_INDEX, "1"),
                of(media_type::DOCKER_MANIFEST, "2"),
            ],
            annotations: BTreeMap::new(),
        });
        let keys: Vec<String> = index.labels().into_keys().collect();
        assert_eq!(keys, [".0", ".m.0", ".m.1"].map(|key| format!("{REFERENCE}{key}")));
    }

    #[test]
    fn foreign_layers_are_known() {
        assert!(is_foreign("application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"));
        assert!(is_foreign("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"));
        assert!(!is_foreign(media_type::OCI_LAYER_GZIP));
    }
}
