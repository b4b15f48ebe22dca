//! The ledger thread: the one writer.
//!
//! It drains what has come, lets the machine handle it in order, commits the changes of
//! the whole batch at once, and only then lets anything leave. While a commit syncs, the
//! next batch gathers: group commit without a timer, and without a delay when idle.
//!
//! The first error stops the node: a batch that could not be made durable never happened,
//! and a restart recovers from the database.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use crossbeam_channel::{Receiver, Sender};
use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::health::LedgerHealth;
use super::outbox::Outbox;
use super::rush::Rush;
use crate::consensus::{
    Action, Ballot, Committee, Event, Fault, Machine, MemberBatch, Now, Rules, Step, Suspension, Ticket, Verified,
    Vote, Voting, sign_batch,
};
use crate::db::{
    ChangeEvents, CommitBatch, Database, DatabaseError, Durable, Opened, Owner, PruneBatch, Reader, Subscription,
    SubscriptionKey,
};
use crate::limits::{
    LEDGER_QUEUE, MAX_EVENTS_PER_COMMIT, MAX_STATUS_IN_FLIGHT, MAX_VOTES_PER_BATCH, STATUS_EVERY, TICK, VERIFY_QUEUE,
};
use crate::types::{Genesis, Height, SecretKey, Transaction, Txid, UnixSeconds};

/// What a ledger is opened with.
#[derive(Debug)]
pub struct LedgerConfig {
    /// The node's name: a member's id, or any for an observer.
    pub id: String,
    /// Where the database lives.
    pub data_dir: PathBuf,
    /// The network.
    pub genesis: Genesis,
    /// The member's key; `None` for an observer.
    pub key: Option<SecretKey>,
    /// Bytes of the database's cache.
    pub cache_bytes: u64,
    /// The key has never been used by a node before: if there is no database, one is made
    /// without a fence. Whoever is not sure says `false`, and a new database votes only on
    /// what comes into being after it has asked the others.
    pub first_start: bool,
    /// Blocks whose spent outputs, certificates and changes are kept; `None` keeps
    /// everything.
    pub retention_blocks: Option<Height>,
}

/// Why a ledger does not open.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The database says no.
    #[error(transparent)]
    Database(#[from] DatabaseError),
    /// The key is no member's of this network.
    #[error("the key {0} is not a masternode's of this network; an observer is configured without a key")]
    NotMember(crate::types::PublicKey),
}

/// What the ledger thread is asked to do.
#[derive(Debug)]
pub(super) enum Input {
    /// Something for the machine.
    Event(Event),
    /// A wallet's transaction with a bad signature: say what is wrong with it.
    Unsigned { transaction: Transaction, ticket: Ticket },
    /// A wallet asks where a transaction stands.
    Query { txid: Txid, ticket: Ticket },
    /// Make, replace or cancel a subscription, if the token fits.
    Subscription(SubscriptionRequest),
    /// Forget what confirmed blocks have made unnecessary, and say when it is done.
    Prune { batch: PruneBatch, done: oneshot::Sender<()> },
    /// Come to an end.
    Stop,
}

/// A change of a durable subscription.
#[derive(Debug)]
pub(super) struct SubscriptionRequest {
    pub(super) key: SubscriptionKey,
    /// The new one; `None` cancels.
    pub(super) subscription: Option<Subscription>,
    /// The hash of the token that the wallet showed, now or when its session began.
    pub(super) token_hash: [u8; 32],
    /// Only if it has not been used since; for housekeeping.
    pub(super) last_used_before: Option<UnixSeconds>,
    /// Told when it is durable, or that the subscription is somebody else's.
    pub(super) done: oneshot::Sender<Durable<Result<SubscriptionDone, NotYours>>>,
}

/// What became of a subscription request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SubscriptionDone {
    /// Whether it existed before.
    pub(super) existed: bool,
    /// The request's place in the order of all of them.
    pub(super) number: u64,
}

/// The token does not fit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct NotYours;

/// An input with the place that it holds in the queue.
#[derive(Debug)]
pub(super) struct Work {
    pub(super) input: Input,
    pub(super) permit: Option<OwnedSemaphorePermit>,
}

/// The ledger's queues. What is said of the next block goes first, for its timers run; then
/// whatever members send, so that what is already under way is finished before more is begun.
#[derive(Debug, Clone)]
pub(super) struct Inputs {
    pub(super) agreement: Sender<Work>,
    pub(super) members: Sender<Work>,
    pub(super) wallets: Sender<Work>,
}

/// The other ends.
#[derive(Debug)]
struct Queues {
    agreement: Receiver<Work>,
    members: Receiver<Work>,
    wallets: Receiver<Work>,
}

/// The state of all outputs, and the only way to change it.
///
/// Opens (and recovers) the database; `start` begins the thread that
/// owns it from then on.
#[derive(Debug)]
pub struct UTXOStateManager {
    id: String,
    rules: Rules,
    committee: Arc<Committee>,
    genesis: Genesis,
    data_dir: PathBuf,
    reader: Reader,
    inputs: Inputs,
    retention_blocks: Option<Height>,
    health: Arc<LedgerHealth>,
    waiting: Mutex<Option<Waiting>>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

/// What the thread will own.
#[derive(Debug)]
struct Waiting {
    database: Database,
    machine: Machine,
    key: Option<SecretKey>,
    ballot: Option<Ballot>,
    queues: Queues,
}

impl UTXOStateManager {
    /// Opens the database, making it from the genesis if it is new, and recovers what was
    /// in flight: locks, votes, certificates.
    pub fn open(config: LedgerConfig) -> Result<Self, LedgerError> {
        let committee = Arc::new(Committee::of_genesis(&config.genesis));
        let public_key = config.key.as_ref().map(SecretKey::public_key);
        let own = match public_key {
            Some(key) => Some(committee.index_of(&key).ok_or(LedgerError::NotMember(key))?),
            None => None,
        };
        let owner = Owner { genesis: &config.genesis, public_key, first_start: config.first_start };
        let Opened { database, recovered } = Database::open(&config.data_dir, owner, config.cache_bytes)?;
        let rules = Rules { network: config.genesis.network(), min_fee: config.genesis.min_fee() };
        let mut machine = Machine::new(Arc::clone(&committee), rules, own);
        if let Some(reason) = recovered.suspension {
            tracing::error!(%reason, "this node does not vote; see `time-db`");
            machine.suspend(reason);
        }
        if let Some((state, fenced)) = recovered.fence {
            machine.stand_behind(state, fenced);
            if machine.fence().is_some() {
                tracing::warn!(?state, fenced, "votes of this member were lost; it votes behind a fence");
            }
            if machine.fence().is_some() && !machine.can_be_fenced() {
                tracing::error!("without this member there is no quorum: this network does not survive its lost votes");
            }
        }
        let in_flight = recovered.in_flight.len();
        let height = recovered.tip.height;
        machine.follow_from(recovered.tip, recovered.unconfirmed, config.genesis.block_interval_ms());
        machine.recover(recovered.in_flight, now_at(0));
        let ballot = config.key.clone().map(|key| Ballot { key, log: recovered.agreement });
        if in_flight > 0 {
            tracing::info!(in_flight, "recovered transactions in flight, with their locks and votes");
        }
        let health = Arc::new(LedgerHealth::new(machine.voting()));
        *health.fence.lock().unwrap_or_else(PoisonError::into_inner) = machine.fence();
        health.height.store(height, Ordering::Relaxed);
        let reader = database.reader();
        // Never full but for what `tell` adds: the rest holds permits, of which there are fewer.
        let (wallets, from_wallets) = crossbeam_channel::bounded(LEDGER_QUEUE);
        let (members, from_members) = crossbeam_channel::bounded(2 * VERIFY_QUEUE);
        let (agreement, from_agreement) = crossbeam_channel::bounded(VERIFY_QUEUE);
        let inputs = Inputs { agreement, members, wallets };
        let queues = Queues { agreement: from_agreement, members: from_members, wallets: from_wallets };
        let waiting = Waiting { database, machine, key: config.key, ballot, queues };
        Ok(Self {
            id: config.id,
            rules,
            committee,
            genesis: config.genesis,
            data_dir: config.data_dir,
            reader,
            inputs,
            retention_blocks: config.retention_blocks,
            health,
            waiting: Mutex::new(Some(waiting)),
            thread: Mutex::new(None),
        })
    }

    /// The node's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// The rules of its network.
    pub const fn rules(&self) -> Rules {
        self.rules
    }

    /// The members.
    pub const fn committee(&self) -> &Arc<Committee> {
        &self.committee
    }

    /// The network's beginning.
    pub const fn genesis(&self) -> &Genesis {
        &self.genesis
    }

    /// Where the database lives.
    pub const fn data_dir(&self) -> &PathBuf {
        &self.data_dir
    }

    /// Whether the other members are a quorum that can say what this one may have voted on.
    pub fn can_be_fenced(&self) -> bool {
        let own = self.reader.network().public_key.and_then(|key| self.committee.index_of(&key));
        let own = own.map_or(0, |own| self.committee.weight(own));
        self.committee.total_weight() - own >= self.committee.quorum()
    }

    /// Reads the database.
    pub const fn reader(&self) -> &Reader {
        &self.reader
    }

    /// How it is doing.
    pub const fn health(&self) -> &Arc<LedgerHealth> {
        &self.health
    }

    pub(super) const fn retention_blocks(&self) -> Option<Height> {
        self.retention_blocks
    }

    pub(super) const fn inputs(&self) -> &Inputs {
        &self.inputs
    }

    /// Hands something to the ledger that holds no permit: few and small things only.
    pub(super) fn tell(&self, input: Input) {
        if self.inputs.members.send(Work { input, permit: None }).is_err() {
            tracing::debug!("the ledger has stopped");
        }
    }

    /// Wakes whenever the change log grows; only before `start`.
    pub(super) fn watch_changes(&self) -> Option<ChangeEvents> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        waiting.as_ref().and_then(|waiting| waiting.database.watch_changes())
    }

    /// Starts the ledger thread; what may leave goes to `outbox`.
    pub(super) fn start(&self, outbox: Outbox) -> std::io::Result<()> {
        let waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(Waiting { database, machine, key, ballot, queues }) = waiting else { return Ok(()) };
        let ledger = Ledger {
            reader: database.reader(),
            database,
            machine,
            key,
            ballot,
            more: false,
            committee: Arc::clone(&self.committee),
            queues,
            outbox,
            health: Arc::clone(&self.health),
            own_batches: Vec::new(),
            began: Instant::now(),
            rush: Rush::default(),
            last_tick: Instant::now(),
            last_status: Instant::now(),
            status_due: false,
            status_after: None,
            subscription_requests: 0,
        };
        let health = Arc::clone(&self.health);
        let thread = std::thread::Builder::new().name("ledger".into()).spawn(move || {
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| ledger.run()));
            let reason = match outcome {
                Ok(Ok(())) => Ok(()),
                Ok(Err(stop)) => Err(stop.to_string()),
                Err(_) => Err("the ledger thread panicked".into()),
            };
            if let Err(reason) = &reason {
                tracing::error!(%reason, "the ledger has stopped; restart the node to recover");
            }
            health.stopped.send_replace(Some(reason));
        })?;
        *self.thread.lock().unwrap_or_else(PoisonError::into_inner) = Some(thread);
        Ok(())
    }

    /// Commits what is queued and ends the thread. Blocks until it has ended.
    pub(super) fn stop(&self) {
        self.tell(Input::Stop);
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        if thread.is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the ledger thread panicked");
        }
    }
}

/// Seconds since the Unix epoch; 0 on a clock before it.
pub(super) fn unix_now() -> UnixSeconds {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| i64::try_from(d.as_secs()).unwrap_or(i64::MAX))
}

/// The time, when the monotonic clock shows so many milliseconds.
fn now_at(ms: u64) -> Now {
    let unix = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    Now {
        ms,
        unix: i64::try_from(unix.as_secs()).unwrap_or(i64::MAX),
        unix_ms: u64::try_from(unix.as_millis()).unwrap_or(u64::MAX),
    }
}

/// Why the ledger thread ends although nobody asked it to.
#[derive(Debug, thiserror::Error)]
enum Stop {
    #[error(transparent)]
    Database(#[from] DatabaseError),
    #[error("safety fault: {0}")]
    Fault(Box<Fault>),
}

/// What leaves after a commit.
pub(super) struct Outgoing {
    pub(super) actions: Vec<Action>,
    pub(super) votes: Vec<Vote>,
    subscriptions: Vec<SubscriptionAnswer>,
}

type SubscriptionAnswer =
    (oneshot::Sender<Durable<Result<SubscriptionDone, NotYours>>>, Result<SubscriptionDone, NotYours>);

struct Ledger {
    database: Database,
    reader: Reader,
    machine: Machine,
    key: Option<SecretKey>,
    /// What the agreement on blocks begins with, until it has begun.
    ballot: Option<Ballot>,
    /// The last batch left something to do at once.
    more: bool,
    committee: Arc<Committee>,
    queues: Queues,
    outbox: Outbox,
    health: Arc<LedgerHealth>,
    /// Batches that were signed for the last commit's votes and are not counted yet.
    own_batches: Vec<Arc<Verified<MemberBatch>>>,
    began: Instant,
    rush: Rush,
    last_tick: Instant,
    last_status: Instant,
    status_due: bool,
    status_after: Option<Txid>,
    subscription_requests: u64,
}

impl Ledger {
    fn run(mut self) -> Result<(), Stop> {
        self.own_batches = self.sign(self.machine.own_votes());
        loop {
            let work = self.gather();
            let stopping = work.iter().any(|work| matches!(work.input, Input::Stop));
            self.process(work)?;
            if stopping {
                return Ok(());
            }
        }
    }

    fn now(&self) -> Now {
        now_at(u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    /// Waits for something to do, then takes all that is there, up to a commit's worth.
    fn gather(&mut self) -> Vec<Work> {
        std::thread::sleep(self.rush.wait(Instant::now()));
        let mut work = Vec::new();
        if self.own_batches.is_empty() && !self.more {
            let stop = || Work { input: Input::Stop, permit: None };
            crossbeam_channel::select_biased! {
                recv(self.queues.agreement) -> first => work.push(first.unwrap_or_else(|_| stop())),
                recv(self.queues.members) -> first => work.push(first.unwrap_or_else(|_| stop())),
                recv(self.queues.wallets) -> first => work.push(first.unwrap_or_else(|_| stop())),
                default(TICK.saturating_sub(self.last_tick.elapsed())) => {}
            }
        }
        let payments = self.queues.members.try_iter().chain(self.queues.wallets.try_iter());
        let more = self.queues.agreement.try_iter().chain(payments);
        work.extend(more.take(MAX_EVENTS_PER_COMMIT - work.len()));
        let payments = work.iter().filter(|work| matches!(work.input, Input::Event(Event::Transaction { .. })));
        self.rush.begin(payments.count(), Instant::now());
        work
    }

    /// One batch: decide, commit, and let it leave.
    fn process(&mut self, work: Vec<Work>) -> Result<(), Stop> {
        let now = self.now();
        let view = self.database.view();
        let mut step = Step::new(now, &view);
        let mut subscriptions = Subscriptions::default();
        if let Some(ballot) = self.ballot.take() {
            self.machine.take_part(&mut step, ballot);
        }
        for batch in std::mem::take(&mut self.own_batches) {
            self.machine.count_own(&mut step, &batch);
        }
        let voting = self.machine.voting();
        let (mut prune, mut pruned) = (None, None);
        let mut permits = Vec::with_capacity(work.len());
        for Work { input, permit } in work {
            permits.extend(permit);
            match input {
                Input::Event(event) => {
                    // Whoever comes is told at once what is in flight here.
                    self.status_due |= matches!(event, Event::Connected(_));
                    self.machine.handle(&mut step, event);
                }
                Input::Unsigned { transaction, ticket } => {
                    self.machine.refuse_unsigned(&mut step, ticket, &transaction);
                }
                Input::Query { txid, ticket } => self.machine.query(&mut step, ticket, txid),
                Input::Subscription(request) => {
                    self.subscription_requests += 1;
                    subscriptions.decide(&self.reader, request, self.subscription_requests)?;
                }
                Input::Prune { batch, done } => {
                    prune = Some(batch);
                    pruned = Some(done);
                }
                Input::Stop => {}
            }
        }
        if self.last_tick.elapsed() >= TICK {
            self.last_tick = Instant::now();
            self.machine.handle(&mut step, Event::Tick);
        }
        self.more = self.machine.advance(&mut step);
        let Step { changes, actions, fault, .. } = step;
        view.finish()?;
        if let Some(fault) = fault {
            return Err(Stop::Fault(Box::new(fault)));
        }
        let suspension = self.new_suspension(voting);
        // A body is its wallet's word, not this node's: it goes on at once, so that the members
        // write it down beside this one and not after it.
        let (bodies, actions) = actions.into_iter().partition(|action| matches!(action, Action::Broadcast(_)));
        self.outbox.relay(bodies);
        let outgoing = Outgoing {
            actions,
            votes: changes.votes.clone(),
            subscriptions: std::mem::take(&mut subscriptions.answers),
        };
        let finalized = changes.finalized.len();
        for (hash, decided) in &changes.blocks {
            let (block, round) = (&decided.block, decided.certificate.round);
            let (transactions, aborts) = (block.transactions.len(), block.aborts.len());
            tracing::info!(height = block.height, %hash, round, transactions, aborts, "block");
        }
        let batch =
            CommitBatch { changes, subscriptions: subscriptions.rows, suspension, prune, ..CommitBatch::default() };
        let committing = (!batch.is_empty()).then(Instant::now);
        let durable = self.database.commit(batch, outgoing)?;
        drop(permits);
        if let Some(pruned) = pruned {
            // The node may be stopping; what was pruned is durable all the same.
            let _told = pruned.send(()).is_ok();
        }
        self.measure(committing.map(|began| began.elapsed()), finalized);
        self.let_out(durable);
        self.say_status();
        Ok(())
    }

    fn new_suspension(&self, before: Voting) -> Option<Suspension> {
        let now = self.machine.voting();
        if now == before {
            return None;
        }
        match now {
            Voting::Suspended(reason) => {
                tracing::error!(%reason, "this node stops voting; see `time-db`");
                Some(reason)
            }
            _ => None,
        }
    }

    /// The commit is durable. Its votes are signed, one signature for each batch, and all
    /// that it decided leaves.
    fn let_out(&mut self, durable: Durable<Outgoing>) {
        let (durable, subscriptions) = durable.split(|outgoing| {
            let Outgoing { actions, votes, subscriptions } = outgoing;
            ((actions, votes), subscriptions)
        });
        let (actions, votes) = durable.into_inner();
        self.health.votes.fetch_add(votes.len() as u64, Ordering::Relaxed);
        let batches = self.sign(votes);
        let actions = actions.into_iter().map(|action| match action {
            Action::ResendVotes { to, votes } => super::outbox::Outward::Batches { to, batches: self.sign(votes) },
            action => super::outbox::Outward::Action(action),
        });
        self.outbox.deliver(actions.collect());
        self.outbox.deliver(vec![super::outbox::Outward::Batches { to: None, batches: batches.clone() }]);
        self.own_batches.extend(batches);
        for answer in subscriptions.each() {
            let (answer, done) = answer.split(|(done, answer)| (answer, done));
            // The wallet may have gone meanwhile; its subscription is durable all the same.
            let _told = done.into_inner().send(answer).is_ok();
        }
    }

    fn sign(&self, mut votes: Vec<Vote>) -> Vec<Arc<Verified<MemberBatch>>> {
        let Some(key) = &self.key else { return Vec::new() };
        let mut batches = Vec::new();
        while !votes.is_empty() {
            let rest = votes.split_off(votes.len().min(MAX_VOTES_PER_BATCH));
            batches.extend(sign_batch(key, &self.committee, votes).map(Arc::new));
            votes = rest;
        }
        batches
    }

    fn measure(&self, commit: Option<Duration>, finalized: usize) {
        let health = &self.health;
        health.in_flight.store(self.machine.in_flight(), Ordering::Relaxed);
        let (height, now_ms) = (self.machine.height(), self.now().ms);
        if health.height.swap(height, Ordering::Relaxed) != height {
            self.outbox.peers.set_height(height);
        }
        // The fence first: whoever sees that this member votes sees also behind what.
        *health.fence.lock().unwrap_or_else(PoisonError::into_inner) = self.machine.fence();
        *health.voting.lock().unwrap_or_else(PoisonError::into_inner) = self.machine.voting();
        health.unconfirmed.store(self.machine.unconfirmed(), Ordering::Relaxed);
        health.goal.store(self.machine.goal(now_ms), Ordering::Relaxed);
        health.behind.store(self.machine.is_behind(), Ordering::Relaxed);
        health.equivocations.store(self.machine.equivocations(), Ordering::Relaxed);
        if let Some(commit) = commit {
            health.commits.fetch_add(1, Ordering::Relaxed);
            let micros = u64::try_from(commit.as_micros()).unwrap_or(u64::MAX);
            health.commit_micros.fetch_add(micros, Ordering::Relaxed);
            health.last_commit.store(unix_now(), Ordering::Relaxed);
        }
        health.finalized.fetch_add(finalized as u64, Ordering::Relaxed);
    }

    /// Tells the members now and then what is in flight here, so that each can send what
    /// the other lacks.
    fn say_status(&mut self) {
        if self.last_status.elapsed() < STATUS_EVERY && !self.status_due {
            return;
        }
        self.status_due = false;
        self.last_status = Instant::now();
        let in_flight = self.machine.in_flight_after(self.status_after, MAX_STATUS_IN_FLIGHT);
        self.status_after = in_flight.last().copied().filter(|_| in_flight.len() >= MAX_STATUS_IN_FLIGHT);
        self.outbox.status(self.machine.height(), in_flight);
    }
}

/// The subscription changes of one batch; a later one sees the earlier ones.
#[derive(Default)]
struct Subscriptions {
    rows: BTreeMap<SubscriptionKey, Option<Subscription>>,
    answers: Vec<SubscriptionAnswer>,
}

impl Subscriptions {
    fn decide(&mut self, reader: &Reader, request: SubscriptionRequest, number: u64) -> Result<(), DatabaseError> {
        let SubscriptionRequest { key, subscription, token_hash, last_used_before, done } = request;
        let current = match self.rows.get(&key) {
            Some(row) => row.clone(),
            None => reader.subscription(&key)?,
        };
        let yours = current.as_ref().is_none_or(|current| {
            token_hash == current.token_hash && last_used_before.is_none_or(|before| current.last_used < before)
        });
        let existed = current.is_some();
        let answer = if yours { Ok(SubscriptionDone { existed, number }) } else { Err(NotYours) };
        // Cancelling what is not there writes nothing, and renewing it does not revive it.
        if yours && (existed || (subscription.is_some() && last_used_before.is_none())) {
            self.rows.insert(key, subscription);
        }
        self.answers.push((done, answer));
        Ok(())
    }
}
