//! Control groups read straight from their files: where a process sits, its counters, and when its memory ran out.
//!
//! Both versions, and the hybrid of both: a controller mounted as version 1 is read there. A group is version 2
//! here when none of the controllers that count (memory, cpu, pids) is mounted as version 1.

use std::collections::{BTreeMap, HashMap};
use std::fs;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

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

impl Cgroup {
    /// Finds the group a process is in now.
    ///
    /// # Errors
    /// NotFound when the process is gone or no hierarchy of its is mounted here, else those of reading /proc.
    pub fn of_process(pid: u32) -> io::Result<Self> {
        let memberships = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
        let mounts = fs::read_to_string("/proc/self/mountinfo")?;
        Self::locate(&memberships, &mounts)
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
        let counts = |controller: &str| folders.contains_key(controller);
        let version =
            if ["memory", "cpu", "pids"].into_iter().any(counts) { Version::V1 } else { Version::V2 };
        match version {
            Version::V2 if !folders.contains_key(UNIFIED) => None,
            _ => Some(Self { version, folders }),
        }
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
            Version::V1 => ["pids", "memory", "cpu"].into_iter().find_map(|name| self.folder(name)),
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
    fn numbers_know_max() {
        assert_eq!(parse_number("max"), Some(u64::MAX));
        assert_eq!(parse_number("12"), Some(12));
        assert_eq!(parse_number("-1"), None);
        assert_eq!(oom_kills("low 0\noom 3\noom_kill 2\noom_group_kill 0\n"), 2);
    }
}
