//! `gantry-chaos`: the engine and its shims killed at every step, cut off from power, starved and lied to; then looked at.
//! `make chaos` builds and runs it.
//!
//! ```text
//! kill/VERB/POINT.N   run a verb with a failpoint armed -> a process dies -> start -> what was acknowledged is there,
//!                     the verb can be repeated, nothing is left                                     kills.rs, pods.rs
//! fault/NAME          disks, shims, runtimes, clients that fail                                     faults.rs
//! cut/POINT           the file system as it was at an instant, in a new engine                      cuts.rs
//! soak                random clients and kills for a while; then nothing has leaked                 soak.rs
//! ```
//!
//! It needs engine and shim with the feature `failpoints` beside it. Nothing here is skipped in silence: each case is a line,
//! and the last line counts them.

#![allow(clippy::unwrap_used, reason = "a case fails by panicking")]

use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::{Command, ExitCode};

use clap::Parser;

mod check;
mod cuts;
mod disk;
mod faults;
mod kills;
mod pods;
mod points;
mod run;
mod soak;
mod state;

/// Kills, starves and lies to the engine, and looks at what is left of it.
#[derive(Debug, Parser)]
#[command(version)]
struct Arguments {
    /// Only the cases whose names contain this.
    #[arg(long, value_name = "TEXT", default_value = "")]
    filter: String,
    /// Each point once and not for each time it is passed, and a soak of half a minute.
    #[arg(long)]
    quick: bool,
    /// How long the soak takes.
    #[arg(long, value_name = "SECONDS")]
    soak: Option<u64>,
}

fn main() -> ExitCode {
    if std::env::args_os().next().is_some_and(|own| Path::new(&own).ends_with(faults::BAD_SHIM)) {
        faults::nonsense();
        return ExitCode::SUCCESS;
    }
    let arguments = Arguments::parse();
    if !nix::unistd::geteuid().is_root() {
        eprintln!("gantry-chaos: engines run containers and mount, which needs root");
        return ExitCode::FAILURE;
    }
    if std::env::var_os(points::VARIABLE).is_none() {
        return again_with_points();
    }
    let mut run = run::Run::new(arguments.filter, arguments.quick);
    kills::all(&mut run);
    pods::all(&mut run);
    faults::all(&mut run);
    cuts::all(&mut run);
    soak::all(&mut run, arguments.soak.unwrap_or(if arguments.quick { 30 } else { 600 }));
    let _ = std::fs::remove_dir_all(points::folder());
    run.summary()
}

/// Runs this program with a folder for failpoints in its environment, and so in that of all it starts.
fn again_with_points() -> ExitCode {
    let folder = std::env::temp_dir().join(format!("gantry-chaos-{}", std::process::id()));
    let own = std::fs::create_dir_all(&folder).and_then(|()| std::env::current_exe());
    let error = match own {
        Ok(own) => Command::new(own).args(std::env::args_os().skip(1)).env(points::VARIABLE, folder).exec(),
        Err(error) => error,
    };
    eprintln!("gantry-chaos: cannot start anew: {error}");
    ExitCode::FAILURE
}
