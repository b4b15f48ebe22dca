//! What the rows are: keys, values, names.

use serde::{Deserialize, Serialize};

use super::DatabaseError;
use crate::consensus::{ChainTip, InFlight, Settled};
use crate::types::{
    Address, Amount, BlockHash, GenesisHash, Height, Input, Network, OutPoint, Output, PublicKey, Transaction, Txid,
    UnixSeconds, UtxoDigest, tagged_hash,
};

/// The schema that this program writes. A database of an older one is migrated first.
pub const SCHEMA_VERSION: u32 = 6;

/// The trees, by the index that commits use for them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub(super) enum TreeId {
    Meta,
    Utxos,
    Addresses,
    Locks,
    Votes,
    Certificates,
    Transactions,
    Changes,
    Subscriptions,
    Blocks,
    Confirmed,
    Dead,
    Agreement,
    Fence,
    Proofs,
    /// Of schemas 4 and 5. It is there for migrations, and empty after them.
    Bodies,
}

impl TreeId {
    /// Those that this schema has, before what only migrations need.
    pub(super) const OF_THIS_SCHEMA: &[Self] = Self::ALL.split_at(Self::ALL.len() - 1).0;

    pub(super) const ALL: [Self; 16] = [
        Self::Meta,
        Self::Utxos,
        Self::Addresses,
        Self::Locks,
        Self::Votes,
        Self::Certificates,
        Self::Transactions,
        Self::Changes,
        Self::Subscriptions,
        Self::Blocks,
        Self::Confirmed,
        Self::Dead,
        Self::Agreement,
        Self::Fence,
        Self::Proofs,
        Self::Bodies,
    ];

    pub(super) const fn name(self) -> &'static str {
        match self {
            Self::Meta => "meta",
            Self::Utxos => "utxos",
            Self::Addresses => "addresses",
            Self::Locks => "locks",
            Self::Votes => "votes",
            Self::Certificates => "certificates",
            Self::Transactions => "transactions",
            Self::Changes => "changes",
            Self::Subscriptions => "subscriptions",
            Self::Blocks => "blocks",
            Self::Confirmed => "confirmed",
            Self::Dead => "dead",
            Self::Agreement => "agreement",
            Self::Fence => "fence",
            Self::Bodies => "bodies",
            Self::Proofs => "proofs",
        }
    }

    /// The tree of this name.
    pub(super) fn named(name: &str) -> Option<Self> {
        Self::ALL.into_iter().find(|id| id.name() == name)
    }
}

/// Rows of `meta`.
pub(super) mod meta {
    pub(in crate::db) const SCHEMA: &[u8] = b"schema";
    pub(in crate::db) const NETWORK: &[u8] = b"network";
    pub(in crate::db) const HEAD: &[u8] = b"head";
    pub(in crate::db) const SUSPENSION: &[u8] = b"suspension";
    pub(in crate::db) const CHAIN: &[u8] = b"chain";
    pub(in crate::db) const FENCE: &[u8] = b"fence";
    pub(in crate::db) const PRUNED: &[u8] = b"pruned";
    pub(in crate::db) const FORGOTTEN: &[u8] = b"forgotten";
    pub(in crate::db) const KEPT: &[u8] = b"kept";
}

/// Whose database it is: written once.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoredNetwork {
    /// Which network.
    pub network: Network,
    /// Its genesis.
    pub genesis_hash: GenesisHash,
    /// This member's key; `None` for an observer.
    pub public_key: Option<PublicKey>,
    /// The name of this change log; a restored or imported database gets a new one.
    pub log_id: [u8; 16],
}

impl StoredNetwork {
    /// Refuses a database of another network, or of another member than this one.
    pub(super) fn is_of(&self, expected: GenesisHash, public_key: Option<PublicKey>) -> Result<(), DatabaseError> {
        if self.genesis_hash != expected {
            return Err(DatabaseError::OtherNetwork { expected, found: self.genesis_hash });
        }
        if self.public_key != public_key {
            let name =
                |key: Option<PublicKey>| key.map_or_else(|| "an observer".into(), |key| format!("the member {key}"));
            return Err(DatabaseError::OtherKey { expected: name(public_key), found: name(self.public_key) });
        }
        Ok(())
    }
}

/// The last commit, written by every commit.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Head {
    /// Its number, from 1.
    pub(super) commit: u64,
    /// The digest of the chain of commits up to it.
    pub(super) digest: [u8; 32],
    /// The digest before it.
    pub(super) previous_digest: [u8; 32],
    /// The last sequence of the change log.
    pub(super) sequence: u64,
}

impl Head {
    pub(super) const EMPTY: Self = Self { commit: 0, digest: [0; 32], previous_digest: [0; 32], sequence: 0 };

    /// The head after a commit of these rows.
    pub(super) fn next(&self, rows_digest: &[u8; 32], sequence: u64) -> Self {
        let commit = self.commit + 1;
        let digest = tagged_hash("TIME/commit", &[&self.digest, &commit.to_le_bytes(), rows_digest]);
        Self { commit, digest, previous_digest: self.digest, sequence }
    }
}

/// A transaction's body as it is stored. Its txid is computed again when it is read.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct StoredTransaction {
    inputs: Vec<Input>,
    outputs: Vec<Output>,
    timestamp: UnixSeconds,
}

impl StoredTransaction {
    pub(super) fn new(transaction: &Transaction) -> Self {
        Self {
            inputs: transaction.inputs().to_vec(),
            outputs: transaction.outputs().to_vec(),
            timestamp: transaction.timestamp(),
        }
    }

    /// What is written of a body.
    pub(super) fn of(transaction: &Transaction) -> impl Serialize + '_ {
        (transaction.inputs(), transaction.outputs(), transaction.timestamp())
    }

    pub(super) fn into_transaction(self) -> Transaction {
        Transaction::from_parts(self.inputs, self.outputs, self.timestamp)
    }
}

/// An element of a record of `locks`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct StoredInFlight {
    pub(super) transaction: StoredTransaction,
    pub(super) locked_at: Option<UnixSeconds>,
}

impl StoredInFlight {
    pub(super) fn new(in_flight: &InFlight) -> Self {
        Self { transaction: StoredTransaction::new(&in_flight.transaction), locked_at: in_flight.locked_at }
    }
}

/// What the first row of its outputs says of a settled transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredSettled {
    pub(super) settled: Settled,
    /// Under which number its body stands.
    pub(super) number: u64,
}

/// A settled transaction, put together from the row of its outputs and its body in
/// `transactions`.
#[derive(Debug, Clone)]
pub(super) struct StoredFinal {
    pub(super) settled: Settled,
    pub(super) number: u64,
    pub(super) transaction: StoredTransaction,
}

/// The chain's tip, written by every block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StoredTip {
    height: Height,
    hash: BlockHash,
    timestamp_ms: u64,
    supply: Amount,
    /// The sequence from which on the log may name what is final and not in the chain.
    pub(super) unconfirmed_from: u64,
    lanes: Vec<u16>,
}

impl StoredTip {
    pub(super) fn new(tip: &ChainTip, unconfirmed_from: u64) -> Self {
        Self {
            height: tip.height,
            hash: tip.hash,
            timestamp_ms: tip.timestamp_ms,
            supply: tip.supply,
            unconfirmed_from,
            lanes: tip.digest.lanes().to_vec(),
        }
    }

    pub(super) fn tip(&self) -> Result<ChainTip, DatabaseError> {
        let digest = UtxoDigest::from_lanes(&self.lanes);
        let digest = digest.ok_or_else(|| DatabaseError::corrupt("meta", "a state digest of the wrong length"))?;
        Ok(ChainTip {
            height: self.height,
            hash: self.hash,
            timestamp_ms: self.timestamp_ms,
            supply: self.supply,
            digest,
        })
    }
}

/// A durable subscription: filters and who may use it. Its place in the log is the
/// wallet's to remember.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subscription {
    /// The name that the wallet chose.
    pub subscriber_id: String,
    /// The tagged hash of the token that resumes and cancels it.
    pub token_hash: [u8; 32],
    /// The outpoints that it follows.
    pub outpoints: Vec<OutPoint>,
    /// The addresses that it follows.
    pub addresses: Vec<Address>,
    /// When it was last used, by this node's clock.
    pub last_used: UnixSeconds,
}

/// The key under which a subscription is stored: a hash of its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct SubscriptionKey([u8; 32]);

impl SubscriptionKey {
    /// The key of a name.
    pub fn of(subscriber_id: &str) -> Self {
        Self(tagged_hash("TIME/subscriber", &[subscriber_id.as_bytes()]))
    }

    pub(super) const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

pub(super) fn outpoint_key(outpoint: &OutPoint) -> [u8; 36] {
    let mut key = [0; 36];
    key[..32].copy_from_slice(outpoint.txid.as_bytes());
    key[32..].copy_from_slice(&outpoint.vout.to_be_bytes());
    key
}

pub(super) fn parse_outpoint_key(key: &[u8]) -> Option<OutPoint> {
    let (txid, vout) = key.split_first_chunk::<32>()?;
    Some(OutPoint { txid: Txid::from_bytes(*txid), vout: u32::from_be_bytes(vout.try_into().ok()?) })
}

pub(super) fn address_key(address: &Address, outpoint: &OutPoint) -> [u8; 57] {
    let mut key = [0; 57];
    key[..21].copy_from_slice(address.payload());
    key[21..].copy_from_slice(&outpoint_key(outpoint));
    key
}

/// Entries of the write-ahead log sort by height, then in the order of writing.
pub(super) fn agreement_key(height: Height, index: u32) -> [u8; 12] {
    let mut key = [0; 12];
    key[..8].copy_from_slice(&height.to_be_bytes());
    key[8..].copy_from_slice(&index.to_be_bytes());
    key
}
