//! The operator's port: liveness, readiness, metrics, status. Read-only, and bounded in
//! connections, head size and time.

use std::convert::Infallible;
use std::sync::Arc;
use std::sync::atomic::Ordering::Relaxed;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::CONTENT_TYPE;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::registry::Registry;
use serde::Serialize;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio::time::timeout;

use super::{UTXOProtocolHandler, not_ready};
use crate::consensus::{FenceState, Voting};
use crate::limits::{HANDSHAKE_TIMEOUT, MAX_HTTP_CONNECTIONS, MAX_HTTP_HEAD_BYTES, SILENCE_TIMEOUT};
use crate::net::PeerManager;
use crate::types::{GenesisHash, Height, Network, PublicKey, UnixSeconds};

/// What the port shows.
#[derive(Debug, Clone)]
pub(super) struct Observed {
    pub(super) id: String,
    pub(super) handler: Arc<UTXOProtocolHandler>,
    pub(super) peers: Arc<PeerManager>,
}

/// A member's fence: what it must not vote on, because it may have voted on it and lost it.
#[derive(Debug, Clone, Copy, Serialize)]
pub struct FenceStatus {
    /// Whether the other members have said all that is to be behind it.
    pub standing: bool,
    /// Outpoints behind it.
    pub fenced: u64,
    /// The first height at which the member takes part in agreeing on a block again.
    pub agrees_from: Option<Height>,
}

/// The answer of `/status`.
#[derive(Debug, Clone, Serialize)]
pub struct NodeStatus {
    /// The node's name.
    pub id: String,
    /// A member's key.
    pub public_key: Option<PublicKey>,
    /// Which network.
    pub network: Network,
    /// Which one exactly.
    pub genesis_hash: GenesisHash,
    /// `Active`, `Observer`, `Fencing` (votes were lost, and it asks what it must not vote
    /// on), or why it does not vote.
    pub voting: String,
    /// The fence, if votes were lost.
    pub fence: Option<FenceStatus>,
    /// The height of its chain; 0 before the first block.
    pub height: Height,
    /// The ids of the connected members.
    pub peers: Vec<String>,
    /// The members there are.
    pub masternodes: usize,
    /// Connections of all kinds.
    pub connections: usize,
    /// Transactions in flight.
    pub in_flight: usize,
    /// The number of the last durable commit.
    pub commit: u64,
    /// When that was, Unix seconds; 0 if not since the start.
    pub last_commit_at: UnixSeconds,
    /// The last sequence of the change log.
    pub sequence: u64,
    /// Subscriptions that are remembered.
    pub subscriptions: usize,
    /// Whether `/readyz` says so.
    pub ready: bool,
    /// Why not.
    pub not_ready: Vec<String>,
    /// The program's version.
    pub version: &'static str,
}

/// Serves the port until the task is aborted.
pub(super) fn serve(listener: TcpListener, observed: Observed) -> tokio::task::AbortHandle {
    let serving = tokio::spawn(async move {
        let places = Arc::new(Semaphore::new(MAX_HTTP_CONNECTIONS));
        loop {
            let Ok(place) = Arc::clone(&places).acquire_owned().await else { return };
            let stream = match listener.accept().await {
                Ok((stream, _)) => stream,
                Err(error) => {
                    tracing::warn!(%error, "cannot accept an HTTP connection");
                    tokio::time::sleep(std::time::Duration::from_millis(100)).await;
                    continue;
                }
            };
            let observed = observed.clone();
            tokio::spawn(async move {
                let answer = service_fn(move |request| {
                    let response = respond(&observed, &request);
                    std::future::ready(Ok::<_, Infallible>(response))
                });
                let served = hyper::server::conn::http1::Builder::new()
                    .timer(TokioTimer::new())
                    .header_read_timeout(HANDSHAKE_TIMEOUT)
                    .max_buf_size(MAX_HTTP_HEAD_BYTES)
                    .serve_connection(TokioIo::new(stream), answer);
                // A client's broken connection is its own affair.
                let _ended = timeout(SILENCE_TIMEOUT, served).await.is_ok();
                drop(place);
            });
        }
    });
    serving.abort_handle()
}

fn respond(observed: &Observed, request: &Request<Incoming>) -> Response<Full<Bytes>> {
    const JSON: &str = "application/json";
    const TEXT: &str = "text/plain; charset=utf-8";
    if request.method() != Method::GET && request.method() != Method::HEAD {
        return answer(StatusCode::METHOD_NOT_ALLOWED, TEXT, "only GET\n".into());
    }
    match request.uri().path() {
        "/livez" => answer(StatusCode::OK, TEXT, "alive\n".into()),
        "/readyz" => {
            let reasons = not_ready(&observed.handler, &observed.peers);
            let status = if reasons.is_empty() { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
            let body = serde_json::json!({ "ready": reasons.is_empty(), "reasons": reasons });
            answer(status, JSON, body.to_string())
        }
        "/status" => answer(StatusCode::OK, JSON, serde_json::to_string(&status(observed)).unwrap_or_default()),
        "/metrics" => {
            answer(StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", metrics(observed))
        }
        _ => answer(StatusCode::NOT_FOUND, TEXT, "try /livez, /readyz, /metrics or /status\n".into()),
    }
}

fn answer(status: StatusCode, content_type: &'static str, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(content_type));
    response
}

fn status(observed: &Observed) -> NodeStatus {
    let ledger = &observed.handler.ledger;
    let (health, network) = (ledger.health(), ledger.reader().network());
    let head = ledger.reader().durable_head();
    let reasons = not_ready(&observed.handler, &observed.peers);
    let members = ledger.committee();
    NodeStatus {
        id: observed.id.clone(),
        public_key: network.public_key,
        network: network.network,
        genesis_hash: network.genesis_hash,
        voting: match health.voting() {
            Voting::Active => "Active".into(),
            Voting::Observer => "Observer".into(),
            Voting::Fencing => "Fencing".into(),
            Voting::Suspended(reason) => format!("Suspended: {reason}"),
        },
        fence: health.fence().map(|(state, fenced)| FenceStatus {
            standing: state != FenceState::Asking,
            fenced,
            agrees_from: state.agrees_from(),
        }),
        height: head.height,
        peers: observed.peers.connected_members().into_iter().map(|m| members.member(m).id.clone()).collect(),
        masternodes: members.members().len(),
        connections: observed.peers.connection_count(),
        in_flight: health.in_flight(),
        commit: head.commit,
        last_commit_at: health.last_commit.load(Relaxed),
        sequence: head.sequence,
        subscriptions: observed.handler.feed.stored.load(Relaxed),
        ready: reasons.is_empty(),
        not_ready: reasons,
        version: env!("CARGO_PKG_VERSION"),
    }
}

/// Prometheus' (OpenMetrics') text, made anew for each scrape from the node's counters.
fn metrics(observed: &Observed) -> String {
    let ledger = &observed.handler.ledger;
    let health = ledger.health();
    let mut registry = Registry::with_prefix("time");
    let mut gauge = |name: &str, help: &str, value: u64| {
        let gauge: Gauge = Gauge::default();
        gauge.set(i64::try_from(value).unwrap_or(i64::MAX));
        registry.register(name, help, gauge);
    };
    gauge("in_flight", "Transactions in flight", health.in_flight() as u64);
    gauge("connected_members", "Members that are connected", observed.peers.connected_members().len() as u64);
    gauge("connections", "Connections of all kinds", observed.peers.connection_count() as u64);
    gauge(
        "subscriptions_connected",
        "Subscriptions whose wallet is connected",
        observed.handler.feed.connected() as u64,
    );
    gauge(
        "subscriptions_stored",
        "Subscriptions that are remembered",
        observed.handler.feed.stored.load(Relaxed) as u64,
    );
    gauge(
        "change_log_sequence",
        "The last durable sequence of the change log",
        ledger.reader().durable_head().sequence,
    );
    gauge("unconfirmed", "Final transactions that no block contains yet", health.unconfirmed.load(Relaxed) as u64);
    gauge("chain_height", "The height of the last block", ledger.reader().durable_head().height);
    gauge("chain_goal", "The height of the chain, as far as members say", health.goal());
    gauge("ready", "Whether the node is ready", u64::from(not_ready(&observed.handler, &observed.peers).is_empty()));
    // The fence is written down first, so it is read last.
    gauge("voting", "Whether the node votes", u64::from(health.voting() == Voting::Active));
    gauge("fenced_outpoints", "Outputs that this member must not vote on", health.fence().map_or(0, |(_, n)| n));
    gauge("database_bytes", "Bytes of the database on disk", ledger.reader().size_on_disk(ledger.data_dir()));
    gauge(
        "database_compaction_due",
        "Whether it is time to make the database compact",
        u64::from(health.renewal().due),
    );
    gauge(
        "last_commit_timestamp_seconds",
        "When the last commit became durable",
        u64::try_from(health.last_commit.load(Relaxed)).unwrap_or(0),
    );
    let mut counter = |name: &str, help: &str, value: u64| {
        let counter: Counter = Counter::default();
        counter.inc_by(value);
        registry.register(name, help, counter);
    };
    counter("finalized", "Transactions that became final", health.finalized.load(Relaxed));
    counter("equivocations", "Heights at which a member said two things at once", health.equivocations.load(Relaxed));
    counter("votes", "Votes that this node cast", health.votes.load(Relaxed));
    counter("commits", "Durable commits", health.commits.load(Relaxed));
    counter("commit_microseconds", "Time spent in durable commits", health.commit_micros.load(Relaxed));
    counter("database_compactions", "How often the database was made compact", health.renewal().renewed);
    counter("notifications", "Notifications sent to wallets", observed.handler.feed.delivered());
    let (members, others) = (observed.peers.member_traffic(), observed.peers.stranger_traffic());
    counter("member_bytes_received", "Bytes of messages from members", members.received());
    counter("member_bytes_sent", "Bytes of messages to members", members.sent());
    counter("wallet_bytes_received", "Bytes of messages from wallets and observers", others.received());
    counter("wallet_bytes_sent", "Bytes of messages to wallets and observers", others.sent());
    let mut text = String::new();
    match encode(&mut text, &registry) {
        Ok(()) => text,
        Err(error) => format!("# {error}\n"),
    }
}
