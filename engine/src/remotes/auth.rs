//! Who we are, as a host asks for it.
//!
//! ```text
//!  401, WWW-Authenticate: Basic    -> user and password, as they are
//!                         Bearer   -> realm ==GET or POST==> token, shown until it ends
//!  credentials that are a header   -> that, whatever the host asks for
//! ```
//!
//! Invariants: credentials are asked for once per host and transfer, and go to that host and to the realm that it names,
//! nowhere else: never over http where the host was reached over https (this machine's own services apart), never along
//! with a redirect. A token is fetched once for all who wait for the same one. A host that refuses what it was shown is shown
//! one fresh token, and then no more. No error holds a secret.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use futures::FutureExt as _;
use futures::future::{BoxFuture, Shared as SharedFuture};
use http::header::{AUTHORIZATION, CONTENT_TYPE, LOCATION};
use http::{HeaderMap, HeaderValue, Method};
use oci::Algorithm;
use parking_lot::Mutex;
use reqwest::{Client, Response, StatusCode, Url};
use serde::Deserialize;
use tokio::sync::OnceCell;

use super::hosts::{Host, authority, is_loopback};
use super::request::{Failure, is_html, read_limited, redirect, same_origin, shown};
use super::{Credential, Inner};

/// The largest answer of a token server.
const ANSWER_LIMIT: usize = 256 << 10;
/// The longest token that fits into a header everywhere.
const TOKEN_LIMIT: usize = 64 << 10;
/// How long a token lasts that does not say, and at least, by the protocol.
const LEAST: Duration = Duration::from_secs(60);
/// How long before its end a token is not shown any more.
const MARGIN: Duration = Duration::from_secs(5);
/// Tokens that are remembered.
const MOST: usize = 512;
/// Redirects of a token server that are followed.
const REDIRECTS: usize = 5;
/// What we are called where a client has a name.
const CLIENT: &str = "gantry";

/// One challenge of a WWW-Authenticate header.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Challenge {
    /// In lower case.
    pub(super) scheme: String,
    /// Names in lower case.
    pub(super) parameters: HashMap<String, String>,
}

/// Reads the value of a WWW-Authenticate header, which may hold several challenges. What makes no sense is left out. Pure.
pub(super) fn parse(value: &str) -> Vec<Challenge> {
    let mut challenges: Vec<Challenge> = Vec::new();
    let mut rest = value;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find([' ', '\t', ',', '=', '"']).unwrap_or(rest.len());
        let (word, after) = rest.split_at(end);
        if word.is_empty() {
            if after.is_empty() {
                return challenges;
            }
            // A stray sign.
            rest = &after[1..];
            continue;
        }
        let Some(after) = after.trim_start_matches([' ', '\t']).strip_prefix('=') else {
            challenges.push(Challenge { scheme: word.to_ascii_lowercase(), parameters: HashMap::new() });
            rest = after;
            continue;
        };
        let (text, after) = text(after.trim_start_matches([' ', '\t']));
        if let Some(challenge) = challenges.last_mut() {
            challenge.parameters.entry(word.to_ascii_lowercase()).or_insert(text);
        }
        rest = after;
    }
}

/// A value, quoted or not, and what follows it.
fn text(from: &str) -> (String, &str) {
    let Some(quoted) = from.strip_prefix('"') else {
        let end = from.find([' ', '\t', ',']).unwrap_or(from.len());
        return (from[..end].to_owned(), &from[end..]);
    };
    let mut value = String::new();
    let mut escaped = false;
    for (at, c) in quoted.char_indices() {
        match c {
            _ if escaped => {
                value.push(c);
                escaped = false;
            }
            '\\' => escaped = true,
            '"' => return (value, &quoted[at + 1..]),
            c => value.push(c),
        }
    }
    (value, "")
}

/// Scopes in one order, each once.
fn sorted(mut scopes: Vec<String>) -> Vec<String> {
    scopes.retain(|scope| !scope.is_empty());
    scopes.sort();
    scopes.dedup();
    scopes
}

/// What the hosts of one repository asked for, and were given.
#[derive(Default)]
pub(super) struct Authorizer {
    credentials: Mutex<HashMap<String, Arc<OnceCell<Credential>>>>,
    known: Mutex<HashMap<String, Known>>,
}

/// How a host wants to be shown who we are.
#[derive(Clone)]
enum Known {
    Value(HeaderValue),
    Bearer(Arc<Realm>),
}

/// Where tokens for a host come from.
#[derive(Clone)]
struct Realm {
    url: Url,
    service: String,
    /// Those that the host named.
    scopes: Vec<String>,
    credential: Credential,
}

/// A token, as it is shown.
struct Token {
    value: HeaderValue,
    until: Instant,
}

type Flight = SharedFuture<BoxFuture<'static, Result<Arc<Token>, Failure>>>;

/// The tokens of all repositories, by host, realm, scopes and credentials.
#[derive(Default)]
pub(super) struct Tokens(Mutex<HashMap<String, Flight>>);

impl Tokens {
    /// The token of this name: one that is there, or on its way, or fetched now.
    fn get(
        &self,
        key: &str,
        fetch: impl FnOnce() -> BoxFuture<'static, Result<Arc<Token>, Failure>>,
    ) -> Flight {
        let now = Instant::now();
        let is_over = |flight: &Flight| match flight.peek() {
            Some(Ok(token)) => token.until <= now,
            Some(Err(_)) => true,
            None => false,
        };
        let mut tokens = self.0.lock();
        if let Some(flight) = tokens.get(key).filter(|flight| !is_over(flight)) {
            return flight.clone();
        }
        if tokens.len() >= MOST {
            tokens.retain(|_, flight| !is_over(flight));
            if tokens.len() >= MOST {
                tokens.clear();
            }
        }
        let flight = fetch().shared();
        tokens.insert(key.to_owned(), flight.clone());
        flight
    }

    /// A host does not take this one any more.
    fn forget(&self, shown: &HeaderValue) {
        self.0.lock().retain(|_, flight| !matches!(flight.peek(), Some(Ok(token)) if token.value == *shown));
    }
}

impl Inner {
    /// What to show a host, as far as it has asked.
    pub(super) async fn authorization(
        &self,
        host: &Host,
        scopes: &[String],
    ) -> Result<Option<HeaderValue>, Failure> {
        let known = self.auth.known.lock().get(&host.origin()).cloned();
        match known {
            None => Ok(None),
            Some(Known::Value(value)) => Ok(Some(value)),
            Some(Known::Bearer(realm)) => self.token(host, &realm, scopes).await.map(Some),
        }
    }

    /// A host refused what it was shown, and said what it wants.
    pub(super) async fn challenged(
        &self,
        host: &Host,
        challenges: &[String],
        refused: Option<&HeaderValue>,
    ) -> Result<(), Failure> {
        if let Some(refused) = refused {
            self.shared.tokens.forget(refused);
        }
        let origin = host.origin();
        let parsed: Vec<Challenge> = challenges.iter().flat_map(|value| parse(value)).collect();
        let credential = self.credential(host, challenges).await?;
        let known = if let Credential::Header(value) = &credential {
            Known::Value(sensitive(value, host)?)
        } else if let Some(bearer) = parsed.iter().find(|challenge| challenge.scheme == "bearer") {
            let mut realm = realm(host, bearer, credential, self.is_plain(host))?;
            if let Some(Known::Bearer(before)) = self.auth.known.lock().get(&origin)
                && before.url == realm.url
                && before.service == realm.service
            {
                realm.scopes = sorted(realm.scopes.iter().chain(&before.scopes).cloned().collect());
            }
            Known::Bearer(Arc::new(realm))
        } else if parsed.iter().any(|challenge| challenge.scheme == "basic") {
            match &credential {
                Credential::Password { username, secret } => {
                    let pair = STANDARD.encode(format!("{username}:{secret}"));
                    Known::Value(sensitive(&format!("Basic {pair}"), host)?)
                }
                Credential::Refresh(_) => {
                    return Err(Failure::denied(format!(
                        "{origin} wants a user and a password, and was to be given a refresh token; give it those"
                    )));
                }
                _ => {
                    return Err(Failure::denied(format!(
                        "{origin} wants a user and a password, and there are none; log in, or give them to the transfer"
                    )));
                }
            }
        } else {
            let schemes: Vec<&str> =
                parsed.iter().map(|challenge| challenge.scheme.as_str()).take(8).collect();
            return Err(Failure::denied(format!(
                "{origin} answered 401 and asks for {}; basic and bearer are known here",
                if schemes.is_empty() { "nothing".to_owned() } else { format!("{:?}", schemes.join(", ")) }
            )));
        };
        if let (Known::Value(value), Some(refused)) = (&known, refused)
            && value == refused
        {
            return Err(Failure::denied(format!(
                "{origin} does not accept the credentials it was given (401); are user, password and repository right?"
            )));
        }
        self.auth.known.lock().insert(origin, known);
        Ok(())
    }

    /// Whether a host turned out to talk http.
    fn is_plain(&self, host: &Host) -> bool {
        host.scheme == "http" || (host.fallback && self.plain.lock().contains(&host.authority))
    }

    /// The credentials for a host, asked for once.
    async fn credential(&self, host: &Host, challenges: &[String]) -> Result<Credential, Failure> {
        let Some(credentials) = &self.access.credentials else { return Ok(Credential::Anonymous) };
        let cell = self.auth.credentials.lock().entry(host.authority.clone()).or_default().clone();
        cell.get_or_try_init(|| credentials.ask(&host.authority, challenges)).await.cloned().map_err(
            |error| {
                let kind = Failure::denied(String::new()).kind;
                Failure { kind, error: error.context(format!("ask for credentials for {}", host.authority)) }
            },
        )
    }

    async fn token(&self, host: &Host, realm: &Realm, scopes: &[String]) -> Result<HeaderValue, Failure> {
        let scopes = sorted(scopes.iter().chain(&realm.scopes).cloned().collect());
        let key = key(host, realm, &scopes);
        let own = host_url(host, self.is_plain(host)).is_some_and(|url| same_origin(&url, &realm.url));
        let client = self.client(host, own, &realm.url)?;
        let mut headers = HeaderMap::new();
        if own {
            for (name, value) in self.headers.iter().chain(&host.headers) {
                headers.append(name, value.clone());
            }
        }
        let limits = &self.shared.settings.limits;
        let (answer, idle) = (limits.answer, limits.idle);
        let flight = self.shared.tokens.get(&key, || {
            let fetch = Fetch { client, headers, realm: realm.clone(), scopes, answer, idle };
            async move { fetch.token().await.map(Arc::new) }.boxed()
        });
        flight.await.map(|token| token.value.clone())
    }
}

fn host_url(host: &Host, plain: bool) -> Option<Url> {
    let scheme = if plain { "http" } else { host.scheme.as_str() };
    format!("{scheme}://{}/", host.authority).parse().ok()
}

fn sensitive(value: &str, host: &Host) -> Result<HeaderValue, Failure> {
    let mut value = HeaderValue::try_from(value).map_err(|_| {
        Failure::denied(format!("the credentials for {} cannot be sent over HTTP", host.authority))
    })?;
    value.set_sensitive(true);
    Ok(value)
}

/// The realm that a challenge names, if credentials may go there.
fn realm(host: &Host, challenge: &Challenge, credential: Credential, plain: bool) -> Result<Realm, Failure> {
    let get = |name: &str| challenge.parameters.get(name).cloned().unwrap_or_default();
    let wrong = |why: &str| Failure::wrong(format!("{} asks for a token {why}", host.origin()));
    let base = host_url(host, plain).ok_or_else(|| wrong("at no address"))?;
    let mut url = match get("realm").as_str() {
        "" => return Err(wrong("and names no realm to get it from")),
        text => base.join(text).map_err(|_| wrong("from a realm that is no address"))?,
    };
    if !matches!(url.scheme(), "http" | "https") {
        return Err(wrong(&format!("from a realm of the scheme {:?}", url.scheme())));
    }
    if url.scheme() == "http" && !plain && !is_loopback(&authority(&url)) {
        return Err(wrong(&format!(
            "from {}, over http: secrets of an https host do not go there",
            shown(&url)
        )));
    }
    let _ = url.set_username("");
    let _ = url.set_password(None);
    url.set_fragment(None);
    let scopes = sorted(get("scope").split(' ').map(str::to_owned).collect());
    Ok(Realm { url, service: get("service"), scopes, credential })
}

/// What tells one token from another. A hash, since credentials are in it.
fn key(host: &Host, realm: &Realm, scopes: &[String]) -> String {
    let mut hasher = Algorithm::Sha256.hasher();
    let mut add = |text: &str| {
        hasher.update(&(text.len() as u64).to_le_bytes());
        hasher.update(text.as_bytes());
    };
    add(&host.origin());
    add(realm.url.as_str());
    add(&realm.service);
    for scope in scopes {
        add(scope);
    }
    match &realm.credential {
        Credential::Anonymous => add("anonymous"),
        Credential::Password { username, secret } => {
            ["password", username, secret].iter().for_each(|text| add(text));
        }
        Credential::Refresh(token) => ["refresh", token].iter().for_each(|text| add(text)),
        Credential::Header(value) => ["header", value].iter().for_each(|text| add(text)),
    }
    hasher.finish().to_string()
}

/// A token that is to be fetched.
struct Fetch {
    client: Client,
    headers: HeaderMap,
    realm: Realm,
    scopes: Vec<String>,
    answer: Duration,
    idle: Duration,
}

/// What a token server answers.
#[derive(Deserialize)]
struct Document {
    #[serde(default)]
    token: Option<String>,
    #[serde(default)]
    access_token: Option<String>,
    #[serde(default)]
    expires_in: Option<f64>,
    #[serde(default)]
    issued_at: Option<String>,
}

impl Fetch {
    async fn token(&self) -> Result<Token, Failure> {
        if matches!(self.realm.credential, Credential::Anonymous) {
            return self.read(self.get().await?).await;
        }
        let response = self.post().await?;
        let by_name = matches!(self.realm.credential, Credential::Password { .. });
        match response.status().as_u16() {
            // A server that knows GET alone says so in many ways.
            400 | 401 | 404 => self.read(self.get().await?).await,
            405 if by_name => self.read(self.get().await?).await,
            _ => self.read(response).await,
        }
    }

    /// The OAuth2 way.
    async fn post(&self) -> Result<Response, Failure> {
        let mut form = self.realm.url.clone();
        {
            let mut pairs = form.query_pairs_mut();
            pairs.clear();
            if !self.scopes.is_empty() {
                pairs.append_pair("scope", &self.scopes.join(" "));
            }
            pairs.append_pair("service", &self.realm.service).append_pair("client_id", CLIENT);
            match &self.realm.credential {
                Credential::Password { username, secret } => {
                    pairs.append_pair("grant_type", "password");
                    pairs.append_pair("username", username).append_pair("password", secret);
                }
                Credential::Refresh(token) => {
                    pairs.append_pair("grant_type", "refresh_token").append_pair("refresh_token", token);
                }
                Credential::Anonymous | Credential::Header(_) => {}
            }
        }
        let body = form.query().unwrap_or_default().to_owned();
        let request = self
            .client
            .request(Method::POST, self.realm.url.clone())
            .headers(self.headers.clone())
            .header(CONTENT_TYPE, "application/x-www-form-urlencoded; charset=utf-8")
            .body(body);
        self.send(request, &self.realm.url).await
    }

    /// Docker's way.
    async fn get(&self) -> Result<Response, Failure> {
        let mut url = self.realm.url.clone();
        {
            let mut pairs = url.query_pairs_mut();
            if !self.realm.service.is_empty() {
                pairs.append_pair("service", &self.realm.service);
            }
            for scope in &self.scopes {
                pairs.append_pair("scope", scope);
            }
        }
        let mut headers = self.headers.clone();
        let pair = match &self.realm.credential {
            Credential::Password { username, secret } => Some(format!("{username}:{secret}")),
            Credential::Refresh(token) => Some(format!(":{token}")),
            _ => None,
        };
        if let Some(pair) = pair
            && let Ok(mut value) = HeaderValue::try_from(format!("Basic {}", STANDARD.encode(pair)))
        {
            value.set_sensitive(true);
            headers.insert(AUTHORIZATION, value);
        }
        for _ in 0..=REDIRECTS {
            let request = self.client.request(Method::GET, url.clone()).headers(headers.clone());
            let response = self.send(request, &url).await?;
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let (true, Some(location)) = (response.status().is_redirection(), location) else {
                return Ok(response);
            };
            let next = redirect(&url, location)
                .map_err(|why| Failure::wrong(format!("GET {}: {why}", shown(&url))))?;
            if !same_origin(&url, &next) {
                headers.clear();
            }
            url = next;
        }
        Err(Failure::wrong(format!("GET {}: redirects more than {REDIRECTS} times", shown(&self.realm.url))))
    }

    async fn send(&self, request: reqwest::RequestBuilder, url: &Url) -> Result<Response, Failure> {
        tracing::debug!(url = shown(url), "fetching a token");
        match tokio::time::timeout(self.answer, request.send()).await {
            Err(_) => {
                let limit = self.answer;
                Err(Failure::broken(format!("token from {}: no answer within {limit:?}", shown(url))))
            }
            Ok(Err(error)) => {
                let mut cause: &dyn std::error::Error = &error.without_url();
                while let Some(source) = cause.source() {
                    cause = source;
                }
                Err(Failure::broken(format!("token from {}: {cause}", shown(url))))
            }
            Ok(Ok(response)) => Ok(response),
        }
    }

    async fn read(&self, mut response: Response) -> Result<Token, Failure> {
        let from = shown(&self.realm.url);
        let status = response.status();
        if !status.is_success() {
            // The text is left out: servers are known to repeat what they were sent.
            let message = format!("{from} gives no token: it answered {status}");
            return Err(match status {
                StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN | StatusCode::BAD_REQUEST => {
                    Failure::denied(format!("{message}; are user, password and repository right?"))
                }
                status if status.is_server_error() || status == StatusCode::TOO_MANY_REQUESTS => {
                    Failure::broken(message)
                }
                _ => Failure::wrong(message),
            });
        }
        if is_html(response.headers()) {
            return Err(Failure::wrong(format!("{from} gives no token, but an HTML page")));
        }
        let bytes = match read_limited(&mut response, ANSWER_LIMIT, self.idle).await {
            Ok(Some(bytes)) => bytes,
            Ok(None) => {
                return Err(Failure::wrong(format!(
                    "{from} gives a token of more than {ANSWER_LIMIT} bytes"
                )));
            }
            Err(why) => return Err(Failure::broken(format!("token from {from}: {why}"))),
        };
        token(&bytes, SystemTime::now(), Instant::now())
            .map_err(|why| Failure::wrong(format!("{from} gives no token: {why}")))
    }
}

/// The token in an answer. Pure.
fn token(bytes: &[u8], now: SystemTime, instant: Instant) -> Result<Token, String> {
    // The parser's message could repeat the token.
    let document: Document =
        serde_json::from_slice(bytes).map_err(|_| "its answer is not as expected".to_owned())?;
    let text = document.access_token.filter(|token| !token.is_empty()).or(document.token).unwrap_or_default();
    if text.is_empty() {
        return Err("there is none in its answer".to_owned());
    }
    if text.len() > TOKEN_LIMIT {
        return Err(format!("it has {} bytes, which is more than {TOKEN_LIMIT}", text.len()));
    }
    let mut value = HeaderValue::try_from(format!("Bearer {text}"))
        .map_err(|_| "it cannot be sent over HTTP".to_owned())?;
    value.set_sensitive(true);
    let lasts = document
        .expires_in
        .and_then(|seconds| Duration::try_from_secs_f64(seconds).ok())
        .unwrap_or(LEAST)
        .clamp(LEAST, Duration::from_secs(24 * 3600));
    // A token may have lain in a cache. A clock that differs by more than a token's life tells nothing.
    let issued = document.issued_at.and_then(|text| {
        time::OffsetDateTime::parse(&text, &time::format_description::well_known::Rfc3339).ok()
    });
    let age = issued
        .and_then(|issued| Duration::try_from(time::OffsetDateTime::from(now) - issued).ok())
        .filter(|age| *age < lasts)
        .unwrap_or_default();
    Ok(Token { value, until: instant + (lasts - age).saturating_sub(MARGIN) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn challenge(scheme: &str, parameters: &[(&str, &str)]) -> Challenge {
        Challenge {
            scheme: scheme.into(),
            parameters: parameters.iter().map(|(name, value)| ((*name).into(), (*value).into())).collect(),
        }
    }

    #[test]
    fn challenges_are_read_as_servers_write_them() {
        assert_eq!(
            parse(
                r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#
            ),
            [challenge(
                "bearer",
                &[
                    ("realm", "https://auth.docker.io/token"),
                    ("service", "registry.docker.io"),
                    ("scope", "repository:a/b:pull,push")
                ]
            )]
        );
        assert_eq!(
            parse(r#"Basic realm="a \"b\", c" , BEARER  Realm = x,, error=insufficient_scope"#),
            [
                challenge("basic", &[("realm", "a \"b\", c")]),
                challenge("bearer", &[("realm", "x"), ("error", "insufficient_scope")])
            ]
        );
        assert_eq!(parse("Negotiate, NTLM"), [challenge("negotiate", &[]), challenge("ntlm", &[])]);
        assert_eq!(parse(r#"realm="alone""#), []);
        assert_eq!(parse(r#"Bearer realm="open"#), [challenge("bearer", &[("realm", "open")])]);
        assert_eq!(parse(""), []);
    }

    #[test]
    fn tokens_end_when_they_say() {
        let now = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000_000_000);
        let instant = Instant::now();
        let lasts =
            |text: &str| token(text.as_bytes(), now, instant).map(|token| (token.until - instant).as_secs());
        assert_eq!(lasts(r#"{"token":"t"}"#), Ok(55));
        assert_eq!(lasts(r#"{"access_token":"t","expires_in":300}"#), Ok(295));
        assert_eq!(lasts(r#"{"token":"t","expires_in":300,"issued_at":"2001-09-09T01:45:40Z"}"#), Ok(235));
        assert_eq!(
            lasts(r#"{"token":"t","expires_in":300,"issued_at":"1999-01-01T00:00:00Z"}"#),
            Ok(295),
            "a clock that is off"
        );
        assert_eq!(lasts(r#"{"token":"t","expires_in":1}"#), Ok(55));
        assert_eq!(lasts(r#"{"token":"t","expires_in":-1}"#), Ok(55));
        for wrong in ["", "{}", "[]", r#"{"token":""}"#, r#"{"token":"a\nb"}"#, r#"{"token":5}"#] {
            assert!(lasts(wrong).is_err(), "{wrong}");
        }
        let secret = r#"{"token":"very-secret","expires_in":"#;
        assert!(!token(secret.as_bytes(), now, instant).err().unwrap().contains("very-secret"));
        assert!(lasts(&format!(r#"{{"token":"{}"}}"#, "x".repeat(TOKEN_LIMIT + 1))).is_err());
    }

    #[test]
    fn scopes_have_one_order() {
        let scopes = |list: &[&str]| sorted(list.iter().map(|scope| (*scope).to_owned()).collect());
        assert_eq!(scopes(&["b", "a", "", "b"]), ["a", "b"]);
    }

    proptest! {
        #[test]
        fn no_header_upsets_the_parser(value in ".{0,200}") {
            let _ = parse(&value);
        }

        #[test]
        fn quoted_values_come_back(value in "[ -~]{0,40}") {
            let quoted = value.replace('\\', "\\\\").replace('"', "\\\"");
            let parsed = parse(&format!("Bearer realm=\"{quoted}\", service=s"));
            prop_assert_eq!(parsed, [challenge("bearer", &[("realm", value.as_str()), ("service", "s")])]);
        }
    }
}
