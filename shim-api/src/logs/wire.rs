//! Frames, and the two ends of the socket.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, PermissionsExt};
use std::path::{Path, PathBuf};

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncReadExt};
use tokio::net::UnixListener;

use crate::{Code, Error, Result};

/// The version of the protocol that this crate speaks.
pub const VERSION: u8 = 1;
/// The longest payload of a frame.
pub const PAYLOAD_MAX: usize = 64 * 1024;
/// Kind and length.
const HEADER: usize = 5;

/// One of the two outputs of a process; a terminal has only the first.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Stream {
    /// Standard output, or all that a terminal shows.
    Stdout,
    /// Standard error.
    Stderr,
}

/// Which streams a client wants to join.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Streams {
    /// Write to the process.
    pub stdin: bool,
    /// Read what it writes there.
    pub stdout: bool,
    /// And there.
    pub stderr: bool,
}

impl Streams {
    /// Whether this output is wanted.
    #[must_use]
    pub fn wants(self, stream: Stream) -> bool {
        match stream {
            Stream::Stdout => self.stdout,
            Stream::Stderr => self.stderr,
        }
    }
}

/// What a client comes for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Open the log anew.
    Reopen,
    /// Join the streams.
    Attach(Streams),
}

/// What a frame says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Message {
    /// A client's first.
    Request(Request),
    /// Standard input.
    Stdin(Bytes),
    /// The end of it.
    CloseStdin,
    /// What was asked for has been done.
    Done,
    /// Output.
    Output(Stream, Bytes),
    /// The end of all output.
    End,
    /// An error, the last frame of a connection.
    Failed(Error),
}

impl Message {
    /// Appends the frame; data beyond [`PAYLOAD_MAX`] makes several.
    pub fn encode(&self, to: &mut Vec<u8>) {
        match self {
            Self::Request(Request::Reopen) => put(to, b'R', &[]),
            Self::Request(Request::Attach(streams)) => {
                let bits =
                    u8::from(streams.stdin) | u8::from(streams.stdout) << 1 | u8::from(streams.stderr) << 2;
                put(to, b'A', &[bits]);
            }
            Self::Stdin(data) => put_all(to, b'I', data),
            Self::CloseStdin => put(to, b'C', &[]),
            Self::Done => put(to, b'D', &[]),
            Self::Output(stream, data) => encode_output(*stream, data, to),
            Self::End => put(to, b'Z', &[]),
            Self::Failed(error) => {
                let text = error.message.as_bytes();
                let mut payload = error.code.number().to_be_bytes().to_vec();
                payload.extend_from_slice(&text[..text.len().min(PAYLOAD_MAX - 4)]);
                put(to, b'X', &payload);
            }
        }
    }

    fn decode(kind: u8, mut payload: Bytes) -> Result<Self> {
        let message = match kind {
            b'R' => Self::Request(Request::Reopen),
            b'A' => match *payload {
                [bits @ 0..8] => Self::Request(Request::Attach(Streams {
                    stdin: bits & 1 != 0,
                    stdout: bits & 2 != 0,
                    stderr: bits & 4 != 0,
                })),
                _ => return Err(broken("a request to join does not say which streams")),
            },
            b'I' => Self::Stdin(payload.split_off(0)),
            b'C' => Self::CloseStdin,
            b'D' => Self::Done,
            b'O' => Self::Output(Stream::Stdout, payload.split_off(0)),
            b'E' => Self::Output(Stream::Stderr, payload.split_off(0)),
            b'Z' => Self::End,
            b'X' => {
                let code = payload.try_get_i32().map_err(|_| broken("an error has no code"))?;
                let message = String::from_utf8_lossy(&payload.split_off(0)).into_owned();
                Self::Failed(Error { code: Code::of_number(code), message })
            }
            other => return Err(broken(&format!("no frame is of the kind {other}"))),
        };
        let one = matches!(message, Self::Request(Request::Attach(_)));
        if payload.len() > usize::from(one) {
            return Err(broken("a frame that says everything by its kind has a payload"));
        }
        Ok(message)
    }
}

/// Appends output as frames.
pub fn encode_output(stream: Stream, data: &[u8], to: &mut Vec<u8>) {
    let kind = match stream {
        Stream::Stdout => b'O',
        Stream::Stderr => b'E',
    };
    put_all(to, kind, data);
}

fn put_all(to: &mut Vec<u8>, kind: u8, data: &[u8]) {
    for part in data.chunks(PAYLOAD_MAX) {
        put(to, kind, part);
    }
}

fn put(to: &mut Vec<u8>, kind: u8, payload: &[u8]) {
    let length = u32::try_from(payload.len()).unwrap_or(u32::MAX);
    to.push(kind);
    to.extend_from_slice(&length.to_be_bytes());
    to.extend_from_slice(payload);
}

fn broken(why: &str) -> Error {
    Error::invalid_argument(format!("the peer does not speak the protocol of logs: {why}"))
}

/// Reads frames. A read that is dropped loses nothing: what has come stays for the next.
pub struct Reader<R> {
    from: R,
    buffer: BytesMut,
}

impl<R: AsyncRead + Unpin> Reader<R> {
    /// Reads from there.
    pub fn new(from: R) -> Self {
        Self { from, buffer: BytesMut::new() }
    }

    /// A client's version and request; for the shim's side.
    ///
    /// # Errors
    /// Unimplemented for another version, InvalidArgument for what is no request, Closed when the client went.
    pub async fn request(&mut self) -> Result<Request> {
        while self.buffer.is_empty() {
            self.more().await?;
        }
        let version = self.buffer.get_u8();
        if version != VERSION {
            return Err(Error::unimplemented(format!(
                "version {version} of the protocol of logs is not spoken here: {VERSION} is"
            )));
        }
        match self.message().await? {
            Some(Message::Request(request)) => Ok(request),
            Some(other) => Err(broken(&format!("it begins with {other:?}"))),
            None => Err(gone()),
        }
    }

    /// The next message, `None` when the peer has closed.
    ///
    /// # Errors
    /// InvalidArgument for what is no frame, Closed when the peer went in the middle of one.
    pub async fn message(&mut self) -> Result<Option<Message>> {
        loop {
            if let Some(header) = self.buffer.first_chunk::<HEADER>() {
                let [kind, length @ ..] = *header;
                let length = u32::from_be_bytes(length) as usize;
                if length > PAYLOAD_MAX {
                    return Err(broken(&format!("a frame of {length} bytes, {PAYLOAD_MAX} are allowed")));
                }
                if self.buffer.len() >= HEADER + length {
                    self.buffer.advance(HEADER);
                    let payload = self.buffer.split_to(length).freeze();
                    return Message::decode(kind, payload).map(Some);
                }
            }
            if self.buffer.is_empty() {
                // Between frames nothing is held.
                self.buffer = BytesMut::new();
            }
            match self.more().await {
                Err(error) if error.code == Code::Closed && self.buffer.is_empty() => return Ok(None),
                other => other?,
            }
        }
    }

    async fn more(&mut self) -> Result<()> {
        self.buffer.reserve(4096);
        match self.from.read_buf(&mut self.buffer).await {
            Ok(0) => Err(gone()),
            Ok(_) => Ok(()),
            Err(error) => Err(Error::closed(format!("read from the socket of a log: {error}"))),
        }
    }
}

fn gone() -> Error {
    Error::closed("the other side of a log's socket has closed it")
}

/// Listens at a path of any length, in a folder that is made when it is not there, for root alone. A socket that was
/// left there is replaced.
///
/// # Errors
/// Those of bind(2).
pub fn listen(socket: &Path) -> io::Result<UnixListener> {
    if let Some(folder) = socket.parent() {
        std::fs::DirBuilder::new().recursive(true).mode(0o700).create(folder)?;
    }
    if std::fs::symlink_metadata(socket).is_ok_and(|there| there.file_type().is_socket()) {
        std::fs::remove_file(socket)?;
    }
    let (_folder, short) = shortened(socket)?;
    let listener = UnixListener::bind(&short)?;
    std::fs::set_permissions(socket, std::fs::Permissions::from_mode(0o600))?;
    Ok(listener)
}

/// A short name of a socket, good while the folder is held: an address has no room for more than 107 bytes.
pub(super) fn shortened(socket: &Path) -> io::Result<(File, PathBuf)> {
    let (Some(folder), Some(name)) = (socket.parent(), socket.file_name()) else {
        return Err(io::ErrorKind::InvalidInput.into());
    };
    let folder = File::open(folder)?;
    let short = Path::new("/proc/self/fd").join(folder.as_raw_fd().to_string()).join(name);
    Ok((folder, short))
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn all() -> Vec<Message> {
        vec![
            Message::Request(Request::Reopen),
            Message::Request(Request::Attach(Streams { stdin: true, stdout: false, stderr: true })),
            Message::Stdin(Bytes::from_static(b"in")),
            Message::CloseStdin,
            Message::Done,
            Message::Output(Stream::Stdout, Bytes::from_static(b"out\0\n")),
            Message::Output(Stream::Stderr, Bytes::from(vec![7; PAYLOAD_MAX])),
            Message::End,
            Message::Failed(Error::resource_exhausted("too slow")),
        ]
    }

    fn block_on<T>(future: impl Future<Output = T>) -> T {
        tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(future)
    }

    #[test]
    fn every_message_survives_the_wire() {
        let mut bytes = Vec::new();
        all().iter().for_each(|message| message.encode(&mut bytes));
        block_on(async {
            let mut reader = Reader::new(bytes.as_slice());
            for message in all() {
                assert_eq!(reader.message().await.unwrap().unwrap(), message);
            }
            assert_eq!(reader.message().await.unwrap(), None);
        });
    }

    #[test]
    fn what_is_too_much_for_a_frame_becomes_several() {
        let mut bytes = Vec::new();
        encode_output(Stream::Stdout, &vec![1; PAYLOAD_MAX + 1], &mut bytes);
        block_on(async {
            let mut reader = Reader::new(bytes.as_slice());
            let mut lengths = Vec::new();
            while let Some(Message::Output(Stream::Stdout, data)) = reader.message().await.unwrap() {
                lengths.push(data.len());
            }
            assert_eq!(lengths, [PAYLOAD_MAX, 1]);
        });
    }

    #[test]
    fn hostile_peers_get_an_error() {
        let request = |bytes: &'static [u8]| block_on(Reader::new(bytes).request()).unwrap_err();
        assert_eq!(request(b"").code, Code::Closed);
        assert_eq!(request(b"\x02R\0\0\0\0").code, Code::Unimplemented);
        assert_eq!(request(b"\x01R\0").code, Code::Closed);
        for bytes in [
            &b"\x01R\xff\xff\xff\xff"[..],
            b"\x01R\0\0\0\x01x",
            b"\x01A\0\0\0\0",
            b"\x01A\0\0\0\x01\x08",
            b"\x01A\0\0\0\x02\x01\x01",
            b"\x01I\0\0\0\x01x",
            b"\x01GET / HTTP/1.1\r\n",
            b"\x01?\0\0\0\0",
            b"\x01X\0\0\0\x01x",
        ] {
            assert_eq!(request(bytes).code, Code::InvalidArgument, "{bytes:?}");
        }
    }

    proptest! {
        #[test]
        fn no_bytes_make_it_panic_or_wait(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            block_on(async {
                let mut reader = Reader::new(bytes.as_slice());
                while let Ok(Some(_)) = reader.message().await {}
            });
        }
    }

    #[test]
    fn a_socket_may_have_a_long_path_and_replaces_a_dead_one() {
        let folder = tempfile::tempdir().unwrap();
        let socket = folder.path().join("d".repeat(120)).join("c".repeat(64));
        let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build().unwrap();
        runtime.block_on(async {
            drop(listen(&socket).unwrap());
            let _listener = listen(&socket).unwrap();
            let mode = |path: &Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
            assert_eq!((mode(&socket), mode(socket.parent().unwrap())), (0o600, 0o700));
            let (_held, short) = shortened(&socket).unwrap();
            tokio::net::UnixStream::connect(short).await.unwrap();
        });
    }
}
