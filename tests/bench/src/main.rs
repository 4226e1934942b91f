//! `gantry-bench`: gantryd beside containerd, case by case, in one run. `make bench` builds and runs it.
//!
//! ```text
//! for each case:  for each round:  gantryd, containerd, further engines, the floor     (A B A B)
//! each run:       new file system, new engine -> prepare -> measure -> check the result -> stop, nothing left -> delete
//! ```
//!
//! A run of everything writes docs/benchmarks.md; a part of it (`--filter`, `--quick`) writes beneath target/bench.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};

use anyhow::{Context as _, Result, ensure};
use clap::Parser;
use nix::sys::statfs::{TMPFS_MAGIC, statfs};

use crate::cases::{Bench, Case, Point, Work};
use crate::disk::Disk;
use crate::image::Image;
use crate::measure::{Measure, Sample};
use crate::peers::{Engine, Kind, Peer};
use crate::registry::Registry;
use crate::report::{FLOOR, Record, Results};

mod cases;
mod disk;
mod image;
mod machine;
mod measure;
mod peers;
mod plot;
mod registry;
mod report;
mod stats;

/// Measures gantryd beside containerd, and writes a page with tables and plots.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Only the cases whose names contain this.
    #[arg(long, value_name = "CASE")]
    filter: Option<String>,
    /// How often each engine does each case, instead of what the case says.
    #[arg(long, value_name = "N")]
    rounds: Option<usize>,
    /// A small image and one round: to see that it works, not for figures.
    #[arg(long)]
    quick: bool,
    /// Another containerd that joins, with the ctr beside it; may be given again.
    #[arg(long, value_name = "PATH")]
    containerd: Vec<PathBuf>,
    /// A dockerd that joins where it can be compared, with the docker beside it; may be given again.
    #[arg(long, value_name = "PATH")]
    dockerd: Vec<PathBuf>,
    /// The size of the image, in MB.
    #[arg(long, value_name = "MB")]
    size: Option<u64>,
    /// Where benchmarks.md and its plots go.
    #[arg(long, value_name = "FOLDER")]
    out: Option<PathBuf>,
    /// Where images are kept and engines have their data.
    #[arg(long, value_name = "FOLDER")]
    scratch: Option<PathBuf>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    match own_run_folder().and_then(|()| run(&arguments)) {
        Ok(true) => ExitCode::SUCCESS,
        Ok(false) => ExitCode::FAILURE,
        Err(error) => {
            eprintln!("gantry-bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Sees to it that /run is in memory, as it is wherever systemd runs: where it is not, this program becomes one in a mount namespace
/// of its own, with a file system in memory there. Engines, shims and runtimes keep there what a restart of the machine may clear.
fn own_run_folder() -> Result<()> {
    if !nix::unistd::geteuid().is_root() || statfs("/run")?.filesystem_type() == TMPFS_MAGIC {
        return Ok(());
    }
    let script = "mount -t tmpfs -o mode=755 tmpfs /run && exec \"$0\" \"$@\"";
    let error = Command::new("unshare")
        .args(["--mount", "sh", "-c", script])
        .arg(std::env::current_exe()?)
        .args(std::env::args_os().skip(1))
        .exec();
    Err(error).context("cannot run unshare (of util-linux), which makes a mount namespace for /run")
}

/// Whether no run failed. A mark that is not reached is no failure.
fn run(arguments: &Arguments) -> Result<bool> {
    ensure!(nix::unistd::geteuid().is_root(), "engines run containers and mount, which needs root");
    let cases: Vec<&Case> = cases::ALL
        .iter()
        .filter(|case| arguments.filter.as_ref().is_none_or(|filter| case.name.contains(filter.as_str())))
        .collect();
    ensure!(!cases.is_empty(), "no case has that in its name; there are: {}", names());
    // target/PROFILE/gantry-bench
    let target = std::env::current_exe()?.ancestors().nth(2).context("no target folder")?.to_owned();
    let scratch = arguments.scratch.clone().unwrap_or_else(|| target.join("bench"));
    let out = arguments.out.clone().unwrap_or_else(|| {
        let whole = arguments.filter.is_none() && !arguments.quick && arguments.size.is_none();
        if whole { PathBuf::from("docs") } else { scratch.clone() }
    });
    fs::create_dir_all(&scratch).with_context(|| format!("cannot make {}", scratch.display()))?;
    let scratch = scratch.canonicalize()?;
    let lock = fs::File::create(scratch.join("lock"))?;
    rustix::fs::flock(&lock, rustix::fs::FlockOperation::NonBlockingLockExclusive).with_context(|| {
        format!("another run has its data in {}; wait for its end, or give --scratch", scratch.display())
    })?;
    let runs = scratch.join("run");
    clear(&runs)?;

    let mut peers = vec![Peer::gantry()?];
    let stock = Path::new(harness::host::CONTAINERD);
    for (number, path) in
        std::iter::once(stock).chain(arguments.containerd.iter().map(PathBuf::as_path)).enumerate()
    {
        peers.extend(Peer::containerd(path, number)?);
    }
    for (number, path) in arguments.dockerd.iter().enumerate() {
        peers.push(Peer::docker(path, number)?);
    }
    let mut results = Results {
        date: today(),
        machine: machine::about(&scratch),
        peers: peers.iter().map(|peer| (peer.name.clone(), peer.version.clone())).collect(),
        ..Results::default()
    };
    let image = Image::get(&scratch, arguments.size.unwrap_or(if arguments.quick { 50 } else { 500 }))?;
    results.image = Some(image.about.clone());
    let registry = Registry::start(&image.registry(), &runs.join("registry"))?;
    let bench = Bench { image: &image, registry: &registry, quick: arguments.quick };
    for case in &cases {
        let rounds = arguments.rounds.unwrap_or(if arguments.quick { 1 } else { case.rounds });
        // A first pair that is thrown away, but for a quick look: programs and files come into the page cache by it.
        let first = usize::from(!arguments.quick && case.warm_up);
        let mut failed = BTreeSet::new();
        for round in 0..first + rounds {
            for peer in &peers {
                let work = if peer.kind == Kind::Docker { case.docker } else { Some(case.run) };
                let Some(work) = work.filter(|_| !failed.contains(&peer.name)) else { continue };
                match run_once(&bench, case, work, peer, &runs) {
                    Ok(samples) if round >= first => {
                        record(&mut results, case, &peer.name, round - first, samples);
                    }
                    Ok(_) => {}
                    Err(error) => {
                        println!("{}, {}: FAILED: {error:#}", case.name, peer.name);
                        results.failures.push((case.name.into(), peer.name.clone(), format!("{error:#}")));
                        failed.insert(peer.name.clone());
                    }
                }
            }
            if let Some(floor) = case.floor.filter(|_| round >= first) {
                let disk = Disk::make(&runs)?;
                let samples = floor(&bench, disk.folder())?;
                record(&mut results, case, FLOOR, round - first, samples);
            }
        }
    }
    drop(registry);
    clear(&runs)?;
    fs::create_dir_all(&out)?;
    report::write(&results, &cases, &out)?;
    fs::write(scratch.join("results.json"), serde_json::to_vec_pretty(&results)?)?;
    for case in &cases {
        for outcome in results.outcomes(case) {
            println!(
                "{:<15} {:<48} {:.2}, {}: {}",
                case.name,
                case.name_of(outcome.mark.point),
                outcome.ratio(),
                outcome.asks(),
                if outcome.reached() { "reached" } else { "not reached" }
            );
        }
    }
    println!("{}; see {}", results.line(&cases), out.join("benchmarks.md").display());
    Ok(results.failures.is_empty())
}

fn names() -> String {
    cases::ALL.map(|case| case.name).join(", ")
}

/// One run of a case on one engine.
fn run_once(bench: &Bench<'_>, case: &Case, work: Work, peer: &Peer, runs: &Path) -> Result<Vec<Sample>> {
    let disk = Disk::make(runs)?;
    let engine = Engine::start(peer, &disk.folder().join("engine"), case.pods)?;
    // The clients of the tests' harness panic where something is wrong; that is this run's failure, and no other's.
    let done = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| work(bench, &engine)));
    let samples = done.unwrap_or_else(|panic| Err(anyhow::anyhow!("{}", said(&*panic))))?;
    engine.stop()?;
    Ok(samples)
}

/// The words of a panic.
fn said(panic: &(dyn std::any::Any + Send)) -> &str {
    let text = panic.downcast_ref::<String>().map(String::as_str);
    text.or_else(|| panic.downcast_ref::<&str>().copied()).unwrap_or("it panicked")
}

fn record(results: &mut Results, case: &Case, peer: &str, round: usize, samples: Vec<Sample>) {
    let mut seen: BTreeMap<Point, Vec<f64>> = BTreeMap::new();
    for Sample { size, values } in samples {
        for (measure, value) in values {
            seen.entry(Point { measure, size }).or_default().push(value);
            let (case, peer) = (case.name.into(), peer.to_owned());
            results.records.push(Record { case, peer, round, measure, size, value });
        }
    }
    // What is marked, and what all have.
    let told = |point: &Point| {
        matches!(point.measure, Measure::Wall | Measure::Synced | Measure::Cpu | Measure::Rate)
            || matches!(point.measure, Measure::Throughput | Measure::Start | Measure::End | Measure::Restart)
            || case.marks.iter().any(|mark| mark.point == *point)
    };
    let medians = seen.iter().filter(|(point, _)| told(point)).filter_map(|(point, values)| {
        let median = plot::number(stats::summary(values)?.median);
        Some(format!("{} {median} {}", case.name_of(*point), point.measure.unit()))
    });
    let medians: Vec<String> = medians.collect();
    println!("{:<15} round {round}  {peer:<24} {}", case.name, medians.join(", "));
}

/// Removes what an interrupted run left: mounts first, as a removal must not go into them.
fn clear(runs: &Path) -> Result<()> {
    for mount in harness::left::mounts(runs).into_iter().rev() {
        let _ = Command::new("umount").args(["-l", &mount]).output();
    }
    match fs::remove_dir_all(runs) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(error).with_context(|| format!("cannot remove {}", runs.display()))
        }
        _ => Ok(()),
    }
}

fn today() -> String {
    time::OffsetDateTime::now_utc().date().to_string()
}
