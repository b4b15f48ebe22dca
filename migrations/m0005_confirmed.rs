//! Schema 5: the blocks of settled transactions under their numbers. Frozen: it spells out
//! its own names and bytes.
//!
//! A row of `confirmed` has the key `number / 64 (u64 BE) || height (u64 BE)` and the value
//! `count u64`, then `confirmed_at i64 || bits u64` each, in order of time: bit `n` stands for
//! the transaction with the number `64 * (number / 64) + n`. In schema 4 there was a row
//! `txid` for each, with the value `height u64 || confirmed_at i64`; a transaction's number is
//! the last `u64` of its row of `transactions`.
//!
//! All of it is one transaction, so it takes memory for all that it changes. No schema
//! before this one was released.

use std::collections::BTreeMap;

use crate::db::{FrozenRow, FrozenRows};

const STRETCH: u64 = 64;

/// What it writes and removes, atomically with its stamp; `None` if a row is not what schema
/// 4 wrote. `read` gives all rows of a tree.
pub(crate) fn rows<E>(read: impl Fn(&'static str) -> Result<FrozenRows, E>) -> Result<Option<Vec<FrozenRow>>, E> {
    let (transactions, confirmed) = (read("transactions")?, read("confirmed")?);
    Ok(from(&transactions, &confirmed))
}

fn from(transactions: &FrozenRows, confirmed: &FrozenRows) -> Option<Vec<FrozenRow>> {
    let mut stretches: BTreeMap<[[u8; 8]; 2], BTreeMap<i64, u64>> = BTreeMap::new();
    for (txid, row) in confirmed {
        let (_, number) = transactions.get(txid)?.split_last_chunk()?;
        let number = u64::from_le_bytes(*number);
        let (height, confirmed_at) = row.split_first_chunk()?;
        let height = u64::from_le_bytes(*height).to_be_bytes();
        let confirmed_at = i64::from_le_bytes(confirmed_at.try_into().ok()?);
        let stretch = stretches.entry([(number / STRETCH).to_be_bytes(), height]).or_default();
        *stretch.entry(confirmed_at).or_default() |= 1 << (number % STRETCH);
    }
    let mut out: Vec<FrozenRow> = confirmed.keys().map(|txid| ("confirmed", txid.clone(), None)).collect();
    for (key, times) in stretches {
        let mut value = u64::try_from(times.len()).ok()?.to_le_bytes().to_vec();
        for (confirmed_at, bits) in times {
            value.extend(confirmed_at.to_le_bytes());
            value.extend(bits.to_le_bytes());
        }
        out.push(("confirmed", key.concat(), Some(value)));
    }
    out.push(("meta", b"schema".to_vec(), Some(5_u32.to_le_bytes().to_vec())));
    Some(out)
}
