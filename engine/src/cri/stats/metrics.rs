//! Metrics of pods and containers, by the names that kubelets' clients know from cAdvisor.
//!
//! Invariant: whatever is told is described, with as many labels as its description has; each name stands here once.

use std::fs;

use proto::runtime::v1::{Metric, MetricDescriptor, MetricType, PsiStats, UInt64Value};

use super::network::Interface;
use super::reading::{Cpu, Disk, Memory, Reading};

/// Nanoseconds.
const SECOND: u64 = 1_000_000_000;
/// Labels of every metric, before those of its kind.
const COMMON: [&str; 5] = ["pod", "namespace", "container", "id", "image"];

/// A metric's description.
struct Kind {
    name: &'static str,
    form: MetricType,
    /// Labels beside those of all.
    labels: &'static [&'static str],
    help: &'static str,
}

macro_rules! kinds {
    ($($constant:ident $form:ident $name:literal [$($label:literal),*] $help:literal)*) => {
        $(const $constant: Kind =
            Kind { name: $name, form: MetricType::$form, labels: &[$($label),*], help: $help };)*
        const KINDS: &[&Kind] = &[$(&$constant),*];
    };
}

kinds! {
    CPU_USER Counter "container_cpu_user_seconds_total" [] "Processor time in user mode, in seconds."
    CPU_SYSTEM Counter "container_cpu_system_seconds_total" [] "Processor time in the kernel, in seconds."
    CPU_USAGE Counter "container_cpu_usage_seconds_total" [] "Processor time, in seconds."
    CPU_PERIODS Counter "container_cpu_cfs_periods_total" [] "Periods of the processor quota that have passed."
    CPU_THROTTLED Counter "container_cpu_cfs_throttled_periods_total" [] "Periods in which the processor quota was used up."
    CPU_THROTTLED_TIME Counter "container_cpu_cfs_throttled_seconds_total" [] "Time spent waiting for the next period of the processor quota, in seconds."
    MEMORY_CACHE Gauge "container_memory_cache" [] "Page cache, in bytes."
    MEMORY_RSS Gauge "container_memory_rss" [] "Anonymous memory, in bytes."
    MEMORY_KERNEL Gauge "container_memory_kernel_usage" [] "Memory that the kernel uses for it, in bytes."
    MEMORY_MAPPED Gauge "container_memory_mapped_file" [] "Files mapped into memory, in bytes."
    MEMORY_SWAP Gauge "container_memory_swap" [] "Swap in use, in bytes."
    MEMORY_FAILURES Counter "container_memory_failcnt" [] "How often memory reached its limit."
    MEMORY_USAGE Gauge "container_memory_usage_bytes" [] "All memory that is charged, page cache included, in bytes."
    MEMORY_MAX_USAGE Gauge "container_memory_max_usage_bytes" [] "The most memory that was ever charged, in bytes."
    MEMORY_WORKING_SET Gauge "container_memory_working_set_bytes" [] "Memory in use without the inactive page cache, in bytes."
    MEMORY_ACTIVE_FILE Gauge "container_memory_total_active_file_bytes" [] "Page cache that was used lately, in bytes."
    MEMORY_INACTIVE_FILE Gauge "container_memory_total_inactive_file_bytes" [] "Page cache that was not used lately, in bytes."
    MEMORY_FAULTS Counter "container_memory_failures_total" ["failure_type", "scope"] "Page faults: all, and those that had to wait for a disk."
    OOM_EVENTS Counter "container_oom_events_total" [] "Processes that the kernel ended for want of memory."
    HUGE_USAGE Gauge "container_hugetlb_usage_bytes" ["pagesize"] "Huge pages in use, in bytes."
    HUGE_MAX_USAGE Gauge "container_hugetlb_max_usage_bytes" ["pagesize"] "The most huge pages that were ever in use, in bytes."
    NETWORK_RX_BYTES Counter "container_network_receive_bytes_total" ["interface"] "Bytes received."
    NETWORK_RX_PACKETS Counter "container_network_receive_packets_total" ["interface"] "Packets received."
    NETWORK_RX_DROPPED Counter "container_network_receive_packets_dropped_total" ["interface"] "Packets dropped on the way in."
    NETWORK_RX_ERRORS Counter "container_network_receive_errors_total" ["interface"] "Errors in receiving."
    NETWORK_TX_BYTES Counter "container_network_transmit_bytes_total" ["interface"] "Bytes sent."
    NETWORK_TX_PACKETS Counter "container_network_transmit_packets_total" ["interface"] "Packets sent."
    NETWORK_TX_DROPPED Counter "container_network_transmit_packets_dropped_total" ["interface"] "Packets dropped on the way out."
    NETWORK_TX_ERRORS Counter "container_network_transmit_errors_total" ["interface"] "Errors in sending."
    FS_INODES_FREE Gauge "container_fs_inodes_free" ["device"] "Inodes that the file system of the container's writable layer has left."
    FS_INODES Gauge "container_fs_inodes_total" ["device"] "Inodes that the file system of the container's writable layer has."
    FS_LIMIT Gauge "container_fs_limit_bytes" ["device"] "Size of the file system of the container's writable layer, in bytes."
    FS_USAGE Gauge "container_fs_usage_bytes" ["device"] "What the container's writable layer takes, in bytes."
    FS_READ_BYTES Counter "container_fs_reads_bytes_total" ["device"] "Bytes read from the device."
    FS_READS Counter "container_fs_reads_total" ["device"] "Reads from the device."
    FS_WRITE_BYTES Counter "container_fs_writes_bytes_total" ["device"] "Bytes written to the device."
    FS_WRITES Counter "container_fs_writes_total" ["device"] "Writes to the device."
    BLKIO Counter "container_blkio_device_usage_total" ["device", "major", "minor", "operation"] "Bytes that went to or from the device, by kind of operation."
    PROCESSES Gauge "container_processes" [] "Processes that run."
    DESCRIPTORS Gauge "container_file_descriptors" [] "Open descriptors of all processes."
    SOCKETS Gauge "container_sockets" [] "Open sockets of all processes."
    THREADS_MAX Gauge "container_threads_max" [] "The most threads that are allowed; 0 for no limit."
    THREADS Gauge "container_threads" [] "Threads that run."
    ULIMITS Gauge "container_ulimits_soft" ["ulimit"] "Soft limits of the first process."
    CPU_WAITING Counter "container_pressure_cpu_waiting_seconds_total" [] "Time in which some process waited for a processor, in seconds."
    CPU_STALLED Counter "container_pressure_cpu_stalled_seconds_total" [] "Time in which all processes waited for a processor, in seconds."
    MEMORY_WAITING Counter "container_pressure_memory_waiting_seconds_total" [] "Time in which some process waited for memory, in seconds."
    MEMORY_STALLED Counter "container_pressure_memory_stalled_seconds_total" [] "Time in which all processes waited for memory, in seconds."
    IO_WAITING Counter "container_pressure_io_waiting_seconds_total" [] "Time in which some process waited for a device, in seconds."
    IO_STALLED Counter "container_pressure_io_stalled_seconds_total" [] "Time in which all processes waited for a device, in seconds."
    LAST_SEEN Gauge "container_last_seen" [] "When it was looked at, in seconds since 1970."
    START_TIME Gauge "container_start_time_seconds" [] "When it was started, in seconds since 1970."
    SPEC_CPU_PERIOD Gauge "container_spec_cpu_period" [] "Length of a period of the processor quota, in microseconds."
    SPEC_CPU_QUOTA Gauge "container_spec_cpu_quota" [] "Processor time in each period, in microseconds; not told where it is not limited."
    SPEC_CPU_SHARES Gauge "container_spec_cpu_shares" [] "Its share of the processors, against others' shares."
    SPEC_MEMORY Gauge "container_spec_memory_limit_bytes" [] "Limit of memory, in bytes; 0 for none."
    SPEC_RESERVATION Gauge "container_spec_memory_reservation_limit_bytes" [] "Memory that is spared when memory is short, in bytes; 0 for none."
    SPEC_SWAP Gauge "container_spec_memory_swap_limit_bytes" [] "Limit of memory and swap together, in bytes; 0 for none."
}

/// What metrics there are.
pub(super) fn descriptors() -> Vec<MetricDescriptor> {
    let describe = |kind: &&Kind| MetricDescriptor {
        name: kind.name.to_owned(),
        help: kind.help.to_owned(),
        label_keys: COMMON.iter().chain(kind.labels).map(|label| (*label).to_owned()).collect(),
    };
    KINDS.iter().map(describe).collect()
}

/// The metrics of one pod or container, as they come together.
pub(super) struct Told {
    at: i64,
    labels: [String; COMMON.len()],
    metrics: Vec<Metric>,
}

/// A container's writable layer and the file system that it is on.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Filesystem {
    /// Unset as long as it has not been measured.
    pub usage: Option<u64>,
    pub limit: u64,
    pub inodes: u64,
    pub inodes_free: u64,
}

impl Told {
    /// Nothing yet. The labels are those that all metrics have, in their order; the time is Unix nanoseconds.
    pub(super) fn new(at: i64, labels: [&str; COMMON.len()]) -> Self {
        Told { at, labels: labels.map(str::to_owned), metrics: Vec::new() }
    }

    /// All of them.
    pub(super) fn metrics(self) -> Vec<Metric> {
        self.metrics
    }

    fn put(&mut self, kind: &Kind, labels: &[&str], value: u64) {
        debug_assert_eq!(kind.labels.len(), labels.len(), "{}", kind.name);
        let more = labels.iter().map(|label| (*label).to_owned());
        self.metrics.push(Metric {
            name: kind.name.to_owned(),
            timestamp: self.at,
            metric_type: kind.form.into(),
            label_values: self.labels.iter().cloned().chain(more).collect(),
            value: Some(UInt64Value { value }),
        });
    }

    fn put_all(&mut self, values: &[(&Kind, u64)]) {
        values.iter().for_each(|(kind, value)| self.put(kind, &[], *value));
    }

    /// What its group has used.
    pub(super) fn reading(&mut self, reading: &Reading) {
        if let Some(cpu) = &reading.cpu {
            self.cpu(cpu);
        }
        if let Some(memory) = &reading.memory {
            self.memory(memory);
        }
        if let Some(kills) = reading.oom_kills {
            self.put(&OOM_EVENTS, &[], kills);
        }
        for huge in &reading.huge {
            self.put(&HUGE_USAGE, &[&huge.size], huge.usage);
            if let Some(max) = huge.max_usage {
                self.put(&HUGE_MAX_USAGE, &[&huge.size], max);
            }
        }
        reading.disks.iter().for_each(|disk| self.disk(disk));
        if let Some(threads) = reading.threads {
            self.put(&THREADS, &[], threads);
            self.put(&THREADS_MAX, &[], reading.threads_max.unwrap_or(0));
        }
        self.pressure(reading.cpu_pressure.as_ref(), [&CPU_WAITING, &CPU_STALLED]);
        self.pressure(reading.memory_pressure.as_ref(), [&MEMORY_WAITING, &MEMORY_STALLED]);
        self.pressure(reading.io_pressure.as_ref(), [&IO_WAITING, &IO_STALLED]);
        let limits = &reading.limits;
        let memory = reading.memory.and_then(|memory| memory.limit);
        for (kind, value) in [
            (&SPEC_CPU_PERIOD, limits.period),
            (&SPEC_CPU_QUOTA, limits.quota),
            (&SPEC_CPU_SHARES, limits.shares),
            (&SPEC_MEMORY, Some(memory.unwrap_or(0))),
            (&SPEC_RESERVATION, Some(limits.reservation.unwrap_or(0))),
            (&SPEC_SWAP, Some(limits.memory_and_swap.unwrap_or(0))),
        ] {
            if let Some(value) = value {
                self.put(kind, &[], value);
            }
        }
    }

    fn cpu(&mut self, cpu: &Cpu) {
        self.put_all(&[
            (&CPU_USER, cpu.user / SECOND),
            (&CPU_SYSTEM, cpu.system / SECOND),
            (&CPU_USAGE, cpu.total / SECOND),
            (&CPU_PERIODS, cpu.periods),
            (&CPU_THROTTLED, cpu.throttled_periods),
            (&CPU_THROTTLED_TIME, cpu.throttled / SECOND),
        ]);
    }

    fn memory(&mut self, memory: &Memory) {
        self.put_all(&[
            (&MEMORY_CACHE, memory.cache),
            (&MEMORY_RSS, memory.rss),
            (&MEMORY_KERNEL, memory.kernel),
            (&MEMORY_MAPPED, memory.mapped),
            (&MEMORY_SWAP, memory.swap),
            (&MEMORY_FAILURES, memory.failures),
            (&MEMORY_USAGE, memory.usage),
            (&MEMORY_MAX_USAGE, memory.max_usage),
            (&MEMORY_WORKING_SET, memory.working_set()),
            (&MEMORY_ACTIVE_FILE, memory.active_file),
            (&MEMORY_INACTIVE_FILE, memory.inactive_file),
        ]);
        for (kind, faults) in [("pgfault", memory.faults), ("pgmajfault", memory.major_faults)] {
            for (scope, faults) in ["container", "hierarchy"].into_iter().zip(faults) {
                self.put(&MEMORY_FAULTS, &[kind, scope], faults);
            }
        }
    }

    fn disk(&mut self, disk: &Disk) {
        let (major, minor) = (disk.major.to_string(), disk.minor.to_string());
        let device = device(&major, &minor);
        for (kind, value) in [
            (&FS_READ_BYTES, disk.read_bytes),
            (&FS_READS, disk.reads),
            (&FS_WRITE_BYTES, disk.write_bytes),
            (&FS_WRITES, disk.writes),
        ] {
            self.put(kind, &[&device], value);
        }
        for (operation, bytes) in &disk.operations {
            self.put(&BLKIO, &[&device, &major, &minor, operation], *bytes);
        }
    }

    fn pressure(&mut self, pressure: Option<&PsiStats>, [waiting, stalled]: [&Kind; 2]) {
        let Some(pressure) = pressure else { return };
        for (kind, data) in [(waiting, &pressure.some), (stalled, &pressure.full)] {
            if let Some(data) = data {
                self.put(kind, &[], data.total / SECOND);
            }
        }
    }

    /// The interfaces of its network.
    pub(super) fn network(&mut self, interfaces: &[Interface]) {
        for interface in interfaces {
            for (kind, value) in [
                (&NETWORK_RX_BYTES, interface.rx.bytes),
                (&NETWORK_RX_PACKETS, interface.rx.packets),
                (&NETWORK_RX_DROPPED, interface.rx.dropped),
                (&NETWORK_RX_ERRORS, interface.rx.errors),
                (&NETWORK_TX_BYTES, interface.tx.bytes),
                (&NETWORK_TX_PACKETS, interface.tx.packets),
                (&NETWORK_TX_DROPPED, interface.tx.dropped),
                (&NETWORK_TX_ERRORS, interface.tx.errors),
            ] {
                self.put(kind, &[&interface.name], value);
            }
        }
    }

    /// Its processes, and their open descriptors and sockets.
    pub(super) fn processes(&mut self, processes: usize, (descriptors, sockets): (u64, u64)) {
        self.put_all(&[(&PROCESSES, processes as u64), (&DESCRIPTORS, descriptors), (&SOCKETS, sockets)]);
    }

    /// When it was started, in Unix nanoseconds; and that it was seen.
    pub(super) fn seen(&mut self, started_at: i64) {
        let seconds = |at: i64| u64::try_from(at).unwrap_or(0) / SECOND;
        self.put_all(&[(&LAST_SEEN, seconds(self.at)), (&START_TIME, seconds(started_at))]);
    }

    /// The soft limits of its first process, by their names.
    pub(super) fn ulimits<'a>(&mut self, limits: impl Iterator<Item = (&'a str, u64)>) {
        limits.for_each(|(name, soft)| self.put(&ULIMITS, &[name], soft));
    }

    /// Its writable layer.
    pub(super) fn filesystem(&mut self, filesystem: &Filesystem) {
        const ROOT: &[&str] = &["/"];
        if let Some(usage) = filesystem.usage {
            self.put(&FS_USAGE, ROOT, usage);
        }
        self.put(&FS_LIMIT, ROOT, filesystem.limit);
        self.put(&FS_INODES, ROOT, filesystem.inodes);
        self.put(&FS_INODES_FREE, ROOT, filesystem.inodes_free);
    }
}

/// The device's file, or its numbers where it has none any more.
fn device(major: &str, minor: &str) -> String {
    let uevent = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/uevent")).unwrap_or_default();
    match uevent.lines().find_map(|line| line.strip_prefix("DEVNAME=")) {
        Some(name) => format!("/dev/{name}"),
        None => format!("{major}:{minor}"),
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proto::runtime::v1::PsiData;

    use super::super::reading::{Huge, Limits};
    use super::*;

    #[test]
    fn what_is_told_is_described_and_what_is_described_is_told() {
        let psi = || {
            let data = PsiData { total: 2 * SECOND, ..PsiData::default() };
            Some(PsiStats { some: Some(data), full: Some(data) })
        };
        let mut told = Told::new(5 * SECOND as i64, ["p", "n", "c", "i", "m"]);
        told.reading(&Reading {
            cpu: Some(Cpu { total: 3 * SECOND + 1, ..Cpu::default() }),
            memory: Some(Memory { usage: 10, inactive_file: 12, ..Memory::default() }),
            oom_kills: Some(0),
            disks: vec![Disk { major: 4095, operations: vec![("Read".into(), 7)], ..Disk::default() }],
            huge: vec![Huge { size: "2MB".into(), usage: 1, max_usage: Some(2) }],
            threads: Some(4),
            threads_max: None,
            limits: Limits {
                period: Some(1),
                quota: Some(1),
                shares: Some(1),
                reservation: None,
                memory_and_swap: None,
            },
            cpu_pressure: psi(),
            memory_pressure: psi(),
            io_pressure: psi(),
        });
        told.network(&[Interface { name: "eth0".into(), ..Interface::default() }]);
        told.processes(2, (9, 1));
        told.seen(SECOND as i64);
        told.ulimits([("RLIMIT_NOFILE", 1024)].into_iter());
        told.filesystem(&Filesystem { usage: Some(1), ..Filesystem::default() });
        let metrics = told.metrics();
        let described = descriptors();
        for metric in &metrics {
            let kind = described.iter().find(|kind| kind.name == metric.name).expect(&metric.name);
            assert_eq!(kind.label_keys.len(), metric.label_values.len(), "{}", kind.name);
            assert_eq!(metric.timestamp, 5 * SECOND as i64);
        }
        let names = |names: Vec<&String>| names.into_iter().cloned().collect::<BTreeSet<_>>();
        assert_eq!(
            names(metrics.iter().map(|metric| &metric.name).collect()),
            names(described.iter().map(|kind| &kind.name).collect())
        );
        assert_eq!(described.len(), KINDS.len());
        let value = |name: &str| {
            metrics.iter().find(|metric| metric.name == name).and_then(|metric| metric.value).unwrap().value
        };
        assert_eq!(value("container_cpu_usage_seconds_total"), 3);
        assert_eq!(value("container_memory_working_set_bytes"), 0, "never less");
        assert_eq!(value("container_threads_max"), 0);
        assert_eq!(value("container_pressure_io_stalled_seconds_total"), 2);
        let disk = metrics.iter().find(|metric| metric.name == "container_blkio_device_usage_total").unwrap();
        assert_eq!(disk.label_values[5..], ["4095:0", "4095", "0", "Read"]);
    }
}
