//! Containers on every snapshotter, by our ctr and Debian's, over a kill of the engine, until nothing is left.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::process::Command;

use tests::host::{Host, Kind, RUNC, STOCK_CTR};
use tests::image::{self, BUSYBOX, NAME};
use tests::{left, ready, wait_for};

const MKFS_BTRFS: &str = "/usr/sbin/mkfs.btrfs";
const MKFS_EROFS: &str = "/usr/bin/mkfs.erofs";
const MOUNT: &str = "/usr/bin/mount";

fn run(program: &str, arguments: &[&str]) {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {output:?}");
}

/// An engine with its root on a file system of this kind, made in a file; on that of /tmp for none.
fn host(filesystem: Option<&str>, programs: &[&str]) -> Option<Host> {
    if !ready(&[&[STOCK_CTR, RUNC, BUSYBOX, MOUNT], programs].concat()) {
        return None;
    }
    let mut host = Host::new(Kind::Gantry);
    if let Some(filesystem) = filesystem {
        let (root, disk) = (host.root(), host.folder().join("disk"));
        fs::create_dir(&root).unwrap();
        fs::File::create(&disk).unwrap().set_len(1 << 30).unwrap();
        run(&format!("/usr/sbin/mkfs.{filesystem}"), &["-q", disk.to_str().unwrap()]);
        run(MOUNT, &["-o", "loop", disk.to_str().unwrap(), root.to_str().unwrap()]);
    }
    host.start();
    Some(host)
}

/// What is left, but for the disk of the test.
fn assert_nothing_left(host: &Host) {
    let own =
        [format!("mount {}", host.root().display()), format!(": {}", host.folder().join("disk").display())];
    let others = || -> Vec<String> {
        host.left().into_iter().filter(|line| own.iter().all(|own| !line.ends_with(own))).collect()
    };
    let mut seen = Vec::new();
    for _ in 0..1000 {
        seen = others();
        if seen.is_empty() {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(10));
    }
    panic!("left behind: {seen:?}");
}

/// Stops the engine and takes the disk of the test away.
fn finish(mut host: Host) {
    host.stop();
    if left::mounts(host.folder()).iter().any(|mount| Path::new(mount) == host.root()) {
        run("/usr/bin/umount", &[host.root().to_str().unwrap()]);
        wait_for("the loop device to go", || left::loop_devices(host.folder()).is_empty());
    }
}

fn snapshots_folder(host: &Host, name: &str) -> PathBuf {
    host.root().join(format!("io.containerd.snapshotter.v1.{name}/snapshots"))
}

/// A container's life on a snapshotter.
fn carries_containers(mut host: Host, name: &str) {
    let (ctr, stock) = (host.ctr(), host.stock_ctr());
    let archive = host.folder().join("image.tar");
    image::busybox().write(&archive).unwrap();
    stock.ok(&["images", "import", "--snapshotter", name, archive.to_str().unwrap()]);
    let plugins = ctr.ok(&["plugins", "ls"]);
    let line = plugins.lines().find(|line| line.split_whitespace().nth(1) == Some(name)).unwrap();
    assert!(line.contains("ok"), "{line}");

    // The layers are stacked as they say, for both clients; what is written stays in the container.
    let script = "cat /etc/replaced-above; ls /var/opaque; ls /etc/removed-above 2>/dev/null; stat -c %h /var/second; \
                  echo mine > /etc/replaced-above; rm -r /var/opaque; cat /etc/replaced-above";
    for client in [&ctr, &stock] {
        for round in ["first", "second"] {
            let said = client.ok(&["run", "--rm", "--snapshotter", name, NAME, "c", "sh", "-c", script]);
            assert_eq!(said, "new\nshown\n2\nmine\n", "{round}");
        }
    }
    let keep = "echo kept > /kept; sleep 1000";
    ctr.ok(&["run", "-d", "--snapshotter", name, NAME, "one", "sh", "-c", keep]);
    stock.ok(&["run", "-d", "--snapshotter", name, NAME, "two", "sh", "-c", keep]);
    for container in ["one", "two"] {
        wait_for("the file", || {
            ctr.run(&["tasks", "exec", "--exec-id", "e", container, "cat", "/kept"]).stdout == "kept\n"
        });
    }
    let mounted = left::mounts(&host.root());

    host.kill();
    host.start();
    assert_eq!(left::mounts(&host.root()), mounted, "a start mounts and takes down nothing");
    for container in ["one", "two"] {
        assert_eq!(ctr.ok(&["tasks", "exec", "--exec-id", "e", container, "cat", "/kept"]), "kept\n");
        // Stopped and started, it has its files.
        ctr.ok(&["tasks", "kill", "-s", "KILL", "-a", container]);
        wait_for("the task to go", || {
            ctr.run(&["tasks", "rm", container]);
            !ctr.ok(&["tasks", "ls", "-q"]).lines().any(|task| task == container)
        });
    }
    let mounts = stock.ok(&["snapshots", "--snapshotter", name, "mounts", "/target", "one"]);
    assert!(!mounts.is_empty());
    ctr.ok(&["tasks", "start", "-d", "one"]);
    assert_eq!(ctr.ok(&["tasks", "exec", "--exec-id", "e", "one", "cat", "/kept"]), "kept\n");
    assert_eq!(ctr.ok(&["run", "--rm", "--snapshotter", name, NAME, "new", "echo", "runs"]), "runs\n");

    ctr.ok(&["tasks", "rm", "-f", "one"]);
    for container in ["one", "two"] {
        ctr.ok(&["containers", "rm", container]);
    }
    // Only layers are there, and nothing is mounted for them.
    let kinds = ctr.ok(&["snapshots", "--snapshotter", name, "ls"]);
    assert!(kinds.lines().skip(1).count() == 2 && !kinds.contains("Active"), "{kinds}");
    assert_nothing_left(&host);
    stock.ok(&["images", "rm", "--sync", NAME]);
    assert_eq!(ctr.ok(&["snapshots", "--snapshotter", name, "ls", "-q"]), "");
    assert_eq!(fs::read_dir(snapshots_folder(&host, name)).unwrap().count(), 0);
    assert_nothing_left(&host);
    finish(host);
}

#[test]
fn overlayfs_carries_containers() {
    let Some(host) = host(None, &[]) else { return };
    carries_containers(host, "overlayfs");
}

#[test]
fn native_carries_containers() {
    let Some(host) = host(None, &[]) else { return };
    carries_containers(host, "native");
}

#[test]
fn btrfs_carries_containers() {
    let Some(host) = host(Some("btrfs"), &[MKFS_BTRFS]) else { return };
    carries_containers(host, "btrfs");
}

#[test]
fn erofs_carries_containers() {
    let Some(host) = host(None, &[MKFS_EROFS]) else { return };
    carries_containers(host, "erofs");
}

#[test]
fn overlayfs_and_erofs_carry_containers_on_btrfs() {
    for name in ["overlayfs", "erofs"] {
        let Some(host) = host(Some("btrfs"), &[MKFS_BTRFS, MKFS_EROFS]) else { return };
        carries_containers(host, name);
    }
}

#[test]
fn one_that_cannot_be_is_skipped_and_says_why() {
    let Some(mut host) = host(Some("ext4"), &["/usr/sbin/mkfs.ext4"]) else { return };
    host.stop();
    // Where there is no mkfs.erofs.
    host.path = "/usr/sbin".into();
    host.start();
    let plugins = host.ctr().ok(&["plugins", "ls"]);
    for (name, state) in [("overlayfs", "ok"), ("native", "ok"), ("btrfs", "skip"), ("erofs", "skip")] {
        let line = plugins.lines().find(|line| line.split_whitespace().nth(1) == Some(name)).unwrap();
        assert!(line.contains(state), "{line}");
    }
    assert!(
        host.stock_ctr()
            .ok(&["plugins", "ls"])
            .lines()
            .any(|line| line.contains("btrfs") && line.contains("skip"))
    );
    for (name, why) in [("btrfs", "must be on a btrfs"), ("erofs", "erofs-utils")] {
        let refused = host.ctr().fails(&["snapshots", "--snapshotter", name, "prepare", "k"]);
        assert!(refused.contains(why), "{refused}");
    }
    finish(host);
}

#[test]
fn a_user_namespace_sees_roots_files_as_its_own() {
    let Some(host) = host(None, &[MKFS_EROFS]) else { return };
    // Who is root in the container passes through here.
    fs::set_permissions(host.folder(), fs::Permissions::from_mode(0o711)).unwrap();
    let ctr = host.ctr();
    host.import();
    let maps = ["--uidmap", "0:100000:65536", "--gidmap", "0:200000:65536"];
    for name in ["overlayfs", "erofs"] {
        let script = "stat -c '%u:%g %n' / /bin/busybox /etc/passwd; id -u; cut -c 1-40 /proc/self/uid_map; \
                      echo mine > /etc/passwd && touch /new && chmod 600 /etc/group && stat -c '%u:%g' /new /etc/passwd";
        let flags = ["run", "-d", "--snapshotter", name];
        let said =
            ctr.ok(&[&flags[..1], &["--rm"], &flags[2..], &maps, &[NAME, "c", "sh", "-c", script]].concat());
        let lines: Vec<_> = said.lines().map(str::trim).collect();
        assert_eq!(lines[..4], ["0:0 /", "0:0 /bin/busybox", "0:0 /etc/passwd", "0"], "{said}");
        assert_eq!(lines[4].split_whitespace().collect::<Vec<_>>(), ["0", "100000", "65536"]);
        assert_eq!(lines[5..], ["0:0", "0:0"]);
        // On the host it is another user's, and no file of the image was copied for it.
        ctr.ok(&[&flags[..], &maps, &[NAME, "c", "sleep", "1000"]].concat());
        let pid = ctr.ok(&["tasks", "ls"]);
        let pid = pid.lines().find(|line| line.starts_with("c ")).unwrap().split_whitespace().nth(1).unwrap();
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        assert!(status.contains("Uid:\t100000") && status.contains("Gid:\t200000"), "{status}");
        let uppers: Vec<_> = fs::read_dir(snapshots_folder(&host, name))
            .unwrap()
            .map(|entry| entry.unwrap().path())
            .filter(|folder| {
                folder.join("work").exists() && fs::metadata(folder.join("fs")).unwrap().uid() == 100_000
            })
            .collect();
        assert!(uppers.len() == 1 && !uppers[0].join("fs/bin").exists(), "{uppers:?}");
        ctr.ok(&["tasks", "rm", "-f", "c"]);
        ctr.ok(&["containers", "rm", "c"]);
    }
    let refused =
        ctr.fails(&[&["run", "--rm", "--snapshotter", "native"], &maps[..], &[NAME, "c", "true"]].concat());
    assert!(refused.contains("native") && refused.contains("overlayfs"), "{refused}");
    assert_nothing_left(&host);
    finish(host);
}
