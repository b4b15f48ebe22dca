//! The ledger thread's view: reads cannot fail, errors latch.

use std::cell::RefCell;
use std::sync::Arc;

use super::DatabaseError;
use super::recent::Recent;
use super::store::{Database, Reader};
use crate::consensus::{Dead, Settled, Utxo, View};
use crate::types::{Height, OutPoint, Transaction, Txid};

/// The durable ledger as the core reads it, for one batch; of the database's own thread.
///
/// The first error is kept, and from then on everything is `None`. Whoever made the view
/// asks [`LedgerView::finish`] before anything is committed; a batch that saw an error is
/// thrown away whole.
#[derive(Debug)]
pub struct LedgerView<'a> {
    reader: Reader,
    recent: &'a Recent,
    error: RefCell<Option<DatabaseError>>,
}

impl Database {
    /// The ledger as of the last commit, for the thread that makes the next one.
    pub fn view(&self) -> LedgerView<'_> {
        LedgerView { reader: self.reader(), recent: &self.recent, error: RefCell::new(None) }
    }
}

impl LedgerView<'_> {
    /// The first error that a read met.
    pub fn finish(self) -> Result<(), DatabaseError> {
        self.error.into_inner().map_or(Ok(()), Err)
    }

    fn latch<T>(&self, read: impl FnOnce() -> Result<Option<T>, DatabaseError>) -> Option<T> {
        if self.error.borrow().is_some() {
            return None;
        }
        read().unwrap_or_else(|error| {
            *self.error.borrow_mut() = Some(error);
            None
        })
    }
}

impl View for LedgerView<'_> {
    fn utxo(&self, outpoint: &OutPoint) -> Option<Utxo> {
        self.latch(|| self.recent.utxo(&self.reader, outpoint))
    }

    fn settled(&self, txid: &Txid) -> Option<Settled> {
        self.latch(|| Ok(self.recent.settled(&self.reader, txid)?.map(|stored| stored.settled)))
    }

    fn is_settled(&self, txid: &Txid) -> bool {
        self.latch(|| self.recent.settled(&self.reader, txid).map(|settled| Some(settled.is_some()))).unwrap_or(true)
    }

    fn is_open(&self, transaction: &Transaction) -> bool {
        self.latch(|| self.recent.is_open(&self.reader, transaction).map(Some)).unwrap_or(false)
    }

    fn body(&self, txid: &Txid) -> Option<Arc<Transaction>> {
        self.latch(|| self.recent.body(&self.reader, txid))
    }

    fn confirmed(&self, txid: &Txid) -> Option<Height> {
        self.latch(|| match self.recent.settled(&self.reader, txid)? {
            Some(stored) => self.reader.confirmed_by_number(stored.number),
            None => Ok(None),
        })
    }

    fn dead(&self, txid: &Txid) -> Option<Dead> {
        self.latch(|| self.recent.dead(&self.reader, txid))
    }

    fn is_fenced(&self, outpoint: &OutPoint) -> bool {
        self.latch(|| self.recent.is_fenced(&self.reader, outpoint).map(Some)).unwrap_or(true)
    }
}
