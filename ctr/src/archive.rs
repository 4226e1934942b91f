//! Image archives: tars in OCI layout or in `docker save`'s form.
//!
//! OCI layout: `oci-layout`, `index.json`, `blobs/<algorithm>/<hex>`. Docker: `manifest.json`, which names the files
//! of config and layers. Tools write both into one tar; then the layout has the word.

pub(crate) mod export;
pub(crate) mod import;

/// Annotation with an image's full name, in an index.
pub(crate) const NAME_ANNOTATION: &str = "io.containerd.image.name";
/// Annotation with an image's tag, in an index.
pub(crate) const REF_ANNOTATION: &str = "org.opencontainers.image.ref.name";
