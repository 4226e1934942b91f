//! `containerd-shim-runc-v2`: stands between an engine and a runc-compatible runtime, one process for one container
//! or one pod, and keeps containers, their output and their exit codes when the engine is away.
//!
//! ```text
//!   start    stdin: options   -> binds the socket, starts the shim, answers its address   start.rs
//!   (none)   serves tasks     -> service.rs -> container.rs -> state.rs, runc.rs, io.rs   daemon.rs
//!   delete   cleans up after a shim that died                                             delete.rs
//!   -v, -info                 -> what this is                                             info.rs
//! ```
//!
//! Invariant: engines read stdout, and some stderr with it: a success writes nothing but its answer.

mod args;
mod bundle;
mod container;
mod daemon;
mod delete;
mod info;
mod io;
mod log;
mod metrics;
mod options;
mod rootfs;
mod runc;
mod service;
mod start;
mod state;

use std::io::{Read, Write};
use std::process::ExitCode;

use shim_api::{Error, Result};

/// The name of the runtime this is the shim of.
const RUNTIME_NAME: &str = "io.containerd.runc.v2";

fn main() -> ExitCode {
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("containerd-shim-runc-v2: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    let args = args::Args::parse(std::env::args().skip(1)).map_err(Error::invalid_argument)?;
    if args.version {
        return print(info::version().as_bytes());
    }
    if args.info {
        return print(&info::info(&stdin()?)?);
    }
    for (name, value) in [("-namespace", &args.namespace), ("-id", &args.id)] {
        let part = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
        // Both become parts of paths.
        if value.is_empty() || value.starts_with('.') || !value.chars().all(part) {
            return Err(Error::invalid_argument(format!(
                "{name} {value:?}: letters, digits, '.', '_' and '-'"
            )));
        }
    }
    match args.action.as_str() {
        "start" => print(&start::start(&args, &stdin()?)?),
        "delete" => print(&delete::delete(&args)?),
        "" | "serve" => daemon::serve(&args),
        other => Err(Error::invalid_argument(format!("{other:?} is no action: start and delete are"))),
    }
}

fn stdin() -> Result<Vec<u8>> {
    let limit = shim_api::bootstrap::MESSAGE_LIMIT as u64;
    let mut input = Vec::new();
    std::io::stdin()
        .take(limit)
        .read_to_end(&mut input)
        .map_err(|error| Error::internal(format!("read stdin: {error}")))?;
    Ok(input)
}

fn print(bytes: &[u8]) -> Result<()> {
    let mut stdout = std::io::stdout();
    stdout
        .write_all(bytes)
        .and_then(|()| stdout.flush())
        .map_err(|error| Error::internal(format!("write stdout: {error}")))
}
