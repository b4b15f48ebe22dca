//! The state machine of instant finality (protocol §6; the argument why it is safe
//! stands in [`super`]).
//!
//! The machine is a function of (now, view, event). It reads the durable ledger through
//! a [`View`], keeps what is not settled in memory, and answers with [`Changes`] that
//! have to be durable before any of its [`Action`]s leaves, but for [`Action::Broadcast`],
//! which is a wallet's word. If they cannot be made so, the machine has to be thrown away with
//! them and recovered from the database.
//!
//! It must not: read a clock, do I/O, or tell anybody anything. It signs nothing but what
//! it says about blocks ([`super::agreement`]), which waits for the commit like the rest.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::agree::Lacking;
use super::agreement::Agreement;
use super::certificate::Certificate;
use super::chain::{ChainTip, Unconfirmed};
use super::committee::{Committee, MemberIndex};
use super::event::{Action, Ballot, Event, Fault, Now, Progress, Recovered, Source, Suspension, Ticket, Voting};
use super::fence::Fence;
use super::flaw::Flaw;
use super::follow::Follow;
use super::pending::PendingTable;
use super::resend::Pace;
use super::validate::{Rejection, Rules, check_ledger};
use super::verified::Verified;
use super::view::{Changes, Dead, InFlight, Overlay, Utxo, View};
use super::vote::{CountedVote, MemberBatch, Vote, VoteKind};
use super::waiting::ParentRoom;
use crate::limits::{MAX_IN_FLIGHT, MAX_IN_FLIGHT_WHEN_SLOW, PARENT_WAIT_MS, UNKNOWN_BODY_WAIT_MS};
use crate::types::{BlockHash, OutPoint, SecretKey, Transaction, Txid, UTXOState, UtxoDigest};

/// The chain's part of the machine.
#[derive(Debug)]
pub(super) struct Chain {
    pub(super) tip: ChainTip,
    pub(super) unconfirmed: Unconfirmed,
    pub(super) interval_ms: u64,
    /// When the last block was executed here.
    pub(super) executed_at_ms: u64,
    /// When to look again whether a block has content.
    pub(super) look_at_ms: u64,
}

/// The machine. One thread owns it.
#[derive(Debug)]
pub struct Machine {
    pub(super) committee: Arc<Committee>,
    pub(super) rules: Rules,
    pub(super) own: Option<MemberIndex>,
    pub(super) suspension: Option<Suspension>,
    pub(super) pending: PendingTable,
    /// The latest contradicting transaction of each member on each outpoint.
    pub(super) evidence: BTreeMap<(MemberIndex, OutPoint), Txid>,
    pub(super) room: ParentRoom,
    /// Pending transactions whose certificate cannot be acted on before this parent is here.
    pub(super) awaiting: BTreeMap<Txid, BTreeSet<Txid>>,
    pub(super) timers: BTreeSet<(u64, Timer, Txid)>,
    pub(super) pace: Pace,
    pub(super) chain: Chain,
    pub(super) follow: Follow,
    pub(super) agreement: Option<Agreement>,
    /// What this member signs blocks with.
    pub(super) key: Option<SecretKey>,
    pub(super) fence: Option<Fence>,
    /// Votes of this member were lost once, however long ago.
    pub(super) has_lost_votes: bool,
    pub(super) lacking: Lacking,
    /// When a member was last sent blocks that it had missed.
    pub(super) told_blocks: BTreeMap<MemberIndex, u64>,
    /// Members that are connected to another instance of this one's key.
    twin_seen_by: BTreeSet<MemberIndex>,
    ready: VecDeque<Txid>,
    #[cfg(feature = "planted-flaws")]
    pub(super) flaw: Option<Flaw>,
}

/// What a timer is for. It only says when to look; whether to act is decided then.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Timer {
    ParentWait,
    Conflict,
    Body,
    Resend,
}

/// One batch of events: what the machine reads, and what it wants written and done.
pub struct Step<'a, V> {
    pub(super) now: Now,
    pub(super) base: &'a V,
    /// What has to be written, atomically.
    pub changes: Changes,
    /// What may leave once it is durable; [`Action::Broadcast`] may at once.
    pub actions: Vec<Action>,
    /// Set if the node has to stop instead.
    pub fault: Option<Fault>,
}

impl<'a, V: View> Step<'a, V> {
    /// An empty step over the durable ledger.
    pub fn new(now: Now, base: &'a V) -> Self {
        Self { now, base, changes: Changes::default(), actions: Vec::new(), fault: None }
    }

    /// What comes next came at this time.
    pub const fn go_on(&mut self, now: Now) {
        self.now = now;
    }

    pub(super) fn view(&self) -> Overlay<'_, V> {
        Overlay { base: self.base, changes: &self.changes }
    }

    pub(super) fn act(&mut self, action: Action) {
        self.actions.push(action);
    }

    pub(super) fn fail(&mut self, fault: Fault) {
        self.fault.get_or_insert(fault);
    }

    /// Moves an output on. An illegal step is a fault and changes nothing.
    pub(super) fn transition(&mut self, outpoint: OutPoint, old: Option<Utxo>, new: Utxo) {
        let old = old.map(|utxo| utxo.state);
        if UTXOState::may_follow(old.as_ref(), &new.state) {
            self.changes.transition(outpoint, old, new, self.now.unix);
        } else {
            self.fail(Fault::IllegalTransition { outpoint, old, new: new.state });
        }
    }
}

impl Machine {
    /// A machine that knows of nothing in flight. `own` is this node's place in the
    /// committee, `None` for an observer.
    pub fn new(committee: Arc<Committee>, rules: Rules, own: Option<MemberIndex>) -> Self {
        let pending = PendingTable::new(committee.members().len());
        let tip = ChainTip {
            height: 0,
            hash: BlockHash::from_bytes(*committee.genesis_hash().as_bytes()),
            timestamp_ms: 0,
            supply: crate::types::Amount::ZERO,
            digest: UtxoDigest::new(),
        };
        Self {
            committee,
            rules,
            own,
            suspension: None,
            pending,
            evidence: BTreeMap::new(),
            room: ParentRoom::default(),
            awaiting: BTreeMap::new(),
            timers: BTreeSet::new(),
            pace: Pace::default(),
            chain: Chain { tip, unconfirmed: Unconfirmed::default(), interval_ms: 0, executed_at_ms: 0, look_at_ms: 0 },
            follow: Follow::default(),
            agreement: None,
            key: None,
            fence: None,
            has_lost_votes: false,
            lacking: Lacking::default(),
            told_blocks: BTreeMap::new(),
            twin_seen_by: BTreeSet::new(),
            ready: VecDeque::new(),
            #[cfg(feature = "planted-flaws")]
            flaw: None,
        }
    }

    /// Puts the machine on a chain: its tip, what is final and not in it (in the order in
    /// which it became final), and how long after a block the next one is due.
    pub fn follow_from(&mut self, tip: ChainTip, unconfirmed: Vec<Txid>, interval_ms: u64) {
        self.chain.tip = tip;
        self.chain.interval_ms = interval_ms;
        unconfirmed.into_iter().for_each(|txid| self.chain.unconfirmed.push(txid));
    }

    /// Lets a member take part in the agreement on blocks, from where its log ends. What
    /// it says of the open height again is in the step; the caller commits it like any.
    pub fn take_part<V: View>(&mut self, step: &mut Step<'_, V>, ballot: Ballot) {
        self.key = Some(ballot.key);
        if self.join_agreement() && !ballot.log.is_empty() {
            self.replay_agreement(step, ballot.log);
        }
    }

    /// Takes in what was in flight before a restart. Afterwards the owner signs
    /// [`Machine::own_votes`] anew and counts them.
    pub fn recover(&mut self, recovered: Vec<Recovered>, now: Now) {
        let forgets_locks = self.has(Flaw::LockForgottenOnRestart);
        for Recovered { in_flight, votes, certificates } in recovered {
            let txid = in_flight.transaction.txid();
            let pending = self.pending.attach(&in_flight.transaction);
            pending.recorded = true;
            pending.locked_at = in_flight.locked_at.filter(|_| !forgets_locks);
            pending.begin(now.ms);
            for kind in votes {
                *pending.own.of_mut(kind) = true;
            }
            for certificate in certificates {
                let kind = certificate.kind;
                *pending.certificates.of_mut(kind) = Some(Arc::new(certificate));
            }
            self.timers.insert((now.ms + self.pace.resend_after(), Timer::Resend, txid));
        }
        let rival = |pending: &super::pending::Pending| {
            let rivals = self.pending.rivals(pending.transaction.as_ref()?);
            rivals.into_iter().next()
        };
        let contradicted = self.pending.iter().filter_map(|(txid, pending)| Some((*txid, rival(pending)?)));
        for (txid, by) in contradicted.collect::<Vec<_>>() {
            self.contradict(txid, by, now.ms);
        }
        // What it holds a certificate for may have been one step short of acting on it.
        self.ready.extend(self.pending.iter().map(|(txid, _)| *txid));
    }

    /// Whether this node votes.
    pub fn voting(&self) -> Voting {
        match (self.own, self.suspension) {
            (None, _) => Voting::Observer,
            (Some(_), Some(reason)) => Voting::Suspended(reason),
            (Some(_), None) if self.is_asking() => Voting::Fencing,
            (Some(_), None) => Voting::Active,
        }
    }

    /// Another instance of this member's key lives, as a member says. If one of those who say
    /// so is honest it does, and what it votes is not in this database.
    fn meet_twin(&mut self, member: MemberIndex) {
        self.twin_seen_by.insert(member);
        let weight: u64 = self.twin_seen_by.iter().map(|member| self.committee.weight(*member)).sum();
        if self.own.is_some() && weight > self.committee.total_weight() / 3 {
            self.suspend(Suspension::Twin);
        }
    }

    /// Stops voting, until a repair.
    pub fn suspend(&mut self, reason: Suspension) {
        self.suspension.get_or_insert(reason);
    }

    /// The number of transactions in flight here.
    pub fn in_flight(&self) -> usize {
        self.pending.bodies()
    }

    /// The number of transactions that memory is spent on, also those of which only votes
    /// or a certificate are known.
    pub fn known(&self) -> usize {
        self.pending.len()
    }

    /// This member's votes on everything in flight.
    pub fn own_votes(&self) -> Vec<Vote> {
        let of = |(txid, pending): (&Txid, &super::pending::Pending)| {
            let own = VoteKind::ALL.map(|kind| pending.own.of(kind).then_some(Vote { kind, txid: *txid }));
            own.into_iter().flatten()
        };
        self.pending.iter().flat_map(of).collect()
    }

    /// Up to `limit` transactions in flight after `after`, in order of txid.
    pub fn in_flight_after(&self, after: Option<Txid>, limit: usize) -> Vec<Txid> {
        let recorded = |(txid, pending): (&Txid, &super::pending::Pending)| pending.recorded.then_some(*txid);
        let after = after.unwrap_or(Txid::from_bytes([0; 32]));
        self.pending.after(after).filter_map(recorded).take(limit).collect()
    }

    /// Where a transaction in flight stands.
    pub fn progress(&self, txid: &Txid) -> Option<Progress> {
        let pending = self.pending.get(txid).filter(|p| p.recorded)?;
        // This member's own vote is counted when it is signed, which is after the commit.
        let count = |kind| {
            let counted = self.own.is_some_and(|own| pending.tallies.of(kind).has(own));
            pending.tallies.of(kind).count() + u32::from(*pending.own.of(kind) && !counted)
        };
        Some(Progress::Pending { approvals: count(VoteKind::Approve), commits: count(VoteKind::Commit) })
    }

    /// Answers a wallet that asks where a transaction stands.
    pub fn query<V: View>(&self, step: &mut Step<'_, V>, ticket: Ticket, txid: Txid) {
        let ended = self.ended(step, &txid);
        let progress = ended.or_else(|| self.progress(&txid)).unwrap_or(Progress::Unknown);
        step.act(Action::Reply { ticket, txid, progress });
    }

    /// What became of a transaction that is settled or dead.
    fn ended<V: View>(&self, step: &Step<'_, V>, txid: &Txid) -> Option<Progress> {
        let view = step.view();
        let Some(settled) = view.settled(txid) else {
            return view.dead(txid).filter(|_| !self.has(Flaw::ApproveAborted)).map(Progress::Aborted);
        };
        let height = if self.chain.unconfirmed.contains(txid) { None } else { view.confirmed(txid) };
        Some(match height {
            Some(height) => Progress::Confirmed { settled, height },
            None => Progress::Finalized { settled, certificate: None },
        })
    }

    /// Refuses a transaction whose signatures do not verify, naming the first rule in the
    /// protocol's order that it breaks. It is not kept, and its txid is not held against
    /// a good copy.
    pub fn refuse_unsigned<V: View>(&self, step: &mut Step<'_, V>, ticket: Ticket, transaction: &Transaction) {
        let broken = check_ledger(transaction, &self.rules, &step.view()).err();
        let rejection = broken.unwrap_or(Rejection::InvalidSignature);
        refuse(step, Source::Wallet(ticket), transaction.txid(), rejection);
    }

    /// Handles one event.
    pub fn handle<V: View>(&mut self, step: &mut Step<'_, V>, event: Event) {
        match event {
            Event::Transaction { transaction, source } => {
                let transaction = Arc::new(transaction.into_inner().transaction().clone());
                self.receive(step, transaction, source);
            }
            Event::Votes(batch) if Some(batch.get().member()) == self.own => self.meet_own_votes(step, &batch),
            Event::Votes(batch) => self.count(step, &batch),
            Event::Certificate(certificate) => self.certificate(step, certificate.get().certificate()),
            Event::Blocks { from, blocks } => self.take_blocks(step, from, blocks),
            Event::ForgedBlocks(member) => self.catch_forging(member, step.now.ms),
            Event::Consensus { from, message } => self.consensus_message(step, from, &message),
            Event::Fence { from, page } => self.take_fence(step, from, &page),
            Event::Height { member, height } => self.hear_height(member, height, step.now.ms),
            Event::Connected(member) => {
                self.member_connected(member, true);
                self.greet(step, member);
            }
            Event::Disconnected(member) => self.member_connected(member, false),
            Event::Twin(member) => self.meet_twin(member),
            Event::Tick => self.tick(step),
        }
        self.look_again(step);
    }

    /// Counts a batch that this node signed for votes that are durable.
    pub fn count_own<V: View>(&mut self, step: &mut Step<'_, V>, batch: &Arc<Verified<MemberBatch>>) {
        self.count(step, batch);
        self.look_again(step);
    }

    /// A transaction came, from a wallet or a member.
    pub(super) fn receive<V: View>(&mut self, step: &mut Step<'_, V>, transaction: Arc<Transaction>, source: Source) {
        let txid = transaction.txid();
        if self.follow.wants(&txid) && !self.is_foreign(&step.view(), &transaction) {
            self.follow.take_body(&transaction, step.now.ms);
            if matches!(source, Source::Wallet(_)) {
                // A block has decided it, and its execution here is still to come.
                refuse(step, source, txid, Rejection::Busy);
            }
            return;
        }
        let ended = if step.view().is_open(&transaction) { None } else { self.ended(step, &txid) };
        if let Some(progress) = ended {
            match (source, progress) {
                (Source::Wallet(ticket), progress) => step.act(Action::Reply { ticket, txid, progress }),
                // It still sends the transaction, so it lacks the proof, or the block.
                (Source::Member(to), Progress::Finalized { .. }) => step.act(Action::SendSettled { to, txid }),
                (Source::Member(to), Progress::Confirmed { height, .. } | Progress::Aborted(Dead { height, .. })) => {
                    self.remind_of_block(step, to, height);
                }
                _ => {}
            }
            return;
        }
        let held = self.pending.get(&txid).is_some_and(|pending| {
            let promised = pending.locked_at.is_some() || *pending.own.of(VoteKind::Commit);
            pending.recorded && (promised || !self.may_vote_on(step, &transaction))
        });
        if held {
            if let (Source::Wallet(ticket), Some(progress)) = (source, self.progress(&txid)) {
                step.act(Action::Reply { ticket, txid, progress });
            }
            return;
        }
        match self.room.join(&transaction, source) {
            None => self.accept(step, transaction, source),
            Some(true) => {}
            Some(false) => refuse(step, source, txid, Rejection::Busy),
        }
    }

    /// How many more transactions of wallets can be in flight here. None are if there are too many, or
    /// so many that what becomes final takes long: more would then only make everything take
    /// longer, and the agreement on blocks with it.
    pub fn room(&self) -> usize {
        let most = if self.pace.is_slow() { MAX_IN_FLIGHT_WHEN_SLOW } else { MAX_IN_FLIGHT };
        most.saturating_sub(self.pending.bodies())
    }

    /// How many payments of wallets may wait to be looked at here: when finality takes long,
    /// this member's share of [`Self::room`], for the others let wallets in as well.
    pub fn may_wait(&self) -> usize {
        if self.pace.is_slow() { self.room() / self.committee.members().len().max(1) } else { self.room() }
    }

    /// Locks and approves a transaction, or says why not.
    pub(super) fn accept<V: View>(&mut self, step: &mut Step<'_, V>, transaction: Arc<Transaction>, source: Source) {
        let txid = transaction.txid();
        if matches!(source, Source::Wallet(_)) && self.room() == 0 {
            return refuse(step, source, txid, Rejection::Busy);
        }
        let verdict = check_ledger(&transaction, &self.rules, &step.view());
        #[cfg(feature = "planted-flaws")]
        let verdict = self.spoil(step, &transaction, verdict);
        let foreign = verdict.is_err() && self.is_foreign(&step.view(), &transaction);
        if verdict.is_err() {
            self.forget_hopeless(step, &transaction);
        }
        // Votes or a certificate came before the body: it is needed whatever the verdict.
        if !foreign && self.pending.get(&txid).is_some() && self.own_body(&step.view(), &txid).is_none() {
            let pending = self.pending.attach(&transaction);
            if pending.recorded {
                let row = InFlight { transaction: Arc::clone(&transaction), locked_at: pending.locked_at };
                step.changes.in_flight.insert(txid, Some(row));
            }
            self.ready.push_back(txid);
        }
        match verdict {
            Ok(_) => self.lock(step, &transaction, source),
            Err(Rejection::UnknownInput(missing)) => self.wait_for_parent(step, transaction, source, missing),
            Err(rejection) => {
                if let (Rejection::InputLocked { .. }, Source::Member(member)) = (&rejection, source) {
                    self.keep_evidence(step, &transaction, member);
                }
                if let (Rejection::InputSpent { by, .. }, Source::Member(to)) = (&rejection, source) {
                    step.act(Action::SendSettled { to, txid: *by });
                }
                refuse(step, source, txid, rejection);
            }
        }
    }

    fn wait_for_parent<V: View>(
        &mut self,
        step: &mut Step<'_, V>,
        transaction: Arc<Transaction>,
        source: Source,
        missing: OutPoint,
    ) {
        let txid = transaction.txid();
        // A settled parent has all the outputs that it will ever have.
        let hopeless = step.view().is_settled(&missing.txid);
        let deadline = step.now.ms + PARENT_WAIT_MS;
        if hopeless || !self.room.enter(transaction, source, missing.txid) {
            return refuse(step, source, txid, Rejection::UnknownInput(missing));
        }
        self.timers.insert((deadline, Timer::ParentWait, txid));
        let is_known = self.pending.get(&missing.txid).is_some() || self.follow.wants(&missing.txid);
        if let (Source::Member(member), false) = (source, is_known) {
            step.act(Action::Request { to: Some(member), txid: missing.txid });
        }
    }

    /// Rule 1. The transaction is valid and its inputs are free, or its own already.
    fn lock<V: View>(&mut self, step: &mut Step<'_, V>, transaction: &Arc<Transaction>, source: Source) {
        let txid = transaction.txid();
        let votes = self.may_vote_on(step, transaction);
        let now = step.now;
        let pending = self.pending.attach(transaction);
        let recorded = std::mem::replace(&mut pending.recorded, true);
        pending.begin(now.ms);
        if votes {
            pending.locked_at = Some(now.unix);
            for outpoint in transaction.spends() {
                let Some(old) = step.view().utxo(&outpoint) else { continue };
                if old.state == UTXOState::Unspent {
                    let state = UTXOState::Locked { txid, locked_at: now.unix };
                    step.transition(outpoint, Some(old), Utxo { state, ..old });
                }
            }
            if !std::mem::replace(pending.own.of_mut(VoteKind::Approve), true) {
                step.changes.votes.push(Vote { kind: VoteKind::Approve, txid });
            }
        }
        let row = InFlight { transaction: Arc::clone(transaction), locked_at: pending.locked_at };
        step.changes.in_flight.insert(txid, Some(row));
        if !recorded {
            self.timers.insert((now.ms + self.pace.resend_after(), Timer::Resend, txid));
        }
        // Evidence against it may have come before it.
        for rival in self.contradicting(step, transaction) {
            self.contradict(txid, rival, now.ms);
            self.contradict(rival, txid, now.ms);
        }
        // What a member sent has been sent to all by that member. If it lies, the others' votes
        // make those who lack the body ask for it, and the resend timer sends it to them.
        if !matches!(source, Source::Member(_)) {
            step.act(Action::Broadcast(Arc::clone(transaction)));
        }
        if let Some(progress) = self.progress(&txid) {
            if let Source::Wallet(ticket) = source {
                step.act(Action::Reply { ticket, txid, progress: progress.clone() });
            }
            step.act(Action::Progress { txid, progress });
        }
        self.ready.push_back(txid);
    }

    /// Counts every vote of a batch on what is neither settled nor dead.
    pub(super) fn count<V: View>(&mut self, step: &mut Step<'_, V>, batch: &Arc<Verified<MemberBatch>>) {
        let member = batch.get().member();
        for (index, vote) in batch.get().votes().iter().enumerate() {
            let Vote { kind, txid } = *vote;
            if self.pending.get(&txid).is_none() {
                if step.view().is_settled(&txid) || step.view().is_dead(&txid) {
                    continue;
                }
                self.timers.insert((step.now.ms + UNKNOWN_BODY_WAIT_MS, Timer::Body, txid));
            }
            let pending = self.pending.entry(txid);
            let unknown = !pending.recorded && !pending.voted_by(member);
            pending.tallies.of_mut(kind).add(&self.committee, CountedVote { batch: Arc::clone(batch), index });
            if pending.certify(&self.committee, kind, txid) {
                self.ready.push_back(txid);
            }
            if unknown {
                self.pending.admit_unknown(&self.committee, member, txid);
            }
        }
    }

    /// A certificate came from somebody.
    fn certificate<V: View>(&mut self, step: &mut Step<'_, V>, certificate: &Certificate) {
        let (txid, kind) = (certificate.txid, certificate.kind);
        if step.view().is_settled(&txid) || step.view().is_dead(&txid) {
            return;
        }
        self.meet_certified_own_vote(certificate);
        // The block that needs it is proof enough, and will be executed.
        if self.follow.wants(&txid) && self.pending.get(&txid).is_none() {
            return;
        }
        if self.pending.get(&txid).is_none() {
            if self.pending.bodies() >= MAX_IN_FLIGHT {
                return;
            }
            self.timers.insert((step.now.ms + UNKNOWN_BODY_WAIT_MS, Timer::Body, txid));
        }
        let place = self.pending.entry(txid).certificates.of_mut(kind);
        if place.is_none() {
            *place = Some(Arc::new(certificate.clone()));
            self.ready.push_back(txid);
        }
    }

    /// Looks again at everything that this step may have made possible.
    pub(super) fn look_again<V: View>(&mut self, step: &mut Step<'_, V>) {
        while let Some(txid) = self.ready.pop_front() {
            if step.fault.is_some() {
                return;
            }
            if let Some(pending) = self.pending.get_mut(&txid) {
                pending.begin(step.now.ms);
            }
            self.meet_lost_votes(step, &txid);
            self.keep_abort_certificate(step, &txid);
            if !self.consider_finality(step, txid) {
                self.consider_commit(step, txid);
            }
        }
    }

    pub(super) fn ready(&mut self, txid: Txid) {
        self.ready.push_back(txid);
    }
}

/// Tells whoever sent a transaction why it was refused.
pub(super) fn refuse<V: View>(step: &mut Step<'_, V>, source: Source, txid: Txid, rejection: Rejection) {
    match source {
        Source::Wallet(ticket) => step.act(Action::Reply { ticket, txid, progress: Progress::Rejected(rejection) }),
        Source::Member(to) => step.act(Action::Advise { to, txid, rejection }),
        Source::Answer => {}
    }
}
