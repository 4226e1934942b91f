//! The default AppArmor profile: what it says, and how it gets into the kernel.
//!
//! It forbids what no container needs and what the masked paths hide as well: mounting, and writing beneath /proc and /sys
//! beyond a process' own files and the settings of its namespaces. Signals and traces stay among its own, but the machine may
//! send signals in.

use std::collections::BTreeSet;
use std::io::Write as _;
use std::path::Path;
use std::process::{Command, Stdio};

use crate::error::{Error, Result};

/// What it is called; the same as containerd's, so that policies of clusters which name it hold.
pub(super) const DEFAULT: &str = "cri-containerd.apparmor.d";
/// Where the kernel lists what is loaded.
const LOADED: &str = "/sys/kernel/security/apparmor/profiles";
const PARSER: &str = "apparmor_parser";
/// What the profile's language is called with, where the system has it.
const ABSTRACTIONS: &str = "/etc/apparmor.d";

/// The profiles that are loaded: lines of `NAME (MODE)`.
pub(super) fn loaded() -> Result<BTreeSet<String>> {
    let text = std::fs::read_to_string(LOADED).map_err(|error| Error::io("read", LOADED, &error))?;
    Ok(text.lines().filter_map(|line| Some(line.rsplit_once(" (")?.0.to_owned())).collect())
}

/// Loads the default profile.
pub(super) fn load_default() -> Result<()> {
    let has = |name: &str| Path::new(ABSTRACTIONS).join(name).exists();
    let failed = |why: String| {
        Error::failed_precondition(format!(
            "load the default AppArmor profile by {PARSER}: {why}; install AppArmor's tools, or set \
             disable_apparmor = true"
        ))
    };
    let mut parser = Command::new(PARSER)
        .args(["--skip-read-cache", "--replace"])
        .stdin(Stdio::piped())
        .stdout(Stdio::null())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(|error| failed(error.to_string()))?;
    if let Some(mut input) = parser.stdin.take() {
        let text = profile(has("tunables/global"), has("abstractions/base"));
        input.write_all(text.as_bytes()).map_err(|error| failed(error.to_string()))?;
    }
    let output = parser.wait_with_output().map_err(|error| failed(error.to_string()))?;
    match output.status.success() {
        true => Ok(()),
        false => Err(failed(String::from_utf8_lossy(&output.stderr).trim().to_owned())),
    }
}

/// Its text.
fn profile(tunables: bool, base: bool) -> String {
    let (tunables, base) = (
        if tunables { "#include <tunables/global>" } else { "@{PROC}=/proc/" },
        if base { "#include <abstractions/base>" } else { "" },
    );
    format!(
        "{tunables}

profile {DEFAULT} flags=(attach_disconnected,mediate_deleted) {{
  {base}
  network,
  capability,
  file,
  umount,

  signal (receive) peer=unconfined,
  signal (receive) peer=runc,
  signal (receive) peer=crun,
  signal (send,receive) peer={DEFAULT},
  ptrace (trace,tracedby,read,readby) peer={DEFAULT},

  deny mount,

  deny @{{PROC}}/* w,
  deny @{{PROC}}/{{[^1-9s],[^1-9s]*,s[^y]*}}/** w,
  deny @{{PROC}}/sys/{{[^k]**,k[^e]**}} w,
  deny @{{PROC}}/sys/kernel/{{[^sm]**,s[^he]**,m[^s]**}} w,
  deny @{{PROC}}/sysrq-trigger rwklx,
  deny @{{PROC}}/kcore rwklx,

  deny /sys/[^f]*/** wklx,
  deny /sys/f[^s]*/** wklx,
  deny /sys/fs/[^c]*/** wklx,
  deny /sys/fs/c[^g]*/** wklx,
  deny /sys/firmware/** rwklx,
  deny /sys/devices/virtual/powercap/** rwklx,
  deny /sys/kernel/security/** rwklx,
}}
"
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The kernel here may have no AppArmor; its compiler needs none.
    #[test]
    fn the_default_profile_compiles() {
        let text = profile(false, false);
        let Ok(mut parser) = Command::new(PARSER)
            .args(["--skip-kernel-load", "--skip-cache", "--debug"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
        else {
            assert!(text.contains(DEFAULT));
            return;
        };
        parser.stdin.take().unwrap().write_all(text.as_bytes()).unwrap();
        let output = parser.wait_with_output().unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }
}
