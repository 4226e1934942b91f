//! The engine stops, or is killed, and starts again: nothing that was acknowledged is lost, and nothing is left.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::containerd::services::tasks::v1::tasks_client::TasksClient;
use proto::containerd::services::tasks::v1::{DeleteTaskRequest, GetRequest, WaitRequest};
use proto::containerd::v1::types::{Process, Status};
use tests::client::{Ctr, channel, in_namespace};
use tests::host::{Host, RUNC, STOCK_CTR};
use tests::image::BUSYBOX;
use tests::{left, ready, wait_for};

const PROGRAMS: [&str; 3] = [STOCK_CTR, RUNC, BUSYBOX];

fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap()
}

async fn tasks(host: &Host) -> TasksClient<tonic::transport::Channel> {
    TasksClient::new(channel(&host.address()).await)
}

async fn get(host: &Host, id: &str) -> Process {
    let request = GetRequest { container_id: id.into(), ..GetRequest::default() };
    tasks(host).await.get(in_namespace(&host.namespace, request)).await.unwrap().into_inner().process.unwrap()
}

fn lines(ctr: &Ctr, arguments: &[&str]) -> BTreeSet<String> {
    let list: Vec<String> =
        ctr.ok(arguments).lines().map(str::to_owned).filter(|line| !line.is_empty()).collect();
    let set: BTreeSet<String> = list.iter().cloned().collect();
    assert_eq!(list.len(), set.len(), "doubled: {list:?}");
    set
}

#[test]
fn a_hundred_containers_survive_a_kill_in_the_middle() {
    if !ready(&PROGRAMS) {
        return;
    }
    const COUNT: usize = 100;
    let mut host = Host::gantry();
    let ctr = host.stock_ctr();
    let image = host.import();
    let acknowledged = Mutex::new(BTreeSet::new());
    let next = AtomicUsize::new(0);
    let start_some = |upto: usize| {
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    loop {
                        let number = next.fetch_add(1, Ordering::SeqCst);
                        if number >= upto {
                            break;
                        }
                        let id = format!("c{number}");
                        if ctr.run(&["run", "-d", image, &id, "sleep", "3600"]).code == 0 {
                            acknowledged.lock().unwrap().insert(id);
                        }
                    }
                });
            }
        });
    };
    // The engine dies while the second half is being started.
    let pid = host.pid();
    std::thread::scope(|scope| {
        scope.spawn(|| start_some(COUNT));
        wait_for("half of the containers", || acknowledged.lock().unwrap().len() >= COUNT / 2);
        kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
    });
    host.kill();
    host.start();

    let acknowledged = acknowledged.into_inner().unwrap();
    assert!(acknowledged.len() >= COUNT / 2 && acknowledged.len() < COUNT, "{}", acknowledged.len());
    let tasks: BTreeSet<String> = lines(&ctr, &["tasks", "ls", "-q"]);
    let containers = lines(&ctr, &["containers", "ls", "-q"]);
    for id in &acknowledged {
        assert!(tasks.contains(id) && containers.contains(id), "{id} was acknowledged and is lost");
    }
    let states = ctr.ok(&["tasks", "ls"]);
    let running: BTreeSet<&str> = states
        .lines()
        .filter(|line| line.contains("RUNNING"))
        .filter_map(|line| line.split_whitespace().next())
        .collect();
    assert!(acknowledged.iter().all(|id| running.contains(id.as_str())), "{states}");
    // Each runs once: as many processes as tasks that have one. A created one's is runc's, waiting for its start.
    let created = states.lines().filter(|line| line.contains("CREATED")).count();
    assert_eq!(count_in_cgroups(&host.namespace), running.len() + created, "{states}");

    // An interrupted one's id is free again, or can be freed.
    for id in containers.union(&tasks) {
        ctr.run(&["tasks", "kill", "-s", "KILL", id]);
        wait_for("the task to be removed", || {
            ctr.run(&["tasks", "rm", "-f", id]);
            !ctr.ok(&["tasks", "ls", "-q"]).lines().any(|line| line == id)
        });
        if containers.contains(id) {
            ctr.ok(&["containers", "rm", id]);
        }
    }
    assert!(lines(&ctr, &["containers", "ls", "-q"]).is_empty());
    // A snapshot without a container is what an interrupted `ctr run` leaves under any engine; it can be removed.
    for line in ctr.ok(&["snapshots", "ls"]).lines().skip(1) {
        let key = line.split_whitespace().next().unwrap();
        if key.starts_with('c') {
            ctr.ok(&["snapshots", "rm", key]);
        }
    }
    host.assert_nothing_left();
    let bundles = host.state().join("io.containerd.runtime.v2.task").join(&host.namespace);
    assert_eq!(
        fs::read_dir(&bundles).map_or(0, Iterator::count),
        0,
        "bundles are left in {}",
        bundles.display()
    );
}

/// Processes in the cgroups of a namespace's containers.
fn count_in_cgroups(namespace: &str) -> usize {
    let mut pids = BTreeSet::new();
    for cgroup in left::cgroups(namespace) {
        let text = fs::read_to_string(cgroup.join("cgroup.procs")).unwrap_or_default();
        pids.extend(text.lines().map(str::to_owned));
    }
    pids.len()
}

#[test]
fn what_exits_meanwhile_is_known_afterwards() {
    if !ready(&PROGRAMS) {
        return;
    }
    let mut host = Host::gantry();
    let ctr = host.stock_ctr();
    let image = host.import();
    let flags = host.folder().join("flags");
    fs::create_dir(&flags).unwrap();
    let mount = format!("type=bind,src={},dst=/flags,options=rbind:rw", flags.display());
    let script = "until [ -e /flags/go ]; do sleep 0.05; done; echo done >/flags/$NAME; exit $CODE";
    for code in 3..6 {
        let (id, name, code) = (format!("c{code}"), format!("NAME=c{code}"), format!("CODE={code}"));
        ctr.ok(&[
            "run", "-d", "--mount", &mount, "--env", &name, "--env", &code, image, &id, "sh", "-c", script,
        ]);
    }
    let stayer = ctr.run(&["run", "-d", image, "stays", "sleep", "3600"]);
    assert_eq!(stayer.code, 0);
    let runtime = runtime();
    let pids: Vec<u32> = runtime.block_on(async {
        let mut pids = Vec::new();
        for code in 3..6 {
            pids.push(get(&host, &format!("c{code}")).await.pid);
        }
        pids
    });
    host.kill();
    fs::write(flags.join("go"), "").unwrap();
    wait_for("the containers to exit", || {
        pids.iter().all(|pid| !std::path::Path::new(&format!("/proc/{pid}")).exists())
    });
    host.start();
    runtime.block_on(async {
        for code in 3..6_u32 {
            let id = format!("c{code}");
            let process = get(&host, &id).await;
            assert_eq!((process.status(), process.exit_status), (Status::Stopped, code), "{id}");
            assert!(process.exited_at.is_some());
            let mut tasks = tasks(&host).await;
            let wait = WaitRequest { container_id: id.clone(), exec_id: String::new() };
            let waited = tasks.wait(in_namespace(&host.namespace, wait)).await.unwrap().into_inner();
            assert_eq!(waited.exit_status, code);
            let delete = DeleteTaskRequest { container_id: id.clone() };
            let deleted = tasks.delete(in_namespace(&host.namespace, delete)).await.unwrap().into_inner();
            assert_eq!(deleted.exit_status, code);
        }
        assert_eq!(get(&host, "stays").await.status(), Status::Running);
    });
    for code in 3..6 {
        ctr.ok(&["containers", "rm", &format!("c{code}")]);
    }
    // What stayed goes on being managed: exec, wait, events.
    assert_eq!(ctr.run(&["tasks", "exec", "--exec-id", "e", "stays", "sh", "-c", "exit 11"]).code, 11);
    let events = ctr.spawn(&["events"]);
    let pid = events.id();
    wait_for("the subscription", || {
        host.log().matches("Subscribe").count() > 0 || host.log().contains("subscrib")
    });
    ctr.ok(&["tasks", "kill", "-s", "KILL", "stays"]);
    runtime.block_on(async {
        let wait = WaitRequest { container_id: "stays".into(), exec_id: String::new() };
        let waited = tasks(&host).await.wait(in_namespace(&host.namespace, wait)).await.unwrap().into_inner();
        assert_eq!(waited.exit_status, 137);
    });
    ctr.run(&["tasks", "rm", "stays"]);
    ctr.ok(&["containers", "rm", "stays"]);
    kill(Pid::from_raw(pid as i32), Signal::SIGTERM).unwrap();
    let seen = tests::client::finish(events, "events").stdout;
    // Those that came before anyone could listen are heard by who comes soon; none twice.
    for (id, least) in [("c3", 0), ("c4", 0), ("c5", 0), ("stays", 1)] {
        let of = |line: &&str| line.contains("/tasks/exit") && line.contains(&format!("\"id\":\"{id}\""));
        let count = seen.lines().filter(of).count();
        assert!((least..=1).contains(&count), "{id}: {count} in {seen}");
    }
    host.assert_nothing_left();
}

#[test]
fn a_dead_shim_is_a_stopped_task() {
    if !ready(&PROGRAMS) {
        return;
    }
    let mut host = Host::gantry();
    let ctr = host.stock_ctr();
    let image = host.import();
    for id in ["while-up", "while-down"] {
        ctr.ok(&["run", "-d", image, id, "sleep", "3600"]);
    }
    let shim = |host: &Host, id: &str| {
        let wanted = format!("-id {id} ");
        let all = left::processes(host.folder());
        let found: Vec<i32> = all
            .into_iter()
            .filter(|(_, command)| format!("{command} ").contains(&wanted))
            .map(|(pid, _)| pid)
            .collect();
        assert_eq!(found.len(), 1, "{id}");
        Pid::from_raw(found[0])
    };
    kill(shim(&host, "while-up"), Signal::SIGKILL).unwrap();
    let gone_or_stopped = |id: &str| {
        let list = ctr.ok(&["tasks", "ls"]);
        list.lines().filter(|line| line.starts_with(id)).all(|line| line.contains("STOPPED"))
    };
    wait_for("the task of the dead shim to stop", || gone_or_stopped("while-up"));
    let dead = shim(&host, "while-down");
    host.kill();
    kill(dead, Signal::SIGKILL).unwrap();
    wait_for("the shim to be gone", || !std::path::Path::new(&format!("/proc/{dead}/cwd")).exists());
    host.start();
    wait_for("the task of the dead shim to stop", || gone_or_stopped("while-down"));
    // The containers can run again, and go.
    for id in ["while-up", "while-down"] {
        ctr.run(&["tasks", "rm", id]);
        ctr.ok(&["tasks", "start", "-d", id]);
        ctr.ok(&["tasks", "kill", "-s", "KILL", id]);
        wait_for("the task to stop", || gone_or_stopped(id));
        ctr.run(&["tasks", "rm", id]);
        ctr.ok(&["containers", "rm", id]);
    }
    host.assert_nothing_left();
}

#[test]
fn a_stop_is_quick_and_leaves_containers_alone() {
    if !ready(&PROGRAMS) {
        return;
    }
    let mut host = Host::gantry();
    let ctr = host.stock_ctr();
    let image = host.import();
    ctr.ok(&["run", "-d", image, "c", "sleep", "3600"]);
    // A waiter and a subscriber must not hold the stop up.
    let subscriber = ctr.spawn(&["events"]);
    let attached = ctr.spawn(&["tasks", "attach", "c"]);
    let status = host.stop();
    assert!(status.success(), "{status}");
    assert!(!host.address().exists(), "the socket is removed");
    for mut client in [subscriber, attached] {
        let _ = client.kill();
        let _ = client.wait();
    }
    host.start();
    assert!(ctr.ok(&["tasks", "ls"]).contains("RUNNING"));
    ctr.ok(&["tasks", "kill", "-s", "KILL", "c"]);
    wait_for("the task to stop", || ctr.ok(&["tasks", "ls"]).contains("STOPPED"));
    ctr.run(&["tasks", "rm", "c"]);
    ctr.ok(&["containers", "rm", "c"]);
    host.assert_nothing_left();
}

#[test]
fn a_reload_changes_the_log_level_and_survives_a_mistake() {
    if !ready(&PROGRAMS) {
        return;
    }
    let mut host = Host::new(tests::host::Kind::Gantry);
    let config = host.folder().join("reload.toml");
    fs::write(&config, "version = 2\n[debug]\nlevel = \"info\"\n").unwrap();
    host.arguments = vec!["--config".into(), config.to_str().unwrap().into()];
    host.start();
    let ctr = host.stock_ctr();
    let reload = |level: &str, more: &str| {
        fs::write(&config, format!("version = 2\n{more}\n[debug]\nlevel = \"{level}\"\n")).unwrap();
        kill(Pid::from_raw(host.pid()), Signal::SIGHUP).unwrap();
    };
    reload("debug", "");
    wait_for("the reload", || host.log().contains("configuration read again"));
    ctr.ok(&["namespaces", "ls"]);
    wait_for("a line of the new level", || host.log().contains("Namespaces/List"));
    reload("info", "oom_score = nonsense");
    wait_for("the refusal", || host.log().contains("configuration not read again"));
    reload("info", "[grpc]\nmax_recv_message_size = 33554432");
    wait_for("the warning", || host.log().contains("at the next start"));
    ctr.ok(&["version"]);
}
