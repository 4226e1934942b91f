//! What the engine wants of a log, and the URIs that say it.

use std::ffi::OsString;
use std::fmt::Write as _;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::path::{Path, PathBuf};

use crate::{Error, Result};

/// Where containerd cuts lines when nobody says otherwise.
pub const MAX_LINE: u64 = 16 * 1024;
/// Where they are cut in any case: a line is kept in memory until its end.
pub const LONGEST_LINE: u64 = 1 << 20;

/// The word before a logger's argument.
const LOGGER: &str = "logger";

/// Who may write to the process's standard input.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Stdin {
    /// Nobody: the process reads nothing.
    #[default]
    No,
    /// Clients, as they come and go.
    Open,
    /// The first client that has it; with that client it ends.
    Once,
}

/// A log, and the socket where its streams are joined.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LogSpec {
    /// The file; without one the output is only for those who join.
    pub path: Option<PathBuf>,
    /// Where the shim is to listen; its folder is for root alone. May be longer than a socket's address.
    pub socket: PathBuf,
    /// Lines with more bytes are cut; 0: only where they would be too much for the memory ([`LONGEST_LINE`]).
    pub max_line: u64,
    /// Who may write to the process.
    pub stdin: Stdin,
    /// Whether the process has a terminal.
    pub terminal: bool,
    /// For a logger: the fifo from which somebody else's shim reads the process's input.
    pub stdin_fifo: Option<PathBuf>,
}

impl LogSpec {
    /// A log without input and terminal.
    #[must_use]
    pub fn new(path: Option<PathBuf>, socket: PathBuf) -> Self {
        Self { path, socket, max_line: MAX_LINE, stdin: Stdin::No, terminal: false, stdin_fifo: None }
    }

    /// Where lines are cut.
    #[must_use]
    pub fn cut(&self) -> u64 {
        if self.max_line == 0 { LONGEST_LINE } else { self.max_line.min(LONGEST_LINE) }
    }

    /// For our shim: the `stdout` of a task.
    #[must_use]
    pub fn to_uri(&self) -> String {
        format!("cri://{}?{}", encoded(self.path.as_deref().unwrap_or(Path::new("/"))), self.query())
    }

    /// For other shims: the `stdout` and `stderr` of a task, which make them start `program`, our shim's, as logger.
    /// One pair of key and value, as Go shims hand pairs on in no order.
    #[must_use]
    pub fn to_binary_uri(&self, program: &Path) -> String {
        let mut all = self.query();
        if let Some(path) = &self.path {
            let _ = write!(all, "&log={}", encoded(path));
        }
        format!("binary://{}?{LOGGER}={}", encoded(program), encoded(Path::new(&all)))
    }

    fn query(&self) -> String {
        let stdin = match self.stdin {
            Stdin::No => "no",
            Stdin::Open => "open",
            Stdin::Once => "once",
        };
        let mut query = format!("socket={}&max-line={}&stdin={stdin}", encoded(&self.socket), self.max_line);
        if self.terminal {
            query.push_str("&terminal=yes");
        }
        if let Some(fifo) = &self.stdin_fifo {
            let _ = write!(query, "&fifo={}", encoded(fifo));
        }
        query
    }

    /// Reads the URI of [`LogSpec::to_uri`].
    ///
    /// # Errors
    /// InvalidArgument when it is none, naming the part that is wrong.
    pub fn parse(uri: &str) -> Result<Self> {
        let rest = uri.strip_prefix("cri://").ok_or_else(|| bad(uri, "it does not begin with cri://"))?;
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let mut spec = Self::of_query(uri, query)?;
        if path != "/" {
            spec.path = Some(path_of(uri, path)?);
        }
        Ok(spec)
    }

    /// Reads a logger's arguments, which are those in the URI of [`LogSpec::to_binary_uri`].
    ///
    /// # Errors
    /// InvalidArgument when they are none.
    pub fn of_arguments(arguments: &[String]) -> Result<Self> {
        match arguments {
            [word, query] if word == LOGGER => Self::of_query(query, query),
            _ => Err(Error::invalid_argument(format!("a logger's arguments are {LOGGER} KEY=VALUE&..."))),
        }
    }

    /// Whether a program was started as a logger.
    #[must_use]
    pub fn is_logger(first_argument: &str) -> bool {
        first_argument == LOGGER
    }

    fn of_query(uri: &str, query: &str) -> Result<Self> {
        let mut spec = Self::new(None, PathBuf::new());
        for pair in query.split('&') {
            let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
            match (key, value) {
                ("socket", path) => spec.socket = path_of(uri, path)?,
                ("log", path) => spec.path = Some(path_of(uri, path)?),
                ("fifo", path) => spec.stdin_fifo = Some(path_of(uri, path)?),
                ("max-line", number) => {
                    spec.max_line = number.parse().map_err(|_| bad(uri, "max-line is not a number"))?;
                }
                ("stdin", "no") => spec.stdin = Stdin::No,
                ("stdin", "open") => spec.stdin = Stdin::Open,
                ("stdin", "once") => spec.stdin = Stdin::Once,
                ("terminal", "yes") => spec.terminal = true,
                _ => return Err(bad(uri, &format!("{pair:?} says nothing to this version"))),
            }
        }
        if spec.socket.as_os_str().is_empty() {
            return Err(bad(uri, "it names no socket"));
        }
        Ok(spec)
    }
}

fn bad(uri: &str, why: &str) -> Error {
    Error::invalid_argument(format!("log URI {uri:?}: {why}"))
}

fn path_of(uri: &str, text: &str) -> Result<PathBuf> {
    let bytes = percent_decoded(text, false).ok_or_else(|| bad(uri, "it is not percent-encoded"))?;
    let path = PathBuf::from(OsString::from_vec(bytes));
    if !path.is_absolute() || path.as_os_str().as_bytes().contains(&0) {
        return Err(bad(uri, &format!("{} is not an absolute path", path.display())));
    }
    Ok(path)
}

/// Percent-encodes all that means something to any reader of URIs.
fn encoded(path: &Path) -> String {
    let mut text = String::new();
    for byte in path.as_os_str().as_bytes() {
        if byte.is_ascii_alphanumeric() || b"/._-~".contains(byte) {
            text.push(char::from(*byte));
        } else {
            let _ = write!(text, "%{byte:02X}");
        }
    }
    text
}

/// The bytes of a percent-encoded text; `None` when it is not well-formed.
#[must_use]
pub fn percent_decoded(text: &str, plus_is_space: bool) -> Option<Vec<u8>> {
    let mut bytes = text.bytes();
    let mut decoded = Vec::with_capacity(text.len());
    while let Some(byte) = bytes.next() {
        decoded.push(match byte {
            b'%' => {
                let mut digit = || char::from(bytes.next()?).to_digit(16);
                u8::try_from(digit()? * 16 + digit()?).ok()?
            }
            b'+' if plus_is_space => b' ',
            other => other,
        });
    }
    Some(decoded)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn spec() -> LogSpec {
        LogSpec {
            path: Some("/var/log/pods/a b%?&=+_ü/0.log".into()),
            socket: "/run/x y/streams/c1".into(),
            max_line: 7,
            stdin: Stdin::Once,
            terminal: true,
            stdin_fifo: Some("/run/fifo&in".into()),
        }
    }

    #[test]
    fn a_spec_survives_its_uri() {
        assert_eq!(LogSpec::parse(&spec().to_uri()).unwrap(), spec());
        let least = LogSpec::new(None, "/s".into());
        assert_eq!(least.to_uri(), "cri:///?socket=/s&max-line=16384&stdin=no");
        assert_eq!(LogSpec::parse(&least.to_uri()).unwrap(), least);
        assert_eq!((least.cut(), LogSpec { max_line: 0, ..least }.cut()), (MAX_LINE, LONGEST_LINE));
    }

    #[test]
    fn a_spec_survives_the_arguments_that_shims_make_of_its_uri() {
        let uri = spec().to_binary_uri(Path::new("/usr/local/bin/containerd-shim-runc-v2"));
        let (program, query) = uri.split_once('?').unwrap();
        assert_eq!(program, "binary:///usr/local/bin/containerd-shim-runc-v2");
        let (key, value) = query.split_once('=').unwrap();
        assert!(!value.contains(['&', '=', '+', ' ']), "{value}");
        let value = String::from_utf8(percent_decoded(value, true).unwrap()).unwrap();
        assert!(LogSpec::is_logger(key));
        assert_eq!(LogSpec::of_arguments(&[key.to_owned(), value]).unwrap(), spec());
    }

    #[test]
    fn what_is_wrong_is_named() {
        for (uri, what) in [
            ("file:///a", "begin"),
            ("cri:///a", "says nothing"),
            ("cri:///a?stdin=no", "socket"),
            ("cri:///a?socket=b", "absolute"),
            ("cri://a?socket=/b", "absolute"),
            ("cri:///a?socket=/%zz", "encoded"),
            ("cri:///a?socket=/b%00", "absolute"),
            ("cri:///a?socket=/b&max-line=x", "number"),
            ("cri:///a?socket=/b&colour=red", "colour"),
        ] {
            let error = LogSpec::parse(uri).unwrap_err();
            assert!(error.message.contains(what), "{uri}: {error}");
        }
        assert!(LogSpec::of_arguments(&["logger".to_owned()]).is_err());
    }
}
