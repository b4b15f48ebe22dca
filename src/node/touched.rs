//! Which of a block's transactions concern which wallets.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use super::feed::Filter;
use crate::db::{DatabaseError, Reader};
use crate::types::{Address, Height, OutPoint, Txid};

/// A block's transactions by the addresses and outpoints that they spend and create. Each list
/// is in order, and says where in the block the transaction stands.
#[derive(Debug, Default)]
pub(super) struct Touched {
    txids: Vec<Txid>,
    by_address: Vec<(Address, usize)>,
    by_outpoint: Vec<(OutPoint, usize)>,
}

impl Touched {
    fn read(reader: &Reader, height: Height) -> Result<Self, DatabaseError> {
        let mut touched = Self::default();
        let Some(decided) = reader.block(height)? else { return Ok(touched) };
        let network = reader.network().network;
        for (place, txid) in decided.block.transactions.iter().enumerate() {
            let Some(transaction) = reader.body(txid)? else { continue };
            touched.by_outpoint.extend(transaction.spends().map(|outpoint| (outpoint, place)));
            // Whoever spends shows the key that the spent output's address commits to.
            let owners = transaction.inputs().iter().map(|input| Address::of_key(&input.public_key, network));
            touched.by_address.extend(owners.map(|address| (address, place)));
            touched.by_outpoint.extend(transaction.creates().map(|(outpoint, _)| (outpoint, place)));
            touched.by_address.extend(transaction.outputs().iter().map(|output| (output.address, place)));
        }
        touched.by_address.sort_unstable();
        touched.by_outpoint.sort_unstable();
        touched.txids = decided.block.transactions;
        Ok(touched)
    }

    /// Those that concern a subscription, in the block's order.
    pub(super) fn of(&self, filter: &Filter) -> Vec<Txid> {
        let addresses = filter.addresses().flat_map(|address| places(&self.by_address, address));
        let outpoints = filter.outpoints().flat_map(|outpoint| places(&self.by_outpoint, outpoint));
        let mut places: Vec<usize> = addresses.chain(outpoints).collect();
        places.sort_unstable();
        places.dedup();
        places.into_iter().filter_map(|place| self.txids.get(place).copied()).collect()
    }
}

fn places<K: Ord>(list: &[(K, usize)], key: &K) -> impl Iterator<Item = usize> {
    let begin = list.partition_point(|(other, _)| other < key);
    list[begin..].iter().take_while(move |(other, _)| other == key).map(|(_, place)| *place)
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
