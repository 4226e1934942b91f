//! The files of a bundle: what the shim reads of config.json, a few fields of thousands, and how it writes its own.

use std::collections::BTreeMap;
use std::fs::{self, File, OpenOptions};
use std::io::{BufReader, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde::Deserialize;
use shim_api::{Error, Result};

/// A larger config.json is refused, in bytes.
const CONFIG_LIMIT: u64 = 16 << 20;

/// Which containers share a shim: those with the same value of the first of these annotations they have.
const GROUP_ANNOTATIONS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];

/// The part of an OCI runtime spec that matters to the shim.
#[derive(Debug, Default, Deserialize)]
#[serde(default)]
pub(crate) struct Config {
    annotations: BTreeMap<String, String>,
    hostname: String,
    domainname: String,
    linux: Option<Linux>,
    hooks: Option<Hooks>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Hooks {
    poststart: Option<Vec<serde::de::IgnoredAny>>,
    poststop: Option<Vec<serde::de::IgnoredAny>>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Linux {
    namespaces: Vec<Namespace>,
    sysctl: BTreeMap<String, String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(default)]
struct Namespace {
    r#type: String,
    path: String,
}

impl Config {
    pub(crate) fn read(bundle: &Path) -> Result<Self> {
        let path = bundle.join("config.json");
        let file = File::open(&path)
            .map_err(|error| Error::not_found(format!("open {}: {error}", path.display())))?;
        serde_json::from_reader(BufReader::new(file.take(CONFIG_LIMIT)))
            .map_err(|error| Error::invalid_argument(format!("{} is no OCI config: {error}", path.display())))
    }

    /// The same; without the file, nothing is set: a sandbox need not have one.
    pub(crate) fn read_if_there(bundle: &Path) -> Result<Self> {
        if bundle.join("config.json").exists() { Self::read(bundle) } else { Ok(Self::default()) }
    }

    pub(crate) fn hostname(&self) -> &str {
        &self.hostname
    }

    pub(crate) fn domainname(&self) -> &str {
        &self.domainname
    }

    /// By key, the values.
    pub(crate) fn sysctls(&self) -> impl Iterator<Item = (&str, &str)> {
        let linux = self.linux.iter();
        linux.flat_map(|linux| &linux.sysctl).map(|(key, value)| (key.as_str(), value.as_str()))
    }

    /// By OCI's name of the kind, the paths; empty for a new one.
    pub(crate) fn namespaces(&self) -> impl Iterator<Item = (&str, &str)> {
        let linux = self.linux.iter().flat_map(|linux| &linux.namespaces);
        linux.map(|namespace| (namespace.r#type.as_str(), namespace.path.as_str()))
    }

    /// What containers of one shim have in common; without an annotation, the id alone.
    pub(crate) fn group<'a>(&'a self, id: &'a str) -> &'a str {
        GROUP_ANNOTATIONS.iter().find_map(|name| self.annotations.get(*name)).map_or(id, String::as_str)
    }

    /// Whether the runtime runs programs after the start.
    pub(crate) fn has_poststart_hooks(&self) -> bool {
        let hooks = self.hooks.as_ref().and_then(|hooks| hooks.poststart.as_ref());
        hooks.is_some_and(|hooks| !hooks.is_empty())
    }

    /// Whether the runtime runs programs when the container is deleted.
    pub(crate) fn has_poststop_hooks(&self) -> bool {
        let hooks = self.hooks.as_ref().and_then(|hooks| hooks.poststop.as_ref());
        hooks.is_some_and(|hooks| !hooks.is_empty())
    }

    /// Whether the kernel kills everything in the container when its init exits.
    pub(crate) fn has_own_pid_namespace(&self) -> bool {
        let own = |namespace: &Namespace| namespace.r#type == "pid" && namespace.path.is_empty();
        self.linux.as_ref().is_some_and(|linux| linux.namespaces.iter().any(own))
    }
}

/// Writes a small file of a bundle: whole or not at all. It is not synced: a bundle does not survive a reboot.
pub(crate) fn write(bundle: &Path, name: &str, content: &[u8]) -> Result<()> {
    let path = bundle.join(name);
    let new = bundle.join(format!(".{name}.{}", std::process::id()));
    let mut options = OpenOptions::new();
    options.write(true).create(true).truncate(true).mode(0o600);
    options
        .open(&new)
        .and_then(|mut file| file.write_all(content))
        .and_then(|()| fs::rename(&new, &path))
        .map_err(|error| Error::internal(format!("write {}: {error}", path.display())))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config(json: &str) -> Config {
        serde_json::from_str(json).unwrap()
    }

    #[test]
    fn the_runc_group_goes_before_the_sandbox() {
        let both =
            r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod","io.containerd.runc.v2.group":"g"}}"#;
        assert_eq!(config(both).group("id"), "g");
        assert_eq!(config(r#"{"annotations":{"io.kubernetes.cri.sandbox-id":"pod"}}"#).group("id"), "pod");
        assert_eq!(config(r#"{"ociVersion":"1.0.2"}"#).group("id"), "id");
    }

    #[test]
    fn hooks_are_noticed() {
        let one = config(r#"{"hooks":{"prestart":[],"poststop":[{"path":"/bin/x"}]}}"#);
        assert!(one.has_poststop_hooks() && !one.has_poststart_hooks());
        let other = config(r#"{"hooks":{"poststart":[{"path":"/bin/x"}],"poststop":[]}}"#);
        assert!(other.has_poststart_hooks() && !other.has_poststop_hooks());
        for none in [
            r#"{"hooks":{"prestart":[{"path":"/bin/x"}]}}"#,
            r#"{"hooks":{"poststop":null}}"#,
            r#"{"hooks":null}"#,
            "{}",
        ] {
            let none = config(none);
            assert!(!none.has_poststop_hooks() && !none.has_poststart_hooks(), "{none:?}");
        }
    }

    #[test]
    fn a_pid_namespace_of_its_own_has_no_path() {
        assert!(
            config(r#"{"linux":{"namespaces":[{"type":"mount"},{"type":"pid"}]}}"#).has_own_pid_namespace()
        );
        assert!(
            !config(r#"{"linux":{"namespaces":[{"type":"pid","path":"/proc/1/ns/pid"}]}}"#)
                .has_own_pid_namespace()
        );
        assert!(!config("{}").has_own_pid_namespace());
    }
}
