//! Control groups read straight from their files: where a process sits, its counters, and when its memory ran out.
//!
//! Both versions, and the hybrid of both: a controller mounted as version 1 is read there. A group is version 2
//! here when none of the controllers that count (memory, cpu, pids) is mounted as version 1.

use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use rustix::event::EventfdFlags;
use rustix::fs::inotify;
use tokio::io::unix::AsyncFd;

/// The version that serves a group's counters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// One hierarchy for each controller.
    V1,
    /// One hierarchy for all.
    V2,
}

/// The control group of a process: the folders of its files.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Cgroup {
    version: Version,
    folders: BTreeMap<String, PathBuf>,
}

/// The name under which the one folder of a version 2 group is kept.
const UNIFIED: &str = "";
/// The controllers that make a group one of version 1 where they are mounted so.
const COUNTING: [&str; 3] = ["memory", "cpu", "pids"];

/// Where the hierarchies are mounted: reaches groups by their names, whoever is in them.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Hierarchies {
    version: Version,
    mounts: BTreeMap<String, PathBuf>,
}

impl Hierarchies {
    /// Those that are mounted now. They hardly ever change while a machine runs.
    ///
    /// # Errors
    /// NotFound when none is mounted, else those of reading /proc.
    pub fn mounted() -> io::Result<Self> {
        Self::parse(&mounts()?)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no control group hierarchy is mounted"))
    }

    fn parse(mounts: &str) -> Option<Self> {
        let mut found = BTreeMap::new();
        for line in mounts.lines() {
            let Some((place, kind)) = line.split_once(" - ") else { continue };
            let Some(mountpoint) = place.split(' ').nth(4) else { continue };
            let mut kind = kind.split(' ');
            match kind.next() {
                Some("cgroup2") => {
                    found.entry(UNIFIED.to_owned()).or_insert_with(|| PathBuf::from(mountpoint));
                }
                Some("cgroup") => {
                    let options = kind.nth(1).unwrap_or_default();
                    // What is no controller is asked for by nobody.
                    for controller in options.split(',').filter(|option| !matches!(*option, "rw" | "ro")) {
                        found.entry(controller.to_owned()).or_insert_with(|| PathBuf::from(mountpoint));
                    }
                }
                _ => {}
            }
        }
        let version = version_of(&found)?;
        Some(Self { version, mounts: found })
    }

    /// The group of this name, as runtimes' specs have it; None when it is not there. Names are [paths](path_of) below the
    /// hierarchies' roots, or of systemd.
    #[must_use]
    pub fn group(&self, name: &str) -> Option<Cgroup> {
        let path = path_of(name);
        let folders = self.mounts.iter().map(|(controller, mount)| (controller.clone(), mount.join(&path)));
        let folders: BTreeMap<_, _> = folders.filter(|(_, folder)| folder.is_dir()).collect();
        let there = match self.version {
            Version::V1 => COUNTING.iter().any(|controller| folders.contains_key(*controller)),
            Version::V2 => folders.contains_key(UNIFIED),
        };
        there.then_some(Cgroup { version: self.version, folders })
    }
}

/// The lines of /proc/self/mountinfo that are about control groups. Once there are some they are not read again: there is a line for
/// each mount of each container, and these hardly ever change while a machine runs.
fn mounts() -> io::Result<Cow<'static, str>> {
    static KNOWN: OnceLock<String> = OnceLock::new();
    if let Some(known) = KNOWN.get() {
        return Ok(Cow::Borrowed(known));
    }
    let all = fs::read_to_string("/proc/self/mountinfo")?;
    let ours: Vec<&str> = all.lines().filter(|line| line.contains(" - cgroup")).collect();
    match ours.is_empty() {
        true => Ok(Cow::Borrowed("")),
        false => Ok(Cow::Borrowed(KNOWN.get_or_init(|| ours.join("\n")))),
    }
}

/// The path of a group below the hierarchies' roots, by the name that a runtime's spec has for it: a path, or for systemd
/// `SLICE:PREFIX:NAME` (the scope of a container) or `A-B.slice`.
#[must_use]
pub fn path_of(name: &str) -> PathBuf {
    let mut parts = name.splitn(3, ':');
    let path = match (parts.next(), parts.next(), parts.next()) {
        (Some(slice), Some(prefix), Some(unit)) if !name.contains('/') => {
            let slice = slice_path(if slice.is_empty() { "system.slice" } else { slice });
            let unit = match (prefix, unit.ends_with(".slice")) {
                (_, true) => unit.to_owned(),
                ("", false) => format!("{unit}.scope"),
                (prefix, false) => format!("{prefix}-{unit}.scope"),
            };
            format!("{slice}/{unit}")
        }
        _ if name.ends_with(".slice") && !name.contains('/') => slice_path(name),
        _ => name.to_owned(),
    };
    // A name never leads above the root.
    let parts = Path::new(&path).components();
    parts.filter(|part| matches!(part, std::path::Component::Normal(_))).collect()
}

/// Each dash in the name of a slice is a step down: `a-b.slice` is in `a.slice`, and `-.slice` is the root.
fn slice_path(slice: &str) -> String {
    let name = slice.trim_end_matches(".slice");
    if name == "-" {
        return String::new();
    }
    let ends = name.match_indices('-').map(|(at, _)| at).chain([name.len()]);
    ends.map(|end| format!("{}.slice", &name[..end])).collect::<Vec<_>>().join("/")
}

fn version_of(folders: &BTreeMap<String, PathBuf>) -> Option<Version> {
    if COUNTING.iter().any(|controller| folders.contains_key(*controller)) {
        Some(Version::V1)
    } else {
        folders.contains_key(UNIFIED).then_some(Version::V2)
    }
}

impl Cgroup {
    /// Finds the group a process is in now.
    ///
    /// # Errors
    /// NotFound when the process is gone or no hierarchy of its is mounted here, else those of reading /proc.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        let memberships = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        Self::locate(&memberships, &mounts()?)
            .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "no control group hierarchy is mounted"))
    }

    /// `memberships` is /proc/PID/cgroup (`ID:controllers:path`), `mounts` is /proc/self/mountinfo.
    fn locate(memberships: &str, mounts: &str) -> Option<Self> {
        let mut folders = BTreeMap::new();
        for line in memberships.lines() {
            let mut parts = line.splitn(3, ':');
            let (_, controllers, path) = (parts.next()?, parts.next()?, parts.next()?);
            for controller in controllers.split(',') {
                // `name=systemd` has no counters, and is named so in the mount options too.
                if let Some(folder) = folder_of(mounts, controller, path) {
                    folders.insert(controller.to_owned(), folder);
                }
            }
        }
        let version = version_of(&folders)?;
        Some(Self { version, folders })
    }

    /// A group whose folders are known, by their controllers. For version 2 the one folder's controller is named "".
    #[must_use]
    pub fn of_folders(version: Version, folders: BTreeMap<String, PathBuf>) -> Self {
        Self { version, folders }
    }

    /// Which version serves the counters.
    #[must_use]
    pub fn version(&self) -> Version {
        self.version
    }

    /// The folder of a controller; in version 2 the same for all.
    #[must_use]
    pub fn folder(&self, controller: &str) -> Option<&Path> {
        let key = if self.version == Version::V2 { UNIFIED } else { controller };
        self.folders.get(key).map(PathBuf::as_path)
    }

    /// The text of a controller's file, if it is there.
    #[must_use]
    pub fn text(&self, controller: &str, file: &str) -> Option<String> {
        fs::read_to_string(self.folder(controller)?.join(file)).ok()
    }

    /// The text of a file of the unified hierarchy, which beside version 1 has no counters but those of pressure.
    #[must_use]
    pub fn unified(&self, file: &str) -> Option<String> {
        fs::read_to_string(self.folders.get(UNIFIED)?.join(file)).ok()
    }

    /// The names of a controller's files.
    #[must_use]
    pub fn files(&self, controller: &str) -> Vec<String> {
        let entries = self.folder(controller).and_then(|folder| fs::read_dir(folder).ok());
        let names = entries.into_iter().flatten().flatten().map(|entry| entry.file_name());
        names.filter_map(|name| name.into_string().ok()).collect()
    }

    /// A file with one number; `max` is `u64::MAX`, as in containerd's metrics.
    #[must_use]
    pub fn number(&self, controller: &str, file: &str) -> Option<u64> {
        parse_number(self.text(controller, file)?.trim())
    }

    /// A file with a `key number` pair on each line; empty when it is not there.
    #[must_use]
    pub fn pairs(&self, controller: &str, file: &str) -> HashMap<String, u64> {
        let text = self.text(controller, file).unwrap_or_default();
        let pair = |line: &str| {
            let (key, value) = line.split_once(char::is_whitespace)?;
            Some((key.to_owned(), parse_number(value.trim())?))
        };
        text.lines().filter_map(pair).collect()
    }

    /// All processes of the group and of the groups below it.
    ///
    /// # Errors
    /// NotFound when the group is gone, else those of reading its files.
    pub fn processes(&self) -> io::Result<Vec<u32>> {
        let folder = match self.version {
            Version::V2 => self.folder(UNIFIED),
            // A runtime puts its processes in every hierarchy; which one is asked does not matter.
            Version::V1 => COUNTING.into_iter().rev().find_map(|name| self.folder(name)),
        };
        let mut pids = Vec::new();
        collect_processes(folder.ok_or(io::ErrorKind::NotFound)?, &mut pids)?;
        pids.sort_unstable();
        pids.dedup();
        Ok(pids)
    }

    /// Watches for the kernel killing something of this group for want of memory.
    ///
    /// # Errors
    /// NotFound without a memory controller, else those of eventfd or inotify.
    pub fn watch_oom(&self) -> io::Result<OomWatch> {
        let folder = self.folder("memory").ok_or(io::ErrorKind::NotFound)?;
        match self.version {
            Version::V1 => {
                let file = folder.join("memory.oom_control");
                let control = fs::File::open(&file)?;
                let event = rustix::event::eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?;
                let registration = format!("{} {}", event.as_raw_fd(), control.as_raw_fd());
                fs::write(folder.join("cgroup.event_control"), registration)?;
                Ok(OomWatch { source: crate::fifo::watch(event)?, file, kills: None })
            }
            Version::V2 => {
                let file = folder.join("memory.events");
                let flags = inotify::CreateFlags::NONBLOCK | inotify::CreateFlags::CLOEXEC;
                let event = inotify::init(flags)?;
                inotify::add_watch(&event, &file, inotify::WatchFlags::MODIFY)?;
                let kills = oom_kills(&fs::read_to_string(&file)?);
                Ok(OomWatch { source: crate::fifo::watch(event)?, file, kills: Some(kills) })
            }
        }
    }
}

/// Puts a process into a group, given by its path below the hierarchies' roots, in every hierarchy that has it.
///
/// # Errors
/// NotFound when no hierarchy has it, else those of writing cgroup.procs.
pub fn add_process(group: &str, pid: u32) -> io::Result<()> {
    let mounts = fs::read_to_string("/proc/self/mountinfo")?;
    let mut found = false;
    for line in mounts.lines() {
        let Some((place, kind)) = line.split_once(" - ") else { continue };
        if kind.starts_with("cgroup ") || kind.starts_with("cgroup2 ") {
            let Some(mountpoint) = place.split(' ').nth(4) else { continue };
            let file = Path::new(mountpoint).join(group.trim_start_matches('/')).join("cgroup.procs");
            if file.exists() {
                fs::write(file, pid.to_string())?;
                found = true;
            }
        }
    }
    if found { Ok(()) } else { Err(io::ErrorKind::NotFound.into()) }
}

/// Makes moves of processes between groups quick for some milliseconds. Takes that long itself, and is to be called beside
/// something else; a machine where it cannot be done moves as before.
///
/// For a move the kernel takes a lock that forks take, too. To take it for the first time in a while it waits for a grace period
/// of RCU, of 5 to 20 ms, and for the next not. A runtime that is just being spawned comes to its first move 10 to 30 ms later.
pub fn hasten_moves() {
    // Any hierarchy will do. To move a process to where it is changes nothing.
    let own = Cgroup::of_process(std::process::id());
    if let Some(folder) = own.ok().and_then(|own| own.folders.into_values().find(|folder| folder.is_dir())) {
        let _ = fs::write(folder.join("cgroup.procs"), "0");
    }
}

/// Comes to know when the kernel kills for want of memory in one group.
pub struct OomWatch {
    source: AsyncFd<OwnedFd>,
    file: PathBuf,
    /// Kills seen so far in version 2, where the file changes for other reasons too. Version 1 announces each,
    /// before it counts it.
    kills: Option<u64>,
}

impl OomWatch {
    /// Waits for the next time; `None` when the group is gone.
    pub async fn next(&mut self) -> Option<()> {
        loop {
            let mut ready = self.source.readable().await.ok()?;
            let mut buffer = [0; 1024];
            match ready.try_io(|source| Ok(rustix::io::read(source, &mut buffer)?)) {
                // Removing a version 1 group signals its eventfds as well.
                Ok(Ok(_)) => {
                    let text = fs::read_to_string(&self.file).ok()?;
                    match &mut self.kills {
                        None => return Some(()),
                        Some(seen) => {
                            let now = oom_kills(&text);
                            if now > std::mem::replace(seen, now) {
                                return Some(());
                            }
                        }
                    }
                }
                Ok(Err(_)) => return None,
                Err(_would_block) => {}
            }
        }
    }
}

fn oom_kills(events: &str) -> u64 {
    events.lines().find_map(|line| line.strip_prefix("oom_kill ")?.trim().parse().ok()).unwrap_or(0)
}

fn parse_number(text: &str) -> Option<u64> {
    if text == "max" { Some(u64::MAX) } else { text.parse().ok() }
}

fn collect_processes(folder: &Path, pids: &mut Vec<u32>) -> io::Result<()> {
    let text = fs::read_to_string(folder.join("cgroup.procs"))?;
    pids.extend(text.lines().filter_map(|line| line.parse::<u32>().ok()));
    for entry in fs::read_dir(folder)? {
        let entry = entry?;
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            match collect_processes(&entry.path(), pids) {
                // Groups below may vanish while we look.
                Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
    }
    Ok(())
}

/// Where the path of a controller's hierarchy is found in the file system, by the lines of mountinfo:
/// `id parent device root mountpoint options [tags] - type source superoptions`.
fn folder_of(mounts: &str, controller: &str, path: &str) -> Option<PathBuf> {
    mounts.lines().find_map(|line| {
        let (place, kind) = line.split_once(" - ")?;
        let mut place = place.split(' ').skip(3);
        let (root, mountpoint) = (place.next()?, place.next()?);
        let mut kind = kind.split(' ');
        let (filesystem, options) = (kind.next()?, kind.nth(1)?);
        let fits = match filesystem {
            "cgroup2" => controller == UNIFIED,
            "cgroup" => !controller.is_empty() && options.split(',').any(|option| option == controller),
            _ => false,
        };
        if !fits {
            return None;
        }
        let below = Path::new(path).strip_prefix(root).ok()?;
        Some(Path::new(mountpoint).join(below))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const HYBRID: &str = "\
31 23 0:28 / /sys/fs/cgroup rw,relatime - tmpfs tmpfs rw,mode=755
32 31 0:29 / /sys/fs/cgroup/cpu,cpuacct rw shared:4 - cgroup cgroup rw,cpu,cpuacct
35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory
41 31 0:38 / /sys/fs/cgroup/unified rw,relatime - cgroup2 cgroup2 rw";

    #[test]
    fn hybrid_counts_as_version_1() {
        let found =
            Cgroup::locate("5:memory:/box/a:b\n2:cpu,cpuacct:/box\n9:pids:/p\n0::/u", HYBRID).unwrap();
        assert_eq!(found.version(), Version::V1);
        assert_eq!(found.folder("memory").unwrap(), Path::new("/sys/fs/cgroup/memory/box/a:b"));
        assert_eq!(found.folder("cpuacct").unwrap(), Path::new("/sys/fs/cgroup/cpu,cpuacct/box"));
        assert_eq!(found.folder("pids"), None);
    }

    #[test]
    fn unified_serves_every_controller() {
        let mounts = "30 23 0:26 /docker/x /sys/fs/cgroup rw - cgroup2 cgroup rw,nsdelegate";
        let found = Cgroup::locate("0::/docker/x/y\n", mounts).unwrap();
        assert_eq!(found.version(), Version::V2);
        assert_eq!(found.folder("memory").unwrap(), Path::new("/sys/fs/cgroup/y"));
        assert_eq!(Cgroup::locate("0::/x", ""), None);
    }

    #[test]
    fn groups_are_reached_by_name() {
        let found = Hierarchies::parse(HYBRID).unwrap();
        assert_eq!(found.version, Version::V1);
        assert_eq!(found.mounts["cpuacct"], Path::new("/sys/fs/cgroup/cpu,cpuacct"));
        assert_eq!(found.mounts[UNIFIED], Path::new("/sys/fs/cgroup/unified"));
        let unified = Hierarchies::parse("30 23 0:26 / /sys/fs/cgroup rw - cgroup2 cgroup rw,nsdelegate");
        assert_eq!(unified.unwrap().version, Version::V2);
        assert_eq!(Hierarchies::parse("30 23 0:26 / / rw - ext4 /dev/vda rw"), None);

        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("pods/p1/c1")).unwrap();
        let mounts = [(UNIFIED.to_owned(), dir.path().to_owned())].into();
        let hierarchies = Hierarchies { version: Version::V2, mounts };
        let group = hierarchies.group("/pods/p1/c1").unwrap();
        assert_eq!(group.folder("memory").unwrap(), dir.path().join("pods/p1/c1"));
        assert_eq!(hierarchies.group("/pods/p1/c2"), None);
    }

    #[test]
    fn names_of_systemd_are_paths() {
        for (name, path) in [
            ("/k8s.io/c1", "k8s.io/c1"),
            ("kubepods/burstable", "kubepods/burstable"),
            (
                "kubepods-burstable-podx.slice",
                "kubepods.slice/kubepods-burstable.slice/kubepods-burstable-podx.slice",
            ),
            ("kubepods-podx.slice:cri:c1", "kubepods.slice/kubepods-podx.slice/cri-c1.scope"),
            (":cri:c1", "system.slice/cri-c1.scope"),
            ("-.slice::c1", "c1.scope"),
            ("/odd.slice/x", "odd.slice/x"),
            ("/a/../../b", "a/b"),
            ("/", ""),
        ] {
            assert_eq!(path_of(name), Path::new(path), "{name}");
        }
    }

    #[test]
    fn numbers_know_max() {
        assert_eq!(parse_number("max"), Some(u64::MAX));
        assert_eq!(parse_number("12"), Some(12));
        assert_eq!(parse_number("-1"), None);
        assert_eq!(oom_kills("low 0\noom 3\noom_kill 2\noom_group_kill 0\n"), 2);
    }
}
