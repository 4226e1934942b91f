//! One registry for one transfer: what the flags say of it, as the Transfer protocol has it.
//!
//! The protocol knows no certificates: where flags name some, ctr writes a folder with a hosts.toml for the engine, which lives
//! as long as the transfer. Credentials go over a stream, when the engine asks for them.

use std::fmt::Write as _;
use std::io;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;
use oci::Reference;
use proto::any;
use proto::containerd::types::transfer::{
    AuthRequest, AuthResponse, AuthType, HttpDebug, OciRegistry, RegistryResolver,
};
use tempfile::TempDir;
use tokio::task::JoinHandle;

use crate::client::Client;
use crate::credentials::{Credential, Keeper, of_user};
use crate::streams::Stream;

/// How long the last of a log may take.
const LAST: Duration = Duration::from_secs(2);

/// Flags of all commands that talk to a registry.
#[derive(Debug, Args)]
#[command(next_help_heading = "Registry")]
pub(crate) struct Flags {
    /// Take any certificate of the registry; anyone in between can read and change what comes
    #[arg(short = 'k', long)]
    skip_verify: bool,
    /// Use http for a registry that no hosts.toml names
    #[arg(long)]
    plain_http: bool,
    /// Who to be for the image's registry; asked for the secret on the terminal when there is none. Others on this machine can see
    /// a secret that stands here. Without it docker's config.json is looked into
    #[arg(short, long, value_name = "NAME[:SECRET]")]
    user: Option<String>,
    /// A refresh token for the image's registry
    #[arg(long, value_name = "TOKEN", conflicts_with = "user")]
    refresh: Option<String>,
    /// Folder of HOST/hosts.toml files, on the engine's machine, instead of those that its configuration names
    #[arg(long, value_name = "FOLDER", conflicts_with_all = ["skip_verify", "tlscacert", "tlscert", "tlskey"])]
    hosts_dir: Option<PathBuf>,
    /// Certificates of the authorities that the registry's certificate may be from
    #[arg(long, value_name = "FILE")]
    tlscacert: Option<PathBuf>,
    /// Our own certificate for the registry
    #[arg(long, value_name = "FILE", requires = "tlskey")]
    tlscert: Option<PathBuf>,
    /// The key of it
    #[arg(long, value_name = "FILE", requires = "tlscert")]
    tlskey: Option<PathBuf>,
    /// Show requests and answers with their headers, without credentials, on stderr
    #[arg(long)]
    http_dump: bool,
    /// Show the steps of connections on stderr
    #[arg(long)]
    http_trace: bool,
}

/// A registry, ready to be named in a transfer, and what has to be there while that lasts.
pub(crate) struct Registry {
    pub(crate) wire: OciRegistry,
    logs: Option<JoinHandle<()>>,
    _folder: Option<TempDir>,
}

impl Registry {
    /// Sees the last of the log off, when the transfer is over.
    pub(crate) async fn finish(self) {
        if let Some(logs) = self.logs {
            let _ = tokio::time::timeout(LAST, logs).await;
        }
    }
}

/// A reference in full, by docker's rules for short ones; says what was taken when that is not what was typed.
pub(crate) fn reference(text: &str) -> anyhow::Result<Reference> {
    let reference = Reference::parse_normalized(text).with_context(|| {
        format!("{text:?} names no image; write HOST/PATH:TAG, as docker.io/library/busybox:latest")
    })?;
    // A digest needs no tag.
    let reference = if reference.digest().is_some() { reference } else { reference.with_default_tag() };
    if reference.to_string() != text {
        eprintln!("ctr: {text} is taken as {reference}");
    }
    Ok(reference)
}

impl Flags {
    /// Opens the streams that the transfer of an image at this registry needs.
    pub(crate) async fn open(self, client: &Client, reference: &Reference) -> anyhow::Result<Registry> {
        let given = match (self.user.clone(), self.refresh.clone()) {
            (Some(user), _) => Some(tokio::task::spawn_blocking(move || of_user(&user)).await??),
            (None, Some(token)) => Some(Credential::Refresh(token)),
            (None, None) => None,
        };
        let keeper = Keeper::new(reference.domain(), given);
        let auth = Stream::open(client, "auth").await?;
        let mut resolver = RegistryResolver {
            auth_stream: auth.id.clone(),
            default_scheme: if self.plain_http { "http".into() } else { String::new() },
            ..RegistryResolver::default()
        };
        tokio::spawn(answer(auth, keeper));
        let mut task = None;
        let debug = match (self.http_dump, self.http_trace) {
            (false, false) => HttpDebug::Disabled,
            (true, false) => HttpDebug::Debug,
            (false, true) => HttpDebug::Trace,
            (true, true) => HttpDebug::Both,
        };
        if debug != HttpDebug::Disabled {
            let logs = Stream::open(client, "http").await?;
            resolver.http_debug = debug.into();
            resolver.logs_stream.clone_from(&logs.id);
            task = Some(tokio::spawn(async move {
                // Nobody reads stderr any more: then nobody misses it.
                let _ = logs.receive_all(io::stderr(), |_| {}).await;
            }));
        }
        // The last: it is removed on every way from here on.
        let folder = self.folder(reference)?;
        let host_dir = match (&folder, &self.hosts_dir) {
            (Some(folder), _) => folder.path().to_owned(),
            (None, Some(given)) => std::path::absolute(given)?,
            (None, None) => PathBuf::new(),
        };
        let text = |path: std::ffi::OsString| anyhow::anyhow!("{path:?} is not UTF-8");
        resolver.host_dir = host_dir.into_os_string().into_string().map_err(text)?;
        let wire = OciRegistry { reference: reference.to_string(), resolver: Some(resolver) };
        Ok(Registry { wire, logs: task, _folder: folder })
    }

    /// A folder with a hosts.toml for the registry, when flags say what no other message can.
    fn folder(&self, reference: &Reference) -> anyhow::Result<Option<TempDir>> {
        if !self.skip_verify && self.tlscacert.is_none() && self.tlscert.is_none() {
            return Ok(None);
        }
        let folder = tempfile::Builder::new()
            .prefix("ctr-hosts-")
            .tempdir()
            .context("cannot make a folder for hosts.toml")?;
        // The engine reads it before the transfer's first request, the keys with it.
        let host = folder.path().join(reference.domain());
        std::fs::DirBuilder::new().mode(0o700).create(&host)?;
        let mut text = format!("server = \"{}\"\n", self.server(reference.domain()));
        if self.skip_verify {
            text.push_str("skip_verify = true\n");
        }
        if let Some(authorities) = &self.tlscacert {
            let path = copy(authorities, &host.join("ca.crt"))?;
            let _ = writeln!(text, "ca = {}", quoted(&path)?);
        }
        if let (Some(certificate), Some(key)) = (&self.tlscert, &self.tlskey) {
            let certificate = copy(certificate, &host.join("client.cert"))?;
            let key = copy(key, &host.join("client.key"))?;
            let _ = writeln!(text, "client = [[{}, {}]]", quoted(&certificate)?, quoted(&key)?);
        }
        std::fs::write(host.join("hosts.toml"), text)?;
        Ok(Some(folder))
    }

    /// Where the registry of this name is.
    fn server(&self, domain: &str) -> String {
        let host = if domain == oci::reference::DEFAULT_DOMAIN { "registry-1.docker.io" } else { domain };
        // Flags about certificates mean https, for this machine itself, too.
        format!("{}://{host}", if self.plain_http { "http" } else { "https" })
    }
}

/// Copies a small file for the engine, and for nobody else.
fn copy(from: &Path, to: &Path) -> anyhow::Result<PathBuf> {
    const LIMIT: u64 = 4 << 20;
    let what = || format!("cannot read {}", from.display());
    let mut source = std::fs::File::open(from).with_context(what)?;
    ensure!(source.metadata().with_context(what)?.is_file(), "{}: it is not a file", what());
    let mut target = std::fs::File::options().write(true).create_new(true).mode(0o600).open(to)?;
    let copied = io::copy(&mut io::Read::take(&mut source, LIMIT), &mut target).with_context(what)?;
    if copied == LIMIT {
        bail!("{}: it is too large for a certificate or a key", what());
    }
    Ok(to.to_owned())
}

/// A path as a string of TOML; these are our own and have nothing to be escaped but what the temporary folder's has.
fn quoted(path: &Path) -> anyhow::Result<String> {
    let text = path.to_str().with_context(|| format!("{} is not UTF-8", path.display()))?;
    Ok(serde_json::to_string(text)?)
}

/// Answers for as long as the engine asks.
async fn answer(mut stream: Stream, keeper: Keeper) {
    while let Some(message) = stream.message().await {
        let Ok(request) = any::unpack::<AuthRequest>(&message) else { continue };
        let credential = keeper.ask(&request.host).await.unwrap_or_else(|error| {
            eprintln!("ctr: going on without credentials for {}: {error:#}", request.host);
            Credential::Anonymous
        });
        let mut response = AuthResponse::default();
        match credential {
            Credential::Anonymous => response.set_auth_type(AuthType::None),
            Credential::Password { username, secret } => {
                response.set_auth_type(AuthType::Credentials);
                (response.username, response.secret) = (username, secret);
            }
            Credential::Refresh(token) => {
                response.set_auth_type(AuthType::Refresh);
                response.secret = token;
            }
            Credential::Bearer(token) => {
                response.set_auth_type(AuthType::Header);
                response.secret = format!("Bearer {token}");
            }
        }
        if !stream.send(any::pack(&response)).await {
            return;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;
    use std::os::unix::fs::PermissionsExt as _;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        flags: Flags,
    }

    fn flags(line: &str) -> Flags {
        Line::try_parse_from(format!("ctr {line}").split_whitespace()).unwrap().flags
    }

    #[test]
    fn certificates_go_to_a_folder_that_is_gone_afterwards() {
        let files = tempfile::tempdir().unwrap();
        for name in ["ca", "cert", "key"] {
            std::fs::write(files.path().join(name), name).unwrap();
        }
        let at = files.path().display();
        let flags = flags(&format!("--tlscacert {at}/ca --tlscert {at}/cert --tlskey {at}/key -k"));
        let folder = flags.folder(&reference("r.example:5000/x:1").unwrap()).unwrap().unwrap();
        let host = folder.path().join("r.example:5000");
        let text = std::fs::read_to_string(host.join("hosts.toml")).unwrap();
        assert!(
            text.starts_with("server = \"https://r.example:5000\"\nskip_verify = true\nca = \""),
            "{text}"
        );
        assert!(text.contains("client = [[\""), "{text}");
        assert_eq!(std::fs::read(host.join("client.key")).unwrap(), b"key");
        let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!((mode(&host), mode(&host.join("client.key"))), (0o700, 0o600));
        drop(folder);
        assert!(!host.exists());
    }

    #[test]
    fn most_transfers_need_no_folder() {
        let image = reference("docker.io/library/x:1").unwrap();
        assert!(flags("--plain-http --user a:b").folder(&image).unwrap().is_none());
        let error = flags("--tlscacert /nonexistent").folder(&image).unwrap_err();
        assert!(format!("{error:#}").contains("/nonexistent"));
        assert_eq!(flags("-k").server("docker.io"), "https://registry-1.docker.io");
        for bad in ["--tlscert x", "--hosts-dir x -k", "--user a --refresh b"] {
            assert!(Line::try_parse_from(format!("ctr {bad}").split_whitespace()).is_err(), "{bad}");
        }
    }

    #[test]
    fn short_names_are_dockers() {
        for (text, full) in [
            ("busybox", "docker.io/library/busybox:latest"),
            ("a/b:1", "docker.io/a/b:1"),
            ("localhost:5000/x", "localhost:5000/x:latest"),
            ("r.example/x:1", "r.example/x:1"),
        ] {
            assert_eq!(reference(text).unwrap().to_string(), full);
        }
        assert!(reference("Not An Image").unwrap_err().to_string().contains("Not An Image"));
    }
}
