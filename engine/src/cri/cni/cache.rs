//! What was attached, on disk: one file each, in the form that libcni writes, so that other tools see it and a later
//! DEL is told what ADD was told, whatever has become of the configuration.
//!
//! A file is there before the first plugin runs: without a result, and not synced, as it is for the engine's own death.
//! It is written again with the result, durably, before the attachment counts. It goes when DEL has held. So whatever is
//! attached, or half attached, has a file.
//!
//! The files are `FOLDER/results/NETWORK-CONTAINER-INTERFACE`. Ours have an `owner`, which others do not read: what another
//! runtime, or another engine, attached is not ours to clear away unasked.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

/// The mark of this form.
const KIND: &str = "cniCacheV1";

/// An attachment as it is kept.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub(super) struct Record {
    kind: String,
    pub(super) container_id: String,
    /// The network's configuration, in base64 as Go has bytes.
    config: String,
    pub(super) if_name: String,
    pub(super) network_name: String,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) netns: String,
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "Vec::is_empty")]
    pub(super) cni_args: Vec<(String, String)>,
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "Map::is_empty")]
    pub(super) capability_args: Map<String, Value>,
    /// None: ADD has not come to its end.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) result: Option<Map<String, Value>>,
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub(super) owner: String,
    /// Ours, where there is no result: how many plugins had been run, when that is known.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) begun: Option<usize>,
}

fn or_none<'de, D: serde::Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl Record {
    /// One without a result, and nobody's yet.
    pub(super) fn new(
        container_id: String,
        network_name: String,
        if_name: String,
        netns: String,
        config: &Value,
        cni_args: Vec<(String, String)>,
        capability_args: Map<String, Value>,
    ) -> Self {
        Record {
            kind: KIND.into(),
            container_id,
            config: STANDARD.encode(config.to_string()),
            if_name,
            network_name,
            netns,
            cni_args,
            capability_args,
            result: None,
            owner: String::new(),
            begun: None,
        }
    }

    /// The configuration that ADD had.
    pub(super) fn config(&self) -> Result<Vec<u8>, String> {
        STANDARD
            .decode(&self.config)
            .map_err(|error| format!("the configuration in it is not base64: {error}"))
    }

    /// The same as this engine's.
    pub(super) fn owned_by(self, owner: &str) -> Self {
        Record { owner: owner.to_owned(), ..self }
    }
}

/// What a file of a container holds.
#[derive(Debug)]
pub(super) enum Found {
    Record(Record),
    /// Not readable as a record: what its name says, and why.
    Unreadable {
        network: String,
        interface: String,
        file: PathBuf,
        reason: String,
    },
}

/// The folder of the records.
#[derive(Debug, Clone)]
pub(super) struct Cache {
    folder: PathBuf,
}

impl Cache {
    pub(super) fn new(folder: &Path) -> Self {
        Cache { folder: folder.join("results") }
    }

    fn file(&self, network: &str, container: &str, interface: &str) -> PathBuf {
        self.folder.join(format!("{network}-{container}-{interface}"))
    }

    /// Writes a record: so that it is there after a power cut, or only for whoever comes after us. Blocks.
    pub(super) fn put(&self, record: &Record, durable: bool) -> io::Result<()> {
        let file = self.file(&record.network_name, &record.container_id, &record.if_name);
        let bytes = serde_json::to_vec(record)?;
        if !self.folder.is_dir() {
            sys::fs::create_dir_all(&self.folder, 0o700)?;
            // Its own name is to survive a power cut, too, and that of the folder it is in.
            for parent in self.folder.ancestors().skip(1).take(2) {
                sys::fs::sync_dir(parent)?;
            }
        }
        if durable {
            return sys::fs::write_atomic(&file, &bytes, 0o600);
        }
        let temporary = self
            .folder
            .join(format!(".{}-{}-{}.new", record.network_name, record.container_id, record.if_name));
        let written = write_private(&temporary, &bytes).and_then(|()| fs::rename(&temporary, &file));
        if written.is_err() {
            let _ = fs::remove_file(&temporary);
        }
        written
    }

    /// Removes a record; one that is not there is no error. Blocks.
    pub(super) fn remove(&self, network: &str, container: &str, interface: &str) -> io::Result<()> {
        match fs::remove_file(self.file(network, container, interface)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// What there is of a container, in the order of the interfaces' names. Blocks.
    pub(super) fn of(&self, container: &str) -> io::Result<Vec<Found>> {
        let part = format!("-{container}-");
        let mut found = Vec::new();
        for name in self.names()? {
            let Some(at) = name.find(&part) else { continue };
            let file = self.folder.join(&name);
            let read = match fs::read(&file) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                read => read.map_err(|error| error.to_string()).and_then(|bytes| parse(&bytes)),
            };
            match read {
                // A name may look like another container's: `a-b` and `b`.
                Ok(record) if record.container_id != container => {}
                Ok(record) => found.push((record.if_name.clone(), Found::Record(record))),
                Err(reason) => {
                    let (network, interface) = (name[..at].to_owned(), name[at + part.len()..].to_owned());
                    found.push((interface.clone(), Found::Unreadable { network, interface, file, reason }));
                }
            }
        }
        found.sort_by(|(a, _), (b, _)| (a.len(), a).cmp(&(b.len(), b)));
        Ok(found.into_iter().map(|(_, found)| found).collect())
    }

    /// Every record, and the names of the files that cannot be read as one. Blocks.
    pub(super) fn all(&self) -> io::Result<(Vec<Record>, Vec<String>)> {
        let (mut records, mut unreadable) = (Vec::new(), Vec::new());
        for name in self.names()? {
            match fs::read(self.folder.join(&name)) {
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                read => match read.map_err(drop).and_then(|bytes| parse(&bytes).map_err(drop)) {
                    Ok(record) => records.push(record),
                    Err(()) => unreadable.push(name),
                },
            }
        }
        Ok((records, unreadable))
    }

    fn names(&self) -> io::Result<Vec<String>> {
        let entries = match fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries?,
        };
        let mut names = Vec::new();
        for entry in entries {
            // Ours that were not finished begin with a dot.
            if let Ok(name) = entry?.file_name().into_string()
                && !name.starts_with('.')
            {
                names.push(name);
            }
        }
        names.sort_unstable();
        Ok(names)
    }
}

fn write_private(file: &Path, bytes: &[u8]) -> io::Result<()> {
    use std::io::Write as _;
    use std::os::unix::fs::OpenOptionsExt as _;
    fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(file)?.write_all(bytes)
}

pub(super) fn parse(bytes: &[u8]) -> Result<Record, String> {
    let record: Record = serde_json::from_slice(bytes).map_err(|error| error.to_string())?;
    if record.kind != KIND {
        return Err(format!("it is of kind {:?}, not {KIND}", record.kind));
    }
    // Its own name is made of these, and it may be removed by it.
    if !super::conf::is_identifier(&record.network_name)
        || !super::conf::is_identifier(&record.container_id)
        || !super::is_interface(&record.if_name)
    {
        return Err("it has a network, container or interface by a name that none can have".into());
    }
    Ok(record)
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use serde_json::json;

    use super::*;

    fn record(container: &str, interface: &str) -> Record {
        let Value::Object(capabilities) = json!({"mac": "x"}) else { unreachable!() };
        let arguments = vec![("K8S_POD_NAME".to_owned(), "p".to_owned())];
        let config = json!({"name": "net"});
        Record::new(
            container.into(),
            "net".into(),
            interface.into(),
            "/n".into(),
            &config,
            arguments,
            capabilities,
        )
        .owned_by("gantry")
    }

    #[test]
    fn a_record_has_libcnis_name_and_form() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path());
        let mut one = record("abc", "eth0");
        cache.put(&one, false).unwrap();
        let file = dir.path().join("results/net-abc-eth0");
        let read = || serde_json::from_slice::<Value>(&fs::read(&file).unwrap()).unwrap();
        assert_eq!(read().get("result"), None);
        one.result = json!({"cniVersion": "1.0.0"}).as_object().cloned();
        cache.put(&one, true).unwrap();
        assert_eq!(
            read(),
            json!({"kind": "cniCacheV1", "containerId": "abc", "config": "eyJuYW1lIjoibmV0In0=", "ifName": "eth0",
                "networkName": "net", "netns": "/n", "cniArgs": [["K8S_POD_NAME", "p"]],
                "capabilityArgs": {"mac": "x"}, "result": {"cniVersion": "1.0.0"}, "owner": "gantry"})
        );
        assert_eq!(fs::read_dir(dir.path().join("results")).unwrap().count(), 1);
        cache.remove("net", "abc", "eth0").unwrap();
        cache.remove("net", "abc", "eth0").unwrap();
        assert!(cache.of("abc").unwrap().is_empty());
    }

    #[test]
    fn a_container_has_its_own_records_and_no_others() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path());
        assert!(cache.of("b").unwrap().is_empty() && cache.all().unwrap().0.is_empty());
        for (container, interface) in [("b", "eth10"), ("b", "eth2"), ("a-b", "eth0"), ("bb", "eth0")] {
            cache.put(&record(container, interface), false).unwrap();
        }
        // By libcni: without an owner, and with Go's null.
        let foreign = r#"{"kind":"cniCacheV1","containerId":"b","config":"e30=","ifName":"lo","networkName":"other",
            "cniArgs":null,"capabilityArgs":null,"result":{"ips":[]}}"#;
        fs::write(dir.path().join("results/other-b-lo"), foreign).unwrap();
        fs::write(dir.path().join("results/torn-b-eth3"), "{\"kind\":").unwrap();
        fs::write(dir.path().join("results/.net-b-eth0.new"), "{").unwrap();
        let hostile = foreign.replace("\"lo\"", "\"../../x\"");
        fs::write(dir.path().join("results/hostile-b-x"), hostile).unwrap();
        let found = cache.of("b").unwrap();
        let names: Vec<String> = found
            .iter()
            .map(|found| match found {
                Found::Record(record) => format!("{} {}", record.if_name, record.owner == "gantry"),
                Found::Unreadable { network, interface, .. } => format!("{network} {interface}"),
            })
            .collect();
        assert_eq!(names, ["hostile x", "lo false", "eth2 true", "torn eth3", "eth10 true"]);
        let (records, unreadable) = cache.all().unwrap();
        assert_eq!((records.len(), unreadable.len()), (5, 2));
    }

    proptest::proptest! {
        #[test]
        fn any_bytes_are_a_record_or_an_error(bytes: Vec<u8>) {
            let _ = parse(&bytes);
        }
    }
}
