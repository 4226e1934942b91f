//! Which hosts serve a registry, and how each is reached.
//!
//! ```text
//!  FOLDER/HOST_PORT_/  FOLDER/HOST:PORT/  FOLDER/_default/     the first that is there, of the first folder that has one
//!    hosts.toml        [host."URL"] sections in the order of the file, then `server` or the registry itself
//!    *.crt, *.cert and *.key, where there is no hosts.toml: as Docker has them, for the registry itself
//! ```
//!
//! Invariant: a file that cannot be understood is an error. To go on without it could ask the wrong host.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use http::HeaderMap;
use reqwest::Url;
use serde::Deserialize;

use super::client::Tls;
use super::request::header_map;
use crate::error::{Error, Result};

/// The largest hosts.toml or certificate that is read.
const FILE_LIMIT: u64 = 1 << 20;

/// What a host may be asked for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Capabilities {
    pub(super) pull: bool,
    pub(super) resolve: bool,
    pub(super) push: bool,
}

impl Capabilities {
    const ALL: Capabilities = Capabilities { pull: true, resolve: true, push: true };
}

/// One host of a registry.
#[derive(Clone)]
pub(super) struct Host {
    /// `http` or `https`.
    pub(super) scheme: String,
    /// Host and, unless it is the scheme's own, port.
    pub(super) authority: String,
    /// What paths of the protocol begin with: `/v2`.
    pub(super) path: String,
    pub(super) capabilities: Capabilities,
    pub(super) headers: HeaderMap,
    pub(super) tls: Tls,
    pub(super) dial_timeout: Option<Duration>,
    /// Whether http is tried where the port does not talk TLS.
    pub(super) fallback: bool,
    /// What requests say in `ns`: the registry that this host stands for.
    pub(super) namespace: Option<String>,
}

impl Host {
    /// What tells it from other hosts.
    pub(super) fn origin(&self) -> String {
        format!("{}://{}", self.scheme, self.authority)
    }
}

/// Refuses what is neither http nor https.
pub(super) fn check_scheme(scheme: Option<&str>) -> Result<()> {
    match scheme {
        None | Some("http" | "https") => Ok(()),
        Some(other) => {
            Err(Error::invalid_argument(format!("scheme {other:?}: registries talk http or https")))
        }
    }
}

/// Whether an authority is this machine itself.
pub(super) fn is_loopback(authority: &str) -> bool {
    let (host, _) = split_port(authority);
    let host = host.trim_start_matches('[').trim_end_matches(']');
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

fn split_port(authority: &str) -> (&str, Option<&str>) {
    match authority.rsplit_once(':') {
        Some((host, port)) if !port.is_empty() && port.bytes().all(|byte| byte.is_ascii_digit()) => {
            (host, Some(port))
        }
        _ => (authority, None),
    }
}

/// The hosts of a registry, in the order to ask them. Blocks.
pub(super) fn load(folders: &[PathBuf], registry: &str, scheme: Option<&str>) -> Result<Vec<Host>> {
    let sections = match find(folders, registry)? {
        Some(folder) => sections(&folder)?,
        None => vec![Section::default()],
    };
    sections.into_iter().map(|section| section.resolve(registry, scheme)).collect()
}

/// The folder for a registry.
fn find(folders: &[PathBuf], registry: &str) -> Result<Option<PathBuf>> {
    let underscored = match split_port(registry) {
        (host, Some(port)) => format!("{host}_{port}_"),
        _ => registry.to_owned(),
    };
    for folder in folders {
        for name in [underscored.as_str(), registry, "_default"] {
            let path = folder.join(name);
            match std::fs::metadata(&path) {
                Ok(_) => return Ok(Some(path)),
                Err(error)
                    if matches!(
                        error.kind(),
                        std::io::ErrorKind::NotFound | std::io::ErrorKind::NotADirectory
                    ) => {}
                Err(error) => return Err(Error::io("look for the hosts of a registry at", &path, &error)),
            }
        }
    }
    Ok(None)
}

fn sections(folder: &Path) -> Result<Vec<Section>> {
    let path = folder.join("hosts.toml");
    match read(&path) {
        Ok(bytes) if !bytes.iter().all(u8::is_ascii_whitespace) => {
            let text = String::from_utf8(bytes).map_err(|_| {
                Error::failed_precondition(format!("{} is not UTF-8; correct it", path.display()))
            })?;
            parse(&text, folder).map_err(|error| {
                Error::failed_precondition(format!("{}: {error}; correct it", path.display()))
            })
        }
        Ok(_) | Err(Error::NotFound(_)) => Ok(vec![certificates(folder)?]),
        Err(error) => Err(error),
    }
}

/// Docker's folder of certificates.
fn certificates(folder: &Path) -> Result<Section> {
    let failed = |error| Error::io("list", folder, &error);
    let mut names = Vec::new();
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        names.push(entry.map_err(failed)?.path());
    }
    names.sort();
    let mut section = Section::default();
    for path in names {
        match path.extension().and_then(|extension| extension.to_str()) {
            Some("crt") => section.ca.push(path),
            Some("cert") => {
                let key = path.with_extension("key");
                let key = key.exists().then_some(key);
                section.client.push((path, key));
            }
            _ => {}
        }
    }
    Ok(section)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    use std::io::Read as _;
    let failed = |error| Error::io("read", path, &error);
    let mut bytes = Vec::new();
    let file = std::fs::File::open(path).map_err(failed)?;
    file.take(FILE_LIMIT + 1).read_to_end(&mut bytes).map_err(failed)?;
    if bytes.len() as u64 > FILE_LIMIT {
        return Err(Error::failed_precondition(format!(
            "{} is larger than {FILE_LIMIT} bytes, which no such file is",
            path.display()
        )));
    }
    Ok(bytes)
}

/// A host as its file has it.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Section {
    /// None: the registry itself.
    pub(super) url: Option<Url>,
    override_path: bool,
    capabilities: Option<Capabilities>,
    pub(super) ca: Vec<PathBuf>,
    pub(super) client: Vec<(PathBuf, Option<PathBuf>)>,
    skip_verify: Option<bool>,
    headers: Vec<(String, String)>,
    dial_timeout: Option<Duration>,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct HostSection {
    capabilities: Vec<String>,
    ca: Option<OneOrMore>,
    client: Option<Client>,
    skip_verify: Option<bool>,
    header: BTreeMap<String, OneOrMore>,
    override_path: bool,
    dial_timeout: String,
}

#[derive(Default, Deserialize)]
#[serde(default)]
struct HostsFile {
    server: String,
    host: BTreeMap<String, HostSection>,
}

#[derive(Clone, Deserialize)]
#[serde(untagged, expecting = "a text or a list of texts")]
enum OneOrMore {
    One(String),
    More(Vec<String>),
}

impl OneOrMore {
    fn all(self) -> Vec<String> {
        match self {
            OneOrMore::One(one) => vec![one],
            OneOrMore::More(more) => more,
        }
    }
}

#[derive(Deserialize)]
#[serde(
    untagged,
    expecting = "a file's name, a list of names, or a list of pairs of a certificate and its key"
)]
enum Client {
    One(String),
    More(Vec<OneOrMore>),
}

/// What a hosts.toml in `folder` says: hosts in the order of the file, last the server.
pub(super) fn parse(text: &str, folder: &Path) -> std::result::Result<Vec<Section>, String> {
    let file: HostsFile = toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
    let server: HostSection =
        toml::from_str(text).map_err(|error| error.to_string().trim_end().to_owned())?;
    // A map forgets the order, which is the order in which hosts are asked.
    let table = toml::de::DeTable::parse(text).map_err(|error| error.to_string())?;
    let mut places: BTreeMap<String, usize> = BTreeMap::new();
    if let Some(toml::de::DeValue::Table(hosts)) = table.get_ref().get("host").map(|value| value.get_ref()) {
        for key in hosts.keys() {
            places.insert(key.get_ref().to_string(), key.span().start);
        }
    }
    let mut hosts: Vec<(String, HostSection)> = file.host.into_iter().collect();
    hosts.sort_by_key(|(name, _)| places.get(name).copied());
    let mut sections = Vec::new();
    for (name, host) in hosts {
        sections.push(host.section(&name, folder).map_err(|error| format!("host {name:?}: {error}"))?);
    }
    sections.push(server.section(&file.server, folder)?);
    Ok(sections)
}

impl HostSection {
    fn section(self, url: &str, folder: &Path) -> std::result::Result<Section, String> {
        let url = match url {
            "" => None,
            url => Some(server(url)?),
        };
        let mut capabilities = Capabilities { pull: false, resolve: false, push: false };
        for name in &self.capabilities {
            match name.to_ascii_lowercase().as_str() {
                "pull" => capabilities.pull = true,
                "resolve" => capabilities.resolve = true,
                "push" => capabilities.push = true,
                // Nothing asks for referrers yet.
                "referrers" => {}
                _ => return Err(format!("capability {name:?} is not one of pull, resolve, push, referrers")),
            }
        }
        let absolute = |name: String| folder.join(name);
        let mut client = Vec::new();
        for entry in match self.client {
            None => Vec::new(),
            Some(Client::One(file)) => vec![OneOrMore::One(file)],
            Some(Client::More(files)) => files,
        } {
            match entry {
                OneOrMore::One(file) => client.push((absolute(file), None)),
                OneOrMore::More(pair) => match <[String; 2]>::try_from(pair) {
                    Ok([certificate, key]) => {
                        let key = Some(key).filter(|key| !key.is_empty()).map(absolute);
                        client.push((absolute(certificate), key));
                    }
                    Err(pair) => {
                        return Err(format!(
                            "`client` has a list of {} names; pairs are of a certificate and its key",
                            pair.len()
                        ));
                    }
                },
            }
        }
        let headers = self.header.into_iter();
        let headers = headers
            .flat_map(|(name, values)| values.all().into_iter().map(move |value| (name.clone(), value)));
        let headers: Vec<_> = headers.collect();
        header_map(&headers).map_err(|error| error.to_string())?;
        let dial_timeout = match self.dial_timeout.as_str() {
            "" => None,
            text => Some(crate::gc::parse_duration(text).ok_or_else(|| {
                format!("dial_timeout is {text:?}, which is not a duration; write 500ms or 10s")
            })?),
        };
        Ok(Section {
            url,
            override_path: self.override_path,
            capabilities: (!self.capabilities.is_empty()).then_some(capabilities),
            ca: self.ca.map(OneOrMore::all).unwrap_or_default().into_iter().map(absolute).collect(),
            client,
            skip_verify: self.skip_verify,
            headers,
            // 0 is containerd's "no limit", which nothing is here.
            dial_timeout: dial_timeout.filter(|limit| !limit.is_zero()),
        })
    }
}

/// The address of a host; https where it has no scheme.
fn server(text: &str) -> std::result::Result<Url, String> {
    let whole = if text.contains("://") { text.to_owned() } else { format!("https://{text}") };
    let url: Url = whole.parse().map_err(|error| format!("{text:?} is not an address: {error}"))?;
    if !matches!(url.scheme(), "http" | "https") || url.host_str().is_none_or(str::is_empty) {
        return Err(format!("{text:?} is not the address of an http or https host"));
    }
    if !url.username().is_empty() || url.password().is_some() {
        return Err("an address holds a user or password; give credentials to the transfer instead".into());
    }
    Ok(url)
}

impl Section {
    pub(super) fn resolve(self, registry: &str, default_scheme: Option<&str>) -> Result<Host> {
        let mut skip_verify = self.skip_verify;
        let (scheme, authority, path) = match &self.url {
            Some(url) => {
                let path = url.path().trim_end_matches('/');
                let path = if self.override_path || path.ends_with("/v2") {
                    path.to_owned()
                } else {
                    format!("{path}/v2")
                };
                (url.scheme().to_owned(), authority(url), path)
            }
            None => {
                let (authority, scheme) = match (registry, default_scheme) {
                    ("docker.io", _) => ("registry-1.docker.io", "https"),
                    (_, Some(scheme)) => (registry, scheme),
                    _ if is_loopback(registry) => {
                        let port = split_port(registry).1;
                        if port != Some("80") && self.ca.is_empty() {
                            // Who can listen here need not prove it.
                            skip_verify = skip_verify.or(Some(true));
                        }
                        (registry, if matches!(port, None | Some("443")) { "https" } else { "http" })
                    }
                    _ => (registry, "https"),
                };
                (scheme.to_owned(), authority.to_owned(), "/v2".to_owned())
            }
        };
        let has_tls = !self.ca.is_empty() || !self.client.is_empty() || skip_verify.is_some();
        // Settings for TLS at an http host: TLS is tried first, unless the port rules it out.
        let fallback = scheme == "http" && has_tls && !matches!(split_port(&authority).1, None | Some("80"));
        let scheme = if fallback { "https".to_owned() } else { scheme };
        let mut tls = Tls { skip_verify: skip_verify.unwrap_or(false), ..Tls::default() };
        for file in &self.ca {
            tls.roots.push((file.display().to_string(), read(file)?));
        }
        for (certificate, key) in &self.client {
            let key = read(key.as_ref().unwrap_or(certificate))?;
            tls.identities.push((certificate.display().to_string(), read(certificate)?, key));
        }
        let itself =
            authority == registry || (registry == "docker.io" && authority == "registry-1.docker.io");
        Ok(Host {
            scheme,
            path,
            // The registry itself can do everything; its section cannot take that away, as in containerd.
            capabilities: match &self.url {
                Some(_) => self.capabilities.unwrap_or(Capabilities::ALL),
                None => Capabilities::ALL,
            },
            headers: header_map(&self.headers)?,
            tls,
            dial_timeout: self.dial_timeout,
            fallback,
            namespace: (!itself).then(|| registry.to_owned()),
            authority,
        })
    }
}

/// Host and, unless it is the scheme's own, port.
pub(super) fn authority(url: &Url) -> String {
    let host = url.host_str().unwrap_or_default();
    match url.port() {
        Some(port) => format!("{host}:{port}"),
        None => host.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn write(folder: &Path, name: &str, text: &str) {
        let path = folder.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }

    fn origins(hosts: &[Host]) -> Vec<String> {
        hosts.iter().map(|host| format!("{}{}", host.origin(), host.path)).collect()
    }

    fn load_one(folder: &Path, registry: &str) -> Result<Vec<Host>> {
        load(&[folder.to_owned()], registry, None)
    }

    #[test]
    fn without_files_a_registry_serves_itself() {
        let of = |registry: &str, scheme: Option<&str>| {
            let host = load(&[], registry, scheme).unwrap().remove(0);
            (host.origin(), host.fallback, host.tls.skip_verify, host.namespace.is_some())
        };
        assert_eq!(
            of("docker.io", Some("http")),
            ("https://registry-1.docker.io".into(), false, false, false)
        );
        assert_eq!(of("r.io:5000", None), ("https://r.io:5000".into(), false, false, false));
        assert_eq!(of("r.io", Some("http")), ("http://r.io".into(), false, false, false));
        assert_eq!(of("localhost:5000", None), ("https://localhost:5000".into(), true, true, false));
        assert!(of("127.9.9.9:5000", None).1);
        assert!(of("[::1]:5000", None).1);
        assert_eq!(of("localhost:5000", Some("http")), ("http://localhost:5000".into(), false, false, false));
        assert_eq!(of("localhost:80", None), ("http://localhost:80".into(), false, false, false));
        assert_eq!(of("localhost", None), ("https://localhost".into(), false, true, false));
        assert!(!of("128.0.0.1:5000", None).1);
    }

    #[test]
    fn the_first_folder_that_has_a_registry_counts() {
        let folders = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let paths: Vec<PathBuf> = folders.iter().map(|folder| folder.path().to_owned()).collect();
        let server = |registry: &str| origins(&load(&paths, registry, None).unwrap()).concat();
        write(&paths[1], "r.io:5000/hosts.toml", "server = 'https://colon'");
        assert_eq!(server("r.io:5000"), "https://colon/v2");
        write(&paths[1], "r.io_5000_/hosts.toml", "server = 'https://underscore'");
        assert_eq!(server("r.io:5000"), "https://underscore/v2");
        write(&paths[0], "_default/hosts.toml", "server = 'https://any'");
        assert_eq!(server("r.io:5000"), "https://any/v2");
        assert_eq!(server("q.io"), "https://any/v2");
    }

    #[test]
    fn a_file_says_how_hosts_are_reached_in_its_order() {
        let folder = tempfile::tempdir().unwrap();
        for file in ["ca.pem", "a.pem", "b.cert", "b.key"] {
            write(folder.path(), &format!("r.io/{file}"), file);
        }
        let text = r#"
            capabilities = ["push"]
            ca = "ca.pem"
            header = { x-root = "1" }
            [host."https://z.io/cache/"]
              capabilities = ["pull", "Referrers"]
              ca = ["ca.pem", "a.pem"]
              client = [["b.cert", "b.key"], ["a.pem", ""]]
              dial_timeout = "1.5s"
              [host."https://z.io/cache/".header]
                x-one = "1"
                x-two = ["2", "3"]
            [host."http://a.io:5000/v2/up"]
              override_path = true
              client = "a.pem"
            [host."b.io/v2"]
              skip_verify = true
              client = ["a.pem"]
        "#;
        write(folder.path(), "r.io/hosts.toml", text);
        let hosts = load_one(folder.path(), "r.io").unwrap();
        assert_eq!(
            origins(&hosts),
            ["https://z.io/cache/v2", "https://a.io:5000/v2/up", "https://b.io/v2", "https://r.io/v2"]
        );
        let first = &hosts[0];
        assert_eq!(first.capabilities, Capabilities { pull: true, resolve: false, push: false });
        assert_eq!(first.tls.roots.len(), 2);
        let identities = &first.tls.identities;
        assert_eq!((identities[0].1.as_slice(), identities[0].2.as_slice()), (&b"b.cert"[..], &b"b.key"[..]));
        assert_eq!((identities[1].1.as_slice(), identities[1].2.as_slice()), (&b"a.pem"[..], &b"a.pem"[..]));
        assert_eq!(first.dial_timeout, Some(Duration::from_millis(1500)));
        assert_eq!(first.headers.get_all("x-two").iter().count(), 2);
        assert_eq!(first.namespace.as_deref(), Some("r.io"));
        assert!(hosts[1].fallback, "TLS settings for an http host");
        assert!(hosts[2].tls.skip_verify && !hosts[2].fallback);
        let own = &hosts[3];
        assert_eq!((own.capabilities, own.namespace.as_deref()), (Capabilities::ALL, None));
        assert!(own.headers.contains_key("x-root") && own.tls.roots.len() == 1);
    }

    #[test]
    fn a_folder_of_certificates_is_dockers() {
        let folder = tempfile::tempdir().unwrap();
        for file in ["one.crt", "two.crt", "me.cert", "me.key", "other.cert", "notes"] {
            write(folder.path(), &format!("r.io/{file}"), file);
        }
        let hosts = load_one(folder.path(), "r.io").unwrap();
        let tls = &hosts[0].tls;
        assert_eq!(
            (origins(&hosts).concat().as_str(), tls.roots.len(), tls.identities.len()),
            ("https://r.io/v2", 2, 2)
        );
        assert_eq!(tls.identities[0].2, b"me.key");
        assert_eq!(tls.identities[1].2, b"other.cert");
    }

    #[test]
    fn mistakes_are_named_with_their_file() {
        let folder = tempfile::tempdir().unwrap();
        for (text, words) in [
            ("server = ", "hosts.toml"),
            ("server = 'ftp://x'", "ftp"),
            ("server = 'https://u:p@x'", "user or password"),
            ("capabilities = ['fly']", "fly"),
            ("[host.'https://x']\nca = 5", "a text or a list"),
            ("[host.'https://x']\nclient = [['a', 'b', 'c']]", "list of 3"),
            ("[host.'https://x'.header]\n'a b' = 'c'", "header"),
            ("dial_timeout = 'soon'", "soon"),
            ("ca = 'missing.pem'", "missing.pem"),
        ] {
            write(folder.path(), "r.io/hosts.toml", text);
            let error = load_one(folder.path(), "r.io").err().expect(text).to_string();
            assert!(error.contains(words), "{text}: {error}");
        }
    }

    proptest! {
        #[test]
        fn no_file_upsets_the_parser(text in ".{0,200}") {
            let _ = parse(&text, Path::new("/x"));
        }

        #[test]
        fn hosts_keep_the_order_of_the_file(names in prop::collection::hash_set("[a-z]{1,8}", 1..8)) {
            let names: Vec<String> = names.into_iter().collect();
            let text: String = names.iter().map(|name| format!("[host.'https://{name}.io']\n")).collect();
            let sections = parse(&text, Path::new("/x")).unwrap();
            let found: Vec<String> = sections.iter().filter_map(|section| section.url.as_ref()).map(authority).collect();
            let wanted: Vec<String> = names.iter().map(|name| format!("{name}.io")).collect();
            prop_assert_eq!(found, wanted);
        }
    }
}
