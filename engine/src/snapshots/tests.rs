//! Snapshots through the domain, on both built-in snapshotters, across namespaces and restarts.

use proto::containerd::services::leases::v1::Lease;

use super::*;

struct Bench {
    dir: tempfile::TempDir,
    metadata: Metadata,
    events: Exchange,
    snapshots: Snapshots,
}

impl Bench {
    fn new() -> Self {
        Bench::on(tempfile::tempdir().unwrap())
    }

    fn on(dir: tempfile::TempDir) -> Self {
        // Opening blocks, which the tests' own threads must not.
        let open = move || {
            let metadata = Metadata::open(&dir.path().join("metadata")).unwrap();
            let events = Exchange::default();
            let snapshots = Snapshots::open(dir.path(), metadata.clone(), events.clone()).unwrap();
            Bench { dir, metadata, events, snapshots }
        };
        std::thread::spawn(open).join().unwrap()
    }

    /// The engine stops, whatever it was at, and starts again.
    fn restart(self) -> Self {
        let Bench { dir, metadata, events, snapshots } = self;
        drop((metadata, events, snapshots));
        Bench::on(dir)
    }

    async fn prepare(
        &self,
        context: &RequestContext,
        name: &str,
        key: &str,
        parent: &str,
    ) -> Result<Vec<Mount>> {
        self.snapshots.create(context, name, new(key, parent, &[])).await
    }

    /// A layer named `layer` with one file in it.
    async fn layer(&self, context: &RequestContext, name: &str, layer: &str, parent: &str) {
        let mounts = self.prepare(context, name, "extract", parent).await.unwrap();
        let mounted = sys::mount::Mounted::new(&mounts, self.dir.path()).unwrap();
        std::fs::write(mounted.path().join(layer), "data").unwrap();
        drop(mounted);
        self.commit(context, name, layer, "extract").await.unwrap();
    }

    async fn commit(&self, context: &RequestContext, name: &str, layer: &str, key: &str) -> Result<()> {
        self.snapshots.commit(context, name, layer.into(), key.into(), Labels::new()).await
    }

    async fn remove(&self, context: &RequestContext, name: &str, key: &str) -> Result<()> {
        self.snapshots.remove(context, name, key.into()).await
    }

    async fn keys(&self, context: &RequestContext, name: &str, filter: &str) -> Vec<String> {
        let filters: Vec<String> =
            Some(filter).filter(|f| !f.is_empty()).map(str::to_owned).into_iter().collect();
        let list = self.snapshots.list(context, name, &filters).await.unwrap();
        list.into_iter().map(|info| info.key).collect()
    }

    /// The keys that the snapshotter itself has.
    fn inner(&self, name: &str) -> Vec<String> {
        let mut keys = Vec::new();
        self.snapshots.snapshotters[name]
            .snapshotter
            .walk(&mut |info| {
                keys.push(info.key);
                Ok(())
            })
            .unwrap();
        keys
    }

    async fn lease(&self, namespace: &str, id: &str) -> RequestContext {
        let (key, lease) = (namespace.to_owned(), Lease { id: id.into(), ..Lease::default() });
        self.metadata.commit(move |txn| txn.put(&[&key, &lease.id], &lease)).await.unwrap();
        context(namespace).with_lease(id)
    }

    fn leased(&self, namespace: &str, lease: &str) -> Vec<String> {
        let held = self.metadata.view().list::<LeaseResource>(&[namespace, lease]);
        held.into_iter().map(|(parts, _)| parts.join(" ")).collect()
    }
}

fn context(namespace: &str) -> RequestContext {
    RequestContext::internal(Namespace::new(namespace).unwrap())
}

fn labels(of: &[(&str, &str)]) -> Labels {
    of.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn new(key: &str, parent: &str, of: &[(&str, &str)]) -> New {
    New { key: key.into(), parent: parent.into(), labels: labels(of), kind: Kind::Active }
}

fn class<T: std::fmt::Debug>(result: Result<T>) -> &'static str {
    match result.unwrap_err() {
        Error::NotFound(_) => "not found",
        Error::AlreadyExists(_) => "already exists",
        Error::FailedPrecondition(_) => "failed precondition",
        Error::InvalidArgument(_) => "invalid argument",
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_snapshots_life() {
    let bench = Bench::new();
    let a = context("a");
    for name in snapshotter::NAMES {
        let mut events = bench.events.subscribe(&[]).unwrap();
        bench.layer(&a, name, "one", "").await;
        bench.layer(&a, name, "two", "one").await;
        let mounts = bench.prepare(&a, name, "rw", "two").await.unwrap();
        assert_eq!(bench.snapshots.mounts(&a, name, "rw").await.unwrap(), mounts);
        let mounted = sys::mount::Mounted::new(&mounts, bench.dir.path()).unwrap();
        assert!(mounted.path().join("one").exists() && mounted.path().join("two").exists());
        std::fs::write(mounted.path().join("own"), vec![1; 100_000]).unwrap();
        drop(mounted);
        let usage = bench.snapshots.usage(&a, name, "rw").await.unwrap();
        assert!(usage.size >= 100_000, "{usage:?}");
        let view = New { kind: Kind::View, ..new("ro", "two", &[]) };
        bench.snapshots.create(&a, name, view).await.unwrap();

        let info = bench.snapshots.stat(&a, name, "two").await.unwrap();
        assert_eq!((info.kind, info.record.parent.as_str()), (Kind::Committed, "one"));
        assert_eq!(bench.keys(&a, name, "").await, ["one", "ro", "rw", "two"]);
        assert_eq!(bench.keys(&a, name, "parent==two").await, ["ro", "rw"]);
        assert_eq!(bench.keys(&a, name, "kind~=(?i)view").await, ["ro"]);
        assert_eq!(class(bench.remove(&a, name, "two").await), "failed precondition");
        assert_eq!(class(bench.prepare(&a, name, "x", "rw").await), "invalid argument");
        assert_eq!(class(bench.prepare(&a, name, "x", "none").await), "not found");
        assert_eq!(class(bench.prepare(&a, name, "rw", "").await), "already exists");
        assert_eq!(class(bench.commit(&a, name, "two", "rw").await), "already exists");
        assert_eq!(class(bench.commit(&a, name, "three", "none").await), "not found");
        assert_eq!(class(bench.snapshots.mounts(&a, name, "none").await), "not found");
        assert_eq!(class(bench.snapshots.usage(&a, name, "none").await), "not found");
        assert_eq!(class(bench.snapshots.stat(&a, name, "none").await), "not found");
        assert_eq!(class(bench.remove(&a, name, "none").await), "not found");
        for key in ["ro", "rw", "two", "one"] {
            bench.remove(&a, name, key).await.unwrap();
        }
        assert!(bench.keys(&a, name, "").await.is_empty());
        assert!(bench.inner(name).is_empty());
        bench.snapshots.cleanup(name).await.unwrap();
        let mut topics = Vec::new();
        for _ in 0..9 {
            topics.push(events.next().await.unwrap().unwrap().topic.clone());
        }
        let (p, c, r) = ("/snapshot/prepare", "/snapshot/commit", "/snapshot/remove");
        assert_eq!(topics, [p, c, p, c, p, r, r, r, r]);
    }
    let error = bench.prepare(&a, "btrfs", "x", "").await.unwrap_err();
    assert!(matches!(&error, Error::InvalidArgument(text) if text.contains("overlayfs")), "{error}");
    assert_eq!(class(bench.prepare(&a, snapshotter::NAMES[0], "", "").await), "invalid argument");
}

#[tokio::test]
async fn namespaces_do_not_see_each_other() {
    let bench = Bench::new();
    let (a, b, name) = (context("a"), context("b"), snapshotter::NAMES[0]);
    bench.layer(&a, name, "one", "").await;
    assert_eq!(class(bench.snapshots.stat(&b, name, "one").await), "not found");
    assert_eq!(class(bench.prepare(&b, name, "x", "one").await), "not found");
    assert_eq!(class(bench.remove(&b, name, "one").await), "not found");
    bench.layer(&b, name, "one", "").await;
    bench.remove(&a, name, "one").await.unwrap();
    assert_eq!(bench.keys(&b, name, "").await, ["one"]);
    bench.prepare(&b, name, "x", "one").await.unwrap();
    assert_eq!(
        class(bench.snapshots.list(&RequestContext::default(), name, &[]).await),
        "failed precondition"
    );
}

#[tokio::test]
async fn what_exists_joins_the_lease() {
    let bench = Bench::new();
    let (a, name) = (context("a"), snapshotter::NAMES[0]);
    bench.layer(&a, name, "one", "").await;
    let leased = bench.lease("a", "l").await;
    let target = new("extract", "", &[("containerd.io/snapshot.ref", "one")]);
    assert_eq!(class(bench.snapshots.create(&leased, name, target).await), "already exists");
    assert_eq!(bench.leased("a", "l"), [format!("snapshots/{name} one")]);
    bench.prepare(&leased, name, "rw", "one").await.unwrap();
    assert_eq!(bench.leased("a", "l").len(), 2);
    bench.commit(&leased, name, "two", "rw").await.unwrap();
    let held = [format!("snapshots/{name} one"), format!("snapshots/{name} two")];
    assert_eq!(bench.leased("a", "l"), held);
    bench.remove(&leased, name, "two").await.unwrap();
    assert_eq!(bench.leased("a", "l"), held[..1]);
    let nobody = a.with_lease("nobody");
    assert_eq!(class(bench.prepare(&nobody, name, "x", "").await), "not found");
    assert_eq!(bench.inner(name).len(), 1, "what was half made is gone");
}

#[tokio::test]
async fn the_snapshotter_sees_only_its_own_labels() {
    let bench = Bench::new();
    let (a, name) = (context("a"), snapshotter::NAMES[0]);
    let all = [("containerd.io/snapshot/x", "1"), ("containerd.io/snapshot.ref", "later"), ("mine", "2")];
    bench.snapshots.create(&a, name, new("rw", "", &all)).await.unwrap();
    let inner = |bench: &Bench| {
        let key = bench.inner(name).remove(0);
        bench.snapshots.snapshotters[name].snapshotter.stat(&key).unwrap().labels
    };
    assert_eq!(inner(&bench), labels(&all[..2]));
    assert_eq!(bench.snapshots.stat(&a, name, "rw").await.unwrap().record.labels, labels(&all));
    assert_eq!(bench.keys(&a, name, "labels.mine==2").await, ["rw"]);
    let update = |of: &[(&str, &str)], mask: &[&str]| {
        let mask = mask.iter().map(|path| (*path).to_owned()).collect();
        let (snapshots, a, of) = (bench.snapshots.clone(), a.clone(), labels(of));
        async move { snapshots.update(&a, name, "rw".into(), of, mask).await }
    };
    let info = update(&[("mine", "")], &["labels.mine"]).await.unwrap();
    assert_eq!(info.record.labels, labels(&all[..2]));
    assert_eq!(class(update(&[], &["parent"]).await), "invalid argument");
    let info = update(&[("containerd.io/snapshot/y", "3"), ("other", "4")], &[]).await.unwrap();
    assert_eq!(info.record.labels.len(), 2);
    assert_eq!(inner(&bench), labels(&[("containerd.io/snapshot/y", "3")]));
    let missing = bench.snapshots.update(&a, name, "none".into(), Labels::new(), vec![]).await;
    assert_eq!(class(missing), "not found");
}

#[tokio::test]
async fn racing_prepares_leave_one() {
    let bench = Bench::new();
    let name = snapshotter::NAMES[0];
    bench.layer(&context("a"), name, "one", "").await;
    let tasks: Vec<_> = (0..8)
        .map(|_| {
            let snapshots = bench.snapshots.clone();
            tokio::spawn(async move { snapshots.create(&context("a"), name, new("rw", "one", &[])).await })
        })
        .collect();
    let mut won = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(mounts) => {
                assert!(!mounts.is_empty());
                won += 1;
            }
            Err(Error::AlreadyExists(_)) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!((won, bench.inner(name).len()), (1, 2));
}

#[tokio::test]
async fn a_restart_finds_all_and_cleans_what_was_half_made() {
    let bench = Bench::new();
    let (a, name) = (context("a"), snapshotter::NAMES[0]);
    bench.layer(&a, name, "one", "").await;
    bench.prepare(&a, name, "rw", "one").await.unwrap();
    let parent = bench.snapshots.stat(&a, name, "one").await.unwrap().record.inner;
    let inner = bench.snapshots.snapshotters[name].snapshotter.clone();
    // What a kill leaves before the record of a new snapshot, and of one upon it.
    inner.prepare("a/900/x", &parent, &Labels::new()).unwrap();
    inner.commit("a/901/x", "a/900/x", &Labels::new()).unwrap();
    inner.prepare("a/902/y", "a/901/x", &Labels::new()).unwrap();
    drop(inner);
    let bench = bench.restart();
    assert_eq!(bench.keys(&a, name, "").await, ["one", "rw"]);
    assert_eq!(bench.inner(name).len(), 2);
    assert!(!bench.snapshots.mounts(&a, name, "rw").await.unwrap().is_empty());
    bench.commit(&a, name, "two", "rw").await.unwrap();
    bench.prepare(&a, name, "more", "two").await.unwrap();
    assert_eq!(bench.inner(name).len(), 3);
}

#[tokio::test]
async fn a_commit_cut_off_is_brought_to_its_end() {
    let bench = Bench::new();
    let (a, name) = (context("a"), snapshotter::NAMES[0]);
    bench.layer(&a, name, "one", "").await;
    for key in ["done", "undone"] {
        bench.prepare(&a, name, key, "one").await.unwrap();
        let inner = bench.snapshots.stat(&a, name, key).await.unwrap().record.inner;
        let layer = format!("layer-{key}");
        let labels = labels(&[("k", "v")]);
        let intent =
            CommitRecord { key: key.into(), inner: inner.clone(), layer, labels, lease: String::new() };
        let new = format!("a/{}/x", if key == "done" { 801 } else { 802 });
        let of = new.clone();
        bench.metadata.commit(move |txn| txn.put(&["a", name, &of], &intent)).await.unwrap();
        if key == "done" {
            bench.snapshots.snapshotters[name].snapshotter.commit(&new, &inner, &Labels::new()).unwrap();
        }
    }
    // Killed between the snapshotter's commit and the record's; and before both.
    let bench = bench.restart();
    assert_eq!(bench.keys(&a, name, "").await, ["layer-done", "one", "undone"]);
    let layer = bench.snapshots.stat(&a, name, "layer-done").await.unwrap();
    assert_eq!((layer.kind, layer.record.parent.as_str()), (Kind::Committed, "one"));
    assert_eq!(layer.record.labels, labels(&[("k", "v")]));
    assert!(!bench.metadata.view().any::<CommitRecord>(&[]));
    assert_eq!(class(bench.remove(&a, name, "one").await), "failed precondition");
    bench.commit(&a, name, "layer-undone", "undone").await.unwrap();
    for key in ["layer-done", "layer-undone", "one"] {
        bench.remove(&a, name, key).await.unwrap();
    }
    assert!(bench.inner(name).is_empty());
}

#[tokio::test]
async fn racing_commits_make_one_layer() {
    let bench = Bench::new();
    let (a, name) = (context("a"), snapshotter::NAMES[0]);
    let mut tasks = Vec::new();
    for number in 0..6 {
        let key = format!("extract-{number}");
        bench.prepare(&a, name, &key, "").await.unwrap();
        let (snapshots, a) = (bench.snapshots.clone(), a.clone());
        tasks.push(tokio::spawn(async move {
            snapshots.commit(&a, name, "layer".into(), key, Labels::new()).await
        }));
    }
    let mut won = 0;
    for task in tasks {
        match task.await.unwrap() {
            Ok(()) => won += 1,
            Err(Error::AlreadyExists(_)) => {}
            Err(other) => panic!("{other:?}"),
        }
    }
    assert_eq!(won, 1);
    for key in bench.keys(&a, name, "").await {
        bench.remove(&a, name, &key).await.unwrap();
    }
    assert!(bench.inner(name).is_empty(), "records and snapshotter agree");
    assert!(!bench.metadata.view().any::<CommitRecord>(&[]));
}
