//! Networks of tests' own: an engine in a network namespace, with a bridge for its pods, and a neighbour of it.
//!
//! ```text
//!  namespace NAME: engine, pods' bridge 10.88.0.0/16      namespace NAME-p: who connects from outside
//!                  veth 10.99.0.1 ------------------------ veth 10.99.0.2
//! ```
//!
//! Nothing of it is in the machine's own network, so that tests run beside each other with the same addresses.

use std::fs::{self, File};
use std::io;
use std::net::{IpAddr, SocketAddr, TcpStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use nix::sched::{CloneFlags, setns};
use serde_json::json;

/// The engine's address for its neighbour.
pub const HOST: &str = "10.99.0.1";
/// The folder of Debian's plugins.
pub const PLUGINS: &str = "/usr/lib/cni";
/// The program that is needed for ports of the host.
pub const IPTABLES: &str = "/usr/sbin/iptables";
/// The program that makes networks.
pub const IP: &str = "/usr/sbin/ip";
/// Two network namespaces and the plugins' configuration.
pub struct Network {
    name: String,
    folder: PathBuf,
}

/// From where something is done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum From {
    /// Where the engine is.
    Host,
    /// The neighbour.
    Outside,
}

impl Network {
    /// Makes the networks; the plugins' files are in `folder`.
    pub fn new(folder: &Path) -> Self {
        static NUMBER: AtomicU32 = AtomicU32::new(0);
        let name = format!("gt{}n{}", std::process::id(), NUMBER.fetch_add(1, Ordering::Relaxed));
        let network = Network { name, folder: folder.to_owned() };
        let outside = network.namespace(From::Outside);
        let inside = network.namespace(From::Host);
        for namespace in [&inside, &outside] {
            ip(&["netns", "add", namespace]);
            ip(&["-n", namespace, "link", "set", "lo", "up"]);
        }
        ip(&["-n", &inside, "link", "add", "up0", "type", "veth", "peer", "name", "up0", "netns", &outside]);
        for (namespace, address) in [(&inside, HOST), (&outside, "10.99.0.2")] {
            ip(&["-n", namespace, "address", "add", &format!("{address}/24"), "dev", "up0"]);
            ip(&["-n", namespace, "link", "set", "up0", "up"]);
            ip(&["-n", namespace, "route", "add", "default", "dev", "up0"]);
        }
        let conf = json!({
            "cniVersion": "1.0.0",
            "name": network.name,
            "plugins": [
                {
                    "type": "bridge", "bridge": "pods0", "isGateway": true, "hairpinMode": true,
                    "ipam": {
                        "type": "host-local", "dataDir": network.addresses_folder(),
                        "ranges": [[{"subnet": "10.88.0.0/16"}]], "routes": [{"dst": "0.0.0.0/0"}],
                    },
                },
                {"type": "portmap", "capabilities": {"portMappings": true}},
            ],
        });
        fs::create_dir_all(network.configuration()).unwrap();
        fs::write(network.configuration().join("10-test.conflist"), conf.to_string()).unwrap();
        network
    }

    /// The name of the namespace.
    pub fn namespace(&self, of: From) -> String {
        match of {
            From::Host => self.name.clone(),
            From::Outside => format!("{}p", self.name),
        }
    }

    /// The file of the namespace.
    pub fn file(&self, of: From) -> PathBuf {
        Path::new("/run/netns").join(self.namespace(of))
    }

    /// The folder of the plugins' configuration.
    pub fn configuration(&self) -> PathBuf {
        self.folder.join("net.d")
    }

    fn addresses_folder(&self) -> PathBuf {
        self.folder.join("ipam")
    }

    /// The addresses that pods have.
    pub fn addresses(&self) -> Vec<IpAddr> {
        let entries = fs::read_dir(self.addresses_folder().join(&self.name)).into_iter().flatten().flatten();
        entries.filter_map(|entry| entry.file_name().to_str()?.parse().ok()).collect()
    }

    /// Ports of the host that lead to pods, as the kernel has them: one line each.
    pub fn mapped_ports(&self) -> Vec<String> {
        let rules = Command::new(IP)
            .args(["netns", "exec", &self.name, IPTABLES, "-t", "nat", "-S"])
            .output()
            .unwrap();
        let rules = String::from_utf8_lossy(&rules.stdout).into_owned();
        rules.lines().filter(|line| line.contains("--to-destination")).map(str::to_owned).collect()
    }

    /// The interfaces of pods at the bridge's side.
    pub fn ports(&self) -> Vec<String> {
        let links = Command::new(IP)
            .args(["-n", &self.name, "-o", "link", "show", "master", "pods0"])
            .output()
            .unwrap();
        String::from_utf8_lossy(&links.stdout).lines().map(str::to_owned).collect()
    }

    /// Runs this on a thread in one of the networks. What it opens stays there.
    pub fn within<T: Send>(&self, from: From, work: impl FnOnce() -> T + Send) -> T {
        within(&self.file(from), work)
    }

    /// Connects from one of the networks.
    pub fn connect(&self, from: From, to: SocketAddr) -> io::Result<TcpStream> {
        self.within(from, || TcpStream::connect_timeout(&to, Duration::from_secs(5)))
    }
}

/// Runs this on a thread in the network that is bound to this file.
pub fn within<T: Send>(file: &Path, work: impl FnOnce() -> T + Send) -> T {
    std::thread::scope(|scope| {
        let inside = scope.spawn(|| {
            setns(File::open(file).unwrap(), CloneFlags::CLONE_NEWNET).unwrap();
            work()
        });
        inside.join().unwrap()
    })
}

fn ip(arguments: &[&str]) {
    let ended = Command::new(IP).args(arguments).output().unwrap();
    assert!(ended.status.success(), "ip {}: {}", arguments.join(" "), String::from_utf8_lossy(&ended.stderr));
}

impl Drop for Network {
    fn drop(&mut self) {
        for of in [From::Host, From::Outside] {
            let _ = Command::new(IP).args(["netns", "delete", &self.namespace(of)]).output();
        }
    }
}
