//! Settled transactions: a small row under the txid, and the body with its proof under a
//! number that rises.
//!
//! A txid is as good as random, so what stands under it goes into a different leaf of its
//! tree each time, and the larger the rows, the more of the tree has to come through the
//! cache for it. Bodies and proofs are large. Under a rising number they are always written
//! at the end of their tree, and what is far back is not touched again before it is pruned.

use std::ops::Bound;

use super::DatabaseError;
use super::codec::{RowChange, decode, encode, get_record, put_record, record_parts, remove_record, split_row_key};
use super::engine::Tree;
use super::schema::{StoredBody, StoredFinal, StoredSettled, TreeId};
use super::store::Trees;
use crate::consensus::Settled;
use crate::types::Txid;

/// Writes a settled transaction under a number that none has had.
pub(super) fn put_final(
    rows: &mut Vec<RowChange>,
    number: u64,
    txid: &Txid,
    settled: Settled,
    body: &StoredBody,
) -> Result<(), DatabaseError> {
    let value = Some(encode(TreeId::Transactions, &StoredSettled { settled, number })?);
    rows.push(RowChange { tree: TreeId::Transactions, key: txid.as_bytes().to_vec(), value });
    put_record(rows, TreeId::Bodies, &number.to_be_bytes(), body)
}

/// Writes a body again, with less than it had.
pub(super) fn replace_body(
    trees: &Trees,
    rows: &mut Vec<RowChange>,
    number: u64,
    body: &StoredBody,
) -> Result<(), DatabaseError> {
    let key = number.to_be_bytes();
    let old = record_parts(trees.get(TreeId::Bodies), TreeId::Bodies, &key)?;
    remove_record(rows, TreeId::Bodies, &key, old);
    put_record(rows, TreeId::Bodies, &key, body)
}

/// The row under a txid, without its body.
pub(super) fn get_settled(trees: &Trees, txid: &Txid) -> Result<Option<StoredSettled>, DatabaseError> {
    let row = trees.get(TreeId::Transactions).get(txid.as_bytes())?;
    row.map(|row| decode(TreeId::Transactions, &row)).transpose()
}

/// Whether a transaction is settled; cheaper than reading it.
pub(super) fn is_final(trees: &Trees, txid: &Txid) -> Result<bool, DatabaseError> {
    Ok(trees.get(TreeId::Transactions).get(txid.as_bytes())?.is_some())
}

/// A settled transaction, whole.
pub(super) fn get_final(trees: &Trees, txid: &Txid) -> Result<Option<StoredFinal>, DatabaseError> {
    get_settled(trees, txid)?.map(|settled| with_body(trees.get(TreeId::Bodies), settled)).transpose()
}

/// A settled transaction's row with what stands under its number.
pub(super) fn with_body(bodies: &Tree, settled: StoredSettled) -> Result<StoredFinal, DatabaseError> {
    let StoredSettled { settled, number } = settled;
    let body = get_record(bodies, TreeId::Bodies, &number.to_be_bytes())?;
    let missing = || DatabaseError::corrupt("bodies", format!("number {number} is missing"));
    let StoredBody { transaction, proof } = body.ok_or_else(missing)?;
    Ok(StoredFinal { settled, number, transaction, proof })
}

/// The number of the next body.
pub(super) fn next_number(bodies: &Tree) -> Result<u64, DatabaseError> {
    let Some((key, _)) = bodies.range(Bound::Unbounded, Bound::Unbounded).next_back().transpose()? else {
        return Ok(0);
    };
    let number = split_row_key(&key).and_then(|(number, _)| Some(u64::from_be_bytes(number.try_into().ok()?)));
    let next = number.and_then(|number| number.checked_add(1));
    next.ok_or_else(|| DatabaseError::corrupt("bodies", "a key that none can have"))
}
