//! The database while no engine runs: every record as it is on disk, for whoever checks them.
//!
//! Invariants: it is never made, nor brought to another version. What is taken out of it is in a file before.

use std::fs::File;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use prost::Message as _;
use proto::containerd::services::containers::v1::Container;
use proto::containerd::services::images::v1::Image;
use proto::containerd::services::leases::v1::Lease;
use proto::containerd::types::Sandbox;

use super::content::{BlobRecord, IngestRecord};
use super::cri::{PodContainerRecord, PodRecord};
use super::db::{Disk, OpenError, SCHEMA_KEY, schema_version};
use super::events::JournalRecord;
use super::leases::LeaseResource;
use super::mounts::MountRecord;
use super::namespaces::NamespaceRecord;
use super::sequences::SequenceRecord;
use super::snapshots::{CommitRecord, SnapshotChild, SnapshotRecord};
use super::{Map, Record, SCHEMA_VERSION, Transaction, View, split_key};
use crate::error::{Error, Result};

/// The file that records are moved to which cannot be read, beside the database: lines as `gantryd metadata export` has them.
const ASIDE: &str = "aside.jsonl";

/// The database, held against engines for as long as this lives.
pub struct Offline {
    dir: PathBuf,
    disk: Disk,
    map: Map,
}

/// A record that cannot be read.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Broken {
    /// Its key.
    pub key: Vec<u8>,
    /// The same for people.
    pub name: String,
    /// What is wrong.
    pub why: String,
}

impl Offline {
    /// Opens the database in `dir`; None when there is none.
    pub fn open(dir: &Path) -> std::result::Result<Option<Self>, OpenError> {
        if !dir.join("sled").exists() {
            return Ok(None);
        }
        let disk = Disk::open(dir)?;
        let map = disk.load()?;
        let found = map.get(SCHEMA_KEY).and_then(|value| schema_version(value)).unwrap_or(SCHEMA_VERSION);
        if found > SCHEMA_VERSION {
            return Err(OpenError::TooNew { path: dir.to_owned(), found });
        }
        Ok(Some(Offline { dir: dir.to_owned(), disk, map }))
    }

    /// All records.
    pub fn view(&self) -> View {
        View(self.map.clone())
    }

    /// Those that cannot be read.
    pub fn broken(&self) -> Vec<Broken> {
        let records = self.map.iter().filter(|(key, _)| &key[..] != SCHEMA_KEY);
        let broken = records.filter_map(|(key, value)| {
            let why = check(key, value).err()?;
            let parts = split_key(key);
            Some(Broken { key: key.to_vec(), name: parts.join("/"), why })
        });
        broken.collect()
    }

    /// Changes records, durably. Blocks.
    pub fn change(&mut self, change: impl FnOnce(&mut Transaction) -> Result<()>) -> Result<()> {
        let mut transaction = Transaction::new(self.map.clone(), self.map.clone());
        change(&mut transaction)?;
        let mut batch = sled::Batch::default();
        for (key, value) in &transaction.writes {
            match value {
                Some(value) => batch.insert(&key[..], &value[..]),
                None => batch.remove(&key[..]),
            }
        }
        self.disk.apply(batch).map_err(|error| Error::io("write the metadata in", &self.dir, &error))?;
        self.map = transaction.map;
        Ok(())
    }

    /// Moves a record to a file, which is told. Blocks.
    pub fn set_aside(&mut self, key: &[u8]) -> Result<PathBuf> {
        let path = self.dir.join(ASIDE);
        let Some(value) = self.map.get(key).cloned() else { return Ok(path) };
        let failed = |error: std::io::Error| Error::io("write", &path, &error);
        let line = serde_json::json!({"key": split_key(key), "value": STANDARD.encode(&value)});
        let mut file = File::options().append(true).create(true).open(&path).map_err(failed)?;
        file.write_all(format!("{line}\n").as_bytes())
            .and_then(|()| file.sync_all())
            .and_then(|()| sys::fs::sync_dir(&self.dir))
            .map_err(failed)?;
        let key: Arc<[u8]> = key.into();
        self.change(|txn| {
            txn.map.remove(&key);
            txn.writes.push((key, None));
            Ok(())
        })?;
        Ok(path)
    }
}

/// Whether a record is of a kind that is known, and can be read as such.
fn check(key: &[u8], value: &[u8]) -> std::result::Result<(), String> {
    let table = key.split(|byte| *byte == 0).next().unwrap_or_default();
    if std::str::from_utf8(key).is_err() {
        return Err("its key is not text".into());
    }
    macro_rules! tables {
        ($($record:ty),+ $(,)?) => {
            match table {
                $(table if table == <$record as Record>::TABLE.as_bytes() => <$record>::decode(value).map(drop),)+
                _ => return Err("it is of no kind that this gantryd knows".into()),
            }
        };
    }
    let decoded = tables!(
        BlobRecord,
        CommitRecord,
        Container,
        Image,
        IngestRecord,
        JournalRecord,
        Lease,
        LeaseResource,
        MountRecord,
        NamespaceRecord,
        PodContainerRecord,
        PodRecord,
        Sandbox,
        SequenceRecord,
        SnapshotChild,
        SnapshotRecord,
    );
    decoded.map_err(|error| format!("it cannot be decoded: {error}"))
}

#[cfg(test)]
mod tests {
    use super::super::{Metadata, Read as _};
    use super::*;

    #[test]
    fn what_cannot_be_read_is_found_and_moved_to_a_file() {
        let folder = tempfile::tempdir().unwrap();
        assert!(Offline::open(folder.path()).unwrap().is_none());
        assert_eq!(std::fs::read_dir(folder.path()).unwrap().count(), 0, "it is not made");
        let metadata = Metadata::open(folder.path()).unwrap();
        metadata.commit_blocking(|txn| txn.put(&["ns"], &NamespaceRecord::default())).unwrap();
        drop(metadata);
        let mut offline = Offline::open(folder.path()).unwrap().unwrap();
        assert_eq!(offline.broken(), []);
        for (key, value) in [("images\0ns\0bad", &b"\xff\xff"[..]), ("nosuch\0ns\0x", b"")] {
            offline
                .change(|txn| {
                    txn.put_raw(key.as_bytes(), value);
                    Ok(())
                })
                .unwrap();
        }
        let broken = offline.broken();
        let names: Vec<_> = broken.iter().map(|broken| broken.name.as_str()).collect();
        assert_eq!(names, ["images/ns/bad", "nosuch/ns/x"]);
        assert!(matches!(Offline::open(folder.path()), Err(OpenError::InUse(_))));
        for broken in broken {
            let file = offline.set_aside(&broken.key).unwrap();
            assert!(std::fs::read_to_string(file).unwrap().contains(r#""ns""#));
        }
        drop(offline);
        let offline = Offline::open(folder.path()).unwrap().unwrap();
        assert_eq!(offline.broken(), []);
        assert!(offline.view().has::<NamespaceRecord>(&["ns"]).unwrap());
        let aside = std::fs::read_to_string(folder.path().join(ASIDE)).unwrap();
        assert_eq!(aside.lines().next().unwrap(), r#"{"key":["images","ns","bad"],"value":"//8="}"#);
    }
}
