//! `ctr images mount`: a snapshot of an image, mounted, under a lease that ends by itself.
//!
//! Lease and snapshot are named by the target, so that `ctr images unmount --rm` finds them. What this made goes again
//! when it fails; what was there before stays.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use clap::Args;
use oci::Platform;
use oci::platform::Matcher;
use proto::containerd::services::leases::v1::{CreateRequest, DeleteRequest};
use proto::containerd::services::snapshots::v1::{
    MountsRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, ViewSnapshotRequest,
};
use proto::containerd::types::Mount as WireMount;
use tonic::Code;

use crate::args::{Snapshotter, labels, parse_duration};
use crate::client::{Client, Failure, Tried};
use crate::lease::{EXPIRE_LABEL, expiry, unique, unless_interrupted};
use crate::progress::Progress;
use crate::{image, output, rootfs, unpack};

/// Mount an image's root file system
///
/// Prints the name of the image's topmost snapshot and the path. `ctr images unmount --rm` takes it down. Without a target, a
/// snapshotter whose snapshots are plain folders tells where the files are.
#[derive(Debug, Args)]
pub(crate) struct Mount {
    /// Let it be written to; what is written goes with the snapshot
    #[arg(long)]
    rw: bool,
    /// Mount the image for this platform [default: the host's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<Platform>,
    /// Label the snapshot
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Write the snapshotter's file system to disk after each layer that is unpacked
    #[arg(long)]
    sync_fs: bool,
    /// When the snapshot may be removed, mounted or not; 0 is never
    #[arg(short = 'x', long, value_name = "DURATION", default_value = "1h", value_parser = parse_duration)]
    expiration: Duration,
    #[command(flatten)]
    snapshotter: Snapshotter,
    #[arg(value_name = "IMAGE")]
    name: String,
    /// Folder to mount on, which must exist
    target: Option<PathBuf>,
}

impl Mount {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let target = self.target.as_deref().map(std::path::absolute).transpose()?;
        if let Some(target) = &target {
            ensure!(target.is_dir(), "{} is not a folder; make it first", target.display());
        }
        let key = match &target {
            Some(target) => target.display().to_string(),
            None => unique("ctr-images-mount"),
        };
        let leased = take_lease(&client, &key, self.expiration).await?;
        let mounted = self.mount(&client.with_lease(&key)?, &key, target.as_deref()).await;
        if mounted.is_err() && leased {
            // The first error is the one that tells something.
            let _ = client.leases().delete(DeleteRequest { id: key, sync: false }).await;
        }
        let (top, path) = mounted?;
        output::line(top)?;
        output::line(path.display().to_string())
    }

    /// Makes the snapshot and mounts it.
    async fn mount(
        &self,
        client: &Client,
        key: &str,
        target: Option<&Path>,
    ) -> anyhow::Result<(String, PathBuf)> {
        let snapshotter = client.snapshotter(&self.snapshotter.snapshotter).await?;
        // A snapshot that was made and then not used goes without the lease.
        let (top, mounts, made) = unless_interrupted(self.prepare(client, &snapshotter, key)).await?;
        let put = match target {
            Some(target) => {
                let mounts: Vec<sys::mount::Mount> = mounts.into_iter().map(rootfs::local).collect();
                let at = target.to_owned();
                tokio::task::spawn_blocking(move || sys::mount::mount_all(&mounts, &at))
                    .await?
                    .map(|()| target.to_owned())
                    .with_context(|| format!("cannot mount image {}", self.name))
            }
            None => plain_folder(&mounts)
                .with_context(|| format!("{snapshotter} needs a mount; name a folder to mount on")),
        };
        if put.is_err() && made {
            let request = RemoveSnapshotRequest { snapshotter: snapshotter.clone(), key: key.to_owned() };
            if let Err(status) = client.snapshots().remove(request).await {
                eprintln!("ctr: {}", Failure::new(format!("remove snapshot {key}"), status));
            }
        }
        Ok((top, put?))
    }

    /// Unpacks the image and makes a snapshot named `key` of it: what is beneath it, its mounts, and whether it is new.
    async fn prepare(
        &self,
        client: &Client,
        snapshotter: &str,
        key: &str,
    ) -> anyhow::Result<(String, Vec<WireMount>, bool)> {
        let platform = self.platform.clone().unwrap_or_else(Platform::host);
        let target = image::target(&image::get(client, &self.name).await?)?;
        let resolved = image::resolve(client, &target, &Matcher::only(&platform), &platform)
            .await
            .with_context(|| format!("cannot mount image {}", self.name))?;
        let top = unpack::unpack(client, &resolved, snapshotter, self.sync_fs, &Progress::new()).await?;
        let (mounts, made) = self.snapshot(client, snapshotter, key, &top).await?;
        Ok((top, mounts, made))
    }

    /// The mounts of a snapshot named `key`, and whether it is new.
    async fn snapshot(
        &self,
        client: &Client,
        snapshotter: &str,
        key: &str,
        parent: &str,
    ) -> anyhow::Result<(Vec<WireMount>, bool)> {
        let (snapshotter, key, parent) = (snapshotter.to_owned(), key.to_owned(), parent.to_owned());
        let labels = labels(&self.label);
        let made = match self.rw {
            true => {
                let request = PrepareSnapshotRequest {
                    snapshotter: snapshotter.clone(),
                    key: key.clone(),
                    parent,
                    labels,
                };
                client.snapshots().prepare(request).await.map(|answer| answer.into_inner().mounts)
            }
            false => {
                let request = ViewSnapshotRequest {
                    snapshotter: snapshotter.clone(),
                    key: key.clone(),
                    parent,
                    labels,
                };
                client.snapshots().view(request).await.map(|answer| answer.into_inner().mounts)
            }
        };
        match made {
            Ok(mounts) => Ok((mounts, true)),
            // As containerd's ctr: what an earlier mount left is used again.
            Err(status) if status.code() == Code::AlreadyExists => {
                let request = MountsRequest { snapshotter, key: key.clone() };
                let answer = client.snapshots().mounts(request).await;
                Ok((answer.tried(|| format!("get the mounts of snapshot {key}"))?.mounts, false))
            }
            Err(status) => Err(Failure::new(format!("make snapshot {key}"), status).into()),
        }
    }
}

/// Takes the lease `id`; false when it is there already.
async fn take_lease(client: &Client, id: &str, expiration: Duration) -> anyhow::Result<bool> {
    let mut labels = std::collections::BTreeMap::new();
    if !expiration.is_zero() {
        labels.insert(EXPIRE_LABEL.to_owned(), expiry(expiration)?);
    }
    match client.leases().create(CreateRequest { id: id.to_owned(), labels }).await {
        Ok(_) => Ok(true),
        Err(status) if status.code() == Code::AlreadyExists => Ok(false),
        Err(status) => Err(Failure::new(format!("create lease {id}"), status).into()),
    }
}

/// Where the files are, when the mounts are one bind of a folder.
fn plain_folder(mounts: &[WireMount]) -> anyhow::Result<PathBuf> {
    match mounts {
        [mount] if mount.r#type == "bind" => Ok(PathBuf::from(&mount.source)),
        _ => bail!("the snapshot is no plain folder"),
    }
}
