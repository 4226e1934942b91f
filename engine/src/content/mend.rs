//! A damaged blob's file replaced by a whole one, under the record that it has.
//!
//! ```text
//!  removed/mend-N --write--> size and digest checked --sync--> on the metadata's writer: is it recorded still? --rename-->
//!  blobs/ALGORITHM/HEX --sync folder
//! ```
//!
//! Invariant: what takes the blob's place has its digest and is on disk. What is left of a kill is removed at the next start
//! with all that is in that folder.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use oci::{Digest, Hasher};

use super::{Content, named};
use crate::error::{Error, Result, blocking};

/// A file that is to take a blob's place. Dropping it leaves the blob as it is.
pub(crate) struct Mending {
    content: Content,
    digest: Digest,
    size: u64,
    written: u64,
    hasher: Hasher,
    file: File,
    path: Temporary,
}

/// A file that goes when nobody has moved it elsewhere.
struct Temporary(PathBuf);

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.0);
    }
}

impl Content {
    /// Begins a new file for a blob of this digest and size.
    pub(crate) async fn mend(&self, digest: &Digest, size: u64) -> Result<Mending> {
        let (content, digest) = (self.clone(), digest.clone());
        blocking(move || {
            let number = content.sequence.fetch_add(1, Ordering::Relaxed);
            let path = content.store.removed_path(&format!("mend-{number}"));
            let file = OpenOptions::new()
                .write(true)
                .create_new(true)
                .open(&path)
                .map_err(|error| Error::io("create", &path, &error))?;
            let hasher = digest.algorithm().hasher();
            Ok(Mending { content, digest, size, written: 0, hasher, file, path: Temporary(path) })
        })
        .await
    }
}

impl Mending {
    /// Appends.
    pub(crate) async fn write(mut self, bytes: Bytes) -> Result<Self> {
        blocking(move || {
            self.file.write_all(&bytes).map_err(|error| Error::io("write", &self.path.0, &error))?;
            self.hasher.update(&bytes);
            self.written += bytes.len() as u64;
            Ok(self)
        })
        .await
    }

    /// Puts the file in the blob's place, if it is the blob.
    pub(crate) async fn finish(self) -> Result<()> {
        let Mending { content, digest, size, written, hasher, file, path } = self;
        let found = hasher.finish();
        if written != size || found != digest {
            return Err(Error::data_loss(format!(
                "what came for {digest} of {size} bytes has {written} bytes and the digest {found}"
            )));
        }
        let path = blocking(move || {
            file.set_permissions(Permissions::from_mode(0o444))
                .and_then(|()| file.sync_all())
                .map_err(|error| Error::io("sync", &path.0, &error))?;
            Ok(path)
        })
        .await?;
        let store = content.store.clone();
        let blob = digest.clone();
        let taken = content
            .metadata
            .commit(move |txn| {
                if named(txn, std::slice::from_ref(&blob))?.is_empty() {
                    return Err(Error::not_found(format!("blob {blob} was removed meanwhile")));
                }
                let to = store.blob_path(&blob);
                let failed = |error: io::Error| Error::io("put the mended blob at", &to, &error);
                // Only a folder cannot be replaced by a rename.
                let taken = match std::fs::symlink_metadata(&to) {
                    Ok(metadata) if metadata.is_dir() => {
                        let aside = path.0.with_extension("folder");
                        std::fs::rename(&to, &aside).map_err(failed)?;
                        Some(aside)
                    }
                    _ => None,
                };
                std::fs::rename(&path.0, &to).map_err(failed)?;
                Ok(taken)
            })
            .await?;
        blocking(move || {
            if let Some(folder) = taken
                && let Err(error) = sys::fs::remove_tree(&folder)
            {
                tracing::warn!(folder = %folder.display(), %error, "what was in a blob's place stays until the next start");
            }
            content.store.sync_name(&digest)
        })
        .await
    }
}
