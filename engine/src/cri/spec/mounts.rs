//! What is mounted in a container, and in which order: the default file systems, then what is bound, the fewer parts a path
//! has the earlier, so that nothing hides what was mounted before it.
//!
//! What the kubelet binds takes the place of a default mount at the same path, and a /dev of its own that of all beneath it.

use std::collections::BTreeSet;
use std::path::PathBuf;

use oci::runtime::{Mount, Spec};
use proto::runtime::v1::{Mount as Asked, MountPropagation, NamespaceMode};

use super::namespaces::Users;
use super::{Host, Propagation, Volume, Wanted, WantedPod, absolute, host_ipc, host_network, mount};
use crate::error::{Error, Result};

const CGROUPS: &str = "/sys/fs/cgroup";
const SHM: &str = "/dev/shm";

/// Options that a bind mount may be given besides. Others would change what it is, not how it may be used.
const FURTHER: &[&str] = &[
    "noexec",
    "exec",
    "nosuid",
    "suid",
    "nodev",
    "dev",
    "noatime",
    "atime",
    "relatime",
    "norelatime",
    "strictatime",
    "nostrictatime",
    "nodiratime",
    "diratime",
    "nosymfollow",
    "symfollow",
];

/// Something to bind.
struct Bind {
    destination: String,
    source: PathBuf,
    options: Vec<String>,
    /// What is to be labelled for it.
    relabel: Option<PathBuf>,
}

/// Sets a container's mounts; gives the volumes to make, and what is to be labelled.
pub(super) fn of_container(
    wanted: &Wanted<'_>,
    users: Option<&Users>,
    spec: &mut Spec,
) -> Result<(Vec<Volume>, Vec<PathBuf>)> {
    let taken: BTreeSet<String> =
        wanted.container.mounts.iter().map(|asked| clean(&asked.container_path)).collect();
    let mut binds = Vec::new();
    let mut propagation = "";
    for (at, (asked, source)) in wanted.container.mounts.iter().zip(&wanted.facts.sources).enumerate() {
        match asked.propagation() {
            MountPropagation::PropagationBidirectional => propagation = "rshared",
            MountPropagation::PropagationHostToContainer if propagation != "rshared" => {
                propagation = "rslave";
            }
            _ => {}
        }
        binds.push(bind(wanted, users.is_some(), at, asked, source)?);
    }
    binds.extend(
        files(wanted, users.is_some()).into_iter().filter(|bind| !taken.contains(&clean(&bind.destination))),
    );
    let volumes = volumes(wanted, &taken);
    binds.extend(volumes.iter().map(|volume| Bind {
        destination: volume.destination.clone(),
        source: volume.source.clone(),
        options: strings(&["rbind", "rprivate", "rw"]),
        relabel: Some(volume.source.clone()),
    }));
    binds.sort_by_key(|bind| parts(&bind.destination));

    let writable = wanted.options.cgroup_writable;
    let own_group = spec.linux_mut().namespaces.iter().any(|namespace| namespace.kind == "cgroup");
    spec.mounts.push(cgroups(wanted.host, writable, own_group));
    if users.is_some() {
        without_foreign(spec, host_network(wanted.pod));
    }
    let taken: BTreeSet<String> = binds.iter().map(|bind| clean(&bind.destination)).collect();
    spec.mounts.retain(|mount| {
        let at = clean(&mount.destination);
        let beneath = taken.contains("/dev") && at.starts_with("/dev/");
        !(beneath || taken.contains(&at))
    });
    let relabel = binds.iter().filter_map(|bind| bind.relabel.clone()).collect();
    spec.mounts.extend(binds.into_iter().map(|bind| {
        let mut made = mount(&bind.destination, "bind", bind.source.to_string_lossy(), &[]);
        made.options = bind.options;
        made
    }));
    if !propagation.is_empty() {
        spec.linux_mut().rootfs_propagation = propagation.into();
    }
    Ok((volumes, relabel))
}

/// The control groups, which a container sees its own of, or all.
fn cgroups(host: &Host, writable: bool, own_group: bool) -> Mount {
    let mode = if writable { "rw" } else { "ro" };
    let mut made = mount(CGROUPS, "cgroup", "cgroup", &["nosuid", "noexec", "nodev", "relatime", mode]);
    if !own_group {
        // There is one superblock for all: what it was mounted with has to be said again, or the machine loses it.
        made.options.extend(host.cgroup_options.iter().cloned());
    }
    made
}

/// For a container with users of its own. The kernel mounts /sys only for who owns the network.
fn without_foreign(spec: &mut Spec, host_network: bool) {
    for made in spec.mounts.iter_mut().filter(|_| host_network) {
        if made.destination == "/sys" && made.kind == "sysfs" {
            *made = mount("/sys", "bind", "/sys", &["rbind", "rro", "nosuid", "nodev", "noexec"]);
        }
    }
}

/// One mount of the kubelet's.
fn bind(wanted: &Wanted<'_>, users: bool, at: usize, asked: &Asked, source: &super::Source) -> Result<Bind> {
    let (options, path) = (wanted.options, source.path.clone());
    let refuse = |why: String| {
        Err(Error::invalid_argument(format!(
            "mount of {} at {}: {why}",
            path.display(),
            asked.container_path
        )))
    };
    if asked.container_path.is_empty() {
        return refuse("it has no place in the container".into());
    }
    let point = source.mount_point.display();
    let mapped = is_mapped(asked);
    let propagation = match asked.propagation() {
        MountPropagation::PropagationPrivate => "rprivate",
        MountPropagation::PropagationHostToContainer if source.propagation == Propagation::Private => {
            return refuse(format!(
                "its mounts are to follow the machine's, but the mount it is on, {point}, is neither shared nor a \
                 slave; make it so: mount --make-rshared {point}"
            ));
        }
        MountPropagation::PropagationHostToContainer => "rslave",
        MountPropagation::PropagationBidirectional if users || mapped => {
            return refuse(
                "its mounts are to be shared with the machine, which the kernel lets no pod with users of its own do, and no \
                 id-mapped mount"
                    .into(),
            );
        }
        MountPropagation::PropagationBidirectional if source.propagation != Propagation::Shared => {
            return refuse(format!(
                "its mounts are to be shared with the machine, but the mount it is on, {point}, is not shared; make \
                 it so: mount --make-rshared {point}"
            ));
        }
        MountPropagation::PropagationBidirectional => "rshared",
    };
    let access = match (asked.readonly, asked.recursive_read_only) {
        (false, false) => "rw",
        (true, false) => "ro",
        (false, true) => return refuse("it is to be read-only recursively, but not read-only".into()),
        // The kubelet knows this one by its first word.
        (true, true) if !options.recursive_read_only => {
            return Err(Error::failed_precondition(format!(
                "RROUnsupported: mount of {} is to be read-only recursively, which the runtime handler cannot: it takes \
                 Linux 5.12 and a runtime with `rro` among its mount options",
                path.display()
            )));
        }
        (true, true) if asked.propagation() != MountPropagation::PropagationPrivate => {
            return refuse("it is to be read-only recursively, which takes private propagation".into());
        }
        (true, true) => "rro",
    };
    if mapped {
        super::namespaces::mapped_as(&asked.uid_mappings, &asked.gid_mappings).map_err(|error| {
            error.context(format!("mount of {} at {}", path.display(), asked.container_path))
        })?;
    }
    if let Some(unknown) = asked.mount_options.iter().find(|option| !FURTHER.contains(&option.as_str())) {
        return refuse(format!(
            "{unknown:?} is not among the options a mount may be given: {}",
            FURTHER.join(", ")
        ));
    }
    let mut given = strings(&["rbind", propagation, access]);
    given.extend(asked.mount_options.iter().cloned());
    if users {
        given.extend(source.kept.iter().filter(|kept| !given.contains(kept)).cloned().collect::<Vec<_>>());
    }
    Ok(Bind {
        destination: absolute(&asked.container_path),
        relabel: asked.selinux_relabel.then(|| path.clone()),
        source: if mapped { wanted.mapped.join(at.to_string()) } else { path },
        options: given,
    })
}

/// Whether a mount is to have other owners. One of an image has them from its snapshot.
pub fn is_mapped(asked: &Asked) -> bool {
    let image = asked.image.as_ref().is_some_and(|image| !image.image.is_empty());
    !(image || asked.uid_mappings.is_empty() && asked.gid_mappings.is_empty())
}

/// The pod's own files, which belong to its root.
fn files(wanted: &Wanted<'_>, users: bool) -> Vec<Bind> {
    let files = &wanted.facts.files;
    let readonly = wanted.security().is_some_and(|security| security.readonly_rootfs);
    let access = if readonly { "ro" } else { "rw" };
    let mut options = strings(&["rbind", "rprivate", access]);
    if users {
        options.extend(files.kept.iter().filter(|kept| *kept != access).cloned());
    }
    let file = |destination: &str, source: &Option<PathBuf>| {
        Some(Bind {
            destination: destination.to_owned(),
            source: source.clone()?,
            options: options.clone(),
            relabel: source.clone(),
        })
    };
    let own_shm = wanted.namespace_options().is_none_or(|options| options.ipc() != NamespaceMode::Node);
    let shm = if own_shm { files.shm.clone() } else { Some(PathBuf::from(SHM)) };
    let shm = shm.map(|source| Bind {
        destination: SHM.into(),
        relabel: own_shm.then(|| source.clone()),
        source,
        options: strings(&["rbind", "rprivate", "rw"]),
    });
    let made = [
        file("/etc/hostname", &files.hostname),
        file("/etc/hosts", &files.hosts),
        file("/etc/resolv.conf", &files.resolv_conf),
        shm,
    ];
    made.into_iter().flatten().collect()
}

/// The volumes that the image asks for and that nothing else is mounted at.
fn volumes(wanted: &Wanted<'_>, taken: &BTreeSet<String>) -> Vec<Volume> {
    if wanted.options.ignore_image_defined_volumes {
        return Vec::new();
    }
    let places: BTreeSet<String> = wanted.image.volumes.keys().map(|path| clean(&absolute(path))).collect();
    let free = places.into_iter().filter(|place| !taken.contains(place));
    free.enumerate()
        .map(|(at, destination)| Volume { source: wanted.volumes.join(at.to_string()), destination })
        .collect()
}

/// Sets a pause container's mounts.
pub(super) fn of_pause(wanted: &WantedPod<'_>, users: Option<&Users>, privileged: bool, spec: &mut Spec) {
    let options = ["rbind", "ro", "nosuid", "nodev", "noexec"];
    spec.mounts.retain(|mount| mount.destination != SHM);
    let shm = if host_ipc(wanted.config) { Some(PathBuf::from(SHM)) } else { wanted.files.shm.clone() };
    if let Some(shm) = shm {
        spec.mounts.push(mount(SHM, "bind", shm.to_string_lossy(), &options));
    }
    if let Some(resolver) = &wanted.files.resolv_conf {
        spec.mounts.push(mount("/etc/resolv.conf", "bind", resolver.to_string_lossy(), &options));
    }
    if users.is_some() {
        without_foreign(spec, host_network(wanted.config));
    }
    if privileged {
        for made in spec.mounts.iter_mut().filter(|made| made.destination == "/sys") {
            for option in made.options.iter_mut().filter(|option| *option == "ro") {
                "rw".clone_into(option);
            }
        }
    }
}

fn strings(list: &[&str]) -> Vec<String> {
    list.iter().map(|text| (*text).to_owned()).collect()
}

/// How deep a path is.
pub(super) fn parts(path: &str) -> usize {
    clean(path).matches('/').count()
}

/// The path without what does not change it: `.`, `..`, slashes in a row or at the end.
pub(super) fn clean(path: &str) -> String {
    let rooted = path.starts_with('/');
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('/') {
        match part {
            "" | "." => {}
            ".." if parts.last().is_some_and(|last| *last != "..") => drop(parts.pop()),
            ".." if rooted => {}
            part => parts.push(part),
        }
    }
    match (rooted, parts.join("/")) {
        (true, rest) => format!("/{rest}"),
        (false, rest) if rest.is_empty() => ".".into(),
        (false, rest) => rest,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_compared_without_what_does_not_matter() {
        for (path, cleaned) in [
            ("/", "/"),
            ("//a///b/", "/a/b"),
            ("/a/./b/../c", "/a/c"),
            ("/../..", "/"),
            ("a/../..", ".."),
            ("", "."),
        ] {
            assert_eq!(clean(path), cleaned, "{path:?}");
        }
        assert!(parts("/a") < parts("/a/b") && parts("/a/b/../") == parts("/x"));
    }
}
