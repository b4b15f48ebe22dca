//! The chain as the core knows it: its tip, what is settled and not in it yet, and what
//! may be put into the next block (protocol §6.5, §7).

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use super::flaw::Flaw;
use super::machine::{Machine, Step};
use super::pending::Pending;
use super::validate::{Rejection, check_ledger};
use super::view::{Dead, Overlay, Settled, Utxo, View};
use super::vote::VoteKind;
use crate::limits::{MAX_BLOCK_ABORTS, MAX_BLOCK_ENTRIES, MAX_BLOCK_PLACES, STUCK_AFTER_MS};
use crate::types::{
    Amount, Block, BlockHash, Genesis, Height, OutPoint, Output, PublicKey, Transaction, Txid, UTXOState, UtxoDigest,
};

/// The last block, and the UTXO set after it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ChainTip {
    /// 0 before the first block.
    pub height: Height,
    /// Its hash; before the first block, the genesis hash.
    pub hash: BlockHash,
    /// Its timestamp; 0 before the first block.
    pub timestamp_ms: u64,
    /// The sum of the chain's unspent outputs.
    pub supply: Amount,
    /// The digest of the chain's UTXO set.
    pub digest: UtxoDigest,
}

impl ChainTip {
    /// The chain before its first block: the outputs of the genesis.
    pub fn of_genesis(genesis: &Genesis) -> Self {
        let mut digest = UtxoDigest::new();
        for (outpoint, output) in genesis.transaction().creates() {
            digest.add(&outpoint, &output);
        }
        // A genesis whose sum is out of range is refused when it is read.
        let supply = Amount::checked_sum(genesis.transaction().outputs().iter().map(|o| o.amount));
        Self {
            height: 0,
            hash: BlockHash::from_bytes(*genesis.hash().as_bytes()),
            timestamp_ms: 0,
            supply: supply.unwrap_or(Amount::MAX),
            digest,
        }
    }
}

/// What is settled here and not in the chain, in the order in which it became so: parents
/// come before children.
#[derive(Debug, Default)]
pub(super) struct Unconfirmed {
    order: BTreeMap<u64, Txid>,
    places: BTreeMap<Txid, u64>,
    next: u64,
}

impl Unconfirmed {
    pub(super) fn push(&mut self, txid: Txid) {
        if self.places.insert(txid, self.next).is_none() {
            self.order.insert(self.next, txid);
            self.next += 1;
        }
    }

    pub(super) fn remove(&mut self, txid: &Txid) {
        if let Some(place) = self.places.remove(txid) {
            self.order.remove(&place);
        }
    }

    pub(super) fn contains(&self, txid: &Txid) -> bool {
        self.places.contains_key(txid)
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = Txid> + '_ {
        self.order.values().copied()
    }

    pub(super) fn len(&self) -> usize {
        self.order.len()
    }
}

/// Why a block may not be voted for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BlockFault {
    /// It does not stand on the tip.
    #[error("it does not follow the last block")]
    NotNext,
    /// Its time is not after the last block's.
    #[error("its timestamp does not rise")]
    Timestamp,
    /// Its maker is no member.
    #[error("its proposer is no member")]
    Proposer,
    /// Nothing is in it.
    #[error("it is empty")]
    Empty,
    /// Too much is in it.
    #[error("it has too many entries, inputs or outputs")]
    TooLarge,
    /// Its digest of the UTXO set is not this node's.
    #[error("its state digest is another one than here")]
    StateDigest,
    /// A txid that stands in it twice.
    #[error("{0} stands in it twice")]
    Repeated(Txid),
    /// A transaction that is in the chain.
    #[error("{0} is in the chain already")]
    InChain(Txid),
    /// A transaction whose parent is not in the chain, nor earlier in the block.
    #[error("{0} comes before its parent")]
    Parent(Txid),
    /// A transaction that spends what is spent.
    #[error("{txid} spends {outpoint}, which is spent")]
    Spent {
        /// The transaction.
        txid: Txid,
        /// The output.
        outpoint: OutPoint,
    },
    /// A transaction that breaks a rule.
    #[error("{txid}: {rejection}")]
    Rule {
        /// The transaction.
        txid: Txid,
        /// The rule.
        rejection: Rejection,
    },
    /// A transaction that contradicts one to which this member has committed.
    #[error("{txid} contradicts {rival}, to which this member has committed")]
    Committed {
        /// The transaction in the block.
        txid: Txid,
        /// The other one.
        rival: Txid,
    },
    /// An abort of what is settled or dead.
    #[error("{0} cannot be aborted any more")]
    NotAbortable(Txid),
}

/// What stands between an entry and a block.
#[derive(Debug)]
pub(super) enum Obstacle {
    /// Its body or its certificate is not here.
    Lacking,
    /// It can never be in this block.
    Fault(BlockFault),
}

/// What this member finds of a proposed block.
#[derive(Debug)]
pub(super) enum Verdict {
    Valid,
    Invalid(BlockFault),
    /// Bodies or certificates of these have to be fetched first.
    Lacking(Vec<Wanted>),
}

/// An entry of a proposed block whose body, or whose proof for its list, is not here.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Wanted {
    pub(super) txid: Txid,
    /// Whether the block aborts it.
    pub(super) abort: bool,
}

/// A walk through a block's entries: what they have spent and created so far.
#[derive(Debug, Default)]
pub(super) struct Walk {
    entries: BTreeSet<Txid>,
    spent: BTreeSet<OutPoint>,
    created: BTreeMap<OutPoint, Output>,
    /// Inputs and outputs so far.
    places: usize,
}

impl Walk {
    fn take(&mut self, transaction: &Transaction) {
        self.entries.insert(transaction.txid());
        self.spent.extend(transaction.spends());
        self.created.extend(transaction.creates());
        self.places += places(transaction);
    }
}

fn places(transaction: &Transaction) -> usize {
    transaction.inputs().len() + transaction.outputs().len()
}

/// The ledger as a block's next entry meets it: nothing is locked, and the outputs of
/// earlier entries are there.
struct BlockView<'a, V> {
    base: &'a Overlay<'a, V>,
    walk: &'a Walk,
}

impl<V: View> View for BlockView<'_, V> {
    fn utxo(&self, outpoint: &OutPoint) -> Option<Utxo> {
        if let Some(output) = self.walk.created.get(outpoint) {
            return Some(Utxo { output: *output, state: UTXOState::Unspent });
        }
        let utxo = self.base.utxo(outpoint)?;
        let state = if utxo.state.is_live() { UTXOState::Unspent } else { utxo.state };
        Some(Utxo { state, ..utxo })
    }

    fn settled(&self, txid: &Txid) -> Option<Settled> {
        self.base.settled(txid)
    }

    fn body(&self, txid: &Txid) -> Option<Arc<Transaction>> {
        self.base.body(txid)
    }

    fn confirmed(&self, txid: &Txid) -> Option<Height> {
        self.base.confirmed(txid)
    }

    fn dead(&self, txid: &Txid) -> Option<Dead> {
        self.base.dead(txid)
    }

    fn is_fenced(&self, outpoint: &OutPoint) -> bool {
        self.base.is_fenced(outpoint)
    }
}

impl Machine {
    /// Whether a proposed block may be voted for (protocol §6.5, §7). What is found valid
    /// is written down with all that it needs, so that whoever lacks it can have it.
    pub(super) fn judge<V: View>(&mut self, step: &mut Step<'_, V>, block: &Block) -> Verdict {
        match self.examine(step, block) {
            Ok(lacking) if lacking.is_empty() => {
                for txid in block.transactions.iter().chain(&block.aborts) {
                    self.keep_for_block(step, *txid);
                }
                Verdict::Valid
            }
            Ok(lacking) => Verdict::Lacking(lacking),
            Err(fault) => Verdict::Invalid(fault),
        }
    }

    fn examine<V: View>(&self, step: &Step<'_, V>, block: &Block) -> Result<Vec<Wanted>, BlockFault> {
        let tip = &self.chain.tip;
        if block.height != tip.height + 1 || block.previous_hash != tip.hash {
            return Err(BlockFault::NotNext);
        }
        if block.timestamp_ms <= tip.timestamp_ms {
            return Err(BlockFault::Timestamp);
        }
        if self.committee.index_of(&block.proposer).is_none() {
            return Err(BlockFault::Proposer);
        }
        let entries = block.transactions.len() + block.aborts.len();
        if entries == 0 {
            return Err(BlockFault::Empty);
        }
        if entries > MAX_BLOCK_ENTRIES || block.aborts.len() > MAX_BLOCK_ABORTS {
            return Err(BlockFault::TooLarge);
        }
        if block.state_digest != tip.digest.digest() {
            return Err(BlockFault::StateDigest);
        }
        // What is missing is found first: a child of a missing parent is not at fault.
        let wanted = |abort| move |txid: &Txid| Wanted { txid: *txid, abort };
        let entries = block.transactions.iter().map(wanted(false)).chain(block.aborts.iter().map(wanted(true)));
        let lacking: Vec<Wanted> = entries.filter(|entry| self.lacks(step, entry)).collect();
        if !lacking.is_empty() {
            return Ok(lacking);
        }
        let view = step.view();
        let mut walk = Walk::default();
        let fault = |obstacle| match obstacle {
            Obstacle::Fault(fault) => fault,
            Obstacle::Lacking => BlockFault::NotNext,
        };
        for txid in &block.transactions {
            self.include(&view, &mut walk, txid).map_err(fault)?;
        }
        for txid in &block.aborts {
            self.include_abort(&view, &mut walk, txid).map_err(fault)?;
        }
        Ok(Vec::new())
    }

    /// Whether an entry's body, or what proves it for its list, is not here.
    pub(super) fn lacks<V: View>(&self, step: &Step<'_, V>, Wanted { txid, abort }: &Wanted) -> bool {
        matches!(self.entry(&step.view(), txid, *abort), Err(Obstacle::Lacking))
    }

    /// The body of a possible entry, if what proves it is here too.
    fn entry<V: View>(&self, view: &Overlay<'_, V>, txid: &Txid, abort: bool) -> Result<Arc<Transaction>, Obstacle> {
        if self.chain.unconfirmed.contains(txid) {
            return if abort {
                Err(Obstacle::Fault(BlockFault::NotAbortable(*txid)))
            } else {
                view.body(txid).ok_or(Obstacle::Lacking)
            };
        }
        let pending = self.pending.get(txid);
        let known = self.own_body(view, txid);
        if known.is_none() {
            if view.is_settled(txid) {
                return Err(Obstacle::Fault(BlockFault::InChain(*txid)));
            }
            if view.is_dead(txid) {
                return Err(Obstacle::Fault(BlockFault::NotAbortable(*txid)));
            }
        }
        let certificate = |kind| pending.and_then(|pending: &Pending| pending.certificate(kind));
        let proven = if abort {
            certificate(VoteKind::Abort).is_some()
        } else {
            certificate(VoteKind::Commit).or(certificate(VoteKind::Approve)).is_some()
        };
        known.filter(|_| proven).ok_or(Obstacle::Lacking)
    }

    /// Puts a transaction behind what the walk has taken, if it may stand there.
    fn include<V: View>(
        &self,
        view: &Overlay<'_, V>,
        walk: &mut Walk,
        txid: &Txid,
    ) -> Result<Arc<Transaction>, Obstacle> {
        let refuse = |fault| Err(Obstacle::Fault(fault));
        let txid = *txid;
        if walk.entries.contains(&txid) {
            return refuse(BlockFault::Repeated(txid));
        }
        let transaction = self.entry(view, &txid, false)?;
        if walk.places + places(&transaction) > MAX_BLOCK_PLACES {
            return refuse(BlockFault::TooLarge);
        }
        for outpoint in transaction.spends() {
            if walk.spent.contains(&outpoint) {
                return refuse(BlockFault::Spent { txid, outpoint });
            }
            if walk.created.contains_key(&outpoint) {
                continue;
            }
            if self.chain.unconfirmed.contains(&outpoint.txid) {
                return refuse(BlockFault::Parent(txid));
            }
            match view.utxo(&outpoint).map(|utxo| utxo.state) {
                None => return refuse(BlockFault::Parent(txid)),
                Some(UTXOState::Confirmed { .. }) => return refuse(BlockFault::Spent { txid, outpoint }),
                Some(UTXOState::SpentFinalized { txid: by, .. }) if by != txid => {
                    return refuse(BlockFault::Spent { txid, outpoint });
                }
                Some(_) => {}
            }
        }
        if !self.chain.unconfirmed.contains(&txid) {
            let ledger = BlockView { base: view, walk };
            if let Err(rejection) = check_ledger(&transaction, &self.rules, &ledger) {
                return refuse(BlockFault::Rule { txid, rejection });
            }
            let rivals = self.pending.rivals(&transaction);
            let committed = |rival: &&Txid| self.pending.get(rival).is_some_and(|p| *p.own.of(VoteKind::Commit));
            if let Some(rival) = rivals.iter().find(committed) {
                return refuse(BlockFault::Committed { txid, rival: *rival });
            }
        }
        walk.take(&transaction);
        Ok(transaction)
    }

    /// The same for an abort; all transactions have been walked before.
    fn include_abort<V: View>(&self, view: &Overlay<'_, V>, walk: &mut Walk, txid: &Txid) -> Result<(), Obstacle> {
        if walk.entries.contains(txid) {
            return Err(Obstacle::Fault(BlockFault::Repeated(*txid)));
        }
        let transaction = self.entry(view, txid, true)?;
        // What the chain has spent may be forgotten, so an input that is not here counts as
        // spent: whoever voted for the abort had it, and here it will be if it ever comes.
        let killed = transaction.spends().any(|outpoint| {
            let spent = view.utxo(&outpoint).is_none_or(|utxo| matches!(utxo.state, UTXOState::Confirmed { .. }));
            spent || walk.spent.contains(&outpoint)
        });
        let dead = view.is_dead(txid) && !self.has(Flaw::AbortExecutedTwice);
        if killed || dead {
            return Err(Obstacle::Fault(BlockFault::NotAbortable(*txid)));
        }
        walk.entries.insert(*txid);
        Ok(())
    }

    /// Makes the next block, if there is something to put in: what is final, in its order,
    /// then what is certified and stuck, then aborts of what could not be included.
    pub(super) fn build<V: View>(&mut self, step: &mut Step<'_, V>, proposer: PublicKey) -> Option<Block> {
        let (mut walk, mut transactions, mut aborts) = (Walk::default(), Vec::new(), Vec::new());
        {
            let view = step.view();
            let final_ones = self.chain.unconfirmed.iter();
            let stuck = self.pending.iter().filter(|(_, p)| is_stuck(p, step.now.ms)).map(|(txid, _)| *txid);
            for txid in final_ones.chain(stuck) {
                if transactions.len() >= MAX_BLOCK_ENTRIES - MAX_BLOCK_ABORTS || walk.places >= MAX_BLOCK_PLACES {
                    break;
                }
                if self.include(&view, &mut walk, &txid).is_ok() {
                    transactions.push(txid);
                }
            }
            let abortable = self.pending.iter().filter(|(_, p)| p.certificate(VoteKind::Abort).is_some());
            for txid in abortable.map(|(txid, _)| *txid) {
                if aborts.len() < MAX_BLOCK_ABORTS && self.include_abort(&view, &mut walk, &txid).is_ok() {
                    aborts.push(txid);
                }
            }
        }
        if transactions.is_empty() && aborts.is_empty() {
            return None;
        }
        for txid in transactions.iter().chain(&aborts) {
            self.keep_for_block(step, *txid);
        }
        let tip = &self.chain.tip;
        Some(Block {
            height: tip.height + 1,
            previous_hash: tip.hash,
            timestamp_ms: step.now.unix_ms.max(tip.timestamp_ms + 1),
            proposer,
            state_digest: tip.digest.digest(),
            transactions,
            aborts,
        })
    }

    /// Whether the next block would have something in it. What is certified and can be in no
    /// block, for the chain has killed it before this member knew of it, does not count.
    pub(super) fn has_block_content<V: View>(&self, step: &Step<'_, V>) -> bool {
        let view = step.view();
        let can_settle = |txid: &Txid, pending: &Pending| {
            let stuck = is_stuck(pending, step.now.ms) && self.include(&view, &mut Walk::default(), txid).is_ok();
            let aborted = pending.certificate(VoteKind::Abort).is_some();
            stuck || (aborted && self.include_abort(&view, &mut Walk::default(), txid).is_ok())
        };
        self.chain.unconfirmed.len() > 0 || self.pending.iter().any(|(txid, pending)| can_settle(txid, pending))
    }

    /// Writes down the body and the certificates of what a block carries.
    fn keep_for_block<V: View>(&mut self, step: &mut Step<'_, V>, txid: Txid) {
        if self.pending.get(&txid).is_none() {
            return;
        }
        self.record(step, txid);
        let Some(pending) = self.pending.get(&txid) else { return };
        let best = pending.certificate(VoteKind::Commit).or(pending.certificate(VoteKind::Approve));
        for certificate in best.into_iter().chain(pending.certificate(VoteKind::Abort)) {
            step.changes.certificates.insert((txid, certificate.kind), Arc::clone(certificate));
        }
    }
}

/// A transaction with C(T) that does not become final by itself.
fn is_stuck(pending: &Pending, now_ms: u64) -> bool {
    let certified = pending.certificate(VoteKind::Approve).is_some() || pending.certificate(VoteKind::Commit).is_some();
    certified && (pending.contradicted || now_ms >= pending.since_ms.saturating_add(STUCK_AFTER_MS))
}
