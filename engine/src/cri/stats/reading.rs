//! The counters of a control group in one form, whichever version counts them: times in nanoseconds, sizes in bytes.
//!
//! ```text
//!  files of version 1  -\
//!  files of version 2  --> Reading
//!  a shim's Metrics    -/    (where the group is not on this machine: virtual machines)
//! ```
//!
//! Invariant: what could not be read is unset, never 0. A limit that is no limit is unset.

use std::collections::HashMap;
use std::fs;
use std::path::Path;

use prost_types::Any;
use proto::io::containerd::cgroups::{v1, v2};
use proto::runtime::v1::{PsiData, PsiStats};
use sys::cgroup::{Cgroup, Version};

/// From here on a limit of version 1 is none: the kernel rounds the highest number down to pages.
const UNLIMITED: u64 = 1 << 62;

/// What a group has used.
#[derive(Clone, Debug, Default, PartialEq)]
pub(super) struct Reading {
    pub cpu: Option<Cpu>,
    pub memory: Option<Memory>,
    /// Processes that the kernel killed for want of memory.
    pub oom_kills: Option<u64>,
    pub disks: Vec<Disk>,
    pub huge: Vec<Huge>,
    /// Threads of all processes.
    pub threads: Option<u64>,
    pub threads_max: Option<u64>,
    pub limits: Limits,
    pub cpu_pressure: Option<PsiStats>,
    pub memory_pressure: Option<PsiStats>,
    pub io_pressure: Option<PsiStats>,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Cpu {
    pub total: u64,
    pub user: u64,
    pub system: u64,
    pub periods: u64,
    pub throttled_periods: u64,
    pub throttled: u64,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Memory {
    pub usage: u64,
    pub max_usage: u64,
    pub limit: Option<u64>,
    pub rss: u64,
    pub cache: u64,
    pub mapped: u64,
    pub kernel: u64,
    pub active_file: u64,
    pub inactive_file: u64,
    /// Without memory, in both versions.
    pub swap: u64,
    pub swap_limit: Option<u64>,
    /// How often the limit was hit.
    pub failures: u64,
    /// Of the group alone, and with those below it.
    pub faults: [u64; 2],
    pub major_faults: [u64; 2],
}

impl Memory {
    /// What cannot be let go of easily.
    pub(super) fn working_set(&self) -> u64 {
        self.usage.saturating_sub(self.inactive_file)
    }
}

/// A block device.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Disk {
    pub major: u64,
    pub minor: u64,
    /// Bytes by kind of operation, as the kernel names it.
    pub operations: Vec<(String, u64)>,
    pub read_bytes: u64,
    pub write_bytes: u64,
    pub reads: u64,
    pub writes: u64,
}

/// Huge pages of one size.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) struct Huge {
    /// As the kernel writes it: 2MB.
    pub size: String,
    pub usage: u64,
    /// Version 1 alone knows.
    pub max_usage: Option<u64>,
}

/// What the group may use.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Limits {
    /// Microseconds, as the two files are.
    pub period: Option<u64>,
    pub quota: Option<u64>,
    pub shares: Option<u64>,
    pub reservation: Option<u64>,
    /// Memory and swap together, as version 1 has it.
    pub memory_and_swap: Option<u64>,
}

impl Reading {
    /// From the group's files. Reads.
    pub(super) fn of(group: &Cgroup) -> Self {
        let (mut reading, prefix) = match group.version() {
            Version::V1 => (of_v1(group), ["usage_in_bytes", "max_usage_in_bytes"]),
            Version::V2 => (of_v2(group), ["current", ""]),
        };
        reading.threads = group.number("pids", "pids.current");
        reading.threads_max = group.number("pids", "pids.max").filter(|max| *max < UNLIMITED);
        reading.huge = huge(group, prefix);
        let pressure = |file: &str| group.unified(file).and_then(|text| pressure(&text));
        reading.cpu_pressure = pressure("cpu.pressure");
        reading.memory_pressure = pressure("memory.pressure");
        reading.io_pressure = pressure("io.pressure");
        reading
    }

    /// From what a shim answers; None when that is of no kind that is known.
    pub(super) fn of_metrics(metrics: &Any) -> Option<Self> {
        if let Ok(metrics) = proto::any::unpack::<v1::Metrics>(metrics) {
            return Some(of_metrics_v1(metrics));
        }
        proto::any::unpack::<v2::Metrics>(metrics).ok().map(of_metrics_v2)
    }

    /// Takes in what another group uses: the sum of both, as far as a pod's statistics go.
    pub(super) fn add(&mut self, other: &Self) {
        if let Some(cpu) = &other.cpu {
            let sum = self.cpu.get_or_insert_default();
            sum.total += cpu.total;
            sum.user += cpu.user;
            sum.system += cpu.system;
        }
        if let Some(memory) = &other.memory {
            let sum = self.memory.get_or_insert_default();
            sum.usage += memory.usage;
            sum.rss += memory.rss;
            sum.cache += memory.cache;
            sum.active_file += memory.active_file;
            sum.inactive_file += memory.inactive_file;
            sum.swap += memory.swap;
            for at in 0..2 {
                sum.faults[at] += memory.faults[at];
                sum.major_faults[at] += memory.major_faults[at];
            }
        }
    }
}

/// The processor time of a group alone, which is asked for often. Reads.
pub(super) fn cpu_total(group: &Cgroup) -> Option<u64> {
    match group.version() {
        Version::V1 => group.number("cpuacct", "cpuacct.usage"),
        Version::V2 => Some(group.pairs("cpu", "cpu.stat").get("usage_usec")? * 1000),
    }
}

fn of_v1(group: &Cgroup) -> Reading {
    /// Nanoseconds in one tick of cpuacct.stat: USER_HZ is 100 on every architecture that Linux has.
    const TICK: u64 = 10_000_000;
    let number = |controller: &str, file: &str| group.number(controller, file);
    let cpu = number("cpuacct", "cpuacct.usage").map(|total| {
        let ticks = group.pairs("cpuacct", "cpuacct.stat");
        let throttling = group.pairs("cpu", "cpu.stat");
        Cpu {
            total,
            user: get(&ticks, "user") * TICK,
            system: get(&ticks, "system") * TICK,
            periods: get(&throttling, "nr_periods"),
            throttled_periods: get(&throttling, "nr_throttled"),
            throttled: get(&throttling, "throttled_time"),
        }
    });
    let limit = |file: &str| number("memory", file).filter(|limit| *limit < UNLIMITED);
    let (memory_limit, both) = (limit("memory.limit_in_bytes"), limit("memory.memsw.limit_in_bytes"));
    let memory = number("memory", "memory.usage_in_bytes").map(|usage| {
        let stat = group.pairs("memory", "memory.stat");
        let get = |key: &str| get(&stat, key);
        Memory {
            usage,
            max_usage: number("memory", "memory.max_usage_in_bytes").unwrap_or(usage),
            limit: memory_limit,
            rss: get("total_rss"),
            cache: get("total_cache"),
            mapped: get("total_mapped_file"),
            kernel: number("memory", "memory.kmem.usage_in_bytes").unwrap_or(0),
            active_file: get("total_active_file"),
            inactive_file: get("total_inactive_file"),
            swap: get("total_swap"),
            swap_limit: both.zip(memory_limit).map(|(both, memory)| both.saturating_sub(memory)),
            failures: number("memory", "memory.failcnt").unwrap_or(0),
            faults: [get("pgfault"), get("total_pgfault")],
            major_faults: [get("pgmajfault"), get("total_pgmajfault")],
        }
    });
    // The BFQ scheduler has files of its own; without it only the throttle's count.
    let entries = |bfq: &str, throttle: &str| {
        let read = |file: &str| blkio(&group.text("blkio", file).unwrap_or_default());
        let found = read(bfq);
        if found.is_empty() { read(throttle) } else { found }
    };
    Reading {
        cpu,
        memory,
        oom_kills: group.pairs("memory", "memory.oom_control").get("oom_kill").copied(),
        disks: disks(
            entries("blkio.bfq.io_service_bytes_recursive", "blkio.throttle.io_service_bytes_recursive"),
            entries("blkio.bfq.io_serviced_recursive", "blkio.throttle.io_serviced_recursive"),
        ),
        limits: Limits {
            period: number("cpu", "cpu.cfs_period_us"),
            quota: number("cpu", "cpu.cfs_quota_us"),
            shares: number("cpu", "cpu.shares"),
            reservation: limit("memory.soft_limit_in_bytes"),
            memory_and_swap: both,
        },
        ..Reading::default()
    }
}

fn of_v2(group: &Cgroup) -> Reading {
    let number = |file: &str| group.number("memory", file);
    let stat = group.pairs("cpu", "cpu.stat");
    let micro = |key: &str| get(&stat, key) * 1000;
    let cpu = stat.contains_key("usage_usec").then(|| Cpu {
        total: micro("usage_usec"),
        user: micro("user_usec"),
        system: micro("system_usec"),
        periods: get(&stat, "nr_periods"),
        throttled_periods: get(&stat, "nr_throttled"),
        throttled: micro("throttled_usec"),
    });
    let events = group.pairs("memory", "memory.events");
    let limit = |file: &str| number(file).filter(|limit| *limit < UNLIMITED);
    let (memory_limit, swap_limit) = (limit("memory.max"), limit("memory.swap.max"));
    let memory = number("memory.current").map(|usage| {
        let stat = group.pairs("memory", "memory.stat");
        let get = |key: &str| get(&stat, key);
        // Its sum is told since Linux 5.18.
        let kernel = stat.get("kernel").copied();
        let parts = || ["kernel_stack", "pagetables", "percpu", "sock", "slab"].into_iter().map(get).sum();
        Memory {
            usage,
            // Told since Linux 5.19; what is used now is the least that it can be.
            max_usage: number("memory.peak").unwrap_or(usage),
            limit: memory_limit,
            rss: get("anon"),
            cache: get("file"),
            mapped: get("file_mapped"),
            kernel: kernel.unwrap_or_else(parts),
            active_file: get("active_file"),
            inactive_file: get("inactive_file"),
            swap: number("memory.swap.current").unwrap_or(0),
            swap_limit,
            failures: events.get("max").copied().unwrap_or(0),
            // Both with the groups below: nothing else is counted here.
            faults: [get("pgfault"); 2],
            major_faults: [get("pgmajfault"); 2],
        }
    });
    let quota_and_period = group.text("cpu", "cpu.max").unwrap_or_default();
    let mut words = quota_and_period.split_whitespace();
    Reading {
        cpu,
        memory,
        oom_kills: events.get("oom_kill").copied(),
        disks: io(&group.text("io", "io.stat").unwrap_or_default()),
        limits: Limits {
            quota: words.next().and_then(|word| word.parse().ok()),
            period: words.next().and_then(|word| word.parse().ok()),
            shares: group.number("cpu", "cpu.weight").map(shares_of_weight),
            reservation: limit("memory.low").filter(|low| *low > 0),
            memory_and_swap: memory_limit.zip(swap_limit).map(|(memory, swap)| memory + swap),
        },
        ..Reading::default()
    }
}

/// The shares of version 1 (2 to 262144) that runtimes turn into this weight of version 2 (1 to 10000), about.
fn shares_of_weight(weight: u64) -> u64 {
    2 + weight.saturating_sub(1) * 262_142 / 9_999
}

/// `some avg10=0.00 avg60=0.00 avg300=0.00 total=0` and, but for old kernels' processors, `full ...`.
pub(super) fn pressure(text: &str) -> Option<PsiStats> {
    let line = |name: &str| {
        let words = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '))?;
        let field = |name: &str| {
            words.split(' ').find_map(|word| word.strip_prefix(name)?.strip_prefix('=')).unwrap_or_default()
        };
        let average = |name: &str| field(name).parse().unwrap_or(0.0);
        let total: u64 = field("total").parse().ok()?;
        Some(PsiData {
            total: total * 1000,
            avg10: average("avg10"),
            avg60: average("avg60"),
            avg300: average("avg300"),
        })
    };
    let some = line("some")?;
    Some(PsiStats { some: Some(some), full: line("full") })
}

/// One line of a blkio file: device, operation, number.
type Entry = (u64, u64, String, u64);

/// Lines of `8:0 Read 4096`; the sum at the end is no device's.
fn blkio(text: &str) -> Vec<Entry> {
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let (operation, value) = (words.next()?, words.next()?);
        Some((major.parse().ok()?, minor.parse().ok()?, operation.to_owned(), value.parse().ok()?))
    };
    text.lines().filter_map(entry).collect()
}

fn disks(bytes: Vec<Entry>, operations: Vec<Entry>) -> Vec<Disk> {
    let mut found: Vec<Disk> = Vec::new();
    let mut disk = |major, minor, change: &dyn Fn(&mut Disk)| {
        let at = found.iter().position(|disk| (disk.major, disk.minor) == (major, minor));
        let at = at.unwrap_or_else(|| {
            found.push(Disk { major, minor, ..Disk::default() });
            found.len() - 1
        });
        change(&mut found[at]);
    };
    for (major, minor, operation, value) in bytes {
        disk(major, minor, &|disk| {
            match operation.as_str() {
                "Read" => disk.read_bytes = value,
                "Write" => disk.write_bytes = value,
                _ => {}
            }
            disk.operations.push((operation.clone(), value));
        });
    }
    for (major, minor, operation, value) in operations {
        disk(major, minor, &|disk| match operation.as_str() {
            "Read" => disk.reads = value,
            "Write" => disk.writes = value,
            _ => {}
        });
    }
    found
}

/// Lines of `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`.
fn io(text: &str) -> Vec<Disk> {
    let disk = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let pairs: HashMap<&str, u64> = words
            .filter_map(|word| word.split_once('='))
            .filter_map(|(key, value)| Some((key, value.parse().ok()?)))
            .collect();
        let get = |key: &str| pairs.get(key).copied().unwrap_or(0);
        Some(Disk {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            operations: [("Read", "rbytes"), ("Write", "wbytes"), ("Discard", "dbytes")]
                .map(|(operation, key)| (operation.to_owned(), get(key)))
                .into(),
            read_bytes: get("rbytes"),
            write_bytes: get("wbytes"),
            reads: get("rios"),
            writes: get("wios"),
        })
    };
    text.lines().filter_map(disk).collect()
}

/// `hugetlb.2MB.current` and the like.
fn huge(group: &Cgroup, [usage, max_usage]: [&str; 2]) -> Vec<Huge> {
    let mut sizes: Vec<String> = group
        .files("hugetlb")
        .iter()
        .filter_map(|name| name.strip_prefix("hugetlb.")?.strip_suffix(usage)?.strip_suffix('.'))
        // Reservations are counted beside it: `hugetlb.2MB.rsvd.current`.
        .filter(|size| !size.contains('.'))
        .map(str::to_owned)
        .collect();
    sizes.sort();
    let number = |size: &str, file: &str| group.number("hugetlb", &format!("hugetlb.{size}.{file}"));
    let found = sizes.into_iter().filter_map(|size| {
        Some(Huge { usage: number(&size, usage)?, max_usage: number(&size, max_usage), size })
    });
    found.collect()
}

fn of_metrics_v1(metrics: v1::Metrics) -> Reading {
    let cpu = metrics.cpu.and_then(|cpu| {
        let (usage, throttling) = (cpu.usage?, cpu.throttling.unwrap_or_default());
        Some(Cpu {
            total: usage.total,
            user: usage.user,
            system: usage.kernel,
            periods: throttling.periods,
            throttled_periods: throttling.throttled_periods,
            throttled: throttling.throttled_time,
        })
    });
    let memory = metrics.memory.and_then(|memory| {
        let usage = memory.usage?;
        let both = memory.swap.unwrap_or_default();
        let limit = Some(usage.limit).filter(|limit| (1..UNLIMITED).contains(limit));
        let both_limit = Some(both.limit).filter(|limit| (1..UNLIMITED).contains(limit));
        Some(Memory {
            usage: usage.usage,
            max_usage: usage.max,
            limit,
            rss: memory.total_rss,
            cache: memory.total_cache,
            mapped: memory.total_mapped_file,
            kernel: memory.kernel.unwrap_or_default().usage,
            active_file: memory.total_active_file,
            inactive_file: memory.total_inactive_file,
            swap: both.usage.saturating_sub(usage.usage),
            swap_limit: both_limit.zip(limit).map(|(both, memory)| both.saturating_sub(memory)),
            failures: usage.failcnt,
            faults: [memory.pg_fault, memory.total_pg_fault],
            major_faults: [memory.pg_maj_fault, memory.total_pg_maj_fault],
        })
    });
    let blkio = metrics.blkio.unwrap_or_default();
    let entries = |entries: Vec<v1::BlkIoEntry>| {
        entries.into_iter().map(|entry| (entry.major, entry.minor, entry.op, entry.value)).collect()
    };
    Reading {
        cpu,
        memory,
        oom_kills: metrics.memory_oom_control.map(|control| control.oom_kill),
        disks: disks(entries(blkio.io_service_bytes_recursive), entries(blkio.io_serviced_recursive)),
        threads: metrics.pids.as_ref().map(|pids| pids.current),
        threads_max: metrics.pids.map(|pids| pids.limit).filter(|max| (1..UNLIMITED).contains(max)),
        ..Reading::default()
    }
}

fn of_metrics_v2(metrics: v2::Metrics) -> Reading {
    let limited = |limit: u64| Some(limit).filter(|limit| *limit < UNLIMITED);
    let events = metrics.memory_events.unwrap_or_default();
    let memory = metrics.memory.map(|memory| Memory {
        usage: memory.usage,
        max_usage: memory.max_usage.max(memory.usage),
        limit: limited(memory.usage_limit),
        rss: memory.anon,
        cache: memory.file,
        mapped: memory.file_mapped,
        kernel: memory.kernel_stack + memory.slab + memory.sock,
        active_file: memory.active_file,
        inactive_file: memory.inactive_file,
        swap: memory.swap_usage,
        swap_limit: limited(memory.swap_limit),
        failures: events.max,
        faults: [memory.pgfault; 2],
        major_faults: [memory.pgmajfault; 2],
    });
    let io = metrics.io.unwrap_or_default().usage.into_iter().map(|entry| Disk {
        major: entry.major,
        minor: entry.minor,
        operations: vec![("Read".into(), entry.rbytes), ("Write".into(), entry.wbytes)],
        read_bytes: entry.rbytes,
        write_bytes: entry.wbytes,
        reads: entry.rios,
        writes: entry.wios,
    });
    Reading {
        cpu: metrics.cpu.map(|cpu| Cpu {
            total: cpu.usage_usec * 1000,
            user: cpu.user_usec * 1000,
            system: cpu.system_usec * 1000,
            periods: cpu.nr_periods,
            throttled_periods: cpu.nr_throttled,
            throttled: cpu.throttled_usec * 1000,
        }),
        memory,
        oom_kills: metrics.memory_events.map(|events| events.oom_kill),
        disks: io.collect(),
        threads: metrics.pids.as_ref().map(|pids| pids.current),
        threads_max: metrics.pids.map(|pids| pids.limit).filter(|max| (1..UNLIMITED).contains(max)),
        ..Reading::default()
    }
}

fn get(pairs: &HashMap<String, u64>, key: &str) -> u64 {
    pairs.get(key).copied().unwrap_or(0)
}

/// Open descriptors of these processes, and how many of them are sockets. Reads; processes may end meanwhile.
pub(super) fn descriptors(pids: &[u32]) -> (u64, u64) {
    let (mut all, mut sockets) = (0, 0);
    for pid in pids {
        let folder = Path::new("/proc").join(pid.to_string()).join("fd");
        for entry in fs::read_dir(folder).into_iter().flatten().flatten() {
            all += 1;
            let target = fs::read_link(entry.path());
            sockets += u64::from(
                target.is_ok_and(|target| target.as_os_str().as_encoded_bytes().starts_with(b"socket:")),
            );
        }
    }
    (all, sockets)
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::path::PathBuf;
    use std::process::Command;

    use sys::cgroup::Hierarchies;

    use super::*;

    /// A group whose folders hold these files, as (controller, file, text).
    fn recorded(version: Version, files: &[(&str, &str, &str)]) -> (Cgroup, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let mut folders: BTreeMap<String, PathBuf> = BTreeMap::new();
        for (controller, file, text) in files {
            let folder = dir.path().join(if controller.is_empty() { "unified" } else { controller });
            fs::create_dir_all(&folder).unwrap();
            fs::write(folder.join(file), text).unwrap();
            folders.insert((*controller).to_owned(), folder);
        }
        (Cgroup::of_folders(version, folders), dir)
    }

    #[test]
    fn files_of_version_1() {
        let (group, _dir) = recorded(
            Version::V1,
            &[
                ("cpuacct", "cpuacct.usage", "1234567890\n"),
                ("cpuacct", "cpuacct.stat", "user 70\nsystem 45\n"),
                ("cpu", "cpu.stat", "nr_periods 10\nnr_throttled 3\nthrottled_time 500000000\n"),
                ("cpu", "cpu.cfs_period_us", "100000\n"),
                ("cpu", "cpu.cfs_quota_us", "-1\n"),
                ("cpu", "cpu.shares", "1024\n"),
                ("memory", "memory.usage_in_bytes", "8388608\n"),
                ("memory", "memory.max_usage_in_bytes", "9388608\n"),
                ("memory", "memory.limit_in_bytes", "67108864\n"),
                ("memory", "memory.soft_limit_in_bytes", "9223372036854771712\n"),
                ("memory", "memory.memsw.limit_in_bytes", "100663296\n"),
                ("memory", "memory.kmem.usage_in_bytes", "4096\n"),
                ("memory", "memory.failcnt", "7\n"),
                (
                    "memory",
                    "memory.stat",
                    "cache 1\nrss 2\npgfault 30\npgmajfault 3\ninactive_file 5\nhierarchical_memory_limit 67108864\n\
                     total_cache 1000\ntotal_rss 2000\ntotal_mapped_file 300\ntotal_swap 40\ntotal_pgfault 31\n\
                     total_pgmajfault 4\ntotal_inactive_file 608\ntotal_active_file 50\n",
                ),
                ("memory", "memory.oom_control", "oom_kill_disable 0\nunder_oom 0\noom_kill 2\n"),
                ("blkio", "blkio.bfq.io_service_bytes_recursive", "Total 0\n"),
                (
                    "blkio",
                    "blkio.throttle.io_service_bytes_recursive",
                    "254:0 Read 4096\n254:0 Write 8192\n254:0 Sync 12288\n254:0 Total 12288\nTotal 12288\n",
                ),
                ("blkio", "blkio.throttle.io_serviced_recursive", "254:0 Read 1\n254:0 Write 2\nTotal 3\n"),
                ("pids", "pids.current", "5\n"),
                ("pids", "pids.max", "max\n"),
                ("hugetlb", "hugetlb.2MB.usage_in_bytes", "2097152\n"),
                ("hugetlb", "hugetlb.2MB.max_usage_in_bytes", "4194304\n"),
                ("hugetlb", "hugetlb.2MB.rsvd.usage_in_bytes", "1\n"),
                ("", "cpu.pressure", "some avg10=1.50 avg60=0.25 avg300=0.00 total=1234\n"),
            ],
        );
        let reading = Reading::of(&group);
        let cpu = reading.cpu.unwrap();
        assert_eq!((cpu.total, cpu.user, cpu.system), (1_234_567_890, 700_000_000, 450_000_000));
        assert_eq!((cpu.periods, cpu.throttled_periods, cpu.throttled), (10, 3, 500_000_000));
        assert_eq!(cpu_total(&group), Some(cpu.total));
        let memory = reading.memory.unwrap();
        assert_eq!((memory.usage, memory.max_usage, memory.working_set()), (8_388_608, 9_388_608, 8_388_000));
        assert_eq!((memory.limit, memory.swap_limit), (Some(67_108_864), Some(33_554_432)));
        assert_eq!((memory.rss, memory.cache, memory.mapped, memory.swap), (2000, 1000, 300, 40));
        assert_eq!((memory.kernel, memory.failures), (4096, 7));
        assert_eq!((memory.faults, memory.major_faults), ([30, 31], [3, 4]));
        assert_eq!(reading.oom_kills, Some(2));
        assert_eq!((reading.threads, reading.threads_max), (Some(5), None));
        let [disk] = &reading.disks[..] else { panic!("{:?}", reading.disks) };
        assert_eq!((disk.major, disk.minor, disk.read_bytes, disk.write_bytes), (254, 0, 4096, 8192));
        assert_eq!((disk.reads, disk.writes, disk.operations.len()), (1, 2, 4));
        let huge = Huge { size: "2MB".into(), usage: 2_097_152, max_usage: Some(4_194_304) };
        assert_eq!(reading.huge, [huge]);
        assert_eq!(
            reading.limits,
            Limits {
                period: Some(100_000),
                quota: None,
                shares: Some(1024),
                reservation: None,
                memory_and_swap: Some(100_663_296),
            }
        );
        let pressure = reading.cpu_pressure.unwrap();
        let some = pressure.some.unwrap();
        assert_eq!((some.total, some.avg10, some.avg60), (1_234_000, 1.5, 0.25));
        assert_eq!((pressure.full, reading.io_pressure), (None, None));
    }

    #[test]
    fn files_of_version_2() {
        let (group, dir) = recorded(
            Version::V2,
            &[
                (
                    "",
                    "cpu.stat",
                    "usage_usec 1500000\nuser_usec 1000000\nsystem_usec 500000\nnr_periods 4\nnr_throttled 1\n\
                     throttled_usec 2000\n",
                ),
                ("", "cpu.max", "20000 100000\n"),
                ("", "cpu.weight", "39\n"),
                ("", "memory.current", "10000\n"),
                ("", "memory.max", "max\n"),
                ("", "memory.low", "0\n"),
                ("", "memory.swap.current", "12\n"),
                ("", "memory.swap.max", "max\n"),
                (
                    "",
                    "memory.stat",
                    "anon 5000\nfile 4000\nkernel_stack 160\npagetables 40\nslab 300\nfile_mapped 70\n\
                     inactive_file 3000\nactive_file 1000\npgfault 90\npgmajfault 9\n",
                ),
                ("", "memory.events", "low 0\nhigh 0\nmax 6\noom 1\noom_kill 3\noom_group_kill 0\n"),
                ("", "io.stat", "254:0 rbytes=4096 wbytes=8192 rios=1 wios=2 dbytes=16 dios=1\n7:0 \n"),
                ("", "pids.current", "3\n"),
                ("", "pids.max", "100\n"),
                ("", "hugetlb.1GB.current", "0\n"),
                (
                    "",
                    "memory.pressure",
                    "some avg10=0.00 avg60=0.00 avg300=0.10 total=5\nfull avg10=0.00 avg60=0.00 avg300=0.00 total=2\n",
                ),
            ],
        );
        let reading = Reading::of(&group);
        let cpu = reading.cpu.unwrap();
        assert_eq!((cpu.total, cpu.user, cpu.system), (1_500_000_000, 1_000_000_000, 500_000_000));
        assert_eq!((cpu.periods, cpu.throttled_periods, cpu.throttled), (4, 1, 2_000_000));
        assert_eq!(cpu_total(&group), Some(cpu.total));
        let memory = reading.memory.unwrap();
        assert_eq!((memory.usage, memory.max_usage, memory.working_set()), (10000, 10000, 7000));
        assert_eq!((memory.limit, memory.swap_limit, memory.swap), (None, None, 12));
        assert_eq!((memory.rss, memory.cache, memory.mapped, memory.kernel), (5000, 4000, 70, 500));
        assert_eq!((memory.failures, memory.faults, memory.major_faults), (6, [90; 2], [9; 2]));
        assert_eq!(reading.oom_kills, Some(3));
        assert_eq!((reading.threads, reading.threads_max), (Some(3), Some(100)));
        assert_eq!(reading.disks[0].operations[2], ("Discard".to_owned(), 16));
        assert_eq!((reading.disks[0].reads, reading.disks[0].write_bytes), (1, 8192));
        assert_eq!(reading.huge, [Huge { size: "1GB".into(), usage: 0, max_usage: None }]);
        let limits = reading.limits;
        assert_eq!((limits.period, limits.quota, limits.reservation), (Some(100_000), Some(20_000), None));
        assert_eq!(limits.shares, Some(998), "of about 1000, which runtimes make 39");
        assert_eq!(limits.memory_and_swap, None);
        assert_eq!(reading.memory_pressure.unwrap().full.unwrap().total, 2000);

        // Newer kernels tell more.
        fs::write(dir.path().join("unified/memory.peak"), "20000\n").unwrap();
        fs::write(dir.path().join("unified/memory.stat"), "anon 5000\nkernel 700\n").unwrap();
        let memory = Reading::of(&group).memory.unwrap();
        assert_eq!((memory.max_usage, memory.kernel), (20000, 700));
    }

    #[test]
    fn a_group_without_files_is_unset() {
        for version in [Version::V1, Version::V2] {
            let (group, _dir) =
                recorded(version, &[("", "cgroup.procs", ""), ("memory", "cgroup.procs", "")]);
            let reading = Reading::of(&group);
            assert_eq!(reading, Reading::default(), "{version:?}");
            assert_eq!(cpu_total(&group), None);
        }
    }

    #[test]
    fn shims_metrics_are_the_same_as_files() {
        let metrics = v2::Metrics {
            cpu: Some(v2::CpuStat { usage_usec: 5, ..v2::CpuStat::default() }),
            memory: Some(v2::MemoryStat {
                usage: 100,
                usage_limit: u64::MAX,
                swap_limit: 10,
                inactive_file: 30,
                ..v2::MemoryStat::default()
            }),
            pids: Some(v2::PidsStat { current: 2, limit: u64::MAX }),
            ..v2::Metrics::default()
        };
        let reading = Reading::of_metrics(&proto::any::pack(&metrics)).unwrap();
        assert_eq!(reading.cpu.unwrap().total, 5000);
        let memory = reading.memory.unwrap();
        assert_eq!((memory.working_set(), memory.limit, memory.swap_limit), (70, None, Some(10)));
        assert_eq!((reading.threads, reading.threads_max), (Some(2), None));

        let entry = |usage, limit| v1::MemoryEntry { usage, limit, ..v1::MemoryEntry::default() };
        let metrics = v1::Metrics {
            memory: Some(v1::MemoryStat {
                total_rss: 9,
                usage: Some(entry(100, 1000)),
                swap: Some(entry(140, 1500)),
                ..v1::MemoryStat::default()
            }),
            ..v1::Metrics::default()
        };
        let memory = Reading::of_metrics(&proto::any::pack(&metrics)).unwrap().memory.unwrap();
        assert_eq!((memory.rss, memory.swap, memory.swap_limit), (9, 40, Some(500)));
        assert_eq!(Reading::of_metrics(&Any::default()), None);
    }

    #[test]
    fn a_real_group_counts_what_runs_in_it() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let name = format!("gantry-reading-{}", std::process::id());
        let top = fs::read_dir("/sys/fs/cgroup").unwrap().flatten().map(|entry| entry.path());
        let hierarchies: Vec<PathBuf> = top
            .chain([PathBuf::from("/sys/fs/cgroup")])
            .filter(|path| path.join("cgroup.procs").exists())
            .collect();
        let folders: Vec<_> = hierarchies.iter().map(|hierarchy| hierarchy.join(&name)).collect();
        folders.iter().filter(|folder| fs::create_dir(folder).is_err()).for_each(|folder| {
            println!("no group {}", folder.display());
        });
        // It joins, has memory and time of its own, and then waits to be ended.
        let script = "for f in /sys/fs/cgroup/*/$0 /sys/fs/cgroup/$0; do [ -d $f ] && echo $$ > $f/cgroup.procs; done 2>/dev/null; \
                      i=0; while [ $i -lt 50000 ]; do i=$((i+1)); done; echo done; exec sleep 100";
        let mut child = Command::new("sh")
            .args(["-c", script, &name])
            .stdout(std::process::Stdio::piped())
            .spawn()
            .unwrap();
        let mut said = [0; 4];
        std::io::Read::read_exact(child.stdout.as_mut().unwrap(), &mut said).unwrap();
        let group = Hierarchies::mounted().unwrap().group(&format!("/{name}"));
        let end = std::time::Instant::now() + std::time::Duration::from_secs(20);
        let seen = loop {
            let seen = group.as_ref().map(|group| (Reading::of(group), group.processes().unwrap()));
            // The kernel may sum events up some seconds later.
            let faults =
                seen.as_ref().and_then(|(reading, _)| reading.memory).map_or(0, |memory| memory.faults[1]);
            if faults > 0 || std::time::Instant::now() > end {
                break seen;
            }
            std::thread::sleep(std::time::Duration::from_millis(20));
        };
        child.kill().unwrap();
        child.wait().unwrap();
        for folder in &folders {
            // Its process is accounted for until it is gone.
            while fs::remove_dir(folder).is_err_and(|error| error.raw_os_error() == Some(16)) {
                std::thread::yield_now();
            }
        }
        let (reading, processes) = seen.unwrap();
        assert_eq!(processes, [child.id()]);
        let (cpu, memory) = (reading.cpu.unwrap(), reading.memory.unwrap());
        assert!(cpu.total > 1_000_000, "{cpu:?}");
        assert!(memory.usage > 0 && memory.limit.is_none() && memory.faults[1] > 0, "{memory:?}");
        assert!(memory.max_usage >= memory.usage && memory.working_set() <= memory.usage, "{memory:?}");
        assert_eq!(reading.threads, Some(1));
        assert_eq!(reading.oom_kills, Some(0));
        assert!(reading.limits.shares.is_some() && reading.limits.period.is_some(), "{:?}", reading.limits);
        assert_eq!(Hierarchies::mounted().unwrap().group(&name), None, "it is gone");
    }
}
