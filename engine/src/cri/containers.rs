//! The verbs of containers.
//!
//! ```text
//!  create  record (Making) --- snapshot --- account files, volumes --- spec --- containerd's record --- record (Created)
//!  start   task made in the pod's shim, its output going to the log --- started --- record (Running)
//!  stop    signal --- the grace --- SIGKILL --- until the record says Exited
//!  remove  stopped --- record (Removing) --- task, containerd's record, snapshot, files --- no record
//! ```

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use oci::runtime::Spec;
use oci::user::{Accounts, FILE_LIMIT};
use prost_types::Any;
use proto::containerd::runc::v1::Options;
use proto::containerd::services::containers::v1::{Container as Record, container::Runtime as RuntimeOf};
use proto::containerd::services::tasks::v1::CreateTaskRequest;
use proto::containerd::v1::types::Status;
use proto::runtime::v1::{
    Container as Listed, ContainerConfig, ContainerEventType, ContainerFilter, ContainerResources,
    ContainerState, ContainerStatus, ContainerStatusResponse, ContainerUser, CreateContainerRequest,
    ImageSpec, MountPropagation, NamespaceMode, PodSandboxConfig, UpdateContainerResourcesRequest,
};
use rustix::fs::{Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use shim_api::logs::{LogSpec, Stdin};
use snapshotter::Kind;
use sys::mount::{Mount, Mounted};

use super::images::Local;
use super::pods::{labels, selects};
use super::runtime::{Runtime, context, gone_is_fine, new_id, now};
use super::settings::Handler;
use super::spec;
use super::store::{Container, Pod};
use crate::context::RequestContext;
use crate::error::{Error, Result, blocking, outlive};
use crate::metadata::cri::{ContainerStage, PodContainerRecord, PodStage};
use crate::snapshots::New;

/// How long the end of a container may take after it was killed.
const KILL_LIMIT: Duration = Duration::from_secs(60);
/// After which time of waiting for an end the task is asked.
const ASK_AFTER: Duration = Duration::from_secs(5);
/// SIGKILL
const KILL: u32 = 9;
/// What containers get as their exit code whose start failed, as in containerd.
const NOT_STARTED: i32 = 128;
/// The label that keeps a snapshot until it is removed: no record names it while its container is being made.
const ROOT: &str = "containerd.io/gc.root";

/// What a container's spec is made from, beside what the kubelet asks for.
struct Basis {
    handler: Handler,
    options: Arc<spec::Options>,
    image: Local,
    pod: PodSandboxConfig,
}

impl Runtime {
    /// Makes a container in a pod; its id. Joins an attempt for one of the same name that is under way, and finds one of that
    /// name that was made and not started.
    pub async fn create_container(&self, request: CreateContainerRequest) -> Result<String> {
        let pod = self.made_pod(&request.pod_sandbox_id)?;
        let config = request.config.unwrap_or_default();
        let metadata = config.metadata.clone().unwrap_or_default();
        if metadata.name.is_empty() {
            return Err(Error::invalid_argument("the container's config has no metadata with a name"));
        }
        let name = format!("{}_{}_{}", metadata.name, metadata.attempt, pod.id);
        let (this, asked) = (self.clone(), request.sandbox_config);
        let what = format!("create container {} in pod {}", metadata.name, pod.id);
        let created =
            self.creates.join(name, move || async move { this.create_named(&pod, config, asked).await });
        created.await.map_err(|error| error.context(what))
    }

    async fn create_named(
        &self,
        pod: &Arc<Pod>,
        config: ContainerConfig,
        asked: Option<PodSandboxConfig>,
    ) -> Result<String> {
        if let Some(container) = self.container_named(pod, &config) {
            if container.stage() == ContainerStage::Created {
                return Ok(container.id.clone());
            }
            return Err(Error::already_exists(format!(
                "container {} has this name and has been started; remove it, or count the attempt up",
                container.id
            )));
        }
        let pod_config = asked.or_else(|| pod.record().config.clone()).unwrap_or_default();
        self.require_ready(pod)?;
        let wanted = config.image.as_ref().map_or("", |image| image.image.as_str());
        let image = self.image(wanted).await?;
        let handler = self.handler(&pod.record().handler)?.1.clone();
        let options = self.spec_options(&pod.record().handler).await?;
        let id = new_id()?;
        let log_path = match (pod_config.log_directory.as_str(), config.log_path.as_str()) {
            ("", _) | (_, "") => String::new(),
            (folder, file) => Path::new(folder).join(file).display().to_string(),
        };
        let record = PodContainerRecord {
            pod: pod.id.clone(),
            config: Some(config.clone()),
            stage: ContainerStage::Making.into(),
            created_at: now(),
            image_id: image.id.clone(),
            image_ref: image.by_digest.clone(),
            log_path,
            streams: self.places.streams(&id).display().to_string(),
            snapshotter: handler.snapshotter.clone(),
            ..PodContainerRecord::default()
        };
        let _turn = self.turns.of(&id).await;
        let _step = self.step(&id, "being made");
        let container = self.store.add_container(&id, record).await?;
        sys::failpoint!("container.create.noted");
        // A pod that is stopped from now on finds the record.
        let made = match self.require_ready(pod) {
            Ok(()) => {
                let basis = Basis { handler, options, image, pod: pod_config };
                self.make_container(pod, &container, config, &basis).await
            }
            refused => refused,
        };
        if let Err(error) = made {
            if let Err(error) = self.take_container_down(&container).await {
                tracing::warn!(id, %error, "what is left of a container that was not made is not gone yet");
                let container = container.clone();
                self.until_it_holds(
                    &id,
                    "what is left of a container that was not made is not gone yet",
                    move |this| {
                        let container = container.clone();
                        async move { this.take_container_down(&container).await }
                    },
                );
            }
            return Err(error);
        }
        self.tell(&id, pod, ContainerEventType::ContainerCreatedEvent).await;
        Ok(id)
    }

    fn container_named(&self, pod: &Pod, config: &ContainerConfig) -> Option<Arc<Container>> {
        self.store.containers_of(&pod.id).into_iter().find(|container| {
            let record = container.record();
            let has_it = !matches!(record.stage(), ContainerStage::Making | ContainerStage::Removing);
            has_it && record.config.as_ref().is_some_and(|other| other.metadata == config.metadata)
        })
    }

    fn require_ready(&self, pod: &Pod) -> Result<()> {
        match pod.stage() {
            PodStage::Ready => Ok(()),
            _ => Err(Error::failed_precondition(format!("pod {} is not ready", pod.id))),
        }
    }

    /// An image that is here; NotFound says what to do.
    pub(super) async fn image(&self, name: &str) -> Result<Local> {
        if name.is_empty() {
            return Err(Error::invalid_argument("the container's config names no image"));
        }
        self.parts
            .images
            .local(name)
            .await?
            .ok_or_else(|| Error::not_found(format!("image {name:?} is not here; pull it first")))
    }

    /// A snapshot over an image, which is unpacked if it was pulled for another snapshotter.
    pub(super) async fn snapshot(
        &self,
        context: &RequestContext,
        snapshotter: &str,
        snapshot: New,
        image: &str,
    ) -> Result<Vec<Mount>> {
        match self.parts.snapshots.create(context, snapshotter, snapshot.clone()).await {
            Err(Error::NotFound(_)) => {
                self.parts.images.unpack(image, snapshotter).await?;
                self.parts.snapshots.create(context, snapshotter, snapshot).await
            }
            made => made,
        }
    }

    async fn make_container(
        &self,
        pod: &Arc<Pod>,
        container: &Arc<Container>,
        mut config: ContainerConfig,
        basis: &Basis,
    ) -> Result<()> {
        let (context, id) = (context()?, container.id.as_str());
        let Basis { handler, options, image, pod: pod_config } = basis;
        let namespaces = self.namespaces_for(pod, &config)?;
        let image_mounts = self.mount_images(pod, &mut config, &handler.snapshotter).await?;
        let users = spec::Users::of_pod(pod_config)?;
        let held = [(ROOT.to_owned(), now().to_string())];
        let snapshot = New {
            key: id.to_owned(),
            parent: image.chain.as_ref().map(ToString::to_string).unwrap_or_default(),
            labels: held.into_iter().chain(users.iter().flat_map(spec::Users::labels)).collect(),
            kind: Kind::Active,
        };
        let mounts = self.snapshot(&context, &handler.snapshotter, snapshot, &image.id).await?;
        sys::failpoint!("container.create.snapshot");
        let accounts = self.accounts_of(image, &mounts).await?;
        let facts = {
            let (this, config, folder) = (self.clone(), config.clone(), self.places.pod(&pod.id));
            let options = options.clone();
            blocking(move || spec::Facts::gather(&config, &folder, &this.host, &options)).await?
        };
        let volumes = self.places.container(id).join("volumes");
        let built = spec::container(&spec::Wanted {
            pod_id: &pod.id,
            pod: pod_config,
            id,
            container: &config,
            image: &image.defaults,
            image_name: &image.name,
            accounts: Accounts { passwd: accounts.0.as_bytes(), group: accounts.1.as_bytes() },
            namespaces: &namespaces,
            volumes: &volumes,
            mapped: &self.places.mapped(id),
            host: &self.host,
            facts: &facts,
            options,
        })?;
        if !built.volumes.is_empty() {
            let (mounts, volumes, folder) = (mounts, built.volumes.clone(), self.places.mounts());
            let owner = users.as_ref().map_or((0, 0), spec::Users::root);
            blocking(move || fill(&mounts, &volumes, &folder, owner)).await?;
        }
        if !built.relabel.is_empty() {
            let label = built.spec.linux.as_ref().map(|linux| linux.mount_label.clone()).unwrap_or_default();
            let paths = built.relabel.clone();
            blocking(move || spec::relabel(&paths, &label)).await?;
        }
        let mut all_labels = image.defaults.labels.clone();
        all_labels.extend(config.labels.clone());
        let record = Record {
            id: id.to_owned(),
            labels: labels(&all_labels, "container"),
            image: image.name.clone(),
            runtime: Some(RuntimeOf { name: handler.runtime.clone(), options: handler.options.clone() }),
            spec: Some(proto::any::wrap(proto::any::SPEC, spec::encode(&built.spec)?)),
            snapshotter: handler.snapshotter.clone(),
            snapshot_key: id.to_owned(),
            sandbox: pod.id.clone(),
            ..Record::default()
        };
        self.parts.containers.create(&context, record).await?;
        sys::failpoint!("container.create.recorded");
        let created = self.store.change_container(container, move |record| {
            record.stage = ContainerStage::Created.into();
            record.stop_signal = built.stop_signal;
            record.resources = Some(built.resources);
            record.user = Some(built.user);
            record.cgroup = built.cgroup;
            record.image_mounts = image_mounts;
        });
        created.await.map(drop)
    }

    /// The namespaces that a container joins.
    fn namespaces_for(&self, pod: &Pod, config: &ContainerConfig) -> Result<spec::Namespaces> {
        let record = pod.record();
        let of = |kind: &str| record.namespaces.get(kind).map(PathBuf::from);
        let options = config
            .linux
            .as_ref()
            .and_then(|linux| linux.security_context.as_ref())
            .and_then(|security| security.namespace_options.clone())
            .unwrap_or_default();
        let pid = match options.pid() {
            NamespaceMode::Target => {
                let target = self.store.container(&options.target_id)?;
                if target.record().pod != pod.id || target.stage() != ContainerStage::Running {
                    return Err(Error::failed_precondition(format!(
                        "container {} does not run in pod {}: its process ids cannot be shared",
                        target.id, pod.id
                    )));
                }
                // Its pid is asked for when the container starts; what is bound here is replaced then.
                Some(PathBuf::from(format!("{TARGET}{}", target.id)))
            }
            _ => of("pid"),
        };
        Ok(spec::Namespaces { network: of("net"), ipc: of("ipc"), uts: of("uts"), pid, user: of("user") })
    }

    /// The account files of an image, read once for all of its containers.
    pub(super) async fn accounts_of(&self, image: &Local, mounts: &[Mount]) -> Result<Arc<(String, String)>> {
        let chain = image.chain.as_ref().map(ToString::to_string).unwrap_or_default();
        if let Some(accounts) = self.accounts.lock().get(&chain).cloned() {
            return Ok(accounts);
        }
        let (mounts, folder) = (mounts.to_vec(), self.places.mounts());
        let read = move || {
            let failed =
                |error: &std::io::Error| Error::io("read the image's account files in", &folder, error);
            let mounted = Mounted::new(&mounts, &folder).map_err(|error| failed(&error))?;
            let text = |path| read_in(mounted.path(), path).map_err(|error| failed(&error));
            Ok(Arc::new((text("etc/passwd")?, text("etc/group")?)))
        };
        let accounts = blocking(read).await?;
        if accounts.0.len() + accounts.1.len() > ACCOUNTS_MAX {
            return Ok(accounts);
        }
        let mut known = self.accounts.lock();
        if known.len() >= ACCOUNTS {
            known.clear();
        }
        known.insert(chain, accounts.clone());
        Ok(accounts)
    }

    /// Starts a container that was made.
    pub async fn start_container(&self, id: &str) -> Result<()> {
        let container = self.store.container(id)?;
        let (this, key) = (self.clone(), container.id.clone());
        let what = format!("start container {}", container.id);
        let started = self.starts.join(key, move || async move { this.start_this(&container).await });
        started.await.map_err(|error| error.context(what))
    }

    async fn start_this(&self, container: &Arc<Container>) -> Result<()> {
        let _turn = self.turns.of(&container.id).await;
        let _step = self.step(&container.id, "being started");
        let pod = self.made_pod(&container.record().pod)?;
        match container.stage() {
            ContainerStage::Created => {}
            ContainerStage::Running => return Ok(()),
            stage => return Err(Error::failed_precondition(format!("it is {}", words(stage)))),
        }
        self.require_ready(&pod)?;
        match self.run_task(&pod, container).await {
            Ok(started) => {
                sys::failpoint!("container.start.runs");
                let running = self.store.change_container(container, move |record| {
                    record.stage = ContainerStage::Running.into();
                    record.started_at = started;
                });
                running.await?;
                sys::failpoint!("container.start.noted");
                self.tell(&container.id, &pod, ContainerEventType::ContainerStartedEvent).await;
                Ok(())
            }
            Err(error) => {
                let message = error.to_string();
                let failed = self.store.change_container(container, move |record| {
                    record.stage = ContainerStage::Exited.into();
                    record.finished_at = now();
                    record.exit_code = NOT_STARTED;
                    record.reason = "StartError".to_owned();
                    record.message = message;
                });
                failed.await?;
                Err(error)
            }
        }
    }

    /// Makes a container's task and starts it; when it was asked to start, which its end can only be after.
    async fn run_task(&self, pod: &Arc<Pod>, container: &Arc<Container>) -> Result<i64> {
        let (context, record, id) = (context()?, container.record(), container.id.as_str());
        let config = record.config.clone().unwrap_or_default();
        let handler = self.handler(&pod.record().handler)?.1.clone();
        self.aim(&context, id).await?;
        let mounts = self.parts.snapshots.mounts(&context, &record.snapshotter, id).await?;
        let mut log = LogSpec::new(
            Some(&record.log_path).filter(|path| !path.is_empty()).map(PathBuf::from),
            PathBuf::from(&record.streams),
        );
        log.max_line = self.settings.max_line.unwrap_or(0);
        log.terminal = config.tty;
        log.stdin = match (config.stdin, config.stdin_once) {
            (false, _) => Stdin::No,
            (true, false) => Stdin::Open,
            (true, true) => Stdin::Once,
        };
        let pod_config = pod.record().config.clone().unwrap_or_default();
        let mut request = CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs: mounts.into_iter().map(as_message).collect(),
            terminal: config.tty,
            options: owned(handler.options, &pod_config, record.user.as_ref())?,
            ..CreateTaskRequest::default()
        };
        if self.known(&pod.record().handler).await?.ours {
            request.stdout = log.to_uri();
        } else {
            self.log_beside(&mut request, &mut log, id).await?;
        }
        let mapped = self.map_mounts(id, &config).await?;
        let created = self.parts.tasks.create(&context, request).await;
        if mapped {
            // The container has its own by now, and what stayed would keep the volume busy.
            let (places, key) = (self.places.clone(), id.to_owned());
            if let Err(error) = blocking(move || places.unmap(&key)).await {
                tracing::warn!(id, %error, "id-mapped mounts stay until the container is removed");
            }
        }
        created?;
        sys::failpoint!("container.start.task");
        let started = now();
        if let Err(error) = self.parts.tasks.start(&context, id, "").await {
            self.end_task(id).await.unwrap_or_else(|error| {
                tracing::warn!(id, %error, "the task of a container that did not start stays until it is removed");
            });
            return Err(error);
        }
        Ok(started)
    }

    /// Makes the mounts of a container that have other owners, for its runtime to bind; whether there are any.
    async fn map_mounts(&self, id: &str, config: &ContainerConfig) -> Result<bool> {
        let mounts = config.mounts.iter().enumerate().filter(|(_, mount)| spec::is_mapped(mount));
        let mapped: Vec<_> = mounts.map(|(number, mount)| (number, mount.clone())).collect();
        if mapped.is_empty() {
            return Ok(false);
        }
        let (places, id) = (self.places.clone(), id.to_owned());
        blocking(move || {
            let made = mapped.iter().try_for_each(|(number, mount)| {
                let users = spec::mapped_as(&mount.uid_mappings, &mount.gid_mappings)?;
                let follows = mount.propagation() == MountPropagation::PropagationHostToContainer;
                places.map(&id, *number, Path::new(&mount.host_path), &users, follows)
            });
            if made.is_err() {
                places.unmap(&id)?;
            }
            made.map(|()| true)
        })
        .await
    }

    /// A task under somebody else's shim has its output in a logger of ours, which that shim starts.
    async fn log_beside(&self, request: &mut CreateTaskRequest, log: &mut LogSpec, id: &str) -> Result<()> {
        if log.stdin != Stdin::No {
            let fifo = self.places.container(id).join("stdin");
            let made = fifo.clone();
            blocking(move || {
                let folder = made.parent().unwrap_or(Path::new("/"));
                sys::fs::create_dir_all(folder, 0o700)
                    .and_then(|()| sys::fifo::create(&made, 0o600))
                    .map_err(|error| Error::io("make the fifo", &made, &error))
            })
            .await?;
            request.stdin = fifo.display().to_string();
            log.stdin_fifo = Some(fifo);
        }
        let program = self.parts.tasks.program(super::settings::RUNC)?;
        request.stdout = log.to_binary_uri(&program);
        if !request.terminal {
            request.stderr.clone_from(&request.stdout);
        }
        Ok(())
    }

    /// Puts the process of a target container into the spec that joins its process ids.
    async fn aim(&self, context: &RequestContext, id: &str) -> Result<()> {
        let mut record = self.parts.containers.get(context, id)?;
        let mut spec = decode(&record)?;
        let Some(linux) = spec.linux.as_mut() else { return Ok(()) };
        let Some((namespace, target)) = linux.namespaces.iter_mut().find_map(|namespace| {
            let target = namespace.path.strip_prefix(TARGET)?.to_owned();
            Some((namespace, target))
        }) else {
            return Ok(());
        };
        let process = self.parts.tasks.get(context, &target, "").await?;
        if process.status() != Status::Running {
            return Err(Error::failed_precondition(format!(
                "container {target}, whose process ids it shares, does not run"
            )));
        }
        namespace.path = format!("/proc/{}/ns/pid", process.pid);
        record.spec = Some(proto::any::wrap(proto::any::SPEC, spec::encode(&spec)?));
        self.parts.containers.update(context, record, vec!["spec".into()]).await.map(drop)
    }

    /// Kills and deletes whatever task a container has.
    pub(super) async fn end_task(&self, id: &str) -> Result<()> {
        let context = context()?;
        let process = match self.parts.tasks.get(&context, id, "").await {
            Err(Error::NotFound(_)) => return Ok(()),
            process => process?,
        };
        if process.status() != Status::Stopped {
            gone_is_fine(self.parts.tasks.kill(&context, id, "", KILL, true).await)?;
            if process.status() != Status::Created {
                let ended = tokio::time::timeout(KILL_LIMIT, self.parts.tasks.wait(&context, id, "")).await;
                gone_is_fine(ended.map_err(|_| still_there(id))?)?;
            }
        }
        gone_is_fine(self.parts.tasks.delete(&context, id).await)
    }

    /// Ends a container: its signal, then, after the grace in seconds, SIGKILL. One that is gone, or does not run, is no error.
    pub async fn stop_container(&self, id: &str, grace: i64) -> Result<()> {
        let container = match self.store.container(id) {
            Err(Error::NotFound(_)) => return Ok(()),
            container => container?,
        };
        let this = self.clone();
        outlive(async move { this.stop_this(&container, grace).await }).await
    }

    pub(super) async fn stop_this(&self, container: &Arc<Container>, grace: i64) -> Result<()> {
        let (context, id) = (context()?, container.id.as_str());
        // A start that is under way comes to its end first.
        drop(self.turns.of(id).await);
        if container.stage() != ContainerStage::Running {
            return Ok(());
        }
        let _step = self.step(id, "being stopped");
        let grace = Duration::from_secs(u64::try_from(grace).unwrap_or(0));
        let mut record = container.watch();
        if !grace.is_zero() {
            if self.signalled.lock().insert(id.to_owned()) {
                let signal = container.record().stop_signal;
                match self.parts.tasks.kill(&context, id, "", signal, false).await {
                    Ok(()) | Err(Error::NotFound(_)) => {}
                    Err(error) => {
                        self.signalled.lock().remove(id);
                        return Err(error.context(format!("stop container {id}")));
                    }
                }
            }
            if ended_within(&mut record, grace).await {
                return Ok(());
            }
        }
        match self.parts.tasks.kill(&context, id, "", KILL, true).await {
            // It is gone, and this is told in a moment.
            Ok(()) | Err(Error::NotFound(_)) => {}
            Err(error) => return Err(error.context(format!("kill container {id}"))),
        }
        if ended_within(&mut record, ASK_AFTER).await {
            return Ok(());
        }
        self.settle_container(container).await;
        match ended_within(&mut record, KILL_LIMIT).await {
            true => Ok(()),
            false => Err(still_there(id)),
        }
    }

    /// Removes a container; one that runs is killed first. One that is gone is no error.
    pub async fn remove_container(&self, id: &str) -> Result<()> {
        let container = match self.store.container(id) {
            Err(Error::NotFound(_)) => return Ok(()),
            container => container?,
        };
        let (this, key) = (self.clone(), container.id.clone());
        self.removes.join(key, move || async move { this.remove_this(&container).await }).await
    }

    pub(super) async fn remove_this(&self, container: &Arc<Container>) -> Result<()> {
        self.stop_this(container, 0).await?;
        let _turn = self.turns.of(&container.id).await;
        // One that was being made has been taken down meanwhile.
        if self.store.container(&container.id).is_err() {
            return Ok(());
        }
        let _step = self.step(&container.id, "being removed");
        let removing =
            self.store.change_container(container, |record| record.stage = ContainerStage::Removing.into());
        gone_is_fine(removing.await)?;
        sys::failpoint!("container.remove.noted");
        self.take_container_down(container)
            .await
            .map_err(|error| error.context(format!("remove container {}", container.id)))?;
        if let Ok(pod) = self.store.pod(&container.record().pod) {
            self.tell(&container.id, &pod, ContainerEventType::ContainerDeletedEvent).await;
        }
        Ok(())
    }

    /// Lets go of all that a container may have, then of its record.
    pub(super) async fn take_container_down(&self, container: &Arc<Container>) -> Result<()> {
        let (context, id) = (context()?, container.id.as_str());
        self.end_task(id).await?;
        sys::failpoint!("container.take-down.task");
        gone_is_fine(self.parts.containers.delete(&context, id.to_owned()).await)?;
        sys::failpoint!("container.take-down.record");
        let snapshotter = container.record().snapshotter.clone();
        gone_is_fine(self.parts.snapshots.remove(&context, &snapshotter, id.to_owned()).await)?;
        sys::failpoint!("container.take-down.snapshot");
        let (places, key) = (self.places.clone(), id.to_owned());
        blocking(move || places.remove_container(&key)).await?;
        self.store.forget_container(id).await?;
        self.signalled.lock().remove(id);
        self.out_of_memory.lock().remove(id);
        Ok(())
    }

    /// A container that has been made.
    pub(super) fn made_container(&self, id: &str) -> Result<Arc<Container>> {
        let container = self.store.container(id)?;
        match container.stage() {
            ContainerStage::Making => Err(Error::not_found(format!("container {id:?} does not exist"))),
            _ => Ok(container),
        }
    }

    /// The containers that pass the filter.
    pub fn list_containers(&self, filter: Option<ContainerFilter>) -> Vec<Listed> {
        let filter = filter.unwrap_or_default();
        let id = match filter.id.as_str() {
            "" => None,
            id => Some(self.store.container(id).map_or_else(|_| id.to_owned(), |found| found.id.clone())),
        };
        let pod = match filter.pod_sandbox_id.as_str() {
            "" => None,
            id => Some(self.store.pod(id).map_or_else(|_| id.to_owned(), |found| found.id.clone())),
        };
        let state = filter.state.map(|value| value.state());
        let all = self.store.containers().into_iter();
        all.filter_map(|container| {
            let record = container.record();
            let config = record.config.clone().unwrap_or_default();
            let passes = record.stage() != ContainerStage::Making
                && id.as_ref().is_none_or(|id| *id == container.id)
                && pod.as_ref().is_none_or(|pod| *pod == record.pod)
                && state.is_none_or(|state| state == state_of(&record))
                && selects(&filter.label_selector, &config.labels);
            passes.then(|| Listed {
                id: container.id.clone(),
                pod_sandbox_id: record.pod.clone(),
                metadata: config.metadata,
                image: config.image,
                image_ref: record.image_id.clone(),
                image_id: record.image_id.clone(),
                state: state_of(&record).into(),
                created_at: record.created_at,
                labels: config.labels,
                annotations: config.annotations,
            })
        })
        .collect()
    }

    /// What a container is now; with `verbose` more than the kubelet needs.
    pub async fn container_status(&self, id: &str, verbose: bool) -> Result<ContainerStatusResponse> {
        let container = self.made_container(id)?;
        let mut info = BTreeMap::new();
        if verbose {
            info.insert("info".to_owned(), self.container_info(&container).await.to_string());
        }
        let status = self.status_of(&container, true).await;
        Ok(ContainerStatusResponse { status, info: info.into_iter().collect() })
    }

    /// The same, None for one that is being made. The image's name is looked for where that is wanted.
    pub(super) async fn status_of(&self, container: &Arc<Container>, names: bool) -> Option<ContainerStatus> {
        let record = container.record();
        if record.stage() == ContainerStage::Making {
            return None;
        }
        let mut status = status(&container.id, &record);
        if names && let Ok(Some(image)) = self.parts.images.local(&record.image_id).await {
            if let Some(tag) = image.tag {
                status.image = Some(ImageSpec { image: tag, ..ImageSpec::default() });
            }
            status.image_ref = image.by_digest;
        }
        Some(status)
    }

    async fn container_info(&self, container: &Arc<Container>) -> serde_json::Value {
        let record = container.record();
        let Ok(context) = context() else { return serde_json::Value::Null };
        let of = self.parts.containers.get(&context, &container.id).unwrap_or_default();
        let spec =
            of.spec.as_ref().and_then(|any| serde_json::from_slice::<serde_json::Value>(&any.value).ok());
        let pid = self.parts.tasks.get(&context, &container.id, "").await.map_or(0, |process| process.pid);
        let doing =
            self.steps.lock().get(&container.id).map(|(what, since)| (*what, since.elapsed().as_secs()));
        serde_json::json!({
            "sandboxID": record.pod,
            "pid": pid,
            "removing": record.stage() == ContainerStage::Removing,
            "underWay": doing.map(|(what, seconds)| format!("{what} for {seconds} s")),
            "snapshotKey": of.snapshot_key,
            "snapshotter": record.snapshotter,
            "runtimeType": of.runtime.map(|runtime| runtime.name),
            "cgroup": record.cgroup,
            "streams": record.streams,
            "runtimeSpec": spec,
        })
    }

    /// Changes the limits of a container: those of its processes, if it runs, and those it starts with.
    pub async fn update_container(&self, request: UpdateContainerResourcesRequest) -> Result<()> {
        let container = self.made_container(&request.container_id)?;
        let Some(wanted) = request.linux else { return Ok(()) };
        let this = self.clone();
        outlive(async move {
            let (context, id) = (context()?, container.id.as_str());
            let _turn = this.turns.of(id).await;
            let stage = container.stage();
            if stage == ContainerStage::Removing {
                return Err(Error::failed_precondition(format!("container {id} is being removed")));
            }
            let options =
                this.spec_options(&this.made_pod(&container.record().pod)?.record().handler).await?;
            let mut record = this.parts.containers.get(&context, id)?;
            let before = record.spec.clone();
            let update = spec::resources(&decode(&record)?, &wanted, &this.host, &options)?;
            record.spec = Some(proto::any::wrap(proto::any::SPEC, spec::encode(&update.spec)?));
            let mut record = this.parts.containers.update(&context, record, vec!["spec".into()]).await?;
            if stage == ContainerStage::Running {
                let limits =
                    proto::any::wrap(proto::any::LINUX_RESOURCES, spec::encode_resources(&update.resources)?);
                match this.parts.tasks.update(&context, id, Some(limits), BTreeMap::new()).await {
                    // It has ended meanwhile.
                    Ok(()) | Err(Error::NotFound(_)) => {}
                    Err(error) => {
                        record.spec = before;
                        this.parts.containers.update(&context, record, vec!["spec".into()]).await?;
                        return Err(error);
                    }
                }
            }
            let changed = this
                .store
                .change_container(&container, move |record| record.resources = Some(update.reported));
            changed.await.map(drop)
        })
        .await
        .map_err(|error| error.context("update a container's limits"))
    }

    /// Has a container's log opened anew, after the kubelet has moved it away.
    pub async fn reopen_log(&self, id: &str) -> Result<()> {
        let container = self.made_container(id)?;
        let does_not_run = || Error::failed_precondition(format!("container {} does not run", container.id));
        if container.stage() != ContainerStage::Running {
            return Err(does_not_run());
        }
        let socket = PathBuf::from(&container.record().streams);
        let Err(error) = shim_api::logs::reopen(&socket).await else { return Ok(()) };
        // The shim stops to listen when the process ends, which is told here a moment later.
        if ended_within(&mut container.watch(), ASK_AFTER).await {
            return Err(does_not_run());
        }
        Err(Error::unavailable(format!("reopen the log of container {}: {error}", container.id)))
    }
}

/// What stands for the process of the container behind it, until that is known.
const TARGET: &str = "/proc/gantry-target/";
/// Of how many images the account files are remembered.
const ACCOUNTS: usize = 256;
/// The longest that are remembered, in bytes. Real ones have a few thousand.
const ACCOUNTS_MAX: usize = 64 << 10;

/// The runtime's options for a container whose pod has users of its own: its user may open its own streams again.
fn owned(options: Option<Any>, pod: &PodSandboxConfig, user: Option<&ContainerUser>) -> Result<Option<Any>> {
    let (Some(users), Some(user)) = (spec::Users::of_pod(pod)?, user.and_then(|user| user.linux.as_ref()))
    else {
        return Ok(options);
    };
    let mut options: Options = match options {
        None => Options::default(),
        Some(any) if proto::any::is::<Options>(&any) => proto::any::unpack(&any)
            .map_err(|error| Error::internal(format!("the options of the runtime handler: {error}")))?,
        // Of another runtime: they have no such field.
        other => return Ok(other),
    };
    let id = |id: i64| u32::try_from(id).unwrap_or_default();
    (options.io_uid, options.io_gid) = users.outside(id(user.uid), id(user.gid))?;
    Ok(Some(proto::any::pack(&options)))
}

/// Waits until a container has ended; whether it did.
async fn ended_within(
    record: &mut tokio::sync::watch::Receiver<Arc<PodContainerRecord>>,
    limit: Duration,
) -> bool {
    let ended = record.wait_for(|record| record.stage() >= ContainerStage::Exited);
    // A record that went has ended, too.
    tokio::time::timeout(limit, ended).await.is_ok()
}

fn still_there(id: &str) -> Error {
    Error::deadline_exceeded(format!(
        "container {id} was killed and is still there after {KILL_LIMIT:?}: one of its processes may be stuck in the kernel"
    ))
}

/// The spec of a container's record.
pub(super) fn decode(record: &Record) -> Result<Spec> {
    let bytes = record.spec.as_ref().map(|any| any.value.as_slice()).unwrap_or_default();
    serde_json::from_slice(bytes).map_err(|error| {
        Error::data_loss(format!("the spec of container {:?} cannot be read: {error}", record.id))
    })
}

/// A mount as messages have it.
pub(super) fn as_message(mount: Mount) -> proto::containerd::types::Mount {
    proto::containerd::types::Mount {
        r#type: mount.kind,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    }
}

/// Opens what a path names within a root, which neither `..` nor links leave. Blocks.
fn open_in(root: &Path, path: &str, flags: OFlags) -> rustix::io::Result<OwnedFd> {
    let folder = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let path = path.trim_start_matches('/');
    let path = if path.is_empty() { "." } else { path };
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    rustix::fs::openat2(folder, path, flags | OFlags::CLOEXEC, Mode::empty(), resolve)
}

/// The text of a file of an image; none where there is no such file. Blocks.
fn read_in(root: &Path, path: &str) -> std::io::Result<String> {
    let found = match open_in(root, path, OFlags::PATH) {
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(String::new()),
        found => File::from(found?),
    };
    // An image's device is not opened, not even to look at it: some act when they are (a watchdog, a tape).
    if !found.metadata()?.is_file() {
        return Ok(String::new());
    }
    let file = File::open(format!("/proc/self/fd/{}", found.as_raw_fd()))?;
    let mut bytes = Vec::new();
    // One byte more than is looked at, so that a file that is too large is seen to be.
    file.take(FILE_LIMIT + 1).read_to_end(&mut bytes)?;
    Ok(String::from_utf8_lossy(&bytes).into_owned())
}

/// Where a path within a root lies, links followed within it. Blocks.
pub(super) fn place_in(root: &Path, path: &str) -> std::io::Result<PathBuf> {
    let found = open_in(root, path, OFlags::PATH)?;
    std::fs::read_link(format!("/proc/self/fd/{}", found.as_raw_fd()))
}

/// Makes volumes, with what the image has at their places, as its files' owners are in the mounts. Where it has nothing, they are
/// the owner's. Blocks.
fn fill(mounts: &[Mount], volumes: &[spec::Volume], folder: &Path, owner: (u32, u32)) -> Result<()> {
    let mounted = Mounted::new(mounts, folder)
        .map_err(|error| Error::io("mount the image for its volumes in", folder, &error))?;
    for volume in volumes {
        let failed = |error: std::io::Error| Error::io("make the volume", &volume.source, &error);
        sys::fs::create_dir_all(&volume.source, 0o755).map_err(failed)?;
        std::os::unix::fs::chown(&volume.source, Some(owner.0), Some(owner.1)).map_err(failed)?;
        let from = match open_in(mounted.path(), &volume.destination, OFlags::RDONLY | OFlags::DIRECTORY) {
            // Nothing is there to be copied.
            Err(_) => continue,
            Ok(folder) => folder,
        };
        let from = PathBuf::from(format!("/proc/self/fd/{}/.", from.as_raw_fd()));
        snapshotter::copy_tree(&from, &volume.source).map_err(failed)?;
    }
    Ok(())
}

fn words(stage: ContainerStage) -> &'static str {
    match stage {
        ContainerStage::Making => "being made",
        ContainerStage::Created => "created",
        ContainerStage::Running => "running",
        ContainerStage::Exited => "exited",
        ContainerStage::Removing => "being removed",
    }
}

fn state_of(record: &PodContainerRecord) -> ContainerState {
    match record.stage() {
        ContainerStage::Making | ContainerStage::Created => ContainerState::ContainerCreated,
        ContainerStage::Running => ContainerState::ContainerRunning,
        ContainerStage::Exited => ContainerState::ContainerExited,
        ContainerStage::Removing if record.finished_at == 0 => ContainerState::ContainerCreated,
        ContainerStage::Removing => ContainerState::ContainerExited,
    }
}

/// What the kubelet is told of a container, from its record alone.
fn status(id: &str, record: &PodContainerRecord) -> ContainerStatus {
    let config = record.config.clone().unwrap_or_default();
    let state = state_of(record);
    let exited = state == ContainerState::ContainerExited;
    let reason = match (exited, record.reason.as_str()) {
        (true, "") if record.exit_code == 0 => "Completed".to_owned(),
        (true, "") => "Error".to_owned(),
        (true, reason) => reason.to_owned(),
        (false, _) => String::new(),
    };
    let stop_signal = spec::reported_signal(&config, record.stop_signal).into();
    let mut mounts = config.mounts;
    for mount in &mut mounts {
        if let (Some(image), Some(id)) = (&mut mount.image, record.image_mounts.get(&mount.container_path)) {
            image.image_ref.clone_from(id);
        }
    }
    ContainerStatus {
        id: id.to_owned(),
        metadata: config.metadata,
        state: state.into(),
        created_at: record.created_at,
        started_at: record.started_at,
        finished_at: if exited { record.finished_at } else { 0 },
        exit_code: if exited { record.exit_code } else { 0 },
        image: config.image,
        image_ref: record.image_ref.clone(),
        image_id: record.image_id.clone(),
        reason,
        message: if exited { record.message.clone() } else { String::new() },
        labels: config.labels,
        annotations: config.annotations,
        mounts,
        log_path: record.log_path.clone(),
        resources: record
            .resources
            .clone()
            .map(|linux| ContainerResources { linux: Some(linux), windows: None }),
        user: record.user.clone(),
        stop_signal,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::runtime::v1::Mount as Asked;

    #[test]
    fn what_ended_says_why() {
        let of = |stage: ContainerStage, exit_code, reason: &str| {
            let record = PodContainerRecord {
                stage: stage.into(),
                exit_code,
                reason: reason.into(),
                finished_at: 5,
                started_at: 3,
                ..PodContainerRecord::default()
            };
            let status = status("x", &record);
            (status.state(), status.reason, status.finished_at)
        };
        let exited = ContainerState::ContainerExited;
        assert_eq!(of(ContainerStage::Running, 0, ""), (ContainerState::ContainerRunning, String::new(), 0));
        assert_eq!(of(ContainerStage::Exited, 0, ""), (exited, "Completed".into(), 5));
        assert_eq!(of(ContainerStage::Exited, 2, ""), (exited, "Error".into(), 5));
        assert_eq!(of(ContainerStage::Exited, 137, "OOMKilled"), (exited, "OOMKilled".into(), 5));
        assert_eq!(of(ContainerStage::Removing, 2, ""), (exited, "Error".into(), 5));
    }

    #[test]
    fn mounted_images_are_named_by_id() {
        let image = ImageSpec { image: "a:1".into(), ..ImageSpec::default() };
        let mount = |path: &str, image| Asked { container_path: path.into(), image, ..Asked::default() };
        let mounts = vec![mount("/a", Some(image)), mount("/b", None)];
        let record = PodContainerRecord {
            config: Some(ContainerConfig { mounts, ..ContainerConfig::default() }),
            image_mounts: BTreeMap::from([("/a".to_owned(), "sha256:ab".to_owned())]),
            ..PodContainerRecord::default()
        };
        let mounts = status("x", &record).mounts;
        assert_eq!(mounts[0].image.as_ref().unwrap().image_ref, "sha256:ab");
        assert!(mounts[1].image.is_none());
    }

    #[test]
    fn files_of_an_image_are_read_within_it() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("root");
        std::fs::create_dir_all(root.join("etc")).unwrap();
        std::fs::write(folder.path().join("passwd"), "outside").unwrap();
        std::fs::write(root.join("passwd"), "inside").unwrap();
        std::os::unix::fs::symlink("/../../passwd", root.join("etc/passwd")).unwrap();
        assert_eq!(read_in(&root, "etc/passwd").unwrap(), "inside");
        assert_eq!(read_in(&root, "etc/group").unwrap(), "");
        assert_eq!(read_in(&root, "passwd/x").unwrap(), "");
        assert_eq!(place_in(&root, "etc/passwd").unwrap(), root.canonicalize().unwrap().join("passwd"));
        assert!(place_in(&root, "none").is_err());
    }
}
