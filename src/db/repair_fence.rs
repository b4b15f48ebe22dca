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
    let reader = database.reader();
    let mut network = reader.network().clone();
    network.log_id = rand::random();
    if network.public_key.is_none() {
        let batch = CommitBatch { network: Some(network), lift_suspension: true, ..CommitBatch::default() };
        database.commit(batch, ())?.into_inner();
        return Ok(None);
    }
    suspend(database)?;
    let mut fence = Fencing { database, changes: Changes::default(), fenced: 0 };
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
}

impl Fencing<'_> {
    fn put(&mut self, outpoint: OutPoint) -> Result<(), DatabaseError> {
        let known = self.changes.fence.contains_key(&outpoint) || self.database.reader().is_fenced(&outpoint)?;
        if !known {
            self.changes.fence.insert(outpoint, true);
            self.fenced += 1;
        }
        if self.changes.fence.len() >= OUTPUTS_AT_ONCE {
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
