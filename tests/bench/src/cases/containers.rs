//! Containers by the calls of the API: one, many, and how much they hold while they do nothing.

use std::time::Duration;

use anyhow::{Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use tokio::runtime::Runtime;

use super::Bench;
use super::api::{Api, runtime};
use crate::measure::{Detail, Measure, Sample};
use crate::peers::Engine;

/// How many are begun at a time where they are not measured one by one.
const AT_A_TIME: usize = 8;
/// What one container and its shim may take of memory, with whichever engine, in KiB: so many fewer are made on a small machine.
const NEEDS: u64 = 20 << 10;

fn client(engine: &Engine) -> Result<(Runtime, Api)> {
    let runtime = runtime()?;
    let api = runtime.block_on(Api::with_image(engine))?;
    Ok((runtime, api))
}

/// Ends and removes containers.
async fn remove_all(api: &Api, ids: &[String]) -> Result<()> {
    let remove = |id: &String| {
        let (api, id) = (api.clone(), id.clone());
        async move {
            api.end(&id).await?;
            api.remove(&id).await
        }
    };
    stream::iter(ids).map(remove).buffer_unordered(AT_A_TIME).try_collect::<Vec<()>>().await?;
    Ok(())
}

/// A task created and started, then killed and deleted, again and again.
pub(super) fn task(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    let (runtime, api) = client(engine)?;
    let (first, count) = if bench.quick { (1, 5) } else { (3, 40) };
    let mut samples = Vec::new();
    for number in 0..first + count {
        let id = format!("c{number}");
        let mut mounts = Some(runtime.block_on(api.container(&id))?);
        let start = engine.measure(Detail::Short, |_| {
            runtime.block_on(api.start(&id, mounts.take().unwrap_or_default()))
        })?;
        let end = engine.measure(Detail::Short, |_| runtime.block_on(api.end(&id)))?;
        runtime.block_on(api.remove(&id))?;
        if number >= first {
            let cpu = start.get(Measure::Cpu) + end.get(Measure::Cpu);
            samples.push(Sample::of([
                (Measure::Start, start.get(Measure::Wall)),
                (Measure::End, end.get(Measure::Wall)),
                (Measure::Cpu, cpu),
            ]));
        }
    }
    Ok(samples)
}

/// `true` in a running container, again and again.
pub(super) fn exec(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    let (runtime, api) = client(engine)?;
    runtime.block_on(api.run("c"))?;
    let (first, count) = if bench.quick { (1, 10) } else { (5, 60) };
    let mut samples = Vec::new();
    for number in 0..first + count {
        let exec_id = format!("e{number}");
        let sample = engine.measure(Detail::Short, |_| runtime.block_on(api.exec("c", &exec_id)))?;
        if number >= first {
            samples.push(sample);
        }
    }
    runtime.block_on(remove_all(&api, &["c".to_owned()]))?;
    Ok(samples)
}

pub(super) fn one_by_one(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    many(bench, engine, 1)
}

pub(super) fn eight_at_a_time(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    many(bench, engine, AT_A_TIME)
}

/// Containers made and started, so many at a time: 1, 10 and 100 of them.
fn many(bench: &Bench<'_>, engine: &Engine, at_a_time: usize) -> Result<Vec<Sample>> {
    let (runtime, api) = client(engine)?;
    let sizes: &[usize] = match (bench.quick, at_a_time) {
        (true, _) => &[10],
        (false, 1) => &[1, 10, 100],
        (false, _) => &[10, 100],
    };
    let mut samples = Vec::new();
    // Not counted: the first container finds files that are not in memory.
    let warm = ["warm".to_owned()];
    runtime.block_on(api.run(&warm[0]))?;
    runtime.block_on(remove_all(&api, &warm))?;
    for size in sizes {
        let ids: Vec<String> = (0..*size).map(|number| format!("c{size}-{number}")).collect();
        let sample = engine.measure(Detail::Sampled, |_| {
            let all = stream::iter(&ids).map(|id| api.run(id)).buffer_unordered(at_a_time);
            runtime.block_on(all.try_collect::<Vec<()>>())?;
            Ok(())
        })?;
        let running = runtime.block_on(api.running())?;
        ensure!(running == *size, "{running} of {size} containers run");
        samples.push(sample.at(*size));
        runtime.block_on(remove_all(&api, &ids))?;
    }
    Ok(samples)
}

/// What engine and shims hold beside so many idle containers, what one more costs then, and how long a restart takes.
pub(super) fn idle(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    let (runtime, mut api) = client(engine)?;
    let most = most()?;
    let sizes: &[usize] = if bench.quick { &[0, 10, 30] } else { &[0, 10, 100, 1000] };
    let mut sizes: Vec<usize> = sizes.iter().map(|size| (*size).min(most)).collect();
    sizes.dedup();
    let (mut ids, mut samples): (Vec<String>, Vec<Sample>) = (Vec::new(), Vec::new());
    for size in sizes {
        let new: Vec<String> = (ids.len()..size).map(|number| format!("c{number}")).collect();
        let all = stream::iter(&new).map(|id| api.run(id)).buffer_unordered(AT_A_TIME);
        runtime.block_on(all.try_collect::<Vec<()>>())?;
        ids.extend(new);
        // What a minute would bring: allocators and threads give back what the work needed.
        std::thread::sleep(Duration::from_secs(if bench.quick { 2 } else { 5 }));
        let (engine_holds, shim_holds) = engine.held();
        let engine_measures =
            [Measure::EnginePss, Measure::EngineRss, Measure::EngineThreads, Measure::EngineFiles];
        let mut values: Vec<(Measure, f64)> = engine_measures.into_iter().zip(engine_holds).collect();
        if size > 0 {
            let shim_measures =
                [Measure::ShimPss, Measure::ShimRss, Measure::ShimThreads, Measure::ShimFiles];
            values.extend(shim_measures.into_iter().zip(shim_holds));
        }
        samples.push(Sample::of(values).at(size));
        for number in 0..if bench.quick { 2 } else { 10 } {
            let id = format!("one-more-{size}-{number}");
            let mounts = runtime.block_on(api.container(&id))?;
            let start =
                engine.measure(Detail::Short, |_| runtime.block_on(api.start(&id, mounts.clone())))?;
            let end = engine.measure(Detail::Short, |_| runtime.block_on(api.end(&id)))?;
            runtime.block_on(api.remove(&id))?;
            let values = [(Measure::Start, start.get(Measure::Wall)), (Measure::End, end.get(Measure::Wall))];
            samples.push(Sample::of(values).at(size));
        }
        for _ in 0..if bench.quick { 1 } else { 3 } {
            let took = engine.restart(|| {
                std::os::unix::net::UnixStream::connect(engine.address()).is_ok()
                    && runtime.block_on(async {
                        let again = api.again(engine).await;
                        let running = again.running().await;
                        api = again;
                        running.is_ok_and(|running| running == size)
                    })
            })?;
            samples.push(Sample::of([(Measure::Restart, took.as_secs_f64())]).at(size));
        }
    }
    runtime.block_on(remove_all(&api, &ids))?;
    Ok(samples)
}

/// How many containers the machine holds, by the memory that is free.
fn most() -> Result<usize> {
    let text = std::fs::read_to_string("/proc/meminfo")?;
    let free = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"));
    let free: u64 = free.and_then(|text| text.trim().trim_end_matches(" kB").parse().ok()).unwrap_or(0);
    Ok((free / NEEDS).min(1000) as usize)
}
