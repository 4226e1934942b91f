//! Our own `ctr snapshots …` and `ctr content …`: tables, the tree, unpacking, layers of what changed, edits. Against gantryd,
//! and against Debian's containerd, which shows that it asks for no more than containerd's services.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::io::Read as _;

use tests::client::Ctr;
use tests::host::{CONTAINERD, Host, Kind, RUNC, STOCK_CTR};
use tests::image::{BUSYBOX, NAME};
use tests::ready;

macro_rules! on_both {
    ($($test:ident),* $(,)?) => {
        mod gantry { $(#[test] fn $test() { super::run(super::Kind::Gantry, super::$test); })* }
        mod containerd { $(#[test] fn $test() { super::run(super::Kind::Containerd, super::$test); })* }
    };
}

on_both!(
    tables_are_those_of_containerds_ctr,
    an_image_is_unpacked_by_digest,
    what_changed_is_a_layer,
    a_blob_is_edited,
);

/// An engine with the image.
fn run(kind: Kind, test: fn(&Host)) {
    if ready(&[CONTAINERD, STOCK_CTR, RUNC, BUSYBOX]) {
        let host = Host::started(kind);
        host.import();
        test(&host);
    }
}

/// A table's words, without the blanks that align them.
fn words(table: &str) -> Vec<Vec<&str>> {
    table.lines().map(|line| line.split_whitespace().collect()).collect()
}

/// Writes a command's output, which is no text.
fn bytes(ctr: &Ctr, arguments: &[&str]) -> Vec<u8> {
    let ended = ctr.command(arguments).output().unwrap();
    assert!(ended.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&ended.stderr));
    ended.stdout
}

/// The regular members of a tar and what they hold.
fn members(layer: &[u8]) -> BTreeMap<String, String> {
    let mut archive = tar::Archive::new(layer);
    let mut found = BTreeMap::new();
    for member in archive.entries().unwrap() {
        let mut member = member.unwrap();
        let path = member.path().unwrap().display().to_string();
        let mut bytes = Vec::new();
        member.read_to_end(&mut bytes).unwrap();
        if member.header().entry_type().is_file() {
            found.insert(path, String::from_utf8_lossy(&bytes).into_owned());
        }
    }
    found
}

fn gunzip(layer: &[u8]) -> Vec<u8> {
    let mut plain = Vec::new();
    flate2::read::GzDecoder::new(layer).read_to_end(&mut plain).unwrap();
    plain
}

fn tables_are_those_of_containerds_ctr(host: &Host) {
    let (ctr, stock) = (host.ctr(), host.stock_ctr());
    ctr.ok(&["run", "-d", "--label", "a=b", NAME, "c", "sleep", "1000"]);
    ctr.ok(&["leases", "create", "--id", "l", "k=v"]);
    for arguments in [
        &["snapshots", "ls"][..],
        &["snapshots", "tree"],
        &["snapshots", "usage"],
        &["snapshots", "usage", "-b", "c"],
        &["images", "ls"],
        &["images", "ls", "-q"],
        &["content", "ls", "-q"],
        &["containers", "ls"],
        &["tasks", "ls"],
        &["tasks", "ps", "c"],
        &["leases", "ls"],
        &["leases", "ls", "-q"],
        &["plugins", "ls"],
        &["plugins", "ls", "-q"],
        &["namespaces", "ls"],
        &["containers", "info", "--spec", "c"],
        &["containers", "ls", "-q"],
        &["tasks", "ls", "-q"],
        &["namespaces", "ls", "-q"],
        &["snapshots", "info", "c"],
        &["content", "active"],
    ] {
        let (ours, theirs) = (ctr.ok(arguments), stock.ok(arguments));
        match (
            serde_json::from_str::<serde_json::Value>(&ours),
            serde_json::from_str::<serde_json::Value>(&theirs),
        ) {
            (Ok(ours), Ok(theirs)) => assert_eq!(ours, theirs, "{arguments:?}"),
            _ => assert_eq!(words(&ours), words(&theirs), "{arguments:?}"),
        }
    }
    // Debian's shows a blob's labels in another order each time.
    let sizes = |ctr: &Ctr| {
        let table = ctr.ok(&["content", "ls"]);
        let rows = words(&table);
        rows.iter().map(|row| [row[0].to_owned(), row[1].to_owned()]).collect::<Vec<_>>()
    };
    assert_eq!(sizes(&ctr), sizes(&stock));
    let parse = |text: String| serde_json::from_str::<serde_json::Value>(&text).unwrap();
    let info = ["containers", "info", "c"];
    let (ours, mut theirs) = (parse(ctr.ok(&info)), parse(stock.ok(&info)));
    // Ours shows what options and extensions hold.
    theirs["Runtime"]["Options"] = ours["Runtime"]["Options"].clone();
    theirs["Extensions"] = ours["Extensions"].clone();
    for (key, value) in theirs.as_object().unwrap() {
        assert_eq!(ours[key], *value, "{key}");
    }
    // Measured twice, it is not the same; what is measured is.
    let (ours, theirs) = (ctr.ok(&["tasks", "metrics", "c"]), stock.ok(&["tasks", "metrics", "c"]));
    let firsts = |table: &str| -> Vec<String> {
        words(table).iter().map(|row| row.first().copied().unwrap_or_default().to_owned()).collect()
    };
    assert_eq!(firsts(&ours), firsts(&theirs));
    ctr.ok(&["tasks", "rm", "-f", "c"]);
    ctr.ok(&["containers", "rm", "c"]);
    host.assert_nothing_left();
}

fn an_image_is_unpacked_by_digest(host: &Host) {
    let ctr = host.ctr();
    let list = ctr.ok(&["images", "ls"]);
    let digest = words(&list)[1][2];
    assert_eq!(ctr.ok(&["snapshots", "--snapshotter", "native", "ls", "-q"]), "");
    let said = ctr.ok(&["snapshots", "--snapshotter", "native", "unpack", "--sync-fs", digest]);
    assert!(said.contains(digest) && said.trim_end().ends_with("...done"), "{said}");
    assert_eq!(ctr.ok(&["snapshots", "--snapshotter", "native", "ls", "-q"]).lines().count(), 2);
    let tree = ctr.ok(&["snapshots", "--snapshotter", "native", "tree"]);
    assert!(tree.starts_with(" sha256:") && tree.contains("\n  \\_ sha256:"), "{tree}");
    let unknown = format!("sha256:{}", "0".repeat(64));
    assert!(ctr.fails(&["snapshots", "unpack", &unknown]).contains("ctr images ls"));
    assert_eq!(ctr.ok(&["leases", "ls", "-q"]), "");
    host.assert_nothing_left();
}

fn what_changed_is_a_layer(host: &Host) {
    let ctr = host.ctr();
    let script = "echo one > /etc/one; rm /etc/replaced-above";
    ctr.ok(&["run", NAME, "c", "sh", "-c", script]);
    let before = ctr.ok(&["snapshots", "ls", "-q"]);
    let layer = gunzip(&bytes(&ctr, &["snapshots", "diff", "c"]));
    let files = members(&layer);
    assert_eq!(files["etc/one"], "one\n");
    assert!(files.contains_key("etc/.wh.replaced-above"), "{files:?}");
    // The same as Debian's ctr has. containerd puts the time of day on what it says is gone, so that the bytes may differ there.
    let same = |one: &[u8], other: &[u8]| {
        assert_eq!(members(one), members(other));
        assert!(host.kind == Kind::Containerd || one == other, "the same members, and other bytes");
    };
    same(&layer, &gunzip(&bytes(&host.stock_ctr(), &["snapshots", "diff", "c"])));
    // Of two committed snapshots, which are seen through views, without compression.
    let digests: Vec<&str> = before.lines().filter(|key| key.starts_with("sha256:")).collect();
    let info = ctr.ok(&["snapshots", "info", digests[0]]);
    let (base, top) = match info.contains("Parent") {
        true => (digests[1], digests[0]),
        false => (digests[0], digests[1]),
    };
    let plain = ["--media-type", "application/vnd.oci.image.layer.v1.tar"];
    let layer = bytes(&ctr, &[&["snapshots", "diff"], &plain[..], &[base, top]].concat());
    assert_eq!(members(&layer)["etc/replaced-above"], "new\n");
    // The parent is the default.
    same(&layer, &bytes(&ctr, &[&["snapshots", "diff"], &plain[..], &[top]].concat()));
    // A base has no parent: all of it is new.
    assert_eq!(
        members(&bytes(&ctr, &[&["snapshots", "diff"], &plain[..], &[base]].concat()))["etc/replaced-above"],
        "old\n"
    );
    // Nothing is kept of it, unless it is to be.
    host.collect();
    let content = ctr.ok(&["content", "ls", "-q"]);
    bytes(&ctr, &["snapshots", "diff", "--keep", "--label", "made=here", "--ref", "mine", "c"]);
    bytes(&ctr, &["snapshots", "diff", base, "c"]);
    host.collect();
    let now = ctr.ok(&["content", "ls", "-q"]);
    assert_eq!(now.lines().count(), content.lines().count() + 1, "{now}");
    let kept = ctr.ok(&["content", "ls", "-q", "labels.made==here"]);
    assert!(!content.contains(kept.trim()) && now.contains(kept.trim()), "{kept}");
    // What fails leaves no view, as what succeeds does not.
    assert!(ctr.fails(&["snapshots", "diff", "no-such"]).contains("no-such"));
    assert!(ctr.fails(&["snapshots", "diff", base, "no-such"]).contains("no-such"));
    assert!(ctr.fails(&["snapshots", "diff", "--media-type", "text/plain", "c"]).contains("text/plain"));
    assert_eq!(ctr.ok(&["snapshots", "ls", "-q"]), before);
    assert_eq!((ctr.ok(&["leases", "ls", "-q"]), ctr.ok(&["content", "active", "-q"])), Default::default());
    ctr.ok(&["containers", "rm", "c"]);
    host.assert_nothing_left();
}

fn a_blob_is_edited(host: &Host) {
    let ctr = host.ctr();
    // Nothing else keeps these blobs.
    let root = ["--label", "containerd.io/gc.root=test"];
    let ended = ctr.with_input(&[&["content", "ingest"], &root[..], &["ref"]].concat(), b"{\"a\": 1}");
    let digest = ended.stdout.trim();
    let edit = |flags: &[&str]| ctr.run(&[&["content", "edit"], &root[..], flags, &[digest]].concat());
    let edited = edit(&["--editor", "sed -i s/1/2/", "--validate", "json"]);
    assert_eq!(edited.code, 0, "{edited:?}");
    assert_eq!(ctr.ok(&["content", "get", edited.stdout.trim()]), "{\"a\": 2}");
    let stored = || ctr.ok(&["content", "ls", "-q", "labels.\"containerd.io/gc.root\"==test"]);
    let before = stored();
    assert_eq!(before.lines().count(), 2, "{before}");
    assert!(edit(&["--editor", "sed -i s/1/{/", "--validate", "json"]).stderr.contains("not JSON"));
    assert!(edit(&["--editor", "false"]).stderr.contains("false"));
    assert_eq!(stored(), before);
    host.assert_nothing_left();
}
