//! A logging program: it reads the process's stdout at descriptor 3, stderr at 4, and closes 5 when it is ready.
//! Its environment is CONTAINER_ID and CONTAINER_NAMESPACE alone.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};
use std::time::Duration;

use shim_api::{Error, Result};
use sys::fifo;
use sys::reaper::ExitOf;

use super::uri::Program;
use super::{Surroundings, io_error, pipe};

/// How long a program may take to become ready.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// How long it may take to end by itself.
const END_LIMIT: Duration = Duration::from_secs(2);
/// How long it may take to write down the rest when the process is gone.
const GOODBYE_LIMIT: Duration = Duration::from_secs(12);

pub(super) struct Logger {
    process: Option<(OwnedFd, ExitOf)>,
}

impl Logger {
    /// Starts the program; answers it with the ends of its pipes that the container's process gets.
    pub(super) async fn start(
        program: &Program,
        around: &Surroundings<'_>,
    ) -> Result<(Self, OwnedFd, OwnedFd)> {
        let what = format!("start the logging program {}", program.path.display());
        let (stdout_reader, stdout) = pipe(around)?;
        let (stderr_reader, stderr) = pipe(around)?;
        let (ready, theirs) = io::pipe().map_err(|error| io_error(&what, &error))?;
        let mut command = Command::new(&program.path);
        command.args(&program.arguments).env_clear();
        command.env("CONTAINER_ID", around.id).env("CONTAINER_NAMESPACE", around.namespace);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        sys::process::pass_descriptors(&mut command, vec![stdout_reader, stderr_reader, theirs.into()]);
        let (pid, exit) = around.reaper.spawn(&mut command).map_err(|error| io_error(&what, &error))?;
        drop(command);
        let handle = sys::pidfd::open(pid).map_err(|error| io_error(&what, &error))?;
        let logger = Self { process: Some((handle, exit)) };

        let ready: OwnedFd = ready.into();
        fifo::set_nonblocking(&ready).map_err(|error| io_error(&what, &error))?;
        let ready = fifo::watch(ready).map_err(|error| io_error(&what, &error))?;
        let first = async {
            loop {
                let mut guard = ready.readable().await?;
                let mut byte = [0];
                if let Ok(result) = guard.try_io(|pipe| fifo::read(pipe.as_fd(), &mut byte)) {
                    return result;
                }
            }
        };
        match tokio::time::timeout(READY_LIMIT, first).await {
            Ok(Ok(0)) if program.says_ready => {
                Err(Error::unavailable(format!("{what}: it ended before it said that it is ready")))
            }
            Ok(Ok(_)) => Ok((logger, stdout, stderr)),
            Ok(Err(error)) => Err(io_error(&what, &error)),
            Err(_) => Err(Error::deadline_exceeded(format!("{what}: it was not ready within 30 s"))),
        }
    }
}

impl Drop for Logger {
    /// Asks it to end, and ends it when it does not.
    fn drop(&mut self) {
        let Some((process, mut exit)) = self.process.take() else { return };
        tokio::spawn(async move {
            // Its pipes have no writer any more, which most take as the end.
            if tokio::time::timeout(END_LIMIT, &mut exit).await.is_ok() {
                return;
            }
            let _ = sys::pidfd::send_signal(&process, 15);
            if tokio::time::timeout(GOODBYE_LIMIT, exit).await.is_err() {
                tracing::warn!("a logging program did not end within 12 s of SIGTERM; killing it");
                let _ = sys::pidfd::send_signal(&process, 9);
            }
        });
    }
}
