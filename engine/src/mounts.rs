//! Mounts that the engine keeps for clients: those that one system call does not make, such as a file system in an image
//! file, or layers that have to be mounted before an overlay can name them.
//!
//! ```text
//!  (none) --activate: record--> incomplete --mounts made: record--> complete --deactivate or collection: no record-->
//!            |                       |                                                                  taken down
//!            +---- fails, or the engine was killed: no record, taken down -----------------------------------+
//!
//!  <state>/io.containerd.mount-manager.v1.gantry/t/FOLDER/N     where the Nth mount is (a link to the device for a loop)
//! ```
//!
//! Invariants: a folder is made after the record that names it and taken down after that record is gone, so that what has
//! no record is nobody's: it goes at the next start or collection. A complete record's mounts are there; those that a
//! reboot took are found out at the start.

mod plan;
mod transform;

use std::collections::HashSet;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::SystemTime;

use parking_lot::Mutex;
use proto::containerd::types::{ActivationInfo, ActiveMount, Mount};
use sys::loopdev::{self, Loop};

use self::plan::{Plan, plan};
use crate::context::{Namespace, RequestContext};
use crate::error::{Error, Result, blocking, outlive};
use crate::filters::{self, Filter};
use crate::labels::{self, Labels};
use crate::leases;
use crate::metadata::mounts::MountRecord;
use crate::metadata::namespaces::NamespaceRecord;
use crate::metadata::{Metadata, Read, View};

/// The folder of the mounts beneath the engine's state.
pub(crate) const FOLDER: &str = "io.containerd.mount-manager.v1.gantry";
/// The longest name of an activation, in bytes.
const NAME_MAX: usize = 4096;

/// The activations of all namespaces; cheap to clone.
#[derive(Clone)]
pub struct Mounts {
    metadata: Metadata,
    targets: PathBuf,
    /// Beneath which transforms may make something.
    roots: Arc<[PathBuf]>,
    /// The number for the next folder.
    number: Arc<AtomicU64>,
    /// One at a time takes things down, so that none meets what another is at.
    sweeping: Arc<Mutex<()>>,
}

/// What is to be activated.
#[derive(Debug, Clone, Default)]
pub struct Activation {
    /// Its name in the namespace.
    pub name: String,
    /// The mounts, the lowest first.
    pub mounts: Vec<Mount>,
    /// Its labels.
    pub labels: Labels,
    /// Whether the engine is to mount all of them, for somebody who only wants to look inside.
    pub temporary: bool,
}

impl Mounts {
    /// Opens the folder in `state`, takes down what has no record, and forgets what a reboot took down. Things are made
    /// beneath `root` on request.
    pub fn open(root: &Path, state: &Path, metadata: Metadata) -> Result<Self> {
        let targets = state.join(FOLDER).join("t");
        sys::fs::create_dir_all(&targets, 0o700).map_err(|error| Error::io("create", &targets, &error))?;
        let highest = names(&targets)?.iter().filter_map(|name| name.parse::<u64>().ok()).max();
        Ok(Mounts {
            metadata,
            roots: [root.to_owned(), targets.clone()].into(),
            targets,
            number: Arc::new(AtomicU64::new(highest.unwrap_or_default() + 1)),
            sweeping: Arc::default(),
        })
    }

    /// Makes records and mounts agree again, once, before clients are served.
    pub async fn restore(&self) -> Result<()> {
        let (view, this) = (self.metadata.view(), self.clone());
        let gone = blocking(move || {
            let mut gone = Vec::new();
            for (namespace, name, record) in all(&view)? {
                if !record.complete || !this.stands(&record) {
                    gone.push((namespace, name));
                }
            }
            Ok(gone)
        })
        .await?;
        if !gone.is_empty() {
            tracing::info!(count = gone.len(), "forgetting mounts that are not there any more");
            self.metadata
                .commit(move |txn| {
                    for (namespace, name) in &gone {
                        txn.delete::<MountRecord>(&[namespace, name])?;
                    }
                    Ok(())
                })
                .await?;
        }
        self.sweep().await
    }

    /// Mounts what the client cannot mount itself; what is left for it is in the answer. Unimplemented when it can mount
    /// all, AlreadyExists when the name is taken.
    pub async fn activate(&self, context: &RequestContext, new: Activation) -> Result<ActivationInfo> {
        let namespace = context.namespace()?.clone();
        labels::validate_all(&new.labels)?;
        validate_name(&new.name)?;
        let plan = plan(new.mounts.iter().map(|mount| mount.r#type.as_str()), new.temporary)?;
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            let folder = this.number.fetch_add(1, Ordering::Relaxed).to_string();
            this.record(&namespace, &context, &new, &folder).await?;
            let mounted = {
                let (this, new, folder) = (this.clone(), new.clone(), folder.clone());
                blocking(move || this.mount(&folder, new, plan)).await
            };
            let completed = match mounted {
                Ok(mounted) => this.complete(&namespace, &new.name, &folder, mounted).await,
                Err(error) => Err(error.context(format!("activate mount {:?}", new.name))),
            };
            if completed.is_err() {
                this.forget(&namespace, &new.name, &folder).await;
            }
            completed
        })
        .await
    }

    /// Takes down what was mounted; NotFound when there is no such activation.
    pub async fn deactivate(&self, context: &RequestContext, name: String) -> Result<()> {
        let namespace = context.namespace()?.clone();
        let this = self.clone();
        outlive(async move {
            let record = this
                .metadata
                .commit(move |txn| {
                    let key = [namespace.as_str(), name.as_str()];
                    let record = txn.get::<MountRecord>(&key)?.ok_or_else(|| missing(&name))?;
                    if !record.complete {
                        return Err(busy(&name));
                    }
                    txn.delete::<MountRecord>(&key)?;
                    txn.release();
                    Ok(record)
                })
                .await?;
            blocking(move || this.take_down(&record.folder)).await
        })
        .await
    }

    /// One activation; NotFound when there is none of this name.
    pub fn info(&self, context: &RequestContext, name: &str) -> Result<ActivationInfo> {
        let record = self.metadata.view().get::<MountRecord>(&[context.namespace()?.as_str(), name])?;
        let record = record.filter(|record| record.complete).ok_or_else(|| missing(name))?;
        Ok(info(name.to_owned(), record))
    }

    /// The activations that pass the filters (`name`, `labels.KEY`).
    pub fn list(&self, context: &RequestContext, filters: &[String]) -> Result<Vec<ActivationInfo>> {
        let namespace = context.namespace()?;
        let filter = Filter::parse_all(filters)?;
        let records = self.metadata.view().list::<MountRecord>(&[namespace.as_str()]);
        let complete = records.into_iter().filter(|(_, record)| record.complete);
        let infos =
            complete.map(|(parts, record)| info(parts.into_iter().next().unwrap_or_default(), record));
        Ok(infos
            .filter(|info| {
                filter.matches(|path| match path {
                    ["name"] => Some(info.name.as_str().into()),
                    ["labels", rest @ ..] => filters::label(&info.labels, rest),
                    _ => None,
                })
            })
            .collect())
    }

    /// Sets labels: those that the mask names (`labels`, `labels.KEY`), or all when it names nothing.
    pub async fn update(
        &self,
        context: &RequestContext,
        new: ActivationInfo,
        mask: Vec<String>,
    ) -> Result<ActivationInfo> {
        let namespace = context.namespace()?.clone();
        self.metadata
            .commit(move |txn| {
                let key = [namespace.as_str(), new.name.as_str()];
                let record = txn.get::<MountRecord>(&key)?.filter(|record| record.complete);
                let mut record = record.ok_or_else(|| missing(&new.name))?;
                let whole = ["labels".to_owned()];
                for path in if mask.is_empty() { &whole[..] } else { &mask[..] } {
                    match labels::split_path(path) {
                        ("labels", key) => labels::update_map(&mut record.labels, &new.labels, key),
                        _ => {
                            return Err(Error::invalid_argument(format!(
                                "field {path:?} of mount {:?} cannot be updated; labels can",
                                new.name
                            )));
                        }
                    }
                }
                labels::validate_all(&record.labels)?;
                record.updated = Some(SystemTime::now().into());
                txn.put(&key, &record)?;
                txn.release();
                Ok(info(new.name, record))
            })
            .await
    }

    /// Takes down what has no record.
    pub async fn sweep(&self) -> Result<()> {
        let this = self.clone();
        blocking(move || {
            // In this order: an activation records its folder before it makes it.
            let folders = names(&this.targets)?;
            let records = all(&this.metadata.view())?;
            let recorded: HashSet<&str> = records.iter().map(|(_, _, record)| &*record.folder).collect();
            for folder in folders.iter().filter(|folder| !recorded.contains(folder.as_str())) {
                if let Err(error) = this.take_down(folder) {
                    // The next sweep tries again.
                    tracing::warn!(folder, %error, "a mount of nobody stays");
                }
            }
            Ok(())
        })
        .await
    }

    /// Records that an activation has begun.
    async fn record(
        &self,
        namespace: &Namespace,
        context: &RequestContext,
        new: &Activation,
        folder: &str,
    ) -> Result<()> {
        let (namespace, context) = (namespace.clone(), context.clone());
        let (name, labels, folder) = (new.name.clone(), new.labels.clone(), folder.to_owned());
        self.metadata
            .commit(move |txn| {
                let key = [namespace.as_str(), name.as_str()];
                if let Some(record) = txn.get::<MountRecord>(&key)? {
                    return Err(match record.complete {
                        true => Error::already_exists(format!("mount {name:?} is active already")),
                        false => busy(&name),
                    });
                }
                let now = Some(SystemTime::now().into());
                let record =
                    MountRecord { folder, labels, created: now, updated: now, ..MountRecord::default() };
                txn.put(&key, &record)?;
                leases::join(txn, &context, leases::MOUNTS, &name)
            })
            .await
    }

    /// Records that all is mounted.
    async fn complete(
        &self,
        namespace: &Namespace,
        name: &str,
        folder: &str,
        (active, system): (Vec<ActiveMount>, Vec<Mount>),
    ) -> Result<ActivationInfo> {
        let (namespace, name, folder) = (namespace.clone(), name.to_owned(), folder.to_owned());
        self.metadata
            .commit(move |txn| {
                let key = [namespace.as_str(), name.as_str()];
                let record = txn.get::<MountRecord>(&key)?.filter(|record| record.folder == folder);
                // Only a deleted namespace takes a record away meanwhile.
                let record = record.ok_or_else(|| missing(&name))?;
                let updated = Some(SystemTime::now().into());
                let record = MountRecord { complete: true, active, system, updated, ..record };
                txn.put(&key, &record)?;
                Ok(info(name, record))
            })
            .await
    }

    /// Undoes an activation that failed.
    async fn forget(&self, namespace: &Namespace, name: &str, folder: &str) {
        let (namespace, name, of) = (namespace.clone(), name.to_owned(), folder.to_owned());
        let forgotten = self.metadata.commit(move |txn| {
            let key = [namespace.as_str(), name.as_str()];
            if txn.get::<MountRecord>(&key)?.is_some_and(|record| record.folder == of) {
                txn.delete::<MountRecord>(&key)?;
            }
            Ok(())
        });
        if let Err(error) = forgotten.await {
            tracing::warn!(%error, "the record of a failed activation stays until the next start");
            return;
        }
        let (this, folder) = (self.clone(), folder.to_owned());
        if let Err(error) = blocking(move || this.take_down(&folder)).await {
            tracing::warn!(%error, "what a failed activation mounted stays until the next sweep");
        }
    }

    /// Mounts the first mounts of a plan; what is active then, and what is left.
    fn mount(&self, folder: &str, new: Activation, plan: Plan) -> Result<(Vec<ActiveMount>, Vec<Mount>)> {
        let folder = self.targets.join(folder);
        sys::fs::create_dir(&folder, 0o700).map_err(|error| Error::io("create", &folder, &error))?;
        let mut active: Vec<ActiveMount> = Vec::with_capacity(plan.own);
        let mut system = Vec::new();
        let mut last_is_device = false;
        for (at, (mut mount, step)) in new.mounts.into_iter().zip(plan.steps).enumerate() {
            if at > plan.own {
                system.push(mount);
                continue;
            }
            for transform in &step.transforms {
                transform::apply(*transform, &mut mount, &active, &self.roots)?;
            }
            // What could not be taken apart stays in the type, and the kernel refuses it.
            mount.r#type.clone_from(&step.kind);
            if at == plan.own {
                system.push(mount);
                continue;
            }
            let point = folder.join(at.to_string());
            let mounted_at = Some(SystemTime::now().into());
            last_is_device = step.is_loop();
            if step.is_loop() {
                attach(&mount, &point)?;
            } else {
                sys::fs::create_dir(&point, 0o700).map_err(|error| Error::io("create", &point, &error))?;
                let made = to_sys(&mount).mount(&point);
                made.map_err(|error| refused(&error, &point))?;
            }
            let mount_point = point.display().to_string();
            active.push(ActiveMount {
                mount: Some(mount),
                mounted_at,
                mount_point,
                ..ActiveMount::default()
            });
        }
        // All is mounted: this is the way to it.
        if system.is_empty()
            && !last_is_device
            && let Some(last) = active.last()
        {
            system.push(Mount {
                r#type: "bind".into(),
                source: last.mount_point.clone(),
                target: String::new(),
                options: vec!["rbind".into()],
            });
        }
        Ok((active, system))
    }

    /// Whether all that a record names is there.
    fn stands(&self, record: &MountRecord) -> bool {
        record.active.iter().all(|active| {
            let point = Path::new(&active.mount_point);
            match active.mount.as_ref().map(|mount| (mount.r#type.as_str(), &mount.source)) {
                Some(("loop", source)) => device_of(point, Some(Path::new(source))).is_some(),
                _ => sys::mount::is_mountpoint(point).unwrap_or(false),
            }
        })
    }

    /// Takes down all that is in a folder, the last first, and removes it. What is not there any more is no error.
    fn take_down(&self, folder: &str) -> Result<()> {
        let _one = self.sweeping.lock();
        let folder = self.targets.join(folder);
        let mut points: Vec<u64> = match names(&folder) {
            Ok(names) => names.iter().filter_map(|name| name.parse().ok()).collect(),
            Err(Error::NotFound(_)) => return Ok(()),
            Err(error) => return Err(error),
        };
        points.sort_unstable();
        for point in points.iter().rev().map(|number| folder.join(number.to_string())) {
            if point.is_symlink() {
                if let Some(device) = device_of(&point, None) {
                    detach(&device)?;
                }
                fs::remove_file(&point).map_err(|error| Error::io("remove", &point, &error))?;
            } else {
                sys::mount::unmount_all(&point).map_err(|error| Error::io("unmount", &point, &error))?;
                // Not with what is in it: were it still mounted, that would be somebody's data.
                fs::remove_dir(&point).map_err(|error| Error::io("remove", &point, &error))?;
            }
        }
        fs::remove_dir_all(&folder).map_err(|error| Error::io("remove", &folder, &error))
    }
}

/// A mount that the kernel refused: for what it was asked for, or for what it met.
fn refused(error: &sys::mount::MountError, point: &Path) -> Error {
    use rustix::io::Errno;
    let what = format!("mount {} {:?} on", error.mount.kind, error.mount.source);
    let asked_for =
        [Errno::NODEV, Errno::INVAL, Errno::NOTBLK, Errno::NOTDIR, Errno::NAMETOOLONG, Errno::LOOP];
    if Errno::from_io_error(&error.source).is_some_and(|code| asked_for.contains(&code)) {
        return Error::invalid_argument(format!("{what} {}: {}", point.display(), error.source));
    }
    Error::io(what, point, &error.source)
}

/// Attaches an image file; `point` becomes a link to its device. Next to it is noted which file it was.
fn attach(mount: &Mount, point: &Path) -> Result<()> {
    let read_only = mount.options.iter().any(|option| option == "ro");
    let failed = |error: io::Error| Error::io("attach a loop device to", &mount.source, &error);
    let backing = fs::canonicalize(&mount.source).map_err(failed)?;
    let device = Loop::attach(&backing, read_only).map_err(failed)?;
    let note = noted(point);
    std::os::unix::fs::symlink(&backing, &note).map_err(|error| Error::io("create", &note, &error))?;
    std::os::unix::fs::symlink(device.path(), point).map_err(|error| Error::io("create", point, &error))?;
    // Only now, when it can be found again.
    device.keep(true).map_err(failed)
}

/// Where the file of a loop device is noted.
fn noted(point: &Path) -> PathBuf {
    point.with_extension("file")
}

/// The device that a link leads to, while it is still that of the file that it was made for: numbers are used again.
fn device_of(point: &Path, source: Option<&Path>) -> Option<PathBuf> {
    let device = fs::read_link(point).ok()?;
    let noted = fs::read_link(noted(point)).ok()?;
    if let Some(source) = source
        && fs::canonicalize(source).ok()? != noted
    {
        return None;
    }
    let backing = loopdev::backing_file(&device).ok()??;
    (backing == noted).then_some(device)
}

fn detach(device: &Path) -> Result<()> {
    let detached = Loop::open(device).and_then(Loop::detach);
    detached.map_err(|error| Error::io("detach", device, &error))
}

fn to_sys(mount: &Mount) -> sys::mount::Mount {
    sys::mount::Mount {
        kind: mount.r#type.clone(),
        source: mount.source.clone(),
        target: String::new(),
        options: mount.options.clone(),
    }
}

fn names(folder: &Path) -> Result<Vec<String>> {
    let failed = |error: io::Error| Error::io("list", folder, &error);
    let mut names = Vec::new();
    for entry in fs::read_dir(folder).map_err(failed)? {
        names.push(entry.map_err(failed)?.file_name().to_string_lossy().into_owned());
    }
    Ok(names)
}

/// Every record: namespace, name, record.
fn all(view: &View) -> Result<Vec<(String, String, MountRecord)>> {
    let mut all = Vec::new();
    for namespace in view.keys::<NamespaceRecord>(&[]).into_iter().flatten() {
        for (parts, record) in view.list_all::<MountRecord>(&[&namespace])? {
            all.push((namespace.clone(), parts.into_iter().next().unwrap_or_default(), record));
        }
    }
    Ok(all)
}

fn info(name: String, record: MountRecord) -> ActivationInfo {
    ActivationInfo { name, active: record.active, system: record.system, labels: record.labels }
}

fn validate_name(name: &str) -> Result<()> {
    if name.is_empty() || name.len() > NAME_MAX {
        return Err(Error::invalid_argument(format!(
            "the name of a mount has 1 to {NAME_MAX} bytes, and this one has {}",
            name.len()
        )));
    }
    Ok(())
}

fn missing(name: &str) -> Error {
    Error::not_found(format!("mount {name:?} does not exist"))
}

fn busy(name: &str) -> Error {
    Error::unavailable(format!("mount {name:?} is being activated by another call; try again"))
}
