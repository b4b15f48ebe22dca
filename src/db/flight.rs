//! What is in flight: in memory for whoever reads, and in rows of commits on disk.
//!
//! What one commit begins is written together: the bodies with their locks in one record of
//! `locks`, the votes in one of `votes`, the certificates in one of `certificates`, each
//! under the commit's number. A commit's records go when the last of its transactions has
//! left flight. An output that is locked has no row of its own for that: that it is locked
//! follows from the body and `locked_at`, and is kept in memory here.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;

use super::DatabaseError;
use super::codec::{RowChange, put_record, record_parts, records, remove_record};
use super::finals::is_final;
use super::outputs::{StoredOutput, get_output};
use super::pack::StoredCertificates;
use super::schema::{StoredInFlight, TreeId};
use super::store::Trees;
use crate::consensus::{Certificate, Changes, InFlight, Recovered, Vote, VoteKind};
use crate::types::{OutPoint, Transaction, Txid, UTXOState, UnixSeconds};

/// This member's votes on each transaction.
type OwnVotes = BTreeMap<Txid, Vec<VoteKind>>;

/// The trees that have a record for each commit.
const TREES: [TreeId; 3] = [TreeId::Locks, TreeId::Votes, TreeId::Certificates];

/// A transaction in flight.
#[derive(Debug, Clone)]
pub(super) struct Flight {
    pub(super) transaction: Arc<Transaction>,
    pub(super) locked_at: Option<UnixSeconds>,
    /// C(T), or F(T) where it cannot be acted on yet.
    pub(super) commit: Option<Arc<Certificate>>,
    /// A(T).
    pub(super) abort: Option<Arc<Certificate>>,
}

/// All of it, as of the last commit that was applied.
#[derive(Debug, Clone, Default)]
pub(super) struct FlightTable {
    flights: BTreeMap<Txid, Flight>,
    locks: HashMap<OutPoint, (Txid, UnixSeconds)>,
}

impl FlightTable {
    pub(super) fn get(&self, txid: &Txid) -> Option<&Flight> {
        self.flights.get(txid)
    }

    /// Up to `limit` of them after `after`, in order of txid.
    pub(super) fn after(&self, after: Option<Txid>, limit: usize) -> Vec<(Txid, Flight)> {
        use std::ops::Bound::{Excluded, Unbounded};
        let from = after.map_or(Unbounded, Excluded);
        let range = self.flights.range((from, Unbounded)).take(limit);
        range.map(|(txid, flight)| (*txid, flight.clone())).collect()
    }

    /// For which transaction an output is locked, and since when.
    pub(super) fn lock(&self, outpoint: &OutPoint) -> Option<(Txid, UnixSeconds)> {
        self.locks.get(outpoint).copied()
    }

    fn put(&mut self, txid: Txid, transaction: &Arc<Transaction>, locked_at: Option<UnixSeconds>) {
        if let Some(locked_at) = locked_at {
            for outpoint in transaction.spends() {
                self.locks.insert(outpoint, (txid, locked_at));
            }
        }
        let flight = Flight { transaction: Arc::clone(transaction), locked_at, commit: None, abort: None };
        let known = self.flights.entry(txid).or_insert(flight);
        known.locked_at = locked_at;
    }

    fn certify(&mut self, certificate: &Arc<Certificate>) {
        let Some(flight) = self.flights.get_mut(&certificate.txid) else { return };
        let slot = if certificate.kind == VoteKind::Abort { &mut flight.abort } else { &mut flight.commit };
        *slot = Some(Arc::clone(certificate));
    }

    /// What a commit begins; before it is applied, so that nobody sees its rows without it.
    pub(super) fn begin(&mut self, changes: &Changes) {
        for (txid, row) in &changes.in_flight {
            if let Some(InFlight { transaction, locked_at }) = row {
                self.put(*txid, transaction, *locked_at);
            }
        }
        changes.certificates.values().for_each(|certificate| self.certify(certificate));
    }

    /// What a commit ends; after it was applied, so that nobody misses both.
    pub(super) fn end(&mut self, changes: &Changes) {
        for (outpoint, utxo) in &changes.utxos {
            if !matches!(utxo.state, UTXOState::Locked { .. }) {
                self.locks.remove(outpoint);
            }
        }
        for txid in changes.in_flight.iter().filter(|(_, row)| row.is_none()).map(|(txid, _)| txid) {
            let Some(flight) = self.flights.remove(txid) else { continue };
            for outpoint in flight.transaction.spends() {
                if self.locks.get(&outpoint).is_some_and(|(holder, _)| holder == txid) {
                    self.locks.remove(&outpoint);
                }
            }
        }
    }

    /// Reads what is in flight: what the records name and has not ended. With `tolerant`,
    /// records that cannot be read are passed over, for a repair.
    pub(super) fn read(trees: &Trees, tolerant: bool) -> Result<(Self, FlightRows, OwnVotes), DatabaseError> {
        let (mut table, mut rows) = (Self::default(), FlightRows::default());
        for record in records::<Vec<StoredInFlight>>(trees.get(TreeId::Locks), TreeId::Locks) {
            if tolerant && record.is_err() {
                continue;
            }
            let (key, stored) = record?;
            let commit = commit_of(TreeId::Locks, &key)?;
            for StoredInFlight { transaction, locked_at } in stored {
                let transaction = Arc::new(transaction.into_transaction());
                let txid = transaction.txid();
                rows.add(commit, txid);
                if !known_so(tolerant, has_ended(trees, &txid))? {
                    table.put(txid, &transaction, locked_at);
                }
            }
        }
        for record in records::<StoredCertificates>(trees.get(TreeId::Certificates), TreeId::Certificates) {
            let record = record.and_then(|(key, stored)| Ok((key, stored.into_certificates(TreeId::Certificates)?)));
            if tolerant && record.is_err() {
                continue;
            }
            let (key, stored) = record?;
            let commit = commit_of(TreeId::Certificates, &key)?;
            for certificate in stored {
                rows.add(commit, certificate.txid);
                table.certify(&Arc::new(certificate));
            }
        }
        let mut votes = OwnVotes::new();
        for record in records::<Vec<Vote>>(trees.get(TreeId::Votes), TreeId::Votes) {
            if tolerant && record.is_err() {
                continue;
            }
            let (key, stored) = record?;
            let commit = commit_of(TreeId::Votes, &key)?;
            for vote in stored {
                rows.add(commit, vote.txid);
                votes.entry(vote.txid).or_default().push(vote.kind);
            }
        }
        for (commit, row) in &mut rows.rows {
            for (parts, id) in row.parts.iter_mut().zip(TREES) {
                *parts = record_parts(trees.get(id), id, &commit.to_be_bytes())?;
            }
        }
        table.drop_beaten_locks(trees, tolerant)?;
        votes.retain(|txid, _| table.flights.contains_key(txid));
        let ended: Vec<Txid> = rows.by_txid.keys().filter(|txid| !table.flights.contains_key(txid)).copied().collect();
        for txid in ended {
            // Records go in the commit that ends the last of their transactions.
            if !rows.release(&txid).is_empty() {
                tracing::warn!(%txid, "records of what has ended were left behind in the database");
            }
        }
        Ok((table, rows, votes))
    }

    /// A settled rival may have spent what is locked here; then the lock is no more.
    fn drop_beaten_locks(&mut self, trees: &Trees, tolerant: bool) -> Result<(), DatabaseError> {
        let mut beaten = BTreeSet::new();
        for outpoint in self.locks.keys() {
            let spent = get_output(trees, outpoint).map(|output| !matches!(output, Some(StoredOutput::Live(_))));
            if known_so(tolerant, spent)? {
                beaten.insert(*outpoint);
            }
        }
        self.locks.retain(|outpoint, _| !beaten.contains(outpoint));
        Ok(())
    }

    /// What a restart goes on with.
    pub(super) fn recovered(&self, votes: &BTreeMap<Txid, Vec<VoteKind>>) -> Vec<Recovered> {
        let of = |(txid, flight): (&Txid, &Flight)| Recovered {
            in_flight: InFlight { transaction: Arc::clone(&flight.transaction), locked_at: flight.locked_at },
            votes: votes.get(txid).cloned().unwrap_or_default(),
            certificates: flight.commit.iter().chain(&flight.abort).map(|c| c.as_ref().clone()).collect(),
        };
        self.flights.iter().map(of).collect()
    }
}

/// What is so as far as it can be read, if whoever asks is `tolerant`.
fn known_so(tolerant: bool, read: Result<bool, DatabaseError>) -> Result<bool, DatabaseError> {
    match read {
        Err(error) if tolerant && error.is_damage() => Ok(false),
        read => read,
    }
}

fn has_ended(trees: &Trees, txid: &Txid) -> Result<bool, DatabaseError> {
    Ok(is_final(trees, txid)? || trees.get(TreeId::Dead).get(txid.as_bytes())?.is_some())
}

fn commit_of(tree: TreeId, key: &[u8]) -> Result<u64, DatabaseError> {
    let key = <[u8; 8]>::try_from(key);
    key.map(u64::from_be_bytes).map_err(|_| DatabaseError::corrupt(tree.name(), "a key of the wrong length"))
}

/// The rows of one commit, and how many of its transactions are still in flight.
#[derive(Debug, Default)]
struct CommitRows {
    parts: [u16; 3],
    needed: usize,
}

/// Which records are still needed: those of commits with a transaction in flight.
#[derive(Debug, Default)]
pub(super) struct FlightRows {
    rows: BTreeMap<u64, CommitRows>,
    by_txid: HashMap<Txid, BTreeSet<u64>>,
}

impl FlightRows {
    fn add(&mut self, commit: u64, txid: Txid) {
        if self.by_txid.entry(txid).or_default().insert(commit) {
            self.rows.entry(commit).or_default().needed += 1;
        }
    }

    /// A transaction left flight. Gives the commits whose rows can go.
    fn release(&mut self, txid: &Txid) -> Vec<(u64, CommitRows)> {
        let mut free = Vec::new();
        for commit in self.by_txid.remove(txid).unwrap_or_default() {
            let Some(row) = self.rows.get_mut(&commit) else { continue };
            row.needed -= 1;
            if row.needed == 0 {
                free.extend(self.rows.remove(&commit).map(|row| (commit, row)));
            }
        }
        free
    }

    /// The rows that a commit writes for what it begins, and removes for what it ends.
    pub(super) fn write(
        &mut self,
        rows: &mut Vec<RowChange>,
        changes: &Changes,
        commit: u64,
    ) -> Result<(), DatabaseError> {
        // Whatever is begun and ended in one commit is of no use to anybody.
        let ended = |txid: &Txid| {
            let gone = changes.in_flight.get(txid).is_some_and(Option::is_none);
            gone || changes.finalized.contains_key(txid) || changes.dead.contains_key(txid)
        };
        let noted = changes.in_flight.iter().filter_map(|(txid, row)| Some((txid, row.as_ref()?)));
        let noted: Vec<_> = noted.map(|(txid, row)| (*txid, StoredInFlight::new(row))).collect();
        let votes: Vec<Vote> = changes.votes.iter().filter(|vote| !ended(&vote.txid)).copied().collect();
        let certificates: Vec<&Certificate> =
            changes.certificates.values().map(AsRef::as_ref).filter(|certificate| !ended(&certificate.txid)).collect();
        let key = commit.to_be_bytes();
        let mut parts = [0; 3];
        let mut put = |rows: &mut Vec<RowChange>, tree: usize, before: usize| {
            parts[tree] = u16::try_from(rows.len() - before).unwrap_or(u16::MAX);
        };
        let before = rows.len();
        if !noted.is_empty() {
            let stored: Vec<&StoredInFlight> = noted.iter().map(|(_, stored)| stored).collect();
            put_record(rows, TreeId::Locks, &key, &stored)?;
            put(rows, 0, before);
        }
        let before = rows.len();
        if !votes.is_empty() {
            put_record(rows, TreeId::Votes, &key, &votes)?;
            put(rows, 1, before);
        }
        let before = rows.len();
        if !certificates.is_empty() {
            let stored = StoredCertificates::of(&certificates);
            put_record(rows, TreeId::Certificates, &key, &stored)?;
            put(rows, 2, before);
        }
        let begun = noted.iter().map(|(txid, _)| *txid);
        let begun = begun.chain(votes.iter().map(|vote| vote.txid)).chain(certificates.iter().map(|c| c.txid));
        for txid in begun {
            self.add(commit, txid);
        }
        if let Some(row) = self.rows.get_mut(&commit) {
            row.parts = parts;
        }
        for txid in changes.in_flight.iter().filter(|(_, row)| row.is_none()).map(|(txid, _)| txid) {
            for (commit, row) in self.release(txid) {
                for (parts, tree) in row.parts.into_iter().zip(TREES) {
                    remove_record(rows, tree, &commit.to_be_bytes(), parts);
                }
            }
        }
        Ok(())
    }
}
