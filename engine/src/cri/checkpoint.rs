//! A container's checkpoint as one archive, where the kubelet wants it.
//!
//! ```text
//!  spec.dump      the container's spec, JSON
//!  config.dump    what it is: id, name, image, runtime, times, JSON
//!  checkpoint/    what the runtime wrote
//! ```
//!
//! Invariant: the archive is there whole or not at all, and readable by its owner alone: it holds the container's memory.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::Duration;

use proto::containerd::runc::v1::CheckpointOptions;
use proto::runtime::v1::CheckpointContainerRequest;

use super::runtime::{Runtime, context, now};
use crate::error::{Error, Result, blocking, outlive};
use crate::metadata::cri::ContainerStage;

/// How long a checkpoint may take when the kubelet does not say.
const LIMIT: Duration = Duration::from_secs(10 * 60);

impl Runtime {
    /// Writes a running container's state to a file; the container goes on.
    pub async fn checkpoint(&self, request: CheckpointContainerRequest) -> Result<()> {
        let container = self.made_container(&request.container_id)?;
        if container.stage() != ContainerStage::Running {
            return Err(Error::failed_precondition(format!("container {} does not run", container.id)));
        }
        let location = PathBuf::from(&request.location);
        if !location.is_absolute() {
            return Err(Error::invalid_argument(format!(
                "the location of the checkpoint must be an absolute path, and is {:?}",
                request.location
            )));
        }
        let limit = match u64::try_from(request.timeout) {
            Ok(0) | Err(_) => LIMIT,
            Ok(seconds) => Duration::from_secs(seconds),
        };
        let this = self.clone();
        outlive(async move {
            let (context, id, record) = (context()?, container.id.as_str(), container.record());
            let _step = this.step(id, "being checkpointed");
            let folder = this.places.container(id).join(format!("checkpoint-{}", now()));
            let made = folder.clone();
            blocking(move || {
                sys::fs::create_dir_all(&made.join("checkpoint"), 0o700)
                    .map_err(|error| Error::io("create folder", &made, &error))
            })
            .await?;
            let options = CheckpointOptions {
                image_path: folder.join("checkpoint").display().to_string(),
                ..CheckpointOptions::default()
            };
            let options = Some(proto::any::pack(&options));
            let saved = tokio::time::timeout(limit, this.parts.tasks.checkpoint(&context, id, options)).await;
            let saved = match saved {
                Ok(saved) => saved.map(drop),
                Err(_) => {
                    Err(Error::deadline_exceeded(format!("the checkpoint was not written within {limit:?}")))
                }
            };
            let written = match saved {
                Ok(()) => {
                    let of = this.parts.containers.get(&context, id)?;
                    let config = record.config.clone().unwrap_or_default();
                    let about = serde_json::json!({
                        "id": id,
                        "name": config.metadata.unwrap_or_default().name,
                        "rootfsImage": config.image.unwrap_or_default().image,
                        "rootfsImageRef": record.image_ref,
                        "rootfsImageName": of.image,
                        "runtime": of.runtime.map(|runtime| runtime.name),
                        "createdTime": record.created_at,
                        "checkpointedTime": now(),
                    });
                    let (spec, from) = (of.spec.unwrap_or_default().value, folder.clone());
                    blocking(move || write(&location, &from, &spec, &about)).await
                }
                Err(error) => Err(error),
            };
            let _ = blocking(move || {
                sys::fs::remove_tree(&folder).map_err(|error| Error::io("remove", &folder, &error))
            })
            .await
            .inspect_err(
                |error| tracing::warn!(%error, "a checkpoint's files stay until the container is removed"),
            );
            written.map_err(|error| error.context(format!("checkpoint container {}", container.id)))
        })
        .await
    }
}

/// Writes the archive. Blocks.
fn write(location: &Path, from: &Path, spec: &[u8], about: &serde_json::Value) -> Result<()> {
    use std::os::unix::fs::OpenOptionsExt as _;
    let mut name = location.file_name().unwrap_or_default().to_owned();
    name.push(".partial");
    let partial = location.with_file_name(name);
    let failed = |error: std::io::Error| {
        let _ = std::fs::remove_file(&partial);
        Error::io("write the checkpoint", location, &error)
    };
    let write = || {
        let file = File::options().write(true).create(true).truncate(true).mode(0o600).open(&partial)?;
        let mut archive = tar::Builder::new(file);
        archive.follow_symlinks(false);
        let mut add = |name: &str, bytes: &[u8]| {
            let mut header = tar::Header::new_gnu();
            header.set_size(bytes.len() as u64);
            header.set_mode(0o600);
            archive.append_data(&mut header, name, bytes)
        };
        add("spec.dump", spec)?;
        add("config.dump", about.to_string().as_bytes())?;
        archive.append_dir_all("checkpoint", from.join("checkpoint"))?;
        archive.into_inner()?.sync_all()?;
        std::fs::rename(&partial, location)
    };
    write().map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::PermissionsExt as _;

    #[test]
    fn an_archive_is_its_owners_and_whole() {
        let folder = tempfile::tempdir().unwrap();
        let from = folder.path().join("from");
        std::fs::create_dir_all(from.join("checkpoint")).unwrap();
        std::fs::write(from.join("checkpoint/pages-1.img"), "pages").unwrap();
        let to = folder.path().join("out.tar");
        write(&to, &from, b"{}", &serde_json::json!({"id": "x"})).unwrap();
        assert_eq!(to.metadata().unwrap().permissions().mode() & 0o777, 0o600);
        let mut archive = tar::Archive::new(File::open(&to).unwrap());
        let names: Vec<_> =
            archive.entries().unwrap().map(|entry| entry.unwrap().path().unwrap().into_owned()).collect();
        for name in ["spec.dump", "config.dump", "checkpoint/pages-1.img"] {
            assert!(names.iter().any(|other| other == Path::new(name)), "{name}");
        }
        assert!(write(&folder.path().join("none/out.tar"), &from, b"", &serde_json::Value::Null).is_err());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 2);
    }
}
