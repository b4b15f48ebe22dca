//! Schema 2: blocks. Frozen: it spells out its own names and bytes.
//!
//! New trees, empty: `blocks`, `confirmed`, `dead`, `agreement`. New row of `meta`:
//! `chain`, bincode of `(height u64 = 0, hash [u8; 32] = genesis hash, timestamp_ms u64 =
//! 0, supply u64, unconfirmed_from u64 = 1, lanes: u64 count = 1024, u16 each)`: the chain
//! before its first block. Whatever the log holds as final is not in the chain.

use crate::db::FrozenRow;
use crate::types::{Genesis, UtxoDigest};

/// What it writes, atomically with its stamp.
pub(crate) fn rows(genesis: &Genesis) -> Vec<FrozenRow> {
    let mut digest = UtxoDigest::new();
    for (outpoint, output) in genesis.transaction().creates() {
        digest.add(&outpoint, &output);
    }
    let supply: u64 = genesis.transaction().outputs().iter().map(|output| output.amount.units()).sum();
    let mut row = Vec::with_capacity(64 + 2 * digest.lanes().len());
    row.extend_from_slice(&0_u64.to_le_bytes());
    row.extend_from_slice(genesis.hash().as_bytes());
    row.extend_from_slice(&0_u64.to_le_bytes());
    row.extend_from_slice(&supply.to_le_bytes());
    row.extend_from_slice(&1_u64.to_le_bytes());
    row.extend_from_slice(&(digest.lanes().len() as u64).to_le_bytes());
    for lane in digest.lanes() {
        row.extend_from_slice(&lane.to_le_bytes());
    }
    let schema = 2_u32.to_le_bytes().to_vec();
    vec![("meta", b"chain".to_vec(), Some(row)), ("meta", b"schema".to_vec(), Some(schema))]
}
