//! Where pods and containers have their files, and the making of those that a pod's containers share.
//!
//! ```text
//!  <state>/cri/pods/POD/{hostname,hosts,resolv.conf,shm/}   bound into the pod's containers
//!  <state>/cri/pods/POD/images/NUMBER/                      images that are mounted into its containers
//!  <state>/cri/netns/POD                                    the pod's network namespace is bound to this file
//!  <state>/cri/userns/POD                                   its namespace of users, where it has one: the owner of the others
//!  <state>/cri/mapped/CONTAINER/NUMBER                      its id-mapped mounts, while its task is made
//!  <state>/cri/streams/CONTAINER                            the socket of the container's logger
//!  <state>/cri/mounts/                                      images that are looked into
//!  <root>/cri/containers/CONTAINER/volumes/NUMBER/          what its image calls volumes
//! ```
//!
//! Invariant: all of a pod or container is beneath folders that are called as its id, so that it can be taken down by that alone.

use std::fs;
use std::io;
use std::path::{Path, PathBuf};

use proto::runtime::v1::DnsConfig;
use sys::mount::Mount;
use sys::namespace::{self, Kind};

use super::spec::Users;
use crate::error::{Error, Result};

/// Bytes of a pod's shared memory.
const SHM: u64 = 64 << 20;

/// The folders.
#[derive(Debug, Clone)]
pub struct Places {
    root: PathBuf,
    state: PathBuf,
}

impl Places {
    /// Beneath the engine's root and state.
    pub fn new(root: &Path, state: &Path) -> Self {
        Places { root: root.join("cri"), state: state.join("cri") }
    }

    /// Makes the folders that all pods share. Blocks.
    pub fn make(&self) -> Result<()> {
        for (folder, mode) in [
            (self.root.join("containers"), 0o700),
            (self.state.join("pods"), 0o711),
            (self.state.join("netns"), 0o711),
            (self.state.join("userns"), 0o711),
            (self.state.join("mapped"), 0o700),
            (self.state.join("streams"), 0o700),
            (self.mounts(), 0o700),
        ] {
            sys::fs::create_dir_all(&folder, mode)
                .map_err(|error| Error::io("create folder", &folder, &error))?;
        }
        Ok(())
    }

    /// The folder of a pod.
    pub fn pod(&self, id: &str) -> PathBuf {
        self.state.join("pods").join(id)
    }

    /// The file that a pod's network namespace is bound to.
    pub fn netns(&self, id: &str) -> PathBuf {
        self.state.join("netns").join(id)
    }

    /// The file that a pod's namespace of users is bound to.
    pub fn userns(&self, id: &str) -> PathBuf {
        self.state.join("userns").join(id)
    }

    /// The folder of a container's id-mapped mounts.
    pub fn mapped(&self, id: &str) -> PathBuf {
        self.state.join("mapped").join(id)
    }

    /// The socket of a container's logger.
    pub fn streams(&self, id: &str) -> PathBuf {
        self.state.join("streams").join(id)
    }

    /// Where images are mounted for a moment.
    pub fn mounts(&self) -> PathBuf {
        self.state.join("mounts")
    }

    /// The folder of a container.
    pub fn container(&self, id: &str) -> PathBuf {
        self.root.join("containers").join(id)
    }

    /// What there is a folder or a namespace of: ids of pods, then those of containers. Blocks.
    pub fn found(&self) -> (Vec<String>, Vec<String>) {
        let names = |folder: PathBuf| -> Vec<String> {
            let entries = fs::read_dir(folder).into_iter().flatten().flatten();
            entries.filter_map(|entry| entry.file_name().into_string().ok()).collect()
        };
        let mut pods = names(self.state.join("pods"));
        pods.extend(names(self.state.join("netns")));
        pods.extend(names(self.state.join("userns")));
        let mut containers = names(self.root.join("containers"));
        containers.extend(names(self.state.join("streams")));
        containers.extend(names(self.state.join("mapped")));
        for ids in [&mut pods, &mut containers] {
            ids.sort();
            ids.dedup();
        }
        (pods, containers)
    }

    /// Makes what a pod's containers share. It belongs to the root of the pod's users. Blocks.
    pub fn make_pod(&self, id: &str, files: &PodFiles, users: Option<&Users>) -> Result<()> {
        let (uid, gid) = users.map_or((0, 0), Users::root);
        let folder = self.pod(id);
        let failed =
            |what: &str, path: &Path, error: &io::Error| Error::io(format!("pod {id}: {what}"), path, error);
        sys::fs::create_dir(&folder, 0o755).map_err(|error| failed("create folder", &folder, &error))?;
        sys::failpoint!("pod.files.folder");
        for (name, text) in
            [("hostname", &files.hostname), ("hosts", &files.hosts), ("resolv.conf", &files.resolv)]
        {
            let path = folder.join(name);
            write(&path, text).map_err(|error| failed("write", &path, &error))?;
            std::os::unix::fs::chown(&path, Some(uid), Some(gid))
                .map_err(|error| failed("change the owner of", &path, &error))?;
        }
        if files.shm {
            let path = folder.join("shm");
            sys::fs::create_dir(&path, 0o700).map_err(|error| failed("create folder", &path, &error))?;
            let options = ["nosuid", "noexec", "nodev", "mode=1777"].map(str::to_owned);
            let shm = Mount {
                kind: "tmpfs".into(),
                source: "shm".into(),
                target: String::new(),
                options: options
                    .into_iter()
                    .chain([format!("size={SHM}"), format!("uid={uid}"), format!("gid={gid}")])
                    .collect(),
            };
            shm.mount(&path).map_err(|error| failed("mount", &path, &io::Error::other(error)))?;
        }
        Ok(())
    }

    /// Makes a pod's network namespace, if it has one, and that of its users, which then owns it. Blocks.
    pub fn make_namespaces(&self, id: &str, network: bool, users: Option<&Users>) -> Result<()> {
        let path = self.netns(id);
        let made = match users {
            Some(users) => {
                let network = network.then_some(path.as_path());
                namespace::pin_users(&self.userns(id), network, &users.uids(), &users.gids())
            }
            None if network => namespace::pin(&[(Kind::Network, path.clone())], &[], || Ok(())),
            None => Ok(()),
        };
        made.map_err(|error| Error::io(format!("pod {id}: make its namespaces"), &path, &error))
    }

    /// Lets go of what [`Places::make_namespaces`] made. Blocks; any number of times.
    pub fn remove_namespaces(&self, id: &str) -> Result<()> {
        for path in [self.netns(id), self.userns(id)] {
            namespace::unpin(&path)
                .map_err(|error| Error::io(format!("pod {id}: let go of the namespace"), &path, &error))?;
        }
        Ok(())
    }

    /// Mounts something with the owners that it has for these users, as the container's mount of this number. Blocks.
    pub fn map(&self, id: &str, number: usize, source: &Path, users: &Users, follows: bool) -> Result<()> {
        let target = self.mapped(id).join(number.to_string());
        let failed = |path: &Path, error: &io::Error| {
            Error::io(format!("container {id}: prepare an id-mapped mount"), path, error)
        };
        let metadata = fs::metadata(source).map_err(|error| failed(source, &error))?;
        let folder = if metadata.is_dir() { target.clone() } else { self.mapped(id) };
        sys::fs::create_dir_all(&folder, 0o700).map_err(|error| failed(&folder, &error))?;
        if !metadata.is_dir() {
            fs::File::create(&target).map_err(|error| failed(&target, &error))?;
        }
        match sys::idmap::bind(source, &target, &users.uids(), &users.gids(), follows) {
            Ok(()) => Ok(()),
            // The kernel's word for a file system that has not got this.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => {
                let (kind, from) = sys::mount::filesystem_of(source).unwrap_or_default();
                Err(Error::failed_precondition(format!(
                    "mount of {}: its file system, {kind} ({from}), takes no id-mapped mounts on this kernel; put the volume on one \
                     that does (ext4, xfs, btrfs, or tmpfs from Linux 6.3 on), or run the pod with the machine's users",
                    source.display()
                )))
            }
            Err(error) => Err(Error::io("make an id-mapped mount of", source, &error)),
        }
    }

    /// Takes a container's id-mapped mounts down. Blocks; any number of times.
    pub fn unmap(&self, id: &str) -> Result<()> {
        let folder = self.mapped(id);
        if !folder.exists() {
            return Ok(());
        }
        sys::mount::unmount_all(&folder)
            .map_err(|error| Error::io(format!("container {id}: unmount in"), &folder, &error))?;
        remove(&folder)
    }

    /// Takes down what is mounted in a pod's folder. Blocks; any number of times.
    pub fn unmount_pod(&self, id: &str) -> Result<()> {
        let path = self.pod(id);
        if !path.exists() {
            return Ok(());
        }
        sys::mount::unmount_all(&path)
            .map_err(|error| Error::io(format!("pod {id}: unmount in"), &path, &error))
    }

    /// Removes a pod's folder and all in it. Blocks; any number of times.
    pub fn remove_pod(&self, id: &str) -> Result<()> {
        self.unmount_pod(id)?;
        remove(&self.pod(id))
    }

    /// Removes a container's folder, its socket and its mounts. Blocks; any number of times.
    pub fn remove_container(&self, id: &str) -> Result<()> {
        self.unmap(id)?;
        let socket = self.streams(id);
        match fs::remove_file(&socket) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(Error::io("remove", &socket, &error));
            }
            _ => {}
        }
        remove(&self.container(id))
    }
}

fn remove(folder: &Path) -> Result<()> {
    match sys::fs::remove_tree(folder) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(Error::io("remove", folder, &error)),
        _ => Ok(()),
    }
}

/// Read by whoever the containers run as, whatever the engine's umask.
fn write(path: &Path, text: &str) -> io::Result<()> {
    use std::os::unix::fs::PermissionsExt as _;
    fs::write(path, text)?;
    fs::set_permissions(path, fs::Permissions::from_mode(0o644))
}

/// What is written for a pod's containers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PodFiles {
    /// /etc/hostname
    pub hostname: String,
    /// /etc/hosts
    pub hosts: String,
    /// /etc/resolv.conf
    pub resolv: String,
    /// Whether it has shared memory of its own.
    pub shm: bool,
}

impl PodFiles {
    /// For a pod of this name and resolver; what is not said is taken from the machine. Blocks.
    pub fn read(hostname: &str, dns: Option<&DnsConfig>, shm: bool) -> Result<Self> {
        let read = |path: &str| match fs::read_to_string(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(String::new()),
            text => text.map_err(|error| Error::io("read", path, &error)),
        };
        let hostname = match hostname {
            "" => read("/proc/sys/kernel/hostname")?.trim().to_owned(),
            name => name.to_owned(),
        };
        let resolv = match dns {
            Some(dns) => resolv_conf(dns),
            None => read("/etc/resolv.conf")?,
        };
        Ok(PodFiles { hostname: format!("{hostname}\n"), hosts: read("/etc/hosts")?, resolv, shm })
    }
}

/// A resolver as resolv.conf has it.
fn resolv_conf(dns: &DnsConfig) -> String {
    let mut text = String::new();
    if !dns.searches.is_empty() {
        text += &format!("search {}\n", dns.searches.join(" "));
    }
    for server in &dns.servers {
        text += &format!("nameserver {server}\n");
    }
    if !dns.options.is_empty() {
        text += &format!("options {}\n", dns.options.join(" "));
    }
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt as _;

    use proto::runtime::v1::IdMapping;

    use super::*;

    #[test]
    fn a_resolver_is_written_as_its_readers_want_it() {
        let dns = DnsConfig {
            servers: vec!["10.0.0.1".into(), "10.0.0.2".into()],
            searches: vec!["a.b".into(), "c".into()],
            options: vec!["ndots:5".into()],
        };
        assert_eq!(
            resolv_conf(&dns),
            "search a.b c\nnameserver 10.0.0.1\nnameserver 10.0.0.2\noptions ndots:5\n"
        );
        assert_eq!(resolv_conf(&DnsConfig::default()), "");
    }

    #[test]
    fn a_pod_leaves_nothing() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let places = Places::new(&folder.path().join("root"), &folder.path().join("state"));
        places.make().unwrap();
        let files = PodFiles::read("name", Some(&DnsConfig::default()), true).unwrap();
        places.make_pod("p", &files, None).unwrap();
        places.make_namespaces("p", true, None).unwrap();
        assert_eq!(fs::read_to_string(places.pod("p").join("hostname")).unwrap(), "name\n");
        assert!(sys::mount::is_mountpoint(&places.pod("p").join("shm")).unwrap());
        assert_eq!(places.found(), (vec!["p".to_owned()], Vec::new()));
        for _ in 0..2 {
            places.remove_namespaces("p").unwrap();
            places.remove_pod("p").unwrap();
            places.remove_container("p").unwrap();
        }
        assert_eq!(places.found(), Default::default());

        // The same with users of its own.
        let range = [IdMapping { host_id: 100_000, container_id: 0, length: 10 }];
        let users = super::super::spec::mapped_as(&range, &range).unwrap();
        places.make_pod("p", &files, Some(&users)).unwrap();
        places.make_namespaces("p", true, Some(&users)).unwrap();
        for name in ["hostname", "shm"] {
            assert_eq!(fs::metadata(places.pod("p").join(name)).unwrap().uid(), 100_000, "{name}");
        }
        let file = places.pod("p").join("hosts");
        std::os::unix::fs::chown(&file, Some(3), Some(4)).unwrap();
        places.map("c", 0, &file, &users, false).unwrap();
        places.map("c", 1, folder.path(), &users, true).unwrap();
        let seen = fs::metadata(places.mapped("c").join("0")).unwrap();
        assert_eq!((seen.uid(), seen.gid()), (100_003, 100_004));
        let refused = places.map("c", 2, Path::new("/proc/sys"), &users, false).unwrap_err().to_string();
        assert!(refused.contains("proc") && refused.contains("id-mapped"), "{refused}");
        assert_eq!(places.found(), (vec!["p".to_owned()], vec!["c".to_owned()]));
        // The copy of the folder has the pod's mounts, too: unless the machine shares its mounts, they come down with it alone.
        for _ in 0..2 {
            places.remove_container("c").unwrap();
            places.remove_namespaces("p").unwrap();
            places.remove_pod("p").unwrap();
        }
        assert_eq!(places.found(), Default::default());
        assert!(sys::mount::mounts_under(folder.path()).unwrap().is_empty());
    }
}
