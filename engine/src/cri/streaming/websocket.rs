//! WebSockets whose messages carry streams: each begins with a byte that says of which.
//!
//! ```text
//!  binary    number 8 | bytes
//!  base64    a digit  | bytes in base64, as text
//!  v5        255 8 | number 8: the client writes no more into that stream
//!  tunnel    messages are the bytes of a SPDY connection, one after the other
//! ```
//!
//! Invariants: those of [`super::link`]; a message has at most [`MESSAGE_MAX`] bytes. A stream that is not there is written to in vain.

use std::sync::Arc;
use std::time::Duration;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use futures::{SinkExt as _, StreamExt as _};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _, DuplexStream};
use tokio::sync::mpsc;
use tokio_tungstenite::WebSocketStream;
use tokio_tungstenite::tungstenite::protocol::frame::coding::CloseCode;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, Role, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Message, Result};

use super::link::{self, Activity, Connection, Driver, Feeder, INITIAL_WINDOW, Outgoing, Stream, Window};
use super::spdy::headers::Headers;

/// The longest message.
const MESSAGE_MAX: usize = 4 << 20;
/// Begins a message of v5 that ends a stream.
const CLOSE: u8 = 255;

/// How streams are told apart.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Format {
    /// By bytes.
    Binary,
    /// By digits, before base64.
    Base64,
    /// By bytes; the client can end a stream.
    Closing,
}

/// What a message of the client says.
#[derive(Debug, PartialEq, Eq)]
enum Said {
    Data(u8, Bytes),
    End(u8),
    Nothing,
    /// It does not speak the protocol.
    Nonsense,
}

fn read(format: Format, mut message: Bytes) -> Said {
    let Some(first) = message.first().copied() else { return Said::Nothing };
    let rest = message.split_off(1);
    match format {
        Format::Closing if first == CLOSE => match rest[..] {
            [stream] => Said::End(stream),
            _ => Said::Nonsense,
        },
        Format::Binary | Format::Closing => Said::Data(first, rest),
        Format::Base64 => match STANDARD.decode(&rest) {
            Ok(bytes) => Said::Data(first.wrapping_sub(b'0'), bytes.into()),
            Err(_) => Said::Nothing,
        },
    }
}

fn written(format: Format, stream: u32, bytes: &[u8]) -> Message {
    let stream = stream as u8;
    match format {
        Format::Base64 => {
            let mut text = String::from(char::from(b'0'.wrapping_add(stream)));
            STANDARD.encode_string(bytes, &mut text);
            Message::text(text)
        }
        Format::Binary | Format::Closing => {
            let mut message = Vec::with_capacity(1 + bytes.len());
            message.push(stream);
            message.extend(bytes);
            Message::binary(message)
        }
    }
}

/// Serves a connection whose bytes come from here, until it is over, with streams numbered from 0.
pub(super) fn serve(
    io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
    format: Format,
    streams: u8,
    idle: Duration,
) -> (Connection, Vec<Stream>) {
    let (connection, driver) = link::connection(idle);
    let made = (0..streams.into()).map(|stream| {
        // Its clients open no windows.
        let (window, gone) = (Arc::new(Window::new(INITIAL_WINDOW)), driver.maker.over.child_token());
        driver.maker.stream(stream, Headers::new(), window, gone)
    });
    let (streams, feeders) = made.unzip();
    tokio::spawn(drive(io, driver, format, feeders));
    (connection, streams)
}

async fn drive(
    io: impl AsyncRead + AsyncWrite + Unpin,
    driver: Driver,
    format: Format,
    feeders: Vec<Feeder>,
) {
    let Driver { opened: _, outgoing, credits: _, maker, cut } = driver;
    let activity = maker.activity.clone();
    let (to_client, from_client) = accept(io).await.split();
    tokio::select! {
        () = receive(from_client, format, feeders, &activity) => {}
        () = send(to_client, format, outgoing, &activity) => {}
        () = activity.idle() => tracing::debug!("a streaming connection was idle for too long"),
        () = cut.cancelled() => {}
    }
    maker.over.cancel();
}

async fn accept<T: AsyncRead + AsyncWrite + Unpin>(io: T) -> WebSocketStream<T> {
    let limits =
        WebSocketConfig::default().max_message_size(Some(MESSAGE_MAX)).max_frame_size(Some(MESSAGE_MAX));
    WebSocketStream::from_raw_socket(io, Role::Server, Some(limits)).await
}

async fn receive(
    mut from_client: impl futures::Stream<Item = Result<Message>> + Unpin,
    format: Format,
    feeders: Vec<Feeder>,
    activity: &Activity,
) {
    let mut feeders: Vec<_> = feeders.into_iter().map(Some).collect();
    while let Some(Ok(message)) = from_client.next().await {
        let message = match message {
            Message::Binary(bytes) => bytes,
            Message::Text(text) => text.into(),
            // Answered by those who bring them. What follows is the end.
            _ => continue,
        };
        activity.touch();
        match read(format, message) {
            Said::Data(stream, bytes) => {
                if let Some(Some(feeder)) = feeders.get(usize::from(stream)) {
                    feeder.feed(bytes).await;
                }
            }
            Said::End(stream) => {
                if let Some(feeder) = feeders.get_mut(usize::from(stream)) {
                    *feeder = None;
                }
            }
            Said::Nothing => {}
            Said::Nonsense => return,
        }
    }
}

async fn send(
    mut to_client: impl futures::Sink<Message> + Unpin,
    format: Format,
    mut outgoing: mpsc::Receiver<Outgoing>,
    activity: &Activity,
) {
    while let Some(next) = outgoing.recv().await {
        let sent = match next {
            Outgoing::Data(stream, bytes) => to_client.send(written(format, stream, &bytes)).await,
            Outgoing::ResetAll | Outgoing::GoAway(_) => {
                let _ = to_client.send(goodbye()).await;
                // It is the client's turn to go.
                return std::future::pending().await;
            }
            // There are no words for them: a stream ends with its connection.
            Outgoing::Accept(_)
            | Outgoing::End(_)
            | Outgoing::Reset(..)
            | Outgoing::Leave(_)
            | Outgoing::Pong(_) => continue,
        };
        if sent.is_err() {
            return;
        }
        activity.touch();
    }
}

/// Clients take any other end for a failure.
fn goodbye() -> Message {
    Message::Close(Some(CloseFrame { code: CloseCode::Normal, reason: "".into() }))
}

/// The bytes that a client sends and gets by messages, as those of a connection.
pub(super) fn tunnel(io: impl AsyncRead + AsyncWrite + Send + Unpin + 'static) -> DuplexStream {
    let (ours, theirs) = tokio::io::duplex(2 * link::PIECE);
    tokio::spawn(async move {
        let (mut to_client, mut from_client) = accept(io).await.split();
        let (mut reader, mut writer) = tokio::io::split(ours);
        let incoming = async {
            while let Some(Ok(message)) = from_client.next().await {
                if let Message::Binary(bytes) = message
                    && writer.write_all(&bytes).await.is_err()
                {
                    return;
                }
            }
        };
        let outgoing = async {
            let mut buffer = vec![0; link::PIECE];
            while let Ok(length @ 1..) = reader.read(&mut buffer).await {
                if to_client.send(Message::binary(buffer[..length].to_vec())).await.is_err() {
                    return;
                }
            }
            let _ = to_client.send(goodbye()).await;
            std::future::pending::<()>().await;
        };
        tokio::select! {
            () = incoming => {}
            () = outgoing => {}
        }
    });
    theirs
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn messages_say_which_stream_they_are_of() {
        let bytes = |text: &'static str| Bytes::from_static(text.as_bytes());
        assert_eq!(read(Format::Binary, bytes("\0in")), Said::Data(0, bytes("in")));
        assert_eq!(read(Format::Base64, bytes("4aW4=")), Said::Data(4, bytes("in")));
        assert_eq!(read(Format::Base64, bytes("0not base64")), Said::Nothing);
        assert_eq!(read(Format::Binary, Bytes::new()), Said::Nothing);
        assert_eq!(written(Format::Binary, 1, b"out"), Message::binary(&b"\x01out"[..]));
        assert_eq!(written(Format::Base64, 2, b"out"), Message::text("2b3V0"));
        assert_eq!(written(Format::Closing, 3, b""), Message::binary(&b"\x03"[..]));
    }

    #[test]
    fn the_fifth_version_alone_ends_a_stream() {
        let close = Bytes::from_static(&[255, 0]);
        assert_eq!(read(Format::Closing, close.clone()), Said::End(0));
        assert_eq!(read(Format::Binary, close), Said::Data(255, Bytes::from_static(&[0])));
        assert_eq!(read(Format::Closing, Bytes::from_static(&[255])), Said::Nonsense);
        assert_eq!(read(Format::Closing, Bytes::from_static(&[255, 0, 0])), Said::Nonsense);
    }

    proptest! {
        #[test]
        fn what_is_written_is_read_again(
            stream in 0..5_u8, content in prop::collection::vec(any::<u8>(), 1..100), format in 0..3_usize,
        ) {
            let format = [Format::Binary, Format::Base64, Format::Closing][format];
            let message = written(format, stream.into(), &content).into_data();
            prop_assert_eq!(read(format, message), Said::Data(stream, content.into()));
        }

        #[test]
        fn no_message_makes_it_panic(message in prop::collection::vec(any::<u8>(), 0..50)) {
            for format in [Format::Binary, Format::Base64, Format::Closing] {
                let _ = read(format, message.clone().into());
            }
        }
    }
}
