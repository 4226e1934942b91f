//! A registry's objects one at a time: `ctr content fetch-object`, `fetch-blob`, `push-object`, and metadata alone.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oci::Digest;
use serde_json::Value;
use tests::client::{Ctr, finish};
use tests::faults::{Fault, Proxy};
use tests::host::{Host, RUNC, STOCK_CTR};
use tests::image::{self, Layer};
use tests::registry::{Guard, PASSWORD, Pack, Parts, REGISTRY, Registry, SKOPEO, USER, architecture, noise};
use tests::{ready, wait_for};

fn gantry() -> Option<Host> {
    ready(&[RUNC, STOCK_CTR, REGISTRY, SKOPEO]).then(Host::gantry)
}

/// What a command that must succeed writes.
fn bytes(ctr: &Ctr, arguments: &[&str]) -> Vec<u8> {
    let output = ctr.command(arguments).output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {output:?}");
    output.stdout
}

fn digest_of(bytes: &[u8]) -> String {
    Digest::sha256_of(bytes).to_string()
}

#[test]
fn objects_are_shown_as_the_registry_has_them() {
    let Some(host) = gantry() else { return };
    let (ctr, stock) = (host.ctr(), host.stock_ctr());
    let registry = Registry::start(Guard { basic: true, ..Guard::default() });
    let digest = registry.push(&image::busybox(), "team/busybox:1");
    let (name, user) = (registry.name("team/busybox:1"), format!("{USER}:{PASSWORD}"));
    let of = |verb: &str, more: &[&str]| {
        bytes(&ctr, &[&["content", verb, "--plain-http", "--user", &user, &name], more].concat())
    };
    let manifest = of("fetch-object", &[]);
    assert_eq!(digest_of(&manifest), digest);
    let same = ["content", "fetch-object", "--plain-http", "--user", &user, &name];
    assert_eq!(bytes(&stock, &same), manifest);
    let document: Value = serde_json::from_slice(&manifest).unwrap();
    let config = document["config"]["digest"].as_str().unwrap();
    let layer = document["layers"][0]["digest"].as_str().unwrap();
    assert_eq!(digest_of(&of("fetch-object", &[config])), config);
    let both = of("fetch-blob", &[layer, config]);
    let (first, second) = both.split_at(document["layers"][0]["size"].as_u64().unwrap() as usize);
    assert_eq!((digest_of(first), digest_of(second)), (layer.to_owned(), config.to_owned()));
    let kind = document["mediaType"].as_str().unwrap_or("application/vnd.oci.image.manifest.v1+json");
    assert_eq!(of("fetch-blob", &["--media-type", kind, &digest]), manifest);
    // What is not there, and for whom it is not.
    let none = digest_of(b"none");
    let fetch = |more: &[&str]| ctr.fails(&[&["content", "fetch-blob", "--plain-http"], more].concat());
    let error = fetch(&["--user", &user, &name, &none]);
    assert!(error.contains(&none) && error.contains("not found"), "{error}");
    assert!(fetch(&[&name, config]).contains("permission denied"));
    assert_eq!(ctr.run(&["content", "fetch-blob", &name]).code, 2, "a digest must be named");
    // None of it is kept.
    assert_eq!(ctr.ok(&["content", "ls", "-q"]), "");
    host.assert_nothing_left();
}

#[test]
fn objects_are_pushed_one_at_a_time() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    let registry = Registry::open();
    let archive = host.folder().join("image.tar");
    let image = image::image(
        "example.org/small:1",
        &["x"],
        &[Layer::default().file("x", 0o755, &noise(7, 1 << 20)).finish()],
    );
    image.write(&archive).unwrap();
    ctr.ok(&["images", "import", "--no-unpack", archive.to_str().unwrap()]);
    let index: Value = serde_json::from_slice(&image.index).unwrap();
    let manifest = index["manifests"][0]["digest"].as_str().unwrap();
    let document: Value = serde_json::from_slice(&bytes(&ctr, &["content", "get", manifest])).unwrap();
    let name = registry.name("pushed/small:1");
    let push = |digest: &str, kind: &str| {
        ["content", "push-object", "--plain-http", &name, digest, kind].map(str::to_owned)
    };
    let ok = |command: [String; 6]| ctr.ok(&command.each_ref().map(String::as_str));
    let kind = index["manifests"][0]["mediaType"].as_str().unwrap();
    // A manifest alone, before what it names, is not what a registry takes.
    let early = ctr.fails(&push(manifest, kind).each_ref().map(String::as_str));
    assert!(early.contains(manifest), "{early}");
    for blob in document["layers"].as_array().unwrap().iter().chain([&document["config"]]) {
        let (digest, kind) = (blob["digest"].as_str().unwrap(), blob["mediaType"].as_str().unwrap());
        assert_eq!(ok(push(digest, kind)), format!("Pushed {digest} {kind}\n"));
        assert_eq!(ok(push(digest, kind)), format!("Exists {digest} {kind}\n"));
    }
    assert_eq!(ok(push(manifest, kind)), format!("Pushed {manifest} {kind}\n"));
    assert_eq!(registry.digest("pushed/small:1"), manifest);
    // By digest it gets no tag.
    let bare = registry.name(&format!("pushed/small@{manifest}"));
    ctr.ok(&["content", "push-object", "--plain-http", &bare, manifest, kind]);
    let none = digest_of(b"none");
    let error = ctr.fails(&push(&none, kind).each_ref().map(String::as_str));
    assert!(error.contains(&none) && error.contains("not found"), "{error}");
    host.assert_nothing_left();
}

#[test]
fn bytes_that_are_not_the_object_are_an_error() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    let proxy = Proxy::alone();
    let blob = noise(8, 300_000);
    let digest = digest_of(&blob);
    let mut parts = Parts::default();
    parts.blob("application/octet-stream", blob.clone());
    let layers = [Layer::default().file("x", 0o644, b"x").finish()];
    let manifest = parts.image(&architecture(), Pack::Gzip, &layers);
    proxy.plant_image("team/app", "1", &parts.finish(&manifest));
    let name = proxy.name("team/app:1");
    let fetch = ["content", "fetch-blob", "--plain-http", &name, &digest];
    assert_eq!(bytes(&ctr, &fetch), blob);
    let path = format!("blobs/{digest}");
    proxy.fault(&path, Fault::Flip(200_000));
    let error = ctr.fails(&fetch);
    assert!(error.contains("gave something else"), "{error}");
    proxy.heal();
    // A connection that breaks is taken up again.
    proxy.fault_times(1, &format!("GET /v2/team/app/{path}"), Fault::CutAfter(100_000));
    assert_eq!(bytes(&ctr, &fetch), blob);
    proxy.heal();
    proxy.fault("manifests/1", Fault::page());
    assert!(ctr.fails(&["content", "fetch-object", "--plain-http", &name]).contains("HTML"));
    host.assert_nothing_left();
}

/// The sockets that the engine holds.
fn sockets(host: &Host) -> usize {
    let open = fs::read_dir(format!("/proc/{}/fd", host.pid())).unwrap().flatten();
    open.filter(|fd| fs::read_link(fd.path()).is_ok_and(|to| to.to_string_lossy().starts_with("socket:")))
        .count()
}

#[test]
fn a_client_that_goes_ends_its_request() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    let proxy = Proxy::alone();
    let blob = noise(9, 300_000);
    let digest = digest_of(&blob);
    let mut parts = Parts::default();
    parts.blob("application/octet-stream", blob);
    let layers = [Layer::default().file("x", 0o644, b"x").finish()];
    let manifest = parts.image(&architecture(), Pack::Gzip, &layers);
    proxy.plant_image("team/app", "1", &parts.finish(&manifest));
    let before = sockets(&host);
    proxy.fault(&format!("GET /v2/team/app/blobs/{digest}"), Fault::StallAfter(100_000));
    let name = proxy.name("team/app:1");
    let child = ctr.spawn(&["content", "fetch-blob", "--plain-http", &name, &digest]);
    wait_for("the bytes to stop", || proxy.delivered(&digest) == 100_000);
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    assert_eq!(finish(child, "the fetch").code, 143);
    wait_for("the engine to let go", || sockets(&host) <= before);
    host.assert_nothing_left();
}

#[test]
fn metadata_alone_is_fetched_and_becomes_an_image() {
    let Some(host) = gantry() else { return };
    let ctr = host.ctr();
    let registry = Registry::open();
    let mut parts = Parts::default();
    let layer = |name: &str| [Layer::default().file(name, 0o644, name.as_bytes()).finish()];
    let ours = parts.image(&architecture(), Pack::Gzip, &layer("ours"));
    let other = parts.image("s390x", Pack::Gzip, &layer("other"));
    let index = parts.index(&[ours, other]);
    registry.push(&parts.finish(&index), "many:1");
    let name = registry.name("many:1");
    ctr.ok(&["content", "fetch", "--plain-http", "--metadata-only", "--label", "a=b", &name]);
    // An index, two manifests, two configs.
    assert_eq!(ctr.ok(&["content", "ls", "-q"]).lines().count(), 5);
    let listed = ctr.ok(&["images", "ls"]);
    assert!(
        listed.contains(&name) && listed.contains("a=b") && !listed.contains("metadata-only"),
        "{listed}"
    );
    ctr.ok(&["gc"]);
    assert_eq!(ctr.ok(&["content", "ls", "-q"]).lines().count(), 5);
    ctr.ok(&["images", "pull", "--plain-http", &name]);
    assert_eq!(ctr.ok(&["content", "ls", "-q"]).lines().count(), 6);
    ctr.ok(&["images", "rm", &name]);
    host.assert_nothing_left();
}
