//! Files and folders: durable writes, syncs, exact modes, disk usage.

use std::collections::HashSet;
use std::ffi::{CStr, CString, OsStr};
use std::fs::{self, DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _, OpenOptionsExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, Stat};
use rustix::io::Errno;

/// Syncs a folder, so that the names in it survive a power cut.
pub fn sync_dir(path: &Path) -> io::Result<()> {
    File::open(path)?.sync_all()
}

/// Writes back everything dirty of the file system that holds `path`, and waits for it.
pub fn sync_filesystem(path: &Path) -> io::Result<()> {
    Ok(rustix::fs::syncfs(File::open(path)?)?)
}

/// Syncs every file and folder at and beneath `path`, symlinks not followed; devices, fifos and sockets have no data.
pub fn sync_tree(path: &Path) -> io::Result<()> {
    let kind = fs::symlink_metadata(path)?.file_type();
    if kind.is_dir() {
        for entry in fs::read_dir(path)? {
            sync_tree(&entry?.path())?;
        }
        sync_dir(path)
    } else if kind.is_file() {
        File::open(path)?.sync_all()
    } else {
        Ok(())
    }
}

/// Replaces a file by one with these bytes and exactly this mode: after a crash at any instant it is the old one or
/// the new one, and when this returns it is the new one, also after a power cut.
pub fn write_atomic(path: &Path, bytes: &[u8], mode: u32) -> io::Result<()> {
    let name = path.file_name().ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?;
    let mut temporary = std::ffi::OsString::from(".");
    temporary.push(name);
    temporary.push(".new");
    let temporary = path.with_file_name(temporary);
    let written = (|| {
        let mut file =
            OpenOptions::new().write(true).create(true).truncate(true).mode(mode).open(&temporary)?;
        file.set_permissions(Permissions::from_mode(mode))?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&temporary, path)
    })();
    if written.is_err() {
        let _ = fs::remove_file(&temporary);
    }
    written?;
    sync_dir(path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new(".")))
}

/// Makes a folder with exactly this mode, whatever the umask; AlreadyExists when it is there.
pub fn create_dir(path: &Path, mode: u32) -> io::Result<()> {
    DirBuilder::new().mode(mode).create(path)?;
    fs::set_permissions(path, Permissions::from_mode(mode))
}

/// Makes a folder and its parents; the folder itself gets exactly this mode, new parents 0711.
pub fn create_dir_all(path: &Path, mode: u32) -> io::Result<()> {
    if path.is_dir() {
        return fs::set_permissions(path, Permissions::from_mode(mode));
    }
    if let Some(parent) = path.parent()
        && !parent.as_os_str().is_empty()
        && !parent.is_dir()
    {
        create_dir_all(parent, 0o711)?;
    }
    match create_dir(path, mode) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists && path.is_dir() => Ok(()),
        result => result,
    }
}

/// Takes the lock on a file, which is made if it is not there; None when another has it for longer than `limit`. Held until what is
/// given back is closed, here and in every program that was being started meanwhile. Blocks.
pub fn lock(path: &Path, limit: Duration) -> io::Result<Option<File>> {
    let file = File::options().create(true).truncate(false).write(true).open(path)?;
    let deadline = Instant::now() + limit;
    loop {
        match file.try_lock() {
            Ok(()) => return Ok(Some(file)),
            Err(fs::TryLockError::WouldBlock) if Instant::now() < deadline => {
                std::thread::sleep(Duration::from_millis(2));
            }
            Err(fs::TryLockError::WouldBlock) => return Ok(None),
            Err(fs::TryLockError::Error(error)) => return Err(error),
        }
    }
}

/// Removes a tree if it is there; never follows a symlink out of it.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    let removed = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => remove_folder(path),
        Ok(_) => fs::remove_file(path),
        Err(error) => Err(error),
    };
    match removed {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn remove_folder(path: &Path) -> io::Result<()> {
    walk(path, &mut |_, folder, name, step| {
        let flags = match step {
            Step::Seen(FileType::Directory) => return Ok(()),
            Step::Seen(_) => AtFlags::empty(),
            Step::Left => AtFlags::REMOVEDIR,
        };
        match rustix::fs::unlinkat(folder, name, flags) {
            // Somebody else removes it, too.
            Ok(()) | Err(Errno::NOENT) => Ok(()),
            Err(error) => Err(error.into()),
        }
    })?;
    fs::remove_dir(path)
}

/// What is told of an entry.
pub(crate) enum Step {
    /// It is there, and of this type.
    Seen(FileType),
    /// It is a folder, and all that is in it has been told.
    Left,
}

/// A folder on the way down.
struct Level {
    id: (u64, u64),
    /// The folder in it that was gone into.
    inside: CString,
    /// Those that are still to be gone into.
    todo: Vec<CString>,
}

/// Told of each entry: the path of its folder from the top, that folder, its name in there.
pub(crate) type Visit<'a> = &'a mut dyn FnMut(&Path, BorrowedFd<'_>, &CStr, Step) -> io::Result<()>;

/// Shows all entries of a tree, symlinks not followed. Whoever runs in a container can make a tree that is deeper than a path
/// is long, than there are descriptors, than a stack is: this takes three descriptors, and its memory is on the heap.
pub(crate) fn walk(top: &Path, visit: Visit<'_>) -> io::Result<()> {
    const FOLDER: OFlags =
        OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
    let open = |at: BorrowedFd<'_>, name: &CStr| rustix::fs::openat(at, name, FOLDER, Mode::empty());
    let id = |folder: &OwnedFd| rustix::fs::fstat(folder).map(|stat| (stat.st_dev, stat.st_ino));
    let top = rustix::fs::open(top, FOLDER, Mode::empty())?;
    let mut here = open(top.as_fd(), c".")?;
    let mut beneath = PathBuf::new();
    let mut above: Vec<Level> = Vec::new();
    let mut todo = show(&beneath, &here, visit)?;
    loop {
        if let Some(name) = todo.pop() {
            let inside = match open(here.as_fd(), &name) {
                Ok(inside) => inside,
                // Gone, or something else by now.
                Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => continue,
                Err(error) => return Err(error.into()),
            };
            beneath.push(OsStr::from_bytes(name.to_bytes()));
            above.push(Level { id: id(&here)?, inside: name, todo });
            here = inside;
            todo = show(&beneath, &here, visit)?;
            continue;
        }
        let Some(level) = above.pop() else { return Ok(()) };
        beneath.pop();
        let up = open(here.as_fd(), c"..")?;
        here = if id(&up)? == level.id {
            up
        } else {
            // Somebody has moved it meanwhile: the way down again.
            let mut down = open(top.as_fd(), c".")?;
            for level in &above {
                down = open(down.as_fd(), &level.inside)?;
            }
            down
        };
        visit(&beneath, here.as_fd(), &level.inside, Step::Left)?;
        todo = level.todo;
    }
}

/// Shows the entries of a folder; the folders among them.
fn show(beneath: &Path, folder: &OwnedFd, visit: Visit<'_>) -> io::Result<Vec<CString>> {
    let mut folders = Vec::new();
    for entry in rustix::fs::Dir::read_from(folder)? {
        let entry = entry?;
        let name = entry.file_name();
        if matches!(name.to_bytes(), b"." | b"..") {
            continue;
        }
        let kind = match entry.file_type() {
            FileType::Unknown => match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
                Ok(stat) => FileType::from_raw_mode(stat.st_mode),
                Err(Errno::NOENT) => continue,
                Err(error) => return Err(error.into()),
            },
            kind => kind,
        };
        visit(beneath, folder.as_fd(), name, Step::Seen(kind))?;
        if kind == FileType::Directory {
            folders.push(name.to_owned());
        }
    }
    Ok(folders)
}

/// What a tree takes of its disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Bytes, in allocated blocks.
    pub size: i64,
    /// Files and folders; one with several hard links counts once.
    pub inodes: i64,
}

/// Measures a tree, its top folder included. A file that vanishes meanwhile does not count.
pub fn usage(path: &Path) -> io::Result<Usage> {
    usage_where(path, |_, _, _| true)
}

/// Measures what of a tree changed against the one it was copied from by sharing, its top folder included: such a copy
/// keeps inode numbers, and each change gives a file a new change time.
pub fn usage_beyond(path: &Path, base: &Path) -> io::Result<Usage> {
    usage_where(path, |folder, name, stat| {
        // What cannot be read there is not shared as far as is known.
        name.is_empty()
            || !fs::symlink_metadata(base.join(folder).join(name)).is_ok_and(|old| {
                let times = (stat.st_ctime, i64::try_from(stat.st_ctime_nsec).unwrap_or(-1));
                (old.ino(), (old.ctime(), old.ctime_nsec())) == (stat.st_ino, times)
            })
    })
}

/// Measures those files and folders of a tree for which `counts`, given their folder in the tree and their name there, says so.
fn usage_where(path: &Path, counts: impl Fn(&Path, &OsStr, &Stat) -> bool) -> io::Result<Usage> {
    let mut usage = Usage::default();
    let mut seen = HashSet::new();
    let mut count = |folder: &Path, name: &OsStr, stat: &Stat| {
        let is_folder = FileType::from_raw_mode(stat.st_mode) == FileType::Directory;
        if counts(folder, name, stat)
            && (is_folder || stat.st_nlink < 2 || seen.insert((stat.st_dev, stat.st_ino)))
        {
            usage.size += stat.st_blocks * 512;
            usage.inodes += 1;
        }
    };
    count(Path::new(""), OsStr::new(""), &rustix::fs::lstat(path)?);
    walk(path, &mut |beneath, folder, name, step| {
        if matches!(step, Step::Left) {
            return Ok(());
        }
        match rustix::fs::statat(folder, name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => count(beneath, OsStr::from_bytes(name.to_bytes()), &stat),
            Err(Errno::NOENT) => {}
            Err(error) => return Err(error.into()),
        }
        Ok(())
    })?;
    Ok(usage)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_atomic_write_replaces_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("f");
        write_atomic(&path, b"one", 0o600).unwrap();
        write_atomic(&path, b"two", 0o644).unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"two");
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o644);
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 1);
        assert!(write_atomic(&dir.path().join("no/f"), b"", 0o600).is_err());
    }

    #[test]
    fn folders_have_their_mode() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a/b");
        create_dir_all(&path, 0o777).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o777);
        assert_eq!(fs::metadata(dir.path().join("a")).unwrap().mode() & 0o7777, 0o711);
        create_dir_all(&path, 0o700).unwrap();
        assert_eq!(fs::metadata(&path).unwrap().mode() & 0o7777, 0o700);
    }

    #[test]
    fn usage_counts_hard_links_once_and_remove_follows_no_link() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("t");
        fs::create_dir(&tree).unwrap();
        fs::write(tree.join("a"), vec![1; 10_000]).unwrap();
        sync_tree(&tree).unwrap();
        let before = usage(&tree).unwrap();
        assert_eq!(before.inodes, 2);
        assert!(before.size >= 10_000);
        fs::hard_link(tree.join("a"), tree.join("b")).unwrap();
        assert_eq!(usage(&tree).unwrap(), before);
        let outside = dir.path().join("outside");
        fs::create_dir(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, tree.join("link")).unwrap();
        assert_eq!(usage(&tree).unwrap().inodes, 3);
        remove_tree(&tree).unwrap();
        remove_tree(&tree).unwrap();
        assert!(outside.exists() && !tree.exists());
    }
    /// As a process in a container makes it: by going down, without ever saying the whole path.
    fn deep(top: &Path, depth: usize) {
        fs::create_dir(top).unwrap();
        let mut here: OwnedFd = File::open(top).unwrap().into();
        for _ in 0..depth {
            rustix::fs::mkdirat(&here, "a", Mode::from_raw_mode(0o755)).unwrap();
            here = rustix::fs::openat(&here, "a", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).unwrap();
        }
        rustix::fs::openat(&here, "end", OFlags::CREATE | OFlags::WRONLY, Mode::from_raw_mode(0o644))
            .unwrap();
    }

    #[test]
    fn a_tree_deeper_than_the_stack_is_measured_and_removed() {
        let dir = tempfile::tempdir().unwrap();
        let tree = dir.path().join("t");
        deep(&tree, 4_000);
        // An eighth of what the engine's threads have.
        let small = std::thread::Builder::new().stack_size(256 << 10);
        let (usage, removed) =
            small.spawn(move || (usage(&tree), remove_tree(&tree))).unwrap().join().unwrap();
        assert_eq!(usage.unwrap().inodes, 4_002);
        removed.unwrap();
        assert_eq!(fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_folder_that_is_moved_while_a_tree_is_walked_leads_nowhere_else() {
        let dir = tempfile::tempdir().unwrap();
        let (tree, outside) = (dir.path().join("t"), dir.path().join("outside"));
        fs::create_dir_all(tree.join("a/b")).unwrap();
        fs::create_dir_all(&outside).unwrap();
        fs::write(outside.join("kept"), "k").unwrap();
        for name in ["1", "2", "a/b/3"] {
            fs::write(tree.join(name), name).unwrap();
        }
        let mut seen = Vec::new();
        walk(&tree, &mut |beneath, _, name, step| {
            if name == c"3" {
                // Its parent's parent is another one from here on.
                fs::rename(tree.join("a/b"), outside.join("b")).unwrap();
            }
            if matches!(step, Step::Seen(_)) {
                seen.push(beneath.join(OsStr::from_bytes(name.to_bytes())));
            }
            Ok(())
        })
        .unwrap();
        seen.sort();
        assert_eq!(seen, ["1", "2", "a", "a/b", "a/b/3"].map(PathBuf::from));
    }
}
