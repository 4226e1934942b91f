//! Another image of the same files: other compression, other media types, fewer platforms.
//!
//! ```text
//!  index     its manifests, those of the wanted platforms         changed as JSON: fields that nobody here knows stay
//!  manifest  its config as it is, its layers, side by side
//!  layer     blob --hash--> uncompress --hash = diff id--> compress --> ingest --> blob
//! ```
//!
//! Invariants: a layer that is stored anew was read with its digest and uncompressed to its diff id. The same layer, compression
//! and level give the same bytes; where such a blob is here already, it is taken. The image gets its name last, so that a
//! conversion that fails leaves nothing but what the next collection takes.

use std::fs::File;
use std::io::{self, BufReader, Read as _, Seek as _, Write};

use futures::{FutureExt as _, StreamExt as _, TryStreamExt as _};
use oci::image::{Descriptor, Index, MANIFEST_LIMIT, Manifest, media_type};
use oci::platform::Matcher;
use oci::{Digest, Platform};
use proto::containerd::services::images::v1::Image;
use proto::gantry::images::v1::convert_response::Entry;
use proto::gantry::images::v1::{Compression, ConvertResponse, Progress};
use serde_json::Value;
use tokio::sync::mpsc;

use super::repair::unique;
use super::tree::{DEPTH, Document};
use super::verify::{BUFFER, Hashing, drain, parallel};
use super::{PENDING, Upkeep, gone, tree};
use crate::content::Writer;
use crate::context::RequestContext;
use crate::diff::decompress;
use crate::error::{Error, Result, blocking};
use crate::labels::Labels;

/// What a blob that was made here was made of: `DIFF-ID COMPRESSION LEVEL`.
const MADE_OF: &str = "gantry.io/converted";
/// The label with the digest of the uncompressed layer.
const UNCOMPRESSED: &str = "containerd.io/uncompressed";
/// Bytes between two messages about one layer.
const STEP: u64 = 8 << 20;

/// A conversion.
#[derive(Debug, Clone)]
pub struct Conversion {
    /// The image.
    pub source: String,
    /// The name of the result.
    pub target: String,
    /// Platforms to keep; empty for the host's.
    pub platforms: Vec<Platform>,
    /// Keeps all.
    pub all_platforms: bool,
    /// The OCI's media types instead of Docker's.
    pub oci: bool,
    /// Of the layers.
    pub compression: Compression,
    /// 0 for the usual one.
    pub level: u32,
}

struct Work {
    upkeep: Upkeep,
    context: RequestContext,
    conversion: Conversion,
    tell: mpsc::Sender<Result<ConvertResponse>>,
}

impl Conversion {
    /// InvalidArgument for what makes no sense.
    fn check(&self) -> Result<()> {
        if self.source.is_empty() || self.target.is_empty() {
            return Err(Error::invalid_argument(
                "a conversion needs the names of its source and of its target",
            ));
        }
        let most = match self.compression {
            Compression::Gzip => 9,
            Compression::Zstd => 22,
            Compression::Keep | Compression::None => 0,
        };
        if self.level > most {
            let why = if most == 0 {
                "without compressing there is none".to_owned()
            } else {
                format!("1 to {most} can be had")
            };
            return Err(Error::invalid_argument(format!("level {}: {why}", self.level)));
        }
        Ok(())
    }

    fn level(&self) -> u32 {
        match (self.level, self.compression) {
            (0, Compression::Gzip) => 6,
            (0, Compression::Zstd) => 3,
            (level, _) => level,
        }
    }

    /// What is wanted, and for messages the first of it.
    fn matcher(&self) -> (Matcher, Platform) {
        let first = self.platforms.first().cloned().unwrap_or_else(Platform::host);
        let matcher = match (self.all_platforms, &self.platforms[..]) {
            (true, _) => Matcher::all(),
            (false, []) => Matcher::strict(&first),
            (false, several) => Matcher::any_of(several),
        };
        (matcher, first)
    }

    /// The media type that one becomes, for descriptors and documents alike.
    fn media_type(&self, from: &str) -> String {
        if !self.oci {
            return from.to_owned();
        }
        let foreign = "application/vnd.docker.image.rootfs.foreign.diff.tar";
        if let Some(rest) = from.strip_prefix(foreign) {
            let rest = if rest == ".gzip" { "+gzip" } else { rest };
            return format!("application/vnd.oci.image.layer.nondistributable.v1.tar{rest}");
        }
        let to = match from {
            media_type::DOCKER_LIST => media_type::OCI_INDEX,
            media_type::DOCKER_MANIFEST => media_type::OCI_MANIFEST,
            media_type::DOCKER_CONFIG => media_type::OCI_CONFIG,
            media_type::DOCKER_LAYER => media_type::OCI_LAYER,
            media_type::DOCKER_LAYER_GZIP => media_type::OCI_LAYER_GZIP,
            media_type::DOCKER_LAYER_ZSTD => media_type::OCI_LAYER_ZSTD,
            other => other,
        };
        to.to_owned()
    }
}

/// The media type of a layer with this compression; None for what is no layer, or none that is known.
fn compressed_type(from: &str, compression: Compression) -> Option<String> {
    if !media_type::is_layer(from) {
        return None;
    }
    let suffixes = ["+gzip", "+zstd", ".gzip", ".zstd"];
    let plain = suffixes.iter().find_map(|suffix| from.strip_suffix(suffix)).unwrap_or(from);
    // Whatever else is there (encryption, estargz) is not ours to take off.
    if !plain.ends_with(".tar") {
        return None;
    }
    let mark = if plain.starts_with("application/vnd.docker.") { '.' } else { '+' };
    Some(match compression {
        Compression::Keep => from.to_owned(),
        Compression::None => plain.to_owned(),
        Compression::Gzip => format!("{plain}{mark}gzip"),
        Compression::Zstd => format!("{plain}{mark}zstd"),
    })
}

impl Upkeep {
    /// Converts an image, and tells of it as it goes on.
    pub fn convert(
        &self,
        context: &RequestContext,
        conversion: Conversion,
    ) -> Result<mpsc::Receiver<Result<ConvertResponse>>> {
        conversion.check()?;
        let image = self.images.get(context, &conversion.source)?;
        let (tell, answers) = mpsc::channel(PENDING);
        let (this, context) = (self.clone(), context.clone());
        tokio::spawn(async move {
            let told = tell.clone();
            let done = this.leased(&context, move |upkeep, context| async move {
                let source = conversion.source.clone();
                let work = Work { upkeep, context, conversion, tell: told };
                work.image(image).await.map_err(|error| error.context(format!("convert image {source:?}")))
            });
            if let Err(error) = done.await {
                let _ = tell.send(Err(error)).await;
            }
        });
        Ok(answers)
    }
}

impl Work {
    async fn tell(&self, entry: Entry) -> Result<()> {
        self.tell.send(Ok(ConvertResponse { entry: Some(entry) })).await.map_err(|_| gone())
    }

    async fn image(&self, image: Image) -> Result<()> {
        let converted = self.document(tree::target(&image)?, 0).await?;
        if self.tell.is_closed() {
            return Err(gone());
        }
        let target = tree::wire(&converted);
        let name = self.conversion.target.clone();
        let image = Image { name, labels: image.labels, target: Some(target.clone()), ..Image::default() };
        loop {
            match self.upkeep.images.create(&self.context, image.clone(), None).await {
                Err(Error::AlreadyExists(_)) => {}
                created => break created.map(drop)?,
            }
            match self.upkeep.images.update(&self.context, image.clone(), Vec::new(), None).await {
                // Deleted in between.
                Err(Error::NotFound(_)) => {}
                updated => break updated.map(drop)?,
            }
        }
        self.tell(Entry::Target(target)).await
    }

    /// Converts an index or a manifest, and what is beneath it.
    async fn document(&self, descriptor: Descriptor, depth: usize) -> Result<Descriptor> {
        if depth > DEPTH {
            return Err(Error::invalid_argument(format!("indexes are nested deeper than {DEPTH}")));
        }
        let wrong = |what: String| Error::invalid_argument(format!("{}: {what}", descriptor.digest));
        let bytes =
            tree::read(&self.upkeep.content, &self.context, &descriptor.digest, MANIFEST_LIMIT).await?;
        let old: Value = serde_json::from_slice(&bytes).map_err(|error| wrong(error.to_string()))?;
        let mut value = old.clone();
        let children = match Document::parse(&bytes).map_err(wrong)? {
            Document::Index(index) => self.index(&index, &mut value, depth).await?,
            Document::Manifest(manifest) => self.manifest(&manifest, &mut value).await?,
        };
        if let Some(Value::String(own)) = value.get_mut("mediaType") {
            *own = self.conversion.media_type(own);
        }
        let mut converted =
            Descriptor { media_type: self.conversion.media_type(&descriptor.media_type), ..descriptor };
        if old == value {
            self.hold(&converted.digest).await?;
            return Ok(converted);
        }
        let new = serde_json::to_vec(&value)
            .map_err(|error| Error::internal(format!("write a document: {error}")))?;
        (converted.digest, converted.size) = (Digest::sha256_of(&new), new.len() as u64);
        self.put(&converted, new, children).await?;
        Ok(converted)
    }

    /// Converts the manifests of the wanted platforms; the labels that keep them.
    async fn index(&self, index: &Index, value: &mut Value, depth: usize) -> Result<Labels> {
        let (matcher, first) = self.conversion.matcher();
        let entries = value["manifests"].as_array().cloned().unwrap_or_default();
        let (mut kept, mut labels) = (Vec::new(), Labels::new());
        for (entry, mut shown) in index.manifests.iter().zip(entries) {
            if entry.platform.as_ref().is_some_and(|platform| !matcher.matches(platform)) {
                continue;
            }
            let converted = Box::pin(self.document(entry.clone(), depth + 1)).await?;
            labels.insert(
                format!("containerd.io/gc.ref.content.m.{}", kept.len()),
                converted.digest.to_string(),
            );
            describe(&mut shown, &converted);
            kept.push(shown);
        }
        if kept.is_empty() {
            return Err(Error::not_found(index.no_platform(&first).to_string()));
        }
        value["manifests"] = Value::Array(kept);
        Ok(labels)
    }

    /// Converts the layers; the labels that keep them, and the config.
    async fn manifest(&self, manifest: &Manifest, value: &mut Value) -> Result<Labels> {
        let mut labels = Labels::new();
        let mut config = manifest.config.clone();
        let document = tree::config(&self.upkeep.content, &self.context, manifest).await?;
        if !self.hold(&config.digest).await? {
            return Err(Error::not_found(format!("config {} is not there", config.digest)));
        }
        labels.insert("containerd.io/gc.ref.content.config".to_owned(), config.digest.to_string());
        config.media_type = self.conversion.media_type(&config.media_type);
        describe(&mut value["config"], &config);
        let wrong = |error: oci::image::ImageError| Error::invalid_argument(error.to_string());
        let diff_ids: Vec<Option<Digest>> = match &document {
            Some(document) => {
                document.diff_ids_for(manifest).map_err(wrong)?.iter().cloned().map(Some).collect()
            }
            None => vec![None; manifest.layers.len()],
        };
        let mut layers = Vec::new();
        for (layer, diff_id) in manifest.layers.iter().cloned().zip(diff_ids) {
            layers.push(self.layer(layer, diff_id).boxed());
        }
        let layers: Vec<Descriptor> =
            futures::stream::iter(layers).buffered(parallel()).try_collect().await?;
        let mut shown = value["layers"].as_array().cloned().unwrap_or_default();
        for (number, (layer, shown)) in layers.iter().zip(&mut shown).enumerate() {
            labels.insert(format!("containerd.io/gc.ref.content.l.{number}"), layer.digest.to_string());
            describe(shown, layer);
        }
        if !shown.is_empty() {
            value["layers"] = Value::Array(shown);
        }
        Ok(labels)
    }

    /// Whether a blob is there; if so, the lease holds it.
    async fn hold(&self, digest: &Digest) -> Result<bool> {
        self.upkeep.content.join(&self.context, digest).await
    }

    /// Stores a document.
    async fn put(&self, descriptor: &Descriptor, bytes: Vec<u8>, labels: Labels) -> Result<()> {
        let (content, context, digest) = (&self.upkeep.content, &self.context, descriptor.digest.clone());
        let name = format!("convert-{}", unique());
        let stored = match content.writer(context, name, descriptor.size, Some(digest.clone())).await {
            Ok(mut writer) => {
                let writer = blocking(move || {
                    // Another namespace's is complete.
                    if writer.offset() == 0 {
                        writer.write(&bytes)?;
                    }
                    Ok(writer)
                });
                writer.await?.commit(descriptor.size, Some(digest), labels.clone()).await.map(drop)
            }
            Err(error) => Err(error),
        };
        match stored {
            Err(Error::AlreadyExists(_)) => {
                let mask = labels.keys().map(|key| format!("labels.{key}")).collect();
                let info = proto::containerd::services::content::v1::Info {
                    digest: descriptor.digest.to_string(),
                    labels,
                    ..Default::default()
                };
                content.update(context, info, mask).await.map(drop)
            }
            stored => stored,
        }
    }

    async fn layer(&self, mut layer: Descriptor, diff_id: Option<Digest>) -> Result<Descriptor> {
        if self.tell.is_closed() {
            return Err(gone());
        }
        if !self.hold(&layer.digest).await? {
            let view = self.upkeep.metadata.view();
            let why = crate::content::dropped::why_missing(
                &view,
                self.context.namespace()?.as_str(),
                &layer.digest,
            );
            return Err(Error::not_found(
                why.unwrap_or_else(|| format!("layer {} is not there", layer.digest)),
            ));
        }
        let wanted = self.conversion.compression;
        let new_type = compressed_type(&layer.media_type, wanted);
        if let Some(new_type) = new_type.filter(|_| wanted != Compression::Keep) {
            let digest = layer.digest.clone();
            let failed = |error: Error| error.context(format!("layer {digest}"));
            if self.compression_of(&layer.digest).await.map_err(failed)? != wanted {
                let diff_id = diff_id.ok_or_else(|| {
                    Error::invalid_argument(
                        "its config is no image's; without diff ids no layer can be checked",
                    )
                })?;
                (layer.digest, layer.size) = self.compress(&layer, diff_id).await.map_err(failed)?;
            }
            layer.media_type = new_type;
        }
        layer.media_type = self.conversion.media_type(&layer.media_type);
        Ok(layer)
    }

    /// How a blob is compressed, as its first bytes tell.
    async fn compression_of(&self, digest: &Digest) -> Result<Compression> {
        let (content, context, digest) = (self.upkeep.content.clone(), self.context.clone(), digest.clone());
        blocking(move || {
            let (file, _) = content.open_blob(&context, &digest)?;
            let mut head = Vec::new();
            let read = file.take(4).read_to_end(&mut head);
            read.map_err(|error| Error::data_loss(format!("blob {digest} cannot be read: {error}")))?;
            Ok(match &head[..] {
                [0x1f, 0x8b, ..] => Compression::Gzip,
                [0x28, 0xb5, 0x2f, 0xfd] => Compression::Zstd,
                _ => Compression::None,
            })
        })
        .await
    }

    /// A blob of the wanted compression, made of this layer: one that is there, or a new one.
    async fn compress(&self, layer: &Descriptor, diff_id: Digest) -> Result<(Digest, u64)> {
        let Conversion { compression, .. } = self.conversion;
        let made_of =
            format!("{diff_id} {} {}", compression.as_str_name().to_lowercase(), self.conversion.level());
        let known = |info: &proto::containerd::services::content::v1::Info| match compression {
            Compression::None => info.digest == diff_id.as_str(),
            _ => info.labels.get(MADE_OF) == Some(&made_of),
        };
        if let Some(info) = self.upkeep.content.list(&self.context, &[])?.into_iter().find(known) {
            let digest = crate::content::parse_digest(&info.digest)?;
            if self.hold(&digest).await? {
                self.progress(&layer.digest, "exists", layer.size, layer.size).await?;
                return Ok((digest, u64::try_from(info.size).unwrap_or(0)));
            }
        }
        self.progress(&layer.digest, "convert", 0, layer.size).await?;
        let name = format!("convert-{}", unique());
        let writer = self.upkeep.content.writer(&self.context, name.clone(), 0, None).await?;
        let done = async {
            let (content, context, tell) =
                (self.upkeep.content.clone(), self.context.clone(), self.tell.clone());
            let (layer, level, of) = (layer.clone(), self.conversion.level(), diff_id.clone());
            let name = self.conversion.source.clone();
            let writer = blocking(move || {
                let (file, _) = content.open_blob(&context, &layer.digest)?;
                let mut told = 0;
                let mut look = |offset: u64| {
                    if tell.is_closed() {
                        return Err(gone());
                    }
                    if offset - told >= STEP {
                        told = offset;
                        let progress = progress(&name, &layer.digest, "convert", offset, layer.size);
                        // A client that is slow misses some.
                        let _ = tell.try_send(Ok(ConvertResponse { entry: Some(Entry::Progress(progress)) }));
                    }
                    Ok(())
                };
                recompress(file, &layer, &of, compression, level, writer, &mut look)
            })
            .await?;
            let (digest, size) = (writer.digest(), writer.offset());
            let mut labels = Labels::from([(UNCOMPRESSED.to_owned(), diff_id.to_string())]);
            if compression != Compression::None {
                labels.insert(MADE_OF.to_owned(), made_of);
            }
            match writer.commit(size, Some(digest.clone()), labels).await {
                Ok(_) => {}
                Err(Error::AlreadyExists(_)) if self.hold(&digest).await? => {}
                Err(error) => return Err(error),
            }
            Ok((digest, size))
        }
        .await;
        match &done {
            Ok(_) => self.progress(&layer.digest, "done", layer.size, layer.size).await?,
            // Best effort: without the lease it goes by itself.
            Err(_) => drop(self.upkeep.content.abort(&self.context, name).await),
        }
        done
    }

    async fn progress(&self, digest: &Digest, state: &str, offset: u64, total: u64) -> Result<()> {
        self.tell(Entry::Progress(progress(&self.conversion.source, digest, state, offset, total))).await
    }
}

fn progress(name: &str, digest: &Digest, state: &str, offset: u64, total: u64) -> Progress {
    Progress { name: name.to_owned(), object: digest.to_string(), state: state.to_owned(), offset, total }
}

/// Writes a layer with another compression, and checks what it is on the way. Blocks.
fn recompress(
    mut file: File,
    layer: &Descriptor,
    diff_id: &Digest,
    compression: Compression,
    level: u32,
    writer: Writer,
    look: &mut dyn FnMut(u64) -> Result<()>,
) -> Result<Writer> {
    // They share where they are.
    let source = file.try_clone().map_err(|error| Error::unknown(format!("open it twice: {error}")))?;
    let mut plain = Hashing::new(
        decompress(BufReader::with_capacity(BUFFER, source), &layer.media_type)?,
        oci::Algorithm::Sha256.hasher(),
    );
    let mut sink = Sink { writer, failed: None };
    let encoded = (|| -> Result<()> {
        let failed = |error: io::Error| Error::unknown(format!("compress it: {error}"));
        let mut encoder: Encoder<'_> = match compression {
            Compression::Gzip => {
                let level = flate2::Compression::new(level);
                Encoder::Gzip(Box::new(flate2::write::GzEncoder::new(&mut sink, level)))
            }
            Compression::Zstd => {
                let level = i32::try_from(level).unwrap_or(i32::MAX);
                Encoder::Zstd(Box::new(zstd::stream::write::Encoder::new(&mut sink, level).map_err(failed)?))
            }
            Compression::None | Compression::Keep => Encoder::None(&mut sink),
        };
        let mut buffer = vec![0; BUFFER];
        loop {
            // Where the source is, more or less: how far it was read ahead does not matter.
            look(file.stream_position().unwrap_or(0))?;
            let count = plain.read(&mut buffer).map_err(|error| crate::diff::read_error(&error))?;
            if count == 0 {
                break;
            }
            encoder.write_all(&buffer[..count]).map_err(failed)?;
        }
        encoder.finish().map_err(failed)
    })();
    if let Some(error) = sink.failed.take() {
        return Err(error);
    }
    encoded?;
    let found = plain.hasher.finish();
    if found != *diff_id {
        return Err(Error::data_loss(format!(
            "uncompressed it has the digest {found}, but the image's config says {diff_id}; `ctr images verify` tells which \
             is damaged"
        )));
    }
    // What is read of a damaged blob may be right up to its last member: all of it must be.
    file.rewind().map_err(|error| Error::unknown(format!("read it again: {error}")))?;
    let mut whole = Hashing::new(file, layer.digest.algorithm().hasher());
    drain(&mut whole, &|| Ok(()))?;
    if whole.hasher.finish() != layer.digest {
        return Err(Error::data_loss("it is damaged; `ctr images verify --repair` fetches it again"));
    }
    Ok(sink.writer)
}

/// An ingest as something to write to, which keeps why it failed.
struct Sink {
    writer: Writer,
    failed: Option<Error>,
}

impl Write for Sink {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self.writer.write(bytes) {
            Ok(()) => Ok(bytes.len()),
            Err(error) => {
                let told = io::Error::other(error.to_string());
                self.failed = Some(error);
                Err(told)
            }
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

enum Encoder<'a> {
    None(&'a mut Sink),
    Gzip(Box<flate2::write::GzEncoder<&'a mut Sink>>),
    Zstd(Box<zstd::stream::write::Encoder<'static, &'a mut Sink>>),
}

impl Encoder<'_> {
    fn write_all(&mut self, bytes: &[u8]) -> io::Result<()> {
        match self {
            Encoder::None(sink) => sink.write_all(bytes),
            Encoder::Gzip(encoder) => encoder.write_all(bytes),
            Encoder::Zstd(encoder) => encoder.write_all(bytes),
        }
    }

    fn finish(self) -> io::Result<()> {
        match self {
            Encoder::None(_) => Ok(()),
            Encoder::Gzip(encoder) => encoder.finish().map(drop),
            Encoder::Zstd(encoder) => encoder.finish().map(drop),
        }
    }
}

/// Puts what may have changed into a descriptor's JSON.
fn describe(shown: &mut Value, descriptor: &Descriptor) {
    shown["mediaType"] = descriptor.media_type.clone().into();
    shown["digest"] = descriptor.digest.to_string().into();
    shown["size"] = descriptor.size.into();
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn media_types_change() {
        let conversion = |oci| Conversion {
            source: "a".into(),
            target: "b".into(),
            platforms: Vec::new(),
            all_platforms: false,
            oci,
            compression: Compression::Keep,
            level: 0,
        };
        let oci = conversion(true);
        assert_eq!(oci.media_type(media_type::DOCKER_LIST), media_type::OCI_INDEX);
        assert_eq!(oci.media_type(media_type::DOCKER_LAYER_GZIP), media_type::OCI_LAYER_GZIP);
        assert_eq!(oci.media_type(media_type::OCI_CONFIG), media_type::OCI_CONFIG);
        assert_eq!(
            oci.media_type("application/vnd.docker.image.rootfs.foreign.diff.tar.gzip"),
            "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip"
        );
        assert_eq!(conversion(false).media_type(media_type::DOCKER_LIST), media_type::DOCKER_LIST);
        for (from, compression, to) in [
            (media_type::DOCKER_LAYER_ZSTD, Compression::None, Some(media_type::DOCKER_LAYER)),
            (media_type::DOCKER_LAYER, Compression::Gzip, Some(media_type::DOCKER_LAYER_GZIP)),
            (media_type::OCI_LAYER_GZIP, Compression::Zstd, Some(media_type::OCI_LAYER_ZSTD)),
            (media_type::OCI_LAYER, Compression::None, Some(media_type::OCI_LAYER)),
            ("application/vnd.oci.image.layer.v1.tar+gzip+encrypted", Compression::None, None),
            ("application/x+gzip", Compression::None, None),
        ] {
            assert_eq!(compressed_type(from, compression).as_deref(), to, "{from}");
        }
    }

    #[test]
    fn levels_have_a_range() {
        let level = |compression, level| {
            let names = ("a".to_owned(), "b".to_owned());
            let (platforms, all_platforms, oci) = (Vec::new(), false, false);
            Conversion { source: names.0, target: names.1, platforms, all_platforms, oci, compression, level }
                .check()
        };
        assert!(level(Compression::Gzip, 9).is_ok() && level(Compression::Gzip, 10).is_err());
        assert!(level(Compression::Zstd, 22).is_ok() && level(Compression::Zstd, 23).is_err());
        assert!(level(Compression::Keep, 1).is_err() && level(Compression::None, 0).is_ok());
    }
}
