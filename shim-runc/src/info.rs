//! `-v` and `-info`: what this shim is, and what its runtime can do.

use std::process::{Command, Stdio};

use prost::Message;
use prost_types::Any;
use proto::containerd::types::{RuntimeInfo, RuntimeVersion};
use shim_api::{Error, Result};

use crate::RUNTIME_NAME;
use crate::options::Options;

const FEATURES_TYPE: &str = "types.containerd.io/opencontainers/runtime-spec/1/features/Features";

/// The text of `-v`.
pub(crate) fn version() -> String {
    format!("containerd-shim-runc-v2:\n  Version:  {}\n  Revision: gantry\n\n", env!("CARGO_PKG_VERSION"))
}

/// A `RuntimeInfo` for stdout; `stdin` holds the runtime options as an Any, or nothing.
pub(crate) fn info(stdin: &[u8]) -> Result<Vec<u8>> {
    let any = Any::decode(stdin).map_err(|error| {
        Error::invalid_argument(format!("the options on stdin cannot be decoded: {error}"))
    })?;
    let any = Some(any).filter(|any| !any.type_url.is_empty());
    let options = Options::from_any(any.as_ref())?;
    let info = RuntimeInfo {
        name: RUNTIME_NAME.to_owned(),
        version: Some(RuntimeVersion {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            revision: "gantry".to_owned(),
        }),
        options: any,
        features: features(&options),
        annotations: Default::default(),
    };
    Ok(info.encode_to_vec())
}

/// What `runc features` prints; runtimes without that command have none.
fn features(options: &Options) -> Option<Any> {
    let binary = if options.binary_name.is_empty() { "runc" } else { &options.binary_name };
    let output = Command::new(binary).arg("features").stdin(Stdio::null()).output().ok()?;
    let is_json = serde_json::from_slice::<serde::de::IgnoredAny>(&output.stdout).is_ok();
    let any = Any { type_url: FEATURES_TYPE.to_owned(), value: output.stdout };
    (output.status.success() && is_json).then_some(any)
}
