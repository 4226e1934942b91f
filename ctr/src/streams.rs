//! Streams to the engine: opened under a name of our own, which another call then names; bytes over them.
//!
//! A sender sends as many bytes as the engine's window updates allow, and closes its side at the end; a receiver allows them. An engine that ends a stream early says why in its answer to the call that names it: here
//! that is no error.

use std::io::{self, Read, Write};

use anyhow::Context;
use prost_types::Any;
use proto::any;
use proto::containerd::services::streaming::v1::StreamInit;
use proto::containerd::types::transfer::{Data, WindowUpdate};
use tokio::runtime::Handle;
use tokio::sync::mpsc;
use tokio_stream::wrappers::ReceiverStream;
use tonic::Streaming;

use crate::client::{Client, Failure, Tried};
use crate::lease::unique;

/// The most bytes of one message.
const DATA_MAX: usize = 256 << 10;
/// What a receiver allows at a time.
const WINDOW: i32 = 1 << 20;
/// Messages on their way to the connection.
const OUTGOING: usize = 4;

/// An open stream.
pub(crate) struct Stream {
    /// What the engine knows it by.
    pub(crate) id: String,
    requests: mpsc::Sender<Any>,
    answers: Streaming<Any>,
}

impl Stream {
    /// Opens a stream; `purpose` is part of its name.
    pub(crate) async fn open(client: &Client, purpose: &str) -> anyhow::Result<Stream> {
        let id = unique(&format!("ctr-{purpose}"));
        let (requests, receiver) = mpsc::channel(OUTGOING);
        // There is room: nobody else has the channel.
        let _ = requests.try_send(any::pack(&StreamInit { id: id.clone() }));
        let what = || "open a stream (containerd has them since version 1.7)";
        let mut answers = client.streaming().stream(ReceiverStream::new(receiver)).await.tried(what)?;
        let ready = answers.message().await.map_err(|status| Failure::new(what(), status))?;
        ready.context("cannot open a stream: the engine closed it at once")?;
        Ok(Stream { id, requests, answers })
    }

    /// The next message; None when the engine has no more, or has gone, which its answer to the other call tells.
    pub(crate) async fn message(&mut self) -> Option<Any> {
        self.answers.message().await.ok().flatten()
    }

    /// Sends a message; false when the engine listens no more.
    pub(crate) async fn send(&self, message: Any) -> bool {
        self.requests.send(message).await.is_ok()
    }

    /// Sends all that `source` has. The error is the source's; `advance` is told how much was sent.
    pub(crate) async fn send_all(
        self,
        source: impl Read + Send + 'static,
        advance: impl Fn(u64) + Send + 'static,
    ) -> anyhow::Result<()> {
        tokio::task::spawn_blocking(move || self.pump(source, &Handle::current(), advance)).await??;
        Ok(())
    }

    fn pump(mut self, mut source: impl Read, runtime: &Handle, advance: impl Fn(u64)) -> io::Result<()> {
        let mut window = 0_i64;
        let mut buffer = vec![0; DATA_MAX];
        loop {
            let count = match source.read(&mut buffer) {
                Ok(0) => break,
                Ok(count) => count,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(error) => return Err(error),
            };
            let mut rest = &buffer[..count];
            while !rest.is_empty() {
                if window <= 0 {
                    let Some(message) = runtime.block_on(self.message()) else { return Ok(()) };
                    window += any::unpack::<WindowUpdate>(&message).map_or(0, |update| update.update.into());
                    continue;
                }
                let piece = rest.len().min(usize::try_from(window).unwrap_or(usize::MAX));
                let data = Data { data: rest[..piece].to_vec() };
                if self.requests.blocking_send(any::pack(&data)).is_err() {
                    return Ok(());
                }
                window -= i64::try_from(piece).unwrap_or(i64::MAX);
                rest = &rest[piece..];
                advance(piece as u64);
            }
        }
        let Stream { requests, mut answers, .. } = self;
        drop(requests);
        while let Ok(Some(_)) = runtime.block_on(answers.message()) {}
        Ok(())
    }

    /// Receives all there is into `out`. The error is that of `out`; `advance` is told how much came.
    pub(crate) async fn receive_all(
        self,
        out: impl Write + Send + 'static,
        advance: impl Fn(u64) + Send + 'static,
    ) -> io::Result<()> {
        let done = tokio::task::spawn_blocking(move || self.drain(out, &Handle::current(), advance)).await;
        done.map_err(io::Error::other)?
    }

    fn drain(mut self, mut out: impl Write, runtime: &Handle, advance: impl Fn(u64)) -> io::Result<()> {
        let mut window = 0_i64;
        loop {
            // At the end the engine listens no more; what it has sent is still to come.
            if window < i64::from(WINDOW) / 2
                && self.requests.blocking_send(any::pack(&WindowUpdate { update: WINDOW })).is_ok()
            {
                window += i64::from(WINDOW);
            }
            let Some(message) = runtime.block_on(self.message()) else { break };
            let Ok(data) = any::unpack::<Data>(&message) else { continue };
            window -= i64::try_from(data.data.len()).unwrap_or(i64::MAX);
            out.write_all(&data.data)?;
            advance(data.data.len() as u64);
        }
        out.flush()
    }
}
