//! What the engine says of itself: its parts under the names containerd's clients look for, and its identity.
//!
//! Clients pick snapshotters, differs and runtimes from the list of plugins, and learn the root folder from a
//! plugin's exports; a part that is left out on purpose says "skip plugin" in its init_err.

use std::os::unix::fs::MetadataExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proto::containerd::services::introspection::v1::{Plugin, ServerResponse};

use crate::error::{Error, Result};
use crate::filters::Filter;

/// Answers about the engine.
#[derive(Clone)]
pub struct Introspection {
    uuid: String,
    plugins: Arc<[Plugin]>,
}

impl Introspection {
    /// Reads, or makes, the engine's identity in `root`, and keeps the list of its parts.
    pub fn open(root: &Path, plugins: Vec<Plugin>) -> Result<Self> {
        Ok(Introspection { uuid: identity(&root.join("uuid"))?, plugins: plugins.into() })
    }

    /// The parts that pass the filters (`type`, `id`).
    pub fn plugins(&self, filters: &[String]) -> Result<Vec<Plugin>> {
        let filter = Filter::parse_all(filters)?;
        let passes = |plugin: &&Plugin| {
            filter.matches(|path| match path {
                ["type"] => Some(plugin.r#type.as_str().into()),
                ["id"] => Some(plugin.id.as_str().into()),
                _ => None,
            })
        };
        Ok(self.plugins.iter().filter(passes).cloned().collect())
    }

    /// One part; NotFound when there is none, Unimplemented when options ask for more than its entry in the list.
    pub fn plugin(&self, kind: &str, id: &str, options: bool) -> Result<Plugin> {
        let plugin = self.plugins.iter().find(|plugin| plugin.r#type == kind && plugin.id == id);
        let plugin = plugin.ok_or_else(|| Error::not_found(format!("plugin {kind}.{id} does not exist")))?;
        if options {
            return Err(Error::unimplemented(format!(
                "plugin {kind}.{id} has no information beyond its entry"
            )));
        }
        Ok(plugin.clone())
    }

    /// The engine's identity.
    pub fn server(&self) -> Result<ServerResponse> {
        let pid_namespace = "/proc/self/ns/pid";
        let metadata =
            std::fs::metadata(pid_namespace).map_err(|error| Error::io("look at", pid_namespace, &error))?;
        Ok(ServerResponse {
            uuid: self.uuid.clone(),
            pid: u64::from(std::process::id()),
            pidns: metadata.ino(),
            deprecations: Vec::new(),
        })
    }
}

/// An entry of the list of parts.
pub fn plugin(kind: &str, id: &str, exports: &[(&str, PathBuf)], capabilities: &[&str]) -> Plugin {
    Plugin {
        r#type: kind.to_owned(),
        id: id.to_owned(),
        platforms: match kind {
            "io.containerd.snapshotter.v1" | "io.containerd.differ.v1" | "io.containerd.runtime.v2" => {
                let host = oci::platform::Platform::host();
                vec![proto::containerd::types::Platform {
                    os: host.os,
                    architecture: host.architecture,
                    variant: host.variant,
                    ..Default::default()
                }]
            }
            _ => Vec::new(),
        },
        exports: exports
            .iter()
            .map(|(name, path)| ((*name).to_owned(), path.display().to_string()))
            .collect(),
        capabilities: capabilities.iter().map(|name| (*name).to_owned()).collect(),
        ..Default::default()
    }
}

/// A part that containerd has and this engine does not offer, with the reason.
pub fn skipped(kind: &str, id: &str, why: &str) -> Plugin {
    let mut plugin = plugin(kind, id, &[], &[]);
    plugin.init_err = Some(proto::google::rpc::Status {
        code: tonic::Code::Unknown as i32,
        message: format!("{why}: skip plugin"),
        details: Vec::new(),
    });
    plugin
}

fn identity(path: &Path) -> Result<String> {
    match std::fs::read_to_string(path) {
        Ok(text) if is_uuid(text.trim()) => return Ok(text.trim().to_owned()),
        Ok(_) => tracing::warn!(file = %path.display(), "not a UUID; a new one is written"),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(Error::io("read", path, &error)),
    }
    // The kernel makes a random (version 4) UUID at each read.
    let source = "/proc/sys/kernel/random/uuid";
    let uuid = std::fs::read_to_string(source).map_err(|error| Error::io("read", source, &error))?;
    let uuid = uuid.trim().to_owned();
    sys::fs::write_atomic(path, uuid.as_bytes(), 0o644).map_err(|error| Error::io("write", path, &error))?;
    Ok(uuid)
}

fn is_uuid(text: &str) -> bool {
    text.len() == 36
        && text.bytes().enumerate().all(|(at, byte)| match at {
            8 | 13 | 18 | 23 => byte == b'-',
            _ => byte.is_ascii_hexdigit(),
        })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_identity_stays() {
        let root = tempfile::tempdir().unwrap();
        let first = Introspection::open(root.path(), Vec::new()).unwrap().server().unwrap();
        let second = Introspection::open(root.path(), Vec::new()).unwrap().server().unwrap();
        assert!(is_uuid(&first.uuid));
        assert_eq!(first.uuid, second.uuid);
        std::fs::write(root.path().join("uuid"), "nonsense").unwrap();
        assert!(is_uuid(&Introspection::open(root.path(), Vec::new()).unwrap().server().unwrap().uuid));
    }

    #[test]
    fn filters_and_lookups() {
        let plugins = vec![plugin("a.v1", "x", &[], &[]), skipped("a.v1", "y", "no kernel support")];
        let root = tempfile::tempdir().unwrap();
        let introspection = Introspection::open(root.path(), plugins).unwrap();
        assert_eq!(introspection.plugins(&["type==a.v1,id==x".into()]).unwrap().len(), 1);
        assert_eq!(introspection.plugins(&[]).unwrap().len(), 2);
        assert!(
            introspection
                .plugin("a.v1", "y", false)
                .unwrap()
                .init_err
                .unwrap()
                .message
                .contains("skip plugin")
        );
        assert!(matches!(introspection.plugin("a.v1", "z", false), Err(Error::NotFound(_))));
        assert!(matches!(introspection.plugin("a.v1", "x", true), Err(Error::Unimplemented(_))));
    }
}
