//! Wires: the ledger thread, the protocol handler, the feed, the catching up.
//!
//! [`MasternodeUTXOIntegration`] puts a [`UTXOStateManager`] (the ledger) and a
//! [`PeerManager`] (the sockets) together into a running node.
//! The way of a transaction through it: `net` reads it, `protocol` checks its form,
//! `verify` its signatures, `ledger` decides and commits, `outbox` lets the
//! decision out, and `feed` tells the wallets what changed.

mod clock;
mod door;
mod feed;
mod health;
mod http;
mod input;
mod intake;
mod lately;
mod ledger;
mod outbox;
mod protocol;
mod prune;
mod quiet;
mod rush;
mod state_manager;
mod status;
mod subscribe;
mod sync;
mod touched;
mod verify;

use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use tokio::net::TcpListener;
use tokio::time::timeout;

use self::feed::Feed;
use self::outbox::Outbox;
use self::status::StatusHub;
use self::verify::VerifyPool;
use crate::consensus::Voting;
use crate::limits::OBSERVE_EVERY;
use crate::net::{Handler, Incoming, Mailbox, NetworkMessage, PeerManager, TransactionStatus, TransactionStatusKind};
use crate::types::RawTransaction;

pub use health::LedgerHealth;
pub use http::NodeStatus;

pub use protocol::UTXOProtocolHandler;
pub use state_manager::{LedgerConfig, LedgerError, UTXOStateManager};

/// How long an in-process request waits for its answer.
const ANSWER_WAIT: Duration = Duration::from_secs(10);

/// How often subscriptions are looked after.
const HOUSEKEEPING_EVERY: Duration = Duration::from_secs(3600);

/// Why a node does not start, or a request to it fails.
#[derive(Debug, thiserror::Error)]
pub enum NodeError {
    /// A thread or a socket could not be had.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: String,
        /// The system's word.
        source: std::io::Error,
    },
    /// [`MasternodeUTXOIntegration::initialize`] has not been called, or twice.
    #[error("the node is not running")]
    NotRunning,
    /// No answer came in time.
    #[error("the node did not answer")]
    NoAnswer,
    /// The node refused the request.
    #[error("{}: {}", .0.code, .0.message)]
    Rejected(crate::net::RejectionMessage),
    /// The node refused the message.
    #[error("{:?}: {}", .0.code, .0.message)]
    Refused(crate::net::ErrorMessage),
}

/// Where a node listens; `None` for what it does not offer. Port 0 takes a free one.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Listen {
    /// Peers, over TCP.
    pub p2p: Option<SocketAddr>,
    /// `/livez`, `/readyz`, `/metrics`, `/status`.
    pub http: Option<SocketAddr>,
    /// Wallets.
    pub websocket: Option<SocketAddr>,
}

/// Counters of a running node.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Serialize)]
pub struct NodeStats {
    /// Transactions in flight.
    pub in_flight: usize,
    /// Transactions that became final since the start.
    pub finalized: u64,
    /// Durable commits since the start.
    pub commits: u64,
    /// Members that are connected.
    pub connected_members: usize,
    /// Connections of all kinds.
    pub connections: usize,
    /// Subscriptions whose wallet is connected.
    pub subscriptions: usize,
    /// Notifications sent since the start.
    pub notifications: u64,
}

/// A node: the ledger, the sockets, and what lies between.
#[derive(Debug)]
pub struct MasternodeUTXOIntegration {
    id: String,
    ledger: Arc<UTXOStateManager>,
    peers: Arc<PeerManager>,
    listen: Listen,
    running: OnceLock<Running>,
}

#[derive(Debug)]
struct Running {
    handler: Arc<UTXOProtocolHandler>,
    bound: Listen,
    http: Option<tokio::task::AbortHandle>,
}

impl MasternodeUTXOIntegration {
    /// A node of this ledger and these sockets; it listens nowhere.
    pub fn new(id: String, ledger: Arc<UTXOStateManager>, peers: Arc<PeerManager>) -> Self {
        Self { id, ledger, peers, listen: Listen::default(), running: OnceLock::new() }
    }

    /// The same node, listening.
    #[must_use]
    pub fn listening(self, listen: Listen) -> Self {
        Self { listen, ..self }
    }

    /// Starts everything: the feed, the verify pool, the ledger thread, then the sockets.
    /// Votes and locks of before are carried on with.
    pub async fn initialize(&self) -> Result<(), NodeError> {
        let io = |what: &str| {
            let what = what.to_owned();
            move |source| NodeError::Io { what, source }
        };
        // The sockets are bound first: a port that is taken is the likeliest failure.
        let p2p = bind("peers", self.listen.p2p).await?;
        let http = bind("HTTP", self.listen.http).await?;
        let websocket = bind("wallets", self.listen.websocket).await?;
        let address = |listener: &Option<TcpListener>| listener.as_ref().and_then(|l| l.local_addr().ok());
        let bound = Listen { p2p: address(&p2p), http: address(&http), websocket: address(&websocket) };

        let events = self.ledger.watch_changes().ok_or(NodeError::NotRunning)?;
        let reader = self.ledger.reader().clone();
        let feed = Arc::new(Feed::new(reader.clone(), self.id.clone()));
        feed.drain_events(events).map_err(io("starting the feed"))?;
        let (feeding, health) = (Arc::clone(&feed), Arc::clone(self.ledger.health()));
        tokio::spawn(async move {
            // A task of its own, so that a panic is seen as well.
            match tokio::spawn(feeding.run()).await {
                Ok(Ok(())) => {}
                Ok(Err(error)) => health.fail(format!("the feed: {error}")),
                Err(error) => health.fail(format!("the feed: {error}")),
            }
        });
        let statuses = Arc::new(StatusHub::new(reader.clone(), self.ledger.committee().members().len()));
        let health = Arc::clone(self.ledger.health());
        let pool = VerifyPool::start(self.ledger.inputs(), self.ledger.committee().members().len(), health)
            .map_err(io("starting the verify pool"))?;
        let handler =
            Arc::new(UTXOProtocolHandler::new(Arc::clone(&self.ledger), statuses.clone(), feed.clone(), pool));
        self.peers.set_handler(handler.clone());
        let is_member = self.ledger.health().voting() != Voting::Observer;
        let outbox = Outbox { peers: Arc::clone(&self.peers), statuses, feed, reader, is_member };
        self.ledger.start(outbox).map_err(io("starting the ledger"))?;
        let http = http.map(|listener| {
            let (id, peers) = (self.id.clone(), Arc::clone(&self.peers));
            http::serve(listener, http::Observed { id, handler: handler.clone(), peers })
        });
        if self.running.set(Running { handler: handler.clone(), bound, http }).is_err() {
            return Err(NodeError::NotRunning);
        }

        if let Some(listener) = p2p {
            self.peers.listen_for_peers(listener);
        }
        if let Some(listener) = websocket {
            self.peers.listen_for_wallets(listener);
        }
        self.peers.dial_members();
        tokio::spawn(keep_house(Arc::downgrade(&handler)));
        tokio::spawn(prune::forget(Arc::downgrade(&handler)));
        tokio::spawn(follow(Arc::downgrade(&handler), Arc::clone(&self.peers)));
        tracing::info!(
            id = %self.id,
            p2p = bound.p2p.map(tracing::field::display),
            http = bound.http.map(tracing::field::display),
            websocket = bound.websocket.map(tracing::field::display),
            "node started"
        );
        Ok(())
    }

    fn running(&self) -> Result<&Running, NodeError> {
        self.running.get().ok_or(NodeError::NotRunning)
    }

    /// The node's name.
    pub fn id(&self) -> &str {
        &self.id
    }

    /// Its ledger.
    pub const fn ledger(&self) -> &Arc<UTXOStateManager> {
        &self.ledger
    }

    /// Its connections.
    pub const fn peers(&self) -> &Arc<PeerManager> {
        &self.peers
    }

    /// Where it really listens.
    pub fn bound(&self) -> Result<Listen, NodeError> {
        self.running().map(|running| running.bound)
    }

    /// Validates a transaction, locks its inputs, broadcasts it and votes. Done when that
    /// is durable (`Pending`, or a later status); finality follows by itself.
    pub async fn process_transaction(&self, transaction: &RawTransaction) -> Result<TransactionStatus, NodeError> {
        let message = NetworkMessage::TransactionBroadcast(transaction.clone());
        match self.ask(message, SocketAddr::V4(SocketAddrV4::new(Ipv4Addr::LOCALHOST, 0))).await? {
            Some(NetworkMessage::TransactionStatus(status)) => match (status.status, status.rejection.clone()) {
                (TransactionStatusKind::Rejected, Some(rejection)) => Err(NodeError::Rejected(rejection)),
                _ => Ok(*status),
            },
            Some(NetworkMessage::Error(error)) => Err(NodeError::Refused(error)),
            _ => Err(NodeError::NoAnswer),
        }
    }

    /// Handles a message as if a wallet at `peer` had sent it; gives the first answer, if
    /// the message has one.
    pub async fn handle_network_message(
        &self,
        message: &NetworkMessage,
        peer: SocketAddr,
    ) -> Result<Option<NetworkMessage>, NodeError> {
        self.ask(message.clone(), peer).await
    }

    async fn ask(&self, message: NetworkMessage, peer: SocketAddr) -> Result<Option<NetworkMessage>, NodeError> {
        let handler = &self.running()?.handler;
        let mut mailbox = Mailbox::open(&self.peers, peer);
        let connection = Arc::clone(mailbox.connection());
        // The answer is taken while it is made: a long one would not fit into the queue.
        let mut handled = handler.handle(&connection, Incoming { message, request_id: None }, 0);
        let answered = async {
            tokio::select! {
                answer = mailbox.next() => return answer,
                () = &mut handled => {}
            }
            mailbox.next().await
        };
        let answer = timeout(ANSWER_WAIT, answered).await;
        drop(handled);
        drop(mailbox);
        handler.disconnected(&connection);
        Ok(answer.unwrap_or(None))
    }

    /// Counters.
    pub fn stats(&self) -> Result<NodeStats, NodeError> {
        use std::sync::atomic::Ordering::Relaxed;
        let handler = &self.running()?.handler;
        let health = self.ledger.health();
        Ok(NodeStats {
            in_flight: health.in_flight(),
            finalized: health.finalized.load(Relaxed),
            commits: health.commits.load(Relaxed),
            connected_members: self.peers.connected_members().len(),
            connections: self.peers.connection_count(),
            subscriptions: handler.feed.connected(),
            notifications: handler.feed.delivered(),
        })
    }

    /// Why the node is not ready to serve wallets; empty if it is.
    pub fn not_ready(&self) -> Result<Vec<String>, NodeError> {
        let handler = &self.running()?.handler;
        Ok(not_ready(handler, &self.peers))
    }

    /// Waits until the node has stopped: `Err` if it had to.
    pub async fn stopped(&self) -> Result<(), String> {
        self.ledger.health().stopped().await
    }

    /// Stops cleanly: no more messages, what is queued is committed, then the end.
    pub async fn shutdown(&self) {
        self.peers.stop();
        let ledger = Arc::clone(&self.ledger);
        if let Err(error) = tokio::task::spawn_blocking(move || ledger.stop()).await {
            tracing::error!(%error, "stopping the ledger failed");
        }
        // The feed's events are drained until the writer has ended: dropping sled's
        // subscriber while the writer waits for it would stop both for ever.
        if let Ok(running) = self.running() {
            running.handler.feed.stop();
            running.handler.pool.stop();
            if let Some(http) = &running.http {
                http.abort();
            }
        }
    }
}

async fn bind(what: &str, address: Option<SocketAddr>) -> Result<Option<TcpListener>, NodeError> {
    let Some(address) = address else { return Ok(None) };
    let error = |source| NodeError::Io { what: format!("listening for {what} on {address}"), source };
    TcpListener::bind(address).await.map(Some).map_err(error)
}

/// Reasons why wallets had better use another node.
fn not_ready(handler: &UTXOProtocolHandler, peers: &PeerManager) -> Vec<String> {
    let mut reasons = Vec::new();
    let committee = handler.ledger.committee();
    let voting = handler.ledger.health().voting();
    let own = handler.ledger.reader().network().public_key.and_then(|key| committee.index_of(&key));
    let connected: u64 = peers.connected_members().into_iter().map(|member| committee.weight(member)).sum();
    let reached = connected + own.map_or(0, |own| committee.weight(own));
    if reached < committee.quorum() {
        reasons.push(format!(
            "no quorum of peers: weight {reached} of {} is connected, {} is needed",
            committee.total_weight(),
            committee.quorum()
        ));
    } else if handler.ledger.health().is_behind() {
        let health = handler.ledger.health();
        reasons.push(format!("catching up with blocks: {} of {}", health.height(), health.goal()));
    } else if !handler.sync.is_complete(own) {
        reasons.push("catching up with what is final".into());
    }
    match voting {
        Voting::Active | Voting::Observer => {}
        Voting::Fencing if handler.ledger.can_be_fenced() => {
            reasons.push("its votes were lost: asking the other members what it must not vote on".into());
        }
        Voting::Fencing => reasons.push(
            "its votes were lost, and without it there is no quorum that could say what it must not vote on: \
             this network does not survive the loss"
                .into(),
        ),
        Voting::Suspended(reason) => reasons.push(format!("not voting because {reason}; see `time-db repair`")),
    }
    reasons
}

/// How a node hears of what is final elsewhere, as long as it lives.
async fn follow(handler: std::sync::Weak<UTXOProtocolHandler>, peers: Arc<PeerManager>) {
    loop {
        tokio::time::sleep(OBSERVE_EVERY).await;
        let Some(handler) = handler.upgrade() else { return };
        let observer = handler.ledger.health().voting() == Voting::Observer;
        handler.ask_for_news(&peers, observer);
    }
}

/// What is done now and then, as long as the node lives.
async fn keep_house(handler: std::sync::Weak<UTXOProtocolHandler>) {
    loop {
        tokio::time::sleep(HOUSEKEEPING_EVERY).await;
        let Some(handler) = handler.upgrade() else { return };
        handler.tend_subscriptions(clock::unix_now()).await;
    }
}
