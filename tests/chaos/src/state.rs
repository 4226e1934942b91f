//! What an engine has, as its clients see it and as its folders do: compared before and after a case.

use std::collections::BTreeSet;
use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use harness::client::Ctr;
use harness::host::Host;
use harness::registry::{abandon, collect};

/// How long the last of what was removed may take to go.
const LIMIT: Duration = Duration::from_secs(30);

/// Everything that is there, one line each.
pub(crate) type State = BTreeSet<String>;

/// What is there and stays: what a client has left for the next collection, such as the index of an archive that it imported, is
/// taken away before.
pub(crate) fn before(host: &Host, ctr: &Ctr) -> State {
    ctr.ok(&["gc"]);
    of(host, ctr)
}

/// What is there now.
fn of(host: &Host, ctr: &Ctr) -> State {
    let mut state = State::new();
    let lists: [(&str, &[&str]); 6] = [
        ("image", &["images", "ls", "-q"]),
        ("container", &["containers", "ls", "-q"]),
        ("task", &["tasks", "ls", "-q"]),
        ("blob", &["content", "ls", "-q"]),
        ("lease", &["leases", "ls", "-q"]),
        ("ingest", &["content", "active"]),
    ];
    for (kind, arguments) in lists {
        let lines = ctr.ok(arguments);
        let skipped = usize::from(kind == "ingest");
        state.extend(lines.lines().skip(skipped).map(|line| format!("{kind} {line}")));
    }
    let snapshots = ctr.ok(&["snapshots", "ls"]);
    let keys = snapshots.lines().skip(1).filter_map(|line| line.split_whitespace().next());
    state.extend(keys.map(|key| format!("snapshot {key}")));
    let root = host.root();
    let content = root.join("io.containerd.content.v1.content");
    state.extend(names(&content.join("blobs/sha256")).map(|name| format!("file of blob {name}")));
    state.extend(names(&content.join("ingest")).map(|_| "file of ingest".to_owned()));
    state.extend(names(&content.join("removed")).map(|name| format!("file of removed blob {name}")));
    // Their numbers are never the same.
    let folders = names(&root.join("io.containerd.snapshotter.v1.overlayfs/snapshots")).count();
    state.insert(format!("{folders} folders of snapshots"));
    for (kind, of) in [("bundle", host.state()), ("work folder", root)] {
        for runtime in ["io.containerd.runtime.v2.task", "io.containerd.sandbox.controller.v1.shim"] {
            for namespace in names(&of.join(runtime)) {
                let found = names(&of.join(runtime).join(&namespace));
                state.extend(found.map(|name| format!("{kind} {namespace}/{name}")));
            }
        }
    }
    state
}

fn names(folder: &Path) -> impl Iterator<Item = String> + use<> {
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries.map(|entry| entry.file_name().to_string_lossy().into_owned())
}

/// Waits until there is what there was, and nothing else, after what interrupted calls may leave for a day has been taken away.
pub(crate) fn assert_back(host: &Host, ctr: &Ctr, before: &State) {
    let end = Instant::now() + LIMIT;
    loop {
        if ctr.namespace == host.namespace {
            abandon(host);
            collect(host);
        }
        ctr.ok(&["gc"]);
        let now = of(host, ctr);
        if now == *before {
            return;
        }
        let new: Vec<_> = now.difference(before).collect();
        let lost: Vec<_> = before.difference(&now).collect();
        assert!(Instant::now() < end, "left: {new:#?}\nlost: {lost:#?}");
        std::thread::sleep(Duration::from_millis(50));
    }
}
