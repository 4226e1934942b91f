//! After a start: pods and containers as the machine has them.
//!
//! ```text
//!  container  Making, Removing   taken down
//!             Created            its task, if any, goes; one that runs has been started
//!             Running            asked: goes on, or Exited
//!             Exited             its task, if any, goes
//!  pod        Making, Removing   taken down
//!             Ready              asked: goes on, or Stopped
//!             Stopped            let go of
//! ```
//!
//! Invariant: nothing here fails the start. What takes time is done in the background, and again until it holds.

use std::collections::BTreeSet;
use std::sync::Arc;

use proto::containerd::v1::types::Status;

use super::runtime::{Runtime, context, now};
use super::store::{Container, Pod};
use crate::error::{Error, Result, blocking};
use crate::metadata::cri::{ContainerStage, PodStage};

impl Runtime {
    /// Brings records and machine together, before the kubelet is served.
    pub async fn recover(&self) {
        let places = self.places.clone();
        let unmounted = blocking(move || {
            let folder = places.mounts();
            sys::mount::unmount_all(&folder).map_err(|error| Error::io("unmount in", &folder, &error))?;
            for left in std::fs::read_dir(&folder).into_iter().flatten().flatten() {
                let _ = std::fs::remove_dir(left.path());
            }
            let (_, containers) = places.found();
            containers.iter().try_for_each(|id| places.unmap(id))
        });
        if let Err(error) = unmounted.await {
            tracing::warn!(%error, "what an earlier engine mounted for a moment stays");
        }
        // Those that an earlier engine left: what is made from now on is nobody's leftover.
        let (containers, pods) = (self.store.containers(), self.store.pods());
        for container in containers.iter().filter(|container| container.stage() == ContainerStage::Created) {
            if let Err(error) = self.recover_created(container).await {
                tracing::warn!(id = container.id, %error, "a container that was made and not started is not in order");
            }
        }
        let over = |container: &Arc<Container>| {
            !matches!(container.stage(), ContainerStage::Created | ContainerStage::Running)
        };
        let containers: Vec<_> = containers.into_iter().filter(over).collect();
        let over = |pod: &Arc<Pod>| !matches!(pod.stage(), PodStage::Ready | PodStage::Released);
        let pods: Vec<_> = pods.into_iter().filter(over).collect();
        self.settle().await;
        let this = self.clone();
        tokio::spawn(async move { this.clear_up(containers, pods).await });
    }

    /// One that was being started when the engine ended.
    async fn recover_created(&self, container: &Arc<Container>) -> Result<()> {
        let id = container.id.as_str();
        let process = match self.parts.tasks.get(&context()?, id, "").await {
            Err(Error::NotFound(_)) => return Ok(()),
            process => process?,
        };
        if process.status() == Status::Created {
            return self.end_task(id).await;
        }
        // It has run, and may have ended; that is asked with the others.
        let _turn = self.turns.of(id).await;
        let running = self.store.change_container(container, |record| {
            record.stage = record.stage.max(ContainerStage::Running.into());
            record.started_at = now();
        });
        running.await.map(drop)
    }

    /// Takes down what was half made or half removed.
    async fn clear_up(&self, containers: Vec<Arc<Container>>, pods: Vec<Arc<Pod>>) {
        for container in containers {
            let id = container.id.clone();
            let done = match container.stage() {
                ContainerStage::Exited => self.end_task(&id).await,
                _ => {
                    let _turn = self.turns.of(&id).await;
                    self.take_container_down(&container).await
                }
            };
            if let Err(error) = done {
                tracing::warn!(id, %error, "what is left of a container is not gone yet");
                self.until_it_holds(&id, "what is left of a container is not gone yet", move |this| {
                    let container = container.clone();
                    async move {
                        match container.stage() {
                            ContainerStage::Exited => this.end_task(&container.id).await,
                            _ => this.take_container_down(&container).await,
                        }
                    }
                });
            }
        }
        for pod in pods {
            match pod.stage() {
                PodStage::Making => self.undo_pod(&pod).await,
                PodStage::Stopped | PodStage::Removing => {
                    let removing = pod.stage() == PodStage::Removing;
                    let done = if removing {
                        self.remove_this_pod(&pod).await
                    } else {
                        self.stop_pod(&pod.id).await
                    };
                    if let Err(error) = done {
                        tracing::warn!(id = pod.id, %error, "a pod that is over still has something");
                        let again = pod.clone();
                        self.until_it_holds(&pod.id, "a pod that is over still has something", move |this| {
                            let pod = again.clone();
                            async move {
                                if removing {
                                    this.remove_this_pod(&pod).await
                                } else {
                                    this.stop_pod(&pod.id).await
                                }
                            }
                        });
                    }
                }
                PodStage::Ready | PodStage::Released => {}
            }
        }
        self.clear_folders().await;
        self.clear_networks().await;
    }

    /// Removes folders and namespaces of pods and containers that have no record.
    async fn clear_folders(&self) {
        let (this, store) = (self.clone(), self.store.clone());
        let cleared = blocking(move || {
            // What is found is looked up afterwards: a record is there before anything else.
            let (pods, containers) = this.places.found();
            let mut left = None;
            for id in pods.iter().filter(|id| !store.pods().iter().any(|pod| pod.id == **id)) {
                left = this
                    .places
                    .remove_namespaces(id)
                    .and_then(|()| this.places.remove_pod(id))
                    .err()
                    .or(left);
            }
            for id in containers.iter().filter(|id| !store.containers().iter().any(|other| other.id == **id))
            {
                left = this.places.remove_container(id).err().or(left);
            }
            left.map_or(Ok(()), Err)
        });
        if let Err(error) = cleared.await {
            tracing::warn!(%error, "files of pods that are no more stay until the next start");
        }
    }

    /// Has what is attached to pods that are no more let go of.
    async fn clear_networks(&self) {
        for (handler, network) in &self.networks {
            let store = self.store.clone();
            let valid = move || -> BTreeSet<String> {
                let pods = store.pods().into_iter().filter(|pod| pod.stage() < PodStage::Released);
                pods.map(|pod| pod.id.clone()).collect()
            };
            for retry in network.gc(valid).await.err().into_iter().flatten() {
                tracing::warn!(handler, %retry, "networks of pods that are no more");
            }
        }
    }
}
