//! `gantryd check`: whether everything that was acknowledged is there and whole, and whether nothing is there that has no owner.
//!
//! ```text
//!  look.rs    records, files, mounts, processes --> world.rs: a picture
//!  deep.rs    every byte of it, if that is wanted
//!  judge.rs   a picture --> findings, each with what would mend it (pure)
//!  repair.rs  findings --> steps in a safe order (pure); the steps, one by one
//!  report.rs  lines, or JSON
//! ```
//!
//! It runs while no engine does, which the lock of the metadata says, and holds off any until it has ended. Containers go on
//! in the hands of their shims.
//!
//! Invariants: without a repair nothing is changed. A repair touches nothing that anybody has a claim to, and nothing outside of
//! the engine's root and state but what is provably this engine's: processes that were started in its bundles with its address,
//! containers that the runtime made from its bundles, empty control groups by the names of its containers, sockets by the
//! names that only its shims have.

mod deep;
mod judge;
mod look;
mod repair;
mod report;
#[cfg(test)]
mod tests;
mod world;

use std::path::PathBuf;

use anyhow::Context as _;
use serde::Serialize;

pub use report::Report;

use crate::config::Config;
use crate::daemon::METADATA_FOLDER;
use crate::metadata::OpenError;
use crate::metadata::offline::Offline;

/// What is to be done.
#[derive(Debug, Clone, Copy, Default)]
pub struct Wanted {
    /// Read every blob and every file of a layer.
    pub deep: bool,
    /// Mend what can be mended.
    pub repair: bool,
}

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Class {
    /// Acknowledged, and not there or not whole.
    Lost,
    /// There, and nobody's.
    Leaked,
    /// What the next start mends: no fault.
    Pending,
}

/// One thing that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Finding {
    /// How bad it is.
    pub class: Class,
    /// What it is about.
    pub kind: &'static str,
    /// Its name: with its namespace, or a path.
    pub name: String,
    /// What is wrong.
    pub what: String,
    /// What a repair does about it; None when there is nothing it can do.
    pub repair: Option<Action>,
    /// What else mends it; empty for nothing.
    pub remedy: String,
}

/// A step of a repair.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Action {
    /// Kills a shim, if it is still the same process.
    KillShim { pid: u32, started: u64 },
    /// Has the runtime end and delete a container.
    DeleteContainer { root: PathBuf, id: String },
    /// Unmounts what is at a path and beneath it.
    Unmount { path: PathBuf },
    /// Detaches a loop device, if it still holds this file.
    Detach { device: PathBuf, file: PathBuf },
    /// Removes a control group that has no process.
    RemoveGroup { folder: PathBuf },
    /// Removes a socket at which nobody listens.
    RemoveSocket { path: PathBuf },
    /// Moves a record to a file.
    SetAside { key: Vec<u8> },
    /// Records a namespace.
    NameNamespace { namespace: String },
    /// Deletes a record of what a lease holds.
    DeleteResource { parts: Vec<String> },
    /// Records that a snapshot is stacked on another: namespace, snapshotter, parent, child.
    NoteChild { child: [String; 4] },
    /// Deletes such a record.
    ForgetChild { child: [String; 4] },
    /// Removes snapshots, from the top: their names, empty where there is none, and what the snapshotter calls them.
    ForgetSnapshots { namespace: String, snapshotter: String, names: Vec<(String, String)> },
    /// Removes a blob from all namespaces, with its file.
    ForgetBlob { digest: String },
    /// Removes a file or folder beneath the root or the state, with nothing mounted in it.
    RemoveTree { path: PathBuf },
}

/// Checks the engine's folders, and repairs them if that is wanted. Blocks.
///
/// # Errors
/// When it cannot be checked: an engine runs, or something cannot be looked at.
pub fn run(config: &Config, wanted: Wanted) -> anyhow::Result<Report> {
    if !rustix::process::geteuid().is_root() {
        anyhow::bail!(
            "checking takes root, who alone may look at the engine's folders; try sudo gantryd check"
        );
    }
    let dir = config.root.join(METADATA_FOLDER);
    let offline = Offline::open(&dir).map_err(|error| match error {
        OpenError::InUse(_) => anyhow::anyhow!(
            "gantryd is running on {}, and what it is changing cannot be judged: stop it (its containers go on), check, and \
             start it again",
            config.root.display()
        ),
        error => error.into(),
    })?;
    let mut offline =
        offline.with_context(|| format!("there is no metadata in {}; is --root right?", dir.display()))?;
    let mut judgement = once(config, &offline, wanted.deep)?;
    if !wanted.repair {
        return Ok(Report::new(judgement, None));
    }
    let mut done = Vec::new();
    loop {
        let steps = repair::plan(&judgement.findings, &done);
        if steps.is_empty() {
            return Ok(Report::new(judgement, Some(done)));
        }
        for step in steps {
            done.push(repair::take(config, &mut offline, step));
        }
        // What goes may have held others that are to go with it.
        judgement = once(config, &offline, wanted.deep)?;
    }
}

fn once(config: &Config, offline: &Offline, deep: bool) -> anyhow::Result<judge::Judgement> {
    let mut world = look::look(config, offline)?;
    if deep {
        world.deep = Some(deep::read(&world));
    }
    Ok(judge::judge(&world))
}
