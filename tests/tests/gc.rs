//! Garbage collection with the whole engine: what nothing holds leaves the disk, what something holds stays, and which it
//! is can be asked.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::Path;

use serde_json::Value;
use tests::host::{Host, Kind, RUNC, STOCK_CTR};
use tests::image::{BUSYBOX, NAME};
use tests::{ready, wait_for};

fn gantry() -> Option<Host> {
    ready(&[STOCK_CTR, RUNC, BUSYBOX]).then(Host::collecting)
}

fn count(folder: &Path) -> usize {
    std::fs::read_dir(folder).map_or(0, Iterator::count)
}

/// Blobs, and layers of overlayfs, on disk.
fn on_disk(host: &Host) -> (usize, usize) {
    (
        count(&host.root().join("io.containerd.content.v1.content/blobs/sha256")),
        count(&host.root().join("io.containerd.snapshotter.v1.overlayfs/snapshots")),
    )
}

fn lines(text: &str) -> Vec<&str> {
    text.lines().collect()
}

fn json(text: &str) -> Value {
    serde_json::from_str(text).unwrap_or_else(|error| panic!("{error}: {text}"))
}

/// The kinds on the way from a root to this object; empty when nothing holds it.
fn chain(host: &Host, key: &str) -> Vec<String> {
    let answer = json(&host.ctr().ok(&["gc", "--format", "json", "--explain", key]));
    let kinds = answer["chain"].as_array().unwrap().iter();
    let kinds = kinds.map(|step| step["kind"].as_str().unwrap().to_owned()).collect();
    if answer["held"].as_bool().unwrap() { kinds } else { Vec::new() }
}

#[test]
fn a_container_keeps_its_snapshots_and_nothing_else() {
    let Some(host) = gantry() else { return };
    let (stock, ours) = (host.stock_ctr(), host.ctr());
    let image = host.import();
    stock.ok(&["run", "-d", image, "c", "sleep", "1000"]);
    // The archive's index went: the image is the manifest in it.
    ours.ok(&["gc"]);
    // Two layers, config and manifest; two layers and the container's own.
    assert_eq!(on_disk(&host), (4, 3));
    let digests = ours.ok(&["content", "ls", "-q"]);
    for digest in lines(&digests) {
        assert_eq!(chain(&host, digest)[0], "image", "{digest}");
    }
    assert_eq!(chain(&host, NAME), ["image"]);
    assert_eq!(chain(&host, "c"), ["container"]);
    let snapshots = ours.ok(&["snapshots", "ls", "-q"]);
    let base = lines(&snapshots).into_iter().find(|key| {
        let info = json(&ours.ok(&["snapshots", "info", key]));
        info["Parent"].is_null()
    });
    let base = base.unwrap();
    // From the image by its labels, which is as far as from the container by its parents, or shorter.
    assert!(["image", "container"].contains(&&chain(&host, base)[0][..]));

    stock.ok(&["images", "rm", "--sync", NAME]);
    assert_eq!(on_disk(&host), (0, 3));
    assert_eq!(ours.ok(&["content", "ls", "-q"]), "");
    assert_eq!(chain(&host, base), ["container", "snapshot", "snapshot", "snapshot"]);
    let table = ours.ok(&["gc", "--explain", base, "--snapshotter", "overlayfs"]);
    assert!(table.starts_with("KIND") && table.contains("stays until it is deleted"), "{table}");
    assert!(table.contains("parent of the one before"), "{table}");
    assert!(ours.fails(&["gc", "--explain", base, "--snapshotter", "native"]).contains("of native"));
    let gone = ours.fails(&["gc", "--explain", lines(&digests)[0]]);
    assert!(gone.contains("there is no sha256:"), "{gone}");
    // It runs on what is left.
    assert_eq!(ours.ok(&["tasks", "exec", "--exec-id", "e", "c", "echo", "alive"]), "alive\n");

    stock.ok(&["tasks", "rm", "-f", "c"]);
    stock.ok(&["containers", "rm", "c"]);
    ours.ok(&["gc"]);
    assert_eq!(on_disk(&host), (0, 0));
    assert_eq!(ours.ok(&["snapshots", "ls", "-q"]), "");
    let nothing = json(&ours.ok(&["gc", "--format", "json"]));
    for kind in ["content", "snapshots", "images", "leases", "ingests"] {
        assert_eq!(nothing[kind], 0, "{nothing}");
    }
    // Nothing keeps the namespace from going.
    ours.ok(&["namespaces", "rm", &host.namespace]);
    host.assert_nothing_left();
}

#[test]
fn what_leases_hold_goes_with_them() {
    let Some(host) = gantry() else { return };
    let (stock, ours) = (host.stock_ctr(), host.ctr());
    // What has no name and no lease is not kept.
    ours.with_input(&["content", "ingest", "loose"], b"loose");
    ours.ok(&["gc"]);
    assert_eq!(on_disk(&host).0, 0);
    ours.ok(&["snapshots", "prepare", "kept"]);
    assert_eq!(chain(&host, "kept"), ["snapshot"]);
    // An expired lease goes, one that has time does not.
    ours.ok(&["leases", "create", "--id", "short", "-x", "1ms"]);
    ours.ok(&["leases", "create", "--id", "long", "-x", "1h"]);
    wait_for("the lease to expire", || {
        ours.ok(&["gc"]);
        ours.ok(&["leases", "ls", "-q"]) == "long\n"
    });
    assert_eq!(chain(&host, "long"), ["lease"]);
    // A collection sees when the next one is due: nobody asks for that.
    ours.ok(&["leases", "create", "--id", "soon", "-x", "1s"]);
    ours.ok(&["gc"]);
    wait_for("the lease to be collected", || ours.ok(&["leases", "ls", "-q"]) == "long\n");
    // A label keeps what nothing else would.
    assert_eq!(lines(&ours.ok(&["snapshots", "ls", "-q"])), ["kept"]);
    ours.ok(&["snapshots", "label", "kept", "containerd.io/gc.root="]);
    assert!(chain(&host, "kept").is_empty());
    let why = ours.ok(&["gc", "--explain", "kept"]);
    assert!(why.contains("nothing holds it"), "{why}");
    ours.ok(&["leases", "rm", "--sync", "long"]);
    assert_eq!(stock.ok(&["snapshots", "ls"]).lines().count(), 1);
    assert_eq!(on_disk(&host), (0, 0));
    host.assert_nothing_left();
}

#[test]
fn deletions_are_followed_by_a_collection_without_being_asked() {
    let Some(host) = gantry() else { return };
    let stock = host.stock_ctr();
    host.import();
    assert_eq!(stock.ok(&["run", "--rm", NAME, "c", "echo", "well"]), "well\n");
    stock.ok(&["images", "rm", NAME]);
    wait_for("the content and the layers to go", || on_disk(&host) == (0, 0));
    host.assert_nothing_left();
}

#[test]
fn a_kill_in_the_middle_leaves_nothing_for_good() {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX]) {
        return;
    }
    let mut host = Host::new(Kind::Gantry);
    host.collects_by_itself = true;
    host.start();
    for _ in 0..4 {
        host.import();
        // The archive's own index is in the store until it is collected.
        host.ctr().ok(&["gc"]);
        let before = on_disk(&host);
        let remove = host.ctr().spawn(&["images", "rm", "--sync", NAME]);
        wait_for("the removal to begin", || on_disk(&host) != before);
        host.kill();
        tests::client::finish(remove, "images rm");
        host.start();
        let ctr = host.ctr();
        assert_eq!(ctr.ok(&["images", "ls", "-q"]), "");
        ctr.ok(&["gc"]);
        assert_eq!(on_disk(&host), (0, 0), "{}", host.log());
    }
    host.assert_nothing_left();
}

#[test]
fn imports_and_containers_bear_collections_beside_them() {
    let Some(host) = gantry() else { return };
    let (stock, ours) = (host.stock_ctr(), host.ctr());
    for _ in 0..3 {
        let collector = ours.clone();
        let collecting = std::thread::spawn(move || {
            for _ in 0..20 {
                collector.ok(&["gc"]);
            }
        });
        host.import();
        assert_eq!(stock.ok(&["run", "--rm", NAME, "c", "echo", "well"]), "well\n");
        collecting.join().unwrap();
        stock.ok(&["images", "rm", "--sync", NAME]);
        assert_eq!(on_disk(&host), (0, 0));
    }
    host.assert_nothing_left();
}
