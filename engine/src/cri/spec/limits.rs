//! Limits: memory, processors, huge pages, what else cgroup v2 has, the OOM killer's score, and the control group itself.
//!
//! Zero and empty are the kubelet's way to say nothing: they leave a limit as it is.

use std::collections::BTreeMap;

use oci::runtime::{Cpu, Memory, Pids, Resources, Spec};
use proto::runtime::v1::{
    HugepageLimit, LinuxContainerResources, PodSandboxConfig, UpdatePodSandboxResourcesRequest,
};
use serde_json::{Value, json};

use super::{CgroupDriver, Host, NAMESPACE, Options};
use crate::error::{Error, Result};

/// What systemd's scopes of containers are called by, before their ids.
const SCOPE: &str = "cri-containerd";
/// Where systemd's scopes are when the kubelet names no slice.
const SLICE: &str = "system.slice";
/// What the runtime spec calls limits of huge pages, and files of cgroup v2.
const HUGE_PAGES: &str = "hugepageLimits";
const UNIFIED: &str = "unified";

/// A container's limits after a change.
#[derive(Clone, Debug)]
pub struct Update {
    /// The container's spec from now on.
    pub spec: Spec,
    /// What a task that runs is told.
    pub resources: Resources,
    /// What ContainerStatus says.
    pub reported: LinuxContainerResources,
}

/// Changes the limits of a container whose spec is `current`. The score of the OOM killer stays as it is, as a runtime cannot
/// change that.
pub fn resources(
    current: &Spec,
    wanted: &LinuxContainerResources,
    host: &Host,
    options: &Options,
) -> Result<Update> {
    let mut spec = current.clone();
    if !options.disable_cgroup {
        apply(&mut spec, wanted, host, options)?;
    }
    let resources = spec.linux.as_ref().and_then(|linux| linux.resources.clone()).unwrap_or_default();
    Ok(Update { reported: reported(&spec), resources, spec })
}

/// Notes a pod's limits in its configuration: what the request leaves out stays. Nothing else changes: the group of a pod is
/// the kubelet's.
pub fn update_pod(config: &mut PodSandboxConfig, request: &UpdatePodSandboxResourcesRequest) {
    let linux = config.linux.get_or_insert_default();
    if let Some(overhead) = &request.overhead {
        linux.overhead = Some(overhead.clone());
    }
    if let Some(resources) = &request.resources {
        linux.resources = Some(resources.clone());
    }
}

/// Sets what the kubelet asks for.
pub(super) fn apply(
    spec: &mut Spec,
    asked: &LinuxContainerResources,
    host: &Host,
    options: &Options,
) -> Result<()> {
    let positive = |what: &str, value: i64| {
        u64::try_from(value).map_err(|_| Error::invalid_argument(format!("{what} {value} is below zero")))
    };
    let period = positive("cpu_period", asked.cpu_period)?;
    let shares = positive("cpu_shares", asked.cpu_shares)?;
    let resources = spec.resources_mut();
    let cpu = resources.cpu.get_or_insert_with(Cpu::default);
    if period != 0 {
        cpu.period = Some(period);
    }
    if asked.cpu_quota != 0 {
        cpu.quota = Some(asked.cpu_quota);
    }
    if shares != 0 {
        cpu.shares = Some(shares);
    }
    if !asked.cpuset_cpus.is_empty() {
        cpu.cpus.clone_from(&asked.cpuset_cpus);
    }
    if !asked.cpuset_mems.is_empty() {
        cpu.mems.clone_from(&asked.cpuset_mems);
    }
    let memory = resources.memory.get_or_insert_with(Memory::default);
    let (limit, swap) = (asked.memory_limit_in_bytes, asked.memory_swap_limit_in_bytes);
    if limit != 0 {
        memory.limit = Some(limit);
    }
    if host.swap {
        // Memory and swap together: as much as memory alone is no swap, which is what a container has unless asked.
        match (swap, limit) {
            (0, 0) => {}
            (0, limit) => memory.swap = Some(limit),
            (swap, _) => memory.swap = Some(swap),
        }
    }
    huge_pages(resources, &asked.hugepage_limits, host, options)?;
    unified(resources, &asked.unified, host)
}

fn huge_pages(
    resources: &mut Resources,
    asked: &[HugepageLimit],
    host: &Host,
    options: &Options,
) -> Result<()> {
    if asked.is_empty() || options.disable_hugetlb_controller {
        return Ok(());
    }
    if !host.controllers.contains("hugetlb") {
        return match options.tolerate_missing_hugetlb_controller {
            true => Ok(()),
            false => Err(Error::failed_precondition(
                "limits of huge pages are asked for, but this machine has no control groups for them (hugetlb): set \
                 tolerate_missing_hugetlb_controller = true to go without",
            )),
        };
    }
    let mut limits = huge_pages_of(resources);
    limits.extend(asked.iter().map(|limit| (limit.page_size.clone(), limit.limit)));
    let limits: Vec<Value> =
        limits.into_iter().map(|(size, limit)| json!({"pageSize": size, "limit": limit})).collect();
    resources.extra.insert(HUGE_PAGES.into(), limits.into());
    Ok(())
}

fn huge_pages_of(resources: &Resources) -> BTreeMap<String, u64> {
    let listed = resources.extra.get(HUGE_PAGES).and_then(Value::as_array);
    listed
        .into_iter()
        .flatten()
        .filter_map(|limit| Some((limit["pageSize"].as_str()?.to_owned(), limit["limit"].as_u64()?)))
        .collect()
}

fn unified(resources: &mut Resources, asked: &BTreeMap<String, String>, host: &Host) -> Result<()> {
    for (file, value) in asked {
        if host.cgroup2 {
            let files = resources.extra.entry(UNIFIED).or_insert_with(|| json!({}));
            files[file] = value.clone().into();
        } else if file == "pids.max" {
            // The one that both versions have in the same sense.
            let limit = if value == "max" { Some(-1) } else { value.parse().ok() };
            let limit = limit.ok_or_else(|| {
                Error::invalid_argument(format!("pids.max {value:?} is neither a number nor \"max\""))
            })?;
            resources.pids = Some(Pids { limit });
        } else {
            return Err(Error::failed_precondition(format!(
                "{file:?} can be set on a machine with cgroup v2 alone, and this one has v1"
            )));
        }
    }
    Ok(())
}

/// The score that the OOM killer is told: none below the engine's own where that may not, or shall not, be lowered, as the
/// runtime would be killed by the attempt.
pub(super) fn oom_score_adj(asked: i64, host: &Host, options: &Options) -> i32 {
    let asked = i32::try_from(asked.clamp(-1000, 1000)).unwrap_or_default();
    match options.restrict_oom_score_adj || !host.may_lower_oom_score_adj {
        true => asked.max(host.oom_score_adj),
        false => asked,
    }
}

/// Names the control group, beneath the one that the kubelet has made for the pod.
pub(super) fn set_cgroup(spec: &mut Spec, id: &str, pod: &PodSandboxConfig, options: &Options) -> Result<()> {
    let parent = pod.linux.as_ref().map_or("", |linux| &linux.cgroup_parent);
    let path = match options.cgroup {
        _ if options.disable_cgroup => String::new(),
        CgroupDriver::Systemd => {
            let slice = match parent.trim_end_matches('/').rsplit('/').next().unwrap_or_default() {
                "" => SLICE,
                slice if slice.ends_with(".slice") => slice,
                _ => {
                    return Err(Error::invalid_argument(format!(
                        "the pod's cgroup parent {parent:?} is not a slice, but the runtime handler makes groups by \
                         systemd (SystemdCgroup = true): kubelet and handler have to agree on the cgroup driver"
                    )));
                }
            };
            format!("{slice}:{SCOPE}:{id}")
        }
        CgroupDriver::Cgroupfs if parent.is_empty() => format!("/{NAMESPACE}/{id}"),
        CgroupDriver::Cgroupfs => super::mounts::clean(&format!("{parent}/{id}")),
    };
    spec.set_cgroup(&path);
    Ok(())
}

/// Takes out all that needs a control group.
pub(super) fn without_cgroup(spec: &mut Spec) {
    let linux = spec.linux_mut();
    linux.cgroups_path.clear();
    linux.resources = None;
}

/// What ContainerStatus says.
pub(super) fn reported(spec: &Spec) -> LinuxContainerResources {
    let mut reported = LinuxContainerResources::default();
    if let Some(score) = spec.process.as_ref().and_then(|process| process.oom_score_adj) {
        reported.oom_score_adj = score.into();
    }
    let Some(resources) = spec.linux.as_ref().and_then(|linux| linux.resources.as_ref()) else {
        return reported;
    };
    let signed = |value: Option<u64>| value.and_then(|value| i64::try_from(value).ok()).unwrap_or_default();
    if let Some(cpu) = &resources.cpu {
        reported.cpu_period = signed(cpu.period);
        reported.cpu_quota = cpu.quota.unwrap_or_default();
        reported.cpu_shares = signed(cpu.shares);
        reported.cpuset_cpus.clone_from(&cpu.cpus);
        reported.cpuset_mems.clone_from(&cpu.mems);
    }
    if let Some(memory) = &resources.memory {
        reported.memory_limit_in_bytes = memory.limit.unwrap_or_default();
        reported.memory_swap_limit_in_bytes = memory.swap.unwrap_or_default();
    }
    let pages = huge_pages_of(resources).into_iter();
    reported.hugepage_limits = pages.map(|(page_size, limit)| HugepageLimit { page_size, limit }).collect();
    if let Some(files) = resources.extra.get(UNIFIED).and_then(Value::as_object) {
        let text = |value: &Value| value.as_str().unwrap_or_default().to_owned();
        reported.unified = files.iter().map(|(file, value)| (file.clone(), text(value))).collect();
    }
    reported
}
