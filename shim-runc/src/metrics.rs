//! A control group's counters as containerd's metrics messages, straight from the group's files.
//!
//! A file that is not there leaves its part unset: not every kernel has every controller.

use std::collections::HashMap;

use prost_types::Any;
use proto::io::containerd::cgroups::{v1, v2};
use sys::cgroup::{Cgroup, Version};

/// The counters now: `io.containerd.cgroups.v1.Metrics` or `.v2.Metrics`. Times are nanoseconds in version 1 and
/// microseconds in version 2, sizes bytes.
pub(crate) fn of(group: &Cgroup) -> Any {
    match group.version() {
        Version::V1 => proto::any::pack(&metrics_v1(group)),
        Version::V2 => proto::any::pack(&metrics_v2(group)),
    }
}

fn metrics_v1(group: &Cgroup) -> v1::Metrics {
    v1::Metrics {
        pids: group.number("pids", "pids.current").map(|current| v1::PidsStat {
            current,
            // Unlimited is 0 here, as the field's readers expect.
            limit: group.number("pids", "pids.max").filter(|limit| *limit != u64::MAX).unwrap_or(0),
        }),
        cpu: cpu_v1(group),
        memory: memory_v1(group),
        blkio: Some(blkio(group)),
        memory_oom_control: group.folder("memory").map(|_| {
            let pairs = group.pairs("memory", "memory.oom_control");
            v1::MemoryOomControl {
                oom_kill_disable: get(&pairs, "oom_kill_disable"),
                under_oom: get(&pairs, "under_oom"),
                oom_kill: get(&pairs, "oom_kill"),
            }
        }),
        ..v1::Metrics::default()
    }
}

fn cpu_v1(group: &Cgroup) -> Option<v1::CpuStat> {
    /// Nanoseconds in one tick of cpuacct.stat: USER_HZ is 100 on every architecture Linux has.
    const TICK: u64 = 10_000_000;
    let total = group.number("cpuacct", "cpuacct.usage")?;
    let ticks = group.pairs("cpuacct", "cpuacct.stat");
    let per_cpu = group.text("cpuacct", "cpuacct.usage_percpu").unwrap_or_default();
    let throttling = group.pairs("cpu", "cpu.stat");
    Some(v1::CpuStat {
        usage: Some(v1::CpuUsage {
            total,
            kernel: get(&ticks, "system") * TICK,
            user: get(&ticks, "user") * TICK,
            per_cpu: per_cpu.split_whitespace().filter_map(|number| number.parse().ok()).collect(),
        }),
        throttling: Some(v1::Throttle {
            periods: get(&throttling, "nr_periods"),
            throttled_periods: get(&throttling, "nr_throttled"),
            throttled_time: get(&throttling, "throttled_time"),
        }),
    })
}

fn memory_v1(group: &Cgroup) -> Option<v1::MemoryStat> {
    group.number("memory", "memory.usage_in_bytes")?;
    let stat = group.pairs("memory", "memory.stat");
    let entry = |name: &str| {
        let number = |file: &str| group.number("memory", &format!("memory.{name}{file}"));
        Some(v1::MemoryEntry {
            usage: number("usage_in_bytes")?,
            max: number("max_usage_in_bytes").unwrap_or(0),
            failcnt: number("failcnt").unwrap_or(0),
            limit: number("limit_in_bytes").unwrap_or(0),
        })
    };
    let get = |key: &str| get(&stat, key);
    Some(v1::MemoryStat {
        cache: get("cache"),
        rss: get("rss"),
        rss_huge: get("rss_huge"),
        mapped_file: get("mapped_file"),
        dirty: get("dirty"),
        writeback: get("writeback"),
        pg_pg_in: get("pgpgin"),
        pg_pg_out: get("pgpgout"),
        pg_fault: get("pgfault"),
        pg_maj_fault: get("pgmajfault"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        hierarchical_memory_limit: get("hierarchical_memory_limit"),
        hierarchical_swap_limit: get("hierarchical_memsw_limit"),
        total_cache: get("total_cache"),
        total_rss: get("total_rss"),
        total_rss_huge: get("total_rss_huge"),
        total_mapped_file: get("total_mapped_file"),
        total_dirty: get("total_dirty"),
        total_writeback: get("total_writeback"),
        total_pg_pg_in: get("total_pgpgin"),
        total_pg_pg_out: get("total_pgpgout"),
        total_pg_fault: get("total_pgfault"),
        total_pg_maj_fault: get("total_pgmajfault"),
        total_inactive_anon: get("total_inactive_anon"),
        total_active_anon: get("total_active_anon"),
        total_inactive_file: get("total_inactive_file"),
        total_active_file: get("total_active_file"),
        total_unevictable: get("total_unevictable"),
        usage: entry(""),
        swap: entry("memsw."),
        kernel: entry("kmem."),
        kernel_tcp: entry("kmem.tcp."),
    })
}

fn blkio(group: &Cgroup) -> v1::BlkIoStat {
    // The BFQ scheduler has files of its own; without it only the throttle's count.
    let entries = |bfq: &str, throttle: &str| {
        let read = |file: &str| blkio_entries(&group.text("blkio", file).unwrap_or_default());
        let found = read(bfq);
        if found.is_empty() && !throttle.is_empty() { read(throttle) } else { found }
    };
    v1::BlkIoStat {
        io_service_bytes_recursive: entries(
            "blkio.bfq.io_service_bytes_recursive",
            "blkio.throttle.io_service_bytes_recursive",
        ),
        io_serviced_recursive: entries(
            "blkio.bfq.io_serviced_recursive",
            "blkio.throttle.io_serviced_recursive",
        ),
        io_queued_recursive: entries("blkio.bfq.io_queued_recursive", ""),
        io_service_time_recursive: entries("blkio.bfq.io_service_time_recursive", ""),
        io_wait_time_recursive: entries("blkio.bfq.io_wait_time_recursive", ""),
        io_merged_recursive: entries("blkio.bfq.io_merged_recursive", ""),
        io_time_recursive: entries("blkio.bfq.time_recursive", ""),
        sectors_recursive: entries("blkio.bfq.sectors_recursive", ""),
    }
}

/// Lines of `8:0 Read 4096`, or `8:0 4096`; the sum at the end is no device's.
fn blkio_entries(text: &str) -> Vec<v1::BlkIoEntry> {
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let (operation, value) = match (words.next()?, words.next()) {
            (operation, Some(value)) => (operation, value),
            (value, None) => ("", value),
        };
        Some(v1::BlkIoEntry {
            op: operation.to_owned(),
            device: String::new(),
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            value: value.parse().ok()?,
        })
    };
    text.lines().filter_map(entry).collect()
}

fn metrics_v2(group: &Cgroup) -> v2::Metrics {
    v2::Metrics {
        pids: group.number("pids", "pids.current").map(|current| v2::PidsStat {
            current,
            limit: group.number("pids", "pids.max").filter(|limit| *limit != u64::MAX).unwrap_or(0),
        }),
        cpu: Some(cpu_v2(group)),
        memory: memory_v2(group),
        io: Some(v2::IoStat {
            usage: io_entries(&group.text("io", "io.stat").unwrap_or_default()),
            psi: None,
        }),
        memory_events: group.folder("memory").map(|_| {
            let pairs = group.pairs("memory", "memory.events");
            v2::MemoryEvents {
                low: get(&pairs, "low"),
                high: get(&pairs, "high"),
                max: get(&pairs, "max"),
                oom: get(&pairs, "oom"),
                oom_kill: get(&pairs, "oom_kill"),
                oom_group_kill: get(&pairs, "oom_group_kill"),
            }
        }),
        ..v2::Metrics::default()
    }
}

fn cpu_v2(group: &Cgroup) -> v2::CpuStat {
    let stat = group.pairs("cpu", "cpu.stat");
    v2::CpuStat {
        usage_usec: get(&stat, "usage_usec"),
        user_usec: get(&stat, "user_usec"),
        system_usec: get(&stat, "system_usec"),
        nr_periods: get(&stat, "nr_periods"),
        nr_throttled: get(&stat, "nr_throttled"),
        throttled_usec: get(&stat, "throttled_usec"),
        nr_bursts: get(&stat, "nr_bursts"),
        burst_usec: get(&stat, "burst_usec"),
        ..v2::CpuStat::default()
    }
}

fn memory_v2(group: &Cgroup) -> Option<v2::MemoryStat> {
    let usage = group.number("memory", "memory.current")?;
    let stat = group.pairs("memory", "memory.stat");
    let number = |file: &str| group.number("memory", file).unwrap_or(0);
    let get = |key: &str| get(&stat, key);
    Some(v2::MemoryStat {
        usage,
        usage_limit: number("memory.max"),
        max_usage: number("memory.peak"),
        swap_usage: number("memory.swap.current"),
        swap_limit: number("memory.swap.max"),
        swap_max_usage: number("memory.swap.peak"),
        anon: get("anon"),
        file: get("file"),
        kernel_stack: get("kernel_stack"),
        slab: get("slab"),
        sock: get("sock"),
        shmem: get("shmem"),
        file_mapped: get("file_mapped"),
        file_dirty: get("file_dirty"),
        file_writeback: get("file_writeback"),
        anon_thp: get("anon_thp"),
        inactive_anon: get("inactive_anon"),
        active_anon: get("active_anon"),
        inactive_file: get("inactive_file"),
        active_file: get("active_file"),
        unevictable: get("unevictable"),
        slab_reclaimable: get("slab_reclaimable"),
        slab_unreclaimable: get("slab_unreclaimable"),
        pgfault: get("pgfault"),
        pgmajfault: get("pgmajfault"),
        // Split by kind since Linux 5.9.
        workingset_refault: get("workingset_refault"),
        workingset_refault_anon: get("workingset_refault_anon"),
        workingset_refault_file: get("workingset_refault_file"),
        workingset_activate: get("workingset_activate"),
        workingset_activate_anon: get("workingset_activate_anon"),
        workingset_activate_file: get("workingset_activate_file"),
        workingset_nodereclaim: get("workingset_nodereclaim"),
        pgrefill: get("pgrefill"),
        pgscan: get("pgscan"),
        pgsteal: get("pgsteal"),
        pgactivate: get("pgactivate"),
        pgdeactivate: get("pgdeactivate"),
        pglazyfree: get("pglazyfree"),
        pglazyfreed: get("pglazyfreed"),
        thp_fault_alloc: get("thp_fault_alloc"),
        thp_collapse_alloc: get("thp_collapse_alloc"),
        psi: None,
    })
}

/// Lines of `8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6`.
fn io_entries(text: &str) -> Vec<v2::IoEntry> {
    let entry = |line: &str| {
        let mut words = line.split_whitespace();
        let (major, minor) = words.next()?.split_once(':')?;
        let pairs: HashMap<String, u64> = words
            .filter_map(|word| word.split_once('='))
            .filter_map(|(key, value)| Some((key.to_owned(), value.parse().ok()?)))
            .collect();
        Some(v2::IoEntry {
            major: major.parse().ok()?,
            minor: minor.parse().ok()?,
            rbytes: get(&pairs, "rbytes"),
            wbytes: get(&pairs, "wbytes"),
            rios: get(&pairs, "rios"),
            wios: get(&pairs, "wios"),
        })
    };
    text.lines().filter_map(entry).collect()
}

fn get(pairs: &HashMap<String, u64>, key: &str) -> u64 {
    pairs.get(key).copied().unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn device_lines_of_both_versions() {
        let entries = blkio_entries("8:0 Read 4096\n8:0 Total 4096\n8:16 512\nTotal 4608\n");
        assert_eq!(entries.len(), 3);
        assert_eq!((entries[0].op.as_str(), entries[0].value), ("Read", 4096));
        assert_eq!((entries[2].op.as_str(), entries[2].minor, entries[2].value), ("", 16, 512));
        let entries = io_entries("8:0 rbytes=1 wbytes=2 rios=3 wios=4 dbytes=5 dios=6\nbroken\n");
        assert_eq!(entries.len(), 1);
        assert_eq!((entries[0].rbytes, entries[0].wios), (1, 4));
    }
}
