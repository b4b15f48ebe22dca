//! One connection, whatever carries it: its queue, its allowances, its end.
//!
//! Each has a reader and a writer task. The reader hands each message to the handler and
//! waits for it, so a peer that sends too fast is slowed by its own socket. What is sent
//! waits in a bounded queue: a member whose queue is full is disconnected (it will be
//! greeted again), while whoever answers a wallet waits for room. What a member is told alone,
//! with nothing before it in the queue, goes to its socket at once, on the thread of whoever says it.

use std::collections::VecDeque;
use std::future::Future;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, watch};
use tokio::time::timeout;

use super::message::{
    ErrorCode, ErrorMessage, FinalityProof, NetworkMessage, Nonce, RequestId, encode, find_name, find_request_id, parse,
};
use super::peer_manager::{PeerManager, Traffic};
use crate::consensus::MemberIndex;
use crate::limits::{
    BAD_MESSAGES, MAX_WATCHED_PER_CONNECTION, PEER_QUEUE, PEER_QUEUE_BYTES, PING_EVERY, SIGNATURE_FAILURES,
    SILENCE_TIMEOUT, WALLET_MESSAGES_PER_SECOND, WALLET_QUEUE, WALLET_QUEUE_BYTES, WALLET_UNREAD_STATUS_BYTES,
    WALLET_UNREAD_STATUSES, WRITE_TIMEOUT,
};
use crate::types::DecidedBlock;

/// Statuses that may wait on one connection: each watched transaction has a few.
const PUSH_QUEUE: usize = 4 * MAX_WATCHED_PER_CONNECTION;

/// Statuses that wait for a connection's writer, with about how many bytes they have as JSON.
#[derive(Debug, Default)]
struct Pushed {
    queue: VecDeque<(NetworkMessage, Option<RequestId>)>,
    bytes: usize,
}

/// About how many bytes of JSON a status has. It is little but for what proves it.
fn about_bytes(message: &NetworkMessage) -> usize {
    let proof = match message {
        NetworkMessage::TransactionStatus(status) => status.finality_proof.as_ref(),
        _ => None,
    };
    let certificate = |votes: usize| 512 * votes;
    512 + match proof {
        Some(FinalityProof::Commit(proof)) => certificate(proof.votes.len()),
        Some(FinalityProof::Block(decided)) => {
            let DecidedBlock { block, certificate: commits } = decided.as_ref();
            certificate(commits.votes.len()) + 67 * (block.transactions.len() + block.aborts.len())
        }
        None => 0,
    }
}

/// A connection's number, unique while the program runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub(super) u64);

/// The other side has gone, or was sent away.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the connection is closed")]
pub struct Closed;

/// An allowance that refills with time.
#[derive(Debug)]
struct Allowance {
    left: f64,
    most: f64,
    per_second: f64,
    at: Instant,
}

impl Allowance {
    fn new(most: u32, per_second: f64) -> Self {
        Self { left: f64::from(most), most: f64::from(most), per_second, at: Instant::now() }
    }

    fn take(&mut self, cost: f64) -> bool {
        let now = Instant::now();
        self.left = (self.left + now.duration_since(self.at).as_secs_f64() * self.per_second).min(self.most);
        self.at = now;
        if self.left < cost {
            return false;
        }
        self.left -= cost;
        true
    }
}

/// A message that waits for the socket, with the room that it takes there.
#[derive(Debug)]
pub(super) struct Queued {
    bytes: Bytes,
    _room: Option<OwnedSemaphorePermit>,
}

/// What became of a message that was to be sent at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Sent {
    /// It is with the socket.
    Whole,
    /// Only its beginning is; the rest waits for the next flush.
    Part,
    /// Nothing of it is.
    Nothing,
}

/// A socket that takes a message at once, from any thread, if nothing is on its way before it.
pub(super) trait Express: std::fmt::Debug + Send + Sync {
    /// Never waits.
    fn try_send(&self, message: &[u8]) -> Sent;
}

#[derive(Debug)]
struct Allowances {
    messages: Allowance,
    bad_messages: Allowance,
    bad_signatures: Allowance,
}

/// A connection to a member, an observer or a wallet.
#[derive(Debug)]
pub struct Connection {
    id: ConnectionId,
    member: Option<MemberIndex>,
    address: SocketAddr,
    queue: mpsc::Sender<Queued>,
    /// Bytes that were queued and are not with the socket yet.
    queued_bytes: AtomicUsize,
    express: OnceLock<Box<dyn Express>>,
    traffic: Arc<Traffic>,
    /// Bytes that may still wait for a wallet's socket.
    room: Arc<Semaphore>,
    pushed: Mutex<Pushed>,
    push: Notify,
    push_taken: Notify,
    closing: watch::Sender<Option<Option<Bytes>>>,
    heard: AtomicU64,
    started: Instant,
    allowances: Mutex<Allowances>,
}

impl Connection {
    pub(super) fn new(
        id: u64,
        member: Option<MemberIndex>,
        address: SocketAddr,
        traffic: Arc<Traffic>,
    ) -> (Arc<Self>, mpsc::Receiver<Queued>) {
        let (queue, receiver) = mpsc::channel(if member.is_some() { PEER_QUEUE } else { WALLET_QUEUE });
        let allowances = Allowances {
            messages: Allowance::new(WALLET_MESSAGES_PER_SECOND, f64::from(WALLET_MESSAGES_PER_SECOND)),
            bad_messages: Allowance::new(BAD_MESSAGES, 1.0),
            bad_signatures: Allowance::new(SIGNATURE_FAILURES, 1.0),
        };
        let connection = Self {
            id: ConnectionId(id),
            member,
            address,
            queue,
            queued_bytes: AtomicUsize::new(0),
            express: OnceLock::new(),
            traffic,
            room: Arc::new(Semaphore::new(WALLET_QUEUE_BYTES)),
            pushed: Mutex::default(),
            push: Notify::new(),
            push_taken: Notify::new(),
            closing: watch::Sender::new(None),
            heard: AtomicU64::new(0),
            started: Instant::now(),
            allowances: Mutex::new(allowances),
        };
        (Arc::new(connection), receiver)
    }

    /// Its number.
    pub const fn id(&self) -> ConnectionId {
        self.id
    }

    /// The member that has proved its key, if it is one.
    pub const fn member(&self) -> Option<MemberIndex> {
        self.member
    }

    /// The other side's address.
    pub const fn ip(&self) -> IpAddr {
        self.address.ip()
    }

    /// Queues a message without waiting. If there is no room the connection is closed:
    /// a member is never skipped.
    pub fn send_now(&self, bytes: Bytes) {
        let waiting = self.queued_bytes.fetch_add(bytes.len(), Ordering::Relaxed) + bytes.len();
        if waiting > PEER_QUEUE_BYTES || self.queue.try_send(Queued { bytes, _room: None }).is_err() {
            self.close(None);
        }
    }

    /// Gives the connection a socket that takes messages at once; before it is run.
    pub(super) fn send_through(&self, express: Box<dyn Express>) {
        if self.express.set(express).is_err() {
            tracing::error!("a connection was given a socket twice");
        }
    }

    /// Sends a message on the caller's thread if nothing is on its way before it, which spares it
    /// the way through the writer's; else queues it like [`send_now`](Self::send_now). For what
    /// comes alone: the writer sends many in one piece.
    pub fn send_at_once(&self, bytes: Bytes) {
        // Once nothing is counted, all that was queued before is with the socket.
        let sent = match self.express.get() {
            Some(express) if self.queued_bytes.load(Ordering::Acquire) == 0 && !self.is_closed() => {
                express.try_send(&bytes)
            }
            _ => Sent::Nothing,
        };
        match sent {
            Sent::Nothing => return self.send_now(bytes),
            Sent::Part => self.push.notify_one(),
            Sent::Whole => {}
        }
        self.traffic.sent.fetch_add(bytes.len() as u64, Ordering::Relaxed);
    }

    /// Queues a message, waiting for room. For a member there is room, or the connection is
    /// closed: two members that answer each other must not wait for each other to read.
    pub async fn send(&self, bytes: Bytes) -> Result<(), Closed> {
        if self.member.is_some() {
            self.send_now(bytes);
            return if self.is_closed() { Err(Closed) } else { Ok(()) };
        }
        let mut closing = self.closing.subscribe();
        self.queued_bytes.fetch_add(bytes.len(), Ordering::Relaxed);
        let queued = async {
            let share = u32::try_from(bytes.len().min(WALLET_QUEUE_BYTES)).unwrap_or(u32::MAX);
            let room = Arc::clone(&self.room).acquire_many_owned(share).await.map_err(|_| Closed)?;
            self.queue.send(Queued { bytes, _room: Some(room) }).await.map_err(|_| Closed)
        };
        tokio::select! {
            sent = queued => sent,
            _ = closing.wait_for(Option::is_some) => Err(Closed),
        }
    }

    /// Queues an answer, waiting for room.
    pub async fn answer(&self, message: &NetworkMessage, request_id: Option<&str>) -> Result<(), Closed> {
        self.send(encode(message, request_id)).await
    }

    /// Leaves a status for the writer to fetch, from where one cannot wait. The queue is
    /// bounded by what the connection may watch.
    pub fn push(&self, message: NetworkMessage, request_id: Option<RequestId>) {
        let mut pushed = self.pushed();
        if pushed.queue.len() >= PUSH_QUEUE {
            drop(pushed);
            return self.close(None);
        }
        pushed.bytes += about_bytes(&message);
        pushed.queue.push_back((message, request_id));
        drop(pushed);
        self.push.notify_one();
    }

    /// Refuses a message. Too many that are none, or not allowed, close the connection;
    /// that the node is busy is nobody's fault.
    pub async fn refuse(&self, error: ErrorMessage) -> Result<(), Closed> {
        let costs = match error.code {
            ErrorCode::Busy | ErrorCode::Internal => false,
            // A newer member may know more messages.
            ErrorCode::UnknownMessage => self.member.is_none(),
            _ => true,
        };
        let allowed = !costs || self.allowances.lock().unwrap_or_else(PoisonError::into_inner).bad_messages.take(1.0);
        let request_id = error.request_id.clone();
        if !allowed {
            self.close_with(&ErrorMessage::new(ErrorCode::RateLimited, "too many refused messages"));
            return Err(Closed);
        }
        self.answer(&NetworkMessage::Error(error), request_id.as_deref()).await
    }

    /// Counts a bad signature; too many close the connection.
    pub fn count_bad_signature(&self) {
        if !self.allowances.lock().unwrap_or_else(PoisonError::into_inner).bad_signatures.take(1.0) {
            self.close_with(&ErrorMessage::new(ErrorCode::RateLimited, "too many bad signatures"));
        }
    }

    fn may_send(&self, bytes: usize) -> bool {
        // Members are slowed by their sockets and by their share of the verify pool.
        let cost = 1.0 + (bytes / 1024) as f64;
        self.member.is_some() || self.allowances.lock().unwrap_or_else(PoisonError::into_inner).messages.take(cost)
    }

    /// Waits while the other side has too many statuses to read: who does not read is not
    /// read from.
    async fn statuses_read(&self) {
        let many = |pushed: &Pushed| {
            pushed.queue.len() >= WALLET_UNREAD_STATUSES || pushed.bytes >= WALLET_UNREAD_STATUS_BYTES
        };
        while many(&self.pushed()) {
            tokio::select! {
                () = self.push_taken.notified() => {}
                () = self.closed() => return,
            }
        }
    }

    /// Closes the connection; what is queued may be lost.
    pub fn close(&self, last_words: Option<Bytes>) {
        self.closing.send_if_modified(|closing| {
            let first = closing.is_none();
            if first {
                *closing = Some(last_words);
            }
            first
        });
    }

    /// Says why, and closes.
    pub fn close_with(&self, error: &ErrorMessage) {
        self.close(Some(encode(&NetworkMessage::Error(error.clone()), error.request_id.as_deref())));
    }

    /// Whether it has been closed.
    pub fn is_closed(&self) -> bool {
        self.closing.borrow().is_some()
    }

    /// Waits until it is closed.
    pub async fn closed(&self) {
        // The sender lives in `self`, so this cannot fail while we are here.
        let _closed = self.closing.subscribe().wait_for(Option::is_some).await.is_ok();
    }

    /// Bytes that were queued and are not with the socket yet.
    #[cfg(test)]
    pub(super) fn queued(&self) -> usize {
        self.queued_bytes.load(Ordering::Acquire)
    }

    /// How many signs of life have come.
    pub(super) fn heard(&self) -> u64 {
        self.heard.load(Ordering::Relaxed)
    }

    pub(super) fn age_ms(&self) -> u64 {
        u64::try_from(self.started.elapsed().as_millis()).unwrap_or(u64::MAX)
    }

    fn pushed(&self) -> MutexGuard<'_, Pushed> {
        self.pushed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_pushed(&self) -> VecDeque<(NetworkMessage, Option<RequestId>)> {
        let taken = std::mem::take(&mut *self.pushed());
        self.push_taken.notify_one();
        taken.queue
    }
}

/// The other end of a connection inside this process: what a handler answers comes out
/// here. Dropping it closes the connection.
#[derive(Debug)]
pub struct Mailbox {
    connection: Arc<Connection>,
    receiver: mpsc::Receiver<Queued>,
}

impl Mailbox {
    /// A connection without a socket, as if from `address`.
    pub fn open(manager: &PeerManager, address: SocketAddr) -> Self {
        let (connection, receiver) = manager.make_connection(None, address);
        Self { connection, receiver }
    }

    /// This end's connection, for a handler.
    pub const fn connection(&self) -> &Arc<Connection> {
        &self.connection
    }

    /// The next message that was sent to it; `None` once it is closed.
    pub async fn next(&mut self) -> Option<NetworkMessage> {
        loop {
            let pushed = {
                let mut pushed = self.connection.pushed();
                let first = pushed.queue.pop_front();
                pushed.bytes -= first.as_ref().map_or(0, |(message, _)| about_bytes(message));
                first
            };
            if let Some((message, _)) = pushed {
                self.connection.push_taken.notify_one();
                return Some(message);
            }
            tokio::select! {
                queued = self.receiver.recv() => return parse(&queued?.bytes).ok().map(|incoming| incoming.message),
                () = self.connection.push.notified() => {}
                () = self.connection.closed() => return None,
            }
        }
    }
}

impl Drop for Mailbox {
    fn drop(&mut self) {
        self.connection.close(None);
    }
}

/// What came.
pub(super) enum Received {
    /// A message.
    Message(Bytes),
    /// A sign of life without one.
    Alive,
}

/// Where messages come from.
pub(super) trait Source: Send {
    /// What comes next; `None` at the end, or the `Error` to end with.
    fn next(&mut self) -> impl Future<Output = Result<Option<Received>, Option<ErrorMessage>>> + Send;
}

/// Where messages go to.
pub(super) trait Sink: Send {
    /// Writes one message into the buffer.
    fn write(&mut self, message: Bytes) -> impl Future<Output = std::io::Result<()>> + Send;
    /// Asks for a sign of life.
    fn ping(&mut self, nonce: Nonce) -> impl Future<Output = std::io::Result<()>> + Send;
    /// Sends what is buffered.
    fn flush(&mut self) -> impl Future<Output = std::io::Result<()>> + Send;
    /// Says good-bye.
    fn close(&mut self) -> impl Future<Output = ()> + Send;
}

/// Closes a connection and takes it off the lists, also if its task panics.
struct End<'a> {
    manager: &'a PeerManager,
    connection: &'a Arc<Connection>,
}

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.connection.close(None);
        self.manager.gone(self.connection);
    }
}

/// Runs a connection to its end. The handler has been told of it, and is told of the end.
pub(super) async fn run<I: Source + 'static, O: Sink + 'static>(
    manager: &Arc<PeerManager>,
    connection: Arc<Connection>,
    mut source: I,
    sink: O,
    receiver: mpsc::Receiver<Queued>,
) {
    let writer = tokio::spawn(write(Arc::clone(&connection), sink, receiver));
    let end = End { manager, connection: &connection };
    loop {
        let next = tokio::select! {
            next = timeout(SILENCE_TIMEOUT, source.next()) => next,
            () = connection.closed() => break,
        };
        let Ok(next) = next else { break };
        match next {
            Ok(Some(received)) => {
                connection.heard.fetch_add(1, Ordering::Relaxed);
                let Received::Message(bytes) = received else { continue };
                connection.traffic.received.fetch_add(bytes.len() as u64, Ordering::Relaxed);
                if receive(manager, &connection, &bytes).await.is_err() {
                    break;
                }
            }
            Ok(None) | Err(None) => break,
            Err(Some(error)) => {
                connection.close_with(&error);
                break;
            }
        }
    }
    drop(end);
    // The writer sees that the connection is closed and ends by itself, also if it is
    // stuck in a socket that nobody reads.
    if let Err(error) = writer.await {
        tracing::error!(%error, "a writer task failed");
    }
}

async fn receive(manager: &Arc<PeerManager>, connection: &Arc<Connection>, bytes: &[u8]) -> Result<(), Closed> {
    connection.statuses_read().await;
    if !connection.may_send(bytes.len()) {
        connection.close_with(&ErrorMessage::new(ErrorCode::RateLimited, "too many messages a second"));
        return Err(Closed);
    }
    if connection.member.is_none()
        && find_name(bytes) == Some(NetworkMessage::TRANSACTION_BROADCAST)
        && let Some(refusal) = manager.handler().turns_payments_away()
    {
        return connection.refuse(ErrorMessage { request_id: find_request_id(bytes), ..refusal }).await;
    }
    match parse(bytes) {
        Ok(incoming) => match incoming.message {
            NetworkMessage::Ping(nonce) => {
                connection.answer(&NetworkMessage::Pong(nonce), incoming.request_id.as_deref()).await
            }
            NetworkMessage::Pong(_) => Ok(()),
            _ => {
                manager.handler().handle(connection, incoming, bytes.len()).await;
                Ok(())
            }
        },
        Err(error) => connection.refuse(error).await,
    }
}

/// The writer: sends what is queued and what is left for it to fetch, until the connection is closed.
async fn write<O: Sink>(connection: Arc<Connection>, mut sink: O, mut receiver: mpsc::Receiver<Queued>) {
    let written = &connection.traffic.sent;
    let mut closing = connection.closing.subscribe();
    let mut batch = Vec::new();
    let mut ping = tokio::time::interval(PING_EVERY);
    ping.reset();
    let mut ask = false;
    loop {
        tokio::select! {
            biased;
            _ = closing.wait_for(Option::is_some) => break,
            count = receiver.recv_many(&mut batch, 64) => if count == 0 { break },
            () = connection.push.notified() => {}
            _ = ping.tick() => ask = true,
        }
        let pushed = connection.take_pushed().into_iter().map(|(message, id)| encode(&message, id.as_deref()));
        let sent = batch.iter().map(|queued| queued.bytes.len()).sum::<usize>();
        let messages = batch.iter().map(|queued| queued.bytes.clone()).chain(pushed);
        let messages = messages.inspect(|bytes| {
            written.fetch_add(bytes.len() as u64, Ordering::Relaxed);
        });
        let writing = async {
            if std::mem::take(&mut ask) {
                sink.ping(Nonce { nonce: connection.age_ms() }).await?;
            }
            write_all(&mut sink, messages).await
        };
        let done = tokio::select! {
            done = timeout(WRITE_TIMEOUT, writing) => matches!(done, Ok(Ok(()))),
            _ = closing.wait_for(Option::is_some) => false,
        };
        connection.queued_bytes.fetch_sub(sent, Ordering::Release);
        if !done {
            break;
        }
        batch.clear();
    }
    let last_words = closing.borrow().clone().flatten();
    connection.close(None);
    let farewell = async {
        if let Some(words) = last_words {
            write_all(&mut sink, std::iter::once(words)).await?;
        }
        sink.close().await;
        Ok::<(), std::io::Error>(())
    };
    if timeout(Duration::from_secs(1), farewell).await.is_err() {
        tracing::trace!(connection = connection.id.0, "a peer did not take its farewell");
    }
}

async fn write_all<O: Sink>(sink: &mut O, messages: impl Iterator<Item = Bytes>) -> std::io::Result<()> {
    for message in messages {
        sink.write(message).await?;
    }
    sink.flush().await
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt;
    use tokio::net::{TcpListener, TcpSocket, TcpStream};

    use super::super::frame::read_frame;
    use super::super::message::Incoming;
    use super::super::peer::{FrameSink, GATHERED};
    use super::super::peer_manager::{Handler, Handling, PeerConfig};
    use super::*;
    use crate::consensus::Committee;
    use crate::limits::MAX_FRAME_BYTES;
    use crate::types::{Address, Allocation, Genesis, Network, RawGenesis, RawMasternode, SecretKey};

    fn committee() -> Committee {
        let key = SecretKey::from_seed([1; 32]).public_key();
        let address = Address::of_key(&key, Network::Devnet).to_string();
        let genesis = Genesis::try_from(RawGenesis {
            network: Network::Devnet,
            timestamp: 0,
            block_interval_ms: 1,
            min_fee: 0,
            masternodes: vec![RawMasternode {
                id: "m".into(),
                public_key: key,
                weight: 1,
                p2p_address: String::new(),
                payout_address: address.clone(),
            }],
            allocations: vec![Allocation { address, amount: 1 }],
        });
        Committee::of_genesis(&genesis.unwrap())
    }

    fn a_member() -> MemberIndex {
        committee().index_of(&SecretKey::from_seed([1; 32]).public_key()).unwrap()
    }

    /// Has no time for payments, and notes how many messages it was handed.
    #[derive(Default)]
    struct Hurried {
        handled: AtomicUsize,
    }

    impl Handler for Hurried {
        fn connected(&self, _: &Arc<Connection>) {}

        fn turns_payments_away(&self) -> Option<ErrorMessage> {
            Some(ErrorMessage::new(ErrorCode::Busy, "later"))
        }

        fn handle<'a>(&'a self, _: &'a Arc<Connection>, _: Incoming, _: usize) -> Handling<'a> {
            self.handled.fetch_add(1, Ordering::Relaxed);
            Box::pin(std::future::ready(()))
        }

        fn disconnected(&self, _: &Arc<Connection>) {}
    }

    #[tokio::test]
    async fn a_strangers_message_can_be_turned_away_unread_and_a_members_never_is() {
        let manager = Arc::new(PeerManager::new(PeerConfig::new(Network::Devnet, Arc::new(committee()), None)));
        let handler = Arc::new(Hurried::default());
        manager.set_handler(Arc::clone(&handler) as Arc<dyn Handler>);
        let address = ([127, 0, 0, 1], 0).into();
        let payment = r#"{"TransactionBroadcast": {"txid": "00", "request_id": "r1"}}"#.as_bytes();
        let code = |queued: Queued| match parse(&queued.bytes).map(|incoming| (incoming.message, incoming.request_id)) {
            Ok((NetworkMessage::Error(error), id)) => (error.code, id),
            other => panic!("{other:?}"),
        };

        let (wallet, mut told) = Connection::new(1, None, address, Arc::default());
        receive(&manager, &wallet, payment).await.unwrap();
        assert_eq!(code(told.try_recv().unwrap()), (ErrorCode::Busy, Some("r1".into())));
        receive(&manager, &wallet, br#"{"GetBlocks": {"from_height": 1, "limit": 1}}"#).await.unwrap();
        assert_eq!(handler.handled.load(Ordering::Relaxed), 1, "what it has time for is handed on");

        let (member, mut told) = Connection::new(2, Some(a_member()), address, Arc::default());
        receive(&manager, &member, payment).await.unwrap();
        assert_eq!(code(told.try_recv().unwrap()).0, ErrorCode::Malformed, "it was read");
    }

    fn page() -> Bytes {
        Bytes::from(vec![b' '; WALLET_QUEUE_BYTES])
    }

    /// Two members that answer each other's long requests must not wait for each other:
    /// while a reader waits for room to answer in, nobody reads what would make that room.
    #[test]
    fn answering_a_member_never_waits_and_is_bounded() {
        let (connection, _unread) = Connection::new(1, Some(a_member()), ([127, 0, 0, 1], 0).into(), Arc::default());
        for _ in 0..PEER_QUEUE_BYTES / WALLET_QUEUE_BYTES {
            assert_eq!(connection.send(page()).now_or_never(), Some(Ok(())));
        }
        assert_eq!(connection.send(page()).now_or_never(), Some(Err(Closed)), "too much closes it");
        assert!(connection.is_closed());
    }

    #[test]
    fn answering_a_wallet_waits_for_room() {
        let (connection, mut unread) = Connection::new(1, None, ([127, 0, 0, 1], 0).into(), Arc::default());
        assert_eq!(connection.send(page()).now_or_never(), Some(Ok(())));
        assert_eq!(connection.send(page()).now_or_never(), None);
        assert!(unread.try_recv().is_ok());
        assert_eq!(connection.send(page()).now_or_never(), Some(Ok(())));
        assert!(!connection.is_closed());
    }

    /// Counts what became of messages that were to be sent at once.
    #[derive(Debug)]
    struct Counted {
        sink: FrameSink,
        counts: Arc<[AtomicUsize; 3]>,
    }

    impl Express for Counted {
        fn try_send(&self, message: &[u8]) -> Sent {
            let sent = self.sink.try_send(message);
            self.counts[sent as usize].fetch_add(1, Ordering::Relaxed);
            sent
        }
    }

    /// Frames with their numbers, of every size that matters, to a member that reads by fits and
    /// starts: they arrive whole and in order, whichever way each of them goes.
    #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
    async fn what_is_sent_at_once_and_what_is_queued_arrive_in_order() {
        const MESSAGES: u32 = 2_000;
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let near = TcpSocket::new_v4().unwrap();
        near.set_send_buffer_size(64 * 1024).unwrap();
        let (near, far) = tokio::join!(near.connect(address), listener.accept());
        let (mut far, _) = far.unwrap();
        let sink = FrameSink::new(near.unwrap().into_split().1);
        let (connection, receiver) = Connection::new(1, Some(a_member()), address, Arc::default());
        let counts = Arc::<[AtomicUsize; 3]>::default();
        connection.send_through(Box::new(Counted { sink: sink.clone(), counts: Arc::clone(&counts) }));
        let writer = tokio::spawn(write(Arc::clone(&connection), sink, receiver));
        let done = |sent: Sent| counts[sent as usize].load(Ordering::Relaxed);
        // What has been read is still counted until the writer comes to it, and meanwhile nothing
        // would be tried at once.
        let nothing_queued = async || {
            while connection.queued() > 0 {
                tokio::task::yield_now().await;
            }
        };
        let message = |number: u32, length: usize| {
            let mut message = vec![0; length];
            message[..4].copy_from_slice(&number.to_be_bytes());
            Bytes::from(message)
        };
        let next = async |far: &mut TcpStream, number: u32| {
            let mut frame = read_frame(far, MAX_FRAME_BYTES).await.unwrap().unwrap();
            while parse(&frame).is_ok() {
                // A ping, if this takes so long.
                frame = read_frame(far, MAX_FRAME_BYTES).await.unwrap().unwrap();
            }
            assert_eq!(frame[..4], number.to_be_bytes());
            assert!(frame[4..].iter().all(|byte| *byte == 0));
        };
        // Nobody reads until there is no more room, and then the rest comes without another word.
        let (mut first, mut read) = (0, 0);
        while done(Sent::Part) == 0 {
            nothing_queued().await;
            let full = done(Sent::Nothing);
            while done(Sent::Part) + done(Sent::Nothing) == full {
                connection.send_at_once(message(first, rand::random_range(4..GATHERED)));
                assert!(!connection.is_closed(), "there was room");
                first += 1;
            }
            for number in read..first {
                timeout(PING_EVERY / 2, next(&mut far, number)).await.expect("the rest comes, and not with a ping");
            }
            read = first;
        }
        let speaking = Arc::clone(&connection);
        let speaker = std::thread::spawn(move || {
            for number in first..first + MESSAGES {
                let length = [4, 700, 9_000, GATHERED, GATHERED + 1, 70_000][rand::random_range(0..6)];
                if rand::random_range(0..4) == 0 {
                    speaking.send_now(message(number, length));
                } else {
                    speaking.send_at_once(message(number, length));
                }
                assert!(!speaking.is_closed(), "there was room");
                // The reader comes after, so that there are moments when nothing waits.
                while speaking.queued() > 1_000_000 || (number % 16 == 0 && speaking.queued() > 0) {
                    std::thread::yield_now();
                }
            }
        });
        for number in first..first + MESSAGES {
            next(&mut far, number).await;
        }
        speaker.join().unwrap();
        // What has begun is sent to its end, also if the connection is closed meanwhile.
        nothing_queued().await;
        let (whole, full) = (done(Sent::Whole), done(Sent::Part) + done(Sent::Nothing));
        while done(Sent::Part) + done(Sent::Nothing) == full {
            connection.send_at_once(message(first + MESSAGES, rand::random_range(4..GATHERED)));
            assert!(!connection.is_closed(), "there was room");
        }
        connection.close(None);
        let mut left = 0;
        while read_frame(&mut far, MAX_FRAME_BYTES).await.expect("no frame is torn").is_some() {
            left += 1;
        }
        assert!(left >= done(Sent::Whole) - whole);
        writer.await.unwrap();
        assert!(done(Sent::Whole) > 0 && done(Sent::Part) > 0 && done(Sent::Nothing) > 0, "{counts:?}");
    }
}
