//! Pulls and pushes killed at random points: their client, the engine, the network. They are repeated, end right, and no byte of a
//! layer that was finished is fetched or sent twice.
//!
//! GANTRY_SEED repeats a failure: the seed is printed. A point is a number of bytes after which the proxy holds all there is,
//! so that the kill is at that point and no other.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::time::{SystemTime, UNIX_EPOCH};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use tests::client::{Ended, finish};
use tests::faults::Proxy;
use tests::host::{CONTAINERD, Host, RUNC, STOCK_CTR};
use tests::image::{self, BUSYBOX, Image, Layer};
use tests::ready;
use tests::registry::{
    Pack, Parts, REGISTRY, Registry, SKOPEO, architecture, blobs, collect, impatient, ingests, kept, noise,
};

const PROGRAMS: [&str; 6] = [CONTAINERD, STOCK_CTR, RUNC, BUSYBOX, REGISTRY, SKOPEO];

/// Numbers that look random, the same for the same seed.
struct Numbers(u64);

impl Numbers {
    /// Of GANTRY_SEED or, without, of the clock; printed, for a failure to be repeated.
    fn new(what: &str) -> Self {
        let clock = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap().subsec_nanos().into();
        let seed = std::env::var("GANTRY_SEED").map_or_else(|_| clock(), |seed| seed.parse().unwrap());
        println!("{what}: GANTRY_SEED={seed}");
        Numbers(seed)
    }

    /// The next, below this.
    fn below(&mut self, end: u64) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut mixed = self.0;
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        (mixed ^ (mixed >> 31)) % end
    }
}

/// Who is killed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Client,
    Engine,
    Network,
}

/// An image that runs, of five layers: some 2 MB.
fn big(seed: u64) -> Image {
    let layer = |number: u64, length: usize| {
        let path = format!("noise-{number}");
        Layer::default().file(&path, 0o644, &noise(seed * 10 + number, length)).finish()
    };
    let layers =
        [image::base_layer(), layer(1, 400_000), layer(2, 50_000), layer(3, 300_000), image::top_layer()];
    let mut parts = Parts::default();
    let manifest = parts.image(&architecture(), Pack::Gzip, &layers);
    parts.finish(&manifest)
}

/// The layers' sizes, by digest. The other blobs are documents.
fn layers(image: &Image) -> BTreeMap<String, u64> {
    let layers = image.blobs.iter().filter(|(_, bytes)| !bytes.starts_with(b"{"));
    layers.map(|(digest, bytes)| (digest.to_string(), bytes.len() as u64)).collect()
}

fn engine() -> Option<Host> {
    ready(&PROGRAMS).then(|| {
        let mut host = impatient();
        host.start();
        host
    })
}

/// Kills someone while `command` runs and is held by the proxy; how the command ended, if it was let.
fn kill_one(host: &mut Host, proxy: &Proxy, victim: Victim, command: &[&str], down: bool) -> Ended {
    let mut client = host.ctr().spawn(command);
    let mut ended = None;
    tests::wait_for("the proxy to hold, or the command to end", || {
        ended = client.try_wait().unwrap();
        ended.is_some() || proxy.holds()
    });
    if ended.is_some() {
        return finish(client, "what ended before its point");
    }
    match victim {
        Victim::Client => {
            kill(Pid::from_raw(client.id() as i32), Signal::SIGKILL).unwrap();
            let ended = finish(client, "the killed client");
            // The engine may still hold connections; none of them gets another byte.
            proxy.cut(false);
            ended
        }
        Victim::Engine => {
            host.kill();
            let ended = finish(client, "the client of a killed engine");
            assert_ne!(ended.code, 0, "{ended:?}");
            proxy.cut(false);
            host.start();
            ended
        }
        Victim::Network => {
            proxy.cut(down);
            let ended = finish(client, "the client without a network");
            assert!(!down || ended.code != 0, "{ended:?}");
            proxy.mend();
            ended
        }
    }
}

/// What is begun of an image's layers: digest, bytes that are there, pieces that the proxy had sent.
fn begun(host: &Host, proxy: &Proxy, layers: &BTreeMap<String, u64>) -> Vec<(String, u64, usize)> {
    ingests(host)
        .into_iter()
        .filter_map(|(reference, length)| {
            let layer = layers.keys().find(|layer| reference.contains(layer.as_str()))?;
            Some((layer.clone(), length, proxy.pieces(layer).len()))
        })
        .collect()
}

/// Pulls an image, killed twice, then let.
fn pull_killed(
    host: &mut Host,
    proxy: &Proxy,
    name: &str,
    image: &Image,
    victim: Victim,
    numbers: &mut Numbers,
) {
    let layers = layers(image);
    let pull = ["images", "pull", "--plain-http", name];
    // The bytes that had come of layers that were finished at a kill, and the layers that were begun then.
    let (mut finished, mut started) = (BTreeMap::new(), Vec::new());
    let mut told = Vec::new();
    for _ in 0..2 {
        let left: u64 =
            layers.iter().filter(|(layer, _)| !finished.contains_key(*layer)).map(|(_, size)| size).sum();
        let (point, down) = (numbers.below(left + 1), numbers.below(2) == 0);
        proxy.hold_after(point);
        let ended = kill_one(host, proxy, victim, &pull, down);
        told.push(format!("at {point} ({down}): {ended:?}"));
        if ended.code == 0 {
            break;
        }
        assert_eq!(host.stock_ctr().ok(&["images", "ls", "-q"]), "", "no half image is seen: {told:?}");
        // A layer is finished as a blob, or as an ingest with all its bytes. It stays so: a byte that comes for it later comes twice.
        let begun = begun(host, proxy, &layers);
        let whole = begun.iter().filter(|(layer, length, _)| layers[layer] == *length);
        let whole = whole.map(|(layer, _, _)| layer.clone());
        for layer in blobs(host).into_iter().filter(|blob| layers.contains_key(blob)).chain(whole) {
            finished.entry(layer.clone()).or_insert_with(|| proxy.delivered(&layer));
        }
        started.extend(begun);
    }
    proxy.release();
    let ended = host.ctr().run(&pull);
    assert_eq!(ended.code, 0, "{told:?}: {ended:?}");
    for (layer, delivered) in &finished {
        assert_eq!(proxy.delivered(layer), *delivered, "{layer}: {:?}, {told:?}", proxy.pieces(layer));
    }
    for (layer, length, before) in &started {
        // A piece that goes on where one ended is counted as one with it.
        let pieces = proxy.pieces(layer);
        let next = pieces.get(*before).map(|(first, _)| first);
        assert!(next.is_none_or(|next| next >= length), "{layer}: {length} were there: {pieces:?}, {told:?}");
    }
    let (there, ctr) = (blobs(host), host.ctr());
    assert!(image.blobs.iter().all(|(digest, _)| there.contains(&digest.to_string())), "{there:?}, {told:?}");
    assert_eq!(ctr.ok(&["images", "ls", "-q"]), format!("{name}\n"));
    assert_eq!(ctr.ok(&["run", "--rm", name, "c", "cat", "etc/replaced-above"]), "new\n", "{told:?}");
    let sum = ctr.ok(&["run", "--rm", name, "c", "wc", "-c", "/noise-1", "/noise-2", "/noise-3"]);
    assert!(sum.contains("750000 total"), "{sum}");
    ctr.ok(&["images", "rm", name]);
    collect(host);
    assert_eq!(ingests(host), [], "{told:?}");
    host.assert_nothing_left();
}

fn pulls_killed(victim: Victim, times: u64) {
    let Some(mut host) = engine() else { return };
    let mut numbers = Numbers::new(&format!("pulls, {victim:?}"));
    let registry = Registry::open();
    let empty = kept(&host);
    let image = big(1);
    registry.push(&image, "big:1");
    for number in 0..times {
        let proxy = Proxy::of(&registry);
        println!("pull {number}");
        pull_killed(&mut host, &proxy, &proxy.name("big:1"), &image, victim, &mut numbers);
        assert_eq!(kept(&host), empty);
    }
}

#[test]
fn a_pull_goes_on_when_its_client_was_killed() {
    pulls_killed(Victim::Client, 7);
}

#[test]
fn a_pull_goes_on_when_the_engine_was_killed() {
    pulls_killed(Victim::Engine, 7);
}

#[test]
fn a_pull_goes_on_when_the_network_was_cut() {
    pulls_killed(Victim::Network, 6);
}

#[test]
fn a_push_goes_on_whoever_was_killed() {
    let Some(mut host) = engine() else { return };
    let mut numbers = Numbers::new("pushes");
    let image = big(2);
    let total: u64 = layers(&image).values().sum();
    let archive = host.folder().join("big.tar");
    let mut named: serde_json::Value = serde_json::from_slice(&image.index).unwrap();
    named["manifests"][0]["annotations"] =
        serde_json::json!({"io.containerd.image.name": "example.org/big:1"});
    let image = Image { index: named.to_string().into_bytes(), ..image };
    image.write(&archive).unwrap();
    host.stock_ctr().ok(&["images", "import", archive.to_str().unwrap()]);
    for (number, victim) in
        [Victim::Client, Victim::Engine, Victim::Network].into_iter().cycle().take(9).enumerate()
    {
        let registry = Registry::open();
        let proxy = Proxy::of(&registry);
        let to = proxy.name("big:1");
        let push = ["images", "push", "--plain-http", to.as_str(), "example.org/big:1"];
        let (point, down) = (numbers.below(total), numbers.below(2) == 0);
        println!("push {number}: {victim:?} at {point} ({down})");
        proxy.hold_after(point);
        let first = kill_one(&mut host, &proxy, victim, &push, down);
        proxy.release();
        let sent: Vec<String> = proxy.uploads().into_iter().map(|(digest, _)| digest).collect();
        if first.code != 0 {
            host.ctr().ok(&push);
        }
        let mut uploads: Vec<String> = proxy.uploads().into_iter().map(|(digest, _)| digest).collect();
        uploads.sort();
        let many = uploads.len();
        uploads.dedup();
        assert_eq!(uploads.len(), many, "{victim:?} at {point}: sent twice, {sent:?}: {uploads:?}");
        registry.copy_to("big:1", &host.folder().join(format!("copied-{number}")));
    }
    host.assert_nothing_left();
}

#[test]
fn an_interrupt_ends_a_pull_that_can_go_on() {
    let Some(host) = engine() else { return };
    let registry = Registry::open();
    let image = big(3);
    registry.push(&image, "big:1");
    let proxy = Proxy::of(&registry);
    let name = proxy.name("big:1");
    proxy.hold_after(700_000);
    let client = host.ctr().spawn(&["images", "pull", "--plain-http", &name]);
    proxy.wait_held();
    kill(Pid::from_raw(client.id() as i32), Signal::SIGINT).unwrap();
    let ended = finish(client, "the interrupted client");
    assert_ne!(ended.code, 0, "{ended:?}");
    assert_eq!(host.stock_ctr().ok(&["images", "ls", "-q"]), "");
    // A collection takes nothing of what is to go on.
    let before: u64 = ingests(&host).iter().map(|(_, length)| length).sum();
    host.ctr().ok(&["gc"]);
    let after: u64 = ingests(&host).iter().map(|(_, length)| length).sum();
    assert!(after >= before, "{before} {after}");
    proxy.cut(false);
    host.ctr().ok(&["images", "pull", "--plain-http", &name]);
    let again: u64 = layers(&image).iter().map(|(layer, size)| proxy.delivered(layer) - size).sum();
    // What was under way when it was held: at most what the connections hold.
    assert!(again < 600_000, "{again} bytes came twice");
    assert_eq!(host.ctr().ok(&["run", "--rm", &name, "c", "cat", "etc/replaced-above"]), "new\n");
}
