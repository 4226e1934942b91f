//! Snapshotters: layers stacked into root file systems.
//!
//! ```text
//!            prepare(key, parent)                commit(name, key)
//!  (none) ------------------------> Active key --------------------> Committed name --+
//!     |                                 |                                  ^          |
//!     |      view(key, parent)          | remove(key)                      |  parent of
//!     +------------------------> View --+--> gone <------- remove(name) ---+  others <+
//! ```
//!
//! An active snapshot is written through its mounts; committing it makes it a layer, which never changes again. A view
//! is read only and is never committed. A parent is always committed, and stays for as long as it has children.
//! Keys and names share one space.
//!
//! The calls block on the file system: an async caller puts them on a thread of their own.

mod btrfs;
mod erofs;
mod folders;
mod inspect;
mod native;
mod overlay;
mod store;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

pub use btrfs::Btrfs;
pub use erofs::Erofs;
pub use inspect::{Stored, StoredSnapshot, forget, inspect};
pub use native::{Native, copy_tree};
pub use overlay::Overlay;
pub use sys::fs::Usage;
pub use sys::mount::Mount;

/// Labels, by key.
pub type Labels = BTreeMap<String, String>;

/// What a snapshot is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub enum Kind {
    /// Read only, over a parent.
    View,
    /// Writable, until it is committed.
    Active,
    /// A layer; never changes.
    Committed,
}

/// What is known of a snapshot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Info {
    /// Its key, or its name once committed.
    pub key: String,
    /// What it is.
    pub kind: Kind,
    /// The name of its parent; empty for none.
    pub parent: String,
    /// Its labels.
    pub labels: Labels,
    /// When it was made.
    pub created: SystemTime,
    /// When it last changed.
    pub updated: SystemTime,
}

/// Why a snapshotter refused, in the classes its callers branch on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// No such snapshot.
    #[error("snapshot {0:?} does not exist")]
    NotFound(String),
    /// The key or name is taken.
    #[error("snapshot {0:?} exists already")]
    AlreadyExists(String),
    /// The snapshot's state forbids it.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request makes no sense.
    #[error("{0}")]
    InvalidArgument(String),
    /// Another process uses this root.
    #[error("the snapshots in {} are in use by another process; stop it first", .0.display())]
    InUse(PathBuf),
    /// What was acknowledged is not there any more.
    #[error("{0}")]
    Lost(String),
    /// The file system under the root cannot do what the snapshotter needs.
    #[error("{0}")]
    Unsupported(String),
    /// It is in another process, which cannot be reached now.
    #[error("{0}")]
    Unavailable(String),
    /// The file system failed.
    #[error("{what} {}: {source}", path.display())]
    Io {
        /// What was tried.
        what: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        source: std::io::Error,
    },
}

/// Result of a snapshotter's operations.
pub type Result<T> = std::result::Result<T, Error>;

/// For `map_err` on an I/O result: what was tried, on what.
fn io<'a>(what: &'static str, path: &'a Path) -> impl FnOnce(std::io::Error) -> Error + 'a {
    move |source| Error::Io { what, path: path.to_owned(), source }
}

/// One of the commits that [`Snapshotter::commit_stack`] makes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Commit {
    /// The name of the layer.
    pub name: String,
    /// The key of the active snapshot that it is made of.
    pub key: String,
    /// What the layer is put onto, where that is not what it was prepared over.
    pub parent: Option<String>,
    /// The labels of the layer.
    pub labels: Labels,
}

/// The capability of a snapshotter whose layers are made side by side, and get their parents at their commit.
pub const REBASE: &str = "rebase";
/// What a snapshotter can that gives a snapshot the owners of a user namespace.
pub const REMAP: &str = "remap-ids";

/// A store of snapshots. What a call acknowledged is on disk, but for what is written to an active snapshot.
pub trait Snapshotter: Send + Sync {
    /// Makes an active snapshot over `parent` (empty for none), and gives the mounts to write it through.
    fn prepare(&self, key: &str, parent: &str, labels: &Labels) -> Result<Vec<Mount>>;
    /// Makes a read-only view of `parent`.
    fn view(&self, key: &str, parent: &str, labels: &Labels) -> Result<Vec<Mount>>;
    /// The mounts of an active snapshot or a view, the same as when it was made.
    fn mounts(&self, key: &str) -> Result<Vec<Mount>>;
    /// Makes the active snapshot `key` the layer `name`, with these labels; its files are on disk before it is. After an
    /// error `name` may be on disk only if `stat` knows it.
    fn commit(&self, name: &str, key: &str, labels: &Labels) -> Result<()>;
    /// Commits several active snapshots, each of which may be put onto a parent that comes before it: all of them are made
    /// layers, or none, with one sync for all of their files. Unsupported where a snapshot's parent cannot change.
    fn commit_stack(&self, commits: &[Commit]) -> Result<()> {
        match commits {
            [Commit { name, key, parent: None, labels }] => self.commit(name, key, labels),
            _ => Err(Error::Unsupported("this snapshotter does not put layers onto other parents".into())),
        }
    }
    /// The folders of the layer `parent` and of those beneath it, from the top. Unsupported unless it can [`REBASE`].
    fn layers(&self, parent: &str) -> Result<Vec<PathBuf>> {
        Err(Error::Unsupported(format!("the layers of {parent:?} are no plain folders")))
    }
    /// Removes a snapshot; FailedPrecondition while it has children.
    fn remove(&self, key: &str) -> Result<()>;
    /// What is known of a snapshot.
    fn stat(&self, key: &str) -> Result<Info>;
    /// Sets labels: those that `paths` names (`labels`, `labels.KEY`), or all of them when it names nothing.
    fn update(&self, info: &Info, paths: &[String]) -> Result<Info>;
    /// Calls `visit` with every snapshot, ordered by key, as of one instant.
    fn walk(&self, visit: &mut dyn FnMut(Info) -> Result<()>) -> Result<()>;
    /// What a snapshot itself takes, without its parents. Measured now for an active one, at its commit for a layer.
    fn usage(&self, key: &str) -> Result<Usage>;
    /// Removes what removed snapshots, and those half made, may have left on disk: what is not in `walk`. An open removes
    /// nothing, so that its owner can see first whether everything is there.
    fn cleanup(&self) -> Result<()>;
    /// What it can besides, in containerd's words. `rebase`: [`Snapshotter::commit_stack`] takes parents. `remap-ids`: the labels `containerd.io/snapshot/uidmapping` and
    /// `gidmapping` of a snapshot give it the owners of a user namespace.
    fn capabilities(&self) -> &'static [&'static str] {
        &[]
    }
}

/// The names of the built-in snapshotters, the default first.
pub const NAMES: [&str; 4] = [overlay::NAME, native::NAME, btrfs::NAME, erofs::NAME];

/// Opens a built-in snapshotter on its folder; InvalidArgument for a name that is none.
pub fn open(name: &str, root: &Path) -> Result<Arc<dyn Snapshotter>> {
    match name {
        overlay::NAME => Ok(Arc::new(Overlay::open(root)?)),
        native::NAME => Ok(Arc::new(Native::open(root)?)),
        btrfs::NAME => Ok(Arc::new(Btrfs::open(root)?)),
        erofs::NAME => Ok(Arc::new(Erofs::open(root)?)),
        _ => Err(Error::InvalidArgument(format!(
            "snapshotter {name:?} is not known; these are: {}",
            NAMES.join(", ")
        ))),
    }
}
