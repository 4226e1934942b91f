//! Pulls, from a registry of Debian's on loopback, by the parts of the engine that take part in one.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write as _;
use std::net::TcpListener;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use flate2::write::GzEncoder;
use serde_json::json;
use snapshotter::Kind;

use super::*;
use crate::content::FOLDER;
use crate::context::Namespace;
use crate::events::Exchange;
use crate::metadata::Metadata;

const LIMIT: Duration = Duration::from_secs(120);

/// A registry with its folder, which both go with it.
struct Registry {
    child: Child,
    address: String,
    folder: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn ready() -> bool {
    let there = |program: &&str| Path::new("/usr/bin").join(program).exists();
    let missing: Vec<_> = ["docker-registry", "skopeo"].into_iter().filter(|name| !there(name)).collect();
    assert!(missing.is_empty() || std::env::var_os("GANTRY_TEST_ALL").is_none(), "{missing:?} not installed");
    if !missing.is_empty() {
        println!("SKIPPED: {missing:?} not installed");
    }
    missing.is_empty()
}

impl Registry {
    fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        // Another may take the port in between: then the registry ends, and the next is tried.
        loop {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let address = format!("127.0.0.1:{port}");
            let config = folder.path().join("config.yml");
            let root = folder.path().join("registry");
            let text = format!(
                "version: 0.1\nlog: {{level: error, accesslog: {{disabled: true}}}}\n\
                 storage: {{filesystem: {{rootdirectory: {}}}}}\nhttp: {{addr: '{address}'}}\n",
                root.display()
            );
            fs::write(&config, text).unwrap();
            let mut child = Command::new("docker-registry")
                .arg("serve")
                .arg(&config)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            while child.try_wait().unwrap().is_none() {
                if std::net::TcpStream::connect(&address).is_ok() {
                    return Registry { child, address, folder };
                }
                std::thread::sleep(Duration::from_millis(5));
            }
        }
    }

    /// Puts an image of these layers, each a list of files, into the registry.
    fn put(&self, name: &str, layers: &[Vec<(String, Vec<u8>)>]) {
        let layout = self.folder.path().join("layout").join(name);
        let blobs = layout.join("blobs/sha256");
        fs::create_dir_all(&blobs).unwrap();
        let put = |bytes: &[u8], kind: &str| {
            let digest = oci::Digest::sha256_of(bytes);
            fs::write(blobs.join(digest.hex()), bytes).unwrap();
            json!({"mediaType": kind, "digest": digest.to_string(), "size": bytes.len()})
        };
        let (mut ids, mut described) = (Vec::new(), Vec::new());
        for files in layers {
            let mut tar = tar::Builder::new(Vec::new());
            for (path, data) in files {
                let mut header = tar::Header::new_gnu();
                header.set_size(data.len() as u64);
                header.set_mode(0o644);
                tar.append_data(&mut header, path, &data[..]).unwrap();
            }
            let tar = tar.into_inner().unwrap();
            ids.push(oci::Digest::sha256_of(&tar).to_string());
            let mut gzip = GzEncoder::new(Vec::new(), flate2::Compression::fast());
            gzip.write_all(&tar).unwrap();
            let kind = oci::image::media_type::OCI_LAYER_GZIP;
            described.push(put(&gzip.finish().unwrap(), kind));
        }
        let host = oci::Platform::host();
        let config = json!({"architecture": host.architecture, "os": host.os, "rootfs": {"type": "layers", "diff_ids": ids}});
        let config = put(config.to_string().as_bytes(), oci::image::media_type::OCI_CONFIG);
        let kind = oci::image::media_type::OCI_MANIFEST;
        let manifest = json!({"schemaVersion": 2, "mediaType": kind, "config": config, "layers": described});
        let mut manifest = put(manifest.to_string().as_bytes(), kind);
        manifest["annotations"] = json!({"org.opencontainers.image.ref.name": "it"});
        fs::write(layout.join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        fs::write(
            layout.join("index.json"),
            json!({"schemaVersion": 2, "manifests": [manifest]}).to_string(),
        )
        .unwrap();
        let copied = Command::new("skopeo")
            .args(["copy", "--quiet", "--insecure-policy", "--dest-tls-verify=false"])
            .arg(format!("oci:{}:it", layout.display()))
            .arg(format!("docker://{}/{name}:1", self.address))
            .status()
            .unwrap();
        assert!(copied.success());
    }
}

/// The parts of an engine that transfers need, on a folder.
struct Engine {
    transfers: Transfers,
    context: RequestContext,
    folder: tempfile::TempDir,
}

impl Engine {
    /// To be called where blocking is fine.
    fn on(folder: tempfile::TempDir, settings: crate::remotes::Settings) -> Self {
        let open = move || {
            let root = folder.path();
            let metadata = Metadata::open(&root.join("metadata")).unwrap();
            let events = Exchange::default();
            let content = Content::open(&root.join(FOLDER), metadata.clone(), events.clone()).unwrap();
            let transfers = Transfers::new(
                content.clone(),
                Diff::open(content, root.join("mounts")).unwrap(),
                Images::new(metadata.clone(), events.clone()),
                Leases::new(metadata.clone()),
                Remotes::new(settings).unwrap(),
                Snapshots::open(root, metadata.clone(), events, &[]).unwrap(),
                Streams::default(),
            );
            let context = RequestContext::internal(Namespace::new("a").unwrap());
            Engine { transfers, context, folder }
        };
        std::thread::spawn(open).join().unwrap()
    }

    fn new() -> Self {
        Engine::on(tempfile::tempdir().unwrap(), crate::remotes::Settings::default())
    }

    async fn pull(&self, name: &str, snapshotter: &str) -> Result<()> {
        let unpack = proto::containerd::types::transfer::UnpackConfiguration {
            snapshotter: snapshotter.into(),
            ..Default::default()
        };
        let registry = OciRegistry { reference: name.into(), ..OciRegistry::default() };
        let store = ImageStore { name: name.into(), unpacks: vec![unpack], ..ImageStore::default() };
        let transfer =
            self.transfers.transfer(&self.context, Place::Registry(registry), Place::Store(store), "");
        tokio::time::timeout(LIMIT, transfer).await.unwrap()
    }

    /// What is left of transfers that are over.
    async fn left(&self, snapshotter: &str) -> Vec<String> {
        let statuses = self.transfers.content.list_statuses(&self.context, &[]).await.unwrap();
        let active = self.transfers.snapshots.list(&self.context, snapshotter, &[]).await.unwrap();
        let active = active.into_iter().filter(|info| info.kind != Kind::Committed).map(|info| info.key);
        let leases = self.transfers.leases.list(&self.context, &[]).unwrap();
        let leases = leases.into_iter().map(|lease| lease.id);
        statuses.into_iter().map(|status| status.r#ref).chain(active).chain(leases).collect()
    }

    /// The files of an unpacked image, as its container would see them.
    async fn files(&self, name: &str, snapshotter: &str) -> BTreeMap<String, Vec<u8>> {
        let image = self.transfers.images.get(&self.context, name).unwrap();
        let content = &self.transfers.content;
        let read = |digest: &str| {
            let (file, _) = content.open_blob(&self.context, &digest.parse().unwrap()).unwrap();
            serde_json::from_reader::<_, serde_json::Value>(file).unwrap()
        };
        let manifest = read(&image.target.unwrap().digest);
        let config: oci::Digest = manifest["config"]["digest"].as_str().unwrap().parse().unwrap();
        let labels = content.info(&self.context, &config).unwrap().labels;
        let top = &labels[&format!("containerd.io/gc.ref.snapshot.{snapshotter}")];
        for layer in manifest["layers"].as_array().unwrap() {
            let digest: oci::Digest = layer["digest"].as_str().unwrap().parse().unwrap();
            let labels = content.info(&self.context, &digest).unwrap().labels;
            assert!(labels.contains_key("containerd.io/uncompressed"), "{labels:?}");
            assert!(labels.keys().any(|key| key.starts_with("containerd.io/distribution.source.")));
        }
        let new = crate::snapshots::New {
            key: format!("view-{name}"),
            parent: top.clone(),
            labels: BTreeMap::new(),
            kind: Kind::View,
        };
        let mounts = self.transfers.snapshots.create(&self.context, snapshotter, new).await.unwrap();
        let mounted = sys::mount::Mounted::new(&mounts, self.folder.path()).unwrap();
        let (mut files, mut todo) = (BTreeMap::new(), vec![mounted.path().to_owned()]);
        while let Some(folder) = todo.pop() {
            for entry in fs::read_dir(folder).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    todo.push(path);
                } else {
                    let name = path.strip_prefix(mounted.path()).unwrap().display().to_string();
                    files.insert(name, fs::read(path).unwrap());
                }
            }
        }
        drop(mounted);
        self.transfers.snapshots.remove(&self.context, snapshotter, format!("view-{name}")).await.unwrap();
        files
    }
}

/// Bytes that do not compress.
fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut next = || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    };
    (0..length).map(|_| next()).collect()
}

fn layers(seed: u64, count: u64) -> Vec<Vec<(String, Vec<u8>)>> {
    let layer = |number: u64| {
        vec![
            (format!("of/layer-{number}"), noise(seed + number, 300_000 + number as usize * 77_777)),
            ("of/all".into(), format!("{number}").into_bytes()),
            (format!("of/.wh.layer-{}", number.wrapping_sub(2)), Vec::new()),
        ]
    };
    (0..count).map(layer).collect()
}

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_and_unpacked_by_every_way_of_unpacking() {
    if !ready() {
        return;
    }
    let registry = Registry::start();
    registry.put("some/image", &layers(1, 4));
    let name = format!("{}/some/image:1", registry.address);
    let pieces = crate::remotes::Settings { fetch_buffer: 65_536, ..Default::default() };
    for (snapshotter, settings) in [
        ("overlayfs", crate::remotes::Settings::default()),
        ("native", crate::remotes::Settings::default()),
        ("overlayfs", pieces),
    ] {
        let engine = Engine::on(tempfile::tempdir().unwrap(), settings);
        engine.pull(&name, snapshotter).await.unwrap();
        assert_eq!(engine.left(snapshotter).await, [""; 0]);
        let files = engine.files(&name, snapshotter).await;
        let names: Vec<_> = files.keys().map(String::as_str).collect();
        assert_eq!(names, ["of/all", "of/layer-2", "of/layer-3"], "{snapshotter}");
        assert_eq!(files["of/all"], b"3");
        assert!(files["of/layer-2"] == noise(3, 300_000 + 2 * 77_777));
        // Once more, with nothing to do, and after a start.
        engine.pull(&name, snapshotter).await.unwrap();
        assert_eq!(engine.left(snapshotter).await, [""; 0]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_at_the_same_time_share_what_they_have_in_common() {
    if !ready() {
        return;
    }
    let registry = Registry::start();
    let base = layers(5, 3);
    let mut names = Vec::new();
    for number in 0..4_u64 {
        let name = format!("image-{number}");
        let mut layers = base.clone();
        layers.push(vec![(format!("of/own-{number}"), noise(100 + number, 200_000))]);
        registry.put(&name, &layers);
        names.push(format!("{}/{name}:1", registry.address));
    }
    let engine = Engine::new();
    // Each of them twice.
    let pulls = names.iter().chain(&names).map(|name| engine.pull(name, "overlayfs"));
    for pulled in futures::future::join_all(pulls).await {
        pulled.unwrap();
    }
    assert_eq!(engine.left("overlayfs").await, [""; 0]);
    let snapshots = engine.transfers.snapshots.list(&engine.context, "overlayfs", &[]).await.unwrap();
    assert_eq!(snapshots.len(), 3 + 4);
    for (number, name) in names.iter().enumerate() {
        let files = engine.files(name, "overlayfs").await;
        assert!(files[&format!("of/own-{number}")] == noise(100 + number as u64, 200_000));
        assert!(files["of/layer-2"] == noise(7, 300_000 + 2 * 77_777));
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_is_not_what_its_manifest_says_leaves_nothing_to_go_on_with() {
    if !ready() {
        return;
    }
    let registry = Registry::start();
    registry.put("bad", &layers(9, 3));
    // Changed behind the registry's back: one byte, and one more.
    let mut largest: Vec<_> = Vec::new();
    let mut todo = vec![registry.folder.path().join("registry")];
    while let Some(folder) = todo.pop() {
        for entry in fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                todo.push(path);
            } else {
                largest.push((fs::metadata(&path).unwrap().len(), path));
            }
        }
    }
    let (_, path) = largest.into_iter().max().unwrap();
    let whole = fs::read(&path).unwrap();
    let mut changed = whole.clone();
    let middle = changed.len() / 2;
    changed[middle] ^= 1;
    fs::write(&path, &changed).unwrap();
    let name = format!("{}/bad:1", registry.address);
    let engine = Engine::new();
    let error = engine.pull(&name, "overlayfs").await.unwrap_err().to_string();
    assert!(error.contains("digest") || error.contains("layer"), "{error}");
    assert!(engine.transfers.images.get(&engine.context, &name).is_err());
    // What was right may be gone on with; what was wrong is not there.
    assert!(engine.left("overlayfs").await.iter().all(|left| !left.starts_with("extract-")));
    fs::write(&path, &whole).unwrap();
    engine.pull(&name, "overlayfs").await.unwrap();
    assert_eq!(engine.left("overlayfs").await, [""; 0]);
    assert_eq!(engine.files(&name, "overlayfs").await.len(), 3);
}
