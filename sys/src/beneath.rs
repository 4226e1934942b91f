//! Changing a file tree by paths that a stranger chose, without ever leaving the tree.
//!
//! A layer names files by paths, and its own earlier members made the symlinks that later paths run through. So
//! nothing here hands a path of more than one component to a call that could leave the root:
//!
//! ```text
//!  path --components--> "..", ".", "/" resolved as text; at most 4096 bytes
//!       --parent------> openat2(RESOLVE_IN_ROOT | RESOLVE_NO_MAGICLINKS): one pinned descriptor of the parent folder;
//!                       where folders are missing (or the kernel has no openat2), a walk that opens one component at a
//!                       time with O_NOFOLLOW, reads symlinks itself, and takes ".." from its own stack
//!       --place-------> (descriptor of the parent, last component), on which every change is made, never following
//!                       a symlink in that last component
//! ```
//!
//! Invariant: whatever the paths, link targets and order of calls, nothing outside the root is opened, made, changed or
//! removed. A path that points out of the root (`..`, an absolute symlink) points to what it would inside a chroot.

use std::collections::HashMap;
use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{AtFlags, CWD, FileType, Gid, Mode, OFlags, ResolveFlags, Stat, Timespec, Timestamps, Uid};
use rustix::io::Errno;

/// The longest path that is taken, in bytes: the kernel's own limit.
const PATH_BYTES: usize = 4096;
/// The deepest folder that is made by walking; each level holds a descriptor for that time.
const DEPTH: usize = 512;
/// How many symlinks one path may run through: the kernel's own limit.
const LINKS: usize = 40;
/// How many parents stay open. Archives list a folder's files together, so few suffice.
const CACHED: usize = 64;

const FOLDER: OFlags = OFlags::PATH.union(OFlags::DIRECTORY).union(OFlags::CLOEXEC);

/// A file tree that is changed only beneath its top folder.
#[derive(Debug)]
pub struct Root {
    folder: Arc<OwnedFd>,
    /// Descriptors of parents by their path; emptied whenever a folder or a symlink goes.
    parents: HashMap<Vec<u8>, Arc<OwnedFd>>,
}

/// One name in one folder of a [`Root`]; what it names may or may not exist.
#[derive(Debug, Clone)]
pub struct Place {
    parent: Arc<OwnedFd>,
    name: CString,
}

/// What a special file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Special {
    /// A character device, by major and minor number; 0, 0 is overlayfs's whiteout.
    Character(u32, u32),
    /// A block device, by major and minor number.
    Block(u32, u32),
    /// A named pipe.
    Fifo,
}

/// Called for each folder that was made because a path needed it, with its path from the root, symlinks resolved.
pub type OnMade<'a> = &'a mut dyn FnMut(&[u8], &Place) -> io::Result<()>;

impl Root {
    /// Opens the top folder; this path is the caller's own and is followed as usual.
    pub fn open(path: &Path) -> io::Result<Root> {
        let folder = rustix::fs::open(path, FOLDER, Mode::empty())?;
        Ok(Root { folder: Arc::new(folder), parents: HashMap::new() })
    }

    /// The place of a path; None for the root itself. NotFound when a folder on the way does not exist.
    pub fn place(&mut self, path: &[u8]) -> io::Result<Option<Place>> {
        self.resolve(path, None)
    }

    /// The same, but folders that are missing on the way are made with mode 0755, and `made` is told of each.
    pub fn place_making(&mut self, path: &[u8], made: OnMade<'_>) -> io::Result<Option<Place>> {
        self.resolve(path, Some(made))
    }

    /// The root folder's descriptor.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.folder.as_fd()
    }

    /// Writes everything of the file system that holds the root to disk.
    pub fn sync(&self) -> io::Result<()> {
        let folder = rustix::fs::openat(
            &*self.folder,
            c".",
            OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC,
            Mode::empty(),
        )?;
        Ok(rustix::fs::syncfs(folder)?)
    }

    /// The names in the root folder.
    pub fn names(&self) -> io::Result<Vec<Vec<u8>>> {
        names(&self.folder)
    }

    /// A place right in the root folder, by a name that [`Root::names`] gave.
    pub fn child(&self, name: &[u8]) -> io::Result<Place> {
        Place::new(self.folder.clone(), name)
    }

    /// Removes what is at a place, a folder with all that is in it. Nothing there is no error.
    pub fn remove(&mut self, place: &Place) -> io::Result<()> {
        let Some(stat) = place.stat()? else { return Ok(()) };
        match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                self.parents.clear();
                // It descends with openat and O_NOFOLLOW; the prefix is the pinned parent.
                crate::fs::remove_tree(&place.proc_path())
            }
            FileType::Symlink => {
                self.parents.clear();
                Ok(rustix::fs::unlinkat(&*place.parent, &*place.name, AtFlags::empty())?)
            }
            _ => Ok(rustix::fs::unlinkat(&*place.parent, &*place.name, AtFlags::empty())?),
        }
    }

    /// Removes an empty folder; false when it is not empty.
    pub fn remove_empty_folder(&mut self, place: &Place) -> io::Result<bool> {
        self.parents.clear();
        match rustix::fs::unlinkat(&*place.parent, &*place.name, AtFlags::REMOVEDIR) {
            Ok(()) => Ok(true),
            Err(Errno::NOTEMPTY | Errno::EXIST) => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    fn resolve(&mut self, path: &[u8], made: Option<OnMade<'_>>) -> io::Result<Option<Place>> {
        let mut parts = components(path)?;
        let Some(name) = parts.pop() else { return Ok(None) };
        let parent = self.parent(&parts, made)?;
        Place::new(parent, name).map(Some)
    }

    fn parent(&mut self, parts: &[&[u8]], made: Option<OnMade<'_>>) -> io::Result<Arc<OwnedFd>> {
        if parts.is_empty() {
            return Ok(self.folder.clone());
        }
        let path = parts.join(&b'/');
        if let Some(parent) = self.parents.get(&path) {
            return Ok(parent.clone());
        }
        let flags = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
        let parent = match rustix::fs::openat2(&*self.folder, &path[..], FOLDER, Mode::empty(), flags) {
            Ok(parent) => Arc::new(parent),
            // EAGAIN: a rename elsewhere raced with "..", so the kernel could not tell; the walk can.
            Err(Errno::NOENT) if made.is_some() => self.walk(parts, made)?,
            Err(Errno::NOSYS | Errno::PERM | Errno::AGAIN) => self.walk(parts, made)?,
            Err(error) => return Err(error.into()),
        };
        if self.parents.len() >= CACHED {
            self.parents.clear();
        }
        self.parents.insert(path, parent.clone());
        Ok(parent)
    }

    /// Resolves as a chroot would, one component at a time, and makes what is missing when `made` is there.
    fn walk(&self, parts: &[&[u8]], mut made: Option<OnMade<'_>>) -> io::Result<Arc<OwnedFd>> {
        let mut stack: Vec<(Arc<OwnedFd>, Vec<u8>)> = Vec::new();
        let mut todo: Vec<Vec<u8>> = parts.iter().rev().map(|part| part.to_vec()).collect();
        let mut links = 0;
        while let Some(name) = todo.pop() {
            match &name[..] {
                b"" | b"." => continue,
                b".." => {
                    stack.pop();
                    continue;
                }
                _ => {}
            }
            if stack.len() >= DEPTH {
                return Err(Errno::NAMETOOLONG.into());
            }
            let here = stack.last().map_or(&self.folder, |(folder, _)| folder).clone();
            match rustix::fs::openat(&*here, &name[..], FOLDER | OFlags::NOFOLLOW, Mode::empty()) {
                Ok(folder) => stack.push((Arc::new(folder), name)),
                Err(Errno::NOENT) => {
                    let Some(made) = made.as_mut() else { return Err(Errno::NOENT.into()) };
                    let place = Place::new(here, &name)?;
                    place.make_folder()?;
                    place.set_mode(0o755)?;
                    let mut path: Vec<u8> = Vec::new();
                    for (_, part) in &stack {
                        path.extend_from_slice(part);
                        path.push(b'/');
                    }
                    path.extend_from_slice(&name);
                    if let Err(error) = made(&path, &place) {
                        // Refused: as if it had not been made.
                        rustix::fs::unlinkat(&*place.parent, &*place.name, AtFlags::REMOVEDIR)?;
                        return Err(error);
                    }
                    todo.push(name);
                }
                Err(Errno::NOTDIR | Errno::LOOP) => {
                    let target = match rustix::fs::readlinkat(&*here, &name[..], Vec::new()) {
                        Ok(target) => target.into_bytes(),
                        Err(Errno::INVAL) => return Err(Errno::NOTDIR.into()),
                        Err(error) => return Err(error.into()),
                    };
                    links += 1;
                    if links > LINKS {
                        return Err(Errno::LOOP.into());
                    }
                    if target.starts_with(b"/") {
                        stack.clear();
                    }
                    todo.extend(target.split(|byte| *byte == b'/').rev().map(<[u8]>::to_vec));
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(stack.pop().map_or_else(|| self.folder.clone(), |(folder, _)| folder))
    }
}

impl Place {
    fn new(parent: Arc<OwnedFd>, name: &[u8]) -> io::Result<Place> {
        if name.is_empty() || name == b"." || name == b".." || name.contains(&b'/') {
            return Err(Errno::INVAL.into());
        }
        Ok(Place { parent, name: CString::new(name)? })
    }

    /// The name in its folder.
    pub fn name(&self) -> &[u8] {
        self.name.as_bytes()
    }

    /// Another name in the same folder; InvalidInput for what is not one plain component.
    pub fn sibling(&self, name: &[u8]) -> io::Result<Place> {
        Place::new(self.parent.clone(), name)
    }

    /// What is here, a symlink itself and not its target; None when nothing is.
    pub fn stat(&self) -> io::Result<Option<Stat>> {
        match rustix::fs::statat(&*self.parent, &*self.name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => Ok(Some(stat)),
            Err(Errno::NOENT) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// What the folder is that this is a name in.
    pub fn folder_stat(&self) -> io::Result<Stat> {
        Ok(rustix::fs::fstat(&*self.parent)?)
    }

    /// Makes a regular file, which must not exist, to be written to.
    pub fn make_file(&self) -> io::Result<File> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        Ok(rustix::fs::openat(&*self.parent, &*self.name, flags, Mode::from_raw_mode(0o600))?.into())
    }

    /// Makes a regular file with (up to) this mode; None when there is something.
    pub fn try_make_file(&self, mode: u32) -> io::Result<Option<File>> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        match rustix::fs::openat(&*self.parent, &*self.name, flags, Mode::from_raw_mode(mode & 0o7777)) {
            Ok(file) => Ok(Some(file.into())),
            Err(Errno::EXIST) => Ok(None),
            Err(error) => Err(error.into()),
        }
    }

    /// Makes a folder, which must not exist.
    pub fn make_folder(&self) -> io::Result<()> {
        Ok(rustix::fs::mkdirat(&*self.parent, &*self.name, Mode::from_raw_mode(0o755))?)
    }

    /// Makes a symlink with this target, which may be anything.
    pub fn make_symlink(&self, target: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::symlinkat(target, &*self.parent, &*self.name)?)
    }

    /// Makes a hard link to what is at `to`; to a symlink itself, not to its target.
    pub fn make_hard_link(&self, to: &Place) -> io::Result<()> {
        Ok(rustix::fs::linkat(&*to.parent, &*to.name, &*self.parent, &*self.name, AtFlags::empty())?)
    }

    /// Makes a device or a pipe.
    pub fn make_special(&self, special: Special) -> io::Result<()> {
        let (kind, device) = match special {
            Special::Character(major, minor) => {
                (FileType::CharacterDevice, rustix::fs::makedev(major, minor))
            }
            Special::Block(major, minor) => (FileType::BlockDevice, rustix::fs::makedev(major, minor)),
            Special::Fifo => (FileType::Fifo, 0),
        };
        Ok(rustix::fs::mknodat(&*self.parent, &*self.name, kind, Mode::from_raw_mode(0o600), device)?)
    }

    /// Sets the owner. The kernel then drops set-id bits and capabilities, so this comes before those.
    pub fn set_owner(&self, uid: u32, gid: u32) -> io::Result<()> {
        if uid == u32::MAX || gid == u32::MAX {
            // To the kernel, -1 means "leave as it is".
            return Err(Errno::INVAL.into());
        }
        let (uid, gid) = (Uid::from_raw(uid), Gid::from_raw(gid));
        let flags = AtFlags::SYMLINK_NOFOLLOW;
        Ok(rustix::fs::chownat(&*self.parent, &*self.name, Some(uid), Some(gid), flags)?)
    }

    /// Sets the permission bits (07777). A symlink has none: nothing is done then, and its target is left alone.
    pub fn set_mode(&self, mode: u32) -> io::Result<()> {
        let flags = OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let node = rustix::fs::openat(&*self.parent, &*self.name, flags, Mode::empty())?;
        if FileType::from_raw_mode(rustix::fs::fstat(&node)?.st_mode) == FileType::Symlink {
            return Ok(());
        }
        // fchmod refuses O_PATH descriptors, and fchmodat2 needs Linux 6.6.
        let path = format!("/proc/self/fd/{}", node.as_raw_fd());
        Ok(rustix::fs::chmodat(CWD, path, Mode::from_raw_mode(mode & 0o7777), AtFlags::empty())?)
    }

    /// Sets an extended attribute.
    pub fn set_xattr(&self, name: &OsStr, value: &[u8]) -> io::Result<()> {
        Ok(rustix::fs::lsetxattr(self.proc_path(), name, value, rustix::fs::XattrFlags::empty())?)
    }

    /// Sets an extended attribute of the folder that this is a name in.
    pub fn set_folder_xattr(&self, name: &str, value: &[u8]) -> io::Result<()> {
        let path = format!("/proc/self/fd/{}", self.parent.as_raw_fd());
        Ok(rustix::fs::setxattr(path, name, value, rustix::fs::XattrFlags::empty())?)
    }

    /// The names in the folder that this is a name in.
    pub fn names_beside(&self) -> io::Result<Vec<Vec<u8>>> {
        names(&self.parent)
    }

    /// One extended attribute; None when there is none of this name, or the file system has none at all.
    pub fn xattr(&self, name: &OsStr) -> io::Result<Option<Vec<u8>>> {
        let path = self.proc_path();
        let mut value = vec![0_u8; 256];
        loop {
            match rustix::fs::lgetxattr(&path, name, &mut value[..]) {
                Ok(length) => {
                    value.truncate(length);
                    return Ok(Some(value));
                }
                Err(Errno::RANGE) if value.len() < 64 * 1024 => value.resize(64 * 1024, 0),
                Err(Errno::NODATA | Errno::OPNOTSUPP) => return Ok(None),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// The names of the extended attributes.
    pub fn xattr_names(&self) -> io::Result<Vec<Vec<u8>>> {
        let mut buffer = vec![0_u8; 64 * 1024];
        match rustix::fs::llistxattr(self.proc_path(), &mut buffer[..]) {
            Ok(length) => Ok(buffer[..length]
                .split(|byte| *byte == 0)
                .filter(|name| !name.is_empty())
                .map(<[u8]>::to_vec)
                .collect()),
            Err(Errno::OPNOTSUPP) => Ok(Vec::new()),
            Err(error) => Err(error.into()),
        }
    }

    /// Sets the times of last access and change of the data, of a symlink itself.
    pub fn set_times(&self, accessed: SystemTime, modified: SystemTime) -> io::Result<()> {
        let times = Timestamps { last_access: timespec(accessed), last_modification: timespec(modified) };
        Ok(rustix::fs::utimensat(&*self.parent, &*self.name, &times, AtFlags::SYMLINK_NOFOLLOW)?)
    }

    /// The target of a symlink.
    pub fn link_target(&self) -> io::Result<Vec<u8>> {
        Ok(rustix::fs::readlinkat(&*self.parent, &*self.name, Vec::new())?.into_bytes())
    }

    /// Opens a regular file to be read; never a pipe or device, whose opening could block or act.
    pub fn read(&self) -> io::Result<File> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC | OFlags::NONBLOCK;
        let is_file = |stat: Stat| FileType::from_raw_mode(stat.st_mode) == FileType::RegularFile;
        if !self.stat()?.is_some_and(is_file) {
            return Err(Errno::INVAL.into());
        }
        Ok(rustix::fs::openat(&*self.parent, &*self.name, flags, Mode::empty())?.into())
    }

    /// The folder here as a root of its own; NotADirectory for anything else, a symlink too.
    pub fn enter(&self) -> io::Result<Root> {
        let folder =
            rustix::fs::openat(&*self.parent, &*self.name, FOLDER | OFlags::NOFOLLOW, Mode::empty())?;
        Ok(Root { folder: Arc::new(folder), parents: HashMap::new() })
    }

    /// A path whose only multi-step part is the pinned parent; good for calls that do not follow the last component.
    fn proc_path(&self) -> PathBuf {
        let mut path = PathBuf::from(format!("/proc/self/fd/{}", self.parent.as_raw_fd()));
        path.push(OsStr::from_bytes(self.name.as_bytes()));
        path
    }
}

fn names(folder: &OwnedFd) -> io::Result<Vec<Vec<u8>>> {
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let folder = rustix::fs::openat(folder, c".", flags, Mode::empty())?;
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::new(folder)? {
        let entry = entry?;
        let name = entry.file_name().to_bytes();
        if name != b"." && name != b".." {
            names.push(name.to_vec());
        }
    }
    Ok(names)
}

/// The components of a path, with ".." resolved as text and never above the top.
pub fn components(path: &[u8]) -> io::Result<Vec<&[u8]>> {
    if path.len() > PATH_BYTES {
        return Err(Errno::NAMETOOLONG.into());
    }
    if path.contains(&0) {
        return Err(Errno::INVAL.into());
    }
    let mut parts = Vec::new();
    for part in path.split(|byte| *byte == b'/') {
        match part {
            b"" | b"." => {}
            b".." => {
                parts.pop();
            }
            part => parts.push(part),
        }
    }
    Ok(parts)
}

fn timespec(time: SystemTime) -> Timespec {
    match time.duration_since(UNIX_EPOCH) {
        Ok(after) => Timespec {
            tv_sec: i64::try_from(after.as_secs()).unwrap_or(i64::MAX),
            tv_nsec: i64::from(after.subsec_nanos()),
        },
        Err(before) => {
            let before = before.duration();
            // Nanoseconds count upwards, before 1970 too.
            let whole = before + Duration::from_nanos(999_999_999);
            let seconds = -i64::try_from(whole.as_secs()).unwrap_or(i64::MAX);
            let nanos = (1_000_000_000 - before.subsec_nanos()) % 1_000_000_000;
            Timespec { tv_sec: seconds, tv_nsec: i64::from(nanos) }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _, symlink};

    struct Tree {
        _dir: tempfile::TempDir,
        outside: PathBuf,
        top: PathBuf,
        root: Root,
    }

    /// A folder with a root in it, and beside the root what must stay as it is.
    fn tree() -> Tree {
        let dir = tempfile::tempdir().unwrap();
        let (outside, top) = (dir.path().join("outside"), dir.path().join("top"));
        std::fs::create_dir(&outside).unwrap();
        std::fs::write(outside.join("secret"), "s").unwrap();
        std::fs::create_dir(&top).unwrap();
        let root = Root::open(&top).unwrap();
        Tree { _dir: dir, outside, top, root }
    }

    fn ignore(_: &[u8], _: &Place) -> io::Result<()> {
        Ok(())
    }

    fn untouched(tree: &Tree) {
        let names: Vec<_> =
            std::fs::read_dir(&tree.outside).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["secret"]);
        assert_eq!(std::fs::read_to_string(tree.outside.join("secret")).unwrap(), "s");
        assert_eq!(std::fs::metadata(tree.outside.join("secret")).unwrap().nlink(), 1);
    }

    #[test]
    fn paths_as_text() {
        assert_eq!(components(b"/a//./b/../c/").unwrap(), [b"a", b"c"]);
        assert!(components(b"../..//").unwrap().is_empty());
        assert_eq!(components(b"../x").unwrap(), [b"x"]);
        assert!(components(&[b'a'; PATH_BYTES + 1]).is_err());
        assert!(components(b"a\0b").is_err());
    }

    #[test]
    fn nothing_leaves_the_root() {
        let mut tree = tree();
        symlink(&tree.outside, tree.top.join("absolute")).unwrap();
        symlink("../outside", tree.top.join("relative")).unwrap();
        symlink("../../../../../../../../../../etc", tree.top.join("up")).unwrap();
        symlink("/proc/self/root", tree.top.join("magic")).unwrap();
        for path in [
            &b"absolute/new"[..],
            b"relative/new",
            b"../outside/new",
            b"/../../outside/new",
            b"up/new",
            b"magic/new",
            b"absolute/../outside/new",
        ] {
            let place = tree.root.place_making(path, &mut ignore).unwrap().unwrap();
            place
                .make_file()
                .map(drop)
                .or_else(|e| if e.kind() == io::ErrorKind::AlreadyExists { Ok(()) } else { Err(e) })
                .unwrap();
        }
        untouched(&tree);
        assert!(!Path::new("/etc/new").exists());
        // They came to be where a chroot would have put them.
        assert!(tree.top.join("outside/new").exists());
        assert!(tree.top.join("etc/new").exists());
        let inner = tree.outside.strip_prefix("/").unwrap().join("new");
        assert!(tree.top.join(inner).exists());
    }

    #[test]
    fn the_last_component_is_never_followed() {
        let mut tree = tree();
        symlink(tree.outside.join("secret"), tree.top.join("link")).unwrap();
        let before = std::fs::metadata(tree.outside.join("secret")).unwrap();
        let place = tree.root.place(b"link").unwrap().unwrap();
        assert!(place.make_file().is_err());
        place.set_owner(12, 34).unwrap();
        place.set_mode(0o4777).unwrap();
        place.set_times(UNIX_EPOCH, UNIX_EPOCH).unwrap();
        assert!(place.set_xattr(OsStr::new("user.x"), b"y").is_err());
        assert!(place.read().is_err());
        assert!(place.enter().is_err());
        let hard = tree.root.place(b"hard").unwrap().unwrap();
        hard.make_hard_link(&place).unwrap();
        assert!(tree.top.join("hard").is_symlink());
        tree.root.remove(&hard).unwrap();
        tree.root.remove(&place).unwrap();
        let after = std::fs::metadata(tree.outside.join("secret")).unwrap();
        assert_eq!((before.mode(), before.uid(), before.mtime()), (after.mode(), after.uid(), after.mtime()));
        untouched(&tree);
    }

    #[test]
    fn removing_a_tree_leaves_what_its_links_point_to() {
        let mut tree = tree();
        std::fs::create_dir_all(tree.top.join("a/b")).unwrap();
        symlink(&tree.outside, tree.top.join("a/b/out")).unwrap();
        let place = tree.root.place(b"a").unwrap().unwrap();
        tree.root.remove(&place).unwrap();
        assert!(!tree.top.join("a").exists());
        untouched(&tree);
    }

    #[test]
    fn a_folder_replaced_by_a_symlink_is_not_used_from_the_cache() {
        let mut tree = tree();
        tree.root.place_making(b"a/one", &mut ignore).unwrap().unwrap().make_file().unwrap();
        let a = tree.root.place(b"a").unwrap().unwrap();
        tree.root.remove(&a).unwrap();
        a.make_symlink(b"b").unwrap();
        tree.root.place_making(b"a/two", &mut ignore).unwrap().unwrap().make_file().unwrap();
        assert!(tree.top.join("b/two").exists(), "a dangling link's target is made inside the root");
    }

    #[test]
    fn a_file_as_a_parent_is_an_error_and_loops_end() {
        let mut tree = tree();
        std::fs::write(tree.top.join("file"), "").unwrap();
        symlink("y", tree.top.join("x")).unwrap();
        symlink("x", tree.top.join("y")).unwrap();
        assert_eq!(
            tree.root.place_making(b"file/x", &mut ignore).unwrap_err().kind(),
            io::ErrorKind::NotADirectory
        );
        assert!(tree.root.place_making(b"x/z", &mut ignore).is_err());
        assert_eq!(tree.root.place(b"none/x").unwrap_err().kind(), io::ErrorKind::NotFound);
        assert!(tree.root.place(b"/").unwrap().is_none());
        let deep = b"d/".repeat(DEPTH + 2);
        assert!(tree.root.place_making(&deep, &mut ignore).is_err());
    }

    #[test]
    fn made_folders_are_told_with_resolved_paths() {
        let mut tree = tree();
        std::fs::create_dir(tree.top.join("real")).unwrap();
        symlink("/real", tree.top.join("link")).unwrap();
        let mut made: Vec<Vec<u8>> = Vec::new();
        tree.root
            .place_making(b"link/a/b/c", &mut |path, _| {
                made.push(path.to_vec());
                Ok(())
            })
            .unwrap();
        assert_eq!(made, [b"real/a".to_vec(), b"real/a/b".to_vec()]);
        assert_eq!(std::fs::metadata(tree.top.join("real/a")).unwrap().permissions().mode() & 0o7777, 0o755);
    }

    #[test]
    fn attributes() {
        let mut tree = tree();
        let file = tree.root.place(b"f").unwrap().unwrap();
        file.make_file().unwrap();
        file.set_owner(1000, 4_000_000_000).unwrap();
        file.set_xattr(OsStr::new("user.a"), b"1\n2").unwrap();
        file.set_mode(0o4755).unwrap();
        let before_1970 = UNIX_EPOCH - Duration::from_millis(1500);
        file.set_times(UNIX_EPOCH, before_1970).unwrap();
        let stat = file.stat().unwrap().unwrap();
        assert_eq!((stat.st_uid, stat.st_gid, stat.st_mode & 0o7777), (1000, 4_000_000_000, 0o4755));
        assert_eq!(std::fs::metadata(tree.top.join("f")).unwrap().modified().unwrap(), before_1970);
        assert_eq!(file.xattr(OsStr::new("user.a")).unwrap().unwrap(), b"1\n2");
        assert_eq!(file.xattr(OsStr::new("user.b")).unwrap(), None);
        assert_eq!(file.xattr_names().unwrap(), [b"user.a"]);
        assert!(file.set_owner(u32::MAX, 0).is_err());
        let whiteout = tree.root.place(b"w").unwrap().unwrap();
        whiteout.make_special(Special::Character(0, 0)).unwrap();
        assert_eq!(whiteout.stat().unwrap().unwrap().st_rdev, 0);
        assert!(whiteout.read().is_err());
        assert!(tree.root.child(b"..").is_err() && whiteout.sibling(b"a/b").is_err());
    }
}
