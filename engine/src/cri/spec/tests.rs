//! What the kubelet asks for, beside what the runtime is told.

mod runc;

use std::path::{Path, PathBuf};

use oci::image::ContainerDefaults;
use oci::runtime::{Device as Node, Mount, Spec};
use oci::user::Accounts;
use proto::runtime::v1::security_profile::ProfileType;
use proto::runtime::v1::{
    Capability, ContainerConfig, ContainerMetadata, Device, HugepageLimit, IdMapping, ImageSpec, Int64Value,
    KeyValue, LinuxContainerConfig, LinuxContainerResources, LinuxContainerSecurityContext,
    LinuxPodSandboxConfig, LinuxSandboxSecurityContext, Mount as Asked, MountPropagation, NamespaceMode,
    NamespaceOption, PodSandboxConfig, PodSandboxMetadata, SeLinuxOption, SecurityProfile,
    SupplementalGroupsPolicy, UpdatePodSandboxResourcesRequest, UserNamespace,
};
use serde_json::{Value, json};

use super::*;

const PASSWD: &[u8] = b"root:x:0:0::/root:/bin/sh\nweb:x:33:34::/:\n";
const GROUP: &[u8] = b"root:x:0:\nweb:x:34:\ndisk:x:6:root,web\nlog:x:7:web\n";

/// A container, with all that it comes with, to be changed by a test.
struct Case {
    pod: PodSandboxConfig,
    container: ContainerConfig,
    image: ContainerDefaults,
    namespaces: Namespaces,
    host: Host,
    facts: Facts,
    options: Options,
}

impl Case {
    fn new() -> Case {
        let metadata = PodSandboxMetadata {
            name: "pod".into(),
            namespace: "ns".into(),
            uid: "uid".into(),
            ..PodSandboxMetadata::default()
        };
        let path = |name: &str| Some(PathBuf::from(format!("/ns/{name}")));
        let file = |name: &str| Some(PathBuf::from(format!("/pods/p/{name}")));
        Case {
            pod: PodSandboxConfig {
                metadata: Some(metadata),
                hostname: "podname".into(),
                linux: Some(LinuxPodSandboxConfig::default()),
                ..PodSandboxConfig::default()
            },
            container: ContainerConfig {
                metadata: Some(ContainerMetadata { name: "c".into(), ..ContainerMetadata::default() }),
                linux: Some(LinuxContainerConfig {
                    resources: Some(LinuxContainerResources::default()),
                    security_context: Some(LinuxContainerSecurityContext::default()),
                }),
                command: vec!["run".into()],
                ..ContainerConfig::default()
            },
            image: ContainerDefaults::default(),
            namespaces: Namespaces {
                network: path("net"),
                ipc: path("ipc"),
                uts: path("uts"),
                pid: path("pid"),
                user: None,
            },
            host: Host {
                hostname: "machine".into(),
                swap: true,
                seccomp: true,
                may_lower_oom_score_adj: true,
                capabilities: vec!["CAP_CHOWN".into(), "CAP_SYS_ADMIN".into()],
                ..Host::default()
            },
            facts: Facts {
                files: SandboxFiles {
                    hostname: file("hostname"),
                    hosts: file("hosts"),
                    resolv_conf: file("resolv.conf"),
                    shm: file("shm"),
                    kept: Vec::new(),
                },
                ..Facts::default()
            },
            options: Options::default(),
        }
    }

    fn security(&mut self) -> &mut LinuxContainerSecurityContext {
        self.container.linux.get_or_insert_default().security_context.get_or_insert_default()
    }

    fn pod_security(&mut self) -> &mut LinuxSandboxSecurityContext {
        self.pod.linux.get_or_insert_default().security_context.get_or_insert_default()
    }

    fn resources(&mut self) -> &mut LinuxContainerResources {
        self.container.linux.get_or_insert_default().resources.get_or_insert_default()
    }

    fn privileged(&mut self) -> &mut Case {
        self.security().privileged = true;
        self.pod_security().privileged = true;
        self
    }

    fn mount(&mut self, at: &str, change: impl FnOnce(&mut Asked)) -> &mut Case {
        let mut asked = Asked { container_path: at.into(), host_path: "/h".into(), ..Asked::default() };
        change(&mut asked);
        self.container.mounts.push(asked);
        let source = format!("/real{}", self.facts.sources.len());
        self.facts.sources.push(Source {
            path: source.into(),
            mount_point: "/".into(),
            propagation: Propagation::Private,
            kept: Vec::new(),
        });
        self
    }

    fn build(&self) -> Result<Built> {
        container(&Wanted {
            pod_id: "p",
            pod: &self.pod,
            id: "c1",
            container: &self.container,
            image: &self.image,
            image_name: "docker.io/library/x:1",
            accounts: Accounts { passwd: PASSWD, group: GROUP },
            namespaces: &self.namespaces,
            volumes: Path::new("/volumes"),
            mapped: Path::new("/mapped"),
            host: &self.host,
            facts: &self.facts,
            options: &self.options,
        })
    }

    fn json(&self) -> Value {
        serde_json::to_value(self.build().unwrap().spec).unwrap()
    }

    fn refusal(&self) -> String {
        self.build().unwrap_err().to_string()
    }

    fn pod_wanted(&self) -> WantedPod<'_> {
        WantedPod {
            id: "p",
            config: &self.pod,
            netns: Some(Path::new("/netns/p")),
            userns: None,
            files: &self.facts.files,
            host: &self.host,
            options: &self.options,
            seccomp: None,
        }
    }
}

fn owned(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

fn places(spec: &Value) -> Vec<String> {
    let mounts = spec["mounts"].as_array().unwrap().iter();
    mounts.map(|mount| mount["destination"].as_str().unwrap().to_owned()).collect()
}

fn mounted<'a>(spec: &'a Value, at: &str) -> &'a Value {
    spec["mounts"].as_array().unwrap().iter().find(|mount| mount["destination"] == at).unwrap_or(&Value::Null)
}

fn namespace(spec: &Value, kind: &str) -> Option<String> {
    let namespaces = spec["linux"]["namespaces"].as_array().unwrap();
    let found = namespaces.iter().find(|namespace| namespace["type"] == kind)?;
    Some(found["path"].as_str().unwrap_or_default().to_owned())
}

#[test]
fn a_plain_container_is_as_containerd_has_it() {
    let spec = Case::new().json();
    assert_eq!(spec["root"], json!({"path":"rootfs"}));
    assert_eq!(spec["process"]["args"], json!(["run"]));
    assert_eq!(spec["process"]["cwd"], "/");
    let env = [oci::spec::DEFAULT_PATH, "HOSTNAME=podname"];
    assert_eq!(spec["process"]["env"], json!(env));
    assert_eq!(spec["process"]["user"], json!({"uid":0,"gid":0,"additionalGids":[0,6]}));
    assert_eq!(spec["process"]["oomScoreAdj"], 0);
    assert_eq!(spec["process"]["capabilities"]["bounding"].as_array().unwrap().len(), 14);
    for none in ["rlimits", "noNewPrivileges", "apparmorProfile", "selinuxLabel", "terminal"] {
        assert!(spec["process"].get(none).is_none(), "{none}");
    }
    for none in ["seccomp", "maskedPaths", "readonlyPaths", "devices", "sysctl", "rootfsPropagation"] {
        assert!(spec["linux"].get(none).is_none(), "{none}");
    }
    assert!(spec.get("hostname").is_none(), "the name is in the namespace that is joined");
    assert_eq!(
        places(&spec),
        [
            "/proc",
            "/dev",
            "/dev/pts",
            "/dev/mqueue",
            "/sys",
            "/sys/fs/cgroup",
            "/etc/hostname",
            "/etc/hosts",
            "/etc/resolv.conf",
            "/dev/shm"
        ]
    );
    assert_eq!(mounted(&spec, "/etc/hosts")["source"], "/pods/p/hosts");
    assert_eq!(mounted(&spec, "/etc/hosts")["options"], json!(["rbind", "rprivate", "rw"]));
    assert_eq!(mounted(&spec, "/dev/shm")["source"], "/pods/p/shm");
    assert_eq!(spec["linux"]["cgroupsPath"], "/k8s.io/c1");
    assert_eq!(spec["linux"]["resources"]["devices"], json!([{"allow":false,"access":"rwm"}]));
    for (kind, path) in [("network", "/ns/net"), ("ipc", "/ns/ipc"), ("uts", "/ns/uts"), ("pid", "/ns/pid")] {
        assert_eq!(namespace(&spec, kind).as_deref(), Some(path));
    }
    assert_eq!(namespace(&spec, "mount").as_deref(), Some(""));
    assert_eq!(namespace(&spec, "cgroup"), None, "cgroups of version 1 are shared");
    assert_eq!(
        spec["annotations"],
        json!({
            "io.kubernetes.cri.container-name": "c",
            "io.kubernetes.cri.container-type": "container",
            "io.kubernetes.cri.image-name": "docker.io/library/x:1",
            "io.kubernetes.cri.sandbox-id": "p",
            "io.kubernetes.cri.sandbox-name": "pod",
            "io.kubernetes.cri.sandbox-namespace": "ns",
            "io.kubernetes.cri.sandbox-uid": "uid",
        })
    );
}

/// `containerd.json` is what containerd 1.6.20 made of this request; seccomp is left out there, being its own list.
#[test]
fn a_request_becomes_what_containerd_makes_of_it() {
    let mut case = Case::new();
    case.pod.hostname.clear();
    case.pod.linux.as_mut().unwrap().cgroup_parent = "/parent".into();
    let options = NamespaceOption {
        network: NamespaceMode::Node.into(),
        pid: NamespaceMode::Container.into(),
        ..NamespaceOption::default()
    };
    case.pod_security().namespace_options = Some(options.clone());
    case.image = serde_json::from_str(
        r#"{"Entrypoint":["/bin/sleep"],"Cmd":["1000"],"Env":["A=image","B=image","PATH=/bin"],"User":"web",
            "WorkingDir":"/tmp","Volumes":{"/data":{}},"StopSignal":"SIGINT"}"#,
    )
    .unwrap();
    case.container.command.clear();
    case.container.tty = true;
    let pair = |key: &str, value: &str| KeyValue { key: key.into(), value: value.into() };
    case.container.envs = vec![pair("A", "own"), pair("N", "1")];
    case.mount("/a/b", |mount| mount.readonly = true).mount("/x", |_| {});
    for (source, path) in case.facts.sources.iter_mut().zip(["/host/vol", "/host/vol2"]) {
        source.path = path.into();
    }
    let (host_path, container_path) = ("/dev/null".into(), "/dev/mine".into());
    case.container.devices = vec![Device { host_path, container_path, permissions: "rw".into() }];
    case.facts.devices = vec![vec![Node {
        path: "/dev/mine".into(),
        kind: "c".into(),
        major: 1,
        minor: 3,
        file_mode: Some(0o666),
        uid: Some(0),
        gid: Some(0),
    }]];
    *case.resources() = LinuxContainerResources {
        cpu_shares: 100,
        cpu_period: 100_000,
        cpu_quota: 90_000,
        memory_limit_in_bytes: 64 << 20,
        oom_score_adj: -997,
        cpuset_cpus: "0".into(),
        ..LinuxContainerResources::default()
    };
    case.host.may_lower_oom_score_adj = false;
    let security = case.security();
    security.namespace_options = Some(options);
    security.supplemental_groups = vec![100];
    security.no_new_privs = true;
    security.readonly_rootfs = true;
    security.masked_paths = owned(&["/proc/kcore"]);
    security.readonly_paths = owned(&["/proc/sys"]);
    security.capabilities = Some(Capability {
        add_capabilities: owned(&["NET_ADMIN"]),
        drop_capabilities: owned(&["KILL"]),
        ..Capability::default()
    });
    let path = |kind: &str| Some(PathBuf::from(format!("/proc/7/ns/{kind}")));
    case.namespaces =
        Namespaces { network: path("net"), ipc: path("ipc"), uts: path("uts"), pid: None, user: None };
    let file = |name: &str| Some(Path::new("/root/sandboxes/POD").join(name));
    case.facts.files = SandboxFiles {
        hostname: file("hostname"),
        hosts: file("hosts"),
        resolv_conf: file("resolv.conf"),
        shm: Some("/state/sandboxes/POD/shm".into()),
        kept: Vec::new(),
    };
    let built = container(&Wanted {
        pod_id: "POD",
        pod: &case.pod,
        id: "CONTAINER",
        container: &case.container,
        image: &case.image,
        image_name: "docker.io/library/cmp:1",
        accounts: Accounts { passwd: PASSWD, group: GROUP },
        namespaces: &case.namespaces,
        volumes: Path::new("/root/containers/CONTAINER/volumes"),
        mapped: Path::new("/state/mapped/CONTAINER"),
        host: &case.host,
        facts: &case.facts,
        options: &case.options,
    });
    let built = built.unwrap();
    assert_eq!(built.stop_signal, 2);
    let mut ours = serde_json::to_value(built.spec).unwrap();
    let mut theirs: Value = serde_json::from_str(include_str!("tests/containerd.json")).unwrap();
    // A variable is there once: the last, as the runtime has it.
    let env = json!(["PATH=/bin", "TERM=xterm", "HOSTNAME=machine", "A=own", "B=image", "N=1"]);
    theirs["process"]["env"] = env;
    // It overlooked the last group of the file, of which the user is a member.
    assert_eq!(theirs["process"]["user"]["additionalGids"], json!([6, 34, 100]));
    theirs["process"]["user"]["additionalGids"] = json!([6, 7, 34, 100]);
    // Namespaces have no order.
    for spec in [&mut ours, &mut theirs] {
        let namespaces = spec["linux"]["namespaces"].as_array_mut().unwrap();
        namespaces.sort_by_key(|namespace| namespace["type"].to_string());
    }
    assert_eq!(ours, theirs);
}

#[test]
fn command_and_args_take_the_place_of_the_images() {
    for (entrypoint, cmd, command, args, line) in [
        (&["e"][..], &["c"][..], &[][..], &[][..], Some(&["e", "c"][..])),
        (&["e"], &["c"], &[], &["a"], Some(&["e", "a"])),
        (&["e"], &["c"], &["k"], &[], Some(&["k"])),
        (&["e"], &["c"], &["k"], &["a"], Some(&["k", "a"])),
        (&[], &["c"], &[], &[], Some(&["c"])),
        (&[""], &["c"], &[], &[], Some(&["c"])),
        (&[], &[], &[], &["a"], Some(&["a"])),
        (&[""], &[], &[], &[], None),
        (&[], &[], &[], &[], None),
    ] {
        let mut case = Case::new();
        case.image.entrypoint = owned(entrypoint);
        case.image.cmd = owned(cmd);
        case.container.command = owned(command);
        case.container.args = owned(args);
        match line {
            Some(line) => assert_eq!(case.json()["process"]["args"], json!(line)),
            None => assert!(matches!(case.build(), Err(Error::InvalidArgument(_)))),
        }
    }
}

#[test]
fn the_last_word_on_a_variable_counts() {
    let mut case = Case::new();
    case.image.env = owned(&["A=image", "B=image", "PATH=/bin"]);
    case.container.tty = true;
    let pair = |key: &str, value: &[u8]| KeyValue { key: key.into(), value: value.to_vec() };
    case.container.envs = vec![pair("A", b"own=x"), pair("HOSTNAME", b"h"), pair("RAW", b"a\xffb")];
    let spec = case.json();
    assert_eq!(
        spec["process"]["env"],
        json!(["PATH=/bin", "TERM=xterm", "HOSTNAME=h", "A=own=x", "B=image", "RAW=a\u{fffd}b"])
    );
    assert_eq!(spec["process"]["terminal"], true);
    case.container.envs = vec![pair("A", b"x\0y")];
    assert!(case.refusal().contains("NUL"));
    case.container.envs.clear();
    case.pod.hostname.clear();
    assert!(case.json()["process"]["env"].as_array().unwrap().contains(&json!("HOSTNAME=machine")));
}

#[test]
fn the_working_folder_is_the_containers_or_its_images() {
    for (own, image, cwd) in [("", "", "/"), ("", "/i", "/i"), ("/o", "/i", "/o"), ("", "i/j", "/i/j")] {
        let mut case = Case::new();
        case.container.working_dir = own.into();
        case.image.working_dir = image.into();
        assert_eq!(case.json()["process"]["cwd"], cwd);
    }
}

#[test]
fn capabilities_are_added_and_dropped() {
    let sets = |add: &[&str], drop: &[&str], ambient: &[&str]| {
        let mut case = Case::new();
        case.security().capabilities = Some(Capability {
            add_capabilities: owned(add),
            drop_capabilities: owned(drop),
            add_ambient_capabilities: owned(ambient),
        });
        case.build().unwrap().spec.process.unwrap().capabilities.unwrap()
    };
    let plain = sets(&[], &[], &[]);
    assert_eq!(plain.bounding, oci::spec::DEFAULT_CAPABILITIES);
    let some = sets(&["net_admin", "CAP_SYS_PTRACE"], &["CHOWN"], &[]);
    assert!(some.effective.contains(&"CAP_NET_ADMIN".to_owned()));
    assert!(some.permitted.contains(&"CAP_SYS_PTRACE".to_owned()));
    assert!(!some.bounding.contains(&"CAP_CHOWN".to_owned()));
    assert!(some.inheritable.is_empty() && some.ambient.is_empty());
    assert_eq!(sets(&["ALL"], &["CHOWN"], &[]).bounding, ["CAP_SYS_ADMIN"]);
    assert_eq!(sets(&["KILL"], &["all"], &[]).bounding, ["CAP_KILL"]);
    assert!(sets(&["ALL"], &["ALL"], &[]).bounding.is_empty());
    let ambient = sets(&[], &["ALL"], &["NET_RAW", "KILL"]);
    for set in [ambient.bounding, ambient.effective, ambient.permitted, ambient.inheritable, ambient.ambient]
    {
        assert_eq!(set, ["CAP_NET_RAW", "CAP_KILL"]);
    }
    assert!(sets(&[], &["KILL"], &["KILL"]).ambient.is_empty(), "what is dropped is dropped everywhere");
}

#[test]
fn a_privileged_container_has_the_machine() {
    let mut case = Case::new();
    case.security().privileged = true;
    assert!(case.refusal().contains("its pod is not"));
    let case = &mut Case::new();
    case.privileged();
    case.host.cgroup2 = true;
    let node = |path: &str| Node {
        path: path.into(),
        kind: "c".into(),
        major: 1,
        minor: 3,
        file_mode: None,
        uid: None,
        gid: None,
    };
    case.container.devices =
        vec![Device { container_path: "/dev/b".into(), permissions: "r".into(), ..Device::default() }];
    case.facts.devices = vec![vec![node("/dev/b")]];
    case.facts.host_devices = vec![node("/dev/a"), node("/dev/b")];
    case.security().masked_paths = owned(&["/proc/kcore"]);
    case.security().readonly_paths = owned(&["/proc/sys"]);
    case.security().seccomp = Some(SecurityProfile::default());
    case.security().capabilities =
        Some(Capability { drop_capabilities: owned(&["ALL"]), ..Capability::default() });
    let spec = case.json();
    assert_eq!(spec["process"]["capabilities"]["bounding"], json!(["CAP_CHOWN", "CAP_SYS_ADMIN"]));
    assert_eq!(spec["linux"]["resources"]["devices"], json!([{"allow":true,"access":"rwm"}]));
    let devices = spec["linux"]["devices"].as_array().unwrap();
    assert_eq!(devices.iter().map(|device| &device["path"]).collect::<Vec<_>>(), ["/dev/b", "/dev/a"]);
    for none in ["maskedPaths", "readonlyPaths", "seccomp"] {
        assert!(spec["linux"].get(none).is_none(), "{none}");
    }
    for at in ["/sys", "/sys/fs/cgroup"] {
        assert!(mounted(&spec, at)["options"].as_array().unwrap().contains(&json!("rw")), "{at}");
    }
    assert_eq!(namespace(&spec, "cgroup"), None);
    case.options.privileged_without_host_devices = true;
    let spec = case.json();
    assert_eq!(spec["linux"]["devices"].as_array().unwrap().len(), 1);
    assert_eq!(spec["linux"]["resources"]["devices"][0]["allow"], false);
    case.options.privileged_without_host_devices_all_devices_allowed = true;
    assert_eq!(case.json()["linux"]["resources"]["devices"][0]["allow"], true);
}

#[test]
fn system_calls_are_filtered_as_asked() {
    let profile = |kind: ProfileType, name: &str| {
        Some(SecurityProfile { profile_type: kind.into(), localhost_ref: name.into() })
    };
    let mut case = Case::new();
    assert!(case.json()["linux"].get("seccomp").is_none(), "none asked for is none");
    case.security().seccomp = profile(ProfileType::RuntimeDefault, "");
    assert_eq!(case.json()["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
    assert!(!case.json()["linux"]["seccomp"].to_string().contains("\"mount\""));
    case.security().capabilities =
        Some(Capability { add_capabilities: owned(&["SYS_ADMIN"]), ..Capability::default() });
    assert!(case.json()["linux"]["seccomp"].to_string().contains("\"mount\""), "it goes with capabilities");
    case.security().seccomp = profile(ProfileType::Unconfined, "");
    assert!(case.json()["linux"].get("seccomp").is_none());
    case.security().seccomp = profile(ProfileType::RuntimeDefault, "x");
    assert!(matches!(case.build(), Err(Error::InvalidArgument(_))));
    case.security().seccomp = profile(ProfileType::Localhost, "localhost//p.json");
    assert!(matches!(case.build(), Err(Error::NotFound(_))));
    case.facts.seccomp = Some(json!({"defaultAction":"SCMP_ACT_LOG"}));
    assert_eq!(case.json()["linux"]["seccomp"], json!({"defaultAction":"SCMP_ACT_LOG"}));
    case.host.seccomp = false;
    assert!(case.refusal().contains("not supported"));
    case.security().seccomp = profile(ProfileType::Unconfined, "");
    case.build().unwrap();
    case.host.seccomp = true;
    for (text, filtered) in [("runtime/default", true), ("docker/default", true), ("unconfined", false)] {
        case.security().seccomp = None;
        case.security().seccomp_profile_path = text.into();
        assert_eq!(case.json()["linux"].get("seccomp").is_some(), filtered, "{text}");
    }
    case.security().seccomp_profile_path = "nonsense".into();
    assert!(matches!(case.build(), Err(Error::InvalidArgument(_))));
    case.security().seccomp_profile_path.clear();
    case.options.unset_seccomp_profile = "runtime/default".into();
    assert!(case.json()["linux"].get("seccomp").is_some());
}

#[test]
fn apparmor_is_used_where_it_is() {
    let profile = |kind: ProfileType, name: &str| {
        Some(SecurityProfile { profile_type: kind.into(), localhost_ref: name.into() })
    };
    let mut case = Case::new();
    case.security().apparmor = profile(ProfileType::RuntimeDefault, "");
    assert!(case.refusal().contains("AppArmor is not supported"));
    case.security().apparmor = profile(ProfileType::Unconfined, "");
    case.build().unwrap();
    case.security().apparmor = None;
    case.security().apparmor_profile = "localhost/mine".into();
    assert!(case.refusal().contains("not supported"));

    case.host.apparmor = true;
    case.facts.apparmor = ["mine", "cri-containerd.apparmor.d"].map(str::to_owned).into();
    assert_eq!(case.json()["process"]["apparmorProfile"], "mine");
    case.security().apparmor_profile = "localhost/other".into();
    assert!(case.refusal().contains("not loaded"));
    case.security().apparmor_profile.clear();
    assert_eq!(case.json()["process"]["apparmorProfile"], "cri-containerd.apparmor.d");
    case.privileged();
    assert!(case.json()["process"].get("apparmorProfile").is_none());
    case.security().apparmor = profile(ProfileType::Localhost, "mine");
    assert_eq!(case.json()["process"]["apparmorProfile"], "mine");
    case.security().apparmor = None;
    case.options.disable_apparmor = true;
    assert!(case.json()["process"].get("apparmorProfile").is_none());
}

#[test]
fn selinux_labels_are_the_containers_or_the_pods() {
    let option = |kind: &str, level: &str| {
        Some(SeLinuxOption { r#type: kind.into(), level: level.into(), ..SeLinuxOption::default() })
    };
    let mut case = Case::new();
    case.security().selinux_options = option("t", "s0:c1,c2");
    assert!(case.json()["linux"].get("mountLabel").is_none(), "this kernel has none");
    case.security().selinux_options = option("t", "nonsense");
    assert!(matches!(case.build(), Err(Error::InvalidArgument(_))));
    case.host.selinux = Some(Selinux {
        process: "system_u:system_r:container_t:s0".into(),
        file: "system_u:object_r:container_file_t:s0".into(),
    });
    case.options.enable_selinux = true;
    case.security().selinux_options = option("own_t", "s0:c1,c2");
    case.pod_security().selinux_options = option("pod_t", "s0:c3,c4");
    let spec = case.json();
    assert_eq!(spec["process"]["selinuxLabel"], "system_u:system_r:own_t:s0:c1,c2");
    assert_eq!(spec["linux"]["mountLabel"], "system_u:object_r:container_file_t:s0:c1,c2");
    case.security().selinux_options = None;
    assert_eq!(case.json()["process"]["selinuxLabel"], "system_u:system_r:pod_t:s0:c3,c4");
    case.privileged();
    assert!(case.json()["process"].get("selinuxLabel").is_none());
    assert_eq!(case.json()["linux"]["mountLabel"], "system_u:object_r:container_file_t:s0:c3,c4");
}

#[test]
fn users_and_groups_are_found() {
    type Change = fn(&mut LinuxContainerSecurityContext);
    type Found = Option<(i64, i64, &'static [i64])>;
    let cases: &[(&str, Change, Found)] = &[
        ("", |_| {}, Some((0, 0, &[0, 6]))),
        ("web", |_| {}, Some((33, 34, &[6, 7, 34]))),
        ("33:5", |_| {}, Some((33, 5, &[5, 6, 7]))),
        ("web", |s| s.run_as_user = Some(Int64Value { value: 1000 }), Some((1000, 0, &[0]))),
        (
            "web",
            |s| {
                s.run_as_user = Some(Int64Value { value: 33 });
                s.run_as_group = Some(Int64Value { value: 9 });
            },
            Some((33, 9, &[6, 7, 9])),
        ),
        (
            "",
            |s| {
                s.run_as_username = "web".into();
                s.run_as_user = Some(Int64Value { value: 5 });
                s.run_as_group = Some(Int64Value { value: 9 });
            },
            Some((33, 9, &[6, 7, 9])),
        ),
        ("web", |s| s.supplemental_groups = vec![100, 6], Some((33, 34, &[6, 7, 34, 100]))),
        (
            "web",
            |s| {
                s.supplemental_groups = vec![100];
                s.supplemental_groups_policy = SupplementalGroupsPolicy::Strict.into();
            },
            Some((33, 34, &[34, 100])),
        ),
        ("", |s| s.run_as_group = Some(Int64Value { value: 9 }), None),
        ("", |s| s.run_as_username = "nobody-here".into(), None),
        ("", |s| s.run_as_user = Some(Int64Value { value: -1 }), None),
        ("", |s| s.run_as_user = Some(Int64Value { value: 1 << 32 }), None),
        ("", |s| s.supplemental_groups = vec![-1], None),
        ("", |s| s.supplemental_groups = vec![1 << 32], None),
        ("", |s| s.supplemental_groups_policy = 9, None),
    ];
    for (at, (image, change, expected)) in cases.iter().enumerate() {
        let mut case = Case::new();
        case.image.user = (*image).into();
        change(case.security());
        let found = case.build().map(|built| built.user.linux.unwrap());
        match expected {
            None => assert!(found.is_err(), "case {at}"),
            Some((uid, gid, groups)) => {
                let found = found.unwrap_or_else(|error| panic!("case {at}: {error}"));
                assert_eq!(
                    (found.uid, found.gid, &found.supplemental_groups[..]),
                    (*uid, *gid, *groups),
                    "{at}"
                );
            }
        }
    }
}

#[test]
fn paths_are_hidden_and_privileges_kept_as_asked() {
    let mut case = Case::new();
    case.security().masked_paths = owned(&["/proc/kcore"]);
    case.security().readonly_paths = owned(&["/proc/sys"]);
    case.security().no_new_privs = true;
    case.security().readonly_rootfs = true;
    let spec = case.json();
    assert_eq!(spec["linux"]["maskedPaths"], json!(["/proc/kcore"]));
    assert_eq!(spec["linux"]["readonlyPaths"], json!(["/proc/sys"]));
    assert_eq!(spec["process"]["noNewPrivileges"], true);
    assert_eq!(spec["root"], json!({"path":"rootfs","readonly":true}));
    assert_eq!(mounted(&spec, "/etc/hosts")["options"], json!(["rbind", "rprivate", "ro"]));
    assert_eq!(mounted(&spec, "/dev/shm")["options"], json!(["rbind", "rprivate", "rw"]));
    case.options.disable_proc_mount = true;
    assert!(case.json()["linux"]["maskedPaths"].as_array().unwrap().contains(&json!("/sys/firmware")));
}

#[test]
fn limits_are_set() {
    let mut case = Case::new();
    *case.resources() = LinuxContainerResources {
        cpu_period: 100_000,
        cpu_quota: 50_000,
        cpu_shares: 512,
        memory_limit_in_bytes: 1 << 20,
        oom_score_adj: 500,
        cpuset_cpus: "0-1".into(),
        cpuset_mems: "0".into(),
        ..LinuxContainerResources::default()
    };
    let built = case.build().unwrap();
    assert_eq!(built.resources.memory_swap_limit_in_bytes, 1 << 20, "no swap unless asked");
    assert_eq!((built.resources.cpu_shares, built.resources.oom_score_adj), (512, 500));
    let spec = serde_json::to_value(built.spec).unwrap();
    assert_eq!(
        spec["linux"]["resources"]["cpu"],
        json!({"shares":512,"quota":50000,"period":100000,"cpus":"0-1","mems":"0"})
    );
    assert_eq!(spec["linux"]["resources"]["memory"], json!({"limit":1_048_576,"swap":1_048_576}));
    case.resources().memory_swap_limit_in_bytes = 2 << 20;
    assert_eq!(case.json()["linux"]["resources"]["memory"]["swap"], 2 << 20);
    case.host.swap = false;
    assert!(case.json()["linux"]["resources"]["memory"].get("swap").is_none());
    case.resources().cpu_period = -1;
    assert!(matches!(case.build(), Err(Error::InvalidArgument(_))));
    case.container.linux.as_mut().unwrap().resources = None;
    assert!(case.json()["process"].get("oomScoreAdj").is_none());
}

#[test]
fn scores_are_clamped_where_they_cannot_be_lowered() {
    for (asked, own, may, restrict, score) in [
        (-997, 0, true, false, -997),
        (-997, 0, false, false, 0),
        (-997, -999, false, false, -997),
        (-997, -500, true, true, -500),
        (100, 0, false, true, 100),
        (5000, 0, true, false, 1000),
        (i64::MIN, 0, true, false, -1000),
    ] {
        let mut case = Case::new();
        case.resources().oom_score_adj = asked;
        case.host.oom_score_adj = own;
        case.host.may_lower_oom_score_adj = may;
        case.options.restrict_oom_score_adj = restrict;
        assert_eq!(case.json()["process"]["oomScoreAdj"], score, "{asked}");
    }
}

#[test]
fn huge_pages_are_limited_where_that_can_be() {
    let mut case = Case::new();
    let limit = |page_size: &str, limit| HugepageLimit { page_size: page_size.into(), limit };
    case.resources().hugepage_limits = vec![limit("2MB", 5), limit("1GB", 0)];
    assert!(case.json()["linux"]["resources"].get("hugepageLimits").is_none(), "off by default");
    case.options.disable_hugetlb_controller = false;
    case.build().unwrap();
    case.options.tolerate_missing_hugetlb_controller = false;
    assert!(case.refusal().contains("hugetlb"));
    case.host.controllers = ["hugetlb".to_owned()].into();
    let limits = json!([{"pageSize":"1GB","limit":0},{"pageSize":"2MB","limit":5}]);
    assert_eq!(case.json()["linux"]["resources"]["hugepageLimits"], limits);
    let built = case.build().unwrap();
    assert_eq!(built.resources.hugepage_limits, [limit("1GB", 0), limit("2MB", 5)]);
    let more = LinuxContainerResources {
        hugepage_limits: vec![limit("2MB", 7)],
        ..LinuxContainerResources::default()
    };
    let update = resources(&built.spec, &more, &case.host, &case.options).unwrap();
    assert_eq!(update.reported.hugepage_limits, [limit("1GB", 0), limit("2MB", 7)], "one limit a size");
}

#[test]
fn files_of_cgroup_v2_are_set_there() {
    let mut case = Case::new();
    case.resources().unified.insert("pids.max".into(), "7".into());
    assert_eq!(case.json()["linux"]["resources"]["pids"], json!({"limit":7}));
    case.resources().unified.insert("memory.high".into(), "9".into());
    assert!(case.refusal().contains("cgroup v2"));
    case.host.cgroup2 = true;
    assert_eq!(case.json()["linux"]["resources"]["unified"], json!({"memory.high":"9","pids.max":"7"}));
    assert_eq!(case.build().unwrap().resources.unified.len(), 2);
    assert_eq!(namespace(&case.json(), "cgroup").as_deref(), Some(""));
}

#[test]
fn an_update_changes_what_it_says_and_no_more() {
    let mut case = Case::new();
    case.resources().memory_limit_in_bytes = 100;
    case.resources().cpu_shares = 2;
    case.resources().oom_score_adj = 9;
    let built = case.build().unwrap();
    let change = LinuxContainerResources {
        memory_limit_in_bytes: 200,
        cpu_quota: 1000,
        oom_score_adj: 1,
        ..LinuxContainerResources::default()
    };
    let update = resources(&built.spec, &change, &case.host, &case.options).unwrap();
    let told = serde_json::to_value(&update.resources).unwrap();
    assert_eq!(told["memory"], json!({"limit":200,"swap":200}));
    assert_eq!(told["cpu"], json!({"shares":2,"quota":1000}));
    assert_eq!(update.spec.linux.as_ref().unwrap().resources.as_ref(), Some(&update.resources));
    assert_eq!(update.reported.oom_score_adj, 9);
    let bytes = encode_resources(&update.resources).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&bytes).unwrap(), told);
    let nothing = resources(&update.spec, &LinuxContainerResources::default(), &case.host, &case.options);
    assert_eq!(nothing.unwrap().spec, update.spec);
}

#[test]
fn a_pods_limits_are_noted() {
    let mut pod = PodSandboxConfig::default();
    let limits = |cpu_shares| LinuxContainerResources { cpu_shares, ..LinuxContainerResources::default() };
    let request = |overhead, resources| UpdatePodSandboxResourcesRequest {
        overhead,
        resources,
        ..UpdatePodSandboxResourcesRequest::default()
    };
    update_pod(&mut pod, &request(Some(limits(1)), Some(limits(2))));
    update_pod(&mut pod, &request(None, Some(limits(3))));
    let linux = pod.linux.unwrap();
    assert_eq!((linux.overhead, linux.resources), (Some(limits(1)), Some(limits(3))));
}

#[test]
fn cgroups_lie_beneath_the_pods() {
    for (driver, parent, path) in [
        (CgroupDriver::Cgroupfs, "", Some("/k8s.io/c1")),
        (CgroupDriver::Cgroupfs, "/kubepods/burstable/podx", Some("/kubepods/burstable/podx/c1")),
        (CgroupDriver::Cgroupfs, "/kubepods.slice/x.slice/", Some("/kubepods.slice/x.slice/c1")),
        (CgroupDriver::Systemd, "", Some("system.slice:cri-containerd:c1")),
        (
            CgroupDriver::Systemd,
            "/kubepods.slice/kubepods-x.slice",
            Some("kubepods-x.slice:cri-containerd:c1"),
        ),
        (CgroupDriver::Systemd, "/kubepods/podx", None),
    ] {
        let mut case = Case::new();
        case.options.cgroup = driver;
        case.pod.linux.as_mut().unwrap().cgroup_parent = parent.into();
        match path {
            Some(path) => assert_eq!(case.build().unwrap().cgroup, path),
            None => assert!(case.refusal().contains("systemd")),
        }
    }
    let mut case = Case::new();
    case.options.disable_cgroup = true;
    case.resources().memory_limit_in_bytes = 5;
    let spec = case.json();
    assert!(spec["linux"].get("cgroupsPath").is_none() && spec["linux"].get("resources").is_none());
}

#[test]
fn what_the_kubelet_mounts_takes_the_place_of_defaults() {
    let mut case = Case::new();
    case.mount("/etc/hosts/", |_| {}).mount("/proc", |_| {}).mount("/a/b/c", |_| {}).mount("/a", |_| {});
    let spec = case.json();
    let places = places(&spec);
    assert_eq!(places.iter().filter(|place| place.starts_with("/etc/hosts")).count(), 1);
    assert_eq!(mounted(&spec, "/proc")["type"], "bind");
    let at = |path: &str| places.iter().position(|place| place == path).unwrap();
    assert!(at("/a") < at("/a/b/c") && at("/proc") < at("/etc/hosts/"));
    assert_eq!(mounted(&spec, "/a")["options"], json!(["rbind", "rprivate", "rw"]));
    assert_eq!(mounted(&spec, "/a")["source"], "/real3");

    let mut case = Case::new();
    case.mount("/dev", |_| {});
    let spec = case.json();
    let places = self::places(&spec);
    let of_dev: Vec<_> = places.iter().filter(|place| place.starts_with("/dev")).collect();
    assert_eq!(of_dev, ["/dev", "/dev/shm"], "the pod's shared memory is bound, as containerd has it");
}

#[test]
fn mounts_propagate_where_the_machine_lets_them() {
    use MountPropagation::{PropagationBidirectional, PropagationHostToContainer, PropagationPrivate};
    for (asked, has, option) in [
        (PropagationPrivate, Propagation::Private, Some(("rprivate", None))),
        (PropagationPrivate, Propagation::Shared, Some(("rprivate", None))),
        (PropagationHostToContainer, Propagation::Private, None),
        (PropagationHostToContainer, Propagation::Slave, Some(("rslave", Some("rslave")))),
        (PropagationHostToContainer, Propagation::Shared, Some(("rslave", Some("rslave")))),
        (PropagationBidirectional, Propagation::Private, None),
        (PropagationBidirectional, Propagation::Slave, None),
        (PropagationBidirectional, Propagation::Shared, Some(("rshared", Some("rshared")))),
    ] {
        let mut case = Case::new();
        case.mount("/m", |mount| mount.propagation = asked.into());
        case.facts.sources[0].propagation = has;
        match option {
            None => assert!(case.refusal().contains("--make-rshared"), "{asked:?} {has:?}"),
            Some((option, root)) => {
                let spec = case.json();
                assert_eq!(mounted(&spec, "/m")["options"][1], option);
                assert_eq!(spec["linux"].get("rootfsPropagation").and_then(Value::as_str), root);
            }
        }
    }
    let mut case = Case::new();
    case.mount("/a", |mount| mount.propagation = PropagationBidirectional.into());
    case.mount("/b", |mount| mount.propagation = PropagationHostToContainer.into());
    case.facts.sources.iter_mut().for_each(|source| source.propagation = Propagation::Shared);
    assert_eq!(case.json()["linux"]["rootfsPropagation"], "rshared");
}

#[test]
fn mounts_are_read_only_mapped_and_limited_as_asked() {
    let mut case = Case::new();
    case.mount("/m", |mount| {
        mount.readonly = true;
        mount.mount_options = owned(&["noexec", "nosuid"]);
    });
    assert_eq!(
        mounted(&case.json(), "/m")["options"],
        json!(["rbind", "rprivate", "ro", "noexec", "nosuid"])
    );
    case.container.mounts[0].mount_options = owned(&["rshared"]);
    assert!(case.refusal().contains("rshared"));
    case.container.mounts[0].mount_options.clear();

    case.container.mounts[0].recursive_read_only = true;
    assert!(case.refusal().starts_with("RROUnsupported"));
    case.options.recursive_read_only = true;
    assert_eq!(mounted(&case.json(), "/m")["options"], json!(["rbind", "rprivate", "rro"]));
    case.facts.sources[0].propagation = Propagation::Shared;
    for propagation in
        [MountPropagation::PropagationBidirectional, MountPropagation::PropagationHostToContainer]
    {
        case.container.mounts[0].propagation = propagation.into();
        assert!(case.refusal().contains("private propagation"));
    }
    case.container.mounts[0].propagation = 0;
    case.container.mounts[0].readonly = false;
    assert!(case.refusal().contains("but not read-only"));
    case.container.mounts[0].recursive_read_only = false;

    let range = vec![IdMapping { host_id: 100_000, container_id: 0, length: 65_536 }];
    case.container.mounts[0].uid_mappings.clone_from(&range);
    assert!(case.refusal().contains("groups"), "{}", case.refusal());
    case.container.mounts[0].gid_mappings = range;
    let spec = case.json();
    let made = mounted(&spec, "/m");
    assert_eq!(made["source"], "/mapped/0", "which the engine makes for the moment of the start");
    assert!(made.get("uidMappings").is_none());
    case.container.mounts[0].propagation = MountPropagation::PropagationBidirectional.into();
    assert!(case.refusal().contains("shared with the machine"), "{}", case.refusal());
    case.container.mounts[0].propagation = 0;
    case.container.mounts[0].image = Some(ImageSpec { image: "x".into(), ..ImageSpec::default() });
    assert_eq!(mounted(&case.json(), "/m")["source"], "/real0", "an image has its owners from its snapshot");
    case.container.mounts[0].image = None;
    case.container.mounts[0].container_path.clear();
    assert!(matches!(case.build(), Err(Error::InvalidArgument(_))));
    case.facts.sources.clear();
    assert!(matches!(case.build(), Err(Error::Internal(_))), "nothing is left out silently");
}

#[test]
fn images_volumes_are_made_unless_something_is_mounted_there() {
    let mut case = Case::new();
    for path in ["/data/", "cache", "/taken", "/data"] {
        case.image.volumes.insert(path.into(), json!({}));
    }
    case.mount("/taken/", |_| {});
    let built = case.build().unwrap();
    let volume = |at: &str, destination: &str| Volume {
        source: Path::new("/volumes").join(at),
        destination: destination.into(),
    };
    assert_eq!(built.volumes, [volume("0", "/cache"), volume("1", "/data")]);
    let spec = serde_json::to_value(built.spec).unwrap();
    assert_eq!(mounted(&spec, "/data")["source"], "/volumes/1");
    case.options.ignore_image_defined_volumes = true;
    assert!(case.build().unwrap().volumes.is_empty());
}

#[test]
fn devices_are_given_with_what_may_be_done_to_them() {
    let mut case = Case::new();
    let node = Node {
        path: "/dev/x".into(),
        kind: "b".into(),
        major: 8,
        minor: 1,
        file_mode: Some(0o660),
        uid: Some(0),
        gid: Some(6),
    };
    case.container.devices = vec![Device { permissions: "rw".into(), ..Device::default() }];
    case.facts.devices = vec![vec![node]];
    case.security().run_as_user = Some(Int64Value { value: 1000 });
    let spec = case.json();
    assert_eq!(
        spec["linux"]["devices"],
        json!([{"path":"/dev/x","type":"b","major":8,"minor":1,"fileMode":432,"uid":0,"gid":6}])
    );
    assert_eq!(
        spec["linux"]["resources"]["devices"],
        json!([{"allow":false,"access":"rwm"},{"allow":true,"type":"b","major":8,"minor":1,"access":"rw"}])
    );
    case.options.device_ownership_from_security_context = true;
    let device = &case.json()["linux"]["devices"][0];
    assert_eq!((&device["uid"], &device["gid"]), (&json!(1000), &json!(6)));
}

#[test]
fn process_ids_are_shared_as_asked() {
    use NamespaceMode::{Container, Node as Machine, Pod, Target};
    for (pod, own, path, namespace_path) in [
        (Pod, Pod, Some("/ns/pid"), Some("/ns/pid")),
        (Container, Container, None, Some("")),
        (Container, Container, Some("/ns/pid"), Some("")),
        (Container, Pod, None, Some("")),
        (Machine, Machine, None, None),
        (Machine, Pod, None, None),
        (Container, Target, Some("/proc/7/ns/pid"), Some("/proc/7/ns/pid")),
    ] {
        let mut case = Case::new();
        let mode = |mode: NamespaceMode| NamespaceOption { pid: mode.into(), ..NamespaceOption::default() };
        case.pod_security().namespace_options = Some(mode(pod));
        case.security().namespace_options = Some(mode(own));
        case.namespaces.pid = path.map(PathBuf::from);
        assert_eq!(namespace(&case.json(), "pid").as_deref(), namespace_path, "{pod:?} {own:?}");
    }
    let mut case = Case::new();
    case.security().namespace_options =
        Some(NamespaceOption { pid: Target.into(), target_id: "other".into(), ..NamespaceOption::default() });
    case.namespaces.pid = None;
    assert!(case.refusal().contains("other"));
}

#[test]
fn the_machines_namespaces_are_joined_by_leaving_them_out() {
    let mut case = Case::new();
    case.namespaces = Namespaces::default();
    let host = NamespaceOption {
        network: NamespaceMode::Node.into(),
        ipc: NamespaceMode::Node.into(),
        pid: NamespaceMode::Node.into(),
        ..NamespaceOption::default()
    };
    case.pod_security().namespace_options = Some(host.clone());
    case.security().namespace_options = Some(host);
    let spec = case.json();
    assert_eq!(spec["linux"]["namespaces"], json!([{"type":"mount"}]));
    assert_eq!(mounted(&spec, "/dev/shm")["source"], "/dev/shm");
}

fn users(mode: NamespaceMode, host_id: u32) -> Option<UserNamespace> {
    let ids = || vec![IdMapping { host_id, container_id: 0, length: 65_536 }];
    let ids = || if mode == NamespaceMode::Pod { ids() } else { Vec::new() };
    Some(UserNamespace { mode: mode.into(), uids: ids(), gids: ids() })
}

#[test]
fn user_namespaces_are_the_pods() {
    let with = |own: Option<UserNamespace>, pod: Option<UserNamespace>| {
        let mut case = Case::new();
        let options = |userns_options| NamespaceOption { userns_options, ..NamespaceOption::default() };
        case.security().namespace_options = Some(options(own));
        case.pod_security().namespace_options = Some(options(pod));
        case
    };
    let own = || users(NamespaceMode::Pod, 100_000);
    let mut case = with(own(), own());
    let mapping = json!([{"containerID":0,"hostID":100_000,"size":65_536}]);
    assert!(matches!(case.build(), Err(Error::Internal(_))), "none has been made");
    case.namespaces.user = Some("/ns/user".into());
    case.mount("/m", |asked| asked.readonly = true);
    case.facts.sources[0].kept = owned(&["ro", "nosuid", "noexec"]);
    case.facts.files.kept = owned(&["nodev"]);
    let spec = case.json();
    assert_eq!(namespace(&spec, "user").as_deref(), Some("/ns/user"));
    assert_eq!((&spec["linux"]["uidMappings"], &spec["linux"]["gidMappings"]), (&mapping, &mapping));
    assert_eq!(mounted(&spec, "/sys")["type"], "sysfs");
    assert_eq!(mounted(&spec, "/dev/mqueue")["type"], "mqueue");
    // What the machine's mounts forbid cannot be allowed from within.
    assert_eq!(mounted(&spec, "/m")["options"], json!(["rbind", "rprivate", "ro", "nosuid", "noexec"]));
    assert_eq!(mounted(&spec, "/etc/hosts")["options"], json!(["rbind", "rprivate", "rw", "nodev"]));
    let range = |value| Some(Int64Value { value });
    case.security().run_as_user = range(65_535);
    assert!(case.build().is_ok());
    case.security().run_as_user = range(65_536);
    assert!(case.refusal().contains("65536"), "{}", case.refusal());
    case.security().run_as_user = None;
    case.pod_security().namespace_options.as_mut().unwrap().network = NamespaceMode::Node.into();
    assert_eq!(
        mounted(&case.json(), "/sys")["options"][1],
        "rro",
        "the kernel mounts it for the network's owner"
    );
    for share in [
        |options: &mut NamespaceOption| options.pid = NamespaceMode::Node.into(),
        |options: &mut NamespaceOption| options.ipc = NamespaceMode::Node.into(),
    ] {
        let mut case = with(own(), own());
        case.namespaces.user = Some("/ns/user".into());
        share(case.pod_security().namespace_options.as_mut().unwrap());
        assert!(case.refusal().contains("/proc"), "{}", case.refusal());
    }
    let mut alone = with(own(), own());
    alone.namespaces.user = Some("/ns/user".into());
    alone.security().namespace_options.as_mut().unwrap().pid = NamespaceMode::Node.into();
    assert!(alone.refusal().contains("/proc"), "{}", alone.refusal());

    let node = with(users(NamespaceMode::Node, 0), users(NamespaceMode::Node, 0)).json();
    assert_eq!(namespace(&node, "user"), None);
    for (own, pod) in [
        (own(), None),
        (None, own()),
        (own(), users(NamespaceMode::Pod, 200_000)),
        (users(NamespaceMode::Container, 0), users(NamespaceMode::Container, 0)),
        (users(NamespaceMode::Target, 0), users(NamespaceMode::Target, 0)),
    ] {
        assert!(matches!(with(own, pod).build(), Err(Error::InvalidArgument(_))));
    }
    for spoil in [
        |users: &mut UserNamespace| users.uids.clear(),
        |users: &mut UserNamespace| users.uids.push(users.uids[0]),
        |users: &mut UserNamespace| users.gids[0].length = 0,
        |users: &mut UserNamespace| users.uids[0].container_id = 1,
        |users: &mut UserNamespace| users.gids[0].host_id = u32::MAX - 5,
        |users: &mut UserNamespace| users.mode = NamespaceMode::Node.into(),
        |users: &mut UserNamespace| users.mode = 100,
    ] {
        let mut bad = own().unwrap();
        spoil(&mut bad);
        assert!(matches!(with(Some(bad.clone()), Some(bad)).build(), Err(Error::InvalidArgument(_))));
    }
}

#[test]
fn annotations_are_passed_by_pattern() {
    for (pattern, text, hit) in [
        ("a.b/*", "a.b/c", true),
        ("a.b/*", "a.b/c/d", false),
        ("*", "abc", true),
        ("*", "a/b", false),
        ("a?c", "abc", true),
        ("a?c", "a/c", false),
        ("[a-c]x", "bx", true),
        ("[^a-c]x", "bx", false),
        ("[]a]x", "ax", false),
        ("\\*", "*", true),
        ("\\*", "x", false),
        ("[a", "a", false),
        ("", "", true),
        ("*a*a*a*", "bababab", true),
    ] {
        assert_eq!(matches(pattern, text), hit, "{pattern} {text}");
    }
    let mut case = Case::new();
    case.pod.annotations.extend([("p.io/a".into(), "1".into()), ("q.io/a".into(), "2".into())]);
    case.container.annotations.insert("c.io/a".into(), "3".into());
    case.container.image =
        Some(ImageSpec { user_specified_image: "as-written".into(), ..ImageSpec::default() });
    case.options.pod_annotations = owned(&["p.io/*"]);
    case.options.container_annotations = owned(&["c.io/*"]);
    let annotations = case.json()["annotations"].clone();
    assert_eq!((&annotations["p.io/a"], &annotations["c.io/a"]), (&json!("1"), &json!("3")));
    assert!(annotations.get("q.io/a").is_none());
    assert_eq!(annotations["io.kubernetes.cri.image-name"], "as-written");
}

#[test]
fn a_base_spec_is_started_from() {
    let base = r#"{"ociVersion":"1.1.0","process":{"cwd":"/","rlimits":[{"type":"RLIMIT_NOFILE","hard":5,"soft":5}],
        "capabilities":{"bounding":["CAP_KILL"]},"env":["BASE=1"]},"linux":{"namespaces":[{"type":"pid"},{"type":"mount"}],
        "seccomp":{"defaultAction":"SCMP_ACT_LOG"}},"hooks":{"poststop":[{"path":"/x"}]},
        "mounts":[{"destination":"/proc","type":"proc","source":"proc"},{"destination":"/run","type":"tmpfs","source":"t"}]}"#;
    let mut case = Case::new();
    case.options.base = Some(serde_json::from_str(base).unwrap());
    let spec = case.json();
    assert_eq!(spec["ociVersion"], "1.1.0");
    assert_eq!(spec["process"]["rlimits"][0]["hard"], 5);
    assert_eq!(spec["process"]["capabilities"]["bounding"], json!(["CAP_KILL"]));
    assert_eq!(spec["process"]["env"][0], "BASE=1");
    assert_eq!(spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_LOG");
    assert_eq!(spec["hooks"]["poststop"][0]["path"], "/x");
    assert!(!places(&spec).contains(&"/run".to_owned()));
    assert_eq!(spec["linux"]["cgroupsPath"], "/k8s.io/c1");
    assert_eq!(spec["linux"]["resources"]["devices"], json!([{"allow":false,"access":"rwm"}]));
}

#[test]
fn a_sandbox_is_told_what_to_make() {
    let mut case = Case::new();
    case.pod.log_directory = "/logs".into();
    case.options.sandbox_image = "pause:1".into();
    let linux = case.pod.linux.as_mut().unwrap();
    linux.cgroup_parent = "/kubepods/x".into();
    linux.sysctls.insert("net.ipv4.ip_unprivileged_port_start".into(), "80".into());
    linux.resources = Some(LinuxContainerResources { cpu_shares: 7, ..LinuxContainerResources::default() });
    let json = |case: &Case| serde_json::to_value(pod(&case.pod_wanted()).unwrap()).unwrap();
    let spec = json(&case);
    assert_eq!(spec["hostname"], "podname");
    assert!(spec.get("process").is_none() && spec.get("root").is_none());
    assert_eq!(namespace(&spec, "network").as_deref(), Some("/netns/p"));
    for made in ["uts", "ipc", "pid"] {
        assert_eq!(namespace(&spec, made).as_deref(), Some(""), "{made}");
    }
    assert_eq!(spec["linux"]["cgroupsPath"], "/kubepods/x/p");
    assert_eq!(
        spec["linux"]["sysctl"],
        json!({"net.ipv4.ip_unprivileged_port_start":"80","net.ipv4.ping_group_range":"0 2147483647"})
    );
    let annotations = &spec["annotations"];
    assert_eq!(annotations["io.kubernetes.cri.container-type"], "sandbox");
    assert_eq!(annotations["io.kubernetes.cri.sandbox-log-directory"], "/logs");
    assert_eq!(annotations["io.kubernetes.cri.podsandbox.image-name"], "pause:1");
    assert_eq!(annotations["io.kubernetes.cri.sandbox-cpu-shares"], "7");
    assert_eq!(annotations["io.kubernetes.cri.sandbox-memory"], "0");

    let options = |network: NamespaceMode, pid: NamespaceMode, ipc: NamespaceMode| NamespaceOption {
        network: network.into(),
        pid: pid.into(),
        ipc: ipc.into(),
        ..NamespaceOption::default()
    };
    case.pod_security().namespace_options =
        Some(options(NamespaceMode::Pod, NamespaceMode::Container, NamespaceMode::Node));
    let spec = json(&case);
    assert_eq!((namespace(&spec, "pid"), namespace(&spec, "ipc")), (None, None));
    case.pod_security().namespace_options =
        Some(options(NamespaceMode::Node, NamespaceMode::Container, NamespaceMode::Pod));
    let spec = json(&case);
    assert_eq!(spec["linux"]["namespaces"], json!([{"type":"ipc"}]));
    assert!(spec.get("hostname").is_none(), "the machine keeps its name");
    assert!(spec["linux"]["sysctl"].get("net.ipv4.ping_group_range").is_none());
    let userns =
        NamespaceOption { userns_options: users(NamespaceMode::Pod, 100_000), ..NamespaceOption::default() };
    case.pod_security().namespace_options = Some(userns);
    let wanted = WantedPod { userns: Some(Path::new("/userns/p")), ..case.pod_wanted() };
    let spec = serde_json::to_value(pod(&wanted).unwrap()).unwrap();
    assert!(spec["linux"]["sysctl"].get("net.ipv4.ping_group_range").is_none());
    assert_eq!(spec["linux"]["uidMappings"][0]["hostID"], 100_000);
    assert_eq!(namespace(&spec, "user").as_deref(), Some("/userns/p"));
    let bytes = encode(&pod(&wanted).unwrap()).unwrap();
    assert_eq!(serde_json::from_slice::<Value>(&bytes).unwrap(), spec);
}

#[test]
fn a_pause_container_holds_a_sandbox() {
    let mut case = Case::new();
    let image = ContainerDefaults {
        entrypoint: owned(&["/pause"]),
        user: "65535:65535".into(),
        env: owned(&["PATH=/"]),
        ..ContainerDefaults::default()
    };
    let accounts = Accounts::default();
    let json =
        |case: &Case| serde_json::to_value(pause(&case.pod_wanted(), &image, accounts).unwrap()).unwrap();
    let spec = json(&case);
    assert_eq!(spec["process"]["args"], json!(["/pause"]));
    assert_eq!(spec["process"]["env"], json!(["PATH=/"]));
    assert_eq!(spec["process"]["user"], json!({"uid":65535,"gid":65535,"additionalGids":[65535]}));
    assert_eq!(spec["process"]["oomScoreAdj"], -998);
    assert_eq!(spec["root"], json!({"path":"rootfs","readonly":true}));
    assert_eq!(spec["linux"]["resources"]["cpu"]["shares"], 2);
    assert_eq!(spec["hostname"], "podname");
    let read_only = json!(["rbind", "ro", "nosuid", "nodev", "noexec"]);
    assert_eq!(mounted(&spec, "/dev/shm")["options"], read_only);
    assert_eq!(mounted(&spec, "/etc/resolv.conf")["options"], read_only);
    for (kind, path) in [("mount", ""), ("network", "/netns/p"), ("uts", ""), ("ipc", ""), ("pid", "")] {
        assert_eq!(namespace(&spec, kind).as_deref(), Some(path), "{kind}");
    }
    assert!(spec["linux"].get("seccomp").is_none());
    case.pod_security().seccomp = Some(SecurityProfile::default());
    case.pod_security().run_as_user = Some(Int64Value { value: 5 });
    case.pod_security().supplemental_groups = vec![9];
    case.host.may_lower_oom_score_adj = false;
    let spec = json(&case);
    assert_eq!(spec["linux"]["seccomp"]["defaultAction"], "SCMP_ACT_ERRNO");
    assert_eq!(spec["process"]["user"], json!({"uid":5,"gid":0,"additionalGids":[0,9]}));
    assert_eq!(spec["process"]["oomScoreAdj"], 0);
    case.pod_security().privileged = true;
    let spec = json(&case);
    assert!(mounted(&spec, "/sys")["options"].as_array().unwrap().contains(&json!("rw")));
    assert!(spec["linux"].get("seccomp").is_none());
    assert!(matches!(
        pause(&case.pod_wanted(), &ContainerDefaults::default(), accounts),
        Err(Error::FailedPrecondition(_))
    ));
}

#[test]
fn specs_are_the_same_every_time() {
    let mut case = Case::new();
    case.privileged().mount("/a", |_| {});
    case.image.volumes.insert("/v".into(), json!({}));
    let (first, second) = (case.build().unwrap(), case.build().unwrap());
    assert_eq!(encode(&first.spec).unwrap(), encode(&second.spec).unwrap());
    let back: Spec = serde_json::from_slice(&encode(&first.spec).unwrap()).unwrap();
    assert_eq!(back, first.spec);
    let bound: Vec<&Mount> = back.mounts.iter().filter(|mount| mount.kind == "bind").collect();
    assert!(bound.iter().all(|mount| Path::new(&mount.source).is_absolute()));
}
