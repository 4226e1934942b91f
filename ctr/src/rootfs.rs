//! Looking into a container's root file system for its account files, without being led out of it.
//!
//! The snapshot is mounted read-only on a private folder for the moment of reading. Files are opened with
//! `RESOLVE_IN_ROOT`, so a link in the image leads to another file of the image; only regular files are
//! read, and no more than [`oci::user::FILE_LIMIT`] bytes of each.

use std::fs::File;
use std::io::Read;
use std::os::fd::OwnedFd;
use std::path::Path;

use anyhow::{Context, ensure};
use oci::runtime::User;
use oci::user::{Accounts, FILE_LIMIT};
use proto::containerd::types::Mount;
use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};

/// Contents of /etc/passwd and /etc/group; empty where there is none.
#[derive(Default)]
pub(crate) struct AccountFiles {
    passwd: Vec<u8>,
    group: Vec<u8>,
}

impl AccountFiles {
    /// Resolves `user` (empty: root) against them.
    pub(crate) fn resolve(&self, user: &str) -> Result<User, oci::user::UserError> {
        oci::user::resolve(user, Accounts { passwd: &self.passwd, group: &self.group })
    }
}

/// Resolves `user` in the file system that `mounts` make. Mounting needs root; where that fails, a user that is
/// a mere number is still resolved, without supplementary groups.
pub(crate) fn resolve_in_mounts(mounts: Vec<Mount>, user: &str) -> anyhow::Result<User> {
    let mounts: Vec<sys::mount::Mount> = mounts.into_iter().map(read_only).collect();
    match sys::mount::Mounted::new(&mounts, &std::env::temp_dir()) {
        Ok(mounted) => resolve_in_folder(mounted.path(), user),
        Err(_) if !oci::user::needs_accounts(user) => Ok(AccountFiles::default().resolve(user)?),
        Err(error) => Err(error).with_context(|| {
            format!("cannot mount the image to look up user {user:?}; run ctr as root, or give numeric ids")
        }),
    }
}

/// Resolves `user` in the file system at `root`.
pub(crate) fn resolve_in_folder(root: &Path, user: &str) -> anyhow::Result<User> {
    let folder =
        rustix::fs::openat(CWD, root, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .with_context(|| format!("cannot open {}", root.display()))?;
    let files = AccountFiles { passwd: read(&folder, "etc/passwd")?, group: read(&folder, "etc/group")? };
    Ok(files.resolve(user)?)
}

fn read(root: &OwnedFd, path: &str) -> anyhow::Result<Vec<u8>> {
    // Non-blocking, so that a fifo in the place of the file cannot hold us up.
    let flags = OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NONBLOCK | OFlags::NOCTTY;
    let resolve = ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS;
    let file = match rustix::fs::openat2(root, path, flags, Mode::empty(), resolve) {
        Ok(file) => file,
        Err(rustix::io::Errno::NOENT | rustix::io::Errno::NOTDIR) => return Ok(Vec::new()),
        Err(error) => return Err(error).with_context(|| format!("cannot open the image's /{path}")),
    };
    let kind = FileType::from_raw_mode(rustix::fs::fstat(&file)?.st_mode);
    ensure!(kind == FileType::RegularFile, "the image's /{path} is not a regular file");
    let mut bytes = Vec::new();
    // One byte more than allowed tells a file that is too large from one that just fits.
    File::from(file).take(FILE_LIMIT + 1).read_to_end(&mut bytes)?;
    Ok(bytes)
}

/// A mount of the API as the kernel's.
pub(crate) fn local(mount: Mount) -> sys::mount::Mount {
    sys::mount::Mount {
        kind: mount.r#type,
        source: mount.source,
        target: mount.target,
        options: mount.options,
    }
}

/// The same mount, but nothing can be written by it: an overlay's upper folder becomes its topmost lower one.
fn read_only(mount: Mount) -> sys::mount::Mount {
    let mut options: Vec<String> = Vec::new();
    let find =
        |name: &str| mount.options.iter().find_map(|option| option.strip_prefix(name).map(str::to_owned));
    let upper = (mount.r#type == "overlay").then(|| find("upperdir=")).flatten();
    for option in &mount.options {
        match (&upper, option.strip_prefix("lowerdir=")) {
            (Some(upper), Some(lower)) => options.push(format!("lowerdir={upper}:{lower}")),
            (Some(_), None) if option.starts_with("upperdir=") || option.starts_with("workdir=") => {}
            _ if option == "rw" || option == "ro" => {}
            _ => options.push(option.clone()),
        }
    }
    options.push("ro".to_owned());
    local(Mount { options, ..mount })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn root_with(passwd: &[u8]) -> tempfile::TempDir {
        let root = tempfile::tempdir().unwrap();
        std::fs::create_dir(root.path().join("etc")).unwrap();
        std::fs::write(root.path().join("etc/passwd"), passwd).unwrap();
        root
    }

    #[test]
    fn finds_users_of_the_image() {
        let root = root_with(b"web:x:33:34::/:\n");
        let user = resolve_in_folder(root.path(), "web").unwrap();
        assert_eq!((user.uid, user.gid), (33, 34));
        assert!(resolve_in_folder(root.path(), "nobody-here").is_err());
    }

    #[test]
    fn links_stay_inside() {
        let root = root_with(b"");
        let passwd = root.path().join("etc/passwd");
        std::fs::remove_file(&passwd).unwrap();
        let outside = tempfile::tempdir().unwrap();
        std::fs::write(outside.path().join("passwd"), b"web:x:1:1::/:\n").unwrap();
        symlink(outside.path().join("passwd"), &passwd).unwrap();
        assert!(resolve_in_folder(root.path(), "web").is_err());
        std::fs::remove_file(&passwd).unwrap();
        std::fs::write(root.path().join("real"), b"web:x:5:6::/:\n").unwrap();
        symlink("/real", &passwd).unwrap();
        assert_eq!(resolve_in_folder(root.path(), "web").unwrap().uid, 5);
    }

    #[test]
    fn odd_files_are_refused_without_blocking() {
        let root = root_with(b"");
        let passwd = root.path().join("etc/passwd");
        std::fs::remove_file(&passwd).unwrap();
        sys::fifo::create(&passwd, 0o600).unwrap();
        assert!(resolve_in_folder(root.path(), "1").unwrap_err().to_string().contains("not a regular file"));
        std::fs::remove_file(&passwd).unwrap();
        std::fs::create_dir(&passwd).unwrap();
        assert!(resolve_in_folder(root.path(), "1").is_err());
    }

    #[test]
    fn overlays_become_read_only() {
        let mount = Mount {
            r#type: "overlay".into(),
            source: "overlay".into(),
            options: ["index=off", "workdir=/w", "upperdir=/u", "lowerdir=/a:/b"].map(str::to_owned).into(),
            ..Mount::default()
        };
        assert_eq!(read_only(mount).options, ["index=off", "lowerdir=/u:/a:/b", "ro"]);
        let bind =
            Mount { r#type: "bind".into(), options: vec!["rw".into(), "rbind".into()], ..Mount::default() };
        assert_eq!(read_only(bind).options, ["rbind", "ro"]);
    }
}
