//! Shims that die, hang or lie, specs that runc refuses, and bad input: a clear error, nothing left, still serving.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::containerd::services::tasks::v1::GetRequest;
use proto::containerd::v1::types::Status;
use tonic::Code;

use crate::bench::{Bench, STOCK_SHIM, eventually, is_ours, ready, refused};
use crate::with_each_shim;

with_each_shim! {
    a_shim_killed_while_its_container_runs(bench, shim) {
        bench.run("c", shim, &["sleep", "1000"]).await;
        let waiter = bench.wait("c", "");
        let killer = async {
            for pid in bench.shim_pids() {
                kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
            }
        };
        let (waited, ()) = tokio::join!(waiter, killer);
        if is_ours() {
            assert_eq!(waited.unwrap(), 137);
        }
        bench.event("c", "/tasks/exit").await;
        bench.event("c", "/tasks/delete").await;
        assert!(bench.task_events("c").contains(&("/tasks/exit".to_owned(), 137)));
        eventually("the container is gone", || async { !bench.runs("c") }).await;
        if is_ours() {
            assert_eq!(bench.status("c").await, Status::Stopped);
            refused(bench.kill("c", "", 9).await, Code::NotFound);
            assert!(bench.exec("c", "e", &["true"]).await.is_err());
        }
        match bench.delete("c").await {
            Ok(status) => assert_eq!(status, 137),
            Err(status) => assert_eq!(status.code(), Code::NotFound),
        }
        assert_eq!(bench.topics("c").iter().filter(|topic| *topic == "/tasks/exit").count(), 1);
        // The id is free again.
        bench.create("c").await.unwrap();
        bench.start_process("c", "").await.unwrap();
        bench.clear("c").await;
    }

    a_shim_that_is_stopped_for_a_while_keeps_its_container(bench, shim) {
        bench.run("c", shim, &["sleep", "1000"]).await;
        let shims = bench.shim_pids();
        shims.iter().for_each(|pid| tests::suspend(*pid));
        // More than its socket takes, each given up by its caller.
        let calls: Vec<_> = (0..600)
            .map(|_| {
                let mut tasks = bench.tasks();
                let request = bench.request(GetRequest { container_id: "c".into(), exec_id: String::new() });
                tokio::spawn(async move { tasks.get(request).await.map(|_| ()) })
            })
            .collect();
        for call in calls {
            assert!(call.await.unwrap().is_err());
        }
        shims.iter().for_each(|pid| kill(Pid::from_raw(*pid), Signal::SIGCONT).unwrap());
        eventually("the shim answers again", || async {
            bench.status_or_none("c").await == Some(Status::Running)
        })
        .await;
        assert!(bench.runs("c"));
        assert!(bench.topics("c").iter().all(|topic| topic != "/tasks/exit"));
        bench.clear("c").await;
    }

    an_exit_that_is_known_is_told_once(bench, shim) {
        bench.run("c", shim, &["sh", "-c", "exit 5"]).await;
        bench.event("c", "/tasks/exit").await;
        for pid in bench.shim_pids() {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        bench.event("c", "/tasks/delete").await;
        if is_ours() {
            assert_eq!(bench.wait("c", "").await.unwrap(), 5);
            eventually("the end is noted", || async { bench.bundle("c").join("end.json").exists() }).await;
            bench.end_engine(Signal::SIGKILL);
            bench.start_engine().await;
            assert_eq!(bench.wait("c", "").await.unwrap(), 5);
            assert_eq!(bench.delete("c").await.unwrap(), 5);
        }
        assert_eq!(bench.task_events("c").iter().filter(|(topic, _)| topic == "/tasks/exit").count(), 1);
    }

    a_shared_shim_is_not_ended_with_one_of_its_containers(bench, shim) {
        for id in ["pod", "side"] {
            let mut spec = bench.spec(id, &["sleep", "1000"]);
            spec["annotations"] = serde_json::json!({"io.containerd.runc.v2.group": bench.namespace.clone()});
            bench.container(id, shim, &spec).await;
            bench.create(id).await.unwrap();
            bench.start_process(id, "").await.unwrap();
        }
        // The one whose bundle the shim was started in goes, in the shim and not in the engine.
        bench.end_engine(Signal::SIGKILL);
        let bootstrap = fs::read(bench.bundle("pod").join("bootstrap.json")).unwrap();
        let answer = shim_api::bootstrap::Answer::parse(&bootstrap).unwrap();
        let client = shim_api::task::TaskClient::connect(&answer.address, answer.version).await.unwrap();
        let client = client.with_namespace(&bench.namespace);
        let (id, exec_id) = ("pod".to_owned(), String::new());
        let request = shim_api::task::KillRequest { id, exec_id, signal: 9, all: true };
        client.kill(request).await.unwrap();
        let (id, exec_id) = ("pod".to_owned(), String::new());
        client.wait(shim_api::task::WaitRequest { id, exec_id }).await.unwrap();
        let (id, exec_id) = ("pod".to_owned(), String::new());
        client.delete(shim_api::task::DeleteRequest { id, exec_id }).await.unwrap();
        drop(client);
        bench.start_engine().await;
        assert_eq!(bench.list().await, ["side"]);
        assert_eq!(bench.status("side").await, Status::Running);
        assert!(!bench.bundle("pod").exists());
        bench.clear("side").await;
    }

    a_spec_that_runc_refuses(bench, shim) {
        let mut spec = bench.spec("missing", &["/no/such/program"]);
        bench.container("missing", shim, &spec).await;
        let message = match bench.create("missing").await {
            Err(status) => status.message().to_owned(),
            Ok(_) => {
                let status = bench.start_process("missing", "").await.expect_err("there is no such program");
                bench.delete("missing").await.unwrap();
                status.message().to_owned()
            }
        };
        assert!(message.contains("no such file or directory"), "{message}");
        spec = bench.spec("odd", &["true"]);
        spec["linux"]["namespaces"][0]["type"] = "nonsense".into();
        bench.container("odd", shim, &spec).await;
        let status = bench.create("odd").await.expect_err("there is no such namespace");
        assert!(status.message().contains("nonsense"), "{}", status.message());
        bench.container("notjson", shim, &serde_json::json!("not a spec")).await;
        assert!(bench.create("notjson").await.is_err());
        assert!(bench.list().await.is_empty());
        // A root file system that cannot be mounted.
        spec = bench.spec("noroot", &["true"]);
        bench.container("noroot", shim, &spec).await;
        let mut request = bench.create_request("noroot");
        request.rootfs[0].source = bench.path("nowhere").display().to_string();
        assert!(bench.tasks().create(bench.request(request)).await.is_err());
        bench.run("good", shim, &["sleep", "1000"]).await;
        bench.clear("good").await;
    }
}

/// A bench whose PATH has the shim `io.containerd.NAME.v1`, a script.
async fn with_script(name: &str, script: &str) -> Bench {
    let mut bench = Bench::prepare();
    let folder = bench.path("scripts");
    fs::create_dir(&folder).unwrap();
    let path = folder.join(format!("containerd-shim-{name}-v1"));
    fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
    fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    bench.prepend_path(folder);
    bench.start_engine().await;
    bench
}

/// Creates a task with such a shim; the refusal's message. Nothing may stay, and the engine goes on.
async fn refused_by_script(name: &str, script: &str) -> String {
    let bench = with_script(name, script).await;
    bench.container("c", &format!("io.containerd.{name}.v1"), &bench.spec("c", &["true"])).await;
    let status = bench.create("c").await.expect_err("this shim cannot work");
    assert!(bench.list().await.is_empty());
    bench.run("good", STOCK_SHIM, &["sleep", "1000"]).await;
    bench.clear("good").await;
    bench.finish().await;
    status.message().to_owned()
}

macro_rules! unless_missing {
    () => {
        if !ready() {
            return;
        }
    };
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shim_that_fails_at_start_is_quoted() {
    unless_missing!();
    let message = refused_by_script("fails", "echo 'the moon is wrong' >&2; exit 1").await;
    assert!(message.contains("the moon is wrong"), "{message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shim_that_answers_garbage() {
    unless_missing!();
    let message = refused_by_script("garbage", "head -c 5000 /dev/zero | tr '\\0' '\\377'").await;
    assert!(!message.is_empty());
    refused_by_script("silent", "exit 0").await;
    refused_by_script("nobody", "echo -n unix:///run/containerd/s/nobody-is-here").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shim_that_floods_its_answer() {
    unless_missing!();
    if !is_ours() {
        println!("skipped: stock containerd reads without a limit");
        return;
    }
    refused_by_script("floods", "exec cat /dev/zero").await;
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shim_that_hangs_at_start() {
    unless_missing!();
    if !is_ours() {
        println!("skipped: stock containerd waits for ever");
        return;
    }
    let message = refused_by_script("hangs", "echo 'waiting for godot' >&2; exec sleep 100000").await;
    assert!(message.contains("waiting for godot"), "{message}");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn bad_input() {
    unless_missing!();
    let bench = Bench::start().await;
    if is_ours() {
        for id in ["", "..", "a/b", "a b", "-x", "\u{fc}", &"x".repeat(77), &"x".repeat(100_000)] {
            refused(bench.create(id).await, Code::InvalidArgument);
            let answer = bench.get(id, "").await;
            assert!(matches!(answer.unwrap_err().code(), Code::InvalidArgument | Code::NotFound));
        }
    }
    for (number, runtime) in
        ["io.containerd.nosuch.v9", "/no/such/shim", "nonsense", "../../bin/sh", "io.containerd.runc.v2/../x"]
            .into_iter()
            .enumerate()
    {
        let id = format!("c{number}");
        bench.container(&id, runtime, &bench.spec(&id, &["true"])).await;
        let status = bench.create(&id).await.expect_err("there is no such runtime");
        assert!(status.message().contains(runtime) || !is_ours(), "{runtime}: {}", status.message());
        assert!(
            matches!(status.code(), Code::InvalidArgument | Code::NotFound) || !is_ours(),
            "{runtime}: {:?} {}",
            status.code(),
            status.message()
        );
    }
    bench.run("good", STOCK_SHIM, &["sleep", "1000"]).await;
    if is_ours() {
        for exec_id in ["..", "a/b", &"x".repeat(77)] {
            refused(bench.exec("good", exec_id, &["true"]).await, Code::InvalidArgument);
        }
    }
    bench.clear("good").await;
    bench.finish().await;
}
