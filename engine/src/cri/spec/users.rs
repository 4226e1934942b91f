//! Whom a container runs as: what the kubelet says, else what its image says, looked up in the image's account files.
//!
//! Invariant: an id out of range is an error, never somebody else's.

use oci::runtime::{Spec, User};
use oci::user::{Accounts, ID_LIMIT, resolve};
use proto::runtime::v1::{
    ContainerUser, Int64Value, LinuxContainerUser, LinuxSandboxSecurityContext, SupplementalGroupsPolicy,
};

use super::Wanted;
use crate::error::{Error, Result};

/// The user of a container.
pub(super) fn of_container(wanted: &Wanted<'_>) -> Result<User> {
    let security = wanted.security().cloned().unwrap_or_default();
    let policy = SupplementalGroupsPolicy::try_from(security.supplemental_groups_policy).map_err(|_| {
        Error::unimplemented(format!(
            "supplemental groups policy {} is not known; use Merge or Strict",
            security.supplemental_groups_policy
        ))
    })?;
    let (uid, gid) = (security.run_as_user.as_ref(), security.run_as_group.as_ref());
    let mut asked = spelled(&security.run_as_username, uid, gid)?;
    if asked.is_empty() {
        asked.clone_from(&wanted.image.user);
    }
    let mut user = look_up(&asked, wanted.accounts)?;
    if policy == SupplementalGroupsPolicy::Strict {
        user.additional_gids = vec![user.gid];
    }
    add_groups(&mut user, &security.supplemental_groups)?;
    Ok(user)
}

/// The user of a pause container.
pub(super) fn of_pod(
    security: Option<&LinuxSandboxSecurityContext>,
    image: &str,
    accounts: Accounts<'_>,
) -> Result<User> {
    let security = security.cloned().unwrap_or_default();
    let mut asked = spelled("", security.run_as_user.as_ref(), security.run_as_group.as_ref())?;
    if asked.is_empty() {
        image.clone_into(&mut asked);
    }
    let mut user = look_up(&asked, accounts)?;
    add_groups(&mut user, &security.supplemental_groups)?;
    Ok(user)
}

/// `user[:group]` as an image would have it; a name counts before a number, and a group alone is not enough.
fn spelled(name: &str, uid: Option<&Int64Value>, gid: Option<&Int64Value>) -> Result<String> {
    let user = match (name, uid) {
        ("", None) => String::new(),
        ("", Some(uid)) => uid.value.to_string(),
        (name, _) => name.to_owned(),
    };
    match gid {
        None => Ok(user),
        Some(gid) if user.is_empty() => Err(Error::invalid_argument(format!(
            "run_as_group {} is set without run_as_user or run_as_username; set one of them",
            gid.value
        ))),
        Some(gid) => Ok(format!("{user}:{}", gid.value)),
    }
}

fn look_up(user: &str, accounts: Accounts<'_>) -> Result<User> {
    resolve(user, accounts).map_err(|error| Error::invalid_argument(format!("whom to run as: {error}")))
}

fn add_groups(user: &mut User, groups: &[i64]) -> Result<()> {
    for group in groups {
        let gid = u32::try_from(*group).ok().filter(|gid| *gid <= ID_LIMIT).ok_or_else(|| {
            Error::invalid_argument(format!(
                "supplemental group {group} is out of range, it must be between 0 and {ID_LIMIT}"
            ))
        })?;
        user.additional_gids.push(gid);
    }
    user.additional_gids.sort_unstable();
    user.additional_gids.dedup();
    Ok(())
}

/// What ContainerStatus says of it.
pub(super) fn reported(spec: &Spec) -> ContainerUser {
    let user = spec.process.as_ref().map(|process| process.user.clone()).unwrap_or_default();
    let linux = LinuxContainerUser {
        uid: user.uid.into(),
        gid: user.gid.into(),
        supplemental_groups: user.additional_gids.into_iter().map(i64::from).collect(),
    };
    ContainerUser { linux: Some(linux) }
}
