//! Runtime options, and the files of a bundle that keep them for `delete`, which runs when the shim is dead.
//!
//! In the bundle, as containerd's shim writes them: `options.json` (the options, protobuf's field names as JSON)
//! and `runtime` (BinaryName alone; older shims read only this).

use std::fs;
use std::path::Path;

use prost_types::Any;
use serde::{Deserialize, Serialize};
use shim_api::{Error, Result};

use crate::bundle;

const OPTIONS_FILE: &str = "options.json";
const RUNTIME_FILE: &str = "runtime";

/// The options of containerd.runc.v1.Options that matter here; unset is empty.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub(crate) struct Options {
    pub(crate) no_pivot_root: bool,
    pub(crate) no_new_keyring: bool,
    pub(crate) shim_cgroup: String,
    pub(crate) io_uid: u32,
    pub(crate) io_gid: u32,
    pub(crate) binary_name: String,
    pub(crate) root: String,
    pub(crate) systemd_cgroup: bool,
    pub(crate) criu_image_path: String,
    pub(crate) criu_work_path: String,
}

impl Options {
    /// From what a client sent. Options of another kind count as none: `runtimeoptions.v1.Options` carries a
    /// config file for other runtimes.
    pub(crate) fn from_any(any: Option<&Any>) -> Result<Self> {
        type Message = proto::containerd::runc::v1::Options;
        let Some(any) = any.filter(|any| proto::any::is::<Message>(any)) else { return Ok(Self::default()) };
        let message: Message = proto::any::unpack(any).map_err(|error| {
            Error::invalid_argument(format!("the runtime options cannot be decoded: {error}"))
        })?;
        Ok(Self {
            no_pivot_root: message.no_pivot_root,
            no_new_keyring: message.no_new_keyring,
            shim_cgroup: message.shim_cgroup,
            io_uid: message.io_uid,
            io_gid: message.io_gid,
            binary_name: message.binary_name,
            root: message.root,
            systemd_cgroup: message.systemd_cgroup,
            criu_image_path: message.criu_image_path,
            criu_work_path: message.criu_work_path,
        })
    }

    pub(crate) fn write(&self, bundle: &Path) -> Result<()> {
        let json = serde_json::to_vec(self).map_err(Error::internal)?;
        bundle::write(bundle, OPTIONS_FILE, &json)?;
        bundle::write(bundle, RUNTIME_FILE, self.binary_name.as_bytes())
    }

    /// What a bundle says; one that says nothing (its container was never created) has the defaults.
    pub(crate) fn read(bundle: &Path) -> Self {
        let mut options: Self = fs::read(bundle.join(OPTIONS_FILE))
            .ok()
            .and_then(|json| serde_json::from_slice(&json).ok())
            .unwrap_or_default();
        if options.binary_name.is_empty() {
            options.binary_name = fs::read_to_string(bundle.join(RUNTIME_FILE)).unwrap_or_default();
        }
        options
    }
}
