//! The contract of every snapshotter, run for each: what the engine and its clients rely on.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use snapshotter::{Error, Info, Kind, Labels, Mount, Snapshotter};
use sys::mount::Mounted;

/// A snapshotter on a folder of its own, with a place for mounts.
struct Stage {
    name: &'static str,
    dir: tempfile::TempDir,
    snapshotter: Arc<dyn Snapshotter>,
}

impl Stage {
    fn new(name: &'static str) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let snapshotter = snapshotter::open(name, &dir.path().join("root")).unwrap();
        Stage { name, dir, snapshotter }
    }

    fn reopen(mut self) -> Self {
        drop(std::mem::replace(&mut self.snapshotter, Arc::new(Nothing)));
        self.snapshotter = snapshotter::open(self.name, &self.dir.path().join("root")).unwrap();
        self
    }

    fn mounted(&self, mounts: &[Mount]) -> Mounted {
        Mounted::new(mounts, self.dir.path()).unwrap()
    }

    /// Makes the layer `name` over `parent`, changed by `change`.
    fn layer(&self, name: &str, parent: &str, change: impl FnOnce(&Path)) {
        let key = format!("prepare-{name}");
        let mounts = self.snapshotter.prepare(&key, parent, &Labels::new()).unwrap();
        change(self.mounted(&mounts).path());
        self.snapshotter.commit(name, &key, &Labels::new()).unwrap();
    }

    fn folders(&self) -> usize {
        fs::read_dir(self.dir.path().join("root/snapshots")).unwrap().count()
    }
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
    };
}

contract!(
    prepare_write_commit_and_stack,
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
    if !rustix::process::geteuid().is_root() {
        assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "this test cannot run here");
        println!("SKIPPED: snapshotters mount, which needs root");
        return;
    }
    test(&Stage::new(name));
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
    assert!(matches!(s.mounts("one"), Err(Error::FailedPrecondition(_))));
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
    assert_eq!(s.usage("n").unwrap(), active);
    s.prepare("child", "n", &Labels::new()).unwrap();
    if stage.name == "overlayfs" {
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
    let snapshots = stage.dir.path().join("root/snapshots");
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
        let before = names(&stage.dir.path().join("root/snapshots"));
        stage.snapshotter.prepare(key, "two", &Labels::new()).unwrap();
        own.extend(names(&stage.dir.path().join("root/snapshots")).difference(&before).cloned());
    }
    let lost = |result: snapshotter::Result<()>| match result {
        Err(Error::Lost(text)) => assert!(text.contains("snapshots/"), "{text}"),
        other => panic!("{other:?}"),
    };
    let folder = |id: &str| stage.dir.path().join("root/snapshots").join(id);
    // The folder of an active snapshot, by a hand, or a damaged file system.
    fs::remove_dir_all(folder(&own[0])).unwrap();
    let (path, away) = (folder("2"), stage.dir.path().join("away"));
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
    let stage = Stage::new(stage.name);
    stage.layer("one", "", |root| fs::write(root.join("f"), "1").unwrap());
    let (root, away) = (stage.dir.path().join("root"), stage.dir.path().join("journal"));
    let name = stage.name;
    let Stage { snapshotter, dir, .. } = stage;
    drop(snapshotter);
    fs::rename(root.join("journal"), &away).unwrap();
    match snapshotter::open(name, &root) {
        Err(Error::Lost(text)) => assert!(text.contains("journal"), "{text}"),
        Err(other) => panic!("{other}"),
        Ok(_) => panic!("opened"),
    }
    fs::rename(&away, root.join("journal")).unwrap();
    let stage = Stage { name, snapshotter: snapshotter::open(name, &root).unwrap(), dir };
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
    let depth = if stage.name == "native" { 12 } else { 100 };
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
    if !rustix::process::geteuid().is_root() {
        assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "this test cannot run here");
        println!("SKIPPED: mounting needs root");
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
