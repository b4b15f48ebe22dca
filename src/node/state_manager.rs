//! The ledger as the rest of the node holds it: opened and recovered, started, stopped.

use std::path::PathBuf;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use super::clock::now_at;
use super::health::LedgerHealth;
use super::input::{Input, Inputs, Work, queues};
use super::ledger::{Ledger, Waiting};
use super::outbox::Outbox;
use crate::consensus::{Ballot, Committee, Machine, Rules};
use crate::db::{ChangeEvents, Database, DatabaseError, Opened, Owner, Reader};
use crate::types::{Genesis, Height, SecretKey};

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
    /// Bytes on disk from which on a compact copy takes the database's place when the node
    /// has little to do; `None` never does that.
    pub compact_above_bytes: Option<u64>,
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
        let Opened { mut database, recovered } = Database::open(&config.data_dir, owner, config.cache_bytes)?;
        if let Some(bytes) = config.compact_above_bytes {
            database.renew_above(&config.data_dir, bytes, config.cache_bytes);
        }
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
        let (inputs, queues) = queues();
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
        own.is_none_or(|own| self.committee.has_quorum_without(own))
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

    /// Hands something small to the ledger that holds no place; waits if its queue is full.
    pub(super) fn tell(&self, input: Input) {
        if self.inputs.members.send(Work { input, place: None }).is_err() {
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
        let Some(waiting) = waiting else { return Ok(()) };
        let ledger = Ledger::new(waiting, Arc::clone(&self.committee), Arc::clone(&self.health), outbox);
        let thread = ledger.spawn()?;
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
