//! Layers: archives unpacked onto a snapshot, and made from two of them.
//!
//! ```text
//!  blob --> decompress (gzip, zstd; told by the first bytes) --> count and hash --> tar --> beneath the folder
//!                                                                 = the diff id
//! ```
//!
//! Where the mounts are one overlay, the layer goes straight into its upper folder with overlayfs's own marks for what
//! it deletes: no mount is made, nothing is copied up, and a folder that a layer replaces costs one attribute instead of
//! a removal of each file in it. A layer's paths are thus resolved against the layer alone, as it was made. One plain
//! bind is written to at its source. Anything else is mounted on a private folder for the time of the call.
//!
//! Invariants: nothing outside of those folders is touched, whatever the layer says; nothing stays mounted; what is
//! answered was read to its last byte.

pub mod archive;
mod compare;
mod unpack;

use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::path::{Path, PathBuf};

use oci::image::media_type;
use proto::containerd::types::Descriptor;
use sys::beneath::Root;
use sys::mount::{Mount, Mounted};

use crate::content::Content;
use crate::context::RequestContext;
use crate::error::{Error, Result, blocking, outlive};
use archive::Archive;
pub use compare::Comparison;
use unpack::{Target, read_error};

/// Bytes read from the disk, and given to the hash, at a time.
const BUFFER: usize = 256 * 1024;
const GZIP: &[u8] = &[0x1f, 0x8b];
const ZSTD: &[u8] = &[0x28, 0xb5, 0x2f, 0xfd];

/// Applies and makes layers.
#[derive(Clone)]
pub struct Diff {
    content: Content,
    mounts: PathBuf,
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
        Ok(Diff { content, mounts })
    }

    /// Unpacks a layer of the caller's namespace onto mounts; the descriptor of the uncompressed archive.
    pub async fn apply(
        &self,
        context: &RequestContext,
        layer: Descriptor,
        mounts: Vec<Mount>,
        sync: bool,
    ) -> Result<Descriptor> {
        let digest = layer
            .digest
            .parse::<oci::Digest>()
            .map_err(|error| Error::invalid_argument(format!("the layer's descriptor: {error}")))?;
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            let (file, _) = this.content.open_blob(&context, &digest)?;
            let applied =
                blocking(move || apply(file, &layer.media_type, &mounts, &this.mounts, sync)).await?;
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
/// a private mount, should these mounts need one.
pub fn apply(
    stream: impl Read,
    media_type: &str,
    mounts: &[Mount],
    temporary: &Path,
    sync: bool,
) -> Result<Applied> {
    let stream = decompress(stream, media_type)?;
    with_target(mounts, temporary, |mut target| {
        let mut archive = Archive::new(BufReader::with_capacity(BUFFER, Hashing::new(stream)));
        target.unpack(&mut archive)?;
        let mut rest = archive.into_input();
        io::copy(&mut rest, &mut io::sink()).map_err(|error| read_error(&error))?;
        if sync {
            target.sync().map_err(|error| Error::unknown(format!("sync the unpacked layer: {error}")))?;
        }
        let hashing = rest.into_inner();
        Ok(Applied { size: hashing.size, digest: hashing.hasher.finish() })
    })
}

/// Opens the folder that the mounts stand for.
fn with_target<T>(mounts: &[Mount], temporary: &Path, work: impl FnOnce(Target) -> Result<T>) -> Result<T> {
    let open =
        |path: &Path| Root::open(path).map_err(|error| Error::io("open the snapshot's folder", path, &error));
    if mounts.is_empty() {
        return Err(Error::invalid_argument("there are no mounts to apply the layer to"));
    }
    if let Some((upper, lower)) = overlay_folders(mounts) {
        let lower = lower.iter().map(|path| open(path)).collect::<Result<_>>()?;
        return work(Target::overlay(open(&upper)?, lower));
    }
    if let Some(folder) = sys::mount::as_plain_dir(mounts) {
        return work(Target::plain(open(&folder)?));
    }
    let mounted = Mounted::new(mounts, temporary)
        .map_err(|error| Error::io("mount the snapshot beneath", temporary, &error))?;
    // The folder's descriptor goes with the target, so the mount can be taken down after.
    work(Target::plain(open(mounted.path())?))
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
fn split_lower(list: &str) -> Vec<PathBuf> {
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
fn decompress<'a>(mut stream: impl Read + 'a, media_type: &str) -> Result<Box<dyn Read + 'a>> {
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
        plain(stream)
    })
}

fn plain<'a>(stream: impl BufRead + 'a) -> Box<dyn Read + 'a> {
    Box::new(stream)
}

/// Counts and hashes what is read through it.
struct Hashing<R> {
    stream: R,
    hasher: oci::digest::Hasher,
    size: u64,
}

impl<R> Hashing<R> {
    fn new(stream: R) -> Self {
        Hashing { stream, hasher: oci::digest::Algorithm::Sha256.hasher(), size: 0 }
    }
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let count = self.stream.read(buffer)?;
        self.hasher.update(&buffer[..count]);
        self.size += count as u64;
        Ok(count)
    }
}

#[cfg(test)]
mod tests;
