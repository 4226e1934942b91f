//! Repositories against servers that misbehave, and against Debian's registry.

use std::collections::HashMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::Duration;

use async_trait::async_trait;
use axum::Router;
use axum::body::Body as Answer;
use axum::extract::{Request, State};
use axum::http::Response;
use bytes::Bytes;
use oci::image::{Descriptor, media_type};
use parking_lot::Mutex;

use super::*;
use crate::error::Error;

/// A request that a server has seen.
#[derive(Clone, Debug)]
struct Seen {
    method: String,
    path: String,
    query: String,
    headers: HashMap<String, String>,
}

impl Seen {
    fn header(&self, name: &str) -> &str {
        self.headers.get(name).map_or("", String::as_str)
    }
}

type Handler = Arc<dyn Fn(&Seen, usize) -> Response<Answer> + Send + Sync>;

/// A server on loopback that answers as a closure says, and notes what it was asked.
struct Server {
    address: SocketAddr,
    seen: Arc<Mutex<Vec<Seen>>>,
    task: tokio::task::JoinHandle<()>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Server {
    async fn start(handler: impl Fn(&Seen, usize) -> Response<Answer> + Send + Sync + 'static) -> Server {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let seen: Arc<Mutex<Vec<Seen>>> = Arc::default();
        let state = (Arc::new(handler) as Handler, seen.clone());
        async fn serve(
            State((handler, seen)): State<(Handler, Arc<Mutex<Vec<Seen>>>)>,
            request: Request,
        ) -> Response<Answer> {
            let headers = request.headers().iter();
            let headers = headers.map(|(name, value)| {
                (name.as_str().to_owned(), value.to_str().unwrap_or_default().to_owned())
            });
            let one = Seen {
                method: request.method().to_string(),
                path: request.uri().path().to_owned(),
                query: request.uri().query().unwrap_or_default().to_owned(),
                headers: headers.collect(),
            };
            let number = {
                let mut seen = seen.lock();
                seen.push(one.clone());
                seen.len()
            };
            handler(&one, number)
        }
        let router = Router::new().fallback(serve).with_state(state);
        let task = tokio::spawn(async move {
            axum::serve(listener, router).await.unwrap();
        });
        Server { address, seen, task }
    }

    fn seen(&self) -> Vec<Seen> {
        self.seen.lock().clone()
    }

    fn host(&self) -> String {
        self.address.to_string()
    }
}

fn answer(status: u16, headers: &[(&str, &str)], body: impl Into<Answer>) -> Response<Answer> {
    let mut builder = Response::builder().status(status);
    for (name, value) in headers {
        builder = builder.header(*name, *value);
    }
    builder.body(body.into()).unwrap()
}

/// Limits that let tests fail soon.
fn limits() -> Limits {
    Limits {
        connect: Duration::from_secs(5),
        answer: Duration::from_millis(500),
        upload: Duration::from_secs(5),
        idle: Duration::from_millis(300),
        attempts: 3,
        resumptions: 3,
        backoff: Duration::from_millis(1),
        longest: Duration::from_secs(2),
        unhealthy: Duration::from_secs(60),
    }
}

fn remotes() -> Remotes {
    Remotes::new(Settings { limits: limits(), ..Settings::default() }).unwrap()
}

fn access(host: &str) -> Access {
    let reference = format!("{host}/team/app:1").parse().unwrap();
    Access { scheme: Some("http".into()), ..Access::anonymous(reference) }
}

fn repository(server: &Server) -> Repository {
    remotes().repository(access(&server.host())).unwrap()
}

async fn read(mut body: Body) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    while let Some(chunk) = body.chunk().await? {
        bytes.extend_from_slice(&chunk);
    }
    Ok(bytes)
}

fn blob(size: usize) -> (Vec<u8>, Descriptor) {
    let bytes: Vec<u8> = (0..size).map(|at| (at * 7 % 251) as u8).collect();
    let descriptor = Descriptor::of(media_type::OCI_LAYER, &bytes);
    (bytes, descriptor)
}

/// The first byte and the one after the last that a request asks for.
fn wanted(seen: &Seen, size: usize) -> (usize, usize) {
    match seen.header("range").strip_prefix("bytes=").and_then(|range| range.split_once('-')) {
        Some((first, last)) => (first.parse().unwrap(), last.parse::<usize>().unwrap() + 1),
        None => (0, size),
    }
}

/// A part of a blob, as a good host gives it, but for what `cut` leaves out at the end.
fn part(bytes: &[u8], seen: &Seen, cut: impl Fn(usize, usize) -> usize) -> Response<Answer> {
    let (first, end) = wanted(seen, bytes.len());
    let until = cut(first, end);
    let data = Bytes::copy_from_slice(&bytes[first..until]);
    let pieces = futures::stream::unfold((Some(data), until < end), |state| async move {
        match state {
            (Some(data), cut) => Some((Ok::<_, std::io::Error>(data), (None, cut))),
            (None, true) => {
                // What came before goes out once this side waits.
                for _ in 0..8 {
                    tokio::task::yield_now().await;
                }
                Some((Err(std::io::Error::other("cut")), (None, false)))
            }
            (None, false) => None,
        }
    });
    let range = format!("bytes {first}-{}/{}", end - 1, bytes.len());
    let length = (end - first).to_string();
    let body = Answer::from_stream(pieces);
    if seen.header("range").is_empty() {
        answer(200, &[("content-length", &length)], body)
    } else {
        answer(206, &[("content-length", &length), ("content-range", &range)], body)
    }
}

struct Fixed(Credential, AtomicUsize);

#[async_trait]
impl Credentials for Fixed {
    async fn ask(&self, _host: &str, _challenges: &[String]) -> Result<Credential> {
        self.1.fetch_add(1, Ordering::SeqCst);
        Ok(self.0.clone())
    }
}

fn password() -> Arc<Fixed> {
    let credential = Credential::Password { username: "me".into(), secret: "hunter2".into() };
    Arc::new(Fixed(credential, AtomicUsize::new(0)))
}

const MANIFEST: &str = r#"{"schemaVersion":2,"mediaType":"application/vnd.oci.image.manifest.v1+json","config":{"mediaType":"application/vnd.oci.image.config.v1+json","digest":"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855","size":0},"layers":[]}"#;

#[tokio::test]
async fn a_tag_is_resolved_by_head_alone_where_that_says_all() {
    let manifest = Descriptor::of(media_type::OCI_MANIFEST, MANIFEST.as_bytes());
    let digest = manifest.digest.to_string();
    let server = Server::start(move |_, _| {
        answer(
            200,
            &[("content-type", media_type::OCI_MANIFEST), ("docker-content-digest", &digest)],
            MANIFEST,
        )
    })
    .await;
    assert_eq!(repository(&server).resolve().await.unwrap(), manifest);
    let seen = server.seen();
    assert_eq!((seen.len(), seen[0].method.as_str()), (1, "HEAD"));
    assert_eq!(seen[0].path, "/v2/team/app/manifests/1");
    assert!(seen[0].header("accept").contains(media_type::OCI_INDEX) && seen[0].query.is_empty());
}

#[tokio::test]
async fn get_says_what_head_does_not() {
    let manifest = Descriptor::of(media_type::OCI_MANIFEST, MANIFEST.as_bytes());
    for (status, kind) in
        [(200, "application/json"), (405, "application/json"), (403, media_type::OCI_MANIFEST)]
    {
        let server = Server::start(move |seen, _| match seen.method.as_str() {
            "HEAD" => answer(status, &[("content-type", kind)], ""),
            _ => answer(200, &[("content-type", kind)], MANIFEST),
        })
        .await;
        assert_eq!(repository(&server).resolve().await.unwrap(), manifest, "{status}");
    }
}

#[tokio::test]
async fn answers_that_make_no_sense_are_errors_that_say_so() {
    let other = Descriptor::of("x", b"other").digest.to_string();
    type Case = (&'static str, Vec<(&'static str, String)>, String, &'static str);
    let cases: Vec<Case> = vec![
        ("html", vec![("content-type", "text/html; charset=x".into())], "<html>".into(), "HTML page"),
        ("digest", vec![("docker-content-digest", other.clone())], MANIFEST.into(), "have the digest"),
        (
            "no digest",
            vec![("docker-content-digest", "sha256:zz".into())],
            MANIFEST.into(),
            "Docker-Content-Digest",
        ),
        ("large", vec![], "x".repeat(5 << 20), "more than 4194304 bytes"),
        (
            "old",
            vec![("content-type", "application/vnd.docker.distribution.manifest.v1+prettyjws".into())],
            "{}".into(),
            "schema version 1",
        ),
        ("both", vec![], r#"{"schemaVersion":2,"manifests":[],"layers":[]}"#.into(), "both an image index"),
    ];
    for (name, headers, body, words) in cases {
        let server = Server::start(move |seen, _| {
            let headers: Vec<_> = headers.iter().map(|(name, value)| (*name, value.as_str())).collect();
            match seen.method.as_str() {
                "HEAD" => answer(405, &[], ""),
                _ => answer(200, &headers, body.clone()),
            }
        })
        .await;
        let error = repository(&server).resolve().await.unwrap_err().to_string();
        assert!(error.contains(words), "{name}: {error}");
    }
}

#[tokio::test]
async fn a_digest_may_be_of_a_plain_blob() {
    let (bytes, descriptor) = blob(10);
    let server = Server::start(move |seen, _| match seen.path.contains("/blobs/") {
        true => answer(200, &[("content-type", "application/octet-stream")], bytes.clone()),
        false => answer(404, &[], ""),
    })
    .await;
    let reference = format!("{}/team/app@{}", server.host(), descriptor.digest).parse().unwrap();
    let access = Access { reference, ..access(&server.host()) };
    let found = remotes().repository(access).unwrap().resolve().await.unwrap();
    assert_eq!((found.digest, found.size), (descriptor.digest, 10));
}

#[tokio::test]
async fn what_no_host_has_is_not_found_and_what_a_registry_says_is_told() {
    let server = Server::start(|_, _| answer(404, &[], "")).await;
    assert!(matches!(repository(&server).resolve().await, Err(Error::NotFound(_))));
    let server = Server::start(|_, _| {
        answer(403, &[], r#"{"errors":[{"code":"DENIED","message":"no\u0007 entry"}]}"#)
    })
    .await;
    let error = repository(&server).resolve().await.unwrap_err();
    assert!(matches!(&error, Error::PermissionDenied(text) if text.contains("DENIED: no entry")), "{error}");
}

#[tokio::test]
async fn a_body_that_breaks_is_taken_up_where_it_broke() {
    let (bytes, descriptor) = blob(10_000);
    let served = bytes.clone();
    let server = Server::start(move |seen, _| part(&served, seen, |first, end| end.min(first + 1000))).await;
    let repository = repository(&server);
    assert!(read(repository.fetch(&descriptor, 0, None).await.unwrap()).await.unwrap() == bytes);
    let ranges: Vec<String> = server.seen().iter().map(|seen| seen.header("range").to_owned()).collect();
    assert_eq!((ranges.len(), ranges[0].as_str(), ranges[1].as_str()), (10, "", "bytes=1000-9999"));
    let middle = repository.fetch(&descriptor, 4000, Some(2500)).await.unwrap();
    assert_eq!((middle.offset(), middle.is_ranged()), (4000, true));
    assert!(read(middle).await.unwrap() == bytes[4000..6500]);
}

#[tokio::test]
async fn a_host_that_ignores_ranges_begins_at_zero_and_is_skipped_when_it_breaks() {
    let (bytes, descriptor) = blob(5000);
    let served = bytes.clone();
    let server = Server::start(move |seen, number| {
        let whole = Seen { headers: HashMap::new(), ..seen.clone() };
        part(&served, &whole, |_, end| if number == 1 { 3000 } else { end })
    })
    .await;
    let repository = repository(&server);
    assert!(read(repository.fetch(&descriptor, 0, None).await.unwrap()).await.unwrap() == bytes);
    assert_eq!(server.seen().len(), 2);
    let body = repository.fetch(&descriptor, 1000, Some(500)).await.unwrap();
    assert_eq!((body.offset(), body.is_ranged()), (0, false));
    assert!(read(body).await.unwrap() == bytes[..1500]);
}

#[tokio::test]
async fn lies_about_lengths_and_ranges_are_refused() {
    let (bytes, descriptor) = blob(100);
    for (name, status, headers, length) in [
        ("long", 200, vec![], 101),
        ("short", 200, vec![], 99),
        ("another range", 206, vec![("content-range", "bytes 0-99/100")], 100),
        ("another size", 206, vec![("content-range", "bytes 10-99/200")], 90),
        ("no range", 206, vec![], 90),
        ("packed", 200, vec![("content-encoding", "gzip")], 100),
        ("html", 200, vec![("content-type", "text/html")], 100),
    ] {
        let body = bytes.iter().copied().cycle().take(length).collect::<Vec<u8>>();
        let server = Server::start(move |_, _| answer(status, &headers, body.clone())).await;
        assert!(repository(&server).fetch(&descriptor, 10, None).await.is_err(), "{name}");
    }
    // Without a length there is no lie before the end: no more than the blob's size is given.
    let served: Vec<u8> = bytes.iter().copied().cycle().take(1000).collect();
    let server = Server::start(move |_, _| {
        let pieces: Vec<std::result::Result<Bytes, std::io::Error>> = vec![Ok(Bytes::from(served.clone()))];
        answer(200, &[], Answer::from_stream(futures::stream::iter(pieces)))
    })
    .await;
    let body = repository(&server).fetch(&descriptor, 0, None).await.unwrap();
    assert!(read(body).await.unwrap() == bytes);
}

#[tokio::test]
async fn a_host_that_stalls_or_always_breaks_is_given_up() {
    let (bytes, descriptor) = blob(1000);
    let server = Server::start(move |seen, number| match number {
        1 => part(&bytes, seen, |_, _| 10),
        _ => part(&bytes, seen, |first, _| first),
    })
    .await;
    let body = repository(&server).fetch(&descriptor, 0, None).await.unwrap();
    let error = read(body).await.unwrap_err();
    assert!(matches!(&error, Error::Unavailable(text) if text.contains("10 of 1000 bytes")), "{error}");
    let silent = Server::start(|_, _| {
        let first = futures::stream::iter([Ok::<_, std::io::Error>(Bytes::from_static(b"x"))]);
        let never = futures::stream::pending();
        let body = Answer::from_stream(futures::StreamExt::chain(first, never));
        answer(200, &[("content-length", "1000")], body)
    })
    .await;
    let body = repository(&silent).fetch(&descriptor, 0, None).await.unwrap();
    let error = tokio::time::timeout(Duration::from_secs(30), read(body)).await.unwrap().unwrap_err();
    assert!(error.to_string().contains("sent nothing for"), "{error}");
}

#[tokio::test]
async fn busy_hosts_are_asked_again_and_the_number_is_bounded() {
    let (bytes, descriptor) = blob(10);
    let served = bytes.clone();
    let server = Server::start(move |seen, number| match number {
        1 => answer(429, &[("retry-after", "0")], ""),
        2 => answer(503, &[], ""),
        _ => part(&served, seen, |_, end| end),
    })
    .await;
    let body = repository(&server).fetch(&descriptor, 0, None).await.unwrap();
    assert!(read(body).await.unwrap() == bytes);
    let server = Server::start(|_, _| answer(500, &[], "oh")).await;
    let error = repository(&server).fetch(&descriptor, 0, None).await.err().unwrap();
    assert!(
        matches!(&error, Error::Unavailable(text) if text.contains("500") && text.contains("oh")),
        "{error}"
    );
    assert_eq!(server.seen().len(), 3);
}

#[tokio::test]
async fn credentials_and_headers_do_not_follow_a_redirect_to_another_host() {
    let (bytes, descriptor) = blob(100);
    let served = bytes.clone();
    let other = Server::start(move |seen, _| part(&served, seen, |_, end| end)).await;
    let there = format!("http://{}/somewhere?signature=secret", other.host());
    let server = Server::start(move |seen, _| match seen.header("authorization") {
        "" => answer(401, &[("www-authenticate", "Basic realm=x")], ""),
        _ => answer(307, &[("location", &there)], ""),
    })
    .await;
    let asked = password();
    let access = Access {
        headers: vec![("x-own".into(), "mine".into())],
        credentials: Some(asked.clone()),
        ..access(&server.host())
    };
    let repository = remotes().repository(access).unwrap();
    for _ in 0..2 {
        let body = repository.fetch(&descriptor, 50, None).await.unwrap();
        assert!(read(body).await.unwrap() == bytes[50..]);
    }
    for seen in other.seen() {
        assert_eq!((seen.header("authorization"), seen.header("x-own")), ("", ""));
        assert_eq!(seen.header("range"), "bytes=50-99");
    }
    assert_eq!(server.seen()[1].header("authorization"), "Basic bWU6aHVudGVyMg==");
    assert_eq!(server.seen()[1].header("x-own"), "mine");
    assert_eq!(asked.1.load(Ordering::SeqCst), 1, "asked for once");
}

#[tokio::test]
async fn redirects_end() {
    let (_, descriptor) = blob(10);
    let circle = Server::start(|seen, _| {
        answer(302, &[("location", if seen.path.ends_with("/a") { "/b" } else { "/a" })], "")
    })
    .await;
    let error = repository(&circle).fetch(&descriptor, 0, None).await.err().unwrap().to_string();
    assert!(error.contains("in a circle"), "{error}");
    let endless =
        Server::start(|_, number| answer(302, &[("location", &format!("/{number}?token=s3cret"))], "")).await;
    let error = repository(&endless).fetch(&descriptor, 0, None).await.err().unwrap().to_string();
    assert!(error.contains("more than 10 times") && !error.contains("s3cret"), "{error}");
    let strange = Server::start(|_, _| answer(302, &[("location", "ftp://x/")], "")).await;
    let error = repository(&strange).fetch(&descriptor, 0, None).await.err().unwrap().to_string();
    assert!(error.contains("ftp"), "{error}");
    let https: reqwest::Url = "https://a/".parse().unwrap();
    assert!(request::redirect(&https, "http://a/").is_err());
    assert_eq!(request::redirect(&https, "https://u:p@b/x#y").unwrap().as_str(), "https://b/x");
}

/// A token server: tokens are counted.
async fn token_server() -> Server {
    Server::start(|seen, number| match seen.method.as_str() {
        "POST" => answer(404, &[], ""),
        _ => answer(200, &[], format!(r#"{{"token":"token{number}","expires_in":300}}"#)),
    })
    .await
}

#[tokio::test]
async fn tokens_are_fetched_once_for_all_and_again_when_refused() {
    let (bytes, descriptor) = blob(100);
    let tokens = token_server().await;
    let challenge = format!(
        r#"Bearer realm="http://{}/token",service="s",scope="repository:team/app:pull""#,
        tokens.host()
    );
    let served = bytes.clone();
    // POST and GET are one token: the first is token2.
    let accepted = Arc::new(Mutex::new("Bearer token2".to_owned()));
    let accepts = accepted.clone();
    let server = Server::start(move |seen, _| {
        if seen.header("authorization") == *accepts.lock() {
            part(&served, seen, |_, end| end)
        } else {
            answer(401, &[("www-authenticate", &challenge)], "")
        }
    })
    .await;
    let remotes = remotes();
    let asked = password();
    let with = Access { credentials: Some(asked.clone()), ..access(&server.host()) };
    let repository = remotes.repository(with.clone()).unwrap();
    let fetches =
        (0..8).map(|_| async { read(repository.fetch(&descriptor, 0, None).await.unwrap()).await.unwrap() });
    assert!(futures::future::join_all(fetches).await.iter().all(|got| *got == bytes));
    assert_eq!(tokens.seen().len(), 2, "one POST, which is refused, and one GET");
    let get = &tokens.seen()[1];
    assert_eq!(get.query, "service=s&scope=repository%3Ateam%2Fapp%3Apull");
    assert_eq!(get.header("authorization"), "Basic bWU6aHVudGVyMg==");
    // Another transfer uses the same token.
    let repository = remotes.repository(with).unwrap();
    read(repository.fetch(&descriptor, 0, None).await.unwrap()).await.unwrap();
    assert_eq!(tokens.seen().len(), 2);
    // What the host does not take any more is replaced.
    *accepted.lock() = "Bearer token4".to_owned();
    assert!(read(repository.fetch(&descriptor, 0, None).await.unwrap()).await.unwrap() == bytes);
    assert_eq!(tokens.seen().len(), 4);
    assert_eq!(asked.1.load(Ordering::SeqCst), 2, "once per transfer");
}

#[tokio::test]
async fn a_host_that_never_takes_anything_is_not_asked_forever() {
    let tokens = token_server().await;
    let bearer = format!(r#"Bearer realm="http://{}/token""#, tokens.host());
    for challenge in [bearer.as_str(), "Basic realm=x", "Negotiate", "", "Bearer realm=\"ftp://x\""] {
        let challenge = challenge.to_owned();
        let server = Server::start(move |_, _| answer(401, &[("www-authenticate", &challenge)], "")).await;
        for credentials in [None, Some(password() as Arc<dyn Credentials>)] {
            let repository = remotes().repository(Access { credentials, ..access(&server.host()) }).unwrap();
            let error = repository.resolve().await.unwrap_err().to_string();
            assert!(!error.contains("hunter2") && !error.contains("aHVudGVyMg"), "{error}");
        }
        assert!(server.seen().len() <= 6, "{} requests", server.seen().len());
    }
    let header = Fixed(Credential::Header("Custom abc".into()), AtomicUsize::new(0));
    let server = Server::start(|_, _| answer(401, &[("www-authenticate", "Basic realm=x")], "")).await;
    let access = Access { credentials: Some(Arc::new(header)), ..access(&server.host()) };
    let error = remotes().repository(access).unwrap().resolve().await.unwrap_err();
    assert!(matches!(error, Error::PermissionDenied(_)), "{error}");
    let shown: Vec<String> =
        server.seen().iter().map(|seen| seen.header("authorization").to_owned()).collect();
    assert_eq!(shown, ["", "Custom abc"]);
}

fn hosts_folder(registry: &str, text: &str) -> tempfile::TempDir {
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir(folder.path().join(registry)).unwrap();
    std::fs::write(folder.path().join(registry).join("hosts.toml"), text).unwrap();
    folder
}

#[tokio::test]
async fn mirrors_are_asked_first_and_those_that_fail_later() {
    let (bytes, descriptor) = blob(100);
    let served = bytes.clone();
    let origin = Server::start(move |seen, _| part(&served, seen, |_, end| end)).await;
    let mirror = Server::start(|_, _| answer(502, &[], "")).await;
    let gone = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let dead = gone.local_addr().unwrap();
    drop(gone);
    let folder = hosts_folder(
        "example.test",
        &format!(
            "server = 'http://{}'\n[host.'http://{dead}']\ncapabilities = ['pull']\n\
             [host.'http://{}/cache']\n[host.'http://{}/cache'.header]\nx-mirror = ['1']\n",
            origin.host(),
            mirror.host(),
            mirror.host()
        ),
    );
    let remotes = remotes();
    let access = Access {
        hosts_dir: Some(folder.path().to_owned()),
        ..Access::anonymous("example.test/team/app:1".parse().unwrap())
    };
    let repository = remotes.repository(access.clone()).unwrap();
    assert!(read(repository.fetch(&descriptor, 0, None).await.unwrap()).await.unwrap() == bytes);
    let asked = &mirror.seen()[0];
    assert_eq!(asked.path, format!("/cache/v2/team/app/blobs/{}", descriptor.digest));
    assert_eq!((asked.query.as_str(), asked.header("x-mirror")), ("ns=example.test", "1"));
    let before = mirror.seen().len();
    read(remotes.repository(access).unwrap().fetch(&descriptor, 0, None).await.unwrap()).await.unwrap();
    assert_eq!(mirror.seen().len(), before, "it failed a moment ago");
    assert_eq!(origin.seen().len(), 2);
    assert!(
        origin.seen()[0].query.contains("ns=example.test") && origin.seen()[0].header("x-mirror").is_empty()
    );
}

#[tokio::test]
async fn a_body_goes_on_at_the_next_host() {
    let (bytes, descriptor) = blob(1000);
    let (one, other) = (bytes.clone(), bytes.clone());
    let mirror = Server::start(move |seen, number| match number {
        1 => part(&one, seen, |_, _| 400),
        _ => answer(500, &[], ""),
    })
    .await;
    let origin = Server::start(move |seen, _| part(&other, seen, |_, end| end)).await;
    let folder = hosts_folder(
        "example.test",
        &format!("server = 'http://{}'\n[host.'http://{}']\n", origin.host(), mirror.host()),
    );
    let access = Access {
        hosts_dir: Some(folder.path().to_owned()),
        ..Access::anonymous("example.test/team/app:1".parse().unwrap())
    };
    let repository = remotes().repository(access).unwrap();
    assert!(read(repository.fetch(&descriptor, 0, None).await.unwrap()).await.unwrap() == bytes);
    assert_eq!(origin.seen()[0].header("range"), "bytes=400-999");
}

#[tokio::test]
async fn localhost_talks_http_where_it_does_not_talk_tls() {
    let manifest = Descriptor::of(media_type::OCI_MANIFEST, MANIFEST.as_bytes());
    let server =
        Server::start(|_, _| answer(200, &[("content-type", media_type::OCI_MANIFEST)], MANIFEST)).await;
    let access = Access { scheme: None, ..access(&server.host()) };
    assert_eq!(remotes().repository(access).unwrap().resolve().await.unwrap(), manifest);
}

#[tokio::test]
async fn an_upload_elsewhere_is_not_shown_who_we_are() {
    let (bytes, descriptor) = blob(1000);
    let elsewhere = Server::start(|_, _| answer(201, &[], "")).await;
    let there = format!("http://{}/upload?state=1", elsewhere.host());
    let server = Server::start(move |seen, _| match (seen.header("authorization"), seen.method.as_str()) {
        ("", _) => answer(401, &[("www-authenticate", "Basic realm=x")], ""),
        (_, "HEAD") => answer(404, &[], ""),
        _ => answer(202, &[("location", &there)], ""),
    })
    .await;
    let access = Access { credentials: Some(password()), ..access(&server.host()) };
    let repository = remotes().repository(access).unwrap();
    let source = source(&bytes);
    let pushed = repository.push_blob(&descriptor, &source, &[]).await.unwrap();
    assert_eq!(pushed, Pushed::Uploaded);
    let put = &elsewhere.seen()[0];
    assert_eq!((put.method.as_str(), put.header("authorization")), ("PUT", ""));
    assert!(put.query.starts_with("state=1&digest=sha256%3A") && put.header("content-length") == "1000");
    assert_eq!(source.sent.load(Ordering::SeqCst), 1000);
}

/// A server that talks TLS and answers each request with the manifest; it ends with the test.
fn tls_server(certificate: &rcgen::CertifiedKey<rcgen::KeyPair>) -> SocketAddr {
    use std::io::{Read as _, Write as _};
    let key = rustls::pki_types::PrivateKeyDer::try_from(certificate.signing_key.serialize_der()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = rustls::ServerConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![certificate.cert.der().clone()], key)
        .unwrap();
    let (config, listener) = (Arc::new(config), std::net::TcpListener::bind("127.0.0.1:0").unwrap());
    let address = listener.local_addr().unwrap();
    std::thread::spawn(move || {
        for socket in listener.incoming().map_while(std::result::Result::ok) {
            let connection = rustls::ServerConnection::new(config.clone()).unwrap();
            let mut stream = rustls::StreamOwned::new(connection, socket);
            let mut head = Vec::new();
            let mut byte = [0];
            // A client that does not trust us ends it here.
            while !head.ends_with(b"\r\n\r\n") && matches!(stream.read(&mut byte), Ok(1)) {
                head.push(byte[0]);
            }
            let body = if head.starts_with(b"HEAD") { "" } else { MANIFEST };
            let _ = write!(
                stream,
                "HTTP/1.1 200 OK\r\ncontent-type: {}\r\nconnection: close\r\ncontent-length: {}\r\n\r\n{body}",
                media_type::OCI_MANIFEST,
                MANIFEST.len()
            );
            stream.conn.send_close_notify();
            let _ = stream.flush();
        }
    });
    address
}

#[tokio::test]
async fn a_private_authority_is_trusted_where_hosts_toml_says_so() {
    let certificate = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
    let address = tls_server(&certificate);
    let manifest = Descriptor::of(media_type::OCI_MANIFEST, MANIFEST.as_bytes());
    for (settings, trusted) in
        [("", false), ("skip_verify = true", true), ("ca = 'ca.pem'", true), ("ca = 'other.pem'", false)]
    {
        let folder = hosts_folder("example.test", &format!("server = 'https://{address}'\n{settings}\n"));
        let other = rcgen::generate_simple_self_signed(vec!["127.0.0.1".to_owned()]).unwrap();
        let write = |name: &str, text: String| {
            std::fs::write(folder.path().join("example.test").join(name), text).unwrap();
        };
        write("ca.pem", certificate.cert.pem());
        write("other.pem", other.cert.pem());
        let access = Access {
            hosts_dir: Some(folder.path().to_owned()),
            ..Access::anonymous("example.test/team/app:1".parse().unwrap())
        };
        match remotes().repository(access).unwrap().resolve().await {
            Ok(found) => assert!(trusted && found == manifest, "{settings}"),
            Err(error) => {
                assert!(!trusted, "{settings}: {error}");
                assert!(error.to_string().contains("TLS") && error.to_string().contains("`ca`"), "{error}");
            }
        }
    }
}

fn source(bytes: &[u8]) -> Source {
    let mut file = tempfile::tempfile().unwrap();
    std::io::Write::write_all(&mut file, bytes).unwrap();
    Source { file: Arc::new(file), sent: Arc::new(AtomicU64::new(0)) }
}

#[tokio::test]
async fn parts_go_on_where_the_host_says_that_it_stopped() {
    let (bytes, descriptor) = blob(1000);
    let server = Server::start(move |seen, _| {
        let location = ("location", "/upload/1");
        match (seen.method.as_str(), seen.header("content-range")) {
            ("HEAD", _) => answer(404, &[], ""),
            ("POST", _) => answer(202, &[location], ""),
            ("PATCH", "0-399") => answer(202, &[location, ("range", "0-399")], ""),
            ("PATCH", "400-799") => answer(503, &[], ""),
            ("GET", _) => answer(204, &[location, ("range", "0-599")], ""),
            ("PATCH", "600-999") => answer(202, &[location, ("range", "0-999")], ""),
            ("PUT", _) => answer(201, &[], ""),
            _ => answer(416, &[], ""),
        }
    })
    .await;
    let remotes =
        Remotes::new(Settings { limits: limits(), upload_chunk: 400, ..Settings::default() }).unwrap();
    let repository = remotes.repository(access(&server.host())).unwrap();
    assert_eq!(repository.push_blob(&descriptor, &source(&bytes), &[]).await.unwrap(), Pushed::Uploaded);
    let methods: Vec<String> = server.seen().iter().map(|seen| seen.method.clone()).collect();
    assert_eq!(methods, ["HEAD", "POST", "PATCH", "PATCH", "GET", "PATCH", "PUT"]);
}

#[tokio::test]
async fn a_host_that_stored_something_else_is_refused() {
    let (bytes, descriptor) = blob(10);
    let other = Descriptor::of("x", b"other").digest.to_string();
    let server = Server::start(move |seen, _| match seen.method.as_str() {
        "HEAD" => answer(404, &[], ""),
        "POST" => answer(202, &[("location", "/up")], ""),
        _ => answer(201, &[("docker-content-digest", &other)], ""),
    })
    .await;
    let error = repository(&server).push_blob(&descriptor, &source(&bytes), &[]).await.unwrap_err();
    assert!(error.to_string().contains("says that it stored"), "{error}");
}

/// Debian's registry on a port that the system chooses.
struct Registry {
    child: std::process::Child,
    address: SocketAddr,
    _folder: tempfile::TempDir,
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

impl Registry {
    async fn start() -> Option<Registry> {
        let program = std::path::Path::new("/usr/bin/docker-registry");
        if !program.exists() {
            assert!(std::env::var_os("GANTRY_TEST_ALL").is_none(), "docker-registry is not installed");
            eprintln!("skipped: docker-registry is not installed");
            return None;
        }
        let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
        let address = free.local_addr().unwrap();
        drop(free);
        let folder = tempfile::tempdir().unwrap();
        let config = folder.path().join("config.yml");
        let root = folder.path().join("data");
        std::fs::write(
            &config,
            format!(
                "version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {}\nhttp:\n  addr: {address}\n",
                root.display()
            ),
        )
        .unwrap();
        let null = std::process::Stdio::null;
        let child = std::process::Command::new(program)
            .arg("serve")
            .arg(&config)
            .stdout(null())
            .stderr(null())
            .spawn()
            .unwrap();
        let registry = Registry { child, address, _folder: folder };
        let deadline = Instant::now() + Duration::from_secs(30);
        while tokio::net::TcpStream::connect(address).await.is_err() {
            assert!(Instant::now() < deadline, "docker-registry does not start");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Some(registry)
    }
}

#[tokio::test]
async fn debians_registry_gives_back_what_it_was_given() {
    let Some(registry) = Registry::start().await else { return };
    let (bytes, descriptor) = blob(300_000);
    let config = Descriptor::of(media_type::OCI_CONFIG, b"{}");
    let remotes = Remotes::new(Settings { upload_chunk: 100_000, ..Settings::default() }).unwrap();
    let at = |name: &str| {
        let reference = format!("{}/{name}", registry.address).parse().unwrap();
        // https is tried first, as for every port of this machine.
        remotes.repository(Access::anonymous(reference)).unwrap()
    };
    let repository = at("team/app:1");
    assert!(matches!(repository.resolve().await, Err(Error::NotFound(_))));
    assert_eq!(repository.push_blob(&descriptor, &source(&bytes), &[]).await.unwrap(), Pushed::Uploaded);
    assert_eq!(repository.push_blob(&descriptor, &source(&bytes), &[]).await.unwrap(), Pushed::Exists);
    assert_eq!(repository.push_blob(&config, &source(b"{}"), &[]).await.unwrap(), Pushed::Uploaded);
    let document = serde_json::to_vec(&oci::image::Manifest {
        schema_version: 2,
        media_type: Some(media_type::OCI_MANIFEST.into()),
        config: config.clone(),
        layers: vec![descriptor.clone()],
        annotations: oci::image::Annotations::new(),
    })
    .unwrap();
    let manifest = Descriptor::of(media_type::OCI_MANIFEST, &document);
    let put = |by_tag| repository.push_manifest(&manifest, Bytes::from(document.clone()), by_tag);
    assert_eq!(put(true).await.unwrap(), Pushed::Uploaded);
    assert_eq!(put(true).await.unwrap(), Pushed::Exists);
    assert_eq!(put(false).await.unwrap(), Pushed::Exists);
    assert_eq!(repository.resolve().await.unwrap(), manifest);
    let by_digest = at(&format!("team/app@{}", manifest.digest));
    assert_eq!(by_digest.resolve().await.unwrap(), manifest);
    assert!(read(repository.fetch(&manifest, 0, None).await.unwrap()).await.unwrap() == document);
    assert!(read(repository.fetch(&descriptor, 0, None).await.unwrap()).await.unwrap() == bytes);
    let middle = repository.fetch(&descriptor, 123_456, Some(1000)).await.unwrap();
    assert_eq!(middle.offset(), 123_456);
    assert!(read(middle).await.unwrap() == bytes[123_456..124_456]);
    let other = at("team/other:1");
    let from = ["team/app".to_owned()];
    let mounted = other.push_blob(&descriptor, &source(&bytes), &from).await.unwrap();
    assert_eq!(mounted, Pushed::Mounted("team/app".into()));
    let missing = Descriptor::of("x", b"missing");
    assert!(matches!(repository.fetch(&missing, 0, None).await, Err(Error::NotFound(_))));
}
