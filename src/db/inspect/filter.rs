//! Which records somebody wants to see.

use std::ops::{Bound, RangeInclusive};

use super::super::outputs::row_of;
use super::super::schema::{TreeId, outpoint_key};
use super::record::{Content, KeyRange};
use crate::consensus::LogEntry;
use crate::types::{Address, Height, Network, OutPoint, Transaction, Txid, UTXOState};

/// What a record has to be about; where several things are given, about all of them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Filter {
    /// An output in, or a step to, the state of this name.
    pub state: Option<String>,
    /// What an address owns, owned or follows.
    pub address: Option<Address>,
    /// An output, and what spends or creates it.
    pub outpoint: Option<OutPoint>,
    /// A transaction, its outputs, and what it locked or spent.
    pub txid: Option<Txid>,
    /// A block, and what became so by it.
    pub height: Option<RangeInclusive<Height>>,
    /// Entries of the change log.
    pub sequence: Option<RangeInclusive<u64>>,
}

/// All that a record mentions.
#[derive(Debug, Default)]
struct Mentions {
    outpoints: Vec<OutPoint>,
    txids: Vec<Txid>,
    addresses: Vec<Address>,
    height: Option<Height>,
    sequence: Option<u64>,
    state: Option<UTXOState>,
}

impl Filter {
    /// Whether a record is wanted.
    pub(super) fn admits(&self, content: &Content, network: Network) -> bool {
        if *self == Self::default() {
            return true;
        }
        let mentions = Mentions::of(content, network);
        let within = |range: &Option<RangeInclusive<u64>>, number: Option<u64>| {
            range.as_ref().is_none_or(|range| number.is_some_and(|number| range.contains(&number)))
        };
        let state = mentions.state.as_ref().map(UTXOState::name);
        self.state.as_deref().is_none_or(|wanted| state == Some(wanted))
            && self.address.is_none_or(|wanted| mentions.addresses.contains(&wanted))
            && self.outpoint.is_none_or(|wanted| mentions.outpoints.contains(&wanted))
            && self.txid.is_none_or(|wanted| mentions.txids.contains(&wanted))
            && within(&self.height, mentions.height)
            && within(&self.sequence, mentions.sequence)
    }

    /// Where in a tree all wanted records stand, as far as the keys say. The log's first row
    /// may begin before the first wanted number; see [`super::Trees::select`].
    pub(super) fn range(&self, id: TreeId) -> KeyRange {
        let prefix = match id {
            TreeId::Utxos => self.outpoint.map(|outpoint| outpoint_key(&row_of(&outpoint)).to_vec()),
            TreeId::Fence => self.outpoint.map(|outpoint| outpoint_key(&outpoint).to_vec()),
            TreeId::Addresses => self.address.map(|address| address.payload().to_vec()),
            _ => None,
        };
        if let Some(prefix) = prefix {
            return under(&prefix);
        }
        let numbers = match id {
            TreeId::Blocks | TreeId::Agreement => self.height.as_ref(),
            TreeId::Changes => self.sequence.as_ref(),
            _ => None,
        };
        match numbers {
            Some(range) => {
                let end = range.end().checked_add(1).map(|end| end.to_be_bytes().to_vec());
                (Bound::Included(range.start().to_be_bytes().to_vec()), end.map_or(Bound::Unbounded, Bound::Excluded))
            }
            None => (Bound::Unbounded, Bound::Unbounded),
        }
    }
}

/// The keys that begin with `prefix`.
pub(super) fn under(prefix: &[u8]) -> KeyRange {
    let mut end = prefix.to_vec();
    while let Some(last) = end.pop() {
        if let Some(next) = last.checked_add(1) {
            end.push(next);
            return (Bound::Included(prefix.to_vec()), Bound::Excluded(end));
        }
    }
    (Bound::Included(prefix.to_vec()), Bound::Unbounded)
}

impl Mentions {
    fn of(content: &Content, network: Network) -> Self {
        let mut all = Self::default();
        match content {
            Content::Meta(_) => {}
            Content::Utxo(outpoint, utxo) => {
                all.place(outpoint);
                all.addresses.push(utxo.output.address);
                all.stand(&utxo.state);
            }
            Content::Address(address, outpoint) => {
                all.place(outpoint);
                all.addresses.push(*address);
            }
            Content::Fence(outpoint) => all.place(outpoint),
            Content::InFlight(transaction, _) | Content::Settled(transaction, ..) => all.body(transaction, network),
            Content::Votes(votes) => all.txids.extend(votes.iter().map(|vote| vote.txid)),
            Content::Certificate(certificate) => all.txids.push(certificate.txid),
            Content::Change(sequence, entry) => {
                all.sequence = Some(*sequence);
                match entry {
                    LogEntry::Transition(step) => {
                        all.place(&step.outpoint);
                        all.addresses.push(step.output.address);
                        all.txids.extend(step.old_state.and_then(|state| state.txid()));
                        all.stand(&step.new_state);
                    }
                    LogEntry::Block { height, .. } => all.height = Some(*height),
                }
            }
            Content::Subscription(subscription) => {
                all.outpoints.extend(&subscription.outpoints);
                all.addresses.extend(&subscription.addresses);
            }
            Content::Block(decided) => {
                all.height = Some(decided.block.height);
                all.txids.extend(decided.block.transactions.iter().chain(&decided.block.aborts));
                let hash = Txid::from_bytes(*decided.certificate.block_hash.as_bytes());
                all.place(&OutPoint { txid: hash, vout: 0 });
            }
            Content::Confirmed(txid, confirmed) => {
                all.txids.push(*txid);
                all.height = Some(confirmed.height);
            }
            Content::Dead(txid, dead) => {
                all.txids.push(*txid);
                all.txids.extend(dead.by);
                all.height = Some(dead.height);
            }
            Content::Agreement(height, _) => all.height = Some(*height),
        }
        all
    }

    fn place(&mut self, outpoint: &OutPoint) {
        self.outpoints.push(*outpoint);
        self.txids.push(outpoint.txid);
    }

    fn stand(&mut self, state: &UTXOState) {
        self.state = Some(*state);
        self.txids.extend(state.txid());
        if let UTXOState::Confirmed { block_height, .. } = state {
            self.height = Some(*block_height);
        }
    }

    fn body(&mut self, transaction: &Transaction, network: Network) {
        self.txids.push(transaction.txid());
        self.outpoints.extend(transaction.spends().chain(transaction.creates().map(|(outpoint, _)| outpoint)));
        self.addresses.extend(transaction.inputs().iter().map(|input| Address::of_key(&input.public_key, network)));
        self.addresses.extend(transaction.outputs().iter().map(|output| output.address));
    }
}
