//! Signals by name, and passing on those that ctr receives.

use tokio::signal::unix::{Signal, SignalKind, signal};

/// Parses `SIGTERM`, `TERM`, `term`, `15`, `RTMIN+3` or `RTMAX-1`.
pub(crate) fn parse(text: &str) -> Result<u32, String> {
    oci::signal::parse(text).ok_or_else(|| {
        format!("{text:?} is not a signal; use a name such as SIGTERM, or a number from 1 to 64")
    })
}

/// Those that are passed on to the process: what a user or a service manager sends to ctr.
const FORWARDED: &[u32] = &[1, 2, 3, 10, 12, 14, 15, 18];

/// The signals sent to ctr, one at a time. While this lives they do not end ctr.
pub(crate) struct Received {
    receiver: tokio::sync::mpsc::Receiver<u32>,
}

impl Received {
    /// Begins to catch.
    pub(crate) fn listen() -> anyhow::Result<Received> {
        let (sender, receiver) = tokio::sync::mpsc::channel(32);
        for &number in FORWARDED {
            let mut stream: Signal = signal(SignalKind::from_raw(number as i32))?;
            let sender = sender.clone();
            tokio::spawn(async move {
                while stream.recv().await.is_some() {
                    if sender.send(number).await.is_err() {
                        break;
                    }
                }
            });
        }
        Ok(Received { receiver })
    }

    /// The next one's number.
    pub(crate) async fn next(&mut self) -> u32 {
        match self.receiver.recv().await {
            Some(number) => number,
            None => std::future::pending().await,
        }
    }
}
