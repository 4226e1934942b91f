//! Where a client wants a process's output: nothing, a path, `file:///path`, or a program to log it,
//! `binary:///program?key=value` (or `binary-v2://`, which must say that it is ready), or `cri://`, which the shim's
//! own logs are described by.

use std::path::PathBuf;

use shim_api::logs::{LogSpec, percent_decoded};
use shim_api::{Error, Result};

#[derive(Debug, PartialEq, Eq)]
pub(super) enum Target {
    Nothing,
    /// A fifo, or a file that exists.
    Path(PathBuf),
    /// A file to append to, made when it is not there.
    LogFile(PathBuf),
    Program(Program),
    /// A log that is written here, of both streams.
    Log(LogSpec),
}

#[derive(Debug, PartialEq, Eq)]
pub(super) struct Program {
    pub(super) path: PathBuf,
    /// Key, value, key, value, ... of the query.
    pub(super) arguments: Vec<String>,
    /// Whether it writes a byte when ready; else closing the descriptor says so.
    pub(super) says_ready: bool,
}

impl Target {
    pub(super) fn parse(uri: &str) -> Result<Self> {
        let Some((scheme, rest)) = uri.split_once("://") else {
            return Ok(if uri.is_empty() { Self::Nothing } else { Self::Path(uri.into()) });
        };
        if scheme == "cri" {
            return LogSpec::parse(uri).map(Self::Log);
        }
        let (path, query) = rest.split_once('?').unwrap_or((rest, ""));
        let bad = |why| Error::invalid_argument(format!("stdio URI {uri:?}: {why}"));
        let path = PathBuf::from(decode(path, false).ok_or_else(|| bad("not percent-encoded UTF-8"))?);
        if !path.is_absolute() {
            return Err(bad("the path is not absolute"));
        }
        match scheme {
            "fifo" => Ok(Self::Path(path)),
            "file" => Ok(Self::LogFile(path)),
            "binary" | "binary-v2" => {
                let mut arguments = Vec::new();
                for pair in query.split('&').filter(|pair| !pair.is_empty()) {
                    let (key, value) = pair.split_once('=').unwrap_or((pair, ""));
                    for part in [key, value] {
                        let text = decode(part, true).ok_or_else(|| bad("not percent-encoded UTF-8"))?;
                        arguments.push(text);
                    }
                }
                Ok(Self::Program(Program { path, arguments, says_ready: scheme == "binary-v2" }))
            }
            _ => Err(bad("the schemes fifo, file, binary, binary-v2 and cri are known")),
        }
    }
}

fn decode(text: &str, plus_is_space: bool) -> Option<String> {
    String::from_utf8(percent_decoded(text, plus_is_space)?).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn uris_are_told_apart() {
        assert_eq!(Target::parse("").unwrap(), Target::Nothing);
        assert_eq!(Target::parse("/run/a").unwrap(), Target::Path("/run/a".into()));
        assert_eq!(Target::parse("file:///a%20b?x").unwrap(), Target::LogFile("/a b".into()));
        let Target::Program(program) = Target::parse("binary:///bin/log?tag=a+b&x=%26&flag").unwrap() else {
            panic!("not a program");
        };
        assert_eq!(program.arguments, ["tag", "a b", "x", "&", "flag", ""]);
        assert!(!program.says_ready);
        let log = LogSpec::new(Some("/l".into()), "/s".into());
        assert_eq!(Target::parse(&log.to_uri()).unwrap(), Target::Log(log));
        for bad in ["cri:///l", "http://x/y", "file://rel", "binary:///%zz", "file:///%ff"] {
            assert!(Target::parse(bad).is_err(), "{bad}");
        }
    }
}
