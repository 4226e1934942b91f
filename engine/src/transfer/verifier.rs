//! Image verifiers: programs in a folder that say whether an image may be pulled.
//!
//! ```text
//!  PROGRAM -name NAME -digest DIGEST -stdin-media-type application/vnd.oci.descriptor.v1+json  < descriptor
//!    exit code 0: allowed | any other: refused, stdout says why | no answer in time: refused
//! ```
//!
//! Invariants: an image is pulled only when every program allows it. None is left running, and what one says has a limit.

use std::io;
use std::path::{Path, PathBuf};
use std::process::Stdio;
use std::time::Duration;

use oci::image::Descriptor;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::process::Command;

use crate::error::{Error, Result};

/// What a program is given on its standard input.
const MEDIA_TYPE: &str = "application/vnd.oci.descriptor.v1+json";
/// What is read of what a program says, in bytes.
const OUTPUT: u64 = 32 << 10;

/// Where the programs are, and how many and how long they may run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Verifiers {
    /// The folder; without it, everything is allowed.
    pub folder: PathBuf,
    /// How many of them count, in the order of their names; None for all.
    pub most: Option<usize>,
    /// How long each may take.
    pub timeout: Duration,
}

impl Verifiers {
    /// Asks all of them; PermissionDenied when one refuses or gives no answer.
    pub async fn allow(&self, name: &str, target: &Descriptor) -> Result<()> {
        let programs = self.programs()?;
        let payload = serde_json::to_vec(target)
            .map_err(|error| Error::internal(format!("encode a descriptor: {error}")))?;
        for program in programs {
            let asked = tokio::time::timeout(self.timeout, ask(&program, name, target, &payload));
            let refused = |why: String| {
                Error::permission_denied(format!(
                    "pull of {name} ({}) was blocked by image verifier {}: {why}",
                    target.digest,
                    program.display()
                ))
            };
            match asked.await {
                Ok(Ok((true, _))) => {}
                Ok(Ok((false, reason))) => return Err(refused(reason)),
                Ok(Err(error)) => return Err(refused(format!("it cannot be asked: {error}"))),
                Err(_) => return Err(refused(format!("it gave no answer within {:?}", self.timeout))),
            }
        }
        Ok(())
    }

    fn programs(&self) -> Result<Vec<PathBuf>> {
        let failed = |error: io::Error| Error::io("read the folder of image verifiers", &self.folder, &error);
        let entries = match std::fs::read_dir(&self.folder) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(Vec::new()),
            entries => entries.map_err(failed)?,
        };
        let mut programs = entries
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<io::Result<Vec<_>>>()
            .map_err(failed)?;
        programs.sort();
        programs.truncate(self.most.unwrap_or(usize::MAX));
        Ok(programs)
    }
}

/// Whether a program allows the image, and what it says.
async fn ask(program: &Path, name: &str, target: &Descriptor, payload: &[u8]) -> io::Result<(bool, String)> {
    let mut child = Command::new(program)
        .args(["-name", name, "-digest", target.digest.as_str(), "-stdin-media-type", MEDIA_TYPE])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::null())
        .kill_on_drop(true)
        .spawn()?;
    let stdin = child.stdin.take();
    let give = async move {
        if let Some(mut stdin) = stdin {
            // It need not read it.
            let _ = stdin.write_all(payload).await;
        }
    };
    let stdout = child.stdout.take();
    let hear = async move {
        let mut said = Vec::new();
        if let Some(mut stdout) = stdout {
            (&mut stdout).take(OUTPUT).read_to_end(&mut said).await?;
            // What is beyond the limit is not to block it.
            tokio::io::copy(&mut stdout, &mut tokio::io::sink()).await?;
        }
        Ok::<_, io::Error>(said)
    };
    let ((), said, status) = tokio::join!(give, hear, child.wait());
    let reason = String::from_utf8_lossy(&said?).trim().to_owned();
    let status = status?;
    let reason = if reason.is_empty() { format!("it ended with {status}") } else { reason };
    Ok((status.success(), reason))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn program(folder: &Path, name: &str, script: &str) {
        let path = folder.join(name);
        std::fs::write(&path, format!("#!/bin/sh\n{script}\n")).unwrap();
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o755)).unwrap();
    }

    #[tokio::test]
    async fn every_verifier_has_to_allow_an_image() {
        let folder = tempfile::tempdir().unwrap();
        let mut verifiers =
            Verifiers { folder: folder.path().join("none"), most: None, timeout: Duration::from_secs(20) };
        let target = Descriptor::of("application/vnd.oci.image.manifest.v1+json", b"{}");
        verifiers.allow("a/b:1", &target).await.unwrap();
        verifiers.folder = folder.path().to_owned();
        verifiers.allow("a/b:1", &target).await.unwrap();
        let expected = format!(
            "test \"$*\" = '-name a/b:1 -digest {} -stdin-media-type {MEDIA_TYPE}' && grep -q {}",
            target.digest, target.digest
        );
        program(folder.path(), "1", &expected);
        verifiers.allow("a/b:1", &target).await.unwrap();
        assert!(verifiers.allow("a/b:2", &target).await.is_err());
        program(folder.path(), "2", "yes no | head -c 200000; exit 3");
        let error = verifiers.allow("a/b:1", &target).await.unwrap_err();
        assert!(
            matches!(&error, Error::PermissionDenied(why) if why.contains("no\nno") && why.len() < 50_000)
        );
        verifiers.most = Some(1);
        verifiers.allow("a/b:1", &target).await.unwrap();
        program(folder.path(), "1", "exec sleep 1000");
        verifiers.timeout = Duration::from_millis(50);
        let error = verifiers.allow("a/b:1", &target).await.unwrap_err().to_string();
        assert!(error.contains("no answer"), "{error}");
    }
}
