//! The collector against a naive model of who holds whom, against changes that come between its two halves, and on a real
//! store and real snapshotters.

use std::sync::LazyLock;

use proptest::prelude::*;
use proto::containerd::services::containers::v1::Container;
use proto::containerd::services::images::v1::Image;
use proto::containerd::services::leases::v1::Lease;
use proto::containerd::types::Descriptor;
use regex::Regex;
use snapshotter::Kind;

use super::mark::{Graph, Marks, Node, Object, Why};
use super::*;
use crate::content::{FOLDER, Session};
use crate::labels::Labels;
use crate::leases::{self, Leases};
use crate::metadata::content::{BlobRecord, IngestRecord};
use crate::metadata::leases::LeaseResource;
use crate::metadata::snapshots::SnapshotRecord;
use crate::metadata::{Record, Transaction};
use crate::snapshots::New;

/// The moment at which the graphs of these tests are marked.
static NOW: LazyLock<SystemTime> = LazyLock::new(SystemTime::now);

fn hours(count: i64) -> SystemTime {
    let distance = Duration::from_secs(count.unsigned_abs() * 3600);
    if count < 0 { *NOW - distance } else { *NOW + distance }
}

fn rfc3339(time: SystemTime) -> String {
    let format = time::format_description::well_known::Rfc3339;
    time::OffsetDateTime::from(time).format(&format).unwrap()
}

/// All that there may be to an object, whatever its kind.
#[derive(Debug, Clone, PartialEq, Default)]
struct Thing {
    labels: Labels,
    /// A snapshot's parent, an image's target, an ingest's blob: a number.
    one: Option<u8>,
    /// A container's snapshot, a lease's resources.
    nodes: Vec<Node>,
    /// When an ingest expires, in hours.
    expires: Option<i64>,
}

type World = BTreeMap<Node, Thing>;

fn object(node: &Node, thing: &Thing) -> Object {
    let one = |prefix: &str| thing.one.map(|number| format!("{prefix}{number}")).unwrap_or_default();
    match node {
        Node::Container(_) => {
            let snapshot = thing.nodes.iter().find_map(|node| match node {
                Node::Snapshot { snapshotter, key } => Some((snapshotter.clone(), key.clone())),
                _ => None,
            });
            Object::container(&thing.labels, snapshot)
        }
        Node::Sandbox(_) => Object::sandbox(&thing.labels),
        Node::Content(_) => Object::content(&thing.labels),
        Node::Image(_) => Object::image(one("c"), &thing.labels, *NOW),
        Node::Ingest(_) => Object::ingest(one("c"), thing.expires.map(hours), *NOW),
        Node::Lease(_) => {
            let held = thing
                .nodes
                .iter()
                .filter(|node| !matches!(node, Node::Container(_) | Node::Lease(_) | Node::Sandbox(_)));
            Object::lease(held.cloned().collect(), &thing.labels, *NOW)
        }
        Node::Mount(_) => Object::mount(thing.one.is_some(), &thing.labels),
        Node::Snapshot { snapshotter, .. } => Object::snapshot(snapshotter, one("s"), &thing.labels),
    }
}

/// The model: who is held, in full (true) or alone (false), found by trying every rule on everything until nothing more
/// comes of it. Labels are read by regular expressions, not as the collector reads them.
fn held(world: &World) -> BTreeSet<(Node, bool)> {
    let mut held = BTreeSet::new();
    for (node, thing) in world {
        let expired = || {
            let time = thing.labels.get("containerd.io/gc.expire");
            let time = time.and_then(|text| {
                time::OffsetDateTime::parse(text, &time::format_description::well_known::Rfc3339).ok()
            });
            time.is_some_and(|time| SystemTime::from(time) < *NOW)
        };
        let root = match node {
            Node::Container(_) | Node::Sandbox(_) => true,
            Node::Image(_) | Node::Lease(_) => !expired(),
            Node::Ingest(_) => thing.expires.is_some_and(|hours| hours >= 0),
            Node::Mount(_) if thing.one.is_none() => true,
            Node::Content(_) | Node::Mount(_) | Node::Snapshot { .. } => {
                thing.labels.contains_key("containerd.io/gc.root")
            }
        };
        if root {
            held.insert((node.clone(), true));
        }
    }
    loop {
        let mut more = BTreeSet::new();
        for (node, full) in &held {
            more.extend(next(world, node, *full));
        }
        let before = held.len();
        held.extend(more);
        if held.len() == before {
            return held;
        }
    }
}

/// Whom one that is held holds.
fn next(world: &World, node: &Node, full: bool) -> Vec<(Node, bool)> {
    static BACK: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(
            r"^containerd\.io/gc\.bref\.(?:(content|image|mount|container)(?:[./].*)?|snapshot\.([^/]*)(?:/.*)?)$",
        )
        .unwrap()
    });
    static FORTH: LazyLock<Regex> = LazyLock::new(|| {
        Regex::new(
            r"^containerd\.io/gc\.ref\.(?:(content|image|mount)(?:[./].*)?|snapshot\.([^/]*)(?:/.*)?)$",
        )
        .unwrap()
    });
    static CONDITION: LazyLock<Regex> =
        LazyLock::new(|| Regex::new(r"^containerd\.io/gc\.cond\.snapshot\.([^/]*)").unwrap());
    let named = |captures: &regex::Captures<'_>, value: &str| match captures.get(1).map(|kind| kind.as_str())
    {
        Some("content") => Node::Content(value.to_owned()),
        Some("image") => Node::Image(value.to_owned()),
        Some("mount") => Node::Mount(value.to_owned()),
        Some(_) => Node::Container(value.to_owned()),
        None => Node::snapshot(&captures[2], value),
    };
    let mut found = Vec::new();
    if full {
        for (other, thing) in
            world.iter().filter(|(other, _)| !matches!(other, Node::Lease(_) | Node::Ingest(_)))
        {
            for (label, value) in &thing.labels {
                if BACK.captures(label).is_some_and(|captures| named(&captures, value) == *node) {
                    found.push((other.clone(), true));
                }
            }
        }
    }
    let Some(thing) = world.get(node) else { return found };
    let one = |prefix: &str| thing.one.map(|number| format!("{prefix}{number}"));
    match node {
        Node::Image(_) => found.extend(one("c").map(|digest| (Node::Content(digest), full))),
        Node::Ingest(_) if full => found.extend(one("c").map(|digest| (Node::Content(digest), true))),
        Node::Snapshot { snapshotter, .. } => {
            found.extend(one("s").map(|key| (Node::snapshot(snapshotter, key), full)));
        }
        Node::Lease(_) => {
            let flat = thing.labels.contains_key("containerd.io/gc.flat");
            for resource in &thing.nodes {
                if !matches!(resource, Node::Container(_) | Node::Lease(_) | Node::Sandbox(_)) {
                    let full = !flat || matches!(resource, Node::Ingest(_));
                    found.push((resource.clone(), full));
                }
            }
        }
        Node::Container(_) => {
            let snapshot = thing.nodes.iter().find(|node| matches!(node, Node::Snapshot { .. }));
            found.extend(snapshot.map(|node| (node.clone(), true)));
        }
        _ => {}
    }
    if full && !matches!(node, Node::Lease(_) | Node::Ingest(_)) {
        for (label, value) in &thing.labels {
            found.extend(FORTH.captures(label).map(|captures| (named(&captures, value), true)));
        }
    }
    if full && matches!(node, Node::Content(_) | Node::Image(_)) {
        for (label, value) in &thing.labels {
            let Some(captures) = CONDITION.captures(label) else { continue };
            let Some((tests, key)) = value.split_once('|') else { continue };
            let snapshot = Node::snapshot(&captures[1], key);
            let used =
                world.get(&snapshot).and_then(|thing| thing.labels.get("containerd.io/gc.cond.value-usedat"));
            // In these worlds they were used one or three hours ago, and the tests are for two.
            let hours = used.map(|used| if *used == rfc3339(hours(-1)) { 1 } else { 3 });
            let met = tests.split(',').any(|test| match test {
                "usedat<2h" => hours == Some(1),
                "usedat>120m" => hours == Some(3),
                _ => false,
            });
            if met {
                found.push((snapshot, true));
            }
        }
    }
    found
}

fn node() -> impl Strategy<Value = Node> {
    prop_oneof![
        1 => (0..2_u8).prop_map(|number| Node::Container(format!("k{number}"))),
        1 => (0..2_u8).prop_map(|number| Node::Sandbox(format!("x{number}"))),
        5 => (0..6_u8).prop_map(|number| Node::Content(format!("c{number}"))),
        2 => (0..3_u8).prop_map(|number| Node::Image(format!("i{number}"))),
        1 => (0..2_u8).prop_map(|number| Node::Ingest(format!("g{number}"))),
        2 => (0..3_u8).prop_map(|number| Node::Lease(format!("l{number}"))),
        2 => (0..3_u8).prop_map(|number| Node::Mount(format!("m{number}"))),
        5 => (0..5_u8, prop_oneof![Just("over.lay"), Just("native")])
            .prop_map(|(number, snapshotter)| Node::snapshot(snapshotter, format!("s{number}"))),
    ]
}

fn label() -> impl Strategy<Value = (String, String)> {
    let any = |words: &'static [&'static str]| proptest::sample::select(words).prop_map(str::to_owned);
    let to = |labels, prefix: &'static str| {
        (any(labels), (0..6_u8).prop_map(move |number| format!("{prefix}{number}")))
    };
    prop_oneof![
        1 => (Just("root".to_owned()), Just("x".to_owned())),
        3 => to(&["ref.content", "ref.content.config", "ref.content/1", "ref.contents", "bref.content", "bref.content.x"], "c"),
        2 => to(&["ref.image", "ref.image.x", "ref.imagine", "bref.image", "bref.image/x"], "i"),
        1 => to(&["ref.mount", "ref.mount.x", "ref.mounts", "bref.mount"], "m"),
        1 => to(&["bref.container", "bref.container.x", "ref.container"], "k"),
        3 => to(
            &["ref.snapshot.over.lay", "ref.snapshot.over.lay/x", "ref.snapshot.native", "ref.snapshot.native.x",
              "ref.snapshot", "bref.snapshot.over.lay", "bref.snapshot.native/x.y"],
            "s"
        ),
        2 => (
            any(&["cond.snapshot.over.lay", "cond.snapshot.native/x"]),
            any(&["usedat<2h|s0", "usedat>120m|s1", "usedat<=2h|s2", "nothing,usedat<2h|s3", "usedat<2h", "seen<2h|s0"]),
        ),
        2 => (Just("cond.value-usedat".to_owned()), prop_oneof![Just(rfc3339(hours(-1))), Just(rfc3339(hours(-3)))]),
        2 => (
            Just("expire".to_owned()),
            prop_oneof![Just(rfc3339(hours(-1))), Just(rfc3339(hours(1))), Just("tomorrow".to_owned())],
        ),
        1 => (Just("flat".to_owned()), Just("true".to_owned())),
    ]
    .prop_map(|(label, value)| (format!("containerd.io/gc.{label}"), value))
}

fn thing() -> impl Strategy<Value = Thing> {
    (
        proptest::collection::vec(label(), 0..4).prop_map(|labels| labels.into_iter().collect()),
        proptest::option::of(0..6_u8),
        proptest::collection::vec(node(), 0..4),
        proptest::option::of(prop_oneof![Just(-1), Just(1)]),
    )
        .prop_map(|(labels, one, nodes, expires)| Thing { labels, one, nodes, expires })
}

fn world() -> impl Strategy<Value = World> {
    proptest::collection::btree_map(node(), thing(), 0..18)
}

fn graph_of(world: &World) -> (Graph, Marks) {
    let mut graph = Graph::new(*NOW);
    for (node, thing) in world {
        graph.add(node.clone(), object(node, thing));
    }
    let marks = graph.mark();
    (graph, marks)
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(500))]

    #[test]
    fn what_goes_is_what_the_model_does_not_hold(world in world()) {
        let held = held(&world);
        let (graph, marks) = graph_of(&world);
        let goes: BTreeSet<Node> = graph.unmarked(&marks).into_iter().map(|id| graph.node(id).clone()).collect();
        let kept = |node: &Node| held.contains(&(node.clone(), true)) || held.contains(&(node.clone(), false));
        let expected: BTreeSet<Node> = world.keys().filter(|node| !kept(node)).cloned().collect();
        prop_assert_eq!(goes, expected);
        // What is kept is explained, by steps of which each holds the next.
        for node in world.keys() {
            let Some(chain) = graph.chain(node) else {
                prop_assert!(!kept(node), "{:?} is kept", node);
                continue;
            };
            prop_assert!(kept(node));
            prop_assert_eq!(&chain.last().unwrap().node, node);
            prop_assert!(matches!(chain[0].why, Why::Root | Why::Until(_) | Why::Own(_)));
            for pair in chain.windows(2) {
                let holds: Vec<Node> =
                    next(&world, &pair[0].node, true).into_iter().map(|(node, _)| node).collect();
                prop_assert!(holds.contains(&pair[1].node), "{:?}", pair);
            }
        }
    }

    #[test]
    fn nothing_goes_that_is_held_once_what_changed_is_counted_in(
        before in world(),
        changes in proptest::collection::btree_map(node(), proptest::option::of(thing()), 0..5),
    ) {
        let (mut graph, mut marks) = graph_of(&before);
        let unmarked = graph.unmarked(&marks);
        let mut after = before.clone();
        for (node, change) in changes {
            match change {
                Some(thing) => after.insert(node, thing),
                None => after.remove(&node),
            };
        }
        let mut roots = Vec::new();
        for (node, thing) in &after {
            match before.get(node) {
                Some(old) if old == thing => {}
                // The resources of a lease are records of their own: those that came are told, not the lease.
                Some(old) if matches!(node, Node::Lease(_)) && old.labels == thing.labels => {
                    let came = thing.nodes.iter().filter(|node| !old.nodes.contains(node));
                    roots.extend(came.map(|node| graph.id(node.clone())));
                }
                _ => roots.push(graph.add(node.clone(), object(node, thing))),
            }
        }
        graph.spare(&mut marks, &roots);
        let held = held(&after);
        for id in unmarked.into_iter().filter(|id| !marks.has(*id)) {
            let node = graph.node(id);
            prop_assert!(!held.contains(&(node.clone(), true)), "{node:?} is held");
            prop_assert!(!held.contains(&(node.clone(), false)), "{node:?} is held flat");
        }
    }

    #[test]
    fn durations_never_panic(text in "[0-9.hmsunµ-]{0,20}") {
        let _ = parse_duration(&text);
    }
}

#[test]
fn durations_as_go_writes_them() {
    for (text, millis) in [
        ("0", 0),
        ("0s", 0),
        ("100ms", 100),
        ("1.5s", 1500),
        ("1h2m", 3_720_000),
        (".5s", 500),
        ("5000us", 5),
    ] {
        assert_eq!(parse_duration(text), Some(Duration::from_millis(millis)), "{text}");
    }
    for bad in ["", "5", "s", "1x", "-1s", "1..2s", "99999999999999999999h"] {
        assert_eq!(parse_duration(bad), None, "{bad}");
    }
}

fn since(commits: u64, releases: u64) -> Mutations {
    Mutations { commits, releases }
}

#[test]
fn collections_are_scheduled_as_containerd_does() {
    let second = Duration::from_secs(1);
    let now = Instant::now();
    let mut schedule = Schedule::new(Settings::default(), now);
    assert_eq!(schedule.next, Some(now + Duration::from_millis(100)), "the start");
    schedule.mutated(now, since(1000, 10));
    assert_eq!(schedule.next, Some(now + Duration::from_millis(100)), "nothing comes before the start");
    schedule.requested(now);
    assert_eq!(schedule.next, Some(now), "but who asks");
    // 5 ms in 250 are 2 percent.
    schedule.collected(now, Duration::from_millis(1), None);
    assert_eq!(schedule.next, None);
    let interval = Duration::from_millis(245);
    schedule.mutated(now, since(0, 0));
    assert_eq!(schedule.next, None, "nothing happens, nothing is done");
    schedule.mutated(now, since(99, 0));
    assert_eq!(schedule.next, Some(now + CHANGED_LIMIT));
    schedule.mutated(now + second, since(100, 0));
    assert_eq!(schedule.next, Some(now + second + interval), "too many changes");
    schedule.mutated(now + second * 2, since(101, 0));
    assert_eq!(schedule.next, Some(now + second + interval), "which more of them do not put off");
    schedule.collected(now, Duration::from_millis(1), Some(second));
    assert_eq!(schedule.next, Some(now + second), "something expires");
    schedule.mutated(now, since(1, 1));
    assert_eq!(schedule.next, Some(now + interval), "a deletion");
    schedule.collected(now, Duration::from_millis(88), None);
    schedule.mutated(now, since(1, 1));
    assert_eq!(schedule.next, Some(now + Duration::from_millis(30 * 49)), "they take long, on average");
    schedule.failed(now);
    assert_eq!(schedule.next, Some(now + Duration::from_millis(30 * 49) + second));

    let settings = Settings {
        deletion_threshold: 2,
        schedule_delay: second,
        startup_delay: Duration::ZERO,
        ..Settings::default()
    };
    let mut schedule = Schedule::new(settings, now);
    assert_eq!(schedule.next, None);
    schedule.mutated(now, since(1, 1));
    assert_eq!(schedule.next, Some(now + CHANGED_LIMIT), "one deletion is not two");
    schedule.mutated(now, since(2, 2));
    assert_eq!(schedule.next, Some(now + second));
    schedule.collected(now, Duration::from_millis(200), None);
    schedule.mutated(now, since(1, 1));
    assert_eq!(
        schedule.next,
        Some(now + Duration::from_millis(200 * 49)),
        "but enough for the next interval"
    );

    let settings = Settings {
        pause_threshold: 1e-300,
        schedule_delay: Duration::MAX,
        startup_delay: Duration::MAX,
        ..Settings::default()
    };
    let mut schedule = Schedule::new(settings, now);
    schedule.collected(now, second, Some(Duration::MAX));
    schedule.mutated(now, since(1, 1));
    schedule.requested(now);
    schedule.failed(now);
    assert_eq!(schedule.next, Some(now + DELAY_MAX + FIRST_INTERVAL));
}

/// An engine's domain with a collector, on a disk.
struct Bench {
    dir: tempfile::TempDir,
    collector: Collector,
}

const NAMESPACE: &str = "default";

impl Bench {
    fn new() -> Self {
        let open = || {
            let dir = tempfile::tempdir().unwrap();
            let metadata = Metadata::open(&dir.path().join("metadata")).unwrap();
            let events = Exchange::default();
            let content = Content::open(&dir.path().join(FOLDER), metadata.clone(), events.clone()).unwrap();
            let snapshots = Snapshots::open(dir.path(), metadata.clone(), events.clone(), &[]).unwrap();
            let mounts = Mounts::open(dir.path(), dir.path(), metadata.clone()).unwrap();
            Bench { dir, collector: Collector { metadata, events, content, snapshots, mounts } }
        };
        // Opening blocks, which the tests' own threads must not.
        std::thread::spawn(open).join().unwrap()
    }

    fn context(&self) -> RequestContext {
        RequestContext::internal(Namespace::new(NAMESPACE).unwrap())
    }

    async fn commit<T: Send + 'static>(
        &self,
        change: impl FnOnce(&mut Transaction) -> Result<T> + Send + 'static,
    ) -> T {
        self.collector.metadata.commit(change).await.unwrap()
    }

    async fn collect(&self) -> Collected {
        Collected { took: Duration::ZERO, ..self.collector.clone().collect(true).await.unwrap().collected }
    }

    async fn blob(&self, context: &RequestContext, bytes: &[u8], labels: &[(&str, &str)]) -> Digest {
        use proto::containerd::services::content::v1::{WriteAction, WriteContentRequest};
        let mut session = Session::new(self.collector.content.clone(), context.clone());
        let request = WriteContentRequest {
            action: WriteAction::Commit.into(),
            r#ref: "put".into(),
            data: bytes.to_vec().into(),
            labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
            ..WriteContentRequest::default()
        };
        session.step(request).await.unwrap().digest.parse().unwrap()
    }

    async fn snapshot(&self, context: &RequestContext, key: &str, parent: &str) {
        let active = format!("{key}-active");
        let new =
            New { key: active.clone(), parent: parent.into(), labels: Labels::new(), kind: Kind::Active };
        self.collector.snapshots.create(context, "native", new).await.unwrap();
        let layer = crate::snapshots::Layer { key: active, layer: key.into(), ..Default::default() };
        self.collector.snapshots.commit(context, "native", layer).await.unwrap();
    }

    fn blobs(&self) -> usize {
        std::fs::read_dir(self.dir.path().join(FOLDER).join("blobs/sha256")).unwrap().count()
    }

    fn count<R: Record>(&self) -> usize {
        self.collector.metadata.view().list::<R>(&[]).len()
    }
}

fn image(name: &str, digest: &str, labels: &[(&str, &str)]) -> Image {
    Image {
        name: name.into(),
        target: Some(Descriptor { digest: digest.into(), ..Descriptor::default() }),
        labels: labels.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect(),
        ..Image::default()
    }
}

#[tokio::test]
async fn what_nothing_holds_goes_from_records_and_disk() {
    let bench = Bench::new();
    let leases = Leases::new(bench.collector.metadata.clone());
    let lease = leases.create(&bench.context(), "l".into(), Labels::new()).await.unwrap();
    let leased = bench.context().with_lease(&lease.id);
    let layer = bench.blob(&leased, b"layer", &[]).await;
    let config = bench.blob(&leased, b"config", &[("containerd.io/gc.ref.snapshot.native", "top")]).await;
    let labels = [
        ("containerd.io/gc.ref.content.config", config.as_str()),
        ("containerd.io/gc.ref.content.l.0", layer.as_str()),
    ];
    let manifest = bench.blob(&leased, b"manifest", &labels).await;
    bench.snapshot(&leased, "base", "").await;
    bench.snapshot(&leased, "top", "base").await;
    let mut events = bench.collector.events.subscribe(&[]).unwrap();
    assert_eq!(bench.collect().await, Collected::default());
    let name = manifest.to_string();
    bench.commit(move |txn| txn.put(&[NAMESPACE, "i"], &image("i", &name, &[]))).await;
    leases.delete(&leased, lease.id).await.unwrap();
    assert_eq!(bench.collect().await, Collected::default(), "the image holds all of it");
    let container =
        Container { snapshotter: "native".into(), snapshot_key: "base".into(), ..Container::default() };
    bench.commit(move |txn| txn.put(&[NAMESPACE, "c"], &container)).await;
    bench.commit(|txn| txn.delete::<Image>(&[NAMESPACE, "i"])).await;
    assert_eq!(bench.collect().await, Collected { content: 3, snapshots: 1, ..Collected::default() });
    assert_eq!((bench.blobs(), bench.count::<BlobRecord>()), (0, 0));
    bench.commit(|txn| txn.delete::<Container>(&[NAMESPACE, "c"])).await;
    assert_eq!(bench.collect().await, Collected { snapshots: 1, ..Collected::default() });
    assert_eq!(bench.count::<SnapshotRecord>(), 0);
    let left = std::fs::read_dir(bench.dir.path().join("io.containerd.snapshotter.v1.native/snapshots"));
    assert_eq!(left.map_or(0, Iterator::count), 0);
    let mut topics = BTreeMap::new();
    while topics.values().sum::<i32>() < 5 {
        *topics.entry(events.next().await.unwrap().unwrap().topic.clone()).or_insert(0) += 1;
    }
    let expected = [("/content/delete".to_owned(), 3), ("/snapshot/remove".to_owned(), 2)];
    assert_eq!(topics, BTreeMap::from(expected));
    assert_eq!(bench.collect().await, Collected::default());
}

#[tokio::test]
async fn what_expires_goes_with_what_it_held() {
    let bench = Bench::new();
    let leases = Leases::new(bench.collector.metadata.clone());
    let expired = [("containerd.io/gc.expire".to_owned(), rfc3339(hours(-1)))];
    let lease = leases.create(&bench.context(), "l".into(), expired.clone().into()).await.unwrap();
    let leased = bench.context().with_lease(&lease.id);
    let blob = bench.blob(&leased, b"x", &[]).await;
    bench.snapshot(&leased, "s", "").await;
    bench.collector.content.writer(&leased, "leased".into(), 0, None).await.unwrap().suspend();
    bench.collector.content.writer(&bench.context(), "free".into(), 0, None).await.unwrap().suspend();
    let name = blob.to_string();
    bench
        .commit(move |txn| {
            let mut expiring = image("i", &name, &[]);
            expiring.labels.extend(expired);
            txn.put(&[NAMESPACE, "i"], &expiring)?;
            let old = IngestRecord {
                key: "default/0/old".into(),
                expires_at: Some(hours(-1).into()),
                ..IngestRecord::default()
            };
            txn.put(&[NAMESPACE, "old"], &old)
        })
        .await;
    let collected = bench.collect().await;
    let expected =
        Collected { content: 1, snapshots: 1, images: 1, leases: 1, ingests: 2, ..Collected::default() };
    assert_eq!(collected, expected);
    assert_eq!((bench.count::<LeaseResource>(), bench.count::<IngestRecord>(), bench.blobs()), (0, 1, 0));
    let ingests = std::fs::read_dir(bench.dir.path().join(FOLDER).join("ingest")).unwrap();
    assert_eq!(ingests.count(), 1, "the one that has a day left");
}

#[tokio::test]
async fn what_changes_between_the_marking_and_the_removal_is_spared() {
    let bench = Bench::new();
    let context = bench.context();
    let child = bench.blob(&context, b"child", &[]).await;
    let parent = bench.blob(&context, b"parent", &[("containerd.io/gc.ref.content", child.as_str())]).await;
    let other = bench.blob(&context, b"other", &[]).await;
    bench.snapshot(&context, "base", "").await;
    bench.snapshot(&context, "loose", "").await;
    bench.commit(|txn| txn.put(&[NAMESPACE, "l"], &Lease::default())).await;
    let metadata = &bench.collector.metadata;
    let view = metadata.view();
    let (mut marked, _) = mark_all(&view, *NOW);
    assert_eq!(marked.len(), 1);
    // Meanwhile: an image over the parent, a snapshot upon the base.
    let name = parent.to_string();
    bench.commit(move |txn| txn.put(&[NAMESPACE, "i"], &image("i", &name, &[]))).await;
    let new = New { key: "active".into(), parent: "base".into(), labels: Labels::new(), kind: Kind::Active };
    bench.collector.snapshots.create(&context, "native", new).await.unwrap();
    let removed = bench
        .commit(move |txn| {
            let changes = txn.changes_since(&view);
            let changes: Vec<&[String]> = changes.iter().map(Vec::as_slice).collect();
            marked[0].remove(txn, &changes, *NOW)
        })
        .await;
    assert_eq!(removed.content, [other.to_string()]);
    assert_eq!(removed.snapshots.iter().map(|(_, key, _)| key.as_str()).collect::<Vec<_>>(), ["loose"]);

    // A lease takes what nothing held.
    bench.commit(|txn| txn.delete::<SnapshotRecord>(&[NAMESPACE, "native", "active"])).await;
    let view = metadata.view();
    let (mut marked, _) = mark_all(&view, *NOW);
    let namespace = Namespace::new(NAMESPACE).unwrap();
    bench.commit(move |txn| leases::add_resource(txn, &namespace, "l", "snapshots/native", "base")).await;
    let removed = bench
        .commit(move |txn| {
            let changes = txn.changes_since(&view);
            let changes: Vec<&[String]> = changes.iter().map(Vec::as_slice).collect();
            marked[0].remove(txn, &changes, *NOW)
        })
        .await;
    assert!(removed.snapshots.is_empty(), "{removed:?}");
}

/// A record of the images' table that is no image.
#[derive(Clone, PartialEq, prost::Message)]
struct Damaged {
    #[prost(uint64, tag = "1")]
    number: u64,
}

impl Record for Damaged {
    const TABLE: &'static str = Image::TABLE;
}

#[tokio::test]
async fn a_damaged_record_stops_the_collection_of_its_namespace_alone() {
    let bench = Bench::new();
    bench.blob(&bench.context(), b"x", &[]).await;
    bench.commit(|txn| txn.put(&[NAMESPACE, "i"], &Damaged { number: 7 })).await;
    let other = RequestContext::internal(Namespace::new("other").unwrap());
    bench.blob(&other, b"y", &[]).await;
    assert_eq!(bench.collect().await, Collected { content: 1, ..Collected::default() });
    assert_eq!(bench.blobs(), 1);
    bench.commit(|txn| txn.delete::<Damaged>(&[NAMESPACE, "i"])).await;
    assert_eq!(bench.collect().await, Collected { content: 1, ..Collected::default() });
    assert_eq!(bench.blobs(), 0);
}

#[tokio::test]
async fn files_that_no_record_names_go_once() {
    let bench = Bench::new();
    let digest = bench.blob(&bench.context(), b"x", &[("containerd.io/gc.root", "x")]).await;
    bench.blob(&bench.context(), b"y", &[("containerd.io/gc.root", "x")]).await;
    bench.commit(move |txn| txn.delete::<BlobRecord>(&[NAMESPACE, digest.as_str()])).await;
    assert_eq!(bench.blobs(), 2);
    assert_eq!(bench.collect().await, Collected::default());
    assert_eq!(bench.blobs(), 1);
}

#[tokio::test]
async fn who_asks_gets_a_collection_that_began_later() {
    let bench = Bench::new();
    let Collector { metadata, events, content, snapshots, mounts } = bench.collector.clone();
    let settings = Settings { startup_delay: Duration::ZERO, ..Settings::default() };
    let (gc, scheduler) = Gc::new(settings, metadata, events, content, snapshots, mounts);
    let running = tokio::spawn(scheduler.run());
    for number in 0..20_u8 {
        bench.blob(&bench.context(), &[number], &[]).await;
        let mut asked = Vec::new();
        for _ in 0..4 {
            let gc = gc.clone();
            asked.push(tokio::spawn(async move { gc.collect().await.unwrap() }));
        }
        for asked in asked {
            asked.await.unwrap();
        }
        assert_eq!(bench.blobs(), 0);
    }
    let missing = gc.explain(&bench.context(), "nothing".into(), String::new()).await.unwrap();
    assert_eq!(missing, None);
    drop(gc);
    running.await.unwrap();
}

#[tokio::test]
async fn changes_are_those_that_a_comparison_finds() {
    let bench = Bench::new();
    // A small generator of numbers, the same in each run.
    let mut state = 1_u64;
    let mut random = move |below: u64| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) % below
    };
    for round in 0..60 {
        let view = bench.collector.metadata.view();
        for _ in 0..random(4) {
            let steps: Vec<(u64, u64)> = (0..random(80)).map(|_| (random(400), random(3))).collect();
            bench
                .commit(move |txn| {
                    for (key, action) in steps {
                        let key = [NAMESPACE, &format!("k{key}")];
                        match action {
                            0 => drop(txn.delete::<BlobRecord>(&key)?),
                            size => {
                                txn.put(&key, &BlobRecord { size: size as i64, ..BlobRecord::default() })?;
                            }
                        }
                    }
                    Ok(())
                })
                .await;
        }
        bench
            .commit(move |txn| {
                let before: BTreeMap<_, _> = view.list::<BlobRecord>(&[]).into_iter().collect();
                let expected: BTreeSet<Vec<String>> = txn
                    .list::<BlobRecord>(&[])
                    .into_iter()
                    .filter(|(key, record)| before.get(key) != Some(record))
                    .map(|(key, _)| key)
                    .collect();
                let found = txn.changes_since(&view).into_iter().filter(|key| key[0] == BlobRecord::TABLE);
                let found: BTreeSet<Vec<String>> = found.map(|key| key[1..].to_vec()).collect();
                assert_eq!(found, expected, "round {round}");
                Ok(())
            })
            .await;
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn what_clients_make_under_leases_survives_collections_beside_them() {
    let bench = std::sync::Arc::new(Bench::new());
    let stop = std::sync::Arc::new(std::sync::atomic::AtomicBool::new(false));
    let collecting = {
        let (bench, stop) = (bench.clone(), stop.clone());
        tokio::spawn(async move {
            let mut removed = 0;
            while !stop.load(std::sync::atomic::Ordering::Relaxed) {
                removed += bench.collect().await.content;
            }
            removed
        })
    };
    let mut clients = Vec::new();
    for client in 0..4 {
        let bench = bench.clone();
        clients.push(tokio::spawn(async move {
            let leases = Leases::new(bench.collector.metadata.clone());
            for round in 0..15 {
                let id = format!("{client}-{round}");
                let lease = leases.create(&bench.context(), id.clone(), Labels::new()).await.unwrap();
                let leased = bench.context().with_lease(&lease.id);
                // One layer that all share, which is found there or made anew, and one of its own.
                let write = async |bytes: &[u8], labels: &[(&str, &str)]| {
                    use proto::containerd::services::content::v1::{WriteAction, WriteContentRequest};
                    let digest = Digest::sha256_of(bytes);
                    let request = WriteContentRequest {
                        action: WriteAction::Commit.into(),
                        r#ref: format!("{id}-{digest}"),
                        expected: digest.to_string(),
                        data: bytes.to_vec().into(),
                        labels: labels
                            .iter()
                            .map(|(key, to)| ((*key).to_owned(), (*to).to_owned()))
                            .collect(),
                        ..WriteContentRequest::default()
                    };
                    match Session::new(bench.collector.content.clone(), leased.clone()).step(request).await {
                        Ok(_) | Err(Error::AlreadyExists(_)) => digest,
                        Err(error) => panic!("{error}"),
                    }
                };
                let shared = write(b"shared", &[]).await;
                let own = write(id.as_bytes(), &[]).await;
                let labels = [
                    ("containerd.io/gc.ref.content.l.0", shared.as_str()),
                    ("containerd.io/gc.ref.content.l.1", own.as_str()),
                ];
                let manifest = write(format!("manifest {id}").as_bytes(), &labels).await;
                let (name, target) = (id.clone(), manifest.to_string());
                bench.commit(move |txn| txn.put(&[NAMESPACE, &name], &image(&name, &target, &[]))).await;
                leases.delete(&leased, lease.id).await.unwrap();
                for digest in [&shared, &own, &manifest] {
                    let context = bench.context();
                    bench.collector.content.open_blob(&context, digest).unwrap();
                }
                bench
                    .commit(move |txn| {
                        txn.release();
                        txn.delete::<Image>(&[NAMESPACE, &id])
                    })
                    .await;
            }
        }));
    }
    for client in clients {
        client.await.unwrap();
    }
    stop.store(true, std::sync::atomic::Ordering::Relaxed);
    assert!(collecting.await.unwrap() > 0, "collections and clients never met");
    bench.collect().await;
    assert_eq!(bench.blobs(), 0);
}
