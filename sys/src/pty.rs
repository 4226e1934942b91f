//! Terminals: taking over the master side a runtime made, window sizes, raw mode.

use std::io::{self, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};

use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags};
use rustix::termios::{OptionalActions, SpecialCodeIndex, Termios, Winsize};

/// Receives the master of a pseudo-terminal, which an OCI runtime sends over its console socket as SCM_RIGHTS.
///
/// # Errors
/// WouldBlock on a non-blocking socket with nothing sent yet, InvalidData when the message carries no descriptor
/// or one that is no terminal, else those of recvmsg(2).
pub fn receive_master(socket: impl AsFd) -> io::Result<OwnedFd> {
    let mut name = [0; 256];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(4))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let received = rustix::net::recvmsg(
        socket,
        &mut [IoSliceMut::new(&mut name)],
        &mut control,
        RecvFlags::CMSG_CLOEXEC,
    )?;
    let bad = |why| Err(io::Error::new(io::ErrorKind::InvalidData, why));
    if received.flags.contains(ReturnFlags::CTRUNC) {
        return bad("more descriptors than one on the console socket");
    }
    let mut descriptors = Vec::new();
    for message in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = message {
            descriptors.extend(rights);
        }
    }
    match descriptors.pop() {
        Some(master) if descriptors.is_empty() && rustix::termios::isatty(&master) => Ok(master),
        Some(_) => bad("the console socket brought something else than one terminal"),
        None => bad("the console socket brought no descriptor"),
    }
}

/// Sets the size of a terminal, in characters.
///
/// # Errors
/// Those of the TIOCSWINSZ ioctl.
pub fn resize(terminal: impl AsFd, columns: u16, rows: u16) -> io::Result<()> {
    let size = Winsize { ws_col: columns, ws_row: rows, ws_xpixel: 0, ws_ypixel: 0 };
    Ok(rustix::termios::tcsetwinsize(terminal, size)?)
}

/// The size of a terminal: columns, rows.
///
/// # Errors
/// Those of the TIOCGWINSZ ioctl.
pub fn size(terminal: impl AsFd) -> io::Result<(u16, u16)> {
    let size = rustix::termios::tcgetwinsize(terminal)?;
    Ok((size.ws_col, size.ws_row))
}

/// The character that means end-of-file when typed at this terminal, Ctrl-D unless it was changed.
#[must_use]
pub fn end_of_file(terminal: impl AsFd) -> u8 {
    rustix::termios::tcgetattr(terminal).map_or(4, |settings| settings.special_codes[SpecialCodeIndex::VEOF])
}

/// A terminal in raw mode, put back as it was when this is dropped.
pub struct Raw<F: AsFd> {
    terminal: F,
    before: Termios,
}

impl<F: AsFd> Raw<F> {
    /// Puts a terminal into raw mode: every key goes through, nothing is echoed.
    ///
    /// # Errors
    /// NotATerminal (ENOTTY), else those of tcsetattr(3).
    pub fn enter(terminal: F) -> io::Result<Self> {
        let before = rustix::termios::tcgetattr(&terminal)?;
        let mut raw = before.clone();
        raw.make_raw();
        rustix::termios::tcsetattr(&terminal, OptionalActions::Now, &raw)?;
        Ok(Self { terminal, before })
    }
}

impl<F: AsFd> Drop for Raw<F> {
    fn drop(&mut self) {
        let _ = rustix::termios::tcsetattr(&self.terminal, OptionalActions::Drain, &self.before);
    }
}
