//! Kill points of what containerd's clients ask for: images, snapshots, containers, tasks, leases, content.
//!
//! ```text
//! trace run:  prepare, verb, again, clean        the points that the verb passes
//! each point: prepare, verb with the point armed -> a process dies; an engine is started anew
//!             verify what was acknowledged, before the verb and by it; again: the verb ends well; clean
//!             what there is, to clients and on disk, is what there was at the beginning
//! at the end: the engine stops, `gantryd check`, nothing is left on the host
//! ```

use std::fs;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use harness::client::{Ctr, Ended, finish};
use harness::host::{Host, RUNC, STOCK_CTR};
use harness::image::{self, BUSYBOX, Layer};
use harness::registry::{REGISTRY, Registry, noise};
use harness::{ready, wait_for};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;

use crate::check;
use crate::points::{self, Action, Point};
use crate::run::{Outcome, Run};
use crate::state;

/// How long the last of a verb may take to pass a point after its client has its answer.
pub(crate) const LATE: Duration = Duration::from_millis(700);
/// Of points that are passed often, so many times are tried.
const TIMES: u32 = 3;

/// An image that is put in and taken out.
const TWO: &str = "example.org/two:1";
/// What it is called elsewhere, too.
const TAG: &str = "example.org/tagged:1";
/// A blob's bytes.
const BYTES: &[u8] = b"bytes of a blob that somebody wrote";

/// An engine, and what it works with.
pub(crate) struct World {
    pub(crate) host: Host,
    registry: Option<Registry>,
}

/// Something that clients ask for.
struct Verb {
    name: &'static str,
    /// Whether it needs a registry.
    registry: bool,
    /// Makes what it is done to.
    prepare: fn(&World),
    /// Asks for it.
    act: fn(&World) -> Ended,
    /// Looks whether everything acknowledged is there; whether the verb itself was, and whether a shim died.
    verify: fn(&World, bool, bool),
    /// Asks for it again, in the way a client does that does not know what became of it, and looks whether it is done.
    again: fn(&World),
    /// Takes all of it away.
    clean: fn(&World),
}

static VERBS: [Verb; 17] = [
    Verb {
        name: "image-import",
        registry: false,
        prepare: |_| (),
        act: |world| world.ctr().run(&["images", "import", &world.archive()]),
        verify: |world, acknowledged, _| world.has_image(TWO, acknowledged),
        again: |world| {
            world.ctr().ok(&["images", "import", &world.archive()]);
            world.has_image(TWO, true);
        },
        clean: |world| world.remove_image(TWO),
    },
    Verb {
        name: "image-import-by-client",
        registry: false,
        prepare: |_| (),
        act: |world| world.by_stock(&["images", "import", &world.archive()]),
        verify: |world, acknowledged, _| world.has_image(TWO, acknowledged),
        again: |world| {
            // Its name comes before its snapshots, so that they may be missing; a client unpacks them when it needs them.
            world.host.stock_ctr().ok(&["images", "import", &world.archive()]);
            world.has_image(TWO, true);
        },
        clean: |world| world.remove_image(TWO),
    },
    Verb {
        name: "image-pull",
        registry: true,
        prepare: |_| (),
        act: |world| world.ctr().run(&["images", "pull", "--plain-http", &world.remote("two:1")]),
        verify: |world, acknowledged, _| world.has_image(&world.remote("two:1"), acknowledged),
        again: |world| {
            world.ctr().ok(&["images", "pull", "--plain-http", &world.remote("two:1")]);
            world.has_image(&world.remote("two:1"), true);
        },
        clean: |world| world.remove_image(&world.remote("two:1")),
    },
    Verb {
        name: "image-push",
        registry: true,
        prepare: |world| drop(world.ctr().ok(&["images", "import", &world.archive()])),
        act: |world| world.ctr().run(&["images", "push", "--plain-http", &world.remote("pushed:1"), TWO]),
        verify: |world, acknowledged, _| {
            world.has_image(TWO, true);
            if acknowledged {
                world.registry.as_ref().unwrap().digest("pushed:1");
            }
        },
        again: |world| {
            world.ctr().ok(&["images", "push", "--plain-http", &world.remote("pushed:1"), TWO]);
            world.registry.as_ref().unwrap().digest("pushed:1");
        },
        clean: |world| world.remove_image(TWO),
    },
    Verb {
        name: "image-tag",
        registry: false,
        prepare: |_| (),
        act: |world| world.ctr().run(&["images", "tag", image::NAME, TAG]),
        verify: |world, acknowledged, _| world.has_image(TAG, acknowledged),
        again: |world| {
            world.ctr().ok(&["images", "tag", "--force", image::NAME, TAG]);
            world.has_image(TAG, true);
        },
        clean: |world| world.remove_image(TAG),
    },
    Verb {
        name: "image-remove",
        registry: false,
        prepare: |world| drop(world.ctr().ok(&["images", "import", &world.archive()])),
        // With what it held: a collection.
        act: |world| world.ctr().run(&["images", "rm", "--sync", TWO]),
        verify: |world, acknowledged, _| {
            assert!(!acknowledged || !world.lists("images", TWO), "a removed image is back");
            world.has_image(image::NAME, true);
        },
        again: |world| world.remove_image(TWO),
        clean: |_| (),
    },
    Verb {
        name: "snapshot-prepare",
        registry: false,
        prepare: |_| (),
        act: |world| world.ctr().run(&["snapshots", "prepare", "s1", &world.top()]),
        verify: |world, acknowledged, _| assert!(!acknowledged || world.snapshot("s1")),
        again: |world| {
            let ended = world.ctr().run(&["snapshots", "prepare", "s1", &world.top()]);
            well_or(&ended, "exists");
            assert!(world.snapshot("s1"));
        },
        clean: |world| drop(world.ctr().ok(&["snapshots", "rm", "s1"])),
    },
    Verb {
        name: "snapshot-commit",
        registry: false,
        prepare: |world| drop(world.ctr().ok(&["snapshots", "prepare", "s1", &world.top()])),
        act: |world| world.ctr().run(&["snapshots", "commit", "layer", "s1"]),
        verify: |world, acknowledged, _| {
            assert!(!acknowledged || world.snapshot("layer"));
            assert!(world.snapshot("layer") != world.snapshot("s1"), "one of the two is there");
        },
        again: |world| {
            let ended = world.ctr().run(&["snapshots", "commit", "layer", "s1"]);
            well_or(&ended, "s1");
            assert!(world.snapshot("layer") && !world.snapshot("s1"));
        },
        clean: |world| drop(world.ctr().ok(&["snapshots", "rm", "layer"])),
    },
    Verb {
        name: "snapshot-remove",
        registry: false,
        prepare: |world| drop(world.ctr().ok(&["snapshots", "prepare", "s1", &world.top()])),
        act: |world| world.ctr().run(&["snapshots", "rm", "s1"]),
        verify: |world, acknowledged, _| assert!(!acknowledged || !world.snapshot("s1")),
        again: |world| {
            well_or(&world.ctr().run(&["snapshots", "rm", "s1"]), "not exist");
            // The key is free.
            world.ctr().ok(&["snapshots", "prepare", "s1", &world.top()]);
        },
        clean: |world| drop(world.ctr().ok(&["snapshots", "rm", "s1"])),
    },
    Verb {
        name: "container-create",
        registry: false,
        prepare: |_| (),
        act: |world| world.ctr().run(&["containers", "create", image::NAME, "c1", "sleep", "3600"]),
        verify: |world, acknowledged, _| {
            assert!(!acknowledged || (world.lists("containers", "c1") && world.snapshot("c1")));
        },
        again: |world| {
            // A snapshot without its container is what an interrupted client leaves.
            well_or(&world.ctr().run(&["containers", "rm", "c1"]), "not exist");
            well_or(&world.ctr().run(&["snapshots", "rm", "c1"]), "not exist");
            world.container();
        },
        clean: |world| drop(world.ctr().ok(&["containers", "rm", "c1"])),
    },
    Verb {
        name: "container-update",
        registry: false,
        prepare: World::container,
        act: |world| world.ctr().run(&["containers", "label", "c1", "mark=set"]),
        verify: |world, acknowledged, _| {
            let info = world.ctr().ok(&["containers", "info", "c1"]);
            assert!(!acknowledged || info.contains("mark"), "{info}");
        },
        again: |world| {
            world.ctr().ok(&["containers", "label", "c1", "mark=set"]);
            assert!(world.ctr().ok(&["containers", "info", "c1"]).contains("mark"));
        },
        clean: |world| drop(world.ctr().ok(&["containers", "rm", "c1"])),
    },
    Verb {
        name: "container-delete",
        registry: false,
        prepare: World::container,
        act: |world| world.ctr().run(&["containers", "rm", "c1"]),
        verify: |world, acknowledged, _| assert!(!acknowledged || !world.lists("containers", "c1")),
        again: |world| {
            well_or(&world.ctr().run(&["containers", "rm", "c1"]), "not exist");
            well_or(&world.ctr().run(&["snapshots", "rm", "c1"]), "not exist");
            world.container();
        },
        clean: |world| drop(world.ctr().ok(&["containers", "rm", "c1"])),
    },
    Verb {
        name: "task-start",
        registry: false,
        prepare: World::container,
        act: |world| world.ctr().run(&["tasks", "start", "-d", "c1"]),
        verify: |world, acknowledged, shim_died| {
            assert!(world.lists("containers", "c1"));
            if acknowledged && !shim_died {
                assert_eq!(world.task().as_deref(), Some("RUNNING"));
            }
        },
        again: |world| {
            world.free();
            world.ctr().ok(&["tasks", "start", "-d", "c1"]);
            assert_eq!(world.task().as_deref(), Some("RUNNING"));
        },
        clean: World::end,
    },
    Verb {
        name: "task-exec",
        registry: false,
        prepare: World::run,
        act: |world| world.ctr().run(&["tasks", "exec", "--exec-id", "e1", "c1", "true"]),
        verify: |world, _, shim_died| world.runs(shim_died),
        again: |world| {
            if world.task().as_deref() != Some("RUNNING") {
                world.free();
                world.ctr().ok(&["tasks", "start", "-d", "c1"]);
            }
            world.ctr().ok(&["tasks", "exec", "--exec-id", "e2", "c1", "true"]);
        },
        clean: World::end,
    },
    Verb {
        name: "task-kill-and-delete",
        registry: false,
        prepare: World::run,
        act: |world| {
            let killed = world.ctr().run(&["tasks", "kill", "-s", "KILL", "c1"]);
            if killed.code != 0 {
                return killed;
            }
            let end = Instant::now() + Duration::from_secs(20);
            loop {
                let removed = world.ctr().run(&["tasks", "rm", "c1"]);
                // 137 is the task's own code.
                if removed.code == 137 || removed.code == 0 {
                    return Ended { code: 0, ..removed };
                }
                if Instant::now() > end || world.ctr().run(&["version"]).code != 0 {
                    return removed;
                }
            }
        },
        verify: |world, acknowledged, _| {
            assert!(world.lists("containers", "c1"));
            assert!(!acknowledged || world.task().is_none(), "a deleted task is back");
        },
        again: |world| {
            world.free();
            world.ctr().ok(&["tasks", "start", "-d", "c1"]);
        },
        clean: World::end,
    },
    Verb {
        name: "lease",
        registry: false,
        prepare: |_| (),
        act: |world| world.ctr().run(&["leases", "create", "--id", "l1"]),
        verify: |world, acknowledged, _| assert!(!acknowledged || world.lists("leases", "l1")),
        again: |world| {
            well_or(&world.ctr().run(&["leases", "create", "--id", "l1"]), "exists");
            assert!(world.lists("leases", "l1"));
        },
        clean: |world| drop(world.ctr().ok(&["leases", "rm", "l1"])),
    },
    Verb {
        name: "content-write",
        registry: false,
        prepare: |_| (),
        act: World::ingest,
        verify: |world, acknowledged, _| {
            if acknowledged {
                assert_eq!(world.ctr().ok(&["content", "get", &digest()]).as_bytes(), BYTES);
            }
        },
        again: |world| {
            well_or(&world.ingest(), "exists");
            assert_eq!(world.ctr().ok(&["content", "get", &digest()]).as_bytes(), BYTES);
        },
        clean: |world| drop(world.ctr().ok(&["content", "rm", &digest()])),
    },
];

fn digest() -> String {
    oci::Digest::sha256_of(BYTES).to_string()
}

/// Whether a call did what it was asked for, or says that it had been done.
fn well_or(ended: &Ended, words: &str) {
    assert!(ended.code == 0 || ended.stderr.contains(words), "{ended:?}");
}

impl World {
    fn new(registry: bool) -> Self {
        let host = Host::collecting();
        host.import();
        let layer = Layer::default().file("noise", 0o644, &noise(7, 300_000)).finish();
        let two = image::image(TWO, &["sh"], &[image::base_layer(), layer]);
        let world = World { host, registry: registry.then(Registry::open) };
        two.write(&PathBuf::from(world.archive())).unwrap();
        if let Some(registry) = &world.registry {
            registry.push(&two, "two:1");
        }
        world
    }

    pub(crate) fn ctr(&self) -> Ctr {
        self.host.ctr()
    }

    /// Runs Debian's client. It would wait for ever for an engine that is gone, and is killed when that has ended.
    fn by_stock(&self, arguments: &[&str]) -> Ended {
        let client = self.host.stock_ctr().spawn(arguments);
        let (engine, pid) = (self.host.pid(), Pid::from_raw(client.id() as i32));
        let ended = AtomicBool::new(false);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                let mut patience = 50;
                while !ended.load(Ordering::Relaxed) && patience > 0 {
                    patience -= i32::from(has_ended(engine));
                    std::thread::sleep(Duration::from_millis(20));
                }
                if !ended.load(Ordering::Relaxed) {
                    let _ = kill(pid, Signal::SIGKILL);
                }
            });
            let how = finish(client, &arguments.join(" "));
            ended.store(true, Ordering::Relaxed);
            how
        })
    }

    fn archive(&self) -> String {
        self.host.folder().join("two.tar").display().to_string()
    }

    fn remote(&self, name: &str) -> String {
        self.registry.as_ref().unwrap().name(name)
    }

    fn lists(&self, what: &str, name: &str) -> bool {
        self.ctr().ok(&[what, "ls", "-q"]).lines().any(|line| line == name)
    }

    /// An image that must be there is, and any that is has all of its blobs.
    fn has_image(&self, name: &str, must: bool) {
        let there = self.lists("images", name);
        assert!(there || !must, "image {name} was acknowledged and is lost");
        if there {
            let ended = self.ctr().run(&["images", "verify", name]);
            assert_eq!(ended.code, 0, "images verify: {ended:?}");
        }
    }

    fn remove_image(&self, name: &str) {
        if self.lists("images", name) {
            self.ctr().ok(&["images", "rm", "--sync", name]);
        }
        assert!(!self.lists("images", name));
    }

    /// The topmost layer of the image that stays.
    fn top(&self) -> String {
        let list = self.ctr().ok(&["snapshots", "ls"]);
        let rows = list.lines().skip(1).map(|line| line.split_whitespace().collect::<Vec<_>>());
        let committed: Vec<Vec<&str>> = rows.filter(|row| row.last() == Some(&"Committed")).collect();
        let top = committed.iter().find(|row| {
            row.len() == 3 && !committed.iter().any(|other| other.len() == 3 && other[1] == row[0])
        });
        top.unwrap_or_else(|| panic!("no layer in {list}"))[0].to_owned()
    }

    fn snapshot(&self, key: &str) -> bool {
        let list = self.ctr().ok(&["snapshots", "ls"]);
        list.lines().any(|line| line.split_whitespace().next() == Some(key))
    }

    fn container(&self) {
        self.ctr().ok(&["containers", "create", image::NAME, "c1", "sleep", "3600"]);
    }

    fn run(&self) {
        self.ctr().ok(&["run", "-d", image::NAME, "c1", "sleep", "3600"]);
    }

    /// What its task is, if it has one.
    fn task(&self) -> Option<String> {
        let list = self.ctr().ok(&["tasks", "ls"]);
        let line = list.lines().find(|line| line.split_whitespace().next() == Some("c1"))?;
        line.split_whitespace().last().map(str::to_owned)
    }

    /// A task that ran goes on, unless its shim was killed, which is then known.
    fn runs(&self, shim_died: bool) {
        if !shim_died {
            assert_eq!(self.task().as_deref(), Some("RUNNING"));
            return;
        }
        wait_for("the task of a dead shim to be stopped", || {
            self.task().is_none_or(|status| status == "STOPPED")
        });
    }

    /// Sets the name of its task free.
    fn free(&self) {
        wait_for("the name of the task to be free", || {
            if self.task().is_none() {
                return true;
            }
            self.ctr().run(&["tasks", "rm", "-f", "c1"]);
            self.task().is_none()
        });
    }

    fn end(&self) {
        self.free();
        self.ctr().ok(&["containers", "rm", "c1"]);
    }

    fn ingest(&self) -> Ended {
        let label = "containerd.io/gc.root=2020-01-01T00:00:00Z";
        let digest = digest();
        let arguments = ["content", "ingest", "--expected-digest", &digest, "--label", label, "ref1"];
        self.ctr().with_input(&arguments, BYTES)
    }
}

/// Whether a process has ended, reaped or not.
pub(crate) fn has_ended(pid: i32) -> bool {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit(')').next().is_none_or(|rest| rest.trim_start().starts_with(['Z', 'X']) || rest.is_empty())
}

/// Those of the points that a run is to try.
pub(crate) fn chosen(points: Vec<Point>, quick: bool) -> Vec<Point> {
    points.into_iter().filter(|point| point.count <= if quick { 1 } else { TIMES }).collect()
}

/// Whether a process came to the armed point, at once or when the client had its answer.
pub(crate) fn fired() -> bool {
    let end = Instant::now() + LATE;
    while !points::fired() {
        if Instant::now() > end {
            return false;
        }
        std::thread::sleep(Duration::from_millis(10));
    }
    true
}

/// Starts the engine again if it was the one that died.
fn revive(world: &mut World, point: &Point) {
    if point.is_of_shim() {
        return;
    }
    let pid = world.host.pid();
    wait_for("the engine to die", || has_ended(pid));
    world.host.kill();
    world.host.start();
}

pub(crate) fn all(run: &mut Run) {
    for verb in &VERBS {
        let prefix = format!("kill/{}/", verb.name);
        if !run.wants_of(&prefix) {
            continue;
        }
        let programs: &[&str] =
            if verb.registry { &[STOCK_CTR, RUNC, BUSYBOX, REGISTRY] } else { &[STOCK_CTR, RUNC, BUSYBOX] };
        if !ready(programs) {
            run.skip(&prefix, "programs are missing");
            continue;
        }
        of_verb(run, verb, &prefix);
    }
}

fn of_verb(run: &mut Run, verb: &'static Verb, prefix: &str) {
    // The points must be known, whichever of them are wanted.
    let found = run.always(&format!("{prefix}trace"), |found: &mut dyn FnMut(Vec<Point>)| {
        let world = World::new(verb.registry);
        let before = state::before(&world.host, &world.ctr());
        (verb.prepare)(&world);
        let passed = points::traced(|| {
            let ended = (verb.act)(&world);
            assert_eq!(ended.code, 0, "{ended:?}");
            std::thread::sleep(LATE);
        });
        assert!(!passed.is_empty(), "it passes no failpoint: is the engine built with them?");
        found(passed);
        (verb.verify)(&world, true, false);
        (verb.again)(&world);
        (verb.clean)(&world);
        state::assert_back(&world.host, &world.ctr(), &before);
    });
    let mut world: Option<World> = None;
    for point in chosen(found, run.quick) {
        let name = format!("{prefix}{}.{}", point.name, point.count);
        if !run.wants(&name) {
            continue;
        }
        let fresh = world.take().unwrap_or_else(|| World::new(verb.registry));
        world = run.case(&name, fresh, move |world| at_point(world, verb, &point));
        points::disarm();
    }
    if let Some(world) = world {
        run.case(&format!("{prefix}check"), world, |world| {
            check::check(&mut world.host, true);
            world.remove_image(image::NAME);
            world.host.assert_nothing_left();
            check::check(&mut world.host, true);
            Outcome::Passed
        });
    }
}

fn at_point(world: &mut World, verb: &Verb, point: &Point) -> Outcome {
    let before = state::before(&world.host, &world.ctr());
    (verb.prepare)(world);
    points::arm(point, Action::Kill);
    let ended = (verb.act)(world);
    let reached = fired();
    points::disarm();
    if reached {
        revive(world, point);
    }
    (verb.verify)(world, ended.code == 0, reached && point.is_of_shim());
    (verb.again)(world);
    (verb.clean)(world);
    state::assert_back(&world.host, &world.ctr(), &before);
    world.host.assert_nothing_left();
    if reached {
        Outcome::Passed
    } else {
        Outcome::Moot(format!("not passed again; the verb ended with {}", ended.code))
    }
}
