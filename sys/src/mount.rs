//! Mounts, in the form the API has them: a type, a source, and option strings as `mount -o` takes them.
//!
//! Overlays go through the new mount API (fsopen and friends), where each lower folder is one parameter: a list of
//! layers is then not bound by the one page that mount(2) copies.
//!
//! The options `uidmap` and `gidmap`, as containerd's snapshotters answer them, are no file system's: a bind is mapped by them,
//! and of an overlay each lower folder.

use std::ffi::{OsStr, OsString};
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::CWD;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags,
    UnmountFlags,
};

/// A mount, as containerd's API describes it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Mount {
    /// The file system's type (`overlay`, `bind`, `tmpfs`, ...).
    pub kind: String,
    /// The device, or the folder to bind.
    pub source: String,
    /// Where, beneath the root that the mounts are put on; empty for the root itself.
    pub target: String,
    /// Options, one a string (`ro`, `lowerdir=/a:/b`).
    pub options: Vec<String>,
}

/// A mount that failed: what was to be mounted where, and why.
#[derive(Debug, thiserror::Error)]
#[error("mount {} {:?} on {} (options {:?}): {source}", mount.kind, mount.source, target.display(), mount.options)]
pub struct MountError {
    /// The mount.
    pub mount: Box<Mount>,
    /// Where.
    pub target: PathBuf,
    /// Why.
    pub source: io::Error,
}

impl From<MountError> for io::Error {
    fn from(error: MountError) -> Self {
        io::Error::new(error.source.kind(), error)
    }
}

/// What the option strings mean to the kernel.
#[derive(Debug, PartialEq)]
struct Options {
    flags: MountFlags,
    clear: MountFlags,
    propagation: Option<MountPropagationFlags>,
    bind: bool,
    /// Whether the source is a file, to be mounted through a loop device.
    loops: bool,
    /// How owners are mapped: users, groups.
    uids: Option<String>,
    gids: Option<String>,
    data: Vec<String>,
}

fn parse(kind: &str, options: &[String]) -> Options {
    let mut parsed = Options {
        flags: MountFlags::empty(),
        clear: MountFlags::empty(),
        propagation: None,
        bind: kind == "bind",
        loops: false,
        uids: None,
        gids: None,
        data: Vec::new(),
    };
    for option in options {
        let recursive = MountPropagationFlags::REC;
        let (set, flag) = match option.as_str() {
            "" | "defaults" => continue,
            "bind" => {
                parsed.bind = true;
                continue;
            }
            "loop" => {
                parsed.loops = true;
                continue;
            }
            "rbind" => {
                parsed.bind = true;
                parsed.flags |= MountFlags::from_bits_retain(MountPropagationFlags::REC.bits());
                continue;
            }
            "private" | "rprivate" | "shared" | "rshared" | "slave" | "rslave" | "unbindable"
            | "runbindable" => {
                let base = match option.trim_start_matches('r') {
                    "private" => MountPropagationFlags::PRIVATE,
                    "shared" => MountPropagationFlags::SHARED,
                    "slave" => MountPropagationFlags::DOWNSTREAM,
                    _ => MountPropagationFlags::UNBINDABLE,
                };
                parsed.propagation = Some(if option.starts_with('r') { base | recursive } else { base });
                continue;
            }
            "ro" => (true, MountFlags::RDONLY),
            "rw" => (false, MountFlags::RDONLY),
            "nosuid" => (true, MountFlags::NOSUID),
            "suid" => (false, MountFlags::NOSUID),
            "nodev" => (true, MountFlags::NODEV),
            "dev" => (false, MountFlags::NODEV),
            "noexec" => (true, MountFlags::NOEXEC),
            "exec" => (false, MountFlags::NOEXEC),
            "noatime" => (true, MountFlags::NOATIME),
            "atime" => (false, MountFlags::NOATIME),
            "nodiratime" => (true, MountFlags::NODIRATIME),
            "diratime" => (false, MountFlags::NODIRATIME),
            "relatime" => (true, MountFlags::RELATIME),
            "norelatime" => (false, MountFlags::RELATIME),
            "strictatime" => (true, MountFlags::STRICTATIME),
            "nostrictatime" => (false, MountFlags::STRICTATIME),
            "sync" => (true, MountFlags::SYNCHRONOUS),
            "async" => (false, MountFlags::SYNCHRONOUS),
            "dirsync" => (true, MountFlags::DIRSYNC),
            other => {
                match other.split_once('=') {
                    Some(("uidmap", map)) => parsed.uids = Some(map.to_owned()),
                    Some(("gidmap", map)) => parsed.gids = Some(map.to_owned()),
                    _ => parsed.data.push(option.clone()),
                }
                continue;
            }
        };
        parsed.flags.set(flag, set);
        parsed.clear.set(flag, !set);
    }
    parsed
}

impl Mount {
    /// Mounts this beneath `root`. The target is resolved inside the root and never through a symlink out of it.
    pub fn mount(&self, root: &Path) -> Result<(), MountError> {
        let fail = |target: &Path, source: io::Error| MountError {
            mount: Box::new(self.clone()),
            target: target.to_owned(),
            source,
        };
        let target = if self.target.is_empty() || self.target == "/" {
            root.to_owned()
        } else {
            beneath(root, Path::new(&self.target)).map_err(|error| fail(&root.join(&self.target), error))?
        };
        let options = parse(&self.kind, &self.options);
        let mounted = if options.uids.is_some() || options.gids.is_some() {
            mapped(&self.kind, &self.source, &target, &options)
        } else if options.bind {
            bind(&self.source, &target, &options).map_err(io::Error::from)
        } else if self.kind == "overlay" {
            overlay(&self.source, &target, &options).map_err(io::Error::from)
        } else if options.loops {
            looped(&self.kind, &self.source, &target, &options)
        } else {
            classic(&self.kind, &self.source, &target, &options).map_err(io::Error::from)
        };
        mounted.map_err(|error| fail(&target, error))
    }
}

/// Mounts a bind or an overlay with other owners.
fn mapped(kind: &str, source: &str, target: &Path, options: &Options) -> io::Result<()> {
    let invalid = |why| io::Error::new(io::ErrorKind::InvalidInput, why);
    let (Some(uids), Some(gids)) = (&options.uids, &options.gids) else {
        return Err(invalid("uidmap and gidmap are of use together only"));
    };
    let namespace = crate::idmap::user_namespace(&crate::idmap::parse(uids)?, &crate::idmap::parse(gids)?)?;
    if options.bind {
        let recursive = MountFlags::from_bits_retain(MountPropagationFlags::REC.bits());
        let tree = crate::idmap::tree(Path::new(source), &namespace, options.flags.contains(recursive))?;
        place(&tree, target)?;
        return Ok(adjust_bind(target, options)?);
    }
    if kind != "overlay" {
        return Err(invalid("only binds and overlays can have uidmap and gidmap"));
    }
    // The mapped folders have to be mounted somewhere for a moment. At the target, whoever takes that down after a kill
    // takes them down, too.
    rustix::mount::mount("tmpfs", target, "tmpfs", MountFlags::empty(), c"mode=0700,size=1m")?;
    let mut points = Vec::new();
    let made = (|| {
        let mut data = Vec::new();
        for option in &options.data {
            let Some(folders) = option.strip_prefix("lowerdir=") else {
                data.push(option.clone());
                continue;
            };
            for folder in split_lower(folders) {
                let point = target.join(points.len().to_string());
                fs::create_dir(&point)?;
                place(&crate::idmap::tree(Path::new(&folder), &namespace, false)?, &point)?;
                points.push(point);
            }
            let folders: Vec<_> = points.iter().map(|point| escape_lower(point.as_os_str())).collect();
            data.push(format!("lowerdir={}", folders.join(OsStr::new(":")).to_string_lossy()));
        }
        Ok::<_, io::Error>(overlay_by_parameters(source, options, &data)?)
    })();
    for point in points.iter().map(PathBuf::as_path).chain([target]) {
        unmount(point)?;
    }
    place(&made?, target)?;
    Ok(propagate(target, options)?)
}

fn place(mount: &OwnedFd, target: &Path) -> rustix::io::Result<()> {
    rustix::mount::move_mount(mount, c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
}

fn looped(kind: &str, source: &str, target: &Path, options: &Options) -> io::Result<()> {
    let read_only = options.flags.contains(MountFlags::RDONLY);
    // Open until the mount keeps it.
    let device = crate::loopdev::Loop::attach(Path::new(source), read_only)?;
    Ok(classic(kind, &device.path().to_string_lossy(), target, options)?)
}

/// Where a target lies in a root, resolved by the kernel as if the root were `/`.
fn beneath(root: &Path, target: &Path) -> io::Result<PathBuf> {
    use rustix::fs::{Mode, OFlags, ResolveFlags};
    let root = rustix::fs::open(root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
    let fd = rustix::fs::openat2(
        &root,
        target,
        OFlags::PATH | OFlags::CLOEXEC,
        Mode::empty(),
        ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS,
    )?;
    use std::os::fd::AsRawFd as _;
    fs::read_link(format!("/proc/self/fd/{}", fd.as_raw_fd()))
}

fn classic(kind: &str, source: &str, target: &Path, options: &Options) -> rustix::io::Result<()> {
    let data = std::ffi::CString::new(options.data.join(",")).map_err(|_| rustix::io::Errno::INVAL)?;
    let data = (!data.is_empty()).then_some(data);
    rustix::mount::mount(source, target, kind, options.flags, data.as_deref())?;
    propagate(target, options)
}

fn bind(source: &str, target: &Path, options: &Options) -> rustix::io::Result<()> {
    let recursive = MountFlags::from_bits_retain(MountPropagationFlags::REC.bits());
    if options.flags.contains(recursive) {
        rustix::mount::mount_bind_recursive(source, target)?;
    } else {
        rustix::mount::mount_bind(source, target)?;
    }
    adjust_bind(target, options)
}

fn adjust_bind(target: &Path, options: &Options) -> rustix::io::Result<()> {
    let recursive = MountFlags::from_bits_retain(MountPropagationFlags::REC.bits());
    // The kernel ignores flags on the bind itself; a second call sets them, and must keep what the source has.
    let wanted = options.flags & !recursive;
    if !wanted.is_empty() || !options.clear.is_empty() {
        let keep = MountFlags::from_bits_truncate(
            rustix::fs::statvfs(target)?.f_flag.bits() as u32
                & (MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC | MountFlags::RDONLY).bits(),
        );
        let flags = MountFlags::BIND | wanted | (keep & !options.clear);
        if let Err(error) = rustix::mount::mount_remount(target, flags, c"") {
            let _ = rustix::mount::unmount(target, UnmountFlags::DETACH);
            return Err(error);
        }
    }
    propagate(target, options)
}

fn propagate(target: &Path, options: &Options) -> rustix::io::Result<()> {
    match options.propagation {
        Some(flags) => rustix::mount::mount_change(target, flags),
        None => Ok(()),
    }
}

fn overlay(source: &str, target: &Path, options: &Options) -> rustix::io::Result<()> {
    use rustix::io::Errno;
    match overlay_by_parameters(source, options, &options.data).and_then(|mount| place(&mount, target)) {
        // A kernel without fsopen, or one before 6.5 that does not know `lowerdir+`.
        Err(Errno::NOSYS | Errno::INVAL | Errno::PERM) => classic("overlay", source, target, options),
        Err(error) => Err(error),
        Ok(()) => propagate(target, options),
    }
}

/// An overlay with this data; mounted nowhere yet.
fn overlay_by_parameters(source: &str, options: &Options, data: &[String]) -> rustix::io::Result<OwnedFd> {
    use rustix::mount::{fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen};
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC)?;
    let context = std::os::fd::AsFd::as_fd(&context);
    fsconfig_set_string(context, "source", if source.is_empty() { "overlay" } else { source })?;
    for option in data {
        match option.split_once('=') {
            Some(("lowerdir", folders)) => {
                for folder in split_lower(folders) {
                    fsconfig_set_string(context, "lowerdir+", folder)?;
                }
            }
            Some((key, value)) => fsconfig_set_string(context, key, value)?,
            None => fsconfig_set_flag(context, option.as_str())?,
        }
    }
    if options.flags.contains(MountFlags::RDONLY) {
        fsconfig_set_flag(context, "ro")?;
    }
    fsconfig_create(context)?;
    let mut attributes = MountAttrFlags::empty();
    for (flag, attribute) in [
        (MountFlags::RDONLY, MountAttrFlags::MOUNT_ATTR_RDONLY),
        (MountFlags::NOSUID, MountAttrFlags::MOUNT_ATTR_NOSUID),
        (MountFlags::NODEV, MountAttrFlags::MOUNT_ATTR_NODEV),
        (MountFlags::NOEXEC, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        (MountFlags::NOATIME, MountAttrFlags::MOUNT_ATTR_NOATIME),
    ] {
        attributes.set(attribute, options.flags.contains(flag));
    }
    fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
}

/// Splits `/a:/b\:c` at its unescaped colons, and takes the escapes away.
fn split_lower(folders: &str) -> Vec<String> {
    let mut list = vec![String::new()];
    let mut chars = folders.chars();
    while let Some(c) = chars.next() {
        match c {
            ':' => list.push(String::new()),
            '\\' => last(&mut list).extend(chars.next()),
            c => last(&mut list).push(c),
        }
    }
    list
}

fn last(list: &mut Vec<String>) -> &mut String {
    if list.is_empty() {
        list.push(String::new());
    }
    let at = list.len() - 1;
    &mut list[at]
}

/// Puts all mounts on `root`, in order; when one fails, those before it are taken down again.
pub fn mount_all(mounts: &[Mount], root: &Path) -> Result<(), MountError> {
    for (done, mount) in mounts.iter().enumerate() {
        if let Err(error) = mount.mount(root) {
            if done > 0 {
                let _ = unmount_all(root);
            }
            return Err(error);
        }
    }
    Ok(())
}

/// Takes down the topmost mount on `path`; a path that is no mount point, or is gone, is no error.
pub fn unmount(path: &Path) -> io::Result<()> {
    match rustix::mount::unmount(path, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW) {
        Ok(()) | Err(rustix::io::Errno::INVAL | rustix::io::Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// Takes down every mount at and beneath `path`, the deepest first, until none is left.
pub fn unmount_all(path: &Path) -> io::Result<()> {
    // More rounds than one, since mounts may be stacked and may come in from a peer.
    for _ in 0..16 {
        let mounts = mounts_under(path)?;
        if mounts.is_empty() {
            return Ok(());
        }
        for mount in mounts.iter().rev() {
            unmount(mount)?;
        }
    }
    Err(io::Error::other(format!("mounts keep coming back under {}", path.display())))
}

/// What is mounted where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The mount point.
    pub point: PathBuf,
    /// The file system's type.
    pub kind: OsString,
    /// What it was mounted from, as far as its file system says so.
    pub source: OsString,
}

/// Everything that is mounted, in the order it was.
pub fn table() -> io::Result<Vec<Entry>> {
    let table = fs::read("/proc/self/mountinfo")?;
    let entry = |line: &[u8]| {
        let mut fields = line.split(|byte| *byte == b' ');
        let point = PathBuf::from(unescape(fields.nth(4)?));
        let mut rest = fields.skip_while(|field| *field != b"-").skip(1).map(unescape);
        Some(Entry { point, kind: rest.next()?, source: rest.next()? })
    };
    Ok(table.split(|byte| *byte == b'\n').filter_map(entry).collect())
}

/// The mount points at and beneath `path`, in the order they were mounted.
pub fn mounts_under(path: &Path) -> io::Result<Vec<PathBuf>> {
    let path = fs::canonicalize(path).unwrap_or_else(|_| path.to_owned());
    let table = fs::read("/proc/self/mountinfo")?;
    Ok(table
        .split(|byte| *byte == b'\n')
        .filter_map(|line| line.split(|byte| *byte == b' ').nth(4))
        .map(|point| PathBuf::from(unescape(point)))
        .filter(|point| point.starts_with(&path))
        .collect())
}

/// The type and the source of the file system that is mounted where `path` lies.
pub fn filesystem_of(path: &Path) -> io::Result<(String, String)> {
    use rustix::fs::{Mode, OFlags};
    use std::os::fd::AsRawFd as _;
    let fd = rustix::fs::open(path, OFlags::PATH | OFlags::CLOEXEC, Mode::empty())?;
    let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", fd.as_raw_fd()))?;
    let number = info.lines().find_map(|line| line.strip_prefix("mnt_id:")).unwrap_or_default().trim();
    // Not text as a whole: mount points are any bytes.
    for line in fs::read("/proc/self/mountinfo")?.split(|byte| *byte == b'\n') {
        let mut fields = line.split(|byte| *byte == b' ');
        if fields.next() == Some(number.as_bytes()) {
            let mut rest = fields.skip_while(|field| *field != b"-").skip(1);
            let mut next = || unescape(rest.next().unwrap_or_default()).to_string_lossy().into_owned();
            return Ok((next(), next()));
        }
    }
    Err(io::Error::new(io::ErrorKind::NotFound, "its mount is not in the table of mounts"))
}

/// Whether something is mounted right on `path`.
pub fn is_mountpoint(path: &Path) -> io::Result<bool> {
    let path = fs::canonicalize(path)?;
    Ok(mounts_under(&path)?.contains(&path))
}

/// The kernel writes blank, tab, newline and backslash in mountinfo as three octal digits.
fn unescape(field: &[u8]) -> OsString {
    let mut out = Vec::with_capacity(field.len());
    let mut at = 0;
    while at < field.len() {
        let octal = (field[at] == b'\\')
            .then(|| field.get(at + 1..at + 4))
            .flatten()
            .and_then(|digits| std::str::from_utf8(digits).ok())
            .and_then(|digits| u8::from_str_radix(digits, 8).ok());
        match octal {
            Some(byte) => {
                out.push(byte);
                at += 4;
            }
            None => {
                out.push(field[at]);
                at += 1;
            }
        }
    }
    OsString::from_vec(out)
}

/// The folder itself, when the mounts are nothing but one writable bind of it: no mount is needed to write there.
pub fn as_plain_dir(mounts: &[Mount]) -> Option<PathBuf> {
    let [mount] = mounts else { return None };
    let plain = mount.kind == "bind"
        && mount.target.is_empty()
        && mount.options.iter().all(|option| matches!(option.as_str(), "bind" | "rbind" | "rw"));
    plain.then(|| PathBuf::from(&mount.source))
}

/// Mounts on a private folder for as long as this lives.
#[derive(Debug)]
pub struct Mounted {
    folder: PathBuf,
}

impl Mounted {
    /// Makes a folder in `parent` and puts the mounts on it.
    pub fn new(mounts: &[Mount], parent: &Path) -> io::Result<Self> {
        let mut tries = 0;
        let folder = loop {
            let folder = parent.join(format!("mount-{}-{}", std::process::id(), next_number()));
            match crate::fs::create_dir(&folder, 0o700) {
                Ok(()) => break folder,
                Err(error) if error.kind() == io::ErrorKind::AlreadyExists && tries < 1000 => tries += 1,
                Err(error) => return Err(error),
            }
        };
        let mounted = Mounted { folder };
        mount_all(mounts, &mounted.folder)?;
        Ok(mounted)
    }

    /// Where the mounts are.
    pub fn path(&self) -> &Path {
        &self.folder
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        let unmounted = unmount_all(&self.folder);
        // Only an empty folder goes: whatever is still mounted there is left alone.
        if let Err(error) = unmounted.and_then(|()| fs::remove_dir(&self.folder)) {
            tracing::warn!(folder = %self.folder.display(), %error, "could not take a temporary mount down");
        }
    }
}

fn next_number() -> u64 {
    static NEXT: std::sync::atomic::AtomicU64 = std::sync::atomic::AtomicU64::new(0);
    NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed)
}

/// Escapes a folder for a `lowerdir=` list, where colon and backslash are special.
pub fn escape_lower(folder: &OsStr) -> OsString {
    let mut out = Vec::with_capacity(folder.len());
    for byte in folder.as_bytes() {
        if matches!(byte, b':' | b'\\') {
            out.push(b'\\');
        }
        out.push(*byte);
    }
    OsString::from_vec(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> bool {
        let root = rustix::process::geteuid().is_root();
        if !root {
            assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "this test cannot run here");
            println!("SKIPPED: mounting needs root");
        }
        root
    }

    fn mount(kind: &str, source: &Path, options: &[&str]) -> Mount {
        Mount {
            kind: kind.into(),
            source: source.display().to_string(),
            target: String::new(),
            options: options.iter().map(|option| (*option).to_owned()).collect(),
        }
    }

    #[test]
    fn options_are_understood() {
        let options = parse("bind", &["rbind".into(), "ro".into(), "rprivate".into(), "x=y".into()]);
        assert!(options.bind && options.flags.contains(MountFlags::RDONLY));
        assert_eq!(options.propagation, Some(MountPropagationFlags::PRIVATE | MountPropagationFlags::REC));
        assert_eq!(options.data, ["x=y"]);
        assert_eq!(split_lower("/a:/b\\:c:/d"), ["/a", "/b:c", "/d"]);
        assert_eq!(escape_lower(OsStr::new("/b:c")), "/b\\:c");
        assert_eq!(unescape(b"/a\\040b\\134"), "/a b\\");
    }

    #[test]
    fn binds_read_only_and_comes_down() {
        if !root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let source = dir.path().join("with blank");
        fs::create_dir(&source).unwrap();
        let mounted = Mounted::new(&[mount("bind", &source, &["rbind", "ro"])], dir.path()).unwrap();
        let path = mounted.path().to_owned();
        assert!(is_mountpoint(&path).unwrap());
        assert_eq!(fs::write(path.join("x"), "").unwrap_err().kind(), io::ErrorKind::ReadOnlyFilesystem);
        fs::write(source.join("x"), "seen").unwrap();
        assert_eq!(fs::read(path.join("x")).unwrap(), b"seen");
        drop(mounted);
        assert!(!path.exists() && source.join("x").exists());
    }

    #[test]
    fn overlays_of_more_layers_than_a_page_names() {
        if !root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("n".repeat(120));
        let mut lowers = Vec::new();
        for layer in 0..60 {
            let folder = long.join(format!("{layer}"));
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(format!("f{layer}")), format!("{layer}")).unwrap();
            lowers.push(folder.display().to_string());
        }
        let (upper, work) = (dir.path().join("u"), dir.path().join("w"));
        fs::create_dir(&upper).unwrap();
        fs::create_dir(&work).unwrap();
        let lower = format!("lowerdir={}", lowers.join(":"));
        assert!(lower.len() > 4096);
        let options = [
            lower.as_str(),
            &format!("upperdir={}", upper.display()),
            &format!("workdir={}", work.display()),
        ];
        let mounted = Mounted::new(&[mount("overlay", Path::new("overlay"), &options)], dir.path()).unwrap();
        assert_eq!(fs::read_dir(mounted.path()).unwrap().count(), 60);
        fs::write(mounted.path().join("new"), "x").unwrap();
        assert!(upper.join("new").exists());
    }

    #[test]
    fn a_failed_mount_leaves_nothing_and_says_what_it_was() {
        if !root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let target = dir.path().join("t");
        fs::create_dir(&target).unwrap();
        let good = mount("tmpfs", Path::new("tmpfs"), &["size=1m"]);
        let bad = mount("bind", Path::new("/nonexistent/x"), &["rbind"]);
        let error = mount_all(&[good, bad], &target).unwrap_err().to_string();
        assert!(error.contains("/nonexistent/x") && error.contains("No such file"), "{error}");
        assert!(mounts_under(&target).unwrap().is_empty());
    }

    #[test]
    fn a_target_does_not_leave_its_root() {
        if !root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (target, outside) = (dir.path().join("t"), dir.path().join("outside"));
        fs::create_dir(&target).unwrap();
        fs::create_dir(&outside).unwrap();
        std::os::unix::fs::symlink(&outside, target.join("link")).unwrap();
        let mut tmpfs = mount("tmpfs", Path::new("tmpfs"), &["size=1m"]);
        tmpfs.target = "link".into();
        assert!(tmpfs.mount(&target).is_err());
        assert!(mounts_under(dir.path()).unwrap().is_empty());
    }
}
