//! Real networks for tests: a process for each masternode, real sockets, real databases.
//!
//! Waiting is always for a condition, with a generous deadline that only a broken program
//! reaches. Nothing here measures time.
#![allow(dead_code, reason = "each test file uses a part of it")]

use std::collections::BTreeMap;
use std::future::Future;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use rustix::fs::{FlockOperation, flock};
use time_masternode::config::read_genesis;
use time_masternode::consensus::Committee;
use time_masternode::devnet::{Devnet, DevnetOptions};
use time_masternode::keyfile::KeyFile;
use time_masternode::limits::MAX_FRAME_BYTES;
use time_masternode::net::{
    AddressQuery, AddressResponse, Authenticate, ErrorCode, ErrorMessage, Hello, Incoming, NetworkMessage,
    PROTOCOL_VERSION, Role, StateEntry, TransactionStatus, TransactionStatusKind, TransactionStatusQuery,
    UTXOStateQuery, WalletClient, encode, handshake_message, parse, read_frame, write_frame,
};
use time_masternode::types::{
    Address, Amount, Genesis, Hash32, Input, OutPoint, Output, SecretKey, Signature, Transaction, Txid, UTXOState,
    sighash,
};
use tokio::io::AsyncWriteExt;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream};

/// How long anything may take before the program counts as broken.
pub const DEADLINE: Duration = Duration::from_secs(180);

/// Waits for a future; a broken program fails the test instead of hanging it.
pub async fn within<T>(what: &str, future: impl Future<Output = T>) -> T {
    match tokio::time::timeout(DEADLINE, future).await {
        Ok(value) => value,
        Err(_) => panic!("{what}: not within {DEADLINE:?}"),
    }
}

/// Asks again and again until `condition` gives something.
pub fn until<T>(what: &str, mut condition: impl FnMut() -> Option<T>) -> T {
    let began = Instant::now();
    loop {
        if let Some(value) = condition() {
            return value;
        }
        assert!(began.elapsed() < DEADLINE, "{what}: not within {DEADLINE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// SIGTERM.
pub fn terminate(child: &Child) {
    rustix::process::kill_process(rustix::process::Pid::from_child(child), rustix::process::Signal::TERM).unwrap();
}

/// A process that does not outlive the test, also if that fails.
pub struct Guarded(pub Child);

impl Guarded {
    /// `kill -9`.
    pub fn kill(mut self) {
        self.0.kill().unwrap();
        self.0.wait().unwrap();
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        let _killed = self.0.kill().is_ok() && self.0.wait().is_ok();
    }
}

/// Waits until nobody has the database in `data_dir` open. sled's threads hold its lock for a
/// moment after its last handle is gone, and look into a file that another process opens.
pub fn until_closed(data_dir: &Path) {
    let file = std::fs::File::open(data_dir.join("db").join("db")).unwrap();
    flock(file, FlockOperation::LockExclusive).unwrap();
}

/// Changes a database that is not open behind the programs' back, in sled itself.
pub fn in_sled<T>(data_dir: &Path, change: impl FnOnce(&sled::Db) -> T) -> T {
    until_closed(data_dir);
    let db = sled::Config::new().path(data_dir.join("db")).flush_every_ms(None).open().unwrap();
    let outcome = change(&db);
    db.flush().unwrap();
    drop(db);
    until_closed(data_dir);
    outcome
}

/// From which the system takes ports for outgoing connections, which a node may find in its place.
fn outgoing_ports() -> Range<u16> {
    let told = std::fs::read_to_string("/proc/sys/net/ipv4/ip_local_port_range").unwrap_or_default();
    let mut ports = told.split_whitespace().filter_map(|port| port.parse().ok());
    ports.next().unwrap_or(32_768)..ports.next().unwrap_or(60_999)
}

/// A port from which on 10 ports for each of `nodes` nodes are free right now, and are given to no
/// other test of this process, which may not have bound them yet.
pub fn free_base_port(nodes: u16) -> u16 {
    static GIVEN: Mutex<Vec<Range<u16>>> = Mutex::new(Vec::new());
    let mut given = GIVEN.lock().unwrap_or_else(PoisonError::into_inner);
    let outgoing = outgoing_ports();
    let overlap = |a: &Range<u16>, b: &Range<u16>| a.start < b.end && b.start < a.end;
    for attempt in 0..1_000 {
        let base = rand::random_range(10_000..60_000);
        let range = base..base + 10 * nodes;
        // Somewhere else only if there is nothing else.
        let taken = attempt < 500 && overlap(&outgoing, &range);
        if taken || given.iter().any(|other| overlap(other, &range)) {
            continue;
        }
        let ports = (0..nodes).flat_map(|i| (0..3).map(move |p| base + 10 * i + p));
        let held: Result<Vec<_>, _> = ports.map(|port| TcpListener::bind(("127.0.0.1", port))).collect();
        if held.is_ok() {
            given.push(range);
            return base;
        }
    }
    panic!("no free ports");
}

/// A plain HTTP GET: status code and body; `None` if nobody listens.
pub fn http_get(address: &str, path: &str) -> Option<(u16, String)> {
    let mut stream = TcpStream::connect(address).ok()?;
    stream.set_read_timeout(Some(DEADLINE)).ok()?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    let (head, body) = text.split_once("\r\n\r\n")?;
    let code = head.split_whitespace().nth(1)?.parse().ok()?;
    Some((code, body.to_owned()))
}

/// A coin and who can spend it.
#[derive(Clone)]
pub struct Coin {
    pub outpoint: OutPoint,
    pub amount: Amount,
    pub key: SecretKey,
}

/// A devnet on disk whose nodes run as processes of their own.
pub struct TestNet {
    directory: tempfile::TempDir,
    pub devnet: Devnet,
    pub genesis: Genesis,
    nodes: Vec<Option<Child>>,
    environment: Vec<(String, String)>,
}

impl TestNet {
    /// Writes the files; nothing runs yet.
    pub fn new(nodes: u16) -> Self {
        Self::with_interval(nodes, 1_000)
    }

    /// The same with another time between blocks.
    pub fn with_interval(nodes: u16, block_interval_ms: u64) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let options = DevnetOptions { nodes, base_port: free_base_port(nodes), block_interval_ms };
        let devnet = Devnet::open(directory.path(), options).unwrap();
        let genesis = read_genesis(&directory.path().join(&devnet.genesis_file)).unwrap();
        Self { directory, nodes: devnet.nodes.iter().map(|_| None).collect(), devnet, genesis, environment: Vec::new() }
    }

    /// A devnet that was made before, as it lies in `directory`, on ports of its own. Members
    /// still dial each other where the genesis says, and do not find each other there.
    pub fn of(directory: tempfile::TempDir) -> Self {
        let path = directory.path().join(time_masternode::devnet::FILE_NAME);
        let before: Devnet = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
        let port = |address: &str| address.rsplit_once(':').unwrap().1.parse::<u16>().unwrap();
        let old = port(&before.nodes[0].p2p_address);
        let nodes = u16::try_from(before.nodes.len()).unwrap();
        let new = free_base_port(nodes);
        let configurations = before.nodes.iter().map(|node| directory.path().join(&node.config_file));
        for file in configurations.filter(|file| file.exists()).chain([path]) {
            let mut text = std::fs::read_to_string(&file).unwrap();
            for offset in (0..nodes).flat_map(|i| (0..3).map(move |p| 10 * i + p)) {
                text = text.replace(&format!("127.0.0.1:{}\"", old + offset), &format!("127.0.0.1:{}\"", new + offset));
            }
            std::fs::write(file, text).unwrap();
        }
        let options = DevnetOptions { nodes, base_port: new, block_interval_ms: 1_000 };
        let devnet = Devnet::open(directory.path(), options).unwrap();
        let genesis = read_genesis(&directory.path().join(&devnet.genesis_file)).unwrap();
        Self { directory, nodes: devnet.nodes.iter().map(|_| None).collect(), devnet, genesis, environment: Vec::new() }
    }

    /// Gives a variable to every process that is started from now on.
    pub fn set_environment(&mut self, name: &str, value: &str) {
        self.environment.push((name.to_owned(), value.to_owned()));
    }

    /// The secret key of a member, from its file.
    pub fn member_key(&self, node: usize) -> SecretKey {
        let path = self.directory().join(&self.devnet.nodes[node].id).join("masternode.key");
        KeyFile::read(&path).unwrap().unlock(|| panic!("a devnet's key files are not encrypted")).unwrap()
    }

    /// The same with all nodes running and connected.
    pub fn running(nodes: u16) -> Self {
        let mut net = Self::new(nodes);
        net.start_all();
        net
    }

    /// The same, with an hour between blocks: for tests of what happens before them.
    pub fn without_blocks(nodes: u16) -> Self {
        let mut net = Self::with_interval(nodes, 3_600_000);
        net.start_all();
        net
    }

    pub fn directory(&self) -> &Path {
        self.directory.path()
    }

    pub fn data_dir(&self, node: usize) -> PathBuf {
        self.directory().join(&self.devnet.nodes[node].data_dir)
    }

    pub fn committee(&self) -> Committee {
        Committee::of_genesis(&self.genesis)
    }

    /// Starts a node's process.
    pub fn start(&mut self, node: usize) {
        assert!(self.nodes[node].is_none(), "node {node} runs already");
        let log = std::fs::File::create(self.directory().join(format!("node-{node}.log"))).unwrap();
        let child = Command::new(env!("CARGO_BIN_EXE_time-masternode"))
            .args(["run", "--log", "info", "--config"])
            .arg(self.directory().join(&self.devnet.nodes[node].config_file))
            .envs(self.environment.iter().map(|(name, value)| (name, value)))
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(log)
            .spawn()
            .unwrap();
        self.nodes[node] = Some(child);
    }

    pub fn start_all(&mut self) {
        for node in 0..self.nodes.len() {
            self.start(node);
        }
        self.wait_ready(&(0..self.nodes.len()).collect::<Vec<_>>());
    }

    /// Waits until these nodes say that they are ready and see each other.
    pub fn wait_ready(&mut self, nodes: &[usize]) {
        for &node in nodes {
            until(&format!("node {node} is ready with {} peers", nodes.len() - 1), || {
                if let Some(status) = self.nodes[node].as_mut().and_then(|child| child.try_wait().unwrap()) {
                    panic!("node {node} ended with {status}:\n{}", self.log(node));
                }
                let status = self.http(node, "/status")?;
                let status: serde_json::Value = serde_json::from_str(&status.1).ok()?;
                let peers = status["peers"].as_array()?.len();
                (status["ready"] == true && peers + 1 >= nodes.len()).then_some(())
            });
        }
    }

    pub fn log(&self, node: usize) -> String {
        std::fs::read_to_string(self.directory().join(format!("node-{node}.log"))).unwrap_or_default()
    }

    /// `kill -9`.
    pub fn kill(&mut self, node: usize) {
        let mut child = self.nodes[node].take().unwrap();
        child.kill().unwrap();
        child.wait().unwrap();
    }

    /// A clean stop by SIGTERM; the exit code has to be 0.
    pub fn stop(&mut self, node: usize) {
        let mut child = self.nodes[node].take().unwrap();
        terminate(&child);
        let status = until("the node stops", || child.try_wait().unwrap());
        assert!(status.success(), "node {node} ended with {status}:\n{}", self.log(node));
    }

    pub fn is_running(&mut self, node: usize) -> bool {
        self.nodes[node].as_mut().is_some_and(|child| child.try_wait().unwrap().is_none())
    }

    /// By thread of a node's process whose name begins with this: how often it has waited for something.
    #[cfg(target_os = "linux")]
    pub fn waits(&self, node: usize, name: &str) -> BTreeMap<String, u64> {
        let pid = self.nodes[node].as_ref().unwrap().id();
        let threads = std::fs::read_dir(format!("/proc/{pid}/task")).unwrap();
        // A thread may have ended meanwhile.
        let statuses = threads.filter_map(|thread| std::fs::read_to_string(thread.ok()?.path().join("status")).ok());
        let waits = |status: String| {
            let value = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap().trim().to_owned();
            (value("Name:"), value("voluntary_ctxt_switches:").parse().unwrap())
        };
        statuses.map(waits).filter(|(thread, _)| thread.starts_with(name)).collect()
    }

    /// Resident memory of a node's process in bytes.
    pub fn resident(&self, node: usize) -> u64 {
        let pid = self.nodes[node].as_ref().unwrap().id();
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// A plain HTTP GET: status code and body; `None` if nobody listens.
    pub fn http(&self, node: usize, path: &str) -> Option<(u16, String)> {
        http_get(&self.devnet.nodes[node].http_address, path)
    }

    /// The node's own counters and states, from `/status`.
    pub fn status(&self, node: usize) -> serde_json::Value {
        serde_json::from_str(&self.http(node, "/status").unwrap().1).unwrap()
    }

    /// The records of a tree of a stopped node, by `time-db dump`.
    pub fn dump(&self, node: usize, tree: &str) -> Vec<serde_json::Value> {
        let output = Command::new(env!("CARGO_BIN_EXE_time-db"))
            .arg("--data-dir")
            .arg(self.data_dir(node))
            .args(["dump", "--format", "json", "--tree", tree])
            .output()
            .unwrap();
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// A wallet's connection to a node.
    pub async fn wallet(&self, node: usize) -> Wallet {
        Wallet::at(&self.devnet.nodes[node].websocket_address).await
    }

    /// The first coins, each with its key.
    pub fn coins(&self) -> Vec<Coin> {
        let keys = self.devnet.wallets.iter().map(|wallet| SecretKey::from_hex(&wallet.secret_seed).unwrap());
        let outputs = self.genesis.transaction().creates();
        outputs.zip(keys).map(|((outpoint, output), key)| Coin { outpoint, amount: output.amount, key }).collect()
    }

    pub fn address(&self, key: &SecretKey) -> Address {
        Address::of_key(&key.public_key(), self.genesis.network())
    }

    /// A signed transaction.
    pub fn sign(&self, coins: &[Coin], outputs: Vec<Output>, timestamp: i64) -> Transaction {
        let inputs = |signature: &dyn Fn(&Coin) -> Signature| -> Vec<Input> {
            let input = |coin: &Coin| Input {
                previous_output: coin.outpoint,
                public_key: coin.key.public_key(),
                signature: signature(coin),
            };
            coins.iter().map(input).collect()
        };
        let unsigned = Transaction::from_parts(inputs(&|_| Signature::from_bytes([0; 64])), outputs.clone(), timestamp);
        let message = sighash(&self.genesis.hash(), &unsigned.txid());
        Transaction::from_parts(inputs(&|coin| coin.key.sign(&message)), outputs, timestamp)
    }

    /// Splits a coin into `n` equal ones of the same key (and the fee).
    pub fn split(&self, coin: &Coin, n: u64) -> Transaction {
        let each = (coin.amount.units() - self.genesis.min_fee().units()) / n;
        let output = Output { amount: Amount::from_units(each).unwrap(), address: self.address(&coin.key) };
        let outputs = (0..n).map(|_| output).collect();
        self.sign(std::slice::from_ref(coin), outputs, 0)
    }

    /// Pays `units` to `to`, the rest back.
    pub fn pay(&self, coin: &Coin, to: &Address, units: u64) -> Transaction {
        let rest = coin.amount.units() - units - self.genesis.min_fee().units();
        let output = |units, address| Output { amount: Amount::from_units(units).unwrap(), address };
        let outputs = vec![output(units, *to), output(rest, self.address(&coin.key))];
        self.sign(std::slice::from_ref(coin), outputs, 0)
    }

    /// The outputs of a transaction as coins of `key`.
    pub fn outputs(transaction: &Transaction, key: &SecretKey) -> Vec<Coin> {
        let coin = |(outpoint, output): (OutPoint, Output)| Coin { outpoint, amount: output.amount, key: key.clone() };
        transaction.creates().map(coin).collect()
    }
}

impl Drop for TestNet {
    fn drop(&mut self) {
        for child in self.nodes.iter_mut().flatten() {
            // It may have ended by itself; either way it is gone afterwards.
            let _killed = child.kill().is_ok() && child.wait().is_ok();
        }
        if std::thread::panicking() {
            for node in 0..self.nodes.len() {
                let log = self.log(node);
                let tail: Vec<_> = log.lines().rev().take(30).collect();
                eprintln!("--- node {node}");
                tail.iter().rev().for_each(|line| eprintln!("{line}"));
            }
        }
    }
}

/// A wallet over WebSocket.
pub struct Wallet {
    pub client: WalletClient,
}

impl Wallet {
    /// Connects; the node may have been started just now.
    pub async fn at(address: &str) -> Self {
        let connected = async {
            loop {
                match WalletClient::connect(address).await {
                    Ok(client) => return client,
                    Err(_) => tokio::time::sleep(Duration::from_millis(10)).await,
                }
            }
        };
        Self { client: within("connecting", connected).await }
    }

    pub async fn send(&mut self, message: &NetworkMessage) {
        within("sending", self.client.send(message)).await.unwrap();
    }

    /// The first message for which `wanted` gives something; others are dropped.
    pub async fn wait_for<T>(&mut self, what: &str, wanted: impl FnMut(NetworkMessage) -> Option<T>) -> T {
        within(what, self.client.wait_for(wanted)).await.unwrap()
    }

    pub async fn broadcast(&mut self, transaction: &Transaction) {
        self.send(&NetworkMessage::TransactionBroadcast(transaction.to_raw())).await;
    }

    /// The next status of a transaction.
    pub async fn status(&mut self, txid: Txid) -> TransactionStatus {
        self.wait_for("a status", |message| match message {
            NetworkMessage::TransactionStatus(status) if status.txid == txid => Some(*status),
            _ => None,
        })
        .await
    }

    /// The first status that is one of these.
    pub async fn status_of(&mut self, txid: Txid, kinds: &[TransactionStatusKind]) -> TransactionStatus {
        loop {
            let status = self.status(txid).await;
            if kinds.contains(&status.status) {
                return status;
            }
        }
    }

    /// Sends a transaction and waits until it is final.
    pub async fn pay(&mut self, transaction: &Transaction) -> TransactionStatus {
        self.broadcast(transaction).await;
        let kinds = [
            TransactionStatusKind::Finalized,
            TransactionStatusKind::Confirmed,
            TransactionStatusKind::Rejected,
            TransactionStatusKind::Aborted,
        ];
        let status = self.status_of(transaction.txid(), &kinds).await;
        assert!(status.status.is_final(), "{status:?}");
        status
    }

    pub async fn query(&mut self, txid: Txid) -> TransactionStatus {
        self.send(&NetworkMessage::TransactionStatusQuery(TransactionStatusQuery { txid })).await;
        self.status(txid).await
    }

    /// Asks again and again until the transaction is final here.
    pub async fn until_final(&mut self, txid: Txid) -> TransactionStatus {
        within("finality", async {
            loop {
                let status = self.query(txid).await;
                if status.status.is_final() {
                    return status;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await
    }

    pub async fn states(&mut self, outpoints: &[OutPoint]) -> Vec<StateEntry> {
        let outpoints = outpoints.iter().map(ToString::to_string).collect();
        self.send(&NetworkMessage::UTXOStateQuery(UTXOStateQuery { outpoints })).await;
        self.wait_for("states", |message| match message {
            NetworkMessage::UTXOStateResponse(response) => Some(response.states),
            _ => None,
        })
        .await
    }

    pub async fn state(&mut self, outpoint: OutPoint) -> Option<UTXOState> {
        self.states(&[outpoint]).await[0].state
    }

    pub async fn coins_of(&mut self, address: &Address) -> AddressResponse {
        let query = AddressQuery { addresses: vec![address.to_string()], after: None, limit: 1_000 };
        self.send(&NetworkMessage::AddressQuery(query)).await;
        self.wait_for("an address", |message| match message {
            NetworkMessage::AddressResponse(response) => Some(response),
            _ => None,
        })
        .await
    }
}

/// A connection of which a test sees every message, and on which it can say anything.
pub enum Link {
    /// A wallet's.
    WebSocket(Box<WebSocketStream<MaybeTlsStream<tokio::net::TcpStream>>>),
    /// A peer's: length-prefixed frames.
    Frames(tokio::net::TcpStream),
}

impl Link {
    /// A wallet's WebSocket, upgraded.
    pub async fn web_socket(net: &TestNet, node: usize) -> Self {
        let address = format!("ws://{}", net.devnet.nodes[node].websocket_address);
        let connected = within("the upgrade", tokio_tungstenite::connect_async(address)).await;
        Self::WebSocket(Box::new(connected.unwrap().0))
    }

    /// The same with a receive buffer so small that a wallet which does not read is soon
    /// felt by the node.
    pub async fn narrow_web_socket(net: &TestNet, node: usize) -> Self {
        let address = &net.devnet.nodes[node].websocket_address;
        let socket = tokio::net::TcpSocket::new_v4().unwrap();
        socket.set_recv_buffer_size(4 * 1024).unwrap();
        let stream = within("connecting", socket.connect(address.parse().unwrap())).await.unwrap();
        let stream = MaybeTlsStream::Plain(stream);
        let upgraded = tokio_tungstenite::client_async(format!("ws://{address}"), stream);
        Self::WebSocket(Box::new(within("the upgrade", upgraded).await.unwrap().0))
    }

    /// A TCP connection on which nothing has been said yet.
    pub async fn frames(net: &TestNet, node: usize) -> Self {
        let address = &net.devnet.nodes[node].p2p_address;
        Self::Frames(within("connecting", tokio::net::TcpStream::connect(address)).await.unwrap())
    }

    /// A wallet's TCP connection, greeted.
    pub async fn wallet(net: &TestNet, node: usize) -> Self {
        let mut link = Self::frames(net, node).await;
        link.greet(net, &hello(net, Role::Wallet, None)).await;
        link
    }

    /// A member's connection, greeted and proved.
    pub async fn member(net: &TestNet, node: usize, key: &SecretKey) -> Self {
        let mut link = Self::frames(net, node).await;
        let ours = hello(net, Role::Masternode, Some(key));
        let theirs = link.greet(net, &ours).await;
        link.authenticate(net, &ours, &theirs, key).await;
        link
    }

    /// Says `Hello` and takes the node's `Hello` and its proof, which has to verify.
    pub async fn greet(&mut self, net: &TestNet, ours: &Hello) -> Hello {
        self.send(&NetworkMessage::Hello(ours.clone())).await;
        let Some(NetworkMessage::Hello(theirs)) = self.message().await else { panic!("no Hello") };
        match self.message().await {
            Some(NetworkMessage::Authenticate(Authenticate { signature })) => {
                let key = theirs.public_key.unwrap();
                let (genesis, peer) = (net.genesis.hash(), ours.public_key.as_ref());
                let message = handshake_message(&genesis, &ours.nonce, &theirs.nonce, peer, &key);
                assert!(key.verify(&message, &signature), "the node proves its key");
            }
            other => panic!("no proof: {other:?}"),
        }
        theirs
    }

    /// Proves the key of `ours`.
    pub async fn authenticate(&mut self, net: &TestNet, ours: &Hello, theirs: &Hello, key: &SecretKey) {
        let own = key.public_key();
        let message =
            handshake_message(&net.genesis.hash(), &theirs.nonce, &ours.nonce, theirs.public_key.as_ref(), &own);
        self.send(&NetworkMessage::Authenticate(Authenticate { signature: key.sign(&message) })).await;
    }

    /// Sends a message; whether the node still takes it shows in its answer.
    pub async fn send(&mut self, message: &NetworkMessage) {
        let text = String::from_utf8(encode(message, None).to_vec()).unwrap();
        self.say(&text).await;
    }

    /// Sends any text. A node that has hung up already is no error here.
    pub async fn say(&mut self, text: &str) {
        let _sent = match self {
            Self::WebSocket(stream) => within("sending", stream.send(Message::text(text))).await.is_ok(),
            Self::Frames(stream) => within("sending", write_frame(stream, text.as_bytes())).await.is_ok(),
        };
    }

    /// Sends bytes as they are, below frames and messages.
    pub async fn raw(&mut self, bytes: &[u8]) {
        let _sent = match self {
            Self::WebSocket(stream) => match stream.get_mut() {
                MaybeTlsStream::Plain(stream) => within("sending", stream.write_all(bytes)).await.is_ok(),
                _ => panic!("not a plain connection"),
            },
            Self::Frames(stream) => within("sending", stream.write_all(bytes)).await.is_ok(),
        };
    }

    /// The next message; pings are answered underneath. `None` if the node has hung up.
    pub async fn next(&mut self) -> Option<Incoming> {
        loop {
            let incoming = within("a message", self.receive()).await?;
            match incoming.message {
                NetworkMessage::Ping(nonce) => self.send(&NetworkMessage::Pong(nonce)).await,
                _ => return Some(incoming),
            }
        }
    }

    async fn receive(&mut self) -> Option<Incoming> {
        let bytes = match self {
            Self::WebSocket(stream) => loop {
                match stream.next().await {
                    Some(Ok(Message::Text(text))) => break text.as_bytes().to_vec(),
                    Some(Ok(Message::Close(_)) | Err(_)) | None => return None,
                    Some(Ok(_)) => {}
                }
            },
            Self::Frames(stream) => read_frame(stream, MAX_FRAME_BYTES).await.ok()??.to_vec(),
        };
        Some(parse(&bytes).unwrap_or_else(|error| panic!("the node said something that is no message: {error:?}")))
    }

    /// The next message without its request's id.
    pub async fn message(&mut self) -> Option<NetworkMessage> {
        self.next().await.map(|incoming| incoming.message)
    }

    /// The first message for which `wanted` gives something; others are dropped.
    pub async fn wait_for<T>(&mut self, what: &str, mut wanted: impl FnMut(NetworkMessage) -> Option<T>) -> T {
        within(what, async {
            loop {
                let message = self.message().await;
                if let Some(found) = wanted(message.unwrap_or_else(|| panic!("{what}: the node hung up"))) {
                    return found;
                }
            }
        })
        .await
    }

    /// The next `Error`; whatever else the node says is dropped.
    pub async fn error(&mut self, what: &str) -> ErrorMessage {
        self.wait_for(what, |message| match message {
            NetworkMessage::Error(error) => Some(error),
            _ => None,
        })
        .await
    }

    /// The node says `code` and hangs up.
    pub async fn sent_away(&mut self, what: &str, code: ErrorCode) {
        let error = self.error(what).await;
        assert_eq!(error.code, code, "{what}: {}", error.message);
        self.hung_up(what).await;
    }

    /// The node hangs up; what it still says before is dropped.
    pub async fn hung_up(&mut self, what: &str) {
        within(what, async { while self.message().await.is_some() {} }).await;
    }
}

/// A good `Hello` of this network.
pub fn hello(net: &TestNet, role: Role, key: Option<&SecretKey>) -> Hello {
    Hello {
        protocol_version: PROTOCOL_VERSION,
        network: net.genesis.network(),
        genesis_hash: net.genesis.hash(),
        role,
        public_key: key.map(SecretKey::public_key),
        listen_address: None,
        nonce: Hash32::from_bytes(rand::random()),
        instance: Hash32::from_bytes(rand::random()),
        user_agent: "a test".into(),
        height: 0,
        timestamp: 0,
    }
}
