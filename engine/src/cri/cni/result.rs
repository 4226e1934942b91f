//! What a plugin says that it did, in any version of the protocol, and the same said in another.
//!
//! A plugin's output is a stranger's: all of it is checked here, and what is not understood is an error, never a panic.

use std::fmt;
use std::net::IpAddr;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use serde_json::{Map, Value};

use super::version::Version;

/// What one network gave a pod.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Outcome {
    /// The interfaces that were made, those on the host among them.
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "Vec::is_empty")]
    pub interfaces: Vec<Interface>,
    /// The addresses.
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "Vec::is_empty")]
    pub ips: Vec<Ip>,
    /// The routes.
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "Vec::is_empty")]
    pub routes: Vec<Route>,
    /// Where names are resolved.
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "Dns::is_empty")]
    pub dns: Dns,
}

/// An interface.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Interface {
    /// Its name.
    #[serde(default, deserialize_with = "or_none")]
    pub name: String,
    /// Its hardware address.
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "String::is_empty")]
    pub mac: String,
    /// Its MTU; 0 is unsaid.
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "is_zero")]
    pub mtu: i64,
    /// The network namespace it is in; empty on the host.
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "String::is_empty")]
    pub sandbox: String,
    /// A socket that is its other side.
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "String::is_empty")]
    pub socket_path: String,
    /// The device behind it.
    #[serde(
        rename = "pciID",
        default,
        deserialize_with = "or_none",
        skip_serializing_if = "String::is_empty"
    )]
    pub pci_id: String,
}

/// An address of an interface.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Ip {
    /// Which of the interfaces; None is the one that was asked for.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub interface: Option<i64>,
    /// The address, and how many of its bits are the network's.
    pub address: Cidr,
    /// Where what is not of this network is sent.
    #[serde(default, with = "address", skip_serializing_if = "Option::is_none")]
    pub gateway: Option<IpAddr>,
}

/// A route.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Route {
    /// Where to.
    pub dst: Cidr,
    /// Through whom; None is the gateway of the address.
    #[serde(default, with = "address", skip_serializing_if = "Option::is_none")]
    pub gw: Option<IpAddr>,
    /// The MTU on the way; 0 is unsaid.
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "is_zero")]
    pub mtu: i64,
    /// The largest segment that is told to the other side; 0 is unsaid.
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "is_zero")]
    pub advmss: i64,
    /// Lower goes first; 0 is unsaid.
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "is_zero")]
    pub priority: i64,
    /// The table it is in.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub table: Option<i64>,
    /// How far what it leads to is.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub scope: Option<i64>,
}

/// What a resolver is told.
#[derive(Debug, Clone, PartialEq, Default, Serialize, Deserialize)]
pub struct Dns {
    /// The servers' addresses.
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "Vec::is_empty")]
    pub nameservers: Vec<String>,
    /// The domain of short names.
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "String::is_empty")]
    pub domain: String,
    /// The domains that short names are looked for in.
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "Vec::is_empty")]
    pub search: Vec<String>,
    /// The resolver's options.
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "Vec::is_empty")]
    pub options: Vec<String>,
}

impl Dns {
    fn is_empty(&self) -> bool {
        *self == Dns::default()
    }
}

/// An address with the length of its network's part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cidr {
    /// The address.
    pub address: IpAddr,
    /// The length.
    pub length: u8,
}

impl FromStr for Cidr {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let parsed = text.split_once('/').and_then(|(address, length)| {
            let address: IpAddr = address.parse().ok()?;
            let most = if address.is_ipv4() { 32 } else { 128 };
            let digits = !length.is_empty() && length.bytes().all(|byte| byte.is_ascii_digit());
            let length = length.parse().ok().filter(|length| digits && *length <= most)?;
            Some(Cidr { address, length })
        });
        parsed.ok_or_else(|| format!("{text:?} is no address like 10.1.2.3/24"))
    }
}

impl fmt::Display for Cidr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

impl Serialize for Cidr {
    fn serialize<S: Serializer>(&self, to: S) -> Result<S::Ok, S::Error> {
        to.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Cidr {
    fn deserialize<D: Deserializer<'de>>(from: D) -> Result<Self, D::Error> {
        String::deserialize(from)?.parse().map_err(serde::de::Error::custom)
    }
}

/// An address that may be left out, be null or be empty.
mod address {
    use super::{Deserialize as _, Deserializer, IpAddr, Serializer};

    pub(super) fn serialize<S: Serializer>(address: &Option<IpAddr>, to: S) -> Result<S::Ok, S::Error> {
        match address {
            Some(address) => to.collect_str(address),
            None => to.serialize_none(),
        }
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(from: D) -> Result<Option<IpAddr>, D::Error> {
        match Option::<String>::deserialize(from)? {
            Some(text) if !text.is_empty() => text.parse().map(Some).map_err(serde::de::Error::custom),
            _ => Ok(None),
        }
    }
}

/// Go writes what is empty as null, and reads null as empty.
fn or_none<'de, D: Deserializer<'de>, T: Default + Deserialize<'de>>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

#[allow(clippy::trivially_copy_pass_by_ref, reason = "serde hands a reference")]
fn is_zero(number: &i64) -> bool {
    *number == 0
}

/// The form of the versions before 0.3: one address of each family, with its routes.
#[derive(Serialize, Deserialize)]
struct Old {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ip4: Option<OldIp>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    ip6: Option<OldIp>,
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "Dns::is_empty")]
    dns: Dns,
}

#[derive(Serialize, Deserialize)]
struct OldIp {
    ip: Cidr,
    #[serde(default, with = "address", skip_serializing_if = "Option::is_none")]
    gateway: Option<IpAddr>,
    #[serde(default, deserialize_with = "or_none", skip_serializing_if = "Vec::is_empty")]
    routes: Vec<Route>,
}

/// The outcome that a plugin printed. One that says no version speaks that of the request.
pub(super) fn parse(stdout: &[u8], asked: Version) -> Result<Outcome, String> {
    match serde_json::from_slice(stdout) {
        Ok(Value::Null) => Ok(Outcome::default()),
        Ok(Value::Object(map)) => from_value(map, asked),
        Ok(_) => Err("what it printed is no result: not a JSON object".into()),
        Err(error) => Err(format!("what it printed is no result: {error}")),
    }
}

/// The same of a result that was kept.
pub(super) fn from_value(map: Map<String, Value>, asked: Version) -> Result<Outcome, String> {
    let version = match map.get("cniVersion") {
        Some(Value::String(said)) if !said.is_empty() => Version::parse(said)
            .ok_or_else(|| format!("its result is of version {said:?}, which is not known"))?,
        _ => asked,
    };
    let bad = |error: serde_json::Error| format!("its result cannot be read: {error}");
    if version >= Version::V0_3_0 {
        let outcome: Outcome = serde_json::from_value(Value::Object(map)).map_err(bad)?;
        for ip in &outcome.ips {
            let of = ip.interface.is_none_or(|index| {
                usize::try_from(index).is_ok_and(|index| index < outcome.interfaces.len())
            });
            if !of {
                return Err(format!(
                    "its result has {} of interface {}, and {} interfaces",
                    ip.address,
                    ip.interface.unwrap_or_default(),
                    outcome.interfaces.len()
                ));
            }
        }
        return Ok(outcome);
    }
    let old: Old = serde_json::from_value(Value::Object(map)).map_err(bad)?;
    let mut outcome = Outcome { dns: old.dns, ..Outcome::default() };
    for ip in [old.ip4, old.ip6].into_iter().flatten() {
        outcome.ips.push(Ip { interface: None, address: ip.ip, gateway: ip.gateway });
        outcome.routes.extend(ip.routes);
    }
    Ok(outcome)
}

/// The outcome as that version says it; what it cannot say is left out.
pub(super) fn to_value(outcome: &Outcome, version: Version) -> Value {
    let mut value = if version >= Version::V0_3_0 {
        let mut outcome = outcome.clone();
        if version < Version::V1_0_0 {
            for interface in &mut outcome.interfaces {
                *interface = Interface {
                    name: std::mem::take(&mut interface.name),
                    mac: std::mem::take(&mut interface.mac),
                    sandbox: std::mem::take(&mut interface.sandbox),
                    ..Interface::default()
                };
            }
        }
        serde_json::to_value(&outcome)
    } else {
        let family = |v4: bool| {
            let ip = outcome.ips.iter().find(|ip| ip.address.address.is_ipv4() == v4)?;
            let routes = outcome.routes.iter().filter(|route| route.dst.address.is_ipv4() == v4);
            let routes = routes.map(|route| Route {
                mtu: 0,
                advmss: 0,
                priority: 0,
                table: None,
                scope: None,
                ..route.clone()
            });
            Some(OldIp { ip: ip.address, gateway: ip.gateway, routes: routes.collect() })
        };
        serde_json::to_value(Old { ip4: family(true), ip6: family(false), dns: outcome.dns.clone() })
    }
    .unwrap_or_default();
    if (Version::V0_3_0..Version::V1_0_0).contains(&version)
        && let Some(ips) = value.get_mut("ips").and_then(Value::as_array_mut)
    {
        for (ip, written) in outcome.ips.iter().zip(ips) {
            written["version"] = if ip.address.address.is_ipv4() { "4" } else { "6" }.into();
        }
    }
    if let Value::Object(map) = &mut value {
        map.insert("cniVersion".into(), version.as_str().into());
    }
    value
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use Version::{V0_1_0, V0_2_0, V0_3_1, V0_4_0, V1_0_0, V1_1_0};

    const FULL: &str = r#"{"cniVersion":"1.1.0","interfaces":[
        {"name":"cni0","mac":"00:11:22:33:44:55"},
        {"name":"eth0","mac":"99:88:77:66:55:44","mtu":1400,"sandbox":"/run/netns/a","socketPath":"/s","pciID":"8086:9a01"}],
        "ips":[{"address":"10.1.0.5/16","gateway":"10.1.0.1","interface":1},{"address":"fd00::5/64","interface":1}],
        "routes":[{"dst":"0.0.0.0/0","table":100,"priority":5},{"dst":"::/0","gw":"fd00::1"}],
        "dns":{"nameservers":["10.1.0.1"],"search":["a.b"]}}"#;

    #[test]
    fn a_result_is_said_in_every_version() {
        let full = parse(FULL.as_bytes(), V0_1_0).unwrap();
        assert_eq!((full.interfaces[1].mtu, full.interfaces[1].pci_id.as_str()), (1400, "8086:9a01"));
        assert_eq!(full.routes[0].table, Some(100));
        let expected: Value = serde_json::from_str(FULL).unwrap();
        assert_eq!(to_value(&full, V1_1_0), expected);

        let middle = to_value(&full, V0_4_0);
        assert_eq!(middle["ips"][0]["version"], "4");
        assert_eq!(middle["ips"][1]["version"], "6");
        assert_eq!(middle["interfaces"][1].get("mtu"), None);
        let back = parse(&serde_json::to_vec(&middle).unwrap(), V1_0_0).unwrap();
        assert_eq!((&back.ips, &back.routes, &back.dns), (&full.ips, &full.routes, &full.dns));

        let old = to_value(&full, V0_2_0);
        assert_eq!(old["ip4"]["ip"], "10.1.0.5/16");
        assert_eq!(old["ip6"]["routes"][0]["gw"], "fd00::1");
        assert_eq!(old["ip4"]["routes"][0].get("table"), None);
        let back = parse(&serde_json::to_vec(&old).unwrap(), V0_2_0).unwrap();
        assert_eq!((back.ips.len(), back.ips[1].address.length, back.routes.len()), (2, 64, 2));
    }

    #[test]
    fn what_no_plugin_may_print_is_an_error() {
        for bad in [
            "",
            "[]",
            "ok",
            "{} {}",
            r#"{"cniVersion":"7.0.0"}"#,
            r#"{"ips":[{"address":"10.0.0.1"}]}"#,
            r#"{"ips":[{"address":"10.0.0.1/33"}]}"#,
            r#"{"ips":[{"address":"10.0.0.1/+8"}]}"#,
            r#"{"ips":[{"address":"10.0.0.1/8","interface":0}]}"#,
            r#"{"interfaces":[{"name":"a"}],"ips":[{"address":"10.0.0.1/8","interface":-1}]}"#,
            r#"{"ips":[null]}"#,
            r#"{"interfaces":{}}"#,
            r#"{"routes":[{"dst":"everywhere"}]}"#,
        ] {
            assert!(parse(bad.as_bytes(), V1_0_0).is_err(), "{bad}");
        }
        let deep = format!("{}{}", "[".repeat(100_000), "]".repeat(100_000));
        assert!(parse(deep.as_bytes(), V1_0_0).is_err());
        // And this is what some do print.
        assert_eq!(parse(b"null", V1_0_0).unwrap(), Outcome::default());
        let nulls = br#"{"cniVersion":"","interfaces":null,"ips":null,"routes":null,"dns":null}"#;
        assert_eq!(parse(nulls, V0_3_1).unwrap(), Outcome::default());
        let empty = br#"{"ips":[{"version":"4","address":"10.0.0.1/8","gateway":""}],"other":[1]}"#;
        assert_eq!(parse(empty, V0_3_1).unwrap().ips[0].gateway, None);
    }

    proptest! {
        #[test]
        fn any_output_is_a_result_or_an_error(bytes: Vec<u8>, text in r#"[{}\[\]":,a-z0-9./]{0,80}"#) {
            for version in [V0_1_0, V0_3_1, V1_1_0] {
                let _ = parse(&bytes, version);
                let _ = parse(format!(r#"{{"ips":[{{"address":{text}}}]}}"#).as_bytes(), version);
            }
        }

        #[test]
        fn a_result_survives_the_way_through_a_version(
            v4: [u8; 4], v6: [u16; 8], length in 0u8..=32, interface: Option<bool>, mtu in 0i64..9000, table: Option<i64>,
        ) {
            let interface = interface.map(i64::from);
            let outcome = Outcome {
                interfaces: vec![Interface { name: "a".into(), mtu, ..Interface::default() }, Interface::default()],
                ips: vec![
                    Ip { interface, address: Cidr { address: v4.into(), length }, gateway: Some(v6.into()) },
                    Ip { interface, address: Cidr { address: v6.into(), length }, gateway: None },
                ],
                routes: vec![Route {
                    dst: Cidr { address: v6.into(), length }, gw: Some(v4.into()), mtu, advmss: 0, priority: 1, table, scope: None,
                }],
                dns: Dns::default(),
            };
            for version in [V1_0_0, V1_1_0] {
                let bytes = serde_json::to_vec(&to_value(&outcome, version)).unwrap();
                prop_assert_eq!(&parse(&bytes, V0_1_0).unwrap(), &outcome);
            }
            let bytes = serde_json::to_vec(&to_value(&outcome, V0_2_0)).unwrap();
            let old = parse(&bytes, V0_2_0).unwrap();
            prop_assert_eq!(old.ips[0].address, outcome.ips[0].address);
        }
    }
}
