//! The metadata of the engine: what containers, images, blobs, snapshots, leases and namespaces there are.
//!
//! This is the one place that opens the database. One sled tree holds everything:
//!
//! ```text
//! key    TABLE 0x00 part [ 0x00 part ... ]     part: UTF-8 without 0x00, e.g. "containers" "default" "web"
//! value  a protobuf message, the table's `Record`
//! key    "schema"                              value: the version as a little-endian u32
//! ```
//!
//! ```text
//!  commit(closure) --> queue --> writer thread: run the queued closures, one after the other, each on the state that
//!                                the one before it left; one sled::Batch of all; flush + sync_data; publish the new
//!                                view; answer every caller
//!  view()          --> the last published state: an immutable ordered map, shared by pointer
//! ```
//!
//! Invariants: what `commit` answered is on disk, and so is what the answer was drawn from, be it an error. A closure that
//! fails leaves no trace. A view is one consistent state between commits, never one that is not yet on disk, and taking it
//! or reading it waits for nobody.

mod archive;
pub mod containers;
pub mod content;
pub mod cri;
mod db;
pub mod events;
mod flush;
pub mod images;
pub mod leases;
pub mod mounts;
pub mod namespaces;
pub mod offline;
mod reserve;
pub mod sandboxes;
pub mod sequences;
pub mod snapshots;

use std::ops::Bound;
use std::path::Path;
use std::sync::Arc;

pub use db::{Metadata, OpenError};
use imbl::ordmap::DiffItem;

use crate::error::{Error, Result};

/// The version of the schema that this engine writes; see [`MIGRATIONS`].
pub const SCHEMA_VERSION: u32 = 1;

/// One step from version N (its index, counted from 1) to N + 1, run once at open, in one commit.
type Migration = fn(&mut Transaction) -> Result<()>;
const MIGRATIONS: &[Migration] = &[];

/// A key and its new value; None deletes it.
type Write = (Arc<[u8]>, Option<Arc<[u8]>>);

type Map = imbl::OrdMap<Arc<[u8]>, Arc<[u8]>>;

/// A resource that is kept in the database: a protobuf message under a table's name.
pub trait Record: prost::Message + Default {
    /// The first part of the key of every record of this kind.
    const TABLE: &'static str;
    /// Whether the part after the table is a namespace, which comes to be with its first record, and with which all of its
    /// records go. Keys of a table that is not have one part.
    const NAMESPACED: bool = true;
}

/// Reading, the same for a [`View`] and for a [`Transaction`].
pub trait Read {
    #[doc(hidden)]
    fn map(&self) -> &Map;

    /// One record; DataLoss when what is stored cannot be decoded.
    fn get<R: Record>(&self, parts: &[&str]) -> Result<Option<R>> {
        let key = encode_key(R::TABLE, parts)?;
        self.map().get(&key[..]).map(|value| decode(&key, value)).transpose()
    }

    /// Whether there is such a record.
    fn has<R: Record>(&self, parts: &[&str]) -> Result<bool> {
        Ok(self.map().contains_key(&encode_key(R::TABLE, parts)?[..]))
    }

    /// Every record whose key begins with these parts, in order of the keys, each with its remaining parts.
    /// A record that cannot be decoded is logged and left out: one bad record never hides the rest.
    fn list<R: Record>(&self, leading: &[&str]) -> Vec<(Vec<String>, R)> {
        let mut records = Vec::new();
        for (parts, decoded) in decoded(self.map(), leading) {
            match decoded {
                Ok(record) => records.push((parts, record)),
                Err(error) => tracing::error!(%error, "a metadata record is set aside"),
            }
        }
        records
    }

    /// The remaining parts of every key that begins with these parts, also of records that cannot be decoded.
    fn keys<R: Record>(&self, leading: &[&str]) -> Vec<Vec<String>> {
        let Ok(mut prefix) = encode_key(R::TABLE, leading) else { return Vec::new() };
        prefix.push(0);
        let keys = self.map().range::<_, [u8]>(from(&prefix)).map(|(key, _)| key.strip_prefix(&prefix[..]));
        keys.map_while(|rest| rest.map(split_key)).collect()
    }

    /// The same, but DataLoss when one cannot be decoded: for whom a record left out would pass for a deleted one.
    fn list_all<R: Record>(&self, leading: &[&str]) -> Result<Vec<(Vec<String>, R)>> {
        decoded(self.map(), leading).into_iter().map(|(parts, record)| Ok((parts, record?))).collect()
    }

    /// Whether any record's key begins with these parts.
    fn any<R: Record>(&self, leading: &[&str]) -> bool {
        let Ok(mut prefix) = encode_key(R::TABLE, leading) else { return false };
        prefix.push(0);
        self.map().range::<_, [u8]>(from(&prefix)).next().is_some_and(|(key, _)| key.starts_with(&prefix))
    }
}

/// One consistent, durable state of all metadata. Cheap to take and to clone; it holds its state alive.
#[derive(Clone)]
pub struct View(Map);

impl Read for View {
    fn map(&self) -> &Map {
        &self.0
    }
}

/// The state as a commit's closure sees it: what is committed, plus what this closure has written so far.
pub struct Transaction {
    map: Map,
    durable: Map,
    writes: Vec<Write>,
    released: bool,
    /// Whether it has made a record, and whether it has deleted one.
    added: bool,
    deleted: bool,
}

/// How much has been committed since the database was opened.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Mutations {
    /// Commits that wrote anything.
    pub(crate) commits: u64,
    /// Those of them that let go of something; see [`Transaction::release`].
    pub(crate) releases: u64,
}

impl Read for Transaction {
    fn map(&self) -> &Map {
        &self.map
    }
}

impl Mutations {
    /// What has come to it since an earlier count.
    pub(crate) fn since(self, earlier: &Mutations) -> Mutations {
        Mutations {
            commits: self.commits.saturating_sub(earlier.commits),
            releases: self.releases.saturating_sub(earlier.releases),
        }
    }
}

impl Transaction {
    fn new(map: Map, durable: Map) -> Self {
        Transaction { map, durable, writes: Vec::new(), released: false, added: false, deleted: false }
    }

    /// The state that is on disk: what the closures before this one wrote in the same group is not in it. For what
    /// cannot be taken back when the group fails or the engine is killed, such as the removal of a file.
    pub fn durable(&self) -> View {
        View(self.durable.clone())
    }

    /// Says that this change let go of something that it may have been the last to hold: a collection is due.
    pub(crate) fn release(&mut self) {
        self.released = true;
    }

    /// The keys, table first, of the records that are here and are not the same in `view`: made or changed since. Parts of
    /// the state that nothing touched are shared with the view and cost nothing.
    pub(crate) fn changes_since(&self, view: &View) -> Vec<Vec<String>> {
        let mut keys = Vec::new();
        for change in view.0.diff(&self.map) {
            let (DiffItem::Add(key, _) | DiffItem::Update { new: (key, _), .. }) = change else { continue };
            keys.push(split_key(key));
        }
        keys
    }

    /// Writes a record, new or in the place of the one with this key.
    pub fn put<R: Record>(&mut self, parts: &[&str], record: &R) -> Result<()> {
        let key = encode_key(R::TABLE, parts)?;
        if R::NAMESPACED
            && let Some(namespace) = parts.first()
        {
            namespaces::ensure(self, namespace)?;
        }
        self.put_raw(&key, &record.encode_to_vec());
        Ok(())
    }

    /// Deletes a record; whether there was one.
    pub fn delete<R: Record>(&mut self, parts: &[&str]) -> Result<bool> {
        let key: Arc<[u8]> = encode_key(R::TABLE, parts)?.into();
        let existed = self.map.remove(&key).is_some();
        if existed {
            self.deleted = true;
            self.writes.push((key, None));
        }
        Ok(existed)
    }

    /// Deletes every record of a table whose key begins with these parts.
    pub fn delete_all<R: Record>(&mut self, leading: &[&str]) -> Result<()> {
        let mut prefix = encode_key(R::TABLE, leading)?;
        prefix.push(0);
        let keys: Vec<_> = self
            .map
            .range::<_, [u8]>(from(&prefix))
            .map(|(key, _)| key.clone())
            .take_while(|key| key.starts_with(&prefix))
            .collect();
        for key in keys {
            self.map.remove(&key);
            self.deleted = true;
            self.writes.push((key, None));
        }
        Ok(())
    }

    /// Deletes every record of a namespace, of whatever table, but not that of the namespace itself.
    pub fn delete_namespace(&mut self, namespace: &str) -> Result<()> {
        let mut keys = Vec::new();
        let mut after = Vec::new();
        // From table to table: 0x01 follows the 0x00 that ends a table's name.
        while let Some((key, _)) = self.map.range::<_, [u8]>(from(&after)).next() {
            let end = key.iter().position(|byte| *byte == 0).unwrap_or(key.len());
            let mut prefix = key[..end].to_vec();
            after.clone_from(&prefix);
            after.push(1);
            prefix.push(0);
            prefix.extend_from_slice(namespace.as_bytes());
            prefix.push(0);
            let records = self.map.range::<_, [u8]>(from(&prefix)).map(|(key, _)| key.clone());
            keys.extend(records.take_while(|key| key.starts_with(&prefix)));
        }
        for key in keys {
            self.map.remove(&key);
            self.deleted = true;
            self.writes.push((key, None));
        }
        Ok(())
    }

    /// Whether all it does is to make records, so that it takes space and gives none back.
    fn only_adds(&self) -> bool {
        self.added && !self.deleted
    }

    fn put_raw(&mut self, key: &[u8], value: &[u8]) {
        let key: Arc<[u8]> = key.into();
        let value: Arc<[u8]> = value.into();
        self.added |= self.map.insert(key.clone(), value.clone()).is_none();
        self.writes.push((key, Some(value)));
    }
}

/// The records whose keys begin with these parts, each with its remaining parts.
fn decoded<R: Record>(map: &Map, leading: &[&str]) -> Vec<(Vec<String>, Result<R>)> {
    let Ok(mut prefix) = encode_key(R::TABLE, leading) else { return Vec::new() };
    prefix.push(0);
    map.range::<_, [u8]>(from(&prefix))
        .map_while(|(key, value)| Some((key, key.strip_prefix(&prefix[..])?, value)))
        .map(|(key, rest, value)| (split_key(rest), decode(key, value)))
        .collect()
}

fn encode_key(table: &str, parts: &[&str]) -> Result<Vec<u8>> {
    let mut key =
        Vec::with_capacity(table.len() + parts.iter().map(|part| part.len() + 1).sum::<usize>() + 1);
    key.extend_from_slice(table.as_bytes());
    for part in parts {
        if part.as_bytes().contains(&0) {
            return Err(Error::invalid_argument(format!("{part:?} holds a NUL byte, which no name may")));
        }
        key.push(0);
        key.extend_from_slice(part.as_bytes());
    }
    Ok(key)
}

fn split_key(key: &[u8]) -> Vec<String> {
    key.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned()).collect()
}

/// The range of keys from this one on.
fn from(key: &[u8]) -> (Bound<&[u8]>, Bound<&[u8]>) {
    (Bound::Included(key), Bound::Unbounded)
}

fn show_key(key: &[u8]) -> String {
    String::from_utf8_lossy(key).replace('\0', "/")
}

fn decode<R: Record>(key: &[u8], value: &[u8]) -> Result<R> {
    R::decode(value).map_err(|error| {
        Error::data_loss(format!(
            "metadata record {}: cannot be decoded: {error}; see `gantryd metadata export`",
            show_key(key)
        ))
    })
}

/// Writes the whole database under `dir` to a plain file, one JSON object a line; the engine must be stopped.
/// The number of records.
pub fn export(dir: &Path, file: &mut dyn std::io::Write) -> anyhow::Result<u64> {
    archive::export(dir, file)
}

/// Makes a new database under `dir` from such a file; refuses a folder that holds one, and a file cut short.
/// The number of records.
pub fn import(dir: &Path, file: &mut dyn std::io::BufRead) -> anyhow::Result<u64> {
    archive::import(dir, file)
}
