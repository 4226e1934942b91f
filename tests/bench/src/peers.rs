//! The engines that are compared: which there are, and one of them running.
//!
//! Each run of a case has an engine of its own, started anew with empty folders: its root on the disk that holds the build,
//! its sockets and other state in a folder of /run (in memory, and a socket's path is short). All of it goes when the run ends,
//! and a run that leaves a process, a mount or a group behind has failed.

use std::cell::RefCell;
use std::fs::{self, File};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, bail, ensure};
use harness::network::{From, Network};
use harness::{cri, host, left};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::measure::{Cgroup, Detail, Sample, Watch, measure};

/// How long an engine may take to start or to end.
const LIMIT: Duration = Duration::from_secs(60);

/// Whose arguments an engine takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Gantry,
    Containerd,
    /// It has a containerd of its own, and another client: it joins the cases that say how.
    Docker,
}

/// An engine that is compared.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    /// What it is called in the report.
    pub(crate) name: String,
    pub(crate) kind: Kind,
    pub(crate) version: String,
    engine: PathBuf,
    client: PathBuf,
    environment: Vec<(&'static str, &'static str)>,
}

impl Peer {
    /// gantryd and its client, beside this program.
    pub(crate) fn gantry() -> Result<Self> {
        let folder = std::env::current_exe()?.parent().context("no folder")?.to_owned();
        let engine = folder.join("gantryd");
        ensure!(engine.exists(), "{} is not there; `make bench` builds it", engine.display());
        let version = version(&engine)?;
        Ok(Peer {
            name: "gantryd".into(),
            kind: Kind::Gantry,
            version,
            engine,
            client: folder.join("ctr"),
            environment: Vec::new(),
        })
    }

    /// containerd at a path, with the `ctr` beside it or else Debian's. Where `unpigz` is installed there are two, as
    /// containerd unpacks by it when it finds it.
    pub(crate) fn containerd(path: &Path, number: usize) -> Result<Vec<Self>> {
        ensure!(path.exists(), "{} is not there", path.display());
        let beside = path.with_file_name("ctr");
        let peer = Peer {
            name: if number == 0 { "containerd".into() } else { format!("containerd-{}", number + 1) },
            kind: Kind::Containerd,
            version: version(path)?,
            engine: path.to_owned(),
            client: if beside.exists() { beside } else { harness::host::STOCK_CTR.into() },
            environment: vec![("CONTAINERD_DISABLE_PIGZ", "1")],
        };
        let mut peers = vec![peer.clone()];
        if unpigz() {
            let name = format!("{} with unpigz", peer.name);
            peers.push(Peer { name, environment: Vec::new(), ..peer });
        }
        Ok(peers)
    }

    /// dockerd at a path, with the `docker` beside it or else Debian's.
    pub(crate) fn docker(path: &Path, number: usize) -> Result<Self> {
        ensure!(path.exists(), "{} is not there", path.display());
        let beside = path.with_file_name("docker");
        Ok(Peer {
            name: if number == 0 { "dockerd".into() } else { format!("dockerd-{}", number + 1) },
            kind: Kind::Docker,
            version: version(path)?,
            engine: path.to_owned(),
            client: if beside.exists() { beside } else { "/usr/bin/docker".into() },
            environment: Vec::new(),
        })
    }
}

/// Whether the engines find `unpigz`.
pub(crate) fn unpigz() -> bool {
    PATH.split(':').any(|folder| Path::new(folder).join("unpigz").exists())
}

fn version(program: &Path) -> Result<String> {
    let output = Command::new(program).arg("--version").output();
    let output = output.with_context(|| format!("cannot run {}", program.display()))?;
    Ok(String::from_utf8_lossy(&output.stdout).trim().to_owned())
}

/// PATH of the engines.
const PATH: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// An engine that runs.
pub(crate) struct Engine {
    pub(crate) peer: Peer,
    /// Where it keeps its data, and where a case may keep files of its own.
    pub(crate) folder: PathBuf,
    pub(crate) namespace: String,
    state: tempfile::TempDir,
    /// Its process, which a case may replace by a restart.
    child: RefCell<Child>,
    group: Cgroup,
    /// Where pods are, when it serves a kubelet.
    network: Option<Network>,
}

impl Engine {
    /// Starts one with its data in `folder`, which must not exist. To serve a kubelet, too, it gets a network of its own.
    pub(crate) fn start(peer: &Peer, folder: &Path, pods: bool) -> Result<Self> {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("gb-{}-{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        fs::create_dir_all(folder).with_context(|| format!("cannot make {}", folder.display()))?;
        let state = tempfile::Builder::new().prefix("gb-").tempdir_in("/run")?;
        // Not the name of the namespace, whose groups hold the containers.
        let group = Cgroup::new(&format!("{name}-engine"))?;
        let network = pods.then(|| Network::new(folder));
        let child = Self::spawn(peer, folder, state.path(), &name, &group, network.as_ref())?;
        let engine = Engine {
            peer: peer.clone(),
            folder: folder.to_owned(),
            namespace: name,
            state,
            child: RefCell::new(child),
            group,
            network,
        };
        engine.wait_until_it_serves()?;
        Ok(engine)
    }

    fn spawn(
        peer: &Peer,
        folder: &Path,
        state: &Path,
        namespace: &str,
        group: &Cgroup,
        network: Option<&Network>,
    ) -> Result<Child> {
        let log = File::options().append(true).create(true).open(folder.join("log"))?;
        // Into its group first, and into its network; and it ends with this program, however that ends.
        let mut command = Command::new("/bin/sh");
        command.args(["-c", r#"echo $$ >"$0" && exec setpriv --pdeathsig TERM "$@""#]);
        command.arg(group.entrance());
        if let Some(network) = network {
            command.arg("nsenter").arg(format!("--net={}", network.file(From::Host).display()));
        }
        command.arg(&peer.engine).args(match peer.kind {
            Kind::Docker => docker_arguments(folder, state, namespace)?,
            kind => arguments(kind, folder, state, network)?,
        });
        command.env("PATH", PATH).envs(peer.environment.iter().copied());
        Ok(command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log).spawn()?)
    }

    /// Ends it, with its containers left as they are, and starts it again: how long it took from there until `serves`.
    pub(crate) fn restart(&self, mut serves: impl FnMut() -> bool) -> Result<Duration> {
        self.end()?;
        let began = Instant::now();
        let (state, network) = (self.state.path(), self.network.as_ref());
        let started = Self::spawn(&self.peer, &self.folder, state, &self.namespace, &self.group, network)?;
        *self.child.borrow_mut() = started;
        while !serves() {
            self.has_not_ended()?;
            ensure!(
                began.elapsed() < LIMIT,
                "{} does not serve after {LIMIT:?}: {}",
                self.peer.name,
                self.log()
            );
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(began.elapsed())
    }

    fn has_not_ended(&self) -> Result<()> {
        match self.child.borrow_mut().try_wait()? {
            Some(status) => bail!("{} ended at its start with {status}: {}", self.peer.name, self.log()),
            None => Ok(()),
        }
    }

    fn pid(&self) -> i32 {
        self.child.borrow().id() as i32
    }

    fn wait_until_it_serves(&self) -> Result<()> {
        let end = Instant::now() + LIMIT;
        while UnixStream::connect(self.address()).is_err() || self.ctr(&["version"]).is_err() {
            self.has_not_ended()?;
            ensure!(
                Instant::now() < end,
                "{} does not serve after {LIMIT:?}: {}",
                self.peer.name,
                self.log()
            );
            std::thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// Its gRPC socket.
    pub(crate) fn address(&self) -> PathBuf {
        self.state.path().join("e.sock")
    }

    /// The last lines that it logged.
    fn log(&self) -> String {
        let log = fs::read_to_string(self.folder.join("log")).unwrap_or_default();
        let last: Vec<&str> = log.lines().rev().take(5).collect();
        last.into_iter().rev().collect::<Vec<_>>().join("\n")
    }

    /// A command of its own client, not started.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.peer.client);
        if self.peer.kind == Kind::Docker {
            command.arg("--host").arg(format!("unix://{}", self.address().display())).args(arguments);
            command.env("DOCKER_CONFIG", self.folder.join("client"));
            return command;
        }
        command.arg("--address").arg(self.address()).args(["--namespace", &self.namespace]).args(arguments);
        for variable in
            ["CONTAINERD_ADDRESS", "CONTAINERD_NAMESPACE", "CONTAINERD_SNAPSHOTTER", "GANTRY_ADDRESS"]
        {
            command.env_remove(variable);
        }
        command
    }

    /// Runs its client, unmeasured; what it printed. It has to succeed.
    pub(crate) fn ctr(&self, arguments: &[&str]) -> Result<String> {
        Self::run(self.command(arguments))
    }

    /// Imports an image where a kubelet sees it.
    pub(crate) fn import_for_pods(&self, image: &harness::image::Image) -> Result<()> {
        let archive = self.folder.join("image.tar");
        image.write(&archive)?;
        let mut command = Command::new(&self.peer.client);
        command.arg("--address").arg(self.address()).args([
            "--namespace",
            cri::NAMESPACE,
            "images",
            "import",
        ]);
        command.arg(archive);
        Self::run(command).map(drop)
    }

    /// What the engine holds, and what its shims hold on average: see [`crate::measure::held`].
    pub(crate) fn held(&self) -> ([f64; 4], [f64; 4]) {
        let engine = self.pid();
        let shims: Vec<i32> = self.group.processes().into_iter().filter(|pid| *pid != engine).collect();
        (crate::measure::held(&[engine]), crate::measure::held(&shims))
    }

    /// The memory in use now, in MiB, as proportional sets: of the engine and what it started, and of the processes in these
    /// groups beneath its own name's.
    pub(crate) fn pss(&self, groups: &[String]) -> f64 {
        let mut pids = self.group.processes();
        for group in left::cgroups(&self.namespace) {
            if groups.iter().any(|wanted| group.ends_with(wanted)) {
                let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
                pids.extend(text.lines().filter_map(|line| line.parse::<i32>().ok()));
            }
        }
        pids.sort_unstable();
        pids.dedup();
        crate::measure::pss(&pids)
    }

    fn run(mut command: Command) -> Result<String> {
        let output = command.stdin(Stdio::null()).output()?;
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(output.status.success(), "{command:?}: {}: {}", output.status, said.trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Measures work on it. Everything that was written before is on disk when the work begins.
    pub(crate) fn measure(&self, detail: Detail, work: impl FnOnce(&Watch) -> Result<()>) -> Result<Sample> {
        if matches!(detail, Detail::Sampled) {
            crate::measure::sync(&self.folder)?;
        }
        measure(self.pid(), &self.group, &self.folder, detail, work)
    }

    /// Stops it, removes what it had, and fails when it left anything.
    pub(crate) fn stop(self) -> Result<()> {
        self.end()?;
        // A shim ends by itself a moment after its last container.
        let end = Instant::now() + Duration::from_secs(5);
        let mut left = self.left();
        while !left.is_empty() && Instant::now() < end {
            std::thread::sleep(Duration::from_millis(20));
            left = self.left();
        }
        ensure!(left.is_empty(), "{} left behind: {}", self.peer.name, left.join(", "));
        Ok(())
    }

    /// Tells it to end, and waits until it has.
    fn end(&self) -> Result<()> {
        kill(Pid::from_raw(self.pid()), Signal::SIGTERM)?;
        let end = Instant::now() + LIMIT;
        while self.child.borrow_mut().try_wait()?.is_none() {
            ensure!(Instant::now() < end, "{} does not end on SIGTERM", self.peer.name);
            std::thread::sleep(Duration::from_millis(5));
        }
        Ok(())
    }

    fn left(&self) -> Vec<String> {
        let mut left = left::behind(self.state.path(), &self.namespace);
        left.extend(left::mounts(&self.folder));
        if let Some(network) = &self.network {
            left.extend(network.addresses().iter().map(|address| format!("address {address}")));
        }
        left
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        let _ = self.child.get_mut().kill();
        let _ = self.child.get_mut().wait();
        for (pid, _) in left::processes(self.state.path()) {
            let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
        }
        // Of a case that failed: its containers, which name no path of ours.
        for group in left::cgroups(&self.namespace) {
            let text = fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default();
            for pid in text.lines().filter_map(|line| line.parse().ok()) {
                let _ = kill(Pid::from_raw(pid), Signal::SIGKILL);
            }
        }
        for mount in left::mounts(self.state.path()).into_iter().chain(left::mounts(&self.folder)).rev() {
            let _ = Command::new("umount").args(["-l", &mount]).output();
        }
        left::remove_empty_parents(&self.namespace);
        let _ = fs::remove_dir_all(&self.folder);
    }
}

/// The arguments for an engine with its data in `folder` and its sockets in `state`.
fn arguments(kind: Kind, folder: &Path, state: &Path, network: Option<&Network>) -> Result<Vec<String>> {
    let (root, other) = (folder.join("root"), state.join("s"));
    let (root, other, address) = (root.display(), other.display(), state.join("e.sock"));
    let address = address.display();
    // CRI in both or in none, and of containerd's snapshotters those that ours has: memory is compared like with like.
    let kubelets =
        |kind| network.map(|network| cri::configuration(kind, network, "", "")).unwrap_or_default();
    let no_cri = if network.is_none() { "'io.containerd.grpc.v1.cri'," } else { "" };
    let (name, text) = match kind {
        Kind::Gantry => (
            "gantry.toml",
            format!("version = 2\nroot = '{root}'\nstate = '{other}'\n[grpc]\naddress = '{address}'\n")
                + &kubelets(host::Kind::Gantry),
        ),
        Kind::Containerd | Kind::Docker => (
            "containerd.toml",
            format!(
                "version = 2\nroot = '{root}'\nstate = '{other}'\ndisabled_plugins = [{no_cri} \
                 'io.containerd.snapshotter.v1.aufs', 'io.containerd.snapshotter.v1.zfs', \
                 'io.containerd.snapshotter.v1.devmapper', 'io.containerd.internal.v1.opt', \
                 'io.containerd.tracing.processor.v1.otlp']\n[grpc]\naddress = '{address}'\n"
            ) + &kubelets(host::Kind::Containerd),
        ),
    };
    let path = folder.join(name);
    fs::write(&path, text)?;
    Ok(vec!["--config".into(), path.to_str().context("a path that is not text")?.into()])
}

/// dockerd's, without networks of its own; it starts its containerd itself.
fn docker_arguments(folder: &Path, state: &Path, namespace: &str) -> Result<Vec<String>> {
    let settings = folder.join("daemon.json");
    // Another configuration of this machine is not to reach in.
    fs::write(&settings, "{}")?;
    Ok(vec![
        format!("--data-root={}", folder.join("root").display()),
        format!("--exec-root={}", state.join("x").display()),
        format!("--pidfile={}", state.join("pid").display()),
        format!("--host=unix://{}", state.join("e.sock").display()),
        format!("--config-file={}", settings.display()),
        format!("--cgroup-parent=/{namespace}"),
        "--bridge=none".into(),
        "--iptables=false".into(),
        "--ip6tables=false".into(),
    ])
}
