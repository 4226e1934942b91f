//! Bad registries, bad networks, bad images: each is a clear error, nothing of it is seen, the engine serves on; what a patient
//! client gets over, it gets over.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::process::Command;

use oci::Digest;
use regex::Regex;
use serde_json::{Value, json};
use tests::faults::{Fault, Proxy};
use tests::host::{CONTAINERD, Host, RUNC, STOCK_CTR};
use tests::image::{self, BUSYBOX, Image, Layer};
use tests::registry::{
    Guard, PASSWORD, Pack, Parts, REGISTRY, Registry, SKOPEO, TokenRules, Tokens, USER, abandon,
    architecture, collect, done, impatient, kept, noise, write_hosts,
};
use tests::{left, ready, wait_for};

const PROGRAMS: [&str; 6] = [CONTAINERD, STOCK_CTR, RUNC, BUSYBOX, REGISTRY, SKOPEO];

fn engine() -> Option<Host> {
    ready(&PROGRAMS).then(|| {
        let mut host = impatient();
        host.start();
        host
    })
}

/// A pull that must fail; what it says. The error says why, as this expression has it, and nothing of the image is seen. What was
/// fetched may be there for the next pull to go on with, but not as content.
fn refused(host: &Host, name: &str, arguments: &[&str], why: &str) -> String {
    let before = kept(host);
    let error = fails(host, name, arguments, why);
    abandon(host);
    assert_eq!(kept(host), before, "{name}: {error}");
    error
}

/// [`refused`], but what is fetched stays where it is.
fn fails(host: &Host, name: &str, arguments: &[&str], why: &str) -> String {
    let images = || host.stock_ctr().ok(&["images", "ls", "-q"]);
    let seen = images();
    let mut pull = vec!["images", "pull", "--plain-http"];
    pull.extend(arguments);
    pull.extend(["--", name]);
    let error = host.ctr().fails(&pull);
    assert!(Regex::new(&format!("(?i){why}")).unwrap().is_match(&error), "{name}: {why}: {error}");
    assert!(error.len() < 4000, "{name}: too long to be clear: {error}");
    assert!(!error.chars().any(|letter| letter.is_control() && letter != '\n'), "{name}: {error:?}");
    assert_eq!(images(), seen, "{name}: {error}");
    collect(host);
    error
}

/// Pulls an image that is right, runs and removes it.
fn pulls(host: &Host, name: &str, arguments: &[&str]) {
    let ctr = host.ctr();
    let mut pull = vec!["images", "pull", "--plain-http"];
    pull.extend(arguments);
    pull.push(name);
    ctr.ok(&pull);
    assert_eq!(ctr.ok(&["run", "--rm", name, "c", "cat", "etc/replaced-above"]), "new\n");
    ctr.ok(&["images", "rm", name]);
    collect(host);
    // The disk that a test has put beneath the root is not the engine's.
    let (root, disk) = (host.root().display().to_string(), host.folder().join("disk").display().to_string());
    wait_for("nothing to be left", || {
        host.left().iter().all(|line| *line == format!("mount {root}") || line.ends_with(&disk))
    });
}

/// The engine serves: a good image comes, and runs.
fn serves(host: &Host) {
    let proxy = Proxy::alone();
    proxy.plant_image("good", "1", &image::busybox());
    pulls(host, &proxy.name("good:1"), &[]);
}

/// A small image that nobody runs: two layers of noise.
fn small(seed: u64) -> Image {
    let mut parts = Parts::default();
    let layer =
        |number: u64| Layer::default().file("noise", 0o644, &noise(seed * 2 + number, 30_000)).finish();
    let manifest = parts.image(&architecture(), Pack::Gzip, &[layer(0), layer(1)]);
    parts.finish(&manifest)
}

/// Its two layers' digests.
fn layers(image: &Image) -> Vec<String> {
    let index: Value = serde_json::from_slice(&image.index).unwrap();
    let manifest = index["manifests"][0]["digest"].as_str().unwrap();
    let (_, bytes) = image.blobs.iter().find(|(digest, _)| digest.as_str() == manifest).unwrap();
    let manifest: Value = serde_json::from_slice(bytes).unwrap();
    let layers = manifest["layers"].as_array().unwrap();
    layers.iter().map(|layer| layer["digest"].as_str().unwrap().to_owned()).collect()
}

#[test]
fn answers_that_are_wrong_are_refused() {
    let Some(host) = engine() else { return };
    let proxy = Proxy::alone();
    proxy.plant_image("x", "1", &small(1));
    let name = proxy.name("x:1");
    let itself = |path: &str| Fault::Redirect(format!("http://{}{path}", proxy.address));
    let huge = "x".repeat(1 << 20);
    let escapes = b"\x1b[2J\x1b]0;owned\x07 gone";
    for (pattern, fault, why) in [
        ("/manifests/", Fault::Claim(10), "bytes|length|broke"),
        ("/manifests/", Fault::Claim(-10), "digest|bytes|length"),
        ("GET /v2/x/manifests/", Fault::Flip(20), "digest"),
        ("GET /v2/x/manifests/", Fault::CutAfter(0), "broke|bytes|ended|closed"),
        ("/manifests/", itself("/v2/x/manifests/1"), "redirect"),
        ("/manifests/", Fault::page(), "html|type|manifest|json"),
        ("/manifests/", Fault::status("200 OK", "", b""), "type|manifest|empty|bytes"),
        (
            "/manifests/",
            Fault::status("200 OK", "Content-Type: application/json\r\n", b"[[[["),
            "type|manifest|json",
        ),
        ("/manifests/", Fault::status("204 No Content", "", b""), "204|type|manifest"),
        ("/manifests/", Fault::status("404 Not Found", "", b"no"), "not found"),
        ("/manifests/", Fault::status("403 Forbidden", "", escapes), "403|denied"),
        ("/manifests/", Fault::status("418 I'm a teapot", "", huge.as_bytes()), "418"),
        ("/manifests/", Fault::status("500 Internal Server Error", "", escapes), "500"),
        ("/manifests/", Fault::status("429 Too Many Requests", "Retry-After: 0\r\n", b"slow down"), "429"),
        ("/manifests/", Fault::Header("x-much".into(), huge.clone()), "head|large|message|connection"),
        ("/manifests/", Fault::Header("docker-content-digest".into(), "sha256:../../x".into()), "digest"),
        ("/manifests/", Fault::Raw("\0\0nothing of http\r\n\r\n".into()), "http|pars|connection|message"),
        ("/manifests/", Fault::Raw("".into()), "connection|closed|before"),
        ("/blobs/", Fault::Claim(10), "bytes|length"),
        ("/blobs/", Fault::Claim(-10), "bytes|length"),
        ("/blobs/", Fault::Flip(500), "digest"),
        ("/blobs/", Fault::CutAfter(0), "broke|bytes|closed|ended"),
        ("/blobs/", Fault::ResetAfter(0), "broke|bytes|reset|connection"),
        ("/blobs/", itself("/v2/x/blobs/elsewhere"), "redirect"),
        ("/blobs/", Fault::page(), "bytes|html|type"),
        ("/blobs/", Fault::status("404 Not Found", "", b""), "not found|404"),
        ("/blobs/", Fault::status("500 Internal Server Error", "", b""), "500"),
        ("/blobs/", Fault::status("502 Bad Gateway", "Content-Type: text/html\r\n", b"<html>"), "502"),
        ("/blobs/", Fault::Header("content-encoding".into(), "gzip".into()), "gzip"),
        ("/blobs/", Fault::Redirect("file:///etc/passwd".into()), "redirect|address"),
        ("/blobs/", Fault::Redirect("gopher://[::1]:1/".into()), "redirect|address"),
    ] {
        println!("{pattern} {}", format!("{fault:?}").chars().take(80).collect::<String>());
        proxy.fault(pattern, fault);
        let error = refused(&host, &name, &[], why);
        assert!(error.contains(&proxy.address.to_string()), "says where: {error}");
        proxy.heal();
    }
    // What came wrong once is not what the next pull goes on with.
    for pattern in ["GET /v2/x/manifests/", "/blobs/"] {
        proxy.fault_times(1, pattern, Fault::Flip(100));
        fails(&host, &name, &[], "digest");
        proxy.heal();
        let pull = ["images", "pull", "--plain-http", "--no-unpack", &name];
        host.ctr().ok(&pull);
        host.ctr().ok(&["images", "rm", &name]);
        collect(&host);
    }
    serves(&host);
}

#[test]
fn hosts_that_stall_are_given_up() {
    let Some(host) = engine() else { return };
    let proxy = Proxy::alone();
    proxy.plant_image("x", "1", &small(2));
    for (pattern, fault) in [
        ("/manifests/", Fault::Stall),
        ("GET /v2/x/manifests/", Fault::StallAfter(0)),
        ("/blobs/", Fault::Stall),
        ("/blobs/", Fault::StallAfter(0)),
    ] {
        println!("{pattern} {fault:?}");
        proxy.fault(pattern, fault);
        let error = refused(&host, &proxy.name("x:1"), &[], "1s|nothing|time|answer");
        assert!(error.contains(&proxy.address.to_string()), "says where: {error}");
        proxy.heal();
    }
    serves(&host);
}

#[test]
fn those_who_ask_for_credentials_forever_are_given_up() {
    let Some(host) = engine() else { return };
    let proxy = Proxy::alone();
    proxy.plant_image("x", "1", &small(3));
    let name = proxy.name("x:1");
    let user = format!("{USER}:{PASSWORD}");
    let own = |path: &str| format!("http://{}{path}", proxy.address);
    let realm = own("/token");
    let bearer =
        format!("WWW-Authenticate: Bearer realm=\"{realm}\",service=\"x\",scope=\"repository:x:pull\"\r\n");
    let wants = |headers: &str| Fault::status("401 Unauthorized", headers, b"");
    let gives = |token: &str| Fault::status("200 OK", "Content-Type: application/json\r\n", token.as_bytes());
    let huge = format!("{{\"token\":\"{}\"}}", "x".repeat(64 << 20));
    for (challenge, token, why) in [
        ("WWW-Authenticate: Basic realm=\"x\"\r\n", None, "401|credentials|denied"),
        ("WWW-Authenticate: Digest realm=\"x\"\r\n", None, "401|credentials|denied"),
        ("WWW-Authenticate: Bearer\r\n", None, "401|realm|challenge|denied"),
        ("WWW-Authenticate: \"\"\"===,,,Basic\r\n", None, "401|challenge|denied|credentials"),
        ("", None, "401|denied"),
        (&*bearer, Some(gives("{\"token\":\"worthless\"}")), "401|denied|credentials"),
        (&bearer, Some(gives("{}")), "token"),
        (&bearer, Some(gives("<html>")), "token|json"),
        (&bearer, Some(gives("{\"token\":\"a\\r\\nx-evil: b\"}")), "token|header"),
        (&bearer, Some(gives(&huge)), "token"),
        (&bearer, Some(wants(&bearer)), "401|token|denied"),
        (&bearer, Some(Fault::Stall), "1s|token|time"),
        (&bearer, Some(Fault::Redirect(realm.clone())), "redirect|token"),
        ("WWW-Authenticate: Bearer realm=\"file:///etc/shadow\"\r\n", None, "realm|address|401|http"),
    ] {
        println!("{} {}", challenge.trim(), format!("{token:?}").chars().take(60).collect::<String>());
        let before = proxy.seen().len();
        proxy.fault("/v2/", wants(challenge));
        if let Some(token) = token {
            proxy.fault("/token", token);
        }
        refused(&host, &name, &["--user", &user], why);
        let asked = proxy.seen().len() - before;
        assert!(asked < 20, "asked {asked} times");
        proxy.heal();
    }
    serves(&host);
}

/// Serves what a manifest of these layers is, and its parts, and pulls it.
fn made(make: impl FnOnce(&mut Parts) -> Value) -> Image {
    let mut parts = Parts::default();
    let top = make(&mut parts);
    parts.finish(&top)
}

#[test]
fn images_that_are_wrong_are_refused() {
    let Some(host) = engine() else { return };
    let layer = || Layer::default().file("noise", 0o644, &noise(9, 30_000)).finish();
    let diff_id = || Digest::sha256_of(&layer()).to_string();
    let architecture = architecture();
    let arch = architecture.as_str();
    let manifest_type = "application/vnd.oci.image.manifest.v1+json";
    let index_type = "application/vnd.oci.image.index.v1+json";
    let with_layer = |change: &dyn Fn(&mut Value)| {
        made(|parts| {
            let config = parts.config(arch, &[diff_id()]);
            let mut layer = parts.layer(Pack::Gzip, &layer());
            change(&mut layer);
            parts.manifest(&config, &[layer])
        })
    };
    let cases: Vec<(&str, Image, &str)> = vec![
        (
            "another diff id",
            made(|parts| {
                let config = parts.config(arch, &[Digest::sha256_of(b"other").to_string()]);
                let layer = parts.layer(Pack::Gzip, &layer());
                parts.manifest(&config, &[layer])
            }),
            "diff.?id|uncompressed|unpack",
        ),
        (
            "fewer diff ids",
            made(|parts| {
                let config = parts.config(arch, &[]);
                let layer = parts.layer(Pack::Gzip, &layer());
                parts.manifest(&config, &[layer])
            }),
            "layers",
        ),
        (
            "no gzip",
            made(|parts| {
                let config = parts.config(arch, &[diff_id()]);
                let layer = parts.blob("application/vnd.oci.image.layer.v1.tar+gzip", noise(10, 5000));
                parts.manifest(&config, &[layer])
            }),
            "gzip|layer|compress",
        ),
        (
            "half a gzip",
            made(|parts| {
                let config = parts.config(arch, &[diff_id()]);
                let mut half = Pack::Gzip.pack(&layer());
                half.truncate(9_000);
                let layer = parts.blob("application/vnd.oci.image.layer.v1.tar+gzip", half);
                parts.manifest(&config, &[layer])
            }),
            "gzip|end|layer|compress",
        ),
        (
            "half a zstd",
            made(|parts| {
                let config = parts.config(arch, &[diff_id()]);
                let mut half = Pack::Zstd.pack(&layer());
                half.truncate(9_000);
                let layer = parts.blob("application/vnd.oci.image.layer.v1.tar+zstd", half);
                parts.manifest(&config, &[layer])
            }),
            "zstd|frame|end|layer|compress",
        ),
        (
            "no tar",
            made(|parts| {
                let bytes = noise(11, 5000);
                let config = parts.config(arch, &[Digest::sha256_of(&bytes).to_string()]);
                let layer = parts.layer(Pack::Gzip, &bytes);
                parts.manifest(&config, &[layer])
            }),
            "archive|tar|header|layer",
        ),
        ("a smaller size", with_layer(&|layer| layer["size"] = json!(5)), "bytes|size"),
        ("a larger size", with_layer(&|layer| layer["size"] = json!(5_000_000)), "bytes|size"),
        ("a size below zero", with_layer(&|layer| layer["size"] = json!(-1)), "size|invalid|manifest"),
        (
            "a size above all",
            with_layer(&|layer| layer["size"] = json!(u64::MAX)),
            "size|bytes|invalid|manifest",
        ),
        ("no size", with_layer(&|layer| drop(layer.as_object_mut().unwrap().remove("size"))), "size"),
        ("no digest", with_layer(&|layer| drop(layer.as_object_mut().unwrap().remove("digest"))), "digest"),
        (
            "a digest that climbs",
            with_layer(&|layer| layer["digest"] = json!("sha256:../../../../etc/passwd")),
            "digest",
        ),
        ("a short digest", with_layer(&|layer| layer["digest"] = json!("sha256:abcd")), "digest"),
        (
            "a digest of another kind",
            with_layer(&|layer| layer["digest"] = json!("md5:d41d8cd98f00b204e9800998ecf8427e")),
            "digest",
        ),
        (
            "an unknown layer type",
            with_layer(&|layer| layer["mediaType"] = json!("application/x-\u{1b}[2Jlayer")),
            "type",
        ),
        (
            "a manifest as a layer",
            with_layer(&|layer| layer["mediaType"] = json!(manifest_type)),
            "type|not found",
        ),
        (
            "an index that is a manifest",
            made(|parts| {
                let config = parts.config(arch, &[diff_id()]);
                let layer = parts.layer(Pack::Gzip, &layer());
                let manifest = parts.manifest(&config, std::slice::from_ref(&layer));
                let both = json!({"schemaVersion": 2, "mediaType": index_type, "manifests": [manifest], "config": config, "layers": [layer]});
                parts.blob(index_type, both.to_string())
            }),
            "both",
        ),
        (
            "a manifest that is an index",
            made(|parts| {
                let config = parts.config(arch, &[diff_id()]);
                let layer = parts.layer(Pack::Gzip, &layer());
                let manifest = parts.manifest(&config, std::slice::from_ref(&layer));
                let both = json!({"schemaVersion": 2, "mediaType": manifest_type, "manifests": [manifest], "config": config, "layers": [layer]});
                parts.blob(manifest_type, both.to_string())
            }),
            "both",
        ),
        (
            "an index in manifest's clothes",
            made(|parts| {
                let mut manifest = parts.image(arch, Pack::Gzip, &[layer()]);
                manifest["mediaType"] = json!(index_type);
                parts.index(&[manifest])
            }),
            "type|index|manifest",
        ),
        (
            "1,000 layers",
            made(|parts| {
                let config = parts.config(arch, &vec![diff_id(); 1000]);
                let layer = parts.layer(Pack::Gzip, &layer());
                parts.manifest(&config, &vec![layer; 1000])
            }),
            "500|layers",
        ),
        (
            "100,000 manifests",
            made(|parts| {
                let manifest = parts.image("s390x", Pack::Gzip, &[layer()]);
                parts.index(&vec![manifest; 100_000])
            }),
            "bytes|manifests|large|limit",
        ),
        (
            "indexes within indexes",
            made(|parts| {
                let mut top = parts.image(arch, Pack::Gzip, &[layer()]);
                for _ in 0..200 {
                    top = parts.index(&[top]);
                }
                top
            }),
            "deep|nest|index|level",
        ),
        (
            "another platform's",
            made(|parts| {
                let manifest = parts.image("s390x", Pack::Gzip, &[layer()]);
                parts.index(&[manifest])
            }),
            "platform",
        ),
        (
            "schema 1",
            made(|parts| {
                let kind = "application/vnd.docker.distribution.manifest.v1+prettyjws";
                parts.blob(
                    kind,
                    json!({"schemaVersion": 1, "mediaType": kind, "fsLayers": [], "history": []}).to_string(),
                )
            }),
            "schema|type|not supported",
        ),
        (
            "a deep document",
            made(|parts| {
                let deep = format!(
                    "{{\"schemaVersion\":2,\"mediaType\":\"{manifest_type}\",\"config\":{}",
                    "[".repeat(200_000)
                );
                parts.blob(manifest_type, deep)
            }),
            "manifest|json|recursion|document",
        ),
        (
            "a layer out of the root",
            made(|parts| {
                let evil = Layer::default()
                    .symlink("out", "../../../../../../../tmp")
                    .file("out/gantry-escape-by-pull", 0o644, b"evil")
                    .file("../../../../../../../../tmp/gantry-escape-by-pull", 0o644, b"evil")
                    .finish();
                let bad_diff = parts.config(arch, &[diff_id()]);
                let layer = parts.layer(Pack::Gzip, &evil);
                parts.manifest(&bad_diff, &[layer])
            }),
            "layer|diff|path|\\.\\.",
        ),
    ];
    let proxy = Proxy::alone();
    for (number, (what, image, why)) in cases.iter().enumerate() {
        println!("{what}");
        let name = format!("case-{number}");
        proxy.plant_image(&name, "1", image);
        // A deep document is none that can be read here.
        let index: Value = serde_json::from_slice(&image.index).unwrap();
        let top = &index["manifests"][0];
        let (_, bytes) =
            image.blobs.iter().find(|(digest, _)| Some(digest.as_str()) == top["digest"].as_str()).unwrap();
        for tag in ["1", top["digest"].as_str().unwrap()] {
            proxy.plant(
                &format!("/v2/{name}/manifests/{tag}"),
                top["mediaType"].as_str().unwrap(),
                bytes.clone(),
            );
        }
        refused(&host, &proxy.name(&format!("{name}:1")), &[], why);
    }
    // A manifest of 100 MB: not a byte more than the limit is read of it.
    let mut large = br#"{"schemaVersion":2,"annotations":{"x":""#.to_vec();
    large.resize(100 << 20, b' ');
    proxy.plant("/v2/large/manifests/1", manifest_type, large);
    let before = proxy.passed();
    refused(&host, &proxy.name("large:1"), &[], "bytes|large|limit");
    assert!(proxy.passed() - before < 32 << 20, "{} bytes were read", proxy.passed() - before);
    assert!(!std::path::Path::new("/tmp/gantry-escape-by-pull").exists());
    serves(&host);
}

#[test]
fn names_with_odd_letters_are_refused_before_anything_is_asked() {
    let Some(host) = engine() else { return };
    let proxy = Proxy::alone();
    let long = "a".repeat(300);
    for rest in [
        "/UPPER:1",
        "/a//b:1",
        "/../etc:1",
        "/a/../../b:1",
        "/a:tag with space",
        "/a:b:c",
        "/a:",
        "/a@",
        "/a@sha256:zz",
        "/a@md5:d41d8cd98f00b204e9800998ecf8427e",
        "/%2e%2e/a:1",
        "/a\u{202e}b:1",
        "/a?x=y:1",
        "/a#b:1",
        "/a\\b:1",
        "/a\nb:1",
        "/a\r\nx-evil: 1",
        "/-a:1",
        "/a:-1",
        "/.a:1",
        "/a___b:1",
        &format!("/{long}:1"),
        &format!("/a:{long}"),
        "@evil.example/a:1",
        "/\u{1b}[2J:1",
    ] {
        println!("{rest:?}");
        refused(&host, &format!("{}{rest}", proxy.address), &[], "name|reference|invalid|image|digest|tag");
    }
    assert_eq!(proxy.seen().len(), 0, "{:?}", proxy.seen());
    serves(&host);
}

#[test]
fn foreign_layers_are_not_fetched_and_credentials_stay_where_they_belong() {
    let Some(host) = engine() else { return };
    let registry = Registry::start(Guard { basic: true, ..Guard::default() });
    let (proxy, other) = (Proxy::of(&registry), Proxy::alone());
    let user = format!("{USER}:{PASSWORD}");
    let elsewhere = |path: &str| format!("http://{}{path}", other.address);
    for kind in [
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/vnd.oci.image.layer.v1.tar+gzip",
    ] {
        println!("{kind}");
        let tar = Layer::default().file("noise", 0o644, &noise(12, 30_000)).finish();
        let packed = Pack::Gzip.pack(&tar);
        let image = made(|parts| {
            let config = parts.config(&architecture(), &[Digest::sha256_of(&tar).to_string()]);
            let digest = Digest::sha256_of(&packed).to_string();
            let layer = json!({"mediaType": kind, "digest": digest, "size": packed.len(), "urls": [elsewhere("/layer")]});
            parts.manifest(&config, &[layer])
        });
        let bad = Proxy::alone();
        bad.plant_image("foreign", "1", &image);
        other.plant("/layer", "application/octet-stream", packed);
        refused(
            &host,
            &bad.name("foreign:1"),
            &["--user", &user],
            "foreign|urls|not found|404|distribut|type",
        );
        assert_eq!(other.seen().len(), 0, "{:?}", other.seen());
    }

    // Blobs that are elsewhere are fetched from there, by who they are and nothing more.
    let image = image::busybox();
    registry.push(&image, "team/busybox:1");
    for (digest, bytes) in &image.blobs {
        let path = format!("/v2/team/busybox/blobs/{digest}");
        other.plant(&path, "application/octet-stream", bytes.clone());
    }
    let hosts = host.folder().join("hosts");
    let toml = format!(
        "[host.'http://{0}']\ncapabilities = ['pull', 'resolve']\n[host.'http://{0}'.header]\nx-secret = 'forty'\n",
        proxy.address
    );
    write_hosts(&hosts, &proxy.address.to_string(), &toml);
    let arguments = ["--user", &user, "--hosts-dir", hosts.to_str().unwrap()];
    proxy.fault("GET /v2/team/busybox/blobs/", Fault::Redirect(elsewhere("*")));
    pulls(&host, &proxy.name("team/busybox:1"), &arguments);
    assert!(proxy.seen().iter().any(|seen| seen.header("authorization").is_some()));
    assert!(other.count("GET /v2/team/busybox/blobs/") >= 3);
    let strays = || {
        let seen = other.seen();
        let names = ["authorization", "cookie", "x-secret", "proxy-authorization"];
        seen.into_iter().filter(|seen| names.iter().any(|name| seen.header(name).is_some())).count()
    };
    assert_eq!(strays(), 0, "{:?}", other.seen());
    // Not when it asks, either.
    for challenge in [
        "WWW-Authenticate: Basic realm=\"the cave\"\r\n".to_owned(),
        format!("WWW-Authenticate: Bearer realm=\"{}\",service=\"x\"\r\n", elsewhere("/token")),
    ] {
        other.heal();
        other.fault("/v2/", Fault::status("401 Unauthorized", &challenge, b""));
        refused(&host, &proxy.name("team/busybox:1"), &arguments, "401|denied|credentials");
        assert_eq!(strays(), 0, "{:?}", other.seen());
        assert!(other.seen().iter().all(|seen| seen.method != "POST"), "{:?}", other.seen());
    }
    // Manifests are not looked for by another's credentials, either.
    proxy.heal();
    proxy.fault("/manifests/", Fault::Redirect(elsewhere("*")));
    refused(&host, &proxy.name("team/busybox:1"), &arguments, ".");
    assert_eq!(strays(), 0, "{:?}", other.seen());
    serves(&host);
}

#[test]
fn what_passes_is_waited_for() {
    let Some(host) = engine() else { return };
    let registry = Registry::open();
    let image = image::busybox();
    registry.push(&image, "busybox:1");
    let sizes: Vec<(String, u64)> = layers(&image)
        .into_iter()
        .map(|layer| {
            let (_, bytes) = image.blobs.iter().find(|(digest, _)| digest.as_str() == layer).unwrap();
            let size = bytes.len() as u64;
            (layer, size)
        })
        .collect();
    let top = layers(&image)[1].clone();
    let trouble = |status: &str| Fault::status(status, "", b"trouble");
    let busy = || Fault::status("429 Too Many Requests", "Retry-After: 1\r\n", b"slow down");
    /// How often, on what, which.
    type Rule<'a> = (Option<u32>, &'a str, Fault);
    let cases: Vec<(&str, Vec<Rule<'_>>)> = vec![
        (
            "5xx, twice",
            vec![
                (Some(2), "/manifests/", trouble("503 Service Unavailable")),
                (Some(2), "/blobs/", trouble("502 Bad Gateway")),
            ],
        ),
        ("429, once", vec![(Some(1), "/manifests/", busy()), (Some(1), "/blobs/", busy())]),
        ("no answer, once", vec![(Some(1), "/manifests/", Fault::Stall), (Some(1), "/blobs/", Fault::Stall)]),
        ("no end, once", vec![(Some(1), "/blobs/", Fault::StallAfter(1000))]),
        ("closed, once", vec![(Some(1), "/manifests/", Fault::Raw("".into()))]),
        ("reset, always", vec![(None, "/blobs/", Fault::ResetAfter(200_000))]),
        ("cut at each chunk", vec![(None, "/blobs/", Fault::CutChunk(200_000))]),
        (
            "no ranges",
            vec![(Some(2), "/blobs/", Fault::CutAfter(300)), (None, "/blobs/", Fault::IgnoreRange)],
        ),
        ("slow", vec![(None, "/manifests/", Fault::Trickle), (None, &top, Fault::Trickle)]),
    ]
    .into_iter()
    .collect();
    for (what, faults) in cases {
        println!("{what}");
        let proxy = Proxy::of(&registry);
        for (times, pattern, fault) in faults {
            match times {
                Some(times) => proxy.fault_times(times, pattern, fault),
                None => proxy.fault(pattern, fault),
            }
        }
        pulls(&host, &proxy.name("busybox:1"), &[]);
    }
    // Cut every so often, it goes on exactly where it was.
    let proxy = Proxy::of(&registry);
    proxy.fault("/blobs/", Fault::CutAfter(300_000));
    pulls(&host, &proxy.name("busybox:1"), &[]);
    for (layer, size) in &sizes {
        assert_eq!(proxy.delivered(layer), *size, "{:?}", proxy.pieces(layer));
    }
    assert!(proxy.count("GET /v2/busybox/blobs/") > 3);
    // Where the rest is another's, it is not taken for ours.
    let proxy = Proxy::of(&registry);
    proxy.fault_times(1, &sizes[0].0, Fault::CutAfter(300_000));
    proxy.fault(&sizes[0].0, Fault::WrongRange);
    refused(&host, &proxy.name("busybox:1"), &[], "range|bytes");
}

#[test]
fn a_token_that_ends_on_the_way_is_renewed() {
    let Some(host) = engine() else { return };
    let tokens = Tokens::start(TokenRules { private: true, ..TokenRules::default() });
    let registry = Registry::start(Guard { tokens: Some(&tokens), ..Guard::default() });
    registry.push(&image::busybox(), "busybox:1");
    let proxy = Proxy::of(&registry);
    let challenge = format!(
        "WWW-Authenticate: Bearer realm=\"{}\",service=\"the tests' registry\",scope=\"repository:busybox:pull\",error=\"invalid_token\"\r\n",
        tokens.realm()
    );
    proxy.fault_times(2, "GET /v2/busybox/blobs/", Fault::status("401 Unauthorized", &challenge, b""));
    pulls(&host, &proxy.name("busybox:1"), &["--user", &format!("{USER}:{PASSWORD}")]);
}

/// An engine with its root on a small disk of its own.
fn on_a_small_disk(bytes: u64) -> Option<Host> {
    if !ready(&PROGRAMS) || !ready(&["/usr/sbin/mkfs.ext4", "/usr/bin/mount"]) {
        return None;
    }
    let mut host = impatient();
    let (root, disk) = (host.root(), host.folder().join("disk"));
    fs::create_dir(&root).unwrap();
    fs::File::create(&disk).unwrap().set_len(bytes).unwrap();
    done(Command::new("/usr/sbin/mkfs.ext4").args(["-q", "-m", "0"]).arg(&disk));
    done(Command::new("/usr/bin/mount").args(["-o", "loop"]).arg(&disk).arg(&root));
    host.start();
    Some(host)
}

fn without_the_disk(mut host: Host) {
    host.stop();
    done(Command::new("/usr/bin/umount").arg(host.root()));
    wait_for("the loop device to go", || left::loop_devices(host.folder()).is_empty());
}

fn free(host: &Host) -> u64 {
    let disk = nix::sys::statvfs::statvfs(&host.root()).unwrap();
    disk.blocks_available() * disk.fragment_size()
}

/// Zeros as a file in an archive, packed: as many times 64 MiB.
fn bomb(pack: Pack, times: usize) -> Vec<u8> {
    let mut header = tar::Header::new_gnu();
    header.set_path("bomb").unwrap();
    header.set_mode(0o644);
    header.set_size((64 << 20) * times as u64);
    header.set_cksum();
    let mut packed = pack.pack(header.as_bytes());
    // Packed streams one behind the other are one.
    let zeros = pack.pack(&vec![0; 64 << 20]);
    (0..times).for_each(|_| packed.extend_from_slice(&zeros));
    packed
}

#[test]
fn a_full_disk_half_way_gives_its_space_back() {
    let Some(host) = on_a_small_disk(64 << 20) else { return };
    let registry = Proxy::alone();
    let layer =
        |seed: u64, length: usize| Layer::default().file("noise", 0o644, &noise(seed, length)).finish();
    // The blobs fit, what is in them does not; not even the blobs fit; bombs.
    let zeros = Layer::default().file("zeros", 0o644, &vec![1; 90 << 20]).finish();
    for (what, image) in [
        ("layers", made(|parts| parts.image(&architecture(), Pack::Gzip, &[layer(20, 1 << 20), zeros]))),
        (
            "blobs",
            made(|parts| {
                parts.image(&architecture(), Pack::Plain, &[layer(21, 30 << 20), layer(22, 50 << 20)])
            }),
        ),
        (
            "gzip",
            made(|parts| {
                let layer = parts.blob("application/vnd.oci.image.layer.v1.tar+gzip", bomb(Pack::Gzip, 20));
                let config = parts.config(&architecture(), &[Digest::sha256_of(b"").to_string()]);
                parts.manifest(&config, &[layer])
            }),
        ),
        (
            "zstd",
            made(|parts| {
                let layer = parts.blob("application/vnd.oci.image.layer.v1.tar+zstd", bomb(Pack::Zstd, 20));
                let config = parts.config(&architecture(), &[Digest::sha256_of(b"").to_string()]);
                parts.manifest(&config, &[layer])
            }),
        ),
    ] {
        println!("{what}");
        registry.plant_image(what, "1", &image);
        collect(&host);
        let before = free(&host);
        let known = kept(&host);
        fails(&host, &registry.name(&format!("{what}:1")), &[], "space|too large");
        assert_eq!(kept(&host), known, "{what}: a full disk gives everything back");
        // The journal of events has a segment of its own.
        wait_for("the space to be free again", || free(&host) + (6 << 20) > before);
    }
    serves(&host);
    without_the_disk(host);
}

#[test]
fn a_push_to_a_bad_registry_fails_with_a_clear_error() {
    let Some(host) = engine() else { return };
    let name = host.import();
    // The index of the archive goes.
    collect(&host);
    let registry = Registry::open();
    for (pattern, fault, why) in [
        ("POST ", Fault::status("403 Forbidden", "", b""), "403|denied"),
        ("POST ", Fault::status("202 Accepted", "", b""), "location|upload"),
        ("POST ", Fault::status("500 Internal Server Error", "", b""), "500"),
        ("POST ", Fault::Stall, "1s|time|answer"),
        (
            "PUT /v2/x/manifests/",
            Fault::status("400 Bad Request", "", b"{\"errors\":[{\"code\":\"MANIFEST_INVALID\"}]}"),
            "MANIFEST_INVALID|400",
        ),
        (
            "PUT /v2/x/manifests/",
            Fault::Header("docker-content-digest".into(), format!("sha256:{}", "0".repeat(64))),
            "stored|digest",
        ),
        (
            "/blobs/uploads/",
            Fault::Redirect(format!("http://{}/v2/x/blobs/uploads/", registry.address)),
            "redirect|307",
        ),
    ] {
        println!("{pattern} {fault:?}");
        let proxy = Proxy::of(&registry);
        let known = fault.clone();
        proxy.fault(pattern, fault);
        let before = kept(&host);
        let ended = host.ctr().run(&["images", "push", "--plain-http", &proxy.name("x:1"), name]);
        // A redirect may be followed: the image is where it leads, then.
        if ended.code == 0 && matches!(known, Fault::Redirect(_)) {
            continue;
        }
        assert_ne!(ended.code, 0, "{known:?}: {ended:?}");
        assert!(Regex::new(&format!("(?i){why}")).unwrap().is_match(&ended.stderr), "{why}: {ended:?}");
        assert_eq!(kept(&host), before);
    }
    // What passes is waited for here, too.
    let proxy = Proxy::of(&registry);
    proxy.fault_times(1, "POST ", Fault::status("503 Service Unavailable", "", b""));
    proxy.fault_times(
        1,
        "PUT /v2/y/manifests/",
        Fault::status("429 Too Many Requests", "Retry-After: 0\r\n", b""),
    );
    proxy.fault_times(1, "HEAD ", Fault::Raw("".into()));
    host.ctr().ok(&["images", "push", "--plain-http", &proxy.name("y:1"), name]);
    let digest = registry.digest("y:1");
    assert!(host.ctr().ok(&["images", "ls"]).contains(&digest[..19]));
}

#[test]
fn an_index_of_nothing_is_refused() {
    let Some(host) = engine() else { return };
    let proxy = Proxy::alone();
    proxy.plant_image("x", "1", &made(|parts| parts.index(&[])));
    refused(&host, &proxy.name("x:1"), &[], "platform|manifest|empty");
}

#[test]
fn a_page_is_no_answer_to_a_push() {
    let Some(host) = engine() else { return };
    let (name, registry) = (host.import(), Registry::open());
    let proxy = Proxy::of(&registry);
    proxy.fault("PUT /v2/x/manifests/", Fault::page());
    let error = host.ctr().fails(&["images", "push", "--plain-http", &proxy.name("x:1"), name]);
    assert!(error.contains("200") || error.contains("HTML"), "{error}");
}
