//! Schema 3: the fence, pruning, and records of commits. Frozen: it spells out its own names
//! and bytes.
//!
//! - New tree, empty: `fence` (key `txid || vout (u32 BE)`, empty value). New rows of `meta`
//!   come with their first use: `fence` where votes were lost, `pruned` where something was
//!   pruned; their absence says that there was neither.
//! - `locks` and `certificates` have a record for each commit (key `commit u64 BE`), which is
//!   a list: `u64` count, then the items as schema 2 wrote them. What was in flight comes
//!   into the record of commit 0.
//! - A record of `transactions` is `settled [u8; 20] || body || proof`, the proof being a
//!   zero byte, or a one and F(T), which stood in `certificates` under `txid || 1`. Schema 2
//!   wrote `body || settled`. Where a block settled a transaction before its F(T) came, C(T)
//!   stood there: that is no proof, and the block is one.
//! - A row of `confirmed` is `height u64 || confirmed_at i64`; it was `height u64`. The time
//!   stood, and still stands, in the states of the outputs that the transaction spent.
//! - An output that is locked is stored as unspent: that it is locked follows from `locks`.
//!
//! A record's rows have the keys `key || part u16 BE`, and values that begin with the number
//! of parts (`u16 BE`); a part has at most 7,168 bytes.
//!
//! All of it is one transaction, so it takes memory for all that it changes. No schema
//! before this one was released.

use std::collections::{BTreeMap, BTreeSet};

use crate::db::FrozenRow;

const PART_BYTES: usize = 7 * 1024;
/// Of a row of `utxos`: amount, network, address payload; the state follows.
const STATE_AT: usize = 8 + 4 + 21;
/// The number of the state `Locked { txid, locked_at i64 }`.
const LOCKED: [u8; 4] = 1_u32.to_le_bytes();
/// The number of the state `Confirmed { txid, block_height u64, confirmed_at i64 }`.
const CONFIRMED: [u8; 4] = 3_u32.to_le_bytes();
/// How a certificate begins that is F(T): with `Commit`, its kind.
const PROOF: [u8; 4] = 1_u32.to_le_bytes();
/// Of a record of `transactions` in schema 2: the summary at its end.
const SETTLED_BYTES: usize = 8 + 4 + 8;

/// The rows of a tree, in order of key.
pub(crate) type Rows = BTreeMap<Vec<u8>, Vec<u8>>;

/// What it writes and removes, atomically with its stamp; `None` if a row is not what schema
/// 2 wrote. `read` gives all rows of a tree.
pub(crate) fn rows<E>(read: impl Fn(&'static str) -> Result<Rows, E>) -> Result<Option<Vec<FrozenRow>>, E> {
    let mut out = Vec::new();
    let (locks, certificates, bodies) = (read("locks")?, read("certificates")?, read("transactions")?);
    for (tree, rows) in [("locks", &locks), ("certificates", &certificates), ("transactions", &bodies)] {
        out.extend(rows.keys().map(|key| (tree, key.clone(), None)));
    }
    let (Some(locks), Some(certificates), Some(bodies)) = (records(&locks), records(&certificates), records(&bodies))
    else {
        return Ok(None);
    };
    let (mut proofs, mut kept) = (BTreeMap::new(), Vec::new());
    for (key, certificate) in certificates {
        let Some((txid, slot)) = key.split_at_checked(32) else { return Ok(None) };
        if bodies.contains_key(txid) {
            if slot == [1] && certificate.starts_with(&PROOF) {
                proofs.insert(txid.to_vec(), certificate);
            }
        } else if locks.contains_key(txid) {
            kept.push(certificate);
        }
    }
    for (txid, record) in bodies {
        let Some(at) = record.len().checked_sub(SETTLED_BYTES) else { return Ok(None) };
        let (body, settled) = record.split_at(at);
        let mut record = [settled, body].concat();
        match proofs.get(&txid) {
            Some(proof) => {
                record.push(1);
                record.extend_from_slice(proof);
            }
            None => record.push(0),
        }
        out.extend(parts("transactions", &txid, &record));
    }
    out.extend(list("locks", locks.into_values().collect()));
    out.extend(list("certificates", kept));
    let utxos = read("utxos")?;
    let times: BTreeMap<&[u8], &[u8]> = utxos.values().filter_map(|row| confirmed_by(row)).collect();
    for (txid, height) in read("confirmed")? {
        // Every transaction spends something.
        let Some(time) = times.get(txid.as_slice()) else { return Ok(None) };
        out.push(("confirmed", txid, Some([&height, *time].concat())));
    }
    for (outpoint, mut row) in utxos {
        if row.get(STATE_AT..).is_some_and(|state| state.starts_with(&LOCKED)) {
            row.truncate(STATE_AT);
            row.extend_from_slice(&0_u32.to_le_bytes());
            out.push(("utxos", outpoint, Some(row)));
        }
    }
    out.push(("meta", b"schema".to_vec(), Some(3_u32.to_le_bytes().to_vec())));
    // What is written after it was removed stays: one row, the last word.
    let mut seen = BTreeSet::new();
    out.reverse();
    out.retain(|(tree, key, _)| seen.insert((*tree, key.clone())));
    Ok(Some(out))
}

/// The transaction that has spent this output in a block, and the time at which this node
/// executed that.
fn confirmed_by(row: &[u8]) -> Option<(&[u8], &[u8])> {
    let (txid, rest) = row.get(STATE_AT..)?.strip_prefix(&CONFIRMED)?.split_at_checked(32)?;
    Some((txid, rest.get(8..16)?))
}

/// The records of a tree, put together from their parts.
fn records(rows: &Rows) -> Option<BTreeMap<Vec<u8>, Vec<u8>>> {
    let mut records: BTreeMap<Vec<u8>, Vec<u8>> = BTreeMap::new();
    for (key, row) in rows {
        let (key, _) = key.split_at_checked(key.len().checked_sub(2)?)?;
        records.entry(key.to_vec()).or_default().extend_from_slice(row.get(2..)?);
    }
    Some(records)
}

fn list(tree: &'static str, items: Vec<Vec<u8>>) -> Vec<FrozenRow> {
    if items.is_empty() {
        return Vec::new();
    }
    let mut record = (items.len() as u64).to_le_bytes().to_vec();
    items.iter().for_each(|item| record.extend_from_slice(item));
    parts(tree, &0_u64.to_be_bytes(), &record)
}

fn parts(tree: &'static str, key: &[u8], record: &[u8]) -> Vec<FrozenRow> {
    let count = u16::try_from(record.len().div_ceil(PART_BYTES).max(1)).unwrap_or(u16::MAX);
    let part = |(n, chunk): (u16, &[u8])| {
        let key = [key, &n.to_be_bytes()].concat();
        (tree, key, Some([&count.to_be_bytes(), chunk].concat()))
    };
    (0..).zip(record.chunks(PART_BYTES)).map(part).collect()
}
