//! The rules of the tree that a compiler does not hold: which crate may know which, where unsafe code stands, and that
//! every module says what it is.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

/// Which of our crates each may depend on; docs/ARCHITECTURE.md has the same list.
const EDGES: [(&str, &[&str]); 11] = [
    ("gantry-proto", &[]),
    ("gantry-oci", &[]),
    ("gantry-sys", &[]),
    ("gantry-snapshotter", &["gantry-sys"]),
    ("gantry-shim-api", &["gantry-proto"]),
    ("gantry-shim-runc", &["gantry-shim-api", "gantry-sys", "gantry-oci", "gantry-proto"]),
    ("gantry-engine", &["gantry-proto", "gantry-shim-api", "gantry-snapshotter", "gantry-sys", "gantry-oci"]),
    ("gantry-ctr", &["gantry-proto", "gantry-shim-api", "gantry-oci", "gantry-sys"]),
    ("gantry-tests", &["gantry-proto", "gantry-shim-api", "gantry-oci"]),
    ("gantry-bench", &["gantry-tests", "gantry-proto", "gantry-oci", "gantry-sys"]),
    ("gantry-chaos", &["gantry-tests", "gantry-proto", "gantry-oci"]),
];

fn top() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap().to_owned()
}

/// Every file under version control.
fn files() -> Vec<PathBuf> {
    let list = Command::new("git").arg("-C").arg(top()).args(["ls-files", "-z"]).output().unwrap();
    assert!(list.status.success(), "git: {}", String::from_utf8_lossy(&list.stderr));
    let names = String::from_utf8(list.stdout).unwrap();
    let files: Vec<PathBuf> = names
        .split('\0')
        .filter(|name| !name.is_empty())
        .map(|name| top().join(name))
        .filter(|path| path.is_file())
        .collect();
    assert!(files.len() > 50, "{files:?}");
    files
}

fn rust_files() -> Vec<(PathBuf, String)> {
    let sources =
        files().into_iter().filter(|path| path.extension().is_some_and(|extension| extension == "rs"));
    sources.map(|path| (path.clone(), fs::read_to_string(path).unwrap())).collect()
}

/// What cargo knows of our crates.
fn metadata() -> serde_json::Value {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--format-version", "1", "--no-deps", "--offline"])
        .current_dir(top())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn crates_know_only_whom_they_may() {
    let metadata = metadata();
    let allowed: BTreeMap<&str, &[&str]> = EDGES.into_iter().collect();
    let mut seen = BTreeSet::new();
    for package in metadata["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let allowed = allowed.get(name).unwrap_or_else(|| panic!("{name} is not in the list of crates"));
        seen.insert(name.to_owned());
        for dependency in package["dependencies"].as_array().unwrap() {
            let of = dependency["name"].as_str().unwrap();
            // What its tests use is a crate's own affair.
            if of.starts_with("gantry-") && dependency["kind"].is_null() {
                assert!(allowed.contains(&of), "{name} may not depend on {of}");
            }
        }
    }
    assert_eq!(seen.len(), EDGES.len());
}

/// The fuzz targets have a lock file of their own, and are built with `--locked` and seldom: it must know what our crates depend on.
#[test]
fn the_lock_file_of_the_fuzz_targets_is_up_to_date() {
    let text = fs::read_to_string(top().join("fuzz/Cargo.lock")).unwrap();
    let lock: BTreeMap<&str, BTreeSet<&str>> = text
        .split("[[package]]")
        .filter_map(|package| {
            let name = package.lines().find_map(|line| line.strip_prefix("name = "))?.trim_matches('"');
            let dependencies = package.lines().filter_map(|line| line.strip_prefix(" \""));
            // A version follows where there are several.
            Some((name, dependencies.filter_map(|line| line.split([' ', '"']).next()).collect()))
        })
        .collect();
    let mut seen = 0;
    for package in metadata()["packages"].as_array().unwrap() {
        let name = package["name"].as_str().unwrap();
        let Some(locked) = lock.get(name) else { continue };
        let dependencies = package["dependencies"].as_array().unwrap().iter();
        let wanted =
            dependencies.filter(|dependency| dependency["kind"] != "dev" && dependency["optional"] == false);
        let missing: Vec<&str> = wanted
            .map(|dependency| dependency["name"].as_str().unwrap())
            .filter(|of| !locked.contains(of))
            .collect();
        assert!(
            missing.is_empty(),
            "{name}: {missing:?}; run `cargo metadata --manifest-path fuzz/Cargo.toml`"
        );
        seen += 1;
    }
    assert!(seen >= 5, "{seen}");
}

#[test]
fn unsafe_code_stands_in_sys_alone() {
    let word = ["un", "safe"].concat();
    for (path, text) in rust_files() {
        let inside = path.strip_prefix(top()).unwrap().starts_with("sys");
        for (number, line) in text.lines().enumerate() {
            let code = line.split("//").next().unwrap();
            let words: Vec<&str> = code.split(|c: char| !c.is_alphanumeric() && c != '_').collect();
            assert!(inside || !words.contains(&word.as_str()), "{}:{}: {line}", path.display(), number + 1);
        }
    }
    let manifests = files().into_iter().filter(|path| path.ends_with("Cargo.toml"));
    // The fuzz targets are a workspace of their own.
    let manifests = manifests.filter(|path| *path != top().join("fuzz/Cargo.toml"));
    for manifest in
        manifests.filter(|path| *path != top().join("Cargo.toml") && *path != top().join("sys/Cargo.toml"))
    {
        let text = fs::read_to_string(&manifest).unwrap();
        assert!(
            text.contains("[lints]\nworkspace = true"),
            "{} does not take the workspace's lints",
            manifest.display()
        );
    }
}

#[test]
fn every_module_says_what_it_is() {
    for (path, text) in rust_files() {
        let first = text.lines().next().unwrap_or_default();
        assert!(first.starts_with("//!") && first.len() > 10, "{} begins with {first:?}", path.display());
        assert_ne!(path.file_name().unwrap(), "mod.rs", "{}: use NAME.rs and NAME/", path.display());
        for word in ["Placeholder", "Being written"] {
            assert!(!first.contains(word), "{} is a placeholder", path.display());
        }
    }
}

#[test]
fn the_tree_speaks_of_the_project_alone() {
    for path in files() {
        let Ok(text) = fs::read_to_string(&path) else { continue };
        for (number, line) in text.lines().enumerate() {
            // In two halves, so that this file passes.
            for words in [concat!("/wo", "rk/"), concat!("/root/", "."), concat!("/home/", "runner")] {
                assert!(
                    !line.contains(words),
                    "{}:{}: {words} is a path of one machine",
                    path.display(),
                    number + 1
                );
            }
        }
    }
}

/// docs/threats.md says which test holds what; each of them is there.
#[test]
fn every_test_that_the_list_of_threats_names_is_there() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let text = fs::read_to_string(root.join("docs/threats.md")).unwrap();
    let mut named = 0;
    for row in text.lines().filter(|line| line.starts_with("| ") && line.contains('`')) {
        let held = row.trim_end_matches(" |").rsplit(" | ").next().unwrap();
        for part in held.split("; ") {
            let file = part.split('`').nth(1).unwrap_or_else(|| panic!("no test holds: {row}"));
            if file.starts_with("fuzz/") {
                for target in part.split(", ").map(|target| target.trim_matches('`')) {
                    let program =
                        root.join(target.replacen("fuzz/", "fuzz/fuzz_targets/", 1)).with_extension("rs");
                    assert!(program.exists(), "{target} is no fuzz target");
                    named += 1;
                }
                continue;
            }
            let code = fs::read_to_string(root.join(file)).unwrap_or_else(|error| panic!("{file}: {error}"));
            let names = part.rsplit('`').next().unwrap().trim();
            for name in names.split(", ").filter(|name| !name.is_empty()) {
                let there =
                    [format!("fn {name}("), format!("    {name},")].iter().any(|text| code.contains(text));
                assert!(there, "{file} has no test {name}");
                named += 1;
            }
        }
    }
    assert!(named > 80, "only {named} tests are named");
}
