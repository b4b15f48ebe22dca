//! One change of one coin, told to 1, 100 and 10,000 subscriptions.
//!
//! The feed is the node's own affair, so the node is measured: a network of one member, in
//! this process, with a database and a socket, and wallets on up to ten connections. The
//! clock runs from a payment's broadcast until every subscription of its payee has been told
//! of the new coin. With one subscription that is the three commits and little else; what
//! more of them take beyond that is reading the log, matching, encoding and the sockets, on
//! both sides. The wallets here do not parse what they are told.

mod support;

use std::sync::Arc;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, SamplingMode, Throughput};
use futures_util::StreamExt;
use support::{Coin, FEE, PAID, Setting, directory};
use time_masternode::net::{NetworkMessage, PeerConfig, PeerManager, UTXOSubscribe, encode};
use time_masternode::node::{LedgerConfig, Listen, MasternodeUTXOIntegration, UTXOStateManager};
use time_masternode::types::OutPoint;
use tokio::net::TcpStream;
use tokio::runtime::Runtime;
use tokio::sync::mpsc;
use tokio_tungstenite::tungstenite::{Message, Utf8Bytes};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

type Socket = WebSocketStream<MaybeTlsStream<TcpStream>>;

/// Who is paid.
const PAYEE: u32 = 1;
/// Live subscriptions of one connection; fewer than may be.
const SUBSCRIPTIONS_PER_CONNECTION: usize = 1_000;

fn main() {
    let mut criterion = support::criterion();
    changes(&mut criterion);
    criterion.final_summary();
}

fn changes(criterion: &mut Criterion) {
    let runtime = Runtime::new().expect("threads");
    let mut group = criterion.benchmark_group("feed");
    group.sample_size(20).sampling_mode(SamplingMode::Flat);
    for subscriptions in [1, 100, 10_000] {
        let mut fed = None;
        group.throughput(Throughput::Elements(subscriptions as u64));
        group.bench_function(BenchmarkId::new("subscriptions", subscriptions), |b| {
            let fed = fed.get_or_insert_with(|| runtime.block_on(Fed::new(subscriptions)));
            b.iter_custom(|rounds| {
                runtime.block_on(async {
                    let mut took = Duration::ZERO;
                    for _ in 0..rounds {
                        took += fed.pay().await;
                    }
                    took
                })
            });
        });
        if let Some(fed) = fed {
            runtime.block_on(fed.node.shutdown());
        }
    }
    group.finish();
}

/// A node with subscribed wallets.
struct Fed {
    setting: Arc<Setting>,
    node: MasternodeUTXOIntegration,
    coin: Coin,
    connections: usize,
    /// Gets one for each connection whose subscriptions have all been told of a payment.
    told: mpsc::UnboundedReceiver<()>,
    _directory: tempfile::TempDir,
}

impl Fed {
    async fn new(subscriptions: usize) -> Self {
        let (setting, directory) = (Setting::new(1, [0]), directory());
        let node = node(&setting, &directory).await;
        let address = node.bound().expect("it runs").websocket.expect("it listens").to_string();
        let (tell, told) = mpsc::unbounded_channel();
        let numbers: Vec<_> = (0..subscriptions).collect();
        let mut subscribing = Vec::new();
        for numbers in numbers.chunks(SUBSCRIPTIONS_PER_CONNECTION) {
            subscribing.push(tokio::spawn(subscribe(address.clone(), numbers.to_vec())));
        }
        let connections = subscribing.len();
        for socket in subscribing {
            let (socket, share) = socket.await.expect("it subscribes");
            tokio::spawn(hear(socket, share, tell.clone()));
        }
        let coin = setting.coins(1)[0];
        Self { setting, node, coin, connections, told, _directory: directory }
    }

    /// One payment, until everybody has been told.
    async fn pay(&mut self) -> Duration {
        let payment = self.setting.pay(&[self.coin], support::address(PAYEE));
        let raw = payment.to_raw();
        let began = Instant::now();
        self.node.process_transaction(&raw).await.expect("it is valid");
        for _ in 0..self.connections {
            self.told.recv().await.expect("nobody hangs up");
        }
        let took = began.elapsed();
        let outpoint = OutPoint { txid: payment.txid(), vout: 1 };
        self.coin = Coin { outpoint, units: self.coin.units - PAID - FEE };
        took
    }
}

async fn node(setting: &Setting, directory: &tempfile::TempDir) -> MasternodeUTXOIntegration {
    let (committee, key) = (Arc::clone(&setting.committee), setting.keys[0].clone());
    let peers = PeerManager::new(PeerConfig::new(setting.genesis.network(), committee, Some(key.clone())));
    let ledger = UTXOStateManager::open(LedgerConfig {
        id: "member-0".into(),
        data_dir: directory.path().to_path_buf(),
        genesis: setting.genesis.clone(),
        key: Some(key),
        cache_bytes: 128 * 1024 * 1024,
        first_start: true,
        retention_blocks: None,
        compact_above_bytes: None,
    });
    let listen = Listen { websocket: Some(([127, 0, 0, 1], 0).into()), ..Listen::default() };
    let ledger = Arc::new(ledger.expect("the database opens"));
    let node = MasternodeUTXOIntegration::new("member-0".into(), ledger, Arc::new(peers)).listening(listen);
    node.initialize().await.expect("it starts");
    node
}

/// Subscribes to the payee's address, under these numbers, on one connection.
async fn subscribe(address: String, numbers: Vec<usize>) -> (Socket, usize) {
    use futures_util::SinkExt;
    let (mut socket, _) = tokio_tungstenite::connect_async(format!("ws://{address}")).await.expect("it connects");
    for number in &numbers {
        let request = NetworkMessage::UTXOSubscribe(UTXOSubscribe {
            subscriber_id: format!("wallet-{number}"),
            outpoints: Vec::new(),
            addresses: vec![support::address(PAYEE).to_string()],
            resume_token: None,
            resume_from: None,
            log_id: None,
        });
        let text = Utf8Bytes::try_from(encode(&request, None)).expect("JSON is text");
        socket.send(Message::Text(text)).await.expect("it is sent");
        next(&mut socket, "UTXOSubscribed").await;
    }
    (socket, numbers.len())
}

/// Says so each time that all of a connection's subscriptions have been told of a change.
async fn hear(mut socket: Socket, share: usize, tell: mpsc::UnboundedSender<()>) {
    loop {
        for _ in 0..share {
            next(&mut socket, "UTXOStateNotification").await;
        }
        if tell.send(()).is_err() {
            return;
        }
    }
}

/// Waits for a message of this name. A node that stops ends the waiting for ever.
async fn next(socket: &mut Socket, name: &str) {
    while let Some(message) = socket.next().await {
        match message {
            Ok(Message::Text(text)) if text.as_str()[2..].starts_with(name) => return,
            Ok(_) => {}
            Err(_) => break,
        }
    }
    std::future::pending().await
}
