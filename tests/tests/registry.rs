//! Images from and to Debian's docker-registry: by plain http, TLS, with a password, with tokens, by mirrors.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::net::SocketAddr;
use std::os::fd::OwnedFd;
use std::process::Command;

use oci::Digest;
use rcgen::ExtendedKeyUsagePurpose;
use serde_json::Value;
use tests::client::{Ctr, finish};
use tests::faults::{Fault, Proxy};
use tests::host::{CONTAINERD, Host, Kind, RUNC, STOCK_CTR};
use tests::image::{self, BUSYBOX, Image, Layer, NAME};
use tests::ready;
use tests::registry::{
    Authority, Guard, PASSWORD, Pack, Parts, REFRESH, REGISTRY, Registry, SKOPEO, TokenRules, Tokens, USER,
    architecture, done, noise, write_docker_config, write_hosts,
};

const PROGRAMS: [&str; 7] = [CONTAINERD, STOCK_CTR, RUNC, BUSYBOX, REGISTRY, SKOPEO, "/usr/bin/umoci"];

/// Each test runs with our client and engine, with Debian's client on our engine (which then serves content, snapshots and
/// diffs alone, the client pulls by itself), and with Debian's both, which shows that it asks for what containerd does.
macro_rules! on_all {
    ($($test:ident),* $(,)?) => {
        mod gantry { $(#[test] fn $test() { super::run(super::Kind::Gantry, super::Ctr::ours, super::$test); })* }
        mod stock_ctr { $(#[test] fn $test() { super::run(super::Kind::Gantry, super::Ctr::stock, super::$test); })* }
        mod containerd { $(#[test] fn $test() { super::run(super::Kind::Containerd, super::Ctr::stock, super::$test); })* }
    };
}

on_all!(
    by_plain_http,
    by_tls_with_a_private_authority,
    with_a_password,
    with_tokens,
    of_every_shape,
    of_all_platforms,
    by_mirrors,
    pushed_for_others_to_read
);

fn run(kind: Kind, client: fn(&Host) -> Ctr, test: fn(&Host, &Ctr)) {
    if ready(&PROGRAMS) {
        let host = Host::started(kind);
        test(&host, &client(&host));
    }
}

/// Pulls, runs and removes an image.
fn pulls_and_runs(host: &Host, ctr: &Ctr, name: &str, arguments: &[&str]) {
    let mut command = vec!["images", "pull"];
    command.extend(arguments);
    command.push(name);
    ctr.ok(&command);
    assert_eq!(ctr.ok(&["images", "ls", "-q"]), format!("{name}\n"));
    assert_eq!(ctr.ok(&["run", "--rm", name, "pulled", "cat", "etc/replaced-above"]), "new\n");
    ctr.ok(&["images", "rm", name]);
    host.assert_nothing_left();
}

fn user() -> String {
    format!("{USER}:{PASSWORD}")
}

fn by_plain_http(host: &Host, ctr: &Ctr) {
    let registry = Registry::open();
    let digest = registry.push(&image::busybox(), "some/busybox:1");
    assert_eq!(registry.digest("some/busybox:1"), digest);
    pulls_and_runs(host, ctr, &registry.name("some/busybox:1"), &["--plain-http"]);
    pulls_and_runs(host, ctr, &registry.name(&format!("some/busybox@{digest}")), &["--plain-http"]);
}

fn by_tls_with_a_private_authority(host: &Host, ctr: &Ctr) {
    let authority = Authority::default();
    let registry = Registry::start(Guard { tls: Some(&authority), ..Guard::default() });
    registry.push(&image::busybox(), "busybox:1");
    let name = registry.name("busybox:1");
    let hosts = host.folder().join("hosts");
    let pull = ["--hosts-dir", hosts.to_str().unwrap()];
    let write = |more: &str| {
        let toml = format!("server = 'https://{0}'\n[host.'https://{0}']\n{more}\n", registry.address);
        write_hosts(&hosts, &registry.address.to_string(), &toml);
    };
    write("");
    let error = ctr.fails(&["images", "pull", pull[0], pull[1], &name]);
    assert!(error.contains("certificate"), "{error}");
    write(&format!("ca = '{}'", authority.certificate().display()));
    pulls_and_runs(host, ctr, &name, &pull);
    write("skip_verify = true");
    pulls_and_runs(host, ctr, &name, &pull);
}

/// What a pull says that is not let in.
fn assert_not_let_in(error: &str) {
    let ways = ["401", "authorization", "permission denied", "anonymous"];
    assert!(ways.iter().any(|way| error.contains(way)), "{error}");
}

fn with_a_password(host: &Host, ctr: &Ctr) {
    let registry = Registry::start(Guard { basic: true, ..Guard::default() });
    registry.push(&image::busybox(), "busybox:1");
    let name = registry.name("busybox:1");
    assert_not_let_in(&ctr.fails(&["images", "pull", "--plain-http", &name]));
    assert_not_let_in(&ctr.fails(&["images", "pull", "--plain-http", "--user", "thief:wrong", &name]));
    pulls_and_runs(host, ctr, &name, &["--plain-http", "--user", &user()]);
    // What one was let in by is not another's.
    assert_not_let_in(&ctr.fails(&["images", "pull", "--plain-http", &name]));
}

fn with_tokens(host: &Host, ctr: &Ctr) {
    let tokens = Tokens::start(TokenRules::default());
    let registry = Registry::start(Guard { tokens: Some(&tokens), ..Guard::default() });
    registry.push(&image::busybox(), "busybox:1");
    let name = registry.name("busybox:1");
    tokens.set(TokenRules { private: true, ..TokenRules::default() });
    let before = tokens.requests().len();
    assert_not_let_in(&ctr.fails(&["images", "pull", "--plain-http", &name]));
    assert!(tokens.requests()[before..].iter().all(|request| request.status == 401));
    pulls_and_runs(host, ctr, &name, &["--plain-http", "--user", &user()]);
    // What one was let in by is not another's.
    assert_not_let_in(&ctr.fails(&["images", "pull", "--plain-http", &name]));
    tokens.set(TokenRules::default());
    pulls_and_runs(host, ctr, &name, &["--plain-http"]);
}

/// An image that runs, with a layer of its own that `seed` makes.
fn runs_with(seed: u64, pack: Pack) -> (Parts, Value) {
    let mut parts = Parts::default();
    let own = Layer::default().folder("own", 0o755).file("own/noise", 0o644, &noise(seed, 100_000)).finish();
    let manifest = parts.image(&architecture(), pack, &[image::base_layer(), own, image::top_layer()]);
    (parts, manifest)
}

/// The layers of an image's first manifest: digests and sizes.
fn layers(image: &Image) -> Vec<(String, u64)> {
    let document = |digest: &str| -> Value {
        let (_, bytes) = image.blobs.iter().find(|(known, _)| known.as_str() == digest).unwrap();
        serde_json::from_slice(bytes).unwrap()
    };
    let mut document = document(
        serde_json::from_slice::<Value>(&image.index).unwrap()["manifests"][0]["digest"].as_str().unwrap(),
    );
    if let Some(first) = document["manifests"][0]["digest"].as_str().map(str::to_owned) {
        let (_, bytes) = image.blobs.iter().find(|(known, _)| known.as_str() == first).unwrap();
        document = serde_json::from_slice(bytes).unwrap();
    }
    let layers = document["layers"].as_array().unwrap();
    layers
        .iter()
        .map(|layer| (layer["digest"].as_str().unwrap().to_owned(), layer["size"].as_u64().unwrap()))
        .collect()
}

fn of_every_shape(host: &Host, ctr: &Ctr) {
    let registry = Registry::open();
    for (tag, pack) in [("plain", Pack::Plain), ("gzip", Pack::Gzip), ("zstd", Pack::Zstd)] {
        let (parts, manifest) = runs_with(1, pack);
        registry.push(&parts.finish(&manifest), &format!("shapes:{tag}"));
        pulls_and_runs(host, ctr, &registry.name(&format!("shapes:{tag}")), &["--plain-http"]);
    }
    registry.push_as(&image::busybox(), "shapes:docker", &["--format", "v2s2"]);
    assert!(
        registry.inspect("shapes:docker", &["--raw"]).contains("vnd.docker.distribution.manifest.v2+json")
    );
    pulls_and_runs(host, ctr, &registry.name("shapes:docker"), &["--plain-http"]);
    let proxy = Proxy::alone();
    let mut parts = Parts::docker();
    let manifest = parts.image(&architecture(), Pack::Gzip, &[image::base_layer(), image::top_layer()]);
    let other = parts.image("s390x", Pack::Gzip, &[image::top_layer()]);
    let list = parts.index(&[other, manifest]);
    proxy.plant_image("docker/list", "1", &parts.finish(&list));
    pulls_and_runs(host, ctr, &proxy.name("docker/list:1"), &["--plain-http"]);
}

/// An image for this machine, and for another.
fn two_platforms() -> Image {
    let (mut parts, manifest) = runs_with(2, Pack::Gzip);
    let other = parts.image(
        "s390x",
        Pack::Gzip,
        &[Layer::default().file("elsewhere", 0o644, b"big endian\n").finish()],
    );
    let index = parts.index(&[other, manifest]);
    parts.finish(&index)
}

fn of_all_platforms(host: &Host, ctr: &Ctr) {
    let registry = Registry::open();
    let image = two_platforms();
    let digest = registry.push(&image, "many:1");
    let name = registry.name("many:1");
    let has = |ctr: &Ctr| {
        let listed = ctr.ok(&["content", "ls", "-q"]);
        image.blobs.iter().filter(|(digest, _)| listed.contains(digest.as_str())).count()
    };
    pulls_and_runs(host, ctr, &name, &["--plain-http"]);
    // Of the other platform, its layer is not there; its manifest and configuration may be.
    ctr.ok(&["images", "pull", "--plain-http", &name]);
    let other = layers(&image).remove(0).0;
    assert!(!ctr.ok(&["content", "ls", "-q"]).contains(&other));
    assert!(ctr.ok(&["images", "ls"]).contains(&digest));
    ctr.ok(&["images", "pull", "--plain-http", "--all-platforms", &name]);
    assert_eq!(has(ctr), image.blobs.len());
    ctr.ok(&["images", "rm", &name]);
    ctr.ok(&["images", "pull", "--plain-http", "--platform", "linux/s390x", &name]);
    assert!(ctr.ok(&["content", "ls", "-q"]).contains(&other));
    let error = ctr.fails(&["images", "pull", "--plain-http", "--platform", "linux/riscv64", &name]);
    assert!(error.contains("platform") || error.contains("not found"), "{error}");
}

/// A port on which nobody listens, as long as this is kept.
fn nobody() -> (OwnedFd, SocketAddr) {
    use rustix::net::{AddressFamily, SocketType, bind, getsockname, socket};
    let socket = socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
    bind(&socket, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
    let address = getsockname(&socket).unwrap().try_into().unwrap();
    (socket, address)
}

fn by_mirrors(host: &Host, ctr: &Ctr) {
    let registry = Registry::open();
    registry.push(&image::busybox(), "team/busybox:1");
    let (empty, broken, good) = (Proxy::alone(), Proxy::alone(), Proxy::of(&registry));
    broken.fault("", Fault::status("503 Service Unavailable", "", b"maintenance"));
    let (_nobody, down) = nobody();
    let hosts = host.folder().join("hosts");
    let toml = format!(
        "server = 'http://{down}'\n[host.'http://{down}']\ncapabilities = ['pull', 'resolve']\n\
         [host.'http://{}']\ncapabilities = ['pull', 'resolve']\n[host.'http://{}']\ncapabilities = ['pull', 'resolve']\n\
         [host.'http://{}']\ncapabilities = ['pull', 'resolve']\n",
        empty.address, broken.address, good.address
    );
    write_hosts(&hosts, "registry.example", &toml);
    let name = "registry.example/team/busybox:1";
    pulls_and_runs(host, ctr, name, &["--hosts-dir", hosts.to_str().unwrap()]);
    // Mirrors are told whose image it is.
    for proxy in [&empty, &broken, &good] {
        let seen = proxy.seen();
        assert!(!seen.is_empty());
        let of_registry =
            |target: &str| target.starts_with("/v2/team/busybox/") && target.contains("ns=registry.example");
        assert!(seen.iter().all(|seen| of_registry(&seen.target)), "{seen:?}");
    }
    // A path of the mirror's own, and headers for it.
    registry.push(&image::busybox(), "cache/team/busybox:2");
    let toml = format!(
        "[host.'http://{}/v2/cache']\ncapabilities = ['pull', 'resolve']\noverride_path = true\n\
         [host.'http://{}/v2/cache'.header]\nx-cave = 'forty'\n",
        good.address, good.address
    );
    write_hosts(&hosts, "other.example", &toml);
    let before = good.seen().len();
    pulls_and_runs(host, ctr, "other.example/team/busybox:2", &["--hosts-dir", hosts.to_str().unwrap()]);
    for seen in &good.seen()[before..] {
        assert!(seen.target.starts_with("/v2/cache/team/busybox/"), "{seen:?}");
        assert_eq!(seen.header("x-cave"), Some("forty"), "{seen:?}");
    }
}

fn pushed_for_others_to_read(host: &Host, ctr: &Ctr) {
    let registry = Registry::open();
    host.import();
    let name = registry.name("pushed/busybox:1");
    ctr.ok(&["images", "push", "--plain-http", &name, NAME]);
    let listed = ctr.ok(&["images", "ls"]);
    let digest = registry.digest("pushed/busybox:1");
    assert!(listed.contains(&digest), "{digest}: {listed}");
    // skopeo checks the digests of what it reads, umoci those of what it unpacks.
    let folder = host.folder().join("others");
    fs::create_dir(&folder).unwrap();
    registry.copy_to("pushed/busybox:1", &folder.join("layout"));
    let image = format!("{}:copied", folder.join("layout").display());
    let unpacked = folder.join("unpacked");
    done(Command::new("/usr/bin/umoci").args(["unpack", "--image", &image]).arg(&unpacked));
    assert_eq!(fs::read(unpacked.join("rootfs/etc/replaced-above")).unwrap(), b"new\n");
    assert!(!unpacked.join("rootfs/etc/removed-above").exists());
    let again = registry.name("pushed/busybox:again");
    ctr.ok(&["images", "push", "--plain-http", &again, NAME]);
    assert_eq!(registry.digest("pushed/busybox:again"), digest);
    ctr.ok(&["images", "rm", NAME]);
    pulls_and_runs(host, ctr, &name, &["--plain-http"]);
}

fn gantry() -> Option<Host> {
    ready(&PROGRAMS).then(Host::gantry)
}

#[test]
fn layers_that_are_there_are_not_fetched() {
    let Some(host) = gantry() else { return };
    let (registry, ctr) = (Registry::open(), host.ctr());
    let proxy = Proxy::of(&registry);
    let images: Vec<Image> = [3, 4]
        .map(|seed| {
            let (parts, manifest) = runs_with(seed, Pack::Gzip);
            parts.finish(&manifest)
        })
        .into();
    for (number, image) in images.iter().enumerate() {
        registry.push(image, &format!("repository-{number}:1"));
    }
    ctr.ok(&["images", "pull", "--plain-http", &proxy.name("repository-0:1")]);
    for (layer, size) in layers(&images[0]) {
        assert_eq!(proxy.delivered(&layer), size, "{layer}");
    }
    // The same again, under another tag, and another that shares layers.
    let (first, second) = (layers(&images[0]), layers(&images[1]));
    ctr.ok(&["images", "pull", "--plain-http", &proxy.name("repository-0:1")]);
    ctr.ok(&["images", "pull", "--plain-http", &proxy.name("repository-1:1")]);
    assert_ne!(first[1], second[1]);
    for (layer, size) in first.iter().chain(&second) {
        assert_eq!(proxy.delivered(layer), *size, "{layer}");
    }
}

#[test]
fn two_pulls_at_once_fetch_what_they_share_once() {
    let Some(host) = gantry() else { return };
    let (registry, ctr) = (Registry::open(), host.ctr());
    let proxy = Proxy::of(&registry);
    let images: Vec<Image> = [5, 6]
        .map(|seed| {
            let (parts, manifest) = runs_with(seed, Pack::Gzip);
            parts.finish(&manifest)
        })
        .into();
    for (number, image) in images.iter().enumerate() {
        registry.push(image, &format!("shared:{number}"));
    }
    // Both are on their way when the first bytes of layers may pass.
    let names = [proxy.name("shared:0"), proxy.name("shared:1")];
    proxy.fault("/blobs/", Fault::Header("x-slow".into(), "no".into()));
    proxy.hold_after(3000);
    let pulls = names.each_ref().map(|name| ctr.spawn(&["images", "pull", "--plain-http", name]));
    proxy.wait_held();
    proxy.release();
    for pull in pulls {
        let ended = finish(pull, "pull");
        assert_eq!(ended.code, 0, "{ended:?}");
    }
    for (layer, size) in layers(&images[0]).iter().chain(&layers(&images[1])) {
        assert_eq!(proxy.delivered(layer), *size, "{layer}: {:?}", proxy.pieces(layer));
    }
    for name in &names {
        assert_eq!(ctr.ok(&["run", "--rm", name, "c", "cat", "etc/replaced-above"]), "new\n");
    }
}

#[test]
fn a_push_sends_what_the_registry_has_not_and_mounts_the_rest() {
    let Some(host) = gantry() else { return };
    let (registry, ctr) = (Registry::open(), host.ctr());
    let proxy = Proxy::of(&registry);
    let image = two_platforms();
    registry.push(&image, "from/here:1");
    ctr.ok(&["images", "pull", "--plain-http", "--all-platforms", &proxy.name("from/here:1")]);
    let push =
        |to: &str| ctr.ok(&["images", "push", "--plain-http", &proxy.name(to), &proxy.name("from/here:1")]);
    // To another repository of the same registry: mounted, not a byte of a layer sent.
    push("to/there:1");
    assert_eq!(proxy.uploads(), []);
    assert!(proxy.count("POST /v2/to/there/blobs/uploads/?") > 0);
    assert_eq!(registry.inspect("to/there:1", &["--raw"]), registry.inspect("from/here:1", &["--raw"]));
    // To the same again: nothing at all.
    push("to/there:2");
    assert_eq!(proxy.uploads(), []);
    // To another registry: each blob once.
    let elsewhere = Registry::open();
    let other = Proxy::of(&elsewhere);
    ctr.ok(&["images", "push", "--plain-http", &other.name("new/home:1"), &proxy.name("from/here:1")]);
    let mut uploads = other.uploads();
    uploads.sort();
    let is_manifest =
        |bytes: &[u8]| bytes.starts_with(b"{") && !bytes.windows(8).any(|part| part == b"\"rootfs\"");
    let blobs = image.blobs.iter().filter(|(_, bytes)| !is_manifest(bytes));
    let mut wanted: Vec<(String, u64)> =
        blobs.map(|(digest, bytes)| (digest.to_string(), bytes.len() as u64)).collect();
    wanted.sort();
    assert_eq!(uploads, wanted);
    assert_eq!(elsewhere.inspect("new/home:1", &["--raw"]), registry.inspect("from/here:1", &["--raw"]));
    elsewhere.copy_to("new/home:1", &host.folder().join("layout"));
    // Of one platform alone, its manifest is what is pushed.
    ctr.ok(&[
        "images",
        "push",
        "--plain-http",
        "--platform",
        "linux/s390x",
        &other.name("one:1"),
        &proxy.name("from/here:1"),
    ]);
    assert!(elsewhere.inspect("one:1", &["--raw"]).contains("manifest.v1+json"));
}

#[test]
fn credentials_come_from_docker_and_tokens_are_renewed() {
    let Some(host) = gantry() else { return };
    let tokens = Tokens::start(TokenRules { private: true, ..TokenRules::default() });
    let registry = Registry::start(Guard { tokens: Some(&tokens), ..Guard::default() });
    registry.push(&image::busybox(), "private:1");
    let (ctr, name) = (host.ctr(), registry.name("private:1"));
    let docker = host.folder().join("docker");
    write_docker_config(&docker, &registry.address.to_string());
    let from = tokens.requests().len();
    let mut command = ctr.command(&["images", "pull", "--plain-http", &name]);
    done(command.env("DOCKER_CONFIG", &docker));
    let asked = tokens.requests().split_off(from);
    assert!(asked.iter().any(|request| request.status == 200), "{asked:?}");
    assert!(asked.iter().all(|request| request.scopes == ["repository:private:pull"]), "{asked:?}");
    assert!(asked.len() <= 2, "one token does for the whole pull: {asked:?}");
    ctr.ok(&["images", "rm", &name]);

    // By a refresh token; by a server that knows GET alone.
    ctr.ok(&["images", "pull", "--plain-http", "--refresh", REFRESH, &name]);
    ctr.ok(&["images", "rm", &name]);
    tokens.set(TokenRules { private: true, get_alone: true, ..TokenRules::default() });
    let user = user();
    ctr.ok(&["images", "pull", "--plain-http", "--user", &user, &name]);

    // A push asks for more than a pull; tokens that end within the second are asked for again.
    tokens.set(TokenRules { private: true, seconds: 1, ..TokenRules::default() });
    let from = tokens.requests().len();
    ctr.ok(&["images", "push", "--plain-http", "--user", &user, &registry.name("pushed:1"), &name]);
    let asked = tokens.requests().split_off(from);
    let wanted = |request: &tests::registry::TokenRequest| {
        request.scopes.iter().any(|scope| scope.starts_with("repository:pushed:") && scope.contains("push"))
    };
    assert!(asked.iter().any(wanted), "{asked:?}");
    assert_eq!(registry.digest("pushed:1"), registry.digest("private:1"));

    // Wrong credentials are not tried forever, and do not stay.
    let error = ctr.fails(&["images", "pull", "--plain-http", "--user", "thief:wrong", &name]);
    assert!(
        error.contains("401") || error.contains("nauthorized") || error.contains("credentials"),
        "{error}"
    );
    assert!(!error.contains("wrong\"") && !host.log().contains(PASSWORD), "secrets are not shown");
    let basic = base64(&format!("{USER}:{PASSWORD}"));
    assert!(!host.log().contains(&basic) && !host.log().contains(REFRESH), "secrets are not logged");
    ctr.ok(&["images", "pull", "--plain-http", "--user", &user, &name]);
}

fn base64(text: &str) -> String {
    use base64::Engine as _;
    base64::engine::general_purpose::STANDARD.encode(text)
}

#[test]
fn a_certificate_of_our_own_is_shown_to_those_who_ask() {
    let Some(host) = gantry() else { return };
    let (authority, people) = (Authority::default(), Authority::default());
    let registry =
        Registry::start(Guard { tls: Some(&authority), clients: Some(&people), ..Guard::default() });
    registry.push(&image::busybox(), "busybox:1");
    let (certificate, key) = people.issue("engine", &[], ExtendedKeyUsagePurpose::ClientAuth);
    let hosts = host.folder().join("hosts");
    let write = |more: &str| {
        let toml = format!(
            "server = 'https://{0}'\n[host.'https://{0}']\nca = '{1}'\n{more}\n",
            registry.address,
            authority.certificate().display()
        );
        write_hosts(&hosts, &registry.address.to_string(), &toml);
    };
    let (ctr, name) = (host.ctr(), registry.name("busybox:1"));
    write("");
    let pull = ["images", "pull", "--hosts-dir", hosts.to_str().unwrap(), &name];
    let error = ctr.fails(&pull);
    assert!(error.contains("certificate"), "{error}");
    write(&format!("client = [['{}', '{}']]", certificate.display(), key.display()));
    ctr.ok(&pull);
    assert_eq!(ctr.ok(&["run", "--rm", &name, "c", "cat", "etc/replaced-above"]), "new\n");
}

#[test]
fn what_is_exported_is_read_by_others() {
    let Some(host) = gantry() else { return };
    let (registry, ctr) = (Registry::open(), host.ctr());
    let digest = registry.push(&two_platforms(), "many:1");
    let name = registry.name("many:1");
    ctr.ok(&["images", "pull", "--plain-http", "--all-platforms", &name]);
    let archive = host.folder().join("exported.tar");
    ctr.ok(&["images", "export", "--all-platforms", archive.to_str().unwrap(), &name]);
    // skopeo reads it as a layout, and finds the same digest in another registry.
    let elsewhere = Registry::open();
    let mut command = Command::new(SKOPEO);
    command.args(["copy", "--quiet", "--all", "--dest-tls-verify=false"]);
    command.arg(format!("oci-archive:{}", archive.display()));
    done(command.arg(format!("docker://{}", elsewhere.name("copied:1"))));
    assert_eq!(Digest::sha256_of(elsewhere.inspect("copied:1", &["--raw"]).as_bytes()).to_string(), digest);
    // Debian's client, with Debian's engine.
    let debian = Host::containerd();
    debian.stock_ctr().ok(&["images", "import", archive.to_str().unwrap()]);
    assert!(debian.stock_ctr().ok(&["images", "ls"]).contains(&digest));
    let said = debian.stock_ctr().ok(&["run", "--rm", &name, "c", "cat", "etc/replaced-above"]);
    assert_eq!(said, "new\n");
}
