//! The verbs of pods.
//!
//! ```text
//!  run   record (Making) --+-- users, network -----+-- CNI ADD ------------+-- record (Ready)
//!                          +-- files, shared memory |                       |
//!                          +-- the pod's shim ------+-- its namespaces -----+
//!  stop  record (Stopped) --- containers killed --+-- shim shut down ----------------+-- record (Released)
//!                                                 +-- CNI DEL --- network namespace -+
//! ```
//!
//! The network is made while the shim starts: both take most of the time. Sysctls of single interfaces are set by the shim's
//! start, which then waits for the network.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proto::containerd::services::sandbox::v1::ControllerCreateRequest;
use proto::containerd::types::{Sandbox, sandbox};
use proto::runtime::v1::{
    ContainerEventType, LinuxPodSandboxStatus, NamespaceMode, PodIp, PodSandbox, PodSandboxConfig,
    PodSandboxFilter, PodSandboxMetadata, PodSandboxNetworkStatus, PodSandboxState, PodSandboxStatus,
    PodSandboxStatusResponse, Protocol, RunPodSandboxRequest, UpdatePodSandboxResourcesRequest,
};
use tokio::sync::watch;

use super::cni;
use super::places::PodFiles;
use super::runtime::{Runtime, context, gone_is_fine, in_host_network, namespace_options, new_id, now};
use super::settings::Handler;
use super::spec;
use super::store::Pod;
use crate::error::{Error, Result, blocking, outlive};
use crate::metadata::cri::{PodRecord, PodStage};

/// The label that says what a container or sandbox of ours is.
pub(crate) const KIND: &str = "io.cri-containerd.kind";
/// What a pod has for the namespaces that its shim bound.
const NAMESPACE: &str = "namespace.";

/// What came of making a pod.
struct Made {
    pid: u32,
    namespaces: BTreeMap<String, String>,
    sandbox_image: String,
    attachment: Option<cni::Attachment>,
}

/// What the parts of a pod that are made at the same time wait for.
struct Ready {
    /// Its namespaces of users and of the network are there.
    namespace: watch::Receiver<bool>,
    /// It has its network.
    connection: watch::Receiver<bool>,
    /// Its files are there.
    filed: watch::Receiver<bool>,
}

/// Waits for others; their failure is told by themselves.
async fn all_of<const N: usize>(parts: [&mut watch::Receiver<bool>; N]) -> Result<()> {
    for part in parts {
        part.wait_for(|done| *done)
            .await
            .map_err(|_| Error::failed_precondition("another part of the pod failed"))?;
    }
    Ok(())
}

impl Runtime {
    /// Makes a pod; its id. Joins an attempt for a pod of the same name that is under way, and finds a pod of that name that is
    /// ready, if its runtime handler is the one that is asked for.
    pub async fn run_pod(&self, request: RunPodSandboxRequest) -> Result<String> {
        let config = request.config.unwrap_or_default();
        let name = pod_name(config.metadata.as_ref())?;
        check(&config)?;
        let handler = request.runtime_handler;
        let this = self.clone();
        let (key, begun, wanted) = (name.clone(), name.clone(), handler.clone());
        let made = self.runs.join(key, move || async move { this.run_named(&begun, config, wanted).await });
        let made = made.await.and_then(|id| self.is_run_by(&id, &handler).map(|()| id));
        made.map_err(|error| error.context(format!("run pod {name}")))
    }

    /// A pod that was joined or found may have been asked for with another handler, which may be one that isolates less.
    fn is_run_by(&self, id: &str, wanted: &str) -> Result<()> {
        let Ok(pod) = self.store.pod(id) else { return Ok(()) };
        let (wanted, _) = self.handler(wanted)?;
        match self.handler(&pod.record().handler) {
            Ok((has, _)) if has == wanted => Ok(()),
            _ => Err(Error::already_exists(format!(
                "pod {id} has this name and runs with runtime handler {:?}, and not with {wanted:?}; remove it, or count the \
                 attempt up",
                pod.record().handler
            ))),
        }
    }

    async fn run_named(&self, name: &str, config: PodSandboxConfig, handler: String) -> Result<String> {
        if let Some(pod) = self.pod_named(name) {
            if pod.stage() == PodStage::Ready {
                return Ok(pod.id.clone());
            }
            return Err(Error::already_exists(format!(
                "pod {} has this name and is not ready any more; remove it, or count the attempt up",
                pod.id
            )));
        }
        let (_, wanted) = self.handler(&handler)?;
        if spec::Users::of_pod(&config)?.is_some() {
            self.require_users(&handler).await?;
        }
        let id = new_id()?;
        let netns = match in_host_network(&config) {
            true => String::new(),
            false => self.places.netns(&id).display().to_string(),
        };
        let record = PodRecord {
            config: Some(config),
            handler: handler.clone(),
            stage: PodStage::Making.into(),
            created_at: now(),
            netns,
            runtime: wanted.runtime.clone(),
            ..PodRecord::default()
        };
        let wanted = wanted.clone();
        let _step = self.step(&id, "being made");
        let pod = self.store.add_pod(&id, record).await?;
        sys::failpoint!("pod.run.recorded");
        match self.make_pod(&pod, &wanted).await {
            Ok(made) => {
                sys::failpoint!("pod.run.made");
                self.pod_is_ready(&pod, made).await?;
                sys::failpoint!("pod.run.ready");
                Ok(id)
            }
            Err(error) => {
                self.undo_pod(&pod).await;
                Err(error)
            }
        }
    }

    /// The handler that a pod asks for.
    pub(super) fn handler(&self, name: &str) -> Result<(&str, &Handler)> {
        self.settings.handler(name).ok_or_else(|| {
            let names: Vec<_> = self.settings.handlers.keys().map(String::as_str).collect();
            Error::invalid_argument(format!(
                "no runtime for {name:?} is configured; the runtime handlers are: {}",
                names.join(", ")
            ))
        })
    }

    /// The pod that has a name.
    fn pod_named(&self, name: &str) -> Option<Arc<Pod>> {
        self.store.pods().into_iter().find(|pod| {
            let record = pod.record();
            let has_it = matches!(record.stage(), PodStage::Ready | PodStage::Stopped | PodStage::Released);
            let metadata = record.config.as_ref().and_then(|config| config.metadata.as_ref());
            has_it && pod_name(metadata).is_ok_and(|other| other == name)
        })
    }

    async fn make_pod(&self, pod: &Arc<Pod>, handler: &Handler) -> Result<Made> {
        let (record, id) = (pod.record(), pod.id.as_str());
        let config = record.config.clone().unwrap_or_default();
        let network = match record.netns.is_empty() {
            true => None,
            false => Some(network_of(id, &record)?),
        };
        let users = spec::Users::of_pod(&config)?;
        let own_shm = namespace_options(&config).is_none_or(|options| options.ipc() != NamespaceMode::Node);
        let (connected, connection) = watch::channel(network.is_none());
        let (pinned, namespace) = watch::channel(network.is_none() && users.is_none());
        let (written, filed) = watch::channel(false);

        let files = {
            let (places, id, config) = (self.places.clone(), id.to_owned(), config.clone());
            let users = users.clone();
            async move {
                let made = blocking(move || {
                    let files = PodFiles::read(&config.hostname, config.dns_config.as_ref(), own_shm)?;
                    places.make_pod(&id, &files, users.as_ref())
                });
                made.await?;
                sys::failpoint!("pod.run.files");
                written.send_replace(true);
                Ok::<_, Error>(())
            }
        };
        let networks = async {
            // Dropped at the end whatever comes of it, and that is what the other is told.
            let (connected, pinned) = (connected, pinned);
            let (places, key, own) = (self.places.clone(), id.to_owned(), network.is_some());
            blocking(move || places.make_namespaces(&key, own, users.as_ref())).await?;
            sys::failpoint!("pod.run.netns");
            pinned.send_replace(true);
            let Some(network) = network else { return Ok::<_, Error>(None) };
            let attachment =
                self.network(&record.handler)?.setup(network).await.map_err(|error| cni_failed(&error))?;
            sys::failpoint!("pod.run.network");
            connected.send_replace(true);
            Ok(Some(attachment))
        };
        let ready = Ready { namespace, connection, filed };
        let shim = self.make_sandbox(pod, handler, &config, ready);
        let (files, networks, shim) = tokio::join!(files, networks, shim);
        // The failure of either is the reason of the shim's, which waited for them.
        let attachment = networks?;
        files?;
        let (pid, namespaces, sandbox_image) = shim?;
        Ok(Made { pid, namespaces, sandbox_image, attachment })
    }

    /// Makes what holds the pod's namespaces: its sandbox, or a pause container.
    async fn make_sandbox(
        &self,
        pod: &Arc<Pod>,
        handler: &Handler,
        config: &PodSandboxConfig,
        mut ready: Ready,
    ) -> Result<(u32, BTreeMap<String, String>, String)> {
        let context = context()?;
        let (record, id) = (pod.record(), pod.id.as_str());
        let mut sandbox = Sandbox {
            sandbox_id: id.to_owned(),
            runtime: Some(sandbox::Runtime {
                name: handler.runtime.clone(),
                options: handler.options.clone(),
            }),
            spec: None,
            labels: labels(&config.labels, "sandbox"),
            sandboxer: "shim".to_owned(),
            ..Sandbox::default()
        };
        if let Some(image) = self.settings.sandbox_image.clone() {
            self.parts.sandboxes.create(&context, sandbox).await?;
            all_of([&mut ready.namespace, &mut ready.connection, &mut ready.filed]).await?;
            return self.make_pause(pod, handler, config, image).await;
        }
        let options = self.spec_options(&record.handler).await?;
        let userns = spec::Users::of_pod(config)?.map(|_| self.places.userns(id));
        let spec = spec::pod(&spec::WantedPod {
            id,
            config,
            netns: Some(Path::new(&record.netns)).filter(|path| !path.as_os_str().is_empty()),
            userns: userns.as_deref(),
            files: &spec::SandboxFiles::default(),
            host: &self.host,
            options: &options,
            seccomp: None,
        })?;
        let annotations = spec.annotations.clone();
        sandbox.spec = Some(proto::any::wrap(proto::any::SPEC, spec::encode(&spec)?));
        let request = ControllerCreateRequest {
            sandbox_id: id.to_owned(),
            netns_path: record.netns.clone(),
            options: Some(proto::any::pack(config)),
            annotations,
            sandbox: Some(sandbox.clone()),
            sandboxer: "shim".to_owned(),
            ..ControllerCreateRequest::default()
        };
        let (recorded, created) = tokio::join!(
            self.parts.sandboxes.create(&context, sandbox),
            self.parts.tasks.create_sandbox(&context, request)
        );
        sys::failpoint!("pod.run.sandbox");
        recorded?;
        match created {
            Ok(()) => {}
            Err(Error::Unimplemented(why)) => {
                tracing::info!(id, %why, "this pod gets a pause container");
                all_of([&mut ready.namespace, &mut ready.connection, &mut ready.filed]).await?;
                return self.make_pause(pod, handler, config, super::settings::PAUSE.to_owned()).await;
            }
            Err(error) => return Err(error),
        }
        all_of([&mut ready.namespace]).await?;
        if sysctls(config).any(is_of_interface) {
            all_of([&mut ready.connection]).await?;
        }
        let started = self.parts.tasks.start_sandbox(&context, id).await?;
        let status = self.parts.tasks.sandbox_status(&context, id, true).await?;
        let mut namespaces: BTreeMap<String, String> = status
            .info
            .into_iter()
            .filter_map(|(key, path)| Some((key.strip_prefix(NAMESPACE)?.to_owned(), path)))
            .collect();
        if namespaces.is_empty() && started.pid != 0 {
            namespaces = namespaces_of(started.pid, config);
        }
        namespaces.extend(self.made_before(pod, config)?);
        Ok((started.pid, namespaces, String::new()))
    }

    /// The namespaces of a pod that are there before its shim or pause container, and stay when it ends.
    pub(super) fn made_before(
        &self,
        pod: &Pod,
        config: &PodSandboxConfig,
    ) -> Result<impl Iterator<Item = (String, String)> + use<>> {
        let network = Some(pod.record().netns.clone()).filter(|path| !path.is_empty());
        let users = spec::Users::of_pod(config)?.map(|_| self.places.userns(&pod.id).display().to_string());
        let named = [("net", network), ("user", users)].into_iter();
        Ok(named.filter_map(|(kind, path)| Some((kind.to_owned(), path?))))
    }

    async fn pod_is_ready(&self, pod: &Arc<Pod>, made: Made) -> Result<()> {
        let attachment = match &made.attachment {
            None => String::new(),
            Some(attachment) => serde_json::to_string(attachment).map_err(|error| {
                Error::internal(format!("what the networks gave cannot be written down: {error}"))
            })?,
        };
        let changed = self
            .store
            .change_pod(pod, move |record| {
                record.stage = PodStage::Ready.into();
                record.pid = made.pid;
                record.namespaces = made.namespaces;
                record.sandbox_image = made.sandbox_image;
                record.attachment = attachment;
                record.ips = made
                    .attachment
                    .iter()
                    .flat_map(|attachment| std::iter::once(&attachment.ip).chain(&attachment.additional_ips))
                    .map(ToString::to_string)
                    .collect();
            })
            .await;
        if let Err(error) = changed {
            self.undo_pod(pod).await;
            return Err(error);
        }
        self.tell(&pod.id, pod, ContainerEventType::ContainerCreatedEvent).await;
        self.tell(&pod.id, pod, ContainerEventType::ContainerStartedEvent).await;
        // It may have ended before anybody listened.
        self.settle_pod(pod).await;
        Ok(())
    }

    /// Takes down a pod that was not made. What cannot be is tried again in the background.
    pub(super) async fn undo_pod(&self, pod: &Arc<Pod>) {
        if let Err(error) = self.take_down(pod).await {
            tracing::warn!(id = pod.id, %error, "what is left of a pod that was not made is not gone yet");
            let pod = pod.clone();
            self.until_it_holds(
                &pod.id.clone(),
                "what is left of a pod that was not made is not gone yet",
                move |this| {
                    let pod = pod.clone();
                    async move { this.take_down(&pod).await }
                },
            );
        }
    }

    /// Lets go of all that a pod may hold, then of its record.
    async fn take_down(&self, pod: &Arc<Pod>) -> Result<()> {
        self.let_go(pod).await?;
        self.forget_pod(pod).await
    }

    /// Ends a pod's shim or pause container, and takes its network from it.
    async fn let_go(&self, pod: &Arc<Pod>) -> Result<()> {
        let (shim, network) = tokio::join!(self.end_sandbox(pod), self.disconnect(pod));
        sys::failpoint!("pod.let-go.shim-and-network");
        shim?;
        network?;
        let (places, id) = (self.places.clone(), pod.id.clone());
        blocking(move || places.unmount_pod(&id)).await?;
        self.let_images_go(&pod.id).await
    }

    async fn end_sandbox(&self, pod: &Arc<Pod>) -> Result<()> {
        let context = context()?;
        self.end_pause(pod).await?;
        match self.parts.tasks.shutdown_sandbox(&context, &pod.id).await {
            Ok(()) | Err(Error::NotFound(_)) => Ok(()),
            // A task is left that nobody knows of.
            Err(Error::FailedPrecondition(why)) => {
                tracing::warn!(id = pod.id, %why, "the pod's shim stays until its containers are gone");
                self.parts.tasks.stop_sandbox(&context, &pod.id, 0).await
            }
            Err(error) => Err(error),
        }
    }

    async fn disconnect(&self, pod: &Arc<Pod>) -> Result<()> {
        let record = pod.record();
        if record.stage() >= PodStage::Released {
            return Ok(());
        }
        if !record.netns.is_empty() {
            let network = network_of(&pod.id, &record)?;
            let torn_down = self.network(&record.handler)?.teardown(network).await;
            torn_down.map_err(|retry| Error::unavailable(retry.to_string()))?;
        }
        sys::failpoint!("pod.let-go.network");
        let (places, id) = (self.places.clone(), pod.id.clone());
        blocking(move || places.remove_namespaces(&id)).await?;
        sys::failpoint!("pod.let-go.netns");
        Ok(())
    }

    async fn forget_pod(&self, pod: &Arc<Pod>) -> Result<()> {
        let context = context()?;
        let (places, id) = (self.places.clone(), pod.id.clone());
        blocking(move || places.remove_pod(&id)).await?;
        sys::failpoint!("pod.forget.files");
        gone_is_fine(self.parts.sandboxes.delete(&context, pod.id.clone()).await)?;
        sys::failpoint!("pod.forget.sandbox");
        self.store.forget_pod(&pod.id).await
    }

    /// Ends a pod, its containers and its network. One that is gone is no error.
    pub async fn stop_pod(&self, id: &str) -> Result<()> {
        let pod = match self.store.pod(id) {
            Err(Error::NotFound(_)) => return Ok(()),
            pod => pod?,
        };
        let this = self.clone();
        let key = pod.id.clone();
        self.pod_stops.join(key, move || async move { this.stop_this_pod(&pod).await }).await
    }

    async fn stop_this_pod(&self, pod: &Arc<Pod>) -> Result<()> {
        if pod.stage() == PodStage::Making {
            return Ok(());
        }
        let _step = self.step(&pod.id, "being stopped");
        // From here on nothing starts in it.
        self.pod_ended(pod).await?;
        sys::failpoint!("pod.stop.noted");
        let containers = self.store.containers_of(&pod.id);
        let stops = containers.iter().map(|container| self.stop_this(container, 0));
        for stopped in futures::future::join_all(stops).await {
            stopped?;
        }
        if pod.stage() >= PodStage::Released {
            return Ok(());
        }
        if let Err(error) = self.release_pod(pod).await {
            let again = pod.clone();
            self.until_it_holds(&pod.id, "a pod that was stopped still has something", move |this| {
                let pod = again.clone();
                async move { this.release_pod(&pod).await }
            });
            return Err(error.context(format!("stop pod {}", pod.id)));
        }
        Ok(())
    }

    async fn release_pod(&self, pod: &Arc<Pod>) -> Result<()> {
        if pod.stage() >= PodStage::Released {
            return Ok(());
        }
        self.let_go(pod).await?;
        sys::failpoint!("pod.stop.let-go");
        let released = self.store.change_pod(pod, |record| {
            record.stage = record.stage.max(PodStage::Released.into());
        });
        gone_is_fine(released.await)
    }

    /// Notes that a pod is not ready any more, and tells of it once.
    pub(super) async fn pod_ended(&self, pod: &Arc<Pod>) -> Result<()> {
        let _turn = self.turns.of(&pod.id).await;
        if pod.stage() != PodStage::Ready {
            return Ok(());
        }
        self.store
            .change_pod(pod, |record| record.stage = record.stage.max(PodStage::Stopped.into()))
            .await?;
        self.tell(&pod.id, pod, ContainerEventType::ContainerStoppedEvent).await;
        Ok(())
    }

    /// Looks whether a pod that is recorded as ready has ended.
    pub(super) async fn settle_pod(&self, pod: &Arc<Pod>) {
        if pod.stage() != PodStage::Ready {
            return;
        }
        let alive = match self.is_pod_alive(pod).await {
            Ok(alive) => alive,
            Err(error) => {
                tracing::warn!(id = pod.id, %error, "whether this pod is ready is not known");
                return;
            }
        };
        if !alive && let Err(error) = self.pod_ended(pod).await {
            tracing::error!(id = pod.id, %error, "that a pod ended was not recorded");
        }
    }

    async fn is_pod_alive(&self, pod: &Arc<Pod>) -> Result<bool> {
        let context = context()?;
        if !pod.record().sandbox_image.is_empty() {
            return self.is_pause_alive(pod).await;
        }
        let status = self.parts.tasks.sandbox_status(&context, &pod.id, false).await?;
        Ok(status.state == "SANDBOX_READY")
    }

    /// Removes a pod and all that is in it; one that runs is stopped first. One that is gone is no error.
    pub async fn remove_pod(&self, id: &str) -> Result<()> {
        let pod = match self.store.pod(id) {
            Err(Error::NotFound(_)) => return Ok(()),
            pod => pod?,
        };
        if pod.stage() == PodStage::Making {
            return Ok(());
        }
        let this = self.clone();
        let key = pod.id.clone();
        self.pod_removes.join(key, move || async move { this.remove_this_pod(&pod).await }).await
    }

    pub(super) async fn remove_this_pod(&self, pod: &Arc<Pod>) -> Result<()> {
        self.stop_pod(&pod.id).await?;
        let _step = self.step(&pod.id, "being removed");
        let containers = self.store.containers_of(&pod.id);
        let removals = containers.iter().map(|container| self.remove_container(&container.id));
        for removed in futures::future::join_all(removals).await {
            removed?;
        }
        // Its shim may have stayed for a container that was left in it.
        self.end_sandbox(pod).await?;
        let removing =
            self.store.change_pod(pod, |record| record.stage = record.stage.max(PodStage::Removing.into()));
        gone_is_fine(removing.await)?;
        sys::failpoint!("pod.remove.noted");
        self.forget_pod(pod).await.map_err(|error| error.context(format!("remove pod {}", pod.id)))?;
        self.tell(&pod.id, pod, ContainerEventType::ContainerDeletedEvent).await;
        Ok(())
    }

    /// The pods that pass the filter.
    pub fn list_pods(&self, filter: Option<PodSandboxFilter>) -> Vec<PodSandbox> {
        let filter = filter.unwrap_or_default();
        let id = match filter.id.as_str() {
            "" => None,
            id => Some(self.store.pod(id).map_or_else(|_| id.to_owned(), |pod| pod.id.clone())),
        };
        let state = filter.state.map(|value| value.state());
        let pods = self.store.pods().into_iter().filter(|pod| pod.stage() != PodStage::Making);
        pods.filter_map(|pod| {
            let record = pod.record();
            let config = record.config.clone().unwrap_or_default();
            let passes = id.as_ref().is_none_or(|id| *id == pod.id)
                && state.is_none_or(|state| state == state_of(record.stage()))
                && selects(&filter.label_selector, &config.labels);
            passes.then(|| PodSandbox {
                id: pod.id.clone(),
                metadata: config.metadata,
                state: state_of(record.stage()).into(),
                created_at: record.created_at,
                labels: config.labels,
                annotations: config.annotations,
                runtime_handler: record.handler.clone(),
            })
        })
        .collect()
    }

    /// A pod that has been made.
    pub(super) fn made_pod(&self, id: &str) -> Result<Arc<Pod>> {
        let pod = self.store.pod(id)?;
        match pod.stage() {
            PodStage::Making => Err(Error::not_found(format!("pod sandbox {id:?} does not exist"))),
            _ => Ok(pod),
        }
    }

    /// What a pod is now; with `verbose` more than the kubelet needs.
    pub async fn pod_status(&self, id: &str, verbose: bool) -> Result<PodSandboxStatusResponse> {
        let pod = self.made_pod(id)?;
        let mut statuses = Vec::new();
        for container in self.store.containers_of(&pod.id) {
            statuses.extend(self.status_of(&container, false).await);
        }
        let mut info = BTreeMap::new();
        if verbose {
            info.insert("info".to_owned(), self.pod_info(&pod).to_string());
        }
        Ok(PodSandboxStatusResponse {
            status: Some(pod_status(&pod)),
            info: info.into_iter().collect(),
            containers_statuses: statuses,
            timestamp: now(),
        })
    }

    fn pod_info(&self, pod: &Arc<Pod>) -> serde_json::Value {
        let record = pod.record();
        let sandbox = context().and_then(|context| self.parts.sandboxes.get(&context, &pod.id));
        let spec = sandbox.ok().and_then(|sandbox| sandbox.spec);
        let spec: Option<serde_json::Value> = spec.and_then(|spec| serde_json::from_slice(&spec.value).ok());
        let attachment: Option<serde_json::Value> = serde_json::from_str(&record.attachment).ok();
        let doing = self.steps.lock().get(&pod.id).map(|(what, since)| (*what, since.elapsed().as_secs()));
        serde_json::json!({
            "pid": record.pid,
            "stage": format!("{:?}", record.stage()),
            "underWay": doing.map(|(what, seconds)| format!("{what} for {seconds} s")),
            "netNamespace": record.netns,
            "netNamespaceClosed": record.stage() >= PodStage::Released,
            "image": record.sandbox_image,
            "runtimeHandler": record.handler,
            "runtimeType": record.runtime,
            "namespaces": record.namespaces,
            "cniResult": attachment,
            "runtimeSpec": spec,
        })
    }

    /// Notes what the kubelet says of a pod's resources: limits are those of its cgroup, which the kubelet sets itself.
    pub async fn update_pod_resources(&self, request: UpdatePodSandboxResourcesRequest) -> Result<()> {
        let pod = self.made_pod(&request.pod_sandbox_id)?;
        let this = self.clone();
        outlive(async move {
            let changed = this.store.change_pod(&pod, move |record| {
                spec::update_pod(record.config.get_or_insert_default(), &request);
            });
            changed.await.map(drop)
        })
        .await
    }
}

/// What the kubelet is told of a pod.
pub(super) fn pod_status(pod: &Pod) -> PodSandboxStatus {
    let record = pod.record();
    let config = record.config.clone().unwrap_or_default();
    let has_network = record.stage() < PodStage::Released;
    let mut ips = record.ips.iter().filter(|_| has_network).cloned();
    PodSandboxStatus {
        id: pod.id.clone(),
        state: state_of(record.stage()).into(),
        created_at: record.created_at,
        network: Some(PodSandboxNetworkStatus {
            ip: ips.next().unwrap_or_default(),
            additional_ips: ips.map(|ip| PodIp { ip }).collect(),
        }),
        linux: Some(LinuxPodSandboxStatus {
            namespaces: Some(proto::runtime::v1::Namespace { options: namespace_options(&config).cloned() }),
        }),
        metadata: config.metadata,
        labels: config.labels,
        annotations: config.annotations,
        runtime_handler: record.handler.clone(),
    }
}

fn state_of(stage: PodStage) -> PodSandboxState {
    match stage {
        PodStage::Ready => PodSandboxState::SandboxReady,
        _ => PodSandboxState::SandboxNotready,
    }
}

/// Whether labels are as a selector wants them.
pub(super) fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

/// What no two pods have the same.
fn pod_name(metadata: Option<&PodSandboxMetadata>) -> Result<String> {
    let metadata = metadata
        .ok_or_else(|| Error::invalid_argument("the pod's config has no metadata: name, namespace, uid"))?;
    if metadata.name.is_empty() || metadata.namespace.is_empty() || metadata.uid.is_empty() {
        return Err(Error::invalid_argument("the pod's metadata needs a name, a namespace and a uid"));
    }
    let PodSandboxMetadata { name, namespace, uid, attempt } = metadata;
    Ok(format!("{name}_{namespace}_{uid}_{attempt}"))
}

/// What can be seen to be wrong before anything is done.
fn check(config: &PodSandboxConfig) -> Result<()> {
    if let Some(options) = namespace_options(config) {
        let wrong = |what: &str, mode: NamespaceMode| {
            Err(Error::invalid_argument(format!(
                "a pod's {what} namespace cannot be of the mode {}",
                mode.as_str_name()
            )))
        };
        match (options.network(), options.ipc(), options.pid()) {
            (mode @ (NamespaceMode::Container | NamespaceMode::Target), ..) => return wrong("network", mode),
            (_, mode @ (NamespaceMode::Container | NamespaceMode::Target), _) => return wrong("ipc", mode),
            (_, _, mode @ NamespaceMode::Target) => return wrong("pid", mode),
            _ => {}
        }
    }
    spec::Users::of_pod(config)?;
    if config.hostname.len() > 64 || config.hostname.contains(['\n', '\0', '/']) {
        return Err(Error::invalid_argument(format!("{:?} is no hostname", config.hostname)));
    }
    let dns = config.dns_config.clone().unwrap_or_default();
    if let Some(text) =
        dns.servers.iter().chain(&dns.searches).chain(&dns.options).find(|text| text.contains(['\n', '\0']))
    {
        return Err(Error::invalid_argument(format!("{text:?} cannot stand in resolv.conf")));
    }
    cni::Bandwidth::from_annotations(&config.annotations).map_err(Error::invalid_argument)?;
    Ok(())
}

/// What CNI is told of a pod.
fn network_of(id: &str, record: &PodRecord) -> Result<cni::Pod> {
    let config = record.config.clone().unwrap_or_default();
    let metadata = config.metadata.unwrap_or_default();
    let linux = config.linux.unwrap_or_default();
    let protocol = |protocol: Protocol| match protocol {
        Protocol::Tcp => "tcp",
        Protocol::Udp => "udp",
        Protocol::Sctp => "sctp",
    };
    Ok(cni::Pod {
        id: id.to_owned(),
        netns: Some(PathBuf::from(&record.netns)),
        namespace: metadata.namespace,
        name: metadata.name,
        uid: metadata.uid,
        port_mappings: config
            .port_mappings
            .iter()
            .map(|port| cni::PortMapping {
                host_port: port.host_port,
                container_port: port.container_port,
                protocol: protocol(port.protocol()).to_owned(),
                host_ip: port.host_ip.clone(),
            })
            .collect(),
        bandwidth: cni::Bandwidth::from_annotations(&config.annotations).map_err(Error::invalid_argument)?,
        dns: config.dns_config.map(|dns| cni::PodDns {
            servers: dns.servers,
            searches: dns.searches,
            options: dns.options,
        }),
        cgroup_path: Some(linux.cgroup_parent).filter(|path| !path.is_empty()),
        annotations: config.annotations,
        capabilities: BTreeMap::new(),
    })
}

fn cni_failed(error: &cni::SetupError) -> Error {
    match &error.cause {
        cni::Error::NotInitialized => Error::failed_precondition(error.to_string()),
        cni::Error::Invalid(_) => Error::invalid_argument(error.to_string()),
        _ => Error::unknown(format!("set up the network: {error}")),
    }
}

fn sysctls(config: &PodSandboxConfig) -> impl Iterator<Item = &str> {
    config.linux.iter().flat_map(|linux| linux.sysctls.keys().map(String::as_str))
}

/// Whether a sysctl is of one interface, which must be there before it can be set.
fn is_of_interface(key: &str) -> bool {
    let parts: Vec<&str> = key.split(['.', '/']).collect();
    matches!(parts.as_slice(), ["net", _, "conf" | "neigh", interface, ..] if !matches!(*interface, "all" | "default" | "lo"))
}

/// The namespaces of a process that a pod's containers join.
pub(super) fn namespaces_of(pid: u32, config: &PodSandboxConfig) -> BTreeMap<String, String> {
    let options = namespace_options(config).cloned().unwrap_or_default();
    let host_network = options.network() == NamespaceMode::Node;
    let kinds = [
        ("ipc", options.ipc() != NamespaceMode::Node),
        ("net", !host_network),
        ("pid", options.pid() == NamespaceMode::Pod),
        ("uts", !host_network),
    ];
    let own = kinds.into_iter().filter(|(_, own)| *own);
    own.map(|(kind, _)| (kind.to_owned(), format!("/proc/{pid}/ns/{kind}"))).collect()
}

/// The labels of an object that other clients see. One that is longer than a label may be is left out; and so is one whose name
/// steers an engine: whoever may make a pod is not thereby one who says what a collection spares.
pub(super) fn labels(of: &BTreeMap<String, String>, kind: &str) -> BTreeMap<String, String> {
    let mut labels: BTreeMap<String, String> = of
        .iter()
        .filter(|(key, value)| {
            let fits = crate::labels::validate_all([(*key, *value)]).is_ok();
            if !fits {
                tracing::debug!(%key, "too long for a label of containerd's API");
            }
            fits && !oci::image::is_reserved_label(key)
        })
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect();
    labels.insert(KIND.to_owned(), kind.to_owned());
    labels
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::runtime::v1::{LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceOption};

    fn with(options: NamespaceOption) -> PodSandboxConfig {
        let security_context =
            Some(LinuxSandboxSecurityContext { namespace_options: Some(options), ..Default::default() });
        PodSandboxConfig {
            linux: Some(LinuxPodSandboxConfig { security_context, ..Default::default() }),
            ..Default::default()
        }
    }

    #[test]
    fn labels_of_the_kubelet_steer_nothing() {
        let of = |key: &str| [(key.to_owned(), "x".to_owned())].into();
        for key in [
            "containerd.io/gc.ref.snapshot.overlayfs",
            "containerd.io/restart.status",
            "io.cri-containerd.kind",
            "gantry.io/dropped.l.0",
        ] {
            assert_eq!(
                labels(&of(key), "sandbox"),
                [(KIND.to_owned(), "sandbox".to_owned())].into(),
                "{key}"
            );
        }
        for key in ["io.kubernetes.pod.name", "app.kubernetes.io/name", "app"] {
            assert_eq!(labels(&of(key), "container")[key], "x");
        }
    }

    #[test]
    fn pods_are_named_by_all_of_their_metadata() {
        let metadata = |attempt| PodSandboxMetadata {
            name: "a".into(),
            uid: "u".into(),
            namespace: "n".into(),
            attempt,
        };
        assert_ne!(pod_name(Some(&metadata(0))).unwrap(), pod_name(Some(&metadata(1))).unwrap());
        for incomplete in [None, Some(PodSandboxMetadata { name: String::new(), ..metadata(0) })] {
            assert!(matches!(pod_name(incomplete.as_ref()), Err(Error::InvalidArgument(_))));
        }
    }

    #[test]
    fn modes_that_make_no_sense_are_refused() {
        let (node, container, target) =
            (NamespaceMode::Node, NamespaceMode::Container, NamespaceMode::Target);
        for (options, fine) in [
            (NamespaceOption::default(), true),
            (
                NamespaceOption {
                    network: node.into(),
                    pid: node.into(),
                    ipc: node.into(),
                    ..Default::default()
                },
                true,
            ),
            (NamespaceOption { pid: container.into(), ..Default::default() }, true),
            (NamespaceOption { network: container.into(), ..Default::default() }, false),
            (NamespaceOption { ipc: target.into(), ..Default::default() }, false),
            (NamespaceOption { pid: target.into(), ..Default::default() }, false),
        ] {
            assert_eq!(check(&with(options.clone())).is_ok(), fine, "{options:?}");
        }
        assert!(check(&PodSandboxConfig { hostname: "a\nb".into(), ..Default::default() }).is_err());
    }

    #[test]
    fn a_pause_containers_namespaces_are_those_of_the_pod() {
        let kinds = |options| namespaces_of(7, &with(options)).into_keys().collect::<Vec<_>>();
        let node = NamespaceMode::Node.into();
        assert_eq!(kinds(NamespaceOption::default()), ["ipc", "net", "pid", "uts"]);
        assert_eq!(kinds(NamespaceOption { network: node, ..Default::default() }), ["ipc", "pid"]);
        let own = NamespaceOption { pid: NamespaceMode::Container.into(), ipc: node, ..Default::default() };
        assert_eq!(namespaces_of(7, &with(own)).get("net").map(String::as_str), Some("/proc/7/ns/net"));
    }

    #[test]
    fn sysctls_of_interfaces_wait_for_them() {
        for (key, of_one) in [
            ("net.ipv4.conf.eth0.rp_filter", true),
            ("net/ipv6/conf/eth0/disable_ipv6", true),
            ("net.ipv4.conf.all.rp_filter", false),
            ("net.ipv4.ip_forward", false),
            ("kernel.shm_rmid_forced", false),
        ] {
            assert_eq!(is_of_interface(key), of_one, "{key}");
        }
    }
}
