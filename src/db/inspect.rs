//! Every row of every tree, decoded, for tools that look at a stopped node.

use std::path::Path;

use serde_json::{Value, json};

use super::DatabaseError;
use super::codec::{decode, records};
use super::engine::{Engine, Tree};
use super::open::{self, Storage};
use super::prune::Pruned;
use super::schema::{
    Head, StoredConfirmed, StoredFinal, StoredInFlight, StoredNetwork, StoredTip, Subscription, TreeId, meta,
    parse_outpoint_key,
};
use super::store::{Reader, Trees as StoreTrees, sequence_of};
use crate::consensus::{AgreementRecord, Certificate, Dead, FenceState, LogEntry, Vote, VoteKind};
use crate::types::{Address, DecidedBlock, Network, Transaction};

/// The names of the trees, as `dump --tree` takes them.
pub const TREE_NAMES: [&str; 14] = [
    "meta",
    "utxos",
    "addresses",
    "locks",
    "votes",
    "certificates",
    "transactions",
    "changes",
    "subscriptions",
    "blocks",
    "confirmed",
    "dead",
    "agreement",
    "fence",
];

/// One record.
#[derive(Debug, Clone, PartialEq, serde::Serialize)]
pub struct Row {
    /// The tree's name.
    pub tree: &'static str,
    /// The key, readable.
    pub key: String,
    /// The value, decoded.
    pub value: Value,
}

/// The trees of a stopped node's database.
#[derive(Debug)]
pub struct Trees {
    trees: StoreTrees,
    reader: Reader,
    _engine: Engine,
}

type Rows = Box<dyn Iterator<Item = Result<Row, DatabaseError>>>;

impl Trees {
    /// Opens the database in `data_dir` for inspection. It has to exist, and no other
    /// process may have it open.
    pub fn open(data_dir: &Path) -> Result<Self, DatabaseError> {
        if !open::is_there(data_dir) {
            return Err(DatabaseError::Missing(data_dir.to_path_buf()));
        }
        let storage = Storage::open(data_dir, 64 * 1024 * 1024)?;
        let schema = open::schema_check(&storage.trees)?;
        tracing::debug!(schema, "opened for inspection");
        let reader = storage.reader()?;
        Ok(Self { trees: storage.trees, reader, _engine: storage.engine })
    }

    /// The records of one tree, in order of key. `None` if there is no such tree.
    pub fn rows(&self, name: &str) -> Option<Rows> {
        let id = TreeId::ALL.into_iter().find(|id| id.name() == name)?;
        let tree = self.trees.get(id);
        let network = self.reader.network().network;
        Some(match id {
            TreeId::Meta => Box::new(plain(tree, id, meta_row)),
            TreeId::Utxos => Box::new(self.reader.outputs().map(|output| {
                let (outpoint, utxo) = output?;
                Ok(Row { tree: TreeId::Utxos.name(), key: outpoint.to_string(), value: json!(utxo) })
            })),
            TreeId::Addresses => Box::new(plain(tree, id, move |key, _| address_row(key, network))),
            TreeId::Fence => Box::new(plain(tree, id, fence_row)),
            TreeId::Changes => Box::new(plain(tree, id, changes_row).flat_map(spread_changes)),
            TreeId::Locks => Box::new(spread(tree, id, |StoredInFlight { transaction, locked_at }| {
                let transaction = transaction.into_transaction();
                let txid = transaction.txid();
                (txid.to_string(), json!({ "transaction": body(transaction), "locked_at": locked_at }))
            })),
            TreeId::Transactions => Box::new(record_rows::<StoredFinal>(tree, id, |stored| {
                let settled = stored.settled;
                json!({
                    "transaction": body(stored.transaction.into_transaction()),
                    "settled": settled,
                    "proof": stored.proof,
                })
            })),
            TreeId::Votes => Box::new(record_rows::<Vec<Vote>>(tree, id, |votes| json!(votes))),
            TreeId::Certificates => Box::new(spread(tree, id, |certificate: Certificate| {
                let kind = if certificate.kind == VoteKind::Abort { "abort" } else { "commit" };
                (format!("{}:{kind}", certificate.txid), json!(certificate))
            })),
            TreeId::Blocks => Box::new(record_rows::<DecidedBlock>(tree, id, |decided| json!(decided))),
            TreeId::Confirmed => Box::new(plain(tree, id, |key, value| {
                Ok((hex::encode(key), json!(decode::<StoredConfirmed>(TreeId::Confirmed, value)?)))
            })),
            TreeId::Dead => Box::new(plain(tree, id, |key, value| {
                Ok((hex::encode(key), json!(decode::<Dead>(TreeId::Dead, value)?)))
            })),
            TreeId::Agreement => Box::new(record_rows::<AgreementRecord>(tree, id, |record| json!(record))),
            TreeId::Subscriptions => Box::new(record_rows::<Subscription>(tree, id, |s| {
                json!({
                    "subscriber_id": s.subscriber_id,
                    "token_hash": hex::encode(s.token_hash),
                    "outpoints": s.outpoints.iter().map(ToString::to_string).collect::<Vec<_>>(),
                    "addresses": s.addresses,
                    "last_used": s.last_used,
                })
            })),
        })
    }
}

fn body(transaction: Transaction) -> Value {
    json!(transaction.to_raw())
}

fn plain<F: Fn(&[u8], &[u8]) -> Result<(String, Value), DatabaseError>>(
    tree: &Tree,
    id: TreeId,
    read: F,
) -> impl Iterator<Item = Result<Row, DatabaseError>> + use<F> {
    tree.iter().map(move |row| {
        let (key, value) = row?;
        let (key, value) = read(&key, &value)?;
        Ok(Row { tree: id.name(), key, value })
    })
}

fn record_rows<T: serde::de::DeserializeOwned + 'static>(
    tree: &Tree,
    id: TreeId,
    show: fn(T) -> Value,
) -> impl Iterator<Item = Result<Row, DatabaseError>> + use<T> {
    records::<T>(tree, id).map(move |record| {
        let (key, value) = record?;
        Ok(Row { tree: id.name(), key: record_key(id, &key), value: show(value) })
    })
}

/// The records of a tree that has one for each commit, taken apart.
fn spread<T: serde::de::DeserializeOwned + 'static>(
    tree: &Tree,
    id: TreeId,
    show: fn(T) -> (String, Value),
) -> impl Iterator<Item = Result<Row, DatabaseError>> + use<T> {
    records::<Vec<T>>(tree, id).flat_map(move |record| match record {
        Ok((_, items)) => {
            let row = |item| {
                let (key, value) = show(item);
                Ok(Row { tree: id.name(), key, value })
            };
            items.into_iter().map(row).collect::<Vec<_>>()
        }
        Err(error) => vec![Err(error)],
    })
}

fn record_key(id: TreeId, key: &[u8]) -> String {
    match id {
        TreeId::Agreement if key.len() == 12 => {
            let number = |bytes: &[u8]| bytes.iter().fold(0_u64, |n, byte| n << 8 | u64::from(*byte));
            format!("{}/{}", number(&key[..8]), number(&key[8..]))
        }
        TreeId::Votes | TreeId::Blocks => {
            <[u8; 8]>::try_from(key).map_or_else(|_| hex::encode(key), |n| u64::from_be_bytes(n).to_string())
        }
        _ => hex::encode(key),
    }
}

fn meta_row(key: &[u8], value: &[u8]) -> Result<(String, Value), DatabaseError> {
    let id = TreeId::Meta;
    let shown = match key {
        meta::SCHEMA => json!(decode::<u32>(id, value)?),
        meta::NETWORK => {
            let stored = decode::<StoredNetwork>(id, value)?;
            json!({
                "network": stored.network,
                "genesis_hash": stored.genesis_hash,
                "public_key": stored.public_key,
                "log_id": hex::encode(stored.log_id),
            })
        }
        meta::HEAD => {
            let head = decode::<Head>(id, value)?;
            json!({
                "commit": head.commit,
                "digest": hex::encode(head.digest),
                "previous_digest": hex::encode(head.previous_digest),
                "sequence": head.sequence,
            })
        }
        meta::CHAIN => {
            let stored = decode::<StoredTip>(id, value)?;
            let tip = stored.tip()?;
            json!({
                "height": tip.height,
                "hash": tip.hash,
                "timestamp_ms": tip.timestamp_ms,
                "supply": tip.supply,
                "state_digest": tip.digest.digest(),
                "unconfirmed_from": stored.unconfirmed_from,
            })
        }
        meta::FENCE => json!(decode::<FenceState>(id, value)?),
        meta::PRUNED => json!(decode::<Pruned>(id, value)?),
        meta::SUSPENSION => json!(String::from_utf8_lossy(value)),
        _ => json!(hex::encode(value)),
    };
    Ok((String::from_utf8_lossy(key).into_owned(), shown))
}

fn fence_row(key: &[u8], _: &[u8]) -> Result<(String, Value), DatabaseError> {
    let outpoint = parse_outpoint_key(key);
    let outpoint = outpoint.ok_or_else(|| DatabaseError::corrupt("fence", "a key of the wrong length"))?;
    Ok((outpoint.to_string(), Value::Null))
}

fn address_row(key: &[u8], network: Network) -> Result<(String, Value), DatabaseError> {
    let wrong = || DatabaseError::corrupt("addresses", "a key of the wrong length");
    let (payload, outpoint) = key.split_first_chunk::<{ Address::PAYLOAD_LEN }>().ok_or_else(wrong)?;
    let address = Address::from_payload(network, *payload).map_err(|e| DatabaseError::corrupt("addresses", e))?;
    let outpoint = parse_outpoint_key(outpoint).ok_or_else(wrong)?;
    Ok((format!("{address}/{outpoint}"), Value::Null))
}

fn changes_row(key: &[u8], value: &[u8]) -> Result<(String, Value), DatabaseError> {
    let entries: Vec<LogEntry> = decode(TreeId::Changes, value)?;
    Ok((sequence_of(key)?.to_string(), json!(entries)))
}

/// The log's rows hold several entries each; a reader wants one number, one entry.
fn spread_changes(row: Result<Row, DatabaseError>) -> Vec<Result<Row, DatabaseError>> {
    let row = match row {
        Ok(row) => row,
        Err(error) => return vec![Err(error)],
    };
    let (Ok(first), Value::Array(entries)) = (row.key.parse::<u64>(), &row.value) else { return vec![Ok(row)] };
    let one = |(n, entry): (u64, &Value)| Ok(Row { tree: row.tree, key: n.to_string(), value: entry.clone() });
    (first..).zip(entries).map(one).collect()
}
