//! One run of one plugin: its program, its environment, its limits, and what it says.
//!
//! A plugin of a pod has for its stdin a file that is locked for as long as anybody has it open. So one that outlived the
//! engine that started it is waited for by the next engine, before that undoes what it is still doing.
//!
//! Invariants: a plugin that is given up, or whose run is dropped, is killed with its process group; what a plugin says is
//! bounded, whatever it prints.

use std::ffi::OsString;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{self, Seek as _, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::time::{Duration, Instant};

use rustix::process::{Pid, Signal, kill_process_group};
use tokio::io::{AsyncRead, AsyncReadExt as _};
use tokio::process::{Child, Command};
use tracing::{debug, warn};

/// The most that a plugin may print; a result is some hundred bytes.
const OUTPUT_MAX: usize = 4 * 1024 * 1024;
/// The most of its complaints that is kept.
const ERRORS_MAX: usize = 64 * 1024;
/// The most of what it said that goes into a message.
const SAID_MAX: usize = 2 * 1024;
/// How long what it printed is waited for when it is over, as somebody else may have its pipe.
const DRAIN: Duration = Duration::from_secs(2);
/// How often, and how long apart, a program is tried that somebody is writing: an installation replaces it.
const BUSY: (u32, Duration) = (50, Duration::from_millis(100));

/// Where programs are when nobody says it: plugins run iptables and others.
const DEFAULT_PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// What is asked of a plugin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verb {
    Add,
    Check,
    Del,
    Gc,
    Status,
    Version,
}

impl Verb {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Verb::Add => "ADD",
            Verb::Check => "CHECK",
            Verb::Del => "DEL",
            Verb::Gc => "GC",
            Verb::Status => "STATUS",
            Verb::Version => "VERSION",
        }
    }
}

/// Whom it is about; nobody for GC and STATUS.
#[derive(Debug, Clone, Default)]
pub(super) struct Target {
    pub(super) container: String,
    pub(super) netns: String,
    pub(super) interface: String,
    pub(super) arguments: String,
}

/// Why a plugin did not do what was asked.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Failure {
    /// It has no program, or one that cannot be started. It did nothing.
    #[error("{0}")]
    NotRun(String),
    /// It said so itself, in the form of CNI.
    #[error("{message}{} (code {code})", more(.details))]
    Said {
        /// The number: below 100 they are CNI's.
        code: u64,
        /// What it is.
        message: String,
        /// More of it.
        details: String,
    },
    /// It ended, was killed or was given up in another way.
    #[error("{0}")]
    Broken(String),
}

fn more(details: &str) -> String {
    if details.is_empty() { String::new() } else { format!("; {details}") }
}

impl Failure {
    /// CNI's number for a container that is not known, which needs no cleaning up.
    const UNKNOWN_CONTAINER: u64 = 3;

    /// Whether it says that there is nothing to clean up.
    pub(super) fn is_nothing_there(&self, netns_is_gone: bool) -> bool {
        let Failure::Said { code, message, details } = self else { return false };
        // Older plugins fail on a namespace that is gone, and have no number for it.
        let gone = |text: &String| text.contains("no such file or directory") || text.contains("not found");
        *code == Self::UNKNOWN_CONTAINER || netns_is_gone && (gone(message) || gone(details))
    }
}

/// The folders that plugins are looked for in, and how long one may take.
#[derive(Debug, Clone)]
pub(super) struct Runner {
    pub(super) folders: Vec<PathBuf>,
    /// The folder of what plugins of pods read: a file for each pod.
    pub(super) inputs: PathBuf,
    pub(super) limit: Duration,
}

impl Runner {
    /// The program of a plugin: the first of this name.
    pub(super) fn find(&self, kind: &str) -> Result<PathBuf, Failure> {
        let mut programs = self.folders.iter().map(|folder| folder.join(kind));
        programs.find(|program| program.is_file()).ok_or_else(|| {
            let folders: Vec<String> =
                self.folders.iter().map(|folder| folder.display().to_string()).collect();
            let folders = folders.join(", ");
            Failure::NotRun(format!(
                "its program is not found in {folders}: install it, or correct the folders"
            ))
        })
    }

    /// Runs a plugin; what it printed, when it ended well.
    pub(super) async fn run(
        &self,
        kind: &str,
        verb: Verb,
        target: &Target,
        stdin: &[u8],
        limit: Duration,
    ) -> Result<Vec<u8>, Failure> {
        let program = self.find(kind)?;
        let input = self.input(&target.container, stdin).await;
        let input =
            input.map_err(|error| Failure::NotRun(format!("its input cannot be written: {error}")))?;
        let mut child = self.start(&program, verb, target, input).await?;
        let mut group = Group(child.id().and_then(|pid| Pid::from_raw(pid.cast_signed())));
        let (output, errors) = (child.stdout.take(), child.stderr.take());
        let (mut stdout, mut stderr) = (Vec::new(), Vec::new());
        let ended = {
            let read = async { take(output, &mut stdout, OUTPUT_MAX, Err(TooMuch)).await };
            let listen = async { take(errors, &mut stderr, ERRORS_MAX, Ok(())).await };
            let streams = async { tokio::try_join!(read, listen).map(drop) };
            tokio::pin!(streams);
            tokio::time::timeout(limit, async {
                tokio::select! {
                    status = child.wait() => {
                        let _ = tokio::time::timeout(DRAIN, &mut streams).await;
                        Ended::of(status)
                    }
                    said = &mut streams => match said {
                        Ok(()) => Ended::of(child.wait().await),
                        Err(TooMuch) => Ended::TooMuch,
                    },
                }
            })
            .await
            .unwrap_or(Ended::Late)
        };
        match ended {
            Ended::Itself(_) => group.0 = None,
            Ended::Late | Ended::TooMuch | Ended::Lost(_) => {
                drop(group);
                let _ = tokio::time::timeout(DRAIN, child.wait()).await;
            }
        }
        let said = excerpt(&stderr);
        let until_then =
            if said.is_empty() { String::new() } else { format!("; until then it said: {said}") };
        match ended {
            Ended::Itself(status) if status.success() => {
                if !said.is_empty() {
                    debug!(
                        plugin = kind,
                        verb = verb.as_str(),
                        container = target.container,
                        "a plugin says: {said}"
                    );
                }
                Ok(stdout)
            }
            Ended::Itself(status) => {
                if !said.is_empty() {
                    warn!(
                        plugin = kind,
                        verb = verb.as_str(),
                        container = target.container,
                        "a plugin fails: {said}"
                    );
                }
                Err(failure(status, &stdout, &stderr))
            }
            Ended::Late => {
                Err(Failure::Broken(format!("it did not end within {limit:?} and was killed{until_then}")))
            }
            Ended::TooMuch => Err(Failure::Broken(format!(
                "it printed more than {OUTPUT_MAX} bytes and was killed{until_then}"
            ))),
            Ended::Lost(error) => Err(Failure::Broken(format!("it cannot be waited for: {error}"))),
        }
    }

    /// What a plugin reads. While an earlier one of the pod is still running, of an engine that was killed, this waits.
    async fn input(&self, pod: &str, stdin: &[u8]) -> io::Result<File> {
        if pod.is_empty() {
            return sys::process::memory_file_of(stdin);
        }
        if !self.inputs.is_dir() {
            sys::fs::create_dir_all(&self.inputs, 0o700)?;
        }
        let until = Instant::now() + self.limit;
        loop {
            let mut options = OpenOptions::new();
            let mut file =
                options.read(true).write(true).create(true).mode(0o600).open(self.inputs.join(pod))?;
            match file.try_lock() {
                Ok(()) => {
                    file.set_len(0)?;
                    file.write_all(stdin)?;
                    file.rewind()?;
                    return Ok(file);
                }
                Err(TryLockError::Error(error)) => return Err(error),
                Err(TryLockError::WouldBlock) if Instant::now() < until => {
                    tokio::time::sleep(BUSY.1).await;
                }
                Err(TryLockError::WouldBlock) => {
                    warn!(
                        pod,
                        "an earlier CNI plugin of the pod is still running; it is not waited for any longer"
                    );
                    return sys::process::memory_file_of(stdin);
                }
            }
        }
    }

    /// Forgets a pod that has nothing any more. To be called while nothing else of it goes on.
    pub(super) fn forget(&self, pod: &str) {
        let _ = std::fs::remove_file(self.inputs.join(pod));
    }

    async fn start(
        &self,
        program: &Path,
        verb: Verb,
        target: &Target,
        input: File,
    ) -> Result<Child, Failure> {
        let mut command = Command::new(program);
        let folders = std::env::join_paths(&self.folders).unwrap_or_default();
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_else(|| OsString::from(DEFAULT_PATH)))
            .env("CNI_COMMAND", verb.as_str())
            .env("CNI_CONTAINERID", &target.container)
            .env("CNI_NETNS", &target.netns)
            .env("CNI_IFNAME", &target.interface)
            .env("CNI_ARGS", &target.arguments)
            .env("CNI_PATH", folders)
            .current_dir("/")
            .stdin(input)
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .process_group(0)
            .kill_on_drop(true);
        let mut tries = 0;
        loop {
            match command.spawn() {
                Ok(child) => return Ok(child),
                Err(error) if error.kind() == io::ErrorKind::ExecutableFileBusy && tries < BUSY.0 => {
                    tries += 1;
                    tokio::time::sleep(BUSY.1).await;
                }
                Err(error) => {
                    return Err(Failure::NotRun(format!(
                        "{} cannot be executed: {error}",
                        program.display()
                    )));
                }
            }
        }
    }
}

/// How a run ended.
enum Ended {
    Itself(ExitStatus),
    Late,
    TooMuch,
    Lost(io::Error),
}

impl Ended {
    fn of(status: io::Result<ExitStatus>) -> Self {
        status.map_or_else(Ended::Lost, Ended::Itself)
    }
}

/// A process group that is killed when nobody waits for it any more.
struct Group(Option<Pid>);

impl Drop for Group {
    fn drop(&mut self) {
        if let Some(pid) = self.0 {
            let _ = kill_process_group(pid, Signal::KILL);
        }
    }
}

struct TooMuch;

/// Reads to the end and keeps up to `most` bytes. What is beyond is read and dropped, or is an error, as `beyond` says.
async fn take(
    pipe: Option<impl AsyncRead + Unpin>,
    into: &mut Vec<u8>,
    most: usize,
    beyond: Result<(), TooMuch>,
) -> Result<(), TooMuch> {
    let Some(mut pipe) = pipe else { return Ok(()) };
    let mut chunk = vec![0; 16 * 1024];
    loop {
        match pipe.read(&mut chunk).await {
            Ok(0) | Err(_) => return Ok(()),
            Ok(count) => {
                let room = count.min(most - into.len());
                into.extend_from_slice(&chunk[..room]);
                if room < count && beyond.is_err() {
                    return Err(TooMuch);
                }
            }
        }
    }
}

/// What a plugin that failed says of it.
fn failure(status: ExitStatus, stdout: &[u8], stderr: &[u8]) -> Failure {
    #[derive(serde::Deserialize)]
    struct Said {
        #[serde(default)]
        code: u64,
        #[serde(default)]
        msg: String,
        #[serde(default)]
        details: String,
    }
    match serde_json::from_slice::<Said>(stdout) {
        Ok(said) if said.code != 0 || !said.msg.is_empty() => Failure::Said {
            code: said.code,
            message: excerpt(said.msg.as_bytes()),
            details: excerpt(said.details.as_bytes()),
        },
        _ => {
            let said = excerpt(if stdout.trim_ascii().is_empty() { stderr } else { stdout });
            let said = if said.is_empty() { "and said nothing".into() } else { format!("and said: {said}") };
            Failure::Broken(format!("it ended with {status} {said}"))
        }
    }
}

/// The last of what was said, fit for a line of a log.
fn excerpt(bytes: &[u8]) -> String {
    let bytes = bytes.trim_ascii();
    let last = &bytes[bytes.len().saturating_sub(SAID_MAX)..];
    let text = String::from_utf8_lossy(last);
    text.chars().map(|c| if c.is_control() { ' ' } else { c }).collect::<String>().trim().to_owned()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use std::os::unix::process::ExitStatusExt as _;

    use super::*;

    #[test]
    fn what_a_plugin_says_of_its_failure_is_bounded_and_on_one_line() {
        let failed = ExitStatus::from_raw(256);
        let said =
            failure(failed, br#"{"cniVersion":"1.0.0","code":11,"msg":"try\nlater","details":"d"}"#, b"");
        assert_eq!(said.to_string(), "try later; d (code 11)");
        let long = format!(r#"{{"code":7,"msg":"{}"}}"#, "x".repeat(1 << 20));
        assert!(failure(failed, long.as_bytes(), b"").to_string().len() < 3_000);
        for (stdout, stderr, expected) in [
            ("", "", "said nothing"),
            ("", "panic: x", "panic: x"),
            ("{}", "", "{}"),
            (r#"{"code":"1"}"#, "", "code"),
            ("\u{1b}[31mno", "", "no"),
        ] {
            let failure = failure(failed, stdout.as_bytes(), stderr.as_bytes());
            assert!(matches!(&failure, Failure::Broken(text) if text.contains(expected)), "{failure}");
            assert!(!failure.to_string().contains(char::is_control));
        }
    }

    #[test]
    fn nothing_there_is_said_by_a_number_or_of_a_namespace_that_is_gone() {
        let said =
            |code, message: &str| Failure::Said { code, message: message.into(), details: String::new() };
        assert!(said(3, "who?").is_nothing_there(false));
        assert!(said(999, "open: no such file or directory").is_nothing_there(true));
        assert!(!said(999, "open: no such file or directory").is_nothing_there(false));
        assert!(!Failure::NotRun("not found".into()).is_nothing_there(true));
    }

    proptest::proptest! {
        #[test]
        fn any_output_of_a_failure_is_a_message(stdout: Vec<u8>, stderr: Vec<u8>) {
            let text = failure(ExitStatus::from_raw(256), &stdout, &stderr).to_string();
            proptest::prop_assert!(!text.contains(char::is_control));
        }
    }
}
