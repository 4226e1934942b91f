//! Where exec, attach and port-forward are served: over HTTP, by SPDY/3.1 or a WebSocket, to whoever knows a token.
//!
//! ```text
//!  kubelet --gRPC Exec--> exec_url: http://ADDRESS:PORT/exec/TOKEN
//!  kubelet --GET|POST /{exec,attach,portforward}/TOKEN, Upgrade--> handshake --101--> spdy | websocket
//!                                                                                        |
//!                                                        link: streams      <------------'
//!                                                        remote, forward    --> exec::Execs
//! ```
//!
//! Invariants: what is asked for here was asked for over the engine's socket less than a minute before, and is given once. A connection
//! on which nothing moves ends. Nothing that a client sends can take more than its share: of memory, see [`link`], of time before
//! it has shown a token, of connections.

mod forward;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod handshake;
mod link;
mod remote;
mod spdy;
mod tls;
mod tokens;
mod websocket;

use std::convert::Infallible;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, UdpSocket};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::http::{Method, Request, StatusCode};
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use proto::runtime::v1::{AttachRequest, ExecRequest, PortForwardRequest};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio_rustls::TlsAcceptor;

pub(super) use self::link::{Input, Output, PIECE};

use self::forward::Carried;
use self::handshake::{Answer, refusal};
use self::remote::{Wanted, Work};
use self::tokens::Tokens;
use super::exec::Execs;
use crate::error::{Error, Result, blocking};

/// How long a client may take until it has asked for something.
const ASK_LIMIT: Duration = Duration::from_secs(10);
/// The most connections that have not asked for anything yet.
const ASKING: usize = 256;
/// The most ports that one address is for.
const PORTS: usize = 100;

/// Where and how streams are served.
#[derive(Debug, Clone)]
pub struct Settings {
    /// The address to listen at; empty for the one that the machine has to the outside.
    pub address: String,
    /// The port; 0 for any.
    pub port: u16,
    /// How long a connection may be still; zero for no limit.
    pub idle: Duration,
    /// Whether TLS is spoken.
    pub tls: Tls,
}

impl Default for Settings {
    fn default() -> Self {
        let idle = Duration::from_secs(4 * 60 * 60);
        Settings { address: "127.0.0.1".into(), port: 0, idle, tls: Tls::Off }
    }
}

/// Whether TLS is spoken.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Tls {
    /// It is not.
    Off,
    /// With a certificate made for this start.
    SelfMade,
    /// With these, as PEM.
    Pair {
        /// The certificate, and those that vouch for it.
        certificate: PathBuf,
        /// Its key.
        key: PathBuf,
    },
}

/// The server; cheap to clone. It serves until the engine ends.
#[derive(Clone)]
pub struct Server(Arc<Inner>);

struct Inner {
    execs: Execs,
    idle: Duration,
    tokens: Tokens<Asked>,
    /// What comes before /exec/TOKEN.
    base: String,
}

/// What a token is for.
enum Asked {
    Remote(Wanted),
    Forward(forward::Wanted),
}

impl Server {
    /// Listens, and serves what is asked of `execs`.
    pub async fn start(settings: Settings, execs: Execs) -> Result<Self> {
        let (address, tls, port) = (settings.address, settings.tls, settings.port);
        let ip = match address.is_empty() {
            true => outer_address(),
            false => address.parse().map_err(|error| {
                Error::invalid_argument(format!(
                    "{address:?}, of stream_server_address in the configuration, is no address: {error}"
                ))
            })?,
        };
        let acceptor = blocking(move || tls::acceptor(&tls, ip)).await?;
        let failed = |error: std::io::Error| {
            Error::unavailable(format!(
                "listen on {} for streams (stream_server_address and stream_server_port in the configuration): {error}",
                SocketAddr::new(ip, port)
            ))
        };
        let listener = TcpListener::bind((ip, port)).await.map_err(failed)?;
        let bound = listener.local_addr().map_err(failed)?;
        let scheme = if acceptor.is_some() { "https" } else { "http" };
        let base = format!("{scheme}://{bound}");
        tracing::info!(base, "serving streams");
        let server = Server(Arc::new(Inner { execs, idle: settings.idle, tokens: Tokens::default(), base }));
        tokio::spawn(server.clone().accept(listener, acceptor));
        Ok(server)
    }

    /// Where a command in a running container has its streams.
    pub fn exec_url(&self, request: ExecRequest) -> Result<String> {
        let ExecRequest { container_id, cmd, tty, stdin, stdout, stderr } = request;
        let (work, streams) = (Work::Exec(cmd), [stdin, stdout, stderr]);
        self.remote_url("exec", &container_id, work, tty, streams)
    }

    /// Where a running container has its own streams.
    pub fn attach_url(&self, request: AttachRequest) -> Result<String> {
        let AttachRequest { container_id, stdin, tty, stdout, stderr } = request;
        self.remote_url("attach", &container_id, Work::Attach, tty, [stdin, stdout, stderr])
    }

    fn remote_url(
        &self,
        verb: &str,
        container: &str,
        work: Work,
        terminal: bool,
        [stdin, stdout, stderr]: [bool; 3],
    ) -> Result<String> {
        if terminal && stderr {
            return Err(Error::invalid_argument(
                "a terminal has one output, so that tty and stderr cannot be had together",
            ));
        }
        if !(stdin || stdout || stderr) {
            return Err(Error::invalid_argument("none of stdin, stdout and stderr is asked for"));
        }
        let container = self.0.execs.running(container)?.id.clone();
        self.url(verb, Asked::Remote(Wanted { container, work, terminal, stdin, stdout, stderr }))
    }

    /// Where ports of a pod are.
    pub fn port_forward_url(&self, request: PortForwardRequest) -> Result<String> {
        let PortForwardRequest { pod_sandbox_id, port } = request;
        let pod = self.0.execs.ready(&pod_sandbox_id)?.id.clone();
        if port.len() > PORTS {
            return Err(Error::invalid_argument(format!("at most {PORTS} ports are forwarded at a time")));
        }
        let ports = port.into_iter().map(|port| {
            u16::try_from(port)
                .ok()
                .filter(|port| *port != 0)
                .ok_or_else(|| Error::invalid_argument(format!("{port} is no port")))
        });
        let ports = ports.collect::<Result<_>>()?;
        self.url("portforward", Asked::Forward(forward::Wanted { pod, ports }))
    }

    fn url(&self, verb: &str, asked: Asked) -> Result<String> {
        let token = self.0.tokens.give(asked, Instant::now())?;
        Ok(format!("{}/{verb}/{token}", self.0.base))
    }

    async fn accept(self, listener: TcpListener, acceptor: Option<TlsAcceptor>) {
        let asking = Arc::new(Semaphore::new(ASKING));
        loop {
            let Ok(permit) = asking.clone().acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    // Descriptors may be used up; they come back.
                    tracing::warn!(%error, "a connection for streams was not accepted");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            };
            let (server, acceptor) = (self.clone(), acceptor.clone());
            tokio::spawn(async move {
                let asked = server.ask(stream, acceptor);
                if let Ok(Err(error)) = tokio::time::timeout(ASK_LIMIT, asked).await {
                    tracing::debug!(error, "a connection for streams failed");
                }
                drop(permit);
            });
        }
    }

    /// Answers the one request of a connection.
    async fn ask(self, stream: TcpStream, acceptor: Option<TlsAcceptor>) -> Result<(), String> {
        let _ = stream.set_nodelay(true);
        match acceptor {
            Some(acceptor) => {
                let stream = acceptor.accept(stream).await.map_err(|error| error.to_string())?;
                self.answer(stream).await
            }
            None => self.answer(stream).await,
        }
    }

    async fn answer(
        self,
        stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    ) -> Result<(), String> {
        let service = service_fn(move |request| {
            let server = self.clone();
            async move { Ok::<_, Infallible>(server.handle(request)) }
        });
        http1::Builder::new()
            .timer(TokioTimer::new())
            .header_read_timeout(ASK_LIMIT)
            .title_case_headers(true)
            .serve_connection(TokioIo::new(stream), service)
            .with_upgrades()
            .await
            .map_err(|error| error.to_string())
    }

    fn handle(&self, request: Request<Incoming>) -> Answer {
        if ![Method::GET, Method::POST].contains(request.method()) {
            return refusal(StatusCode::METHOD_NOT_ALLOWED, "ask by GET or POST".into());
        }
        let verb_and_token = request.uri().path().strip_prefix('/').and_then(|path| path.split_once('/'));
        let asked = verb_and_token
            .and_then(|(verb, token)| Some((verb, self.0.tokens.take(token, Instant::now())?)))
            .filter(|(verb, asked)| *verb == asked.verb());
        match asked {
            Some((_, Asked::Remote(wanted))) => self.remote(wanted, request),
            Some((_, Asked::Forward(wanted))) => self.forward(wanted, request),
            None => refusal(
                StatusCode::NOT_FOUND,
                "no stream is to be had here: an address is good once, and for a minute".into(),
            ),
        }
    }

    fn remote(&self, wanted: Wanted, request: Request<Incoming>) -> Answer {
        let (execs, idle) = (self.0.execs.clone(), self.0.idle);
        if handshake::is_websocket(request.headers()) {
            let (chosen, answer) = handshake::websocket(request.headers(), remote::WEBSOCKET);
            if let Some((format, dialect)) = chosen {
                upgraded(request, async move |io| {
                    let (connection, streams) = websocket::serve(io, format, remote::CHANNELS, idle);
                    remote::websocket(connection, streams, wanted, dialect, execs).await;
                });
            }
            return answer;
        }
        let (chosen, answer) = handshake::spdy(request.headers(), remote::SPDY);
        if let Some(dialect) = chosen {
            upgraded(request, async move |io| {
                remote::spdy(spdy::serve(io, idle), wanted, dialect, execs).await;
            });
        }
        answer
    }

    fn forward(&self, wanted: forward::Wanted, request: Request<Incoming>) -> Answer {
        let (execs, idle) = (self.0.execs.clone(), self.0.idle);
        if handshake::is_websocket(request.headers()) {
            let (chosen, answer) = handshake::websocket(request.headers(), forward::WEBSOCKET);
            match chosen {
                Some(Carried::Tunnel) => upgraded(request, async move |io| {
                    forward::spdy(spdy::serve(websocket::tunnel(io), idle), wanted, execs).await;
                }),
                Some(Carried::Numbered(format)) => upgraded(request, async move |io| {
                    // At most 200, since there are not more ports.
                    let streams = 2 * wanted.ports.len() as u8;
                    let (connection, streams) = websocket::serve(io, format, streams, idle);
                    forward::websocket(connection, streams, wanted, execs).await;
                }),
                None => {}
            }
            return answer;
        }
        let (chosen, answer) = handshake::spdy(request.headers(), forward::SPDY);
        if chosen.is_some() {
            upgraded(request, async move |io| forward::spdy(spdy::serve(io, idle), wanted, execs).await);
        }
        answer
    }
}

impl Asked {
    fn verb(&self) -> &'static str {
        match self {
            Asked::Remote(Wanted { work: Work::Exec(_), .. }) => "exec",
            Asked::Remote(Wanted { work: Work::Attach, .. }) => "attach",
            Asked::Forward(_) => "portforward",
        }
    }
}

/// A connection that has left HTTP.
type Upgraded = TokioIo<hyper::upgrade::Upgraded>;

/// Serves a connection when its answer has been sent.
fn upgraded<F: Future<Output = ()> + Send>(
    request: Request<Incoming>,
    serve: impl FnOnce(Upgraded) -> F + Send + 'static,
) {
    tokio::spawn(async move {
        match hyper::upgrade::on(request).await {
            Ok(io) => serve(TokioIo::new(io)).await,
            Err(error) => tracing::debug!(%error, "a client went before its streams were served"),
        }
    });
}

/// The address that the machine would send from; that of itself alone when there is no way to anywhere.
fn outer_address() -> IpAddr {
    // Nothing is sent: the kernel chooses the address by its routes. The other one is of a network for documents.
    let chosen = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).and_then(|socket| {
        socket.connect((Ipv4Addr::new(192, 0, 2, 1), 9))?;
        socket.local_addr()
    });
    chosen.map_or(IpAddr::V4(Ipv4Addr::LOCALHOST), |address| address.ip())
}

#[cfg(test)]
mod tests;
