//! What a request says besides its message: namespace, lease, deadline. Built once, from the gRPC headers.

use std::fmt;
use std::sync::Arc;
use std::time::{Duration, Instant};

use tonic::metadata::MetadataMap;

use crate::error::{Error, Result};

/// The header that names the namespace, on gRPC.
pub const NAMESPACE_HEADER: &str = "containerd-namespace";
/// The header that names the lease, on gRPC.
pub const LEASE_HEADER: &str = "containerd-lease";

/// The longest identifier, in characters.
const IDENTIFIER_MAX: usize = 76;

/// Checks an identifier (namespace, container, exec, sandbox): alphanumeric runs joined by single `.`, `_` or `-`,
/// at most 76 characters, so that it is always safe as one component of a path.
pub fn validate_identifier(what: &str, id: &str) -> Result<()> {
    if id.is_empty() {
        return Err(Error::invalid_argument(format!("{what} must not be empty")));
    }
    if id.len() > IDENTIFIER_MAX {
        let head: String = id.chars().take(IDENTIFIER_MAX).collect();
        return Err(Error::invalid_argument(format!(
            "{what} \"{head}...\" is longer than {IDENTIFIER_MAX} characters"
        )));
    }
    let runs_ok = id
        .split(['.', '_', '-'])
        .all(|run| !run.is_empty() && run.bytes().all(|byte| byte.is_ascii_alphanumeric()));
    if runs_ok {
        Ok(())
    } else {
        Err(Error::invalid_argument(format!(
            "{what} {id:?} is not valid: use letters and digits, joined by single '.', '_' or '-'"
        )))
    }
}

/// A namespace whose name has been checked; cheap to clone.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Namespace(Arc<str>);

impl Namespace {
    /// Checks the name; InvalidArgument when it is not an identifier.
    pub fn new(name: &str) -> Result<Self> {
        validate_identifier("namespace", name)?;
        Ok(Namespace(name.into()))
    }

    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl fmt::Debug for Namespace {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Namespace({})", self.0)
    }
}

/// The context of one request.
#[derive(Debug, Clone, Default)]
pub struct RequestContext {
    namespace: Option<Namespace>,
    lease: Option<String>,
    deadline: Option<Instant>,
}

impl RequestContext {
    /// A context made inside the engine, not by a request.
    pub fn internal(namespace: Namespace) -> Self {
        RequestContext { namespace: Some(namespace), lease: None, deadline: None }
    }

    /// The same context under a lease.
    #[must_use]
    pub fn with_lease(mut self, lease: impl Into<String>) -> Self {
        self.lease = Some(lease.into());
        self
    }

    /// Takes a request apart; InvalidArgument when a header is malformed.
    pub fn split<T>(request: tonic::Request<T>) -> Result<(Self, T)> {
        let context = Self::from_headers(request.metadata())?;
        Ok((context, request.into_inner()))
    }

    /// Reads the headers alone, for a streaming request.
    pub fn from_headers(headers: &MetadataMap) -> Result<Self> {
        let text = |name: &str| -> Result<Option<&str>> {
            match headers.get(name) {
                None => Ok(None),
                Some(value) => value
                    .to_str()
                    .map(|value| Some(value).filter(|value| !value.is_empty()))
                    .map_err(|_| Error::invalid_argument(format!("header {name} is not plain ASCII text"))),
            }
        };
        let namespace = text(NAMESPACE_HEADER)?.map(Namespace::new).transpose()?;
        let lease = text(LEASE_HEADER)?.map(str::to_owned);
        let deadline =
            text("grpc-timeout")?.and_then(parse_timeout).and_then(|left| Instant::now().checked_add(left));
        Ok(RequestContext { namespace, lease, deadline })
    }

    /// The namespace, for operations that need one; FailedPrecondition when the request named none.
    pub fn namespace(&self) -> Result<&Namespace> {
        self.namespace.as_ref().ok_or_else(|| {
            Error::failed_precondition(format!("namespace is required: send the header {NAMESPACE_HEADER}"))
        })
    }

    /// The lease that new resources are to join, if the request named one.
    pub fn lease(&self) -> Option<&str> {
        self.lease.as_deref()
    }

    /// When the client stops waiting, if it said so.
    pub fn deadline(&self) -> Option<Instant> {
        self.deadline
    }
}

/// Parses the gRPC time-out header: up to eight digits and a unit (H, M, S, m, u, n).
fn parse_timeout(text: &str) -> Option<Duration> {
    let unit = text.chars().last()?;
    let digits = text.strip_suffix(unit)?;
    if digits.is_empty() || digits.len() > 8 {
        return None;
    }
    let count: u64 = digits.parse().ok()?;
    Some(match unit {
        'H' => Duration::from_secs(count * 3600),
        'M' => Duration::from_secs(count * 60),
        'S' => Duration::from_secs(count),
        'm' => Duration::from_millis(count),
        'u' => Duration::from_micros(count),
        'n' => Duration::from_nanos(count),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn identifiers() {
        for good in ["default", "k8s.io", "a", "A-b_c.9", &"x".repeat(76)] {
            assert!(validate_identifier("id", good).is_ok(), "{good}");
        }
        for bad in ["", ".", "..", "a..b", "-a", "a-", "a/b", "ä", "a b", "a\0", &"x".repeat(77)] {
            assert!(matches!(validate_identifier("id", bad), Err(Error::InvalidArgument(_))), "{bad}");
        }
    }

    #[test]
    fn missing_namespace_is_a_failed_precondition() {
        let context = RequestContext::from_headers(&MetadataMap::new()).unwrap();
        let Err(Error::FailedPrecondition(message)) = context.namespace() else {
            panic!("expected an error")
        };
        assert!(message.starts_with("namespace is required"));
    }

    #[test]
    fn timeouts() {
        assert_eq!(parse_timeout("10S"), Some(Duration::from_secs(10)));
        assert_eq!(parse_timeout("5m"), Some(Duration::from_millis(5)));
        for bad in ["", "S", "123456789S", "5x", "-5S", "5\u{e9}"] {
            assert_eq!(parse_timeout(bad), None, "{bad}");
        }
    }
}
