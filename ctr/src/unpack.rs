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

/// Unpacks `image` unless it is, and returns the name of its topmost snapshot (empty for no layers). With `sync`, the
/// snapshotter's file system is written to disk after each layer. To be called under a lease.
pub(crate) async fn unpack(
    client: &Client,
    image: &Resolved,
    snapshotter: &str,
    sync: bool,
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
                let layer = Layer { descriptor: layer, diff_id, name, parent: &parent };
                let unpacked = unpack_layer(client, snapshotter, sync, &layer).await;
                item.finish(if unpacked.is_ok() { "unpacked" } else { "failed" });
                unpacked.with_context(|| format!("cannot unpack layer {}", layer.descriptor.digest))?;
            }
            parent = name.to_string();
        }
    }
    // The config keeps the snapshots: as long as an image refers to it, they stay.
    let label = format!("containerd.io/gc.ref.snapshot.{snapshotter}");
    let config = &image.manifest.config.digest;
    let labels = content::info(client, config).await?.unwrap_or_default().labels;
    // A look costs little, and a write waits for the disk: at each run of an image that is unpacked.
    if labels.get(&label).map(String::as_str) != Some(top.as_str()) {
        content::set_labels(client, config, [(label, top.to_string())].into()).await?;
    }
    Ok(top.to_string())
}

/// A layer to be unpacked.
struct Layer<'a> {
    descriptor: &'a Descriptor,
    diff_id: &'a Digest,
    /// Its chain id: the snapshot's name.
    name: &'a Digest,
    /// The snapshot beneath it; empty for none.
    parent: &'a str,
}

async fn unpack_layer(
    client: &Client,
    snapshotter: &str,
    sync: bool,
    layer: &Layer<'_>,
) -> anyhow::Result<()> {
    let Layer { descriptor: layer, diff_id, name, parent } = *layer;
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
        let request =
            ApplyRequest { diff: Some(wire(layer)), mounts, sync_fs: sync, ..ApplyRequest::default() };
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
