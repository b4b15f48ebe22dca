//! What travels between members, and what the network does to it.
//!
//! Connections break and come back; on a connection, messages are late and out of order,
//! some are lost, some come twice, and a direction can be silent without either end
//! hearing of it. What was asked on a connection is answered on it or not at all.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use time_masternode::consensus::{Certificate, ConsensusMessage, FencePage, MemberBatch, Verified};
use time_masternode::types::{DecidedBlock, Height, Txid};

use super::core_net::Rng;

/// A body with what proves something of it.
#[derive(Debug, Clone)]
pub struct Entry {
    pub txid: Txid,
    pub certificate: Option<Arc<Certificate>>,
}

/// A message between members (protocol §8). Bodies travel by name: each was made, and its
/// signatures checked, once.
#[derive(Debug, Clone)]
pub enum Message {
    /// "I have locked this."
    Locked(Txid),
    Votes(Arc<Verified<MemberBatch>>),
    GetTransactions(Vec<Txid>),
    Transactions(Vec<Entry>),
    GetFinalized {
        after: Option<u64>,
    },
    Finalized {
        entries: Vec<Entry>,
        next: Option<u64>,
    },
    Status {
        height: Height,
        in_flight: Vec<Txid>,
    },
    GetBlocks {
        from_height: Height,
    },
    Blocks(Vec<Arc<DecidedBlock>>),
    GetFence {
        after: Option<String>,
    },
    Fence(FencePage),
    Consensus(Arc<ConsensusMessage>),
}

impl Message {
    /// Whether it may come twice. A question and its answer are of one connection.
    const fn is_gossip(&self) -> bool {
        matches!(
            self,
            Self::Locked(_) | Self::Votes(_) | Self::Transactions(_) | Self::Status { .. } | Self::Consensus(_)
        )
    }
}

/// A message on its way.
#[derive(Debug)]
pub struct Envelope {
    pub from: usize,
    pub to: usize,
    pub message: Message,
}

/// What the network does in this run, in thousandths and milliseconds.
#[derive(Debug, Clone, Copy)]
pub struct Weather {
    pub loss: u64,
    pub duplicate: u64,
    pub max_delay_ms: usize,
}

pub const CALM: Weather = Weather { loss: 0, duplicate: 0, max_delay_ms: 30 };

/// The wires.
#[derive(Debug)]
pub struct Network {
    pub weather: Weather,
    /// By time, then by lot.
    wire: BTreeMap<(u64, u64), Envelope>,
    connected: BTreeSet<(usize, usize)>,
    /// Directions in which nothing arrives.
    silent: BTreeSet<(usize, usize)>,
}

impl Network {
    pub const fn new(weather: Weather) -> Self {
        Self { weather, wire: BTreeMap::new(), connected: BTreeSet::new(), silent: BTreeSet::new() }
    }

    /// Makes a connection; `false` if there is one.
    pub fn connect(&mut self, a: usize, b: usize) -> bool {
        self.connected.insert((a.min(b), a.max(b)))
    }

    /// Ends a connection, and what is on it is lost; `false` if there is none.
    pub fn disconnect(&mut self, a: usize, b: usize) -> bool {
        let was = self.connected.remove(&(a.min(b), a.max(b)));
        if was {
            self.wire.retain(|_, e| (e.from, e.to) != (a, b) && (e.from, e.to) != (b, a));
        }
        was
    }

    /// A member is gone. What it has sent still comes; what was sent to it does not.
    pub fn hang_up(&mut self, member: usize) {
        self.connected.retain(|(a, b)| *a != member && *b != member);
        self.wire.retain(|_, envelope| envelope.to != member);
    }

    pub fn is_connected(&self, a: usize, b: usize) -> bool {
        self.connected.contains(&(a.min(b), a.max(b)))
    }

    /// From now on nothing that `from` sends comes to `to`.
    pub fn silence(&mut self, from: usize, to: usize) {
        self.silent.insert((from, to));
    }

    pub fn unsilence(&mut self) {
        self.silent.clear();
    }

    pub fn is_silent(&self, from: usize, to: usize) -> bool {
        self.silent.contains(&(from, to))
    }

    pub fn send(&mut self, rng: &mut Rng, now_ms: u64, from: usize, to: usize, message: &Message) {
        if from == to || !self.is_connected(from, to) || self.is_silent(from, to) || rng.chance(self.weather.loss) {
            return;
        }
        let copies = if message.is_gossip() && rng.chance(self.weather.duplicate) { 2 } else { 1 };
        for _ in 0..copies {
            let due = now_ms + 1 + rng.below(self.weather.max_delay_ms) as u64;
            self.wire.insert((due, rng.next()), Envelope { from, to, message: message.clone() });
        }
    }

    /// When the next message is due.
    pub fn next_due(&self) -> Option<u64> {
        self.wire.keys().next().map(|(due, _)| *due)
    }

    /// What is due by now.
    pub fn due(&mut self, now_ms: u64) -> Vec<Envelope> {
        let later = self.wire.split_off(&(now_ms + 1, 0));
        std::mem::replace(&mut self.wire, later).into_values().collect()
    }
}
