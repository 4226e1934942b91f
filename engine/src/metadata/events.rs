//! What the journal of events must not lose with its files: `events journal`.

use super::{Metadata, Read as _, Record};
use crate::error::Result;

const KEY: &[&str] = &["journal"];

#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct JournalRecord {
    /// No event has this number or a higher one.
    #[prost(uint64, tag = "1")]
    reserved: u64,
}

impl Record for JournalRecord {
    const TABLE: &'static str = "events";
    const NAMESPACED: bool = false;
}

/// The number from which on none has been given to an event; 0 when none has.
pub fn reserved(metadata: &Metadata) -> Result<u64> {
    Ok(metadata.view().get::<JournalRecord>(KEY)?.unwrap_or_default().reserved)
}

/// Notes that numbers below this one may have been given. Blocks.
pub fn reserve(metadata: &Metadata, reserved: u64) -> Result<()> {
    metadata.commit_blocking(move |txn| txn.put(KEY, &JournalRecord { reserved }))
}
