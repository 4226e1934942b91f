//! Network configurations: what a file says, and which files of the folder make a pod's networks.
//!
//! The folder is read anew at each use: it holds a handful of small files, and what is never kept is never stale. Files
//! ending in `.conflist` are lists of plugins; `.conf` and `.json` hold one plugin each. In the order of their names the
//! first ones that are valid count; a bad one is passed over, with its reason kept for who asks.
//!
//! Invariant: a `Network` has a name and plugins' types that are safe as parts of a path, at least one plugin, and
//! at least one version that is known here.

use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use super::version::Version;

/// No configuration of use is as large.
const FILE_MAX: u64 = 1024 * 1024;

/// A network as configured: plugins that are run one after the other.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Network {
    pub(super) name: String,
    /// What it may be run with, oldest first.
    pub(super) versions: Vec<Version>,
    pub(super) disable_check: bool,
    pub(super) disable_gc: bool,
    pub(super) plugins: Vec<Plugin>,
}

/// One plugin's part of a network.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct Plugin {
    /// The name of its program.
    pub(super) kind: String,
    /// All that the configuration has for it.
    pub(super) conf: Map<String, Value>,
    /// What it wants to be told of the pod.
    pub(super) capabilities: Vec<String>,
}

impl Plugin {
    fn parse(conf: Value) -> Result<Self, String> {
        let Value::Object(conf) = conf else {
            return Err("a plugin's configuration is not an object".into());
        };
        let kind = match conf.get("type") {
            Some(Value::String(kind)) if !kind.is_empty() => kind.clone(),
            Some(Value::String(_)) | None => {
                let hint =
                    if conf.contains_key("plugins") { "; a list is to be named *.conflist" } else { "" };
                return Err(format!("a plugin has no type{hint}"));
            }
            Some(_) => return Err("a plugin's type is not a string".into()),
        };
        if kind.contains(['/', '\\', '\0']) || kind == "." || kind == ".." {
            return Err(format!("{kind:?} is no plugin's type: it must be the name of a file"));
        }
        let mut capabilities = Vec::new();
        match conf.get("capabilities") {
            None | Some(Value::Null) => {}
            Some(Value::Object(map)) => {
                for (name, on) in map {
                    match on {
                        Value::Bool(true) => capabilities.push(name.clone()),
                        Value::Bool(false) => {}
                        _ => {
                            return Err(format!(
                                "capability {name:?} of plugin {kind} is neither true nor false"
                            ));
                        }
                    }
                }
            }
            Some(_) => return Err(format!("the capabilities of plugin {kind} are not an object")),
        }
        Ok(Plugin { kind, conf, capabilities })
    }
}

impl Network {
    /// A list of plugins. One whose plugins are all in a folder of its own has none yet; the second value says
    /// whether that folder counts.
    fn parse_open(bytes: &[u8]) -> Result<(Self, bool), String> {
        let mut list = object(bytes)?;
        let name = name_of(&list)?;
        let versions = versions_of(&list)?;
        let inlined_only = flag(&list, "loadOnlyInlinedPlugins")?;
        let plugins = match list.remove("plugins") {
            None if inlined_only => {
                return Err("loadOnlyInlinedPlugins is true and there are no plugins".into());
            }
            None => Vec::new(),
            Some(Value::Array(plugins)) if plugins.is_empty() => {
                return Err("the list of plugins is empty".into());
            }
            Some(Value::Array(plugins)) => {
                plugins.into_iter().map(Plugin::parse).collect::<Result<_, _>>()?
            }
            Some(_) => return Err("the plugins are not a list".into()),
        };
        let network = Network {
            name,
            versions,
            disable_check: flag(&list, "disableCheck")?,
            disable_gc: flag(&list, "disableGC")?,
            plugins,
        };
        Ok((network, !inlined_only))
    }

    /// A list of plugins that is all in these bytes: one that was kept when it was used.
    pub(super) fn parse_list(bytes: &[u8]) -> Result<Self, String> {
        match Self::parse_open(bytes)?.0 {
            network if network.plugins.is_empty() => Err("there are no plugins".into()),
            network => Ok(network),
        }
    }

    /// One plugin that is a network by itself.
    pub(super) fn parse_single(bytes: &[u8]) -> Result<Self, String> {
        let conf = object(bytes)?;
        let plugin = Plugin::parse(Value::Object(conf))?;
        Ok(Network {
            name: name_of(&plugin.conf)?,
            versions: versions_of(&plugin.conf)?,
            disable_check: false,
            disable_gc: false,
            plugins: vec![plugin],
        })
    }

    /// What is kept of it while it is used, at this version: the whole of it, whatever becomes of the files.
    pub(super) fn to_kept(&self, version: Version) -> Value {
        let plugins: Vec<Value> =
            self.plugins.iter().map(|plugin| Value::Object(plugin.conf.clone())).collect();
        serde_json::json!({
            "cniVersion": version.as_str(),
            "name": self.name,
            "disableCheck": self.disable_check,
            "disableGC": self.disable_gc,
            "loadOnlyInlinedPlugins": true,
            "plugins": plugins,
        })
    }
}

fn object(bytes: &[u8]) -> Result<Map<String, Value>, String> {
    match serde_json::from_slice(bytes) {
        Ok(Value::Object(map)) => Ok(map),
        Ok(_) => Err("it is not a JSON object".into()),
        Err(error) => Err(format!("it is not JSON: {error}")),
    }
}

fn name_of(conf: &Map<String, Value>) -> Result<String, String> {
    match conf.get("name") {
        Some(Value::String(name)) if is_identifier(name) => Ok(name.clone()),
        Some(Value::String(name)) => Err(format!(
            "{name:?} is no network's name: letters, digits, and after the first also any of _ . -"
        )),
        Some(_) => Err("its name is not a string".into()),
        None => Err("it has no name".into()),
    }
}

/// What a network's name and a container's id may be.
pub(super) fn is_identifier(text: &str) -> bool {
    text.bytes().next().is_some_and(|first| first.is_ascii_alphanumeric())
        && text.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"_.-".contains(&byte))
}

fn flag(conf: &Map<String, Value>, key: &str) -> Result<bool, String> {
    match conf.get(key) {
        None => Ok(false),
        Some(Value::Bool(on)) => Ok(*on),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("true") => Ok(true),
        Some(Value::String(text)) if text.eq_ignore_ascii_case("false") => Ok(false),
        Some(_) => Err(format!("{key} is neither true nor false")),
    }
}

/// The versions it offers that are known here. One newer than ours is passed over, as the next plugin release will
/// offer it beside the older ones; with no other left it is an error.
fn versions_of(conf: &Map<String, Value>) -> Result<Vec<Version>, String> {
    let mut offered: Vec<String> = Vec::new();
    match conf.get("cniVersion") {
        None => {}
        Some(Value::String(version)) => offered.push(version.clone()),
        Some(_) => return Err("cniVersion is not a string".into()),
    }
    match conf.get("cniVersions") {
        None => {}
        Some(Value::Array(versions)) => {
            for version in versions {
                let version = version.as_str().ok_or("cniVersions holds something that is not a string")?;
                offered.push(version.to_owned());
            }
        }
        Some(_) => return Err("cniVersions is not a list".into()),
    }
    if offered.is_empty() {
        return Ok(vec![Version::default()]);
    }
    if let Some(bad) = offered.iter().find(|version| !Version::is_plausible(version)) {
        return Err(format!("{bad:?} is no version of CNI"));
    }
    let mut known: Vec<Version> = offered.iter().filter_map(|version| Version::parse(version)).collect();
    known.sort_unstable();
    known.dedup();
    if known.is_empty() {
        return Err(format!(
            "it wants CNI {}, and what is known here is {}",
            offered.join(", "),
            Version::all()
        ));
    }
    Ok(known)
}

/// What a folder has.
#[derive(Debug, Clone, Default)]
pub(super) struct Folder {
    /// In the order of their files' names, no more than asked for.
    pub(super) networks: Vec<(PathBuf, Network)>,
    /// The files that were passed over, and why.
    pub(super) skipped: Vec<(PathBuf, String)>,
}

/// Reads the folder, up to `most` networks (0: all of them). A folder that is not there has nothing. Blocks.
pub(super) fn read(folder: &Path, most: usize) -> Folder {
    let mut found = Folder::default();
    let files = match files(folder, &["conf", "conflist", "json"]) {
        Ok(files) => files,
        Err(error) => {
            found.skipped.push((folder.to_owned(), format!("the folder cannot be read: {error}")));
            return found;
        }
    };
    for file in files {
        if most > 0 && found.networks.len() == most {
            break;
        }
        match load(&file) {
            Ok(network) if found.networks.iter().any(|(_, other)| other.name == network.name) => {
                let reason = format!("a file before it has a network named {:?}, too", network.name);
                found.skipped.push((file, reason));
            }
            Ok(network) => found.networks.push((file, network)),
            Err(reason) => found.skipped.push((file, reason)),
        }
    }
    found
}

fn load(file: &Path) -> Result<Network, String> {
    let bytes = bytes_of(file)?;
    if !file.as_os_str().as_encoded_bytes().ends_with(b".conflist") {
        return Network::parse_single(&bytes);
    }
    let (mut network, with_folder) = Network::parse_open(&bytes)?;
    if with_folder {
        let folder = file.with_file_name(&network.name);
        let more = files(&folder, &["conf"])
            .map_err(|error| format!("cannot read {}: {error}", folder.display()))?;
        for file in more {
            let plugin = bytes_of(&file).and_then(|bytes| Plugin::parse(Value::Object(object(&bytes)?)));
            network.plugins.push(plugin.map_err(|reason| format!("{}: {reason}", file.display()))?);
        }
    }
    if network.plugins.is_empty() {
        return Err("there are no plugins".into());
    }
    Ok(network)
}

fn bytes_of(file: &Path) -> Result<Vec<u8>, String> {
    let read = || -> io::Result<Vec<u8>> {
        // A fifo in the folder is not to hold us up.
        if !fs::metadata(file)?.is_file() {
            return Err(io::Error::other("not a regular file"));
        }
        let mut bytes = Vec::new();
        fs::File::open(file)?.take(FILE_MAX + 1).read_to_end(&mut bytes)?;
        Ok(bytes)
    };
    match read() {
        Ok(bytes) if bytes.len() as u64 > FILE_MAX => Err(format!("it is larger than {FILE_MAX} bytes")),
        Ok(bytes) => Ok(bytes),
        Err(error) => Err(format!("it cannot be read: {error}")),
    }
}

/// The files with one of these endings, in the order of their names.
fn files(folder: &Path, endings: &[&str]) -> io::Result<Vec<PathBuf>> {
    let entries = match fs::read_dir(folder) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            return Ok(Vec::new());
        }
        entries => entries?,
    };
    let mut files = Vec::new();
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let ending = name.as_encoded_bytes().rsplit(|byte| *byte == b'.').next().unwrap_or_default();
        if endings.iter().any(|wanted| wanted.as_bytes() == ending) && !entry.path().is_dir() {
            files.push(entry.path());
        }
    }
    files.sort_unstable_by(|a, b| a.as_os_str().cmp(b.as_os_str()));
    Ok(files)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_first_good_files_count_and_the_bad_ones_keep_their_reasons() {
        let dir = tempfile::tempdir().unwrap();
        let put = |name: &str, text: &str| fs::write(dir.path().join(name), text).unwrap();
        put("10-bad.conf", "{");
        put("11-list.conf", r#"{"name":"a","plugins":[{"type":"x"}]}"#);
        put("12-nothing.conflist", r#"{"name":"b"}"#);
        put("13-escape.conf", r#"{"name":"c","type":"../x"}"#);
        put("14-walk.conflist", r#"{"name":"../c","plugins":[{"type":"x"}]}"#);
        put("15-newer.conflist", r#"{"cniVersion":"2.0.0","name":"d","plugins":[{"type":"x"}]}"#);
        put("20-first.json", r#"{"cniVersion":"0.3.1","name":"first","type":"bridge"}"#);
        put(
            "30-second.conflist",
            r#"{"cniVersion":"0.4.0","cniVersions":["1.2.0","1.1.0","1.0.0"],"name":"second",
            "disableCheck":"TRUE","disableGC":true,"plugins":[{"type":"ptp"}]}"#,
        );
        put("31-second.conflist", r#"{"name":"second","plugins":[{"type":"other"}]}"#);
        put(
            "40-third.conflist",
            r#"{"name":"third","plugins":[{"type":"ptp","capabilities":{"a":true,"b":false}}]}"#,
        );
        put("README", "{");
        put("50.conf.bak", "{");
        fs::create_dir(dir.path().join("51.conf")).unwrap();
        fs::create_dir(dir.path().join("third")).unwrap();
        put("third/20.conf", r#"{"type":"late"}"#);
        put("third/10.conf", r#"{"type":"early"}"#);
        put("third/10.json", r#"{"type":"never"}"#);

        let one = read(dir.path(), 1);
        assert_eq!(one.networks.len(), 1);
        assert_eq!(
            (one.networks[0].1.name.as_str(), &one.networks[0].1.versions[..]),
            ("first", &[Version::V0_3_1][..])
        );
        assert_eq!(one.skipped.len(), 6, "{:?}", one.skipped);
        assert!(one.skipped[1].1.contains("conflist"), "{:?}", one.skipped);

        let all = read(dir.path(), 0);
        let names: Vec<&str> = all.networks.iter().map(|(_, network)| network.name.as_str()).collect();
        assert_eq!(names, ["first", "second", "third"]);
        let second = &all.networks[1].1;
        assert!(second.disable_check && second.disable_gc);
        assert_eq!(second.versions, [Version::V0_4_0, Version::V1_0_0, Version::V1_1_0]);
        let third = &all.networks[2].1;
        let kinds: Vec<&str> = third.plugins.iter().map(|plugin| plugin.kind.as_str()).collect();
        assert_eq!(kinds, ["ptp", "early", "late"]);
        assert_eq!(third.plugins[0].capabilities, ["a"]);
        assert_eq!(third.versions, [Version::V0_1_0]);

        // What is kept of it has the folder's plugins in it, and no folder is read again.
        let kept = serde_json::to_vec(&third.to_kept(Version::V0_1_0)).unwrap();
        assert_eq!(Network::parse_list(&kept).unwrap(), *third);
        assert!(read(&dir.path().join("none"), 1).networks.is_empty());
    }

    #[test]
    fn only_inlined_plugins_means_no_folder() {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir(dir.path().join("net")).unwrap();
        fs::write(dir.path().join("net/10.conf"), r#"{"type":"more"}"#).unwrap();
        let list = r#"{"name":"net","loadOnlyInlinedPlugins":true,"plugins":[{"type":"x"}]}"#;
        fs::write(dir.path().join("a.conflist"), list).unwrap();
        assert_eq!(read(dir.path(), 1).networks[0].1.plugins.len(), 1);
        // All of its plugins may be in the folder.
        fs::write(dir.path().join("a.conflist"), r#"{"name":"net"}"#).unwrap();
        assert_eq!(read(dir.path(), 1).networks[0].1.plugins[0].kind, "more");
        fs::write(dir.path().join("a.conflist"), r#"{"name":"net","loadOnlyInlinedPlugins":true}"#).unwrap();
        assert_eq!(read(dir.path(), 1).skipped.len(), 1);
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_network_or_an_error(bytes: Vec<u8>, text in r#"[{}\[\]":,a-z0-9.]{0,60}"#) {
            let _ = Network::parse_list(&bytes);
            let _ = Network::parse_single(text.as_bytes());
            let list = format!(r#"{{"name":"n","plugins":[{text}]}}"#);
            if let Ok(network) = Network::parse_list(list.as_bytes()) {
                proptest::prop_assert!(!network.plugins.is_empty());
            }
        }
    }
}
