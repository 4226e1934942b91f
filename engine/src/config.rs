//! The configuration: from defaults, containerd-style TOML and flags to one resolved [`Config`], before any side effect.
//!
//! A containerd `config.toml` (versions 2 to 4, with `imports`) is accepted as it is. What the engine has is honoured;
//! what containerd has and the engine lacks is listed in [`Config::ignored`], to be logged once; a key that neither
//! knows is an error, since it is a mistake. Flags win over the file.

use std::path::{Path, PathBuf};

use anyhow::{Context as _, bail};
use serde::{Deserialize, Serialize};

use crate::gc;

/// Where the configuration is looked for when no flag names it; it need not be there.
pub const DEFAULT_PATH: &str = "/etc/gantry/config.toml";
/// The configuration versions that are read.
const VERSIONS: std::ops::RangeInclusive<i64> = 2..=4;
/// The default size of the largest gRPC message, in bytes.
const MESSAGE_BYTES: usize = 16 << 20;
/// The plugin whose settings say when garbage is collected.
const SCHEDULER: &str = "io.containerd.gc.v1.scheduler";
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
    /// The address (host:port) that serves Prometheus metrics at /v1/metrics.
    pub metrics: Option<std::net::SocketAddr>,
    /// The least severe level that is logged.
    pub log_level: tracing::Level,
    /// Whether logs are JSON.
    pub log_json: bool,
    /// The engine's own oom_score_adj, if it is to be set (0 leaves it).
    pub oom_score: i32,
    /// When garbage is collected.
    pub gc: gc::Settings,
    /// Settings of containerd that were found and have no effect here.
    pub ignored: Vec<String>,
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
}

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
    cgroup: toml::Table,
    timeouts: toml::Table,
    plugins: toml::Table,
    proxy_plugins: toml::Table,
    stream_processors: toml::Table,
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
    level: String,
    format: String,
}

#[derive(Debug, Clone, Default, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
struct Metrics {
    address: String,
    grpc_histogram: bool,
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

/// The plugins that have settings here, with their defaults.
fn default_plugins() -> toml::Table {
    let section = toml::Value::try_from(SchedulerSection::default());
    section.into_iter().map(|section| (SCHEDULER.to_owned(), section)).collect()
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
            cgroup: toml::Table::new(),
            timeouts: toml::Table::new(),
            plugins: default_plugins(),
            proxy_plugins: toml::Table::new(),
            stream_processors: toml::Table::new(),
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

impl Default for Debug {
    fn default() -> Self {
        Debug { address: String::new(), uid: 0, gid: 0, level: "info".into(), format: "text".into() }
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
        Socket { path: path.into(), uid: file.grpc.uid, gid: file.grpc.gid }
    } else {
        Socket { path: file.ttrpc.address.clone(), uid: file.ttrpc.uid, gid: file.ttrpc.gid }
    };
    let log_level = match file.debug.level.as_str() {
        "" => tracing::Level::INFO,
        "trace" => tracing::Level::TRACE,
        "debug" => tracing::Level::DEBUG,
        "info" => tracing::Level::INFO,
        "warn" | "warning" => tracing::Level::WARN,
        "error" | "fatal" | "panic" => tracing::Level::ERROR,
        other => bail!("log level {other:?} is not known; use trace, debug, info, warn or error"),
    };
    let log_json = match file.debug.format.as_str() {
        "" | "text" => false,
        "json" => true,
        other => bail!("log format {other:?} is not known; use text or json"),
    };
    let metrics =
        match file.metrics.address.as_str() {
            "" => None,
            address => Some(address.parse().with_context(|| {
                format!("metrics.address {address:?} is not HOST:PORT with an IP address")
            })?),
        };
    Ok(Config {
        root: file.root.clone(),
        state: file.state.clone(),
        grpc: Socket { path: file.grpc.address.clone(), uid: file.grpc.uid, gid: file.grpc.gid },
        ttrpc,
        max_receive: Some(file.grpc.max_recv_message_size).filter(|size| *size > 0).unwrap_or(MESSAGE_BYTES),
        max_send: Some(file.grpc.max_send_message_size).filter(|size| *size > 0).unwrap_or(MESSAGE_BYTES),
        metrics,
        log_level,
        log_json,
        oom_score: file.oom_score,
        gc: scheduler(&file.plugins)?,
        ignored: ignored(file),
    })
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

/// The settings that say something other than containerd's default and have no effect here.
fn ignored(file: &File) -> Vec<String> {
    let mut ignored = Vec::new();
    let texts = [
        ("temp", &file.temp),
        ("plugin_dir", &file.plugin_dir),
        ("grpc.tcp_address", &file.grpc.tcp_address),
        ("debug.address", &file.debug.address),
    ];
    ignored.extend(texts.iter().filter(|(_, value)| !value.is_empty()).map(|(name, _)| (*name).to_owned()));
    let lists = [("required_plugins", &file.required_plugins), ("disabled_plugins", &file.disabled_plugins)];
    ignored.extend(lists.iter().filter(|(_, list)| !list.is_empty()).map(|(name, _)| (*name).to_owned()));
    let tables = [
        ("cgroup", &file.cgroup),
        ("timeouts", &file.timeouts),
        ("plugins", &file.plugins),
        ("proxy_plugins", &file.proxy_plugins),
        ("stream_processors", &file.stream_processors),
    ];
    for (name, table) in tables {
        ignored.extend(
            table
                .iter()
                .filter(|(key, value)| *key != SCHEDULER && !is_empty(value))
                .map(|(key, _)| format!("{name}.{key}")),
        );
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
             [plugins.'io.containerd.grpc.v1.cri']\nsandbox_image = 'x'\n[timeouts]\n'io.containerd.x' = '5s'\n",
        )
        .unwrap();
        assert_eq!((config.root.as_path(), config.oom_score), (Path::new("/a"), 5));
        assert_eq!(config.ttrpc, Socket { path: "/c.ttrpc".into(), uid: 0, gid: 7 });
        assert_eq!(config.ignored, ["timeouts.io.containerd.x", "plugins.io.containerd.grpc.v1.cri"]);
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
            ("version = 3\n[plugins.'io.containerd.gc.v1.scheduler']\nstartup_delay = 'soon'", "soon"),
            ("version = 3\n[plugins.'io.containerd.gc.v1.scheduler']\npauses = 1", "pauses"),
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
