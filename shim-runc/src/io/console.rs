//! The socket over which a runtime sends the master side of the terminal it made.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use shim_api::{Error, Result};
use tokio::io::Interest;
use tokio::net::UnixListener;

/// The runtime has exited when we ask: what it sent is there.
const LIMIT: Duration = Duration::from_secs(10);

pub(super) struct Console {
    listener: UnixListener,
    folder: PathBuf,
    path: PathBuf,
}

impl Console {
    /// Listens in a new folder that only root can enter. Not in the bundle, whose path may be too long for a
    /// socket.
    pub(super) fn listen() -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let parent = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(std::env::temp_dir, PathBuf::from);
        let folder = loop {
            let number = NUMBER.fetch_add(1, Ordering::Relaxed);
            let folder = parent.join(format!("gantry-pty-{}-{number}", std::process::id()));
            match fs::DirBuilder::new().mode(0o700).create(&folder) {
                Ok(()) => break folder,
                // Left by a process that had our pid once.
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
                Err(error) => {
                    return Err(Error::internal(format!("make {}: {error}", folder.display())));
                }
            }
        };
        let path = folder.join("pty.sock");
        match UnixListener::bind(&path) {
            Ok(listener) => Ok(Self { listener, folder, path }),
            Err(error) => {
                let _ = fs::remove_dir(&folder);
                Err(Error::internal(format!("listen on {}: {error}", path.display())))
            }
        }
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// The terminal, non-blocking.
    pub(super) async fn receive(self) -> Result<OwnedFd> {
        let receive = async {
            let (stream, _) = self.listener.accept().await?;
            let master = stream.async_io(Interest::READABLE, || sys::pty::receive_master(&stream)).await?;
            sys::fifo::set_nonblocking(&master)?;
            Ok::<_, io::Error>(master)
        };
        match tokio::time::timeout(LIMIT, receive).await {
            Ok(Ok(master)) => Ok(master),
            Ok(Err(error)) => Err(Error::internal(format!("receive the terminal from the runtime: {error}"))),
            Err(_) => Err(Error::deadline_exceeded("the runtime sent no terminal within 10 s")),
        }
    }
}

impl Drop for Console {
    fn drop(&mut self) {
        let _ = fs::remove_file(&self.path);
        let _ = fs::remove_dir(&self.folder);
    }
}
