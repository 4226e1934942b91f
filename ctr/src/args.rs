//! Small arguments that several commands share: labels, durations, output choices.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::{Args, ValueEnum};

/// How a list is printed.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub(crate) enum Format {
    /// Aligned columns under a heading.
    #[default]
    Table,
    /// A JSON array.
    Json,
}

/// Flags of every list.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Listing {
    /// Print only the names
    #[arg(short, long)]
    pub(crate) quiet: bool,
    /// How to print
    #[arg(long, value_enum, default_value_t, conflicts_with = "quiet")]
    pub(crate) format: Format,
}

/// Which snapshotter to use.
#[derive(Clone, Debug, Args)]
pub(crate) struct Snapshotter {
    /// Snapshotter to use [default: the namespace's, else overlayfs]
    #[arg(
        long,
        value_name = "NAME",
        env = "CONTAINERD_SNAPSHOTTER",
        default_value = "",
        hide_default_value = true
    )]
    pub(crate) snapshotter: String,
}

/// `key=value` pairs to a map; a key without `=` means `true`, as in containerd's ctr.
pub(crate) fn labels(pairs: &[String]) -> BTreeMap<String, String> {
    pairs
        .iter()
        .map(|pair| match pair.split_once('=') {
            Some((key, value)) => (key.to_owned(), value.to_owned()),
            None => (pair.clone(), "true".to_owned()),
        })
        .collect()
}

/// Labels as `a=b,c=d`.
pub(crate) fn joined(labels: &BTreeMap<String, String>) -> String {
    labels.iter().map(|(key, value)| format!("{key}={value}")).collect::<Vec<_>>().join(",")
}

/// Parses Go's form of a duration: `1h30m`, `1.5s`, `300ms`; a bare `0` is zero.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, String> {
    let fail = || format!("{text:?} is not a duration; write 90s, 1m30s or 500ms");
    if text == "0" {
        return Ok(Duration::ZERO);
    }
    let mut rest = text;
    let mut total = 0.0;
    while !rest.is_empty() {
        let number = rest.find(|c: char| !c.is_ascii_digit() && c != '.').ok_or_else(fail)?;
        let value: f64 = rest[..number].parse().map_err(|_| fail())?;
        rest = &rest[number..];
        let unit = rest.find(|c: char| c.is_ascii_digit()).unwrap_or(rest.len());
        total += value
            * match &rest[..unit] {
                "h" => 3600.0,
                "m" => 60.0,
                "s" => 1.0,
                "ms" => 1e-3,
                "us" | "µs" => 1e-6,
                "ns" => 1e-9,
                _ => return Err(fail()),
            };
        rest = &rest[unit..];
    }
    if text.is_empty() {
        return Err(fail());
    }
    Duration::try_from_secs_f64(total).map_err(|_| fail())
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn durations_as_go_writes_them() {
        assert_eq!(parse_duration("1m30s").unwrap(), Duration::from_secs(90));
        assert_eq!(parse_duration("1.5s").unwrap(), Duration::from_millis(1500));
        assert_eq!(parse_duration("0").unwrap(), Duration::ZERO);
        for bad in ["", "5", "s", "1x", "-1s", "1..2s"] {
            assert!(parse_duration(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn labels_default_to_true() {
        let labels = labels(&["a=b".into(), "c".into(), "d=".into(), "e=f=g".into()]);
        assert_eq!(joined(&labels), "a=b,c=true,d=,e=f=g");
    }

    proptest! {
        #[test]
        fn durations_never_panic(text in "[0-9.hmsunµ-]{0,20}") {
            let _ = parse_duration(&text);
        }
    }
}
