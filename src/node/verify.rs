//! The verify pool: signatures are checked on all cores, many at once, before anything
//! reaches the ledger. One that comes alone is checked where it comes from the socket, which
//! spares it the way to another thread.
//!
//! Everything in it, and in the ledger's queue behind it, holds a permit. Wallets and
//! each member have permits of their own: when the wallets' are used up the next payment is
//! answered `Busy`, and the votes of members still get through; a member that floods waits
//! for itself.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::Instant;

use crossbeam_channel::{Receiver, Sender};
use tokio::sync::Semaphore;

use super::door::Place;
use super::health::LedgerHealth;
use super::input::{Input, Inputs, Work};
use super::lately::Lately;
use super::rush::Rush;
use crate::consensus::{Event, Signable, Source, Verified};
use crate::limits::{LEDGER_QUEUE, VERIFY_APART, VERIFY_BATCH, VERIFY_QUEUE};
use crate::net::{Connection, ErrorCode, ErrorMessage, NetworkMessage};
use crate::types::Transaction;

/// So many of the transactions that were checked last are not checked again.
const REMEMBERED: usize = 32_768;

/// Something to check, and for whom.
struct Job {
    value: Signable,
    source: Source,
    connection: Arc<Connection>,
    place: Place,
}

/// There is no room; nothing was done.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the node is busy")]
pub(super) struct Busy;

/// The pool's entrance.
#[derive(Debug)]
pub(super) struct VerifyPool {
    wallet_jobs: Sender<Job>,
    member_jobs: Sender<Job>,
    wallets: Arc<Semaphore>,
    /// By member: its share of the queue.
    members: Vec<Arc<Semaphore>>,
    desk: Arc<Desk>,
    health: Arc<LedgerHealth>,
    workers: Mutex<Vec<JoinHandle<()>>>,
}

impl VerifyPool {
    /// Starts a worker for each core; what they verified goes to `ledger`.
    pub(super) fn start(ledger: &Inputs, members: usize, health: Arc<LedgerHealth>) -> std::io::Result<Self> {
        // Never full: each job holds a permit, and there are no more of those.
        let (wallet_jobs, from_wallets) = crossbeam_channel::bounded(LEDGER_QUEUE);
        let (member_jobs, from_members) = crossbeam_channel::bounded(VERIFY_QUEUE + members);
        let seen = Mutex::new(Lately::new(REMEMBERED));
        let desk = Arc::new(Desk { ledger: ledger.clone(), seen, rush: Mutex::default() });
        let cores = std::thread::available_parallelism().map_or(2, usize::from);
        let start = |i: usize| {
            let jobs = Jobs { members: from_members.clone(), wallets: from_wallets.clone() };
            let desk = Arc::clone(&desk);
            std::thread::Builder::new().name(format!("verify-{i}")).spawn(move || work(&jobs, &desk))
        };
        let share = (VERIFY_QUEUE / members.max(1)).max(1);
        let workers = (0..cores).map(start).collect::<std::io::Result<_>>()?;
        Ok(Self {
            wallet_jobs,
            member_jobs,
            wallets: Arc::new(Semaphore::new(LEDGER_QUEUE)),
            members: (0..members).map(|_| Arc::new(Semaphore::new(share))).collect(),
            desk,
            health,
            workers: Mutex::new(workers),
        })
    }

    /// Whether there is time for one more transaction of a wallet.
    pub(super) fn lets_in(&self) -> bool {
        self.health.door.lets_in(self.waiting(), Instant::now())
    }

    /// Checks a wallet's transaction, if there is room now.
    pub(super) fn submit(&self, value: Signable, source: Source, connection: &Arc<Connection>) -> Result<(), Busy> {
        if !self.lets_in() {
            return Err(Busy);
        }
        let place = self.place()?;
        self.take(Job { value, source, connection: Arc::clone(connection), place }, &self.wallet_jobs)
    }

    /// Checks what a member sent, as soon as its share has room.
    pub(super) async fn submit_for_member(
        &self,
        value: Signable,
        source: Source,
        connection: &Arc<Connection>,
    ) -> Result<(), Busy> {
        let share = connection.member().and_then(|member| self.members.get(member.get())).ok_or(Busy)?;
        let place = Place::of_member(Arc::clone(share).acquire_owned().await.map_err(|_| Busy)?);
        self.take(Job { value, source, connection: Arc::clone(connection), place }, &self.member_jobs)
    }

    fn take(&self, job: Job, jobs: &Sender<Job>) -> Result<(), Busy> {
        if matches!(job.value, Signable::Transaction(_)) {
            self.desk.rush(|rush| rush.note(1, Instant::now()));
        }
        if is_little(&job.value) && self.is_idle() {
            return self.desk.check(vec![job]).map_err(|LedgerGone| Busy);
        }
        jobs.try_send(job).map_err(|_| Busy)
    }

    /// Whether nothing waits to be checked, and nothing is about to come with which it could be
    /// checked together.
    fn is_idle(&self) -> bool {
        self.member_jobs.is_empty() && self.wallet_jobs.is_empty() && !self.desk.rush(|rush| rush.is_on(Instant::now()))
    }

    /// Hands the ledger what a member sent and what it checks itself, as soon as the
    /// member's share has room.
    pub(super) async fn pass_for_member(&self, event: Event, connection: &Connection) -> Result<(), Busy> {
        let share = connection.member().and_then(|member| self.members.get(member.get())).ok_or(Busy)?;
        let place = Place::of_member(Arc::clone(share).acquire_owned().await.map_err(|_| Busy)?);
        let queue = match event {
            Event::Consensus { .. } => &self.desk.ledger.agreement,
            _ => &self.desk.ledger.members,
        };
        queue.send(Work { input: Input::Event(event), place: Some(place) }).map_err(|_| Busy)
    }

    /// A wallet's place in the ledger's queue, for what needs no check.
    pub(super) fn place(&self) -> Result<Place, Busy> {
        if self.waiting() == 0 {
            self.health.door.rest(Instant::now());
        }
        Arc::clone(&self.wallets).try_acquire_owned().map(Place::of_wallet).map_err(|_| Busy)
    }

    /// How many of wallets' places are taken.
    fn waiting(&self) -> usize {
        LEDGER_QUEUE.saturating_sub(self.wallets.available_permits())
    }

    /// Lets the workers end; what is queued is dropped with its connections' hopes.
    pub(super) fn stop(&self) {
        self.wallets.close();
        self.members.iter().for_each(|member| member.close());
        self.workers.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
}

/// Whether checking it takes no longer than a task may keep a thread of the runtime: one signature
/// or two, some 50 us each.
fn is_little(value: &Signable) -> bool {
    match value {
        Signable::Transaction(signed) => signed.transaction().inputs().len() <= 2,
        Signable::Votes(batch) => batch.wire().votes.len() <= 8,
        Signable::Certificate(_) | Signable::Blocks(_) => false,
    }
}

/// A transaction with its keys and signatures in one hash.
fn witness_hash(transaction: &Transaction) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    hasher.update(transaction.txid().as_bytes());
    for input in transaction.inputs() {
        hasher.update(input.public_key.as_bytes()).update(input.signature.as_bytes());
    }
    *hasher.finalize().as_bytes()
}

/// Where the workers take their jobs from: members' first.
struct Jobs {
    members: Receiver<Job>,
    wallets: Receiver<Job>,
}

impl Jobs {
    fn next(&self) -> Option<Job> {
        crossbeam_channel::select_biased! {
            recv(self.members) -> job => job.ok(),
            recv(self.wallets) -> job => job.ok(),
        }
    }
}

fn work(jobs: &Jobs, desk: &Desk) {
    loop {
        if desk.rush(|rush| rush.is_on(Instant::now())) {
            std::thread::sleep(VERIFY_APART);
        }
        let Some(first) = jobs.next() else { return };
        let more = jobs.members.try_iter().chain(jobs.wallets.try_iter()).take(VERIFY_BATCH - 1);
        let batch = std::iter::once(first).chain(more).collect();
        if desk.check(batch).is_err() {
            return;
        }
    }
}

/// The ledger is gone.
struct LedgerGone;

/// What all who check share.
#[derive(Debug)]
struct Desk {
    ledger: Inputs,
    /// The transactions that were checked: members send each other the same ones, and each
    /// signature is worth checking once.
    seen: Mutex<Lately>,
    rush: Mutex<Rush>,
}

impl Desk {
    fn rush<T>(&self, look: impl FnOnce(&mut Rush) -> T) -> T {
        look(&mut self.rush.lock().unwrap_or_else(PoisonError::into_inner))
    }

    fn seen(&self) -> MutexGuard<'_, Lately> {
        self.seen.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks many at once, and hands the ledger what holds.
    fn check(&self, batch: Vec<Job>) -> Result<(), LedgerGone> {
        let forward = |input, connection: &Connection, place| {
            let queue = if connection.member().is_some() { &self.ledger.members } else { &self.ledger.wallets };
            queue.send(Work { input, place: Some(place) }).map_err(|_| LedgerGone)
        };
        let mut unknown = Vec::with_capacity(batch.len());
        for job in batch {
            let known = match &job.value {
                Signable::Transaction(signed) => {
                    let key = witness_hash(signed.transaction());
                    self.seen().contains(&key)
                }
                Signable::Votes(_) | Signable::Certificate(_) | Signable::Blocks(_) => false,
            };
            if known {
                let event = Verified::made_here(job.value).into_event(job.source);
                event.map_or(Ok(()), |event| forward(Input::Event(event), &job.connection, job.place))?;
            } else {
                unknown.push(job);
            }
        }
        let (values, rest): (Vec<_>, Vec<_>) =
            unknown.into_iter().map(|job| (job.value, (job.source, job.connection, job.place))).unzip();
        for (checked, (source, connection, place)) in Verified::check_all(values).into_iter().zip(rest) {
            match checked {
                Ok(verified) => {
                    if let Signable::Transaction(signed) = verified.get() {
                        let key = witness_hash(signed.transaction());
                        self.seen().insert(key);
                    }
                    let event = verified.into_event(source);
                    event.map_or(Ok(()), |event| forward(Input::Event(event), &connection, place))?;
                }
                Err(value) => {
                    connection.count_bad_signature();
                    match (value, source) {
                        (Signable::Blocks(_), source) => {
                            let error = ErrorMessage::new(ErrorCode::BadSignature, "a block's certificate is forged");
                            connection.close_with(&error);
                            if let Source::Member(member) = source {
                                forward(Input::Event(Event::ForgedBlocks(member)), &connection, place)?;
                            }
                        }
                        (Signable::Transaction(signed), Source::Wallet(ticket)) => {
                            let transaction = signed.transaction().clone();
                            forward(Input::Unsigned { transaction, ticket }, &connection, place)?;
                        }
                        _ => {
                            let error = ErrorMessage::new(ErrorCode::BadSignature, "a signature does not verify");
                            connection.push(NetworkMessage::Error(error), None);
                        }
                    }
                }
            }
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::super::input::queues;
    use super::*;
    use crate::consensus::{Committee, Vote, VoteKind, Voting, sign_batch};
    use crate::db::samples;
    use crate::net::{Mailbox, PeerConfig, PeerManager};
    use crate::types::{Network, Txid};

    /// What comes alone is with the ledger when whoever read it from the socket goes on.
    #[test]
    fn one_signature_does_not_wait_for_a_worker() {
        let committee = Arc::new(Committee::of_genesis(&samples::genesis()));
        let (inputs, queues) = queues();
        let pool = VerifyPool::start(&inputs, 1, Arc::new(LedgerHealth::new(Voting::Observer))).unwrap();
        let peers = PeerManager::new(PeerConfig::new(Network::Devnet, Arc::clone(&committee), None));
        let mailbox = Mailbox::open(&peers, ([127, 0, 0, 1], 0).into());
        let batch = |votes: u8| {
            let vote = |n| Vote { kind: VoteKind::Approve, txid: Txid::from_bytes([n; 32]) };
            Signable::Votes(
                sign_batch(&samples::key(), &committee, (0..votes).map(vote).collect()).unwrap().into_inner(),
            )
        };
        for _ in 0..100 {
            pool.submit(batch(1), Source::Answer, mailbox.connection()).unwrap();
            assert_eq!(queues.wallets.try_iter().count(), 1);
        }
        // Many are worth a worker, who takes along what else has come.
        pool.submit(batch(200), Source::Answer, mailbox.connection()).unwrap();
        assert!(queues.wallets.recv().is_ok());
    }
}
