//! The plain-file form of the database, to move it, to look into it, and to rebuild it from.
//!
//! ```text
//! {"gantry_metadata":1,"schema":1}                             first line
//! {"key":["containers","default","web"],"value":"<base64>"}    a record
//! {"records":1}                                                last line: a file without it was cut short
//! ```

use std::io::{BufRead, Write};
use std::path::Path;

use anyhow::{Context as _, bail};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use super::db::{Disk, SCHEMA_KEY, schema_version};
use super::{SCHEMA_VERSION, show_key};

/// The version of this file format.
const FORMAT: u32 = 1;

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Head {
    gantry_metadata: u32,
    schema: u32,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    key: Vec<String>,
    value: String,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tail {
    records: u64,
}

pub(super) fn export(dir: &Path, file: &mut dyn Write) -> anyhow::Result<u64> {
    if !dir.join("sled").exists() {
        bail!("there is no metadata in {}; is --root right?", dir.display());
    }
    let map = Disk::open(dir)?.load()?;
    let schema = map.get(SCHEMA_KEY).and_then(|value| schema_version(value)).unwrap_or(SCHEMA_VERSION);
    write_line(file, &Head { gantry_metadata: FORMAT, schema })?;
    let mut records = 0;
    for (key, value) in map.iter().filter(|(key, _)| &key[..] != SCHEMA_KEY) {
        let parts = key
            .split(|byte| *byte == 0)
            .map(|part| std::str::from_utf8(part).map(str::to_owned))
            .collect::<Result<_, _>>()
            .with_context(|| format!("the key {} is not UTF-8", show_key(key)))?;
        write_line(file, &Entry { key: parts, value: STANDARD.encode(value) })?;
        records += 1;
    }
    write_line(file, &Tail { records })?;
    file.flush().context("write the export")?;
    Ok(records)
}

fn write_line(file: &mut dyn Write, line: &impl Serialize) -> anyhow::Result<()> {
    let mut text = serde_json::to_vec(line)?;
    text.push(b'\n');
    file.write_all(&text).context("write the export")
}

pub(super) fn import(dir: &Path, file: &mut dyn BufRead) -> anyhow::Result<u64> {
    if dir.join("sled").exists() {
        bail!("{} holds metadata already; move that folder away first", dir.display());
    }
    let mut lines = file.lines().enumerate().map(|(index, line)| (index + 1, line));
    let mut next = move || -> anyhow::Result<Option<(usize, String)>> {
        lines
            .next()
            .map(|(number, line)| Ok((number, line.with_context(|| format!("read line {number}"))?)))
            .transpose()
    };
    let (_, first) = next()?.context("the file is empty; it must come from `gantryd metadata export`")?;
    let head: Head = serde_json::from_str(&first)
        .context("line 1 is not the head of an export; was it made by `gantryd metadata export`?")?;
    if head.gantry_metadata != FORMAT || head.schema == 0 || head.schema > SCHEMA_VERSION {
        bail!(
            "this export has format {} and schema {}, and this gantryd reads format {FORMAT} with schemas up to {SCHEMA_VERSION}",
            head.gantry_metadata,
            head.schema
        );
    }
    // Everything is read and checked before the database is made, so that a bad file leaves nothing.
    let mut batch = sled::Batch::default();
    let mut records = 0_u64;
    loop {
        let (number, line) =
            next()?.context("the file is cut short: its last line, {\"records\":N}, is missing")?;
        if let Ok(tail) = serde_json::from_str::<Tail>(&line) {
            if tail.records != records {
                bail!("the file says {} records and has {records}", tail.records);
            }
            break;
        }
        let entry: Entry =
            serde_json::from_str(&line).with_context(|| format!("line {number} is not a record"))?;
        let value = STANDARD
            .decode(&entry.value)
            .with_context(|| format!("line {number}: the value is not base64"))?;
        let (table, parts) =
            entry.key.split_first().with_context(|| format!("line {number}: the key is empty"))?;
        let parts: Vec<&str> = parts.iter().map(String::as_str).collect();
        batch.insert(super::encode_key(table, &parts)?, value);
        records += 1;
    }
    if next()?.is_some() {
        bail!("there are lines after the file's end mark");
    }
    batch.insert(SCHEMA_KEY, &head.schema.to_le_bytes());
    Disk::open(dir)?.apply(batch).with_context(|| format!("write the metadata in {}", dir.display()))?;
    Ok(records)
}
