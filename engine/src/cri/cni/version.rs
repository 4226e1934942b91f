//! The versions of the CNI protocol, and which one a network is run with.

use std::fmt;

/// A version of the protocol that is known here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Default)]
pub(super) enum Version {
    /// What counts where nobody says one.
    #[default]
    V0_1_0,
    V0_2_0,
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

use Version::{V0_1_0, V0_2_0, V0_3_0, V0_3_1, V0_4_0, V1_0_0, V1_1_0};

impl Version {
    const ALL: [Version; 7] = [V0_1_0, V0_2_0, V0_3_0, V0_3_1, V0_4_0, V1_0_0, V1_1_0];

    /// The newest.
    pub(super) const CURRENT: Version = V1_1_0;

    pub(super) fn as_str(self) -> &'static str {
        match self {
            V0_1_0 => "0.1.0",
            V0_2_0 => "0.2.0",
            V0_3_0 => "0.3.0",
            V0_3_1 => "0.3.1",
            V0_4_0 => "0.4.0",
            V1_0_0 => "1.0.0",
            V1_1_0 => "1.1.0",
        }
    }

    /// The version by this name; the empty one is the first.
    pub(super) fn parse(text: &str) -> Option<Self> {
        if text.is_empty() {
            return Some(V0_1_0);
        }
        Self::ALL.into_iter().find(|version| version.as_str() == text)
    }

    /// Whether it is a version at all, known or not.
    pub(super) fn is_plausible(text: &str) -> bool {
        let mut parts = text.split('.');
        text.is_empty()
            || parts.clone().count() <= 3
                && parts.all(|part| !part.is_empty() && part.bytes().all(|byte| byte.is_ascii_digit()))
    }

    /// All of them, for a message.
    pub(super) fn all() -> String {
        Self::ALL.map(Self::as_str).join(", ")
    }

    /// Whether there is a CHECK, and DEL is told the result of ADD.
    pub(super) fn has_check(self) -> bool {
        self >= V0_4_0
    }

    /// Whether there are STATUS and GC.
    pub(super) fn has_gc(self) -> bool {
        self >= V1_1_0
    }
}

impl fmt::Display for Version {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// The newest version that a network offers and each of its plugins speaks.
pub(super) fn choose(offered: &[Version], spoken: &[Vec<Version>]) -> Option<Version> {
    offered.iter().rev().copied().find(|version| spoken.iter().all(|plugin| plugin.contains(version)))
}

/// What a plugin's answer to VERSION says. Versions that are not known here do not matter.
pub(super) fn spoken(stdout: &[u8]) -> Result<Vec<Version>, String> {
    #[derive(serde::Deserialize)]
    #[serde(rename_all = "camelCase")]
    struct Answer {
        #[serde(default)]
        cni_version: String,
        #[serde(default)]
        supported_versions: Vec<String>,
    }
    let answer: Answer = serde_json::from_slice(stdout)
        .map_err(|error| format!("its answer to VERSION cannot be read: {error}"))?;
    // The first plugins that knew VERSION knew no list.
    if answer.supported_versions.is_empty() && answer.cni_version == "0.2.0" {
        return Ok(vec![V0_1_0, V0_2_0]);
    }
    if answer.supported_versions.is_empty() {
        return Err("its answer to VERSION names no version that it supports".into());
    }
    Ok(answer.supported_versions.iter().filter_map(|version| Version::parse(version)).collect())
}

#[cfg(test)]
#[allow(clippy::unwrap_used, reason = "a test fails by panicking")]
mod tests {
    use super::*;

    #[test]
    fn the_newest_version_that_all_speak_is_chosen() {
        let old = spoken(br#"{"cniVersion":"1.0.0","supportedVersions":["0.3.1","0.4.0","1.0.0","9.0.0"]}"#)
            .unwrap();
        let older = spoken(br#"{"cniVersion":"0.2.0"}"#).unwrap();
        assert_eq!(choose(&[V0_4_0, V1_0_0, V1_1_0], std::slice::from_ref(&old)), Some(V1_0_0));
        assert_eq!(choose(&[V0_4_0, V1_0_0], &[old.clone(), older.clone()]), None);
        assert_eq!(choose(&[V0_2_0, V1_0_0], &[older]), Some(V0_2_0));
        assert_eq!(choose(&[V1_1_0], &[old]), None);
        for bad in [&b"{"[..], b"[]", b"", br#"{"supportedVersions":[1]}"#] {
            assert!(spoken(bad).is_err());
        }
    }

    #[test]
    fn versions_are_three_numbers() {
        for good in ["", "1.0.0", "1.2.3", "12.0", "1"] {
            assert!(Version::is_plausible(good), "{good}");
        }
        for bad in ["a", "1.", ".1", "1.0.0.0", "1.0.x", "-1.0.0"] {
            assert!(!Version::is_plausible(bad), "{bad}");
        }
    }
}
