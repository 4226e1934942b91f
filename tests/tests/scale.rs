//! Many records: lists take time in proportion, and a collection of ten thousand blobs holds up neither readers nor writers.
//!
//! Ratios alone are asserted, with room for a busy machine; what was measured is printed.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt as _};
use proto::containerd::services::containers::v1::container::Runtime;
use proto::containerd::services::containers::v1::containers_client::ContainersClient;
use proto::containerd::services::containers::v1::{Container, CreateContainerRequest, ListContainersRequest};
use proto::containerd::services::content::v1::content_client::ContentClient;
use proto::containerd::services::content::v1::{InfoRequest, WriteAction, WriteContentRequest};
use proto::containerd::services::images::v1::images_client::ImagesClient;
use proto::containerd::services::images::v1::{
    CreateImageRequest, GetImageRequest, Image, ListImagesRequest,
};
use proto::containerd::services::leases::v1::leases_client::LeasesClient;
use proto::containerd::services::leases::v1::{CreateRequest, DeleteRequest, ListRequest};
use proto::containerd::types::Descriptor;
use tests::client::{channel, in_namespace};
use tests::host::{Host, Kind, RUNC, STOCK_CTR};
use tests::ready;
use tonic::transport::Channel;

const FEW: usize = 1_000;
const MANY: usize = 10_000;
/// How many calls are under way at once, so that commits are made together.
const AT_ONCE: usize = 64;
/// Larger than any list here.
const MESSAGE_MAX: usize = 64 << 20;
/// Between two calls of one reader or writer: they are to see how long a call takes, and not to load the machine.
const PAUSE: Duration = Duration::from_millis(2);
/// One measurement at a time.
static ALONE: Mutex<()> = Mutex::new(());

/// gantryd without its log of every call, which is a cost of its own.
fn quiet() -> Option<Host> {
    if !ready(&[STOCK_CTR, RUNC]) {
        return None;
    }
    let mut host = Host::new(Kind::Gantry);
    let config = host.folder().join("config.toml");
    std::fs::write(&config, "version = 3\n[debug]\nlevel = 'info'\n").unwrap();
    host.arguments = vec!["--config".into(), config.to_str().unwrap().into()];
    host.start();
    Some(host)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

fn image(name: String) -> CreateImageRequest {
    let target = Descriptor {
        media_type: "application/vnd.oci.image.manifest.v1+json".into(),
        digest: oci::Digest::sha256_of(name.as_bytes()).to_string(),
        size: 7,
        ..Descriptor::default()
    };
    let labels = [("made-by".to_owned(), "scale".to_owned())].into();
    let image = Image { name, labels, target: Some(target), ..Image::default() };
    CreateImageRequest { image: Some(image), ..CreateImageRequest::default() }
}

fn container(number: usize) -> CreateContainerRequest {
    let container = Container {
        id: format!("container-{number}"),
        image: format!("example.org/image:{number}"),
        runtime: Some(Runtime { name: "io.containerd.runc.v2".into(), options: None }),
        // A list has to fit into one message, of 16 MiB; ListStream is for those that do not.
        spec: Some(proto::any::wrap(proto::any::SPEC, vec![b' '; 512])),
        ..Container::default()
    };
    CreateContainerRequest { container: Some(container) }
}

/// The records of three kinds with these numbers.
async fn create(channels: &[Channel], namespace: &str, numbers: Range<usize>) {
    let calls = numbers.flat_map(|number| (0..3).map(move |kind| (number, kind)));
    stream::iter(calls)
        .for_each_concurrent(AT_ONCE, |(number, kind)| async move {
            let channel = channels[number % channels.len()].clone();
            match kind {
                0 => {
                    let request = image(format!("example.org/image:{number}"));
                    ImagesClient::new(channel).create(in_namespace(namespace, request)).await.map(|_| ())
                }
                1 => {
                    let request = container(number);
                    ContainersClient::new(channel).create(in_namespace(namespace, request)).await.map(|_| ())
                }
                _ => {
                    let request = CreateRequest { id: format!("lease-{number}"), ..CreateRequest::default() };
                    LeasesClient::new(channel).create(in_namespace(namespace, request)).await.map(|_| ())
                }
            }
            .unwrap();
        })
        .await;
}

/// How long the lists of images, containers and leases take: the medians of several.
async fn lists(channel: &Channel, namespace: &str, count: usize) -> [Duration; 3] {
    let mut images = ImagesClient::new(channel.clone()).max_decoding_message_size(MESSAGE_MAX);
    let mut containers = ContainersClient::new(channel.clone()).max_decoding_message_size(MESSAGE_MAX);
    let mut leases = LeasesClient::new(channel.clone()).max_decoding_message_size(MESSAGE_MAX);
    let mut took = [const { Vec::new() }; 3];
    for _ in 0..9 {
        let begun = Instant::now();
        let list = images.list(in_namespace(namespace, ListImagesRequest::default())).await.unwrap();
        assert_eq!(list.into_inner().images.len(), count);
        took[0].push(begun.elapsed());
        let begun = Instant::now();
        let list = containers.list(in_namespace(namespace, ListContainersRequest::default())).await.unwrap();
        assert_eq!(list.into_inner().containers.len(), count);
        took[1].push(begun.elapsed());
        let begun = Instant::now();
        let list = leases.list(in_namespace(namespace, ListRequest::default())).await.unwrap();
        assert_eq!(list.into_inner().leases.len(), count);
        took[2].push(begun.elapsed());
    }
    took.map(|mut took| {
        took.sort_unstable();
        took[took.len() / 2]
    })
}

#[test]
fn lists_take_time_in_proportion_to_what_they_list() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(host) = quiet() else { return };
    let namespace = host.namespace.as_str();
    block_on(async {
        let mut channels = Vec::new();
        for _ in 0..4 {
            channels.push(channel(&host.address()).await);
        }
        create(&channels, namespace, 0..FEW).await;
        let few = lists(&channels[0], namespace, FEW).await;
        let begun = Instant::now();
        create(&channels, namespace, FEW..MANY).await;
        println!("{} records made in {:?}", 3 * (MANY - FEW), begun.elapsed());
        let many = lists(&channels[0], namespace, MANY).await;
        for (what, (few, many)) in ["images", "containers", "leases"].iter().zip(few.iter().zip(&many)) {
            let ratio = many.as_secs_f64() / few.as_secs_f64();
            let tenfold = ratio / 10.0;
            println!("{what}: {few:?} for {FEW}, {many:?} for {MANY}: {tenfold:.2} of ten times as long");
            assert!(tenfold < 4.0, "listing {MANY} {what} took {many:?}, {ratio:.1} times {FEW}'s {few:?}");
        }
    });
    host.assert_nothing_left();
}

async fn write(channel: Channel, namespace: &str, lease: Option<&str>, number: usize) -> String {
    let data = format!("blob {number}").into_bytes();
    let request = WriteContentRequest {
        action: WriteAction::Commit.into(),
        r#ref: format!("ref-{number}"),
        total: i64::try_from(data.len()).unwrap(),
        data: data.into(),
        ..WriteContentRequest::default()
    };
    let mut request = in_namespace(namespace, stream::iter([request]));
    if let Some(lease) = lease {
        request.metadata_mut().insert("containerd-lease", lease.parse().unwrap());
    }
    let mut answers = ContentClient::new(channel).write(request).await.unwrap().into_inner();
    let mut digest = String::new();
    while let Some(answer) = answers.message().await.unwrap() {
        digest = answer.digest;
    }
    digest
}

/// Reads until told to stop, one call after the other; how long each took.
async fn read(
    channel: Channel,
    namespace: String,
    digest: String,
    image: String,
    stop: Arc<AtomicBool>,
) -> Vec<Duration> {
    let (mut content, mut images) = (ContentClient::new(channel.clone()), ImagesClient::new(channel));
    let mut took = Vec::new();
    while !stop.load(Ordering::Relaxed) {
        let begun = Instant::now();
        content.info(in_namespace(&namespace, InfoRequest { digest: digest.clone() })).await.unwrap();
        took.push(begun.elapsed());
        let begun = Instant::now();
        images.get(in_namespace(&namespace, GetImageRequest { name: image.clone() })).await.unwrap();
        took.push(begun.elapsed());
        tokio::time::sleep(PAUSE).await;
    }
    took
}

/// What readers see, each on a connection of its own, while `work` is done: the longest read and the count of reads.
async fn while_reading<T>(
    host: &Host,
    digest: &str,
    image: &str,
    work: impl Future<Output = T>,
) -> (Duration, usize, T) {
    let stop = Arc::new(AtomicBool::new(false));
    let mut readers = Vec::new();
    for _ in 0..2 {
        let channel = channel(&host.address()).await;
        let (digest, image) = (digest.to_owned(), image.to_owned());
        readers.push(tokio::spawn(read(channel, host.namespace.clone(), digest, image, stop.clone())));
    }
    let done = work.await;
    stop.store(true, Ordering::Relaxed);
    let (mut longest, mut count) = (Duration::ZERO, 0);
    for reader in readers {
        let took = reader.await.unwrap();
        longest = longest.max(took.iter().copied().max().unwrap_or_default());
        count += took.len();
    }
    (longest, count, done)
}

#[test]
fn a_collection_of_many_blobs_holds_nobody_up() {
    let _alone = ALONE.lock().unwrap_or_else(PoisonError::into_inner);
    let Some(host) = quiet() else { return };
    let namespace = host.namespace.as_str();
    block_on(async {
        let mut channels = Vec::new();
        for _ in 0..4 {
            channels.push(channel(&host.address()).await);
        }
        let mut images = ImagesClient::new(channels[0].clone());
        let mut leases = LeasesClient::new(channels[1].clone());
        for id in ["kept", "many"] {
            let lease = CreateRequest { id: id.into(), ..CreateRequest::default() };
            leases.create(in_namespace(namespace, lease)).await.unwrap();
        }
        let kept = write(channels[0].clone(), namespace, Some("kept"), MANY).await;
        images.create(in_namespace(namespace, image("example.org/read:1".into()))).await.unwrap();

        let begun = Instant::now();
        let fill = |numbers: Range<usize>| {
            stream::iter(numbers).for_each_concurrent(AT_ONCE, |number| {
                let channel = channels[number % channels.len()].clone();
                async move {
                    write(channel, namespace, Some("many"), number).await;
                }
            })
        };
        fill(0..MANY - FEW).await;
        // Beside the last of them: commits as they come, whose longest read is the measure.
        let last = fill(MANY - FEW..MANY);
        let (usual, count, ()) = while_reading(&host, &kept, "example.org/read:1", last).await;
        println!("{MANY} blobs in {:?}; {count} reads, the longest {usual:?}", begun.elapsed());

        let collect = async {
            let begun = Instant::now();
            let delete = DeleteRequest { id: "many".into(), sync: true };
            let collection = leases.delete(in_namespace(namespace, delete));
            let over = AtomicBool::new(false);
            let mut writes = Vec::new();
            let writing = async {
                while !over.load(Ordering::Relaxed) {
                    let write = Instant::now();
                    let request = image(format!("example.org/beside:{}", writes.len()));
                    images.create(in_namespace(namespace, request)).await.unwrap();
                    writes.push(write.elapsed());
                    tokio::time::sleep(PAUSE).await;
                }
            };
            let collecting = async {
                collection.await.unwrap();
                over.store(true, Ordering::Relaxed);
                begun.elapsed()
            };
            let (took, ()) = futures::join!(collecting, writing);
            writes.sort_unstable();
            (took, writes)
        };
        let (longest, count, (took, writes)) =
            while_reading(&host, &kept, "example.org/read:1", collect).await;
        println!("collected in {took:?}; beside it {count} reads, the longest {longest:?}");
        println!(
            "and {} writes, the longest {:?}",
            writes.len(),
            writes.iter().rev().take(4).collect::<Vec<_>>()
        );
        let blobs = host.root().join("io.containerd.content.v1.content/blobs/sha256");
        assert_eq!(std::fs::read_dir(blobs).unwrap().count(), 1, "all but the blob that a lease keeps");
        assert!(writes.len() > 1, "no write beside the collection came to its end before it");
        assert!(count > 20, "{count} reads beside the collection");
        // A pause of the machine is not the engine's.
        let bearable = 5 * usual.max(Duration::from_millis(20));
        assert!(
            longest < bearable,
            "a read took {longest:?} beside the collection, and {usual:?} at the most before"
        );
    });
    host.assert_nothing_left();
}
