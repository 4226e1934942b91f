//! What is built, given to a real runc.

use std::fs;
use std::os::unix::fs::{PermissionsExt, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use super::*;

const BUSYBOX: &str = "/usr/bin/busybox";

/// A bundle, and the cgroups and the state of runc that come of it; all gone in the end.
struct Bundle {
    folder: tempfile::TempDir,
    id: String,
    parent: String,
}

impl Bundle {
    /// None, with a line that says so, without root, runc or anything to run; unless all tests must run.
    fn new(name: &str) -> Option<Bundle> {
        let missing = match () {
            () if !rustix::process::geteuid().is_root() => Some("root"),
            () if Command::new("runc").arg("--version").output().is_err() => Some("runc"),
            () if !Path::new(BUSYBOX).exists() => Some(BUSYBOX),
            () => None,
        };
        if let Some(missing) = missing {
            assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "this test needs {missing}");
            eprintln!("skipped: needs {missing}");
            return None;
        }
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().join("rootfs");
        for below in ["bin", "etc", "proc", "sys", "dev", "tmp"] {
            fs::create_dir_all(root.join(below)).unwrap();
        }
        fs::copy(BUSYBOX, root.join("bin/busybox")).unwrap();
        for applet in ["sh", "id", "cat", "cp", "grep", "head", "ls", "touch", "sleep", "true", "mount"] {
            symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        let sandbox = folder.path().join("pod");
        fs::create_dir_all(sandbox.join("shm")).unwrap();
        for file in ["hostname", "hosts", "resolv.conf"] {
            fs::write(sandbox.join(file), format!("{file} of the pod\n")).unwrap();
        }
        let id = format!("gantry-spec-{name}-{}", std::process::id());
        Some(Bundle { parent: format!("/gantry-spec-{}-{name}", std::process::id()), folder, id })
    }

    fn path(&self, below: &str) -> PathBuf {
        self.folder.path().join(below)
    }

    /// A case on this machine, as it is.
    fn case(&self, script: &str) -> Case {
        let mut case = Case::new();
        case.host = Host::read();
        case.pod.linux.as_mut().unwrap().cgroup_parent.clone_from(&self.parent);
        case.container.command = owned(&["/bin/sh", "-c", script]);
        case
    }

    fn write(&self, spec: &mut Spec) {
        // There is no sandbox whose namespaces could be joined: they are the container's own.
        for kind in ["network", "ipc", "uts", "pid"] {
            if spec.linux_mut().namespaces.iter().any(|namespace| namespace.kind == kind) {
                spec.set_namespace(kind, "").unwrap();
            }
        }
        fs::write(self.path("config.json"), encode(spec).unwrap()).unwrap();
    }

    fn build(&self, case: &mut Case) -> Built {
        case.facts = Facts::gather(&case.container, &self.path("pod"), &case.host, &case.options).unwrap();
        let mut built = case.build().unwrap();
        self.write(&mut built.spec);
        built
    }

    fn runc(&self, args: &[&str]) -> Output {
        let mut command = Command::new("timeout");
        command.args(["60", "runc", "--root"]).arg(self.path("state")).args(args);
        command.output().unwrap()
    }

    fn run(&self) -> String {
        let bundle = self.path("");
        let output = self.runc(&["run", "--bundle", bundle.to_str().unwrap(), &self.id]);
        let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
        let (out, err) = (text(&output.stdout), text(&output.stderr));
        assert!(output.status.success(), "{}: {out}{err}", output.status);
        out
    }
}

impl Drop for Bundle {
    fn drop(&mut self) {
        self.runc(&["delete", "--force", &self.id]);
        if let Err(error) = sys::mount::mounts_under(self.folder.path())
            .and_then(|mounts| mounts.iter().rev().try_for_each(|mount| sys::mount::unmount_all(mount)))
        {
            eprintln!("a mount of a test stays: {error}");
        }
        let hierarchies = fs::read_dir("/sys/fs/cgroup").unwrap();
        for hierarchy in hierarchies.flatten() {
            let _ = fs::remove_dir(hierarchy.path().join(&self.parent[1..]));
        }
        let _ = fs::remove_dir(Path::new("/sys/fs/cgroup").join(&self.parent[1..]));
    }
}

fn value<'a>(text: &'a str, key: &str) -> &'a str {
    let line = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix(':'));
    line.unwrap_or_else(|| panic!("no {key} in {text}")).trim()
}

#[test]
fn a_confined_container_runs() {
    let Some(bundle) = Bundle::new("confined") else { return };
    let mut case = bundle.case(
        "id; grep -E 'Cap|Seccomp|NoNew' /proc/self/status; echo score:$(cat /proc/self/oom_score_adj); \
         echo hosts:$(cat /etc/hosts); echo name:$HOSTNAME; echo pwd:$(pwd); cat /proc/kcore | head -c 1; \
         touch /x && echo WRITTEN; touch /ro/x && echo WRITTEN; touch /rro/x && echo WRITTEN; \
         cp /bin/busybox /rw/b; /rw/b true && echo EXECUTED; touch /ro/sub/x && echo BENEATH; \
         touch /rro/sub/x && echo WRITTEN; echo 1 > /proc/sys/kernel/panic && echo SET; \
         ls /dev/mine && cat /dev/mine; mount -t tmpfs t /tmp && echo MOUNTED; true",
    );
    case.container.working_dir = "/tmp".into();
    let mine = Device {
        host_path: "/dev/null".into(),
        container_path: "/dev/mine".into(),
        permissions: "rw".into(),
    };
    case.container.devices = vec![mine];
    for (at, readonly, recursive, options) in [
        ("/ro", true, false, &[][..]),
        ("/rro", true, true, &[]),
        ("/rw", false, false, &["noexec", "nosuid"]),
    ] {
        case.container.mounts.push(Asked {
            container_path: at.into(),
            host_path: bundle.path(&at[1..]).to_str().unwrap().into(),
            readonly,
            recursive_read_only: recursive,
            mount_options: owned(options),
            ..Asked::default()
        });
    }
    case.options.recursive_read_only = true;
    *case.resources() = LinuxContainerResources {
        cpu_shares: 100,
        cpu_period: 100_000,
        cpu_quota: 90_000,
        memory_limit_in_bytes: 64 << 20,
        oom_score_adj: -997,
        cpuset_cpus: "0".into(),
        unified: [("pids.max".to_owned(), "50".to_owned())].into(),
        ..LinuxContainerResources::default()
    };
    let security = case.security();
    security.run_as_user = Some(Int64Value { value: 33 });
    security.supplemental_groups = vec![100];
    security.seccomp = Some(SecurityProfile::default());
    security.no_new_privs = true;
    security.readonly_rootfs = true;
    security.masked_paths = owned(&["/proc/kcore", "/not/there"]);
    security.readonly_paths = owned(&["/proc/sys"]);
    security.capabilities = Some(Capability {
        add_capabilities: owned(&["NET_ADMIN"]),
        drop_capabilities: owned(&["ALL"]),
        add_ambient_capabilities: owned(&["NET_BIND_SERVICE"]),
    });
    let built = bundle.build(&mut case);
    // What cannot be written is kept from it by the mounts, not by the modes of files.
    for below in ["rootfs", "ro", "rro", "rw"] {
        fs::set_permissions(bundle.path(below), PermissionsExt::from_mode(0o777)).unwrap();
    }
    for below in ["ro/sub", "rro/sub"] {
        fs::create_dir(bundle.path(below)).unwrap();
        let mounted = Command::new("mount")
            .args(["-t", "tmpfs", "-o", "mode=777", "spec"])
            .arg(bundle.path(below))
            .status();
        assert!(mounted.unwrap().success());
    }
    let out = bundle.run();
    assert!(out.contains("uid=33 gid=34"), "{out}");
    assert!(out.contains("groups=6,7,34,100"), "{out}");
    assert_eq!(value(&out, "CapBnd"), "0000000000001400", "{out}");
    assert_eq!(value(&out, "CapAmb"), "0000000000000400", "{out}");
    assert_eq!((value(&out, "Seccomp"), value(&out, "NoNewPrivs")), ("2", "1"), "{out}");
    assert_eq!(value(&out, "score"), built.resources.oom_score_adj.to_string(), "{out}");
    assert_eq!((value(&out, "hosts"), value(&out, "name")), ("hosts of the pod", "podname"));
    assert_eq!(value(&out, "pwd"), "/tmp");
    assert!(out.contains("/dev/mine"), "{out}");
    for never in ["WRITTEN", "EXECUTED", "SET", "MOUNTED"] {
        assert!(!out.contains(never), "{out}");
    }
    // What was to be executed was there, and may be.
    let copied = fs::metadata(bundle.path("rw/b")).unwrap();
    assert!(copied.permissions().mode() & 0o111 != 0);
    assert!(out.contains("BENEATH"), "read-only is not recursive unless asked: {out}");
}

#[test]
fn a_privileged_container_runs_with_the_machines_devices() {
    let Some(bundle) = Bundle::new("privileged") else { return };
    let mut case = bundle.case(
        "ls /dev; grep -E 'CapBnd|Seccomp' /proc/self/status; mount -t tmpfs t /tmp && echo MOUNTED; \
         echo $(cat /proc/mounts) > /dev/shm/mounts",
    );
    case.privileged();
    bundle.build(&mut case);
    let out = bundle.run();
    assert!(out.contains("MOUNTED"), "{out}");
    assert_eq!(value(&out, "Seccomp"), "0");
    let names: Vec<&str> = out.lines().collect();
    for device in &case.facts.host_devices {
        let name = device.path.strip_prefix("/dev/").unwrap().split('/').next().unwrap();
        assert!(names.contains(&name), "{name} is not in {out}");
    }
    let mounts = fs::read_to_string(bundle.path("pod/shm/mounts")).unwrap();
    assert!(mounts.contains("sysfs /sys sysfs rw"), "{mounts}");
}

#[test]
fn a_pause_container_runs() {
    let Some(bundle) = Bundle::new("pause") else { return };
    let case = bundle.case("");
    let files = SandboxFiles::find(&bundle.path("pod"));
    let image = ContainerDefaults {
        entrypoint: owned(&["/bin/sh", "-c", "id; echo score:$(cat /proc/self/oom_score_adj)"]),
        user: "65535:65535".into(),
        ..ContainerDefaults::default()
    };
    let wanted = WantedPod { files: &files, netns: None, id: "pause", ..case.pod_wanted() };
    let mut spec = pause(&wanted, &image, Accounts::default()).unwrap();
    bundle.write(&mut spec);
    let out = bundle.run();
    assert!(out.contains("uid=65535 gid=65535"), "{out}");
    let score = spec.process.as_ref().unwrap().oom_score_adj.unwrap();
    assert_eq!(value(&out, "score"), score.to_string());
}

#[test]
fn a_running_container_takes_an_update() {
    let Some(bundle) = Bundle::new("update") else { return };
    let mut case = bundle.case("sleep 60");
    case.resources().memory_limit_in_bytes = 64 << 20;
    case.resources().cpu_shares = 100;
    let built = bundle.build(&mut case);
    let folder = bundle.path("");
    // Its streams are not the test's, or reading them would wait for its end.
    let log = fs::File::create(bundle.path("log")).unwrap();
    let status = Command::new("timeout")
        .args(["60", "runc", "--root"])
        .arg(bundle.path("state"))
        .args(["run", "--detach", "--bundle"])
        .arg(&folder)
        .arg(&bundle.id)
        .stdin(std::process::Stdio::null())
        .stdout(log.try_clone().unwrap())
        .stderr(log)
        .status()
        .unwrap();
    assert!(status.success(), "{}", fs::read_to_string(bundle.path("log")).unwrap());
    let change = LinuxContainerResources {
        memory_limit_in_bytes: 128 << 20,
        cpu_shares: 300,
        cpu_quota: 50_000,
        cpu_period: 100_000,
        ..LinuxContainerResources::default()
    };
    let update = resources(&built.spec, &change, &case.host, &case.options).unwrap();
    fs::write(bundle.path("update.json"), encode_resources(&update.resources).unwrap()).unwrap();
    let file = bundle.path("update.json");
    let output = bundle.runc(&["update", "--resources", file.to_str().unwrap(), &bundle.id]);
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let state = bundle.runc(&["state", &bundle.id]);
    let state: Value = serde_json::from_slice(&state.stdout).unwrap();
    let group =
        sys::cgroup::Cgroup::of_process(u32::try_from(state["pid"].as_u64().unwrap()).unwrap()).unwrap();
    let limit = match case.host.cgroup2 {
        true => group.number("memory", "memory.max"),
        false => group.number("memory", "memory.limit_in_bytes"),
    };
    assert_eq!(limit, Some(128 << 20));
    assert!(group.folder("memory").unwrap().ends_with(built.cgroup.trim_start_matches('/')));
}
