//! In which block each settled transaction is.
//!
//! A block confirms what became final shortly before it, whose numbers stand close together.
//! So it is not written under each txid, as good as random, but once for each stretch of
//! numbers that the block has a part of: a row of a few bytes for up to 64 transactions, which
//! no later block touches.

use std::collections::BTreeMap;
use std::ops::Bound;

use serde::{Deserialize, Serialize};

use super::DatabaseError;
use super::codec::{RowChange, decode, encode};
use super::finals::get_settled;
use super::schema::{StoredSettled, TreeId};
use super::store::Trees;
use crate::types::{Height, Txid, UnixSeconds};

/// Numbers of one stretch: the bits of a row.
const STRETCH: u64 = u64::BITS as u64;

/// In which block a transaction is, and since when as this node sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct StoredConfirmed {
    pub(super) height: Height,
    pub(super) confirmed_at: UnixSeconds,
}

/// A row of `confirmed`: for each time at which the block was executed, which numbers of the
/// stretch it confirmed. There is one time, but for what was imported.
type Slots = Vec<(UnixSeconds, u64)>;

fn key(stretch: u64, height: Height) -> [u8; 16] {
    let mut key = [0; 16];
    key[..8].copy_from_slice(&stretch.to_be_bytes());
    key[8..].copy_from_slice(&height.to_be_bytes());
    key
}

/// How the keys begin that tell of a number.
pub(super) const fn stretch_of(number: u64) -> [u8; 8] {
    (number / STRETCH).to_be_bytes()
}

/// What blocks confirm, gathered until it is written; never of one block in two parts.
#[derive(Debug, Default)]
pub(super) struct Confirming(BTreeMap<(u64, Height), BTreeMap<UnixSeconds, u64>>);

impl Confirming {
    pub(super) fn add(&mut self, number: u64, confirmed: StoredConfirmed) {
        let StoredConfirmed { height, confirmed_at } = confirmed;
        let slots = self.0.entry((number / STRETCH, height)).or_default();
        *slots.entry(confirmed_at).or_default() |= 1 << (number % STRETCH);
    }

    pub(super) fn put(self, rows: &mut Vec<RowChange>) -> Result<(), DatabaseError> {
        for ((stretch, height), slots) in self.0 {
            let slots: Slots = slots.into_iter().collect();
            let value = Some(encode(TreeId::Confirmed, &slots)?);
            rows.push(RowChange { tree: TreeId::Confirmed, key: key(stretch, height).to_vec(), value });
        }
        Ok(())
    }
}

/// The block of the transaction that has this number.
pub(super) fn confirmed_by_number(trees: &Trees, number: u64) -> Result<Option<StoredConfirmed>, DatabaseError> {
    for row in trees.get(TreeId::Confirmed).scan_prefix(&stretch_of(number)) {
        let (key, value) = row?;
        let found = confirmed_of_row(&key, &value)?.into_iter().find(|(other, _)| *other == number);
        if let Some((_, confirmed)) = found {
            return Ok(Some(confirmed));
        }
    }
    Ok(None)
}

/// The block of a settled transaction.
pub(super) fn get_confirmed(trees: &Trees, txid: &Txid) -> Result<Option<StoredConfirmed>, DatabaseError> {
    match get_settled(trees, txid)? {
        Some(StoredSettled { number, .. }) => confirmed_by_number(trees, number),
        None => Ok(None),
    }
}

/// The highest number that a block has.
pub(super) fn last_confirmed(trees: &Trees) -> Result<Option<u64>, DatabaseError> {
    let tree = trees.get(TreeId::Confirmed);
    let Some((last, _)) = tree.range(Bound::Unbounded, Bound::Unbounded).next_back().transpose()? else {
        return Ok(None);
    };
    let mut highest = None;
    for row in tree.scan_prefix(last.get(..8).unwrap_or(&last)) {
        let (key, value) = row?;
        highest = highest.max(confirmed_of_row(&key, &value)?.into_iter().map(|(number, _)| number).max());
    }
    Ok(highest)
}

/// All that a row tells, in order of number within each time.
pub(super) fn confirmed_of_row(key: &[u8], value: &[u8]) -> Result<Vec<(u64, StoredConfirmed)>, DatabaseError> {
    let wrong = || DatabaseError::corrupt(TreeId::Confirmed.name(), "a key of the wrong length");
    let (stretch, height) = key.split_first_chunk().ok_or_else(wrong)?;
    let height = Height::from_be_bytes(height.try_into().map_err(|_| wrong())?);
    let first = u64::from_be_bytes(*stretch).checked_mul(STRETCH);
    let first = first.ok_or_else(|| DatabaseError::corrupt(TreeId::Confirmed.name(), "a number that none can have"))?;
    let slots: Slots = decode(TreeId::Confirmed, value)?;
    let taken = slots.into_iter().flat_map(|(confirmed_at, bits)| {
        let of_time = (0..STRETCH).filter(move |slot| bits >> slot & 1 == 1);
        of_time.map(move |slot| (first + slot, StoredConfirmed { height, confirmed_at }))
    });
    Ok(taken.collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_number_comes_back_with_its_block() {
        let confirmed = |height, confirmed_at| StoredConfirmed { height, confirmed_at };
        let all = [
            (0, confirmed(1, 5)),
            (63, confirmed(2, 6)),
            (64, confirmed(2, 6)),
            (65, confirmed(1, 5)),
            (66, confirmed(2, 7)),
            (u64::MAX, confirmed(u64::MAX, -1)),
        ];
        let mut confirming = Confirming::default();
        all.iter().for_each(|(number, confirmed)| confirming.add(*number, *confirmed));
        let mut rows = Vec::new();
        confirming.put(&mut rows).unwrap();
        assert_eq!(rows.len(), 5, "one for each stretch and block");
        let read = |row: &RowChange| confirmed_of_row(&row.key, row.value.as_deref().unwrap()).unwrap();
        let mut found: Vec<_> = rows.iter().flat_map(read).collect();
        found.sort_unstable();
        assert_eq!(found, all);
    }

    #[test]
    fn a_damaged_row_is_an_error() {
        let value = encode(TreeId::Confirmed, &vec![(0_i64, 1_u64)]).unwrap();
        assert!(confirmed_of_row(&[0; 16], &value).is_ok());
        for key in [&[0; 15][..], &[0; 17], &[0xff; 16]] {
            assert!(confirmed_of_row(key, &value).is_err());
        }
        assert!(confirmed_of_row(&[0; 16], &value[..9]).is_err());
    }
}
