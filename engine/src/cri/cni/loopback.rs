//! The loopback interface of a network namespace, up without anybody's plugin: one message to the kernel.

use std::io;
use std::path::Path;

use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with};

/// It is the first interface of every namespace.
const INDEX: i32 = 1;
const RTM_NEWLINK: u16 = 16;
const NLM_F_REQUEST: u16 = 1;
const NLM_F_ACK: u16 = 4;
const NLMSG_ERROR: u16 = 2;
const IFF_UP: u32 = 1;

/// Brings it up, with 127.0.0.1 and ::1, in the namespace bound to this file. Blocks.
pub(super) fn up(netns: &Path) -> io::Result<()> {
    sys::namespace::pin(&[], &[(sys::namespace::Kind::Network, netns.to_owned())], set_up)
}

/// The same in the namespace of this thread.
fn set_up() -> io::Result<()> {
    // Protocol 0 of netlink is its part for routes and interfaces.
    let socket = socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
    // A header (length, kind, flags, number, port), and an interface (family, kind, index, flags, which flags).
    let mut message = Vec::with_capacity(32);
    message.extend(32_u32.to_ne_bytes());
    message.extend(RTM_NEWLINK.to_ne_bytes());
    message.extend((NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
    message.extend(1_u32.to_ne_bytes());
    message.extend([0; 4 + 4]);
    message.extend(INDEX.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    message.extend(IFF_UP.to_ne_bytes());
    sendto(&socket, &message, SendFlags::empty(), &SocketAddrNetlink::new(0, 0))?;
    let mut answer = [0_u8; 256];
    let (length, _) = recv(&socket, &mut answer[..], RecvFlags::empty())?;
    // The answer is an error whose number is 0 when all is well.
    match answer[..length] {
        [_, _, _, _, k1, k2, _, _, _, _, _, _, _, _, _, _, e1, e2, e3, e4, ..]
            if u16::from_ne_bytes([k1, k2]) == NLMSG_ERROR =>
        {
            match i32::from_ne_bytes([e1, e2, e3, e4]) {
                0 => Ok(()),
                number => Err(io::Error::from_raw_os_error(number.saturating_neg())),
            }
        }
        _ => Err(io::Error::other("the kernel's answer is not understood")),
    }
}
