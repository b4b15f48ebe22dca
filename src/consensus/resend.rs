//! Timers, and saying again what may have been lost.

use std::sync::Arc;
use std::time::Duration;

use super::committee::MemberIndex;
use super::event::Action;
use super::flaw::Flaw;
use super::machine::{Machine, Step, Timer, refuse};
use super::pending::Pending;
use super::validate::Rejection;
use super::view::View;
use super::vote::{Vote, VoteKind};
use crate::limits::{
    MAX_RESEND_BYTES, MAX_RESEND_DOUBLINGS, MAX_RESENDS_PER_TICK, MAX_STATUS_IN_FLIGHT, RESEND_AFTER_MS,
    RESEND_EVERY_MS, SLOW_FINALITY_MS, SLOWEST_RESEND_MS, TICK,
};
use crate::types::Txid;

/// How long transactions have taken lately to become final. Under load that is longer, and
/// saying everything again after the same time would only add to the load.
#[derive(Debug, Default)]
pub(super) struct Pace {
    /// A moving average, in 1/16 ms.
    average: u64,
}

impl Pace {
    /// One became final after so many milliseconds.
    pub(super) fn note(&mut self, ms: u64) {
        self.average = self.average - self.average / 16 + ms.min(SLOWEST_RESEND_MS);
    }

    /// Whether that is long.
    pub(super) const fn is_slow(&self) -> bool {
        self.average / 16 > SLOW_FINALITY_MS
    }

    /// After how many milliseconds what is not final is sent again.
    pub(super) fn resend_after(&self) -> u64 {
        (self.average / 8).clamp(RESEND_AFTER_MS, SLOWEST_RESEND_MS)
    }
}

impl Machine {
    /// Looks at every timer that has run out, as many as one tick bears.
    pub(super) fn tick<V: View>(&mut self, step: &mut Step<'_, V>) {
        #[cfg(feature = "planted-flaws")]
        self.release_by_timeout(step);
        let (mut votes, mut bytes) = (Vec::new(), 0);
        for _ in 0..MAX_RESENDS_PER_TICK {
            if bytes > MAX_RESEND_BYTES {
                break;
            }
            let Some(due) = self.timers.first().copied().filter(|(at, ..)| *at <= step.now.ms) else { break };
            self.timers.remove(&due);
            let (_, timer, txid) = due;
            match timer {
                Timer::ParentWait => self.give_up_waiting(step, &txid),
                Timer::Conflict => self.consider_abort(step, txid),
                Timer::Body => self.ask_for_body(step, txid),
                Timer::Resend => bytes += self.resend(step, txid, &mut votes),
            }
        }
        if !votes.is_empty() {
            step.act(Action::ResendVotes { to: None, votes });
        }
    }

    fn give_up_waiting<V: View>(&mut self, step: &mut Step<'_, V>, txid: &Txid) {
        let Some(waiting) = self.room.leave(txid) else { return };
        for (source, copy) in waiting.copies {
            let missing = copy.spends().find(|outpoint| step.view().utxo(outpoint).is_none());
            if let Some(missing) = missing {
                refuse(step, source, *txid, Rejection::UnknownInput(missing));
            }
        }
    }

    /// Votes or a certificate are here and the body is not: ask those who must have it.
    fn ask_for_body<V: View>(&mut self, step: &mut Step<'_, V>, txid: Txid) {
        let Some(pending) = self.pending.get(&txid).filter(|p| p.transaction.is_none()) else { return };
        self.timers.insert((step.now.ms + RESEND_EVERY_MS, Timer::Body, txid));
        if self.follow.wants(&txid) {
            return;
        }
        let voters: Vec<_> = self.committee.indices().filter(|member| pending.voted_by(*member)).collect();
        if voters.is_empty() {
            step.act(Action::Request { to: None, txid });
        }
        for member in voters {
            step.act(Action::Request { to: Some(member), txid });
        }
    }

    /// Something has been in flight for a while: say all that this member has to say of it.
    /// Gives about how many bytes that is for each member.
    fn resend<V: View>(&mut self, step: &mut Step<'_, V>, txid: Txid, votes: &mut Vec<Vote>) -> usize {
        let Some(pending) = self.pending.get_mut(&txid) else { return 0 };
        let Some(transaction) = pending.transaction.clone() else { return 0 };
        // The timer was set when everything took less time.
        let due = pending.since_ms + self.pace.resend_after();
        let early = Duration::from_millis(due.saturating_sub(step.now.ms));
        if pending.said_again == 0 && !pending.contradicted && early > TICK {
            self.timers.insert((due, Timer::Resend, txid));
            return 0;
        }
        // Each time it is the less likely that something was lost, and the more that all are
        // busy. A contest is another matter: it ends by what members say again.
        let pause = if pending.contradicted { 0 } else { pending.said_again.min(MAX_RESEND_DOUBLINGS) };
        let next = step.now.ms + (RESEND_EVERY_MS << pause);
        pending.said_again += 1;
        let Some(pending) = self.pending.get(&txid) else { return 0 };
        let bytes = about_bytes(pending);
        votes.extend(VoteKind::ALL.into_iter().filter(|k| *pending.own.of(*k)).map(|kind| Vote { kind, txid }));
        let certificate = pending.certificate(VoteKind::Commit).or_else(|| pending.certificate(VoteKind::Approve));
        if let Some(certificate) = certificate.cloned() {
            step.act(Action::SendCertified { to: None, transaction, certificate });
        } else if pending.locked_at.is_some() || !self.may_vote_on(step, &transaction) {
            for to in self.committee.indices() {
                if Some(to) != self.own && !pending.voted_by(to) && !self.has(Flaw::EvidenceSentOnce) {
                    step.act(Action::Send { to, transaction: transaction.clone() });
                }
            }
        }
        self.timers.insert((next, Timer::Resend, txid));
        bytes
    }

    /// A member is there (again): give it what it may have missed, in the order of txids, up to
    /// a bound. The timers send the rest.
    pub(super) fn greet<V: View>(&mut self, step: &mut Step<'_, V>, member: MemberIndex) {
        let (mut votes, mut bytes) = (Vec::new(), 0);
        let mut batches: Vec<Arc<_>> = Vec::new();
        for (txid, pending) in self.pending.iter().filter(|(_, p)| p.recorded).take(MAX_STATUS_IN_FLIGHT) {
            bytes += about_bytes(pending);
            if bytes > MAX_RESEND_BYTES {
                break;
            }
            votes.extend(
                VoteKind::ALL.into_iter().filter(|k| *pending.own.of(*k)).map(|kind| Vote { kind, txid: *txid }),
            );
            for kind in VoteKind::ALL {
                let Some(vote) = pending.tallies.of(kind).of(member) else { continue };
                if !batches.iter().any(|known| Arc::ptr_eq(known, &vote.batch)) {
                    batches.push(Arc::clone(&vote.batch));
                }
            }
            let Some(transaction) = pending.transaction.clone() else { continue };
            match pending.certificate(VoteKind::Approve).cloned() {
                Some(certificate) => {
                    step.actions.push(Action::SendCertified { to: Some(member), transaction, certificate });
                }
                None if pending.voted_by(member) || self.has(Flaw::EvidenceSentOnce) => {}
                None if pending.locked_at.is_some() => {
                    step.actions.push(Action::Send { to: member, transaction });
                }
                None => {}
            }
        }
        for batch in batches {
            step.act(Action::ReturnBatch { to: member, batch });
        }
        if !votes.is_empty() {
            step.act(Action::ResendVotes { to: Some(member), votes });
        }
    }
}

/// About how many bytes of JSON a pending transaction and its certificate are.
fn about_bytes(pending: &Pending) -> usize {
    let transaction = pending.transaction.as_ref();
    let body = transaction.map_or(0, |t| 256 + 400 * t.inputs().len() + 128 * t.outputs().len());
    let certificate = pending.certificate(VoteKind::Commit).or_else(|| pending.certificate(VoteKind::Approve));
    body + certificate.iter().flat_map(|c| &c.votes).map(|vote| 320 + 68 * vote.path.len()).sum::<usize>()
}
