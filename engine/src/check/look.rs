//! Looking at the machine: what there is of records, files, mounts, control groups and processes. Changes nothing.
//!
//! Invariant: what goes away while it is looked at, as a container that ends does, is as if it had not been there; what cannot be
//! looked at for another reason ends the look.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::OsStr;
use std::fs;
use std::io::{self, Read as _};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use oci::Digest;
use oci::image::{Index, Kind, MANIFEST_LIMIT, Manifest, kind_of};
use proto::containerd::services::containers::v1::Container;
use proto::containerd::services::images::v1::Image;
use proto::containerd::types::Sandbox;
use serde::Deserialize;

use super::judge::may_be_bundle;
use super::world::{
    Bundle, Content, Document, End, Group, MountPoint, Of, Pods, RuntimeState, Shim, Socket, Unread, World,
};
use crate::config::Config;
use crate::context::Namespace;
use crate::cri::NAMESPACE as PODS;
use crate::metadata::Read as _;
use crate::metadata::content::BlobRecord;
use crate::metadata::cri::{PodContainerRecord, PodRecord};
use crate::metadata::namespaces::NamespaceRecord;
use crate::metadata::offline::Offline;
use crate::tasks::bundle::{self, Bundles};
use crate::tasks::launch::{is_served, socket_of};
use crate::{content, events, mounts};

/// Where the runtime keeps its state unless a container's options say otherwise.
const RUNTIME_ROOT: &str = "/run/containerd/runc";
/// Where control groups are.
const GROUPS: &str = "/sys/fs/cgroup";
/// Where libcni has what is attached.
const ATTACHED: &str = "/var/lib/cni/results";
/// Containers that share a shim say so by one of these.
const GROUP_ANNOTATIONS: [&str; 2] = ["io.containerd.runc.v2.group", "io.kubernetes.cri.sandbox-id"];
/// The largest document of another program that is read, in bytes.
const DOCUMENT_MAX: u64 = 16 << 20;

/// Looks at everything.
pub(super) fn look(config: &Config, offline: &Offline) -> anyhow::Result<World> {
    let real = |path: &Path| path.canonicalize().unwrap_or_else(|_| path.to_owned());
    let view = offline.view();
    let mut world = World {
        root: real(&config.root),
        state: real(&config.state),
        given_state: config.state.clone(),
        broken: offline.broken(),
        content: Content { elsewhere: config.content.is_some(), ..Content::default() },
        proxies: config.snapshotters.iter().map(|plugin| plugin.name.clone()).collect(),
        ..World::empty(view)
    };
    look_at_content(&mut world)?;
    for name in snapshotter::NAMES {
        let root = world.root.join(format!("io.containerd.snapshotter.v1.{name}"));
        match snapshotter::inspect(name, &root) {
            Ok(None) => {}
            Ok(Some(stored)) => drop(world.snapshotters.insert(name.to_owned(), Ok(stored))),
            Err(error) => drop(world.snapshotters.insert(name.to_owned(), Err(error.to_string()))),
        }
    }
    // Before the mounts and processes in them, which may end with them.
    look_at_mounts(&mut world)?;
    look_at_shims(&mut world, &config.grpc.path)?;
    look_at_bundles(&mut world)?;
    look_at_runtimes(&mut world)?;
    let known = known(&world);
    look_at_groups(&mut world, &known);
    look_at_sockets(&mut world, &config.grpc.path, known);
    look_at_pods(&mut world)?;
    Ok(world)
}

/// The names in a folder, sorted; none where there is no folder.
fn names(folder: &Path) -> anyhow::Result<Vec<String>> {
    let gone =
        |error: &io::Error| matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory);
    let entries = match fs::read_dir(folder) {
        Err(error) if gone(&error) => return Ok(Vec::new()),
        entries => entries.with_context(|| format!("cannot list {}", folder.display()))?,
    };
    let mut names = Vec::new();
    for entry in entries {
        let entry = entry.with_context(|| format!("cannot list {}", folder.display()))?;
        names.push(entry.file_name().to_string_lossy().into_owned());
    }
    names.sort();
    Ok(names)
}

/// A small file of another program; None when there is none.
fn small(path: &Path) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(DOCUMENT_MAX).read_to_end(&mut bytes).ok()?;
    Some(bytes)
}

fn look_at_content(world: &mut World) -> anyhow::Result<()> {
    let root = world.root.join(content::FOLDER);
    let blobs = root.join("blobs");
    for algorithm in names(&blobs)? {
        let folder = blobs.join(&algorithm);
        if !folder.is_dir() {
            world.content.strays.push(folder);
            continue;
        }
        for hex in names(&folder)? {
            let path = folder.join(&hex);
            match format!("{algorithm}:{hex}").parse::<Digest>() {
                Ok(digest) => {
                    let metadata = match fs::symlink_metadata(&path) {
                        Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                        metadata => metadata.with_context(|| format!("cannot look at {}", path.display()))?,
                    };
                    let size = metadata.is_file().then_some(metadata.len());
                    world.content.blobs.insert(digest.to_string(), size);
                }
                Err(_) => world.content.strays.push(path),
            }
        }
    }
    for folder in names(&root.join("ingest"))? {
        let data = root.join("ingest").join(&folder).join("data").is_file();
        world.content.ingests.insert(folder, data);
    }
    world.content.removed = names(&root.join("removed"))?.len();
    if world.content.elsewhere {
        return Ok(());
    }
    let mut todo = Vec::new();
    for (parts, image) in world.view.list::<Image>(&[]) {
        let digest = image.target.and_then(|target| target.digest.parse::<Digest>().ok());
        todo.extend(parts.into_iter().next().zip(digest));
    }
    while let Some((namespace, digest)) = todo.pop() {
        if world.content.documents.contains_key(&digest) {
            continue;
        }
        let record = world.view.get::<BlobRecord>(&[&namespace, digest.as_str()]).ok().flatten();
        let size = world.content.blobs.get(digest.as_str()).copied().flatten();
        let Some(size) = record.and(size).filter(|size| *size <= MANIFEST_LIMIT) else { continue };
        let path = blob_path(&root, &digest);
        let mut bytes = Vec::new();
        fs::File::open(&path)
            .and_then(|file| file.take(size).read_to_end(&mut bytes))
            .with_context(|| format!("cannot read {}", path.display()))?;
        let document = read_document(&digest, &bytes);
        match &document {
            Ok(Document::Index(index)) => {
                todo.extend(index.manifests.iter().map(|of| (namespace.clone(), of.digest.clone())));
            }
            Ok(Document::Manifest(_) | Document::Other) | Err(_) => {}
        }
        world.content.documents.insert(digest, document);
    }
    Ok(())
}

/// Where a blob's file is, beneath the folder of the content store.
pub(super) fn blob_path(root: &Path, digest: &Digest) -> PathBuf {
    root.join("blobs").join(digest.algorithm().as_str()).join(digest.hex())
}

fn read_document(digest: &Digest, bytes: &[u8]) -> Result<Document, Unread> {
    let mut hasher = digest.algorithm().hasher();
    hasher.update(bytes);
    let found = hasher.finish();
    if found != *digest {
        return Err(Unread::Damaged(format!("its bytes have the digest {found}")));
    }
    let wrong = |error: oci::image::ImageError| Unread::Wrong(error.to_string());
    Ok(match kind_of(bytes) {
        Ok(Kind::Index) => Document::Index(Index::parse(bytes).map_err(wrong)?),
        Ok(Kind::Manifest) => Document::Manifest(Box::new(Manifest::parse(bytes).map_err(wrong)?)),
        // An image may be of anything.
        Err(_) => Document::Other,
    })
}

fn look_at_mounts(world: &mut World) -> anyhow::Result<()> {
    let table = sys::mount::table().context("cannot read the table of mounts")?;
    let ours = |path: &Path| path.starts_with(&world.root) || path.starts_with(&world.state);
    for mount in table {
        if ours(&mount.point) {
            let source = mount.source.to_string_lossy().into_owned();
            world.mounts.push(MountPoint { at: mount.point, source });
        }
    }
    let mut loops = Vec::new();
    for name in names(Path::new("/sys/block"))? {
        let device = Path::new("/dev").join(&name);
        let file =
            fs::read(Path::new("/sys/block").join(&name).join("loop/backing_file")).unwrap_or_default();
        let file = PathBuf::from(OsStr::from_bytes(file.trim_ascii_end()));
        if !file.as_os_str().is_empty() && ours(&file) {
            loops.push((device, file));
        }
    }
    world.loops = loops;
    let targets = world.state.join(mounts::FOLDER).join("t");
    world.activations = names(&targets)?;
    for folder in &world.activations {
        for point in names(&targets.join(folder))? {
            world.linked.extend(fs::read_link(targets.join(folder).join(point)));
        }
    }
    Ok(())
}

fn look_at_bundles(world: &mut World) -> anyhow::Result<()> {
    for (of, kind) in [(Of::Container, bundle::Of::Container), (Of::Sandbox, bundle::Of::Sandbox)] {
        let bundles = Bundles::new(kind, &world.root, &world.state);
        for namespace in names(&bundles.state)? {
            let folder = bundles.state.join(&namespace);
            if !folder.is_dir() {
                world.no_bundles.push(folder);
                continue;
            }
            for id in names(&folder)? {
                let path = folder.join(&id);
                let (true, true, Ok(checked)) =
                    (may_be_bundle(&namespace, &id), path.is_dir(), Namespace::new(&namespace))
                else {
                    if path.symlink_metadata().is_ok() {
                        world.no_bundles.push(path);
                    }
                    continue;
                };
                let bundle = bundles.bundle(&checked, &id);
                let address = bundle.shim_address().ok().map(|answer| answer.address);
                let socket = address
                    .and_then(|address| shim_api::transport::socket_path(&address).ok().map(Path::to_owned));
                let served = socket.as_deref().is_some_and(is_served);
                let end = bundle.end().map(|end| match end {
                    bundle::End::Dead(_) => End::Dead,
                    bundle::End::Deleted => End::Deleted,
                });
                world.bundles.push(Bundle {
                    of,
                    namespace: namespace.clone(),
                    id,
                    path,
                    end,
                    socket,
                    served,
                });
            }
        }
        for namespace in names(&bundles.work)? {
            for id in names(&bundles.work.join(&namespace))? {
                world.work.push((of, namespace.clone(), id));
            }
        }
    }
    Ok(())
}

/// A process's command line.
pub(super) fn command_line(pid: u32) -> Vec<String> {
    let bytes = fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
    let parts = bytes.split(|byte| *byte == 0).map(|part| String::from_utf8_lossy(part).into_owned());
    parts.filter(|part| !part.is_empty()).collect()
}

/// When a process was started, in ticks since the boot; None when it is gone.
pub(super) fn started(pid: u32) -> Option<u64> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The name, in parentheses, may hold anything.
    stat.rsplit_once(')')?.1.split_whitespace().nth(19)?.parse().ok()
}

fn look_at_shims(world: &mut World, address: &Path) -> anyhow::Result<()> {
    let folders = [bundle::Of::Container, bundle::Of::Sandbox].map(|of| world.state.join(of.folder()));
    for name in names(Path::new("/proc"))? {
        let Ok(pid) = name.parse::<u32>() else { continue };
        // Someone else's, or gone.
        let Ok(cwd) = fs::read_link(format!("/proc/{pid}/cwd")) else { continue };
        let text = cwd.to_string_lossy();
        let (path, gone) = match text.strip_suffix(" (deleted)") {
            Some(path) => (PathBuf::from(path), true),
            None => (cwd.clone(), false),
        };
        let Some(rest) = folders.iter().find_map(|folder| path.strip_prefix(folder).ok()) else { continue };
        let parts: Vec<String> = rest.iter().map(|part| part.to_string_lossy().into_owned()).collect();
        let [namespace, id] = &parts[..] else { continue };
        let arguments = command_line(pid);
        let says = |name: &str, value: &str| {
            arguments.windows(2).any(|pair| pair[0].trim_start_matches('-') == name && pair[1] == value)
        };
        let action = arguments.last().map(String::as_str);
        let is_shim = says("address", &address.display().to_string())
            && says("namespace", namespace)
            && !matches!(action, Some("start" | "delete"));
        let is_init = arguments.get(1).is_some_and(|argument| argument == "sandbox-init");
        let (true, Some(started)) = (is_shim || is_init, started(pid)) else { continue };
        let (bound, mut sockets) = (bound(pid), BTreeSet::new());
        for descriptor in names(Path::new(&format!("/proc/{pid}/fd"))).unwrap_or_default() {
            let Ok(target) = fs::read_link(format!("/proc/{pid}/fd/{descriptor}")) else { continue };
            let target = target.to_string_lossy();
            let inode = target.strip_prefix("socket:[").and_then(|rest| rest.strip_suffix(']'));
            sockets.extend(inode.and_then(|inode| bound.get(inode)).cloned());
        }
        let id = id.strip_prefix('.').unwrap_or(id).to_owned();
        let bundle = (!gone).then_some(path);
        world.shims.push(Shim { pid, started, namespace: namespace.clone(), id, bundle, sockets });
    }
    Ok(())
}

/// Where the unix sockets of a process's network are bound, by inode.
fn bound(pid: u32) -> BTreeMap<String, PathBuf> {
    let table = fs::read(format!("/proc/{pid}/net/unix")).unwrap_or_default();
    let mut found = BTreeMap::new();
    for line in String::from_utf8_lossy(&table).lines().skip(1) {
        // Num RefCount Protocol Flags Type St Inode Path
        let mut fields = line.split_whitespace().skip(6);
        if let (Some(inode), Some(path)) = (fields.next(), fields.next()) {
            found.insert(inode.to_owned(), PathBuf::from(path));
        }
    }
    found
}

fn look_at_runtimes(world: &mut World) -> anyhow::Result<()> {
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Options {
        root: String,
    }
    #[derive(Deserialize)]
    struct State {
        config: StateConfig,
    }
    #[derive(Deserialize)]
    struct StateConfig {
        #[serde(default)]
        labels: Vec<String>,
    }
    let mut roots = BTreeSet::from([PathBuf::from(RUNTIME_ROOT)]);
    for bundle in &world.bundles {
        let options: Options = small(&bundle.path.join("options.json"))
            .and_then(|bytes| serde_json::from_slice(&bytes).ok())
            .unwrap_or_default();
        roots.extend(Some(PathBuf::from(options.root)).filter(|root| root.is_absolute()));
    }
    let folder = world.state.join(bundle::Of::Container.folder());
    for root in roots {
        for namespace in names(&root)? {
            let root = root.join(&namespace);
            for id in names(&root)? {
                let state = small(&root.join(&id).join("state.json"))
                    .and_then(|bytes| serde_json::from_slice::<State>(&bytes).ok());
                let labels = state.map(|state| state.config.labels).unwrap_or_default();
                let bundle = labels.iter().find_map(|label| label.strip_prefix("bundle="));
                let Some(bundle) = bundle.map(|path| world.real(Path::new(path))) else { continue };
                // Only what was made from one of our bundles is ours.
                if bundle.starts_with(&folder) {
                    let (root, namespace) = (root.clone(), namespace.clone());
                    world.runtimes.push(RuntimeState { root, namespace, id, bundle });
                }
            }
        }
    }
    Ok(())
}

fn look_at_groups(world: &mut World, known: &BTreeSet<(String, String)>) {
    let mut hierarchies = vec![PathBuf::from(GROUPS)];
    for name in names(Path::new(GROUPS)).unwrap_or_default() {
        let path = Path::new(GROUPS).join(name);
        // Links are other names of the same.
        if path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir()) {
            hierarchies.push(path);
        }
    }
    let mut namespaces: BTreeSet<String> =
        world.view.keys::<NamespaceRecord>(&[]).into_iter().map(|parts| parts.concat()).collect();
    namespaces.extend(world.bundles.iter().map(|bundle| bundle.namespace.clone()));
    // systemd's, by whatever chance a namespace is called so.
    namespaces.retain(|name| ![".slice", ".scope", ".service"].iter().any(|end| name.ends_with(end)));
    let mut parents: BTreeSet<(String, PathBuf)> =
        namespaces.into_iter().map(|namespace| (namespace.clone(), PathBuf::from(namespace))).collect();
    for (_, pod) in world.view.list::<PodRecord>(&[PODS]) {
        let parent = pod.config.and_then(|config| config.linux).map(|linux| linux.cgroup_parent);
        let parent = parent.filter(|parent| parent.starts_with('/') && parent.len() > 1);
        parents.extend(parent.map(|parent| (PODS.to_owned(), PathBuf::from(parent.trim_start_matches('/')))));
    }
    let mut found: BTreeMap<(String, String), Vec<PathBuf>> = BTreeMap::new();
    for (namespace, parent) in parents {
        let of_pods = Path::new(&namespace) != parent;
        for hierarchy in &hierarchies {
            let folder = hierarchy.join(&parent);
            for id in names(&folder).unwrap_or_default() {
                let path = folder.join(&id);
                // Beside the kubelet's own groups, those of containers are called by their ids.
                let ours = !of_pods || (id.len() == 64 && id.bytes().all(|byte| byte.is_ascii_hexdigit()));
                if ours && may_be_bundle(&namespace, &id) && path.is_dir() {
                    found.entry((namespace.clone(), id)).or_default().push(path);
                }
            }
        }
    }
    // Another engine may have a namespace of the same name.
    found.retain(|of, _| known.contains(of));
    for ((namespace, id), folders) in found {
        let used = folders.iter().any(|folder| has_process(folder));
        world.groups.push(Group { namespace, id, folders, used });
    }
}

/// Whether a process is in a control group, or in one beneath it.
pub(super) fn has_process(folder: &Path) -> bool {
    let own = fs::read(folder.join("cgroup.procs")).is_ok_and(|text| !text.is_empty());
    let beneath = || groups_in(folder).iter().any(|folder| has_process(folder));
    own || beneath()
}

/// The groups in a group.
pub(super) fn groups_in(folder: &Path) -> Vec<PathBuf> {
    let paths = names(folder).unwrap_or_default().into_iter().map(|name| folder.join(name));
    paths.filter(|path| path.symlink_metadata().is_ok_and(|metadata| metadata.is_dir())).collect()
}

fn look_at_sockets(world: &mut World, address: &Path, known: BTreeSet<(String, String)>) {
    for (namespace, group) in known {
        let path = socket_of(address, &namespace, &group);
        if path.exists() {
            let served = is_served(&path);
            world.sockets.insert(path, Socket { namespace, id: group, served });
        }
    }
}

/// The containers, sandboxes and groups of such that there are, or have been, with their namespaces: as records, folders and
/// the journal of events know them.
fn known(world: &World) -> BTreeSet<(String, String)> {
    let view = &world.view;
    #[derive(Default, Deserialize)]
    #[serde(default)]
    struct Spec {
        annotations: BTreeMap<String, String>,
    }
    let mut groups = events::mentioned(&world.root);
    for (parts, container) in view.list::<Container>(&[]) {
        let [namespace, _] = &parts[..] else { continue };
        let spec = container
            .spec
            .and_then(|any| serde_json::from_slice::<Spec>(&any.value).ok())
            .unwrap_or_default();
        let group = GROUP_ANNOTATIONS.iter().find_map(|name| spec.annotations.get(*name));
        groups.extend(group.map(|group| (namespace.clone(), group.clone())));
    }
    let mut keys = view.keys::<Container>(&[]);
    keys.extend(view.keys::<Sandbox>(&[]));
    keys.extend(view.keys::<PodRecord>(&[]));
    keys.extend(view.keys::<PodContainerRecord>(&[]));
    groups.extend(
        keys.into_iter()
            .filter_map(|parts| <[String; 2]>::try_from(parts).ok())
            .map(<(String, String)>::from),
    );
    let bundles =
        world.bundles.iter().map(|of| (of.namespace.clone(), of.id.trim_start_matches('.').to_owned()));
    groups.extend(bundles);
    groups.extend(world.runtimes.iter().map(|of| (of.namespace.clone(), of.id.clone())));
    groups.extend(world.shims.iter().map(|of| (of.namespace.clone(), of.id.clone())));
    groups.extend(world.work.iter().map(|(_, namespace, id)| (namespace.clone(), id.clone())));
    groups
}

fn look_at_pods(world: &mut World) -> anyhow::Result<()> {
    #[derive(Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Attached {
        #[serde(default)]
        container_id: String,
        #[serde(default)]
        owner: String,
    }
    let state = world.state.join("cri");
    let mut pods = Pods {
        folders: names(&state.join("pods"))?,
        namespaces: names(&state.join("netns"))?,
        containers: names(&world.root.join("cri/containers"))?,
        streams: names(&state.join("streams"))?,
        execs: names(&state.join("execs"))?,
        looks: names(&state.join("mounts"))?,
        attached: Vec::new(),
    };
    let Ok(identity) = fs::read_to_string(world.root.join("uuid")) else {
        world.pods = pods;
        return Ok(());
    };
    let owner = format!("gantry {}", identity.trim());
    for name in names(Path::new(ATTACHED))? {
        let file = Path::new(ATTACHED).join(name);
        let attached = small(&file).and_then(|bytes| serde_json::from_slice::<Attached>(&bytes).ok());
        // What others attached is theirs.
        if let Some(attached) = attached.filter(|attached| attached.owner == owner) {
            pods.attached.push((attached.container_id, file));
        }
    }
    world.pods = pods;
    Ok(())
}
