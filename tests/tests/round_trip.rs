//! What one engine writes the other reads: archives, and a content store's folder.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Read as _;
use std::path::Path;
use std::process::Command;

use oci::Digest;
use tests::host::{CONTAINERD, Host, Kind, RUNC, STOCK_CTR};
use tests::image::{BUSYBOX, NAME};
use tests::ready;

const PROGRAMS: [&str; 4] = [CONTAINERD, STOCK_CTR, RUNC, BUSYBOX];
const CONTENT: &str = "io.containerd.content.v1.content";

/// The blobs of an image archive, by digest.
fn blobs(archive: &Path) -> BTreeMap<String, Vec<u8>> {
    let mut archive = tar::Archive::new(File::open(archive).unwrap());
    let mut blobs = BTreeMap::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let path = entry.path().unwrap().to_string_lossy().into_owned();
        let Some(hex) = path.strip_prefix("blobs/sha256/").filter(|hex| !hex.is_empty()) else { continue };
        let mut bytes = Vec::new();
        entry.read_to_end(&mut bytes).unwrap();
        assert_eq!(Digest::sha256_of(&bytes).hex(), hex);
        blobs.insert(hex.to_owned(), bytes);
    }
    blobs
}

fn target(host: &Host) -> String {
    let list = host.stock_ctr().ok(&["images", "ls"]);
    let line = list.lines().find(|line| line.starts_with(NAME)).unwrap_or_else(|| panic!("{list}"));
    line.split_whitespace().find(|word| word.starts_with("sha256:")).unwrap().to_owned()
}

fn runs(host: &Host) {
    let said = host.stock_ctr().ok(&["run", "--rm", NAME, "c", "echo", "it runs"]);
    assert_eq!(said.trim(), "it runs");
}

fn exports_are_imported(from: Kind, to: Kind) {
    if !ready(&PROGRAMS) {
        return;
    }
    let (from, to) = (Host::started(from), Host::started(to));
    from.import();
    let (first, second) = (from.folder().join("first.tar"), from.folder().join("second.tar"));
    from.stock_ctr().ok(&["images", "export", first.to_str().unwrap(), NAME]);
    to.stock_ctr().ok(&["images", "import", first.to_str().unwrap()]);
    assert_eq!(target(&from), target(&to));
    runs(&to);
    to.stock_ctr().ok(&["images", "export", second.to_str().unwrap(), NAME]);
    let (first, second) = (blobs(&first), blobs(&second));
    assert!(first.len() >= 4, "{:?}", first.keys());
    assert_eq!(first, second);
}

#[test]
fn what_containerd_exports_we_import() {
    exports_are_imported(Kind::Containerd, Kind::Gantry);
}

#[test]
fn what_we_export_containerd_imports() {
    exports_are_imported(Kind::Gantry, Kind::Containerd);
}

/// Our own client's archives, too.
#[test]
fn what_our_ctr_exports_containerd_imports() {
    if !ready(&PROGRAMS) {
        return;
    }
    let (ours, theirs) = (Host::gantry(), Host::containerd());
    ours.import();
    let archive = ours.folder().join("ours.tar");
    ours.ctr().ok(&["images", "export", archive.to_str().unwrap(), NAME]);
    theirs.stock_ctr().ok(&["images", "import", archive.to_str().unwrap()]);
    assert_eq!(target(&ours), target(&theirs));
    runs(&theirs);
}

fn a_content_folder_opens_in_the_other(from: Kind, to: Kind) {
    if !ready(&PROGRAMS) {
        return;
    }
    let mut from = Host::started(from);
    from.import();
    let digest = target(&from);
    let archive = from.folder().join("image.tar");
    from.stock_ctr().ok(&["images", "export", archive.to_str().unwrap(), NAME]);
    from.stop();
    let mut to = Host::new(to);
    fs::create_dir_all(to.root()).unwrap();
    let copied = Command::new("cp").arg("-a").arg(from.root().join(CONTENT)).arg(to.root()).status().unwrap();
    assert!(copied.success());
    let blob = to.root().join(CONTENT).join("blobs/sha256").join(digest.trim_start_matches("sha256:"));
    let bytes = fs::read(&blob).unwrap();
    to.start();
    to.stock_ctr().ok(&["images", "import", archive.to_str().unwrap()]);
    assert_eq!(target(&to), digest);
    assert_eq!(fs::read(&blob).unwrap(), bytes);
    runs(&to);
}

#[test]
fn a_content_folder_of_containerd_opens_in_ours() {
    a_content_folder_opens_in_the_other(Kind::Containerd, Kind::Gantry);
}

#[test]
fn a_content_folder_of_ours_opens_in_containerd() {
    a_content_folder_opens_in_the_other(Kind::Gantry, Kind::Containerd);
}
