//! What holds of any hosts.toml and of any challenge of a registry.

use std::path::Path;

use super::{auth, hosts};

/// A hosts.toml: what is accepted names http and https hosts alone, without credentials in their addresses, and files by absolute
/// paths; the registry itself comes last.
pub fn hosts(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    let Ok(sections) = hosts::parse(text, Path::new("/certs.d/r.io")) else { return };
    assert!(!sections.is_empty());
    for section in sections {
        if let Some(url) = &section.url {
            assert!(matches!(url.scheme(), "http" | "https"), "{url}");
            assert!(url.host_str().is_some_and(|host| !host.is_empty()), "{url}");
            assert!(url.username().is_empty() && url.password().is_none(), "{url}");
        }
        let mut files: Vec<_> = section.ca.iter().collect();
        for (certificate, key) in &section.client {
            files.push(certificate);
            files.extend(key);
        }
        assert!(files.iter().all(|file| file.is_absolute()), "{files:?}");
        // The files are not for this to read.
        if !section.ca.is_empty() || !section.client.is_empty() {
            continue;
        }
        let Ok(host) = section.resolve("r.io", None) else { continue };
        assert!(matches!(host.scheme.as_str(), "http" | "https") && !host.authority.contains(['/', '@']));
        let origin = host.origin();
        let url: reqwest::Url = format!("{origin}{}/library/x", host.path).parse().expect("an address");
        assert_eq!(hosts::authority(&url).as_str(), host.authority, "{origin}");
    }
}

/// The value of a WWW-Authenticate header: names are in lower case, and what is written in quotes comes back.
pub fn auth(data: &[u8]) {
    let Ok(text) = std::str::from_utf8(data) else { return };
    for challenge in auth::parse(text) {
        assert!(!challenge.scheme.is_empty() && !challenge.scheme.contains([' ', ',', '=', '"']));
        let names = || challenge.parameters.keys();
        assert!(names().all(|name| *name == name.to_ascii_lowercase() && !name.is_empty()));
        let mut written = challenge.scheme.clone();
        for (at, (name, value)) in challenge.parameters.iter().enumerate() {
            let value = value.replace('\\', "\\\\").replace('"', "\\\"");
            written += &format!("{} {name}=\"{value}\"", if at == 0 { "" } else { "," });
        }
        assert_eq!(auth::parse(&written), [challenge], "{written}");
    }
}
