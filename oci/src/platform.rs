//! Platforms: `os[/architecture[/variant]]`, their usual spellings, and which of the images
//! in an index a host can run, best first.
//!
//! Names are Go's (`amd64`, `arm64`, `ppc64le`), since images are labelled with them. Aliases
//! (`x86_64`, `aarch64`, `armhf`) are understood in input and normalised away.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// What an image or a manifest runs on; the `platform` object of an image index.
#[derive(Clone, Debug, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Platform {
    /// Go's name of the processor architecture.
    #[serde(default)]
    pub architecture: String,
    /// Go's name of the operating system.
    #[serde(default)]
    pub os: String,
    /// Version of the operating system (Windows only).
    #[serde(default, rename = "os.version", skip_serializing_if = "String::is_empty")]
    pub os_version: String,
    /// Features that the operating system must have (Windows only).
    #[serde(default, rename = "os.features", skip_serializing_if = "Vec::is_empty")]
    pub os_features: Vec<String>,
    /// Variant of the architecture, as `v8`; empty where there is none.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub variant: String,
}

/// Why a string names no platform.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum PlatformError {
    /// More than three parts, or a part with characters no platform has.
    #[error("platform {0:?} is not of the form os[/architecture[/variant]]")]
    Form(String),
    /// One part, which is neither a system nor an architecture.
    #[error("platform {0:?} is neither a known operating system nor a known architecture")]
    Unknown(String),
}

const KNOWN_OS: &[&str] = &[
    "aix",
    "android",
    "darwin",
    "dragonfly",
    "freebsd",
    "hurd",
    "illumos",
    "ios",
    "js",
    "linux",
    "netbsd",
    "openbsd",
    "plan9",
    "solaris",
    "wasip1",
    "windows",
    "zos",
];

const KNOWN_ARCHITECTURES: &[&str] = &[
    "386", "amd64", "arm", "arm64", "loong64", "mips", "mips64", "mips64le", "mipsle", "ppc64", "ppc64le",
    "riscv64", "s390x", "wasm",
];

impl Platform {
    /// A platform from its parts, normalised.
    pub fn new(os: &str, architecture: &str, variant: &str) -> Platform {
        Platform {
            os: os.to_owned(),
            architecture: architecture.to_owned(),
            variant: variant.to_owned(),
            ..Platform::default()
        }
        .normalized()
    }

    /// The platform of this build: what the engine's containers run on.
    pub fn host() -> Platform {
        Platform::new("linux", std::env::consts::ARCH, "")
    }

    /// Parses `os`, `architecture`, `os/architecture` or `os/architecture/variant`; what is
    /// left out is the host's.
    pub fn parse(text: &str) -> Result<Platform, PlatformError> {
        let form = || PlatformError::Form(text.chars().take(160).collect());
        let parts: Vec<&str> = text.split('/').collect();
        let plain = |part: &&str| {
            !part.is_empty()
                && part.len() <= 64
                && part.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
        };
        if !parts.iter().all(plain) {
            return Err(form());
        }
        match parts[..] {
            [one] => {
                let os = normalize_os(one);
                if KNOWN_OS.contains(&os.as_str()) {
                    return Ok(Platform { os, ..Platform::host() });
                }
                let (architecture, variant) = normalize_architecture(one, "");
                if KNOWN_ARCHITECTURES.contains(&architecture.as_str()) {
                    return Ok(Platform { architecture, variant, ..Platform::host() });
                }
                Err(PlatformError::Unknown(one.to_owned()))
            }
            [os, architecture] => Ok(Platform::new(os, architecture, "")),
            [os, architecture, variant] => Ok(Platform::new(os, architecture, variant)),
            _ => Err(form()),
        }
    }

    /// The same platform in its usual spelling.
    pub fn normalized(&self) -> Platform {
        let (architecture, variant) = normalize_architecture(&self.architecture, &self.variant);
        Platform {
            os: normalize_os(&self.os),
            architecture,
            variant,
            os_version: self.os_version.clone(),
            os_features: self.os_features.clone(),
        }
    }
}

fn normalize_os(os: &str) -> String {
    match os.to_ascii_lowercase().as_str() {
        "" => "linux".to_owned(),
        "macos" => "darwin".to_owned(),
        other => other.to_owned(),
    }
}

fn normalize_architecture(architecture: &str, variant: &str) -> (String, String) {
    let architecture = architecture.to_ascii_lowercase();
    let variant = variant.to_ascii_lowercase();
    let (architecture, variant) = match architecture.as_str() {
        "i386" | "i486" | "i586" | "i686" | "x86" => ("386", ""),
        "386" => ("386", variant.as_str()),
        "x86_64" | "x86-64" | "amd64" => ("amd64", if variant == "v1" { "" } else { &variant }),
        "aarch64" | "arm64" => {
            ("arm64", if matches!(variant.as_str(), "8" | "v8" | "v8.0") { "" } else { &variant })
        }
        "armhf" => ("arm", "v7"),
        "armel" => ("arm", "v6"),
        "arm" => (
            "arm",
            match variant.as_str() {
                "" | "7" => "v7",
                "5" => "v5",
                "6" => "v6",
                "8" => "v8",
                other => other,
            },
        ),
        "powerpc64le" => ("ppc64le", variant.as_str()),
        "loongarch64" => ("loong64", variant.as_str()),
        other => (other, variant.as_str()),
    };
    (architecture.to_owned(), variant.to_owned())
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.os.is_empty() {
            return f.write_str("unknown");
        }
        f.write_str(&self.os)?;
        for part in [&self.architecture, &self.variant] {
            if !part.is_empty() {
                write!(f, "/{part}")?;
            }
        }
        Ok(())
    }
}

impl FromStr for Platform {
    type Err = PlatformError;

    fn from_str(text: &str) -> Result<Platform, PlatformError> {
        Platform::parse(text)
    }
}

pub use matcher::Matcher;

/// Choosing among platforms.
pub mod matcher {
    use super::Platform;

    /// Says which platforms are wanted and in what order. The first entry is the best.
    #[derive(Clone, Debug)]
    pub struct Matcher {
        /// `None` wants every platform.
        wanted: Option<Vec<Platform>>,
    }

    impl Matcher {
        /// Wants everything, all equally.
        pub fn all() -> Matcher {
            Matcher { wanted: None }
        }

        /// Wants what `platform` can run: itself, then older variants, then its 32-bit modes.
        pub fn only(platform: &Platform) -> Matcher {
            Matcher { wanted: Some(runnable_on(&platform.normalized())) }
        }

        /// Wants exactly `platform`.
        pub fn strict(platform: &Platform) -> Matcher {
            Matcher { wanted: Some(vec![platform.normalized()]) }
        }

        /// Wants what any of `platforms` can run; nothing at all when the list is empty.
        pub fn any_of(platforms: &[Platform]) -> Matcher {
            Matcher { wanted: Some(platforms.iter().flat_map(|p| runnable_on(&p.normalized())).collect()) }
        }

        /// How well `platform` fits: 0 is best, `None` is not wanted.
        pub fn rank(&self, platform: &Platform) -> Option<usize> {
            let Some(wanted) = &self.wanted else { return Some(0) };
            let platform = platform.normalized();
            wanted.iter().position(|want| {
                let want = want.normalized();
                want.os == platform.os
                    && want.architecture == platform.architecture
                    && want.variant == platform.variant
                    && (want.os_version.is_empty() || want.os_version == platform.os_version)
            })
        }

        /// Whether `platform` is wanted.
        pub fn matches(&self, platform: &Platform) -> bool {
            self.rank(platform).is_some()
        }
    }

    /// The platforms whose programs run on `host`, best first.
    fn runnable_on(host: &Platform) -> Vec<Platform> {
        let with = |architecture: &str, variant: String| Platform {
            architecture: architecture.to_owned(),
            variant,
            ..host.clone()
        };
        let number = |variant: &str| variant.strip_prefix('v').and_then(|v| v.parse::<u32>().ok());
        let arm_down_from =
            |top: u32| (5..=top.min(8)).rev().map(|v| with("arm", format!("v{v}"))).collect::<Vec<_>>();
        let mut list = vec![host.clone()];
        match host.architecture.as_str() {
            "amd64" => {
                if let Some(version) = number(&host.variant) {
                    list.extend((1..version.min(16)).rev().map(|v| with("amd64", format!("v{v}"))));
                }
                list.push(with("386", String::new()));
            }
            "arm" => {
                if let Some(version) = number(&host.variant)
                    && version > 5
                {
                    list.extend(arm_down_from(version - 1));
                }
            }
            "arm64" => {
                // Armv9.N contains Armv8.(N+5), and both run 32-bit code of v8 and below.
                let variant = if host.variant.is_empty() { "v8" } else { &host.variant };
                let (major, minor) = match variant.trim_start_matches('v').split_once('.') {
                    Some((major, minor)) => (major.parse().ok(), minor.parse().ok()),
                    None => (variant.trim_start_matches('v').parse::<u32>().ok(), Some(0u32)),
                };
                let series = match (major, minor) {
                    (Some(8), Some(minor)) if minor <= 9 => vec![(8, minor)],
                    (Some(9), Some(minor)) if minor <= 7 => vec![(9, minor), (8, (minor + 5).min(9))],
                    _ => return list,
                };
                for (major, top) in series {
                    for minor in (0..=top).rev() {
                        let dot = if minor == 0 { String::new() } else { format!(".{minor}") };
                        let other = with("arm64", format!("v{major}{dot}")).normalized();
                        // It is the first already, in whatever way it is written.
                        if other != *host {
                            list.push(other);
                        }
                    }
                }
                list.extend(arm_down_from(8));
            }
            _ => {}
        }
        list
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn whatever_a_platform_is_called_it_runs_its_own_images() {
        for text in
            ["linux/arm64/8.1", "linux/arm64/v9.0", "linux/arm64/v08.1", "linux/arm64/v8.1", "linux/arm64"]
        {
            let platform = Platform::parse(text).unwrap();
            assert_eq!(Matcher::only(&platform).rank(&platform), Some(0), "{text}");
        }
    }

    #[test]
    fn parses_and_normalises() {
        for (given, expected) in [
            ("linux/amd64", "linux/amd64"),
            ("linux/x86_64", "linux/amd64"),
            ("linux/arm64/v8", "linux/arm64"),
            ("linux/aarch64", "linux/arm64"),
            ("linux/arm", "linux/arm/v7"),
            ("linux/armhf", "linux/arm/v7"),
            ("linux/arm/6", "linux/arm/v6"),
            ("Linux/AMD64", "linux/amd64"),
            ("macos/arm64", "darwin/arm64"),
        ] {
            assert_eq!(Platform::parse(given).unwrap().to_string(), expected, "{given}");
        }
        assert_eq!(Platform::parse("arm64").unwrap().to_string(), "linux/arm64");
        assert_eq!(Platform::parse("linux").unwrap(), Platform::host());
        for bad in ["", "/", "linux/", "linux//v8", "a/b/c/d", "linux/am d64", "nonsense"] {
            assert!(Platform::parse(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn prefers_the_closest_variant() {
        let matcher = Matcher::only(&Platform::parse("linux/arm/v7").unwrap());
        let rank = |p: &str| matcher.rank(&Platform::parse(p).unwrap());
        assert_eq!(rank("linux/arm/v7"), Some(0));
        assert_eq!(rank("linux/arm/v6"), Some(1));
        assert_eq!(rank("linux/arm/v8"), None);
        assert_eq!(rank("linux/arm64"), None);

        let matcher = Matcher::only(&Platform::parse("linux/arm64").unwrap());
        assert_eq!(matcher.rank(&Platform::parse("linux/arm64/v8").unwrap()), Some(0));
        assert_eq!(matcher.rank(&Platform::parse("linux/arm64/v9").unwrap()), None);
        assert!(matcher.matches(&Platform::parse("linux/arm/v6").unwrap()));

        let matcher = Matcher::only(&Platform::parse("linux/arm64/v9").unwrap());
        assert_eq!(matcher.rank(&Platform::parse("linux/arm64/v9").unwrap()), Some(0));
        assert_eq!(matcher.rank(&Platform::parse("linux/arm64/v8.5").unwrap()), Some(1));
        assert!(matcher.matches(&Platform::parse("linux/arm64").unwrap()));

        let matcher = Matcher::only(&Platform::parse("linux/amd64/v3").unwrap());
        assert_eq!(matcher.rank(&Platform::parse("linux/amd64/v2").unwrap()), Some(1));
        assert_eq!(matcher.rank(&Platform::parse("linux/amd64").unwrap()), Some(2));
        assert_eq!(matcher.rank(&Platform::parse("linux/386").unwrap()), Some(3));
        assert!(!matcher.matches(&Platform::parse("linux/amd64/v4").unwrap()));
        assert!(!matcher.matches(&Platform::parse("windows/amd64").unwrap()));

        assert!(Matcher::all().matches(&Platform::parse("windows/arm64").unwrap()));
        assert!(
            !Matcher::strict(&Platform::parse("linux/amd64").unwrap())
                .matches(&Platform::new("linux", "386", ""))
        );
        assert!(!Matcher::any_of(&[]).matches(&Platform::host()));
    }

    #[test]
    fn reads_the_index_form() {
        let platform: Platform =
            serde_json::from_str(r#"{"architecture":"arm64","os":"linux","variant":"v8","new":1}"#).unwrap();
        assert!(Matcher::only(&Platform::parse("linux/arm64").unwrap()).matches(&platform));
        assert_eq!(
            serde_json::to_string(&Platform::new("linux", "amd64", "")).unwrap(),
            r#"{"architecture":"amd64","os":"linux"}"#
        );
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_normalising_is_stable(text in "[a-zA-Z0-9/_.-]{0,40}") {
            if let Ok(platform) = Platform::parse(&text) {
                prop_assert_eq!(platform.normalized(), platform.clone());
                prop_assert!(Matcher::only(&platform).matches(&platform));
                if !platform.architecture.is_empty() {
                    prop_assert_eq!(Platform::parse(&platform.to_string()).unwrap(), platform);
                }
            }
        }
    }
}
