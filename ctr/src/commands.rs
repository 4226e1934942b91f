//! One module per command or group of commands; the doc comment of each is its help.

pub(crate) mod containers;
pub(crate) mod content;
pub(crate) mod deprecations;
pub(crate) mod df;
pub(crate) mod events;
pub(crate) mod gc;
pub(crate) mod images;
pub(crate) mod info;
pub(crate) mod install;
pub(crate) mod leases;
pub(crate) mod namespaces;
pub(crate) mod oci;
pub(crate) mod plugins;
pub(crate) mod run;
pub(crate) mod sandboxes;
pub(crate) mod shim;
pub(crate) mod snapshots;
pub(crate) mod tasks;
pub(crate) mod version;
