//! `ctr images unmount`.

use std::path::{Path, PathBuf};

use anyhow::bail;
use clap::Args;
use proto::containerd::services::leases::v1::DeleteRequest;
use proto::containerd::services::snapshots::v1::RemoveSnapshotRequest;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;
use tonic::Code;

use crate::args::Snapshotter;
use crate::client::{Client, Failure};
use crate::output;

/// Take down what `ctr images mount` mounted
#[derive(Debug, Args)]
pub(crate) struct Unmount {
    /// Remove the snapshot, with what was written to it
    #[arg(long)]
    rm: bool,
    #[command(flatten)]
    snapshotter: Snapshotter,
    target: PathBuf,
}

impl Unmount {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let target = std::path::absolute(&self.target)?;
        unmount(&target)?;
        let key = target.display().to_string();
        if self.rm {
            let snapshotter = client.snapshotter(&self.snapshotter.snapshotter).await?;
            let request = DeleteRequest { id: key.clone(), sync: false };
            gone(client.leases().delete(request).await, || format!("delete lease {key}"))?;
            let request = RemoveSnapshotRequest { snapshotter, key: key.clone() };
            gone(client.snapshots().remove(request).await, || format!("remove snapshot {key}"))?;
        }
        output::line(key)
    }
}

/// Takes down every mount right on `target`, none beneath it. Nothing there is no error.
fn unmount(target: &Path) -> anyhow::Result<()> {
    loop {
        match rustix::mount::unmount(target, UnmountFlags::NOFOLLOW) {
            Ok(()) => {}
            Err(Errno::INVAL | Errno::NOENT) => return Ok(()),
            Err(Errno::BUSY) => {
                bail!("{} is in use; end the processes that have files of it open", target.display())
            }
            Err(error) => bail!("cannot unmount {}: {error}", target.display()),
        }
    }
}

/// What is not there any more is what was wanted.
fn gone<T>(answer: Result<T, tonic::Status>, what: impl FnOnce() -> String) -> anyhow::Result<()> {
    match answer {
        Err(status) if status.code() != Code::NotFound => Err(Failure::new(what(), status).into()),
        _ => Ok(()),
    }
}
