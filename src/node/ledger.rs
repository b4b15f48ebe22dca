//! The ledger thread: the one writer.
//!
//! It drains what has come, lets the machine handle it in order, commits the changes of
//! the whole batch at once, and only then lets anything leave, but for what wallets said
//! themselves. While a commit syncs, the next batch gathers: group commit without a delay when
//! idle; [`super::intake`] says when it waits for more.
//!
//! The first error stops the node: a batch that could not be made durable never happened,
//! and a restart recovers from the database.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use tokio::sync::oneshot;

use super::clock::{now_at, unix_now};
use super::door::Place;
use super::health::LedgerHealth;
use super::input::{Input, NotYours, Queues, SubscriptionDone, SubscriptionRequest, Work};
use super::intake::Intake;
use super::outbox::{Outbox, Outward};
use crate::consensus::{
    Action, Ballot, Committee, Event, Fault, Machine, MemberBatch, Now, Step, Suspension, Verified, Vote, Voting,
    sign_batch,
};
use crate::db::{
    CommitBatch, Database, DatabaseError, Durable, LedgerView, PruneBatch, Reader, Subscription, SubscriptionKey,
};
use crate::limits::{MAX_STATUS_IN_FLIGHT, MAX_VOTES_PER_BATCH, STATUS_EVERY, TICK};
use crate::types::{SecretKey, Txid};

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

/// What the thread will own.
#[derive(Debug)]
pub(super) struct Waiting {
    pub(super) database: Database,
    pub(super) machine: Machine,
    pub(super) key: Option<SecretKey>,
    pub(super) ballot: Option<Ballot>,
    pub(super) queues: Queues,
}

pub(super) struct Ledger {
    database: Database,
    reader: Reader,
    machine: Machine,
    /// Whether it votes, as far as the database knows.
    voting: Voting,
    key: Option<SecretKey>,
    /// What the agreement on blocks begins with, until it has begun.
    ballot: Option<Ballot>,
    /// The last batch left something to do at once.
    more: bool,
    committee: Arc<Committee>,
    intake: Intake,
    outbox: Outbox,
    health: Arc<LedgerHealth>,
    /// Batches that were signed for the last commit's votes and are not counted yet.
    own_batches: Vec<Arc<Verified<MemberBatch>>>,
    began: Instant,
    last_tick: Instant,
    last_status: Instant,
    status_due: bool,
    status_after: Option<Txid>,
    subscription_requests: u64,
}

impl Ledger {
    /// The ledger of what was opened; what may leave goes to `outbox`.
    pub(super) fn new(waiting: Waiting, committee: Arc<Committee>, health: Arc<LedgerHealth>, outbox: Outbox) -> Self {
        let Waiting { database, machine, key, ballot, queues } = waiting;
        Self {
            reader: database.reader(),
            voting: machine.voting(),
            database,
            machine,
            key,
            ballot,
            more: false,
            committee,
            intake: Intake::new(queues, Instant::now()),
            outbox,
            health,
            own_batches: Vec::new(),
            began: Instant::now(),
            last_tick: Instant::now(),
            last_status: Instant::now(),
            status_due: false,
            status_after: None,
            subscription_requests: 0,
        }
    }

    /// Begins the thread, which ends at [`Input::Stop`] or at the first error.
    pub(super) fn spawn(self) -> std::io::Result<JoinHandle<()>> {
        let health = Arc::clone(&self.health);
        std::thread::Builder::new().name("ledger".into()).spawn(move || {
            let mut ledger = self;
            let outcome = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| ledger.run()));
            let reason = match outcome {
                Ok(Ok(())) => Ok(()),
                Ok(Err(stop)) => Err(stop.to_string()),
                Err(_) => Err("the ledger thread panicked".into()),
            };
            if let Err(reason) = &reason {
                tracing::error!(%reason, "the ledger has stopped; restart the node to recover");
                // It is said before the database is closed, which may never end now.
                health.stopped.send_replace(Some(Err(reason.clone())));
            }
            drop(ledger);
            health.stopped.send_replace(Some(reason));
        })
    }

    fn run(&mut self) -> Result<(), Stop> {
        self.own_batches = self.sign(self.machine.own_votes());
        loop {
            let patience = if self.own_batches.is_empty() && !self.more { self.until_tick() } else { Duration::ZERO };
            let work = self.intake.gather(patience);
            if self.process(work)? {
                return Ok(());
            }
            self.tend()?;
        }
    }

    fn now(&self) -> Now {
        now_at(u64::try_from(self.began.elapsed().as_millis()).unwrap_or(u64::MAX))
    }

    fn until_tick(&self) -> Duration {
        TICK.saturating_sub(self.last_tick.elapsed())
    }

    /// One batch: decide, commit, and let it leave. Whether that was the last.
    fn process(&mut self, mut work: Vec<Work>) -> Result<bool, Stop> {
        let view = self.database.view();
        let mut step = Step::new(self.now(), &view);
        let mut aside = Aside::after(self.subscription_requests);
        if let Some(ballot) = self.ballot.take() {
            self.machine.take_part(&mut step, ballot);
        }
        for batch in std::mem::take(&mut self.own_batches) {
            self.machine.count_own(&mut step, &batch);
        }
        loop {
            aside.handle(work, &mut self.machine, &mut step, &self.reader)?;
            if self.last_tick.elapsed() >= TICK {
                self.last_tick = Instant::now();
                self.machine.handle(&mut step, Event::Tick);
            }
            self.more = self.machine.advance(&mut step);
            self.health.settle(step.changes.finalized.keys());
            let is_urgent = self.more || aside.is_urgent() || self.machine.voting() != self.voting;
            if is_urgent || step.fault.is_some() || !self.outbox.nobody_waits(&step.changes, &step.actions) {
                break;
            }
            // Nobody would be told of any of this: it goes with the next commit, if one comes soon.
            work = self.intake.gather_more(Instant::now());
            if work.is_empty() {
                break;
            }
            step.go_on(self.now());
        }
        let Step { changes, actions, fault, .. } = step;
        view.finish()?;
        if let Some(fault) = fault {
            return Err(Stop::Fault(Box::new(fault)));
        }
        self.status_due |= aside.connected;
        self.subscription_requests = aside.subscriptions.last;
        let suspension = self.new_suspension();
        // A body is its wallet's word, not this node's: it goes on at once, so that the members
        // write it down beside this one and not after it.
        let (bodies, actions): (Vec<_>, _) =
            actions.into_iter().partition(|action| matches!(action, Action::Broadcast(_)));
        self.outbox.deliver(bodies.into_iter().map(Outward::Action).collect());
        let outgoing = Outgoing { actions, votes: changes.votes.clone(), subscriptions: aside.subscriptions.answers };
        let finalized = changes.finalized.len();
        let new_payments = changes.in_flight.values().flatten().count();
        for (hash, decided) in &changes.blocks {
            let (block, round) = (&decided.block, decided.certificate.round);
            let (transactions, aborts) = (block.transactions.len(), block.aborts.len());
            tracing::info!(height = block.height, %hash, round, transactions, aborts, "block");
        }
        let (subscriptions, prune) = (aside.subscriptions.rows, aside.prune);
        let batch = CommitBatch { changes, subscriptions, suspension, prune, ..CommitBatch::default() };
        let committing = (!batch.is_empty()).then(Instant::now);
        if let Some(now) = committing {
            self.intake.begin_commit(new_payments, now);
        }
        let durable = self.database.commit(batch, outgoing)?;
        self.health.door.serve(self.machine.may_wait(), &aside.places, Instant::now());
        drop(aside.places);
        if let Some(pruned) = aside.pruned {
            // The node may be stopping; what was pruned is durable all the same.
            let _told = pruned.send(()).is_ok();
        }
        self.measure(committing.map(|began| began.elapsed()), finalized);
        self.let_out(durable);
        self.say_status();
        Ok(aside.stopping)
    }

    /// Between two commits: the database's own house, if there is time for it.
    fn tend(&mut self) -> Result<(), DatabaseError> {
        let now = Instant::now();
        self.database.tend(self.intake.is_quiet(now))?;
        if !self.intake.is_rush(now) {
            self.database.write_ahead()?;
        }
        *self.health.renewal.lock().unwrap_or_else(PoisonError::into_inner) = self.database.renewal_state();
        Ok(())
    }

    /// A reason not to vote that is not in the database yet.
    fn new_suspension(&mut self) -> Option<Suspension> {
        let now = self.machine.voting();
        if std::mem::replace(&mut self.voting, now) == now {
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
            Action::ResendVotes { to, votes } => Outward::Batches { to, batches: self.sign(votes) },
            action => Outward::Action(action),
        });
        self.outbox.deliver(actions.collect());
        self.outbox.deliver(vec![Outward::Batches { to: None, batches: batches.clone() }]);
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

/// What a batch brings that is not the machine's.
#[derive(Default)]
struct Aside {
    subscriptions: Subscriptions,
    prune: Option<PruneBatch>,
    /// Told when that is done.
    pruned: Option<oneshot::Sender<()>>,
    /// Places in the queues, given back after the commit.
    places: Vec<Place>,
    /// A member has come: it is told at once what is in flight here.
    connected: bool,
    stopping: bool,
}

impl Aside {
    /// Nothing yet; so many subscriptions have been asked for before.
    fn after(subscription_requests: u64) -> Self {
        let subscriptions = Subscriptions { last: subscription_requests, ..Subscriptions::default() };
        Self { subscriptions, ..Self::default() }
    }

    /// Gives the machine what is for it, in order, and keeps the rest.
    fn handle(
        &mut self,
        work: Vec<Work>,
        machine: &mut Machine,
        step: &mut Step<'_, LedgerView<'_>>,
        reader: &Reader,
    ) -> Result<(), DatabaseError> {
        for Work { input, place } in work {
            self.places.extend(place);
            match input {
                Input::Event(event) => {
                    self.connected |= matches!(event, Event::Connected(_));
                    machine.handle(step, event);
                }
                Input::Unsigned { transaction, ticket } => machine.refuse_unsigned(step, ticket, &transaction),
                Input::Query { txid, ticket } => machine.query(step, ticket, txid),
                Input::Subscription(request) => self.subscriptions.decide(reader, request)?,
                Input::Prune { batch, done } => {
                    self.prune = Some(batch);
                    self.pruned = Some(done);
                }
                Input::Stop => self.stopping = true,
            }
        }
        Ok(())
    }

    /// Whether somebody waits for any of it.
    fn is_urgent(&self) -> bool {
        !self.subscriptions.answers.is_empty() || self.prune.is_some() || self.connected || self.stopping
    }
}

/// The subscription changes of one batch; a later one sees the earlier ones.
#[derive(Default)]
struct Subscriptions {
    rows: BTreeMap<SubscriptionKey, Option<Subscription>>,
    answers: Vec<SubscriptionAnswer>,
    /// The number of the last request, of all since the start.
    last: u64,
}

impl Subscriptions {
    fn decide(&mut self, reader: &Reader, request: SubscriptionRequest) -> Result<(), DatabaseError> {
        self.last += 1;
        let SubscriptionRequest { key, subscription, token_hash, last_used_before, done } = request;
        let current = match self.rows.get(&key) {
            Some(row) => row.clone(),
            None => reader.subscription(&key)?,
        };
        let yours = current.as_ref().is_none_or(|current| {
            token_hash == current.token_hash && last_used_before.is_none_or(|before| current.last_used < before)
        });
        let existed = current.is_some();
        let answer = if yours { Ok(SubscriptionDone { existed, number: self.last }) } else { Err(NotYours) };
        // Cancelling what is not there writes nothing, and renewing it does not revive it.
        if yours && (existed || (subscription.is_some() && last_used_before.is_none())) {
            self.rows.insert(key, subscription);
        }
        self.answers.push((done, answer));
        Ok(())
    }
}
