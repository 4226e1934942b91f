//! `ctr images prune`.

use std::time::Duration;

use anyhow::Context as _;
use clap::Args;
use proto::gantry::images::v1::PruneRequest;

use crate::args::parse_duration;
use crate::client::{Client, Tried};
use crate::output;

/// Remove images that are not needed, and what only they held
///
/// Those without a tag, or all, but never those that a container was made from. All of the other conditions have to hold. An
/// engine other than gantryd does not know this command.
#[derive(Debug, Args)]
pub(crate) struct Prune {
    /// Also images that have a tag
    #[arg(long)]
    all: bool,
    /// Only those that are here for longer, as 240h, 1h30m
    #[arg(long, visible_alias = "until", value_name = "AGE", value_parser = parse_duration)]
    older_than: Option<Duration>,
    /// Only those with more content, as 500MB, 1GiB
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    larger_than: Option<u64>,
    /// Spare so many of each repository, the newest
    #[arg(long, value_name = "N", default_value_t = 0)]
    keep_last: u32,
    /// Only show what would go, and how much it would free
    #[arg(long)]
    dry_run: bool,
    /// Only those that match one of these, as name~=busybox
    filters: Vec<String>,
}

impl Prune {
    pub(crate) async fn run(self, client: Client) -> anyhow::Result<()> {
        let older_than = self.older_than.map(prost_types::Duration::try_from).transpose();
        let request = PruneRequest {
            filters: self.filters,
            older_than: older_than.context("--older-than is too long")?,
            larger_than: self.larger_than.unwrap_or(0),
            keep_last: self.keep_last,
            all: self.all,
            dry_run: self.dry_run,
        };
        let went = client.image_care().prune(request).await.tried(|| "prune images")?;
        for image in &went.images {
            output::line(&image.name)?;
        }
        // Beside the names, which a script may read.
        eprintln!(
            "{} {} images: {} blobs ({}), {} snapshots ({})",
            if self.dry_run { "would remove" } else { "removed" },
            went.images.len(),
            went.blobs,
            output::bytes(went.content as i64),
            went.snapshots,
            output::bytes(went.unpacked as i64)
        );
        Ok(())
    }
}

/// A number of bytes, with a unit of powers of ten or of two.
fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let wrong = || format!("{text:?} is not a size; write it as 500MB or 1.5GiB");
    let number: f64 = text[..digits].parse().map_err(|_| wrong())?;
    let unit = match text[digits..].trim() {
        "" | "B" => 1_u64,
        "kB" | "KB" => 1000,
        "MB" => 1_000_000,
        "GB" => 1_000_000_000,
        "TB" => 1_000_000_000_000,
        "KiB" => 1 << 10,
        "MiB" => 1 << 20,
        "GiB" => 1 << 30,
        "TiB" => 1 << 40,
        _ => return Err(wrong()),
    };
    Ok((number * unit as f64) as u64)
}

#[cfg(test)]
mod tests {
    use super::parse_size;

    #[test]
    fn sizes_have_units() {
        assert_eq!(parse_size("10"), Ok(10));
        assert_eq!(parse_size("1.5kB"), Ok(1500));
        assert_eq!(parse_size("2GiB"), Ok(2 << 30));
        assert!(parse_size("").is_err() && parse_size("x").is_err() && parse_size("1 elephant").is_err());
    }
}
