//! The restart monitor: keeps containers in the state that their labels ask for, without a client.
//!
//! ```text
//! containerd.io/restart.status              running | stopped: what is wanted; a container without it is left alone
//! containerd.io/restart.policy              always (as without it) | on-failure[:N] | unless-stopped | no
//! containerd.io/restart.explicitly-stopped  true: `unless-stopped` does not apply
//! containerd.io/restart.count               how often it was started again; written here
//! containerd.io/restart.loguri              where the output of one that is started again goes
//! ```
//!
//! Invariants: a container is started again at most once in an interval, however fast it ends, and one that no client has
//! started yet only after an interval. One that cannot be started is tried again, and keeps no other from it. Paused
//! containers are left alone.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use futures::future::join_all;
use proto::containerd::services::containers::v1::Container;
use proto::containerd::services::tasks::v1::CreateTaskRequest;
use proto::containerd::types::Mount;
use proto::containerd::v1::types::{Process, Status};
use serde::Deserialize;

use crate::containers::Containers;
use crate::context::{Namespace, RequestContext};
use crate::error::{Error, Result};
use crate::events::Exchange;
use crate::labels::Labels;
use crate::metadata::{Metadata, Read as _};
use crate::snapshots::Snapshots;
use crate::tasks::Tasks;

const STATUS: &str = "containerd.io/restart.status";
const POLICY: &str = "containerd.io/restart.policy";
const EXPLICITLY_STOPPED: &str = "containerd.io/restart.explicitly-stopped";
const COUNT: &str = "containerd.io/restart.count";
const LOG_URI: &str = "containerd.io/restart.loguri";
/// The label of containerd 1.6, a path in the place of a URI.
const LOG_PATH: &str = "containerd.io/restart.logpath";

/// Between two looks at all containers, and between two starts of one of them.
const INTERVAL: Duration = Duration::from_secs(10);

/// The monitor.
pub struct Restart {
    metadata: Metadata,
    events: Exchange,
    containers: Containers,
    snapshots: Snapshots,
    tasks: Tasks,
    /// When a container was last started from here.
    started: HashMap<Key, Instant>,
    /// Since when a container that is to run has no task, or one that was not started: a client may be about to.
    waiting: HashMap<Key, Instant>,
}

type Key = (Namespace, String);

/// Whether labels ask for something. The kubelet's containers are started by the kubelet alone, whatever is written on them.
fn is_watched(labels: &Labels) -> bool {
    labels.contains_key(STATUS) && !labels.contains_key(crate::cri::pods::KIND)
}

/// What there is to do for a container.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Change {
    Start,
    Stop,
}

impl Restart {
    /// A monitor over these.
    pub fn new(
        metadata: Metadata,
        events: Exchange,
        containers: Containers,
        snapshots: Snapshots,
        tasks: Tasks,
    ) -> Self {
        Restart {
            metadata,
            events,
            containers,
            snapshots,
            tasks,
            started: HashMap::new(),
            waiting: HashMap::new(),
        }
    }

    /// Looks after containers for as long as it is polled: at each exit, and once in an interval.
    pub async fn run(mut self) {
        let mut interval = tokio::time::interval(INTERVAL);
        interval.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut exits = None;
        loop {
            if exits.is_none() {
                exits = self.events.watch(&[r#"topic=="/tasks/exit""#.to_owned()]).ok();
            }
            let cut_off = match &mut exits {
                Some(exits) => tokio::select! {
                    _ = interval.tick() => false,
                    event = exits.next() => !matches!(event, Some(Ok(_))),
                },
                None => {
                    interval.tick().await;
                    false
                }
            };
            if cut_off {
                exits = None;
            }
            self.look().await;
        }
    }

    /// Brings every container of every namespace to where it is wanted.
    async fn look(&mut self) {
        let view = self.metadata.view();
        let mut wanted = Vec::new();
        for (parts, container) in view.list::<Container>(&[]) {
            if is_watched(&container.labels)
                && let Some(Ok(namespace)) = parts.first().map(|name| Namespace::new(name))
            {
                wanted.push((namespace, container));
            }
        }
        let now = Instant::now();
        self.started.retain(|_, at| *at + INTERVAL > now);
        let before = std::mem::take(&mut self.waiting);
        let mut changes = Vec::new();
        for (namespace, container) in wanted {
            let context = RequestContext::internal(namespace.clone());
            let process = match self.tasks.get(&context, &container.id, "").await {
                Ok(process) => Some(process),
                Err(Error::NotFound(_)) => None,
                // Nothing is known of it now.
                Err(_) => continue,
            };
            let Some(change) = change(&container.labels, process.as_ref()) else { continue };
            let key = (namespace.clone(), container.id.clone());
            if change == Change::Start {
                let ended = process.as_ref().is_some_and(|process| process.status() == Status::Stopped);
                if !ended {
                    let since = *before.get(&key).unwrap_or(&now);
                    if since + INTERVAL > now {
                        self.waiting.insert(key, since);
                        continue;
                    }
                }
                if self.started.contains_key(&key) {
                    continue;
                }
                self.started.insert(key, now);
            }
            changes.push((context, container, process, change));
        }
        let this = &*self;
        let applied = changes.into_iter().map(|(context, container, process, change)| async move {
            let id = container.id.clone();
            if let Err(error) = this.apply(&context, container, process, change).await {
                tracing::warn!(%error, id, ?change, "a container is not as its restart labels want it");
            }
        });
        join_all(applied).await;
    }

    async fn apply(
        &self,
        context: &RequestContext,
        container: Container,
        process: Option<Process>,
        change: Change,
    ) -> Result<()> {
        let id = container.id.as_str();
        if change == Change::Stop {
            return self.end(context, id, process).await;
        }
        let count = count(&container.labels).unwrap_or_default() + 1;
        let mut counted = container.clone();
        counted.labels.insert(COUNT.to_owned(), count.to_string());
        self.containers.update(context, counted, vec![format!("labels.{COUNT}")]).await?;
        self.end(context, id, process).await?;
        let rootfs = if container.snapshot_key.is_empty() {
            Vec::new()
        } else {
            self.snapshots.mounts(context, &container.snapshotter, &container.snapshot_key).await?
        };
        let mount = |mount: sys::mount::Mount| Mount {
            r#type: mount.kind,
            source: mount.source,
            target: mount.target,
            options: mount.options,
        };
        let log = log_uri(&container.labels);
        let terminal = !log.is_empty() && has_terminal(&container);
        let request = CreateTaskRequest {
            container_id: id.to_owned(),
            rootfs: rootfs.into_iter().map(mount).collect(),
            stderr: if terminal { String::new() } else { log.clone() },
            stdout: log,
            terminal,
            ..Default::default()
        };
        self.tasks.create(context, request).await?;
        tracing::info!(id, count, "starting a container again, as its labels ask for");
        self.tasks.start(context, id, "").await?;
        Ok(())
    }

    /// Ends the task that a container still has.
    async fn end(&self, context: &RequestContext, id: &str, process: Option<Process>) -> Result<()> {
        let Some(process) = process else { return Ok(()) };
        if process.status() != Status::Stopped {
            match self.tasks.kill(context, id, "", 9, true).await {
                Ok(()) | Err(Error::NotFound(_)) => {}
                Err(error) => return Err(error),
            }
            // A task that was never started has nothing to wait for.
            if process.status() != Status::Created {
                self.tasks.wait(context, id, "").await?;
            }
        }
        match self.tasks.delete(context, id).await {
            Ok(_) | Err(Error::NotFound(_)) => Ok(()),
            Err(error) => Err(error),
        }
    }
}

/// What a container's labels ask for, given its task.
fn change(labels: &Labels, process: Option<&Process>) -> Option<Change> {
    let status = process.map(Process::status);
    match labels.get(STATUS).map(String::as_str) {
        Some("running") => match status {
            Some(Status::Running | Status::Paused | Status::Pausing | Status::Unknown) => None,
            _ => may_start(labels, process.map_or(0, |process| process.exit_status)).then_some(Change::Start),
        },
        Some("stopped") => match status {
            None | Some(Status::Stopped) => None,
            Some(_) => Some(Change::Stop),
        },
        _ => None,
    }
}

/// Whether the policy lets a container start again that ended with this status.
fn may_start(labels: &Labels, exit_status: u32) -> bool {
    let policy = labels.get(POLICY).map_or("", String::as_str);
    let (policy, most) = match policy.split_once(':') {
        Some((policy, most)) => (policy, most.parse().ok()),
        None => (policy, Some(0)),
    };
    match policy {
        "" | "always" => true,
        "unless-stopped" => labels.get(EXPLICITLY_STOPPED).is_none_or(|stopped| stopped != "true"),
        "on-failure" => match (most, count(labels)) {
            (Some(most), Some(count)) => exit_status != 0 && (most == 0 || count < most),
            _ => false,
        },
        _ => false,
    }
}

/// How often it was started again; None when the label says something else.
fn count(labels: &Labels) -> Option<u32> {
    labels.get(COUNT).map_or(Some(0), |count| count.parse().ok())
}

fn log_uri(labels: &Labels) -> String {
    match (labels.get(LOG_URI), labels.get(LOG_PATH)) {
        (Some(uri), _) => uri.clone(),
        (None, Some(path)) if path.starts_with('/') => format!("file://{path}"),
        _ => String::new(),
    }
}

fn has_terminal(container: &Container) -> bool {
    #[derive(Deserialize)]
    struct Spec {
        process: Option<SpecProcess>,
    }
    #[derive(Deserialize)]
    struct SpecProcess {
        #[serde(default)]
        terminal: bool,
    }
    let spec = container.spec.as_ref().and_then(|any| serde_json::from_slice::<Spec>(&any.value).ok());
    spec.and_then(|spec| spec.process).is_some_and(|process| process.terminal)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn labels(pairs: &[(&str, &str)]) -> Labels {
        pairs
            .iter()
            .map(|(key, value)| (format!("containerd.io/restart.{key}"), (*value).to_owned()))
            .collect()
    }

    fn process(status: Status, exit_status: u32) -> Process {
        Process { status: status.into(), exit_status, ..Process::default() }
    }

    #[test]
    fn what_labels_ask_for() {
        let running = [("status", "running")];
        let with = |policy: &str, more: &[(&str, &str)]| {
            labels(&[&running[..], &[("policy", policy)], more].concat())
        };
        let (up, ok, failed) =
            (process(Status::Running, 0), process(Status::Stopped, 0), process(Status::Stopped, 1));
        for (labels, process, expected) in [
            (labels(&[]), Some(&ok), None),
            (labels(&[("status", "nonsense")]), Some(&ok), None),
            (labels(&running), Some(&up), None),
            (labels(&running), Some(&process(Status::Paused, 0)), None),
            (labels(&running), Some(&process(Status::Created, 0)), Some(Change::Start)),
            (labels(&running), Some(&ok), Some(Change::Start)),
            (labels(&running), None, Some(Change::Start)),
            (with("always", &[]), Some(&ok), Some(Change::Start)),
            (with("no", &[]), Some(&failed), None),
            (with("sometimes", &[]), Some(&failed), None),
            (with("on-failure", &[]), Some(&ok), None),
            (with("on-failure", &[]), Some(&failed), Some(Change::Start)),
            (with("on-failure:2", &[("count", "1")]), Some(&failed), Some(Change::Start)),
            (with("on-failure:2", &[("count", "2")]), Some(&failed), None),
            (with("on-failure:x", &[]), Some(&failed), None),
            (with("on-failure", &[("count", "many")]), Some(&failed), None),
            (with("unless-stopped", &[]), Some(&ok), Some(Change::Start)),
            (with("unless-stopped", &[("explicitly-stopped", "true")]), Some(&ok), None),
            (with("unless-stopped", &[("explicitly-stopped", "false")]), Some(&ok), Some(Change::Start)),
            (labels(&[("status", "stopped")]), Some(&up), Some(Change::Stop)),
            (labels(&[("status", "stopped")]), Some(&ok), None),
            (labels(&[("status", "stopped")]), None, None),
        ] {
            assert_eq!(change(&labels, process), expected, "{labels:?} {process:?}");
        }
    }

    #[test]
    fn where_the_output_goes() {
        assert_eq!(log_uri(&labels(&[("loguri", "binary:///x?a=b")])), "binary:///x?a=b");
        assert_eq!(log_uri(&labels(&[("logpath", "/var/log/x")])), "file:///var/log/x");
        assert_eq!(log_uri(&labels(&[])), "");
    }
    #[test]
    fn the_kubelets_containers_are_left_alone() {
        let mut asks = labels(&[("status", "running"), ("loguri", "binary:///bin/sh")]);
        assert!(is_watched(&asks) && !is_watched(&labels(&[("policy", "always")])));
        asks.insert(crate::cri::pods::KIND.to_owned(), "container".to_owned());
        assert!(!is_watched(&asks));
    }
}
