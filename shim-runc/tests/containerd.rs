//! The shim under Debian's stock containerd (1.6): run, exec, kill, and a restart of the daemon in between.
//! Needs root, runc, busybox-static and containerd; says so and passes without containerd.

#![allow(clippy::unwrap_used)]

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

const SHIM: &str = env!("CARGO_BIN_EXE_containerd-shim-runc-v2");
const CONTAINERD: &str = "/usr/bin/containerd";
// Not by PATH: the folder of our shim has a ctr of ours, too.
const CTR: &str = "/usr/bin/ctr";
const LIMIT: Duration = Duration::from_secs(30);

struct Stock {
    folder: tempfile::TempDir,
    namespace: String,
    daemon: Option<Child>,
}

impl Stock {
    fn new() -> Self {
        let folder = tempfile::Builder::new().prefix("gantry-stock-").tempdir().unwrap();
        let root = folder.path().join("rootfs");
        for name in ["bin", "proc", "dev", "sys", "tmp", "etc", "run"] {
            fs::create_dir_all(root.join(name)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("this test needs busybox-static");
        for applet in ["sh", "sleep", "cat", "echo"] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        let here = folder.path().display();
        let config = format!(
            "version = 2\nroot = \"{here}/root\"\nstate = \"{here}/state\"\n\
             disabled_plugins = [\"io.containerd.grpc.v1.cri\"]\n[grpc]\naddress = \"{here}/c.sock\"\n"
        );
        fs::write(folder.path().join("config.toml"), config).unwrap();
        let namespace = format!("gantry-stock-{}", std::process::id());
        let mut stock = Self { folder, namespace, daemon: None };
        stock.start();
        stock
    }

    fn start(&mut self) {
        let ours = Path::new(SHIM).parent().unwrap().display().to_string();
        let path = format!("{ours}:{}", std::env::var("PATH").unwrap());
        let log = fs::OpenOptions::new()
            .append(true)
            .create(true)
            .open(self.folder.path().join("containerd.log"))
            .unwrap();
        let mut command = Command::new(CONTAINERD);
        command.arg("-c").arg(self.folder.path().join("config.toml")).env("PATH", path);
        command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log);
        self.daemon = Some(command.spawn().unwrap());
        self.until("containerd serves", || self.ctr(&["version"]).status.success());
    }

    fn kill(&mut self) {
        let mut daemon = self.daemon.take().unwrap();
        daemon.kill().unwrap();
        daemon.wait().unwrap();
    }

    fn socket(&self) -> PathBuf {
        self.folder.path().join("c.sock")
    }

    fn ctr(&self, arguments: &[&str]) -> Output {
        let mut command = Command::new("timeout");
        command.args(["30", CTR, "-a"]).arg(self.socket()).args(["-n", &self.namespace]);
        command.args(arguments).stdin(Stdio::null()).output().unwrap()
    }

    fn run(&self, more: &[&str], id: &str, script: &str) -> Output {
        let rootfs = self.folder.path().join("rootfs");
        let fifos = self.fifos();
        let mut arguments = vec!["run", "--env", "PATH=/bin", "--runtime", "io.containerd.runc.v2"];
        arguments.extend(["--fifo-dir", &fifos]);
        arguments.extend(more);
        arguments.extend(["--rootfs", rootfs.to_str().unwrap(), id, "/bin/sh", "-c", script]);
        self.ctr(&arguments)
    }

    /// ctr leaves the fifos of detached containers behind: better here than in /run.
    fn fifos(&self) -> String {
        self.folder.path().join("fifo").display().to_string()
    }

    fn status(&self, id: &str) -> String {
        let list = self.ctr(&["task", "ls"]).stdout;
        let list = String::from_utf8(list).unwrap();
        let line = list.lines().find(|line| line.starts_with(id)).unwrap_or_default();
        line.split_whitespace().last().unwrap_or_default().to_owned()
    }

    fn until(&self, what: &str, done: impl Fn() -> bool) {
        let start = Instant::now();
        while !done() {
            if start.elapsed() > LIMIT {
                let log = fs::read_to_string(self.folder.path().join("containerd.log")).unwrap();
                panic!("never: {what}\n{log}");
            }
        }
    }

    /// The shims whose engine this is.
    fn shims(&self) -> Vec<u32> {
        let socket = self.socket().display().to_string();
        let is_ours = |pid: u32| {
            let line = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            line.starts_with(SHIM.as_bytes()) && String::from_utf8_lossy(&line).contains(&socket)
        };
        let entries = fs::read_dir("/proc").unwrap().flatten();
        let pids = entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok());
        pids.filter(|pid| is_ours(*pid)).collect()
    }
}

impl Drop for Stock {
    fn drop(&mut self) {
        for pid in self.shims() {
            let _ = Command::new("kill").args(["-9", &pid.to_string()]).status();
        }
        if let Some(mut daemon) = self.daemon.take() {
            let _ = daemon.kill();
            let _ = daemon.wait();
        }
        // What containerd and runc keep for a namespace.
        let _ = fs::remove_dir(Path::new("/run/containerd/runc").join(&self.namespace));
        for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
            let _ = fs::remove_dir(hierarchy.path().join(&self.namespace));
        }
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.namespace));
    }
}

fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

#[test]
fn stock_containerd_drives_our_shim() {
    if !Path::new(CONTAINERD).exists() || !Path::new(CTR).exists() {
        assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "this test cannot run here");
        println!("skipped: {CONTAINERD} and {CTR} are needed (apt install containerd)");
        return;
    }
    let mut stock = Stock::new();
    let output = stock.run(&["--rm"], "brief", "echo hi; exit 3");
    assert_eq!((output.status.code(), text(&output).as_str()), (Some(3), "hi\n"));
    assert!(stock.shims().is_empty(), "the shim of a removed container is left");

    assert!(stock.run(&["-d"], "long", "sleep 1000").status.success());
    assert_eq!(stock.shims().len(), 1);
    let waits = "while [ ! -e /tmp/go ]; do sleep 0.05; done; exit 9";
    assert!(stock.run(&["-d"], "leaves", waits).status.success());
    let exec = |stock: &Stock, id: &str, script: &str| {
        let fifos = stock.fifos();
        let command = ["--exec-id", id, "long", "/bin/sh", "-c", script];
        stock.ctr(&[&["task", "exec", "--fifo-dir", &fifos][..], &command].concat())
    };
    let output = exec(&stock, "one", "echo out; exit 5");
    assert_eq!((output.status.code(), text(&output).as_str()), (Some(5), "out\n"));
    let metrics = text(&stock.ctr(&["task", "metrics", "long"]));
    assert!(metrics.contains("memory"), "{metrics}");

    // Logs in CRI's format: by our shim, and by our logger under our shim and Debian's.
    let spec = shim_api::logs::LogSpec::new(
        Some(stock.folder.path().join("logs of a pod/0.log")),
        stock.folder.path().join("streams/logged"),
    );
    let logger = spec.to_binary_uri(Path::new(SHIM));
    let debian = ["--runtime", "/usr/bin/containerd-shim-runc-v2"];
    for (number, (runtime, uri)) in
        [(&[][..], &spec.to_uri()), (&[], &logger), (&debian, &logger)].into_iter().enumerate()
    {
        let arguments = [runtime, &["-d", "--log-uri", uri]].concat();
        let ended = stock.run(&arguments, "logged", "echo out; echo err >&2; printf end");
        assert!(ended.status.success(), "{}", text(&ended));
        stock.until("the container ends", || stock.status("logged") == "STOPPED");
        assert!(stock.ctr(&["task", "rm", "logged"]).status.success());
        assert!(stock.ctr(&["container", "rm", "logged"]).status.success());
        let log = || fs::read_to_string(spec.path.as_ref().unwrap()).unwrap();
        stock.until("the log is written", || log().lines().count() == 3 * (number + 1));
        for expected in [" stdout F out\n", " stderr F err\n", " stdout P end\n"] {
            assert_eq!(log().matches(expected).count(), number + 1, "{}", log());
        }
        stock.until("the socket is removed", || !spec.socket.exists());
    }
    // One container ends while nobody is there to see it.
    stock.kill();
    fs::write(stock.folder.path().join("rootfs/tmp/go"), "").unwrap();
    stock.start();
    stock.until("the exit is seen", || stock.status("leaves") == "STOPPED");
    assert_eq!(stock.status("long"), "RUNNING");
    assert!(text(&stock.ctr(&["task", "rm", "leaves"])).contains("exit code 9"));
    let output = exec(&stock, "two", "exit 6");
    assert_eq!(output.status.code(), Some(6), "{}", text(&output));

    assert!(stock.ctr(&["task", "pause", "long"]).status.success());
    assert_eq!(stock.status("long"), "PAUSED");
    assert!(stock.ctr(&["task", "resume", "long"]).status.success());
    assert!(stock.ctr(&["task", "kill", "-s", "SIGKILL", "long"]).status.success());
    stock.until("the kill is seen", || stock.status("long") == "STOPPED");
    assert!(text(&stock.ctr(&["task", "rm", "long"])).contains("exit code 137"));

    // A shim that dies takes its container with it, and containerd has our binary clean up.
    assert!(stock.run(&["-d"], "orphan", "sleep 1000").status.success());
    let pid = stock.shims()[0];
    assert!(Command::new("kill").args(["-9", &pid.to_string()]).status().unwrap().success());
    stock.until("the dead shim's task is gone", || stock.status("orphan").is_empty());
    stock.until("no shim is left", || stock.shims().is_empty());
    let mounts = fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains(stock.folder.path().join("state").to_str().unwrap()), "a mount is left");
}
