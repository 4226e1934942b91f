//! The command line, as Go's flag package reads it: `-name value`, `-name=value`, and the same with two dashes.

use std::path::PathBuf;

/// What the command line says; nothing is required here.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(crate) struct Args {
    pub(crate) namespace: String,
    pub(crate) id: String,
    /// Where the engine serves gRPC.
    pub(crate) address: String,
    pub(crate) publish_binary: String,
    pub(crate) bundle: PathBuf,
    /// The socket to serve, when it does not come as a descriptor.
    pub(crate) socket: PathBuf,
    pub(crate) debug: bool,
    pub(crate) version: bool,
    pub(crate) info: bool,
    /// `start`, `delete`, or none: serve.
    pub(crate) action: String,
}

impl Args {
    /// Reads the arguments after the program's name.
    ///
    /// # Errors
    /// A sentence about the first argument that nobody knows or that lacks its value.
    pub(crate) fn parse(arguments: impl IntoIterator<Item = String>) -> Result<Self, String> {
        let mut args = Self { publish_binary: "containerd".to_owned(), ..Self::default() };
        let mut arguments = arguments.into_iter();
        while let Some(argument) = arguments.next() {
            let Some(flag) = argument.strip_prefix("--").or_else(|| argument.strip_prefix('-')) else {
                // Go's flags end at the first word that is none.
                args.action = argument;
                break;
            };
            if flag.is_empty() {
                args.action = arguments.next().unwrap_or_default();
                break;
            }
            let (name, given) = match flag.split_once('=') {
                Some((name, value)) => (name, Some(value.to_owned())),
                None => (flag, None),
            };
            let boolean = |given: Option<String>| match given.as_deref() {
                None | Some("true" | "1" | "t") => Ok(true),
                Some("false" | "0" | "f") => Ok(false),
                Some(other) => Err(format!("-{name}={other}: true or false is expected")),
            };
            match name {
                "debug" => args.debug = boolean(given)?,
                "v" | "version" => args.version = boolean(given)?,
                "info" => args.info = boolean(given)?,
                _ => {
                    let known = matches!(
                        name,
                        "namespace"
                            | "id"
                            | "address"
                            | "publish-binary"
                            | "bundle"
                            | "socket"
                            | "debug-socket"
                    );
                    if !known {
                        return Err(format!("-{name} is no flag of this program"));
                    }
                    let value = given.or_else(|| arguments.next()).ok_or(format!("-{name} needs a value"))?;
                    match name {
                        "namespace" => args.namespace = value,
                        "id" => args.id = value,
                        "address" => args.address = value,
                        "publish-binary" => args.publish_binary = value,
                        "bundle" => args.bundle = value.into(),
                        "socket" => args.socket = value.into(),
                        _ => {}
                    }
                }
            }
        }
        Ok(args)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(line: &str) -> Result<Args, String> {
        Args::parse(line.split(' ').filter(|word| !word.is_empty()).map(str::to_owned))
    }

    #[test]
    fn one_dash_or_two() {
        let args = parse("-namespace ns --id=web -address /a -publish-binary /c -debug start").unwrap();
        assert_eq!((args.namespace.as_str(), args.id.as_str(), args.action.as_str()), ("ns", "web", "start"));
        assert!(args.debug);
        assert_eq!(parse("-namespace ns -id x -bundle /b delete").unwrap().bundle, PathBuf::from("/b"));
        assert!(parse("-v").unwrap().version && parse("--info").unwrap().info);
        assert_eq!(parse("-debug=false").unwrap(), parse("").unwrap());
    }

    #[test]
    fn mistakes_are_named() {
        assert!(parse("-nope 1").unwrap_err().contains("-nope"));
        assert!(parse("-id").unwrap_err().contains("value"));
        assert!(parse("-debug=maybe").is_err());
    }
}
