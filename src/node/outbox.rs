//! What leaves: turns the core's durable actions into messages.
//!
//! Each message is encoded once, however many peers it goes to. Nothing here waits: a
//! member whose queue is full is disconnected, and a wallet's statuses are left for its
//! own writer to fetch.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;

use super::feed::Feed;
use super::status::StatusHub;
use crate::consensus::{Action, Certificate, Changes, MemberBatch, MemberIndex, Verified, VoteKind};
use crate::db::Reader;
use crate::limits::{MAX_BLOCKS_PER_REQUEST, MAX_FENCED_PER_PAGE, MAX_TRANSACTIONS_PER_REQUEST};
use crate::net::{
    CertifiedTransaction, Connection, GetBlocks, GetFence, GetTransactions, NetworkMessage, PeerManager, Status,
    TransactionRejected, Transactions, encode,
};
use crate::types::{Height, Transaction, Txid};

/// So many things go at once. Of more, many go to a socket in one piece.
const FEW: usize = 4;

/// How a message gets to a member.
type Way = fn(&Connection, Bytes);

/// One thing to let out.
pub(super) enum Outward {
    Action(Action),
    Batches { to: Option<MemberIndex>, batches: Vec<Arc<Verified<MemberBatch>>> },
}

/// Where durable actions go.
#[derive(Debug, Clone)]
pub(super) struct Outbox {
    pub(super) peers: Arc<PeerManager>,
    pub(super) statuses: Arc<StatusHub>,
    pub(super) feed: Arc<Feed>,
    pub(super) reader: Reader,
    /// An observer says only what a wallet may say.
    pub(super) is_member: bool,
}

impl Outbox {
    /// Lets them out in order; a few go to the sockets at once, on this thread. The caller has them
    /// from a `Durable`, but for bodies that are passed on: they are the word of whoever signed them.
    pub(super) fn deliver(&self, outward: Vec<Outward>) {
        let mut requests: BTreeMap<Option<MemberIndex>, Vec<Txid>> = BTreeMap::new();
        let way: Way = if outward.len() <= FEW { Connection::send_at_once } else { Connection::send_now };
        for outward in outward {
            match outward {
                Outward::Batches { to, batches } => {
                    for batch in batches {
                        self.send(way, to, &NetworkMessage::Votes(Arc::new(batch.get().wire().clone())));
                    }
                }
                Outward::Action(Action::Request { to, txid }) => requests.entry(to).or_default().push(txid),
                Outward::Action(action) => self.perform(way, action),
            }
        }
        for (to, mut txids) in requests {
            txids.sort_unstable();
            txids.dedup();
            for chunk in txids.chunks(MAX_TRANSACTIONS_PER_REQUEST) {
                let ask = GetTransactions { txids: chunk.to_vec(), bodies_only: false };
                self.send(way, to, &NetworkMessage::GetTransactions(ask));
            }
        }
    }

    fn perform(&self, way: Way, action: Action) {
        match action {
            Action::Broadcast(transaction) => {
                self.send(way, None, &NetworkMessage::TransactionBroadcast(transaction.to_raw()));
            }
            Action::Send { to, transaction } => {
                self.send(way, Some(to), &NetworkMessage::TransactionBroadcast(transaction.to_raw()));
            }
            Action::ReturnBatch { to, batch } => {
                self.send(way, Some(to), &NetworkMessage::Votes(Arc::new(batch.get().wire().clone())));
            }
            Action::SendCertified { to, transaction, certificate } => {
                self.send(way, to, &certified(&transaction, Some(certificate)));
            }
            Action::SendSettled { to, txid } => self.send_settled(way, to, &txid),
            Action::Consensus(message) => self.send(way, None, &NetworkMessage::Consensus(message)),
            Action::RequestBodies { to, txids } => {
                // That they are in a decided block is proof enough.
                let ask = GetTransactions { txids, bodies_only: true };
                self.send(way, Some(to), &NetworkMessage::GetTransactions(ask));
            }
            Action::RequestBlocks { to, from_height } => {
                let limit = u32::try_from(MAX_BLOCKS_PER_REQUEST).unwrap_or(u32::MAX);
                self.send(way, Some(to), &NetworkMessage::GetBlocks(GetBlocks { from_height, limit }));
            }
            Action::RequestFence { to, after } => {
                let limit = u32::try_from(MAX_FENCED_PER_PAGE).unwrap_or(u32::MAX);
                self.send(way, Some(to), &NetworkMessage::GetFence(GetFence { after, limit }));
            }
            Action::SendBlocks { to, from_height } => match super::sync::blocks_page(&self.reader, from_height, 16) {
                Ok(blocks) => self.send(way, Some(to), &NetworkMessage::Blocks(blocks)),
                Err(error) => tracing::error!(from_height, %error, "cannot read a block"),
            },
            Action::Disconnect { member } => self.peers.disconnect_member(member),
            Action::Advise { to, txid, rejection } => {
                let rejected = TransactionRejected { txid, rejection: (&rejection).into() };
                self.send(way, Some(to), &NetworkMessage::TransactionRejected(rejected));
            }
            Action::Reply { ticket, txid, progress } => self.statuses.reply(ticket, txid, &progress),
            Action::Progress { txid, progress } => self.statuses.progress(txid, &progress),
            // These are taken apart before they come here.
            Action::ResendVotes { .. } | Action::Request { .. } => {}
        }
    }

    fn send_settled(&self, way: Way, to: MemberIndex, txid: &Txid) {
        let found = self.reader.body(txid).and_then(|found| {
            let certificate = self.reader.certificate(txid, VoteKind::Commit)?;
            Ok(found.map(|transaction| (transaction, certificate)))
        });
        match found {
            Ok(Some((transaction, certificate))) => self.send(way, Some(to), &certified(&transaction, certificate)),
            Ok(None) => {}
            Err(error) => tracing::error!(%txid, %error, "cannot read a final transaction"),
        }
    }

    /// Whether nobody would be told anything if this were durable: no member has to hear of a vote
    /// or of a block, and no wallet here follows what it changes.
    pub(super) fn nobody_waits(&self, changes: &Changes, actions: &[Action]) -> bool {
        let unheard = |action: &Action| match action {
            Action::Progress { txid, .. } => !self.statuses.is_watched(txid),
            _ => false,
        };
        let told_to_members = !changes.votes.is_empty() || !changes.agreement.is_empty() || !changes.blocks.is_empty();
        !told_to_members && actions.iter().all(unheard) && !self.feed.concerns_anybody(&changes.log)
    }

    /// Tells the members what is in flight here.
    pub(super) fn status(&self, height: Height, in_flight: Vec<Txid>) {
        self.send(Connection::send_now, None, &NetworkMessage::Status(Status { height, in_flight }));
    }

    fn send(&self, way: Way, to: Option<MemberIndex>, message: &NetworkMessage) {
        let said_by_all = matches!(
            message,
            NetworkMessage::TransactionBroadcast(_) | NetworkMessage::GetTransactions(_) | NetworkMessage::GetBlocks(_)
        );
        if !self.is_member && !said_by_all {
            return;
        }
        let bytes = encode(message, None);
        for connection in self.peers.to_members(to) {
            way(&connection, bytes.clone());
        }
    }
}

fn certified(transaction: &Transaction, certificate: Option<Arc<Certificate>>) -> NetworkMessage {
    let certificate = certificate.map(Arc::unwrap_or_clone);
    let entry = CertifiedTransaction { transaction: transaction.to_raw(), certificate };
    NetworkMessage::Transactions(Transactions { transactions: vec![entry] })
}

#[cfg(test)]
mod tests {
    use std::net::{Ipv4Addr, SocketAddr};
    use std::time::Duration;

    use super::*;
    use crate::consensus::{Committee, LogEntry, Progress, Transition, Vote};
    use crate::db::{MemoryDisk, Subscription, SubscriptionKey, samples};
    use crate::net::{Mailbox, PeerConfig};
    use crate::node::feed::Filter;
    use crate::types::{Address, Amount, Network, OutPoint, Output, SecretKey, UTXOState};

    #[tokio::test]
    async fn somebody_waits_for_what_members_are_told_and_for_what_concerns_a_wallet_here() {
        let disk = MemoryDisk::new();
        let database = samples::open_sample(&disk, &samples::genesis(), true, true).database;
        let reader = database.reader();
        let committee = Arc::new(Committee::of_genesis(&samples::genesis()));
        let peers = Arc::new(PeerManager::new(PeerConfig::new(Network::Devnet, committee, None)));
        let feed = Arc::new(Feed::new(reader.clone(), "m".into()));
        let statuses = Arc::new(StatusHub::new(reader.clone(), 1));
        let outbox = Outbox { peers: Arc::clone(&peers), statuses, feed: Arc::clone(&feed), reader, is_member: true };
        let wallet = Mailbox::open(&peers, SocketAddr::from((Ipv4Addr::LOCALHOST, 1)));

        let txid = Txid::from_bytes([1; 32]);
        let outpoint = OutPoint { txid, vout: 0 };
        let output = Output { amount: Amount::from_units(1).unwrap(), address: samples::address() };
        let step = Transition { outpoint, output, old_state: None, new_state: UTXOState::Unspent, timestamp: 1 };
        let changes = || Changes { log: vec![LogEntry::Transition(step)], ..Changes::default() };
        let told = [Action::Progress { txid, progress: Progress::Unknown }];
        assert!(outbox.nobody_waits(&changes(), &told));

        let vote = Vote { kind: VoteKind::Commit, txid };
        assert!(!outbox.nobody_waits(&Changes { votes: vec![vote], ..changes() }, &told), "a vote");
        assert!(!outbox.nobody_waits(&changes(), &[Action::Request { to: None, txid }]), "a question to members");

        let ticket = outbox.statuses.open(wallet.connection(), None, Some(txid)).unwrap();
        assert!(!outbox.nobody_waits(&changes(), &told), "it watches the transaction");
        outbox.statuses.cancel(ticket, txid);
        assert!(outbox.nobody_waits(&changes(), &told));

        let key = SubscriptionKey::of("wallet");
        let by_outpoint = (vec![outpoint], Vec::new());
        let by_address = (Vec::new(), vec![samples::address()]);
        for (number, (outpoints, addresses)) in [(1, by_outpoint), (2, by_address)] {
            let subscriber_id = "wallet".into();
            let subscription = Subscription { subscriber_id, token_hash: [7; 32], outpoints, addresses, last_used: 1 };
            let claim = feed.claim(key, number, [7; 32], 1, wallet.connection()).await.unwrap();
            feed.begin(claim, Filter::of(&subscription), 0, wallet.connection());
            let live = async {
                while outbox.nobody_waits(&changes(), &told) {
                    tokio::task::yield_now().await;
                }
            };
            tokio::time::timeout(Duration::from_secs(60), live).await.expect("it follows the coin");
            let foreign = OutPoint { txid: Txid::from_bytes([2; 32]), vout: 0 };
            let address = Address::of_key(&SecretKey::from_seed([9; 32]).public_key(), Network::Devnet);
            let other = Transition { outpoint: foreign, output: Output { address, ..output }, ..step };
            let other = Changes { log: vec![LogEntry::Transition(other)], ..Changes::default() };
            assert!(outbox.nobody_waits(&other, &told), "it follows something else");
            feed.cancel(&key, number).await;
            assert!(outbox.nobody_waits(&changes(), &told));
        }
    }
}
