//! Putting a database behind the fence (protocol §10).
//!
//! What this database knows of is fenced here; what the other members know of, the node asks
//! them for when it is started. Between the first and the last commit of this the database
//! is suspended, so whatever cuts it off leaves a node that does not vote.

use super::DatabaseError;
use super::commit::CommitBatch;
use super::store::Database;
use crate::consensus::{Changes, FenceState, Suspension};
use crate::types::{OutPoint, UTXOState};

/// Outputs that one commit puts behind the fence.
const OUTPUTS_AT_ONCE: usize = 4_096;

/// Puts everything that a database knows of behind the fence, gives its change log a new
/// name, and lifts a suspension: the fence takes its place. Gives the number of outputs
/// that were put there. An observer has no votes to lose and gets the new name only.
pub(super) fn put_behind_fence(database: &mut Database) -> Result<Option<u64>, DatabaseError> {
    fence_in_chunks(database, OUTPUTS_AT_ONCE)
}

fn fence_in_chunks(database: &mut Database, at_once: usize) -> Result<Option<u64>, DatabaseError> {
    let reader = database.reader();
    let mut network = reader.network().clone();
    network.log_id = rand::random();
    if network.public_key.is_none() {
        let batch = CommitBatch { network: Some(network), lift_suspension: true, ..CommitBatch::default() };
        database.commit(batch, ())?.into_inner();
        return Ok(None);
    }
    suspend(database)?;
    let mut fence = Fencing { database, changes: Changes::default(), fenced: 0, at_once };
    for output in reader.outputs() {
        let (outpoint, utxo) = output?;
        if !matches!(utxo.state, UTXOState::Confirmed { .. }) {
            fence.put(outpoint)?;
        }
    }
    let mut after = None;
    loop {
        let flights = reader.in_flight_after(after, OUTPUTS_AT_ONCE);
        let Some(last) = flights.last().map(|flight| flight.transaction.txid()) else { break };
        after = Some(last);
        for flight in flights {
            for outpoint in
                flight.transaction.spends().chain(flight.transaction.creates().map(|(outpoint, _)| outpoint))
            {
                fence.put(outpoint)?;
            }
        }
    }
    let (end, mut place) = (reader.durable_head().sequence, reader.unconfirmed_from()?.saturating_sub(1));
    while place < end {
        let (txids, last) = reader.unconfirmed(place, end, OUTPUTS_AT_ONCE)?;
        for txid in txids {
            let Some((transaction, _)) = reader.finalized(&txid)? else { continue };
            for outpoint in transaction.spends().chain(transaction.creates().map(|(outpoint, _)| outpoint)) {
                fence.put(outpoint)?;
            }
        }
        if last == place {
            break;
        }
        place = last;
    }
    let fenced = fence.finish(network)?;
    Ok(Some(fenced))
}

/// Whatever happens from here on, this database does not vote.
pub(super) fn suspend(database: &mut Database) -> Result<(), DatabaseError> {
    let suspension = Some(Suspension::GuardMismatch);
    database.commit(CommitBatch { suspension, ..CommitBatch::default() }, ()).map(super::Durable::into_inner)
}

/// A fence that is being put up.
struct Fencing<'a> {
    database: &'a mut Database,
    changes: Changes,
    fenced: u64,
    at_once: usize,
}

impl Fencing<'_> {
    fn put(&mut self, outpoint: OutPoint) -> Result<(), DatabaseError> {
        let known = self.changes.fence.contains_key(&outpoint) || self.database.reader().is_fenced(&outpoint)?;
        if !known {
            self.changes.fence.insert(outpoint, true);
            self.fenced += 1;
        }
        if self.changes.fence.len() >= self.at_once {
            let changes = std::mem::take(&mut self.changes);
            self.database.commit(CommitBatch { changes, ..CommitBatch::default() }, ())?.into_inner();
        }
        Ok(())
    }

    fn finish(self, network: super::StoredNetwork) -> Result<u64, DatabaseError> {
        let changes = Changes { fence_state: Some(FenceState::Asking), ..self.changes };
        let batch = CommitBatch { changes, network: Some(network), lift_suspension: true, ..CommitBatch::default() };
        self.database.commit(batch, ())?.into_inner();
        Ok(self.fenced)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;
    use std::sync::Arc;

    use super::*;
    use crate::consensus::{Certificate, Finalized, InFlight, LogEntry, Settled, Transition, Utxo, VoteKind};
    use crate::db::samples::{genesis, open_sample, spend};
    use crate::db::schema::{TreeId, parse_outpoint_key};
    use crate::db::{MemoryDisk, Opened};
    use crate::types::{Amount, Genesis};

    /// A database with something final and something in flight that spends what is not here yet. Gives what has to be fenced.
    fn used(disk: &MemoryDisk, genesis: &Genesis, member: bool) -> BTreeSet<OutPoint> {
        let mut database = open_sample(disk, genesis, member, true).database;
        let coins: Vec<_> = genesis.transaction().creates().collect();
        let done = spend(coins[1].0, 1);
        let elsewhere = OutPoint { txid: spend(coins[2].0, 1).txid(), vout: 0 };
        let flying = spend(elsewhere, 1);
        let mut changes = Changes::default();
        let mut step = |outpoint, output, old_state, new_state| {
            changes.utxos.insert(outpoint, Utxo { output, state: new_state });
            let step = Transition { outpoint, output, old_state, new_state, timestamp: 5 };
            changes.log.push(LogEntry::Transition(step));
        };
        let spent = UTXOState::SpentFinalized { txid: done.txid(), finalized_at: 5, votes: 1 };
        step(coins[1].0, coins[1].1, Some(UTXOState::Unspent), spent);
        let born = OutPoint { txid: done.txid(), vout: 0 };
        step(born, done.outputs()[0], None, UTXOState::Unspent);
        let settled = Settled { finalized_at: 5, votes: 1, fee: Amount::from_units(1).unwrap() };
        let proof = Certificate { kind: VoteKind::Commit, txid: done.txid(), epoch: 0, votes: vec![] };
        changes
            .finalized
            .insert(done.txid(), Finalized { transaction: done, settled, certificate: Some(Arc::new(proof)) });
        let ahead = OutPoint { txid: flying.txid(), vout: 0 };
        changes.in_flight.insert(flying.txid(), Some(InFlight { transaction: flying, locked_at: None }));
        database.commit(CommitBatch { changes, ..CommitBatch::default() }, ()).unwrap().into_inner();
        let live = coins.iter().map(|(outpoint, _)| *outpoint);
        live.chain([born, elsewhere, ahead]).collect()
    }

    fn open(disk: &MemoryDisk, genesis: &Genesis, member: bool) -> Opened {
        open_sample(disk, genesis, member, false)
    }

    fn fenced(database: &Database) -> BTreeSet<OutPoint> {
        let rows = database.reader().tree(TreeId::Fence).iter();
        rows.map(|row| parse_outpoint_key(&row.unwrap().0).unwrap()).collect()
    }

    #[test]
    fn all_that_can_have_been_voted_on_is_fenced_and_the_log_is_another_one() {
        let (disk, genesis) = (MemoryDisk::new(), genesis());
        let expected = used(&disk, &genesis, true);
        let mut database = open(&disk, &genesis, true).database;
        let log_id = database.reader().network().log_id;
        let count = fence_in_chunks(&mut database, 3).unwrap();
        assert_eq!(count, Some(expected.len() as u64));
        drop(database);
        let Opened { database, recovered } = open(&disk, &genesis, true);
        assert_eq!(fenced(&database), expected);
        assert_eq!(recovered.fence, Some((FenceState::Asking, expected.len() as u64)));
        assert_eq!(recovered.suspension, None);
        assert_ne!(database.reader().network().log_id, log_id);
    }

    #[test]
    fn an_observer_only_renames_its_log() {
        let (disk, genesis) = (MemoryDisk::new(), genesis());
        used(&disk, &genesis, false);
        let mut database = open(&disk, &genesis, false).database;
        let (log_id, commit) = (database.reader().network().log_id, database.head.commit);
        assert_eq!(put_behind_fence(&mut database).unwrap(), None);
        assert_eq!(database.head.commit, commit + 1);
        drop(database);
        let Opened { database, recovered } = open(&disk, &genesis, false);
        assert_ne!(database.reader().network().log_id, log_id);
        assert_eq!((recovered.fence, fenced(&database).len()), (None, 0));
    }

    /// The power goes after each write in turn. Whatever is on the disk then either does not
    /// vote or is behind the whole fence, and putting it there again ends it.
    #[test]
    fn a_crash_leaves_a_database_that_does_not_vote() {
        let genesis = genesis();
        let disk = MemoryDisk::new();
        let expected = used(&disk, &genesis, true);
        let image = disk.image();
        let mut complete = 0;
        for writes in 0.. {
            disk.put_back(&image, true);
            let mut database = open(&disk, &genesis, true).database;
            disk.fail_after(writes);
            let outcome = fence_in_chunks(&mut database, 4);
            drop(database);
            let torn = disk.image();
            for keep in [false, true] {
                disk.put_back(&torn, true);
                disk.lose_power(keep);
                let Opened { mut database, recovered } = open(&disk, &genesis, true);
                let untouched = fenced(&database).is_empty();
                let whole = fenced(&database) == expected && recovered.fence.is_some();
                assert!(untouched || whole || recovered.suspension.is_some(), "after {writes} writes");
                complete += u32::from(whole && outcome.is_err());
                put_behind_fence(&mut database).unwrap();
                drop(database);
                let Opened { database, recovered } = open(&disk, &genesis, true);
                assert_eq!((fenced(&database), recovered.suspension), (expected.clone(), None));
            }
            if outcome.is_ok() {
                assert!(writes > 12 && complete > 0, "several commits, and the last one torn: {writes} {complete}");
                return;
            }
        }
    }
}
