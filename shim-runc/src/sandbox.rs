//! The sandbox service: what the containers of a pod share, held without a process where that can be.
//!
//! ```text
//! (none) --create--> Created --start--> Ready --stop, or its init ends--> Stopped
//! ```
//!
//! What the sandbox is comes from the bundle's config.json, if there is one: `linux.namespaces` without a path are made and
//! bound to `BUNDLE/ns/KIND` (ipc, net, pid, uts), hostname, domain name and sysctls are set in them. Only a namespace of
//! process ids needs a process; its init is this program, which does nothing but reap. The network may come made, as
//! `netns_path`; what connects it is the engine's affair.
//!
//! A namespace of users comes made, by its path in the config, and then owns the others. Into it goes only a process of one thread:
//!
//! ```text
//! shim -- spawns --> sandbox-users: joins, makes, sets, forks the init -- "made PID" --> shim: notes, binds -- "keep" --> ends
//! ```
//!
//! Invariant: a start that failed, and a stop, leave neither mount nor process.

use std::fs;
use std::io::{self, BufRead as _, BufReader, Read as _, Write as _};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::SystemTime;

use async_trait::async_trait;
use oci::Platform;
use proto::containerd::types::{Metric, Platform as PlatformMessage};
use shim_api::sandbox::*;
use shim_api::{Error, Result};
use sys::namespace::{self, Kind};
use sys::reaper::{ExitOf, Reaper};
use tokio::sync::{Notify, watch};

use crate::bundle::{self, Config};
use crate::service::Service;
use crate::state::Exit;

/// The argument that makes this program the init of a namespace of process ids.
pub(crate) const INIT: &str = "sandbox-init";
/// The argument that makes it the one that makes namespaces in a namespace of users; the network's path follows.
pub(crate) const USERS: &str = "sandbox-users";
/// What that one says when they are made, before the pid of the init, and what it is told when it is not to take them back.
const MADE: &str = "made ";
const KEEP: &[u8] = b"keep";
/// Where the init's pid is noted, for whoever cleans up after a dead shim.
const INIT_PID: &str = "sandbox.pid";
/// Where namespaces are bound.
const FOLDER: &str = "ns";
/// What kubelet calls a sandbox that is up, and one that is not.
const READY: &str = "SANDBOX_READY";
const NOT_READY: &str = "SANDBOX_NOTREADY";
/// 128 + SIGKILL, of an init that was stopped.
const KILLED: u32 = 137;

/// The sandbox that this shim is, if it is one.
pub(crate) struct Sandbox {
    reaper: Reaper,
    tasks: Arc<Service>,
    done: Arc<Notify>,
    state: Mutex<Option<State>>,
    /// When and how it ended.
    ended: watch::Sender<Option<Exit>>,
}

#[derive(Clone)]
struct State {
    id: String,
    bundle: PathBuf,
    network: String,
    stage: Stage,
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Stage {
    Created,
    Starting,
    Ready { pid: u32, created: SystemTime },
    Stopped { pid: u32, created: Option<SystemTime> },
}

impl Stage {
    /// Begins a start; what makes no sense now is refused.
    fn started(self) -> Result<Stage> {
        match self {
            Stage::Created => Ok(Stage::Starting),
            Stage::Starting | Stage::Ready { .. } => {
                Err(Error::already_exists("the sandbox was started before"))
            }
            Stage::Stopped { .. } => Err(Error::failed_precondition("the sandbox has been stopped")),
        }
    }

    fn stopped(self) -> Stage {
        match self {
            Stage::Ready { pid, created } => Stage::Stopped { pid, created: Some(created) },
            Stage::Created | Stage::Starting => Stage::Stopped { pid: 0, created: None },
            stopped @ Stage::Stopped { .. } => stopped,
        }
    }
}

impl Sandbox {
    pub(crate) fn new(reaper: Reaper, tasks: Arc<Service>, done: Arc<Notify>) -> Arc<Self> {
        Arc::new(Sandbox { reaper, tasks, done, state: Mutex::default(), ended: watch::Sender::new(None) })
    }

    fn lock(&self) -> MutexGuard<'_, Option<State>> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn state(&self, id: &str) -> Result<State> {
        let state = self.lock().clone().filter(|state| state.id == id);
        state.ok_or_else(|| Error::not_found(format!("this shim has no sandbox {id:?}")))
    }

    fn set(&self, stage: Stage) {
        if let Some(state) = &mut *self.lock() {
            state.stage = stage;
        }
    }

    /// Makes namespaces and init.
    async fn make(&self, state: &State) -> Result<u32> {
        let config = Config::read_if_there(&state.bundle)?;
        let (state, reaper) = (state.clone(), self.reaper.clone());
        let made = tokio::task::spawn_blocking(move || make(&config, &state, &reaper)).await;
        let made = made.map_err(|error| Error::internal(format!("make the sandbox: {error}")))?;
        let Some((pid, exit)) = made? else { return Ok(0) };
        self.watch_init(exit);
        Ok(pid)
    }

    /// The sandbox ends with its init.
    fn watch_init(&self, exit: ExitOf) {
        let ended = self.ended.clone();
        tokio::spawn(async move {
            let status = exit.await.map_or(KILLED, |exit| exit.status);
            ended.send_if_modified(|ended| {
                let first = ended.is_none();
                ended.get_or_insert(Exit { status, at: SystemTime::now() });
                first
            });
        });
    }

    /// Takes down what a start made, or began to make.
    async fn unmake(&self, state: &State, status: u32) -> Result<()> {
        let bundle = state.bundle.clone();
        let unmade = tokio::task::spawn_blocking(move || unmake(&bundle)).await;
        unmade
            .map_err(|error| Error::internal(format!("stop the sandbox: {error}")))?
            .map_err(|error| Error::internal(format!("stop the sandbox: {error}")))?;
        sys::failpoint!("shim.sandbox.unmade");
        self.set(state.stage.stopped());
        self.ended.send_if_modified(|ended| {
            let first = ended.is_none();
            ended.get_or_insert(Exit { status, at: SystemTime::now() });
            first
        });
        Ok(())
    }
}

/// Whether the shim is a sandbox, which it stays until it is shut down as one.
pub(crate) fn is_one(sandbox: &Sandbox) -> bool {
    sandbox.lock().is_some()
}

/// What a sandbox is made of.
struct Plan {
    /// Namespaces that are made, and where they are bound.
    make: Vec<(Kind, PathBuf)>,
    /// Those that there are.
    join: Vec<(Kind, PathBuf)>,
    /// The namespace of users that owns them, if not the machine's.
    users: Option<PathBuf>,
    hostname: String,
    domainname: String,
    /// Sysctls: files beneath /proc/sys, and what is written to them.
    settings: Vec<(String, String)>,
}

impl Plan {
    fn of(config: &Config, bundle: &Path, network: &str) -> Result<Plan> {
        let folder = bundle.join(FOLDER);
        let (mut make, mut join, mut users) = (Vec::new(), Vec::new(), None);
        for (kind, path) in config.namespaces() {
            // Mounts and control groups are each container's own.
            let Some(kind) = Kind::from_oci(kind) else { continue };
            match (kind, path) {
                (Kind::Network, _) if !network.is_empty() => {}
                // So are users of which nobody has made a namespace.
                (Kind::User, "") => {}
                (Kind::User, path) => users = Some(PathBuf::from(path)),
                (kind, "") => make.push((kind, folder.join(kind.name()))),
                (kind, path) => join.push((kind, PathBuf::from(path))),
            }
        }
        if !network.is_empty() {
            join.push((Kind::Network, PathBuf::from(network)));
        }
        let has = |kind| make.iter().chain(&join).any(|(of, _): &(Kind, PathBuf)| *of == kind);
        for (name, what) in [(config.hostname(), "hostname"), (config.domainname(), "domainname")] {
            if !name.is_empty() && !has(Kind::Uts) {
                return Err(own_only(what, Kind::Uts.name()));
            }
        }
        let setting = |(key, value): (&str, &str)| {
            let path = sysctl_path(key)?;
            // Others would be set for the whole machine.
            let kind = kind_of(&path).ok_or_else(|| own_only(key, "net or ipc"))?;
            if has(kind) { Ok((path, value.to_owned())) } else { Err(own_only(key, kind.name())) }
        };
        let settings = config.sysctls().map(setting).collect::<Result<_>>()?;
        let (hostname, domainname) = (config.hostname().to_owned(), config.domainname().to_owned());
        Ok(Plan { make, join, users, hostname, domainname, settings })
    }

    fn has_init(&self) -> bool {
        self.make.iter().any(|(kind, _)| *kind == Kind::Pid)
    }

    /// Sets names and sysctls of the namespaces that the caller is in.
    fn set(&self) -> io::Result<()> {
        sys::namespace::set_names(&self.hostname, &self.domainname)?;
        for (path, value) in &self.settings {
            let path = Path::new("/proc/sys").join(path);
            fs::write(&path, value).map_err(|error| {
                io::Error::new(error.kind(), format!("set {} to {value:?}: {error}", path.display()))
            })?;
        }
        Ok(())
    }
}

fn make(config: &Config, state: &State, reaper: &Reaper) -> Result<Option<(u32, ExitOf)>> {
    let failed = |error: io::Error| Error::internal(format!("make the namespaces of the sandbox: {error}"));
    let folder = state.bundle.join(FOLDER);
    match fs::create_dir(&folder) {
        Err(error) if error.kind() != io::ErrorKind::AlreadyExists => return Err(failed(error)),
        _ => {}
    }
    let plan = Plan::of(config, &state.bundle, &state.network)?;
    if plan.make.is_empty() && plan.join.is_empty() {
        return Ok(None);
    }
    if plan.users.is_some() {
        return make_in_users(&plan, state, reaper).map_err(failed);
    }
    namespace::pin(&plan.make, &plan.join, || {
        plan.set()?;
        if !plan.has_init() {
            return Ok(None);
        }
        let mut command = Command::new(std::env::current_exe()?);
        command.arg(INIT).env_clear().current_dir(&state.bundle);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        sys::process::detach(&mut command);
        let (pid, exit) = reaper.spawn(&mut command)?;
        note_init(&state.bundle, pid)?;
        Ok(Some((pid, exit)))
    })
    .map_err(failed)
}

/// Noted for whoever cleans up.
fn note_init(bundle: &Path, pid: u32) -> io::Result<()> {
    bundle::write(bundle, INIT_PID, pid.to_string().as_bytes()).map_err(io::Error::other)
}

/// Has the namespaces made within one of users.
fn make_in_users(plan: &Plan, state: &State, reaper: &Reaper) -> io::Result<Option<(u32, ExitOf)>> {
    let ((answer, theirs), (input, mut word)) = (io::pipe()?, io::pipe()?);
    let mut command = Command::new(std::env::current_exe()?);
    command.args([USERS, &state.network]).env_clear().current_dir(&state.bundle);
    command.stdin(input).stdout(theirs.try_clone()?).stderr(theirs);
    sys::process::detach(&mut command);
    let (helper, _) = reaper.spawn(&mut command)?;
    // Our copies of its ends: it would never be seen to have ended.
    drop(command);
    let mut answer = BufReader::new(answer);
    let mut line = String::new();
    answer.read_line(&mut line)?;
    let Some(init) = line.strip_prefix(MADE).and_then(|pid| pid.trim().parse::<u32>().ok()) else {
        answer.read_to_string(&mut line)?;
        return Err(io::Error::other(line.trim().to_owned()));
    };
    let init = (init != 0).then(|| {
        // Before its parent ends, which makes it ours.
        let exit = reaper.claim(init);
        note_init(&state.bundle, init).map(|()| (init, exit))
    });
    let init = init.transpose()?;
    namespace::pin_of(helper, &plan.make)?;
    word.write_all(KEEP)?;
    Ok(init)
}

/// What the helper does: see [`make_in_users`]. The bundle is the working folder.
pub(crate) fn make_from_within(network: &str) -> Result<()> {
    let failed = |error: io::Error| Error::internal(format!("in the sandbox's namespace of users: {error}"));
    let plan = Plan::of(&Config::read(Path::new("."))?, Path::new("."), network)?;
    let users = plan.users.as_deref().ok_or_else(|| Error::invalid_argument("it has none"))?;
    let kinds: Vec<Kind> = plan.make.iter().map(|(kind, _)| *kind).collect();
    namespace::enter_users(users, &plan.join, &kinds).map_err(failed)?;
    plan.set().map_err(failed)?;
    let init = if plan.has_init() { sys::process::fork_init().map_err(failed)? } else { 0 };
    let told = (|| {
        let mut stdout = io::stdout();
        stdout.write_all(format!("{MADE}{init}\n").as_bytes())?;
        stdout.flush()?;
        let mut word = Vec::new();
        io::stdin().take(KEEP.len() as u64).read_to_end(&mut word)?;
        Ok(word == KEEP)
    })();
    match told.map_err(failed)? {
        true => Ok(()),
        // The shim is gone, or could not bind them.
        false => sys::process::kill(init).map_err(failed),
    }
}

fn own_only(key: &str, kind: &str) -> Error {
    Error::invalid_argument(format!("{key:?} can be set only in a {kind} namespace that the sandbox has"))
}

/// `net.ipv4.ip_forward` is net/ipv4/ip_forward; a slash in a name stands for its dot.
fn sysctl_path(key: &str) -> Result<String> {
    let path: String = key
        .chars()
        .map(|c| {
            if c == '.' {
                '/'
            } else if c == '/' {
                '.'
            } else {
                c
            }
        })
        .collect();
    if path.split('/').any(|part| matches!(part, "" | "." | "..")) {
        return Err(Error::invalid_argument(format!("{key:?} is no sysctl")));
    }
    Ok(path)
}

/// The namespace that a sysctl belongs to; None for those of the whole machine.
fn kind_of(path: &str) -> Option<Kind> {
    const IPC: [&str; 7] = ["msgmax", "msgmnb", "msgmni", "sem", "shmall", "shmmax", "shmmni"];
    if path.starts_with("net/") {
        return Some(Kind::Network);
    }
    let of_ipc = path.starts_with("fs/mqueue/")
        || path.strip_prefix("kernel/").is_some_and(|name| IPC.contains(&name) || name == "shm_rmid_forced");
    of_ipc.then_some(Kind::Ipc)
}

/// Takes down what is left of a sandbox in this bundle. Any number of times; nothing there is no error.
pub(crate) fn unmake(bundle: &Path) -> io::Result<()> {
    let noted = bundle.join(INIT_PID);
    if let Some(pid) = fs::read_to_string(&noted).ok().and_then(|text| text.trim().parse::<u32>().ok()) {
        // The number may be somebody else's by now.
        let here = fs::canonicalize(bundle)?;
        if fs::read_link(format!("/proc/{pid}/cwd")).is_ok_and(|cwd| cwd == here) {
            sys::process::kill(pid)?;
        }
        fs::remove_file(&noted)?;
    }
    let folder = bundle.join(FOLDER);
    let entries = match fs::read_dir(&folder) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        entries => entries?,
    };
    for entry in entries {
        namespace::unpin(&entry?.path())?;
    }
    fs::remove_dir(&folder)
}

#[async_trait]
impl SandboxService for Sandbox {
    async fn create_sandbox(&self, request: CreateSandboxRequest) -> Result<CreateSandboxResponse> {
        let bundle = crate::container::absolute_bundle(&request.bundle_path)?;
        let mut state = self.lock();
        if let Some(state) = &*state {
            return Err(Error::already_exists(format!("this shim is sandbox {:?} already", state.id)));
        }
        *state = Some(State {
            id: request.sandbox_id,
            bundle: bundle.to_path_buf(),
            network: request.netns_path,
            stage: Stage::Created,
        });
        Ok(CreateSandboxResponse {})
    }

    async fn start_sandbox(&self, request: StartSandboxRequest) -> Result<StartSandboxResponse> {
        let mut state = self.state(&request.sandbox_id)?;
        state.stage = state.stage.started()?;
        self.set(state.stage);
        let pid = match self.make(&state).await {
            Ok(pid) => pid,
            Err(error) => {
                if let Err(left) = self.unmake(&state, 1).await {
                    tracing::error!(%left, "a sandbox that failed to start left something");
                }
                return Err(error);
            }
        };
        sys::failpoint!("shim.sandbox.made");
        let created = SystemTime::now();
        self.set(Stage::Ready { pid, created });
        Ok(StartSandboxResponse { pid, created_at: Some(created.into()), spec: None })
    }

    async fn platform(&self, request: PlatformRequest) -> Result<PlatformResponse> {
        self.state(&request.sandbox_id)?;
        let host = Platform::host();
        let platform = PlatformMessage {
            os: host.os,
            architecture: host.architecture,
            variant: host.variant,
            ..PlatformMessage::default()
        };
        Ok(PlatformResponse { platform: Some(platform) })
    }

    async fn stop_sandbox(&self, request: StopSandboxRequest) -> Result<StopSandboxResponse> {
        let state = self.state(&request.sandbox_id)?;
        self.unmake(&state, 0).await?;
        Ok(StopSandboxResponse {})
    }

    async fn wait_sandbox(&self, request: WaitSandboxRequest) -> Result<WaitSandboxResponse> {
        self.state(&request.sandbox_id)?;
        let mut ended = self.ended.subscribe();
        let exit = ended.wait_for(Option::is_some).await.ok().and_then(|exit| *exit);
        let exit = exit.ok_or_else(|| Error::internal("no end in an end"))?;
        Ok(WaitSandboxResponse { exit_status: exit.status, exited_at: Some(exit.at.into()) })
    }

    async fn sandbox_status(&self, request: SandboxStatusRequest) -> Result<SandboxStatusResponse> {
        let state = self.state(&request.sandbox_id)?;
        let ended = *self.ended.borrow();
        let (pid, created) = match state.stage {
            Stage::Ready { pid, created } => (pid, Some(created)),
            Stage::Stopped { pid, created } => (pid, created),
            Stage::Created | Stage::Starting => (0, None),
        };
        let ready = matches!(state.stage, Stage::Ready { .. }) && ended.is_none();
        let mut answer = SandboxStatusResponse {
            sandbox_id: state.id,
            pid,
            state: if ready { READY } else { NOT_READY }.to_owned(),
            created_at: created.map(Into::into),
            exited_at: ended.map(|exit| exit.at.into()),
            ..SandboxStatusResponse::default()
        };
        if request.verbose {
            answer.info.insert("shim.pid".into(), std::process::id().to_string());
            let folder = state.bundle.join(FOLDER);
            for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
                let name = format!("namespace.{}", entry.file_name().to_string_lossy());
                answer.info.insert(name, entry.path().display().to_string());
            }
        }
        Ok(answer)
    }

    async fn ping_sandbox(&self, request: PingRequest) -> Result<PingResponse> {
        self.state(&request.sandbox_id)?;
        Ok(PingResponse {})
    }

    async fn shutdown_sandbox(&self, request: ShutdownSandboxRequest) -> Result<ShutdownSandboxResponse> {
        let state = self.state(&request.sandbox_id)?;
        if !self.tasks.is_empty() {
            return Err(Error::failed_precondition(format!(
                "sandbox {:?} still has containers; delete their tasks first",
                state.id
            )));
        }
        self.unmake(&state, 0).await?;
        *self.lock() = None;
        self.done.notify_one();
        Ok(ShutdownSandboxResponse {})
    }

    /// Of the sandbox itself there is nothing to count: its containers have groups of their own.
    async fn sandbox_metrics(&self, request: SandboxMetricsRequest) -> Result<SandboxMetricsResponse> {
        let state = self.state(&request.sandbox_id)?;
        let timestamp = Some(SystemTime::now().into());
        Ok(SandboxMetricsResponse { metrics: Some(Metric { timestamp, id: state.id, data: None }) })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sysctls_belong_to_namespaces() {
        let kind = |key: &str| sysctl_path(key).ok().and_then(|path| kind_of(&path));
        assert_eq!(kind("net.ipv4.ip_unprivileged_port_start"), Some(Kind::Network));
        assert_eq!(kind("net.ipv4.conf.eth0/1.rp_filter"), Some(Kind::Network));
        assert_eq!(sysctl_path("net.ipv4.conf.eth0/1.rp_filter").unwrap(), "net/ipv4/conf/eth0.1/rp_filter");
        assert_eq!(kind("kernel.shm_rmid_forced"), Some(Kind::Ipc));
        assert_eq!(kind("kernel.msgmax"), Some(Kind::Ipc));
        for key in ["kernel.panic", "vm.swappiness", "net", "fs.file-max"] {
            assert_eq!(kind(key), None, "{key}");
        }
        for key in ["", "net..x", "net.ipv4.//./x", ".net"] {
            assert!(sysctl_path(key).is_err(), "{key}");
        }
    }

    #[test]
    fn a_sandbox_starts_once() {
        let created = SystemTime::now();
        let ready = Stage::Ready { pid: 7, created };
        assert_eq!(Stage::Created.started().unwrap(), Stage::Starting);
        assert!(Stage::Starting.started().is_err() && ready.started().is_err());
        assert_eq!(ready.stopped(), Stage::Stopped { pid: 7, created: Some(created) });
        assert_eq!(ready.stopped().stopped(), ready.stopped());
        assert!(ready.stopped().started().is_err());
    }
}
