//! The check that nothing is left on the host: processes, mounts, loop devices, cgroups, the runtime's state.

use std::fs;
use std::path::{Path, PathBuf};

/// Processes whose command line or working folder names `folder`: shims and engines of it. With their command lines.
pub fn processes(folder: &Path) -> Vec<(i32, String)> {
    let name = folder.to_str().unwrap();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc").unwrap().flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|pid| pid.parse::<i32>().ok()) else { continue };
        let command = fs::read(entry.path().join("cmdline")).unwrap_or_default();
        let command = String::from_utf8_lossy(&command).replace('\0', " ");
        let cwd = fs::read_link(entry.path().join("cwd")).unwrap_or_default();
        if pid != std::process::id() as i32 && (command.contains(name) || cwd.starts_with(folder)) {
            found.push((pid, command));
        }
    }
    found
}

/// Mount points beneath `folder`.
pub fn mounts(folder: &Path) -> Vec<String> {
    let table = fs::read_to_string("/proc/self/mountinfo").unwrap();
    let name = folder.to_str().unwrap();
    table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|point| point.starts_with(name))
        .map(str::to_owned)
        .collect()
}

/// Loop devices of files beneath `folder`, with the file.
pub fn loop_devices(folder: &Path) -> Vec<String> {
    let devices = fs::read_dir("/sys/block").unwrap().flatten().map(|entry| entry.path());
    devices
        .filter_map(|device| Some((fs::read_to_string(device.join("loop/backing_file")).ok()?, device)))
        .filter(|(file, _)| Path::new(file.trim()).starts_with(folder))
        .map(|(file, device)| format!("{}: {}", device.file_name().unwrap().display(), file.trim()))
        .collect()
}

/// Containers' cgroups in a namespace: the folders beneath `/NAMESPACE` of each hierarchy.
pub fn cgroups(namespace: &str) -> Vec<PathBuf> {
    let children = |folder: &Path| -> Vec<PathBuf> {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        entries.filter(|entry| entry.path().is_dir()).map(|entry| entry.path()).collect()
    };
    let top = Path::new("/sys/fs/cgroup");
    let mut hierarchies = children(top);
    hierarchies.push(top.to_owned());
    hierarchies.iter().flat_map(|hierarchy| children(&hierarchy.join(namespace))).collect()
}

/// Removes the empty parents that runc leaves of a namespace's cgroups and states, as it does under any engine.
pub fn remove_empty_parents(namespace: &str) {
    let _ = fs::remove_dir(Path::new("/run/containerd/runc").join(namespace));
    for hierarchy in fs::read_dir("/sys/fs/cgroup").unwrap().flatten() {
        let _ = fs::remove_dir(hierarchy.path().join(namespace));
    }
    let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(namespace));
}

/// What runc knows of a namespace's containers.
pub fn runtime_state(namespace: &str) -> Vec<PathBuf> {
    let folder = Path::new("/run/containerd/runc").join(namespace);
    fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path()).collect()
}

/// Where the shims of an engine listen, as its bundles say.
pub fn shim_sockets(state: &Path) -> Vec<PathBuf> {
    let children =
        |folder: PathBuf| fs::read_dir(folder).into_iter().flatten().flatten().map(|entry| entry.path());
    let bundles = children(state.to_owned()).flat_map(children).flat_map(children);
    let addresses = bundles.filter_map(|bundle| fs::read_to_string(bundle.join("address")).ok());
    addresses.filter_map(|address| address.trim().strip_prefix("unix://").map(PathBuf::from)).collect()
}

/// Everything that is left of an engine in `folder` whose containers were in `namespace`, one line each.
pub fn behind(folder: &Path, namespace: &str) -> Vec<String> {
    let mut left = Vec::new();
    left.extend(processes(folder).into_iter().map(|(pid, command)| format!("process {pid}: {command}")));
    left.extend(mounts(folder).into_iter().map(|mount| format!("mount {mount}")));
    left.extend(loop_devices(folder).into_iter().map(|device| format!("loop device {device}")));
    left.extend(cgroups(namespace).into_iter().map(|cgroup| format!("cgroup {}", cgroup.display())));
    left.extend(
        runtime_state(namespace).into_iter().map(|state| format!("runtime state {}", state.display())),
    );
    left
}
