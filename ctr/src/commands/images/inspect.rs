//! `ctr images inspect`: an image and all it points at, as a tree.

use anyhow::Context;
use clap::Args;
use oci::image::{CONFIG_LIMIT, Descriptor, Index, Kind, MANIFEST_LIMIT, Manifest, kind_of, media_type};

use crate::client::Client;
use crate::{content, image, output};

/// How deep indexes may be nested in one another.
const DEPTH_LIMIT: usize = 8;

/// Show what an image consists of, as a tree
#[derive(Debug, Args)]
pub(crate) struct Inspect {
    /// Show labels and content of the documents, too
    #[arg(long)]
    content: bool,
    #[arg(value_name = "IMAGE")]
    name: String,
}

/// The text under construction.
struct Tree<'a> {
    client: &'a Client,
    content: bool,
    text: String,
}

impl Inspect {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let image = image::get(&client, &self.name).await?;
        let mut tree = Tree { client: &client, content: self.content, text: format!("{}\n", image.name) };
        tree.line("│   ", &format!(" Created: {}", output::time(image.created_at.as_ref())));
        tree.line("│   ", &format!(" Updated: {}", output::time(image.updated_at.as_ref())));
        for (key, value) in &image.labels {
            tree.line("│   ", &format!(" Label {key:?}: {value:?}"));
        }
        tree.document(&image::target(&image)?, "", true, 0).await?;
        output::print(&tree.text)
    }
}

impl Tree<'_> {
    fn line(&mut self, prefix: &str, text: &str) {
        self.text.push_str(prefix);
        self.text.push_str(text);
        self.text.push('\n');
    }

    /// One child beneath `prefix`; returns the prefix of what is beneath it.
    fn node(&mut self, descriptor: &Descriptor, prefix: &str, last: bool) -> String {
        let Descriptor { media_type, digest, size, .. } = descriptor;
        let drop = if last { "└── " } else { "├── " };
        self.line(&format!("{prefix}{drop}"), &format!("{media_type} @{digest} ({size} bytes)"));
        format!("{prefix}{}", if last { "    " } else { "│   " })
    }

    /// A manifest or an index, with what is beneath it.
    async fn document(
        &mut self,
        descriptor: &Descriptor,
        prefix: &str,
        last: bool,
        depth: usize,
    ) -> anyhow::Result<()> {
        anyhow::ensure!(depth <= DEPTH_LIMIT, "indexes are nested deeper than {DEPTH_LIMIT}");
        let prefix = self.node(descriptor, prefix, last);
        if let Some(platform) = &descriptor.platform {
            self.line(&prefix, &format!("│    Platform: {platform}"));
        }
        if content::info(self.client, &descriptor.digest).await?.is_none() {
            self.line(&prefix, "└──  Content does not exist locally, skipping");
            return Ok(());
        }
        let documents =
            media_type::is_index(&descriptor.media_type) || media_type::is_manifest(&descriptor.media_type);
        if !documents {
            return Ok(());
        }
        let bytes = content::read(self.client, &descriptor.digest, MANIFEST_LIMIT).await?;
        self.details(descriptor, &format!("{prefix}│   ")).await?;
        match kind_of(&bytes)? {
            Kind::Index => {
                let manifests = Index::parse(&bytes)?.manifests;
                for (number, entry) in manifests.iter().enumerate() {
                    let last = number + 1 == manifests.len();
                    Box::pin(self.document(entry, &prefix, last, depth + 1)).await?;
                }
            }
            Kind::Manifest => {
                let manifest = Manifest::parse(&bytes)?;
                let below = self.node(&manifest.config, &prefix, manifest.layers.is_empty());
                self.details(&manifest.config, &below).await?;
                for (number, layer) in manifest.layers.iter().enumerate() {
                    self.node(layer, &prefix, number + 1 == manifest.layers.len());
                }
            }
        }
        Ok(())
    }

    /// Labels and content of a document in frames, when they are wanted.
    async fn details(&mut self, descriptor: &Descriptor, prefix: &str) -> anyhow::Result<()> {
        if !self.content {
            return Ok(());
        }
        let Some(info) = content::info(self.client, &descriptor.digest).await? else { return Ok(()) };
        if !info.labels.is_empty() {
            self.line(prefix, "┌────────Labels─────────");
            for (key, value) in &info.labels {
                self.line(prefix, &format!("│{key:?}: {value:?}"));
            }
            self.line(prefix, "└───────────────────────");
        }
        if descriptor.media_type.ends_with("json") {
            let bytes = content::read(self.client, &descriptor.digest, CONFIG_LIMIT).await?;
            let document: serde_json::Value = serde_json::from_slice(&bytes)
                .with_context(|| format!("content {} is not JSON", descriptor.digest))?;
            self.line(prefix, "┌────────Content────────");
            for line in format!("{document:#}").lines() {
                self.line(prefix, &format!("│{line}"));
            }
            self.line(prefix, "└───────────────────────");
        }
        Ok(())
    }
}
