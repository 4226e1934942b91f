//! The shim through its task service, with real runc and real containers. Needs root, runc and busybox-static.

#![allow(clippy::unwrap_used)]

mod harness;

use std::fs;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::Duration;

use harness::*;
use proto::containerd::events::{TaskDelete, TaskExecStarted, TaskExit, TaskOom, TaskStart};
use proto::containerd::runc::v1::{Options, ProcessDetails};
use proto::containerd::v1::types::Status;
use serde_json::json;
use shim_api::Code;
use shim_api::bootstrap::{Answer, Generation};
use shim_api::task::*;

fn sh(script: &str) -> [&str; 3] {
    ["sh", "-c", script]
}

#[tokio::test]
async fn a_container_lives_and_ends() {
    let engine = Engine::start().await;
    let bundle = engine.bundle("life", &sh("echo out; echo err >&2; exit 7"), |_| {});
    let (stdout, out) = bundle.output("stdout");
    let (stderr, err) = bundle.output("stderr");
    let (shim, answer) = engine.shim(&bundle).await;

    let created = shim.create(CreateTaskRequest { stdout, stderr, ..bundle.create() }).await.unwrap();
    assert!(bundle.is_mounted());
    assert_eq!(state(&shim, "life", "").await.unwrap().status(), Status::Created);
    let again = shim.create(bundle.create()).await.unwrap_err();
    assert_eq!(again.code, Code::AlreadyExists);
    let connected = shim.connect_shim(ConnectRequest { id: of("life") }).await.unwrap();
    assert_eq!(connected.task_pid, created.pid);
    assert_eq!(fs::read_to_string(bundle.path.join("shim.pid")).unwrap(), connected.shim_pid.to_string());
    assert_eq!(fs::read_to_string(bundle.path.join("address")).unwrap(), answer.address);

    assert_eq!(start(&shim, "life", "").await.unwrap(), created.pid);
    assert_eq!(wait(&shim, "life", "").await.unwrap(), 7);
    assert_eq!(start(&shim, "life", "").await.unwrap_err().code, Code::Unknown);
    assert_eq!(kill(&shim, "life", "", 9, false).await.unwrap_err().code, Code::NotFound);
    let stopped = state(&shim, "life", "").await.unwrap();
    assert_eq!((stopped.status(), stopped.exit_status), (Status::Stopped, 7));
    assert_eq!((out.await.unwrap().as_str(), err.await.unwrap().as_str()), ("out\n", "err\n"));

    let deleted = delete(&shim, "life", "").await.unwrap();
    assert_eq!((deleted.pid, deleted.exit_status), (created.pid, 7));
    assert!(!bundle.is_mounted());
    assert_eq!(state(&shim, "life", "").await.unwrap_err().code, Code::NotFound);
    engine.events.wait::<TaskDelete>(|event| event.exit_status == 7).await;
    assert_eq!(engine.events.topics(), ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn execs_have_streams_and_exits_of_their_own() {
    let engine = Engine::start().await;
    let bundle = engine.bundle("execs", &["sleep", "1000"], |_| {});
    let (shim, answer) = engine.shim(&bundle).await;
    shim.create(bundle.create()).await.unwrap();
    start(&shim, "execs", "").await.unwrap();

    // Standard input is read to its end, which close-io brings about.
    let (stdout, out) = bundle.output("cat.out");
    let stdin = bundle.fifo("cat.in");
    let request = ExecProcessRequest {
        id: of("execs"),
        exec_id: of("cat"),
        spec: Some(process(&sh("cat; echo end"))),
        stdin: stdin.clone(),
        stdout,
        ..Default::default()
    };
    shim.exec(request.clone()).await.unwrap();
    assert_eq!(shim.exec(request).await.unwrap_err().code, Code::AlreadyExists);
    assert_eq!(kill(&shim, "execs", "cat", 9, false).await.unwrap_err().code, Code::FailedPrecondition);
    let pid = start(&shim, "execs", "cat").await.unwrap();
    let writer = tokio::task::spawn_blocking(move || fs::OpenOptions::new().write(true).open(stdin).unwrap());
    let mut writer = writer.await.unwrap();
    writer.write_all(b"hello\n").unwrap();
    let pids = shim.pids(PidsRequest { id: of("execs") }).await.unwrap().processes;
    let found = pids.iter().find(|process| process.pid == pid).unwrap();
    let details: ProcessDetails = proto::any::unpack(found.info.as_ref().unwrap()).unwrap();
    assert_eq!(details.exec_id, "cat");
    shim.close_io(CloseIoRequest { id: of("execs"), exec_id: of("cat"), stdin: true }).await.unwrap();
    drop(writer);
    assert_eq!(wait(&shim, "execs", "cat").await.unwrap(), 0);
    assert_eq!(out.await.unwrap(), "hello\nend\n");
    assert_eq!(delete(&shim, "execs", "cat").await.unwrap().pid, pid);

    // Exit codes, signals (a realtime one too), programs that are not there.
    for (id, script, status) in
        [("seven", "exit 7", 7), ("term", "kill -15 $$", 143), ("rt", "kill -34 $$", 162)]
    {
        exec(&shim, "execs", id, &sh(script)).await.unwrap();
        start(&shim, "execs", id).await.unwrap();
        assert_eq!(wait(&shim, "execs", id).await.unwrap(), status, "{id}");
        delete(&shim, "execs", id).await.unwrap();
    }
    exec(&shim, "execs", "missing", &["/no/such/program"]).await.unwrap();
    let waiting = tokio::spawn({
        let shim = shim.clone();
        async move { wait(&shim, "execs", "missing").await }
    });
    let error = start(&shim, "execs", "missing").await.unwrap_err();
    assert_eq!(waiting.await.unwrap().unwrap(), 255, "a wait for what never ran ends");
    assert!(error.message.contains("OCI runtime exec failed"), "{error}");
    assert!(error.message.contains("no such file"), "{error}");
    delete(&shim, "execs", "missing").await.unwrap();
    assert_eq!(exec(&shim, "execs", "../x", &["true"]).await.unwrap_err().code, Code::InvalidArgument);
    assert_eq!(start(&shim, "execs", "nobody").await.unwrap_err().code, Code::NotFound);

    kill(&shim, "execs", "", 9, false).await.unwrap();
    assert_eq!(wait(&shim, "execs", "").await.unwrap(), 137);
    let late = exec(&shim, "execs", "late", &["true"]).await.unwrap_err();
    assert_eq!(late.code, Code::FailedPrecondition);
    delete(&shim, "execs", "").await.unwrap();
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn a_terminal_can_be_typed_at_and_resized() {
    let engine = Engine::start().await;
    let bundle = engine.bundle("tty", &sh("read line; stty size; echo got $line"), |config| {
        config["process"]["terminal"] = json!(true);
    });
    let (stdout, out) = bundle.output("out");
    let stdin = bundle.fifo("in");
    let (shim, answer) = engine.shim(&bundle).await;
    let request = CreateTaskRequest { stdin: stdin.clone(), stdout, terminal: true, ..bundle.create() };
    shim.create(request).await.unwrap();
    shim.resize_pty(ResizePtyRequest { id: of("tty"), exec_id: String::new(), width: 91, height: 33 })
        .await
        .unwrap();
    start(&shim, "tty", "").await.unwrap();

    // An exec with a terminal of its own beside it, whose one stream has both outputs.
    let (exec_out, exec_text) = bundle.output("exec.out");
    let request = ExecProcessRequest {
        id: of("tty"),
        exec_id: of("side"),
        terminal: true,
        stdout: exec_out,
        spec: Some(process(&sh("cat /proc/self/stat >/dev/tty; echo err >&2; [ -t 0 ] && exit 4"))),
        ..Default::default()
    };
    shim.exec(request).await.unwrap();
    start(&shim, "tty", "side").await.unwrap();
    assert_eq!(wait(&shim, "tty", "side").await.unwrap(), 4);
    assert!(exec_text.await.unwrap().contains("err\r\n"));
    assert!(state(&shim, "tty", "side").await.unwrap().terminal);
    delete(&shim, "tty", "side").await.unwrap();

    let mut writer = fs::OpenOptions::new().write(true).open(&stdin).unwrap();
    writer.write_all(b"word\n").unwrap();
    assert_eq!(wait(&shim, "tty", "").await.unwrap(), 0);
    let text = out.await.unwrap();
    assert!(text.contains("33 91") && text.contains("got word"), "{text:?}");
    delete(&shim, "tty", "").await.unwrap();

    // The end of a terminal's input is what Ctrl-D is.
    let bundle = engine.bundle("eof", &sh("cat; exit 5"), |config| {
        config["process"]["terminal"] = json!(true);
    });
    let stdin = bundle.fifo("in");
    let (second, second_answer) = engine.shim(&bundle).await;
    let request = CreateTaskRequest { stdin: stdin.clone(), terminal: true, ..bundle.create() };
    second.create(request).await.unwrap();
    start(&second, "eof", "").await.unwrap();
    drop(fs::OpenOptions::new().write(true).open(&stdin).unwrap());
    second.close_io(CloseIoRequest { id: of("eof"), exec_id: String::new(), stdin: true }).await.unwrap();
    assert_eq!(wait(&second, "eof", "").await.unwrap(), 5);
    delete(&second, "eof", "").await.unwrap();
    shutdown(&second, &second_answer).await;
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn output_waits_for_readers_that_come_and_go() {
    let engine = Engine::start().await;
    let bundle = engine.bundle("patient", &sh("echo one; read x; echo two; exit 0"), |_| {});
    let (stdin, stdout) = (bundle.fifo("in"), bundle.fifo("out"));
    let (shim, answer) = engine.shim(&bundle).await;
    // Nobody has opened anything yet: create and start must not wait for that.
    let request = CreateTaskRequest { stdin: stdin.clone(), stdout: stdout.clone(), ..bundle.create() };
    shim.create(request).await.unwrap();
    start(&shim, "patient", "").await.unwrap();
    let mut first = [0; 4];
    fs::File::open(&stdout).unwrap().read_exact(&mut first).unwrap();
    assert_eq!(&first, b"one\n");
    // The first reader is gone and another comes: before the process may end, since its pipe goes with it. A writer comes and
    // goes; the process goes on.
    let mut reader = fs::File::open(&stdout).unwrap();
    fs::OpenOptions::new().write(true).open(&stdin).unwrap().write_all(b"go\n").unwrap();
    let rest = tokio::task::spawn_blocking(move || {
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        rest
    });
    assert_eq!(wait(&shim, "patient", "").await.unwrap(), 0);
    assert_eq!(rest.await.unwrap(), "two\n");
    delete(&shim, "patient", "").await.unwrap();
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn much_output_arrives_whole_and_files_are_appended_to() {
    let engine = Engine::start().await;
    let bundle = engine.bundle("much", &sh("dd if=/proc/self/exe bs=1M count=1 2>/dev/null"), |_| {});
    let path = bundle.fifo("out");
    let reading = path.clone();
    let reader = tokio::task::spawn_blocking(move || fs::read(reading).unwrap().len());
    let (shim, answer) = engine.shim(&bundle).await;
    shim.create(CreateTaskRequest { stdout: path, ..bundle.create() }).await.unwrap();
    start(&shim, "much", "").await.unwrap();
    assert_eq!(wait(&shim, "much", "").await.unwrap(), 0);
    assert_eq!(reader.await.unwrap(), 1 << 20);
    delete(&shim, "much", "").await.unwrap();

    let log = engine.folder.path().join("logs/a b.log");
    let uri = format!("file://{}", log.to_str().unwrap().replace(' ', "%20"));
    let bundle = engine.bundle("logged", &sh("echo out; echo err >&2"), |_| {});
    let (second, second_answer) = engine.shim(&bundle).await;
    let request = CreateTaskRequest { stdout: uri.clone(), stderr: uri, ..bundle.create() };
    second.create(request).await.unwrap();
    start(&second, "logged", "").await.unwrap();
    wait(&second, "logged", "").await.unwrap();
    let text = fs::read_to_string(&log).unwrap();
    assert!(text.contains("out\n") && text.contains("err\n"), "{text:?}");
    delete(&second, "logged", "").await.unwrap();
    shutdown(&second, &second_answer).await;
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn a_logging_program_reads_the_output() {
    let engine = Engine::start().await;
    let logger = engine.folder.path().join("logger.sh");
    let log = engine.folder.path().join("log.txt");
    fs::write(
        &logger,
        "#!/bin/sh\necho \"$CONTAINER_NAMESPACE $CONTAINER_ID $1 $2\" > \"$2\"\nexec 5>&-\ncat <&3 >> \"$2\"\ncat <&4 >> \"$2\"\necho done >> \"$2\"\n",
    )
    .unwrap();
    fs::set_permissions(&logger, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let uri = format!("binary://{}?file={}", logger.display(), log.display());
    let bundle = engine.bundle("logger", &sh("echo out; echo err >&2"), |_| {});
    let (shim, answer) = engine.shim(&bundle).await;
    let request = CreateTaskRequest { stdout: uri.clone(), stderr: uri, ..bundle.create() };
    shim.create(request).await.unwrap();
    start(&shim, "logger", "").await.unwrap();
    wait(&shim, "logger", "").await.unwrap();
    let complete = async {
        while !fs::read_to_string(&log).unwrap().ends_with("done\n") {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(LIMIT, complete).await.unwrap();
    let expected = format!("{NAMESPACE} logger file {}\nout\nerr\ndone\n", log.display());
    assert_eq!(fs::read_to_string(&log).unwrap(), expected);
    delete(&shim, "logger", "").await.unwrap();
    shutdown(&shim, &answer).await;

    let bundle = engine.bundle("nologger", &["true"], |_| {});
    let (shim, answer) = engine.shim(&bundle).await;
    let request = CreateTaskRequest { stdout: "binary:///no/such/logger".into(), ..bundle.create() };
    assert_eq!(shim.create(request).await.unwrap_err().code, Code::NotFound);
    assert!(!bundle.is_mounted());
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn a_grandchild_that_holds_the_output_delays_nothing_for_long() {
    let engine = Engine::start().await;
    let bundle = engine.bundle("holder", &["sleep", "1000"], |_| {});
    let (shim, answer) = engine.shim(&bundle).await;
    shim.create(bundle.create()).await.unwrap();
    start(&shim, "holder", "").await.unwrap();
    let stdout = bundle.fifo("out");
    let request = ExecProcessRequest {
        id: of("holder"),
        exec_id: of("parent"),
        spec: Some(process(&sh("sleep 900 & echo started"))),
        stdout,
        ..Default::default()
    };
    shim.exec(request).await.unwrap();
    start(&shim, "holder", "parent").await.unwrap();
    let waited = tokio::time::timeout(Duration::from_secs(5), wait(&shim, "holder", "parent")).await;
    assert_eq!(waited.expect("the exit waits for the grandchild").unwrap(), 0);
    kill(&shim, "holder", "", 9, true).await.unwrap();
    wait(&shim, "holder", "").await.unwrap();
    delete(&shim, "holder", "").await.unwrap();
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn pause_update_stats() {
    let engine = Engine::start().await;
    let bundle = engine.bundle("limits", &["sleep", "1000"], |config| {
        config["linux"]["resources"] = json!({"memory": {"limit": 64 << 20}});
    });
    let (shim, answer) = engine.shim(&bundle).await;
    shim.create(bundle.create()).await.unwrap();
    start(&shim, "limits", "").await.unwrap();

    let id = || of("limits");
    shim.pause(PauseRequest { id: id() }).await.unwrap();
    assert_eq!(state(&shim, "limits", "").await.unwrap().status(), Status::Paused);
    let error = exec(&shim, "limits", "x", &["true"]).await.unwrap_err();
    assert_eq!(error.code, Code::FailedPrecondition);
    shim.resume(ResumeRequest { id: id() }).await.unwrap();
    assert_eq!(state(&shim, "limits", "").await.unwrap().status(), Status::Running);
    let error = shim.resume(ResumeRequest { id: id() }).await.unwrap_err();
    assert_eq!(error.code, Code::FailedPrecondition);

    let stats = shim.stats(StatsRequest { id: id() }).await.unwrap().stats.unwrap();
    assert_eq!(memory_limit(&stats), 64 << 20);
    let resources = prost_types::Any {
        type_url: "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources".into(),
        value: serde_json::to_vec(&json!({"memory": {"limit": 96 << 20}})).unwrap(),
    };
    let update = UpdateTaskRequest { id: id(), resources: Some(resources), ..Default::default() };
    shim.update(update).await.unwrap();
    let stats = shim.stats(StatsRequest { id: id() }).await.unwrap().stats.unwrap();
    assert_eq!(memory_limit(&stats), 96 << 20);
    let topics = engine.events.topics();
    assert!(topics.contains(&"/tasks/paused".into()) && topics.contains(&"/tasks/resumed".into()));

    kill(&shim, "limits", "", 9, true).await.unwrap();
    assert_eq!(wait(&shim, "limits", "").await.unwrap(), 137);
    delete(&shim, "limits", "").await.unwrap();
    shutdown(&shim, &answer).await;
}

fn memory_limit(stats: &prost_types::Any) -> u64 {
    use proto::io::containerd::cgroups::{v1, v2};
    if proto::any::is::<v1::Metrics>(stats) {
        let metrics: v1::Metrics = proto::any::unpack(stats).unwrap();
        assert!(metrics.cpu.unwrap().usage.unwrap().total > 0);
        assert_eq!(metrics.pids.unwrap().current, 1);
        return metrics.memory.unwrap().usage.unwrap().limit;
    }
    let metrics: v2::Metrics = proto::any::unpack(stats).unwrap();
    assert!(metrics.cpu.unwrap().usage_usec > 0);
    assert_eq!(metrics.pids.unwrap().current, 1);
    metrics.memory.unwrap().usage_limit
}

#[tokio::test]
async fn running_out_of_memory_is_an_event() {
    let engine = Engine::start().await;
    // tail keeps a line without an end in memory.
    let bundle = engine.bundle("oom", &sh("tail -c 200000000 /dev/zero"), |config| {
        config["linux"]["resources"] = json!({"memory": {"limit": 16 << 20, "swap": 16 << 20},
            "devices": [{"allow": true, "access": "rwm"}]});
        config["linux"]["devices"] =
            json!([{"path": "/dev/zero", "type": "c", "major": 1, "minor": 5, "fileMode": 438}]);
    });
    let (shim, answer) = engine.shim(&bundle).await;
    shim.create(bundle.create()).await.unwrap();
    start(&shim, "oom", "").await.unwrap();
    assert_eq!(wait(&shim, "oom", "").await.unwrap(), 137);
    engine.events.wait::<TaskOom>(|event| event.container_id == "oom").await;
    delete(&shim, "oom", "").await.unwrap();
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn the_init_exits_last() {
    for own_pid_namespace in [true, false] {
        let engine = Engine::start().await;
        let bundle = engine.bundle("order", &["sleep", "1000"], |config| {
            if !own_pid_namespace {
                config["linux"]["namespaces"] = json!([{"type": "mount"}]);
                config.as_object_mut().unwrap().remove("hostname");
            }
        });
        let (shim, answer) = engine.shim(&bundle).await;
        shim.create(bundle.create()).await.unwrap();
        start(&shim, "order", "").await.unwrap();
        for id in ["a", "b", "c"] {
            exec(&shim, "order", id, &["sleep", "1000"]).await.unwrap();
            start(&shim, "order", id).await.unwrap();
        }
        // Only the init is killed; the kernel or the shim kill the rest.
        kill(&shim, "order", "", 9, false).await.unwrap();
        assert_eq!(wait(&shim, "order", "").await.unwrap(), 137);
        engine.events.wait::<TaskExit>(|exit| exit.id == "order").await;
        let exits: Vec<_> = engine.events.all::<TaskExit>().into_iter().map(|exit| exit.id).collect();
        assert_eq!(exits.len(), 4, "{exits:?}");
        assert_eq!(exits[3], "order");
        delete(&shim, "order", "").await.unwrap();
        shutdown(&shim, &answer).await;
    }
}

#[tokio::test]
async fn starts_come_before_exits_however_short_the_life() {
    let engine = Engine::start().await;
    let bundle = engine.bundle("short", &["sleep", "1000"], |_| {});
    let (shim, answer) = engine.shim(&bundle).await;
    shim.create(bundle.create()).await.unwrap();
    start(&shim, "short", "").await.unwrap();
    let before = descriptors(&shim).await;
    let many = (0..12).map(|n| {
        let shim = shim.clone();
        tokio::spawn(async move {
            let id = format!("e{n}");
            let file = format!("file:///dev/null?{n}");
            let request = ExecProcessRequest {
                id: of("short"),
                exec_id: id.clone(),
                spec: Some(process(&["true"])),
                stdout: file.clone(),
                stderr: file,
                ..Default::default()
            };
            shim.exec(request).await.unwrap();
            start(&shim, "short", &id).await.unwrap();
            assert_eq!(wait(&shim, "short", &id).await.unwrap(), 0);
            delete(&shim, "short", &id).await.unwrap();
        })
    });
    for one in many.collect::<Vec<_>>() {
        one.await.unwrap();
    }
    assert_eq!(descriptors(&shim).await, before, "descriptors leak");
    for n in 0..12 {
        engine.events.wait::<TaskExit>(|exit| exit.id == format!("e{n}")).await;
    }
    let topics = engine.events.topics();
    assert_eq!(topics.iter().filter(|topic| *topic == "/tasks/exec-started").count(), 12);
    let started = engine.events.all::<TaskExecStarted>();
    let exits = engine.events.all::<TaskExit>();
    for exec in &started {
        assert!(exits.iter().any(|exit| exit.id == exec.exec_id && exit.pid == exec.pid));
    }
    kill(&shim, "short", "", 15, true).await.unwrap();
    kill(&shim, "short", "", 9, true).await.unwrap_or(());
    wait(&shim, "short", "").await.unwrap();
    delete(&shim, "short", "").await.unwrap();
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn a_group_shares_a_shim() {
    let engine = Engine::start().await;
    let grouped = |config: &mut serde_json::Value| {
        config["annotations"] = json!({"io.kubernetes.cri.sandbox-id": "pod"});
    };
    let first = engine.bundle("one", &["sleep", "1000"], grouped);
    let second = engine.bundle("two", &sh("exit 4"), grouped);
    let (shim, answer) = engine.shim(&first).await;
    shim.create(first.create()).await.unwrap();
    start(&shim, "one", "").await.unwrap();
    // A dead shim's socket in the way, and everybody at once: one shim comes of it.
    let third = engine.bundle("three", &["true"], |config| {
        config["annotations"] = json!({"io.containerd.runc.v2.group": "crowd"});
    });
    let params = engine.launch("three").encode(Generation::Params);
    let once = engine.run(&third, "start", &params).stdout;
    let crowd = TaskClient::connect(&Answer::parse(&once).unwrap().address, 3).await.unwrap();
    let dead = crowd.connect_shim(ConnectRequest::default()).await.unwrap().shim_pid;
    sys::pidfd::send_signal(sys::pidfd::open(dead).unwrap(), 9).unwrap();
    crowd.closed().await;
    let starts: Vec<_> = (0..6).map(|_| engine.spawn(SHIM, &third, "start", &params)).collect();
    for start in starts {
        let output = start.wait_with_output().unwrap();
        assert_eq!(output.stdout, once, "{}", String::from_utf8_lossy(&output.stderr));
    }
    let crowd_answer = Answer::parse(&once).unwrap();
    let crowd = TaskClient::connect(&crowd_answer.address, 3).await.unwrap();
    assert_eq!(shims_of(&engine, "three"), 1);
    shutdown(&crowd, &crowd_answer).await;
    let (other, other_answer) = engine.shim(&second).await;
    assert_eq!(answer, other_answer);
    other.create(second.create()).await.unwrap();
    start(&other, "two", "").await.unwrap();
    assert_eq!(wait(&other, "two", "").await.unwrap(), 4);
    delete(&other, "two", "").await.unwrap();
    // It has a container left, so it goes on.
    other.shutdown(ShutdownRequest { id: of("two"), now: false }).await.unwrap();
    assert_eq!(state(&shim, "one", "").await.unwrap().status(), Status::Running);
    kill(&shim, "one", "", 9, false).await.unwrap();
    wait(&shim, "one", "").await.unwrap();
    delete(&shim, "one", "").await.unwrap();
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn both_versions_and_all_generations_are_served() {
    let engine = Engine::start().await;
    let bundle = engine.bundle("versions", &["sleep", "1000"], |_| {});
    // Options on stdin: the answer is a bare address, as containerd 1.6 wants it.
    let options = prost_types::Any {
        type_url: "containerd.runc.v1.Options".into(),
        value: prost::Message::encode_to_vec(&Options { binary_name: "runc".into(), ..Default::default() }),
    };
    let output = engine.run(&bundle, "start", &prost::Message::encode_to_vec(&options));
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(text.starts_with("unix:///run/containerd/s/"), "{text}");
    let mut pids = Vec::new();
    for version in [2, 3] {
        let client = TaskClient::connect(&text, version).await.unwrap();
        pids.push(client.connect_shim(ConnectRequest { id: of("x") }).await.unwrap().shim_pid);
    }
    assert_eq!(pids[0], pids[1]);
    // A second start finds the first's shim.
    let again = engine.run(&bundle, "start", b"");
    assert_eq!(String::from_utf8(again.stdout).unwrap(), text);
    let shim = TaskClient::connect(&text, 2).await.unwrap();
    shutdown(&shim, &Answer::ttrpc(2, text)).await;

    let wrong = engine.launch("other").encode(Generation::Params);
    let refused = engine.run(&bundle, "start", &wrong);
    assert!(!refused.status.success() && refused.stdout.is_empty());
    assert!(String::from_utf8_lossy(&refused.stderr).contains("other"));
}

#[tokio::test]
async fn debians_go_shim_understands_our_side() {
    const GO_SHIM: &str = "/usr/bin/containerd-shim-runc-v2";
    if !fs::exists(GO_SHIM).unwrap() {
        assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "this test cannot run here");
        println!("skipped: {GO_SHIM} is needed (apt install containerd)");
        return;
    }
    let engine = Engine::start().await;
    let bundle = engine.bundle("go", &sh("exit 6"), |_| {});
    // It reads its log fifo's other end as ours does, and wants the fifo to be there.
    let log = bundle.fifo("log");
    let _reader = fs::OpenOptions::new().read(true).write(true).open(log).unwrap();
    let mut launch = engine.launch("go");
    launch.options = Some(proto::any::pack(&Options { binary_name: "runc".into(), ..Default::default() }));
    let mut outputs = Vec::new();
    for (_, stdin) in launch.stdin_newest_first() {
        let output = engine.run_shim(GO_SHIM, &bundle, "start", &stdin);
        let started = output.status.success();
        outputs.push(output);
        if started {
            break;
        }
    }
    let last = outputs.last().unwrap();
    assert!(last.status.success(), "{}", String::from_utf8_lossy(&last.stderr));
    let answer = Answer::parse(&last.stdout).unwrap();
    let shim = TaskClient::connect(&answer.address, answer.version).await.unwrap().with_namespace(NAMESPACE);
    shim.create(bundle.create()).await.unwrap();
    start(&shim, "go", "").await.unwrap();
    assert_eq!(wait(&shim, "go", "").await.unwrap(), 6);
    assert_eq!(state(&shim, "nobody", "").await.unwrap_err().code, Code::NotFound);
    delete(&shim, "go", "").await.unwrap();
    engine.events.wait::<TaskDelete>(|event| event.exit_status == 6).await;
    assert_eq!(engine.events.topics(), ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn a_dead_shim_is_cleaned_up_after() {
    let engine = Engine::start().await;
    let bundle = engine.bundle("dead", &["sleep", "1000"], |_| {});
    let (shim, answer) = engine.shim(&bundle).await;
    let pid = shim.create(bundle.create()).await.unwrap().pid;
    start(&shim, "dead", "").await.unwrap();
    let shim_pid = shim.connect_shim(ConnectRequest { id: of("dead") }).await.unwrap().shim_pid;
    let waiting = tokio::spawn({
        let shim = shim.clone();
        async move { wait(&shim, "dead", "").await }
    });
    let process = sys::pidfd::open(shim_pid).unwrap();
    sys::pidfd::send_signal(&process, 9).unwrap();
    shim.closed().await;
    assert_eq!(waiting.await.unwrap().unwrap_err().code, Code::Closed);
    assert_eq!(state(&shim, "dead", "").await.unwrap_err().code, Code::Closed);

    for round in 0..2 {
        let output = engine.run(&bundle, "delete", b"");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        assert_eq!(String::from_utf8_lossy(&output.stderr), "", "round {round}");
        let response: DeleteResponse = prost::Message::decode(output.stdout.as_slice()).unwrap();
        assert_eq!((response.pid, response.exit_status), (pid, 137));
        assert!(response.exited_at.is_some());
    }
    assert!(!bundle.is_mounted());
    assert!(!is_running(pid));
    let socket = shim_api::transport::socket_path(&answer.address).unwrap();
    assert!(!socket.exists());
    // Even the bundle may be gone.
    let mut gone = engine.bundle("gone", &["true"], |_| {});
    gone.path = engine.folder.path().join("gone/missing");
    let output = std::process::Command::new(SHIM)
        .args(shim_api::bootstrap::arguments(&engine.launch("gone"), Some(&gone.path), "delete"))
        .output()
        .unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    // And the name is free for a new shim.
    let (shim, answer) = engine.shim(&bundle).await;
    shutdown(&shim, &answer).await;
}

/// How many shims were started for this container and live.
fn shims_of(engine: &Engine, id: &str) -> usize {
    let bundle = engine.folder.path().join(id);
    let lives_there = |entry: &fs::DirEntry| {
        fs::read_link(entry.path().join("cwd")).is_ok_and(|cwd| cwd == bundle)
            && fs::read_link(entry.path().join("exe")).is_ok_and(|exe| exe == std::path::Path::new(SHIM))
    };
    fs::read_dir("/proc").unwrap().flatten().filter(lives_there).count()
}

/// A zombie that this machine's init has not reaped runs no more.
fn is_running(pid: u32) -> bool {
    fs::read_to_string(format!("/proc/{pid}/stat"))
        .is_ok_and(|stat| !stat.rsplit(')').next().is_some_and(|rest| rest.starts_with(" Z")))
}

#[tokio::test]
async fn events_outlive_the_engines_absence_in_order() {
    let mut engine = Engine::start().await;
    let bundle = engine.bundle("absent", &sh("exit 9"), |_| {});
    let (shim, answer) = engine.shim(&bundle).await;
    shim.create(bundle.create()).await.unwrap();
    engine.events.wait::<proto::containerd::events::TaskCreate>(|_| true).await;
    engine.stop_listening().await;
    start(&shim, "absent", "").await.unwrap();
    assert_eq!(wait(&shim, "absent", "").await.unwrap(), 9);
    delete(&shim, "absent", "").await.unwrap();
    engine.listen().await;
    engine.events.wait::<TaskDelete>(|event| event.exit_status == 9).await;
    assert_eq!(engine.events.topics(), ["/tasks/create", "/tasks/start", "/tasks/exit", "/tasks/delete"]);
    assert_eq!(engine.events.all::<TaskStart>().len(), 1);
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn without_a_ttrpc_address_the_publish_binary_takes_events() {
    let engine = Engine::start().await;
    let bundle = engine.bundle("binary", &["true"], |_| {});
    let log = engine.folder.path().join("published");
    let binary = engine.folder.path().join("publish.sh");
    let script = format!("#!/bin/sh\necho \"$@\" >> {0}\nwc -c >> {0}\n", log.display());
    fs::write(&binary, script).unwrap();
    fs::set_permissions(&binary, std::os::unix::fs::PermissionsExt::from_mode(0o700)).unwrap();
    let mut launch = engine.launch("binary");
    launch.ttrpc_address = String::new();
    launch.publish_binary = binary.to_str().unwrap().into();
    let output = std::process::Command::new(SHIM)
        .args(shim_api::bootstrap::arguments(&launch, None, "start"))
        .env_remove("TTRPC_ADDRESS")
        .current_dir(&bundle.path)
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap();
    let answer = Answer::parse(&output.stdout).unwrap();
    let shim = TaskClient::connect(&answer.address, 3).await.unwrap();
    shim.create(bundle.create()).await.unwrap();
    start(&shim, "binary", "").await.unwrap();
    wait(&shim, "binary", "").await.unwrap();
    delete(&shim, "binary", "").await.unwrap();
    shutdown(&shim, &answer).await;
    let text = fs::read_to_string(&log).unwrap();
    let calls: Vec<_> = text.lines().filter(|line| line.contains("publish --topic")).collect();
    assert_eq!(calls.len(), 4, "{text}");
    for (call, topic) in calls.iter().zip(["create", "start", "exit", "delete"]) {
        let expected = format!("publish --topic /tasks/{topic} --namespace {NAMESPACE}");
        assert!(call.starts_with("--address /") && call.ends_with(&expected), "{call}");
    }
    assert!(text.lines().skip(1).step_by(2).all(|size| size.trim().parse::<u32>().unwrap() > 0), "{text}");
}

#[tokio::test]
async fn garbage_on_the_socket_disturbs_nobody() {
    let engine = Engine::start().await;
    let bundle = engine.bundle("garbage", &["sleep", "1000"], |_| {});
    let (shim, answer) = engine.shim(&bundle).await;
    let path = shim_api::transport::socket_path(&answer.address).unwrap();
    let frame = |length: u32, stream: u32, kind: u8, flags: u8, payload: &[u8]| {
        let mut frame = length.to_be_bytes().to_vec();
        frame.extend(stream.to_be_bytes());
        frame.extend([kind, flags]);
        frame.extend(payload);
        frame
    };
    let garbage = [
        b"GET / HTTP/1.1\r\nHost: x\r\n\r\n".to_vec(),
        vec![0xff; 5000],
        vec![0; 5000],
        frame(3, 1, 1, 0, b"\xff\xff\xff"),
        frame(0, 2, 1, 0, b""),
        frame(0, 1, 2, 0, b""),
        frame(0, 1, 3, 1, b""),
        frame(0, 1, 77, 255, b""),
        frame(u32::MAX, 1, 1, 0, b"short"),
        // A service, a method, and a payload that is no message.
        frame(34, 1, 1, 0, b"\x0a\x17containerd.task.v2.Task\x12\x05State"),
    ];
    for bytes in garbage {
        let mut stream = UnixStream::connect(path).unwrap();
        stream.write_all(&bytes).unwrap();
    }
    let unknown = shim_api::transport::Connection::connect(&answer.address).await.unwrap();
    let error = unknown
        .call::<_, ()>("containerd.task.v2.Task", "Nonsense", &StateRequest::default(), Some(LIMIT))
        .await
        .unwrap_err();
    assert_eq!(error.code, Code::Unimplemented);
    shim.create(bundle.create()).await.unwrap();
    // A wait under way holds up nothing else on its connection.
    let waiting = tokio::spawn({
        let shim = shim.clone();
        async move { wait(&shim, "garbage", "").await }
    });
    start(&shim, "garbage", "").await.unwrap();
    kill(&shim, "garbage", "", 9, false).await.unwrap();
    assert_eq!(waiting.await.unwrap().unwrap(), 137);
    delete(&shim, "garbage", "").await.unwrap();
    shutdown(&shim, &answer).await;
}

#[tokio::test]
async fn what_cannot_be_created_leaves_nothing() {
    let engine = Engine::start().await;
    let bundle = engine.bundle("bad", &["/no/such/program"], |_| {});
    let (shim, answer) = engine.shim(&bundle).await;
    let error = shim.create(bundle.create()).await.unwrap_err();
    assert!(error.message.contains("OCI runtime create failed"), "{error}");
    assert!(error.message.contains("no such file"), "{error}");
    assert!(!bundle.is_mounted());
    assert_eq!(state(&shim, "bad", "").await.unwrap_err().code, Code::NotFound);

    let options = Options { binary_name: "no-such-runtime".into(), ..Default::default() };
    let request = CreateTaskRequest { options: Some(proto::any::pack(&options)), ..bundle.create() };
    let error = shim.create(request).await.unwrap_err();
    assert_eq!(error.code, Code::FailedPrecondition);
    assert!(error.message.contains("no-such-runtime") && error.message.contains("BinaryName"), "{error}");
    assert!(!bundle.is_mounted());

    let mut request = bundle.create();
    request.rootfs[0].source = "/no/such/folder".into();
    assert!(shim.create(request).await.unwrap_err().message.contains("/no/such/folder"));
    assert!(engine.events.topics().is_empty());

    // One that was created and never started.
    let good = engine.bundle("unstarted", &["sleep", "1000"], |_| {});
    let (second, second_answer) = engine.shim(&good).await;
    second.create(good.create()).await.unwrap();
    let deleted = delete(&second, "unstarted", "").await.unwrap();
    assert_eq!(deleted.exit_status, 137);
    assert!(!good.is_mounted());
    shutdown(&second, &second_answer).await;
    shutdown(&shim, &answer).await;
}
