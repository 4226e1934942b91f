//! `ctr oci …`.

use anyhow::ensure;
use clap::{Args, Subcommand};
use oci::Platform;
use oci::runtime::Spec as RuntimeSpec;

use crate::json;

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Spec(Spec),
}

impl Command {
    /// Asks no engine.
    pub(crate) fn run(self, namespace: &str) -> anyhow::Result<()> {
        let Command::Spec(command) = self;
        command.run(namespace)
    }
}

/// Print the runtime spec that a container gets when neither image nor flags say anything
#[derive(Debug, Args)]
pub(crate) struct Spec {
    /// The spec for this platform [default: the host's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<Platform>,
}

impl Spec {
    fn run(self, namespace: &str) -> anyhow::Result<()> {
        let os = self.platform.unwrap_or_else(Platform::host).os;
        ensure!(os == "linux", "specs for {os} are not made here, only those for linux");
        let mut spec = RuntimeSpec::linux(namespace, "");
        spec.set_cgroup(&format!("/{namespace}"));
        json::print(&serde_json::to_value(spec)?)
    }
}
