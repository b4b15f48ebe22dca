//! Schema 3: the fence and pruning. Frozen: it spells out its own names and bytes.
//!
//! New tree, empty: `fence` (key `txid || vout (u32 BE)`, empty value). New rows of `meta`
//! come with their first use: `fence` where votes were lost, `pruned` where something was
//! pruned; their absence says that there was neither.

use crate::db::FrozenRow;

/// What it writes: its stamp.
pub(crate) fn rows() -> Vec<FrozenRow> {
    vec![("meta", b"schema".to_vec(), 3_u32.to_le_bytes().to_vec())]
}
