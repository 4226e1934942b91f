//! Numbers that are given out once: `sequences NAMESPACE NAME`.

use super::{Read as _, Record, Transaction};
use crate::error::Result;

/// The number that was given out last.
#[derive(Clone, PartialEq, prost::Message)]
pub(super) struct SequenceRecord {
    #[prost(uint64, tag = "1")]
    last: u64,
}

impl Record for SequenceRecord {
    const TABLE: &'static str = "sequences";
}

/// Within a commit: the next number of a namespace's sequence, from 1 on.
pub fn next(txn: &mut Transaction, namespace: &str, name: &str) -> Result<u64> {
    let key = [namespace, name];
    let last = txn.get::<SequenceRecord>(&key)?.unwrap_or_default().last + 1;
    txn.put(&key, &SequenceRecord { last })?;
    Ok(last)
}
