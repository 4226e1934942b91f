//! The one place of a process that reaps its children.
//!
//! ```text
//!   SIGCHLD -> waitpid(any) -> someone waits for this pid?   yes: hand the exit over
//!                                                            no, an expectation is open: hold it
//!                                                            no: an orphan; forget it
//! ```
//!
//! Invariant: every exit goes to whoever claimed its pid, however early it came. A pid is learnt late when another
//! program makes the process (a runtime writes it into a file), so an [`Expectation`] opened before that program
//! runs keeps exits nobody has claimed yet. Nothing else in the process may wait for children, which rules out
//! `tokio::process` and `Child::wait`.

use std::collections::HashMap;
use std::future::Future;
use std::io;
use std::pin::Pin;
use std::process::Command;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};
use std::time::SystemTime;

use tokio::signal::unix::{SignalKind, signal};
use tokio::sync::oneshot;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Exit {
    /// Which process.
    pub pid: u32,
    /// Its exit code, or 128 + the signal that ended it.
    pub status: u32,
    /// When it was reaped.
    pub at: SystemTime,
}

/// Handle to the reaper; clones share it.
#[derive(Clone, Default)]
pub struct Reaper {
    table: Arc<Mutex<Table>>,
}

#[derive(Default)]
struct Table {
    claimed: HashMap<u32, oneshot::Sender<Exit>>,
    held: HashMap<u32, Exit>,
    expectations: usize,
}

/// While one of these lives, exits of unknown pids are held for a later [`Reaper::claim`].
pub struct Expectation {
    reaper: Reaper,
}

/// The exit of one process, when it comes. It fails only when the pid was claimed again by someone else.
pub struct ExitOf(oneshot::Receiver<Exit>);

impl Future for ExitOf {
    type Output = Option<Exit>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Self::Output> {
        Pin::new(&mut self.0).poll(cx).map(Result::ok)
    }
}

impl Reaper {
    /// Starts reaping in a task of the current tokio runtime, for as long as that lives.
    ///
    /// # Errors
    /// When SIGCHLD cannot be watched.
    pub fn start() -> io::Result<Self> {
        let reaper = Self::default();
        let mut children = signal(SignalKind::child())?;
        let task = reaper.clone();
        tokio::spawn(async move {
            // The first round takes what died before the signal was watched.
            loop {
                task.reap();
                if children.recv().await.is_none() {
                    return;
                }
            }
        });
        Ok(reaper)
    }

    /// Starts a program; its exit comes here, whatever happens in between.
    ///
    /// # Errors
    /// Those of [`Command::spawn`].
    pub fn spawn(&self, command: &mut Command) -> io::Result<(u32, ExitOf)> {
        // Under the lock, so that the reaper cannot take the child before it is registered, nor the one that
        // `spawn` itself waits for when the exec fails.
        let mut table = self.lock();
        let child = command.spawn()?;
        let (sender, receiver) = oneshot::channel();
        table.claimed.insert(child.id(), sender);
        Ok((child.id(), ExitOf(receiver)))
    }

    /// Keeps the exits of pids that nobody has claimed, from now on until the answer is dropped.
    #[must_use]
    pub fn expect(&self) -> Expectation {
        self.lock().expectations += 1;
        Expectation { reaper: self.clone() }
    }

    /// The exit of a process that another program made. It may have come already, if an [`Expectation`] was open.
    #[must_use]
    pub fn claim(&self, pid: u32) -> ExitOf {
        let mut table = self.lock();
        let (sender, receiver) = oneshot::channel();
        match table.held.remove(&pid) {
            Some(exit) => {
                let _ = sender.send(exit);
            }
            None => {
                table.claimed.insert(pid, sender);
            }
        }
        ExitOf(receiver)
    }

    fn reap(&self) {
        let mut table = self.lock();
        loop {
            let mut status = 0;
            // nix and rustix name signals, and have no name for realtime ones: an exit by one would get lost.
            // SAFETY: `status` is a valid place for an int, and the call keeps no pointer to it.
            let pid = unsafe { libc::waitpid(-1, &mut status, libc::WNOHANG) };
            if pid < 0 && io::Error::last_os_error().kind() == io::ErrorKind::Interrupted {
                continue;
            }
            // Zero: children, but none has exited. Below: no children.
            if pid <= 0 {
                return;
            }
            let status = if libc::WIFEXITED(status) {
                libc::WEXITSTATUS(status)
            } else {
                128 + libc::WTERMSIG(status)
            };
            table.take(pid.unsigned_abs(), status.unsigned_abs());
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Table {
    fn take(&mut self, pid: u32, status: u32) {
        let exit = Exit { pid, status, at: SystemTime::now() };
        match self.claimed.remove(&pid) {
            Some(waiter) => {
                let _ = waiter.send(exit);
            }
            None if self.expectations > 0 => {
                self.held.insert(pid, exit);
            }
            None => {}
        }
    }
}

impl Drop for Expectation {
    fn drop(&mut self) {
        let mut table = self.reaper.lock();
        table.expectations -= 1;
        if table.expectations == 0 {
            table.held = HashMap::new();
        }
    }
}
