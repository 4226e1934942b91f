//! Records and content by the calls of the API: how fast they are made durable, listed, written and read; and events.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context as _, Result, ensure};
use futures::{StreamExt as _, TryStreamExt as _, stream};
use harness::client::{channel, in_namespace};
use proto::containerd::services::content::v1::content_client::ContentClient;
use proto::containerd::services::content::v1::{ReadContentRequest, WriteAction, WriteContentRequest};
use proto::containerd::services::diff::v1::DiffRequest;
use proto::containerd::services::diff::v1::diff_client::DiffClient;
use proto::containerd::services::events::v1::events_client::EventsClient;
use proto::containerd::services::events::v1::{PublishRequest, SubscribeRequest};
use proto::containerd::services::images::v1::images_client::ImagesClient;
use proto::containerd::services::images::v1::{CreateImageRequest, Image, ListImagesRequest};
use proto::containerd::services::snapshots::v1::ViewSnapshotRequest;
use proto::containerd::types::Descriptor;
use tonic::transport::Channel;

use super::Bench;
use super::api::{Api, SNAPSHOTTER, runtime};
use crate::measure::{Detail, Measure, Sample};
use crate::peers::Engine;

/// Bytes in a message of content, as clients send them.
const CHUNK: usize = 1 << 20;
/// The topics of the events that are counted, and of those that only show that a subscriber hears.
const TOPIC: &str = "/bench/event";
const PROBE: &str = "/bench/probe";
/// How long a subscriber may hear nothing before what is missing counts as lost.
const SILENCE: Duration = Duration::from_secs(5);
/// Subscribers on one connection.
const ON_A_CONNECTION: usize = 100;

fn image(name: String) -> CreateImageRequest {
    let target = Descriptor {
        media_type: "application/vnd.oci.image.manifest.v1+json".into(),
        digest: oci::Digest::sha256_of(name.as_bytes()).to_string(),
        size: 7,
        ..Descriptor::default()
    };
    let image = Image { name, target: Some(target), ..Image::default() };
    CreateImageRequest { image: Some(image), ..CreateImageRequest::default() }
}

/// Makes images' records with these numbers, by writers on connections of their own, each one call after the other.
async fn write_images(channels: &[Channel], namespace: &str, name: &str, count: usize) -> Result<()> {
    let writers = channels.iter().enumerate().map(|(writer, channel)| async move {
        let mut images = ImagesClient::new(channel.clone());
        for number in (writer..count).step_by(channels.len()) {
            let request = image(format!("example.org/{name}:{number}"));
            images.create(in_namespace(namespace, request)).await?;
        }
        anyhow::Ok(())
    });
    futures::future::try_join_all(writers).await?;
    Ok(())
}

/// Durable writes of small records, by 1, 8 and 64 writers.
pub(super) fn writes(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    let runtime = runtime()?;
    let mut samples = Vec::new();
    for (writers, count) in [(1, 200), (8, 800), (64, 3200)] {
        let count = if bench.quick { count / 20 } else { count };
        let mut channels = Vec::new();
        for _ in 0..writers {
            channels.push(runtime.block_on(channel(&engine.address())));
        }
        let name = format!("w{writers}");
        runtime.block_on(write_images(&channels, &engine.namespace, &format!("warm{writers}"), writers))?;
        let sample = engine.measure(Detail::Short, |_| {
            runtime.block_on(write_images(&channels, &engine.namespace, &name, count))
        })?;
        let rate = count as f64 / sample.get(Measure::Wall);
        let cpu = sample.get(Measure::CpuEngine);
        samples.push(Sample::of([(Measure::Rate, rate), (Measure::CpuEngine, cpu)]).at(writers));
    }
    Ok(samples)
}

/// The list of all images: 100, 1,000 and 10,000 of them.
pub(super) fn list(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    let runtime = runtime()?;
    let mut channels = Vec::new();
    for _ in 0..32 {
        channels.push(runtime.block_on(channel(&engine.address())));
    }
    let sizes: &[usize] = if bench.quick { &[100] } else { &[100, 1000, 10_000] };
    let (mut samples, mut made) = (Vec::new(), 0);
    for size in sizes {
        let more = size - made;
        runtime.block_on(write_images(&channels, &engine.namespace, &format!("l{size}"), more))?;
        made = *size;
        let mut images = ImagesClient::new(channels[0].clone()).max_decoding_message_size(256 << 20);
        for _ in 0..if bench.quick { 3 } else { 20 } {
            let sample = engine.measure(Detail::Short, |_| {
                let request = in_namespace(&engine.namespace, ListImagesRequest::default());
                let listed = runtime.block_on(images.list(request))?.into_inner().images.len();
                ensure!(listed == *size, "{listed} of {size} images are listed");
                Ok(())
            })?;
            samples.push(sample.at(*size));
        }
    }
    Ok(samples)
}

/// Blobs that differ in their first bytes and compress badly.
fn blob(size: usize, number: u64) -> Vec<u8> {
    let mut state = number.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(size + 8);
    while bytes.len() < size {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.to_le_bytes());
    }
    bytes.truncate(size);
    bytes
}

async fn write_blob(channel: &Channel, namespace: &str, name: &str, bytes: &[u8]) -> Result<String> {
    let total = bytes.len() as i64;
    let mut offset = 0;
    let mut messages: Vec<WriteContentRequest> = Vec::new();
    for part in bytes.chunks(CHUNK) {
        messages.push(WriteContentRequest {
            action: WriteAction::Write.into(),
            r#ref: name.to_owned(),
            total,
            offset,
            data: part.to_vec().into(),
            ..WriteContentRequest::default()
        });
        offset += part.len() as i64;
    }
    messages.push(WriteContentRequest {
        action: WriteAction::Commit.into(),
        r#ref: name.to_owned(),
        total,
        offset,
        // Nothing else holds it, and a collection may come before it is read.
        labels: [("containerd.io/gc.root".to_owned(), "bench".to_owned())].into(),
        ..WriteContentRequest::default()
    });
    let request = in_namespace(namespace, stream::iter(messages));
    let mut answers = ContentClient::new(channel.clone()).write(request).await?.into_inner();
    let mut digest = String::new();
    while let Some(answer) = answers.message().await? {
        ensure!(answer.offset <= total, "{} of {total} bytes were written", answer.offset);
        digest = answer.digest;
    }
    Ok(digest)
}

/// Blobs of 1, 10 and 100 MB, written until they are on disk; the rates.
pub(super) fn content_write(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    content(bench, engine, true)
}

/// The same blobs, read.
pub(super) fn content_read(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    content(bench, engine, false)
}

fn content(bench: &Bench<'_>, engine: &Engine, write: bool) -> Result<Vec<Sample>> {
    let runtime = runtime()?;
    let connected = runtime.block_on(channel(&engine.address()));
    let sizes: &[usize] = if bench.quick { &[1, 10] } else { &[1, 10, 100] };
    let (mut samples, mut number) = (Vec::new(), 0);
    for size in sizes {
        for _ in 0..if bench.quick { 1 } else { 5 } {
            number += 1;
            let bytes = blob(size * 1_000_000, number);
            let name = format!("blob-{number}");
            let mut digest = String::new();
            let written = engine.measure(Detail::Short, |_| {
                digest = runtime.block_on(write_blob(&connected, &engine.namespace, &name, &bytes))?;
                Ok(())
            })?;
            let expected = oci::Digest::sha256_of(&bytes).to_string();
            ensure!(digest == expected, "{digest} was written, expected {expected}");
            let sample = if write {
                written
            } else {
                engine.measure(Detail::Short, |_| {
                    let read = runtime.block_on(read_blob(&connected, &engine.namespace, &digest))?;
                    ensure!(read == bytes.len(), "{read} of {} bytes were read", bytes.len());
                    Ok(())
                })?
            };
            let throughput = bytes.len() as f64 / 1e6 / sample.get(Measure::Wall);
            let cpu = [Measure::Cpu, Measure::CpuEngine].map(|measure| (measure, sample.get(measure)));
            let values = [(Measure::Throughput, throughput), cpu[0], cpu[1]];
            samples.push(Sample::of(values).at(*size));
        }
    }
    Ok(samples)
}

async fn read_blob(channel: &Channel, namespace: &str, digest: &str) -> Result<usize> {
    let request = ReadContentRequest { digest: digest.to_owned(), ..ReadContentRequest::default() };
    let mut content = ContentClient::new(channel.clone()).max_decoding_message_size(64 << 20);
    let mut parts = content.read(in_namespace(namespace, request)).await?.into_inner();
    let mut read = 0;
    while let Some(part) = parts.message().await? {
        read += part.data.len();
    }
    Ok(read)
}

/// What a container has changed, as a layer: 10, 100 and 1,000 files of 16 KiB.
pub(super) fn commit(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    let runtime = runtime()?;
    let api = runtime.block_on(Api::with_image(engine))?;
    let below = runtime.block_on(async {
        let request = ViewSnapshotRequest {
            snapshotter: SNAPSHOTTER.into(),
            key: "below".into(),
            parent: api.top.clone(),
            ..ViewSnapshotRequest::default()
        };
        anyhow::Ok(api.snapshots().view(api.request(request)).await?.into_inner().mounts)
    })?;
    let sizes: &[usize] = if bench.quick { &[10] } else { &[10, 100, 1000] };
    let mut samples = Vec::new();
    for size in sizes {
        let key = format!("changed-{size}");
        let mounts = runtime.block_on(api.prepare(&key))?;
        let upper = mounts.iter().flat_map(|mount| &mount.options);
        let upper = upper.filter_map(|option| option.strip_prefix("upperdir=")).next();
        // Nothing has it mounted, so that files may be put there.
        let upper = std::path::Path::new(upper.context("the snapshot is no overlay")?);
        for number in 0..*size {
            std::fs::write(upper.join(format!("file-{number}")), blob(16 << 10, number as u64))?;
        }
        for number in 0..if bench.quick { 1 } else { 5 } {
            let request = DiffRequest {
                left: below.clone(),
                right: mounts.clone(),
                media_type: "application/vnd.oci.image.layer.v1.tar+gzip".into(),
                r#ref: format!("layer-{size}-{number}"),
                ..DiffRequest::default()
            };
            let sample = engine.measure(Detail::Short, |_| {
                let mut differ = DiffClient::new(api.channel.clone());
                let layer = runtime
                    .block_on(differ.diff(api.request(request)))?
                    .into_inner()
                    .diff
                    .context("no layer")?;
                ensure!(layer.size > (*size as i64) << 13, "a layer of {} bytes", layer.size);
                Ok(())
            })?;
            samples.push(sample.at(*size));
        }
    }
    Ok(samples)
}

/// Events to 1, 10 and 1,000 subscribers.
pub(super) fn events(bench: &Bench<'_>, engine: &Engine) -> Result<Vec<Sample>> {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let sizes: &[(usize, usize)] =
        if bench.quick { &[(1, 20), (10, 20)] } else { &[(1, 500), (10, 500), (1000, 200)] };
    let mut samples = Vec::new();
    for (subscribers, count) in sizes {
        let heard = runtime.block_on(subscribe(engine, *subscribers))?;
        let mut lost = 0;
        let mut deliveries = Duration::ZERO;
        let sample = engine.measure(Detail::Short, |_| {
            let began = Instant::now();
            runtime.block_on(publish(engine, TOPIC, *count))?;
            let expected = subscribers * count;
            lost = runtime.block_on(heard.all(expected));
            deliveries = began.elapsed();
            Ok(())
        })?;
        drop(heard);
        let rate = (subscribers * count - lost) as f64 / deliveries.as_secs_f64();
        let cpu = sample.get(Measure::CpuEngine);
        let values = [(Measure::Rate, rate), (Measure::Lost, lost as f64), (Measure::CpuEngine, cpu)];
        samples.push(Sample::of(values).at(*subscribers));
    }
    Ok(samples)
}

/// Subscribers that count what they hear, until this is dropped.
struct Heard {
    count: Arc<AtomicUsize>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Heard {
    /// Waits for so many events; how many did not come.
    async fn all(&self, expected: usize) -> usize {
        let (mut last, mut since) = (0, Instant::now());
        loop {
            let heard = self.count.load(Ordering::Relaxed);
            if heard >= expected {
                return 0;
            }
            if heard > last {
                (last, since) = (heard, Instant::now());
            }
            if since.elapsed() > SILENCE {
                return expected - heard;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

impl Drop for Heard {
    fn drop(&mut self) {
        for task in &self.tasks {
            task.abort();
        }
    }
}

/// Subscribes so many times, and waits until each has heard a first event.
async fn subscribe(engine: &Engine, subscribers: usize) -> Result<Heard> {
    let (count, ready) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    let mut channels = Vec::new();
    for _ in 0..subscribers.div_ceil(ON_A_CONNECTION) {
        channels.push(channel(&engine.address()).await);
    }
    let mut tasks = Vec::new();
    for number in 0..subscribers {
        let mut client = EventsClient::new(channels[number / ON_A_CONNECTION].clone());
        let (count, ready) = (count.clone(), ready.clone());
        tasks.push(tokio::spawn(async move {
            // containerd answers with the first event, and not before.
            let subscribed = client.subscribe(SubscribeRequest { filters: Vec::new() }).await;
            let Ok(mut stream) = subscribed.map(tonic::Response::into_inner) else { return };
            let mut heard_one = false;
            while let Ok(Some(event)) = stream.message().await {
                if event.topic == TOPIC {
                    count.fetch_add(1, Ordering::Relaxed);
                } else if event.topic == PROBE && !heard_one {
                    heard_one = true;
                    ready.fetch_add(1, Ordering::Relaxed);
                }
            }
        }));
    }
    let heard = Heard { count, tasks };
    let end = Instant::now() + Duration::from_secs(60);
    while ready.load(Ordering::Relaxed) < subscribers {
        publish(engine, PROBE, 1).await?;
        let ready = ready.load(Ordering::Relaxed);
        ensure!(Instant::now() < end, "{ready} of {subscribers} subscribers hear anything");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    Ok(heard)
}

async fn publish(engine: &Engine, topic: &str, count: usize) -> Result<()> {
    let client = EventsClient::new(channel(&engine.address()).await);
    let all = stream::iter(0..count).map(|number| {
        let mut client = client.clone();
        let event = proto::containerd::events::TaskOom { container_id: format!("c{number}") };
        let request = PublishRequest { topic: topic.to_owned(), event: Some(proto::any::pack(&event)) };
        let request = in_namespace(&engine.namespace, request);
        async move { client.publish(request).await }
    });
    all.buffered(8).try_collect::<Vec<_>>().await?;
    Ok(())
}
