//! What the plugins are told of a pod.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::Serialize;
use serde_json::{Map, Value};

/// A pod that is to have, or has, a network.
#[derive(Debug, Clone, Default)]
pub struct Pod {
    /// Its sandbox's id.
    pub id: String,
    /// The file that its network namespace is bound to. None, or a file that is not there, when it is gone.
    pub netns: Option<PathBuf>,
    /// Its namespace in Kubernetes.
    pub namespace: String,
    /// Its name.
    pub name: String,
    /// Its uid.
    pub uid: String,
    /// Its annotations; they go to plugins that ask for `io.kubernetes.cri.pod-annotations`.
    pub annotations: BTreeMap<String, String>,
    /// The ports of the host that lead to it; those with a host's port of 0 are left out.
    pub port_mappings: Vec<PortMapping>,
    /// Its limits.
    pub bandwidth: Option<Bandwidth>,
    /// Its resolver.
    pub dns: Option<PodDns>,
    /// The cgroup that it is in.
    pub cgroup_path: Option<String>,
    /// Whatever else plugins may ask for: `mac`, `ips`, `ipRanges` and others, by the names and in the forms of CNI's
    /// conventions.
    pub capabilities: BTreeMap<String, Value>,
}

/// A port of the host that leads to one of a pod.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct PortMapping {
    /// The host's.
    pub host_port: i32,
    /// The pod's.
    pub container_port: i32,
    /// `tcp`, `udp` or `sctp`.
    pub protocol: String,
    /// The address of the host that it is for; empty: all of them.
    #[serde(rename = "hostIP")]
    pub host_ip: String,
}

/// What a pod may send and receive, in bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize)]
#[serde(rename_all = "camelCase")]
pub struct Bandwidth {
    /// Received a second; 0 is no limit.
    pub ingress_rate: u64,
    /// Received at once.
    pub ingress_burst: u64,
    /// Sent a second; 0 is no limit.
    pub egress_rate: u64,
    /// Sent at once.
    pub egress_burst: u64,
}

/// A pod's resolver.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize)]
pub struct PodDns {
    /// The servers' addresses.
    pub servers: Vec<String>,
    /// The domains that short names are looked for in.
    pub searches: Vec<String>,
    /// The resolver's options.
    pub options: Vec<String>,
}

/// The least and the most that an annotation may ask for: 1k and 1P.
const RATE: std::ops::RangeInclusive<u64> = 1_000..=1_000_000_000_000_000;

impl Bandwidth {
    /// The limits that a pod's annotations `kubernetes.io/ingress-bandwidth` and `.../egress-bandwidth` set, if any.
    ///
    /// # Errors
    /// A value that is no quantity, or not between 1k and 1P.
    pub fn from_annotations(annotations: &BTreeMap<String, String>) -> Result<Option<Self>, String> {
        let rate = |key: &str| match annotations.get(key) {
            None => Ok(None),
            Some(text) => match quantity(text) {
                Some(rate) if RATE.contains(&rate) => Ok(Some(rate)),
                Some(_) => Err(format!("annotation {key} is {text:?}: give a rate from 1k to 1P")),
                None => Err(format!("annotation {key} is {text:?}, which is no quantity: give one like 10M")),
            },
        };
        let ingress = rate("kubernetes.io/ingress-bandwidth")?;
        let egress = rate("kubernetes.io/egress-bandwidth")?;
        if ingress.or(egress).is_none() {
            return Ok(None);
        }
        // As containerd has it: as much at once as the plugin takes.
        let burst = |rate: Option<u64>| rate.map_or(0, |_| u64::from(u32::MAX));
        Ok(Some(Bandwidth {
            ingress_rate: ingress.unwrap_or(0),
            ingress_burst: burst(ingress),
            egress_rate: egress.unwrap_or(0),
            egress_burst: burst(egress),
        }))
    }
}

/// A quantity as Kubernetes writes it (`1.5M`, `2Ki`, `1e6`), rounded up to a whole number.
fn quantity(text: &str) -> Option<u64> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, suffix) = text.split_at(digits);
    let (whole, fraction) = number.split_once('.').unwrap_or((number, ""));
    // Twelve digits of a fraction are beyond any rate; more would only overflow.
    if whole.len() + fraction.len() == 0 || whole.len() > 18 || fraction.len() > 12 || fraction.contains('.')
    {
        return None;
    }
    let value: i128 = format!("{whole}{fraction}").parse().ok()?;
    let (base, power): (i128, i32) = match suffix {
        "n" => (10, -9),
        "u" => (10, -6),
        "m" => (10, -3),
        "" => (10, 0),
        "k" => (10, 3),
        "M" => (10, 6),
        "G" => (10, 9),
        "T" => (10, 12),
        "P" => (10, 15),
        "E" => (10, 18),
        "Ki" => (2, 10),
        "Mi" => (2, 20),
        "Gi" => (2, 30),
        "Ti" => (2, 40),
        "Pi" => (2, 50),
        "Ei" => (2, 60),
        _ => (10, suffix.strip_prefix(['e', 'E'])?.parse().ok().filter(|power| (-18..=18).contains(power))?),
    };
    let scale = 10_i128.pow(u32::try_from(fraction.len()).ok()?);
    let (up, down) = match u32::try_from(power) {
        Ok(power) => (base.pow(power), scale),
        Err(_) => (1, scale.checked_mul(base.pow(power.unsigned_abs()))?),
    };
    let value = value.checked_mul(up)?;
    u64::try_from(value / down + i128::from(value % down != 0)).ok()
}

impl Pod {
    /// The arguments that every plugin is told.
    pub(super) fn arguments(&self) -> Result<Vec<(String, String)>, String> {
        let arguments = [
            ("IgnoreUnknown", "1"),
            ("K8S_POD_NAMESPACE", &self.namespace),
            ("K8S_POD_NAME", &self.name),
            ("K8S_POD_INFRA_CONTAINER_ID", &self.id),
            ("K8S_POD_UID", &self.uid),
        ];
        // One that held a separator would be read as several.
        if let Some((key, value)) = arguments.iter().find(|(_, value)| value.contains([';', '\0'])) {
            return Err(format!(
                "{value:?} cannot be given to plugins as {key}: it has a character that separates"
            ));
        }
        Ok(arguments.map(|(key, value)| (key.to_owned(), value.to_owned())).into())
    }

    /// What is there for plugins that ask for it.
    pub(super) fn capabilities(&self) -> Map<String, Value> {
        let mut all: Map<String, Value> = self.capabilities.clone().into_iter().collect();
        let mut add = |name: &str, value: Value| drop(all.insert(name.to_owned(), value));
        if !self.annotations.is_empty() {
            add("io.kubernetes.cri.pod-annotations", serde_json::json!(self.annotations));
        }
        let ports: Vec<&PortMapping> = self.port_mappings.iter().filter(|port| port.host_port > 0).collect();
        if !ports.is_empty() {
            add("portMappings", serde_json::json!(ports));
        }
        if let Some(bandwidth) = &self.bandwidth {
            add("bandwidth", serde_json::json!(bandwidth));
        }
        if let Some(dns) = &self.dns {
            add("dns", serde_json::json!(dns));
        }
        if let Some(path) = self.cgroup_path.as_ref().filter(|path| !path.is_empty()) {
            add("cgroupPath", path.as_str().into());
        }
        all
    }
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn bandwidth_is_read_from_annotations() {
        for (text, value) in [
            ("10M", Some(10_000_000)),
            ("1.5k", Some(1_500)),
            ("2Ki", Some(2_048)),
            ("1e6", Some(1_000_000)),
            ("1500m", Some(2)),
            (".5k", Some(500)),
            ("1E", Some(1_000_000_000_000_000_000)),
            ("999999999999999999E", None),
            ("", None),
            ("M", None),
            ("-1", None),
            ("1.2.3", None),
            ("1X", None),
            ("1e999", None),
        ] {
            assert_eq!(quantity(text), value, "{text}");
        }
        let of = |key: &str, value: &str| {
            Bandwidth::from_annotations(&BTreeMap::from([(format!("kubernetes.io/{key}"), value.to_owned())]))
        };
        let egress = of("egress-bandwidth", "1M").unwrap().unwrap();
        assert_eq!(
            (egress.ingress_rate, egress.egress_rate, egress.egress_burst),
            (0, 1_000_000, 4_294_967_295)
        );
        assert_eq!(of("other", "1M").unwrap(), None);
        assert!(of("ingress-bandwidth", "1").is_err() && of("ingress-bandwidth", "2P").is_err());
    }

    proptest::proptest! {
        #[test]
        fn any_quantity_is_a_number_or_none(text in r"[0-9.eEkKMGTPimnu+-]{0,40}", any: String) {
            let _ = (quantity(&text), quantity(&any));
        }
    }

    #[test]
    fn a_separator_in_a_name_is_refused() {
        let pod = Pod { id: "a".into(), name: "x;K8S_POD_NAMESPACE=kube-system".into(), ..Pod::default() };
        assert!(pod.arguments().is_err());
    }
}
