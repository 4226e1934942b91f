//! Registries: where images come from and go to, by the OCI distribution protocol and Docker's.
//!
//! ```text
//!  resolver.rs   a tag or digest -> what it names          \
//!  fetcher.rs    blobs and manifests, from any byte on       >  each over the hosts of a repository, in turn
//!  pusher.rs     blobs and manifests, to the host           /
//!  request.rs    one request to one host: redirects, challenges, retries, limits
//!  auth.rs       challenges, credentials and the tokens they are traded for
//!  hosts.rs      which hosts serve a registry: hosts.toml, certificate folders, defaults
//!  client.rs     connections, by what TLS asks for
//!  retry.rs      whether, and when, something is tried again; pure
//! ```
//!
//! Invariants: credentials go to the host that asked for them alone, never along with a redirect. Nothing that a registry
//! answers is trusted: sizes and digests are checked by those who store it, every document has a limit, every wait an end.
//! No text that leaves here (errors, logs) holds a secret, or the query of an address, which may be one.

mod auth;
mod client;
mod fetcher;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod hosts;
mod pusher;
mod request;
mod resolver;
mod retry;
#[cfg(test)]
mod tests;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use async_trait::async_trait;
use oci::Reference;
use parking_lot::Mutex;
use tokio::sync::{OnceCell, Semaphore};

pub use fetcher::Body;
pub use pusher::{Pushed, Source};

use crate::error::Result;

/// Settings of all registries.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    /// Folders of `HOST/hosts.toml` files, the first that has a host counts.
    pub hosts_dirs: Vec<PathBuf>,
    /// How many layers of one transfer are fetched at a time.
    pub concurrent_downloads: usize,
    /// How many layers of one transfer are pushed at a time.
    pub concurrent_uploads: usize,
    /// How much of a layer is fetched by one of several requests at a time; 0 fetches each layer by one request.
    pub fetch_buffer: u64,
    /// The largest part of a blob that is pushed by one request, unless the host wants larger ones.
    pub upload_chunk: u64,
    /// How many requests to one host are under way at a time, in all transfers.
    pub requests_per_host: usize,
    /// Whether layers may be fetched from the addresses that an image names for them (`urls`). Any image could make the engine
    /// ask any address that this machine reaches, so it is not the default.
    pub foreign_layers: bool,
    /// How long, and how often.
    pub limits: Limits,
}

impl Default for Settings {
    fn default() -> Self {
        Settings {
            hosts_dirs: Vec::new(),
            concurrent_downloads: 3,
            concurrent_uploads: 3,
            fetch_buffer: 0,
            upload_chunk: 64 << 20,
            requests_per_host: 64,
            foreign_layers: false,
            limits: Limits::default(),
        }
    }
}

/// How long a host may take, and how often it is tried.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// For a connection, TLS included, unless its hosts.toml says another.
    pub connect: Duration,
    /// For the head of an answer.
    pub answer: Duration,
    /// For the answer to what a registry has to work for: the end of an upload.
    pub upload: Duration,
    /// Without a byte.
    pub idle: Duration,
    /// How often a request is tried.
    pub attempts: u32,
    /// How often a body that breaks without a byte is taken up again.
    pub resumptions: u32,
    /// The wait before the second attempt; it doubles with each.
    pub backoff: Duration,
    /// The longest wait between attempts, whatever Retry-After says.
    pub longest: Duration,
    /// How long a host that failed stands behind the others.
    pub unhealthy: Duration,
}

impl Default for Limits {
    fn default() -> Self {
        Limits {
            connect: Duration::from_secs(30),
            answer: Duration::from_secs(30),
            upload: Duration::from_secs(300),
            idle: Duration::from_secs(30),
            attempts: 5,
            resumptions: 8,
            backoff: Duration::from_millis(200),
            longest: Duration::from_secs(60),
            unhealthy: Duration::from_secs(60),
        }
    }
}

/// Takes lines of a log.
pub type Log = Arc<dyn Fn(&str) + Send + Sync>;

/// How to reach one repository, for one transfer.
#[derive(Clone)]
pub struct Access {
    /// The image, in full.
    pub reference: Reference,
    /// Added to each request to the registry: names and values.
    pub headers: Vec<(String, String)>,
    /// A folder of `HOST/hosts.toml` files instead of those of the settings.
    pub hosts_dir: Option<PathBuf>,
    /// `http` or `https` for hosts that no hosts.toml names; None is https, but for this machine itself http where a port
    /// does not talk TLS.
    pub scheme: Option<String>,
    /// Who has credentials; without, anonymous.
    pub credentials: Option<Arc<dyn Credentials>>,
    /// Who is told of each request and answer, without secrets.
    pub log: Option<Log>,
}

impl Access {
    /// The repository of a reference, by the settings alone and anonymously.
    pub fn anonymous(reference: Reference) -> Self {
        Access { reference, headers: Vec::new(), hosts_dir: None, scheme: None, credentials: None, log: None }
    }
}

/// Who has credentials for registries: the client of a transfer, or those that a request brought along.
#[async_trait]
pub trait Credentials: Send + Sync {
    /// Credentials for a host (with its port unless that is the scheme's own), which answered with these challenges.
    async fn ask(&self, host: &str, challenges: &[String]) -> Result<Credential>;
}

/// What a registry's host is shown. There is no Debug, so that it cannot be logged.
#[derive(Clone, PartialEq, Eq)]
pub enum Credential {
    /// Nothing.
    Anonymous,
    /// A user's name and password, shown as they are or traded for a token.
    Password {
        /// The user.
        username: String,
        /// The password.
        secret: String,
    },
    /// A refresh (identity) token, traded for an access token.
    Refresh(String),
    /// A whole value of the Authorization header.
    Header(String),
}

/// All registries; cheap to clone. Remembers tokens, and which hosts failed.
#[derive(Clone)]
pub struct Remotes {
    shared: Arc<Shared>,
}

/// What all repositories share.
struct Shared {
    settings: Settings,
    clients: client::Clients,
    tokens: auth::Tokens,
    /// Until when hosts, by scheme and authority, stand behind the others.
    unhealthy: Mutex<HashMap<String, Instant>>,
    /// The requests under way to hosts.
    gates: Mutex<HashMap<String, Arc<Semaphore>>>,
}

impl Remotes {
    /// Registries with these settings. Nothing is read or connected yet.
    pub fn new(settings: Settings) -> Result<Self> {
        Ok(Remotes {
            shared: Arc::new(Shared {
                settings,
                clients: client::Clients::default(),
                tokens: auth::Tokens::default(),
                unhealthy: Mutex::default(),
                gates: Mutex::default(),
            }),
        })
    }

    /// What they were made with.
    pub fn settings(&self) -> &Settings {
        &self.shared.settings
    }

    /// One repository of a registry, with its mirrors.
    pub fn repository(&self, access: Access) -> Result<Repository> {
        hosts::check_scheme(access.scheme.as_deref())?;
        let headers = request::header_map(&access.headers)?;
        Ok(Repository {
            inner: Arc::new(Inner {
                shared: self.shared.clone(),
                access,
                headers,
                hosts: OnceCell::new(),
                auth: auth::Authorizer::default(),
                plain: Mutex::default(),
            }),
        })
    }
}

impl Shared {
    /// Puts a host behind the others for a while.
    fn failed(&self, origin: &str) {
        let now = Instant::now();
        let mut unhealthy = self.unhealthy.lock();
        unhealthy.retain(|_, until| *until > now);
        unhealthy.insert(origin.to_owned(), now + self.settings.limits.unhealthy);
    }

    fn recovered(&self, origin: &str) {
        self.unhealthy.lock().remove(origin);
    }

    fn is_unhealthy(&self, origin: &str) -> bool {
        self.unhealthy.lock().get(origin).is_some_and(|until| *until > Instant::now())
    }

    fn gate(&self, origin: &str) -> Arc<Semaphore> {
        let mut gates = self.gates.lock();
        if gates.len() > 64 {
            // Those that nobody passes.
            gates.retain(|_, gate| Arc::strong_count(gate) > 1);
        }
        let permits = self.settings.requests_per_host.max(1);
        gates.entry(origin.to_owned()).or_insert_with(|| Arc::new(Semaphore::new(permits))).clone()
    }
}

/// One repository, to be read from or written to; cheap to clone.
#[derive(Clone)]
pub struct Repository {
    inner: Arc<Inner>,
}

struct Inner {
    shared: Arc<Shared>,
    access: Access,
    /// Those of the access.
    headers: http::HeaderMap,
    /// Read at the first request, so that each transfer sees the files as they are.
    hosts: OnceCell<Arc<[hosts::Host]>>,
    auth: auth::Authorizer,
    /// Hosts that were tried with TLS first and did not talk it.
    plain: Mutex<std::collections::HashSet<String>>,
}

impl Repository {
    /// The reference it was made with.
    pub fn reference(&self) -> &Reference {
        &self.inner.access.reference
    }

    /// What the label that tells a blob's source is called: `containerd.io/distribution.source.HOST`.
    pub fn source_label(&self) -> String {
        format!("containerd.io/distribution.source.{}", self.reference().domain())
    }
}
