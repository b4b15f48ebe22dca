//! The consensus core under a hostile network.
//!
//! The story: wallets pay, overspend, spend the same coin twice at different members and
//! spend what is not there yet. Messages between the members are late, doubled, out of
//! order or lost, links work in one direction only, members crash between deciding and
//! writing or between writing and sending, and up to a third lie. Whatever happens, no two
//! conflicting transactions are final, nobody breaks a promise that its database holds,
//! and no money appears or goes. When the network heals, what nobody contradicts becomes
//! final everywhere, and what is contradicted either has a certificate or all honest
//! members have voted to abort it.
//!
//! `support/core_net.rs` is the network and holds the invariants. Here are the seeds, and
//! below them one small test for each rule of protocol §6 and §3.
//!
//! `TIME_SEEDS=4000` runs more seeds, `TIME_SEED=17` replays one.

#![allow(
    clippy::unwrap_used,
    reason = "clippy.toml allows it in tests, but does not see that helpers here are tests too"
)]

#[path = "support/core_net.rs"]
mod core_net;

use std::collections::{BTreeMap, BTreeSet};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::Arc;

use core_net::{COIN, COINS, MIN_FEE, Rng, Setting, Store, Weather, World, wallet_key};
use time_masternode::consensus::{
    Action, Certificate, Changes, Event, Fault, Machine, MemberBatch, Now, Progress, Rejection, SignedTransaction,
    Source, Step, Suspension, Ticket, Verified, Vote, VoteKind, Voting, check_form, check_ledger,
};
use time_masternode::limits::{
    CONFLICT_WAIT_MS, MAX_UNKNOWN_PER_MEMBER, MAX_WAITING_FOR_PARENTS, PARENT_WAIT_MS, RESEND_AFTER_MS,
    RESEND_EVERY_MS, SLOWEST_RESEND_MS, UNKNOWN_BODY_WAIT_MS,
};
use time_masternode::types::{Amount, OutPoint, Transaction, Txid, UTXOState};

/// A transaction that some wallet means to send.
struct Planned {
    transaction: Arc<Transaction>,
    /// Whether it could ever become final.
    valid: bool,
    /// To how many members it is sent; 0 is for what only liars spread.
    copies: usize,
}

/// Uncontested payments, chains of children, rivals, and what breaks a rule.
fn workload(setting: &Setting, rng: &mut Rng) -> Vec<Planned> {
    let mut plan = Vec::new();
    let mut nonce = 0;
    let used = 2 + u32::try_from(rng.below(5)).unwrap();
    for wallet in 0..used {
        let coin = setting.coin(wallet);
        let spare = setting.coin(wallet + 1);
        let mut pay = |inputs: &[(OutPoint, u32)], amounts: &[u64]| {
            nonce += 1;
            let outputs: Vec<_> = amounts.iter().map(|amount| (*amount, wallet)).collect();
            setting.pay(inputs, &outputs, nonce)
        };
        let mut add = |transaction: &Arc<Transaction>, valid, copies| {
            plan.push(Planned { transaction: Arc::clone(transaction), valid, copies });
        };
        match rng.below(8) {
            0 | 1 => {
                let payment = pay(&[(coin, wallet)], &[COIN - MIN_FEE]);
                add(&payment, true, 1 + rng.below(3));
            }
            2 | 3 => {
                let parent = pay(&[(coin, wallet)], &[4_000, 4_000]);
                let out = |vout| OutPoint { txid: parent.txid(), vout };
                let child = pay(&[(out(0), wallet)], &[3_000]);
                let grandchild = pay(&[(OutPoint { txid: child.txid(), vout: 0 }, wallet), (out(1), wallet)], &[6_000]);
                for transaction in [&parent, &child, &grandchild] {
                    add(transaction, true, 1 + rng.below(2));
                }
            }
            4 | 5 => {
                for rival in 0..2 + rng.below(2) {
                    let payment = pay(&[(coin, wallet)], &[COIN - MIN_FEE - rival as u64]);
                    // The children of rivals are sent too; at most one has a parent.
                    let child = pay(&[(OutPoint { txid: payment.txid(), vout: 0 }, wallet)], &[1_000]);
                    add(&payment, true, rng.below(3));
                    if rng.chance(300) {
                        add(&child, true, 1);
                    }
                }
            }
            6 => {
                // Two coins at once, contradicting whatever is done with the second.
                let both = pay(&[(coin, wallet), (spare, wallet + 1)], &[COIN]);
                add(&both, true, 1 + rng.below(2));
            }
            _ => {
                // None of these contradicts the payment: nobody may lock for them.
                let payment = pay(&[(coin, wallet)], &[COIN - MIN_FEE]);
                add(&payment, true, 1);
                add(&pay(&[(coin, wallet)], &[COIN + 1]), false, 1);
                add(&pay(&[(coin, wallet)], &[COIN - MIN_FEE + 1]), false, 1);
                add(&pay(&[(coin, wallet + 100)], &[1]), false, 1);
                add(&pay(&[(OutPoint { vout: COINS, ..coin }, wallet), (coin, wallet)], &[1]), false, 1);
            }
        }
    }
    plan
}

/// Which of the planned are contradicted by nobody: no other valid one shares an input.
fn uncontradicted(plan: &[Planned]) -> BTreeSet<Txid> {
    let mut spenders: BTreeMap<OutPoint, usize> = BTreeMap::new();
    for planned in plan.iter().filter(|p| p.valid) {
        for outpoint in planned.transaction.spends() {
            *spenders.entry(outpoint).or_default() += 1;
        }
    }
    let alone = |p: &&Planned| p.valid && p.transaction.spends().all(|outpoint| spenders[&outpoint] == 1);
    plan.iter().filter(alone).map(|p| p.transaction.txid()).collect()
}

/// What the runs came across: a simulator that never meets the hard cases proves little.
#[derive(Debug, Default)]
struct Coverage {
    finals: usize,
    final_children: usize,
    unresolved: usize,
    aborts: usize,
    commits_without_lock: usize,
    beaten_locks: usize,
    lost_commits: u64,
    restarts: u64,
}

fn simulate(seed: u64, coverage: &mut Coverage) {
    let mut rng = Rng::new(seed);
    let n = rng.pick(&[1, 4, 4, 4, 7]);
    let faulty = rng.below((n - 1) / 3 + 1);
    let weather = Weather {
        loss: rng.pick(&[0, 30, 200]),
        duplicate: rng.pick(&[0, 100]),
        max_delay_ms: rng.pick(&[20, 400, 3_000]),
        crash: rng.pick(&[0, 0, 10, 40]),
        liars: rng.chance(600),
    };
    let mut world = World::new(n, faulty, rng.next(), weather);
    let plan = workload(&world.setting, &mut rng);
    chaos(&mut world, &plan, &mut rng);
    world.heal();
    check_liveness(&mut world, &plan, &mut rng, seed);
    observe(&world, &plan, coverage);
}

fn chaos(world: &mut World, plan: &[Planned], rng: &mut Rng) {
    let honest = world.nodes.len();
    let n = world.setting.keys.len();
    let mut sends: Vec<&Planned> = plan.iter().flat_map(|p| std::iter::repeat_n(p, p.copies)).collect();
    // In one half of the runs the order is mostly that of the plan, parents first.
    if rng.chance(500) {
        rng.shuffle(&mut sends);
    }
    sends.reverse();
    for planned in plan.iter().filter(|p| p.copies == 0) {
        world.introduce(&planned.transaction);
    }
    let calm_links = rng.chance(400);
    for _ in 0..80 + rng.below(240) {
        let i = rng.below(honest);
        match rng.below(100) {
            0..=9 => {
                if let Some(planned) = sends.pop() {
                    let _ticket = world.submit(i, &planned.transaction);
                }
            }
            10..=19 => world.tick(i),
            20..=39 => {
                let most = if rng.chance(100) { 1_500 } else { 120 };
                world.now_ms += rng.below(most) as u64;
            }
            40..=42 if !calm_links => world.block(rng.below(n), rng.below(n)),
            43..=45 => {
                let (a, b) = (rng.below(n), rng.below(n));
                world.reconnect(a, b);
            }
            46 if world.weather.crash > 0 => world.crash(i),
            47..=52 => {
                if !world.is_up(i) {
                    world.start(i);
                }
            }
            53..=59 => world.lie(),
            _ => {
                let to = rng.below(n);
                let most = 1 + rng.below(4);
                world.deliver(to, most);
            }
        }
    }
    for planned in sends {
        world.introduce(&planned.transaction);
    }
}

fn check_liveness(world: &mut World, plan: &[Planned], rng: &mut Rng, seed: u64) {
    let alone = uncontradicted(plan);
    // What an honest member acknowledged becomes final everywhere, and nobody needs to
    // send it again.
    let promised: Vec<Txid> = alone.iter().copied().filter(|txid| world.acknowledged(*txid)).collect();
    world.run(20_000, |w| promised.iter().all(|txid| w.is_final_everywhere(txid)));
    for txid in &promised {
        assert!(world.is_final_everywhere(txid), "seed {seed}: {txid} was acknowledged and is not final");
    }
    // What was lost before anybody acknowledged it can be sent again. A child of a
    // contested parent may wait for ever, so only those whose parents are final count.
    for planned in plan.iter().filter(|p| alone.contains(&p.transaction.txid())) {
        let coins = planned.transaction.spends();
        let coins: Vec<_> = coins.collect();
        if !coins.iter().all(|coin| world.nodes.iter().all(|node| node.store.state(coin).is_some())) {
            continue;
        }
        let txid = planned.transaction.txid();
        world.submit(rng.below(world.nodes.len()), &planned.transaction);
        world.run(20_000, |w| w.is_final_everywhere(&txid));
        assert!(world.is_final_everywhere(&txid), "seed {seed}: {txid} was sent again and is not final");
    }
    let contested: Vec<&Planned> = plan
        .iter()
        .filter(|p| p.valid && !alone.contains(&p.transaction.txid()) && world.acknowledged(p.transaction.txid()))
        .collect();
    world.run(20_000, |w| contested.iter().all(|p| why_unresolved(w, p, &contested).is_none()));
    for planned in &contested {
        let open = why_unresolved(world, planned, &contested);
        assert_eq!(open, None, "seed {seed}: the conflict around {} is open", planned.transaction.txid());
    }
    let agreed = |w: &World, txid: &Txid| w.is_final_everywhere(txid) || !w.is_final_anywhere(txid);
    world.run(20_000, |w| plan.iter().all(|p| agreed(w, &p.transaction.txid())));
    for planned in plan {
        let txid = planned.transaction.txid();
        assert!(agreed(world, &txid), "seed {seed}: {txid} is final on some members only");
        assert!(planned.valid || !world.acknowledged(txid), "seed {seed}: an honest member locked for invalid {txid}");
    }
}

/// Why a contested transaction is not where it can be without a chain: final, beaten by a
/// final rival, held back with its certificate on all honest members, or aborted by all.
fn why_unresolved(world: &World, planned: &Planned, contested: &[&Planned]) -> Option<&'static str> {
    let transaction = &planned.transaction;
    let txid = transaction.txid();
    let settled = |t: &Transaction| {
        let spent = |coin| world.nodes.iter().any(|n| n.store.state(&coin).is_some_and(|state| !state.is_live()));
        t.spends().any(spent)
    };
    if settled(transaction) {
        return None;
    }
    let rivals: Vec<_> =
        contested.iter().map(|p| &p.transaction).filter(|t| Machine::conflict(t, transaction) && !settled(t)).collect();
    let honest = 0..world.nodes.len();
    if honest.clone().any(|i| world.voted(i, VoteKind::Commit, txid)) {
        let acted = |i| {
            let said = [VoteKind::Commit, VoteKind::Abort].into_iter().any(|kind| world.voted(i, kind, txid));
            said || world.committed_to_rival(i, transaction)
        };
        return (!honest.clone().all(acted)).then_some("its certificate has not spread");
    }
    let rival_committed = |t: &&Arc<Transaction>| honest.clone().any(|i| world.voted(i, VoteKind::Commit, t.txid()));
    if rivals.is_empty() || rivals.iter().any(rival_committed) {
        return None;
    }
    let aborted = honest.clone().all(|i| world.voted(i, VoteKind::Abort, txid));
    (!aborted).then_some("no certificate, and not all honest members voted to abort it")
}

fn observe(world: &World, plan: &[Planned], coverage: &mut Coverage) {
    let first = world.setting.genesis.transaction().txid();
    coverage.restarts += world.restarts;
    coverage.lost_commits += world.lost_commits;
    for planned in plan {
        let txid = planned.transaction.txid();
        if world.is_final_everywhere(&txid) {
            coverage.finals += 1;
            coverage.final_children += usize::from(planned.transaction.spends().any(|o| o.txid != first));
        } else if world.acknowledged(txid) {
            coverage.unresolved += 1;
        }
        for i in 0..world.nodes.len() {
            let voted = |kind| world.voted(i, kind, txid);
            coverage.aborts += usize::from(voted(VoteKind::Abort));
            coverage.commits_without_lock += usize::from(voted(VoteKind::Commit) && !voted(VoteKind::Approve));
            let beaten = voted(VoteKind::Approve)
                && planned.transaction.spends().any(|coin| match world.nodes[i].store.state(&coin) {
                    Some(UTXOState::SpentFinalized { txid: by, .. }) => by != txid,
                    _ => false,
                });
            coverage.beaten_locks += usize::from(beaten);
        }
    }
}

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok().map(|text| text.parse().unwrap_or_else(|_| panic!("{name} is a number")))
}

/// Every rule at once. A failure prints the seed that replays it.
#[test]
fn random_schedules_keep_every_promise() {
    let only = number("TIME_SEED");
    let first = only.unwrap_or(0);
    let count = if only.is_some() { 1 } else { number("TIME_SEEDS").unwrap_or(400) };
    let mut coverage = Coverage::default();
    for seed in first..first + count {
        if let Err(panic) = catch_unwind(AssertUnwindSafe(|| simulate(seed, &mut coverage))) {
            eprintln!("replay with TIME_SEED={seed} cargo test --test consensus_rules random_schedules");
            resume_unwind(panic);
        }
    }
    println!("{count} seeds: {coverage:?}");
    if count >= 400 {
        let Coverage { finals, final_children, unresolved, aborts, .. } = coverage;
        let Coverage { commits_without_lock, beaten_locks, lost_commits, restarts, .. } = coverage;
        let rare = [finals, final_children, unresolved, aborts, commits_without_lock, beaten_locks];
        assert!(rare.iter().all(|times| *times > 0), "every hard case is met: {coverage:?}");
        assert!(lost_commits > 0 && restarts > 0, "members crash: {coverage:?}");
    }
}

/// One member alone with its store. What the others say is said by the test.
struct Solo {
    setting: Arc<Setting>,
    own: Option<usize>,
    machine: Machine,
    store: Store,
    now_ms: u64,
    tickets: u64,
}

/// What came of one event, with the counting of the member's own votes that followed.
#[derive(Default)]
struct Outcome {
    votes: Vec<Vote>,
    actions: Vec<Action>,
    changed: bool,
}

impl Outcome {
    fn reply(&self) -> Option<&Progress> {
        self.actions.iter().find_map(|action| match action {
            Action::Reply { progress, .. } => Some(progress),
            _ => None,
        })
    }

    fn rejected(&self) -> Option<&Rejection> {
        self.reply().and_then(|progress| match progress {
            Progress::Rejected(rejection) => Some(rejection),
            _ => None,
        })
    }

    fn aborted(&self) -> bool {
        matches!(self.reply(), Some(Progress::Aborted(_)))
    }

    fn pending(&self) -> bool {
        matches!(self.reply(), Some(Progress::Pending { .. }))
    }

    /// Bodies that are asked for, and of whom.
    fn requests(&self) -> Vec<(Option<usize>, Txid)> {
        let request = |action: &Action| match action {
            Action::Request { to, txid } => vec![(to.map(|to| to.get()), *txid)],
            Action::RequestBodies { to, txids } => txids.iter().map(|txid| (Some(to.get()), *txid)).collect(),
            _ => Vec::new(),
        };
        self.actions.iter().flat_map(request).collect()
    }

    fn resent(&self) -> Vec<Vote> {
        let votes = |action: &Action| match action {
            Action::ResendVotes { votes, .. } => Some(votes.clone()),
            _ => None,
        };
        self.actions.iter().filter_map(votes).flatten().collect()
    }

    fn certified(&self) -> Vec<(VoteKind, Txid)> {
        let sent = |action: &Action| match action {
            Action::SendCertified { certificate, .. } => Some((certificate.kind, certificate.txid)),
            _ => None,
        };
        self.actions.iter().filter_map(sent).collect()
    }

    /// To whom a body is sent as "I have locked this".
    fn sent_to(&self, txid: Txid) -> Vec<usize> {
        let sent = |action: &Action| match action {
            Action::Send { to, transaction } if transaction.txid() == txid => Some(to.get()),
            _ => None,
        };
        self.actions.iter().filter_map(sent).collect()
    }
}

fn approve(txid: Txid) -> Vote {
    Vote { kind: VoteKind::Approve, txid }
}

fn commit(txid: Txid) -> Vote {
    Vote { kind: VoteKind::Commit, txid }
}

fn abort(txid: Txid) -> Vote {
    Vote { kind: VoteKind::Abort, txid }
}

impl Solo {
    /// Member 0 of `n` members of weight 1.
    fn new(n: usize) -> Self {
        Self::with(Setting::of(n), Some(0))
    }

    fn with(setting: Arc<Setting>, own: Option<usize>) -> Self {
        let store = Store::new(&setting);
        let member = own.map(|own| setting.member(own));
        let machine = Machine::new(Arc::clone(&setting.committee), setting.rules, member);
        Self { setting, own, machine, store, now_ms: 1_000, tickets: 0 }
    }

    fn now(&self) -> Now {
        let unix_ms = 1_700_000_000_000 + self.now_ms;
        Now { ms: self.now_ms, unix: i64::try_from(unix_ms / 1_000).unwrap(), unix_ms }
    }

    fn commit_step(&mut self, changes: Changes, actions: Vec<Action>, outcome: &mut Outcome) {
        self.store.apply(&changes);
        self.store.check();
        outcome.changed |= !changes.is_empty();
        outcome.actions.extend(actions);
        outcome.votes.extend(&changes.votes);
        let Some(own) = self.own.filter(|_| !changes.votes.is_empty()) else { return };
        let batch = self.setting.batch(own, changes.votes);
        let mut step = Step::new(self.now(), &self.store);
        self.machine.count_own(&mut step, &batch);
        let Step { changes, actions, fault, .. } = step;
        assert_eq!(fault, None);
        self.commit_step(changes, actions, outcome);
    }

    fn handle(&mut self, event: Event) -> Outcome {
        let mut step = Step::new(self.now(), &self.store);
        self.machine.handle(&mut step, event);
        let Step { changes, actions, fault, .. } = step;
        assert_eq!(fault, None);
        let mut outcome = Outcome::default();
        self.commit_step(changes, actions, &mut outcome);
        outcome
    }

    fn receive(&mut self, transaction: &Transaction, source: Source) -> Outcome {
        let transaction = self.setting.signed(transaction);
        self.handle(Event::Transaction { transaction, source })
    }

    fn wallet(&mut self, transaction: &Transaction) -> Outcome {
        self.tickets += 1;
        self.receive(transaction, Source::Wallet(Ticket(self.tickets)))
    }

    fn member(&mut self, from: usize, transaction: &Transaction) -> Outcome {
        self.receive(transaction, Source::Member(self.setting.member(from)))
    }

    fn answer(&mut self, transaction: &Transaction) -> Outcome {
        self.receive(transaction, Source::Answer)
    }

    fn votes(&mut self, from: usize, votes: &[Vote]) -> Outcome {
        let batch = self.setting.batch(from, votes.to_vec());
        self.handle(Event::Votes(batch))
    }

    fn certificate(&mut self, vote: Vote, voters: &[usize]) -> Outcome {
        let certificate = self.setting.certificate(vote.kind, vote.txid, voters);
        let verified = self.setting.verified(&certificate);
        self.handle(Event::Certificate(verified))
    }

    fn connected(&mut self, member: usize) -> Outcome {
        self.handle(Event::Connected(self.setting.member(member)))
    }

    /// Time passes, and the timers are looked at.
    fn pass(&mut self, ms: u64) -> Outcome {
        self.now_ms += ms;
        self.handle(Event::Tick)
    }

    /// A crash, and a start from what was durable.
    fn restart(&mut self) -> Outcome {
        let member = self.own.map(|own| self.setting.member(own));
        self.machine = Machine::new(Arc::clone(&self.setting.committee), self.setting.rules, member);
        self.machine.recover(self.store.recovered(), self.now());
        let votes = self.machine.own_votes();
        let Some(own) = self.own.filter(|_| !votes.is_empty()) else { return Outcome::default() };
        let batch = self.setting.batch(own, votes);
        let mut step = Step::new(self.now(), &self.store);
        self.machine.count_own(&mut step, &batch);
        let Step { changes, actions, fault, .. } = step;
        assert_eq!(fault, None);
        let mut outcome = Outcome::default();
        self.commit_step(changes, actions, &mut outcome);
        outcome
    }

    /// A payment of the whole coin of a wallet; different amounts make rivals.
    fn payment(&self, wallet: u32, amount: u64) -> Arc<Transaction> {
        self.setting.pay(&[(self.setting.coin(wallet), wallet)], &[(amount, wallet)], 0)
    }

    /// A payment of the first output of `parent`, which belongs to `wallet`.
    fn child(&self, parent: &Transaction, wallet: u32, amount: u64) -> Arc<Transaction> {
        let coin = OutPoint { txid: parent.txid(), vout: 0 };
        self.setting.pay(&[(coin, wallet)], &[(amount, wallet)], 0)
    }

    fn is_final(&self, transaction: &Transaction) -> bool {
        self.store.finalized.contains_key(&transaction.txid())
    }

    fn holder(&self, wallet: u32) -> Option<Txid> {
        self.store.state(&self.setting.coin(wallet)).unwrap().txid()
    }
}

const OTHERS: [usize; 3] = [1, 2, 3];

#[test]
fn a_valid_transaction_is_locked_approved_and_told_to_all_before_it_is_called_pending() {
    let mut solo = Solo::new(4);
    let t = solo.payment(0, 5_000);
    let outcome = solo.wallet(&t);
    assert_eq!(outcome.votes, [approve(t.txid())]);
    assert!(outcome.pending());
    assert!(outcome.actions.iter().any(|a| matches!(a, Action::Broadcast(body) if body.txid() == t.txid())));
    assert_eq!(solo.holder(0), Some(t.txid()));
    // Sending it again is no error and no change: the answer is where it stands.
    let again = solo.wallet(&t);
    assert!(again.pending() && !again.changed);
    // Two more approvals make C, hence a commit; two more commits make F.
    assert_eq!(solo.votes(1, &[approve(t.txid())]).votes, []);
    assert_eq!(solo.votes(2, &[approve(t.txid())]).votes, [commit(t.txid())]);
    assert!(!solo.is_final(&t));
    solo.votes(1, &[commit(t.txid())]);
    assert!(!solo.is_final(&t), "approvals are not finality, nor are two commits of four");
    solo.votes(3, &[commit(t.txid())]);
    assert!(solo.is_final(&t));
    let created = OutPoint { txid: t.txid(), vout: 0 };
    assert_eq!(solo.store.state(&created), Some(UTXOState::Unspent));
    assert!(matches!(solo.wallet(&t).reply(), Some(Progress::Finalized { .. })));
    assert_eq!(solo.machine.in_flight(), 0);
}

#[test]
fn a_vote_counts_once_however_often_it_comes() {
    let mut solo = Solo::new(4);
    let t = solo.payment(0, 5_000);
    solo.wallet(&t);
    for _ in 0..3 {
        assert_eq!(solo.votes(1, &[approve(t.txid())]).votes, [], "two of four are not three");
    }
    assert_eq!(solo.votes(1, &[approve(t.txid()), approve(t.txid())]).votes, []);
    assert_eq!(solo.votes(2, &[approve(t.txid())]).votes, [commit(t.txid())]);
}

#[test]
fn a_quorum_is_of_weight_and_not_of_heads() {
    // Of 6 it takes 5: the heavy member and two light ones, or not at all.
    let setting = Arc::new(Setting::make(&[1, 3, 1, 1]));
    let mut solo = Solo::with(Arc::clone(&setting), Some(0));
    let t = solo.payment(0, 5_000);
    solo.wallet(&t);
    assert_eq!(solo.votes(2, &[approve(t.txid())]).votes, []);
    assert_eq!(solo.votes(3, &[approve(t.txid())]).votes, [], "three of four heads, three of six in weight");
    assert_eq!(solo.votes(1, &[approve(t.txid())]).votes, [commit(t.txid())]);
}

#[test]
fn a_single_member_makes_its_own_payments_final() {
    let mut solo = Solo::new(1);
    let t = solo.payment(0, 5_000);
    let outcome = solo.wallet(&t);
    assert_eq!(outcome.votes, [approve(t.txid()), commit(t.txid())]);
    assert!(outcome.pending());
    assert!(solo.is_final(&t));
    // Its child, sent at once, is as final.
    let child = solo.child(&t, 0, 4_000);
    solo.wallet(&child);
    assert!(solo.is_final(&child));
}

#[test]
fn votes_may_come_before_the_body() {
    let mut solo = Solo::new(4);
    let t = solo.payment(0, 5_000);
    assert_eq!(solo.votes(1, &[approve(t.txid())]).requests(), []);
    assert_eq!(solo.pass(UNKNOWN_BODY_WAIT_MS - 1).requests(), []);
    assert_eq!(solo.pass(1).requests(), [(Some(1), t.txid())], "who votes on it has it");
    solo.votes(2, &[approve(t.txid())]);
    let outcome = solo.answer(&t);
    assert_eq!(outcome.votes, [approve(t.txid()), commit(t.txid())], "with its own vote there are three");
    assert_eq!(solo.pass(RESEND_EVERY_MS).requests(), [], "nothing is asked for twice");
}

#[test]
fn a_certificate_may_come_before_the_body() {
    let mut solo = Solo::new(4);
    let t = solo.payment(0, 5_000);
    let outcome = solo.certificate(approve(t.txid()), &OTHERS);
    assert!(!outcome.changed);
    assert_eq!(outcome.requests(), [(None, t.txid())]);
    assert_eq!(solo.answer(&t).votes, [approve(t.txid()), commit(t.txid())]);
}

#[test]
fn the_finality_proof_may_come_before_everything_else() {
    let mut solo = Solo::new(4);
    let t = solo.payment(0, 5_000);
    assert_eq!(solo.certificate(commit(t.txid()), &OTHERS).requests(), [(None, t.txid())]);
    solo.answer(&t);
    assert!(solo.is_final(&t));
    let Some(UTXOState::SpentFinalized { txid, votes, .. }) = solo.store.state(&solo.setting.coin(0)) else {
        panic!("its input is spent");
    };
    assert_eq!((txid, votes), (t.txid(), 3));
    // The approvals that come afterwards change nothing.
    assert!(!solo.certificate(approve(t.txid()), &OTHERS).changed);
    assert!(!solo.votes(1, &[approve(t.txid()), commit(t.txid())]).changed);
    assert_eq!(solo.machine.in_flight(), 0);
}

#[test]
fn a_member_that_still_sends_a_final_transaction_is_given_the_proof() {
    let mut solo = Solo::new(4);
    let t = solo.payment(0, 5_000);
    solo.certificate(commit(t.txid()), &OTHERS);
    solo.answer(&t);
    let settled =
        |o: Outcome| matches!(o.actions[..], [Action::SendSettled { to, txid }] if to.get() == 2 && txid == t.txid());
    assert!(settled(solo.member(2, &t)));
    // Who sends its rival is told by it too why that will not do.
    let rival = solo.payment(0, 6_000);
    let outcome = solo.member(2, &rival);
    assert!(outcome.actions.iter().any(|a| matches!(a, Action::SendSettled { txid, .. } if *txid == t.txid())));
}

#[test]
fn a_certificate_whose_inputs_are_not_here_waits_for_the_parent_and_asks_for_it() {
    let mut solo = Solo::new(4);
    let parent = solo.payment(0, 5_000);
    let child = solo.child(&parent, 0, 4_000);
    solo.certificate(approve(child.txid()), &OTHERS);
    let outcome = solo.answer(&child);
    assert_eq!(outcome.votes, []);
    assert!(outcome.requests().contains(&(None, parent.txid())));
    solo.certificate(commit(parent.txid()), &OTHERS);
    let outcome = solo.answer(&parent);
    assert!(solo.is_final(&parent));
    assert!(outcome.votes.contains(&commit(child.txid())), "{:?}", outcome.votes);
}

/// The certificate is kept for longer than the body may wait in the room.
#[test]
fn a_certificate_is_acted_on_however_late_the_parent_comes() {
    let mut solo = Solo::new(4);
    let parent = solo.payment(0, 5_000);
    let child = solo.child(&parent, 0, 4_000);
    solo.certificate(approve(child.txid()), &OTHERS);
    solo.answer(&child);
    for _ in 0..3 {
        solo.pass(PARENT_WAIT_MS);
    }
    solo.certificate(commit(parent.txid()), &OTHERS);
    assert_eq!(solo.answer(&parent).votes, [approve(parent.txid()), commit(child.txid())]);
}

/// The order in which a peer gives what this member lacks: the body, then its proof. The
/// body waits in the room by then, and what is missing is its parent, not the body.
#[test]
fn a_body_that_waits_already_is_not_asked_for_but_its_parent_is() {
    let mut solo = Solo::new(4);
    let parent = solo.payment(0, 5_000);
    let child = solo.child(&parent, 0, 4_000);
    solo.answer(&child);
    let mut requests = solo.certificate(commit(child.txid()), &OTHERS).requests();
    requests.extend(solo.answer(&child).requests());
    assert!(requests.contains(&(None, parent.txid())), "the parent is asked for: {requests:?}");
    solo.certificate(commit(parent.txid()), &OTHERS);
    solo.answer(&parent);
    assert!(solo.is_final(&parent) && solo.is_final(&child));
}

#[test]
fn a_child_is_not_approved_before_its_parent_is_final_here() {
    let mut solo = Solo::new(4);
    let parent = solo.setting.pay(&[(solo.setting.coin(0), 0)], &[(5_000, 0), (1_000, 0)], 0);
    let child = solo.child(&parent, 0, 4_000);
    let outcome = solo.wallet(&child);
    assert!(!outcome.changed && outcome.reply().is_none(), "it waits unacknowledged");
    solo.wallet(&parent);
    let outcome = solo.votes(1, &[approve(parent.txid()), commit(parent.txid()), approve(child.txid())]);
    assert_eq!(outcome.votes, []);
    let outcome = solo.votes(2, &[approve(parent.txid()), approve(child.txid())]);
    assert_eq!(outcome.votes, [commit(parent.txid())], "its parent is certified, and that is not enough");
    let late = solo.setting.pay(&[(OutPoint { txid: parent.txid(), vout: 1 }, 0)], &[(900, 0)], 0);
    assert!(!solo.member(3, &late).changed, "nor for a child that comes only now");
    let outcome = solo.votes(2, &[commit(parent.txid())]);
    let votes = BTreeSet::from_iter(outcome.votes.iter().copied());
    assert_eq!(votes, BTreeSet::from([approve(child.txid()), commit(child.txid()), approve(late.txid())]));
    assert!(outcome.pending(), "the wallet hears when it is locked");
}

#[test]
fn a_child_without_a_parent_is_refused_in_the_end_and_not_remembered() {
    let mut solo = Solo::new(4);
    let parent = solo.payment(0, 5_000);
    let child = solo.child(&parent, 0, 4_000);
    let missing = OutPoint { txid: parent.txid(), vout: 0 };
    solo.wallet(&child);
    assert!(solo.pass(PARENT_WAIT_MS - 1).reply().is_none());
    assert_eq!(solo.pass(1).rejected(), Some(&Rejection::UnknownInput(missing)));
    solo.certificate(commit(parent.txid()), &OTHERS);
    let outcome = solo.answer(&parent);
    assert!(solo.is_final(&parent) && !outcome.votes.contains(&approve(child.txid())));
    // An output that a settled parent does not have will never come: no waiting.
    let absent = OutPoint { txid: parent.txid(), vout: 1 };
    let hopeless = solo.setting.pay(&[(absent, 0)], &[(1, 0)], 0);
    assert_eq!(solo.wallet(&hopeless).rejected(), Some(&Rejection::UnknownInput(absent)));
}

#[test]
fn a_member_that_sends_a_child_is_asked_for_the_parent() {
    let mut solo = Solo::new(4);
    let parent = solo.payment(0, 5_000);
    let child = solo.child(&parent, 0, 4_000);
    assert_eq!(solo.member(2, &child).requests(), [(Some(2), parent.txid())]);
}

#[test]
fn finality_beats_a_local_lock_and_leaves_the_rest_of_it() {
    let mut solo = Solo::new(4);
    let (x, y) = (solo.setting.coin(0), solo.setting.coin(1));
    let mine = solo.setting.pay(&[(x, 0), (y, 1)], &[(15_000, 0)], 0);
    let theirs = solo.payment(0, 5_000);
    solo.wallet(&mine);
    solo.certificate(commit(theirs.txid()), &OTHERS);
    solo.answer(&theirs);
    assert!(solo.is_final(&theirs));
    assert_eq!(solo.holder(0), Some(theirs.txid()));
    // There is no release but by the chain: the other coin stays locked, also for others.
    assert_eq!(solo.holder(1), Some(mine.txid()));
    let third = solo.payment(1, 5_000);
    let locked = Rejection::InputLocked { outpoint: y, by: mine.txid() };
    assert_eq!(solo.wallet(&third).rejected(), Some(&locked));
    // Not even a certificate makes this member commit to the beaten one.
    assert_eq!(solo.certificate(approve(mine.txid()), &OTHERS).votes, []);
}

#[test]
fn a_member_commits_what_a_quorum_approved_though_it_locked_a_rival() {
    let mut solo = Solo::new(4);
    let (mine, theirs) = (solo.payment(0, 5_000), solo.payment(0, 6_000));
    solo.wallet(&mine);
    solo.certificate(approve(theirs.txid()), &OTHERS);
    let outcome = solo.answer(&theirs);
    assert_eq!(outcome.votes, [commit(theirs.txid())]);
    assert!(solo.store.certificates.contains_key(&(theirs.txid(), VoteKind::Approve)), "C is beside the vote");
    assert_eq!(solo.holder(0), Some(mine.txid()), "its own lock does not matter, and stays");
    // From now on it never commits to the rival, not even after a restart.
    assert_eq!(solo.certificate(approve(mine.txid()), &OTHERS).votes, []);
    assert_eq!(solo.restart().votes, []);
    assert_eq!(solo.certificate(approve(mine.txid()), &OTHERS).votes, []);
}

#[test]
fn a_conflict_between_members_is_aborted_after_a_while() {
    let mut solo = Solo::new(4);
    let (mine, theirs) = (solo.payment(0, 5_000), solo.payment(0, 6_000));
    solo.wallet(&mine);
    let outcome = solo.member(1, &theirs);
    assert!(!outcome.changed);
    assert!(
        outcome
            .actions
            .iter()
            .any(|a| matches!(a, Action::Advise { to, txid, rejection: Rejection::InputLocked { .. } }
        if to.get() == 1 && *txid == theirs.txid()))
    );
    assert_eq!(solo.pass(CONFLICT_WAIT_MS - 1).votes, []);
    let both: BTreeSet<_> = solo.pass(1).votes.into_iter().collect();
    assert_eq!(both, BTreeSet::from([abort(mine.txid()), abort(theirs.txid())]));
    assert!(solo.store.in_flight.contains_key(&theirs.txid()), "the evidence is durable with the vote");
    // It has promised: no certificate makes it commit, now or after a restart.
    assert_eq!(solo.certificate(approve(mine.txid()), &OTHERS).votes, []);
    assert_eq!(solo.restart().votes, []);
    assert_eq!(solo.certificate(approve(mine.txid()), &OTHERS).votes, []);
    assert_eq!(solo.certificate(approve(theirs.txid()), &OTHERS).votes, []);
    assert_eq!(solo.pass(CONFLICT_WAIT_MS).votes, [], "and it votes once");
    // What a quorum committed is final all the same.
    solo.certificate(commit(theirs.txid()), &OTHERS);
    assert!(solo.is_final(&theirs));
}

#[test]
fn what_is_certified_is_not_aborted_but_its_rival_is() {
    let mut solo = Solo::new(4);
    let (mine, theirs) = (solo.payment(0, 5_000), solo.payment(0, 6_000));
    solo.wallet(&mine);
    solo.member(1, &theirs);
    assert_eq!(solo.certificate(approve(mine.txid()), &[0, 2, 3]).votes, [commit(mine.txid())]);
    assert_eq!(solo.pass(CONFLICT_WAIT_MS).votes, [abort(theirs.txid())]);
}

#[test]
fn a_wallet_that_meets_a_lock_contradicts_nobody() {
    let mut solo = Solo::new(4);
    let (first, second) = (solo.payment(0, 5_000), solo.payment(0, 6_000));
    solo.wallet(&first);
    let locked = Rejection::InputLocked { outpoint: solo.setting.coin(0), by: first.txid() };
    assert_eq!(solo.wallet(&second).rejected(), Some(&locked));
    assert_eq!(solo.machine.in_flight(), 1, "it is not remembered");
    assert_eq!(solo.pass(10 * CONFLICT_WAIT_MS).votes, []);
}

#[test]
fn a_member_that_sends_an_invalid_rival_contradicts_nobody() {
    let mut solo = Solo::new(4);
    let t = solo.payment(0, 5_000);
    solo.wallet(&t);
    let coin = solo.setting.coin(0);
    let thief = solo.setting.pay(&[(coin, 50)], &[(1, 50)], 0);
    let greedy = solo.setting.pay(&[(coin, 0)], &[(COIN + 1, 0)], 0);
    let mean = solo.setting.pay(&[(coin, 0)], &[(COIN, 0)], 0);
    for rival in [thief, greedy, mean] {
        assert!(!solo.member(1, &rival).changed);
        assert_eq!(solo.machine.in_flight(), 1, "it is not kept");
    }
    assert_eq!(solo.pass(10 * CONFLICT_WAIT_MS).votes, []);
}

/// A member votes for a theft and gives the body when it is asked. The body is kept, for
/// votes on it are here; but it is no evidence, and must not become any by being written
/// down beside a true conflict or by a restart.
#[test]
fn an_invalid_rival_contradicts_nobody_after_a_restart_either() {
    let mut solo = Solo::new(4);
    let (own, victim) = (solo.setting.coin(1), solo.setting.coin(0));
    // Signed by wallet 1 for both coins; the second is not its own.
    let theft = solo.setting.pay(&[(own, 1), (victim, 1)], &[(15_000, 1)], 0);
    solo.votes(3, &[approve(theft.txid())]);
    solo.answer(&theft);
    let payment = solo.payment(0, 5_000);
    solo.wallet(&payment);
    // The liar contradicts itself on its own coin, which is a conflict as good as any.
    let (one, other) = (solo.payment(1, 5_000), solo.payment(1, 6_000));
    solo.wallet(&one);
    solo.member(3, &other);
    let votes = solo.pass(CONFLICT_WAIT_MS).votes;
    assert!(votes.contains(&abort(one.txid())) && votes.contains(&abort(other.txid())));
    solo.restart();
    let votes = solo.pass(CONFLICT_WAIT_MS).votes;
    assert!(!votes.contains(&abort(payment.txid())), "a payment that nobody contradicts is never aborted");
}

/// Evidence can be there before what it contradicts: a rival of two coins that met a lock
/// on one of them, and then somebody spends the other.
#[test]
fn what_is_locked_against_evidence_that_is_here_already_is_contradicted() {
    let mut solo = Solo::new(4);
    let (x, y) = (solo.setting.coin(0), solo.setting.coin(1));
    let first = solo.payment(0, 5_000);
    let both = solo.setting.pay(&[(x, 0), (y, 1)], &[(15_000, 0)], 0);
    let second = solo.payment(1, 5_000);
    solo.wallet(&first);
    solo.member(1, &both);
    assert_eq!(solo.wallet(&second).votes, [approve(second.txid())]);
    let votes: BTreeSet<_> = solo.pass(CONFLICT_WAIT_MS).votes.into_iter().collect();
    assert_eq!(votes, BTreeSet::from([abort(first.txid()), abort(both.txid()), abort(second.txid())]));
}

#[test]
fn only_the_latest_evidence_of_a_member_on_an_outpoint_is_kept() {
    let mut solo = Solo::new(4);
    let t = solo.payment(0, 5_000);
    solo.wallet(&t);
    for amount in 1..=20 {
        solo.member(1, &solo.payment(0, amount));
    }
    assert_eq!(solo.machine.in_flight(), 2);
    // Another member's evidence is its own.
    solo.member(2, &solo.payment(0, 1));
    assert_eq!(solo.machine.in_flight(), 3);
    let votes = solo.pass(CONFLICT_WAIT_MS).votes;
    let latest = solo.payment(0, 20);
    assert!(votes.contains(&abort(t.txid())) && votes.contains(&abort(latest.txid())));
    assert_eq!(votes.len(), 3);
}

#[test]
fn what_was_aborted_here_can_still_be_approved_but_never_committed() {
    let mut solo = Solo::new(4);
    let (mine, theirs) = (solo.payment(0, 5_000), solo.payment(0, 6_000));
    solo.wallet(&mine);
    solo.member(1, &theirs);
    solo.pass(CONFLICT_WAIT_MS);
    // What the chain does when it aborts `mine`: it is dead, and its lock is gone.
    solo.store.dead.insert(mine.txid());
    solo.store.in_flight.remove(&mine.txid());
    solo.store.votes.remove(&mine.txid());
    solo.store.utxos.get_mut(&solo.setting.coin(0)).unwrap().state = UTXOState::Unspent;
    solo.restart();
    let outcome = solo.wallet(&theirs);
    assert_eq!(outcome.votes, [approve(theirs.txid())]);
    assert!(outcome.pending());
    assert_eq!(solo.certificate(approve(theirs.txid()), &OTHERS).votes, []);
    assert!(solo.wallet(&mine).aborted());
    // The certificate of what is dead is not looked at either.
    assert!(!solo.certificate(approve(mine.txid()), &OTHERS).changed);
}

#[test]
fn a_lock_survives_a_restart_and_keeps_rivals_out() {
    let mut solo = Solo::new(4);
    let (mine, theirs) = (solo.payment(0, 5_000), solo.payment(0, 6_000));
    solo.wallet(&mine);
    assert_eq!(solo.restart().votes, []);
    assert_eq!(solo.machine.own_votes(), [approve(mine.txid())]);
    assert_eq!(solo.connected(2).sent_to(mine.txid()), [2], "it still says that it has locked it");
    let locked = Rejection::InputLocked { outpoint: solo.setting.coin(0), by: mine.txid() };
    assert_eq!(solo.wallet(&theirs).rejected(), Some(&locked));
    let again = solo.wallet(&mine);
    assert!(again.pending() && again.votes.is_empty());
    // Neither does time release it.
    assert_eq!(solo.pass(1_000_000_000).votes, []);
    assert_eq!(solo.wallet(&theirs).rejected(), Some(&locked));
    // And the votes that were counted before count again with those that come again.
    solo.votes(1, &[approve(mine.txid())]);
    assert_eq!(solo.votes(2, &[approve(mine.txid())]).votes, [commit(mine.txid())]);
}

#[test]
fn an_own_vote_that_the_database_does_not_hold_suspends() {
    let mut solo = Solo::new(4);
    let t = solo.payment(0, 5_000);
    solo.wallet(&t);
    solo.votes(0, &[approve(t.txid())]);
    assert_eq!(solo.machine.voting(), Voting::Active, "this one it knows");
    solo.votes(0, &[approve(t.txid()), commit(t.txid())]);
    assert_eq!(solo.machine.voting(), Voting::Suspended(Suspension::UnknownOwnVote));
    // From now on it is silent, whatever comes; what others settle it still takes.
    assert_eq!(solo.certificate(approve(t.txid()), &OTHERS).votes, []);
    let u = solo.payment(1, 5_000);
    assert_eq!(solo.wallet(&u).votes, []);
    assert_eq!(solo.holder(1), None);
    assert_eq!(solo.member(1, &solo.payment(0, 6_000)).votes, []);
    assert_eq!(solo.pass(CONFLICT_WAIT_MS).votes, []);
    solo.certificate(commit(t.txid()), &OTHERS);
    assert!(solo.is_final(&t));
}

#[test]
fn an_own_vote_on_something_settled_or_dead_is_no_reason_to_suspend() {
    let mut solo = Solo::new(4);
    let t = solo.payment(0, 5_000);
    solo.certificate(commit(t.txid()), &OTHERS);
    solo.answer(&t);
    let dead = Txid::from_bytes([9; 32]);
    solo.store.dead.insert(dead);
    solo.votes(0, &[commit(t.txid()), abort(dead)]);
    assert_eq!(solo.machine.voting(), Voting::Active);
}

/// Its signature may come back in another's certificate as well as in its own batch.
#[test]
fn an_unknown_own_vote_in_a_certificate_suspends_too() {
    for vote in [approve, abort] {
        let mut solo = Solo::new(4);
        let t = solo.payment(0, 5_000);
        solo.answer(&t);
        solo.store = Store::new(&solo.setting);
        solo.restart();
        let outcome = solo.certificate(vote(t.txid()), &[0, 1, 2]);
        assert_eq!(outcome.votes, []);
        assert_eq!(solo.machine.voting(), Voting::Suspended(Suspension::UnknownOwnVote), "{:?}", vote(t.txid()));
    }
}

#[test]
fn an_observer_never_votes_and_learns_what_is_final() {
    let mut solo = Solo::with(Setting::of(4), None);
    assert_eq!(solo.machine.voting(), Voting::Observer);
    let t = solo.payment(0, 5_000);
    let outcome = solo.wallet(&t);
    assert!(outcome.pending(), "it has stored the transaction and passes it on");
    assert_eq!(solo.holder(0), None, "and locks nothing");
    for member in OTHERS {
        solo.votes(member, &[approve(t.txid())]);
    }
    for member in OTHERS {
        assert_eq!(solo.votes(member, &[commit(t.txid())]).votes, []);
    }
    assert!(solo.is_final(&t));
}

/// Every rule that needs the ledger, each with the next one broken too: the first is named
/// and nothing is changed or remembered.
#[test]
fn a_rejection_names_the_first_rule_broken_and_changes_nothing() {
    let mut solo = Solo::new(4);
    let coin = |wallet| solo.setting.coin(wallet);
    let (locked, spent, free, other) = (coin(0), coin(1), coin(2), coin(3));
    let absent = OutPoint { vout: COINS, ..free };
    let pay = |inputs: &[(OutPoint, u32)], amount| solo.setting.pay(inputs, &[(amount, 0)], 0);
    let holder = pay(&[(locked, 0)], 1);
    let spender = pay(&[(spent, 1)], 1);
    let dead = pay(&[(absent, 9), (free, 9)], 5 * COIN);
    let fee = |units| Amount::from_units(units).unwrap();
    let cases = [
        (Arc::clone(&dead), Rejection::Aborted { by: None }),
        (pay(&[(locked, 9), (free, 9)], COIN), Rejection::InputLocked { outpoint: locked, by: holder.txid() }),
        (pay(&[(free, 9), (spent, 1)], 5 * COIN), Rejection::InputSpent { outpoint: spent, by: spender.txid() }),
        (pay(&[(other, 3), (free, 9)], 5 * COIN), Rejection::WrongOwner(1)),
        (
            pay(&[(other, 3), (free, 2)], 2 * COIN + 1),
            Rejection::InsufficientFunds { inputs: fee(2 * COIN), outputs: fee(2 * COIN + 1) },
        ),
        (pay(&[(free, 2)], COIN - MIN_FEE + 1), Rejection::FeeTooLow { fee: fee(MIN_FEE - 1), min_fee: fee(MIN_FEE) }),
        (pay(&[(free, 2)], COIN), Rejection::FeeTooLow { fee: Amount::ZERO, min_fee: fee(MIN_FEE) }),
    ];
    let unknown = pay(&[(absent, 9), (locked, 9)], COIN);
    let last = pay(&[(free, 2)], COIN - MIN_FEE);
    solo.wallet(&holder);
    solo.certificate(commit(spender.txid()), &OTHERS);
    solo.answer(&spender);
    solo.store.dead.insert(dead.txid());
    let (before, in_flight) = (format!("{:?}", solo.store), solo.machine.in_flight());
    for (transaction, rejection) in cases {
        assert_eq!(check_ledger(&transaction, &solo.setting.rules, &solo.store), Err(rejection.clone()));
        for source in [Source::Wallet(Ticket(0)), Source::Member(solo.setting.member(1)), Source::Answer] {
            let outcome = solo.receive(&transaction, source);
            assert!(!outcome.changed, "{rejection}");
            if let Source::Wallet(_) = source {
                if matches!(rejection, Rejection::Aborted { .. }) {
                    assert!(outcome.aborted(), "what died is not refused anew: that is where it stands");
                } else {
                    assert_eq!(outcome.rejected(), Some(&rejection));
                }
            }
            assert_eq!(solo.machine.in_flight(), in_flight, "{rejection}: nothing is remembered");
        }
    }
    // What does not exist may yet come, so it waits; the verdict is the same.
    let verdict = check_ledger(&unknown, &solo.setting.rules, &solo.store);
    assert_eq!(verdict, Err(Rejection::UnknownInput(absent)));
    assert!(solo.wallet(&unknown).reply().is_none());
    assert_eq!(solo.pass(PARENT_WAIT_MS).rejected(), Some(&Rejection::UnknownInput(absent)));
    assert_eq!(format!("{:?}", solo.store), before, "nothing is written");
    assert_eq!(solo.machine.progress(&unknown.txid()).map(|_| ()), None);
    // The least fee is enough.
    assert!(solo.wallet(&last).pending());
}

#[test]
fn a_copy_with_a_bad_signature_does_not_poison_its_txid() {
    let mut solo = Solo::new(4);
    let t = solo.payment(0, 5_000);
    let mut raw = t.to_raw();
    raw.inputs[0].signature = wallet_key(0).sign(b"something else");
    let forged = check_form(raw, &solo.setting.rules).unwrap();
    assert_eq!(forged.txid(), t.txid(), "signatures are not in the txid");
    let genesis_hash = solo.setting.genesis.hash();
    assert!(Verified::check(SignedTransaction::new(forged, genesis_hash)).is_err());
    // A key that is not the owner's may sign well; that is refused by the ledger's rule.
    let stranger = solo.setting.pay(&[(solo.setting.coin(0), 7)], &[(5_000, 0)], 0);
    assert_eq!(stranger.txid(), t.txid(), "nor are keys");
    assert_eq!(solo.wallet(&stranger).rejected(), Some(&Rejection::WrongOwner(0)));
    assert!(solo.wallet(&t).pending());
}

#[test]
fn a_transaction_of_another_network_has_no_valid_signature_here() {
    let setting = Setting::of(4);
    let t = setting.pay(&[(setting.coin(0), 0)], &[(5_000, 0)], 0);
    assert!(Verified::check(SignedTransaction::new((*t).clone(), Setting::of(7).genesis.hash())).is_err());
    let batch = setting.batch(1, vec![approve(t.txid())]);
    let arrived = MemberBatch::new(batch.get().wire().clone(), &Setting::of(7).committee).unwrap();
    assert!(Verified::check(arrived).is_err());
}

#[test]
fn a_certificate_proves_nothing_if_any_of_it_is_wrong() {
    let setting = Setting::of(4);
    let txid = Txid::from_bytes([5; 32]);
    let good = setting.certificate(VoteKind::Commit, txid, &[0, 2, 3]);
    assert!(good.as_ref().clone().verify(&setting.committee).is_ok());
    let broken: [fn(&mut Certificate); 9] = [
        |c| c.epoch = 1,
        |c| c.kind = VoteKind::Approve,
        |c| c.txid = Txid::from_bytes([6; 32]),
        |c| c.votes.truncate(2),
        |c| c.votes[1] = c.votes[0].clone(),
        |c| c.votes.push(c.votes[0].clone()),
        |c| c.votes[0].voter = wallet_key(0).public_key(),
        |c| c.votes[0].index = 1,
        |c| c.votes[0].signature = c.votes[1].signature,
    ];
    for (i, change) in broken.iter().enumerate() {
        let mut certificate = good.as_ref().clone();
        change(&mut certificate);
        assert!(certificate.verify(&setting.committee).is_err(), "change {i}");
    }
}

#[test]
fn a_member_that_comes_back_is_given_what_it_may_have_missed() {
    let mut solo = Solo::new(4);
    let t = solo.payment(0, 5_000);
    solo.wallet(&t);
    let outcome = solo.connected(2);
    assert_eq!(outcome.sent_to(t.txid()), [2]);
    assert_eq!(outcome.resent(), [approve(t.txid())]);
    // It voted, so it has the body; and its own votes are returned to it.
    solo.votes(2, &[approve(t.txid())]);
    let outcome = solo.connected(2);
    assert!(outcome.sent_to(t.txid()).is_empty());
    let returned =
        |a: &Action| matches!(a, Action::ReturnBatch { to, batch } if to.get() == 2 && batch.get().member().get() == 2);
    assert_eq!(outcome.actions.iter().filter(|a| returned(a)).count(), 1);
    // With C here, C is given.
    solo.votes(3, &[approve(t.txid())]);
    let outcome = solo.connected(1);
    assert_eq!(outcome.certified(), [(VoteKind::Approve, t.txid())]);
    assert_eq!(outcome.resent(), [approve(t.txid()), commit(t.txid())]);
}

#[test]
fn what_is_in_flight_for_a_while_is_said_again_and_again() {
    let mut solo = Solo::new(4);
    let t = solo.payment(0, 5_000);
    solo.wallet(&t);
    solo.votes(2, &[approve(t.txid())]);
    assert_eq!(solo.pass(RESEND_AFTER_MS - 1).resent(), []);
    for wait in [1, RESEND_EVERY_MS, 2 * RESEND_EVERY_MS, 4 * RESEND_EVERY_MS] {
        assert_eq!(solo.pass(wait - 1).resent(), []);
        let outcome = solo.pass(1);
        assert_eq!(outcome.resent(), [approve(t.txid())]);
        assert_eq!(outcome.sent_to(t.txid()), [1, 3], "to those that have not voted");
    }
    solo.votes(1, &[approve(t.txid())]);
    let outcome = solo.pass(4 * RESEND_EVERY_MS);
    assert_eq!(outcome.certified(), [(VoteKind::Approve, t.txid())]);
    assert_eq!(outcome.resent(), [approve(t.txid()), commit(t.txid())]);
    // After a restart too.
    solo.restart();
    assert_eq!(solo.pass(RESEND_AFTER_MS).certified(), [(VoteKind::Approve, t.txid())]);
}

/// Under load everything takes longer, and saying it all again after the same time adds to it.
#[test]
fn what_was_sent_while_finality_was_quick_waits_when_it_has_become_slow() {
    let mut solo = Solo::new(4);
    let others: Vec<_> = (1..=5).map(|wallet| solo.payment(wallet, 5_000)).collect();
    for other in &others {
        solo.wallet(other);
    }
    solo.pass(SLOWEST_RESEND_MS);
    let t = solo.payment(0, 5_000);
    solo.wallet(&t);
    for other in &others {
        solo.certificate(commit(other.txid()), &OTHERS);
        assert!(solo.is_final(other));
    }
    // The timer runs out, and nothing is said: twice what the others took is not over.
    assert_eq!(solo.pass(RESEND_AFTER_MS).resent(), []);
    let mut after = RESEND_AFTER_MS;
    while solo.pass(10).resent().is_empty() {
        after += 10;
        assert!(after < 2 * SLOWEST_RESEND_MS, "it is never said again");
    }
    assert!(after > RESEND_AFTER_MS + 500, "said again after {after} ms");
}

/// A liar may give its approval to one member only, so that this one alone holds C(T). If
/// it does not pass C(T) on, the others vote to abort what it committed to.
#[test]
fn a_certificate_is_passed_on_by_a_member_that_locked_a_rival() {
    let mut solo = Solo::new(4);
    let (mine, theirs) = (solo.payment(0, 5_000), solo.payment(0, 6_000));
    solo.wallet(&mine);
    solo.member(1, &theirs);
    solo.votes(1, &[approve(theirs.txid())]);
    solo.votes(2, &[approve(theirs.txid())]);
    assert_eq!(solo.votes(3, &[approve(theirs.txid())]).votes, [commit(theirs.txid())]);
    let outcome = solo.pass(RESEND_AFTER_MS);
    assert!(outcome.certified().contains(&(VoteKind::Approve, theirs.txid())), "{:?}", outcome.certified());
    assert!(outcome.resent().contains(&commit(theirs.txid())), "{:?}", outcome.resent());
}

#[test]
fn a_vote_to_abort_a_rival_is_said_again() {
    let mut solo = Solo::new(4);
    let (mine, theirs) = (solo.payment(0, 5_000), solo.payment(0, 6_000));
    solo.wallet(&mine);
    solo.member(1, &theirs);
    solo.pass(CONFLICT_WAIT_MS);
    let resent = solo.pass(RESEND_AFTER_MS + RESEND_EVERY_MS).resent();
    assert!(resent.contains(&abort(mine.txid())), "{resent:?}");
    assert!(resent.contains(&abort(theirs.txid())), "{resent:?}");
}

#[test]
fn votes_on_nothing_are_bounded_for_each_member() {
    let mut solo = Solo::new(4);
    let t = solo.payment(0, 5_000);
    solo.votes(2, &[approve(t.txid())]);
    let nothing = |i: usize| {
        let mut bytes = [0xee; 32];
        bytes[..8].copy_from_slice(&(i as u64).to_le_bytes());
        approve(Txid::from_bytes(bytes))
    };
    for from in (0..MAX_UNKNOWN_PER_MEMBER + 4_096).step_by(4_096) {
        let votes: Vec<_> = (from..from + 4_096).map(nothing).collect();
        assert!(!solo.votes(1, &votes).changed);
    }
    assert_eq!(solo.machine.known(), MAX_UNKNOWN_PER_MEMBER + 1);
    assert_eq!(solo.machine.in_flight(), 0, "nor does it use up anybody's room for payments");
    // The flood cost its sender its own oldest votes, and nobody else a vote.
    solo.votes(3, &[approve(t.txid())]);
    assert_eq!(solo.answer(&t).votes, [approve(t.txid()), commit(t.txid())]);
}

#[test]
fn the_room_for_children_is_bounded() {
    let mut solo = Solo::new(4);
    let coin = |i: usize| OutPoint { txid: Txid::from_bytes([0xcc; 32]), vout: u32::try_from(i).unwrap() };
    for i in 0..MAX_WAITING_FOR_PARENTS {
        let child = solo.setting.pay(&[(coin(i), 0)], &[(1, 0)], 0);
        assert!(solo.wallet(&child).reply().is_none());
    }
    let late = coin(MAX_WAITING_FOR_PARENTS);
    let child = solo.setting.pay(&[(late, 0)], &[(1, 0)], 0);
    assert_eq!(solo.wallet(&child).rejected(), Some(&Rejection::UnknownInput(late)));
    // It empties with time, and then there is room again.
    for _ in 0..8 {
        solo.pass(PARENT_WAIT_MS);
    }
    assert!(solo.wallet(&child).reply().is_none());
}

/// A liar that gives the bodies too, each of which spends more than there is: they are kept
/// for the sake of its votes, and that is bounded as the votes are.
#[test]
fn bodies_that_only_a_liar_votes_for_are_bounded_too() {
    let mut solo = Solo::new(4);
    let coin = solo.setting.coin(0);
    for from in (1..=MAX_UNKNOWN_PER_MEMBER as u64 + 128).step_by(128) {
        let excesses: Vec<_> =
            (from..from + 128).map(|more| solo.setting.pay(&[(coin, 0)], &[(COIN + more, 0)], 0)).collect();
        let votes: Vec<_> = excesses.iter().map(|excess| approve(excess.txid())).collect();
        solo.votes(1, &votes);
        for excess in &excesses {
            assert!(!solo.answer(excess).changed);
        }
    }
    assert_eq!(solo.machine.in_flight(), MAX_UNKNOWN_PER_MEMBER);
    assert!(solo.wallet(&solo.payment(0, 5_000)).pending());
}

/// More than a third lies, and there is a proof of it. The node stops; it never takes the
/// second for final too, nor what breaks a rule.
#[test]
fn a_proof_that_only_a_dishonest_quorum_can_make_stops_the_node() {
    let proof = |solo: &mut Solo, transaction: &Transaction| {
        solo.answer(transaction);
        let certificate = solo.setting.certificate(VoteKind::Commit, transaction.txid(), &OTHERS);
        let mut step = Step::new(solo.now(), &solo.store);
        let event = Event::Certificate(solo.setting.verified(&certificate));
        solo.machine.handle(&mut step, event);
        if step.fault.is_none() {
            let transaction = solo.setting.signed(transaction);
            solo.machine.handle(&mut step, Event::Transaction { transaction, source: Source::Answer });
        }
        (step.fault, step.changes.is_empty())
    };
    let mut solo = Solo::new(4);
    let (first, second) = (solo.payment(0, 5_000), solo.payment(0, 6_000));
    solo.certificate(commit(first.txid()), &OTHERS);
    solo.answer(&first);
    let outpoint = solo.setting.coin(0);
    let conflicting = Fault::ConflictingFinality { txid: second.txid(), outpoint, by: first.txid() };
    assert_eq!(proof(&mut solo, &second), (Some(conflicting), true));
    let mut solo = Solo::new(4);
    let excess = solo.payment(0, COIN + 1);
    let amount = |units| Amount::from_units(units).unwrap();
    let rejection = Rejection::InsufficientFunds { inputs: amount(COIN), outputs: amount(COIN + 1) };
    let invalid = Fault::InvalidFinality { txid: excess.txid(), rejection };
    assert_eq!(proof(&mut solo, &excess), (Some(invalid), true));
}
