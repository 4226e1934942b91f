//! A trace: where the time of one command goes, told by every process on its way.
//!
//! ```text
//! file    <state>/traces/TRACE             made and removed by the client that asks; whoever has a span appends a line
//! line    SPAN PARENT PID BEGAN LENGTH PROCESS NAME    ids in hex; ns of CLOCK_BOOTTIME, which all processes share
//! gRPC    traceparent: 00-TRACE-SPAN-01    as the W3C has it
//! ttrpc   traceparent, and gantry-trace: the file
//! start   the same two as environment of a shim's `start`: TRACEPARENT, GANTRY_TRACE
//! ```
//!
//! Invariants: only the client makes a trace's file, so that a `traceparent` of somebody else's leaves nothing behind; a line is
//! one write, and lines do not mix. What has no trace costs a look at a variable of its task. A span that cannot be written
//! is dropped: nothing fails for the sake of a trace.

use std::fmt::Write as _;
use std::fs::{File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use rustix::fs::OFlags;
use rustix::time::{ClockId, clock_gettime};

/// The header, on gRPC and on ttrpc, that names a trace and the span that a request is part of.
pub const PARENT_HEADER: &str = "traceparent";
/// The ttrpc header with the trace's file.
pub const FILE_HEADER: &str = "gantry-trace";
/// The environment of a shim's `start`: what the two headers are elsewhere.
pub const ENVIRONMENT: [&str; 2] = ["TRACEPARENT", "GANTRY_TRACE"];
/// The name of the span at whose end a container's program runs.
pub const LET_RUN: &str = "let the program run";

/// This process in the spans that it writes, and when it began.
static PROCESS: OnceLock<(&str, u64)> = OnceLock::new();

tokio::task_local! {
    static CURRENT: Context;
}

/// A place in a trace: what is spanned here is part of `span`.
#[derive(Clone, Debug)]
pub struct Context {
    trace: Arc<Trace>,
    span: u64,
}

#[derive(Debug)]
struct Trace {
    id: String,
    path: PathBuf,
    file: File,
}

/// A span that has begun; it ends, and is written, when this is dropped.
#[derive(Debug)]
pub struct Open {
    within: Context,
    id: u64,
    name: String,
    began: u64,
}

/// A span as it was written.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Span {
    /// Its own id.
    pub id: u64,
    /// What it is part of; 0 for nothing.
    pub parent: u64,
    /// The process that it is of.
    pub pid: u32,
    /// What that process is.
    pub process: String,
    /// What was done.
    pub name: String,
    /// When it began, in ns of CLOCK_BOOTTIME.
    pub began: u64,
    /// How long it took, in ns.
    pub length: u64,
}

/// Nanoseconds since the machine's start.
#[must_use]
pub fn now() -> u64 {
    let time = clock_gettime(ClockId::Boottime);
    time.tv_sec.unsigned_abs() * 1_000_000_000 + time.tv_nsec.unsigned_abs()
}

/// Says what this process is. To be called first of all, as it also notes when the process began.
pub fn this_is(process: &'static str) {
    let _ = PROCESS.set((process, now()));
}

/// When this process began, as far as it said so.
#[must_use]
pub fn process_began() -> u64 {
    PROCESS.get().map_or_else(now, |(_, began)| *began)
}

/// The trace that the current task is part of.
#[must_use]
pub fn current() -> Option<Context> {
    CURRENT.try_with(Clone::clone).ok()
}

/// Does work as a part of a trace, if there is one: also in a task or thread other than the caller's.
pub async fn carry<F: Future>(context: Option<Context>, work: F) -> F::Output {
    match context {
        Some(context) => CURRENT.scope(context, Box::pin(work)).await,
        None => work.await,
    }
}

/// The same for work that blocks.
pub fn carry_blocking<T>(context: Option<Context>, work: impl FnOnce() -> T) -> T {
    match context {
        Some(context) => CURRENT.sync_scope(context, work),
        None => work(),
    }
}

/// Does work as a span of the current trace, if there is one.
pub async fn span<F: Future>(name: &str, work: F) -> F::Output {
    match current() {
        Some(context) => {
            let open = context.open(name);
            CURRENT.scope(open.inside(), Box::pin(work)).await
        }
        None => work.await,
    }
}

/// The same for work that blocks.
pub fn span_blocking<T>(name: &str, work: impl FnOnce() -> T) -> T {
    match current() {
        Some(context) => {
            let open = context.open(name);
            CURRENT.sync_scope(open.inside(), work)
        }
        None => work(),
    }
}

impl Context {
    /// Begins a trace, as a client does: makes its file in this folder.
    ///
    /// # Errors
    /// When there is no such folder, or the file cannot be made.
    pub fn create(folder: &Path) -> io::Result<Self> {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/uuid")?.trim().replace('-', "");
        let path = folder.join(&id);
        let file = OpenOptions::new().append(true).create_new(true).mode(0o600).open(&path)?;
        Ok(Context { trace: Arc::new(Trace { id, path, file }), span: 0 })
    }

    /// The trace that a request's `traceparent` names, if a client has begun it in this folder.
    #[must_use]
    pub fn join(parent: &str, folder: &Path) -> Option<Self> {
        let (id, _) = split(parent)?;
        Self::open_file(parent, &folder.join(id))
    }

    /// The trace in a file that is known, and the place in it that `parent` says.
    #[must_use]
    pub fn open_file(parent: &str, path: &Path) -> Option<Self> {
        let (id, span) = split(parent)?;
        let flags = OFlags::NOFOLLOW.union(OFlags::NONBLOCK).bits().cast_signed();
        let file = OpenOptions::new().append(true).custom_flags(flags).open(path).ok()?;
        let is_file = file.metadata().is_ok_and(|data| data.is_file());
        let trace = Trace { id: id.to_owned(), path: path.to_owned(), file };
        is_file.then(|| Context { trace: Arc::new(trace), span })
    }

    /// The trace that this process was started for, by its environment.
    #[must_use]
    pub fn of_environment() -> Option<Self> {
        let [parent, path] = ENVIRONMENT.map(std::env::var_os);
        Self::open_file(parent?.to_str()?, Path::new(&path?))
    }

    /// The id of the trace.
    #[must_use]
    pub fn id(&self) -> &str {
        &self.trace.id
    }

    /// The file of the trace.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.trace.path
    }

    /// This place, as a `traceparent`.
    #[must_use]
    pub fn parent(&self) -> String {
        format!("00-{}-{:016x}-01", self.trace.id, self.span)
    }

    /// Begins a span.
    #[must_use]
    pub fn open(&self, name: &str) -> Open {
        Open { within: self.clone(), id: new_id(), name: name.to_owned(), began: now() }
    }

    /// Notes what another process did, as far as it was seen from here.
    pub fn note(&self, process: &str, pid: u32, name: &str, began: u64) {
        self.write(new_id(), process, pid, name, began);
    }

    fn write(&self, id: u64, process: &str, pid: u32, name: &str, began: u64) {
        let mut line = String::new();
        let length = now().saturating_sub(began);
        let name = name.replace('\n', " ");
        let _ = writeln!(line, "{id:x} {:x} {pid} {began} {length} {process} {name}", self.span);
        let _ = (&self.trace.file).write_all(line.as_bytes());
    }
}

impl Open {
    /// The place within this span.
    #[must_use]
    pub fn inside(&self) -> Context {
        Context { span: self.id, ..self.within.clone() }
    }

    /// The same span, begun at another time.
    #[must_use]
    pub fn since(mut self, began: u64) -> Self {
        self.began = began;
        self
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        let process = PROCESS.get().map_or("?", |(name, _)| *name);
        self.within.write(self.id, process, std::process::id(), &self.name, self.began);
    }
}

/// An id that no other span of any process has.
fn new_id() -> u64 {
    static COUNT: AtomicU32 = AtomicU32::new(1);
    u64::from(std::process::id()) << 32 | u64::from(COUNT.fetch_add(1, Ordering::Relaxed))
}

/// The spans in a trace's file, in the order in which they began, the longer first.
///
/// # Errors
/// When it cannot be read; a line that cannot be understood is left out.
pub fn read(path: &Path) -> io::Result<Vec<Span>> {
    let text = std::fs::read_to_string(path)?;
    let mut spans: Vec<Span> = text.lines().filter_map(Span::parse).collect();
    spans.sort_by_key(|span| (span.began, std::cmp::Reverse(span.length)));
    Ok(spans)
}

impl Span {
    fn parse(line: &str) -> Option<Self> {
        let mut parts = line.splitn(7, ' ');
        let mut next = || parts.next();
        Some(Span {
            id: u64::from_str_radix(next()?, 16).ok()?,
            parent: u64::from_str_radix(next()?, 16).ok()?,
            pid: next()?.parse().ok()?,
            began: next()?.parse().ok()?,
            length: next()?.parse().ok()?,
            process: next()?.to_owned(),
            name: next()?.to_owned(),
        })
    }
}

/// Trace and span of a `traceparent`; None unless it is one, of 32 and 16 digits.
fn split(parent: &str) -> Option<(&str, u64)> {
    let mut parts = parent.split('-');
    let (_version, trace, span) = (parts.next()?, parts.next()?, parts.next()?);
    let is_hex = |text: &str, length: usize| {
        text.len() == length && text.bytes().all(|byte| matches!(byte, b'0'..=b'9' | b'a'..=b'f'))
    };
    (is_hex(trace, 32) && is_hex(span, 16)).then_some(())?;
    Some((trace, u64::from_str_radix(span, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn spans_are_nested_across_tasks_and_requests() {
        let folder = tempfile::tempdir().unwrap();
        let trace = Context::create(folder.path()).unwrap();
        let header = carry(Some(trace.clone()), async {
            span("outer", async {
                let here = current();
                tokio::spawn(carry(here, span("task", async {}))).await.unwrap();
                span_blocking("blocking", || ());
                current().unwrap().parent()
            })
            .await
        })
        .await;
        // As another process joins it.
        let joined = Context::join(&header, folder.path()).unwrap();
        carry(Some(joined.clone()), span("server", async {})).await;
        joined.note("runc", 7, "create it", now());
        let spans = read(trace.path()).unwrap();
        let find = |name: &str| spans.iter().find(|span| span.name == name).unwrap();
        assert_eq!(find("outer").parent, 0);
        for name in ["task", "blocking", "server", "create it"] {
            assert_eq!(find(name).parent, find("outer").id, "{name}");
        }
        assert!(find("task").began >= find("outer").began);
        assert_eq!((find("create it").pid, find("create it").process.as_str()), (7, "runc"));
    }

    #[tokio::test]
    async fn without_a_trace_nothing_is_written() {
        assert!(current().is_none());
        span("nothing", async { assert!(current().is_none()) }).await;
        let folder = tempfile::tempdir().unwrap();
        let parent = format!("00-{}-{}-01", "a".repeat(32), "b".repeat(16));
        assert!(Context::join(&parent, folder.path()).is_none());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn only_a_file_that_a_traceparent_can_name_is_opened() {
        let folder = tempfile::tempdir().unwrap();
        let id = "a".repeat(32);
        let target = folder.path().join("target");
        std::fs::write(&target, "").unwrap();
        std::os::unix::fs::symlink(&target, folder.path().join(&id)).unwrap();
        let span = "b".repeat(16);
        for bad in ["", "00", "00-../../etc/passwd-1-01", "00-x-y-01", &format!("00-{id}-{span}-01")] {
            assert!(Context::join(bad, folder.path()).is_none(), "{bad}");
        }
        std::fs::remove_file(folder.path().join(&id)).unwrap();
        std::fs::write(folder.path().join(&id), "").unwrap();
        assert!(Context::join(&format!("00-{id}-{span}-01"), folder.path()).is_some());
    }
}
