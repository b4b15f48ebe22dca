//! Schema 4: settled transactions in three trees. Frozen: it spells out its own names and
//! bytes.
//!
//! - A row of `transactions` (key `txid`) is `settled [u8; 20] || number u64`. In schema 3 it
//!   was a record `settled || body || proof`, with rows `txid || part u16 BE`.
//! - New tree `bodies`: records under a number that rises (`u64 BE`), each a body.
//! - New tree `proofs`: records of finality proofs under the number of the first of their
//!   transactions. They begin with a `u32` that says how they are written; 0 is a list: `u64`
//!   count, then the certificates.
//! - A record of `certificates` begins with the same `u32`; in schema 3 it was the list.
//!
//! A record's rows have the keys `key || part u16 BE`, and values that begin with the number
//! of parts (`u16 BE`); a part has at most 7,168 bytes.
//!
//! All of it is one transaction, so it takes memory for all that it changes. No schema
//! before this one was released.

use crate::db::{FrozenRow, FrozenRows};

const PART_BYTES: usize = 7 * 1024;
const SETTLED_BYTES: usize = 8 + 4 + 8;
/// An outpoint, a key, a signature.
const INPUT_BYTES: usize = 32 + 4 + 32 + 64;
/// An amount, a network, an address payload.
const OUTPUT_BYTES: usize = 8 + 4 + 21;
const TIMESTAMP_BYTES: usize = 8;
/// How certificates are written: as a list.
const PLAIN: [u8; 4] = [0; 4];

/// What it writes and removes, atomically with its stamp; `None` if a row is not what schema
/// 3 wrote. `read` gives all rows of a tree.
pub(crate) fn rows<E>(read: impl Fn(&'static str) -> Result<FrozenRows, E>) -> Result<Option<Vec<FrozenRow>>, E> {
    let (transactions, certificates) = (read("transactions")?, read("certificates")?);
    Ok(from(transactions, certificates))
}

fn from(transactions: FrozenRows, certificates: FrozenRows) -> Option<Vec<FrozenRow>> {
    let mut out: Vec<FrozenRow> = transactions.keys().map(|key| ("transactions", key.clone(), None)).collect();
    for (number, (txid, record)) in (0_u64..).zip(records(transactions)?) {
        let (settled, rest) = record.split_at_checked(SETTLED_BYTES)?;
        let (body, proof) = rest.split_at_checked(body_bytes(rest)?)?;
        out.push(("transactions", txid, Some([settled, &number.to_le_bytes()].concat())));
        out.extend(parts("bodies", &number.to_be_bytes(), body)?);
        match proof {
            [0] => {}
            [1, proof @ ..] => {
                let list = [&PLAIN, 1_u64.to_le_bytes().as_slice(), proof].concat();
                out.extend(parts("proofs", &number.to_be_bytes(), &list)?);
            }
            _ => return None,
        }
    }
    // They become four bytes longer, which may make one row more of each, and none less.
    for (key, record) in records(certificates)? {
        out.extend(parts("certificates", &key, &[&PLAIN, record.as_slice()].concat())?);
    }
    // The count of rows may be another one now; the next commit writes it again.
    out.push(("meta", b"kept".to_vec(), None));
    out.push(("meta", b"schema".to_vec(), Some(4_u32.to_le_bytes().to_vec())));
    Some(out)
}

/// How long the body at the beginning of these bytes is.
fn body_bytes(bytes: &[u8]) -> Option<usize> {
    let list = |at: usize, item: usize| {
        let count = u64::from_le_bytes(bytes.get(at..)?.get(..8)?.try_into().ok()?);
        at.checked_add(8)?.checked_add(usize::try_from(count).ok()?.checked_mul(item)?)
    };
    list(list(0, INPUT_BYTES)?, OUTPUT_BYTES)?.checked_add(TIMESTAMP_BYTES)
}

/// The records of a tree, in order of key, put together from their parts.
fn records(rows: FrozenRows) -> Option<Vec<(Vec<u8>, Vec<u8>)>> {
    let mut records: Vec<(Vec<u8>, Vec<u8>)> = Vec::new();
    for (key, row) in rows {
        let (key, part) = key.split_at_checked(key.len().checked_sub(2)?)?;
        let rest = row.get(2..)?;
        match (part, records.last_mut()) {
            ([0, 0], _) => records.push((key.to_vec(), rest.to_vec())),
            (_, Some((open, record))) if open == key => record.extend_from_slice(rest),
            _ => return None,
        }
    }
    Some(records)
}

fn parts(tree: &'static str, key: &[u8], record: &[u8]) -> Option<Vec<FrozenRow>> {
    let count = u16::try_from(record.len().div_ceil(PART_BYTES).max(1)).ok()?;
    let part = |(n, chunk): (u16, &[u8])| {
        let key = [key, &n.to_be_bytes()].concat();
        (tree, key, Some([&count.to_be_bytes(), chunk].concat()))
    };
    Some((0..count).zip(record.chunks(PART_BYTES)).map(part).collect())
}
