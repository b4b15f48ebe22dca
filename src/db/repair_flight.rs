//! Making what is in flight whole again, before a database goes behind the fence.
//!
//! Where votes may be missing, what is there may not fit together either: a lock without its
//! vote, a vote without its transaction. Behind the fence nothing is voted on that this
//! concerns, so what fits together is kept, what does not is taken out and told, and the
//! change log begins anew from the states.

use std::collections::{BTreeMap, BTreeSet};

use super::DatabaseError;
use super::codec::{RowChange, encode, put_record, records};
use super::commit::{CommitBatch, Maintenance};
use super::pack::StoredCertificates;
use super::prune::Pruned;
use super::schema::{StoredInFlight, StoredTip, TreeId, meta};
use super::store::Database;
use crate::consensus::{Changes, InFlight, LogEntry, Transition, Vote, VoteKind};
use crate::types::{OutPoint, Txid, UTXOState};

/// Rows that one commit removes.
const ROWS_AT_ONCE: usize = 4_096;

/// Rewrites what is in flight so that it fits together. Gives the votes that had to go: the
/// member cannot vote on their transactions again, for the fence is around them.
pub(super) fn settle_flight(database: &mut Database) -> Result<Vec<Vote>, DatabaseError> {
    let reader = database.reader();
    let mut votes: BTreeMap<Txid, BTreeSet<VoteKind>> = BTreeMap::new();
    for record in records::<Vec<Vote>>(reader.tree(TreeId::Votes), TreeId::Votes) {
        // What cannot be read is gone; the fence is there for that.
        for vote in record.map(|(_, votes)| votes).unwrap_or_default() {
            votes.entry(vote.txid).or_default().insert(vote.kind);
        }
    }
    let (mut flights, mut kept, mut certificates) = (Vec::new(), Vec::new(), Vec::new());
    let mut held: BTreeSet<OutPoint> = BTreeSet::new();
    for flight in reader.in_flight_after(None, usize::MAX) {
        let transaction = flight.transaction;
        let txid = transaction.txid();
        let approve = reader.certificate(&txid, VoteKind::Approve)?;
        let abort = reader.certificate(&txid, VoteKind::Abort)?;
        let said = votes.remove(&txid).unwrap_or_default();
        let free = |outpoint: &OutPoint| -> Result<bool, DatabaseError> {
            Ok(!held.contains(outpoint) && reader.utxo(outpoint)?.is_some())
        };
        let mut lockable = said.contains(&VoteKind::Approve);
        for outpoint in transaction.spends().filter(|_| lockable).collect::<Vec<_>>() {
            lockable &= free(&outpoint)?;
        }
        if lockable {
            held.extend(transaction.spends());
        }
        let fits = |kind: &VoteKind| match kind {
            VoteKind::Approve => lockable,
            VoteKind::Commit => approve.is_some() && !said.contains(&VoteKind::Abort),
            VoteKind::Abort => !said.contains(&VoteKind::Commit),
        };
        let (stay, go): (Vec<VoteKind>, Vec<VoteKind>) = said.iter().copied().partition(fits);
        kept.extend(stay.into_iter().map(|kind| Vote { kind, txid }));
        votes.insert(txid, go.into_iter().collect());
        certificates.extend(approve.into_iter().chain(abort));
        let locked_at = lockable.then_some(flight.locked_at.unwrap_or_default());
        flights.push(StoredInFlight::new(&InFlight { transaction, locked_at }));
    }
    let mut rows = Vec::new();
    for tree in [TreeId::Locks, TreeId::Votes, TreeId::Certificates, TreeId::Agreement] {
        for row in reader.tree(tree).iter() {
            rows.push(RowChange { tree, key: row?.0.to_vec(), value: None });
        }
    }
    // Under the number of a commit that is over, as a commit would have written it.
    let key = reader.durable_head().commit.to_be_bytes();
    if !flights.is_empty() {
        put_record(&mut rows, TreeId::Locks, &key, &flights)?;
    }
    if !kept.is_empty() {
        put_record(&mut rows, TreeId::Votes, &key, &kept)?;
    }
    if !certificates.is_empty() {
        put_record(&mut rows, TreeId::Certificates, &key, &StoredCertificates::of(&certificates))?;
    }
    commit(database, rows)?;
    let mut gone = Vec::new();
    for (txid, kinds) in votes {
        // Votes on what has ended are of no use to anybody.
        if !reader.is_final(&txid)? && reader.dead(&txid)?.is_none() {
            gone.extend(kinds.into_iter().map(|kind| Vote { kind, txid }));
        }
    }
    Ok(gone)
}

/// Lets the change log begin anew: with what is final and in no block, for that is known by
/// the log alone. The old entries go only after that.
pub(super) fn restart_log(database: &mut Database) -> Result<(), DatabaseError> {
    let reader = database.reader();
    let end = reader.durable_head().sequence;
    let mut changes = Changes::default();
    let mut place = reader.unconfirmed_from()?.saturating_sub(1);
    let mut named = BTreeSet::new();
    while place < end {
        let (txids, last) = reader.unconfirmed(place, end, ROWS_AT_ONCE)?;
        for txid in txids.into_iter().filter(|txid| named.insert(*txid)) {
            let Some((transaction, settled)) = reader.finalized(&txid)? else { continue };
            for outpoint in transaction.spends() {
                let Some(utxo) = reader.utxo(&outpoint)? else { continue };
                changes.log.push(LogEntry::Transition(Transition {
                    outpoint,
                    output: utxo.output,
                    old_state: Some(UTXOState::Unspent),
                    new_state: utxo.state,
                    timestamp: settled.finalized_at,
                }));
            }
        }
        if last == place {
            break;
        }
        place = last;
    }
    let stored = StoredTip::new(&reader.tip()?, end + 1);
    let tip = RowChange { tree: TreeId::Meta, key: meta::CHAIN.to_vec(), value: Some(encode(TreeId::Meta, &stored)?) };
    let maintenance = Maintenance::of(vec![tip]);
    database.commit(CommitBatch { changes, maintenance, ..CommitBatch::default() }, ())?.into_inner();
    let pruned = reader.pruned()?;
    loop {
        let mut rows = Vec::new();
        for row in reader.tree(TreeId::Changes).iter().take(ROWS_AT_ONCE) {
            let (key, _) = row?;
            let old = super::store::sequence_of(&key).map_or(true, |sequence| sequence <= end);
            if old {
                rows.push(RowChange { tree: TreeId::Changes, key: key.to_vec(), value: None });
            }
        }
        if rows.is_empty() {
            return Ok(());
        }
        let value = Some(encode(TreeId::Meta, &Pruned { sequence: end, ..pruned })?);
        rows.push(RowChange { tree: TreeId::Meta, key: meta::PRUNED.to_vec(), value });
        commit(database, rows)?;
    }
}

fn commit(database: &mut Database, rows: Vec<RowChange>) -> Result<(), DatabaseError> {
    let batch = CommitBatch { maintenance: Maintenance::of(rows), ..CommitBatch::default() };
    database.commit(batch, ()).map(super::Durable::into_inner)
}
