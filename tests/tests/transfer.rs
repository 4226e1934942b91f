//! Transfers with the whole engine, by a client that speaks the protocol of streams as containerd's does.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::time::Duration;

use prost_types::Any;
use proto::any;
use proto::containerd::services::leases::v1::leases_client::LeasesClient;
use proto::containerd::services::leases::v1::{CreateRequest, ListRequest, ListResourcesRequest};
use proto::containerd::services::streaming::v1::StreamInit;
use proto::containerd::services::streaming::v1::streaming_client::StreamingClient;
use proto::containerd::services::transfer::v1::transfer_client::TransferClient;
use proto::containerd::services::transfer::v1::{TransferOptions, TransferRequest};
use proto::containerd::types;
use proto::containerd::types::transfer::{
    Data, ImageExportStream, ImageImportStream, ImageReference, ImageStore, OciRegistry, Progress,
    UnpackConfiguration, WindowUpdate,
};
use serde_json::{Value, json};
use tests::client::{channel, in_namespace};
use tests::host::{CONTAINERD, Host, RUNC, STOCK_CTR};
use tests::image::{self, BUSYBOX, Image, NAME};
use tests::{LIMIT, ready};
use tokio::sync::mpsc;
use tonic::transport::Channel;
use tonic::{Code, Request, Status, Streaming};

const PROGRAMS: [&str; 4] = [CONTAINERD, STOCK_CTR, RUNC, BUSYBOX];

fn gantry() -> Option<Host> {
    ready(&PROGRAMS).then(Host::gantry)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async { tokio::time::timeout(LIMIT, future).await.unwrap() })
}

/// A client of one engine.
#[derive(Clone)]
struct Client {
    channel: Channel,
    namespace: String,
    lease: String,
}

/// A stream, as a client has it.
struct Stream {
    requests: mpsc::Sender<Any>,
    answers: Streaming<Any>,
}

impl Client {
    async fn of(host: &Host) -> Client {
        let channel = channel(&host.address()).await;
        Client { channel, namespace: host.namespace.clone(), lease: String::new() }
    }

    fn request<T>(&self, message: T) -> Request<T> {
        let mut request = in_namespace(&self.namespace, message);
        if !self.lease.is_empty() {
            request.metadata_mut().insert("containerd-lease", self.lease.parse().unwrap());
        }
        request
    }

    async fn try_open(&self, first: Any) -> Result<Stream, Status> {
        let (requests, mut stream) = mpsc::channel(4);
        requests.send(first).await.unwrap();
        let request = self.request(futures::stream::poll_fn(move |context| stream.poll_recv(context)));
        let mut answers = StreamingClient::new(self.channel.clone()).stream(request).await?.into_inner();
        let ready = answers.message().await?.unwrap();
        assert_eq!((ready.type_url.as_str(), &ready.value[..]), ("google.protobuf.Empty", &b""[..]));
        Ok(Stream { requests, answers })
    }

    async fn open(&self, id: &str) -> Stream {
        self.try_open(any::pack(&StreamInit { id: id.into() })).await.unwrap()
    }

    async fn transfer(&self, source: Any, destination: Any, progress: &str) -> Result<(), Status> {
        let options = Some(TransferOptions { progress_stream: progress.into() });
        let request = TransferRequest { source: Some(source), destination: Some(destination), options };
        TransferClient::new(self.channel.clone()).transfer(self.request(request)).await.map(drop)
    }

    /// Imports an archive, and tells of its progress.
    async fn import_by(
        &self,
        from: ImageImportStream,
        archive: &[u8],
        to: ImageStore,
    ) -> Result<Vec<Progress>, Status> {
        let told = format!("{}-progress", from.stream);
        let (stream, progress) = (self.open(&from.stream).await, self.open(&told).await);
        let sending = tokio::spawn(stream.send(archive.to_vec()));
        let events = tokio::spawn(progress.events());
        let done = self.transfer(any::pack(&from), any::pack(&to), &told).await;
        sending.await.unwrap();
        let events = events.await.unwrap();
        done.map(|()| events)
    }

    async fn import(&self, archive: &[u8], to: ImageStore) -> Result<Vec<Progress>, Status> {
        let from = ImageImportStream { stream: "import".into(), ..ImageImportStream::default() };
        self.import_by(from, archive, to).await
    }

    async fn export(&self, from: ImageStore, to: ImageExportStream) -> Result<Vec<u8>, Status> {
        let (stream, progress) = (self.open("export").await, self.open("progress").await);
        let receiving = tokio::spawn(stream.receive());
        let events = tokio::spawn(progress.events());
        let to = ImageExportStream { stream: "export".into(), ..to };
        let done = self.transfer(any::pack(&from), any::pack(&to), "progress").await;
        let (archive, events) = (receiving.await.unwrap(), events.await.unwrap());
        done?;
        assert_eq!(names_of(&events), ["Exporting", "Completed export"]);
        Ok(archive)
    }

    /// The leases, by their ids.
    async fn leases(&self) -> Vec<String> {
        let list = self.request(ListRequest::default());
        let list = LeasesClient::new(self.channel.clone()).list(list).await.unwrap().into_inner();
        list.leases.into_iter().map(|lease| lease.id).collect()
    }
}

impl Stream {
    /// Sends bytes as the window allows, and closes this side. The engine may end the stream before.
    async fn send(mut self, bytes: Vec<u8>) {
        let mut window = 0;
        for piece in bytes.chunks(32 << 10) {
            while window < piece.len() {
                let Ok(Some(message)) = self.answers.message().await else { return };
                window += any::unpack::<WindowUpdate>(&message).unwrap().update as usize;
                assert!(window <= 2 << 20, "more than a window on top of what is left");
            }
            window -= piece.len();
            if self.requests.send(any::pack(&Data { data: piece.to_vec() })).await.is_err() {
                return;
            }
        }
        drop(self.requests);
        while let Ok(Some(_)) = self.answers.message().await {}
    }

    /// Receives until the end.
    async fn receive(mut self) -> Vec<u8> {
        const WINDOW: usize = 64 << 10;
        let (mut bytes, mut window) = (Vec::new(), 0);
        loop {
            if window < WINDOW {
                let update = any::pack(&WindowUpdate { update: WINDOW as i32 });
                let _ = self.requests.send(update).await;
                window += WINDOW;
            }
            let Ok(Some(message)) = self.answers.message().await else { return bytes };
            let data = any::unpack::<Data>(&message).unwrap().data;
            assert!(data.len() <= window, "more than was allowed");
            window -= data.len();
            bytes.extend(data);
        }
    }

    async fn events(mut self) -> Vec<Progress> {
        let mut events = Vec::new();
        while let Ok(Some(message)) = self.answers.message().await {
            events.push(any::unpack(&message).unwrap());
        }
        events
    }
}

fn names_of(events: &[Progress]) -> Vec<&str> {
    events.iter().map(|event| event.event.as_str()).collect()
}

/// A store that names images as the archive does.
fn store() -> ImageStore {
    prefixed("docker.io/library/busybox")
}

fn prefixed(name: &str) -> ImageStore {
    let prefix = ImageReference { name: name.into(), is_prefix: true, ..ImageReference::default() };
    ImageStore { extra_references: vec![prefix], ..ImageStore::default() }
}

fn unpacked(store: ImageStore) -> ImageStore {
    let host = oci::Platform::host().normalized();
    let platform =
        Some(types::Platform { os: host.os, architecture: host.architecture, ..Default::default() });
    let unpacks = ["overlayfs", "native"]
        .map(|name| UnpackConfiguration { platform: platform.clone(), snapshotter: name.into() });
    ImageStore { unpacks: unpacks.into(), ..store }
}

/// The image of an OCI layout as `docker save` of old writes it: two names, its second layer as a link to a file.
fn docker_archive(image: &Image) -> Vec<u8> {
    let index: Value = serde_json::from_slice(&image.index).unwrap();
    let blob = |digest: &Value| -> &[u8] {
        let found = image.blobs.iter().find(|(known, _)| Some(known.as_str()) == digest.as_str());
        &found.unwrap().1
    };
    let manifest: Value = serde_json::from_slice(blob(&index["manifests"][0]["digest"])).unwrap();
    let mut tar = tar::Builder::new(Vec::new());
    let mut file = |path: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        tar.append_data(&mut header, path, bytes).unwrap();
    };
    file("config.json", blob(&manifest["config"]["digest"]));
    let mut layers = Vec::new();
    for (number, layer) in manifest["layers"].as_array().unwrap().iter().enumerate() {
        let mut plain = Vec::new();
        let gzip = flate2::read::GzDecoder::new(blob(&layer["digest"]));
        std::io::copy(&mut { gzip }, &mut plain).unwrap();
        file(&format!("stored/{number}.tar"), &plain);
        layers.push(format!("{number}/layer.tar"));
    }
    let entry =
        json!([{"Config": "config.json", "RepoTags": ["busybox:latest", "busybox:2"], "Layers": layers}]);
    file("manifest.json", entry.to_string().as_bytes());
    for (number, name) in layers.iter().enumerate() {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        tar.append_link(&mut header, name, format!("../stored/{number}.tar")).unwrap();
    }
    tar.into_inner().unwrap()
}

fn gzipped(bytes: &[u8]) -> Vec<u8> {
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(bytes).unwrap();
    gzip.finish().unwrap()
}

fn runs(host: &Host, snapshotter: &str) {
    let run = ["run", "--rm", "--snapshotter", snapshotter, NAME, "c", "cat", "etc/replaced-above"];
    assert_eq!(host.stock_ctr().ok(&run), "new\n");
}

fn images(host: &Host) -> Vec<String> {
    host.stock_ctr().ok(&["images", "ls", "-q"]).lines().map(str::to_owned).collect()
}

/// Nothing of any image is left once it is collected.
async fn assert_nothing_kept(host: &Host, client: &Client) {
    assert_eq!(images(host), [""; 0]);
    for _ in 0..1000 {
        if client.leases().await.is_empty() {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert_eq!(client.leases().await, [""; 0]);
    host.ctr().ok(&["gc"]);
    let blobs = host.root().join("io.containerd.content.v1.content/blobs/sha256");
    assert_eq!(fs::read_dir(blobs).map_or(0, Iterator::count), 0);
    assert_eq!(host.stock_ctr().ok(&["content", "active"]).lines().count(), 1);
    assert_eq!(host.stock_ctr().ok(&["snapshots", "ls"]).lines().count(), 1);
}

#[test]
fn an_oci_archive_is_imported_unpacked_and_runs() {
    let Some(host) = gantry() else { return };
    let archive = image::busybox().archive();
    block_on(async {
        let client = Client::of(&host).await;
        let labels = [("made-by".to_owned(), "transfer".to_owned())].into();
        let to = ImageStore { labels, ..unpacked(store()) };
        let events = client.import(&archive, to).await.unwrap();
        assert_eq!(names_of(&events), ["Importing", "saved", "Completed import"]);
        assert_eq!(events[1].name, NAME);
        assert!(events[1].desc.as_ref().unwrap().digest.starts_with("sha256:"));
        assert_eq!(client.leases().await, [""; 0]);
    });
    assert_eq!(images(&host), [NAME]);
    let list = host.stock_ctr().ok(&["images", "ls"]);
    assert!(list.contains("made-by=transfer"), "{list}");
    // The archive's index goes, the image stays: two layers, config and manifest; and is unpacked in both.
    host.ctr().ok(&["gc"]);
    let blobs = host.root().join("io.containerd.content.v1.content/blobs/sha256");
    assert_eq!(fs::read_dir(blobs).unwrap().count(), 4);
    for snapshotter in ["overlayfs", "native"] {
        let list = host.stock_ctr().ok(&["snapshots", "--snapshotter", snapshotter, "ls"]);
        assert_eq!(list.lines().count(), 3, "{list}");
        runs(&host, snapshotter);
    }
    let labels = host.stock_ctr().ok(&["content", "ls"]);
    for label in
        ["containerd.io/gc.ref.content.l.1=", "gc.ref.snapshot.overlayfs=", "containerd.io/uncompressed="]
    {
        assert!(labels.contains(label), "{label}: {labels}");
    }
    host.assert_nothing_left();
}

#[test]
fn a_docker_archive_is_imported_compressed_and_again() {
    let Some(host) = gantry() else { return };
    let plain = docker_archive(&image::busybox());
    let stock = host.stock_ctr();
    let target = || {
        let list = stock.ok(&["images", "ls"]);
        let line = list.lines().find(|line| line.starts_with(NAME)).unwrap().to_owned();
        line.split_whitespace().find(|word| word.starts_with("sha256:")).unwrap().to_owned()
    };
    block_on(async {
        let client = Client::of(&host).await;
        for archive in [plain.clone(), gzipped(&plain)] {
            let events = client.import(&archive, unpacked(store())).await.unwrap();
            assert_eq!(names_of(&events), ["Importing", "saved", "saved", "Completed import"]);
        }
    });
    assert_eq!(images(&host), ["docker.io/library/busybox:2", NAME]);
    runs(&host, "overlayfs");
    let uncompressed = target();
    // As stock containerd makes it of the same archive.
    let theirs = Host::containerd();
    let file = theirs.folder().join("docker.tar");
    fs::write(&file, &plain).unwrap();
    theirs.stock_ctr().ok(&["images", "import", file.to_str().unwrap()]);
    assert!(theirs.stock_ctr().ok(&["images", "ls"]).contains(&uncompressed));
    for name in images(&host) {
        stock.ok(&["images", "rm", "--sync", &name]);
    }
    block_on(async {
        let client = Client::of(&host).await;
        let from = ImageImportStream { stream: "import".into(), force_compress: true, ..Default::default() };
        client.import_by(from.clone(), &plain, unpacked(store())).await.unwrap();
        assert_ne!(target(), uncompressed);
        let compressed = target();
        // What is known to be the same, compressed, is taken.
        client.import(&plain, store()).await.unwrap();
        assert_eq!(target(), compressed);
        // Bytes that are said to be a plain tar are not looked into.
        let from = ImageImportStream { media_type: "application/x-tar".into(), ..from };
        let refused = client.import_by(from, &gzipped(&plain), store()).await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused}");
    });
    runs(&host, "native");
    host.assert_nothing_left();
}

#[test]
fn what_is_exported_has_containerds_bytes_and_goes_back_in() {
    let Some(host) = gantry() else { return };
    let theirs = Host::containerd();
    let image = image::busybox();
    theirs.import();
    let (ours, stock) = (host.folder().join("ours.tar"), theirs.folder().join("stock.tar"));
    theirs.stock_ctr().ok(&["images", "export", stock.to_str().unwrap(), NAME]);
    block_on(async {
        let client = Client::of(&host).await;
        client.import(&image.archive(), store()).await.unwrap();
        let named = |name: &str| ImageStore { name: name.into(), ..ImageStore::default() };
        let archive = client.export(named(NAME), ImageExportStream::default()).await.unwrap();
        fs::write(&ours, &archive).unwrap();
        assert_same_archive(&ours, &stock);
        assert_eq!(archive, client.export(named(NAME), ImageExportStream::default()).await.unwrap());
        // Two names of one image: its blobs are there once.
        client.transfer(any::pack(&named(NAME)), any::pack(&named("a.b/c:2")), "").await.unwrap();
        let both = ImageStore {
            extra_references: vec![ImageReference { name: "a.b/c:2".into(), ..Default::default() }],
            ..named(NAME)
        };
        let skip = ImageExportStream { skip_compatibility_manifest: true, ..Default::default() };
        let archive = client.export(both.clone(), skip).await.unwrap();
        assert!(!String::from_utf8_lossy(&archive).contains("manifest.json"));
        let archive = client.export(both, ImageExportStream::default()).await.unwrap();
        fs::write(&ours, &archive).unwrap();
        let index: Value = serde_json::from_slice(&member(&ours, "index.json")).unwrap();
        assert_eq!(index["manifests"].as_array().unwrap().len(), 2);
        let docker: Value = serde_json::from_slice(&member(&ours, "manifest.json")).unwrap();
        assert_eq!(docker[0]["RepoTags"], json!(["busybox:latest", "a.b/c:2"]));

        for (from, code) in [
            (named("a.b/none:1"), Code::NotFound),
            (named(""), Code::InvalidArgument),
            (prefixed("a.b/c"), Code::Unimplemented),
        ] {
            let refused = client.export(from, ImageExportStream::default()).await.unwrap_err();
            assert_eq!(refused.code(), code, "{refused}");
        }
    });
    theirs.stock_ctr().ok(&["images", "rm", "--sync", NAME]);
    theirs.stock_ctr().ok(&["images", "import", ours.to_str().unwrap()]);
    assert_eq!(images(&theirs), ["a.b/c:2", NAME]);
    runs(&theirs, "overlayfs");
    host.assert_nothing_left();
}

/// An archive's members: headers, and data.
fn members(path: &Path) -> Vec<(Vec<u8>, Vec<u8>)> {
    let mut archive = tar::Archive::new(fs::File::open(path).unwrap());
    let mut members = Vec::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut bytes = Vec::new();
        std::io::copy(&mut entry, &mut bytes).unwrap();
        members.push((entry.header().as_bytes().to_vec(), bytes));
    }
    members
}

fn member(path: &Path, name: &str) -> Vec<u8> {
    let found = members(path).into_iter().find(|(header, _)| header.starts_with(name.as_bytes()));
    found.unwrap().1
}

/// The same bytes, but for the index's own media type, which containerd writes from 1.7 on.
fn assert_same_archive(ours: &Path, theirs: &Path) {
    let told = |path: &Path| -> Vec<(String, String)> {
        let told = |(header, bytes): (Vec<u8>, Vec<u8>)| {
            let end = header.iter().position(|byte| *byte == 0).unwrap();
            let name = String::from_utf8(header[..end].to_vec()).unwrap();
            let header = if name == "index.json" { Vec::new() } else { header };
            let bytes = if name == "index.json" {
                let kind = r#""mediaType":"application/vnd.oci.image.index.v1+json","manifests""#;
                String::from_utf8(bytes).unwrap().replace(kind, r#""manifests""#).into_bytes()
            } else {
                bytes
            };
            (name, oci::Digest::sha256_of(&[header, bytes].concat()).to_string())
        };
        members(path).into_iter().map(told).collect()
    };
    assert_eq!(told(ours), told(theirs));
    let end =
        |path: &Path| fs::read(path).unwrap().split_off(fs::metadata(path).unwrap().len() as usize - 1536);
    assert_eq!(end(ours), end(theirs));
}

#[test]
fn images_are_tagged_and_named_as_the_store_says() {
    let Some(host) = gantry() else { return };
    block_on(async {
        let client = Client::of(&host).await;
        let archive = image::busybox().archive();
        let named = |name: &str| ImageStore { name: name.into(), ..ImageStore::default() };
        client.import(&archive, store()).await.unwrap();
        for _ in 0..2 {
            client.transfer(any::pack(&named(NAME)), any::pack(&named("a.b/c:1")), "").await.unwrap();
        }
        // Type URLs count from their last slash on.
        let mut source = any::pack(&named(NAME));
        source.type_url.insert_str(0, "type.googleapis.com/");
        client.transfer(source, any::pack(&named("a.b/c:2")), "").await.unwrap();
        assert_eq!(images(&host), ["a.b/c:1", "a.b/c:2", NAME]);
        let none = client.transfer(any::pack(&named("no")), any::pack(&named("x")), "").await.unwrap_err();
        assert_eq!(none.code(), Code::NotFound);
        let none = client.transfer(any::pack(&named(NAME)), any::pack(&named("")), "").await.unwrap_err();
        assert_eq!(none.code(), Code::NotFound);

        // The archive as an image, with digests for the images in it, which go with it.
        let mut to = prefixed("d.e/f");
        to.name = "d.e/all:1".into();
        to.extra_references[0].add_digest = true;
        client.import(&archive, to).await.unwrap();
        let list = images(&host);
        assert_eq!(list.len(), 6, "{list:?}");
        host.ctr().ok(&["gc"]);
        assert_eq!(images(&host), list);
        host.stock_ctr().ok(&["images", "rm", "--sync", "d.e/all:1"]);
        assert_eq!(images(&host), ["a.b/c:1", "a.b/c:2", NAME]);

        // Nothing fits: nothing is kept of it.
        let refused = client.import(&archive, prefixed("q.io/other")).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound, "{refused}");
        for (name, code) in [("linux/s390x", Code::NotFound), ("linux/amd64", Code::Ok)] {
            let platform = oci::Platform::parse(name).unwrap();
            let code =
                if platform.normalized() == oci::Platform::host().normalized() { Code::Ok } else { code };
            let platforms = vec![types::Platform {
                os: platform.os,
                architecture: platform.architecture,
                ..Default::default()
            }];
            let done = client.import(&archive, ImageStore { platforms, ..store() }).await;
            assert_eq!(done.map_or_else(|error| error.code(), |_| Code::Ok), code, "{name}");
        }
    });
    host.assert_nothing_left();
}

#[test]
fn a_lease_of_the_client_is_used_and_stays() {
    let Some(host) = gantry() else { return };
    block_on(async {
        let mut client = Client::of(&host).await;
        let mut leases = LeasesClient::new(client.channel.clone());
        let create = CreateRequest { id: "mine".into(), ..CreateRequest::default() };
        leases.create(client.request(create)).await.unwrap();
        client.lease = "mine".into();
        client.import(&image::busybox().archive(), unpacked(store())).await.unwrap();
        assert_eq!(client.leases().await, ["mine"]);
        let list = ListResourcesRequest { id: "mine".into() };
        let held = leases.list_resources(client.request(list)).await.unwrap().into_inner().resources;
        let count = |kind: &str| held.iter().filter(|held| held.r#type == kind).count();
        assert_eq!((count("content"), count("snapshots/overlayfs"), count("ingests")), (5, 2, 0), "{held:?}");
        // What one namespace has, another gets without a copy.
        let other = Client { namespace: format!("{}-b", host.namespace), lease: String::new(), ..client };
        other.import(&image::busybox().archive(), store()).await.unwrap();
        let blobs = host.root().join("io.containerd.content.v1.content/blobs/sha256");
        assert_eq!(fs::read_dir(blobs).unwrap().count(), 5);
        let named = ImageStore { name: NAME.into(), ..ImageStore::default() };
        assert!(!other.export(named, ImageExportStream::default()).await.unwrap().is_empty());
    });
    host.assert_nothing_left();
}

#[test]
fn a_client_that_disappears_leaves_nothing() {
    let Some(host) = gantry() else { return };
    let archive = image::busybox().archive();
    block_on(async {
        let client = Client::of(&host).await;
        let from = any::pack(&ImageImportStream { stream: "import".into(), ..Default::default() });
        // Its stream, with the call waiting: the call fails.
        for half in [0, 100, archive.len() / 2] {
            let stream = client.open("import").await;
            let (caller, from) = (client.clone(), from.clone());
            let call =
                tokio::spawn(async move { caller.transfer(from, any::pack(&unpacked(store())), "").await });
            stream.requests.send(any::pack(&Data { data: archive[..half].to_vec() })).await.unwrap();
            let mut stream = stream;
            stream.answers.message().await.unwrap();
            drop(stream);
            let refused = call.await.unwrap().unwrap_err();
            assert!([Code::Cancelled, Code::InvalidArgument].contains(&refused.code()), "{refused}");
            assert_nothing_kept(&host, &client).await;
        }
        // Its call, with the stream open: the stream is ended.
        let mut stream = client.open("import").await;
        let (caller, from) = (client.clone(), from.clone());
        let call = tokio::spawn(async move { caller.transfer(from, any::pack(&store()), "").await });
        stream.requests.send(any::pack(&Data { data: archive[..1000].to_vec() })).await.unwrap();
        stream.answers.message().await.unwrap();
        call.abort();
        while let Ok(Some(_)) = stream.answers.message().await {}
        assert_nothing_kept(&host, &client).await;
        // A reader in the middle of an export, and a progress reader that does not read.
        client.import(&archive, store()).await.unwrap();
        let (mut stream, _idle) = (client.open("export").await, client.open("progress").await);
        let to = any::pack(&ImageExportStream { stream: "export".into(), ..Default::default() });
        let named = any::pack(&ImageStore { name: NAME.into(), ..ImageStore::default() });
        let caller = client.clone();
        let call = tokio::spawn(async move { caller.transfer(named, to, "progress").await });
        stream.requests.send(any::pack(&WindowUpdate { update: 1000 })).await.unwrap();
        stream.answers.message().await.unwrap();
        drop(stream);
        assert_eq!(call.await.unwrap().unwrap_err().code(), Code::Cancelled);
        host.stock_ctr().ok(&["images", "rm", NAME]);
        assert_nothing_kept(&host, &client).await;
    });
    host.assert_nothing_left();
}

#[test]
fn many_transfers_run_beside_each_other_up_to_a_limit() {
    let Some(host) = gantry() else { return };
    let archive = image::busybox().archive();
    block_on(async {
        let client = Client::of(&host).await;
        let from = |id: &str| ImageImportStream { stream: id.into(), ..Default::default() };
        // The same image at the same time: its layers are unpacked by whoever is first.
        let imports = (0..6).map(|number| {
            let (client, archive, from) = (client.clone(), archive.clone(), from(&number.to_string()));
            tokio::spawn(async move { client.import_by(from, &archive, unpacked(store())).await })
        });
        for import in imports.collect::<Vec<_>>() {
            assert_eq!(import.await.unwrap().unwrap().len(), 3);
        }
        for snapshotter in ["overlayfs", "native"] {
            let list = host.stock_ctr().ok(&["snapshots", "--snapshotter", snapshotter, "ls"]);
            assert_eq!(list.lines().count(), 3, "{list}");
        }
        let (mut streams, mut calls) = (Vec::new(), Vec::new());
        for number in 0..64 {
            let mut stream = client.open(&number.to_string()).await;
            let (caller, from) = (client.clone(), any::pack(&from(&number.to_string())));
            calls.push(tokio::spawn(async move { caller.transfer(from, any::pack(&store()), "").await }));
            // It asks for data: it is under way.
            stream.answers.message().await.unwrap().unwrap();
            streams.push(stream);
        }
        let mut last = client.open("last").await;
        let refused = client.transfer(any::pack(&from("last")), any::pack(&store()), "").await.unwrap_err();
        assert_eq!(refused.code(), Code::ResourceExhausted, "{refused}");
        assert!(last.answers.message().await.unwrap().is_none(), "its stream is ended");
        // Others are served meanwhile.
        runs(&host, "overlayfs");
        drop(streams);
        for call in calls {
            assert!(call.await.unwrap().is_err());
        }
        client.import(&archive, store()).await.unwrap();
        host.stock_ctr().ok(&["images", "rm", "--sync", NAME]);
        assert_nothing_kept(&host, &client).await;
    });
    host.assert_nothing_left();
}

#[test]
fn the_engine_stops_and_is_killed_in_the_middle_of_transfers() {
    if !ready(&PROGRAMS) {
        return;
    }
    let mut host = Host::gantry();
    let archive = image::busybox().archive();
    for stopped in [true, false] {
        let (half, whole) = (archive[..archive.len() / 2].to_vec(), archive.clone());
        block_on(async {
            let client = Client::of(&host).await;
            let mut stream = client.open("import").await;
            let from = any::pack(&ImageImportStream { stream: "import".into(), ..Default::default() });
            let caller = client.clone();
            let call = tokio::spawn(async move { caller.transfer(from, any::pack(&store()), "").await });
            // It waits for what does not come.
            stream.requests.send(any::pack(&Data { data: half })).await.unwrap();
            for _ in 0..2 {
                stream.answers.message().await.unwrap().unwrap();
            }
            let began = std::time::Instant::now();
            if stopped {
                assert!(host.stop().success());
            } else {
                host.kill();
            }
            assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
            assert!(call.await.unwrap().is_err());
        });
        host.start();
        assert_eq!(images(&host), [""; 0]);
        block_on(async {
            let client = Client::of(&host).await;
            client.import(&whole, unpacked(store())).await.unwrap();
            // What the end cut off is held for as long as its lease says, and no longer than a day.
            for lease in client.leases().await {
                host.ctr().ok(&["leases", "rm", "--sync", &lease]);
            }
        });
        runs(&host, "overlayfs");
        host.stock_ctr().ok(&["images", "rm", "--sync", NAME]);
        block_on(async { assert_nothing_kept(&host, &Client::of(&host).await).await });
    }
    host.assert_nothing_left();
}

#[test]
fn what_is_wrong_is_refused_and_leaves_nothing() {
    let Some(host) = gantry() else { return };
    let whole = image::busybox().archive();
    let archive = |members: &[(tar::EntryType, &str, &str, &[u8])]| {
        let mut layer = image::Layer::default();
        for (kind, path, link, bytes) in members {
            layer = layer.entry(*kind, path, link, 0o644, bytes);
        }
        layer.finish()
    };
    use tar::EntryType::{Fifo, Regular, Symlink};
    let layout: (tar::EntryType, &str, &str, &[u8]) =
        (Regular, "oci-layout", "", br#"{"imageLayoutVersion":"1.0.0"}"#);
    let zeros = vec![b' '; 5 << 20];
    let missing = json!({"schemaVersion": 2, "manifests": [{
        "mediaType": "application/vnd.oci.image.manifest.v1+json", "size": 2,
        "digest": oci::Digest::sha256_of(b"none").as_str(),
        "annotations": {"io.containerd.image.name": NAME}}]});
    let missing = missing.to_string();
    let many: Vec<Value> =
        vec![serde_json::from_str::<Value>(&missing).unwrap()["manifests"][0].clone(); 5000];
    let many = json!({"schemaVersion": 2, "manifests": many}).to_string();
    // The config names another layer than there is.
    let layer = oci::Digest::sha256_of(&image::top_layer()).to_string();
    let config = image::image(NAME, &["sh"], &[image::top_layer()]);
    let config = forged(config, &layer, oci::Digest::sha256_of(b"").as_str());
    block_on(async {
        let client = Client::of(&host).await;
        for (what, bytes, why) in [
            ("noise", b"this is no tar at all, whatever it says".repeat(100), "no tar"),
            ("nothing", Vec::new(), "empty"),
            ("cut short", whole[..whole.len() / 2].to_vec(), "cut short"),
            (
                "cut gzip",
                {
                    let z = gzipped(&whole);
                    z[..z.len() / 2].to_vec()
                },
                "",
            ),
            ("out", archive(&[(Regular, "../x.tar", "", b"x")]), "leads out"),
            ("absolute", archive(&[(Regular, "/x.tar", "", b"x")]), "leads out"),
            ("link out", archive(&[(Symlink, "a/x.tar", "../../x", b"")]), "leads out"),
            ("pipe", archive(&[(Fifo, "p", "", b"")]), "neither"),
            ("no image", archive(&[(Regular, "readme", "", b"x")]), "no image"),
            (
                "digest",
                archive(&[(Regular, &format!("blobs/sha256/{}", "0".repeat(64)), "", b"x")]),
                "digest",
            ),
            ("twice", archive(&[(Regular, "x", "", b"x"), (Regular, "x", "", b"y")]), "twice"),
            ("huge index", archive(&[layout, (Regular, "index.json", "", &zeros)]), "larger than the limit"),
            (
                "zipped",
                gzipped(&archive(&[layout, (Regular, "index.json", "", &zeros)])),
                "larger than the limit",
            ),
            ("many", archive(&[layout, (Regular, "index.json", "", many.as_bytes())]), "limit"),
            ("missing", archive(&[layout, (Regular, "index.json", "", missing.as_bytes())]), "lacks 1"),
            ("no file", archive(&[(Regular, "manifest.json", "", br#"[{"Config":"no"}]"#)]), "lacks"),
            ("diff id", config.archive(), "the image's config says"),
        ] {
            let refused = client.import(&bytes, unpacked(store())).await.unwrap_err();
            assert_eq!(refused.code(), Code::InvalidArgument, "{what}: {refused}");
            assert!(refused.message().contains(why), "{what}: {refused}");
            assert_nothing_kept(&host, &client).await;
        }
        let snapshotter = UnpackConfiguration { platform: None, snapshotter: "zfs".into() };
        let to = ImageStore { unpacks: vec![snapshotter], ..store() };
        assert_eq!(client.import(&whole, to).await.unwrap_err().code(), Code::InvalidArgument);
        assert_nothing_kept(&host, &client).await;
    });
    assert_eq!(host.import(), NAME);
    runs(&host, "overlayfs");
    host.assert_nothing_left();
}

/// The image with another text in its config, and the digests that follow from it.
fn forged(mut image: Image, from: &str, to: &str) -> Image {
    let swap = |bytes: &[u8], from: &str, to: &str| {
        String::from_utf8(bytes.to_vec()).unwrap().replace(from, to).into_bytes()
    };
    let (mut from, mut to) = (from.to_owned(), to.to_owned());
    for what in ["diff_ids", "schemaVersion"] {
        let holds = |bytes: &[u8]| bytes.starts_with(b"{") && String::from_utf8_lossy(bytes).contains(what);
        let (digest, bytes) = image.blobs.iter_mut().find(|(_, bytes)| holds(bytes)).unwrap();
        *bytes = swap(bytes, &from, &to);
        let new = oci::Digest::sha256_of(bytes);
        (from, to) = (digest.to_string(), new.to_string());
        *digest = new;
    }
    image.index = swap(&image.index, &from, &to);
    image
}

#[test]
fn streams_and_places_that_are_not_right_are_refused() {
    let Some(host) = gantry() else { return };
    block_on(async {
        let client = Client::of(&host).await;
        let code = |done: Result<(), Status>| done.map_or_else(|status| status.code(), |()| Code::Ok);
        let init = |id: &str| any::pack(&StreamInit { id: id.into() });
        for (first, wanted) in [
            (init(""), Code::InvalidArgument),
            (init(&"x".repeat(1000)), Code::InvalidArgument),
            (any::pack(&Data { data: vec![1] }), Code::InvalidArgument),
            (Any::default(), Code::InvalidArgument),
        ] {
            assert_eq!(code(client.try_open(first).await.map(drop)), wanted);
        }
        let stream = client.open("s").await;
        assert_eq!(code(client.try_open(init("s")).await.map(drop)), Code::AlreadyExists);
        let import = |id: &str| any::pack(&ImageImportStream { stream: id.into(), ..Default::default() });
        let export = |id: &str| any::pack(&ImageExportStream { stream: id.into(), ..Default::default() });
        let named = any::pack(&ImageStore { name: "a.b/c:1".into(), ..ImageStore::default() });
        let to = any::pack(&store());
        assert_eq!(code(client.transfer(import("none"), to.clone(), "").await), Code::NotFound);
        assert_eq!(code(client.transfer(named.clone(), export("none"), "").await), Code::NotFound);
        assert_eq!(code(client.transfer(named.clone(), named.clone(), "none").await), Code::NotFound);
        // For its progress and for its data, and by two calls.
        let twice = client.transfer(import("s"), to.clone(), "s").await;
        assert_eq!(code(twice), Code::FailedPrecondition);
        drop(stream);
        let mut stream = loop {
            // The refusal has ended it; the name is free once its client has seen that.
            match client.try_open(init("s")).await {
                Ok(stream) => break stream,
                Err(status) => assert_eq!(status.code(), Code::AlreadyExists),
            }
        };
        let (caller, from, into) = (client.clone(), import("s"), to.clone());
        let first = tokio::spawn(async move { caller.transfer(from, into, "").await });
        stream.answers.message().await.unwrap().unwrap();
        assert_eq!(code(client.transfer(import("s"), to.clone(), "").await), Code::FailedPrecondition);
        // Another namespace's streams are not to be seen.
        let other = Client { namespace: format!("{}-b", host.namespace), ..client.clone() };
        assert_eq!(code(other.transfer(import("s"), to.clone(), "").await), Code::NotFound);
        drop(stream);
        assert_ne!(code(first.await.unwrap()), Code::Ok);

        let registry = any::pack(&OciRegistry { reference: "a.b/c:1".into(), resolver: None });
        for (source, destination) in [
            (registry.clone(), registry.clone()),
            (registry.clone(), export("y")),
            (import("x"), export("y")),
            (any::wrap("what.Ever", []), registry),
        ] {
            let kinds = [any::name(&source).to_owned(), any::name(&destination).to_owned()];
            let refused = client.transfer(source, destination, "").await.unwrap_err();
            assert_eq!(refused.code(), Code::Unimplemented);
            assert!(kinds.iter().all(|kind| refused.message().contains(kind)), "{refused}");
        }
        let broken = any::wrap("containerd.types.transfer.ImageStore", [0x0a, 9]);
        assert_eq!(code(client.transfer(broken, named, "").await), Code::InvalidArgument);
        assert_nothing_kept(&host, &client).await;
    });
    let plugins = host.stock_ctr().ok(&["plugins", "ls"]);
    for (kind, id) in [("io.containerd.transfer.v1", "local"), ("io.containerd.streaming.v1", "manager")] {
        let listed = plugins.lines().any(|line| {
            let words: Vec<&str> = line.split_whitespace().collect();
            words[..2] == [kind, id] && words.last() == Some(&"ok")
        });
        assert!(listed, "{plugins}");
    }
    host.assert_nothing_left();
}

/// The manifest of an image, with its digest.
fn manifest(image: &mut Image) -> &mut (oci::Digest, Vec<u8>) {
    let is_manifest = |bytes: &[u8]| String::from_utf8_lossy(bytes).contains("schemaVersion");
    image.blobs.iter_mut().find(|(_, bytes)| is_manifest(bytes)).unwrap()
}

/// An image of two platforms, each with a layer of its own; that of the second, s390x, may not be given on.
fn of_two_platforms() -> Image {
    let host = oci::Platform::host().normalized().architecture;
    let mut first = image::image(NAME, &["sh"], &[image::top_layer()]);
    let layer = image::Layer::default().file("other", 0o644, b"s390x").finish();
    let second = image::image(NAME, &["sh"], &[layer]);
    let mut second = forged(second, &format!("\"{host}\""), "\"s390x\"");
    let (digest, bytes) = manifest(&mut second);
    let text = String::from_utf8(bytes.clone()).unwrap();
    *bytes = text.replace("layer.v1.tar+gzip", "layer.nondistributable.v1.tar+gzip").into_bytes();
    *digest = oci::Digest::sha256_of(bytes);
    let describe = |kind: &str, (digest, bytes): &(oci::Digest, Vec<u8>)| json!({"mediaType": kind, "digest": digest.as_str(), "size": bytes.len()});
    let mut entries = Vec::new();
    for (image, architecture) in [(&mut first, host.as_str()), (&mut second, "s390x")] {
        let mut entry = describe("application/vnd.oci.image.manifest.v1+json", manifest(image));
        entry["platform"] = json!({"os": "linux", "architecture": architecture});
        entries.push(entry);
    }
    let kind = "application/vnd.oci.image.index.v1+json";
    let index = json!({"schemaVersion": 2, "mediaType": kind, "manifests": entries}).to_string().into_bytes();
    let index = (oci::Digest::sha256_of(&index), index);
    let mut top = describe(kind, &index);
    top["annotations"] = json!({"io.containerd.image.name": NAME});
    let mut blobs = first.blobs;
    blobs.append(&mut second.blobs);
    blobs.push(index);
    Image { blobs, index: json!({"schemaVersion": 2, "manifests": [top]}).to_string().into_bytes() }
}

#[test]
fn platforms_are_chosen_both_ways() {
    let Some(host) = gantry() else { return };
    let image = of_two_platforms();
    let whole = image.archive();
    let platform = |name: &str| {
        let platform = oci::Platform::parse(name).unwrap().normalized();
        types::Platform { os: platform.os, architecture: platform.architecture, ..Default::default() }
    };
    let (here, there) = (platform(&oci::Platform::host().to_string()), platform("linux/s390x"));
    let blobs = || {
        host.ctr().ok(&["gc"]);
        let folder = host.root().join("io.containerd.content.v1.content/blobs/sha256");
        fs::read_dir(folder).map_or(0, Iterator::count)
    };
    let exported = |bytes: &[u8]| {
        let file = host.folder().join("exported.tar");
        fs::write(&file, bytes).unwrap();
        members(&file)
            .iter()
            .filter(|(header, _)| header.starts_with(b"blobs/sha256/") && header[13] != 0)
            .count()
    };
    block_on(async {
        let client = Client::of(&host).await;
        let remove = || host.stock_ctr().ok(&["images", "rm", "--sync", NAME]);
        let named = ImageStore { name: NAME.into(), ..ImageStore::default() };
        let export = |platforms: &[types::Platform]| ImageExportStream {
            platforms: platforms.into(),
            ..Default::default()
        };
        // The index, all of one platform, and the bare manifest of the other, which the index keeps.
        let one = ImageStore { platforms: vec![here.clone()], ..store() };
        client.import(&whole, one.clone()).await.unwrap();
        assert_eq!(blobs(), 5);
        let all = ImageExportStream { all_platforms: true, ..Default::default() };
        let refused = client.export(named.clone(), all.clone()).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound, "{refused}");
        let part = client.export(named.clone(), ImageExportStream::default()).await.unwrap();
        assert_eq!(exported(&part), 4);
        remove();
        // An archive that has one platform of an index is whole enough.
        client.import(&part, store()).await.unwrap();
        assert_eq!(blobs(), 4);
        remove();
        client.import(&whole, ImageStore { all_metadata: true, ..one }).await.unwrap();
        assert_eq!(blobs(), 7);
        remove();
        let limited =
            ImageStore { platforms: vec![there.clone(), here.clone()], manifest_limit: 1, ..store() };
        client.import(&whole, limited).await.unwrap();
        assert_eq!(blobs(), 5);
        let refused = client.export(named.clone(), ImageExportStream::default()).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound, "{refused}");
        remove();
        // Unpacked is what the request says, and nothing else.
        client.import(&whole, unpacked(store())).await.unwrap();
        assert_eq!(blobs(), 7);
        assert_eq!(host.stock_ctr().ok(&["snapshots", "ls"]).lines().count(), 2);
        assert_eq!(exported(&client.export(named.clone(), all).await.unwrap()), 7);
        assert_eq!(
            exported(&client.export(named.clone(), export(std::slice::from_ref(&there))).await.unwrap()),
            4
        );
        let skip = ImageExportStream { skip_non_distributable: true, ..export(&[there]) };
        let part = client.export(named.clone(), skip).await.unwrap();
        assert_eq!(exported(&part), 3);
        let refused = client.export(named, export(&[platform("linux/riscv64")])).await.unwrap_err();
        assert_eq!(refused.code(), Code::NotFound, "{refused}");
        assert!(refused.message().contains("s390x"), "{refused}");
        remove();
        client.import(&part, store()).await.unwrap();
        assert_eq!(blobs(), 3);
        remove();
        let text = String::from_utf8(image.index.clone()).unwrap();
        let lying = Image { index: text.replace("\"size\":", "\"size\":1").into_bytes(), ..image };
        let refused = client.import(&lying.archive(), store()).await.unwrap_err();
        assert!(refused.message().contains("is said to have"), "{refused}");
        assert_nothing_kept(&host, &client).await;
    });
    host.assert_nothing_left();
}
