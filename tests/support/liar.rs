//! Members that lie, for tests: they hold real keys of a [`TestNet`], speak the real
//! protocol on real sockets, and say whatever harms most.
//!
//! All liars of a network are one mind: what one of them hears all of them know, and each
//! lie is told with all of their keys. What they do about a transaction, a round or a
//! question is chosen by a seed and by what it is about, so that the same network sees
//! every kind of lie. What they did is counted: a test whose liars were never heard
//! proves nothing.
#![allow(dead_code, reason = "each test file uses a part of it")]

#[path = "liar/blocks.rs"]
mod blocks;
#[path = "liar/coins.rs"]
mod coins;
#[path = "liar/history.rs"]
mod history;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use time_masternode::consensus::Committee;
use time_masternode::limits::MAX_FRAME_BYTES;
use time_masternode::net::{
    Authenticate, Hello, NetworkMessage, PROTOCOL_VERSION, Role, encode, handshake_message, parse, read_frame,
    write_frame,
};
use time_masternode::types::{Genesis, Hash32, SecretKey, Transaction};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc::{UnboundedReceiver, UnboundedSender, unbounded_channel};
use tokio::task::JoinHandle;
use tokio::time::{sleep, timeout};

use crate::support::TestNet;
pub use blocks::BlockLie;
pub use coins::CoinLie;
pub use history::HistoryLie;

/// How often the liars look around.
const TICK: Duration = Duration::from_millis(50);
/// How long a handshake of theirs may take before they try again.
const PATIENCE: Duration = Duration::from_secs(5);

/// SplitMix64: small, and the same on every machine for ever.
#[derive(Debug, Clone)]
pub struct Rng(u64);

impl Rng {
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x2545_f491_4f6c_dd1d) ^ 0x5bd1_e995)
    }

    /// Choices about one thing: the same for the same seed and the same thing.
    pub fn about(seed: u64, thing: &[u8]) -> Self {
        let mix = |hash: u64, byte: &u8| (hash ^ u64::from(*byte)).wrapping_mul(0x0100_0000_01b3);
        Self::new(thing.iter().fold(seed ^ 0xcbf2_9ce4_8422_2325, mix))
    }

    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    /// A number below `n`, which is not zero.
    pub fn below(&mut self, n: usize) -> usize {
        usize::try_from(self.next() % n as u64).unwrap()
    }

    pub fn pick<T: Copy>(&mut self, items: &[T]) -> T {
        items[self.below(items.len())]
    }

    pub fn shuffle<T>(&mut self, items: &mut [T]) {
        for i in (1..items.len()).rev() {
            items.swap(i, self.below(i + 1));
        }
    }
}

/// What the liars lie about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Lies {
    /// `None`: they say nothing at all about transactions.
    pub coins: Option<CoinLie>,
    pub blocks: BlockLie,
    pub history: HistoryLie,
}

impl Lies {
    /// Everything about coins and blocks, and the truth about history.
    pub const ALL: Self = Self { coins: Some(CoinLie::Mixed), blocks: BlockLie::Mixed, history: HistoryLie::None };
    /// Nothing: they are connected and say nothing of themselves.
    pub const NONE: Self = Self { coins: None, blocks: BlockLie::Withhold, history: HistoryLie::None };
}

/// What the liars have done, by name.
#[derive(Debug, Clone, Default)]
pub struct Deeds(BTreeMap<&'static str, u64>);

impl Deeds {
    pub fn of(&self, name: &str) -> u64 {
        self.0.get(name).copied().unwrap_or(0)
    }

    fn did(&mut self, name: &'static str) {
        *self.0.entry(name).or_default() += 1;
    }
}

/// One of the liars.
struct Liar {
    place: usize,
    key: SecretKey,
    instance: Hash32,
}

/// Somebody whom a liar is connected to.
struct Peer {
    liar: usize,
    /// Its place, if it is a member.
    member: Option<usize>,
    role: Role,
    instance: Hash32,
    outbox: UnboundedSender<Bytes>,
}

/// What all liars know together.
struct Mind {
    genesis: Genesis,
    committee: Committee,
    liars: Vec<Liar>,
    /// The members that do not lie, in order.
    honest: Vec<usize>,
    seed: u64,
    rng: Rng,
    lies: Lies,
    deeds: Deeds,
    peers: BTreeMap<u64, Peer>,
    next_peer: u64,
    /// The observers that came, in order.
    observers: Vec<Hash32>,
    coins: coins::Coins,
    chain: blocks::Chain,
}

type Shared = Arc<Mutex<Mind>>;

fn lock(mind: &Shared) -> MutexGuard<'_, Mind> {
    mind.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The liars of a network, as long as this lives.
pub struct Liars {
    mind: Shared,
    tasks: Vec<JoinHandle<()>>,
}

impl Liars {
    /// The members at `places`, whose own processes must not run.
    pub async fn start(net: &TestNet, places: &[usize], seed: u64, lies: Lies) -> Self {
        let committee = net.committee();
        let liar = |&place: &usize| {
            let key = net.member_key(place);
            assert_eq!(committee.members()[place].public_key, key.public_key(), "nodes stand in the genesis' order");
            Liar { place, key, instance: Hash32::from_bytes(rand::random()) }
        };
        let liars: Vec<Liar> = places.iter().map(liar).collect();
        let honest: Vec<usize> = (0..net.devnet.nodes.len()).filter(|place| !places.contains(place)).collect();
        let mind = Arc::new(Mutex::new(Mind {
            genesis: net.genesis.clone(),
            chain: blocks::Chain::of_genesis(&net.genesis),
            committee,
            liars,
            honest: honest.clone(),
            seed,
            rng: Rng::new(seed),
            lies,
            deeds: Deeds::default(),
            peers: BTreeMap::new(),
            next_peer: 0,
            observers: Vec::new(),
            coins: coins::Coins::default(),
        }));
        let mut tasks = vec![tokio::spawn(look_around(Arc::clone(&mind)))];
        for (liar, &place) in places.iter().enumerate() {
            let listener = TcpListener::bind(&net.devnet.nodes[place].p2p_address).await.unwrap();
            tasks.push(tokio::spawn(accept(Arc::clone(&mind), liar, listener)));
            for &member in &honest {
                let address = net.devnet.nodes[member].p2p_address.clone();
                tasks.push(tokio::spawn(keep_dialling(Arc::clone(&mind), liar, member, address)));
            }
        }
        Self { mind, tasks }
    }

    /// Waits until each liar is connected to all honest members.
    pub async fn connected(&self) {
        crate::support::within("the liars to be connected", async {
            loop {
                let all = {
                    let mind = lock(&self.mind);
                    let has = |liar, member| mind.peers.values().any(|p| p.liar == liar && p.member == Some(member));
                    (0..mind.liars.len()).all(|liar| mind.honest.iter().all(|&member| has(liar, member)))
                };
                if all {
                    return;
                }
                sleep(TICK).await;
            }
        })
        .await;
    }

    /// From now on they lie about this.
    pub fn lie(&self, lies: Lies) {
        lock(&self.mind).lies = lies;
    }

    /// How many observers have greeted them.
    pub fn observers(&self) -> usize {
        lock(&self.mind).observers.len()
    }

    pub fn deeds(&self) -> Deeds {
        lock(&self.mind).deeds.clone()
    }

    /// Rivals that no wallet has sent to anybody: the liars show each to one member only,
    /// as if they had locked it, as soon as they hear of a transaction that it contradicts.
    pub fn give_ghosts(&self, ghosts: impl IntoIterator<Item = Transaction>) {
        lock(&self.mind).coins.ghosts.extend(ghosts);
    }
}

impl Drop for Liars {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
        // The tasks of single connections end when their senders are gone.
        lock(&self.mind).peers.clear();
    }
}

impl Mind {
    fn quorum(&self) -> usize {
        usize::try_from(self.committee.quorum()).unwrap()
    }

    /// Says something to a member from one liar's connection.
    fn say_as(&self, liar: usize, member: usize, message: &NetworkMessage) {
        let bytes = encode(message, None);
        for peer in self.peers.values().filter(|p| p.liar == liar && p.member == Some(member)) {
            // Whoever has hung up is told nothing.
            let _sent = peer.outbox.send(bytes.clone()).is_ok();
        }
    }

    /// Says something to a member from all liars' connections.
    fn say(&self, member: usize, message: &NetworkMessage) {
        (0..self.liars.len()).for_each(|liar| self.say_as(liar, member, message));
    }

    fn answer(&self, peer: u64, message: &NetworkMessage) {
        if let Some(peer) = self.peers.get(&peer) {
            let _sent = peer.outbox.send(encode(message, None)).is_ok();
        }
    }

    fn hear(&mut self, from: u64, message: NetworkMessage) {
        let member = self.peers.get(&from).and_then(|peer| peer.member);
        match message {
            NetworkMessage::Ping(nonce) => self.answer(from, &NetworkMessage::Pong(nonce)),
            NetworkMessage::TransactionBroadcast(raw) => self.hear_transaction(raw),
            NetworkMessage::Transactions(page) => {
                page.transactions.into_iter().for_each(|entry| self.hear_transaction(entry.transaction));
            }
            NetworkMessage::Votes(batch) => self.hear_votes(from, Arc::unwrap_or_clone(batch)),
            NetworkMessage::Status(status) => {
                self.hear_height(status.height);
                self.ask_for_bodies(from, status.in_flight);
            }
            NetworkMessage::GetTransactions(query) => self.serve_bodies(from, &query.txids),
            NetworkMessage::GetFinalized(query) => self.serve_finalized(from, query.after),
            NetworkMessage::GetBlocks(query) => self.serve_blocks(from, query.from_height),
            NetworkMessage::Blocks(blocks) => self.hear_blocks(blocks.blocks),
            NetworkMessage::Consensus(message) => {
                if let Some(member) = member {
                    self.hear_consensus(member, &message);
                }
            }
            _ => {}
        }
    }
}

async fn look_around(mind: Shared) {
    for tick in 0_u64.. {
        sleep(TICK).await;
        let mut mind = lock(&mind);
        if tick % 20 == 0 {
            mind.claim_heights();
        }
        mind.follow_chain();
    }
}

async fn accept(mind: Shared, liar: usize, listener: TcpListener) {
    loop {
        let (stream, _) = listener.accept().await.unwrap();
        tokio::spawn(talk(Arc::clone(&mind), liar, stream));
    }
}

/// Of two connections between two keys the node keeps the one that the smaller key dialled
/// and hangs up the other, so dialling whenever there is none is enough.
async fn keep_dialling(mind: Shared, liar: usize, member: usize, address: String) {
    loop {
        let connected = lock(&mind).peers.values().any(|p| p.liar == liar && p.member == Some(member));
        if !connected && let Ok(stream) = TcpStream::connect(&address).await {
            talk(Arc::clone(&mind), liar, stream).await;
        }
        sleep(4 * TICK).await;
    }
}

/// Handshake and life of one connection.
async fn talk(mind: Shared, liar: usize, mut stream: TcpStream) {
    let Ok(Some((theirs, member))) = timeout(PATIENCE, greet(&mind, liar, &mut stream)).await else { return };
    let Hello { role, instance, .. } = theirs;
    let (mut reader, writer) = stream.into_split();
    let (outbox, queue) = unbounded_channel();
    let id = {
        let mut mind = lock(&mind);
        let id = mind.next_peer;
        mind.next_peer += 1;
        mind.peers.insert(id, Peer { liar, member, role, instance, outbox });
        if role == Role::Observer && !mind.observers.contains(&instance) {
            mind.observers.push(instance);
        }
        id
    };
    let writing = tokio::spawn(write_all(writer, queue));
    while let Ok(Some(frame)) = read_frame(&mut reader, MAX_FRAME_BYTES).await {
        let incoming =
            parse(&frame).unwrap_or_else(|error| panic!("a node said something that is no message: {error:?}"));
        lock(&mind).hear(id, incoming.message);
    }
    let mut mind = lock(&mind);
    mind.peers.remove(&id);
    mind.deeds.did("was hung up on");
    writing.abort();
}

async fn write_all(mut writer: tokio::net::tcp::OwnedWriteHalf, mut queue: UnboundedReceiver<Bytes>) {
    while let Some(bytes) = queue.recv().await {
        if write_frame(&mut writer, &bytes).await.is_err() {
            return;
        }
    }
}

async fn send(stream: &mut TcpStream, message: &NetworkMessage) -> Option<()> {
    write_frame(stream, &encode(message, None)).await.ok()
}

async fn receive(stream: &mut TcpStream) -> Option<NetworkMessage> {
    let frame = read_frame(stream, MAX_FRAME_BYTES).await.ok()??;
    parse(&frame).ok().map(|incoming| incoming.message)
}

/// The handshake is an honest one: a liar that is not let in harms nobody. Who answered,
/// and its place if it is a member.
async fn greet(mind: &Shared, liar: usize, stream: &mut TcpStream) -> Option<(Hello, Option<usize>)> {
    let (ours, key) = {
        let mind = lock(mind);
        let Liar { key, instance, .. } = &mind.liars[liar];
        let hello = Hello {
            protocol_version: PROTOCOL_VERSION,
            network: mind.genesis.network(),
            genesis_hash: mind.genesis.hash(),
            role: Role::Masternode,
            public_key: Some(key.public_key()),
            listen_address: None,
            nonce: Hash32::from_bytes(rand::random()),
            instance: *instance,
            user_agent: "a liar".into(),
            height: 0,
            timestamp: 0,
        };
        (hello, key.clone())
    };
    send(stream, &NetworkMessage::Hello(ours.clone())).await?;
    let Some(NetworkMessage::Hello(theirs)) = receive(stream).await else { return None };
    let own = key.public_key();
    let message = handshake_message(&ours.genesis_hash, &theirs.nonce, &ours.nonce, theirs.public_key.as_ref(), &own);
    send(stream, &NetworkMessage::Authenticate(Authenticate { signature: key.sign(&message) })).await?;
    if theirs.role != Role::Masternode {
        return Some((theirs, None));
    }
    let Some(NetworkMessage::Authenticate(_)) = receive(stream).await else { return None };
    let member = lock(mind).committee.index_of(&theirs.public_key?)?.get();
    Some((theirs, Some(member)))
}
