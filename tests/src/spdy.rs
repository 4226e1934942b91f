//! A client of SPDY/3.1 and what Kubernetes carries by it, as kubectl's: it opens streams, and neither opens windows nor keeps
//! to them.

use std::collections::{BTreeMap, VecDeque};

use flate2::{Compress, Compression, FlushCompress};
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio::time::timeout;

use crate::LIMIT;

/// What carries a connection.
pub trait Carrier: AsyncRead + AsyncWrite + Send + Unpin {}

impl<T: AsyncRead + AsyncWrite + Send + Unpin> Carrier for T {}

/// A connection.
pub struct Spdy {
    io: Box<dyn Carrier>,
    compress: Compress,
    next: u32,
    /// What was said and not yet asked for.
    early: VecDeque<Said>,
    /// The protocol that was chosen.
    pub protocol: String,
}

/// What the server says.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Said {
    /// It accepts a stream.
    Accepted(u32),
    /// Bytes of a stream, and whether they are the last.
    Data(u32, Vec<u8>, bool),
    /// A stream is over.
    Reset(u32),
    /// The connection is over.
    Away,
    /// Anything else.
    Other(u16),
}

impl Spdy {
    /// Connects to an address that the engine gave, offering these protocols; the answer's head when it is a refusal.
    pub async fn connect(url: &str, protocols: &[&str]) -> Result<Self, String> {
        let host = url.strip_prefix("http://").unwrap().split('/').next().unwrap();
        Spdy::upgrade(TcpStream::connect(host).await.unwrap(), url, protocols).await
    }

    /// The same over a connection that there is already.
    pub async fn upgrade(mut io: TcpStream, url: &str, protocols: &[&str]) -> Result<Self, String> {
        let (host, path) = url.strip_prefix("http://").unwrap().split_once('/').unwrap();
        let mut request =
            format!("POST /{path} HTTP/1.1\r\nHost: {host}\r\nConnection: Upgrade\r\nUpgrade: SPDY/3.1\r\n");
        for protocol in protocols {
            request.push_str(&format!("X-Stream-Protocol-Version: {protocol}\r\n"));
        }
        request.push_str("Content-Length: 0\r\n\r\n");
        io.write_all(request.as_bytes()).await.unwrap();
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            head.push(timeout(LIMIT, io.read_u8()).await.unwrap().unwrap());
        }
        let head = String::from_utf8(head).unwrap();
        if !head.starts_with("HTTP/1.1 101 ") {
            return Err(head);
        }
        let name = "x-stream-protocol-version: ";
        let chosen = head.lines().find(|line| line.to_lowercase().starts_with(name)).unwrap();
        let protocol = chosen[name.len()..].to_owned();
        Ok(Spdy { protocol, ..Spdy::over(io) })
    }

    /// A connection that is carried by something else.
    pub fn over(io: impl Carrier + 'static) -> Self {
        let compress = Compress::new(Compression::best(), true);
        Spdy { io: Box::new(io), compress, next: 1, early: VecDeque::new(), protocol: String::new() }
    }

    /// Opens a stream with these headers; its number.
    pub async fn open(&mut self, headers: &[(&str, &str)]) -> u32 {
        let mut block = (headers.len() as u32).to_be_bytes().to_vec();
        for text in headers.iter().flat_map(|(name, value)| [name, value]) {
            block.extend((text.len() as u32).to_be_bytes());
            block.extend(text.as_bytes());
        }
        let mut compressed = Vec::with_capacity(4096);
        self.compress.compress_vec(&block, &mut compressed, FlushCompress::Sync).unwrap();
        let stream = self.next;
        self.next += 2;
        let mut payload = stream.to_be_bytes().to_vec();
        payload.extend([0; 6]);
        payload.extend(compressed);
        self.control(1, &payload).await;
        stream
    }

    /// Opens the streams of a process, by what they are for, and waits until all are accepted.
    pub async fn open_all(&mut self, kinds: &[&str]) -> BTreeMap<String, u32> {
        let mut streams = BTreeMap::new();
        for kind in kinds {
            let stream = self.open(&[("streamtype", kind)]).await;
            assert_eq!(self.said().await, Said::Accepted(stream));
            streams.insert((*kind).to_owned(), stream);
        }
        streams
    }

    /// Writes into a stream; `last`: there is no more.
    pub async fn send(&mut self, stream: u32, bytes: &[u8], last: bool) {
        let mut frame = stream.to_be_bytes().to_vec();
        frame.extend(((bytes.len() as u32) | u32::from(last) << 24).to_be_bytes());
        frame.extend(bytes);
        self.io.write_all(&frame).await.unwrap();
    }

    async fn control(&mut self, kind: u16, payload: &[u8]) {
        let mut frame = [0x8003_u16, kind].map(u16::to_be_bytes).concat();
        frame.extend((payload.len() as u32).to_be_bytes());
        frame.extend(payload);
        self.io.write_all(&frame).await.unwrap();
    }

    /// What the server says next, but for windows.
    pub async fn said(&mut self) -> Said {
        if let Some(said) = self.early.pop_front() {
            return said;
        }
        timeout(LIMIT, async {
            loop {
                let (first, second) = (self.io.read_u32().await, self.io.read_u32().await);
                let (Ok(word), Ok(length)) = (first, second) else { return Said::Away };
                let (last, length) = (length >> 24 & 1 == 1, length as usize & 0x00ff_ffff);
                let mut payload = vec![0; length];
                self.io.read_exact(&mut payload).await.unwrap();
                if word >> 31 == 0 {
                    return Said::Data(word, payload, last);
                }
                let stream = u32::from_be_bytes(payload[..4].try_into().unwrap());
                match word as u16 {
                    2 => return Said::Accepted(stream),
                    3 => return Said::Reset(stream),
                    7 => return Said::Away,
                    9 => {}
                    other => return Said::Other(other),
                }
            }
        })
        .await
        .expect("the server says nothing")
    }

    /// All that comes on each stream, until all of `these` are over.
    pub async fn all(&mut self, these: &[u32]) -> BTreeMap<u32, Vec<u8>> {
        let mut all = BTreeMap::<u32, Vec<u8>>::new();
        let mut open: Vec<u32> = these.to_vec();
        while !open.is_empty() {
            match self.said().await {
                Said::Data(stream, bytes, last) => {
                    all.entry(stream).or_default().extend(bytes);
                    open.retain(|of| !last || *of != stream);
                }
                Said::Reset(stream) => open.retain(|of| *of != stream),
                Said::Away => panic!("the server has gone, and {open:?} are open; so far: {all:?}"),
                Said::Accepted(_) | Said::Other(_) => {}
            }
        }
        all
    }

    /// Reads from a stream until this comes. Streams are not ordered among each other: what others bring meanwhile is
    /// said later.
    pub async fn until(&mut self, stream: u32, text: &str) -> String {
        let mut seen = String::new();
        let mut others = VecDeque::new();
        while !seen.contains(text) {
            match self.said().await {
                Said::Data(of, bytes, false) if of == stream => {
                    seen.push_str(&String::from_utf8_lossy(&bytes));
                }
                Said::Data(of, bytes, last) if of != stream => others.push_back(Said::Data(of, bytes, last)),
                other => panic!("{other:?} before {text:?}; so far: {seen:?}"),
            }
        }
        others.append(&mut self.early);
        self.early = others;
        seen
    }
}
