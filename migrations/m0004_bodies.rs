//! Schema 4: settled transactions in two trees. Frozen: it spells out its own names and bytes.
//!
//! - New tree `bodies`: records under a number that rises (`u64 BE`), `body || proof`.
//! - A row of `transactions` (key `txid`) is `settled [u8; 20] || number u64`. In schema 3 it
//!   was a record `settled || body || proof`, with rows `txid || part u16 BE`.
//!
//! A record's rows have the keys `key || part u16 BE`, and values that begin with the number
//! of parts (`u16 BE`); a part has at most 7,168 bytes.
//!
//! All of it is one transaction, so it takes memory for all that it changes. No schema
//! before this one was released.

use crate::db::{FrozenRow, FrozenRows};

const PART_BYTES: usize = 7 * 1024;
const SETTLED_BYTES: usize = 8 + 4 + 8;

/// What it writes and removes, atomically with its stamp, from all rows of `transactions`;
/// `None` if one of them is not what schema 3 wrote.
pub(crate) fn rows(transactions: FrozenRows) -> Option<Vec<FrozenRow>> {
    let mut out: Vec<FrozenRow> = Vec::new();
    let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    for (key, row) in transactions {
        let (txid, part) = key.split_at_checked(32)?;
        let rest = row.get(2..)?;
        match (part, records.last_mut()) {
            ([0, 0], _) => records.push((txid.to_vec(), rest.to_vec())),
            (_, Some((open, record))) if open == txid => record.extend_from_slice(rest),
            _ => return None,
        }
        out.push(("transactions", key, None));
    }
    for (number, (txid, record)) in (0_u64..).zip(records) {
        let (settled, body) = record.split_at_checked(SETTLED_BYTES)?;
        out.push(("transactions", txid, Some([settled, &number.to_le_bytes()].concat())));
        let parts = u16::try_from(body.len().div_ceil(PART_BYTES).max(1)).ok()?;
        for (part, chunk) in (0..parts).zip(body.chunks(PART_BYTES)) {
            let key = [number.to_be_bytes().as_slice(), &part.to_be_bytes()].concat();
            out.push(("bodies", key, Some([&parts.to_be_bytes(), chunk].concat())));
        }
    }
    out.push(("meta", b"schema".to_vec(), Some(4_u32.to_le_bytes().to_vec())));
    Some(out)
}
