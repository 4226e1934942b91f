//! Namespaces that exist without a process in them: each is bound to a file.
//!
//! They are made by a thread of their own, which ends afterwards: what a thread leaves or joins is its own affair, and
//! no other thread of the program notices. Into a namespace of users go only processes of one thread: those of a pod that has
//! one are made by a child ([`pin_users`]) and by a helper program ([`enter_users`]), and bound by who started it ([`pin_of`]).

use std::fs::File;
use std::io;
use std::path::{Path, PathBuf};

use nix::sched::{CloneFlags, setns, unshare};
use rustix::fs::{Gid, Uid};
use rustix::process::{DumpableBehavior, set_dumpable_behavior};
use rustix::thread::{
    CapabilitySets, capabilities, set_capabilities, set_keep_capabilities, set_thread_groups,
    set_thread_res_gid, set_thread_res_uid,
};

use crate::idmap::{Holder, Mapping};
use crate::mount::{Mount, unmount};

/// A kind of namespace.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Kind {
    /// System V and POSIX message queues, shared memory.
    Ipc,
    /// Network devices, addresses, ports.
    Network,
    /// Process ids. Its first process is made by who runs in `within`; the namespace ends with that process.
    Pid,
    /// Users and groups.
    User,
    /// Host and domain name.
    Uts,
}

impl Kind {
    /// The kind by the name that OCI has for it; None for those that cannot be made here.
    pub fn from_oci(name: &str) -> Option<Self> {
        Some(match name {
            "ipc" => Kind::Ipc,
            "network" => Kind::Network,
            "pid" => Kind::Pid,
            "user" => Kind::User,
            "uts" => Kind::Uts,
            _ => return None,
        })
    }

    /// The name that the kernel has for it, beneath /proc/PID/ns.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Ipc => "ipc",
            Kind::Network => "net",
            Kind::Pid => "pid",
            Kind::User => "user",
            Kind::Uts => "uts",
        }
    }

    fn flag(self) -> CloneFlags {
        match self {
            Kind::Ipc => CloneFlags::CLONE_NEWIPC,
            Kind::Network => CloneFlags::CLONE_NEWNET,
            Kind::Pid => CloneFlags::CLONE_NEWPID,
            Kind::User => CloneFlags::CLONE_NEWUSER,
            Kind::Uts => CloneFlags::CLONE_NEWUTS,
        }
    }
}

/// Makes the namespaces of `make`, joins those of `join`, and runs `within` in all of them; then those that were made are
/// bound to their files. On failure no file is left bound. Blocks.
pub fn pin<T: Send>(
    make: &[(Kind, PathBuf)],
    join: &[(Kind, PathBuf)],
    within: impl FnOnce() -> io::Result<T> + Send,
) -> io::Result<T> {
    std::thread::scope(|scope| {
        let made = scope.spawn(|| {
            for (kind, path) in join {
                let namespace = File::open(path).map_err(|error| on("open", path, &error))?;
                setns(&namespace, kind.flag()).map_err(|error| on("join", path, &error.into()))?;
            }
            unshare(all_of(make.iter().map(|(kind, _)| *kind)))?;
            let outcome = within()?;
            bind_all("thread-self", make)?;
            Ok(outcome)
        });
        made.join().unwrap_or_else(|_| Err(io::Error::other("the thread that makes namespaces panicked")))
    })
}

/// Makes a namespace of users with these mappings, and, where a file is given for that, one of the network, which it owns; both
/// are bound to their files. On failure neither is. Blocks.
///
/// The kernel counts what is in the namespace (locked memory, signals, queues) against who made it, too. So it is made in the name
/// of who is root in it: what one pod uses is then not missing to another.
pub fn pin_users(users: &Path, network: Option<&Path>, uids: &[Mapping], gids: &[Mapping]) -> io::Result<()> {
    let root = |mappings: &[Mapping]| {
        let mapping = mappings.iter().find(|mapping| mapping.inside == 0);
        mapping.map(|mapping| mapping.outside).ok_or_else(|| io::Error::other("the mappings have no root"))
    };
    let (uid, gid) = (Uid::from_raw(root(uids)?), Gid::from_raw(root(gids)?));
    let mut make = vec![(Kind::User, users.to_owned())];
    make.extend(network.map(|network| (Kind::Network, network.to_owned())));
    std::thread::scope(|scope| {
        let made = scope.spawn(|| {
            let CapabilitySets { effective, permitted, inheritable } = capabilities(None)?;
            set_keep_capabilities(true)?;
            set_thread_res_gid(gid, gid, gid)?;
            set_thread_res_uid(uid, uid, uid)?;
            // Not every machine lets just anybody make one.
            set_capabilities(None, CapabilitySets { effective, permitted, inheritable })?;
            let holder = Holder::new(all_of(make.iter().map(|(kind, _)| *kind)).bits());
            set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)?;
            set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
            // The whole program lost that by the change, and none of it is anybody else's.
            set_dumpable_behavior(DumpableBehavior::Dumpable)?;
            let holder = holder?;
            holder.map(uids, gids)?;
            bind_all(&holder.pid().to_string(), &make)
        });
        made.join().unwrap_or_else(|_| Err(io::Error::other("the thread that makes namespaces panicked")))
    })
}

/// Goes into the namespace of users at `users` and into those of `join`, makes those of `make`, which the first one owns, and becomes
/// root there. For a process of one thread, which has no way back.
pub fn enter_users(users: &Path, join: &[(Kind, PathBuf)], make: &[Kind]) -> io::Result<()> {
    let open = |path: &Path| File::open(path).map_err(|error| on("open", path, &error));
    let opened = open(users)?;
    let others =
        join.iter().map(|(kind, path)| Ok((*kind, path, open(path)?))).collect::<io::Result<Vec<_>>>()?;
    setns(&opened, CloneFlags::CLONE_NEWUSER).map_err(|error| on("join", users, &error.into()))?;
    set_thread_groups(&[])?;
    set_thread_res_gid(Gid::ROOT, Gid::ROOT, Gid::ROOT)?;
    set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT)?;
    for (kind, path, namespace) in &others {
        setns(namespace, kind.flag()).map_err(|error| on("join", path, &error.into()))?;
    }
    Ok(unshare(all_of(make.iter().copied()))?)
}

/// Binds namespaces of a process to files; that of process ids is the one that its children are in. On failure none is bound.
pub fn pin_of(pid: u32, namespaces: &[(Kind, PathBuf)]) -> io::Result<()> {
    bind_all(&pid.to_string(), namespaces)
}

/// Sets the names of the machine, and of its domain, in the caller's namespace; an empty one is left as it is.
pub fn set_names(host: &str, domain: &str) -> io::Result<()> {
    let named = |what: &str, error: rustix::io::Errno| {
        io::Error::new(io::Error::from(error).kind(), format!("set the {what}: {error}"))
    };
    if !host.is_empty() {
        rustix::system::sethostname(host.as_bytes()).map_err(|error| named("hostname", error))?;
    }
    if !domain.is_empty() {
        rustix::system::setdomainname(domain.as_bytes()).map_err(|error| named("domain name", error))?;
    }
    Ok(())
}

fn all_of(kinds: impl Iterator<Item = Kind>) -> CloneFlags {
    kinds.fold(CloneFlags::empty(), |flags, kind| flags | kind.flag())
}

/// Binds those of a process, as /proc calls it.
fn bind_all(process: &str, namespaces: &[(Kind, PathBuf)]) -> io::Result<()> {
    for (at, (kind, path)) in namespaces.iter().enumerate() {
        if let Err(error) = bind(process, *kind, path) {
            namespaces[..at].iter().for_each(|(_, path)| drop(unpin(path)));
            return Err(error);
        }
    }
    Ok(())
}

fn bind(process: &str, kind: Kind, path: &Path) -> io::Result<()> {
    File::create(path).map_err(|error| on("create", path, &error))?;
    let name = if kind == Kind::Pid { "pid_for_children" } else { kind.name() };
    let source = format!("/proc/{process}/ns/{name}");
    let mount = Mount { kind: "bind".into(), source, target: String::new(), options: vec!["bind".into()] };
    mount.mount(path).map_err(|error| {
        let _ = std::fs::remove_file(path);
        io::Error::other(error)
    })
}

/// Lets go of a namespace that was bound to this file; what is not there is no error.
pub fn unpin(path: &Path) -> io::Result<()> {
    unmount(path)?;
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

fn on(what: &str, path: &Path, error: &io::Error) -> io::Error {
    io::Error::new(error.kind(), format!("{what} {}: {error}", path.display()))
}

#[cfg(test)]
mod tests {
    use std::os::fd::{AsRawFd as _, FromRawFd as _, OwnedFd};

    use super::*;

    #[test]
    fn users_own_the_network_that_is_made_with_them() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (users, network) = (dir.path().join("user"), dir.path().join("net"));
        let mapping = [Mapping { inside: 0, outside: 100_000, count: 10 }];
        pin_users(&users, Some(&network), &mapping, &mapping).unwrap();
        let owner = |path: &Path| {
            let namespace = File::open(path).unwrap();
            // SAFETY: this call takes no argument, and its answer is a descriptor that is ours.
            let owner = unsafe {
                let owner = libc::ioctl(namespace.as_raw_fd(), libc::NS_GET_USERNS);
                assert!(owner >= 0);
                OwnedFd::from_raw_fd(owner)
            };
            rustix::fs::fstat(owner).unwrap().st_ino
        };
        assert_eq!(owner(&network), rustix::fs::stat(&users).unwrap().st_ino);
        assert!(nix::unistd::geteuid().is_root() && nix::sys::prctl::get_dumpable().unwrap());
        let beyond = [Mapping { inside: 0, outside: 0, count: u32::MAX }; 2];
        assert!(pin_users(&dir.path().join("none"), None, &beyond, &mapping).is_err());
        assert!(!dir.path().join("none").exists());
        for path in [&users, &network] {
            unpin(path).unwrap();
        }
    }

    #[test]
    fn a_namespace_stays_without_a_process() {
        if !nix::unistd::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let (uts, ipc) = (dir.path().join("uts"), dir.path().join("ipc"));
        pin(&[(Kind::Uts, uts.clone()), (Kind::Ipc, ipc.clone())], &[], || {
            Ok(nix::unistd::sethostname("pinned")?)
        })
        .unwrap();
        let inside = pin(&[], &[(Kind::Uts, uts.clone())], || Ok(nix::unistd::gethostname()?)).unwrap();
        assert_eq!(inside, "pinned");
        assert_ne!(nix::unistd::gethostname().unwrap(), "pinned");

        let failed =
            pin(&[(Kind::Network, dir.path().join("net"))], &[], || Err::<(), _>(io::Error::other("no")));
        assert!(failed.is_err() && !dir.path().join("net").exists());
        let nowhere = dir.path().join("none/uts");
        let three = [(Kind::Network, dir.path().join("net")), (Kind::Uts, nowhere)];
        assert!(pin(&three, &[], || Ok(())).is_err());
        for path in [&uts, &ipc] {
            unpin(path).unwrap();
            unpin(path).unwrap();
        }
        assert_eq!(crate::mount::mounts_under(dir.path()).unwrap(), Vec::<PathBuf>::new());
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }
}
