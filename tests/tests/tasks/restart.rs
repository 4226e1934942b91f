//! The engine ends while containers run, and comes back.

use std::fs;
use std::os::unix::fs::PermissionsExt as _;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use proto::containerd::v1::types::Status;
use tonic::Code;

use crate::bench::{eventually, is_ours, refused};
use crate::with_each_shim;

with_each_shim! {
    running_containers_stay(bench, shim) {
        for (round, signal) in [Signal::SIGKILL, Signal::SIGTERM].into_iter().enumerate() {
            let pid = bench.run("c", shim, &["sleep", "1000"]).await;
            bench.exec("c", "before", &["sleep", "1000"]).await.unwrap();
            bench.start_process("c", "before").await.unwrap();
            let shims = bench.shim_pids();
            bench.end_engine(signal);
            assert_eq!(bench.shim_pids(), shims);
            bench.start_engine().await;
            assert_eq!(bench.list().await, ["c"]);
            let process = bench.get("c", "").await.unwrap();
            assert_eq!((process.status(), process.pid), (Status::Running, pid));
            assert_eq!(bench.get("c", "before").await.unwrap().status(), Status::Running);
            bench.exec("c", "after", &["sh", "-c", "echo again; exit 4"]).await.unwrap();
            bench.start_process("c", "after").await.unwrap();
            assert_eq!(bench.wait("c", "after").await.unwrap(), 4);
            assert_eq!(bench.delete_exec("c", "after").await.unwrap(), 4);
            bench.kill("c", "before", 9).await.unwrap();
            assert_eq!(bench.wait("c", "before").await.unwrap(), 137);
            bench.delete_exec("c", "before").await.unwrap();
            bench.clear("c").await;
            let exits = bench.topics("c").iter().filter(|topic| *topic == "/tasks/delete").count();
            eventually("the delete is told", || async {
                bench.topics("c").iter().filter(|topic| *topic == "/tasks/delete").count() > round
            })
            .await;
            assert!(exits <= round + 1);
        }
    }

    an_exit_meanwhile_is_not_lost(bench, shim) {
        bench.run("c", shim, &["sh", "-c", "while ! test -e /tmp/go-c; do sleep 0.05; done; exit 5"]).await;
        bench.end_engine(Signal::SIGKILL);
        fs::write(bench.path("rootfs/tmp/go-c"), "").unwrap();
        // The container's only process is gone when its control group is empty.
        eventually("the container exits", || async { !bench.runs("c") }).await;
        bench.start_engine().await;
        assert_eq!(bench.wait("c", "").await.unwrap(), 5);
        let process = bench.get("c", "").await.unwrap();
        assert_eq!((process.status(), process.exit_status), (Status::Stopped, 5));
        if is_ours() {
            // Debian's shim gives an event up after some tries; ours and newer ones keep it.
            if shim != crate::bench::STOCK_SHIM {
                bench.event("c", "/tasks/exit").await;
            }
        }
        assert_eq!(bench.delete("c").await.unwrap(), 5);
        assert!(bench.topics("c").iter().filter(|topic| *topic == "/tasks/exit").count() <= 1);
        bench.remove_container("c").await;
    }

    a_shim_that_died_meanwhile_is_cleaned_up(bench, shim) {
        bench.run("dead", shim, &["sleep", "1000"]).await;
        bench.end_engine(Signal::SIGKILL);
        for pid in bench.shim_pids() {
            kill(Pid::from_raw(pid), Signal::SIGKILL).unwrap();
        }
        eventually("the shim is gone", || async { bench.shim_pids().is_empty() }).await;
        bench.start_engine().await;
        // Removed, or stopped and removable: the container is free either way.
        match bench.get("dead", "").await {
            Ok(process) => {
                assert_eq!(process.status(), Status::Stopped);
                bench.delete("dead").await.unwrap();
            }
            Err(status) => assert_eq!(status.code(), Code::NotFound),
        }
        assert!(!bench.runs("dead"));
        bench.run("alive", shim, &["sleep", "1000"]).await;
        bench.clear("alive").await;
        bench.create("dead").await.unwrap();
        bench.start_process("dead", "").await.unwrap();
        bench.clear("dead").await;
    }

    broken_bundles_keep_nothing_down(bench, shim) {
        bench.run("good", shim, &["sleep", "1000"]).await;
        bench.end_engine(Signal::SIGKILL);
        let bundles = bench.bundles().join(&bench.namespace);
        let of = |name: &str| bundles.join(name);
        // Empty; half made; garbage for a shim's address; a removal that did not end; a file; an address nobody has.
        fs::create_dir(of("empty")).unwrap();
        fs::create_dir_all(of("half/rootfs")).unwrap();
        fs::write(of("half/config.json"), "{").unwrap();
        fs::create_dir(of("garbage")).unwrap();
        fs::write(of("garbage/config.json"), "{}").unwrap();
        fs::write(of("garbage/bootstrap.json"), b"\xff\x00{").unwrap();
        fs::create_dir_all(of(".removed/rootfs")).unwrap();
        fs::create_dir(of("nobody")).unwrap();
        fs::write(of("nobody/config.json"), "{}").unwrap();
        fs::write(of("nobody/address"), "unix:///run/containerd/s/nobody-is-here").unwrap();
        bench.start_engine().await;
        assert_eq!(bench.list().await, ["good"]);
        assert_eq!(bench.status("good").await, Status::Running);
        assert!(!of(".removed").exists());
        bench.clear("good").await;
        for leftover in ["empty", "half", "garbage", "nobody"] {
            // Set aside or removed, an engine that starts again does not stumble either.
            let _ = fs::remove_dir_all(of(leftover));
        }
    }

    a_shim_that_hangs_does_not_hold_up_the_others(bench, shim) {
        bench.run("good", shim, &["sleep", "1000"]).await;
        bench.run("stuck", shim, &["sleep", "1000"]).await;
        let stuck: Vec<i32> = bench.shim_pids().into_iter().filter(|pid| cmdline(*pid).contains("\0stuck\0")).collect();
        assert_eq!(stuck.len(), 1);
        bench.end_engine(Signal::SIGKILL);
        tests::suspend(stuck[0]);
        bench.start_engine().await;
        assert_eq!(bench.status("good").await, Status::Running);
        bench.clear("good").await;
        kill(Pid::from_raw(stuck[0]), Signal::SIGCONT).unwrap();
        if is_ours() {
            // It was only slow: once it answers again it is a task like any other, or it was taken for dead and
            // cleaned up; what it must not be is an error for ever.
            eventually("the slow one is settled", || async {
                match bench.get("stuck", "").await {
                    Ok(process) => process.status() == Status::Running || process.status() == Status::Stopped,
                    Err(status) => status.code() == Code::NotFound,
                }
            })
            .await;
        }
        match bench.status_or_none("stuck").await {
            Some(Status::Running) => bench.clear("stuck").await,
            Some(_) => {
                bench.delete("stuck").await.unwrap();
            }
            None => {}
        }
    }
}

fn cmdline(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default()
}

/// The sockets and folders of a running engine are closed to others, whatever the umask.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn modes() {
    if !crate::bench::ready() {
        return;
    }
    let bench = crate::bench::Bench::start().await;
    for (name, mode) in [("engine.sock", 0o660), ("engine.sock.ttrpc", 0o660)] {
        assert_eq!(fs::metadata(bench.path(name)).unwrap().permissions().mode() & 0o777, mode, "{name}");
    }
    bench.run("c", crate::bench::STOCK_SHIM, &["sleep", "1000"]).await;
    assert_eq!(fs::metadata(bench.bundle("c")).unwrap().permissions().mode() & 0o777, 0o700);
    bench.clear("c").await;
    refused(bench.get("c", "").await, Code::NotFound);
    bench.finish().await;
}
