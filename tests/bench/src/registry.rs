//! Debian's docker-registry on loopback, for one folder of storage. It ends when it is dropped.

use std::fs::{self, File};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};

/// A registry that runs.
pub(crate) struct Registry {
    child: Child,
    port: u16,
}

impl Registry {
    /// Starts one over `storage`; its configuration and log are in `folder`.
    pub(crate) fn start(storage: &Path, folder: &Path) -> Result<Self> {
        fs::create_dir_all(folder)?;
        let port = TcpListener::bind("127.0.0.1:0")?.local_addr()?.port();
        let config = folder.join("registry.yml");
        fs::write(
            &config,
            format!(
                "version: 0.1\nlog:\n  level: error\n  accesslog:\n    disabled: true\nstorage:\n  filesystem:\n    \
                 rootdirectory: {}\nhttp:\n  addr: 127.0.0.1:{port}\n",
                storage.display()
            ),
        )?;
        let log = File::create(folder.join("registry.log"))?;
        // It ends with this program, however that ends.
        let mut command = Command::new("setpriv");
        command
            .args(["--pdeathsig", "TERM", "docker-registry", "serve"])
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log);
        let child = command.spawn().context("cannot run docker-registry")?;
        let mut registry = Registry { child, port };
        let end = Instant::now() + Duration::from_secs(20);
        while TcpStream::connect(("127.0.0.1", port)).is_err() {
            let ended = registry.child.try_wait()?;
            ensure!(
                ended.is_none() && Instant::now() < end,
                "docker-registry does not serve; see {}",
                folder.display()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(registry)
    }

    /// The name of an image in it.
    pub(crate) fn name(&self, tag: &str) -> String {
        format!("127.0.0.1:{}/bench/five:{tag}", self.port)
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
