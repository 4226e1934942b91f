//! The fifos of an exec: made before it, read and written while it runs.
//!
//! Both ends may be opened in either order, since ours never waits: what is to be read is opened before the shim has the path, so
//! that a shim that waits for a reader finds one; what is to be written is held at both ends, so that nothing is lost before the
//! shim reads.

use std::io;
use std::os::fd::{AsFd as _, OwnedFd};
use std::path::Path;
use std::time::Duration;

use bytes::BytesMut;
use tokio::io::unix::AsyncFd;

use super::{Input, Output, PIECE};
use crate::error::{Error, Result};

/// The most that is kept of an output.
const KEPT_MAX: usize = 16 << 20;
/// How often it is looked whether the shim has read all there is, and how many times.
const READ_PAUSE: Duration = Duration::from_millis(2);
const READ_TRIES: usize = 500;

/// One that is open, and never waits.
pub(super) type Fifo = AsyncFd<OwnedFd>;

/// Which streams a process is to have.
#[derive(Debug, Clone, Copy)]
pub(super) struct Wanted {
    pub(super) stdin: bool,
    pub(super) stdout: bool,
    pub(super) stderr: bool,
}

/// Where they are, empty for those that are not.
#[derive(Debug, Default)]
pub(super) struct Paths {
    pub(super) stdin: String,
    pub(super) stdout: String,
    pub(super) stderr: String,
}

/// Our ends of them.
#[derive(Default)]
pub(super) struct Fifos {
    pub(super) stdin: Option<Fifo>,
    pub(super) stdout: Option<Fifo>,
    pub(super) stderr: Option<Fifo>,
}

/// Where output goes.
pub(super) enum Sink {
    /// Nowhere.
    Nothing,
    /// To a client, for as long as it is there.
    Client(Output),
    /// Here, up to a limit.
    Kept(Vec<u8>),
}

/// Makes a folder of fifos. Blocks.
pub(super) fn create(folder: &Path, wanted: Wanted) -> Result<Paths> {
    sys::fs::create_dir(folder, 0o700).map_err(|error| Error::io("create folder", folder, &error))?;
    let make = |wanted: bool, name: &str| -> Result<String> {
        if !wanted {
            return Ok(String::new());
        }
        let path = folder.join(name);
        sys::fifo::create(&path, 0o600).map_err(|error| Error::io("make fifo", &path, &error))?;
        Ok(path.display().to_string())
    };
    Ok(Paths {
        stdin: make(wanted.stdin, "stdin")?,
        stdout: make(wanted.stdout, "stdout")?,
        stderr: make(wanted.stderr, "stderr")?,
    })
}

impl Paths {
    /// Opens our ends.
    pub(super) fn open(&self) -> Result<Fifos> {
        let open = |path: &str, by: fn(&Path) -> io::Result<OwnedFd>| {
            let fifo = (!path.is_empty()).then(|| by(Path::new(path)).and_then(sys::fifo::watch));
            fifo.transpose().map_err(|error| Error::io("open fifo", path, &error))
        };
        Ok(Fifos {
            stdin: open(&self.stdin, sys::fifo::open_lasting_writer)?,
            stdout: open(&self.stdout, sys::fifo::open_reader)?,
            stderr: open(&self.stderr, sys::fifo::open_reader)?,
        })
    }
}

/// The outputs that are in a folder, to be read.
pub(super) fn outputs_left(folder: &Path) -> impl Iterator<Item = Fifo> {
    let paths = ["stdout", "stderr"].map(|name| folder.join(name));
    paths.into_iter().filter_map(|path| sys::fifo::open_reader(&path).and_then(sys::fifo::watch).ok())
}

/// Copies until every writer has gone; what was kept.
pub(super) async fn copy(fifo: Fifo, mut sink: Sink) -> Vec<u8> {
    let mut buffer = BytesMut::new();
    loop {
        // One that nobody has opened yet says nothing here, though it would read as ended.
        let Ok(mut ready) = fifo.readable().await else { break };
        buffer.resize(PIECE, 0);
        match ready.try_io(|fifo| sys::fifo::read(fifo.as_fd(), &mut buffer)) {
            Ok(Ok(0)) => break,
            Ok(Ok(length)) => buffer.truncate(length),
            Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => continue,
            Ok(Err(_)) => break,
            Err(_would_block) => continue,
        }
        match &mut sink {
            Sink::Nothing => {}
            Sink::Client(output) => {
                if output.send(buffer.split().freeze()).await.is_err() {
                    // The process goes on, and is not to wait for a reader.
                    sink = Sink::Nothing;
                }
            }
            Sink::Kept(kept) => {
                let room = KEPT_MAX - kept.len();
                kept.extend(&buffer[..buffer.len().min(room)]);
            }
        }
    }
    match sink {
        Sink::Kept(kept) => kept,
        Sink::Client(output) => {
            output.end().await;
            Vec::new()
        }
        Sink::Nothing => Vec::new(),
    }
}

/// Writes what a client sends, until it has ended it and the shim has read it, or cannot any more.
pub(super) async fn feed(mut input: Input, fifo: Fifo) {
    while let Some(bytes) = input.next().await {
        let mut rest = &bytes[..];
        while !rest.is_empty() {
            let Ok(mut ready) = fifo.writable().await else { return };
            match ready.try_io(|fifo| sys::fifo::write(fifo.as_fd(), rest)) {
                Ok(Ok(length)) => rest = &rest[length..],
                Ok(Err(error)) if error.kind() == io::ErrorKind::Interrupted => {}
                Ok(Err(_)) => return,
                Err(_would_block) => {}
            }
        }
    }
    // A shim that has not opened it yet would find nothing in it once we have closed it.
    for _ in 0..READ_TRIES {
        match rustix::io::ioctl_fionread(fifo.get_ref()) {
            Ok(1..) => tokio::time::sleep(READ_PAUSE).await,
            _ => break,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const ALL: Wanted = Wanted { stdin: true, stdout: true, stderr: true };

    #[tokio::test]
    async fn output_is_kept_up_to_a_limit_and_the_rest_thrown_away() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("exec");
        let paths = create(&folder, ALL).unwrap();
        assert!(create(&folder, ALL).is_err(), "a name is used once");
        let fifos = paths.open().unwrap();
        let kept = tokio::spawn(copy(fifos.stdout.unwrap(), Sink::Kept(Vec::new())));
        let path = paths.stdout.clone();
        let writing = tokio::task::spawn_blocking(move || {
            let mut fifo = std::fs::OpenOptions::new().write(true).open(path)?;
            io::copy(&mut io::Read::take(io::repeat(b'x'), KEPT_MAX as u64 + 5_000_000), &mut fifo)
        });
        assert_eq!(writing.await.unwrap().unwrap(), KEPT_MAX as u64 + 5_000_000);
        assert_eq!(kept.await.unwrap().len(), KEPT_MAX);
        assert_eq!(outputs_left(&folder).count(), 2);
    }

    #[tokio::test]
    async fn streams_that_are_not_wanted_have_no_fifo() {
        let dir = tempfile::tempdir().unwrap();
        let folder = dir.path().join("exec");
        let paths = create(&folder, Wanted { stdin: false, stdout: true, stderr: false }).unwrap();
        assert!(paths.stdin.is_empty() && paths.stderr.is_empty());
        let fifos = paths.open().unwrap();
        assert!(fifos.stdin.is_none() && fifos.stdout.is_some() && fifos.stderr.is_none());
        assert_eq!(std::fs::read_dir(folder).unwrap().count(), 1);
    }
}
