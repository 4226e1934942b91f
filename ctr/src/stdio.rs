//! A process's streams: the fifos ctr makes for it, and the copying between them and ctr's own.
//!
//! Layout: `<fifo dir>/<random>/<id>-{stdin,stdout,stderr}`, the folder 0700. The folder is removed when the
//! copying ends; after a detached start it stays until the task is deleted, see [`remove_leftovers`].
//!
//! Copying begins before the engine creates the process: shims wait for a reader, and nothing is lost. When the engine has deleted the process,
//! its shim has written all there is; [`Copies::finish`] then drains what is in the pipes and ends,
//! even where somebody still holds the other end.

use std::io::{self, IsTerminal, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use anyhow::{Context, ensure};
use tokio::io::unix::AsyncFd;
use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;

/// Where fifo folders go unless told otherwise, as containerd's clients have it.
const FIFO_FOLDER: &str = "/run/containerd/fifo";

/// Where a process's output goes, as flags say.
#[derive(Clone, Debug, Default)]
pub(crate) struct Choice {
    /// Nowhere.
    pub(crate) null: bool,
    /// To this URI, which the shim opens.
    pub(crate) log_uri: Option<String>,
    /// Fifos under this folder.
    pub(crate) fifo_dir: Option<PathBuf>,
    /// A terminal.
    pub(crate) terminal: bool,
}

/// Where the engine finds a process's streams, as its requests have it; empty for none.
#[derive(Clone, Debug, Default)]
pub(crate) struct Addresses {
    pub(crate) stdin: String,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) terminal: bool,
}

/// A process's streams, and the folder that holds their fifos.
pub(crate) struct Streams {
    addresses: Addresses,
    folder: Option<FifoFolder>,
}

/// A folder of fifos, removed with what is in it unless kept.
struct FifoFolder {
    path: PathBuf,
    keep: bool,
}

impl Drop for FifoFolder {
    fn drop(&mut self) {
        if !self.keep {
            let _ = std::fs::remove_dir_all(&self.path);
        }
    }
}

impl Streams {
    /// Makes what `choice` asks for, for the process `id`.
    pub(crate) fn create(id: &str, choice: &Choice) -> anyhow::Result<Streams> {
        let mut addresses = Addresses { terminal: choice.terminal, ..Addresses::default() };
        if choice.null {
            return Ok(Streams { addresses, folder: None });
        }
        if let Some(uri) = &choice.log_uri {
            (addresses.stdout, addresses.stderr) = (uri.clone(), uri.clone());
            return Ok(Streams { addresses, folder: None });
        }
        let parent = choice.fifo_dir.clone().unwrap_or_else(|| FIFO_FOLDER.into());
        std::fs::create_dir_all(&parent).with_context(|| {
            format!("cannot make {} for the process's fifos; name another with --fifo-dir", parent.display())
        })?;
        let parent = std::path::absolute(parent)?;
        let folder = FifoFolder { path: parent.join(crate::lease::unique("ctr")), keep: false };
        create_private(&folder.path)?;
        let fifo = |name: &str| -> anyhow::Result<String> {
            let path = folder.path.join(format!("{id}-{name}"));
            sys::fifo::create(&path, 0o600)
                .with_context(|| format!("cannot make fifo {}", path.display()))?;
            Ok(path.display().to_string())
        };
        (addresses.stdin, addresses.stdout) = (fifo("stdin")?, fifo("stdout")?);
        if !choice.terminal {
            addresses.stderr = fifo("stderr")?;
        }
        Ok(Streams { addresses, folder: Some(folder) })
    }

    /// The fifos of a process that runs already.
    pub(crate) fn existing(addresses: Addresses) -> anyhow::Result<Streams> {
        ensure!(
            [&addresses.stdin, &addresses.stdout, &addresses.stderr].into_iter().any(|path| is_fifo(path)),
            "the process has no fifos to attach to (its output goes to {:?})",
            addresses.stdout
        );
        Ok(Streams { addresses, folder: None })
    }

    /// What goes into the request that creates the process.
    pub(crate) fn addresses(&self) -> Addresses {
        self.addresses.clone()
    }

    /// Opens the fifos that output comes from without reading them. A shim waits for a reader when it
    /// opens its own ends, so somebody must be there while it creates a process that nobody follows.
    pub(crate) fn hold(&self) -> anyhow::Result<Vec<OwnedFd>> {
        let outputs = [&self.addresses.stdout, &self.addresses.stderr];
        outputs.into_iter().filter(|path| is_fifo(path)).map(|path| open_output(path)).collect()
    }

    /// Leaves the fifos where they are, for a process that outlives ctr.
    pub(crate) fn keep(mut self) {
        if let Some(folder) = &mut self.folder {
            folder.keep = true;
        }
    }

    /// Opens the fifos that output comes from and begins to copy; stdin follows with [`Copies::feed`].
    pub(crate) fn copy(self) -> anyhow::Result<Copies> {
        let finished = watch::Sender::new(false);
        let mut outputs = Vec::new();
        for (path, to_stderr) in [(&self.addresses.stdout, false), (&self.addresses.stderr, true)] {
            if !is_fifo(path) {
                continue;
            }
            let fifo = sys::fifo::watch(open_output(path)?)?;
            let finished = finished.subscribe();
            outputs.push(tokio::spawn(drain(fifo, to_stderr, finished)));
        }
        // Both ends open: nothing is lost before the shim opens its own, nor when it is not yet there.
        let stdin = match is_fifo(&self.addresses.stdin) {
            true => Some(sys::fifo::open_lasting_writer(Path::new(&self.addresses.stdin))?),
            false => None,
        };
        Ok(Copies { outputs, finished, stdin, input_closed: Arc::new(Notify::new()), _streams: self })
    }
}

fn is_fifo(path: &str) -> bool {
    sys::fifo::is_fifo(Path::new(path))
}

fn open_output(path: &str) -> anyhow::Result<OwnedFd> {
    sys::fifo::open_reader(Path::new(path)).with_context(|| format!("cannot open fifo {path}"))
}

fn create_private(path: &Path) -> anyhow::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new()
        .mode(0o700)
        .create(path)
        .with_context(|| format!("cannot make folder {}", path.display()))
}

/// Copying in progress.
pub(crate) struct Copies {
    outputs: Vec<JoinHandle<()>>,
    finished: watch::Sender<bool>,
    stdin: Option<OwnedFd>,
    input_closed: Arc<Notify>,
    _streams: Streams,
}

impl Copies {
    /// Begins to copy ctr's stdin to the process. To be called once the engine has created it.
    pub(crate) fn feed(&mut self) -> anyhow::Result<()> {
        let Some(fifo) = self.stdin.take() else { return Ok(()) };
        let fifo = sys::fifo::watch(fifo)?;
        let (sender, mut receiver) = tokio::sync::mpsc::channel::<Vec<u8>>(4);
        // A thread of its own: a read of the terminal cannot be taken back, and must not hold up the exit.
        std::thread::spawn(move || {
            let mut stdin = io::stdin().lock();
            let mut buffer = [0; 32 << 10];
            while let Ok(count @ 1..) = stdin.read(&mut buffer) {
                if sender.blocking_send(buffer[..count].to_vec()).is_err() {
                    break;
                }
            }
        });
        let closed = self.input_closed.clone();
        tokio::spawn(async move {
            while let Some(bytes) = receiver.recv().await {
                if write_all(&fifo, &bytes).await.is_err() {
                    break;
                }
            }
            // While we hold the fifo, closing it in the shim would throw away what it has not read.
            for _ in 0..200 {
                match rustix::io::ioctl_fionread(fifo.get_ref()) {
                    Ok(1..) => tokio::time::sleep(Duration::from_millis(10)).await,
                    _ => break,
                }
            }
            drop(fifo);
            closed.notify_one();
        });
        Ok(())
    }

    /// Resolves when ctr's stdin has ended and all of it has been passed on; the caller then tells the engine.
    pub(crate) fn input_closed(&self) -> Arc<Notify> {
        self.input_closed.clone()
    }

    /// Waits until all output has been copied. To be called when the process has been deleted.
    pub(crate) async fn finish(self) {
        let _ = self.finished.send(true);
        for output in self.outputs {
            let _ = output.await;
        }
    }
}

async fn write_all(fifo: &AsyncFd<OwnedFd>, mut bytes: &[u8]) -> io::Result<()> {
    while !bytes.is_empty() {
        let mut ready = fifo.writable().await?;
        match ready.try_io(|fifo| Ok(rustix::io::write(fifo.get_ref(), bytes)?)) {
            Ok(written) => bytes = &bytes[written?..],
            Err(_would_block) => {}
        }
    }
    Ok(())
}

/// Copies from a fifo to stdout or stderr until every writer is gone, or, once `finished`, until it is empty.
async fn drain(fifo: AsyncFd<OwnedFd>, to_stderr: bool, mut finished: watch::Receiver<bool>) {
    let mut buffer = vec![0; 64 << 10];
    let mut last = false;
    loop {
        let read = if last {
            rustix::io::read(fifo.get_ref(), &mut buffer[..]).map_err(io::Error::from)
        } else {
            // A fifo nobody has opened yet reads as ended; epoll is silent until a writer came.
            tokio::select! {
                ready = fifo.readable() => match ready {
                    Ok(mut ready) => match ready.try_io(|fifo| Ok(rustix::io::read(fifo.get_ref(), &mut buffer[..])?)) {
                        Ok(read) => read,
                        Err(_would_block) => continue,
                    },
                    Err(error) => Err(error),
                },
                _ = finished.wait_for(|finished| *finished) => {
                    last = true;
                    continue;
                }
            }
        };
        match read {
            Ok(0) => return,
            Ok(count) => {
                // A reader of ours that went away must not stop the process: the rest is thrown away.
                let _ = match to_stderr {
                    true => io::stderr().write_all(&buffer[..count]),
                    false => {
                        let mut stdout = io::stdout().lock();
                        stdout.write_all(&buffer[..count]).and_then(|()| stdout.flush())
                    }
                };
            }
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            // WouldBlock comes only in the last round, when the pipe is empty.
            Err(_) => return,
        }
    }
}

/// Removes the fifos of a deleted process that a detached ctr left behind, with their folder.
pub(crate) fn remove_leftovers<'a>(paths: impl IntoIterator<Item = &'a str>) {
    let mut folders = Vec::new();
    for path in paths.into_iter().map(Path::new).filter(|path| sys::fifo::is_fifo(path)) {
        let _ = std::fs::remove_file(path);
        folders.extend(path.parent());
    }
    // Fails, as it should, for a folder that holds anything else.
    for folder in folders {
        let _ = std::fs::remove_dir(folder);
    }
}

/// The terminal ctr runs on, in raw mode for as long as this lives.
pub(crate) struct Terminal {
    _raw: sys::pty::Raw<OwnedFd>,
}

impl Terminal {
    /// Takes stdin's terminal.
    pub(crate) fn take() -> anyhow::Result<Terminal> {
        ensure!(
            io::stdin().is_terminal(),
            "-t needs a terminal on stdin; leave it out when stdin is a pipe or a file"
        );
        let own = io::stdin().as_fd().try_clone_to_owned()?;
        Ok(Terminal { _raw: sys::pty::Raw::enter(own).context("cannot put the terminal into raw mode")? })
    }

    /// Columns and rows.
    pub(crate) fn size() -> Option<(u32, u32)> {
        let (columns, rows) = sys::pty::size(io::stdin()).ok()?;
        Some((columns.into(), rows.into()))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn choice(folder: &Path) -> Choice {
        Choice { fifo_dir: Some(folder.to_owned()), ..Choice::default() }
    }

    #[test]
    fn fifos_come_and_go() {
        let folder = tempfile::tempdir().unwrap();
        let streams = Streams::create("a", &choice(folder.path())).unwrap();
        let addresses = streams.addresses();
        for path in [&addresses.stdin, &addresses.stdout, &addresses.stderr] {
            assert!(is_fifo(path), "{path}");
        }
        assert_eq!(streams.hold().unwrap().len(), 2);
        drop(streams);
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
        let kept = Streams::create("a", &Choice { terminal: true, ..choice(folder.path()) }).unwrap();
        let addresses = kept.addresses();
        assert!(addresses.stderr.is_empty());
        let paths = [addresses.stdin, addresses.stdout];
        kept.keep();
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 1);
        remove_leftovers(paths.iter().map(String::as_str));
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[test]
    fn uris_and_null_need_no_folder() {
        let null = Streams::create("a", &Choice { null: true, ..Choice::default() }).unwrap();
        assert!(null.addresses().stdout.is_empty());
        let log = Choice { log_uri: Some("file:///tmp/x".into()), ..Choice::default() };
        assert_eq!(Streams::create("a", &log).unwrap().addresses().stderr, "file:///tmp/x");
        assert!(Streams::existing(Addresses { stdout: "file:///x".into(), ..Addresses::default() }).is_err());
    }

    #[tokio::test]
    async fn output_is_drained_even_while_a_writer_stays() {
        let folder = tempfile::tempdir().unwrap();
        let streams = Streams::create("a", &choice(folder.path())).unwrap();
        let out = PathBuf::from(streams.addresses().stdout);
        let copies = streams.copy().unwrap();
        let writer = sys::fifo::open_lasting_writer(&out).unwrap();
        rustix::io::write(&writer, b"\n").unwrap();
        copies.finish().await;
        assert_eq!(rustix::io::ioctl_fionread(&writer).unwrap(), 0);
    }
}
