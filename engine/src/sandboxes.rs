//! Sandboxes: the records that say what containers of one pod share. What runs them is a controller's affair.

use proto::containerd::types::Sandbox;

use crate::context::{RequestContext, validate_identifier};
use crate::error::{Error, Result};
use crate::filters::{self, Filter};
use crate::labels;
use crate::metadata::{Metadata, Read as _};

/// What an update without a mask replaces.
const UPDATABLE: [&str; 4] = ["labels", "extensions", "spec", "runtime"];

/// The sandboxes of all namespaces.
#[derive(Clone)]
pub struct Sandboxes {
    metadata: Metadata,
}

impl Sandboxes {
    /// Sandboxes over this database.
    pub fn new(metadata: Metadata) -> Self {
        Sandboxes { metadata }
    }

    /// One sandbox; NotFound when there is none of this id.
    pub fn get(&self, context: &RequestContext, id: &str) -> Result<Sandbox> {
        let namespace = context.namespace()?;
        self.metadata.view().get::<Sandbox>(&[namespace.as_str(), id])?.ok_or_else(|| missing(id))
    }

    /// The sandboxes that pass the filters (`id`, `labels.KEY`).
    pub fn list(&self, context: &RequestContext, filters: &[String]) -> Result<Vec<Sandbox>> {
        let namespace = context.namespace()?;
        let filter = Filter::parse_all(filters)?;
        let all = self.metadata.view().list::<Sandbox>(&[namespace.as_str()]);
        let passes = |sandbox: &Sandbox| {
            filter.matches(|path| match path {
                ["id"] => Some(sandbox.sandbox_id.as_str().into()),
                ["labels", rest @ ..] => filters::label(&sandbox.labels, rest),
                _ => None,
            })
        };
        Ok(all.into_iter().map(|(_, sandbox)| sandbox).filter(passes).collect())
    }

    /// Makes a sandbox; AlreadyExists when the id is taken. The times in `sandbox` are ignored.
    pub async fn create(&self, context: &RequestContext, mut sandbox: Sandbox) -> Result<Sandbox> {
        let namespace = context.namespace()?.clone();
        validate(&sandbox).map_err(|error| error.context("create sandbox"))?;
        let now = std::time::SystemTime::now().into();
        (sandbox.created_at, sandbox.updated_at) = (Some(now), Some(now));
        self.metadata
            .commit(move |txn| {
                let key = [namespace.as_str(), &sandbox.sandbox_id];
                if txn.has::<Sandbox>(&key)? {
                    let id = &sandbox.sandbox_id;
                    return Err(Error::already_exists(format!("sandbox {id:?} exists already")));
                }
                txn.put(&key, &sandbox)?;
                Ok(sandbox)
            })
            .await
    }

    /// Replaces what the mask names (`labels`, `labels.KEY`, `extensions`, `extensions.KEY`, `spec`, `runtime`), or all of
    /// these when it names nothing, and then the runtime's name must stay.
    pub async fn update(&self, context: &RequestContext, new: Sandbox, mask: Vec<String>) -> Result<Sandbox> {
        let namespace = context.namespace()?.clone();
        if new.sandbox_id.is_empty() {
            return Err(Error::invalid_argument("the id of the sandbox to update is missing"));
        }
        self.metadata
            .commit(move |txn| {
                let key = [namespace.as_str(), &new.sandbox_id];
                let mut sandbox = txn.get::<Sandbox>(&key)?.ok_or_else(|| missing(&new.sandbox_id))?;
                apply_update(&mut sandbox, &new, &mask)?;
                validate(&sandbox).map_err(|error| error.context("update sandbox"))?;
                sandbox.updated_at = Some(std::time::SystemTime::now().into());
                txn.put(&key, &sandbox)?;
                Ok(sandbox)
            })
            .await
    }

    /// Deletes the record; NotFound when there is none.
    pub async fn delete(&self, context: &RequestContext, id: String) -> Result<()> {
        let namespace = context.namespace()?.clone();
        self.metadata
            .commit(move |txn| match txn.delete::<Sandbox>(&[namespace.as_str(), &id])? {
                true => {
                    txn.release();
                    Ok(())
                }
                false => Err(missing(&id)),
            })
            .await
    }
}

fn missing(id: &str) -> Error {
    Error::not_found(format!("sandbox {id:?} does not exist"))
}

fn runtime_name(sandbox: &Sandbox) -> &str {
    sandbox.runtime.as_ref().map_or("", |runtime| runtime.name.as_str())
}

fn validate(sandbox: &Sandbox) -> Result<()> {
    validate_identifier("sandbox id", &sandbox.sandbox_id)?;
    labels::validate_all(&sandbox.labels)?;
    if sandbox.extensions.keys().any(String::is_empty) {
        return Err(Error::invalid_argument("the key of an extension must not be empty"));
    }
    if runtime_name(sandbox).is_empty() {
        return Err(Error::invalid_argument(format!(
            "sandbox {:?} names no runtime; give one, e.g. io.containerd.runc.v2",
            sandbox.sandbox_id
        )));
    }
    Ok(())
}

fn apply_update(sandbox: &mut Sandbox, new: &Sandbox, mask: &[String]) -> Result<()> {
    let whole = UPDATABLE.map(String::from);
    if mask.is_empty() && runtime_name(sandbox) != runtime_name(new) {
        return Err(Error::invalid_argument(format!(
            "the runtime's name of sandbox {:?} cannot change (from {:?} to {:?})",
            sandbox.sandbox_id,
            runtime_name(sandbox),
            runtime_name(new)
        )));
    }
    for path in if mask.is_empty() { &whole[..] } else { mask } {
        match labels::split_path(path) {
            ("labels", key) => labels::update_map(&mut sandbox.labels, &new.labels, key),
            ("extensions", None) => sandbox.extensions = new.extensions.clone(),
            ("extensions", Some(key)) => {
                match new.extensions.get(key) {
                    Some(value) => sandbox.extensions.insert(key.to_owned(), value.clone()),
                    None => sandbox.extensions.remove(key),
                };
            }
            ("spec", None) => sandbox.spec = new.spec.clone(),
            ("runtime", None) => sandbox.runtime = new.runtime.clone(),
            _ => {
                return Err(Error::invalid_argument(format!(
                    "field {path:?} of sandbox {:?} cannot be updated; these can: {}",
                    sandbox.sandbox_id,
                    UPDATABLE.join(", ")
                )));
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;

    use proto::containerd::types::sandbox::Runtime;

    use super::*;
    use crate::context::Namespace;

    fn sandbox(id: &str) -> Sandbox {
        let runtime = Runtime { name: "io.containerd.runc.v2".into(), options: None };
        let labels = BTreeMap::from([("a".to_owned(), "1".to_owned())]);
        Sandbox { sandbox_id: id.into(), runtime: Some(runtime), labels, ..Sandbox::default() }
    }

    async fn open(folder: &tempfile::TempDir) -> Sandboxes {
        let folder = folder.path().join("metadata");
        let metadata = tokio::task::spawn_blocking(move || Metadata::open(&folder).unwrap()).await.unwrap();
        Sandboxes::new(metadata)
    }

    #[tokio::test]
    async fn a_sandbox_through_its_life() {
        let folder = tempfile::tempdir().unwrap();
        let sandboxes = open(&folder).await;
        let context = RequestContext::internal(Namespace::new("a").unwrap());
        let made = sandboxes.create(&context, sandbox("one")).await.unwrap();
        assert!(made.created_at.is_some());
        assert!(matches!(sandboxes.create(&context, sandbox("one")).await, Err(Error::AlreadyExists(_))));
        assert_eq!(sandboxes.get(&context, "one").unwrap(), made);
        sandboxes.create(&context, sandbox("two")).await.unwrap();

        let mut new = sandbox("one");
        new.labels = BTreeMap::from([("b.c".to_owned(), "2".to_owned()), ("d".to_owned(), "3".to_owned())]);
        let updated = sandboxes.update(&context, new.clone(), vec!["labels.b.c".into()]).await.unwrap();
        assert_eq!(updated.labels.keys().collect::<Vec<_>>(), ["a", "b.c"]);
        let updated = sandboxes.update(&context, new.clone(), Vec::new()).await.unwrap();
        assert_eq!(updated.labels, new.labels);
        new.runtime = Some(Runtime { name: "other.v1".into(), options: None });
        for mask in [vec![], vec!["sandboxer".to_owned()]] {
            let refused = sandboxes.update(&context, new.clone(), mask).await;
            assert!(matches!(refused, Err(Error::InvalidArgument(_))));
        }
        let absent = sandboxes.update(&context, sandbox("three"), Vec::new()).await;
        assert!(matches!(absent, Err(Error::NotFound(_))));

        let ids = |filter: &str| -> Vec<String> {
            let list = sandboxes.list(&context, &[filter.to_owned()]).unwrap();
            list.into_iter().map(|sandbox| sandbox.sandbox_id).collect()
        };
        assert_eq!(ids(""), ["one", "two"]);
        assert_eq!(ids("labels.a==1"), ["two"]);
        assert_eq!(ids("id==one"), ["one"]);
        let elsewhere = RequestContext::internal(Namespace::new("b").unwrap());
        assert!(matches!(sandboxes.get(&elsewhere, "one"), Err(Error::NotFound(_))));
        sandboxes.delete(&context, "one".into()).await.unwrap();
        assert!(matches!(sandboxes.delete(&context, "one".into()).await, Err(Error::NotFound(_))));
    }

    #[tokio::test]
    async fn bad_sandboxes_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let sandboxes = open(&folder).await;
        let context = RequestContext::internal(Namespace::new("a").unwrap());
        let bad = [
            sandbox(""),
            sandbox("a/b"),
            sandbox(&"x".repeat(77)),
            Sandbox { runtime: None, ..sandbox("x") },
            Sandbox { labels: BTreeMap::from([("k".into(), "v".repeat(5000))]), ..sandbox("x") },
            Sandbox { extensions: BTreeMap::from([(String::new(), Default::default())]), ..sandbox("x") },
        ];
        for sandbox in bad {
            let refused = sandboxes.create(&context, sandbox).await;
            assert!(matches!(refused, Err(Error::InvalidArgument(_))), "{refused:?}");
        }
        assert!(sandboxes.list(&context, &[]).unwrap().is_empty());
    }
}
