//! Cases: which are run, what becomes of them, one line each, and the line that counts them.
//!
//! Each case has a thread of its own and a limit. One that is still there at its limit has failed: what its processes wait for is
//! said, they are killed, and with that whatever the case was waiting for comes to an end. One that does not end even then is
//! left behind, and the next case begins.

use std::fmt::Write as _;
use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::process::ExitCode;
use std::sync::Mutex;
use std::sync::mpsc::{self, RecvTimeoutError};
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

/// How long a case may take. Most take seconds; the machine may be small and busy.
pub(crate) const CASE_MAX: Duration = Duration::from_secs(300);
/// How long one that was given up may take to end.
const END_MAX: Duration = Duration::from_secs(90);

/// Where the panic of a case left its message: the hook has it, and what is caught has not always.
static SAID: Mutex<String> = Mutex::new(String::new());

/// What became of a case that did not fail.
pub(crate) enum Outcome {
    Passed,
    /// What it was to test did not come about, so that it shows nothing; why.
    Moot(String),
}

/// A run of cases.
pub(crate) struct Run {
    filter: String,
    pub(crate) quick: bool,
    passed: usize,
    moot: usize,
    skipped: usize,
    failed: Vec<String>,
    begun: Instant,
}

impl Run {
    pub(crate) fn new(filter: String, quick: bool) -> Self {
        std::panic::set_hook(Box::new(|info| {
            let mut said = SAID.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            // The first is the cause.
            if said.is_empty() {
                *said = info.to_string();
            }
        }));
        Run { filter, quick, passed: 0, moot: 0, skipped: 0, failed: Vec::new(), begun: Instant::now() }
    }

    /// Whether cases whose names begin so may be wanted.
    pub(crate) fn wants_of(&self, prefix: &str) -> bool {
        self.filter.is_empty() || prefix.contains(&self.filter) || self.filter.starts_with(prefix)
    }

    pub(crate) fn wants(&self, name: &str) -> bool {
        name.contains(&self.filter)
    }

    /// Runs a case. It gets `subject`, and gives it back unless it failed.
    pub(crate) fn case<S: Send + 'static>(
        &mut self,
        name: &str,
        subject: S,
        work: impl FnOnce(&mut S) -> Outcome + Send + 'static,
    ) -> Option<S> {
        self.case_within(CASE_MAX, name, subject, work)
    }

    /// The same with a limit of its own.
    pub(crate) fn case_within<S: Send + 'static>(
        &mut self,
        limit: Duration,
        name: &str,
        mut subject: S,
        work: impl FnOnce(&mut S) -> Outcome + Send + 'static,
    ) -> Option<S> {
        if !self.wants(name) {
            return Some(subject);
        }
        SAID.lock().unwrap().clear();
        let begun = Instant::now();
        let (sender, ended) = mpsc::channel();
        let thread = std::thread::Builder::new().name(name.to_owned()).spawn(move || {
            // Dropped by the panic, a subject cleans up after itself and complains of nothing.
            let ended = catch_unwind(AssertUnwindSafe(move || {
                let outcome = work(&mut subject);
                (outcome, subject)
            }));
            // Nobody listens any more if it was left behind.
            let _ = sender.send(ended);
        });
        let thread = thread.expect("a thread for the case");
        let ended = match ended.recv_timeout(limit) {
            Err(RecvTimeoutError::Timeout) => {
                let mut said = format!("not ended after {limit:?}; its processes:\n{}", kill_children());
                if ended.recv_timeout(END_MAX).is_ok() {
                    let _ = thread.join();
                } else {
                    said += "\nit does not end without them either, and is left behind";
                }
                let cause = std::mem::take(&mut *SAID.lock().unwrap());
                *SAID.lock().unwrap() = if cause.is_empty() { said } else { format!("{said}\n{cause}") };
                None
            }
            ended => {
                let _ = thread.join();
                ended.ok().and_then(Result::ok)
            }
        };
        let took = begun.elapsed().as_secs_f32();
        match ended {
            Some((Outcome::Passed, subject)) => {
                self.passed += 1;
                println!("ok     {took:5.1}s  {name}");
                Some(subject)
            }
            Some((Outcome::Moot(why), subject)) => {
                self.moot += 1;
                println!("moot   {took:5.1}s  {name}: {why}");
                Some(subject)
            }
            None => {
                self.failed.push(name.to_owned());
                println!("FAILED {took:5.1}s  {name}\n{}", SAID.lock().unwrap());
                None
            }
        }
    }

    /// A case of its own.
    pub(crate) fn one(&mut self, name: &str, work: impl FnOnce() + Send + 'static) {
        self.one_within(CASE_MAX, name, work);
    }

    /// The same with a limit of its own.
    pub(crate) fn one_within(&mut self, limit: Duration, name: &str, work: impl FnOnce() + Send + 'static) {
        self.case_within(limit, name, (), |()| {
            work();
            Outcome::Passed
        });
    }

    /// A case that others need, whatever the filter says; what it says to have found, even if it fails afterwards.
    pub(crate) fn always<T: Default + Send + 'static>(
        &mut self,
        name: &str,
        work: impl FnOnce(&mut dyn FnMut(T)) + Send + 'static,
    ) -> T {
        let filter = std::mem::take(&mut self.filter);
        let (sender, found) = mpsc::channel();
        self.one(name, move || {
            work(&mut |found| {
                let _ = sender.send(found);
            });
        });
        self.filter = filter;
        found.try_recv().unwrap_or_default()
    }

    /// A case, or all that begin so, that is wanted and cannot be had here.
    pub(crate) fn skip(&mut self, name: &str, why: &str) {
        self.skipped += 1;
        println!("skip           {name}: {why}");
    }

    /// Whether nothing failed.
    pub(crate) fn summary(self) -> ExitCode {
        let cases = self.passed + self.moot + self.skipped + self.failed.len();
        for name in &self.failed {
            println!("failed: {name}");
        }
        println!(
            "chaos: {cases} cases, {} passed, {} failed, {} moot (the point was not reached again), {} skipped, in {} s",
            self.passed,
            self.failed.len(),
            self.moot,
            self.skipped,
            self.begun.elapsed().as_secs()
        );
        // A run of nothing shows nothing.
        if self.failed.is_empty() && cases > 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE }
    }
}

/// Kills the processes that this one has started; what each of them was, and what its threads waited for.
fn kill_children() -> String {
    let own = std::process::id().to_string();
    let mut said = String::new();
    for entry in fs::read_dir("/proc").into_iter().flatten().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|pid| pid.parse::<i32>().ok()) else { continue };
        let stat = fs::read_to_string(entry.path().join("stat")).unwrap_or_default();
        // After the name: the state, and the parent.
        if stat.rsplit(')').next().and_then(|rest| rest.split_whitespace().nth(1)) != Some(&own) {
            continue;
        }
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let _ = writeln!(said, "{pid}: {}", String::from_utf8_lossy(&command).replace('\0', " "));
        for task in fs::read_dir(entry.path().join("task")).into_iter().flatten().flatten() {
            let read = |name| fs::read_to_string(task.path().join(name)).unwrap_or_default();
            let state = read("stat").rsplit(')').next().map(|rest| rest.chars().take(2).collect::<String>());
            let (name, wchan, call) = (read("comm"), read("wchan"), read("syscall"));
            let _ = writeln!(
                said,
                "  {}{} in {wchan}, system call {}",
                name.trim(),
                state.unwrap_or_default(),
                call.split_whitespace().next().unwrap_or_default()
            );
        }
        let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
    }
    said
}
