//! Namespaces: each has its own containers, images, leases, and its own view of content and snapshots.

use proto::containerd::events::{NamespaceCreate, NamespaceDelete, NamespaceUpdate};
use proto::containerd::services::containers::v1::Container;
use proto::containerd::services::images::v1::Image;
use proto::containerd::types::Sandbox;

use crate::context::Namespace;
use crate::error::{Error, Result, outlive};
use crate::events::Exchange;
use crate::labels::{self, Labels};
use crate::metadata::content::{BlobRecord, IngestRecord};
use crate::metadata::mounts::MountRecord;
use crate::metadata::namespaces::NamespaceRecord;
use crate::metadata::snapshots::SnapshotRecord;
use crate::metadata::{Metadata, Read, Transaction};

/// A namespace as clients see it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamespaceInfo {
    /// Its name.
    pub name: String,
    /// Its labels.
    pub labels: Labels,
}

/// All namespaces.
#[derive(Clone)]
pub struct Namespaces {
    metadata: Metadata,
    events: Exchange,
}

impl Namespaces {
    /// Namespaces over this database, announcing changes on `events`.
    pub fn new(metadata: Metadata, events: Exchange) -> Self {
        Namespaces { metadata, events }
    }

    /// One namespace. One that there is not yet has no labels, and is no error, as in containerd: its Go client asks for
    /// the labels of its namespace before anything has made it.
    pub fn get(&self, name: &str) -> Result<NamespaceInfo> {
        Namespace::new(name)?;
        let record = self.metadata.view().get::<NamespaceRecord>(&[name])?.unwrap_or_default();
        Ok(NamespaceInfo { name: name.to_owned(), labels: record.labels })
    }

    /// All namespaces, by name.
    pub fn list(&self) -> Vec<NamespaceInfo> {
        let all = self.metadata.view().list::<NamespaceRecord>(&[]);
        all.into_iter()
            .map(|(parts, record)| NamespaceInfo { name: parts.concat(), labels: record.labels })
            .collect()
    }

    /// Makes a namespace; AlreadyExists when there is one of this name, made on purpose or by its first record.
    pub async fn create(&self, name: &str, labels: Labels) -> Result<NamespaceInfo> {
        let namespace = Namespace::new(name)?;
        labels::validate_all(&labels)?;
        let this = self.clone();
        outlive(async move {
            let (key, new) = (namespace.clone(), labels.clone());
            this.metadata
                .commit(move |txn| {
                    if txn.has::<NamespaceRecord>(&[key.as_str()])? {
                        return Err(Error::already_exists(format!(
                            "namespace {:?} exists already",
                            key.as_str()
                        )));
                    }
                    txn.put(&[key.as_str()], &NamespaceRecord { labels: new })
                })
                .await?;
            let event = NamespaceCreate { name: namespace.to_string(), labels: labels.clone() };
            this.events.publish(&namespace, "/namespaces/create", &event);
            Ok(NamespaceInfo { name: namespace.to_string(), labels })
        })
        .await
    }

    /// Changes labels: those the mask names (`labels.KEY`), or all of them. A namespace that there is not yet is made, as
    /// containerd does: `ctr namespaces label` relies on it.
    pub async fn update(&self, name: &str, new: Labels, mask: Vec<String>) -> Result<NamespaceInfo> {
        let namespace = Namespace::new(name)?;
        let this = self.clone();
        outlive(async move {
            let key = namespace.clone();
            let labels = this
                .metadata
                .commit(move |txn| {
                    let mut record = txn.get::<NamespaceRecord>(&[key.as_str()])?.unwrap_or_default();
                    if mask.is_empty() {
                        labels::update_map(&mut record.labels, &new, None);
                    }
                    for path in &mask {
                        let ("labels", Some(label)) = labels::split_path(path) else {
                            return Err(Error::invalid_argument(format!(
                                "field {path:?} of namespace {:?} cannot be updated; use labels.KEY",
                                key.as_str()
                            )));
                        };
                        labels::update_map(&mut record.labels, &new, Some(label));
                    }
                    labels::validate_all(&record.labels)?;
                    txn.put(&[key.as_str()], &record)?;
                    Ok(record.labels)
                })
                .await?;
            let event = NamespaceUpdate { name: namespace.to_string(), labels: labels.clone() };
            this.events.publish(&namespace, "/namespaces/update", &event);
            Ok(NamespaceInfo { name: namespace.to_string(), labels })
        })
        .await
    }

    /// Deletes an empty namespace; FailedPrecondition says what it still holds. Its leases, and whatever else is recorded of
    /// it, go with it.
    pub async fn delete(&self, name: &str) -> Result<()> {
        let namespace = Namespace::new(name)?;
        let this = self.clone();
        outlive(async move {
            let key = namespace.clone();
            this.metadata
                .commit(move |txn| {
                    let name = key.as_str();
                    if !txn.has::<NamespaceRecord>(&[name])? {
                        return Err(missing(name));
                    }
                    let held = contents(txn, name);
                    if !held.is_empty() {
                        return Err(Error::failed_precondition(format!(
                            "namespace {name:?} must be empty, but it still has {}; delete these first",
                            held.join(", ")
                        )));
                    }
                    txn.delete_namespace(name)?;
                    txn.delete::<NamespaceRecord>(&[name])?;
                    Ok(())
                })
                .await?;
            let event = NamespaceDelete { name: namespace.to_string() };
            this.events.publish(&namespace, "/namespaces/delete", &event);
            Ok(())
        })
        .await
    }
}

fn missing(name: &str) -> Error {
    Error::not_found(format!("namespace {name:?} does not exist"))
}

fn contents(txn: &Transaction, name: &str) -> Vec<String> {
    let mut held = Vec::new();
    for (what, any) in [
        ("images", txn.any::<Image>(&[name])),
        ("blobs", txn.any::<BlobRecord>(&[name])),
        ("ingests", txn.any::<IngestRecord>(&[name])),
        ("containers", txn.any::<Container>(&[name])),
        ("mounts", txn.any::<MountRecord>(&[name])),
        ("sandboxes", txn.any::<Sandbox>(&[name])),
    ] {
        if any {
            held.push(what.to_owned());
        }
    }
    let mut snapshotters: Vec<String> = txn
        .list::<SnapshotRecord>(&[name])
        .into_iter()
        .filter_map(|(parts, _)| parts.into_iter().next())
        .collect();
    snapshotters.dedup();
    held.extend(snapshotters.iter().map(|name| format!("snapshots on the {name} snapshotter")));
    held
}

#[cfg(test)]
mod tests {
    use proto::containerd::services::leases::v1::Lease;

    use super::*;
    use crate::metadata::leases::LeaseResource;
    use crate::metadata::sequences;

    #[tokio::test]
    async fn a_namespace_is_deleted_empty_and_whole() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().to_owned();
        let metadata = tokio::task::spawn_blocking(move || Metadata::open(&path).unwrap()).await.unwrap();
        let namespaces = Namespaces::new(metadata.clone(), Exchange::default());
        let fill = |txn: &mut Transaction| {
            // One name begins with the other.
            for name in ["a", "aa"] {
                txn.put(&[name, "ref"], &IngestRecord::default())?;
                txn.put(&[name, "lease"], &Lease::default())?;
                txn.put(&[name, "lease", "ingests", "ref"], &LeaseResource {})?;
                sequences::next(txn, name, "number")?;
            }
            Ok(())
        };
        metadata.commit(fill).await.unwrap();
        let Err(Error::FailedPrecondition(why)) = namespaces.delete("a").await else { panic!("deleted") };
        assert!(why.contains("ingests"), "{why}");
        let before = metadata.view().map().len();
        metadata.commit(|txn| txn.delete::<IngestRecord>(&["a", "ref"])).await.unwrap();
        namespaces.delete("a").await.unwrap();
        let view = metadata.view();
        assert!(!view.map().keys().any(|key| key.split(|byte| *byte == 0).nth(1) == Some(b"a")));
        assert_eq!(view.map().len(), before - 5, "and what is the other's stays");
        // Whoever makes it again begins at the beginning.
        let number = metadata.commit(|txn| sequences::next(txn, "a", "number")).await.unwrap();
        assert_eq!(number, 1);
    }
}
