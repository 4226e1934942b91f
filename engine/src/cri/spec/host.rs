//! What specs depend on besides the kubelet's words: the machine, and what on it a container's configuration refers to.
//!
//! Both are looked at here and nowhere else in this module; all of it blocks.

use std::collections::BTreeSet;
use std::ffi::OsString;
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _};
use std::path::{Path, PathBuf};

use oci::runtime::Device;
use oci::spec::ALL_CAPABILITIES;
use proto::runtime::v1::{ContainerConfig, Mount, PodSandboxConfig};
use serde_json::Value;

use super::security::{self, Checked};
use super::{Options, apparmor, cdi};
use crate::error::{Error, Result};

/// The number of CAP_SYS_RESOURCE, which lowering a score of the OOM killer takes.
const CAP_SYS_RESOURCE: u32 = 24;
const CGROUPS: &str = "/sys/fs/cgroup";
/// Folders beneath /dev that are each container's own, and those that other programs keep their own files in.
const NOT_DEVICES: &[&str] = &["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev"];
/// How deep devices may lie.
const DEVICE_DEPTH: usize = 16;
/// The largest profile of system calls that is read, in bytes.
const PROFILE_MAX: u64 = 4 << 20;

/// The machine, as far as specs depend on it.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Host {
    /// Its name.
    pub hostname: String,
    /// Whether control groups are of version 2 alone.
    pub cgroup2: bool,
    /// The controllers that there are.
    pub controllers: BTreeSet<String>,
    /// Whether swap can be limited.
    pub swap: bool,
    /// How the control groups are mounted, as far as who mounts them anew has to repeat it.
    pub cgroup_options: Vec<String>,
    /// What the OOM killer is told of the engine.
    pub oom_score_adj: i32,
    /// Whether a process of the engine's may be told to be worth more than the engine is.
    pub may_lower_oom_score_adj: bool,
    /// The capabilities that the engine has: all that it can give.
    pub capabilities: Vec<String>,
    /// Whether the kernel filters system calls.
    pub seccomp: bool,
    /// Whether the kernel has AppArmor.
    pub apparmor: bool,
    /// SELinux' contexts of containers, where the kernel has it.
    pub selinux: Option<Selinux>,
    /// Whether the engine itself is in a user namespace.
    pub user_namespace: bool,
}

/// The contexts that labels of containers are made from: `user:role:type:level`.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Selinux {
    /// Of processes.
    pub process: String,
    /// Of files.
    pub file: String,
}

impl Host {
    /// Looks at the machine. What cannot be read is taken as not there.
    pub fn read() -> Host {
        let text = |path: &str| fs::read_to_string(path).unwrap_or_default();
        let status = text("/proc/self/status");
        let field = |name: &str| {
            status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':').map(str::trim))
        };
        let bits = field("CapEff").and_then(|hex| u64::from_str_radix(hex, 16).ok()).unwrap_or_default();
        let groups = text("/proc/self/cgroup");
        let cgroup2 = is_cgroup2(Path::new(CGROUPS));
        let user_namespace = !is_initial(&text("/proc/self/uid_map"));
        Host {
            hostname: rustix::system::uname().nodename().to_string_lossy().into_owned(),
            cgroup2,
            controllers: controllers(cgroup2, &groups, &text("/sys/fs/cgroup/cgroup.controllers")),
            swap: Path::new(CGROUPS).join(swap_file(cgroup2, &groups)).exists(),
            cgroup_options: cgroup_options(&fs::read("/proc/self/mountinfo").unwrap_or_default()),
            oom_score_adj: sys::process::oom_score_adj(None).unwrap_or_default(),
            // A capability in a namespace of users is none over the machine.
            may_lower_oom_score_adj: bits & (1 << CAP_SYS_RESOURCE) != 0 && !user_namespace,
            capabilities: capabilities(bits),
            seccomp: field("Seccomp").is_some(),
            apparmor: Path::new("/sys/kernel/security/apparmor").exists()
                && text("/sys/module/apparmor/parameters/enabled").starts_with('Y'),
            selinux: selinux(),
            user_namespace,
        }
    }
}

fn is_cgroup2(path: &Path) -> bool {
    const CGROUP2_SUPER_MAGIC: u64 = 0x6367_7270;
    rustix::fs::statfs(path).is_ok_and(|of| of.f_type as u64 == CGROUP2_SUPER_MAGIC)
}

/// `groups` is /proc/self/cgroup: `ID:controllers:path`, one line for each hierarchy.
fn controllers(cgroup2: bool, groups: &str, of_root: &str) -> BTreeSet<String> {
    let owned = |name: &str| name.to_owned();
    if cgroup2 {
        return of_root.split_whitespace().map(owned).collect();
    }
    let named = groups.lines().filter_map(|line| line.split(':').nth(1)).flat_map(|names| names.split(','));
    named.filter(|name| !name.is_empty() && !name.starts_with("name=")).map(owned).collect()
}

/// The file that limits swap. The root group of version 2 has none: the engine's own is looked at.
fn swap_file(cgroup2: bool, groups: &str) -> PathBuf {
    if !cgroup2 {
        return "memory/memory.memsw.limit_in_bytes".into();
    }
    let own = groups.lines().find_map(|line| line.strip_prefix("0::")).unwrap_or("/");
    Path::new(own.trim_start_matches('/')).join("memory.swap.max")
}

fn cgroup_options(table: &[u8]) -> Vec<String> {
    let root = entries(table).into_iter().rfind(|entry| entry.point == Path::new(CGROUPS));
    let options = root.map(|root| root.superblock).unwrap_or_default();
    let kept = |option: &&str| matches!(*option, "nsdelegate" | "memory_recursiveprot");
    options.split(',').filter(kept).map(str::to_owned).collect()
}

/// The capabilities of a set, as /proc shows it.
fn capabilities(bits: u64) -> Vec<String> {
    let has = |(number, _): &(usize, &&str)| bits & (1 << *number) != 0;
    ALL_CAPABILITIES.iter().enumerate().filter(has).map(|(_, name)| (*name).to_owned()).collect()
}

/// Whether /proc/self/uid_map is the first namespace's: all ids, each its own.
fn is_initial(map: &str) -> bool {
    map.split_whitespace().eq(["0", "0", "4294967295"])
}

/// The contexts of containers that the system's policy names.
fn selinux() -> Option<Selinux> {
    if !Path::new("/sys/fs/selinux/enforce").exists() {
        return None;
    }
    let config = fs::read_to_string("/etc/selinux/config").unwrap_or_default();
    let policy =
        config.lines().find_map(|line| line.trim().strip_prefix("SELINUXTYPE=")).unwrap_or("targeted");
    let contexts = Path::new("/etc/selinux").join(policy.trim()).join("contexts/lxc_contexts");
    let text = fs::read_to_string(contexts).ok()?;
    let value = |key: &str| {
        let mut pairs = text.lines().filter_map(|line| line.split_once('='));
        let (_, value) = pairs.find(|(name, _)| name.trim() == key)?;
        Some(value.trim().trim_matches('"').to_owned())
    };
    Some(Selinux { process: value("process")?, file: value("file")? })
}

/// Folders that are the machine's own, whose labels others depend on.
const NEVER_LABELLED: &[&str] = &[
    "/",
    "/bin",
    "/boot",
    "/dev",
    "/etc",
    "/etc/passwd",
    "/etc/pki",
    "/etc/shadow",
    "/home",
    "/lib",
    "/lib64",
    "/media",
    "/opt",
    "/proc",
    "/root",
    "/run",
    "/sbin",
    "/srv",
    "/sys",
    "/tmp",
    "/usr",
    "/var",
    "/var/lib",
    "/var/log",
];

/// Gives these files, and all beneath them, an SELinux label; none for an empty one. Where a file system has no labels, nothing
/// is done. Blocks.
pub fn relabel(paths: &[PathBuf], label: &str) -> Result<()> {
    for path in paths.iter().filter(|_| !label.is_empty()) {
        if NEVER_LABELLED.iter().any(|other| path == Path::new(other)) {
            return Err(Error::invalid_argument(format!(
                "{} is not given an SELinux label, as the machine depends on the one it has; mount a folder beneath it",
                path.display()
            )));
        }
        label_all(path, label.as_bytes())
            .map_err(|error| Error::io("set the SELinux label of", path, &error))?;
    }
    Ok(())
}

fn label_all(path: &Path, label: &[u8]) -> io::Result<()> {
    use rustix::fs::{XattrFlags, lsetxattr};
    use rustix::io::Errno;
    match lsetxattr(path, "security.selinux", label, XattrFlags::empty()) {
        Ok(()) => {}
        Err(Errno::OPNOTSUPP) => return Ok(()),
        Err(Errno::NOENT) => return Ok(()),
        Err(error) => return Err(error.into()),
    }
    if fs::symlink_metadata(path)?.is_dir() {
        for entry in fs::read_dir(path)? {
            label_all(&entry?.path(), label)?;
        }
    }
    Ok(())
}

/// Whether what is mounted at a mount on one side is seen on the other.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Propagation {
    /// Neither way.
    #[default]
    Private,
    /// From the machine's side alone.
    Slave,
    /// Both ways.
    Shared,
}

/// What is bound into a container.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Source {
    /// Its path, without links.
    pub path: PathBuf,
    /// The mount it lies on.
    pub mount_point: PathBuf,
    /// And how that is shared.
    pub propagation: Propagation,
    /// How the mount may be used. Who binds it in a namespace of users cannot loosen that, and so has to say it again.
    pub kept: Vec<String>,
}

/// The files of a pod that its containers have; None is not mounted.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct SandboxFiles {
    /// /etc/hostname.
    pub hostname: Option<PathBuf>,
    /// /etc/hosts.
    pub hosts: Option<PathBuf>,
    /// /etc/resolv.conf.
    pub resolv_conf: Option<PathBuf>,
    /// /dev/shm.
    pub shm: Option<PathBuf>,
    /// How the mount that the others lie on may be used, as [`Source::kept`].
    pub kept: Vec<String>,
}

impl SandboxFiles {
    /// Those that there are in a pod's folder.
    pub fn find(folder: &Path) -> SandboxFiles {
        let file = |name: &str| Some(folder.join(name)).filter(|path| path.exists());
        SandboxFiles {
            hostname: file("hostname"),
            hosts: file("hosts"),
            resolv_conf: file("resolv.conf"),
            shm: file("shm"),
            kept: kept(folder),
        }
    }
}

/// How what is mounted at a path may be used.
fn kept(path: &Path) -> Vec<String> {
    use rustix::fs::StatVfsMountFlags as Flags;
    let Ok(of) = rustix::fs::statvfs(path) else { return Vec::new() };
    let all = [
        (Flags::RDONLY, "ro"),
        (Flags::NOSUID, "nosuid"),
        (Flags::NODEV, "nodev"),
        (Flags::NOEXEC, "noexec"),
    ];
    let set = all.into_iter().filter(|(flag, _)| of.f_flag.contains(*flag));
    set.map(|(_, option)| option.to_owned()).collect()
}

/// What a container's configuration refers to.
#[derive(Clone, Debug, Default)]
pub struct Facts {
    /// What its mounts bind, in their order.
    pub sources: Vec<Source>,
    /// The nodes of its devices, in their order: several where it asks for a folder.
    pub devices: Vec<Vec<Device>>,
    /// All devices of the machine, for one that is privileged.
    pub host_devices: Vec<Device>,
    /// The profile of system calls that it names.
    pub seccomp: Option<Value>,
    /// The AppArmor profiles that are loaded.
    pub apparmor: BTreeSet<String>,
    /// The pod's files.
    pub files: SandboxFiles,
    /// What its CDI devices change.
    pub(super) cdi: cdi::Edits,
}

impl Facts {
    /// Looks up what the configuration refers to. Folders that are to be bound and are not there are made; AppArmor's default
    /// profile is loaded when it is needed. Blocks.
    pub fn gather(
        container: &ContainerConfig,
        sandbox_dir: &Path,
        host: &Host,
        options: &Options,
    ) -> Result<Facts> {
        let security = container.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
        let privileged = security.is_some_and(|security| security.privileged);
        let table = fs::read("/proc/self/mountinfo")
            .map_err(|error| Error::io("read", "/proc/self/mountinfo", &error))?;
        let table = entries(&table);
        let all = privileged && !options.privileged_without_host_devices;
        Ok(Facts {
            sources: container.mounts.iter().map(|mount| source(mount, &table)).collect::<Result<_>>()?,
            devices: container
                .devices
                .iter()
                .map(|device| devices_at(&device.host_path, &device.container_path))
                .collect::<Result<_>>()?,
            host_devices: if all { devices_at("/dev", "")? } else { Vec::new() },
            seccomp: match security::seccomp_asked_by_container(container, options)? {
                Some(Checked::Localhost(path)) if host.seccomp => Some(profile(&path)?),
                _ => None,
            },
            apparmor: match security::apparmor_asked(container, host, options)? {
                None => BTreeSet::new(),
                Some(Checked::Localhost(_)) => apparmor::loaded()?,
                Some(Checked::Default) => {
                    let loaded = apparmor::loaded()?;
                    if loaded.contains(apparmor::DEFAULT) {
                        loaded
                    } else {
                        apparmor::load_default()?;
                        apparmor::loaded()?
                    }
                }
            },
            files: SandboxFiles::find(sandbox_dir),
            cdi: cdi::gather(container, options)?,
        })
    }

    /// Reads the profile of system calls that a pod names, if it does. Blocks.
    pub fn seccomp_profile(pod: &PodSandboxConfig, host: &Host, options: &Options) -> Result<Option<Value>> {
        match security::seccomp_asked_by_pod(pod, options)? {
            Some(Checked::Localhost(path)) if host.seccomp => profile(&path).map(Some),
            _ => Ok(None),
        }
    }
}

/// The path of a mount on this machine, made when it is not there, without links.
fn source(asked: &Mount, table: &[Entry]) -> Result<Source> {
    let path = Path::new(&asked.host_path);
    if !path.is_absolute() {
        return Err(Error::invalid_argument(format!(
            "mount at {}: its host_path {:?} is not absolute",
            asked.container_path, asked.host_path
        )));
    }
    match fs::metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            sys::fs::create_dir_all(path, 0o755)
                .map_err(|error| Error::io("create the folder of a mount", path, &error))?;
        }
        Err(error) => return Err(Error::io("look at the source of a mount", path, &error)),
        Ok(_) => {}
    }
    let path =
        fs::canonicalize(path).map_err(|error| Error::io("resolve the source of a mount", path, &error))?;
    let on = table.iter().filter(|entry| path.starts_with(&entry.point));
    // The deepest one; of several at one place the last, which is on top.
    let on = on.max_by_key(|entry| entry.point.components().count());
    let kept = kept(&path);
    Ok(match on {
        Some(entry) => {
            Source { path, mount_point: entry.point.clone(), propagation: entry.propagation, kept }
        }
        None => Source { path, mount_point: "/".into(), propagation: Propagation::Private, kept },
    })
}

/// A mount, as /proc/self/mountinfo has it.
struct Entry {
    point: PathBuf,
    propagation: Propagation,
    superblock: String,
}

/// Lines of `ID PARENT MAJOR:MINOR ROOT POINT OPTIONS [shared:N] [master:N] ... - TYPE SOURCE OPTIONS`.
fn entries(table: &[u8]) -> Vec<Entry> {
    let entry = |line: &[u8]| {
        let fields: Vec<&[u8]> = line.split(|byte| *byte == b' ').collect();
        let point = unescape(fields.get(4)?);
        let end = fields.iter().skip(6).position(|field| *field == b"-")? + 6;
        let has = |tag: &[u8]| fields[6..end].iter().any(|field| field.starts_with(tag));
        let propagation = match (has(b"shared:"), has(b"master:")) {
            (true, _) => Propagation::Shared,
            (false, true) => Propagation::Slave,
            (false, false) => Propagation::Private,
        };
        let superblock = fields.get(end + 3).map(|field| String::from_utf8_lossy(field).into_owned());
        Some(Entry { point, propagation, superblock: superblock.unwrap_or_default() })
    };
    table.split(|byte| *byte == b'\n').filter_map(entry).collect()
}

/// The kernel writes blank, tab, newline and backslash as three octal digits.
fn unescape(field: &[u8]) -> PathBuf {
    let mut out = Vec::with_capacity(field.len());
    let mut rest = field;
    while let Some((byte, after)) = rest.split_first() {
        let digits = after.get(..3).and_then(|digits| std::str::from_utf8(digits).ok());
        match digits.and_then(|digits| u8::from_str_radix(digits, 8).ok()) {
            Some(escaped) if *byte == b'\\' => {
                out.push(escaped);
                rest = &after[3..];
            }
            _ => {
                out.push(*byte);
                rest = after;
            }
        }
    }
    PathBuf::from(OsString::from_vec(out))
}

/// A profile of system calls, in the runtime spec's form.
fn profile(path: &str) -> Result<Value> {
    let refuse = |why: &str| {
        Error::invalid_argument(format!(
            "seccomp profile {path:?}: {why}; it has to be the runtime spec's seccomp object"
        ))
    };
    if !Path::new(path).is_absolute() {
        return Err(refuse("its path is not absolute"));
    }
    let mut bytes = Vec::new();
    fs::File::open(path)
        .and_then(|file| file.take(PROFILE_MAX + 1).read_to_end(&mut bytes))
        .map_err(|error| Error::io("read the seccomp profile", path, &error))?;
    if bytes.len() as u64 > PROFILE_MAX {
        return Err(refuse(&format!("it is larger than {PROFILE_MAX} bytes")));
    }
    let profile: Value = serde_json::from_slice(&bytes).map_err(|error| refuse(&error.to_string()))?;
    match profile.get("defaultAction").is_some_and(Value::is_string) {
        true => Ok(profile),
        false => Err(refuse("it has no defaultAction")),
    }
}

/// The devices at a path, links followed: itself, or all beneath it where it is a folder.
fn devices_at(host_path: &str, container_path: &str) -> Result<Vec<Device>> {
    let path =
        fs::canonicalize(host_path).map_err(|error| Error::io("look up the device", host_path, &error))?;
    let inside = if container_path.is_empty() { path.clone() } else { container_path.into() };
    let mut found = Vec::new();
    if path.is_dir() {
        collect(&path, &inside, 0, &mut found)
            .map_err(|error| Error::io("list the devices beneath", &path, &error))?;
        return Ok(found);
    }
    let node = node_at(&path, &inside).map_err(|error| Error::io("look at the device", &path, &error))?;
    node.map(|node| vec![node]).ok_or_else(|| {
        Error::invalid_argument(format!("device {host_path:?}: {} is not a device", path.display()))
    })
}

fn collect(folder: &Path, inside: &Path, depth: usize, found: &mut Vec<Device>) -> io::Result<()> {
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        let (name, inside) = (entry.file_name(), inside.join(entry.file_name()));
        let kind = match entry.file_type() {
            // Devices come and go.
            Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
            kind => kind?,
        };
        if kind.is_dir() {
            if depth < DEVICE_DEPTH && !NOT_DEVICES.iter().any(|other| name.as_bytes() == other.as_bytes()) {
                collect(&entry.path(), &inside, depth + 1, found)?;
            }
        } else if name != "console" {
            match node_at(&entry.path(), &inside) {
                Ok(Some(node)) if node.kind != "p" => found.push(node),
                Ok(_) => {}
                Err(error) if error.kind() == io::ErrorKind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
    }
    // Folders are listed in no order; specs are to be the same twice.
    if depth == 0 {
        found.sort_by(|a, b| a.path.cmp(&b.path));
    }
    Ok(())
}

/// The device node at a path, to be made at another; None when it is something else.
pub(super) fn node_at(path: &Path, inside: &Path) -> io::Result<Option<Device>> {
    let metadata = fs::symlink_metadata(path)?;
    let kind = metadata.file_type();
    let kind = match () {
        () if kind.is_block_device() => "b",
        () if kind.is_char_device() => "c",
        () if kind.is_fifo() => "p",
        () => return Ok(None),
    };
    Ok(Some(Device {
        path: inside.to_string_lossy().into_owned(),
        kind: kind.into(),
        major: rustix::fs::major(metadata.rdev()).into(),
        minor: rustix::fs::minor(metadata.rdev()).into(),
        file_mode: Some(metadata.mode() & 0o7777),
        uid: Some(metadata.uid()),
        gid: Some(metadata.gid()),
    }))
}

#[cfg(test)]
mod tests {
    use proto::runtime::v1 as cri;

    use super::*;

    #[test]
    fn the_machine_is_read() {
        let host = Host::read();
        assert!(!host.hostname.is_empty());
        assert!(host.controllers.contains("memory"), "{:?}", host.controllers);
        assert!(host.seccomp);
        assert_eq!(host.may_lower_oom_score_adj, host.capabilities.contains(&"CAP_SYS_RESOURCE".to_owned()));
    }

    #[test]
    fn controllers_are_those_of_the_version() {
        let v1 = "9:name=systemd:/\n8:pids:/\n4:memory:/a/b\n2:cpu,cpuacct:/\n0::/\n";
        let found: Vec<_> = controllers(false, v1, "").into_iter().collect();
        assert_eq!(found, ["cpu", "cpuacct", "memory", "pids"]);
        let found: Vec<_> = controllers(true, "0::/x\n", "cpuset cpu hugetlb\n").into_iter().collect();
        assert_eq!(found, ["cpu", "cpuset", "hugetlb"]);
        assert_eq!(swap_file(true, "0::/system.slice/x\n"), Path::new("system.slice/x/memory.swap.max"));
        assert_eq!(swap_file(false, v1), Path::new("memory/memory.memsw.limit_in_bytes"));
    }

    #[test]
    fn capabilities_are_named_by_number() {
        assert_eq!(capabilities(0b1001), ["CAP_CHOWN", "CAP_FOWNER"]);
        assert_eq!(capabilities(u64::MAX).len(), ALL_CAPABILITIES.len());
        assert_eq!(ALL_CAPABILITIES[CAP_SYS_RESOURCE as usize], "CAP_SYS_RESOURCE");
    }

    #[test]
    fn mounts_are_shared_slaves_or_private() {
        let table = b"22 27 0:21 / /proc rw,relatime - proc proc rw\n\
            30 27 0:5 / /with\\040blank rw shared:7 - tmpfs t rw\n\
            31 30 0:5 / /with\\040blank/x rw master:7 propagate_from:2 - tmpfs t rw\n\
            32 1 0:6 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot,other\nbroken\n";
        let table = entries(table);
        let found: Vec<_> =
            table.iter().map(|entry| (entry.point.to_str().unwrap(), entry.propagation)).collect();
        assert_eq!(
            found,
            [
                ("/proc", Propagation::Private),
                ("/with blank", Propagation::Shared),
                ("/with blank/x", Propagation::Slave),
                ("/sys/fs/cgroup", Propagation::Private),
            ]
        );
        assert_eq!(table[3].superblock, "rw,nsdelegate,memory_recursiveprot,other");
    }

    #[test]
    fn cgroup_options_that_the_machine_would_lose_are_kept() {
        let table = b"32 1 0:6 / /sys/fs/cgroup rw - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n";
        assert_eq!(cgroup_options(table), ["nsdelegate", "memory_recursiveprot"]);
        assert!(cgroup_options(b"32 1 0:6 / /sys/fs/cgroup rw - tmpfs t rw,mode=755\n").is_empty());
    }

    #[test]
    fn sources_are_made_and_links_followed() {
        let folder = tempfile::tempdir().unwrap();
        let real = folder.path().canonicalize().unwrap();
        std::os::unix::fs::symlink(real.join("there"), real.join("link")).unwrap();
        fs::create_dir(real.join("there")).unwrap();
        let table = [
            Entry { point: "/".into(), propagation: Propagation::Private, superblock: String::new() },
            Entry { point: real.clone(), propagation: Propagation::Slave, superblock: String::new() },
            Entry { point: real.clone(), propagation: Propagation::Shared, superblock: String::new() },
        ];
        let at = |name: &str| {
            let host_path = real.join(name).to_str().unwrap().to_owned();
            source(&cri::Mount { host_path, container_path: "/x".into(), ..cri::Mount::default() }, &table)
        };
        let link = at("link").unwrap();
        assert_eq!(link.path, real.join("there"));
        assert_eq!((link.mount_point, link.propagation), (real.clone(), Propagation::Shared));
        assert_eq!(at("new/folder").unwrap().path, real.join("new/folder"));
        assert!(real.join("new/folder").is_dir());
        let relative = cri::Mount { host_path: "x".into(), ..cri::Mount::default() };
        assert!(matches!(source(&relative, &table), Err(Error::InvalidArgument(_))));
    }

    #[test]
    fn devices_are_found_by_path_link_and_folder() {
        let null = devices_at("/dev/null", "/dev/mine").unwrap();
        assert_eq!(
            (null[0].path.as_str(), null[0].kind.as_str(), null[0].major, null[0].minor),
            ("/dev/mine", "c", 1, 3)
        );
        assert_eq!(null[0].file_mode, Some(0o666));
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("link");
        std::os::unix::fs::symlink("/dev/zero", &link).unwrap();
        assert_eq!(devices_at(link.to_str().unwrap(), "").unwrap()[0].path, "/dev/zero");
        assert!(matches!(devices_at("/etc/passwd", ""), Err(Error::InvalidArgument(_))));
        assert!(matches!(devices_at("/dev/not-there", ""), Err(Error::NotFound(_))));
        let all = devices_at("/dev", "").unwrap();
        assert!(all.iter().any(|device| device.path == "/dev/null"));
        assert!(
            !all.iter().any(|device| device.path.starts_with("/dev/pts/") || device.path == "/dev/console")
        );
        let elsewhere = devices_at("/dev", "/x").unwrap();
        assert!(elsewhere.iter().all(|device| device.path.starts_with("/x/")));
    }

    #[test]
    fn labels_are_given_to_all_beneath_but_the_machines_own() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("a/b");
        fs::create_dir(folder.path().join("a")).unwrap();
        fs::write(&file, "").unwrap();
        relabel(&[folder.path().to_owned()], "u:r:t:s0").unwrap();
        // Who may not set it, or has nowhere to, has been told nothing but that.
        let mut label = [0; 64];
        if let Ok(size) = rustix::fs::lgetxattr(&file, "security.selinux", &mut label) {
            assert_eq!(label.get(..size), Some(&b"u:r:t:s0"[..]));
        }
        for own in ["/", "/etc", "/usr"] {
            assert!(matches!(relabel(&[own.into()], "u:r:t:s0"), Err(Error::InvalidArgument(_))), "{own}");
        }
        relabel(&["/etc".into()], "").unwrap();
    }

    #[test]
    fn profiles_of_system_calls_are_checked() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("p.json");
        let path = path.to_str().unwrap();
        assert!(matches!(profile(path), Err(Error::NotFound(_))));
        assert!(matches!(profile("relative.json"), Err(Error::InvalidArgument(_))));
        for bad in ["", "{", "[]", "{}", r#"{"defaultAction":1}"#] {
            fs::write(path, bad).unwrap();
            assert!(matches!(profile(path), Err(Error::InvalidArgument(_))), "{bad}");
        }
        fs::write(path, r#"{"defaultAction":"SCMP_ACT_ALLOW","syscalls":[]}"#).unwrap();
        assert_eq!(profile(path).unwrap()["defaultAction"], "SCMP_ACT_ALLOW");
    }
}
