//! Which names an image gets, and giving them.
//!
//! ```text
//!  an image of an archive, by the name N or tag T in its annotations, for each reference that is a prefix P:
//!    N        N, if it is P or below it, or if P may be overwritten
//!    T        P:T; a tag that is a whole name is as N, but is not lost when P may be overwritten
//!    digest   P@DIGEST, if digests are asked for and, with skip_named_digest, there is no other name
//!  the archive as a whole, or what is tagged: the store's own name, every reference that is no prefix, P@DIGEST
//! ```

use std::collections::BTreeMap;
use std::time::SystemTime;

use oci::image::Annotations;
use proto::containerd::services::images::v1::Image;
use proto::containerd::types::Descriptor;
use proto::containerd::types::transfer::{ImageReference, ImageStore};

use super::{EXPIRE, Transfers, moment};
use crate::context::RequestContext;
use crate::error::{Error, Result};

/// The annotation with an image's whole name.
pub(super) const NAME: &str = "io.containerd.image.name";
/// The annotation with an image's tag.
pub(super) const TAG: &str = "org.opencontainers.image.ref.name";
/// The label of an image that lives as long as the one it names.
const BACK_REFERENCE: &str = "containerd.io/gc.bref.image";

/// A name for an image.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct Name {
    pub(super) name: String,
    /// Not the store's own name, but one of its references.
    extra: bool,
}

/// The names of an image. `annotations` are those of one image in an archive; without, it is the archive or what is tagged.
pub(super) fn names(store: &ImageStore, digest: &str, annotations: Option<&Annotations>) -> Vec<Name> {
    let by_digest = |reference: &ImageReference| format!("{}@{digest}", reference.name);
    let mut names = Vec::new();
    let mut add = |name: String, extra: bool| {
        let name = Name { name, extra };
        if !name.name.is_empty() && !names.contains(&name) {
            names.push(name);
        }
    };
    let Some(annotations) = annotations else {
        add(store.name.clone(), false);
        for reference in &store.extra_references {
            match (reference.is_prefix, reference.add_digest) {
                (_, true) => add(by_digest(reference), true),
                (false, false) => add(reference.name.clone(), true),
                // A prefix alone is no name.
                (true, false) => {}
            }
        }
        return names;
    };
    for reference in store.extra_references.iter().filter(|reference| reference.is_prefix) {
        let named = annotated(reference, annotations);
        if let Some(name) = &named {
            add(name.clone(), true);
        }
        if reference.add_digest && !(reference.skip_named_digest && named.is_some()) {
            add(by_digest(reference), true);
        }
    }
    names
}

/// The name that annotations give an image, as far as the prefix allows.
fn annotated(prefix: &ImageReference, annotations: &Annotations) -> Option<String> {
    if prefix.name.is_empty() {
        return None;
    }
    let get = |key: &str| annotations.get(key).filter(|value| !value.is_empty());
    let is_whole = |name: &str| name.contains(['/', ':', '@']);
    let allowed = |name: &str| prefix.allow_overwrite || is_below(name, &prefix.name);
    if let Some(name) = get(NAME) {
        return (is_whole(name) && allowed(name)).then(|| name.clone());
    }
    let tag = get(TAG)?;
    if is_whole(tag) {
        return allowed(tag).then(|| tag.clone());
    }
    Some(format!("{}:{tag}", prefix.name))
}

/// Whether `name` is `prefix`, alone or with a tag, a digest or a further path.
fn is_below(name: &str, prefix: &str) -> bool {
    name.strip_prefix(prefix).is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', ':', '@']))
}

impl Transfers {
    /// Gives an image these names; what bore one before does so no more. NotFound when there is none to give.
    pub(super) async fn store(
        &self,
        context: &RequestContext,
        store: &ImageStore,
        target: &Descriptor,
        names: Vec<Name>,
    ) -> Result<Vec<String>> {
        if names.is_empty() {
            return Err(Error::not_found(format!(
                "no name for {}: the destination has neither a name nor a reference that gives one",
                target.digest
            )));
        }
        let mut stored = Vec::new();
        for name in names {
            let mut labels = store.labels.clone();
            if name.extra && !store.name.is_empty() && name.name != store.name {
                // It goes with the image of the store's own name.
                labels.insert(BACK_REFERENCE.into(), store.name.clone());
                labels.insert(EXPIRE.into(), moment(SystemTime::now()));
            }
            self.put(context, &name.name, labels, target).await?;
            stored.push(name.name);
        }
        Ok(stored)
    }

    /// Gives one name; what bore it before does so no more.
    pub(crate) async fn put(
        &self,
        context: &RequestContext,
        name: &str,
        labels: BTreeMap<String, String>,
        target: &Descriptor,
    ) -> Result<()> {
        let image = Image { name: name.to_owned(), labels, target: Some(target.clone()), ..Image::default() };
        loop {
            match self.images.create(context, image.clone(), None).await {
                Err(Error::AlreadyExists(_)) => {}
                created => return created.map(drop),
            }
            match self.images.update(context, image.clone(), Vec::new(), None).await {
                // Deleted in between.
                Err(Error::NotFound(_)) => {}
                updated => return updated.map(drop),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reference(name: &str, flags: &str) -> ImageReference {
        ImageReference {
            name: name.into(),
            is_prefix: flags.contains('p'),
            allow_overwrite: flags.contains('o'),
            add_digest: flags.contains('d'),
            skip_named_digest: flags.contains('s'),
        }
    }

    fn given(store: &str, references: &[(&str, &str)], annotations: Option<&[(&str, &str)]>) -> Vec<String> {
        let store = ImageStore {
            name: store.into(),
            extra_references: references.iter().map(|(name, flags)| reference(name, flags)).collect(),
            ..ImageStore::default()
        };
        let annotations =
            annotations.map(|all| all.iter().map(|(key, value)| ((*key).into(), (*value).into())).collect());
        names(&store, "D", annotations.as_ref()).into_iter().map(|name| name.name).collect()
    }

    #[test]
    fn an_archives_images_are_named_by_their_annotations() {
        let whole: &[(&str, &str)] = &[(NAME, "a.b/c:1"), (TAG, "1")];
        assert_eq!(given("", &[("a.b/c", "p")], Some(whole)), ["a.b/c:1"]);
        assert_eq!(given("", &[("a.b", "p")], Some(whole)), ["a.b/c:1"]);
        assert_eq!(given("", &[("a.b/d", "p")], Some(whole)), [""; 0]);
        assert_eq!(given("", &[("a.b/cc", "p"), ("a.", "p")], Some(whole)), [""; 0], "not half a part");
        assert_eq!(given("", &[("a.b/d", "po")], Some(whole)), ["a.b/c:1"]);
        assert_eq!(given("", &[("a.b/c", "")], Some(whole)), [""; 0], "no prefix");
        assert_eq!(given("x", &[], Some(whole)), [""; 0], "the store's name is for the whole");
        let tag: &[(&str, &str)] = &[(TAG, "v1")];
        assert_eq!(given("", &[("a.b/c", "p")], Some(tag)), ["a.b/c:v1"]);
        assert_eq!(given("", &[("", "po")], Some(tag)), [""; 0]);
        assert_eq!(given("", &[("a.b/c", "p")], Some(&[(TAG, "q.io/x:1")])), [""; 0]);
        assert_eq!(given("", &[("a.b/c", "po")], Some(&[(TAG, "q.io/x:1")])), ["q.io/x:1"]);
        assert_eq!(given("", &[("a.b/c", "p")], Some(&[])), [""; 0]);
        // A whole name that is none is not made one.
        assert_eq!(given("", &[("a.b/c", "po")], Some(&[(NAME, "v1")])), [""; 0]);
    }

    #[test]
    fn digests_name_what_has_no_other_name_or_all() {
        let tag: &[(&str, &str)] = &[(TAG, "v1")];
        assert_eq!(given("", &[("a", "pd")], Some(tag)), ["a:v1", "a@D"]);
        assert_eq!(given("", &[("a", "pds")], Some(tag)), ["a:v1"]);
        assert_eq!(given("", &[("a", "pds")], Some(&[])), ["a@D"]);
        assert_eq!(given("", &[("a", "pd"), ("a", "pd")], Some(&[])), ["a@D"]);
    }

    #[test]
    fn the_whole_gets_the_stores_own_names() {
        assert_eq!(given("x", &[], None), ["x"]);
        assert_eq!(given("", &[], None), [""; 0]);
        let all = [("y", ""), ("z", "p"), ("w", "pds")];
        assert_eq!(given("x", &all, None), ["x", "y", "w@D"]);
    }
}
