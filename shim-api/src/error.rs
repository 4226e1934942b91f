//! The one error of the shim interface: a status in the classes clients know, as ttrpc carries it.

use std::fmt;

/// What a caller can do about an [`Error`]. The numbers on the wire are gRPC's.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Code {
    /// The caller gave up.
    Cancelled,
    /// Unclassed, as every second start of a running process is in containerd.
    Unknown,
    /// The request can never succeed as it is.
    InvalidArgument,
    /// No answer within the time the caller allowed.
    DeadlineExceeded,
    /// No such container, process or exec; also a signal to a process that is gone.
    NotFound,
    /// The name is taken.
    AlreadyExists,
    /// The kernel or a policy refused.
    PermissionDenied,
    /// A limit was reached.
    ResourceExhausted,
    /// The request is fine, the state is not.
    FailedPrecondition,
    /// Lost a race; try again.
    Aborted,
    /// Past the end.
    OutOfRange,
    /// The peer does not have this method.
    Unimplemented,
    /// A broken invariant on the serving side.
    Internal,
    /// Nobody serves the address now; try again later.
    Unavailable,
    /// Data is gone or damaged.
    DataLoss,
    /// The peer wants to know who calls.
    Unauthenticated,
    /// The connection ended before the answer came: whether the call took effect is unknown. Never on the wire.
    Closed,
    /// Nobody listens at the address: no socket, or one whose listener is gone. Never on the wire.
    Refused,
}

/// Code, number on the wire, and the ttrpc crate's name of it.
const CODES: [(Code, i32, ttrpc::Code); 16] = [
    (Code::Cancelled, 1, ttrpc::Code::CANCELLED),
    (Code::Unknown, 2, ttrpc::Code::UNKNOWN),
    (Code::InvalidArgument, 3, ttrpc::Code::INVALID_ARGUMENT),
    (Code::DeadlineExceeded, 4, ttrpc::Code::DEADLINE_EXCEEDED),
    (Code::NotFound, 5, ttrpc::Code::NOT_FOUND),
    (Code::AlreadyExists, 6, ttrpc::Code::ALREADY_EXISTS),
    (Code::PermissionDenied, 7, ttrpc::Code::PERMISSION_DENIED),
    (Code::ResourceExhausted, 8, ttrpc::Code::RESOURCE_EXHAUSTED),
    (Code::FailedPrecondition, 9, ttrpc::Code::FAILED_PRECONDITION),
    (Code::Aborted, 10, ttrpc::Code::ABORTED),
    (Code::OutOfRange, 11, ttrpc::Code::OUT_OF_RANGE),
    (Code::Unimplemented, 12, ttrpc::Code::UNIMPLEMENTED),
    (Code::Internal, 13, ttrpc::Code::INTERNAL),
    (Code::Unavailable, 14, ttrpc::Code::UNAVAILABLE),
    (Code::DataLoss, 15, ttrpc::Code::DATA_LOSS),
    (Code::Unauthenticated, 16, ttrpc::Code::UNAUTHENTICATED),
];

impl Code {
    /// The number gRPC and ttrpc give this class; [`Code::Closed`] and [`Code::Refused`] have none of their own and become Unavailable's.
    #[must_use]
    pub fn number(self) -> i32 {
        CODES.iter().find(|row| row.0 == self).map_or(14, |row| row.1)
    }

    pub(crate) fn of_number(number: i32) -> Self {
        CODES.iter().find(|row| row.1 == number).map_or(Self::Unknown, |row| row.0)
    }

    fn to_ttrpc(self) -> ttrpc::Code {
        CODES.iter().find(|row| row.0 == self).map_or(ttrpc::Code::UNAVAILABLE, |row| row.2)
    }

    fn from_ttrpc(code: ttrpc::Code) -> Self {
        CODES.iter().find(|row| row.2 == code).map_or(Self::Unknown, |row| row.0)
    }
}

/// A status: class and message, as it travels between engine and shim.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{message}")]
pub struct Error {
    /// What the caller can do about it.
    pub code: Code,
    /// What was tried, on what, and why it failed; for people.
    pub message: String,
}

/// `Result` with this crate's [`Error`].
pub type Result<T> = std::result::Result<T, Error>;

macro_rules! constructors {
    ($($name:ident $code:ident,)*) => {
        impl Error {
            $(
                #[doc = concat!("A status of class [`Code::", stringify!($code), "`].")]
                #[must_use]
                pub fn $name(message: impl fmt::Display) -> Self {
                    Self::new(Code::$code, message)
                }
            )*
        }
    };
}

constructors! {
    unknown Unknown,
    invalid_argument InvalidArgument,
    deadline_exceeded DeadlineExceeded,
    not_found NotFound,
    already_exists AlreadyExists,
    permission_denied PermissionDenied,
    resource_exhausted ResourceExhausted,
    failed_precondition FailedPrecondition,
    aborted Aborted,
    unimplemented Unimplemented,
    internal Internal,
    unavailable Unavailable,
    closed Closed,
    refused Refused,
}

impl Error {
    /// A status of the given class.
    #[must_use]
    pub fn new(code: Code, message: impl fmt::Display) -> Self {
        Self { code, message: message.to_string() }
    }

    /// The same class, with what was being done put before the message.
    #[must_use]
    pub fn while_doing(self, what: impl fmt::Display) -> Self {
        Self { code: self.code, message: format!("{what}: {}", self.message) }
    }

    /// True when the same call may succeed later without anything else changing.
    #[must_use]
    pub fn is_temporary(&self) -> bool {
        matches!(
            self.code,
            Code::Closed
                | Code::Refused
                | Code::Unavailable
                | Code::DeadlineExceeded
                | Code::Cancelled
                | Code::Aborted
                | Code::ResourceExhausted
        )
    }

    pub(crate) fn to_status(&self) -> ttrpc::Status {
        ttrpc::get_status(self.code.to_ttrpc(), &self.message)
    }
}

impl From<ttrpc::Status> for Error {
    fn from(status: ttrpc::Status) -> Self {
        Self { code: Code::from_ttrpc(status.code()), message: status.message }
    }
}

impl From<ttrpc::Error> for Error {
    fn from(error: ttrpc::Error) -> Self {
        match error {
            ttrpc::Error::RpcStatus(status) => status.into(),
            // Everything the transport itself reports ends the connection or follows from its end.
            ttrpc::Error::Socket(_)
            | ttrpc::Error::LocalClosed
            | ttrpc::Error::RemoteClosed
            | ttrpc::Error::Eof
            | ttrpc::Error::Nix(_) => Self::closed(format!("the ttrpc connection closed: {error}")),
            ttrpc::Error::Others(message) => Self::unknown(message),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_code_survives_the_wire() {
        for (code, number, _) in CODES {
            let sent = Error::new(code, "why");
            assert_eq!(Error::from(sent.to_status()), sent);
            assert_eq!(code.number(), number);
            assert_eq!(code.to_ttrpc() as i32, number);
        }
        assert_eq!(Error::from(Error::closed("x").to_status()).code, Code::Unavailable);
    }
}
