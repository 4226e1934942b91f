//! The ends of containers and pods, and telling the kubelet of all that happens to them.
//!
//! ```text
//!  shim --> event exchange --> Runtime::watch --> record changed --> clients of GetContainerEvents
//! ```
//!
//! Invariants: what is told is recorded before. An end is told once: it is a stage, and a stage comes once. When events were
//! missed, everything that is recorded as running is asked instead.

use std::sync::Arc;

use proto::containerd::events::{SandboxExit, TaskExit, TaskOom};
use proto::containerd::types::Envelope;
use proto::containerd::v1::types::Status;
use proto::runtime::v1::{ContainerEventResponse, ContainerEventType};
use tokio::sync::broadcast;

use super::NAMESPACE;
use super::pods::pod_status;
use super::runtime::{Runtime, context, now};
use super::store::{Container, Pod};
use crate::error::Error;
use crate::metadata::cri::{ContainerStage, PodStage};

/// What an end is called of which nothing is known.
const UNKNOWN: u32 = 255;
/// How long deleting a task that has ended may take: its output is read to the end before.
const DELETE_LIMIT: std::time::Duration = std::time::Duration::from_secs(30);
/// How long it is until a task that was not deleted is deleted again, at first, and when that is given up: after 0.75 s in all.
const DELETE_PAUSE: std::time::Duration = std::time::Duration::from_millis(50);
const DELETE_PAUSE_END: std::time::Duration = std::time::Duration::from_millis(800);
/// Before events are asked for again that could not be had.
const PAUSE: std::time::Duration = std::time::Duration::from_secs(1);

/// How a container ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct End {
    /// Its exit status.
    pub(super) status: u32,
    /// When, in nanoseconds since 1970; 0 is not known.
    pub(super) at: i64,
    /// Whether nobody knows how it ended.
    pub(super) unknown: bool,
}

impl Runtime {
    /// Follows the ends of tasks and sandboxes for as long as it is polled.
    pub async fn watch(self) {
        let topics = ["/tasks/exit", "/tasks/oom", "/sandboxes/exit"];
        let filters = topics.map(|topic| format!("topic=={topic:?},namespace=={NAMESPACE:?}"));
        loop {
            let mut events = match self.parts.events.watch(&filters) {
                Ok(events) => events,
                Err(error) => {
                    tracing::error!(%error, "the ends of containers cannot be followed");
                    tokio::time::sleep(PAUSE).await;
                    continue;
                }
            };
            self.settle().await;
            loop {
                match events.next().await {
                    Some(Ok(envelope)) => self.heard(&envelope),
                    Some(Err(error)) => {
                        tracing::warn!(%error, "ends of containers were missed; asking all");
                        break;
                    }
                    // The engine ends.
                    None => return,
                }
            }
        }
    }

    fn heard(&self, envelope: &Envelope) {
        let Some(any) = &envelope.event else { return };
        match envelope.topic.as_str() {
            "/tasks/exit" => {
                let Ok(exit) = proto::any::unpack::<TaskExit>(any) else { return };
                if exit.id != exit.container_id {
                    return;
                }
                if let Some(container) = self.container_of(&exit.container_id) {
                    let end = End {
                        status: exit.exit_status,
                        at: exit.exited_at.map_or(0, in_nanoseconds),
                        unknown: false,
                    };
                    let this = self.clone();
                    tokio::spawn(async move { this.container_ended(&container, end).await });
                } else if let Some(pod) = self.pod_of(&exit.container_id) {
                    // Its pause container.
                    self.note_end_of(pod);
                }
            }
            "/tasks/oom" => {
                let Ok(oom) = proto::any::unpack::<TaskOom>(any) else { return };
                if self.container_of(&oom.container_id).is_some() {
                    self.out_of_memory.lock().insert(oom.container_id);
                }
            }
            "/sandboxes/exit" => {
                let Ok(exit) = proto::any::unpack::<SandboxExit>(any) else { return };
                if let Some(pod) = self.pod_of(&exit.sandbox_id) {
                    self.note_end_of(pod);
                }
            }
            _ => {}
        }
    }

    fn container_of(&self, id: &str) -> Option<Arc<Container>> {
        self.store.container(id).ok().filter(|container| container.id == id)
    }

    fn pod_of(&self, id: &str) -> Option<Arc<Pod>> {
        self.store.pod(id).ok().filter(|pod| pod.id == id)
    }

    fn note_end_of(&self, pod: Arc<Pod>) {
        let this = self.clone();
        tokio::spawn(async move {
            if let Err(error) = this.pod_ended(&pod).await {
                tracing::error!(id = pod.id, %error, "that a pod ended was not recorded");
            }
        });
    }

    /// Records the end of a container that runs, and lets its task go.
    pub(super) async fn container_ended(&self, container: &Arc<Container>, end: End) {
        let id = container.id.as_str();
        let _turn = self.turns.of(id).await;
        if container.stage() != ContainerStage::Running {
            return;
        }
        // While its control group is there.
        let out_of_memory = end.status != 0 && self.ran_out_of_memory(id).await;
        // How it ended comes first, as nobody knows that once the task is gone; that it ended comes when its log is whole.
        let recorded = self.store.change_container(container, move |record| {
            if end.unknown && record.finished_at != 0 {
                return;
            }
            record.finished_at = if end.at > 0 { end.at } else { now() };
            record.exit_code = i32::try_from(end.status).unwrap_or(i32::MAX);
            if out_of_memory {
                record.reason = "OOMKilled".to_owned();
            } else if end.unknown {
                record.reason = "Unknown".to_owned();
                record.message = "its shim is gone, and nobody saw how it ended".to_owned();
            }
        });
        if let Err(error) = recorded.await {
            tracing::error!(id, %error, "how a container ended was not recorded");
        }
        // A group that is just being killed is frozen for a moment, in which runtimes take its container for a paused one.
        let deleted = async {
            let context = context()?;
            let mut pause = DELETE_PAUSE;
            loop {
                match self.parts.tasks.delete(&context, id).await {
                    Err(error) if pause < DELETE_PAUSE_END && !matches!(error, Error::NotFound(_)) => {
                        tracing::debug!(id, %error, "a task is deleted again in {pause:?}");
                    }
                    done => return done,
                }
                tokio::time::sleep(pause).await;
                pause *= 2;
            }
        };
        match tokio::time::timeout(DELETE_LIMIT, deleted).await {
            Ok(Ok(_) | Err(Error::NotFound(_))) => {}
            Ok(Err(error)) => {
                tracing::warn!(id, %error, "the task of a container that ended stays until it is removed");
            }
            Err(_) => tracing::warn!(
                id,
                "the task of a container that ended is still being deleted after {DELETE_LIMIT:?}"
            ),
        }
        let ended = self.store.change_container(container, |record| {
            record.stage = record.stage.max(ContainerStage::Exited.into());
        });
        if let Err(error) = ended.await {
            tracing::error!(id, %error, "the end of a container was not recorded");
        }
        self.out_of_memory.lock().remove(id);
        self.signalled.lock().remove(id);
        if let Ok(pod) = self.store.pod(&container.record().pod) {
            self.tell(id, &pod, ContainerEventType::ContainerStoppedEvent).await;
        }
    }

    /// Whether the kernel killed something in a container for want of memory.
    async fn ran_out_of_memory(&self, id: &str) -> bool {
        if self.out_of_memory.lock().contains(id) {
            return true;
        }
        let metrics = async { self.parts.tasks.metrics(&context()?, &[format!("id=={id}")]).await };
        let found = metrics.await.unwrap_or_default();
        found.into_iter().filter_map(|metric| metric.data).any(|data| kills(&data) > 0)
    }

    /// Asks what became of everything that is recorded as running.
    pub(super) async fn settle(&self) {
        let containers = self.store.containers();
        let running = containers.iter().filter(|container| container.stage() == ContainerStage::Running);
        futures::future::join_all(running.map(|container| self.settle_container(container))).await;
        let pods = self.store.pods();
        futures::future::join_all(pods.iter().map(|pod| self.settle_pod(pod))).await;
    }

    /// Asks what became of a container that is recorded as running.
    pub(super) async fn settle_container(&self, container: &Arc<Container>) {
        if container.stage() != ContainerStage::Running {
            return;
        }
        let asked = async { self.parts.tasks.get(&context()?, &container.id, "").await };
        let end = match asked.await {
            Ok(process) if process.status() == Status::Stopped => End {
                status: process.exit_status,
                at: process.exited_at.map_or(0, in_nanoseconds),
                unknown: false,
            },
            Ok(_) => return,
            Err(Error::NotFound(_)) => End { status: UNKNOWN, at: 0, unknown: true },
            Err(error) => {
                tracing::warn!(id = container.id, %error, "whether this container runs is not known");
                return;
            }
        };
        self.container_ended(container, end).await;
    }

    /// What happens from now on. One who reads too slowly loses some, and is told.
    pub fn happenings(&self) -> broadcast::Receiver<Arc<ContainerEventResponse>> {
        self.told.subscribe()
    }

    /// Tells of something that happened to a container, or to a pod, whose id it is then.
    pub(super) async fn tell(&self, id: &str, pod: &Arc<Pod>, kind: ContainerEventType) {
        if self.told.receiver_count() == 0 {
            return;
        }
        let mut containers_statuses = Vec::new();
        for container in self.store.containers_of(&pod.id) {
            containers_statuses.extend(self.status_of(&container, true).await);
        }
        let is_gone = id == pod.id && kind == ContainerEventType::ContainerDeletedEvent;
        let event = ContainerEventResponse {
            container_id: id.to_owned(),
            container_event_type: kind.into(),
            created_at: now(),
            pod_sandbox_status: (!is_gone && pod.stage() != PodStage::Making).then(|| pod_status(pod)),
            containers_statuses,
        };
        // Nobody may be listening any more.
        let _ = self.told.send(Arc::new(event));
    }
}

/// How often the kernel killed for want of memory, as counted in a control group of either version.
fn kills(data: &prost_types::Any) -> u64 {
    use proto::io::containerd::cgroups::{v1, v2};
    if let Ok(metrics) = proto::any::unpack::<v1::Metrics>(data) {
        return metrics.memory_oom_control.map_or(0, |control| control.oom_kill);
    }
    match proto::any::unpack::<v2::Metrics>(data) {
        Ok(metrics) => metrics.memory_events.map_or(0, |events| events.oom_kill),
        Err(_) => 0,
    }
}

fn in_nanoseconds(at: prost_types::Timestamp) -> i64 {
    at.seconds.saturating_mul(1_000_000_000).saturating_add(i64::from(at.nanos))
}

/// What a client that read too slowly is told.
pub fn cut_off(missed: u64) -> Error {
    Error::resource_exhausted(format!(
        "the client fell behind, and {missed} events were lost to it; list pods and containers, and ask again"
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proto::io::containerd::cgroups::{v1, v2};

    #[test]
    fn kills_for_want_of_memory_are_counted_in_both_versions() {
        let one = v1::Metrics {
            memory_oom_control: Some(v1::MemoryOomControl { oom_kill: 2, ..Default::default() }),
            ..Default::default()
        };
        let two = v2::Metrics {
            memory_events: Some(v2::MemoryEvents { oom_kill: 3, ..Default::default() }),
            ..Default::default()
        };
        assert_eq!((kills(&proto::any::pack(&one)), kills(&proto::any::pack(&two))), (2, 3));
        assert_eq!(kills(&proto::any::pack(&TaskOom::default())), 0);
    }
}
