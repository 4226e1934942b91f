//! How an engine starts a shim and learns where it listens. Three generations are in use:
//!
//! | engine / shim  | stdin of `start`             | stdout of `start`                                    |
//! |----------------|------------------------------|------------------------------------------------------|
//! | 1.6, 1.7       | Any: the runtime options     | the bare address                                     |
//! | 2.0, 2.1, 2.2  | Any: the runtime options     | JSON `{"version","address","protocol"}`              |
//! | 2.3 and later  | `BootstrapParams` (protobuf) | `BootstrapResult` (protobuf), raw, no newline        |
//!
//! What each does with the wrong stdin: 1.6 and Go shims of 2.3 and later fail; 1.7 to 2.2 only lose the options.
//! An engine that does not know its shim thus sends the newest first and the Any when that fails
//! ([`Launch::stdin_newest_first`]); answers tell their generation themselves ([`Answer::parse`]).
//! All engines take a bare address as the answer to an Any; engines take it for version 2 of the task service.

use std::collections::BTreeMap;
use std::path::PathBuf;

use prost::Message;
use prost_types::Any;
use proto::containerd::runtime::bootstrap::v1::{BootstrapParams, BootstrapResult, Extension};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// More on stdin or stdout than this is no bootstrap message, in bytes.
pub const MESSAGE_LIMIT: usize = 10 << 20;

/// Where shims put their sockets unless told otherwise.
pub const DEFAULT_SOCKET_DIR: &str = "/run/containerd/s";

/// The longest usable socket folder, in bytes: `/`, 64 hexadecimal digits and a NUL must fit in the 108 bytes of
/// a Unix socket's address.
pub const SOCKET_DIR_LIMIT: usize = 42;

/// The generation of a bootstrap message.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Generation {
    /// The options as an Any in, an address out (1.6 and 1.7), or JSON out (2.0 to 2.2).
    Options,
    /// `BootstrapParams` in, `BootstrapResult` out (2.3 and later).
    Params,
}

/// What an engine tells a shim it starts.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct Launch {
    /// Id of the container or sandbox the shim is started for; equals the `-id` argument.
    pub id: String,
    /// Namespace; equals the `-namespace` argument.
    pub namespace: String,
    /// `-8` trace, `-4` debug, `0` info, `4` warn, `8` error.
    pub log_level: i32,
    /// Version of the engine.
    pub engine_version: String,
    /// Where the engine takes events: a path.
    pub ttrpc_address: String,
    /// Where the engine serves gRPC: a path.
    pub grpc_address: String,
    /// The binary that publishes an event when there is no ttrpc address.
    pub publish_binary: String,
    /// Runtime options, when there are any.
    pub options: Option<Any>,
    /// Folder for the shim's socket; `None` leaves it to the shim.
    pub socket_dir: Option<PathBuf>,
}

impl Launch {
    /// Bytes for the stdin of `start` in the given generation.
    #[must_use]
    pub fn encode(&self, generation: Generation) -> Vec<u8> {
        match generation {
            Generation::Options => self.options.as_ref().map(Message::encode_to_vec).unwrap_or_default(),
            Generation::Params => BootstrapParams {
                instance_id: self.id.clone(),
                namespace: self.namespace.clone(),
                log_level: self.log_level,
                containerd_version: self.engine_version.clone(),
                containerd_ttrpc_address: self.ttrpc_address.clone(),
                containerd_grpc_address: self.grpc_address.clone(),
                containerd_binary: self.publish_binary.clone(),
                extensions: self.options.iter().map(|any| Extension { value: Some(any.clone()) }).collect(),
                socket_dir: self.socket_dir.as_ref().map(|dir| dir.to_string_lossy().into_owned()),
            }
            .encode_to_vec(),
        }
    }

    /// What to try on a shim of unknown age, in order; the next only when `start` failed with the one before.
    #[must_use]
    pub fn stdin_newest_first(&self) -> [(Generation, Vec<u8>); 2] {
        [Generation::Params, Generation::Options].map(|generation| (generation, self.encode(generation)))
    }

    /// Reads the stdin of `start` in a shim that was given these `-id` and `-namespace` arguments. From an engine
    /// of the first generation only the options are known.
    ///
    /// # Errors
    /// InvalidArgument when it is no bootstrap message, or names another id or namespace than the arguments do.
    pub fn read(stdin: &[u8], id: &str, namespace: &str) -> Result<(Generation, Self)> {
        let bare =
            |options| Self { id: id.to_owned(), namespace: namespace.to_owned(), options, ..Self::default() };
        if stdin.is_empty() {
            return Ok((Generation::Options, bare(None)));
        }
        // Both messages begin with two strings, so the bytes of one may decode as the other; the ids decide. No
        // type is named like a container, and nothing but BootstrapParams has a third field.
        let params = BootstrapParams::decode(stdin).ok();
        let is_params = params.as_ref().is_some_and(|params| {
            (params.instance_id == id && params.namespace == namespace)
                || !params.containerd_grpc_address.is_empty()
                || !params.containerd_ttrpc_address.is_empty()
                || !params.containerd_version.is_empty()
        });
        match params {
            Some(params) if is_params => {
                if params.instance_id != id || params.namespace != namespace {
                    return Err(Error::invalid_argument(format!(
                        "bootstrap parameters on stdin are for {}/{}, the arguments say {namespace}/{id}",
                        params.namespace, params.instance_id
                    )));
                }
                let launch = Self {
                    id: params.instance_id,
                    namespace: params.namespace,
                    log_level: params.log_level,
                    engine_version: params.containerd_version,
                    ttrpc_address: params.containerd_ttrpc_address,
                    grpc_address: params.containerd_grpc_address,
                    publish_binary: params.containerd_binary,
                    options: params
                        .extensions
                        .into_iter()
                        .find_map(|extension| extension.value.filter(is_options)),
                    socket_dir: params.socket_dir.filter(|dir| !dir.is_empty()).map(PathBuf::from),
                };
                launch.check_socket_dir()?;
                Ok((Generation::Params, launch))
            }
            _ => match Any::decode(stdin) {
                Ok(any) => Ok((Generation::Options, bare(Some(any).filter(|any| !any.type_url.is_empty())))),
                Err(error) => Err(Error::invalid_argument(format!(
                    "stdin of start is neither bootstrap parameters nor runtime options: {error}"
                ))),
            },
        }
    }

    fn check_socket_dir(&self) -> Result<()> {
        match &self.socket_dir {
            Some(dir) if !dir.is_absolute() || dir.as_os_str().len() > SOCKET_DIR_LIMIT => {
                Err(Error::invalid_argument(format!(
                    "socket folder {}: must be absolute and of {SOCKET_DIR_LIMIT} bytes at most",
                    dir.display()
                )))
            }
            _ => Ok(()),
        }
    }
}

/// True for the two messages that carry a runtime's options.
fn is_options(any: &Any) -> bool {
    let name = any.type_url.rsplit('/').next().unwrap_or_default();
    matches!(name, "containerd.runc.v1.Options" | "runtimeoptions.v1.Options")
}

/// The form a shim's answer takes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Form {
    /// The address alone, which means version 2 over ttrpc.
    Bare,
    /// A JSON object; also what an engine keeps in the bundle's bootstrap.json.
    Json,
    /// `BootstrapResult`.
    Protobuf,
}

/// Where a started shim listens, and what it speaks there.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Answer {
    /// Version of the task service: 2 or 3.
    pub version: u32,
    /// `unix:///path`.
    pub address: String,
    /// `ttrpc` or `grpc`.
    pub protocol: String,
}

impl Answer {
    /// An answer that says ttrpc.
    #[must_use]
    pub fn ttrpc(version: u32, address: impl Into<String>) -> Self {
        Self { version, address: address.into(), protocol: "ttrpc".to_owned() }
    }

    /// Bytes for the stdout of `start`.
    #[must_use]
    pub fn encode(&self, form: Form) -> Vec<u8> {
        match form {
            Form::Bare => self.address.clone().into_bytes(),
            Form::Json => serde_json::to_vec(self).unwrap_or_default(),
            Form::Protobuf => BootstrapResult {
                version: i32::try_from(self.version).unwrap_or(i32::MAX),
                address: self.address.clone(),
                protocol: self.protocol.clone(),
                capabilities: Vec::new(),
                metadata: Default::default(),
            }
            .encode_to_vec(),
        }
    }

    /// Reads the stdout of `start`, whatever its generation.
    ///
    /// # Errors
    /// InvalidArgument when it is none of the three forms, or names a version or protocol nobody speaks.
    pub fn parse(stdout: &[u8]) -> Result<Self> {
        let answer = Self::parse_form(stdout).ok_or_else(|| {
            Error::invalid_argument(format!(
                "the shim's answer to start is no address: {:?}",
                String::from_utf8_lossy(&stdout[..stdout.len().min(200)])
            ))
        })?;
        if !matches!(answer.version, 2 | 3) || !matches!(answer.protocol.as_str(), "ttrpc" | "grpc") {
            return Err(Error::invalid_argument(format!(
                "the shim speaks version {} over {:?}: versions 2 and 3 over ttrpc or grpc are known",
                answer.version, answer.protocol
            )));
        }
        Ok(answer)
    }

    fn parse_form(stdout: &[u8]) -> Option<Self> {
        if let Ok(text) = std::str::from_utf8(stdout) {
            let text = text.trim();
            if text.starts_with('{') {
                return serde_json::from_str(text).ok();
            }
            // A protobuf message begins with a control character, an address with none.
            let is_address = text.starts_with('/') || text.contains("://");
            if is_address && !text.contains(|c: char| c.is_control() || c.is_whitespace()) {
                return Some(Self::ttrpc(2, text));
            }
        }
        let result = BootstrapResult::decode(stdout).ok()?;
        if result.address.is_empty() {
            return None;
        }
        Some(Self {
            version: u32::try_from(result.version).ok()?,
            address: result.address,
            protocol: if result.protocol.is_empty() { "ttrpc".to_owned() } else { result.protocol },
        })
    }
}

/// The environment of a shim beyond the engine's own, by name.
#[must_use]
pub fn environment(launch: &Launch) -> BTreeMap<&'static str, String> {
    BTreeMap::from([
        ("TTRPC_ADDRESS", launch.ttrpc_address.clone()),
        ("GRPC_ADDRESS", launch.grpc_address.clone()),
        ("NAMESPACE", launch.namespace.clone()),
        // Every release of containerd says 2, whatever it speaks.
        ("MAX_SHIM_VERSION", "2".to_owned()),
        ("GOMAXPROCS", "2".to_owned()),
    ])
}

/// The arguments common to a shim's actions, in containerd's spelling; the action itself comes last.
#[must_use]
pub fn arguments(launch: &Launch, bundle_for_delete: Option<&std::path::Path>, action: &str) -> Vec<String> {
    let mut arguments = vec![
        "-namespace".to_owned(),
        launch.namespace.clone(),
        "-id".to_owned(),
        launch.id.clone(),
        "-address".to_owned(),
        launch.grpc_address.clone(),
        "-publish-binary".to_owned(),
        launch.publish_binary.clone(),
    ];
    if let Some(bundle) = bundle_for_delete {
        arguments.extend(["-bundle".to_owned(), bundle.to_string_lossy().into_owned()]);
    }
    if launch.log_level < 0 {
        arguments.push("-debug".to_owned());
    }
    arguments.push(action.to_owned());
    arguments
}

#[cfg(test)]
mod tests {
    use super::*;

    fn options() -> Any {
        // Options { binary_name: "crun" }: field 6, four bytes.
        Any { type_url: "containerd.runc.v1.Options".into(), value: b"\x32\x04crun".to_vec() }
    }

    fn launch() -> Launch {
        Launch {
            id: "web".into(),
            namespace: "default".into(),
            log_level: -4,
            engine_version: "v2.3.0".into(),
            ttrpc_address: "/run/c.sock.ttrpc".into(),
            grpc_address: "/run/c.sock".into(),
            publish_binary: "/bin/containerd".into(),
            options: Some(options()),
            socket_dir: Some("/run/gantry/s".into()),
        }
    }

    #[test]
    fn params_are_the_bytes_a_go_engine_sends() {
        let bytes = launch().encode(Generation::Params);
        let mut expected = b"\x0a\x03web\x12\x07default".to_vec();
        // An enum below zero takes ten bytes, as every negative varint.
        expected.extend(b"\x18\xfc\xff\xff\xff\xff\xff\xff\xff\xff\x01");
        expected.extend(b"\x22\x06v2.3.0\x2a\x11/run/c.sock.ttrpc\x32\x0b/run/c.sock\x3a\x0f/bin/containerd");
        expected.extend(b"\x42\x26\x0a\x24\x0a\x1acontainerd.runc.v1.Options\x12\x06\x32\x04crun");
        expected.extend(b"\x4a\x0d/run/gantry/s");
        assert_eq!(bytes, expected);
        let (generation, read) = Launch::read(&bytes, "web", "default").unwrap();
        assert_eq!(generation, Generation::Params);
        assert_eq!(read, launch());
    }

    #[test]
    fn options_are_a_plain_any() {
        let bytes = launch().encode(Generation::Options);
        assert_eq!(bytes, b"\x0a\x1acontainerd.runc.v1.Options\x12\x06\x32\x04crun");
        let (generation, read) = Launch::read(&bytes, "web", "default").unwrap();
        assert_eq!(generation, Generation::Options);
        assert_eq!(read.options, Some(options()));
        assert_eq!(read.socket_dir, None);
    }

    #[test]
    fn no_stdin_means_no_options() {
        let (generation, read) = Launch::read(b"", "web", "default").unwrap();
        assert_eq!((generation, read.options), (Generation::Options, None));
    }

    #[test]
    fn ids_must_equal_the_arguments() {
        let bytes = launch().encode(Generation::Params);
        assert!(Launch::read(&bytes, "other", "default").is_err());
        assert!(Launch::read(&bytes, "web", "other").is_err());
        assert!(Launch::read(b"\xff\xff\xff", "web", "default").is_err());
    }

    #[test]
    fn a_socket_folder_must_fit_in_an_address() {
        let mut long = launch();
        long.socket_dir = Some(format!("/{}", "d".repeat(SOCKET_DIR_LIMIT)).into());
        assert!(Launch::read(&long.encode(Generation::Params), "web", "default").is_err());
        long.socket_dir = Some("relative".into());
        assert!(Launch::read(&long.encode(Generation::Params), "web", "default").is_err());
    }

    #[test]
    fn answers_of_all_generations_are_read() {
        let bare = Answer::ttrpc(2, "unix:///run/containerd/s/ab");
        assert_eq!(Answer::parse(b"unix:///run/containerd/s/ab").unwrap(), bare);
        assert_eq!(Answer::parse(b"unix:///run/containerd/s/ab\n").unwrap(), bare);
        let three = Answer::ttrpc(3, "unix:///run/containerd/s/ab");
        let json = br#"{"version":3,"address":"unix:///run/containerd/s/ab","protocol":"ttrpc"}"#;
        assert_eq!(Answer::parse(json).unwrap(), three);
        assert_eq!(three.encode(Form::Json), json);
        let protobuf = b"\x08\x03\x12\x1bunix:///run/containerd/s/ab\x1a\x05ttrpc";
        assert_eq!(Answer::parse(protobuf).unwrap(), three);
        assert_eq!(three.encode(Form::Protobuf), protobuf);
        assert_eq!(bare.encode(Form::Bare), b"unix:///run/containerd/s/ab");
    }

    #[test]
    fn nonsense_is_no_answer() {
        let nonsense: [&[u8]; 7] = [
            b"",
            b"panic: runtime error\ngoroutine 1 [running]:",
            b"{\"version\":3}",
            b"\x08\x03",
            b"\x08\x09\x12\x04unix\x1a\x05ttrpc",
            br#"{"version":2,"address":"unix:///a","protocol":"smoke"}"#,
            b"level=info msg=\"started\" unix:///run/s",
        ];
        for bytes in nonsense {
            assert!(Answer::parse(bytes).is_err(), "{:?}", String::from_utf8_lossy(bytes));
        }
    }

    proptest::proptest! {
        #[test]
        fn reading_never_panics(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..200)) {
            let _ = Launch::read(&bytes, "web", "default");
            let _ = Answer::parse(&bytes);
        }
    }
}
