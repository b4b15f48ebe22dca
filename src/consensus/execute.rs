//! Executing a decided block: what it contains is final and confirmed, what contradicts it
//! is dead, and coins that the dead had locked are free (protocol §6.5, §7).

use std::collections::BTreeSet;
use std::sync::Arc;

use super::event::{Action, Fault, Progress, Source};
use super::flaw::Flaw;
use super::machine::{Machine, Step, refuse};
use super::validate::Rejection;
use super::view::{Dead, Finalized, LogEntry, Settled, Utxo, View};
use super::vote::VoteKind;
use crate::types::{
    Amount, BlockHash, DecidedBlock, Height, OutPoint, Output, Transaction, Txid, UTXOState, UtxoDigest,
};

/// What a block has done so far.
struct Execution {
    height: Height,
    hash: BlockHash,
    digest: UtxoDigest,
    fees: Amount,
    freed: BTreeSet<OutPoint>,
}

impl Machine {
    /// Executes a decided block. Every body has to be here. Whatever does not add up is a
    /// fault: the node stops, and nothing of the block is written.
    pub(super) fn execute<V: View>(&mut self, step: &mut Step<'_, V>, decided: Arc<DecidedBlock>) {
        let block = &decided.block;
        let tip = &self.chain.tip;
        if block.state_digest != tip.digest.digest() {
            return step.fail(Fault::StateDigest { height: block.height });
        }
        let mut execution = Execution {
            height: block.height,
            hash: decided.certificate.block_hash,
            digest: tip.digest.clone(),
            fees: Amount::ZERO,
            freed: BTreeSet::new(),
        };
        for txid in &block.transactions {
            let Some(transaction) = self.body_for_block(step, txid) else {
                return step.fail(Fault::BlockBody { height: block.height, txid: *txid });
            };
            self.confirm(step, &mut execution, &transaction);
        }
        // Who contradicts whom is asked before the first of them is gone.
        let named = |txid: &Txid| {
            let pending = self.pending.get(txid)?;
            let rivals = self.pending.rivals(pending.transaction.as_ref()?);
            rivals.into_iter().next().or(pending.contradicted_by)
        };
        let aborts: Vec<(Txid, Option<Txid>)> = block.aborts.iter().map(|txid| (*txid, named(txid))).collect();
        for (txid, by) in aborts {
            self.kill(step, &mut execution, txid, by);
            step.changes.dead.insert(txid, Dead { by, height: block.height });
        }
        self.pay_fees(step, &mut execution, &decided);
        if step.fault.is_some() {
            return;
        }
        let Execution { height, hash, digest, freed, .. } = execution;
        step.changes.log.push(LogEntry::Block { height, block_hash: hash, timestamp_ms: block.timestamp_ms });
        let tip = &mut self.chain.tip;
        (tip.height, tip.hash, tip.timestamp_ms, tip.digest) = (height, hash, block.timestamp_ms, digest);
        step.changes.tip = Some(tip.clone());
        step.changes.blocks.push((hash, decided));
        self.chain.executed_at_ms = step.now.ms;
        self.forget_lacking();
        self.look_at_freed(step, &freed);
    }

    /// The body of a block's transaction: of the ledger, in flight, or fetched for it.
    pub(super) fn body_for_block<V: View>(&self, step: &Step<'_, V>, txid: &Txid) -> Option<Arc<Transaction>> {
        let view = step.view();
        let fetched = || self.follow.body(txid).filter(|body| !self.is_foreign(&view, body));
        self.own_body(&view, txid).or_else(fetched).or_else(|| view.body(txid))
    }

    /// The transaction is in the chain now.
    fn confirm<V: View>(&mut self, step: &mut Step<'_, V>, execution: &mut Execution, transaction: &Arc<Transaction>) {
        let txid = transaction.txid();
        let height = execution.height;
        let final_before = self.chain.unconfirmed.contains(&txid);
        let rivals = self.pending.rivals(transaction);
        let mut inputs = Amount::ZERO;
        for outpoint in transaction.spends() {
            let Some(old) = step.view().utxo(&outpoint) else {
                return step.fail(Fault::BlockInput { height, txid, outpoint });
            };
            if let UTXOState::SpentFinalized { txid: by, .. } = old.state
                && by != txid
            {
                return step.fail(Fault::ConflictingFinality { txid, outpoint, by });
            }
            let state = UTXOState::Confirmed { txid, block_height: height, confirmed_at: step.now.unix };
            step.transition(outpoint, Some(old), Utxo { state, ..old });
            execution.digest.remove(&outpoint, &old.output);
            let Some(sum) = inputs.checked_add(old.output.amount) else {
                return step.fail(Fault::Supply { height });
            };
            inputs = sum;
        }
        for (outpoint, output) in transaction.creates() {
            execution.digest.add(&outpoint, &output);
        }
        self.wear_off(step, transaction.spends());
        self.fence_outputs(step, Some(height), transaction.creates().map(|(outpoint, _)| outpoint));
        let outputs = Amount::checked_sum(transaction.outputs().iter().map(|output| output.amount));
        let fee = outputs.and_then(|outputs| inputs.checked_sub(outputs));
        let fees = fee.and_then(|fee| execution.fees.checked_add(fee));
        let (Some(fee), Some(fees)) = (fee, fees) else {
            return step.fail(Fault::Supply { height });
        };
        execution.fees = fees;
        step.changes.confirmed.insert(txid, height);
        self.chain.unconfirmed.remove(&txid);
        let settled = if final_before {
            step.view().settled(&txid)
        } else {
            let commits = self.pending.get(&txid).map_or(0, |pending| pending.tallies.of(VoteKind::Commit).count());
            let settled = Settled { finalized_at: step.now.unix, votes: commits, fee };
            let certificate = self.pending.get(&txid).and_then(|p| p.certificate(VoteKind::Commit).cloned());
            let finalized = Finalized { transaction: Arc::clone(transaction), settled, certificate };
            self.bring_into_being(step, finalized);
            Some(settled)
        };
        self.follow.forget(&txid);
        for rival in rivals {
            self.kill(step, execution, rival, Some(txid));
        }
        if let Some(settled) = settled {
            let progress = Progress::Confirmed { settled, height };
            step.act(Action::Progress { txid, progress });
        }
    }

    /// A transaction can never be settled any more. Its locks are freed; if this member had
    /// locked it or voted on it, that it died is remembered.
    fn kill<V: View>(&mut self, step: &mut Step<'_, V>, execution: &mut Execution, txid: Txid, by: Option<Txid>) {
        let dead = Dead { by, height: execution.height };
        if !self.has(Flaw::FirstEvidenceKept) {
            self.evidence.retain(|_, named| *named != txid);
        }
        for waiting in self.room.leave(&txid).into_iter().chain(self.room.leave_with(&txid)) {
            for (source, copy) in waiting.copies {
                let child = copy.txid();
                let missing = OutPoint { txid, vout: 0 };
                let rejection =
                    if child == txid { Rejection::Aborted { by } } else { Rejection::UnknownInput(missing) };
                refuse(step, source, child, rejection);
            }
        }
        let Some(pending) = self.pending.remove(&txid) else { return };
        #[cfg(feature = "planted-flaws")]
        self.keep_dead(txid, &pending);
        let any_holder = self.has(Flaw::AbortExecutedTwice);
        for outpoint in pending.transaction.iter().flat_map(|transaction| transaction.spends()) {
            let Some(old) = step.view().utxo(&outpoint) else { continue };
            if matches!(old.state, UTXOState::Locked { txid: holder, .. } if holder == txid || any_holder) {
                step.transition(outpoint, Some(old), Utxo { state: UTXOState::Unspent, ..old });
                execution.freed.insert(outpoint);
            }
        }
        self.wear_off(step, pending.transaction.iter().flat_map(|t| t.creates()).map(|(outpoint, _)| outpoint));
        if pending.recorded {
            step.changes.in_flight.insert(txid, None);
            step.changes.dead.insert(txid, dead);
            step.act(Action::Progress { txid, progress: Progress::Aborted(dead) });
        }
    }

    /// The proposer gets the block's fees, and the chain has as much money as before.
    fn pay_fees<V: View>(&mut self, step: &mut Step<'_, V>, execution: &mut Execution, decided: &DecidedBlock) {
        if execution.fees == Amount::ZERO {
            return;
        }
        let Some(proposer) = self.committee.index_of(&decided.block.proposer) else {
            return step.fail(Fault::Supply { height: execution.height });
        };
        let address = self.committee.member(proposer).payout_address;
        let outpoint = OutPoint { txid: Txid::from_bytes(*execution.hash.as_bytes()), vout: 0 };
        let output = Output { amount: execution.fees, address };
        let old = step.view().utxo(&outpoint);
        step.transition(outpoint, old, Utxo { output, state: UTXOState::Unspent });
        execution.digest.add(&outpoint, &output);
        self.fence_outputs(step, Some(execution.height), std::iter::once(outpoint));
        self.release_children(step, &outpoint.txid);
    }

    /// Coins are free again: whoever waits for them has another look, without anybody
    /// having to send it again.
    fn look_at_freed<V: View>(&mut self, step: &mut Step<'_, V>, freed: &BTreeSet<OutPoint>) {
        let mut waiting = BTreeSet::new();
        for outpoint in freed {
            waiting.extend(self.pending.spenders(outpoint));
        }
        for txid in waiting {
            let Some(pending) = self.pending.get(&txid) else { continue };
            let free = pending.locked_at.is_none() && !*pending.own.of(VoteKind::Approve);
            if let Some(transaction) = pending.transaction.clone().filter(|_| free) {
                self.accept(step, transaction, Source::Answer);
            }
            self.ready(txid);
        }
    }
}
