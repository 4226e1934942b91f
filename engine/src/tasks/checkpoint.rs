//! A container's state as blobs, and tasks from such.
//!
//! ```text
//!  Checkpoint  shim writes <root>/checkpoints/N/ --packed--> blob ...criu.checkpoint.criu.tar, and the spec as a blob
//!  Create      blob --unpacked--> <work>/checkpoint/ --> the shim, which restores from it when the task is started
//! ```
//!
//! Invariants: what is made for a checkpoint is gone when that has been answered, or at the next start. What is unpacked
//! stays beneath its folder, which nobody but root enters, and holds files and folders alone: a checkpoint may come from
//! anywhere, and what restores it follows links. Nothing that a descriptor says but its digest and type is heeded.

use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message as _;
use prost_types::Any;
use proto::containerd::runc::v1::{CheckpointOptions, Options};
use proto::containerd::types::Descriptor;
use shim_api::task as shim;
use sys::mount::Mount;

use super::Tasks;
use super::task::Task;
use crate::context::RequestContext;
use crate::diff::{Comparison, Layer};
use crate::error::{Error, Result, blocking, outlive};
use crate::labels::Labels;

/// What CRIU wrote, as an archive.
const CHECKPOINT: &str = "application/vnd.containerd.container.criu.checkpoint.criu.tar";
/// The container's spec, as a `google.protobuf.Any`.
const CONFIG: &str = "application/vnd.containerd.container.checkpoint.config.v1+proto";
/// The folder, beneath the root, of checkpoints that are being made.
pub(super) const FOLDER: &str = "checkpoints";
/// How deep a checkpoint's folders may lie.
const DEPTH: usize = 16;

/// The folder of one checkpoint, which goes with this.
struct Scratch(PathBuf);

impl Scratch {
    fn make(folder: &Path) -> Result<Self> {
        static COUNT: AtomicU64 = AtomicU64::new(0);
        let path = folder.join(COUNT.fetch_add(1, Ordering::Relaxed).to_string());
        sys::fs::create_dir(&path, 0o700).map_err(|error| Error::io("create folder", &path, &error))?;
        Ok(Scratch(path))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if let Err(error) = sys::fs::remove_tree(&self.0) {
            tracing::warn!(folder = %self.0.display(), %error, "a checkpoint's files stay until the next start");
        }
    }
}

impl Tasks {
    /// Writes a container's state to the folder that the options name or, where they name none, into the content store; the
    /// descriptors of what is there then. The caller's lease holds it.
    pub async fn checkpoint(
        &self,
        context: &RequestContext,
        id: &str,
        options: Option<Any>,
    ) -> Result<Vec<Descriptor>> {
        let task = self.task(context, id)?;
        let wanted = match &options {
            Some(any) => proto::any::unpack::<CheckpointOptions>(any).map_err(|error| {
                Error::invalid_argument(format!("checkpoint options cannot be decoded: {error}"))
            })?,
            None => CheckpointOptions::default(),
        };
        if !wanted.image_path.is_empty() {
            let path = wanted.image_path;
            outlive(async move { save(&task, path, options).await }).await?;
            return Ok(Vec::new());
        }
        let spec = self.container(context.namespace()?, id)?.spec.unwrap_or_default();
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            let parent = this.checkpoints.clone();
            let folder = blocking(move || Scratch::make(&parent)).await?;
            let saved = save(&task, folder.0.display().to_string(), options).await;
            let kept = match saved {
                Ok(()) => this.keep_checkpoint(&context, &folder.0, &spec).await,
                Err(error) => Err(error),
            };
            // It is as large as the container's memory: not to be removed on the reactor.
            blocking(move || {
                drop(folder);
                Ok(())
            })
            .await?;
            kept
        })
        .await
    }

    async fn keep_checkpoint(
        &self,
        context: &RequestContext,
        folder: &Path,
        spec: &Any,
    ) -> Result<Vec<Descriptor>> {
        let comparison = Comparison {
            right: vec![plain(folder)],
            media_type: oci::image::media_type::OCI_LAYER.to_owned(),
            ..Comparison::default()
        };
        let packed = self.diff.pack(context, comparison).await?;
        let bytes = spec.encode_to_vec();
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let reference = format!("checkpoint-{}", since.as_nanos());
        let size = bytes.len() as u64;
        let digest = oci::Digest::sha256_of(&bytes);
        let config = Descriptor {
            media_type: CONFIG.to_owned(),
            digest: digest.to_string(),
            size: i64::try_from(size).unwrap_or(i64::MAX),
            ..Descriptor::default()
        };
        let put = async {
            let content = self.diff.content();
            let mut writer = content.writer(context, reference, size, Some(digest.clone())).await?;
            let writer = blocking(move || {
                // Another namespace's blob is whole already.
                if writer.offset() == 0 {
                    writer.write(&bytes)?;
                }
                Ok(writer)
            });
            writer.await?.commit(size, Some(digest), Labels::new()).await
        };
        match put.await {
            Ok(_) | Err(Error::AlreadyExists(_)) => {}
            Err(error) => return Err(error),
        }
        Ok(vec![Descriptor { media_type: CHECKPOINT.to_owned(), ..packed }, config])
    }

    /// The folder to restore from, if a checkpoint is asked for: the one that the options name, or the descriptor's blob,
    /// unpacked. The bundle is there.
    pub(super) async fn restore_from(
        &self,
        context: &RequestContext,
        task: &Task,
        descriptor: Option<Descriptor>,
        options: Option<&Any>,
    ) -> Result<String> {
        let named = options
            .filter(|any| proto::any::is::<Options>(any))
            .and_then(|any| proto::any::unpack::<Options>(any).ok())
            .map(|options| options.criu_image_path)
            .unwrap_or_default();
        let Some(descriptor) = descriptor.filter(|_| named.is_empty()) else { return Ok(named) };
        if descriptor.media_type != CHECKPOINT {
            return Err(Error::invalid_argument(format!(
                "checkpoint {}: it has the media type {:?}, and is to have {CHECKPOINT}",
                descriptor.digest, descriptor.media_type
            )));
        }
        let digest = descriptor.digest;
        let folder = task.bundle.checkpoint();
        let target = folder.clone();
        let made = blocking(move || {
            sys::fs::create_dir(&target, 0o700).map_err(|error| Error::io("create folder", &target, &error))
        });
        made.await?;
        let layer = Layer {
            descriptor: Descriptor {
                media_type: oci::image::media_type::OCI_LAYER.to_owned(),
                digest: digest.clone(),
                ..Descriptor::default()
            },
            mounts: vec![plain(&folder)],
            ..Layer::default()
        };
        self.diff
            .unpack(context, layer)
            .await
            .map_err(|error| error.context(format!("unpack checkpoint {digest}")))?;
        let path = folder.display().to_string();
        blocking(move || check(&folder, DEPTH))
            .await
            .map_err(|error| error.context(format!("checkpoint {digest}")))?;
        Ok(path)
    }
}

async fn save(task: &Task, path: String, options: Option<Any>) -> Result<()> {
    let request = shim::CheckpointTaskRequest { id: task.id.clone(), path, options };
    task.ask(|shim| async move { shim.checkpoint(request).await }).await
}

/// A folder as a mount of itself.
fn plain(folder: &Path) -> Mount {
    Mount {
        kind: "bind".into(),
        source: folder.display().to_string(),
        target: String::new(),
        options: vec!["rbind".into(), "rw".into()],
    }
}

/// Refuses a tree that has anything but files and folders.
fn check(folder: &Path, depth: usize) -> Result<()> {
    let failed = |error: std::io::Error| Error::io("look at", folder, &error);
    for entry in fs::read_dir(folder).map_err(failed)? {
        let entry = entry.map_err(failed)?;
        let kind = entry.file_type().map_err(failed)?;
        if kind.is_dir() && depth > 0 {
            check(&entry.path(), depth - 1)?;
        } else if !kind.is_file() {
            return Err(Error::invalid_argument(format!(
                "{:?} is neither a file nor a folder, or lies too deep, which a checkpoint by CRIU never has",
                entry.file_name().display().to_string()
            )));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_checkpoint_holds_files_and_folders_alone() {
        let folder = tempfile::tempdir().unwrap();
        fs::create_dir(folder.path().join("a")).unwrap();
        fs::write(folder.path().join("a/pages-1.img"), "x").unwrap();
        check(folder.path(), DEPTH).unwrap();
        assert!(matches!(check(folder.path(), 0), Err(Error::InvalidArgument(_))));
        std::os::unix::fs::symlink("/etc/passwd", folder.path().join("a/restore.log")).unwrap();
        let error = check(folder.path(), DEPTH).unwrap_err();
        assert!(error.to_string().contains("restore.log"), "{error}");
    }

    #[test]
    fn what_is_made_for_a_checkpoint_goes_with_it() {
        let folder = tempfile::tempdir().unwrap();
        let scratch = Scratch::make(folder.path()).unwrap();
        fs::write(scratch.0.join("pages-1.img"), "x").unwrap();
        drop(scratch);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
