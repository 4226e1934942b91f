//! Unpacking a layer: an archive's members become files, its whiteouts hide what lower layers hold.
//!
//! ```text
//!  member                      folder of an overlay (upperdir)             plain folder
//!  a/.wh.b                     a/b: character device 0, 0                  a/b removed
//!  a/.wh..wh..opq              a: trusted.overlay.opaque=y                 what lower layers put into a, removed
//!  a/.wh..wh.NAME              (AUFS's own files) skipped                  skipped
//!  a/.wh.b/c                   refused: nothing lives in a whiteout        refused
//! ```
//!
//! A whiteout hides what is below its layer, never what the layer itself brings, in whatever order both come.
//!
//! Invariants: every change goes through [`sys::beneath`], so a layer cannot touch anything out of its folder. A member
//! replaces what has its name; only a folder onto a folder merges. The attributes that steer overlayfs (`trusted.*`)
//! never come from a layer.

use std::collections::{BTreeMap, HashSet};
use std::ffi::OsStr;
use std::fs::File;
use std::io::{self, BufRead, Seek, SeekFrom, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::os::unix::fs::PermissionsExt as _;
use std::sync::OnceLock;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use rustix::fs::{FileType, Stat};
use sys::beneath::{Place, Root, Special, components};

use super::archive::{Archive, ArchiveError, Kind, Member};
use crate::error::{Error, Result};

pub(crate) const WHITEOUT: &[u8] = b".wh.";
pub(crate) const AUFS: &[u8] = b".wh..wh.";
pub(crate) const OPAQUE: &[u8] = b".wh..wh..opq";
pub(crate) const OVERLAY_OPAQUE: &str = "trusted.overlay.opaque";
/// How deep a tree may be in which an opaque folder removes what is stale.
const DEPTH: usize = 512;

/// Where a layer is unpacked to.
pub(super) struct Target {
    root: Root,
    /// Whether the root is an overlay's upper folder: then whiteouts are overlayfs's own marks.
    overlay: bool,
    /// What of an overlay's upper folder depends on the lower ones.
    unsettled: Unsettled,
    /// Folders that were there already when the layer listed them, by inode.
    listed: HashSet<u64>,
    /// Whether there is nothing beneath, so that whiteouts hide nothing.
    base: bool,
    /// Whether a folder of this layer may give what is made in it a group or an access list.
    inherits: bool,
    /// What this layer brought, by device and inode; kept for plain folders, where stale and new lie side by side.
    unpacked: HashSet<(u64, u64)>,
    /// Folders and their times, which are set last: making files in a folder changes them.
    folders: Vec<(Vec<u8>, SystemTime, SystemTime)>,
}

/// What of an unpacked layer depends on the layers beneath it.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Unsettled {
    /// Whether the layer hides all of them.
    opaque: bool,
    /// Folders that the layer needs and does not list: their paths and inodes.
    folders: BTreeMap<Vec<u8>, u64>,
}

impl Unsettled {
    /// Whether nothing does.
    pub fn is_empty(&self) -> bool {
        !self.opaque && self.folders.is_empty()
    }
}

impl Target {
    /// A folder in which all layers so far are merged: whiteouts remove.
    pub(super) fn plain(root: Root) -> Self {
        Target {
            root,
            overlay: false,
            unsettled: Unsettled::default(),
            listed: HashSet::new(),
            base: false,
            inherits: true,
            unpacked: HashSet::new(),
            folders: Vec::new(),
        }
    }

    /// An overlay's upper folder.
    pub(super) fn overlay(root: Root) -> Self {
        Target { overlay: true, ..Target::plain(root) }
    }

    /// An overlay's upper folder as it is made: with nothing in it, and nothing to inherit.
    /// A `base` has nothing beneath it to be hidden.
    pub(super) fn fresh(root: Root, base: bool) -> Self {
        Target { inherits: false, base, ..Target::overlay(root) }
    }

    /// An overlay's upper folder that was unpacked to before, to be settled.
    pub(super) fn again(root: Root, unsettled: Unsettled) -> Self {
        Target { unsettled, ..Target::overlay(root) }
    }

    /// What is left to [`Target::settle`].
    pub(super) fn unsettled(self) -> Unsettled {
        let Unsettled { opaque, mut folders } = self.unsettled;
        folders.retain(|_, inode| !self.listed.contains(inode));
        Unsettled { opaque, folders }
    }

    /// Does what depends on an overlay's lower folders, the nearest first: they lend their attributes to folders that the
    /// layer needs and does not list, and an opaque top hides each of their names.
    pub(super) fn settle(&mut self, mut lower: Vec<Root>) -> Result<()> {
        let Unsettled { opaque, mut folders } = std::mem::take(&mut self.unsettled);
        folders.retain(|_, inode| !self.listed.contains(inode));
        for (path, inode) in folders {
            let mut set = |root: &mut Root| -> io::Result<()> {
                let Some(place) = root.place(&path)? else { return Ok(()) };
                // It is not the one any more when a later member took its place.
                if !place.stat()?.is_some_and(|stat| is(&stat, FileType::Directory) && stat.st_ino == inode) {
                    return Ok(());
                }
                match copy_attributes(&mut lower, &path, &place)? {
                    Some(stat) => place.set_times(
                        time(stat.st_atime, stat.st_atime_nsec),
                        time(stat.st_mtime, stat.st_mtime_nsec),
                    ),
                    None => Ok(()),
                }
            };
            match set(&mut self.root) {
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                done => done.map_err(|error| member_error(&path, "set attributes of", &error))?,
            }
        }
        if opaque {
            // Overlayfs merges its top folder whatever is set on it: hide each name.
            let hidden = lower.iter().try_for_each(|lower| {
                lower.names()?.into_iter().try_for_each(|name| self.hide(&self.root.child(&name)?, 0, 0))
            });
            hidden.map_err(|error| member_error(b"/", "make opaque", &error))?;
        }
        Ok(())
    }

    /// Unpacks all members. What was unpacked before an error stays: the caller throws the snapshot away.
    pub(super) fn unpack<R: BufRead>(&mut self, archive: &mut Archive<R>) -> Result<()> {
        while let Some(member) = archive.next().map_err(archive_error)? {
            self.member(archive, &member)?;
        }
        for (path, accessed, modified) in std::mem::take(&mut self.folders) {
            let set = |root: &mut Root| -> io::Result<()> {
                match root.place(&path)? {
                    Some(place) if place.stat()?.is_some_and(|stat| is(&stat, FileType::Directory)) => {
                        place.set_times(accessed, modified)
                    }
                    _ => Ok(()),
                }
            };
            match set(&mut self.root) {
                // Replaced by a later member.
                Err(error)
                    if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {}
                done => done.map_err(|error| member_error(&path, "set times of", &error))?,
            }
        }
        Ok(())
    }

    /// Writes what was unpacked to disk.
    pub(super) fn sync(&self) -> io::Result<()> {
        self.root.sync()
    }

    fn member<R: BufRead>(&mut self, archive: &mut Archive<R>, member: &Member) -> Result<()> {
        let failed = |what: &'static str| move |error: io::Error| member_error(&member.path, what, &error);
        let parts = components(&member.path).map_err(failed("unpack"))?;
        let Some((name, parents)) = parts.split_last() else {
            // The root is the snapshot's own, as is its mode.
            return Ok(());
        };
        if parents.iter().any(|part| part.starts_with(AUFS)) {
            return Ok(());
        }
        if parents.iter().any(|part| part.starts_with(WHITEOUT)) {
            return Err(Error::invalid_argument(format!(
                "layer member {}: a folder's name must not begin with .wh., which marks what is deleted",
                show(&member.path)
            )));
        }
        if *name == OPAQUE {
            return self.opaque(&parents.join(&b'/')).map_err(failed("make opaque the folder of"));
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            if matches!(hidden, b"" | b"." | b"..") {
                return Err(Error::invalid_argument(format!(
                    "layer member {}: a whiteout must name what it deletes",
                    show(&member.path)
                )));
            }
            let path = [&parents.join(&b'/')[..], b"/", hidden].concat();
            return self.whiteout(&path, member).map_err(failed("unpack the whiteout"));
        }
        let Some(place) = self.place(&member.path).map_err(failed("make the folder of"))? else {
            return Ok(());
        };
        // In an overlay's upper folder hardly anything is there before.
        if self.overlay
            && member.kind == Kind::File
            && let Some(file) = place.try_make_file(new_mode(member)).map_err(failed("make the file"))?
        {
            return self.fill(archive, member, &place, file, !self.inherits);
        }
        self.make(archive, member, &place)?;
        if !self.overlay
            && let Some(stat) = place.stat().map_err(failed("look at"))?
        {
            self.unpacked.insert((stat.st_dev, stat.st_ino));
        }
        if member.kind == Kind::Folder {
            self.folders.push((member.path.clone(), member.accessed, member.modified));
        }
        Ok(())
    }

    fn make<R: BufRead>(&mut self, archive: &mut Archive<R>, member: &Member, place: &Place) -> Result<()> {
        let failed = |what: &'static str| move |error: io::Error| member_error(&member.path, what, &error);
        let existing = place.stat().map_err(failed("look at"))?;
        let link = match &member.kind {
            Kind::HardLink(to) => Some(self.link_target(member, to)?),
            _ => None,
        };
        let mut was_whiteout = false;
        let mut keep = false;
        if let Some(existing) = &existing {
            was_whiteout = self.overlay && is_whiteout(existing);
            let merge = member.kind == Kind::Folder && is(existing, FileType::Directory);
            let same = link
                .as_ref()
                .is_some_and(|(_, stat)| (stat.st_dev, stat.st_ino) == (existing.st_dev, existing.st_ino));
            keep = merge || same;
            if merge {
                self.listed.insert(existing.st_ino);
            }
            if !keep {
                if is(existing, FileType::Directory) {
                    self.unsettled.forget(&member.path);
                }
                self.root.remove(place).map_err(failed("replace"))?;
            }
        }
        match &member.kind {
            Kind::File => return self.file(archive, member, place),
            _ if keep => {}
            Kind::Folder => {
                place.make_folder().map_err(failed("make the folder"))?;
                if was_whiteout {
                    // Without its whiteout, the lower folder of this name would show through.
                    place.set_xattr(OsStr::new(OVERLAY_OPAQUE), b"y").map_err(failed("make opaque"))?;
                }
            }
            Kind::Symlink(target) => place.make_symlink(target).map_err(failed("make the symlink"))?,
            Kind::HardLink(_) => {
                if let Some((target, _)) = &link {
                    place.make_hard_link(target).map_err(failed("make the hard link"))?;
                }
            }
            Kind::Character(major, minor) => {
                place.make_special(Special::Character(*major, *minor)).map_err(failed("make the device"))?;
            }
            Kind::Block(major, minor) => {
                place.make_special(Special::Block(*major, *minor)).map_err(failed("make the device"))?;
            }
            Kind::Fifo => place.make_special(Special::Fifo).map_err(failed("make the pipe"))?,
        }
        // In this order: a new owner takes set-id bits and capabilities away.
        place.set_owner(member.uid, member.gid).map_err(failed("set the owner of"))?;
        set_xattrs(place, member)?;
        self.inherits |= member.kind == Kind::Folder
            && (member.mode & 0o2000 != 0
                || member.xattrs.iter().any(|(name, _)| name.starts_with(b"system.posix_acl")));
        place.set_mode(member.mode).map_err(failed("set the mode of"))?;
        place.set_times(member.accessed, member.modified).map_err(failed("set times of"))
    }

    fn file<R: BufRead>(&mut self, archive: &mut Archive<R>, member: &Member, place: &Place) -> Result<()> {
        let failed = |what: &'static str| move |error: io::Error| member_error(&member.path, what, &error);
        let file = place.make_file().map_err(failed("make the file"))?;
        self.fill(archive, member, place, file, false)
    }

    /// Writes a new file's data and attributes; `plain` says that it has the owner and mode it was made with.
    fn fill<R: BufRead>(
        &self,
        archive: &mut Archive<R>,
        member: &Member,
        place: &Place,
        mut file: File,
        plain: bool,
    ) -> Result<()> {
        let failed = |what: &'static str| move |error: io::Error| member_error(&member.path, what, &error);
        match &member.holes {
            None => self.copy(archive, &mut file, member.size, member)?,
            Some(holes) => {
                for (offset, length) in holes {
                    file.seek(SeekFrom::Start(*offset)).map_err(failed("write"))?;
                    self.copy(archive, &mut file, *length, member)?;
                }
                file.set_len(member.size).map_err(failed("write"))?;
            }
        }
        let ours = (member.uid, member.gid) == owner();
        if !(plain && ours) {
            std::os::unix::fs::fchown(&file, Some(member.uid), Some(member.gid))
                .map_err(failed("set the owner of"))?;
        }
        set_xattrs(place, member)?;
        let times = std::fs::FileTimes::new().set_accessed(member.accessed).set_modified(member.modified);
        if !(plain && ours && member.xattrs.is_empty() && new_mode(member) == member.mode) {
            file.set_permissions(std::fs::Permissions::from_mode(member.mode))
                .map_err(failed("set the mode of"))?;
        }
        file.set_times(times).map_err(failed("set times of"))
    }

    fn copy<R: BufRead>(
        &self,
        archive: &mut Archive<R>,
        file: &mut File,
        mut left: u64,
        member: &Member,
    ) -> Result<()> {
        while left > 0 {
            let bytes = archive.peek().map_err(|error| read_error(&error))?;
            let bytes = &bytes[..usize::try_from(left).map_or(bytes.len(), |left| left.min(bytes.len()))];
            if bytes.is_empty() {
                return Err(Error::invalid_argument(format!(
                    "layer member {}: its data ends early",
                    show(&member.path)
                )));
            }
            file.write_all(bytes).map_err(|error| member_error(&member.path, "write", &error))?;
            let count = bytes.len();
            archive.take_peeked(count);
            left -= count as u64;
        }
        Ok(())
    }

    fn link_target(&mut self, member: &Member, to: &[u8]) -> Result<(Place, Stat)> {
        let found = self.root.place(to).and_then(|place| match place {
            Some(place) => Ok(place.stat()?.map(|stat| (place, stat))),
            None => Ok(None),
        });
        match found {
            Ok(Some(found)) => Ok(found),
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                Err(member_error(&member.path, "find the target of the hard link", &error))
            }
            _ => Err(Error::invalid_argument(format!(
                "layer member {}: hard link to {}, which the layer does not hold",
                show(&member.path),
                show(to)
            ))),
        }
    }

    /// The place of a path, whose folders are made as lower layers have them where the layer does not list them.
    fn place(&mut self, path: &[u8]) -> io::Result<Option<Place>> {
        let Target { root, overlay, unsettled, listed, unpacked, .. } = self;
        root.place_making(path, &mut |path, made| {
            // A symlink's target may say so where no member's name does; what it makes would be a whiteout in a diff.
            if path.rsplit(|byte| *byte == b'/').next().is_some_and(|name| name.starts_with(WHITEOUT)) {
                let error = format!("{}: a folder's name must not begin with .wh.", show(path));
                return Err(io::Error::new(io::ErrorKind::InvalidInput, error));
            }
            let Some(stat) = made.stat()? else { return Ok(()) };
            if *overlay {
                listed.remove(&stat.st_ino);
                unsettled.folders.insert(path.to_vec(), stat.st_ino);
            } else {
                unpacked.insert((stat.st_dev, stat.st_ino));
            }
            Ok(())
        })
    }

    fn whiteout(&mut self, path: &[u8], member: &Member) -> io::Result<()> {
        if self.overlay && !self.base {
            let Some(place) = self.place(path)? else { return Ok(()) };
            return self.hide(&place, member.uid, member.gid);
        }
        // There is no need to make folders only to remove something from them.
        match self.root.place(path) {
            Ok(Some(_)) if self.base => Ok(()),
            Ok(Some(place)) => self.remove_stale(&place, 0),
            Ok(None) => Ok(()),
            Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
                Ok(())
            }
            Err(error) => Err(error),
        }
    }

    /// On an overlay: hides what lower layers have here, and keeps what this layer has.
    fn hide(&self, place: &Place, uid: u32, gid: u32) -> io::Result<()> {
        match place.stat()? {
            None => {
                place.make_special(Special::Character(0, 0))?;
                place.set_owner(uid, gid)
            }
            Some(stat) if is(&stat, FileType::Directory) => place.set_xattr(OsStr::new(OVERLAY_OPAQUE), b"y"),
            Some(_) => Ok(()),
        }
    }

    fn opaque(&mut self, folder: &[u8]) -> io::Result<()> {
        // A name in it makes the folder itself come to be, and resolves the symlink it may be.
        let Some(inside) = self.place(&[folder, b"/x"].concat())? else { return Ok(()) };
        if self.base {
            return Ok(());
        }
        if !self.overlay {
            for name in inside.names_beside()? {
                self.remove_stale(&inside.sibling(&name)?, 0)?;
            }
        } else if folder.is_empty() {
            self.unsettled.opaque = true;
        } else {
            inside.set_folder_xattr(OVERLAY_OPAQUE, b"y")?;
        }
        Ok(())
    }

    /// In a plain folder: removes what is here but for what this layer brought.
    fn remove_stale(&mut self, place: &Place, depth: usize) -> io::Result<()> {
        let Some(stat) = place.stat()? else { return Ok(()) };
        let ours = self.unpacked.contains(&(stat.st_dev, stat.st_ino));
        if !is(&stat, FileType::Directory) {
            return if ours { Ok(()) } else { self.root.remove(place) };
        }
        if depth > DEPTH {
            return Err(io::Error::new(io::ErrorKind::InvalidFilename, "the tree is too deep"));
        }
        let folder = place.enter()?;
        for name in folder.names()? {
            self.remove_stale(&folder.child(&name)?, depth + 1)?;
        }
        if !ours {
            self.root.remove_empty_folder(place)?;
        }
        Ok(())
    }
}

impl Unsettled {
    /// The folder of this path, and those in it, are removed.
    fn forget(&mut self, path: &[u8]) {
        let Ok(parts) = components(path) else { return };
        let path = parts.join(&b'/');
        let gone =
            |known: &[u8]| known.strip_prefix(&path[..]).is_some_and(|rest| matches!(rest, [] | [b'/', ..]));
        let known = self.folders.range(path.clone()..).map(|(known, _)| known);
        let gone: Vec<_> =
            known.take_while(|known| known.starts_with(&path)).filter(|known| gone(known)).cloned().collect();
        for path in gone {
            self.folders.remove(&path);
        }
    }
}

/// The mode that a new file of this member is made with: all of its mode where that is final.
fn new_mode(member: &Member) -> u32 {
    static MASK: OnceLock<u32> = OnceLock::new();
    // Once: reading it with umask(2) would change it for other threads.
    let mask = *MASK.get_or_init(|| {
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let mask = status.lines().find_map(|line| line.strip_prefix("Umask:"));
        mask.and_then(|mask| u32::from_str_radix(mask.trim(), 8).ok()).unwrap_or(0o777)
    });
    // A new owner takes set-id bits away, so that they come last.
    member.mode & 0o777 & !mask
}

/// Whom new files belong to.
fn owner() -> (u32, u32) {
    static OWNER: OnceLock<(u32, u32)> = OnceLock::new();
    *OWNER.get_or_init(|| (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw()))
}

/// Gives a folder the attributes it has in the nearest lower layer that has it; what that layer's folder is.
fn copy_attributes(lower: &mut [Root], path: &[u8], made: &Place) -> io::Result<Option<Stat>> {
    for root in lower {
        let found = match root.place(path) {
            Ok(Some(place)) => place.stat()?.map(|stat| (place, stat)),
            Ok(None) => None,
            Err(error)
                if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory)
                    || error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) =>
            {
                None
            }
            Err(error) => return Err(error),
        };
        let Some((place, stat)) = found else { continue };
        if !is(&stat, FileType::Directory) {
            return Ok(None);
        }
        made.set_owner(stat.st_uid, stat.st_gid)?;
        for name in place.xattr_names()? {
            let name = OsStr::from_bytes(&name);
            if !name.as_bytes().starts_with(b"trusted.")
                && let Some(value) = place.xattr(name)?
            {
                made.set_xattr(name, &value)?;
            }
        }
        made.set_mode(stat.st_mode & 0o7777)?;
        return Ok(Some(stat));
    }
    Ok(None)
}

fn set_xattrs(place: &Place, member: &Member) -> Result<()> {
    for (name, value) in &member.xattrs {
        if name.starts_with(b"trusted.") {
            tracing::debug!(
                member = show(&member.path),
                attribute = show(name),
                "left out: not for layers to set"
            );
            continue;
        }
        match place.set_xattr(OsStr::from_bytes(name), value) {
            Ok(()) => {}
            Err(error) if error.kind() == io::ErrorKind::Unsupported => {
                tracing::debug!(
                    member = show(&member.path),
                    attribute = show(name),
                    "the file system has none"
                );
            }
            // Only files and folders may have user attributes.
            Err(error)
                if error.kind() == io::ErrorKind::PermissionDenied
                    && name.starts_with(b"user.")
                    && !matches!(member.kind, Kind::File | Kind::Folder) => {}
            Err(error) => {
                return Err(member_error(&member.path, &format!("set attribute {} of", show(name)), &error));
            }
        }
    }
    Ok(())
}

fn is(stat: &Stat, kind: FileType) -> bool {
    FileType::from_raw_mode(stat.st_mode) == kind
}

fn is_whiteout(stat: &Stat) -> bool {
    is(stat, FileType::CharacterDevice) && stat.st_rdev == 0
}

fn time(seconds: i64, nanos: impl TryInto<u64>) -> SystemTime {
    let whole = Duration::from_secs(seconds.unsigned_abs());
    let base = if seconds < 0 { UNIX_EPOCH - whole } else { UNIX_EPOCH + whole };
    base + Duration::from_nanos(nanos.try_into().unwrap_or(0))
}

fn show(bytes: &[u8]) -> String {
    format!("{:?}", String::from_utf8_lossy(&bytes[..bytes.len().min(256)]))
}

/// A failure at one member: the disk's class where the disk is at fault, else the layer is.
fn member_error(path: &[u8], what: &str, error: &io::Error) -> Error {
    let message = format!("layer: cannot {what} {}: {error}", show(path));
    if error.raw_os_error() == Some(rustix::io::Errno::LOOP.raw_os_error()) {
        return Error::invalid_argument(message);
    }
    match error.kind() {
        io::ErrorKind::StorageFull | io::ErrorKind::QuotaExceeded => {
            Error::resource_exhausted(format!("{message}; free some space and try again"))
        }
        io::ErrorKind::PermissionDenied => Error::permission_denied(message),
        io::ErrorKind::ReadOnlyFilesystem => Error::failed_precondition(message),
        io::ErrorKind::NotFound
        | io::ErrorKind::AlreadyExists
        | io::ErrorKind::NotADirectory
        | io::ErrorKind::IsADirectory
        | io::ErrorKind::InvalidFilename
        | io::ErrorKind::InvalidInput
        | io::ErrorKind::FileTooLarge => Error::invalid_argument(message),
        _ => Error::unknown(message),
    }
}

/// A failure of the stream: its content's fault where the decoder says so, else the disk's.
pub(crate) fn read_error(error: &io::Error) -> Error {
    if let Some(error) = error.get_ref().and_then(|error| error.downcast_ref::<Error>()) {
        return error.clone();
    }
    let message = format!("read the layer: {error}");
    match error.kind() {
        io::ErrorKind::InvalidData | io::ErrorKind::InvalidInput | io::ErrorKind::UnexpectedEof => {
            Error::invalid_argument(message)
        }
        // What zstd finds wrong comes with no kind of its own.
        io::ErrorKind::Other => Error::invalid_argument(message),
        _ => Error::unknown(message),
    }
}

fn archive_error(error: ArchiveError) -> Error {
    match error {
        ArchiveError::Io(error) => read_error(&error),
        error => Error::invalid_argument(format!("layer: {error}")),
    }
}
