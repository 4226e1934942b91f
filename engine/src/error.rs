//! The one error type of the engine, in the classes that clients branch on.
//!
//! A variant says what the caller can do about it; the text says what was tried, on what, why it failed and, where
//! there is one, the remedy. The only conversion to a gRPC status is here.

use shim_api::trace;

/// Result of the engine's operations.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// A failure in one of containerd's error classes; the string is the whole message for a person.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The object does not exist.
    #[error("{0}")]
    NotFound(String),
    /// The object exists already, or the key is taken.
    #[error("{0}")]
    AlreadyExists(String),
    /// The object is in a state that forbids the operation.
    #[error("{0}")]
    FailedPrecondition(String),
    /// The request is malformed; the same request will never succeed.
    #[error("{0}")]
    InvalidArgument(String),
    /// Busy or not reachable now; the same request may succeed later.
    #[error("{0}")]
    Unavailable(String),
    /// An offset lies outside of what is there.
    #[error("{0}")]
    OutOfRange(String),
    /// The engine does not offer this operation.
    #[error("{0}")]
    Unimplemented(String),
    /// The caller, or the engine, lacks a right.
    #[error("{0}")]
    PermissionDenied(String),
    /// Disk, memory, descriptors or a limit are used up.
    #[error("{0}")]
    ResourceExhausted(String),
    /// The operation was given up because of a conflict with another.
    #[error("{0}")]
    Aborted(String),
    /// A time limit passed.
    #[error("{0}")]
    DeadlineExceeded(String),
    /// The caller went away or cancelled.
    #[error("{0}")]
    Cancelled(String),
    /// Stored data is damaged.
    #[error("{0}")]
    DataLoss(String),
    /// A defect of the engine.
    #[error("{0}")]
    Internal(String),
    /// A failure without a class; containerd's answer for runtime errors.
    #[error("{0}")]
    Unknown(String),
}

macro_rules! constructors {
    ($($name:ident => $variant:ident),+ $(,)?) => {
        impl Error {
            $(
                #[doc = concat!("An [`Error::", stringify!($variant), "`] with this message.")]
                pub fn $name(message: impl Into<String>) -> Self {
                    Error::$variant(message.into())
                }
            )+

            /// The same class with `what: ` put before the message.
            #[must_use]
            pub fn context(self, what: impl std::fmt::Display) -> Self {
                match self {
                    $(Error::$variant(message) => Error::$variant(format!("{what}: {message}")),)+
                }
            }
        }
    };
}

constructors! {
    not_found => NotFound,
    already_exists => AlreadyExists,
    failed_precondition => FailedPrecondition,
    invalid_argument => InvalidArgument,
    unavailable => Unavailable,
    out_of_range => OutOfRange,
    unimplemented => Unimplemented,
    permission_denied => PermissionDenied,
    resource_exhausted => ResourceExhausted,
    aborted => Aborted,
    deadline_exceeded => DeadlineExceeded,
    cancelled => Cancelled,
    data_loss => DataLoss,
    internal => Internal,
    unknown => Unknown,
}

impl Error {
    /// An I/O failure on `path` while doing `what` ("write", "create folder"), in the class its cause belongs to.
    pub fn io(
        what: impl std::fmt::Display,
        path: impl AsRef<std::path::Path>,
        error: &std::io::Error,
    ) -> Self {
        use std::io::ErrorKind;
        let message = format!("{what} {}: {error}", path.as_ref().display());
        match error.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => {
                Error::ResourceExhausted(format!("{message}; free some space on that disk and try again"))
            }
            ErrorKind::PermissionDenied | ErrorKind::ReadOnlyFilesystem => Error::PermissionDenied(message),
            ErrorKind::NotFound => Error::NotFound(message),
            ErrorKind::AlreadyExists => Error::AlreadyExists(message),
            _ => Error::Unknown(message),
        }
    }
}

impl From<Error> for tonic::Status {
    fn from(error: Error) -> Self {
        use tonic::Code;
        let code = match &error {
            Error::NotFound(_) => Code::NotFound,
            Error::AlreadyExists(_) => Code::AlreadyExists,
            Error::FailedPrecondition(_) => Code::FailedPrecondition,
            Error::InvalidArgument(_) => Code::InvalidArgument,
            Error::Unavailable(_) => Code::Unavailable,
            Error::OutOfRange(_) => Code::OutOfRange,
            Error::Unimplemented(_) => Code::Unimplemented,
            Error::PermissionDenied(_) => Code::PermissionDenied,
            Error::ResourceExhausted(_) => Code::ResourceExhausted,
            Error::Aborted(_) => Code::Aborted,
            Error::DeadlineExceeded(_) => Code::DeadlineExceeded,
            Error::Cancelled(_) => Code::Cancelled,
            Error::DataLoss(_) => Code::DataLoss,
            Error::Internal(_) => Code::Internal,
            Error::Unknown(_) => Code::Unknown,
        };
        // containerd's clients print details as noise, so there are none: the message is all.
        tonic::Status::new(code, shortened(error.to_string()))
    }
}

/// The message travels in a header, and the headers of an answer have a limit: a request that names something huge is
/// not to make its own refusal undeliverable.
fn shortened(mut message: String) -> String {
    const MAX: usize = 4096;
    if message.len() > MAX {
        let end = (0..=MAX).rev().find(|at| message.is_char_boundary(*at)).unwrap_or_default();
        message.truncate(end);
        message.push_str(" ...");
    }
    message
}

impl From<tokio::task::JoinError> for Error {
    /// A spawned operation that panicked or was cancelled at shutdown.
    fn from(error: tokio::task::JoinError) -> Self {
        if error.is_cancelled() {
            Error::Cancelled("the engine is shutting down".into())
        } else {
            Error::Internal(format!(
                "an operation ended abnormally: {error}; this is a defect, please report it"
            ))
        }
    }
}

/// Runs a mutation so that it outlives its caller: a client that goes away never leaves it half done.
pub async fn outlive<T: Send + 'static>(
    operation: impl std::future::Future<Output = Result<T>> + Send + 'static,
) -> Result<T> {
    use tracing::Instrument as _;
    tokio::spawn(trace::carry(trace::current(), operation.in_current_span())).await?
}

/// Runs blocking work (file system, hashing) off the reactor.
pub async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Result<T> + Send + 'static) -> Result<T> {
    let (span, trace) = (tracing::Span::current(), trace::current());
    tokio::task::spawn_blocking(move || span.in_scope(|| trace::carry_blocking(trace, work))).await?
}
