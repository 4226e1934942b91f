//! Layers' blobs of an unpacked image, dropped on request.
//!
//! ```text
//!  manifest   containerd.io/gc.ref.content.l.0=DIGEST  ->  gantry.io/dropped.l.0=DIGEST        one commit
//!             the collector takes what nothing holds any more, as it does anyhow
//! ```
//!
//! The config keeps the snapshots, so that containers start as before. A pull that writes the manifest's labels again takes
//! it back.
//!
//! Invariant: only layers go whose snapshots are all there, in one snapshotter at least, and kept by the config.

use oci::Digest;
use oci::image::chain_ids;

use super::{Upkeep, tree};
use crate::content::dropped::drop_layers;
use crate::context::RequestContext;
use crate::error::{Error, Result, outlive};
use crate::metadata::Read as _;
use crate::metadata::content::BlobRecord;
use crate::metadata::snapshots::SnapshotRecord;

/// What has gone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dropped {
    /// Blobs.
    pub blobs: u64,
    /// Their bytes.
    pub content: u64,
}

impl Upkeep {
    /// Drops the layers' blobs of those of an image's manifests that are unpacked. FailedPrecondition when none is.
    pub async fn drop_layers(&self, context: &RequestContext, name: &str) -> Result<Dropped> {
        let namespace = context.namespace()?.clone();
        let target = tree::target(&self.images.get(context, name)?)?;
        let mut unpacked = Vec::new();
        for (descriptor, manifest) in tree::manifests(&self.content, context, target).await? {
            let Some(config) = tree::config(&self.content, context, &manifest).await? else { continue };
            let Ok(diff_ids) = config.diff_ids_for(&manifest) else { continue };
            let layers: Vec<String> = manifest.layers.iter().map(|layer| layer.digest.to_string()).collect();
            unpacked.push((descriptor.digest, manifest.config.digest, layers, chain_ids(diff_ids)));
        }
        let snapshotters: Vec<String> = self.snapshots.opened().map(|(name, ..)| name.to_owned()).collect();
        let (this, name) = (self.clone(), name.to_owned());
        outlive(async move {
            let before = this.metadata.view();
            let of = namespace.clone();
            let wanted = unpacked.iter().flat_map(|(_, _, layers, _)| layers.clone()).collect::<Vec<_>>();
            let dropped = this
                .metadata
                .commit(move |txn| {
                    let namespace = of.as_str();
                    let mut dropped = 0;
                    for (manifest, config, layers, chain) in &unpacked {
                        let config = txn.get::<BlobRecord>(&[namespace, config.as_str()])?.unwrap_or_default();
                        let has = |snapshotter: &String| {
                            let kept = config.labels.get(&format!("containerd.io/gc.ref.snapshot.{snapshotter}"));
                            let has = |key: &Digest| {
                                txn.has::<SnapshotRecord>(&[namespace, snapshotter, key.as_str()]).unwrap_or(false)
                            };
                            // Were they not kept by it, nothing might be left of the image in the end.
                            kept.map(String::as_str) == chain.last().map(Digest::as_str) && chain.iter().all(has)
                        };
                        if layers.is_empty() || !snapshotters.iter().any(has) {
                            continue;
                        }
                        let key = [namespace, manifest.as_str()];
                        let Some(mut record) = txn.get::<BlobRecord>(&key)? else { continue };
                        record.labels = drop_layers(record.labels, layers);
                        txn.put(&key, &record)?;
                        dropped += 1;
                    }
                    if dropped > 0 {
                        txn.release();
                    }
                    Ok(dropped)
                })
                .await?;
            if dropped == 0 {
                return Err(Error::failed_precondition(format!(
                    "image {name:?} is not unpacked, so that its layers' blobs are all there is of it; unpack it first"
                )));
            }
            this.gc.collect().await?;
            let after = this.metadata.view();
            let mut all = Dropped { blobs: 0, content: 0 };
            for digest in wanted.iter().collect::<std::collections::BTreeSet<_>>() {
                let key = [namespace.as_str(), digest];
                if let Some(record) = before.get::<BlobRecord>(&key)?
                    && !after.has::<BlobRecord>(&key)?
                {
                    all.blobs += 1;
                    all.content += u64::try_from(record.size).unwrap_or(0);
                }
            }
            Ok(all)
        })
        .await
    }
}
