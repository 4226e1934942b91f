//! A layer beside the files it was unpacked to: the archive is read once, and each member looked up in the folder.
//!
//! ```text
//!  member              own folder of an overlay                    merged tree, over the parent's
//!  a/b                 a/b is that: kind, owner, mode, size,       the same
//!                      bytes, attributes
//!  a/.wh.b             a/b is a whiteout, or an opaque folder      the layer brings a/b, or there is none
//!  a/.wh..wh..opq      a is opaque                                 all of a is of the layer
//!  nothing             neither a file, nor an opaque folder;       the file is as it is in the parent, and what the
//!                      a folder only around something              parent has is there
//! ```
//!
//! A later member replaces what has its name, so that a difference counts only once the archive has ended.
//!
//! Invariants: nothing is changed, and paths resolve beneath the folder as they did when the layer was unpacked. Memory holds
//! a few bytes for each member and a bounded number of differences, and no file.

use std::collections::{HashMap, HashSet};
use std::ffi::OsStr;
use std::hash::{BuildHasher as _, RandomState};
use std::io::{self, BufRead, Read};
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{FileType, Stat};
use sys::beneath::{Place, Root, components};

use crate::diff::archive::{Archive, ArchiveError, Kind, Member};
use crate::diff::{AUFS, OPAQUE, OVERLAY_OPAQUE, WHITEOUT, read_error};
use crate::error::{Error, Result};

/// The most differences that are told of one layer.
const MOST: usize = 100;
/// How deep a tree may be.
const DEPTH: usize = 1024;
/// Bytes compared at a time.
const BUFFER: usize = 128 * 1024;
/// Attributes that security modules of the host give to any file.
const OF_THE_HOST: [&[u8]; 3] = [b"security.selinux", b"security.ima", b"security.evm"];

/// Where a layer was unpacked to.
pub(crate) enum Tree {
    /// Its own files alone, with overlayfs's marks for what it deletes.
    Own(Root),
    /// The files of all layers so far, and, but for the first layer, those without it.
    Merged(Root, Option<Root>),
}

/// A file that is not what the layer has.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Difference {
    pub(crate) path: String,
    pub(crate) what: String,
}

/// A name in a folder: the folder's inode, and a hash of the name.
type Key = (u64, u64);

/// What a comparison has found.
#[derive(Debug, Default)]
pub(crate) struct Compared {
    /// In the order of their paths; the last says how many more there are, if there are.
    pub(crate) differences: Vec<Difference>,
    /// Members that were looked at.
    pub(crate) files: u64,
}

struct Candidate {
    difference: Difference,
    inode: u64,
    /// Of what a hard link to the same file may set later.
    attribute: bool,
    /// What it should be a link to.
    target: Option<Key>,
}

struct Comparison<'a> {
    tree: Root,
    overlay: bool,
    parent: Option<Root>,
    hasher: RandomState,
    members: HashSet<Key>,
    whiteouts: HashSet<Key>,
    opaque: HashSet<Key>,
    opaque_top: bool,
    candidates: HashMap<Key, Candidate>,
    /// Differences that were found when there were too many already.
    more: u64,
    extra: Vec<Difference>,
    buffer: Vec<u8>,
    /// Whether to go on, else why not.
    go_on: &'a dyn Fn() -> Result<()>,
}

/// Reads the whole archive, and compares it with the tree. Blocks.
pub(super) fn compare<R: BufRead>(
    archive: &mut Archive<R>,
    tree: Tree,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<Compared> {
    let (tree, overlay, parent) = match tree {
        Tree::Own(root) => (root, true, None),
        Tree::Merged(root, parent) => (root, false, parent),
    };
    let mut comparison = Comparison {
        tree,
        overlay,
        parent,
        hasher: RandomState::new(),
        members: HashSet::new(),
        whiteouts: HashSet::new(),
        opaque: HashSet::new(),
        opaque_top: false,
        candidates: HashMap::new(),
        more: 0,
        extra: Vec::new(),
        buffer: vec![0; 2 * BUFFER],
        go_on,
    };
    let mut files = 0;
    while let Some(member) = archive.next().map_err(archive_error)? {
        (comparison.go_on)()?;
        files += 1;
        comparison.member(archive, &member)?;
    }
    comparison.rest()?;
    let Comparison { candidates, extra, mut more, .. } = comparison;
    let mut differences: Vec<_> =
        candidates.into_values().map(|candidate| candidate.difference).chain(extra).collect();
    differences.sort_by(|a, b| a.path.cmp(&b.path));
    more += differences.len().saturating_sub(MOST) as u64;
    differences.truncate(MOST);
    if more > 0 {
        differences.push(Difference { path: String::new(), what: format!("{more} more files differ") });
    }
    Ok(Compared { differences, files })
}

impl Comparison<'_> {
    fn key(&self, place: &Place) -> io::Result<Key> {
        Ok((place.folder_stat()?.st_ino, self.hasher.hash_one(place.name())))
    }

    fn member<R: BufRead>(&mut self, archive: &mut Archive<R>, member: &Member) -> Result<()> {
        let failed = |error: io::Error| file_error(&member.path, &error);
        let parts = components(&member.path).map_err(failed)?;
        let Some((name, parents)) = parts.split_last() else { return Ok(()) };
        if parents.iter().any(|part| part.starts_with(AUFS)) {
            return Ok(());
        }
        let folder = parents.join(&b'/');
        if *name == OPAQUE {
            return self.opaque(&folder).map_err(failed);
        }
        if name.starts_with(AUFS) {
            return Ok(());
        }
        if let Some(hidden) = name.strip_prefix(WHITEOUT) {
            return self.whiteout(&[&folder[..], b"/", hidden].concat()).map_err(failed);
        }
        let Some(place) = find(&mut self.tree, &member.path).map_err(failed)? else {
            // Not even its folder is there, so that it has no key but one of its own.
            let key = (0, self.hasher.hash_one(&member.path));
            self.differs(key, 0, &member.path, "is missing", false);
            return Ok(());
        };
        let key = self.key(&place).map_err(failed)?;
        if !self.candidates.is_empty() {
            self.replace(key, &parts, &member.kind);
        }
        self.members.insert(key);
        let Some(stat) = place.stat().map_err(failed)? else {
            self.differs(key, 0, &member.path, "is missing", false);
            return Ok(());
        };
        if let Kind::HardLink(to) = &member.kind {
            let target = find(&mut self.tree, to).map_err(failed)?;
            let found = target.as_ref().map(Place::stat).transpose().map_err(failed)?.flatten();
            if found.is_none_or(|target| target.st_ino != stat.st_ino) {
                self.differs(key, stat.st_ino, &member.path, &format!("is no link to {}", show(to)), false);
                let target = target.map(|target| self.key(&target)).transpose().map_err(failed)?;
                if let Some(candidate) = self.candidates.get_mut(&key) {
                    candidate.target = target;
                }
                return Ok(());
            }
            // What this member says of the file is said last.
            if !self.candidates.is_empty() {
                self.candidates.retain(|_, old| !(old.attribute && old.inode == stat.st_ino));
            }
        }
        if let Some(what) = kind_differs(&place, &stat, member).map_err(failed)? {
            self.differs(key, stat.st_ino, &member.path, &what, false);
            return Ok(());
        }
        if member.kind == Kind::File && !self.same_bytes(archive, member, &place)? {
            self.differs(key, stat.st_ino, &member.path, "has other bytes", false);
            return Ok(());
        }
        if let Some(what) = attributes_differ(&place, &stat, member).map_err(failed)? {
            self.differs(key, stat.st_ino, &member.path, &what, true);
        }
        Ok(())
    }

    /// Forgets what a member makes void that replaces others: what had its name, what was beneath it, links to it.
    fn replace(&mut self, key: Key, parts: &[&[u8]], kind: &Kind) {
        self.candidates.remove(&key);
        let beneath = format!("{}/", show(&parts.join(&b'/')));
        self.candidates.retain(|_, old| {
            let path = old.difference.path.trim_start_matches(['.', '/']);
            old.target != Some(key) && (*kind == Kind::Folder || !path.starts_with(&beneath))
        });
    }

    fn differs(&mut self, key: Key, inode: u64, path: &[u8], what: &str, attribute: bool) {
        // More than are told, since later members may take some back.
        if self.candidates.len() >= 100 * MOST {
            self.more += 1;
            return;
        }
        let difference = Difference { path: show(path), what: what.to_owned() };
        self.candidates.insert(key, Candidate { difference, inode, attribute, target: None });
    }

    fn whiteout(&mut self, path: &[u8]) -> io::Result<()> {
        let Some(place) = find(&mut self.tree, path)? else {
            if self.overlay {
                let key = (0, self.hasher.hash_one(path));
                self.differs(key, 0, path, "is not hidden, which the layer deletes", false);
            }
            return Ok(());
        };
        let key = self.key(&place)?;
        self.whiteouts.insert(key);
        if self.members.contains(&key) {
            return Ok(());
        }
        let stat = place.stat()?;
        let hidden = match &stat {
            None => !self.overlay,
            Some(stat) if is(stat, FileType::Directory) => self.overlay && is_opaque(&place)?,
            Some(stat) => self.overlay && is_whiteout(stat),
        };
        if !hidden {
            let what = "is not hidden, which the layer deletes";
            self.differs(key, stat.map_or(0, |stat| stat.st_ino), path, what, false);
        }
        Ok(())
    }

    fn opaque(&mut self, folder: &[u8]) -> io::Result<()> {
        if folder.is_empty() {
            self.opaque_top = true;
            return Ok(());
        }
        let Some(place) = find(&mut self.tree, folder)? else { return Ok(()) };
        // The folder itself may be a symlink to where it is opaque.
        let Some(inside) = find(&mut self.tree, &[folder, b"/x"].concat())? else { return Ok(()) };
        let inode = inside.folder_stat()?.st_ino;
        self.opaque.insert((inode, 0));
        if self.overlay
            && place.stat()?.is_some_and(|stat| is(&stat, FileType::Directory))
            && !is_opaque(&place)?
        {
            let key = self.key(&place)?;
            self.differs(key, inode, folder, "shows what is below it, which the layer hides", true);
        }
        Ok(())
    }

    /// Compares the bytes of the member at hand with the file's.
    fn same_bytes<R: BufRead>(
        &mut self,
        archive: &mut Archive<R>,
        member: &Member,
        place: &Place,
    ) -> Result<bool> {
        let mut file = place.read().map_err(|error| file_error(&member.path, &error))?;
        let whole = [(0, member.size)];
        let mut at = 0;
        for &(offset, length) in member.holes.as_deref().unwrap_or(&whole) {
            if !self.same_part(None::<&mut Archive<R>>, &mut file, offset - at, member)?
                || !self.same_part(Some(&mut *archive), &mut file, length, member)?
            {
                return Ok(false);
            }
            at = offset + length;
        }
        self.same_part(None::<&mut Archive<R>>, &mut file, member.size - at, member)
    }

    /// Compares so many bytes of the file with the archive's, or with zeros where there is none.
    fn same_part<R: BufRead>(
        &mut self,
        mut archive: Option<&mut Archive<R>>,
        file: &mut std::fs::File,
        mut left: u64,
        member: &Member,
    ) -> Result<bool> {
        let (wanted, found) = self.buffer.split_at_mut(BUFFER);
        while left > 0 {
            (self.go_on)()?;
            let want = usize::try_from(left).map_or(BUFFER, |left| left.min(BUFFER));
            let count = match &mut archive {
                Some(archive) => archive.read(&mut wanted[..want]).map_err(|error| read_error(&error))?,
                None => {
                    wanted[..want].fill(0);
                    want
                }
            };
            if count == 0 {
                return Err(Error::invalid_argument(format!(
                    "member {}: its data ends early",
                    show(&member.path)
                )));
            }
            match file.read_exact(&mut found[..count]) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                read => read.map_err(|error| file_error(&member.path, &error))?,
            }
            if wanted[..count] != found[..count] {
                return Ok(false);
            }
            left -= count as u64;
        }
        Ok(true)
    }

    /// Looks for what the layer does not account for.
    fn rest(&mut self) -> Result<()> {
        let failed = |error: io::Error| file_error(b"/", &error);
        let top = self.tree.names().map_err(failed)?;
        let inode = rustix::fs::fstat(self.tree.as_fd()).map_err(|error| failed(error.into()))?.st_ino;
        let places =
            top.iter().map(|name| self.tree.child(name)).collect::<io::Result<Vec<_>>>().map_err(failed)?;
        let below = match &self.parent {
            Some(parent) => Some(parent.names().map_err(failed)?),
            None => None,
        };
        let parents = match (&self.parent, &below) {
            (Some(parent), Some(names)) => {
                names.iter().map(|name| parent.child(name)).collect::<io::Result<Vec<_>>>().map_err(failed)?
            }
            _ => Vec::new(),
        };
        self.folder(b"", inode, places, &parents, true)?;
        Ok(())
    }

    /// The same for a folder: its names, and those of the parent's folder here. Whether it holds anything of the layer.
    fn folder(
        &mut self,
        path: &[u8],
        inode: u64,
        places: Vec<Place>,
        below: &[Place],
        top: bool,
    ) -> Result<bool> {
        (self.go_on)()?;
        if path.iter().filter(|byte| **byte == b'/').count() > DEPTH {
            return Err(Error::invalid_argument(format!("{}: the tree is too deep", show(path))));
        }
        let opaque = self.opaque.contains(&(inode, 0)) || top && self.opaque_top;
        let mut ours = false;
        let mut names = HashSet::new();
        let old: HashMap<&[u8], &Place> = below.iter().map(|old| (old.name(), old)).collect();
        for place in places {
            let path =
                if path.is_empty() { place.name().to_vec() } else { [path, b"/", place.name()].concat() };
            let failed = |error: io::Error| file_error(&path, &error);
            let key = (inode, self.hasher.hash_one(place.name()));
            names.insert(key.1);
            let under = old.get(place.name()).copied().filter(|_| !opaque);
            let Some(stat) = place.stat().map_err(failed)? else { continue };
            let known = self.members.contains(&key);
            let hides = self.whiteouts.contains(&key) || (top && self.opaque_top);
            ours |= known || hides;
            if is(&stat, FileType::Directory) {
                let inner = place.enter().map_err(failed)?;
                let places = children(&inner).map_err(failed)?;
                let under_folder = match under {
                    Some(old) if !self.whiteouts.contains(&key) || !known => match old.enter() {
                        Ok(old) => children(&old).map_err(failed)?,
                        Err(_) => Vec::new(),
                    },
                    _ => Vec::new(),
                };
                let opaque_here = self.overlay && is_opaque(&place).map_err(failed)?;
                if opaque_here
                    && !hides
                    && !self.opaque.contains(&(stat.st_ino, 0))
                    && !self.candidates.contains_key(&key)
                {
                    self.extra(&path, "hides what is below it, which the layer does not");
                }
                let holds = self.folder(&path, stat.st_ino, places, &under_folder, false)?;
                ours |= holds;
                // Folders around what the layer has need not be listed in it.
                let before = under.map(Place::stat).transpose().map_err(failed)?.flatten();
                let owned = |stat: &Stat| (stat.st_mode, stat.st_uid, stat.st_gid);
                if !known && !holds && under.is_none() {
                    self.extra(&path, "is not of the layer");
                } else if !known && before.is_some_and(|before| owned(&before) != owned(&stat)) {
                    self.extra(&path, "is not as it is in the layers below");
                }
                continue;
            }
            if known || (self.overlay && is_whiteout(&stat) && hides) || self.candidates.contains_key(&key) {
                continue;
            }
            match under {
                None => self.extra(&path, "is not of the layer"),
                Some(old) => {
                    if let Some(what) = self.changed(&place, &stat, old).map_err(failed)? {
                        self.extra(&path, what);
                    }
                }
            }
        }
        if !opaque {
            for old in below {
                let key = (inode, self.hasher.hash_one(old.name()));
                if !names.contains(&key.1) && !self.whiteouts.contains(&key) {
                    let path = [path, b"/", old.name()].concat();
                    self.extra(&path, "is missing, which is in the layers below");
                }
            }
        }
        Ok(ours)
    }

    /// In what a file that no member names differs from the parent's.
    fn changed(&mut self, place: &Place, stat: &Stat, old: &Place) -> io::Result<Option<&'static str>> {
        let Some(before) = old.stat()? else { return Ok(Some("is not of the layer")) };
        let attributes = |stat: &Stat| (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_size, stat.st_rdev);
        if attributes(stat) != attributes(&before) {
            return Ok(Some("is not as it is in the layers below"));
        }
        if is(stat, FileType::Symlink) && place.link_target()? != old.link_target()? {
            return Ok(Some("is not the link that it is in the layers below"));
        }
        if is(stat, FileType::RegularFile) {
            let (mut new, mut old) = (place.read()?, old.read()?);
            let (a, b) = self.buffer.split_at_mut(BUFFER);
            loop {
                let count = new.read(a)?;
                if count == 0 {
                    break;
                }
                old.read_exact(&mut b[..count])?;
                if a[..count] != b[..count] {
                    return Ok(Some("has other bytes than in the layers below"));
                }
            }
        }
        Ok(None)
    }

    fn extra(&mut self, path: &[u8], what: &str) {
        if self.extra.len() > MOST {
            self.more += 1;
            return;
        }
        self.extra.push(Difference { path: show(path), what: what.to_owned() });
    }
}

/// The place of a path; None where there is none, be it for want of a folder.
fn find(root: &mut Root, path: &[u8]) -> io::Result<Option<Place>> {
    match root.place(path) {
        Err(error) if matches!(error.kind(), io::ErrorKind::NotFound | io::ErrorKind::NotADirectory) => {
            Ok(None)
        }
        found => found,
    }
}

fn children(root: &Root) -> io::Result<Vec<Place>> {
    root.names()?.iter().map(|name| root.child(name)).collect()
}

/// In what way this is not even the kind of file that the member is.
fn kind_differs(place: &Place, stat: &Stat, member: &Member) -> io::Result<Option<String>> {
    let device = |major: u32, minor: u32| rustix::fs::makedev(major, minor) == stat.st_rdev;
    let right = match &member.kind {
        Kind::HardLink(_) => true,
        Kind::File if is(stat, FileType::RegularFile) => {
            let size = u64::try_from(stat.st_size).unwrap_or(0);
            if size != member.size {
                return Ok(Some(format!("has {size} bytes instead of {}", member.size)));
            }
            true
        }
        Kind::Symlink(target) if is(stat, FileType::Symlink) => {
            let found = place.link_target()?;
            if found != *target {
                return Ok(Some(format!("is a link to {} instead of {}", show(&found), show(target))));
            }
            true
        }
        Kind::Folder => is(stat, FileType::Directory),
        Kind::Character(major, minor) => is(stat, FileType::CharacterDevice) && device(*major, *minor),
        Kind::Block(major, minor) => is(stat, FileType::BlockDevice) && device(*major, *minor),
        Kind::Fifo => is(stat, FileType::Fifo),
        Kind::File | Kind::Symlink(_) => false,
    };
    Ok((!right).then(|| "is another kind of file".to_owned()))
}

/// In which attribute a file differs from its member.
fn attributes_differ(place: &Place, stat: &Stat, member: &Member) -> io::Result<Option<String>> {
    if (stat.st_uid, stat.st_gid) != (member.uid, member.gid) {
        return Ok(Some(format!(
            "belongs to {}:{} instead of {}:{}",
            stat.st_uid, stat.st_gid, member.uid, member.gid
        )));
    }
    let mode = stat.st_mode & 0o7777;
    if !is(stat, FileType::Symlink) && mode != member.mode {
        return Ok(Some(format!("has the mode {mode:04o} instead of {:04o}", member.mode)));
    }
    let ordinary = is(stat, FileType::RegularFile) || is(stat, FileType::Directory);
    let mut wanted: HashMap<&[u8], &[u8]> = HashMap::new();
    for (name, value) in &member.xattrs {
        // Those that are not set, see the unpacking.
        if !name.starts_with(b"trusted.") && (ordinary || !name.starts_with(b"user.")) {
            wanted.insert(name, value);
        }
    }
    for (name, value) in &wanted {
        if place.xattr(OsStr::from_bytes(name))?.as_deref() != Some(*value) {
            return Ok(Some(format!("has another attribute {}", show(name))));
        }
    }
    let found = place.xattr_names()?;
    let extra = found.iter().find(|name| {
        !name.starts_with(b"trusted.") && !OF_THE_HOST.contains(&&name[..]) && !wanted.contains_key(&name[..])
    });
    Ok(extra.map(|name| format!("has the attribute {}, which the layer does not give it", show(name))))
}

fn is_opaque(place: &Place) -> io::Result<bool> {
    Ok(place.xattr(OsStr::new(OVERLAY_OPAQUE))?.as_deref() == Some(b"y"))
}

fn is(stat: &Stat, kind: FileType) -> bool {
    FileType::from_raw_mode(stat.st_mode) == kind
}

fn is_whiteout(stat: &Stat) -> bool {
    is(stat, FileType::CharacterDevice) && stat.st_rdev == 0
}

fn show(bytes: &[u8]) -> String {
    String::from_utf8_lossy(&bytes[..bytes.len().min(1024)]).into_owned()
}

fn file_error(path: &[u8], error: &io::Error) -> Error {
    Error::unknown(format!("compare {}: {error}", show(path)))
}

fn archive_error(error: ArchiveError) -> Error {
    match error {
        ArchiveError::Io(error) => read_error(&error),
        error => Error::invalid_argument(format!("layer: {error}")),
    }
}
