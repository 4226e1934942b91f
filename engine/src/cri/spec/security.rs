//! What keeps a container in: capabilities, the filter of system calls, AppArmor, SELinux.
//!
//! A profile that is asked for where the kernel has nothing to enforce it is an error; an SELinux label is left out there, as
//! Kubernetes sends one to every node.

use oci::runtime::{Capabilities, Spec};
use oci::spec::DEFAULT_CAPABILITIES;
use proto::runtime::v1::security_profile::ProfileType;
use proto::runtime::v1::{Capability, SeLinuxOption, SecurityProfile};
use serde_json::Value;

use super::{Host, Options, Selinux, Wanted, WantedPod, apparmor};
use crate::error::{Error, Result};

/// What profiles of files on this machine are written with in front.
const LOCALHOST: &str = "localhost/";
const ALL: &str = "ALL";

/// Sets the capabilities: the default ones, or all that the engine has, or none, and then those by name; what is dropped by
/// name counts last. Names are as Kubernetes has them, without `CAP_`. One that is not known here is the runtime's to judge,
/// which knows the kernel.
pub(super) fn set_capabilities(spec: &mut Spec, asked: Option<&Capability>, host: &Host) {
    let sets = spec.process_mut().capabilities.get_or_insert_with(|| {
        let default: Vec<String> = DEFAULT_CAPABILITIES.iter().map(|name| (*name).to_owned()).collect();
        same_sets(&default)
    });
    // Ambient ones are for programs that have no privileges of their own: they take asking.
    sets.ambient.clear();
    let Some(asked) = asked else { return };
    let all = |names: &[String]| names.iter().any(|name| name.eq_ignore_ascii_case(ALL));
    if all(&asked.add_capabilities) {
        *sets = same_sets(&host.capabilities);
    }
    if all(&asked.drop_capabilities) {
        *sets = Capabilities::default();
    }
    for name in named(&asked.add_capabilities) {
        for set in [&mut sets.bounding, &mut sets.effective, &mut sets.permitted] {
            add(set, &name);
        }
    }
    let mut ambient: Vec<String> = named(&asked.add_ambient_capabilities).collect();
    if all(&asked.add_ambient_capabilities) {
        ambient.extend(host.capabilities.iter().cloned());
    }
    for name in ambient {
        // An ambient capability is a permitted and an inheritable one.
        let Capabilities { bounding, effective, permitted, inheritable, ambient } = sets;
        for set in [bounding, effective, permitted, inheritable, ambient] {
            add(set, &name);
        }
    }
    for name in named(&asked.drop_capabilities) {
        let Capabilities { bounding, effective, permitted, inheritable, ambient } = sets;
        for set in [bounding, effective, permitted, inheritable, ambient] {
            set.retain(|has| *has != name);
        }
    }
}

fn same_sets(names: &[String]) -> Capabilities {
    let (bounding, effective, permitted) = (names.to_vec(), names.to_vec(), names.to_vec());
    Capabilities { bounding, effective, permitted, ..Capabilities::default() }
}

fn add(set: &mut Vec<String>, name: &str) {
    if !set.iter().any(|has| has == name) {
        set.push(name.to_owned());
    }
}

fn named(names: &[String]) -> impl Iterator<Item = String> {
    names.iter().filter(|name| !name.eq_ignore_ascii_case(ALL)).map(|name| {
        let upper = name.to_ascii_uppercase();
        if upper.starts_with("CAP_") { upper } else { format!("CAP_{upper}") }
    })
}

/// The profile that a text of older kubelets or of the configuration stands for.
fn spelled(what: &str, text: &str) -> Result<SecurityProfile> {
    let of = |kind: ProfileType, name: &str| SecurityProfile {
        profile_type: kind.into(),
        localhost_ref: name.to_owned(),
    };
    match text {
        "" | "runtime/default" | "docker/default" => Ok(of(ProfileType::RuntimeDefault, "")),
        "unconfined" => Ok(of(ProfileType::Unconfined, "")),
        _ => match text.strip_prefix(LOCALHOST) {
            Some(name) => Ok(of(ProfileType::Localhost, name)),
            None => Err(Error::invalid_argument(format!(
                "{what} profile {text:?} is none of runtime/default, unconfined and localhost/NAME"
            ))),
        },
    }
}

/// A profile, checked; None is unconfined.
fn checked(what: &str, profile: &SecurityProfile) -> Result<Option<Checked>> {
    let kind = ProfileType::try_from(profile.profile_type).map_err(|_| {
        Error::invalid_argument(format!("{what} profile type {} is not known", profile.profile_type))
    })?;
    if kind != ProfileType::Localhost && !profile.localhost_ref.is_empty() {
        return Err(Error::invalid_argument(format!(
            "{what} profile names {:?} on this machine, but is not of the type Localhost",
            profile.localhost_ref
        )));
    }
    Ok(match kind {
        ProfileType::Unconfined => None,
        ProfileType::RuntimeDefault => Some(Checked::Default),
        ProfileType::Localhost => {
            let name = profile.localhost_ref.strip_prefix(LOCALHOST).unwrap_or(&profile.localhost_ref);
            Some(Checked::Localhost(name.to_owned()))
        }
    })
}

/// What confines.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Checked {
    /// Our own default.
    Default,
    /// A file, or a loaded profile, of this machine.
    Localhost(String),
}

/// The filter of system calls that is asked for; the newer field counts.
pub(super) fn seccomp_asked(
    profile: Option<&SecurityProfile>,
    path: &str,
    privileged: bool,
    options: &Options,
) -> Result<Option<Checked>> {
    let path = if path.is_empty() { &options.unset_seccomp_profile } else { path };
    match profile {
        _ if privileged => Ok(None),
        Some(profile) => checked("seccomp", profile),
        None if path.is_empty() => Ok(None),
        None => checked("seccomp", &spelled("seccomp", path)?),
    }
}

fn seccomp(asked: Option<&Checked>, read: Option<&Value>, spec: &Spec, host: &Host) -> Result<Option<Value>> {
    match asked {
        None => Ok(None),
        Some(_) if !host.seccomp => Err(Error::failed_precondition(
            "a seccomp profile is asked for, but seccomp is not supported by this kernel: ask for Unconfined",
        )),
        Some(Checked::Default) => {
            let sets = spec.process.as_ref().and_then(|process| process.capabilities.as_ref());
            Ok(Some(oci::seccomp::default_profile(sets.map_or(&[][..], |sets| &sets.bounding))))
        }
        Some(Checked::Localhost(path)) => match read {
            Some(profile) => Ok(Some(profile.clone())),
            None => Err(Error::not_found(format!("seccomp profile {path:?} has not been read"))),
        },
    }
}

/// A container's filter of system calls.
pub(super) fn seccomp_of_container(wanted: &Wanted<'_>, spec: &Spec) -> Result<Option<Value>> {
    let asked = seccomp_asked_by_container(wanted.container, wanted.options)?;
    seccomp(asked.as_ref(), wanted.facts.seccomp.as_ref(), spec, wanted.host)
}

/// What a container asks for.
pub(super) fn seccomp_asked_by_container(
    container: &proto::runtime::v1::ContainerConfig,
    options: &Options,
) -> Result<Option<Checked>> {
    let security = container.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let path = security.map_or("", |security| &security.seccomp_profile_path);
    let privileged = security.is_some_and(|security| security.privileged);
    seccomp_asked(security.and_then(|security| security.seccomp.as_ref()), path, privileged, options)
}

/// A pause container's filter of system calls.
pub(super) fn seccomp_of_pod(wanted: &WantedPod<'_>, spec: &Spec) -> Result<Option<Value>> {
    let asked = seccomp_asked_by_pod(wanted.config, wanted.options)?;
    seccomp(asked.as_ref(), wanted.seccomp, spec, wanted.host)
}

/// What a pod asks for.
pub(super) fn seccomp_asked_by_pod(
    config: &proto::runtime::v1::PodSandboxConfig,
    options: &Options,
) -> Result<Option<Checked>> {
    let security = super::pod_security(config);
    let path = security.map_or("", |security| &security.seccomp_profile_path);
    let privileged = security.is_some_and(|security| security.privileged);
    seccomp_asked(security.and_then(|security| security.seccomp.as_ref()), path, privileged, options)
}

/// The AppArmor profile that a container asks for; where the kernel has AppArmor, who asks for none gets the default one.
pub(super) fn apparmor_asked(
    container: &proto::runtime::v1::ContainerConfig,
    host: &Host,
    options: &Options,
) -> Result<Option<Checked>> {
    let security = container.linux.as_ref().and_then(|linux| linux.security_context.as_ref());
    let text = security.map_or("", |security| &security.apparmor_profile);
    let asked = match security.and_then(|security| security.apparmor.as_ref()) {
        Some(profile) => Some(profile.clone()),
        None if text.is_empty() => None,
        None => Some(spelled("AppArmor", text)?),
    };
    if !host.apparmor || options.disable_apparmor {
        let unconfined = |profile: &SecurityProfile| profile.profile_type() == ProfileType::Unconfined;
        return match asked.as_ref().is_none_or(unconfined) {
            true => Ok(None),
            false => Err(Error::failed_precondition(
                "an AppArmor profile is asked for, but AppArmor is not supported: this kernel has none, or \
                 disable_apparmor is set; ask for Unconfined",
            )),
        };
    }
    let privileged = security.is_some_and(|security| security.privileged);
    Ok(match checked("AppArmor", &asked.unwrap_or_default())? {
        Some(Checked::Default) if privileged => None,
        checked => checked,
    })
}

/// A container's AppArmor profile; empty for none.
pub(super) fn apparmor_of_container(wanted: &Wanted<'_>) -> Result<String> {
    let name = match apparmor_asked(wanted.container, wanted.host, wanted.options)? {
        None => return Ok(String::new()),
        Some(Checked::Default) => apparmor::DEFAULT.to_owned(),
        Some(Checked::Localhost(name)) => name,
    };
    match wanted.facts.apparmor.contains(&name) {
        true => Ok(name),
        false => Err(Error::not_found(format!(
            "AppArmor profile {name:?} is not loaded on this machine; load it by apparmor_parser"
        ))),
    }
}

/// SELinux labels; empty where there are none.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Labels {
    pub(super) process: String,
    pub(super) mount: String,
}

/// A container's labels: its own options', or its pod's.
pub(super) fn labels_of_container(wanted: &Wanted<'_>) -> Result<Labels> {
    let own = wanted.security().and_then(|security| security.selinux_options.as_ref());
    let pod = super::pod_security(wanted.pod).and_then(|security| security.selinux_options.as_ref());
    let own = own.filter(|own| **own != SeLinuxOption::default());
    labels(own.or(pod), wanted.pod_id, wanted.host, wanted.options)
}

/// The labels by these options, for the pod of this id.
pub(super) fn labels(
    asked: Option<&SeLinuxOption>,
    pod_id: &str,
    host: &Host,
    options: &Options,
) -> Result<Labels> {
    let asked = asked.cloned().unwrap_or_default();
    if !is_level(&asked.level) {
        return Err(Error::invalid_argument(format!(
            "SELinux level {:?} is not of the form s0:c1,c2",
            asked.level
        )));
    }
    let Some(Selinux { process, file }) = host.selinux.as_ref().filter(|_| options.enable_selinux) else {
        return Ok(Labels::default());
    };
    let level = if asked.level.is_empty() { own_level(pod_id) } else { asked.level };
    let put = |context: &str, role: &str, kind: &str| {
        let mut parts: Vec<&str> = context.splitn(4, ':').collect();
        parts.resize(4, "");
        for (at, value) in [(0, asked.user.as_str()), (1, role), (2, kind), (3, &level)] {
            if !value.is_empty() {
                parts[at] = value;
            }
        }
        parts.join(":")
    };
    Ok(Labels { process: put(process, &asked.role, &asked.r#type), mount: put(file, "", "") })
}

/// `s0`, `s0-s1`, and categories of them: `s0:c1,c2.c5`.
fn is_level(level: &str) -> bool {
    let sensitivity = |text: &str| matches!(text.as_bytes(), [b's', digit] if digit.is_ascii_digit());
    let category = |text: &str| {
        text.strip_prefix('c').is_some_and(|digits| {
            (1..=4).contains(&digits.len()) && digits.bytes().all(|byte| byte.is_ascii_digit())
        })
    };
    if level.is_empty() {
        return true;
    }
    let (levels, categories) = match level.split_once(':') {
        Some((levels, categories)) => (levels, Some(categories)),
        None => (level, None),
    };
    let range = |text: &str| match text.split_once('.') {
        Some((first, last)) => category(first) && category(last),
        None => category(text),
    };
    let known = match levels.split_once('-') {
        Some((low, high)) => sensitivity(low) && sensitivity(high),
        None => sensitivity(levels),
    };
    known && categories.is_none_or(|categories| categories.split(',').all(range))
}

/// Two categories that the pod's id leads to: its containers share them, and other pods hardly do.
fn own_level(pod_id: &str) -> String {
    const CATEGORIES: u64 = 1024;
    let digest = oci::Digest::sha256_of(pod_id.as_bytes());
    let number = u64::from_str_radix(&digest.hex()[..12], 16).unwrap_or_default();
    let first = number % CATEGORIES;
    // Another than the first.
    let second = (first + 1 + number / CATEGORIES % (CATEGORIES - 1)) % CATEGORIES;
    format!("s0:c{},c{}", first.min(second), first.max(second))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn levels_are_checked() {
        for level in ["", "s0", "s0-s1", "s0:c1", "s0:c1,c2", "s0-s5:c0.c1023,c5", "s9:c1.c2"] {
            assert!(is_level(level), "{level}");
        }
        for level in ["s", "s10", "c1", "s0:", "s0:d1", "s0:c12345", "s0:c1.c2.c3", "s0;rm", "s0:c1,", "s0-"]
        {
            assert!(!is_level(level), "{level}");
        }
    }

    #[test]
    fn a_pods_level_is_its_own_and_always_the_same() {
        let level = own_level("a");
        assert_eq!(level, own_level("a"));
        assert_ne!(level, own_level("b"));
        for id in 0..200 {
            let level = own_level(&id.to_string());
            assert!(is_level(&level), "{level}");
            let (first, second) = level.strip_prefix("s0:").unwrap().split_once(',').unwrap();
            assert_ne!(first, second);
        }
    }
}
