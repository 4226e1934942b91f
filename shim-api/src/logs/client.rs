//! The engine's side of a log's socket.

use std::io;
use std::path::Path;
use std::time::Duration;

use bytes::Bytes;
use tokio::io::AsyncWriteExt;
use tokio::net::UnixStream;
use tokio::net::unix::{OwnedReadHalf, OwnedWriteHalf};

use super::wire::{Message, Reader, Request, Stream, Streams, VERSION, shortened};
use crate::{Code, Error, Result};

/// How long a shim may take to take us in.
const JOIN_LIMIT: Duration = Duration::from_secs(10);
/// How long it may take to open a log anew: the disk may be slow.
const REOPEN_LIMIT: Duration = Duration::from_secs(30);

/// Has the log opened anew at its path; answers when that is done, and all that was read before is in the file as it was.
///
/// # Errors
/// Refused when nobody listens at the socket: the task has ended, or its shim has. The shim's, when it cannot open
/// the file; it goes on with the one it has. DeadlineExceeded after 30 s.
pub async fn reopen(socket: &Path) -> Result<()> {
    let what = format!("reopen the log by {}", socket.display());
    let asked = async {
        let (mut output, _input) = ask(socket, Request::Reopen).await?;
        output.done().await
    };
    match tokio::time::timeout(REOPEN_LIMIT, asked).await {
        Ok(result) => result.map_err(|error| error.while_doing(what)),
        Err(_) => Err(Error::deadline_exceeded(format!("{what}: no answer within 30 s"))),
    }
}

/// Joins the streams of a task: gets what it writes from now on.
///
/// # Errors
/// As [`reopen`]; the shim's, when there are too many clients.
pub async fn attach(socket: &Path, wanted: Streams) -> Result<Attached> {
    let what = format!("attach by {}", socket.display());
    let asked = async {
        let (mut output, input) = ask(socket, Request::Attach(wanted)).await?;
        output.done().await?;
        Ok(Attached { output, input })
    };
    match tokio::time::timeout(JOIN_LIMIT, asked).await {
        Ok(result) => result.map_err(|error: Error| error.while_doing(what)),
        Err(_) => Err(Error::deadline_exceeded(format!("{what}: no answer within 10 s"))),
    }
}

/// The streams of a task, joined. Dropping it leaves them.
pub struct Attached {
    output: Output,
    input: Input,
}

/// What comes from a task.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Frame {
    /// Standard output, or what a terminal shows.
    Stdout(Bytes),
    /// Standard error.
    Stderr(Bytes),
    /// All has been sent. Nothing follows.
    End,
    /// The shim has let go of us, as of a client that does not read. Nothing follows.
    Failed(Error),
}

/// The half that reads.
pub struct Output(Reader<OwnedReadHalf>);

/// The half that writes.
pub struct Input(OwnedWriteHalf);

impl Attached {
    /// The next of the task's output; `None` when the shim went without a word. May be dropped and called again.
    pub async fn recv(&mut self) -> Option<Frame> {
        self.output.recv().await
    }

    /// Writes to the task's standard input; waits while that is full. What is dropped midway ends the connection.
    ///
    /// # Errors
    /// Closed when the shim has closed the connection.
    pub async fn send_stdin(&mut self, data: Bytes) -> Result<()> {
        self.input.send_stdin(data).await
    }

    /// Says that there is no more input. It ends the input of a task that takes it once and has no terminal; else it
    /// ends this connection, as in containerd, with [`Frame::End`].
    ///
    /// # Errors
    /// Closed when the shim has closed the connection.
    pub async fn close_stdin(&mut self) -> Result<()> {
        self.input.close_stdin().await
    }

    /// The two halves, for two tasks. The connection ends with the later of them to be dropped, or when
    /// [`Input`] is dropped: the shim takes its end for ours.
    #[must_use]
    pub fn split(self) -> (Output, Input) {
        (self.output, self.input)
    }
}

impl Output {
    /// See [`Attached::recv`].
    pub async fn recv(&mut self) -> Option<Frame> {
        match self.0.message().await {
            Ok(Some(Message::Output(Stream::Stdout, data))) => Some(Frame::Stdout(data)),
            Ok(Some(Message::Output(Stream::Stderr, data))) => Some(Frame::Stderr(data)),
            Ok(Some(Message::End)) => Some(Frame::End),
            Ok(Some(Message::Failed(error))) => Some(Frame::Failed(error)),
            Ok(Some(other)) => Some(Frame::Failed(unexpected(&other))),
            Err(error) if error.code != Code::Closed => Some(Frame::Failed(error)),
            Ok(None) | Err(_) => None,
        }
    }

    async fn done(&mut self) -> Result<()> {
        match self.0.message().await? {
            Some(Message::Done) => Ok(()),
            Some(Message::Failed(error)) => Err(error),
            Some(other) => Err(unexpected(&other)),
            None => Err(Error::closed("the shim closed the connection without an answer")),
        }
    }
}

impl Input {
    /// See [`Attached::send_stdin`].
    ///
    /// # Errors
    /// Closed when the shim has closed the connection.
    pub async fn send_stdin(&mut self, data: Bytes) -> Result<()> {
        self.send(&Message::Stdin(data)).await
    }

    /// See [`Attached::close_stdin`].
    ///
    /// # Errors
    /// Closed when the shim has closed the connection.
    pub async fn close_stdin(&mut self) -> Result<()> {
        self.send(&Message::CloseStdin).await
    }

    async fn send(&mut self, message: &Message) -> Result<()> {
        let mut bytes = Vec::new();
        message.encode(&mut bytes);
        let sent = self.0.write_all(&bytes).await;
        sent.map_err(|error| Error::closed(format!("write to the socket of a log: {error}")))
    }
}

fn unexpected(message: &Message) -> Error {
    Error::internal(format!("the shim answered {message:?}, which is no answer"))
}

/// Connects and asks.
async fn ask(socket: &Path, request: Request) -> Result<(Output, Input)> {
    let connected = async {
        let (_folder, short) = shortened(socket)?;
        UnixStream::connect(short).await
    };
    let mut stream = connected.await.map_err(|error: io::Error| {
        let gone = matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused);
        Error::new(if gone { Code::Refused } else { Code::Unavailable }, format!("connect: {error}"))
    })?;
    let mut bytes = vec![VERSION];
    Message::Request(request).encode(&mut bytes);
    let sent = stream.write_all(&bytes).await;
    sent.map_err(|error| Error::closed(format!("write to the socket of a log: {error}")))?;
    let (reader, writer) = stream.into_split();
    Ok((Output(Reader::new(reader)), Input(writer)))
}
