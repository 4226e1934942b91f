//! `ctr content edit`.

use std::io::Write;
use std::process::Command;

use anyhow::{Context, ensure};
use clap::Args;
use oci::Digest;

use crate::args::labels;
use crate::client::Client;
use crate::{content, output};

/// The largest blob that is edited; it is held in memory.
const LIMIT: u64 = 64 << 20;

/// Open a blob in an editor and store the result as a blob; prints its digest
///
/// Nothing keeps the new blob: label it, or it goes with the next collection.
#[derive(Debug, Args)]
pub(crate) struct Edit {
    /// Store the result only if it is of this form
    #[arg(long, value_name = "FORM", value_parser = ["json"])]
    validate: Option<String>,
    /// Label the result
    #[arg(long, value_name = "KEY=VALUE")]
    label: Vec<String>,
    /// Editor, with its arguments
    #[arg(long, env = "EDITOR", default_value = "vi")]
    editor: String,
    digest: Digest,
}

impl Edit {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let bytes = content::read(&client, &self.digest, LIMIT).await?;
        let editor = self.editor.clone();
        let edited = tokio::task::spawn_blocking(move || edit(&editor, &bytes)).await??;
        if self.validate.is_some() {
            let _: serde_json::Value =
                serde_json::from_slice(&edited).context("the result is not JSON; nothing was stored")?;
        }
        output::line(content::write_bytes(&client, edited, labels(&self.label)).await?)
    }
}

/// Has an editor work on these bytes, in a file that nobody else can read.
fn edit(editor: &str, bytes: &[u8]) -> anyhow::Result<Vec<u8>> {
    let name = crate::lease::unique("ctr-edit");
    let folder = Folder::make(std::env::temp_dir().join(name))?;
    let path = folder.0.join("content");
    std::fs::File::create(&path)?.write_all(bytes)?;
    // By a shell, as others do: the variable may hold arguments.
    let status = Command::new("/bin/sh")
        .args(["-c", "exec $0 \"$1\"", editor])
        .arg(&path)
        .status()
        .with_context(|| format!("cannot run editor {editor:?}"))?;
    ensure!(status.success(), "editor {editor:?} ended with {status}; nothing was stored");
    std::fs::read(&path).with_context(|| format!("editor {editor:?} left no file"))
}

/// A private folder, removed with what is in it.
struct Folder(std::path::PathBuf);

impl Folder {
    fn make(path: std::path::PathBuf) -> anyhow::Result<Folder> {
        use std::os::unix::fs::DirBuilderExt;
        std::fs::DirBuilder::new()
            .mode(0o700)
            .create(&path)
            .with_context(|| format!("cannot make folder {}", path.display()))?;
        Ok(Folder(path))
    }
}

impl Drop for Folder {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}
