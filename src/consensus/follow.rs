//! Catching up with the chain: who has more of it, which blocks to ask for and of whom,
//! and the bodies that decided blocks lack (protocol §8).
//!
//! A decided block carries the precommits of a quorum, so whoever serves it is not
//! believed but checked. Who serves what does not follow, or claims what it cannot show,
//! is not asked again for a while.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::committee::{Committee, MemberIndex};
use super::event::Action;
use super::machine::{Machine, Step};
use super::view::View;
use crate::limits::{
    MAX_BODIES_ASKED, MAX_ENTRIES_PER_COMMIT, MAX_QUEUED_ENTRIES, SYNC_ANSWER_MS, SYNC_DISTRUST_MS, SYNC_POLL_MS,
};
use crate::types::{DecidedBlock, Height, Transaction, Txid};

/// A question that is out.
#[derive(Debug, Clone, Copy)]
struct Asked {
    member: MemberIndex,
    deadline_ms: u64,
    /// Where the answer has to begin; 0 for bodies.
    from_height: Height,
}

/// What is known of the chain beyond this node's tip.
#[derive(Debug, Default)]
pub(super) struct Follow {
    /// What members say of their heights.
    heights: BTreeMap<MemberIndex, Height>,
    connected: BTreeSet<MemberIndex>,
    distrusted: BTreeMap<MemberIndex, u64>,
    /// Decided blocks in order, from the next height on.
    queue: VecDeque<Arc<DecidedBlock>>,
    queued_entries: usize,
    asked_blocks: Option<Asked>,
    next_poll_ms: u64,
    /// Who has said since the last block that there is nothing more.
    at_the_end: BTreeSet<MemberIndex>,
    /// Whether so many have said so once that one of them is honest.
    was_at_the_end: bool,
    /// Bodies that queued blocks need: `None` until they are here.
    bodies: BTreeMap<Txid, Option<Arc<Transaction>>>,
    to_ask: VecDeque<Txid>,
    outstanding: BTreeSet<Txid>,
    asked_bodies: Option<Asked>,
    turn: usize,
}

impl Follow {
    pub(super) fn body(&self, txid: &Txid) -> Option<Arc<Transaction>> {
        self.bodies.get(txid).cloned().flatten()
    }

    pub(super) fn forget(&mut self, txid: &Txid) {
        self.bodies.remove(txid);
        self.outstanding.remove(txid);
    }

    /// Whether a queued block needs this body.
    pub(super) fn wants(&self, txid: &Txid) -> bool {
        self.bodies.contains_key(txid)
    }

    /// Takes a body that a queued block needs. Of two copies the first one stays: whose keys
    /// are right is seen when the parents are here.
    pub(super) fn take_body(&mut self, transaction: &Arc<Transaction>) {
        let txid = transaction.txid();
        self.outstanding.remove(&txid);
        if let Some(place) = self.bodies.get_mut(&txid) {
            place.get_or_insert_with(|| Arc::clone(transaction));
        }
    }

    /// A body is wanted, or a better one; asking for it comes by itself.
    fn want(&mut self, txid: Txid) {
        // Where there is an empty place it is asked for already.
        if self.bodies.insert(txid, None) != Some(None) {
            self.to_ask.push_back(txid);
        }
    }

    fn end(&self, tip: Height) -> Height {
        tip + self.queue.len() as Height
    }

    /// The greatest height that somebody believable has.
    fn goal(&self, now_ms: u64) -> Height {
        let believed = self.heights.iter().filter(|(member, _)| !self.is_distrusted(member, now_ms));
        believed.map(|(_, height)| *height).max().unwrap_or(0)
    }

    /// The greatest height that members of more than a third of the weight have: one of them
    /// is honest.
    fn sure_goal(&self, committee: &Committee) -> Height {
        let mut claims: Vec<(Height, u64)> =
            self.heights.iter().map(|(member, height)| (*height, committee.weight(*member))).collect();
        claims.sort_unstable_by(|a, b| b.cmp(a));
        let mut weight = 0;
        let enough = committee.total_weight() / 3;
        let sure = claims.into_iter().find(|(_, more)| {
            weight += more;
            weight > enough
        });
        sure.map_or(0, |(height, _)| height)
    }

    fn is_distrusted(&self, member: &MemberIndex, now_ms: u64) -> bool {
        self.distrusted.get(member).is_some_and(|until| now_ms < *until)
    }

    /// The members that are connected and believable.
    pub(super) fn connected(&self) -> impl Iterator<Item = MemberIndex> + '_ {
        self.connected.iter().copied()
    }

    pub(super) fn distrust(&mut self, member: MemberIndex, now_ms: u64) {
        self.heights.remove(&member);
        self.distrusted.insert(member, now_ms + SYNC_DISTRUST_MS);
    }

    /// A member says that there is nothing more. An observer is not told heights, so it asks
    /// on until one of those who say so has to be honest.
    fn hear_the_end(&mut self, member: MemberIndex, committee: &Committee) {
        let first = self.at_the_end.insert(member);
        let weight: u64 = self.at_the_end.iter().map(|member| committee.weight(*member)).sum();
        self.was_at_the_end |= weight > committee.total_weight() / 3;
        if first && !self.was_at_the_end {
            self.next_poll_ms = 0;
        }
    }

    /// Whose turn it is to be asked, among those who may know more than `height`.
    fn choose(&mut self, above: Option<Height>, now_ms: u64) -> Option<MemberIndex> {
        let knows = |member: &MemberIndex| {
            above.is_none_or(|height| self.heights.get(member).is_some_and(|claimed| *claimed > height))
        };
        let able: Vec<_> = self
            .connected
            .iter()
            .filter(|member| !self.is_distrusted(member, now_ms) && knows(member))
            .copied()
            .collect();
        self.turn = self.turn.wrapping_add(1);
        able.get(self.turn % able.len().max(1)).copied()
    }
}

impl Machine {
    /// A connection to a member is up or down.
    pub(super) fn member_connected(&mut self, member: MemberIndex, up: bool) {
        let follow = &mut self.follow;
        if up {
            follow.connected.insert(member);
            return;
        }
        follow.connected.remove(&member);
        follow.heights.remove(&member);
        let was_asked = |asked: &Option<Asked>| asked.is_some_and(|asked| asked.member == member);
        if was_asked(&follow.asked_blocks) {
            follow.asked_blocks = None;
        }
        if was_asked(&follow.asked_bodies) {
            follow.asked_bodies = None;
        }
    }

    /// A member says how far its chain goes.
    pub(super) fn hear_height(&mut self, member: MemberIndex, height: Height, now_ms: u64) {
        if !self.follow.is_distrusted(&member, now_ms) {
            self.follow.heights.insert(member, height);
        }
    }

    /// A member served blocks under certificates that prove nothing.
    pub(super) fn catch_forging(&mut self, member: MemberIndex, now_ms: u64) {
        self.follow.asked_blocks = self.follow.asked_blocks.filter(|asked| asked.member != member);
        self.follow.distrust(member, now_ms);
    }

    /// Whether there is more of the chain than this node has executed, as far as it knows.
    /// What one liar claims does not count.
    pub fn is_behind(&self) -> bool {
        let follow = &self.follow;
        let unsure = self.own.is_none() && !follow.was_at_the_end;
        unsure || !follow.queue.is_empty() || follow.sure_goal(&self.committee) > self.chain.tip.height
    }

    /// The height of this node's chain.
    pub const fn height(&self) -> Height {
        self.chain.tip.height
    }

    /// Heights at which a member was seen to say two things at once.
    pub fn equivocations(&self) -> u64 {
        self.agreement.as_ref().map_or(0, super::agreement::Agreement::equivocations)
    }

    /// The number of transactions that are final and not in the chain.
    pub fn unconfirmed(&self) -> usize {
        self.chain.unconfirmed.len()
    }

    /// The height up to which there is a chain, as far as this node knows.
    pub fn goal(&self, now_ms: u64) -> Height {
        self.follow.goal(now_ms).max(self.chain.tip.height)
    }

    /// Blocks came, each with a good certificate.
    pub(super) fn take_blocks<V: View>(
        &mut self,
        step: &mut Step<'_, V>,
        from: MemberIndex,
        blocks: Vec<Arc<DecidedBlock>>,
    ) {
        let now_ms = step.now.ms;
        // What begins elsewhere is no answer, so a member that says the same again and again
        // is given up like a silent one.
        let begins = blocks.first().map(|first| first.block.height);
        let answers = |asked: Asked| asked.member == from && begins.is_none_or(|height| height == asked.from_height);
        let solicited = self.follow.asked_blocks.is_some_and(answers);
        if solicited {
            self.follow.asked_blocks = None;
            if blocks.is_empty() {
                // It has no more, whatever it claimed.
                self.follow.hear_the_end(from, &self.committee);
                let end = self.follow.end(self.chain.tip.height);
                if self.follow.heights.get(&from).is_some_and(|claimed| *claimed > end) {
                    self.follow.distrust(from, now_ms);
                }
            }
        }
        for decided in blocks {
            let end = self.follow.end(self.chain.tip.height);
            if decided.block.height <= end {
                continue;
            }
            let last_hash = self.follow.queue.back().map_or(self.chain.tip.hash, |last| last.certificate.block_hash);
            if decided.block.height != end + 1 || decided.block.previous_hash != last_hash {
                if solicited {
                    tracing::warn!(member = self.committee.member(from).id, "served blocks that do not follow");
                    self.follow.distrust(from, now_ms);
                    step.act(Action::Disconnect { member: from });
                }
                return;
            }
            let entries = decided.block.transactions.len();
            if self.follow.queued_entries > 0 && self.follow.queued_entries + entries > MAX_QUEUED_ENTRIES {
                return;
            }
            self.enqueue(decided);
        }
    }

    /// Whether the body of a queued block's transaction is here. What was in flight when the
    /// block came may be gone when its turn comes.
    fn has_body(&self, txid: &Txid) -> bool {
        self.chain.unconfirmed.contains(txid)
            || self.pending.get(txid).is_some_and(|pending| pending.transaction.is_some())
            || self.follow.body(txid).is_some()
    }

    fn enqueue(&mut self, decided: Arc<DecidedBlock>) {
        for txid in &decided.block.transactions {
            if !self.has_body(txid) {
                self.follow.want(*txid);
            }
        }
        self.follow.at_the_end.clear();
        self.follow.queued_entries += decided.block.transactions.len();
        self.follow.queue.push_back(decided);
    }

    /// Executes the queued blocks whose bodies are here, as many as one commit bears, and
    /// asks for what is missing. Whether more could be executed at once.
    pub(super) fn follow_chain<V: View>(&mut self, step: &mut Step<'_, V>) -> bool {
        let mut executed = 0;
        while let Some(next) = self.follow.queue.front().cloned() {
            if next.block.height <= self.chain.tip.height {
                self.drop_front();
                continue;
            }
            let missing = next.block.transactions.iter().filter(|txid| !self.has_body(txid));
            let missing: Vec<Txid> = missing.copied().collect();
            if !missing.is_empty() {
                missing.into_iter().for_each(|txid| self.follow.want(txid));
                break;
            }
            let is_foreign =
                |txid: &&Txid| !self.chain.unconfirmed.contains(txid) && self.body_for_block(step, txid).is_none();
            let foreign: Vec<Txid> = next.block.transactions.iter().filter(is_foreign).copied().collect();
            if !foreign.is_empty() {
                tracing::warn!(bodies = foreign.len(), "bodies under keys that own nothing");
                foreign.into_iter().for_each(|txid| self.follow.want(txid));
                break;
            }
            if executed > 0 && executed + next.block.transactions.len() > MAX_ENTRIES_PER_COMMIT {
                return true;
            }
            executed += next.block.transactions.len().max(1);
            self.drop_front();
            self.execute(step, next);
            if let Some(agreement) = &mut self.agreement {
                agreement.abandon();
            }
            if step.fault.is_some() {
                return false;
            }
        }
        self.ask_for_bodies(step);
        self.ask_for_blocks(step);
        false
    }

    fn drop_front(&mut self) {
        let Some(front) = self.follow.queue.pop_front() else { return };
        self.follow.queued_entries -= front.block.transactions.len();
        if front.block.height <= self.chain.tip.height {
            for txid in &front.block.transactions {
                self.follow.forget(txid);
            }
        }
    }

    fn ask_for_bodies<V: View>(&mut self, step: &mut Step<'_, V>) {
        let now_ms = step.now.ms;
        let follow = &mut self.follow;
        if follow.asked_bodies.is_some_and(|asked| now_ms >= asked.deadline_ms) {
            follow.asked_bodies = None;
        }
        if follow.asked_bodies.is_none() && !follow.outstanding.is_empty() {
            // The answer was cut, or did not come: another member is asked for the rest.
            let again: Vec<Txid> = std::mem::take(&mut follow.outstanding).into_iter().collect();
            again.into_iter().rev().for_each(|txid| follow.to_ask.push_front(txid));
        }
        if !follow.outstanding.is_empty() || follow.to_ask.is_empty() {
            return;
        }
        let above = follow.queue.front().map(|front| front.block.height - 1);
        let Some(member) = follow.choose(above, now_ms).or_else(|| follow.choose(None, now_ms)) else { return };
        while follow.outstanding.len() < MAX_BODIES_ASKED {
            let Some(txid) = follow.to_ask.pop_front() else { break };
            if follow.bodies.get(&txid).is_some_and(Option::is_none) && follow.outstanding.insert(txid) {
                step.actions.push(Action::Request { to: Some(member), txid });
            }
        }
        if !follow.outstanding.is_empty() {
            let deadline_ms = now_ms + SYNC_ANSWER_MS / 3;
            follow.asked_bodies = Some(Asked { member, deadline_ms, from_height: 0 });
        }
    }

    fn ask_for_blocks<V: View>(&mut self, step: &mut Step<'_, V>) {
        let (now_ms, observer) = (step.now.ms, self.own.is_none());
        let end = self.follow.end(self.chain.tip.height);
        let follow = &mut self.follow;
        if let Some(asked) = follow.asked_blocks {
            if now_ms < asked.deadline_ms {
                return;
            }
            follow.asked_blocks = None;
            follow.distrust(asked.member, now_ms);
        }
        if follow.queued_entries >= MAX_QUEUED_ENTRIES / 2 {
            return;
        }
        let member = if follow.goal(now_ms) > end {
            follow.choose(Some(end), now_ms)
        } else if observer && now_ms >= follow.next_poll_ms {
            follow.next_poll_ms = now_ms + SYNC_POLL_MS;
            follow.choose(None, now_ms)
        } else {
            None
        };
        if let Some(member) = member {
            let (deadline_ms, from_height) = (now_ms + SYNC_ANSWER_MS, end + 1);
            follow.asked_blocks = Some(Asked { member, deadline_ms, from_height });
            step.act(Action::RequestBlocks { to: member, from_height });
        }
    }
}
