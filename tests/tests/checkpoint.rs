//! Checkpoints as blobs and as images, and containers from them: the engine, its shim, Debian's `ctr` and ours.
//!
//! CRIU needs a kernel that few machines have. What stands in for it is the runtime alone: a program that hands everything to
//! runc but `checkpoint`, which writes a folder and ends the container unless it is to go on, and `restore`, which wants that
//! folder's files and then runs the container anew. All between the client and the runtime is real.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use oci::Digest;
use proto::containerd::runc::v1::CheckpointOptions;
use proto::containerd::services::content::v1::content_client::ContentClient;
use proto::containerd::services::content::v1::{WriteAction, WriteContentRequest};
use proto::containerd::services::tasks::v1::tasks_client::TasksClient;
use proto::containerd::services::tasks::v1::{CheckpointTaskRequest, CreateTaskRequest};
use proto::containerd::types::Descriptor;
use tests::client::{channel, finish, in_namespace};
use tests::host::{Host, RUNC, STOCK_CTR};
use tests::image::{self, BUSYBOX, Layer, NAME};
use tests::terminal::Terminal;
use tests::{ready, wait_for};
use tonic::{Code, Status};

const CHECKPOINT: &str = "application/vnd.containerd.container.criu.checkpoint.criu.tar";

/// The lease that checkpoints are made under.
const LEASE: &str = "held";

/// Written to a file, with `MARKS` for the folder that it notes its arguments in.
const RUNTIME: &str = r#"#!/bin/sh
set -eu
case " $* " in
*" checkpoint "* | *" restore "*) ;;
*) exec runc "$@" ;;
esac
globals=
while [ "$1" != checkpoint ] && [ "$1" != restore ]; do
    globals="$globals $1"
    shift
done
verb=$1
shift
echo "$*" >MARKS/$verb
image= work= rest=
while [ $# -gt 1 ]; do
    case $1 in
    --image-path) image=$2; shift ;;
    --work-path) work=$2; shift ;;
    --bundle | --pid-file | --console-socket) rest="$rest $1 $2"; shift ;;
    --detach | --no-pivot) rest="$rest $1" ;;
    esac
    shift
done
mkdir -p "$work"
[ ! -e MARKS/fail ] || { echo "criu failed: type NOTIFY errno 0" >&2; exit 1; }
if [ $verb = checkpoint ]; then
    while [ -e MARKS/wait ]; do sleep 0.02; done
    mkdir -p "$image/sub"
    echo "state of $1" >"$image/pages-1.img"
    echo "[]" >"$image/sub/descriptors.json"
    case $(cat MARKS/checkpoint) in
    *--leave-running*) ;;
    *) runc $globals resume "$1"; runc $globals kill "$1" KILL ;;
    esac
else
    cat "$image/pages-1.img" "$image/sub/descriptors.json" >MARKS/state
    exec runc $globals run $rest "$1"
fi
"#;

fn runtime(host: &Host) -> (String, PathBuf) {
    let marks = host.folder().join("marks");
    fs::create_dir(&marks).unwrap();
    let program = host.folder().join("runtime");
    fs::write(&program, RUNTIME.replace("MARKS", marks.to_str().unwrap())).unwrap();
    fs::set_permissions(&program, fs::Permissions::from_mode(0o755)).unwrap();
    (program.display().to_string(), marks)
}

fn block_on<T>(future: impl Future<Output = T>) -> T {
    tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(future)
}

/// What it writes is held by [`LEASE`], as nothing else holds it yet.
fn checkpoint(host: &Host, id: &str, options: &CheckpointOptions) -> Result<Vec<Descriptor>, Status> {
    block_on(async {
        let mut tasks = TasksClient::new(channel(&host.address()).await);
        let message = CheckpointTaskRequest {
            container_id: id.into(),
            options: Some(proto::any::pack(options)),
            ..CheckpointTaskRequest::default()
        };
        let mut request = in_namespace(&host.namespace, message);
        request.metadata_mut().insert("containerd-lease", LEASE.parse().unwrap());
        let answer = tasks.checkpoint(request).await?;
        Ok(answer.into_inner().descriptors)
    })
}

/// Puts a blob into the store and makes a task that is to be restored from it.
fn create_from(host: &Host, id: &str, media_type: &str, blob: &[u8]) -> Result<u32, Status> {
    block_on(async {
        let digest = Digest::sha256_of(blob).to_string();
        let write = WriteContentRequest {
            action: WriteAction::Commit.into(),
            r#ref: digest.clone(),
            expected: digest.clone(),
            data: blob.to_vec().into(),
            labels: [("containerd.io/gc.root".to_owned(), "x".to_owned())].into(),
            ..WriteContentRequest::default()
        };
        let mut content = ContentClient::new(channel(&host.address()).await);
        let request = in_namespace(&host.namespace, futures::stream::iter([write]));
        let mut answers = content.write(request).await.unwrap().into_inner();
        while let Ok(Some(_)) = answers.message().await {}
        let descriptor = Descriptor {
            media_type: media_type.into(),
            digest,
            size: blob.len() as i64,
            // What containerd's CRI plugin says to itself by this is not for an image to say.
            annotations: [("RestoreFromPath".to_owned(), "/etc".to_owned())].into(),
        };
        let message = CreateTaskRequest {
            container_id: id.into(),
            checkpoint: Some(descriptor),
            ..CreateTaskRequest::default()
        };
        let mut tasks = TasksClient::new(channel(&host.address()).await);
        Ok(tasks.create(in_namespace(&host.namespace, message)).await?.into_inner().pid)
    })
}

fn is_empty(folder: PathBuf) -> bool {
    fs::read_dir(folder).map_or(0, Iterator::count) == 0
}

#[test]
fn a_container_is_checkpointed_to_an_image_and_restored_from_it() {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX]) {
        return;
    }
    let mut host = Host::gantry();
    let (program, marks) = runtime(&host);
    let stock = host.stock_ctr();
    let archive = host.folder().join("busybox.tar");
    image::busybox().write(&archive).unwrap();
    stock.ok(&["images", "import", archive.to_str().unwrap()]);
    let run = ["run", "-d", "--runc-binary", &program, NAME, "c", "sh", "-c", "echo new > /file; sleep 1000"];
    stock.ok(&run);

    stock.ok(&["leases", "create", "--id", LEASE]);
    // Into a folder, as it has always been.
    let folder = host.folder().join("saved");
    let to_folder =
        CheckpointOptions { image_path: folder.display().to_string(), ..CheckpointOptions::default() };
    assert!(checkpoint(&host, "c", &to_folder).unwrap().is_empty());
    assert!(folder.join("pages-1.img").exists());
    assert!(fs::read_to_string(marks.join("checkpoint")).unwrap().contains("--leave-running"));

    // Into the content store: the state, and the spec.
    let found = checkpoint(&host, "c", &CheckpointOptions::default()).unwrap();
    let kinds: Vec<&str> = found.iter().map(|descriptor| descriptor.media_type.as_str()).collect();
    assert_eq!(kinds, [CHECKPOINT, "application/vnd.containerd.container.checkpoint.config.v1+proto"]);
    assert!(is_empty(host.root().join("checkpoints")));
    for descriptor in &found {
        let bytes = stock.ok(&["content", "get", &descriptor.digest]).len();
        assert!(bytes > 0);
        assert!(stock.ok(&["content", "ls"]).contains(&descriptor.digest));
    }
    // One that fails says why, and leaves nothing.
    fs::write(marks.join("fail"), "").unwrap();
    let failed = checkpoint(&host, "c", &CheckpointOptions::default()).unwrap_err();
    assert!(failed.message().contains("criu failed"), "{failed}");
    assert!(is_empty(host.root().join("checkpoints")));
    fs::remove_file(marks.join("fail")).unwrap();

    stock.ok(&["leases", "rm", LEASE]);

    // The way of Debian's client: an image of it, and a container from that, its files and its state.
    let saved = "docker.io/library/saved:1";
    stock.ok(&["containers", "checkpoint", "--rw", "--image", "--task", "c", saved]);
    stock.ok(&["tasks", "rm", "--force", "c"]);
    stock.ok(&["containers", "rm", "c"]);
    stock.ok(&["containers", "restore", "--rw", "--live", "r", saved]);
    assert_eq!(fs::read_to_string(marks.join("state")).unwrap(), "state of c\n[]\n");
    let restore = fs::read_to_string(marks.join("restore")).unwrap();
    let work = host.root().join("io.containerd.runtime.v2.task").join(&host.namespace).join("r");
    assert!(restore.contains(&format!("--image-path {}/checkpoint ", work.display())), "{restore}");
    assert!(restore.contains("--detach") && restore.trim_end().ends_with(" r"), "{restore}");
    assert_eq!(stock.ok(&["tasks", "exec", "--exec-id", "e", "r", "cat", "/file"]), "new\n");
    // It goes on under the next engine, and what it was restored from goes with it.
    host.kill();
    host.start();
    assert!(stock.ok(&["tasks", "ls"]).contains("RUNNING"));
    stock.ok(&["tasks", "rm", "--force", "r"]);
    assert!(!work.exists());
    stock.ok(&["containers", "rm", "r"]);
    host.assert_nothing_left();
}

#[test]
fn checkpoints_from_anywhere_reach_no_further_than_their_folder() {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX]) {
        return;
    }
    let host = Host::gantry();
    let (program, marks) = runtime(&host);
    let stock = host.stock_ctr();
    let archive = host.folder().join("busybox.tar");
    image::busybox().write(&archive).unwrap();
    stock.ok(&["images", "import", archive.to_str().unwrap()]);
    host.ctr().ok(&["containers", "create", "--runc-binary", &program, NAME, "c", "true"]);
    let secret = host.folder().join("secret");
    fs::write(&secret, "as it was").unwrap();
    let target = secret.to_str().unwrap();
    let good = || Layer::default().file("pages-1.img", 0o600, b"state\n");
    let refused = |blob: Vec<u8>, media_type: &str, code: Code, words: &str| {
        let status = create_from(&host, "c", media_type, &blob).unwrap_err();
        assert_eq!(status.code(), code, "{status}");
        assert!(status.message().contains(words), "{status}");
        for folder in [host.state(), host.root()] {
            assert!(is_empty(folder.join("io.containerd.runtime.v2.task").join(&host.namespace)), "{words}");
        }
        assert_eq!(fs::read_to_string(&secret).unwrap(), "as it was");
        assert!(!marks.join("restore").exists());
    };
    // Names for the logs that CRIU writes, leading elsewhere; and a way through one.
    refused(good().symlink("restore.log", target).finish(), CHECKPOINT, Code::InvalidArgument, "restore.log");
    let through =
        good().symlink("sub", host.folder().to_str().unwrap()).file("sub/secret", 0o600, b"changed");
    refused(through.finish(), CHECKPOINT, Code::InvalidArgument, "sub");
    let device = good().entry(tar::EntryType::Fifo, "sub/fifo", "", 0o600, b"");
    refused(device.finish(), CHECKPOINT, Code::InvalidArgument, "fifo");
    refused(b"not an archive".repeat(100), CHECKPOINT, Code::InvalidArgument, "unpack checkpoint");
    let layer = "application/vnd.oci.image.layer.v1.tar";
    refused(good().finish(), layer, Code::InvalidArgument, "media type");

    // What would climb out of it stays in it, as files there that nobody asks for.
    let climbing = good().file("../../climbed", 0o600, b"x").file("sub/descriptors.json", 0o600, b"[]\n");
    create_from(&host, "c", CHECKPOINT, &climbing.finish()).unwrap();
    let work = host.root().join("io.containerd.runtime.v2.task").join(&host.namespace).join("c");
    assert!(work.join("checkpoint/climbed").exists());
    assert_eq!(fs::metadata(work.join("checkpoint")).unwrap().permissions().mode() & 0o7777, 0o700);
    stock.ok(&["tasks", "rm", "--force", "c"]);
    assert!(!work.exists());
    stock.ok(&["containers", "rm", "c"]);
    host.assert_nothing_left();
}

/// An engine with the image, and the container `c`, which writes a line to its `/file` each time it is started.
fn with_container() -> Option<(Host, String, PathBuf)> {
    if !ready(&[STOCK_CTR, RUNC, BUSYBOX]) {
        return None;
    }
    let host = Host::gantry();
    let (program, marks) = runtime(&host);
    host.import();
    starts(&host, &program);
    Some((host, program, marks))
}

fn starts(host: &Host, program: &str) {
    let script = "echo started >> /file; sleep 1000";
    host.ctr().ok(&["run", "-d", "--runc-binary", program, NAME, "c", "sh", "-c", script]);
    wait_for("the container to begin", || lines(host, "c") == 1);
}

/// How often a container says that it was started.
fn lines(host: &Host, id: &str) -> usize {
    let read = host.ctr().run(&["tasks", "exec", "--exec-id", "e", id, "cat", "/file"]);
    read.stdout.matches("started\n").count()
}

fn task(host: &Host, id: &str) -> String {
    let tasks = host.ctr().ok(&["tasks", "ls"]);
    let row = tasks.lines().find(|line| line.split_whitespace().next() == Some(id));
    row.map(|row| row.split_whitespace().last().unwrap().to_owned()).unwrap_or_default()
}

fn removes(host: &Host, id: &str) {
    host.ctr().ok(&["tasks", "rm", "--force", id]);
    host.ctr().ok(&["containers", "rm", id]);
}

#[test]
fn checkpoints_go_between_our_ctr_and_debians() {
    let Some((host, program, marks)) = with_container() else { return };
    let (ours, stock) = (host.ctr(), host.stock_ctr());
    let saved = "example.org/saved:1";
    for (maker, restorer) in [(&ours, &ours), (&ours, &stock), (&stock, &ours)] {
        maker.ok(&["containers", "checkpoint", "--rw", "--image", "--task", "c", saved]);
        assert_eq!(task(&host, "c"), "RUNNING");
        assert_eq!(ours.ok(&["leases", "ls", "-q"]), "");
        removes(&host, "c");
        // Nothing but the image holds what was saved.
        ours.ok(&["gc"]);
        restorer.ok(&["containers", "restore", "--rw", "--live", "r", saved]);
        assert_eq!(fs::read_to_string(marks.join("state")).unwrap(), "state of c\n[]\n");
        fs::remove_file(marks.join("state")).unwrap();
        wait_for("what stands in for CRIU to start it with its files", || lines(&host, "r") == 2);
        removes(&host, "r");
        // Without its state and its files it starts anew.
        restorer.ok(&["containers", "restore", "r", saved]);
        wait_for("the container to begin", || lines(&host, "r") == 1);
        assert!(!marks.join("state").exists());
        removes(&host, "r");
        ours.ok(&["images", "rm", "--sync", saved]);
        starts(&host, &program);
    }
    // One without processes has the spec all the same, as Debian's has not.
    ours.ok(&["containers", "checkpoint", "--rw", "c", saved]);
    removes(&host, "c");
    for restorer in [&ours, &stock] {
        restorer.ok(&["containers", "restore", "--rw", "r", saved]);
        wait_for("the container to begin", || lines(&host, "r") == 2);
        removes(&host, "r");
    }
    assert!(ours.fails(&["containers", "restore", "--live", "r", saved]).contains("--live"));
    // It goes to another place as an archive.
    let archive = host.folder().join("saved.tar");
    let archive = archive.to_str().unwrap();
    ours.ok(&["images", "export", archive, saved]);
    ours.ok(&["images", "rm", "--sync", saved]);
    ours.ok(&["images", "import", "--no-unpack", archive]);
    ours.ok(&["containers", "restore", "--rw", "r", saved]);
    wait_for("the container to begin", || lines(&host, "r") == 2);
    removes(&host, "r");
    host.assert_nothing_left();
}

#[test]
fn a_task_goes_on_whatever_comes_of_its_checkpoint() {
    let Some((host, _, marks)) = with_container() else { return };
    let ctr = host.ctr();
    let checkpoint = ["containers", "checkpoint", "--task", "c", "example.org/saved:1"];
    let nothing_left = || {
        assert_eq!((task(&host, "c"), ctr.ok(&["leases", "ls", "-q"])), ("RUNNING".into(), String::new()));
        assert!(!ctr.ok(&["images", "ls", "-q"]).contains("saved"));
        assert!(is_empty(host.root().join("checkpoints")));
    };
    fs::write(marks.join("fail"), "").unwrap();
    assert!(ctr.fails(&checkpoint).contains("criu failed"));
    nothing_left();
    fs::remove_file(marks.join("fail")).unwrap();
    let error = ctr.fails(&["containers", "checkpoint", "c", NAME]);
    assert!(error.contains(NAME) && error.contains("exists"), "{error}");
    nothing_left();
    // Somebody ends ctr meanwhile, or it has no more time.
    fs::write(marks.join("wait"), "").unwrap();
    fs::remove_file(marks.join("checkpoint")).unwrap();
    let child = ctr.spawn(&checkpoint);
    wait_for("the checkpoint to begin", || marks.join("checkpoint").exists());
    kill(Pid::from_raw(child.id() as i32), Signal::SIGTERM).unwrap();
    fs::remove_file(marks.join("wait")).unwrap();
    assert_eq!(finish(child, "the checkpoint").code, 143);
    wait_for("the engine to end it", || is_empty(host.root().join("checkpoints")));
    nothing_left();
    fs::write(marks.join("wait"), "").unwrap();
    fs::remove_file(marks.join("checkpoint")).unwrap();
    let late = ctr.spawn(&[&["--timeout", "1s"], &checkpoint[..]].concat());
    let begun = Instant::now();
    wait_for("the checkpoint to begin", || marks.join("checkpoint").exists());
    wait_for("the time to be over", || begun.elapsed() > Duration::from_secs(2));
    fs::remove_file(marks.join("wait")).unwrap();
    let ended = finish(late, "the checkpoint");
    assert!(ended.stderr.contains("--timeout"), "{ended:?}");
    assert_eq!(task(&host, "c"), "RUNNING");
    for lease in ctr.ok(&["leases", "ls", "-q"]).lines() {
        ctr.ok(&["leases", "rm", lease]);
    }
    // One that stood still before stays so.
    ctr.ok(&["tasks", "pause", "c"]);
    ctr.ok(&checkpoint);
    assert_eq!(task(&host, "c"), "PAUSED");
    ctr.ok(&["tasks", "resume", "c"]);
    removes(&host, "c");
    host.assert_nothing_left();
}

#[test]
fn a_container_that_cannot_be_restored_is_not_there() {
    let Some((host, _, marks)) = with_container() else { return };
    let ctr = host.ctr();
    let saved = "example.org/saved:1";
    ctr.ok(&["containers", "checkpoint", "--task", "c", saved]);
    let none = || {
        let snapshots = ctr.ok(&["snapshots", "ls"]);
        assert!(!snapshots.lines().any(|line| line.starts_with("r ")), "{snapshots}");
        assert_eq!(ctr.ok(&["containers", "ls", "-q"]), "c\n");
        assert_eq!(ctr.ok(&["leases", "ls", "-q"]), "");
    };
    assert!(ctr.fails(&["containers", "restore", "r", NAME]).contains("no checkpoint"));
    assert!(ctr.fails(&["containers", "restore", "r", "example.org/none:1"]).contains("example.org/none:1"));
    assert!(ctr.fails(&["containers", "restore", "--rw", "r", saved]).contains("--rw"));
    none();
    // Another's name: that one stays as it is.
    assert!(ctr.fails(&["containers", "restore", "c", saved]).contains("exists"));
    assert_eq!((task(&host, "c"), lines(&host, "c")), ("RUNNING".into(), 1));
    none();
    // CRIU does not take what was saved.
    fs::write(marks.join("fail"), "").unwrap();
    let error = ctr.fails(&["containers", "restore", "--live", "r", saved]);
    assert!(error.contains("restore failed"), "{error}");
    none();
    fs::remove_file(marks.join("fail")).unwrap();
    removes(&host, "c");
    host.assert_nothing_left();
}

#[test]
fn a_task_is_checkpointed_to_an_image_that_is_named_by_it() {
    let Some((host, program, marks)) = with_container() else { return };
    let (ours, stock) = (host.ctr(), host.stock_ctr());
    for (maker, restorable) in [(&ours, true), (&stock, false)] {
        let name = maker.ok(&["tasks", "checkpoint", "c"]);
        let name = name.trim();
        assert!(name.starts_with("containerd.io/checkpoint/c:"), "{name}");
        assert_eq!(task(&host, "c"), "RUNNING");
        assert!(ours.ok(&["images", "ls"]).contains("containerd.io/checkpoint=true"));
        ours.ok(&["gc"]);
        let restore = ["containers", "restore", "--rw", "--live", "r", name];
        if restorable {
            // Both would have one control group, and with the one the other would be removed.
            removes(&host, "c");
            ours.ok(&restore);
            wait_for("the container to go on", || lines(&host, "r") == 2);
            removes(&host, "r");
            starts(&host, &program);
        } else {
            // Debian's does not say there by what it is to be restored.
            assert!(ours.fails(&restore).contains("io.containerd.checkpoint.snapshotter"));
        }
        ours.ok(&["images", "rm", name]);
    }
    // With its processes in the image, the task may end.
    let name = ours.ok(&["tasks", "checkpoint", "--exit", "c"]);
    assert!(!fs::read_to_string(marks.join("checkpoint")).unwrap().contains("--leave-running"));
    wait_for("the task to end", || task(&host, "c") == "STOPPED");
    removes(&host, "c");
    stock.ok(&["containers", "restore", "--rw", "--live", "r", name.trim()]);
    wait_for("the container to go on", || lines(&host, "r") == 2);
    removes(&host, "r");
    host.assert_nothing_left();
}

#[test]
fn a_container_with_a_terminal_is_followed_to_its_end() {
    let Some((host, program, _)) = with_container() else { return };
    removes(&host, "c");
    let ctr = host.ctr();
    let create = ["containers", "create", "--tty", "--runc-binary", &program, NAME, "c"];
    ctr.ok(&[&create[..], &["sh", "-c", "read word; echo said $word; exit 3"]].concat());
    ctr.ok(&["containers", "checkpoint", "c", "example.org/saved:1"]);
    let restore = ctr.command(&["containers", "restore", "r", "example.org/saved:1"]);
    let mut terminal = Terminal::start(&restore, 24, 80);
    wait_for("the container to run", || task(&host, "r") == "RUNNING");
    terminal.send("yes\n");
    terminal.expect("said yes");
    assert_eq!(terminal.wait(), 3);
    assert_eq!((task(&host, "r"), ctr.ok(&["containers", "ls", "-q"])), (String::new(), "c\nr\n".into()));
    ctr.ok(&["containers", "rm", "c", "r"]);
    host.assert_nothing_left();
}
