//! Which of a block's transactions concern which wallets.

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};

use super::feed::Filter;
use crate::db::{DatabaseError, Reader};
use crate::types::{Address, Height, OutPoint, Txid};

/// A block's transactions by the addresses and outpoints that they spend and create.
#[derive(Debug, Default)]
pub(super) struct Touched {
    txids: Vec<Txid>,
    by_address: HashMap<Address, Vec<usize>>,
    by_outpoint: HashMap<OutPoint, Vec<usize>>,
}

impl Touched {
    fn read(reader: &Reader, height: Height) -> Result<Self, DatabaseError> {
        let mut touched = Self::default();
        let Some(decided) = reader.block(height)? else { return Ok(touched) };
        for (place, txid) in decided.block.transactions.iter().enumerate() {
            let Some((transaction, _)) = reader.finalized(txid)? else { continue };
            for outpoint in transaction.spends() {
                touched.by_outpoint.entry(outpoint).or_default().push(place);
            }
            // Whoever spends shows the key that the spent output's address commits to.
            for input in transaction.inputs() {
                let address = Address::of_key(&input.public_key, reader.network().network);
                touched.by_address.entry(address).or_default().push(place);
            }
            for (outpoint, output) in transaction.creates() {
                touched.by_outpoint.entry(outpoint).or_default().push(place);
                touched.by_address.entry(output.address).or_default().push(place);
            }
        }
        touched.txids = decided.block.transactions;
        Ok(touched)
    }

    /// Those that concern a subscription, in the block's order.
    pub(super) fn of(&self, filter: &Filter) -> Vec<Txid> {
        let addresses = filter.addresses().filter_map(|address| self.by_address.get(address));
        let outpoints = filter.outpoints().filter_map(|outpoint| self.by_outpoint.get(outpoint));
        let places: BTreeSet<usize> = addresses.chain(outpoints).flatten().copied().collect();
        places.into_iter().filter_map(|place| self.txids.get(place).copied()).collect()
    }
}

/// The last few blocks, read once for all subscriptions.
#[derive(Debug, Default)]
pub(super) struct TouchedBlocks(Mutex<VecDeque<(Height, Arc<Touched>)>>);

impl TouchedBlocks {
    const KEPT: usize = 8;

    /// That of the block at `height`. Reads the database.
    pub(super) fn of_block(&self, reader: &Reader, height: Height) -> Result<Arc<Touched>, DatabaseError> {
        let kept = || self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, touched)) = kept().iter().find(|(at, _)| *at == height) {
            return Ok(Arc::clone(touched));
        }
        let touched = Arc::new(Touched::read(reader, height)?);
        let mut kept = kept();
        kept.push_back((height, Arc::clone(&touched)));
        if kept.len() > Self::KEPT {
            kept.pop_front();
        }
        Ok(touched)
    }
}
