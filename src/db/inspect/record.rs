//! Records as they stand in the trees, decoded, and what each is about.

use std::ops::Bound;
use std::sync::Arc;

use serde_json::{Value, json};

use super::super::DatabaseError;
use super::super::codec::{decode, records_within};
use super::super::confirmed::{StoredConfirmed, confirmed_of_row};
use super::super::engine::Tree;
use super::super::finals::{RecentFinals, body_at, get_settled};
use super::super::kept::Kept;
use super::super::outputs::{OutputRow, StoredOutput, parse_row_key, utxo_of};
use super::super::pack::StoredCertificates;
use super::super::prune::Pruned;
use super::super::schema::{
    Head, StoredInFlight, StoredNetwork, StoredTip, StoredTransaction, Subscription, TreeId, meta, parse_outpoint_key,
};
use super::super::store::{Reader, Trees, sequence_of};
use super::Row;
use crate::consensus::{AgreementRecord, Certificate, Dead, FenceState, LogEntry, Settled, Utxo, Vote, VoteKind};
use crate::types::{Address, DecidedBlock, Height, Network, OutPoint, Transaction, Txid, UnixSeconds};

/// A record with its readable key.
#[derive(Debug)]
pub(super) struct Record {
    pub(super) tree: TreeId,
    pub(super) key: String,
    pub(super) content: Content,
}

/// What a record says.
#[derive(Debug)]
pub(super) enum Content {
    Meta(Value),
    Utxo(OutPoint, Utxo),
    Address(Address, OutPoint),
    InFlight(Box<Transaction>, Option<UnixSeconds>),
    Votes(Vec<Vote>),
    Certificate(Certificate),
    Settled(Box<Transaction>, Settled, Option<Certificate>),
    Change(u64, LogEntry),
    Subscription(Subscription),
    Block(Box<DecidedBlock>),
    Confirmed(Txid, StoredConfirmed),
    Dead(Txid, Dead),
    Agreement(Height, AgreementRecord),
    Fence(OutPoint),
}

impl Record {
    pub(super) fn into_row(self) -> Row {
        let value = match self.content {
            Content::Meta(value) => value,
            Content::Utxo(_, utxo) => json!(utxo),
            Content::Address(..) | Content::Fence(_) => Value::Null,
            Content::InFlight(transaction, locked_at) => {
                json!({ "transaction": transaction.to_raw(), "locked_at": locked_at })
            }
            Content::Votes(votes) => json!(votes),
            Content::Certificate(certificate) => json!(certificate),
            Content::Settled(transaction, settled, proof) => {
                json!({ "transaction": transaction.to_raw(), "settled": settled, "proof": proof })
            }
            Content::Change(_, entry) => json!(entry),
            Content::Subscription(subscription) => subscription_json(&subscription),
            Content::Block(decided) => json!(decided),
            Content::Confirmed(_, confirmed) => json!(confirmed),
            Content::Dead(_, dead) => json!(dead),
            Content::Agreement(_, record) => json!(record),
        };
        Row { tree: self.tree.name(), key: self.key, value }
    }
}

fn subscription_json(subscription: &Subscription) -> Value {
    json!({
        "subscriber_id": subscription.subscriber_id,
        "token_hash": hex::encode(subscription.token_hash),
        "outpoints": subscription.outpoints.iter().map(ToString::to_string).collect::<Vec<_>>(),
        "addresses": subscription.addresses,
        "last_used": subscription.last_used,
    })
}

/// Keys from (and with) the first up to (and without) the second.
pub(super) type KeyRange = (Bound<Vec<u8>>, Bound<Vec<u8>>);

/// The records of a tree.
pub(super) type Records = Box<dyn Iterator<Item = Result<Record, DatabaseError>>>;

/// Decodes the records of a tree within a range. What an output's state follows from is
/// looked up with the reader.
pub(super) fn walk(trees: &Trees, id: TreeId, range: KeyRange, reader: Option<&Reader>, network: Network) -> Records {
    let tree = trees.get(id);
    match id {
        TreeId::Meta => plain(tree, id, range, meta_record),
        TreeId::Utxos => {
            let (trees, reader) = (trees.clone(), reader.cloned());
            Box::new(tree.range(range.0, range.1).flat_map(move |row| {
                let lock = |outpoint: &OutPoint| reader.as_ref().and_then(|reader| reader.lock(outpoint));
                let one = |(outpoint, stored): (OutPoint, StoredOutput)| {
                    let utxo = utxo_of(&trees, &stored, lock(&outpoint)).transpose()?;
                    let content = |utxo| Content::Utxo(outpoint, utxo);
                    Some(utxo.map(|utxo| Record { tree: id, key: outpoint.to_string(), content: content(utxo) }))
                };
                match row.and_then(|(key, value)| Ok((parse_row_key(&key)?, OutputRow::decode(&value)?))) {
                    Ok((first, row)) => row.each(first).filter_map(one).collect(),
                    Err(error) => vec![Err(error)],
                }
            }))
        }
        TreeId::Addresses => plain(tree, id, range, move |key, _| address_record(key, network)),
        TreeId::Fence => plain(tree, id, range, |key, _| {
            let outpoint = outpoint_of(TreeId::Fence, key)?;
            Ok((outpoint.to_string(), Content::Fence(outpoint)))
        }),
        TreeId::Confirmed => {
            let bodies = trees.get(TreeId::Transactions).clone();
            Box::new(tree.range(range.0, range.1).flat_map(move |row| {
                let one = |(number, confirmed): (u64, StoredConfirmed)| {
                    let unknown = |error| {
                        let what = format!("number {number}, in the block of height {}: {error}", confirmed.height);
                        DatabaseError::corrupt(id.name(), what)
                    };
                    let txid = body_at(&bodies, number).map_err(unknown)?.txid();
                    Ok(Record { tree: id, key: txid.to_string(), content: Content::Confirmed(txid, confirmed) })
                };
                match row.and_then(|(key, value)| confirmed_of_row(&key, &value)) {
                    Ok(all) => all.into_iter().map(one).collect(),
                    Err(error) => vec![Err(error)],
                }
            }))
        }
        TreeId::Dead => plain(tree, id, range, |key, value| {
            let txid = txid_of(TreeId::Dead, key)?;
            Ok((txid.to_string(), Content::Dead(txid, decode(TreeId::Dead, value)?)))
        }),
        TreeId::Changes => Box::new(tree.range(range.0, range.1).flat_map(|row| {
            let entries = row.and_then(|(key, value)| {
                let entries: Vec<LogEntry> = decode(TreeId::Changes, &value)?;
                Ok((sequence_of(&key)?, entries))
            });
            // The log's rows hold several entries each; a reader wants one number, one entry.
            match entries {
                Ok((first, entries)) => (first..).zip(entries).map(|(n, entry)| Ok(change(n, entry))).collect(),
                Err(error) => vec![Err(error)],
            }
        })),
        TreeId::Locks => spread::<StoredInFlight>(tree, id, range, |stored| {
            let transaction = stored.transaction.into_transaction();
            (transaction.txid().to_string(), Content::InFlight(Box::new(transaction), stored.locked_at))
        }),
        TreeId::Transactions => {
            let (trees, finals) = (trees.clone(), RecentFinals::default());
            Box::new(records_within::<Vec<StoredTransaction>>(tree, id, range.0, range.1).flat_map(move |record| {
                let one = |(number, stored): (u64, StoredTransaction)| {
                    let transaction = Box::new(stored.into_transaction());
                    let txid = transaction.txid();
                    let stray =
                        || DatabaseError::corrupt(id.name(), format!("{txid}, number {number}, is not settled here"));
                    let settled = get_settled(&trees, &txid)?.filter(|settled| settled.number == number);
                    let settled = settled.ok_or_else(stray)?.settled;
                    let proof = finals.proof(&trees, &txid)?.map(Arc::unwrap_or_clone);
                    let content = Content::Settled(transaction, settled, proof);
                    Ok(Record { tree: id, key: txid.to_string(), content })
                };
                match record {
                    Ok((key, bodies)) => (number(&key)..=u64::MAX).zip(bodies).map(one).collect::<Vec<_>>(),
                    Err(error) => vec![Err(error)],
                }
            }))
        }
        // Of an older schema nothing is shown.
        TreeId::Bodies => Box::new(std::iter::empty()),
        TreeId::Votes => split::<Vec<Vote>>(tree, id, range, |_, votes| Content::Votes(votes)),
        TreeId::Certificates | TreeId::Proofs => certificates(tree, id, range),
        TreeId::Blocks => split::<DecidedBlock>(tree, id, range, |_, decided| Content::Block(Box::new(decided))),
        TreeId::Agreement => split::<AgreementRecord>(tree, id, range, |key, record| {
            Content::Agreement(number(key.get(..8).unwrap_or_default()), record)
        }),
        TreeId::Subscriptions => split::<Subscription>(tree, id, range, |_, s| Content::Subscription(s)),
    }
}

fn certificates(tree: &Tree, id: TreeId, range: KeyRange) -> Records {
    Box::new(records_within::<StoredCertificates>(tree, id, range.0, range.1).flat_map(move |record| {
        let one = |certificate: Certificate| {
            let kind = if certificate.kind == VoteKind::Abort { "abort" } else { "commit" };
            let key = format!("{}:{kind}", certificate.txid);
            Ok(Record { tree: id, key, content: Content::Certificate(certificate) })
        };
        match record.and_then(|(_, stored)| stored.into_certificates(id)) {
            Ok(certificates) => certificates.into_iter().map(one).collect(),
            Err(error) => vec![Err(error)],
        }
    }))
}

fn change(sequence: u64, entry: LogEntry) -> Record {
    Record { tree: TreeId::Changes, key: sequence.to_string(), content: Content::Change(sequence, entry) }
}

fn plain<F>(tree: &Tree, id: TreeId, range: KeyRange, read: F) -> Records
where
    F: Fn(&[u8], &[u8]) -> Result<(String, Content), DatabaseError> + 'static,
{
    Box::new(tree.range(range.0, range.1).map(move |row| {
        let (key, value) = row?;
        let (key, content) = read(&key, &value)?;
        Ok(Record { tree: id, key, content })
    }))
}

fn split<T: serde::de::DeserializeOwned + 'static>(
    tree: &Tree,
    id: TreeId,
    range: KeyRange,
    show: fn(&[u8], T) -> Content,
) -> Records {
    Box::new(records_within::<T>(tree, id, range.0, range.1).map(move |record| {
        let (key, value) = record?;
        Ok(Record { tree: id, key: record_key(id, &key), content: show(&key, value) })
    }))
}

/// The records of a tree that has a list for each commit, taken apart.
fn spread<T: serde::de::DeserializeOwned + 'static>(
    tree: &Tree,
    id: TreeId,
    range: KeyRange,
    show: fn(T) -> (String, Content),
) -> Records {
    Box::new(records_within::<Vec<T>>(tree, id, range.0, range.1).flat_map(move |record| match record {
        Ok((_, items)) => {
            let one = |item| {
                let (key, content) = show(item);
                Ok(Record { tree: id, key, content })
            };
            items.into_iter().map(one).collect::<Vec<_>>()
        }
        Err(error) => vec![Err(error)],
    }))
}

fn number(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0, |n, byte| n << 8 | u64::from(*byte))
}

fn record_key(id: TreeId, key: &[u8]) -> String {
    match id {
        TreeId::Agreement if key.len() == 12 => format!("{}/{}", number(&key[..8]), number(&key[8..])),
        TreeId::Votes | TreeId::Blocks if key.len() == 8 => number(key).to_string(),
        _ => hex::encode(key),
    }
}

fn wrong_key(id: TreeId) -> DatabaseError {
    DatabaseError::corrupt(id.name(), "a key of the wrong length")
}

fn outpoint_of(id: TreeId, key: &[u8]) -> Result<OutPoint, DatabaseError> {
    parse_outpoint_key(key).ok_or_else(|| wrong_key(id))
}

fn txid_of(id: TreeId, key: &[u8]) -> Result<Txid, DatabaseError> {
    key.try_into().map(Txid::from_bytes).map_err(|_| wrong_key(id))
}

fn address_record(key: &[u8], network: Network) -> Result<(String, Content), DatabaseError> {
    let wrong = || wrong_key(TreeId::Addresses);
    let (payload, outpoint) = key.split_first_chunk::<{ Address::PAYLOAD_LEN }>().ok_or_else(wrong)?;
    let address = Address::from_payload(network, *payload).map_err(|e| DatabaseError::corrupt("addresses", e))?;
    let outpoint = outpoint_of(TreeId::Addresses, outpoint)?;
    Ok((format!("{address}/{outpoint}"), Content::Address(address, outpoint)))
}

fn meta_record(key: &[u8], value: &[u8]) -> Result<(String, Content), DatabaseError> {
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
        meta::FORGOTTEN => json!(decode::<Height>(id, value)?),
        meta::KEPT => json!(decode::<Kept>(id, value)?),
        meta::SUSPENSION => json!(String::from_utf8_lossy(value)),
        _ => json!(hex::encode(value)),
    };
    Ok((String::from_utf8_lossy(key).into_owned(), Content::Meta(shown)))
}
