//! Loop devices: a file as a block device.
//!
//! A device is attached so that the kernel lets go of it when nobody has it open, until [`Loop::keep`] says that it is to
//! stay; one that was attached by a process which was killed in between is thus not lost.

use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd as _;
use std::path::{Path, PathBuf};

use nix::libc;

/// From linux/loop.h.
const LOOP_CLR_FD: u64 = 0x4c01;
const LOOP_SET_STATUS64: u64 = 0x4c04;
const LOOP_GET_STATUS64: u64 = 0x4c05;
const LOOP_CONFIGURE: u64 = 0x4c0a;
const LOOP_CTL_GET_FREE: u64 = 0x4c82;
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// How often another process may take the device that was free a moment ago.
const TRIES: usize = 64;

/// struct loop_info64.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

/// struct loop_config.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

impl LoopInfo {
    fn new(flags: u32) -> Self {
        LoopInfo {
            device: 0,
            inode: 0,
            rdevice: 0,
            offset: 0,
            size_limit: 0,
            number: 0,
            encrypt_type: 0,
            encrypt_key_size: 0,
            flags,
            file_name: [0; 64],
            crypt_name: [0; 64],
            encrypt_key: [0; 32],
            init: [0; 2],
        }
    }
}

/// An open loop device.
#[derive(Debug)]
pub struct Loop {
    device: File,
    path: PathBuf,
}

impl Loop {
    /// Attaches a file to a free device. It goes when this and whatever else has it open is closed.
    pub fn attach(file: &Path, read_only: bool) -> io::Result<Loop> {
        let backing = OpenOptions::new().read(true).write(!read_only).open(file)?;
        let control = OpenOptions::new().read(true).write(true).open("/dev/loop-control")?;
        for _ in 0..TRIES {
            // SAFETY: LOOP_CTL_GET_FREE takes no argument.
            let number = check(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE as _) })?;
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let device = OpenOptions::new().read(true).write(!read_only).open(&path)?;
            let mut flags = LO_FLAGS_AUTOCLEAR;
            if read_only {
                flags |= LO_FLAGS_READ_ONLY;
            }
            let mut config = LoopConfig {
                fd: backing.as_raw_fd().cast_unsigned(),
                block_size: 0,
                info: LoopInfo::new(flags),
                reserved: [0; 8],
            };
            // What losetup shows; its end is cut off.
            let name = file.as_os_str().as_encoded_bytes();
            let length = name.len().min(config.info.file_name.len() - 1);
            config.info.file_name[..length].copy_from_slice(&name[..length]);
            // SAFETY: the argument is a struct loop_config, which the kernel only reads.
            match check(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE as _, &raw const config) }) {
                Ok(_) => return Ok(Loop { device, path }),
                // Somebody else was faster.
                Err(error) if error.raw_os_error() == Some(libc::EBUSY) => {}
                Err(error) => return Err(error),
            }
        }
        Err(io::Error::other(format!("no loop device stayed free in {TRIES} attempts")))
    }

    /// Opens a device that is attached already.
    pub fn open(path: &Path) -> io::Result<Loop> {
        Ok(Loop { device: File::open(path)?, path: path.to_owned() })
    }

    /// Its path, `/dev/loopN`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is to stay attached when nobody has it open.
    pub fn keep(&self, keep: bool) -> io::Result<()> {
        let mut info = LoopInfo::new(0);
        let fd = self.device.as_raw_fd();
        // SAFETY: the argument is a struct loop_info64, which the kernel fills in.
        check(unsafe { libc::ioctl(fd, LOOP_GET_STATUS64 as _, &raw mut info) })?;
        info.flags = if keep { info.flags & !LO_FLAGS_AUTOCLEAR } else { info.flags | LO_FLAGS_AUTOCLEAR };
        // SAFETY: the argument is a struct loop_info64, which the kernel only reads.
        check(unsafe { libc::ioctl(fd, LOOP_SET_STATUS64 as _, &raw const info) })?;
        Ok(())
    }

    /// Detaches the file: now, or when whoever uses the device is done.
    pub fn detach(self) -> io::Result<()> {
        // SAFETY: LOOP_CLR_FD takes no argument.
        check(unsafe { libc::ioctl(self.device.as_raw_fd(), LOOP_CLR_FD as _) })?;
        Ok(())
    }
}

/// The file behind a device, as the kernel names it; None when the device has none.
pub fn backing_file(device: &Path) -> io::Result<Option<PathBuf>> {
    let name = device.file_name().unwrap_or_default();
    match fs::read_to_string(Path::new("/sys/block").join(name).join("loop/backing_file")) {
        Ok(path) => {
            let path = path.trim_end_matches('\n');
            Ok(Some(path.strip_suffix(" (deleted)").unwrap_or(path).into()))
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(error),
    }
}

fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_a_device_until_it_is_detached() {
        if !nix::unistd::geteuid().is_root() || !Path::new("/dev/loop-control").exists() {
            return;
        }
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("image");
        File::create(&file).unwrap().set_len(1 << 20).unwrap();
        let attached = Loop::attach(&file, false).unwrap();
        let device = attached.path().to_owned();
        assert_eq!(backing_file(&device).unwrap().unwrap(), fs::canonicalize(&file).unwrap());
        attached.keep(true).unwrap();
        drop(attached);
        assert!(backing_file(&device).unwrap().is_some());
        Loop::open(&device).unwrap().detach().unwrap();
        assert_ne!(backing_file(&device).unwrap(), Some(fs::canonicalize(&file).unwrap()));

        let let_go = Loop::attach(&file, true).unwrap();
        let device = let_go.path().to_owned();
        drop(let_go);
        assert_ne!(backing_file(&device).unwrap(), Some(fs::canonicalize(&file).unwrap()));
        assert!(Loop::attach(&folder.path().join("absent"), false).is_err());
    }
}
