//! Blobs of layers that were removed on request, as the record of their manifest says.
//!
//! ```text
//!  containerd.io/gc.ref.content.l.0=DIGEST    kept
//!  gantry.io/dropped.l.0=DIGEST               dropped, unless the other one is there, too: a pull has asked for it since
//! ```

use oci::Digest;

use crate::labels::Labels;
use crate::metadata::content::BlobRecord;
use crate::metadata::{Read as _, View};

/// What the labels that keep content begin with.
const KEEPS: &str = "containerd.io/gc.ref.content.";
/// What they begin with once the content was dropped.
const DROPPED: &str = "gantry.io/dropped.";

/// A manifest's labels, once it does not keep these layers any more.
pub(crate) fn drop_layers(labels: Labels, layers: &[String]) -> Labels {
    let dropped = |(label, digest): (String, String)| match label.strip_prefix(KEEPS) {
        Some(rest) if layers.contains(&digest) => (format!("{DROPPED}{rest}"), digest),
        _ => (label, digest),
    };
    labels.into_iter().map(dropped).collect()
}

/// Whether a manifest's record says that this blob was dropped, and nothing has asked for it since.
pub(crate) fn is_dropped(manifest: &BlobRecord, digest: &Digest) -> bool {
    let named = |prefix: &str| {
        manifest.labels.iter().any(|(key, value)| key.starts_with(prefix) && value == digest.as_str())
    };
    named(DROPPED) && !named(KEEPS)
}

/// Why a blob that is asked for is not there, if that was wanted.
pub(crate) fn why_missing(view: &View, namespace: &str, digest: &Digest) -> Option<String> {
    let records = view.list::<BlobRecord>(&[namespace]);
    let (manifest, _) = records.into_iter().find(|(_, record)| is_dropped(record, digest))?;
    Some(format!(
        "blob {digest} is a layer of {}, whose layers' blobs were dropped to save space; pull the image again",
        manifest.concat()
    ))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_layer_is_dropped_until_it_is_asked_for_again() {
        let digest = Digest::sha256_of(b"layer");
        let label = |key: &str| (format!("{KEEPS}{key}"), digest.to_string());
        let config = (format!("{KEEPS}config"), "other".to_owned());
        let labels = Labels::from([label("l.0"), config.clone()]);
        let mut record = BlobRecord { labels: labels.clone(), ..BlobRecord::default() };
        assert!(!is_dropped(&record, &digest));
        record.labels = drop_layers(labels, &[digest.to_string()]);
        assert!(is_dropped(&record, &digest));
        assert_eq!(record.labels.get(&config.0), Some(&config.1), "what is no layer stays");
        record.labels.extend([label("l.0")]);
        assert!(!is_dropped(&record, &digest));
    }
}
