//! Objects of a registry one at a time, for those who look at what it has.
//!
//! Invariants: what is read is not kept. Each object is described by the registry first (a manifest within its limit), gives no
//! more bytes than that says, and has its digest, or its reader hears of it at the end. A request ends when its client has gone,
//! or has read nothing for [`IDLE`].

use std::sync::Arc;

use bytes::Bytes;
use oci::Digest;
use oci::image::{Descriptor, MANIFEST_LIMIT, media_type};
use proto::containerd::types::transfer::OciRegistry;
use tokio::sync::mpsc;

use super::{IDLE, Transfers, given_up};
use crate::context::RequestContext;
use crate::error::{Error, Result, blocking};
use crate::remotes::{Pushed, Repository, Source};

/// Pieces that wait for their reader.
const PIECES: usize = 4;

impl Transfers {
    /// The bytes of objects of a repository, one after the other; of what the reference names for none. They are asked for by
    /// this media type, unless it is empty.
    pub fn fetch_objects(
        &self,
        context: &RequestContext,
        from: OciRegistry,
        digests: Vec<Digest>,
        media_type: String,
    ) -> Result<mpsc::Receiver<Result<Bytes>>> {
        let slot = self.slot(context)?;
        let from = self.repository(context, from)?;
        let (pieces, reader) = mpsc::channel(PIECES);
        tokio::spawn(async move {
            let _slot = slot;
            let read = read(&from, digests, &media_type, &pieces);
            let read = tokio::select! {
                () = pieces.closed() => return,
                read = read => read,
            };
            if let Err(error) = read {
                let _ = pieces.send_timeout(Err(error), IDLE).await;
            }
        });
        Ok(reader)
    }

    /// Pushes a blob of the store as what its media type says. Given up when it is dropped.
    pub async fn push_object(
        &self,
        context: &RequestContext,
        to: OciRegistry,
        digest: Digest,
        media_type: &str,
    ) -> Result<Pushed> {
        let _slot = self.slot(context)?;
        let to = self.repository(context, to)?;
        let (content, of_caller, wanted) = (self.content.clone(), context.clone(), digest.clone());
        if is_document(media_type) {
            let bytes = blocking(move || content.read_document(&of_caller, &wanted, MANIFEST_LIMIT)).await?;
            let by_tag = to.reference().digest().is_none_or(|named| *named == digest);
            let manifest = Descriptor::new(media_type, digest, bytes.len() as u64);
            return to.push_manifest(&manifest, bytes.into(), by_tag).await;
        }
        let (file, size) = blocking(move || content.open_blob(&of_caller, &wanted)).await?;
        let source = Source { file: Arc::new(file), sent: Arc::default() };
        to.push_blob(&Descriptor::new(media_type, digest, size), &source, &[]).await
    }
}

fn is_document(kind: &str) -> bool {
    media_type::is_index(kind) || media_type::is_manifest(kind)
}

async fn read(
    from: &Repository,
    digests: Vec<Digest>,
    media_type: &str,
    pieces: &mpsc::Sender<Result<Bytes>>,
) -> Result<()> {
    if digests.is_empty() {
        return read_one(from, from.resolve().await?, media_type, pieces).await;
    }
    let folders: &[&str] = match media_type {
        // In this order: Debian's registry answers 500 when it is asked for a config among the manifests.
        "" => &["blobs", "manifests"],
        kind if is_document(kind) => &["manifests"],
        _ => &["blobs"],
    };
    for digest in &digests {
        read_one(from, from.describe(digest, folders).await?, media_type, pieces).await?;
    }
    Ok(())
}

async fn read_one(
    from: &Repository,
    mut wanted: Descriptor,
    media_type: &str,
    pieces: &mpsc::Sender<Result<Bytes>>,
) -> Result<()> {
    if !media_type.is_empty() {
        media_type.clone_into(&mut wanted.media_type);
    }
    let mut body = from.fetch(&wanted, 0, None).await?;
    let mut hasher = wanted.digest.algorithm().hasher();
    while let Some(bytes) = body.chunk().await? {
        hasher.update(&bytes);
        pieces.send_timeout(Ok(bytes), IDLE).await.map_err(|_| given_up())?;
    }
    let found = hasher.finish();
    if found != wanted.digest {
        return Err(Error::failed_precondition(format!(
            "fetch {} of {}: the bytes that came have the digest {found}; the registry, or who stands before it, gave something \
             else",
            wanted.digest,
            from.reference().name()
        )));
    }
    Ok(())
}
