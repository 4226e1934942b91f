//! What holds of any archive of images.

use std::io::Cursor;
use std::path::Path;

use oci::image::media_type;
use proto::containerd::types::transfer::ImageStore;
use tokio_util::sync::CancellationToken;

use super::blobs::Blobs;
use super::import;
use crate::content::{Content, FOLDER};
use crate::context::{Namespace, RequestContext};
use crate::events::Exchange;
use crate::metadata::Metadata;

/// An archive, in a store beneath `scratch`. Its first byte says whether it is packed by us and whether layers are. What the
/// store has in the end is what its name says, the index that comes of it is there, and nothing is outside the store's folder.
pub fn archive(data: &[u8], scratch: &Path) {
    let Some((how, bytes)) = data.split_first() else { return };
    let folder = scratch.join("store");
    sys::fs::remove_tree(&folder).expect("remove the store of the run before");
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(1)
        .enable_all()
        .build()
        .expect("a runtime");
    let entered = runtime.enter();
    let metadata = Metadata::open(&folder.join("metadata")).expect("open the metadata");
    let content =
        Content::open(&folder.join(FOLDER), metadata, Exchange::default()).expect("open the content");
    let context = RequestContext::internal(Namespace::new("a").expect("a name"));
    let mut blobs = Blobs::new(content.clone(), context.clone(), CancellationToken::new());
    drop(entered);
    let bytes = if how & 2 == 0 { crate::diff::fuzz::with_sums(bytes.to_vec()) } else { bytes.to_vec() };
    let contents = import::read(Cursor::new(bytes), &mut blobs, true, how & 1 != 0);
    for info in content.list(&context, &[]).expect("list the blobs") {
        let digest: oci::Digest = info.digest.parse().expect("a digest");
        let stored = content.read_document(&context, &digest, 64 << 20).expect("read a blob");
        let mut hasher = digest.algorithm().hasher();
        hasher.update(&stored);
        assert_eq!(hasher.finish(), digest);
        assert_eq!(u64::try_from(info.size), Ok(stored.len() as u64));
    }
    if let Ok(contents) = contents {
        assert_eq!(contents.index.media_type, media_type::OCI_INDEX);
        let index =
            content.read_document(&context, &contents.index.digest, 64 << 20).expect("the index is there");
        let again = oci::image::Index::parse(&index).expect("the index can be read");
        assert_eq!(again.manifests.len(), contents.document.manifests.len());
        let _ = import::keep(&blobs, &contents, &ImageStore::default());
    }
    let open = content.list_statuses(&context, &[]);
    assert_eq!(runtime.block_on(open).expect("list the ingests").len(), 0, "an ingest is left");
    drop((blobs, content));
    let names: Vec<_> =
        std::fs::read_dir(scratch).expect("list").flatten().map(|entry| entry.file_name()).collect();
    assert_eq!(names, ["store"]);
}
