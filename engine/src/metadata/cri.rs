//! Records of what the kubelet asked for: `pods NAMESPACE ID` and `pod-containers NAMESPACE ID`.
//!
//! They stand beside the sandboxes and containers of containerd's API, which other clients see and may change: what a pod
//! is, and how its containers ended, is known from here alone. Times are Unix times in nanoseconds; 0 is never.

use std::collections::BTreeMap;

use proto::runtime::v1::{ContainerConfig, ContainerUser, LinuxContainerResources, PodSandboxConfig};

use super::Record;

/// A pod.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PodRecord {
    /// As the kubelet gave it, but for what [`PodRecord::config`]'s updates changed since.
    #[prost(message, optional, tag = "1")]
    pub config: Option<PodSandboxConfig>,
    /// The runtime handler that it was made for; empty for the default one.
    #[prost(string, tag = "2")]
    pub handler: String,
    /// Where it is in its life.
    #[prost(enumeration = "PodStage", tag = "3")]
    pub stage: i32,
    /// When it was asked for.
    #[prost(int64, tag = "4")]
    pub created_at: i64,
    /// The file that its network namespace is bound to; empty with the host's network.
    #[prost(string, tag = "5")]
    pub netns: String,
    /// Its addresses; the first is the one.
    #[prost(string, repeated, tag = "6")]
    pub ips: Vec<String>,
    /// What its networks gave it: `cri::cni::Attachment` as JSON; empty with the host's network.
    #[prost(string, tag = "7")]
    pub attachment: String,
    /// The image of its pause container; empty when it has none, its namespaces being held by its shim.
    #[prost(string, tag = "8")]
    pub sandbox_image: String,
    /// The init of its namespace of process ids, or its pause container's; 0 when no process holds it.
    #[prost(uint32, tag = "9")]
    pub pid: u32,
    /// The containerd runtime of its handler.
    #[prost(string, tag = "10")]
    pub runtime: String,
    /// The namespaces that its containers join, by the kernel's names (`ipc`, `net`, `pid`, `user`, `uts`): where each is bound.
    #[prost(btree_map = "string, string", tag = "11")]
    pub namespaces: BTreeMap<String, String>,
}

/// Where a pod is in its life. It only goes forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum PodStage {
    /// It is being made. After a restart of the engine nobody waits for it: it is taken down.
    Making = 0,
    /// It is ready.
    Ready = 1,
    /// It has ended, or is being stopped: what it held may still have to be let go of.
    Stopped = 2,
    /// Its network and its namespaces are gone.
    Released = 3,
    /// It is being removed: nothing but its name is left to let go of.
    Removing = 4,
}

/// A container of a pod.
#[derive(Clone, PartialEq, prost::Message)]
pub struct PodContainerRecord {
    /// Its pod's id.
    #[prost(string, tag = "1")]
    pub pod: String,
    /// As the kubelet gave it.
    #[prost(message, optional, tag = "2")]
    pub config: Option<ContainerConfig>,
    /// Where it is in its life.
    #[prost(enumeration = "ContainerStage", tag = "3")]
    pub stage: i32,
    /// When it was made.
    #[prost(int64, tag = "4")]
    pub created_at: i64,
    /// When it was started.
    #[prost(int64, tag = "5")]
    pub started_at: i64,
    /// When it ended.
    #[prost(int64, tag = "6")]
    pub finished_at: i64,
    /// How its first process ended; 128 and the signal's number when one ended it.
    #[prost(int32, tag = "7")]
    pub exit_code: i32,
    /// Why it ended, in one word.
    #[prost(string, tag = "8")]
    pub reason: String,
    /// Why it ended, in a sentence.
    #[prost(string, tag = "9")]
    pub message: String,
    /// Its image's id: the digest of the image's config.
    #[prost(string, tag = "10")]
    pub image_id: String,
    /// Its image by digest, where it has one; else the id.
    #[prost(string, tag = "11")]
    pub image_ref: String,
    /// Its log; empty for none.
    #[prost(string, tag = "12")]
    pub log_path: String,
    /// Where its streams are joined and its log reopened: the socket of its logger.
    #[prost(string, tag = "13")]
    pub streams: String,
    /// What StopContainer sends, as a number.
    #[prost(uint32, tag = "14")]
    pub stop_signal: u32,
    /// The limits that hold now.
    #[prost(message, optional, tag = "15")]
    pub resources: Option<LinuxContainerResources>,
    /// Whom it runs as.
    #[prost(message, optional, tag = "16")]
    pub user: Option<ContainerUser>,
    /// Its cgroup, as the runtime's spec names it.
    #[prost(string, tag = "17")]
    pub cgroup: String,
    /// The snapshotter of its root file system.
    #[prost(string, tag = "18")]
    pub snapshotter: String,
    /// The images that are mounted into it: where in the container, and the image's id.
    #[prost(btree_map = "string, string", tag = "19")]
    pub image_mounts: BTreeMap<String, String>,
}

/// Where a container is in its life. It only goes forward.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, prost::Enumeration)]
#[repr(i32)]
pub enum ContainerStage {
    /// It is being made. After a restart of the engine nobody waits for it: it is taken down.
    Making = 0,
    /// It is made, and has not been started.
    Created = 1,
    /// It runs.
    Running = 2,
    /// It has ended.
    Exited = 3,
    /// It is being removed.
    Removing = 4,
}

impl Record for PodRecord {
    const TABLE: &'static str = "pods";
}

impl Record for PodContainerRecord {
    const TABLE: &'static str = "pod-containers";
}
