//! Who is told where a transaction stands.
//!
//! A wallet that sends a transaction watches it from then on: it gets an answer, and
//! another whenever the status changes. Watching costs memory, so a connection may watch
//! only so many; what is final is forgotten first, oldest first.

use std::collections::{HashMap, HashSet, VecDeque};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::consensus::{Progress, Rejection, Ticket, VoteKind};
use crate::db::{DatabaseError, Reader};
use crate::limits::{MAX_SETTLED_WATCHED_PER_CONNECTION, MAX_WATCHED_PER_CONNECTION};
use crate::net::{
    Connection, ConnectionId, FinalityProof, NetworkMessage, RejectionMessage, RequestId, TransactionStatus,
    TransactionStatusKind,
};
use crate::types::{DecidedBlock, Height, Txid};

/// A request that waits for its answer.
#[derive(Debug)]
struct Open {
    connection: Arc<Connection>,
    request_id: Option<RequestId>,
    /// Whether it watches its transaction; a mere question does not.
    watch: bool,
}

/// A connection that watches a transaction, and what it was told last.
#[derive(Debug)]
struct Watcher {
    connection: Arc<Connection>,
    told: Option<TransactionStatusKind>,
    /// Requests of the connection that watch it and have no answer yet.
    open: usize,
}

#[derive(Debug, Default)]
struct Watched {
    /// Not final yet.
    active: HashSet<Txid>,
    /// Final, and in no block yet.
    settled: HashSet<Txid>,
    /// In the order in which they became final; some may be watched no more.
    settled_order: VecDeque<Txid>,
    tickets: HashSet<u64>,
}

#[derive(Debug, Default)]
struct Watchers {
    tickets: HashMap<u64, Open>,
    by_txid: HashMap<Txid, Vec<Watcher>>,
    by_connection: HashMap<ConnectionId, Watched>,
}

/// The node's list of who wants to know what.
#[derive(Debug)]
pub(super) struct StatusHub {
    watchers: Mutex<Watchers>,
    next_ticket: AtomicU64,
    reader: Reader,
    /// The block that was read last.
    last_block: Mutex<Option<Arc<DecidedBlock>>>,
    members: u32,
}

impl StatusHub {
    pub(super) fn new(reader: Reader, members: usize) -> Self {
        Self {
            watchers: Mutex::default(),
            next_ticket: AtomicU64::new(1),
            reader,
            last_block: Mutex::default(),
            members: u32::try_from(members).unwrap_or(u32::MAX),
        }
    }

    fn watchers(&self) -> MutexGuard<'_, Watchers> {
        self.watchers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A status without counts: of what is refused, or not known.
    pub(super) fn plain(
        &self,
        txid: Txid,
        status: TransactionStatusKind,
        rejection: Option<RejectionMessage>,
    ) -> NetworkMessage {
        NetworkMessage::TransactionStatus(Box::new(TransactionStatus {
            txid,
            status,
            rejection,
            approvals: 0,
            commits: 0,
            total_masternodes: self.members,
            block_height: None,
            finality_proof: None,
        }))
    }

    /// Opens a request; with `watch`, the connection follows the transaction from now on.
    /// `None` if it follows too many that are not settled.
    pub(super) fn open(
        &self,
        connection: &Arc<Connection>,
        request_id: Option<RequestId>,
        watch: Option<Txid>,
    ) -> Option<Ticket> {
        let ticket = self.next_ticket.fetch_add(1, Ordering::Relaxed);
        let mut watchers = self.watchers();
        let watchers = &mut *watchers;
        let watched = watchers.by_connection.entry(connection.id()).or_default();
        if watched.tickets.len() + watched.active.len() >= MAX_WATCHED_PER_CONNECTION {
            return None;
        }
        watched.tickets.insert(ticket);
        if let Some(txid) = watch {
            let followers = watchers.by_txid.entry(txid).or_default();
            match followers.iter_mut().find(|watcher| watcher.connection.id() == connection.id()) {
                Some(watcher) => watcher.open += 1,
                None => {
                    watched.active.insert(txid);
                    followers.push(Watcher { connection: Arc::clone(connection), told: None, open: 1 });
                }
            }
        }
        let open = Open { connection: Arc::clone(connection), request_id, watch: watch.is_some() };
        watchers.tickets.insert(ticket, open);
        if connection.is_closed() {
            watchers.forget(connection.id());
        }
        Some(Ticket(ticket))
    }

    /// The request came to nothing; whoever asked was told by other means.
    pub(super) fn cancel(&self, ticket: Ticket, txid: Txid) {
        let mut watchers = self.watchers();
        if let Some(open) = watchers.take_ticket(ticket) {
            watchers.answered(&open, &txid);
        }
    }

    /// Answers a request.
    pub(super) fn reply(&self, ticket: Ticket, txid: Txid, progress: &Progress) {
        let status = self.status(txid, progress);
        let mut watchers = self.watchers();
        let Some(open) = watchers.take_ticket(ticket) else { return };
        match status.status {
            TransactionStatusKind::Rejected | TransactionStatusKind::Unknown => {}
            told => watchers.tell(open.connection.id(), &txid, told),
        }
        watchers.answered(&open, &txid);
        let Open { connection, request_id, .. } = open;
        connection.push(NetworkMessage::TransactionStatus(Box::new(status)), request_id);
    }

    /// Tells everybody who watches a transaction and does not know this yet.
    pub(super) fn progress(&self, txid: Txid, progress: &Progress) {
        let mut watchers = self.watchers();
        if !watchers.by_txid.contains_key(&txid) {
            return;
        }
        let status = self.status(txid, progress);
        let ignorant: Vec<Arc<Connection>> = watchers
            .by_txid
            .get(&txid)
            .into_iter()
            .flatten()
            .filter(|watcher| watcher.told != Some(status.status))
            .map(|watcher| Arc::clone(&watcher.connection))
            .collect();
        for connection in ignorant {
            watchers.tell(connection.id(), &txid, status.status);
            connection.push(NetworkMessage::TransactionStatus(Box::new(status.clone())), None);
        }
    }

    /// Whether somebody watches a transaction.
    pub(super) fn is_watched(&self, txid: &Txid) -> bool {
        self.watchers().by_txid.contains_key(txid)
    }

    /// A connection is gone, and so is everything that it watched.
    pub(super) fn forget(&self, connection: ConnectionId) {
        self.watchers().forget(connection);
    }

    /// What proves that a transaction is final: F(T), else the block that settled it.
    fn proof(&self, txid: &Txid, height: Option<Height>) -> Option<FinalityProof> {
        let read = || {
            let certificate = self.reader.certificate(txid, VoteKind::Commit)?;
            if let Some(certificate) = certificate.filter(|certificate| certificate.kind == VoteKind::Commit) {
                return Ok(Some(FinalityProof::Commit(certificate)));
            }
            let block = height.map(|height| self.block(height)).transpose()?.flatten();
            Ok::<_, DatabaseError>(block.map(FinalityProof::Block))
        };
        read().unwrap_or_else(|error| {
            tracing::error!(%txid, %error, "cannot read a finality proof");
            None
        })
    }

    /// A block. Whoever asks for one mostly asks for more of its transactions next, and all of
    /// them share it.
    fn block(&self, height: Height) -> Result<Option<Arc<DecidedBlock>>, DatabaseError> {
        let last = || self.last_block.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(block) = last().as_ref().filter(|block| block.block.height == height) {
            return Ok(Some(Arc::clone(block)));
        }
        let block = self.reader.block(height)?.map(Arc::new);
        last().clone_from(&block);
        Ok(block)
    }

    /// The wire form of where a transaction stands.
    pub(super) fn status(&self, txid: Txid, progress: &Progress) -> TransactionStatus {
        let mut status = TransactionStatus {
            txid,
            status: TransactionStatusKind::Unknown,
            rejection: None,
            approvals: 0,
            commits: 0,
            total_masternodes: self.members,
            block_height: None,
            finality_proof: None,
        };
        match progress {
            Progress::Pending { approvals, commits } => {
                status.status = TransactionStatusKind::Pending;
                (status.approvals, status.commits) = (*approvals, *commits);
            }
            Progress::Finalized { settled, certificate } => {
                status.status = TransactionStatusKind::Finalized;
                (status.approvals, status.commits) = (settled.votes, settled.votes);
                status.finality_proof = match certificate {
                    Some(certificate) => Some(FinalityProof::Commit(Arc::clone(certificate))),
                    None => self.proof(&txid, None),
                };
            }
            Progress::Confirmed { settled, height } => {
                status.status = TransactionStatusKind::Confirmed;
                (status.approvals, status.commits) = (settled.votes, settled.votes);
                status.block_height = Some(*height);
                status.finality_proof = self.proof(&txid, Some(*height));
            }
            Progress::Aborted(dead) => {
                status.status = TransactionStatusKind::Aborted;
                status.rejection = Some((&Rejection::Aborted { by: dead.by }).into());
            }
            Progress::Rejected(rejection) => {
                status.status = TransactionStatusKind::Rejected;
                status.rejection = Some(rejection.into());
            }
            Progress::Unknown => {}
        }
        status
    }
}

impl Watchers {
    fn take_ticket(&mut self, ticket: Ticket) -> Option<Open> {
        let open = self.tickets.remove(&ticket.0)?;
        if let Some(watched) = self.by_connection.get_mut(&open.connection.id()) {
            watched.tickets.remove(&ticket.0);
        }
        Some(open)
    }

    fn tell(&mut self, connection: ConnectionId, txid: &Txid, told: TransactionStatusKind) {
        let watcher =
            self.by_txid.get_mut(txid).and_then(|all| all.iter_mut().find(|w| w.connection.id() == connection));
        let Some(watcher) = watcher else { return };
        watcher.told = Some(told);
        let Some(watched) = self.by_connection.get_mut(&connection) else { return };
        match told {
            TransactionStatusKind::Finalized if watched.active.remove(txid) => {
                watched.settled.insert(*txid);
                watched.settled_order.push_back(*txid);
                let full = watched.settled_order.len() > MAX_SETTLED_WATCHED_PER_CONNECTION;
                if let Some(oldest) = full.then(|| watched.settled_order.pop_front()).flatten() {
                    self.unwatch(connection, &oldest);
                }
            }
            // Nothing more will ever happen to it.
            TransactionStatusKind::Confirmed | TransactionStatusKind::Aborted => self.unwatch(connection, txid),
            _ => {}
        }
    }

    fn unwatch(&mut self, connection: ConnectionId, txid: &Txid) {
        if let Some(followers) = self.by_txid.get_mut(txid) {
            followers.retain(|watcher| watcher.connection.id() != connection);
            if followers.is_empty() {
                self.by_txid.remove(txid);
            }
        }
        if let Some(watched) = self.by_connection.get_mut(&connection) {
            watched.active.remove(txid);
            watched.settled.remove(txid);
            while watched.settled_order.front().is_some_and(|oldest| !watched.settled.contains(oldest)) {
                watched.settled_order.pop_front();
            }
        }
    }

    /// A request has its answer. If it was the last one that watches and the connection was
    /// never told that the transaction is in, there is nothing to watch.
    fn answered(&mut self, open: &Open, txid: &Txid) {
        let connection = open.connection.id();
        let followers = self.by_txid.get_mut(txid).into_iter().flatten();
        let watcher = followers.into_iter().find(|watcher| watcher.connection.id() == connection);
        let Some(watcher) = watcher.filter(|_| open.watch) else { return };
        watcher.open = watcher.open.saturating_sub(1);
        if watcher.open == 0 && watcher.told.is_none() {
            self.unwatch(connection, txid);
        }
    }

    fn forget(&mut self, connection: ConnectionId) {
        let Some(watched) = self.by_connection.remove(&connection) else { return };
        for txid in watched.active.iter().chain(&watched.settled) {
            self.unwatch(connection, txid);
        }
        for ticket in watched.tickets {
            self.tickets.remove(&ticket);
        }
    }
}
