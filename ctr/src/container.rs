//! Making a container: image or folder, snapshot, spec, record; and the task that runs it.
//!
//! Whatever fails, what was made before it goes again: a snapshot without a record would be left for the
//! next garbage collection only, a record without a task would block the name.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::Args;
use oci::Platform;
use oci::image::{ContainerDefaults, Descriptor, ImageConfig};
use oci::platform::Matcher;
use oci::runtime::{Device, IdMapping, Rlimit, Spec};
use oci::spec::{ALL_CAPABILITIES, parse_mount};
use proto::containerd::runc::v1::Options;
use proto::containerd::services::containers::v1::container::Runtime;
use proto::containerd::services::containers::v1::{
    Container, CreateContainerRequest, DeleteContainerRequest, GetContainerRequest,
};
use proto::containerd::services::introspection::v1::PluginsRequest;
use proto::containerd::services::snapshots::v1::{
    MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest,
};
use proto::containerd::services::tasks::v1::CreateTaskRequest;
use proto::containerd::types::Mount;
use tonic::Code;

use crate::args::{Snapshotter, labels};
use crate::client::{Client, Failure, Tried};
use crate::progress::Progress;
use crate::stdio::Addresses;
use crate::{image, lease, rootfs, unpack};

/// The runtime whose options `--runc-binary` and its like set.
pub(crate) const RUNC: &str = "io.containerd.runc.v2";

/// Label that tells `tasks kill` which signal the image wants.
pub(crate) const STOP_SIGNAL_LABEL: &str = "io.containerd.image.config.stop-signal";

/// Longest label, key and value together, in bytes.
const LABEL_LIMIT: usize = 4096;

/// Flags that `run` and `containers create` share.
#[derive(Debug, Args)]
pub(crate) struct SpecArgs {
    /// Image (or folder, with --rootfs), container id, then command and arguments; with --config the id alone
    #[arg(
        value_name = "IMAGE|ROOTFS ID COMMAND",
        required = true,
        trailing_var_arg = true,
        allow_hyphen_values = true
    )]
    pub(crate) arguments: Vec<String>,
    /// Take the whole runtime spec from this file
    #[arg(short, long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Use a folder as root file system instead of an image
    #[arg(long)]
    rootfs: bool,
    /// Run the image for this platform
    #[arg(long, value_name = "OS/ARCH[/VARIANT]", value_parser = parse_platform)]
    platform: Option<Platform>,
    /// Working directory of the process
    #[arg(long, value_name = "PATH")]
    cwd: Option<String>,
    /// Set an environment variable; a name alone unsets it
    #[arg(long, value_name = "NAME=VALUE")]
    env: Vec<String>,
    /// Set environment variables from a file, one per line
    #[arg(long, value_name = "FILE")]
    env_file: Option<PathBuf>,
    /// Label the container
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Annotate the runtime spec
    #[arg(long, value_name = "KEY=VALUE", value_parser = parse_pair)]
    annotation: Vec<(String, String)>,
    /// Mount, as type=bind,src=/tmp,dst=/host,options=rbind:ro
    #[arg(long, value_name = "MOUNT")]
    mount: Vec<String>,
    /// Share the host's network
    #[arg(long)]
    net_host: bool,
    /// Lift the confinement
    #[arg(long)]
    privileged: bool,
    /// Keep the host's devices out of a privileged container
    #[arg(long, requires = "privileged")]
    privileged_without_host_devices: bool,
    /// Make the root file system read-only
    #[arg(long)]
    read_only: bool,
    /// Give the process a terminal
    #[arg(short, long)]
    pub(crate) tty: bool,
    /// Join an existing namespace, as network:/run/netns/x
    #[arg(long, value_name = "TYPE:PATH", value_parser = parse_namespace)]
    with_ns: Vec<(String, String)>,
    /// Let setuid programs gain privileges
    #[arg(long)]
    allow_new_privs: bool,
    /// Memory limit in bytes
    #[arg(long, value_name = "BYTES")]
    memory_limit: Option<u64>,
    /// Number of CPUs' time, as 1.5
    #[arg(long, conflicts_with_all = ["cpu_quota", "cpu_period"])]
    cpus: Option<f64>,
    /// Relative CPU weight [default: 1024 for run]
    #[arg(long, value_name = "WEIGHT")]
    pub(crate) cpu_shares: Option<u64>,
    /// CPU time per period, in microseconds
    #[arg(long, value_name = "MICROSECONDS", allow_negative_numbers = true)]
    cpu_quota: Option<i64>,
    /// Length of a CPU period, in microseconds
    #[arg(long, value_name = "MICROSECONDS")]
    cpu_period: Option<u64>,
    /// CPU time that may be saved up, in microseconds
    #[arg(long, value_name = "MICROSECONDS")]
    cpu_burst: Option<u64>,
    /// CPUs to run on, as 0-2,4
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true)]
    cpuset_cpus: String,
    /// Memory nodes to use, as 0-1
    #[arg(long, value_name = "LIST", default_value = "", hide_default_value = true)]
    cpuset_mems: String,
    /// Most processes in the container
    #[arg(long, value_name = "COUNT")]
    pids_limit: Option<i64>,
    /// Limit of open files
    #[arg(long, value_name = "SOFT[:HARD]", value_parser = parse_nofile)]
    rlimit_nofile: Option<Rlimit>,
    /// Add a capability, as CAP_NET_ADMIN
    #[arg(long, value_name = "CAPABILITY")]
    cap_add: Vec<String>,
    /// Drop a capability, as CAP_CHOWN
    #[arg(long, value_name = "CAPABILITY")]
    cap_drop: Vec<String>,
    /// Confine system calls by a profile, containerd's default one unless --seccomp-profile names another
    #[arg(long)]
    seccomp: bool,
    /// Confine system calls as this file says, the seccomp part of a runtime spec
    #[arg(long, value_name = "FILE", requires = "seccomp")]
    seccomp_profile: Option<PathBuf>,
    /// Confine the process by an AppArmor profile that is loaded
    #[arg(long, value_name = "PROFILE")]
    apparmor_profile: Option<String>,
    /// Class of Intel RDT, for cache and memory bandwidth
    #[arg(long, value_name = "CLASS")]
    rdt_class: Option<String>,
    /// Add a device, or all devices in a folder
    #[arg(long, value_name = "PATH")]
    device: Vec<PathBuf>,
    /// Propagation of the root mount, as shared or slave
    #[arg(long, value_name = "PROPAGATION")]
    rootfs_propagation: Option<String>,
    /// Host name inside
    #[arg(long, value_name = "NAME")]
    hostname: Option<String>,
    /// User to run as
    #[arg(short, long, value_name = "NAME|UID[:GROUP|GID]")]
    user: Option<String>,
    /// Cgroup path; empty leaves it to the runtime
    #[arg(long, value_name = "PATH")]
    cgroup: Option<String>,
    /// Sandbox to create the container in
    #[arg(long, value_name = "ID", default_value = "", hide_default_value = true)]
    sandbox: String,
    #[command(flatten)]
    runtime: RuntimeArgs,
    #[command(flatten)]
    snapshotter: Snapshotter,
    /// Write the snapshotter's file system to disk after each layer that is unpacked
    #[arg(long)]
    sync_fs: bool,
    /// Label the container's snapshot
    #[arg(long, value_name = "KEY=VALUE")]
    snapshotter_label: Vec<String>,
    /// Run in a user namespace with these users: container-id:host-id:size
    #[arg(long, value_name = "MAPPING", value_delimiter = ',', requires = "gidmap", value_parser = parse_mapping)]
    #[arg(conflicts_with_all = ["config", "rootfs"])]
    uidmap: Vec<IdMapping>,
    /// Run in a user namespace with these groups: container-id:host-id:size
    #[arg(long, value_name = "MAPPING", value_delimiter = ',', requires = "uidmap", value_parser = parse_mapping)]
    gidmap: Vec<IdMapping>,
    /// Leave the owners of the image's files to the snapshotter, whatever it says that it can
    #[arg(long, requires = "uidmap")]
    remap_labels: bool,
}

fn parse_mapping(text: &str) -> Result<IdMapping, String> {
    oci::spec::parse_id_mapping(text).map_err(|error| error.to_string())
}

/// Which runtime, and how it is set.
#[derive(Debug, Args)]
pub(crate) struct RuntimeArgs {
    /// Runtime by name, or by absolute path of the shim [default: the namespace's, else io.containerd.runc.v2]
    #[arg(long, value_name = "NAME")]
    runtime: Option<String>,
    /// Configuration file of a runtime other than runc
    #[arg(long, value_name = "FILE")]
    runtime_config_path: Option<String>,
    /// The runc-compatible program
    #[arg(long, value_name = "PROGRAM")]
    runc_binary: Option<String>,
    /// Where the runc-compatible program keeps its state
    #[arg(long, value_name = "FOLDER")]
    runc_root: Option<String>,
    /// Let systemd make the cgroup
    #[arg(long)]
    runc_systemd_cgroup: bool,
}

fn parse_platform(text: &str) -> Result<Platform, String> {
    Platform::parse(text).map_err(|error| error.to_string())
}

fn parse_pair(text: &str) -> Result<(String, String), String> {
    let (key, value) = text.split_once('=').ok_or("expected key=value")?;
    Ok((key.to_owned(), value.to_owned()))
}

fn parse_namespace(text: &str) -> Result<(String, String), String> {
    let (kind, path) = text.split_once(':').ok_or("expected type:path, as network:/run/netns/x")?;
    Ok((kind.to_owned(), path.to_owned()))
}

fn parse_nofile(text: &str) -> Result<Rlimit, String> {
    let (soft, hard) = text.split_once(':').unwrap_or((text, text));
    let number = |text: &str| text.parse::<u64>().map_err(|_| format!("{text:?} is not a number of files"));
    Ok(Rlimit { kind: "RLIMIT_NOFILE".into(), soft: number(soft)?, hard: number(hard)? })
}

/// What the positional arguments mean.
#[derive(Debug, PartialEq)]
struct Positions<'a> {
    source: &'a str,
    id: &'a str,
    command: &'a [String],
}

impl SpecArgs {
    fn positions(&self) -> anyhow::Result<Positions<'_>> {
        if let Some(flag) = self.arguments.first().filter(|first| first.starts_with('-')) {
            bail!("unknown flag {flag}; see `ctr run --help`");
        }
        match (&self.config, &self.arguments[..]) {
            (Some(_), [id]) => Ok(Positions { source: "", id, command: &[] }),
            (Some(_), _) => bail!("with --config, give the container id and nothing else"),
            (None, [source, id, command @ ..]) => Ok(Positions { source, id, command }),
            (None, _) => bail!("give an image and a container id, and then, if wanted, a command"),
        }
    }
}

/// Creates the container that the flags describe; its image is unpacked where it is not.
pub(crate) async fn create(client: &Client, args: &SpecArgs) -> anyhow::Result<Container> {
    let positions = args.positions()?;
    // Everything that can be wrong with the flags alone is found before anything is made.
    let mut spec = base_spec(client, args, &positions)?;
    let cgroup = args.cgroup.as_ref().is_some_and(|path| !path.is_empty());
    let runtime = args.runtime.resolve(client, cgroup).await?;
    let mut container = Container {
        id: positions.id.to_owned(),
        labels: labels(&args.label),
        runtime: Some(runtime),
        sandbox: args.sandbox.clone(),
        ..Container::default()
    };
    if args.config.is_some() || args.rootfs {
        let root = match &mut spec {
            Document::Built(spec) => {
                let root = std::path::absolute(positions.source)?;
                ensure!(root.is_dir(), "{} is not a folder to run from", root.display());
                ensure!(!positions.command.is_empty(), "no command: with --rootfs, give one after the id");
                // A folder brings no defaults of its own, but a PATH is wanted all the same.
                spec.set_root(&root.display().to_string())
                    .apply_image(&ContainerDefaults::default(), positions.command)?;
                Some(root)
            }
            Document::Given(_) => None,
        };
        if let (Document::Built(spec), Some(root)) = (&mut spec, root) {
            let user = args.user.clone().unwrap_or_default();
            let resolved =
                tokio::task::spawn_blocking(move || rootfs::resolve_in_folder(&root, &user)).await??;
            spec.set_user(resolved);
            finish_spec(spec, args)?;
        }
        return record(client, container, spec).await;
    }
    lease::within(client, |client| async move {
        let snapshotter = client.snapshotter(&args.snapshotter.snapshotter).await?;
        let found = image::get(&client, positions.source).await?;
        let platform = args.platform.clone().unwrap_or_else(Platform::host);
        let matcher = Matcher::only(&platform);
        let resolved = image::resolve(&client, &image::target(&found)?, &matcher, &platform)
            .await
            .with_context(|| format!("cannot run image {}", found.name))?;
        let top = unpack::unpack(&client, &resolved, &snapshotter, args.sync_fs, &Progress::new()).await?;
        container.image = found.name;
        container.labels = container_labels(&found.labels, &resolved.config, &args.label);
        let key = container.id.clone();
        let mounts = prepare(&client, &snapshotter, &key, top, args).await?;
        container.snapshotter = snapshotter.clone();
        container.snapshot_key = key.clone();
        let made = async {
            if let Document::Built(spec) = &mut spec {
                let defaults = &resolved.config.config;
                spec.apply_image(defaults, positions.command)?;
                if !positions.command.is_empty() {
                    // ctr's command replaces the image's entrypoint, too.
                    spec.set_args(positions.command);
                }
                let user = args.user.clone().unwrap_or_else(|| defaults.user.clone());
                let resolved = tokio::task::spawn_blocking(move || rootfs::resolve_in_mounts(mounts, &user));
                let resolved = shim_api::trace::span("look the user up", resolved).await??;
                spec.set_user(resolved);
                finish_spec(spec, args)?;
            }
            record(&client, container, spec).await
        }
        .await;
        if made.is_err() {
            remove_snapshot(&client, &snapshotter, &key).await?;
        }
        made
    })
    .await
}

/// A spec of our making, or one that is passed on byte for byte.
enum Document {
    Built(Box<Spec>),
    Given(Vec<u8>),
}

/// The spec as far as flags alone determine it.
fn base_spec(client: &Client, args: &SpecArgs, positions: &Positions<'_>) -> anyhow::Result<Document> {
    if let Some(path) = &args.config {
        let bytes = std::fs::read(path).with_context(|| format!("cannot read spec {}", path.display()))?;
        let _: Spec = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is not a runtime spec", path.display()))?;
        return Ok(Document::Given(bytes));
    }
    let mut spec = Spec::linux(client.namespace(), positions.id);
    spec.allow_default_devices();
    if let Some(path) = &args.env_file {
        let text = std::fs::read_to_string(path)
            .with_context(|| format!("cannot read environment file {}", path.display()))?;
        let entries: Vec<String> = text
            .lines()
            .map(str::trim_start)
            .filter(|line| !line.is_empty() && !line.starts_with('#'))
            .map(str::to_owned)
            .collect();
        spec.set_env(&entries)?;
    }
    spec.set_env(&args.env)?;
    let mounts = args.mount.iter().map(|mount| parse_mount(mount)).collect::<Result<Vec<_>, _>>()?;
    spec.add_mounts(mounts);
    // Tried on a copy: what image and user bring comes before these, but their errors should come first.
    finish_spec(&mut spec.clone(), args)?;
    Ok(Document::Built(Box::new(spec)))
}

/// The flags that go on top of what the image says.
fn finish_spec(spec: &mut Spec, args: &SpecArgs) -> anyhow::Result<()> {
    if !args.uidmap.is_empty() {
        spec.set_user_namespace(args.uidmap.clone(), args.gidmap.clone());
    }
    if args.read_only {
        spec.set_readonly_root();
    }
    if let Some(cwd) = &args.cwd {
        spec.set_cwd(cwd);
    }
    if args.tty {
        spec.set_terminal();
    }
    if args.privileged {
        spec.set_privileged(&own_capabilities()?);
        if !args.privileged_without_host_devices {
            spec.allow_all_devices(devices_in(Path::new("/dev"))?);
        }
    }
    if args.net_host {
        let host = rustix::system::uname();
        spec.use_host_network(&host.nodename().to_string_lossy());
    }
    spec.add_annotations(args.annotation.clone());
    spec.add_annotations(labels(&args.label));
    spec.add_capabilities(&args.cap_add)?;
    spec.drop_capabilities(&args.cap_drop)?;
    if let Some(path) = &args.seccomp_profile {
        let bytes =
            std::fs::read(path).with_context(|| format!("cannot read seccomp profile {}", path.display()))?;
        let profile: serde_json::Value = serde_json::from_slice(&bytes)
            .with_context(|| format!("{} is not a seccomp profile", path.display()))?;
        spec.linux_mut().seccomp = Some(profile);
    } else if args.seccomp {
        // After the capabilities, which decide what it allows.
        spec.set_default_seccomp();
    }
    if let Some(profile) = &args.apparmor_profile {
        spec.process_mut().apparmor_profile.clone_from(profile);
    }
    if let Some(class) = &args.rdt_class {
        let extra = &mut spec.linux_mut().extra;
        extra.insert("intelRdt".to_owned(), serde_json::json!({"closID": class}));
    }
    if let Some(cpus) = args.cpus.filter(|cpus| *cpus != 0.0) {
        spec.set_cpus(cpus)?;
    }
    if args.cpu_quota.is_some() || args.cpu_period.is_some() {
        spec.set_cpu_quota(args.cpu_quota, args.cpu_period);
    }
    if let Some(burst) = args.cpu_burst {
        spec.set_cpu_burst(burst);
    }
    if !args.cpuset_cpus.is_empty() || !args.cpuset_mems.is_empty() {
        spec.set_cpuset(&args.cpuset_cpus, &args.cpuset_mems);
    }
    if let Some(shares) = args.cpu_shares.filter(|shares| *shares > 0) {
        spec.set_cpu_shares(shares);
    }
    if let Some(limit) = args.memory_limit.filter(|limit| *limit > 0) {
        spec.set_memory_limit(limit)?;
    }
    if let Some(limit) = args.pids_limit {
        spec.set_pids_limit(limit);
    }
    if let Some(limit) = &args.rlimit_nofile {
        spec.set_rlimit(limit.clone())?;
    }
    for (kind, path) in &args.with_ns {
        spec.set_namespace(kind, path)?;
    }
    if args.allow_new_privs {
        spec.process_mut().no_new_privileges = false;
    }
    if let Some(path) = &args.cgroup {
        spec.set_cgroup(path);
    }
    for path in &args.device {
        let devices = devices_in(path)?;
        ensure!(!devices.is_empty(), "{} is neither a device nor a folder with devices", path.display());
        spec.add_devices(devices, "rwm");
    }
    if let Some(propagation) = &args.rootfs_propagation {
        spec.linux_mut().rootfs_propagation.clone_from(propagation);
    }
    if let Some(hostname) = &args.hostname {
        spec.set_hostname(hostname);
    }
    Ok(())
}

impl RuntimeArgs {
    /// What goes into a record; `cgroup` says whether a cgroup was named, as systemd needs.
    pub(crate) async fn resolve(&self, client: &Client, cgroup: bool) -> anyhow::Result<Runtime> {
        let name = match &self.runtime {
            Some(name) => name.clone(),
            None => client.default_of("runtime", RUNC).await?,
        };
        ensure!(
            cgroup || !self.runc_systemd_cgroup,
            "--runc-systemd-cgroup needs a --cgroup such as machine.slice:gantry:NAME"
        );
        let options = self.options(&name)?;
        Ok(Runtime { name, options })
    }

    /// The options of the runtime of this name.
    pub(crate) fn options(&self, name: &str) -> anyhow::Result<Option<prost_types::Any>> {
        if name == RUNC {
            return Ok(Some(proto::any::pack(&Options {
                binary_name: self.runc_binary.clone().unwrap_or_default(),
                root: self.runc_root.clone().unwrap_or_default(),
                systemd_cgroup: self.runc_systemd_cgroup,
                ..Options::default()
            })));
        }
        ensure!(
            self.runc_binary.is_none() && !self.runc_systemd_cgroup,
            "--runc-binary and --runc-systemd-cgroup are for runtime {RUNC}, not {name}"
        );
        Ok(self.runtime_config_path.as_ref().map(|path| {
            proto::any::pack(&proto::runtimeoptions::v1::Options {
                config_path: path.clone(),
                ..Default::default()
            })
        }))
    }
}

/// Labels of a container: the image record's and its config's, then those of the command line.
///
/// An image is no authority: labels that steer an engine (a logger to run, a restart policy) never come from it.
fn container_labels(
    image: &BTreeMap<String, String>,
    config: &ImageConfig,
    flags: &[String],
) -> BTreeMap<String, String> {
    let mut all: BTreeMap<String, String> = BTreeMap::new();
    for (key, value) in config.config.labels.iter().chain(image) {
        let usable = !key.is_empty() && key.len() + value.len() <= LABEL_LIMIT;
        if usable && !oci::image::is_reserved_label(key) {
            all.insert(key.clone(), value.clone());
        }
    }
    let signal = &config.config.stop_signal;
    let signal = if crate::signals::parse(signal).is_ok() { signal } else { "SIGTERM" };
    all.insert(STOP_SIGNAL_LABEL.to_owned(), signal.to_owned());
    all.extend(labels(flags));
    all
}

async fn prepare(
    client: &Client,
    snapshotter: &str,
    key: &str,
    parent: String,
    args: &SpecArgs,
) -> anyhow::Result<Vec<Mount>> {
    let mut labels = labels(&args.snapshotter_label);
    if !args.uidmap.is_empty() {
        ensure!(
            args.remap_labels || can(client, snapshotter, "remap-ids").await?,
            "snapshotter {snapshotter} cannot give an image's files other owners, which --uidmap needs; try overlayfs"
        );
        for (label, mappings) in [("uidmapping", &args.uidmap), ("gidmapping", &args.gidmap)] {
            let text = |of: &IdMapping| format!("{}:{}:{}", of.container_id, of.host_id, of.size);
            let mappings: Vec<String> = mappings.iter().map(text).collect();
            labels.insert(format!("containerd.io/snapshot/{label}"), mappings.join(","));
        }
    }
    let request =
        PrepareSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned(), parent, labels };
    let prepared = client.snapshots().prepare(request).await.tried(|| format!("prepare snapshot {key}"))?;
    Ok(prepared.mounts)
}

/// Whether the engine says that a snapshotter has this capability.
async fn can(client: &Client, snapshotter: &str, capability: &str) -> anyhow::Result<bool> {
    let filter = format!("type==io.containerd.snapshotter.v1,id=={snapshotter}");
    let request = PluginsRequest { filters: vec![filter] };
    let answered = client.introspection().plugins(request).await.tried(|| "list plugins")?;
    Ok(answered.plugins.iter().any(|plugin| plugin.capabilities.iter().any(|has| has == capability)))
}

async fn record(client: &Client, mut container: Container, spec: Document) -> anyhow::Result<Container> {
    let bytes = match spec {
        Document::Built(spec) => serde_json::to_vec(&spec)?,
        Document::Given(bytes) => bytes,
    };
    container.spec = Some(proto::any::wrap(proto::any::SPEC, bytes));
    put(client, container).await
}

/// Makes the record of a container.
pub(crate) async fn put(client: &Client, container: Container) -> anyhow::Result<Container> {
    let id = container.id.clone();
    let request = CreateContainerRequest { container: Some(container) };
    let created = client.containers().create(request).await.tried(|| format!("create container {id}"))?;
    Ok(created.container.unwrap_or_default())
}

/// Removes a snapshot, if it is there.
pub(crate) async fn remove_snapshot(client: &Client, snapshotter: &str, key: &str) -> anyhow::Result<()> {
    let request = RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
    match client.snapshots().remove(request).await {
        Ok(_) => Ok(()),
        Err(status) if status.code() == Code::NotFound => Ok(()),
        Err(status) => Err(Failure::new(format!("remove snapshot {key}"), status).into()),
    }
}

/// The record of a container.
pub(crate) async fn get(client: &Client, id: &str) -> anyhow::Result<Container> {
    let request = GetContainerRequest { id: id.to_owned() };
    let response = client.containers().get(request).await.tried(|| format!("find container {id}"))?;
    response.container.with_context(|| format!("the engine's answer about container {id} is empty"))
}

/// The runtime spec in a container's record.
pub(crate) fn spec_of(container: &Container) -> anyhow::Result<Spec> {
    let spec =
        container.spec.as_ref().with_context(|| format!("container {} has no runtime spec", container.id))?;
    serde_json::from_slice(&spec.value)
        .with_context(|| format!("the spec of container {} is unreadable", container.id))
}

/// Deletes a container's record and, unless it is to be kept, its snapshot.
pub(crate) async fn delete(
    client: &Client,
    container: &Container,
    keep_snapshot: bool,
) -> anyhow::Result<()> {
    let snapshot = async {
        if keep_snapshot || container.snapshot_key.is_empty() {
            return Ok(());
        }
        remove_snapshot(client, &container.snapshotter, &container.snapshot_key).await
    };
    let mut containers = client.containers();
    let record = containers.delete(DeleteContainerRequest { id: container.id.clone() });
    // At the same time, as each waits for the disk. A snapshot that stays because its removal fails is held by nothing
    // without the record, and goes with a collection.
    let (snapshot, record) = tokio::join!(snapshot, record);
    record.tried(|| format!("delete container {}", container.id))?;
    snapshot
}

/// The mounts of a container's root file system; none where it brings its own.
pub(crate) async fn mounts(client: &Client, container: &Container) -> anyhow::Result<Vec<Mount>> {
    if container.snapshot_key.is_empty() {
        return Ok(Vec::new());
    }
    let request =
        MountsRequest { snapshotter: container.snapshotter.clone(), key: container.snapshot_key.clone() };
    let answer = client.snapshots().mounts(request).await;
    Ok(answer.tried(|| format!("get the mounts of snapshot {}", container.snapshot_key))?.mounts)
}

/// Creates the task of a container, from the processes of a checkpoint if that is given, and returns its process id.
pub(crate) async fn create_task(
    client: &Client,
    container: &Container,
    streams: Addresses,
    no_pivot: bool,
    checkpoint: Option<&Descriptor>,
) -> anyhow::Result<u32> {
    let options = match no_pivot {
        // A request's options replace the container's, so those are carried over.
        true => {
            let own = container.runtime.as_ref().and_then(|runtime| runtime.options.as_ref());
            let mut options: Options = own.map(proto::any::unpack).transpose()?.unwrap_or_default();
            options.no_pivot_root = true;
            Some(proto::any::pack(&options))
        }
        false => None,
    };
    let request = CreateTaskRequest {
        container_id: container.id.clone(),
        rootfs: mounts(client, container).await?,
        stdin: streams.stdin,
        stdout: streams.stdout,
        stderr: streams.stderr,
        terminal: streams.terminal,
        checkpoint: checkpoint.map(image::wire),
        options,
        ..CreateTaskRequest::default()
    };
    let created =
        client.tasks().create(request).await.tried(|| format!("create a task for {}", container.id))?;
    Ok(created.pid)
}

/// The capabilities ctr itself has: a privileged container cannot be given more.
fn own_capabilities() -> anyhow::Result<Vec<&'static str>> {
    let status = std::fs::read_to_string("/proc/self/status").context("cannot read /proc/self/status")?;
    let effective = status
        .lines()
        .find_map(|line| line.strip_prefix("CapEff:"))
        .and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok())
        .context("/proc/self/status names no capabilities")?;
    let names = ALL_CAPABILITIES.iter().enumerate().filter(|(number, _)| effective & (1 << number) != 0);
    Ok(names.map(|(_, name)| *name).collect())
}

/// The device at `path`, or all below it that a container may have; those of its own /dev are left out.
fn devices_in(path: &Path) -> anyhow::Result<Vec<Device>> {
    const OWN: [&str; 8] = ["pts", "shm", "fd", "mqueue", ".lxc", ".lxd-mounts", ".udev", "console"];
    let mut devices = Vec::new();
    let mut pending = vec![path.to_owned()];
    while let Some(path) = pending.pop() {
        let stat = match rustix::fs::lstat(&path) {
            Ok(stat) => stat,
            // Devices come and go while we look.
            Err(rustix::io::Errno::NOENT) if !devices.is_empty() || !pending.is_empty() => continue,
            Err(error) => return Err(error).with_context(|| format!("cannot look at {}", path.display())),
        };
        let kind = match rustix::fs::FileType::from_raw_mode(stat.st_mode) {
            rustix::fs::FileType::CharacterDevice => "c",
            rustix::fs::FileType::BlockDevice => "b",
            rustix::fs::FileType::Directory => {
                for entry in
                    std::fs::read_dir(&path).with_context(|| format!("cannot list {}", path.display()))?
                {
                    let entry = entry?;
                    if !OWN.iter().any(|own| entry.file_name() == *own) {
                        pending.push(entry.path());
                    }
                }
                continue;
            }
            _ => continue,
        };
        devices.push(Device {
            path: path.display().to_string(),
            kind: kind.into(),
            major: rustix::fs::major(stat.st_rdev).into(),
            minor: rustix::fs::minor(stat.st_rdev).into(),
            file_mode: Some(stat.st_mode & 0o7777),
            uid: Some(stat.st_uid),
            gid: Some(stat.st_gid),
        });
    }
    devices.sort_by(|a, b| a.path.cmp(&b.path));
    Ok(devices)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn images_cannot_steer_the_engine() {
        let mut config = ImageConfig::default();
        for (key, value) in [
            ("containerd.io/restart.loguri", "binary:///bin/sh"),
            ("io.containerd.image.config.stop-signal", "SIGKILL"),
            ("maintainer", "me"),
            ("", "empty"),
        ] {
            config.config.labels.insert(key.into(), value.into());
        }
        config.config.labels.insert("long".into(), "x".repeat(LABEL_LIMIT));
        config.config.stop_signal = "SIGINT".into();
        let all = container_labels(&BTreeMap::new(), &config, &["maintainer=you".into()]);
        assert_eq!(all.get("maintainer").map(String::as_str), Some("you"));
        assert_eq!(all.get(STOP_SIGNAL_LABEL).map(String::as_str), Some("SIGINT"));
        assert_eq!(all.len(), 2);
        config.config.stop_signal = "nonsense".into();
        assert_eq!(container_labels(&BTreeMap::new(), &config, &[])[STOP_SIGNAL_LABEL], "SIGTERM");
    }

    #[test]
    fn devices_are_found() {
        let null = devices_in(Path::new("/dev/null")).unwrap();
        assert_eq!((null[0].kind.as_str(), null[0].major, null[0].minor), ("c", 1, 3));
        let all = devices_in(Path::new("/dev")).unwrap();
        assert!(all.iter().any(|device| device.path == "/dev/null"));
        assert!(all.iter().all(|device| !device.path.starts_with("/dev/pts/")));
        assert!(devices_in(Path::new("/no/such/device")).is_err());
    }

    #[test]
    fn file_limits_parse() {
        let limit = parse_nofile("10:20").unwrap();
        assert_eq!((limit.soft, limit.hard), (10, 20));
        assert_eq!(parse_nofile("7").unwrap().hard, 7);
        assert!(parse_nofile("x:1").is_err());
    }
}
