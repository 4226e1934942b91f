//! `ctr images verify`.

use clap::Args;
use proto::gantry::images::v1::finding::Kind;
use proto::gantry::images::v1::verify_response::Entry;
use proto::gantry::images::v1::{Finding, VerifyRequest};
use serde_json::{Value, json};

use crate::args::Format;
use crate::client::{Client, Failure, Tried};
use crate::json as messages;
use crate::output;

/// Check images down to the bytes of their blobs and the files of their unpacked layers
///
/// Hashes all blobs, follows the documents from the manifest to the diff ids, and compares each unpacked layer with the
/// files it became. Ends with an error when anything is damaged and stays so. An engine other than gantryd does not know this
/// command.
#[derive(Debug, Args)]
pub(crate) struct Verify {
    /// Check all images of the namespace
    #[arg(long, required_unless_present = "names", conflicts_with = "names")]
    all: bool,
    /// Fetch damaged blobs again, and unpack changed layers again where no container stands on them
    #[arg(long)]
    repair: bool,
    /// Look for blobs in the repository of this image first
    #[arg(long, value_name = "REF", requires = "repair", default_value = "", hide_default_value = true)]
    from: String,
    /// Read documents only: see that blobs have their size and that snapshots are there
    #[arg(long)]
    quick: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t)]
    format: Format,
    #[arg(value_name = "IMAGE")]
    names: Vec<String>,
}

impl Verify {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let Verify { repair, from, quick, format, names, all: _ } = self;
        let what = || "verify images".to_owned();
        let request = VerifyRequest { names, quick, repair, from };
        let mut answers = client.image_care().verify(request).await.tried(what)?;
        let mut findings: Vec<Value> = Vec::new();
        while let Some(answer) = answers.message().await.map_err(|status| Failure::new(what(), status))? {
            let summary = match answer.entry {
                Some(Entry::Finding(finding)) => {
                    match format {
                        Format::Json => findings.push(as_json(&finding)),
                        _ => output::line(as_line(&finding))?,
                    }
                    continue;
                }
                Some(Entry::Summary(summary)) => summary,
                Some(Entry::Progress(_)) | None => continue,
            };
            if format == Format::Json {
                messages::print(&json!({
                    "findings": findings,
                    "images": summary.images,
                    "blobs": summary.blobs,
                    "bytes": summary.bytes,
                    "snapshots": summary.snapshots,
                    "files": summary.files,
                    "damages": summary.damages,
                    "repaired": summary.repaired,
                }))?;
            } else {
                output::line(format!(
                    "{} images: {} blobs ({} hashed), {} snapshots ({} files compared); {} damages, {} repaired",
                    summary.images,
                    summary.blobs,
                    output::bytes(summary.bytes as i64),
                    summary.snapshots,
                    summary.files,
                    summary.damages,
                    summary.repaired
                ))?;
            }
            let left = summary.damages.saturating_sub(summary.repaired);
            anyhow::ensure!(left == 0, "{left} damages are left");
            return Ok(());
        }
        anyhow::bail!("the engine ended the check without its result")
    }
}

fn word(finding: &Finding) -> &'static str {
    match finding.kind() {
        Kind::Unknown => "not checked",
        Kind::MissingBlob => "missing blob",
        Kind::DamagedBlob => "damaged blob",
        Kind::WrongSize => "wrong size",
        Kind::WrongDocument => "wrong document",
        Kind::MissingSnapshot => "missing snapshot",
        Kind::DifferentFile => "different file",
        Kind::Dropped => "dropped",
    }
}

fn as_line(finding: &Finding) -> String {
    let path = if finding.path.is_empty() { String::new() } else { format!(": {}", finding.path) };
    let end = match (finding.repaired, finding.remedy.as_str()) {
        (true, _) => " (repaired)".to_owned(),
        (false, "") => String::new(),
        (false, remedy) => format!(" ({remedy})"),
    };
    format!("{}: {}: {}{path}: {}{end}", finding.name, word(finding), finding.object, finding.what)
}

fn as_json(finding: &Finding) -> Value {
    json!({
        "image": finding.name,
        "kind": word(finding),
        "object": finding.object,
        "path": finding.path,
        "what": finding.what,
        "repaired": finding.repaired,
        "remedy": finding.remedy,
    })
}
