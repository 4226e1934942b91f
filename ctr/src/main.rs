//! `ctr`, the debug and admin command line: containerd's names and flags, over its gRPC API.
//!
//! Exit codes: 0 success, 1 a failure (one line on stderr, beginning with `ctr: `), 2 a usage error, 130 and
//! 143 interrupted by a signal that ctr takes for itself, and for `run`, `tasks start`, `tasks exec` and `tasks attach` the code of the process.
//!
//! Invariant: what a command made and did not announce as its result is taken away on every way
//! out: snapshots, container records, leases, ingests, fifos; the terminal is put back as it was.

#![forbid(unsafe_code)]

mod archive;
mod args;
mod checkpoint;
mod cli;
mod client;
mod commands;
mod container;
mod content;
mod credentials;
mod difference;
mod display;
mod image;
mod json;
mod lease;
mod output;
mod process;
mod progress;
mod registry;
mod rootfs;
mod signals;
mod stdio;
mod streams;
mod trace;
mod transfer;
mod unpack;

use std::process::ExitCode;

use clap::Parser;

fn main() -> ExitCode {
    shim_api::trace::this_is("ctr");
    let cli = cli::Cli::parse();
    let debug = cli.globals.debug;
    let runtime = match tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => {
            eprintln!("ctr: cannot start: {error}");
            return ExitCode::FAILURE;
        }
    };
    let result = runtime.block_on(cli.run());
    // A thread may still sit in a read of the terminal; it must not hold up the exit.
    runtime.shutdown_background();
    match result {
        Ok(code) => code,
        Err(error) if output::is_closed_pipe(&error) => ExitCode::SUCCESS,
        Err(error) => {
            match debug {
                true => eprintln!("ctr: {error:?}"),
                false => eprintln!("ctr: {error:#}"),
            }
            match error.downcast_ref::<transfer::Interrupted>() {
                Some(interrupted) => ExitCode::from(128 + interrupted.signal),
                None => ExitCode::FAILURE,
            }
        }
    }
}
