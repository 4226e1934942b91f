//! The OCI runtime: its command line, run through the one reaper, and what its failures mean.
//!
//! Invariant: a runtime is never waited for by reading a pipe, as the container's processes may inherit it and keep
//! it open: what it prints goes to memory (memfd) and is read when it has exited.

mod failure;
mod kept;

use std::ffi::{OsStr, OsString};
use std::fs::{self, File};
use std::io::{self, Read, Seek, SeekFrom};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use serde::Serialize;
use shim_api::{Error, Result, trace};
use sys::reaper::Reaper;
use tokio::net::unix::pipe;

use crate::options::Options;

/// The runtime used when the options name none.
const DEFAULT_BINARY: &str = "runc";
/// Where runtimes keep their state, below it a folder for each namespace; other tools look there.
const DEFAULT_ROOT: &str = "/run/containerd/runc";
/// How often it is asked whether an init that does not answer is alive.
const RELEASE_LOOK: Duration = Duration::from_millis(100);
/// How much of a runtime's output is kept for an error message, in bytes.
const OUTPUT_LIMIT: u64 = 64 * 1024;

/// A runtime set up for one container.
pub(crate) struct Runtime {
    reaper: Reaper,
    binary: PathBuf,
    root: PathBuf,
    bundle: PathBuf,
    id: String,
    systemd_cgroup: bool,
    /// Makes the names of files for single calls differ.
    calls: AtomicU64,
}

/// Standard streams for a process a runtime makes; without them it gets /dev/null and its messages are kept.
pub(crate) struct Streams {
    pub(crate) stdin: Stdio,
    pub(crate) stdout: Stdio,
    pub(crate) stderr: Stdio,
}

/// Where a process's terminal is sent to.
pub(crate) type ConsoleSocket<'a> = Option<&'a Path>;

impl Runtime {
    pub(crate) fn new(reaper: Reaper, namespace: &str, id: &str, bundle: &Path, options: &Options) -> Self {
        let root = if options.root.is_empty() { DEFAULT_ROOT } else { &options.root };
        let binary = if options.binary_name.is_empty() { DEFAULT_BINARY } else { &options.binary_name };
        Self {
            reaper,
            binary: binary.into(),
            root: Path::new(root).join(namespace),
            bundle: bundle.to_owned(),
            id: id.to_owned(),
            systemd_cgroup: options.systemd_cgroup,
            calls: AtomicU64::new(0),
        }
    }

    /// Makes the container with its init, which waits for [`Runtime::start`]; answers the init's pid.
    pub(crate) async fn create(
        &self,
        options: &Options,
        streams: Option<Streams>,
        console: ConsoleSocket<'_>,
    ) -> Result<u32> {
        let pid_file = self.bundle.join("init.pid");
        let mut arguments = Arguments::new("create");
        arguments.pair("--bundle", &self.bundle).pair("--pid-file", &pid_file);
        arguments.optional("--console-socket", console);
        arguments.flag("--no-pivot", options.no_pivot_root);
        arguments.flag("--no-new-keyring", options.no_new_keyring);
        self.run("create", arguments.for_container(&self.id), streams).await?;
        read_pid(&pid_file)
    }

    /// Lets the init go on to the container's program. With the init's handle without the runtime, where that would
    /// do nothing else.
    pub(crate) async fn start(&self, init: Option<&OwnedFd>) -> Result<()> {
        trace::span(trace::LET_RUN, async {
            if let Some(init) = init
                && self.release(init).await
            {
                return Ok(());
            }
            self.run("start", Arguments::new("start").for_container(&self.id), None).await
        })
        .await
    }

    /// What runc's `start` consists of, at a third of its time: the init waits in opening a fifo, writes a byte into it
    /// and executes. False where it is not known to be so, and where anything is not as it should be: runc knows what to say.
    async fn release(&self, init: &OwnedFd) -> bool {
        let state = self.root.join(&self.id);
        let fifo = state.join("exec.fifo");
        // crun has a fifo of that name, too, for the opposite direction, but no such state. A socket for readiness is
        // served by `start`.
        if !state.join("state.json").exists() || std::env::var_os("NOTIFY_SOCKET").is_some() {
            return false;
        }
        let Ok(reader) = pipe::OpenOptions::new().open_receiver(&fifo) else { return false };
        loop {
            // Nobody tells the reader of a fifo that was never opened for writing that its writer has died.
            let readable = tokio::time::timeout(RELEASE_LOOK, reader.readable()).await;
            match reader.try_read(&mut [0]) {
                Ok(0) => return false,
                Ok(_) => break,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(_) => return false,
            }
            if readable.is_err() && sys::pidfd::send_signal(init, 0).is_err() {
                return false;
            }
        }
        sys::failpoint!("shim.start.released");
        // By this runc tells a running container from a created one.
        fs::remove_file(&fifo).is_ok()
    }

    /// Makes a container from a checkpoint and lets it run; answers the init's pid.
    pub(crate) async fn restore(
        &self,
        options: &Options,
        image: &Path,
        parent: &str,
        work: &Path,
        streams: Option<Streams>,
        console: ConsoleSocket<'_>,
    ) -> Result<u32> {
        let pid_file = self.bundle.join("init.pid");
        let mut arguments = Arguments::new("restore");
        arguments.pair("--image-path", image).pair("--work-path", work);
        arguments.optional("--parent-path", (!parent.is_empty()).then_some(Path::new(parent)));
        arguments.pair("--bundle", &self.bundle).pair("--pid-file", &pid_file);
        arguments.optional("--console-socket", console);
        arguments.flag("--detach", true).flag("--no-subreaper", true);
        arguments.flag("--no-pivot", options.no_pivot_root);
        self.run("restore", arguments.for_container(&self.id), streams).await?;
        read_pid(&pid_file)
    }

    /// Runs a process in the container; `process` is OCI's, as JSON. Answers its pid.
    pub(crate) async fn exec(
        &self,
        exec_id: &str,
        process: &[u8],
        streams: Option<Streams>,
        console: ConsoleSocket<'_>,
    ) -> Result<u32> {
        let pid_file = self.bundle.join(format!("{exec_id}.pid"));
        let _ = fs::remove_file(&pid_file);
        let spec = Scratch::write(self.scratch_path("process.json"), process)?;
        let mut arguments = Arguments::new("exec");
        arguments.pair("--process", &spec.0).flag("--detach", true).pair("--pid-file", &pid_file);
        arguments.optional("--console-socket", console);
        let result = self.run("exec", arguments.for_container(&self.id), streams).await;
        let pid = result.and_then(|()| read_pid(&pid_file));
        let _ = fs::remove_file(&pid_file);
        pid
    }

    /// Signals the init, or all processes of the container.
    pub(crate) async fn kill(&self, signal: u32, all: bool) -> Result<()> {
        let mut arguments = Arguments::new("kill");
        arguments.flag("--all", all);
        let mut arguments = arguments.for_container(&self.id);
        arguments.push(signal.to_string().into());
        self.run("kill", arguments, None).await
    }

    /// Removes what the runtime keeps of the container; that it keeps nothing is fine.
    pub(crate) async fn delete(&self, force: bool) -> Result<()> {
        let mut arguments = Arguments::new("delete");
        arguments.flag("--force", force);
        match self.run("delete", arguments.for_container(&self.id), None).await {
            Err(error) if error.code == shim_api::Code::NotFound => Ok(()),
            other => other,
        }
    }

    /// What runc's `delete` consists of for a container without processes or hooks, without the start of a program: its control
    /// groups go, and its folder. False where it is not known to be so, and where anything is not as it should be: then `delete`
    /// does what is left, and knows what to say.
    pub(crate) async fn forget(&self) -> bool {
        // What stands in for runc may keep more of a container, and systemd does.
        if self.systemd_cgroup || self.binary.file_name() != Some(OsStr::new(DEFAULT_BINARY)) {
            return false;
        }
        let folder = self.root.join(&self.id);
        let forgotten = tokio::task::spawn_blocking(move || kept::remove(&folder)).await;
        matches!(forgotten, Ok(Ok(true)))
    }

    pub(crate) async fn pause(&self) -> Result<()> {
        self.run("pause", Arguments::new("pause").for_container(&self.id), None).await
    }

    pub(crate) async fn resume(&self) -> Result<()> {
        self.run("resume", Arguments::new("resume").for_container(&self.id), None).await
    }

    /// Changes limits; `resources` is OCI's LinuxResources, as JSON.
    pub(crate) async fn update(&self, resources: &[u8]) -> Result<()> {
        let file = Scratch::write(self.scratch_path("resources.json"), resources)?;
        let mut arguments = Arguments::new("update");
        arguments.pair("--resources", &file.0);
        self.run("update", arguments.for_container(&self.id), None).await
    }

    /// Writes the container's state below `image`.
    pub(crate) async fn checkpoint(
        &self,
        image: &Path,
        work: &Path,
        options: &proto::containerd::runc::v1::CheckpointOptions,
    ) -> Result<()> {
        let mut arguments = Arguments::new("checkpoint");
        arguments.pair("--image-path", image).pair("--work-path", work);
        let parent = (!options.parent_path.is_empty()).then_some(Path::new(&options.parent_path));
        arguments.optional("--parent-path", parent);
        arguments.flag("--leave-running", !options.exit);
        arguments.flag("--tcp-established", options.open_tcp);
        arguments.flag("--ext-unix-sk", options.external_unix_sockets);
        arguments.flag("--shell-job", options.terminal);
        arguments.flag("--file-locks", options.file_locks);
        for namespace in &options.empty_namespaces {
            arguments.pair("--empty-ns", namespace);
        }
        self.run("checkpoint", arguments.for_container(&self.id), None).await
    }

    fn scratch_path(&self, name: &str) -> PathBuf {
        self.bundle.join(format!(".{}-{name}", self.calls.fetch_add(1, Ordering::Relaxed)))
    }

    async fn run(&self, verb: &str, arguments: Vec<OsString>, streams: Option<Streams>) -> Result<()> {
        // Each call has a log of its own, so that the cause of one failure is not taken for another's. Create's
        // stays where people look for it.
        let log = match verb {
            "create" | "restore" => Scratch::keep(self.bundle.join("log.json")),
            _ => Scratch(self.scratch_path("log.json"), false),
        };
        let output = memory_file().map_err(|error| Error::internal(format!("memfd_create: {error}")))?;
        let mut command = Command::new(&self.binary);
        command.arg("--root").arg(&self.root).args(["--log-format", "json"]);
        // A bundle that is gone, with its container perhaps not, has no place for a log; stderr has it then.
        if self.bundle.is_dir() {
            command.arg("--log").arg(&log.0);
        }
        if self.systemd_cgroup {
            command.arg("--systemd-cgroup");
        }
        command.args(arguments);
        match streams {
            Some(streams) => {
                command.stdin(streams.stdin).stdout(streams.stdout).stderr(streams.stderr);
            }
            None => {
                let copy = |file: &File| file.try_clone().map(Stdio::from).unwrap_or_else(|_| Stdio::null());
                command.stdin(Stdio::null()).stdout(copy(&output)).stderr(copy(&output));
            }
        }
        // Of the trace that the shim was started for; hooks have nothing to do with that.
        for variable in trace::ENVIRONMENT.iter().filter(|variable| std::env::var_os(variable).is_some()) {
            command.env_remove(variable);
        }
        tracing::debug!(?command, "running the runtime");
        let began = trace::current().map(|trace| (trace, trace::now()));
        if matches!(verb, "create" | "exec" | "restore") {
            tokio::task::spawn_blocking(sys::cgroup::hasten_moves);
        }
        let spawned = self.reaper.spawn(&mut command);
        // Our copies of the container's streams go with the command.
        drop(command);
        let (pid, exit) = spawned.map_err(|error| failure::not_run(&self.binary, &error))?;
        sys::failpoint!("shim.runc.{verb}.spawned");
        let exit = exit.await.ok_or_else(|| Error::internal("the runtime's exit was lost"))?;
        sys::failpoint!("shim.runc.{verb}.returned");
        // A runtime takes no part in a trace: what is seen of it is when it began and when it ended.
        if let Some((trace, began)) = began {
            trace.note("runc", pid, verb, began);
        }
        if exit.status == 0 {
            return Ok(());
        }
        let logged = fs::read(&log.0).unwrap_or_default();
        Err(failure::of_run(verb, &self.binary, exit.status, &logged, &read_back(output)))
    }
}

/// A command line in the making.
struct Arguments(Vec<OsString>);

impl Arguments {
    fn new(verb: &str) -> Self {
        Self(vec![verb.into()])
    }

    fn pair(&mut self, name: &str, value: impl AsRef<OsStr>) -> &mut Self {
        self.0.extend([name.into(), value.as_ref().to_owned()]);
        self
    }

    fn optional(&mut self, name: &str, value: Option<&Path>) -> &mut Self {
        if let Some(value) = value {
            self.pair(name, value);
        }
        self
    }

    fn flag(&mut self, name: &str, set: bool) -> &mut Self {
        if set {
            self.0.push(name.into());
        }
        self
    }

    fn for_container(&mut self, id: &str) -> Vec<OsString> {
        let mut all = std::mem::take(&mut self.0);
        all.push(id.into());
        all
    }
}

/// A file for one call, removed with it unless kept.
struct Scratch(PathBuf, bool);

impl Scratch {
    fn keep(path: PathBuf) -> Self {
        let _ = fs::remove_file(&path);
        Self(path, true)
    }

    fn write(path: PathBuf, content: &[u8]) -> Result<Self> {
        fs::write(&path, content)
            .map_err(|error| Error::internal(format!("write {}: {error}", path.display())))?;
        Ok(Self(path, false))
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        if !self.1 {
            let _ = fs::remove_file(&self.0);
        }
    }
}

fn memory_file() -> std::io::Result<File> {
    Ok(sys::process::memory_file("runtime-output")?.into())
}

fn read_back(mut file: File) -> Vec<u8> {
    let mut output = Vec::new();
    if file.seek(SeekFrom::Start(0)).is_ok() {
        let _ = file.take(OUTPUT_LIMIT).read_to_end(&mut output);
    }
    output
}

fn read_pid(path: &Path) -> Result<u32> {
    let text = fs::read_to_string(path).map_err(|error| {
        Error::internal(format!("read the runtime's pid file {}: {error}", path.display()))
    })?;
    text.trim().parse().map_err(|_| {
        Error::internal(format!("the runtime's pid file {} has no pid: {text:?}", path.display()))
    })
}

/// A process of the OCI spec with one field set, whatever else it holds.
pub(crate) fn process_with_terminal(process: &[u8], terminal: bool) -> Result<Vec<u8>> {
    #[derive(Serialize, serde::Deserialize)]
    struct Process {
        #[serde(default)]
        terminal: bool,
        #[serde(flatten)]
        rest: std::collections::BTreeMap<String, serde_json::Value>,
    }
    let mut process: Process = serde_json::from_slice(process)
        .map_err(|error| Error::invalid_argument(format!("the exec's process is no OCI process: {error}")))?;
    process.terminal = terminal;
    serde_json::to_vec(&process).map_err(Error::internal)
}
