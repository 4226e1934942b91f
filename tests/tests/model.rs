//! Random sequences of calls against a model, clients that go or stall, kills, and every field of every request with what
//! does not belong there.
//!
//! `GANTRY_SEED=N` repeats the sequences of a run that printed N. Each client has names of its own, for which the model
//! knows every answer; of names that all use, only what always holds is checked.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use futures::stream::{self, StreamExt as _};
use oci::Digest;
use prost::Message as _;
use prost_types::field_descriptor_proto::{Label, Type};
use prost_types::{DescriptorProto, FieldDescriptorProto, FieldMask, FileDescriptorSet};
use proto::containerd::services::containers::v1 as containers;
use proto::containerd::services::containers::v1::containers_client::ContainersClient;
use proto::containerd::services::content::v1 as content;
use proto::containerd::services::content::v1::WriteAction;
use proto::containerd::services::content::v1::content_client::ContentClient;
use proto::containerd::services::events::v1::SubscribeRequest;
use proto::containerd::services::events::v1::events_client::EventsClient;
use proto::containerd::services::images::v1 as images;
use proto::containerd::services::images::v1::images_client::ImagesClient;
use proto::containerd::services::leases::v1 as leases;
use proto::containerd::services::leases::v1::leases_client::LeasesClient;
use proto::containerd::services::namespaces::v1 as namespaces;
use proto::containerd::services::namespaces::v1::namespaces_client::NamespacesClient;
use proto::containerd::services::snapshots::v1 as snapshots;
use proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use proto::containerd::services::tasks::v1::WaitRequest;
use proto::containerd::services::tasks::v1::tasks_client::TasksClient;
use proto::containerd::types::Descriptor;
use tests::client::{Raw, channel, in_namespace};
use tests::host::{Host, RUNC, STOCK_CTR};
use tests::image::BUSYBOX;
use tests::{ready, wait_for};
use tokio_stream::wrappers::ReceiverStream;
use tonic::transport::Channel;
use tonic::{Code, Response, Status};

/// How long one call may take, on a busy machine.
const CALL_MAX: Duration = Duration::from_secs(20);
const SNAPSHOTTER: &str = "overlayfs";
/// Keeps what nothing else holds from being collected.
const ROOT: &str = "containerd.io/gc.root";

fn gantry() -> Option<Host> {
    ready(&[STOCK_CTR, RUNC]).then(Host::collecting)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap()
        .block_on(future)
}

/// xorshift64*: the same numbers for the same seed.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    fn below(&mut self, limit: usize) -> usize {
        (self.next() >> 16) as usize % limit
    }

    fn chance(&mut self, percent: usize) -> bool {
        self.below(100) < percent
    }
}

fn seed() -> u64 {
    let given = std::env::var("GANTRY_SEED").ok();
    let seed = given.map_or_else(|| u64::from(std::process::id()), |seed| seed.parse().unwrap());
    println!("GANTRY_SEED={seed}");
    seed
}

/// The answer of a call, which must come in time and may be no error of the engine's own.
async fn call<T>(what: &str, call: impl Future<Output = Result<Response<T>, Status>>) -> Result<T, Code> {
    let answer = tokio::time::timeout(CALL_MAX, call).await.unwrap_or_else(|_| panic!("{what} hangs"));
    match answer {
        Ok(answer) => Ok(answer.into_inner()),
        Err(status) => {
            assert!(!matches!(status.code(), Code::Unknown | Code::Internal), "{what}: {status}");
            Err(status.code())
        }
    }
}

fn check<T>(what: &str, answer: Result<T, Code>, expected: Result<(), &[Code]>) -> Option<T> {
    match (answer, expected) {
        (Ok(answer), Ok(())) => Some(answer),
        (Err(code), Err(codes)) if codes.contains(&code) => None,
        (answer, expected) => panic!("{what}: {:?}, and the model says {expected:?}", answer.map(|_| ())),
    }
}

fn exists(there: bool) -> Result<(), &'static [Code]> {
    if there { Ok(()) } else { Err(&[Code::NotFound]) }
}

fn free(taken: bool) -> Result<(), &'static [Code]> {
    if taken { Err(&[Code::AlreadyExists]) } else { Ok(()) }
}

type Labels = BTreeMap<String, String>;

fn rooted() -> Labels {
    [(ROOT.to_owned(), "2020-01-01T00:00:00Z".to_owned())].into()
}

fn image(name: &str, labels: &Labels) -> images::Image {
    let target = Descriptor {
        media_type: "application/vnd.oci.image.manifest.v1+json".into(),
        digest: Digest::sha256_of(name.as_bytes()).to_string(),
        size: 7,
        ..Descriptor::default()
    };
    images::Image { name: name.into(), labels: labels.clone(), target: Some(target), ..Default::default() }
}

fn container(id: &str, labels: &Labels) -> containers::Container {
    containers::Container {
        id: id.into(),
        labels: labels.clone(),
        runtime: Some(containers::container::Runtime { name: "io.containerd.runc.v2".into(), options: None }),
        spec: Some(proto::any::wrap(proto::any::SPEC, b"{}".to_vec())),
        ..Default::default()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Snapshot {
    kind: snapshots::Kind,
    parent: String,
    labels: Labels,
}

/// What one client's names are.
#[derive(Default)]
struct Model {
    namespaces: BTreeMap<String, Labels>,
    images: BTreeMap<String, Labels>,
    containers: BTreeMap<String, Labels>,
    leases: BTreeMap<String, BTreeSet<String>>,
    snapshots: BTreeMap<String, Snapshot>,
    ingests: BTreeMap<String, Vec<u8>>,
    blobs: BTreeMap<String, Labels>,
}

/// A client with a connection of its own.
struct Client {
    prefix: String,
    namespace: String,
    random: Random,
    model: Model,
    channel: Channel,
    steps: usize,
}

impl Client {
    async fn new(host: &Host, number: usize, seed: u64) -> Self {
        let random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(number as u64 + 1) | 1);
        Client {
            prefix: format!("c{number}"),
            namespace: host.namespace.clone(),
            random,
            model: Model::default(),
            channel: channel(&host.address()).await,
            steps: 0,
        }
    }

    fn request<T>(&self, message: T) -> tonic::Request<T> {
        in_namespace(&self.namespace, message)
    }

    /// One of few names, so that they are met again.
    fn name(&mut self) -> String {
        format!("{}-{}", self.prefix, self.random.below(5))
    }

    fn labels(&mut self) -> Labels {
        (0..self.random.below(3)).map(|key| (format!("k{key}"), self.random.below(9).to_string())).collect()
    }

    async fn step(&mut self) {
        self.steps += 1;
        match self.random.below(7) {
            0 => self.namespace().await,
            1 => self.image().await,
            2 => self.container().await,
            3 => self.lease().await,
            4 | 5 => self.snapshot().await,
            _ => self.content().await,
        }
    }

    async fn namespace(&mut self) {
        let (name, labels) = (self.name(), self.labels());
        let mut client = NamespacesClient::new(self.channel.clone());
        let there = self.model.namespaces.contains_key(&name);
        let namespace = || namespaces::Namespace { name: name.clone(), labels: labels.clone() };
        match self.random.below(4) {
            0 | 1 => {
                let request = namespaces::CreateNamespaceRequest { namespace: Some(namespace()) };
                let answer = call("namespaces create", client.create(request)).await;
                if check("namespaces create", answer, free(there)).is_some() {
                    self.model.namespaces.insert(name, labels);
                }
            }
            2 => {
                let request = namespaces::GetNamespaceRequest { name: name.clone() };
                let answer = call("namespaces get", client.get(request)).await.unwrap().namespace.unwrap();
                assert_eq!(answer.labels, self.model.namespaces.get(&name).cloned().unwrap_or_default());
            }
            _ => {
                let request = namespaces::DeleteNamespaceRequest { name: name.clone() };
                check(
                    "namespaces delete",
                    call("namespaces delete", client.delete(request)).await,
                    exists(there),
                );
                self.model.namespaces.remove(&name);
            }
        }
    }

    async fn image(&mut self) {
        let (name, labels) = (self.name(), self.labels());
        let mut client = ImagesClient::new(self.channel.clone());
        let there = self.model.images.contains_key(&name);
        match self.random.below(4) {
            0 => {
                let image = Some(image(&name, &labels));
                let request = self.request(images::CreateImageRequest { image, ..Default::default() });
                if check("images create", call("images create", client.create(request)).await, free(there))
                    .is_some()
                {
                    self.model.images.insert(name, labels);
                }
            }
            1 => {
                let request = self.request(images::GetImageRequest { name: name.clone() });
                let found = check("images get", call("images get", client.get(request)).await, exists(there));
                if let Some(found) = found {
                    assert_eq!(found.image.unwrap().labels, self.model.images[&name]);
                }
            }
            2 => {
                let mask = Some(FieldMask { paths: vec!["labels".into()] });
                let image = Some(image(&name, &labels));
                let request = self.request(images::UpdateImageRequest {
                    image,
                    update_mask: mask,
                    ..Default::default()
                });
                if check("images update", call("images update", client.update(request)).await, exists(there))
                    .is_some()
                {
                    self.model.images.insert(name, labels);
                }
            }
            _ => {
                let sync = self.random.chance(30);
                let request = self.request(images::DeleteImageRequest {
                    name: name.clone(),
                    sync,
                    ..Default::default()
                });
                check("images delete", call("images delete", client.delete(request)).await, exists(there));
                self.model.images.remove(&name);
            }
        }
    }

    async fn container(&mut self) {
        let (id, labels) = (self.name(), self.labels());
        let mut client = ContainersClient::new(self.channel.clone());
        let there = self.model.containers.contains_key(&id);
        match self.random.below(4) {
            0 => {
                let container = Some(container(&id, &labels));
                let request = self.request(containers::CreateContainerRequest { container });
                let answer = call("containers create", client.create(request)).await;
                if check("containers create", answer, free(there)).is_some() {
                    self.model.containers.insert(id, labels);
                }
            }
            1 => {
                let request = self.request(containers::GetContainerRequest { id: id.clone() });
                let found =
                    check("containers get", call("containers get", client.get(request)).await, exists(there));
                if let Some(found) = found {
                    assert_eq!(found.container.unwrap().labels, self.model.containers[&id]);
                }
            }
            2 => {
                let mask = Some(FieldMask { paths: vec!["labels".into()] });
                let container = Some(container(&id, &labels));
                let request =
                    self.request(containers::UpdateContainerRequest { container, update_mask: mask });
                let answer = call("containers update", client.update(request)).await;
                if check("containers update", answer, exists(there)).is_some() {
                    self.model.containers.insert(id, labels);
                }
            }
            _ => {
                let request = self.request(containers::DeleteContainerRequest { id: id.clone() });
                check(
                    "containers delete",
                    call("containers delete", client.delete(request)).await,
                    exists(there),
                );
                self.model.containers.remove(&id);
            }
        }
    }

    async fn lease(&mut self) {
        let id = self.name();
        let mut client = LeasesClient::new(self.channel.clone());
        let there = self.model.leases.contains_key(&id);
        let held = format!("ref-{}", self.random.below(4));
        let resource = Some(leases::Resource { id: held.clone(), r#type: "ingests".into() });
        match self.random.below(6) {
            0 | 1 => {
                let request = self.request(leases::CreateRequest { id: id.clone(), ..Default::default() });
                if check("leases create", call("leases create", client.create(request)).await, free(there))
                    .is_some()
                {
                    self.model.leases.insert(id, BTreeSet::new());
                }
            }
            2 => {
                let request = self.request(leases::AddResourceRequest { id: id.clone(), resource });
                let answer = call("add resource", client.add_resource(request)).await;
                if check("add resource", answer, exists(there)).is_some() {
                    self.model.leases.get_mut(&id).unwrap().insert(held);
                }
            }
            3 => {
                let request = self.request(leases::DeleteResourceRequest { id: id.clone(), resource });
                let answer = call("delete resource", client.delete_resource(request)).await;
                if check("delete resource", answer, exists(there)).is_some() {
                    self.model.leases.get_mut(&id).unwrap().remove(&held);
                }
            }
            4 => {
                let request = self.request(leases::ListResourcesRequest { id: id.clone() });
                let answer = call("list resources", client.list_resources(request)).await;
                if let Some(list) = check("list resources", answer, exists(there)) {
                    let list: BTreeSet<_> = list.resources.into_iter().map(|resource| resource.id).collect();
                    assert_eq!(list, self.model.leases[&id]);
                }
            }
            _ => {
                let sync = self.random.chance(30);
                let request = self.request(leases::DeleteRequest { id: id.clone(), sync });
                check("leases delete", call("leases delete", client.delete(request)).await, exists(there));
                self.model.leases.remove(&id);
            }
        }
    }

    async fn snapshot(&mut self) {
        use snapshots::Kind;
        let (key, other) = (self.name(), self.name());
        let mut client = SnapshotsClient::new(self.channel.clone());
        let snapshotter = SNAPSHOTTER.to_owned();
        let found = self.model.snapshots.get(&key).cloned();
        let beneath = self.model.snapshots.get(&other).cloned();
        match self.random.below(7) {
            kind @ 0..=2 => {
                let parent = if self.random.chance(50) { String::new() } else { other };
                // What is wrong with the parent, and whether the key is taken: either may be told first.
                let mut codes = Vec::new();
                if found.is_some() {
                    codes.push(Code::AlreadyExists);
                }
                if !parent.is_empty() {
                    match &beneath {
                        None => codes.push(Code::NotFound),
                        Some(beneath) if beneath.kind != Kind::Committed => {
                            codes.extend([Code::InvalidArgument, Code::FailedPrecondition]);
                        }
                        Some(_) => {}
                    }
                }
                let expected = if codes.is_empty() { Ok(()) } else { Err(codes.as_slice()) };
                let (labels, made) = (rooted(), if kind == 2 { Kind::View } else { Kind::Active });
                let answer = if kind == 2 {
                    let (key, parent, labels) = (key.clone(), parent.clone(), labels.clone());
                    let view = snapshots::ViewSnapshotRequest { snapshotter, key, parent, labels };
                    call("view", client.view(self.request(view))).await.map(|answer| answer.mounts)
                } else {
                    let (key, parent, labels) = (key.clone(), parent.clone(), labels.clone());
                    let prepare = snapshots::PrepareSnapshotRequest { snapshotter, key, parent, labels };
                    call("prepare", client.prepare(self.request(prepare))).await.map(|answer| answer.mounts)
                };
                if let Some(mounts) = check("prepare or view", answer, expected) {
                    assert!(!mounts.is_empty());
                    self.model.snapshots.insert(key, Snapshot { kind: made, parent, labels });
                }
            }
            3 => {
                let name = other;
                let mut codes = Vec::new();
                if beneath.is_some() {
                    codes.push(Code::AlreadyExists);
                }
                match &found {
                    None => codes.push(Code::NotFound),
                    Some(found) if found.kind != Kind::Active => codes.push(Code::FailedPrecondition),
                    Some(_) => {}
                }
                let expected = if codes.is_empty() { Ok(()) } else { Err(codes.as_slice()) };
                let labels = rooted();
                let commit = snapshots::CommitSnapshotRequest {
                    snapshotter,
                    name: name.clone(),
                    key: key.clone(),
                    labels: labels.clone(),
                    ..Default::default()
                };
                let answer = call("snapshots commit", client.commit(self.request(commit))).await;
                if check("snapshots commit", answer, expected).is_some() {
                    let active = self.model.snapshots.remove(&key).unwrap();
                    let committed = Snapshot { kind: Kind::Committed, parent: active.parent, labels };
                    self.model.snapshots.insert(name, committed);
                }
            }
            4 => {
                let held = self.model.snapshots.values().any(|snapshot| snapshot.parent == key);
                let expected = match (&found, held) {
                    (None, _) => Err(&[Code::NotFound][..]),
                    (Some(_), true) => Err(&[Code::FailedPrecondition][..]),
                    (Some(_), false) => Ok(()),
                };
                let request =
                    self.request(snapshots::RemoveSnapshotRequest { snapshotter, key: key.clone() });
                if check("snapshots remove", call("snapshots remove", client.remove(request)).await, expected)
                    .is_some()
                {
                    self.model.snapshots.remove(&key);
                }
            }
            5 => {
                let request = self.request(snapshots::StatSnapshotRequest { snapshotter, key: key.clone() });
                let answer = call("stat", client.stat(request)).await;
                if let Some(info) = check("stat", answer, exists(found.is_some())) {
                    assert_eq!(as_snapshot(info.info.unwrap()).1, found.unwrap(), "{key}");
                }
            }
            _ => {
                let value = self.random.below(9).to_string();
                let info = snapshots::Info {
                    name: key.clone(),
                    labels: [("k".to_owned(), value.clone())].into(),
                    ..Default::default()
                };
                let mask = Some(FieldMask { paths: vec!["labels.k".into()] });
                let update =
                    snapshots::UpdateSnapshotRequest { snapshotter, info: Some(info), update_mask: mask };
                let answer = call("snapshots update", client.update(self.request(update))).await;
                if check("snapshots update", answer, exists(found.is_some())).is_some() {
                    self.model.snapshots.get_mut(&key).unwrap().labels.insert("k".into(), value);
                }
            }
        }
    }

    /// One Write stream with one request; the last answer.
    async fn write(
        &self,
        request: content::WriteContentRequest,
    ) -> Result<content::WriteContentResponse, Code> {
        let mut client = ContentClient::new(self.channel.clone());
        call("write", async {
            let mut answers = client.write(self.request(stream::iter([request]))).await?.into_inner();
            let mut last = content::WriteContentResponse::default();
            while let Some(answer) = answers.message().await? {
                last = answer;
            }
            Ok(Response::new(last))
        })
        .await
    }

    async fn content(&mut self) {
        let reference = self.name();
        let mut client = ContentClient::new(self.channel.clone());
        let part = self.model.ingests.get(&reference).cloned();
        let at = part.as_ref().map_or(0, Vec::len);
        let write = |action: WriteAction, offset: usize, data: &[u8]| content::WriteContentRequest {
            action: action.into(),
            r#ref: reference.clone(),
            offset: i64::try_from(offset).unwrap(),
            data: data.to_vec().into(),
            labels: rooted(),
            ..Default::default()
        };
        // Nobody else's bytes.
        let piece = format!("{} {} ", self.prefix, self.random.below(4)).into_bytes();
        match self.random.below(9) {
            0 | 1 => {
                let answer = self.write(write(WriteAction::Write, at, &piece)).await;
                let answer = check("write", answer, Ok(())).unwrap();
                let ingest = self.model.ingests.entry(reference).or_default();
                ingest.extend(piece);
                assert_eq!(answer.offset, i64::try_from(ingest.len()).unwrap());
                assert_eq!(answer.digest, Digest::sha256_of(ingest).to_string());
            }
            2 => {
                // The stream makes the ingest before it is told where to write.
                let answer = self.write(write(WriteAction::Write, at + 1, &piece)).await;
                check("write elsewhere", answer, Err(&[Code::OutOfRange]));
                self.model.ingests.entry(reference).or_default();
            }
            3 => {
                let mut bytes = part.unwrap_or_default();
                bytes.extend(&piece);
                let digest = Digest::sha256_of(&bytes).to_string();
                let answer = self.write(write(WriteAction::Commit, at, &piece)).await;
                let there = self.model.blobs.contains_key(&digest);
                if let Some(answer) = check("commit", answer, free(there)) {
                    assert_eq!(answer.digest, digest);
                    self.model.blobs.insert(digest, rooted());
                } else {
                    // Whether the ingest is kept then is not promised.
                    let abort = content::AbortRequest { r#ref: reference.clone() };
                    let _ = call("abort", client.abort(self.request(abort))).await;
                }
                self.model.ingests.remove(&reference);
            }
            4 => {
                let mut request = write(WriteAction::Commit, at, &piece);
                request.expected = Digest::sha256_of(b"something else").to_string();
                check(
                    "commit of another digest",
                    self.write(request).await,
                    Err(&[Code::FailedPrecondition]),
                );
                self.model.ingests.entry(reference).or_default().extend(piece);
            }
            5 => {
                let abort = content::AbortRequest { r#ref: reference.clone() };
                let answer = call("abort", client.abort(self.request(abort))).await;
                check("abort", answer, exists(part.is_some()));
                self.model.ingests.remove(&reference);
            }
            6 => {
                let status = content::StatusRequest { r#ref: reference.clone() };
                let answer = call("status", client.status(self.request(status))).await;
                if let Some(answer) = check("status", answer, exists(part.is_some())) {
                    assert_eq!(answer.status.unwrap().offset, i64::try_from(at).unwrap(), "{reference}");
                }
            }
            7 => {
                let some = Digest::sha256_of(&piece).to_string();
                let digest = self.model.blobs.keys().next().cloned().unwrap_or(some);
                let there = self.model.blobs.contains_key(&digest);
                let read = content::ReadContentRequest { digest: digest.clone(), ..Default::default() };
                let answer = call("read", async {
                    let mut pieces = client.read(self.request(read)).await?.into_inner();
                    let mut bytes = Vec::new();
                    while let Some(piece) = pieces.message().await? {
                        bytes.extend(piece.data);
                    }
                    Ok(Response::new(bytes))
                });
                if let Some(bytes) = check("read", answer.await, exists(there)) {
                    assert_eq!(Digest::sha256_of(&bytes).to_string(), digest);
                }
            }
            _ => {
                let some = Digest::sha256_of(&piece).to_string();
                let digest = self.model.blobs.keys().next_back().cloned().unwrap_or(some);
                let there = self.model.blobs.contains_key(&digest);
                let delete = content::DeleteContentRequest { digest: digest.clone() };
                check("delete", call("delete", client.delete(self.request(delete))).await, exists(there));
                self.model.blobs.remove(&digest);
            }
        }
    }

    /// All that the lists have of this client is what the model has.
    async fn settle(&self) {
        let mine = |name: &str| name.starts_with(&format!("{}-", self.prefix));
        let channel = || self.channel.clone();
        let list =
            ImagesClient::new(channel()).list(self.request(Default::default())).await.unwrap().into_inner();
        let list = list.images.into_iter().filter(|image| mine(&image.name));
        let list: BTreeMap<_, _> = list.map(|image| (image.name, image.labels)).collect();
        assert_eq!(list, self.model.images);
        let list = ContainersClient::new(channel())
            .list(self.request(Default::default()))
            .await
            .unwrap()
            .into_inner();
        let list = list.containers.into_iter().filter(|container| mine(&container.id));
        let list: BTreeMap<_, _> = list.map(|container| (container.id, container.labels)).collect();
        assert_eq!(list, self.model.containers);
        let list = NamespacesClient::new(channel())
            .list(namespaces::ListNamespacesRequest::default())
            .await
            .unwrap()
            .into_inner();
        let list = list.namespaces.into_iter().filter(|namespace| mine(&namespace.name));
        let list: BTreeMap<_, _> = list.map(|namespace| (namespace.name, namespace.labels)).collect();
        assert_eq!(list, self.model.namespaces);
        let list =
            LeasesClient::new(channel()).list(self.request(Default::default())).await.unwrap().into_inner();
        let list: BTreeSet<_> = list.leases.into_iter().map(|lease| lease.id).filter(|id| mine(id)).collect();
        assert_eq!(list, self.model.leases.keys().cloned().collect());
        let request =
            snapshots::ListSnapshotsRequest { snapshotter: SNAPSHOTTER.into(), ..Default::default() };
        let answers = SnapshotsClient::new(channel()).list(self.request(request)).await.unwrap().into_inner();
        let list: Vec<_> = answers.map(|answer| answer.unwrap().info).collect::<Vec<_>>().await.concat();
        let list: BTreeMap<_, _> =
            list.into_iter().filter(|info| mine(&info.name)).map(as_snapshot).collect();
        assert_eq!(list, self.model.snapshots);
        let list = ContentClient::new(channel())
            .list_statuses(self.request(content::ListStatusesRequest::default()))
            .await
            .unwrap()
            .into_inner();
        let list = list.statuses.into_iter().filter(|status| mine(&status.r#ref));
        let list: BTreeMap<_, _> = list.map(|status| (status.r#ref, status.offset)).collect();
        let ingests = self.model.ingests.iter();
        assert_eq!(
            list,
            ingests.map(|(name, bytes)| (name.clone(), i64::try_from(bytes.len()).unwrap())).collect()
        );
        for digest in self.model.blobs.keys() {
            let request = self.request(content::InfoRequest { digest: digest.clone() });
            let info = ContentClient::new(channel()).info(request).await.unwrap().into_inner().info.unwrap();
            assert_eq!(&info.labels, &self.model.blobs[digest]);
        }
    }
}

fn as_snapshot(info: snapshots::Info) -> (String, Snapshot) {
    let kind = info.kind();
    (info.name, Snapshot { kind, parent: info.parent, labels: info.labels })
}

#[test]
fn random_calls_of_several_clients_are_answered_as_the_model_says() {
    let Some(mut host) = gantry() else { return };
    let seed = seed();
    let mut models = Vec::new();
    block_on(async {
        let mut clients = Vec::new();
        for number in 0..4 {
            let mut client = Client::new(&host, number, seed).await;
            clients.push(tokio::spawn(async move {
                for _ in 0..400 {
                    client.step().await;
                }
                client.settle().await;
                client
            }));
        }
        for client in clients {
            let client = client.await.unwrap();
            models.push((client.model, client.steps));
        }
    });
    println!(
        "{} calls were answered as the model says",
        models.iter().map(|(_, steps)| steps).sum::<usize>()
    );
    // And all of it is there after a kill.
    host.kill();
    host.start();
    block_on(async {
        for (number, (model, _)) in models.into_iter().enumerate() {
            let mut client = Client::new(&host, number, seed).await;
            client.model = model;
            client.settle().await;
        }
    });
    host.assert_nothing_left();
}

#[test]
fn of_racing_clients_one_makes_a_thing() {
    let Some(host) = gantry() else { return };
    block_on(async {
        let mut channels = Vec::new();
        for _ in 0..8 {
            channels.push(channel(&host.address()).await);
        }
        let namespace = host.namespace.as_str();
        for round in 0..20 {
            let name = format!("shared-{round}");
            let race = channels.iter().map(|channel| {
                let (channel, name) = (channel.clone(), name.as_str());
                async move {
                    let none = Labels::new();
                    let create =
                        containers::CreateContainerRequest { container: Some(container(name, &none)) };
                    let create = in_namespace(namespace, create);
                    let container = call("race", ContainersClient::new(channel.clone()).create(create)).await;
                    let create =
                        images::CreateImageRequest { image: Some(image(name, &none)), ..Default::default() };
                    let create = in_namespace(namespace, create);
                    let image = call("race", ImagesClient::new(channel.clone()).create(create)).await;
                    let create = leases::CreateRequest { id: name.into(), ..Default::default() };
                    let mut client = LeasesClient::new(channel.clone());
                    let lease = call("race", client.create(in_namespace(namespace, create))).await;
                    let prepare = snapshots::PrepareSnapshotRequest {
                        snapshotter: SNAPSHOTTER.into(),
                        key: name.into(),
                        labels: rooted(),
                        ..Default::default()
                    };
                    let prepare = in_namespace(namespace, prepare);
                    let snapshot = call("race", SnapshotsClient::new(channel).prepare(prepare)).await;
                    [container.map(|_| ()), image.map(|_| ()), lease.map(|_| ()), snapshot.map(|_| ())]
                }
            });
            let answers = futures::future::join_all(race).await;
            for kind in 0..4 {
                let won = answers.iter().filter(|answers| answers[kind].is_ok()).count();
                assert_eq!(won, 1, "{answers:?}");
                assert!(
                    answers.iter().all(|answers| matches!(answers[kind], Ok(()) | Err(Code::AlreadyExists)))
                );
            }
            // Of those that delete it, one does.
            let race = channels.iter().map(|channel| {
                let delete = images::DeleteImageRequest { name: name.clone(), ..Default::default() };
                let delete = in_namespace(namespace, delete);
                let channel = channel.clone();
                async move { call("race", ImagesClient::new(channel).delete(delete)).await }
            });
            let answers = futures::future::join_all(race).await;
            assert_eq!(answers.iter().filter(|answer| answer.is_ok()).count(), 1);
            assert!(answers.iter().all(|answer| matches!(answer, Ok(()) | Err(Code::NotFound))));
        }
        let list = containers::ListContainersRequest::default();
        let list =
            ContainersClient::new(channels[0].clone()).list(in_namespace(namespace, list)).await.unwrap();
        assert_eq!(list.into_inner().containers.len(), 20);
        let list = ImagesClient::new(channels[0].clone())
            .list(in_namespace(namespace, images::ListImagesRequest::default()))
            .await
            .unwrap();
        assert!(list.into_inner().images.is_empty());
    });
    host.assert_nothing_left();
}

/// The engine's open descriptors and its threads.
fn held(host: &Host) -> (usize, usize) {
    let process = PathBuf::from(format!("/proc/{}", host.pid()));
    let count = |name: &str| fs::read_dir(process.join(name)).unwrap().count();
    (count("fd"), count("task"))
}

#[test]
fn clients_that_stall_or_go_hold_nothing_for_good() {
    if !ready(&[BUSYBOX]) {
        return;
    }
    let Some(host) = gantry() else { return };
    let (namespace, ctr) = (host.namespace.as_str(), host.stock_ctr());
    let image = host.import();
    ctr.ok(&["run", "-d", image, "waited-for", "sleep", "600"]);
    let before = held(&host);
    block_on(async {
        let mut other = ContentClient::new(channel(&host.address()).await);
        let write = |offset: usize, data: &'static [u8], action: WriteAction| content::WriteContentRequest {
            action: action.into(),
            r#ref: "stalled".into(),
            offset: i64::try_from(offset).unwrap(),
            data: data.into(),
            ..Default::default()
        };
        for round in 0..10_usize {
            let begun = Instant::now();
            let (stalled, sender, answers, answer) = loop {
                let mut stalled = ContentClient::new(channel(&host.address()).await);
                let (sender, requests) = tokio::sync::mpsc::channel(1);
                sender.send(write(5 * round, b"piece", WriteAction::Write)).await.unwrap();
                let requests = in_namespace(namespace, ReceiverStream::new(requests));
                let mut answers = stalled.write(requests).await.unwrap().into_inner();
                match tokio::time::timeout(CALL_MAX, answers.message()).await.unwrap() {
                    Ok(answer) => break (stalled, sender, answers, answer.unwrap()),
                    // The engine has yet to hear that the one before has gone.
                    Err(status) => assert_eq!(status.code(), Code::Unavailable, "{status}"),
                }
                assert!(begun.elapsed() < CALL_MAX, "the ref of a client that went away stays taken");
                tokio::time::sleep(Duration::from_millis(10)).await;
            };
            assert_eq!(answer.offset, i64::try_from(5 * (round + 1)).unwrap());
            // It says nothing more; meanwhile the ref is taken.
            let taken = call("a write beside a stalled one", async {
                let requests = stream::iter([write(answer.offset as usize, b"x", WriteAction::Write)]);
                let mut answers = other.write(in_namespace(namespace, requests)).await?.into_inner();
                answers.message().await.map(Response::new)
            });
            assert_eq!(taken.await.unwrap_err(), Code::Unavailable);
            // It goes, with its connection, and the ref is free with what was written.
            drop((answers, sender, stalled));
        }
        let begun = Instant::now();
        let digest = loop {
            let answer = call("a write after a stalled one", async {
                let requests = stream::iter([write(50, b"end", WriteAction::Commit)]);
                let mut answers = other.write(in_namespace(namespace, requests)).await?.into_inner();
                answers.message().await.map(Response::new)
            });
            match answer.await {
                Ok(answer) => break answer.unwrap().digest,
                Err(code) => assert_eq!(code, Code::Unavailable),
            }
            assert!(begun.elapsed() < CALL_MAX, "the ref of a client that went away stays taken");
            tokio::time::sleep(Duration::from_millis(10)).await;
        };
        assert_eq!(digest, Digest::sha256_of(format!("{}end", "piece".repeat(10)).as_bytes()).to_string());
        // Waiters that go before the end that they wait for.
        for _ in 0..50 {
            let mut tasks = TasksClient::new(channel(&host.address()).await);
            let wait = WaitRequest { container_id: "waited-for".into(), ..Default::default() };
            let wait = tasks.wait(in_namespace(namespace, wait));
            assert!(tokio::time::timeout(Duration::from_millis(5), wait).await.is_err(), "it sleeps");
        }
        // Subscribers that go without a word.
        for _ in 0..50 {
            let mut events = EventsClient::new(channel(&host.address()).await);
            let stream = events.subscribe(SubscribeRequest::default()).await.unwrap();
            drop((stream, events));
        }
    });
    wait_for("the engine to let go of its clients", || {
        let now = held(&host);
        // Threads for blocking work stay for some seconds.
        now.0 <= before.0 + 5 && now.1 <= before.1 + 5
    });
    ctr.run(&["tasks", "rm", "-f", "waited-for"]);
    ctr.ok(&["containers", "rm", "waited-for"]);
    host.assert_nothing_left();
}

#[test]
fn what_was_acknowledged_is_there_after_a_kill() {
    let Some(mut host) = gantry() else { return };
    let mut random = Random(seed() | 1);
    let mut all: BTreeSet<String> = BTreeSet::new();
    for round in 0..4 {
        let count = Arc::new(AtomicUsize::new(0));
        let enough = 20 + random.below(150);
        let runtime =
            tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let writers: Vec<_> = (0..6)
            .map(|writer| {
                let (address, namespace, count) = (host.address(), host.namespace.clone(), count.clone());
                runtime.spawn(async move {
                    let channel = channel(&address).await;
                    let mut done = Vec::new();
                    for number in 0.. {
                        let name = format!("{round}-{writer}-{number}");
                        let (none, ns) = (Labels::new(), namespace.as_str());
                        let answer = match writer % 4 {
                            0 => {
                                let image = Some(image(&name, &none));
                                let create = images::CreateImageRequest { image, ..Default::default() };
                                ImagesClient::new(channel.clone())
                                    .create(in_namespace(ns, create))
                                    .await
                                    .map(|_| ())
                            }
                            1 => {
                                let create = containers::CreateContainerRequest {
                                    container: Some(container(&name, &none)),
                                };
                                ContainersClient::new(channel.clone())
                                    .create(in_namespace(ns, create))
                                    .await
                                    .map(|_| ())
                            }
                            2 => {
                                let create = leases::CreateRequest { id: name.clone(), ..Default::default() };
                                LeasesClient::new(channel.clone())
                                    .create(in_namespace(ns, create))
                                    .await
                                    .map(|_| ())
                            }
                            _ => {
                                let prepare = snapshots::PrepareSnapshotRequest {
                                    snapshotter: SNAPSHOTTER.into(),
                                    key: name.clone(),
                                    labels: rooted(),
                                    ..Default::default()
                                };
                                SnapshotsClient::new(channel.clone())
                                    .prepare(in_namespace(ns, prepare))
                                    .await
                                    .map(|_| ())
                            }
                        };
                        // The engine has been killed.
                        if answer.is_err() {
                            break;
                        }
                        done.push(name);
                        count.fetch_add(1, Ordering::Relaxed);
                    }
                    done
                })
            })
            .collect();
        wait_for("some calls to be acknowledged", || count.load(Ordering::Relaxed) >= enough);
        host.kill();
        for writer in writers {
            all.extend(runtime.block_on(writer).unwrap());
        }
        host.start();
        let found: BTreeSet<String> = runtime.block_on(async {
            let channel = channel(&host.address()).await;
            let ns = host.namespace.as_str();
            let images =
                ImagesClient::new(channel.clone()).list(in_namespace(ns, Default::default())).await.unwrap();
            let containers = ContainersClient::new(channel.clone())
                .list(in_namespace(ns, Default::default()))
                .await
                .unwrap();
            let leases =
                LeasesClient::new(channel.clone()).list(in_namespace(ns, Default::default())).await.unwrap();
            let list =
                snapshots::ListSnapshotsRequest { snapshotter: SNAPSHOTTER.into(), ..Default::default() };
            let snapshots =
                SnapshotsClient::new(channel).list(in_namespace(ns, list)).await.unwrap().into_inner();
            let snapshots = snapshots.map(|answer| answer.unwrap().info).collect::<Vec<_>>().await.concat();
            let images = images.into_inner().images.into_iter().map(|image| image.name);
            let containers = containers.into_inner().containers.into_iter().map(|container| container.id);
            let leases = leases.into_inner().leases.into_iter().map(|lease| lease.id);
            images
                .chain(containers)
                .chain(leases)
                .chain(snapshots.into_iter().map(|info| info.name))
                .collect()
        });
        let lost: Vec<_> = all.difference(&found).collect();
        assert!(lost.is_empty(), "round {round}: acknowledged, and gone after a kill: {lost:?}");
        // Of those that were under way, one for each writer and round at the most.
        assert!(
            found.len() <= all.len() + 6 * (round + 1),
            "{} found, {} acknowledged",
            found.len(),
            all.len()
        );
    }
    println!("{} records survived 4 kills", all.len());
    host.assert_nothing_left();
}

/// Methods that answer with Unknown to what these tests send, as containerd does: with which words, and why.
const UNKNOWN: [(&str, &str, &str); 2] = [
    (
        "containerd.services.diff.v1.Diff/Diff",
        "mount the tree",
        "a mount that the kernel refuses has no class",
    ),
    ("containerd.services.diff.v1.Diff/Apply", "mount", "a mount that the kernel refuses has no class"),
];

/// The wire form of messages that descriptors describe.
struct Wire {
    messages: BTreeMap<String, DescriptorProto>,
}

impl Wire {
    fn new(set: &FileDescriptorSet) -> Self {
        fn add(messages: &mut BTreeMap<String, DescriptorProto>, prefix: &str, message: &DescriptorProto) {
            let name = format!("{prefix}.{}", message.name());
            message.nested_type.iter().for_each(|nested| add(messages, &name, nested));
            messages.insert(name, message.clone());
        }
        let mut messages = BTreeMap::new();
        for file in &set.file {
            let package =
                if file.package().is_empty() { String::new() } else { format!(".{}", file.package()) };
            file.message_type.iter().for_each(|message| add(&mut messages, &package, message));
        }
        Wire { messages }
    }

    fn of(&self, field: &FieldDescriptorProto) -> Option<&DescriptorProto> {
        self.messages.get(field.type_name()).filter(|_| field.r#type() == Type::Message)
    }

    fn is_map(&self, field: &FieldDescriptorProto) -> bool {
        self.of(field)
            .is_some_and(|message| message.options.as_ref().is_some_and(|options| options.map_entry()))
    }

    /// A message with something likely in each field, but for the one at this path, which has these bytes, key included.
    fn message(&self, name: &str, depth: usize, but: Option<(&[i32], &[u8])>) -> Vec<u8> {
        let mut bytes = Vec::new();
        let mut oneofs = BTreeSet::new();
        for field in &self.messages[name].field {
            let number = field.number();
            match but {
                Some(([last], evil)) if *last == number => {
                    bytes.extend(evil);
                    continue;
                }
                Some(([first, rest @ ..], evil)) if *first == number => {
                    let inner = self.message(field.type_name(), depth + 1, Some((rest, evil)));
                    bytes.extend(delimited(number, &inner));
                    continue;
                }
                _ => {}
            }
            if field.oneof_index.is_some_and(|index| !oneofs.insert(index)) || depth > 3 || self.is_map(field)
            {
                continue;
            }
            match field.r#type() {
                Type::Message => {
                    let inner = self.message(field.type_name(), depth + 1, None);
                    bytes.extend(delimited(number, &inner));
                }
                Type::String => bytes.extend(delimited(number, likely(field.name()).as_bytes())),
                _ => {}
            }
        }
        bytes
    }

    /// The fields of a message, by their paths.
    fn fields(&self, name: &str, depth: usize) -> Vec<(Vec<i32>, FieldDescriptorProto)> {
        let mut all = Vec::new();
        for field in &self.messages[name].field {
            all.push((vec![field.number()], field.clone()));
            if self.of(field).is_some() && !self.is_map(field) && depth < 3 {
                for (path, inner) in self.fields(field.type_name(), depth + 1) {
                    all.push(([vec![field.number()], path].concat(), inner));
                }
            }
        }
        all
    }

    /// What does not belong into a field: its bytes, with their key, and a name.
    fn evil(&self, field: &FieldDescriptorProto) -> Vec<(&'static str, Vec<u8>)> {
        let number = field.number();
        let mut all = vec![("left out", Vec::new())];
        let texts = |huge: bool| {
            let mut texts = vec![
                ("empty", String::new()),
                ("dots", "../../../../tmp/gantry-escape".into()),
                ("NUL", "a\0b".into()),
                ("odd characters", "a b/ü\u{202e}\n%s'\"\\$(id)`{}[]=,;~".into()),
            ];
            if huge {
                texts.push(("huge", "x".repeat(1 << 20)));
            }
            texts
        };
        match field.r#type() {
            Type::String | Type::Bytes => {
                all.extend(
                    texts(true).into_iter().map(|(name, text)| (name, delimited(number, text.as_bytes()))),
                );
            }
            Type::Message if self.is_map(field) => {
                let value = &self.of(field).unwrap().field[1];
                let entry = |key: &str, text: &str| {
                    let value = match value.r#type() {
                        Type::String | Type::Bytes => delimited(2, text.as_bytes()),
                        _ => delimited(2, &[]),
                    };
                    delimited(number, &[delimited(1, key.as_bytes()), value].concat())
                };
                all.extend(texts(true).into_iter().map(|(name, text)| (name, entry(&text, &text))));
                all.push((
                    "10,000 entries",
                    (0..10_000).flat_map(|key| entry(&format!("k{key}"), "v")).collect(),
                ));
            }
            Type::Message => all.push(("an empty message", delimited(number, &[]))),
            Type::Float | Type::Fixed32 | Type::Sfixed32 => {
                all.push((
                    "not a number",
                    [varint(u64::from(number as u32) << 3 | 5), vec![0xff; 4]].concat(),
                ));
            }
            Type::Double | Type::Fixed64 | Type::Sfixed64 => {
                all.push((
                    "not a number",
                    [varint(u64::from(number as u32) << 3 | 1), vec![0xff; 8]].concat(),
                ));
            }
            _ => {
                for (name, value) in [
                    ("one", 1),
                    ("minus one", u64::MAX),
                    ("the least number", i64::MIN as u64),
                    ("the greatest number", i64::MAX as u64),
                ] {
                    all.push((name, [varint(u64::from(number as u32) << 3), varint(value)].concat()));
                }
            }
        }
        if field.label() == Label::Repeated && !self.is_map(field) && field.r#type() == Type::String {
            all.push(("10,000 times", (0..10_000).flat_map(|_| delimited(number, b"x")).collect()));
        }
        all
    }
}

fn varint(mut value: u64) -> Vec<u8> {
    let mut bytes = Vec::new();
    loop {
        let low = (value & 0x7f) as u8;
        value >>= 7;
        bytes.push(if value == 0 { low } else { low | 0x80 });
        if value == 0 {
            return bytes;
        }
    }
}

fn delimited(number: i32, bytes: &[u8]) -> Vec<u8> {
    [varint(u64::from(number as u32) << 3 | 2), varint(bytes.len() as u64), bytes.to_vec()].concat()
}

/// What a field of this name is likely to have.
fn likely(field: &str) -> String {
    match field {
        "snapshotter" => SNAPSHOTTER.into(),
        "digest" | "expected" => Digest::sha256_of(b"fuzz").to_string(),
        "media_type" => "application/vnd.oci.image.layer.v1.tar".into(),
        "topic" => "/fuzz/topic".into(),
        "paths" => "labels".into(),
        "type_url" => proto::any::SPEC.into(),
        "filters" => "id==fuzz".into(),
        "id" | "container_id" => "fuzz-id".into(),
        "name" | "key" => "fuzz-name".into(),
        other => format!("fuzz-{}", other.replace('_', "-")),
    }
}

/// The code that a request gets; None for a stream that stays open.
async fn code_of(
    channel: &Channel,
    namespace: Option<&str>,
    method: &str,
    message: Vec<u8>,
) -> Option<Status> {
    let open = method.ends_with("/Subscribe") || method.ends_with("/GetContainerEvents");
    let mut client = tonic::client::Grpc::new(channel.clone()).max_decoding_message_size(64 << 20);
    let mut request = tonic::Request::new(stream::iter([message]));
    if let Some(namespace) = namespace {
        request.metadata_mut().insert("containerd-namespace", namespace.parse().unwrap());
    }
    let limit = if open { Duration::from_millis(50) } else { CALL_MAX };
    let answer = tokio::time::timeout(limit, async {
        client.ready().await.unwrap();
        let mut stream =
            client.streaming(request, format!("/{method}").parse().unwrap(), Raw).await?.into_inner();
        while stream.message().await?.is_some() {}
        Ok(())
    });
    match answer.await {
        Ok(Ok(())) => None,
        Ok(Err(status)) => Some(status),
        Err(_) => {
            assert!(open, "{method} hangs");
            None
        }
    }
}

#[test]
fn every_field_bears_what_does_not_belong_there() {
    if !ready(&[STOCK_CTR, RUNC]) {
        return;
    }
    let mut host = Host::new(tests::host::Kind::Gantry);
    // No registry is asked: none may be.
    let folder = host.folder().join("certs.d");
    std::fs::create_dir_all(folder.join("_default")).unwrap();
    let nowhere = "server = 'http://127.0.0.1:1'\ncapabilities = ['push']\n";
    std::fs::write(folder.join("_default/hosts.toml"), nowhere).unwrap();
    let config = host.folder().join("config.toml");
    let text = format!(
        "version = 3\n[plugins.'io.containerd.transfer.v1.local']\nconfig_path = {:?}\n",
        folder.display().to_string()
    );
    std::fs::write(&config, text).unwrap();
    host.arguments = vec!["--config".to_owned(), config.display().to_string()];
    host.start();
    let before = held(&host);
    let set = FileDescriptorSet::decode(proto::FILE_DESCRIPTOR_SET).unwrap();
    let wire = Wire::new(&set);
    let served = block_on(async {
        let channel = channel(&host.address()).await;
        let mut served = Vec::new();
        for file in &set.file {
            for service in &file.service {
                for method in &service.method {
                    let full = format!("{}.{}/{}", file.package(), service.name(), method.name());
                    // Without a message, and so before it is read, what is not served is told from what is; `methods` has
                    // the list of those that may not be.
                    let bare = code_of(&channel, None, &full, Vec::new()).await;
                    if !bare
                        .is_some_and(|bare| bare.code() == Code::Unimplemented && bare.message().is_empty())
                    {
                        served.push((full, method.input_type().to_owned()));
                    }
                }
            }
        }
        served
    });
    assert!(served.len() > 60, "{served:?}");
    // What makes things comes first, and what deletes them last, so that the others find them.
    let mut calls: [Vec<_>; 3] = Default::default();
    for (full, input) in &served {
        let name = full.rsplit('/').next().unwrap();
        let turn = match name {
            "Create" | "Prepare" | "View" | "Write" => 0,
            "Delete" | "Remove" | "Abort" | "DeleteProcess" | "Cleanup" => 2,
            _ => 1,
        };
        let plain = wire.message(input, 0, None);
        calls[turn].push((full, Some(host.namespace.clone()), plain.clone(), "as it should be".to_owned()));
        for elsewhere in
            [None, Some("not/valid".to_owned()), Some("nowhere".to_owned()), Some("x".repeat(1 << 12))]
        {
            calls[turn].push((full, elsewhere, plain.clone(), "in another namespace".to_owned()));
        }
        for (path, field) in wire.fields(input, 0) {
            for (name, evil) in wire.evil(&field) {
                let message = wire.message(input, 0, Some((&path, &evil)));
                let what = format!("field {} at {path:?}: {name}", field.name());
                calls[turn].push((full, Some(host.namespace.clone()), message, what));
            }
        }
    }
    let calls = calls.concat();
    assert!(calls.len() > 1000, "{}", calls.len());
    let codes = block_on(async {
        let mut channels = Vec::new();
        for _ in 0..4 {
            channels.push(channel(&host.address()).await);
        }
        let channels = &channels;
        stream::iter(calls.into_iter().enumerate())
            .map(|(number, (method, namespace, message, what))| async move {
                let begun = Instant::now();
                let status = loop {
                    let namespace = namespace.as_deref();
                    let status = code_of(&channels[number % 4], namespace, method, message.clone()).await;
                    // Another of these calls writes to the same ref.
                    let busy = status.as_ref().is_some_and(|status| status.code() == Code::Unavailable);
                    if !busy || begun.elapsed() > CALL_MAX {
                        break status;
                    }
                    tokio::time::sleep(Duration::from_millis(5)).await;
                };
                (method, what, status)
            })
            .buffer_unordered(16)
            .collect::<Vec<_>>()
            .await
    });
    let excepted = |method: &str, status: &Option<Status>| {
        let said = status.as_ref().map_or("", Status::message);
        UNKNOWN.iter().any(|(name, words, _)| *name == method && said.contains(words))
    };
    let mut counts: BTreeMap<String, usize> = BTreeMap::new();
    let mut wrong = Vec::new();
    for (method, what, status) in &codes {
        let code = status.as_ref().map_or(Code::Ok, Status::code);
        *counts.entry(format!("{code:?}")).or_default() += 1;
        if matches!(code, Code::Unknown | Code::Internal | Code::DataLoss | Code::Unavailable)
            && !excepted(method, status)
        {
            wrong.push(format!("{method}: {what}: {status:?}").chars().take(600).collect::<String>());
        }
    }
    println!("{} calls of {} methods: {counts:?}", codes.len(), served.len());
    for (method, _, why) in UNKNOWN {
        println!("Unknown from {method}: {why}");
    }
    assert!(wrong.is_empty(), "{} of {}:\n{}", wrong.len(), codes.len(), wrong.join("\n"));
    assert!(!std::path::Path::new("/tmp/gantry-escape").exists());
    assert_eq!(host.stock_ctr().run(&["version"]).code, 0, "the engine serves");
    wait_for("the engine to let go of what was asked for", || {
        let now = held(&host);
        now.0 <= before.0 + 5 && now.1 <= before.1 + 5
    });
    host.assert_nothing_left();
}
