//! The pods and their containers, as they are recorded: what the verbs of the kubelet read and change.
//!
//! ```text
//!  Store -- pods -------> Pod        { id, record() }
//!        `- containers -> Container  { id, record() }
//! ```
//!
//! Invariants: a record is on disk before anybody sees it here. Reading waits for nobody. A name (of a pod: name, namespace,
//! uid and attempt; of a container: name, attempt and its pod) is one object's until that is gone.

use std::collections::BTreeMap;
use std::sync::Arc;

use parking_lot::RwLock;
use tokio::sync::watch;

use super::NAMESPACE;
use crate::error::{Error, Result};
use crate::metadata::cri::{ContainerStage, PodContainerRecord, PodRecord, PodStage};
use crate::metadata::{Metadata, Read as _, Record};

/// Something that is recorded under an id.
#[derive(Debug)]
pub struct Recorded<R> {
    /// Its id.
    pub id: String,
    record: watch::Sender<Arc<R>>,
}

/// A pod.
pub type Pod = Recorded<PodRecord>;
/// A container of a pod.
pub type Container = Recorded<PodContainerRecord>;

impl<R> Recorded<R> {
    /// As it is recorded now.
    pub fn record(&self) -> Arc<R> {
        self.record.borrow().clone()
    }

    /// Tells of each change.
    pub fn watch(&self) -> watch::Receiver<Arc<R>> {
        self.record.subscribe()
    }
}

impl Pod {
    /// Where it is in its life.
    pub fn stage(&self) -> PodStage {
        self.record().stage()
    }
}

impl Container {
    /// Where it is in its life.
    pub fn stage(&self) -> ContainerStage {
        self.record().stage()
    }
}

type Table<R> = Arc<RwLock<BTreeMap<String, Arc<Recorded<R>>>>>;

/// All pods and containers; cheap to clone.
#[derive(Clone)]
pub struct Store {
    metadata: Metadata,
    pods: Table<PodRecord>,
    containers: Table<PodContainerRecord>,
}

impl Store {
    /// What is recorded.
    pub fn open(metadata: Metadata) -> Self {
        let (pods, containers) = (load(&metadata), load(&metadata));
        Store { metadata, pods, containers }
    }

    /// The pod of this id, or the only one whose id begins so; NotFound when there is none.
    pub fn pod(&self, id: &str) -> Result<Arc<Pod>> {
        find(&self.pods, "pod sandbox", id)
    }

    /// The container of this id, or the only one whose id begins so; NotFound when there is none.
    pub fn container(&self, id: &str) -> Result<Arc<Container>> {
        find(&self.containers, "container", id)
    }

    /// All pods.
    pub fn pods(&self) -> Vec<Arc<Pod>> {
        self.pods.read().values().cloned().collect()
    }

    /// All containers.
    pub fn containers(&self) -> Vec<Arc<Container>> {
        self.containers.read().values().cloned().collect()
    }

    /// The containers of a pod.
    pub fn containers_of(&self, pod: &str) -> Vec<Arc<Container>> {
        self.containers.read().values().filter(|container| container.record().pod == pod).cloned().collect()
    }

    /// Records a new pod.
    pub async fn add_pod(&self, id: &str, record: PodRecord) -> Result<Arc<Pod>> {
        self.add(&self.pods, id, record).await
    }

    /// Records a new container.
    pub async fn add_container(&self, id: &str, record: PodContainerRecord) -> Result<Arc<Container>> {
        self.add(&self.containers, id, record).await
    }

    /// Changes a pod's record; NotFound when it is gone.
    pub async fn change_pod(
        &self,
        pod: &Arc<Pod>,
        change: impl FnOnce(&mut PodRecord) + Send + 'static,
    ) -> Result<Arc<PodRecord>> {
        self.change(pod, change).await
    }

    /// Changes a container's record; NotFound when it is gone.
    pub async fn change_container(
        &self,
        container: &Arc<Container>,
        change: impl FnOnce(&mut PodContainerRecord) + Send + 'static,
    ) -> Result<Arc<PodContainerRecord>> {
        self.change(container, change).await
    }

    /// Forgets a pod; one that is gone is no error.
    pub async fn forget_pod(&self, id: &str) -> Result<()> {
        self.forget(&self.pods, id).await
    }

    /// Forgets a container; one that is gone is no error.
    pub async fn forget_container(&self, id: &str) -> Result<()> {
        self.forget(&self.containers, id).await
    }

    async fn add<R: Record + Clone + 'static>(
        &self,
        table: &Table<R>,
        id: &str,
        record: R,
    ) -> Result<Arc<Recorded<R>>> {
        let (key, stored) = (id.to_owned(), record.clone());
        self.metadata
            .commit(move |txn| match txn.has::<R>(&[NAMESPACE, &key])? {
                true => Err(Error::already_exists(format!("{} {key:?} exists already", R::TABLE))),
                false => txn.put(&[NAMESPACE, &key], &stored),
            })
            .await?;
        let added = Arc::new(Recorded { id: id.to_owned(), record: watch::Sender::new(Arc::new(record)) });
        table.write().insert(id.to_owned(), added.clone());
        Ok(added)
    }

    /// The writer runs closures one after the other, so that what is shown is shown in the order in which it is stored.
    async fn change<R: Record + Clone + 'static>(
        &self,
        of: &Arc<Recorded<R>>,
        change: impl FnOnce(&mut R) + Send + 'static,
    ) -> Result<Arc<R>> {
        let of = of.clone();
        let id = of.id.clone();
        self.metadata
            .commit(move |txn| {
                let mut record = txn.get::<R>(&[NAMESPACE, &id])?.ok_or_else(|| missing(R::TABLE, &id))?;
                change(&mut record);
                txn.put(&[NAMESPACE, &id], &record)?;
                Ok(())
            })
            .await?;
        // Two changes may come back in either order: what is shown is what is stored when it is shown, never something older.
        let mut stored = Err(missing(R::TABLE, &of.id));
        of.record.send_modify(|shown| {
            if let Ok(Some(record)) = self.metadata.view().get::<R>(&[NAMESPACE, &of.id]) {
                *shown = Arc::new(record);
                stored = Ok(shown.clone());
            }
        });
        stored
    }

    async fn forget<R: Record>(&self, table: &Table<R>, id: &str) -> Result<()> {
        let key = id.to_owned();
        self.metadata.commit(move |txn| txn.delete::<R>(&[NAMESPACE, &key]).map(drop)).await?;
        table.write().remove(id);
        Ok(())
    }
}

fn load<R: Record>(metadata: &Metadata) -> Table<R> {
    let all = metadata.view().list::<R>(&[NAMESPACE]).into_iter().map(|(parts, record)| {
        let id = parts.concat();
        (id.clone(), Arc::new(Recorded { id, record: watch::Sender::new(Arc::new(record)) }))
    });
    Arc::new(RwLock::new(all.collect()))
}

fn find<R>(table: &Table<R>, what: &str, id: &str) -> Result<Arc<Recorded<R>>> {
    if id.is_empty() {
        return Err(Error::invalid_argument(format!("the id of the {what} is empty")));
    }
    let table = table.read();
    if let Some(found) = table.get(id) {
        return Ok(found.clone());
    }
    let mut alike = table.range(id.to_owned()..).take_while(|(key, _)| key.starts_with(id));
    match (alike.next(), alike.next()) {
        (Some((_, found)), None) => Ok(found.clone()),
        (Some(_), Some(_)) => Err(Error::invalid_argument(format!(
            "several of a {what}'s id begin with {id:?}: give more of it"
        ))),
        (None, _) => Err(missing(what, id)),
    }
}

fn missing(what: &str, id: &str) -> Error {
    Error::not_found(format!("{what} {id:?} does not exist"))
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn open(folder: &tempfile::TempDir) -> Store {
        let folder = folder.path().to_owned();
        Store::open(tokio::task::spawn_blocking(move || Metadata::open(&folder).unwrap()).await.unwrap())
    }

    fn pod(handler: &str) -> PodRecord {
        PodRecord { handler: handler.into(), ..PodRecord::default() }
    }

    #[tokio::test]
    async fn what_is_shown_is_what_is_stored() {
        let folder = tempfile::tempdir().unwrap();
        {
            let store = open(&folder).await;
            let one = store.add_pod("abc1", pod("a")).await.unwrap();
            assert!(matches!(store.add_pod("abc1", pod("b")).await, Err(Error::AlreadyExists(_))));
            assert_eq!(one.record().handler, "a");
            let seen = one.watch();
            let changed =
                store.change_pod(&one, |record| record.stage = PodStage::Ready.into()).await.unwrap();
            assert_eq!((changed.stage(), one.stage()), (PodStage::Ready, PodStage::Ready));
            assert!(seen.has_changed().unwrap());
            let container = PodContainerRecord { pod: "abc1".into(), ..PodContainerRecord::default() };
            store.add_container("c1", container).await.unwrap();
        }
        let store = open(&folder).await;
        assert_eq!(store.pod("abc1").unwrap().stage(), PodStage::Ready);
        assert_eq!(store.containers_of("abc1").len(), 1);
        assert!(store.containers_of("other").is_empty());
        let one = store.pod("abc1").unwrap();
        store.forget_pod("abc1").await.unwrap();
        store.forget_pod("abc1").await.unwrap();
        assert!(matches!(store.pod("abc1"), Err(Error::NotFound(_))));
        // Nothing comes back by a change that was late.
        assert!(matches!(store.change_pod(&one, |_| {}).await, Err(Error::NotFound(_))));
        assert!(store.pods().is_empty());
    }

    #[tokio::test]
    async fn the_beginning_of_an_id_is_enough_when_it_is_one_objects_alone() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(&folder).await;
        for id in ["abc1", "abd2", "ab"] {
            store.add_pod(id, pod("")).await.unwrap();
        }
        assert_eq!(store.pod("abc").unwrap().id, "abc1");
        assert_eq!(store.pod("ab").unwrap().id, "ab", "a whole id is itself");
        assert!(matches!(store.pod("a"), Err(Error::InvalidArgument(_))));
        assert!(matches!(store.pod("abc12"), Err(Error::NotFound(_))));
        assert!(matches!(store.pod(""), Err(Error::InvalidArgument(_))));
    }

    #[tokio::test]
    async fn changes_at_the_same_time_are_all_kept() {
        let folder = tempfile::tempdir().unwrap();
        let store = open(&folder).await;
        let one = store.add_pod("p", pod("")).await.unwrap();
        let changes = (0..50).map(|_| store.change_pod(&one, |record| record.pid += 1));
        for changed in futures::future::join_all(changes).await {
            changed.unwrap();
        }
        assert_eq!(one.record().pid, 50);
    }
}
