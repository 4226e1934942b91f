//! What a pod's interfaces have received and sent, as the kernel counts it in the pod's network.

use std::io;
use std::path::PathBuf;

use sys::namespace::{Kind, pin};

/// An interface's counters since it was made.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct Interface {
    pub name: String,
    pub rx: Traffic,
    pub tx: Traffic,
}

/// One direction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Traffic {
    pub bytes: u64,
    pub packets: u64,
    pub errors: u64,
    pub dropped: u64,
}

/// The interface that pods have by default.
const DEFAULT: &str = "eth0";

/// The interfaces of the network that is bound to this file, but for the loopback one; the default one first. Blocks.
pub(super) fn interfaces(netns: &str) -> io::Result<Vec<Interface>> {
    let text = pin(&[], &[(Kind::Network, PathBuf::from(netns))], || {
        std::fs::read_to_string("/proc/thread-self/net/dev")
    })?;
    Ok(parse(&text))
}

/// Lines of `NAME: bytes packets errs drop fifo frame compressed multicast`, and the same for what is sent, below two of
/// headings.
fn parse(text: &str) -> Vec<Interface> {
    let traffic = |numbers: &[u64]| Traffic {
        bytes: numbers[0],
        packets: numbers[1],
        errors: numbers[2],
        dropped: numbers[3],
    };
    let interface = |line: &str| {
        let (name, numbers) = line.rsplit_once(':')?;
        let numbers: Vec<u64> = numbers.split_whitespace().filter_map(|number| number.parse().ok()).collect();
        let (rx, tx) = (numbers.get(0..4)?, numbers.get(8..12)?);
        Some(Interface { name: name.trim().to_owned(), rx: traffic(rx), tx: traffic(tx) })
    };
    let mut found: Vec<Interface> = text.lines().filter_map(interface).collect();
    found.retain(|interface| interface.name != "lo");
    // The order of the others stays.
    found.sort_by_key(|interface| interface.name != DEFAULT);
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_default_interface_is_first_and_loopback_is_none() {
        let text = "\
Inter-|   Receive                                                |  Transmit
 face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed
    lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0
  net1: 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16
  eth0: 470472813   18872    1    2    0     0          0         0  1314060   13624    3    4    0     0       0          0
broken: 1 2
";
        let found = parse(text);
        assert_eq!(found.iter().map(|found| found.name.as_str()).collect::<Vec<_>>(), ["eth0", "net1"]);
        assert_eq!(found[0].rx, Traffic { bytes: 470_472_813, packets: 18872, errors: 1, dropped: 2 });
        assert_eq!(found[0].tx, Traffic { bytes: 1_314_060, packets: 13624, errors: 3, dropped: 4 });
        assert_eq!(found[1].tx, Traffic { bytes: 9, packets: 10, errors: 11, dropped: 12 });
    }

    #[test]
    fn a_network_without_a_process_is_read() {
        if !rustix::process::geteuid().is_root() {
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("net");
        pin(&[(Kind::Network, path.clone())], &[], || Ok(())).unwrap();
        let found = interfaces(path.to_str().unwrap());
        sys::namespace::unpin(&path).unwrap();
        // Some kernels put tunnels into each, and this host's own interface is in none of them.
        assert!(found.unwrap().iter().all(|interface| interface.rx.bytes == 0 && interface.name != "eth0"));
        assert!(interfaces(path.to_str().unwrap()).is_err());
    }
}
