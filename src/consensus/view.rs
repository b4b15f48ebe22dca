//! What the core reads of the ledger, and what it wants written.

use std::collections::BTreeMap;
use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::certificate::Certificate;
use super::vote::{Vote, VoteKind};
use crate::types::{Amount, OutPoint, Output, Transaction, Txid, UTXOState, UnixSeconds};

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
    /// How many members committed to it.
    pub votes: u32,
    /// The fee that it left.
    pub fee: Amount,
}

/// The durable ledger as the core sees it. Reading cannot fail: a store that meets an
/// error latches it, answers `None`, and its owner throws the whole batch away.
pub trait View {
    /// The output at this place, if it ever came into being.
    fn utxo(&self, outpoint: &OutPoint) -> Option<Utxo>;
    /// The record of a final transaction.
    fn settled(&self, txid: &Txid) -> Option<Settled>;
    /// Whether the transaction is dead.
    fn is_dead(&self, txid: &Txid) -> bool;
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

/// A final transaction, as it is written.
#[derive(Debug, Clone)]
pub struct Finalized {
    /// The body, with its signatures.
    pub transaction: Arc<Transaction>,
    /// The summary.
    pub settled: Settled,
    /// The finality proof, F(T).
    pub certificate: Arc<Certificate>,
}

/// Everything that one atomic commit writes.
#[derive(Debug, Default)]
pub struct Changes {
    /// The last state of each output that changed.
    pub utxos: BTreeMap<OutPoint, Utxo>,
    /// Every step, in order: the change log's next entries.
    pub transitions: Vec<Transition>,
    /// Transactions that came into flight, changed, or (`None`) left it.
    pub in_flight: BTreeMap<Txid, Option<InFlight>>,
    /// This member's new votes, in order.
    pub votes: Vec<Vote>,
    /// C(T) and A(T) that this member acted on or keeps for the chain.
    pub certificates: BTreeMap<(Txid, VoteKind), Arc<Certificate>>,
    /// Transactions that became final.
    pub finalized: BTreeMap<Txid, Finalized>,
}

impl Changes {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        self.utxos.is_empty()
            && self.transitions.is_empty()
            && self.in_flight.is_empty()
            && self.votes.is_empty()
            && self.certificates.is_empty()
            && self.finalized.is_empty()
    }

    /// Moves an output on and writes the step down.
    pub(super) fn transition(&mut self, outpoint: OutPoint, old: Option<UTXOState>, new: Utxo, timestamp: UnixSeconds) {
        self.utxos.insert(outpoint, new);
        self.transitions.push(Transition {
            outpoint,
            output: new.output,
            old_state: old,
            new_state: new.state,
            timestamp,
        });
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

    fn is_dead(&self, txid: &Txid) -> bool {
        self.base.is_dead(txid)
    }
}
