//! What holds of the bytes of any client of the streaming server.

use std::time::Duration;

use bytes::{Bytes, BytesMut};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};

use super::link::{Connection, Stream};
use super::spdy::frame::{CONTROL_MAX, Decoder, Frame, PIECE};
use super::spdy::headers::{BLOCK_MAX, Deflater, Headers, Inflater};
use super::{spdy, websocket};

/// How long a connection may take to end once its client has gone.
const END: Duration = Duration::from_secs(20);

/// A SPDY connection: frames do not depend on how their bytes arrive and are written as they were read, headers are bounded, and a
/// session ends with its client.
pub fn spdy(data: &[u8]) {
    let (whole, sane) = frames(data, data.len().max(1));
    let (pieces, _) = frames(data, 1 + data.first().map_or(0, |byte| usize::from(*byte)));
    assert_eq!(joined(&whole), joined(&pieces), "frames depend on how their bytes arrive");
    let written: Vec<u8> = whole.iter().flat_map(encoded).collect();
    let again = frames(&written, written.len().max(1)).0;
    let known: Vec<Frame> = whole.iter().filter(|frame| **frame != Frame::Unknown).cloned().collect();
    assert_eq!(joined(&again), joined(&known), "a frame is not written as it was read");
    let (mut inflater, mut deflater) = (Inflater::new(), Deflater::new());
    let mut read = Inflater::new();
    for frame in &whole {
        let (Frame::SynStream { headers, .. }
        | Frame::SynReply { headers, .. }
        | Frame::Headers { headers, .. }) = frame
        else {
            continue;
        };
        let Ok(headers) = inflater.inflate(headers) else { break };
        // A byte that is no text becomes a sign of three.
        assert!(size(&headers) <= 3 * BLOCK_MAX);
        let block = deflater.deflate(&headers);
        match read.inflate(&block) {
            Ok(again) => assert_eq!(again, headers),
            // Such signs, and lengths, may make it too long.
            Err(_) => {
                assert!(size(&headers) + 8 * headers.len() + 4 > BLOCK_MAX);
                break;
            }
        }
    }
    run(async {
        let (client, ours) = tokio::io::duplex(64 << 10);
        let connection = spdy::serve(ours, Duration::ZERO);
        ends(client, data, connection, Vec::new(), sane).await;
    });
}

/// A connection by WebSocket, in one of its forms by the first byte: a session ends with its client, and what a stream has was said.
pub fn websocket(data: &[u8]) {
    let Some((form, bytes)) = data.split_first() else { return };
    run(async {
        let (client, ours) = tokio::io::duplex(64 << 10);
        if form % 4 == 3 {
            let tunnel = websocket::tunnel(ours);
            let connection = spdy::serve(tunnel, Duration::ZERO);
            return ends(client, bytes, connection, Vec::new(), false).await;
        }
        let format = [websocket::Format::Binary, websocket::Format::Base64, websocket::Format::Closing]
            [usize::from(form % 4)];
        let (connection, streams) = websocket::serve(ours, format, 5, Duration::ZERO);
        ends(client, bytes, connection, streams, false).await;
    });
}

/// The client says this, reads what it is answered, and goes. All streams are read to their ends.
async fn ends(
    client: DuplexStream,
    data: &[u8],
    mut connection: Connection,
    streams: Vec<Stream>,
    sane: bool,
) {
    let (mut from, mut to) = tokio::io::split(client);
    let mut said = Vec::new();
    let talk = async {
        // Whoever has heard enough hangs up.
        let _ = to.write_all(data).await;
        let _ = to.shutdown().await;
        let _ = from.read_to_end(&mut said).await;
    };
    let serve = async {
        let mut readers = Vec::new();
        for stream in streams {
            readers.push(tokio::spawn(drain(stream)));
        }
        while let Some(stream) = connection.next().await {
            assert!(readers.len() < data.len() + 8, "more streams than the client can have opened");
            readers.push(tokio::spawn(drain(stream)));
        }
        let mut read = 0;
        for reader in readers {
            read += reader.await.expect("a reader");
        }
        // Base64 and masks make it shorter, never longer.
        assert!(read <= data.len(), "{read} bytes came out of {}", data.len());
        connection.over().cancelled().await;
    };
    let both = async { tokio::join!(talk, serve) };
    assert!(tokio::time::timeout(END, both).await.is_ok(), "a connection outlives its client");
    if sane {
        // What the engine says is SPDY, too.
        let mut buffer = BytesMut::from(&said[..]);
        let mut decoder = Decoder::default();
        while let Some(frame) = decoder.decode(&mut buffer).expect("frames of ours") {
            assert_ne!(frame, Frame::Unknown);
        }
        assert!(buffer.is_empty(), "half a frame");
    }
}

async fn drain(mut stream: Stream) -> usize {
    let mut read = 0;
    while let Some(bytes) = stream.input.next().await {
        read += bytes.len();
    }
    read
}

fn run(what: impl Future<Output = ()>) {
    tokio::runtime::Builder::new_current_thread().enable_all().build().expect("a runtime").block_on(what);
}

/// The frames of bytes that arrive so many at a time, and whether all of them were sane.
fn frames(data: &[u8], at_a_time: usize) -> (Vec<Frame>, bool) {
    let (mut decoder, mut buffer, mut out) = (Decoder::default(), BytesMut::new(), Vec::new());
    for arrived in data.chunks(at_a_time) {
        buffer.extend_from_slice(arrived);
        loop {
            match decoder.decode(&mut buffer) {
                Ok(Some(frame)) => out.push(frame),
                Ok(None) => break,
                Err(_) => return (out, false),
            }
        }
        assert!(buffer.len() <= CONTROL_MAX + 8, "more is kept than a frame");
    }
    (out, true)
}

/// The same, the pieces of a data frame put together.
fn joined(frames: &[Frame]) -> Vec<Frame> {
    let mut joined: Vec<Frame> = Vec::new();
    let mut open = false;
    for frame in frames {
        match (joined.last_mut(), frame) {
            (
                Some(Frame::Data { stream, fin, bytes }),
                Frame::Data { stream: of, fin: last, bytes: more },
            ) if open && stream == of => {
                assert!(more.len() <= PIECE);
                *bytes = Bytes::from([&bytes[..], &more[..]].concat());
                *fin = *last;
            }
            _ => joined.push(frame.clone()),
        }
        open = matches!(frame, Frame::Data { fin: false, .. });
    }
    joined
}

fn encoded(frame: &Frame) -> Vec<u8> {
    let mut out = BytesMut::new();
    frame.encode(&mut out);
    out.to_vec()
}

fn size(headers: &Headers) -> usize {
    headers.iter().map(|(name, value)| name.len() + value.len()).sum()
}
