//! The cases: what is done, on what, how often, and the marks that are to be reached.
//!
//! A case is a function that does its work once on one running engine and answers the samples it took. Around it, `main`
//! starts the engines in turn. A new case is a line in [`ALL`] and a function in a module here.

use std::path::Path;

use anyhow::Result;

use crate::image::Image;
use crate::measure::{Measure, Sample};
use crate::peers::Engine;
use crate::registry::Registry;

mod api;
mod containers;
mod floor;
mod images;
mod pods;
mod records;
mod tasks;

/// What a case has to do its work with.
pub(crate) struct Bench<'a> {
    pub(crate) image: &'a Image,
    /// The registry that has the image.
    pub(crate) registry: &'a Registry,
    /// Whether little time is to be spent.
    pub(crate) quick: bool,
}

/// What a mark compares with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Against {
    Containerd,
    Floor,
    /// Nothing: the figure itself is what counts.
    Itself,
}

/// What a mark asks of the ratio, or of the figure itself.
#[derive(Debug, Clone, Copy, PartialEq)]
pub(crate) enum Limit {
    AtMost(f64),
    AtLeast(f64),
}

/// A figure that is looked at: a measure of work of a size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(crate) struct Point {
    pub(crate) measure: Measure,
    /// 0 where sizes do not vary.
    pub(crate) size: usize,
}

/// A ratio of medians, or a median, that gantryd has to reach.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Mark {
    pub(crate) point: Point,
    pub(crate) against: Against,
    pub(crate) limit: Limit,
}

/// A case's work, on an engine.
pub(crate) type Work = fn(&Bench<'_>, &Engine) -> Result<Vec<Sample>>;
/// The least that it can cost, in a folder.
type Floor = fn(&Bench<'_>, &Path) -> Result<Vec<Sample>>;

/// A case.
pub(crate) struct Case {
    /// What `--filter` looks at, and the plot's file name.
    pub(crate) name: &'static str,
    pub(crate) title: &'static str,
    /// What is done and what is not counted, for the report.
    pub(crate) about: &'static str,
    /// What sizes count, where they vary.
    pub(crate) sizes: &'static str,
    /// Whether the engines serve a kubelet.
    pub(crate) pods: bool,
    /// How often each engine does it.
    pub(crate) rounds: usize,
    /// Whether there is a round before those that count: not where a round is long and takes many samples.
    pub(crate) warm_up: bool,
    pub(crate) marks: &'static [Mark],
    pub(crate) run: Work,
    /// The same on dockerd, if it can be compared.
    pub(crate) docker: Option<Work>,
    /// What this program does itself, to compare with.
    pub(crate) floor: Option<Floor>,
}

impl Case {
    /// How a figure of this case is called.
    pub(crate) fn name_of(&self, point: Point) -> String {
        match self.sizes {
            "" => point.measure.title().to_owned(),
            of => format!("{} at {} {of}", point.measure.title(), point.size),
        }
    }
}

const fn mark(measure: Measure, at_most: f64) -> Mark {
    mark_at(measure, 0, Limit::AtMost(at_most))
}

const fn mark_at(measure: Measure, size: usize, limit: Limit) -> Mark {
    Mark { point: Point { measure, size }, against: Against::Containerd, limit }
}

/// What most cases have in common.
const CASE: Case = Case {
    name: "",
    title: "",
    about: "",
    sizes: "",
    pods: false,
    rounds: 3,
    warm_up: true,
    marks: &[],
    run: tasks::run_true,
    docker: None,
    floor: None,
};

const PULL: [Mark; 4] = [
    mark(Measure::Wall, 0.5),
    mark(Measure::Cpu, 0.6),
    mark(Measure::Peak, 0.5),
    mark(Measure::PeakBoth, 0.5),
];

/// All of them, in the order of the report.
pub(crate) const ALL: [Case; 21] = [
    Case {
        name: "pull-gzip",
        title: "Pull and unpack, gzip",
        about: "`ctr images pull` of the image from a docker-registry on loopback into an empty engine, until it is unpacked.",
        rounds: 5,
        marks: &PULL,
        run: images::pull_gzip,
        ..CASE
    },
    Case {
        name: "pull-zstd",
        title: "Pull and unpack, zstd",
        about: "The same image with layers in zstd.",
        rounds: 5,
        marks: &PULL,
        run: images::pull_zstd,
        ..CASE
    },
    Case {
        name: "unpack-layer",
        title: "Unpack one gzip layer",
        about: "The image's largest layer, already in the content store, into a snapshot: Prepare, Apply and Commit over the API \
                by one client that is connected already. The floor is the work that nobody gets around, done one after the \
                other by one thread: the layer through the decompressor that gantryd has, into /dev/null; then its tree from \
                memory (folders, files created with their mode and written at once, links, times; no owners, no attributes). \
                gantryd answers when the layer is on disk, Debian's containerd before that. So the mark compares the times \
                until on disk, which for all three end with a sync of the file system; the wall time of the floor is without it.",
        rounds: 5,
        marks: &[Mark {
            point: Point { measure: Measure::Synced, size: 0 },
            against: Against::Floor,
            limit: Limit::AtMost(1.3),
        }],
        run: floor::unpack,
        floor: Some(floor::floor),
        ..CASE
    },
    Case {
        name: "import",
        title: "Import and unpack an archive",
        about: "`ctr images import` of the image as `docker save` writes it, layers uncompressed.",
        run: images::import,
        ..CASE
    },
    Case {
        name: "export",
        title: "Export an archive",
        about: "`ctr images export` of the imported image into a file.",
        run: images::export,
        ..CASE
    },
    Case {
        name: "push",
        title: "Push",
        about: "`ctr images push` of the imported image to an empty docker-registry on loopback.",
        run: images::push,
        ..CASE
    },
    Case {
        name: "run",
        title: "Run a container that ends at once",
        about: "`ctr run --rm IMAGE NAME true`, again and again, on an engine with nothing else to do. The first three of each \
                round are not counted. The floor is what the kernel alone needs for a container: namespaces, an overlay, \
                pivot_root, exec and the end of a program. dockerd, if it joins, does `docker run --rm --network none`.",
        rounds: 5,
        marks: &[mark(Measure::Wall, 0.6)],
        run: tasks::run_true,
        docker: Some(tasks::run_true_by_docker),
        floor: Some(tasks::floor),
        ..CASE
    },
    Case {
        name: "task",
        title: "Create, start, kill and delete a task",
        about: "Create and Start of a task whose container is there already, then Kill, Wait and Delete, by a client that is \
                connected already, again and again on an engine with nothing else to do. CPU time is that of all five calls.",
        marks: &[mark(Measure::Start, 0.6)],
        run: containers::task,
        ..CASE
    },
    Case {
        name: "exec",
        title: "Exec",
        about: "Exec, Start, Wait and DeleteProcess of `true` in a running container, again and again, by a client that is \
                connected already.",
        marks: &[mark(Measure::Wall, 0.6)],
        run: containers::exec,
        ..CASE
    },
    Case {
        name: "one-by-one",
        title: "Containers, one after the other",
        about: "Prepare, Containers.Create, Tasks.Create and Start for each of 1, 10 and 100 containers, one after the other.",
        sizes: "containers",
        run: containers::one_by_one,
        ..CASE
    },
    Case {
        name: "eight-at-a-time",
        title: "Containers, 8 at a time",
        about: "The same for 10 and 100 containers, of which 8 are under way at any time.",
        sizes: "containers",
        marks: &[mark_at(Measure::Wall, 100, Limit::AtMost(0.5))],
        run: containers::eight_at_a_time,
        ..CASE
    },
    Case {
        name: "idle",
        title: "Idle containers: memory, growth, restart",
        about: "Beside 0, 10, 100 and up to 1,000 containers that sleep (as many as the machine's free memory allows with either \
                engine): what the engine holds, and what a shim holds on average, five seconds after the last was started; \
                then how long one more task takes; then the engine is told to end and started again, and the time is taken from \
                its start to the answer that lists all tasks as running.",
        sizes: "containers",
        rounds: 1,
        warm_up: false,
        marks: &[
            mark_at(Measure::ShimPss, 100, Limit::AtMost(0.25)),
            Mark {
                point: Point { measure: Measure::ShimPss, size: 100 },
                against: Against::Itself,
                limit: Limit::AtMost(2.0),
            },
            mark_at(Measure::EnginePss, 0, Limit::AtMost(0.3)),
            mark_at(Measure::EnginePss, 100, Limit::AtMost(0.3)),
            mark_at(Measure::Restart, 100, Limit::AtMost(0.3)),
        ],
        run: containers::idle,
        ..CASE
    },
    Case {
        name: "writes",
        title: "Durable writes of records",
        about: "Images.Create of small records, by 1, 8 and 64 writers at a time, each on a connection of its own and one call \
                after the other. Either engine has a record on disk before it answers.",
        sizes: "writers",
        marks: &[mark_at(Measure::Rate, 8, Limit::AtLeast(5.0))],
        run: records::writes,
        ..CASE
    },
    Case {
        name: "content-write",
        title: "Write content",
        about: "Blobs of 1, 10 and 100 MB by Content.Write in messages of 1 MiB, committed: until the answer, when they are on disk.",
        sizes: "MB",
        marks: &[
            mark_at(Measure::Throughput, 100, Limit::AtLeast(1.0)),
            mark_at(Measure::CpuEngine, 100, Limit::AtMost(0.5)),
        ],
        run: records::content_write,
        ..CASE
    },
    Case {
        name: "content-read",
        title: "Read content",
        about: "The same blobs by Content.Read, from the page cache.",
        sizes: "MB",
        run: records::content_read,
        ..CASE
    },
    Case {
        name: "commit",
        title: "A container's changes as a layer",
        about: "Diff of a snapshot with 10, 100 and 1,000 files of 16 KiB more than the image, into a gzip layer in the content store.",
        sizes: "files",
        run: records::commit,
        ..CASE
    },
    Case {
        name: "events",
        title: "Events to many",
        about: "Events published by one client to 1, 10 and 1,000 subscribers (100 on a connection), 8 under way at a time: how \
                many arrive in a second, and how many never do. The client, which reads them all, has the same processors.",
        sizes: "subscribers",
        marks: &[Mark {
            point: Point { measure: Measure::Lost, size: 1000 },
            against: Against::Itself,
            limit: Limit::AtMost(0.0),
        }],
        run: records::events,
        ..CASE
    },
    Case {
        name: "list",
        title: "List records",
        about: "Images.List of 100, 1,000 and 10,000 images, by a client that is connected already.",
        sizes: "images",
        rounds: 1,
        warm_up: false,
        run: records::list,
        ..CASE
    },
    Case {
        name: "pod",
        title: "A pod with one container",
        about: "RunPodSandbox, CreateContainer and StartContainer, one after the other, by a client that is connected already, on an \
                engine without other pods; the pod is removed unmeasured. Both engines use the same plugins (bridge, host-local, \
                portmap) in networks of their own. containerd has `restrict_oom_score_adj`, as it may not lower it, and a pause \
                image of busybox.",
        pods: true,
        rounds: 5,
        marks: &[mark(Measure::Wall, 0.5)],
        run: pods::one,
        ..CASE
    },
    Case {
        name: "pods",
        title: "50 pods",
        about: "The same 50 times, 8 at a time. Then nothing is done for two seconds, and memory is summed up: of the engine, of all \
                shims and of the pause processes, not of the containers.",
        pods: true,
        marks: &[mark(Measure::Wall, 0.5), mark(Measure::PssIdle, 0.25)],
        run: pods::many,
        ..CASE
    },
    Case {
        name: "exec-sync",
        title: "Run a command in a container",
        about: "ExecSync of `/bin/true` in the one container of the one pod, again and again, by a client that is connected already.",
        pods: true,
        rounds: 5,
        marks: &[mark(Measure::Wall, 0.7)],
        run: pods::exec,
        ..CASE
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_fit_a_file() {
        let mut names: Vec<&str> = ALL.iter().map(|case| case.name).collect();
        assert!(
            names.iter().all(|name| name.chars().all(|c| c.is_ascii_lowercase() || c == '-')),
            "{names:?}"
        );
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), ALL.len());
    }
}
