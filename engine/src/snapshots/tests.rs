//! Snapshots through the domain, on both built-in snapshotters, across namespaces and restarts.

use proto::containerd::services::leases::v1::Lease;

use super::*;

/// Those that can be had on every file system that the tests may run on.
const NAMES: [&str; 2] = ["overlayfs", "native"];

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
            let snapshots = Snapshots::open(dir.path(), metadata.clone(), events.clone(), &[]).unwrap();
            Bench { dir, metadata, events, snapshots }
        };
        std::thread::spawn(open).join().unwrap()
    }

    /// The engine stops, whatever it was at.
    fn stop(self) -> tempfile::TempDir {
        let Bench { dir, metadata, events, snapshots } = self;
        drop((metadata, events, snapshots));
        dir
    }

    /// The engine stops, whatever it was at, and starts again.
    fn restart(self) -> Self {
        Bench::on(self.stop())
    }

    /// Puts another snapshotter in the place of this one.
    fn replace(&mut self, name: &str, by: impl FnOnce(Arc<dyn Snapshotter>) -> Arc<dyn Snapshotter>) {
        let snapshotters = Arc::get_mut(&mut self.snapshots.snapshotters).unwrap();
        let opened = snapshotters.get_mut(name).unwrap();
        opened.snapshotter = by(opened.snapshotter.clone());
    }

    fn failed(&self) -> BTreeMap<String, String> {
        let failed = self.snapshots.failed().filter(|(name, _)| NAMES.contains(name));
        failed.map(|(name, why)| (name.to_owned(), why.to_owned())).collect()
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
        let layer = Layer { key: key.into(), layer: layer.into(), ..Layer::default() };
        self.snapshots.commit(context, name, layer).await
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
        Error::DataLoss(_) => "data loss",
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn a_snapshots_life() {
    let bench = Bench::new();
    let a = context("a");
    for name in NAMES {
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
    let error = bench.prepare(&a, "zfs", "x", "").await.unwrap_err();
    assert!(matches!(&error, Error::InvalidArgument(text) if text.contains("overlayfs")), "{error}");
    assert_eq!(class(bench.prepare(&a, NAMES[0], "", "").await), "invalid argument");
}

#[tokio::test]
async fn namespaces_do_not_see_each_other() {
    let bench = Bench::new();
    let (a, b, name) = (context("a"), context("b"), NAMES[0]);
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
    let (a, name) = (context("a"), NAMES[0]);
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
    let (a, name) = (context("a"), NAMES[0]);
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
    let name = NAMES[0];
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
    let (a, name) = (context("a"), NAMES[0]);
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
    let (a, name) = (context("a"), NAMES[0]);
    bench.layer(&a, name, "one", "").await;
    for key in ["done", "undone"] {
        bench.prepare(&a, name, key, "one").await.unwrap();
        let inner = bench.snapshots.stat(&a, name, key).await.unwrap().record.inner;
        let layer = format!("layer-{key}");
        let labels = labels(&[("k", "v")]);
        let intent = CommitRecord {
            key: key.into(),
            inner: inner.clone(),
            layer,
            labels,
            lease: String::new(),
            parent: None,
        };
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
    let (a, name) = (context("a"), NAMES[0]);
    let mut tasks = Vec::new();
    for number in 0..6 {
        let key = format!("extract-{number}");
        bench.prepare(&a, name, &key, "").await.unwrap();
        let (snapshots, a) = (bench.snapshots.clone(), a.clone());
        tasks.push(tokio::spawn(async move {
            let layer = Layer { key, layer: "layer".into(), ..Layer::default() };
            snapshots.commit(&a, name, layer).await
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

/// Stands before a real snapshotter: fails its commits after (or before) they are done, as a failed sync does, and runs
/// something between the making of a snapshot and its record.
struct Troubled<F> {
    real: Arc<dyn Snapshotter>,
    commits: bool,
    prepared: F,
}

#[rustfmt::skip]
impl<F: Fn() + Send + Sync> Snapshotter for Troubled<F> {
    fn prepare(&self, key: &str, parent: &str, labels: &Labels) -> snapshotter::Result<Vec<Mount>> {
        let made = self.real.prepare(key, parent, labels)?;
        (self.prepared)();
        Ok(made)
    }
    fn view(&self, key: &str, parent: &str, labels: &Labels) -> snapshotter::Result<Vec<Mount>> { self.real.view(key, parent, labels) }
    fn mounts(&self, key: &str) -> snapshotter::Result<Vec<Mount>> { self.real.mounts(key) }
    fn commit(&self, name: &str, key: &str, labels: &Labels) -> snapshotter::Result<()> {
        if self.commits {
            self.real.commit(name, key, labels)?;
        }
        let source = std::io::Error::from_raw_os_error(5);
        Err(InnerError::Io { what: "sync the journal in", path: "/x".into(), source })
    }
    fn remove(&self, key: &str) -> snapshotter::Result<()> { self.real.remove(key) }
    fn stat(&self, key: &str) -> snapshotter::Result<snapshotter::Info> { self.real.stat(key) }
    fn update(&self, info: &snapshotter::Info, paths: &[String]) -> snapshotter::Result<snapshotter::Info> { self.real.update(info, paths) }
    fn walk(&self, visit: &mut dyn FnMut(snapshotter::Info) -> snapshotter::Result<()>) -> snapshotter::Result<()> { self.real.walk(visit) }
    fn usage(&self, key: &str) -> snapshotter::Result<Usage> { self.real.usage(key) }
    fn cleanup(&self) -> snapshotter::Result<()> { self.real.cleanup() }
}

#[tokio::test]
async fn a_commit_that_may_be_on_disk_is_not_taken_back() {
    for (commits, kept) in [(true, ["layer", "one"]), (false, ["one", "rw"])] {
        let mut bench = Bench::new();
        let (a, name) = (context("a"), NAMES[0]);
        bench.layer(&a, name, "one", "").await;
        bench.prepare(&a, name, "rw", "one").await.unwrap();
        bench.replace(name, |real| Arc::new(Troubled { real, commits, prepared: || () }));
        let error = bench.commit(&a, name, "layer", "rw").await.unwrap_err();
        assert_eq!(error.to_string().contains("started again"), commits, "{error}");
        assert_eq!(bench.metadata.view().any::<CommitRecord>(&[]), commits);
        let bench = bench.restart();
        assert_eq!(bench.keys(&a, name, "").await, kept);
        assert_eq!(bench.inner(name).len(), 2);
        assert!(!bench.metadata.view().any::<CommitRecord>(&[]));
        assert!(bench.failed().is_empty(), "{:?}", bench.failed());
    }
}

#[tokio::test]
async fn a_parent_removed_while_its_child_is_made_goes_with_it() {
    let mut bench = Bench::new();
    let (a, name) = (context("a"), NAMES[0]);
    bench.layer(&a, name, "one", "").await;
    bench.layer(&a, name, "two", "one").await;
    let (snapshots, handle) = (bench.snapshots.clone(), tokio::runtime::Handle::current());
    let removing = {
        let a = a.clone();
        move || {
            for key in ["two", "one"] {
                handle.block_on(snapshots.remove(&a, name, key.into())).unwrap();
            }
        }
    };
    // The domain's handle that the test removes by shares the map.
    let real = bench.snapshots.snapshotters[name].snapshotter.clone();
    let troubled: Arc<dyn Snapshotter> = Arc::new(Troubled { real, commits: true, prepared: removing });
    let opened = |name: &str, opened: &Opened| {
        let snapshotter = if name == NAMES[0] { &troubled } else { &opened.snapshotter };
        (
            name.to_owned(),
            Opened { root: opened.root.clone(), snapshotter: snapshotter.clone(), intact: true },
        )
    };
    let map = bench.snapshots.snapshotters.iter().map(|(name, of)| opened(name, of)).collect();
    bench.snapshots.snapshotters = Arc::new(map);
    assert_eq!(class(bench.prepare(&a, name, "rw", "two").await), "not found");
    assert!(bench.inner(name).is_empty(), "{:?}", bench.inner(name));
}

fn snapshotter_root(dir: &Path, name: &str) -> PathBuf {
    dir.join(format!("io.containerd.snapshotter.v1.{name}"))
}

/// A layer, and an active snapshot over it with a file in it.
async fn some(bench: &Bench, name: &str) {
    let a = context("a");
    bench.layer(&a, name, "one", "").await;
    let mounts = bench.prepare(&a, name, "rw", "one").await.unwrap();
    let mounted = sys::mount::Mounted::new(&mounts, bench.dir.path()).unwrap();
    std::fs::write(mounted.path().join("precious"), "data").unwrap();
}

async fn is_all_there(bench: &Bench, name: &str) {
    let a = context("a");
    assert!(bench.failed().is_empty(), "{:?}", bench.failed());
    assert_eq!(bench.keys(&a, name, "").await, ["one", "rw"]);
    let mounts = bench.snapshots.mounts(&a, name, "rw").await.unwrap();
    let mounted = sys::mount::Mounted::new(&mounts, bench.dir.path()).unwrap();
    assert!(mounted.path().join("precious").exists() && mounted.path().join("one").exists());
}

#[tokio::test]
async fn a_disk_that_is_not_mounted_costs_nothing() {
    let [name, other] = NAMES;
    let bench = Bench::new();
    some(&bench, name).await;
    some(&bench, other).await;
    let dir = bench.stop();
    let (root, away) = (snapshotter_root(dir.path(), name), dir.path().join("away"));
    std::fs::rename(&root, &away).unwrap();
    // Twice: what the first start made in the bare folder does not mislead the second.
    let bench = Bench::on(dir).restart();
    let failed = bench.failed();
    assert_eq!(failed.keys().collect::<Vec<_>>(), [name]);
    assert!(failed[name].contains("mount") && failed[name].contains("2 are recorded"), "{failed:?}");
    let a = context("a");
    let error = bench.snapshots.stat(&a, name, "rw").await.unwrap_err();
    assert!(error.to_string().contains("mount"), "{error}");
    assert_eq!(bench.keys(&a, other, "").await, ["one", "rw"], "the rest serves");
    let dir = bench.stop();
    std::fs::remove_dir_all(&root).unwrap();
    std::fs::rename(&away, &root).unwrap();
    let bench = Bench::on(dir);
    is_all_there(&bench, name).await;
    is_all_there(&bench, other).await;
    // And when it is gone for good.
    let dir = bench.stop();
    std::fs::remove_dir_all(&root).unwrap();
    let bench = Bench::on(dir);
    assert_eq!(class(bench.remove(&a, name, "one").await), "failed precondition");
    for key in ["rw", "one"] {
        bench.remove(&a, name, key).await.unwrap();
    }
    let bench = bench.restart();
    assert!(bench.failed().is_empty(), "{:?}", bench.failed());
    some(&bench, name).await;
}

#[tokio::test]
async fn a_damaged_journal_costs_nothing() {
    let [name, other] = NAMES;
    let bench = Bench::new();
    some(&bench, name).await;
    some(&bench, other).await;
    let dir = bench.stop();
    let journal = snapshotter_root(dir.path(), name).join("journal");
    let good = std::fs::read(&journal).unwrap();
    let mut bad = good.clone();
    bad[40] ^= 1;
    std::fs::write(&journal, bad).unwrap();
    let bench = Bench::on(dir);
    assert!(bench.failed()[name].contains("damaged"), "{:?}", bench.failed());
    assert_eq!(bench.keys(&context("a"), other, "").await, ["one", "rw"], "the rest serves");
    let dir = bench.stop();
    std::fs::write(&journal, good).unwrap();
    is_all_there(&Bench::on(dir), name).await;
}

#[tokio::test]
async fn a_record_without_its_snapshot_stays_until_it_is_removed() {
    let bench = Bench::new();
    let (a, name) = (context("a"), NAMES[0]);
    bench.layer(&a, name, "one", "").await;
    let dir = bench.stop();
    let journal = snapshotter_root(dir.path(), name).join("journal");
    let length = std::fs::metadata(&journal).unwrap().len();
    let bench = Bench::on(dir);
    bench.prepare(&a, name, "rw", "one").await.unwrap();
    bench.layer(&a, name, "two", "one").await;
    let number = bench.snapshots.number.load(Ordering::Relaxed);
    let dir = bench.stop();
    // An older journal, as from a backup.
    let recent = std::fs::read(&journal).unwrap();
    std::fs::OpenOptions::new().write(true).open(&journal).unwrap().set_len(length).unwrap();
    let snapshots = journal.with_file_name("snapshots");
    let bench = Bench::on(dir);
    assert!(bench.failed().is_empty(), "{:?}", bench.failed());
    assert!(bench.snapshots.number.load(Ordering::Relaxed) >= number, "no inner key is given again");
    assert_eq!(bench.keys(&a, name, "").await, ["one"]);
    for key in ["rw", "two"] {
        assert_eq!(class(bench.snapshots.stat(&a, name, key).await), "data loss");
        assert_eq!(class(bench.snapshots.mounts(&a, name, key).await), "data loss");
        assert_eq!(class(bench.snapshots.usage(&a, name, key).await), "data loss");
        let update = bench.snapshots.update(&a, name, key.into(), Labels::new(), vec![]).await;
        assert_eq!(class(update), "data loss");
    }
    assert_eq!(class(bench.prepare(&a, name, "new", "two").await), "data loss");
    assert_eq!(class(bench.prepare(&a, name, "rw", "one").await), "already exists");
    assert_eq!(class(bench.snapshots.cleanup(name).await), "failed precondition");
    assert_eq!(std::fs::read_dir(&snapshots).unwrap().count(), 3, "folders stay");
    // The recent one is found.
    let dir = bench.stop();
    std::fs::write(&journal, &recent).unwrap();
    let bench = Bench::on(dir);
    assert_eq!(bench.keys(&a, name, "").await, ["one", "rw", "two"]);
    assert!(!bench.snapshots.mounts(&a, name, "rw").await.unwrap().is_empty());
    // It is not.
    let dir = bench.stop();
    std::fs::OpenOptions::new().write(true).open(&journal).unwrap().set_len(length).unwrap();
    let bench = Bench::on(dir);
    for key in ["rw", "two"] {
        bench.remove(&a, name, key).await.unwrap();
    }
    let bench = bench.restart();
    assert_eq!(std::fs::read_dir(&snapshots).unwrap().count(), 1, "and go then");
    bench.layer(&a, name, "two", "one").await;
}

#[tokio::test]
async fn a_snapshotter_that_cannot_be_reconciled_fails_alone() {
    let [name, other] = NAMES;
    let bench = Bench::new();
    some(&bench, name).await;
    some(&bench, other).await;
    // A commit that was done, of a snapshot whose parent is not recorded any more, cannot be brought to its end.
    let a = context("a");
    let active = bench.snapshots.stat(&a, other, "rw").await.unwrap().record.inner;
    bench.snapshots.snapshotters[other].snapshotter.commit("a/50/two", &active, &Labels::new()).unwrap();
    let intent = CommitRecord { key: "rw".into(), inner: active, layer: "two".into(), ..Default::default() };
    let broken = bench.metadata.commit(move |txn| {
        txn.delete::<SnapshotRecord>(&["a", other, "one"])?;
        txn.put(&["a", other, "a/50/two"], &intent)
    });
    broken.await.unwrap();
    let bench = bench.restart();
    assert_eq!(bench.failed().keys().collect::<Vec<_>>(), [other]);
    assert_eq!(bench.keys(&a, name, "").await, ["one", "rw"]);
    // Who is told what is wrong can put it right.
    bench.remove(&a, other, "rw").await.unwrap();
    let bench = bench.restart();
    assert!(bench.failed().is_empty(), "{:?}", bench.failed());
    assert!(bench.inner(other).is_empty());
}

#[tokio::test]
async fn what_is_collected_goes_in_any_order_and_what_is_named_stays() {
    let bench = Bench::new();
    let (a, name) = (context("a"), NAMES[0]);
    let mut inner = Vec::new();
    for (layer, parent) in [("one", ""), ("two", "one"), ("three", "two"), ("four", "three")] {
        bench.layer(&a, name, layer, parent).await;
        let record = bench.snapshots.stat(&a, name, layer).await.unwrap().record;
        inner.push((name.to_owned(), record.inner));
    }
    let forgotten = bench.metadata.commit(move |txn| {
        for key in ["four", "three", "two"] {
            assert!(forget(txn, "a", name, key)?.is_some());
        }
        forget(txn, "a", name, "nothing")
    });
    assert_eq!(forgotten.await.unwrap(), None);
    inner.push(("zfs".into(), "a/1/x".into()));
    inner.push((name.into(), "a/99/gone".into()));
    bench.snapshots.remove_collected(inner).await;
    assert_eq!(bench.keys(&a, name, "").await, ["one"]);
    assert_eq!(bench.inner(name).len(), 1);
    bench.remove(&a, name, "one").await.unwrap();
    assert!(bench.inner(name).is_empty());
}

/// A stack of layers, each in an active snapshot of its own over nothing, as a pull has it.
async fn stack(bench: &Bench, context: &RequestContext, pull: &str, names: &[&str]) -> Vec<Layer> {
    let mut layers: Vec<Layer> = Vec::new();
    for name in names {
        let key = format!("extract-{pull} {name}");
        bench.prepare(context, NAMES[0], &key, "").await.unwrap();
        let parent = layers.last().map(|layer| layer.layer.clone()).unwrap_or_default();
        let layer = Layer { key, layer: (*name).into(), parent: Some(parent), labels: Labels::new() };
        layers.push(layer);
    }
    layers
}

#[tokio::test]
async fn pulls_that_race_over_shared_layers_end_up_on_the_same_ones() {
    let (bench, name) = (Bench::new(), NAMES[0]);
    let a = context("a");
    let mut tasks = Vec::new();
    for number in 0..6 {
        let top = format!("top-{}", number % 3);
        let layers = stack(&bench, &a, &number.to_string(), &["one", "two", &top]).await;
        let (snapshots, a) = (bench.snapshots.clone(), a.clone());
        tasks.push(tokio::spawn(async move { snapshots.commit_stack(&a, name, layers).await }));
    }
    let mut made = 0;
    for task in tasks {
        made += task.await.unwrap().unwrap().into_iter().filter(|made| *made).count();
    }
    assert_eq!(made, 5);
    for key in bench.keys(&a, name, "kind==Active").await {
        bench.remove(&a, name, &key).await.unwrap();
    }
    // Nothing is stacked on what no record names.
    assert_eq!(bench.inner(name).len(), 5);
    let bench = bench.restart();
    assert_eq!(bench.keys(&a, name, "").await, ["one", "top-0", "top-1", "top-2", "two"]);
    assert_eq!(bench.keys(&a, name, "parent==two").await, ["top-0", "top-1", "top-2"]);
    for key in ["top-0", "top-1", "top-2", "two", "one"] {
        bench.remove(&a, name, key).await.unwrap();
    }
    assert!(bench.inner(name).is_empty());
}

#[tokio::test]
async fn a_stack_whose_commit_is_cut_off_is_there_as_a_whole_or_not_at_all() {
    for done in [true, false] {
        let (bench, name) = (Bench::new(), NAMES[0]);
        let a = context("a");
        let names: Vec<String> = (0..12).map(|number| format!("layer-{number}")).collect();
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        let layers = stack(&bench, &a, "p", &names).await;
        let namespace = a.namespace().unwrap().clone();
        let begun = bench.snapshots.begin_commits(&a, &namespace, name, &layers).unwrap();
        let (intents, inners, commits) = begun;
        bench
            .snapshots
            .record_commits(a.clone(), &namespace, name, &layers, &intents, &inners)
            .await
            .unwrap();
        if done {
            bench.snapshots.snapshotters[name].snapshotter.commit_stack(&commits).unwrap();
        }
        let bench = bench.restart();
        assert_eq!(bench.keys(&a, name, "kind==Committed").await.len(), if done { 12 } else { 0 });
        assert_eq!(bench.keys(&a, name, "kind==Active").await.len(), if done { 0 } else { 12 });
        assert!(!bench.metadata.view().any::<CommitRecord>(&[]));
        if done {
            assert_eq!(bench.keys(&a, name, "parent==layer-10").await, ["layer-11"]);
            assert_eq!(bench.snapshots.layers(&a, name, "layer-11").await.unwrap().len(), 12);
        }
    }
}
