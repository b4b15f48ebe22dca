//! Which rows there are in the trees that a member's votes stand on, as one number.
//!
//! Damage to one stretch of sled's file can take rows away without a word. What most rows
//! say stands in others too, and a start compares them. But that this member voted to abort
//! a transaction, or what it last said of the next block, stands in one row only. So each
//! commit writes down how many such rows there are, and a sum over their keys; a start
//! counts them again. All of them together are few: they go when a transaction is settled
//! or a block decided.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::DatabaseError;
use super::codec::RowChange;
use super::schema::TreeId;
use super::store::Trees;

/// The trees whose rows are counted.
const TREES: [TreeId; 5] = [TreeId::Locks, TreeId::Votes, TreeId::Certificates, TreeId::Agreement, TreeId::Fence];

/// The number of rows, and the sum of hashes of their keys.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Kept {
    rows: u64,
    keys: u64,
}

impl Kept {
    /// Counts the rows that there are.
    pub(super) fn read(trees: &Trees) -> Result<Self, DatabaseError> {
        let mut kept = Self::default();
        for tree in TREES {
            for row in trees.get(tree).iter() {
                kept.add(tree, &row?.0);
            }
        }
        Ok(kept)
    }

    /// What it will be once these rows, in this order, are written.
    pub(super) fn after(mut self, trees: &Trees, rows: &[RowChange]) -> Result<Self, DatabaseError> {
        let mut touched: BTreeMap<(TreeId, &[u8]), bool> = BTreeMap::new();
        for row in rows.iter().filter(|row| TREES.contains(&row.tree)) {
            let place = (row.tree, row.key.as_slice());
            let is_there = match touched.get(&place) {
                Some(is_there) => *is_there,
                None => trees.get(row.tree).get(&row.key)?.is_some(),
            };
            let will_be = row.value.is_some();
            match (is_there, will_be) {
                (false, true) => self.add(row.tree, &row.key),
                (true, false) => self.remove(row.tree, &row.key),
                _ => {}
            }
            touched.insert(place, will_be);
        }
        Ok(self)
    }

    fn add(&mut self, tree: TreeId, key: &[u8]) {
        self.rows = self.rows.wrapping_add(1);
        self.keys = self.keys.wrapping_add(hash(tree, key));
    }

    fn remove(&mut self, tree: TreeId, key: &[u8]) {
        self.rows = self.rows.wrapping_sub(1);
        self.keys = self.keys.wrapping_sub(hash(tree, key));
    }
}

fn hash(tree: TreeId, key: &[u8]) -> u64 {
    let mut hasher = blake3::Hasher::new();
    hasher.update(&[tree as u8]).update(key);
    let mut first = [0; 8];
    first.copy_from_slice(&hasher.finalize().as_bytes()[..8]);
    u64::from_le_bytes(first)
}

#[cfg(test)]
mod tests {
    use super::super::MemoryDisk;
    use super::super::engine::{Engine, Tree};
    use super::*;

    fn row(tree: TreeId, key: &[u8], value: Option<&[u8]>) -> RowChange {
        RowChange { tree, key: key.to_vec(), value: value.map(<[u8]>::to_vec) }
    }

    #[test]
    fn what_is_followed_is_what_is_read() {
        let disk = MemoryDisk::new();
        let trees = Trees::new(|id| Tree::Memory(disk.clone(), id));
        let engine = Engine::Memory(disk);
        let batches = [
            vec![row(TreeId::Votes, b"1", Some(b"a")), row(TreeId::Utxos, b"1", Some(b"a"))],
            // Replaced, taken away and put back, taken away though it is not there.
            vec![row(TreeId::Votes, b"1", Some(b"b")), row(TreeId::Locks, b"1", Some(b"a"))],
            vec![row(TreeId::Votes, b"1", None), row(TreeId::Votes, b"1", Some(b"c")), row(TreeId::Fence, b"9", None)],
            vec![row(TreeId::Votes, b"2", Some(b"c")), row(TreeId::Votes, b"2", None), row(TreeId::Locks, b"1", None)],
        ];
        let mut kept = Kept::read(&trees).unwrap();
        for (rows, expected) in batches.into_iter().zip([1, 2, 2, 1]) {
            kept = kept.after(&trees, &rows).unwrap();
            engine.apply(&rows).unwrap();
            assert_eq!(kept, Kept::read(&trees).unwrap());
            assert_eq!(kept.rows, expected);
        }
        engine.apply(&[row(TreeId::Votes, b"1", None), row(TreeId::Locks, b"1", Some(b"a"))]).unwrap();
        assert_ne!(kept, Kept::read(&trees).unwrap(), "as many rows, and not the same");
    }
}
