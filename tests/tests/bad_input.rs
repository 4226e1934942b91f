//! What is wrong gets a clear error of the class that clients expect, leaves nothing, and the engine goes on serving.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::Path;
use std::process::Command;

use proto::containerd::services::containers::v1::container::Runtime;
use proto::containerd::services::containers::v1::containers_client::ContainersClient;
use proto::containerd::services::containers::v1::{Container, CreateContainerRequest, GetContainerRequest};
use proto::containerd::services::snapshots::v1::PrepareSnapshotRequest;
use proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
use proto::containerd::services::tasks::v1::CreateTaskRequest;
use proto::containerd::services::tasks::v1::tasks_client::TasksClient;
use tar::EntryType;
use tests::client::{channel, in_namespace};
use tests::host::{Host, Kind, RUNC, STOCK_CTR};
use tests::image::{self, BUSYBOX, Layer};
use tests::{binary, ready};
use tonic::Code;

const PROGRAMS: [&str; 3] = [STOCK_CTR, RUNC, BUSYBOX];

fn gantry() -> Option<Host> {
    ready(&PROGRAMS).then(Host::gantry)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// The engine works as before: an image comes in, a container runs, nothing is left of it.
fn assert_serves(host: &Host) {
    let image = host.import();
    assert_eq!(host.stock_ctr().ok(&["run", "--rm", image, "after", "echo", "well"]), "well\n");
    host.assert_nothing_left();
}

/// Nothing is left in the namespace but what is listed here by kind.
fn assert_empty(host: &Host) {
    let ctr = host.stock_ctr();
    assert_eq!(ctr.ok(&["containers", "ls", "-q"]), "");
    assert_eq!(ctr.ok(&["tasks", "ls", "-q"]), "");
    assert_eq!(ctr.ok(&["snapshots", "ls"]).lines().count(), 1, "{}", ctr.ok(&["snapshots", "ls"]));
    assert_eq!(ctr.ok(&["images", "ls", "-q"]), "");
    assert_eq!(ctr.ok(&["content", "active"]).lines().count(), 1);
    let bundles = host.state().join("io.containerd.runtime.v2.task").join(&host.namespace);
    assert_eq!(fs::read_dir(bundles).map_or(0, Iterator::count), 0);
    host.assert_nothing_left();
}

#[test]
fn unknown_things_are_named() {
    let Some(host) = gantry() else { return };
    let (stock, ours) = (host.stock_ctr(), host.ctr());
    assert!(stock.fails(&["run", "--rm", "example.org/none:1", "c"]).contains("example.org/none:1"));
    assert!(ours.fails(&["run", "--rm", "example.org/none:1", "c"]).contains("example.org/none:1"));
    // As containerd's: told, and no failure.
    assert!(ours.run(&["images", "rm", "example.org/none:1"]).stderr.contains("example.org/none:1"));
    assert_empty(&host);
    let image = host.import();
    let before = stock.ok(&["snapshots", "ls"]);
    let error = ours.fails(&["run", "--rm", "--runtime", "io.containerd.none.v9", image, "c"]);
    assert!(error.contains("containerd-shim-none-v9"), "{error}");
    let error = stock.fails(&["run", "--rm", "--runtime", "io.containerd.none.v9", image, "c"]);
    assert!(error.contains("containerd-shim-none-v9"), "{error}");
    let error = ours.fails(&["run", "--rm", "--snapshotter", "zfs", image, "c"]);
    assert!(error.contains("zfs") && error.contains("overlayfs"), "{error}");
    assert_eq!(stock.ok(&["snapshots", "ls"]), before, "a failed run leaves no snapshot");
    assert_eq!(stock.ok(&["containers", "ls", "-q"]), "");
    let mut elsewhere = host.ctr();
    elsewhere.namespace = "nowhere".into();
    assert!(elsewhere.fails(&["containers", "info", "c"]).contains("\"c\""));
    elsewhere.namespace = "not/valid".into();
    assert!(elsewhere.fails(&["containers", "ls"]).contains("not/valid"));
    assert_serves(&host);
}

#[test]
fn classes_are_those_that_clients_expect() {
    let Some(host) = gantry() else { return };
    let ns = host.namespace.clone();
    block_on(async {
        let channel = channel(&host.address()).await;
        let mut containers = ContainersClient::new(channel.clone());
        let mut tasks = TasksClient::new(channel.clone());
        let mut snapshots = SnapshotsClient::new(channel);
        let get = || GetContainerRequest { id: "none".into() };
        assert_eq!(containers.get(in_namespace(&ns, get())).await.unwrap_err().code(), Code::NotFound);
        let bare = containers.get(get()).await.unwrap_err();
        assert_eq!(bare.code(), Code::FailedPrecondition);
        assert!(bare.message().contains("namespace is required"), "{bare}");
        assert!(bare.details().is_empty(), "containerd's clients print details as noise");

        let spec = proto::any::wrap(proto::any::SPEC, b"{ not a spec".to_vec());
        let good = Container {
            id: "c".into(),
            runtime: Some(Runtime { name: "io.containerd.runc.v2".into(), options: None }),
            spec: Some(spec),
            ..Container::default()
        };
        for bad in [
            Container { id: String::new(), ..good.clone() },
            Container { id: "../c".into(), ..good.clone() },
            Container { id: "c".repeat(77), ..good.clone() },
            Container { runtime: None, ..good.clone() },
            Container { spec: None, ..good.clone() },
            Container { snapshot_key: "k".into(), ..good.clone() },
            Container { labels: [("k".to_owned(), "v".repeat(5000))].into(), ..good.clone() },
        ] {
            let request = CreateContainerRequest { container: Some(bad) };
            let error = containers.create(in_namespace(&ns, request)).await.unwrap_err();
            assert_eq!(error.code(), Code::InvalidArgument, "{error}");
        }
        let none = containers.create(in_namespace(&ns, CreateContainerRequest { container: None })).await;
        assert_eq!(none.unwrap_err().code(), Code::InvalidArgument);
        let request = || CreateContainerRequest { container: Some(good.clone()) };
        containers.create(in_namespace(&ns, request())).await.unwrap();
        let again = containers.create(in_namespace(&ns, request())).await.unwrap_err();
        assert_eq!(again.code(), Code::AlreadyExists);

        let create = |id: &str| CreateTaskRequest { container_id: id.into(), ..CreateTaskRequest::default() };
        let missing = tasks.create(in_namespace(&ns, create("none"))).await.unwrap_err();
        assert_eq!(missing.code(), Code::NotFound, "{missing}");
        let refused = tasks.create(in_namespace(&ns, create("c"))).await.unwrap_err();
        assert!(!refused.message().is_empty());

        let prepare = |snapshotter: &str, key: &str, parent: &str| PrepareSnapshotRequest {
            snapshotter: snapshotter.into(),
            key: key.into(),
            parent: parent.into(),
            ..PrepareSnapshotRequest::default()
        };
        for (request, code) in [
            (prepare("zfs", "k", ""), Code::InvalidArgument),
            (prepare("", "k", ""), Code::InvalidArgument),
            (prepare("overlayfs", "", ""), Code::InvalidArgument),
            (prepare("overlayfs", "k\0k", ""), Code::InvalidArgument),
            (prepare("overlayfs", "k", "none"), Code::NotFound),
        ] {
            let error = snapshots.prepare(in_namespace(&ns, request)).await.unwrap_err();
            assert_eq!(error.code(), code, "{error}");
        }
    });
    let ctr = host.stock_ctr();
    assert_eq!(ctr.ok(&["tasks", "ls", "-q"]), "");
    ctr.ok(&["containers", "rm", "c"]);
    assert_serves(&host);
}

#[test]
fn a_spec_that_runc_refuses() {
    let Some(host) = gantry() else { return };
    let image = host.import();
    let ctr = host.ctr();
    let before = ctr.ok(&["snapshots", "ls", "-q"]);
    let error = ctr.fails(&["run", "--rm", image, "c", "/no/such/program"]);
    assert!(error.contains("/no/such/program") && error.contains("no such file or directory"), "{error}");
    let error = ctr.fails(&["run", "--rm", "--cwd", "relative", image, "c", "true"]);
    assert!(error.contains("relative") || error.contains("absolute"), "{error}");
    let mount = "type=bind,src=/nonexistent/source,dst=/mnt,options=rbind";
    let error = ctr.fails(&["run", "--rm", "--mount", mount, image, "c", "true"]);
    assert!(error.contains("/nonexistent/source"), "{error}");
    assert_eq!(ctr.ok(&["snapshots", "ls", "-q"]), before);
    assert_eq!(ctr.ok(&["containers", "ls", "-q"]), "");
    assert_serves(&host);
}

#[test]
fn archives_that_lie() {
    let Some(host) = gantry() else { return };
    let archive = image::busybox().archive();
    let path = host.folder().join("bad.tar");
    // Debian's ctr makes the image's record before it unpacks, and leaves it when that fails: on a host of its own.
    let other = Host::gantry();
    let import = |bytes: &[u8], words: &[&str]| {
        fs::write(&path, bytes).unwrap();
        let error = other.stock_ctr().fails(&["images", "import", path.to_str().unwrap()]);
        assert!(error.len() > 5, "{error:?}");
        other.assert_nothing_left();
        let error = host.ctr().fails(&["images", "import", path.to_str().unwrap()]);
        assert!(words.iter().any(|words| error.contains(words)), "{words:?}: {error}");
        assert_eq!(host.stock_ctr().ok(&["images", "ls", "-q"]), "", "no half image is visible");
        assert_eq!(host.stock_ctr().ok(&["snapshots", "ls"]).lines().count(), 1);
        assert_eq!(host.stock_ctr().ok(&["content", "active"]).lines().count(), 1, "an ingest is left");
        host.assert_nothing_left();
    };
    // Cut short: in a blob, and in a header.
    import(&archive[..archive.len() / 2], &["end", "short", "truncated", "incomplete", "cut"]);
    import(&archive[..700], &["end", "short", "truncated", "incomplete", "cut", "index.json"]);
    import(b"nothing like an archive", &["archive", "tar", "index.json", "short", "end"]);
    import(b"", &["archive", "tar", "empty", "index.json"]);
    // A blob that is not what its name says.
    let mut image = image::busybox();
    image.blobs[1].1[20] ^= 1;
    import(&image.archive(), &["digest"]);
    assert_serves(&host);
    assert_serves(&other);
}

#[test]
fn layers_that_reach_out() {
    let Some(host) = gantry() else { return };
    let outside = host.folder().join("outside");
    fs::create_dir(&outside).unwrap();
    fs::write(outside.join("victim"), "safe").unwrap();
    fs::set_permissions(outside.join("victim"), fs::Permissions::from_mode(0o600)).unwrap();
    let reach = outside.to_str().unwrap();
    let layers = [
        ("dots", Layer::default().file("../../../../../../../../tmp/gantry-escape", 0o644, b"out")),
        ("absolute", Layer::default().file("/../../tmp/gantry-escape", 0o644, b"out")),
        ("link-then-file", Layer::default().symlink("x", reach).file("x/victim", 0o777, b"out")),
        (
            "link-then-folder",
            Layer::default().symlink("x", reach).folder("x", 0o777).file("x/new", 0o644, b"out"),
        ),
        ("hard-link", {
            let target = format!("{reach}/victim");
            Layer::default().entry(EntryType::Link, "y", &target, 0o777, b"")
        }),
        ("dotted-hard-link", {
            let target = format!("../../../../../../../..{reach}/victim");
            Layer::default().entry(EntryType::Link, "y", &target, 0o777, b"")
        }),
        ("whiteout", Layer::default().symlink("x", reach).file("x/.wh.victim", 0o644, b"")),
        ("whiteout-of-dots", Layer::default().file("etc/.wh...", 0o644, b"")),
        ("opaque", Layer::default().symlink("x", reach).file("x/.wh..wh..opq", 0o644, b"")),
    ];
    let ctr = host.stock_ctr();
    for (name, layer) in layers {
        let path = host.folder().join("reach.tar");
        let image = format!("example.org/{name}:1");
        image::image(&image, &["sh"], &[image::base_layer(), layer.finish()]).write(&path).unwrap();
        // Refused, or kept inside: either is right.
        let ended = ctr.run(&["images", "import", path.to_str().unwrap()]);
        assert_eq!(fs::read(outside.join("victim")).unwrap(), b"safe", "{name}: {ended:?}");
        let victim = fs::metadata(outside.join("victim")).unwrap();
        assert_eq!(victim.permissions().mode() & 0o777, 0o600, "{name}: {ended:?}");
        assert_eq!(std::os::unix::fs::MetadataExt::nlink(&victim), 1, "{name}: {ended:?}");
        assert_eq!(fs::read_dir(&outside).unwrap().count(), 1, "{name}: {ended:?}");
        assert!(!Path::new("/tmp/gantry-escape").exists(), "{name}: {ended:?}");
    }
    host.assert_nothing_left();
    assert_serves(&host);
}

#[test]
fn configurations_with_mistakes() {
    if !ready(&PROGRAMS) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let config = folder.path().join("config.toml");
    let start = |text: &str| {
        fs::write(&config, text).unwrap();
        let output = Command::new(binary("gantryd")).arg("--config").arg(&config).output().unwrap();
        assert!(!output.status.success(), "{text}");
        String::from_utf8(output.stderr).unwrap()
    };
    for (text, words) in [
        ("version = 3\nrooot = '/x'\n", "rooot"),
        ("version = 3\n[grpc]\nadress = '/x'\n", "adress"),
        ("version = 3\nroot = 7\n", "line 2"),
        ("version = 9\n", "version 9"),
        ("not toml", "line 1"),
    ] {
        let error = start(text);
        assert!(error.contains(words) && error.contains("config.toml"), "{text}: {error}");
        assert_eq!(error.lines().filter(|line| line.starts_with("gantryd:")).count(), 1, "{error}");
    }
    let output = Command::new(binary("gantryd")).args(["--config", "/nonexistent.toml"]).output().unwrap();
    assert!(String::from_utf8_lossy(&output.stderr).contains("/nonexistent.toml"));
}

#[test]
fn a_socket_in_use_and_a_root_in_use() {
    let Some(host) = gantry() else { return };
    let mut second = Host::new(Kind::Gantry);
    let start = |host: &Host, root: &Path, address: &Path| {
        let mut command = Command::new(binary("gantryd"));
        command.arg("--root").arg(root).arg("--state").arg(host.state()).arg("--address").arg(address);
        let output = command.output().unwrap();
        assert!(!output.status.success());
        String::from_utf8(output.stderr).unwrap()
    };
    let error = start(&second, &second.root(), &host.address());
    assert!(error.contains("in use") && error.contains("--address"), "{error}");
    let error = start(&second, &host.root(), &second.address());
    assert!(error.contains("in use") && error.contains("--root"), "{error}");
    assert_serves(&host);
    // A socket that a killed engine left does not hinder.
    second.start();
    second.kill();
    assert!(second.address().exists());
    second.start();
}

#[test]
fn no_runc() {
    if !ready(&PROGRAMS) {
        return;
    }
    let mut host = Host::new(Kind::Gantry);
    let empty = host.folder().join("bin");
    fs::create_dir(&empty).unwrap();
    host.path = empty.display().to_string();
    host.start();
    let image = host.import();
    let error = host.ctr().fails(&["run", "--rm", image, "c", "true"]);
    assert!(error.contains("runc") && (error.contains("install") || error.contains("PATH")), "{error}");
    assert_eq!(host.ctr().ok(&["containers", "ls", "-q"]), "");
    host.assert_nothing_left();
}

#[test]
fn not_root() {
    if !ready(&["/usr/bin/setpriv"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    fs::set_permissions(folder.path(), fs::Permissions::from_mode(0o777)).unwrap();
    let program = folder.path().join("gantryd");
    fs::copy(binary("gantryd"), &program).unwrap();
    let output = Command::new("setpriv")
        .args(["--reuid", "65534", "--regid", "65534", "--clear-groups"])
        .arg(&program)
        .arg("--root")
        .arg(folder.path().join("r"))
        .output()
        .unwrap();
    assert!(!output.status.success());
    let error = String::from_utf8(output.stderr).unwrap();
    assert!(error.contains("root") && error.contains("sudo"), "{error}");
    assert!(!folder.path().join("r").exists());
}

#[test]
fn a_full_disk() {
    if !ready(&["/usr/bin/setsid", "/usr/bin/mount"]) || !ready(&PROGRAMS) {
        return;
    }
    let mut host = Host::new(Kind::Gantry);
    fs::create_dir(host.root()).unwrap();
    let root = host.root();
    let run = |program: &str, arguments: &[&str]| {
        let output = Command::new(program).args(arguments).output().unwrap();
        assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    };
    run("mount", &["-t", "tmpfs", "-o", "size=24m", "tmpfs", root.to_str().unwrap()]);
    host.start();
    // Incompressible, so that the blob alone fills the disk.
    let mut noise = vec![0_u8; 40 << 20];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for byte in &mut noise {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *byte = state as u8;
    }
    let layer = Layer::default().file("noise", 0o644, &noise).finish();
    let path = host.folder().join("big.tar");
    image::image("example.org/big:1", &["sh"], &[layer]).write(&path).unwrap();
    for ctr in [host.ctr(), host.stock_ctr()] {
        let error = ctr.fails(&["images", "import", path.to_str().unwrap()]);
        assert!(error.contains("space"), "{error}");
        assert_eq!(ctr.ok(&["images", "ls", "-q"]), "");
        assert_eq!(host.stock_ctr().ok(&["content", "active"]).lines().count(), 1, "the space is free again");
    }
    host.assert_serves_small();
    host.stop();
    run("umount", &[root.to_str().unwrap()]);
}

trait Serves {
    fn assert_serves_small(&self);
}

impl Serves for Host {
    /// As [`assert_serves`], on a host whose root is itself a mount.
    fn assert_serves_small(&self) {
        let image = self.import();
        assert_eq!(self.stock_ctr().ok(&["run", "--rm", image, "after", "echo", "well"]), "well\n");
    }
}
