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
    MAX_BODIES_ASKED, MAX_ENTRIES_PER_COMMIT, MAX_LOTS_OF_A_MEMBER, MAX_PAGE_BYTES, MAX_QUEUED_ENTRIES,
    MAX_TRANSACTIONS_PER_REQUEST, SYNC_ANSWER_MS, SYNC_CUT_MS, SYNC_DISTRUST_MS, SYNC_POLL_MS,
};
use crate::types::{DecidedBlock, Height, Transaction, Txid};

/// A question for blocks that is out.
#[derive(Debug, Clone, Copy)]
struct Asked {
    member: MemberIndex,
    deadline_ms: u64,
    /// Where the answer has to begin.
    from_height: Height,
}

/// A question for bodies that is out. One member has few of them at a time.
#[derive(Debug, Clone, Copy)]
struct Lot {
    member: MemberIndex,
    deadline_ms: u64,
    /// How many of its bodies are not here.
    left: usize,
    /// When the last one came, if one did.
    heard_ms: Option<u64>,
}

impl Lot {
    /// Whether it has brought something, and has ended: an answer is cut where it becomes too long.
    fn is_cut(&self, now_ms: u64) -> bool {
        self.heard_ms.is_some_and(|heard_ms| now_ms >= heard_ms + SYNC_CUT_MS)
    }
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
    /// What is asked for, and in which lot.
    outstanding: BTreeMap<Txid, u64>,
    lots: BTreeMap<u64, Lot>,
    next_lot: u64,
    /// Who let a lot run out of time, and until when others are asked rather.
    slow: BTreeMap<MemberIndex, u64>,
    /// Entries of the first queued block whose bodies were here when it was last looked.
    seen: usize,
    turn: usize,
}

impl Follow {
    pub(super) fn body(&self, txid: &Txid) -> Option<Arc<Transaction>> {
        self.bodies.get(txid).cloned().flatten()
    }

    pub(super) fn forget(&mut self, txid: &Txid) {
        self.bodies.remove(txid);
        self.has_come(txid);
    }

    /// A body is not asked for any more.
    fn has_come(&mut self, txid: &Txid) {
        let Some(id) = self.outstanding.remove(txid) else { return };
        let Some(lot) = self.lots.get_mut(&id) else { return };
        lot.left -= 1;
        if lot.left == 0 {
            self.lots.remove(&id);
        }
    }

    /// What these lots have not brought is to be asked for again, before anything else.
    fn take_back(&mut self, lots: &BTreeSet<u64>) {
        if lots.is_empty() {
            return;
        }
        self.lots.retain(|id, _| !lots.contains(id));
        let again: Vec<Txid> = self.outstanding.iter().filter(|(_, lot)| lots.contains(lot)).map(|(t, _)| *t).collect();
        for txid in again {
            self.outstanding.remove(&txid);
            self.to_ask.push_front(txid);
        }
    }

    fn lots_of(&self, is_meant: impl Fn(&Lot) -> bool) -> BTreeSet<u64> {
        self.lots.iter().filter(|(_, lot)| is_meant(lot)).map(|(id, _)| *id).collect()
    }

    /// Whether a queued block needs this body.
    pub(super) fn wants(&self, txid: &Txid) -> bool {
        self.bodies.contains_key(txid)
    }

    /// Takes a body that a queued block needs. Of two copies the first one stays: whose keys
    /// are right is seen when the parents are here.
    pub(super) fn take_body(&mut self, transaction: &Arc<Transaction>, now_ms: u64) {
        let txid = transaction.txid();
        if let Some(lot) = self.outstanding.get(&txid).and_then(|id| self.lots.get_mut(id)) {
            lot.heard_ms = Some(now_ms);
        }
        self.has_come(&txid);
        if let Some(place) = self.bodies.get_mut(&txid) {
            place.get_or_insert_with(|| Arc::clone(transaction));
        }
    }

    /// A body is wanted, or a better one; asking for it comes by itself. Whether it was not
    /// wanted before.
    fn want(&mut self, txid: Txid) -> bool {
        // Where there is an empty place it is asked for already.
        let anew = self.bodies.insert(txid, None) != Some(None);
        if anew {
            self.to_ask.push_back(txid);
        }
        anew
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
        self.choose_among(above, now_ms, |_| true)
    }

    fn choose_among(
        &mut self,
        above: Option<Height>,
        now_ms: u64,
        may: impl Fn(&MemberIndex) -> bool,
    ) -> Option<MemberIndex> {
        let knows = |member: &MemberIndex| {
            above.is_none_or(|height| self.heights.get(member).is_some_and(|claimed| *claimed > height))
        };
        let able: Vec<_> = self
            .connected
            .iter()
            .filter(|member| !self.is_distrusted(member, now_ms) && knows(member) && may(member))
            .copied()
            .collect();
        self.turn = self.turn.wrapping_add(1);
        able.get(self.turn % able.len().max(1)).copied()
    }

    /// Whom to ask for bodies of the first queued block: who has room for a question, and
    /// rather who has that block and was not slow.
    fn choose_for_bodies(&mut self, now_ms: u64) -> Option<MemberIndex> {
        let above = self.queue.front().map(|front| front.block.height - 1);
        let mut out = BTreeMap::<MemberIndex, usize>::new();
        self.lots.values().for_each(|lot| *out.entry(lot.member).or_default() += 1);
        self.slow.retain(|_, until_ms| now_ms < *until_ms);
        let slow = self.slow.clone();
        let has_room = |member: &MemberIndex| out.get(member).is_none_or(|lots| *lots < MAX_LOTS_OF_A_MEMBER);
        let is_quick = |member: &MemberIndex| !slow.contains_key(member);
        self.choose_among(above, now_ms, |member| is_quick(member) && has_room(member))
            .or_else(|| self.choose_among(None, now_ms, |member| is_quick(member) && has_room(member)))
            .or_else(|| self.choose_among(None, now_ms, |member| !is_quick(member) && !out.contains_key(member)))
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
        follow.take_back(&follow.lots_of(|lot| lot.member == member));
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
            if self.lacks_bodies(&next) {
                break;
            }
            let is_foreign =
                |txid: &&Txid| !self.chain.unconfirmed.contains(txid) && self.body_for_block(step, txid).is_none();
            let foreign: Vec<Txid> = next.block.transactions.iter().filter(is_foreign).copied().collect();
            if !foreign.is_empty() {
                tracing::warn!(bodies = foreign.len(), "bodies under keys that own nothing");
                self.follow.seen = 0;
                for txid in foreign {
                    self.follow.want(txid);
                }
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

    /// Whether bodies of the first queued block are not here; they are wanted then. This is
    /// asked far more often than one comes, so the entries before the first missing one are
    /// not looked at each time.
    fn lacks_bodies(&mut self, next: &DecidedBlock) -> bool {
        let txids = &next.block.transactions;
        let more = txids.iter().skip(self.follow.seen).take_while(|txid| self.has_body(txid)).count();
        self.follow.seen += more;
        if let Some(missing) = txids.get(self.follow.seen)
            && !self.follow.want(*missing)
        {
            return true;
        }
        // What was here when the block came, or when it was last looked, may be gone.
        let missing: Vec<Txid> = txids.iter().filter(|txid| !self.has_body(txid)).copied().collect();
        if missing.is_empty() {
            return false;
        }
        self.follow.seen = 0;
        for txid in missing {
            self.follow.want(txid);
        }
        true
    }

    fn drop_front(&mut self) {
        let Some(front) = self.follow.queue.pop_front() else { return };
        self.follow.queued_entries -= front.block.transactions.len();
        self.follow.seen = 0;
        if front.block.height <= self.chain.tip.height {
            for txid in &front.block.transactions {
                self.follow.forget(txid);
            }
        }
    }

    /// Asks for bodies in lots, of all members at once, so that the next are on their way while
    /// the last are taken in.
    fn ask_for_bodies<V: View>(&mut self, step: &mut Step<'_, V>) {
        let now_ms = step.now.ms;
        let late = self.follow.lots_of(|lot| now_ms >= lot.deadline_ms || lot.is_cut(now_ms));
        for id in &late {
            if let Some(lot) = self.follow.lots.get(id).filter(|lot| lot.heard_ms.is_none()) {
                self.follow.slow.insert(lot.member, now_ms + SYNC_ANSWER_MS);
            }
        }
        self.follow.take_back(&late);
        while !self.follow.to_ask.is_empty() && self.follow.outstanding.len() < MAX_BODIES_ASKED {
            let Some(member) = self.follow.choose_for_bodies(now_ms) else { return };
            let id = self.follow.next_lot;
            let mut txids = Vec::new();
            while txids.len() < self.bodies_of_an_answer() {
                let Some(txid) = self.follow.to_ask.pop_front() else { break };
                // What became final meanwhile is here. A body that is only in flight may be a copy
                // under foreign keys, or go again.
                if self.chain.unconfirmed.contains(&txid) {
                    self.follow.forget(&txid);
                    continue;
                }
                let wanted = self.follow.bodies.get(&txid).is_some_and(Option::is_none);
                if wanted && !self.follow.outstanding.contains_key(&txid) {
                    self.follow.outstanding.insert(txid, id);
                    txids.push(txid);
                }
            }
            if !txids.is_empty() {
                let (deadline_ms, left) = (now_ms + SYNC_ANSWER_MS, txids.len());
                let lot = Lot { member, deadline_ms, left, heard_ms: None };
                self.follow.next_lot += 1;
                self.follow.lots.insert(id, lot);
                tracing::debug!(
                    member = self.committee.member(member).id,
                    bodies = txids.len(),
                    late = late.len(),
                    to_ask = self.follow.to_ask.len(),
                    "asking for bodies"
                );
                step.act(Action::RequestBodies { to: member, txids });
            }
        }
    }

    /// How many bodies one answer has before it is cut if each comes with the votes of a quorum, for
    /// not everybody leaves those out.
    fn bodies_of_an_answer(&self) -> usize {
        let quorum = self.committee.members().len() * 2 / 3 + 1;
        (MAX_PAGE_BYTES / (1_024 * (quorum + 2))).clamp(1, MAX_TRANSACTIONS_PER_REQUEST)
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
