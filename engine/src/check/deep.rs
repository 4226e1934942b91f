//! Reading everything: the digest of every blob, and every file of a layer beside the archive it was unpacked from.
//!
//! The comparison is that of `ctr images verify`. Changes nothing; on as many threads as there are cores.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::BufReader;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError};

use oci::Digest;
use oci::image::{CONFIG_LIMIT, Descriptor, ImageConfig, Manifest, chain_ids, media_type};
use proto::containerd::services::images::v1::Image;
use snapshotter::{Kind, Stored, StoredSnapshot, Usage};
use sys::beneath::Root;

use super::look::blob_path;
use super::world::{Deep, Document, World};
use crate::content;
use crate::error::{Error, Result};
use crate::metadata::Read as _;
use crate::metadata::content::BlobRecord;
use crate::metadata::snapshots::SnapshotRecord;
use crate::upkeep::{BUFFER, Hashing, Tree, drain, read_layer};

/// A layer, and a snapshot that was made of it.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Layer {
    digest: Digest,
    media_type: String,
    diff_id: Digest,
    /// Namespace and image, to tell of it.
    image: (String, String),
    unpacked: Option<Unpacked>,
}

#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Unpacked {
    snapshotter: String,
    name: String,
    content: PathBuf,
    /// What is beneath it, where a snapshot holds all.
    parent: Option<PathBuf>,
}

/// Reads everything.
pub(super) fn read(world: &World) -> Deep {
    let root = world.root.join(content::FOLDER);
    let mut deep = Deep::default();
    let blobs: Vec<Digest> = if world.content.elsewhere {
        Vec::new()
    } else {
        let files = world.content.blobs.iter().filter(|(_, size)| size.is_some());
        files.filter_map(|(digest, _)| digest.parse().ok()).collect()
    };
    for (digest, hashed) in on_all_cores(blobs, |digest| hash(&root, digest)) {
        match hashed {
            Ok((found, size)) => {
                deep.bytes += size;
                if found != digest {
                    deep.damaged.insert(digest.to_string(), found.to_string());
                }
            }
            Err(error) => {
                drop(deep.damaged.insert(digest.to_string(), format!("that cannot be had: {error}")));
            }
        }
    }
    let layers: BTreeSet<Layer> = layers(world, &root)
        .into_iter()
        .filter(|layer| !deep.damaged.contains_key(layer.digest.as_str()))
        .collect();
    for (layer, compared) in on_all_cores(layers.into_iter().collect(), |layer| compare(&root, layer)) {
        let (namespace, image) = &layer.image;
        match compared {
            Err(error) => {
                let what = format!("the files of layer {} of {namespace}/{image}: {error}", layer.digest);
                deep.not_compared.push(what);
            }
            Ok((differences, files, found)) => {
                deep.layers += 1;
                deep.files += files;
                if found != layer.diff_id {
                    let what = format!("layer {}: uncompressed it has the digest {found}", layer.digest);
                    deep.wrong_layers.push((format!("{namespace}/{image}"), what));
                } else if let Some(unpacked) = layer.unpacked {
                    let of =
                        |what| (namespace.clone(), unpacked.snapshotter.clone(), unpacked.name.clone(), what);
                    deep.differing.extend(differences.into_iter().map(of));
                }
            }
        }
    }
    let active = world.snapshotters.values().flatten().flat_map(|stored| &stored.snapshots);
    for one in active.filter(|one| one.info.kind == Kind::Active && one.there) {
        // One that cannot be measured is told of by whoever uses it.
        let Usage { size, inodes } = sys::fs::usage(&one.content).unwrap_or_default();
        deep.active.size += size;
        deep.active.inodes += inodes;
    }
    deep
}

/// Does the same to many.
fn on_all_cores<T: Send, R: Send>(work: Vec<T>, task: impl Fn(&T) -> R + Sync) -> Vec<(T, R)> {
    let cores = std::thread::available_parallelism().map_or(1, usize::from);
    let (queue, done) = (Mutex::new(work.into_iter()), Mutex::new(Vec::new()));
    std::thread::scope(|scope| {
        for _ in 0..cores {
            scope.spawn(|| {
                loop {
                    let Some(one) = queue.lock().unwrap_or_else(PoisonError::into_inner).next() else {
                        return;
                    };
                    let result = task(&one);
                    done.lock().unwrap_or_else(PoisonError::into_inner).push((one, result));
                }
            });
        }
    });
    done.into_inner().unwrap_or_else(PoisonError::into_inner)
}

fn hash(root: &Path, digest: &Digest) -> Result<(Digest, u64)> {
    let path = blob_path(root, digest);
    let file = File::open(&path).map_err(|error| Error::io("open", &path, &error))?;
    let mut hashing = Hashing::new(file, digest.algorithm().hasher());
    drain(&mut hashing, &|| Ok(()))?;
    Ok((hashing.hasher.finish(), hashing.size))
}

/// What differs, how many files there are, and the digest of the uncompressed archive.
fn compare(root: &Path, layer: &Layer) -> Result<(Vec<String>, u64, Digest)> {
    let open = |path: &Path| Root::open(path).map_err(|error| Error::io("open", path, &error));
    let tree = match &layer.unpacked {
        None => None,
        Some(of) if of.snapshotter == "overlayfs" => Some(Tree::Own(open(&of.content)?)),
        Some(of) => Some(Tree::Merged(open(&of.content)?, of.parent.as_deref().map(open).transpose()?)),
    };
    let path = blob_path(root, &layer.digest);
    let file = File::open(&path).map_err(|error| Error::io("open", &path, &error))?;
    let (compared, found) = read_layer(file, &layer.media_type, tree, &|| Ok(()))?;
    let shown = compared.differences.into_iter().map(|of| format!("{} {}", of.path, of.what)).collect();
    Ok((shown, compared.files, found))
}

/// The layers of all images whose documents can be read, and where they are unpacked.
fn layers(world: &World, root: &Path) -> Vec<Layer> {
    let mut found = Vec::new();
    for (parts, image) in world.view.list::<Image>(&[]) {
        let Ok([namespace, name]) = <[String; 2]>::try_from(parts) else { continue };
        let target = image.target.and_then(|target| target.digest.parse::<Digest>().ok());
        let mut todo: Vec<Digest> = target.into_iter().collect();
        let mut seen = BTreeSet::new();
        while let Some(digest) = todo.pop() {
            if !seen.insert(digest.clone()) {
                continue;
            }
            match world.content.documents.get(&digest) {
                Some(Ok(Document::Index(index))) => {
                    todo.extend(index.manifests.iter().map(|of| of.digest.clone()));
                }
                Some(Ok(Document::Manifest(manifest))) => {
                    layers_of(world, root, (&namespace, &name), manifest, &mut found);
                }
                _ => {}
            }
        }
    }
    found
}

fn layers_of(world: &World, root: &Path, image: (&str, &str), manifest: &Manifest, found: &mut Vec<Layer>) {
    let (namespace, name) = image;
    let has = |digest: &Digest| {
        world.view.has::<BlobRecord>(&[namespace, digest.as_str()]).unwrap_or(false)
            && world.content.blobs.get(digest.as_str()).is_some_and(Option::is_some)
    };
    let Some(config) = read_config(root, &manifest.config).filter(|_| has(&manifest.config.digest)) else {
        return;
    };
    let Ok(diff_ids) = config.diff_ids_for(manifest) else { return };
    let chain = chain_ids(diff_ids);
    for (number, layer) in manifest.layers.iter().enumerate() {
        let (true, Some(diff_id), Some(key)) = (has(&layer.digest), diff_ids.get(number), chain.get(number))
        else {
            continue;
        };
        let mut unpacked: Vec<Option<Unpacked>> = Vec::new();
        for (snapshotter, stored) in &world.snapshotters {
            let Ok(stored) = stored else { continue };
            // An image in a file is no folder.
            if snapshotter == "erofs" {
                continue;
            }
            let record =
                world.view.get::<SnapshotRecord>(&[namespace, snapshotter, key.as_str()]).ok().flatten();
            let one = record.and_then(|record| find(stored, &record.inner)).filter(|one| one.there);
            unpacked.extend(one.map(|one| {
                let parent = find(stored, &one.info.parent).map(|parent| parent.content.clone());
                let (snapshotter, content) = (snapshotter.clone(), one.content.clone());
                Some(Unpacked { snapshotter, name: key.to_string(), content, parent })
            }));
        }
        if unpacked.is_empty() {
            unpacked.push(None);
        }
        found.extend(unpacked.into_iter().map(|unpacked| Layer {
            digest: layer.digest.clone(),
            media_type: layer.media_type.clone(),
            diff_id: diff_id.clone(),
            image: (namespace.to_owned(), name.to_owned()),
            unpacked,
        }));
    }
}

fn find<'a>(stored: &'a Stored, inner: &str) -> Option<&'a StoredSnapshot> {
    stored.snapshots.iter().find(|one| one.info.key == inner)
}

fn read_config(root: &Path, config: &Descriptor) -> Option<ImageConfig> {
    use std::io::Read as _;
    if !media_type::is_config(&config.media_type) {
        return None;
    }
    let file = File::open(blob_path(root, &config.digest)).ok()?;
    let mut bytes = Vec::new();
    BufReader::with_capacity(BUFFER, file).take(CONFIG_LIMIT).read_to_end(&mut bytes).ok()?;
    ImageConfig::parse(&bytes).ok()
}
