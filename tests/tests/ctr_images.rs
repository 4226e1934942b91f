//! Our own `ctr images …`, beyond import and export: what is there, mounted, converted, pulled and pushed. Against gantryd, and,
//! but for what only gantryd does, against Debian's containerd, which shows that it asks for no more than containerd's services.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use rcgen::ExtendedKeyUsagePurpose;
use serde_json::{Value, json};
use tests::client::{Ctr, Ended, finish};
use tests::faults::{Fault, Proxy};
use tests::host::{CONTAINERD, Host, Kind, RUNC, STOCK_CTR};
use tests::image::{self, BUSYBOX, Layer, NAME};
use tests::registry::{
    Authority, Guard, PASSWORD, REGISTRY, Registry, SKOPEO, USER, noise, write_docker_config,
};
use tests::terminal::Terminal;
use tests::{left, ready, wait_for};

macro_rules! on_both {
    ($($test:ident),* $(,)?) => {
        mod gantry { $(#[test] fn $test() { super::run(super::Kind::Gantry, super::$test); })* }
        mod containerd { $(#[test] fn $test() { super::run(super::Kind::Containerd, super::$test); })* }
    };
}

on_both!(
    a_check_tells_what_is_there,
    an_image_is_mounted,
    an_image_is_looked_into,
    the_blobs_of_layers_are_let_go,
    plain_layers_are_compressed_on_their_way_in,
    names_are_references,
);

#[test]
fn an_image_is_converted_by_gantryd() {
    run(Kind::Gantry, an_image_is_converted);
}

/// An engine with the image.
fn run(kind: Kind, test: fn(&Host)) {
    if ready(&[CONTAINERD, STOCK_CTR, RUNC, BUSYBOX]) {
        let host = Host::started(kind);
        host.import();
        test(&host);
    }
}

/// The client that imports: ours needs the Transfer service, which Debian's containerd has not got.
fn importer(host: &Host) -> Ctr {
    if host.kind == Kind::Gantry { host.ctr() } else { host.stock_ctr() }
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// A table's words, without the blanks that align them.
fn words(table: &str) -> Vec<Vec<&str>> {
    table.lines().map(|line| line.split_whitespace().collect()).collect()
}

/// What a document in the store says.
fn document(host: &Host, digest: &str) -> Value {
    json(&host.ctr().ok(&["content", "get", digest]))
}

/// The digest of an image's target.
fn target(host: &Host, name: &str) -> String {
    let list = host.ctr().ok(&["images", "ls", &format!("name=={name}")]);
    words(&list)[1][2].to_owned()
}

/// Digests of the layers of an image that has one manifest.
fn layers(host: &Host, name: &str) -> Vec<String> {
    let manifest = document(host, &target(host, name));
    let layers = manifest["layers"].as_array().unwrap().iter();
    layers.map(|layer| layer["digest"].as_str().unwrap().to_owned()).collect()
}

/// The image in the form of `docker save`, so that it has Docker's media types; its layers in gzip or not.
fn docker_archive(host: &Host, gzip: bool) -> PathBuf {
    let layers = [image::base_layer(), image::top_layer()];
    let ids: Vec<String> = layers.iter().map(|layer| oci::Digest::sha256_of(layer).to_string()).collect();
    let host_platform = oci::Platform::host();
    let config = json!({
        "architecture": host_platform.architecture, "os": "linux",
        "config": {"Cmd": ["sh"], "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": ids},
        "x-unknown": "stays",
    });
    let mut builder = tar::Builder::new(Vec::new());
    let mut file = |path: &str, bytes: &[u8]| {
        let mut header = tar::Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, path, bytes).unwrap();
    };
    file("config.json", config.to_string().as_bytes());
    for (number, layer) in layers.iter().enumerate() {
        if !gzip {
            file(&format!("{number}.tar"), layer);
            continue;
        }
        let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut gzip, layer).unwrap();
        file(&format!("{number}.tar"), &gzip.finish().unwrap());
    }
    let manifest =
        json!([{"Config": "config.json", "RepoTags": ["docker:form"], "Layers": ["0.tar", "1.tar"]}]);
    file("manifest.json", manifest.to_string().as_bytes());
    let path = host.folder().join("docker.tar");
    fs::write(&path, builder.into_inner().unwrap()).unwrap();
    path
}

fn a_check_tells_what_is_there(host: &Host) {
    let (ctr, stock) = (host.ctr(), host.stock_ctr());
    let same = |arguments: &[&str]| {
        let (ours, theirs) = (ctr.ok(arguments), stock.ok(arguments));
        assert_eq!(words(&ours), words(&theirs), "{arguments:?}");
        ours
    };
    assert!(same(&["images", "check"]).contains("complete (3/3)"));
    assert!(same(&["images", "check", "--snapshotter", "native"]).contains("false"));
    assert_eq!(ctr.ok(&["images", "check", "-q"]).trim(), NAME);
    assert_eq!(ctr.ok(&["images", "check", "-q", "--snapshotter", "native"]), "");
    assert_eq!(ctr.ok(&["images", "check", "-q", "name==other"]), "");
    // An index without this platform has nothing to be counted.
    let mut foreign = image::busybox();
    let platform = format!("\"architecture\":\"{}\"", oci::Platform::host().architecture);
    let index = String::from_utf8(foreign.index).unwrap();
    assert!(index.contains(&platform), "{index}");
    foreign.index = index.replace(&platform, "\"architecture\":\"mips\"").into_bytes();
    let archive = host.folder().join("foreign.tar");
    foreign.write(&archive).unwrap();
    let archive = archive.to_str().unwrap();
    importer(host).ok(&[
        "images",
        "import",
        "--all-platforms",
        "--no-unpack",
        "--base-name",
        "none",
        "--index-name",
        "foreign",
        archive,
    ]);
    let (ours, theirs) =
        (ctr.run(&["images", "check", "name==foreign"]), stock.run(&["images", "check", "name==foreign"]));
    assert_eq!((ours.code, theirs.code), (1, 1), "{ours:?} {theirs:?}");
    assert_eq!(words(&ours.stdout), words(&theirs.stdout));
    ctr.ok(&["images", "rm", "foreign"]);
    ctr.ok(&["content", "rm", &layers(host, NAME)[0]]);
    assert!(same(&["images", "check"]).contains("incomplete (2/3)"));
    assert_eq!(ctr.ok(&["images", "check", "-q"]), "");
    // Without its manifest nothing can be said; containerd's ctr fails as well, and shows the row.
    ctr.ok(&["content", "rm", &target(host, NAME)]);
    let (ours, theirs) = (ctr.run(&["images", "check"]), stock.run(&["images", "check"]));
    assert_eq!((ours.code, theirs.code), (1, 1), "{ours:?} {theirs:?}");
    assert_eq!(words(&ours.stdout), words(&theirs.stdout));
    assert!(ours.stdout.contains("unavailable (0/?)") && ours.stderr.contains(NAME), "{ours:?}");
    host.assert_nothing_left();
}

fn an_image_is_mounted(host: &Host) {
    let ctr = host.ctr();
    let point = host.folder().join("point");
    let at = point.to_str().unwrap();
    fs::create_dir(&point).unwrap();
    let snapshots = || ctr.ok(&["snapshots", "ls", "-q"]);
    let before = snapshots();
    let said = ctr.ok(&["images", "mount", NAME, at]);
    assert_eq!(said.lines().last(), Some(at));
    assert!(before.contains(said.lines().next().unwrap()), "{said}");
    assert_eq!(fs::read_to_string(point.join("etc/replaced-above")).unwrap(), "new\n");
    assert!(fs::write(point.join("etc/written"), "x").is_err(), "it is read-only");
    assert_eq!(ctr.ok(&["leases", "ls", "-q"]).trim(), at);
    // A collection leaves what is mounted.
    host.collect();
    assert!(snapshots().lines().any(|key| key == at));
    let open = fs::File::open(point.join("etc/passwd")).unwrap();
    assert!(ctr.fails(&["images", "unmount", "--rm", at]).contains("in use"));
    assert!(snapshots().lines().any(|key| key == at));
    drop(open);
    assert_eq!(ctr.ok(&["images", "unmount", "--rm", at]).trim(), at);
    assert_eq!(snapshots(), before);
    assert_eq!(ctr.ok(&["leases", "ls", "-q"]), "");
    // Writable; mounted again, what was written is there; Debian's ctr takes it down.
    ctr.ok(&["images", "mount", "--rw", "--label", "a=b", NAME, at]);
    fs::write(point.join("etc/written"), "x").unwrap();
    ctr.ok(&["images", "unmount", at]);
    assert!(left::mounts(host.folder()).iter().all(|mount| mount != at));
    assert!(ctr.ok(&["snapshots", "info", at]).contains("\"a\": \"b\""));
    ctr.ok(&["images", "mount", "--rw", NAME, at]);
    assert_eq!(fs::read_to_string(point.join("etc/written")).unwrap(), "x");
    host.stock_ctr().ok(&["images", "unmount", "--rm", at]);
    assert_eq!((snapshots(), ctr.ok(&["leases", "ls", "-q"])), (before.clone(), String::new()));
    // Snapshots that are plain folders need no mount.
    let said = ctr.ok(&["images", "mount", "--snapshotter", "native", NAME]);
    let folder = PathBuf::from(said.lines().last().unwrap());
    assert_eq!(fs::read_to_string(folder.join("etc/replaced-above")).unwrap(), "new\n");
    ctr.ok(&["leases", "rm", "--sync", ctr.ok(&["leases", "ls", "-q"]).trim()]);
    assert!(
        !ctr.ok(&["snapshots", "--snapshotter", "native", "ls"]).contains("View"),
        "the lease alone held it"
    );
    // What fails leaves nothing.
    assert!(ctr.fails(&["images", "mount", NAME]).contains("name a folder"));
    assert!(ctr.fails(&["images", "mount", "no-such:image", at]).contains("no-such:image"));
    let other = ctr.fails(&["images", "mount", "--platform", "linux/s390x", NAME, at]);
    assert!(other.contains("linux/s390x"), "{other}");
    assert!(ctr.fails(&["images", "mount", NAME, "/no/such/folder"]).contains("not a folder"));
    assert_eq!((snapshots(), ctr.ok(&["leases", "ls", "-q"])), (before, String::new()));
    host.assert_nothing_left();
}

fn an_image_is_converted(host: &Host) {
    let ctr = host.ctr();
    importer(host).ok(&["images", "import", docker_archive(host, true).to_str().unwrap()]);
    let (source, result) = ("docker.io/library/docker:form", "example.org/converted:1");
    let manifest = document(host, &target(host, source));
    assert!(manifest["mediaType"].as_str().unwrap().contains("docker"), "{manifest}");
    // Docker's media types to OCI's: the layers stay.
    let digest = ctr.ok(&["images", "convert", "--oci", source, result]);
    assert_eq!(digest.trim(), target(host, result));
    let converted = document(host, digest.trim());
    assert!(!converted.to_string().contains("docker"), "{converted}");
    assert_eq!(layers(host, source), layers(host, result));
    assert_eq!(converted["layers"][0]["mediaType"], "application/vnd.oci.image.layer.v1.tar+gzip");
    assert_eq!(converted["config"]["digest"], manifest["config"]["digest"]);
    // Uncompressed, in the place of the first result; what nothing names goes, and what is left is a whole image.
    ctr.ok(&["images", "convert", "--oci", "--uncompress", source, result]);
    let converted = document(host, &target(host, result));
    assert_eq!(converted["layers"][1]["mediaType"], "application/vnd.oci.image.layer.v1.tar");
    let plain = [image::base_layer(), image::top_layer()];
    let plain: Vec<String> = plain.iter().map(|layer| oci::Digest::sha256_of(layer).to_string()).collect();
    assert_eq!(layers(host, result), plain);
    assert_eq!(converted["layers"][0]["size"], image::base_layer().len());
    ctr.ok(&["images", "rm", source]);
    host.collect();
    assert!(!ctr.ok(&["content", "ls", "-q"]).contains(digest.trim()));
    assert!(host.stock_ctr().ok(&["images", "check", &format!("name=={result}")]).contains("complete (3/3)"));
    // Unpacked from the converted layers: this snapshotter has none of them.
    let run = ["run", "--rm", "--snapshotter", "native", result, "c", "cat", "/etc/replaced-above"];
    assert_eq!(ctr.ok(&run), "new\n");
    // An index, of which one platform is kept.
    let archive = host.folder().join("busybox.tar");
    importer(host).ok(&["images", "import", "--index-name", "index", archive.to_str().unwrap()]);
    ctr.ok(&["images", "convert", "--uncompress", "--all-platforms", "index", "plain-index"]);
    let index = document(host, &target(host, "plain-index"));
    assert_eq!(index["manifests"].as_array().unwrap().len(), 1, "{index}");
    let manifest = document(host, index["manifests"][0]["digest"].as_str().unwrap());
    assert_eq!(manifest["layers"][0]["mediaType"], "application/vnd.oci.image.layer.v1.tar");
    host.collect();
    assert!(ctr.ok(&["images", "check", "name==plain-index"]).contains("complete (3/3)"));
    // What fails leaves neither name nor lease, and what had the name keeps it.
    let names = ctr.ok(&["images", "ls", "-q"]);
    let error = ctr.fails(&["images", "convert", "--platform", "windows/amd64", "index", "other"]);
    assert!(error.contains("windows/amd64") && error.contains("linux/"), "{error}");
    assert!(ctr.fails(&["images", "convert", "no-such", "other"]).contains("no-such"));
    ctr.ok(&["content", "rm", &layers(host, NAME)[1]]);
    for flags in [&["--uncompress"][..], &["--oci"], &[]] {
        let before = target(host, result);
        let error = ctr.fails(&[&["images", "convert"], flags, &[NAME, result]].concat());
        assert!(error.contains(&layers(host, NAME)[1]), "{error}");
        assert_eq!(target(host, result), before);
    }
    assert_eq!(ctr.ok(&["images", "ls", "-q"]), names);
    assert_eq!(ctr.ok(&["leases", "ls", "-q"]), "");
    assert_eq!(ctr.ok(&["content", "active", "-q"]), "");
    host.assert_nothing_left();
}

fn an_image_is_looked_into(host: &Host) {
    let ctr = host.ctr();
    let usage = ctr.ok(&["images", "usage", NAME]);
    let keys: Vec<&str> = words(&usage)[1..].iter().map(|row| row[0]).collect();
    let all = ctr.ok(&["snapshots", "usage"]);
    assert_eq!(keys.len(), 2, "{usage}");
    for row in &words(&usage) {
        assert!(words(&all).contains(row), "{row:?} is not in {all}");
    }
    let top: Value = json(&ctr.ok(&["snapshots", "info", keys[0]]));
    assert_eq!(top["Parent"], keys[1], "the topmost comes first");
    let error = ctr.fails(&["images", "usage", "--snapshotter", "native", NAME]);
    assert!(error.contains("native") && error.contains("unpack"), "{error}");
    let tree = ctr.ok(&["images", "inspect", NAME]);
    let lines: Vec<&str> = tree.lines().collect();
    let layers = layers(host, NAME);
    assert_eq!(lines[0], NAME);
    assert!(lines[3].starts_with("└── application/vnd.oci.image.manifest"), "{tree}");
    assert!(lines[4].starts_with("    ├── application/vnd.oci.image.config"), "{tree}");
    assert!(lines[5].starts_with("    ├── ") && lines[5].contains(&layers[0]), "{tree}");
    assert!(lines[6].starts_with("    └── ") && lines[6].contains(&layers[1]), "{tree}");
    assert_eq!(lines.len(), 7, "{tree}");
    let verbose = ctr.ok(&["images", "inspect", "--content", NAME]);
    assert!(
        verbose.contains("containerd.io/gc.ref.content.l.0") && verbose.contains("diff_ids"),
        "{verbose}"
    );
    host.assert_nothing_left();
}

fn the_blobs_of_layers_are_let_go(host: &Host) {
    let ctr = host.ctr();
    ctr.ok(&["containers", "create", NAME, "c", "true"]);
    // The archive's own index goes first, which nothing holds.
    host.collect();
    // A container does without them once they are unpacked.
    let all = ctr.ok(&["content", "ls", "-q"]);
    let dry = ctr.ok(&["content", "prune", "references", "--dry"]);
    assert_eq!(dry.lines().count(), 2, "{dry}");
    assert!(dry.contains(&format!("{} containerd.io/gc.ref.content.l.0", target(host, NAME))), "{dry}");
    assert_eq!(ctr.ok(&["content", "ls", "-q"]), all);
    let layers = layers(host, NAME);
    ctr.ok(&["content", "prune", "references"]);
    let rest = ctr.ok(&["content", "ls", "-q"]);
    assert!(layers.iter().all(|layer| !rest.contains(layer)), "{rest}");
    assert_eq!(rest.lines().count() + layers.len(), all.lines().count());
    assert_eq!(ctr.ok(&["run", "--rm", NAME, "d", "echo", "runs"]), "runs\n");
    ctr.ok(&["containers", "rm", "c"]);
    if host.kind == Kind::Containerd {
        return;
    }
    // An import may do so at once.
    ctr.ok(&["images", "rm", "--sync", NAME]);
    let archive = host.folder().join("busybox.tar");
    ctr.ok(&["images", "import", "--discard-unpacked-layers", "--sync-fs", archive.to_str().unwrap()]);
    host.collect();
    let check = ctr.ok(&["images", "check"]);
    assert!(check.contains("incomplete (1/3)") && check.contains("true"), "{check}");
    assert_eq!(ctr.ok(&["run", "--rm", NAME, "d", "echo", "runs"]), "runs\n");
    host.assert_nothing_left();
}

fn plain_layers_are_compressed_on_their_way_in(host: &Host) {
    let (ctr, name) = (host.ctr(), "docker.io/library/docker:form");
    let archive = docker_archive(host, false);
    // Layers that are there in another form would be taken as they are.
    ctr.ok(&["images", "rm", "--sync", NAME]);
    let plain = [image::base_layer(), image::top_layer()];
    let plain: Vec<String> = plain.iter().map(|layer| oci::Digest::sha256_of(layer).to_string()).collect();
    importer(host).ok(&["images", "import", archive.to_str().unwrap()]);
    assert_eq!(layers(host, name), plain);
    ctr.ok(&["images", "rm", "--sync", name]);
    importer(host).ok(&["images", "import", "--compress-blobs", archive.to_str().unwrap()]);
    let manifest = document(host, &target(host, name));
    for layer in manifest["layers"].as_array().unwrap() {
        assert!(layer["mediaType"].as_str().unwrap().ends_with(".gzip"), "{manifest}");
    }
    let run = ["run", "--rm", "--snapshotter", "native", name, "c", "cat", "/etc/replaced-above"];
    assert_eq!(ctr.ok(&run), "new\n");
    host.assert_nothing_left();
}

fn names_are_references(host: &Host) {
    let ctr = host.ctr();
    let error = ctr.fails(&["images", "tag", NAME, "fine:1", "Not A Reference"]);
    assert!(error.contains("Not A Reference") && error.contains("--skip-reference-check"), "{error}");
    assert_eq!(ctr.ok(&["images", "ls", "-q"]).trim(), NAME, "none of them was made");
    ctr.ok(&["images", "tag", "--skip-reference-check", NAME, "Not A Reference"]);
    assert!(ctr.ok(&["images", "ls", "-q"]).contains("Not A Reference"));
    host.assert_nothing_left();
}

/// An engine of ours alone, and what a registry needs.
fn gantry() -> Option<Host> {
    ready(&[STOCK_CTR, RUNC, BUSYBOX, REGISTRY, SKOPEO]).then(Host::gantry)
}

#[test]
fn a_pull_tells_line_by_line_what_it_does() {
    let Some(host) = gantry() else { return };
    let (ctr, registry) = (host.ctr(), Registry::open());
    let digest = registry.push(&image::busybox(), "busybox:1");
    let name = registry.name("busybox:1");
    // What is not there says how it is to be had.
    let error = ctr.fails(&["run", "--rm", &name, "c", "true"]);
    assert!(error.contains(&format!("ctr images pull {name}")), "{error}");
    let said = ctr.run(&["images", "pull", "--plain-http", &name]);
    assert_eq!((said.code, said.stderr.as_str()), (0, ""), "{said:?}");
    assert!(!said.stdout.contains('\x1b') && !said.stdout.contains('\r'), "no terminal: {said:?}");
    assert_eq!(said.stdout.lines().last().unwrap(), format!("saved {name} ({digest})"), "{said:?}");
    for layer in layers(&host, &name) {
        let short = &layer[..19];
        assert!(
            said.stdout.lines().any(|line| line.contains(short) && line.contains("complete")),
            "{said:?}"
        );
    }
    assert!(said.stdout.contains("elapsed: ") && said.stdout.contains("total: "), "{said:?}");
    assert_eq!(ctr.ok(&["run", "--rm", &name, "c", "cat", "/etc/replaced-above"]), "new\n");
    // Again: nothing is fetched, and with --quiet the name alone is told.
    let before = registry.requests().len();
    assert_eq!(ctr.ok(&["images", "pull", "--plain-http", "--quiet", &name]), format!("{name}\n"));
    assert!(registry.requests()[before..].iter().all(|request| !request.contains("/blobs/")));
    let chain = ctr.ok(&["images", "pull", "--plain-http", "-q", "--print-chainid", &name]);
    let usage = ctr.ok(&["images", "usage", &name]);
    assert!(chain.contains(words(&usage)[1][0]), "{chain}");
    // Pushed elsewhere it is the same, for others too; by its manifest as well, which leaves no name behind.
    let other = registry.name("other/copy:2");
    assert!(
        ctr.ok(&["images", "push", "--plain-http", &other, &name]).ends_with(&format!("pushed {other}\n"))
    );
    assert_eq!(registry.digest("other/copy:2"), registry.digest("busybox:1"));
    let third = registry.name("third:3");
    ctr.ok(&["images", "push", "--plain-http", "-q", "--manifest", &manifest_of(&host, &name), &third]);
    assert_eq!(registry.digest("third:3"), registry.digest("busybox:1"));
    assert_eq!(ctr.ok(&["images", "ls", "-q"]), format!("{name}\n"));
    // Content alone is not unpacked.
    ctr.ok(&["images", "rm", "--sync", &name]);
    ctr.ok(&["content", "fetch", "--plain-http", &name]);
    assert!(ctr.ok(&["images", "check"]).contains("complete (3/3)"));
    assert_eq!(ctr.ok(&["snapshots", "ls", "-q"]), "");
    host.assert_nothing_left();
}

/// The digest of an image's manifest, be it beneath an index.
fn manifest_of(host: &Host, name: &str) -> String {
    let target = target(host, name);
    let document = document(host, &target);
    document["manifests"][0]["digest"].as_str().map_or(target, str::to_owned)
}

/// Runs `ctr images pull` with docker's configuration in this folder, and this folder's programs.
fn pull_as(host: &Host, folder: &Path, name: &str) -> Ended {
    let mut command = host.ctr().command(&["images", "pull", "--plain-http", name]);
    let path = format!("{}:{}", folder.display(), std::env::var("PATH").unwrap());
    command.env("DOCKER_CONFIG", folder).env("PATH", path);
    command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let ended = finish(command.spawn().unwrap(), "pull");
    let shown = format!("{}{}{}", ended.stdout, ended.stderr, host.log());
    assert!(!shown.contains(PASSWORD), "the secret is shown: {shown}");
    ended
}

#[test]
fn credentials_come_from_where_docker_has_them() {
    let Some(host) = gantry() else { return };
    let registry = Registry::start(Guard { basic: true, ..Guard::default() });
    registry.push(&image::busybox(), "busybox:1");
    let (name, address) = (registry.name("busybox:1"), registry.address.to_string());
    let folder = host.folder().join("docker");
    fs::create_dir(&folder).unwrap();
    // Without any.
    let refused = pull_as(&host, &folder, &name);
    assert!(refused.code == 1 && refused.stderr.contains(&name), "{refused:?}");
    // As `docker login` leaves them.
    write_docker_config(&folder, &address);
    let pulled = pull_as(&host, &folder, &name);
    assert_eq!(pulled.code, 0, "{pulled:?}");
    host.ctr().ok(&["images", "rm", "--sync", &name]);
    // By a helper, which gets the host on stdin.
    let config = |config: Value| fs::write(folder.join("config.json"), config.to_string()).unwrap();
    let helper = |script: &str| {
        let path = folder.join("docker-credential-tests");
        fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o755)).unwrap();
    };
    config(json!({"credHelpers": {&address: "tests"}}));
    let asked = folder.join("asked").display().to_string();
    let answer = json!({"ServerURL": address, "Username": USER, "Secret": PASSWORD});
    fs::write(folder.join("answer"), answer.to_string()).unwrap();
    let answer = folder.join("answer").display().to_string();
    helper(&format!("echo \"$@\" > {asked}; cat >> {asked}; cat {answer}"));
    let pulled = pull_as(&host, &folder, &name);
    assert_eq!(pulled.code, 0, "{pulled:?}");
    assert_eq!(fs::read_to_string(&asked).unwrap(), format!("get\n{address}\n"));
    host.ctr().ok(&["images", "rm", "--sync", &name]);
    // The store of all hosts, which has nothing for this one: then the file has.
    config(json!({"credsStore": "tests", "auths": {}}));
    helper("echo 'credentials not found in native keychain'; exit 1");
    let refused = pull_as(&host, &folder, &name);
    assert!(refused.code == 1 && !refused.stderr.contains("docker-credential"), "{refused:?}");
    // One that fails, and one that is not there, are told.
    helper("echo 'the keyring is locked'; exit 3");
    let refused = pull_as(&host, &folder, &name);
    assert!(refused.code == 1 && refused.stderr.contains("the keyring is locked"), "{refused:?}");
    config(json!({"credsStore": "missing"}));
    let refused = pull_as(&host, &folder, &name);
    assert!(refused.code == 1 && refused.stderr.contains("docker-credential-missing"), "{refused:?}");
    host.assert_nothing_left();
}

#[test]
fn a_secret_is_asked_for_on_the_terminal_and_not_shown() {
    let Some(host) = gantry() else { return };
    let registry = Registry::start(Guard { basic: true, ..Guard::default() });
    registry.push(&image::busybox(), "busybox:1");
    let name = registry.name("busybox:1");
    let pull = host.ctr().command(&["images", "pull", "--plain-http", "--user", USER, &name]);
    let mut terminal = Terminal::start(&pull, 24, 60);
    terminal.expect("Password of");
    terminal.send(&format!("typo\x15{PASSWORD}x\x7f\r"));
    terminal.expect(&format!("saved {name}"));
    let shown = terminal.shown();
    assert!(!shown.contains("sesame") && !shown.contains("typo"), "{shown}");
    assert_eq!(terminal.wait(), 0);
    // Given up.
    let mut terminal = Terminal::start(&pull, 24, 60);
    terminal.expect("Password of");
    terminal.send("half\x03");
    terminal.expect("no password");
    assert_eq!(terminal.wait(), 1);
    host.assert_nothing_left();
}

#[test]
fn certificates_of_the_command_line_reach_the_engine() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    let authority = Authority::default();
    let registry =
        Registry::start(Guard { tls: Some(&authority), clients: Some(&authority), ..Guard::default() });
    registry.push(&image::busybox(), "busybox:1");
    let name = registry.name("busybox:1");
    let (certificate, key) = authority.issue("ours", &["ours"], ExtendedKeyUsagePurpose::ClientAuth);
    let (certificate, key) = (certificate.to_str().unwrap(), key.to_str().unwrap());
    let authorities = authority.certificate();
    let authorities = authorities.to_str().unwrap();
    let temporary = host.folder().join("tmp");
    fs::create_dir(&temporary).unwrap();
    let pull = |arguments: &[&str]| {
        let all = [&["images", "pull"], arguments, &[&name]].concat();
        let mut command = ctr.command(&all);
        command.env("TMPDIR", &temporary);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        let ended = finish(command.spawn().unwrap(), "pull");
        assert_eq!(fs::read_dir(&temporary).unwrap().count(), 0, "copies of the files stay");
        ended
    };
    let ours = ["--tlscert", certificate, "--tlskey", key];
    let refused = pull(&ours);
    assert!(refused.code == 1 && refused.stderr.contains("certificate"), "{refused:?}");
    for arguments in [&["--tlscacert", authorities][..], &["--skip-verify"]] {
        let pulled = pull(&[arguments, &ours].concat());
        assert_eq!(pulled.code, 0, "{pulled:?}");
        ctr.ok(&["images", "rm", "--sync", &name]);
    }
    let missing = pull(&["--tlscacert", "/no/such/file"]);
    assert!(missing.code == 1 && missing.stderr.contains("/no/such/file"), "{missing:?}");
    host.assert_nothing_left();
}

#[test]
fn an_interrupted_pull_keeps_what_it_has_and_goes_on() {
    let Some(mut host) = gantry() else { return };
    let registry = Registry::open();
    let big = Layer::default().file("big", 0o644, &noise(3, 8 << 20)).finish();
    registry.push(&image::image("x", &["sh"], &[image::base_layer(), big]), "big:1");
    let proxy = Proxy::of(&registry);
    let name = proxy.name("big:1");
    let manifest: Value = json(&registry.inspect("big:1", &["--raw"]));
    let layer = manifest["layers"][1]["digest"].as_str().unwrap().to_owned();
    let size = manifest["layers"][1]["size"].as_u64().unwrap();
    let stalled = 3 << 20;
    proxy.fault(&format!("/blobs/{layer}"), Fault::StallAfter(stalled));
    let pull = ["images", "pull", "--plain-http", &name];
    let child = host.ctr().spawn(&pull);
    wait_for("the pull to stand still", || proxy.delivered(&layer) >= stalled);
    kill(Pid::from_raw(child.id() as i32), Signal::SIGINT).unwrap();
    let ended = finish(child, "pull");
    assert_eq!(ended.code, 130, "{ended:?}");
    assert!(ended.stderr.contains("interrupted") && ended.stderr.contains("is kept"), "{ended:?}");
    assert_eq!(host.ctr().ok(&["images", "ls", "-q"]), "", "no half image is visible");
    proxy.heal();
    let ended = host.ctr().run(&pull);
    assert_eq!(ended.code, 0, "{ended:?}");
    // What was on its way when it was given up may come twice.
    assert!(proxy.delivered(&layer) < size + (1 << 20), "{} of {size}", proxy.delivered(&layer));
    // An engine that goes away in the middle.
    host.ctr().ok(&["images", "rm", "--sync", &name]);
    proxy.fault(&format!("/blobs/{layer}"), Fault::Stall);
    let requests = proxy.count(&format!("/blobs/{layer}"));
    let child = host.ctr().spawn(&pull);
    wait_for("the pull to stand still", || proxy.count(&format!("/blobs/{layer}")) > requests);
    host.kill();
    let ended = finish(child, "pull");
    assert!(ended.code == 1 && ended.stderr.contains("the engine has gone away"), "{ended:?}");
    proxy.heal();
    host.start();
    assert_eq!(host.ctr().run(&pull).code, 0);
    host.assert_nothing_left();
}

#[test]
fn bars_fit_the_terminal() {
    let Some(host) = gantry() else { return };
    let registry = Registry::open();
    let layers: Vec<Vec<u8>> = (0..40)
        .map(|number| {
            Layer::default().file(&format!("file{number}"), 0o644, &noise(number, 200_000)).finish()
        })
        .collect();
    registry.push(&image::image("x", &["sh"], &layers), "many:1");
    let name = registry.name("many:1");
    for (rows, columns) in [(24, 100), (6, 30)] {
        let pull = host.ctr().command(&["images", "pull", "--plain-http", &name]);
        let terminal = Terminal::start(&pull, rows, columns);
        terminal.expect(&format!("saved {name}"));
        let shown = terminal.shown();
        assert!(shown.contains("... and ") && shown.contains("elapsed: "), "{shown}");
        assert_eq!(terminal.wait(), 0);
        host.ctr().ok(&["images", "rm", "--sync", &name]);
    }
    host.assert_nothing_left();
}
