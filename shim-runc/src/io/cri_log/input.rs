//! A process's standard input, for clients that come and go.
//!
//! Invariant: nobody waits for a process that does not read but the client that writes to it, and not even that one
//! once the input is closed.

use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::watch;

use super::super::{Watched, write_all};

pub(super) struct Input {
    to: Mutex<Option<Arc<Watched>>>,
    terminal: bool,
    closed: watch::Sender<bool>,
}

impl Input {
    /// Without a target there is none.
    pub(super) fn new(to: Option<Arc<Watched>>, terminal: bool) -> Self {
        Self { to: Mutex::new(to), terminal, closed: watch::Sender::new(false) }
    }

    /// Writes for a client; what nobody can read is dropped.
    pub(super) async fn write(&self, data: &[u8]) {
        let mut closed = self.closed.subscribe();
        let Some(to) = self.lock().clone() else { return };
        tokio::select! {
            written = write_all(&to, data) => {
                if let Err(error) = written {
                    tracing::debug!(%error, "a process reads no more input");
                    self.lock().take();
                }
            }
            _ = closed.wait_for(|closed| *closed) => {}
        }
    }

    /// Lets the process see the end.
    pub(super) fn close(&self) {
        let to = self.lock().take();
        self.closed.send_replace(true);
        if let Some(to) = to.filter(|_| self.terminal) {
            // What a person would type: a terminal has no other end-of-file.
            let end = [sys::pty::end_of_file(to.get_ref())];
            tokio::spawn(async move { write_all(&to, &end).await });
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Arc<Watched>>> {
        self.to.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
