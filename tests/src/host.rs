//! The engines under test, each with folders, sockets and a namespace of its own.

use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::client::Ctr;
use crate::{binary, image, left, wait_for};

/// Debian's containerd.
pub const CONTAINERD: &str = "/usr/bin/containerd";
/// Debian's client.
pub const STOCK_CTR: &str = "/usr/bin/ctr";
/// Debian's shim.
pub const STOCK_SHIM: &str = "/usr/bin/containerd-shim-runc-v2";
/// The runtime.
pub const RUNC: &str = "/usr/sbin/runc";

/// Which engine.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Ours.
    Gantry,
    /// Debian's.
    Containerd,
}

/// An engine. Dropped, it is stopped, and the test fails when anything is left of it.
pub struct Host {
    /// Which engine it is.
    pub kind: Kind,
    /// The namespace that its tests use.
    pub namespace: String,
    /// PATH for the engine, and so for its shims and runtimes.
    pub path: String,
    /// A program, and its arguments, that becomes the engine.
    pub before: Vec<String>,
    /// More arguments for the engine.
    pub arguments: Vec<String>,
    /// More of the engine's environment.
    pub environment: Vec<(String, String)>,
    /// The file of the network namespace that it runs in, if not in the machine's own.
    pub network: Option<PathBuf>,
    /// Settings of the kubelet's plugin, as a containerd configuration of version 2. Debian's containerd serves the kubelet
    /// only with such.
    pub settings: Option<String>,
    /// Whether it collects garbage after its start and after what it has deleted and changed, too, or only when it is asked to,
    /// so that no test depends on when that happens. A configuration of the test's own says so itself.
    pub collects_by_itself: bool,
    folder: PathBuf,
    _holder: tempfile::TempDir,
    child: Option<Child>,
}

/// Keeps an engine's log in the folder that GANTRY_KEEP_LOGS names, under the name of the test's file.
pub fn keep_log(log: &str) {
    let Some(folder) = std::env::var_os("GANTRY_KEEP_LOGS") else { return };
    let exe = std::env::current_exe().unwrap();
    let name = exe.file_name().unwrap().to_string_lossy();
    let name = name.rsplit_once('-').map_or(&*name, |(name, _)| name).to_owned();
    static NUMBER: AtomicU32 = AtomicU32::new(0);
    let number = NUMBER.fetch_add(1, Ordering::Relaxed);
    let path = Path::new(&folder).join(format!("{name}.{}.{number}.log", std::process::id()));
    fs::create_dir_all(&folder).and_then(|()| fs::write(path, log)).unwrap();
}

/// The usual search path, with the folder of our binaries first or not.
fn search_path(ours_first: bool) -> String {
    let usual = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";
    if ours_first {
        format!("{}:{usual}", binary("gantryd").parent().unwrap().display())
    } else {
        usual.to_owned()
    }
}

impl Host {
    /// An engine that has not been started.
    pub fn new(kind: Kind) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let number = NUMBER.fetch_add(1, Ordering::Relaxed);
        // Short: a unix socket's path has 107 bytes.
        let holder = tempfile::Builder::new().prefix("gt-").tempdir_in("/tmp").unwrap();
        Host {
            kind,
            namespace: format!("gt-{}-{number}", std::process::id()),
            path: search_path(false),
            before: Vec::new(),
            arguments: Vec::new(),
            environment: Vec::new(),
            network: None,
            settings: None,
            collects_by_itself: false,
            folder: holder.path().to_owned(),
            _holder: holder,
            child: None,
        }
    }

    /// gantryd, started, with its own shim.
    pub fn gantry() -> Self {
        let mut host = Host::new(Kind::Gantry);
        host.start();
        host
    }

    /// containerd, started, with its own shim.
    pub fn containerd() -> Self {
        let mut host = Host::new(Kind::Containerd);
        host.start();
        host
    }

    /// containerd, started, with our shim.
    pub fn containerd_with_our_shim() -> Self {
        let mut host = Host::new(Kind::Containerd);
        host.path = search_path(true);
        host.start();
        host
    }

    /// Either, started, with its own shim.
    pub fn started(kind: Kind) -> Self {
        match kind {
            Kind::Gantry => Host::gantry(),
            Kind::Containerd => Host::containerd(),
        }
    }

    /// gantryd, started, which collects garbage by itself: for tests of just that, and those that try what it may disturb.
    pub fn collecting() -> Self {
        let mut host = Host::new(Kind::Gantry);
        host.collects_by_itself = true;
        host.start();
        host
    }

    /// Collects garbage, and returns when it is gone.
    pub fn collect(&self) {
        let ctr = self.stock_ctr();
        ctr.ok(&["leases", "create", "--id", "to-collect"]);
        ctr.ok(&["leases", "rm", "--sync", "to-collect"]);
    }

    /// The folder that holds all of it.
    pub fn folder(&self) -> &Path {
        &self.folder
    }

    /// Its durable state.
    pub fn root(&self) -> PathBuf {
        self.folder.join("r")
    }

    /// Its other state.
    pub fn state(&self) -> PathBuf {
        self.folder.join("s")
    }

    /// Its gRPC socket.
    pub fn address(&self) -> PathBuf {
        self.folder.join("e.sock")
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.join("log")).unwrap_or_default()
    }

    /// The process id of the running engine.
    pub fn pid(&self) -> i32 {
        self.child.as_ref().expect("not started").id() as i32
    }

    /// The command that runs the engine in the foreground.
    pub fn command(&self) -> Command {
        let program = |program: PathBuf| match &self.network {
            None if !self.before.is_empty() => {
                let mut command = Command::new(&self.before[0]);
                command.args(&self.before[1..]).arg(program);
                command
            }
            None => Command::new(program),
            // It becomes the engine, which so keeps its process id.
            Some(network) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={}", network.display())).arg(program);
                command
            }
        };
        let settings = [
            self.settings.as_deref().unwrap_or_default(),
            if self.collects_by_itself || self.arguments.iter().any(|argument| argument == "--config") {
                ""
            } else {
                // Put off by a day; after what is asked for, the time until the next is derived from how long it took.
                "\n[plugins.'io.containerd.gc.v1.scheduler']\nstartup_delay = '24h'\npause_threshold = 1e-9\n\
                 mutation_threshold = 0\n"
            },
        ]
        .concat();
        let mut command = match self.kind {
            Kind::Gantry => {
                let mut command = program(binary("gantryd"));
                command.arg("--root").arg(self.root()).arg("--state").arg(self.state());
                command.arg("--address").arg(self.address());
                if !settings.is_empty() {
                    let config = self.folder.join("config.toml");
                    fs::write(&config, format!("version = 2\n{settings}")).unwrap();
                    command.arg("--config").arg(config).args(["--log-level", "debug"]);
                // A configuration says its own level.
                } else if !self.arguments.iter().any(|argument| argument == "--config") {
                    command.args(["--log-level", "debug"]);
                }
                command
            }
            Kind::Containerd => {
                let config = self.folder.join("config.toml");
                let text = format!(
                    "version = 2\nroot = '{}'\nstate = '{}'\ndisabled_plugins = [{} \
                     'io.containerd.snapshotter.v1.aufs', 'io.containerd.snapshotter.v1.btrfs', \
                     'io.containerd.snapshotter.v1.zfs', 'io.containerd.snapshotter.v1.devmapper', \
                     'io.containerd.internal.v1.opt', 'io.containerd.tracing.processor.v1.otlp']\n[grpc]\naddress = '{}'\n\
                     [debug]\nlevel = 'debug'\n{settings}",
                    self.root().display(),
                    self.state().display(),
                    if self.settings.is_some() { "" } else { "'io.containerd.grpc.v1.cri'," },
                    self.address().display(),
                );
                fs::write(&config, text).unwrap();
                let mut command = program(CONTAINERD.into());
                command.arg("-c").arg(config);
                command
            }
        };
        command.args(&self.arguments).env("PATH", &self.path).envs(self.environment.iter().cloned());
        command
    }

    /// Starts it, and waits until it serves.
    pub fn start(&mut self) {
        assert!(self.child.is_none(), "started twice");
        let log = File::options().append(true).create(true).open(self.folder.join("log")).unwrap();
        let child = self
            .command()
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .spawn()
            .unwrap_or_else(|error| panic!("{:?}: {error}", self.kind));
        let child = self.child.insert(child);
        let (address, log) = (self.folder.join("e.sock"), self.folder.join("log"));
        wait_for("the engine to serve", || {
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the engine ended with {status}:\n{}", fs::read_to_string(&log).unwrap());
            }
            UnixStream::connect(&address).is_ok()
        });
        let ctr = Ctr::stock(self);
        wait_for("the engine to answer", || ctr.run(&["version"]).code == 0);
    }

    /// Tells it to stop, and waits until it has.
    pub fn stop(&mut self) -> ExitStatus {
        self.end(Signal::SIGTERM)
    }

    /// Kills it.
    pub fn kill(&mut self) {
        self.end(Signal::SIGKILL);
    }

    fn end(&mut self, signal: Signal) -> ExitStatus {
        let mut child = self.child.take().expect("not started");
        kill(Pid::from_raw(child.id() as i32), signal).unwrap();
        let mut status = None;
        wait_for("the engine to end", || {
            status = child.try_wait().unwrap();
            status.is_some()
        });
        status.unwrap()
    }

    /// Its own client: Debian's for containerd, ours for gantryd.
    pub fn ctr(&self) -> Ctr {
        Ctr::ours(self)
    }

    /// Debian's client.
    pub fn stock_ctr(&self) -> Ctr {
        Ctr::stock(self)
    }

    /// Imports the busybox image with Debian's client; its name.
    pub fn import(&self) -> &'static str {
        let archive = self.folder.join("busybox.tar");
        image::busybox().write(&archive).unwrap();
        self.stock_ctr().ok(&["images", "import", archive.to_str().unwrap()]);
        image::NAME
    }

    /// What is left of its containers, without the engine itself.
    pub fn left(&self) -> Vec<String> {
        let own = self.child.as_ref().map(|child| format!("process {}:", child.id()));
        let mut left = left::behind(&self.folder, &self.namespace);
        left.retain(|line| own.as_ref().is_none_or(|own| !line.starts_with(own)));
        left
    }

    /// Waits until nothing is left of its containers.
    pub fn assert_nothing_left(&self) {
        let mut left = Vec::new();
        let end = std::time::Instant::now() + std::time::Duration::from_secs(10);
        loop {
            left.clone_from(&self.left());
            if left.is_empty() {
                return;
            }
            assert!(
                std::time::Instant::now() < end,
                "left behind:\n{}\nlog:\n{}",
                left.join("\n"),
                self.log()
            );
            std::thread::sleep(std::time::Duration::from_millis(20));
        }
    }

    /// Ends whatever there is, so that a failed test leaves nothing for the next.
    fn clean(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
        let sockets = left::shim_sockets(&self.state());
        // Found by this engine's own folder: these are processes of this test and nobody else's.
        for (pid, _) in left::processes(&self.folder) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        for socket in sockets {
            let _ = fs::remove_file(socket);
        }
        for state in left::runtime_state(&self.namespace) {
            let name = state.file_name().unwrap().to_owned();
            let root = state.parent().unwrap().to_owned();
            let _ = Command::new(RUNC).arg("--root").arg(root).args(["delete", "--force"]).arg(name).output();
        }
        for mount in left::mounts(&self.folder).iter().rev() {
            let _ = Command::new("umount").args(["-l", mount]).output();
        }
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        keep_log(&self.log());
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(25).collect();
            println!("--- the engine's log ---");
            tail.iter().rev().for_each(|line| println!("{line}"));
            self.clean();
            left::remove_empty_parents(&self.namespace);
            return;
        }
        if self.child.is_some() {
            self.stop();
        }
        let left = left::behind(&self.folder, &self.namespace);
        self.clean();
        left::remove_empty_parents(&self.namespace);
        assert!(left.is_empty(), "left behind by {:?}:\n{}", self.kind, left.join("\n"));
    }
}
