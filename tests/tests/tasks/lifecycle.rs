//! A container's life as its client sees it.

use proto::containerd::services::tasks::v1 as api;
use proto::containerd::v1::types::Status;
use tonic::Code;

use crate::bench::{Bench, eventually, refused};
use crate::with_each_shim;

with_each_shim! {
    run_wait_delete(bench, shim) {
        let spec = bench.spec("c", &["sh", "-c", "echo hello; exit 7"]);
        bench.container("c", shim, &spec).await;
        let pid = bench.create("c").await.unwrap();
        assert!(pid > 1);
        assert_eq!(bench.status("c").await, Status::Created);
        // What is in the bundle is the client's spec, byte for byte.
        assert_eq!(std::fs::read_to_string(bench.bundle("c").join("config.json")).unwrap(), spec.to_string());
        assert_eq!(bench.start_process("c", "").await.unwrap(), pid);
        assert_eq!(bench.wait("c", "").await.unwrap(), 7);
        assert_eq!(bench.output("c"), "hello\n");
        let process = bench.get("c", "").await.unwrap();
        assert_eq!((process.status(), process.exit_status, process.pid), (Status::Stopped, 7, pid));
        // A late waiter gets the same answer.
        assert_eq!(bench.wait("c", "").await.unwrap(), 7);
        assert_eq!(bench.delete("c").await.unwrap(), 7);
        bench.event("c", "/tasks/delete").await;
        assert_eq!(
            bench.task_events("c"),
            [("/tasks/create", 0), ("/tasks/start", 0), ("/tasks/exit", 7), ("/tasks/delete", 7)]
                .map(|(topic, status)| (topic.to_owned(), status))
        );
        refused(bench.get("c", "").await, Code::NotFound);
        refused(bench.delete("c").await, Code::NotFound);
        // The container is still there and runs again.
        bench.create("c").await.unwrap();
        bench.start_process("c", "").await.unwrap();
        assert_eq!(bench.wait("c", "").await.unwrap(), 7);
        assert_eq!(bench.delete("c").await.unwrap(), 7);
        bench.remove_container("c").await;
    }

    hooks_after_the_start_and_after_the_end(bench, shim) {
        let hook = |name: &str, script: String| {
            serde_json::json!([{"path": "/bin/sh", "args": ["sh", "-c", script, name]}])
        };
        let mut spec = bench.spec("c", &["sleep", "1000"]);
        let started = bench.path("started");
        let stopped = bench.path("stopped");
        spec["hooks"] = serde_json::json!({
            "poststart": hook("poststart", format!("cat > {}", started.display())),
            // The root file system is there until the last hook has ended.
            "poststop": hook("poststop", format!("ls {}/rootfs/bin > {}", bench.bundle("c").display(), stopped.display())),
        });
        bench.container("c", shim, &spec).await;
        bench.create("c").await.unwrap();
        bench.start_process("c", "").await.unwrap();
        assert!(std::fs::read_to_string(started).unwrap().contains(r#""id":"c""#));
        bench.kill("c", "", 9).await.unwrap();
        assert_eq!(bench.wait("c", "").await.unwrap(), 137);
        assert!(!stopped.exists());
        assert_eq!(bench.delete("c").await.unwrap(), 137);
        assert!(std::fs::read_to_string(stopped).unwrap().contains("busybox"));
        bench.remove_container("c").await;
    }

    a_created_container_that_is_killed_does_not_start(bench, shim) {
        let spec = bench.spec("c", &["sleep", "1000"]);
        bench.container("c", shim, &spec).await;
        bench.create("c").await.unwrap();
        bench.kill("c", "", 9).await.unwrap();
        assert_eq!(bench.wait("c", "").await.unwrap(), 137);
        assert!(bench.start_process("c", "").await.is_err());
        assert_eq!(bench.delete("c").await.unwrap(), 137);
        bench.remove_container("c").await;
    }

    exec_in_a_running_container(bench, shim) {
        let pid = bench.run("c", shim, &["sleep", "1000"]).await;
        bench.exec("c", "e1", &["sh", "-c", "echo inside; exit 3"]).await.unwrap();
        refused(bench.exec("c", "e1", &["true"]).await, Code::AlreadyExists);
        assert_eq!(bench.get("c", "e1").await.unwrap().status(), Status::Created);
        let exec_pid = bench.start_process("c", "e1").await.unwrap();
        assert_ne!(exec_pid, pid);
        assert_eq!(bench.wait("c", "e1").await.unwrap(), 3);
        assert_eq!(bench.output("c.e1"), "inside\n");
        assert_eq!(bench.delete_exec("c", "e1").await.unwrap(), 3);
        refused(bench.get("c", "e1").await, Code::NotFound);
        refused(bench.delete_exec("c", "e1").await, Code::NotFound);
        // A killed exec does not touch the init.
        bench.exec("c", "e2", &["sleep", "1000"]).await.unwrap();
        bench.start_process("c", "e2").await.unwrap();
        bench.kill("c", "e2", 9).await.unwrap();
        assert_eq!(bench.wait("c", "e2").await.unwrap(), 137);
        assert_eq!(bench.delete_exec("c", "e2").await.unwrap(), 137);
        assert_eq!(bench.status("c").await, Status::Running);
        bench.event("c", "/tasks/exec-started").await;
        bench.clear("c").await;
    }

    codes_that_clients_branch_on(bench, shim) {
        refused(bench.get("none", "").await, Code::NotFound);
        refused(bench.start_process("none", "").await, Code::NotFound);
        refused(bench.wait("none", "").await, Code::NotFound);
        refused(bench.kill("none", "", 9).await, Code::NotFound);
        refused(bench.delete("none").await, Code::NotFound);
        refused(bench.create("none").await, Code::NotFound);
        bench.run("c", shim, &["sleep", "1000"]).await;
        refused(bench.create("c").await, Code::AlreadyExists);
        // The stock shim gives this no class; clients look before they delete.
        let refusal = bench.delete("c").await.expect_err("it runs");
        assert!(shim == crate::bench::STOCK_SHIM || refusal.code() == Code::FailedPrecondition, "{refusal}");
        refused(bench.kill("c", "nothing", 9).await, Code::NotFound);
        refused(bench.wait("c", "nothing").await, Code::NotFound);
        // A second start has no class in containerd.
        assert!(bench.start_process("c", "").await.is_err());
        assert_eq!(bench.list().await, ["c"]);
        bench.kill("c", "", 9).await.unwrap();
        assert_eq!(bench.wait("c", "").await.unwrap(), 137);
        refused(bench.kill("c", "", 9).await, Code::NotFound);
        assert_eq!(bench.delete("c").await.unwrap(), 137);
        assert!(bench.list().await.is_empty());
        bench.remove_container("c").await;
    }

    pause_pids_metrics_update(bench, shim) {
        let pid = bench.run("c", shim, &["sleep", "1000"]).await;
        let mut tasks = bench.tasks();
        let id = || "c".to_owned();
        let pids = tasks.list_pids(bench.request(api::ListPidsRequest { container_id: id() })).await.unwrap();
        assert_eq!(pids.into_inner().processes.iter().map(|p| p.pid).collect::<Vec<_>>(), [pid]);
        tasks.pause(bench.request(api::PauseTaskRequest { container_id: id() })).await.unwrap();
        assert_eq!(bench.status("c").await, Status::Paused);
        tasks.resume(bench.request(api::ResumeTaskRequest { container_id: id() })).await.unwrap();
        assert_eq!(bench.status("c").await, Status::Running);
        let metrics = tasks.metrics(bench.request(api::MetricsRequest { filters: vec!["id==c".into()] })).await;
        let metrics = metrics.unwrap().into_inner().metrics;
        assert_eq!(metrics.iter().map(|metric| metric.id.as_str()).collect::<Vec<_>>(), ["c"]);
        assert!(metrics[0].data.as_ref().unwrap().type_url.starts_with("io.containerd.cgroups."));
        let none = tasks.metrics(bench.request(api::MetricsRequest { filters: vec!["id==other".into()] })).await;
        assert!(none.unwrap().into_inner().metrics.is_empty());
        let resources = proto::any::wrap(proto::any::LINUX_RESOURCES, br#"{"memory":{"limit":67108864}}"#.to_vec());
        let update = api::UpdateTaskRequest { container_id: id(), resources: Some(resources), ..Default::default() };
        tasks.update(bench.request(update)).await.unwrap();
        bench.clear("c").await;
        assert_eq!(
            bench.topics("c").iter().filter(|topic| topic.contains("pause") || topic.contains("resume")).count(),
            2
        );
    }

    many_waiters_and_those_who_leave(bench, shim) {
        bench.run("c", shim, &["sleep", "1000"]).await;
        let waiting = || {
            let mut tasks = bench.tasks();
            let request = bench.request(api::WaitRequest { container_id: "c".into(), exec_id: String::new() });
            tokio::spawn(async move { tasks.wait(request).await.map(|answer| answer.into_inner().exit_status) })
        };
        let left: Vec<_> = (0..50).map(|_| waiting()).collect();
        let stay: Vec<_> = (0..50).map(|_| waiting()).collect();
        // Others are served while a hundred wait.
        assert_eq!(bench.status("c").await, Status::Running);
        left.iter().for_each(|waiter| waiter.abort());
        bench.kill("c", "", 15).await.unwrap();
        bench.kill("c", "", 9).await.unwrap();
        for waiter in stay {
            assert_eq!(waiter.await.unwrap().unwrap(), 137);
        }
        assert_eq!(bench.delete("c").await.unwrap(), 137);
        bench.remove_container("c").await;
    }

    many_at_once(bench, shim) {
        let ids: Vec<String> = (0..8).map(|number| format!("c{number}")).collect();
        let running = ids.iter().map(|id| bench.run(id, shim, &["sleep", "1000"]));
        let pids = futures_join(running).await;
        assert_eq!(pids.len(), 8);
        assert_eq!(bench.list().await, ids);
        futures_join(ids.iter().map(|id| bench.clear(id))).await;
        assert!(bench.list().await.is_empty());
    }

    tasks_of_another_namespace_are_not_seen(bench, shim) {
        bench.run("c", shim, &["sleep", "1000"]).await;
        let mut request = bench.request(api::GetRequest { container_id: "c".into(), exec_id: String::new() });
        request.metadata_mut().insert("containerd-namespace", "another".parse().unwrap());
        refused(bench.tasks().get(request).await, Code::NotFound);
        let mut request = bench.request(api::ListTasksRequest::default());
        request.metadata_mut().insert("containerd-namespace", "another".parse().unwrap());
        assert!(bench.tasks().list(request).await.unwrap().into_inner().tasks.is_empty());
        let mut request = bench.request(api::ListTasksRequest::default());
        request.metadata_mut().remove("containerd-namespace");
        refused(bench.tasks().list(request).await, Code::FailedPrecondition);
        bench.clear("c").await;
    }

    containers_of_one_group_share_a_shim(bench, shim) {
        for id in ["pod", "side"] {
            let mut spec = bench.spec(id, &["sleep", "1000"]);
            spec["annotations"] = serde_json::json!({"io.containerd.runc.v2.group": bench.namespace.clone()});
            bench.container(id, shim, &spec).await;
            bench.create(id).await.unwrap();
            bench.start_process(id, "").await.unwrap();
        }
        assert_eq!(bench.shim_pids().len(), 1);
        bench.clear("side").await;
        assert_eq!(bench.status("pod").await, Status::Running);
        eventually("one shim is left", || async { bench.shim_pids().len() == 1 }).await;
        bench.clear("pod").await;
    }
}

/// All of them, at once.
async fn futures_join<T, F: Future<Output = T>>(all: impl Iterator<Item = F>) -> Vec<T> {
    let mut all: Vec<_> = all.map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|context| {
        for (future, done) in &mut all {
            if done.is_none()
                && let std::task::Poll::Ready(value) = future.as_mut().poll(context)
            {
                *done = Some(value);
            }
        }
        if all.iter().all(|(_, done)| done.is_some()) {
            std::task::Poll::Ready(())
        } else {
            std::task::Poll::Pending
        }
    })
    .await;
    all.into_iter().filter_map(|(_, done)| done).collect()
}

/// Shims may speak gRPC instead of ttrpc; all else is the same.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_shim_that_speaks_grpc() {
    if !crate::bench::ready() {
        return;
    }
    let mut bench = Bench::start().await;
    let shim = tests::binary("containerd-shim-grpc-v2").display().to_string();
    bench.run("c", &shim, &["sh", "-c", "echo out; exec sleep 1000"]).await;
    assert_eq!(bench.status("c").await, Status::Running);
    bench.exec("c", "e", &["sh", "-c", "echo of exec; exit 3"]).await.unwrap();
    bench.start_process("c", "e").await.unwrap();
    assert_eq!(bench.wait("c", "e").await.unwrap(), 3);
    assert_eq!(bench.delete_exec("c", "e").await.unwrap(), 3);
    refused(bench.start_process("c", "none").await, Code::NotFound);
    bench.end_engine(nix::sys::signal::Signal::SIGKILL);
    bench.start_engine().await;
    assert_eq!(bench.status("c").await, Status::Running);
    bench.clear("c").await;
    // When the shim dies, so does the way to it, and the task is cleaned up after.
    bench.run("d", &shim, &["sleep", "1000"]).await;
    for pid in bench.shim_pids() {
        nix::sys::signal::kill(nix::unistd::Pid::from_raw(pid), nix::sys::signal::Signal::SIGKILL).unwrap();
    }
    assert_eq!(bench.wait("d", "").await.unwrap(), 137);
    bench.delete("d").await.unwrap();
    bench.remove_container("d").await;
    bench.finish().await;
}
