//! Snapshots as overlay mounts: each has a folder for what it changed, stacked by the kernel.
//!
//! ```text
//! <root>/snapshots/<id>/fs      what the snapshot itself holds: the upper folder, and a lower one of its children
//! <root>/snapshots/<id>/work    overlayfs' scratch folder, for an active snapshot
//! ```

use std::fs;
use std::path::{Path, PathBuf};

use crate::folders::{CONTENT, Folders, PLAIN, Way, bind, copy_ownership};
use crate::store::Record;
use crate::{Error, Kind, Labels, Mount, Result, io};

pub(crate) const NAME: &str = "overlayfs";
/// The scratch folder of an active snapshot, beside its content.
pub(crate) const WORK: &str = "work";
/// The labels that say how owners are mapped.
const UIDS: &str = "containerd.io/snapshot/uidmapping";
const GIDS: &str = "containerd.io/snapshot/gidmapping";
/// Where probes are mounted, in their folder.
pub(crate) const MERGED: &str = "merged";
/// Any mapping, to see whether one goes.
pub(crate) const PROBE: [&str; 2] = ["uidmap=0:1000:1", "gidmap=0:1000:1"];

/// The overlay snapshotter.
pub struct Overlay {
    folders: Folders,
    /// Options for every overlay mount.
    options: Vec<String>,
    remaps: bool,
}

impl Overlay {
    /// Opens, or makes, the snapshots in `root`; Unsupported when its file system cannot be a layer of an overlay.
    pub fn open(root: &Path) -> Result<Self> {
        let folders = Folders::open(root, PLAIN)?;
        let remaps = probe(root)?;
        Ok(Overlay { folders, options: options(), remaps })
    }
}

impl Way for Overlay {
    fn folders(&self) -> &Folders {
        &self.folders
    }

    fn make(&self, key: &str, kind: Kind, parent: &str, labels: &Labels) -> Result<()> {
        self.folders.make(key, kind, parent, labels, |folder, _| {
            // All of them, or what is made here could not be mounted.
            let lowers = self.folders.layers(parent)?;
            fill(folder, kind, lowers.first().map(PathBuf::as_path), remap(self.remaps, labels)?.as_ref())
        })
    }

    fn mounts_of(&self, key: &str, record: &Record) -> Result<Vec<Mount>> {
        let lowers = self.folders.layers(&record.parent)?;
        if record.kind == Kind::Active || lowers.is_empty() {
            self.folders.content(key, record.id, record.kind)?;
        }
        let remap = remap(self.remaps, &record.labels)?;
        Ok(vec![stack(record.kind, &self.folders.path(record.id), &lowers, &self.options, remap.as_ref())])
    }

    fn remaps(&self) -> bool {
        self.remaps
    }

    fn rebases(&self) -> bool {
        true
    }

    fn rebase(&self, folder: &Path, lower: &Path, labels: &Labels) -> Result<()> {
        look_like(&folder.join(CONTENT), Some(lower), remap(self.remaps, labels)?.as_ref())
    }
}

/// The owners of a snapshot for a user namespace: layers are mapped by their mounts, and what is written has the owners
/// that the namespace has on the host.
pub(crate) struct Remap {
    /// For mounts of layers.
    options: [String; 2],
    /// Whom the namespace's root is on the host: user, group.
    root: (u32, u32),
}

/// What the labels of a snapshot say of its owners, where that can be had.
pub(crate) fn remap(remaps: bool, labels: &Labels) -> Result<Option<Remap>> {
    let (Some(uids), Some(gids)) = (labels.get(UIDS), labels.get(GIDS)) else { return Ok(None) };
    if !remaps {
        return Ok(None);
    }
    let root = |label: &str, text: &str| {
        let mappings = sys::idmap::parse(text)
            .map_err(|error| Error::InvalidArgument(format!("label {label}: {error}")))?;
        let root = mappings.iter().find(|mapping| mapping.inside == 0).map(|mapping| mapping.outside);
        root.ok_or_else(|| Error::InvalidArgument(format!("label {label}: {text:?} maps no root")))
    };
    let root = (root(UIDS, uids)?, root(GIDS, gids)?);
    Ok(Some(Remap { options: [format!("uidmap={uids}"), format!("gidmap={gids}")], root }))
}

/// Options for every overlay mount of this host.
pub(crate) fn options() -> Vec<String> {
    // With the index, a lower folder that moves (a restored backup, a new device number) makes mounts fail.
    let index = Path::new("/sys/module/overlay/parameters/index").exists();
    if index { vec!["index=off".into()] } else { Vec::new() }
}

/// Makes what an overlay needs in a new snapshot's folder; `lower` is the topmost of its lower folders.
pub(crate) fn fill(folder: &Path, kind: Kind, lower: Option<&Path>, remap: Option<&Remap>) -> Result<()> {
    let upper = folder.join(CONTENT);
    sys::fs::create_dir(&upper, 0o755).map_err(io("create", &upper))?;
    if kind == Kind::Active {
        let work = folder.join(WORK);
        sys::fs::create_dir(&work, 0o711).map_err(io("create", &work))?;
    }
    look_like(&upper, lower, remap)
}

/// The top folder of the merged tree is the upper one: it must look like the parent's.
fn look_like(upper: &Path, lower: Option<&Path>, remap: Option<&Remap>) -> Result<()> {
    if let Some(lower) = lower {
        let metadata = fs::metadata(lower).map_err(io("look at", lower))?;
        copy_ownership(&metadata, upper).map_err(io("set the owner of", upper))?;
    }
    if let Some(Remap { root: (uid, gid), .. }) = remap {
        std::os::unix::fs::lchown(upper, Some(*uid), Some(*gid)).map_err(io("set the owner of", upper))?;
    }
    Ok(())
}

/// The mount of an active snapshot or a view in the folder `own` over these, from the top.
pub(crate) fn stack(
    kind: Kind,
    own: &Path,
    lowers: &[PathBuf],
    options: &[String],
    remap: Option<&Remap>,
) -> Mount {
    let remap = remap.iter().flat_map(|remap| remap.options.iter().cloned());
    match (kind, lowers) {
        (Kind::Active, []) => bind(&own.join(CONTENT), "rw"),
        (_, []) => bind(&own.join(CONTENT), "ro"),
        (Kind::View, [only]) => {
            let mut mount = bind(only, "ro");
            mount.options.extend(remap);
            mount
        }
        (kind, lowers) => {
            let mut options: Vec<String> = options.iter().cloned().chain(remap).collect();
            if kind == Kind::Active {
                options.push(format!("workdir={}", own.join(WORK).display()));
                options.push(format!("upperdir={}", own.join(CONTENT).display()));
            }
            let lowers: Vec<_> = lowers
                .iter()
                .map(|lower| sys::mount::escape_lower(lower.as_os_str()).to_string_lossy().into_owned())
                .collect();
            options.push(format!("lowerdir={}", lowers.join(":")));
            Mount { kind: "overlay".into(), source: "overlay".into(), target: String::new(), options }
        }
    }
}

/// Tries a small overlay on the file system of `root`; whether one with other owners goes, too.
fn probe(root: &Path) -> Result<bool> {
    let folder = root.join("probe");
    // An engine that was killed here left its mount. The folders stay: a disk that is full has no room for new ones.
    sys::mount::unmount_all(&folder).map_err(io("unmount", &folder))?;
    let tried = (|| {
        let mut paths = Vec::new();
        for name in ["lower", "lower2", "upper", "work", MERGED] {
            let path = folder.join(name);
            sys::fs::create_dir_all(&path, 0o700)?;
            paths.push(path.display().to_string());
        }
        let options = vec![
            format!("lowerdir={}:{}", paths[0], paths[1]),
            format!("upperdir={}", paths[2]),
            format!("workdir={}", paths[3]),
        ];
        let mut mount =
            Mount { kind: "overlay".into(), source: "overlay".into(), target: String::new(), options };
        let merged = folder.join(MERGED);
        try_mount(&mount, &merged)?;
        mount.options.extend(PROBE.map(str::to_owned));
        Ok(try_mount(&mount, &merged).is_ok())
    })();
    tried.map_err(|error: std::io::Error| {
        let _ = sys::fs::remove_tree(&folder);
        Error::Unsupported(format!(
            "{} cannot hold overlay layers: {error}; put the root on ext4 or xfs (with d_type), or use the native \
             snapshotter",
            root.display()
        ))
    })
}

/// Mounts there for a moment.
pub(crate) fn try_mount(mount: &Mount, at: &Path) -> std::io::Result<()> {
    mount.mount(at)?;
    sys::mount::unmount(at)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_kill_left_of_the_probe_is_no_hindrance() {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "this test cannot run here");
            println!("SKIPPED: needs root to mount");
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let left = dir.path().join("probe/merged");
        sys::fs::create_dir_all(&left, 0o700).unwrap();
        let kind = "tmpfs".to_owned();
        let mount = Mount { source: kind.clone(), kind, target: String::new(), options: Vec::new() };
        mount.mount(&left).unwrap();
        Overlay::open(dir.path()).unwrap();
        assert!(sys::mount::mounts_under(dir.path()).unwrap().is_empty());
        // Again, with the same folders.
        Overlay::open(dir.path()).unwrap();
        assert!(sys::mount::mounts_under(dir.path()).unwrap().is_empty());
    }
}
