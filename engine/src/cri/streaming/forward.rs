//! Port forwarding: each connection to a port of a pod is a pair of streams, one for its bytes and one for what went wrong.
//!
//! ```text
//!  SPDY        headers port, streamType: data or error, requestID: the same for both
//!  WebSocket   2n data, 2n+1 error for the n-th port asked for; each begins with the port, as two bytes, the lower one first
//! ```

use std::collections::HashMap;
use std::time::Duration;

use tokio::task::JoinSet;
use tokio::time::Instant;

use super::link::{Connection, Stream};
use super::spdy::frame::Reset;
use super::websocket::Format;
use crate::cri::exec::Execs;

/// How long a client may take to open the other stream of a pair.
const PAIR_LIMIT: Duration = Duration::from_secs(30);

/// What is spoken over SPDY.
pub(super) const SPDY: &[(&str, ())] = &[("portforward.k8s.io", ())];

/// How a WebSocket carries streams.
#[derive(Debug, Clone, Copy)]
pub(super) enum Carried {
    /// Those of SPDY.
    Tunnel,
    /// By number.
    Numbered(Format),
}

/// What is spoken over a WebSocket.
pub(super) const WEBSOCKET: &[(&str, Carried)] = &[
    ("SPDY/3.1+portforward.k8s.io", Carried::Tunnel),
    ("v4.channel.k8s.io", Carried::Numbered(Format::Binary)),
    ("v4.base64.channel.k8s.io", Carried::Numbered(Format::Base64)),
    ("", Carried::Numbered(Format::Binary)),
];

/// What a client asked for.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) pod: String,
    /// For a WebSocket alone; over SPDY each stream says its own.
    pub(super) ports: Vec<u16>,
}

/// The half of a pair that has come.
struct Half {
    stream: Stream,
    port: u16,
    is_data: bool,
    until: Instant,
}

/// Serves a client that speaks SPDY.
pub(super) async fn spdy(mut connection: Connection, wanted: Wanted, execs: Execs) {
    let mut halves = HashMap::<String, Half>::new();
    let mut running = JoinSet::new();
    loop {
        let first = halves.values().map(|half| half.until).min();
        let late = async {
            match first {
                Some(until) => tokio::time::sleep_until(until).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            stream = connection.next() => {
                let Some(stream) = stream else { break };
                let Some((request, half)) = half_of(stream).await else { continue };
                match halves.remove(&request) {
                    None => drop(halves.insert(request, half)),
                    Some(other) if other.is_data == half.is_data => {
                        half.stream.output.reset(Reset::Refused).await;
                        halves.insert(request, other);
                    }
                    Some(other) => {
                        let (data, error) = if half.is_data { (half, other) } else { (other, half) };
                        running.spawn(forward(execs.clone(), wanted.pod.clone(), data.port, data.stream, error.stream));
                    }
                }
            }
            () = late => {
                let now = Instant::now();
                for (_, half) in halves.extract_if(|_, half| half.until <= now) {
                    half.stream.output.leave().await;
                }
            }
            Some(_) = running.join_next() => {}
        }
    }
    // Whoever still waits for a pod's answer has nobody to give it to.
    drop(running);
    connection.finish().await;
}

/// What a stream is for; None when it does not say so rightly, and is refused.
async fn half_of(stream: Stream) -> Option<(String, Half)> {
    let header = |name: &str| stream.headers.get(name).map(String::as_str);
    let port = header("port").and_then(|port| port.parse().ok()).filter(|port| *port != 0);
    let is_data = match header("streamtype") {
        Some("data") => Some(true),
        Some("error") => Some(false),
        _ => None,
    };
    let (Some(port), Some(is_data)) = (port, is_data) else {
        stream.output.reset(Reset::Refused).await;
        return None;
    };
    // Old clients name no request: they open the error stream and then, as the next one, that of the data.
    let of_old = || if is_data { stream.id.saturating_sub(2) } else { stream.id }.to_string();
    let request = header("requestid").map_or_else(of_old, str::to_owned);
    stream.output.accept().await;
    Some((request, Half { stream, port, is_data, until: Instant::now() + PAIR_LIMIT }))
}

/// Serves a client that speaks over a WebSocket, whose streams are in the order of the ports.
pub(super) async fn websocket(connection: Connection, streams: Vec<Stream>, wanted: Wanted, execs: Execs) {
    let mut running = JoinSet::new();
    let mut streams = streams.into_iter();
    for port in wanted.ports {
        let (Some(data), Some(error)) = (streams.next(), streams.next()) else { break };
        for stream in [&data, &error] {
            let _ = stream.output.send(port.to_le_bytes().to_vec().into()).await;
        }
        running.spawn(forward(execs.clone(), wanted.pod.clone(), port, data, error));
    }
    let over = connection.over();
    let all = async { while running.join_next().await.is_some() {} };
    tokio::select! {
        () = all => {}
        () = over.cancelled() => {}
    }
    connection.finish().await;
}

async fn forward(execs: Execs, pod: String, port: u16, data: Stream, error: Stream) {
    let Stream { input, output, .. } = data;
    let error = error.output;
    if let Err(failed) = execs.port_forward(&pod, port, input, &output).await {
        tracing::debug!(%failed, pod, port, "a port was not forwarded");
        let _ = error.send(failed.to_string().into()).await;
    }
    for output in [error, output] {
        output.end().await;
        output.leave().await;
    }
}
