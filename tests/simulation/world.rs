//! The network of members under one simulated clock, and the steps that it takes.
//!
//! A step of a member is what its ledger thread does: a batch of events, one commit, and
//! only then what may leave. Between deciding, applying, syncing, stamping and sending, the
//! power may go. After every commit of an honest member all invariants are looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use time_masternode::consensus::{
    Action, Certificate, CheckedBlock, CheckedCertificate, ConsensusMessage, Event, FenceState, MemberBatch,
    MemberIndex, Now, Progress, SignedTransaction, Source, Step, Ticket, Verified, Vote, Voting, sign_batch,
};
use time_masternode::db::{CommitBatch, Database, DiskImage, MemoryDisk, Owner, fence_in_memory};
use time_masternode::types::{
    BlockHash, ConsensusStep, DecidedBlock, OutPoint, Signature, Transaction, Txid, UTXOState,
};

use super::book::{self, Book};
use super::core_net::{Rng, Setting};
use super::coverage::Coverage;
use super::history::History;
use super::liar::Liars;
use super::member::{Member, Read};
use super::network::{Entry, Envelope, Message, Network, Weather};
use super::planted::Planted;

/// How often members look at their timers.
const TICK_MS: u64 = 100;
/// How often members say what they have in flight.
const STATUS_EVERY_MS: u64 = 3_000;
/// Steps that a member takes without anything coming or time passing.
const MAX_STEPS_AT_ONCE: u32 = 1_000;
/// Rows that one commit forgets.
const PRUNED_PER_COMMIT: usize = 16;

/// What a run is made of.
#[derive(Debug, Clone)]
pub struct Shape {
    pub weights: Vec<u64>,
    /// Members that lie; below a third of the weight.
    pub liars: BTreeSet<usize>,
    /// Whether liars run the program too.
    pub puppets: bool,
    pub weather: Weather,
    pub interval_ms: u64,
    /// Power cuts in a commit, and between a commit and sending, in thousandths.
    pub power_cut: u64,
    /// Events of one commit, at most.
    pub events_per_commit: usize,
    /// Blocks that are kept when the past is pruned.
    pub retention: Option<u64>,
    pub fence_page: usize,
}

/// An earlier state of a member's disk, with the book of that moment.
#[derive(Debug)]
struct Image {
    member: usize,
    disk: DiskImage,
    book: Book,
}

/// The network.
pub struct World {
    pub setting: Arc<Setting>,
    pub shape: Shape,
    pub planted: Planted,
    pub rng: Rng,
    pub now_ms: u64,
    pub network: Network,
    pub members: Vec<Member>,
    pub history: History,
    pub liars: Liars,
    pub coverage: Coverage,
    /// Every body that a wallet ever sent, with its signatures checked.
    pub bodies: BTreeMap<Txid, Verified<SignedTransaction>>,
    signed: BTreeMap<(usize, Vec<Vote>), Arc<Verified<MemberBatch>>>,
    checked: BTreeMap<(Txid, Vec<Signature>), Vec<Verified<CheckedCertificate>>>,
    decided: BTreeMap<(BlockHash, Vec<Signature>), bool>,
    tickets: BTreeMap<Ticket, (usize, Txid)>,
    image: Option<Image>,
    /// The member that is without its votes and not behind a standing fence yet.
    pub votes_lost: Option<usize>,
    tick_at_ms: u64,
    /// The member that alone will hear what is said after the next precommit to a block.
    pub ambush: Option<usize>,
    /// All honest members are up, the network is calm and nothing is cut off any more.
    pub calm: bool,
    trace: bool,
}

impl World {
    pub fn new(setting: Arc<Setting>, shape: Shape, planted: Planted, seed: u64, trace: bool) -> Self {
        let of = |i| Member::new(&setting, i, !shape.liars.contains(&i));
        let members = (0..setting.keys.len()).map(of).collect();
        let lying_weight = shape.liars.iter().map(|i| shape.weights[*i]).sum();
        let history = History::new(&setting, lying_weight);
        let mut world = Self {
            network: Network::new(shape.weather),
            setting,
            shape,
            planted,
            rng: Rng::new(seed),
            now_ms: 1_000,
            members,
            history,
            liars: Liars::default(),
            coverage: Coverage::default(),
            bodies: BTreeMap::new(),
            signed: BTreeMap::new(),
            checked: BTreeMap::new(),
            decided: BTreeMap::new(),
            tickets: BTreeMap::new(),
            image: None,
            votes_lost: None,
            tick_at_ms: 1_000,
            ambush: None,
            calm: false,
            trace,
        };
        for i in 0..world.members.len() {
            world.start_with(i, true);
        }
        world.connect_all();
        world
    }

    /// Says what happens, for whoever replays a seed.
    pub fn note(&self, what: impl FnOnce() -> String) {
        if self.trace {
            println!("{:>7} {}", self.now_ms, what());
        }
    }

    pub fn honest(&self) -> impl Iterator<Item = usize> + use<'_> {
        (0..self.members.len()).filter(|i| self.members[*i].honest)
    }

    /// Honest members whose votes count without a fence.
    pub fn sound_weight(&self) -> u64 {
        let sound = self.honest().filter(|i| self.members[*i].book.is_sound() && !self.members[*i].is_rolled_back);
        sound.map(|i| self.shape.weights[i]).sum()
    }

    pub fn is_up(&self, i: usize) -> bool {
        self.members[i].is_up()
    }

    fn clock(&self, i: usize, began_ms: u64) -> Now {
        // The members' wall clocks disagree by seconds, and each counts from its own start.
        let unix_ms = 1_700_000_000_000 + self.now_ms + 3_000 * i as u64;
        let unix = i64::try_from(unix_ms / 1_000).expect("a time is small");
        Now { ms: self.now_ms - began_ms, unix, unix_ms }
    }

    /// Starts a member, if it runs the program at all.
    pub fn start(&mut self, i: usize) {
        self.start_with(i, false);
    }

    fn start_with(&mut self, i: usize, first: bool) {
        if self.is_up(i) || (!self.members[i].honest && !self.shape.puppets) {
            return;
        }
        let now = self.clock(i, self.now_ms);
        let first = first || self.planted.is(Planted::NoFence);
        let (setting, interval) = (Arc::clone(&self.setting), self.shape.interval_ms);
        let before = self.members[i].book.height;
        match self.members[i].start(&setting, first, interval, now, self.now_ms, self.planted) {
            Ok(None) => {}
            Ok(Some(happened)) => {
                self.note(|| format!("the commit of member {i} that was cut off has happened"));
                self.coverage.kept_commits += 1;
                self.history.enter(i, &happened, before, &self.members[i].book);
            }
            Err(error) => {
                self.note(|| format!("member {i} does not open: {error}"));
                return self.crash(i);
            }
        }
        self.note(|| format!("member {i} starts"));
        self.coverage.restarts += 1;
        let Some(process) = &self.members[i].process else { return };
        let votes = process.machine.own_votes();
        let batches = self.sign(i, votes);
        if let Some(process) = &mut self.members[i].process {
            process.own_batches = batches;
        }
    }

    /// The member's memory is gone, and with it what it had not synced, perhaps.
    pub fn crash(&mut self, i: usize) {
        self.note(|| format!("member {i} crashes"));
        self.members[i].process = None;
        let keep = self.rng.chance(500);
        self.members[i].disk.lose_power(keep);
        let others: Vec<_> = (0..self.members.len()).filter(|other| self.network.is_connected(i, *other)).collect();
        self.network.hang_up(i);
        others.into_iter().for_each(|other| self.lost_connection(other, i));
    }

    /// Lets one of its next writes fail.
    pub fn cut_power(&mut self, i: usize) {
        let writes = self.rng.below(6) as u64;
        self.members[i].disk.fail_after(writes);
    }

    /// The disk is gone, guard and all. A new one is put in.
    pub fn lose_disk(&mut self, i: usize) {
        self.crash(i);
        self.note(|| format!("member {i} loses its disk"));
        self.coverage.lost_disks += 1;
        self.replace_disk(i);
    }

    fn replace_disk(&mut self, i: usize) {
        let member = &mut self.members[i];
        member.disk = MemoryDisk::new();
        member.book = Book::new(&self.setting.genesis, !self.planted.is(Planted::NoFence));
        member.unsure = None;
        member.is_rolled_back = false;
        member.is_new = true;
        self.votes_lost = Some(i);
        if self.image.as_ref().is_some_and(|image| image.member == i) {
            self.image = None;
        }
    }

    /// Remembers what a member's disk holds now.
    pub fn take_image(&mut self, i: usize) {
        let member = &self.members[i];
        if member.honest && member.unsure.is_none() && !member.is_new {
            self.image = Some(Image { member: i, disk: member.disk.image(), book: member.book.clone() });
        }
    }

    /// Whose disk could be put back.
    pub fn imaged(&self) -> Option<usize> {
        let image = self.image.as_ref()?;
        (image.book.commit < self.members[image.member].book.commit).then_some(image.member)
    }

    /// Damage brings a database back at an older state, and the guard does not fit. The
    /// member has to find that out by itself: until its disk is repaired, it only follows.
    pub fn roll_back(&mut self) {
        let Some(i) = self.imaged() else { return };
        self.crash(i);
        let Some(image) = self.image.take() else { return };
        self.note(|| format!("member {i} is rolled back"));
        self.coverage.rolled_back_disks += 1;
        let member = &mut self.members[i];
        member.disk.put_back(&image.disk, false);
        member.book = image.book;
        member.unsure = None;
        member.is_rolled_back = true;
        self.votes_lost = Some(i);
    }

    /// The operator repairs what was rolled back: the same database behind the fence, or a new
    /// one.
    pub fn repair(&mut self, i: usize) {
        self.crash(i);
        // Of a commit that was cut off nobody knows before the next start whether it has happened.
        let unsure = self.members[i].unsure.is_some();
        if unsure || self.planted.is(Planted::NoFence) || self.rng.chance(500) {
            self.note(|| format!("member {i} is repaired with a new disk"));
            return self.replace_disk(i);
        }
        self.note(|| format!("member {i} is repaired where it is"));
        self.coverage.repaired_disks += 1;
        let member = &mut self.members[i];
        fence_in_memory(&member.disk).expect("a disk in memory is repaired");
        let owner = Owner { genesis: &self.setting.genesis, public_key: Some(member.public_key), first_start: false };
        let opened = Database::open_in_memory(&member.disk, owner).expect("what was repaired opens");
        member.book.put_behind_fence(&opened.database.reader());
        member.is_rolled_back = false;
        self.votes_lost = Some(i);
    }

    pub fn connect_all(&mut self) {
        for a in 0..self.members.len() {
            for b in 0..a {
                self.connect(a, b);
            }
        }
    }

    /// Members without a process are there as well if they lie: somebody has their keys.
    fn is_there(&self, i: usize) -> bool {
        self.is_up(i) || !self.members[i].honest
    }

    pub fn connect(&mut self, a: usize, b: usize) {
        if !self.is_there(a) || !self.is_there(b) || !self.network.connect(a, b) {
            return;
        }
        for (own, other) in [(a, b), (b, a)] {
            let index = self.setting.member(other);
            let now_ms = self.now_ms;
            if let Some(process) = &mut self.members[own].process {
                process.inbox.push(Event::Connected(index));
                process
                    .reads
                    .insert(other, Read { asked: false, ..process.reads.get(&other).copied().unwrap_or_default() });
                process.status_at_ms = now_ms;
            }
        }
    }

    pub fn disconnect(&mut self, a: usize, b: usize) {
        if !self.network.disconnect(a, b) {
            return;
        }
        self.lost_connection(a, b);
        self.lost_connection(b, a);
    }

    fn lost_connection(&mut self, own: usize, other: usize) {
        let index = self.setting.member(other);
        if let Some(process) = &mut self.members[own].process {
            process.inbox.push(Event::Disconnected(index));
            process.reads.entry(other).or_default().asked = true;
        }
    }

    /// Lets time pass: messages arrive, timers are looked at.
    pub fn pass(&mut self, ms: u64) {
        let end = self.now_ms + ms;
        while self.now_ms < end {
            let due = self.network.next_due().unwrap_or(u64::MAX);
            let next = due.min(self.tick_at_ms).max(self.now_ms) + self.rng.below(8) as u64;
            self.now_ms = next.min(end);
            self.deliver();
            if self.now_ms >= self.tick_at_ms {
                self.tick_at_ms = self.now_ms + TICK_MS;
                self.tick();
            }
        }
    }

    fn tick(&mut self) {
        for i in 0..self.members.len() {
            self.step(i, Vec::new(), true);
            self.say_status(i);
        }
        self.settle_steps();
    }

    fn say_status(&mut self, i: usize) {
        let now_ms = self.now_ms;
        let Some(process) = self.members[i].process.as_mut().filter(|process| now_ms >= process.status_at_ms) else {
            return;
        };
        process.status_at_ms = now_ms + STATUS_EVERY_MS;
        let status = Message::Status {
            height: process.machine.height(),
            in_flight: process.machine.in_flight_after(None, 4_096),
        };
        let requests: Vec<_> = (0..self.members.len())
            .filter_map(|to| Some((to, self.members[i].process.as_mut()?.first_request(to)?)))
            .collect();
        self.send(i, None, &status);
        for (to, request) in requests {
            self.send(i, Some(to), &request);
        }
    }

    /// Hands every member what is due for it, some messages to a step.
    fn deliver(&mut self) {
        let mut of: BTreeMap<usize, Vec<Envelope>> = BTreeMap::new();
        for envelope in self.network.due(self.now_ms) {
            of.entry(envelope.to).or_default().push(envelope);
        }
        for (i, envelopes) in of {
            let most = 1 + self.rng.below(self.shape.events_per_commit);
            let mut events = Vec::new();
            for envelope in envelopes {
                self.arrive(envelope, &mut events);
                if events.len() >= most {
                    self.step(i, std::mem::take(&mut events), false);
                }
            }
            if !events.is_empty() {
                self.step(i, events, false);
            }
        }
        self.settle_steps();
    }

    /// Own votes are counted, and what is left to do at once is done, without waiting.
    fn settle_steps(&mut self) {
        for i in 0..self.members.len() {
            let busy = |m: &Member| m.process.as_ref().is_some_and(|p| p.more || !p.own_batches.is_empty());
            let mut steps = 0;
            while busy(&self.members[i]) {
                self.step(i, Vec::new(), false);
                steps += 1;
                ensure!(steps < MAX_STEPS_AT_ONCE, "member {i} never comes to rest");
            }
        }
    }

    fn arrive(&mut self, Envelope { from, to, message }: Envelope, events: &mut Vec<Event>) {
        if !self.members[to].honest {
            self.overhear(from, to, &message);
        }
        if !self.is_up(to) {
            return;
        }
        let sender = self.setting.member(from);
        if let Some(process) = &self.members[to].process {
            let answers = process.answer(&message, self.shape.fence_page).expect("a database reads");
            for answer in answers {
                self.send(to, Some(from), &answer);
            }
        }
        match message {
            Message::Locked(txid) => {
                let transaction = self.bodies[&txid].clone();
                events.push(Event::Transaction { transaction, source: Source::Member(sender) });
            }
            Message::Votes(batch) => events.push(Event::Votes(batch)),
            Message::Transactions(entries) => self.take_entries(to, entries, events),
            Message::Finalized { entries, next } => {
                self.take_entries(to, entries, events);
                let request = self.members[to].process.as_mut().and_then(|process| process.next_request(from, next));
                if let Some(request) = request {
                    self.send(to, Some(from), &request);
                }
            }
            Message::Status { height, .. } => {
                events.push(Event::Height { member: sender, height });
                let request = self.members[to].process.as_mut().and_then(|process| process.first_request(from));
                if let Some(request) = request {
                    self.send(to, Some(from), &request);
                }
            }
            Message::Blocks(blocks) => {
                if blocks.iter().all(|decided| self.is_decided(decided)) {
                    events.push(Event::Blocks { from: sender, blocks });
                } else {
                    self.disconnect(from, to);
                }
            }
            Message::Fence(page) => events.push(Event::Fence { from: sender, page }),
            Message::Consensus(message) => events.push(Event::Consensus { from: sender, message }),
            Message::GetTransactions(_)
            | Message::GetFinalized { .. }
            | Message::GetBlocks { .. }
            | Message::GetFence { .. } => {}
        }
    }

    /// Bodies with certificates; what is settled here already is passed over.
    fn take_entries(&mut self, to: usize, entries: Vec<Entry>, events: &mut Vec<Event>) {
        for Entry { txid, certificate } in entries {
            let settled = |process: &super::member::Process| process.reader.is_final(&txid).expect("a database reads");
            if self.members[to].process.as_ref().is_none_or(settled) {
                continue;
            }
            let Some(transaction) = self.bodies.get(&txid).cloned() else { continue };
            events.push(Event::Transaction { transaction, source: Source::Answer });
            if let Some(checked) = certificate.and_then(|certificate| self.check_certificate(&certificate)) {
                events.push(Event::Certificate(checked));
            }
        }
    }

    /// Verifies a certificate, each different one once.
    pub fn check_certificate(&mut self, certificate: &Certificate) -> Option<Verified<CheckedCertificate>> {
        let signatures = certificate.votes.iter().map(|vote| vote.signature).collect();
        let alike = self.checked.entry((certificate.txid, signatures)).or_default();
        if let Some(known) = alike.iter().find(|known| known.get().certificate() == certificate) {
            return Some(known.clone());
        }
        let verified = certificate.clone().verify(&self.setting.committee).ok()?;
        alike.push(verified.clone());
        Some(verified)
    }

    /// Verifies a block's certificate, each different one once.
    fn is_decided(&mut self, decided: &DecidedBlock) -> bool {
        let signatures = decided.certificate.votes.iter().map(|vote| vote.signature).collect();
        let hash = decided.block.hash(&self.setting.genesis.hash());
        let committee = &self.setting.committee;
        *self.decided.entry((hash, signatures)).or_insert_with(|| {
            let checked = CheckedBlock::new(decided.clone(), committee);
            checked.is_ok_and(|checked| Verified::check(checked).is_ok())
        })
    }

    pub fn introduce(&mut self, transaction: &Arc<Transaction>) {
        let txid = transaction.txid();
        if !self.bodies.contains_key(&txid) {
            self.bodies.insert(txid, self.setting.signed(transaction));
            self.history.introduce(transaction);
        }
    }

    /// A wallet sends a transaction to a member.
    pub fn submit(&mut self, i: usize, txid: Txid) {
        self.note(|| format!("a wallet sends {} to member {i}", short(&txid)));
        let transaction = self.bodies[&txid].clone();
        let ticket = Ticket(self.tickets.len() as u64);
        self.tickets.insert(ticket, (i, txid));
        self.step(i, vec![Event::Transaction { transaction, source: Source::Wallet(ticket) }], false);
        self.settle_steps();
    }

    /// One batch of events: decide, commit, let it leave.
    fn step(&mut self, i: usize, events: Vec<Event>, tick: bool) {
        let Some(began_ms) = self.members[i].process.as_ref().map(|process| process.began_ms) else { return };
        let now = self.clock(i, began_ms);
        let Some(process) = &mut self.members[i].process else { return };
        let view = process.database.view();
        let mut step = Step::new(now, &view);
        let machine = &mut process.machine;
        if let Some(ballot) = process.ballot.take() {
            machine.take_part(&mut step, ballot);
        }
        for batch in std::mem::take(&mut process.own_batches) {
            machine.count_own(&mut step, &batch);
        }
        let before = machine.voting();
        for event in std::mem::take(&mut process.inbox).into_iter().chain(events) {
            machine.handle(&mut step, event);
        }
        if tick {
            machine.handle(&mut step, Event::Tick);
        }
        process.more = machine.advance(&mut step);
        let after = machine.voting();
        let Step { changes, actions, fault, .. } = step;
        view.finish().expect("a database reads");
        let honest = self.members[i].honest;
        if let Some(fault) = fault {
            ensure!(!honest, "member {i} meets a fault: {fault}");
            return self.crash(i);
        }
        let suspension = match after {
            Voting::Suspended(reason) if before != after => Some(reason),
            _ => None,
        };
        ensure!(!honest || suspension.is_none(), "member {i} stops voting: {suspension:?}");
        let prune = self.prunable(i);
        self.commit(i, CommitBatch { changes, suspension, prune, ..CommitBatch::default() }, actions);
    }

    fn prunable(&mut self, i: usize) -> Option<time_masternode::db::PruneBatch> {
        let keep = self.shape.retention?;
        let process = self.members[i].process.as_ref()?;
        let keep_above = process.height().saturating_sub(keep);
        if keep_above == 0 || !self.rng.chance(100) {
            return None;
        }
        let batch = process.reader.prunable(keep_above, PRUNED_PER_COMMIT).expect("a database reads");
        self.coverage.pruned_commits += u64::from(batch.is_some());
        batch
    }

    fn commit(&mut self, i: usize, batch: CommitBatch, actions: Vec<Action>) {
        // As on a node, a body is its wallet's word and goes on before the commit, which may fail.
        let (bodies, actions): (Vec<_>, _) =
            actions.into_iter().partition(|action| matches!(action, Action::Broadcast(_)));
        bodies.into_iter().for_each(|body| self.act(i, body));
        if batch.is_empty() {
            return self.let_out(i, Vec::new(), actions);
        }
        let copy = book::copy(&batch.changes);
        if !self.calm && self.rng.chance(self.shape.power_cut) {
            let writes = self.rng.below(3) as u64;
            self.members[i].disk.fail_after(writes);
        }
        let votes = copy.votes.clone();
        let Some(process) = &mut self.members[i].process else { return };
        match process.database.commit(batch, (votes, actions)) {
            Ok(durable) => {
                let (votes, actions) = durable.into_inner();
                if self.members[i].honest {
                    self.check_commit(i, &copy);
                }
                if !self.calm && self.rng.chance(self.shape.power_cut) {
                    return self.crash(i);
                }
                self.let_out(i, votes, actions);
            }
            Err(_) => {
                self.coverage.cut_commits += 1;
                if self.planted.is(Planted::VoteBeforeSync) {
                    let batches = self.sign(i, copy.votes.clone());
                    batches.into_iter().for_each(|batch| self.send(i, None, &Message::Votes(batch)));
                }
                self.members[i].unsure = Some(copy);
                self.crash(i);
            }
        }
    }

    /// Every invariant, after a commit.
    fn check_commit(&mut self, i: usize, changes: &time_masternode::consensus::Changes) {
        let before = self.members[i].book.height;
        let fence = self.members[i].book.fence;
        let known = self.history.height();
        self.members[i].book.enter(changes);
        for certificate in changes.certificates.values() {
            let sound = self.check_certificate(certificate).is_some();
            ensure!(sound, "member {i} keeps a certificate that proves nothing");
        }
        let proofs: Vec<_> = changes.finalized.values().filter_map(|f| f.certificate.clone()).collect();
        for proof in proofs {
            ensure!(self.check_certificate(&proof).is_some(), "member {i} holds a proof that proves nothing");
        }
        let Member { book, process, .. } = &self.members[i];
        self.history.enter(i, changes, before, book);
        book.check();
        if let Some(process) = process {
            book.check_written(&process.reader, changes);
        }
        self.observe(i, changes, known, fence);
    }

    fn observe(
        &mut self,
        i: usize,
        changes: &time_masternode::consensus::Changes,
        known: u64,
        fence: Option<FenceState>,
    ) {
        let now = self.members[i].book.fence;
        self.coverage.commits += 1;
        let book = &self.members[i].book;
        self.coverage.mark([self.now_ms, i as u64, book.commit, book.sequence]);
        let stands = fence != now && matches!(now, Some(FenceState::Standing { .. }));
        self.coverage.fences_standing += u64::from(stands);
        self.coverage.fences_down += u64::from(fence != now && now == Some(FenceState::Down));
        if stands && self.votes_lost == Some(i) {
            self.votes_lost = None;
        }
        for (_, decided) in &changes.blocks {
            self.coverage.blocks += u64::from(decided.block.height > known);
            self.coverage.caught_up += u64::from(decided.block.height <= known);
            self.coverage.later_rounds += u64::from(decided.certificate.round > 0);
        }
        if self.trace {
            for vote in &changes.votes {
                println!("{:>7} member {i} votes {:?} on {}", self.now_ms, vote.kind, short(&vote.txid));
            }
            for (txid, f) in &changes.finalized {
                println!("{:>7} member {i}: {} is final, by F: {}", self.now_ms, short(txid), f.certificate.is_some());
            }
            for (_, d) in &changes.blocks {
                let (b, names) = (&d.block, |t: &Vec<Txid>| t.iter().map(short).collect::<Vec<_>>());
                println!(
                    "{:>7} member {i} executes {}: {:?} aborts {:?} round {}",
                    self.now_ms,
                    b.height,
                    names(&b.transactions),
                    names(&b.aborts),
                    d.certificate.round
                );
            }
            if fence != now {
                println!("{:>7} member {i}: the fence is {now:?}", self.now_ms);
            }
        }
    }

    /// Signs votes as the ledger does, each different batch once.
    fn sign(&mut self, i: usize, votes: Vec<Vote>) -> Vec<Arc<Verified<MemberBatch>>> {
        if votes.is_empty() {
            return Vec::new();
        }
        let (key, committee) = (&self.members[i].key, &self.setting.committee);
        let batch = self.signed.entry((i, votes)).or_insert_with_key(|(_, votes)| {
            Arc::new(sign_batch(key, committee, votes.clone()).expect("a member signs a few votes"))
        });
        vec![Arc::clone(batch)]
    }

    /// A batch of a liar, for whatever it likes to say.
    pub fn sign_for(&mut self, liar: usize, votes: Vec<Vote>) -> Option<Arc<Verified<MemberBatch>>> {
        self.sign(liar, votes).pop()
    }

    /// The commit is durable: its votes are signed and sent, and all that it decided leaves.
    fn let_out(&mut self, i: usize, votes: Vec<Vote>, actions: Vec<Action>) {
        let mut requests: BTreeMap<Option<MemberIndex>, Vec<Txid>> = BTreeMap::new();
        for action in actions {
            match action {
                Action::Request { to, txid } => requests.entry(to).or_default().push(txid),
                action => self.act(i, action),
            }
        }
        for (to, txids) in requests {
            self.send(i, to.map(MemberIndex::get), &Message::GetTransactions(txids));
        }
        for batch in self.sign(i, votes) {
            self.send(i, None, &Message::Votes(Arc::clone(&batch)));
            if let Some(process) = &mut self.members[i].process {
                process.own_batches.push(batch);
            }
        }
    }

    fn act(&mut self, i: usize, action: Action) {
        match action {
            Action::Broadcast(transaction) => self.send(i, None, &Message::Locked(transaction.txid())),
            Action::Send { to, transaction } => self.send(i, Some(to.get()), &Message::Locked(transaction.txid())),
            Action::ResendVotes { to, votes } => {
                self.check_said(i, &votes);
                for batch in self.sign(i, votes) {
                    self.send(i, to.map(MemberIndex::get), &Message::Votes(batch));
                }
            }
            Action::ReturnBatch { to, batch } => self.send(i, Some(to.get()), &Message::Votes(batch)),
            Action::SendCertified { to, transaction, certificate } => {
                let entry = Entry { txid: transaction.txid(), certificate: Some(certificate) };
                self.send(i, to.map(MemberIndex::get), &Message::Transactions(vec![entry]));
            }
            Action::SendSettled { to, txid } => {
                let process = self.members[i].process.as_ref();
                let found = process.and_then(|process| process.settled(&txid).expect("a database reads"));
                if let Some(found) = found {
                    self.send(i, Some(to.get()), &found);
                }
            }
            Action::Consensus(message) => {
                if self.members[i].honest {
                    self.coverage.block_messages += 1;
                    let own = self.members[i].public_key;
                    self.history.say_of_block(i, &own, &message);
                }
                self.spring_ambush(&message);
                self.send(i, None, &Message::Consensus(message));
            }
            Action::RequestBodies { to, txids } => self.send(i, Some(to.get()), &Message::GetTransactions(txids)),
            Action::RequestBlocks { to, from_height } => {
                self.send(i, Some(to.get()), &Message::GetBlocks { from_height });
            }
            Action::RequestFence { to, after } => self.send(i, Some(to.get()), &Message::GetFence { after }),
            Action::SendBlocks { to, from_height } => {
                let process = self.members[i].process.as_ref();
                let blocks = process.map(|process| process.blocks(from_height, 16).expect("a database reads"));
                if let Some(blocks) = blocks {
                    self.send(i, Some(to.get()), &blocks);
                }
            }
            Action::Disconnect { member } => self.disconnect(i, member.get()),
            Action::Reply { ticket, txid, progress } => self.reply(i, ticket, txid, &progress),
            Action::Progress { txid, progress } => self.told(i, &txid, &progress),
            Action::Advise { .. } | Action::Request { .. } => {}
        }
    }

    /// The moment has come at which one member may decide a block and nobody else.
    fn spring_ambush(&mut self, message: &ConsensusMessage) {
        let precommits = matches!(message, ConsensusMessage::Vote(vote)
            if vote.step == ConsensusStep::Precommit && vote.block_hash.is_some());
        if precommits && let Some(i) = self.ambush.take() {
            self.note(|| format!("from now on only member {i} hears anything"));
            self.coverage.ambushes += 1;
            self.only_hears(i);
        }
    }

    /// From now on one member hears everybody, and nobody else hears anybody.
    pub fn only_hears(&mut self, i: usize) {
        let n = self.members.len();
        for (from, to) in (0..n).flat_map(|from| (0..n).map(move |to| (from, to))).filter(|(_, to)| *to != i) {
            self.network.silence(from, to);
        }
    }

    /// What is said again is what the database holds.
    fn check_said(&self, i: usize, votes: &[Vote]) {
        let book = &self.members[i].book;
        for vote in votes.iter().filter(|_| self.members[i].honest) {
            let kept = book.has_vote(vote) || !book.in_flight.contains_key(&vote.txid);
            ensure!(kept, "member {i} says {vote:?}, which its database does not hold");
        }
    }

    fn reply(&mut self, i: usize, ticket: Ticket, txid: Txid, progress: &Progress) {
        ensure!(self.tickets.get(&ticket) == Some(&(i, txid)), "an answer to another question");
        self.note(|| format!("member {i} answers on {}: {progress:?}", short(&txid)));
        self.told(i, &txid, progress);
    }

    /// What a wallet is told was durable before, and is never taken back.
    fn told(&self, i: usize, txid: &Txid, progress: &Progress) {
        let Member { book, honest: true, .. } = &self.members[i] else { return };
        match progress {
            Progress::Pending { .. } => {
                // It may have gone on since, in the same commit.
                let Some(row) = book.in_flight.get(txid) else {
                    let on = book.finalized.contains_key(txid) || book.dead.contains_key(txid);
                    ensure!(on, "{txid} is called pending and not in the database of member {i}");
                    return;
                };
                let holds = |at: OutPoint| match book.state(&at) {
                    Some(UTXOState::Locked { txid: by, .. }) => by == *txid,
                    Some(UTXOState::SpentFinalized { txid: by, .. }) => by != *txid,
                    _ => false,
                };
                let locks = row.locked_at.is_some();
                ensure!(!locks || row.transaction.spends().all(holds), "{txid} is pending without its locks");
            }
            Progress::Finalized { settled, .. } => {
                let written = book.finalized.get(txid).map(|f| f.settled);
                ensure!(written == Some(*settled), "{txid} is called final and is not in the database of member {i}");
                ensure!(self.history.is_settled(txid), "{txid} is called final and is not");
            }
            Progress::Confirmed { height, .. } => {
                ensure!(book.confirmed.get(txid) == Some(height), "{txid} is called confirmed in another block");
                ensure!(self.history.is_confirmed(txid), "{txid} is called confirmed and is not");
            }
            Progress::Aborted(_) => {
                ensure!(self.history.is_dead(txid, u64::MAX), "{txid} is called aborted and lives");
            }
            Progress::Rejected(_) | Progress::Unknown => {}
        }
    }

    pub fn send(&mut self, from: usize, to: Option<usize>, message: &Message) {
        let everybody = 0..self.members.len();
        for to in to.map_or(everybody, |to| to..to + 1) {
            if !self.members[from].honest && !self.lets_pass(from, to, message) {
                continue;
            }
            self.network.send(&mut self.rng, self.now_ms, from, to, message);
        }
    }
}

/// The first bytes of a name, for notes.
pub fn short(txid: &Txid) -> String {
    txid.to_string()[..6].to_owned()
}
