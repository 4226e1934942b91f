//! Making a layer: what one tree changed against another, as a tar archive.
//!
//! ```text
//!  left, right (mounted) --walk both, by name--> changes --> tar --> (gzip, zstd) --> ingest --> blob
//!                                                             \--> hash = containerd.io/uncompressed
//! ```
//!
//! Only on the right, or other there: a member. Only on the left: `.wh.NAME`. A folder is followed on both sides. Regular
//! files are the same when size, owner, mode and time are, and, where the time has no fraction to tell by, when the bytes
//! are too. Parents of what changed are members as well, once each.
//!
//! Invariants: neither tree is changed; neither is left by a symlink; what is answered is in the store.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::io::{self, BufWriter, Read, Write};
use std::os::unix::ffi::OsStrExt as _;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use oci::Hasher;
use oci::image::media_type;
use proto::containerd::services::content::v1::Info;
use proto::containerd::types::Descriptor;
use rustix::fs::{FileType, Stat};
use sys::beneath::{Place, Root};
use sys::mount::{Mount, Mounted};
use tar::{EntryType, Header};

use super::{BUFFER, Diff};
use crate::content::{Content, Writer};
use crate::context::RequestContext;
use crate::error::{Error, Result, blocking, outlive};
use crate::labels::{self, Labels};

/// The label of a compressed layer with the digest of its archive.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";
const CAPABILITY: &[u8] = b"security.capability";
/// How deep a tree may be: each level holds a descriptor or two.
const DEPTH: usize = 400;

/// What to compare, and what to make of it.
#[derive(Debug, Clone, Default)]
pub struct Comparison {
    /// The parent's mounts; none compares to nothing.
    pub left: Vec<Mount>,
    /// The changed tree's mounts.
    pub right: Vec<Mount>,
    /// Of the layer; empty for tar+gzip.
    pub media_type: String,
    /// The ingest to write by; made up when empty.
    pub reference: String,
    /// Labels of the blob.
    pub labels: Labels,
    /// No time in the layer is later than this.
    pub epoch: Option<SystemTime>,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

impl Diff {
    /// Makes a layer of what `right` changed against `left`; its descriptor. The blob is in the caller's namespace, held by
    /// the caller's lease, and says its diff id in a label.
    pub(super) async fn compare_here(
        &self,
        context: &RequestContext,
        mut wanted: Comparison,
    ) -> Result<Descriptor> {
        context.namespace()?;
        labels::validate_all(&wanted.labels)?;
        if wanted.media_type.is_empty() {
            media_type::OCI_LAYER_GZIP.clone_into(&mut wanted.media_type);
        }
        let compression = match wanted.media_type.as_str() {
            media_type::OCI_LAYER | media_type::DOCKER_LAYER => Compression::None,
            media_type::OCI_LAYER_GZIP | media_type::DOCKER_LAYER_GZIP => Compression::Gzip,
            media_type::OCI_LAYER_ZSTD => Compression::Zstd,
            other => {
                return Err(Error::unimplemented(format!(
                    "layers of media type {other:?} cannot be made; {} and its +gzip and +zstd can",
                    media_type::OCI_LAYER
                )));
            }
        };
        let made_up = wanted.reference.is_empty();
        if made_up {
            let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
            wanted.reference = format!("diff-{}", since.as_nanos());
        }
        let (this, context) = (self.clone(), context.clone());
        outlive(async move {
            let reference = wanted.reference.clone();
            let made = this.make(&context, wanted, compression).await;
            if made.is_err() && made_up {
                // Nobody knows its name to go on with it.
                match this.content.abort(&context, reference).await {
                    Ok(()) | Err(Error::NotFound(_)) => {}
                    Err(error) => tracing::warn!(%error, "the ingest of a failed diff stays"),
                }
            }
            made
        })
        .await
    }

    async fn make(
        &self,
        context: &RequestContext,
        wanted: Comparison,
        compression: Compression,
    ) -> Result<Descriptor> {
        let Comparison { left, right, media_type, reference, mut labels, epoch } = wanted;
        let writer = self.content.writer(context, reference, 0, None).await?;
        let folder = self.mounts.clone();
        let (writer, diff_id) = blocking(move || {
            let left = if left.is_empty() { None } else { Some(mounted(&left, &folder)?) };
            let right = mounted(&right, &folder)?;
            write_layer(left.as_ref(), &right, writer, compression, epoch)
        })
        .await?;
        if compression != Compression::None {
            labels.insert(UNCOMPRESSED.into(), diff_id.to_string());
        }
        let digest = writer.digest();
        match writer.commit(0, None, labels).await {
            Ok(_) | Err(Error::AlreadyExists(_)) => {}
            Err(error) => return Err(error),
        }
        let info = label_uncompressed(&self.content, context, &digest, &diff_id, compression).await?;
        Ok(Descriptor { media_type, digest: info.digest, size: info.size, ..Descriptor::default() })
    }
}

/// The blob's facts. One that was there before may lack the label.
async fn label_uncompressed(
    content: &Content,
    context: &RequestContext,
    digest: &oci::Digest,
    diff_id: &oci::Digest,
    compression: Compression,
) -> Result<Info> {
    let info = content.info(context, digest)?;
    if compression == Compression::None || info.labels.contains_key(UNCOMPRESSED) {
        return Ok(info);
    }
    let labels = Labels::from([(UNCOMPRESSED.to_owned(), diff_id.to_string())]);
    content.update(context, Info { labels, ..info }, vec![format!("labels.{UNCOMPRESSED}")]).await
}

/// A tree to read, and the mount that it needs, if any.
struct Tree {
    root: Root,
    _mounted: Option<Mounted>,
}

fn mounted(mounts: &[Mount], folder: &std::path::Path) -> Result<Tree> {
    let open =
        |path: &std::path::Path| Root::open(path).map_err(|error| Error::io("open the tree", path, &error));
    if let Some(plain) = sys::mount::as_plain_dir(mounts) {
        return Ok(Tree { root: open(&plain)?, _mounted: None });
    }
    if mounts.is_empty() {
        return Err(Error::invalid_argument("there are no mounts of the changed tree"));
    }
    let mounted = Mounted::new(mounts, folder)
        .map_err(|error| Error::io("mount the tree to compare beneath", folder, &error))?;
    Ok(Tree { root: open(mounted.path())?, _mounted: Some(mounted) })
}

/// Where the compressed bytes go; keeps the engine's own error, which `io::Error` cannot carry whole.
struct Sink {
    writer: Writer,
    error: Option<Error>,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.writer.write(bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(error) => {
                let text = error.to_string();
                self.error = Some(error);
                Err(io::Error::other(text))
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Encoder {
    None(BufWriter<Sink>),
    Gzip(flate2::write::GzEncoder<BufWriter<Sink>>),
    Zstd(zstd::stream::write::Encoder<'static, BufWriter<Sink>>),
}

/// Hashes the archive on its way to the encoder.
struct Output {
    encoder: Encoder,
    hasher: Hasher,
}

impl Write for Output {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = match &mut self.encoder {
            Encoder::None(to) => to.write(bytes),
            Encoder::Gzip(to) => to.write(bytes),
            Encoder::Zstd(to) => to.write(bytes),
        }?;
        self.hasher.update(&bytes[..count]);
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

impl Output {
    fn sink(&mut self) -> &mut Sink {
        match &mut self.encoder {
            Encoder::None(to) => to.get_mut(),
            Encoder::Gzip(to) => to.get_mut().get_mut(),
            Encoder::Zstd(to) => to.get_mut().get_mut(),
        }
    }
}

fn write_layer(
    left: Option<&Tree>,
    right: &Tree,
    mut writer: Writer,
    compression: Compression,
    epoch: Option<SystemTime>,
) -> Result<(Writer, oci::Digest)> {
    if writer.offset() > 0 {
        writer.truncate()?;
    }
    let sink = BufWriter::with_capacity(BUFFER, Sink { writer, error: None });
    let encoder = match compression {
        Compression::None => Encoder::None(sink),
        Compression::Gzip => {
            Encoder::Gzip(flate2::write::GzEncoder::new(sink, flate2::Compression::default()))
        }
        Compression::Zstd => Encoder::Zstd(
            zstd::stream::write::Encoder::new(sink, 3)
                .map_err(|error| Error::unknown(format!("start the zstd encoder: {error}")))?,
        ),
    };
    let output = Output { encoder, hasher: oci::Algorithm::Sha256.hasher() };
    let mut layer = Layer {
        output,
        epoch,
        links: HashMap::new(),
        unchanged: HashMap::new(),
        listed: BTreeSet::new(),
        buffer: vec![0; BUFFER],
    };
    let walked = layer.folder(&mut Vec::new(), left.map(|tree| &tree.root), &right.root);
    let ended = walked.and_then(|()| layer.output.write_all(&[0; 1024]));
    if let Err(error) = ended {
        // The store's own error, with its class, where that is what failed.
        return Err(layer.output.sink().error.take().unwrap_or_else(|| {
            if error.kind() == io::ErrorKind::StorageFull {
                Error::resource_exhausted(format!("make the layer: {error}; free some space and try again"))
            } else {
                Error::unknown(format!("make the layer: {error}"))
            }
        }));
    }
    let Output { encoder, hasher } = layer.output;
    let failed = |error: io::Error| Error::unknown(format!("make the layer: {error}"));
    let sink = match encoder {
        Encoder::None(sink) => sink,
        Encoder::Gzip(encoder) => encoder.finish().map_err(failed)?,
        Encoder::Zstd(encoder) => encoder.finish().map_err(failed)?,
    };
    let sink = sink.into_inner().map_err(|error| failed(error.into_error()))?;
    Ok((sink.writer, hasher.finish()))
}

struct Layer {
    output: Output,
    epoch: Option<SystemTime>,
    /// The first path of each file with several links, by device and inode.
    links: HashMap<(u64, u64), Vec<u8>>,
    /// Names of files with several links that did not change, until another name of the same file turns out new.
    unchanged: HashMap<(u64, u64), Vec<Vec<u8>>>,
    /// Folders that are members already.
    listed: BTreeSet<Vec<u8>>,
    buffer: Vec<u8>,
}

/// The folders on the way down, each with its path and what it is.
type Parents = Vec<(Vec<u8>, Place, Stat)>;

impl Layer {
    fn folder(&mut self, parents: &mut Parents, left: Option<&Root>, right: &Root) -> io::Result<()> {
        if parents.len() > DEPTH {
            return Err(io::Error::new(io::ErrorKind::InvalidFilename, "the tree is too deep"));
        }
        let before: BTreeSet<Vec<u8>> =
            left.map(Root::names).transpose()?.unwrap_or_default().into_iter().collect();
        let after: BTreeSet<Vec<u8>> = right.names()?.into_iter().collect();
        for name in before.union(&after) {
            let path = match parents.last() {
                Some((parent, ..)) => [&parent[..], b"/", name].concat(),
                None => name.clone(),
            };
            let old = match left {
                Some(left) if before.contains(name) => stat(left.child(name)?)?,
                _ => None,
            };
            match (stat(right.child(name)?)?, old) {
                (Some((place, stat)), old) => self.entry(parents, path, old, place, stat)?,
                (None, Some(_)) => {
                    self.list_parents(parents)?;
                    self.whiteout(&path, name)?;
                }
                (None, None) => {}
            }
        }
        Ok(())
    }

    fn entry(
        &mut self,
        parents: &mut Parents,
        path: Vec<u8>,
        old: Option<(Place, Stat)>,
        place: Place,
        stat: Stat,
    ) -> io::Result<()> {
        let kind = FileType::from_raw_mode(stat.st_mode);
        if kind == FileType::Socket {
            return Ok(());
        }
        let changed = match &old {
            Some((before, was)) => !self.same(before, was, &place, &stat)?,
            None => true,
        };
        let inode = (stat.st_dev, stat.st_ino);
        let linked = kind != FileType::Directory && stat.st_nlink > 1;
        if changed || (linked && self.links.contains_key(&inode)) {
            self.list_parents(parents)?;
            self.member(&path, &place, &stat)?;
            // Else the new name would be a file of its own once this is unpacked.
            for name in self.unchanged.remove(&inode).unwrap_or_default() {
                self.member(&name, &place, &stat)?;
            }
        } else if linked {
            self.unchanged.entry(inode).or_default().push(path.clone());
        }
        if kind == FileType::Directory {
            let below = match old {
                Some((before, was)) if FileType::from_raw_mode(was.st_mode) == FileType::Directory => {
                    Some(before.enter()?)
                }
                _ => None,
            };
            let inside = place.enter()?;
            parents.push((path, place, stat));
            let walked = self.folder(parents, below.as_ref(), &inside);
            parents.pop();
            walked?;
        }
        Ok(())
    }

    fn same(&mut self, before: &Place, was: &Stat, after: &Place, is: &Stat) -> io::Result<bool> {
        if (was.st_dev, was.st_ino) == (is.st_dev, is.st_ino) {
            return Ok(true);
        }
        let facts = |stat: &Stat| (stat.st_mode, stat.st_uid, stat.st_gid, stat.st_rdev);
        if facts(was) != facts(is) || xattrs(before)? != xattrs(after)? {
            return Ok(false);
        }
        match FileType::from_raw_mode(is.st_mode) {
            FileType::Directory => Ok(true),
            FileType::Symlink => Ok(before.link_target()? == after.link_target()?),
            FileType::RegularFile => {
                if was.st_size != is.st_size || was.st_mtime != is.st_mtime {
                    return Ok(false);
                }
                if was.st_mtime_nsec != 0 && is.st_mtime_nsec != 0 {
                    return Ok(was.st_mtime_nsec == is.st_mtime_nsec);
                }
                // Archives often keep whole seconds only, in which a file may well have changed twice.
                self.same_bytes(before, after)
            }
            _ => Ok(true),
        }
    }

    fn same_bytes(&mut self, before: &Place, after: &Place) -> io::Result<bool> {
        let (mut before, mut after) = (before.read()?, after.read()?);
        let (left, right) = self.buffer.split_at_mut(BUFFER / 2);
        loop {
            let count = before.read(left)?;
            if count == 0 {
                return Ok(after.read(&mut right[..1])? == 0);
            }
            match after.read_exact(&mut right[..count]) {
                Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(false),
                read => read?,
            }
            if left[..count] != right[..count] {
                return Ok(false);
            }
        }
    }

    fn list_parents(&mut self, parents: &Parents) -> io::Result<()> {
        for (path, place, stat) in parents {
            if !self.listed.contains(path) {
                self.member(path, place, stat)?;
            }
        }
        Ok(())
    }

    fn member(&mut self, path: &[u8], place: &Place, stat: &Stat) -> io::Result<()> {
        let mut header = Header::new_ustar();
        let mut name = path.to_vec();
        let mut link = None;
        let mut size = 0;
        let kind = match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => {
                self.listed.insert(path.to_vec());
                name.push(b'/');
                EntryType::Directory
            }
            FileType::Symlink => {
                link = Some(place.link_target()?);
                EntryType::Symlink
            }
            FileType::CharacterDevice => EntryType::Char,
            FileType::BlockDevice => EntryType::Block,
            FileType::Fifo => EntryType::Fifo,
            _ => {
                size = u64::try_from(stat.st_size).unwrap_or(0);
                EntryType::Regular
            }
        };
        let kind = match self.links.get(&(stat.st_dev, stat.st_ino)) {
            Some(first) => {
                (link, size) = (Some(first.clone()), 0);
                EntryType::Link
            }
            None => {
                if kind != EntryType::Directory && stat.st_nlink > 1 {
                    self.links.insert((stat.st_dev, stat.st_ino), path.to_vec());
                }
                kind
            }
        };
        header.set_entry_type(kind);
        header.set_mode(stat.st_mode & 0o7777);
        if matches!(kind, EntryType::Char | EntryType::Block) {
            header.set_device_major(rustix::fs::major(stat.st_rdev))?;
            header.set_device_minor(rustix::fs::minor(stat.st_rdev))?;
        }
        let modified = UNIX_EPOCH + Duration::from_secs(u64::try_from(stat.st_mtime).unwrap_or(0));
        let modified = self.epoch.map_or(modified, |epoch| modified.min(epoch));
        let seconds = modified.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
        let mut records = Vec::new();
        if kind != EntryType::Link {
            for (name, value) in xattrs(place)? {
                records.push(([b"SCHILY.xattr.", &name[..]].concat(), value));
            }
        }
        let owner = (u64::from(stat.st_uid), u64::from(stat.st_gid));
        self.header(&mut header, records, &name, link.as_deref(), size, owner, seconds)?;
        if kind == EntryType::Regular && size > 0 {
            self.data(place, size)?;
        }
        Ok(())
    }

    fn data(&mut self, place: &Place, size: u64) -> io::Result<()> {
        let mut file = place.read()?;
        let mut left = size;
        while left > 0 {
            let want = usize::try_from(left).map_or(self.buffer.len(), |left| left.min(self.buffer.len()));
            let count = file.read(&mut self.buffer[..want])?;
            if count == 0 {
                let what =
                    format!("{:?} became shorter while it was read", String::from_utf8_lossy(place.name()));
                return Err(io::Error::new(io::ErrorKind::UnexpectedEof, what));
            }
            self.output.write_all(&self.buffer[..count])?;
            left -= count as u64;
        }
        self.pad(size)
    }

    fn whiteout(&mut self, path: &[u8], name: &[u8]) -> io::Result<()> {
        let parent = &path[..path.len() - name.len()];
        let path = [parent, b".wh.", name].concat();
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::Regular);
        header.set_mode(0);
        self.header(&mut header, Vec::new(), &path, None, 0, (0, 0), 0)
    }

    /// Writes a header, after a pax one with what does not fit it.
    #[expect(clippy::too_many_arguments, reason = "the fields of a header")]
    fn header(
        &mut self,
        header: &mut Header,
        mut records: Vec<(Vec<u8>, Vec<u8>)>,
        path: &[u8],
        link: Option<&[u8]>,
        size: u64,
        (uid, gid): (u64, u64),
        modified: u64,
    ) -> io::Result<()> {
        if path.len() > 100 || header.set_path(OsStr::from_bytes(path)).is_err() {
            records.push(("path".into(), path.to_vec()));
            header.as_mut_bytes()[..100].copy_from_slice(
                &path.iter().copied().chain(std::iter::repeat(0)).take(100).collect::<Vec<_>>(),
            );
        }
        if let Some(link) = link
            && (link.len() > 100 || header.set_link_name_literal(link).is_err())
        {
            records.push(("linkpath".into(), link.to_vec()));
        }
        // Seven octal digits; eleven for size and time.
        for (name, value, limit) in [
            ("uid", uid, 1 << 21),
            ("gid", gid, 1 << 21),
            ("size", size, 1 << 33),
            ("mtime", modified, 1 << 33),
        ] {
            let fits = value < limit;
            if !fits {
                records.push((name.into(), value.to_string().into_bytes()));
            }
            let value = if fits { value } else { 0 };
            match name {
                "uid" => header.set_uid(value),
                "gid" => header.set_gid(value),
                "size" => header.set_size(value),
                _ => header.set_mtime(value),
            }
        }
        if !records.is_empty() {
            self.pax(&records)?;
        }
        header.set_cksum();
        self.output.write_all(header.as_bytes())
    }

    fn pax(&mut self, records: &[(Vec<u8>, Vec<u8>)]) -> io::Result<()> {
        let mut data = Vec::new();
        for (key, value) in records {
            // The length counts its own digits.
            let rest = key.len() + value.len() + 3;
            let mut length = rest;
            while length != rest + length.to_string().len() {
                length = rest + length.to_string().len();
            }
            data.extend_from_slice(format!("{length} ").as_bytes());
            data.extend_from_slice(key);
            data.push(b'=');
            data.extend_from_slice(value);
            data.push(b'\n');
        }
        let mut header = Header::new_ustar();
        header.set_entry_type(EntryType::XHeader);
        header.set_path("PaxHeaders/0")?;
        header.set_mode(0o644);
        header.set_uid(0);
        header.set_gid(0);
        header.set_mtime(0);
        header.set_size(data.len() as u64);
        header.set_cksum();
        self.output.write_all(header.as_bytes())?;
        self.output.write_all(&data)?;
        self.pad(data.len() as u64)
    }

    fn pad(&mut self, size: u64) -> io::Result<()> {
        let missing = usize::try_from(size.next_multiple_of(512) - size).unwrap_or(0);
        self.output.write_all(&[0; 512][..missing])
    }
}

/// The attributes that belong into a layer, by name: what users set, and capabilities. The others are the host's.
fn xattrs(place: &Place) -> io::Result<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut xattrs = Vec::new();
    for name in place.xattr_names()? {
        let kept = name == CAPABILITY || (name.starts_with(b"user.") && !name.starts_with(b"user.overlay."));
        if kept && let Some(value) = place.xattr(OsStr::from_bytes(&name))? {
            xattrs.push((name, value));
        }
    }
    xattrs.sort();
    Ok(xattrs)
}

fn stat(place: Place) -> io::Result<Option<(Place, Stat)>> {
    Ok(place.stat()?.map(|stat| (place, stat)))
}
