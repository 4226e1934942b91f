//! Exec and attach: the streams of a process, told apart by what they are for.
//!
//! ```text
//!  SPDY        header streamType: error, stdin, stdout, stderr, resize; the client opens those it asked for
//!  WebSocket   0 stdin, 1 stdout, 2 stderr, 3 error, 4 resize
//!
//!  resize      {"Width":80,"Height":24} after {"Width":..}
//!  error       from v4 on a Status as JSON, at the end; before, a sentence, and nothing when all went well
//! ```

use std::time::Duration;

use serde::Deserialize;
use serde_json::json;
use tokio::sync::watch;

use super::link::{Connection, Input, Output, Stream};
use super::spdy::frame::Reset;
use super::websocket::Format;
use crate::cri::exec::{Execs, Size, Streams};
use crate::error::Result;

/// How long a client may take to open the streams that it asked for.
const OPEN_LIMIT: Duration = Duration::from_secs(30);
/// What may come on a resize stream before it makes a size.
const RESIZE_MAX: usize = 4096;

/// What a client asked for.
#[derive(Debug)]
pub(super) struct Wanted {
    pub(super) container: String,
    pub(super) work: Work,
    pub(super) terminal: bool,
    pub(super) stdin: bool,
    pub(super) stdout: bool,
    pub(super) stderr: bool,
}

/// Whose streams they are.
#[derive(Debug)]
pub(super) enum Work {
    /// A process of its own, with these arguments.
    Exec(Vec<String>),
    /// The container's first process.
    Attach,
}

/// In what the versions of the protocol differ.
#[derive(Debug, Clone, Copy)]
pub(super) struct Dialect {
    /// Terminals have a stream for their size.
    resizes: bool,
    /// The end is told as JSON.
    json: bool,
}

const V1: Dialect = Dialect { resizes: false, json: false };
const V3: Dialect = Dialect { resizes: true, json: false };
const V4: Dialect = Dialect { resizes: true, json: true };

/// What is spoken over SPDY.
pub(super) const SPDY: &[(&str, Dialect)] = &[
    ("v4.channel.k8s.io", V4),
    ("v3.channel.k8s.io", V3),
    ("v2.channel.k8s.io", V1),
    ("channel.k8s.io", V1),
];

/// What is spoken over a WebSocket.
pub(super) const WEBSOCKET: &[(&str, (Format, Dialect))] = &[
    ("v5.channel.k8s.io", (Format::Closing, V4)),
    ("v4.channel.k8s.io", (Format::Binary, V4)),
    ("v4.base64.channel.k8s.io", (Format::Base64, V4)),
    ("channel.k8s.io", (Format::Binary, V3)),
    ("base64.channel.k8s.io", (Format::Base64, V3)),
    ("", (Format::Binary, V3)),
];

/// The streams of a WebSocket, by number.
pub(super) const CHANNELS: u8 = 5;

/// The streams that a client has opened.
#[derive(Default)]
struct Opened {
    error: Option<Stream>,
    stdin: Option<Stream>,
    stdout: Option<Stream>,
    stderr: Option<Stream>,
    resize: Option<Stream>,
}

impl Opened {
    fn place(&mut self, kind: &str) -> Option<&mut Option<Stream>> {
        Some(match kind {
            "error" => &mut self.error,
            "stdin" => &mut self.stdin,
            "stdout" => &mut self.stdout,
            "stderr" => &mut self.stderr,
            "resize" => &mut self.resize,
            _ => return None,
        })
    }

    fn has_all(&self, wanted: &Wanted, dialect: Dialect) -> bool {
        let has = |asked: bool, stream: &Option<Stream>| !asked || stream.is_some();
        self.error.is_some()
            && has(wanted.stdin, &self.stdin)
            && has(wanted.stdout, &self.stdout)
            && has(wanted.stderr, &self.stderr)
            && has(wanted.terminal && dialect.resizes, &self.resize)
    }
}

/// Serves a client that speaks SPDY.
pub(super) async fn spdy(mut connection: Connection, wanted: Wanted, dialect: Dialect, execs: Execs) {
    let mut opened = Opened::default();
    let opening = async {
        while !opened.has_all(&wanted, dialect) {
            let Some(stream) = connection.next().await else { return false };
            let kind = stream.headers.get("streamtype").map_or("", String::as_str);
            match opened.place(kind) {
                Some(place @ None) => {
                    stream.output.accept().await;
                    *place = Some(stream);
                }
                _ => stream.output.reset(Reset::Refused).await,
            }
        }
        true
    };
    match tokio::time::timeout(OPEN_LIMIT, opening).await {
        Ok(true) => {
            connection.refuse_more();
            run(&connection, opened, wanted, dialect, execs).await;
        }
        Ok(false) => {}
        Err(_) => {
            tracing::debug!(
                container = wanted.container,
                "a client did not open its streams in {OPEN_LIMIT:?}"
            );
        }
    }
    connection.finish().await;
}

/// Serves a client that speaks over a WebSocket.
pub(super) async fn websocket(
    connection: Connection,
    streams: Vec<Stream>,
    wanted: Wanted,
    dialect: Dialect,
    execs: Execs,
) {
    let mut streams = streams.into_iter();
    let mut next = || streams.next();
    let opened = Opened { stdin: next(), stdout: next(), stderr: next(), error: next(), resize: next() };
    // The client hears that it is connected.
    let first = match (wanted.stdout, wanted.stderr) {
        (true, _) => &opened.stdout,
        (_, true) => &opened.stderr,
        _ => &opened.error,
    };
    if let Some(stream) = first {
        stream.output.greet().await;
    }
    run(&connection, opened, wanted, dialect, execs).await;
    connection.finish().await;
}

/// Runs what is wanted, and tells how it ended.
async fn run(connection: &Connection, opened: Opened, wanted: Wanted, dialect: Dialect, execs: Execs) {
    let output = |asked: bool, stream: Option<Stream>| stream.filter(|_| asked).map(|stream| stream.output);
    let sizes = opened.resize.filter(|_| wanted.terminal).map(|stream| resizes(stream.input));
    let streams = Streams {
        stdin: opened.stdin.filter(|_| wanted.stdin).map(|stream| stream.input),
        stdout: output(wanted.stdout, opened.stdout),
        stderr: output(wanted.stderr, opened.stderr),
        sizes,
        gone: connection.over(),
    };
    let ended = match wanted.work {
        Work::Exec(command) => execs.exec(&wanted.container, command, wanted.terminal, streams).await,
        Work::Attach => execs.attach(&wanted.container, streams).await.map(|()| 0),
    };
    if let Err(error) = &ended {
        tracing::debug!(%error, container = wanted.container, "a client's streams failed");
    }
    if let Some(Stream { output, .. }) = opened.error {
        tell(&output, ended, dialect).await;
    }
}

async fn tell(error: &Output, ended: Result<u32>, dialect: Dialect) {
    if let Some(text) = status(ended, dialect) {
        let _ = error.send(text.into()).await;
    }
    error.end().await;
}

/// How it ended, as the client understands it.
fn status(ended: Result<u32>, dialect: Dialect) -> Option<String> {
    let code_text = |code: u32| format!("command terminated with exit code {code}");
    if !dialect.json {
        return match ended {
            Ok(0) => None,
            Ok(code) => Some(code_text(code)),
            Err(error) => Some(error.to_string()),
        };
    }
    let status = match ended {
        Ok(0) => json!({ "metadata": {}, "status": "Success" }),
        Ok(code) => json!({
            "metadata": {},
            "status": "Failure",
            "reason": "NonZeroExitCode",
            "message": code_text(code),
            "details": { "causes": [{ "reason": "ExitCode", "message": code.to_string() }] },
        }),
        Err(error) => json!({
            "metadata": {},
            "status": "Failure",
            "reason": "InternalError",
            "message": error.to_string(),
            "details": { "causes": [{ "message": error.to_string() }] },
            "code": 500,
        }),
    };
    Some(status.to_string())
}

/// The sizes that come on a stream; only the last one matters.
fn resizes(mut input: Input) -> watch::Receiver<Option<Size>> {
    let (sender, sizes) = watch::channel(None);
    tokio::spawn(async move {
        let mut waiting = Vec::new();
        while let Some(bytes) = input.next().await {
            waiting.extend(bytes);
            let Ok(size) = take_sizes(&mut waiting) else { return };
            if size.is_some() {
                sender.send_replace(size);
            }
            if sender.is_closed() {
                return;
            }
        }
    });
    sizes
}

/// Takes whole sizes from what has come, and answers the last of them. An error for what will never be one.
fn take_sizes(waiting: &mut Vec<u8>) -> Result<Option<Size>, ()> {
    #[derive(Deserialize)]
    struct Wire {
        #[serde(alias = "Width")]
        width: u16,
        #[serde(alias = "Height")]
        height: u16,
    }
    let mut sizes = serde_json::Deserializer::from_slice(waiting).into_iter::<Wire>();
    let mut last = None;
    loop {
        match sizes.next() {
            Some(Ok(Wire { width: 0, .. } | Wire { height: 0, .. })) => {}
            Some(Ok(Wire { width, height })) => {
                last = Some(Size { width: width.into(), height: height.into() });
            }
            Some(Err(error)) if !error.is_eof() => return Err(()),
            Some(Err(_)) | None => break,
        }
    }
    let taken = sizes.byte_offset();
    waiting.drain(..taken);
    match waiting.len() > RESIZE_MAX {
        true => Err(()),
        false => Ok(last),
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::error::Error;

    #[test]
    fn the_end_is_told_in_the_clients_version() {
        assert_eq!(status(Ok(0), V1), None);
        assert_eq!(status(Ok(3), V3).unwrap(), "command terminated with exit code 3");
        assert_eq!(status(Err(Error::not_found("gone")), V1).unwrap(), "gone");
        let json =
            |ended| -> serde_json::Value { serde_json::from_str(&status(ended, V4).unwrap()).unwrap() };
        assert_eq!(json(Ok(0))["status"], "Success");
        let code = json(Ok(3));
        assert_eq!((&code["status"], &code["reason"]), (&json!("Failure"), &json!("NonZeroExitCode")));
        assert_eq!(code["details"]["causes"], json!([{ "reason": "ExitCode", "message": "3" }]));
        let failed = json(Err(Error::not_found("gone")));
        assert_eq!((&failed["reason"], &failed["message"]), (&json!("InternalError"), &json!("gone")));
    }

    #[test]
    fn the_last_size_counts_however_it_comes() {
        let mut waiting = Vec::new();
        let mut come = |text: &str| {
            waiting.extend(text.as_bytes());
            take_sizes(&mut waiting).map(|size| size.map(|size| (size.width, size.height)))
        };
        assert_eq!(come("{\"Width\":80,\"Height\":24}\n{\"Width\":100,\"Hei"), Ok(Some((80, 24))));
        assert_eq!(come("ght\":30}"), Ok(Some((100, 30))));
        assert_eq!(come("{\"width\":1,\"height\":2}{\"Width\":0,\"Height\":2}"), Ok(Some((1, 2))));
        assert_eq!(come(""), Ok(None));
        assert_eq!(come("{\"Width\":-1,"), Err(()));
        let mut endless = vec![b' '; RESIZE_MAX];
        endless.extend(b"{\"Width\":1");
        assert_eq!(take_sizes(&mut endless).map(|size| size.is_none()), Ok(true));
        let mut long = vec![b'"'];
        long.resize(2 * RESIZE_MAX, b'a');
        assert!(take_sizes(&mut long).is_err());
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic(mut bytes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = take_sizes(&mut bytes);
        }
    }
}
