//! The contract of every snapshotter, run for each: what the engine and its clients rely on.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::Arc;

use rustix::fs::{Mode, OFlags};
use snapshotter::{Commit, Error, Info, Kind, Labels, Mount, Snapshotter};
use sys::mount::Mounted;

/// A snapshotter on a folder of its own, with a place for mounts. When it goes, so do all snapshots, and nothing may stay
/// mounted.
struct Stage {
    name: &'static str,
    snapshotter: Arc<dyn Snapshotter>,
    base: PathBuf,
    _disk: Option<Mounted>,
    _dir: tempfile::TempDir,
}

impl Stage {
    fn new(name: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = (name == "btrfs").then(|| btrfs(dir.path()));
        let base = disk.as_ref().map_or(dir.path(), Mounted::path).to_owned();
        let snapshotter = snapshotter::open(name, &base.join("root")).unwrap();
        Stage { name, snapshotter, base, _disk: disk, _dir: dir }
    }

    fn root(&self) -> PathBuf {
        self.base.join("root")
    }

    fn reopen(mut self) -> Self {
        self.close();
        self.snapshotter = snapshotter::open(self.name, &self.root()).unwrap();
        self
    }

    /// As a kill leaves it: a snapshotter does nothing when it is dropped.
    fn close(&mut self) {
        self.snapshotter = Arc::new(Nothing);
    }

    fn mounted(&self, mounts: &[Mount]) -> Mounted {
        Mounted::new(mounts, &self.base).unwrap()
    }

    /// Makes the layer `name` over `parent`, changed by `change`.
    fn layer(&self, name: &str, parent: &str, change: impl FnOnce(&Path)) {
        let key = format!("prepare-{name}");
        let mounts = self.snapshotter.prepare(&key, parent, &Labels::new()).unwrap();
        change(self.mounted(&mounts).path());
        self.snapshotter.commit(name, &key, &Labels::new()).unwrap();
    }

    fn folders(&self) -> usize {
        fs::read_dir(self.root().join("snapshots")).unwrap().count()
    }

    /// Where something is mounted beneath the snapshotter's root.
    fn mounts_within(&self) -> Vec<PathBuf> {
        sys::mount::mounts_under(&self.root()).unwrap()
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            for _ in 0..200 {
                let mut keys = Vec::new();
                self.snapshotter
                    .walk(&mut |info| {
                        keys.push(info.key);
                        Ok(())
                    })
                    .unwrap();
                keys.iter().for_each(|key| drop(self.snapshotter.remove(key)));
                if keys.is_empty() {
                    break;
                }
            }
            assert_eq!(self.mounts_within(), Vec::<PathBuf>::new());
            assert!(fs::read_dir(self.root().join("layers")).map_or(0, Iterator::count) == 0);
        }
        // Or the folder could not be removed.
        let _ = sys::mount::unmount_all(&self.root());
    }
}

/// A btrfs of its own, in a file in `folder`.
fn btrfs(folder: &Path) -> Mounted {
    let image = folder.join("btrfs.img");
    fs::File::create(&image).unwrap().set_len(1 << 30).unwrap();
    let made = Command::new("mkfs.btrfs").arg("-q").arg(&image).output().unwrap();
    assert!(made.status.success(), "{made:?}");
    let source = image.display().to_string();
    let mount = Mount { kind: "btrfs".into(), source, target: String::new(), options: vec!["loop".into()] };
    Mounted::new(&[mount], folder).unwrap()
}

/// Stands in while a snapshotter is closed.
struct Nothing;

#[rustfmt::skip]
impl Snapshotter for Nothing {
    fn prepare(&self, _: &str, _: &str, _: &Labels) -> snapshotter::Result<Vec<Mount>> { panic!("closed") }
    fn view(&self, _: &str, _: &str, _: &Labels) -> snapshotter::Result<Vec<Mount>> { panic!("closed") }
    fn mounts(&self, _: &str) -> snapshotter::Result<Vec<Mount>> { panic!("closed") }
    fn commit(&self, _: &str, _: &str, _: &Labels) -> snapshotter::Result<()> { panic!("closed") }
    fn remove(&self, _: &str) -> snapshotter::Result<()> { panic!("closed") }
    fn stat(&self, _: &str) -> snapshotter::Result<Info> { panic!("closed") }
    fn update(&self, _: &Info, _: &[String]) -> snapshotter::Result<Info> { panic!("closed") }
    fn walk(&self, _: &mut dyn FnMut(Info) -> snapshotter::Result<()>) -> snapshotter::Result<()> { panic!("closed") }
    fn usage(&self, _: &str) -> snapshotter::Result<snapshotter::Usage> { panic!("closed") }
    fn cleanup(&self) -> snapshotter::Result<()> { panic!("closed") }
}

fn labels(pairs: &[(&str, &str)]) -> Labels {
    pairs.iter().map(|(key, value)| ((*key).to_owned(), (*value).to_owned())).collect()
}

fn names(root: &Path) -> BTreeSet<String> {
    fs::read_dir(root).unwrap().map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect()
}

fn set(names: &[&str]) -> BTreeSet<String> {
    names.iter().map(|name| (*name).to_owned()).collect()
}

macro_rules! contract {
    ($($test:ident),* $(,)?) => {
        mod overlayfs { $(#[test] fn $test() { super::run("overlayfs", super::$test); })* }
        mod native { $(#[test] fn $test() { super::run("native", super::$test); })* }
        mod btrfs { $(#[test] fn $test() { super::run("btrfs", super::$test); })* }
        mod erofs { $(#[test] fn $test() { super::run("erofs", super::$test); })* }
    };
}

contract!(
    prepare_write_commit_and_stack,
    layers_get_their_parents_when_they_are_committed,
    deletions_and_replacements_show_in_children_only,
    a_view_is_read_only,
    keys_and_names_are_unique,
    states_are_kept_apart,
    removal_goes_from_the_top,
    a_name_can_be_used_again,
    labels_are_updated_by_path,
    walk_sees_everything_once,
    usage_is_of_the_layer_alone,
    everything_is_there_after_a_reopen,
    leftovers_go_at_a_cleanup,
    what_is_lost_is_said_and_not_made_up,
    a_lost_journal_is_no_reason_to_remove,
    mounts_are_stable,
    chains_are_deep,
    the_top_folder_looks_like_the_parents,
    attributes_survive_a_commit,
    many_at_once,
);

fn run(name: &'static str, test: fn(&Stage)) {
    if ready(name) {
        test(&Stage::new(name));
    }
}

/// Whether a snapshotter can be tried here; fails under `make test`, which installs everything.
fn ready(name: &str) -> bool {
    let program = match name {
        "btrfs" => Some("mkfs.btrfs"),
        "erofs" => Some("mkfs.erofs"),
        _ => None,
    };
    let there = |program: &str| {
        let path = std::env::var_os("PATH").unwrap_or_default();
        std::env::split_paths(&path).any(|folder| folder.join(program).is_file())
    };
    let why = match program {
        _ if !rustix::process::geteuid().is_root() => "snapshotters mount, which needs root".to_owned(),
        Some(program) if !there(program) => format!("{program} is not installed"),
        _ => return true,
    };
    assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "this test cannot run here: {why}");
    println!("SKIPPED: {why}");
    false
}

fn prepare_write_commit_and_stack(stage: &Stage) {
    stage.layer("one", "", |root| fs::write(root.join("a"), "1").unwrap());
    stage.layer("two", "one", |root| {
        assert_eq!(fs::read(root.join("a")).unwrap(), b"1");
        fs::write(root.join("b"), "2").unwrap();
        fs::write(root.join("a"), "changed").unwrap();
    });
    let s = &stage.snapshotter;
    let view = stage.mounted(&s.view("v", "two", &Labels::new()).unwrap());
    assert_eq!(names(view.path()), set(&["a", "b"]));
    assert_eq!(fs::read(view.path().join("a")).unwrap(), b"changed");
    let view = stage.mounted(&s.view("w", "one", &Labels::new()).unwrap());
    assert_eq!(fs::read(view.path().join("a")).unwrap(), b"1");
    let info = s.stat("two").unwrap();
    assert_eq!((info.kind, info.parent.as_str()), (Kind::Committed, "one"));
    assert!(matches!(s.stat("prepare-two"), Err(Error::NotFound(_))));
    assert_eq!(s.stat("v").unwrap().kind, Kind::View);
}

fn layers_get_their_parents_when_they_are_committed(stage: &Stage) {
    let s = &stage.snapshotter;
    stage.layer("base", "", |root| {
        fs::write(root.join("a"), "base").unwrap();
        std::os::unix::fs::chown(root, Some(12), Some(34)).unwrap();
        fs::set_permissions(root, fs::Permissions::from_mode(0o711)).unwrap();
    });
    let commit = |name: &str, key: &str, parent: &str| Commit {
        name: name.into(),
        key: key.into(),
        parent: Some(parent.into()),
        labels: labels(&[("l", name)]),
    };
    for key in ["k1", "k2", "k3"] {
        let mounts = s.prepare(key, "", &Labels::new()).unwrap();
        let mounted = stage.mounted(&mounts);
        fs::write(mounted.path().join(key), key).unwrap();
        fs::write(mounted.path().join("a"), key).unwrap();
    }
    if !s.capabilities().contains(&snapshotter::REBASE) {
        let refused = s.commit_stack(&[commit("one", "k1", "base")]);
        assert!(matches!(refused, Err(Error::Unsupported(_))));
        assert!(matches!(s.layers("base"), Err(Error::Unsupported(_))));
        assert_eq!(s.stat("k1").unwrap().kind, Kind::Active);
        return;
    }
    // All or none: a parent that is not there, one that comes later, one that is no layer.
    for wrong in [
        vec![commit("one", "k1", "base"), commit("two", "k2", "none")],
        vec![commit("two", "k2", "one"), commit("one", "k1", "base")],
        vec![commit("one", "k1", "base"), commit("two", "k2", "k3")],
        vec![commit("one", "k1", "base"), commit("one", "k2", "base")],
    ] {
        s.commit_stack(&wrong).unwrap_err();
        assert!(s.stat("one").is_err() && s.stat("two").is_err());
    }
    s.commit_stack(&[commit("one", "k1", "base"), commit("two", "k2", "one"), commit("other", "k3", "base")])
        .unwrap();
    assert_eq!(s.layers("two").unwrap().len(), 3);
    for (name, parent) in [("one", "base"), ("two", "one"), ("other", "base")] {
        let info = s.stat(name).unwrap();
        assert_eq!(
            (info.kind, info.parent.as_str(), &info.labels),
            (Kind::Committed, parent, &labels(&[("l", name)]))
        );
    }
    assert!(matches!(s.remove("base"), Err(Error::FailedPrecondition(_))), "it has children now");
    let view = stage.mounted(&s.view("v", "two", &Labels::new()).unwrap());
    assert_eq!(names(view.path()), set(&["a", "k1", "k2"]));
    assert_eq!(fs::read(view.path().join("a")).unwrap(), b"k2");
    let metadata = fs::metadata(view.path()).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (12, 34, 0o711));
}

fn deletions_and_replacements_show_in_children_only(stage: &Stage) {
    stage.layer("base", "", |root| {
        fs::create_dir_all(root.join("d/sub")).unwrap();
        fs::write(root.join("d/sub/f"), "1").unwrap();
        fs::write(root.join("gone"), "1").unwrap();
        fs::write(root.join("becomes-dir"), "1").unwrap();
        symlink("d", root.join("link")).unwrap();
    });
    stage.layer("top", "base", |root| {
        fs::remove_file(root.join("gone")).unwrap();
        fs::remove_dir_all(root.join("d")).unwrap();
        fs::create_dir(root.join("d")).unwrap();
        fs::remove_file(root.join("becomes-dir")).unwrap();
        fs::create_dir(root.join("becomes-dir")).unwrap();
    });
    let top = stage.mounted(&stage.snapshotter.view("v", "top", &Labels::new()).unwrap());
    assert_eq!(names(top.path()), set(&["d", "becomes-dir", "link"]));
    assert!(names(&top.path().join("d")).is_empty());
    let base = stage.mounted(&stage.snapshotter.view("w", "base", &Labels::new()).unwrap());
    assert_eq!(fs::read(base.path().join("link/sub/f")).unwrap(), b"1");
    assert!(base.path().join("gone").is_file() && base.path().join("becomes-dir").is_file());
}

fn a_view_is_read_only(stage: &Stage) {
    stage.layer("one", "", |root| fs::write(root.join("a"), "1").unwrap());
    stage.layer("two", "one", |root| fs::write(root.join("b"), "1").unwrap());
    for (key, parent) in [("v0", ""), ("v1", "one"), ("v2", "two")] {
        let view = stage.mounted(&stage.snapshotter.view(key, parent, &Labels::new()).unwrap());
        let error = fs::write(view.path().join("x"), "").unwrap_err();
        assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem, "{key}");
    }
}

fn keys_and_names_are_unique(stage: &Stage) {
    let s = &stage.snapshotter;
    stage.layer("one", "", |_| ());
    s.prepare("k", "one", &Labels::new()).unwrap();
    let before = stage.folders();
    for key in ["k", "one"] {
        assert!(matches!(s.prepare(key, "", &Labels::new()), Err(Error::AlreadyExists(_))));
        assert!(matches!(s.view(key, "one", &Labels::new()), Err(Error::AlreadyExists(_))));
    }
    assert!(matches!(s.commit("one", "k", &Labels::new()), Err(Error::AlreadyExists(_))));
    assert_eq!(s.stat("k").unwrap().kind, Kind::Active, "a failed commit changes nothing");
    assert_eq!(stage.folders(), before, "a failed call leaves no folder");
}

fn states_are_kept_apart(stage: &Stage) {
    let s = &stage.snapshotter;
    stage.layer("one", "", |_| ());
    s.prepare("active", "one", &Labels::new()).unwrap();
    s.view("view", "one", &Labels::new()).unwrap();
    for parent in ["active", "view"] {
        assert!(matches!(s.prepare("x", parent, &Labels::new()), Err(Error::InvalidArgument(_))));
    }
    for key in ["one", "view"] {
        assert!(matches!(s.commit("x", key, &Labels::new()), Err(Error::FailedPrecondition(_))), "{key}");
    }
    assert!(matches!(s.mounts("one"), Err(Error::FailedPrecondition(text)) if text.contains("\"one\"")));
    assert!(matches!(s.prepare("", "", &Labels::new()), Err(Error::InvalidArgument(_))));
    assert!(matches!(s.commit("", "active", &Labels::new()), Err(Error::InvalidArgument(_))));
    for missing in [
        s.prepare("x", "nothing", &Labels::new()).err(),
        s.mounts("nothing").err(),
        s.commit("x", "nothing", &Labels::new()).err(),
        s.remove("nothing").err(),
        s.stat("nothing").err(),
        s.usage("nothing").err(),
    ] {
        assert!(matches!(missing, Some(Error::NotFound(_))), "{missing:?}");
    }
}

fn removal_goes_from_the_top(stage: &Stage) {
    let s = &stage.snapshotter;
    stage.layer("one", "", |root| fs::write(root.join("a"), "1").unwrap());
    stage.layer("two", "one", |_| ());
    s.prepare("active", "two", &Labels::new()).unwrap();
    s.view("view", "two", &Labels::new()).unwrap();
    for key in ["one", "two"] {
        assert!(matches!(s.remove(key), Err(Error::FailedPrecondition(_))), "{key}");
    }
    for key in ["active", "view", "two", "one"] {
        s.remove(key).unwrap();
        assert!(matches!(s.stat(key), Err(Error::NotFound(_))));
    }
    assert_eq!(stage.folders(), 0);
}

fn a_name_can_be_used_again(stage: &Stage) {
    let s = &stage.snapshotter;
    for content in ["first", "second"] {
        let mounts = s.prepare("k", "", &Labels::new()).unwrap();
        let mounted = stage.mounted(&mounts);
        assert!(names(mounted.path()).is_empty());
        fs::write(mounted.path().join("f"), content).unwrap();
        drop(mounted);
        s.commit("n", "k", &Labels::new()).unwrap();
        s.remove("n").unwrap();
    }
    // A layer's name may be the key that it had.
    s.prepare("same", "", &Labels::new()).unwrap();
    assert!(matches!(s.commit("same", "same", &Labels::new()), Err(Error::AlreadyExists(_))));
}

fn labels_are_updated_by_path(stage: &Stage) {
    let s = &stage.snapshotter;
    s.prepare("k", "", &labels(&[("a", "1"), ("b.c/d", "2")])).unwrap();
    let created = s.stat("k").unwrap();
    assert_eq!(created.labels, labels(&[("a", "1"), ("b.c/d", "2")]));
    let new = |pairs: &[(&str, &str)]| Info { labels: labels(pairs), ..s.stat("k").unwrap() };
    let updated = s.update(&new(&[("b.c/d", "3"), ("a", "9")]), &["labels.b.c/d".into()]).unwrap();
    assert_eq!(updated.labels, labels(&[("a", "1"), ("b.c/d", "3")]));
    let updated = s.update(&new(&[]), &["labels.a".into()]).unwrap();
    assert_eq!(updated.labels, labels(&[("b.c/d", "3")]));
    let updated = s.update(&new(&[("x", "y"), ("empty", "")]), &[]).unwrap();
    assert_eq!(updated.labels, labels(&[("x", "y")]));
    assert_eq!(s.stat("k").unwrap(), updated);
    assert!(updated.updated > created.updated && updated.created == created.created);
    assert!(matches!(s.update(&new(&[]), &["parent".into()]), Err(Error::InvalidArgument(_))));
    let missing = Info { key: "nothing".into(), ..created };
    assert!(matches!(s.update(&missing, &[]), Err(Error::NotFound(_))));
    s.commit("n", "k", &labels(&[("committed", "yes")])).unwrap();
    assert_eq!(s.stat("n").unwrap().labels, labels(&[("committed", "yes")]));
}

fn walk_sees_everything_once(stage: &Stage) {
    let s = &stage.snapshotter;
    stage.layer("c", "", |_| ());
    s.view("b", "c", &Labels::new()).unwrap();
    s.prepare("a", "c", &Labels::new()).unwrap();
    let mut seen = Vec::new();
    s.walk(&mut |info| {
        // The snapshotter may be asked while it is walked.
        assert_eq!(s.stat(&info.key).unwrap(), info);
        seen.push((info.key, info.kind));
        Ok(())
    })
    .unwrap();
    let expected = [("a", Kind::Active), ("b", Kind::View), ("c", Kind::Committed)];
    assert_eq!(seen, expected.map(|(key, kind)| (key.to_owned(), kind)));
    let stopped = s.walk(&mut |info| Err(Error::NotFound(info.key)));
    assert!(matches!(stopped, Err(Error::NotFound(key)) if key == "a"));
}

fn usage_is_of_the_layer_alone(stage: &Stage) {
    let s = &stage.snapshotter;
    let empty = {
        s.prepare("empty", "", &Labels::new()).unwrap();
        s.usage("empty").unwrap()
    };
    let mounts = s.prepare("k", "", &Labels::new()).unwrap();
    let mounted = stage.mounted(&mounts);
    fs::write(mounted.path().join("f"), vec![7; 100_000]).unwrap();
    sys::fs::sync_tree(mounted.path()).unwrap();
    drop(mounted);
    let active = s.usage("k").unwrap();
    assert_eq!(active.inodes, empty.inodes + 1);
    assert!(active.size >= empty.size + 100_000 && active.size < empty.size + 200_000, "{active:?}");
    s.commit("n", "k", &Labels::new()).unwrap();
    if stage.name == "erofs" {
        let image = s.usage("n").unwrap();
        assert_eq!(image.inodes, 1);
        assert!(image.size >= 100_000 && image.size < 200_000, "{image:?}");
    } else {
        assert_eq!(s.usage("n").unwrap(), active);
    }
    s.prepare("child", "n", &Labels::new()).unwrap();
    if stage.name != "native" {
        assert_eq!(s.usage("child").unwrap(), empty, "a child that changed nothing takes nothing");
    }
}

fn everything_is_there_after_a_reopen(stage: &Stage) {
    // A stage of its own, since this one is borrowed.
    let stage = Stage::new(stage.name);
    stage.layer("one", "", |root| fs::write(root.join("a"), "1").unwrap());
    let mounts = stage.snapshotter.prepare("k", "one", &labels(&[("a", "b")])).unwrap();
    fs::write(stage.mounted(&mounts).path().join("mine"), "2").unwrap();
    let (info, usage) = (stage.snapshotter.stat("k").unwrap(), stage.snapshotter.usage("one").unwrap());
    let stage = stage.reopen();
    assert_eq!(stage.snapshotter.stat("k").unwrap(), info);
    assert_eq!(stage.snapshotter.usage("one").unwrap(), usage);
    assert_eq!(stage.snapshotter.mounts("k").unwrap(), mounts);
    assert_eq!(names(stage.mounted(&mounts).path()), set(&["a", "mine"]));
    stage.snapshotter.commit("two", "k", &Labels::new()).unwrap();
    assert!(matches!(stage.snapshotter.remove("one"), Err(Error::FailedPrecondition(_))));
}

fn leftovers_go_at_a_cleanup(stage: &Stage) {
    let stage = Stage::new(stage.name);
    stage.layer("one", "", |_| ());
    let snapshots = stage.root().join("snapshots");
    // What a crash leaves: a folder that was being made, or being deleted.
    for leftover in ["77/fs/deep", ".78/fs"] {
        fs::create_dir_all(snapshots.join(leftover)).unwrap();
    }
    let stage = stage.reopen();
    assert_eq!(stage.folders(), 3, "an open removes nothing");
    let mounts = stage.snapshotter.prepare("k", "one", &Labels::new()).unwrap();
    stage.snapshotter.cleanup().unwrap();
    assert_eq!(stage.folders(), 2);
    assert_eq!(stage.snapshotter.mounts("k").unwrap(), mounts);
}

fn what_is_lost_is_said_and_not_made_up(stage: &Stage) {
    let stage = Stage::new(stage.name);
    stage.layer("one", "", |root| fs::write(root.join("f"), "1").unwrap());
    stage.layer("two", "one", |_| ());
    let mut own = Vec::new();
    for key in ["k", "l"] {
        let before = names(&stage.root().join("snapshots"));
        stage.snapshotter.prepare(key, "two", &Labels::new()).unwrap();
        own.extend(names(&stage.root().join("snapshots")).difference(&before).cloned());
    }
    let lost = |result: snapshotter::Result<()>| match result {
        Err(Error::Lost(text)) => assert!(text.contains("snapshots/"), "{text}"),
        other => panic!("{other:?}"),
    };
    let folder = |id: &str| stage.root().join("snapshots").join(id);
    // The folder of an active snapshot, by a hand, or a damaged file system.
    fs::remove_dir_all(folder(&own[0])).unwrap();
    let (path, away) = (folder("2"), stage.base.join("away"));
    let stage = stage.reopen();
    let s = &stage.snapshotter;
    lost(s.mounts("k").map(drop));
    lost(s.usage("k").map(drop));
    lost(s.commit("n", "k", &Labels::new()));
    assert_eq!(s.stat("k").unwrap().kind, Kind::Active, "it is known, and can be removed");
    assert!(s.mounts("l").is_ok(), "the rest serves");
    s.remove("k").unwrap();
    // And that of a layer.
    fs::rename(&path, &away).unwrap();
    let before = stage.folders();
    lost(s.prepare("m", "two", &Labels::new()).map(drop));
    lost(s.view("m", "two", &Labels::new()).map(drop));
    assert!(matches!(s.stat("m"), Err(Error::NotFound(_))));
    assert_eq!(stage.folders(), before, "a failed call leaves no folder");
    let stage = stage.reopen();
    assert!(!path.exists(), "a layer is not made anew, empty");
    fs::rename(&away, &path).unwrap();
    let mounts = stage.snapshotter.prepare("m", "two", &Labels::new()).unwrap();
    assert_eq!(names(stage.mounted(&mounts).path()), set(&["f"]));
}

fn a_lost_journal_is_no_reason_to_remove(stage: &Stage) {
    let mut stage = Stage::new(stage.name);
    stage.layer("one", "", |root| fs::write(root.join("f"), "1").unwrap());
    let (journal, away) = (stage.root().join("journal"), stage.base.join("journal"));
    stage.close();
    fs::rename(&journal, &away).unwrap();
    match snapshotter::open(stage.name, &stage.root()) {
        Err(Error::Lost(text)) => assert!(text.contains("journal"), "{text}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("opened"),
    }
    fs::rename(&away, &journal).unwrap();
    let stage = stage.reopen();
    let mounts = stage.snapshotter.view("v", "one", &Labels::new()).unwrap();
    assert_eq!(names(stage.mounted(&mounts).path()), set(&["f"]));
}

fn mounts_are_stable(stage: &Stage) {
    let s = &stage.snapshotter;
    stage.layer("one", "", |_| ());
    let prepared = s.prepare("k", "one", &Labels::new()).unwrap();
    let viewed = s.view("v", "one", &Labels::new()).unwrap();
    assert_eq!((s.mounts("k").unwrap(), s.mounts("v").unwrap()), (prepared, viewed));
}

fn chains_are_deep(stage: &Stage) {
    let depth = match stage.name {
        // Each is a copy.
        "native" => 12,
        // Each is some transactions of the file system.
        "btrfs" => 25,
        _ => 100,
    };
    let mut parent = String::new();
    for layer in 0..depth {
        let name = format!("layer-{layer}");
        stage.layer(&name, &parent, |root| fs::write(root.join(format!("f{layer}")), "").unwrap());
        parent = name;
    }
    let view = stage.mounted(&stage.snapshotter.view("v", &parent, &Labels::new()).unwrap());
    assert_eq!(names(view.path()).len(), depth);
}

fn the_top_folder_looks_like_the_parents(stage: &Stage) {
    stage.layer("one", "", |root| {
        std::os::unix::fs::chown(root, Some(1234), Some(5678)).unwrap();
        fs::set_permissions(root, fs::Permissions::from_mode(0o1751)).unwrap();
    });
    let mounts = stage.snapshotter.prepare("k", "one", &Labels::new()).unwrap();
    let mounted = stage.mounted(&mounts);
    let metadata = fs::metadata(mounted.path()).unwrap();
    assert_eq!((metadata.uid(), metadata.gid(), metadata.mode() & 0o7777), (1234, 5678, 0o1751));
}

fn attributes_survive_a_commit(stage: &Stage) {
    use rustix::fs::{CWD, FileType, Mode, XattrFlags, mknodat};
    let set_all = |root: &Path| {
        let file = root.join("file");
        fs::write(&file, "x").unwrap();
        fs::hard_link(&file, root.join("hard")).unwrap();
        std::os::unix::fs::chown(&file, Some(1), Some(2)).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o4711)).unwrap();
        rustix::fs::setxattr(&file, "user.test", b"value", XattrFlags::empty()).unwrap();
        mknodat(CWD, root.join("null"), FileType::CharacterDevice, Mode::RUSR, rustix::fs::makedev(1, 3))
            .unwrap();
        mknodat(CWD, root.join("fifo"), FileType::Fifo, Mode::RUSR, 0).unwrap();
        symlink("nowhere", root.join("dangling")).unwrap();
        let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(1_000_000_000);
        fs::File::options().write(true).open(&file).unwrap().set_modified(time).unwrap();
    };
    stage.layer("one", "", set_all);
    let mounts = stage.snapshotter.prepare("k", "one", &Labels::new()).unwrap();
    let mounted = stage.mounted(&mounts);
    let at = |name: &str| -> PathBuf { mounted.path().join(name) };
    let file = fs::metadata(at("file")).unwrap();
    assert_eq!((file.uid(), file.gid(), file.mode() & 0o7777, file.mtime()), (1, 2, 0o4711, 1_000_000_000));
    assert_eq!((file.nlink(), file.ino()), (2, fs::metadata(at("hard")).unwrap().ino()));
    let mut value = [0; 16];
    let length = rustix::fs::getxattr(at("file"), "user.test", &mut value[..]).unwrap();
    assert_eq!(&value[..length], b"value");
    let null = fs::symlink_metadata(at("null")).unwrap();
    assert!(null.file_type().is_char_device() && null.rdev() == rustix::fs::makedev(1, 3));
    assert!(fs::symlink_metadata(at("fifo")).unwrap().file_type().is_fifo());
    assert_eq!(fs::read_link(at("dangling")).unwrap(), Path::new("nowhere"));
}

fn many_at_once(stage: &Stage) {
    stage.layer("base", "", |root| fs::write(root.join("a"), "1").unwrap());
    std::thread::scope(|scope| {
        for thread in 0..8 {
            scope.spawn(move || {
                let s = &stage.snapshotter;
                for i in 0..5 {
                    let (key, name) = (format!("k{thread}-{i}"), format!("n{thread}-{i}"));
                    s.prepare(&key, "base", &Labels::new()).unwrap();
                    s.commit(&name, &key, &Labels::new()).unwrap();
                    s.cleanup().unwrap();
                    s.prepare(&key, &name, &Labels::new()).unwrap();
                    s.remove(&key).unwrap();
                    if i % 2 == 0 {
                        s.remove(&name).unwrap();
                    }
                }
            });
        }
        // Of racers for one key, one wins.
        let racers: Vec<_> = (0..8)
            .map(|_| scope.spawn(|| stage.snapshotter.prepare("raced", "base", &Labels::new()).is_ok()))
            .collect();
        assert_eq!(racers.into_iter().map(|racer| u32::from(racer.join().unwrap())).sum::<u32>(), 1);
    });
    // The base, the raced one, and two layers of each thread.
    assert_eq!(stage.folders(), 18);
}

#[test]
fn an_unknown_name_is_named() {
    let Err(Error::InvalidArgument(message)) = snapshotter::open("zfs", Path::new("/nonexistent")) else {
        panic!("opened")
    };
    assert!(message.contains("overlayfs, native"), "{message}");
}

#[test]
fn overlay_on_overlay_says_what_to_do() {
    if !ready("overlayfs") {
        return;
    }
    // An overlay cannot be an upper layer: the nearest file system at hand that overlayfs refuses.
    let stage = Stage::new("overlayfs");
    stage.layer("one", "", |_| ());
    let mounts = stage.snapshotter.prepare("k", "one", &Labels::new()).unwrap();
    let mounted = stage.mounted(&mounts);
    match snapshotter::open("overlayfs", &mounted.path().join("nested")) {
        Err(Error::Unsupported(message)) => assert!(message.contains("native"), "{message}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("opened on an overlay"),
    }
    snapshotter::open("native", &mounted.path().join("nested-native")).unwrap();
}

fn stage(name: &'static str) -> Option<Stage> {
    ready(name).then(|| Stage::new(name))
}

#[test]
fn btrfs_says_where_it_cannot_be() {
    if !ready("overlayfs") {
        return;
    }
    // A file system that is not btrfs, wherever the test runs.
    let dir = tempfile::tempdir().unwrap();
    let tmpfs = Mount { kind: "tmpfs".into(), source: "tmpfs".into(), ..Mount::default() };
    let tmpfs = Mounted::new(&[tmpfs], dir.path()).unwrap();
    match snapshotter::open("btrfs", &tmpfs.path().join("root")) {
        Err(Error::Unsupported(message)) => assert!(message.contains("must be on a btrfs"), "{message}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("opened on a tmpfs"),
    }
    assert_eq!(names(tmpfs.path()), set(&[]), "and leaves nothing there");
}

#[test]
fn a_btrfs_layer_is_frozen_and_a_cut_off_commit_undone() {
    let Some(stage) = stage("btrfs") else { return };
    stage.layer("one", "", |root| fs::write(root.join("a"), "1").unwrap());
    let of = |id: &str| stage.root().join("snapshots").join(id).join("fs");
    assert!(sys::btrfs::is_read_only(&of("1")).unwrap());
    let error = fs::write(of("1").join("x"), "").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
    stage.snapshotter.prepare("k", "one", &Labels::new()).unwrap();
    // A commit that finds its name taken has frozen nothing in the end.
    assert!(stage.snapshotter.commit("one", "k", &Labels::new()).is_err());
    fs::write(of("2").join("b"), "2").unwrap();
    // A kill within a commit.
    sys::btrfs::set_read_only(&of("2"), true).unwrap();
    let stage = stage.reopen();
    let mounts = stage.snapshotter.mounts("k").unwrap();
    let mounted = stage.mounted(&mounts);
    fs::write(mounted.path().join("c"), "3").unwrap();
    drop(mounted);
    stage.snapshotter.commit("two", "k", &Labels::new()).unwrap();
    let view = stage.mounted(&stage.snapshotter.view("v", "two", &Labels::new()).unwrap());
    assert_eq!(names(view.path()), set(&["a", "b", "c"]));
}

#[test]
fn btrfs_subvolumes_in_a_snapshot_go_with_it() {
    let Some(stage) = stage("btrfs") else { return };
    let mounts = stage.snapshotter.prepare("k", "", &Labels::new()).unwrap();
    let mounted = stage.mounted(&mounts);
    // What a container may do.
    sys::btrfs::create(&mounted.path().join("own")).unwrap();
    sys::btrfs::create(&mounted.path().join("own/deeper")).unwrap();
    fs::write(mounted.path().join("own/deeper/f"), "1").unwrap();
    sys::btrfs::set_read_only(&mounted.path().join("own/deeper"), true).unwrap();
    drop(mounted);
    stage.snapshotter.commit("one", "k", &Labels::new()).unwrap();
    stage.snapshotter.remove("one").unwrap();
    assert_eq!(stage.folders(), 0);
}

/// As a process in a container makes it: by going down, without ever saying the whole path.
#[test]
fn btrfs_subvolumes_at_the_end_of_a_long_path_go_with_a_snapshot() {
    let Some(stage) = stage("btrfs") else { return };
    let mounts = stage.snapshotter.prepare("k", "", &Labels::new()).unwrap();
    let mounted = stage.mounted(&mounts);
    let folder = |at: BorrowedFd<'_>, name: &str| {
        rustix::fs::openat(at, name, OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap()
    };
    let name = "d".repeat(200);
    let mut here: OwnedFd = fs::File::open(mounted.path()).unwrap().into();
    // Paths end at 4,096 bytes.
    for _ in 0..50 {
        rustix::fs::mkdirat(&here, &name, Mode::from_raw_mode(0o755)).unwrap();
        here = folder(here.as_fd(), &name);
    }
    let deep = Path::new("/proc/self/fd").join(here.as_raw_fd().to_string());
    sys::btrfs::create(&deep.join("own")).unwrap();
    fs::create_dir(deep.join("own/folder")).unwrap();
    sys::btrfs::create(&deep.join("own/folder/deeper")).unwrap();
    fs::write(deep.join("own/folder/deeper/f"), "1").unwrap();
    sys::btrfs::set_read_only(&deep.join("own"), true).unwrap();
    drop((here, mounted));
    stage.snapshotter.remove("k").unwrap();
    assert_eq!(stage.folders(), 0);
}

#[test]
fn btrfs_children_share_and_count_what_is_theirs() {
    let Some(stage) = stage("btrfs") else { return };
    stage.layer("one", "", |root| {
        fs::create_dir(root.join("d")).unwrap();
        fs::write(root.join("d/big"), vec![1; 1_000_000]).unwrap();
        fs::write(root.join("d/other"), vec![1; 50_000]).unwrap();
    });
    let mounts = stage.snapshotter.prepare("k", "one", &Labels::new()).unwrap();
    let mounted = stage.mounted(&mounts);
    fs::write(mounted.path().join("d/other"), vec![2; 60_000]).unwrap();
    sys::fs::sync_tree(mounted.path()).unwrap();
    drop(mounted);
    // The top folder, and the file; the folder that holds it has not changed.
    let usage = stage.snapshotter.usage("k").unwrap();
    assert!(usage.inodes == 2 && (60_000..100_000).contains(&usage.size), "{usage:?}");
}

#[test]
fn erofs_layers_are_mounted_for_as_long_as_somebody_stands_on_them() {
    let Some(mut stage) = stage("erofs") else { return };
    for (name, parent) in [("one", ""), ("two", "one"), ("other", "")] {
        stage.layer(name, parent, |root| fs::write(root.join(name), "1").unwrap());
    }
    let layers = stage.root().join("layers");
    assert_eq!(names(&layers), set(&[]));
    let mounts = stage.snapshotter.prepare("k", "two", &Labels::new()).unwrap();
    assert_eq!(mounts.len(), 1, "any client can mount it: {mounts:?}");
    assert_eq!(mounts[0].kind, "overlay");
    stage.snapshotter.view("v", "one", &Labels::new()).unwrap();
    assert_eq!(names(&layers), set(&["1", "2"]));
    stage.snapshotter.remove("k").unwrap();
    assert_eq!(names(&layers), set(&["1"]), "the view stands on it");
    let mounts = stage.snapshotter.prepare("k", "two", &Labels::new()).unwrap();
    // A failed call holds nothing.
    assert!(stage.snapshotter.prepare("k", "other", &Labels::new()).is_err());
    assert_eq!(stage.mounts_within().len(), 2);

    // A container goes on when its layers are taken down beneath it.
    let running = stage.mounted(&mounts);
    stage.close();
    // A reboot: no mount is there. And a kill before layers were taken down: some are there for nobody.
    sys::mount::unmount_all(&stage.root()).unwrap();
    assert_eq!(fs::read(running.path().join("one")).unwrap(), b"1");
    drop(running);
    for stale in ["3", "77"] {
        fs::create_dir_all(layers.join(stale)).unwrap();
        let tmpfs = Mount { kind: "tmpfs".into(), source: "tmpfs".into(), ..Mount::default() };
        tmpfs.mount(&layers.join(stale)).unwrap();
    }
    let stage = stage.reopen();
    assert_eq!(stage.mounts_within(), Vec::<PathBuf>::new());
    assert_eq!(stage.snapshotter.mounts("k").unwrap(), mounts);
    assert_eq!(names(stage.mounted(&mounts).path()), set(&["one", "two"]));
    assert_eq!(names(&layers), set(&["1", "2"]));
    stage.snapshotter.commit("three", "k", &Labels::new()).unwrap();
    assert_eq!(names(&layers), set(&["1"]), "a layer needs none of those beneath it");
    stage.snapshotter.remove("v").unwrap();
    assert_eq!(names(&layers), set(&[]));
}

#[test]
fn an_erofs_layer_is_its_image_alone() {
    let Some(stage) = stage("erofs") else { return };
    stage.layer("one", "", |root| fs::write(root.join("a"), "1").unwrap());
    let folder = stage.root().join("snapshots/1");
    assert_eq!(names(&folder), set(&["layer.erofs"]));
    // A kill right after the commit leaves what the image was made of.
    fs::create_dir_all(folder.join("fs/deep")).unwrap();
    fs::create_dir_all(folder.join("work")).unwrap();
    fs::write(folder.join(".layer.erofs.123"), "half").unwrap();
    let stage = stage.reopen();
    stage.snapshotter.cleanup().unwrap();
    assert_eq!(names(&folder), set(&["layer.erofs"]));
    let view = stage.mounted(&stage.snapshotter.view("v", "one", &Labels::new()).unwrap());
    assert_eq!(names(view.path()), set(&["a"]));
}

#[test]
fn owners_are_mapped_as_labels_say() {
    for name in ["overlayfs", "erofs"] {
        let Some(stage) = stage(name) else { return };
        let s = &stage.snapshotter;
        assert!(s.capabilities().contains(&"remap-ids"), "{name}");
        stage.layer("one", "", |root| {
            fs::write(root.join("root's"), "1").unwrap();
            fs::write(root.join("other's"), "1").unwrap();
            std::os::unix::fs::chown(root.join("other's"), Some(5), Some(6)).unwrap();
        });
        stage.layer("two", "one", |root| fs::write(root.join("above"), "2").unwrap());
        let map = |uids: &str, gids: &str| {
            labels(&[
                ("containerd.io/snapshot/uidmapping", uids),
                ("containerd.io/snapshot/gidmapping", gids),
            ])
        };
        let mapped = map("0:100000:3,3:200000:10", "0:300000:100");
        let owner = |path: PathBuf| {
            let metadata = fs::symlink_metadata(path).unwrap();
            (metadata.uid(), metadata.gid())
        };
        let check = |mounts: &[Mount], above: bool| {
            let mounted = stage.mounted(mounts);
            let at = |name: &str| mounted.path().join(name);
            assert_eq!(owner(at("root's")), (100_000, 300_000), "{name}");
            assert_eq!(owner(at("other's")), (200_002, 300_006));
            assert_eq!(owner(at("")), (100_000, 300_000));
            assert_eq!(at("above").exists(), above);
            mounted
        };
        let mounts = s.prepare("k", "two", &mapped).unwrap();
        let mounted = check(&mounts, true);
        // What is written keeps its owner beneath, and copies of what is in layers get theirs.
        fs::set_permissions(mounted.path().join("root's"), fs::Permissions::from_mode(0o640)).unwrap();
        std::os::unix::fs::chown(mounted.path().join("other's"), Some(100_001), None).unwrap();
        drop(mounted);
        assert_eq!(s.mounts("k").unwrap(), mounts);
        let mounted = stage.mounted(&mounts);
        assert_eq!(owner(mounted.path().join("root's")), (100_000, 300_000));
        assert_eq!(owner(mounted.path().join("other's")), (100_001, 300_006));
        drop(mounted);
        check(&s.view("v2", "two", &mapped).unwrap(), true);
        let view = check(&s.view("v1", "one", &mapped).unwrap(), false);
        assert_eq!(
            fs::write(view.path().join("x"), "").unwrap_err().kind(),
            std::io::ErrorKind::ReadOnlyFilesystem
        );
        let plain = stage.mounted(&s.prepare("plain", "two", &Labels::new()).unwrap());
        assert_eq!(owner(plain.path().join("root's")), (0, 0));
        for (uids, gids) in [("", "0:1:1"), ("0:1", "0:1:1"), ("1:1:1", "0:1:1")] {
            let refused = s.prepare("wrong", "two", &map(uids, gids));
            assert!(matches!(refused, Err(Error::InvalidArgument(_))), "{refused:?}");
        }
    }
}
