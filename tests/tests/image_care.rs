//! The care of images, over our own `ctr`: real damage to blobs and to unpacked layers, found and mended; conversions; where
//! the bytes are, and having them back.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::io::Write as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::Value;
use tests::client::Ctr;
use tests::host::{Host, Kind, RUNC, STOCK_CTR};
use tests::image::{self, BUSYBOX, Layer, NAME};
use tests::ready;
use tests::registry::{REGISTRY, Registry, SKOPEO};

/// What makes overlayfs hide what is below a folder.
const OPAQUE: &str = "trusted.overlay.opaque";

/// gantryd with the image, unpacked; what the tests need besides.
fn gantry() -> Option<Host> {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX, REGISTRY, SKOPEO]) {
        return None;
    }
    let host = Host::gantry();
    host.import();
    // The archive's own index goes.
    host.ctr().ok(&["gc"]);
    Some(host)
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// What a check says, and whether it ended well.
fn verify(ctr: &Ctr, arguments: &[&str]) -> (Value, bool) {
    let ended = ctr.run(&[&["images", "verify", "--format", "json"], arguments].concat());
    assert!(ended.code == 0 || ended.stderr.contains("damages are left"), "{ended:?}");
    (json(&ended.stdout), ended.code == 0)
}

/// Its findings: kind, path, and whether it was repaired.
fn findings(answer: &Value) -> Vec<(String, String, bool)> {
    let text = |value: &Value| value.as_str().unwrap().to_owned();
    let all = answer["findings"].as_array().unwrap().iter();
    all.map(|found| (text(&found["kind"]), text(&found["path"]), found["repaired"].as_bool().unwrap()))
        .collect()
}

/// All is whole.
fn assert_whole(ctr: &Ctr) {
    let (answer, well) = verify(ctr, &["--all"]);
    assert!(well && findings(&answer).is_empty(), "{answer}");
}

fn document(ctr: &Ctr, digest: &str) -> Value {
    json(&ctr.ok(&["content", "get", digest]))
}

fn target(ctr: &Ctr, name: &str) -> String {
    let list = ctr.ok(&["images", "ls", &format!("name=={name}")]);
    list.lines().nth(1).unwrap().split_whitespace().nth(2).unwrap().to_owned()
}

fn layers(ctr: &Ctr, name: &str) -> Vec<String> {
    let manifest = document(ctr, &target(ctr, name));
    let layers = manifest["layers"].as_array().unwrap().iter();
    layers.map(|layer| layer["digest"].as_str().unwrap().to_owned()).collect()
}

fn blob(host: &Host, digest: &str) -> PathBuf {
    let hex = digest.strip_prefix("sha256:").unwrap();
    host.root().join("io.containerd.content.v1.content/blobs/sha256").join(hex)
}

/// The folder of the unpacked layer that has this file with these bytes.
fn unpacked(host: &Host, file: &str, bytes: &[u8]) -> PathBuf {
    let root = host.root().join("io.containerd.snapshotter.v1.overlayfs/snapshots");
    let folders = fs::read_dir(root).unwrap().map(|entry| entry.unwrap().path().join("fs"));
    let mut having = folders.filter(|folder| fs::read(folder.join(file)).is_ok_and(|found| found == bytes));
    having.next().unwrap_or_else(|| panic!("no layer has {file}"))
}

fn import(host: &Host, image: &image::Image, arguments: &[&str]) {
    let archive = host.folder().join("other.tar");
    image.write(&archive).unwrap();
    host.ctr().ok(&[&["images", "import"], arguments, &[archive.to_str().unwrap()]].concat());
}

#[test]
fn a_whole_image_is_found_whole_in_every_snapshotter() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    let (answer, well) = verify(&ctr, &[NAME]);
    assert!(well && findings(&answer).is_empty(), "{answer}");
    assert_eq!(
        (&answer["images"], &answer["blobs"], &answer["snapshots"]),
        (&1.into(), &4.into(), &2.into())
    );
    let files = answer["files"].as_u64().unwrap();
    assert!(files > 60, "{answer}");
    let stored: u64 = ctr
        .ok(&["content", "ls", "-q"])
        .lines()
        .map(|digest| fs::metadata(blob(&host, digest)).unwrap().len())
        .sum();
    assert_eq!(answer["bytes"], stored, "all of each blob is hashed once");
    let mut snapshotters = 1;
    for snapshotter in ["native", "erofs"] {
        let unpack = ["snapshots", "--snapshotter", snapshotter, "unpack", &target(&ctr, NAME)];
        let ended = ctr.run(&unpack);
        if ended.code != 0 {
            println!("SKIPPED: {snapshotter}: {}", ended.stderr);
            continue;
        }
        snapshotters += 1;
        let (answer, well) = verify(&ctr, &["--all"]);
        assert!(well && findings(&answer).is_empty(), "{snapshotter}: {answer}");
        assert_eq!(answer["files"], files * snapshotters, "{snapshotter}");
    }
    let (quick, well) = verify(&ctr, &["--all", "--quick"]);
    assert!(well && findings(&quick).is_empty() && quick["files"] == 0, "{quick}");
    assert!(quick["bytes"].as_u64().unwrap() < stored, "{quick}");
    let text = ctr.ok(&["images", "verify", NAME]);
    assert!(text.starts_with("1 images: 4 blobs"), "{text}");
    // Neither a lease nor a view stays.
    assert_eq!(ctr.ok(&["leases", "ls", "-q"]), "");
    assert!(!ctr.ok(&["snapshots", "ls"]).contains("View"));
    for (arguments, words) in [
        (&["images", "verify", "example.org/none:1"][..], "example.org/none:1"),
        (&["images", "verify"], "--all"),
        (&["images", "verify", "--repair", "--from", "A B", NAME], "A B"),
    ] {
        assert!(ctr.fails(arguments).contains(words), "{arguments:?}");
    }
    host.assert_nothing_left();
}

#[test]
fn damaged_blobs_are_found_and_fetched_again() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    let registry = Registry::open();
    registry.push(&image::busybox(), "care/busybox:1");
    let from = registry.name("care/busybox:1");
    let manifest = target(&ctr, NAME);
    let layer = layers(&ctr, NAME)[0].clone();
    let config = document(&ctr, &manifest)["config"]["digest"].as_str().unwrap().to_owned();
    let flip = |path: &Path| {
        let mut bytes = fs::read(path).unwrap();
        let middle = bytes.len() / 2;
        bytes[middle] ^= 1;
        fs::write(path, bytes).unwrap();
    };
    let cut = |path: &Path| fs::File::options().write(true).open(path).unwrap().set_len(7).unwrap();
    let folder = |path: &Path| {
        fs::remove_file(path).unwrap();
        fs::create_dir(path).unwrap();
        fs::write(path.join("inside"), "x").unwrap();
    };
    let gone = |path: &Path| fs::remove_file(path).unwrap();
    type Damage<'a> = (&'a str, &'a dyn Fn(&Path));
    let damages: [Damage<'_>; 4] =
        [("damaged blob", &flip), ("wrong size", &cut), ("missing blob", &folder), ("missing blob", &gone)];
    for digest in [&layer, &config, &manifest] {
        let path = blob(&host, digest);
        let (bytes, info) =
            (fs::read(&path).unwrap(), ctr.ok(&["content", "ls", &format!("digest=={digest}")]));
        for (kind, damage) in damages {
            damage(&path);
            let (answer, well) = verify(&ctr, &[NAME]);
            assert!(!well, "{kind}: {answer}");
            assert_eq!(findings(&answer), [(kind.to_owned(), String::new(), false)], "{answer}");
            assert_eq!(answer["findings"][0]["object"], digest.as_str());
            // Nobody has said where it came from.
            let (answer, well) = verify(&ctr, &["--repair", NAME]);
            let remedy = answer["findings"][0]["remedy"].as_str().unwrap();
            assert!(!well && remedy.contains("--from"), "{answer}");
            let (answer, well) = verify(&ctr, &["--repair", "--from", &from, NAME]);
            assert!(well, "{answer}");
            assert_eq!(findings(&answer), [(kind.to_owned(), String::new(), true)]);
            assert_eq!(fs::read(&path).unwrap(), bytes);
            assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o444);
            // The same record, with the same labels.
            let labels = |text: &str| text.split_whitespace().last().unwrap().to_owned();
            assert_eq!(labels(&ctr.ok(&["content", "ls", &format!("digest=={digest}")])), labels(&info));
            assert_whole(&ctr);
        }
    }
    // By the label of the manifest; a record that is gone is made again, too.
    let label = format!("containerd.io/distribution.source.{}=no/such,care/busybox", registry.address);
    ctr.ok(&["content", "label", &manifest, &label]);
    ctr.ok(&["content", "rm", &layer]);
    assert!(!blob(&host, &layer).exists());
    let (answer, well) = verify(&ctr, &["--all"]);
    assert!(!well && findings(&answer)[0].0 == "missing blob", "{answer}");
    let (answer, well) = verify(&ctr, &["--all", "--repair"]);
    assert!(well, "{answer}");
    assert_whole(&ctr);
    ctr.ok(&["gc"]);
    assert_whole(&ctr);
    // A registry that has something else under that digest, or nothing, mends nothing.
    flip(&blob(&host, &layer));
    drop(registry);
    let (answer, well) = verify(&ctr, &["--all", "--repair"]);
    assert!(!well && !findings(&answer)[0].2, "{answer}");
    let left = host.root().join("io.containerd.content.v1.content/removed");
    assert_eq!(fs::read_dir(left).unwrap().count(), 0);
    assert_eq!(ctr.ok(&["leases", "ls", "-q"]), "");
    host.assert_nothing_left();
}

#[test]
fn changed_files_of_unpacked_layers_are_found_and_unpacked_again() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    let top = unpacked(&host, "etc/replaced-above", b"new\n");
    assert!(top.join("etc/removed-above").symlink_metadata().unwrap().rdev() == 0, "a whiteout");
    let run = |program: &str, arguments: &[&str]| {
        assert!(Command::new(program).args(arguments).status().unwrap().success(), "{program} {arguments:?}");
    };
    let at = |folder: &Path, file: &str| folder.join(file).to_str().unwrap().to_owned();
    let append = |path: String| fs::File::options().append(true).open(path).unwrap().write_all(b"x").unwrap();
    type Change<'a> = (&'a str, Box<dyn Fn(&Path, &Path) + 'a>);
    let changes: Vec<Change<'_>> = vec![
        ("etc/passwd", Box::new(|base, _| append(at(base, "etc/passwd")))),
        ("etc/group", Box::new(|base, _| fs::write(at(base, "etc/group"), vec![b'x'; 42]).unwrap())),
        ("bin/busybox", Box::new(|base, _| run("chmod", &["4755", &at(base, "bin/busybox")]))),
        ("root", Box::new(|base, _| run("chown", &["7:8", &at(base, "root")]))),
        ("bin/sh", Box::new(|base, _| run("ln", &["-sfn", "elsewhere", &at(base, "bin/sh")]))),
        ("bin/cat", Box::new(|base, _| fs::remove_file(at(base, "bin/cat")).unwrap())),
        ("usr/bin/extra", Box::new(|base, _| fs::write(at(base, "usr/bin/extra"), "x").unwrap())),
        ("etc/removed-above", Box::new(|_, top| fs::remove_file(at(top, "etc/removed-above")).unwrap())),
        (
            "var/attribute",
            Box::new(|_, top| rustix::fs::removexattr(at(top, "var/attribute"), "user.gantry").unwrap()),
        ),
        ("var/opaque", Box::new(|_, top| rustix::fs::removexattr(at(top, "var/opaque"), OPAQUE).unwrap())),
        (
            "etc",
            Box::new(|_, top| {
                rustix::fs::setxattr(at(top, "etc"), OPAQUE, b"y", rustix::fs::XattrFlags::empty()).unwrap();
            }),
        ),
        (
            "var/second",
            Box::new(|_, top| {
                fs::remove_file(at(top, "var/second")).unwrap();
                fs::copy(at(top, "var/first"), at(top, "var/second")).unwrap();
            }),
        ),
        ("tmp", Box::new(|_, top| run("mknod", &[&at(top, "tmp"), "c", "0", "0"]))),
    ];
    for (path, change) in &changes {
        let (base, top) = (
            unpacked(&host, "etc/removed-above", b"gone\n"),
            unpacked(&host, "etc/replaced-above", b"new\n"),
        );
        change(&base, &top);
        let (answer, well) = verify(&ctr, &[NAME]);
        assert!(!well, "{path}: {answer}");
        assert_eq!(findings(&answer), [("different file".to_owned(), (*path).to_owned(), false)], "{answer}");
        let (answer, well) = verify(&ctr, &["--repair", NAME]);
        assert!(well && findings(&answer)[0].2, "{path}: {answer}");
        assert_whole(&ctr);
    }
    // All at once, in both layers.
    let (base, top) =
        (unpacked(&host, "etc/removed-above", b"gone\n"), unpacked(&host, "etc/replaced-above", b"new\n"));
    changes.iter().for_each(|(_, change)| change(&base, &top));
    let (answer, _) = verify(&ctr, &[NAME]);
    let mut paths: Vec<String> = findings(&answer).into_iter().map(|(_, path, _)| path).collect();
    let mut wanted: Vec<&str> = changes.iter().map(|(path, _)| *path).collect();
    paths.sort();
    wanted.sort_unstable();
    assert_eq!(paths, wanted, "{answer}");
    // Other images that have the damaged layer are unpacked again as well.
    let over = Layer::default().file("etc/own", 0o644, b"over\n").finish();
    import(&host, &image::image("example.org/over:1", &["sh"], &[image::base_layer(), over]), &[]);
    ctr.ok(&["images", "verify", "--repair", NAME]);
    assert_whole(&ctr);
    assert_eq!(ctr.ok(&["run", "--rm", "example.org/over:1", "c", "cat", "/etc/own"]), "over\n");
    assert_eq!(ctr.ok(&["run", "--rm", NAME, "c", "cat", "/etc/replaced-above"]), "new\n");
    // A snapshot that is not there at all.
    let chain = ctr.ok(&["images", "usage", NAME]);
    let key = chain.lines().nth(1).unwrap().split_whitespace().next().unwrap();
    ctr.ok(&["snapshots", "rm", key]);
    let (answer, well) = verify(&ctr, &[NAME]);
    assert!(!well && findings(&answer)[0].0 == "missing snapshot", "{answer}");
    ctr.ok(&["images", "verify", "--repair", NAME]);
    assert_whole(&ctr);
    host.assert_nothing_left();
}

#[test]
fn a_repair_never_touches_what_containers_stand_on() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    ctr.ok(&["run", NAME, "c", "sh", "-c", "echo mine > /etc/mine"]);
    fs::write(unpacked(&host, "etc/removed-above", b"gone\n").join("etc/group"), "changed").unwrap();
    let before = ctr.ok(&["snapshots", "ls"]);
    let (answer, well) = verify(&ctr, &["--repair", NAME]);
    assert!(!well && answer["repaired"] == 0, "{answer}");
    let remedy = answer["findings"][0]["remedy"].as_str().unwrap();
    assert!(remedy.contains("snapshot c ") && remedy.contains("remove the container"), "{answer}");
    assert_eq!(ctr.ok(&["snapshots", "ls"]), before);
    ctr.ok(&["tasks", "start", "-d", "c"]);
    tests::wait_for("the container to have run", || ctr.ok(&["tasks", "ls"]).contains("STOPPED"));
    ctr.ok(&["tasks", "rm", "c"]);
    unpacked(&host, "etc/mine", b"mine\n");
    ctr.ok(&["containers", "rm", "c"]);
    ctr.ok(&["images", "verify", "--repair", NAME]);
    assert_whole(&ctr);
    host.assert_nothing_left();
}

#[test]
fn conversions_are_the_same_each_time_and_take_what_is_there() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    let convert = |arguments: &[&str]| {
        let digest = ctr.ok(&[&["images", "convert"], arguments].concat());
        digest.trim().to_owned()
    };
    let head = |digest: &str| fs::read(blob(&host, digest)).unwrap()[..4].to_vec();
    let media_types = |name: &str| {
        let manifest = document(&ctr, &target(&ctr, name));
        let layers = manifest["layers"].as_array().unwrap().iter();
        layers.map(|layer| layer["mediaType"].as_str().unwrap().to_owned()).collect::<Vec<_>>()
    };
    let zstd = convert(&["--zstd", NAME, "example.org/zstd:1"]);
    assert_eq!(media_types("example.org/zstd:1"), ["application/vnd.oci.image.layer.v1.tar+zstd"; 2]);
    for layer in layers(&ctr, "example.org/zstd:1") {
        assert_eq!(head(&layer), [0x28, 0xb5, 0x2f, 0xfd]);
    }
    let config = |name: &str| document(&ctr, &target(&ctr, name))["config"]["digest"].clone();
    assert_eq!(config("example.org/zstd:1"), config(NAME), "the diff ids are the same");
    // It is there: nothing new is made.
    let blobs = ctr.ok(&["content", "ls", "-q"]);
    assert_eq!(convert(&["--zstd", NAME, "example.org/zstd:2"]), zstd);
    assert_eq!(ctr.ok(&["content", "ls", "-q"]), blobs);
    // And once it has gone, the same is made again.
    ctr.ok(&["images", "rm", "--sync", "example.org/zstd:1", "example.org/zstd:2"]);
    assert!(!ctr.ok(&["content", "ls", "-q"]).contains(&zstd));
    assert_eq!(convert(&["--zstd", NAME, "example.org/zstd:1"]), zstd);
    assert_ne!(convert(&["--zstd", "--level", "19", NAME, "example.org/small:1"]), zstd);
    // Back, by way of no compression.
    convert(&["--uncompress", "example.org/zstd:1", "example.org/plain:1"]);
    assert_eq!(media_types("example.org/plain:1"), ["application/vnd.oci.image.layer.v1.tar"; 2]);
    let gzip = convert(&["--gzip", "example.org/plain:1", "example.org/gzip:1"]);
    assert_eq!(gzip, convert(&["--gzip", "example.org/zstd:1", "example.org/gzip:2"]), "of the same files");
    assert_eq!(head(&layers(&ctr, "example.org/gzip:1")[0])[..2], [0x1f, 0x8b]);
    ctr.ok(&["gc"]);
    assert_whole(&ctr);
    let run =
        ["run", "--rm", "--snapshotter", "native", "example.org/zstd:1", "c", "cat", "/etc/replaced-above"];
    assert_eq!(ctr.ok(&run), "new\n");
    for (arguments, words) in [
        (&["--gzip", "--level", "10", NAME, "x"][..], "level 10"),
        (&["--level", "1", NAME, "x"], "level 1"),
        (&["--gzip", "--zstd", NAME, "x"], "--zstd"),
        (&["--zstd", "example.org/none:1", "x"], "example.org/none:1"),
    ] {
        assert!(ctr.fails(&[&["images", "convert"], arguments].concat()).contains(words), "{arguments:?}");
    }
    // A damaged layer becomes no image.
    let layer = blob(&host, &layers(&ctr, NAME)[1]);
    let mut bytes = fs::read(&layer).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle] ^= 1;
    fs::write(&layer, bytes).unwrap();
    ctr.ok(&[
        "images",
        "rm",
        "--sync",
        "example.org/zstd:1",
        "example.org/gzip:1",
        "example.org/gzip:2",
        "example.org/plain:1",
    ]);
    let names = ctr.ok(&["images", "ls", "-q"]);
    let error = ctr.fails(&["images", "convert", "--zstd", NAME, "example.org/zstd:1"]);
    assert!(error.contains(&layers(&ctr, NAME)[1]), "{error}");
    assert_eq!(ctr.ok(&["images", "ls", "-q"]), names);
    assert_eq!((ctr.ok(&["content", "active", "-q"]), ctr.ok(&["leases", "ls", "-q"])), <_>::default());
    host.assert_nothing_left();
}

#[test]
fn a_full_disk_ends_a_conversion_and_its_space_comes_back() {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX]) {
        return;
    }
    let mut host = Host::new(Kind::Gantry);
    host.collects_by_itself = true;
    let store = host.root().join("io.containerd.content.v1.content");
    fs::create_dir_all(&store).unwrap();
    let mounted =
        Command::new("mount").args(["-t", "tmpfs", "-o", "size=4m", "none"]).arg(&store).status().unwrap();
    assert!(mounted.success());
    host.start();
    host.import();
    let ctr = host.ctr();
    let free = || {
        let stat = Command::new("stat").args(["-f", "-c", "%a %S"]).arg(&store).output().unwrap();
        let numbers = String::from_utf8(stat.stdout).unwrap();
        numbers.split_whitespace().map(|number| number.parse::<u64>().unwrap()).product::<u64>()
    };
    // Uncompressed, the program alone has more than that.
    fs::write(store.join("filler"), vec![0; usize::try_from(free()).unwrap() - (1 << 20)]).unwrap();
    let before = free();
    let error = ctr.fails(&["images", "convert", "--uncompress", NAME, "example.org/plain:1"]);
    assert!(error.contains("free some space") && error.contains("resource exhausted"), "{error}");
    tests::wait_for("the space to be back", || free() >= before);
    assert_eq!(ctr.ok(&["images", "ls", "-q"]).trim(), NAME);
    assert_eq!(ctr.ok(&["content", "active", "-q"]), "");
    assert_whole(&ctr);
    fs::remove_file(store.join("filler")).unwrap();
    ctr.ok(&["images", "convert", "--uncompress", NAME, "example.org/plain:1"]);
    assert_whole(&ctr);
    host.stop();
    assert!(Command::new("umount").arg(&store).status().unwrap().success());
}

/// What `ctr df` says of a kind in all namespaces: count, active, bytes, reclaimable.
fn space(ctr: &Ctr, kind: &str) -> [u64; 4] {
    let usage = json(&ctr.ok(&["df", "--format", "json"]));
    let mut all = [0; 4];
    for space in usage["spaces"].as_array().unwrap().iter().filter(|space| space["kind"] == kind) {
        for (sum, field) in all.iter_mut().zip(["count", "active", "bytes", "reclaimable"]) {
            *sum += space[field].as_u64().unwrap();
        }
    }
    all
}

/// A row of `ctr images usage`.
fn usage(ctr: &Ctr, name: &str) -> Vec<String> {
    let table = ctr.ok(&["images", "usage"]);
    let row = table.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("{table}"));
    row.split_whitespace().map(str::to_owned).collect()
}

#[test]
fn what_a_prune_frees_is_what_was_said_before() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    let [blobs, active, content, reclaimable] = space(&ctr, "content");
    assert_eq!((blobs, active, reclaimable), (4, 0, content), "nothing uses the image");
    let stored: u64 = ctr
        .ok(&["content", "ls", "-q"])
        .lines()
        .map(|digest| fs::metadata(blob(&host, digest)).unwrap().len())
        .sum();
    assert_eq!(content, stored);
    // Alone, all of it is its own; beside one with the same base, its own layer is.
    assert_eq!(usage(&ctr, NAME)[1], "4");
    let alone = usage(&ctr, NAME);
    let over = Layer::default().file("etc/own", 0o644, &[7; 100_000]).finish();
    import(&host, &image::image("example.org/over:1", &["sh"], &[image::base_layer(), over]), &[]);
    assert_ne!(usage(&ctr, NAME), alone);
    ctr.ok(&["containers", "create", NAME, "c", "true"]);
    ctr.ok(&["gc"]);
    assert_eq!(usage(&ctr, NAME).last().unwrap(), "1");
    assert_eq!(space(&ctr, "images")[..2], [2, 1]);
    assert_eq!(space(&ctr, "containers")[..2], [1, 1]);
    let (before, snapshots) = (space(&ctr, "content"), space(&ctr, "snapshots"));
    assert!(before[3] > 0 && before[3] < before[2], "{before:?}");
    // By tags; by age; by size; the newest; by filter: nothing fits, or only what was made for it.
    let digest = target(&ctr, "example.org/over:1");
    let untagged = format!("example.org/over@{digest}");
    ctr.ok(&["images", "tag", "example.org/over:1", &untagged]);
    let prune = |arguments: &[&str]| ctr.ok(&[&["images", "prune", "--dry-run"], arguments].concat());
    assert_eq!(prune(&[]), "", "another name has a tag");
    assert_eq!(prune(&["--all", "--older-than", "1h"]), "");
    assert_eq!(prune(&["--all", "--larger-than", "1GiB"]), "");
    assert_eq!(prune(&["--all", "--keep-last", "2"]), "");
    assert_eq!(prune(&["--all", "--keep-last", "1"]).lines().count(), 1);
    assert_eq!(prune(&["--all", "name==example.org/none:1"]), "");
    assert_eq!(prune(&["--all", "name==example.org/over:1"]), "example.org/over:1\n");
    assert_eq!(prune(&["--all", "--older-than", "0s", "--larger-than", "1kB"]).lines().count(), 2);
    assert_eq!(ctr.ok(&["images", "ls", "-q"]).lines().count(), 3, "so far nothing went");
    // A lease keeps what its image does not any more.
    ctr.ok(&["leases", "create", "--id", "keeper"]);
    let said = ctr.run(&["images", "prune", "--all", "--dry-run"]).stderr;
    let done = ctr.run(&["images", "prune", "--all"]);
    assert_eq!(done.stdout, format!("example.org/over:1\n{untagged}\n"));
    assert_eq!(said.replace("would remove", "removed"), done.stderr);
    let (after, left) = (space(&ctr, "content"), space(&ctr, "snapshots"));
    assert_eq!((before[2] - after[2], after[3]), (before[3], 0), "what could be had back was");
    assert_eq!((snapshots[2] - left[2], left[3]), (snapshots[3], 0));
    assert_eq!(ctr.ok(&["images", "ls", "-q"]).trim(), NAME, "a container was made from it");
    assert_whole(&ctr);
    let table = ctr.ok(&["df", "-v"]);
    assert!(
        table.contains(&host.namespace) && table.contains("(total)") && table.contains("metadata"),
        "{table}"
    );
    assert!(table.contains(host.root().to_str().unwrap()), "{table}");
    // A blob that two namespaces have is on disk once.
    let mut other = host.ctr();
    other.namespace.push_str("-b");
    let archive = host.folder().join("busybox.tar");
    other.ok(&["images", "import", "--no-unpack", archive.to_str().unwrap()]);
    ctr.ok(&["gc"]);
    assert_eq!(space(&ctr, "content")[..3], after[..3]);
    other.ok(&["images", "prune", "--all"]);
    assert_whole(&ctr);
    ctr.ok(&["containers", "rm", "c"]);
    ctr.ok(&["leases", "rm", "keeper"]);
    host.assert_nothing_left();
}

#[test]
fn dropped_layers_are_told_from_lost_ones() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    let layers = layers(&ctr, NAME);
    let size: u64 = layers.iter().map(|layer| fs::metadata(blob(&host, layer)).unwrap().len()).sum();
    // Not what is all there is of an image.
    let other = Layer::default().file("alone", 0o644, b"x").finish();
    import(&host, &image::image("example.org/packed:1", &["sh"], &[other]), &["--no-unpack"]);
    assert!(ctr.fails(&["images", "drop-layers", "example.org/packed:1"]).contains("not unpacked"));
    assert!(ctr.fails(&["images", "drop-layers", "example.org/none:1"]).contains("example.org/none:1"));
    // What archives had for an index is not an image's.
    ctr.ok(&["gc"]);
    let before = space(&ctr, "content")[2];
    let said = ctr.ok(&["images", "drop-layers", NAME]);
    assert!(said.contains("2 blobs"), "{said}");
    assert_eq!(before - space(&ctr, "content")[2], size);
    assert!(layers.iter().all(|layer| !blob(&host, layer).exists()));
    // Twice is once.
    assert!(ctr.ok(&["images", "drop-layers", NAME]).contains("0 blobs"));
    ctr.ok(&["gc"]);
    let (answer, well) = verify(&ctr, &[NAME]);
    assert!(well && answer["damages"] == 0, "{answer}");
    assert_eq!(
        findings(&answer),
        [("dropped".to_owned(), String::new(), false), ("dropped".into(), String::new(), false)]
    );
    assert_eq!(ctr.ok(&["run", "--rm", NAME, "c", "cat", "/etc/replaced-above"]), "new\n");
    let to = host.folder().join("exported.tar");
    for arguments in [
        &["images", "export", to.to_str().unwrap(), NAME][..],
        &["images", "convert", "--zstd", NAME, "x"],
        &["content", "get", &layers[0]],
    ] {
        let error = ctr.fails(arguments);
        assert!(error.contains(&layers[0]), "{arguments:?}: {error}");
    }
    let error = ctr.fails(&["images", "convert", "--zstd", NAME, "x"]);
    assert!(error.contains("dropped to save space") && error.contains("pull"), "{error}");
    // They come back with the image, and stay.
    host.import();
    ctr.ok(&["gc"]);
    assert!(layers.iter().all(|layer| blob(&host, layer).exists()));
    assert_whole(&ctr);
    // What is lost then is lost, and not dropped.
    ctr.ok(&["content", "rm", &layers[0]]);
    let (answer, well) = verify(&ctr, &[NAME]);
    assert!(!well && findings(&answer)[0].0 == "missing blob", "{answer}");
    host.assert_nothing_left();
}

#[test]
fn images_that_are_deleted_meanwhile_harm_nobody() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    std::thread::scope(|scope| {
        for number in 0..3 {
            let ctr = ctr.clone();
            scope.spawn(move || {
                let name = format!("example.org/copy:{number}");
                for _ in 0..3 {
                    ctr.ok(&["images", "tag", "--force", NAME, &name]);
                    let ended = ctr.run(&["images", "verify", &name]);
                    // Pruned, before it was looked at; never damaged.
                    assert!(ended.code == 0 || ended.stderr.contains("does not exist"), "{ended:?}");
                    let _ = ctr.run(&["images", "convert", "--uncompress", &name, &format!("{name}-plain")]);
                    let _ = ctr.run(&["images", "rm", &name, &format!("{name}-plain")]);
                }
            });
        }
        let ctr = ctr.clone();
        scope.spawn(move || {
            for _ in 0..5 {
                ctr.ok(&["images", "prune", "--all", "name~=example.org"]);
                ctr.ok(&["df"]);
                ctr.ok(&["images", "usage"]);
            }
        });
    });
    ctr.ok(&["images", "prune", "--all", "name~=example.org"]);
    ctr.ok(&["gc"]);
    assert_whole(&ctr);
    assert_eq!(ctr.ok(&["content", "ls", "-q"]).lines().count(), 4);
    assert_eq!((ctr.ok(&["content", "active", "-q"]), ctr.ok(&["leases", "ls", "-q"])), <_>::default());
    host.assert_nothing_left();
}
