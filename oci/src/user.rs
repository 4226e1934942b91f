//! Users and groups of an image: `name|uid[:group|gid]` resolved against the contents of the
//! image's own /etc/passwd and /etc/group.
//!
//! Both files are hostile input. The caller hands in at most [`FILE_LIMIT`] bytes of each;
//! lines that do not parse are skipped; ids are at most 2^31 - 1, which is what runtimes take.
//! A number out of that range is an error, never a name and never 0.

use crate::runtime::User;

/// Most bytes of /etc/passwd or /etc/group that are considered.
pub const FILE_LIMIT: u64 = 4 << 20;
/// Longest line that is considered, in bytes.
const LINE_LIMIT: usize = 64 << 10;
/// Most supplementary groups a process can have (NGROUPS_MAX).
const GROUP_LIMIT: usize = 65_536;
/// Largest id of a user or a group.
pub const ID_LIMIT: u32 = i32::MAX as u32;

/// Contents of the account files; empty where the image has none.
#[derive(Clone, Copy, Debug, Default)]
pub struct Accounts<'a> {
    /// /etc/passwd.
    pub passwd: &'a [u8],
    /// /etc/group.
    pub group: &'a [u8],
}

/// Why a user cannot be resolved.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum UserError {
    /// Empty, or more than one colon.
    #[error("user {0:?} is not of the form name|uid[:group|gid]")]
    Form(String),
    /// A number that is not in 0 to 2^31-1.
    #[error("user {0:?}: id is out of range, it must be between 0 and 2147483647")]
    Range(String),
    /// Not in /etc/passwd.
    #[error("user {0:?} is not in the image's /etc/passwd; use a numeric id, or add the user to the image")]
    NoUser(String),
    /// Not in /etc/group.
    #[error("group {0:?} is not in the image's /etc/group; use a numeric id, or add the group to the image")]
    NoGroup(String),
    /// One of the files is larger than [`FILE_LIMIT`].
    #[error("the image's {0} is larger than {FILE_LIMIT} bytes")]
    TooLarge(&'static str),
}

/// A user or group as written: a number or a name.
enum Name<'a> {
    Id(u32),
    Text(&'a str),
}

fn name_of<'a>(text: &'a str, whole: &str) -> Result<Name<'a>, UserError> {
    if text.is_empty() {
        return Err(UserError::Form(whole.to_owned()));
    }
    let digits = text.strip_prefix(['-', '+']).unwrap_or(text);
    // Anything written as a number is a number: an id out of range must not be looked up as a name.
    if !digits.is_empty() && digits.bytes().all(|b| b.is_ascii_digit()) {
        return match text.trim_start_matches('+').parse::<u32>() {
            Ok(id) if id <= ID_LIMIT => Ok(Name::Id(id)),
            _ => Err(UserError::Range(whole.to_owned())),
        };
    }
    Ok(Name::Text(text))
}

/// Whether resolving `user` needs the image's account files at all. `uid:gid` does not, but its
/// supplementary groups may; a caller that has the files should hand them in always.
pub fn needs_accounts(user: &str) -> bool {
    !user.is_empty() && !user.split(':').all(|part| part.parse::<u32>().is_ok())
}

/// Resolves `user`. An empty one is root with root's supplementary groups.
///
/// A uid that /etc/passwd does not know gets group 0. Supplementary groups are those of
/// /etc/group that list the user by name; the primary group is always among them.
pub fn resolve(user: &str, accounts: Accounts<'_>) -> Result<User, UserError> {
    for (file, name) in [(accounts.passwd, "/etc/passwd"), (accounts.group, "/etc/group")] {
        if file.len() as u64 > FILE_LIMIT {
            return Err(UserError::TooLarge(name));
        }
    }
    let whole = if user.is_empty() { "0" } else { user };
    let (user_part, group_part) = match whole.split_once(':') {
        Some((_, group)) if group.contains(':') => return Err(UserError::Form(whole.to_owned())),
        Some((user, group)) => (user, Some(group)),
        None => (whole, None),
    };
    // Both halves are read before either is looked up, so a malformed user is always told as such.
    let (user_name, group_name) =
        (name_of(user_part, whole)?, group_part.map(|part| name_of(part, whole)).transpose()?);
    let (uid, account) = match user_name {
        Name::Id(uid) => (uid, passwd(accounts.passwd).find(|account| account.uid == uid)),
        Name::Text(name) => {
            let account = passwd(accounts.passwd)
                .find(|account| account.name == name)
                .ok_or_else(|| UserError::NoUser(name.to_owned()))?;
            (account.uid, Some(account))
        }
    };
    let gid = match group_name {
        None => account.as_ref().map_or(0, |account| account.gid),
        Some(Name::Id(gid)) => gid,
        Some(Name::Text(name)) => {
            let group = groups(accounts.group).find(|group| group.name == name);
            group.ok_or_else(|| UserError::NoGroup(name.to_owned()))?.gid
        }
    };
    // Root has its groups even where /etc/passwd is missing.
    let name = account.as_ref().map(|account| account.name).or((uid == 0).then_some("root"));
    let mut additional_gids = vec![gid];
    if let Some(name) = name {
        for group in groups(accounts.group) {
            if additional_gids.len() == GROUP_LIMIT {
                break;
            }
            if group.name != name && group.members.split(',').any(|member| member == name) {
                additional_gids.push(group.gid);
            }
        }
        let mut seen = std::collections::HashSet::new();
        additional_gids.retain(|gid| seen.insert(*gid));
    }
    Ok(User { uid, gid, additional_gids, ..User::default() })
}

struct Account<'a> {
    name: &'a str,
    uid: u32,
    gid: u32,
}

struct Group<'a> {
    name: &'a str,
    gid: u32,
    members: &'a str,
}

fn lines(file: &[u8]) -> impl Iterator<Item = &str> {
    file.split(|b| *b == b'\n')
        .filter(|line| line.len() <= LINE_LIMIT)
        .filter_map(|line| std::str::from_utf8(line).ok())
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with('#'))
}

fn id(text: &str) -> Option<u32> {
    text.parse().ok().filter(|id| *id <= ID_LIMIT)
}

fn passwd(file: &[u8]) -> impl Iterator<Item = Account<'_>> {
    lines(file).filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let uid = fields.nth(1).and_then(id)?;
        let gid = fields.next().and_then(id)?;
        Some(Account { name, uid, gid })
    })
}

fn groups(file: &[u8]) -> impl Iterator<Item = Group<'_>> {
    lines(file).filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next().filter(|name| !name.is_empty())?;
        let gid = fields.nth(1).and_then(id)?;
        Some(Group { name, gid, members: fields.next().unwrap_or("") })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const ACCOUNTS: Accounts<'static> = Accounts {
        passwd: b"# comment\nroot:x:0:0:root:/root:/bin/sh\nweb:x:33:34::/:\nbroken\nhuge:x:4294967296:0::/:\nbig:x:2147483648:1::/:\n",
        group: b"root:x:0:root\nweb:x:34:\ndisk:x:6:root,web\nlog:x:7:web\nbad:x:zz:web\n",
    };

    fn ids(user: &str) -> (u32, u32, Vec<u32>) {
        let user = resolve(user, ACCOUNTS).unwrap();
        (user.uid, user.gid, user.additional_gids)
    }

    #[test]
    fn resolves_names_and_numbers() {
        assert_eq!(ids(""), (0, 0, vec![0, 6]));
        assert_eq!(ids("root"), (0, 0, vec![0, 6]));
        assert_eq!(ids("web"), (33, 34, vec![34, 6, 7]));
        assert_eq!(ids("33"), (33, 34, vec![34, 6, 7]));
        assert_eq!(ids("1000"), (1000, 0, vec![0]));
        assert_eq!(ids("1000:2000"), (1000, 2000, vec![2000]));
        assert_eq!(ids("web:disk"), (33, 6, vec![6, 7]));
        assert_eq!(ids("2147483647:2147483647").0, 2_147_483_647);
        let bare = resolve("5:6", Accounts::default()).unwrap();
        assert_eq!((bare.uid, bare.gid, bare.additional_gids), (5, 6, vec![6]));
    }

    #[test]
    fn refuses_what_could_become_root() {
        for out in [
            "2147483648",
            "4294967296",
            "-1",
            "18446744073709551616",
            "99999999999999999999999",
            "1:4294967295",
        ] {
            assert!(matches!(resolve(out, ACCOUNTS), Err(UserError::Range(_))), "{out}");
        }
        // Entries of the image's own files with ids out of range do not exist.
        assert_eq!(resolve("huge", ACCOUNTS), Err(UserError::NoUser("huge".into())));
        assert_eq!(resolve("big", ACCOUNTS), Err(UserError::NoUser("big".into())));
        assert_eq!(resolve("web:nope", ACCOUNTS), Err(UserError::NoGroup("nope".into())));
        for bad in [":", "a:", ":b", "a:b:c"] {
            assert!(matches!(resolve(bad, ACCOUNTS), Err(UserError::Form(_))), "{bad}");
        }
        let large = vec![b'a'; FILE_LIMIT as usize + 1];
        let accounts = Accounts { passwd: &large, group: b"" };
        assert_eq!(resolve("a", accounts), Err(UserError::TooLarge("/etc/passwd")));
    }

    #[test]
    fn knows_when_files_are_needed() {
        assert!(needs_accounts("web"));
        assert!(needs_accounts("1:web"));
        assert!(!needs_accounts("1:2"));
        assert!(!needs_accounts(""));
    }

    proptest! {
        #[test]
        fn hostile_files_never_panic(user in "[a-z0-9:+-]{0,12}", passwd in prop::collection::vec(any::<u8>(), 0..200),
                                     group in "[a-z0-9:,\n]{0,200}") {
            if let Ok(user) = resolve(&user, Accounts { passwd: &passwd, group: group.as_bytes() }) {
                prop_assert!(user.uid <= ID_LIMIT && user.gid <= ID_LIMIT);
                prop_assert_eq!(user.additional_gids[0], user.gid);
            }
        }
    }
}
