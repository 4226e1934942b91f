//! What the configuration and the service manager say about sockets, and what can be seen and set on the debug socket.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::Path;
use std::process::{Command, Stdio};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::host::{Host, Kind, STOCK_CTR};
use tests::{ready, wait_for};

/// An HTTP request over a unix socket; status line and body.
fn http(socket: &Path, method: &str, path: &str, body: &str) -> (String, String) {
    let mut stream = UnixStream::connect(socket).unwrap();
    let length = body.len();
    write!(
        stream,
        "{method} {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {length}\r\n\r\n{body}"
    )
    .unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    (head.lines().next().unwrap().to_owned(), body.to_owned())
}

fn mode(path: &Path) -> u32 {
    fs::metadata(path).unwrap().permissions().mode() & 0o777
}

#[test]
fn the_debug_and_metrics_sockets() {
    if !ready(&[STOCK_CTR]) {
        return;
    }
    let mut host = Host::new(Kind::Gantry);
    let (debug, metrics) = (host.folder().join("debug.sock"), host.folder().join("metrics.sock"));
    let config = host.folder().join("config.toml");
    let text = |level: &str| {
        format!(
            "version = 3\n[debug]\naddress = '{}'\nmode = '0600'\nlevel = '{level}'\n[metrics]\naddress = 'unix://{}'\n\
             mode = '0644'\n",
            debug.display(),
            metrics.display()
        )
    };
    fs::write(&config, text("warn")).unwrap();
    host.arguments = vec!["--config".into(), config.display().to_string()];
    host.start();
    assert_eq!((mode(&debug), mode(&metrics)), (0o600, 0o644));
    for socket in [&debug, &metrics] {
        let (status, body) = http(socket, "GET", "/v1/metrics", "");
        assert!(status.ends_with("200 OK") && body.contains("gantry_grpc_calls_total"), "{status} {body}");
    }
    assert!(http(&metrics, "GET", "/debug/log-level", "").0.ends_with("404 Not Found"));
    assert_eq!(http(&debug, "GET", "/debug/log-level", "").1, "warn\n");
    let shown = http(&debug, "GET", "/debug/config", "").1;
    assert!(shown.contains(&format!("address = \"{}\"", host.address().display())), "{shown}");

    // Set, seen, and gone with a reload.
    assert!(http(&debug, "PUT", "/debug/log-level", "loud").0.contains("400"));
    assert!(http(&debug, "PUT", "/debug/log-level", "debug\n").0.ends_with("200 OK"));
    assert_eq!(http(&debug, "GET", "/debug/log-level", "").1, "debug\n");
    host.stock_ctr().ok(&["version"]);
    wait_for("a line at the level that was set", || host.log().contains("DEBUG"));
    fs::write(&config, text("error") + "[plugins.'io.containerd.gc.v1.scheduler']\npause_threshold = 0.5\n")
        .unwrap();
    kill(Pid::from_raw(host.pid()), Signal::SIGHUP).unwrap();
    wait_for("the reload", || http(&debug, "GET", "/debug/log-level", "").1 == "error\n");
    assert!(!host.log().contains("take effect at the next start"), "{}", host.log());
    assert!(host.stop().success());
    assert!(!debug.exists() && !metrics.exists() && !host.address().exists());
}

#[test]
fn sockets_that_the_service_manager_holds() {
    if !ready(&[STOCK_CTR, "/bin/bash"]) {
        return;
    }
    let host = Host::new(Kind::Gantry);
    let listener = UnixListener::bind(host.address()).unwrap();
    // Before anybody serves, clients wait instead of failing.
    let early = UnixStream::connect(host.address()).unwrap();
    let engine = host.command();
    let mut line = format!("exec 3<&{}; LISTEN_PID=$$ LISTEN_FDS=1 exec", listener.as_raw_fd());
    for word in std::iter::once(engine.get_program()).chain(engine.get_args()) {
        line.push_str(&format!(" '{}'", word.to_str().unwrap()));
    }
    let log = fs::File::create(host.folder().join("log")).unwrap();
    for _ in 0..2 {
        let mut command = Command::new("/bin/bash");
        command.args(["-c", &line]).stdin(Stdio::null()).stderr(log.try_clone().unwrap());
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::empty()).unwrap();
        let mut child = command.spawn().unwrap();
        rustix::io::fcntl_setfd(&listener, rustix::io::FdFlags::CLOEXEC).unwrap();
        let ctr = host.stock_ctr();
        assert!(ctr.ok(&["version"]).contains("Server"));
        kill(Pid::from_raw(child.id().cast_signed()), Signal::SIGTERM).unwrap();
        assert!(child.wait().unwrap().success(), "{}", host.log());
        // It is not the engine's to take away.
        assert!(host.address().exists());
    }
    drop(early);
}
