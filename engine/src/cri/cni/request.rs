//! What a plugin is given on its stdin: its configuration, and what belongs to this one call.

use serde_json::{Map, Value, json};

use super::conf::Plugin;
use super::version::Version;

/// What is added for one call.
#[derive(Default)]
pub(super) struct Addition<'a> {
    /// What the runtime has for plugins that ask for it.
    pub(super) capabilities: Option<&'a Map<String, Value>>,
    /// What was done before, in the version of the call.
    pub(super) previous: Option<Value>,
    /// The attachments that are to stay: container and interface.
    pub(super) valid: Option<&'a [(String, String)]>,
}

/// The configuration of one call. `capabilities` stays in it, as every plugin that was tried with libcni knows it.
pub(super) fn build(network: &str, version: Version, plugin: &Plugin, addition: Addition<'_>) -> Vec<u8> {
    let mut conf = plugin.conf.clone();
    // These are ours to set. What is in the file is a mistake, or somebody's who wants to be taken for us.
    conf.retain(|key, _| key != "prevResult" && !key.starts_with("cni.dev/"));
    conf.insert("name".into(), network.into());
    conf.insert("cniVersion".into(), version.as_str().into());
    if let Some(capabilities) = addition.capabilities {
        let asked = plugin
            .capabilities
            .iter()
            .filter_map(|name| Some((name.clone(), capabilities.get(name)?.clone())));
        let asked: Map<String, Value> = asked.collect();
        if !asked.is_empty() {
            conf.insert("runtimeConfig".into(), Value::Object(asked));
        }
    }
    if let Some(previous) = addition.previous {
        conf.insert("prevResult".into(), previous);
    }
    if let Some(valid) = addition.valid {
        let valid: Vec<Value> =
            valid.iter().map(|(id, interface)| json!({"containerID": id, "ifname": interface})).collect();
        // An early text of the specification had the second name, and plugins were made by it.
        conf.insert("cni.dev/valid-attachments".into(), Value::Array(valid.clone()));
        conf.insert("cni.dev/attachments".into(), Value::Array(valid));
    }
    Value::Object(conf).to_string().into_bytes()
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::super::conf::Network;
    use super::*;

    #[test]
    fn a_plugin_is_told_what_it_asks_for_and_no_more() {
        let network = Network::parse_list(
            br#"{"name":"n","cniVersion":"1.0.0","plugins":[{"type":"p","name":"x","cniVersion":"0.1.0","keep":[1.5,null],
            "prevResult":{},"cni.dev/valid-attachments":[],"capabilities":{"mac":true,"ips":false,"none":true}}]}"#,
        )
        .unwrap();
        let Value::Object(have) = json!({"mac": "c2:11:22:33:44:55", "ips": ["10.0.0.1"], "other": 1}) else {
            unreachable!()
        };
        let made = |addition| -> Value {
            serde_json::from_slice(&build("n", Version::V1_0_0, &network.plugins[0], addition)).unwrap()
        };
        let first = made(Addition { capabilities: Some(&have), ..Addition::default() });
        assert_eq!(
            first,
            json!({"type": "p", "name": "n", "cniVersion": "1.0.0", "keep": [1.5, null],
                "capabilities": {"mac": true, "ips": false, "none": true},
                "runtimeConfig": {"mac": "c2:11:22:33:44:55"}})
        );
        let next = made(Addition { previous: Some(json!({"ips": []})), ..Addition::default() });
        assert_eq!(next["prevResult"], json!({"ips": []}));
        assert_eq!(next.get("runtimeConfig"), None);
        let valid = [("a".to_owned(), "eth0".to_owned())];
        let gc = made(Addition { valid: Some(&valid), ..Addition::default() });
        assert_eq!(gc["cni.dev/valid-attachments"], json!([{"containerID": "a", "ifname": "eth0"}]));
    }
}
