//! Rules 2 and 3: committing, and what is final.

use std::sync::Arc;

use super::event::{Action, Fault, Progress};
use super::flaw::Flaw;
use super::machine::{Machine, Step, Timer};
use super::validate::check_ledger;
use super::view::{Dead, Finalized, InFlight, Overlay, Settled, Utxo, View};
use super::vote::{Vote, VoteKind};
use crate::types::{Height, OutPoint, Transaction, Txid, UTXOState};

/// How the inputs of a certified transaction stand.
enum Inputs {
    /// All are here and none is spent by another transaction.
    Here,
    /// The output of this transaction is not here yet.
    Missing(Txid),
    /// Another transaction has spent one.
    Spent { outpoint: OutPoint, by: Txid },
}

impl Machine {
    /// Rule 2: holding C(T), commit to T, unless that could contradict what this member
    /// said or will have to say. Its own locks do not matter here.
    pub(super) fn consider_commit<V: View>(&mut self, step: &mut Step<'_, V>, txid: Txid) {
        let Some(pending) = self.pending.get(&txid) else { return };
        let Some(certificate) = pending.certificate(VoteKind::Approve).cloned() else { return };
        let Some(transaction) = pending.transaction.clone() else {
            return self.find_body(step, txid);
        };
        let aborted = *pending.own.of(VoteKind::Abort) && !self.has(Flaw::CommitAfterAbort);
        let barred = *pending.own.of(VoteKind::Commit) || aborted;
        if barred || !self.may_vote_on(step, &transaction) || step.view().is_dead(&txid) {
            return;
        }
        match inputs(step, &transaction) {
            Inputs::Here => {}
            Inputs::Missing(parent) => return self.await_parent(step, txid, parent),
            Inputs::Spent { .. } => return,
        }
        if self.throw_away_foreign(step, &transaction) {
            return;
        }
        let committed_to_rival = self
            .pending
            .rivals(&transaction)
            .iter()
            .filter_map(|rival| self.pending.get(rival))
            .any(|rival| *rival.own.of(VoteKind::Commit));
        if committed_to_rival {
            return;
        }
        let Some(pending) = self.pending.get_mut(&txid) else { return };
        *pending.own.of_mut(VoteKind::Commit) = true;
        self.record(step, txid);
        step.changes.certificates.insert((txid, VoteKind::Approve), certificate);
        step.changes.votes.push(Vote { kind: VoteKind::Commit, txid });
    }

    /// Rule 3: holding F(T) and everything that T needs, T is final. Whether it is now.
    pub(super) fn consider_finality<V: View>(&mut self, step: &mut Step<'_, V>, txid: Txid) -> bool {
        let Some(pending) = self.pending.get(&txid) else { return false };
        let approved = pending.certificate(VoteKind::Approve).filter(|_| self.has(Flaw::VotesFinal));
        let Some(certificate) = pending.certificate(VoteKind::Commit).or(approved).cloned() else { return false };
        let Some(transaction) = pending.transaction.clone() else {
            self.find_body(step, txid);
            return false;
        };
        match inputs(step, &transaction) {
            Inputs::Here => {}
            Inputs::Missing(parent) => {
                self.await_parent(step, txid, parent);
                return false;
            }
            Inputs::Spent { outpoint, by } => {
                step.fail(Fault::ConflictingFinality { txid, outpoint, by });
                return false;
            }
        }
        if self.throw_away_foreign(step, &transaction) {
            return false;
        }
        // An honest member is in the quorum, so the rules hold. If they do not, more than
        // a third lies, and applying it would create money.
        let fee = match check_ledger(&transaction, &self.rules, &WithoutLocks(step.view())) {
            Ok(fee) => fee,
            Err(rejection) => {
                step.fail(Fault::InvalidFinality { txid, rejection });
                return false;
            }
        };
        let votes = u32::try_from(certificate.votes.len()).unwrap_or(u32::MAX);
        let settled = Settled { finalized_at: step.now.unix, votes, fee };
        let certificate = Some(certificate);
        self.finalize(step, Finalized { transaction, settled, certificate });
        true
    }

    fn finalize<V: View>(&mut self, step: &mut Step<'_, V>, finalized: Finalized) {
        let txid = finalized.transaction.txid();
        let Settled { finalized_at, votes, .. } = finalized.settled;
        for outpoint in finalized.transaction.spends() {
            let Some(old) = step.view().utxo(&outpoint) else { continue };
            let state = UTXOState::SpentFinalized { txid, finalized_at, votes };
            step.transition(outpoint, Some(old), Utxo { state, ..old });
        }
        if let Some(pending) = self.pending.get(&txid) {
            self.pace.note(step.now.ms.saturating_sub(pending.since_ms));
        }
        self.chain.unconfirmed.push(txid);
        let (settled, certificate) = (finalized.settled, finalized.certificate.clone());
        step.act(Action::Progress { txid, progress: Progress::Finalized { settled, certificate } });
        self.bring_into_being(step, finalized);
    }

    /// The outputs of a settled transaction come into being, it is in flight no more, and
    /// what waited for it has another look.
    pub(super) fn bring_into_being<V: View>(&mut self, step: &mut Step<'_, V>, finalized: Finalized) {
        let transaction = Arc::clone(&finalized.transaction);
        let txid = transaction.txid();
        for (outpoint, output) in transaction.creates() {
            // It was not settled before, so none of them can be there.
            step.transition(outpoint, None, Utxo { output, state: UTXOState::Unspent });
        }
        self.fence_outputs(step, None, transaction.creates().map(|(outpoint, _)| outpoint));
        self.forget_idle_rivals(&transaction);
        if self.pending.remove(&txid).is_some_and(|p| p.recorded) {
            step.changes.in_flight.insert(txid, None);
        }
        step.changes.finalized.insert(txid, finalized);
        // If it waited for a parent itself, those who sent it get their answer now.
        for (source, copy) in self.room.leave(&txid).into_iter().flat_map(|waiting| waiting.copies) {
            self.receive(step, copy, source);
        }
        self.release_children(step, &txid);
    }

    /// The outputs of `parent` are here: what waited for them has another look.
    pub(super) fn release_children<V: View>(&mut self, step: &mut Step<'_, V>, parent: &Txid) {
        for child in self.awaiting.remove(parent).unwrap_or_default() {
            self.ready(child);
        }
        for waiting in self.room.leave_with(parent) {
            for (source, copy) in waiting.copies {
                self.receive(step, copy, source);
            }
        }
    }

    /// Evidence against a final transaction has no use if nobody voted on it. What this
    /// member locked or voted on stays until the chain says that it is dead.
    fn forget_idle_rivals(&mut self, transaction: &Transaction) {
        for rival in self.pending.rivals(transaction) {
            if self.pending.get(&rival).is_some_and(|p| !p.matters()) {
                self.pending.remove(&rival);
            }
        }
        if self.evidence.is_empty() {
            return;
        }
        for outpoint in transaction.spends() {
            for member in self.committee.indices() {
                self.evidence.remove(&(member, outpoint));
            }
        }
    }

    /// A certificate is here and the body is not in its place: it may wait for its parent
    /// in the room, or it has to be asked for. What a decided block needs is asked for already.
    pub(super) fn find_body<V: View>(&mut self, step: &mut Step<'_, V>, txid: Txid) {
        let body = self.room.copies(&txid).find(|copy| !self.is_foreign(&step.view(), copy)).cloned();
        match body {
            Some(transaction) => {
                self.pending.attach(&transaction);
                self.ready(txid);
            }
            None if self.follow.wants(&txid) => {}
            None => step.act(Action::Request { to: None, txid }),
        }
    }

    /// Writes down what this member has voted on. From then on it is in flight here, and
    /// what is said of it is said again.
    pub(super) fn record<V: View>(&mut self, step: &mut Step<'_, V>, txid: Txid) {
        let Some(pending) = self.pending.get_mut(&txid) else { return };
        let Some(transaction) = pending.transaction.clone() else { return };
        pending.begin(step.now.ms);
        if !std::mem::replace(&mut pending.recorded, true) {
            step.changes.in_flight.insert(txid, Some(InFlight { transaction, locked_at: pending.locked_at }));
            self.timers.insert((step.now.ms + self.pace.resend_after(), Timer::Resend, txid));
        }
    }

    fn await_parent<V: View>(&mut self, step: &mut Step<'_, V>, txid: Txid, parent: Txid) {
        let is_known = self.pending.get(&parent).is_some() || self.follow.wants(&parent);
        if self.awaiting.entry(parent).or_default().insert(txid) && !is_known {
            step.act(Action::Request { to: None, txid: parent });
        }
    }
}

fn inputs<V: View>(step: &Step<'_, V>, transaction: &Transaction) -> Inputs {
    for outpoint in transaction.spends() {
        match step.view().utxo(&outpoint).map(|utxo| utxo.state) {
            None => return Inputs::Missing(outpoint.txid),
            Some(UTXOState::Unspent | UTXOState::Locked { .. }) => {}
            Some(UTXOState::SpentFinalized { txid: by, .. } | UTXOState::Confirmed { txid: by, .. }) => {
                if by != transaction.txid() {
                    return Inputs::Spent { outpoint, by };
                }
            }
        }
    }
    Inputs::Here
}

/// A view on which nothing is locked: what a transaction would be without its rivals.
pub(super) struct WithoutLocks<'a, V>(pub(super) Overlay<'a, V>);

impl<V: View> View for WithoutLocks<'_, V> {
    fn utxo(&self, outpoint: &OutPoint) -> Option<Utxo> {
        let utxo = self.0.utxo(outpoint)?;
        let state = if utxo.state.is_live() { UTXOState::Unspent } else { utxo.state };
        Some(Utxo { state, ..utxo })
    }

    fn settled(&self, txid: &Txid) -> Option<Settled> {
        self.0.settled(txid)
    }

    fn body(&self, txid: &Txid) -> Option<Arc<Transaction>> {
        self.0.body(txid)
    }

    fn confirmed(&self, txid: &Txid) -> Option<Height> {
        self.0.confirmed(txid)
    }

    fn dead(&self, txid: &Txid) -> Option<Dead> {
        self.0.dead(txid)
    }

    fn is_fenced(&self, outpoint: &OutPoint) -> bool {
        self.0.is_fenced(outpoint)
    }
}
