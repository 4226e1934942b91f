//! What holds of any file of a network and of anything that a plugin may print.

use super::version::{self, Version};
use super::{cache, conf, result};

/// A network's configuration, a plugin's result and answer to VERSION, and a record of what is attached, which any of them may
/// be: names are safe as parts of a path, versions are known, and what is kept is read again as the same.
pub fn cni(data: &[u8]) {
    for network in [conf::Network::parse_list(data), conf::Network::parse_single(data)].into_iter().flatten()
    {
        assert!(is_name(&network.name) && !network.plugins.is_empty() && !network.versions.is_empty());
        assert!(network.versions.is_sorted());
        assert!(network.plugins.iter().all(|plugin| is_name(&plugin.kind)));
        let version = network.versions[0];
        let kept = network.to_kept(version).to_string();
        let again = conf::Network::parse_list(kept.as_bytes()).expect("what is kept can be read");
        assert_eq!((&again.name, &again.plugins), (&network.name, &network.plugins));
        assert_eq!(again.versions, [version]);
    }
    for asked in [Version::default(), Version::V0_3_1, Version::V0_4_0, Version::V1_0_0, Version::CURRENT] {
        let Ok(outcome) = result::parse(data, asked) else { continue };
        for ip in &outcome.ips {
            let most = if ip.address.address.is_ipv4() { 32 } else { 128 };
            assert!(ip.address.length <= most);
            let of = ip.interface.map(usize::try_from);
            assert!(of.is_none_or(|of| of.is_ok_and(|of| of < outcome.interfaces.len())));
        }
        let said = result::to_value(&outcome, Version::CURRENT).to_string();
        let again = result::parse(said.as_bytes(), Version::default()).expect("what is said can be read");
        assert_eq!(again, outcome, "{said}");
        for version in [Version::default(), Version::V0_3_1, Version::V1_0_0] {
            let said = result::to_value(&outcome, version).to_string();
            result::parse(said.as_bytes(), version).expect("what is said can be read");
        }
    }
    if let Ok(spoken) = version::spoken(data) {
        assert!(
            version::choose(&[Version::CURRENT], std::slice::from_ref(&spoken))
                .is_none_or(|of| spoken.contains(&of))
        );
    }
    if let Ok(record) = cache::parse(data) {
        assert!(is_name(&record.network_name) && is_name(&record.container_id) && is_name(&record.if_name));
        let written = serde_json::to_vec(&record).expect("a record can be written");
        let again = cache::parse(&written).expect("what was written can be read");
        assert_eq!(serde_json::to_vec(&again).expect("a record can be written"), written);
        let _ = record.config();
    }
}

/// Whether it stays in the folder when it is a part of a file's name there.
fn is_name(text: &str) -> bool {
    !text.is_empty() && !matches!(text, "." | "..") && !text.contains(['/', '\0'])
}
