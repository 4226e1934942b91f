//! Failpoints as sys/src/failpoints.rs has them: which are passed, and which kills.

use std::collections::BTreeMap;
use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU32, Ordering};

/// The variable that names the folder of failpoints.
pub(crate) const VARIABLE: &str = "GANTRY_FAILPOINTS";

/// A point, and which time it is passed.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Point {
    pub(crate) name: String,
    pub(crate) count: u32,
}

impl Point {
    /// Whether it is a shim's, and not the engine's.
    pub(crate) fn is_of_shim(&self) -> bool {
        self.name.starts_with("shim.")
    }
}

/// What happens at an armed point.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Action {
    Kill,
    Stop,
}

/// The folder of failpoints, this program's own.
pub(crate) fn folder() -> PathBuf {
    std::env::var_os(VARIABLE).unwrap().into()
}

/// The points that are passed while this runs, in their order, each time counted for its process.
pub(crate) fn traced(work: impl FnOnce()) -> Vec<Point> {
    let trace = folder().join("trace");
    fs::write(&trace, "").unwrap();
    work();
    let text = fs::read_to_string(&trace).unwrap();
    fs::remove_file(&trace).unwrap();
    let mut passed: BTreeMap<(&str, &str), u32> = BTreeMap::new();
    let mut points = Vec::new();
    for (pid, name) in text.lines().filter_map(|line| line.split_once(' ')) {
        let count = passed.entry((pid, name)).or_default();
        *count += 1;
        let point = Point { name: name.to_owned(), count: *count };
        if !points.contains(&point) {
            points.push(point);
        }
    }
    points
}

/// Lets the next process that comes there die, or stand still.
pub(crate) fn arm(point: &Point, action: Action) {
    static TOKEN: AtomicU32 = AtomicU32::new(0);
    disarm();
    let action = match action {
        Action::Kill => "kill",
        Action::Stop => "stop",
    };
    let token = TOKEN.fetch_add(1, Ordering::Relaxed);
    let (new, armed) = (folder().join("new"), folder().join("armed"));
    fs::write(&new, format!("{} {} {action} {token}\n", point.name, point.count)).unwrap();
    fs::rename(new, armed).unwrap();
}

/// Whether a process came there.
pub(crate) fn fired() -> bool {
    folder().join("fired").exists()
}

/// Lets all points pass.
pub(crate) fn disarm() {
    for name in ["armed", "fired"] {
        let _ = fs::remove_file(folder().join(name));
    }
}
