//! The networks as pods have them: Debian's plugins where the right thing is done, and small scripts where it is not.
//!
//! Each test has a network namespace of its own for a host, so that no interface and no rule is made on the real one.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::cell::Cell;
use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::unix::fs::PermissionsExt as _;
use std::process::Command;
use std::time::Instant;

use serde_json::json;
use sys::namespace::{Kind, pin, unpin};

use super::*;

const PLUGINS: &str = "/usr/lib/cni";
/// What a plugin prints that has nothing to say.
const RESULT: &str = r#"echo '{"interfaces":[{"name":"eth0","sandbox":"x"}],"ips":[{"address":"10.9.9.9/24","interface":0}]}'"#;

/// A host of a test.
struct Host {
    dir: tempfile::TempDir,
    pods: Cell<u32>,
}

/// Runs a test on a host of its own. Without root or the plugins it says so and passes, unless all tests must run.
fn on_a_host(test: impl AsyncFnOnce(&Host) + Send) {
    let missing = match (rustix::process::geteuid().is_root(), Path::new(PLUGINS).join("bridge").exists()) {
        (false, _) => Some("root"),
        (_, false) => Some("Debian's containernetworking-plugins"),
        _ => None,
    };
    if let Some(missing) = missing {
        assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "this test needs {missing}");
        eprintln!("skipped: needs {missing}");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("host");
    let host = Host { dir, pods: Cell::new(0) };
    for folder in ["conf", "bin", "netns", "ipam"] {
        fs::create_dir(host.path(folder)).unwrap();
    }
    let host = pin(&[(Kind::Network, file.clone())], &[], move || {
        run("ip", &["link", "set", "lo", "up"]);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        runtime.block_on(test(&host));
        Ok(host)
    });
    let host = host.unwrap();
    unpin(&file).unwrap();
    host.let_go();
    assert!(sys::mount::mounts_under(host.dir.path()).unwrap().is_empty());
}

/// A test that fails leaves nothing either.
impl Drop for Host {
    fn drop(&mut self) {
        self.let_go();
    }
}

fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(output.status.success(), "{program} {arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// What a condition becomes true within; no test waits for a time.
async fn wait_for(what: &str, condition: impl Fn() -> bool) {
    let since = Instant::now();
    while !condition() {
        assert!(since.elapsed() < Duration::from_secs(60), "{what} is still to come");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

impl Host {
    fn let_go(&self) {
        for entry in fs::read_dir(self.path("netns")).into_iter().flatten().flatten() {
            let _ = unpin(&entry.path());
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    fn settings(&self) -> Settings {
        Settings {
            conf_dir: self.path("conf"),
            bin_dirs: vec![self.path("bin"), PLUGINS.into()],
            cache_dir: self.path("cache"),
            ..Settings::default()
        }
    }

    fn cni(&self) -> Cni {
        Cni::open(self.settings()).unwrap()
    }

    fn conf(&self, name: &str, conf: &Value) {
        fs::write(self.path("conf").join(name), conf.to_string()).unwrap();
    }

    /// A network of these scripts.
    fn network(&self, version: &str, scripts: &[&str]) {
        let plugins: Vec<Value> = scripts.iter().map(|name| json!({"type": name})).collect();
        self.conf("10-test.conflist", &json!({"cniVersion": version, "name": "test", "plugins": plugins}));
    }

    /// A plugin that is a script: it notes each call, and keeps what it is given.
    fn plugin(&self, name: &str, body: &str) {
        let (file, calls, dir) = (self.path("bin").join(name), self.path("calls"), self.dir.path());
        let text = format!(
            "#!/bin/sh\nenv > {dir}/{name}.$CNI_COMMAND.env\ncat > {dir}/{name}.$CNI_COMMAND.json\n\
             echo \"$CNI_COMMAND {name}\" >> {calls}\n{body}\n",
            calls = calls.display(),
            dir = dir.display()
        );
        fs::write(&file, text).unwrap();
        fs::set_permissions(&file, fs::Permissions::from_mode(0o755)).unwrap();
    }

    /// What was called since the last look.
    fn calls(&self) -> Vec<String> {
        let calls = fs::read_to_string(self.path("calls")).unwrap_or_default();
        let _ = fs::remove_file(self.path("calls"));
        calls.lines().map(str::to_owned).collect()
    }

    fn given(&self, plugin: &str, verb: &str) -> Value {
        serde_json::from_slice(&fs::read(self.path(&format!("{plugin}.{verb}.json"))).unwrap()).unwrap()
    }

    fn pod(&self) -> Pod {
        self.pods.set(self.pods.get() + 1);
        let id = format!("pod{}", self.pods.get());
        let netns = self.path("netns").join(&id);
        pin(&[(Kind::Network, netns.clone())], &[], || Ok(())).unwrap();
        Pod {
            name: id.clone(),
            id,
            netns: Some(netns),
            namespace: "ns".into(),
            uid: "u".into(),
            ..Pod::default()
        }
    }

    fn in_pod(&self, pod: &Pod, command: &[&str]) -> String {
        let net = format!("--net={}", pod.netns.as_ref().unwrap().display());
        let mut arguments = vec![net.as_str()];
        arguments.extend(command);
        run("nsenter", &arguments)
    }

    fn records(&self) -> Vec<String> {
        let Ok(entries) = fs::read_dir(self.path("cache/results")) else { return Vec::new() };
        let mut names: Vec<String> = entries.map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }

    /// The addresses that are given away.
    fn given_away(&self) -> usize {
        let Ok(networks) = fs::read_dir(self.path("ipam")) else { return 0 };
        let names = networks.flat_map(|network| fs::read_dir(network.unwrap().path()).unwrap());
        names.filter(|e| e.as_ref().unwrap().file_name().to_str().unwrap().parse::<IpAddr>().is_ok()).count()
    }

    fn ipam(&self) -> Value {
        json!({"type": "host-local", "dataDir": self.path("ipam"),
            "ranges": [[{"subnet": "10.77.0.0/24"}], [{"subnet": "fd77::/64"}]],
            "routes": [{"dst": "0.0.0.0/0"}, {"dst": "::/0"}]})
    }

    /// Nothing is left but what outlives pods: the bridge, and empty chains.
    fn assert_clean(&self) {
        assert_eq!(self.records(), [""; 0]);
        let inputs = fs::read_dir(self.path("cache/gantry")).map_or(0, Iterator::count);
        assert_eq!(inputs, 0);
        assert_eq!(self.given_away(), 0);
        let links = run("ip", &["-o", "link"]);
        assert!(!links.contains("veth") && !links.contains("macvlan"), "{links}");
        for program in ["iptables-save", "ip6tables-save"] {
            let rules = run(program, &[]);
            assert!(
                !rules.contains("10.77.0.") && !rules.contains("fd77::") && !rules.contains("pod"),
                "{rules}"
            );
        }
    }
}

#[test]
fn a_pod_has_two_families_ports_limits_and_a_mac_and_leaves_nothing() {
    on_a_host(async |host| {
        host.conf(
            "10-net.conflist",
            &json!({"cniVersion": "0.4.0", "cniVersions": ["0.3.1", "1.0.0", "1.1.0"], "name": "net",
                "disableCheck": true, "plugins": [
                {"type": "bridge", "bridge": "cni0", "isGateway": true, "ipMasq": true, "ipam": host.ipam()},
                {"type": "portmap", "capabilities": {"portMappings": true}},
                {"type": "firewall", "backend": "iptables"},
                {"type": "tuning", "capabilities": {"mac": true}, "sysctl": {"net.core.somaxconn": "500"}},
                {"type": "bandwidth", "capabilities": {"bandwidth": true}}]}),
        );
        let cni = host.cni();
        assert!(cni.status().await.ready);
        let mut pod = host.pod();
        pod.port_mappings = vec![
            PortMapping {
                host_port: 18080,
                container_port: 80,
                protocol: "tcp".into(),
                host_ip: String::new(),
            },
            PortMapping { host_port: 0, container_port: 81, protocol: "tcp".into(), host_ip: String::new() },
        ];
        pod.bandwidth = Some(Bandwidth {
            ingress_rate: 8_000_000,
            ingress_burst: 8_000_000,
            egress_rate: 8_000_000,
            egress_burst: 8_000_000,
        });
        pod.capabilities.insert("mac".into(), "c2:11:22:33:44:55".into());
        let attachment = cni.setup(pod.clone()).await.unwrap();
        assert_eq!(attachment.ip.to_string(), "10.77.0.2");
        assert_eq!(attachment.additional_ips, ["fd77::2".parse::<IpAddr>().unwrap()]);
        let verbose = attachment.to_verbose();
        assert_eq!(verbose["Interfaces"]["eth0"]["IPConfigs"][0]["IP"], "10.77.0.2");
        assert_eq!(verbose["Interfaces"]["eth0"]["IPConfigs"][0]["Gateway"], "10.77.0.1");
        let stored = serde_json::to_vec(&attachment).unwrap();
        assert_eq!(serde_json::from_slice::<Attachment>(&stored).unwrap(), attachment);

        let seen = host.in_pod(&pod, &["ip", "addr"]);
        for part in ["127.0.0.1/8", "10.77.0.2/24", "fd77::2/64", "c2:11:22:33:44:55"] {
            assert!(seen.contains(part), "{seen}");
        }
        assert_eq!(host.in_pod(&pod, &["cat", "/proc/sys/net/core/somaxconn"]).trim(), "500");
        assert!(run("tc", &["qdisc"]).contains("tbf"));

        // A port of the host leads to the pod.
        let netns = pod.netns.clone().unwrap();
        let listener = pin(&[], &[(Kind::Network, netns)], || TcpListener::bind("0.0.0.0:80")).unwrap();
        let server = std::thread::spawn(move || listener.accept().unwrap().0.write_all(b"pod").unwrap());
        let mut client =
            TcpStream::connect_timeout(&"10.77.0.1:18080".parse().unwrap(), Duration::from_secs(20)).unwrap();
        let mut said = String::new();
        client.read_to_string(&mut said).unwrap();
        assert_eq!(said, "pod");
        server.join().unwrap();

        // Debian's plugins do not speak 1.1.0 yet.
        assert_eq!(host.records(), ["net-pod1-eth0"]);
        let record: Value =
            serde_json::from_slice(&fs::read(host.path("cache/results/net-pod1-eth0")).unwrap()).unwrap();
        assert_eq!(record["result"]["cniVersion"], "1.0.0");

        // Another engine comes up, and the configuration goes; what is attached is known all the same. (This release's portmap
        // fails its CHECK of two families, whoever asks.)
        let cni = host.cni();
        assert!(!cni.check(&pod).await.unwrap());
        fs::remove_file(host.path("conf/10-net.conflist")).unwrap();
        assert!(!cni.status().await.ready);
        cni.teardown(pod.clone()).await.unwrap();
        host.assert_clean();
        assert!(!run("tc", &["qdisc"]).contains("tbf"));
        assert!(!host.in_pod(&pod, &["ip", "link"]).contains("eth0"));
        cni.teardown(pod.clone()).await.unwrap();
        assert!(matches!(cni.check(&pod).await, Err(Error::NotAttached(_))));
    });
}

#[test]
fn every_version_that_the_plugins_speak_attaches_and_detaches() {
    on_a_host(async |host| {
        let cni = host.cni();
        for version in ["", "0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0"] {
            host.conf(
                "10-net.conflist",
                &json!({"cniVersion": version, "name": "net", "plugins": [
                    {"type": "ptp", "ipMasq": true, "ipam": host.ipam()}, {"type": "tuning"}]}),
            );
            let pod = host.pod();
            // The first versions have no list of interfaces, and tuning looks for one in what ptp said.
            let attachment = cni.setup(pod.clone()).await.unwrap();
            assert!(
                attachment.ip.is_ipv4() && attachment.additional_ips.len() == 1,
                "{version}: {attachment:?}"
            );
            assert_eq!(cni.check(&pod).await.unwrap(), version >= "0.4.0", "{version}");
            let address = format!("{}/24", attachment.ip);
            host.in_pod(&pod, &["ip", "addr", "del", &address, "dev", "eth0"]);
            match cni.check(&pod).await {
                Ok(asked) => assert!(!asked && version < "0.4.0", "{version}"),
                Err(Error::Plugin { verb: "CHECK", plugin, .. }) => assert_eq!(plugin, "ptp"),
                Err(error) => panic!("{error}"),
            }
            // It goes by the addresses when it takes its rules away.
            host.in_pod(&pod, &["ip", "addr", "add", &address, "dev", "eth0"]);
            cni.teardown(pod).await.unwrap();
            host.assert_clean();
        }
    });
}

#[test]
fn a_pod_is_attached_to_as_many_networks_as_are_asked_for() {
    on_a_host(async |host| {
        run("ip", &["link", "add", "up0", "type", "bridge"]);
        run("ip", &["link", "set", "up0", "up"]);
        let static_ipam = json!({"type": "static", "addresses": [{"address": "192.168.7.7/24"}]});
        host.conf("10-a.conflist", &json!({"cniVersion": "1.0.0", "name": "a", "plugins": [{"type": "bridge", "ipam": host.ipam()}]}));
        host.conf("20-b.conf", &json!({"cniVersion": "0.3.1", "name": "b", "type": "macvlan", "master": "up0", "ipam": static_ipam}));
        // A configuration may ask for the loopback's plugin.
        host.conf("30-lo.conf", &json!({"cniVersion": "1.0.0", "name": "lo", "type": "loopback"}));
        let settings = Settings { max_conf_num: 2, ip_preference: IpPreference::Ipv6, ..host.settings() };
        let cni = Cni::open(settings).unwrap();
        let pod = host.pod();
        let attachment = cni.setup(pod.clone()).await.unwrap();
        assert_eq!((attachment.ip.to_string().as_str(), attachment.networks.len()), ("fd77::2", 2));
        assert_eq!(attachment.networks[1].interface, "eth1");
        assert!(host.in_pod(&pod, &["ip", "addr"]).contains("192.168.7.7/24"));
        assert_eq!(host.records(), ["a-pod1-eth0", "b-pod1-eth1"]);

        // A second setup of the same pod is a teardown and a setup.
        cni.setup(pod.clone()).await.unwrap();
        assert_eq!((host.given_away(), host.records().len()), (2, 2));

        // The namespace goes first, with its interfaces; the addresses are let go all the same.
        unpin(pod.netns.as_ref().unwrap()).unwrap();
        cni.teardown(pod).await.unwrap();
        host.assert_clean();
    });
}

#[test]
fn twenty_pods_at_once_have_addresses_of_their_own() {
    on_a_host(async |host| {
        let bridge = json!({"type": "bridge", "ipam": host.ipam()});
        let ports = json!({"type": "portmap", "capabilities": {"portMappings": true}});
        host.conf("10-a.conflist", &json!({"cniVersion": "1.0.0", "name": "a", "plugins": [bridge, ports]}));
        let cni = host.cni();
        let pods: Vec<Pod> = (0..20)
            .map(|number| Pod {
                port_mappings: vec![PortMapping {
                    host_port: 20_000 + number,
                    container_port: 80,
                    protocol: "tcp".into(),
                    host_ip: String::new(),
                }],
                ..host.pod()
            })
            .collect();
        // The first makes the chains that all share: portmap fails when it makes them twice at once.
        let mut made = vec![cni.setup(pods[0].clone()).await];
        made.extend(futures_of(pods[1..].iter().map(|pod| cni.setup(pod.clone()))).await);
        let addresses: BTreeSet<IpAddr> = made.into_iter().map(|made| made.unwrap().ip).collect();
        assert_eq!(addresses.len(), 20);
        for gone in futures_of(pods.iter().map(|pod| cni.teardown(pod.clone()))).await {
            gone.unwrap();
        }
        host.assert_clean();
    });
}

/// All of them at once.
async fn futures_of<T>(futures: impl Iterator<Item = impl Future<Output = T>>) -> Vec<T> {
    let mut under_way: Vec<_> = futures.map(|future| (Box::pin(future), None)).collect();
    std::future::poll_fn(|context| {
        for (future, outcome) in &mut under_way {
            if outcome.is_none()
                && let std::task::Poll::Ready(value) = future.as_mut().poll(context)
            {
                *outcome = Some(value);
            }
        }
        match under_way.iter().all(|(_, outcome)| outcome.is_some()) {
            true => std::task::Poll::Ready(()),
            false => std::task::Poll::Pending,
        }
    })
    .await;
    under_way.into_iter().filter_map(|(_, outcome)| outcome).collect()
}

#[test]
fn plugins_are_told_what_the_specification_says_and_nothing_else() {
    on_a_host(async |host| {
        host.plugin("one", RESULT);
        host.plugin("two", "if [ $CNI_COMMAND = ADD ]; then echo '{\"cniVersion\":\"0.3.1\",\"ips\":[{\"version\":\"4\",\"address\":\"10.9.9.8/24\"}]}'; fi");
        host.conf(
            "10-test.conflist",
            &json!({"cniVersion": "1.0.0", "name": "test", "plugins": [
                {"type": "one", "capabilities": {"io.kubernetes.cri.pod-annotations": true, "dns": true, "cgroupPath": true}},
                {"type": "two", "x": {"y": [1, 2.5, null]}}]}),
        );
        let mut pod = host.pod();
        pod.annotations.insert("k".into(), "v".into());
        pod.dns = Some(PodDns { servers: vec!["10.0.0.10".into()], ..PodDns::default() });
        pod.cgroup_path = Some("/kubepods/pod1".into());
        let cni = host.cni();
        let attachment = cni.setup(pod.clone()).await.unwrap();
        assert_eq!(attachment.ip.to_string(), "10.9.9.8");
        assert_eq!(
            host.given("one", "ADD")["runtimeConfig"],
            json!({"io.kubernetes.cri.pod-annotations": {"k": "v"}, "cgroupPath": "/kubepods/pod1",
                "dns": {"servers": ["10.0.0.10"], "searches": [], "options": []}})
        );
        assert_eq!(host.given("one", "ADD").get("prevResult"), None);
        let second = host.given("two", "ADD");
        assert_eq!(
            (&second["name"], &second["cniVersion"], &second["x"]),
            (&json!("test"), &json!("1.0.0"), &json!({"y": [1, 2.5, null]}))
        );
        assert_eq!(second["prevResult"]["ips"][0]["address"], "10.9.9.9/24");
        let environment = fs::read_to_string(host.path("one.ADD.env")).unwrap();
        let mut variables: Vec<&str> =
            environment.lines().map(|line| line.split('=').next().unwrap()).collect();
        variables.retain(|name| !["PWD", "OLDPWD", "SHLVL", "_"].contains(name));
        variables.sort_unstable();
        assert_eq!(
            variables,
            ["CNI_ARGS", "CNI_COMMAND", "CNI_CONTAINERID", "CNI_IFNAME", "CNI_NETNS", "CNI_PATH", "PATH"]
        );
        let arguments = "CNI_ARGS=IgnoreUnknown=1;K8S_POD_NAMESPACE=ns;K8S_POD_NAME=pod1;K8S_POD_INFRA_CONTAINER_ID=pod1;K8S_POD_UID=u\n";
        assert!(
            environment.contains(arguments) && environment.contains("CNI_IFNAME=eth0\n"),
            "{environment}"
        );

        // DEL has the last result, in the version of the network, and the arguments of ADD.
        cni.teardown(Pod { id: pod.id.clone(), ..Pod::default() }).await.unwrap();
        assert_eq!(host.calls(), ["ADD one", "ADD two", "DEL two", "DEL one"]);
        let last = &host.given("one", "DEL")["prevResult"];
        assert_eq!(
            (&last["cniVersion"], &last["ips"][0]["address"]),
            (&json!("1.0.0"), &json!("10.9.9.8/24"))
        );
        assert!(fs::read_to_string(host.path("one.DEL.env")).unwrap().contains(arguments));
        assert_eq!(host.given("one", "DEL")["runtimeConfig"]["cgroupPath"], "/kubepods/pod1");
    });
}

#[test]
fn a_setup_that_fails_is_undone_whatever_the_plugin_does() {
    on_a_host(async |host| {
        let bad = |body: &str| format!("[ $CNI_COMMAND = ADD ] || exit 0\n{body}");
        let not_executable = host.path("bin/plain");
        fs::write(&not_executable, "#!/bin/sh\n").unwrap();
        for (name, body, expected) in [
            (
                "refuses",
                "echo '{\"code\":11,\"msg\":\"later\",\"details\":\"soon\"}'; exit 1",
                "later; soon (code 11)",
            ),
            ("silent", "exit 3", "said nothing"),
            ("complains", "echo oh dear >&2; exit 1", "oh dear"),
            ("empty", "exit 0", "no result"),
            ("garbage", "head -c 1000 /dev/urandom", "no result"),
            ("wrong", "echo '{\"ips\":[{\"address\":\"10.0.0.1/8\",\"interface\":7}]}'", "interface 7"),
            ("newer", "echo '{\"cniVersion\":\"9.9.9\"}'", "9.9.9"),
            ("huge", "head -c 100000000 /dev/zero", "more than"),
            ("noisy", "head -c 100000000 /dev/zero >&2; exit 1", "ended with"),
            (
                "hangs",
                "sleep 1000 & echo $! > $(dirname $0)/../sleeper; echo waiting >&2; wait",
                "said: waiting",
            ),
            ("killed", "kill -9 $$", "signal: 9"),
            ("plain", "", "cannot be executed"),
            ("missing", "", "not found in"),
        ] {
            if !["plain", "missing"].contains(&name) {
                host.plugin(name, &bad(body));
            }
            // What is real before it gets an address, and must let go of it.
            host.conf(
                "10-test.conflist",
                &json!({"cniVersion": "1.0.0", "name": "test", "plugins": [
                    {"type": "bridge", "ipam": host.ipam()}, {"type": name}, {"type": "portmap"}]}),
            );
            let limit = Duration::from_secs(if name == "hangs" { 5 } else { 60 });
            let cni = Cni::open(Settings { limit, ..host.settings() }).unwrap();
            let pod = host.pod();
            let SetupError { cause, left } = cni.setup(pod.clone()).await.unwrap_err();
            assert!(cause.to_string().contains(expected), "{name}: {cause}");
            assert!(
                cause.to_string().contains(&format!("plugin {name} of network test failed (ADD)")),
                "{cause}"
            );
            assert!(left.is_none(), "{name}: {left:?}");
            assert!(cause.to_string().len() < 6_000);
            let expected: &[&str] = match name {
                "plain" | "missing" => &[],
                _ => &["ADD ", "DEL "],
            };
            let expected: Vec<String> = expected.iter().map(|verb| format!("{verb}{name}")).collect();
            assert_eq!(host.calls(), expected, "{name}");
            assert!(!host.in_pod(&pod, &["ip", "link"]).contains("eth0"), "{name}");
            host.assert_clean();
        }
        // The child of the one that hung is dead with it.
        let sleeper = fs::read_to_string(host.path("sleeper")).unwrap();
        let process = PathBuf::from(format!("/proc/{}", sleeper.trim()));
        wait_for("the end of the plugin's child", || {
            fs::read_to_string(process.join("stat")).map_or(true, |stat| stat.contains(") Z "))
        })
        .await;
    });
}

#[test]
fn a_network_without_an_address_and_a_pod_that_cannot_be_are_refused() {
    on_a_host(async |host| {
        let cni = host.cni();
        let nothing = cni.setup(host.pod()).await.unwrap_err();
        assert!(matches!(nothing.cause, Error::NotInitialized), "{nothing}");
        host.plugin("one", "echo '{}'");
        host.network("1.0.0", &["one"]);
        let refused = async |pod: Pod| cni.setup(pod).await.unwrap_err().cause.to_string();
        assert!(refused(host.pod()).await.contains("no address"));
        assert_eq!(host.calls(), ["ADD one", "DEL one"]);
        assert!(refused(Pod { id: "../x".into(), ..host.pod() }).await.contains("no id"));
        assert!(refused(Pod { name: "a;IgnoreUnknown=0".into(), ..host.pod() }).await.contains("separates"));
        assert!(refused(Pod { netns: None, ..host.pod() }).await.contains("no network namespace"));
        assert!(refused(Pod { netns: Some("/nowhere".into()), ..host.pod() }).await.contains("/nowhere"));
        assert_eq!(host.calls(), [""; 0]);
        host.assert_clean();
        assert!(Cni::open(Settings { interface_prefix: "a/b".into(), ..host.settings() }).is_err());
        assert!(Cni::open(Settings { bin_dirs: vec!["/a:b".into()], ..host.settings() }).is_err());
    });
}

#[test]
fn what_cannot_be_taken_away_is_asked_for_again_until_it_holds() {
    on_a_host(async |host| {
        host.plugin("one", RESULT);
        host.plugin("two", &format!("[ $CNI_COMMAND = ADD ] && exec sh -c '{}'\n[ -e $(dirname $0)/../well ] || {{ echo '{{\"code\":11,\"msg\":\"busy\"}}'; exit 1; }}", RESULT.replace('\'', "'\\''")));
        host.network("0.4.0", &["one", "two"]);
        let cni = host.cni();
        let pod = host.pod();
        cni.setup(pod.clone()).await.unwrap();
        host.calls();
        for _ in 0..2 {
            let retry = cni.teardown(pod.clone()).await.unwrap_err();
            assert_eq!((retry.pod.as_str(), retry.reasons.len()), ("pod1", 1));
            assert!(retry.to_string().contains("busy (code 11)"), "{retry}");
            // The address of one that still has rules is not let go.
            assert_eq!(host.calls(), ["DEL two"]);
            assert_eq!(host.records(), ["test-pod1-eth0"]);
        }
        // A new engine knows of it, too; the pod may be gone by then, and its namespace.
        unpin(pod.netns.as_ref().unwrap()).unwrap();
        fs::write(host.path("well"), "").unwrap();
        host.cni().teardown(Pod { id: pod.id.clone(), ..Pod::default() }).await.unwrap();
        assert_eq!(host.calls(), ["DEL two", "DEL one"]);
        assert!(fs::read_to_string(host.path("one.DEL.env")).unwrap().contains("CNI_NETNS=\n"));
        host.assert_clean();

        // A record that cannot be read is no reason to keep an address for ever, as long as its network is known.
        fs::write(host.path("cache/results/test-pod9-eth0"), "{\"kin").unwrap();
        fs::write(host.path("cache/results/other-pod8-eth0"), "{\"kin").unwrap();
        cni.teardown(Pod { id: "pod9".into(), ..Pod::default() }).await.unwrap();
        assert_eq!(host.calls(), ["DEL two", "DEL one"]);
        let retry = cni.teardown(Pod { id: "pod8".into(), ..Pod::default() }).await.unwrap_err();
        assert!(retry.to_string().contains("remove the file"), "{retry}");

        // A setup whose undoing fails says so, and what is left can be asked for.
        fs::remove_file(host.path("well")).unwrap();
        host.plugin("three", "[ $CNI_COMMAND = DEL ] || exit 1");
        // The last was never run: that it cannot be is no reason to wait for it.
        host.network("1.0.0", &["one", "two", "three", "missing"]);
        let pod = host.pod();
        let failed = cni.setup(pod.clone()).await.unwrap_err();
        assert!(failed.to_string().contains("could not be undone"), "{failed}");
        assert_eq!(failed.left.unwrap().reasons[0].interface, "eth0");
        fs::write(host.path("well"), "").unwrap();
        host.calls();
        cni.teardown(pod).await.unwrap();
        assert_eq!(host.calls(), ["DEL three", "DEL two", "DEL one"]);
        assert_eq!(host.records(), ["other-pod8-eth0"]);
    });
}

#[test]
fn a_setup_that_is_given_up_is_undone_and_the_next_operation_waits_for_that() {
    on_a_host(async |host| {
        host.plugin("stuck", "[ $CNI_COMMAND = ADD ] || exit 0\nsleep 1000");
        let bridge = json!({"type": "bridge", "ipam": host.ipam()});
        let list = json!({"cniVersion": "1.0.0", "name": "test", "plugins": [bridge, {"type": "stuck"}]});
        host.conf("10-test.conflist", &list);
        let cni = host.cni();
        let pod = host.pod();
        {
            let mut setup = std::pin::pin!(cni.setup(pod.clone()));
            let stuck = async { wait_for("ADD", || host.path("stuck.ADD.json").exists()).await };
            tokio::select! {
                done = &mut setup => panic!("{done:?}"),
                () = stuck => {}
            }
            assert_eq!((host.given_away(), host.records().len()), (2, 1));
        }
        cni.teardown(pod.clone()).await.unwrap();
        host.assert_clean();
        assert!(!host.in_pod(&pod, &["ip", "link"]).contains("eth0"));
    });
}

#[test]
fn what_a_killed_engine_left_half_attached_is_waited_for_and_cleared() {
    on_a_host(async |host| {
        // It leaves its group, so that nobody but the kernel could kill it; as if the engine had been killed before it could.
        let (go, told) = (host.path("go"), host.path("told"));
        let until_told = format!(
            "exec setsid -w sh -c 'touch {}; while [ ! -e {} ]; do sleep 0.5; done; echo END stuck >> {}'",
            told.display(),
            go.display(),
            host.path("calls").display()
        );
        host.plugin("stuck", &format!("[ $CNI_COMMAND = ADD ] || exit 0\n{until_told}"));
        let bridge = json!({"type": "bridge", "ipam": host.ipam()});
        let list = json!({"cniVersion": "1.0.0", "name": "test", "plugins": [bridge, {"type": "stuck"}]});
        host.conf("10-test.conflist", &list);
        let (pod, cni) = (host.pod(), host.cni());
        let id = pod.id.clone();
        std::thread::scope(|scope| {
            let engine = scope.spawn(|| {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    tokio::select! {
                        done = cni.setup(pod) => panic!("{done:?}"),
                        () = wait_for("ADD", || told.exists()) => {}
                    }
                });
            });
            engine.join().unwrap();
        });
        assert_eq!((host.given_away(), host.records()), (2, vec![format!("test-{id}-eth0")]));
        let cni = host.cni();
        let clearing = tokio::spawn(async move { cni.gc(BTreeSet::new).await });
        tokio::task::yield_now().await;
        fs::write(&go, "").unwrap();
        clearing.await.unwrap().unwrap();
        assert_eq!(host.calls(), ["ADD stuck", "END stuck", "DEL stuck"]);
        host.assert_clean();
    });
}

#[test]
fn gc_clears_what_is_ours_and_no_more_and_tells_plugins_what_stays() {
    on_a_host(async |host| {
        for name in ["one", "two"] {
            let versions = r#"{"cniVersion":"1.1.0","supportedVersions":["1.0.0","1.1.0"]}"#;
            let fails = r#"{ echo '{"code":100,"msg":"no gc"}'; exit 1; }"#;
            host.plugin(
                name,
                &format!(
                    "case $CNI_COMMAND in VERSION) echo '{versions}';; ADD) {RESULT};; GC) {};; esac",
                    if name == "one" { fails } else { "exit 0" }
                ),
            );
        }
        let list = |more: &Value| {
            let mut list =
                json!({"cniVersion": "1.0.0", "name": "test", "plugins": [{"type": "one"}, {"type": "two"}]});
            list.as_object_mut().unwrap().extend(more.as_object().cloned().unwrap());
            host.conf("10-test.conflist", &list);
        };
        list(&json!({"cniVersions": ["1.1.0"]}));
        let cni = host.cni();
        let (stays, goes) = (host.pod(), host.pod());
        cni.setup(stays.clone()).await.unwrap();
        cni.setup(goes.clone()).await.unwrap();
        // Another runtime uses the same network and the same folder.
        let foreign = r#"{"kind":"cniCacheV1","containerId":"podman1","config":"e30=","ifName":"eth5","networkName":"test"}"#;
        fs::write(host.path("cache/results/test-podman1-eth5"), foreign).unwrap();
        host.calls();
        let valid = BTreeSet::from([stays.id.clone(), "unrecorded".to_owned()]);
        let valid = move || valid.clone();
        let left = cni.gc(valid.clone()).await.unwrap_err();
        assert_eq!((left.len(), left[0].pod.as_str(), left[0].reasons.len()), (1, "", 1));
        assert!(left[0].to_string().contains("no gc"), "{}", left[0]);
        // The failure of one does not keep the other from it.
        assert_eq!(host.calls(), ["DEL two", "DEL one", "GC one", "GC two"]);
        assert_eq!(host.records(), [format!("test-{}-eth0", stays.id).as_str(), "test-podman1-eth5"]);
        let told = host.given("two", "GC");
        let expected = json!([{"containerID": "pod1", "ifname": "eth0"}, {"containerID": "podman1", "ifname": "eth5"},
            {"containerID": "unrecorded", "ifname": "eth0"}]);
        assert_eq!(
            (&told["cni.dev/valid-attachments"], &told["cni.dev/attachments"]),
            (&expected, &expected)
        );
        assert_eq!((&told["cniVersion"], &told["name"]), (&json!("1.1.0"), &json!("test")));

        // Nor may they take for nobody's what cannot be read.
        fs::write(host.path("cache/results/test-torn-eth0"), "{").unwrap();
        let left = cni.gc(valid.clone()).await.unwrap_err();
        assert!(left[0].to_string().contains("test-torn-eth0 cannot be read"), "{}", left[0]);
        fs::remove_file(host.path("cache/results/test-torn-eth0")).unwrap();
        assert_eq!(host.calls(), [""; 0]);

        // Where the configuration says no GC there is none; and the versions before know none.
        list(&json!({"cniVersions": ["1.1.0"], "disableGC": true}));
        cni.gc(valid.clone()).await.unwrap();
        list(&json!({}));
        cni.gc(valid).await.unwrap();
        assert_eq!(host.calls(), [""; 0]);
        cni.gc(BTreeSet::new).await.unwrap();
        assert_eq!(host.calls(), ["DEL two", "DEL one"]);
        fs::remove_file(host.path("cache/results/test-podman1-eth5")).unwrap();
        host.assert_clean();
    });
}

#[test]
fn readiness_is_what_kubelet_knows_and_never_stale() {
    on_a_host(async |host| {
        let cni = host.cni();
        let status = cni.status().await;
        assert_eq!((status.ready, status.reason.as_str()), (false, "NetworkPluginNotReady"));
        assert_eq!(status.message, "Network plugin returns error: cni plugin not initialized");
        host.plugin(
            "one",
            "[ $CNI_COMMAND = STATUS ] || exit 0\necho '{\"code\":50,\"msg\":\"the agent is down\"}'; exit 1",
        );
        fs::write(host.path("conf/00-bad.conf"), "{").unwrap();
        host.network("1.0.0", &["one"]);
        // Before 1.1 nobody is asked.
        let status = cni.status().await;
        assert!(status.ready && status.skipped.len() == 1 && host.calls().is_empty(), "{status:?}");
        host.network("1.1.0", &["one"]);
        let status = cni.status().await;
        assert!(!status.ready && status.message.contains("the agent is down (code 50)"), "{status:?}");
        host.plugin("one", "");
        assert!(cni.status().await.ready);
        assert_eq!(host.calls(), ["STATUS one", "STATUS one"]);
        assert_eq!(
            host.given("one", "STATUS"),
            json!({"type": "one", "name": "test", "cniVersion": "1.1.0"})
        );

        // A plugin that is replaced is asked again for what it speaks.
        let conf = json!({"cniVersion": "0.4.0", "cniVersions": ["1.1.0"], "name": "test", "plugins": [{"type": "one"}]});
        host.conf("10-test.conflist", &conf);
        host.plugin(
            "one",
            r#"[ $CNI_COMMAND = VERSION ] && echo '{"cniVersion":"1.0.0","supportedVersions":["1.0.0"]}'"#,
        );
        assert!(cni.status().await.message.contains("no version"));
        host.plugin(
            "one",
            r#"[ $CNI_COMMAND = VERSION ] && echo '{"cniVersion":"1.1.0","supportedVersions":["0.4.0"]}'"#,
        );
        assert!(cni.status().await.ready && cni.status().await.ready);
        assert_eq!(host.calls(), ["VERSION one", "VERSION one"]);
        fs::remove_file(host.path("conf/10-test.conflist")).unwrap();
        assert!(!cni.status().await.ready);
    });
}
