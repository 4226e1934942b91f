//! A bundle: the folder that holds what a shim needs of one container, or of one sandbox.
//!
//! ```text
//! <state>/io.containerd.runtime.v2.task/<namespace>/<id>/    0700 (0710 and the group of a user namespace's root)
//!   config.json         the container's spec, byte for byte
//!   rootfs/             where the shim mounts the root file system
//!   work ->             <root>/io.containerd.runtime.v2.task/<namespace>/<id>: what a runtime keeps on disk
//!   log                 fifo: the shim's log, read by the engine
//!   shim-binary-path    the shim's program, for cleaning up after it
//!   bootstrap.json      where the shim listens; `address`, written by shims of 1.6 and 1.7, says it too
//!   end.json            how the task ended, once it has
//!   sandbox             the sandbox whose shim it joined, if it did
//! <state>/io.containerd.sandbox.controller.v1.shim/<namespace>/<id>/    the same of a sandbox; `exited` once that was told
//! ```
//!
//! Invariant: a bundle is there under its own name before its shim starts and until all of the task is gone. It is
//! removed under the name `.<id>`, so that a half-removed one is never taken for a task's; and never with something
//! still mounted in it. A bundle does not outlive a reboot, so nothing here is synced.

use std::fs::{self, Permissions};
use std::io;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};
use shim_api::bootstrap::Answer;

use super::task::Exit;
use crate::context::Namespace;
use crate::error::{Error, Result};

/// What a shim was started for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) enum Of {
    Container,
    Sandbox,
}

impl Of {
    pub(crate) const ALL: [Of; 2] = [Of::Container, Of::Sandbox];

    /// The folder of all bundles of this kind, beneath the state, and of their work folders, beneath the root.
    pub(crate) fn folder(self) -> &'static str {
        match self {
            Of::Container => "io.containerd.runtime.v2.task",
            Of::Sandbox => "io.containerd.sandbox.controller.v1.shim",
        }
    }
}

/// Where the bundles of one kind are.
#[derive(Debug, Clone)]
pub(crate) struct Bundles {
    pub(crate) of: Of,
    /// The folder of all, beneath the state.
    pub(crate) state: PathBuf,
    /// The folder of all work folders, beneath the root.
    pub(crate) work: PathBuf,
}

/// One bundle; the folder itself may be there or not.
#[derive(Debug, Clone)]
pub(crate) struct Bundle {
    /// The bundle's folder.
    pub(crate) path: PathBuf,
    /// The work folder.
    work: PathBuf,
}

/// The end of a task, whose bundle may stay behind it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) enum End {
    /// Its shim died; exit and delete were published, and the client has not deleted it yet.
    Dead(Exit),
    /// It was deleted.
    Deleted,
}

impl Bundles {
    /// The bundles beneath these folders.
    pub(crate) fn new(of: Of, root: &Path, state: &Path) -> Self {
        Bundles { of, state: state.join(of.folder()), work: root.join(of.folder()) }
    }

    /// The bundle of a container. Both names have been checked as identifiers, so each is one component of a path.
    pub(crate) fn bundle(&self, namespace: &Namespace, id: &str) -> Bundle {
        Bundle {
            path: self.state.join(namespace.as_str()).join(id),
            work: self.work.join(namespace.as_str()).join(id),
        }
    }
}

impl Bundle {
    /// Makes the bundle with this spec. What an earlier task left under the name, whose removal failed, goes first.
    /// When it fails nothing is left.
    pub(crate) fn create(&self, spec: &[u8]) -> Result<()> {
        if self.path.exists() {
            self.remove()?;
        }
        let made = self.make(spec);
        if made.is_err() {
            // Nothing is mounted yet.
            let _ = sys::fs::remove_tree(&self.path);
            let _ = sys::fs::remove_tree(&self.work);
        }
        made
    }

    fn make(&self, spec: &[u8]) -> Result<()> {
        let doing = |what: &'static str, path: &Path| {
            let path = path.to_owned();
            move |error: io::Error| Error::io(what, &path, &error)
        };
        let (path, work) = (&self.path, &self.work);
        for folder in [path.parent(), work.parent()].into_iter().flatten() {
            sys::fs::create_dir_all(folder, 0o711).map_err(doing("create folder", folder))?;
        }
        // A work folder without a bundle is a leftover of a reboot.
        sys::fs::remove_tree(work).map_err(doing("remove the old work folder", work))?;
        sys::fs::create_dir(work, 0o711).map_err(doing("create folder", work))?;
        sys::failpoint!("bundle.make.work");
        sys::fs::create_dir(path, 0o700).map_err(doing("create bundle", path))?;
        sys::failpoint!("bundle.make.folder");
        let rootfs = self.rootfs();
        sys::fs::create_dir(&rootfs, 0o711).map_err(doing("create folder", &rootfs))?;
        let link = path.join("work");
        std::os::unix::fs::symlink(work, &link).map_err(doing("create link", &link))?;
        let log = self.log();
        sys::fifo::create(&log, 0o600).map_err(doing("create fifo", &log))?;
        if let Some(group) = root_group(spec) {
            // The container's root, who is nobody out here, passes through the bundle on the way to its root.
            std::os::unix::fs::chown(path, None, Some(group)).map_err(doing("change the group of", path))?;
            fs::set_permissions(path, Permissions::from_mode(0o710))
                .map_err(doing("set the mode of", path))?;
        }
        // A sandbox need not have one.
        if spec.is_empty() { Ok(()) } else { self.write("config.json", spec) }
    }

    /// Notes the sandbox whose shim the container joined.
    pub(crate) fn note_sandbox(&self, id: &str) -> Result<()> {
        self.write("sandbox", id.as_bytes())
    }

    /// Notes that the end of the sandbox has been told; whether it had not.
    pub(crate) fn note_exited(&self) -> Result<bool> {
        let first = !self.path.join("exited").exists();
        self.write("exited", b"").map(|()| first)
    }

    /// Where the root file system is mounted.
    pub(crate) fn rootfs(&self) -> PathBuf {
        self.path.join("rootfs")
    }

    /// Where the checkpoint that the task is restored from is unpacked to: on disk, since it is as large as memory.
    pub(crate) fn checkpoint(&self) -> PathBuf {
        self.work.join("checkpoint")
    }

    /// The fifo of the shim's log.
    pub(crate) fn log(&self) -> PathBuf {
        self.path.join("log")
    }

    /// Notes where the shim listens, for the next engine.
    pub(crate) fn note_shim(&self, answer: &Answer) -> Result<()> {
        self.write("bootstrap.json", &answer.encode(shim_api::bootstrap::Form::Json))
    }

    /// Notes the shim's program, for cleaning up after it.
    pub(crate) fn note_program(&self, program: &Path) -> Result<()> {
        self.write("shim-binary-path", program.as_os_str().as_encoded_bytes())
    }

    /// The shim's program, if it was noted.
    pub(crate) fn program(&self) -> Option<PathBuf> {
        let text = fs::read_to_string(self.path.join("shim-binary-path")).ok()?;
        Some(PathBuf::from(text)).filter(|path| path.is_absolute())
    }

    /// Where the shim listens; NotFound when it never said, DataLoss when what it said cannot be read.
    pub(crate) fn shim_address(&self) -> Result<Answer> {
        let mut unread = None;
        for name in ["bootstrap.json", "address"] {
            let path = self.path.join(name);
            match fs::read(&path).map(|bytes| Answer::parse(&bytes)) {
                Ok(Ok(answer)) => return Ok(answer),
                Ok(Err(error)) => unread = Some(Error::data_loss(format!("{}: {error}", path.display()))),
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(Error::unavailable(format!("read {}: {error}", path.display()))),
            }
        }
        Err(unread.unwrap_or_else(|| {
            Error::not_found(format!("the bundle {} names no shim's address", self.path.display()))
        }))
    }

    /// Notes how the task ended, so that an engine that starts later neither asks for it nor tells it again.
    pub(crate) fn note_end(&self, end: &End) -> Result<()> {
        let text =
            serde_json::to_vec(end).map_err(|error| Error::internal(format!("encode an exit: {error}")))?;
        self.write("end.json", &text)
    }

    /// How the task ended, if an engine got as far as to note it.
    pub(crate) fn end(&self) -> Option<End> {
        serde_json::from_slice(&fs::read(self.path.join("end.json")).ok()?).ok()
    }

    /// Removes the bundle and its work folder, after taking down what is mounted in it; fine when it is not there.
    pub(crate) fn remove(&self) -> Result<()> {
        let doing = |what: &'static str, path: &Path| {
            let path = path.to_owned();
            move |error: io::Error| Error::io(what, &path, &error)
        };
        let path = &self.path;
        sys::mount::unmount_all(path).map_err(doing("unmount what is in", path))?;
        sys::failpoint!("bundle.remove.unmounted");
        self.remove_hidden()?;
        let hidden = self.hidden();
        match fs::rename(path, &hidden) {
            Ok(()) => {
                sys::failpoint!("bundle.remove.renamed");
                self.remove_hidden()?;
            }
            Err(error) if error.kind() == io::ErrorKind::NotFound => {}
            Err(error) => return Err(Error::io("rename for removal", path, &error)),
        }
        sys::failpoint!("bundle.remove.folder");
        sys::fs::remove_tree(&self.work).map_err(doing("remove", &self.work))?;
        sys::failpoint!("bundle.remove.work");
        Ok(())
    }

    /// Ends a removal that was cut short.
    pub(crate) fn remove_hidden(&self) -> Result<()> {
        let hidden = self.hidden();
        sys::mount::unmount_all(&hidden).map_err(|error| Error::io("unmount what is in", &hidden, &error))?;
        sys::fs::remove_tree(&hidden).map_err(|error| Error::io("remove", &hidden, &error))
    }

    /// The name under which it is removed.
    fn hidden(&self) -> PathBuf {
        let name = self.path.file_name().unwrap_or_default().to_string_lossy();
        self.path.with_file_name(format!(".{name}"))
    }

    fn write(&self, name: &str, bytes: &[u8]) -> Result<()> {
        let path = self.path.join(name);
        let new = self.path.join(format!(".{name}.new"));
        let written = fs::write(&new, bytes)
            .and_then(|()| fs::set_permissions(&new, Permissions::from_mode(0o600)))
            .and_then(|()| {
                sys::failpoint!("bundle.write.{name}");
                fs::rename(&new, &path)
            });
        written.map_err(|error| Error::io("write", &path, &error))
    }
}

/// The group on the host that is root's in the container, when it has a user namespace.
fn root_group(spec: &[u8]) -> Option<u32> {
    #[derive(Deserialize)]
    struct Spec {
        linux: Option<Linux>,
    }
    #[derive(Deserialize)]
    struct Linux {
        #[serde(default, rename = "gidMappings")]
        gid_mappings: Vec<Mapping>,
    }
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Mapping {
        #[serde(rename = "containerID")]
        container_id: u32,
        #[serde(rename = "hostID")]
        host_id: u32,
    }
    // A spec that cannot be read is for the runtime to refuse, in its own words.
    let spec: Spec = serde_json::from_slice(spec).ok()?;
    let root = spec.linux?.gid_mappings.into_iter().find(|mapping| mapping.container_id == 0)?;
    Some(root.host_id)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bundle(folder: &Path) -> Bundle {
        Bundles::new(Of::Container, &folder.join("root"), &folder.join("state"))
            .bundle(&Namespace::new("ns").unwrap(), "c")
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o7777
    }

    #[test]
    fn what_is_in_it() {
        let folder = tempfile::tempdir().unwrap();
        let bundle = bundle(folder.path());
        let spec = br#"{ "ociVersion":"1.0.2", "unknown": [1] }"#;
        bundle.create(spec).unwrap();
        assert_eq!(bundle.path, folder.path().join("state/io.containerd.runtime.v2.task/ns/c"));
        assert_eq!(fs::read(bundle.path.join("config.json")).unwrap(), spec);
        assert_eq!(mode(&bundle.path), 0o700);
        assert_eq!(mode(&bundle.rootfs()), 0o711);
        assert!(sys::fifo::is_fifo(&bundle.log()));
        let work = folder.path().join("root/io.containerd.runtime.v2.task/ns/c");
        assert_eq!(fs::read_link(bundle.path.join("work")).unwrap(), work);
        assert!(matches!(bundle.shim_address(), Err(Error::NotFound(_))));
        let answer = Answer::ttrpc(3, "unix:///run/s/x");
        bundle.note_program(Path::new("/bin/shim")).unwrap();
        bundle.note_shim(&answer).unwrap();
        assert_eq!(bundle.shim_address().unwrap(), answer);
        assert_eq!(bundle.program().unwrap(), Path::new("/bin/shim"));
        bundle.remove().unwrap();
        assert!(!bundle.path.exists() && !work.exists());
        bundle.remove().unwrap();
    }

    #[test]
    fn an_end_is_noted() {
        let folder = tempfile::tempdir().unwrap();
        let bundle = bundle(folder.path());
        bundle.create(b"{}").unwrap();
        assert_eq!(bundle.end(), None);
        let at = prost_types::Timestamp { seconds: 5, nanos: 6 };
        for end in [End::Dead(Exit { pid: 7, status: 137, at: Some(at) }), End::Deleted] {
            bundle.note_end(&end).unwrap();
            assert_eq!(bundle.end(), Some(end));
        }
    }

    #[test]
    fn leftovers_do_not_hinder() {
        let folder = tempfile::tempdir().unwrap();
        let bundle = bundle(folder.path());
        bundle.create(b"{}").unwrap();
        fs::write(bundle.rootfs().join("old"), "").unwrap();
        fs::create_dir_all(bundle.hidden().join("rootfs")).unwrap();
        bundle.create(b"{}").unwrap();
        assert!(!bundle.rootfs().join("old").exists());
        assert!(!bundle.hidden().exists());
    }

    #[test]
    fn old_shims_say_their_address_in_a_file_of_their_own() {
        let folder = tempfile::tempdir().unwrap();
        let bundle = bundle(folder.path());
        bundle.create(b"{}").unwrap();
        fs::write(bundle.path.join("address"), "unix:///run/containerd/s/ab").unwrap();
        assert_eq!(bundle.shim_address().unwrap(), Answer::ttrpc(2, "unix:///run/containerd/s/ab"));
        fs::write(bundle.path.join("bootstrap.json"), "{\"vers").unwrap();
        assert_eq!(bundle.shim_address().unwrap(), Answer::ttrpc(2, "unix:///run/containerd/s/ab"));
        fs::remove_file(bundle.path.join("address")).unwrap();
        assert!(matches!(bundle.shim_address(), Err(Error::DataLoss(_))));
    }

    #[test]
    fn the_group_of_a_user_namespace_may_pass() {
        let spec = br#"{"linux":{"gidMappings":[{"containerID":5,"hostID":1,"size":1},
            {"containerID":0,"hostID":70000,"size":5}]}}"#;
        assert_eq!(root_group(spec), Some(70000));
        assert_eq!(root_group(b"{}"), None);
        assert_eq!(root_group(b"\xff"), None);
    }

    #[test]
    fn a_removal_does_not_reach_through_a_mount() {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "this test cannot run here");
            println!("skipped: needs root to mount");
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let precious = folder.path().join("precious");
        fs::create_dir(&precious).unwrap();
        fs::write(precious.join("file"), "kept").unwrap();
        let bundle = bundle(folder.path());
        bundle.create(b"{}").unwrap();
        let mount = sys::mount::Mount {
            kind: "bind".into(),
            source: precious.display().to_string(),
            target: String::new(),
            options: vec!["rbind".into(), "rw".into()],
        };
        sys::mount::mount_all(&[mount], &bundle.rootfs()).unwrap();
        assert!(bundle.rootfs().join("file").exists());
        bundle.remove().unwrap();
        assert_eq!(fs::read(precious.join("file")).unwrap(), b"kept");
    }
}
