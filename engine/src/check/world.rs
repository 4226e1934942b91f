//! The picture of the machine that is judged: records, files, mounts, processes, as they were when they were looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use oci::Digest;
use oci::image::{Index, Manifest};
use snapshotter::Stored;

use crate::metadata::View;
use crate::metadata::offline::Broken;

/// All that is judged.
pub(super) struct World {
    pub(super) now: SystemTime,
    /// The folders, as the kernel has their names.
    pub(super) root: PathBuf,
    pub(super) state: PathBuf,
    /// The state folder as it is configured, and so recorded.
    pub(super) given_state: PathBuf,
    /// All records.
    pub(super) view: View,
    pub(super) broken: Vec<Broken>,
    pub(super) content: Content,
    /// The built-in snapshotters that have been used; or why one cannot be looked at.
    pub(super) snapshotters: BTreeMap<String, Result<Stored, String>>,
    /// Those in other processes.
    pub(super) proxies: BTreeSet<String>,
    pub(super) bundles: Vec<Bundle>,
    /// What lies where bundles are and is none.
    pub(super) no_bundles: Vec<PathBuf>,
    /// Work folders: of what, namespace, id.
    pub(super) work: Vec<(Of, String, String)>,
    pub(super) runtimes: Vec<RuntimeState>,
    pub(super) groups: Vec<Group>,
    pub(super) shims: Vec<Shim>,
    /// Where the shims of containers and sandboxes that there are, or have been, listen: who, and whether anybody does.
    pub(super) sockets: BTreeMap<PathBuf, Socket>,
    pub(super) mounts: Vec<MountPoint>,
    /// Loop devices of files beneath our folders, and the file.
    pub(super) loops: Vec<(PathBuf, PathBuf)>,
    /// Loop devices that mounts kept for clients hold.
    pub(super) linked: BTreeSet<PathBuf>,
    /// Folders of mounts that are kept for clients.
    pub(super) activations: Vec<String>,
    pub(super) pods: Pods,
    /// What was read besides, if it was.
    pub(super) deep: Option<Deep>,
}

impl World {
    /// A picture with these records and nothing else, of folders that are not named.
    pub(super) fn empty(view: View) -> Self {
        World {
            now: SystemTime::now(),
            root: PathBuf::new(),
            state: PathBuf::new(),
            given_state: PathBuf::new(),
            view,
            broken: Vec::new(),
            content: Content::default(),
            snapshotters: BTreeMap::new(),
            proxies: BTreeSet::new(),
            bundles: Vec::new(),
            no_bundles: Vec::new(),
            work: Vec::new(),
            runtimes: Vec::new(),
            groups: Vec::new(),
            shims: Vec::new(),
            sockets: BTreeMap::new(),
            mounts: Vec::new(),
            loops: Vec::new(),
            linked: BTreeSet::new(),
            activations: Vec::new(),
            pods: Pods::default(),
            deep: None,
        }
    }

    /// A path as the kernel has it, when it is recorded beneath the state.
    pub(super) fn real(&self, path: &Path) -> PathBuf {
        match path.strip_prefix(&self.given_state) {
            Ok(rest) => self.state.join(rest),
            Err(_) => path.to_owned(),
        }
    }
}

/// The content store.
#[derive(Default)]
pub(super) struct Content {
    /// Whether another process has the blobs, so that they are not looked at.
    pub(super) elsewhere: bool,
    /// Sizes of the blobs' files; None for what is no file.
    pub(super) blobs: BTreeMap<String, Option<u64>>,
    /// What lies among them and is none.
    pub(super) strays: Vec<PathBuf>,
    /// Folders of ingests, and whether each has data.
    pub(super) ingests: BTreeMap<String, bool>,
    /// Files that are about to be deleted.
    pub(super) removed: usize,
    /// What images are made of, by digest; or what is wrong with it.
    pub(super) documents: BTreeMap<Digest, Result<Document, Unread>>,
}

/// An index or a manifest.
pub(super) enum Document {
    Index(Index),
    Manifest(Box<Manifest>),
    /// Neither.
    Other,
}

/// Why a document is not believed.
pub(super) enum Unread {
    /// Its bytes have another digest.
    Damaged(String),
    /// It is not what it should be.
    Wrong(String),
}

/// What a bundle, or a work folder, is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Of {
    Container,
    Sandbox,
}

/// A bundle.
#[derive(Debug, Clone)]
pub(super) struct Bundle {
    pub(super) of: Of,
    pub(super) namespace: String,
    /// With a dot before it while it is being removed.
    pub(super) id: String,
    pub(super) path: PathBuf,
    /// How its task ended, if that is noted.
    pub(super) end: Option<End>,
    /// Where its shim listens, if it has said so.
    pub(super) socket: Option<PathBuf>,
    /// Whether somebody answers there.
    pub(super) served: bool,
}

/// How a task ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum End {
    Dead,
    Deleted,
}

/// What the runtime keeps of a container of ours.
#[derive(Debug, Clone)]
pub(super) struct RuntimeState {
    /// The runtime's root, with the namespace.
    pub(super) root: PathBuf,
    pub(super) namespace: String,
    pub(super) id: String,
    /// The bundle it was made from.
    pub(super) bundle: PathBuf,
}

/// A control group by the name of a container.
#[derive(Debug, Clone)]
pub(super) struct Group {
    pub(super) namespace: String,
    pub(super) id: String,
    /// Its folders, one for each hierarchy.
    pub(super) folders: Vec<PathBuf>,
    /// Whether any process is in it.
    pub(super) used: bool,
}

/// A process that was started as a shim of this engine.
#[derive(Debug, Clone)]
pub(super) struct Shim {
    pub(super) pid: u32,
    /// When it was started, in the kernel's ticks: a pid may come again, both do not.
    pub(super) started: u64,
    /// Of what it was started.
    pub(super) namespace: String,
    pub(super) id: String,
    /// The bundle it was started in; None when that is gone.
    pub(super) bundle: Option<PathBuf>,
    /// Where it listens.
    pub(super) sockets: BTreeSet<PathBuf>,
}

/// Where a shim listens, or did.
#[derive(Debug, Clone)]
pub(super) struct Socket {
    /// Whose it is.
    pub(super) namespace: String,
    pub(super) id: String,
    pub(super) served: bool,
}

/// A mount beneath one of the folders.
#[derive(Debug, Clone)]
pub(super) struct MountPoint {
    pub(super) at: PathBuf,
    pub(super) source: String,
}

/// What is on the machine of pods, by their ids and those of their containers.
#[derive(Debug, Clone, Default)]
pub(super) struct Pods {
    pub(super) folders: Vec<String>,
    pub(super) namespaces: Vec<String>,
    pub(super) containers: Vec<String>,
    pub(super) streams: Vec<String>,
    /// Names of folders of fifos.
    pub(super) execs: Vec<String>,
    /// Images that were looked into.
    pub(super) looks: Vec<String>,
    /// Attachments to networks that are this engine's: the pod, and the file.
    pub(super) attached: Vec<(String, PathBuf)>,
}

/// What reading everything has shown.
#[derive(Default)]
pub(super) struct Deep {
    /// Blobs whose bytes have another digest, and which.
    pub(super) damaged: BTreeMap<String, String>,
    /// Files that are not as their layer has them: namespace, snapshotter, name, and what differs.
    pub(super) differing: Vec<(String, String, String, String)>,
    /// Layers that are not what their image's config says: the image, and what is wrong.
    pub(super) wrong_layers: Vec<(String, String)>,
    /// What could not be compared, and why.
    pub(super) not_compared: Vec<String>,
    pub(super) bytes: u64,
    pub(super) layers: u64,
    pub(super) files: u64,
    /// What active snapshots take.
    pub(super) active: snapshotter::Usage,
}
