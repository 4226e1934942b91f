//! Pictures that nobody looked at, and what is made of them.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use oci::Digest;
use proptest::prelude::*;
use proto::containerd::services::containers::v1::Container;
use proto::containerd::services::images::v1::Image;
use proto::containerd::services::leases::v1::Lease;
use proto::containerd::types::{Descriptor, Sandbox};
use snapshotter::{Info, Kind, Stored, StoredSnapshot, Usage};

use super::judge::{Judgement, judge};
use super::repair::{Done, plan};
use super::world::*;
use super::{Action, Class, Finding};
use crate::error::Result;
use crate::metadata::content::{BlobRecord, IngestRecord};
use crate::metadata::cri::{ContainerStage, PodContainerRecord, PodRecord, PodStage};
use crate::metadata::leases::LeaseResource;
use crate::metadata::snapshots::{CommitRecord, SnapshotChild, SnapshotRecord};
use crate::metadata::{Metadata, Transaction};

const OVERLAY: &str = "overlayfs";

/// A picture with these records and nothing else.
fn world(records: impl FnOnce(&mut Transaction) -> Result<()> + Send + 'static) -> World {
    let folder = tempfile::tempdir().unwrap();
    let metadata = Metadata::open(folder.path()).unwrap();
    metadata.commit_blocking(records).unwrap();
    World {
        now: UNIX_EPOCH + Duration::from_secs(1_000_000),
        root: "/root".into(),
        state: "/state".into(),
        given_state: "/state".into(),
        ..World::empty(metadata.view())
    }
}

/// Class, kind and name of each finding.
fn shown(judgement: &Judgement) -> Vec<String> {
    let line = |of: &Finding| format!("{} {} {}", of.class, of.kind, of.name);
    judgement.findings.iter().map(line).collect()
}

fn stored(key: &str, parent: &str, kind: Kind, id: u64) -> StoredSnapshot {
    let (created, updated) = (UNIX_EPOCH, UNIX_EPOCH);
    let info =
        Info { key: key.into(), kind, parent: parent.into(), labels: BTreeMap::new(), created, updated };
    StoredSnapshot { info, id, usage: Usage::default(), content: format!("/x/{id}/fs").into(), there: true }
}

fn put_snapshot(txn: &mut Transaction, name: &str, inner: &str, parent: &str) -> Result<()> {
    let record = SnapshotRecord { inner: inner.into(), parent: parent.into(), ..SnapshotRecord::default() };
    txn.put(&["ns", OVERLAY, name], &record)?;
    if parent.is_empty() { Ok(()) } else { txn.put(&["ns", OVERLAY, parent, name], &SnapshotChild {}) }
}

fn stage(snapshots: Vec<StoredSnapshot>) -> BTreeMap<String, std::result::Result<Stored, String>> {
    let folders = snapshots.iter().map(|one| one.id.to_string()).collect();
    [(OVERLAY.to_owned(), Ok(Stored { snapshots, folders, torn: 0 }))].into()
}

fn bundle(id: &str, served: bool) -> Bundle {
    Bundle {
        of: Of::Container,
        namespace: "ns".into(),
        id: id.into(),
        path: Path::new("/state/io.containerd.runtime.v2.task/ns").join(id),
        end: None,
        socket: Some(Path::new("/run/s").join(id)),
        served,
    }
}

#[test]
fn where_all_is_in_order_nothing_is_found() {
    let digest = Digest::sha256_of(b"x").to_string();
    let blob = digest.clone();
    let mut world = world(move |txn| {
        txn.put(&["ns", &blob], &BlobRecord { size: 1, ..BlobRecord::default() })?;
        let target = Some(Descriptor { digest: blob, size: 1, ..Descriptor::default() });
        txn.put(&["ns", "image"], &Image { name: "image".into(), target, ..Image::default() })?;
        put_snapshot(txn, "layer", "ns/1/layer", "")?;
        put_snapshot(txn, "own", "ns/2/own", "layer")?;
        let (snapshotter, snapshot_key) = (OVERLAY.into(), "own".into());
        txn.put(&["ns", "c"], &Container { snapshotter, snapshot_key, ..Container::default() })
    });
    world.content.blobs.insert(digest, Some(1));
    world.snapshotters = stage(vec![
        stored("ns/1/layer", "", Kind::Committed, 1),
        stored("ns/2/own", "ns/1/layer", Kind::Active, 2),
    ]);
    world.bundles.push(bundle("c", true));
    world.shims.push(Shim {
        pid: 7,
        started: 1,
        namespace: "ns".into(),
        id: "c".into(),
        bundle: Some(world.bundles[0].path.clone()),
        sockets: BTreeSet::new(),
    });
    world.mounts.push(MountPoint { at: world.bundles[0].path.join("rootfs"), source: "overlay".into() });
    let judgement = judge(&world);
    assert_eq!(shown(&judgement), [""; 0]);
    assert!(judgement.awaiting.is_empty() && judgement.not_checked.is_empty(), "{judgement:?}");
    assert_eq!(judgement.checked.get("snapshots"), Some(&2));
}

#[test]
fn blobs_and_ingests() {
    let of = |text: &str| Digest::sha256_of(text.as_bytes()).to_string();
    let records = ["short", "gone", "folder", "whole"].map(of);
    let digests = records.clone();
    let mut world = world(move |txn| {
        for digest in &digests {
            let labels = [("containerd.io/gc.root".to_owned(), String::new())].into();
            txn.put(&["ns", digest], &BlobRecord { size: 9, labels, ..BlobRecord::default() })?;
        }
        let missing = Descriptor { digest: of("never"), ..Descriptor::default() };
        txn.put(&["ns", "image"], &Image { target: Some(missing), ..Image::default() })?;
        txn.put(&["ns", "ref"], &IngestRecord { key: "ns/1/ref".into(), ..IngestRecord::default() })?;
        txn.put(&["ns", "gone", "content", &of("x")], &LeaseResource {})
    });
    let [short, gone, folder, whole] = records;
    world.content.blobs =
        [(short.clone(), Some(5)), (folder.clone(), None), (whole, Some(9)), (of("unnamed"), Some(1))].into();
    world.content.strays.push("/root/blobs/sha256/odd".into());
    world.content.ingests.insert("ab".into(), true);
    let judgement = judge(&world);
    let mut expected = vec![
        format!("lost blob ns/{short}"),
        format!("lost blob ns/{gone}"),
        format!("lost blob ns/{folder}"),
        "lost image ns/image".into(),
        "leaked file /root/blobs/sha256/odd".into(),
        format!("leaked lease resource ns/gone/content/{}", of("x")),
        "pending ingest ab".into(),
        "pending ingest ns/ref".into(),
    ];
    expected[..3].sort();
    assert_eq!(shown(&judgement), expected);
    assert_eq!(judgement.awaiting, [("files of blobs", 1), ("ingest", 1)].into());
    let actions: BTreeSet<_> = judgement.findings.iter().filter_map(|of| of.repair.clone()).collect();
    assert!(actions.contains(&Action::ForgetBlob { digest: short }));
    assert!(actions.contains(&Action::RemoveTree { path: "/root/blobs/sha256/odd".into() }));
}

#[test]
fn snapshots_whose_folder_or_record_is_gone() {
    let records = |txn: &mut Transaction| {
        put_snapshot(txn, "layer", "ns/1/layer", "")?;
        put_snapshot(txn, "upper", "ns/2/upper", "layer")?;
        put_snapshot(txn, "none", "ns/3/none", "")?;
        put_snapshot(txn, "committing", "ns/4/committing", "")?;
        let intent =
            CommitRecord { key: "committing".into(), inner: "ns/4/committing".into(), ..Default::default() };
        txn.put(&["ns", OVERLAY, "ns/5/done"], &intent)
    };
    let mut lost = stored("ns/1/layer", "", Kind::Committed, 1);
    lost.there = false;
    let snapshots = vec![
        lost,
        stored("ns/2/upper", "ns/1/layer", Kind::Committed, 2),
        stored("ns/5/done", "", Kind::Committed, 5),
        stored("ns/6/half", "", Kind::Active, 6),
    ];
    let mut world = world(records);
    world.snapshotters = stage(snapshots.clone());
    if let Some(Ok(stored)) = world.snapshotters.get_mut(OVERLAY) {
        stored.folders.extend(["9", ".8", "odd", "lost+found"].map(str::to_owned));
    }
    let judgement = judge(&world);
    let folder = "/root/io.containerd.snapshotter.v1.overlayfs/snapshots";
    let expected = [
        "lost snapshot ns/overlayfs/layer".to_owned(),
        "lost snapshot ns/overlayfs/none".into(),
        format!("leaked snapshot folder {folder}/odd"),
        "pending snapshot ns/overlayfs/".into(),
        "pending snapshot ns/overlayfs/committing".into(),
        "pending snapshot overlayfs:ns/6/half".into(),
        format!("pending snapshot folder {folder}/.8"),
        format!("pending snapshot folder {folder}/9"),
    ];
    assert_eq!(shown(&judgement), expected);
    // With what is stacked on it, from the top.
    let names = vec![("upper".into(), "ns/2/upper".into()), ("layer".into(), "ns/1/layer".into())];
    let forget = Action::ForgetSnapshots { namespace: "ns".into(), snapshotter: OVERLAY.into(), names };
    assert_eq!(judgement.findings[0].repair, Some(forget));

    // Somebody's container stands on it.
    let mut world = self::world(move |txn| {
        records(txn)?;
        let (snapshotter, snapshot_key) = (OVERLAY.into(), "upper".into());
        txn.put(&["ns", "c"], &Container { snapshotter, snapshot_key, ..Container::default() })
    });
    world.snapshotters = stage(snapshots);
    let judgement = judge(&world);
    assert_eq!(judgement.findings[0].repair, None);
    assert!(judgement.findings[0].remedy.contains("container c"), "{:?}", judgement.findings[0]);

    // Its disk is not mounted, more likely than not: nothing is touched.
    world.snapshotters.clear();
    let judgement = judge(&world);
    assert_eq!(judgement.findings[0].kind, "snapshotter");
    assert_eq!(judgement.findings.iter().filter(|of| of.repair.is_some()).count(), 0);
}

#[test]
fn who_is_stacked_on_whom_is_recorded_twice() {
    let mut world = world(|txn| {
        put_snapshot(txn, "layer", "ns/1/layer", "")?;
        let record =
            SnapshotRecord { inner: "ns/2/own".into(), parent: "layer".into(), ..SnapshotRecord::default() };
        txn.put(&["ns", OVERLAY, "own"], &record)?;
        txn.put(&["ns", OVERLAY, "layer", "gone"], &SnapshotChild {})
    });
    world.snapshotters = stage(vec![
        stored("ns/1/layer", "", Kind::Committed, 1),
        stored("ns/2/own", "ns/1/layer", Kind::Active, 2),
    ]);
    let child = |name: &str| ["ns", OVERLAY, "layer", name].map(str::to_owned);
    let actions: Vec<_> = judge(&world).findings.into_iter().filter_map(|of| of.repair).collect();
    assert_eq!(
        actions,
        [Action::NoteChild { child: child("own") }, Action::ForgetChild { child: child("gone") }]
    );
}

#[test]
fn bundles_are_judged_by_who_names_and_who_serves_them() {
    let mut world = world(|txn| {
        for id in ["runs", "died", "ended", "deleted"] {
            txn.put(&["ns", id], &Container::default())?;
        }
        txn.put(&["ns", "pod"], &Sandbox::default())
    });
    let ended = Bundle { end: Some(End::Dead), ..bundle("ended", false) };
    let deleted = Bundle { end: Some(End::Deleted), ..bundle("deleted", false) };
    let pod = Bundle { of: Of::Sandbox, ..bundle("pod", true) };
    world.bundles = vec![bundle("runs", true), bundle("died", false), ended, deleted, pod];
    world.bundles.extend([bundle("orphan", false), bundle("wild", true), bundle(".half", false)]);
    world.work =
        vec![(Of::Container, "ns".into(), "runs".into()), (Of::Container, "ns".into(), "left".into())];
    let task = "/state/io.containerd.runtime.v2.task/ns";
    let judgement = judge(&world);
    let expected = [
        format!("leaked bundle {task}/wild"),
        format!("pending bundle {task}/.half"),
        format!("pending bundle {task}/deleted"),
        format!("pending bundle {task}/died"),
        format!("pending bundle {task}/orphan"),
        "pending work folder ns/left".into(),
    ];
    assert_eq!(shown(&judgement), expected);
    // What somebody may still want is not ended unasked.
    assert_eq!(judgement.findings[0].repair, None);
}

#[test]
fn what_runs_for_nobody() {
    let mut world = world(|txn| txn.put(&["ns", "c"], &Container::default()));
    world.bundles.push(bundle("c", true));
    let shim = |pid, bundle: Option<&str>, socket: &str| Shim {
        pid,
        started: 5,
        namespace: "ns".into(),
        id: "x".into(),
        bundle: bundle.map(PathBuf::from),
        sockets: [PathBuf::from(socket)].into(),
    };
    world.shims = vec![
        shim(1, Some("/state/io.containerd.runtime.v2.task/ns/c"), "/run/s/c"),
        // The bundle that it was started in is gone; another container is in its hands.
        shim(2, None, "/run/s/c"),
        shim(3, None, "/run/s/x"),
    ];
    let state = |id: &str| RuntimeState {
        root: "/run/runc/ns".into(),
        namespace: "ns".into(),
        id: id.into(),
        bundle: Path::new("/state/io.containerd.runtime.v2.task/ns").join(id),
    };
    world.runtimes = vec![state("c"), state("gone")];
    let group = |id: &str, used| Group {
        namespace: "ns".into(),
        id: id.into(),
        folders: vec![Path::new("/cg/ns").join(id)],
        used,
    };
    world.groups = vec![group("c", true), group("gone", false), group("left", false), group("theirs", true)];
    let socket = |id: &str, served| {
        (Path::new("/run/s").join(id), Socket { namespace: "ns".into(), id: id.into(), served })
    };
    world.sockets = [socket("c", true), socket("stale", false)].into();
    let judgement = judge(&world);
    let expected = [
        "leaked container /run/runc/ns/gone",
        "leaked control group /cg/ns/left",
        "leaked shim 3 of ns/x",
        "leaked shim socket /run/s/stale",
    ];
    assert_eq!(shown(&judgement), expected);
    let kinds: Vec<_> = plan(&judgement.findings, &[]);
    assert!(matches!(
        kinds[..],
        [
            Action::KillShim { pid: 3, started: 5 },
            Action::DeleteContainer { .. },
            Action::RemoveGroup { .. },
            Action::RemoveSocket { .. }
        ]
    ));
    let done = Done { step: kinds[0].clone(), outcome: Err("it stays".into()) };
    assert_eq!(plan(&judgement.findings, &[done]), kinds[1..], "what failed is not tried again");
}

#[test]
fn mounts_are_known_by_their_places() {
    let mut world = world(|txn| {
        txn.put(&["k8s.io", "p"], &PodRecord { stage: PodStage::Ready.into(), ..PodRecord::default() })?;
        put_snapshot(txn, "layer", "ns/1/layer", "")?;
        Ok(())
    });
    let erofs = vec![
        stored("a", "", Kind::Committed, 1),
        stored("b", "a", Kind::Committed, 2),
        stored("c", "b", Kind::View, 3),
        stored("d", "", Kind::Committed, 4),
    ];
    world.snapshotters = stage(vec![stored("ns/1/layer", "", Kind::Committed, 1)]);
    let folders = ["1", "2", "3", "4"].map(str::to_owned).into();
    world.snapshotters.insert("erofs".into(), Ok(Stored { snapshots: erofs, folders, torn: 0 }));
    let layers = "/root/io.containerd.snapshotter.v1.erofs/layers";
    let known = [
        "/root".to_owned(),
        "/root/io.containerd.snapshotter.v1.btrfs".into(),
        "/state/cri/pods/p/shm".into(),
        format!("{layers}/1"),
        format!("{layers}/2"),
        "/elsewhere".into(),
    ];
    let start = [
        format!("{layers}/4"),
        "/root/io.containerd.snapshotter.v1.overlayfs/probe/mount-1-2".into(),
        "/root/mounts/mount-1-2".into(),
        "/state/cri/mounts/x".into(),
        "/state/cri/netns/q".into(),
    ];
    let nobodys = [
        "/root/io.containerd.snapshotter.v1.overlayfs/snapshots/1/fs",
        "/state/io.containerd.runtime.v2.task/x",
    ];
    let all = known.iter().chain(&start).map(String::as_str).chain(nobodys);
    world.mounts = all.map(|at| MountPoint { at: at.into(), source: String::new() }).collect();
    world.loops = vec![("/dev/loop0".into(), "/root/x".into()), ("/dev/loop1".into(), "/root/y".into())];
    world.linked.insert("/dev/loop1".into());
    let judgement = judge(&world);
    let of = |class| -> Vec<String> {
        let of_class =
            judgement.findings.iter().filter(|of: &&Finding| of.class == class && of.kind == "mount");
        of_class.map(|of| of.name.clone()).collect()
    };
    assert_eq!(of(Class::Leaked), nobodys);
    let mut start = start.to_vec();
    start.sort();
    assert_eq!(of(Class::Pending), start);
    let loops: Vec<_> = judgement.findings.iter().filter(|of| of.kind == "loop device").collect();
    assert_eq!(loops.len(), 1);
    assert_eq!(loops[0].name, "/dev/loop0");
}

#[test]
fn pods_are_the_next_starts_to_mend() {
    let mut world = world(|txn| {
        let pod = |stage: PodStage| PodRecord { stage: stage.into(), ..PodRecord::default() };
        let container = |stage: ContainerStage| PodContainerRecord {
            pod: "ready".into(),
            stage: stage.into(),
            ..PodContainerRecord::default()
        };
        txn.put(&["k8s.io", "ready"], &pod(PodStage::Ready))?;
        txn.put(&["k8s.io", "making"], &pod(PodStage::Making))?;
        txn.put(&["k8s.io", "released"], &pod(PodStage::Released))?;
        txn.put(&["k8s.io", "half"], &container(ContainerStage::Making))?;
        txn.put(&["k8s.io", "bare"], &container(ContainerStage::Running))?;
        txn.put(&["k8s.io", "fine"], &container(ContainerStage::Running))?;
        txn.put(&["k8s.io", "fine"], &Container::default())?;
        // Its snapshot is yet to be made, or gone already.
        let (snapshotter, snapshot_key) = (OVERLAY.into(), "half".into());
        txn.put(&["k8s.io", "half"], &Container { snapshotter, snapshot_key, ..Container::default() })
    });
    world.pods = Pods {
        folders: vec!["ready".into(), "gone".into()],
        execs: vec!["exec-1@fine".into(), "exec-2@gone".into(), "odd".into()],
        attached: vec![("ready".into(), "/r/ready".into()), ("released".into(), "/r/released".into())],
        ..Pods::default()
    };
    let expected = [
        "lost pod container bare",
        "leaked fifo folder /state/cri/execs/odd",
        "pending container k8s.io/half",
        "pending fifo folder exec-2@gone",
        "pending network attachment /r/released",
        "pending pod making",
        "pending pod container half",
        "pending pod folder gone",
    ];
    assert_eq!(shown(&judge(&world)), expected);
}

#[test]
fn what_expires_is_counted_and_no_fault() {
    let world = world(|txn| {
        let at = |seconds: u64| {
            let at = SystemTime::UNIX_EPOCH + Duration::from_secs(seconds);
            let at = time::OffsetDateTime::from(at).format(&time::format_description::well_known::Rfc3339);
            [("containerd.io/gc.expire".to_owned(), at.unwrap())].into()
        };
        txn.put(&["ns", "over"], &Lease { id: "over".into(), labels: at(10), ..Lease::default() })?;
        txn.put(&["ns", "long"], &Lease { id: "long".into(), labels: at(2_000_000), ..Lease::default() })
    });
    let judgement = judge(&world);
    assert_eq!(shown(&judgement), [""; 0]);
    assert_eq!(judgement.awaiting, [("lease", 1)].into());
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]
    /// Whatever is lost, nothing that a container stands on goes, nor what anybody writes to.
    #[test]
    fn a_repair_never_takes_what_is_in_use(
        parents in prop::collection::vec(0..8_usize, 8),
        active in prop::collection::vec(any::<bool>(), 8),
        lost in prop::collection::vec(any::<bool>(), 8),
        containers in prop::collection::btree_set(0..8_usize, 0..3),
    ) {
        // Only layers have children.
        let parent = |at: usize| (parents[at] < at && !active[parents[at]]).then_some(parents[at]);
        let name = |at: usize| format!("s{at}");
        let inner = |at: usize| format!("ns/{at}/s{at}");
        let snapshots = (0..8).map(|at| StoredSnapshot {
            there: !lost[at],
            ..stored(
                &inner(at),
                &parent(at).map(inner).unwrap_or_default(),
                if active[at] { Kind::Active } else { Kind::Committed },
                at as u64,
            )
        });
        let snapshots: Vec<_> = snapshots.collect();
        let (records, owners): (Vec<_>, _) =
            ((0..8).map(|at| (name(at), inner(at), parent(at).map(name).unwrap_or_default())).collect(), containers.clone());
        let mut world = world(move |txn| {
            for (name, inner, parent) in &records {
                put_snapshot(txn, name, inner, parent)?;
            }
            for at in owners {
                let (snapshotter, snapshot_key) = (OVERLAY.into(), format!("s{at}"));
                txn.put(&["ns", &format!("c{at}")], &Container { snapshotter, snapshot_key, ..Container::default() })?;
            }
            Ok(())
        });
        world.snapshotters = stage(snapshots);
        let judgement = judge(&world);
        prop_assert_eq!(judgement.findings.len(), lost.iter().filter(|lost| **lost).count());
        for step in plan(&judgement.findings, &[]) {
            let Action::ForgetSnapshots { names, .. } = step else { panic!("{step:?}") };
            let taken: Vec<usize> = names.iter().map(|(name, _)| name[1..].parse().unwrap()).collect();
            for at in &taken {
                prop_assert!(!containers.contains(at), "a container's");
                prop_assert!(!active[*at] || lost[*at], "one that is written to, and is there");
            }
            // Children go before their parents, and none stays behind.
            for at in 0..8 {
                let Some(place) = parent(at).and_then(|parent| taken.iter().position(|of| *of == parent)) else { continue };
                prop_assert!(taken.iter().position(|of| *of == at).is_some_and(|own| own < place));
            }
        }
    }
}
