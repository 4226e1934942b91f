//! Images that are mounted into containers, as they are.
//!
//! Each is mounted once for all containers of a pod (that have the same users), at
//! `<state>/cri/pods/POD/images/SNAPSHOTTER-DIGITS[-USERS]`, from a view that the
//! sandbox's record names by a label, so that it is collected after it. Invariant: nothing of what is mounted lies outside of the
//! image.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use proto::runtime::v1::{ContainerConfig, Mount};
use snapshotter::Kind;

use super::containers::place_in;
use super::runtime::{Runtime, context, gone_is_fine};
use super::spec;
use super::store::Pod;
use crate::error::{Error, Result, blocking};
use crate::snapshots::New;

/// What begins a label that holds a snapshot; a snapshotter, `/` and a name follow.
const HOLDS: &str = "containerd.io/gc.ref.snapshot.";

impl Runtime {
    /// Mounts the images that a container wants, and says in its configuration where; their ids by their places in the container.
    pub(super) async fn mount_images(
        &self,
        pod: &Arc<Pod>,
        config: &mut ContainerConfig,
        snapshotter: &str,
    ) -> Result<BTreeMap<String, String>> {
        let mut ids = BTreeMap::new();
        for mount in &mut config.mounts {
            let Some(image) = mount.image.as_ref().filter(|image| !image.image.is_empty()) else { continue };
            check(mount)?;
            let image = self.image(&image.image).await?;
            let chain = image.chain.as_ref().ok_or_else(|| {
                Error::invalid_argument(format!("image {} has no layers that could be mounted", image.name))
            })?;
            let users = match mount.uid_mappings.is_empty() && mount.gid_mappings.is_empty() {
                true => None,
                false => Some(spec::mapped_as(&mount.uid_mappings, &mount.gid_mappings)?),
            };
            let root = self.mount_image(pod, &image.id, chain, snapshotter, users.as_ref()).await?;
            let (path, sub) = (root.clone(), mount.image_sub_path.clone());
            let place = blocking(move || {
                place_in(&path, &sub).map_err(|error| {
                    Error::invalid_argument(format!(
                        "sub path {sub:?} of the image cannot be mounted: {error}"
                    ))
                })
            })
            .await?;
            mount.host_path = place.display().to_string();
            ids.insert(mount.container_path.clone(), image.id);
        }
        Ok(ids)
    }

    async fn mount_image(
        &self,
        pod: &Arc<Pod>,
        image: &str,
        chain: &oci::Digest,
        snapshotter: &str,
        users: Option<&spec::Users>,
    ) -> Result<std::path::PathBuf> {
        let context = context()?;
        if users.is_some() && !self.remaps(snapshotter) {
            return Err(Error::failed_precondition(format!(
                "snapshotter {snapshotter} gives the files of an image that is mounted no other owners; overlayfs does"
            )));
        }
        let whose = users.map(|users| format!("-{}-{}", users.root().0, users.root().1)).unwrap_or_default();
        let name = format!("{snapshotter}-{}{whose}", chain.hex());
        let at = self.places.pod(&pod.id).join("images").join(&name);
        // One of the pod's containers does it for all.
        let _turn = self.turns.of(&format!("{} {name}", pod.id)).await;
        if sys::mount::is_mountpoint(&at).unwrap_or(false) {
            return Ok(at);
        }
        let key = format!("image-{}-{}{whose}", pod.id, chain.hex());
        let label = format!("{HOLDS}{snapshotter}/{}{whose}", chain.hex());
        let mut sandbox = self.parts.sandboxes.get(&context, &pod.id)?;
        sandbox.labels.insert(label.clone(), key.clone());
        self.parts.sandboxes.update(&context, sandbox, vec![format!("labels.{label}")]).await?;
        let labels = users.into_iter().flat_map(spec::Users::labels).collect();
        let view = New { key: key.clone(), parent: chain.to_string(), labels, kind: Kind::View };
        let mounts = match self.snapshot(&context, snapshotter, view, image).await {
            Err(Error::AlreadyExists(_)) => self.parts.snapshots.mounts(&context, snapshotter, &key).await?,
            mounts => mounts?,
        };
        let folder = at.clone();
        blocking(move || {
            sys::fs::create_dir_all(&folder, 0o700)
                .map_err(|error| Error::io("create folder", &folder, &error))?;
            sys::mount::mount_all(&mounts, &folder)
                .map_err(|error| Error::unknown(format!("mount an image at {}: {error}", folder.display())))
        })
        .await?;
        Ok(at)
    }

    /// Removes the views of a pod's images, which are not mounted any more.
    pub(super) async fn let_images_go(&self, pod: &str) -> Result<()> {
        let context = context()?;
        let sandbox = match self.parts.sandboxes.get(&context, pod) {
            Err(Error::NotFound(_)) => return Ok(()),
            sandbox => sandbox?,
        };
        for (label, key) in &sandbox.labels {
            let Some((snapshotter, _)) = label.strip_prefix(HOLDS).and_then(|rest| rest.split_once('/'))
            else {
                continue;
            };
            gone_is_fine(self.parts.snapshots.remove(&context, snapshotter, key.clone()).await)?;
        }
        Ok(())
    }
}

/// What cannot be asked of a mount of an image.
fn check(mount: &Mount) -> Result<()> {
    let wrong = |what: &str| {
        Err(Error::invalid_argument(format!("the mount of an image at {} {what}", mount.container_path)))
    };
    if !mount.readonly {
        return wrong("is not read-only, which it has to be");
    }
    if !mount.host_path.is_empty() {
        return wrong("names a path of the host, too");
    }
    let sub = Path::new(&mount.image_sub_path);
    if sub.is_absolute() || sub.components().any(|part| part == std::path::Component::ParentDir) {
        return wrong("has a sub path that is absolute or has `..`");
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_is_read_only_and_inside_is_mounted() {
        let mount = |sub: &str| Mount { readonly: true, image_sub_path: sub.into(), ..Mount::default() };
        assert!(check(&mount("")).is_ok() && check(&mount("etc/x")).is_ok());
        for sub in ["/etc", "../x", "a/../../x"] {
            assert!(matches!(check(&mount(sub)), Err(Error::InvalidArgument(_))), "{sub}");
        }
        assert!(check(&Mount { readonly: false, ..mount("") }).is_err());
        assert!(check(&Mount { host_path: "/x".into(), ..mount("") }).is_err());
    }
}
