//! All connections of a node: who is there, who is dialled, who is let in.

use std::collections::{BTreeMap, HashMap};
use std::future::Future;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use tokio::net::{TcpListener, TcpStream, lookup_host};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::time::{sleep, timeout};

use super::connection::{Closed, Connection, ConnectionId, Queued};
use super::handshake::{Hello, PROTOCOL_VERSION, Role};
use super::message::{ErrorCode, ErrorMessage, Incoming, NetworkMessage, UTXOStateNotificationMessage, encode};
use super::{peer, websocket};
use crate::consensus::{Committee, MemberIndex};
use crate::limits::{
    DIAL_BACKOFF_MAX, DIAL_BACKOFF_MIN, DIAL_TIMEOUT, MAX_CONNECTIONS, MAX_CONNECTIONS_PER_IP, MAX_PENDING_HANDSHAKES,
    MAX_PENDING_HANDSHAKES_PER_IP, STRANGERS_FRAME_BYTES,
};
use crate::types::{Hash32, Network, SecretKey};

/// A future that a trait object can return.
pub type Handling<'a> = Pin<Box<dyn Future<Output = ()> + Send + 'a>>;

/// Who takes what comes in.
pub trait Handler: Send + Sync + 'static {
    /// A connection is up; a member has proved its key.
    fn connected(&self, connection: &Arc<Connection>);
    /// What to answer to a stranger's transaction without reading it, if there is no time for it.
    fn turns_payments_away(&self) -> Option<ErrorMessage>;
    /// A message came. The connection's next one waits until this is done.
    fn handle<'a>(&'a self, connection: &'a Arc<Connection>, incoming: Incoming, bytes: usize) -> Handling<'a>;
    /// A connection is gone.
    fn disconnected(&self, connection: &Arc<Connection>);
}

/// What a node is, to its peers.
#[derive(Debug)]
pub struct PeerConfig {
    /// Which network.
    pub network: Network,
    /// The members.
    pub committee: Arc<Committee>,
    /// This member's key; `None` for an observer.
    pub key: Option<SecretKey>,
    /// Where members are, by index.
    pub addresses: BTreeMap<MemberIndex, String>,
    /// The most connections of strangers.
    pub max_connections: usize,
    /// The most connections of one IP address.
    pub max_connections_per_ip: usize,
    /// What others may dial, if it is known.
    pub public_address: Option<String>,
}

impl PeerConfig {
    /// The defaults for a node of this committee.
    pub fn new(network: Network, committee: Arc<Committee>, key: Option<SecretKey>) -> Self {
        Self {
            network,
            committee,
            key,
            addresses: BTreeMap::new(),
            max_connections: MAX_CONNECTIONS,
            max_connections_per_ip: MAX_CONNECTIONS_PER_IP,
            public_address: None,
        }
    }
}

/// The connection to a member.
#[derive(Debug, Clone)]
pub(super) struct Link {
    pub(super) connection: Arc<Connection>,
    pub(super) instance: Hash32,
    pub(super) dialled_by_us: bool,
}

/// The answer to a member that wants in.
pub(super) enum Registered {
    Yes,
    /// The other connection between the two keys stays.
    Superfluous,
    /// A connection of another instance is there; does it live?
    OtherInstance(Arc<Connection>),
}

#[derive(Debug, Default)]
struct Registry {
    connections: HashMap<ConnectionId, Arc<Connection>>,
    members: BTreeMap<MemberIndex, Link>,
    /// Strangers that have been let in, by address.
    per_ip: HashMap<IpAddr, usize>,
    /// Those that are being greeted, by transport and address.
    pending: HashMap<(Transport, IpAddr), usize>,
}

/// All connections of a node.
pub struct PeerManager {
    config: PeerConfig,
    instance: Hash32,
    handler: OnceLock<Arc<dyn Handler>>,
    registry: Mutex<Registry>,
    next_id: AtomicU64,
    height: AtomicU64,
    /// Changes whenever a member comes or goes.
    members_changed: watch::Sender<u64>,
    stopping: watch::Sender<bool>,
    /// Bytes of long frames of strangers that may still be received at once.
    pub(super) frame_bytes: Arc<Semaphore>,
    /// What went to and came from members.
    member_traffic: Arc<Traffic>,
    /// The same of all others.
    stranger_traffic: Arc<Traffic>,
}

/// Bytes of messages, without the framing around them and without handshakes.
#[derive(Debug, Default)]
pub struct Traffic {
    pub(super) received: AtomicU64,
    pub(super) sent: AtomicU64,
}

impl Traffic {
    /// Bytes that came.
    pub fn received(&self) -> u64 {
        self.received.load(Ordering::Relaxed)
    }

    /// Bytes that were handed to sockets.
    pub fn sent(&self) -> u64 {
        self.sent.load(Ordering::Relaxed)
    }
}

impl std::fmt::Debug for PeerManager {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PeerManager").field("instance", &self.instance).finish_non_exhaustive()
    }
}

impl PeerManager {
    /// A manager without connections.
    pub fn new(config: PeerConfig) -> Self {
        Self {
            config,
            instance: Hash32::from_bytes(rand::random()),
            handler: OnceLock::new(),
            registry: Mutex::default(),
            next_id: AtomicU64::new(1),
            height: AtomicU64::new(0),
            members_changed: watch::Sender::new(0),
            stopping: watch::Sender::new(false),
            frame_bytes: Arc::new(Semaphore::new(STRANGERS_FRAME_BYTES)),
            member_traffic: Arc::default(),
            stranger_traffic: Arc::default(),
        }
    }

    /// Sets who takes what comes in; once, before anything is started.
    pub fn set_handler(&self, handler: Arc<dyn Handler>) {
        if self.handler.set(handler).is_err() {
            tracing::error!("the handler of a peer manager was set twice");
        }
    }

    pub(super) fn handler(&self) -> &dyn Handler {
        match self.handler.get() {
            Some(handler) => handler.as_ref(),
            None => &Nobody,
        }
    }

    pub(super) fn committee(&self) -> &Committee {
        &self.config.committee
    }

    pub(super) fn key(&self) -> Option<&SecretKey> {
        self.config.key.as_ref()
    }

    /// The height that the next `Hello` names.
    pub fn set_height(&self, height: u64) {
        self.height.store(height, Ordering::Relaxed);
    }

    pub(super) fn hello(&self) -> Hello {
        let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Hello {
            protocol_version: PROTOCOL_VERSION,
            network: self.config.network,
            genesis_hash: *self.config.committee.genesis_hash(),
            role: if self.config.key.is_some() { Role::Masternode } else { Role::Observer },
            public_key: self.config.key.as_ref().map(SecretKey::public_key),
            listen_address: self.config.public_address.clone(),
            nonce: Hash32::from_bytes(rand::random()),
            instance: self.instance,
            user_agent: concat!("time-masternode/", env!("CARGO_PKG_VERSION")).into(),
            height: self.height.load(Ordering::Relaxed),
            timestamp: now.map_or(0, |since| i64::try_from(since.as_secs()).unwrap_or(i64::MAX)),
        }
    }

    /// Accepts peers on `listener`, for ever.
    pub fn listen_for_peers(self: &Arc<Self>, listener: TcpListener) {
        tokio::spawn(Arc::clone(self).accept(listener, Transport::Frames));
    }

    /// Accepts wallets on `listener`, for ever.
    pub fn listen_for_wallets(self: &Arc<Self>, listener: TcpListener) {
        tokio::spawn(Arc::clone(self).accept(listener, Transport::WebSocket));
    }

    /// Dials every other member, and dials again whenever a connection is lost.
    pub fn dial_members(self: &Arc<Self>) {
        let own = self.key().map(SecretKey::public_key);
        for index in self.config.committee.indices() {
            if Some(self.config.committee.member(index).public_key) != own {
                tokio::spawn(Arc::clone(self).keep_dialling(index));
            }
        }
    }

    /// Closes everything and accepts nothing more.
    pub fn stop(&self) {
        self.stopping.send_replace(true);
        for connection in self.registry().connections.values() {
            connection.close(None);
        }
    }

    async fn accept(self: Arc<Self>, listener: TcpListener, transport: Transport) {
        let mut stopping = self.stopping.subscribe();
        loop {
            let accepted = tokio::select! {
                accepted = listener.accept() => accepted,
                _ = stopping.wait_for(|stopping| *stopping) => return,
            };
            match accepted {
                Ok((stream, address)) => self.admit_stranger(stream, address, transport),
                Err(error) => {
                    // Out of descriptors, most likely: those that are open go on.
                    tracing::warn!(%error, "cannot accept a connection");
                    sleep(Duration::from_millis(100)).await;
                }
            }
        }
    }

    /// Greets whoever came. Everybody gets that far, up to a bound for each address and
    /// each port, for a member cannot be told from a stranger before.
    fn admit_stranger(self: &Arc<Self>, stream: TcpStream, address: SocketAddr, transport: Transport) {
        let ip = address.ip();
        {
            let mut registry = self.registry();
            let of_ip = registry.pending.get(&(transport, ip)).copied().unwrap_or(0);
            let of_port: usize = registry.pending.iter().filter(|((t, _), _)| *t == transport).map(|(_, n)| n).sum();
            // With every member connected, whoever comes is a stranger.
            let others = self.config.committee.members().len() - usize::from(self.config.key.is_some());
            let no_place = registry.members.len() >= others && !self.has_place(&registry, ip);
            if no_place || of_ip >= MAX_PENDING_HANDSHAKES_PER_IP || of_port >= MAX_PENDING_HANDSHAKES {
                drop(registry);
                tokio::spawn(turn_away(stream, transport));
                return;
            }
            *registry.pending.entry((transport, ip)).or_default() += 1;
        }
        let pending = PendingHandshake { manager: Arc::clone(self), key: (transport, ip) };
        let manager = Arc::clone(self);
        tokio::spawn(async move {
            let served = match transport {
                Transport::Frames => peer::serve(&manager, stream, address, None, Some(pending)).await,
                Transport::WebSocket => match manager.place_of_stranger(ip) {
                    Some(place) => websocket::serve(&manager, stream, address, pending, place).await,
                    None => {
                        turn_away(stream, transport).await;
                        Ok(())
                    }
                },
            };
            if let Err(error) = served {
                tracing::debug!(%address, %error, "a connection came to nothing");
            }
        });
    }

    fn has_place(&self, registry: &Registry, ip: IpAddr) -> bool {
        let from_ip = registry.per_ip.get(&ip).copied().unwrap_or(0);
        let all: usize = registry.per_ip.values().sum();
        from_ip < self.config.max_connections_per_ip && all < self.config.max_connections
    }

    /// A place for a wallet or an observer, if there is one; members need none.
    pub(super) fn place_of_stranger(self: &Arc<Self>, ip: IpAddr) -> Option<Place> {
        let mut registry = self.registry();
        if !self.has_place(&registry, ip) {
            return None;
        }
        *registry.per_ip.entry(ip).or_default() += 1;
        Some(Place { manager: Arc::clone(self), ip })
    }

    async fn keep_dialling(self: Arc<Self>, member: MemberIndex) {
        let mut stopping = self.stopping.subscribe();
        let mut changed = self.members_changed.subscribe();
        let id = self.config.committee.member(member).id.clone();
        let Some(address) = self.config.addresses.get(&member).cloned() else { return };
        let ours = self.key().map(SecretKey::public_key);
        // The smaller key's connection is the one that stays, so the greater key waits a
        // little for it.
        let patience = if ours < Some(self.config.committee.member(member).public_key) { 0 } else { 300 };
        let mut backoff = DIAL_BACKOFF_MIN;
        loop {
            let connected = async {
                if !self.has_member(member) {
                    sleep(Duration::from_millis(patience)).await;
                }
                while self.has_member(member) {
                    if changed.changed().await.is_err() {
                        return;
                    }
                }
            };
            tokio::select! {
                () = connected => {}
                _ = stopping.wait_for(|stopping| *stopping) => return,
            }
            let dialled = tokio::select! {
                dialled = self.dial(&address, member) => dialled,
                _ = stopping.wait_for(|stopping| *stopping) => return,
            };
            match dialled {
                Ok(()) => backoff = DIAL_BACKOFF_MIN,
                Err(error) => {
                    tracing::debug!(peer = %id, %address, %error, "dialling failed");
                    if let peer::PeerError::Refused(ErrorCode::DuplicateIdentity, _) = error {
                        tracing::error!(peer = %id, "another live instance uses this node's key; stop one of the two");
                    }
                    backoff = (backoff * 2).min(DIAL_BACKOFF_MAX);
                }
            }
            // A little chance keeps nodes that were started together from meeting for ever.
            sleep(backoff.mul_f64(0.75 + rand::random::<f64>() / 2.0)).await;
        }
    }

    async fn dial(self: &Arc<Self>, address: &str, member: MemberIndex) -> Result<(), peer::PeerError> {
        let stream = timeout(DIAL_TIMEOUT, async {
            let mut last = io::Error::from(io::ErrorKind::NotFound);
            for resolved in lookup_host(address).await? {
                match TcpStream::connect(resolved).await {
                    Ok(stream) => return Ok((stream, resolved)),
                    Err(error) => last = error,
                }
            }
            Err(last)
        });
        let (stream, resolved) = stream.await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        peer::serve(self, stream, resolved, Some(member), None).await
    }

    pub(super) fn make_connection(
        &self,
        member: Option<MemberIndex>,
        address: SocketAddr,
    ) -> (Arc<Connection>, mpsc::Receiver<Queued>) {
        let traffic = if member.is_some() { &self.member_traffic } else { &self.stranger_traffic };
        Connection::new(self.next_id.fetch_add(1, Ordering::Relaxed), member, address, Arc::clone(traffic))
    }

    pub(super) fn register_member(&self, member: MemberIndex, link: &Link) -> Registered {
        let mut registry = self.registry();
        match registry.members.get(&member).filter(|old| !old.connection.is_closed()) {
            Some(old) if old.instance != link.instance => {
                return Registered::OtherInstance(Arc::clone(&old.connection));
            }
            Some(old) => {
                let ours = self.key().map(SecretKey::public_key);
                let ours_is_smaller = ours < Some(self.config.committee.member(member).public_key);
                // Both ends keep the connection that the smaller key dialled; of two by the
                // same side, the newer.
                if link.dialled_by_us != old.dialled_by_us && link.dialled_by_us != ours_is_smaller {
                    return Registered::Superfluous;
                }
                old.connection.close(None);
            }
            None => {}
        }
        registry.members.insert(member, link.clone());
        drop(registry);
        self.members_changed.send_modify(|version| *version += 1);
        Registered::Yes
    }

    pub(super) fn came(&self, connection: &Arc<Connection>) {
        self.registry().connections.insert(connection.id(), Arc::clone(connection));
        if *self.stopping.borrow() {
            connection.close(None);
        }
        self.handler().connected(connection);
    }

    pub(super) fn gone(&self, connection: &Arc<Connection>) {
        {
            let mut registry = self.registry();
            registry.connections.remove(&connection.id());
            if let Some(member) = connection.member() {
                // Unless another connection has taken its place.
                let current = registry.members.get(&member).map(|link| link.connection.id());
                if current == Some(connection.id()) {
                    registry.members.remove(&member);
                    tracing::info!(peer = %self.config.committee.member(member).id, "member disconnected");
                }
            }
        }
        self.members_changed.send_modify(|version| *version += 1);
        self.handler().disconnected(connection);
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_member(&self, member: MemberIndex) -> bool {
        self.registry().members.get(&member).is_some_and(|link| !link.connection.is_closed())
    }

    /// The members that are connected.
    pub fn connected_members(&self) -> Vec<MemberIndex> {
        self.registry().members.keys().copied().collect()
    }

    /// The connections of all kinds, in the order in which they came.
    pub fn connections(&self) -> Vec<ConnectionId> {
        let mut ids: Vec<ConnectionId> = self.registry().connections.keys().copied().collect();
        ids.sort_unstable();
        ids
    }

    /// Connections of all kinds.
    pub fn connection_count(&self) -> usize {
        self.registry().connections.len()
    }

    /// Bytes of messages to and from members.
    pub fn member_traffic(&self) -> &Traffic {
        &self.member_traffic
    }

    /// Bytes of messages to and from wallets and observers.
    pub fn stranger_traffic(&self) -> &Traffic {
        &self.stranger_traffic
    }

    /// Follows the coming and going of members.
    pub fn members_changed(&self) -> watch::Receiver<u64> {
        self.members_changed.subscribe()
    }

    /// The connections to all members that are connected, or to one of them. One that is not
    /// connected is greeted when it comes.
    pub fn to_members(&self, only: Option<MemberIndex>) -> Vec<Arc<Connection>> {
        let registry = self.registry();
        let wanted = registry.members.iter().filter(|(member, _)| only.is_none_or(|only| only == **member));
        wanted.map(|(_, link)| Arc::clone(&link.connection)).collect()
    }

    /// Queues a message for one member; nothing if it is not connected.
    pub fn send_to_member(&self, member: MemberIndex, bytes: &Bytes) {
        for connection in self.to_members(Some(member)) {
            connection.send_now(bytes.clone());
        }
    }

    /// Queues a message for every connected member.
    pub fn broadcast(&self, bytes: &Bytes) {
        for connection in self.to_members(None) {
            connection.send_now(bytes.clone());
        }
    }

    /// Ends the connection to a member; it is dialled again later.
    pub fn disconnect_member(&self, member: MemberIndex) {
        if let Some(link) = self.registry().members.get(&member) {
            link.connection.close(None);
        }
    }

    /// Queues a notification for all connected masternodes.
    pub fn broadcast_utxo_notification(&self, notification: UTXOStateNotificationMessage) {
        self.broadcast(&encode(&NetworkMessage::UTXOStateNotification(notification), None));
    }

    /// Sends a notification to one wallet, waiting for room in its queue.
    pub async fn send_utxo_notification_to_peer(
        &self,
        peer: ConnectionId,
        notification: UTXOStateNotificationMessage,
    ) -> Result<(), Closed> {
        let connection = self.registry().connections.get(&peer).cloned().ok_or(Closed)?;
        connection.answer(&NetworkMessage::UTXOStateNotification(notification), None).await
    }

    /// Routes a message as if it had come over this connection.
    pub async fn handle_utxo_message(&self, peer: ConnectionId, message: NetworkMessage) -> Result<(), Closed> {
        let connection = self.registry().connections.get(&peer).cloned().ok_or(Closed)?;
        self.handler().handle(&connection, Incoming { message, request_id: None }, 0).await;
        Ok(())
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Transport {
    Frames,
    WebSocket,
}

/// A stranger's place among the connections of its address; given back when dropped.
pub(super) struct Place {
    manager: Arc<PeerManager>,
    ip: IpAddr,
}

/// A place among those that are being greeted; given back when dropped.
pub(super) struct PendingHandshake {
    manager: Arc<PeerManager>,
    key: (Transport, IpAddr),
}

impl Drop for PendingHandshake {
    fn drop(&mut self) {
        let mut registry = self.manager.registry();
        if let Some(count) = registry.pending.get_mut(&self.key) {
            *count -= 1;
            if *count == 0 {
                registry.pending.remove(&self.key);
            }
        }
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut registry = self.manager.registry();
        if let Some(count) = registry.per_ip.get_mut(&self.ip) {
            *count -= 1;
            if *count == 0 {
                registry.per_ip.remove(&self.ip);
            }
        }
    }
}

/// Says that there is no room. A WebSocket client has no frame to read that from before
/// its upgrade, and is told by HTTP's own word.
async fn turn_away(stream: TcpStream, transport: Transport) {
    let error = ErrorMessage::new(ErrorCode::TooManyConnections, "no room for another connection");
    let words = match transport {
        Transport::Frames => {
            let body = encode(&NetworkMessage::Error(error), None);
            let length = u32::try_from(body.len()).unwrap_or(0).to_be_bytes();
            [&length[..], &body].concat()
        }
        Transport::WebSocket => {
            b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\nConnection: close\r\n\r\n".to_vec()
        }
    };
    // One write into an empty socket buffer; a peer that does not take it is just closed.
    let writing = async {
        stream.writable().await?;
        stream.try_write(&words)
    };
    let _written = timeout(Duration::from_secs(1), writing).await.is_ok();
}

/// Stands in before a handler is set.
struct Nobody;

impl Handler for Nobody {
    fn connected(&self, _: &Arc<Connection>) {}

    fn turns_payments_away(&self) -> Option<ErrorMessage> {
        None
    }

    fn handle<'a>(&'a self, _: &'a Arc<Connection>, _: Incoming, _: usize) -> Handling<'a> {
        Box::pin(std::future::ready(()))
    }

    fn disconnected(&self, _: &Arc<Connection>) {}
}
