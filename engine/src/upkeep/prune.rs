//! Images that are not needed, deleted by what they are.
//!
//! ```text
//!  all images - used by a container - tagged, unless all - too young - too small - the last N of a repository - filtered out
//! ```
//!
//! An image without a tag is one whose name has none, and whose target no other image with a tag has.
//!
//! Invariant: a name goes only while it points to what it did when it was chosen. What is told as freed is what was held
//! before and has no record after.

use std::collections::{BTreeMap, HashSet};
use std::time::{Duration, SystemTime};

use oci::Reference;
use proto::containerd::services::images::v1::Image;

use super::Upkeep;
use super::usage::{Sized, Sum};
use crate::context::RequestContext;
use crate::error::{Error, Result, outlive};
use crate::gc::Node;
use crate::metadata::content::BlobRecord;
use crate::metadata::snapshots::SnapshotRecord;
use crate::metadata::{Read as _, View};

/// Which images are not needed.
#[derive(Debug, Clone, Default)]
pub struct Unneeded {
    /// In containerd's language.
    pub filters: Vec<String>,
    /// Made longer ago.
    pub older_than: Option<Duration>,
    /// With more bytes of content.
    pub larger_than: u64,
    /// Spares so many of a repository.
    pub keep_last: usize,
    /// Those with a tag, too.
    pub all: bool,
    /// Deletes nothing.
    pub dry_run: bool,
}

/// What went, or would go.
#[derive(Debug, Clone, PartialEq)]
pub struct Pruned {
    /// The images.
    pub images: Vec<Image>,
    /// What only they held.
    pub freed: Sum,
}

impl Upkeep {
    /// Deletes the images that are not needed, and collects what only they held.
    pub async fn prune(&self, context: &RequestContext, which: Unneeded) -> Result<Pruned> {
        let namespace = context.namespace()?.clone();
        let passing: HashSet<String> =
            self.images.list(context, &which.filters)?.into_iter().map(|image| image.name).collect();
        let view = self.metadata.view();
        let mut sized = self.sized(&view, namespace.as_str()).await?;
        let images = choose(&sized, &passing, &which, SystemTime::now());
        let names: Vec<String> = images.iter().map(|image| image.name.clone()).collect();
        let freed = sized.freed(&names);
        if which.dry_run || images.is_empty() {
            return Ok(Pruned { freed: sized.sum(&freed), images });
        }
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            let mut gone = Vec::new();
            for image in images {
                match this.images.delete(&context, image.name.clone(), image.target.clone()).await {
                    Ok(()) => gone.push(image),
                    // Deleted by another, or given to something else.
                    Err(Error::NotFound(_)) => {}
                    Err(error) => return Err(error),
                }
            }
            this.gc.collect().await?;
            let after = this.metadata.view();
            let freed = freed.iter().filter(|node| !is_there(&after, namespace.as_str(), node));
            Ok(Pruned { freed: sized.sum(freed), images: gone })
        })
        .await
    }
}

fn is_there(view: &View, namespace: &str, node: &Node) -> bool {
    let there = match node {
        Node::Content(digest) => view.has::<BlobRecord>(&[namespace, digest]),
        Node::Snapshot { snapshotter, key } => view.has::<SnapshotRecord>(&[namespace, snapshotter, key]),
        _ => Ok(false),
    };
    there.unwrap_or(true)
}

/// The images that are not needed.
fn choose(sized: &Sized, passing: &HashSet<String>, which: &Unneeded, now: SystemTime) -> Vec<Image> {
    let used = sized.used();
    let digest =
        |image: &Image| image.target.as_ref().map(|target| target.digest.clone()).unwrap_or_default();
    let created = |image: &Image| {
        image.created_at.and_then(|time| SystemTime::try_from(time).ok()).unwrap_or(SystemTime::UNIX_EPOCH)
    };
    let tagged: HashSet<String> =
        sized.images.values().filter(|image| is_tagged(&image.name)).map(digest).collect();
    let mut spared: HashSet<&str> = HashSet::new();
    if which.keep_last > 0 {
        let mut repositories: BTreeMap<String, Vec<&Image>> = BTreeMap::new();
        for image in sized.images.values() {
            repositories.entry(repository(&image.name)).or_default().push(image);
        }
        for mut images in repositories.into_values() {
            images.sort_by_key(|image| std::cmp::Reverse(created(image)));
            spared.extend(images.into_iter().take(which.keep_last).map(|image| image.name.as_str()));
        }
    }
    let old = |image: &Image| {
        which.older_than.is_none_or(|age| now.duration_since(created(image)).is_ok_and(|is| is > age))
    };
    let large = |image: &Image| {
        which.larger_than == 0
            || sized.sum(sized.graph.reach(&Node::Image(image.name.clone()))).content > which.larger_than
    };
    let unneeded = sized.images.values().filter(|image| {
        passing.contains(&image.name)
            && !used.contains(&image.name)
            && (which.all || !tagged.contains(&digest(image)))
            && !spared.contains(image.name.as_str())
            && old(image)
            && large(image)
    });
    unneeded.cloned().collect()
}

/// Whether a name has a tag. One that is no reference was made up by somebody, and says what they wanted to keep.
fn is_tagged(name: &str) -> bool {
    if name.parse::<oci::Digest>().is_ok() {
        return false;
    }
    match Reference::parse_normalized(name) {
        Ok(reference) => reference.tag().is_some() || reference.digest().is_none(),
        Err(_) => true,
    }
}

/// The repository of a name, or the name itself.
fn repository(name: &str) -> String {
    // An image's id, as a name, is no tag of a repository `sha256`.
    if name.parse::<oci::Digest>().is_ok() {
        return name.to_owned();
    }
    Reference::parse_normalized(name).map_or_else(|_| name.to_owned(), |reference| reference.name())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tags_and_repositories_are_read_from_names() {
        let digest = oci::Digest::sha256_of(b"x");
        for (name, tagged, of) in [
            ("docker.io/library/a:1", true, "docker.io/library/a"),
            ("a.b/c", true, "a.b/c"),
            (&format!("a.b/c@{digest}")[..], false, "a.b/c"),
            (&format!("a.b/c:1@{digest}"), true, "a.b/c"),
            (digest.as_str(), false, digest.as_str()),
            ("not a reference", true, "not a reference"),
        ] {
            assert_eq!((is_tagged(name), repository(name).as_str()), (tagged, of), "{name}");
        }
    }
}
