//! Every subcommand of Debian's `ctr` 1.6, against gantryd and against Debian's containerd: the same steps on both, and what
//! they say and how they end is compared.
//!
//! The list of subcommands is read from `ctr --help`, so that none is forgotten: a command that is in no step and not in
//! [`CANNOT`] fails the test. A step says whether it must work, so that two engines that fail alike prove nothing by it.
//! Texts are compared after what differs from run to run (times, process ids, folders) has been replaced. Of refusals the
//! class is compared and not the sentence: the sentences are each engine's own.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::collections::BTreeSet;
use std::fs;
use std::net::{TcpListener, TcpStream};
use std::process::{Child, Command, Stdio};
use std::sync::LazyLock;

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oci::Digest;
use regex::Regex;
use tests::client::{Ctr, channel, finish, in_namespace};
use tests::host::{CONTAINERD, Host, Kind, RUNC, STOCK_CTR};
use tests::image::{BUSYBOX, NAME, busybox};
use tests::{ready, wait_for};

/// Debian's registry.
const REGISTRY: &str = "/usr/bin/docker-registry";

/// Commands that cannot do their work here, and why. They are still run, and must fail alike.
const CANNOT: [(&str, &str); 9] = [
    ("pprof block", PPROF),
    ("pprof goroutines", PPROF),
    ("pprof heap", PPROF),
    ("pprof profile", PPROF),
    ("pprof threadcreate", PPROF),
    ("pprof trace", PPROF),
    ("tasks checkpoint", "needs a CRIU that works on the kernel of the machine"),
    ("containers restore", "restores from the checkpoint of a task, which needs CRIU"),
    ("shim exec", "this client panics before it asks the shim"),
];
const PPROF: &str = "asks for profiles of a Go program on a debug socket; the engine is none and has none";

/// What of a step's output is compared.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Same {
    /// All of it.
    All,
    /// All, with each number as N: process ids, measurements.
    ButNumbers,
    /// All, with each digest as DIGEST: documents that hold a date.
    ButDigests,
    /// The set of its lines.
    Lines,
    /// How it ended alone, with the reason.
    End(&'static str),
}

/// How a step must end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Must {
    Work,
    Fail,
    /// As the other engine's, whatever that is.
    Agree,
}

enum Do {
    /// The subcommand with these words, and this input.
    Ctr(&'static str, &'static str),
    /// The whole command line: options of a group stand before the subcommand.
    Line(&'static str),
    /// Something longer; the answer is compared.
    Act(fn(&Bench) -> String),
}

struct Step {
    /// The subcommand, as `ctr --help` names it; empty when the step only prepares.
    leaf: &'static str,
    run: Do,
    must: Must,
    same: Same,
}

const fn ok(leaf: &'static str, words: &'static str) -> Step {
    Step { leaf, run: Do::Ctr(words, ""), must: Must::Work, same: Same::All }
}

const fn fails(leaf: &'static str, words: &'static str) -> Step {
    Step { leaf, run: Do::Ctr(words, ""), must: Must::Fail, same: Same::All }
}

const fn act(leaf: &'static str, run: fn(&Bench) -> String) -> Step {
    Step { leaf, run: Do::Act(run), must: Must::Work, same: Same::All }
}

const fn line(leaf: &'static str, line: &'static str) -> Step {
    Step { leaf, run: Do::Line(line), must: Must::Work, same: Same::All }
}

impl Step {
    const fn but(mut self, same: Same) -> Self {
        self.same = same;
        self
    }

    const fn with(mut self, input: &'static str) -> Self {
        if let Do::Ctr(words, _) = self.run {
            self.run = Do::Ctr(words, input);
        }
        self
    }

    const fn may(mut self, must: Must) -> Self {
        self.must = must;
        self
    }
}

/// Collects what nothing holds, on both engines: the deletion of a lease waits for it when asked to.
const COLLECT: Step = ok("leases delete", "--sync collect");
const LEASE: Step = ok("leases create", "--id collect");

const PROGRESS: Same = Same::End("a progress display");
const SHOWN: &str = "{dir}/busybox.tar";

macro_rules! groups {
    ($($group:ident => [$($step:expr),* $(,)?]),* $(,)?) => {
        /// The steps, by group; each group has engines of its own.
        static GROUPS: &[(&str, &[Step])] = &[$((stringify!($group), &[$($step),*])),*];
        mod both { $(#[test] fn $group() { super::run(stringify!($group)); })* }
    };
}

groups! {
    version_plugins_and_profiles => [
        ok("version", "").but(Same::End("versions and revisions differ")),
        ok("plugins list", "").but(Same::End("the lists of plugins differ")),
        ok("plugins list", "-q id==overlayfs"),
        ok("plugins list", "-d id==native").but(Same::End("platforms and capabilities are each engine's own")),
        fails("plugins list", "nonsense=="),
        line("pprof block", "pprof -d {dir}/none.sock block").may(Must::Fail),
        line("pprof goroutines", "pprof -d {dir}/none.sock goroutines").may(Must::Fail),
        line("pprof heap", "pprof -d {dir}/none.sock heap").may(Must::Fail),
        line("pprof profile", "pprof -d {dir}/none.sock profile -s 1s").may(Must::Fail),
        line("pprof threadcreate", "pprof -d {dir}/none.sock threadcreate").may(Must::Fail),
        line("pprof trace", "pprof -d {dir}/none.sock trace -s 1s").may(Must::Fail),
        ok("oci spec", ""),
    ],
    leases_and_namespaces => [
        ok("leases list", ""),
        ok("leases create", "--id one a=b"),
        ok("leases create", "--id two -x 1h c=d"),
        ok("leases create", "").but(Same::End("the name is made up")),
        fails("leases create", "--id one"),
        ok("leases list", "id==one"),
        ok("leases list", "-q id==two"),
        ok("leases list", "labels.a==b"),
        fails("leases list", "a==="),
        ok("leases delete", "one two"),
        fails("leases delete", "--sync none"),
        ok("leases list", "-q id==one"),
        ok("namespaces list", ""),
        ok("namespaces create", "other k=v"),
        fails("namespaces create", "other"),
        fails("namespaces create", "not/valid"),
        fails("namespaces create", ""),
        ok("namespaces label", "other x=y k="),
        ok("namespaces label", "new x=y"),
        ok("namespaces label", "other"),
        ok("namespaces list", "").but(Same::Lines),
        ok("namespaces list", "-q"),
        ok("namespaces remove", "none"),
        ok("namespaces remove", "other new"),
        ok("namespaces list", "-q"),
        act("", import),
        fails("namespaces remove", "{ns}"),
    ],
    images => [
        act("", prepare_archive),
        ok("images import", SHOWN),
        LEASE,
        COLLECT,
        ok("images list", ""),
        ok("images list", "-q"),
        ok("images list", "name~=busy"),
        ok("images list", "name==none"),
        fails("images list", "name==="),
        ok("images check", ""),
        ok("images check", "-q"),
        ok("images check", "--snapshotter native"),
        ok("images label", "{image} a=b c=d"),
        ok("images label", "{image} c="),
        ok("images list", "labels.a==b"),
        ok("images label", "--replace-all {image} e=f"),
        ok("images list", ""),
        fails("images label", "none a=b"),
        ok("images tag", "{image} example.org/other:1 example.org/third:1"),
        fails("images tag", "{image} example.org/other:1"),
        ok("images tag", "--force {image} example.org/other:1"),
        fails("images tag", "none example.org/fourth:1"),
        ok("images list", ""),
        ok("images export", "{dir}/exported.tar {image}"),
        act("images export", exported),
        fails("images export", "{dir}/none.tar example.org/none:1"),
        ok("images export", "--skip-manifest-json {dir}/exported.tar {image} example.org/other:1"),
        act("images export", exported),
        ok("images convert", "--uncompress --oci {image} example.org/plain:1"),
        ok("images list", ""),
        ok("content list", "").but(Same::Lines),
        fails("images convert", "example.org/none:1 example.org/plain:2"),
        fails("images convert", "{image}"),
        act("", |bench| { fs::create_dir(bench.path("mnt")).unwrap(); String::new() }),
        ok("images mount", "{image} {dir}/mnt"),
        act("images mount", |bench| fs::read_to_string(bench.path("mnt/etc/replaced-above")).unwrap()),
        ok("images unmount", "--rm {dir}/mnt"),
        act("images unmount", |bench| bench.folder_names("mnt")),
        ok("images mount", "--rw {image} {dir}/mnt"),
        act("images mount", |bench| { fs::write(bench.path("mnt/new"), "x").unwrap(); bench.folder_names("mnt") }),
        ok("images mount", "{image} {dir}/mnt"),
        ok("snapshots info", "{dir}/mnt"),
        ok("images unmount", "{dir}/mnt"),
        ok("images unmount", "{dir}/mnt"),
        ok("snapshots delete", "{dir}/mnt"),
        fails("images mount", "example.org/none:1 {dir}/mnt"),
        ok("images delete", "example.org/other:1 example.org/third:1 example.org/plain:1"),
        ok("images delete", "example.org/none:1"),
        ok("images delete", "--sync {image}"),
        ok("images list", ""),
        ok("content list", ""),
        ok("snapshots list", ""),
        ok("images import", "--no-unpack --index-name example.org/index:1 --digests --base-name docker.io/library/busybox {dir}/busybox.tar"),
        ok("images list", "").but(Same::Lines),
        ok("images check", ""),
        ok("snapshots list", ""),
        fails("images import", "/dev/null"),
        fails("images import", "{dir}/none.tar"),
    ],
    content => [
        act("", import),
        LEASE,
        COLLECT,
        ok("content list", "").but(Same::Lines),
        ok("content list", "-q"),
        fails("content list", "size>1"),
        ok("content get", "{manifest}"),
        ok("content get", "{config}"),
        fails("content get", "{none}"),
        fails("content get", "nonsense"),
        fails("content get", ""),
        ok("content ingest", "ref-1").with("some bytes"),
        ok("content ingest", "--expected-size 10 --expected-digest {some} ref-2").with("some bytes"),
        fails("content ingest", "--expected-digest {none} ref-3").with("other bytes"),
        fails("content ingest", "--expected-size 3 ref-4").with("other bytes"),
        fails("content ingest", "").with("x"),
        act("", |bench| { fs::write(bench.path("more"), "more bytes").unwrap(); String::new() }),
        ok("content edit", "--editor 'cp {dir}/more' {some}"),
        act("content active", a_stopped_ingest),
        ok("content active", "none"),
        ok("content label", "{some} a=b c=d"),
        ok("content label", "{some} c="),
        ok("content list", "labels.a==b"),
        fails("content label", "{none} a=b"),
        fails("content edit", "--editor true {none}"),
        fails("content edit", "--editor false {some}"),
        fails("content edit", "--validate json {some}"),
        ok("content get", "{more}"),
        ok("content delete", "{some}"),
        ok("content delete", "{none}"),
        fails("content get", "{some}"),
        ok("content prune references", "--dry").but(Same::Lines),
        ok("content prune references", ""),
        ok("content list", "").but(Same::Lines),
    ],
    registry => [
        act("", import),
        act("", |bench| { bench.registry(); String::new() }),
        ok("images tag", "{image} {registry}/busybox:1"),
        ok("images push", "--plain-http {registry}/busybox:1").but(PROGRESS),
        ok("images push", "--plain-http {registry}/second:2 {image}").but(PROGRESS),
        fails("images push", "--plain-http {registry}/busybox:1 example.org/none:1"),
        fails("images push", "--user nobody:secret {none}/busybox:1").but(PROGRESS),
        ok("images push", "--plain-http {registry}/third:1 {image}").but(PROGRESS),
        ok("images delete", "--sync {image} {registry}/busybox:1"),
        ok("content list", ""),
        ok("images pull", "--plain-http {registry}/busybox:1").but(PROGRESS),
        LEASE,
        COLLECT,
        ok("images list", ""),
        ok("images check", ""),
        ok("content list", "").but(Same::Lines),
        ok("snapshots list", "").but(Same::Lines),
        ok("run", "--rm {registry}/busybox:1 c echo pulled"),
        ok("images pull", "--plain-http --print-chainid --label a=b {registry}/second:2").but(PROGRESS),
        fails("images pull", "--plain-http {registry}/none:1").but(PROGRESS),
        ok("images delete", "--sync {registry}/busybox:1 {registry}/second:2"),
        ok("content fetch", "--plain-http {registry}/third:1").but(PROGRESS),
        ok("images list", ""),
        ok("content list", "").but(Same::Lines),
        ok("snapshots list", ""),
        fails("content fetch", "--plain-http {registry}/none:1").but(PROGRESS),
        ok("images delete", "--sync {registry}/third:1"),
        ok("content fetch", "--plain-http --metadata-only {registry}/busybox:1").but(PROGRESS),
        ok("content list", "").but(Same::Lines),
        ok("content fetch-object", "--plain-http {registry}/busybox:1"),
        ok("content fetch-object", "--plain-http {registry}/busybox:1 {config}").may(Must::Agree),
        fails("content fetch-object", "--plain-http {registry}/none:1"),
        ok("content push-object", "--plain-http {registry}/objects:1 {config} application/octet-stream"),
        fails("content push-object", "--plain-http {registry}/objects:1 {none} application/octet-stream"),
    ],
    snapshots => [
        act("", import),
        LEASE,
        COLLECT,
        ok("snapshots list", "").but(Same::Lines),
        ok("snapshots prepare", "work {chain1}"),
        fails("snapshots prepare", "work {chain1}"),
        fails("snapshots prepare", "more none"),
        ok("snapshots prepare", ""),
        ok("snapshots prepare", "--mounts --target /mnt held {chain1}"),
        ok("snapshots mounts", "/mnt work"),
        fails("snapshots mounts", "/mnt none"),
        ok("snapshots view", "--mounts look {chain1}"),
        ok("snapshots view", "-t /mnt look-down {chain0}"),
        // As this client does for what it prepares; nothing else holds a view.
        ok("snapshots label", "look containerd.io/gc.root=2020-01-01T00:00:00Z"),
        ok("snapshots label", "look-down containerd.io/gc.root=2020-01-01T00:00:00Z"),
        fails("snapshots view", "look {chain1}"),
        ok("snapshots info", "work"),
        ok("snapshots info", "look"),
        ok("snapshots info", "{chain1}"),
        fails("snapshots info", "none"),
        ok("snapshots label", "work a=b c=d"),
        ok("snapshots label", "work c="),
        ok("snapshots info", "work"),
        fails("snapshots label", "none a=b"),
        fails("snapshots delete", "{chain1}"),
        ok("snapshots diff", "work").but(Same::End("an archive; api reads what is in it")),
        ok("snapshots diff", "--media-type application/vnd.oci.image.layer.v1.tar --keep --label a=b {chain1}")
            .but(Same::End("an archive; api reads what is in it")),
        ok("snapshots diff", "{chain0} {chain1}").may(Must::Agree).but(Same::End("an archive")),
        fails("snapshots diff", "none"),
        fails("snapshots diff", "--media-type nonsense work"),
        ok("snapshots commit", "layer work"),
        fails("snapshots commit", "layer held"),
        fails("snapshots commit", "other none"),
        fails("snapshots commit", "other look"),
        ok("snapshots info", "layer"),
        ok("snapshots list", "").but(Same::Lines),
        ok("snapshots tree", "").but(Same::Lines),
        ok("snapshots usage", "").but(Same::End("of an image's layers: sizes of folders are the file system's")),
        ok("snapshots usage", "-b layer").but(Same::ButNumbers),
        fails("snapshots usage", "none"),
        LEASE,
        COLLECT,
        // What was committed is held by nothing, unless it took over the label.
        ok("snapshots list", "").but(Same::Lines),
        ok("snapshots delete", "look look-down held"),
        fails("snapshots delete", "held"),
        ok("images delete", "--sync {image}"),
        ok("snapshots list", ""),
        ok("images import", "--no-unpack {dir}/busybox.tar"),
        ok("snapshots list", ""),
        ok("snapshots unpack", "{manifest}"),
        fails("snapshots unpack", "{none}").may(Must::Agree),
        ok("snapshots list", "").but(Same::Lines),
        line("snapshots prepare", "snapshots --snapshotter native prepare work"),
        line("snapshots mounts", "snapshots --snapshotter native mounts /mnt work")
            .but(Same::End("where a snapshot has its files is each engine's own")),
        line("snapshots list", "snapshots --snapshotter native list"),
        line("snapshots delete", "snapshots --snapshotter native delete work"),
        line("snapshots prepare", "snapshots --snapshotter none prepare work").may(Must::Fail),
        line("snapshots list", "snapshots --snapshotter none list").may(Must::Fail),
    ],
    containers => [
        act("", import),
        ok("containers create", "--label a=b --env X=Y --cwd /tmp {image} c1 sh /made"),
        fails("containers create", "{image} c1"),
        fails("containers create", "example.org/none:1 c2"),
        fails("containers create", "{image} not/valid"),
        ok("containers create", "--snapshotter native --net-host --read-only -t {image} c2"),
        ok("containers list", ""),
        ok("containers list", "-q"),
        ok("containers list", "-q labels.a==b"),
        fails("containers list", "id==="),
        ok("containers info", "c1"),
        ok("containers info", "--spec c1"),
        ok("containers info", "c2"),
        fails("containers info", "none"),
        ok("containers label", "c1 x=y a="),
        fails("containers label", "c1"),
        fails("containers label", "none x=y"),
        ok("containers info", "c1"),
        ok("containers checkpoint", "--rw --image c1 example.org/checkpoint:1"),
        fails("containers checkpoint", "--rw none example.org/checkpoint:2"),
        ok("images list", "name==example.org/checkpoint:1").but(Same::ButDigests),
        fails("containers restore", "--rw restored example.org/checkpoint:1"),
        ok("containers list", ""),
        ok("snapshots info", "c1"),
        ok("containers delete", "--keep-snapshot c1"),
        // Kept by this client, and then collected: nothing holds it any more.
        LEASE,
        COLLECT,
        fails("snapshots info", "c1"),
        ok("containers delete", "c2"),
        fails("containers delete", "c2"),
        fails("containers delete", ""),
        ok("containers list", ""),
    ],
    tasks => [
        act("", import),
        ok("run", "--rm {image} c0 sh -c 'echo out; echo err >&2; exit 4'").may(Must::Fail),
        ok("run", "--rm --null-io {image} c0 echo unheard"),
        fails("run", "--rm {image} c0 /no/such/program"),
        fails("run", "--rm example.org/none:1 c0"),
        ok("run", "-d --pid-file {dir}/pid {image} c1 sh -c 'trap \"exit 3\" TERM; while true; do sleep 0.1; done'"),
        act("run", |bench| {
            let pid = fs::read_to_string(bench.path("pid")).unwrap();
            // The runtime's own program, until the process takes its place.
            let name = || fs::read_to_string(format!("/proc/{pid}/comm")).unwrap();
            wait_for("the container's program", || name() == "sh\n");
            String::new()
        }),
        fails("run", "-d {image} c1"),
        ok("tasks list", "").but(Same::ButNumbers),
        ok("tasks list", "-q"),
        act("tasks ps", |bench| {
            let count = bench.ctr().ok(&["tasks", "ps", "c1"]).lines().count();
            (count > 1).to_string()
        }),
        fails("tasks ps", "none"),
        ok("tasks exec", "--exec-id e1 c1 sh -c 'echo $PATH; pwd'"),
        ok("tasks exec", "--exec-id e2 --cwd /tmp --user app c1 sh -c 'id; pwd'"),
        ok("tasks exec", "--exec-id e3 c1 head -c 5").with("typed"),
        fails("tasks exec", "--exec-id e4 c1 sh -c 'exit 9'"),
        fails("tasks exec", "--exec-id e5 c1 /no/such/program"),
        fails("tasks exec", "--exec-id e6 none true"),
        fails("tasks exec", "--exec-id e6 --user nobody-here c1 true"),
        ok("tasks exec", "-d --exec-id e7 c1 sleep 600"),
        fails("tasks exec", "--exec-id e7 c1 true"),
        ok("tasks kill", "-s KILL --exec-id e7 c1"),
        act("tasks delete", |bench| {
            let delete = || bench.ctr().run(&["tasks", "delete", "--exec-id", "e7", "c1"]).code;
            wait_for("the exec to end", || delete() == 137);
            String::new()
        }),
        ok("tasks metrics", "c1").but(Same::ButNumbers),
        act("tasks metrics", |bench| keys_of(&bench.ctr().ok(&["tasks", "metrics", "--format", "json", "c1"]))),
        fails("tasks metrics", "none"),
        ok("tasks pause", "c1"),
        ok("tasks list", "").but(Same::ButNumbers),
        fails("tasks pause", "none"),
        ok("tasks resume", "c1"),
        fails("tasks resume", "c1").but(Same::End("the runtime's own words")),
        ok("tasks list", "").but(Same::ButNumbers),
        fails("tasks checkpoint", "--image-path {dir}/checkpoint --work-path {dir}/criu c1")
            .may(Must::Agree).but(Same::End("CRIU's own words")),
        fails("tasks checkpoint", "none"),
        fails("containers delete", "c1").but(Same::End("the client's own words")),
        fails("tasks delete", "c1"),
        fails("tasks start", "c1"),
        fails("tasks kill", "none"),
        fails("tasks kill", "-s NONSENSE c1"),
        ok("tasks kill", "c1"),
        act("tasks kill", |bench| bench.stopped("c1")),
        ok("tasks list", "").but(Same::ButNumbers),
        fails("tasks kill", "c1"),
        fails("tasks exec", "--exec-id e8 c1 true").but(Same::End("FailedPrecondition; containerd has no class for it")),
        fails("tasks delete", "c1").may(Must::Agree),
        fails("tasks delete", "none"),
        ok("tasks start", "-d --pid-file {dir}/pid c1"),
        fails("tasks start", "none"),
        ok("tasks delete", "-f c1").may(Must::Agree),
        ok("containers delete", "c1"),
        act("tasks attach", attach),
        fails("tasks attach", "none"),
        ok("containers create", "{image} c3 false"),
        fails("tasks start", "c3"),
        ok("containers delete", "c3"),
        ok("containers create", "{image} c4 true"),
        ok("tasks start", "-d c4"),
        act("tasks start", |bench| bench.stopped("c4")),
        ok("tasks delete", "c4"),
        ok("containers delete", "c4"),
        ok("tasks list", ""),
        ok("containers list", ""),
    ],
    shim => [
        act("", import),
        ok("run", "-d {image} c1 sleep 600"),
        line("shim state", "shim --id c1 state").but(Same::ButNumbers),
        line("shim state", "shim --id none state").may(Must::Fail),
        line("shim state", "shim state").may(Must::Fail),
        act("", exec_spec),
        line("shim exec", "shim --id c1 exec --spec {dir}/exec.json --stdin /dev/null --stdout /dev/null --stderr /dev/null e1")
            .may(Must::Fail).but(Same::End("the trace of a panic")),
        line("shim exec", "shim --id c1 exec --spec {dir}/none.json --stdin /dev/null --stdout /dev/null --stderr /dev/null e2")
            .may(Must::Fail),
        line("shim start", "shim --id c1 start c1").may(Must::Fail).but(Same::End("the shim's own words")),
        line("shim start", "shim --id c1 start none").may(Must::Fail).but(Same::End("the shim's own words")),
        act("", created),
        line("shim state", "shim --id made state").but(Same::ButNumbers),
        line("shim start", "shim --id made start made"),
        line("shim state", "shim --id made state").but(Same::ButNumbers),
        ok("tasks delete", "-f made").may(Must::Agree),
        ok("containers delete", "made"),
        ok("tasks kill", "-s KILL c1"),
        act("tasks kill", |bench| bench.stopped("c1")),
        line("shim delete", "shim --id c1 delete none").may(Must::Fail).but(Same::End("the shim's own words")),
        line("shim delete", "shim --id c1 delete c1"),
        line("shim delete", "shim --id c1 delete c1").may(Must::Fail).but(Same::End("the shim's own words")),
        fails("tasks delete", "c1"),
        act("", forgotten),
        ok("containers delete", "c1"),
    ],
    install => [
        act("", import),
        fails("install", "{image}"),
        fails("install", "--path {dir}/opt example.org/none:1"),
        fails("install", "--path {dir}/opt {image}"),
        act("", |bench| { fs::create_dir(bench.path("opt")).unwrap(); String::new() }),
        ok("install", "--path {dir}/opt {image}"),
        act("install", |bench| bench.folder_names("opt/bin")),
        fails("install", "--path {dir}/opt {image}"),
        ok("install", "--replace --libs --path {dir}/opt {image}"),
    ],
    events => [
        act("", import),
        act("events", events),
    ],
}

/// An engine and what the steps on it have made.
struct Bench {
    // Ended before the engine, which sees to it that nothing is left in its folder.
    registry: std::cell::OnceCell<Registry>,
    host: Host,
    words: Vec<(&'static str, String)>,
}

struct Registry {
    child: Child,
    address: String,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Bench {
    fn new(kind: Kind) -> Self {
        // Much of what these steps make is held by nothing.
        let host = Host::started(kind);
        let image = busybox();
        let document = |digest: &str| -> serde_json::Value {
            let found = image.blobs.iter().find(|(of, _)| of.to_string() == digest).unwrap();
            serde_json::from_slice(&found.1).unwrap()
        };
        let text = |value: &serde_json::Value| value.as_str().unwrap().to_owned();
        let index: serde_json::Value = serde_json::from_slice(&image.index).unwrap();
        let manifest = text(&index["manifests"][0]["digest"]);
        let config = text(&document(&manifest)["config"]["digest"]);
        let chain0 = text(&document(&config)["rootfs"]["diff_ids"][0]);
        let second = text(&document(&config)["rootfs"]["diff_ids"][1]);
        let chain1 = Digest::sha256_of(format!("{chain0} {second}").as_bytes()).to_string();
        let of = |text: &str| Digest::sha256_of(text.as_bytes()).to_string();
        let words = vec![
            ("{dir}", host.folder().to_str().unwrap().to_owned()),
            ("{ns}", host.namespace.clone()),
            ("{image}", NAME.to_owned()),
            ("{manifest}", manifest),
            ("{config}", config),
            ("{chain0}", chain0),
            ("{chain1}", chain1),
            ("{some}", of("some bytes")),
            ("{more}", of("more bytes")),
            ("{none}", of("nowhere")),
        ];
        Bench { registry: std::cell::OnceCell::new(), host, words }
    }

    fn ctr(&self) -> Ctr {
        self.host.stock_ctr()
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.host.folder().join(name)
    }

    fn folder_names(&self, name: &str) -> String {
        let entries = fs::read_dir(self.path(name)).unwrap().flatten();
        let names: BTreeSet<_> = entries.map(|entry| entry.file_name().into_string().unwrap()).collect();
        format!("{names:?}")
    }

    /// Debian's registry on a port of the loopback, its files in this engine's folder.
    fn registry(&self) -> &str {
        let start = || {
            let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
            let address = format!("127.0.0.1:{port}");
            let config = self.path("registry.yml");
            let text = format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
                self.path("registry").display()
            );
            fs::write(&config, text).unwrap();
            let child = Command::new(REGISTRY)
                .arg("serve")
                .arg(config)
                .stdin(Stdio::null())
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .unwrap();
            let registry = Registry { child, address };
            wait_for("the registry to serve", || TcpStream::connect(&registry.address).is_ok());
            registry
        };
        &self.registry.get_or_init(start).address
    }

    /// The words of a command line, with their placeholders filled in. Quotes hold words together.
    fn split(&self, line: &str) -> Vec<String> {
        let mut words = Vec::new();
        let (mut word, mut quoted, mut any) = (String::new(), false, false);
        for letter in line.chars() {
            match letter {
                '\'' => (quoted, any) = (!quoted, true),
                ' ' if !quoted => {
                    if any {
                        words.push(std::mem::take(&mut word));
                    }
                    any = false;
                }
                other => {
                    word.push(other);
                    any = true;
                }
            }
        }
        if any {
            words.push(word);
        }
        for word in &mut words {
            for (name, value) in &self.words {
                *word = word.replace(name, value);
            }
            if let Some(registry) = self.registry.get() {
                *word = word.replace("{registry}", &registry.address);
            }
        }
        words
    }

    fn stopped(&self, id: &str) -> String {
        let stopped = |line: &str| line.starts_with(&format!("{id} ")) && line.contains("STOPPED");
        wait_for("the task to stop", || self.ctr().ok(&["tasks", "ls"]).lines().any(stopped));
        String::new()
    }

    /// What a step came to, in a form that can be compared.
    fn outcome(&self, step: &Step) -> (Option<bool>, String) {
        let (words, input) = match &step.run {
            Do::Act(run) => return (None, self.normal(&run(self), step.same)),
            Do::Ctr(words, input) => (self.split(&format!("{} {words}", step.leaf)), *input),
            Do::Line(line) => (self.split(line), ""),
        };
        let words: Vec<&str> = words.iter().map(String::as_str).collect();
        let ended = if input.is_empty() {
            self.ctr().run(&words)
        } else {
            self.ctr().with_input(&words, input.as_bytes())
        };
        let worked = ended.code == 0;
        if matches!(step.same, Same::End(_)) {
            return (Some(worked), format!("exit {}", ended.code));
        }
        let said = if worked { self.normal(&ended.stderr, step.same) } else { class(&ended.stderr) };
        let text = format!("exit {}\n{}\nstderr: {said}", ended.code, self.normal(&ended.stdout, step.same));
        (Some(worked), text)
    }

    fn normal(&self, text: &str, same: Same) -> String {
        static RULES: LazyLock<Vec<(Regex, &str)>> = LazyLock::new(|| {
            [
                (r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?( ?(Z|UTC|[+-]\d\d:?\d\d))*( m=\S+)?", "TIME"),
                (r"(Less than|About) an? \w+|\d+ (second|minute)s?( ago)?", "AGE"),
                (r"\b\d+(\.\d+)?(ns|µs|ms|s)\b", "DURATION"),
                (r"/snapshots/\d+/", "/snapshots/N/"),
                (r#"(/run/containerd/fifo/)\d+"#, "${1}N"),
                (r"[ \t]+", " "),
                (r"(?m) +$", ""),
            ]
            .map(|(rule, with)| (Regex::new(rule).unwrap(), with))
            .into()
        });
        let mut text =
            text.replace(self.host.folder().to_str().unwrap(), "DIR").replace(&self.host.namespace, "NS");
        if let Some(registry) = self.registry.get() {
            let (host, port) = registry.address.split_once(':').unwrap();
            text = text.replace(&registry.address, "REGISTRY").replace(&format!("{host}:{port}"), "REGISTRY");
        }
        for (rule, with) in RULES.iter() {
            text = rule.replace_all(&text, *with).into_owned();
        }
        // Go's maps have no order.
        static LABELS: LazyLock<Regex> =
            LazyLock::new(|| Regex::new(r"[^\s,=]+=[^\s,]*(,[^\s,=]+=[^\s,]*)+").unwrap());
        let sorted = |found: &regex::Captures<'_>| {
            let mut labels: Vec<_> = found[0].split(',').collect();
            labels.sort_unstable();
            labels.join(",")
        };
        text = LABELS.replace_all(&text, sorted).into_owned();
        let replace = |rule: &str, with: &str, text: &str| {
            Regex::new(rule).unwrap().replace_all(text, with).into_owned()
        };
        match same {
            Same::All | Same::End(_) => text,
            Same::ButNumbers => replace(r"\d+(\.\d+)?( [KMG]iB)?", "N", &text),
            Same::ButDigests => replace(r"sha256:[0-9a-f]{64}|\d+(\.\d+)? ([KMG]i)?B", "DIGEST", &text),
            Same::Lines => text.lines().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join("\n"),
        }
    }
}

/// The class that containerd's client puts at the end of an error it got from an engine; what has none is the client's own,
/// and then whether there is any text.
fn class(stderr: &str) -> String {
    let last = stderr.lines().rfind(|line| line.starts_with("ctr: "));
    let classes = [
        "not found",
        "already exists",
        "failed precondition",
        "invalid argument",
        "unavailable",
        "not implemented",
        "out of range",
        "permission denied",
        "unknown",
        "context deadline exceeded",
        "canceled",
    ];
    match last {
        None => "no error of ctr".to_owned(),
        Some(line) => {
            let found = classes.iter().find(|class| line.trim_end().ends_with(&format!(": {class}")));
            found.map_or_else(|| "an error without a class".to_owned(), |class| format!("class {class}"))
        }
    }
}

fn prepare_archive(bench: &Bench) -> String {
    busybox().write(&bench.path("busybox.tar")).unwrap();
    String::new()
}

fn import(bench: &Bench) -> String {
    bench.host.import();
    String::new()
}

/// What is in the archive that was exported, and what its documents say.
fn exported(bench: &Bench) -> String {
    use std::io::Read as _;
    let mut archive = tar::Archive::new(fs::File::open(bench.path("exported.tar")).unwrap());
    let mut lines = BTreeSet::new();
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        let mut line = format!("{} {}", entry.path().unwrap().display(), entry.size());
        if line.contains("json") || line.contains("oci-layout") {
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            line = format!("{line} {text}");
        }
        lines.insert(line);
    }
    lines.into_iter().collect::<Vec<_>>().join("\n")
}

/// An ingest whose client waits for more input, as others see it.
fn a_stopped_ingest(bench: &Bench) -> String {
    use std::io::Write as _;
    let mut command = bench.ctr().command(&["content", "ingest", "ref-slow"]);
    let mut child =
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(&vec![b'x'; 3 << 20]).unwrap();
    let mut shown = String::new();
    wait_for("the ingest to be listed", || {
        shown = bench.ctr().ok(&["content", "active"]);
        shown.contains("ref-slow")
    });
    drop(stdin);
    assert_eq!(finish(child, "content ingest").code, 0);
    let after = bench.ctr().ok(&["content", "active"]);
    // How much had come in by then is not the same every time.
    let shown = Regex::new(r"\d+(\.\d+)? ?[KMG]i?B").unwrap().replace_all(&shown, "SIZE").into_owned();
    let lines = |text: &str| text.lines().collect::<BTreeSet<_>>().into_iter().collect::<Vec<_>>().join("\n");
    format!("{}\n{}", lines(&shown), lines(&after))
}

/// The groups of a document of metrics. Within them, what is zero at the moment is not printed.
fn keys_of(json: &str) -> String {
    let document: serde_json::Value = serde_json::from_str(json).unwrap();
    let groups = document.as_object().unwrap().iter().filter(|(_, group)| group.is_object());
    groups.map(|(name, _)| format!("{name}\n")).collect()
}

fn attach(bench: &Bench) -> String {
    let ctr = bench.ctr();
    ctr.ok(&["run", "-d", NAME, "asks", "sh", "-c", "read line; echo got $line; exit 5"]);
    let ended = ctr.with_input(&["tasks", "attach", "asks"], b"hello\n");
    // It deletes the task, too.
    ctr.ok(&["containers", "delete", "asks"]);
    format!("{} {}", ended.code, ended.stdout)
}

/// A task that has been created and not started, which no command of this client leaves.
fn created(bench: &Bench) -> String {
    use proto::containerd::services::snapshots::v1::MountsRequest;
    use proto::containerd::services::snapshots::v1::snapshots_client::SnapshotsClient;
    use proto::containerd::services::tasks::v1::CreateTaskRequest;
    use proto::containerd::services::tasks::v1::tasks_client::TasksClient;
    bench.ctr().ok(&["containers", "create", NAME, "made", "sleep", "600"]);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let channel = channel(&bench.host.address()).await;
        let mounts = MountsRequest { snapshotter: "overlayfs".into(), key: "made".into() };
        let mounts = in_namespace(&bench.host.namespace, mounts);
        let mounts = SnapshotsClient::new(channel.clone()).mounts(mounts).await.unwrap().into_inner().mounts;
        let create =
            CreateTaskRequest { container_id: "made".into(), rootfs: mounts, ..CreateTaskRequest::default() };
        TasksClient::new(channel).create(in_namespace(&bench.host.namespace, create)).await.unwrap();
    });
    String::new()
}

/// Deletes the task that its shim was told to forget: this client does not ask for that when it cannot see the task.
fn forgotten(bench: &Bench) -> String {
    use proto::containerd::services::tasks::v1::DeleteTaskRequest;
    use proto::containerd::services::tasks::v1::tasks_client::TasksClient;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let answer = runtime.block_on(async {
        let delete = in_namespace(&bench.host.namespace, DeleteTaskRequest { container_id: "c1".into() });
        TasksClient::new(channel(&bench.host.address()).await).delete(delete).await
    });
    bench.host.assert_nothing_left();
    format!("{:?}", answer.map(|_| ()).map_err(|status| status.code()))
}

/// The process that `shim exec` is told to start.
fn exec_spec(bench: &Bench) -> String {
    let spec = serde_json::json!({
        "user": {"uid": 0, "gid": 0}, "args": ["sleep", "600"], "env": ["PATH=/bin"], "cwd": "/",
    });
    fs::write(bench.path("exec.json"), spec.to_string()).unwrap();
    String::new()
}

/// What a listener hears of one run: the topics, and what the events say.
fn events(bench: &Bench) -> String {
    let ctr = bench.ctr();
    let out = bench.path("events");
    let mut command = ctr.command(&["events"]);
    command.stdin(Stdio::null()).stdout(fs::File::create(&out).unwrap()).stderr(Stdio::null());
    let child = command.spawn().unwrap();
    let seen = || fs::read_to_string(&out).unwrap();
    // Listens, when it has heard of one of these.
    let mut number = 0;
    wait_for("the listener to hear", || {
        number += 1;
        ctr.ok(&["namespaces", "create", &format!("beat-{number}")]);
        seen().contains("/namespaces/create")
    });
    ctr.ok(&["run", "--rm", NAME, "heard", "true"]);
    ctr.ok(&["images", "tag", NAME, "example.org/tag:1"]);
    ctr.ok(&["images", "rm", "example.org/tag:1"]);
    wait_for("the last event", || seen().contains("/images/delete"));
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    finish(child, "events");
    // gantryd tells the first subscriber what nobody could hear since its start.
    let told = |line: &&str| line.contains("heard") || line.contains("example.org/tag:1");
    let numbers = Regex::new(r#""(pid)":\d+"#).unwrap();
    let text = seen().lines().filter(told).collect::<Vec<_>>().join("\n");
    numbers.replace_all(&text, "\"$1\":N").into_owned()
}

fn run(name: &str) {
    if !ready(&[CONTAINERD, STOCK_CTR, RUNC, BUSYBOX, REGISTRY]) {
        return;
    }
    let steps = GROUPS.iter().find(|(group, _)| *group == name).unwrap().1;
    let (theirs, ours) = (Bench::new(Kind::Containerd), Bench::new(Kind::Gantry));
    let mut wrong = Vec::new();
    for (number, step) in steps.iter().enumerate() {
        let what = match &step.run {
            Do::Ctr(words, _) => format!("{} {words}", step.leaf),
            Do::Line(line) => (*line).to_owned(),
            Do::Act(_) => format!("what {:?} does", step.leaf),
        };
        let (their, our) = (theirs.outcome(step), ours.outcome(step));
        let must = match step.must {
            Must::Work => Some(true),
            Must::Fail => Some(false),
            Must::Agree => None,
        };
        for (engine, outcome) in [("containerd", &their), ("gantryd", &our)] {
            if let (Some(must), Some(worked)) = (must, outcome.0)
                && must != worked
            {
                let word = if must { "works" } else { "fails" };
                wrong.push(format!(
                    "{number}: ctr {what}: expected that it {word} with {engine}:\n{}",
                    outcome.1
                ));
            }
        }
        if their.1 != our.1 {
            wrong.push(format!("{number}: ctr {what}\n--- containerd\n{}\n--- gantryd\n{}", their.1, our.1));
        }
    }
    println!("{name}: {} steps", steps.len());
    assert!(wrong.is_empty(), "{} of {} steps:\n\n{}\n", wrong.len(), steps.len(), wrong.join("\n\n"));
}

/// The subcommands of `words`, as its help lists them.
fn subcommands(words: &[String]) -> Vec<String> {
    let output = Command::new(STOCK_CTR).args(words).arg("--help").output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let lines = text.lines().skip_while(|line| *line != "COMMANDS:").skip(1);
    let lines = lines.take_while(|line| line.starts_with("   "));
    // The first of the names that it has.
    lines.map(|line| line.trim_start().split([',', ' ']).next().unwrap().to_owned()).collect()
}

fn leaves(words: &[String]) -> Vec<String> {
    let below = subcommands(words);
    if below.is_empty() {
        return vec![words.join(" ")];
    }
    below.iter().flat_map(|name| leaves(&[words, std::slice::from_ref(name)].concat())).collect()
}

#[test]
fn every_subcommand_is_in_a_step_or_is_listed() {
    if !ready(&[STOCK_CTR]) {
        return;
    }
    let all: BTreeSet<String> =
        subcommands(&[]).into_iter().filter(|name| name != "help").flat_map(|name| leaves(&[name])).collect();
    assert!(all.len() > 60, "{all:?}");
    let steps = || GROUPS.iter().flat_map(|(_, steps)| steps.iter());
    let tried: BTreeSet<String> =
        steps().map(|step| step.leaf.to_owned()).filter(|leaf| !leaf.is_empty()).collect();
    let worked: BTreeSet<String> =
        steps().filter(|step| step.must == Must::Work).map(|step| step.leaf.to_owned()).collect();
    let cannot: BTreeSet<String> = CANNOT.iter().map(|(leaf, _)| (*leaf).to_owned()).collect();
    for (leaf, why) in CANNOT {
        println!("cannot work here: {leaf}: {why}");
        assert!(all.contains(leaf), "{leaf} is no subcommand");
        assert!(!worked.contains(leaf), "{leaf} works, and is listed as one that cannot");
    }
    let missing: Vec<_> =
        all.iter().filter(|leaf| !worked.contains(*leaf) && !cannot.contains(*leaf)).collect();
    assert!(missing.is_empty(), "no step in which these work: {missing:?}");
    let unknown: Vec<_> = tried.difference(&all).collect();
    assert!(unknown.is_empty(), "no subcommands: {unknown:?}");
    println!("{} subcommands, {} steps", all.len(), steps().count());
}
