//! Printing: aligned columns as Go's tabwriter makes them, sizes, ages, times.

use std::io::{self, Write};

use prost_types::Timestamp;
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

/// Rows under a heading, each column as wide as its widest cell.
pub(crate) struct Table {
    minimum: usize,
    padding: usize,
    rows: Vec<Vec<String>>,
}

impl Table {
    /// A table with one space between columns.
    pub(crate) fn new(heading: &[&str]) -> Table {
        Table::spaced(1, 1, heading)
    }

    /// A table whose columns are `minimum` wide at least, with `padding` spaces between them.
    pub(crate) fn spaced(minimum: usize, padding: usize, heading: &[&str]) -> Table {
        Table { minimum, padding, rows: vec![heading.iter().map(|cell| (*cell).to_owned()).collect()] }
    }

    /// Adds a row.
    pub(crate) fn row<const N: usize>(&mut self, cells: [String; N]) {
        self.rows.push(cells.into());
    }

    /// The whole as text, without blanks at the ends of lines.
    pub(crate) fn text(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| {
            let longest =
                self.rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count()).max();
            (longest.unwrap_or(0) + self.padding).max(self.minimum)
        };
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for row in &self.rows {
            let mut line = String::new();
            for (cell, width) in row.iter().zip(&widths) {
                line.push_str(cell);
                line.extend(std::iter::repeat_n(' ', width - cell.chars().count()));
            }
            text.push_str(line.trim_end());
            text.push('\n');
        }
        text
    }

    /// Writes the table to stdout.
    pub(crate) fn print(&self) -> anyhow::Result<()> {
        print(&self.text())
    }
}

/// Writes text to stdout; a reader that went away is an error [`is_closed_pipe`] knows.
pub(crate) fn print(text: &str) -> anyhow::Result<()> {
    let mut out = io::stdout().lock();
    out.write_all(text.as_bytes())?;
    out.flush()?;
    Ok(())
}

/// Writes one line to stdout.
pub(crate) fn line(text: impl AsRef<str>) -> anyhow::Result<()> {
    print(&format!("{}\n", text.as_ref()))
}

/// Whether the error only says that nobody reads our output any more (`ctr … | head`).
pub(crate) fn is_closed_pipe(error: &anyhow::Error) -> bool {
    error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::BrokenPipe)
}

/// A size as containerd's ctr writes it: `1.5 MiB`.
pub(crate) fn bytes(size: i64) -> String {
    const UNITS: [&str; 6] = ["B", "KiB", "MiB", "GiB", "TiB", "PiB"];
    let mut value = size as f64;
    let mut unit = 0;
    while value.abs() >= 1024.0 && unit + 1 < UNITS.len() {
        value /= 1024.0;
        unit += 1;
    }
    match unit {
        0 => format!("{value:.1} B"),
        _ => format!("{value:.1} {}", UNITS[unit]),
    }
}

/// A size as containerd's ctr writes it of blobs: `1.059MB`, in powers of ten and with four digits.
pub(crate) fn decimal_bytes(size: i64) -> String {
    const UNITS: [&str; 6] = ["B", "kB", "MB", "GB", "TB", "PB"];
    let mut value = size as f64;
    let mut unit = 0;
    while value >= 1000.0 && unit + 1 < UNITS.len() {
        value /= 1000.0;
        unit += 1;
    }
    let decimals = match value {
        100.0.. => 1,
        10.0.. => 2,
        _ => 3,
    };
    let digits = format!("{value:.decimals$}");
    format!("{}{}", digits.trim_end_matches('0').trim_end_matches('.'), UNITS[unit])
}

/// A time in RFC 3339, or `-`.
pub(crate) fn time(timestamp: Option<&Timestamp>) -> String {
    let exact = || {
        let time = proto::time::system_time(timestamp)?;
        OffsetDateTime::from(time).format(&Rfc3339).ok()
    };
    exact().unwrap_or_else(|| "-".to_owned())
}

/// The same without the fraction of a second.
pub(crate) fn seconds(timestamp: Option<&Timestamp>) -> String {
    time(timestamp.map(|timestamp| Timestamp { nanos: 0, ..*timestamp }).as_ref())
}

/// How long ago, in words: `About a minute`, `3 hours`.
pub(crate) fn age(timestamp: Option<&Timestamp>) -> String {
    let Some(time) = proto::time::system_time(timestamp) else { return "-".to_owned() };
    let seconds = time.elapsed().map(|age| age.as_secs()).unwrap_or(0);
    let plural = |count: u64, unit: &str| format!("{count} {unit}{}", if count == 1 { "" } else { "s" });
    match seconds {
        0 => "Less than a second".to_owned(),
        1..60 => plural(seconds, "second"),
        60..120 => "About a minute".to_owned(),
        120..3600 => plural(seconds / 60, "minute"),
        3600..7200 => "About an hour".to_owned(),
        7200..172_800 => plural(seconds / 3600, "hour"),
        172_800..1_209_600 => plural(seconds / 86_400, "day"),
        1_209_600..5_184_000 => plural(seconds / 604_800, "week"),
        5_184_000..63_072_000 => plural(seconds / 2_592_000, "month"),
        _ => plural(seconds / 31_536_000, "year"),
    }
}

/// `-` for an empty string.
pub(crate) fn or_dash(text: &str) -> String {
    if text.is_empty() { "-".to_owned() } else { text.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_align() {
        let mut table = Table::spaced(4, 4, &["TASK", "PID", "STATUS"]);
        table.row(["a-long-name".into(), "7".into(), "RUNNING".into()]);
        assert_eq!(table.text(), "TASK           PID    STATUS\na-long-name    7      RUNNING\n");
    }

    #[test]
    fn sizes_and_ages_read_well() {
        assert_eq!(bytes(0), "0.0 B");
        assert_eq!(bytes(1536), "1.5 KiB");
        assert_eq!(bytes(3 << 20), "3.0 MiB");
        for (size, text) in [
            (0, "0B"),
            (423, "423B"),
            (1000, "1kB"),
            (1_059_321, "1.059MB"),
            (364_500, "364.5kB"),
            (20_000_000, "20MB"),
        ] {
            assert_eq!(decimal_bytes(size), text);
        }
        let ago = |seconds| {
            let time = std::time::SystemTime::now() - std::time::Duration::from_secs(seconds);
            age(Some(&proto::time::timestamp(time)))
        };
        assert_eq!(ago(61), "About a minute");
        assert_eq!(ago(7300), "2 hours");
        assert_eq!(age(None), "-");
        assert_eq!(time(Some(&Timestamp { seconds: 0, nanos: 0 })), "1970-01-01T00:00:00Z");
    }
}
