//! What the ledger thread wrote or looked for lately, in memory.
//!
//! A payment is looked at a dozen times between its coming and its block: by copies of its
//! body, by votes, by the proposals and the execution of a block. Only the first look at a
//! coin, or at a transaction that nobody knows, has to go to the trees. What is remembered
//! is bounded, the oldest is forgotten first, and whatever is not here is read from the
//! trees, so nothing depends on it but speed. A test build reads both and compares.

use std::cell::RefCell;
use std::collections::{BTreeMap, HashMap, VecDeque};
use std::hash::Hash;
use std::sync::{Arc, PoisonError, RwLock};

use super::DatabaseError;
use super::codec::RowChange;
use super::finals::places;
use super::outputs::{OutputRow, get_row, row_of, utxo_of};
use super::schema::{StoredFinal, StoredSettled, TreeId};
use super::store::{Reader, Trees};
use crate::consensus::{Changes, Dead, Utxo};
use crate::limits::{MAX_RECENT_OUTPUT_ROWS, MAX_RECENT_OUTPUTS, MAX_RECENT_PLACES};
use crate::types::{OutPoint, Transaction, Txid};

/// A map that forgets what came first when it weighs too much.
#[derive(Debug)]
pub(super) struct Bounded<K, V> {
    values: HashMap<K, (V, usize)>,
    order: VecDeque<K>,
    weight: usize,
    most: usize,
}

impl<K: Hash + Eq + Copy, V> Bounded<K, V> {
    pub(super) fn new(most: usize) -> Self {
        Self { values: HashMap::new(), order: VecDeque::new(), weight: 0, most }
    }

    pub(super) fn get(&self, key: &K) -> Option<&V> {
        self.values.get(key).map(|(value, _)| value)
    }

    pub(super) fn insert(&mut self, key: K, value: V, weight: usize) {
        self.weight += weight;
        match self.values.insert(key, (value, weight)) {
            Some((_, before)) => self.weight -= before,
            None => self.order.push_back(key),
        }
        while self.weight > self.most || self.order.len() > self.most {
            let Some(oldest) = self.order.pop_front() else { break };
            self.remove(&oldest);
        }
    }

    pub(super) fn remove(&mut self, key: &K) {
        if let Some((_, weight)) = self.values.remove(key) {
            self.weight -= weight;
        }
    }
}

/// Outputs that the writer made, spent or looked for lately, as of the last durable commit. All
/// threads may read it, and wait for no transaction of sled's.
#[derive(Debug)]
pub(super) struct RecentOutputs(RwLock<Bounded<OutPoint, Option<Utxo>>>);

impl RecentOutputs {
    pub(super) fn new() -> Self {
        Self(RwLock::new(Bounded::new(MAX_RECENT_OUTPUTS)))
    }

    /// The output at a place, `Some(None)` if it never came into being.
    fn get(&self, outpoint: &OutPoint) -> Option<Option<Utxo>> {
        self.0.read().unwrap_or_else(PoisonError::into_inner).get(outpoint).copied()
    }

    /// All of them as of one commit, if all are remembered.
    pub(super) fn get_all(&self, outpoints: &[OutPoint]) -> Option<Vec<Option<Utxo>>> {
        let outputs = self.0.read().unwrap_or_else(PoisonError::into_inner);
        outpoints.iter().map(|outpoint| outputs.get(outpoint).copied()).collect()
    }

    /// Remembers what the writer has read between two commits.
    fn insert(&self, outpoint: OutPoint, utxo: Option<Utxo>) {
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(outpoint, utxo, 1);
    }

    /// Takes in what has just become durable. Nobody reads in here until `publish` has told
    /// everybody of it: who learns of a commit from the one must not be contradicted by the other.
    pub(super) fn follow(&self, changes: &Changes, publish: impl FnOnce()) {
        let mut outputs = self.0.write().unwrap_or_else(PoisonError::into_inner);
        for (outpoint, utxo) in &changes.utxos {
            outputs.insert(*outpoint, Some(*utxo), 1);
        }
        publish();
    }
}

/// What has become of a transaction.
#[derive(Debug, Clone)]
enum Fate {
    /// It is neither settled nor dead.
    Open,
    Settled {
        stored: StoredSettled,
        body: Option<Arc<Transaction>>,
    },
    Dead(Dead),
}

#[derive(Debug)]
struct Tables {
    /// Rows of outputs, by the first of each: whoever spends one writes its row anew.
    rows: Bounded<OutPoint, OutputRow>,
    fates: Bounded<Txid, Fate>,
    /// Whether anything ever died here. In most networks nothing has, and an empty tree need
    /// not be asked.
    has_dead: bool,
    /// The same for what is behind a fence.
    has_fenced: bool,
}

/// What is remembered beside the outputs. Belongs to the writer; readers of other threads never
/// see it.
#[derive(Debug)]
pub(super) struct Recent(RefCell<Tables>);

impl Recent {
    pub(super) fn new(trees: &Trees) -> Result<Self, DatabaseError> {
        let (rows, fates) = (Bounded::new(MAX_RECENT_OUTPUT_ROWS), Bounded::new(MAX_RECENT_PLACES));
        let has_dead = trees.get(TreeId::Dead).first()?.is_some();
        let has_fenced = trees.get(TreeId::Fence).first()?.is_some();
        Ok(Self(RefCell::new(Tables { rows, fates, has_dead, has_fenced })))
    }

    /// Takes in what has just been applied; the first body of it under this number.
    pub(super) fn follow(
        &mut self,
        changes: &Changes,
        output_rows: BTreeMap<OutPoint, OutputRow>,
        written: &[RowChange],
        first_number: u64,
    ) {
        let Tables { rows, fates, has_dead, has_fenced } = self.0.get_mut();
        for (first, row) in output_rows {
            rows.insert(first, row, 1);
        }
        for ((txid, finalized), number) in changes.finalized.iter().zip(first_number..) {
            let body = Arc::clone(&finalized.transaction);
            let (weight, stored) = (places(&body), StoredSettled { settled: finalized.settled, number });
            fates.insert(*txid, Fate::Settled { stored, body: Some(body) }, weight);
        }
        for (txid, dead) in &changes.dead {
            fates.insert(*txid, Fate::Dead(*dead), 1);
        }
        for row in written {
            match (row.tree, &row.value) {
                (TreeId::Dead, Some(_)) => *has_dead = true,
                (TreeId::Fence, Some(_)) => *has_fenced = true,
                _ => {}
            }
        }
    }

    pub(super) fn utxo(&self, reader: &Reader, outpoint: &OutPoint) -> Result<Option<Utxo>, DatabaseError> {
        if let Some(known) = reader.shared.outputs.get(outpoint) {
            debug_assert_eq!(known, reader.utxo(outpoint)?, "{outpoint:?}");
            return Ok(known);
        }
        let stored = self.row(reader, &row_of(outpoint))?.and_then(|row| row.get(outpoint).copied());
        let lock = reader.lock(outpoint);
        let utxo = stored.map(|stored| utxo_of(&reader.shared.trees, &stored, lock)).transpose()?.flatten();
        reader.shared.outputs.insert(*outpoint, utxo);
        Ok(utxo)
    }

    /// The row that begins with this output.
    pub(super) fn row(&self, reader: &Reader, first: &OutPoint) -> Result<Option<OutputRow>, DatabaseError> {
        if let Some(known) = self.0.borrow().rows.get(first) {
            debug_assert_eq!(Some(known), get_row(&reader.shared.trees, first)?.as_ref(), "{first:?}");
            return Ok(Some(known.clone()));
        }
        let row = get_row(&reader.shared.trees, first)?;
        if let Some(row) = &row {
            self.0.borrow_mut().rows.insert(*first, row.clone(), 1);
        }
        Ok(row)
    }

    fn read_dead(&self, reader: &Reader, txid: &Txid) -> Result<Option<Dead>, DatabaseError> {
        let none = !self.0.borrow().has_dead;
        debug_assert!(!none || reader.dead(txid)?.is_none(), "{txid} is dead");
        if none { Ok(None) } else { reader.dead(txid) }
    }

    pub(super) fn is_fenced(&self, reader: &Reader, outpoint: &OutPoint) -> Result<bool, DatabaseError> {
        let none = !self.0.borrow().has_fenced;
        debug_assert!(!none || !reader.is_fenced(outpoint)?, "{outpoint:?} is fenced");
        Ok(!none && reader.is_fenced(outpoint)?)
    }

    fn fate(&self, reader: &Reader, txid: &Txid) -> Result<Fate, DatabaseError> {
        if let Some(known) = self.0.borrow().fates.get(txid) {
            #[cfg(debug_assertions)]
            match known {
                Fate::Settled { stored, .. } => assert_eq!(Some(*stored), reader.stored_settled(txid)?, "{txid}"),
                Fate::Dead(dead) => assert_eq!(Some(*dead), reader.dead(txid)?, "{txid}"),
                Fate::Open => assert!(!reader.is_final(txid)? && reader.dead(txid)?.is_none(), "{txid}"),
            }
            return Ok(known.clone());
        }
        let fate = match (reader.stored_settled(txid)?, self.read_dead(reader, txid)?) {
            (Some(stored), _) => Fate::Settled { stored, body: None },
            (None, Some(dead)) => Fate::Dead(dead),
            (None, None) => Fate::Open,
        };
        self.0.borrow_mut().fates.insert(*txid, fate.clone(), 1);
        Ok(fate)
    }

    /// Whether a transaction is neither settled nor dead. One that is settled has spent its
    /// inputs, and they are looked up anyhow.
    pub(super) fn is_open(&self, reader: &Reader, transaction: &Transaction) -> Result<bool, DatabaseError> {
        let txid = transaction.txid();
        let known = self.0.borrow().fates.get(&txid).is_some();
        if let (false, Some(input)) = (known, transaction.spends().next()) {
            let live = self.utxo(reader, &input)?.is_some_and(|utxo| utxo.state.is_live());
            if live && self.read_dead(reader, &txid)?.is_none() {
                debug_assert!(!reader.is_final(&txid)?, "{txid} is settled, and {input:?} is live");
                self.0.borrow_mut().fates.insert(txid, Fate::Open, 1);
                return Ok(true);
            }
        }
        Ok(matches!(self.fate(reader, &txid)?, Fate::Open))
    }

    pub(super) fn settled(&self, reader: &Reader, txid: &Txid) -> Result<Option<StoredSettled>, DatabaseError> {
        Ok(match self.fate(reader, txid)? {
            Fate::Settled { stored, .. } => Some(stored),
            Fate::Open | Fate::Dead(_) => None,
        })
    }

    pub(super) fn dead(&self, reader: &Reader, txid: &Txid) -> Result<Option<Dead>, DatabaseError> {
        Ok(match self.fate(reader, txid)? {
            Fate::Dead(dead) => Some(dead),
            Fate::Open | Fate::Settled { .. } => None,
        })
    }

    pub(super) fn body(&self, reader: &Reader, txid: &Txid) -> Result<Option<Arc<Transaction>>, DatabaseError> {
        match self.fate(reader, txid)? {
            Fate::Settled { body: Some(body), .. } => return Ok(Some(body)),
            Fate::Settled { body: None, .. } => {}
            Fate::Open | Fate::Dead(_) => return Ok(None),
        }
        let Some(StoredFinal { settled, number, transaction }) = reader.stored_final(txid)? else { return Ok(None) };
        let body = Arc::new(transaction.into_transaction());
        let fate = Fate::Settled { stored: StoredSettled { settled, number }, body: Some(Arc::clone(&body)) };
        self.0.borrow_mut().fates.insert(*txid, fate, places(&body));
        Ok(Some(body))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_oldest_is_forgotten_when_it_weighs_too_much() {
        let mut bounded = Bounded::new(10);
        for key in 0..5 {
            bounded.insert(key, key, 2);
        }
        bounded.insert(1, 7, 3);
        assert_eq!((bounded.get(&0), bounded.get(&1), bounded.weight), (None, Some(&7), 9));
        bounded.remove(&1);
        bounded.insert(9, 9, 4);
        assert_eq!((bounded.get(&1), bounded.weight), (None, 10));
        // What weighs more than everything is not kept either.
        bounded.insert(8, 8, 11);
        assert_eq!((bounded.values.len(), bounded.weight, bounded.order.len()), (0, 0, 0));
    }

    #[test]
    fn keys_that_come_and_go_do_not_pile_up() {
        let mut bounded = Bounded::new(4);
        for key in 0..100 {
            bounded.insert(key, key, 1);
            bounded.remove(&key);
        }
        assert!(bounded.order.len() <= 4);
    }
}
