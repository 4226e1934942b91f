//! Runtime specs of pods and their containers, built from what the kubelet asks for.
//!
//! ```text
//!  ContainerConfig, PodSandboxConfig, image \
//!  Host   the machine, read once             > container() -> Built { spec, user, resources, cgroup, stop signal, volumes }
//!  Facts  what the config refers to,        /
//!         looked up just before
//!  PodSandboxConfig --> pod()     what the shim of a sandbox makes and holds
//!                   `-> pause()   the container that holds a sandbox in an image's stead
//!  Spec, LinuxContainerResources --> resources()
//! ```
//!
//! Invariants: what this module's functions give depends on their arguments alone; the machine is looked at by [`Host::read`]
//! and [`Facts::gather`], which block. What a container may do is never more than was asked for: what cannot be honoured is an
//! error, or, where Kubernetes and containerd have it so, left out, as each place says.

mod apparmor;
pub(crate) mod cdi;
mod devices;
mod host;
mod limits;
mod mounts;
mod namespaces;
mod security;
mod signals;
#[cfg(test)]
mod tests;
mod users;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use oci::image::ContainerDefaults;
use oci::runtime::{DeviceRule, Mount, Resources, Spec};
use oci::spec::{DEFAULT_PATH, merge_env};
use oci::user::Accounts;
use proto::runtime::v1::{
    ContainerConfig, ContainerUser, LinuxContainerConfig, LinuxContainerResources,
    LinuxContainerSecurityContext, LinuxPodSandboxConfig, LinuxSandboxSecurityContext, NamespaceMode,
    NamespaceOption, PodSandboxConfig,
};

pub use host::{Facts, Host, Propagation, SandboxFiles, Selinux, Source, relabel};
pub use limits::{Update, resources, update_pod};
pub use mounts::is_mapped;
pub use namespaces::{Users, mapped_as};
pub use signals::{reported as reported_signal, stop_signal};

use super::NAMESPACE;
use crate::error::{Error, Result};

/// Where the runtime finds the root file system: in the bundle.
const ROOTFS: &str = "rootfs";
/// What the OOM killer is told of a pause container: nearly the last.
const PAUSE_OOM_SCORE: i64 = -998;
/// The processor weight of a pause container, which does nothing.
const PAUSE_SHARES: u64 = 2;

/// Where the namespaces of a pod are pinned; None where it has the machine's.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Namespaces {
    /// Its network.
    pub network: Option<PathBuf>,
    /// Its message queues and shared memory.
    pub ipc: Option<PathBuf>,
    /// Its names.
    pub uts: Option<PathBuf>,
    /// Its process ids, if it shares them; for a container in the mode TARGET, its target's.
    pub pid: Option<PathBuf>,
    /// Its users, if they are not the machine's.
    pub user: Option<PathBuf>,
}

/// Who makes control groups.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum CgroupDriver {
    /// The runtime, by folders.
    #[default]
    Cgroupfs,
    /// systemd, as scopes beneath slices.
    Systemd,
}

/// What the configuration of the CRI and of the runtime handler says about specs.
#[derive(Clone, Debug)]
pub struct Options {
    /// The handler's `base_runtime_spec`, which the spec starts from.
    pub base: Option<Spec>,
    /// Who makes control groups.
    pub cgroup: CgroupDriver,
    /// Patterns of the pod's annotations that the runtime gets.
    pub pod_annotations: Vec<String>,
    /// Patterns of the container's annotations that the runtime gets.
    pub container_annotations: Vec<String>,
    /// A privileged container gets no devices but its own.
    pub privileged_without_host_devices: bool,
    /// With [`Options::privileged_without_host_devices`]: it may make and use all, though.
    pub privileged_without_host_devices_all_devices_allowed: bool,
    /// Containers may write to their control groups.
    pub cgroup_writable: bool,
    /// The runtime knows `rro`.
    pub recursive_read_only: bool,
    /// No control groups and no limits are asked for.
    pub disable_cgroup: bool,
    /// Scores for the OOM killer are never below the engine's own, even where it may lower them.
    pub restrict_oom_score_adj: bool,
    /// Limits of huge pages are left out where nothing can hold them.
    pub tolerate_missing_hugetlb_controller: bool,
    /// Limits of huge pages are left out.
    pub disable_hugetlb_controller: bool,
    /// The default masked and read-only paths are kept, whatever the kubelet says.
    pub disable_proc_mount: bool,
    /// AppArmor is not used.
    pub disable_apparmor: bool,
    /// SELinux is used where the kernel has it.
    pub enable_selinux: bool,
    /// The seccomp profile of those that ask for none, as `runtime/default`; empty: unconfined.
    pub unset_seccomp_profile: String,
    /// Devices are owned by whom the container runs as.
    pub device_ownership_from_security_context: bool,
    /// Volumes that images ask for are not made.
    pub ignore_image_defined_volumes: bool,
    /// Pods may listen at ports below 1024 without a capability.
    pub enable_unprivileged_ports: bool,
    /// Pods may ping without a capability.
    pub enable_unprivileged_icmp: bool,
    /// CDI devices are known.
    pub enable_cdi: bool,
    /// Where they are described; a later folder counts for more.
    pub cdi_spec_dirs: Vec<PathBuf>,
    /// The image of pause containers.
    pub sandbox_image: String,
}

impl Default for Options {
    /// containerd's defaults.
    fn default() -> Self {
        Options {
            base: None,
            cgroup: CgroupDriver::default(),
            pod_annotations: Vec::new(),
            container_annotations: Vec::new(),
            privileged_without_host_devices: false,
            privileged_without_host_devices_all_devices_allowed: false,
            cgroup_writable: false,
            recursive_read_only: false,
            disable_cgroup: false,
            restrict_oom_score_adj: false,
            tolerate_missing_hugetlb_controller: true,
            disable_hugetlb_controller: true,
            disable_proc_mount: false,
            disable_apparmor: false,
            enable_selinux: false,
            unset_seccomp_profile: String::new(),
            device_ownership_from_security_context: false,
            ignore_image_defined_volumes: false,
            enable_unprivileged_ports: true,
            enable_unprivileged_icmp: true,
            enable_cdi: true,
            cdi_spec_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
            sandbox_image: String::new(),
        }
    }
}

/// A container that is wanted, and all that its spec depends on.
#[derive(Clone, Copy, Debug)]
pub struct Wanted<'a> {
    /// Its pod's id.
    pub pod_id: &'a str,
    /// Its pod.
    pub pod: &'a PodSandboxConfig,
    /// Its id.
    pub id: &'a str,
    /// What the kubelet asks for. Its image mounts have a path of the host already.
    pub container: &'a ContainerConfig,
    /// What its image says.
    pub image: &'a ContainerDefaults,
    /// The name of its image, unless the kubelet gives the user's own.
    pub image_name: &'a str,
    /// The account files of its image.
    pub accounts: Accounts<'a>,
    /// Its pod's namespaces.
    pub namespaces: &'a Namespaces,
    /// The folder of the host that the volumes its image asks for are made in.
    pub volumes: &'a Path,
    /// The folder of the host that has the container's id-mapped mounts, by their number, when its task is made.
    pub mapped: &'a Path,
    /// The machine.
    pub host: &'a Host,
    /// What its configuration refers to.
    pub facts: &'a Facts,
    /// What the configuration says.
    pub options: &'a Options,
}

/// A container's spec and what goes with it.
#[derive(Clone, Debug)]
pub struct Built {
    /// The spec.
    pub spec: Spec,
    /// Whom it runs as.
    pub user: ContainerUser,
    /// The limits that hold.
    pub resources: LinuxContainerResources,
    /// Its control group as the spec names it; empty when that is left to the runtime.
    pub cgroup: String,
    /// What StopContainer sends.
    pub stop_signal: u32,
    /// Volumes to make before it is created: the image's content at their destination is copied into them.
    pub volumes: Vec<Volume>,
    /// Folders and files that get the mounts' SELinux label first, by [`relabel`]; none without SELinux.
    pub relabel: Vec<PathBuf>,
}

/// A volume that an image asks for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Volume {
    /// The folder of the host to make.
    pub source: PathBuf,
    /// Where it is in the container, absolute and without dots.
    pub destination: String,
}

/// A pod that is wanted.
#[derive(Clone, Copy, Debug)]
pub struct WantedPod<'a> {
    /// Its id.
    pub id: &'a str,
    /// What the kubelet asks for.
    pub config: &'a PodSandboxConfig,
    /// Where its network is pinned; None with the machine's.
    pub netns: Option<&'a Path>,
    /// Where its users' namespace is pinned; None with the machine's.
    pub userns: Option<&'a Path>,
    /// Its files.
    pub files: &'a SandboxFiles,
    /// The machine.
    pub host: &'a Host,
    /// What the configuration says.
    pub options: &'a Options,
    /// The localhost profile for system calls that it names, as [`Facts::seccomp_profile`] reads it.
    pub seccomp: Option<&'a serde_json::Value>,
}

impl<'a> Wanted<'a> {
    fn linux(&self) -> Option<&'a LinuxContainerConfig> {
        self.container.linux.as_ref()
    }

    fn security(&self) -> Option<&'a LinuxContainerSecurityContext> {
        self.linux()?.security_context.as_ref()
    }

    fn namespace_options(&self) -> Option<&'a NamespaceOption> {
        self.security()?.namespace_options.as_ref()
    }

    fn privileged(&self) -> bool {
        self.security().is_some_and(|security| security.privileged)
    }
}

impl<'a> WantedPod<'a> {
    fn linux(&self) -> Option<&'a LinuxPodSandboxConfig> {
        self.config.linux.as_ref()
    }

    fn security(&self) -> Option<&'a LinuxSandboxSecurityContext> {
        self.linux()?.security_context.as_ref()
    }
}

fn pod_security(pod: &PodSandboxConfig) -> Option<&LinuxSandboxSecurityContext> {
    pod.linux.as_ref()?.security_context.as_ref()
}

fn pod_namespace_options(pod: &PodSandboxConfig) -> Option<&NamespaceOption> {
    pod_security(pod)?.namespace_options.as_ref()
}

/// Whether the pod has the machine's network.
pub fn host_network(pod: &PodSandboxConfig) -> bool {
    pod_namespace_options(pod).is_some_and(|options| options.network() == NamespaceMode::Node)
}

/// Whether the pod has the machine's message queues and shared memory.
pub fn host_ipc(pod: &PodSandboxConfig) -> bool {
    pod_namespace_options(pod).is_some_and(|options| options.ipc() == NamespaceMode::Node)
}

/// How the pod's process ids are shared.
pub fn pid_mode(pod: &PodSandboxConfig) -> NamespaceMode {
    pod_namespace_options(pod).map_or(NamespaceMode::Pod, NamespaceOption::pid)
}

/// The spec of a container.
pub fn container(wanted: &Wanted<'_>) -> Result<Built> {
    let Wanted { container, pod, image, options, host, facts, .. } = *wanted;
    let security = wanted.security();
    let privileged = wanted.privileged();
    if privileged && !pod_security(pod).is_some_and(|pod| pod.privileged) {
        return Err(Error::invalid_argument(format!(
            "container {:?} is privileged, but its pod is not: a pod has to be privileged for its containers to be",
            container.metadata.as_ref().map_or("", |metadata| &metadata.name)
        )));
    }
    // What is not looked up would silently not be there.
    if facts.sources.len() != container.mounts.len() || facts.devices.len() != container.devices.len() {
        return Err(Error::internal("a container's mounts and devices have not been looked up"));
    }
    let users = namespaces::users_of_container(wanted)?;
    let labels = security::labels_of_container(wanted)?;

    let mut spec = start(wanted.id, options);
    let process = spec.process_mut();
    process.args = command_line(container, image)?;
    process.env = environment(wanted, &process.env)?;
    process.cwd = working_folder(container, image);
    process.terminal = container.tty;
    process.no_new_privileges = security.is_some_and(|security| security.no_new_privs);

    if host.cgroup2 && !privileged {
        spec.set_namespace("cgroup", "").map_err(refused)?;
    }
    let (volumes, mut relabel) = mounts::of_container(wanted, users.as_ref(), &mut spec)?;
    if let (false, Some(security)) = (options.disable_proc_mount, security) {
        let linux = spec.linux_mut();
        linux.masked_paths.clone_from(&security.masked_paths);
        linux.readonly_paths.clone_from(&security.readonly_paths);
    } else if !options.disable_proc_mount {
        let linux = spec.linux_mut();
        linux.masked_paths.clear();
        linux.readonly_paths.clear();
    }
    devices::of_container(wanted, &mut spec);
    let asked = security.and_then(|security| security.capabilities.as_ref());
    security::set_capabilities(&mut spec, asked, host);
    if privileged {
        let all: Vec<&str> = host.capabilities.iter().map(String::as_str).collect();
        spec.set_privileged(&all);
        devices::of_privileged(&mut spec, facts, options);
    }
    if security.is_some_and(|security| security.readonly_rootfs) {
        spec.set_readonly_root();
    }

    if let Some(asked) = wanted.linux().and_then(|linux| linux.resources.as_ref()) {
        limits::apply(&mut spec, asked, host, options)?;
        spec.process_mut().oom_score_adj = Some(limits::oom_score_adj(asked.oom_score_adj, host, options));
    }
    limits::set_cgroup(&mut spec, wanted.id, pod, options)?;
    annotate_container(wanted, &mut spec);
    namespaces::of_container(wanted, users.as_ref(), &mut spec)?;

    let user = users::of_container(wanted)?;
    if let Some(users) = &users {
        users.outside(user.uid, user.gid)?;
    }
    spec.process_mut().user = user;
    if !privileged {
        spec.process_mut().selinux_label = labels.process;
    }
    if labels.mount.is_empty() {
        relabel.clear();
    }
    spec.linux_mut().mount_label = labels.mount;
    spec.process_mut().apparmor_profile = security::apparmor_of_container(wanted)?;
    if let Some(profile) = security::seccomp_of_container(wanted, &spec)? {
        spec.linux_mut().seccomp = Some(profile);
    }
    facts.cdi.apply(&mut spec);
    if options.disable_cgroup {
        limits::without_cgroup(&mut spec);
    }
    Ok(Built {
        user: users::reported(&spec),
        resources: limits::reported(&spec),
        cgroup: spec.linux_mut().cgroups_path.clone(),
        stop_signal: stop_signal(container, image),
        volumes,
        relabel,
        spec,
    })
}

/// What the shim of a sandbox makes and holds: namespaces without a path, names, sysctls. There is no process in it.
pub fn pod(wanted: &WantedPod<'_>) -> Result<Spec> {
    let mut spec = Spec { oci_version: oci::spec::OCI_VERSION.into(), ..Spec::default() };
    // A namespace of process ids takes an init, which a pod needs only when its containers share them.
    shared_of_pod(wanted, &mut spec, pid_mode(wanted.config) == NamespaceMode::Pod)?;
    Ok(spec)
}

/// The spec of the container that holds a pod, from its image's configuration.
pub fn pause(wanted: &WantedPod<'_>, image: &ContainerDefaults, accounts: Accounts<'_>) -> Result<Spec> {
    let WantedPod { config, options, host, .. } = *wanted;
    let security = wanted.security();
    let privileged = security.is_some_and(|security| security.privileged);
    let mut spec = start(wanted.id, &Options { base: None, ..options.clone() });
    spec.set_readonly_root();
    spec.linux_mut().namespaces.clear();
    spec.set_namespace("mount", "").map_err(refused)?;
    // Everywhere but with the machine's process ids it has some of its own, as whoever is the first in them.
    let users = shared_of_pod(wanted, &mut spec, pid_mode(config) != NamespaceMode::Node)?;

    let process = spec.process_mut();
    process.args = image.entrypoint.iter().chain(&image.cmd).cloned().collect();
    if process.args.is_empty() {
        return Err(Error::failed_precondition(format!(
            "the sandbox image {:?} has neither entrypoint nor command; configure one that has",
            options.sandbox_image
        )));
    }
    process.env = merge_env(&process.env, &image.env);
    process.cwd = absolute(&image.working_dir);
    process.user = users::of_pod(security, &image.user, accounts)?;
    process.oom_score_adj = Some(limits::oom_score_adj(PAUSE_OOM_SCORE, host, options));
    mounts::of_pause(wanted, users.as_ref(), privileged, &mut spec);
    spec.set_cpu_shares(PAUSE_SHARES);

    let selinux = security.and_then(|security| security.selinux_options.as_ref());
    let labels = security::labels(selinux, wanted.id, host, options)?;
    if !privileged {
        spec.process_mut().selinux_label = labels.process;
    }
    spec.linux_mut().mount_label = labels.mount;
    if let Some(profile) = security::seccomp_of_pod(wanted, &spec)? {
        spec.linux_mut().seccomp = Some(profile);
    }
    if options.disable_cgroup {
        limits::without_cgroup(&mut spec);
    }
    Ok(spec)
}

/// What a sandbox has, whoever holds it.
fn shared_of_pod(wanted: &WantedPod<'_>, spec: &mut Spec, own_pids: bool) -> Result<Option<Users>> {
    let WantedPod { config, options, host, .. } = *wanted;
    let users = namespaces::of_pod(wanted, own_pids, spec)?;
    if !host_network(config) {
        spec.hostname.clone_from(&config.hostname);
    }
    let linux = spec.linux_mut();
    if let Some(asked) = &config.linux {
        linux.sysctl.clone_from(&asked.sysctls);
    }
    if !host_network(config) {
        let mut unless_set = |key: &str, value: &str| {
            linux.sysctl.entry(key.to_owned()).or_insert_with(|| value.to_owned());
        };
        if options.enable_unprivileged_ports {
            unless_set("net.ipv4.ip_unprivileged_port_start", "0");
        }
        // Groups that a user namespace does not map are refused by the kernel.
        if options.enable_unprivileged_icmp && !host.user_namespace && users.is_none() {
            unless_set("net.ipv4.ping_group_range", "0 2147483647");
        }
    }
    limits::set_cgroup(spec, wanted.id, config, options)?;
    annotate_pod(wanted, spec);
    Ok(users)
}

/// What every spec begins as: the handler's own, or the default one without what the kubelet is to say.
fn start(id: &str, options: &Options) -> Spec {
    let mut spec = match &options.base {
        Some(base) => {
            let mut spec = base.clone();
            spec.set_cgroup(&format!("/{NAMESPACE}/{id}"));
            spec
        }
        None => {
            let mut spec = Spec::linux(NAMESPACE, id);
            // Limits are the engine's, which are made generous; the default of 1024 files is too few for servers.
            spec.process_mut().rlimits.clear();
            spec
        }
    };
    spec.set_root(ROOTFS);
    spec.mounts.retain(|mount| mount.destination != "/run");
    let rules = &mut spec.resources_mut().devices;
    if rules.is_empty() {
        rules.push(DeviceRule { allow: false, access: "rwm".into(), ..DeviceRule::default() });
    }
    spec
}

/// Kubernetes' `command` takes the place of the image's entrypoint and command, `args` that of its command.
fn command_line(container: &ContainerConfig, image: &ContainerDefaults) -> Result<Vec<String>> {
    let (mut command, mut args) = (&container.command[..], &container.args[..]);
    if command.is_empty() {
        if args.is_empty() {
            args = &image.cmd;
        }
        // Docker writes an entrypoint that was reset as one empty word.
        if image.entrypoint != [""] {
            command = &image.entrypoint;
        }
    }
    match command.is_empty() && args.is_empty() {
        true => Err(Error::invalid_argument(
            "there is no command: neither the container nor its image has one; set the container's `command`",
        )),
        false => Ok(command.iter().chain(args).cloned().collect()),
    }
}

/// PATH, TERM and HOSTNAME, then what the image says, then what the container says; the last word on a name counts.
fn environment(wanted: &Wanted<'_>, base: &[String]) -> Result<Vec<String>> {
    let Wanted { container, pod, image, host, .. } = *wanted;
    let mut env = merge_env(base, &[DEFAULT_PATH.to_owned()]);
    if container.tty {
        env = merge_env(&env, &["TERM=xterm".to_owned()]);
    }
    let hostname = if pod.hostname.is_empty() { &host.hostname } else { &pod.hostname };
    env = merge_env(&env, &[format!("HOSTNAME={hostname}")]);
    env = merge_env(&env, &image.env);
    // A value may be any bytes, the document only text; what is not text is shown as such, as containerd does.
    let own =
        container.envs.iter().map(|pair| format!("{}={}", pair.key, String::from_utf8_lossy(&pair.value)));
    let env = merge_env(&env, &own.collect::<Vec<_>>());
    match env.iter().find(|entry| entry.contains('\0') || entry.starts_with('=')) {
        Some(entry) => Err(Error::invalid_argument(format!(
            "environment entry {entry:?} has no name or contains a NUL byte, which no process can be given"
        ))),
        None => Ok(env),
    }
}

fn working_folder(container: &ContainerConfig, image: &ContainerDefaults) -> String {
    absolute(if container.working_dir.is_empty() { &image.working_dir } else { &container.working_dir })
}

/// A path in the container; one that is not absolute is from its root.
fn absolute(path: &str) -> String {
    if path.starts_with('/') { path.to_owned() } else { format!("/{path}") }
}

fn annotate_container(wanted: &Wanted<'_>, spec: &mut Spec) {
    let Wanted { container, pod, options, .. } = *wanted;
    let asked = container.image.as_ref().map_or("", |image| &image.user_specified_image);
    let image = if asked.is_empty() { wanted.image_name } else { asked };
    let name = container.metadata.as_ref().map_or("", |metadata| &metadata.name);
    spec.add_annotations(passed(&pod.annotations, &options.pod_annotations));
    spec.add_annotations(passed(&container.annotations, &options.container_annotations));
    annotate(spec, wanted.pod_id, pod, "container");
    spec.add_annotations(named(&[("container-name", name), ("image-name", image)]));
}

fn annotate_pod(wanted: &WantedPod<'_>, spec: &mut Spec) {
    let WantedPod { config, options, .. } = *wanted;
    if let Some(of) = wanted.linux().and_then(|linux| linux.resources.as_ref()) {
        let number = |number: i64| number.to_string();
        spec.add_annotations(named(&[
            ("sandbox-cpu-period", &number(of.cpu_period)),
            ("sandbox-cpu-quota", &number(of.cpu_quota)),
            ("sandbox-cpu-shares", &number(of.cpu_shares)),
            ("sandbox-memory", &number(of.memory_limit_in_bytes)),
        ]));
    }
    spec.add_annotations(passed(&config.annotations, &options.pod_annotations));
    annotate(spec, wanted.id, config, "sandbox");
    spec.add_annotations(named(&[
        ("sandbox-log-directory", &config.log_directory),
        ("podsandbox.image-name", &options.sandbox_image),
    ]));
}

fn annotate(spec: &mut Spec, pod_id: &str, pod: &PodSandboxConfig, kind: &str) {
    let metadata = pod.metadata.clone().unwrap_or_default();
    spec.add_annotations(named(&[
        ("sandbox-id", pod_id),
        ("sandbox-namespace", &metadata.namespace),
        ("sandbox-uid", &metadata.uid),
        ("sandbox-name", &metadata.name),
        ("container-type", kind),
    ]));
}

fn named(pairs: &[(&str, &str)]) -> Vec<(String, String)> {
    pairs.iter().map(|(key, value)| (format!("io.kubernetes.cri.{key}"), (*value).to_owned())).collect()
}

/// The annotations that one of the patterns matches.
fn passed(annotations: &BTreeMap<String, String>, patterns: &[String]) -> Vec<(String, String)> {
    let wanted = |key: &str| patterns.iter().any(|pattern| matches(pattern, key));
    annotations
        .iter()
        .filter(|(key, _)| wanted(key))
        .map(|(key, value)| (key.clone(), value.clone()))
        .collect()
}

/// Whether a pattern as of the shell, where `*` and `?` stop at a slash, matches all of a text. A malformed one matches nothing.
fn matches(pattern: &str, text: &str) -> bool {
    fn go(pattern: &[char], text: &[char]) -> bool {
        match pattern.split_first() {
            None => text.is_empty(),
            Some(('*', rest)) => {
                let most = text.iter().position(|c| *c == '/').unwrap_or(text.len());
                (0..=most).any(|taken| go(rest, &text[taken..]))
            }
            Some(('?', rest)) => text.first().is_some_and(|c| *c != '/') && go(rest, &text[1..]),
            Some(('[', rest)) => {
                let Some((c, others)) = text.split_first() else { return false };
                let Some((hit, rest)) = class(rest, *c) else { return false };
                hit && go(rest, others)
            }
            Some(('\\', [wanted, rest @ ..])) => text.first() == Some(wanted) && go(rest, &text[1..]),
            Some((wanted, rest)) => text.first() == Some(wanted) && go(rest, &text[1..]),
        }
    }
    /// Whether a class `[^a-z\]]`, its opening taken off, has this character, and what follows it.
    fn class(mut pattern: &[char], c: char) -> Option<(bool, &[char])> {
        let negated = pattern.first() == Some(&'^');
        if negated {
            pattern = &pattern[1..];
        }
        let one = |pattern: &mut &[char]| -> Option<char> {
            let (mut first, mut rest) = pattern.split_first()?;
            match first {
                '-' | ']' => return None,
                '\\' => (first, rest) = rest.split_first()?,
                _ => {}
            }
            *pattern = rest;
            Some(*first)
        };
        let (mut hit, mut any) = (false, false);
        loop {
            if any && pattern.first()? == &']' {
                return Some((hit != negated, &pattern[1..]));
            }
            let low = one(&mut pattern)?;
            let mut high = low;
            if pattern.first() == Some(&'-') {
                pattern = &pattern[1..];
                high = one(&mut pattern)?;
            }
            hit |= (low..=high).contains(&c);
            any = true;
        }
    }
    let (pattern, text): (Vec<char>, Vec<char>) = (pattern.chars().collect(), text.chars().collect());
    go(&pattern, &text)
}

/// A refusal of the spec's own builder.
#[expect(clippy::needless_pass_by_value, reason = "it is what map_err hands over")]
fn refused(error: oci::spec::SpecError) -> Error {
    Error::invalid_argument(error.to_string())
}

/// The spec as its JSON.
pub fn encode(spec: &Spec) -> Result<Vec<u8>> {
    serde_json::to_vec(spec).map_err(|error| Error::internal(format!("write a spec as JSON: {error}")))
}

/// The limits of a task update as their JSON.
pub fn encode_resources(resources: &Resources) -> Result<Vec<u8>> {
    serde_json::to_vec(resources).map_err(|error| Error::internal(format!("write limits as JSON: {error}")))
}

fn mount(destination: &str, kind: &str, source: impl Into<String>, options: &[&str]) -> Mount {
    Mount {
        destination: destination.into(),
        kind: kind.into(),
        source: source.into(),
        options: options.iter().map(|option| (*option).to_owned()).collect(),
        ..Mount::default()
    }
}
