//! The clients: `ctr`, Debian's and ours, and a gRPC channel.

use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use tonic::Status;
use tonic::codec::{Codec, DecodeBuf, Decoder, EncodeBuf, Encoder};
use tonic::transport::Channel;

use crate::host::{Host, STOCK_CTR};
use crate::{LIMIT, binary};

/// A `ctr` that talks to one engine, in one namespace.
#[derive(Clone)]
pub struct Ctr {
    program: PathBuf,
    address: PathBuf,
    /// The namespace.
    pub namespace: String,
}

/// How a command ended.
#[derive(Debug, Clone)]
pub struct Ended {
    /// Its exit code; 128 + N when signal N ended it.
    pub code: i32,
    /// What it wrote to stdout.
    pub stdout: String,
    /// What it wrote to stderr.
    pub stderr: String,
}

impl Ctr {
    /// Debian's.
    pub fn stock(host: &Host) -> Self {
        Ctr { program: STOCK_CTR.into(), address: host.address(), namespace: host.namespace.clone() }
    }

    /// Ours.
    pub fn ours(host: &Host) -> Self {
        Ctr { program: binary("ctr"), address: host.address(), namespace: host.namespace.clone() }
    }

    /// The socket of the engine.
    pub fn address(&self) -> &Path {
        &self.address
    }

    /// A command, not started.
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(&self.program);
        command.arg("--address").arg(&self.address).args(["--namespace", &self.namespace]).args(arguments);
        command
            .env_remove("CONTAINERD_ADDRESS")
            .env_remove("CONTAINERD_NAMESPACE")
            .env_remove("GANTRY_ADDRESS");
        command
    }

    /// Runs a command to its end.
    pub fn run(&self, arguments: &[&str]) -> Ended {
        finish(self.spawn(arguments), &arguments.join(" "))
    }

    /// Runs a command that must succeed; its stdout.
    pub fn ok(&self, arguments: &[&str]) -> String {
        let ended = self.run(arguments);
        assert_eq!(ended.code, 0, "ctr {}: {ended:?}", arguments.join(" "));
        ended.stdout
    }

    /// Runs a command that must fail; its stderr.
    pub fn fails(&self, arguments: &[&str]) -> String {
        let ended = self.run(arguments);
        assert_ne!(ended.code, 0, "ctr {}: {ended:?}", arguments.join(" "));
        ended.stderr
    }

    /// Starts a command, without input, its output piped.
    pub fn spawn(&self, arguments: &[&str]) -> Child {
        let mut command = self.command(arguments);
        command.stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap_or_else(|error| panic!("{}: {error}", self.program.display()))
    }

    /// Runs a command with this input.
    pub fn with_input(&self, arguments: &[&str], input: &[u8]) -> Ended {
        use std::io::Write as _;
        let mut command = self.command(arguments);
        let mut child =
            command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().unwrap();
        let mut stdin = child.stdin.take().unwrap();
        let input = input.to_owned();
        let writer = std::thread::spawn(move || {
            let _ = stdin.write_all(&input);
        });
        let ended = finish(child, &arguments.join(" "));
        writer.join().unwrap();
        ended
    }
}

/// Waits for a command, up to the limit, and reads what it says.
pub fn finish(mut child: Child, what: &str) -> Ended {
    let read = |pipe: Option<Box<dyn std::io::Read + Send>>| {
        std::thread::spawn(move || {
            let mut bytes = Vec::new();
            if let Some(mut pipe) = pipe {
                let _ = pipe.read_to_end(&mut bytes);
            }
            String::from_utf8_lossy(&bytes).into_owned()
        })
    };
    let stdout = read(child.stdout.take().map(|pipe| Box::new(pipe) as _));
    let stderr = read(child.stderr.take().map(|pipe| Box::new(pipe) as _));
    let end = Instant::now() + LIMIT;
    let status = loop {
        if let Some(status) = child.try_wait().unwrap() {
            break status;
        }
        if Instant::now() > end {
            let _ = child.kill();
            let _ = child.wait();
            panic!(
                "{what} took longer than {LIMIT:?}; stdout: {:?}, stderr: {:?}",
                stdout.join(),
                stderr.join()
            );
        }
        std::thread::sleep(Duration::from_millis(5));
    };
    use std::os::unix::process::ExitStatusExt as _;
    let code = status.code().unwrap_or_else(|| 128 + status.signal().unwrap_or(0));
    Ended { code, stdout: stdout.join().unwrap(), stderr: stderr.join().unwrap() }
}

/// A gRPC channel to an engine's socket.
pub async fn channel(address: &Path) -> Channel {
    let address = address.to_owned();
    let connect = tower::service_fn(move |_: tonic::transport::Uri| {
        let address = address.clone();
        async move {
            let stream = tokio::net::UnixStream::connect(address).await?;
            Ok::<_, std::io::Error>(hyper_util::rt::TokioIo::new(stream))
        }
    });
    tonic::transport::Endpoint::from_static("http://engine").connect_with_connector(connect).await.unwrap()
}

/// A request in a namespace.
pub fn in_namespace<T>(namespace: &str, message: T) -> tonic::Request<T> {
    let mut request = tonic::Request::new(message);
    request.metadata_mut().insert("containerd-namespace", namespace.parse().unwrap());
    request
}

/// Messages as bytes, for calls that are known by their descriptors alone.
#[derive(Debug, Default)]
pub struct Raw;

impl Codec for Raw {
    type Encode = Vec<u8>;
    type Decode = Vec<u8>;
    type Encoder = Raw;
    type Decoder = Raw;

    fn encoder(&mut self) -> Raw {
        Raw
    }

    fn decoder(&mut self) -> Raw {
        Raw
    }
}

impl Encoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn encode(&mut self, item: Vec<u8>, buffer: &mut EncodeBuf<'_>) -> Result<(), Status> {
        bytes::BufMut::put_slice(buffer, &item);
        Ok(())
    }
}

impl Decoder for Raw {
    type Item = Vec<u8>;
    type Error = Status;

    fn decode(&mut self, buffer: &mut DecodeBuf<'_>) -> Result<Option<Vec<u8>>, Status> {
        let length = bytes::Buf::remaining(buffer);
        Ok(Some(bytes::Buf::copy_to_bytes(buffer, length).to_vec()))
    }
}
