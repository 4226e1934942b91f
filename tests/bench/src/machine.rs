//! What the figures were taken on: told in the report, as they mean nothing elsewhere.

use std::fs;
use std::path::Path;

/// The machine and the programs, as pairs of what and which.
pub(crate) fn about(folder: &Path) -> Vec<(String, String)> {
    let read = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let field = |text: &str, key: &str, separator: char| {
        let value = text.lines().find_map(|line| line.strip_prefix(key)?.split_once(separator));
        value.map(|(_, value)| value.trim().trim_matches('"').to_owned()).unwrap_or_else(|| "unknown".into())
    };
    let cores = std::thread::available_parallelism().map_or(0, usize::from);
    let memory = field(&read("/proc/meminfo"), "MemTotal", ':');
    let memory = memory
        .trim_end_matches(" kB")
        .parse::<u64>()
        .map_or(memory.clone(), |kib| format!("{} MiB", kib / 1024));
    let mut about = vec![
        (
            "processor".to_owned(),
            format!("{cores} cores, {}", field(&read("/proc/cpuinfo"), "model name", ':')),
        ),
        ("memory".to_owned(), memory),
        ("kernel".to_owned(), read("/proc/sys/kernel/osrelease").trim().to_owned()),
        ("system".to_owned(), field(&read("/etc/os-release"), "PRETTY_NAME", '=')),
        ("file system beneath".to_owned(), file_system(&read("/proc/self/mountinfo"), folder)),
        ("load before the first case".to_owned(), read("/proc/loadavg").split(' ').take(1).collect()),
    ];
    let unpigz = if crate::peers::unpigz() {
        "installed: containerd is measured with and without it"
    } else {
        "not installed, so containerd decompresses by itself"
    };
    about.push(("unpigz".to_owned(), unpigz.to_owned()));
    let runc = std::process::Command::new(harness::host::RUNC).arg("--version").output();
    let runc =
        runc.map(|output| String::from_utf8_lossy(&output.stdout).lines().next().unwrap_or("").to_owned());
    about.push(("runtime of both engines".to_owned(), runc.unwrap_or_default()));
    about
}

/// The kind and options of the file system that holds a folder: the longest mount point above it.
fn file_system(mounts: &str, folder: &Path) -> String {
    let of = |line: &str| {
        let (left, right) = line.split_once(" - ")?;
        let mut left = left.split(' ').skip(4);
        let (point, options) = (left.next()?.to_owned(), left.next()?.to_owned());
        folder.starts_with(&point).then(|| {
            let kind = right.split(' ').next().unwrap_or_default();
            (point.len(), format!("{kind} ({options})"))
        })
    };
    mounts.lines().filter_map(of).max().map_or_else(|| "unknown".into(), |(_, found)| found)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_system_is_that_of_the_nearest_mount() {
        let mounts = "1 0 8:1 / / rw,relatime - ext4 /dev/a rw\n2 1 8:2 / /data rw - xfs /dev/b rw\n";
        assert_eq!(file_system(mounts, Path::new("/data/x")), "xfs (rw)");
        assert_eq!(file_system(mounts, Path::new("/dat")), "ext4 (rw,relatime)");
    }
}
