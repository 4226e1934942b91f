//! `google.protobuf.Any` the way containerd's clients and shims write it.
//!
//! Invariant: a packed message's `type_url` is its bare full name, `containerd.runc.v1.Options`, without the
//! `type.googleapis.com/` or `/` that other libraries put in front. Go clients compare the whole string, so
//! prost's own `Any::from_msg` (which writes a leading slash) must not be used. On reading we are lenient: only
//! what follows the last slash counts.
//!
//! Values that are not protobuf (the OCI runtime spec and its parts) travel as JSON under the URLs named here;
//! those are kept byte for byte and compared whole.

use prost::{DecodeError, Name};
use prost_types::Any;

/// A whole OCI runtime spec, as JSON: `Container.spec`.
pub const SPEC: &str = "types.containerd.io/opencontainers/runtime-spec/1/Spec";
/// The `process` part of a spec, as JSON: what `Tasks.Exec` runs.
pub const PROCESS: &str = "types.containerd.io/opencontainers/runtime-spec/1/Process";
/// The `linux.resources` part of a spec, as JSON: what `Tasks.Update` sets.
pub const LINUX_RESOURCES: &str = "types.containerd.io/opencontainers/runtime-spec/1/LinuxResources";
/// What an OCI runtime says of itself (`runc features`), as JSON: `RuntimeInfo.features`.
pub const FEATURES: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// Why [`unpack`] gave no message.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum UnpackError {
    /// The value holds another type than the one asked for.
    #[error("expected a value of type {expected}, found {found:?}")]
    WrongType {
        /// Full name of the message asked for.
        expected: String,
        /// The value's `type_url`, as it came.
        found: String,
    },
    /// The type is right, the bytes are not a message of it.
    #[error("cannot decode a value of type {expected}: {source}")]
    Malformed {
        /// Full name of the message asked for.
        expected: String,
        /// prost's reason.
        source: DecodeError,
    },
}

/// Encodes `message` under its bare name.
pub fn pack<M: Name>(message: &M) -> Any {
    Any { type_url: M::full_name(), value: message.encode_to_vec() }
}

/// Wraps bytes that are already encoded, such as JSON under [`SPEC`].
pub fn wrap(type_url: &str, value: impl Into<Vec<u8>>) -> Any {
    Any { type_url: type_url.to_owned(), value: value.into() }
}

/// Whether `any` holds an `M`, whatever prefix its writer put before the name.
pub fn is<M: Name>(any: &Any) -> bool {
    name(any) == M::full_name()
}

/// Decodes the `M` in `any`.
///
/// # Errors
/// [`UnpackError::WrongType`] when it holds something else, [`UnpackError::Malformed`] when its bytes are broken.
pub fn unpack<M: Name + Default>(any: &Any) -> Result<M, UnpackError> {
    if !is::<M>(any) {
        return Err(UnpackError::WrongType { expected: M::full_name(), found: any.type_url.clone() });
    }
    M::decode(any.value.as_slice())
        .map_err(|source| UnpackError::Malformed { expected: M::full_name(), source })
}

/// The last path segment of the type URL: for protobuf values, the message's full name.
pub fn name(any: &Any) -> &str {
    any.type_url.rsplit('/').next().unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::containerd::runc::v1::{CheckpointOptions, Options};

    #[test]
    fn a_packed_message_has_a_bare_name_and_comes_back() {
        let options = Options { binary_name: "crun".into(), systemd_cgroup: true, ..Options::default() };
        let any = pack(&options);
        assert_eq!(any.type_url, "containerd.runc.v1.Options");
        assert!(is::<Options>(&any));
        assert!(!is::<CheckpointOptions>(&any));
        assert_eq!(unpack::<Options>(&any).unwrap(), options);
    }

    #[test]
    fn a_prefix_before_the_name_does_not_matter() {
        for prefix in ["/", "type.googleapis.com/", "types.containerd.io/"] {
            let mut any = pack(&Options::default());
            any.type_url.insert_str(0, prefix);
            assert!(is::<Options>(&any), "{prefix}");
        }
        // A name that merely ends alike is another type.
        assert!(!is::<Options>(&wrap("my.containerd.runc.v1.Options", [])));
    }

    #[test]
    fn errors_say_what_was_found() {
        let error = unpack::<Options>(&wrap(SPEC, *b"{}")).unwrap_err();
        assert_eq!(
            error.to_string(),
            "expected a value of type containerd.runc.v1.Options, found \
             \"types.containerd.io/opencontainers/runtime-spec/1/Spec\""
        );
        let error = unpack::<Options>(&wrap("containerd.runc.v1.Options", [0x0a, 0x05])).unwrap_err();
        assert!(matches!(error, UnpackError::Malformed { .. }), "{error}");
    }
}
