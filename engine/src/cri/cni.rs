//! The network of pods: CNI plugins, as programs that are run by the specification (0.1.0 to 1.1.0), with libcni's files.
//!
//! The order of a pod's networking, which its caller keeps:
//! 1. It makes the network namespace and binds it to a file ([`Pod::netns`]).
//! 2. [`Cni::setup`] reads the configuration, brings up the loopback interface, and for each network writes a record, runs
//!    ADD of its plugins one after the other, each told the result of the one before, and writes the record again with the
//!    result, durably. Only then is there an [`Attachment`]. When anything fails, DEL is run for all that was begun.
//! 3. While it lives, [`Cni::check`] asks the plugins whether all is as it was.
//! 4. [`Cni::teardown`] runs DEL of the plugins in the reverse order, with the configuration, the arguments and the result
//!    of the record, and removes the record when all have agreed. What did not is a [`Retry`]: the caller asks again until
//!    it holds. Only then the namespace and the pod's id are let go.
//! 5. After a start of the engine, [`Cni::gc`] is told which pods there are, and clears away what is left of others.
//!
//! Invariants: whatever is attached or half attached has a record. One pod has one operation at a time; a GC has no other
//! beside it. A plugin that hangs is killed with its process group. Setup and teardown go on when their caller is gone: a
//! setup that is dropped is undone, a teardown comes to its end.
//!
//! `conf`, `version`, `request`, `result` and `pod` are pure but for the reading of the folder; `exec`, `cache` and
//! `loopback` do what is done.

mod cache;
mod conf;
mod exec;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod loopback;
mod pod;
mod request;
mod result;
#[cfg(test)]
mod tests;
mod version;

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::net::IpAddr;
use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Weak};
use std::time::Duration;

use parking_lot::Mutex;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};
use tokio::sync::{OwnedMutexGuard, OwnedRwLockReadGuard, RwLock, oneshot};
use tracing::{debug, info, warn};

use cache::{Cache, Found, Record};
use conf::Network;
pub use exec::Failure;
use exec::{Runner, Target, Verb};
pub use pod::{Bandwidth, Pod, PodDns, PortMapping};
use request::Addition;
pub use result::{Cidr, Dns, Interface, Ip, Outcome, Route};
use version::Version;

/// STATUS is asked whenever kubelet asks for ours: it may not hang for as long as another.
const STATUS_LIMIT: Duration = Duration::from_secs(10);

/// Where things are, and how they are done.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// The folder of the networks' configurations.
    pub conf_dir: PathBuf,
    /// The folders of the plugins' programs; the first that has one counts.
    pub bin_dirs: Vec<PathBuf>,
    /// How many of the networks a pod is attached to; 0 is all of them. The first one gives it its address.
    pub max_conf_num: usize,
    /// The folder of what is attached: the records are in `results` in it.
    pub cache_dir: PathBuf,
    /// What this engine's records are known by: engines that share the folder leave those of others alone.
    pub owner: String,
    /// What the interfaces' names begin with; a number follows.
    pub interface_prefix: String,
    /// How long one run of a plugin may take.
    pub limit: Duration,
    /// Which of several addresses is the pod's.
    pub ip_preference: IpPreference,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            conf_dir: "/etc/cni/net.d".into(),
            bin_dirs: vec!["/opt/cni/bin".into()],
            max_conf_num: 1,
            cache_dir: "/var/lib/cni".into(),
            owner: "gantry".into(),
            interface_prefix: "eth".into(),
            limit: Duration::from_secs(60),
            ip_preference: IpPreference::default(),
        }
    }
}

/// Which of several addresses is the pod's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum IpPreference {
    /// The first of IPv4.
    #[default]
    Ipv4,
    /// The first of IPv6.
    Ipv6,
    /// The first.
    Cni,
}

/// What a pod is given by setup.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attachment {
    /// The pod's address.
    pub ip: IpAddr,
    /// The others of its first interface.
    pub additional_ips: Vec<IpAddr>,
    /// What each network gave it, in their order.
    pub networks: Vec<Attached>,
}

/// What one network gave a pod.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Attached {
    /// The network.
    pub network: String,
    /// The interface in the pod.
    pub interface: String,
    /// What its plugins say.
    pub outcome: Outcome,
}

/// Whether pods can be given a network.
#[derive(Debug, Clone, Default)]
pub struct Status {
    /// Whether they can.
    pub ready: bool,
    /// If not, the reason of the condition NetworkReady.
    pub reason: String,
    /// If not, its message.
    pub message: String,
    /// The networks that pods are attached to, and the files they are configured in.
    pub networks: Vec<(String, PathBuf)>,
    /// The files that were passed over, and why.
    pub skipped: Vec<(PathBuf, String)>,
}

/// Why something about a network did not work.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// There is no network. The text is what kubelet knows.
    #[error("cni plugin not initialized")]
    NotInitialized,
    /// What was given cannot be used.
    #[error("{0}")]
    Invalid(String),
    /// A plugin did not do what it was asked.
    #[error("plugin {plugin} of network {network} failed ({verb}): {failure}")]
    Plugin {
        /// What it was asked.
        verb: &'static str,
        /// Its type.
        plugin: String,
        /// The network.
        network: String,
        /// Why.
        failure: Failure,
    },
    /// Something else on the way.
    #[error("{0}")]
    Failed(String),
    /// Nobody waits for it any more.
    #[error("the setup was given up by who asked for it")]
    Abandoned,
    /// Nothing is known of the pod.
    #[error("no attachment of pod {0} is recorded")]
    NotAttached(String),
}

/// A setup that failed.
#[derive(Debug, thiserror::Error)]
#[error("{cause}{}", left.as_ref().map(|left| format!("; and it could not be undone: {left}")).unwrap_or_default())]
pub struct SetupError {
    /// Why.
    pub cause: Error,
    /// What could not be undone: to be given to teardown again. None: nothing is left.
    pub left: Option<Retry>,
}

/// What teardown did not bring to its end. The records are still there: asking again until it holds ends it.
#[derive(Debug, thiserror::Error)]
pub struct Retry {
    /// The pod's id.
    pub pod: String,
    /// One for each attachment that is left.
    pub reasons: Vec<Reason>,
}

/// Why one attachment is left.
#[derive(Debug)]
pub struct Reason {
    /// The network.
    pub network: String,
    /// The interface.
    pub interface: String,
    /// Why.
    pub error: Error,
}

impl fmt::Display for Retry {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "the network of pod {} is not torn down yet", self.pod)?;
        for Reason { network, interface, error } in &self.reasons {
            write!(f, "; {network} on {interface}: {error}")?;
        }
        Ok(())
    }
}

/// An interface's name as the kernel takes it.
fn is_interface(name: &str) -> bool {
    (1..=15).contains(&name.len())
        && name != "."
        && name != ".."
        && !name.chars().any(|c| c == '/' || c == ':' || c.is_whitespace() || c.is_control())
}

/// The networks of one folder. Copies are the same one.
#[derive(Debug, Clone)]
pub struct Cni {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    settings: Settings,
    runner: Runner,
    cache: Cache,
    turns: Turns,
    /// What each program said it speaks, while it is the same file.
    spoken: Mutex<HashMap<PathBuf, (Stamp, Vec<Version>)>>,
}

/// A file as it was: inode, size, and when it was changed.
type Stamp = (u64, u64, i64, i64);

/// Who is next: one operation of a pod at a time, and a GC alone. These hold no data, only order.
#[derive(Debug, Default)]
struct Turns {
    all: Arc<RwLock<()>>,
    pods: Mutex<HashMap<String, Weak<tokio::sync::Mutex<()>>>>,
}

/// Held while an operation of a pod goes on.
type Turn = (OwnedRwLockReadGuard<()>, OwnedMutexGuard<()>);

impl Turns {
    async fn of(&self, pod: &str) -> Turn {
        let beside_others = Arc::clone(&self.all).read_owned().await;
        let own = {
            let mut pods = self.pods.lock();
            pods.retain(|_, turn| turn.strong_count() > 0);
            pods.get(pod).and_then(Weak::upgrade).unwrap_or_else(|| {
                let turn = Arc::default();
                pods.insert(pod.to_owned(), Arc::downgrade(&turn));
                turn
            })
        };
        (beside_others, own.lock_owned().await)
    }
}

/// A network that a pod is being attached to.
struct Underway {
    network: Network,
    version: Version,
    record: Record,
    /// How many of its plugins have been run, the last perhaps in vain.
    begun: usize,
    /// What the last of them said.
    outcome: Option<Outcome>,
}

impl Cni {
    /// The networks by these settings. Nothing need be there yet: the folders are read when they are needed.
    ///
    /// # Errors
    /// Settings that no plugin could be run with.
    pub fn open(settings: Settings) -> Result<Self, Error> {
        if !is_interface(&format!("{}{}", settings.interface_prefix, settings.max_conf_num)) {
            let prefix = &settings.interface_prefix;
            return Err(Error::Invalid(format!(
                "{prefix:?} with a number is no interface's name: give one like eth"
            )));
        }
        if let Err(error) = std::env::join_paths(&settings.bin_dirs) {
            return Err(Error::Invalid(format!(
                "the folders of CNI plugins cannot be told to plugins: {error}"
            )));
        }
        let runner = Runner {
            folders: settings.bin_dirs.clone(),
            inputs: settings.cache_dir.join("gantry"),
            limit: settings.limit,
        };
        let cache = Cache::new(&settings.cache_dir);
        let (turns, spoken) = Default::default();
        Ok(Cni { inner: Arc::new(Inner { settings, runner, cache, turns, spoken }) })
    }

    /// Whether pods can be given a network now: there is one, and its plugins say so (from version 1.1 on).
    pub async fn status(&self) -> Status {
        let inner = &self.inner;
        let folder = inner.folder().await;
        let mut status = Status {
            networks: folder
                .networks
                .iter()
                .map(|(file, network)| (network.name.clone(), file.clone()))
                .collect(),
            skipped: folder.skipped,
            ..Status::default()
        };
        let refused = match folder.networks.is_empty() {
            true => Some(Error::NotInitialized.to_string()),
            false => inner.refused(&folder.networks).await,
        };
        match refused {
            None => status.ready = true,
            Some(why) => {
                status.reason = "NetworkPluginNotReady".into();
                status.message = format!("Network plugin returns error: {why}");
            }
        }
        status
    }

    /// Gives a pod its networks. One that has some already, or some half, loses those first.
    ///
    /// When this is dropped before it is done, the plugin that is under way is killed and all is undone in the background.
    ///
    /// # Errors
    /// Why it has no network, and what of it could not be undone.
    pub async fn setup(&self, pod: Pod) -> Result<Attachment, SetupError> {
        let (_waiting, gone) = oneshot::channel();
        let inner = Arc::clone(&self.inner);
        match tokio::spawn(async move { inner.set_up(&pod, gone).await }).await {
            Ok(outcome) => outcome,
            Err(error) => {
                Err(SetupError { cause: Error::Failed(format!("the setup ended: {error}")), left: None })
            }
        }
    }

    /// Takes its networks from a pod: all that is recorded of it. A pod that has none has lost them.
    ///
    /// # Errors
    /// What is left, to be asked for again until it holds.
    pub async fn teardown(&self, pod: Pod) -> Result<(), Retry> {
        let inner = Arc::clone(&self.inner);
        let id = pod.id.clone();
        let done = tokio::spawn(async move {
            let _turn = inner.turns.of(&pod.id).await;
            inner.tear_down(&pod).await
        });
        done.await
            .unwrap_or_else(|error| Err(retry(&id, Error::Failed(format!("the teardown ended: {error}")))))
    }

    /// Asks the plugins whether a pod's networks are as they were made. False: some could not be asked, as the network is of a
    /// version before 0.4.0, or its configuration says not to.
    ///
    /// # Errors
    /// What a plugin finds wrong, or that nothing is known of the pod.
    pub async fn check(&self, pod: &Pod) -> Result<bool, Error> {
        let _turn = self.inner.turns.of(&pod.id).await;
        self.inner.check(&pod.id).await
    }

    /// Clears away what this engine has attached to pods that are not among these; whoever else attached something keeps it.
    /// Waits for what goes on, and nothing else begins meanwhile: only then it is asked which pods there are.
    ///
    /// # Errors
    /// What is left, one for each pod, and one without a pod for networks whose plugins failed.
    pub async fn gc(
        &self,
        valid: impl FnOnce() -> BTreeSet<String> + Send + 'static,
    ) -> Result<(), Vec<Retry>> {
        let inner = Arc::clone(&self.inner);
        let done = tokio::spawn(async move {
            let _alone = Arc::clone(&inner.turns.all).write_owned().await;
            let left = inner.collect(&valid()).await;
            if left.is_empty() { Ok(()) } else { Err(left) }
        });
        done.await
            .unwrap_or_else(|error| Err(vec![retry("", Error::Failed(format!("the GC ended: {error}")))]))
    }
}

fn retry(pod: &str, error: Error) -> Retry {
    let reason = Reason { network: String::new(), interface: String::new(), error };
    Retry { pod: pod.to_owned(), reasons: vec![reason] }
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T, Error> {
    tokio::task::spawn_blocking(work)
        .await
        .map_err(|error| Error::Failed(format!("blocking work ended: {error}")))
}

impl Inner {
    async fn folder(&self) -> conf::Folder {
        let (folder, most) = (self.settings.conf_dir.clone(), self.settings.max_conf_num);
        blocking(move || conf::read(&folder, most)).await.unwrap_or_default()
    }

    async fn records(&self, pod: &str) -> Result<Vec<Found>, Error> {
        let (cache, pod) = (self.cache.clone(), pod.to_owned());
        let found = blocking(move || cache.of(&pod)).await?;
        found.map_err(|error| self.of_cache("read what is attached", &error))
    }

    fn of_cache(&self, what: &str, error: &std::io::Error) -> Error {
        let folder = self.settings.cache_dir.join("results");
        Error::Failed(format!("cannot {what} in {}: {error}", folder.display()))
    }

    /// Why the networks' plugins could not serve a pod; None when they could.
    async fn refused(&self, networks: &[(PathBuf, Network)]) -> Option<String> {
        for (_, network) in networks {
            let version = match self.version(network).await {
                Ok(version) => version,
                Err(error) => return Some(error.to_string()),
            };
            if !version.has_gc() {
                continue;
            }
            for plugin in &network.plugins {
                let stdin = request::build(&network.name, version, plugin, Addition::default());
                let limit = STATUS_LIMIT.min(self.settings.limit);
                let answer =
                    self.runner.run(&plugin.kind, Verb::Status, &Target::default(), &stdin, limit).await;
                if let Err(failure) = answer {
                    return Some(failure_of(Verb::Status, network, &plugin.kind, failure).to_string());
                }
            }
        }
        None
    }

    /// The version that a network is run with: where it offers several, the newest that its plugins speak.
    async fn version(&self, network: &Network) -> Result<Version, Error> {
        if let [only] = network.versions[..] {
            return Ok(only);
        }
        let mut spoken = Vec::new();
        for plugin in &network.plugins {
            let versions = self.spoken(&plugin.kind).await;
            spoken
                .push(versions.map_err(|failure| failure_of(Verb::Version, network, &plugin.kind, failure))?);
        }
        version::choose(&network.versions, &spoken).ok_or_else(|| {
            let offered: Vec<&str> = network.versions.iter().map(|version| version.as_str()).collect();
            let (name, offered) = (&network.name, offered.join(", "));
            Error::Invalid(format!(
                "network {name} offers CNI {offered}, and no version of these is spoken by all of its plugins: install newer \
                 plugins, or add an older version to cniVersions"
            ))
        })
    }

    async fn spoken(&self, kind: &str) -> Result<Vec<Version>, Failure> {
        let program = self.runner.find(kind)?;
        let stamp = std::fs::metadata(&program)
            .map(|file| (file.ino(), file.size(), file.mtime(), file.mtime_nsec()))
            .map_err(|error| Failure::NotRun(format!("{} cannot be read: {error}", program.display())))?;
        if let Some((known, versions)) = self.spoken.lock().get(&program)
            && *known == stamp
        {
            return Ok(versions.clone());
        }
        // Old plugins want these set, and look at nothing in them.
        let target = Target { netns: "dummy".into(), interface: "dummy".into(), ..Target::default() };
        let stdin = format!(r#"{{"cniVersion":"{}"}}"#, Version::CURRENT);
        let limit = STATUS_LIMIT.min(self.settings.limit);
        let versions = match self.runner.run(kind, Verb::Version, &target, stdin.as_bytes(), limit).await {
            Ok(stdout) => version::spoken(&stdout).map_err(Failure::Broken)?,
            // The first version had no VERSION.
            Err(Failure::Said { message, .. }) if message == "unknown CNI_COMMAND: VERSION" => {
                vec![Version::V0_1_0]
            }
            Err(failure) => return Err(failure),
        };
        self.spoken.lock().insert(program, (stamp, versions.clone()));
        Ok(versions)
    }

    async fn set_up(&self, pod: &Pod, mut gone: oneshot::Receiver<()>) -> Result<Attachment, SetupError> {
        let _turn = self.turns.of(&pod.id).await;
        if !matches!(gone.try_recv(), Err(oneshot::error::TryRecvError::Empty)) {
            return Err(SetupError { cause: Error::Abandoned, left: None });
        }
        // What a dead attempt has left is in the way of this one.
        if let Err(left) = self.forget(pod).await {
            let cause = Error::Failed("an earlier network of the pod is in the way".into());
            return Err(SetupError { cause, left: Some(left) });
        }
        let mut underway = Vec::new();
        let made = tokio::select! {
            biased;
            _ = &mut gone => Err(Error::Abandoned),
            made = self.attach_all(pod, &mut underway) => made,
        };
        let made = made.and_then(|made| match gone.try_recv() {
            Err(oneshot::error::TryRecvError::Closed) => Err(Error::Abandoned),
            _ => Ok(made),
        });
        let cause = match made {
            Ok(attachment) => return Ok(attachment),
            Err(cause) => cause,
        };
        info!(pod = pod.id, "undoing a network's setup: {cause}");
        let mut reasons = Vec::new();
        while let Some(mut attached) = underway.pop() {
            if let Err(error) = self.detach(&attached).await {
                // So that who asks again need not ask plugins that were never run.
                if attached.record.result.is_none() {
                    attached.record.begun = Some(attached.begun);
                    if let Err(error) = self.keep(attached.record.clone(), false).await {
                        warn!(pod = pod.id, "{error}");
                    }
                }
                let Record { network_name: network, if_name: interface, .. } = attached.record;
                reasons.push(Reason { network, interface, error });
            }
        }
        let left = (!reasons.is_empty()).then(|| Retry { pod: pod.id.clone(), reasons });
        match &left {
            Some(left) => warn!("{left}"),
            None => self.runner.forget(&pod.id),
        }
        Err(SetupError { cause, left })
    }

    /// Takes away what is recorded of a pod that is to be set up.
    async fn forget(&self, pod: &Pod) -> Result<(), Retry> {
        match self.records(&pod.id).await {
            Ok(records) if records.is_empty() => Ok(()),
            Ok(_) => self.tear_down(pod).await,
            Err(error) => Err(retry(&pod.id, error)),
        }
    }

    async fn attach_all(&self, pod: &Pod, underway: &mut Vec<Underway>) -> Result<Attachment, Error> {
        if !conf::is_identifier(&pod.id) {
            return Err(Error::Invalid(format!(
                "{:?} is no id that plugins take: letters, digits, and _ . -",
                pod.id
            )));
        }
        let Some(netns) = pod.netns.clone() else {
            return Err(Error::Invalid(format!("pod {} has no network namespace", pod.id)));
        };
        let arguments = pod.arguments().map_err(Error::Invalid)?;
        let folder = self.folder().await;
        if folder.networks.is_empty() {
            for (file, reason) in &folder.skipped {
                warn!("a network's configuration is passed over: {}: {reason}", file.display());
            }
            return Err(Error::NotInitialized);
        }
        let path = netns.clone();
        blocking(move || loopback::up(&path)).await?.map_err(|error| {
            Error::Failed(format!("cannot bring up the loopback interface in {}: {error}", netns.display()))
        })?;
        for (number, (_, network)) in folder.networks.into_iter().enumerate() {
            let interface = format!("{}{number}", self.settings.interface_prefix);
            let version = self.version(&network).await?;
            let record = Record::new(
                pod.id.clone(),
                network.name.clone(),
                interface,
                netns.to_string_lossy().into_owned(),
                &network.to_kept(version),
                arguments.clone(),
                pod.capabilities(),
            )
            .owned_by(&self.settings.owner);
            self.keep(record.clone(), false).await?;
            underway.push(Underway { network, version, record, begun: 0, outcome: None });
            if let Some(this) = underway.last_mut() {
                self.attach(this).await?;
            }
        }
        attachment(underway, self.settings.ip_preference)
    }

    async fn attach(&self, this: &mut Underway) -> Result<(), Error> {
        let target = target(&this.record);
        for (number, plugin) in this.network.plugins.iter().enumerate() {
            let addition = Addition {
                capabilities: Some(&this.record.capability_args),
                previous: this.outcome.as_ref().map(|outcome| result::to_value(outcome, this.version)),
                valid: None,
            };
            let stdin = request::build(&this.network.name, this.version, plugin, addition);
            this.begun = number + 1;
            let ran = self.runner.run(&plugin.kind, Verb::Add, &target, &stdin, self.runner.limit).await;
            let said = ran.and_then(|stdout| result::parse(&stdout, this.version).map_err(Failure::Broken));
            match said {
                Ok(outcome) => {
                    sys::failpoint!("cni.add.plugin");
                    this.outcome = Some(outcome);
                }
                Err(failure) => {
                    if matches!(failure, Failure::NotRun(_)) {
                        this.begun = number;
                    }
                    return Err(failure_of(Verb::Add, &this.network, &plugin.kind, failure));
                }
            }
        }
        let outcome = this.outcome.get_or_insert_default();
        this.record.result = result::to_value(outcome, this.version).as_object().cloned();
        self.keep(this.record.clone(), true).await?;
        sys::failpoint!("cni.add.recorded");
        Ok(())
    }

    async fn keep(&self, record: Record, durable: bool) -> Result<(), Error> {
        let cache = self.cache.clone();
        let kept = blocking(move || cache.put(&record, durable)).await?;
        kept.map_err(|error| self.of_cache("record an attachment", &error))
    }

    /// DEL of all plugins of a network, in the reverse order, and the end of its record. One that fails keeps those before it
    /// from being asked: an address that still has rules is not to be given to another pod. One that was never run cannot.
    async fn detach(&self, this: &Underway) -> Result<(), Error> {
        let target = target(&this.record);
        for (number, plugin) in this.network.plugins.iter().enumerate().rev() {
            let previous = this.outcome.as_ref().filter(|_| this.version.has_check());
            let addition = Addition {
                capabilities: Some(&this.record.capability_args),
                previous: previous.map(|outcome| result::to_value(outcome, this.version)),
                valid: None,
            };
            let stdin = request::build(&this.network.name, this.version, plugin, addition);
            let Err(failure) =
                self.runner.run(&plugin.kind, Verb::Del, &target, &stdin, self.runner.limit).await
            else {
                continue;
            };
            let harmless = number >= this.begun || failure.is_nothing_there(target.netns.is_empty());
            let error = failure_of(Verb::Del, &this.network, &plugin.kind, failure);
            if !harmless {
                return Err(error);
            }
            debug!(pod = target.container, "nothing of it is left: {error}");
        }
        sys::failpoint!("cni.del.plugins");
        let (cache, record) = (self.cache.clone(), this.record.clone());
        let removed =
            blocking(move || cache.remove(&record.network_name, &record.container_id, &record.if_name))
                .await?;
        removed.map_err(|error| self.of_cache("remove the record of an attachment", &error))?;
        sys::failpoint!("cni.del.recorded");
        Ok(())
    }

    async fn tear_down(&self, pod: &Pod) -> Result<(), Retry> {
        let records = self.records(&pod.id).await.map_err(|error| retry(&pod.id, error))?;
        if records.is_empty() {
            self.clear_unrecorded(pod).await;
            return Ok(());
        }
        let mut reasons = Vec::new();
        for found in records.into_iter().rev() {
            let (network, interface) = match &found {
                Found::Record(record) => (record.network_name.clone(), record.if_name.clone()),
                Found::Unreadable { network, interface, .. } => (network.clone(), interface.clone()),
            };
            let gone = match self.recalled(pod, found).await {
                Ok(attached) => self.detach(&attached).await,
                Err(error) => Err(error),
            };
            if let Err(error) = gone {
                reasons.push(Reason { network, interface, error });
            }
        }
        if reasons.is_empty() {
            self.runner.forget(&pod.id);
            return Ok(());
        }
        Err(Retry { pod: pod.id.clone(), reasons })
    }

    /// A namespace that is there while no record is, as somebody emptied the folder: what the configuration has now is the
    /// best that is known. It is asked once, and nothing depends on it.
    async fn clear_unrecorded(&self, pod: &Pod) {
        if pod.netns.as_ref().is_none_or(|netns| !is_namespace(netns)) || !conf::is_identifier(&pod.id) {
            return;
        }
        for (number, (_, network)) in self.folder().await.networks.into_iter().enumerate().rev() {
            let interface = format!("{}{number}", self.settings.interface_prefix);
            let gone = match self.supposed(pod, network, interface).await {
                Ok(attached) => self.detach(&attached).await,
                Err(error) => Err(error),
            };
            if let Err(error) = gone {
                warn!(pod = pod.id, "clearing a network that is not recorded: {error}");
            }
        }
        self.runner.forget(&pod.id);
    }

    /// An attachment as its record has it.
    async fn recalled(&self, pod: &Pod, found: Found) -> Result<Underway, Error> {
        let record = match found {
            Found::Record(record) => record,
            Found::Unreadable { network, interface, file, reason } => {
                warn!("a record of an attachment cannot be read: {}: {reason}", file.display());
                let folder = self.settings.conf_dir.clone();
                let mut networks = blocking(move || conf::read(&folder, 0)).await?.networks.into_iter();
                let known = networks.find(|(_, known)| known.name == network);
                let Some((_, known)) = known.filter(|_| is_interface(&interface)) else {
                    return Err(Error::Failed(format!(
                        "{} cannot be read ({reason}), and there is no network {network:?}: remove the file if nothing is \
                         left of it",
                        file.display()
                    )));
                };
                return self.supposed(pod, known, interface).await;
            }
        };
        let bad = |reason| {
            Error::Failed(format!("the record of {} on {}: {reason}", record.network_name, record.if_name))
        };
        let bytes = record.config().map_err(bad)?;
        let mut network = Network::parse_list(&bytes)
            .or_else(|reason| Network::parse_single(&bytes).map_err(|_| reason))
            .map_err(bad)?;
        network.name.clone_from(&record.network_name);
        let version = self.version(&network).await?;
        // One that cannot be read is as one that is not there: DEL does without.
        let outcome = record.result.clone().and_then(|map| result::from_value(map, version).ok());
        let begun = record.begun.filter(|_| record.result.is_none()).unwrap_or(network.plugins.len());
        Ok(Underway { network, version, record, begun, outcome })
    }

    /// An attachment as it would be made now.
    async fn supposed(&self, pod: &Pod, network: Network, interface: String) -> Result<Underway, Error> {
        let version = self.version(&network).await?;
        let netns = pod.netns.as_deref().unwrap_or(Path::new("")).to_string_lossy().into_owned();
        let arguments = pod.arguments().map_err(Error::Invalid)?;
        let (kept, name) = (network.to_kept(version), network.name.clone());
        let record =
            Record::new(pod.id.clone(), name, interface, netns, &kept, arguments, pod.capabilities());
        let begun = network.plugins.len();
        Ok(Underway { network, version, record, begun, outcome: None })
    }

    async fn check(&self, id: &str) -> Result<bool, Error> {
        let records = self.records(id).await?;
        if records.is_empty() {
            return Err(Error::NotAttached(id.to_owned()));
        }
        let pod = Pod { id: id.to_owned(), ..Pod::default() };
        let mut asked = true;
        for found in records {
            let this = self.recalled(&pod, found).await?;
            let Some(outcome) = &this.outcome else { return Err(Error::NotAttached(id.to_owned())) };
            if !this.version.has_check() || this.network.disable_check {
                asked = false;
                continue;
            }
            let target = target(&this.record);
            for plugin in &this.network.plugins {
                let addition = Addition {
                    capabilities: Some(&this.record.capability_args),
                    previous: Some(result::to_value(outcome, this.version)),
                    valid: None,
                };
                let stdin = request::build(&this.network.name, this.version, plugin, addition);
                let ran =
                    self.runner.run(&plugin.kind, Verb::Check, &target, &stdin, self.runner.limit).await;
                ran.map_err(|failure| failure_of(Verb::Check, &this.network, &plugin.kind, failure))?;
            }
        }
        Ok(asked)
    }

    async fn collect(&self, valid: &BTreeSet<String>) -> Vec<Retry> {
        let cache = self.cache.clone();
        let (records, unreadable) = match blocking(move || cache.all()).await {
            Ok(Ok(all)) => all,
            Ok(Err(error)) => return vec![retry("", self.of_cache("read what is attached", &error))],
            Err(error) => return vec![retry("", error)],
        };
        let stays =
            |record: &Record| record.owner != self.settings.owner || valid.contains(&record.container_id);
        let mut left = Vec::new();
        let stale: BTreeSet<&String> =
            records.iter().filter(|record| !stays(record)).map(|record| &record.container_id).collect();
        for id in stale {
            info!(pod = id, "clearing the network of a pod that is no more");
            let pod = Pod { id: id.clone(), ..Pod::default() };
            if let Err(retry) = self.tear_down(&pod).await {
                left.push(retry);
            }
        }
        let mut reasons = Vec::new();
        for (number, (_, network)) in self.folder().await.networks.into_iter().enumerate() {
            // What is left of a pod may not be taken for nothing: its DEL is still to be run.
            let kept = |record: &&Record| {
                record.network_name == network.name
                    && (stays(record) || left.iter().any(|retry| retry.pod == record.container_id))
            };
            let mut attached: BTreeSet<(String, String)> = records
                .iter()
                .filter(kept)
                .map(|record| (record.container_id.clone(), record.if_name.clone()))
                .collect();
            // Somebody's pod is behind it, and the plugins would take its address for nobody's.
            if let Some(file) = unreadable.iter().find(|name| name.starts_with(&format!("{}-", network.name)))
            {
                let file = self.settings.cache_dir.join("results").join(file);
                let error = Error::Failed(format!(
                    "{} cannot be read, so that what is attached is not known: no GC",
                    file.display()
                ));
                reasons.push(Reason { network: network.name, interface: String::new(), error });
                continue;
            }
            // A pod whose record was lost is attached all the same.
            let interface = format!("{}{number}", self.settings.interface_prefix);
            attached.extend(valid.iter().map(|id| (id.clone(), interface.clone())));
            let attached: Vec<(String, String)> = attached.into_iter().collect();
            if let Err(errors) = self.collect_of(&network, &attached).await {
                let reason =
                    |error| Reason { network: network.name.clone(), interface: String::new(), error };
                reasons.extend(errors.into_iter().map(reason));
            }
        }
        if !reasons.is_empty() {
            left.push(Retry { pod: String::new(), reasons });
        }
        left
    }

    /// GC of a network's plugins, each of them, whatever the others say.
    async fn collect_of(&self, network: &Network, attached: &[(String, String)]) -> Result<(), Vec<Error>> {
        let version = self.version(network).await.map_err(|error| vec![error])?;
        if network.disable_gc || !version.has_gc() {
            return Ok(());
        }
        let mut errors = Vec::new();
        for plugin in &network.plugins {
            let addition = Addition { valid: Some(attached), ..Addition::default() };
            let stdin = request::build(&network.name, version, plugin, addition);
            let ran =
                self.runner.run(&plugin.kind, Verb::Gc, &Target::default(), &stdin, self.runner.limit).await;
            if let Err(failure) = ran {
                errors.push(failure_of(Verb::Gc, network, &plugin.kind, failure));
            }
        }
        if errors.is_empty() { Ok(()) } else { Err(errors) }
    }
}

/// Whether a namespace is bound to this file: the file itself stays when the namespace is let go.
fn is_namespace(file: &Path) -> bool {
    const NSFS_MAGIC: u64 = 0x6e73_6673;
    rustix::fs::statfs(file).is_ok_and(|found| found.f_type.cast_unsigned() == NSFS_MAGIC)
}

fn failure_of(verb: Verb, network: &Network, plugin: &str, failure: Failure) -> Error {
    let (plugin, network) = (plugin.to_owned(), network.name.clone());
    Error::Plugin { verb: verb.as_str(), plugin, network, failure }
}

/// Whom a plugin is asked about. A namespace that is gone is not named: plugins then do what can be done without.
fn target(record: &Record) -> Target {
    let arguments: Vec<String> =
        record.cni_args.iter().map(|(key, value)| format!("{key}={value}")).collect();
    let netns = if is_namespace(Path::new(&record.netns)) { record.netns.clone() } else { String::new() };
    Target {
        container: record.container_id.clone(),
        netns,
        interface: record.if_name.clone(),
        arguments: arguments.join(";"),
    }
}

/// The attachment that the networks make; the first of them gives the pod its addresses.
fn attachment(underway: &[Underway], preference: IpPreference) -> Result<Attachment, Error> {
    let networks: Vec<Attached> = underway
        .iter()
        .map(|this| Attached {
            network: this.network.name.clone(),
            interface: this.record.if_name.clone(),
            outcome: this.outcome.clone().unwrap_or_default(),
        })
        .collect();
    let addresses = networks.first().map(addresses).unwrap_or_default();
    let first = match preference {
        IpPreference::Ipv4 => addresses.iter().position(IpAddr::is_ipv4),
        IpPreference::Ipv6 => addresses.iter().position(IpAddr::is_ipv6),
        IpPreference::Cni => None,
    };
    let mut additional_ips = addresses;
    if additional_ips.is_empty() {
        let of = networks.first().map(|first| (first.network.as_str(), first.interface.as_str()));
        let (network, interface) = of.unwrap_or_default();
        return Err(Error::Failed(format!(
            "the plugins of network {network} gave {interface} no address: see to its ipam"
        )));
    }
    let ip = additional_ips.remove(first.unwrap_or(0));
    Ok(Attachment { ip, additional_ips, networks })
}

/// The addresses of the interface that was asked for. One on the host may have the same name: that in the pod counts.
fn addresses(attached: &Attached) -> Vec<IpAddr> {
    let Outcome { interfaces, ips, .. } = &attached.outcome;
    let named = |interface: &&Interface| interface.name == attached.interface;
    let inside = interfaces.iter().filter(named).any(|interface| !interface.sandbox.is_empty());
    let of_pod = |ip: &&Ip| match ip
        .interface
        .map(|index| usize::try_from(index).ok().and_then(|at| interfaces.get(at)))
    {
        None => true,
        Some(None) => false,
        Some(Some(interface)) => named(&interface) && (!inside || !interface.sandbox.is_empty()),
    };
    ips.iter().filter(of_pod).map(|ip| ip.address.address).collect()
}

impl Attachment {
    /// What `crictl inspectp` shows of it, in the form that it has from containerd.
    pub fn to_verbose(&self) -> Value {
        let mut interfaces = Map::new();
        for attached in &self.networks {
            let Outcome { interfaces: made, ips, .. } = &attached.outcome;
            for interface in made {
                let value = serde_json::json!({
                    "IPConfigs": null,
                    "Mac": interface.mac,
                    "Sandbox": interface.sandbox,
                    "PciID": interface.pci_id,
                    "SocketPath": interface.socket_path,
                });
                interfaces.insert(interface.name.clone(), value);
            }
            for ip in ips {
                let at = ip.interface.and_then(|index| usize::try_from(index).ok());
                let name =
                    at.and_then(|at| made.get(at)).map_or(&attached.interface, |interface| &interface.name);
                let config = serde_json::json!({
                    "IP": ip.address.address,
                    "Gateway": ip.gateway.map(|gateway| gateway.to_string()).unwrap_or_default(),
                });
                let entry =
                    interfaces.entry(name.clone()).or_insert_with(|| serde_json::json!({"IPConfigs": null}));
                match entry["IPConfigs"].as_array_mut() {
                    Some(configs) => configs.push(config),
                    None => entry["IPConfigs"] = Value::Array(vec![config]),
                }
            }
        }
        let dns: Vec<&Dns> = self.networks.iter().map(|attached| &attached.outcome.dns).collect();
        let routes: Vec<&Route> =
            self.networks.iter().flat_map(|attached| &attached.outcome.routes).collect();
        serde_json::json!({"Interfaces": interfaces, "DNS": dns, "Routes": routes})
    }
}
