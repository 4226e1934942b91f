//! Snapshots whose layers are EROFS images, beneath an overlay.
//!
//! ```text
//! <root>/snapshots/<id>/fs             what an active snapshot changed: the upper folder
//! <root>/snapshots/<id>/work           overlayfs' scratch folder
//! <root>/snapshots/<id>/layer.erofs    a layer, which mkfs.erofs made of `fs` at the commit
//! <root>/layers/<id>                   where a layer is mounted while something is stacked on it that has mounts
//! ```
//!
//! What clients get are plain overlays (or binds) of the folders in `layers`, which every client and shim can mount.
//!
//! Invariants: a layer that an active snapshot or a view stands on, however far beneath, is mounted when the mounts of that
//! one are given; no other stays mounted. What a crash or a reboot changed of that is put right: an open takes down what is
//! mounted for nobody, and mounts are looked at each time they are given. Taking one down hurts no container: its overlay
//! holds the layers by itself. An image is on disk, whole, before the record that says that it is a layer.

use std::collections::HashMap;
use std::fs;
use std::io::ErrorKind;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use parking_lot::Mutex;

use crate::folders::{CONTENT, Folders, Layout, Way};
use crate::overlay::{self, WORK};
use crate::store::Record;
use crate::{Error, Kind, Labels, Mount, Result, Usage, io};

pub(crate) const NAME: &str = "erofs";

/// The image of a layer, in its folder.
const IMAGE: &str = "layer.erofs";
pub(crate) const IMAGES: Layout = Layout { layer: IMAGE, remove: sys::fs::remove_tree };
const MKFS: &str = "mkfs.erofs";

/// The erofs snapshotter.
pub struct Erofs {
    folders: Folders,
    /// Options for every overlay mount.
    options: Vec<String>,
    /// How an image is mounted: as a file, or through a loop device.
    image_options: Vec<String>,
    remaps: bool,
    /// Held while layers are mounted and taken down, which goes by this.
    users: Mutex<Users>,
}

/// Which active snapshots and views, there or being made, stand on which layers; all by their numbers.
#[derive(Default)]
struct Users {
    stands_on: HashMap<u64, Vec<u64>>,
    /// How many stand on a layer.
    counts: HashMap<u64, usize>,
}

impl Users {
    fn add(&mut self, user: u64, layers: Vec<u64>) {
        for layer in &layers {
            *self.counts.entry(*layer).or_default() += 1;
        }
        self.stands_on.insert(user, layers);
    }

    /// Takes a user away; the layers that nobody stands on any more.
    fn remove(&mut self, user: u64) -> Vec<u64> {
        let mut layers = self.stands_on.remove(&user).unwrap_or_default();
        for layer in &layers {
            if let Some(count) = self.counts.get_mut(layer) {
                *count -= 1;
            }
        }
        layers.retain(|layer| self.counts.get(layer) == Some(&0));
        self.counts.retain(|_, count| *count > 0);
        layers
    }
}

impl Erofs {
    /// Opens, or makes, the snapshots in `root`; Unsupported without mkfs.erofs, where the kernel has no EROFS, and where
    /// the file system cannot be the upper layer of an overlay.
    pub fn open(root: &Path) -> Result<Self> {
        if !std::env::var_os("PATH")
            .is_some_and(|path| std::env::split_paths(&path).any(|folder| folder.join(MKFS).is_file()))
        {
            return Err(Error::Unsupported(format!(
                "{MKFS} is not in the PATH; the package erofs-utils has it"
            )));
        }
        let folders = Folders::open(root, IMAGES)?;
        let (image_options, remaps) = probe(root)?;
        let layers = root.join("layers");
        sys::fs::create_dir_all(&layers, 0o700).map_err(io("create", &layers))?;
        let mut users = Users::default();
        for (_, record) in
            folders.store.all().into_iter().filter(|(_, record)| record.kind != Kind::Committed)
        {
            users.add(record.id, numbers(&folders, &record.parent)?);
        }
        for entry in fs::read_dir(&layers).map_err(io("list", &layers))? {
            let point = entry.map_err(io("list", &layers))?.path();
            let number = point.file_name().and_then(|name| name.to_str()?.parse::<u64>().ok());
            if number.is_none_or(|number| !users.counts.contains_key(&number)) {
                tracing::info!(mount = %point.display(), "taking down a layer that nothing stands on");
                unmount(&point);
            }
        }
        Ok(Erofs { folders, options: overlay::options(), image_options, remaps, users: Mutex::new(users) })
    }

    /// Where a layer is mounted.
    fn point(&self, layer: u64) -> PathBuf {
        self.folders.root.join("layers").join(layer.to_string())
    }

    /// From now on `user` stands on `parent` and what is beneath it.
    fn hold(&self, user: u64, parent: &str) -> Result<()> {
        self.users.lock().add(user, numbers(&self.folders, parent)?);
        Ok(())
    }

    /// Takes down what nobody stands on without `user`.
    fn release(&self, user: u64) {
        let mut users = self.users.lock();
        for layer in users.remove(user) {
            unmount(&self.point(layer));
        }
    }

    /// The layers that `user`, the snapshot `key`, stands on, from the top: mounted, here or before.
    fn mounted(&self, key: &str, user: u64, parent: &str) -> Result<Vec<PathBuf>> {
        let users = self.users.lock();
        if !users.stands_on.contains_key(&user) {
            // Removed since it was looked up: what is mounted for it now would stay.
            return Err(Error::NotFound(key.to_owned()));
        }
        let mut points = Vec::new();
        for (layer, number) in self.folders.store.chain(parent)? {
            let (image, point) = (self.folders.content(&layer, number, Kind::Committed)?, self.point(number));
            if !is_mounted(&point)? {
                sys::fs::create_dir_all(&point, 0o700).map_err(io("create", &point))?;
                image_mount(&image, &self.image_options)
                    .mount(&point)
                    .map_err(|error| io("mount the layer", &image)(error.into()))?;
            }
            points.push(point);
        }
        Ok(points)
    }
}

impl Way for Erofs {
    fn folders(&self) -> &Folders {
        &self.folders
    }

    fn make(&self, key: &str, kind: Kind, parent: &str, labels: &Labels) -> Result<()> {
        let mut user = None;
        let made = self.folders.make(key, kind, parent, labels, |folder, number| {
            self.hold(number, parent)?;
            user = Some(number);
            let lowers = self.mounted(key, number, parent)?;
            let remap = overlay::remap(self.remaps, labels)?;
            overlay::fill(folder, kind, lowers.first().map(PathBuf::as_path), remap.as_ref())
        });
        // A record that may be on disk keeps its layers.
        if let (Err(_), Some(user)) = (&made, user)
            && self.folders.store.get(key).map_or(true, |record| record.id != user)
        {
            self.release(user);
        }
        made
    }

    fn mounts_of(&self, key: &str, record: &Record) -> Result<Vec<Mount>> {
        let lowers = self.mounted(key, record.id, &record.parent)?;
        if record.kind == Kind::Active || lowers.is_empty() {
            self.folders.content(key, record.id, record.kind)?;
        }
        let remap = overlay::remap(self.remaps, &record.labels)?;
        let own = self.folders.path(record.id);
        Ok(vec![overlay::stack(record.kind, &own, &lowers, &self.options, remap.as_ref())])
    }

    fn commit(&self, name: &str, key: &str, labels: &Labels) -> Result<()> {
        let mut user = None;
        self.folders.commit(name, key, labels, |folder, record| {
            user = Some(record.id);
            let image = folder.join(IMAGE);
            // Not under its name: an mkfs that a killed engine left may still be writing.
            let new = folder.join(format!(".{IMAGE}.{}", std::process::id()));
            make_image(&folder.join(CONTENT), &new)?;
            let metadata =
                fs::File::open(&new).and_then(|file| file.sync_all().and_then(|()| file.metadata()));
            let metadata = metadata.map_err(io("sync", &new))?;
            fs::rename(&new, &image).map_err(io("name the image", &image))?;
            sys::fs::sync_dir(folder).map_err(io("sync", folder))?;
            Ok(Usage { size: metadata.blocks() as i64 * 512, inodes: 1 })
        })?;
        if let Some(user) = user {
            self.release(user);
            self.strip(user);
        }
        Ok(())
    }

    fn remove(&self, key: &str) -> Result<()> {
        let record = self.folders.remove(key)?;
        self.release(record.id);
        Ok(())
    }

    fn remaps(&self) -> bool {
        self.remaps
    }

    fn cleanup(&self) -> Result<()> {
        self.folders.cleanup()?;
        for (_, record) in self.folders.store.all() {
            if record.kind == Kind::Committed {
                self.strip(record.id);
            }
        }
        Ok(())
    }
}

impl Erofs {
    /// Removes what a layer's folder holds besides its image: what that was made of.
    fn strip(&self, layer: u64) {
        let folder = self.folders.path(layer);
        let Ok(entries) = fs::read_dir(&folder) else { return };
        for path in entries.flatten().map(|entry| entry.path()).filter(|path| !path.ends_with(IMAGE)) {
            if let Err(error) = sys::fs::remove_tree(&path) {
                tracing::warn!(path = %path.display(), %error, "what a layer was made of is left for a later clean-up");
            }
        }
    }
}

/// The numbers of the layer `parent` and those beneath it.
fn numbers(folders: &Folders, parent: &str) -> Result<Vec<u64>> {
    Ok(folders.store.chain(parent)?.into_iter().map(|(_, number)| number).collect())
}

fn image_mount(image: &Path, options: &[String]) -> Mount {
    Mount {
        kind: NAME.into(),
        source: image.display().to_string(),
        target: String::new(),
        options: options.to_vec(),
    }
}

/// Whether a layer is mounted at its point, which may not be there.
fn is_mounted(point: &Path) -> Result<bool> {
    let device = |path: &Path| fs::metadata(path).map(|metadata| metadata.dev());
    let above = point.parent().unwrap_or(point);
    match device(point) {
        Ok(own) => Ok(own != device(above).map_err(io("look at", above))?),
        Err(error) if error.kind() == ErrorKind::NotFound => Ok(false),
        Err(error) => Err(io("look at", point)(error)),
    }
}

fn unmount(point: &Path) {
    let taken_down = (|| {
        // More often than once, if somebody mounted over it.
        for _ in 0..16 {
            if !is_mounted(point)? {
                break;
            }
            sys::mount::unmount(point).map_err(io("unmount", point))?;
        }
        match fs::remove_dir(point) {
            // It never was mounted.
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(()),
            result => result.map_err(io("remove", point)),
        }
    })();
    if let Err(error) = taken_down {
        tracing::warn!(%error, "a layer that nothing stands on stays mounted");
    }
}

/// Makes an image of a folder, with every attribute that the files in it have.
fn make_image(folder: &Path, image: &Path) -> Result<()> {
    let output = Command::new(MKFS)
        // Blocks that every page size can mount; data that can be mapped.
        .args(["--quiet", "-Enoinline_data"])
        .args([image, folder])
        .stdin(Stdio::null())
        .output()
        .map_err(io("run mkfs.erofs for", folder))?;
    if output.status.success() {
        return Ok(());
    }
    let _ = fs::remove_file(image);
    let said = String::from_utf8_lossy(&output.stderr);
    let text = format!("mkfs.erofs ended with {}: {}", output.status, said.trim());
    Err(io("make an image of", folder)(std::io::Error::other(text)))
}

/// Tries a small image beneath an overlay on the file system of `root`; how images are to be mounted, and whether an
/// overlay with other owners goes, too.
fn probe(root: &Path) -> Result<(Vec<String>, bool)> {
    let folder = root.join("probe");
    // An engine that was killed here left its mounts.
    let clear = || sys::mount::unmount_all(&folder).map_err(io("unmount", &folder));
    clear()?;
    // What is there is used again: a disk that is full has no room for another. It may be half of an image.
    let again = folder.join(IMAGE).exists();
    let mut tried = probe_in(&folder);
    clear()?;
    if tried.is_err() && again {
        sys::fs::remove_tree(&folder).map_err(io("remove", &folder))?;
        tried = probe_in(&folder);
        clear()?;
    }
    tried.map_err(|error| {
        let _ = sys::fs::remove_tree(&folder);
        Error::Unsupported(format!("{} cannot hold erofs layers: {error}", root.display()))
    })
}

fn probe_in(folder: &Path) -> Result<(Vec<String>, bool)> {
    let path = |name: &str| folder.join(name);
    for name in ["content", "lower", CONTENT, WORK, overlay::MERGED] {
        sys::fs::create_dir_all(&path(name), 0o700).map_err(io("create", &path(name)))?;
    }
    if !path(IMAGE).exists() {
        make_image(&path("content"), &path(IMAGE))?;
    }
    // Since 6.12 the kernel mounts a file. A release that counts that as a layer of its own may refuse an overlay on it.
    let mut refused = None;
    for options in [&["ro"][..], &["ro", "loop"]] {
        let options: Vec<String> = options.iter().map(|option| (*option).to_owned()).collect();
        let lower = path("lower");
        let tried =
            image_mount(&path(IMAGE), &options).mount(&lower).map_err(std::io::Error::from).and_then(|()| {
                let mut mount = overlay::stack(Kind::Active, folder, std::slice::from_ref(&lower), &[], None);
                let merged = path(overlay::MERGED);
                overlay::try_mount(&mount, &merged)?;
                mount.options.extend(overlay::PROBE.map(str::to_owned));
                Ok(overlay::try_mount(&mount, &merged).is_ok())
            });
        sys::mount::unmount_all(&lower).map_err(io("unmount", &lower))?;
        match tried {
            Ok(remaps) => return Ok((options, remaps)),
            Err(error) => refused = Some(error),
        }
    }
    Err(io("mount an image on", &path("lower"))(refused.unwrap_or_else(|| ErrorKind::Unsupported.into())))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Snapshotter;

    /// Whether a loop device holds a file in this folder.
    fn looped(folder: &Path) -> bool {
        let devices = fs::read_dir("/sys/block").unwrap().flatten();
        let mut files =
            devices.filter_map(|device| fs::read_to_string(device.path().join("loop/backing_file")).ok());
        files.any(|file| Path::new(file.trim()).starts_with(folder))
    }

    /// What kernels before 6.12 do.
    #[test]
    fn images_are_mounted_through_loop_devices_too() {
        let dir = tempfile::tempdir().unwrap();
        let mut erofs = match Erofs::open(dir.path()) {
            Ok(erofs) => erofs,
            Err(error) => {
                assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "this test cannot run here: {error}");
                println!("SKIPPED: {error}");
                return;
            }
        };
        erofs.image_options = vec!["ro".into(), "loop".into()];
        erofs.prepare("k", "", &Labels::new()).unwrap();
        Snapshotter::commit(&erofs, "one", "k", &Labels::new()).unwrap();
        erofs.prepare("rw", "one", &Labels::new()).unwrap();
        assert!(sys::mount::filesystem_of(&erofs.point(1)).unwrap().1.starts_with("/dev/loop"));
        assert!(looped(dir.path()));
        Snapshotter::remove(&erofs, "rw").unwrap();
        // The kernel gives the device back a moment after its last mount.
        for _ in 0..2000 {
            if !looped(dir.path()) {
                return;
            }
            std::thread::sleep(std::time::Duration::from_millis(5));
        }
        panic!("a loop device stays");
    }
}
