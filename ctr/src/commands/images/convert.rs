//! `ctr images convert`: the same files under other media types, other compression or fewer platforms, made by the engine.

use std::collections::HashMap;

use anyhow::Context as _;
use clap::Args;
use oci::Platform;
use proto::containerd::types;
use proto::gantry::images::v1::convert_response::Entry;
use proto::gantry::images::v1::{Compression, ConvertRequest};

use crate::client::{Client, Failure, Tried};
use crate::output;
use crate::progress::{Item, Progress, short};

/// Convert an image and give the result a name; prints its digest
///
/// An engine other than gantryd does not know this command.
#[derive(Debug, Args)]
pub(crate) struct Convert {
    /// Store layers uncompressed
    #[arg(long, group = "compression")]
    uncompress: bool,
    /// Compress layers by gzip
    #[arg(long, group = "compression")]
    gzip: bool,
    /// Compress layers by zstd
    #[arg(long, group = "compression")]
    zstd: bool,
    /// How well to compress: 1 to 9 for gzip, 1 to 22 for zstd; 0 for the usual one
    #[arg(long, default_value_t = 0)]
    level: u32,
    /// Change Docker's media types to OCI's
    #[arg(long)]
    oci: bool,
    /// Keep this platform; may be given more than once [default: the host's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Vec<Platform>,
    /// Keep all platforms, all of which must be there
    #[arg(long, conflicts_with = "platform")]
    all_platforms: bool,
    source: String,
    /// Name of the result; an image that has it is replaced
    target: String,
}

impl Convert {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let what = format!("convert image {}", self.source);
        let mut answers = client.image_care().convert(self.request()).await.tried(|| what.clone())?;
        let progress = Progress::new();
        // Bars, and how far they are.
        let mut items: HashMap<String, (Item, u64)> = HashMap::new();
        let mut target = None;
        while let Some(answer) =
            answers.message().await.map_err(|status| Failure::new(what.clone(), status))?
        {
            match answer.entry {
                Some(Entry::Target(digest)) => target = Some(digest.digest),
                Some(Entry::Progress(step)) => {
                    let known = items.remove(&step.object);
                    let (item, at) = known.unwrap_or_else(|| {
                        (progress.start("convert", short(&step.object), Some(step.total)), 0)
                    });
                    item.advance(step.offset.saturating_sub(at));
                    match step.state.as_str() {
                        "convert" => drop(items.insert(step.object, (item, step.offset))),
                        "exists" => item.finish("exists"),
                        _ => item.finish("converted"),
                    }
                }
                None => {}
            }
        }
        output::line(target.context("the engine ended the conversion without its result")?)
    }

    fn request(&self) -> ConvertRequest {
        let compression = match (self.uncompress, self.gzip, self.zstd) {
            (true, ..) => Compression::None,
            (_, true, _) => Compression::Gzip,
            (_, _, true) => Compression::Zstd,
            _ => Compression::Keep,
        };
        let platform = |platform: &Platform| types::Platform {
            os: platform.os.clone(),
            architecture: platform.architecture.clone(),
            variant: platform.variant.clone(),
            os_version: platform.os_version.clone(),
            os_features: platform.os_features.clone(),
        };
        ConvertRequest {
            source: self.source.clone(),
            target: self.target.clone(),
            platforms: self.platform.iter().map(platform).collect(),
            all_platforms: self.all_platforms,
            oci: self.oci,
            compression: compression.into(),
            level: self.level,
        }
    }
}
