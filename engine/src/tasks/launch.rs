//! Running a shim's program: finding it, `start`, `delete`, `-info`.
//!
//! Invariant: whatever the program does (hangs, floods, fails, leaves a child on its output), a call here ends within
//! its limit, and a program that ran out of time is killed with all of its process group. The shim itself, which
//! `start` leaves running, has a session of its own and nothing of ours open, so that it outlives the engine.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use parking_lot::Mutex;
use prost::Message as _;
use prost_types::Any;
use proto::containerd::types::RuntimeInfo;
use shim_api::bootstrap::{self, Answer, Generation, Launch};
use shim_api::task::DeleteResponse;
use shim_api::trace;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use super::bundle::Bundle;
use crate::context::Namespace;
use crate::error::{Error, Result};

/// How long `start` may take.
const START_LIMIT: Duration = Duration::from_secs(20);
/// How long `delete` may take: it kills the container and takes its mounts down.
const DELETE_LIMIT: Duration = Duration::from_secs(30);
/// How long `-info` may take.
const INFO_LIMIT: Duration = Duration::from_secs(5);
/// How long output may stay open after the program has exited, held by a child.
const OUTPUT_LIMIT: Duration = Duration::from_secs(1);
/// What is kept of a program's output, in bytes.
const OUTPUT_MAX: usize = 64 << 10;

/// What it takes to run shims.
#[derive(Clone)]
pub(super) struct Launcher {
    grpc_address: PathBuf,
    ttrpc_address: PathBuf,
    /// Searched before PATH.
    dirs: Arc<[PathBuf]>,
    generations: Arc<Mutex<HashMap<Program, Generation>>>,
    /// The limit of descriptors that this engine was started with, which is what shims and containers get.
    descriptors: Option<u64>,
}

/// A program in one of its versions.
type Program = (PathBuf, Option<SystemTime>);

/// How a program ended.
struct Outcome {
    status: ExitStatus,
    stdout: Vec<u8>,
    stderr: Vec<u8>,
}

impl Launcher {
    /// Shims will publish their events to these addresses.
    pub(super) fn new(
        grpc_address: PathBuf,
        ttrpc_address: PathBuf,
        dirs: Vec<PathBuf>,
        descriptors: Option<u64>,
    ) -> Self {
        Launcher { grpc_address, ttrpc_address, dirs: dirs.into(), generations: Arc::default(), descriptors }
    }

    /// The shim's program for a runtime, named like `io.containerd.runc.v2` or by an absolute path.
    pub(super) fn find(&self, runtime: &str) -> Result<PathBuf> {
        let is_program = |path: &Path| {
            use std::os::unix::fs::PermissionsExt as _;
            path.metadata().is_ok_and(|data| data.is_file() && data.permissions().mode() & 0o111 != 0)
        };
        if runtime.starts_with('/') {
            let path = PathBuf::from(runtime);
            return if is_program(&path) {
                Ok(path)
            } else {
                Err(Error::not_found(format!(
                    "runtime {runtime:?} is not an executable file; install that shim, or name another runtime"
                )))
            };
        }
        let name = program_name(runtime)?;
        let path = std::env::var_os("PATH").unwrap_or_default();
        self.dirs
            .iter()
            .cloned()
            .chain(std::env::split_paths(&path).filter(|dir| dir.is_absolute()))
            .map(|dir| dir.join(&name))
            .find(|path| is_program(path))
            .map(|path| path.canonicalize().unwrap_or(path))
            .ok_or_else(|| {
                let dirs: Vec<String> = self.dirs.iter().map(|dir| dir.display().to_string()).collect();
                Error::not_found(format!(
                    "runtime {runtime:?} is not installed: {name} is neither in {} nor in PATH; install it, or give the \
                     path of a shim as the runtime",
                    dirs.join(", ")
                ))
            })
    }

    /// Runs `start` in the bundle; where the shim listens.
    pub(super) async fn start(
        &self,
        program: &Path,
        bundle: &Bundle,
        namespace: &Namespace,
        id: &str,
        options: Option<Any>,
    ) -> Result<Answer> {
        let launch = self.launch(namespace, id, options);
        let key = (program.to_owned(), program.metadata().and_then(|data| data.modified()).ok());
        let known = self.generations.lock().get(&key).copied();
        let (first, sure) = match known {
            Some(generation) => (generation, true),
            None => trace::span("ask the shim's version", self.generation(program, bundle)).await,
        };
        let answer = self.start_with(program, bundle, &launch, first).await;
        let (generation, answer) = match answer {
            // One that cannot say its version may be of the other generation. What hung would hang again.
            Err(error) if !sure && !matches!(error, Error::DeadlineExceeded(_)) => {
                let second = match first {
                    Generation::Options => Generation::Params,
                    Generation::Params => Generation::Options,
                };
                match self.start_with(program, bundle, &launch, second).await {
                    Ok(answer) => (second, answer),
                    Err(_) => return Err(error),
                }
            }
            answer => (first, answer?),
        };
        self.generations.lock().insert(key, generation);
        Ok(answer)
    }

    /// What a shim, given these options, says of itself and its runtime.
    pub(super) async fn info(&self, program: &Path, options: Option<Any>) -> Result<RuntimeInfo> {
        let mut command = Command::new(program);
        command.arg("-info").current_dir("/");
        let what = format!("ask {} what it can do", program.display());
        let outcome = run(command, options.unwrap_or_default().encode_to_vec(), INFO_LIMIT)
            .await
            .map_err(|error| error.context(&what))?;
        if !outcome.status.success() {
            return Err(Error::unknown(format!("{what}: {}", failure(&outcome))));
        }
        RuntimeInfo::decode(outcome.stdout.as_slice())
            .map_err(|error| Error::unknown(format!("{what}: its answer cannot be read: {error}")))
    }

    /// Which stdin a shim is likely to want, and whether that is certain. Since 2.0 a shim tells its version; 2.3 and
    /// later Go shims want the parameters, all others take the options.
    async fn generation(&self, program: &Path, bundle: &Bundle) -> (Generation, bool) {
        let mut command = Command::new(program);
        command.arg("-info").current_dir(&bundle.path);
        let info = match run(command, Vec::new(), INFO_LIMIT).await {
            Ok(outcome) if outcome.status.success() => RuntimeInfo::decode(outcome.stdout.as_slice()).ok(),
            _ => None,
        };
        match info.and_then(|info| info.version).and_then(|version| major_minor(&version.version)) {
            Some(version) if version >= (2, 3) => (Generation::Params, false),
            _ => (Generation::Options, false),
        }
    }

    async fn start_with(
        &self,
        program: &Path,
        bundle: &Bundle,
        launch: &Launch,
        generation: Generation,
    ) -> Result<Answer> {
        let mut command = self.command(program, bundle, launch, None, "start");
        if let Some(trace) = trace::current() {
            let [parent, file] = trace::ENVIRONMENT;
            command.env(parent, trace.parent()).env(file, trace.path());
        }
        let what = format!("start shim {}", program.display());
        let outcome = run(command, launch.encode(generation), START_LIMIT)
            .await
            .map_err(|error| error.context(&what))?;
        if !outcome.status.success() {
            return Err(Error::unknown(format!("{what}: {}", failure(&outcome))));
        }
        let said = said(&outcome.stderr);
        if !said.is_empty() {
            tracing::warn!(shim = %program.display(), %said, "the shim's start succeeded and says");
        }
        Answer::parse(&outcome.stdout).map_err(|error| {
            let said = if said.is_empty() { String::new() } else { format!("; it says: {said}") };
            Error::unknown(format!("{what}: {error}{said}"))
        })
    }

    /// Runs `delete`, which cleans up after a dead shim: kills what still runs, unmounts, and tells how it ended.
    pub(super) async fn delete(
        &self,
        program: &Path,
        bundle: &Bundle,
        namespace: &Namespace,
        id: &str,
    ) -> Result<DeleteResponse> {
        let launch = self.launch(namespace, id, None);
        let command = self.command(program, bundle, &launch, Some(&bundle.path), "delete");
        let what = format!("run delete of shim {}", program.display());
        let outcome = run(command, Vec::new(), DELETE_LIMIT).await.map_err(|error| error.context(&what))?;
        if !outcome.status.success() {
            return Err(Error::unknown(format!("{what}: {}", failure(&outcome))));
        }
        let said = said(&outcome.stderr);
        if !said.is_empty() {
            tracing::warn!(shim = %program.display(), %said, "cleaning up after a dead shim");
        }
        DeleteResponse::decode(outcome.stdout.as_slice())
            .map_err(|error| Error::unknown(format!("{what}: its answer cannot be decoded: {error}")))
    }

    /// Removes what a killed shim of this bundle listened at. Blocks.
    pub(super) fn remove_dead_sockets(&self, bundle: &Bundle, namespace: &Namespace, id: &str) {
        let said = bundle.shim_address().ok().map(|answer| answer.address);
        let said = said.as_deref().and_then(|address| shim_api::transport::socket_path(address).ok());
        // It may have been killed before it could say so.
        let usual = socket_of(&self.grpc_address, namespace.as_str(), id);
        for path in said.into_iter().chain([usual.as_path()]) {
            if let Err(error) = remove_dead_socket(path) {
                tracing::warn!(socket = %path.display(), %error, "the socket of a dead shim stays");
            }
        }
    }

    fn launch(&self, namespace: &Namespace, id: &str, options: Option<Any>) -> Launch {
        Launch {
            id: id.to_owned(),
            namespace: namespace.to_string(),
            log_level: if tracing::enabled!(tracing::Level::DEBUG) { -4 } else { 0 },
            engine_version: format!("v{}", crate::VERSION),
            ttrpc_address: self.ttrpc_address.display().to_string(),
            grpc_address: self.grpc_address.display().to_string(),
            publish_binary: std::env::current_exe().unwrap_or_default().display().to_string(),
            options,
            socket_dir: None,
        }
    }

    fn command(
        &self,
        program: &Path,
        bundle: &Bundle,
        launch: &Launch,
        bundle_for_delete: Option<&Path>,
        action: &str,
    ) -> Command {
        let mut command = Command::new(program);
        command
            .args(bootstrap::arguments(launch, bundle_for_delete, action))
            .envs(bootstrap::environment(launch))
            .current_dir(&bundle.path);
        if let Some(descriptors) = self.descriptors {
            sys::process::set_descriptor_limit(command.as_std_mut(), descriptors);
        }
        command
    }
}

/// Where a shim listens: all derive it so from the engine's socket, the namespace, and the container, or what several containers
/// have as their group.
pub(crate) fn socket_of(engine: &Path, namespace: &str, group: &str) -> PathBuf {
    let engine = engine.to_string_lossy();
    let key = format!("{}/{namespace}/{group}", engine.trim_end_matches('/'));
    Path::new(bootstrap::DEFAULT_SOCKET_DIR).join(oci::Digest::sha256_of(key.as_bytes()).hex())
}

/// Whether somebody listens at a socket; one who is slow does.
pub(crate) fn is_served(path: &Path) -> bool {
    use rustix::io::Errno;
    use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with};
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let Ok(socket) = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None) else { return true };
    let Ok(address) = SocketAddrUnix::new(path) else { return false };
    !matches!(connect(&socket, &address), Err(Errno::CONNREFUSED | Errno::NOENT | Errno::NOTDIR))
}

/// Removes a socket at which nobody listens; whether nobody does. Blocks.
pub(crate) fn remove_dead_socket(path: &Path) -> io::Result<bool> {
    if !path.exists() {
        return Ok(true);
    }
    // A shim that is being started takes its name under this lock.
    let _lock = path.parent().map(sys::process::lock_folder).transpose()?;
    if is_served(path) {
        return Ok(false);
    }
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(true),
    }
}

/// `io.containerd.runc.v2` is served by `containerd-shim-runc-v2`: the last two parts count.
fn program_name(runtime: &str) -> Result<String> {
    let mut parts = runtime.rsplit('.');
    let (version, name) = (parts.next().unwrap_or_default(), parts.next().unwrap_or_default());
    let good = |part: &str| {
        !part.is_empty() && part.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
    };
    if good(version) && good(name) && runtime.len() < 200 && !runtime.contains('/') {
        Ok(format!("containerd-shim-{name}-{version}"))
    } else {
        let shown: String = runtime.chars().take(200).collect();
        Err(Error::invalid_argument(format!(
            "runtime {shown:?} is no runtime's name: give one like io.containerd.runc.v2, or the absolute path of a shim"
        )))
    }
}

/// `v2.3.0-rc.1` is (2, 3).
fn major_minor(version: &str) -> Option<(u32, u32)> {
    let mut parts = version.trim_start_matches('v').split('.');
    let major = parts.next()?.parse().ok()?;
    let minor = parts.next()?;
    let digits = minor.find(|c: char| !c.is_ascii_digit()).unwrap_or(minor.len());
    Some((major, minor[..digits].parse().ok()?))
}

/// Runs a program within a limit, with these bytes as its stdin.
async fn run(mut command: Command, stdin: Vec<u8>, limit: Duration) -> Result<Outcome> {
    let started = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .kill_on_drop(true)
        .spawn();
    let mut child = started.map_err(|error| Error::unknown(format!("cannot be executed: {error}")))?;
    let group = child.id();
    let (mut input, output, errors) = (child.stdin.take(), child.stdout.take(), child.stderr.take());
    // All three by themselves: a program that does not read is not to keep us from reading.
    let feeding = tokio::spawn(async move {
        if let Some(input) = &mut input {
            // One that does not want its input is not wrong.
            let _ = input.write_all(&stdin).await;
        }
    });
    let stdout = Collected::of(output);
    let stderr = Collected::of(errors);
    let waited = tokio::time::timeout(limit, async {
        tokio::select! {
            status = child.wait() => status.map(Some),
            () = stdout.overflows() => Ok(None),
        }
    })
    .await;
    feeding.abort();
    let killed = |why: String, class: fn(String) -> Error| {
        if let Some(pid) = group.and_then(|pid| rustix::process::Pid::from_raw(pid.cast_signed())) {
            let _ = rustix::process::kill_process_group(pid, rustix::process::Signal::KILL);
        }
        let said = said(&stderr.taken());
        class(if said.is_empty() { why } else { format!("{why}; until then it said: {said}") })
    };
    match waited {
        Err(_) => {
            Err(killed(format!("it did not end within {limit:?} and was killed"), Error::DeadlineExceeded))
        }
        Ok(Ok(None)) => {
            Err(killed(format!("its output exceeds {OUTPUT_MAX} bytes; it was killed"), Error::Unknown))
        }
        Ok(Err(error)) => Err(killed(format!("cannot be waited for: {error}"), Error::Unknown)),
        Ok(Ok(Some(status))) => {
            let _ = tokio::time::timeout(OUTPUT_LIMIT, async { tokio::join!(stdout.ends(), stderr.ends()) })
                .await;
            Ok(Outcome { status, stdout: stdout.taken(), stderr: stderr.taken() })
        }
    }
}

/// What a program has written so far, as long as it is not too much.
struct Collected {
    bytes: Arc<Mutex<Vec<u8>>>,
    /// Whether it went beyond the limit; the reader is gone when it ended.
    overflow: tokio::sync::watch::Receiver<bool>,
    reading: tokio::task::JoinHandle<()>,
}

impl Collected {
    fn of(pipe: Option<impl AsyncRead + Unpin + Send + 'static>) -> Self {
        let bytes = Arc::new(Mutex::new(Vec::new()));
        let (beyond, overflow) = tokio::sync::watch::channel(false);
        let into = Arc::clone(&bytes);
        let reading = tokio::spawn(async move {
            let Some(mut pipe) = pipe else { return };
            let mut buffer = vec![0; 8192];
            while let Ok(count @ 1..) = pipe.read(&mut buffer).await {
                let mut bytes = into.lock();
                let room = OUTPUT_MAX - bytes.len();
                bytes.extend_from_slice(&buffer[..count.min(room)]);
                if count > room {
                    let _ = beyond.send(true);
                }
            }
        });
        Collected { bytes, overflow, reading }
    }

    /// Resolves when more than the limit was written; never when it was not.
    async fn overflows(&self) {
        let mut overflow = self.overflow.clone();
        if overflow.wait_for(|beyond| *beyond).await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    /// Resolves when no one can write any more.
    async fn ends(&self) {
        let mut overflow = self.overflow.clone();
        while overflow.changed().await.is_ok() {}
    }

    fn taken(&self) -> Vec<u8> {
        std::mem::take(&mut self.bytes.lock())
    }
}

impl Drop for Collected {
    fn drop(&mut self) {
        self.reading.abort();
    }
}

/// Why a program failed, in its own words where it has any.
fn failure(outcome: &Outcome) -> String {
    let mut words = said(&outcome.stderr);
    if words.is_empty() {
        // Old shims write everything to one of the two.
        words = said(&outcome.stdout);
    }
    if words.is_empty() { outcome.status.to_string() } else { format!("{words} ({})", outcome.status) }
}

/// Output as a text of one line, cut where it is too long.
fn said(output: &[u8]) -> String {
    const MAX: usize = 2000;
    let text = String::from_utf8_lossy(&output[..output.len().min(MAX)]);
    let line: Vec<&str> = text.split_whitespace().collect();
    line.join(" ").replace(|c: char| c.is_control(), "?")
}

/// The log of a shim: lines of its fifo, until the bundle's task drops this.
pub(super) struct ShimLog(tokio::task::JoinHandle<()>);

impl ShimLog {
    /// Begins to read. The fifo is held open for writing too, so that the shim may open and close it as it likes; and
    /// before the shim starts, since Go shims wait for a reader.
    pub(super) fn follow(bundle: &Bundle, namespace: &Namespace, id: &str) -> io::Result<Self> {
        let path = bundle.log();
        if !sys::fifo::is_fifo(&path) {
            return Err(io::Error::other("it is not a fifo"));
        }
        let fifo = sys::fifo::watch(sys::fifo::open_lasting_writer(&path)?)?;
        let (namespace, id) = (namespace.clone(), id.to_owned());
        Ok(ShimLog(tokio::spawn(async move {
            use std::os::fd::AsFd as _;
            let mut line = Vec::new();
            let mut buffer = [0; 4096];
            loop {
                let Ok(mut ready) = fifo.readable().await else { return };
                match ready.try_io(|fifo| sys::fifo::read(fifo.get_ref().as_fd(), &mut buffer)) {
                    Err(_) => {}
                    Ok(Err(_) | Ok(0)) => return,
                    Ok(Ok(count)) => {
                        for byte in &buffer[..count] {
                            if *byte != b'\n' {
                                line.push(*byte);
                            }
                            if (*byte == b'\n' && !line.is_empty()) || line.len() >= 4096 {
                                tracing::info!(%namespace, id, "shim: {}", said(&line));
                                line.clear();
                            }
                        }
                    }
                }
            }
        })))
    }
}

impl Drop for ShimLog {
    fn drop(&mut self) {
        self.0.abort();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn script(folder: &Path, text: &str) -> PathBuf {
        use std::os::unix::fs::PermissionsExt as _;
        let path = folder.join("containerd-shim-test-v1");
        std::fs::write(&path, format!("#!/bin/sh\n{text}\n")).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755)).unwrap();
        path
    }

    async fn run_script(text: &str, limit: Duration) -> Result<Outcome> {
        let folder = tempfile::tempdir().unwrap();
        let path = script(folder.path(), text);
        run(Command::new(path), b"input".to_vec(), limit).await
    }

    #[test]
    fn names() {
        assert_eq!(program_name("io.containerd.runc.v2").unwrap(), "containerd-shim-runc-v2");
        assert_eq!(program_name("io.containerd.kata-qemu.v2").unwrap(), "containerd-shim-kata-qemu-v2");
        for bad in
            ["", "runc", ".", "a.", ".v2", "io.containerd./x.v2", "../../bin/sh", "a b.v2", &"x.".repeat(300)]
        {
            assert!(matches!(program_name(bad), Err(Error::InvalidArgument(_))), "{bad}");
        }
        assert_eq!(major_minor("v2.3.0"), Some((2, 3)));
        assert_eq!(major_minor("2.10-rc.1"), Some((2, 10)));
        assert_eq!(major_minor("unknown"), None);
    }

    #[test]
    fn our_own_folder_goes_before_path() {
        let folder = tempfile::tempdir().unwrap();
        let path = script(folder.path(), "");
        let launcher = Launcher::new(
            "/s".into(),
            "/s.ttrpc".into(),
            vec!["/nowhere".into(), folder.path().into()],
            None,
        );
        assert_eq!(launcher.find("io.containerd.test.v1").unwrap(), path.canonicalize().unwrap());
        assert_eq!(launcher.find(path.to_str().unwrap()).unwrap(), path);
        for absent in ["io.containerd.nosuch.v9", "/no/such/shim", "/etc/passwd", "/"] {
            let Err(Error::NotFound(message)) = launcher.find(absent) else { panic!("{absent} found") };
            assert!(message.contains(absent) && message.contains("install"), "{message}");
        }
    }

    #[tokio::test]
    async fn programs_that_do_not_behave() {
        let limit = Duration::from_secs(20);
        let outcome = run_script("cat; echo why >&2; exit 3", limit).await.unwrap();
        assert_eq!((outcome.stdout.as_slice(), outcome.status.code()), (&b"input"[..], Some(3)));
        assert!(failure(&outcome).starts_with("why"));
        let Err(Error::Unknown(message)) = run_script("exec cat /dev/zero", limit).await else { panic!() };
        assert!(message.contains("exceeds"), "{message}");
        // One that leaves a child on its output ends with the program, not with the child.
        let begun = std::time::Instant::now();
        let outcome = run_script("sleep 60 & echo done", limit).await.unwrap();
        assert_eq!(outcome.stdout, b"done\n");
        assert!(begun.elapsed() < limit);
    }

    #[tokio::test]
    async fn a_program_that_hangs_is_killed_with_its_children() {
        let folder = tempfile::tempdir().unwrap();
        let fifo = folder.path().join("alive");
        sys::fifo::create(&fifo, 0o600).unwrap();
        // Parent and child hold the fifo open for writing.
        let path = script(folder.path(), &format!("exec 9>{}; echo stuck >&2; sleep 1000", fifo.display()));
        let reader = sys::fifo::open_reader(&fifo).unwrap();
        let limit = Duration::from_millis(500);
        let Err(Error::DeadlineExceeded(message)) = run(Command::new(path), Vec::new(), limit).await else {
            panic!("it did not hang")
        };
        assert!(message.contains("stuck"), "{message}");
        let deadline = std::time::Instant::now() + Duration::from_secs(20);
        // End-of-file only when no writer is left.
        let mut buffer = [0; 8];
        while !matches!(sys::fifo::read(std::os::fd::AsFd::as_fd(&reader), &mut buffer), Ok(0)) {
            assert!(std::time::Instant::now() < deadline, "a child is left");
            tokio::task::yield_now().await;
        }
    }
}
