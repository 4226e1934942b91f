//! Btrfs subvolumes: trees of their own within a file system, which are copied by sharing.
//!
//! A subvolume looks like a folder, has its own inode numbers (the top folder is always 256), and is frozen by a flag.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use rustix::fs::{AtFlags, FileType, Mode, OFlags, StatFs};
use rustix::io::Errno;
use rustix::ioctl::{Getter, Opcode, Setter, Updater, ioctl, opcode};

use crate::fs::{Step, walk};

/// The ioctls' group.
const GROUP: u8 = 0x94;
const SUBVOLUME_CREATE: Opcode = opcode::write::<Arguments>(GROUP, 24);
const SNAPSHOT_CREATE: Opcode = opcode::write::<Arguments>(GROUP, 23);
const SNAPSHOT_DESTROY: Opcode = opcode::write::<ShortArguments>(GROUP, 15);
const GET_FLAGS: Opcode = opcode::read::<u64>(GROUP, 25);
const SET_FLAGS: Opcode = opcode::write::<u64>(GROUP, 26);
const INODE_LOOKUP: Opcode = opcode::read_write::<Lookup>(GROUP, 18);
/// The flag of a subvolume that does not change.
const READ_ONLY: u64 = 1 << 1;
/// The inode of each subvolume's top folder.
const TOP: u64 = 256;
/// What statfs says of btrfs.
const MAGIC: i64 = 0x9123_683e;

/// `struct btrfs_ioctl_vol_args_v2`.
#[repr(C)]
struct Arguments {
    fd: i64,
    transaction: u64,
    flags: u64,
    unused: [u64; 4],
    name: [u8; 4040],
}

/// `struct btrfs_ioctl_vol_args`.
#[repr(C)]
struct ShortArguments {
    fd: i64,
    name: [u8; 4088],
}

/// `struct btrfs_ioctl_ino_lookup_args`.
#[repr(C)]
struct Lookup {
    tree: u64,
    object: u64,
    name: [u8; 4080],
}

/// Whether a path, or the nearest folder above it that is there, lies on btrfs.
pub fn holds(path: &Path) -> io::Result<bool> {
    let there = path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    Ok(is_btrfs(&rustix::fs::statfs(there)?))
}

fn is_btrfs(filesystem: &StatFs) -> bool {
    filesystem.f_type & 0xffff_ffff == MAGIC
}

/// Makes an empty subvolume.
pub fn create(path: &Path) -> io::Result<()> {
    let (folder, name) = split(path)?;
    let name = padded(name.to_bytes())?;
    let arguments = Arguments { fd: 0, transaction: 0, flags: 0, unused: [0; 4], name };
    // SAFETY: the kernel reads an argument of exactly this layout, which lives as long as the call.
    Ok(unsafe { ioctl(&folder, Setter::<SUBVOLUME_CREATE, _>::new(arguments)) }?)
}

/// Makes a subvolume that holds what `source` does, by sharing.
pub fn snapshot(source: &Path, path: &Path) -> io::Result<()> {
    let (folder, name) = split(path)?;
    let name = padded(name.to_bytes())?;
    let source = File::open(source)?;
    let fd = i64::from(source.as_raw_fd());
    let arguments = Arguments { fd, transaction: 0, flags: 0, unused: [0; 4], name };
    // SAFETY: the kernel reads an argument of exactly this layout; it and the descriptor in it live as long as the call.
    Ok(unsafe { ioctl(&folder, Setter::<SNAPSHOT_CREATE, _>::new(arguments)) }?)
}

/// Whether a subvolume is frozen.
pub fn is_read_only(path: &Path) -> io::Result<bool> {
    // SAFETY: the kernel writes the one word that this reads.
    Ok(unsafe { ioctl(File::open(path)?, Getter::<GET_FLAGS, u64>::new()) }? & READ_ONLY != 0)
}

/// Freezes a subvolume, or thaws it.
pub fn set_read_only(path: &Path, read_only: bool) -> io::Result<()> {
    set_flags(&File::open(path)?, if read_only { READ_ONLY } else { 0 })
}

fn set_flags(subvolume: impl AsFd, flags: u64) -> io::Result<()> {
    // SAFETY: the kernel reads one word, which lives as long as the call.
    Ok(unsafe { ioctl(subvolume, Setter::<SET_FLAGS, u64>::new(flags)) }?)
}

/// The number of a subvolume, by which it can be mounted.
pub fn id(path: &Path) -> io::Result<u64> {
    let mut lookup = Lookup { tree: 0, object: TOP, name: [0; 4080] };
    // SAFETY: the kernel reads and writes an argument of exactly this layout, which lives as long as the call.
    unsafe { ioctl(File::open(path)?, Updater::<INODE_LOOKUP, _>::new(&mut lookup)) }?;
    Ok(lookup.tree)
}

/// Removes a tree if it is there, subvolumes in it included, frozen or not, however deep; never follows a symlink out of it.
/// Several may remove the same one.
pub fn remove_tree(path: &Path) -> io::Result<()> {
    match remove_present_tree(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
        result => result,
    }
}

fn remove_present_tree(path: &Path) -> io::Result<()> {
    if !fs::symlink_metadata(path)?.is_dir() {
        return fs::remove_file(path);
    }
    let (folder, name) = split(path)?;
    if !gone_or_writable(folder.as_fd(), &name)? {
        // Whoever may write there can have made subvolumes in it, at any depth.
        walk(path, &mut |_, folder, name, step| match step {
            Step::Seen(FileType::Directory) => gone_or_writable(folder, name).map(drop),
            Step::Seen(_) => gone(rustix::fs::unlinkat(folder, name, AtFlags::empty())),
            Step::Left => remove_empty(folder, name),
        })?;
        remove_empty(folder.as_fd(), &name)?;
    }
    Ok(())
}

/// Whether a folder is not there any more. If it is the top of a subvolume, all of it goes at once; if that cannot be since there
/// are others in it, it can be written to from here on.
fn gone_or_writable(folder: BorrowedFd<'_>, name: &CStr) -> io::Result<bool> {
    let Some(own) = open_subvolume(folder, name)? else { return Ok(false) };
    match delete(folder, name) {
        Err(error) if error.kind() == io::ErrorKind::DirectoryNotEmpty => set_flags(&own, 0).map(|()| false),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(true),
        result => result.map(|()| true),
    }
}

/// Removes a folder in which nothing is left, of whichever kind.
fn remove_empty(folder: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    match open_subvolume(folder, name)? {
        None => gone(rustix::fs::unlinkat(folder, name, AtFlags::REMOVEDIR)),
        Some(_) => match delete(folder, name) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            result => result,
        },
    }
}

/// Somebody else may have removed it, too.
fn gone(removed: Result<(), Errno>) -> io::Result<()> {
    match removed {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(error) => Err(error.into()),
    }
}

/// The top folder of a subvolume; None for anything else, symlinks to one included, and for what is not there.
fn open_subvolume(folder: BorrowedFd<'_>, name: &CStr) -> io::Result<Option<OwnedFd>> {
    const FOLDER: OFlags =
        OFlags::RDONLY.union(OFlags::DIRECTORY).union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);
    let own = match rustix::fs::openat(folder, name, FOLDER, Mode::empty()) {
        Ok(own) => own,
        Err(Errno::NOENT | Errno::NOTDIR | Errno::LOOP) => return Ok(None),
        Err(error) => return Err(error.into()),
    };
    let is_one = rustix::fs::fstat(&own)?.st_ino == TOP && is_btrfs(&rustix::fs::fstatfs(&own)?);
    Ok(is_one.then_some(own))
}

fn delete(folder: BorrowedFd<'_>, name: &CStr) -> io::Result<()> {
    let arguments = ShortArguments { fd: 0, name: padded(name.to_bytes())? };
    // SAFETY: the kernel reads an argument of exactly this layout, which lives as long as the call.
    Ok(unsafe { ioctl(folder, Setter::<SNAPSHOT_DESTROY, _>::new(arguments)) }?)
}

/// The folder of a path, open, and its last name.
fn split(path: &Path) -> io::Result<(File, CString)> {
    let invalid = || io::Error::from(io::ErrorKind::InvalidInput);
    let (folder, last) = (path.parent().ok_or_else(invalid)?, path.file_name().ok_or_else(invalid)?);
    Ok((File::open(folder)?, CString::new(last.as_bytes()).map_err(|_| invalid())?))
}

/// A name as the kernel wants it: the last byte stays zero, since it ends there.
fn padded<const LENGTH: usize>(name: &[u8]) -> io::Result<[u8; LENGTH]> {
    let mut padded = [0; LENGTH];
    let place = padded[..LENGTH - 1].get_mut(..name.len());
    place.ok_or_else(|| io::Error::from(io::ErrorKind::InvalidInput))?.copy_from_slice(name);
    Ok(padded)
}

// What the numbers of the ioctls are made of.
const _: () = assert!(size_of::<Arguments>() == 4096 && size_of::<ShortArguments>() == 4096);
const _: () = assert!(size_of::<Lookup>() == 4096);
