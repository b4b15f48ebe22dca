//! The fence of a member that lost votes (protocol §10).
//!
//! Whoever lost votes may have voted what it no longer knows. It asks the other members, a
//! quorum without itself, what can have been voted on: every unspent or locked output, and
//! every transaction that is in flight or settled outside the chain. All that they name is
//! *fenced*, and all that the chain had made up to one block beyond the highest of theirs.
//! On what spends a fenced output it never votes again.
//!
//! *Why that is enough.* Let the member have voted on T, and let T spend an output of P. The
//! member had P settled then. If P was final, a quorum had committed to P, so an honest
//! member that answers had P in flight or settled before it was asked: it names P, or P is
//! in a block that it has executed. If a block settled P, that block was decided, so an
//! honest member that answers had executed the block before it, and had stored P as a part
//! of that block before it voted for it. Either way the output is fenced. The answers are
//! pages of a ledger that moves on; what moves goes from flight to settled to the chain, and
//! is asked for in that order, so nothing is passed by.
//!
//! *Why it may agree on blocks three heights later.* It may have executed the block after the
//! highest one of the answers, and said something about the one after that.
//!
//! What comes into being later is free, so the fence wears off as coins move.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use super::certificate::Certificate;
use super::committee::MemberIndex;
use super::event::{Action, Suspension, Voting};
use super::flaw::Flaw;
use super::machine::{Machine, Step};
use super::view::View;
use super::vote::VoteKind;
use crate::limits::{FENCE_ANSWER_MS, MAX_FENCED_PER_ANSWER};
use crate::types::{Height, OutPoint, Transaction, Txid, UTXOState};

/// How far a member has come that lost votes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum FenceState {
    /// It asks the others what it may have voted on. Until then it says nothing.
    Asking,
    /// The fence stands.
    Standing {
        /// The highest height of an answer. All blocks up to it have been executed here.
        height: Height,
    },
    /// It has worn off.
    Down,
}

impl FenceState {
    /// The first height at which the member takes part in agreeing on a block.
    pub const fn agrees_from(&self) -> Option<Height> {
        match self {
            Self::Asking => None,
            Self::Standing { height } => Some(height.saturating_add(3)),
            Self::Down => Some(0),
        }
    }
}

/// A page of a member's answer.
#[derive(Debug, Clone, Default)]
pub struct FencePage {
    /// How long the member's chain was when it had read the page.
    pub height: Height,
    /// Unspent, locked and fenced outputs.
    pub outpoints: Vec<OutPoint>,
    /// Transactions in flight, or settled and not in the chain.
    pub transactions: Vec<Transaction>,
    /// Where the next page begins.
    pub next: Option<String>,
}

/// What one member has answered so far.
#[derive(Debug, Default)]
struct Answer {
    height: Height,
    after: Option<String>,
    named: usize,
    complete: bool,
    /// When the question is asked again.
    asked_until_ms: Option<u64>,
}

/// The fence as the machine knows it; the outpoints themselves are in the database.
#[derive(Debug)]
pub(super) struct Fence {
    state: FenceState,
    fenced: u64,
    answers: BTreeMap<MemberIndex, Answer>,
}

impl Machine {
    /// Puts the machine behind the fence that its database has, with so many outpoints. That
    /// votes were lost once is never forgotten: others may bring them back at any time.
    pub fn stand_behind(&mut self, state: FenceState, fenced: u64) {
        self.has_lost_votes = true;
        self.fence = (state != FenceState::Down).then(|| Fence { state, fenced, answers: BTreeMap::new() });
    }

    /// The fence and the number of outpoints behind it.
    pub fn fence(&self) -> Option<(FenceState, u64)> {
        self.fence.as_ref().map(|fence| (fence.state, fence.fenced))
    }

    /// Whether this member votes at all.
    pub(super) fn may_vote(&self) -> bool {
        self.voting() == Voting::Active
    }

    /// Whether it may vote on this transaction.
    pub(super) fn may_vote_on<V: View>(&self, step: &Step<'_, V>, transaction: &Transaction) -> bool {
        self.may_vote() && !self.is_fenced(step, transaction)
    }

    fn is_fenced<V: View>(&self, step: &Step<'_, V>, transaction: &Transaction) -> bool {
        self.fence.is_some() && transaction.spends().any(|outpoint| step.view().is_fenced(&outpoint))
    }

    /// Whether it takes part in agreeing on the next block.
    pub(super) fn may_agree(&self) -> bool {
        let from = self.fence.as_ref().map_or(Some(0), |fence| fence.state.agrees_from());
        let early = u64::from(self.has(Flaw::AgreesTooEarly));
        self.may_vote() && from.is_some_and(|from| self.chain.tip.height + 1 + early >= from)
    }

    pub(super) fn is_asking(&self) -> bool {
        self.fence.as_ref().is_some_and(|fence| fence.state == FenceState::Asking)
    }

    /// Whether there can be a quorum of answers at all. A network without one does not
    /// survive the loss of this member's votes.
    pub fn can_be_fenced(&self) -> bool {
        self.own.is_none_or(|own| self.committee.has_quorum_without(own))
    }

    /// A page of an answer came.
    pub(super) fn take_fence<V: View>(&mut self, step: &mut Step<'_, V>, from: MemberIndex, page: &FencePage) {
        let Some(fence) = self.fence.as_mut().filter(|fence| fence.state == FenceState::Asking) else { return };
        let Some(answer) = fence.answers.get_mut(&from).filter(|answer| answer.asked_until_ms.is_some()) else {
            return;
        };
        answer.asked_until_ms = None;
        answer.height = answer.height.max(page.height);
        answer.named += page.outpoints.len() + page.transactions.len();
        // A cursor that does not move on, or an answer without an end, is a liar's. What it
        // named stays fenced, for that does no harm.
        let stands_still = page.next.is_some() && page.next <= answer.after;
        if stands_still || answer.named > MAX_FENCED_PER_ANSWER {
            tracing::warn!(member = self.committee.member(from).id, "gives no end of what to fence");
            self.follow.distrust(from, step.now.ms);
            return step.act(Action::Disconnect { member: from });
        }
        answer.complete = page.next.is_none();
        answer.after.clone_from(&page.next);
        for outpoint in &page.outpoints {
            self.put_behind_fence(step, *outpoint);
        }
        for transaction in &page.transactions {
            let forgets = self.has(Flaw::FenceForgetsTransactions);
            let forgets_spent = forgets || self.has(Flaw::FenceForgetsSpent);
            let spent = transaction.spends().filter(|_| !forgets_spent);
            let created = transaction.creates().map(|(outpoint, _)| outpoint).filter(|_| !forgets);
            spent.chain(created).for_each(|outpoint| self.put_behind_fence(step, outpoint));
        }
    }

    fn put_behind_fence<V: View>(&mut self, step: &mut Step<'_, V>, outpoint: OutPoint) {
        let view = step.view();
        // What the chain has spent can never be voted on.
        let spent = matches!(view.utxo(&outpoint).map(|utxo| utxo.state), Some(UTXOState::Confirmed { .. }));
        if spent || view.is_fenced(&outpoint) {
            return;
        }
        step.changes.fence.insert(outpoint, true);
        if let Some(fence) = &mut self.fence {
            fence.fenced += 1;
        }
    }

    /// Outputs come into being, in the block of this height if it is one. They are fenced as
    /// long as nobody has said up to where to fence, and in the block after that.
    pub(super) fn fence_outputs<V: View>(
        &mut self,
        step: &mut Step<'_, V>,
        height: Option<Height>,
        outputs: impl Iterator<Item = OutPoint>,
    ) {
        let Some(fence) = &self.fence else { return };
        let fenced = match fence.state {
            FenceState::Asking => true,
            FenceState::Standing { height: asked } => height == Some(asked.saturating_add(1)),
            FenceState::Down => false,
        };
        if fenced {
            outputs.for_each(|outpoint| self.put_behind_fence(step, outpoint));
        }
    }

    /// These are spent in the chain, or will never come into being: the fence around them is
    /// of no use.
    pub(super) fn wear_off<V: View>(&mut self, step: &mut Step<'_, V>, outpoints: impl Iterator<Item = OutPoint>) {
        let Some(fence) = &mut self.fence else { return };
        for outpoint in outpoints {
            if step.view().is_fenced(&outpoint) {
                step.changes.fence.insert(outpoint, false);
                fence.fenced = fence.fenced.saturating_sub(1);
            }
        }
    }

    /// Asks whoever has not answered; once enough have, the fence stands; once nothing is
    /// behind it, it is gone.
    pub(super) fn tend_fence<V: View>(&mut self, step: &mut Step<'_, V>) {
        match self.fence.as_ref().map(|fence| fence.state) {
            Some(FenceState::Asking) if self.own.is_some() => {
                self.ask_for_fence(step);
                self.raise_fence(step);
            }
            Some(FenceState::Standing { height }) => {
                let over = self.chain.tip.height >= height.saturating_add(3);
                if over && self.fence.as_ref().is_some_and(|fence| fence.fenced == 0) {
                    self.fence = None;
                    step.changes.fence_state = Some(FenceState::Down);
                }
            }
            _ => {}
        }
    }

    fn ask_for_fence<V: View>(&mut self, step: &mut Step<'_, V>) {
        let now_ms = step.now.ms;
        let connected: Vec<_> = self.follow.connected().collect();
        let Some(fence) = &mut self.fence else { return };
        for member in connected {
            let answer = fence.answers.entry(member).or_default();
            if !answer.complete && answer.asked_until_ms.is_none_or(|until| now_ms >= until) {
                answer.asked_until_ms = Some(now_ms + FENCE_ANSWER_MS);
                step.act(Action::RequestFence { to: member, after: answer.after.clone() });
            }
        }
    }

    /// An answer counts once its height is proved by the blocks up to it being executed here.
    fn raise_fence<V: View>(&mut self, step: &mut Step<'_, V>) {
        let tip = self.chain.tip.height;
        let Some(fence) = &mut self.fence else { return };
        let counted = fence.answers.iter().filter(|(_, answer)| answer.complete && answer.height <= tip);
        let (mut weight, mut height) = (0, 0);
        for (member, answer) in counted {
            weight += self.committee.weight(*member);
            height = height.max(answer.height);
        }
        if weight < self.committee.quorum() {
            return;
        }
        fence.state = FenceState::Standing { height };
        fence.answers.clear();
        step.changes.fence_state = Some(fence.state);
        tracing::info!(height, fenced = fence.fenced, "the fence stands; this member votes on what is not behind it");
        // What was only followed until now is looked at again, own votes of before too.
        let all: Vec<Txid> = self.pending.iter().map(|(txid, _)| *txid).collect();
        all.into_iter().for_each(|txid| self.ready(txid));
    }

    /// An own vote that the database does not hold: once votes were lost, it is one of those.
    /// It counts like anybody's, and is told apart once its transaction is here: what was
    /// lost spends something fenced, or what the chain has spent since.
    pub(super) fn meet_lost_votes<V: View>(&mut self, step: &Step<'_, V>, txid: &Txid) {
        let Some(own) = self.own.filter(|_| self.has_lost_votes && !self.is_asking()) else { return };
        let key = self.committee.member(own).public_key;
        let Some(pending) = self.pending.get(txid) else { return };
        let Some(transaction) = pending.transaction.as_ref() else { return };
        let certified = |certificate: &Certificate| certificate.votes.iter().any(|vote| vote.voter == key);
        let unknown = VoteKind::ALL.into_iter().any(|kind| {
            let said = pending.tallies.of(kind).has(own) || pending.certificate(kind).is_some_and(|c| certified(c));
            said && !*pending.own.of(kind)
        });
        if unknown && !self.is_fenced(step, transaction) && can_live(step, transaction) {
            self.suspend(Suspension::UnknownOwnVote);
        }
    }
}

/// Whether its inputs are here and the chain has spent none of them for another. What it has
/// spent may be forgotten, and then is not here.
fn can_live<V: View>(step: &Step<'_, V>, transaction: &Transaction) -> bool {
    let view = step.view();
    let txid = transaction.txid();
    let spent = |state| matches!(state, UTXOState::Confirmed { txid: by, .. } if by != txid);
    transaction.spends().all(|outpoint| view.utxo(&outpoint).is_some_and(|utxo| !spent(utxo.state)))
}
