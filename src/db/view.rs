//! The ledger thread's view: reads cannot fail, errors latch.

use std::cell::RefCell;
use std::sync::Arc;

use super::DatabaseError;
use super::store::Reader;
use crate::consensus::{Dead, Settled, Utxo, View};
use crate::types::{Height, OutPoint, Transaction, Txid};

/// The durable ledger as the core reads it, for one batch.
///
/// The first error is kept, and from then on everything is `None`. Whoever made the view
/// asks [`LedgerView::finish`] before anything is committed; a batch that saw an error is
/// thrown away whole.
#[derive(Debug)]
pub struct LedgerView<'a> {
    reader: &'a Reader,
    error: RefCell<Option<DatabaseError>>,
}

impl<'a> LedgerView<'a> {
    /// A view through `reader`.
    pub const fn new(reader: &'a Reader) -> Self {
        Self { reader, error: RefCell::new(None) }
    }

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
        self.latch(|| self.reader.utxo(outpoint))
    }

    fn settled(&self, txid: &Txid) -> Option<Settled> {
        self.latch(|| self.reader.settled(txid))
    }

    fn is_settled(&self, txid: &Txid) -> bool {
        self.latch(|| self.reader.is_final(txid).map(Some)).unwrap_or(true)
    }

    fn body(&self, txid: &Txid) -> Option<Arc<Transaction>> {
        self.latch(|| Ok(self.reader.finalized(txid)?.map(|(transaction, _)| Arc::new(transaction))))
    }

    fn confirmed(&self, txid: &Txid) -> Option<Height> {
        self.latch(|| self.reader.confirmed(txid))
    }

    fn dead(&self, txid: &Txid) -> Option<Dead> {
        self.latch(|| self.reader.dead(txid))
    }

    fn is_fenced(&self, outpoint: &OutPoint) -> bool {
        self.latch(|| self.reader.is_fenced(outpoint).map(Some)).unwrap_or(true)
    }
}
