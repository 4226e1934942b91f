//! Records of namespaces: `namespaces NAME`. A namespace comes to be when it is created, or with its first record.

use std::collections::BTreeMap;

use super::{Read as _, Record, Transaction};
use crate::error::Result;

/// A namespace.
#[derive(Clone, PartialEq, prost::Message)]
pub struct NamespaceRecord {
    /// Its labels.
    #[prost(btree_map = "string, string", tag = "1")]
    pub labels: BTreeMap<String, String>,
}

impl Record for NamespaceRecord {
    const TABLE: &'static str = "namespaces";
    const NAMESPACED: bool = false;
}

/// Makes the namespace when it is not there.
pub(super) fn ensure(transaction: &mut Transaction, name: &str) -> Result<()> {
    if transaction.has::<NamespaceRecord>(&[name])? {
        return Ok(());
    }
    transaction.put(&[name], &NamespaceRecord::default())
}
