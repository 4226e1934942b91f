//! The benchmark program from end to end, with a tiny image: that it measures both engines, and leaves nothing.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::process::Command;

use harness::host::{CONTAINERD, RUNC, STOCK_CTR};
use harness::image::BUSYBOX;

const PROGRAM: &str = env!("CARGO_BIN_EXE_gantry-bench");

#[test]
fn a_case_is_measured_on_both_engines_and_its_page_is_written() {
    if !harness::ready(&[CONTAINERD, STOCK_CTR, RUNC, BUSYBOX, "/usr/bin/docker-registry"]) {
        return;
    }
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(PROGRAM);
    command
        .args(["--quick", "--size", "2", "--filter", "unpack-layer", "--scratch"])
        .arg(folder.path().join("scratch"));
    let output = command.arg("--out").arg(folder.path()).output().unwrap();
    let said = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    assert!(said.contains("1 cases, 1 measured; 1 marks: ") && said.contains("; 0 runs failed"), "{said}");
    let page = fs::read_to_string(folder.path().join("benchmarks.md")).unwrap();
    for row in ["| wall time | gantryd | 1 |", "| wall time | containerd | 1 |", "| wall time | floor | 1 |"]
    {
        assert!(page.contains(row), "{row}: {page}");
    }
    assert!(folder.path().join("benchmarks/unpack-layer.svg").exists());
    assert!(!folder.path().join("scratch/run").exists());
    assert!(harness::left::processes(folder.path()).is_empty());
    assert!(harness::left::mounts(folder.path()).is_empty());
}

#[test]
fn an_unknown_case_is_refused_with_the_names_of_those_there_are() {
    if !harness::ready(&[]) {
        return;
    }
    let output = Command::new(PROGRAM).args(["--filter", "no-such-case"]).output().unwrap();
    let said = String::from_utf8_lossy(&output.stderr);
    assert!(!output.status.success() && said.contains("there are: pull-gzip, "), "{said}");
}
