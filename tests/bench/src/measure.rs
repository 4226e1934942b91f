//! What a piece of work costs: time, processor time of engine and client, memory.
//!
//! An engine runs in a control group of its own, so that its processor time holds what it starts as well (shims, `unpigz`,
//! helpers that mount), ended or not; containers have groups of their own. A client's time is what the kernel says of ended
//! children, and of this program's own thread where the client is a call from here. Peak memory of the engine is the kernel's
//! high-water mark (`VmHWM`), set back at the start. The proportional set (`PSS`) of all processes in the group, and the
//! client's high-water mark, are read every 20 ms during longer work; reading is done by this program and counted nowhere.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail};
use nix::sys::resource::{UsageWho, getrusage};
use serde::{Deserialize, Serialize};

/// Something that is measured.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Measure {
    /// From the client's start to its end.
    Wall,
    /// The same, and the time until the file system has it all on disk.
    Synced,
    /// Processor time of the engine, what it started, and the client.
    Cpu,
    /// The part of that which is the engine's.
    CpuEngine,
    /// The engine's high-water mark.
    Peak,
    /// The sum of the engine's and the client's.
    PeakBoth,
    /// The greatest proportional set seen, of the engine and what it started.
    Pss,
    /// The same of the engine, its shims and pause processes, with pods that do nothing.
    PssIdle,
    /// From the request that creates a task to the answer that its process runs.
    Start,
    /// From the request that kills a task's process to the answer that the task is deleted.
    End,
    /// From an engine's start to the answer that lists all tasks that an earlier one has left.
    Restart,
    /// The engine's proportional set, while nothing is done.
    EnginePss,
    /// What the engine has in memory.
    EngineRss,
    /// The engine's threads.
    EngineThreads,
    /// The engine's open descriptors.
    EngineFiles,
    /// The proportional set of a shim, the mean of all.
    ShimPss,
    /// What a shim has in memory, the mean of all.
    ShimRss,
    /// A shim's threads, the mean of all.
    ShimThreads,
    /// A shim's open descriptors, the mean of all.
    ShimFiles,
    /// Operations in a second.
    Rate,
    /// Megabytes in a second.
    Throughput,
    /// What was sent and never came.
    Lost,
}

impl Measure {
    pub(crate) fn title(self) -> &'static str {
        match self {
            Measure::Wall => "wall time",
            Measure::Synced => "wall time until on disk",
            Measure::Cpu => "CPU time, engine and client",
            Measure::CpuEngine => "CPU time, engine alone",
            Measure::Peak => "peak memory of the engine",
            Measure::PeakBoth => "peak memory, engine and client",
            Measure::Pss => "peak PSS of the engine and its children",
            Measure::PssIdle => "PSS of engine, shims and pauses, pods idle",
            Measure::Start => "create and start",
            Measure::End => "kill and delete",
            Measure::Restart => "start until all tasks are listed",
            Measure::EnginePss => "PSS of the engine",
            Measure::EngineRss => "RSS of the engine",
            Measure::EngineThreads => "threads of the engine",
            Measure::EngineFiles => "descriptors of the engine",
            Measure::ShimPss => "PSS of a shim",
            Measure::ShimRss => "RSS of a shim",
            Measure::ShimThreads => "threads of a shim",
            Measure::ShimFiles => "descriptors of a shim",
            Measure::Rate => "operations in a second",
            Measure::Throughput => "throughput",
            Measure::Lost => "lost",
        }
    }

    /// The unit of the numbers, where they have one.
    pub(crate) fn unit(self) -> &'static str {
        match self {
            Measure::Wall | Measure::Synced | Measure::Cpu | Measure::CpuEngine => "s",
            Measure::Start | Measure::End | Measure::Restart => "s",
            Measure::Peak | Measure::PeakBoth | Measure::Pss | Measure::PssIdle => "MiB",
            Measure::EnginePss | Measure::EngineRss | Measure::ShimPss | Measure::ShimRss => "MiB",
            Measure::Throughput => "MB/s",
            Measure::Rate => "/s",
            Measure::EngineThreads | Measure::EngineFiles => "",
            Measure::ShimThreads | Measure::ShimFiles | Measure::Lost => "",
        }
    }
}

/// What one piece of work cost, and how large it was: of what, its case says.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sample {
    pub(crate) size: usize,
    pub(crate) values: Vec<(Measure, f64)>,
}

impl Sample {
    /// Work whose size does not vary.
    pub(crate) fn of(values: impl Into<Vec<(Measure, f64)>>) -> Self {
        Sample { size: 0, values: values.into() }
    }

    /// The same, of this size.
    pub(crate) fn at(self, size: usize) -> Self {
        Sample { size, ..self }
    }

    /// One value of it; 0 when it has none.
    pub(crate) fn get(&self, measure: Measure) -> f64 {
        self.values.iter().find(|(of, _)| *of == measure).map_or(0.0, |(_, value)| *value)
    }
}

/// A control group that counts processor time.
#[derive(Debug)]
pub(crate) struct Cgroup(PathBuf);

impl Cgroup {
    /// A new one: in the hierarchy `cpuacct`, or else in the unified one.
    pub(crate) fn new(name: &str) -> Result<Self> {
        let table = fs::read_to_string("/proc/self/mountinfo").context("cannot read the mounts")?;
        let find = |wanted: fn(&str, &str) -> bool| {
            table.lines().find_map(|line| {
                let (left, right) = line.split_once(" - ")?;
                let mut right = right.split(' ');
                let (kind, options) = (right.next()?, right.nth(1)?);
                wanted(kind, options).then(|| PathBuf::from(left.split(' ').nth(4).unwrap_or("/")))
            })
        };
        let top = find(|kind, options| kind == "cgroup" && options.split(',').any(|one| one == "cpuacct"))
            .or_else(|| find(|kind, _| kind == "cgroup2"))
            .context("no control groups are mounted (cpuacct, or the unified hierarchy)")?;
        let folder = top.join(name);
        fs::create_dir(&folder).with_context(|| format!("cannot make the group {}", folder.display()))?;
        Ok(Cgroup(folder))
    }

    /// The file that takes the processes that shall be in it.
    pub(crate) fn entrance(&self) -> PathBuf {
        self.0.join("cgroup.procs")
    }

    /// The processes in it.
    pub(crate) fn processes(&self) -> Vec<i32> {
        let list = fs::read_to_string(self.entrance()).unwrap_or_default();
        list.lines().filter_map(|line| line.parse().ok()).collect()
    }

    /// The processor time of all that ran in it so far.
    fn used(&self) -> Result<Duration> {
        if let Ok(text) = fs::read_to_string(self.0.join("cpuacct.usage")) {
            return Ok(Duration::from_nanos(text.trim().parse()?));
        }
        let text = fs::read_to_string(self.0.join("cpu.stat")).context("the group counts no time")?;
        let used = text.lines().find_map(|line| line.strip_prefix("usage_usec "));
        Ok(Duration::from_micros(used.context("no usage_usec in cpu.stat")?.parse()?))
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        // Busy for a moment after its last process.
        for _ in 0..200 {
            if fs::remove_dir(&self.0).is_ok() || !self.0.exists() {
                return;
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        eprintln!("the group {} stays: {:?} are in it", self.0.display(), self.processes());
    }
}

/// The work under measurement, for the clients it runs.
pub(crate) struct Watch {
    client: AtomicI32,
    client_peak: AtomicU64,
}

impl Watch {
    /// Runs a client to its end; what it printed. It has to succeed.
    pub(crate) fn client(&self, mut command: Command) -> Result<String> {
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let child = command.spawn().with_context(|| format!("cannot run {command:?}"))?;
        self.client.store(child.id() as i32, Ordering::Relaxed);
        let output = child.wait_with_output()?;
        self.client.store(0, Ordering::Relaxed);
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let arguments: Vec<_> = command.get_args().skip(4).map(|word| word.to_string_lossy()).collect();
            let mut lines = said.lines().map(str::trim).filter(|line| !line.is_empty());
            let why = lines.clone().find(|line| line.starts_with("ctr: ") || line.starts_with("error: "));
            let why = why.or_else(|| lines.next_back()).unwrap_or("it said nothing");
            bail!("ctr {}: {}: {why}", arguments.join(" "), output.status);
        }
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }
}

/// How a measurement is done.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Detail {
    /// Memory is sampled meanwhile: for work of a second or so.
    Sampled,
    /// Nothing runs meanwhile: for short work, of which there are many samples.
    Short,
}

/// Measures a piece of work on an engine (its process and its group) whose files are beneath `root`.
pub(crate) fn measure(
    pid: i32,
    group: &Cgroup,
    root: &Path,
    detail: Detail,
    work: impl FnOnce(&Watch) -> Result<()>,
) -> Result<Sample> {
    let watch = Watch { client: AtomicI32::new(0), client_peak: AtomicU64::new(0) };
    let (done, pss) = (AtomicBool::new(false), AtomicU64::new(0));
    reset_peak(pid)?;
    let (engine_before, client_before) = (group.used()?, own_time()?);
    let began = Instant::now();
    let (outcome, wall) = std::thread::scope(|scope| {
        if matches!(detail, Detail::Sampled) {
            scope.spawn(|| sample(&done, group, &watch, &pss));
        }
        let outcome = work(&watch);
        let wall = began.elapsed();
        done.store(true, Ordering::Relaxed);
        (outcome, wall)
    });
    outcome?;
    let client = own_time()? - client_before;
    let mut sample = vec![(Measure::Wall, wall.as_secs_f64())];
    if matches!(detail, Detail::Sampled) {
        sync(root)?;
        sample.push((Measure::Synced, began.elapsed().as_secs_f64()));
    }
    // What the engine still does after its answer (clean-up, a delayed write) is its cost too, if not the client's time.
    let engine = settled(group)? - engine_before;
    let peak = kib(pid, "status", "VmHWM:")?;
    sample.push((Measure::Cpu, (engine + client).as_secs_f64()));
    sample.push((Measure::CpuEngine, engine.as_secs_f64()));
    sample.push((Measure::Peak, mib(peak)));
    if matches!(detail, Detail::Sampled) {
        sample.push((Measure::PeakBoth, mib(peak + watch.client_peak.load(Ordering::Relaxed))));
        sample.push((Measure::Pss, mib(pss.load(Ordering::Relaxed))));
    }
    Ok(Sample::of(sample))
}

/// Waits until the file system that holds `path` has everything on disk.
pub(crate) fn sync(path: &Path) -> Result<()> {
    Ok(rustix::fs::syncfs(fs::File::open(path)?)?)
}

/// The processor time of a group once it no longer grows by more than a percent of one processor, within half a second.
fn settled(group: &Cgroup) -> Result<Duration> {
    const STEP: Duration = Duration::from_millis(20);
    let mut used = group.used()?;
    for _ in 0..25 {
        std::thread::sleep(STEP);
        let now = group.used()?;
        if now - used < STEP / 100 {
            return Ok(now);
        }
        used = now;
    }
    Ok(used)
}

/// The pause between looks at what processes hold while work runs; it is this many times what a look takes, where that is more.
const SAMPLE_PAUSE: Duration = Duration::from_millis(20);
const SAMPLE_PART: u32 = 50;

fn sample(done: &AtomicBool, group: &Cgroup, watch: &Watch, pss: &AtomicU64) {
    while !done.load(Ordering::Relaxed) {
        let began = Instant::now();
        pss.fetch_max(pss_kib(&group.processes()), Ordering::Relaxed);
        let client = watch.client.load(Ordering::Relaxed);
        if let Some(peak) = (client > 0).then(|| kib(client, "status", "VmHWM:").ok()).flatten() {
            watch.client_peak.fetch_max(peak, Ordering::Relaxed);
        }
        // With a hundred shims a look takes as long as the pause, and the processor that the work would have had.
        let next = Instant::now() + SAMPLE_PAUSE.max(began.elapsed() * SAMPLE_PART);
        while Instant::now() < next && !done.load(Ordering::Relaxed) {
            std::thread::sleep(SAMPLE_PAUSE / 4);
        }
    }
}

/// The proportional sets of these processes, in KiB. A process may end while it is looked at.
fn pss_kib(pids: &[i32]) -> u64 {
    pids.iter().filter_map(|pid| kib(*pid, "smaps_rollup", "Pss:").ok()).sum()
}

/// The proportional sets of these processes, in MiB.
pub(crate) fn pss(pids: &[i32]) -> f64 {
    mib(pss_kib(pids))
}

/// What processes hold while they do nothing: the mean of proportional and resident sets in MiB, threads and descriptors.
pub(crate) fn held(pids: &[i32]) -> [f64; 4] {
    let sum = |of: &dyn Fn(i32) -> Result<u64>| {
        let all: Vec<u64> = pids.iter().filter_map(|pid| of(*pid).ok()).collect();
        all.iter().sum::<u64>() as f64 / all.len().max(1) as f64
    };
    let threads = |pid: i32| {
        let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
        let count = text.lines().find_map(|line| line.strip_prefix("Threads:")).context("no Threads")?;
        Ok(count.trim().parse()?)
    };
    let files = |pid: i32| Ok(fs::read_dir(format!("/proc/{pid}/fd"))?.count() as u64);
    [
        sum(&|pid| kib(pid, "smaps_rollup", "Pss:")) / 1024.0,
        sum(&|pid| kib(pid, "smaps_rollup", "Rss:")) / 1024.0,
        sum(&threads),
        sum(&files),
    ]
}

/// User and system time of ended children, and of this thread.
pub(crate) fn own_time() -> Result<Duration> {
    let mut sum = Duration::ZERO;
    for who in [UsageWho::RUSAGE_CHILDREN, UsageWho::RUSAGE_THREAD] {
        let usage = getrusage(who)?;
        for time in [usage.user_time(), usage.system_time()] {
            sum += Duration::new(time.tv_sec() as u64, time.tv_usec() as u32 * 1000);
        }
    }
    Ok(sum)
}

fn reset_peak(pid: i32) -> Result<()> {
    fs::write(format!("/proc/{pid}/clear_refs"), "5")
        .with_context(|| format!("cannot set back the peak of {pid}"))
}

/// A line of a process's file that is in KiB.
fn kib(pid: i32, file: &str, key: &str) -> Result<u64> {
    let text = fs::read_to_string(format!("/proc/{pid}/{file}"))?;
    let value = text.lines().find_map(|line| line.strip_prefix(key)).with_context(|| format!("no {key}"))?;
    Ok(value.trim().trim_end_matches(" kB").parse()?)
}

fn mib(kib: u64) -> f64 {
    kib as f64 / 1024.0
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_peak_of_a_process_is_read_and_set_back() {
        let pid = std::process::id() as i32;
        let big = std::hint::black_box(vec![1_u8; 64 << 20]);
        let high = kib(pid, "status", "VmHWM:").unwrap();
        drop(big);
        reset_peak(pid).unwrap();
        let low = kib(pid, "status", "VmHWM:").unwrap();
        assert!(high >= 64 << 10 && low + (48 << 10) < high, "{high} {low}");
        assert!(kib(pid, "smaps_rollup", "Pss:").unwrap() > 0);
    }

    #[test]
    fn the_time_of_ended_children_is_counted() {
        let before = own_time().unwrap();
        let busy = "i=0; while [ $i -lt 100000 ]; do i=$((i+1)); done";
        assert!(Command::new("sh").args(["-c", busy]).status().unwrap().success());
        assert!(own_time().unwrap() - before > Duration::from_millis(5));
    }
}
