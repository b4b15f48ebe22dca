//! This member's part in agreeing on blocks, driven by what the ledger holds: when a
//! height is opened, what is put forward, what is found of others' blocks.

use std::collections::BTreeMap;
use std::sync::Arc;

use super::agreement::{Agreement, AgreementFault, AgreementRecord, ConsensusMessage};
use super::chain::{Verdict, Wanted};
use super::committee::MemberIndex;
use super::event::{Action, Fault, Suspension};
use super::machine::{Machine, Step};
use super::view::View;
use crate::limits::{ASK_EVERYBODY_AFTER_MS, LOOK_FOR_CONTENT_MS, SYNC_POLL_MS};
use crate::types::{BlockHash, Height};

/// What is lacking for verdicts on proposed blocks.
#[derive(Debug, Default)]
pub(super) struct Lacking(BTreeMap<BlockHash, Errand>);

/// What one block lacks, and when it is asked for again: later each time, for a liar may
/// put forward what nobody has.
#[derive(Debug)]
struct Errand {
    entries: Vec<Wanted>,
    /// How many of them, from the first, have been found here since.
    found: usize,
    again_ms: u64,
    tries: u32,
}

impl Machine {
    /// A message about a block came from a member.
    pub(super) fn consensus_message<V: View>(
        &mut self,
        step: &mut Step<'_, V>,
        from: MemberIndex,
        message: &ConsensusMessage,
    ) {
        let (height, next) = (message.height(), self.chain.tip.height + 1);
        if height > next {
            self.hear_height(from, height - 1, step.now.ms);
            return;
        }
        if height < next {
            return self.remind_of_block(step, from, height);
        }
        self.with_agreement(step, |agreement, step| {
            if !agreement.running() {
                agreement.start(next, step.now.ms)?;
            }
            agreement.receive(message, step.now.ms, step.now.unix_ms)
        });
    }

    /// A member has missed a decision: it is sent the block, now and then.
    pub(super) fn remind_of_block<V: View>(&mut self, step: &mut Step<'_, V>, to: MemberIndex, from_height: Height) {
        let told = self.told_blocks.get(&to).is_some_and(|at| step.now.ms < at + SYNC_POLL_MS);
        if !told {
            self.told_blocks.insert(to, step.now.ms);
            step.act(Action::SendBlocks { to, from_height });
        }
    }

    /// Feeds the agreement what its log holds of the open height.
    pub(super) fn replay_agreement<V: View>(&mut self, step: &mut Step<'_, V>, log: Vec<AgreementRecord>) {
        let next = self.chain.tip.height + 1;
        self.with_agreement(step, |agreement, step| agreement.replay(next, log, step.now.ms).map(Ok));
    }

    /// Runs something on the agreement, if this member takes part, and collects what it
    /// wants logged and said.
    fn with_agreement<V: View>(
        &mut self,
        step: &mut Step<'_, V>,
        run: impl FnOnce(
            &mut Agreement,
            &mut Step<'_, V>,
        ) -> Result<Result<(), super::agreement::UnknownOwnMessage>, AgreementFault>,
    ) {
        if !self.may_agree() {
            return;
        }
        let Some(agreement) = &mut self.agreement else { return };
        match run(agreement, step) {
            Ok(Ok(())) => {}
            Ok(Err(_)) => self.suspend(Suspension::UnknownOwnVote),
            Err(fault) => step.fail(Fault::Agreement(fault)),
        }
        if let Some(agreement) = &mut self.agreement {
            let outcome = agreement.take_outcome();
            step.changes.agreement.extend(outcome.log);
            step.actions.extend(outcome.messages.into_iter().map(|message| Action::Consensus(Arc::new(message))));
        }
    }

    /// Takes part in the agreement from now on, if this member may; whether it does.
    pub(super) fn join_agreement(&mut self) -> bool {
        if !self.may_agree() {
            return false;
        }
        if let (None, Some(key)) = (&self.agreement, &self.key) {
            self.agreement = Some(Agreement::new(&self.committee, key.clone(), self.chain.tip.height));
        }
        self.agreement.is_some()
    }

    /// Looks at everything about blocks that the step may have made possible. To be called
    /// once for each batch of events, at its end; `true` if there is more to do at once.
    pub fn advance<V: View>(&mut self, step: &mut Step<'_, V>) -> bool {
        let more = self.follow_chain(step);
        self.tend_fence(step);
        // Each decision opens the way for the next height.
        while step.fault.is_none() && self.agree(step) {}
        self.look_again(step);
        more
    }

    /// One round of looking; whether a block was decided.
    fn agree<V: View>(&mut self, step: &mut Step<'_, V>) -> bool {
        if !self.join_agreement() {
            return false;
        }
        let (now_ms, next) = (step.now.ms, self.chain.tip.height + 1);
        self.with_agreement(step, |agreement, _| agreement.tick(now_ms).map(Ok));
        let running = self.agreement.as_ref().is_some_and(Agreement::running);
        let due_at = self.chain.executed_at_ms.saturating_add(self.chain.interval_ms);
        // Looking through all that is in flight is dear, so it is done now and then.
        let look = now_ms >= self.chain.look_at_ms;
        if look {
            self.chain.look_at_ms = now_ms + LOOK_FOR_CONTENT_MS;
        }
        if look && !running && now_ms >= due_at && !self.is_behind() && self.has_block_content(step) {
            self.with_agreement(step, |agreement, _| agreement.start(next, now_ms).map(Ok));
        }
        self.judge_candidates(step);
        let started = !running && self.agreement.as_ref().is_some_and(Agreement::running);
        if (look || started) && self.agreement.as_ref().is_some_and(Agreement::wants_block) {
            let proposer = self.own.map(|own| self.committee.member(own).public_key);
            if let Some(block) = proposer.and_then(|proposer| self.build(step, proposer)) {
                self.with_agreement(step, |agreement, _| agreement.propose(block, now_ms).map(Ok));
            }
        }
        match self.agreement.as_mut().and_then(Agreement::take_decided) {
            Some(decided) => {
                self.execute(step, Arc::new(decided));
                true
            }
            None => false,
        }
    }

    /// The open height is over: what was only wanted for its proposals is wanted no more.
    pub(super) fn forget_lacking(&mut self) {
        for errand in std::mem::take(&mut self.lacking).0.into_values() {
            for Wanted { txid, .. } in errand.entries {
                let named = self.evidence.values().any(|named| *named == txid);
                if !named && self.pending.get(&txid).is_some_and(|pending| !pending.matters()) {
                    self.pending.remove(&txid);
                }
            }
        }
    }

    fn judge_candidates<V: View>(&mut self, step: &mut Step<'_, V>) {
        let unjudged = self.agreement.as_ref().map(Agreement::unjudged).unwrap_or_default();
        for (hash, block, proposer) in unjudged {
            if !self.may_be_judged(step, &hash) {
                continue;
            }
            let valid = match self.judge(step, &block) {
                Verdict::Valid => true,
                Verdict::Invalid(fault) => {
                    tracing::warn!(height = block.height, %hash, %fault, "refused a block");
                    false
                }
                Verdict::Lacking(entries) => {
                    self.ask_for_lacking(step, hash, entries, self.committee.index_of(&proposer));
                    continue;
                }
            };
            self.lacking.0.remove(&hash);
            let now_ms = step.now.ms;
            self.with_agreement(step, |agreement, _| agreement.judge(&hash, valid, now_ms).map(Ok));
        }
    }

    /// A block that lacked something is looked at again when all of it is here, and when it
    /// is time to ask again. Whatever else comes must not be a reason: an answer without
    /// what was asked for would be the next question at once.
    fn may_be_judged<V: View>(&mut self, step: &Step<'_, V>, hash: &BlockHash) -> bool {
        let Some(Errand { entries, found, again_ms, .. }) = self.lacking.0.get(hash) else { return true };
        let still_lacking = entries.iter().skip(*found).position(|entry| self.lacks(step, entry));
        let due = step.now.ms >= *again_ms;
        if let (Some(more), Some(errand)) = (still_lacking, self.lacking.0.get_mut(hash)) {
            errand.found += more;
        }
        due || still_lacking.is_none()
    }

    /// The proposer is asked first, then everybody.
    fn ask_for_lacking<V: View>(
        &mut self,
        step: &mut Step<'_, V>,
        hash: BlockHash,
        entries: Vec<Wanted>,
        proposer: Option<MemberIndex>,
    ) {
        let tries = self.lacking.0.get(&hash).map_or(0, |errand| errand.tries + 1);
        for Wanted { txid, .. } in &entries {
            // The place says that the body is wanted, whatever its inputs are like.
            self.pending.entry(*txid);
            let to = proposer.filter(|proposer| tries == 0 && Some(*proposer) != self.own);
            step.act(Action::Request { to, txid: *txid });
        }
        let again_ms = step.now.ms + (ASK_EVERYBODY_AFTER_MS << tries.min(5));
        self.lacking.0.insert(hash, Errand { entries, found: 0, again_ms, tries });
    }
}
