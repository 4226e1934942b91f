//! The configuration: from defaults, containerd-style TOML and flags to one resolved [`Config`], before any side effect.
//!
//! A containerd `config.toml` (versions 2 to 4, with `imports`) is accepted as it is. What the engine has is honoured;
//! what containerd has and the engine lacks is listed in [`Config::ignored`], to be logged once; a key that neither
//! knows is an error, since it is a mistake. Flags win over the file.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use crate::context::Namespace;
use crate::transfer::verifier::Verifiers;
use crate::{content, cri, diff, gc, hooks, remotes, snapshots};

/// Where the configuration is looked for when no flag names it; it need not be there.
pub const DEFAULT_PATH: &str = "/etc/gantry/config.toml";
/// The configuration versions that are read.
const VERSIONS: std::ops::RangeInclusive<i64> = 2..=4;
/// The default size of the largest gRPC message, in bytes.
const MESSAGE_BYTES: usize = 16 << 20;
/// The least that the journal of events may be told to keep, in bytes: segments are an eighth of it.
const RETENTION_MIN: u64 = 64 << 10;
/// The plugin whose settings say when garbage is collected.
const SCHEDULER: &str = "io.containerd.gc.v1.scheduler";
/// The plugin whose settings say which differs are asked.
const DIFF_SERVICE: &str = "io.containerd.service.v1.diff-service";
/// The plugin whose settings say how transfers reach registries.
const TRANSFER: &str = "io.containerd.transfer.v1.local";
/// The plugins of CRI, of versions 3 and 2, whose `registry.config_path` counts where the transfers' own is not set.
const CRI_IMAGES: [&str; 2] = [cri::settings::SECTIONS[1], cri::settings::SECTIONS[2]];
/// Where hosts.toml files are looked for unless the configuration says where.
const HOSTS_DIRS: &str = "/etc/gantry/certs.d:/etc/containerd/certs.d:/etc/docker/certs.d";
/// The most layers at a time where the configuration sets no limit.
const LAYERS_MAX: usize = 16;
/// The plugin whose settings say where image verifiers are.
const VERIFIER: &str = "io.containerd.image-verifier.v1.bindir";
/// The plugin, of ours, whose settings say which hooks containers get.
const HOOKS: &str = "io.gantry.hooks.v1";
/// The content store that is built in, to be named in `disabled_plugins` for containerd when a proxy plugin takes its place.
const BUILT_IN_CONTENT: &str = "io.containerd.content.v1.content";
/// The namespace in which a content store of another process has this engine's blobs.
const CONTENT_NAMESPACE: &str = "gantry";
/// How deep imports may import.
const IMPORT_DEPTH: usize = 8;

/// What the engine runs with. Every path is absolute.
#[derive(Debug, Clone, PartialEq)]
pub struct Config {
    /// Durable state.
    pub root: PathBuf,
    /// State that does not outlive a reboot: bundles, sockets.
    pub state: PathBuf,
    /// The gRPC socket.
    pub grpc: Socket,
    /// The ttrpc socket, on which shims publish events.
    pub ttrpc: Socket,
    /// The largest gRPC message that is received, in bytes.
    pub max_receive: usize,
    /// The largest gRPC message that is sent, in bytes.
    pub max_send: usize,
    /// Where Prometheus metrics are served, at /v1/metrics.
    pub metrics: Option<MetricsAddress>,
    /// The debug socket, if there is to be one.
    pub debug: Option<Socket>,
    /// The least severe level that is logged.
    pub log_level: tracing::Level,
    /// Whether logs are JSON.
    pub log_json: bool,
    /// The engine's own oom_score_adj, if it is to be set (0 leaves it).
    pub oom_score: i32,
    /// When garbage is collected.
    pub gc: gc::Settings,
    /// Snapshotters in other processes.
    pub snapshotters: Vec<snapshots::Plugin>,
    /// The content store, where another process has it.
    pub content: Option<content::Plugin>,
    /// Differs in other processes, by their names.
    pub differs: BTreeMap<String, PathBuf>,
    /// Programs that turn blobs into layers.
    pub processors: Vec<diff::Processor>,
    /// The differs to ask, in this order, until one can do it.
    pub differ_order: Vec<String>,
    /// Programs that say which images may be pulled.
    pub verifiers: Verifiers,
    /// The hooks that containers get.
    pub hooks: hooks::Settings,
    /// How registries are reached.
    pub registries: remotes::Settings,
    /// How pods are made.
    pub cri: cri::settings::Settings,
    /// How many bytes of events are kept for those who come later.
    pub events_retention: u64,
    /// Settings of containerd that were found and have no effect here.
    pub ignored: Vec<String>,
}

/// Where metrics are served.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum MetricsAddress {
    /// `HOST:PORT`
    Tcp(std::net::SocketAddr),
    /// `unix:///path`
    Unix(Socket),
}

/// A unix socket and who may use it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Socket {
    /// The path.
    pub path: PathBuf,
    /// The owner.
    pub uid: u32,
    /// The group.
    pub gid: u32,
    /// The permissions.
    pub mode: u32,
}

/// The permissions of sockets, unless the configuration says others: owner and group.
pub const SOCKET_MODE: u32 = 0o660;

/// What the command line says; None leaves the file's or the default value.
#[derive(Debug, Clone, Default)]
pub struct Flags {
    /// The configuration file.
    pub config: Option<PathBuf>,
    /// The gRPC socket.
    pub address: Option<PathBuf>,
    /// The root folder.
    pub root: Option<PathBuf>,
    /// The state folder.
    pub state: Option<PathBuf>,
    /// The log level's name.
    pub log_level: Option<String>,
}

/// The file's form. The names are containerd's.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct File {
    version: i64,
    root: PathBuf,
    state: PathBuf,
    temp: String,
    imports: Vec<String>,
    required_plugins: Vec<String>,
    disabled_plugins: Vec<String>,
    plugin_dir: String,
    oom_score: i32,
    grpc: Grpc,
    ttrpc: Ttrpc,
    debug: Debug,
    metrics: Metrics,
    events: Events,
    cgroup: toml::Table,
    timeouts: toml::Table,
    plugins: toml::Table,
    proxy_plugins: BTreeMap<String, ProxySection>,
    stream_processors: BTreeMap<String, ProcessorSection>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Grpc {
    address: PathBuf,
    tcp_address: String,
    tcp_tls_ca: String,
    tcp_tls_cert: String,
    tcp_tls_key: String,
    tcp_tls_common_name: String,
    uid: u32,
    gid: u32,
    max_recv_message_size: usize,
    max_send_message_size: usize,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Ttrpc {
    address: PathBuf,
    uid: u32,
    gid: u32,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Debug {
    address: String,
    uid: u32,
    gid: u32,
    /// Octal, as text.
    mode: String,
    level: String,
    format: String,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Metrics {
    address: String,
    /// Of a socket, as for `debug`.
    uid: u32,
    gid: u32,
    mode: String,
    grpc_histogram: bool,
}

/// A section of `proxy_plugins`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ProxySection {
    r#type: String,
    address: String,
    platform: String,
    exports: BTreeMap<String, String>,
    capabilities: Vec<String>,
    /// Ours: the snapshotter's name at the other end, where it is not the section's.
    #[serde(skip_serializing_if = "String::is_empty")]
    snapshotter: String,
    /// Ours: the namespace at a content store's end that is this engine's alone, where it is not [`CONTENT_NAMESPACE`].
    #[serde(skip_serializing_if = "String::is_empty")]
    namespace: String,
}

/// A section of `stream_processors`.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct ProcessorSection {
    accepts: Vec<String>,
    returns: String,
    path: String,
    args: Vec<String>,
    env: Vec<String>,
}

/// The section of [`DIFF_SERVICE`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct DiffSection {
    default: Vec<String>,
    sync_fs: bool,
}

impl Default for DiffSection {
    fn default() -> Self {
        DiffSection { default: vec![diff::BUILT_IN.to_owned()], sync_fs: false }
    }
}

/// The engine's own; containerd keeps no events.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Events {
    retention_bytes: u64,
}

/// The section of [`VERIFIER`].
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct VerifierSection {
    bin_dir: PathBuf,
    max_verifiers: i64,
    per_verifier_timeout: String,
}

impl Default for VerifierSection {
    fn default() -> Self {
        VerifierSection {
            bin_dir: "/opt/containerd/image-verifier/bin".into(),
            max_verifiers: 10,
            per_verifier_timeout: "10s".into(),
        }
    }
}

/// The section of [`SCHEDULER`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct SchedulerSection {
    pause_threshold: f64,
    deletion_threshold: i64,
    mutation_threshold: i64,
    schedule_delay: String,
    startup_delay: String,
}

impl Default for SchedulerSection {
    fn default() -> Self {
        let gc::Settings {
            pause_threshold,
            deletion_threshold,
            mutation_threshold,
            schedule_delay,
            startup_delay,
        } = gc::Settings::default();
        SchedulerSection {
            pause_threshold,
            deletion_threshold: deletion_threshold.try_into().unwrap_or(0),
            mutation_threshold: mutation_threshold.try_into().unwrap_or(0),
            schedule_delay: format!("{}ms", schedule_delay.as_millis()),
            startup_delay: format!("{}ms", startup_delay.as_millis()),
        }
    }
}

/// The section of [`TRANSFER`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct TransferSection {
    config_path: String,
    max_concurrent_downloads: i64,
    max_concurrent_uploaded_layers: i64,
    concurrent_layer_fetch_buffer: i64,
    /// Ours: in all transfers together.
    max_requests_per_host: i64,
    /// Ours: whether layers may come from the addresses that images name for them.
    foreign_layers: bool,
    /// Ours: how long a registry may take for a connection or an answer, or be silent.
    #[serde(skip_serializing_if = "Option::is_none")]
    registry_timeout: Option<String>,
    /// Ours: how often a request is tried, and a body taken up again that breaks without a byte.
    #[serde(skip_serializing_if = "Option::is_none")]
    registry_attempts: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    max_concurrent_unpacks: Option<i64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    check_platform_supported: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    unpack_config: Option<toml::Value>,
}

impl Default for TransferSection {
    fn default() -> Self {
        let settings = remotes::Settings::default();
        let number = |number: usize| i64::try_from(number).unwrap_or(0);
        TransferSection {
            config_path: String::new(),
            max_concurrent_downloads: number(settings.concurrent_downloads),
            max_concurrent_uploaded_layers: number(settings.concurrent_uploads),
            concurrent_layer_fetch_buffer: i64::try_from(settings.fetch_buffer).unwrap_or(0),
            max_requests_per_host: number(settings.requests_per_host),
            foreign_layers: settings.foreign_layers,
            registry_timeout: None,
            registry_attempts: None,
            max_concurrent_unpacks: None,
            check_platform_supported: None,
            unpack_config: None,
        }
    }
}

/// The plugins that have settings here, with their defaults.
fn default_plugins() -> toml::Table {
    let sections = [
        (SCHEDULER, toml::Value::try_from(SchedulerSection::default())),
        (TRANSFER, toml::Value::try_from(TransferSection::default())),
    ];
    sections.into_iter().filter_map(|(name, section)| Some((name.to_owned(), section.ok()?))).collect()
}

impl Default for File {
    fn default() -> Self {
        File {
            version: *VERSIONS.end(),
            root: "/var/lib/gantry".into(),
            state: "/run/gantry".into(),
            temp: String::new(),
            imports: Vec::new(),
            required_plugins: Vec::new(),
            disabled_plugins: Vec::new(),
            plugin_dir: String::new(),
            oom_score: 0,
            grpc: Grpc::default(),
            ttrpc: Ttrpc::default(),
            debug: Debug::default(),
            metrics: Metrics::default(),
            events: Events::default(),
            cgroup: toml::Table::new(),
            timeouts: toml::Table::new(),
            plugins: default_plugins(),
            proxy_plugins: BTreeMap::new(),
            stream_processors: BTreeMap::new(),
        }
    }
}

impl Default for Grpc {
    fn default() -> Self {
        Grpc {
            address: "/run/gantry/gantry.sock".into(),
            tcp_address: String::new(),
            tcp_tls_ca: String::new(),
            tcp_tls_cert: String::new(),
            tcp_tls_key: String::new(),
            tcp_tls_common_name: String::new(),
            uid: 0,
            gid: 0,
            max_recv_message_size: MESSAGE_BYTES,
            max_send_message_size: MESSAGE_BYTES,
        }
    }
}

impl Default for Events {
    fn default() -> Self {
        Events { retention_bytes: 64 << 20 }
    }
}

impl Default for Debug {
    fn default() -> Self {
        Debug {
            address: String::new(),
            uid: 0,
            gid: 0,
            mode: String::new(),
            level: "info".into(),
            format: "text".into(),
        }
    }
}

/// The defaults, as a configuration file.
pub fn default_file() -> anyhow::Result<String> {
    Ok(toml::to_string(&File::default())?)
}

/// What file and flags resolve to, as a configuration file.
pub fn dump(flags: &Flags) -> anyhow::Result<String> {
    let file = load(flags)?;
    resolve(&file)?;
    Ok(toml::to_string(&file)?)
}

/// The configuration file (without flags) in the newest version.
pub fn migrate(flags: &Flags) -> anyhow::Result<String> {
    let mut file = load(&Flags { config: flags.config.clone(), ..Flags::default() })?;
    file.version = *VERSIONS.end();
    file.imports = Vec::new();
    Ok(toml::to_string(&file)?)
}

impl Config {
    /// Reads the file that the flags (or the default) name and resolves it; no side effects.
    pub fn resolve(flags: &Flags) -> anyhow::Result<Self> {
        resolve(&load(flags)?)
    }
}

fn load(flags: &Flags) -> anyhow::Result<File> {
    let mut file = match &flags.config {
        Some(path) => read(path)?,
        None if Path::new(DEFAULT_PATH).exists() => read(Path::new(DEFAULT_PATH))?,
        None => File::default(),
    };
    if let Some(root) = &flags.root {
        file.root.clone_from(root);
    }
    if let Some(state) = &flags.state {
        file.state.clone_from(state);
    }
    if let Some(address) = &flags.address {
        file.grpc.address.clone_from(address);
        // The ttrpc address of the file belongs to the gRPC address of the file.
        file.ttrpc.address = PathBuf::new();
    }
    if let Some(level) = &flags.log_level {
        file.debug.level.clone_from(level);
    }
    Ok(file)
}

fn read(path: &Path) -> anyhow::Result<File> {
    let table = read_table(path, 0)?;
    let file: File = table.try_into().with_context(|| {
        format!("{}: not a valid configuration; compare `gantryd config default`", path.display())
    })?;
    if !VERSIONS.contains(&file.version) {
        bail!(
            "{}: configuration version {} is not supported; versions {} to {} are",
            path.display(),
            file.version,
            VERSIONS.start(),
            VERSIONS.end()
        );
    }
    Ok(file)
}

fn read_table(path: &Path, depth: usize) -> anyhow::Result<toml::Table> {
    if depth > IMPORT_DEPTH {
        bail!(
            "{}: imports are nested more than {IMPORT_DEPTH} deep; do they import each other?",
            path.display()
        );
    }
    let text = std::fs::read_to_string(path)
        .with_context(|| format!("cannot read the configuration {}", path.display()))?;
    // Parsed twice: in this form for its good messages (line, column, what was expected), as a table for merging.
    toml::from_str::<File>(&text)
        .with_context(|| format!("cannot use the configuration {}", path.display()))?;
    let mut table: toml::Table = toml::from_str(&text)?;
    if !table.contains_key("version") {
        bail!("{}: `version` is missing; write e.g. version = {}", path.display(), VERSIONS.end());
    }
    let imports: Vec<String> = match table.get("imports") {
        Some(imports) => imports.clone().try_into()?,
        None => Vec::new(),
    };
    for pattern in imports {
        for import in expand(path, &pattern)? {
            merge(&mut table, read_table(&import, depth + 1)?);
        }
    }
    Ok(table)
}

/// The files that an import names: a path, relative to the importing file, with `*` allowed in its last component.
fn expand(from: &Path, pattern: &str) -> anyhow::Result<Vec<PathBuf>> {
    let path = from.parent().unwrap_or(Path::new("/")).join(pattern);
    let Some((before, after)) =
        path.file_name().and_then(|name| name.to_str()).and_then(|name| name.split_once('*'))
    else {
        return Ok(vec![path]);
    };
    let folder = path.parent().unwrap_or(Path::new("/"));
    let mut files = Vec::new();
    let entries = match std::fs::read_dir(folder) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(files),
        Err(error) => {
            return Err(error).with_context(|| format!("cannot list the imports in {}", folder.display()));
        }
    };
    for entry in entries {
        let file = entry?.path();
        let name = file.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if name.len() >= before.len() + after.len() && name.starts_with(before) && name.ends_with(after) {
            files.push(file);
        }
    }
    files.sort();
    Ok(files)
}

/// Puts `over` upon `base`: tables merge, lists are appended, everything else is replaced.
fn merge(base: &mut toml::Table, over: toml::Table) {
    for (key, value) in over {
        match (base.get_mut(&key), value) {
            (Some(toml::Value::Table(base)), toml::Value::Table(over)) => merge(base, over),
            (Some(toml::Value::Array(base)), toml::Value::Array(over)) if key != "imports" => {
                base.extend(over);
            }
            (Some(_), _) if key == "imports" || key == "version" => {}
            (_, value) => {
                base.insert(key, value);
            }
        }
    }
}

fn resolve(file: &File) -> anyhow::Result<Config> {
    for (name, path) in [("root", &file.root), ("state", &file.state), ("grpc.address", &file.grpc.address)] {
        if !path.is_absolute() {
            bail!("{name} must be an absolute path, and is {:?}", path.display().to_string());
        }
    }
    if file.root == file.state {
        bail!("root and state must be different folders, and both are {}", file.root.display());
    }
    let ttrpc = if file.ttrpc.address.as_os_str().is_empty() {
        let mut path = file.grpc.address.clone().into_os_string();
        path.push(".ttrpc");
        Socket { path: path.into(), uid: file.grpc.uid, gid: file.grpc.gid, mode: SOCKET_MODE }
    } else {
        Socket {
            path: file.ttrpc.address.clone(),
            uid: file.ttrpc.uid,
            gid: file.ttrpc.gid,
            mode: SOCKET_MODE,
        }
    };
    let log_level = match file.debug.level.as_str() {
        "" => tracing::Level::INFO,
        level => parse_level(level)?,
    };
    let log_json = match file.debug.format.as_str() {
        "" | "text" => false,
        "json" => true,
        other => bail!("log format {other:?} is not known; use text or json"),
    };
    let metrics = match file.metrics.address.as_str() {
        "" => None,
        address if address.starts_with("unix://") || address.starts_with('/') => {
            let Metrics { uid, gid, mode, .. } = &file.metrics;
            Some(MetricsAddress::Unix(socket("metrics", address, (*uid, *gid), mode)?))
        }
        address => Some(MetricsAddress::Tcp(address.parse().with_context(|| {
            format!("metrics.address {address:?} is neither HOST:PORT with an IP address nor unix:///PATH")
        })?)),
    };
    let debug = match file.debug.address.as_str() {
        "" => None,
        address => Some(socket("debug", address, (file.debug.uid, file.debug.gid), &file.debug.mode)?),
    };
    let (snapshotters, content, differs) = proxies(file)?;
    let processors = processors(file)?;
    let differ_order = differ_order(file, &differs)?;
    if file.events.retention_bytes < RETENTION_MIN {
        bail!("events.retention_bytes is {}; {RETENTION_MIN} are the least", file.events.retention_bytes);
    }
    Ok(Config {
        root: file.root.clone(),
        state: file.state.clone(),
        grpc: Socket {
            path: file.grpc.address.clone(),
            uid: file.grpc.uid,
            gid: file.grpc.gid,
            mode: SOCKET_MODE,
        },
        ttrpc,
        max_receive: Some(file.grpc.max_recv_message_size).filter(|size| *size > 0).unwrap_or(MESSAGE_BYTES),
        max_send: Some(file.grpc.max_send_message_size).filter(|size| *size > 0).unwrap_or(MESSAGE_BYTES),
        metrics,
        debug,
        log_level,
        log_json,
        oom_score: file.oom_score,
        gc: scheduler(&file.plugins)?,
        verifiers: verifiers(&file.plugins)?,
        snapshotters,
        content,
        differs,
        differ_order,
        processors,
        registries: registries(&file.plugins)?,
        cri: cri::settings::read(&file.plugins)?,
        hooks: hooks(&file.plugins)?,
        events_retention: file.events.retention_bytes,
        ignored: ignored(file),
    })
}

/// A log level by its name, containerd's names included.
pub(crate) fn parse_level(name: &str) -> anyhow::Result<tracing::Level> {
    Ok(match name {
        "trace" => tracing::Level::TRACE,
        "debug" => tracing::Level::DEBUG,
        "info" => tracing::Level::INFO,
        "warn" | "warning" => tracing::Level::WARN,
        "error" | "fatal" | "panic" => tracing::Level::ERROR,
        other => bail!("log level {other:?} is not known; use trace, debug, info, warn or error"),
    })
}

/// The socket of a section, at a path or `unix://` and a path.
fn socket(section: &str, address: &str, (uid, gid): (u32, u32), mode: &str) -> anyhow::Result<Socket> {
    let path = PathBuf::from(address.strip_prefix("unix://").unwrap_or(address));
    if !path.is_absolute() {
        bail!("{section}.address must be an absolute path, and is {address:?}");
    }
    let mode = match mode {
        "" => SOCKET_MODE,
        text => u32::from_str_radix(text.trim_start_matches("0o"), 8)
            .ok()
            .filter(|mode| *mode <= 0o777)
            .with_context(|| format!("{section}.mode is {text:?}; write permissions in octal, \"0660\""))?,
    };
    Ok(Socket { path, uid, gid, mode })
}

fn verifiers(plugins: &toml::Table) -> anyhow::Result<Verifiers> {
    let section: VerifierSection = match plugins.get(VERIFIER) {
        Some(section) => section.clone().try_into().with_context(|| format!("plugins.{VERIFIER:?}"))?,
        None => VerifierSection::default(),
    };
    let timeout = gc::parse_duration(&section.per_verifier_timeout).with_context(|| {
        format!(
            "plugins.{VERIFIER:?}: per_verifier_timeout is {:?}, which is not a duration; write 10s or 1m30s",
            section.per_verifier_timeout
        )
    })?;
    // As in containerd: less than none is no limit.
    let most = usize::try_from(section.max_verifiers).ok();
    Ok(Verifiers { folder: section.bin_dir, most, timeout })
}

fn scheduler(plugins: &toml::Table) -> anyhow::Result<gc::Settings> {
    let Some(section) = plugins.get(SCHEDULER) else { return Ok(gc::Settings::default()) };
    let section: SchedulerSection =
        section.clone().try_into().with_context(|| format!("plugins.{SCHEDULER:?}"))?;
    let duration = |name: &str, text: &str| match text {
        // As in containerd: what is less than nothing is nothing.
        text if text.starts_with('-') => Ok(std::time::Duration::ZERO),
        text => gc::parse_duration(text).with_context(|| {
            format!(
                "plugins.{SCHEDULER:?}: {name} is {text:?}, which is not a duration; write 100ms or 1m30s"
            )
        }),
    };
    Ok(gc::Settings {
        pause_threshold: section.pause_threshold,
        deletion_threshold: section.deletion_threshold.try_into().unwrap_or(0),
        mutation_threshold: section.mutation_threshold.try_into().unwrap_or(0),
        schedule_delay: duration("schedule_delay", &section.schedule_delay)?,
        startup_delay: duration("startup_delay", &section.startup_delay)?,
    })
}

fn transfer_section(plugins: &toml::Table) -> anyhow::Result<TransferSection> {
    let Some(section) = plugins.get(TRANSFER) else { return Ok(TransferSection::default()) };
    section.clone().try_into().with_context(|| format!("plugins.{TRANSFER:?}"))
}

fn registries(plugins: &toml::Table) -> anyhow::Result<remotes::Settings> {
    let section = transfer_section(plugins)?;
    let mut paths = vec![(format!("plugins.{TRANSFER:?}.config_path"), section.config_path)];
    for name in CRI_IMAGES {
        let key = format!("plugins.{name:?}.registry.config_path");
        let path = plugins.get(name).and_then(|plugin| plugin.get("registry")?.get("config_path"));
        match path {
            None => {}
            Some(toml::Value::String(path)) => paths.push((key, path.clone())),
            Some(other) => bail!("{key} is {other}; write folders, separated by colons, in quotes"),
        }
    }
    let chosen = paths.into_iter().find(|(_, path)| !path.is_empty());
    let (key, path) = chosen.unwrap_or_else(|| ("the default".to_owned(), HOSTS_DIRS.to_owned()));
    let hosts_dirs: Vec<PathBuf> =
        path.split(':').filter(|path| !path.is_empty()).map(PathBuf::from).collect();
    if let Some(relative) = hosts_dirs.iter().find(|path| !path.is_absolute()) {
        bail!("{key} names {:?}; write absolute paths, separated by colons", relative.display().to_string());
    }
    // As in containerd, 0 is no limit; there is one all the same.
    let limit = |number: i64| usize::try_from(number).ok().filter(|number| *number > 0);
    Ok(remotes::Settings {
        hosts_dirs,
        concurrent_downloads: limit(section.max_concurrent_downloads).unwrap_or(LAYERS_MAX),
        concurrent_uploads: limit(section.max_concurrent_uploaded_layers).unwrap_or(LAYERS_MAX),
        fetch_buffer: u64::try_from(section.concurrent_layer_fetch_buffer).unwrap_or(0),
        requests_per_host: limit(section.max_requests_per_host)
            .unwrap_or(remotes::Settings::default().requests_per_host),
        foreign_layers: section.foreign_layers,
        limits: registry_limits(section.registry_timeout.as_deref(), section.registry_attempts)?,
        ..remotes::Settings::default()
    })
}

fn hooks(plugins: &toml::Table) -> anyhow::Result<hooks::Settings> {
    let Some(section) = plugins.get(HOOKS) else { return Ok(hooks::Settings::default()) };
    let settings: hooks::Settings =
        section.clone().try_into().with_context(|| format!("plugins.{HOOKS:?}"))?;
    if let Some(folder) = settings.dirs.iter().find(|folder| !folder.is_absolute()) {
        bail!(
            "plugins.{HOOKS:?}: dirs must be absolute paths, and {:?} is not",
            folder.display().to_string()
        );
    }
    Ok(settings)
}

type Proxies = (Vec<snapshots::Plugin>, Option<content::Plugin>, BTreeMap<String, PathBuf>);
/// Patience with registries: of `timeout` is every wait but that for the end of an upload, which is ten times as long.
fn registry_limits(timeout: Option<&str>, attempts: Option<u32>) -> anyhow::Result<remotes::Limits> {
    let mut limits = remotes::Limits::default();
    if let Some(text) = timeout {
        let timeout = gc::parse_duration(text).filter(|timeout| !timeout.is_zero()).with_context(|| {
            format!(
                "plugins.{TRANSFER:?}: registry_timeout is {text:?}, which is not a time; write 30s or 1m30s"
            )
        })?;
        (limits.connect, limits.answer, limits.idle) = (timeout, timeout, timeout);
        limits.upload = timeout * 10;
    }
    if let Some(attempts) = attempts {
        (limits.attempts, limits.resumptions) = (attempts.max(1), attempts);
    }
    Ok(limits)
}

fn proxies(file: &File) -> anyhow::Result<Proxies> {
    let (mut snapshotters, mut content, mut differs) = (Vec::new(), None, BTreeMap::new());
    for (name, section) in &file.proxy_plugins {
        let what = format!("proxy_plugins.{name}");
        let address = PathBuf::from(section.address.strip_prefix("unix://").unwrap_or(&section.address));
        if !address.is_absolute() {
            bail!("{what}: address must be the path of a unix socket, and is {:?}", section.address);
        }
        match section.r#type.as_str() {
            "snapshot" => {
                if snapshotter::NAMES.contains(&name.as_str()) {
                    bail!("{what}: there is a built-in snapshotter of this name; choose another");
                }
                let there = Some(&section.snapshotter).filter(|there| !there.is_empty()).unwrap_or(name);
                snapshotters.push(snapshots::Plugin {
                    name: name.clone(),
                    there: there.clone(),
                    address,
                    root: section.exports.get("root").map(PathBuf::from),
                });
            }
            "content" => {
                if let Some(content::Plugin { name: other, .. }) = &content {
                    bail!("{what}: {other:?} is the content store already, and there is one");
                }
                let namespace = Some(&section.namespace)
                    .filter(|name| !name.is_empty())
                    .map_or(CONTENT_NAMESPACE, |name| name);
                let namespace =
                    Namespace::new(namespace).map_err(|error| anyhow::anyhow!("{what}: {error}"))?;
                content = Some(content::Plugin { name: name.clone(), address, namespace });
            }
            "diff" if name == diff::BUILT_IN => {
                bail!("{what}: there is a built-in differ of this name; choose another")
            }
            "diff" => {
                differs.insert(name.clone(), address);
            }
            other => bail!("{what}: type {other:?} is not offered; snapshot, content and diff are"),
        }
    }
    Ok((snapshotters, content, differs))
}

fn processors(file: &File) -> anyhow::Result<Vec<diff::Processor>> {
    let mut processors = Vec::new();
    for (name, section) in &file.stream_processors {
        if section.accepts.is_empty() || section.returns.is_empty() || section.path.is_empty() {
            bail!("stream_processors.{name}: accepts, returns and path must all be set");
        }
        let ProcessorSection { accepts, returns, path, args, env } = section.clone();
        processors.push(diff::Processor { name: name.clone(), accepts, returns, path, args, env });
    }
    Ok(processors)
}

fn differ_order(file: &File, differs: &BTreeMap<String, PathBuf>) -> anyhow::Result<Vec<String>> {
    let section: DiffSection = match file.plugins.get(DIFF_SERVICE) {
        Some(section) => section.clone().try_into().with_context(|| format!("plugins.{DIFF_SERVICE:?}"))?,
        None => DiffSection::default(),
    };
    if let Some(unknown) =
        section.default.iter().find(|name| *name != diff::BUILT_IN && !differs.contains_key(*name))
    {
        bail!(
            "plugins.{DIFF_SERVICE:?}: default names the differ {unknown:?}, which is neither \"{}\" nor a proxy plugin of type diff",
            diff::BUILT_IN
        );
    }
    if section.default.is_empty() {
        bail!("plugins.{DIFF_SERVICE:?}: default names no differ; \"{}\" is built in", diff::BUILT_IN);
    }
    Ok(section.default)
}

/// The settings that say something other than containerd's default and have no effect here.
fn ignored(file: &File) -> Vec<String> {
    let mut ignored = Vec::new();
    let texts = [
        ("temp", &file.temp),
        ("plugin_dir", &file.plugin_dir),
        ("grpc.tcp_address", &file.grpc.tcp_address),
    ];
    ignored.extend(texts.iter().filter(|(_, value)| !value.is_empty()).map(|(name, _)| (*name).to_owned()));
    let proxied = file.proxy_plugins.values().any(|section| section.r#type == "content");
    let disabled = file.disabled_plugins.iter().filter(|name| !proxied || *name != BUILT_IN_CONTENT);
    let disabled: Vec<String> = disabled.cloned().collect();
    let lists = [("required_plugins", &file.required_plugins), ("disabled_plugins", &disabled)];
    ignored.extend(lists.iter().filter(|(_, list)| !list.is_empty()).map(|(name, _)| (*name).to_owned()));
    let tables = [("cgroup", &file.cgroup), ("timeouts", &file.timeouts), ("plugins", &file.plugins)];
    for (name, table) in tables {
        ignored.extend(
            table
                .iter()
                .filter(|(key, value)| {
                    let heeded = [SCHEDULER, DIFF_SERVICE, TRANSFER, VERIFIER, HOOKS].contains(&key.as_str())
                        || cri::settings::SECTIONS.contains(&key.as_str());
                    !heeded && !is_empty(value)
                })
                .map(|(key, _)| format!("{name}.{key}")),
        );
    }
    ignored.extend(cri::settings::ignored(&file.plugins));
    if let Ok(section) = transfer_section(&file.plugins) {
        let unheeded = [
            ("max_concurrent_unpacks", section.max_concurrent_unpacks.is_some()),
            ("check_platform_supported", section.check_platform_supported.is_some()),
            ("unpack_config", section.unpack_config.is_some_and(|value| !is_empty(&value))),
        ];
        let unheeded = unheeded.into_iter().filter(|(_, is_set)| *is_set);
        ignored.extend(unheeded.map(|(key, _)| format!("plugins.{TRANSFER}.{key}")));
    }
    if file.metrics.grpc_histogram {
        ignored.push("metrics.grpc_histogram".into());
    }
    ignored
}

fn is_empty(value: &toml::Value) -> bool {
    match value {
        toml::Value::String(text) => text.is_empty(),
        toml::Value::Table(table) => table.values().all(is_empty),
        toml::Value::Array(list) => list.is_empty(),
        _ => false,
    }
}

/// A configuration, without the files that it imports: what is accepted has absolute paths, and is the same once it is written.
#[cfg(any(test, fuzzing))]
pub fn fuzz(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(file) = toml::from_str::<File>(text) else { return };
    let Ok(config) = resolve(&file) else { return };
    let paths = [&config.root, &config.state, &config.grpc.path];
    assert!(paths.iter().all(|path| path.is_absolute()) && config.root != config.state);
    assert!(config.registries.hosts_dirs.iter().all(|folder| folder.is_absolute()));
    let written = toml::to_string(&file).expect("a configuration can be written");
    let again: File = toml::from_str(&written).expect("what was written can be read");
    assert_eq!(resolve(&again).expect("it resolves as before"), config, "{written}");
    let (mut twice, once): (toml::Table, toml::Table) =
        (toml::from_str(text).expect("a table"), toml::from_str(text).expect("a table"));
    merge(&mut twice, once);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn from_text(text: &str) -> anyhow::Result<Config> {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        std::fs::write(&path, text).unwrap();
        Config::resolve(&Flags { config: Some(path), ..Flags::default() })
    }

    #[test]
    fn the_default_file_is_the_default() {
        let config = from_text(&default_file().unwrap()).unwrap();
        assert_eq!(config, resolve(&File::default()).unwrap());
        assert_eq!(config.ttrpc.path, Path::new("/run/gantry/gantry.sock.ttrpc"));
        assert!(config.ignored.is_empty());
    }

    #[test]
    fn a_containerd_file_is_read() {
        let config = from_text(
            "version = 2\nroot = '/a'\nstate = '/b'\noom_score = 5\n[grpc]\naddress = '/c'\ngid = 7\n\
             [plugins.'io.containerd.grpc.v1.cri']\nnetns_mounts_under_state_dir = true\n[timeouts]\n'io.containerd.x' = '5s'\n",
        )
        .unwrap();
        assert_eq!((config.root.as_path(), config.oom_score), (Path::new("/a"), 5));
        assert_eq!(config.ttrpc, Socket { path: "/c.ttrpc".into(), uid: 0, gid: 7, mode: 0o660 });
        assert_eq!(
            config.ignored,
            ["timeouts.io.containerd.x", "plugins.io.containerd.grpc.v1.cri.netns_mounts_under_state_dir"]
        );
    }

    #[test]
    fn image_verifiers() {
        let text = "version = 2\n[plugins.'io.containerd.image-verifier.v1.bindir']\nbin_dir = '/v'\nmax_verifiers = -1\n\
                    per_verifier_timeout = '1m'\n";
        let config = from_text(text).unwrap();
        let wanted =
            Verifiers { folder: "/v".into(), most: None, timeout: std::time::Duration::from_secs(60) };
        assert_eq!((config.verifiers, config.ignored), (wanted, Vec::new()));
        assert_eq!(from_text("version = 2\n").unwrap().verifiers.most, Some(10));
        assert!(from_text(&text.replace("1m", "soon")).is_err());
    }

    #[test]
    fn plugins_of_other_processes() {
        let config = from_text(
            "version = 2\ndisabled_plugins = ['io.containerd.content.v1.content']\n[proxy_plugins.stargz]\ntype = 'snapshot'\naddress = '/run/s.sock'\n\
             [proxy_plugins.stargz.exports]\nroot = '/var/lib/s'\n[proxy_plugins.c]\ntype = 'content'\naddress = '/c'\n\
             [proxy_plugins.d]\ntype = 'diff'\naddress = '/d'\n\
             [plugins.'io.containerd.service.v1.diff-service']\ndefault = ['d', 'walking']\n",
        )
        .unwrap();
        let stargz = snapshots::Plugin {
            name: "stargz".into(),
            there: "stargz".into(),
            address: "/run/s.sock".into(),
            root: Some("/var/lib/s".into()),
        };
        assert_eq!(config.snapshotters, [stargz]);
        let namespace = Namespace::new("gantry").unwrap();
        let content = content::Plugin { name: "c".into(), address: "/c".into(), namespace };
        assert_eq!(config.content, Some(content));
        assert_eq!(config.differs, BTreeMap::from([("d".to_owned(), PathBuf::from("/d"))]));
        assert_eq!(config.differ_order, ["d", "walking"]);
        assert!(config.ignored.is_empty(), "{:?}", config.ignored);
    }

    #[test]
    fn the_collector_is_set_as_containerds() {
        let config = from_text(
            "version = 2\n[plugins.'io.containerd.gc.v1.scheduler']\npause_threshold = 0\nmutation_threshold = -1\n\
             schedule_delay = '1.5s'\nstartup_delay = '-3s'\n",
        )
        .unwrap();
        assert_eq!(
            config.gc,
            gc::Settings {
                pause_threshold: 0.0,
                mutation_threshold: 0,
                schedule_delay: std::time::Duration::from_millis(1500),
                startup_delay: std::time::Duration::ZERO,
                ..gc::Settings::default()
            }
        );
        assert!(config.ignored.is_empty());
        assert_eq!(from_text("version = 2\n[plugins]\n").unwrap().gc, gc::Settings::default());
        assert!(default_file().unwrap().contains("startup_delay = \"100ms\""));
    }

    #[test]
    fn registries_are_set_as_containerds() {
        let default = from_text("version = 2\n").unwrap().registries;
        assert_eq!(default.hosts_dirs.len(), 3);
        assert_eq!(remotes::Settings { hosts_dirs: Vec::new(), ..default }, remotes::Settings::default());
        for (version, plugin) in [(3, CRI_IMAGES[0]), (2, CRI_IMAGES[1])] {
            let config = from_text(&format!(
                "version = {version}\n[plugins.'{plugin}'.registry]\nconfig_path = '/a:/b'\n"
            ))
            .unwrap();
            assert_eq!(config.registries.hosts_dirs, [Path::new("/a"), Path::new("/b")]);
            assert!(config.ignored.is_empty(), "{:?}", config.ignored);
        }
        let config = from_text(
            "version = 3\n[plugins.'io.containerd.cri.v1.images']\nsnapshotter = 'x'\nregistry.config_path = '/a'\n\
             [plugins.'io.containerd.transfer.v1.local']\nconfig_path = '/t'\nmax_concurrent_downloads = 7\n\
             max_concurrent_uploaded_layers = 0\nconcurrent_layer_fetch_buffer = 1048576\nunpack_config = [{platform = 'x'}]\n",
        )
        .unwrap();
        assert_eq!(config.registries.hosts_dirs, [Path::new("/t")]);
        let settings = &config.registries;
        assert_eq!((settings.concurrent_downloads, settings.concurrent_uploads), (7, LAYERS_MAX));
        assert_eq!(settings.fetch_buffer, 1 << 20);
        assert_eq!(config.ignored, ["plugins.io.containerd.transfer.v1.local.unpack_config"]);
    }

    #[test]
    fn sockets_for_debugging_and_metrics() {
        let config = from_text(
            "version = 2\n[debug]\naddress = '/d'\nuid = 3\n[metrics]\naddress = 'unix:///m'\ngid = 4\nmode = '0600'\n",
        )
        .unwrap();
        assert_eq!(config.debug, Some(Socket { path: "/d".into(), uid: 3, gid: 0, mode: 0o660 }));
        let socket = Socket { path: "/m".into(), uid: 0, gid: 4, mode: 0o600 };
        assert_eq!(config.metrics, Some(MetricsAddress::Unix(socket)));
        let config = from_text("version = 2\n[metrics]\naddress = '127.0.0.1:9'\n").unwrap();
        assert_eq!(config.metrics, Some(MetricsAddress::Tcp("127.0.0.1:9".parse().unwrap())));
    }

    #[test]
    fn mistakes_are_named() {
        for (text, words) in [
            ("version = 3\nrooot = '/x'", "rooot"),
            ("version = 3\n[grpc]\nadress = '/x'", "adress"),
            ("version = 3\nroot = 5", "root = 5"),
            ("version = 1", "version 1 is not supported"),
            ("root = '/x'", "`version` is missing"),
            ("version = 3\nroot = 'x'", "absolute"),
            ("version = 3\nroot = '/run/gantry'", "different"),
            ("version = 3\n[debug]\nlevel = 'loud'", "loud"),
            ("version = 3\n[metrics]\naddress = 'nowhere'", "nowhere"),
            ("version = 3\n[metrics]\naddress = '/m'\nmode = '999'", "metrics.mode"),
            ("version = 3\n[debug]\naddress = 'x'", "debug.address"),
            ("version = 3\n[plugins.'io.containerd.gc.v1.scheduler']\nstartup_delay = 'soon'", "soon"),
            ("version = 3\n[plugins.'io.containerd.gc.v1.scheduler']\npauses = 1", "pauses"),
            ("version = 2\n[proxy_plugins.x]\ntype = 'snapshot'\naddress = 'x'", "proxy_plugins.x: address"),
            ("version = 2\n[proxy_plugins.x]\ntype = 'sandbox'\naddress = '/x'", "content and diff are"),
            (
                "version = 2\n[proxy_plugins.x]\ntype = 'content'\naddress = '/x'\nnamespace = '/'",
                "namespace",
            ),
            (
                "version = 2\n[proxy_plugins.x]\ntype = 'content'\naddress = '/x'\n[proxy_plugins.y]\ntype = 'content'\n\
                 address = '/y'",
                "there is one",
            ),
            ("version = 2\n[proxy_plugins.native]\ntype = 'snapshot'\naddress = '/x'", "built-in"),
            ("version = 2\n[plugins.'io.containerd.service.v1.diff-service']\ndefault = ['x']", "\"x\""),
            ("version = 3\n[plugins.'io.containerd.transfer.v1.local']\nconfig_path = 'x'", "absolute"),
            ("version = 3\n[plugins.'io.containerd.transfer.v1.local']\nmax_downloads = 1", "max_downloads"),
            (
                "version = 3\n[plugins.'io.containerd.cri.v1.images'.registry]\nconfig_path = 5",
                "config_path is 5",
            ),
            ("version = 3\n[plugins.'io.gantry.hooks.v1']\ndirs = ['hooks.d']", "absolute"),
            ("version = 3\n[plugins.'io.gantry.hooks.v1']\ndir = '/x'", "io.gantry.hooks.v1"),
            ("version = 3\n[events]\nretention_bytes = 100", "the least"),
            ("version = ", "configuration"),
        ] {
            let error = format!("{:#}", from_text(text).unwrap_err());
            assert!(error.contains(words), "{text}: {error}");
        }
        let flags = Flags { config: Some("/nonexistent/x.toml".into()), ..Flags::default() };
        assert!(format!("{:#}", Config::resolve(&flags).unwrap_err()).contains("/nonexistent/x.toml"));
    }

    #[test]
    fn flags_win_and_imports_merge() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("config.toml");
        std::fs::write(
            &path,
            "version = 3\nroot = '/a'\nimports = ['conf.d/*.toml']\n[ttrpc]\naddress = '/t'\n",
        )
        .unwrap();
        std::fs::create_dir(folder.path().join("conf.d")).unwrap();
        std::fs::write(folder.path().join("conf.d/1.toml"), "version = 3\nroot = '/b'\nstate = '/s'\n")
            .unwrap();
        std::fs::write(folder.path().join("conf.d/2.toml"), "version = 3\nstate = '/s2'\n").unwrap();
        let mut flags = Flags { config: Some(path.clone()), ..Flags::default() };
        let config = Config::resolve(&flags).unwrap();
        assert_eq!((config.root.to_str(), config.state.to_str()), (Some("/b"), Some("/s2")));
        assert_eq!(config.ttrpc.path, Path::new("/t"));
        flags.address = Some("/sock".into());
        flags.root = Some("/flag".into());
        let config = Config::resolve(&flags).unwrap();
        assert_eq!((config.root.to_str(), config.ttrpc.path.to_str()), (Some("/flag"), Some("/sock.ttrpc")));
        std::fs::write(&path, "version = 3\nimports = ['config.toml']\n").unwrap();
        assert!(format!("{:#}", Config::resolve(&flags).unwrap_err()).contains("import each other"));
    }
}
