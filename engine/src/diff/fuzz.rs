//! What holds of any layer, wherever it is unpacked.

use std::collections::BTreeMap;
use std::fs;
use std::io::{Cursor, Write as _};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use oci::image::media_type;
use sys::mount::Mount;
use tar::{EntryType, Header};

use super::{OVERLAY_OPAQUE, apply, apply_alone, settle};

/// What names of members are made of.
const WORDS: [&str; 16] = [
    "a",
    "b",
    "c",
    "d",
    "..",
    ".",
    "",
    ".wh.a",
    ".wh.b",
    ".wh..wh..opq",
    ".wh..wh.plnk",
    "outside",
    "canary",
    "lower",
    "link",
    "\u{e4}",
];

/// A layer, unpacked beneath `scratch`. Its first byte says what the rest is (bytes as they are, bytes whose headers' sums are put
/// right, or a list of members in short), the second how it is packed and what it is unpacked onto.
///
/// Nothing outside its folder is touched, no whiteout is left as a file, no attribute that steers overlayfs comes of it, what it
/// takes of the disk is bounded by its size, and its digest is that of its bytes.
pub fn layer(data: &[u8], scratch: &Path) {
    let [what, how, rest @ ..] = data else { return };
    let place = Scratch::new(scratch);
    let bytes = match what % 3 {
        0 => rest.to_vec(),
        1 => with_sums(rest.to_vec()),
        _ => of_members(rest, scratch),
    };
    let packed = match how % 4 {
        0 => bytes.clone(),
        1 => gzip(&bytes),
        2 => zstd::stream::encode_all(&bytes[..], 1).expect("compress"),
        // As it stands it is packed, or not.
        _ => rest.to_vec(),
    };
    let size = packed.len() as u64;
    let root = place.root.as_path();
    let applied = match how / 4 % 4 {
        0 => {
            apply(Cursor::new(packed), media_type::OCI_LAYER, Some(size), &[bind(root)], &place.mounts, false)
        }
        1 => {
            let mounts = [overlay(root, &place.lower)];
            apply(Cursor::new(packed), media_type::OCI_LAYER, Some(size), &mounts, &place.mounts, false)
        }
        onto => {
            let base = onto == 2;
            let alone = apply_alone(Cursor::new(packed), media_type::OCI_LAYER, size, root, base);
            alone.and_then(|(applied, unsettled)| {
                settle(root, std::slice::from_ref(&place.lower), unsettled)?;
                Ok(applied)
            })
        }
    };
    place.check();
    let mut taken = 0;
    let mut files = 0;
    walk(root, &mut |path, metadata| {
        let name = path.file_name().expect("a name").as_bytes();
        assert!(!name.starts_with(b".wh."), "{} is left", path.display());
        taken += metadata.blocks() * 512;
        files += 1;
        let overlay = how / 4 % 4 != 0;
        for (name, value) in trusted(path) {
            assert!(overlay && metadata.is_dir() && name == OVERLAY_OPAQUE && value == b"y", "{name}");
        }
    });
    if let Ok(applied) = applied
        && how % 4 != 3
    {
        assert_eq!(applied.size, bytes.len() as u64);
        assert_eq!(applied.digest, oci::Digest::sha256_of(&bytes));
        // Each may end in a block that is not full, and a sparse file has blocks where its data is.
        let most = 2 * bytes.len() as u64 + 64 * 1024 * (1 + bytes.len() as u64 / 512);
        assert!(taken <= most, "{taken} bytes on the disk of a layer of {}", bytes.len());
        // A member makes the folders of its path.
        assert!(files <= 64 + bytes.len(), "{files} files of a layer of {} bytes", bytes.len());
    }
    place.clear();
}

/// The folders of a run, and what there is outside of them.
struct Scratch {
    folder: PathBuf,
    root: PathBuf,
    lower: PathBuf,
    mounts: PathBuf,
    before: BTreeMap<PathBuf, String>,
}

impl Scratch {
    fn new(folder: &Path) -> Self {
        let path = |name: &str| folder.join(name);
        if !path("outside").exists() {
            let made = || -> std::io::Result<()> {
                fs::create_dir_all(path("outside/dir"))?;
                fs::create_dir_all(path("lower/a/b"))?;
                fs::create_dir_all(path("inner/mounts"))?;
                for name in ["outside/canary", "outside/dir/file", "lower/a/b/file", "lower/c"] {
                    fs::write(path(name), name)?;
                    fs::set_permissions(path(name), fs::Permissions::from_mode(0o640))?;
                }
                std::os::unix::fs::symlink(path("outside"), path("lower/link"))
            };
            made().expect("make the folders");
        }
        let scratch = Scratch {
            folder: folder.to_owned(),
            root: path("inner/root"),
            lower: path("lower"),
            mounts: path("inner/mounts"),
            before: seen(folder),
        };
        scratch.clear();
        fs::create_dir(&scratch.root).expect("make the root");
        scratch
    }

    /// All is as it was, but for the root.
    fn check(&self) {
        assert_eq!(seen(&self.folder), self.before);
        let names: Vec<_> = fs::read_dir(self.folder.join("inner")).expect("list").flatten().collect();
        assert_eq!(names.len(), 2);
        assert_eq!(fs::read_dir(&self.mounts).expect("list").count(), 0);
        assert_eq!(fs::read_dir(&self.folder).expect("list").count(), 3);
    }

    fn clear(&self) {
        sys::fs::remove_tree(&self.root).expect("remove what was unpacked");
    }
}

/// What must not change: everything but the time of the last access.
fn seen(folder: &Path) -> BTreeMap<PathBuf, String> {
    let mut all = BTreeMap::new();
    for top in ["outside", "lower"] {
        let top = folder.join(top);
        let mut put = |path: &Path, metadata: &fs::Metadata| {
            let content = if metadata.is_file() { fs::read(path).expect("read") } else { Vec::new() };
            let of = metadata;
            let times = (of.mtime(), of.mtime_nsec(), of.ctime(), of.ctime_nsec());
            let text = format!(
                "{} {} {:o} {}:{} {times:?} {content:?}",
                of.ino(),
                of.nlink(),
                of.mode(),
                of.uid(),
                of.gid()
            );
            all.insert(path.to_owned(), text);
        };
        put(&top, &fs::symlink_metadata(&top).expect("look at"));
        walk(&top, &mut put);
    }
    all
}

/// Shows what is beneath a folder, links not followed.
fn walk(folder: &Path, show: &mut dyn FnMut(&Path, &fs::Metadata)) {
    let mut todo = vec![folder.to_owned()];
    while let Some(folder) = todo.pop() {
        // One that is too deep for a path is not looked into.
        for entry in fs::read_dir(&folder).into_iter().flatten().flatten() {
            let Ok(metadata) = entry.metadata() else { continue };
            show(&entry.path(), &metadata);
            if metadata.is_dir() {
                todo.push(entry.path());
            }
        }
    }
}

/// The attributes that only the engine may set.
fn trusted(path: &Path) -> Vec<(String, Vec<u8>)> {
    let mut names = vec![0; 64 << 10];
    let length = rustix::fs::llistxattr(path, &mut names[..]).unwrap_or(0);
    let names = names[..length].split(|byte| *byte == 0).filter(|name| name.starts_with(b"trusted."));
    names
        .map(|name| {
            let name = String::from_utf8_lossy(name).into_owned();
            let mut value = vec![0; 64 << 10];
            let length = rustix::fs::lgetxattr(path, &name, &mut value[..]).unwrap_or(0);
            (name, value[..length].to_vec())
        })
        .collect()
}

fn bind(root: &Path) -> Mount {
    let options = vec!["rbind".into(), "rw".into()];
    Mount { kind: "bind".into(), source: root.display().to_string(), target: String::new(), options }
}

fn overlay(root: &Path, lower: &Path) -> Mount {
    let options = vec![
        format!("workdir={}", root.display()),
        format!("upperdir={}", root.display()),
        format!("lowerdir={}", lower.display()),
    ];
    Mount { kind: "overlay".into(), source: "overlay".into(), target: String::new(), options }
}

fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut to = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    to.write_all(bytes).expect("compress");
    to.finish().expect("compress")
}

/// The same bytes, each header with the sum that it ought to have, so that what is behind the sum is reached.
pub(crate) fn with_sums(mut bytes: Vec<u8>) -> Vec<u8> {
    let mut at = 0;
    while let Some(block) = bytes.get_mut(at..at + 512) {
        at += 512;
        if block.iter().all(|byte| *byte == 0) {
            continue;
        }
        let mut header = Header::from_byte_slice(block).clone();
        header.set_cksum();
        let size = header.entry_size().unwrap_or(0).min(1 << 20);
        block.copy_from_slice(header.as_bytes());
        at += size.next_multiple_of(512) as usize;
    }
    bytes
}

/// The archive that a list of members in short stands for: kind, numbers, name, and target or data of each.
fn of_members(mut short: &[u8], scratch: &Path) -> Vec<u8> {
    let outside = scratch.join("outside").display().to_string();
    let mut archive = Vec::new();
    let mut members = 0;
    while let [kind, numbers, rest @ ..] = short
        && members < 200
    {
        short = rest;
        members += 1;
        let path = name(&mut short, &outside);
        let link = match kind % 10 {
            2 | 3 => name(&mut short, &outside),
            _ => String::new(),
        };
        let (entry, data) = match kind % 10 {
            0 => (EntryType::Regular, vec![b'x'; usize::from(*numbers) * 8]),
            1 => (EntryType::Directory, Vec::new()),
            2 => (EntryType::Symlink, Vec::new()),
            3 => (EntryType::Link, Vec::new()),
            4 => (EntryType::Char, Vec::new()),
            5 => (EntryType::Block, Vec::new()),
            6 => (EntryType::Fifo, Vec::new()),
            7 => (EntryType::GNULongName, path.clone().into_bytes()),
            8 => (EntryType::XHeader, pax("SCHILY.xattr.trusted.overlay.opaque", "y")),
            _ => (EntryType::XHeader, pax("path", &path)),
        };
        let mut header = Header::new_gnu();
        header.set_entry_type(entry);
        header.set_size(data.len() as u64);
        header.set_mode([0o644, 0o755, 0o4755, 0o2777, 0o000, 0o1777][usize::from(numbers % 6)]);
        header.set_uid((numbers % 3).into());
        header.set_gid((numbers % 2).into());
        header.set_mtime(1_000_000_000 + u64::from(*numbers));
        let _ = header.set_device_major((numbers / 16).into());
        let _ = header.set_device_minor((numbers % 16).into());
        for (at, text) in [(0, &path), (157, &link)] {
            let text = &text.as_bytes()[..text.len().min(99)];
            header.as_mut_bytes()[at..at + text.len()].copy_from_slice(text);
        }
        header.set_cksum();
        archive.extend_from_slice(header.as_bytes());
        archive.extend_from_slice(&data);
        archive.resize(archive.len().next_multiple_of(512), 0);
    }
    archive.resize(archive.len() + 1024, 0);
    archive
}

/// A name: how many words, and which.
fn name(short: &mut &[u8], outside: &str) -> String {
    let Some((count, rest)) = short.split_first() else { return "a".into() };
    let words = &rest[..rest.len().min(usize::from(count % 8))];
    *short = &rest[words.len()..];
    let words: Vec<&str> = words.iter().map(|word| WORDS[usize::from(word % 16)]).collect();
    let name = words.join("/");
    match count / 8 % 4 {
        0 | 1 => name,
        2 => format!("/{name}"),
        _ => format!("{outside}/{name}"),
    }
}

fn pax(key: &str, value: &str) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length != rest + length.to_string().len() {
        length += 1;
    }
    format!("{length} {key}={value}\n").into_bytes()
}
