//! Logs that the shim writes itself, and the sockets where streams are joined: real containers by the task service, our
//! shim's and, by its logger, Debian's. Needs root, runc and busybox-static.

#![allow(clippy::unwrap_used)]

mod harness;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use bytes::Bytes;
use harness::*;
use proto::containerd::events::TaskExit;
use proto::containerd::runc::v1::Options;
use serde_json::json;
use shim_api::Code;
use shim_api::bootstrap::Answer;
use shim_api::logs::{Attached, Frame, LogSpec, Stdin, Streams, attach, reopen};
use shim_api::task::*;

const ALL: Streams = Streams { stdin: true, stdout: true, stderr: true };
const OUT: Streams = Streams { stdin: false, stdout: true, stderr: true };
const GO_SHIM: &str = "/usr/bin/containerd-shim-runc-v2";

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

/// A log beneath the engine's folder, whose socket has a path as long as the engine's may be.
fn spec(engine: &Engine, id: &str) -> LogSpec {
    let folder = engine.folder.path();
    let long = "s".repeat(100);
    LogSpec::new(
        Some(folder.join(format!("logs/pod of {id}/0.log"))),
        folder.join(long).join("streams").join(id),
    )
}

/// Lines as (stream, tag, text), after checking that time only goes forward.
fn lines(text: &str) -> Vec<(String, char, String)> {
    let mut last = "";
    let each = text.lines().map(|line| {
        let (time, rest) = line.split_once(' ').unwrap();
        assert!(time >= last && time.len() == 30 && time.ends_with('Z'), "{line:?} after {last}");
        last = time;
        let (stream, rest) = rest.split_once(' ').unwrap();
        (stream.to_owned(), rest.chars().next().unwrap(), rest[2..].to_owned())
    });
    each.collect()
}

fn read(spec: &LogSpec) -> Vec<(String, char, String)> {
    lines(&fs::read_to_string(spec.path.as_ref().unwrap()).unwrap())
}

fn line(stream: &str, tag: char, text: &str) -> (String, char, String) {
    (stream.to_owned(), tag, text.to_owned())
}

async fn create(shim: &TaskClient, bundle: &Bundle, spec: &LogSpec) {
    let uri = spec.to_uri();
    let request = CreateTaskRequest { stdout: uri, terminal: spec.terminal, ..bundle.create() };
    shim.create(request).await.unwrap();
}

async fn recv(attached: &mut Attached) -> Frame {
    tokio::time::timeout(LIMIT, attached.recv()).await.expect("no frame comes").expect("the shim is gone")
}

/// Reads output until it has this text.
async fn expect(attached: &mut Attached, text: &str) -> String {
    let mut seen = String::new();
    while !seen.contains(text) {
        match recv(attached).await {
            Frame::Stdout(data) | Frame::Stderr(data) => seen.push_str(std::str::from_utf8(&data).unwrap()),
            other => panic!("{other:?} came instead of {text:?}, after {seen:?}"),
        }
    }
    seen
}

async fn type_in(attached: &mut Attached, text: &'static str) {
    attached.send_stdin(Bytes::from_static(text.as_bytes())).await.unwrap();
}

/// Waits for something outside of our hands.
async fn until(what: &str, done: impl Fn() -> bool) {
    let start = Instant::now();
    while !done() {
        assert!(start.elapsed() < LIMIT, "never: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[tokio::test]
async fn the_log_is_complete_when_the_exit_is_told() {
    for own_pid_namespace in [true, false] {
        let engine = Engine::start().await;
        let script = "i=0; while [ $i -lt 500 ]; do echo out $i; echo err $i >&2; i=$((i+1)); done; printf end; exit 3";
        let bundle = engine.bundle("whole", &sh(script), |config| {
            if !own_pid_namespace {
                config["linux"]["namespaces"] = json!([{"type": "mount"}]);
                config.as_object_mut().unwrap().remove("hostname");
            }
        });
        let (shim, answer) = engine.shim(&bundle).await;
        let spec = spec(&engine, "whole");
        create(&shim, &bundle, &spec).await;
        assert!(spec.socket.exists());
        let mut client = attach(&spec.socket, OUT).await.unwrap();
        start(&shim, "whole", "").await.unwrap();
        engine.events.wait::<TaskExit>(|exit| exit.exit_status == 3).await;
        let found = read(&spec);
        for (stream, text) in [("stdout", "out"), ("stderr", "err")] {
            let texts: Vec<_> =
                found.iter().filter(|line| line.0 == stream).map(|line| line.2.clone()).collect();
            let mut expected: Vec<_> = (0..500).map(|number| format!("{text} {number}")).collect();
            if stream == "stdout" {
                expected.push("end".to_owned());
            }
            assert_eq!(texts, expected);
        }
        let last = found.iter().rfind(|line| line.0 == "stdout").unwrap();
        assert_eq!(last, &line("stdout", 'P', "end"));

        let (mut out, mut err) = (String::new(), String::new());
        loop {
            match recv(&mut client).await {
                Frame::Stdout(data) => out.push_str(std::str::from_utf8(&data).unwrap()),
                Frame::Stderr(data) => err.push_str(std::str::from_utf8(&data).unwrap()),
                Frame::End => break,
                Frame::Failed(error) => panic!("{error}"),
            }
        }
        assert_eq!((out.lines().count(), err.lines().count()), (501, 500));
        assert_eq!(client.recv().await, None);
        // Who joins now has missed all, and is told so.
        assert_eq!(recv(&mut attach(&spec.socket, OUT).await.unwrap()).await, Frame::End);
        reopen(&spec.socket).await.unwrap();
        delete(&shim, "whole", "").await.unwrap();
        assert!(!spec.socket.exists());
        assert_eq!(attach(&spec.socket, OUT).await.err().unwrap().code, Code::Refused);
        assert_eq!(reopen(&spec.socket).await.unwrap_err().code, Code::Refused);
        shutdown(&shim, &answer).await;
    }
}

/// What kubelet does: renames the log, and has it opened anew. All that was ever written, in order.
async fn rotate_until(spec: &LogSpec, done: impl Fn() -> bool) -> (String, usize) {
    let path = spec.path.clone().unwrap();
    let (mut text, mut rotations) = (String::new(), 0);
    while !done() {
        tokio::time::sleep(Duration::from_millis(150)).await;
        let old = path.with_extension(format!("{rotations}"));
        fs::rename(&path, &old).unwrap();
        let reopened = reopen(&spec.socket).await;
        if !done() {
            reopened.unwrap();
            assert!(path.exists(), "answered before it was opened");
        }
        // Complete, since the answer came: nobody writes to it any more.
        text.push_str(&fs::read_to_string(&old).unwrap());
        rotations += 1;
    }
    (text, rotations)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn rotation_under_load_loses_and_doubles_no_line() {
    let engine = Engine::start().await;
    let burst = "b=0; while [ $b -lt 100 ]; do i=0; while [ $i -lt 500 ]; do echo out $b $i; echo err $b $i >&2; \
                 i=$((i+1)); done; b=$((b+1)); sleep 0.01; done";
    let bundle = engine.bundle("rotated", &sh(burst), |_| {});
    let (shim, answer) = engine.shim(&bundle).await;
    let spec = spec(&engine, "rotated");
    create(&shim, &bundle, &spec).await;
    start(&shim, "rotated", "").await.unwrap();
    let ended = || engine.events.all::<TaskExit>().iter().any(|exit| exit.id == "rotated");
    let (mut text, rotations) = rotate_until(&spec, ended).await;
    wait(&shim, "rotated", "").await.unwrap();
    text.push_str(&fs::read_to_string(spec.path.as_ref().unwrap()).unwrap());
    assert!(rotations > 3, "{rotations}");

    let all = lines(&text);
    assert_eq!(all.len(), 100_000);
    for (stream, name) in [("stdout", "out"), ("stderr", "err")] {
        let mut expected = (0..100).flat_map(|b| (0..500).map(move |i| format!("{name} {b} {i}")));
        for found in all.iter().filter(|line| line.0 == stream) {
            assert_eq!((found.1, &found.2), ('F', &expected.next().unwrap()));
        }
        assert_eq!(expected.next(), None);
    }
    println!("100000 lines over {rotations} rotations: none lost, none doubled");
    delete(&shim, "rotated", "").await.unwrap();
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn clients_join_and_leave_as_they_like() {
    let engine = Engine::start().await;
    let script = "while read line; do echo got $line; echo saw $line >&2; done; echo bye";
    let bundle = engine.bundle("joined", &sh(script), |_| {});
    let (shim, answer) = engine.shim(&bundle).await;
    let spec = LogSpec { stdin: Stdin::Open, ..spec(&engine, "joined") };
    create(&shim, &bundle, &spec).await;
    start(&shim, "joined", "").await.unwrap();

    let mut first = attach(&spec.socket, ALL).await.unwrap();
    type_in(&mut first, "one\n").await;
    expect(&mut first, "saw one\n").await;
    let mut second =
        attach(&spec.socket, Streams { stdin: true, stdout: false, stderr: true }).await.unwrap();
    type_in(&mut first, "two\n").await;
    expect(&mut first, "saw two\n").await;
    assert_eq!(expect(&mut second, "two\n").await, "saw two\n", "no history, no stdout");
    drop(first);
    type_in(&mut second, "three\n").await;
    assert_eq!(expect(&mut second, "three\n").await, "saw three\n", "the process goes on");
    // Whoever says that it will write no more is let go of, and the input stays open for others.
    second.close_stdin().await.unwrap();
    assert_eq!(recv(&mut second).await, Frame::End);
    let mut third = attach(&spec.socket, ALL).await.unwrap();
    type_in(&mut third, "four\n").await;
    expect(&mut third, "saw four\n").await;

    // Peers that speak something else get an error, and disturb nobody.
    for garbage in
        [&b"GET / HTTP/1.1\r\n\r\n"[..], &[0xff; 5000], b"\x01A\xff\xff\xff\xff", b"\x01I\0\0\0\x01x"]
    {
        let folder = fs::File::open(spec.socket.parent().unwrap()).unwrap();
        let short = format!("/proc/self/fd/{}/joined", std::os::fd::AsRawFd::as_raw_fd(&folder));
        let mut stream = UnixStream::connect(short).unwrap();
        stream.set_read_timeout(Some(LIMIT)).unwrap();
        let _ = stream.write_all(garbage);
        let mut answered = [0];
        stream.read_exact(&mut answered).unwrap();
        assert_eq!(answered, [b'X']);
    }
    shim.close_io(CloseIoRequest { id: of("joined"), exec_id: String::new(), stdin: true }).await.unwrap();
    expect(&mut third, "bye\n").await;
    assert_eq!(recv(&mut third).await, Frame::End);
    assert_eq!(wait(&shim, "joined", "").await.unwrap(), 0);
    assert_eq!(read(&spec).len(), 9);
    delete(&shim, "joined", "").await.unwrap();
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn an_input_for_one_ends_with_its_client() {
    let engine = Engine::start().await;
    for (id, hang_up) in [("once", false), ("gone", true)] {
        let bundle = engine.bundle(id, &sh("cat; echo end; exit 4"), |_| {});
        let (shim, answer) = engine.shim(&bundle).await;
        let spec = LogSpec { stdin: Stdin::Once, ..spec(&engine, id) };
        create(&shim, &bundle, &spec).await;
        start(&shim, id, "").await.unwrap();
        // One that only reads ends nothing.
        drop(attach(&spec.socket, OUT).await.unwrap());
        let mut watcher = attach(&spec.socket, OUT).await.unwrap();
        let mut client = attach(&spec.socket, ALL).await.unwrap();
        type_in(&mut client, "text\n").await;
        expect(&mut client, "text\n").await;
        if hang_up {
            drop(client);
        } else {
            client.close_stdin().await.unwrap();
            expect(&mut client, "end\n").await;
            assert_eq!(recv(&mut client).await, Frame::End);
        }
        expect(&mut watcher, "end\n").await;
        assert_eq!(wait(&shim, id, "").await.unwrap(), 4);
        delete(&shim, id, "").await.unwrap();
        shutdown(&shim, &answer).await;
    }
}

#[tokio::test]
async fn a_terminal_is_logged_and_joined() {
    let engine = Engine::start().await;
    let bundle = engine.bundle("tty", &sh("read line; stty size; echo got $line >&2"), |config| {
        config["process"]["terminal"] = json!(true);
    });
    let (shim, answer) = engine.shim(&bundle).await;
    let spec = LogSpec { stdin: Stdin::Once, terminal: true, ..spec(&engine, "tty") };
    create(&shim, &bundle, &spec).await;
    let size = ResizePtyRequest { id: of("tty"), exec_id: String::new(), width: 91, height: 33 };
    shim.resize_pty(size).await.unwrap();
    start(&shim, "tty", "").await.unwrap();
    // A client that goes leaves the terminal's input open, though it was for one.
    let mut first = attach(&spec.socket, ALL).await.unwrap();
    type_in(&mut first, "wo").await;
    expect(&mut first, "wo").await;
    drop(first);
    let mut client = attach(&spec.socket, ALL).await.unwrap();
    type_in(&mut client, "rd\n").await;
    expect(&mut client, "got word\r\n").await;
    assert_eq!(recv(&mut client).await, Frame::End);
    assert_eq!(wait(&shim, "tty", "").await.unwrap(), 0);
    let expected = ["word", "33 91", "got word"].map(|text| line("stdout", 'F', text));
    assert_eq!(read(&spec), expected);
    delete(&shim, "tty", "").await.unwrap();
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn a_client_that_does_not_read_holds_nobody_up() {
    let engine = Engine::start().await;
    let script = "read go; i=0; while [ $i -lt 80 ]; do dd if=/proc/self/exe bs=64k count=1 2>/dev/null; i=$((i+1)); \
                  done; echo; echo all";
    let bundle = engine.bundle("slow", &sh(script), |_| {});
    let (shim, answer) = engine.shim(&bundle).await;
    let spec = LogSpec { stdin: Stdin::Open, path: None, ..spec(&engine, "slow") };
    create(&shim, &bundle, &spec).await;
    start(&shim, "slow", "").await.unwrap();
    let mut stopped = attach(&spec.socket, OUT).await.unwrap();
    let reading = tokio::spawn({
        let socket = spec.socket.clone();
        let mut reader = attach(&socket, ALL).await.unwrap();
        async move {
            type_in(&mut reader, "go\n").await;
            let mut length = 0;
            loop {
                match recv(&mut reader).await {
                    Frame::Stdout(data) => length += data.len(),
                    Frame::End => return length,
                    other => panic!("{other:?}"),
                }
            }
        }
    });
    assert_eq!(wait(&shim, "slow", "").await.unwrap(), 0);
    assert_eq!(reading.await.unwrap(), 80 * (64 << 10) + 5);
    let mut length = 0;
    let error = loop {
        match recv(&mut stopped).await {
            Frame::Stdout(data) => length += data.len(),
            Frame::Failed(error) => break error,
            other => panic!("{other:?}"),
        }
    };
    assert_eq!(error.code, Code::ResourceExhausted);
    assert!((1 << 19..3 << 20).contains(&length), "{length}");
    assert_eq!(stopped.recv().await, None);
    delete(&shim, "slow", "").await.unwrap();
    shutdown(&shim, &answer).await;
}

/// A small disk, gone with this.
struct Disk(PathBuf);

impl Disk {
    fn new(folder: &Path, size: &str) -> Self {
        fs::create_dir_all(folder).unwrap();
        let option = format!("size={size}");
        let mounted =
            Command::new("mount").args(["-t", "tmpfs", "-o", &option, "tmpfs"]).arg(folder).status();
        assert!(mounted.unwrap().success());
        Self(folder.to_owned())
    }
}

impl Drop for Disk {
    fn drop(&mut self) {
        let _ = Command::new("umount").arg("-l").arg(&self.0).status();
    }
}

#[tokio::test]
async fn a_full_disk_stops_nobody_and_the_log_says_what_is_missing() {
    let engine = Engine::start().await;
    let script = "i=0; while [ $i -lt 20000 ]; do echo number $i; i=$((i+1)); done; echo full >&2; read go; \
                  echo after; exit 5";
    let bundle = engine.bundle("full", &sh(script), |_| {});
    let (shim, answer) = engine.shim(&bundle).await;
    let spec = LogSpec { stdin: Stdin::Open, ..spec(&engine, "full") };
    let disk = Disk::new(spec.path.as_ref().unwrap().parent().unwrap(), "256k");
    let filler = disk.0.join("filler");
    fs::write(&filler, vec![0; 64 << 10]).unwrap();
    create(&shim, &bundle, &spec).await;
    let mut client =
        attach(&spec.socket, Streams { stdin: true, stdout: false, stderr: true }).await.unwrap();
    start(&shim, "full", "").await.unwrap();
    expect(&mut client, "full\n").await;
    fs::remove_file(filler).unwrap();
    type_in(&mut client, "go\n").await;
    assert_eq!(wait(&shim, "full", "").await.unwrap(), 5);

    let (mut next, mut missing) = (0_usize, 0);
    for (_, tag, text) in read(&spec) {
        assert_eq!(tag, 'F');
        if let Some(number) = text.strip_prefix("number ") {
            assert_eq!(number.parse::<usize>().unwrap(), next, "after {missing} missing");
            next += 1;
        } else if let Some(rest) = text.strip_prefix("gantry: ") {
            let lost: usize = rest.split(' ').next().unwrap().parse().unwrap();
            missing += lost;
            next += lost;
        } else if text == "full" {
            next += 1;
        } else {
            assert_eq!(text, "after");
        }
    }
    // With the one on stderr, which is there or missing.
    assert_eq!(next, 20_001);
    assert!((10_000..20_000).contains(&missing), "{missing}");
    assert_eq!(read(&spec).last().unwrap(), &line("stdout", 'F', "after"));
    println!("a full disk: {missing} of 20001 lines missing, as the log itself says");
    delete(&shim, "full", "").await.unwrap();
    drop(disk);
    shutdown(&shim, &answer).await;
}

/// A disk that hangs until it is thawed.
struct Frozen<'a>(&'a Disk);

impl Frozen<'_> {
    fn fsfreeze(&self, flag: &str) -> bool {
        Command::new("fsfreeze").arg(flag).arg(&self.0.0).status().unwrap().success()
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        assert!(self.fsfreeze("--unfreeze"));
    }
}

#[tokio::test]
async fn a_disk_that_hangs_holds_up_its_log_alone() {
    let engine = Engine::start().await;
    let image = engine.folder.path().join("disk.img");
    fs::File::create(&image).unwrap().set_len(16 << 20).unwrap();
    assert!(Command::new("mkfs.ext4").arg("-q").arg(&image).status().unwrap().success());
    let spec = LogSpec { stdin: Stdin::Open, ..spec(&engine, "hung") };
    let folder = spec.path.as_ref().unwrap().parent().unwrap();
    fs::create_dir_all(folder).unwrap();
    let mounted = Command::new("mount").args(["-o", "loop"]).args([&image, folder]).status();
    assert!(mounted.unwrap().success());
    let disk = Disk(folder.to_owned());

    let grouped = |config: &mut serde_json::Value| {
        config["annotations"] = json!({"io.kubernetes.cri.sandbox-id": "hung-pod"});
    };
    let bundle = engine.bundle("hung", &sh("while read line; do echo got $line; done; exit 8"), grouped);
    let beside = engine.bundle("beside", &sh("read line; echo got $line"), grouped);
    let (shim, answer) = engine.shim(&bundle).await;
    engine.shim(&beside).await;
    let beside_spec = LogSpec { stdin: Stdin::Open, ..self::spec(&engine, "beside") };
    create(&shim, &bundle, &spec).await;
    create(&shim, &beside, &beside_spec).await;
    start(&shim, "hung", "").await.unwrap();
    start(&shim, "beside", "").await.unwrap();
    let mut client = attach(&spec.socket, ALL).await.unwrap();

    let frozen = Frozen(&disk);
    assert!(frozen.fsfreeze("--freeze"));
    type_in(&mut client, "one\n").await;
    expect(&mut client, "got one\n").await;
    type_in(&mut client, "two\n").await;
    // The other container of this shim has its log, and this one is asked, ends, and is seen to end.
    type_in(&mut attach(&beside_spec.socket, ALL).await.unwrap(), "word\n").await;
    assert_eq!(wait(&shim, "beside", "").await.unwrap(), 0);
    assert_eq!(read(&beside_spec), [line("stdout", 'F', "got word")]);
    shim.close_io(CloseIoRequest { id: of("hung"), exec_id: String::new(), stdin: true }).await.unwrap();
    assert_eq!(wait(&shim, "hung", "").await.unwrap(), 8);
    drop(frozen);
    expect(&mut client, "got two\n").await;
    assert_eq!(recv(&mut client).await, Frame::End);
    delete(&shim, "hung", "").await.unwrap();
    assert_eq!(read(&spec), ["got one", "got two"].map(|text| line("stdout", 'F', text)));
    delete(&shim, "beside", "").await.unwrap();
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn a_log_that_cannot_be_opened_fails_the_creation_and_leaves_nothing() {
    let engine = Engine::start().await;
    let bundle = engine.bundle("nolog", &["true"], |_| {});
    let (shim, answer) = engine.shim(&bundle).await;
    let blocked = LogSpec { path: Some("/proc/version/0.log".into()), ..spec(&engine, "nolog") };
    let request = |stdout: String, stderr: String| CreateTaskRequest { stdout, stderr, ..bundle.create() };
    let error = shim.create(request(blocked.to_uri(), String::new())).await.unwrap_err();
    assert!(error.message.contains("/proc/version/0.log"), "{error}");
    let error = shim.create(request(String::new(), blocked.to_uri())).await.unwrap_err();
    assert_eq!(error.code, Code::InvalidArgument);
    assert!(!blocked.socket.exists() && !bundle.is_mounted());

    // One that fails later takes its socket along.
    let mut fails = engine.bundle("fails", &["/no/such/program"], |_| {});
    fails.id = of("fails");
    let spec = spec(&engine, "fails");
    let request = CreateTaskRequest { stdout: spec.to_uri(), ..fails.create() };
    let (second, second_answer) = engine.shim(&fails).await;
    assert!(second.create(request).await.is_err());
    assert!(!spec.socket.exists() && !fails.is_mounted());
    shutdown(&second, &second_answer).await;
    shutdown(&shim, &answer).await;
}

/// Proportional share of memory of a process, and the rest of what it takes, in KiB.
fn pss(pid: u32) -> u64 {
    let rollup = fs::read_to_string(format!("/proc/{pid}/smaps_rollup")).unwrap();
    let line = rollup.lines().find(|line| line.starts_with("Pss_Anon:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse().unwrap()
}

fn threads(pid: u32) -> usize {
    fs::read_dir(format!("/proc/{pid}/task")).unwrap().count()
}

/// A pod of two containers that write 20,001 lines each: the anonymous memory of its shim once it rests, in KiB.
async fn memory_of_a_pod(engine: &Engine, pod: &str, with_logs: bool) -> u64 {
    let mut all = Vec::new();
    for id in [format!("{pod}-one"), format!("{pod}-two")] {
        let script = format!(
            "i=0; while [ $i -lt 20000 ]; do echo {id} $i; i=$((i+1)); done; echo done; exec sleep 1000"
        );
        let bundle = engine.bundle(&id, &sh(&script), |config| {
            config["annotations"] = json!({"io.kubernetes.cri.sandbox-id": pod});
        });
        let (shim, answer) = engine.shim(&bundle).await;
        let spec = spec(engine, &id);
        if with_logs {
            create(&shim, &bundle, &spec).await;
        } else {
            shim.create(bundle.create()).await.unwrap();
        }
        let pid = start(&shim, &id, "").await.unwrap();
        all.push((id, spec, pid, shim, answer));
    }
    let (_, _, _, shim, answer) = all[0].clone();
    let shim_pid = shim.connect_shim(ConnectRequest::default()).await.unwrap().shim_pid;
    for (id, spec, pid, ..) in &all {
        until("all lines are written", || {
            fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap().starts_with("sleep")
        })
        .await;
        if with_logs {
            let path = spec.path.as_ref().unwrap();
            until("all lines are there", || fs::read_to_string(path).unwrap().ends_with(" F done\n")).await;
            let found = read(spec);
            assert_eq!(found.len(), 20_001);
            for (number, found) in found.iter().take(20_000).enumerate() {
                assert_eq!(found, &line("stdout", 'F', &format!("{id} {number}")));
            }
        }
    }
    until("the shim to rest", || threads(shim_pid) == 1).await;
    let memory = pss(shim_pid);
    for (id, ..) in &all {
        kill(&shim, id, "", 9, true).await.unwrap();
        wait(&shim, id, "").await.unwrap();
        delete(&shim, id, "").await.unwrap();
    }
    shutdown(&shim, &answer).await;
    memory
}

#[tokio::test]
async fn two_containers_of_a_shim_have_logs_of_their_own_and_cost_it_little() {
    let engine = Engine::start().await;
    let without = memory_of_a_pod(&engine, "bare", false).await;
    let with = memory_of_a_pod(&engine, "logged", true).await;
    println!(
        "PSS of a resting shim of two containers, anonymous: {without} KiB; {with} KiB with logs, after 40002 lines"
    );
    assert!(with < without + 200, "{without} KiB without logs, {with} KiB with");
}

/// Starts a shim of any maker.
async fn any_shim(engine: &Engine, program: &str, bundle: &Bundle) -> (TaskClient, Answer) {
    let mut launch = engine.launch(&bundle.id);
    launch.options = Some(proto::any::pack(&Options { binary_name: "runc".into(), ..Default::default() }));
    for (_, stdin) in launch.stdin_newest_first() {
        let output = engine.run_shim(program, bundle, "start", &stdin);
        if output.status.success() {
            let answer = Answer::parse(&output.stdout).unwrap();
            let shim = TaskClient::connect(&answer.address, answer.version).await.unwrap();
            return (shim.with_namespace(NAMESPACE), answer);
        }
    }
    panic!("{program} does not start");
}

/// The loggers of an engine.
fn loggers(engine: &Engine) -> usize {
    let folder = engine.folder.path().to_str().unwrap();
    let is_ours = |line: &str| line.starts_with(SHIM) && line.contains("\0logger\0") && line.contains(folder);
    let entries = fs::read_dir("/proc").unwrap().flatten();
    entries
        .filter(|entry| fs::read_to_string(entry.path().join("cmdline")).is_ok_and(|line| is_ours(&line)))
        .count()
}

async fn life_with_a_logger(program: &str, maker: &str) {
    let engine = Engine::start().await;
    // Tests run side by side, in one namespace of runc.
    let (id, tty) = (&format!("{maker}-logger"), &format!("{maker}-tty-logger"));
    let binary = |spec: &LogSpec| spec.to_binary_uri(Path::new(SHIM));
    let burst = "b=0; while [ $b -lt 40 ]; do i=0; while [ $i -lt 250 ]; do echo $b $i; i=$((i+1)); done; b=$((b+1)); \
                 sleep 0.02; done; echo last >&2; printf end";
    let bundle = engine.bundle(id, &sh(burst), |_| {});
    let log = bundle.fifo("log");
    let _reader = fs::OpenOptions::new().read(true).write(true).open(log).unwrap();
    let (shim, answer) = any_shim(&engine, program, &bundle).await;
    let spec = spec(&engine, id);
    let uri = binary(&spec);
    let request = CreateTaskRequest { stdout: uri.clone(), stderr: uri, ..bundle.create() };
    shim.create(request).await.unwrap();
    assert_eq!(loggers(&engine), 1);
    let mut client = attach(&spec.socket, OUT).await.unwrap();
    let reading = tokio::spawn(async move {
        let mut length = 0;
        loop {
            match recv(&mut client).await {
                Frame::Stdout(data) => length += data.len(),
                Frame::Stderr(data) => assert_eq!(data, "last\n"),
                Frame::End => return length,
                Frame::Failed(error) => panic!("{error}"),
            }
        }
    });
    start(&shim, id, "").await.unwrap();
    let ended = || engine.events.all::<TaskExit>().iter().any(|exit| exit.id == *id);
    let (mut text, rotations) = rotate_until(&spec, ended).await;
    wait(&shim, id, "").await.unwrap();
    delete(&shim, id, "").await.unwrap();
    until("the logger has ended", || loggers(&engine) == 0).await;
    // No new one was made if the last rotation came too late.
    text.push_str(&fs::read_to_string(spec.path.as_ref().unwrap()).unwrap_or_default());
    let all = lines(&text);
    let mut expected = (0..40).flat_map(|b| (0..250).map(move |i| format!("{b} {i}")));
    for found in all.iter().filter(|line| line.0 == "stdout" && line.1 == 'F') {
        assert_eq!(found.2, expected.next().unwrap());
    }
    assert_eq!(expected.next(), None);
    assert!(all.contains(&line("stderr", 'F', "last")) && all.contains(&line("stdout", 'P', "end")));
    assert_eq!(all.len(), 10_002);
    let written: usize = (0..40).flat_map(|b| (0..250).map(move |i| format!("{b} {i}\n").len())).sum();
    assert_eq!(reading.await.unwrap(), written + "end".len());
    assert!(!spec.socket.exists());
    println!("{program}: 10002 lines by a logger over {rotations} rotations");
    shutdown(&shim, &answer).await;

    // With a terminal, and input by a fifo that the shim reads and the logger writes.
    let bundle = engine.bundle(tty, &sh("read line; echo got $line; exit 6"), |config| {
        config["process"]["terminal"] = json!(true);
    });
    let log = bundle.fifo("log");
    let _reader = fs::OpenOptions::new().read(true).write(true).open(log).unwrap();
    let stdin = bundle.fifo("stdin");
    let (shim, answer) = any_shim(&engine, program, &bundle).await;
    let spec = LogSpec {
        stdin: Stdin::Open,
        terminal: true,
        stdin_fifo: Some(stdin.clone().into()),
        ..self::spec(&engine, tty)
    };
    let uri = binary(&spec);
    let request = CreateTaskRequest { stdin, stdout: uri, terminal: true, ..bundle.create() };
    shim.create(request).await.unwrap();
    let mut client = attach(&spec.socket, ALL).await.unwrap();
    start(&shim, tty, "").await.unwrap();
    type_in(&mut client, "word\n").await;
    expect(&mut client, "got word\r\n").await;
    assert_eq!(recv(&mut client).await, Frame::End);
    assert_eq!(wait(&shim, tty, "").await.unwrap(), 6);
    delete(&shim, tty, "").await.unwrap();
    until("the logger has ended", || loggers(&engine) == 0).await;
    assert_eq!(read(&spec), ["word", "got word"].map(|text| line("stdout", 'F', text)));
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn a_logger_does_the_same_under_our_shim() {
    life_with_a_logger(SHIM, "ours").await;
}

#[tokio::test]
async fn a_logger_does_the_same_under_debians_shim() {
    if !fs::exists(GO_SHIM).unwrap() {
        assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "this test cannot run here");
        println!("skipped: {GO_SHIM} is needed (apt install containerd)");
        return;
    }
    life_with_a_logger(GO_SHIM, "debian").await;
}

/// Seconds of CPU that a process has used.
fn cpu(pid: u32) -> f64 {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap();
    let fields: Vec<&str> = stat.rsplit(") ").next().unwrap().split(' ').collect();
    (fields[11].parse::<f64>().unwrap() + fields[12].parse::<f64>().unwrap()) / 100.0
}

#[tokio::test]
#[ignore = "a measurement"]
async fn lines_per_second() {
    let engine = Engine::start().await;
    for (id, script) in [
        (
            "many",
            "busybox yes 'a line of sixty characters, as many a program of ours writes.' | busybox head -n 4000000",
        ),
        (
            "single",
            "i=0; while [ $i -lt 200000 ]; do echo a line of sixty characters, as many a program of ours writes.; i=$((i+1)); done",
        ),
    ] {
        let bundle = engine.bundle(id, &sh(script), |_| {});
        let (shim, answer) = engine.shim(&bundle).await;
        let spec = spec(&engine, id);
        create(&shim, &bundle, &spec).await;
        let pid = shim.connect_shim(ConnectRequest { id: of(id) }).await.unwrap().shim_pid;
        let (before, began) = (cpu(pid), Instant::now());
        start(&shim, id, "").await.unwrap();
        shim.clone()
            .with_deadline(Duration::from_secs(120))
            .wait(WaitRequest { id: of(id), exec_id: String::new() })
            .await
            .unwrap();
        let (wall, used) = (began.elapsed().as_secs_f64(), cpu(pid) - before);
        let count =
            fs::read(spec.path.as_ref().unwrap()).unwrap().iter().filter(|byte| **byte == b'\n').count();
        println!(
            "{id}: {count} lines in {wall:.2} s, {:.0} a second; {:.2} us of the shim's CPU a line",
            count as f64 / wall,
            used * 1e6 / count as f64
        );
        delete(&shim, id, "").await.unwrap();
        shutdown(&shim, &answer).await;
    }
}
