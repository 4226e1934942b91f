//! Unpacking: each layer is applied on a snapshot of those beneath it and committed under its
//! chain id, so layers that images share are unpacked once.
//!
//! A snapshot in the making has a key of its own and is removed when its layer fails; a commit
//! that finds the name taken means that somebody else was quicker, which is as good.

use anyhow::{Context, bail};
use oci::Digest;
use oci::image::Descriptor;
use proto::containerd::services::diff::v1::ApplyRequest;
use proto::containerd::services::snapshots::v1::{
    CommitSnapshotRequest, PrepareSnapshotRequest, RemoveSnapshotRequest, StatSnapshotRequest,
};
use tonic::Code;

use crate::client::{Client, Failure, Tried};
use crate::content;
use crate::image::{Resolved, wire};
use crate::lease::unique;
use crate::progress::{Progress, short};

/// Label of an active snapshot whose commit will bear this name.
const REF_LABEL: &str = "containerd.io/snapshot.ref";

/// Whether a snapshot named `key` exists.
pub(crate) async fn exists(client: &Client, snapshotter: &str, key: &str) -> anyhow::Result<bool> {
    let request = StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
    match client.snapshots().stat(request).await {
        Ok(_) => Ok(true),
        Err(status) if status.code() == Code::NotFound => Ok(false),
        Err(status) => Err(Failure::new(format!("look up snapshot {key} of {snapshotter}"), status).into()),
    }
}

/// Unpacks `image` unless it is, and returns the name of its topmost snapshot (empty for no layers).
/// To be called under a lease.
pub(crate) async fn unpack(
    client: &Client,
    image: &Resolved,
    snapshotter: &str,
    progress: &Progress,
) -> anyhow::Result<String> {
    let chain = image.chain_ids()?;
    let Some(top) = chain.last() else { return Ok(String::new()) };
    if !exists(client, snapshotter, top.as_str()).await? {
        let mut parent = String::new();
        let diff_ids = image.config.diff_ids_for(&image.manifest)?;
        for ((layer, diff_id), name) in image.manifest.layers.iter().zip(diff_ids).zip(&chain) {
            if !exists(client, snapshotter, name.as_str()).await? {
                let item = progress.start("unpack", short(layer.digest.as_str()), None);
                let unpacked = unpack_layer(client, snapshotter, &parent, layer, diff_id, name).await;
                item.finish(if unpacked.is_ok() { "unpacked" } else { "failed" });
                unpacked.with_context(|| format!("cannot unpack layer {}", layer.digest))?;
            }
            parent = name.to_string();
        }
    }
    // The config keeps the snapshots: as long as an image refers to it, they stay.
    let label = format!("containerd.io/gc.ref.snapshot.{snapshotter}");
    content::set_labels(client, &image.manifest.config.digest, [(label, top.to_string())].into()).await?;
    Ok(top.to_string())
}

async fn unpack_layer(
    client: &Client,
    snapshotter: &str,
    parent: &str,
    layer: &Descriptor,
    diff_id: &Digest,
    name: &Digest,
) -> anyhow::Result<()> {
    let key = unique("extract");
    let key = format!("{key} {name}");
    let prepare = PrepareSnapshotRequest {
        snapshotter: snapshotter.to_owned(),
        key: key.clone(),
        parent: parent.to_owned(),
        labels: [(REF_LABEL.to_owned(), name.to_string())].into(),
    };
    let mounts = match client.snapshots().prepare(prepare).await {
        Ok(response) => response.into_inner().mounts,
        // A remote snapshotter has this layer already.
        Err(status)
            if status.code() == Code::AlreadyExists && exists(client, snapshotter, name.as_str()).await? =>
        {
            return Ok(());
        }
        Err(status) => {
            return Err(Failure::new(format!("prepare a snapshot with {snapshotter}"), status).into());
        }
    };
    let applied = async {
        let request = ApplyRequest { diff: Some(wire(layer)), mounts, ..ApplyRequest::default() };
        let applied = client.diff().apply(request).await.tried(|| format!("apply layer {}", layer.digest))?;
        let found = applied.applied.unwrap_or_default().digest;
        if found != diff_id.as_str() {
            bail!("its uncompressed content has digest {found}, but the image's config says {diff_id}");
        }
        let commit = CommitSnapshotRequest {
            snapshotter: snapshotter.to_owned(),
            name: name.to_string(),
            key: key.clone(),
            ..CommitSnapshotRequest::default()
        };
        match client.snapshots().commit(commit).await {
            Ok(_) => Ok(true),
            Err(status) if status.code() == Code::AlreadyExists => Ok(false),
            Err(status) => Err(Failure::new(format!("commit snapshot {name}"), status).into()),
        }
    }
    .await;
    if !matches!(applied, Ok(true)) {
        let remove = RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key };
        // Best effort: what is left is not referred to, and goes with the next collection.
        let _ = client.snapshots().remove(remove).await;
    }
    applied?;
    // Whoever has the blob may know what it unpacks to.
    let label = ("containerd.io/uncompressed".to_owned(), diff_id.to_string());
    content::set_labels(client, &layer.digest, [label].into()).await?;
    Ok(())
}
