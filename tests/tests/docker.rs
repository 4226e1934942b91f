//! Debian's dockerd on our engine: it keeps its images and networks itself, and runs every container through us.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs::{self, File};
use std::os::unix::process::CommandExt as _;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use nix::mount::{MntFlags, umount2};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::host::{Host, RUNC};
use tests::image::{BUSYBOX, NAME};
use tests::terminal::Terminal;
use tests::{left, ready, wait_for};

const DOCKERD: &str = "/usr/sbin/dockerd";
const DOCKER: &str = "/usr/bin/docker";

/// A dockerd in a folder of the engine's host, with its own root, socket and namespace; no networks of its own.
struct Docker {
    host: Host,
    child: Option<Child>,
}

impl Docker {
    fn start() -> Option<Self> {
        if !ready(&[DOCKERD, DOCKER, RUNC, BUSYBOX]) {
            return None;
        }
        let mut docker = Docker { host: Host::gantry(), child: None };
        docker.start_daemon();
        Some(docker)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.host.folder().join("d").join(name)
    }

    fn start_daemon(&mut self) {
        fs::create_dir_all(self.path("")).unwrap();
        let log = File::options().create(true).append(true).open(self.path("log")).unwrap();
        let mut command = Command::new(DOCKERD);
        command
            .arg("--containerd")
            .arg(self.host.address())
            .args(["--containerd-namespace", &self.host.namespace])
            .args(["--containerd-plugins-namespace", &format!("{}-plugins", self.host.namespace)])
            .arg("--data-root")
            .arg(self.path("data"))
            .arg("--exec-root")
            .arg(self.path("exec"))
            .arg("--pidfile")
            .arg(self.path("pid"))
            .arg("--host")
            .arg(format!("unix://{}", self.path("sock").display()))
            .args(["--iptables=false", "--ip6tables=false", "--bridge=none", "--live-restore"])
            .args(["--cgroup-parent", &format!("/{}", self.host.namespace)])
            // Another configuration of this machine is not to reach in.
            .arg("--config-file")
            .arg(self.path("daemon.json"))
            .stdin(Stdio::null())
            .stdout(log.try_clone().unwrap())
            .stderr(log)
            .process_group(0);
        fs::write(self.path("daemon.json"), "{}").unwrap();
        self.child = Some(command.spawn().unwrap());
        wait_for("dockerd", || {
            let running = self.child.as_mut().unwrap().try_wait().unwrap().is_none();
            assert!(running, "dockerd ended: {}", self.log());
            self.try_run(&["version"]).0
        });
    }

    fn stop_daemon(&mut self, signal: Signal) {
        if let Some(mut child) = self.child.take() {
            kill(Pid::from_raw(child.id() as i32), signal).unwrap();
            child.wait().unwrap();
        }
    }

    fn log(&self) -> String {
        fs::read_to_string(self.path("log")).unwrap_or_default()
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(DOCKER);
        command
            .arg("--host")
            .arg(format!("unix://{}", self.path("sock").display()))
            .args(arguments)
            .env("DOCKER_CONFIG", self.path("client"))
            .env("DOCKER_BUILDKIT", "0");
        command
    }

    /// Whether it succeeded, its code, stdout and stderr.
    fn try_run(&self, arguments: &[&str]) -> (bool, i32, String, String) {
        let mut limited = Command::new("timeout");
        let command = self.command(arguments);
        limited.arg("60").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            limited.env(name, value.unwrap());
        }
        let output = limited.stdin(Stdio::null()).output().unwrap();
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
        let code = output.status.code().unwrap();
        (output.status.success(), code, text(&output.stdout), text(&output.stderr))
    }

    #[track_caller]
    fn ok(&self, arguments: &[&str]) -> String {
        let (success, code, stdout, stderr) = self.try_run(arguments);
        assert!(success, "docker {}: {code}: {stdout}\n{stderr}\n{}", arguments.join(" "), self.tail());
        stdout
    }

    fn tail(&self) -> String {
        let log = self.log();
        let lines: Vec<&str> =
            log.lines().rev().filter(|line| !line.contains("level=info")).take(8).collect();
        format!("--- dockerd: {}", lines.into_iter().rev().collect::<Vec<_>>().join("\n"))
    }

    /// Loads the test image, by an archive that our ctr exports; its name.
    fn load(&self) -> &'static str {
        self.host.import();
        let archive = self.path("image.tar");
        self.host.ctr().ok(&["images", "export", archive.to_str().unwrap(), NAME]);
        self.ok(&["load", "-i", archive.to_str().unwrap()]);
        assert!(self.ok(&["images", "-q"]).lines().count() == 1);
        NAME
    }

    /// Removes all containers and the daemon.
    fn finish(mut self) {
        let containers = self.ok(&["ps", "-aq"]);
        for container in containers.lines() {
            self.ok(&["rm", "-f", container]);
        }
        assert_eq!(self.host.ctr().ok(&["containers", "ls", "-q"]), "");
        self.stop_daemon(Signal::SIGTERM);
    }
}

impl Drop for Docker {
    fn drop(&mut self) {
        if std::thread::panicking() {
            println!("{}", self.tail());
        }
        self.stop_daemon(Signal::SIGKILL);
        // dockerd's own, of its root and its network namespaces.
        for mount in left::mounts(&self.path("")).iter().rev() {
            let _ = umount2(mount.as_str(), MntFlags::MNT_DETACH);
        }
        // What dockerd leaves of builds, empty.
        left::remove_empty_parents("docker/buildkit");
        left::remove_empty_parents("docker");
    }
}

#[test]
fn a_container_through_its_life() {
    let Some(docker) = Docker::start() else { return };
    let image = docker.load();
    assert_eq!(docker.ok(&["run", "--rm", "--network", "none", image, "echo", "hi"]), "hi");
    assert_eq!(docker.try_run(&["run", "--rm", "--network", "none", image, "sh", "-c", "exit 7"]).1, 7);
    let (_, code, _, error) = docker.try_run(&["run", "--rm", "--network", "none", image, "/no/such"]);
    assert_eq!(code, 127);
    assert!(error.contains("no such file or directory"), "{error}");

    let script = "echo out; echo err >&2; trap 'exit 9' TERM; while true; do sleep 0.1; done";
    let long =
        ["run", "-d", "--name", "long", "--network", "none", "--memory", "64m", image, "sh", "-c", script];
    docker.ok(&long);
    assert_eq!(docker.ok(&["exec", "long", "echo", "inside"]), "inside");
    assert_eq!(docker.try_run(&["exec", "long", "sh", "-c", "exit 8"]).1, 8);
    let mut terminal = Terminal::start(&docker.command(&["exec", "-it", "long", "sh"]), 33, 101);
    terminal.expect("# ");
    terminal.expect_size("33 101");
    terminal.send("exit 5\n");
    assert_eq!(terminal.wait(), 5);
    wait_for("the output in the log", || docker.ok(&["logs", "long"]) == "out");
    let stats = docker.ok(&["stats", "--no-stream", "--format", "{{.MemUsage}} {{.PIDs}}", "long"]);
    assert!(stats.contains("64MiB") && !stats.starts_with("0B"), "{stats}");
    assert!(docker.ok(&["top", "long"]).contains("sleep"));

    docker.ok(&["pause", "long"]);
    assert_eq!(docker.ok(&["inspect", "-f", "{{.State.Status}}", "long"]), "paused");
    docker.ok(&["unpause", "long"]);
    docker.ok(&["update", "--memory", "96m", "--memory-swap", "96m", "long"]);
    assert!(docker.ok(&["stats", "--no-stream", "--format", "{{.MemUsage}}", "long"]).contains("96MiB"));

    let file = docker.path("file");
    fs::write(&file, "copied").unwrap();
    docker.ok(&["cp", file.to_str().unwrap(), "long:/file"]);
    assert_eq!(docker.ok(&["exec", "long", "cat", "/file"]), "copied");
    docker.ok(&["commit", "long", "committed"]);
    assert_eq!(docker.ok(&["run", "--rm", "--network", "none", "committed", "cat", "/file"]), "copied");

    docker.ok(&["stop", "long"]);
    assert_eq!(docker.ok(&["wait", "long"]), "9");
    docker.ok(&["start", "long"]);
    docker.ok(&["restart", "-t", "1", "long"]);
    assert_eq!(docker.ok(&["exec", "long", "cat", "/file"]), "copied");
    docker.ok(&["kill", "long"]);
    assert_eq!(docker.ok(&["wait", "long"]), "137");
    docker.ok(&["rm", "long"]);
    docker.finish();
}

#[test]
fn restart_policies_and_live_restore() {
    let Some(mut docker) = Docker::start() else { return };
    let image = docker.load();
    let inspect = |docker: &Docker, name: &str, what: &str| docker.ok(&["inspect", "-f", what, name]);
    let retry = ["run", "-d", "--name", "retried", "--restart", "on-failure:2", "--network", "none", image];
    docker.ok(&[&retry[..], &["sh", "-c", "exit 3"]].concat());
    wait_for("the retries", || {
        inspect(&docker, "retried", "{{.RestartCount}} {{.State.Status}} {{.State.ExitCode}}") == "2 exited 3"
    });
    let always = ["run", "-d", "--name", "always", "--restart", "always", "--network", "none", image];
    docker.ok(&[&always[..], &["sleep", "1000"]].concat());
    let first = inspect(&docker, "always", "{{.State.Pid}}");
    kill(Pid::from_raw(first.parse().unwrap()), Signal::SIGKILL).unwrap();
    wait_for("the restart", || {
        inspect(&docker, "always", "{{.State.Status}} {{.RestartCount}}") == "running 1"
    });

    // dockerd goes and comes back, then the engine: the container stays what it was.
    let running = inspect(&docker, "always", "{{.State.Pid}}");
    docker.stop_daemon(Signal::SIGKILL);
    let _ = fs::remove_file(docker.path("pid"));
    docker.start_daemon();
    assert_eq!(inspect(&docker, "always", "{{.State.Status}} {{.State.Pid}}"), format!("running {running}"));
    docker.host.kill();
    docker.host.start();
    wait_for("dockerd to be connected again", || docker.try_run(&["exec", "always", "true"]).0);
    assert_eq!(inspect(&docker, "always", "{{.State.Status}} {{.State.Pid}}"), format!("running {running}"));
    assert_eq!(docker.ok(&["exec", "always", "echo", "here"]), "here");

    // What exits while the engine is away is learned of afterwards.
    docker.ok(&["update", "--restart", "no", "always"]);
    docker.host.kill();
    kill(Pid::from_raw(running.parse().unwrap()), Signal::SIGKILL).unwrap();
    docker.host.start();
    wait_for("dockerd to learn of the exit", || {
        inspect(&docker, "always", "{{.State.Status}} {{.State.ExitCode}}") == "exited 137"
    });
    docker.finish();
}

#[test]
fn images_are_built() {
    let Some(docker) = Docker::start() else { return };
    let image = docker.load();
    let context = docker.path("context");
    fs::create_dir(&context).unwrap();
    fs::write(context.join("added"), "from the context").unwrap();
    let dockerfile = format!("FROM {image}\nCOPY added /added\nRUN cat /added >/built\nCMD cat /built\n");
    fs::write(context.join("Dockerfile"), dockerfile).unwrap();
    docker.ok(&["build", "--network", "none", "-t", "built", context.to_str().unwrap()]);
    assert_eq!(docker.ok(&["run", "--rm", "--network", "none", "built"]), "from the context");
    docker.ok(&["rmi", "built"]);
    docker.finish();
}
