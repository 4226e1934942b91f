//! What runc keeps of a container: `<root>/<id>/state.json`, which names its control groups.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, File};
use std::io::{self, BufReader};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Deserialize;

/// How long a control group is waited for that still counts a process which has exited, each time longer.
const PAUSES: [Duration; 3] = [Duration::from_millis(1), Duration::from_millis(2), Duration::from_millis(4)];

/// The part of runc's state that says what there is. The names are runc's, since 1.0; those of other runtimes are others.
#[derive(Deserialize)]
struct State {
    rootless: bool,
    intel_rdt_path: String,
    /// By controller.
    cgroup_paths: BTreeMap<String, PathBuf>,
}

/// Removes the control groups of a container that has no process left, and then its folder. False when runc keeps more of it than
/// these. Blocks.
///
/// # Errors
/// Those of reading the state, and of the removal of a control group that has processes or groups in it: the folder stays.
pub(super) fn remove(folder: &Path) -> io::Result<bool> {
    let state: State = serde_json::from_reader(BufReader::new(File::open(folder.join("state.json"))?))?;
    if state.rootless || !state.intel_rdt_path.is_empty() || state.cgroup_paths.is_empty() {
        return Ok(false);
    }
    // Controllers that are mounted together share one.
    let groups: BTreeSet<PathBuf> = state.cgroup_paths.into_values().collect();
    groups.iter().try_for_each(|group| remove_group(group))?;
    sys::failpoint!("shim.delete.groups");
    fs::remove_dir_all(folder)?;
    Ok(true)
}

fn remove_group(group: &Path) -> io::Result<()> {
    let mut pauses = PAUSES.iter();
    loop {
        match fs::remove_dir(group) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
            Err(error) if error.kind() == io::ErrorKind::ResourceBusy => match pauses.next() {
                Some(pause) => std::thread::sleep(*pause),
                None => return Err(error),
            },
            removed => return removed,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_go_before_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let [folder, one, two] = ["folder", "one", "two"].map(|name| dir.path().join(name));
        for path in [&folder, &one, &two] {
            fs::create_dir(path).unwrap();
        }
        let write = |rootless: bool, resctrl: &str| {
            let state = serde_json::json!({
                "id": "c", "config": {"hooks": {}}, "rootless": rootless, "intel_rdt_path": resctrl,
                "cgroup_paths": {"cpu": &one, "cpuacct": &one, "memory": &two, "pids": dir.path().join("gone")},
            });
            fs::write(folder.join("state.json"), state.to_string()).unwrap();
        };
        for (rootless, resctrl) in [(true, ""), (false, "/sys/fs/resctrl/c")] {
            write(rootless, resctrl);
            assert!(!remove(&folder).unwrap());
        }
        write(false, "");
        // A group that is in use has its folder stay, for runc to try.
        fs::create_dir(two.join("beneath")).unwrap();
        assert!(remove(&folder).is_err());
        assert!(folder.join("state.json").exists() && two.exists());
        fs::remove_dir(two.join("beneath")).unwrap();
        assert!(remove(&folder).unwrap());
        assert!(!one.exists() && !two.exists() && !folder.exists());
        assert_eq!(remove(&folder).unwrap_err().kind(), io::ErrorKind::NotFound);
    }

    #[test]
    fn states_of_other_runtimes_are_left_to_them() {
        let dir = tempfile::tempdir().unwrap();
        for state in ["", "{}", r#"{"ociVersion": "1.0.2", "id": "c", "status": "stopped", "pid": 1}"#] {
            fs::write(dir.path().join("state.json"), state).unwrap();
            assert!(remove(dir.path()).is_err(), "{state}");
        }
        assert!(dir.path().exists());
    }
}
