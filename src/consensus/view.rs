//! What the core reads of the ledger, and what it wants written.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::agreement::AgreementRecord;
use super::certificate::Certificate;
use super::chain::ChainTip;
use super::fence::FenceState;
use super::vote::{Vote, VoteKind};
use crate::types::{
    Amount, BlockHash, DecidedBlock, Height, OutPoint, Output, Transaction, Txid, UTXOState, UnixSeconds,
};

/// An output and where it stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Utxo {
    /// Amount and owner.
    pub output: Output,
    /// Where it stands.
    pub state: UTXOState,
}

/// What is remembered of a final transaction beside its body.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Settled {
    /// When this node learned that it is final.
    pub finalized_at: UnixSeconds,
    /// How many members committed to it, as far as this node knew then.
    pub votes: u32,
    /// The fee that it left.
    pub fee: Amount,
}

/// What is remembered of a transaction that died.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Dead {
    /// A transaction that it contradicted: the winner, where there is one.
    pub by: Option<Txid>,
    /// The block that killed it.
    pub height: Height,
}

/// The durable ledger as the core sees it. Reading cannot fail: a store that meets an
/// error latches it, answers `None`, and its owner throws the whole batch away.
pub trait View {
    /// The output at this place, if it ever came into being.
    fn utxo(&self, outpoint: &OutPoint) -> Option<Utxo>;
    /// The record of a final transaction.
    fn settled(&self, txid: &Txid) -> Option<Settled>;
    /// Whether a transaction is final here; may be cheaper than its record.
    fn is_settled(&self, txid: &Txid) -> bool {
        self.settled(txid).is_some()
    }
    /// The body of a final transaction.
    fn body(&self, txid: &Txid) -> Option<Arc<Transaction>>;
    /// The block that contains a transaction.
    fn confirmed(&self, txid: &Txid) -> Option<Height>;
    /// How a transaction died, if it did.
    fn dead(&self, txid: &Txid) -> Option<Dead>;
    /// Whether this member, having lost votes, must not vote on what spends this output.
    fn is_fenced(&self, outpoint: &OutPoint) -> bool;
    /// Whether a transaction is neither settled nor dead; may be cheaper than asking for each.
    fn is_open(&self, transaction: &Transaction) -> bool {
        let txid = transaction.txid();
        !self.is_settled(&txid) && !self.is_dead(&txid)
    }
    /// Whether a transaction is dead.
    fn is_dead(&self, txid: &Txid) -> bool {
        self.dead(txid).is_some()
    }
}

/// A transaction in flight: known here, neither settled nor dead, and worth keeping
/// because this member voted on it.
#[derive(Debug, Clone)]
pub struct InFlight {
    /// The body, with its signatures.
    pub transaction: Arc<Transaction>,
    /// When this member locked its inputs; `None` where it holds no locks for it.
    pub locked_at: Option<UnixSeconds>,
}

/// One step of one output.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Transition {
    /// Which output.
    pub outpoint: OutPoint,
    /// Amount and owner.
    pub output: Output,
    /// Where it stood; `None` where it came into being.
    pub old_state: Option<UTXOState>,
    /// Where it stands now.
    pub new_state: UTXOState,
    /// When, by this node's clock.
    pub timestamp: UnixSeconds,
}

/// An entry of the change log; each has its own sequence number.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum LogEntry {
    /// An output took a step.
    Transition(Transition),
    /// A block was executed.
    Block {
        /// Its height.
        height: Height,
        /// Its hash.
        block_hash: BlockHash,
        /// Its timestamp.
        timestamp_ms: u64,
    },
}

/// A final transaction, as it is written.
#[derive(Debug, Clone)]
pub struct Finalized {
    /// The body, with its signatures.
    pub transaction: Arc<Transaction>,
    /// The summary.
    pub settled: Settled,
    /// The finality proof, F(T); `None` where a block settled it.
    pub certificate: Option<Arc<Certificate>>,
}

/// Everything that one atomic commit writes.
#[derive(Debug, Default)]
pub struct Changes {
    /// The last state of each output that changed.
    pub utxos: BTreeMap<OutPoint, Utxo>,
    /// Every step and block, in order: the change log's next entries.
    pub log: Vec<LogEntry>,
    /// Transactions that came into flight, changed, or (`None`) left it.
    pub in_flight: BTreeMap<Txid, Option<InFlight>>,
    /// This member's new votes, in order.
    pub votes: Vec<Vote>,
    /// C(T) and A(T) that this member acted on or keeps for the chain.
    pub certificates: BTreeMap<(Txid, VoteKind), Arc<Certificate>>,
    /// Transactions that became final.
    pub finalized: BTreeMap<Txid, Finalized>,
    /// Transactions that a block contains now.
    pub confirmed: BTreeMap<Txid, Height>,
    /// Transactions that died.
    pub dead: BTreeMap<Txid, Dead>,
    /// Blocks that were executed, in order.
    pub blocks: Vec<(BlockHash, Arc<DecidedBlock>)>,
    /// The chain after the last of them.
    pub tip: Option<ChainTip>,
    /// The next entries of the agreement's write-ahead log. Those of a height go when its
    /// block has been executed.
    pub agreement: Vec<(Height, AgreementRecord)>,
    /// Outpoints that come behind the fence (`true`) or are spent for good (`false`).
    pub fence: BTreeMap<OutPoint, bool>,
    /// How far the fence has come, if it has moved.
    pub fence_state: Option<FenceState>,
}

impl Changes {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.utxos.is_empty()
            && self.log.is_empty()
            && self.in_flight.is_empty()
            && self.votes.is_empty()
            && self.certificates.is_empty()
            && self.finalized.is_empty()
            && self.dead.is_empty()
            && self.blocks.is_empty()
            && self.agreement.is_empty()
            && self.fence.is_empty()
            && self.fence_state.is_none()
    }

    /// Moves an output on and writes the step down.
    pub(super) fn transition(&mut self, outpoint: OutPoint, old: Option<UTXOState>, new: Utxo, timestamp: UnixSeconds) {
        self.utxos.insert(outpoint, new);
        let step = Transition { outpoint, output: new.output, old_state: old, new_state: new.state, timestamp };
        self.log.push(LogEntry::Transition(step));
    }
}

/// A view with a batch's own changes on top.
pub(super) struct Overlay<'a, V> {
    pub(super) base: &'a V,
    pub(super) changes: &'a Changes,
}

impl<V: View> View for Overlay<'_, V> {
    fn utxo(&self, outpoint: &OutPoint) -> Option<Utxo> {
        self.changes.utxos.get(outpoint).copied().or_else(|| self.base.utxo(outpoint))
    }

    fn settled(&self, txid: &Txid) -> Option<Settled> {
        self.changes.finalized.get(txid).map(|f| f.settled).or_else(|| self.base.settled(txid))
    }

    fn is_settled(&self, txid: &Txid) -> bool {
        self.changes.finalized.contains_key(txid) || self.base.is_settled(txid)
    }

    fn is_open(&self, transaction: &Transaction) -> bool {
        let txid = transaction.txid();
        let ended = self.changes.finalized.contains_key(&txid) || self.changes.dead.contains_key(&txid);
        !ended && self.base.is_open(transaction)
    }

    fn body(&self, txid: &Txid) -> Option<Arc<Transaction>> {
        self.changes.finalized.get(txid).map(|f| Arc::clone(&f.transaction)).or_else(|| self.base.body(txid))
    }

    fn confirmed(&self, txid: &Txid) -> Option<Height> {
        self.changes.confirmed.get(txid).copied().or_else(|| self.base.confirmed(txid))
    }

    fn dead(&self, txid: &Txid) -> Option<Dead> {
        self.changes.dead.get(txid).copied().or_else(|| self.base.dead(txid))
    }

    fn is_fenced(&self, outpoint: &OutPoint) -> bool {
        self.changes.fence.get(outpoint).copied().unwrap_or_else(|| self.base.is_fenced(outpoint))
    }
}
