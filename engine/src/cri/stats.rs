//! What pods and containers use: the kubelet's statistics and metrics.
//!
//! ```text
//!  control groups' files (stats/reading) --\
//!  the pod's network     (stats/network) --> Stats --> messages; metrics by name (stats/metrics)
//!  writable layers, rates (stats/sampler) -/
//! ```
//!
//! Groups are read by their names in the records; no shim is asked, unless the group is not on this machine. Invariants:
//! what could not be read is unset, never 0; what ends while it is read is left out of lists.

mod metrics;
mod network;
mod reading;
mod sampler;

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::SystemTime;

use futures::StreamExt as _;
use proto::runtime::v1::{
    ContainerAttributes, ContainerMetrics, ContainerStats, ContainerStatsFilter, CpuUsage,
    FilesystemIdentifier, FilesystemUsage, IoUsage, LinuxPodSandboxStats, MemoryUsage, MetricDescriptor,
    NetworkInterfaceUsage, NetworkUsage, PodSandboxAttributes, PodSandboxMetrics, PodSandboxStats,
    PodSandboxStatsFilter, ProcessUsage, SwapUsage, UInt64Value,
};
use sys::cgroup::{Cgroup, Hierarchies};

use self::metrics::{Filesystem, Told};
use self::network::Interface;
use self::reading::Reading;
use self::sampler::{Layer, Sampler};
use super::context;
use super::store::{Container, Pod, Store};
use crate::containers::Containers;
use crate::error::{Error, Result, blocking};
use crate::metadata::cri::{ContainerStage, PodStage};
use crate::snapshots::Snapshots;
use crate::tasks::Tasks;

/// How many shims are asked at a time.
const WIDTH: usize = 16;

/// Statistics and metrics of pods and containers; cheap to clone.
#[derive(Clone)]
pub struct Stats {
    store: Store,
    tasks: Tasks,
    containers: Containers,
    snapshots: Snapshots,
    /// None on a machine without control groups.
    hierarchies: Option<Arc<Hierarchies>>,
    sampler: Sampler,
}

/// A container that runs or ran, and what is known of it.
struct Seen {
    container: Arc<Container>,
    layer: Option<Layer>,
    at: i64,
    /// Unset when it does not run.
    reading: Option<Reading>,
    processes: Vec<u32>,
}

impl Stats {
    /// Statistics over these.
    pub fn new(store: Store, tasks: Tasks, containers: Containers, snapshots: Snapshots) -> Self {
        let hierarchies = Hierarchies::mounted()
            .inspect_err(|error| tracing::warn!(%error, "there will be no statistics of containers"))
            .ok()
            .map(Arc::new);
        let (recorded, groups) = (store.clone(), hierarchies.clone());
        let times = move || times(&recorded, groups.as_deref());
        let sampler = Sampler::new(store.clone(), containers.clone(), snapshots.clone(), times);
        Stats { store, tasks, containers, snapshots, hierarchies, sampler }
    }

    /// A container's statistics.
    pub async fn container_stats(&self, id: &str) -> Result<ContainerStats> {
        let container = self.store.container(id)?;
        let seen = self.see(vec![container]).await?;
        let seen =
            seen.first().ok_or_else(|| Error::internal(format!("container {id:?} was not looked at")))?;
        Ok(self.container_message(seen))
    }

    /// Statistics of the containers that pass the filter, whether they run or not.
    pub async fn list_container_stats(
        &self,
        filter: Option<ContainerStatsFilter>,
    ) -> Result<Vec<ContainerStats>> {
        let filter = filter.unwrap_or_default();
        // As in all lists of the kubelet's, ids may be given by their beginnings, and one that nothing has passes nothing.
        let id = match filter.id.as_str() {
            "" => None,
            id => match self.store.container(id) {
                Ok(container) => Some(container.id.clone()),
                Err(_) => return Ok(Vec::new()),
            },
        };
        let pod = match filter.pod_sandbox_id.as_str() {
            "" => None,
            id => match self.store.pod(id) {
                Ok(pod) => Some(pod.id.clone()),
                Err(_) => return Ok(Vec::new()),
            },
        };
        let mut containers = self.store.containers();
        containers.retain(|container| {
            let record = container.record();
            let labels = record.config.as_ref().map(|config| &config.labels);
            !matches!(record.stage(), ContainerStage::Making | ContainerStage::Removing)
                && id.as_ref().is_none_or(|id| *id == container.id)
                && pod.as_ref().is_none_or(|pod| *pod == record.pod)
                && labels.is_some_and(|labels| selects(&filter.label_selector, labels))
        });
        let seen = self.see(containers).await?;
        Ok(seen.iter().map(|seen| self.container_message(seen)).collect())
    }

    /// A pod's statistics; Unavailable when it is not ready.
    pub async fn pod_stats(&self, id: &str) -> Result<PodSandboxStats> {
        let pod = self.store.pod(id)?;
        if pod.stage() != PodStage::Ready {
            return Err(Error::unavailable(format!(
                "pod sandbox {id:?} is not ready, so that it has no statistics"
            )));
        }
        let mut all = self.pods_seen(vec![pod]).await?;
        all.pop().ok_or_else(|| Error::internal(format!("pod sandbox {id:?} was not looked at")))
    }

    /// Statistics of the ready pods that pass the filter.
    pub async fn list_pod_stats(
        &self,
        filter: Option<PodSandboxStatsFilter>,
    ) -> Result<Vec<PodSandboxStats>> {
        let filter = filter.unwrap_or_default();
        let id = match filter.id.as_str() {
            "" => None,
            id => match self.store.pod(id) {
                Ok(pod) => Some(pod.id.clone()),
                Err(_) => return Ok(Vec::new()),
            },
        };
        let mut pods = self.store.pods();
        pods.retain(|pod| {
            let record = pod.record();
            let labels = record.config.as_ref().map(|config| &config.labels);
            record.stage() == PodStage::Ready
                && id.as_ref().is_none_or(|id| *id == pod.id)
                && labels.is_some_and(|labels| selects(&filter.label_selector, labels))
        });
        self.pods_seen(pods).await
    }

    /// What metrics there are.
    pub fn descriptors(&self) -> Vec<MetricDescriptor> {
        metrics::descriptors()
    }

    /// The metrics of all ready pods and of their containers that run.
    pub async fn pod_metrics(&self) -> Result<Vec<PodSandboxMetrics>> {
        let mut pods = self.store.pods();
        pods.retain(|pod| pod.stage() == PodStage::Ready);
        let containers: Vec<_> = pods.iter().flat_map(|pod| self.store.containers_of(&pod.id)).collect();
        let running = containers.into_iter().filter(|container| container.stage() == ContainerStage::Running);
        let seen = self.see(running.collect()).await?;
        let this = self.clone();
        blocking(move || {
            let mut roots = HashMap::new();
            let mut of_pod: HashMap<String, Vec<ContainerMetrics>> = HashMap::new();
            let by_id: HashMap<_, _> = pods.iter().map(|pod| (pod.id.clone(), pod.clone())).collect();
            for seen in &seen {
                let record = seen.container.record();
                if let (Some(pod), Some(_)) = (by_id.get(&record.pod), &seen.reading) {
                    let metrics = this.container_metrics(pod, seen, &mut roots);
                    of_pod.entry(record.pod.clone()).or_default().push(metrics);
                }
            }
            let of = |pod: &Arc<Pod>| PodSandboxMetrics {
                pod_sandbox_id: pod.id.clone(),
                metrics: this.own_metrics(pod),
                container_metrics: of_pod.remove(&pod.id).unwrap_or_default(),
            };
            Ok(pods.iter().map(of).collect())
        })
        .await
    }

    /// Looks at containers, all at the same time.
    async fn see(&self, containers: Vec<Arc<Container>>) -> Result<Vec<Seen>> {
        let mut layers = self.sampler.layers(&containers).await;
        let hierarchies = self.hierarchies.clone();
        let mut all = blocking(move || {
            let see = |container: Arc<Container>| {
                let record = container.record();
                let runs = record.stage() == ContainerStage::Running;
                let group = runs.then(|| group(hierarchies.as_deref(), &record.cgroup)).flatten();
                Seen {
                    layer: layers.remove(&container.id),
                    at: now(),
                    reading: group.as_ref().map(Reading::of),
                    // It may just have ended.
                    processes: group.and_then(|group| group.processes().ok()).unwrap_or_default(),
                    container,
                }
            };
            Ok(containers.into_iter().map(see).collect::<Vec<_>>())
        })
        .await?;
        let elsewhere = all
            .iter_mut()
            .filter(|seen| seen.reading.is_none() && seen.container.stage() == ContainerStage::Running);
        futures::stream::iter(elsewhere)
            .for_each_concurrent(WIDTH, |seen| async {
                seen.reading = self.ask(&seen.container.id).await;
                seen.at = now();
            })
            .await;
        Ok(all)
    }

    /// What the shim of a container counts, whose group is not here: it runs in a machine of its own.
    async fn ask(&self, id: &str) -> Option<Reading> {
        let metrics = self.tasks.metrics(&context().ok()?, &[format!("id=={id}")]).await.ok()?;
        Reading::of_metrics(metrics.into_iter().next()?.data.as_ref()?)
    }

    fn container_message(&self, seen: &Seen) -> ContainerStats {
        let config = seen.container.record().config.clone().unwrap_or_default();
        let reading = seen.reading.as_ref();
        ContainerStats {
            attributes: Some(ContainerAttributes {
                id: seen.container.id.clone(),
                metadata: config.metadata,
                labels: config.labels,
                annotations: config.annotations,
            }),
            cpu: reading.and_then(|reading| self.cpu(&seen.container.id, seen.at, reading)),
            memory: reading.and_then(|reading| memory(seen.at, reading)),
            writable_layer: seen.layer.as_ref().map(|layer| self.layer(layer)),
            swap: reading.and_then(|reading| swap(seen.at, reading)),
            io: reading.and_then(|reading| io(seen.at, reading)),
        }
    }

    fn cpu(&self, id: &str, at: i64, reading: &Reading) -> Option<CpuUsage> {
        let total = reading.cpu?.total;
        Some(CpuUsage {
            timestamp: at,
            usage_core_nano_seconds: value(total),
            usage_nano_cores: self.sampler.rate(id, at, total).and_then(value),
            psi: reading.cpu_pressure,
        })
    }

    fn layer(&self, layer: &Layer) -> FilesystemUsage {
        let mountpoint = self.folder_of(&layer.snapshotter).map(|folder| folder.display().to_string());
        FilesystemUsage {
            timestamp: layer.at,
            fs_id: mountpoint.map(|mountpoint| FilesystemIdentifier { mountpoint }),
            used_bytes: layer.usage.and_then(|(bytes, _)| value(bytes)),
            inodes_used: layer.usage.and_then(|(_, inodes)| value(inodes)),
        }
    }

    /// The folder of a snapshotter.
    fn folder_of(&self, snapshotter: &str) -> Option<&Path> {
        self.snapshots.opened().find_map(|(name, folder, _)| (name == snapshotter).then_some(folder))
    }

    /// The group that a pod's containers are in, if the kubelet has named one.
    fn group_of(&self, pod: &Pod) -> Option<Cgroup> {
        group(self.hierarchies.as_deref(), &parent(pod))
    }

    async fn pods_seen(&self, pods: Vec<Arc<Pod>>) -> Result<Vec<PodSandboxStats>> {
        let mut containers: Vec<_> = pods.iter().flat_map(|pod| self.store.containers_of(&pod.id)).collect();
        containers.retain(|container| {
            !matches!(container.stage(), ContainerStage::Making | ContainerStage::Removing)
        });
        let mut of_pod: HashMap<String, Vec<Seen>> = HashMap::new();
        for seen in self.see(containers).await? {
            of_pod.entry(seen.container.record().pod.clone()).or_default().push(seen);
        }
        let this = self.clone();
        blocking(move || {
            let of = |pod: Arc<Pod>| this.pod_message(&pod, &of_pod.remove(&pod.id).unwrap_or_default());
            Ok(pods.into_iter().map(of).collect())
        })
        .await
    }

    /// Blocks.
    fn pod_message(&self, pod: &Pod, containers: &[Seen]) -> PodSandboxStats {
        let at = now();
        let config = pod.record().config.clone().unwrap_or_default();
        let reading = match self.group_of(pod) {
            Some(group) => Reading::of(&group),
            None => sum(containers),
        };
        let processes: usize = containers.iter().map(|seen| seen.processes.len()).sum();
        PodSandboxStats {
            attributes: Some(PodSandboxAttributes {
                id: pod.id.clone(),
                metadata: config.metadata,
                labels: config.labels,
                annotations: config.annotations,
            }),
            linux: Some(LinuxPodSandboxStats {
                cpu: self.cpu(&pod.id, at, &reading),
                memory: memory(at, &reading),
                network: interfaces(pod).and_then(|interfaces| network(at, &interfaces)),
                process: Some(ProcessUsage { timestamp: at, process_count: value(processes as u64) }),
                containers: containers.iter().map(|seen| self.container_message(seen)).collect(),
                io: io(at, &reading),
            }),
            windows: None,
        }
    }

    /// The metrics of a pod itself. Blocks.
    fn own_metrics(&self, pod: &Pod) -> Vec<proto::runtime::v1::Metric> {
        let metadata = pod.record().config.clone().and_then(|config| config.metadata).unwrap_or_default();
        let mut told = Told::new(now(), [&metadata.name, &metadata.namespace, "", &pod.id, ""]);
        if let Some(group) = self.group_of(pod) {
            told.reading(&Reading::of(&group));
        }
        if let Some(interfaces) = interfaces(pod) {
            told.network(&interfaces);
        }
        told.metrics()
    }

    /// The metrics of a container that runs. `roots` remembers file systems. Blocks.
    fn container_metrics(
        &self,
        pod: &Pod,
        seen: &Seen,
        roots: &mut HashMap<PathBuf, Filesystem>,
    ) -> ContainerMetrics {
        let (id, record) = (&seen.container.id, seen.container.record());
        let of_pod = pod.record().config.clone().and_then(|config| config.metadata).unwrap_or_default();
        let config = record.config.clone().unwrap_or_default();
        let (name, image) = (config.metadata.unwrap_or_default().name, config.image.unwrap_or_default());
        let image =
            if image.user_specified_image.is_empty() { image.image } else { image.user_specified_image };
        let mut told = Told::new(seen.at, [&of_pod.name, &of_pod.namespace, &name, id, &image]);
        told.seen(record.started_at);
        if let Some(reading) = &seen.reading {
            told.reading(reading);
        }
        told.processes(seen.processes.len(), reading::descriptors(&seen.processes));
        told.ulimits(self.ulimits(id).iter().map(|(name, soft)| (name.as_str(), *soft)));
        let folder = seen.layer.as_ref().and_then(|layer| self.folder_of(&layer.snapshotter));
        if let Some(folder) = folder {
            let known = roots.entry(folder.to_owned()).or_insert_with(|| filesystem(folder));
            let usage = seen.layer.as_ref().and_then(|layer| layer.usage).map(|(bytes, _)| bytes);
            told.filesystem(&Filesystem { usage, ..*known });
        }
        ContainerMetrics { container_id: id.clone(), metrics: told.metrics() }
    }

    /// The soft limits that a container's first process was started with.
    fn ulimits(&self, id: &str) -> Vec<(String, u64)> {
        #[derive(serde::Deserialize)]
        struct Spec {
            process: Option<Process>,
        }
        #[derive(serde::Deserialize)]
        struct Process {
            #[serde(default)]
            rlimits: Vec<Rlimit>,
        }
        #[derive(serde::Deserialize)]
        struct Rlimit {
            #[serde(rename = "type")]
            kind: String,
            soft: u64,
        }
        let spec = context().and_then(|context| self.containers.get(&context, id)).ok();
        let spec = spec.and_then(|container| container.spec);
        let spec = spec.and_then(|spec| serde_json::from_slice::<Spec>(&spec.value).ok());
        let limits = spec.and_then(|spec| spec.process).map(|process| process.rlimits);
        limits.into_iter().flatten().map(|limit| (limit.kind, limit.soft)).collect()
    }
}

/// A group by its name in a record, where it has one.
fn group(hierarchies: Option<&Hierarchies>, name: &str) -> Option<Cgroup> {
    hierarchies.filter(|_| !name.is_empty())?.group(name)
}

/// The processor time of all that runs. Reads.
fn times(store: &Store, hierarchies: Option<&Hierarchies>) -> Vec<(String, i64, u64)> {
    let containers = store.containers().into_iter().filter_map(|container| {
        let record = container.record();
        (record.stage() == ContainerStage::Running).then(|| (container.id.clone(), record.cgroup.clone()))
    });
    let pods = store.pods().into_iter().filter(|pod| pod.stage() == PodStage::Ready);
    containers
        .chain(pods.map(|pod| (pod.id.clone(), parent(&pod))))
        .filter_map(|(id, name)| Some((id, now(), reading::cpu_total(&group(hierarchies, &name)?)?)))
        .collect()
}

/// The name of the group that the kubelet has made for a pod; empty for none.
fn parent(pod: &Pod) -> String {
    let record = pod.record();
    let linux = record.config.as_ref().and_then(|config| config.linux.as_ref());
    linux.map(|linux| linux.cgroup_parent.clone()).unwrap_or_default()
}

/// The interfaces of a pod's network; None with the host's. Blocks.
fn interfaces(pod: &Pod) -> Option<Vec<Interface>> {
    let record = pod.record();
    if record.netns.is_empty() {
        return None;
    }
    network::interfaces(&record.netns)
        .inspect_err(|error| tracing::debug!(id = %pod.id, %error, "a pod's network could not be looked at"))
        .ok()
}

fn network(at: i64, interfaces: &[Interface]) -> Option<NetworkUsage> {
    let usage = |interface: &Interface| NetworkInterfaceUsage {
        name: interface.name.clone(),
        rx_bytes: value(interface.rx.bytes),
        rx_errors: value(interface.rx.errors),
        tx_bytes: value(interface.tx.bytes),
        tx_errors: value(interface.tx.errors),
    };
    let (default, others) = interfaces.split_first()?;
    Some(NetworkUsage {
        timestamp: at,
        default_interface: Some(usage(default)),
        interfaces: others.iter().map(usage).collect(),
    })
}

/// What a pod without a group of its own uses.
fn sum(containers: &[Seen]) -> Reading {
    let mut sum = Reading::default();
    containers.iter().filter_map(|seen| seen.reading.as_ref()).for_each(|reading| sum.add(reading));
    sum
}

fn memory(at: i64, reading: &Reading) -> Option<MemoryUsage> {
    let memory = reading.memory.as_ref()?;
    let [_, faults] = memory.faults;
    let [_, major_faults] = memory.major_faults;
    Some(MemoryUsage {
        timestamp: at,
        working_set_bytes: value(memory.working_set()),
        available_bytes: memory.limit.and_then(|limit| value(limit.saturating_sub(memory.working_set()))),
        usage_bytes: value(memory.usage),
        rss_bytes: value(memory.rss),
        page_faults: value(faults),
        major_page_faults: value(major_faults),
        psi: reading.memory_pressure,
    })
}

fn swap(at: i64, reading: &Reading) -> Option<SwapUsage> {
    let memory = reading.memory.as_ref()?;
    Some(SwapUsage {
        timestamp: at,
        swap_available_bytes: memory.swap_limit.and_then(|limit| value(limit.saturating_sub(memory.swap))),
        swap_usage_bytes: value(memory.swap),
    })
}

fn io(at: i64, reading: &Reading) -> Option<IoUsage> {
    Some(IoUsage { timestamp: at, psi: Some(reading.io_pressure?) })
}

/// The file system that a folder is on. Blocks.
fn filesystem(folder: &Path) -> Filesystem {
    let Ok(of) = rustix::fs::statvfs(folder) else { return Filesystem::default() };
    Filesystem { usage: None, limit: of.f_blocks * of.f_frsize, inodes: of.f_files, inodes_free: of.f_ffree }
}

/// Whether labels have all that is asked for.
fn selects(selector: &BTreeMap<String, String>, labels: &BTreeMap<String, String>) -> bool {
    selector.iter().all(|(key, value)| labels.get(key) == Some(value))
}

#[allow(clippy::unnecessary_wraps, reason = "in the messages every number may be unset")]
fn value(value: u64) -> Option<UInt64Value> {
    Some(UInt64Value { value })
}

fn now() -> i64 {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}
