//! A container's root file system: the mounts of its snapshot, put on `rootfs` in the bundle.

use std::fs::DirBuilder;
use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use proto::containerd::types::Mount;
use shim_api::{Error, Result};

/// Mounts; answers the folder when there was anything to mount. When one mount fails none is left.
///
/// # Errors
/// Those of mount(2), as Unknown: clients have no class for them.
pub(crate) async fn mount(bundle: &Path, mounts: &[Mount]) -> Result<Option<PathBuf>> {
    if mounts.is_empty() {
        return Ok(None);
    }
    let mounts: Vec<sys::mount::Mount> = mounts
        .iter()
        .map(|mount| sys::mount::Mount {
            kind: mount.r#type.clone(),
            source: mount.source.clone(),
            target: mount.target.clone(),
            options: mount.options.clone(),
        })
        .collect();
    let rootfs = bundle.join("rootfs");
    blocking(move || {
        match DirBuilder::new().mode(0o711).create(&rootfs) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => {
                return Err(Error::internal(format!("make {}: {error}", rootfs.display())));
            }
            _ => {}
        }
        if let Err(error) = sys::mount::mount_all(&mounts, &rootfs) {
            let _ = sys::mount::unmount_all(&rootfs);
            return Err(Error::unknown(format!("mount the root file system: {error}")));
        }
        Ok(Some(rootfs))
    })
    .await
}

/// Unmounts everything at and below the folder; nothing mounted is fine.
///
/// # Errors
/// Those of umount(2).
pub(crate) async fn unmount(rootfs: &Path) -> Result<()> {
    let rootfs = rootfs.to_owned();
    blocking(move || unmount_now(&rootfs)).await
}

/// [`unmount`] for a program without a runtime.
pub(crate) fn unmount_now(rootfs: &Path) -> Result<()> {
    sys::mount::unmount_all(rootfs)
        .map_err(|error| Error::unknown(format!("unmount {}: {error}", rootfs.display())))
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    tokio::task::spawn_blocking(work).await.unwrap_or_else(|error| Err(Error::internal(error)))
}
