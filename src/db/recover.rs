//! What a start goes on with: whose database it is, whether it fits its guard, and what
//! was in flight when it was closed or cut off.

use std::path::Path;
use std::sync::Arc;

use super::DatabaseError;
use super::codec::{record_parts, records};
use super::commit::{CommitBatch, UnconfirmedRows, finalized_by};
use super::finals::next_number;
use super::flight::FlightTable;
use super::guard::{Agreement, Stamp, compare};
use super::kept::Kept;
use super::memory::MemoryDisk;
use super::open::{Storage, open_migrated};
use super::quick::Start;
use super::recent::Recent;
use super::schema::{Head, SCHEMA_VERSION, StoredNetwork, StoredTip, TreeId, meta};
use super::store::{Database, Shared, Trees};
use crate::consensus::{AgreementRecord, ChainTip, FenceState, Recovered, Suspension};
use crate::types::{Genesis, PublicKey, Txid};

/// No commit and no entry of the change log gets as far; what is counted on from there still
/// has room.
pub(super) const MAX_NUMBER: u64 = u64::MAX / 2;

/// An open database and what it was doing.
#[derive(Debug)]
pub struct Opened {
    /// The database.
    pub database: Database,
    /// What was in flight.
    pub recovered: RecoveredState,
}

/// What a restart goes on with.
#[derive(Debug)]
pub struct RecoveredState {
    /// Every transaction in flight, with this member's votes and its certificates.
    pub in_flight: Vec<Recovered>,
    /// Why this member must not vote, if so.
    pub suspension: Option<Suspension>,
    /// The fence behind which it votes or has voted, if votes were ever lost, with the number
    /// of fenced outpoints.
    pub fence: Option<(FenceState, u64)>,
    /// The chain.
    pub tip: ChainTip,
    /// What is final and not in the chain, in the order in which it became final.
    pub unconfirmed: Vec<Txid>,
    /// The agreement's write-ahead log of the height after the tip.
    pub agreement: Vec<AgreementRecord>,
}

/// Whose database is opened.
#[derive(Debug, Clone, Copy)]
pub struct Owner<'a> {
    /// The network.
    pub genesis: &'a Genesis,
    /// The member; `None` for an observer.
    pub public_key: Option<PublicKey>,
    /// The member has never voted: if there is no database, one is made without a fence.
    /// Without this certainty a new database goes behind the fence, for its key may have
    /// voted out of one that is gone.
    pub first_start: bool,
}

impl Database {
    /// Opens the database in `data_dir`, making and filling it from the genesis if there
    /// is none.
    pub fn open(data_dir: &Path, owner: Owner<'_>, cache_bytes: u64) -> Result<Opened, DatabaseError> {
        Self::recover(open_migrated(data_dir, owner.genesis, cache_bytes)?, owner)
    }

    /// The same on a disk in memory, for simulations.
    pub fn open_in_memory(disk: &MemoryDisk, owner: Owner<'_>) -> Result<Opened, DatabaseError> {
        let storage = Storage::memory(disk);
        // Power may have gone while the database was made.
        storage.migrate(owner.genesis)?;
        Self::recover(storage, owner)
    }

    /// Opens a database that is there, whoever owns it, for a tool that changes it. It has to
    /// be filled to the end and of this program's schema.
    pub fn open_offline(data_dir: &Path, cache_bytes: u64) -> Result<Self, DatabaseError> {
        if !super::switch::will_be_there(data_dir) {
            return Err(DatabaseError::Missing(data_dir.to_path_buf()));
        }
        Self::of_storage(Storage::open(data_dir, cache_bytes)?, true)
    }

    /// The same of files that are open; what is not sound is passed over only if `tolerant`.
    pub(super) fn of_storage(storage: Storage, tolerant: bool) -> Result<Self, DatabaseError> {
        let unfinished = || DatabaseError::corrupt("meta", "the database was never filled to the end");
        match super::open::schema_check(&storage.trees)?.ok_or_else(unfinished)? {
            SCHEMA_VERSION => {}
            found => return Err(DatabaseError::OlderSchema { found, known: SCHEMA_VERSION }),
        }
        let network = storage.meta::<StoredNetwork>(meta::NETWORK)?.ok_or_else(unfinished)?;
        Ok(Self::carry_on(storage, network, tolerant)?.database)
    }

    fn recover(storage: Storage, owner: Owner<'_>) -> Result<Opened, DatabaseError> {
        let Owner { genesis, public_key, first_start } = owner;
        let network = match storage.meta::<StoredNetwork>(meta::NETWORK)? {
            Some(network) => network,
            None => storage.initialise(genesis, public_key, public_key.is_some() && !first_start)?,
        };
        network.is_of(genesis.hash(), public_key)?;
        Self::carry_on(storage, network, false)
    }

    /// Reads what a start goes on with, looks whether it can be trusted, and brings the guard
    /// in step. With `tolerant`, what is not as it should be is passed over, for a repair.
    fn carry_on(storage: Storage, mut network: StoredNetwork, tolerant: bool) -> Result<Opened, DatabaseError> {
        let head = storage.meta::<Head>(meta::HEAD)?.unwrap_or(Head::EMPTY);
        if head.commit.max(head.sequence) > MAX_NUMBER {
            return Err(DatabaseError::corrupt("meta", "the last commit has a number that none can have"));
        }
        let agreement = compare(storage.stamp, &head);
        let stored_tip = storage.meta::<StoredTip>(meta::CHAIN)?;
        let stored_tip = stored_tip.ok_or_else(|| DatabaseError::corrupt("meta", "no chain"))?;
        let tip = stored_tip.tip()?;
        let Storage { engine, trees, .. } = storage;
        let fence = match super::open::read_meta::<FenceState>(&trees, meta::FENCE)? {
            Some(state) => Some((state, trees.get(TreeId::Fence).count()?)),
            None => None,
        };
        let (flights, flight_rows, votes) = FlightTable::read(&trees, tolerant)?;
        let in_flight = flights.recovered(&votes);
        let agreement_log = read_agreement(&trees);
        let (log, agreement_rows) = if tolerant { agreement_log.unwrap_or_default() } else { agreement_log? };
        if agreement == Agreement::Mismatch {
            // Numbers of the change log may be given a second time.
            network.log_id = rand::random();
        }
        let shared = Arc::new(Shared::new(trees, network, &head, tip.height, flights));
        let unconfirmed = UnconfirmedRows::default();
        let kept = Kept::read(&shared.trees)?;
        let next_body = next_number(shared.trees.get(TreeId::Transactions))?;
        let recent = Recent::new(&shared.trees)?;
        let mut database = Self {
            engine,
            head,
            flight_rows,
            unconfirmed,
            agreement_rows,
            kept,
            next_body,
            recent,
            renewal: None,
            shared,
        };
        database.read_unconfirmed(stored_tip.unconfirmed_from)?;
        let unconfirmed = database.unconfirmed.txids();
        if !tolerant {
            let (reader, sequence) = (database.reader(), head.sequence);
            Start { reader: &reader, sequence, kept, tip: &tip, in_flight: &in_flight, agreement: &log }.check()?;
        }
        let suspension = database.settle_guard(agreement)?;
        let recovered = RecoveredState { in_flight, suspension, fence, tip, unconfirmed, agreement: log };
        Ok(Opened { database, recovered })
    }

    /// Finds what is final and not in the chain, by the log.
    fn read_unconfirmed(&mut self, from: u64) -> Result<(), DatabaseError> {
        let (reader, end) = (self.reader(), self.head.sequence);
        let mut after = from.saturating_sub(1);
        while after < end {
            let entries = reader.changes(after, end, 4_096)?;
            let Some((last, _)) = entries.last() else { break };
            after = *last;
            for (sequence, entry) in entries {
                let Some(txid) = finalized_by(&entry) else { continue };
                if reader.confirmed(&txid)?.is_none() {
                    self.unconfirmed.add(sequence, txid);
                }
            }
        }
        Ok(())
    }

    /// Brings the guard in step after a crash. A mismatch is written down first, so that
    /// later commits do not make it forgotten.
    fn settle_guard(&mut self, agreement: Agreement) -> Result<Option<Suspension>, DatabaseError> {
        // An observer has no votes to lose; wallets notice a log that is another one.
        let network = self.shared.network();
        let votes = network.public_key.is_some();
        let stored = self.shared.trees.get(TreeId::Meta).get(meta::SUSPENSION)?;
        let known = |text: &[u8]| Suspension::ALL.into_iter().find(|reason| reason.to_string().as_bytes() == text);
        let suspension = match (stored, agreement) {
            (Some(text), _) => Some(known(&text).unwrap_or(Suspension::UnknownOwnVote)),
            (None, Agreement::Mismatch) => Some(Suspension::GuardMismatch),
            (None, _) => None,
        };
        match agreement {
            Agreement::Equal => {}
            Agreement::OneAhead => {
                // The transaction was applied; whether it was synced is not known.
                self.engine.sync()?;
                self.engine.write_guard(Stamp { commit: self.head.commit, digest: self.head.digest })?;
            }
            Agreement::Mismatch => {
                let network = Some(network.clone());
                let batch = CommitBatch { suspension: suspension.filter(|_| votes), network, ..CommitBatch::default() };
                let _: () = self.commit(batch, ())?.into_inner();
            }
        }
        Ok(suspension.filter(|_| votes))
    }
}

/// The agreement's log, and its rows.
#[expect(clippy::type_complexity, reason = "both halves are used at once")]
fn read_agreement(trees: &Trees) -> Result<(Vec<AgreementRecord>, Vec<([u8; 12], u16)>), DatabaseError> {
    let (mut log, mut rows) = (Vec::new(), Vec::new());
    let tree = trees.get(TreeId::Agreement);
    for record in records::<AgreementRecord>(tree, TreeId::Agreement) {
        let (key, record) = record?;
        let parts = record_parts(tree, TreeId::Agreement, &key)?;
        let key = key.try_into().map_err(|_| DatabaseError::corrupt("agreement", "a key of the wrong length"))?;
        log.push(record);
        rows.push((key, parts));
    }
    Ok((log, rows))
}
