//! What one snapshot changed against another, as a layer.
//!
//! A committed snapshot has no mounts of its own, so it is seen through a view, which goes again whatever comes of it. To be used
//! under a lease, so that what a ctr that was killed has left goes, too.

use proto::containerd::services::diff::v1::DiffRequest;
use proto::containerd::services::snapshots::v1::{
    Kind, MountsRequest, RemoveSnapshotRequest, StatSnapshotRequest, ViewSnapshotRequest,
};
use proto::containerd::types::{Descriptor, Mount};

use crate::client::{Client, Failure, Tried};
use crate::lease::unique;

/// Makes the layer that leads from one snapshot, or for None from its parent, to another. `request` says how.
pub(crate) async fn compare(
    client: &Client,
    snapshotter: &str,
    from: Option<&str>,
    to: &str,
    mut request: DiffRequest,
) -> anyhow::Result<Descriptor> {
    let from = match from {
        Some(from) => from.to_owned(),
        None => stat(client, snapshotter, to).await?.1,
    };
    let mut views = Vec::new();
    let compared = async {
        if !from.is_empty() {
            request.left = mounts(client, snapshotter, &from, &mut views).await?;
        }
        request.right = mounts(client, snapshotter, to, &mut views).await?;
        let answer = client.diff().diff(request).await;
        Ok(answer.tried(|| format!("compare snapshots of {snapshotter}"))?.diff.unwrap_or_default())
    }
    .await;
    for key in views {
        let request = RemoveSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.clone() };
        if let Err(status) = client.snapshots().remove(request).await {
            // It goes with the lease.
            eprintln!("ctr: {}", Failure::new(format!("remove view {key}"), status));
        }
    }
    compared
}

/// Kind and parent of a snapshot.
async fn stat(client: &Client, snapshotter: &str, key: &str) -> anyhow::Result<(Kind, String)> {
    let request = StatSnapshotRequest { snapshotter: snapshotter.to_owned(), key: key.to_owned() };
    let answer = client.snapshots().stat(request).await.tried(|| format!("find snapshot {key}"))?;
    let info = answer.info.unwrap_or_default();
    Ok((info.kind(), info.parent))
}

/// Mounts that show a snapshot; a view that had to be made for it is added to `views`.
async fn mounts(
    client: &Client,
    snapshotter: &str,
    key: &str,
    views: &mut Vec<String>,
) -> anyhow::Result<Vec<Mount>> {
    let (snapshotter, key) = (snapshotter.to_owned(), key.to_owned());
    if stat(client, &snapshotter, &key).await?.0 != Kind::Committed {
        let request = MountsRequest { snapshotter, key: key.clone() };
        let answer = client.snapshots().mounts(request).await;
        return Ok(answer.tried(|| format!("get the mounts of snapshot {key}"))?.mounts);
    }
    let view = unique("ctr-diff");
    let request =
        ViewSnapshotRequest { snapshotter, key: view.clone(), parent: key.clone(), ..Default::default() };
    let answer = client.snapshots().view(request).await.tried(|| format!("view snapshot {key}"))?;
    views.push(view);
    Ok(answer.mounts)
}
