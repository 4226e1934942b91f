//! A connection to what listens at localhost, within a network namespace.
//!
//! A socket is of the namespace of the thread that made it, for good: it is made within, and connected from without.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpStream};
use std::os::fd::OwnedFd;
use std::path::Path;

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use sys::namespace::Kind;
use tokio::net::TcpSocket;

use crate::error::{Error, Result, blocking};

/// Connects to a port of localhost, by IPv4 or else by IPv6; in the host's network without a namespace.
pub(super) async fn localhost(netns: Option<&Path>, port: u16) -> Result<tokio::net::TcpStream> {
    let namespace = netns.map(Path::to_owned);
    let sockets = blocking(move || {
        let made = match &namespace {
            Some(path) => sys::namespace::pin(&[], &[(Kind::Network, path.clone())], || Ok(sockets())),
            None => Ok(sockets()),
        };
        made.map_err(|error| Error::unknown(format!("join the network of the pod: {error}")))
    });
    let mut failures = Vec::new();
    for (address, socket) in sockets.await? {
        let connected = async {
            TcpSocket::from_std_stream(TcpStream::from(socket?)).connect(SocketAddr::new(address, port)).await
        };
        match connected.await {
            Ok(stream) => {
                // Small messages are not to wait for one another.
                let _ = stream.set_nodelay(true);
                return Ok(stream);
            }
            Err(error) => failures.push(format!("{address}: {error}")),
        }
    }
    Err(Error::unavailable(format!("connect to localhost: {}", failures.join("; "))))
}

/// A socket for each family of addresses, of this thread's network.
fn sockets() -> [(IpAddr, io::Result<OwnedFd>); 2] {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    [
        (IpAddr::V4(Ipv4Addr::LOCALHOST), AddressFamily::INET),
        (IpAddr::V6(Ipv6Addr::LOCALHOST), AddressFamily::INET6),
    ]
    .map(|(address, family)| {
        (address, rustix::net::socket_with(family, SocketType::STREAM, flags, None).map_err(Into::into))
    })
}

#[cfg(test)]
mod tests {
    use std::process::Command;

    use tokio::io::AsyncReadExt as _;

    use super::*;

    #[tokio::test]
    async fn either_family_of_addresses_will_do() {
        for address in ["127.0.0.1:0", "[::1]:0"] {
            let Ok(listener) = tokio::net::TcpListener::bind(address).await else { continue };
            let port = listener.local_addr().unwrap().port();
            let (connected, accepted) = tokio::join!(localhost(None, port), listener.accept());
            assert_eq!(connected.unwrap().local_addr().unwrap(), accepted.unwrap().1);
            drop(listener);
            let refused = localhost(None, port).await.unwrap_err().to_string();
            assert!(refused.contains("127.0.0.1") && refused.contains("::1"), "{refused}");
        }
    }

    #[tokio::test]
    async fn a_connection_is_made_within_the_namespace() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("net");
        let listener = sys::namespace::pin(&[(Kind::Network, path.clone())], &[], || {
            let up = Command::new("ip").args(["link", "set", "lo", "up"]).status()?;
            assert!(up.success());
            let listener = std::net::TcpListener::bind("127.0.0.1:80")?;
            listener.set_nonblocking(true)?;
            Ok(listener)
        })
        .unwrap();
        let listener = tokio::net::TcpListener::from_std(listener).unwrap();
        let (connected, accepted) = tokio::join!(localhost(Some(&path), 80), listener.accept());
        drop(accepted.unwrap());
        let mut rest = Vec::new();
        assert_eq!(connected.unwrap().read_to_end(&mut rest).await.unwrap(), 0);
        drop(listener);
        sys::namespace::unpin(&path).unwrap();
        assert!(localhost(Some(&dir.path().join("none")), 80).await.is_err());
    }
}
