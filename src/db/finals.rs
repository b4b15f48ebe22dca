//! Settled transactions: the body and the finality proof under a number that rises, which
//! stands with the outputs (see [`super::outputs`]).
//!
//! A txid is as good as random, so what stands under it goes into a different leaf of its
//! tree each time, and the larger the rows, the more of the tree has to come through the
//! cache for it. Bodies and proofs are large. Under a rising number they are always written
//! at the end of their tree, and what is far back is not touched again before it is pruned.
//! The proofs of one commit stand together, for they say much the same (see [`super::pack`]),
//! under the number of the first of them.

use std::borrow::Borrow;
use std::collections::BTreeMap;
use std::ops::Bound;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::DatabaseError;
use super::codec::{RowChange, get_record, put_list_records, put_record, split_row_key};
use super::engine::Tree;
use super::outputs::get_row;
use super::pack::StoredCertificates;
use super::recent::Bounded;
use super::recover::MAX_NUMBER;
use super::schema::{StoredFinal, StoredSettled, StoredTransaction, TreeId};
use super::store::Trees;
use crate::consensus::{Certificate, Finalized};
use crate::limits::{MAX_RECENT_PLACES, MAX_RECENT_PROOF_VOTES};
use crate::types::{OutPoint, Transaction, Txid};

/// Proofs of one record: reading one makes all of its paths again.
const PROOFS_IN_RECORD: usize = 64;

/// Writes what one commit settles, with the proofs; the first of them under `number`. That they
/// are settled, and under which number, is written with their outputs.
pub(super) fn put_finals<'a>(
    rows: &mut Vec<RowChange>,
    number: u64,
    finals: impl Iterator<Item = &'a Finalized>,
) -> Result<(), DatabaseError> {
    let finals: Vec<_> = finals.collect();
    put_bodies(rows, number, finals.iter().map(|finalized| finalized.transaction.as_ref()))?;
    for (first, together) in (number..).step_by(PROOFS_IN_RECORD).zip(finals.chunks(PROOFS_IN_RECORD)) {
        let proofs: Vec<&Certificate> = together.iter().filter_map(|f| f.certificate.as_deref()).collect();
        put_proofs(rows, first, &proofs)?;
    }
    Ok(())
}

/// Writes the bodies of settled transactions; the first of them under a number that none has had.
pub(super) fn put_bodies<'a>(
    rows: &mut Vec<RowChange>,
    first: u64,
    bodies: impl Iterator<Item = &'a Transaction>,
) -> Result<(), DatabaseError> {
    put_list_records(rows, TreeId::Transactions, first, bodies.map(StoredTransaction::of))
}

/// Writes the proofs of transactions from `first` on, if there are any.
pub(super) fn put_proofs<C: Borrow<Certificate>>(
    rows: &mut Vec<RowChange>,
    first: u64,
    proofs: &[C],
) -> Result<(), DatabaseError> {
    if proofs.is_empty() {
        return Ok(());
    }
    put_record(rows, TreeId::Proofs, &first.to_be_bytes(), &StoredCertificates::of(proofs))
}

/// What is remembered of a settled transaction beside its body.
pub(super) fn get_settled(trees: &Trees, txid: &Txid) -> Result<Option<StoredSettled>, DatabaseError> {
    Ok(get_row(trees, &OutPoint { txid: *txid, vout: 0 })?.and_then(|row| row.settled))
}

/// Whether a transaction is settled; cheaper than reading it.
pub(super) fn is_final(trees: &Trees, txid: &Txid) -> Result<bool, DatabaseError> {
    Ok(get_settled(trees, txid)?.is_some())
}

/// A settled transaction with its body.
pub(super) fn get_final(trees: &Trees, txid: &Txid) -> Result<Option<StoredFinal>, DatabaseError> {
    get_settled(trees, txid)?.map(|settled| with_body(trees.get(TreeId::Transactions), settled)).transpose()
}

/// What is remembered of a settled transaction, with its body.
pub(super) fn with_body(bodies: &Tree, settled: StoredSettled) -> Result<StoredFinal, DatabaseError> {
    let StoredSettled { settled, number } = settled;
    Ok(StoredFinal { settled, number, transaction: stored_body_at(bodies, number)? })
}

/// The body under a number.
pub(super) fn body_at(bodies: &Tree, number: u64) -> Result<Transaction, DatabaseError> {
    stored_body_at(bodies, number).map(StoredTransaction::into_transaction)
}

fn stored_body_at(bodies: &Tree, number: u64) -> Result<StoredTransaction, DatabaseError> {
    let missing = || DatabaseError::corrupt("transactions", format!("number {number} is missing"));
    let first = record_of(bodies, number)?.ok_or_else(missing)?;
    let record: Option<Vec<StoredTransaction>> = get_record(bodies, TreeId::Transactions, &first.to_be_bytes())?;
    let place = usize::try_from(number.saturating_sub(first)).unwrap_or(usize::MAX);
    record.and_then(|record| record.into_iter().nth(place)).ok_or_else(missing)
}

/// The number under which the record stands that has, or would have, this one.
pub(super) fn record_of(tree: &Tree, number: u64) -> Result<Option<u64>, DatabaseError> {
    let last = [number.to_be_bytes().as_slice(), &[0xff; 2]].concat();
    let before = tree.range(Bound::Unbounded, Bound::Included(last)).next_back().transpose()?;
    Ok(before.and_then(|(key, _)| number_of(&key)))
}

/// The number of the next body.
pub(super) fn next_number(bodies: &Tree) -> Result<u64, DatabaseError> {
    let Some((key, _)) = bodies.range(Bound::Unbounded, Bound::Unbounded).next_back().transpose()? else {
        return Ok(0);
    };
    let wrong = || DatabaseError::corrupt("transactions", "a key that none can have");
    let first = number_of(&key).filter(|number| *number < MAX_NUMBER).ok_or_else(wrong)?;
    let record: Option<Vec<StoredTransaction>> = get_record(bodies, TreeId::Transactions, &first.to_be_bytes())?;
    // A record without its first row is found by whoever reads it.
    Ok(first + record.map_or(1, |record| record.len() as u64))
}

fn number_of(key: &[u8]) -> Option<u64> {
    let (number, _) = split_row_key(key)?;
    Some(u64::from_be_bytes(number.try_into().ok()?))
}

/// Settled transactions and their proofs that were written lately. A payment's wallet is told
/// of it when it is final and once more when a block contains it, and then the feed looks for
/// whom the block concerns. Whoever reads an old proof mostly wants its neighbours next, while
/// the paths of a record are made for all of them at once: one such record is kept, too. A body
/// stays, and a proof never changes, it only goes; so what is here is never wrong.
#[derive(Debug)]
pub(super) struct RecentFinals {
    bodies: Mutex<Bounded<Txid, Arc<Transaction>>>,
    proofs: Mutex<Bounded<Txid, Arc<Certificate>>>,
    /// The proofs of the record that was read last, with the record's number.
    read: Mutex<(u64, Vec<Arc<Certificate>>)>,
}

impl Default for RecentFinals {
    fn default() -> Self {
        Self {
            bodies: Mutex::new(Bounded::new(MAX_RECENT_PLACES)),
            proofs: Mutex::new(Bounded::new(MAX_RECENT_PROOF_VOTES)),
            read: Mutex::default(),
        }
    }
}

impl RecentFinals {
    fn bodies(&self) -> MutexGuard<'_, Bounded<Txid, Arc<Transaction>>> {
        self.bodies.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn proofs(&self) -> MutexGuard<'_, Bounded<Txid, Arc<Certificate>>> {
        self.proofs.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes in what a commit settles, and forgets the proofs that it prunes.
    pub(super) fn follow(&self, finalized: &BTreeMap<Txid, Finalized>, pruned: &[Txid]) {
        let mut bodies = self.bodies();
        for (txid, Finalized { transaction, .. }) in finalized {
            bodies.insert(*txid, Arc::clone(transaction), places(transaction));
        }
        drop(bodies);
        let mut proofs = self.proofs();
        pruned.iter().for_each(|txid| proofs.remove(txid));
        for proof in finalized.values().filter_map(|finalized| finalized.certificate.as_ref()) {
            proofs.insert(proof.txid, Arc::clone(proof), proof.votes.len());
        }
    }

    /// The body of a settled transaction. What is read for it is not kept: whoever reads much
    /// that is old would drive out what is new.
    pub(super) fn body(&self, trees: &Trees, txid: &Txid) -> Result<Option<Arc<Transaction>>, DatabaseError> {
        if let Some(known) = self.bodies().get(txid) {
            return Ok(Some(Arc::clone(known)));
        }
        Ok(get_final(trees, txid)?.map(|stored| Arc::new(stored.transaction.into_transaction())))
    }

    /// The proof of a settled transaction, until it is pruned.
    pub(super) fn proof(&self, trees: &Trees, txid: &Txid) -> Result<Option<Arc<Certificate>>, DatabaseError> {
        if let Some(known) = self.proofs().get(txid) {
            return Ok(Some(Arc::clone(known)));
        }
        let Some(StoredSettled { number, .. }) = get_settled(trees, txid)? else { return Ok(None) };
        let Some(first) = proofs_of(trees, number)? else { return Ok(None) };
        let find = |proofs: &[Arc<Certificate>]| proofs.iter().find(|proof| proof.txid == *txid).cloned();
        let read = || self.read.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = Some(read()).filter(|read| read.0 == first).and_then(|read| find(&read.1)) {
            return Ok(Some(known));
        }
        let proofs: Vec<_> = proofs_at(trees, first)?.into_iter().map(Arc::new).collect();
        let found = find(&proofs);
        *read() = (first, proofs);
        Ok(found)
    }
}

/// How much a body weighs among those that are remembered: itself, and each place in it.
pub(super) fn places(body: &Transaction) -> usize {
    1 + body.inputs().len() + body.outputs().len()
}

/// Which record of proofs has, or had, that of the transaction with this number.
pub(super) fn proofs_of(trees: &Trees, number: u64) -> Result<Option<u64>, DatabaseError> {
    record_of(trees.get(TreeId::Proofs), number)
}

/// The proofs of one record.
pub(super) fn proofs_at(trees: &Trees, first: u64) -> Result<Vec<Certificate>, DatabaseError> {
    let stored: Option<StoredCertificates> =
        get_record(trees.get(TreeId::Proofs), TreeId::Proofs, &first.to_be_bytes())?;
    stored.map_or(Ok(Vec::new()), |stored| stored.into_certificates(TreeId::Proofs))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::MemoryDisk;
    use crate::db::engine::Engine;
    use crate::db::samples::{genesis, spend};
    use crate::limits::MAX_ROW_BYTES;

    /// A body of so many inputs.
    fn body(inputs: usize, timestamp: i64) -> Transaction {
        let (coin, _) = genesis().transaction().creates().next().unwrap();
        let one = spend(coin, 1);
        Transaction::from_parts(vec![one.inputs()[0].clone(); inputs], one.outputs().to_vec(), timestamp)
    }

    #[test]
    fn each_body_is_found_under_its_number() {
        let disk = MemoryDisk::new();
        let (tree, engine) = (Tree::Memory(disk.clone(), TreeId::Transactions), Engine::Memory(disk.clone()));
        assert_eq!(next_number(&tree).unwrap(), 0);
        let sizes = [1; 70].into_iter().chain([256, 1, 1, 40, 40, 1, 256, 256, 1]);
        let bodies: Vec<Transaction> = sizes.zip(0..).map(|(inputs, time)| body(inputs, time)).collect();
        // What two commits settle.
        for (first, of_commit) in [(0, &bodies[..50]), (50, &bodies[50..])] {
            let mut rows = Vec::new();
            put_bodies(&mut rows, first, of_commit.iter()).unwrap();
            assert!(rows.iter().all(|row| row.value.as_ref().unwrap().len() <= MAX_ROW_BYTES + 2));
            engine.apply(&rows).unwrap();
            assert_eq!(next_number(&tree).unwrap(), first + of_commit.len() as u64);
        }
        for (number, body) in (0..).zip(&bodies) {
            assert_eq!(body_at(&tree, number).unwrap(), *body);
        }
        body_at(&tree, bodies.len() as u64).unwrap_err();
        let rows = disk.raw_rows("transactions").unwrap();
        let large = 3 * (256 * 132_usize).div_ceil(MAX_ROW_BYTES);
        assert!(rows.len() < large + 12, "small ones share a row: {}", rows.len());
        let mut none = Vec::new();
        put_bodies(&mut none, 7, std::iter::empty()).unwrap();
        assert_eq!(none, []);
    }
}
