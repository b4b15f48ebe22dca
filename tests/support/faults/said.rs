//! What a node has said, by what left through its sockets, and whether a database still
//! stands by it.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};
use time_masternode::consensus::{AgreementRecord, ConsensusMessage, LogEntry, VoteKind};
use time_masternode::db::{DatabaseError, Opened, Reader, SubscriptionKey};
use time_masternode::net::{NetworkMessage, TransactionStatusKind};
use time_masternode::types::{
    BlockHash, ConsensusStep, GenesisHash, Height, OutPoint, PublicKey, Transaction, Txid, UTXOState,
};

use super::trace::{Listener, Record};

/// What a member can say once of a round of a height.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub enum Turn {
    Proposal,
    Prevote,
    Precommit,
}

/// An entry of the change log, as wallets were told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
enum Told {
    Step(OutPoint, UTXOState),
    Block(Height, BlockHash),
}

/// Everything that a node has said and must stand by, each with the place in the trace from
/// which on it was said.
#[derive(Debug, Serialize, Deserialize)]
pub struct Said {
    key: PublicKey,
    genesis_hash: GenesisHash,
    pub votes: BTreeMap<(Txid, VoteKind), usize>,
    /// By transaction, and by a number for each kind of status.
    statuses: BTreeMap<(Txid, u8), (TransactionStatusKind, usize)>,
    log: BTreeMap<u64, (Told, usize)>,
    /// Of each turn, in words, what was said.
    agreement: BTreeMap<(Height, u32, Turn), BTreeMap<String, usize>>,
    subscriptions: BTreeMap<String, usize>,
    #[serde(skip)]
    listener: Listener,
    /// Records that were looked at.
    pub records: usize,
}

impl Said {
    /// Nothing yet, by the member with this key.
    pub fn nothing(key: PublicKey, genesis_hash: GenesisHash) -> Self {
        Self {
            key,
            genesis_hash,
            votes: BTreeMap::new(),
            statuses: BTreeMap::new(),
            log: BTreeMap::new(),
            agreement: BTreeMap::new(),
            subscriptions: BTreeMap::new(),
            listener: Listener::default(),
            records: 0,
        }
    }

    /// How much was said.
    pub fn len(&self) -> usize {
        self.votes.len() + self.statuses.len() + self.log.len() + self.agreement.len() + self.subscriptions.len()
    }

    /// Who said it.
    pub const fn by(&self) -> PublicKey {
        self.key
    }

    /// Takes in more of the trace.
    pub fn hear(&mut self, records: &[Record]) {
        for record in records {
            self.records += 1;
            for message in self.listener.hear(record) {
                self.note(message, self.records);
            }
        }
    }

    fn note(&mut self, message: NetworkMessage, at: usize) {
        match message {
            NetworkMessage::Votes(batch) if batch.voter == self.key => {
                for vote in &batch.votes {
                    self.votes.entry((vote.txid, vote.kind)).or_insert(at);
                }
            }
            NetworkMessage::TransactionStatus(status) => {
                use TransactionStatusKind::{Aborted, Confirmed, Finalized, Pending};
                if matches!(status.status, Pending | Finalized | Confirmed | Aborted) {
                    self.statuses.entry((status.txid, status.status as u8)).or_insert((status.status, at));
                }
            }
            NetworkMessage::UTXOStateNotification(message) => {
                let told = Told::Step(message.notification.outpoint, message.notification.new_state);
                self.log.entry(message.sequence).or_insert((told, at));
            }
            NetworkMessage::BlockNotification(block) => {
                let told = Told::Block(block.height, block.block_hash);
                self.log.entry(block.sequence).or_insert((told, at));
            }
            NetworkMessage::UTXOSubscribed(subscribed) => {
                self.subscriptions.entry(subscribed.subscriber_id).or_insert(at);
            }
            NetworkMessage::Consensus(message) => {
                let own = self.turn_of(&message).filter(|(_, by, _)| *by == self.key);
                if let Some((turn, _, words)) = own {
                    self.agreement.entry(turn).or_default().entry(words).or_insert(at);
                }
            }
            _ => {}
        }
    }

    /// What was said in the first `until` records and is not in the database.
    pub fn missing(&self, until: usize, opened: &Opened) -> Result<Vec<String>, DatabaseError> {
        let reader = opened.database.reader();
        let mut missing = Vec::new();
        let mut votes: BTreeSet<(Txid, VoteKind)> = BTreeSet::new();
        for recovered in &opened.recovered.in_flight {
            let txid = recovered.in_flight.transaction.txid();
            votes.extend(recovered.votes.iter().map(|kind| (txid, *kind)));
        }
        for ((txid, kind), at) in self.votes.iter().filter(|(_, at)| **at <= until) {
            if !votes.contains(&(*txid, *kind)) && !is_over(&reader, txid)? {
                missing.push(format!("the vote {kind:?} on {txid}, sent at {at}"));
            }
        }
        for ((txid, _), (kind, at)) in self.statuses.iter().filter(|(_, (_, at))| *at <= until) {
            if !stands(&reader, txid, *kind)? {
                missing.push(format!("{txid} is not {kind:?} any more, as was said at {at}"));
            }
        }
        for (sequence, (told, at)) in self.log.iter().filter(|(_, (_, at))| *at <= until) {
            let entry = reader.changes(sequence - 1, *sequence, 1)?.pop().map(|(_, entry)| entry);
            let entry = entry.map(|entry| match entry {
                LogEntry::Transition(step) => Told::Step(step.outpoint, step.new_state),
                LogEntry::Block { height, block_hash, .. } => Told::Block(height, block_hash),
            });
            let pruned = reader.pruned()?.sequence;
            if entry.as_ref() != Some(told) && *sequence > pruned {
                missing.push(format!("entry {sequence} of the log is {entry:?}; told at {at} was {told:?}"));
            }
        }
        for (name, at) in self.subscriptions.iter().filter(|(_, at)| **at <= until) {
            if reader.subscription(&SubscriptionKey::of(name))?.is_none() {
                missing.push(format!("the subscription {name:?}, confirmed at {at}"));
            }
        }
        let logged: BTreeSet<_> = opened
            .recovered
            .agreement
            .iter()
            .filter_map(|record| match record {
                AgreementRecord::Message(message) => self.turn_of(message),
                _ => None,
            })
            .filter(|(_, by, _)| *by == self.key)
            .map(|(turn, _, words)| (turn, words))
            .collect();
        for (turn, said) in &self.agreement {
            for (words, at) in said.iter().filter(|(_, at)| **at <= until) {
                if turn.0 > opened.recovered.tip.height && !logged.contains(&(*turn, words.clone())) {
                    missing.push(format!("{:?} of height {} round {}, sent at {at}", turn.2, turn.0, turn.1));
                }
            }
        }
        Ok(missing)
    }

    /// What this member has said twice, in different words. `bodies` are the transactions that
    /// there are, `dead` is whether one of them has died.
    pub fn contradictions(
        &self,
        bodies: &BTreeMap<Txid, Transaction>,
        mut dead: impl FnMut(&Txid) -> bool,
    ) -> Vec<String> {
        let mut found = Vec::new();
        let mut committed: BTreeMap<OutPoint, Vec<Txid>> = BTreeMap::new();
        for (txid, kind) in self.votes.keys() {
            if *kind != VoteKind::Commit {
                continue;
            }
            if self.votes.contains_key(&(*txid, VoteKind::Abort)) {
                found.push(format!("Commit and Abort on {txid}"));
            }
            for outpoint in bodies.get(txid).into_iter().flat_map(Transaction::spends) {
                committed.entry(outpoint).or_default().push(*txid);
            }
        }
        for (outpoint, txids) in committed.iter().filter(|(_, txids)| txids.len() > 1) {
            let alive: Vec<_> = txids.iter().filter(|txid| !dead(txid)).collect();
            if alive.len() > 1 {
                found.push(format!("Commit on {alive:?}, which all spend {outpoint}"));
            }
        }
        for (turn, said) in self.agreement.iter().filter(|(_, said)| said.len() > 1) {
            found.push(format!("{:?} of height {} round {}: {said:?}", turn.2, turn.0, turn.1));
        }
        found
    }

    /// Transactions that were said to be dead.
    pub fn aborted(&self) -> BTreeSet<Txid> {
        let aborted = self.statuses.iter().filter(|(_, (kind, _))| *kind == TransactionStatusKind::Aborted);
        aborted.map(|((txid, _), _)| *txid).collect()
    }

    /// Whose turn it was, and what was said, in words.
    fn turn_of(&self, message: &ConsensusMessage) -> Option<((Height, u32, Turn), PublicKey, String)> {
        match message {
            ConsensusMessage::Proposal(proposal) => {
                let hash = proposal.block.hash(&self.genesis_hash);
                let words = format!("{hash} after {}", proposal.valid_round);
                Some(((proposal.height, proposal.round, Turn::Proposal), proposal.proposer, words))
            }
            ConsensusMessage::Vote(vote) => {
                let turn = match vote.step {
                    ConsensusStep::Prevote => Turn::Prevote,
                    ConsensusStep::Precommit => Turn::Precommit,
                };
                let words = vote.block_hash.map_or_else(|| "nil".to_owned(), |hash| hash.to_string());
                Some(((vote.height, vote.round, turn), vote.voter, words))
            }
            ConsensusMessage::Polka(_) | ConsensusMessage::RoundChange(_) => None,
        }
    }

    /// Transactions that were said to be final.
    pub fn finals(&self) -> BTreeSet<Txid> {
        let finals = self.statuses.iter().filter(|(_, (kind, _))| kind.is_final());
        finals.map(|((txid, _), _)| *txid).collect()
    }
}

/// Whether nobody needs a vote on it any more.
fn is_over(reader: &Reader, txid: &Txid) -> Result<bool, DatabaseError> {
    Ok(reader.is_final(txid)? || reader.dead(txid)?.is_some())
}

fn stands(reader: &Reader, txid: &Txid, kind: TransactionStatusKind) -> Result<bool, DatabaseError> {
    Ok(match kind {
        TransactionStatusKind::Pending => reader.is_in_flight(txid)? || is_over(reader, txid)?,
        TransactionStatusKind::Finalized => reader.is_final(txid)?,
        TransactionStatusKind::Confirmed => reader.is_final(txid)? && reader.confirmed(txid)?.is_some(),
        TransactionStatusKind::Aborted => reader.dead(txid)?.is_some(),
        TransactionStatusKind::Unknown | TransactionStatusKind::Rejected => true,
    })
}
