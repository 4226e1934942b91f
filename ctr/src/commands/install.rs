//! `ctr install`: an image's programs, and its libraries when wanted, put into a folder of the host.
//!
//! Layers are unpacked into a private folder beside the target first, beneath which every path is resolved; then each file is
//! renamed to its place. So nothing is half written, an image that is broken or refused installs nothing, and what a
//! layer deletes is deleted of the image, never of the host.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, bail, ensure};
use clap::Args;
use oci::Platform;
use oci::image::Manifest;
use oci::platform::Matcher;
use proto::containerd::services::introspection::v1::PluginsRequest;
use sys::beneath::{Place, Root};

use crate::client::{Client, Tried};
use crate::content::Blob;
use crate::{archive, image, lease, output};

/// What marks a file that a layer deletes.
const WHITEOUT: &[u8] = b".wh.";

/// Install an image's programs on the host
///
/// Takes the files right in the image's /bin, and in /lib with --libs, and prints where they are. Folders in these, and devices, are
/// left out.
#[derive(Debug, Args)]
pub(crate) struct Install {
    /// Install libraries, too
    #[arg(short, long)]
    libs: bool,
    /// Replace files that are there already
    #[arg(short, long)]
    replace: bool,
    /// Folder to install into [default: the one the engine manages, if it does]
    #[arg(long, value_name = "FOLDER")]
    path: Option<PathBuf>,
    #[arg(value_name = "IMAGE")]
    name: String,
}

impl Install {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let path = match &self.path {
            Some(path) => std::path::absolute(path)?,
            None => managed(&client).await?,
        };
        // Nothing of what is being read may be collected meanwhile.
        lease::within(&client, |client| async move {
            let host = Platform::host();
            let target = image::target(&image::get(&client, &self.name).await?)?;
            let manifest = image::manifest(&client, &target, &Matcher::only(&host), &host).await?;
            let name = self.name.clone();
            tokio::task::spawn_blocking(move || self.install(&client, &manifest, &path))
                .await?
                .with_context(|| format!("cannot install image {name}"))
        })
        .await
    }

    fn install(&self, client: &Client, manifest: &Manifest, path: &Path) -> anyhow::Result<()> {
        std::fs::create_dir_all(path).with_context(|| format!("cannot make folder {}", path.display()))?;
        let stage = Stage::make(path)?;
        let mut files: BTreeSet<Vec<u8>> = BTreeSet::new();
        for layer in &manifest.layers {
            let blob: Box<dyn Read> = Box::new(Blob::open(client, layer)?);
            let layer_of = || format!("layer {}", layer.digest);
            let mut plain = archive::decompress(blob).with_context(layer_of)?;
            self.unpack(&mut plain, &stage.path, &mut files).with_context(layer_of)?;
            // To its end, where its digest is known.
            io::copy(&mut plain, &mut io::sink()).with_context(layer_of)?;
        }
        let places = || files.iter().map(|name| Path::new(OsStr::from_bytes(name)));
        ensure!(!files.is_empty(), "it has no files in {}", if self.libs { "/bin or /lib" } else { "/bin" });
        for name in places() {
            let to = path.join(name);
            match to.symlink_metadata() {
                Ok(found) if found.is_dir() => bail!("{} is a folder", to.display()),
                Ok(_) if !self.replace => {
                    bail!("{} is there already; replace it with --replace", to.display())
                }
                _ => {}
            }
        }
        for name in places() {
            let to = path.join(name);
            if let Some(folder) = to.parent() {
                std::fs::create_dir_all(folder)
                    .with_context(|| format!("cannot make folder {}", folder.display()))?;
            }
            std::fs::rename(stage.path.join(name), &to)
                .with_context(|| format!("cannot put {} into its place", to.display()))?;
        }
        // Last, as a reader that goes away must not leave half of it.
        places().try_for_each(|name| output::line(path.join(name).display().to_string()))
    }

    /// Unpacks what is wanted of one layer; `files` is what has come so far.
    fn unpack(
        &self,
        layer: &mut dyn Read,
        stage: &Path,
        files: &mut BTreeSet<Vec<u8>>,
    ) -> anyhow::Result<()> {
        let mut root = Root::open(stage)?;
        // What this layer brings; it deletes of those beneath it alone.
        let mut own: BTreeSet<Vec<u8>> = BTreeSet::new();
        let mut tar = tar::Archive::new(layer);
        for member in tar.entries()? {
            let mut member = member.context("the layer is no tar, or is cut short")?;
            let path = member.path_bytes().into_owned();
            let Some((folder, name)) = self.wanted(&path)? else { continue };
            if let Some(deleted) = name.strip_prefix(WHITEOUT) {
                let opaque = deleted == b".wh..opq";
                let gone: Vec<Vec<u8>> = files
                    .iter()
                    .filter(|file| {
                        let rest = file.strip_prefix(folder).and_then(|rest| rest.strip_prefix(b"/"));
                        !own.contains(*file) && rest.is_some_and(|rest| opaque || rest == deleted)
                    })
                    .cloned()
                    .collect();
                for file in gone {
                    remove(&mut root, &file)?;
                    files.remove(&file);
                }
                continue;
            }
            let path = [folder, b"/", name].concat();
            let kind = member.header().entry_type();
            if !(kind.is_file() || kind.is_symlink() || kind.is_hard_link()) {
                continue;
            }
            remove(&mut root, &path)?;
            let place = place(&mut root, &path)?;
            let shown = String::from_utf8_lossy(&path).into_owned();
            if kind.is_symlink() {
                let link = member.link_name_bytes().with_context(|| format!("link {shown} has no target"))?;
                place.make_symlink(&link)?;
            } else if kind.is_hard_link() {
                let link = member.link_name_bytes().with_context(|| format!("link {shown} has no target"))?;
                let Some((folder, name)) = self.wanted(&link)? else {
                    bail!("{shown} is a link to {}, which is not installed", String::from_utf8_lossy(&link));
                };
                let to = self::place(&mut root, &[folder, b"/", name].concat())?;
                place.make_hard_link(&to).with_context(|| format!("cannot link {shown}"))?;
            } else {
                let mut file = place.make_file().with_context(|| format!("cannot make {shown}"))?;
                io::copy(&mut member, &mut file).with_context(|| format!("cannot write {shown}"))?;
                file.sync_all()?;
            }
            if !kind.is_hard_link() {
                describe(&place, &mut member)
                    .with_context(|| format!("cannot set owner and mode of {shown}"))?;
            }
            own.insert(path.clone());
            files.insert(path);
        }
        Ok(())
    }

    /// Folder and name of a member that is right in one of the folders that are installed.
    fn wanted<'a>(&self, path: &'a [u8]) -> anyhow::Result<Option<(&'static [u8], &'a [u8])>> {
        let parts = sys::beneath::components(path).context("a member of the layer has an unusable name")?;
        Ok(match parts[..] {
            [b"bin", name] => Some((b"bin", name)),
            [b"lib", name] if self.libs => Some((b"lib", name)),
            _ => None,
        })
    }
}

/// Owner, then mode, then attributes, then time: each of the first two takes away from what follows.
fn describe<R: Read>(place: &Place, member: &mut tar::Entry<'_, R>) -> anyhow::Result<()> {
    let (header, mut capabilities) = (member.header().clone(), None);
    if let Some(extensions) = member.pax_extensions()? {
        for extension in extensions {
            let extension = extension?;
            if extension.key_bytes() == b"SCHILY.xattr.security.capability" {
                capabilities = Some(extension.value_bytes().to_owned());
            }
        }
    }
    place.set_owner(u32::try_from(header.uid()?)?, u32::try_from(header.gid()?)?)?;
    place.set_mode(header.mode()? & 0o7777)?;
    if let Some(capabilities) = capabilities {
        place.set_xattr(OsStr::new("security.capability"), &capabilities)?;
    }
    let time = std::time::UNIX_EPOCH + std::time::Duration::from_secs(header.mtime()?);
    place.set_times(time, time)?;
    Ok(())
}

fn place(root: &mut Root, path: &[u8]) -> anyhow::Result<Place> {
    root.place_making(path, &mut |_, _| Ok(()))?.context("a member of the layer has no name")
}

fn remove(root: &mut Root, path: &[u8]) -> anyhow::Result<()> {
    let place = place(root, path)?;
    Ok(root.remove(&place)?)
}

/// The folder that an engine with the plugin `opt` manages.
async fn managed(client: &Client) -> anyhow::Result<PathBuf> {
    let request = PluginsRequest { filters: vec!["id==opt".to_owned()] };
    let plugins = client.introspection().plugins(request).await.tried(|| "look for the plugin opt")?.plugins;
    plugins
        .first()
        .and_then(|plugin| plugin.exports.get("path"))
        .map(PathBuf::from)
        .context("this engine manages no folder for programs; name one with --path")
}

/// A folder for what is unpacked, removed with what is still in it.
struct Stage {
    path: PathBuf,
}

impl Stage {
    /// Beside the targets, so that a rename can put files into their places.
    fn make(parent: &Path) -> anyhow::Result<Stage> {
        let path = parent.join(lease::unique(".ctr-install"));
        sys::fs::create_dir(&path, 0o700)
            .with_context(|| format!("cannot make folder {}", path.display()))?;
        Ok(Stage { path })
    }
}

impl Drop for Stage {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.path);
    }
}
