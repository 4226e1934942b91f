//! Repairs: which steps, in which order, and each of them.
//!
//! ```text
//!  shims, containers --> mounts, loop devices --> control groups, sockets --> records --> snapshots, blobs --> folders
//! ```
//!
//! Invariants: a step makes sure that what it is about is still what was judged. It is taken once: what fails is told, and not
//! tried again. Records go before the files that they name, so that a kill leaves what is collected later. Nothing is removed
//! through a mount.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context as _, bail};
use oci::Digest;
use proto::containerd::services::leases::v1::Lease;

use super::look::{blob_path, groups_in, has_process, started};
use super::{Action, Finding};
use crate::config::Config;
use crate::content;
use crate::metadata::Read as _;
use crate::metadata::content::BlobRecord;
use crate::metadata::leases::LeaseResource;
use crate::metadata::namespaces::NamespaceRecord;
use crate::metadata::offline::Offline;
use crate::metadata::snapshots::{SnapshotChild, SnapshotRecord};
use crate::tasks::launch::remove_dead_socket;

/// How long a killed process may take to be gone.
const KILL_LIMIT: Duration = Duration::from_secs(10);

/// A step that was taken.
#[derive(Debug, Clone)]
pub(super) struct Done {
    /// What it was.
    pub(super) step: Action,
    /// What came of it; or why nothing did.
    pub(super) outcome: Result<String, String>,
}

/// The steps that mend what was found, each once, in a safe order; without those that were taken already.
pub(super) fn plan(findings: &[Finding], done: &[Done]) -> Vec<Action> {
    let taken: BTreeSet<&Action> = done.iter().map(|done| &done.step).collect();
    let steps: BTreeSet<&Action> = findings.iter().filter_map(|finding| finding.repair.as_ref()).collect();
    // The order of the variants is that of the steps.
    steps.difference(&taken).map(|step| (*step).clone()).collect()
}

/// Takes a step.
pub(super) fn take(config: &Config, offline: &mut Offline, step: Action) -> Done {
    let outcome = act(config, offline, &step).map_err(|error| format!("{error:#}"));
    Done { step, outcome }
}

fn act(config: &Config, offline: &mut Offline, step: &Action) -> anyhow::Result<String> {
    match step {
        Action::KillShim { pid, started } => kill(*pid, *started),
        Action::DeleteContainer { root, id } => delete_container(root, id),
        Action::Unmount { path } => {
            sys::mount::unmount_all(path).with_context(|| format!("cannot unmount {}", path.display()))?;
            Ok(format!("unmounted {}", path.display()))
        }
        Action::Detach { device, file } => {
            if sys::loopdev::backing_file(device)?.as_ref() != Some(file) {
                bail!("{} does not hold {} any more", device.display(), file.display());
            }
            sys::loopdev::Loop::open(device)
                .and_then(sys::loopdev::Loop::detach)
                .with_context(|| format!("cannot detach {}", device.display()))?;
            Ok(format!("detached {} from {}", device.display(), file.display()))
        }
        Action::RemoveGroup { folder } => {
            if has_process(folder) {
                bail!("a process is in {} now", folder.display());
            }
            remove_group(folder).with_context(|| format!("cannot remove {}", folder.display()))?;
            Ok(format!("removed the control group {}", folder.display()))
        }
        Action::RemoveSocket { path } => {
            let removed =
                remove_dead_socket(path).with_context(|| format!("cannot remove {}", path.display()))?;
            if !removed {
                bail!("somebody listens at {} now", path.display());
            }
            Ok(format!("removed {}", path.display()))
        }
        Action::SetAside { key } => {
            let file = offline.set_aside(key)?;
            Ok(format!("moved the record to {}; what it held may be collected", file.display()))
        }
        Action::NameNamespace { namespace } => {
            offline.change(|txn| txn.put(&[namespace], &NamespaceRecord::default()))?;
            Ok(format!("recorded the namespace {namespace}"))
        }
        Action::DeleteResource { parts } => {
            let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
            offline.change(|txn| {
                let [namespace, lease, ..] = parts[..] else { return Ok(()) };
                if !txn.has::<Lease>(&[namespace, lease])? {
                    txn.delete::<LeaseResource>(&parts)?;
                }
                Ok(())
            })?;
            Ok(format!("deleted the record {}", parts.join("/")))
        }
        Action::NoteChild { child } => {
            offline.change(|txn| txn.put(&child.each_ref().map(String::as_str), &SnapshotChild {}))?;
            Ok(format!("recorded that {} is stacked on {}", child[3], child[2]))
        }
        Action::ForgetChild { child } => {
            offline
                .change(|txn| txn.delete::<SnapshotChild>(&child.each_ref().map(String::as_str)).map(drop))?;
            Ok(format!("deleted the record that {} is stacked on {}", child[3], child[2]))
        }
        Action::ForgetSnapshots { namespace, snapshotter, names } => {
            forget_snapshots(config, offline, namespace, snapshotter, names)
        }
        Action::ForgetBlob { digest } => forget_blob(config, offline, digest),
        Action::RemoveTree { path } => {
            let ours = [&config.root, &config.state].map(|folder| folder.canonicalize().unwrap_or_default());
            if !ours.iter().any(|folder| path.starts_with(folder) && path != folder) {
                bail!("{} is not beneath root or state", path.display());
            }
            remove_tree(path)?;
            Ok(format!("removed {}", path.display()))
        }
    }
}

fn kill(pid: u32, when: u64) -> anyhow::Result<String> {
    // Held while it is looked at, so that what is killed is what was looked at.
    let process = match sys::pidfd::open(pid) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(format!("shim {pid} has ended")),
        process => process.with_context(|| format!("cannot open process {pid}"))?,
    };
    if started(pid) != Some(when) {
        return Ok(format!("shim {pid} has ended"));
    }
    match sys::pidfd::send_signal(&process, 9) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => {
            return Err(error).with_context(|| format!("cannot kill shim {pid}"));
        }
        _ => {}
    }
    let deadline = Instant::now() + KILL_LIMIT;
    while started(pid) == Some(when) && !is_zombie(pid) {
        if Instant::now() > deadline {
            bail!("shim {pid} was killed, and is not gone within {KILL_LIMIT:?}");
        }
        std::thread::sleep(Duration::from_millis(5));
    }
    Ok(format!("killed shim {pid}"))
}

fn is_zombie(pid: u32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')').is_none_or(|(_, rest)| rest.trim_start().starts_with('Z'))
}

fn delete_container(root: &Path, id: &str) -> anyhow::Result<String> {
    let output = Command::new("runc")
        .arg("--root")
        .arg(root)
        .args(["delete", "--force", id])
        .output()
        .context("cannot run runc")?;
    if !output.status.success() {
        let said = String::from_utf8_lossy(&output.stderr);
        bail!("runc --root {} delete --force {id}: {}: {}", root.display(), output.status, said.trim());
    }
    Ok(format!("ended and deleted container {id} of {}", root.display()))
}

fn remove_group(folder: &Path) -> io::Result<()> {
    for group in groups_in(folder) {
        remove_group(&group)?;
    }
    match fs::remove_dir(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn forget_snapshots(
    config: &Config,
    offline: &mut Offline,
    namespace: &str,
    snapshotter: &str,
    names: &[(String, String)],
) -> anyhow::Result<String> {
    offline.change(|txn| {
        for (name, inner) in names.iter().filter(|(name, _)| !name.is_empty()) {
            let record = txn.get::<SnapshotRecord>(&[namespace, snapshotter, name])?;
            if record.is_some_and(|record| record.inner == *inner) {
                crate::snapshots::forget(txn, namespace, snapshotter, name)?;
            }
        }
        Ok(())
    })?;
    let root = config.root.join(format!("io.containerd.snapshotter.v1.{snapshotter}"));
    let keys: Vec<String> = names.iter().map(|(_, inner)| inner.clone()).collect();
    snapshotter::forget(snapshotter, &root, &keys)?;
    let shown: Vec<&str> =
        names.iter().map(|(name, inner)| if name.is_empty() { inner.as_str() } else { name }).collect();
    Ok(format!("removed from {namespace}/{snapshotter}, to be made anew: {}", shown.join(", ")))
}

fn forget_blob(config: &Config, offline: &mut Offline, digest: &str) -> anyhow::Result<String> {
    let parsed: Digest = digest.parse()?;
    offline.change(|txn| {
        for namespace in txn.keys::<NamespaceRecord>(&[]).into_iter().flatten() {
            txn.delete::<BlobRecord>(&[&namespace, digest])?;
        }
        Ok(())
    })?;
    remove_tree(&blob_path(&config.root.join(content::FOLDER), &parsed))?;
    Ok(format!("removed blob {digest} from all namespaces; the next pull fetches it"))
}

/// Removes what is at a path, unless something is mounted there or beneath it.
fn remove_tree(path: &Path) -> anyhow::Result<()> {
    let mounts: Vec<PathBuf> = sys::mount::mounts_under(path)?;
    if let Some(mount) = mounts.first() {
        bail!("{} is mounted in it", mount.display());
    }
    sys::fs::remove_tree(path).with_context(|| format!("cannot remove {}", path.display()))
}
