//! Image references: `[domain/]path[:tag][@digest]`, and the shorthand for Docker Hub.
//!
//! The short forms are those users type: `busybox` is `docker.io/library/busybox`, and
//! `me/app` is `docker.io/me/app`. The first part of a name is a domain when it holds a dot or a
//! colon, is `localhost`, or has an upper-case letter.
//!
//! Image *names* in the engine are any string; only what talks to a registry, or what follows
//! the naming rules of one, parses them as references.

use std::fmt;
use std::str::FromStr;

use crate::digest::{Digest, DigestError};

/// A reference in its full form.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Reference {
    domain: String,
    path: String,
    tag: Option<String>,
    digest: Option<Digest>,
}

/// Why a string is not a reference.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum ReferenceError {
    /// Nothing there.
    #[error("the image reference is empty")]
    Empty,
    /// The name exceeds 255 characters.
    #[error("the image name is longer than 255 characters")]
    TooLong,
    /// 64 hex characters: could as well be an id.
    #[error("{0:?} looks like an image id, which cannot be a repository name")]
    LooksLikeId(String),
    /// The part before the first slash is no host name.
    #[error("{0:?} is not a valid registry host")]
    Domain(String),
    /// A part of the path breaks the rules.
    #[error(
        "{0:?} is not a valid repository name: lower-case letters and digits, joined by '.', '_', '__' or '-', in parts joined by '/'"
    )]
    Path(String),
    /// The tag breaks the rules.
    #[error(
        "{0:?} is not a valid tag: at most 128 letters, digits, '_', '.', '-', not beginning with '.' or '-'"
    )]
    Tag(String),
    /// The part after `@` is no digest.
    #[error("invalid digest in image reference: {0}")]
    Digest(#[from] DigestError),
}

/// The registry that short names mean.
pub const DEFAULT_DOMAIN: &str = "docker.io";

const NAME_LIMIT: usize = 255;

impl Reference {
    /// Parses what a user typed, filling in Docker Hub's domain and `library/`.
    pub fn parse_normalized(text: &str) -> Result<Reference, ReferenceError> {
        if text.is_empty() {
            return Err(ReferenceError::Empty);
        }
        // No legal reference is longer than name, tag and digest together.
        if text.len() > 640 {
            return Err(ReferenceError::TooLong);
        }
        if text.len() == 64 && text.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f')) {
            return Err(ReferenceError::LooksLikeId(text.to_owned()));
        }
        let (domain, rest) = match text.split_once('/') {
            Some((first, rest))
                if first.contains(['.', ':'])
                    || first == "localhost"
                    || first.bytes().any(|b| b.is_ascii_uppercase()) =>
            {
                (if first == "index.docker.io" { DEFAULT_DOMAIN } else { first }, rest)
            }
            _ => (DEFAULT_DOMAIN, text),
        };
        if domain == DEFAULT_DOMAIN && !rest.split(['@', ':']).next().unwrap_or(rest).contains('/') {
            return Reference::assemble(domain, &format!("library/{rest}"));
        }
        Reference::assemble(domain, rest)
    }

    fn assemble(domain: &str, rest: &str) -> Result<Reference, ReferenceError> {
        let (rest, digest) = match rest.split_once('@') {
            Some((rest, digest)) => (rest, Some(Digest::parse(digest)?)),
            None => (rest, None),
        };
        let (path, tag) = match rest.split_once(':') {
            Some((path, tag)) => (path, Some(tag)),
            None => (rest, None),
        };
        if !is_domain(domain) {
            return Err(ReferenceError::Domain(domain.to_owned()));
        }
        if !path.split('/').all(is_path_part) {
            return Err(ReferenceError::Path(path.to_owned()));
        }
        if domain.len() + 1 + path.len() > NAME_LIMIT {
            return Err(ReferenceError::TooLong);
        }
        if let Some(tag) = tag
            && !is_tag(tag)
        {
            return Err(ReferenceError::Tag(tag.to_owned()));
        }
        Ok(Reference {
            domain: domain.to_owned(),
            path: path.to_owned(),
            tag: tag.map(str::to_owned),
            digest,
        })
    }

    /// The registry's host, with port where there is one.
    pub fn domain(&self) -> &str {
        &self.domain
    }

    /// The repository within the registry.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// `domain/path`.
    pub fn name(&self) -> String {
        format!("{}/{}", self.domain, self.path)
    }

    /// The tag, if one is given.
    pub fn tag(&self) -> Option<&str> {
        self.tag.as_deref()
    }

    /// The digest, if one is given.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The same with tag `latest` when there is neither tag nor digest.
    pub fn with_default_tag(mut self) -> Reference {
        if self.tag.is_none() && self.digest.is_none() {
            self.tag = Some("latest".to_owned());
        }
        self
    }

    /// The same repository at `tag`, without digest.
    pub fn with_tag(&self, tag: &str) -> Result<Reference, ReferenceError> {
        if !is_tag(tag) {
            return Err(ReferenceError::Tag(tag.to_owned()));
        }
        Ok(Reference { tag: Some(tag.to_owned()), digest: None, ..self.clone() })
    }

    /// The same repository at `digest`, without tag.
    pub fn with_digest(&self, digest: Digest) -> Reference {
        Reference { tag: None, digest: Some(digest), ..self.clone() }
    }

    /// The short form that a user would type; the full one where a shorter would name something else.
    pub fn familiar(&self) -> String {
        let full = self.to_string();
        let on_hub = full.strip_prefix("docker.io/");
        let official = on_hub.and_then(|short| short.strip_prefix("library/"));
        // The first part of a repository's name may look like a registry, and an official one's name like an id.
        let same = |short: &&str| Reference::parse_normalized(short).as_ref() == Ok(self);
        [official, on_hub].into_iter().flatten().find(same).unwrap_or(&full).to_owned()
    }
}

impl fmt::Display for Reference {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.domain, self.path)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl FromStr for Reference {
    type Err = ReferenceError;

    fn from_str(text: &str) -> Result<Reference, ReferenceError> {
        Reference::parse_normalized(text)
    }
}

/// Host name, IPv4 or bracketed IPv6 address, with an optional port.
fn is_domain(domain: &str) -> bool {
    let (host, port) = match domain.strip_prefix('[').and_then(|d| d.split_once(']')) {
        Some((address, rest)) => {
            if address.is_empty() || !address.bytes().all(|b| b.is_ascii_hexdigit() || b == b':') {
                return false;
            }
            match rest.strip_prefix(':') {
                Some(port) => (None, Some(port)),
                None if rest.is_empty() => (None, None),
                None => return false,
            }
        }
        None => match domain.split_once(':') {
            Some((host, port)) => (Some(host), Some(port)),
            None => (Some(domain), None),
        },
    };
    let host_fits = host.is_none_or(|host| {
        host.split('.').all(|label| {
            !label.is_empty()
                && !label.starts_with('-')
                && !label.ends_with('-')
                && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
        })
    });
    host_fits && port.is_none_or(|port| !port.is_empty() && port.bytes().all(|b| b.is_ascii_digit()))
}

/// Runs of lower-case letters and digits, joined by one dot, one or two underscores, or dashes.
fn is_path_part(part: &str) -> bool {
    let joins = |b: u8| matches!(b, b'.' | b'_' | b'-');
    if !part.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || joins(b)) {
        return false;
    }
    let separators = part.split(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit());
    let legal = |s: &str| matches!(s, "" | "." | "_" | "__") || s.bytes().all(|b| b == b'-');
    !part.is_empty()
        && !part.starts_with(|c| joins(c as u8))
        && !part.ends_with(|c| joins(c as u8))
        && separators.into_iter().all(legal)
}

fn is_tag(tag: &str) -> bool {
    (1..=128).contains(&tag.len())
        && !tag.starts_with(['.', '-'])
        && tag.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-'))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    const DIGEST: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn fills_in_docker_hub() {
        for (given, expected) in [
            ("busybox", "docker.io/library/busybox"),
            ("busybox:1.36", "docker.io/library/busybox:1.36"),
            ("me/app", "docker.io/me/app"),
            ("docker.io/busybox", "docker.io/library/busybox"),
            ("index.docker.io/busybox", "docker.io/library/busybox"),
            ("docker.io/library/busybox:latest", "docker.io/library/busybox:latest"),
            ("localhost/app", "localhost/app"),
            ("localhost:5000/app:v1", "localhost:5000/app:v1"),
            ("registry.k8s.io/pause:3.9", "registry.k8s.io/pause:3.9"),
            ("[::1]:5000/app", "[::1]:5000/app"),
            ("Host/app", "Host/app"),
        ] {
            assert_eq!(Reference::parse_normalized(given).unwrap().to_string(), expected, "{given}");
        }
        let reference = Reference::parse_normalized(&format!("quay.io/a/b__c--d.e:v1@{DIGEST}")).unwrap();
        assert_eq!(reference.domain(), "quay.io");
        assert_eq!(reference.path(), "a/b__c--d.e");
        assert_eq!(reference.tag(), Some("v1"));
        assert_eq!(reference.digest().unwrap().as_str(), DIGEST);
        let busybox = Reference::parse_normalized("busybox").unwrap().with_default_tag();
        assert_eq!(busybox.to_string(), "docker.io/library/busybox:latest");
        assert_eq!(busybox.familiar(), "busybox:latest");
    }

    #[test]
    fn a_short_form_names_the_same() {
        let id = "a".repeat(64);
        for (given, short) in [
            ("docker.io/library/busybox:1", "busybox:1"),
            ("docker.io/me/app", "me/app"),
            ("docker.io/library/a/b", "library/a/b"),
            ("docker.io/a.b/c", "docker.io/a.b/c"),
            ("docker.io/localhost/c", "docker.io/localhost/c"),
            (&format!("docker.io/library/{id}"), &format!("library/{id}")),
        ] {
            assert_eq!(Reference::parse_normalized(given).unwrap().familiar(), short);
        }
    }

    #[test]
    fn refuses_what_registries_refuse() {
        for bad in [
            "",
            "/",
            "a//b",
            "App",
            "docker.io/App",
            "a:",
            "a:-tag",
            "a@sha256:12",
            "a/../b",
            "-host.com/a",
            "host:port/a",
            "a___b",
            "a..b",
            "_a",
            "a_",
            "host.com/",
            "a b",
            "[::1/a",
            "[zz]:1/a",
        ] {
            assert!(Reference::parse_normalized(bad).is_err(), "{bad}");
        }
        assert!(matches!(Reference::parse_normalized(&"a".repeat(64)), Err(ReferenceError::LooksLikeId(_))));
        assert!(Reference::parse_normalized(&"a".repeat(250)).is_err());
        assert!(Reference::parse_normalized(&format!("a:{}", "t".repeat(129))).is_err());
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_is_stable(text in "[a-zA-Z0-9/:@._\\[\\]-]{0,80}") {
            if let Ok(reference) = Reference::parse_normalized(&text) {
                let full = reference.to_string();
                prop_assert_eq!(Reference::parse_normalized(&full).unwrap(), reference.clone());
                let short = reference.familiar();
                prop_assert_eq!(Reference::parse_normalized(&short).map(|r| r.to_string()), Ok(full));
            }
        }

        #[test]
        fn any_text_is_survived(text in "\\PC{0,100}") {
            let _ = Reference::parse_normalized(&text);
        }
    }
}
