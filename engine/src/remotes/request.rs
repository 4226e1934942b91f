//! One request to one host of a repository, as often as it makes sense.
//!
//! ```text
//!  ask:  send --> answer                         408, 429: again here, after Retry-After
//!          |  \--> 401: auth, once more           5xx, no connection: again if this is the last host, else the next
//!          \-----> 3xx of GET and HEAD: follow
//! ```
//!
//! Invariants: what a host is shown (Authorization, headers of its hosts.toml and of the transfer, client certificates) does
//! not follow a redirect to another scheme, host or port, nor does it come back from there. No redirect leads from https
//! to http. There are at most [`REDIRECTS`], no address twice.

use std::collections::HashSet;
use std::fs::File;
use std::os::unix::fs::FileExt as _;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http::header::{
    ACCEPT_ENCODING, AUTHORIZATION, CONTENT_LENGTH, CONTENT_TYPE, LOCATION, RETRY_AFTER, WWW_AUTHENTICATE,
};
use http::{HeaderMap, HeaderName, HeaderValue, Method};
use reqwest::{Client, Response, StatusCode, Url};
use tokio::sync::OwnedSemaphorePermit;

use super::hosts::{self, Host, authority, is_loopback};
use super::retry::{Advice, advice, jitter, retry_after, wait};
use super::{Inner, Repository};
use crate::error::{Error, Result, blocking};

/// The most redirects that are followed.
const REDIRECTS: usize = 10;
/// How often a request is sent again because of 401.
const CHALLENGES: usize = 2;
/// The longest a host other than the last is waited for.
const PATIENCE: Duration = Duration::from_secs(2);
/// How much of an error's text is read.
const FAULT_LIMIT: usize = 16 << 10;
/// How much of it is told.
const TOLD: usize = 400;
/// Bytes of a file that are sent at a time.
const CHUNK: usize = 256 << 10;

/// Why a host did not do what was asked.
#[derive(Debug, Clone)]
pub(super) struct Failure {
    pub(super) kind: Kind,
    /// Says which host, what was asked, and why not.
    pub(super) error: Error,
}

/// What can be done about it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Kind {
    /// The connection could not be made, broke or stood still: again, or another host.
    Broken,
    /// The host answered, and that is final.
    Status(StatusCode),
    /// Not without other credentials.
    Denied,
    /// The answer, or the host's settings, make no sense: another host.
    Wrong,
}

impl Failure {
    pub(super) fn broken(message: String) -> Self {
        Failure { kind: Kind::Broken, error: Error::unavailable(message) }
    }

    pub(super) fn wrong(message: String) -> Self {
        Failure { kind: Kind::Wrong, error: Error::unknown(message) }
    }

    pub(super) fn denied(message: String) -> Self {
        Failure { kind: Kind::Denied, error: Error::permission_denied(message) }
    }

    fn settings(error: Error) -> Self {
        Failure { kind: Kind::Wrong, error }
    }

    pub(super) fn is_missing(&self) -> bool {
        self.kind == Kind::Status(StatusCode::NOT_FOUND)
    }
}

/// What is asked of a host.
pub(super) struct Ask {
    pub(super) method: Method,
    pub(super) to: To,
    pub(super) headers: HeaderMap,
    /// What a token must allow.
    pub(super) scopes: Vec<String>,
    pub(super) body: Payload,
    /// How long the answer may take, where the usual limit is too short.
    pub(super) patience: Option<Duration>,
    /// Not a request to the registry: whoever answers is not shown who we are.
    pub(super) stranger: bool,
}

/// Where a request goes.
#[derive(Clone)]
pub(super) enum To {
    /// Beneath the repository.
    Path(String),
    /// To an address that the host gave. Another host's is not shown anything.
    Url(Url),
}

/// What is sent along.
#[derive(Clone)]
pub(super) enum Payload {
    Nothing,
    Bytes(Bytes),
    /// A part of a file, read as it is sent.
    File(Part),
}

/// A part of a blob's file.
#[derive(Clone)]
pub(super) struct Part {
    pub(super) file: Arc<File>,
    pub(super) offset: u64,
    pub(super) length: u64,
    /// How many bytes have been given to the connection, in all attempts together.
    pub(super) sent: Arc<AtomicU64>,
}

impl Part {
    fn body(&self) -> reqwest::Body {
        let part = self.clone();
        reqwest::Body::wrap_stream(futures::stream::try_unfold(0_u64, move |at| {
            let part = part.clone();
            async move {
                if at >= part.length {
                    return Ok::<_, Error>(None);
                }
                let bytes = blocking(move || {
                    let mut bytes = vec![0; CHUNK.min((part.length - at) as usize)];
                    part.file
                        .read_exact_at(&mut bytes, part.offset + at)
                        .map_err(|error| Error::unknown(format!("read a blob to push it: {error}")))?;
                    part.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                    Ok(Bytes::from(bytes))
                })
                .await?;
                let next = at + bytes.len() as u64;
                Ok(Some((bytes, next)))
            }
        }))
    }
}

impl Ask {
    pub(super) fn new(method: Method, path: String, scopes: Vec<String>) -> Self {
        Ask {
            method,
            to: To::Path(path),
            headers: HeaderMap::new(),
            scopes,
            body: Payload::Nothing,
            patience: None,
            stranger: false,
        }
    }

    pub(super) fn header(mut self, name: HeaderName, value: &str) -> Self {
        if let Ok(value) = HeaderValue::from_str(value) {
            self.headers.insert(name, value);
        }
        self
    }
}

/// An answer, with the right to be under way.
pub(super) struct Answer {
    pub(super) response: Response,
    pub(super) permit: OwnedSemaphorePermit,
}

/// Headers as HTTP has them.
pub(super) fn header_map(headers: &[(String, String)]) -> Result<HeaderMap> {
    let mut map = HeaderMap::new();
    for (name, value) in headers {
        let parsed = (HeaderName::try_from(name.as_str()), HeaderValue::try_from(value.as_str()));
        let (Ok(parsed_name), Ok(mut value)) = parsed else {
            return Err(Error::invalid_argument(format!(
                "header {name:?}: its name or its value cannot be sent over HTTP"
            )));
        };
        value.set_sensitive(true);
        map.append(parsed_name, value);
    }
    Ok(map)
}

/// An address as it may be told: without user, query and fragment, which may be secrets.
pub(super) fn shown(url: &Url) -> String {
    format!("{}://{}{}", url.scheme(), authority(url), url.path())
}

/// Whether two addresses are of the same scheme, host and port.
pub(super) fn same_origin(one: &Url, other: &Url) -> bool {
    one.scheme() == other.scheme()
        && one.host_str() == other.host_str()
        && one.port_or_known_default() == other.port_or_known_default()
}

/// Where an answer's Location leads; the error says why it is not followed.
pub(super) fn redirect(from: &Url, location: &str) -> Result<Url, String> {
    let mut to = from.join(location).map_err(|error| format!("redirects to what is no address: {error}"))?;
    if !matches!(to.scheme(), "http" | "https") || to.host_str().is_none() {
        return Err(format!(
            "redirects to an address of the scheme {:?}, which is not followed",
            to.scheme()
        ));
    }
    if from.scheme() == "https" && to.scheme() == "http" {
        return Err(format!("redirects from https to {}, which is not followed", shown(&to)));
    }
    let _ = to.set_username("");
    let _ = to.set_password(None);
    to.set_fragment(None);
    Ok(to)
}

/// What went wrong with a connection, innermost.
fn reason(error: reqwest::Error) -> String {
    let error = error.without_url();
    let mut cause: &dyn std::error::Error = &error;
    while let Some(source) = cause.source() {
        cause = source;
    }
    cause.to_string()
}

fn tls_error<'a>(error: &'a (dyn std::error::Error + 'static)) -> Option<&'a rustls::Error> {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(found) = error.downcast_ref::<rustls::Error>() {
            return Some(found);
        }
        if let Some(found) = error.downcast_ref::<std::io::Error>().and_then(std::io::Error::get_ref)
            && let Some(found) = tls_error(found)
        {
            return Some(found);
        }
        cause = error.source();
    }
    None
}

/// Reads what an answer holds, if it is no more than `limit`; None if it is more.
pub(super) async fn read_limited(
    response: &mut Response,
    limit: usize,
    idle: Duration,
) -> Result<Option<Vec<u8>>, String> {
    if response.content_length().is_some_and(|length| length > limit as u64) {
        return Ok(None);
    }
    let mut bytes = Vec::new();
    loop {
        match tokio::time::timeout(idle, response.chunk()).await {
            Err(_) => return Err(format!("sent nothing for {idle:?}")),
            Ok(Err(error)) => return Err(reason(error)),
            Ok(Ok(None)) => return Ok(Some(bytes)),
            Ok(Ok(Some(chunk))) if bytes.len() + chunk.len() > limit => {
                drop(chunk);
                return Ok(None);
            }
            Ok(Ok(Some(chunk))) => bytes.extend_from_slice(&chunk),
        }
    }
}

/// Whether an answer is a page for people.
pub(super) fn is_html(headers: &HeaderMap) -> bool {
    let kind = headers.get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).unwrap_or_default();
    kind.trim_start().to_ascii_lowercase().starts_with("text/html")
}

/// Text of a registry, as it may stand in an error: one line, not too long.
fn told(text: &str) -> String {
    let clean: String =
        text.chars().map(|c| if c.is_control() { ' ' } else { c }).take(TOLD).collect::<String>();
    clean.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// What a registry's error document says.
fn complaint(bytes: &[u8]) -> Option<String> {
    #[derive(serde::Deserialize)]
    struct Document {
        errors: Vec<Entry>,
    }
    #[derive(serde::Deserialize)]
    struct Entry {
        #[serde(default)]
        code: String,
        #[serde(default)]
        message: String,
    }
    let document: Document = serde_json::from_slice(bytes).ok()?;
    let texts: Vec<String> = document
        .errors
        .iter()
        .take(3)
        .map(|entry| match (entry.code.as_str(), entry.message.as_str()) {
            (code, "") => told(code),
            ("", message) => told(message),
            (code, message) => format!("{}: {}", told(code), told(message)),
        })
        .filter(|text| !text.is_empty())
        .collect();
    (!texts.is_empty()).then(|| texts.join("; "))
}

impl Inner {
    /// The hosts of the repository, read at the first call.
    async fn all_hosts(&self) -> Result<Arc<[Host]>> {
        let load = async || {
            let folders = match &self.access.hosts_dir {
                Some(folder) => vec![folder.clone()],
                None => self.shared.settings.hosts_dirs.clone(),
            };
            let registry = self.access.reference.domain().to_owned();
            let scheme = self.access.scheme.clone();
            let hosts = blocking(move || hosts::load(&folders, &registry, scheme.as_deref())).await?;
            Ok::<_, Error>(Arc::from(hosts))
        };
        self.hosts.get_or_try_init(load).await.cloned()
    }

    /// Those that can do something, as configured.
    pub(super) async fn able_hosts(&self, can: impl Fn(&Host) -> bool, what: &str) -> Result<Vec<Host>> {
        let all = self.all_hosts().await?;
        let able: Vec<Host> = all.iter().filter(|host| can(host)).cloned().collect();
        if able.is_empty() {
            return Err(Error::not_found(format!(
                "{what} {}: no host of {} may be asked for it; add the capability to a host of its hosts.toml",
                self.access.reference,
                self.access.reference.domain()
            )));
        }
        Ok(able)
    }

    /// Those that can do something, in the order to ask them: as configured, but those that failed lately last. The bool says
    /// whether a host is the one whose word counts most: the last as configured, the registry itself.
    pub(super) async fn hosts(&self, can: impl Fn(&Host) -> bool, what: &str) -> Result<Vec<(Host, bool)>> {
        let able = self.able_hosts(can, what).await?;
        let count = able.len();
        let able = able.into_iter().enumerate().map(|(at, host)| (host, at + 1 == count));
        let (mut order, late): (Vec<_>, Vec<_>) =
            able.partition(|(host, _)| !self.shared.is_unhealthy(&host.origin()));
        order.extend(late);
        Ok(order)
    }

    /// Asks a host, again and again within limits. `last` says that there is no other host to ask.
    pub(super) async fn ask(&self, host: &Host, ask: &Ask, last: bool) -> Result<Answer, Failure> {
        let limits = &self.shared.settings.limits;
        let attempts = if last { limits.attempts.max(1) } else { 2 };
        let origin = host.origin();
        let mut number = 1;
        loop {
            let permit = self.permit(&origin).await?;
            let outcome = self.once(host, ask).await;
            let (again, asked) = match &outcome {
                Ok(response) => {
                    let asked = response
                        .headers()
                        .get(RETRY_AFTER)
                        .and_then(|value| retry_after(value.to_str().ok()?, SystemTime::now()));
                    match advice(response.status()) {
                        Advice::Final => (false, None),
                        Advice::Busy => (last || asked.is_none_or(|asked| asked <= PATIENCE), asked),
                        Advice::Trouble => (last, asked),
                    }
                }
                Err(failure) => (last && failure.kind == Kind::Broken, None),
            };
            if !again || number >= attempts {
                match &outcome {
                    Ok(response) if advice(response.status()) == Advice::Final => {
                        self.shared.recovered(&origin);
                    }
                    Err(failure) if failure.kind != Kind::Broken => {}
                    _ => self.shared.failed(&origin),
                }
                return outcome.map(|response| Answer { response, permit });
            }
            drop((outcome, permit));
            tokio::time::sleep(wait(limits, number, asked, jitter())).await;
            number += 1;
        }
    }

    /// Asks a host once, but for challenges: for what cannot be sent again as it is.
    pub(super) async fn ask_once(&self, host: &Host, ask: &Ask) -> Result<Answer, Failure> {
        let permit = self.permit(&host.origin()).await?;
        self.once(host, ask).await.map(|response| Answer { response, permit })
    }

    /// The right to be under way to a host.
    async fn permit(&self, origin: &str) -> Result<OwnedSemaphorePermit, Failure> {
        self.shared
            .gate(origin)
            .acquire_owned()
            .await
            .map_err(|_| Failure::settings(Error::internal("the gate of a host is closed")))
    }

    /// Asks a host once, but for challenges.
    pub(super) async fn once(&self, host: &Host, ask: &Ask) -> Result<Response, Failure> {
        let mut challenged = 0;
        loop {
            let authorization =
                if ask.stranger { None } else { self.authorization(host, &ask.scopes).await? };
            let (response, own) = self.follow(host, ask, authorization.as_ref()).await?;
            if response.status() != StatusCode::UNAUTHORIZED || !own || challenged == CHALLENGES {
                return Ok(response);
            }
            let challenges: Vec<String> = response
                .headers()
                .get_all(WWW_AUTHENTICATE)
                .iter()
                .filter_map(|value| value.to_str().ok().map(str::to_owned))
                .collect();
            drop(response);
            self.challenged(host, &challenges, authorization.as_ref()).await?;
            challenged += 1;
        }
    }

    /// The address of a path beneath the repository.
    fn url(&self, host: &Host, path: &str) -> Result<Url, Failure> {
        let scheme = if host.fallback && self.plain.lock().contains(&host.authority) {
            "http"
        } else {
            host.scheme.as_str()
        };
        let text =
            format!("{scheme}://{}{}/{}/{path}", host.authority, host.path, self.access.reference.path());
        let mut url: Url = text.parse().map_err(|error| {
            Failure::settings(Error::invalid_argument(format!("{text:?} is not an address: {error}")))
        })?;
        if let Some(namespace) = &host.namespace {
            url.query_pairs_mut().append_pair("ns", namespace);
        }
        Ok(url)
    }

    /// Sends a request and follows where it is sent on to. Whether the answer is the host's own comes along.
    async fn follow(
        &self,
        host: &Host,
        ask: &Ask,
        authorization: Option<&HeaderValue>,
    ) -> Result<(Response, bool), Failure> {
        let base = self.url(host, "")?;
        let mut url = match &ask.to {
            To::Path(path) => self.url(host, path)?,
            To::Url(url) => url.clone(),
        };
        let mut own = !ask.stranger && same_origin(&base, &url);
        let mut seen = HashSet::new();
        loop {
            if seen.len() > REDIRECTS {
                return Err(self.nonsense(host, ask, &format!("redirects more than {REDIRECTS} times")));
            }
            if !seen.insert(url.clone()) {
                return Err(self.nonsense(host, ask, "redirects in a circle"));
            }
            let response = match self.send(host, ask, &url, own, authorization).await {
                Err(Hop::Plain) => {
                    tracing::debug!(host = host.authority, "the port does not talk TLS: going on with http");
                    self.plain.lock().insert(host.authority.clone());
                    seen.remove(&url);
                    let _ = url.set_scheme("http");
                    continue;
                }
                Err(Hop::Failed(failure)) => return Err(failure),
                Ok(response) => response,
            };
            let follows = matches!(response.status().as_u16(), 301 | 302 | 303 | 307 | 308);
            let may = matches!(ask.method, Method::GET | Method::HEAD);
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let (true, true, Some(location)) = (follows, may, location) else { return Ok((response, own)) };
            let next = redirect(&url, location).map_err(|why| self.nonsense(host, ask, &why))?;
            // Once away, never back: what answers there could lead us anywhere.
            own = own && same_origin(&url, &next);
            self.log(|| format!("redirect to {}", shown(&next)));
            url = next;
        }
    }

    /// A failure of a host that does not make sense.
    pub(super) fn nonsense(&self, host: &Host, ask: &Ask, why: &str) -> Failure {
        Failure::wrong(format!("{} {}: {why}", ask.method, self.name(host, ask)))
    }

    /// What a request is about, for people.
    pub(super) fn name(&self, host: &Host, ask: &Ask) -> String {
        match &ask.to {
            To::Path(path) => self.url(host, path).map_or_else(|_| host.origin(), |url| shown(&url)),
            To::Url(url) => shown(url),
        }
    }

    /// A client for a host, or for where it sends us to.
    pub(super) fn client(&self, host: &Host, own: bool, to: &Url) -> Result<Client, Failure> {
        let connect = host.dial_timeout.unwrap_or(self.shared.settings.limits.connect);
        let proxied = !is_loopback(&authority(to));
        let client = if own {
            self.shared.clients.get(&host.tls, connect, proxied)
        } else {
            self.shared.clients.get(&host.tls.foreign(), connect, proxied)
        };
        client.map_err(|error| Failure::settings(error.context(host.authority.as_str())))
    }

    /// One message, and the head of its answer.
    async fn send(
        &self,
        host: &Host,
        ask: &Ask,
        url: &Url,
        own: bool,
        authorization: Option<&HeaderValue>,
    ) -> Result<Response, Hop> {
        let client = self.client(host, own, url)?;
        let mut headers = ask.headers.clone();
        // Bytes are wanted as their digest has them.
        headers.entry(ACCEPT_ENCODING).or_insert(HeaderValue::from_static("identity"));
        if own {
            for (name, value) in self.headers.iter().chain(&host.headers) {
                headers.append(name, value.clone());
            }
            if let Some(authorization) = authorization {
                headers.insert(AUTHORIZATION, authorization.clone());
            }
        }
        self.log(|| {
            let names: Vec<&str> = headers.keys().map(HeaderName::as_str).collect();
            format!("{} {} with {}", ask.method, shown(url), names.join(", "))
        });
        let mut request = client.request(ask.method.clone(), url.clone());
        let mut sent = None;
        match &ask.body {
            Payload::Nothing => {
                // Some registries want to be told that there is nothing.
                if matches!(ask.method, Method::POST | Method::PUT | Method::PATCH) {
                    headers.insert(CONTENT_LENGTH, HeaderValue::from_static("0"));
                }
            }
            Payload::Bytes(bytes) => request = request.body(bytes.clone()),
            Payload::File(part) => {
                headers.insert(CONTENT_LENGTH, HeaderValue::from(part.length));
                sent = Some(part.sent.clone());
                request = request.body(part.body());
            }
        }
        let limits = &self.shared.settings.limits;
        let answer = ask.patience.unwrap_or(limits.answer);
        let outcome = patiently(request.headers(headers).send(), sent.as_deref(), limits.idle, answer).await;
        let what = || format!("{} {}", ask.method, shown(url));
        let response = match outcome {
            Err(limit) => {
                self.log(|| "no answer".to_owned());
                return Err(Failure::broken(format!(
                    "{}: no answer within {limit:?}; is the host in trouble?",
                    what()
                ))
                .into());
            }
            Ok(Err(error)) => {
                if let Some(tls) = tls_error(&error) {
                    if host.fallback && own && matches!(tls, rustls::Error::InvalidMessage(_)) {
                        return Err(Hop::Plain);
                    }
                    let advice = match tls {
                        rustls::Error::InvalidCertificate(_) => {
                            "; name its authority by `ca` in its hosts.toml"
                        }
                        rustls::Error::InvalidMessage(_) => "; does the host talk http alone?",
                        _ => "",
                    };
                    return Err(Failure::wrong(format!("{}: TLS: {tls}{advice}", what())).into());
                }
                let doing = if error.is_connect() { "cannot connect: " } else { "" };
                return Err(Failure::broken(format!("{}: {doing}{}", what(), reason(error))).into());
            }
            Ok(Ok(response)) => response,
        };
        tracing::debug!(method = %ask.method, url = shown(url), status = %response.status(), "registry");
        self.log(|| {
            let kind = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok());
            format!(
                "answer {}, {} bytes of {}",
                response.status(),
                response.content_length().map_or_else(|| "some".into(), |length| length.to_string()),
                kind.unwrap_or("no type")
            )
        });
        Ok(response)
    }

    fn log(&self, text: impl FnOnce() -> String) {
        if let Some(log) = &self.access.log {
            log(&text());
        }
    }

    /// The failure that an answer is which is not what was asked for.
    pub(super) async fn fault(&self, host: &Host, ask: &Ask, mut response: Response) -> Failure {
        let status = response.status();
        let idle = self.shared.settings.limits.idle;
        let text = if is_html(response.headers()) {
            "with an HTML page: is this the address of a registry?".to_owned()
        } else {
            let bytes = read_limited(&mut response, FAULT_LIMIT, idle).await;
            let bytes = bytes.ok().flatten().unwrap_or_default();
            complaint(&bytes).unwrap_or_else(|| told(&String::from_utf8_lossy(&bytes)))
        };
        let separator = if text.is_empty() { "" } else { ": " };
        let message = format!("{} {} answered {status}{separator}{text}", ask.method, self.name(host, ask));
        let error = match status.as_u16() {
            401 => Error::permission_denied(format!(
                "{message}; it wants credentials, or others than it was given"
            )),
            403 => Error::permission_denied(message),
            404 => Error::not_found(message),
            429 => Error::unavailable(format!("{message}; the host limits requests: try again later")),
            408 | 500..=599 => Error::unavailable(message),
            _ => Error::unknown(message),
        };
        Failure {
            kind: if status == StatusCode::UNAUTHORIZED { Kind::Denied } else { Kind::Status(status) },
            error,
        }
    }
}

/// Why a message got no answer.
enum Hop {
    /// The port does not talk TLS, and need not.
    Plain,
    Failed(Failure),
}

impl From<Failure> for Hop {
    fn from(failure: Failure) -> Self {
        Hop::Failed(failure)
    }
}

/// Waits for an answer: as long as bytes of the request go out, and then within a limit, which is the error.
async fn patiently<T>(
    sending: impl Future<Output = T>,
    sent: Option<&AtomicU64>,
    idle: Duration,
    answer: Duration,
) -> Result<T, Duration> {
    let limit = if sent.is_some() { answer.max(idle) } else { answer };
    tokio::pin!(sending);
    let mut before = sent.map(|sent| sent.load(Ordering::Relaxed));
    loop {
        match tokio::time::timeout(limit, &mut sending).await {
            Ok(outcome) => return Ok(outcome),
            Err(_) => {
                let now = sent.map(|sent| sent.load(Ordering::Relaxed));
                if now == before {
                    return Err(limit);
                }
                before = now;
            }
        }
    }
}

/// The error of several hosts that all failed: of the class that the most trusted one's has, with what each said.
pub(super) fn all_failed(what: &str, failures: Vec<(Failure, bool)>) -> Error {
    let mut failures = failures;
    let main = failures.iter().position(|(_, trusted)| *trusted).unwrap_or(failures.len().saturating_sub(1));
    if failures.is_empty() {
        return Error::not_found(format!("{what}: no host could be asked"));
    }
    let (main, _) = failures.swap_remove(main);
    let others: Vec<String> = failures.iter().map(|(failure, _)| failure.error.to_string()).collect();
    let error = main.error.context(what);
    if others.is_empty() { error } else { error.context(format!("{} failed too", others.join("; "))) }
}

impl Repository {
    /// The scope of a token for this repository.
    pub(super) fn scope(&self, push: bool) -> String {
        let actions = if push { "pull,push" } else { "pull" };
        format!("repository:{}:{actions}", self.reference().path())
    }
}
