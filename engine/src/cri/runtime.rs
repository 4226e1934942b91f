//! Pods and their containers, as the kubelet has them: what its verbs share.
//!
//! ```text
//!            run            stop, or its end          network and namespaces gone        remove
//!  Making ---------> Ready -----------------> Stopped ---------------------------> Released -----> Removing -> (no pod)
//!
//!            create             start            exit           remove
//!  Making ---------> Created ---------> Running ------> Exited ---------> Removing -> (no container)
//! ```
//!
//! `pods` and `containers` do the verbs, `events` has the ends that nobody asked for and tells of all, `recovery` brings it in
//! order after a start, `places` knows the files.
//!
//! Invariants: a record is there before anything else of its object, and goes last. A stage only goes forward. An attempt that
//! failed has no name: it is taken down, again and again until it holds, and nobody sees it. What changes a container's stage has
//! its turn ([`Turns`]); a verb that waits for its end has none. Verbs outlive their callers, and are joined by those who try
//! again.

use std::collections::{BTreeMap, HashMap, HashSet};
use std::future::Future;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use parking_lot::Mutex;
use proto::runtime::v1::{ContainerEventResponse, PodSandboxConfig};
use tokio::sync::{OnceCell, broadcast};

use super::cni::{self, Cni};
use super::handlers::Known;
use super::images::Images;
use super::joined::{Joined, Turns};
use super::places::Places;
use super::settings::{Handler, Settings};
use super::spec;
use super::store::Store;
use crate::containers::Containers;
use crate::context::RequestContext;
use crate::error::{Error, Result};
use crate::events::Exchange;
use crate::metadata::Metadata;
use crate::random::random;
use crate::sandboxes::Sandboxes;
use crate::snapshots::Snapshots;
use crate::tasks::Tasks;

/// How many events a client may be behind before it is cut off.
const BEHIND: usize = 4096;
/// Between two tries to let go of something, at first and at most.
const RETRY_FIRST: Duration = Duration::from_secs(1);
const RETRY_LAST: Duration = Duration::from_secs(60);

/// What pods and containers are made of.
#[derive(Clone)]
pub struct Parts {
    /// Records of containers that other clients see.
    pub containers: Containers,
    /// What happens.
    pub events: Exchange,
    /// The kubelet's images.
    pub images: Images,
    /// Where records are.
    pub metadata: Metadata,
    /// Records of sandboxes that other clients see.
    pub sandboxes: Sandboxes,
    /// Containers' root file systems.
    pub snapshots: Snapshots,
    /// What runs.
    pub tasks: Tasks,
}

/// Pods and containers; cheap to clone.
#[derive(Clone)]
pub struct Runtime {
    inner: Arc<Inner>,
}

/// What all clones share.
pub struct Inner {
    pub(super) settings: Settings,
    pub(super) parts: Parts,
    pub(super) store: Store,
    pub(super) places: Places,
    /// The networks of handlers, and under the empty name those of the others.
    pub(super) networks: BTreeMap<String, Cni>,
    pub(super) told: broadcast::Sender<Arc<ContainerEventResponse>>,
    /// By name.
    pub(super) runs: Joined<String, String>,
    /// By name.
    pub(super) creates: Joined<String, String>,
    /// By id.
    pub(super) starts: Joined<String, ()>,
    pub(super) pod_stops: Joined<String, ()>,
    pub(super) pod_removes: Joined<String, ()>,
    pub(super) removes: Joined<String, ()>,
    pub(super) turns: Turns,
    /// Containers that have been asked to end: none is asked twice.
    pub(super) signalled: Mutex<HashSet<String>>,
    /// Containers in which the kernel has killed something for want of memory.
    pub(super) out_of_memory: Mutex<HashSet<String>>,
    /// What goes on, by id: what is being done, and since when.
    pub(super) steps: Mutex<HashMap<String, (&'static str, Instant)>>,
    /// Pods that are being let go of in the background.
    pub(super) retrying: Mutex<HashSet<String>>,
    /// passwd and group of images, by the name of their top layer.
    pub(super) accounts: Mutex<HashMap<String, Arc<(String, String)>>>,
    /// The machine.
    pub(super) host: spec::Host,
    /// What is known of handlers, once their runtimes have been asked.
    pub(super) known: BTreeMap<String, OnceCell<Arc<Known>>>,
}

impl std::ops::Deref for Runtime {
    type Target = Inner;

    fn deref(&self) -> &Inner {
        &self.inner
    }
}

/// Notes what is being done for as long as it lives.
pub(super) struct Step<'a> {
    inner: &'a Inner,
    id: String,
}

impl Drop for Step<'_> {
    fn drop(&mut self) {
        self.inner.steps.lock().remove(&self.id);
    }
}

impl Inner {
    /// Notes what is being done to an object.
    pub(super) fn step(&self, id: &str, what: &'static str) -> Step<'_> {
        self.steps.lock().insert(id.to_owned(), (what, Instant::now()));
        Step { inner: self, id: id.to_owned() }
    }
}

impl Runtime {
    /// Pods and containers with these settings, beneath these folders, as they are recorded; the identity is this engine's, as
    /// others may be on the machine. Blocks.
    ///
    /// # Errors
    /// Folders that cannot be made, settings that no network can be had with.
    pub fn open(settings: Settings, root: &Path, state: &Path, identity: &str, parts: Parts) -> Result<Self> {
        let places = Places::new(root, state);
        places.make()?;
        let owner = format!("gantry {identity}");
        let mut networks = BTreeMap::new();
        let open = |settings: cni::Settings| {
            Cni::open(settings).map_err(|error| Error::invalid_argument(error.to_string()))
        };
        if let Some((_, handler)) = settings.handler("") {
            networks.insert(
                String::new(),
                open(settings.cni(&Handler { cni_conf_dir: None, ..handler.clone() }, &owner))?,
            );
        }
        for (name, handler) in &settings.handlers {
            if handler.cni_conf_dir.is_some() {
                networks.insert(name.clone(), open(settings.cni(handler, &owner))?);
            }
        }
        let known = settings.handlers.keys().map(|name| (name.clone(), OnceCell::new())).collect();
        let store = Store::open(parts.metadata.clone());
        let inner = Inner {
            settings,
            parts,
            store,
            places,
            networks,
            told: broadcast::Sender::new(BEHIND),
            runs: Joined::default(),
            creates: Joined::default(),
            starts: Joined::default(),
            pod_stops: Joined::default(),
            pod_removes: Joined::default(),
            removes: Joined::default(),
            turns: Turns::default(),
            signalled: Mutex::default(),
            out_of_memory: Mutex::default(),
            steps: Mutex::default(),
            retrying: Mutex::default(),
            accounts: Mutex::default(),
            host: spec::Host::read(),
            known,
        };
        Ok(Runtime { inner: Arc::new(inner) })
    }

    /// What is recorded.
    pub fn store(&self) -> &Store {
        &self.inner.store
    }

    /// The settings.
    pub fn settings(&self) -> &Settings {
        &self.inner.settings
    }

    /// The networks of a handler's pods.
    pub(super) fn network(&self, handler: &str) -> Result<&Cni> {
        let name = self.settings.handler(handler).map_or("", |(name, _)| name);
        self.networks
            .get(name)
            .or_else(|| self.networks.get(""))
            .ok_or_else(|| Error::failed_precondition("no network is configured"))
    }

    /// Does something again until it holds, unless that is being done already; between the tries it waits longer and longer.
    pub(super) fn until_it_holds<F>(
        &self,
        id: &str,
        what: &'static str,
        attempt: impl Fn(Runtime) -> F + Send + 'static,
    ) where
        F: Future<Output = Result<()>> + Send + 'static,
    {
        if !self.retrying.lock().insert(id.to_owned()) {
            return;
        }
        let (this, id) = (self.clone(), id.to_owned());
        tokio::spawn(async move {
            let mut pause = RETRY_FIRST;
            loop {
                tokio::time::sleep(pause).await;
                match attempt(this.clone()).await {
                    Ok(()) => break,
                    Err(error) => tracing::warn!(id, %error, "{what}; trying again"),
                }
                pause = (pause * 2).min(RETRY_LAST);
            }
            this.retrying.lock().remove(&id);
        });
    }

    /// What is under way: id, what is being done, and for how many seconds.
    pub fn under_way(&self) -> Vec<(String, &'static str, u64)> {
        let steps = self.steps.lock();
        let mut all: Vec<_> =
            steps.iter().map(|(id, (what, since))| (id.clone(), *what, since.elapsed().as_secs())).collect();
        drop(steps);
        all.sort();
        all
    }
}

/// The context of what is done for the kubelet.
pub(super) fn context() -> Result<RequestContext> {
    super::context()
}

/// Whether a pod is in the host's network.
pub(super) fn in_host_network(config: &PodSandboxConfig) -> bool {
    use proto::runtime::v1::NamespaceMode;
    namespace_options(config).is_some_and(|options| options.network() == NamespaceMode::Node)
}

/// The namespaces that a pod asks for.
pub(super) fn namespace_options(config: &PodSandboxConfig) -> Option<&proto::runtime::v1::NamespaceOption> {
    config.linux.as_ref()?.security_context.as_ref()?.namespace_options.as_ref()
}

/// Now, in nanoseconds since 1970.
pub(super) fn now() -> i64 {
    nanoseconds(SystemTime::now())
}

/// A time in nanoseconds since 1970.
pub(super) fn nanoseconds(time: SystemTime) -> i64 {
    let since = time.duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    i64::try_from(since.as_nanos()).unwrap_or(i64::MAX)
}

/// A new id: 64 hex digits that nobody else has.
pub(super) fn new_id() -> Result<String> {
    Ok(hex::encode(random::<32>()?))
}

/// Ok for what is gone already.
pub(super) fn gone_is_fine<T>(done: Result<T>) -> Result<()> {
    match done {
        Ok(_) | Err(Error::NotFound(_)) => Ok(()),
        Err(error) => Err(error),
    }
}
