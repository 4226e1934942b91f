//! Devices of vendors, by the Container Device Interface: files that say what a device changes in a container's spec.
//!
//! ```text
//! { "cdiVersion": "0.6.0", "kind": "vendor.com/class", "containerEdits": EDITS,
//!   "devices": [ { "name": NAME, "containerEdits": EDITS } ] }
//! EDITS: env, deviceNodes, netDevices, mounts, hooks, intelRdt, additionalGids
//! ```
//!
//! A device is asked for as `vendor.com/class=NAME`, in the field of its own or in annotations `cdi.k8s.io/...`. A file in a
//! later folder counts for more; two files of one folder with the same device are a conflict, and neither counts. A file that
//! cannot be used is left out, with a line in the log: it fails those alone who ask for its devices.
//!
//! Source: the CDI specification, versions 0.1.0 to 1.1.0.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, Read as _};
use std::path::{Path, PathBuf};

use oci::runtime::{Device as Node, Mount, Spec};
use oci::spec::merge_env;
use proto::runtime::v1::ContainerConfig;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::{Options, devices, host, mounts};
use crate::error::{Error, Result};

/// What annotations that ask for devices begin with.
const ANNOTATION: &str = "cdi.k8s.io/";
/// The versions that there are.
const VERSIONS: &[&str] =
    &["0.1.0", "0.2.0", "0.3.0", "0.4.0", "0.5.0", "0.6.0", "0.7.0", "0.8.0", "1.0.0", "1.1.0"];
/// When hooks run.
const HOOKS: &[&str] =
    &["prestart", "createRuntime", "createContainer", "startContainer", "poststart", "poststop"];
/// The largest file that is read, in bytes.
const FILE_MAX: u64 = 4 << 20;

/// A file.
#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct File {
    cdi_version: String,
    kind: String,
    #[serde(default)]
    #[expect(dead_code, reason = "they describe the file, and are no error")]
    annotations: Option<BTreeMap<String, String>>,
    #[serde(default)]
    container_edits: Edits,
    devices: Vec<Device>,
}

#[derive(Clone, Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Device {
    name: String,
    #[serde(default)]
    #[expect(dead_code, reason = "they describe the device, and are no error")]
    annotations: Option<BTreeMap<String, String>>,
    container_edits: Edits,
}

/// What changes in a spec.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
pub(super) struct Edits {
    env: Vec<String>,
    device_nodes: Vec<DeviceNode>,
    net_devices: Vec<NetDevice>,
    hooks: Vec<Hook>,
    mounts: Vec<Bind>,
    intel_rdt: Option<IntelRdt>,
    additional_gids: Vec<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields, default)]
struct DeviceNode {
    path: String,
    host_path: String,
    r#type: String,
    major: i64,
    minor: i64,
    file_mode: Option<u32>,
    permissions: String,
    uid: Option<u32>,
    gid: Option<u32>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct NetDevice {
    host_interface_name: String,
    name: String,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Bind {
    host_path: String,
    container_path: String,
    #[serde(default)]
    options: Vec<String>,
    #[serde(default)]
    r#type: String,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(rename_all = "camelCase", deny_unknown_fields)]
struct Hook {
    hook_name: String,
    path: String,
    #[serde(default)]
    args: Vec<String>,
    #[serde(default)]
    env: Vec<String>,
    timeout: Option<i64>,
}

#[derive(Clone, Debug, Default, PartialEq, Deserialize, Serialize)]
#[serde(deny_unknown_fields, default)]
struct IntelRdt {
    #[serde(rename = "closID", skip_serializing_if = "String::is_empty")]
    clos_id: String,
    #[serde(rename = "l3CacheSchema", skip_serializing_if = "String::is_empty")]
    l3_cache_schema: String,
    #[serde(rename = "memBwSchema", skip_serializing_if = "String::is_empty")]
    mem_bw_schema: String,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    schemata: Vec<String>,
    #[serde(rename = "enableMonitoring", skip_serializing_if = "is_false")]
    enable_monitoring: bool,
}

#[expect(clippy::trivially_copy_pass_by_ref, reason = "the signature serde calls")]
fn is_false(value: &bool) -> bool {
    !*value
}

/// What the devices change that a container asks for, their nodes looked up on this machine. Blocks.
pub(super) fn gather(container: &ContainerConfig, options: &Options) -> Result<Edits> {
    let wanted = asked(container)?;
    if wanted.is_empty() {
        return Ok(Edits::default());
    }
    if !options.enable_cdi {
        return Err(Error::failed_precondition(format!(
            "CDI devices are asked for ({}), but CDI is disabled: set enable_cdi = true",
            wanted.join(", ")
        )));
    }
    let mut edits = read(&options.cdi_spec_dirs).of(&wanted)?;
    for node in &mut edits.device_nodes {
        look_up(node)?;
    }
    Ok(edits)
}

/// The names that a container asks for, each once: those of the field first.
fn asked(container: &ContainerConfig) -> Result<Vec<String>> {
    let mut names: Vec<String> = container.cdi_devices.iter().map(|device| device.name.clone()).collect();
    for (key, value) in container.annotations.iter().filter(|(key, _)| key.starts_with(ANNOTATION)) {
        for name in value.split(',') {
            if split(name).is_none() {
                return Err(Error::invalid_argument(format!(
                    "annotation {key:?} asks for CDI device {name:?}, which is not of the form vendor/class=name"
                )));
            }
            names.push(name.to_owned());
        }
    }
    let mut seen = BTreeSet::new();
    names.retain(|name| seen.insert(name.clone()));
    Ok(names)
}

/// `vendor/class=name`, if the parts are well formed.
fn split(name: &str) -> Option<(&str, &str)> {
    let (kind, device) = name.split_once('=')?;
    (is_kind(kind) && is_device(device)).then_some((kind, device))
}

fn is_kind(kind: &str) -> bool {
    let part = |part: &str| {
        let bytes = part.as_bytes();
        bytes.first().is_some_and(u8::is_ascii_alphabetic)
            && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
            && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._-".contains(byte))
    };
    kind.split_once('/').is_some_and(|(vendor, class)| part(vendor) && part(class))
}

fn is_device(name: &str) -> bool {
    let bytes = name.as_bytes();
    bytes.first().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.last().is_some_and(u8::is_ascii_alphanumeric)
        && bytes.iter().all(|byte| byte.is_ascii_alphanumeric() || b"._-:".contains(byte))
}

/// All files that can be used, and why others cannot.
#[derive(Default)]
struct Registry {
    files: Vec<File>,
    /// A device's name, to its file and its place in there.
    devices: BTreeMap<String, (usize, usize)>,
    conflicts: BTreeMap<String, String>,
    unusable: Vec<String>,
}

fn read(folders: &[PathBuf]) -> Registry {
    let mut registry = Registry::default();
    for folder in folders {
        let mut paths: Vec<PathBuf> = match fs::read_dir(folder) {
            Ok(entries) => entries.filter_map(|entry| Some(entry.ok()?.path())).collect(),
            Err(error) => {
                if error.kind() != io::ErrorKind::NotFound {
                    registry.leave_out(folder, &error.to_string());
                }
                continue;
            }
        };
        paths.retain(|path| {
            path.extension().is_some_and(|end| end == "json" || end == "yaml") && !path.is_dir()
        });
        paths.sort();
        let mut here: BTreeMap<String, PathBuf> = BTreeMap::new();
        for path in paths {
            match read_file(&path).and_then(|bytes| parse(&bytes)) {
                Ok(file) => registry.add(file, &path, &mut here),
                Err(why) => registry.leave_out(&path, &why),
            }
        }
    }
    registry
}

impl Registry {
    fn leave_out(&mut self, path: &Path, why: &str) {
        tracing::warn!(path = %path.display(), why, "a CDI file cannot be used");
        self.unusable.push(format!("{}: {why}", path.display()));
    }

    /// `here` is what the same folder has said before.
    fn add(&mut self, file: File, path: &Path, here: &mut BTreeMap<String, PathBuf>) {
        for (at, device) in file.devices.iter().enumerate() {
            let name = format!("{}={}", file.kind, device.name);
            if let Some(other) = here.insert(name.clone(), path.to_owned()) {
                self.devices.remove(&name);
                let both = format!("{} and {}", other.display(), path.display());
                self.conflicts.insert(name, both);
            } else {
                self.conflicts.remove(&name);
                self.devices.insert(name, (self.files.len(), at));
            }
        }
        self.files.push(file);
    }

    /// What these devices change together; what their files say for all counts once, before the first of each.
    fn of(&self, names: &[String]) -> Result<Edits> {
        let mut edits = Edits::default();
        let mut seen = BTreeSet::new();
        for name in names {
            let Some((file, device)) = self.devices.get(name) else { return Err(self.missing(name)) };
            let of = &self.files[*file];
            if seen.insert(*file) {
                edits.append(&of.container_edits);
            }
            edits.append(&of.devices[*device].container_edits);
        }
        Ok(edits)
    }

    fn missing(&self, name: &str) -> Error {
        let mut why = match self.conflicts.get(name) {
            Some(both) => format!("it is described twice, in {both}"),
            None => "no file describes it".to_owned(),
        };
        if !self.unusable.is_empty() {
            why.push_str("; files that cannot be used: ");
            why.push_str(&self.unusable.join(", "));
        }
        Error::not_found(format!("CDI device {name:?} is not there: {why}"))
    }
}

fn read_file(path: &Path) -> Result<Vec<u8>, String> {
    let mut bytes = Vec::new();
    let file = fs::File::open(path).map_err(|error| error.to_string())?;
    file.take(FILE_MAX + 1).read_to_end(&mut bytes).map_err(|error| error.to_string())?;
    match bytes.len() as u64 > FILE_MAX {
        true => Err(format!("it is larger than {FILE_MAX} bytes")),
        false => Ok(bytes),
    }
}

/// A file's text, which is YAML, or JSON as a part of that.
fn parse(bytes: &[u8]) -> Result<File, String> {
    let file: File = match serde_json::from_slice(bytes) {
        Ok(file) => file,
        // One that begins as JSON is told as such what is wrong with it.
        Err(error) if bytes.trim_ascii_start().starts_with(b"{") => return Err(error.to_string()),
        Err(_) => yaml(bytes)?,
    };
    file.check()?;
    Ok(file)
}

fn yaml(bytes: &[u8]) -> Result<File, String> {
    let text = std::str::from_utf8(bytes).map_err(|error| error.to_string())?;
    serde_saphyr::from_str(text).map_err(|error| error.to_string())
}

impl File {
    fn check(&self) -> Result<(), String> {
        let version = self.cdi_version.strip_prefix('v').unwrap_or(&self.cdi_version);
        if !VERSIONS.contains(&version) {
            return Err(format!("version {:?} is not among {}", self.cdi_version, VERSIONS.join(", ")));
        }
        if !is_kind(&self.kind) {
            return Err(format!("kind {:?} is not of the form vendor/class", self.kind));
        }
        if self.devices.is_empty() {
            return Err("it has no devices".into());
        }
        self.container_edits.check()?;
        let mut names = BTreeSet::new();
        for device in &self.devices {
            if !is_device(&device.name) || !names.insert(&device.name) {
                return Err(format!("device name {:?} is malformed, or there twice", device.name));
            }
            if device.container_edits == Edits::default() {
                return Err(format!("device {:?} changes nothing", device.name));
            }
            device.container_edits.check().map_err(|why| format!("device {:?}: {why}", device.name))?;
        }
        Ok(())
    }
}

impl Edits {
    fn check(&self) -> Result<(), String> {
        let env = |env: &[String]| match env.iter().find(|entry| entry.find('=').unwrap_or_default() == 0) {
            Some(entry) => Err(format!("environment entry {entry:?} is not NAME=VALUE")),
            None => Ok(()),
        };
        env(&self.env)?;
        for node in &self.device_nodes {
            let access = node.permissions.as_str();
            if node.path.is_empty() || !["", "b", "c", "u", "p"].contains(&node.r#type.as_str()) {
                return Err(format!(
                    "device node {:?} has no path, or a type that does not exist",
                    node.path
                ));
            }
            if access != "none" && !access.bytes().all(|byte| b"rwm".contains(&byte)) {
                return Err(format!("device node {:?} has permissions {access:?}", node.path));
            }
        }
        for hook in &self.hooks {
            if !HOOKS.contains(&hook.hook_name.as_str()) || hook.path.is_empty() {
                return Err(format!("hook {:?} does not exist, or has no path", hook.hook_name));
            }
            env(&hook.env)?;
        }
        if self.mounts.iter().any(|mount| mount.host_path.is_empty() || mount.container_path.is_empty()) {
            return Err("a mount has no path".into());
        }
        let (mut inside, mut outside) = (BTreeSet::new(), BTreeSet::new());
        for device in &self.net_devices {
            let empty = device.name.is_empty() || device.host_interface_name.is_empty();
            if empty || !inside.insert(&device.name) || !outside.insert(&device.host_interface_name) {
                return Err("a network device has no name, or one that is there twice".into());
            }
        }
        let closed = self.intel_rdt.as_ref().map_or("", |rdt| &rdt.clos_id);
        if closed != "/" && (matches!(closed, "." | "..") || closed.contains(['/', '\n'])) {
            return Err(format!("closID {closed:?} is no file's name"));
        }
        Ok(())
    }

    fn append(&mut self, other: &Edits) {
        let Edits { env, device_nodes, net_devices, hooks, mounts, intel_rdt, additional_gids } =
            other.clone();
        self.env.extend(env);
        self.device_nodes.extend(device_nodes);
        self.net_devices.extend(net_devices);
        self.hooks.extend(hooks);
        self.mounts.extend(mounts);
        self.intel_rdt = intel_rdt.or(self.intel_rdt.take());
        self.additional_gids.extend(additional_gids);
    }

    /// Changes a spec, as the last of all that does.
    pub(super) fn apply(&self, spec: &mut Spec) {
        if *self == Edits::default() {
            return;
        }
        let process = spec.process_mut();
        process.env = merge_env(&process.env, &self.env);
        for gid in self.additional_gids.iter().filter(|gid| **gid != 0) {
            if !process.user.additional_gids.contains(gid) {
                process.user.additional_gids.push(*gid);
            }
        }
        let of_process = |id: u32| Some(id).filter(|id| *id != 0);
        let (uid, gid) = (of_process(process.user.uid), of_process(process.user.gid));
        for node in &self.device_nodes {
            let device = Node {
                path: node.path.clone(),
                kind: node.r#type.clone(),
                major: node.major,
                minor: node.minor,
                file_mode: node.file_mode,
                uid: node.uid.or(uid),
                gid: node.gid.or(gid),
            };
            let access = match node.permissions.as_str() {
                "" => "rwm",
                "none" => "",
                access => access,
            };
            devices::put(spec, device, access);
        }
        self.mount(spec);
        for hook in &self.hooks {
            let hooks = spec.extra.entry("hooks").or_insert_with(|| json!({}));
            let mut made = json!({"path": hook.path});
            for (key, list) in [("args", &hook.args), ("env", &hook.env)] {
                if !list.is_empty() {
                    made[key] = json!(list);
                }
            }
            if let Some(timeout) = hook.timeout {
                made["timeout"] = timeout.into();
            }
            match &mut hooks[&hook.hook_name] {
                Value::Array(list) => list.push(made),
                none => *none = json!([made]),
            }
        }
        let linux = spec.linux_mut();
        if let Some(rdt) = &self.intel_rdt {
            linux.extra.insert("intelRdt".into(), json!(rdt));
        }
        for device in &self.net_devices {
            let devices = linux.extra.entry("netDevices").or_insert_with(|| json!({}));
            devices[&device.host_interface_name] = json!({"name": device.name});
        }
    }

    fn mount(&self, spec: &mut Spec) {
        if self.mounts.is_empty() {
            return;
        }
        let users = spec.linux_mut().namespaces.iter().any(|namespace| namespace.kind == "user");
        for bind in &self.mounts {
            let mut made = Mount {
                destination: bind.container_path.clone(),
                kind: bind.r#type.clone(),
                source: bind.host_path.clone(),
                options: bind.options.clone(),
                ..Mount::default()
            };
            if users {
                add_idmap(&mut made);
            }
            spec.mounts.retain(|old| old.destination != made.destination);
            spec.mounts.push(made);
        }
        spec.mounts.sort_by_key(|mount| mounts::parts(&mount.destination));
    }
}

/// Its files are to be the container's users'.
fn add_idmap(mount: &mut Mount) {
    let has = |name: &str| mount.options.iter().any(|option| option == name);
    if has("idmap") || has("ridmap") {
        return;
    }
    let option = match () {
        () if has("rbind") => "ridmap",
        () if has("bind") || mount.kind == "bind" => "idmap",
        () => return,
    };
    mount.options.push(option.into());
}

/// Fills in what a file leaves to the machine: a device is described by its type and numbers, or by its path alone.
fn look_up(node: &mut DeviceNode) -> Result<()> {
    let described = !node.r#type.is_empty() && (node.major != 0 || node.r#type == "p");
    let path = if node.host_path.is_empty() { &node.path } else { &node.host_path };
    let found = match host::node_at(Path::new(path), Path::new(&node.path)) {
        Ok(Some(found)) => found,
        _ if described => return Ok(()),
        Ok(None) => {
            return Err(Error::failed_precondition(format!("CDI device node {path:?} is not a device")));
        }
        Err(error) => return Err(Error::io("look at the CDI device node", path, &error)),
    };
    node.file_mode = node.file_mode.or(found.file_mode);
    if described {
        return Ok(());
    }
    if node.r#type.is_empty() {
        node.r#type = found.kind.clone();
    }
    if node.r#type != found.kind {
        return Err(Error::failed_precondition(format!(
            "CDI device node {path:?} is said to be of type {:?}, and is of type {:?}",
            node.r#type, found.kind
        )));
    }
    if node.r#type != "p" && node.major == 0 {
        (node.major, node.minor) = (found.major, found.minor);
    }
    Ok(())
}

/// A file: what is accepted can be asked for by name, and changes a spec into one that is read as the same.
#[cfg(any(test, fuzzing))]
pub fn fuzz(data: &[u8]) {
    let Ok(file) = parse(data) else { return };
    assert!(!file.devices.is_empty());
    let names: Vec<String> =
        file.devices.iter().map(|device| format!("{}={}", file.kind, device.name)).collect();
    for name in &names {
        assert_eq!(split(name).map(|(kind, _)| kind), Some(file.kind.as_str()), "{name:?}");
    }
    let mut registry = Registry::default();
    registry.add(file, Path::new("/etc/cdi/x.json"), &mut BTreeMap::new());
    let edits = registry.of(&names).expect("devices that are there");
    let mut spec = Spec::default();
    edits.apply(&mut spec);
    let written = serde_json::to_vec(&spec).expect("a spec can be written");
    let again: Spec = serde_json::from_slice(&written).expect("what was written can be read");
    assert_eq!(serde_json::to_vec(&again).expect("a spec can be written"), written);
    assert!(spec.process_mut().env.iter().all(|entry| entry.find('=').is_some_and(|at| at > 0)));
}

#[cfg(test)]
mod tests {
    use proto::runtime::v1::CdiDevice;

    use super::*;

    const GPU: &str = r#"{"cdiVersion":"0.6.0","kind":"vendor.com/gpu","annotations":{"a":"b"},
        "containerEdits":{"env":["ALL=1"],"additionalGids":[44,0],"hooks":[{"hookName":"createContainer","path":"/bin/h","args":["h","x"],"timeout":3}]},
        "devices":[
          {"name":"0","containerEdits":{"deviceNodes":[{"path":"/dev/gpu0","hostPath":"/dev/null","permissions":"rw"}],"env":["ONE=1"]}},
          {"name":"1","containerEdits":{"mounts":[{"hostPath":"/lib","containerPath":"/gpu/lib","options":["ro","rbind"]}],
            "intelRdt":{"closID":"c"},"netDevices":[{"hostInterfaceName":"eth9","name":"net1"}]}}]}"#;

    fn wanted(names: &[&str]) -> ContainerConfig {
        let cdi_devices = names.iter().map(|name| CdiDevice { name: (*name).to_owned() }).collect();
        ContainerConfig { cdi_devices, ..ContainerConfig::default() }
    }

    fn options(folders: &[&Path]) -> Options {
        Options { cdi_spec_dirs: folders.iter().map(PathBuf::from).collect(), ..Options::default() }
    }

    #[test]
    fn devices_change_the_spec() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("gpu.json"), GPU).unwrap();
        fs::write(folder.path().join("notes.txt"), "not a file of ours").unwrap();
        let mut container = wanted(&["vendor.com/gpu=0", "vendor.com/gpu=0"]);
        container.annotations.insert("cdi.k8s.io/x".into(), "vendor.com/gpu=1,vendor.com/gpu=0".into());
        let edits = gather(&container, &options(&[folder.path(), Path::new("/not/there")])).unwrap();
        let mut spec = Spec::linux("n", "i");
        spec.process_mut().user.gid = 7;
        edits.apply(&mut spec);
        let json = serde_json::to_value(&spec).unwrap();
        assert_eq!(json["process"]["env"], json!(["ALL=1", "ONE=1"]));
        assert_eq!(json["process"]["user"]["additionalGids"], json!([44]));
        assert_eq!(
            json["linux"]["devices"],
            json!([{"path":"/dev/gpu0","type":"c","major":1,"minor":3,"fileMode":438,"gid":7}])
        );
        let rules = json["linux"]["resources"]["devices"].as_array().unwrap();
        assert_eq!(rules[1], json!({"allow":true,"type":"c","major":1,"minor":3,"access":"rw"}));
        assert_eq!(
            json["hooks"],
            json!({"createContainer":[{"path":"/bin/h","args":["h","x"],"timeout":3}]})
        );
        let bound =
            json["mounts"].as_array().unwrap().iter().find(|mount| mount["source"] == "/lib").unwrap();
        assert_eq!(bound["options"], json!(["ro", "rbind"]));
        assert_eq!(json["linux"]["intelRdt"], json!({"closID":"c"}));
        assert_eq!(json["linux"]["netDevices"], json!({"eth9":{"name":"net1"}}));
    }

    /// As NVIDIA's and Intel's tools write them.
    const YAML: &str = r#"---
cdiVersion: "0.5.0"
kind: vendor.com/gpu
containerEdits:
  env:
  - ALL=1
  hooks:
  - hookName: createContainer
    path: /usr/bin/hook
    args:
    - hook
    - --link
    - lib.so.1::/usr/lib/lib.so
devices:
- name: all
  containerEdits:
    deviceNodes:
    - path: /dev/zero
      major: 1
      type: c
    - path: /dev/null
- name: "0"
  containerEdits: {env: ["ONE=0"]}
"#;

    #[test]
    fn files_may_be_yaml() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("gpu.yaml"), YAML).unwrap();
        let edits = gather(&wanted(&["vendor.com/gpu=all"]), &options(&[folder.path()])).unwrap();
        assert_eq!(edits.env, ["ALL=1"]);
        assert_eq!(edits.hooks[0].args, ["hook", "--link", "lib.so.1::/usr/lib/lib.so"]);
        let nodes: Vec<_> = edits.device_nodes.iter().map(|node| (node.path.as_str(), node.minor)).collect();
        assert_eq!(nodes, [("/dev/zero", 0), ("/dev/null", 3)]);
        assert!(parse(YAML.replace("kind:", "kinds:").as_bytes()).is_err(), "what is not known is refused");
        assert!(parse(YAML.replace("  env:", "\tenv:").as_bytes()).is_err());
        // Aliases that blow up are refused, not expanded.
        let mut bomb = String::from("a: &a [x,x,x,x,x,x,x,x,x]\n");
        for level in b'b'..=b'j' {
            let (name, before) = (level as char, (level - 1) as char);
            bomb.push_str(&format!("{name}: &{name} [{}]\n", vec![format!("*{before}"); 9].join(",")));
        }
        assert!(parse(bomb.as_bytes()).is_err());
    }

    #[test]
    fn a_later_folder_counts_and_a_conflict_in_one_does_not() {
        let (first, second) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let file = |env: &str| {
            format!(
                r#"{{"cdiVersion":"0.3.0","kind":"v.org/c","devices":[{{"name":"d","containerEdits":{{"env":["{env}"]}}}}]}}"#
            )
        };
        fs::write(first.path().join("a.json"), file("A=first")).unwrap();
        fs::write(second.path().join("a.json"), file("A=second")).unwrap();
        let options = options(&[first.path(), second.path()]);
        let edits = gather(&wanted(&["v.org/c=d"]), &options).unwrap();
        assert_eq!(edits.env, ["A=second"]);
        fs::write(second.path().join("b.json"), file("A=other")).unwrap();
        let error = gather(&wanted(&["v.org/c=d"]), &options).unwrap_err();
        assert!(error.to_string().contains("described twice"), "{error}");
    }

    #[test]
    fn what_cannot_be_used_fails_who_asks_for_it() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join("good.json"), GPU).unwrap();
        fs::write(folder.path().join("bad.json"), GPU.replace("0.6.0", "9.9.9")).unwrap();
        let options = options(&[folder.path()]);
        assert!(gather(&wanted(&["vendor.com/gpu=1"]), &options).is_ok());
        let error = gather(&wanted(&["vendor.com/gpu=7"]), &options).unwrap_err();
        assert!(matches!(error, Error::NotFound(_)), "{error}");
        assert!(error.to_string().contains("bad.json") && error.to_string().contains("9.9.9"), "{error}");
        let none = Options { enable_cdi: false, ..options };
        assert!(matches!(gather(&wanted(&["a/b=c"]), &none), Err(Error::FailedPrecondition(_))));
        assert!(gather(&wanted(&[]), &none).is_ok());
    }

    #[test]
    fn malformed_files_and_names_are_refused() {
        for (from, to) in [
            ("vendor.com/gpu", "vendor"),
            (r#""name":"0""#, r#""name":"-""#),
            (r#""name":"0""#, r#""name":"1""#),
            ("ALL=1", "ALL"),
            (r#""rw""#, r#""rwx""#),
            ("createContainer", "never"),
            (r#""env":["ONE=1"]"#, r#""more":1"#),
            (r#""closID":"c""#, r#""closID":"..""#),
        ] {
            assert!(parse(GPU.replacen(from, to, 1).as_bytes()).is_err(), "{to}");
        }
        assert!(parse(b"").is_err() && parse(b"[]").is_err() && parse(b"null").is_err());
        for name in ["a/b=c", "vendor.com/net-x=eth0:1"] {
            assert!(split(name).is_some(), "{name}");
        }
        for name in ["", "c", "b=c", "/b=c", "a/=c", "a/b=", "a/b=c d", "1a/b=c", "a/b=-"] {
            assert!(split(name).is_none(), "{name}");
        }
        let mut container = ContainerConfig::default();
        container.annotations.insert("cdi.k8s.io/x".into(), "gpu".into());
        assert!(matches!(asked(&container), Err(Error::InvalidArgument(_))));
    }

    #[test]
    fn nodes_are_looked_up_unless_described() {
        let node = |text: Value| -> Result<DeviceNode> {
            let mut node: DeviceNode = serde_json::from_value(text).unwrap();
            look_up(&mut node)?;
            Ok(node)
        };
        let found = node(json!({"path":"/dev/zero"})).unwrap();
        assert_eq!((found.r#type.as_str(), found.major, found.minor), ("c", 1, 5));
        let told = node(json!({"path":"/dev/none","type":"b","major":9,"minor":8})).unwrap();
        assert_eq!((told.major, told.minor, told.file_mode), (9, 8, None));
        assert!(node(json!({"path":"/dev/none"})).is_err());
        assert!(node(json!({"path":"/dev/zero","type":"b"})).is_err());
        assert!(node(json!({"path":"/etc/passwd"})).is_err());
    }
}
