//! The feed: wallets hear of every change of their coins, in order, without loss.
//!
//! The change log is the truth and a subscription is a cursor on it. sled's subscriber
//! says that the log grew; once that is durable, the feed reads the new entries once and
//! hands them to the live subscriptions that they concern. A subscription whose wallet
//! is slow falls behind: its small queue overflows, it is live no more, and it goes on
//! reading the log at its own pace until it has caught up. So a slow wallet costs nobody
//! memory, and nothing is ever skipped.

use std::collections::{BTreeSet, HashMap, HashSet};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::sync::{Notify, mpsc, watch};

use super::touched::{Touched, TouchedBlocks};
use crate::db::{ChangeEvents, DatabaseError, LogEntry, Reader, Subscription, SubscriptionKey};
use crate::limits::{FEED_QUEUE, FEED_READ};
use crate::net::{
    BlockNotification, Closed, Connection, ConnectionId, ErrorCode, ErrorMessage, NetworkMessage,
    UTXOStateNotification, UTXOStateNotificationMessage, encode,
};
use crate::types::{Address, OutPoint};

/// A change with its number; its JSON is made once, by whoever needs it first.
/// Of a block each subscription hears its own part.
#[derive(Debug)]
struct Change {
    sequence: u64,
    entry: LogEntry,
    touched: Option<Arc<Touched>>,
    json: OnceLock<Bytes>,
}

impl Change {
    fn json(&self, originator: &str, filter: &Filter) -> Bytes {
        match &self.touched {
            Some(touched) => encode(&notification(self.sequence, &self.entry, originator, touched.of(filter)), None),
            None => {
                let shared = || encode(&notification(self.sequence, &self.entry, originator, Vec::new()), None);
                self.json.get_or_init(shared).clone()
            }
        }
    }
}

fn notification(
    sequence: u64,
    entry: &LogEntry,
    originator: &str,
    transactions: Vec<crate::types::Txid>,
) -> NetworkMessage {
    match *entry {
        LogEntry::Transition(step) => NetworkMessage::UTXOStateNotification(UTXOStateNotificationMessage {
            sequence,
            notification: UTXOStateNotification {
                outpoint: step.outpoint,
                output: step.output,
                old_state: step.old_state,
                new_state: step.new_state,
                timestamp: step.timestamp,
                originator: originator.to_owned(),
            },
        }),
        LogEntry::Block { height, block_hash, timestamp_ms } => NetworkMessage::BlockNotification(BlockNotification {
            sequence,
            height,
            block_hash,
            timestamp_ms,
            transactions,
        }),
    }
}

/// What a subscription follows.
#[derive(Debug)]
pub(super) struct Filter {
    addresses: HashSet<Address>,
    outpoints: HashSet<OutPoint>,
}

impl Filter {
    pub(super) fn of(subscription: &Subscription) -> Self {
        Self {
            addresses: subscription.addresses.iter().copied().collect(),
            outpoints: subscription.outpoints.iter().copied().collect(),
        }
    }

    pub(super) fn addresses(&self) -> impl Iterator<Item = &Address> {
        self.addresses.iter()
    }

    pub(super) fn outpoints(&self) -> impl Iterator<Item = &OutPoint> {
        self.outpoints.iter()
    }

    fn matches(&self, entry: &LogEntry) -> bool {
        match entry {
            LogEntry::Transition(step) => {
                self.addresses.contains(&step.output.address) || self.outpoints.contains(&step.outpoint)
            }
            LogEntry::Block { .. } => true,
        }
    }
}

/// A subscription that has caught up: the feed pushes into its queue.
#[derive(Debug)]
struct Live {
    session: u64,
    filter: Arc<Filter>,
    queue: mpsc::Sender<Arc<Change>>,
}

/// A running subscription of a connection. Its number is that of the ledger's request
/// that it came from, so of two the later one is known, whatever order they come in.
#[derive(Debug)]
struct Session {
    number: u64,
    token_hash: [u8; 32],
    connection: ConnectionId,
    filters: usize,
    cancel: watch::Sender<bool>,
}

/// The right to begin a session, until somebody with a later one comes.
#[derive(Debug)]
pub(super) struct Claim {
    key: SubscriptionKey,
    number: u64,
    cancelled: watch::Receiver<bool>,
}

impl Claim {
    /// Waits until a later claim or a cancellation has taken it away.
    pub(super) async fn lost(&mut self) {
        // A sender that is gone has been taken away too.
        let _lost = self.cancelled.wait_for(|cancelled| *cancelled).await.is_ok();
    }
}

#[derive(Debug, Default)]
struct FeedState {
    /// Every live subscription has been given all up to here.
    position: u64,
    live: HashMap<SubscriptionKey, Live>,
    by_address: HashMap<Address, BTreeSet<SubscriptionKey>>,
    by_outpoint: HashMap<OutPoint, BTreeSet<SubscriptionKey>>,
    sessions: HashMap<SubscriptionKey, Session>,
}

/// The feed of one node.
#[derive(Debug)]
pub(super) struct Feed {
    reader: Reader,
    originator: String,
    state: Mutex<FeedState>,
    touched: Arc<TouchedBlocks>,
    /// The state's position, for those who must not wait for it.
    published: AtomicU64,
    woken: Notify,
    stopping: AtomicBool,
    delivered: AtomicU64,
    /// Durable subscriptions, connected or not.
    pub(super) stored: AtomicUsize,
}

impl Feed {
    pub(super) fn new(reader: Reader, originator: String) -> Self {
        let position = reader.durable_head().sequence;
        let state = FeedState { position, ..FeedState::default() };
        let stored = reader.subscriptions().count();
        Self {
            reader,
            originator,
            state: Mutex::new(state),
            touched: Arc::default(),
            published: AtomicU64::new(position),
            woken: Notify::new(),
            stopping: AtomicBool::new(false),
            delivered: AtomicU64::new(0),
            stored: AtomicUsize::new(stored),
        }
    }

    /// Notifications that were handed to sockets.
    pub(super) fn delivered(&self) -> u64 {
        self.delivered.load(Ordering::Relaxed)
    }

    /// Subscriptions whose wallet is connected.
    pub(super) fn connected(&self) -> usize {
        self.state().sessions.len()
    }

    fn state(&self) -> MutexGuard<'_, FeedState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Drains sled's subscriber, for ever. It waits for nothing else: an event proves
    /// nothing, and a full buffer would stop the writer.
    pub(super) fn drain_events(self: &Arc<Self>, mut events: ChangeEvents) -> std::io::Result<()> {
        let feed = Arc::clone(self);
        let drain = move || {
            while !feed.stopping.load(Ordering::Relaxed) {
                match events.wait(Duration::from_millis(200)) {
                    // Before the commit is durable there is nothing to do, and when it is, the head says so.
                    Some(true) if feed.published.load(Ordering::SeqCst) < feed.reader.durable_head().sequence => {
                        feed.woken.notify_one();
                    }
                    Some(_) => {}
                    None => return,
                }
            }
        };
        std::thread::Builder::new().name("feed-events".into()).spawn(drain).map(drop)
    }

    pub(super) fn stop(&self) {
        self.stopping.store(true, Ordering::Relaxed);
        self.woken.notify_one();
    }

    /// Hands what has become durable to the live subscriptions, until it is stopped. An
    /// error means that wallets would be told nothing any more: the node has to stop.
    pub(super) async fn run(self: Arc<Self>) -> Result<(), DatabaseError> {
        let mut durable = self.reader.durable();
        while !self.stopping.load(Ordering::Relaxed) {
            let up_to = durable.borrow_and_update().sequence;
            if self.published.load(Ordering::SeqCst) < up_to {
                let position = self.publish(up_to).await?;
                self.published.store(position, Ordering::SeqCst);
                continue;
            }
            // The event says that the log grew, the head that it is durable. Whichever comes last
            // wakes, and the head is looked at again, so no order of the two is missed.
            let is_followed = self.is_followed();
            tokio::select! {
                changed = durable.changed(), if is_followed => if changed.is_err() { return Ok(()) },
                () = self.woken.notified() => {}
            }
        }
        Ok(())
    }

    /// Whether any wallet is connected. If none is, nothing has to be handed on, and so it is as
    /// if everything that will ever come had been: the first that claims a subscription wakes it.
    fn is_followed(&self) -> bool {
        let state = self.state();
        let is_followed = !state.sessions.is_empty();
        if !is_followed {
            self.published.store(u64::MAX, Ordering::SeqCst);
        }
        is_followed
    }

    /// Hands on what is in the log, up to here or a part of it; says how far it came.
    async fn publish(&self, up_to: u64) -> Result<u64, DatabaseError> {
        let position = {
            let mut state = self.state();
            if state.sessions.is_empty() {
                // Nobody would be told, so nothing is read: whoever comes begins after this.
                state.position = up_to;
                return Ok(up_to);
            }
            state.position
        };
        let changes = self.read(position, up_to).await?;
        let mut state = self.state();
        let state = &mut *state;
        for change in changes {
            state.position = change.sequence;
            let interested = state.interested(&change.entry);
            if interested.is_empty() {
                continue;
            }
            let change = Arc::new(change);
            for key in interested {
                let overflowed =
                    state.live.get(&key).is_some_and(|live| live.queue.try_send(Arc::clone(&change)).is_err());
                if overflowed {
                    state.leave(&key);
                }
            }
        }
        Ok(state.position)
    }

    /// Reads the log, and what its blocks contain.
    async fn read(&self, after: u64, up_to: u64) -> Result<Vec<Change>, DatabaseError> {
        let (reader, touched) = (self.reader.clone(), Arc::clone(&self.touched));
        let change = move |(sequence, entry)| {
            let touched = match entry {
                LogEntry::Block { height, .. } => Some(touched.of_block(&reader, height)?),
                LogEntry::Transition(_) => None,
            };
            Ok(Change { sequence, entry, touched, json: OnceLock::new() })
        };
        let reader = self.reader.clone();
        let read = move || reader.changes(after, up_to, FEED_READ)?.into_iter().map(change).collect();
        let read = tokio::task::spawn_blocking(read).await;
        read.map_err(|error| DatabaseError::Io {
            what: "reading the change log",
            source: std::io::Error::other(error),
        })?
    }

    /// Whether a live subscription follows any of these changes. One that is reading the log
    /// finds them there.
    pub(super) fn concerns_anybody(&self, entries: &[LogEntry]) -> bool {
        let state = self.state();
        !state.live.is_empty() && entries.iter().any(|entry| state.concerns(entry))
    }

    /// Takes a subscription over for a connection, before its snapshot is read. A session
    /// that is running has ended when this returns, so nothing of it comes behind the
    /// answer. `None` if a later request has taken it over already.
    pub(super) async fn claim(
        &self,
        key: SubscriptionKey,
        number: u64,
        token_hash: [u8; 32],
        filters: usize,
        connection: &Connection,
    ) -> Option<Claim> {
        let cancel = watch::Sender::new(false);
        let claim = Claim { key, number, cancelled: cancel.subscribe() };
        let session = Session { number, token_hash, connection: connection.id(), filters, cancel };
        let old = {
            let mut state = self.state();
            if state.sessions.get(&key).is_some_and(|session| session.number > number) {
                return None;
            }
            state.leave(&key);
            if state.sessions.is_empty() {
                state.position = state.position.max(self.reader.durable_head().sequence);
                self.published.store(state.position, Ordering::SeqCst);
                self.woken.notify_one();
            }
            state.sessions.insert(key, session)
        };
        if let Some(old) = old {
            old.cancel.send_replace(true);
            old.cancel.closed().await;
        }
        Some(claim)
    }

    /// Begins to stream a claimed subscription to a connection, from after `cursor`.
    pub(super) fn begin(self: &Arc<Self>, mut claim: Claim, filter: Filter, cursor: u64, connection: &Arc<Connection>) {
        let (feed, connection) = (Arc::clone(self), Arc::clone(connection));
        tokio::spawn(async move {
            let (key, number) = (claim.key, claim.number);
            let stream = Stream { feed: &feed, key, number, filter: Arc::new(filter), connection: &connection };
            tokio::select! {
                biased;
                () = claim.lost() => {}
                () = connection.closed() => {}
                _ended = stream.run(cursor) => {}
            }
            feed.end(&claim);
        });
    }

    /// The hash of the token by which this connection has the subscription, if it has.
    pub(super) fn session_of(&self, key: &SubscriptionKey, connection: ConnectionId) -> Option<[u8; 32]> {
        let state = self.state();
        let session = state.sessions.get(key).filter(|session| session.connection == connection);
        session.map(|session| session.token_hash)
    }

    /// How many subscriptions a connection is streaming.
    pub(super) fn sessions_of(&self, connection: ConnectionId) -> usize {
        self.state().sessions.values().filter(|session| session.connection == connection).count()
    }

    /// How many filters a connection's subscriptions have, but for this one's.
    pub(super) fn filters_of(&self, connection: ConnectionId, but: &SubscriptionKey) -> usize {
        let state = self.state();
        let others = state.sessions.iter().filter(|(key, session)| session.connection == connection && *key != but);
        others.map(|(_, session)| session.filters).sum()
    }

    /// The subscriptions that are being streamed.
    pub(super) fn streamed(&self) -> Vec<SubscriptionKey> {
        self.state().sessions.keys().copied().collect()
    }

    /// Ends a subscription's session, whoever has it, unless it came after the request with
    /// this number. When this is done, nothing of it is sent any more.
    pub(super) async fn cancel(&self, key: &SubscriptionKey, number: u64) {
        let session = {
            let mut state = self.state();
            if state.sessions.get(key).is_none_or(|session| session.number > number) {
                return;
            }
            state.leave(key);
            state.sessions.remove(key)
        };
        if let Some(session) = session {
            session.cancel.send_replace(true);
            session.cancel.closed().await;
        }
    }

    /// Gives a claim back, if it has not been lost.
    pub(super) fn end(&self, claim: &Claim) {
        let Claim { key, number, .. } = claim;
        let mut state = self.state();
        if state.live.get(key).is_some_and(|live| live.session == *number) {
            state.leave(key);
        }
        if state.sessions.get(key).is_some_and(|session| session.number == *number) {
            state.sessions.remove(key);
        }
    }
}

impl FeedState {
    fn concerns(&self, entry: &LogEntry) -> bool {
        match entry {
            LogEntry::Transition(step) => {
                self.by_address.contains_key(&step.output.address) || self.by_outpoint.contains_key(&step.outpoint)
            }
            LogEntry::Block { .. } => true,
        }
    }

    fn interested(&self, entry: &LogEntry) -> BTreeSet<SubscriptionKey> {
        match entry {
            LogEntry::Transition(step) => {
                let by_address = self.by_address.get(&step.output.address).into_iter().flatten();
                by_address.chain(self.by_outpoint.get(&step.outpoint).into_iter().flatten()).copied().collect()
            }
            LogEntry::Block { .. } => self.live.keys().copied().collect(),
        }
    }

    fn join(&mut self, key: SubscriptionKey, live: Live) {
        for address in &live.filter.addresses {
            self.by_address.entry(*address).or_default().insert(key);
        }
        for outpoint in &live.filter.outpoints {
            self.by_outpoint.entry(*outpoint).or_default().insert(key);
        }
        self.live.insert(key, live);
    }

    fn leave(&mut self, key: &SubscriptionKey) {
        let Some(live) = self.live.remove(key) else { return };
        for address in &live.filter.addresses {
            if let Some(keys) = self.by_address.get_mut(address) {
                keys.remove(key);
                if keys.is_empty() {
                    self.by_address.remove(address);
                }
            }
        }
        for outpoint in &live.filter.outpoints {
            if let Some(keys) = self.by_outpoint.get_mut(outpoint) {
                keys.remove(key);
                if keys.is_empty() {
                    self.by_outpoint.remove(outpoint);
                }
            }
        }
    }
}

/// Whether these changes go on right behind a cursor.
fn is_next(changes: &[Change], cursor: u64) -> bool {
    changes.first().is_some_and(|change| change.sequence == cursor + 1)
}

/// One session: a cursor that goes along the log, alternately reading it and being live.
struct Stream<'a> {
    feed: &'a Arc<Feed>,
    key: SubscriptionKey,
    number: u64,
    filter: Arc<Filter>,
    connection: &'a Arc<Connection>,
}

impl Stream<'_> {
    async fn run(&self, mut cursor: u64) -> Result<(), Closed> {
        loop {
            let durable = self.feed.reader.durable_head().sequence;
            cursor = self.catch_up(cursor, durable).await?;
            let Some((mut queue, position)) = self.go_live() else { return Ok(()) };
            cursor = self.catch_up(cursor, position).await?;
            while let Some(change) = queue.recv().await {
                // What was published while this caught up may come twice.
                if change.sequence > cursor {
                    self.send(&change).await?;
                    cursor = change.sequence;
                }
            }
            // The queue overflowed and was closed behind its last change.
        }
    }

    /// Joins the live ones, if this session has not been replaced; the position says up to
    /// where the log still has to be read.
    fn go_live(&self) -> Option<(mpsc::Receiver<Arc<Change>>, u64)> {
        let (sender, receiver) = mpsc::channel(FEED_QUEUE);
        let mut state = self.feed.state();
        if state.sessions.get(&self.key).is_none_or(|session| session.number != self.number) {
            return None;
        }
        state.leave(&self.key);
        state.join(self.key, Live { session: self.number, filter: Arc::clone(&self.filter), queue: sender });
        Some((receiver, state.position))
    }

    async fn catch_up(&self, mut cursor: u64, up_to: u64) -> Result<u64, Closed> {
        while cursor < up_to {
            let changes = self.feed.read(cursor, up_to).await.map_err(|error| {
                tracing::error!(%error, "a subscription cannot read the change log");
                let error = ErrorMessage::new(ErrorCode::Internal, "the node could not read its change log");
                self.connection.close_with(&error);
                Closed
            })?;
            // The log is dense. If the next entry is not there, it was pruned while this wallet
            // was slower than the retention; it has to come again, for a snapshot.
            let Some(last) = changes.last().map(|change| change.sequence).filter(|_| is_next(&changes, cursor)) else {
                let error = ErrorMessage::new(ErrorCode::Busy, "the change log does not reach back so far any more");
                self.connection.close_with(&error);
                return Err(Closed);
            };
            for change in changes {
                if self.filter.matches(&change.entry) {
                    self.send(&change).await?;
                }
            }
            cursor = last;
        }
        Ok(cursor)
    }

    async fn send(&self, change: &Change) -> Result<(), Closed> {
        self.connection.send(change.json(&self.feed.originator, &self.filter)).await?;
        self.feed.delivered.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}
