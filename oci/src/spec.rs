//! Building the runtime spec of a container: containerd's default, and the options that
//! `ctr run` and the CRI put on top.
//!
//! Options are methods on [`Spec`], applied in the caller's order; each creates the part of the
//! document it needs. Invariant: a fresh [`Spec::linux`] grants the fourteen default capabilities and no
//! inheritable ones, hides the power and kernel interfaces listed below, and denies all devices.

use std::collections::BTreeMap;

use crate::image::ContainerDefaults;
use crate::runtime::{
    Capabilities, Cpu, Device, DeviceRule, IdMapping, Linux, Memory, Mount, Namespace, Pids, Process,
    Resources, Rlimit, Root, Spec, User,
};

/// Version written into new specs. runc 1.1 and crun 1.8 accept it; crun refuses what lacks "1.0".
pub const OCI_VERSION: &str = "1.0.2-dev";

/// PATH for images that set no environment.
pub const DEFAULT_PATH: &str = "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// The capabilities a container has by default.
pub const DEFAULT_CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FSETID",
    "CAP_FOWNER",
    "CAP_MKNOD",
    "CAP_NET_RAW",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETFCAP",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SYS_CHROOT",
    "CAP_KILL",
    "CAP_AUDIT_WRITE",
];

/// Every capability of Linux, in the kernel's order: entry n is capability number n.
pub const ALL_CAPABILITIES: &[&str] = &[
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_DAC_READ_SEARCH",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_LINUX_IMMUTABLE",
    "CAP_NET_BIND_SERVICE",
    "CAP_NET_BROADCAST",
    "CAP_NET_ADMIN",
    "CAP_NET_RAW",
    "CAP_IPC_LOCK",
    "CAP_IPC_OWNER",
    "CAP_SYS_MODULE",
    "CAP_SYS_RAWIO",
    "CAP_SYS_CHROOT",
    "CAP_SYS_PTRACE",
    "CAP_SYS_PACCT",
    "CAP_SYS_ADMIN",
    "CAP_SYS_BOOT",
    "CAP_SYS_NICE",
    "CAP_SYS_RESOURCE",
    "CAP_SYS_TIME",
    "CAP_SYS_TTY_CONFIG",
    "CAP_MKNOD",
    "CAP_LEASE",
    "CAP_AUDIT_WRITE",
    "CAP_AUDIT_CONTROL",
    "CAP_SETFCAP",
    "CAP_MAC_OVERRIDE",
    "CAP_MAC_ADMIN",
    "CAP_SYSLOG",
    "CAP_WAKE_ALARM",
    "CAP_BLOCK_SUSPEND",
    "CAP_AUDIT_READ",
    "CAP_PERFMON",
    "CAP_BPF",
    "CAP_CHECKPOINT_RESTORE",
];

const MASKED_PATHS: &[&str] = &[
    "/proc/acpi",
    "/proc/asound",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
    "/proc/scsi",
];

const READONLY_PATHS: &[&str] = &["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];

/// Devices every container may use: type c, major, minor (none: any).
const DEFAULT_DEVICES: &[(i64, Option<i64>)] = &[
    (1, Some(3)), // null
    (1, Some(8)), // random
    (1, Some(7)), // full
    (5, Some(0)), // tty
    (1, Some(5)), // zero
    (1, Some(9)), // urandom
    (5, Some(1)), // console
    (136, None),  // pts
    (5, Some(2)), // ptmx
];

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|s| (*s).to_owned()).collect()
}

fn mount(destination: &str, kind: &str, source: &str, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        kind: kind.into(),
        source: source.into(),
        options: strings(options),
        ..Mount::default()
    }
}

/// Why an option is refused.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// Neither the image nor the caller names a program.
    #[error("no command: the image has neither entrypoint nor command, so give one")]
    NoCommand,
    /// Not a capability of Linux.
    #[error("{0:?} is not a Linux capability; names look like CAP_NET_ADMIN")]
    Capability(String),
    /// Not a namespace type.
    #[error("{0:?} is not a namespace type; use one of pid, network, uts, mount, user, ipc, cgroup, time")]
    Namespace(String),
    /// Not of the form `KEY=value`.
    #[error("environment entry {0:?} contains a NUL byte or has no name")]
    Environment(String),
    /// Not a usable mount.
    #[error("mount {0:?}: {1}")]
    Mount(String, &'static str),
    /// A number that makes no sense.
    #[error("{what}: {why}")]
    Limit {
        /// Which limit.
        what: &'static str,
        /// What is wrong with it.
        why: String,
    },
}

/// Default and overriding environment merged: an override replaces the entry of its name, an
/// override without `=` removes it, anything else is appended.
pub fn merge_env(defaults: &[String], overrides: &[String]) -> Vec<String> {
    let name = |entry: &str| entry.split_once('=').map_or(entry, |(name, _)| name).to_owned();
    let mut merged: Vec<Option<String>> = Vec::with_capacity(defaults.len() + overrides.len());
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    for entry in defaults {
        places.insert(name(entry), merged.len());
        merged.push(Some(entry.clone()));
    }
    for entry in overrides {
        let value = entry.contains('=').then(|| entry.clone());
        match (places.get(&name(entry)), value) {
            (Some(place), value) => merged[*place] = value,
            (None, Some(value)) => {
                places.insert(name(entry), merged.len());
                merged.push(Some(value));
            }
            (None, None) => {}
        }
    }
    merged.into_iter().flatten().collect()
}

impl Spec {
    /// containerd's default for a Linux container `id` in `namespace`.
    pub fn linux(namespace: &str, id: &str) -> Spec {
        let capabilities = strings(DEFAULT_CAPABILITIES);
        Spec {
            oci_version: OCI_VERSION.into(),
            root: Some(Root { path: "rootfs".into(), readonly: false }),
            process: Some(Process {
                cwd: "/".into(),
                no_new_privileges: true,
                capabilities: Some(Capabilities {
                    bounding: capabilities.clone(),
                    permitted: capabilities.clone(),
                    effective: capabilities,
                    ..Capabilities::default()
                }),
                rlimits: vec![Rlimit { kind: "RLIMIT_NOFILE".into(), hard: 1024, soft: 1024 }],
                ..Process::default()
            }),
            mounts: vec![
                mount("/proc", "proc", "proc", &["nosuid", "noexec", "nodev"]),
                mount("/dev", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
                mount(
                    "/dev/pts",
                    "devpts",
                    "devpts",
                    &["nosuid", "noexec", "newinstance", "ptmxmode=0666", "mode=0620", "gid=5"],
                ),
                mount("/dev/shm", "tmpfs", "shm", &["nosuid", "noexec", "nodev", "mode=1777", "size=65536k"]),
                mount("/dev/mqueue", "mqueue", "mqueue", &["nosuid", "noexec", "nodev"]),
                mount("/sys", "sysfs", "sysfs", &["nosuid", "noexec", "nodev", "ro"]),
                mount("/run", "tmpfs", "tmpfs", &["nosuid", "strictatime", "mode=755", "size=65536k"]),
            ],
            linux: Some(Linux {
                masked_paths: strings(MASKED_PATHS),
                readonly_paths: strings(READONLY_PATHS),
                cgroups_path: format!("/{namespace}/{id}"),
                resources: Some(Resources {
                    devices: vec![DeviceRule { allow: false, access: "rwm".into(), ..DeviceRule::default() }],
                    ..Resources::default()
                }),
                namespaces: ["pid", "ipc", "uts", "mount", "network"]
                    .iter()
                    .map(|kind| Namespace { kind: (*kind).into(), path: String::new() })
                    .collect(),
                ..Linux::default()
            }),
            ..Spec::default()
        }
    }

    /// The process part, made when missing.
    pub fn process_mut(&mut self) -> &mut Process {
        self.process.get_or_insert_with(Process::default)
    }

    /// The Linux part, made when missing.
    pub fn linux_mut(&mut self) -> &mut Linux {
        self.linux.get_or_insert_with(Linux::default)
    }

    /// The limits, made when missing.
    pub fn resources_mut(&mut self) -> &mut Resources {
        self.linux_mut().resources.get_or_insert_with(Resources::default)
    }

    fn cpu_mut(&mut self) -> &mut Cpu {
        self.resources_mut().cpu.get_or_insert_with(Cpu::default)
    }

    fn memory_mut(&mut self) -> &mut Memory {
        self.resources_mut().memory.get_or_insert_with(Memory::default)
    }

    /// Allows null, zero, full, the random and the terminal devices.
    pub fn allow_default_devices(&mut self) -> &mut Spec {
        let rules = DEFAULT_DEVICES.iter().map(|(major, minor)| DeviceRule {
            allow: true,
            kind: "c".into(),
            major: Some(*major),
            minor: *minor,
            access: "rwm".into(),
        });
        self.resources_mut().devices.extend(rules);
        self
    }

    /// Takes environment, command line and folder from an image. The environment already in
    /// the spec overrides the image's; `args` replace the image's command but not its entrypoint.
    /// The image's user is not applied here: see [`crate::user::resolve`] and [`Spec::set_user`].
    pub fn apply_image(
        &mut self,
        image: &ContainerDefaults,
        args: &[String],
    ) -> Result<&mut Spec, SpecError> {
        let path = [DEFAULT_PATH.to_owned()];
        let process = self.process_mut();
        process.env = merge_env(if image.env.is_empty() { &path } else { &image.env }, &process.env);
        let rest = if args.is_empty() { &image.cmd } else { args };
        process.args = image.entrypoint.iter().chain(rest).cloned().collect();
        process.cwd = if image.working_dir.is_empty() { "/".into() } else { image.working_dir.clone() };
        if process.args.is_empty() {
            return Err(SpecError::NoCommand);
        }
        Ok(self)
    }

    /// Merges `overrides` into the environment.
    pub fn set_env(&mut self, overrides: &[String]) -> Result<&mut Spec, SpecError> {
        for entry in overrides {
            if entry.contains('\0') || entry.starts_with('=') || entry.is_empty() {
                return Err(SpecError::Environment(entry.clone()));
            }
        }
        let process = self.process_mut();
        process.env = merge_env(&process.env, overrides);
        Ok(self)
    }

    /// Sets the command line.
    pub fn set_args(&mut self, args: &[String]) -> &mut Spec {
        self.process_mut().args = args.to_vec();
        self
    }

    /// Sets the working folder, an absolute path inside.
    pub fn set_cwd(&mut self, cwd: &str) -> &mut Spec {
        self.process_mut().cwd = cwd.into();
        self
    }

    /// Sets who the process runs as.
    pub fn set_user(&mut self, user: User) -> &mut Spec {
        self.process_mut().user = user;
        self
    }

    /// Gives the process a terminal.
    pub fn set_terminal(&mut self) -> &mut Spec {
        let process = self.process_mut();
        process.terminal = true;
        process.env = merge_env(&process.env, &["TERM=xterm".to_owned()]);
        self
    }

    /// Sets the host name inside.
    pub fn set_hostname(&mut self, name: &str) -> &mut Spec {
        self.hostname = name.into();
        self
    }

    /// Uses the folder `path` as root file system.
    pub fn set_root(&mut self, path: &str) -> &mut Spec {
        self.root.get_or_insert_with(Root::default).path = path.into();
        self
    }

    /// Confines system calls by the default profile for the capabilities that are set now.
    pub fn set_default_seccomp(&mut self) -> &mut Spec {
        let capabilities = self.process.as_ref().and_then(|process| process.capabilities.as_ref());
        let bounding = capabilities.map_or(&[][..], |sets| &sets.bounding);
        let profile = crate::seccomp::default_profile(bounding);
        self.linux_mut().seccomp = Some(profile);
        self
    }

    /// Makes the root file system read-only.
    pub fn set_readonly_root(&mut self) -> &mut Spec {
        self.root.get_or_insert_with(|| Root { path: "rootfs".into(), readonly: true }).readonly = true;
        self
    }

    /// Adds mounts; one with the destination of an earlier mount replaces it.
    pub fn add_mounts(&mut self, mounts: Vec<Mount>) -> &mut Spec {
        self.mounts.retain(|old| mounts.iter().all(|new| new.destination != old.destination));
        self.mounts.extend(mounts);
        self
    }

    /// Joins the host's namespace of this kind.
    pub fn use_host_namespace(&mut self, kind: &str) -> &mut Spec {
        self.linux_mut().namespaces.retain(|namespace| namespace.kind != kind);
        self
    }

    /// Joins the namespace pinned at `path`, or makes a new one when it is empty.
    pub fn set_namespace(&mut self, kind: &str, path: &str) -> Result<&mut Spec, SpecError> {
        if !crate::runtime::NAMESPACE_KINDS.contains(&kind) {
            return Err(SpecError::Namespace(kind.to_owned()));
        }
        self.use_host_namespace(kind);
        self.linux_mut().namespaces.push(Namespace { kind: kind.into(), path: path.into() });
        Ok(self)
    }

    /// Shares the host's network, with its hosts and resolv.conf files.
    pub fn use_host_network(&mut self, hostname: &str) -> &mut Spec {
        self.use_host_namespace("network");
        let bind = |path: &str| mount(path, "bind", path, &["rbind", "ro"]);
        self.mounts.extend([bind("/etc/hosts"), bind("/etc/resolv.conf")]);
        let process = self.process_mut();
        process.env = merge_env(&process.env, &[format!("HOSTNAME={hostname}")]);
        self
    }

    /// Runs in a new user namespace with these mappings.
    pub fn set_user_namespace(&mut self, uids: Vec<IdMapping>, gids: Vec<IdMapping>) -> &mut Spec {
        self.use_host_namespace("user");
        let linux = self.linux_mut();
        linux.namespaces.push(Namespace { kind: "user".into(), path: String::new() });
        linux.uid_mappings = uids;
        linux.gid_mappings = gids;
        self
    }

    /// Adds capabilities to the bounding, permitted and effective sets.
    pub fn add_capabilities(&mut self, names: &[String]) -> Result<&mut Spec, SpecError> {
        let names = known_capabilities(names)?;
        let sets = self.process_mut().capabilities.get_or_insert_with(Capabilities::default);
        for set in [&mut sets.bounding, &mut sets.permitted, &mut sets.effective] {
            for name in &names {
                if !set.contains(name) {
                    set.push(name.clone());
                }
            }
        }
        Ok(self)
    }

    /// Takes capabilities out of every set.
    pub fn drop_capabilities(&mut self, names: &[String]) -> Result<&mut Spec, SpecError> {
        let names = known_capabilities(names)?;
        if let Some(sets) = &mut self.process_mut().capabilities {
            for set in [
                &mut sets.bounding,
                &mut sets.permitted,
                &mut sets.effective,
                &mut sets.inheritable,
                &mut sets.ambient,
            ] {
                set.retain(|name| !names.contains(name));
            }
        }
        Ok(self)
    }

    /// Sets the bounding, permitted and effective sets; none inheritable, none ambient.
    pub fn set_capabilities(&mut self, names: &[&str]) -> &mut Spec {
        let names = strings(names);
        self.process_mut().capabilities = Some(Capabilities {
            bounding: names.clone(),
            permitted: names.clone(),
            effective: names,
            ..Capabilities::default()
        });
        self
    }

    /// Lifts the confinement: the given capabilities (all that the caller has), nothing masked or
    /// read-only, writable /sys and cgroups, no seccomp, no security labels. Whether new privileges may be gained is another matter.
    /// Devices are separate: see [`Spec::allow_all_devices`].
    pub fn set_privileged(&mut self, capabilities: &[&str]) -> &mut Spec {
        self.set_capabilities(capabilities);
        let linux = self.linux_mut();
        linux.masked_paths.clear();
        linux.readonly_paths.clear();
        linux.seccomp = None;
        for mount in &mut self.mounts {
            if matches!(mount.kind.as_str(), "sysfs" | "cgroup") {
                for option in &mut mount.options {
                    if option == "ro" {
                        *option = "rw".into();
                    }
                }
            }
        }
        let process = self.process_mut();
        process.apparmor_profile.clear();
        process.selinux_label.clear();
        self
    }

    /// Allows every device, and adds nodes for the given ones.
    pub fn allow_all_devices(&mut self, nodes: Vec<Device>) -> &mut Spec {
        self.resources_mut().devices =
            vec![DeviceRule { allow: true, access: "rwm".into(), ..DeviceRule::default() }];
        self.linux_mut().devices.extend(nodes);
        self
    }

    /// Adds device nodes and allows `access` (of `r`, `w`, `m`) to them.
    pub fn add_devices(&mut self, nodes: Vec<Device>, access: &str) -> &mut Spec {
        let rules: Vec<DeviceRule> = nodes
            .iter()
            .map(|node| DeviceRule {
                allow: true,
                kind: node.kind.clone(),
                major: Some(node.major),
                minor: Some(node.minor),
                access: access.into(),
            })
            .collect();
        self.resources_mut().devices.extend(rules);
        self.linux_mut().devices.extend(nodes);
        self
    }

    /// Sets a resource limit of the process, replacing one of the same kind.
    pub fn set_rlimit(&mut self, limit: Rlimit) -> Result<&mut Spec, SpecError> {
        if limit.soft > limit.hard {
            return Err(SpecError::Limit {
                what: "rlimit",
                why: format!("soft limit {} exceeds hard limit {}", limit.soft, limit.hard),
            });
        }
        let rlimits = &mut self.process_mut().rlimits;
        rlimits.retain(|old| old.kind != limit.kind);
        rlimits.push(limit);
        Ok(self)
    }

    /// Limits memory, in bytes.
    pub fn set_memory_limit(&mut self, bytes: u64) -> Result<&mut Spec, SpecError> {
        let limit = i64::try_from(bytes).map_err(|_| SpecError::Limit {
            what: "memory limit",
            why: format!("{bytes} bytes is too much"),
        })?;
        self.memory_mut().limit = Some(limit);
        Ok(self)
    }

    /// Limits memory and swap together, in bytes; -1 is unlimited.
    pub fn set_memory_swap(&mut self, bytes: i64) -> &mut Spec {
        self.memory_mut().swap = Some(bytes);
        self
    }

    /// Limits processor time to this many CPUs, by quota over a period of 100 ms.
    pub fn set_cpus(&mut self, cpus: f64) -> Result<&mut Spec, SpecError> {
        const PERIOD: f64 = 100_000.0;
        let quota = cpus * PERIOD;
        if !(1_000.0..=1e12).contains(&quota) {
            return Err(SpecError::Limit {
                what: "cpus",
                why: format!("{cpus} is not between 0.01 and 10000000"),
            });
        }
        Ok(self.set_cpu_quota(Some(quota as i64), Some(PERIOD as u64)))
    }

    /// Sets CPU time per period, both in microseconds.
    pub fn set_cpu_quota(&mut self, quota: Option<i64>, period: Option<u64>) -> &mut Spec {
        let cpu = self.cpu_mut();
        cpu.quota = quota;
        cpu.period = period;
        self
    }

    /// Sets how much unused quota carries over, in microseconds.
    pub fn set_cpu_burst(&mut self, burst: u64) -> &mut Spec {
        self.cpu_mut().burst = Some(burst);
        self
    }

    /// Sets the relative CPU weight.
    pub fn set_cpu_shares(&mut self, shares: u64) -> &mut Spec {
        self.cpu_mut().shares = Some(shares);
        self
    }

    /// Pins to CPUs and memory nodes, as `0-2,4`; empty leaves one as it is.
    pub fn set_cpuset(&mut self, cpus: &str, mems: &str) -> &mut Spec {
        let cpu = self.cpu_mut();
        if !cpus.is_empty() {
            cpu.cpus = cpus.into();
        }
        if !mems.is_empty() {
            cpu.mems = mems.into();
        }
        self
    }

    /// Limits the number of processes.
    pub fn set_pids_limit(&mut self, limit: i64) -> &mut Spec {
        self.resources_mut().pids = Some(Pids { limit });
        self
    }

    /// Sets the cgroup; an empty path leaves the choice to the runtime.
    pub fn set_cgroup(&mut self, path: &str) -> &mut Spec {
        self.linux_mut().cgroups_path = path.into();
        self
    }

    /// Adds annotations.
    pub fn add_annotations<I: IntoIterator<Item = (String, String)>>(&mut self, pairs: I) -> &mut Spec {
        self.annotations.extend(pairs);
        self
    }
}

fn known_capabilities(names: &[String]) -> Result<Vec<String>, SpecError> {
    names
        .iter()
        .map(|name| match ALL_CAPABILITIES.contains(&name.as_str()) {
            true => Ok(name.clone()),
            false => Err(SpecError::Capability(name.clone())),
        })
        .collect()
}

/// Parses `type=bind,src=/a,dst=/b,options=rbind:ro`; a field may be put in double quotes.
pub fn parse_mount(text: &str) -> Result<Mount, SpecError> {
    let fail = |why| SpecError::Mount(text.to_owned(), why);
    let mut parsed = Mount::default();
    for field in comma_fields(text).ok_or_else(|| fail("unbalanced quotes"))? {
        let (key, value) =
            field.split_once('=').ok_or_else(|| fail("expected key=value fields joined by commas"))?;
        match key {
            "type" => parsed.kind = value.into(),
            "source" | "src" => parsed.source = value.into(),
            "destination" | "dst" | "target" => parsed.destination = value.into(),
            "options" => parsed.options = value.split(':').map(str::to_owned).collect(),
            _ => return Err(fail("known fields are type, source (src), destination (dst) and options")),
        }
    }
    if !parsed.destination.starts_with('/') {
        return Err(fail("destination must be an absolute path"));
    }
    Ok(parsed)
}

/// Splits at commas; a field in double quotes may hold commas, and `""` in it is a quote.
fn comma_fields(text: &str) -> Option<Vec<String>> {
    let mut fields = vec![String::new()];
    let mut quoted = false;
    let mut chars = text.chars().peekable();
    while let Some(c) = chars.next() {
        let field = fields.last_mut()?;
        match c {
            '"' if quoted && chars.peek() == Some(&'"') => {
                chars.next();
                field.push('"');
            }
            '"' if quoted || field.is_empty() => quoted = !quoted,
            ',' if !quoted => fields.push(String::new()),
            c => field.push(c),
        }
    }
    (!quoted).then_some(fields)
}

/// Parses `container-id:host-id:size`.
pub fn parse_id_mapping(text: &str) -> Result<IdMapping, SpecError> {
    let fail =
        || SpecError::Limit { what: "id mapping", why: format!("{text:?} is not container-id:host-id:size") };
    let parts: Vec<u32> =
        text.split(':').map(|part| part.parse().map_err(|_| fail())).collect::<Result<_, SpecError>>()?;
    match parts[..] {
        [container_id, host_id, size]
            if size > 0
                && container_id.checked_add(size - 1).is_some()
                && host_id.checked_add(size - 1).is_some() =>
        {
            Ok(IdMapping { container_id, host_id, size })
        }
        _ => Err(fail()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn owned(list: &[&str]) -> Vec<String> {
        strings(list)
    }

    #[test]
    fn default_is_containerds() {
        let mut spec = Spec::linux("default", "c1");
        spec.allow_default_devices();
        let json = serde_json::to_value(&spec).unwrap();
        assert_eq!(json["linux"]["cgroupsPath"], "/default/c1");
        assert_eq!(json["process"]["noNewPrivileges"], true);
        assert_eq!(json["process"]["capabilities"]["bounding"].as_array().unwrap().len(), 14);
        assert!(json["process"]["capabilities"].get("inheritable").is_none());
        assert_eq!(json["mounts"].as_array().unwrap().len(), 7);
        assert_eq!(
            json["linux"]["resources"]["devices"][0],
            serde_json::json!({"allow": false, "access": "rwm"})
        );
        assert_eq!(json["linux"]["namespaces"].as_array().unwrap().len(), 5);
        assert!(
            json["linux"]["maskedPaths"]
                .as_array()
                .unwrap()
                .contains(&"/sys/devices/virtual/powercap".into())
        );
        assert_eq!(json["process"]["rlimits"][0]["hard"], 1024);
    }

    #[test]
    fn image_and_caller_make_the_command_line() {
        let image = ContainerDefaults {
            env: owned(&["PATH=/bin", "A=1"]),
            entrypoint: owned(&["/entry"]),
            cmd: owned(&["default"]),
            working_dir: "/work".into(),
            ..ContainerDefaults::default()
        };
        let mut spec = Spec::linux("n", "i");
        spec.set_env(&owned(&["A=2", "B=3"])).unwrap();
        spec.apply_image(&image, &[]).unwrap();
        let process = spec.process.clone().unwrap();
        assert_eq!(process.args, ["/entry", "default"]);
        assert_eq!(process.env, ["PATH=/bin", "A=2", "B=3"]);
        assert_eq!(process.cwd, "/work");
        spec.apply_image(&image, &owned(&["x", "y"])).unwrap();
        assert_eq!(spec.process_mut().args, ["/entry", "x", "y"]);
        let bare = ContainerDefaults::default();
        assert_eq!(Spec::linux("n", "i").apply_image(&bare, &[]), Err(SpecError::NoCommand));
        let mut spec = Spec::linux("n", "i");
        spec.apply_image(&bare, &owned(&["sh"])).unwrap();
        assert_eq!(spec.process_mut().env, [DEFAULT_PATH]);
    }

    #[test]
    fn env_merges_in_place() {
        let merged = merge_env(&owned(&["A=1", "B=2", "C=3"]), &owned(&["B=x", "C", "D=4", "E", "D=5"]));
        assert_eq!(merged, ["A=1", "B=x", "D=5"]);
        assert!(Spec::default().set_env(&owned(&["=x"])).is_err());
        assert!(Spec::default().set_env(&owned(&["A=\0"])).is_err());
    }

    #[test]
    fn capabilities_come_and_go_but_are_never_inheritable() {
        let mut spec = Spec::linux("n", "i");
        spec.add_capabilities(&owned(&["CAP_SYS_ADMIN", "CAP_CHOWN"])).unwrap();
        spec.drop_capabilities(&owned(&["CAP_MKNOD"])).unwrap();
        let sets = spec.process_mut().capabilities.clone().unwrap();
        assert_eq!(sets.bounding.len(), 14);
        assert!(sets.effective.contains(&"CAP_SYS_ADMIN".to_owned()));
        assert!(!sets.permitted.contains(&"CAP_MKNOD".to_owned()));
        assert!(sets.inheritable.is_empty() && sets.ambient.is_empty());
        assert!(spec.add_capabilities(&owned(&["SYS_ADMIN"])).is_err());
        spec.set_privileged(ALL_CAPABILITIES);
        assert!(spec.linux_mut().masked_paths.is_empty());
        assert!(spec.mounts.iter().any(|m| m.kind == "sysfs" && m.options.contains(&"rw".to_owned())));
        assert!(spec.process_mut().no_new_privileges);
        assert!(spec.process_mut().capabilities.clone().unwrap().inheritable.is_empty());
    }

    #[test]
    fn limits_are_checked() {
        let mut spec = Spec::linux("n", "i");
        spec.set_cpus(1.5).unwrap();
        assert_eq!(spec.cpu_mut().quota, Some(150_000));
        for bad in [0.0, -1.0, f64::NAN, f64::INFINITY, 1e-9] {
            assert!(spec.set_cpus(bad).is_err(), "{bad}");
        }
        assert!(spec.set_memory_limit(u64::MAX).is_err());
        assert!(spec.set_rlimit(Rlimit { kind: "RLIMIT_NOFILE".into(), hard: 1, soft: 2 }).is_err());
        spec.set_rlimit(Rlimit { kind: "RLIMIT_NOFILE".into(), hard: 5, soft: 2 }).unwrap();
        assert_eq!(spec.process_mut().rlimits.len(), 1);
    }

    #[test]
    fn mounts_parse_and_replace() {
        let parsed = parse_mount("type=bind,src=/a,dst=/proc,options=rbind:ro").unwrap();
        assert_eq!(parsed.options, ["rbind", "ro"]);
        let mut spec = Spec::linux("n", "i");
        spec.add_mounts(vec![parsed]);
        assert_eq!(spec.mounts.iter().filter(|m| m.destination == "/proc").count(), 1);
        assert_eq!(parse_mount(r#""src=/a,b",dst=/c"#).unwrap().source, "/a,b");
        for bad in ["", "type", "dst=rel", "nope=1,dst=/a", r#""dst=/a"#] {
            assert!(parse_mount(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn namespaces_are_joined_or_shared() {
        let mut spec = Spec::linux("n", "i");
        spec.use_host_network("me");
        assert!(spec.linux_mut().namespaces.iter().all(|n| n.kind != "network"));
        assert!(spec.mounts.iter().any(|m| m.destination == "/etc/hosts"));
        spec.set_namespace("network", "/run/netns/x").unwrap();
        assert!(spec.set_namespace("net", "").is_err());
        assert_eq!(spec.linux_mut().namespaces.len(), 5);
    }

    proptest! {
        #[test]
        fn parsers_never_panic(text in "\\PC{0,80}") {
            let _ = parse_mount(&text);
            let _ = parse_id_mapping(&text);
        }

        #[test]
        fn merged_env_names_are_unique(defaults in prop::collection::vec("[A-C]=[a-z]?", 0..4),
                                       overrides in prop::collection::vec("[A-E](=[a-z]?)?", 0..6)) {
            let defaults: Vec<String> = merge_env(&[], &defaults);
            let merged = merge_env(&defaults, &overrides);
            let names: Vec<_> = merged.iter().map(|e| e.split('=').next().unwrap()).collect();
            let unique: std::collections::HashSet<_> = names.iter().collect();
            prop_assert_eq!(unique.len(), names.len());
        }
    }
}
