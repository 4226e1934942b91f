//! Pods, by calls as a kubelet makes them.

use std::time::Duration;

use anyhow::Result;
use futures::StreamExt as _;
use harness::cri::{self, Kubelet, Pod};
use tokio::runtime::Runtime;

use super::Bench;
use crate::measure::{Detail, Measure, Sample};
use crate::peers::{Engine, Kind};

/// How many pods are begun at a time.
const AT_A_TIME: usize = 8;

/// A kubelet of an engine that has the images, and what it runs on.
fn kubelet(engine: &Engine) -> Result<(Runtime, Kubelet)> {
    engine.import_for_pods(&harness::image::busybox())?;
    if engine.peer.kind == Kind::Containerd {
        engine.import_for_pods(&cri::pause().0)?;
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let kubelet = runtime.block_on(async {
        let kubelet = Kubelet::new(&engine.address(), &engine.folder, &engine.namespace).await;
        kubelet.serves().await;
        kubelet
    });
    Ok((runtime, kubelet))
}

async fn run(kubelet: &Kubelet, name: &str) -> (Pod, String) {
    let pod = kubelet.run_pod(kubelet.pod(name)).await;
    let container = kubelet.run(&pod, &cri::container("c1", &["sleep", "1000000"])).await;
    (pod, container)
}

pub(super) fn one(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    let (runtime, kubelet) = kubelet(engine)?;
    let (first, count) = if bench.quick { (1, 5) } else { (3, 20) };
    let mut samples = Vec::new();
    for number in 0..first + count {
        let name = format!("p{number}");
        let mut made = None;
        let sample = engine.measure(Detail::Short, |_| {
            made = Some(runtime.block_on(run(&kubelet, &name)));
            Ok(())
        })?;
        if number >= first {
            samples.push(sample);
        }
        if let Some((pod, _)) = made {
            runtime.block_on(kubelet.remove_pod(&pod.id));
        }
    }
    Ok(samples)
}

pub(super) fn many(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    let (runtime, kubelet) = kubelet(engine)?;
    let count = if bench.quick { 8 } else { 50 };
    let mut made = Vec::new();
    let mut sample = engine.measure(Detail::Sampled, |_| {
        let all = futures::stream::iter(0..count).map(|number| {
            let (kubelet, name) = (&kubelet, format!("p{number}"));
            async move { run(kubelet, &name).await.0.id }
        });
        made = runtime.block_on(all.buffer_unordered(AT_A_TIME).collect());
        Ok(())
    })?;
    std::thread::sleep(Duration::from_secs(2));
    sample.values.push((Measure::PssIdle, engine.pss(&made)));
    let all = futures::stream::iter(&made).for_each_concurrent(AT_A_TIME, |pod| kubelet.remove_pod(pod));
    runtime.block_on(all);
    Ok(vec![sample])
}

pub(super) fn exec(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    let (runtime, kubelet) = kubelet(engine)?;
    let (pod, container) = runtime.block_on(run(&kubelet, "p1"));
    let (first, count) = if bench.quick { (1, 10) } else { (5, 60) };
    let mut samples = Vec::new();
    for number in 0..first + count {
        let sample = engine.measure(Detail::Short, |_| {
            let ended = runtime.block_on(kubelet.exec(&container, &["/bin/true"]));
            anyhow::ensure!(ended.code == 0, "{ended:?}");
            Ok(())
        })?;
        if number >= first {
            samples.push(sample);
        }
    }
    runtime.block_on(kubelet.remove_pod(&pod.id));
    Ok(samples)
}
