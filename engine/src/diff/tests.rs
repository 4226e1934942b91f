//! Layers applied for real: hostile ones, and real ones against what `tar` and the kernel make of them.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, symlink};
use std::process::Command;

use super::*;
use proptest::prelude::*;
use tar::{EntryType, Header};

/// Builds layers byte by byte, hostile names and all.
#[derive(Default)]
struct Layer(Vec<u8>);

impl Layer {
    fn add(mut self, kind: EntryType, path: &str, link: &str, data: &[u8]) -> Self {
        let mut header = Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(data.len() as u64);
        header.set_mode(if kind == EntryType::Directory { 0o755 } else { 0o644 });
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(1_000_000_000);
        header.as_mut_bytes()[..path.len()].copy_from_slice(path.as_bytes());
        header.as_mut_bytes()[157..157 + link.len()].copy_from_slice(link.as_bytes());
        header.set_cksum();
        self.0.extend_from_slice(header.as_bytes());
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    fn file(self, path: &str, data: &str) -> Self {
        self.add(EntryType::Regular, path, "", data.as_bytes())
    }

    fn dir(self, path: &str) -> Self {
        self.add(EntryType::Directory, path, "", b"")
    }

    fn link(self, path: &str, to: &str) -> Self {
        self.add(EntryType::Symlink, path, to, b"")
    }

    fn hard(self, path: &str, to: &str) -> Self {
        self.add(EntryType::Link, path, to, b"")
    }

    fn end(mut self) -> Vec<u8> {
        self.0.extend_from_slice(&[0; 1024]);
        self.0
    }
}

struct Bench {
    dir: tempfile::TempDir,
}

impl Bench {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        for folder in ["upper", "lower", "work", "merged", "plain", "mounts", "outside"] {
            std::fs::create_dir(dir.path().join(folder)).unwrap();
        }
        std::fs::write(dir.path().join("outside/secret"), "s").unwrap();
        Bench { dir }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        self.path(name).to_str().unwrap().to_owned()
    }

    fn overlay(&self) -> Vec<Mount> {
        let option = |name: &str, folder: &str| format!("{name}={}", self.text(folder));
        vec![Mount {
            kind: "overlay".into(),
            source: "overlay".into(),
            target: String::new(),
            options: vec![
                option("workdir", "work"),
                option("upperdir", "upper"),
                option("lowerdir", "lower"),
            ],
        }]
    }

    fn plain(&self) -> Vec<Mount> {
        let options = vec!["rbind".into(), "rw".into()];
        vec![Mount { kind: "bind".into(), source: self.text("plain"), target: String::new(), options }]
    }

    fn apply(&self, mounts: &[Mount], layer: &[u8]) -> Result<Applied> {
        apply(Cursor::new(layer.to_vec()), media_type::OCI_LAYER, None, mounts, &self.path("mounts"), false)
    }

    /// Applies onto an overlay and onto a plain folder with the same lower content.
    fn both(&self, layer: &[u8]) -> (Result<Applied>, Result<Applied>) {
        copy(&self.path("lower"), &self.path("plain"));
        (self.apply(&self.overlay(), layer), self.apply(&self.plain(), layer))
    }

    /// What the overlay shows, merged by the kernel.
    fn merged(&self) -> BTreeMap<String, String> {
        sys::mount::mount_all(&self.overlay(), &self.path("merged")).unwrap();
        let seen = tree(&self.path("merged"));
        sys::mount::unmount_all(&self.path("merged")).unwrap();
        seen
    }

    fn untouched(&self) {
        assert_eq!(std::fs::read_to_string(self.path("outside/secret")).unwrap(), "s");
        let secret = std::fs::metadata(self.path("outside/secret")).unwrap();
        assert_eq!((secret.nlink(), secret.mode() & 0o7777, secret.uid()), (1, 0o644, 0));
        assert_eq!(std::fs::read_dir(self.path("outside")).unwrap().count(), 1);
        assert_eq!(std::fs::read_dir(self.path("mounts")).unwrap().count(), 0);
    }
}

fn copy(from: &Path, to: &Path) {
    let status = Command::new("cp").arg("-aT").arg(from).arg(to).status().unwrap();
    assert!(status.success());
}

/// Every path beneath a folder, with what can be seen of it.
fn tree(root: &Path) -> BTreeMap<String, String> {
    let mut seen = BTreeMap::new();
    let mut todo = vec![root.to_owned()];
    while let Some(folder) = todo.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            let meta = path.symlink_metadata().unwrap();
            let kind = meta.file_type();
            let content = if kind.is_dir() {
                todo.push(path.clone());
                "dir".to_owned()
            } else if kind.is_symlink() {
                format!("-> {}", path.read_link().unwrap().display())
            } else if kind.is_file() {
                format!("{} {}", meta.nlink(), oci::Digest::sha256_of(&std::fs::read(&path).unwrap()))
            } else {
                format!("special {:o} {}", meta.mode() & 0o170_000, meta.rdev())
            };
            let place = Root::open(&folder).unwrap().child(path.file_name().unwrap().as_bytes()).unwrap();
            let mut xattrs = Vec::new();
            for name in place.xattr_names().unwrap() {
                let name = OsStr::from_bytes(&name);
                if !name.as_bytes().starts_with(b"trusted.") {
                    xattrs.push((name.to_owned(), place.xattr(name).unwrap()));
                }
            }
            xattrs.sort();
            // What overlayfs shows of a folder's time is the upper folder's, so it is comparable too.
            let what = format!(
                "{content} {:o} {}:{} {}.{:09} {:?}",
                meta.mode() & 0o7777,
                meta.uid(),
                meta.gid(),
                meta.mtime(),
                meta.mtime_nsec(),
                xattrs,
            );
            seen.insert(path.strip_prefix(root).unwrap().display().to_string(), what);
        }
    }
    seen
}

fn names(root: &Path) -> Vec<String> {
    tree(root).into_keys().collect()
}

#[test]
fn nothing_outside_is_touched() {
    let bench = Bench::new();
    let outside = bench.text("outside");
    let layer = Layer::default()
        .link("abs", &outside)
        .file("abs/new", "x")
        .link("rel", "../outside")
        .file("rel/secret", "changed")
        .file("../outside/secret", "changed")
        .file("/../../etc/hostile-gantry", "x")
        .link("leaf", &format!("{outside}/secret"))
        .file("leaf", "replaced, not followed")
        .link("chmod", &format!("{outside}/secret"))
        .hard("chmodded", "chmod")
        .dir("abs/.wh..wh..opq")
        .file("abs/.wh.secret", "")
        .file("rel/.wh.secret", "")
        .end();
    let (overlay, plain) = bench.both(&layer);
    overlay.unwrap();
    plain.unwrap();
    bench.untouched();
    assert!(!Path::new("/etc/hostile-gantry").exists());
    for folder in ["upper", "plain"] {
        assert!(bench.path(folder).join("etc/hostile-gantry").exists());
        assert_eq!(
            std::fs::read_to_string(bench.path(folder).join("leaf")).unwrap(),
            "replaced, not followed"
        );
        assert!(bench.path(folder).join("chmodded").is_symlink());
    }
}

/// Somebody who can write to the folder makes a symlink of what the layer took for a folder, again and again.
#[test]
fn a_folder_that_becomes_a_symlink_meanwhile_leads_nowhere() {
    let bench = Bench::new();
    let outside = bench.path("outside");
    std::fs::set_permissions(&outside, std::os::unix::fs::PermissionsExt::from_mode(0o750)).unwrap();
    let before = std::fs::metadata(&outside).unwrap();
    let mut layer = Layer::default().dir("a");
    for at in 0..40 {
        layer =
            layer.file(&format!("a/f{at}"), "x").dir(&format!("a/d{at}/e")).file("a/.wh.secret", "").dir("a");
        layer = layer.hard(&format!("h{at}"), "a/secret/../f0").link(&format!("a/l{at}"), "secret");
    }
    let layer = layer.end();
    let done = std::sync::atomic::AtomicBool::new(false);
    for (folder, mounts) in [("plain", bench.plain()), ("upper", bench.overlay())] {
        done.store(false, std::sync::atomic::Ordering::Relaxed);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let (a, aside) = (bench.path(folder).join("a"), bench.path(folder).join("aside"));
                while !done.load(std::sync::atomic::Ordering::Relaxed) {
                    if std::fs::rename(&a, &aside).is_ok() {
                        let _ = symlink(&outside, &a);
                        let _ = std::fs::remove_file(&a);
                        let _ = std::fs::rename(&aside, &a);
                        let _ = std::fs::remove_dir_all(&aside);
                    }
                }
            });
            for _ in 0..3 {
                // Whether it succeeds is chance.
                let _ = bench.apply(&mounts, &layer);
            }
            done.store(true, std::sync::atomic::Ordering::Relaxed);
        });
    }
    bench.untouched();
    let after = std::fs::metadata(&outside).unwrap();
    let facts = |of: &std::fs::Metadata| {
        (of.mode(), of.uid(), of.gid(), of.mtime(), of.mtime_nsec(), of.ctime_nsec())
    };
    assert_eq!(facts(&after), facts(&before));
}

#[test]
fn a_bomb_ends_where_its_limit_is() {
    let bench = Bench::new();
    let zeros = vec![0; 64 << 20];
    let gzip = {
        use std::io::Write as _;
        let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        to.write_all(&zeros).unwrap();
        to.finish().unwrap()
    };
    for bomb in [gzip, zstd::stream::encode_all(&zeros[..], 1).unwrap()] {
        assert!(bomb.len() < 1 << 20);
        let mut target = Target::plain(open_folder(&bench.path("plain")).unwrap());
        let error = unpack_to(&mut target, Cursor::new(bomb), media_type::OCI_LAYER, 1 << 20).unwrap_err();
        assert!(error.to_string().contains("too much for its size"), "{error}");
        assert!(matches!(error, Error::InvalidArgument(_)));
    }
    assert!(most(1 << 20) < 5 << 30, "a layer of a mebibyte may have some gibibytes, and not a disk");
    // A sparse file of a tebibyte takes no room.
    let mut header = Header::new_gnu();
    header.set_entry_type(EntryType::GNUSparse);
    header.set_size(0);
    header.set_mode(0o644);
    header.as_mut_bytes()[..6].copy_from_slice(b"sparse");
    header.as_gnu_mut().unwrap().set_real_size(1 << 40);
    header.set_cksum();
    let layer = [header.as_bytes(), &[0; 1024][..]].concat();
    bench.apply(&bench.plain(), &layer).unwrap();
    let made = std::fs::metadata(bench.path("plain/sparse")).unwrap();
    assert_eq!((made.len(), made.blocks()), (1 << 40, 0));
}

#[test]
fn malformed_layers_are_the_clients_fault() {
    let cases = [
        (Layer::default().hard("x", "../outside/secret").end(), "does not hold"),
        (Layer::default().hard("x", "missing").end(), "does not hold"),
        (Layer::default().dir("d").hard("x", "d").end(), "hard link"),
        (Layer::default().hard("x", "/").end(), "does not hold"),
        (Layer::default().file("a/.wh.", "").end(), "must name"),
        (Layer::default().file("a/.wh...", "").end(), "must name"),
        (Layer::default().file("a/.wh..", "").end(), "must name"),
        (Layer::default().file(".wh.a/b", "").end(), "must not begin with .wh."),
        (Layer::default().file("f", "x").file("f/g", "y").end(), "Not a directory"),
        (Layer::default().link("a", "b").link("b", "a").file("a/x", "").end(), "symbolic links"),
        (Layer::default().file("f", "x").end()[..700].to_vec(), "cut short"),
        (b"no tar at all, only some text that goes on for a while".repeat(20), "malformed"),
        ([&[0x1f, 0x8b, 8, 0][..], &[0; 20]].concat(), "read the layer"),
        ([&[0x28, 0xb5, 0x2f, 0xfd][..], &[0xff; 20]].concat(), "read the layer"),
    ];
    for (layer, words) in cases {
        let bench = Bench::new();
        for mounts in [bench.overlay(), bench.plain()] {
            let error = bench.apply(&mounts, &layer).unwrap_err();
            assert!(matches!(error, Error::InvalidArgument(_) | Error::PermissionDenied(_)), "{error:?}");
            assert!(error.to_string().contains(words), "{error} should say {words:?}");
        }
        bench.untouched();
    }
}

#[test]
fn other_mistakes_have_their_classes() {
    let bench = Bench::new();
    let layer = Layer::default().file("f", "x").end();
    let error =
        apply(Cursor::new(layer.clone()), "text/html", None, &bench.plain(), &bench.path("mounts"), false)
            .unwrap_err();
    assert!(matches!(error, Error::Unimplemented(_)), "{error:?}");
    assert!(matches!(bench.apply(&[], &layer).unwrap_err(), Error::InvalidArgument(_)));
    let mut read_only = bench.plain();
    read_only[0].options = vec!["rbind".into(), "ro".into()];
    assert!(matches!(bench.apply(&read_only, &layer).unwrap_err(), Error::FailedPrecondition(_)));
    let mut nowhere = bench.plain();
    nowhere[0].source = "/nonexistent".into();
    assert!(bench.apply(&nowhere, &layer).is_err());
    bench.untouched();
}

#[test]
fn duplicates_and_replacements() {
    let bench = Bench::new();
    let layer = Layer::default()
        .file("twice", "one")
        .file("twice", "two")
        .file("tree/a/b", "x")
        .file("tree", "now a file")
        .file("file", "x")
        .dir("file")
        .file("file/in", "y")
        .file("one", "linked")
        .hard("two", "one")
        .hard("two", "one")
        .hard("one", "two")
        .dir("dir")
        .file("dir/keep", "k")
        .dir("dir")
        .end();
    let (overlay, plain) = bench.both(&layer);
    assert_eq!(overlay.unwrap(), plain.unwrap());
    for folder in ["upper", "plain"] {
        let folder = bench.path(folder);
        assert_eq!(std::fs::read_to_string(folder.join("twice")).unwrap(), "two");
        assert_eq!(std::fs::read_to_string(folder.join("tree")).unwrap(), "now a file");
        assert_eq!(std::fs::read_to_string(folder.join("file/in")).unwrap(), "y");
        assert_eq!(std::fs::metadata(folder.join("one")).unwrap().nlink(), 2);
        assert!(folder.join("dir/keep").exists());
        // Set last, after the files in it were made.
        assert_eq!(std::fs::metadata(folder.join("dir")).unwrap().mtime(), 1_000_000_000);
    }
}

/// Fills the lower layer with what the whiteout tests delete.
fn fill_lower(bench: &Bench) {
    let lower = bench.path("lower");
    for path in ["gone/x", "opaque/old/x", "opaque/old2", "again/old", "kept/x", "late/old", "deep/a/b/old"] {
        std::fs::create_dir_all(lower.join(path).parent().unwrap()).unwrap();
        std::fs::write(lower.join(path), "lower").unwrap();
    }
    std::fs::write(lower.join("file"), "lower").unwrap();
    symlink("/gone", lower.join("link")).unwrap();
}

#[test]
fn whiteouts_hide_what_is_below_and_nothing_else() {
    let bench = Bench::new();
    fill_lower(&bench);
    let layer = Layer::default()
        .file(".wh.gone", "")
        .file(".wh.file", "")
        .file(".wh.link", "")
        .file(".wh.never-was", "")
        .file("opaque/.wh..wh..opq", "")
        .file("opaque/new", "n")
        // The whiteout comes before the folder that takes its place, and after the one that is there.
        .file(".wh.again", "")
        .dir("again")
        .file("again/new", "n")
        .dir("late")
        .file("late/new", "n")
        .file(".wh.late", "")
        .file("deep/a/new", "n")
        .file("deep/.wh..wh..opq", "")
        .file(".wh..wh.plnk", "aufs")
        .file(".wh..wh.aufs/x", "aufs")
        .end();
    let (overlay, plain) = bench.both(&layer);
    assert_eq!(overlay.unwrap(), plain.unwrap());
    let expected = [
        "again",
        "again/new",
        "deep",
        "deep/a",
        "deep/a/new",
        "kept",
        "kept/x",
        "late",
        "late/new",
        "opaque",
        "opaque/new",
    ];
    assert_eq!(names(&bench.path("plain")), expected);
    assert_eq!(bench.merged().into_keys().collect::<Vec<_>>(), expected);
    let whiteout = bench.path("upper/gone").symlink_metadata().unwrap();
    assert!(whiteout.file_type().is_char_device() && whiteout.rdev() == 0);
}

#[test]
fn an_opaque_root_hides_everything() {
    let bench = Bench::new();
    fill_lower(&bench);
    let layer = Layer::default().file("gone/mine", "x").file(".wh..wh..opq", "").file("new", "n").end();
    let (overlay, plain) = bench.both(&layer);
    overlay.unwrap();
    plain.unwrap();
    let expected = ["gone", "gone/mine", "new"];
    assert_eq!(names(&bench.path("plain")), expected);
    assert_eq!(bench.merged().into_keys().collect::<Vec<_>>(), expected);
}

#[test]
fn folders_that_a_layer_does_not_list_look_as_below() {
    let bench = Bench::new();
    let folder = bench.path("lower/var/data");
    std::fs::create_dir_all(&folder).unwrap();
    std::os::unix::fs::chown(&folder, Some(33), Some(44)).unwrap();
    std::fs::set_permissions(&folder, std::os::unix::fs::PermissionsExt::from_mode(0o2770)).unwrap();
    bench.apply(&bench.overlay(), &Layer::default().file("var/data/f", "x").end()).unwrap();
    let made = std::fs::metadata(bench.path("upper/var/data")).unwrap();
    assert_eq!((made.mode() & 0o7777, made.uid(), made.gid()), (0o2770, 33, 44));
    assert_eq!(made.mtime(), std::fs::metadata(&folder).unwrap().mtime());
}

/// A tree with everything that a file system has.
fn real_tree(root: &Path) {
    let script = r#"
        set -e
        mkdir -p bin etc/deep/er var dev tmp
        echo hello > etc/hello; ln etc/hello etc/hello2; ln -s ../etc/hello bin/link; ln -s /absolute/none bin/dangling
        ln -P bin/link bin/link2
        head -c 3000000 /dev/urandom > var/big
        truncate -s 10M var/sparse; echo end >> var/sparse; printf start | dd of=var/sparse conv=notrunc status=none
        mknod dev/null c 1 3; mknod dev/loop b 7 5; mkfifo dev/pipe
        chown 1000:2000 etc/hello; chown 4000000000:65534 var/big; chmod 4755 var/big; chmod 1777 tmp; chmod 0500 etc/deep
        long=$(printf 'n%.0s' $(seq 200)); mkdir -p "$long/$long"; echo x > "$long/$long/$long"; ln -s "$long/$long" longlink
    "#;
    let run = |script: &str| {
        let status = Command::new("sh").arg("-c").arg(script).current_dir(root).status().unwrap();
        assert!(status.success());
    };
    run(script);
    // With the bytes that a careless pax reader trips over.
    let capability = [1, 0, 0, 2, 0, b'\n', 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
    for (path, name, value) in [
        ("etc/hello", "user.note", &b"two\nlines"[..]),
        ("etc/deep", "user.dir", b"1"),
        ("var/big", "security.capability", &capability),
    ] {
        let place = Root::open(root).unwrap().place(path.as_bytes()).unwrap().unwrap();
        place.set_xattr(OsStr::new(name), value).unwrap();
    }
    run(r#"
        touch -d '2001-02-03 04:05:06.789' etc/hello; touch -h -d '2002-02-03' bin/dangling
        touch -d '2003-03-03' etc/deep etc bin nnn*
        "#);
}

#[test]
fn real_archives_unpack_as_tar_does() {
    let bench = Bench::new();
    let source = bench.path("source");
    std::fs::create_dir(&source).unwrap();
    real_tree(&source);
    for (format, sparse) in [("pax", false), ("gnu", false), ("pax", true), ("gnu", true)] {
        for compression in ["cat", "gzip -1", "zstd -q -1"] {
            let target = Bench::new();
            let archive = target.path("layer");
            let flags = if sparse { "-S" } else { "" };
            let xattrs = if format == "pax" { "--xattrs --xattrs-include=*" } else { "" };
            let script = format!(
                "tar -C {} --format={format} {flags} {xattrs} --numeric-owner -cf - . | {compression} > {}",
                source.display(),
                archive.display()
            );
            if !Command::new("sh").arg("-c").arg(&script).status().unwrap().success() {
                panic!("{script} failed");
            }
            let unpacked = target.path("unpacked");
            std::fs::create_dir(&unpacked).unwrap();
            let status = Command::new("tar")
                .arg("-C")
                .arg(&unpacked)
                .args(["--xattrs", "--xattrs-include=*", "--numeric-owner", "-pxaf"])
                .arg(&archive)
                .status()
                .unwrap();
            assert!(status.success());
            // Compressed is said for all: the first bytes decide.
            let file = std::fs::File::open(&archive).unwrap();
            let applied = apply(
                file,
                media_type::DOCKER_LAYER_GZIP,
                None,
                &target.overlay(),
                &target.path("mounts"),
                true,
            )
            .unwrap();
            let case = format!("{format} {compression} sparse {sparse}");
            assert_eq!(tree(&target.path("upper")), tree(&unpacked), "{case}");
            let plain = Command::new("sh")
                .arg("-c")
                .arg(format!(
                    "case '{compression}' in cat) cat {0};; gzip*) gzip -dc {0};; *) zstd -qdc {0};; esac",
                    archive.display()
                ))
                .output()
                .unwrap()
                .stdout;
            assert_eq!(
                (applied.size, applied.digest),
                (plain.len() as u64, oci::Digest::sha256_of(&plain)),
                "{case}"
            );
            if sparse {
                let blocks = std::fs::metadata(target.path("upper/var/sparse")).unwrap().blocks();
                assert!(blocks * 512 < 1 << 20, "{case}: the holes stay holes, {blocks} blocks");
            }
        }
    }
}

#[test]
fn several_gzip_members_and_trailing_bytes_count() {
    let bench = Bench::new();
    let mut layer = Layer::default().file("f", "x").end();
    layer.extend_from_slice(&[7; 5000]);
    let pack = |bytes: &[u8]| {
        let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
        std::io::Write::write_all(&mut encoder, bytes).unwrap();
        encoder.finish().unwrap()
    };
    let packed = [pack(&layer[..700]), pack(&layer[700..])].concat();
    let applied = bench.apply(&bench.plain(), &packed).unwrap();
    assert_eq!((applied.size, applied.digest), (layer.len() as u64, oci::Digest::sha256_of(&layer)));
    let cut = &packed[..packed.len() - 10];
    assert!(matches!(bench.apply(&bench.plain(), cut), Err(Error::InvalidArgument(_))));
}

#[test]
fn trusted_attributes_do_not_come_from_layers() {
    let bench = Bench::new();
    let records = b"41 SCHILY.xattr.trusted.overlay.opaque=y\n31 SCHILY.xattr.trusted.mine=1\n25 SCHILY.xattr.user.a=b\n";
    let layer = Layer::default().add(EntryType::XHeader, "pax", "", records).dir("d").end();
    bench.apply(&bench.overlay(), &layer).unwrap();
    let place = Root::open(&bench.path("upper")).unwrap().place(b"d").unwrap().unwrap();
    assert_eq!(place.xattr_names().unwrap(), [b"user.a"]);
}

#[test]
fn lower_lists_with_escapes() {
    let paths = |list: &[&str]| list.iter().map(PathBuf::from).collect::<Vec<_>>();
    assert_eq!(split_lower("/a:/b\\:c:/d\\\\"), paths(&["/a", "/b:c", "/d\\"]));
    assert_eq!(split_lower(""), paths(&[]));
}

/// A store with one namespace, for what is made.
struct Store {
    _dir: tempfile::TempDir,
    diff: Diff,
    context: RequestContext,
}

fn store(bench: &Bench) -> Store {
    let dir = tempfile::tempdir().unwrap();
    let root = dir.path().to_owned();
    let mounts = bench.path("mounts");
    // Opening blocks, which the tests' own threads must not.
    let open = move || {
        let metadata = crate::metadata::Metadata::open(&root.join("metadata")).unwrap();
        let content =
            Content::open(&root.join("content"), metadata, crate::events::Exchange::default()).unwrap();
        Diff::open(content, mounts).unwrap()
    };
    let diff = std::thread::spawn(open).join().unwrap();
    let context = RequestContext::internal(crate::context::Namespace::new("a").unwrap());
    Store { _dir: dir, diff, context }
}

fn bind(path: &Path) -> Vec<Mount> {
    let options = vec!["rbind".into(), "rw".into()];
    vec![Mount { kind: "bind".into(), source: path.to_str().unwrap().into(), target: String::new(), options }]
}

#[tokio::test]
async fn a_made_layer_makes_the_tree_again() {
    let bench = Bench::new();
    let store = store(&bench);
    real_tree(&bench.path("lower"));
    // The change is made through the kernel's overlay, and compared as mounts.
    sys::mount::mount_all(&bench.overlay(), &bench.path("merged")).unwrap();
    let script = "set -e
        echo more >> etc/hello; rm -r nnn*; rm var/sparse; ln var/big var/big2; mkdir -p new/dir; echo x > new/dir/file
        rm etc/deep/er -r; mkdir etc/deep/er; ln new/dir/file new/hard; ln -s nowhere new/link; mknod new/dev c 1 5
        chmod 0700 bin; chown 7:3000000 tmp; touch -d '1999-01-01' tmp
        long=$(printf 'm%.0s' $(seq 150)); mkdir -p new/$long/$long; ln -s $long/$long new/long; rm dev/pipe; mkdir dev/pipe";
    let changed =
        Command::new("sh").arg("-c").arg(script).current_dir(bench.path("merged")).status().unwrap();
    assert!(changed.success());
    let mut wanted_tree = tree(&bench.path("merged"));
    sys::mount::unmount_all(&bench.path("merged")).unwrap();
    for media_type in ["", media_type::OCI_LAYER, media_type::OCI_LAYER_ZSTD] {
        let comparison = Comparison {
            left: bind(&bench.path("lower")),
            right: bench.overlay(),
            media_type: media_type.into(),
            ..Comparison::default()
        };
        let made = store.diff.compare(&store.context, comparison).await.unwrap();
        assert!(made.size > 0);
        let info = store.diff.content.info(&store.context, &made.digest.parse().unwrap()).unwrap();
        let target = tempfile::tempdir().unwrap();
        copy(&bench.path("lower"), target.path());
        let layer =
            super::Layer { descriptor: made.clone(), mounts: bind(target.path()), ..Default::default() };
        let applied = store.diff.apply(&store.context, layer).await.unwrap();
        match media_type {
            media_type::OCI_LAYER => assert_eq!(applied.digest, made.digest),
            _ => assert_eq!(info.labels["containerd.io/uncompressed"], applied.digest),
        }
        let mut unpacked = tree(target.path());
        // Layers hold whole seconds, and times of folders change with what is done in them.
        let whole = |tree: &mut BTreeMap<String, String>| {
            for what in tree.values_mut() {
                let dot = what.find('.').unwrap();
                what.replace_range(dot..dot + 10, "");
            }
        };
        whole(&mut unpacked);
        let mut wanted = std::mem::take(&mut wanted_tree);
        wanted_tree.clone_from(&wanted);
        whole(&mut wanted);
        for (path, what) in &wanted {
            assert!(path.contains("nnn") || unpacked.contains_key(path), "{path} is missing");
            if what.starts_with("dir") || path.starts_with("var/big") {
                continue;
            }
            // Without the number of links: overlayfs shows the old one of a file whose other name was copied up.
            let facts = |what: &str| what.split_once(' ').map(|(_, facts)| facts.to_owned());
            assert_eq!(unpacked.get(path).and_then(|what| facts(what)), facts(what), "{path}");
        }
        assert_eq!(unpacked.len(), wanted.len());
        // Overlayfs does not keep links of what it copies up; both names are there with the bytes.
        assert_eq!(
            std::fs::read(target.path().join("var/big")).unwrap(),
            std::fs::read(target.path().join("var/big2")).unwrap()
        );
    }
    assert_eq!(std::fs::read_dir(bench.path("mounts")).unwrap().count(), 0);
}

#[tokio::test]
async fn comparisons_that_cannot_be() {
    let bench = Bench::new();
    let store = store(&bench);
    let with = |media_type: &str, right| Comparison {
        media_type: media_type.into(),
        right,
        ..Comparison::default()
    };
    let compare = async |comparison| store.diff.compare(&store.context, comparison).await.unwrap_err();
    assert!(matches!(compare(with("text/html", bind(&bench.path("lower")))).await, Error::Unimplemented(_)));
    assert!(matches!(compare(with("", Vec::new())).await, Error::InvalidArgument(_)));
    let empty = store.diff.compare(&store.context, with("", bind(&bench.path("lower")))).await.unwrap();
    let again = store.diff.compare(&store.context, with("", bind(&bench.path("lower")))).await.unwrap();
    assert_eq!(empty, again);
    let left = store.diff.content.list_statuses(&store.context, &[]).await.unwrap();
    assert!(left.is_empty(), "no ingest stays: {left:?}");
}

/// One member of a random layer.
#[derive(Debug, Clone)]
enum Step {
    File(String, u8),
    Folder(String, u32),
    Link(String, String),
    Gone(String),
    Opaque(String),
}

fn steps() -> impl Strategy<Value = Vec<Step>> {
    let path = || "[ab](/[ab]){0,3}";
    let step = prop_oneof![
        3 => (path(), any::<u8>()).prop_map(|(path, data)| Step::File(format!("{path}/f"), data)),
        1 => (path(), any::<u8>()).prop_map(|(path, data)| Step::File(path, data)),
        3 => (path(), prop_oneof![Just(0o700), Just(0o2755), Just(0o711)]).prop_map(|(path, mode)| Step::Folder(path, mode)),
        1 => (path(), path()).prop_map(|(path, to)| Step::Link(path, format!("/{to}"))),
        2 => path().prop_map(Step::Gone),
        1 => prop_oneof![Just(String::new()), path().prop_map(String::from)].prop_map(Step::Opaque),
    ];
    prop::collection::vec(step, 0..8)
}

fn layer_of(steps: &[Step]) -> Vec<u8> {
    let beside = |path: &str, prefix: &str| match path.rsplit_once('/') {
        Some((folder, name)) => format!("{folder}/{prefix}{name}"),
        None => format!("{prefix}{path}"),
    };
    let mut layer = Layer::default();
    for step in steps {
        layer = match step {
            Step::File(path, data) => layer.file(path, &format!("{data}")),
            Step::Link(path, to) => layer.link(path, to),
            Step::Gone(path) => layer.file(&beside(path, ".wh."), ""),
            Step::Opaque(path) if path.is_empty() => layer.file(".wh..wh..opq", ""),
            Step::Opaque(path) => layer.file(&format!("{path}/.wh..wh..opq"), ""),
            Step::Folder(path, mode) => {
                let at = layer.0.len();
                let mut layer = layer.dir(path);
                let mut header = Header::new_gnu();
                header.as_mut_bytes().copy_from_slice(&layer.0[at..at + 512]);
                header.set_mode(*mode);
                header.set_uid(7);
                header.set_cksum();
                layer.0[at..at + 512].copy_from_slice(header.as_bytes());
                layer
            }
        };
    }
    layer.end()
}

/// Everything of an upper folder that its layer decides, overlayfs's own marks as well.
fn upper(path: &Path) -> BTreeMap<String, String> {
    let mut seen = tree(path);
    for (name, shown) in &mut seen {
        let place = Root::open(path).unwrap().place(name.trim_start_matches('/').as_bytes()).unwrap();
        let opaque = place.and_then(|place| place.xattr(OsStr::new("trusted.overlay.opaque")).unwrap());
        // A folder that no layer lists has the time at which it was made.
        let time = |word: &str| match word.split_once('.') {
            Some((seconds, _)) if seconds.parse() != Ok(1_000_000_000) => "now".to_owned(),
            _ => word.to_owned(),
        };
        let words: Vec<_> = shown.split(' ').map(time).collect();
        *shown = format!("{} {opaque:?}", words.join(" "));
    }
    seen
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(if cfg!(debug_assertions) { 200 } else { 2000 }))]
    /// A stack whose layers are unpacked without knowing each other, and settled after, is the stack unpacked in order.
    #[test]
    fn layers_unpacked_side_by_side_are_as_in_order(stack in prop::collection::vec(steps(), 1..5)) {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: String| {
            let path = dir.path().join(name);
            std::fs::create_dir(&path).unwrap();
            path
        };
        let temporary = path("mounts".into());
        let (mut ordered, mut apart): (Vec<PathBuf>, Vec<PathBuf>) = Default::default();
        for (at, steps) in stack.iter().enumerate() {
            let layer = layer_of(steps);
            let (own, alone) = (path(format!("ordered{at}")), path(format!("apart{at}")));
            let lower: Vec<_> = ordered.iter().map(|path| path.to_str().unwrap()).collect();
            let mount = match lower.is_empty() {
                true => Mount {
                    kind: "bind".into(),
                    source: own.display().to_string(),
                    target: String::new(),
                    options: vec!["rbind".into(), "rw".into()],
                },
                false => Mount {
                    kind: "overlay".into(),
                    source: "overlay".into(),
                    target: String::new(),
                    options: vec![
                        format!("workdir={}", path(format!("work{at}")).display()),
                        format!("upperdir={}", own.display()),
                        format!("lowerdir={}", lower.join(":")),
                    ],
                },
            };
            let one = apply(Cursor::new(layer.clone()), media_type::OCI_LAYER, None, &[mount], &temporary, false);
            let size = layer.len() as u64;
            let two = apply_alone(Cursor::new(layer), media_type::OCI_LAYER, size, &alone, at == 0);
            let two = two.and_then(|(two, unsettled)| settle(&alone, &apart, unsettled).map(|()| two));
            prop_assert_eq!(one.is_ok(), two.is_ok(), "{:?} {:?}", one, two);
            let (Ok(one), Ok(two)) = (one, two) else { return Ok(()) };
            prop_assert_eq!(one, two);
            prop_assert_eq!(upper(&own), upper(&alone), "layer {}", at);
            ordered.insert(0, own);
            apart.insert(0, alone);
        }
    }
}
