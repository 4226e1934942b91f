//! Connections, with a client that speaks the same frames.

use bytes::BufMut as _;
use tokio::io::DuplexStream;

use super::super::link::{Input, Output};
use super::*;

const IDLE: Duration = Duration::from_secs(3600);

/// A client, which keeps to what it is told.
struct Client {
    io: DuplexStream,
    buffer: BytesMut,
    decoder: Decoder,
    deflater: Deflater,
    inflater: Inflater,
}

impl Client {
    fn connected(idle: Duration) -> (Self, Connection) {
        let (io, served) = tokio::io::duplex(1 << 10);
        let (deflater, inflater) = (Deflater::new(), Inflater::new());
        let client = Client { io, buffer: BytesMut::new(), decoder: Decoder::default(), deflater, inflater };
        (client, serve(served, idle))
    }

    async fn send(&mut self, frame: Frame) {
        let mut out = BytesMut::new();
        frame.encode(&mut out);
        self.io.write_all(&out).await.unwrap();
    }

    async fn open(&mut self, stream: u32, fin: bool) {
        let headers = [("streamtype".to_owned(), format!("s{stream}"))].into_iter().collect();
        let headers = self.deflater.deflate(&headers);
        self.send(Frame::SynStream { stream, fin, unidirectional: false, headers }).await;
    }

    async fn data(&mut self, stream: u32, fin: bool, bytes: &[u8]) {
        self.send(Frame::Data { stream, fin, bytes: Bytes::copy_from_slice(bytes) }).await;
    }

    /// The next frame; None when the server has hung up.
    async fn next(&mut self) -> Option<Frame> {
        loop {
            if let Some(frame) = self.decoder.decode(&mut self.buffer).unwrap() {
                if let Frame::SynReply { headers, .. } = &frame {
                    assert_eq!(self.inflater.inflate(headers).unwrap(), Headers::new());
                }
                return Some(frame);
            }
            if self.io.read_buf(&mut self.buffer).await.unwrap_or(0) == 0 {
                return None;
            }
        }
    }

    /// The next one that is not about windows.
    async fn answer(&mut self) -> Option<Frame> {
        loop {
            match self.next().await {
                Some(Frame::WindowUpdate { .. }) => {}
                other => return other,
            }
        }
    }

    /// All bytes of a stream, until the server ends it.
    async fn all_of(&mut self, of: u32) -> Vec<u8> {
        let mut all = Vec::new();
        loop {
            match self.answer().await {
                Some(Frame::Data { stream, fin, bytes }) if stream == of => {
                    all.put_slice(&bytes);
                    if fin {
                        return all;
                    }
                }
                other => panic!("{other:?} after {} bytes", all.len()),
            }
        }
    }
}

async fn opened(client: &mut Client, connection: &mut Connection, stream: u32) -> (Input, Output) {
    client.open(stream, false).await;
    let opened = connection.next().await.unwrap();
    assert_eq!((opened.id, opened.headers["streamtype"].as_str()), (stream, &*format!("s{stream}")));
    opened.output.accept().await;
    assert!(
        matches!(client.answer().await, Some(Frame::SynReply { stream: of, fin: false, .. }) if of == stream)
    );
    (opened.input, opened.output)
}

#[tokio::test]
async fn bytes_go_both_ways_and_each_way_ends_by_itself() {
    let (mut client, mut connection) = Client::connected(IDLE);
    let (mut first_in, first_out) = opened(&mut client, &mut connection, 1).await;
    let (mut second_in, second_out) = opened(&mut client, &mut connection, 3).await;
    client.data(1, false, b"hello ").await;
    client.data(3, true, b"other").await;
    client.data(1, true, b"you").await;
    assert_eq!(first_in.next().await.unwrap(), "hello ");
    assert_eq!(first_in.next().await.unwrap(), "you");
    assert_eq!(second_in.next().await.unwrap(), "other");
    assert!(first_in.next().await.is_none() && second_in.next().await.is_none() && !first_in.left());
    first_out.send(Bytes::from_static(b"answer")).await.unwrap();
    first_out.end().await;
    assert_eq!(client.all_of(1).await, b"answer");
    second_out.end().await;
    assert_eq!(client.all_of(3).await, b"");
    // Both are gone: what comes late is passed over, and what was never there is refused.
    client.data(3, false, b"late").await;
    client.data(9, false, b"never").await;
    assert_eq!(client.answer().await, Some(Frame::RstStream { stream: 9, status: 2 }));
}

#[tokio::test]
async fn megabytes_pass_a_client_that_opens_no_window() {
    let (mut client, mut connection) = Client::connected(IDLE);
    let (mut input, output) = opened(&mut client, &mut connection, 1).await;
    let sent: Vec<u8> = (0..5_000_000_u32).map(|at| (at % 251) as u8).collect();
    let expected = sent.clone();
    let sending = tokio::spawn(async move {
        output.send(sent.into()).await.unwrap();
        output.end().await;
    });
    assert!(client.all_of(1).await == expected);
    sending.await.unwrap();
    // And the other way, in one frame.
    let received = tokio::spawn(async move {
        let mut received = Vec::new();
        while let Some(bytes) = input.next().await {
            received.extend(bytes);
        }
        received
    });
    let whole = expected.clone();
    let (mut reader, mut writer) = tokio::io::split(client.io);
    let credited = tokio::spawn(async move {
        let (mut buffer, mut decoder, mut credit) = (BytesMut::new(), Decoder::default(), 0);
        while credit < 4_900_000 {
            reader.read_buf(&mut buffer).await.unwrap();
            while let Some(frame) = decoder.decode(&mut buffer).unwrap() {
                match frame {
                    Frame::WindowUpdate { stream: 0, delta } => credit += delta,
                    Frame::WindowUpdate { stream: 1, .. } => {}
                    other => panic!("{other:?}"),
                }
            }
        }
    });
    let mut out = BytesMut::new();
    Frame::Data { stream: 1, fin: true, bytes: whole.into() }.encode(&mut out);
    writer.write_all(&out).await.unwrap();
    assert!(received.await.unwrap() == expected);
    credited.await.unwrap();
}

#[tokio::test]
async fn a_client_that_opens_windows_gets_no_more_than_fits() {
    let (mut client, mut connection) = Client::connected(IDLE);
    client.send(Frame::Settings { initial_window: Some(10) }).await;
    let (_input, output) = opened(&mut client, &mut connection, 1).await;
    let sending = tokio::spawn(async move {
        output.send(Bytes::from_static(b"0123456789abcdefghij")).await.unwrap();
        output.end().await;
    });
    let data = |bytes: &'static str| Some(Frame::Data { stream: 1, fin: false, bytes: bytes.into() });
    assert_eq!(client.next().await, data("0123456789"));
    client.send(Frame::WindowUpdate { stream: 1, delta: 3 }).await;
    assert_eq!(client.next().await, data("abc"));
    client.send(Frame::Settings { initial_window: Some(12) }).await;
    assert_eq!(client.next().await, data("de"));
    client.send(Frame::WindowUpdate { stream: 1, delta: 100 }).await;
    assert_eq!(client.all_of(1).await, b"fghij");
    sending.await.unwrap();
    client.send(Frame::WindowUpdate { stream: 0, delta: i32::MAX as u32 }).await;
    client.send(Frame::WindowUpdate { stream: 0, delta: i32::MAX as u32 }).await;
    assert!(matches!(client.answer().await, Some(Frame::GoAway { status: PROTOCOL_ERROR, .. })));
}

#[tokio::test]
async fn a_reset_ends_both_ways_at_once() {
    let (mut client, mut connection) = Client::connected(IDLE);
    let (mut input, output) = opened(&mut client, &mut connection, 1).await;
    client.data(1, true, b"").await;
    client.send(Frame::RstStream { stream: 1, status: 5 }).await;
    output.left().await;
    assert!(output.send(Bytes::from_static(b"x")).await.is_err());
    assert!(input.next().await.is_none() && input.left());
    let (_input, output) = opened(&mut client, &mut connection, 3).await;
    output.send(Bytes::from_static(b"last")).await.unwrap();
    output.leave().await;
    assert!(matches!(client.answer().await, Some(Frame::Data { stream: 3, fin: false, .. })));
    assert_eq!(client.answer().await, Some(Frame::RstStream { stream: 3, status: 5 }));
    client.send(Frame::Ping { id: 7 }).await;
    client.send(Frame::Ping { id: 8 }).await;
    client.send(Frame::Ping { id: 9 }).await;
    assert_eq!(client.answer().await, Some(Frame::Ping { id: 7 }));
    assert_eq!(client.answer().await, Some(Frame::Ping { id: 9 }));
}

#[tokio::test]
async fn headers_that_say_nothing_are_read_for_those_that_follow() {
    let (mut client, mut connection) = Client::connected(IDLE);
    let (mut input, _output) = opened(&mut client, &mut connection, 1).await;
    let more: Headers = [("more".to_owned(), "headers".to_owned())].into_iter().collect();
    let headers = client.deflater.deflate(&more);
    client.send(Frame::Headers { stream: 1, fin: true, headers }).await;
    assert!(input.next().await.is_none());
    opened(&mut client, &mut connection, 3).await;
}

#[tokio::test]
async fn who_breaks_the_protocol_is_told_and_hung_up_on() {
    for bad in [
        Frame::SynStream {
            stream: 2,
            fin: false,
            unidirectional: false,
            headers: Deflater::new().deflate(&Headers::new()),
        },
        Frame::SynStream {
            stream: 1,
            fin: false,
            unidirectional: false,
            headers: Bytes::from_static(b"nonsense"),
        },
        Frame::Settings { initial_window: Some(u32::MAX) },
    ] {
        let (mut client, mut connection) = Client::connected(IDLE);
        client.send(bad).await;
        assert!(matches!(client.next().await, Some(Frame::GoAway { status: PROTOCOL_ERROR, .. })));
        assert_eq!(client.next().await, None);
        assert!(connection.next().await.is_none());
        connection.over().cancelled().await;
    }
}

#[tokio::test]
async fn streams_beyond_the_most_are_refused_and_the_rest_goes_on() {
    let (mut client, mut connection) = Client::connected(IDLE);
    let served = tokio::spawn(async move {
        let mut streams = Vec::new();
        while streams.len() < session::MAX {
            streams.push(connection.next().await.unwrap());
        }
        (connection, streams)
    });
    for number in 0..=session::MAX as u32 {
        client.open(2 * number + 1, false).await;
    }
    let (_connection, mut streams) = served.await.unwrap();
    let last = 2 * session::MAX as u32 + 1;
    assert_eq!(client.answer().await, Some(Frame::RstStream { stream: last, status: Reset::Refused as u32 }));
    client.data(1, false, b"still").await;
    assert_eq!(streams[0].input.next().await.unwrap(), "still");
}

#[tokio::test]
async fn a_connection_ends_when_all_is_said_and_the_client_has_gone() {
    let (mut client, mut connection) = Client::connected(IDLE);
    let (_input, output) = opened(&mut client, &mut connection, 1).await;
    output.send(Bytes::from_static(b"bye")).await.unwrap();
    output.end().await;
    let finishing = tokio::spawn(connection.finish());
    assert_eq!(client.all_of(1).await, b"bye");
    // The client had not ended its own way.
    assert_eq!(client.answer().await, Some(Frame::RstStream { stream: 1, status: 5 }));
    client.open(3, false).await;
    assert_eq!(client.answer().await, Some(Frame::RstStream { stream: 3, status: 3 }));
    drop(client);
    finishing.await.unwrap();
}

#[tokio::test]
async fn a_connection_that_is_still_is_cut() {
    let idle = Duration::from_millis(500);
    let (mut client, mut connection) = Client::connected(idle);
    let (mut input, _output) = opened(&mut client, &mut connection, 1).await;
    let begin = tokio::time::Instant::now();
    client.data(1, false, b"x").await;
    assert_eq!(input.next().await.unwrap(), "x");
    assert!(input.next().await.is_none() && input.left());
    assert!(begin.elapsed() >= idle, "{:?}", begin.elapsed());
    assert_eq!(client.next().await, None);
}
