//! `ctr images import`.

use std::time::SystemTime;

use anyhow::{Context, bail, ensure};
use clap::Args;
use oci::Platform;
use oci::image::{Descriptor, MANIFEST_LIMIT, media_type};
use oci::platform::Matcher;
use proto::containerd::services::images::v1::{CreateImageRequest, Image, UpdateImageRequest};
use time::OffsetDateTime;
use tonic::Code;

use crate::archive::import::{Contents, Remote, open, read};
use crate::args::{Snapshotter, labels};
use crate::client::{Client, Failure, Tried};
use crate::progress::Progress;
use crate::{content, image, lease, unpack};

/// Import images from an archive: OCI layout or `docker save`, plain, gzip or zstd
///
/// Where the archive has bare tags only, --base-name goes before them; without it they become
/// import-YYYY-MM-DD:TAG.
#[derive(Debug, Args)]
pub(crate) struct Import {
    /// Name to put before bare tags; of fully named images, only those of this name are taken
    #[arg(long, value_name = "NAME")]
    base_name: Option<String>,
    /// Also name each image by its digest
    #[arg(long)]
    digests: bool,
    /// With --digests, leave out images that have a name
    #[arg(long, requires = "digests")]
    skip_digest_for_named: bool,
    /// Keep the archive's index as an image of this name
    #[arg(long, value_name = "NAME")]
    index_name: Option<String>,
    /// Keep the content of all platforms
    #[arg(long, conflicts_with = "platform")]
    all_platforms: bool,
    /// Keep the content of this platform [default: the host's]
    #[arg(long, value_name = "OS/ARCH[/VARIANT]")]
    platform: Option<Platform>,
    /// Do not unpack the layers
    #[arg(long)]
    no_unpack: bool,
    /// Label the images
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Accepted for containerd's sake: import always runs in ctr
    #[arg(long, hide = true)]
    local: bool,
    #[command(flatten)]
    snapshotter: Snapshotter,
    /// The archive; - is stdin
    #[arg(value_name = "FILE")]
    archive: String,
}

impl Import {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let progress = Progress::new();
        lease::within(&client, |client| async move {
            let remote = (client.clone(), progress.clone(), self.archive.clone());
            let contents = tokio::task::spawn_blocking(move || {
                let (client, progress, archive) = remote;
                read(open(&archive)?, &mut Remote { client, progress })
            })
            .await?
            .with_context(|| format!("cannot import {}", self.archive))?;
            self.finish(&client, contents, &progress).await
        })
        .await
    }

    fn platform(&self) -> Platform {
        self.platform.clone().unwrap_or_else(Platform::host)
    }

    /// Labels what came, unpacks it and names it: an image has a name only when all of it is there.
    async fn finish(&self, client: &Client, contents: Contents, progress: &Progress) -> anyhow::Result<()> {
        let matcher = if self.all_platforms { Matcher::all() } else { Matcher::only(&self.platform()) };
        let mut named = self.named(&contents, &matcher)?;
        if let Some(name) = &self.index_name {
            let bytes = contents.index;
            let target = Descriptor::of(media_type::OCI_INDEX, &bytes);
            content::write_bytes(client, bytes, Default::default()).await?;
            named.push((name.clone(), target));
        }
        ensure!(
            !named.is_empty(),
            "nothing to import: the archive names no image for {}; try --base-name, --digests, --index-name or --all-platforms",
            self.platform()
        );
        for (_, target) in &named {
            keep(client, target, &matcher).await?;
        }
        let snapshotter = client.snapshotter(&self.snapshotter.snapshotter).await?;
        for (name, target) in named {
            if !self.no_unpack {
                let platform = self.platform();
                let host = Matcher::only(&platform);
                match image::resolve(client, &target, &host, &platform).await {
                    Ok(resolved) => {
                        unpack::unpack(client, &resolved, &snapshotter, progress).await?;
                        progress.say(&format!("unpacking {name} ({})...done", target.digest));
                    }
                    // Another platform's content is kept, but cannot be unpacked for this one.
                    Err(error) if self.all_platforms => {
                        progress.say(&format!("not unpacking {name}: {error:#}"));
                    }
                    Err(error) => return Err(error.context(format!("cannot unpack {name}"))),
                }
            }
            self.record(client, &name, &target).await?;
            if self.no_unpack {
                progress.say(&format!("imported {name} ({})", target.digest));
            }
        }
        Ok(())
    }

    /// Which image gets which name.
    fn named(&self, contents: &Contents, matcher: &Matcher) -> anyhow::Result<Vec<(String, Descriptor)>> {
        let today = OffsetDateTime::from(SystemTime::now()).date();
        let base = self.base_name.clone().unwrap_or_else(|| format!("import-{today}"));
        let mut named: Vec<(String, Descriptor)> = Vec::new();
        for entry in &contents.entries {
            if entry.target.platform.as_ref().is_some_and(|platform| !matcher.matches(platform)) {
                continue;
            }
            let mut target = entry.target.clone();
            // What only told the name or the platform is no part of the image.
            target.annotations.clear();
            let name = match (&entry.name, &entry.tag) {
                (Some(name), _) => Some(name.clone()),
                (None, Some(tag)) if tag.contains(['/', ':', '@']) => Some(tag.clone()),
                (None, Some(tag)) => Some(format!("{base}:{tag}")),
                (None, None) => None,
            };
            let full =
                entry.name.is_some() || entry.tag.as_ref().is_some_and(|tag| tag.contains(['/', ':', '@']));
            let name =
                name.filter(|name| !full || self.base_name.as_ref().is_none_or(|base| of_base(name, base)));
            if self.digests && !(self.skip_digest_for_named && name.is_some()) {
                named.push((format!("{base}@{}", target.digest), target.clone()));
            }
            named.extend(name.map(|name| (name, target)));
        }
        Ok(named)
    }

    async fn record(&self, client: &Client, name: &str, target: &Descriptor) -> anyhow::Result<()> {
        let record = Image {
            name: name.to_owned(),
            labels: labels(&self.label),
            target: Some(image::wire(target)),
            ..Image::default()
        };
        let request = CreateImageRequest { image: Some(record.clone()), ..CreateImageRequest::default() };
        match client.images().create(request).await {
            Ok(_) => Ok(()),
            Err(status) if status.code() == Code::AlreadyExists => {
                let request = UpdateImageRequest { image: Some(record), ..UpdateImageRequest::default() };
                client.images().update(request).await.tried(|| format!("replace image {name}"))?;
                Ok(())
            }
            Err(status) => Err(Failure::new(format!("create image {name}"), status).into()),
        }
    }
}

/// Whether `name` is `base`, alone or with a tag, digest or further path.
fn of_base(name: &str, base: &str) -> bool {
    name.strip_prefix(base).is_some_and(|rest| rest.is_empty() || rest.starts_with(['/', ':', '@']))
}

/// Labels every document under `target` so that the collector keeps its children; all that the wanted
/// platforms need must have come.
async fn keep(client: &Client, target: &Descriptor, matcher: &Matcher) -> anyhow::Result<()> {
    let survey = image::survey(client, target, matcher).await?;
    let mut missing = survey.missing;
    if target.media_type.is_empty() {
        bail!("the archive's index does not say what {} is", target.digest);
    }
    if media_type::is_index(&target.media_type) {
        // An archive may hold one platform of an index; what is there must be whole.
        missing.retain(|blob| !media_type::is_manifest(&blob.media_type));
    }
    if let Some(first) = missing.first() {
        bail!(
            "the archive lacks {} of the blobs that its manifests name, first {} ({})",
            missing.len(),
            first.digest,
            first.media_type
        );
    }
    for blob in &survey.blobs {
        if media_type::is_index(&blob.media_type) || media_type::is_manifest(&blob.media_type) {
            let bytes = content::read(client, &blob.digest, MANIFEST_LIMIT).await?;
            content::set_labels(client, &blob.digest, image::reference_labels(&bytes, matcher)?).await?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::archive::import::Entry;
    use clap::Parser;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        import: Import,
    }

    fn names(line: &str, entries: &[(Option<&str>, Option<&str>)]) -> Vec<String> {
        let import = Line::try_parse_from(format!("import {line} -").split_whitespace()).unwrap().import;
        let target = Descriptor::of(media_type::OCI_MANIFEST, b"x");
        let entries = entries
            .iter()
            .map(|(name, tag)| Entry {
                name: name.map(str::to_owned),
                tag: tag.map(str::to_owned),
                target: target.clone(),
            })
            .collect();
        let contents = Contents { entries, index: Vec::new() };
        let named = import.named(&contents, &Matcher::all()).unwrap();
        named.into_iter().map(|(name, _)| name.replace(target.digest.as_str(), "DIGEST")).collect()
    }

    #[test]
    fn names_follow_containerds_rules() {
        assert_eq!(names("--base-name foo/bar", &[(None, Some("v1")), (None, None)]), ["foo/bar:v1"]);
        assert_eq!(
            names("--base-name foo/bar --digests", &[(None, Some("v1")), (None, None)]),
            ["foo/bar@DIGEST", "foo/bar:v1", "foo/bar@DIGEST"]
        );
        assert_eq!(names("", &[(Some("a.b/c:d"), Some("d"))]), ["a.b/c:d"]);
        assert_eq!(
            names("--base-name a.b/x", &[(Some("a.b/c:d"), None), (Some("a.b/x:1"), None)]),
            ["a.b/x:1"]
        );
        assert!(names("", &[(None, Some("v1"))])[0].starts_with("import-20"));
        assert_eq!(names("", &[(None, Some("q.io/a:b"))]), ["q.io/a:b"]);
    }
}
