//! Checking an image from its name down to the files of its unpacked layers.
//!
//! Each layer is read twice: as it is stored, for its own digest, and uncompressed, for its diff id, beside the files of the
//! snapshot that was made of it. Layers are read on as many threads as there are cores; each holds a few buffers.
//!
//! Invariants: what several images have is read once. A finding is told once it is known whether it could be repaired. When
//! the client has gone, the work ends at its next look.

use std::collections::{BTreeMap, HashSet};
use std::fs::File;
use std::io::{self, BufReader, Read};
use std::path::PathBuf;

use futures::{FutureExt as _, StreamExt as _};
use oci::image::{Descriptor, ImageConfig, Manifest, chain_ids, media_type};
use oci::platform::Matcher;
use oci::{Digest, Platform};
use proto::containerd::services::images::v1::Image;
use proto::gantry::images::v1::finding::Kind;
use proto::gantry::images::v1::verify_response::Entry;
use proto::gantry::images::v1::{Finding, Progress, Summary, VerifyResponse};
use snapshotter::Kind as SnapshotKind;
use sys::beneath::Root;
use sys::mount::Mount;
use tokio::sync::mpsc;

use super::compare::{Compared, Tree, compare};
use super::repair::{Sources, unique};
use super::tree::{DEPTH, Document, limit, target};
use super::{PENDING, Upkeep, gone, tree};
use crate::content::dropped::is_dropped;
use crate::context::RequestContext;
use crate::diff::{archive::Archive, decompress, split_lower};
use crate::error::{Error, Result, blocking};
use crate::metadata::Read as _;
use crate::metadata::content::BlobRecord;
use crate::metadata::snapshots::SnapshotRecord;
use crate::snapshots::New;

/// Bytes read at a time.
pub(crate) const BUFFER: usize = 256 * 1024;

/// What is to be checked.
#[derive(Debug, Clone, Default)]
pub struct Wanted {
    /// The images; empty for all.
    pub names: Vec<String>,
    /// Documents alone.
    pub quick: bool,
    /// Whether to mend what can be mended.
    pub repair: bool,
    /// A reference whose repository has the blobs.
    pub from: String,
}

type Tell = mpsc::Sender<Result<VerifyResponse>>;

/// One check under way.
struct Check {
    upkeep: Upkeep,
    context: RequestContext,
    wanted: Wanted,
    tell: Tell,
    summary: Summary,
    /// Blobs that are as they should be.
    good: HashSet<Digest>,
    /// Snapshots that were looked at, and nothing was found.
    compared: HashSet<(String, Digest)>,
}

/// How a blob's file is.
enum Blob {
    Good,
    Missing,
    NoFile(&'static str),
    Size(u64),
    Digest(Digest),
}

/// What was found out about a layer and one snapshot of it.
struct Layer {
    compared: Compared,
    /// In place of a comparison.
    problem: Option<(Kind, String)>,
    /// Of the uncompressed archive.
    diff_id: Option<Digest>,
}

impl Upkeep {
    /// Checks images, and tells of it as it goes on.
    pub fn verify(
        &self,
        context: &RequestContext,
        wanted: Wanted,
    ) -> Result<mpsc::Receiver<Result<VerifyResponse>>> {
        let mut images = Vec::new();
        for name in &wanted.names {
            images.push(self.images.get(context, name)?);
        }
        if wanted.names.is_empty() {
            images = self.images.list(context, &[])?;
        }
        if !wanted.from.is_empty() {
            super::repair::parse_reference(&wanted.from)?;
        }
        let (tell, answers) = mpsc::channel(PENDING);
        if images.is_empty() {
            // A lease would make the namespace come to be.
            context.namespace()?;
            let summary = VerifyResponse { entry: Some(Entry::Summary(Summary::default())) };
            let _ = tell.try_send(Ok(summary));
            return Ok(answers);
        }
        let (this, context) = (self.clone(), context.clone());
        tokio::spawn(async move {
            let told = tell.clone();
            let done = this.leased(&context, move |upkeep, context| async move {
                let (summary, good, compared) = (Summary::default(), HashSet::new(), HashSet::new());
                let mut check = Check { upkeep, context, wanted, tell: told, summary, good, compared };
                for image in images {
                    check.image(&image).await?;
                }
                check.tell(Entry::Summary(check.summary)).await
            });
            if let Err(error) = done.await {
                let _ = tell.send(Err(error)).await;
            }
        });
        Ok(answers)
    }
}

impl Check {
    async fn tell(&self, entry: Entry) -> Result<()> {
        self.tell.send(Ok(VerifyResponse { entry: Some(entry) })).await.map_err(|_| gone())
    }

    async fn progress(&self, name: &str, object: &str, state: &str, total: u64) -> Result<()> {
        let (name, object, state) = (name.to_owned(), object.to_owned(), state.to_owned());
        self.tell(Entry::Progress(Progress { name, object, state, offset: 0, total })).await
    }

    async fn found(&mut self, finding: Finding) -> Result<()> {
        if finding.kind() != Kind::Dropped {
            self.summary.damages += 1;
            self.summary.repaired += u64::from(finding.repaired);
        }
        self.tell(Entry::Finding(finding)).await
    }

    /// Checks one image, from its target on.
    async fn image(&mut self, image: &Image) -> Result<()> {
        let name = image.name.as_str();
        self.summary.images += 1;
        let target = match target(image) {
            Ok(target) => target,
            Err(error) => return self.found(unknown(name, "", &error)).await,
        };
        // Should the image go meanwhile, what it is made of does not.
        self.upkeep.content.join(&self.context, &target.digest).await?;
        let sources = Sources::new(&self.upkeep, &self.context, &target.digest, &self.wanted.from)?;
        let mut todo = vec![(target, 0)];
        while let Some((descriptor, depth)) = todo.pop() {
            if !self.blob(name, &descriptor, None, &sources).await? {
                continue;
            }
            let digest = descriptor.digest.as_str();
            let read = tree::read(
                &self.upkeep.content,
                &self.context,
                &descriptor.digest,
                limit(&descriptor.media_type),
            );
            let document = match read.await {
                Ok(bytes) => Document::parse(&bytes),
                Err(error) => Err(error.to_string()),
            };
            match document {
                Err(what) => self.found(finding(name, Kind::WrongDocument, digest, what)).await?,
                Ok(Document::Manifest(manifest)) => {
                    self.manifest(name, &descriptor, &manifest, &sources).await?;
                }
                Ok(Document::Index(_)) if depth == DEPTH => {
                    let what = format!("indexes are nested deeper than {DEPTH}");
                    self.found(finding(name, Kind::WrongDocument, digest, what)).await?;
                }
                Ok(Document::Index(index)) => {
                    let present =
                        |entry: &&Descriptor| self.upkeep.content.info(&self.context, &entry.digest).is_ok();
                    let host = Matcher::only(&Platform::host());
                    let mut here: Vec<_> = index.manifests.iter().filter(present).cloned().collect();
                    let runs = |entry: &Descriptor| entry.platform.as_ref().is_none_or(|of| host.matches(of));
                    // Those of other platforms need not be here, if this one's is.
                    if !here.iter().any(runs)
                        && let Some(wanted) =
                            index.select(&host).into_iter().next().or(index.manifests.first())
                        && (here.is_empty() || runs(wanted))
                    {
                        here.push(wanted.clone());
                    }
                    todo.extend(here.into_iter().rev().map(|entry| (entry, depth + 1)));
                }
            }
        }
        Ok(())
    }

    async fn manifest(
        &mut self,
        name: &str,
        descriptor: &Descriptor,
        manifest: &Manifest,
        sources: &Sources,
    ) -> Result<()> {
        let config = match self.blob(name, &manifest.config, None, sources).await? {
            true => tree::config(&self.upkeep.content, &self.context, manifest).await,
            false => Ok(None),
        };
        let config = match config {
            Ok(config) => config,
            Err(error) => {
                let what = error.to_string();
                self.found(finding(name, Kind::WrongDocument, manifest.config.digest.as_str(), what)).await?;
                None
            }
        };
        let mut there = Vec::new();
        for layer in &manifest.layers {
            there.push(self.blob(name, layer, Some(&descriptor.digest), sources).await?);
        }
        let Some(config) = config else { return Ok(()) };
        match config.diff_ids_for(manifest) {
            Ok(_) => self.unpacked(name, manifest, &config, &there).await,
            Err(error) => {
                let what = error.to_string();
                self.found(finding(name, Kind::WrongDocument, descriptor.digest.as_str(), what)).await
            }
        }
    }

    /// Checks a blob, and mends it if that is wanted and can be done; whether it is right now. `manifest` is that of a layer.
    async fn blob(
        &mut self,
        name: &str,
        descriptor: &Descriptor,
        manifest: Option<&Digest>,
        sources: &Sources,
    ) -> Result<bool> {
        let digest = &descriptor.digest;
        if self.good.contains(digest) {
            return Ok(true);
        }
        self.summary.blobs += 1;
        self.progress(name, digest.as_str(), "hash", descriptor.size).await?;
        let hash = !self.wanted.quick || manifest.is_none();
        let record = self.record(digest)?;
        let (kind, what) = match self.look(descriptor, hash).await {
            Ok(Blob::Good) => {
                let size = record.map(|record| record.size).unwrap_or_default();
                if u64::try_from(size).ok() != Some(descriptor.size) {
                    let what = format!("its record says {size} bytes, its descriptor {}", descriptor.size);
                    self.found(finding(name, Kind::WrongDocument, digest.as_str(), what)).await?;
                }
                self.good.insert(digest.clone());
                return Ok(true);
            }
            Ok(Blob::Missing) => {
                let dropped = manifest.map(|manifest| self.record(manifest)).transpose()?.flatten();
                if dropped.is_some_and(|manifest| is_dropped(&manifest, digest)) {
                    let what = "was dropped on request; pull the image again to have it".to_owned();
                    self.found(finding(name, Kind::Dropped, digest.as_str(), what)).await?;
                    return Ok(false);
                }
                if is_foreign(&descriptor.media_type) {
                    return Ok(false);
                }
                (Kind::MissingBlob, "is not there".to_owned())
            }
            Ok(Blob::NoFile(what)) => (Kind::MissingBlob, what.to_owned()),
            Ok(Blob::Size(size)) => {
                (Kind::WrongSize, format!("has {size} bytes instead of {}", descriptor.size))
            }
            Ok(Blob::Digest(found)) => (Kind::DamagedBlob, format!("its bytes have the digest {found}")),
            Err(error @ Error::Cancelled(_)) => return Err(error),
            Err(error) => (Kind::DamagedBlob, error.to_string()),
        };
        let mut finding = finding(name, kind, digest.as_str(), what);
        finding.remedy =
            "repair it (`ctr images verify --repair`), or delete the image and get it again".to_owned();
        if self.wanted.repair {
            self.progress(name, digest.as_str(), "fetch", descriptor.size).await?;
            let mended = self.upkeep.mend_blob(&self.context, descriptor, sources).await;
            let mended = match mended {
                Ok(()) => match self.look(descriptor, true).await? {
                    Blob::Good => Ok(()),
                    _ => Err(Error::data_loss("it is damaged again, or still; look at the disk")),
                },
                Err(error) => Err(error),
            };
            match mended {
                Ok(()) => finding.repaired = true,
                Err(error) => finding.remedy = format!("not repaired: {error}"),
            }
        }
        let repaired = finding.repaired;
        if repaired {
            finding.remedy.clear();
            self.good.insert(digest.clone());
        }
        self.found(finding).await?;
        Ok(repaired)
    }

    fn record(&self, digest: &Digest) -> Result<Option<BlobRecord>> {
        let namespace = self.context.namespace()?;
        self.upkeep.metadata.view().get(&[namespace.as_str(), digest.as_str()])
    }

    /// Looks at a blob's file, and hashes it or only measures it.
    async fn look(&mut self, descriptor: &Descriptor, hash: bool) -> Result<Blob> {
        let (content, context, tell) = (self.upkeep.content.clone(), self.context.clone(), self.tell.clone());
        let descriptor = descriptor.clone();
        let looked = blocking(move || {
            if content.info(&context, &descriptor.digest).is_err() {
                return Ok((Blob::Missing, 0));
            }
            let file = match content.open_blob(&context, &descriptor.digest) {
                Ok((file, _)) => file,
                Err(Error::NotFound(_)) => return Ok((Blob::NoFile("has a record, and no file"), 0)),
                Err(error) => return Err(error),
            };
            let metadata = file.metadata().map_err(|error| Error::unknown(format!("look at it: {error}")))?;
            if !metadata.is_file() {
                return Ok((Blob::NoFile("is no file"), 0));
            }
            if metadata.len() != descriptor.size {
                return Ok((Blob::Size(metadata.len()), 0));
            }
            if !hash {
                return Ok((Blob::Good, 0));
            }
            let mut hashing = Hashing::new(file, descriptor.digest.algorithm().hasher());
            drain(&mut hashing, &|| if tell.is_closed() { Err(gone()) } else { Ok(()) })?;
            let (size, found) = (hashing.size, hashing.hasher.finish());
            Ok((if found == descriptor.digest { Blob::Good } else { Blob::Digest(found) }, size))
        });
        let (blob, hashed) = looked.await?;
        self.summary.bytes += hashed;
        Ok(blob)
    }

    /// Checks the layers' diff ids, and the snapshots that were made of them in each snapshotter.
    async fn unpacked(
        &mut self,
        name: &str,
        manifest: &Manifest,
        config: &ImageConfig,
        there: &[bool],
    ) -> Result<()> {
        let diff_ids = &config.rootfs.diff_ids;
        let chain = chain_ids(diff_ids);
        let snapshotters: Vec<String> =
            self.upkeep.snapshots.opened().map(|(name, ..)| name.to_owned()).collect();
        let keeper = self.record(&manifest.config.digest)?.unwrap_or_default();
        let mut seen = vec![false; chain.len()];
        for snapshotter in snapshotters {
            let mut bad: BTreeMap<usize, Vec<Finding>> = BTreeMap::new();
            let kept = keeper.labels.get(&format!("containerd.io/gc.ref.snapshot.{snapshotter}"));
            let complete = kept.is_some_and(|kept| chain.last().is_some_and(|top| top.as_str() == kept));
            let mut wanted = Vec::new();
            for (number, key) in chain.iter().enumerate() {
                let object = format!("{snapshotter}/{key}");
                let namespace = self.context.namespace()?.clone();
                let view = self.upkeep.metadata.view();
                if !view.has::<SnapshotRecord>(&[namespace.as_str(), &snapshotter, key.as_str()])? {
                    if complete {
                        let what = "is not there, though the image counts as unpacked".to_owned();
                        bad.entry(number).or_default().push(finding(
                            name,
                            Kind::MissingSnapshot,
                            &object,
                            what,
                        ));
                    }
                } else if !self.compared.contains(&(snapshotter.clone(), key.clone())) {
                    wanted.push(number);
                } else {
                    seen[number] = true;
                }
            }
            for &number in &wanted {
                self.progress(
                    name,
                    &format!("{snapshotter}/{}", chain[number]),
                    "compare",
                    manifest.layers[number].size,
                )
                .await?;
            }
            let mut layers = Vec::new();
            for &number in &wanted {
                let layer = (there[number] && !self.wanted.quick).then(|| manifest.layers[number].clone());
                layers.push(self.layer(snapshotter.clone(), chain[..=number].to_vec(), layer).boxed());
            }
            let done: Vec<_> = futures::stream::iter(layers).buffered(parallel()).collect().await;
            for (number, done) in wanted.into_iter().zip(done) {
                let Layer { compared, problem, diff_id } = done?;
                self.summary.snapshots += 1;
                self.summary.files += compared.files;
                seen[number] |= diff_id.is_some();
                let object = format!("{snapshotter}/{}", chain[number]);
                let found = bad.entry(number).or_default();
                for difference in compared.differences {
                    let mut finding = finding(name, Kind::DifferentFile, &object, difference.what);
                    finding.path = difference.path;
                    found.push(finding);
                }
                match problem {
                    Some((kind, what)) => found.push(finding(name, kind, &object, what)),
                    None if found.is_empty() && diff_id.is_some() => {
                        self.compared.insert((snapshotter.clone(), chain[number].clone()));
                    }
                    None => {}
                }
                if let Some(what) = wrong_diff_id(diff_id.as_ref(), &diff_ids[number]) {
                    self.found(finding(
                        name,
                        Kind::WrongDocument,
                        manifest.layers[number].digest.as_str(),
                        what,
                    ))
                    .await?;
                }
                if bad.get(&number).is_some_and(Vec::is_empty) {
                    bad.remove(&number);
                }
            }
            self.mend(&snapshotter, manifest, config, there, bad).await?;
        }
        // Those that are not unpacked anywhere.
        let quick = self.wanted.quick;
        for number in (0..chain.len()).filter(|number| !quick && !seen[*number] && there[*number]) {
            let layer = manifest.layers[number].clone();
            let read = self.layer(String::new(), Vec::new(), Some(layer.clone())).await?;
            let what = match read.problem {
                Some((_, what)) => Some(what),
                None => wrong_diff_id(read.diff_id.as_ref(), &diff_ids[number]),
            };
            if let Some(what) = what {
                self.found(finding(name, Kind::WrongDocument, layer.digest.as_str(), what)).await?;
            }
        }
        Ok(())
    }

    /// Tells what was found of a chain of snapshots, by their place in it, after mending it if that is wanted.
    async fn mend(
        &mut self,
        snapshotter: &str,
        manifest: &Manifest,
        config: &ImageConfig,
        there: &[bool],
        bad: BTreeMap<usize, Vec<Finding>>,
    ) -> Result<()> {
        let damaged = |finding: &Finding| finding.kind() != Kind::Unknown;
        let lowest = bad.iter().find(|(_, found)| found.iter().any(damaged)).map(|(number, _)| *number);
        let mut remedy = "unpack it again (`ctr images verify --repair`)".to_owned();
        let mut repaired = false;
        if let Some(lowest) = lowest.filter(|_| self.wanted.repair) {
            let done = if there[lowest..].iter().all(|there| *there) {
                self.upkeep.mend_snapshots(&self.context, snapshotter, manifest, config, lowest).await
            } else {
                Err(Error::failed_precondition("its layers' blobs are not all there; pull the image again"))
            };
            match done {
                Ok(()) => repaired = true,
                Err(error) => remedy = format!("not repaired: {error}"),
            }
        }
        for mut finding in bad.into_values().flatten() {
            if damaged(&finding) {
                finding.repaired = repaired;
                finding.remedy = if repaired { String::new() } else { remedy.clone() };
            }
            self.found(finding).await?;
        }
        Ok(())
    }

    /// Reads a layer beside the topmost snapshot of `chain`, or by itself where that is empty; without a layer, only sees
    /// that the snapshot can be had.
    async fn layer(
        &self,
        snapshotter: String,
        chain: Vec<Digest>,
        layer: Option<Descriptor>,
    ) -> Result<Layer> {
        let mut done = Layer { compared: Compared::default(), problem: None, diff_id: None };
        let mut views = Vec::new();
        let mut mounts = Vec::new();
        // The parent's, too, since what is beneath may have to be told from what the layer has.
        for key in chain.iter().rev().take(2) {
            let view = format!("verify-{} {key}", unique());
            let new = New {
                key: view.clone(),
                parent: key.to_string(),
                labels: BTreeMap::new(),
                kind: SnapshotKind::View,
            };
            match self.upkeep.snapshots.create(&self.context, &snapshotter, new).await {
                Ok(of) => {
                    views.push(view);
                    mounts.push(of);
                }
                Err(error) => {
                    let lost = matches!(error, Error::DataLoss(_) | Error::NotFound(_));
                    done.problem =
                        Some((if lost { Kind::MissingSnapshot } else { Kind::Unknown }, error.to_string()));
                    break;
                }
            }
        }
        let tree = match (&done.problem, &mounts[..]) {
            (Some(_), _) | (None, []) => Ok(None),
            (None, mounts) => tree_of(mounts),
        };
        match (tree, layer) {
            (Err(error), _) => done.problem = Some((Kind::Unknown, error.to_string())),
            (Ok(tree), Some(layer)) => {
                let (content, context, tell) =
                    (self.upkeep.content.clone(), self.context.clone(), self.tell.clone());
                let read = blocking(move || {
                    let go_on = || if tell.is_closed() { Err(gone()) } else { Ok(()) };
                    let (file, _) = content.open_blob(&context, &layer.digest)?;
                    read_layer(file, &layer.media_type, tree, &go_on)
                });
                match read.await {
                    Ok((compared, diff_id)) => (done.compared, done.diff_id) = (compared, Some(diff_id)),
                    Err(error @ Error::Cancelled(_)) => {
                        done.problem = Some((Kind::Unknown, error.to_string()));
                    }
                    Err(error) => {
                        done.problem = done.problem.or_else(|| Some((Kind::Unknown, error.to_string())));
                    }
                }
            }
            (Ok(_), None) => {}
        }
        for view in views {
            if let Err(error) = self.upkeep.snapshots.remove(&self.context, &snapshotter, view).await {
                tracing::warn!(%error, "a view that layers were compared in goes with its lease");
            }
        }
        if self.tell.is_closed() { Err(gone()) } else { Ok(done) }
    }
}

/// Reads an archive to its end, beside a tree if there is one; its diff id. Blocks.
pub(crate) fn read_layer(
    file: File,
    media_type: &str,
    tree: Option<Tree>,
    go_on: &dyn Fn() -> Result<()>,
) -> Result<(Compared, Digest)> {
    let stream = decompress(BufReader::with_capacity(BUFFER, file), media_type)?;
    let hashing = Hashing::new(stream, oci::Algorithm::Sha256.hasher());
    let mut archive = Archive::new(BufReader::with_capacity(BUFFER, hashing));
    let compared = match tree {
        Some(tree) => compare(&mut archive, tree, go_on)?,
        None => Compared::default(),
    };
    let mut rest = archive.into_input();
    drain(&mut rest, go_on)?;
    Ok((compared, rest.into_inner().hasher.finish()))
}

/// Reads to the end.
pub(crate) fn drain(stream: &mut dyn Read, go_on: &dyn Fn() -> Result<()>) -> Result<()> {
    let mut buffer = vec![0; BUFFER];
    loop {
        go_on()?;
        match stream.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(Error::data_loss(format!("it cannot be read: {error}"))),
        }
    }
}

/// Counts and hashes what is read through it.
pub(crate) struct Hashing<R> {
    stream: R,
    pub(crate) hasher: oci::digest::Hasher,
    pub(crate) size: u64,
}

impl<R> Hashing<R> {
    pub(crate) fn new(stream: R, hasher: oci::digest::Hasher) -> Self {
        Hashing { stream, hasher, size: 0 }
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

/// The files of the first of these views, which is the second's child.
fn tree_of(views: &[Vec<Mount>]) -> Result<Option<Tree>> {
    let open = |path: PathBuf| {
        Root::open(&path).map_err(|error| Error::io("open the snapshot's folder", &path, &error))
    };
    let Some((view, parent)) = views.split_first() else { return Ok(None) };
    if let [mount] = &view[..]
        && mount.kind == "overlay"
    {
        let lower = mount.options.iter().find_map(|option| option.strip_prefix("lowerdir="));
        let top = lower.map(split_lower).unwrap_or_default().into_iter().next();
        return top.map(|top| open(top).map(Tree::Own)).transpose();
    }
    let plain = |mounts: &[Mount]| match mounts {
        [mount] if mount.target.is_empty() && mount.options.iter().any(|option| option.contains("bind")) => {
            open(PathBuf::from(&mount.source))
        }
        _ => Err(Error::unimplemented("snapshots that are neither folders nor overlays cannot be compared")),
    };
    let parent = parent.first().map(|mounts| plain(mounts)).transpose()?;
    Ok(Some(Tree::Merged(plain(view)?, parent)))
}

fn wrong_diff_id(found: Option<&Digest>, wanted: &Digest) -> Option<String> {
    let found = found.filter(|found| *found != wanted)?;
    Some(format!("uncompressed it has the digest {found}, but the image's config says {wanted}"))
}

fn is_foreign(kind: &str) -> bool {
    media_type::is_layer(kind) && (kind.contains("foreign") || kind.contains("nondistributable"))
}

fn finding(name: &str, kind: Kind, object: &str, what: String) -> Finding {
    Finding {
        name: name.to_owned(),
        kind: kind.into(),
        object: object.to_owned(),
        what,
        ..Finding::default()
    }
}

fn unknown(name: &str, object: &str, error: &Error) -> Finding {
    finding(name, Kind::Unknown, object, error.to_string())
}

/// How much is done at a time.
pub(super) fn parallel() -> usize {
    std::thread::available_parallelism().map_or(1, usize::from)
}
