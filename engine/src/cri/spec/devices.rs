//! Which devices a container has.

use std::collections::HashSet;

use oci::runtime::{Device, DeviceRule, Spec};

use super::{Facts, Options, Wanted};

/// The devices that the kubelet asks for.
pub(super) fn of_container(wanted: &Wanted<'_>, spec: &mut Spec) {
    let id = |asked: Option<i64>| asked.and_then(|id| u32::try_from(id).ok()).filter(|id| *id != 0);
    let security = wanted.security();
    let uid = id(security.and_then(|security| security.run_as_user.as_ref()).map(|uid| uid.value));
    let gid = id(security.and_then(|security| security.run_as_group.as_ref()).map(|gid| gid.value));
    for (asked, found) in wanted.container.devices.iter().zip(&wanted.facts.devices) {
        let mut nodes = found.clone();
        if wanted.options.device_ownership_from_security_context {
            for node in &mut nodes {
                node.uid = uid.or(node.uid);
                node.gid = gid.or(node.gid);
            }
        }
        spec.add_devices(nodes, &asked.permissions);
    }
    once(&mut spec.linux_mut().devices);
}

/// What a privileged container has besides: all of them.
pub(super) fn of_privileged(spec: &mut Spec, facts: &Facts, options: &Options) {
    if !options.privileged_without_host_devices {
        spec.allow_all_devices(facts.host_devices.clone());
        once(&mut spec.linux_mut().devices);
    } else if options.privileged_without_host_devices_all_devices_allowed {
        spec.allow_all_devices(Vec::new());
    }
}

/// A path is one device's: the first that was asked for.
fn once(devices: &mut Vec<Device>) {
    let mut seen = HashSet::new();
    devices.retain(|device| seen.insert(device.path.clone()));
}

/// A device, and the use that is allowed of it, in the place of what was at its path.
pub(super) fn put(spec: &mut Spec, device: Device, access: &str) {
    let (kind, major, minor) = (device.kind.clone(), device.major, device.minor);
    let devices = &mut spec.linux_mut().devices;
    devices.retain(|old| old.path != device.path);
    devices.push(device);
    if matches!(kind.as_str(), "b" | "c") {
        let (major, minor) = (Some(major), Some(minor));
        let rule = DeviceRule { allow: true, kind, major, minor, access: access.to_owned() };
        spec.resources_mut().devices.push(rule);
    }
}
