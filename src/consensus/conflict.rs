//! Rule 4: evidence of a conflict, and votes to abort. The chain does the rest.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::certificate::Certificate;
use super::committee::MemberIndex;
use super::event::Suspension;
use super::finality::WithoutLocks;
use super::flaw::Flaw;
use super::machine::{Machine, Step, Timer};
use super::validate::check_ledger;
use super::verified::Verified;
use super::view::View;
use super::vote::{MemberBatch, Vote, VoteKind};
use crate::limits::{CONFLICT_WAIT_MS, MAX_EVIDENCE_PER_MEMBER};
use crate::types::{Transaction, Txid, UTXOState};

impl Machine {
    /// A member has locked `transaction`, which meets a lock of another one here. If it is
    /// valid but for that, it is evidence: the latest of each member on each outpoint.
    pub(super) fn keep_evidence<V: View>(
        &mut self,
        step: &mut Step<'_, V>,
        transaction: &Arc<Transaction>,
        member: MemberIndex,
    ) {
        if check_ledger(transaction, &self.rules, &WithoutLocks(step.view())).is_err() {
            return;
        }
        let known = |outpoint| self.evidence.contains_key(&(member, outpoint));
        if self.has(Flaw::FirstEvidenceKept) && transaction.spends().any(known) {
            return;
        }
        let rivals = self.contradicting(step, transaction);
        let txid = transaction.txid();
        self.pending.attach(transaction);
        for outpoint in transaction.spends() {
            let replaced = self.evidence.insert((member, outpoint), txid);
            self.forget_evidence(replaced.filter(|old| *old != txid));
        }
        self.bound_evidence(member);
        for rival in rivals {
            self.contradict(txid, rival, step.now.ms);
            self.contradict(rival, txid, step.now.ms);
        }
    }

    fn bound_evidence(&mut self, member: MemberIndex) {
        let zero = crate::types::OutPoint { txid: Txid::from_bytes([0; 32]), vout: 0 };
        let mine =
            || (member, zero)..=(member, crate::types::OutPoint { txid: Txid::from_bytes([0xff; 32]), vout: u32::MAX });
        while self.evidence.range(mine()).count() > MAX_EVIDENCE_PER_MEMBER {
            let Some(key) = self.evidence.range(mine()).next().map(|(key, _)| *key) else { return };
            let dropped = self.evidence.remove(&key);
            self.forget_evidence(dropped);
        }
    }

    /// Drops the body of former evidence that nobody else needs.
    fn forget_evidence(&mut self, txid: Option<Txid>) {
        let Some(txid) = txid else { return };
        let named = self.evidence.values().any(|other| *other == txid);
        if !named && self.pending.get(&txid).is_some_and(|p| !p.matters()) {
            self.pending.remove(&txid);
        }
    }

    /// Forgets a transaction of which the chain has spent an input and which this member has
    /// never written down: it can be in no block any more, neither to be settled nor to be
    /// aborted. A liar's votes on it would keep it here for ever.
    pub(super) fn forget_hopeless<V: View>(&mut self, step: &Step<'_, V>, transaction: &Transaction) {
        let txid = transaction.txid();
        let view = step.view();
        let in_chain = |state| matches!(state, UTXOState::Confirmed { txid: by, .. } if by != txid);
        let mut inputs = transaction.spends().filter_map(|outpoint| view.utxo(&outpoint));
        let hopeless = inputs.any(|utxo| in_chain(utxo.state));
        if hopeless && self.pending.get(&txid).is_some_and(|p| !p.recorded && !p.has_own_vote()) {
            self.pending.remove(&txid);
        }
    }

    /// The rivals of `transaction` that contradict it: what this member wrote down, and
    /// what is valid but for its rivals. A body that breaks a rule may be here too, for the
    /// sake of the votes on it, and contradicts nobody.
    pub(super) fn contradicting<V: View>(&self, step: &Step<'_, V>, transaction: &Transaction) -> BTreeSet<Txid> {
        let ledger = WithoutLocks(step.view());
        let counts = |rival: &Txid| {
            self.pending.get(rival).is_some_and(|p| {
                let counts = p.recorded || self.has(Flaw::DeadStillContradicts);
                counts || p.transaction.as_ref().is_some_and(|t| check_ledger(t, &self.rules, &ledger).is_ok())
            })
        };
        let mut rivals = self.pending.rivals(transaction);
        rivals.retain(counts);
        rivals
    }

    /// A conflict of `txid` is known: after a while this member votes on it.
    pub(super) fn contradict(&mut self, txid: Txid, by: Txid, now_ms: u64) {
        let Some(pending) = self.pending.get_mut(&txid) else { return };
        pending.contradicted_by.get_or_insert(by);
        if !std::mem::replace(&mut pending.contradicted, true) {
            self.timers.insert((now_ms + CONFLICT_WAIT_MS, Timer::Conflict, txid));
        }
    }

    /// The wait is over. For a transaction without C that is contradicted still and not
    /// settled, vote `Abort`: both transactions and the vote are in one commit. From then
    /// on this member never commits to it.
    pub(super) fn consider_abort<V: View>(&mut self, step: &mut Step<'_, V>, txid: Txid) {
        let Some(pending) = self.pending.get(&txid) else { return };
        let Some(transaction) = pending.transaction.clone() else { return };
        let said = *pending.own.of(VoteKind::Abort) || *pending.own.of(VoteKind::Commit);
        let certified =
            pending.certificate(VoteKind::Approve).is_some() || pending.certificate(VoteKind::Commit).is_some();
        let rivals = self.contradicting(step, &transaction);
        if said || certified || rivals.is_empty() || !self.may_vote_on(step, &transaction) || step.view().is_dead(&txid)
        {
            if let Some(pending) = self.pending.get_mut(&txid) {
                pending.contradicted = said;
            }
            return;
        }
        for each in rivals.into_iter().chain([txid]) {
            self.record(step, each);
        }
        if let Some(pending) = self.pending.get_mut(&txid) {
            *pending.own.of_mut(VoteKind::Abort) = true;
        }
        step.changes.votes.push(Vote { kind: VoteKind::Abort, txid });
    }

    /// A(T) is kept for the block that will carry it.
    pub(super) fn keep_abort_certificate<V: View>(&mut self, step: &mut Step<'_, V>, txid: &Txid) {
        let Some(pending) = self.pending.get(txid).filter(|p| p.recorded) else { return };
        if let Some(certificate) = pending.certificate(VoteKind::Abort) {
            step.changes.certificates.insert((*txid, VoteKind::Abort), Arc::clone(certificate));
        }
    }

    /// A batch under this member's own signature came from outside. Each of its votes has
    /// to be one that the database holds, or be on something settled or dead. Otherwise
    /// votes were lost or a twin is running, and this member must not vote any more.
    ///
    /// Once votes were lost, they are expected: they count like anybody's.
    pub(super) fn meet_own_votes<V: View>(&mut self, step: &mut Step<'_, V>, batch: &Arc<Verified<MemberBatch>>) {
        if self.has_lost_votes {
            return self.count(step, batch);
        }
        for Vote { kind, txid } in batch.get().votes() {
            let held = self.pending.get(txid).is_some_and(|p| *p.own.of(*kind));
            if !held && !step.view().is_settled(txid) && !step.view().is_dead(txid) {
                self.suspend(Suspension::UnknownOwnVote);
                return;
            }
        }
    }

    /// The same of a certificate that counts this member's signature. It is taken all the
    /// same: what it proves is true.
    pub(super) fn meet_certified_own_vote(&mut self, certificate: &Certificate) {
        let Some(own) = self.own.map(|own| self.committee.member(own).public_key) else { return };
        let held = self.pending.get(&certificate.txid).is_some_and(|p| *p.own.of(certificate.kind));
        if !held && !self.has_lost_votes && certificate.votes.iter().any(|vote| vote.voter == own) {
            self.suspend(Suspension::UnknownOwnVote);
        }
    }

    /// Whether the two share an input.
    pub fn conflict(a: &Transaction, b: &Transaction) -> bool {
        a.txid() != b.txid() && a.spends().any(|outpoint| b.spends().any(|other| other == outpoint))
    }
}
