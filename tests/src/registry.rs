//! Debian's docker-registry on loopback, a token server for it, and what clients need to reach them.
//!
//! Everything has a folder and a port of its own; what is dropped is ended. [`crate::faults`] stands in front of a registry.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::Write as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex};
use std::time::{SystemTime, UNIX_EPOCH};

use axum::http::{HeaderMap, StatusCode, Uri, header};
use axum::response::{IntoResponse as _, Response};
use base64::Engine as _;
use base64::engine::general_purpose::{STANDARD, URL_SAFE_NO_PAD};
use oci::Digest;
use proto::containerd::services::content::v1::content_client::ContentClient;
use proto::containerd::services::content::v1::{AbortRequest, ListStatusesRequest};
use rcgen::{
    BasicConstraints, CertificateParams, CertifiedIssuer, ExtendedKeyUsagePurpose, IsCa, KeyPair,
    KeyUsagePurpose, SigningKey as _,
};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::runtime::Runtime;

use crate::client::{channel, in_namespace};
use crate::host::{Host, Kind};
use crate::image::Image;
use crate::wait_for;

/// Debian's registry.
pub const REGISTRY: &str = "/usr/bin/docker-registry";
/// Debian's client of registries.
pub const SKOPEO: &str = "/usr/bin/skopeo";
/// The one user of every registry that has users.
pub const USER: &str = "ali baba";
/// The user's password.
pub const PASSWORD: &str = "open sesame";
/// The password as htpasswd keeps it: bcrypt, with the least cost, made once.
const HASHED: &str = "$2y$05$abcdefghijklmnopqrstuupx2xBUC4954936wVIjyyPHmUBFu0wCW";

/// A runtime for servers in the background of a test. Dropped, it ends them at once.
pub(crate) struct Background(Option<Runtime>);

impl Background {
    pub(crate) fn new() -> Self {
        let mut builder = tokio::runtime::Builder::new_multi_thread();
        Background(Some(builder.worker_threads(1).enable_all().build().unwrap()))
    }

    pub(crate) fn runtime(&self) -> &Runtime {
        self.0.as_ref().unwrap()
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

/// An authority of certificates that nobody knows, and certificates by it, in a folder.
pub struct Authority {
    issuer: CertifiedIssuer<'static, KeyPair>,
    folder: TempDir,
}

impl Default for Authority {
    fn default() -> Self {
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::DigitalSignature];
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "the tests' authority");
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
        let folder = tempfile::Builder::new().prefix("gt-ca-").tempdir_in("/tmp").unwrap();
        fs::write(folder.path().join("ca.crt"), issuer.pem()).unwrap();
        Authority { issuer, folder }
    }
}

impl Authority {
    /// Its own certificate.
    pub fn certificate(&self) -> PathBuf {
        self.folder.path().join("ca.crt")
    }

    /// A certificate and its key, for these names: NAME.crt and NAME.key.
    pub fn issue(&self, name: &str, names: &[&str], usage: ExtendedKeyUsagePurpose) -> (PathBuf, PathBuf) {
        let names: Vec<String> = names.iter().map(|&name| name.to_owned()).collect();
        let mut parameters = CertificateParams::new(names).unwrap();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
        parameters.extended_key_usages = vec![usage];
        let key = KeyPair::generate().unwrap();
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        let at = |end: &str| self.folder.path().join(format!("{name}.{end}"));
        fs::write(at("crt"), certificate.pem()).unwrap();
        fs::write(at("key"), key.serialize_pem()).unwrap();
        (at("crt"), at("key"))
    }
}

/// Whom a registry lets in.
#[derive(Clone, Copy, Default)]
pub struct Guard<'a> {
    /// By TLS, with a certificate of this authority; otherwise by plain http.
    pub tls: Option<&'a Authority>,
    /// Who has a certificate of this authority alone.
    pub clients: Option<&'a Authority>,
    /// [`USER`] with [`PASSWORD`] alone.
    pub basic: bool,
    /// Who has a token of this server alone.
    pub tokens: Option<&'a Tokens>,
}

/// A running docker-registry.
pub struct Registry {
    /// Where it serves.
    pub address: SocketAddr,
    folder: TempDir,
    child: Child,
    /// skopeo's arguments that let it in, without the `--dest-` or `--src-` before them.
    skopeo: Vec<String>,
}

impl Registry {
    /// By plain http, for all.
    pub fn open() -> Self {
        Registry::start(Guard::default())
    }

    /// Starts it, and waits until it serves.
    pub fn start(guard: Guard<'_>) -> Self {
        let folder = tempfile::Builder::new().prefix("gt-reg-").tempdir_in("/tmp").unwrap();
        let at = |name: &str| folder.path().join(name);
        let mut config = json!({
            "version": 0.1,
            "log": {"level": "info", "accesslog": {"disabled": false}},
            "storage": {"filesystem": {"rootdirectory": at("storage")}, "delete": {"enabled": true}},
            "http": {"addr": "127.0.0.1:0"},
        });
        let mut skopeo = Vec::new();
        if let Some(authority) = guard.tls {
            let names = ["localhost", "127.0.0.1"];
            let (certificate, key) = authority.issue("registry", &names, ExtendedKeyUsagePurpose::ServerAuth);
            config["http"]["tls"] = json!({"certificate": certificate, "key": key});
            let trusted = at("trusted");
            fs::create_dir(&trusted).unwrap();
            fs::copy(authority.certificate(), trusted.join("ca.crt")).unwrap();
            if let Some(clients) = guard.clients {
                config["http"]["tls"]["clientcas"] = json!([clients.certificate()]);
                let (certificate, key) = clients.issue("skopeo", &[], ExtendedKeyUsagePurpose::ClientAuth);
                fs::copy(certificate, trusted.join("client.cert")).unwrap();
                fs::copy(key, trusted.join("client.key")).unwrap();
            }
            skopeo.push(format!("cert-dir={}", trusted.display()));
        } else {
            skopeo.push("tls-verify=false".to_owned());
        }
        if guard.basic {
            fs::write(at("htpasswd"), format!("{USER}:{HASHED}\n")).unwrap();
            config["auth"] = json!({"htpasswd": {"realm": "the cave", "path": at("htpasswd")}});
        }
        if let Some(tokens) = guard.tokens {
            fs::write(at("roots.crt"), tokens.shared.issuer.pem()).unwrap();
            config["auth"] = json!({"token": {
                "realm": tokens.realm(), "service": SERVICE, "issuer": ISSUER, "rootcertbundle": at("roots.crt"),
            }});
        }
        if guard.basic || guard.tokens.is_some() {
            skopeo.push(format!("creds={USER}:{PASSWORD}"));
        }
        // JSON is YAML.
        fs::write(at("config.yml"), config.to_string()).unwrap();
        let log = File::create(at("log")).unwrap();
        let mut command = Command::new(REGISTRY);
        command.arg("serve").arg(at("config.yml")).env("OTEL_TRACES_EXPORTER", "none");
        let child = command.stdin(Stdio::null()).stdout(log.try_clone().unwrap()).stderr(log).spawn();
        let mut child = child.unwrap_or_else(|error| panic!("{REGISTRY}: {error}"));
        let listening = regex::Regex::new(r"listening on (127\.0\.0\.1:\d+)").unwrap();
        let mut address = None;
        wait_for("the registry to listen", || {
            let log = fs::read_to_string(at("log")).unwrap();
            if let Some(status) = child.try_wait().unwrap() {
                panic!("the registry ended with {status}:\n{log}");
            }
            address = listening.captures(&log).map(|found| found[1].parse().unwrap());
            address.is_some()
        });
        Registry { address: address.unwrap(), folder, child, skopeo }
    }

    /// The name of an image there: `REPOSITORY:TAG` or `REPOSITORY@DIGEST`, behind the address.
    pub fn name(&self, image: &str) -> String {
        format!("{}/{image}", self.address)
    }

    /// What the registry has logged, with a line for each request.
    pub fn log(&self) -> String {
        fs::read_to_string(self.folder.path().join("log")).unwrap()
    }

    /// Its requests so far: `GET /v2/...`, in the order of their answers.
    pub fn requests(&self) -> Vec<String> {
        let log = self.log();
        let quoted =
            log.lines().filter(|line| !line.starts_with("time=")).filter_map(|line| line.split('"').nth(1));
        quoted.filter_map(|request| Some(request.rsplit_once(' ')?.0.to_owned())).collect()
    }

    /// Pushes an image under a name there (without the address), every platform of it; its digest. By skopeo.
    pub fn push(&self, image: &Image, name: &str) -> String {
        self.push_as(image, name, &[])
    }

    /// [`Self::push`], with more arguments for skopeo, such as `--format v2s2`.
    pub fn push_as(&self, image: &Image, name: &str, arguments: &[&str]) -> String {
        let folder = tempfile::tempdir_in(self.folder.path()).unwrap();
        let layout = folder.path().join("image.tar");
        image.write(&layout).unwrap();
        let digest = folder.path().join("digest");
        let mut command = Command::new(SKOPEO);
        command.args(["copy", "--quiet", "--all", "--digestfile", digest.to_str().unwrap()]);
        command.args(self.skopeo.iter().map(|argument| format!("--dest-{argument}"))).args(arguments);
        command.arg(format!("oci-archive:{}", layout.display())).arg(format!("docker://{}", self.name(name)));
        done(&mut command);
        fs::read_to_string(digest).unwrap()
    }

    /// What skopeo reads of an image: with `["--raw"]` its manifest or index, with `["--config"]` its configuration.
    pub fn inspect(&self, name: &str, arguments: &[&str]) -> String {
        let mut command = Command::new(SKOPEO);
        command
            .arg("inspect")
            .args(self.skopeo.iter().map(|argument| format!("--{argument}")))
            .args(arguments);
        done(command.arg(format!("docker://{}", self.name(name))))
    }

    /// The digest that skopeo reads of an image: of its manifest for this machine, if there are more.
    pub fn digest(&self, name: &str) -> String {
        self.inspect(name, &["--format", "{{.Digest}}"]).trim().to_owned()
    }

    /// Copies an image from there to a folder, an OCI layout, by skopeo, which checks every digest.
    pub fn copy_to(&self, name: &str, layout: &Path) {
        let mut command = Command::new(SKOPEO);
        command.args(["copy", "--quiet", "--all"]);
        command.args(self.skopeo.iter().map(|argument| format!("--src-{argument}")));
        command.arg(format!("docker://{}", self.name(name))).arg(format!("oci:{}:copied", layout.display()));
        done(&mut command);
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
        if std::thread::panicking() {
            let log = self.log();
            let tail: Vec<&str> = log.lines().rev().take(15).collect();
            println!("--- the log of the registry {} ---", self.address);
            tail.iter().rev().for_each(|line| println!("{line}"));
        }
    }
}

/// Runs a command that must succeed; its stdout.
pub fn done(command: &mut Command) -> String {
    let output = command.stdin(Stdio::null()).output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let stdout = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(
        output.status.success(),
        "{command:?}: {}\n{stdout}{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    stdout
}

const SERVICE: &str = "the tests' registry";
const ISSUER: &str = "the tests' token server";

/// A token server: hands out what a registry with [`Guard::tokens`] takes, to anybody for pulls, to [`USER`] for all.
pub struct Tokens {
    /// Where it serves.
    pub address: SocketAddr,
    shared: Arc<TokensShared>,
    _background: Background,
}

struct TokensShared {
    issuer: CertifiedIssuer<'static, KeyPair>,
    state: Mutex<TokensState>,
}

#[derive(Default)]
struct TokensState {
    requests: Vec<TokenRequest>,
    rules: TokenRules,
}

/// What a token server does out of the usual.
#[derive(Debug, Clone, Copy, Default)]
pub struct TokenRules {
    /// Pulls, too, are for the user alone.
    pub private: bool,
    /// How many seconds a token is good for; 0 is five minutes.
    pub seconds: u64,
    /// Says 404 to POST, as old servers do.
    pub get_alone: bool,
}

/// A request for a token.
#[derive(Debug, Clone)]
pub struct TokenRequest {
    /// `GET` or `POST`.
    pub method: String,
    /// The scopes that were asked for: `repository:NAME:pull,push`.
    pub scopes: Vec<String>,
    /// The fields of the query or of the form.
    pub fields: BTreeMap<String, String>,
    /// The Authorization header.
    pub authorization: Option<String>,
    /// What was answered.
    pub status: u16,
}

/// The refresh token that the server gives to the user, and takes.
pub const REFRESH: &str = "a token to refresh with";

impl Tokens {
    /// Starts it.
    pub fn start(rules: TokenRules) -> Self {
        let background = Background::new();
        let mut parameters = CertificateParams::default();
        parameters.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        parameters.distinguished_name.push(rcgen::DnType::CommonName, ISSUER);
        let issuer = CertifiedIssuer::self_signed(parameters, KeyPair::generate().unwrap()).unwrap();
        let state = Mutex::new(TokensState { rules, ..TokensState::default() });
        let shared = Arc::new(TokensShared { issuer, state });
        let listener = background.runtime().block_on(tokio::net::TcpListener::bind("127.0.0.1:0")).unwrap();
        let address = listener.local_addr().unwrap();
        let (get, post) = (shared.clone(), shared.clone());
        let methods = axum::routing::get(move |uri: Uri, headers: HeaderMap| async move {
            get.answer("GET", uri.query().unwrap_or_default(), &headers)
        })
        .post(move |headers: HeaderMap, form: String| async move { post.answer("POST", &form, &headers) });
        let router = axum::Router::new().route("/token", methods);
        background.runtime().spawn(async move { axum::serve(listener, router).await });
        Tokens { address, shared, _background: background }
    }

    /// The URL that challenges name.
    pub fn realm(&self) -> String {
        format!("http://{}/token", self.address)
    }

    /// Changes what it does.
    pub fn set(&self, rules: TokenRules) {
        self.shared.state.lock().unwrap().rules = rules;
    }

    /// The requests so far.
    pub fn requests(&self) -> Vec<TokenRequest> {
        self.shared.state.lock().unwrap().requests.clone()
    }
}

impl TokensShared {
    fn answer(&self, method: &str, form: &str, headers: &HeaderMap) -> Response {
        let authorization =
            headers.get(header::AUTHORIZATION).map(|value| value.to_str().unwrap().to_owned());
        let mut request = TokenRequest {
            method: method.to_owned(),
            scopes: Vec::new(),
            fields: BTreeMap::new(),
            authorization,
            status: 200,
        };
        for (name, value) in form.split('&').filter_map(|pair| pair.split_once('=')) {
            let value = unescaped(value);
            if name == "scope" {
                // One field with several, or several fields.
                request.scopes.extend(value.split(' ').map(str::to_owned));
            }
            request.fields.insert(name.to_owned(), value);
        }
        let rules = self.state.lock().unwrap().rules;
        let (status, body) = self.decided(&request, rules);
        request.status = status.as_u16();
        self.state.lock().unwrap().requests.push(request);
        (status, [(header::CONTENT_TYPE, "application/json")], body.to_string()).into_response()
    }

    fn decided(&self, request: &TokenRequest, rules: TokenRules) -> (StatusCode, Value) {
        let field = |name: &str| request.fields.get(name).map(String::as_str);
        let basic = format!("Basic {}", STANDARD.encode(format!("{USER}:{PASSWORD}")));
        let oauth = request.method == "POST";
        if oauth && rules.get_alone {
            return (StatusCode::NOT_FOUND, json!({"detail": "no such page"}));
        }
        let known = if oauth {
            match field("grant_type") {
                Some("password") => field("username") == Some(USER) && field("password") == Some(PASSWORD),
                Some("refresh_token") => field("refresh_token") == Some(REFRESH),
                _ => return (StatusCode::BAD_REQUEST, json!({"error": "unsupported_grant_type"})),
            }
        } else {
            match &request.authorization {
                Some(shown) if *shown == basic => true,
                Some(_) => return (StatusCode::UNAUTHORIZED, json!({"details": "wrong user or password"})),
                None => false,
            }
        };
        if (oauth || rules.private) && !known {
            return (StatusCode::UNAUTHORIZED, json!({"error": "invalid_grant", "details": "who are you?"}));
        }
        if field("service") != Some(SERVICE) {
            return (StatusCode::BAD_REQUEST, json!({"details": "another service's token"}));
        }
        let access: Vec<Value> = request.scopes.iter().filter_map(|scope| granted(scope, known)).collect();
        let seconds = if rules.seconds == 0 { 300 } else { rules.seconds };
        let token = self.signed(&access, seconds);
        let mut answer = json!({"expires_in": seconds});
        answer[if oauth { "access_token" } else { "token" }] = json!(token);
        if oauth || field("offline_token") == Some("true") {
            answer["refresh_token"] = json!(REFRESH);
        }
        (StatusCode::OK, answer)
    }

    /// A token as docker-registry takes it: signed by ES256, with the certificate along.
    fn signed(&self, access: &[Value], seconds: u64) -> String {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        // docker-registry takes tokens for a minute after their end.
        let end = now + seconds - 60.min(seconds + 1);
        let head = json!({"typ": "JWT", "alg": "ES256", "x5c": [STANDARD.encode(self.issuer.der())]});
        let claims = json!({
            "iss": ISSUER, "sub": USER, "aud": SERVICE, "exp": end, "nbf": now - 300, "iat": now,
            "jti": format!("{now}"), "access": access,
        });
        let part = |part: &Value| URL_SAFE_NO_PAD.encode(part.to_string());
        let text = format!("{}.{}", part(&head), part(&claims));
        let signature = self.issuer.key().sign(text.as_bytes()).unwrap();
        format!("{text}.{}", URL_SAFE_NO_PAD.encode(two_numbers(&signature)))
    }
}

/// What a scope grants: to one who is not known, pulls alone.
fn granted(scope: &str, known: bool) -> Option<Value> {
    let mut parts = scope.splitn(2, ':');
    let (kind, rest) = (parts.next()?, parts.next()?);
    let (name, actions) = rest.rsplit_once(':')?;
    let actions: Vec<&str> = actions.split(',').filter(|action| known || *action == "pull").collect();
    Some(json!({"type": kind, "name": name, "actions": actions}))
}

/// A signature as JWT has it, of one in DER: two numbers of 32 bytes each.
fn two_numbers(der: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::with_capacity(64);
    let mut rest = &der[2..];
    while let [2, length, ..] = *rest {
        let (number, after) = rest[2..].split_at(length as usize);
        // A leading zero keeps it positive; leading zeros of its own are left out.
        let number = &number[number.len().saturating_sub(32)..];
        bytes.resize(bytes.len() + 32 - number.len(), 0);
        bytes.extend_from_slice(number);
        rest = after;
    }
    bytes
}

fn unescaped(text: &str) -> String {
    let mut bytes = Vec::new();
    let mut rest = text.as_bytes();
    while let Some((&first, after)) = rest.split_first() {
        rest = after;
        bytes.push(match first {
            b'+' => b' ',
            b'%' => {
                let value = u8::from_str_radix(std::str::from_utf8(&rest[..2]).unwrap(), 16).unwrap();
                rest = &rest[2..];
                value
            }
            other => other,
        });
    }
    String::from_utf8(bytes).unwrap()
}

/// Writes `FOLDER/HOST/hosts.toml`, as containerd reads it. HOST has its port.
pub fn write_hosts(folder: &Path, host: &str, toml: &str) {
    let folder = folder.join(host);
    fs::create_dir_all(&folder).unwrap();
    fs::write(folder.join("hosts.toml"), toml).unwrap();
}

/// Writes `FOLDER/config.json`, as docker does on a login to this host.
pub fn write_docker_config(folder: &Path, host: &str) {
    fs::create_dir_all(folder).unwrap();
    let auth = STANDARD.encode(format!("{USER}:{PASSWORD}"));
    fs::write(folder.join("config.json"), json!({"auths": {host: {"auth": auth}}}).to_string()).unwrap();
}

/// How a layer is packed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pack {
    /// Not at all.
    Plain,
    /// By gzip.
    Gzip,
    /// By zstd.
    Zstd,
}

impl Pack {
    /// Packs a layer, fast rather than small.
    pub fn pack(self, tar: &[u8]) -> Vec<u8> {
        match self {
            Pack::Plain => tar.to_vec(),
            Pack::Gzip => {
                let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
                gzip.write_all(tar).unwrap();
                gzip.finish().unwrap()
            }
            Pack::Zstd => zstd::encode_all(tar, 1).unwrap(),
        }
    }

    fn media_type(self, docker: bool) -> &'static str {
        match (docker, self) {
            (true, Pack::Plain) => "application/vnd.docker.image.rootfs.diff.tar",
            (true, Pack::Gzip) => "application/vnd.docker.image.rootfs.diff.tar.gzip",
            (true, Pack::Zstd) => "application/vnd.docker.image.rootfs.diff.tar.zstd",
            (false, Pack::Plain) => "application/vnd.oci.image.layer.v1.tar",
            (false, Pack::Gzip) => "application/vnd.oci.image.layer.v1.tar+gzip",
            (false, Pack::Zstd) => "application/vnd.oci.image.layer.v1.tar+zstd",
        }
    }
}

/// Images of any shape, under construction.
#[derive(Default)]
pub struct Parts {
    /// Docker's types of media, not OCI's.
    pub docker: bool,
    blobs: Vec<(Digest, Vec<u8>)>,
}

impl Parts {
    /// With Docker's types of media.
    pub fn docker() -> Self {
        Parts { docker: true, ..Parts::default() }
    }

    /// Adds a blob; its descriptor.
    pub fn blob(&mut self, media_type: &str, bytes: impl Into<Vec<u8>>) -> Value {
        let bytes = bytes.into();
        let digest = Digest::sha256_of(&bytes);
        let descriptor = json!({"mediaType": media_type, "digest": digest.as_str(), "size": bytes.len()});
        if !self.blobs.iter().any(|(known, _)| *known == digest) {
            self.blobs.push((digest, bytes));
        }
        descriptor
    }

    /// Adds a layer; its descriptor.
    pub fn layer(&mut self, pack: Pack, tar: &[u8]) -> Value {
        self.blob(pack.media_type(self.docker), pack.pack(tar))
    }

    /// Adds a configuration for this architecture, of layers with these digests when unpacked; its descriptor.
    pub fn config(&mut self, architecture: &str, diff_ids: &[String]) -> Value {
        let config = json!({
            "architecture": architecture, "os": "linux", "created": "2020-09-13T12:26:40Z",
            "config": {"Env": ["PATH=/bin:/usr/bin"], "Cmd": ["sh"], "WorkingDir": "/"},
            "rootfs": {"type": "layers", "diff_ids": diff_ids}, "history": [],
        });
        let media_type = if self.docker {
            "application/vnd.docker.container.image.v1+json"
        } else {
            "application/vnd.oci.image.config.v1+json"
        };
        self.blob(media_type, config.to_string())
    }

    /// Adds a manifest of this configuration and these layers; its descriptor.
    pub fn manifest(&mut self, config: &Value, layers: &[Value]) -> Value {
        let media_type = if self.docker {
            "application/vnd.docker.distribution.manifest.v2+json"
        } else {
            "application/vnd.oci.image.manifest.v1+json"
        };
        let manifest =
            json!({"schemaVersion": 2, "mediaType": media_type, "config": config, "layers": layers});
        self.blob(media_type, manifest.to_string())
    }

    /// Adds a whole image for this architecture, of these layers; its manifest's descriptor, with the platform.
    pub fn image(&mut self, architecture: &str, pack: Pack, layers: &[Vec<u8>]) -> Value {
        let diff_ids: Vec<String> = layers.iter().map(|layer| Digest::sha256_of(layer).to_string()).collect();
        let layers: Vec<Value> = layers.iter().map(|layer| self.layer(pack, layer)).collect();
        let config = self.config(architecture, &diff_ids);
        let mut manifest = self.manifest(&config, &layers);
        manifest["platform"] = json!({"os": "linux", "architecture": architecture});
        manifest
    }

    /// Adds an index of these manifests; its descriptor.
    pub fn index(&mut self, manifests: &[Value]) -> Value {
        let media_type = if self.docker {
            "application/vnd.docker.distribution.manifest.list.v2+json"
        } else {
            "application/vnd.oci.image.index.v1+json"
        };
        let index = json!({"schemaVersion": 2, "mediaType": media_type, "manifests": manifests});
        self.blob(media_type, index.to_string())
    }

    /// The image that this manifest or index is.
    pub fn finish(self, top: &Value) -> Image {
        let index = json!({"schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json", "manifests": [top]});
        Image { blobs: self.blobs, index: index.to_string().into_bytes() }
    }
}

/// The architecture of this machine, as images name it.
pub fn architecture() -> String {
    oci::Platform::host().normalized().architecture
}

/// Bytes that no packer makes smaller, the same for the same seed.
pub fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut bytes = Vec::with_capacity(length + 8);
    while bytes.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        bytes.extend_from_slice(&state.wrapping_mul(0x2545_f491_4f6c_dd1d).to_le_bytes());
    }
    bytes.truncate(length);
    bytes
}

/// gantryd, whose patience with registries ends soon, so that tests need not wait for it. Not started.
pub fn impatient() -> Host {
    let mut host = Host::new(Kind::Gantry);
    let config = host.folder().join("config.toml");
    fs::write(&config, format!("version = 3\n[debug]\nlevel = 'debug'\n{IMPATIENT}")).unwrap();
    host.arguments = vec!["--config".to_owned(), config.display().to_string()];
    host
}

/// The settings of an engine that is [`impatient`].
const IMPATIENT: &str =
    "[plugins.'io.containerd.transfer.v1.local']\nregistry_timeout = '1s'\nregistry_attempts = 3\n";

/// What everybody sees of images, and what they are made of.
pub fn kept(host: &Host) -> String {
    let (ctr, stock) = (host.ctr(), host.stock_ctr());
    let lists: [&[&str]; 3] = [&["images", "ls", "-q"], &["content", "ls", "-q"], &["content", "active"]];
    let lists = lists.map(|arguments| stock.ok(arguments));
    format!("{}\n{}", lists.join("\n"), ctr.ok(&["snapshots", "ls"]))
}

/// Collects what nothing holds but the leases of transfers that did not end, as if these had expired.
pub fn collect(host: &Host) {
    let ctr = host.ctr();
    for lease in ctr.ok(&["leases", "ls", "-q"]).lines() {
        ctr.ok(&["leases", "rm", lease]);
    }
    ctr.ok(&["gc"]);
}

/// Takes away what interrupted pulls would go on with, as if its day were over.
pub fn abandon(host: &Host) {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let mut content = ContentClient::new(channel(&host.address()).await);
        let list = in_namespace(&host.namespace, ListStatusesRequest::default());
        for status in content.list_statuses(list).await.unwrap().into_inner().statuses {
            let abort = AbortRequest { r#ref: status.r#ref };
            content.abort(in_namespace(&host.namespace, abort)).await.unwrap();
        }
    });
}

/// The pieces of blobs that were begun and are not finished, on disk: reference and length of each.
pub fn ingests(host: &Host) -> Vec<(String, u64)> {
    let folder = host.root().join("io.containerd.content.v1.content/ingest");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    // One that is finished in between is none.
    entries
        .filter_map(|entry| {
            let reference = fs::read_to_string(entry.path().join("ref")).ok()?;
            Some((reference, fs::metadata(entry.path().join("data")).ok()?.len()))
        })
        .collect()
}

/// The finished blobs, by their files: each is read, and is what its name says.
pub fn blobs(host: &Host) -> Vec<String> {
    let folder = host.root().join("io.containerd.content.v1.content/blobs/sha256");
    let entries = fs::read_dir(folder).into_iter().flatten().flatten();
    entries
        .map(|entry| {
            let digest = format!("sha256:{}", entry.file_name().to_str().unwrap());
            assert_eq!(Digest::sha256_of(&fs::read(entry.path()).unwrap()).to_string(), digest);
            digest
        })
        .collect()
}
