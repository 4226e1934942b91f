//! Idmapped mounts: a file tree whose owners are other ones on the way through a mount.
//!
//! The kernel takes the mapping from a user namespace. One is made for it by a child that does nothing and
//! is killed; the child sends no signal when it does, and nobody who waits for any child is given it.

use std::fs::{self, File};
use std::io;
use std::os::fd::{AsRawFd as _, OwnedFd};
use std::path::Path;

use rustix::fs::{AtFlags, CWD};
use rustix::mount::{MoveMountFlags, OpenTreeFlags};

/// `count` ids from `inside` on are those from `outside` on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Mapping {
    /// The first in the namespace.
    pub inside: u32,
    /// The first on the host.
    pub outside: u32,
    /// How many.
    pub count: u32,
}

/// Reads `inside:outside:count[,...]`, as containerd's labels and mount options have it.
pub fn parse(text: &str) -> io::Result<Vec<Mapping>> {
    let fail = || {
        let why = format!("{text:?} is no list of container-id:host-id:size");
        io::Error::new(io::ErrorKind::InvalidInput, why)
    };
    let one = |text: &str| {
        let numbers: Option<Vec<u32>> = text.split(':').map(|number| number.parse().ok()).collect();
        match numbers.as_deref() {
            Some([inside, outside, count]) if *count > 0 => {
                Some(Mapping { inside: *inside, outside: *outside, count: *count })
            }
            _ => None,
        }
    };
    text.split(',').map(|text| one(text).ok_or_else(fail)).collect()
}

/// A user namespace with these mappings, for as long as the descriptor is open.
pub fn user_namespace(uids: &[Mapping], gids: &[Mapping]) -> io::Result<OwnedFd> {
    let holder = Holder::new(libc::CLONE_NEWUSER)?;
    holder.map(uids, gids)?;
    Ok(File::open(format!("/proc/{}/ns/user", holder.pid))?.into())
}

/// A child that does nothing, in namespaces of its own. Dropped, it is gone; what refers to its namespaces keeps them.
pub(crate) struct Holder {
    pid: libc::pid_t,
}

impl Holder {
    /// Makes it with these namespaces; if that of users is among them, it owns the others.
    pub(crate) fn new(namespaces: libc::c_int) -> io::Result<Self> {
        // SAFETY: zero is a valid value of each of its numbers.
        let mut arguments: libc::clone_args = unsafe { std::mem::zeroed() };
        // No exit signal: to who waits for any child this is none.
        arguments.flags = u64::from(namespaces.cast_unsigned());
        let parent = std::process::id();
        // SAFETY: a fork, as no memory is shared. The child makes system calls alone, on its own copies, and returns nowhere. It
        // waits for nothing but its end: a pipe's other end may be in another such child, made at the same time.
        let pid = unsafe {
            let pid = libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<libc::clone_args>());
            if pid == 0 {
                libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
                while libc::syscall(libc::SYS_getppid) == libc::c_long::from(parent) {
                    libc::syscall(libc::SYS_ppoll, 0, 0, 0, 0, 0);
                }
                libc::syscall(libc::SYS_exit_group, 0);
            }
            pid
        };
        if pid < 0 { Err(io::Error::last_os_error()) } else { Ok(Holder { pid: pid as libc::pid_t }) }
    }

    /// Maps its users and groups.
    pub(crate) fn map(&self, uids: &[Mapping], gids: &[Mapping]) -> io::Result<()> {
        let text = |mappings: &[Mapping]| {
            let lines = mappings.iter().map(|m| format!("{} {} {}\n", m.inside, m.outside, m.count));
            lines.collect::<String>()
        };
        fs::write(format!("/proc/{}/uid_map", self.pid), text(uids))?;
        fs::write(format!("/proc/{}/gid_map", self.pid), text(gids))
    }

    /// Its process id, beneath which the kernel shows its namespaces.
    pub(crate) fn pid(&self) -> libc::pid_t {
        self.pid
    }
}

impl Drop for Holder {
    fn drop(&mut self) {
        // SAFETY: the child has not been waited for, so that the number is its.
        unsafe { libc::kill(self.pid, libc::SIGKILL) };
        // SAFETY: waits for the one child that was made above, and takes no status.
        while unsafe { libc::waitpid(self.pid, std::ptr::null_mut(), libc::__WCLONE) } < 0 {
            if io::Error::last_os_error().kind() != io::ErrorKind::Interrupted {
                return;
            }
        }
    }
}

/// A copy of the mount at `path` (of all beneath it, too, if `recursive`), mapped by a user namespace; mounted nowhere yet.
pub fn tree(path: &Path, namespace: &OwnedFd, recursive: bool) -> io::Result<OwnedFd> {
    let tree = copy(path, recursive)?;
    set_attributes(&tree, Some(namespace), libc::MS_PRIVATE, recursive)?;
    Ok(tree)
}

/// Mounts what is at `source`, and all beneath it, at `target`. The topmost mount is mapped, as runtimes do it: those beneath may
/// be of file systems that take no mapping. What the machine mounts beneath the source later is seen if the copy `follows` it;
/// what is done to the copy never reaches the source.
pub fn bind(
    source: &Path,
    target: &Path,
    uids: &[Mapping],
    gids: &[Mapping],
    follows: bool,
) -> io::Result<()> {
    let namespace = user_namespace(uids, gids)?;
    let tree = copy(source, true)?;
    // All of it: unmounting a copy that is shared would unmount beneath the source.
    set_attributes(&tree, None, if follows { libc::MS_SLAVE } else { libc::MS_PRIVATE }, true)?;
    set_attributes(&tree, Some(&namespace), 0, false)?;
    Ok(rustix::mount::move_mount(&tree, c"", CWD, target, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)?)
}

fn copy(path: &Path, recursive: bool) -> io::Result<OwnedFd> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    flags.set(OpenTreeFlags::AT_RECURSIVE, recursive);
    Ok(rustix::mount::open_tree(CWD, path, flags)?)
}

fn set_attributes(
    tree: &OwnedFd,
    namespace: Option<&OwnedFd>,
    propagation: libc::c_ulong,
    recursive: bool,
) -> io::Result<()> {
    let mut at = AtFlags::EMPTY_PATH.bits();
    if recursive {
        at |= libc::AT_RECURSIVE as u32;
    }
    let attributes = libc::mount_attr {
        attr_set: if namespace.is_some() { libc::MOUNT_ATTR_IDMAP } else { 0 },
        attr_clr: 0,
        propagation,
        userns_fd: namespace.map_or(0, |namespace| namespace.as_raw_fd() as u64),
    };
    // SAFETY: the kernel reads the empty path and an argument of exactly this layout, which live as long as the call.
    let set = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            tree.as_raw_fd(),
            c"".as_ptr(),
            at,
            &raw const attributes,
            size_of::<libc::mount_attr>(),
        )
    };
    if set == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn namespaces_are_made_by_many_at_once() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let mapping = [Mapping { inside: 0, outside: 1000, count: 10 }];
        let make = || (0..20).for_each(|_| drop(user_namespace(&mapping, &mapping).unwrap()));
        std::thread::scope(|scope| (0..8).for_each(|_| drop(scope.spawn(make))));
    }

    #[test]
    fn a_copy_has_other_owners_and_comes_down_alone() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let [source, target, beneath] =
            ["source", "target", "source/beneath"].map(|name| dir.path().join(name));
        fs::create_dir_all(&beneath).unwrap();
        fs::create_dir(&target).unwrap();
        fs::write(source.join("file"), "").unwrap();
        let mount = |kind: &str, source: &Path, options: &[&str], at: &Path| {
            let options = options.iter().map(|option| (*option).to_owned()).collect();
            let source = source.display().to_string();
            let mount = crate::mount::Mount { kind: kind.into(), source, target: String::new(), options };
            mount.mount(at).unwrap();
        };
        mount("bind", &source, &["bind", "shared"], &source);
        mount("tmpfs", Path::new("none"), &["size=1m"], &beneath);
        mount("bind", &beneath, &["bind", "shared"], &beneath);
        fs::write(beneath.join("file"), "").unwrap();
        let mapping = [Mapping { inside: 0, outside: 100_000, count: 10 }];
        bind(&source, &target, &mapping, &mapping, true).unwrap();
        use std::os::unix::fs::MetadataExt as _;
        let owner = |path: &Path| fs::metadata(path).unwrap().uid();
        assert_eq!((owner(&target.join("file")), owner(&source.join("file"))), (100_000, 0));
        assert_eq!(owner(&target.join("beneath/file")), 0, "the topmost alone");
        crate::mount::unmount_all(&target).unwrap();
        assert!(beneath.join("file").exists(), "the copy took the source's mounts with it");
        // Not every file system has owners that could be others.
        let refused = bind(Path::new("/proc/sys"), &target, &mapping, &mapping, false).unwrap_err();
        assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{refused}");
        crate::mount::unmount_all(dir.path()).unwrap();
    }

    #[test]
    fn mappings_are_read() {
        let mapping = |inside, outside, count| Mapping { inside, outside, count };
        assert_eq!(parse("0:1000:10,10:5:1").unwrap(), [mapping(0, 1000, 10), mapping(10, 5, 1)]);
        for wrong in ["", "0:1", "0:1:0", "a:1:1", "0:1:2:3", "0:1:2,"] {
            assert!(parse(wrong).unwrap_err().to_string().contains("host-id"), "{wrong}");
        }
    }

    #[test]
    fn a_namespace_is_made_and_no_child_is_left() {
        if !rustix::process::geteuid().is_root() {
            assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "this test cannot run here");
            println!("SKIPPED: making a user namespace needs root");
            return;
        }
        let mapping = [Mapping { inside: 0, outside: 100_000, count: 10 }];
        let namespace = user_namespace(&mapping, &mapping).unwrap();
        let own = fs::read_link("/proc/self/ns/user").unwrap();
        let made = fs::read_link(format!("/proc/self/fd/{}", namespace.as_raw_fd())).unwrap();
        assert!(made.to_str().unwrap().starts_with("user:") && made != own);
        assert!(user_namespace(&[], &[Mapping { inside: 0, outside: 0, count: u32::MAX }; 2]).is_err());
        let children = fs::read_to_string("/proc/thread-self/children").unwrap();
        assert_eq!(children, "");
    }
}
