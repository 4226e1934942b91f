//! The server as its clients meet it, up to where a container would be needed.

use std::io::{Read as _, Write as _};
use std::path::Path;

use super::super::exec::{Execs, Limits, Options};
use super::super::store::Store;
use super::*;
use crate::containers::Containers;
use crate::content::Content;
use crate::diff::Diff;
use crate::events::Exchange;
use crate::metadata::Metadata;
use crate::metadata::cri::{ContainerStage, PodContainerRecord, PodRecord, PodStage};
use crate::tasks::{Tasks, TasksOptions};

/// An engine's parts over a folder, with a container `running`, one that has `exited`, a pod that is `ready` and one that is `stopped`.
async fn execs(dir: &Path) -> Execs {
    let dir = dir.to_owned();
    let opened = tokio::task::spawn_blocking(move || {
        let metadata = Metadata::open(&dir.join("metadata")).unwrap();
        let events = Exchange::open(&dir, 1 << 20, &metadata).unwrap();
        let content = Content::open(&dir.join("content"), metadata.clone(), events.clone()).unwrap();
        let diff = Diff::open(content, dir.join("mounts")).unwrap();
        let options = TasksOptions {
            root: dir.clone(),
            state: dir.join("state"),
            grpc_address: dir.join("e.sock"),
            ttrpc_address: dir.join("e.sock.ttrpc"),
            shim_dirs: Vec::new(),
            descriptors: None,
            hooks: Default::default(),
        };
        let tasks = Tasks::open(options, metadata.clone(), events.clone(), diff).unwrap();
        let containers = Containers::new(metadata.clone(), events);
        let store = Store::open(metadata);
        let options = Options { folder: dir.join("execs"), drain: None, limits: Limits::default() };
        (Execs::new(options, store.clone(), tasks, containers).unwrap(), store)
    });
    let (execs, store) = opened.await.unwrap();
    for (id, stage) in [("running", ContainerStage::Running), ("exited", ContainerStage::Exited)] {
        let record = PodContainerRecord { pod: "ready".into(), stage: stage.into(), ..Default::default() };
        store.add_container(id, record).await.unwrap();
    }
    for (id, stage) in [("ready", PodStage::Ready), ("stopped", PodStage::Stopped)] {
        store.add_pod(id, PodRecord { stage: stage.into(), ..Default::default() }).await.unwrap();
    }
    execs
}

async fn server(dir: &Path, tls: Tls) -> Server {
    Server::start(Settings { tls, ..Settings::default() }, execs(dir).await).await.unwrap()
}

fn exec(container: &str) -> ExecRequest {
    ExecRequest { container_id: container.into(), cmd: vec!["id".into()], stdout: true, ..Default::default() }
}

/// Sends a request, and reads the head of the answer.
async fn ask(url: &str, method: &str, headers: &str) -> String {
    let (host, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
    let (host, request) =
        (host.to_owned(), format!("{method} /{path} HTTP/1.1\r\nHost: {host}\r\n{headers}\r\n"));
    let asked = tokio::task::spawn_blocking(move || {
        let mut stream = std::net::TcpStream::connect(host).unwrap();
        stream.write_all(request.as_bytes()).unwrap();
        let mut answer = Vec::new();
        while !answer.windows(4).any(|end| end == b"\r\n\r\n") {
            let mut byte = [0];
            assert_eq!(stream.read(&mut byte).unwrap(), 1, "{:?}", String::from_utf8_lossy(&answer));
            answer.push(byte[0]);
        }
        String::from_utf8(answer).unwrap()
    });
    asked.await.unwrap()
}

const SPDY_UPGRADE: &str =
    "Connection: Upgrade\r\nUpgrade: SPDY/3.1\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n";
const WEBSOCKET_UPGRADE: &str = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
    Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";

#[tokio::test(flavor = "multi_thread")]
async fn an_address_is_good_once_for_what_it_was_given_for() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), Tls::Off).await;
    for method in ["GET", "POST"] {
        let url = server.exec_url(exec("running")).unwrap();
        assert!(url.starts_with("http://127.0.0.1:"), "{url}");
        let answer = ask(&url, method, SPDY_UPGRADE).await;
        assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
        assert!(answer.contains("\r\nUpgrade: SPDY/3.1\r\n"), "{answer}");
        assert!(answer.contains("\r\nX-Stream-Protocol-Version: v4.channel.k8s.io\r\n"), "{answer}");
        assert!(ask(&url, method, SPDY_UPGRADE).await.starts_with("HTTP/1.1 404 "));
    }
    let url = server.exec_url(exec("running")).unwrap();
    assert!(ask(&url.replace("/exec/", "/attach/"), "GET", SPDY_UPGRADE).await.starts_with("HTTP/1.1 404 "));
    assert!(ask(&url, "GET", SPDY_UPGRADE).await.starts_with("HTTP/1.1 404 "), "it was asked for");
    let url = server.exec_url(exec("running")).unwrap();
    assert!(ask(&url, "PUT", SPDY_UPGRADE).await.starts_with("HTTP/1.1 405 "));
    assert!(ask(&url, "GET", "").await.starts_with("HTTP/1.1 400 "));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_websocket_speaks_the_version_that_was_chosen() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), Tls::Off).await;
    let forward = PortForwardRequest { pod_sandbox_id: "ready".into(), port: vec![80, 81] };
    for (url, wanted, chosen) in [
        (
            server.exec_url(exec("running")).unwrap(),
            "v5.channel.k8s.io, v4.channel.k8s.io",
            "v5.channel.k8s.io",
        ),
        (server.exec_url(exec("running")).unwrap(), "base64.channel.k8s.io", "base64.channel.k8s.io"),
        (
            server.port_forward_url(forward.clone()).unwrap(),
            "SPDY/3.1+portforward.k8s.io",
            "SPDY/3.1+portforward.k8s.io",
        ),
    ] {
        let headers = format!("{WEBSOCKET_UPGRADE}Sec-WebSocket-Protocol: {wanted}\r\n");
        let answer = ask(&url, "GET", &headers).await;
        assert!(answer.starts_with("HTTP/1.1 101 "), "{answer}");
        assert!(answer.contains(&format!("\r\nSec-Websocket-Protocol: {chosen}\r\n")), "{answer}");
    }
    let url = server.port_forward_url(forward).unwrap();
    let headers = format!("{WEBSOCKET_UPGRADE}Sec-WebSocket-Protocol: v5.channel.k8s.io\r\n");
    assert!(ask(&url, "GET", &headers).await.starts_with("HTTP/1.1 403 "));
}

#[tokio::test(flavor = "multi_thread")]
async fn what_cannot_be_streamed_has_no_address() {
    let dir = tempfile::tempdir().unwrap();
    let server = server(dir.path(), Tls::Off).await;
    let refused = |request| server.exec_url(request).unwrap_err();
    assert!(matches!(refused(exec("none")), Error::NotFound(_)));
    assert!(matches!(refused(exec("")), Error::InvalidArgument(_)));
    assert!(matches!(refused(exec("exited")), Error::FailedPrecondition(_)));
    assert!(matches!(refused(ExecRequest { stdout: false, ..exec("running") }), Error::InvalidArgument(_)));
    let both = ExecRequest { tty: true, stderr: true, ..exec("running") };
    assert!(matches!(refused(both), Error::InvalidArgument(_)));
    assert!(
        server
            .attach_url(AttachRequest { container_id: "exited".into(), stdin: true, ..Default::default() })
            .is_err()
    );
    let forward = |pod: &str, port| {
        server.port_forward_url(PortForwardRequest { pod_sandbox_id: pod.into(), port }).unwrap_err()
    };
    assert!(matches!(forward("stopped", vec![80]), Error::FailedPrecondition(_)));
    assert!(matches!(forward("ready", vec![65536]), Error::InvalidArgument(_)));
    assert!(matches!(forward("ready", vec![0]), Error::InvalidArgument(_)));
    let elsewhere = Settings { address: "somewhere".into(), ..Settings::default() };
    let other = tempfile::tempdir().unwrap();
    assert!(Server::start(elsewhere, execs(other.path()).await).await.is_err());
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_spoken_with_a_certificate_of_ones_own_or_a_given_one() {
    let dir = tempfile::tempdir().unwrap();
    let (certificate, key) = (dir.path().join("cert.pem"), dir.path().join("key.pem"));
    let made = rcgen::generate_simple_self_signed(["127.0.0.1".to_owned()]).unwrap();
    std::fs::write(&certificate, made.cert.pem()).unwrap();
    std::fs::write(&key, made.signing_key.serialize_pem()).unwrap();
    let pair = Tls::Pair { certificate: certificate.clone(), key };
    for tls in [pair, Tls::SelfMade] {
        let given = tls != Tls::SelfMade;
        let dir = tempfile::tempdir().unwrap();
        let url = server(dir.path(), tls).await.exec_url(exec("running")).unwrap();
        assert!(url.starts_with("https://127.0.0.1:"), "{url}");
        let provider = Arc::new(rustls::crypto::ring::default_provider());
        let mut trusted = rustls::RootCertStore::empty();
        trusted.add(made.cert.der().clone()).unwrap();
        let config = rustls::ClientConfig::builder_with_provider(provider)
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(trusted)
            .with_no_client_auth();
        let address = url.split('/').nth(2).unwrap().to_owned();
        let stream = TcpStream::connect(&address).await.unwrap();
        let name = rustls::pki_types::ServerName::try_from("127.0.0.1").unwrap();
        let connected = tokio_rustls::TlsConnector::from(Arc::new(config)).connect(name, stream).await;
        // That of the server's own making is trusted by nobody.
        assert_eq!(connected.is_ok(), given, "{:?}", connected.err());
        if let Ok(mut stream) = connected {
            use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
            let path = url.split_once(&address).unwrap().1;
            let request = format!("POST {path} HTTP/1.1\r\nHost: {address}\r\n{SPDY_UPGRADE}\r\n");
            stream.write_all(request.as_bytes()).await.unwrap();
            let mut answer = [0; 12];
            stream.read_exact(&mut answer).await.unwrap();
            assert_eq!(&answer, b"HTTP/1.1 101");
        }
    }
    let none = Tls::Pair { certificate: dir.path().join("none"), key: certificate };
    let other = tempfile::tempdir().unwrap();
    let settings = Settings { tls: none, ..Settings::default() };
    assert!(Server::start(settings, execs(other.path()).await).await.is_err());
}
