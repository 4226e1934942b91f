//! Parts of the engine that other processes serve: a second gantryd is the first one's snapshotter and differ, and programs
//! turn blobs of their own types into layers.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::path::Path;

use oci::Digest;
use proto::containerd::services::content::v1::content_client::ContentClient;
use proto::containerd::services::content::v1::{ReadContentRequest, WriteAction, WriteContentRequest};
use proto::containerd::services::diff::v1::ApplyRequest;
use proto::containerd::services::diff::v1::diff_client::DiffClient;
use proto::containerd::services::snapshots::v1::PrepareSnapshotRequest;
use proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use proto::containerd::types::{Descriptor, Mount};
use tests::client::{channel, in_namespace};
use tests::host::{Host, Kind, RUNC, STOCK_CTR};
use tests::image::{self, BUSYBOX, NAME};
use tests::ready;
use tonic::Code;

/// An engine with this configuration.
fn with_config(config: &str) -> Host {
    let mut host = Host::new(Kind::Gantry);
    let path = host.folder().join("config.toml");
    fs::write(&path, format!("version = 3\n[debug]\nlevel = 'debug'\n{config}")).unwrap();
    host.arguments = vec!["--config".into(), path.display().to_string()];
    host.start();
    host
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// The layers on disk of an engine's overlays.
fn layers(host: &Host) -> usize {
    let folder = host.root().join("io.containerd.snapshotter.v1.overlayfs/snapshots");
    fs::read_dir(folder).map_or(0, Iterator::count)
}

#[test]
fn a_snapshotter_of_another_process() {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX]) {
        return;
    }
    let mut second = Host::gantry();
    let mut host = with_config(&format!(
        "[proxy_plugins.remote]\ntype = 'snapshot'\naddress = '{}'\nsnapshotter = 'overlayfs'\n\
         [proxy_plugins.remote.exports]\nroot = '/somewhere'\n",
        second.address().display()
    ));
    let archive = host.folder().join("busybox.tar");
    image::busybox().write(&archive).unwrap();
    let (stock, ours) = (host.stock_ctr(), host.ctr());
    let plugins = ours.ok(&["plugins", "ls"]);
    assert!(
        plugins.lines().any(|line| line.contains("snapshotter.v1") && line.contains("remote")),
        "{plugins}"
    );
    stock.ok(&["images", "import", "--snapshotter", "remote", archive.to_str().unwrap()]);
    let run = ["run", "--rm", "--snapshotter", "remote", NAME, "c", "sh", "-c", "echo x > /new && cat /new"];
    assert_eq!(stock.ok(&run), "x\n");
    // The layers are with the other one alone.
    assert_eq!((layers(&second), layers(&host)), (2, 0));
    let usage = ours.ok(&["snapshots", "--snapshotter", "remote", "usage"]);
    assert!(usage.lines().count() == 3, "{usage}");

    // What it made by itself, as one that mounts layers from a registry does, is taken up under the name that was asked for.
    let mut there = second.stock_ctr();
    there.namespace = "default".into();
    there.ok(&["snapshots", "prepare", "k"]);
    there.ok(&["snapshots", "commit", "made-there", "k"]);
    there.ok(&[
        "snapshots",
        "label",
        "made-there",
        "containerd.io/gc.root=x",
        "containerd.io/snapshot.ref=made-there",
    ]);
    ours.ok(&["leases", "create", "--id", "l"]);
    let prepare = PrepareSnapshotRequest {
        snapshotter: "remote".into(),
        key: "new".into(),
        labels: [("containerd.io/snapshot.ref".to_owned(), "made-there".to_owned())].into(),
        ..PrepareSnapshotRequest::default()
    };
    let prepared = block_on(async {
        let mut snapshots = SnapshotsClient::new(channel(&host.address()).await);
        let mut request = in_namespace(&host.namespace, prepare);
        request.metadata_mut().insert("containerd-lease", "l".parse().unwrap());
        snapshots.prepare(request).await
    });
    assert_eq!(prepared.unwrap_err().code(), Code::AlreadyExists);
    let info = ours.ok(&["snapshots", "--snapshotter", "remote", "info", "made-there"]);
    assert!(info.contains("Committed"), "{info}");
    ours.ok(&["snapshots", "--snapshotter", "remote", "rm", "made-there"]);
    assert!(there.fails(&["snapshots", "info", "made-there"]).contains("does not exist"));

    // While it is away, its snapshots are not to be had, and all else is.
    second.stop();
    let away = stock.fails(&run);
    assert!(away.contains("cannot be reached"), "{away}");
    stock.ok(&["images", "import", "--snapshotter", "native", archive.to_str().unwrap()]);
    let native: Vec<&str> = run.iter().map(|word| if *word == "remote" { "native" } else { word }).collect();
    assert_eq!(stock.ok(&native), "x\n");
    // An engine that starts meanwhile takes it up when it is there.
    host.kill();
    host.start();
    assert!(stock.fails(&run).contains("cannot be reached"));
    second.start();
    assert_eq!(stock.ok(&run), "x\n");

    // Collected there, too.
    stock.ok(&["images", "rm", "--sync", NAME]);
    ours.ok(&["gc"]);
    assert_eq!(layers(&second), 0);
    host.assert_nothing_left();
    second.assert_nothing_left();
}

/// Puts a blob into the content store; its digest.
async fn put(host: &Host, blob: &[u8]) -> String {
    put_at(host, &host.namespace, blob).await
}

/// The request that makes a blob of these bytes.
fn commit_of(blob: &[u8]) -> WriteContentRequest {
    let digest = Digest::sha256_of(blob).to_string();
    WriteContentRequest {
        action: WriteAction::Commit.into(),
        r#ref: digest.clone(),
        total: blob.len() as i64,
        expected: digest,
        data: blob.to_vec().into(),
        labels: [("containerd.io/gc.root".to_owned(), "x".to_owned())].into(),
        ..WriteContentRequest::default()
    }
}

async fn put_at(host: &Host, namespace: &str, blob: &[u8]) -> String {
    let message = commit_of(blob);
    let digest = message.expected.clone();
    let mut content = ContentClient::new(channel(&host.address()).await);
    let request = in_namespace(namespace, futures::stream::iter([message]));
    let mut answers = content.write(request).await.unwrap().into_inner();
    while answers.message().await.unwrap().is_some() {}
    digest
}

async fn apply(
    host: &Host,
    digest: &str,
    media_type: &str,
    folder: &Path,
) -> Result<Descriptor, tonic::Status> {
    let mount = Mount {
        r#type: "bind".into(),
        source: folder.display().to_string(),
        options: vec!["rbind".into()],
        ..Mount::default()
    };
    let layer = Descriptor { media_type: media_type.into(), digest: digest.into(), ..Descriptor::default() };
    let message = ApplyRequest { diff: Some(layer), mounts: vec![mount], ..ApplyRequest::default() };
    let mut differ = DiffClient::new(channel(&host.address()).await);
    Ok(differ.apply(in_namespace(&host.namespace, message)).await?.into_inner().applied.unwrap())
}

#[tokio::test]
async fn programs_make_layers_of_blobs() {
    if !ready(&[STOCK_CTR]) {
        return;
    }
    // Bytes turned round by 13, as a stand-in for an encryption.
    let host = with_config(
        "[stream_processors.turned]\naccepts = ['application/vnd.test.layer+turned']\n\
         returns = 'application/vnd.oci.image.layer.v1.tar+gzip'\npath = '/usr/bin/tr'\n\
         args = ['\\000-\\377', '\\015-\\377\\000-\\014']\nenv = ['LC_ALL=C']\n\
         [stream_processors.broken]\naccepts = ['application/vnd.test.layer+broken']\n\
         returns = 'application/vnd.oci.image.layer.v1.tar'\npath = '/bin/sh'\nargs = ['-c', 'echo no key >&2; exit 1']\n",
    );
    let layer = image::base_layer();
    let turned: Vec<u8> = layer.iter().map(|byte| byte.wrapping_sub(13)).collect();
    let (plain, folder) = (host.folder().join("plain"), host.folder().join("turned"));
    fs::create_dir(&plain).unwrap();
    fs::create_dir(&folder).unwrap();
    let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
    let wanted = apply(&host, &put(&host, &layer).await, media_type, &plain).await.unwrap();
    let digest = put(&host, &turned).await;
    let made = apply(&host, &digest, "application/vnd.test.layer+turned", &folder).await.unwrap();
    assert_eq!(made, wanted);
    assert_eq!(fs::read_dir(&folder).unwrap().count(), fs::read_dir(&plain).unwrap().count());
    let broken = apply(&host, &digest, "application/vnd.test.layer+broken", &folder).await.unwrap_err();
    assert!(broken.message().contains("no key"), "{broken}");
    let unknown = apply(&host, &digest, "application/vnd.test.layer+unknown", &folder).await.unwrap_err();
    assert_eq!(unknown.code(), Code::Unimplemented);
}

#[tokio::test]
async fn a_differ_of_another_process() {
    if !ready(&[STOCK_CTR]) {
        return;
    }
    // The other one knows a media type that this one does not; what it does not know either goes on to this one.
    let second = with_config(
        "[stream_processors.same]\naccepts = ['application/vnd.test.layer+same']\n\
         returns = 'application/vnd.oci.image.layer.v1.tar+gzip'\npath = '/bin/cat'\n",
    );
    let host = with_config(&format!(
        "[proxy_plugins.other]\ntype = 'diff'\naddress = '{}'\n\
         [plugins.'io.containerd.service.v1.diff-service']\ndefault = ['walking', 'other']\n",
        second.address().display()
    ));
    let folder = host.folder().join("layer");
    fs::create_dir(&folder).unwrap();
    let layer = image::base_layer();
    let digest = put(&host, &layer).await;
    // A differ reads blobs from whom it is asked by; a gantryd reads its own.
    put_at(&second, &host.namespace, &layer).await;
    let made = apply(&host, &digest, "application/vnd.test.layer+same", &folder).await.unwrap();
    assert!(folder.join("bin").exists(), "{made:?}");
    let nobody = apply(&host, &digest, "application/vnd.test.layer+nobody", &folder).await.unwrap_err();
    assert_eq!(nobody.code(), Code::Unimplemented);
    drop(second);
    let media_type = "application/vnd.oci.image.layer.v1.tar+gzip";
    apply(&host, &digest, media_type, &folder).await.unwrap();
    let away = apply(&host, &digest, "application/vnd.test.layer+same", &folder).await.unwrap_err();
    assert_eq!(away.code(), Code::Unavailable, "{away}");
}

/// The blobs on disk of an engine.
fn blobs(host: &Host) -> usize {
    let folder = host.root().join("io.containerd.content.v1.content/blobs/sha256");
    fs::read_dir(folder).map_or(0, Iterator::count)
}

#[test]
fn a_content_store_of_another_process() {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX]) {
        return;
    }
    let mut second = Host::gantry();
    let mut host = with_config(&format!(
        "[proxy_plugins.far]\ntype = 'content'\naddress = '{}'\n",
        second.address().display()
    ));
    let archive = host.folder().join("busybox.tar");
    image::busybox().write(&archive).unwrap();
    let (stock, ours) = (host.stock_ctr(), host.ctr());
    let plugins = ours.ok(&["plugins", "ls"]);
    assert!(plugins.lines().any(|line| line.contains("content.v1") && line.contains("far")), "{plugins}");
    let import = ["images", "import", archive.to_str().unwrap()];
    stock.ok(&import);
    let run = ["run", "--rm", NAME, "c", "echo", "x"];
    assert_eq!(stock.ok(&run), "x\n");
    // The bytes are with the other one alone, as many as there are records here.
    let listed = ours.ok(&["content", "ls", "-q"]);
    let all = listed.lines().count();
    assert!(all >= 3, "{listed}");
    assert_eq!((blobs(&host), blobs(&second)), (0, all));
    // Its own collector leaves them.
    second.ctr().ok(&["gc"]);
    assert_eq!(blobs(&second), all);

    // What one of our namespaces has, another need not send; what is larger than one message goes in pieces, and comes back
    // from anywhere.
    let big: Vec<u8> = (0..5_000_003_u32).map(|number| (number % 251) as u8).collect();
    let digest = block_on(put(&host, &big));
    let (whole, tail) = block_on(async {
        put_at(&host, "other", &big).await;
        let mut content = ContentClient::new(channel(&host.address()).await);
        let mut read = async |offset: i64, size: i64| {
            let message = ReadContentRequest { digest: digest.clone(), offset, size };
            let mut pieces = content.read(in_namespace("other", message)).await.unwrap().into_inner();
            let mut bytes = Vec::new();
            while let Some(piece) = pieces.message().await.unwrap() {
                assert_eq!(piece.offset, offset + bytes.len() as i64);
                bytes.extend_from_slice(&piece.data);
            }
            bytes
        };
        (read(0, 0).await, read(4_000_001, 1_000_000).await)
    });
    assert!(whole == big && tail == big[4_000_001..5_000_001]);
    assert_eq!(blobs(&second), all + 1);
    let mut other = host.ctr();
    other.namespace = "other".into();
    other.ok(&["content", "rm", &digest]);
    assert_eq!(blobs(&second), all + 1);
    ours.ok(&["content", "rm", &digest]);
    assert_eq!(blobs(&second), all);

    // While it is away, what needs bytes says so, and what was begun can be ended after.
    second.stop();
    let away = ours.fails(&["content", "get", listed.lines().next().unwrap()]);
    assert!(away.contains("cannot be reached"), "{away}");
    let status = block_on(async {
        let message = commit_of(b"extra");
        let mut content = ContentClient::new(channel(&host.address()).await);
        let mut answers = content
            .write(in_namespace(&host.namespace, futures::stream::iter([message])))
            .await
            .unwrap()
            .into_inner();
        answers.message().await.unwrap_err()
    });
    assert_eq!(status.code(), Code::Unavailable, "{status}");
    // Records are there all the same.
    assert_eq!(ours.ok(&["content", "ls", "-q"]), listed);
    assert!(stock.fails(&run).contains("cannot be reached"));
    host.kill();
    host.start();
    assert_eq!(ours.ok(&["content", "ls", "-q"]), listed);
    second.start();
    let extra = block_on(put(&host, b"extra"));
    assert_eq!(ours.ok(&["content", "get", &extra]), "extra");
    assert_eq!(stock.ok(&run), "x\n");
    let exported = host.folder().join("exported.tar");
    stock.ok(&["images", "export", exported.to_str().unwrap(), NAME]);

    // A blob that was damaged there is not taken for what it was.
    let hex = extra.strip_prefix("sha256:").unwrap();
    let path = second.root().join("io.containerd.content.v1.content/blobs/sha256").join(hex);
    fs::set_permissions(&path, std::os::unix::fs::PermissionsExt::from_mode(0o644)).unwrap();
    fs::write(&path, "EXTRA").unwrap();
    let folder = host.folder().join("layer");
    fs::create_dir(&folder).unwrap();
    let damaged =
        block_on(apply(&host, &extra, "application/vnd.oci.image.layer.v1.tar", &folder)).unwrap_err();
    assert_eq!(damaged.code(), Code::DataLoss, "{damaged}");
    ours.ok(&["content", "rm", &extra]);

    // Collected there, too.
    stock.ok(&["images", "rm", "--sync", NAME]);
    ours.ok(&["gc"]);
    assert_eq!(blobs(&second), 0);
    host.assert_nothing_left();
    second.assert_nothing_left();
}
