//! The image of the image cases: five layers of this system's own files, once made and then kept.
//!
//! ```text
//! CACHE/image-MB/made         its description, written last: an image without it is made anew
//! CACHE/image-MB/registry/    a registry's storage, with bench/five:gzip and bench/five:zstd
//! CACHE/image-MB/docker.tar   the same layers as `docker save` writes them, uncompressed
//! CACHE/image-MB/layer.tar    an OCI layout of the largest layer alone, gzip
//! CACHE/image-MB/layer        that layer as it is inside, uncompressed; beside layer.gz
//! ```
//!
//! The same system gives the same bytes: files in the order of their names, owner and group 0, their own times and modes.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use flate2::Compression;
use flate2::write::GzEncoder;
use oci::Digest;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};
use tar::{Builder, EntryType, Header};

/// What the layers are made of, and what part of the whole each has: one big layer and smaller ones above it, as images of
/// applications have, with few large files and with many small ones.
const LAYERS: [(&str, u64); 5] =
    [("/usr/lib", 36), ("/usr/bin", 24), ("/usr/share", 20), ("/usr/lib", 12), ("/usr/share", 8)];
/// Bigger files are left out, so that none is a layer of its own.
const BIGGEST: u64 = 48 << 20;
/// Changes with what this module writes, so that an older cache is not taken.
const FORM: &str = "1";

/// The image, on disk.
pub(crate) struct Image {
    folder: PathBuf,
    pub(crate) about: About,
}

/// What is said of it in the report.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct About {
    form: String,
    pub(crate) layers: Vec<LayerAbout>,
    /// The digest of the manifest with gzip.
    pub(crate) digest: String,
}

/// A layer: what it holds, and its sizes.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct LayerAbout {
    pub(crate) source: String,
    pub(crate) entries: usize,
    pub(crate) size: u64,
    pub(crate) gzip: u64,
    pub(crate) zstd: u64,
}

/// A compression of layers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Packing {
    Gzip,
    Zstd,
}

impl Packing {
    /// The image's tag in the registry.
    pub(crate) fn tag(self) -> &'static str {
        match self {
            Packing::Gzip => "gzip",
            Packing::Zstd => "zstd",
        }
    }
}

impl Image {
    /// The image of about so many MB, made if it is not there.
    pub(crate) fn get(cache: &Path, megabytes: u64) -> Result<Self> {
        let folder = cache.join(format!("image-{megabytes}"));
        let made = folder.join("made");
        let about = fs::read(&made).ok().and_then(|text| serde_json::from_slice::<About>(&text).ok());
        if let Some(about) = about.filter(|about| about.form == FORM) {
            return Ok(Image { folder, about });
        }
        println!("making an image of {megabytes} MB from the files of /usr");
        let _ = fs::remove_dir_all(&folder);
        let about =
            make(&folder, megabytes << 20).with_context(|| format!("cannot make {}", folder.display()))?;
        fs::write(made, serde_json::to_vec_pretty(&about)?)?;
        Ok(Image { folder, about })
    }

    /// The storage of a registry that has it.
    pub(crate) fn registry(&self) -> PathBuf {
        self.folder.join("registry")
    }

    /// The archive as `docker save` writes it.
    pub(crate) fn docker_archive(&self) -> PathBuf {
        self.folder.join("docker.tar")
    }

    /// The archive with one gzip layer.
    pub(crate) fn one_layer(&self) -> PathBuf {
        self.folder.join("layer.tar")
    }

    /// That layer: compressed, and not.
    pub(crate) fn layer(&self) -> (PathBuf, PathBuf) {
        (self.folder.join("layer.gz"), self.folder.join("layer"))
    }

    /// Reads everything beneath a path once, so that every engine finds it in the page cache.
    pub(crate) fn warm(path: &Path) -> Result<()> {
        if path.is_dir() {
            return fs::read_dir(path)?.try_for_each(|entry| Image::warm(&entry?.path()));
        }
        io::copy(&mut File::open(path)?, &mut io::sink())?;
        Ok(())
    }
}

/// The name of the imported image.
pub(crate) const NAME: &str = "docker.io/bench/five:latest";
/// The name of the imported image of one layer.
pub(crate) const ONE: &str = "docker.io/bench/one:latest";

fn make(folder: &Path, size: u64) -> Result<About> {
    fs::create_dir_all(folder)?;
    let mut taken = BTreeSet::new();
    let mut layers = Vec::new();
    for (source, part) in LAYERS {
        layers.push((source, layer(Path::new(source), size * part / 100, &mut taken)?));
    }
    let mut store = Store::new(&folder.join("registry"))?;
    let (mut about, mut diff_ids) = (Vec::new(), Vec::new());
    let (mut gzip, mut zstd) = (Vec::new(), Vec::new());
    for (number, (source, layer)) in layers.iter().enumerate() {
        let mut encoder = GzEncoder::new(Vec::new(), Compression::default());
        encoder.write_all(&layer.bytes)?;
        let packed = encoder.finish()?;
        if number == 0 {
            fs::write(folder.join("layer.gz"), &packed)?;
            fs::write(folder.join("layer"), &layer.bytes)?;
        }
        let gzip_size = packed.len() as u64;
        gzip.push(store.blob("application/vnd.oci.image.layer.v1.tar+gzip", &packed)?);
        let packed = zstd::encode_all(&layer.bytes[..], 3)?;
        let zstd_size = packed.len() as u64;
        zstd.push(store.blob("application/vnd.oci.image.layer.v1.tar+zstd", &packed)?);
        diff_ids.push(Digest::sha256_of(&layer.bytes).to_string());
        about.push(LayerAbout {
            source: (*source).to_owned(),
            entries: layer.entries,
            size: layer.bytes.len() as u64,
            gzip: gzip_size,
            zstd: zstd_size,
        });
    }
    let config = config(&diff_ids);
    let digest = store.image("gzip", &config, &gzip)?;
    store.image("zstd", &config, &zstd)?;
    let bytes: Vec<&[u8]> = layers.iter().map(|(_, layer)| &layer.bytes[..]).collect();
    docker_archive(&folder.join("docker.tar"), &config, &bytes)?;
    let first = harness::image::image(ONE, &["true"], &[layers.swap_remove(0).1.bytes]);
    first.write(&folder.join("layer.tar"))?;
    Ok(About { form: FORM.into(), layers: about, digest })
}

fn config(diff_ids: &[String]) -> Vec<u8> {
    let architecture = match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    };
    let config = json!({
        "architecture": architecture,
        "os": "linux",
        "config": {"Cmd": ["true"]},
        "rootfs": {"type": "layers", "diff_ids": diff_ids},
        "history": [],
    });
    config.to_string().into_bytes()
}

/// A layer that is being made.
struct Layer {
    bytes: Vec<u8>,
    entries: usize,
}

/// A layer of files beneath `source` that no layer has yet, of about this size, with the folders above each.
fn layer(source: &Path, size: u64, taken: &mut BTreeSet<PathBuf>) -> Result<Layer> {
    let mut builder = Builder::new(Vec::new());
    let (mut entries, mut folders) = (0, BTreeSet::new());
    let mut waiting = vec![source.to_owned()];
    while let Some(path) = waiting.pop() {
        if builder.get_ref().len() as u64 >= size {
            break;
        }
        let Ok(metadata) = path.symlink_metadata() else { continue };
        if metadata.is_dir() {
            let Ok(children) = fs::read_dir(&path) else { continue };
            let mut children: Vec<PathBuf> = children.flatten().map(|entry| entry.path()).collect();
            // The last one is taken first.
            children.sort_by(|one, other| other.cmp(one));
            waiting.extend(children);
            continue;
        }
        let file = metadata.is_file() && metadata.len() <= BIGGEST.min(size / 2);
        if !(file || metadata.is_symlink()) || taken.contains(&path) {
            continue;
        }
        let above: Vec<&Path> = path.ancestors().skip(1).filter(|folder| *folder != Path::new("/")).collect();
        for folder in above.into_iter().rev() {
            if folders.insert(folder.to_owned()) {
                let metadata = folder.metadata()?;
                append(&mut builder, folder, &metadata, EntryType::Directory, &[])?;
                entries += 1;
            }
        }
        if metadata.is_symlink() {
            let mut header = header(&metadata, EntryType::Symlink, 0);
            builder.append_link(&mut header, path.strip_prefix("/")?, fs::read_link(&path)?)?;
        } else {
            let Ok(bytes) = fs::read(&path) else { continue };
            append(&mut builder, &path, &metadata, EntryType::Regular, &bytes)?;
        }
        entries += 1;
        taken.insert(path);
    }
    Ok(Layer { bytes: builder.into_inner()?, entries })
}

fn header(metadata: &fs::Metadata, kind: EntryType, size: usize) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(metadata.permissions().mode() & 0o7777);
    header.set_mtime(metadata.mtime().max(0) as u64);
    header.set_uid(0);
    header.set_gid(0);
    header.set_size(size as u64);
    header
}

fn append(
    builder: &mut Builder<Vec<u8>>,
    path: &Path,
    metadata: &fs::Metadata,
    kind: EntryType,
    bytes: &[u8],
) -> Result<()> {
    let mut header = header(metadata, kind, bytes.len());
    builder.append_data(&mut header, path.strip_prefix("/")?, bytes)?;
    Ok(())
}

fn docker_archive(path: &Path, config: &[u8], layers: &[&[u8]]) -> Result<()> {
    let mut builder = Builder::new(io::BufWriter::new(File::create(path)?));
    let mut file = |name: &str, bytes: &[u8]| {
        let mut header = Header::new_ustar();
        header.set_size(bytes.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, name, bytes)
    };
    let config_name = format!("{}.json", Digest::sha256_of(config).hex());
    file(&config_name, config)?;
    let mut names = Vec::new();
    for layer in layers {
        let name = format!("{}/layer.tar", Digest::sha256_of(layer).hex());
        file(&name, layer)?;
        names.push(name);
    }
    let manifest = json!([{"Config": config_name, "RepoTags": [NAME], "Layers": names}]);
    file("manifest.json", manifest.to_string().as_bytes())?;
    builder.into_inner()?.flush()?;
    Ok(())
}

/// The storage of a registry (docker-registry's file system driver), written as the registry would.
struct Store {
    top: PathBuf,
    repository: PathBuf,
}

impl Store {
    fn new(folder: &Path) -> Result<Self> {
        let top = folder.join("docker/registry/v2");
        let repository = top.join("repositories/bench/five");
        fs::create_dir_all(&repository)?;
        Ok(Store { top, repository })
    }

    fn link(&self, folder: &str, digest: &Digest) -> Result<()> {
        let folder = self.repository.join(folder);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("link"), digest.to_string())?;
        Ok(())
    }

    fn data(&self, bytes: &[u8]) -> Result<Digest> {
        let digest = Digest::sha256_of(bytes);
        let hex = digest.hex();
        let folder = self.top.join("blobs/sha256").join(&hex[..2]).join(hex);
        fs::create_dir_all(&folder)?;
        fs::write(folder.join("data"), bytes)?;
        Ok(digest)
    }

    /// Stores a blob; its descriptor.
    fn blob(&mut self, media_type: &str, bytes: &[u8]) -> Result<Value> {
        let digest = self.data(bytes)?;
        self.link(&format!("_layers/sha256/{}", digest.hex()), &digest)?;
        Ok(json!({"mediaType": media_type, "digest": digest.to_string(), "size": bytes.len()}))
    }

    /// Stores an image of these layers under a tag; its digest.
    fn image(&mut self, tag: &str, config: &[u8], layers: &[Value]) -> Result<String> {
        let config = self.blob("application/vnd.oci.image.config.v1+json", config)?;
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config,
            "layers": layers,
        });
        let digest = self.data(manifest.to_string().as_bytes())?;
        let hex = digest.hex();
        self.link(&format!("_manifests/revisions/sha256/{hex}"), &digest)?;
        self.link(&format!("_manifests/tags/{tag}/current"), &digest)?;
        self.link(&format!("_manifests/tags/{tag}/index/sha256/{hex}"), &digest)?;
        Ok(digest.to_string())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_files_make_the_same_image_and_a_second_call_takes_it_as_it_is() {
        let (one, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let first = Image::get(one.path(), 2).unwrap();
        let second = Image::get(other.path(), 2).unwrap();
        assert_eq!(first.about.digest, second.about.digest);
        assert_eq!(first.about.layers.len(), 5);
        assert!(first.about.layers.iter().all(|layer| layer.entries > 0 && layer.gzip < layer.size));
        let made = fs::metadata(first.docker_archive()).unwrap().modified().unwrap();
        let again = Image::get(one.path(), 2).unwrap();
        assert_eq!(fs::metadata(again.docker_archive()).unwrap().modified().unwrap(), made);
    }
}
