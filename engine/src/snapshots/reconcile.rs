//! What a start makes of a snapshotter and the records that name its snapshots, and the removal of what none names.
//!
//! ```text
//! records, but no snapshot at all     the disk is not mounted, or was exchanged: failed, and nothing is touched
//! record without a snapshot           the snapshotter lost it: kept, said, and nothing is removed while there is one
//! snapshot without a record           made or removed halfway when the last run ended: removed
//! ```
//!
//! Invariant: a crash never leaves a record without its snapshot. Where there is one, the two do not belong together as
//! they should, and what looks like a leftover may be all that is left of something.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};

use snapshotter::{Error as InnerError, Snapshotter};

use super::{convert, end_commit};
use crate::content::sequence_of;
use crate::error::{Error, Result};
use crate::metadata::snapshots::{CommitRecord, SnapshotRecord};
use crate::metadata::{Metadata, Read};

/// Brings records and snapshotter together after whatever ended the last run; whether every record has its snapshot.
/// `number` comes to be above that of every inner key.
pub(super) fn reconcile(
    metadata: &Metadata,
    number: &AtomicU64,
    name: &str,
    root: &Path,
    snapshotter: &dyn Snapshotter,
) -> Result<bool> {
    let counts = |inner: &str| {
        let of = inner.split('/').nth(1).and_then(|number| number.parse::<u64>().ok()).unwrap_or(0);
        number.fetch_max(of + 1, Ordering::Relaxed);
    };
    let mut there = HashSet::new();
    let walked = snapshotter.walk(&mut |info| {
        counts(&info.key);
        there.insert(info.key);
        Ok(())
    });
    walked.map_err(|error| convert(name, &error))?;
    let named = named(metadata, name);
    named.keys().for_each(|inner| counts(inner));
    if there.is_empty() && !named.is_empty() {
        tracing::error!(snapshotter = name, root = %root.display(), records = ?shown(named.values()), "no snapshot that is recorded is there");
        return Err(Error::data_loss(format!(
            "{} holds no snapshot, but {} are recorded; if its disk is not mounted, mount it and restart gantryd; if they \
             are gone for good, remove them (`ctr -n NAMESPACE snapshots --snapshotter {name} rm KEY ...`; gantryd's log \
             names them) and restart gantryd",
            root.display(),
            named.len()
        )));
    }
    end_commits(metadata, name, snapshotter)?;

    let named = self::named(metadata, name);
    let dangling: Vec<_> =
        named.iter().filter(|(inner, _)| !there.contains(*inner)).map(|(_, parts)| parts).collect();
    if !dangling.is_empty() {
        tracing::error!(
            snapshotter = name,
            records = ?shown(dangling),
            "recorded snapshots are not there; they stay recorded until they are removed, and nothing is cleaned up before"
        );
        return Ok(false);
    }
    let view = metadata.view();
    let leftover = |inner: &String| !named.contains_key(inner) && !is_named(&view, name, inner);
    let leftovers: Vec<String> = there.into_iter().filter(leftover).collect();
    if !leftovers.is_empty() {
        tracing::info!(
            snapshotter = name,
            ?leftovers,
            "removing snapshots that an earlier run left half made"
        );
    }
    for (key, error) in remove_unnamed(metadata, name, snapshotter, leftovers) {
        tracing::warn!(snapshotter = name, key, %error, "a snapshot without a record stays");
    }
    // What cannot be deleted takes space and is in nobody's way.
    if let Err(error) = snapshotter.cleanup() {
        tracing::warn!(snapshotter = name, %error, "what removed snapshots left stays");
    }
    Ok(true)
}

/// The records of a snapshotter's snapshots, namespace first, by the inner key.
fn named(metadata: &Metadata, name: &str) -> BTreeMap<String, Vec<String>> {
    let records = metadata.view().list::<SnapshotRecord>(&[]);
    let of = records.into_iter().filter(|(parts, _)| parts.get(1).is_some_and(|of| of == name));
    of.map(|(parts, record)| (record.inner, parts)).collect()
}

fn shown<'a>(records: impl IntoIterator<Item = &'a Vec<String>>) -> Vec<String> {
    records.into_iter().map(|parts| parts.join(" ")).collect()
}

/// Brings commits that the last run began to the end that the snapshotter came to.
fn end_commits(metadata: &Metadata, name: &str, snapshotter: &dyn Snapshotter) -> Result<()> {
    let mut begun = metadata.view().list::<CommitRecord>(&[]);
    // As they were begun: of layers that were committed together, parents come first.
    begun.sort_by_key(|(parts, _)| parts.last().and_then(|inner| sequence_of(inner)));
    for (parts, intent) in begun {
        let Ok([namespace, of, inner]) = <[String; 3]>::try_from(parts) else { continue };
        if of != name {
            continue;
        }
        let has = |inner: &str| match snapshotter.stat(inner) {
            Ok(_) => Ok(true),
            Err(InnerError::NotFound(_)) => Ok(false),
            Err(error) => Err(convert(inner, &error)),
        };
        let done = has(&inner)?;
        if !done && !has(&intent.inner)? && is_named(&metadata.view(), name, &intent.inner) {
            tracing::warn!(
                snapshotter = name,
                inner,
                "a commit of an earlier run has neither beginning nor end"
            );
            continue;
        }
        tracing::info!(snapshotter = name, inner, done, "ending a commit of an earlier run");
        metadata.commit_blocking(move |txn| end_commit(txn, &namespace, &of, &inner, done))?;
    }
    Ok(())
}

/// Whether a record names this inner key, or a commit under way will. What cannot be read may name anything.
fn is_named(read: &impl Read, name: &str, inner: &str) -> bool {
    let mut parts = inner.splitn(3, '/');
    let (Some(namespace), Some(_), Some(key)) = (parts.next(), parts.next(), parts.next()) else {
        return false;
    };
    read.has::<CommitRecord>(&[namespace, name, inner]).unwrap_or(true)
        || read
            .get::<SnapshotRecord>(&[namespace, name, key])
            .map_or(true, |record| record.is_some_and(|record| record.inner == inner))
}

/// Removes those of `keys` that no record names, whatever their order, and of their parents those that are free for it
/// then: a parent whose record went while a child was being made could not go with it. What stays, and why.
pub(super) fn remove_unnamed(
    metadata: &Metadata,
    name: &str,
    snapshotter: &dyn Snapshotter,
    mut keys: Vec<String>,
) -> Vec<(String, InnerError)> {
    loop {
        let (mut stay, mut freed) = (Vec::new(), Vec::new());
        let before = keys.len();
        for key in keys {
            if is_named(&metadata.view(), name, &key) {
                continue;
            }
            let parent = snapshotter.stat(&key).map(|info| info.parent).unwrap_or_default();
            match snapshotter.remove(&key) {
                Ok(()) if parent.is_empty() => {}
                Ok(()) => freed.push(parent),
                Err(InnerError::NotFound(_)) => {}
                Err(error) => stay.push((key, error)),
            }
        }
        // Stacked ones have to go from the top, so that a round may free the next.
        if freed.is_empty() && (stay.is_empty() || stay.len() == before) {
            return stay;
        }
        keys = stay.into_iter().map(|(key, _)| key).chain(freed).collect();
    }
}
