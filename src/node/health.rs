//! How the ledger is doing, for whoever wants to know.

use std::sync::atomic::{AtomicBool, AtomicI64, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use tokio::sync::watch;

use super::door::Door;
use super::lately::Lately;
use crate::consensus::{FenceState, Voting};
use crate::db::RenewalState;
use crate::types::{Height, Txid};

/// So many of the transactions that were settled last are known without looking into the database.
const SETTLED_LATELY: usize = 8_192;

/// What the rest of the node may know of the ledger at any time.
#[derive(Debug)]
pub struct LedgerHealth {
    pub(super) in_flight: AtomicUsize,
    pub(super) door: Door,
    settled: Mutex<Lately>,
    pub(super) commits: AtomicU64,
    pub(super) finalized: AtomicU64,
    pub(super) votes: AtomicU64,
    pub(super) commit_micros: AtomicU64,
    pub(super) last_commit: AtomicI64,
    pub(super) equivocations: AtomicU64,
    pub(super) unconfirmed: AtomicUsize,
    pub(super) height: AtomicU64,
    pub(super) goal: AtomicU64,
    pub(super) behind: AtomicBool,
    pub(super) renewal: Mutex<RenewalState>,
    pub(super) voting: Mutex<Voting>,
    pub(super) fence: Mutex<Option<(FenceState, u64)>>,
    pub(super) stopped: watch::Sender<Option<Result<(), String>>>,
}

impl LedgerHealth {
    pub(super) fn new(voting: Voting) -> Self {
        Self {
            in_flight: AtomicUsize::new(0),
            door: Door::new(Instant::now()),
            settled: Mutex::new(Lately::new(SETTLED_LATELY)),
            commits: AtomicU64::new(0),
            finalized: AtomicU64::new(0),
            votes: AtomicU64::new(0),
            commit_micros: AtomicU64::new(0),
            last_commit: AtomicI64::new(0),
            equivocations: AtomicU64::new(0),
            unconfirmed: AtomicUsize::new(0),
            height: AtomicU64::new(0),
            goal: AtomicU64::new(0),
            behind: AtomicBool::new(voting == Voting::Observer),
            renewal: Mutex::new(RenewalState::default()),
            voting: Mutex::new(voting),
            fence: Mutex::new(None),
            stopped: watch::Sender::new(None),
        }
    }

    /// Whether this node votes.
    pub fn voting(&self) -> Voting {
        *self.voting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The fence behind which a member votes that lost votes, and what is behind it.
    pub fn fence(&self) -> Option<(FenceState, u64)> {
        *self.fence.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What has been done about the size of the database.
    pub fn renewal(&self) -> RenewalState {
        *self.renewal.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Transactions in flight here.
    pub fn in_flight(&self) -> usize {
        self.in_flight.load(Ordering::Relaxed)
    }

    /// The height of this node's chain.
    pub fn height(&self) -> Height {
        self.height.load(Ordering::Relaxed)
    }

    /// The height up to which there is a chain, as far as members say.
    pub fn goal(&self) -> Height {
        self.goal.load(Ordering::Relaxed)
    }

    /// Whether blocks are missing here, as far as this node knows.
    pub fn is_behind(&self) -> bool {
        self.behind.load(Ordering::Relaxed)
    }

    /// These have been settled here, or will be by the commit at hand.
    pub(super) fn settle<'a>(&self, txids: impl Iterator<Item = &'a Txid>) {
        let mut settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        txids.for_each(|txid| settled.insert(*txid.as_bytes()));
    }

    /// Whether all of them were settled here lately. Nothing may be told anybody of it: the
    /// commit that says so may still be on its way.
    pub(super) fn are_settled<'a>(&self, mut txids: impl Iterator<Item = &'a Txid>) -> bool {
        let settled = self.settled.lock().unwrap_or_else(PoisonError::into_inner);
        txids.all(|txid| settled.contains(txid.as_bytes()))
    }

    /// Something without which the node must not go on has failed.
    pub(super) fn fail(&self, reason: String) {
        tracing::error!(%reason, "the node has to stop");
        self.stopped.send_if_modified(|stopped| {
            let first = stopped.is_none();
            if first {
                *stopped = Some(Err(reason));
            }
            first
        });
    }

    /// Waits until the ledger thread has ended, well (`Ok`) or because it had to (`Err`).
    pub async fn stopped(&self) -> Result<(), String> {
        let mut stopped = self.stopped.subscribe();
        match stopped.wait_for(Option::is_some).await {
            Ok(reason) => reason.clone().unwrap_or(Ok(())),
            Err(_) => Err("the ledger thread vanished".into()),
        }
    }
}
