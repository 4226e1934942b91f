//! Runtime handlers: what their runtimes can do, and what the kubelet is told of that and of the engine.

use std::sync::Arc;

use proto::runtime::v1::{
    CgroupDriver, LinuxRuntimeConfiguration, RuntimeCondition, RuntimeConfigResponse, RuntimeFeatures,
    RuntimeHandler, RuntimeHandlerFeatures, RuntimeStatus, StatusResponse,
};
use serde::Deserialize;

use super::runtime::Runtime;
use super::settings::{Handler, Settings};
use super::spec;
use crate::error::{Error, Result, blocking};

/// Where systemd says that it runs.
const SYSTEMD: &str = "/run/systemd/system";
/// What our shim calls itself.
const OURS: &str = "gantry";

/// What is known of a handler.
#[derive(Debug)]
pub(super) struct Known {
    /// What its containers' specs are made by.
    pub(super) options: Arc<spec::Options>,
    /// Whether its shim is ours, which writes logs itself.
    pub(super) ours: bool,
    /// Why it can have no pods with users of their own, if so.
    no_users: Option<String>,
    /// What the kubelet is told of it.
    features: RuntimeHandlerFeatures,
}

/// What of `runc features` is of interest.
#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct Features {
    mount_options: Vec<String>,
    linux: LinuxFeatures,
}

#[derive(Debug, Default, Deserialize)]
#[serde(rename_all = "camelCase", default)]
struct LinuxFeatures {
    namespaces: Vec<String>,
}

impl Features {
    fn recursive_read_only(&self) -> bool {
        self.mount_options.iter().any(|option| option == "rro")
    }

    /// Id-mapped mounts, which it may not know, are made by us.
    fn users(&self) -> bool {
        self.linux.namespaces.iter().any(|kind| kind == "user")
    }
}

impl Runtime {
    /// What is known of a handler; its runtime is asked once.
    pub(super) async fn known(&self, handler: &str) -> Result<Arc<Known>> {
        let (name, handler) = self.handler(handler)?;
        let known = self
            .known
            .get(name)
            .ok_or_else(|| Error::internal(format!("nothing is kept of the runtime handler {name:?}")))?;
        known.get_or_try_init(|| self.find_out(name, handler)).await.cloned()
    }

    /// What the specs of a handler's containers are made by.
    pub(super) async fn spec_options(&self, handler: &str) -> Result<Arc<spec::Options>> {
        Ok(self.known(handler).await?.options.clone())
    }

    async fn find_out(&self, name: &str, handler: &Handler) -> Result<Arc<Known>> {
        let base = match handler.base_spec.clone() {
            None => None,
            Some(path) => Some(blocking(move || read_base(&path)).await?),
        };
        let (mut features, mut ours) = (Features::default(), false);
        match self.parts.tasks.runtime_info(&handler.runtime, handler.options.clone()).await {
            Ok(info) => {
                ours = info.version.is_some_and(|version| version.revision == OURS);
                if let Some(any) = info.features {
                    features = serde_json::from_slice(&any.value).unwrap_or_else(|error| {
                        tracing::debug!(handler = name, %error, "what the runtime can do cannot be read");
                        Features::default()
                    });
                }
            }
            // Not installed, perhaps: asked again, when somebody uses it.
            Err(error @ Error::NotFound(_)) => return Err(error),
            Err(error) => tracing::debug!(handler = name, %error, "what the runtime can do is not known"),
        }
        let options = Arc::new(options(&self.settings, handler, base, &features));
        let remaps = self.remaps(&handler.snapshotter);
        let no_users = match (ours, features.users(), remaps) {
            (true, true, true) => None,
            (false, ..) => Some(format!("its shim, {}, is not the engine's own", handler.runtime)),
            (_, false, _) => Some("its runtime does not say that it knows user namespaces".to_owned()),
            (.., false) => Some(format!(
                "its snapshotter, {}, gives an image's files no other owners here; overlayfs does from Linux 6.5 on",
                handler.snapshotter
            )),
        };
        let features = RuntimeHandlerFeatures {
            recursive_read_only_mounts: features.recursive_read_only(),
            user_namespaces: no_users.is_none(),
        };
        Ok(Arc::new(Known { options, ours, no_users, features }))
    }

    /// Whether a snapshotter gives snapshots the owners that their labels name.
    pub(super) fn remaps(&self, snapshotter: &str) -> bool {
        let mut opened = self.parts.snapshots.opened();
        opened.any(|(name, _, can)| name == snapshotter && can.contains(&snapshotter::REMAP))
    }

    /// Refuses pods with users of their own where the handler cannot have them.
    pub(super) async fn require_users(&self, handler: &str) -> Result<()> {
        match &self.known(handler).await?.no_users {
            None => Ok(()),
            Some(why) => Err(Error::failed_precondition(format!(
                "pods of the runtime handler {handler:?} cannot have user namespaces: {why}"
            ))),
        }
    }

    /// Whether pods can be run, and what handlers can do; with `verbose` the settings and what is under way, too.
    pub async fn status(&self, verbose: bool) -> Result<StatusResponse> {
        let networks = self.network("")?.status().await;
        let condition = |kind: &str, status, reason: String, message: String| RuntimeCondition {
            r#type: kind.to_owned(),
            status,
            reason,
            message,
        };
        let conditions = vec![
            condition("RuntimeReady", true, String::new(), String::new()),
            condition("NetworkReady", networks.ready, networks.reason, networks.message),
        ];
        let mut handlers = Vec::new();
        for name in self.settings.handlers.keys() {
            let features = match self.known(name).await {
                Ok(known) => Some(known.features),
                Err(error) => {
                    tracing::debug!(handler = name, %error, "what this runtime handler can do is not known");
                    None
                }
            };
            if *name == self.settings.default_handler {
                handlers.push(RuntimeHandler { name: String::new(), features });
            }
            handlers.push(RuntimeHandler { name: name.clone(), features });
        }
        handlers.sort_by(|a, b| a.name.cmp(&b.name));
        let mut info = std::collections::BTreeMap::new();
        if verbose {
            info.insert("config".to_owned(), serde_json::json!(format!("{:#?}", self.settings)).to_string());
            let networks: Vec<_> = networks
                .networks
                .iter()
                .map(|(name, file)| serde_json::json!({ "name": name, "file": file }))
                .collect();
            info.insert("cniconfig".to_owned(), serde_json::json!(networks).to_string());
            let doing = self
                .under_way()
                .into_iter()
                .map(|(id, what, seconds)| serde_json::json!({ "id": id, "what": what, "seconds": seconds }));
            info.insert("underWay".to_owned(), serde_json::Value::from_iter(doing).to_string());
        }
        Ok(StatusResponse {
            status: Some(RuntimeStatus { conditions }),
            info: info.into_iter().collect(),
            runtime_handlers: handlers,
            features: Some(RuntimeFeatures {
                supplemental_groups_policy: true,
                user_namespaces_host_network: true,
                mount_options: true,
            }),
        })
    }

    /// What the kubelet has to know of the engine's settings: who makes control groups.
    pub fn runtime_config(&self) -> RuntimeConfigResponse {
        let driver = match systemd_cgroups(&self.settings) {
            true => CgroupDriver::Systemd,
            false => CgroupDriver::Cgroupfs,
        };
        RuntimeConfigResponse { linux: Some(LinuxRuntimeConfiguration { cgroup_driver: driver.into() }) }
    }
}

/// The kubelet's one answer for all handlers: the default one's, else that of the first that says something, else what runs.
fn systemd_cgroups(settings: &Settings) -> bool {
    let default = settings.handlers.get(&settings.default_handler);
    let said = default.into_iter().chain(settings.handlers.values()).find_map(says);
    said.unwrap_or_else(|| std::path::Path::new(SYSTEMD).exists())
}

/// What a handler says of that: one with options of runc's that has none of it says no.
fn says(handler: &Handler) -> Option<bool> {
    let has_options = handler.runtime == super::settings::RUNC && handler.options.is_some();
    handler.systemd_cgroup.or_else(|| has_options.then_some(false))
}

fn read_base(path: &std::path::Path) -> Result<oci::runtime::Spec> {
    let bytes = std::fs::read(path).map_err(|error| Error::io("read base_runtime_spec", path, &error))?;
    serde_json::from_slice(&bytes).map_err(|error| {
        Error::invalid_argument(format!("base_runtime_spec {} is no runtime spec: {error}", path.display()))
    })
}

fn options(
    settings: &Settings,
    handler: &Handler,
    base: Option<oci::runtime::Spec>,
    features: &Features,
) -> spec::Options {
    spec::Options {
        base,
        cgroup: match handler.systemd_cgroup {
            Some(true) => spec::CgroupDriver::Systemd,
            _ => spec::CgroupDriver::Cgroupfs,
        },
        pod_annotations: handler.pod_annotations.clone(),
        container_annotations: handler.container_annotations.clone(),
        privileged_without_host_devices: handler.privileged_without_host_devices,
        privileged_without_host_devices_all_devices_allowed: handler.privileged_all_devices_allowed,
        cgroup_writable: handler.cgroup_writable,
        recursive_read_only: features.recursive_read_only(),
        disable_cgroup: settings.disable_cgroup,
        restrict_oom_score_adj: settings.restrict_oom_score_adj,
        tolerate_missing_hugetlb_controller: settings.tolerate_missing_hugetlb,
        disable_hugetlb_controller: settings.disable_hugetlb,
        disable_proc_mount: settings.disable_proc_mount,
        disable_apparmor: settings.disable_apparmor,
        enable_selinux: settings.enable_selinux,
        unset_seccomp_profile: settings.unset_seccomp_profile.clone(),
        device_ownership_from_security_context: settings.device_ownership,
        ignore_image_defined_volumes: settings.ignore_image_volumes,
        enable_unprivileged_ports: settings.unprivileged_ports,
        enable_unprivileged_icmp: settings.unprivileged_icmp,
        enable_cdi: settings.enable_cdi,
        cdi_spec_dirs: settings.cdi_spec_dirs.clone(),
        sandbox_image: settings.sandbox_image.clone().unwrap_or_default(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_runtime_says_what_it_can_do() {
        let of = |text: &str| serde_json::from_str::<Features>(text).unwrap();
        let new = of(
            r#"{"mountOptions": ["ro", "rro"], "linux": {"namespaces": ["user", "mount"], "cgroup": {}}}"#,
        );
        assert!(new.recursive_read_only() && new.users());
        let old =
            of(r#"{"linux": {"namespaces": ["mount"], "mountExtensions": {"idmap": {"enabled": true}}}}"#);
        assert!(!old.recursive_read_only() && !old.users());
    }

    #[test]
    fn the_default_handler_says_who_makes_groups() {
        let settings = |text: &str| {
            let text = format!("['io.containerd.cri.v1.runtime'.containerd]\n{text}");
            super::super::settings::read(&toml::from_str(&text).unwrap()).unwrap()
        };
        let two = "default_runtime_name = 'b'\nruntimes.a.options.SystemdCgroup = true\n";
        assert!(systemd_cgroups(&settings(&format!("{two}runtimes.b.snapshotter = 'native'"))));
        assert!(!systemd_cgroups(&settings(&format!("{two}runtimes.b.options.BinaryName = 'x'"))));
        assert!(!systemd_cgroups(&settings(&format!("{two}runtimes.b.options.SystemdCgroup = false"))));
    }
}
