//! Random clients for a while, and an engine that is killed under them; then nothing is lost and nothing has leaked.
//!
//! ```text
//! 3/5 of the time: clients and kills            what was acknowledged and not taken back is there after each
//! 2/5:             clients alone                memory, descriptors and threads of the engine, at the beginning and at the end
//! then:            all is removed               what there is, to clients and on disk, is what there was at first
//! ```

use std::collections::BTreeSet;
use std::fs;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use harness::client::{Ctr, channel, in_namespace};
use harness::cri::{Kubelet, Node, idle};
use harness::host::{Kind, RUNC, STOCK_CTR};
use harness::image::{self, BUSYBOX};
use harness::network::{IP, IPTABLES, PLUGINS};
use harness::{ready, wait_for};
use proto::containerd::services::leases::v1::CreateRequest;
use proto::containerd::services::leases::v1::leases_client::LeasesClient;

use crate::run::{CASE_MAX, Run};
use crate::{check, state};

/// Between two kills.
const KILL_EVERY: Duration = Duration::from_secs(12);

/// Numbers that look random, the same for the same seed.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// What an engine takes of its machine.
#[derive(Debug, Clone, Copy)]
struct Taken {
    kilobytes: u64,
    descriptors: usize,
    threads: u64,
}

fn taken(pid: i32) -> Taken {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    let number = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).unwrap();
        line.split_whitespace().next().unwrap().parse().unwrap()
    };
    Taken {
        kilobytes: number("VmRSS:"),
        descriptors: fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count(),
        threads: number("Threads:"),
    }
}

/// What all clients share.
struct Shared {
    stop: AtomicBool,
    leases: Mutex<BTreeSet<String>>,
    containers: Mutex<BTreeSet<String>>,
    calls: AtomicU64,
    failed: AtomicU64,
}

impl Shared {
    fn count(&self, well: bool) {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.failed.fetch_add(u64::from(!well), Ordering::Relaxed);
    }
}

/// A client by the command line: containers that run, execs, tags, content.
fn by_ctr(ctr: &Ctr, of: usize, shared: &Shared) {
    let mut numbers = Numbers(of as u64);
    let mut number = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        number += 1;
        let name = format!("k{of}-{number}");
        let ended = match numbers.below(5) {
            0 => ctr.run(&["run", "--rm", image::NAME, &name, "true"]),
            1 => {
                let made = ctr.run(&["run", "-d", image::NAME, &name, "sleep", "3600"]);
                if made.code == 0 {
                    ctr.run(&["tasks", "exec", "--exec-id", "e", &name, "true"]);
                    ctr.run(&["tasks", "rm", "-f", &name]);
                    ctr.run(&["containers", "rm", &name]);
                }
                made
            }
            2 => {
                let made = ctr.run(&["containers", "create", image::NAME, &name, "true"]);
                if made.code == 0 {
                    shared.containers.lock().unwrap().insert(name);
                }
                made
            }
            3 => {
                let one = shared.containers.lock().unwrap().pop_first();
                match one {
                    Some(name) => ctr.run(&["containers", "rm", &name]),
                    None => continue,
                }
            }
            _ => {
                let tag = format!("example.org/soak:{name}");
                let tagged = ctr.run(&["images", "tag", image::NAME, &tag]);
                ctr.run(&["images", "rm", &tag]);
                tagged
            }
        };
        shared.count(ended.code == 0);
    }
}

async fn connect(address: std::path::PathBuf) -> tonic::transport::Channel {
    channel(&address).await
}

/// A client of the API, with a connection for each call.
async fn by_api(address: &std::path::Path, namespace: &str, shared: &Shared) {
    let mut number = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        number += 1;
        if tokio::net::UnixStream::connect(address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(50)).await;
            continue;
        }
        let id = format!("a{number}");
        // The engine may go between the two.
        let Ok(channel) = tokio::spawn(connect(address.to_owned())).await else { continue };
        let mut leases = LeasesClient::new(channel);
        let request = CreateRequest { id: id.clone(), ..CreateRequest::default() };
        let made = leases.create(in_namespace(namespace, request)).await;
        shared.count(made.is_ok());
        if made.is_ok() && number % 10 == 0 {
            shared.leases.lock().unwrap().insert(id);
        } else if made.is_ok() {
            let request = proto::containerd::services::leases::v1::DeleteRequest { id, sync: false };
            let _ = leases.delete(in_namespace(namespace, request)).await;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

/// A kubelet that makes pods and removes them.
async fn by_kubelet(kubelet: &Kubelet, shared: &Shared) {
    let mut number = 0;
    while !shared.stop.load(Ordering::Relaxed) {
        number += 1;
        let config = kubelet.pod(&format!("soak-{number}"));
        let made = async {
            let id = kubelet.try_run_pod(&config).await?;
            let pod = harness::cri::Pod { id, config: config.clone() };
            let container = kubelet.try_create(&pod, &idle("c1")).await?;
            kubelet.try_begin(&container).await?;
            kubelet.try_exec(&container, &["true"], 20).await?;
            kubelet.try_remove_pod(&pod.id).await
        }
        .await;
        shared.count(made.is_ok());
        if made.is_err() {
            tokio::time::sleep(Duration::from_millis(300)).await;
        }
    }
}

/// Looks whether what was acknowledged is there.
fn assert_kept(ctr: &Ctr, shared: &Shared) {
    for (what, names) in [("leases", &shared.leases), ("containers", &shared.containers)] {
        let told = names.lock().unwrap().clone();
        let list = ctr.ok(&[what, "ls", "-q"]);
        let there: BTreeSet<&str> = list.lines().collect();
        // What is taken back has left the set before it is asked for.
        let lost: Vec<_> = told.iter().filter(|name| !there.contains(name.as_str())).collect();
        let still = names.lock().unwrap();
        assert!(
            lost.iter().all(|name| !still.contains(*name)),
            "{what} were acknowledged and are lost: {lost:?}"
        );
    }
}

/// Removes all that interrupted clients have left.
fn remove_all(node: &Node, ctr: &Ctr, runtime: &tokio::runtime::Runtime) {
    let end = Instant::now() + harness::LIMIT;
    runtime.block_on(async {
        while !node.pods().await.is_empty() {
            for (pod, _) in node.pods().await {
                let _ = node.try_remove_pod(&pod).await;
            }
            assert!(Instant::now() < end, "pods cannot be removed: {:?}", node.pods().await);
        }
    });
    wait_for("all tasks to be removed", || {
        for task in ctr.ok(&["tasks", "ls", "-q"]).lines() {
            ctr.run(&["tasks", "rm", "-f", task]);
        }
        ctr.ok(&["tasks", "ls", "-q"]).is_empty()
    });
    for container in ctr.ok(&["containers", "ls", "-q"]).lines() {
        ctr.ok(&["containers", "rm", container]);
    }
    for tag in ctr.ok(&["images", "ls", "-q"]).lines().filter(|name| name.contains("soak")) {
        ctr.ok(&["images", "rm", tag]);
    }
    for line in ctr.ok(&["snapshots", "ls"]).lines().skip(1) {
        let key = line.split_whitespace().next().unwrap();
        if key.starts_with('k') {
            ctr.ok(&["snapshots", "rm", key]);
        }
    }
}

pub(crate) fn all(run: &mut Run, seconds: u64) {
    let name = format!("soak/{seconds}s");
    if !run.wants(&name) {
        return;
    }
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX, IP, IPTABLES, &format!("{PLUGINS}/bridge")]) {
        run.skip(&name, "programs are missing");
        return;
    }
    let time = Duration::from_secs(seconds);
    run.one_within(time + CASE_MAX, &name, move || soak(time));
}

fn soak(time: Duration) {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let mut node = runtime.block_on(Node::start(Kind::Gantry));
    node.host.import();
    let ctr = node.host.ctr();
    let before = state::before(&node.host, &ctr);
    let address = node.host.address();
    let kubelet = runtime.block_on(Kubelet::new(&address, node.host.folder(), &node.host.namespace));
    let shared = Shared {
        stop: AtomicBool::new(false),
        leases: Mutex::default(),
        containers: Mutex::default(),
        calls: AtomicU64::new(0),
        failed: AtomicU64::new(0),
    };
    let begun = Instant::now();
    let mut kills = 0;
    let mut samples = Vec::new();
    std::thread::scope(|scope| {
        // Whatever becomes of the rest, the clients end with it.
        let _stop = Stop(&shared.stop);
        for of in 0..2 {
            let (ctr, shared) = (&ctr, &shared);
            scope.spawn(move || by_ctr(ctr, of, shared));
        }
        scope.spawn(|| runtime.block_on(by_api(&address, &ctr.namespace, &shared)));
        scope.spawn(|| runtime.block_on(by_kubelet(&kubelet, &shared)));
        while begun.elapsed() < time.mul_f32(0.6) {
            std::thread::sleep(KILL_EVERY.min(time / 6));
            runtime.block_on(node.kill_and_start());
            kills += 1;
            assert_kept(&ctr, &shared);
        }
        // By now the engine has done each thing several times.
        std::thread::sleep(time / 10);
        while begun.elapsed() < time {
            samples.push((begun.elapsed().as_secs_f64(), taken(node.host.pid())));
            std::thread::sleep(time / 50);
        }
    });
    assert_kept(&ctr, &shared);
    let (calls, failed) = (shared.calls.load(Ordering::Relaxed), shared.failed.load(Ordering::Relaxed));
    println!("       {calls} calls, {failed} of them failed while the engine was away, {kills} kills");
    shared.leases.lock().unwrap().clear();
    remove_all(&node, &ctr, &runtime);
    node.assert_nothing_left();
    state::assert_back(&node.host, &ctr, &before);
    let (first, last) = (samples.first().unwrap(), samples.last().unwrap());
    let slope = slope(&samples);
    println!("       the engine at first {:?}, at last {:?}, {slope:.0} kB a minute", first.1, last.1);
    // When clients are gone, so are their descriptors; of a loop through everything each takes some for a while.
    assert!(last.1.threads <= first.1.threads + 8, "threads: {samples:?}");
    wait_for("the descriptors of clients that went away to be closed", || {
        taken(node.host.pid()).descriptors <= first.1.descriptors + 8
    });
    if time >= Duration::from_secs(300) {
        assert!(slope < 1024.0, "memory grows by {slope:.0} kB a minute: {samples:?}");
    }
    assert!(last.1.kilobytes < first.1.kilobytes * 3 / 2 + 16 * 1024, "memory: {samples:?}");
    check::check(&mut node.host, false);
    runtime.block_on(node.start_again());
}

/// Stops the clients when it is dropped.
pub(crate) struct Stop<'a>(pub(crate) &'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// How much memory grows, in kB a minute: the line that lies best between the samples.
fn slope(samples: &[(f64, Taken)]) -> f64 {
    let count = samples.len() as f64;
    let mean = |of: &dyn Fn(&(f64, Taken)) -> f64| samples.iter().map(of).sum::<f64>() / count;
    let (time, memory) = (mean(&|sample| sample.0), mean(&|sample| sample.1.kilobytes as f64));
    let above: f64 = samples.iter().map(|(at, taken)| (at - time) * (taken.kilobytes as f64 - memory)).sum();
    let below: f64 = samples.iter().map(|(at, _)| (at - time).powi(2)).sum();
    if below == 0.0 { 0.0 } else { above / below * 60.0 }
}
