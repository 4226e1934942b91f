//! What the configuration says of pods and their containers, under containerd's names.
//!
//! ```text
//!  version 2     plugins."io.containerd.grpc.v1.cri"       all of it
//!  version 3, 4  plugins."io.containerd.cri.v1.runtime"    pods, containers, cni, containerd.runtimes
//!                plugins."io.containerd.cri.v1.images"     snapshotter, pinned_images
//!                plugins."io.containerd.grpc.v1.cri"       the streaming server
//! ```
//!
//! The three are read as one, so that a key counts in whichever it is found. Invariant: what is here has been checked; what
//! containerd has and this engine has not is named by [`ignored`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context as _, bail};
use prost_types::Any;
use proto::containerd::runc::v1::Options;
use serde::Deserialize;

use super::exec::Limits;
use super::{cni, streaming};
use crate::gc::parse_duration;

/// The sections, in the order in which they count.
pub const SECTIONS: [&str; 3] =
    ["io.containerd.cri.v1.runtime", "io.containerd.cri.v1.images", "io.containerd.grpc.v1.cri"];
/// The pause image that is taken where a handler's shim has no sandboxes and no image is set.
pub const PAUSE: &str = "registry.k8s.io/pause:3.10.2";
/// The runtime of the handler that there is without a configuration.
pub(super) const RUNC: &str = "io.containerd.runc.v2";
/// Bytes of a line of a container's log, before it is cut.
const LINE: u64 = 16 << 10;

/// How pods and containers are made.
#[derive(Debug, Clone, PartialEq)]
pub struct Settings {
    /// The runtime handlers by name.
    pub handlers: BTreeMap<String, Handler>,
    /// The handler of pods that name none.
    pub default_handler: String,
    /// The image of pause containers, where one is set.
    pub sandbox_image: Option<String>,
    /// The images that the kubelet shall not collect.
    pub pinned: Vec<String>,
    /// The snapshotter of containers whose handler names none.
    pub snapshotter: String,
    /// The folders of the plugins' programs.
    pub cni_bin_dirs: Vec<PathBuf>,
    /// The folder of the networks' configurations.
    pub cni_conf_dir: PathBuf,
    /// How many networks a pod gets; 0 is all.
    pub cni_max_conf_num: usize,
    /// Which of several addresses is the pod's.
    pub ip_preference: cni::IpPreference,
    /// The streaming server.
    pub stream: Stream,
    /// Bytes of a line of a log, before it is cut; None never cuts.
    pub max_line: Option<u64>,
    /// Whether an oom_score_adj below the engine's own is raised to it, whether it need be or not.
    pub restrict_oom_score_adj: bool,
    /// How long ExecSync waits for output after its process has ended; None waits for its end.
    pub drain_exec_sync: Option<Duration>,
    /// How many commands run in containers at a time.
    pub execs: Limits,
    /// Whether containers stay in the engine's cgroup.
    pub disable_cgroup: bool,
    /// Whether CDI devices are injected.
    pub enable_cdi: bool,
    /// Where CDI specs are.
    pub cdi_spec_dirs: Vec<PathBuf>,
    /// Whether AppArmor is left alone.
    pub disable_apparmor: bool,
    /// Whether SELinux labels are set.
    pub enable_selinux: bool,
    /// Whether the default masked and read-only paths stay, whatever the kubelet says.
    pub disable_proc_mount: bool,
    /// The seccomp profile of containers for which none is asked; empty for none.
    pub unset_seccomp_profile: String,
    /// Whether huge page limits are left out where the kernel has no such controller.
    pub tolerate_missing_hugetlb: bool,
    /// Whether huge page limits are left out.
    pub disable_hugetlb: bool,
    /// Whether devices belong to the container's user.
    pub device_ownership: bool,
    /// Whether images' volumes are left out.
    pub ignore_image_volumes: bool,
    /// Whether low ports are anybody's in pods.
    pub unprivileged_ports: bool,
    /// Whether anybody may ping in pods.
    pub unprivileged_icmp: bool,
}

/// A runtime handler.
#[derive(Debug, Clone, PartialEq)]
pub struct Handler {
    /// The containerd runtime, by name or by the path of its shim.
    pub runtime: String,
    /// The options for it.
    pub options: Option<Any>,
    /// Whether groups are made by systemd; None where the options do not say.
    pub systemd_cgroup: Option<bool>,
    /// Its snapshotter.
    pub snapshotter: String,
    /// The folder of its networks, where it has its own.
    pub cni_conf_dir: Option<PathBuf>,
    /// How many networks its pods get.
    pub cni_max_conf_num: usize,
    /// Patterns of the annotations of pods that its shim gets.
    pub pod_annotations: Vec<String>,
    /// Patterns of the annotations of containers that its shim gets.
    pub container_annotations: Vec<String>,
    /// Whether privileged containers get no devices of the host.
    pub privileged_without_host_devices: bool,
    /// Whether such may use any device all the same.
    pub privileged_all_devices_allowed: bool,
    /// Whether cgroups are writable in containers that are not privileged.
    pub cgroup_writable: bool,
    /// The spec that its containers' specs start from.
    pub base_spec: Option<PathBuf>,
}

/// The streaming server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Stream {
    /// The address to listen at; empty for that of the machine.
    pub address: String,
    /// The port; 0 for any.
    pub port: u16,
    /// After how long a silent stream ends.
    pub idle: Duration,
    /// Whether it speaks TLS.
    pub tls: bool,
    /// The certificate and its key, in files; None with TLS makes its own.
    pub key_pair: Option<(PathBuf, PathBuf)>,
}

impl Default for Settings {
    fn default() -> Self {
        let section = Section::default();
        // The defaults hold no text that could be wrong.
        resolve(section).unwrap_or_else(|error| unreachable!("{error:#}"))
    }
}

impl Settings {
    /// The handler of this name, or the default one for none.
    pub fn handler(&self, name: &str) -> Option<(&str, &Handler)> {
        let name = if name.is_empty() { self.default_handler.as_str() } else { name };
        self.handlers.get_key_value(name).map(|(name, handler)| (name.as_str(), handler))
    }

    /// The settings of the networks of a handler.
    pub fn cni(&self, handler: &Handler, owner: &str) -> cni::Settings {
        let own = handler.cni_conf_dir.is_some() && handler.cni_max_conf_num != 0;
        cni::Settings {
            conf_dir: handler.cni_conf_dir.clone().unwrap_or_else(|| self.cni_conf_dir.clone()),
            max_conf_num: if own { handler.cni_max_conf_num } else { self.cni_max_conf_num },
            bin_dirs: self.cni_bin_dirs.clone(),
            ip_preference: self.ip_preference,
            owner: owner.to_owned(),
            ..cni::Settings::default()
        }
    }

    /// The streaming server's.
    pub fn streaming(&self) -> streaming::Settings {
        let tls = match (self.stream.tls, self.stream.key_pair.clone()) {
            (false, _) => streaming::Tls::Off,
            (true, None) => streaming::Tls::SelfMade,
            (true, Some((certificate, key))) => streaming::Tls::Pair { certificate, key },
        };
        let (address, port, idle) = (self.stream.address.clone(), self.stream.port, self.stream.idle);
        streaming::Settings { address, port, idle, tls }
    }
}

#[derive(Debug, Clone, Deserialize)]
#[serde(default)]
struct Section {
    containerd: ContainerdSection,
    cni: CniSection,
    snapshotter: String,
    sandbox_image: String,
    pinned_images: BTreeMap<String, String>,
    stream_server_address: Option<String>,
    stream_server_port: String,
    stream_idle_timeout: String,
    enable_tls_streaming: bool,
    x509_key_pair_streaming: KeyPairSection,
    max_container_log_line_size: i64,
    restrict_oom_score_adj: bool,
    drain_exec_sync_io_timeout: String,
    /// Ours, as the next.
    max_execs_per_container: Option<usize>,
    max_execs: Option<usize>,
    disable_cgroup: bool,
    enable_cdi: Option<bool>,
    cdi_spec_dirs: Vec<PathBuf>,
    disable_apparmor: bool,
    enable_selinux: bool,
    disable_proc_mount: bool,
    unset_seccomp_profile: String,
    tolerate_missing_hugetlb_controller: bool,
    disable_hugetlb_controller: bool,
    device_ownership_from_security_context: bool,
    ignore_image_defined_volumes: bool,
    enable_unprivileged_ports: bool,
    enable_unprivileged_icmp: bool,
    /// Where hosts.toml files are, which `config.rs` reads.
    registry: toml::Table,
    #[serde(flatten)]
    rest: toml::Table,
}

impl Default for Section {
    fn default() -> Self {
        Section {
            containerd: ContainerdSection::default(),
            cni: CniSection::default(),
            snapshotter: String::new(),
            sandbox_image: String::new(),
            pinned_images: BTreeMap::new(),
            stream_server_address: None,
            stream_server_port: String::new(),
            stream_idle_timeout: String::new(),
            enable_tls_streaming: false,
            x509_key_pair_streaming: KeyPairSection::default(),
            max_container_log_line_size: i64::try_from(LINE).unwrap_or(0),
            restrict_oom_score_adj: false,
            drain_exec_sync_io_timeout: String::new(),
            max_execs_per_container: None,
            max_execs: None,
            disable_cgroup: false,
            enable_cdi: None,
            cdi_spec_dirs: vec!["/etc/cdi".into(), "/var/run/cdi".into()],
            disable_apparmor: false,
            enable_selinux: false,
            disable_proc_mount: false,
            unset_seccomp_profile: String::new(),
            tolerate_missing_hugetlb_controller: true,
            disable_hugetlb_controller: true,
            device_ownership_from_security_context: false,
            ignore_image_defined_volumes: false,
            enable_unprivileged_ports: true,
            enable_unprivileged_icmp: true,
            registry: toml::Table::new(),
            rest: toml::Table::new(),
        }
    }
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct ContainerdSection {
    default_runtime_name: String,
    runtimes: BTreeMap<String, RuntimeSection>,
    snapshotter: String,
    #[serde(flatten)]
    rest: toml::Table,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct RuntimeSection {
    runtime_type: String,
    runtime_path: String,
    options: toml::Table,
    snapshotter: String,
    cni_conf_dir: String,
    cni_max_conf_num: i64,
    pod_annotations: Vec<String>,
    container_annotations: Vec<String>,
    privileged_without_host_devices: bool,
    privileged_without_host_devices_all_devices_allowed: bool,
    cgroup_writable: bool,
    base_runtime_spec: String,
    sandboxer: String,
    #[serde(flatten)]
    rest: toml::Table,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct CniSection {
    bin_dir: String,
    bin_dirs: Vec<PathBuf>,
    conf_dir: String,
    max_conf_num: Option<i64>,
    ip_pref: String,
    #[serde(flatten)]
    rest: toml::Table,
}

#[derive(Debug, Clone, Default, Deserialize)]
#[serde(default)]
struct KeyPairSection {
    tls_cert_file: String,
    tls_key_file: String,
}

/// The sections as one table. One section's key counts over that of those after it.
fn merged(plugins: &toml::Table) -> toml::Table {
    let mut all = toml::Table::new();
    for name in SECTIONS {
        let Some(toml::Value::Table(section)) = plugins.get(name) else { continue };
        for (key, value) in section {
            all.entry(key.clone()).or_insert_with(|| value.clone());
        }
    }
    all
}

/// The settings of these plugins.
pub fn read(plugins: &toml::Table) -> anyhow::Result<Settings> {
    let section = merged(plugins).try_into().context("the plugins of CRI")?;
    resolve(section)
}

/// The keys of these plugins that are set and have no effect.
pub fn ignored(plugins: &toml::Table) -> Vec<String> {
    let Ok(section) = merged(plugins).try_into::<Section>() else { return Vec::new() };
    let mut found = names("", &section.rest);
    found.extend(names("cni.", &section.cni.rest));
    found.extend(names("containerd.", &section.containerd.rest));
    for (name, runtime) in &section.containerd.runtimes {
        found.extend(names(&format!("containerd.runtimes.{name}."), &runtime.rest));
    }
    found.extend(
        section
            .registry
            .iter()
            .filter(|(key, value)| *key != "config_path" && is_set(value))
            .map(|(key, _)| format!("registry.{key}")),
    );
    let of = |key: &str| {
        let first = key.split('.').next().unwrap_or(key);
        let has = |name: &&&str| plugins.get(**name).and_then(|section| section.get(first)).is_some();
        SECTIONS.iter().find(has).copied().unwrap_or(SECTIONS[0])
    };
    found.into_iter().map(|key| format!("plugins.{}.{key}", of(&key))).collect()
}

fn names(prefix: &str, rest: &toml::Table) -> Vec<String> {
    rest.iter().filter(|(_, value)| is_set(value)).map(|(key, _)| format!("{prefix}{key}")).collect()
}

/// Whether a value says something: containerd's own default file sets much to nothing.
fn is_set(value: &toml::Value) -> bool {
    match value {
        toml::Value::String(text) => !text.is_empty(),
        toml::Value::Boolean(on) => *on,
        toml::Value::Integer(number) => *number != 0,
        toml::Value::Table(table) => table.values().any(is_set),
        toml::Value::Array(list) => !list.is_empty(),
        _ => true,
    }
}

fn resolve(section: Section) -> anyhow::Result<Settings> {
    let mut runtimes = section.containerd.runtimes;
    if runtimes.is_empty() {
        runtimes.insert("runc".into(), RuntimeSection::default());
    }
    let default_handler = match section.containerd.default_runtime_name.as_str() {
        "" if runtimes.contains_key("runc") => "runc".to_owned(),
        "" => runtimes.keys().next().cloned().unwrap_or_default(),
        name if runtimes.contains_key(name) => name.to_owned(),
        name => bail!(
            "containerd.default_runtime_name is {name:?}, which is none of the runtimes: {}",
            runtimes.keys().cloned().collect::<Vec<_>>().join(", ")
        ),
    };
    let first = |texts: [&String; 2], other: &str| {
        texts.into_iter().find(|text| !text.is_empty()).map_or(other, |text| text).to_owned()
    };
    let snapshotter = first([&section.snapshotter, &section.containerd.snapshotter], "overlayfs");
    let handlers = runtimes
        .into_iter()
        .map(|(name, runtime)| {
            let handler =
                handler(runtime, &snapshotter).with_context(|| format!("containerd.runtimes.{name}"))?;
            Ok((name, handler))
        })
        .collect::<anyhow::Result<_>>()?;
    let duration = |key: &str, text: &str| match text {
        "" => Ok(None),
        text => match parse_duration(text) {
            Some(duration) => Ok(Some(duration).filter(|duration| !duration.is_zero())),
            None => bail!("{key} is {text:?}, which is no time; write 10s or 4h0m0s"),
        },
    };
    let pair = &section.x509_key_pair_streaming;
    let key_pair = match (pair.tls_cert_file.as_str(), pair.tls_key_file.as_str()) {
        ("", "") => None,
        ("", _) | (_, "") => bail!("x509_key_pair_streaming needs both, tls_cert_file and tls_key_file"),
        (cert, key) => Some((PathBuf::from(cert), PathBuf::from(key))),
    };
    let port = match section.stream_server_port.as_str() {
        "" => 0,
        text => text.parse().with_context(|| format!("stream_server_port is {text:?}, which is no port"))?,
    };
    let cni = section.cni;
    let mut cni_bin_dirs = cni.bin_dirs;
    if !cni.bin_dir.is_empty() {
        if !cni_bin_dirs.is_empty() {
            bail!("cni.bin_dir and cni.bin_dirs are both set; name all folders in bin_dirs");
        }
        cni_bin_dirs.push(cni.bin_dir.into());
    }
    if cni_bin_dirs.is_empty() {
        cni_bin_dirs.push("/opt/cni/bin".into());
    }
    let cni_conf_dir = PathBuf::from(first([&cni.conf_dir, &String::new()], "/etc/cni/net.d"));
    let folders = cni_bin_dirs.iter().chain([&cni_conf_dir]).chain(&section.cdi_spec_dirs);
    if let Some(relative) = folders.into_iter().find(|folder| !folder.is_absolute()) {
        bail!("{:?} is not absolute; the folders of cni and CDI must be", relative.display().to_string());
    }
    let ip_preference = match cni.ip_pref.as_str() {
        "" | "ipv4" => cni::IpPreference::Ipv4,
        "ipv6" => cni::IpPreference::Ipv6,
        "cni" => cni::IpPreference::Cni,
        other => bail!("cni.ip_pref is {other:?}; ipv4, ipv6 and cni are known"),
    };
    let sandbox = section.pinned_images.get("sandbox").cloned().unwrap_or_default();
    let sandbox_image = first([&sandbox, &section.sandbox_image], "");
    let mut pinned: Vec<String> = section.pinned_images.into_values().collect();
    pinned.push(if sandbox_image.is_empty() { PAUSE.to_owned() } else { sandbox_image.clone() });
    Ok(Settings {
        handlers,
        default_handler,
        sandbox_image: Some(sandbox_image).filter(|image| !image.is_empty()),
        pinned,
        snapshotter,
        cni_bin_dirs,
        cni_conf_dir,
        cni_max_conf_num: cni.max_conf_num.map_or(1, |number| usize::try_from(number).unwrap_or(0)),
        ip_preference,
        stream: Stream {
            address: section.stream_server_address.unwrap_or_else(|| "127.0.0.1".into()),
            port,
            idle: duration("stream_idle_timeout", &section.stream_idle_timeout)?
                .unwrap_or(Duration::from_secs(4 * 3600)),
            tls: section.enable_tls_streaming,
            key_pair,
        },
        max_line: u64::try_from(section.max_container_log_line_size).ok().filter(|bytes| *bytes > 0),
        restrict_oom_score_adj: section.restrict_oom_score_adj,
        drain_exec_sync: duration("drain_exec_sync_io_timeout", &section.drain_exec_sync_io_timeout)?,
        execs: Limits {
            container: section.max_execs_per_container.unwrap_or(Limits::default().container),
            all: section.max_execs.unwrap_or(Limits::default().all),
            ..Limits::default()
        },
        disable_cgroup: section.disable_cgroup,
        enable_cdi: section.enable_cdi.unwrap_or(true),
        cdi_spec_dirs: section.cdi_spec_dirs,
        disable_apparmor: section.disable_apparmor,
        enable_selinux: section.enable_selinux,
        disable_proc_mount: section.disable_proc_mount,
        unset_seccomp_profile: section.unset_seccomp_profile,
        tolerate_missing_hugetlb: section.tolerate_missing_hugetlb_controller,
        disable_hugetlb: section.disable_hugetlb_controller,
        device_ownership: section.device_ownership_from_security_context,
        ignore_image_volumes: section.ignore_image_defined_volumes,
        unprivileged_ports: section.enable_unprivileged_ports,
        unprivileged_icmp: section.enable_unprivileged_icmp,
    })
}

fn handler(section: RuntimeSection, snapshotter: &str) -> anyhow::Result<Handler> {
    let kind = if section.runtime_type.is_empty() { RUNC } else { &section.runtime_type };
    let runtime = if section.runtime_path.is_empty() { kind } else { &section.runtime_path };
    if !section.runtime_path.is_empty() && !section.runtime_path.starts_with('/') {
        bail!("runtime_path is {:?}; it must be absolute", section.runtime_path);
    }
    if !matches!(section.sandboxer.as_str(), "" | "podsandbox" | "shim") {
        bail!("sandboxer is {:?}; podsandbox and shim are known", section.sandboxer);
    }
    let systemd_cgroup = match section.options.get("SystemdCgroup") {
        None => None,
        Some(toml::Value::Boolean(on)) => Some(*on),
        Some(other) => bail!("options.SystemdCgroup is {other}; write true or false"),
    };
    Ok(Handler {
        options: options(kind, &section.options)?,
        runtime: runtime.to_owned(),
        systemd_cgroup,
        snapshotter: match section.snapshotter.as_str() {
            "" => snapshotter,
            own => own,
        }
        .to_owned(),
        cni_conf_dir: Some(section.cni_conf_dir).filter(|folder| !folder.is_empty()).map(PathBuf::from),
        cni_max_conf_num: usize::try_from(section.cni_max_conf_num).unwrap_or(0),
        pod_annotations: section.pod_annotations,
        container_annotations: section.container_annotations,
        privileged_without_host_devices: section.privileged_without_host_devices,
        privileged_all_devices_allowed: section.privileged_without_host_devices_all_devices_allowed,
        cgroup_writable: section.cgroup_writable,
        base_spec: Some(section.base_runtime_spec).filter(|file| !file.is_empty()).map(PathBuf::from),
    })
}

/// A runtime's options as its shim takes them: runc's have a form of their own, all others get the table as it is.
fn options(runtime: &str, table: &toml::Table) -> anyhow::Result<Option<Any>> {
    if table.is_empty() {
        return Ok(None);
    }
    if runtime == RUNC {
        return Ok(Some(proto::any::pack(&runc_options(table)?)));
    }
    let text = |key: &str| table.get(key).and_then(toml::Value::as_str).unwrap_or_default().to_owned();
    let mut body = text("ConfigBody").into_bytes();
    if body.is_empty() && !table.contains_key("ConfigPath") {
        body = toml::to_string(table)?.into_bytes();
    }
    Ok(Some(proto::any::pack(&proto::runtimeoptions::v1::Options {
        type_url: text("TypeUrl"),
        config_path: text("ConfigPath"),
        config_body: body,
    })))
}

fn runc_options(table: &toml::Table) -> anyhow::Result<Options> {
    let mut options = Options::default();
    for (key, value) in table {
        let wrong = || format!("options.{key} is {value}, which does not fit");
        let text = || value.as_str().map(str::to_owned).with_context(wrong);
        let flag = || value.as_bool().with_context(wrong);
        let number = || value.as_integer().and_then(|number| u32::try_from(number).ok()).with_context(wrong);
        match key.as_str() {
            "NoPivotRoot" => options.no_pivot_root = flag()?,
            "NoNewKeyring" => options.no_new_keyring = flag()?,
            "ShimCgroup" => options.shim_cgroup = text()?,
            "IoUid" => options.io_uid = number()?,
            "IoGid" => options.io_gid = number()?,
            "BinaryName" => options.binary_name = text()?,
            "Root" => options.root = text()?,
            "SystemdCgroup" => options.systemd_cgroup = flag()?,
            "CriuImagePath" => options.criu_image_path = text()?,
            "CriuWorkPath" => options.criu_work_path = text()?,
            // CRIU is found in PATH by every runc that there is.
            "CriuPath" => {}
            _ => bail!("options.{key} is no option of runc's shim"),
        }
    }
    Ok(options)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn of(text: &str) -> anyhow::Result<Settings> {
        read(&toml::from_str(text).unwrap())
    }

    #[test]
    fn without_a_configuration_there_is_runc() {
        let settings = Settings::default();
        let (name, handler) = settings.handler("").unwrap();
        assert_eq!(
            (name, handler.runtime.as_str(), handler.snapshotter.as_str()),
            ("runc", RUNC, "overlayfs")
        );
        assert!(settings.handler("kata").is_none() && settings.sandbox_image.is_none());
        assert_eq!(settings.max_line, Some(16384));
        assert_eq!(settings.cni(handler, "gantry"), cni::Settings::default());
    }

    #[test]
    fn both_versions_of_the_file_are_read() {
        let two = "['io.containerd.grpc.v1.cri']\nsandbox_image = 'p'\nstream_server_port = '10'\n\
                   ['io.containerd.grpc.v1.cri'.cni]\nbin_dir = '/b'\nconf_dir = '/c'\n\
                   ['io.containerd.grpc.v1.cri'.containerd.runtimes.x]\nruntime_type = 'io.containerd.runc.v2'\n\
                   ['io.containerd.grpc.v1.cri'.containerd.runtimes.x.options]\nSystemdCgroup = true\n";
        let three = "['io.containerd.cri.v1.images'.pinned_images]\nsandbox = 'p'\n\
                     ['io.containerd.grpc.v1.cri']\nstream_server_port = '10'\n\
                     ['io.containerd.cri.v1.runtime'.cni]\nbin_dirs = ['/b']\nconf_dir = '/c'\n\
                     ['io.containerd.cri.v1.runtime'.containerd.runtimes.x.options]\nSystemdCgroup = true\n";
        for text in [two, three] {
            let settings = of(text).unwrap();
            assert_eq!(settings.sandbox_image.as_deref(), Some("p"));
            assert_eq!(settings.stream.port, 10);
            assert_eq!(settings.default_handler, "x");
            let handler = &settings.handlers["x"];
            assert_eq!(handler.systemd_cgroup, Some(true));
            let options: Options = proto::any::unpack(handler.options.as_ref().unwrap()).unwrap();
            assert!(options.systemd_cgroup);
            assert_eq!((settings.cni_bin_dirs, settings.cni_conf_dir), (vec!["/b".into()], "/c".into()));
        }
    }

    #[test]
    fn the_number_of_commands_is_bounded_as_is_said() {
        let execs = |text: &str| {
            let Limits { container, all, .. } =
                of(&format!("['io.containerd.cri.v1.runtime']\n{text}")).unwrap().execs;
            (container, all)
        };
        assert_eq!(execs(""), (32, 512));
        assert_eq!(execs("max_execs_per_container = 2\nmax_execs = 0"), (2, 0));
    }

    #[test]
    fn handlers_have_their_own_networks() {
        let settings = of(
            "['io.containerd.cri.v1.runtime'.cni]\nmax_conf_num = 3\n\
             ['io.containerd.cri.v1.runtime'.containerd.runtimes.a]\ncni_conf_dir = '/a'\ncni_max_conf_num = 2\n\
             ['io.containerd.cri.v1.runtime'.containerd.runtimes.b]\ncni_max_conf_num = 2\n",
        )
        .unwrap();
        let cni = |name: &str| settings.cni(&settings.handlers[name], "me");
        assert_eq!((cni("a").conf_dir, cni("a").max_conf_num), ("/a".into(), 2));
        assert_eq!((cni("b").conf_dir, cni("b").max_conf_num), ("/etc/cni/net.d".into(), 3));
    }

    #[test]
    fn mistakes_are_named() {
        let runtime = "['io.containerd.cri.v1.runtime']\n";
        for (text, words) in [
            ("drain_exec_sync_io_timeout = 'soon'", "soon"),
            ("max_execs = -1", "-1"),
            ("containerd.default_runtime_name = 'x'", "none of the runtimes"),
            ("containerd.runtimes.x.options.Binary = 'x'", "options.Binary"),
            ("containerd.runtimes.x.options.SystemdCgroup = 1", "SystemdCgroup"),
            ("containerd.runtimes.x.sandboxer = 'vm'", "sandboxer"),
            ("cni.bin_dir = '/a'\ncni.bin_dirs = ['/b']", "bin_dirs"),
            ("cni.conf_dir = 'etc'", "not absolute"),
            ("cni.ip_pref = 'best'", "ip_pref"),
            ("stream_server_port = 'x'", "stream_server_port"),
            ("x509_key_pair_streaming.tls_cert_file = '/c'", "both"),
        ] {
            let error = format!("{:#}", of(&format!("{runtime}{text}")).unwrap_err());
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    #[test]
    fn what_has_no_effect_is_named() {
        let plugins = toml::from_str(
            "['io.containerd.cri.v1.runtime']\nenable_criu = true\nignore_deprecation_warnings = []\n\
             cni.conf_template = '/t'\ncontainerd.runtimes.x.io_type = 'streaming'\n\
             ['io.containerd.cri.v1.images']\nregistry.config_path = '/c'\nregistry.headers.x = ['y']\n",
        )
        .unwrap();
        assert_eq!(
            ignored(&plugins),
            [
                "plugins.io.containerd.cri.v1.runtime.enable_criu",
                "plugins.io.containerd.cri.v1.runtime.cni.conf_template",
                "plugins.io.containerd.cri.v1.runtime.containerd.runtimes.x.io_type",
                "plugins.io.containerd.cri.v1.images.registry.headers",
            ]
        );
    }
}
