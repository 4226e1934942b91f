//! `containerd-shim-runc-v2`: stands between an engine and a runc-compatible runtime, one process for one container
//! or one pod, and keeps containers, their output and their exit codes when the engine is away.
//!
//! ```text
//!   start    stdin: options   -> binds the socket, starts the shim, answers its address   start.rs
//!   (none)   serves tasks     -> service.rs -> container.rs -> state.rs, runc.rs, io.rs   daemon.rs
//!   delete   cleans up after a shim that died                                             delete.rs
//!   sandbox-init   the first process of a pod that shares its process ids                  sandbox.rs
//!   sandbox-users  makes the namespaces of a pod that has one of users                     sandbox.rs
//!   logger   the log of a container in the hands of another shim                          io/cri_log/process.rs
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
mod sandbox;
mod service;
mod start;
mod state;

use std::io::{Read, Write};
use std::process::ExitCode;

use shim_api::{Error, Result, trace};

/// The name of the runtime this is the shim of.
const RUNTIME_NAME: &str = "io.containerd.runc.v2";

fn main() -> ExitCode {
    trace::this_is("shim");
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("containerd-shim-runc-v2: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> Result<()> {
    if std::env::args().nth(1).is_some_and(|first| first == sandbox::INIT) {
        sys::process::reap_for_ever();
    }
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if let [first, network] = arguments.as_slice()
        && first == sandbox::USERS
    {
        return sandbox::make_from_within(network);
    }
    if arguments.first().is_some_and(|first| shim_api::logs::LogSpec::is_logger(first)) {
        return io::run_logger(&arguments);
    }
    let args = args::Args::parse(arguments).map_err(Error::invalid_argument)?;
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
        "start" => trace::carry_blocking(trace::Context::of_environment(), || {
            let _span = trace::current().map(|trace| trace.open("start").since(trace::process_began()));
            print(&start::start(&args, &stdin()?)?)
        }),
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
