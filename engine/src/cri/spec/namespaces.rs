//! Which namespaces a pod makes, and which of them a container joins.
//!
//! ```text
//!            pod                                         container
//!  network   the machine's | its own                     the pod's
//!  uts       the machine's with its network | its own    the pod's
//!  ipc       the machine's | its own                     the pod's
//!  pid       the machine's | shared | none               the machine's | the pod's | its target's | its own
//!  user      the machine's | its own, made before all    the pod's
//! ```
//!
//! A namespace of users owns what is made in it: ipc, process ids, and the network unless that is the machine's.

use std::path::Path;

use oci::runtime::{IdMapping, Spec};
use proto::runtime::v1::{
    IdMapping as Asked, NamespaceMode, NamespaceOption, PodSandboxConfig, UserNamespace,
};
use sys::idmap::Mapping;

use super::{Wanted, WantedPod, host_ipc, host_network, pid_mode, pod_namespace_options, refused};
use crate::error::{Error, Result};

/// The labels that tell a snapshotter who the owners of a snapshot's files are.
const SNAPSHOT_UIDS: &str = "containerd.io/snapshot/uidmapping";
const SNAPSHOT_GIDS: &str = "containerd.io/snapshot/gidmapping";

/// How the users of a pod are mapped: one range of each, beginning with root.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Users {
    uids: IdMapping,
    gids: IdMapping,
}

impl Users {
    /// Those of a pod that does not have the machine's. None asked for is a kubelet that knows no user namespaces.
    pub fn of_pod(pod: &PodSandboxConfig) -> Result<Option<Users>> {
        let Some(users) = users(pod_namespace_options(pod))? else { return Ok(None) };
        let shared = match () {
            () if host_ipc(pod) => "message queues and shared memory",
            () if pid_mode(pod) == NamespaceMode::Node => "process ids",
            () => return Ok(Some(users)),
        };
        Err(Error::invalid_argument(format!(
            "the pod has users of its own and the machine's {shared}: the kernel mounts /proc and /dev/mqueue only for who \
             owns what they show; give it its own"
        )))
    }

    /// Users' ids, as a namespace is made with them.
    pub fn uids(&self) -> [Mapping; 1] {
        [as_kernel(&self.uids)]
    }

    /// Groups' ids.
    pub fn gids(&self) -> [Mapping; 1] {
        [as_kernel(&self.gids)]
    }

    /// Who its root is on the machine: user, group.
    pub fn root(&self) -> (u32, u32) {
        (self.uids.host_id, self.gids.host_id)
    }

    /// Who a user is on the machine.
    pub fn outside(&self, uid: u32, gid: u32) -> Result<(u32, u32)> {
        let of = |what: &str, id: u32, range: &IdMapping| {
            let outside = range.host_id.checked_add(id).filter(|_| id < range.size);
            outside.ok_or_else(|| {
                Error::invalid_argument(format!(
                    "the container is to run as {what} {id}, who is not among the {} that the pod has",
                    range.size
                ))
            })
        };
        Ok((of("user", uid, &self.uids)?, of("group", gid, &self.gids)?))
    }

    /// The labels of a snapshot whose files are theirs.
    pub fn labels(&self) -> [(String, String); 2] {
        let text = |of: &IdMapping| format!("{}:{}:{}", of.container_id, of.host_id, of.size);
        [(SNAPSHOT_UIDS.to_owned(), text(&self.uids)), (SNAPSHOT_GIDS.to_owned(), text(&self.gids))]
    }
}

fn as_kernel(range: &IdMapping) -> Mapping {
    Mapping { inside: range.container_id, outside: range.host_id, count: range.size }
}

/// The mappings of a pod or a container.
fn users(options: Option<&NamespaceOption>) -> Result<Option<Users>> {
    let Some(asked) = options.and_then(|options| options.userns_options.as_ref()) else {
        return Ok(None);
    };
    let mode = NamespaceMode::try_from(asked.mode).map_err(|_| {
        Error::invalid_argument(format!("user namespace mode {} is not known; use POD or NODE", asked.mode))
    })?;
    match mode {
        NamespaceMode::Node if asked.uids.is_empty() && asked.gids.is_empty() => Ok(None),
        NamespaceMode::Node => Err(Error::invalid_argument(
            "mappings are given for the machine's own user namespace (mode NODE)",
        )),
        NamespaceMode::Pod => mapped_as(&asked.uids, &asked.gids).map(Some),
        mode @ (NamespaceMode::Container | NamespaceMode::Target) => Err(Error::invalid_argument(format!(
            "a user namespace cannot have the mode {}; use POD or NODE",
            mode.as_str_name()
        ))),
    }
}

/// Users by these mappings: one range each, as that is what a snapshot's files can be shifted by.
pub fn mapped_as(uids: &[Asked], gids: &[Asked]) -> Result<Users> {
    Ok(Users { uids: one("users", uids)?, gids: one("groups", gids)? })
}

fn one(of: &str, asked: &[Asked]) -> Result<IdMapping> {
    let refuse = |why: &str| Err(Error::invalid_argument(format!("the mapping of {of} {why}")));
    match asked {
        [] => refuse("is missing: both users and groups need one"),
        [range] if range.length == 0 => refuse("has no length"),
        [range] if range.container_id != 0 => {
            refuse("leaves root out: it has to begin with the container's 0")
        }
        [range] if range.host_id.checked_add(range.length).is_none() => refuse("goes beyond the last id"),
        [range] => {
            Ok(IdMapping { container_id: range.container_id, host_id: range.host_id, size: range.length })
        }
        several => refuse(&format!("has {} ranges, and one is supported", several.len())),
    }
}

/// The mappings of a container, which have to be its pod's.
pub(super) fn users_of_container(wanted: &Wanted<'_>) -> Result<Option<Users>> {
    let own = users(wanted.namespace_options())?;
    let named = |options: Option<&NamespaceOption>| {
        options
            .and_then(|options| options.userns_options.clone())
            .is_some_and(|users: UserNamespace| users.mode() == NamespaceMode::Pod)
    };
    let pod = Users::of_pod(wanted.pod)?;
    if own != pod || named(wanted.namespace_options()) != named(pod_namespace_options(wanted.pod)) {
        return Err(Error::invalid_argument(
            "the container's user namespace is not its pod's: both have to be asked for with the same mappings",
        ));
    }
    Ok(own)
}

/// Sets a container's namespaces.
pub(super) fn of_container(wanted: &Wanted<'_>, users: Option<&Users>, spec: &mut Spec) -> Result<()> {
    let Wanted { namespaces, pod, .. } = *wanted;
    for (kind, path) in [("network", &namespaces.network), ("ipc", &namespaces.ipc), ("uts", &namespaces.uts)]
    {
        match path {
            Some(path) => join(spec, kind, &path.to_string_lossy())?,
            None => leave(spec, kind),
        }
    }
    let options = wanted.namespace_options();
    let mode = options.map_or(NamespaceMode::Pod, NamespaceOption::pid);
    match (mode, &namespaces.pid) {
        (NamespaceMode::Node, _) if users.is_some() => {
            return Err(Error::invalid_argument(
                "the container has users of its own and the machine's process ids, for which the kernel mounts no /proc",
            ));
        }
        (NamespaceMode::Node, _) => leave(spec, "pid"),
        (NamespaceMode::Container, _) => join(spec, "pid", "")?,
        (NamespaceMode::Pod | NamespaceMode::Target, Some(path)) => {
            join(spec, "pid", &path.to_string_lossy())?;
        }
        (NamespaceMode::Target, None) => {
            let target = options.map_or("", |options| &options.target_id);
            return Err(Error::failed_precondition(format!(
                "the namespace of process ids of container {target:?}, which is targeted, is not there: it has to run"
            )));
        }
        (NamespaceMode::Pod, None) if pid_mode(pod) == NamespaceMode::Node => {
            leave(spec, "pid");
        }
        // The pod shares none: the container is as good as alone.
        (NamespaceMode::Pod, None) => join(spec, "pid", "")?,
    }
    set_users(spec, users, namespaces.user.as_deref())
}

/// Sets a pod's namespaces: those to make, and those that are made already.
pub(super) fn of_pod(wanted: &WantedPod<'_>, own_pids: bool, spec: &mut Spec) -> Result<Option<Users>> {
    let WantedPod { config, netns, userns, .. } = *wanted;
    let users = Users::of_pod(config)?;
    if !host_network(config) {
        join(spec, "network", &netns.unwrap_or("".as_ref()).to_string_lossy())?;
        join(spec, "uts", "")?;
    }
    if !host_ipc(config) {
        join(spec, "ipc", "")?;
    }
    if own_pids {
        join(spec, "pid", "")?;
    }
    set_users(spec, users.as_ref(), userns)?;
    Ok(users)
}

fn set_users(spec: &mut Spec, users: Option<&Users>, pinned: Option<&Path>) -> Result<()> {
    let Some(users) = users else {
        leave(spec, "user");
        return Ok(());
    };
    // Runtimes want the mappings of a namespace that they join, too.
    spec.set_user_namespace(vec![users.uids.clone()], vec![users.gids.clone()]);
    match pinned {
        Some(path) => join(spec, "user", &path.to_string_lossy()),
        None => Err(Error::internal("the pod's namespace of users has not been made")),
    }
}

/// Has the machine's.
fn leave(spec: &mut Spec, kind: &str) {
    spec.use_host_namespace(kind);
}

/// Joins what is pinned at the path, or makes one when it is empty.
fn join(spec: &mut Spec, kind: &str, path: &str) -> Result<()> {
    spec.set_namespace(kind, path).map_err(refused)?;
    Ok(())
}
