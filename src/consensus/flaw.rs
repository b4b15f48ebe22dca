//! Bugs that a simulation plants on purpose, to see that it would find them.
//!
//! They exist only under the feature `planted-flaws`, which nothing but this package's own
//! tests turn on. Without it a machine has no place to keep one, and the question whether
//! it has is the constant `false`.

#[cfg(not(feature = "planted-flaws"))]
use super::machine::Machine;

/// A rule that is broken.
#[cfg_attr(not(feature = "planted-flaws"), allow(dead_code))]
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Flaw {
    /// A member commits to what it has voted to abort.
    CommitAfterAbort,
    /// Locks of before a restart keep nobody out.
    LockForgottenOnRestart,
    /// A lock that is old is released.
    ReleaseByTimeout,
    /// What was aborted is aborted again, and frees whatever is locked by then.
    AbortExecutedTwice,
    /// A child is approved before its parent is settled.
    ChildApprovedEarly,
    /// What was locked is told to the others once.
    EvidenceSentOnce,
    /// Of a member's contradictions of an outpoint the first counts, whatever became of it.
    FirstEvidenceKept,
    /// Behind the fence is not what others' transactions in flight, or settled outside the
    /// chain, have spent.
    FenceForgetsSpent,
    /// Behind the fence is nothing of others' transactions in flight, or settled outside the
    /// chain.
    FenceForgetsTransactions,
    /// A member behind a fence agrees on blocks one height too early.
    AgreesTooEarly,
    /// The approvals of a quorum are final.
    VotesFinal,
    /// What is dead is approved again.
    ApproveAborted,
    /// What is dead contradicts still.
    DeadStillContradicts,
    /// What a member voted to abort it does not approve.
    AbortForbidsApprove,
}

#[cfg(not(feature = "planted-flaws"))]
impl Machine {
    pub(super) const fn has(&self, _: Flaw) -> bool {
        false
    }
}

#[cfg(feature = "planted-flaws")]
mod planted {
    use std::sync::Arc;

    use super::super::finality::WithoutLocks;
    use super::super::machine::{Machine, Step};
    use super::super::pending::Pending;
    use super::super::validate::{Rejection, check_ledger};
    use super::super::view::{Dead, Settled, Utxo, View};
    use super::super::vote::VoteKind;
    use super::Flaw;
    use crate::types::{Amount, Height, OutPoint, Transaction, Txid, UTXOState};

    /// How old a lock becomes where locks are released by time.
    const RELEASED_AFTER_MS: u64 = 1_500;

    impl Machine {
        /// Breaks a rule, from now on.
        pub fn plant(&mut self, flaw: Flaw) {
            self.flaw = Some(flaw);
        }

        pub(in crate::consensus) fn has(&self, flaw: Flaw) -> bool {
            self.flaw == Some(flaw)
        }

        /// What a flawed member finds of a transaction.
        pub(in crate::consensus) fn spoil<V: View>(
            &self,
            step: &Step<'_, V>,
            transaction: &Transaction,
            verdict: Result<Amount, Rejection>,
        ) -> Result<Amount, Rejection> {
            let known = |txid: &Txid, is: fn(&Pending) -> bool| self.pending.get(txid).is_some_and(is);
            match (self.flaw, &verdict) {
                (Some(Flaw::LockForgottenOnRestart), Err(Rejection::InputLocked { by, .. }))
                    if !known(by, |p| p.locked_at.is_some()) =>
                {
                    check_ledger(transaction, &self.rules, &WithoutLocks(step.view()))
                }
                (Some(Flaw::ApproveAborted), Err(Rejection::Aborted { .. })) => {
                    check_ledger(transaction, &self.rules, &Undead(step.view()))
                }
                (Some(Flaw::ChildApprovedEarly), Err(Rejection::UnknownInput(missing)))
                    if known(&missing.txid, |p| p.locked_at.is_some()) =>
                {
                    Ok(Amount::ZERO)
                }
                (Some(Flaw::AbortForbidsApprove), Ok(_))
                    if known(&transaction.txid(), |p| *p.own.of(VoteKind::Abort)) =>
                {
                    Err(Rejection::Busy)
                }
                _ => verdict,
            }
        }

        /// Releases what has been locked for a while.
        pub(in crate::consensus) fn release_by_timeout<V: View>(&mut self, step: &mut Step<'_, V>) {
            if !self.has(Flaw::ReleaseByTimeout) {
                return;
            }
            let is_old = |p: &Pending| p.locked_at.is_some() && step.now.ms > p.since_ms + RELEASED_AFTER_MS;
            let old: Vec<Txid> = self.pending.iter().filter(|(_, p)| is_old(p)).map(|(txid, _)| *txid).collect();
            for txid in old {
                let Some(pending) = self.pending.get_mut(&txid) else { continue };
                pending.locked_at = None;
                pending.since_ms = step.now.ms;
                for outpoint in pending.transaction.iter().flat_map(|transaction| transaction.spends()) {
                    let Some(old) = step.view().utxo(&outpoint) else { continue };
                    if matches!(old.state, UTXOState::Locked { txid: holder, .. } if holder == txid) {
                        step.transition(outpoint, Some(old), Utxo { state: UTXOState::Unspent, ..old });
                    }
                }
            }
        }

        /// What is kept of a dead transaction that ought to be forgotten.
        pub(in crate::consensus) fn keep_dead(&mut self, txid: Txid, pending: &Pending) {
            let Some(transaction) = &pending.transaction else { return };
            if self.has(Flaw::DeadStillContradicts) {
                self.pending.attach(transaction);
            }
            let aborted = pending.certificate(VoteKind::Abort).cloned();
            if let (true, Some(certificate)) = (self.has(Flaw::AbortExecutedTwice), aborted) {
                self.pending.attach(transaction);
                *self.pending.entry(txid).certificates.of_mut(VoteKind::Abort) = Some(certificate);
            }
        }
    }

    /// A view in which nothing ever died.
    struct Undead<V>(V);

    impl<V: View> View for Undead<V> {
        fn utxo(&self, outpoint: &OutPoint) -> Option<Utxo> {
            self.0.utxo(outpoint)
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

        fn dead(&self, _: &Txid) -> Option<Dead> {
            None
        }

        fn is_fenced(&self, outpoint: &OutPoint) -> bool {
            self.0.is_fenced(outpoint)
        }
    }
}
