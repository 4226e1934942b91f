//! Layers: archives unpacked onto a snapshot, and made from two of them.
//!
//! ```text
//!  blob --> decompress (gzip, zstd; told by the first bytes) --> count and hash --> tar --> beneath the folder
//!                                                                 = the diff id
//! ```
//!
//! Before that, stream processors may turn a blob of a type of their own into a layer. Differs of other processes can be put
//! before this one, or in its place.
//!
//! Where the mounts are one overlay, the layer goes straight into its upper folder with overlayfs's own marks for what
//! it deletes: no mount is made, nothing is copied up, and a folder that a layer replaces costs one attribute instead of
//! a removal of each file in it. A layer's paths are thus resolved against the layer alone, as it was made. One plain
//! bind is written to at its source. Anything else is mounted on a private folder for the time of the call.
//!
//! Invariants: nothing outside of those folders is touched, whatever the layer says; nothing stays mounted; what is
//! answered was read to its last byte.

mod ahead;
pub mod archive;
mod compare;
#[cfg(any(test, fuzzing))]
pub(crate) mod fuzz;
mod processors;
mod remote;
mod unpack;

use std::collections::BTreeMap;
use std::io::{self, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use oci::image::media_type;
use prost_types::Any;
use proto::containerd::types::Descriptor;
use sys::beneath::Root;
use sys::mount::{Mount, Mounted};

use crate::content::Content;
use crate::context::RequestContext;
use crate::error::{Error, Result, blocking, outlive};
use crate::proxy::Proxy;
use ahead::Ahead;
use archive::Archive;
pub use compare::Comparison;
pub use processors::Processor;
use remote::Remote;
use unpack::Target;
pub use unpack::Unsettled;
pub(crate) use unpack::{AUFS, OPAQUE, OVERLAY_OPAQUE, WHITEOUT, read_error};

/// Bytes read from the disk, and given to the hash, at a time.
const BUFFER: usize = 256 * 1024;
const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// Applies and makes layers.
#[derive(Clone)]
pub struct Diff {
    content: Content,
    mounts: PathBuf,
    differs: Arc<[Differ]>,
    processors: Arc<[Processor]>,
}

/// The name of the differ that is built in.
pub const BUILT_IN: &str = "walking";

/// What is asked for a layer: the first that can do it does.
enum Differ {
    BuiltIn,
    Remote(Remote),
}

/// A layer that is to be unpacked.
#[derive(Debug, Clone, Default)]
pub struct Layer {
    /// The blob, in the content of the caller's namespace.
    pub descriptor: Descriptor,
    /// What to unpack it onto.
    pub mounts: Vec<Mount>,
    /// For stream processors, by their names.
    pub payloads: BTreeMap<String, Any>,
    /// Whether its files are to be on disk before it is answered.
    pub sync: bool,
}

/// A layer as it was unpacked.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Applied {
    /// Of the uncompressed archive: the diff id.
    pub digest: oci::Digest,
    /// Bytes of the uncompressed archive.
    pub size: u64,
}

impl Diff {
    /// Layers of this content; `mounts` is a folder for temporary mounts, from which those of an earlier run are taken.
    pub fn open(content: Content, mounts: PathBuf) -> Result<Self> {
        sys::fs::create_dir_all(&mounts, 0o700)
            .map_err(|error| Error::io("create folder", &mounts, &error))?;
        let stale = std::fs::read_dir(&mounts).map_err(|error| Error::io("read folder", &mounts, &error))?;
        for entry in stale.flatten() {
            let path = entry.path();
            // Never a recursive removal: what could not be unmounted holds somebody's files.
            if let Err(error) = sys::mount::unmount_all(&path).and_then(|()| std::fs::remove_dir(&path)) {
                tracing::warn!(path = %path.display(), %error, "a temporary mount of an earlier run stays");
            }
        }
        Ok(Diff { content, mounts, differs: [Differ::BuiltIn].into(), processors: [].into() })
    }

    /// The same, with stream processors, and with these differs in this order; `remote` has the sockets of those that are
    /// not built in.
    #[must_use]
    pub fn with(
        mut self,
        processors: Vec<Processor>,
        order: &[String],
        remote: &BTreeMap<String, PathBuf>,
    ) -> Self {
        let differ = |name: &String| {
            let address = remote.get(name)?;
            Some(Differ::Remote(Remote { name: name.clone(), proxy: Proxy::new(address.clone()) }))
        };
        self.differs = order.iter().map(|name| differ(name).unwrap_or(Differ::BuiltIn)).collect();
        self.processors = processors.into();
        self
    }

    /// Unpacks a layer of the caller's namespace onto mounts; the descriptor of the uncompressed archive.
    pub async fn apply(&self, context: &RequestContext, layer: Layer) -> Result<Descriptor> {
        let mut refused = None;
        for differ in &*self.differs {
            let applied = match differ {
                Differ::BuiltIn => self.apply_here(context, layer.clone()).await,
                Differ::Remote(remote) => remote.apply(context, layer.clone()).await,
            };
            match applied {
                Err(Error::Unimplemented(why)) => refused = Some(Error::Unimplemented(why)),
                applied => return applied,
            }
        }
        Err(refused.unwrap_or_else(|| Error::unimplemented("there is no differ")))
    }

    /// Whether a layer of this type is unpacked here, without programs or differs of others.
    pub fn is_built_in(&self, media_type: &str) -> bool {
        let other = |processor: &Processor| processor.accepts.iter().any(|accepted| accepted == media_type);
        matches!(self.differs.first(), Some(Differ::BuiltIn))
            && media_type::is_layer(media_type)
            && !self.processors.iter().any(other)
    }

    /// The folder for temporary mounts.
    pub fn temporary(&self) -> &Path {
        &self.mounts
    }

    /// Makes a layer of what differs between two sets of mounts, and puts it into the content store.
    pub async fn compare(&self, context: &RequestContext, wanted: Comparison) -> Result<Descriptor> {
        let mut refused = None;
        for differ in &*self.differs {
            let made = match differ {
                Differ::BuiltIn => self.compare_here(context, wanted.clone()).await,
                Differ::Remote(remote) => remote.compare(context, wanted.clone()).await,
            };
            match made {
                Err(Error::Unimplemented(why)) => refused = Some(Error::Unimplemented(why)),
                made => return made,
            }
        }
        Err(refused.unwrap_or_else(|| Error::unimplemented("there is no differ")))
    }

    /// As [`Diff::apply`], for what the engine itself keeps: done here, whatever differs there are.
    pub(crate) async fn unpack(&self, context: &RequestContext, layer: Layer) -> Result<Descriptor> {
        self.apply_here(context, layer).await
    }

    /// As [`Diff::compare`], in the same way.
    pub(crate) async fn pack(&self, context: &RequestContext, wanted: Comparison) -> Result<Descriptor> {
        self.compare_here(context, wanted).await
    }

    /// Where layers are read from and written to.
    pub(crate) fn content(&self) -> &Content {
        &self.content
    }

    async fn apply_here(&self, context: &RequestContext, layer: Layer) -> Result<Descriptor> {
        let Layer { descriptor, mounts, payloads, sync } = layer;
        let digest = descriptor
            .digest
            .parse::<oci::Digest>()
            .map_err(|error| Error::invalid_argument(format!("the layer's descriptor: {error}")))?;
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            let blob = digest.clone();
            let applied = blocking(move || {
                let (file, size) = this.content.open_blob(&context, &blob)?;
                let (stream, media_type) =
                    processors::process(&this.processors, &payloads, file, descriptor.media_type)?;
                apply(stream, &media_type, Some(size), &mounts, &this.mounts, sync)
            })
            .await?;
            tracing::debug!(layer = %digest, diff_id = %applied.digest, size = applied.size, "layer applied");
            Ok(Descriptor {
                media_type: media_type::OCI_LAYER.to_owned(),
                digest: applied.digest.to_string(),
                size: i64::try_from(applied.size).unwrap_or(i64::MAX),
                annotations: std::collections::BTreeMap::new(),
            })
        })
        .await
    }
}

/// Unpacks a layer as it arrives from any stream. Blocks; to be called where blocking is fine. `temporary` is a folder for
/// a private mount, should these mounts need one. `size`, where it is known, limits what may come of the layer.
pub fn apply(
    stream: impl Read + Send + 'static,
    media_type: &str,
    size: Option<u64>,
    mounts: &[Mount],
    temporary: &Path,
    sync: bool,
) -> Result<Applied> {
    with_target(mounts, temporary, |mut target, lower| {
        let applied = unpack_to(&mut target, stream, media_type, size.map_or(u64::MAX, most))?;
        sys::failpoint!("diff.apply.unpacked");
        target.settle(lower)?;
        if sync {
            target.sync().map_err(|error| Error::unknown(format!("sync the unpacked layer: {error}")))?;
        }
        Ok(applied)
    })
}

/// Unpacks a layer of `size` bytes into an overlay's upper folder whose lower ones are not known yet: what depends on them
/// is told, for [`settle`]. With `base` nothing is beneath it.
pub fn apply_alone(
    stream: impl Read + Send + 'static,
    media_type: &str,
    size: u64,
    upper: &Path,
    base: bool,
) -> Result<(Applied, Unsettled)> {
    let mut target = Target::fresh(open_folder(upper)?, base);
    let applied = unpack_to(&mut target, stream, media_type, most(size))?;
    sys::failpoint!("diff.apply.unpacked");
    Ok((applied, target.unsettled()))
}

/// Gives an unpacked layer what it has from those beneath it, the nearest first.
pub fn settle(upper: &Path, lower: &[PathBuf], unsettled: Unsettled) -> Result<()> {
    if unsettled.is_empty() {
        return Ok(());
    }
    let lower = lower.iter().map(|path| open_folder(path)).collect::<Result<_>>()?;
    Target::again(open_folder(upper)?, unsettled).settle(lower)
}

/// The most bytes that a layer of this size may have when uncompressed: far more than any real one, and not all of a disk.
fn most(size: u64) -> u64 {
    (4 << 30) + size.saturating_mul(200)
}

fn unpack_to(
    target: &mut Target,
    stream: impl Read + Send + 'static,
    media_type: &str,
    limit: u64,
) -> Result<Applied> {
    let stream = decompress(stream, media_type)?;
    let ahead =
        Ahead::new(stream, limit).map_err(|error| Error::unknown(format!("start a thread: {error}")))?;
    let mut archive = Archive::new(ahead);
    target.unpack(&mut archive)?;
    let mut rest = archive.into_input();
    io::copy(&mut rest, &mut io::sink()).map_err(|error| read_error(&error))?;
    Ok(Applied { size: rest.size, digest: rest.digest() })
}

fn open_folder(path: &Path) -> Result<Root> {
    Root::open(path).map_err(|error| Error::io("open the snapshot's folder", path, &error))
}

/// Opens the folder that the mounts stand for.
fn with_target<T>(
    mounts: &[Mount],
    temporary: &Path,
    work: impl FnOnce(Target, Vec<Root>) -> Result<T>,
) -> Result<T> {
    let open = open_folder;
    if mounts.is_empty() {
        return Err(Error::invalid_argument("there are no mounts to apply the layer to"));
    }
    if let Some((upper, lower)) = overlay_folders(mounts) {
        let lower = lower.iter().map(|path| open(path)).collect::<Result<_>>()?;
        return work(Target::overlay(open(&upper)?), lower);
    }
    if let Some(folder) = sys::mount::as_plain_dir(mounts) {
        return work(Target::plain(open(&folder)?), Vec::new());
    }
    let mounted = Mounted::new(mounts, temporary)
        .map_err(|error| Error::io("mount the snapshot beneath", temporary, &error))?;
    // The folder's descriptor goes with the target, so the mount can be taken down after.
    work(Target::plain(open(mounted.path())?), Vec::new())
}

/// The upper and the lower folders of one writable overlay.
fn overlay_folders(mounts: &[Mount]) -> Option<(PathBuf, Vec<PathBuf>)> {
    let [mount] = mounts else { return None };
    if mount.kind != "overlay"
        || !mount.target.is_empty()
        || mount.options.iter().any(|option| option == "ro")
    {
        return None;
    }
    let option = |name: &str| mount.options.iter().find_map(|option| option.strip_prefix(name));
    let upper = option("upperdir=")?;
    let lower = option("lowerdir=").map(split_lower).unwrap_or_default();
    Some((upper.into(), lower))
}

/// Splits a `lowerdir=` list at its colons; a backslash keeps what follows it.
pub(crate) fn split_lower(list: &str) -> Vec<PathBuf> {
    let mut folders = vec![String::new()];
    let mut chars = list.chars();
    while let Some(c) = chars.next() {
        let folder = folders.last_mut();
        match (c, folder) {
            (':', _) => folders.push(String::new()),
            ('\\', Some(folder)) => folder.extend(chars.next()),
            (c, Some(folder)) => folder.push(c),
            (_, None) => {}
        }
    }
    folders.into_iter().filter(|folder| !folder.is_empty()).map(PathBuf::from).collect()
}

/// The uncompressed stream. The first bytes tell what it is: media types are often wrong about compression.
pub(crate) fn decompress(
    mut stream: impl Read + Send + 'static,
    media_type: &str,
) -> Result<Box<dyn Read + Send>> {
    if !media_type::is_layer(media_type) {
        return Err(Error::unimplemented(format!(
            "media type {media_type:?} is not a layer that can be applied; tar, tar+gzip and tar+zstd can"
        )));
    }
    let mut head = Vec::new();
    (&mut stream).take(4).read_to_end(&mut head).map_err(|error| read_error(&error))?;
    let zipped = head.starts_with(GZIP);
    let zstd = head.starts_with(ZSTD);
    let stream = BufReader::with_capacity(BUFFER, Cursor::new(head).chain(stream));
    Ok(if zipped {
        Box::new(flate2::bufread::MultiGzDecoder::new(stream))
    } else if zstd {
        let decoder = zstd::stream::read::Decoder::with_buffer(stream)
            .map_err(|error| Error::unknown(format!("start the zstd decoder: {error}")))?;
        Box::new(decoder)
    } else {
        Box::new(stream)
    })
}

#[cfg(test)]
mod tests;
