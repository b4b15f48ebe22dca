//! Opening a database, and what was in flight when it was closed or cut off.

use std::collections::BTreeMap;
use std::fs::OpenOptions;
use std::panic::AssertUnwindSafe;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::DatabaseError;
use super::codec::{decode, encode, records};
use super::commit::{UnconfirmedRows, VoteRows};
use super::guard::{Agreement, Guard, Stamp, compare, sync_directory};
use super::schema::{Head, SCHEMA_VERSION, StoredInFlight, StoredNetwork, StoredTip, TreeId, meta};
use super::store::{Database, Shared, Trees};
use crate::consensus::{AgreementRecord, Certificate, ChainTip, InFlight, Recovered, Suspension, Vote, VoteKind};
use crate::types::{Genesis, GenesisHash, Network, PublicKey, Txid};

/// sled's directory inside the data directory.
pub(super) const DATABASE_DIR: &str = "db";

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
    /// The chain.
    pub tip: ChainTip,
    /// What is final and not in the chain, in the order in which it became final.
    pub unconfirmed: Vec<Txid>,
    /// The agreement's write-ahead log of the height after the tip.
    pub agreement: Vec<AgreementRecord>,
}

impl Database {
    /// Opens the database in `data_dir`, making and filling it from the genesis if there
    /// is none. `public_key` is the member's, `None` for an observer.
    pub fn open(
        data_dir: &Path,
        genesis: &Genesis,
        public_key: Option<PublicKey>,
        cache_bytes: u64,
    ) -> Result<Opened, DatabaseError> {
        std::fs::create_dir_all(data_dir).map_err(DatabaseError::io("creating the data directory"))?;
        let (db, trees) = open_sled(data_dir, cache_bytes)?;
        // Also of an old database: a crash may have come between its making and this.
        sync_names(data_dir)?;
        schema_check(&trees)?;
        migrate(&db, data_dir, &trees, genesis)?;
        let network = match read_meta::<StoredNetwork>(&trees, meta::NETWORK)? {
            Some(network) => network,
            None => initialise(&db, data_dir, &trees, genesis, public_key)?,
        };
        if network.genesis_hash != genesis.hash() {
            return Err(DatabaseError::OtherNetwork { expected: genesis.hash(), found: network.genesis_hash });
        }
        if network.public_key != public_key {
            let name =
                |key: Option<PublicKey>| key.map_or_else(|| "an observer".into(), |key| format!("the member {key}"));
            return Err(DatabaseError::OtherKey { expected: name(public_key), found: name(network.public_key) });
        }
        let head = read_meta::<Head>(&trees, meta::HEAD)?.unwrap_or(Head::EMPTY);
        let (guard, stamp) = Guard::open(data_dir)?;
        let agreement = compare(stamp, &head);
        let (in_flight, vote_rows) = read_in_flight(&trees)?;
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .open(sled_file(data_dir))
            .map_err(DatabaseError::io("opening the database's file"))?;
        let stored_tip = read_meta::<StoredTip>(&trees, meta::CHAIN)?;
        let stored_tip = stored_tip.ok_or_else(|| DatabaseError::corrupt("meta", "no chain"))?;
        let tip = stored_tip.tip()?;
        let (log, agreement_rows) = read_agreement(&trees)?;
        let shared = Arc::new(Shared::new(trees, network, &head, tip.height));
        let unconfirmed = UnconfirmedRows::default();
        let mut database = Self { db, file, guard, head, vote_rows, unconfirmed, agreement_rows, shared };
        database.read_unconfirmed(stored_tip.unconfirmed_from)?;
        let unconfirmed = database.unconfirmed.txids();
        let suspension = database.settle_guard(agreement)?;
        let recovered = RecoveredState { in_flight, suspension, tip, unconfirmed, agreement: log };
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
                let Some(txid) = super::commit::finalized_by(&entry) else { continue };
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
        let stored = self.shared.trees.get(TreeId::Meta).get(meta::SUSPENSION)?;
        let suspension = match (stored, agreement) {
            (Some(text), _) if text.as_ref() == Suspension::GuardMismatch.to_string().as_bytes() => {
                Some(Suspension::GuardMismatch)
            }
            (Some(_), _) => Some(Suspension::UnknownOwnVote),
            (None, Agreement::Mismatch) => Some(Suspension::GuardMismatch),
            (None, _) => None,
        };
        match agreement {
            Agreement::Equal => {}
            Agreement::OneAhead => {
                // The transaction was applied; whether it was synced is not known.
                self.db.flush()?;
                self.file.sync_data().map_err(DatabaseError::io("syncing the database"))?;
                self.guard.write(Stamp { commit: self.head.commit, digest: self.head.digest })?;
            }
            Agreement::Mismatch => {
                let batch = super::CommitBatch { suspension, ..super::CommitBatch::default() };
                let _: () = self.commit(batch, ())?.into_inner();
            }
        }
        Ok(suspension)
    }
}

fn sled_file(data_dir: &Path) -> PathBuf {
    data_dir.join(DATABASE_DIR).join("db")
}

/// Opens sled so that neither a half-written snapshot nor a panic inside it brings the
/// caller down.
pub(super) fn open_sled(data_dir: &Path, cache_bytes: u64) -> Result<(sled::Db, Trees), DatabaseError> {
    let path = data_dir.join(DATABASE_DIR);
    remove_stale_snapshots(&path)?;
    let config = sled::Config::new().path(&path).cache_capacity(cache_bytes).flush_every_ms(None);
    let opened = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let db = config.open()?;
        let trees = Trees::open(&db)?;
        Ok::<_, DatabaseError>((db, trees))
    }));
    match opened {
        Ok(Ok(opened)) => Ok(opened),
        Ok(Err(DatabaseError::Sled(sled::Error::Io(error)))) if is_lock_error(&error) => {
            Err(DatabaseError::InUse(data_dir.to_path_buf()))
        }
        Ok(Err(DatabaseError::Sled(error @ sled::Error::Corruption { .. }))) => {
            Err(DatabaseError::Damaged(error.to_string()))
        }
        Ok(Err(error)) => Err(error),
        Err(panic) => {
            let text = panic.downcast_ref::<String>().cloned();
            let text = text.or_else(|| panic.downcast_ref::<&str>().map(ToString::to_string));
            Err(DatabaseError::Damaged(text.unwrap_or_else(|| "it panicked".into())))
        }
    }
}

fn is_lock_error(error: &std::io::Error) -> bool {
    error.kind() == std::io::ErrorKind::WouldBlock || error.to_string().contains("could not acquire lock")
}

/// A snapshot that was being written when the power went would be taken for the newest.
fn remove_stale_snapshots(path: &Path) -> Result<(), DatabaseError> {
    let entries = match std::fs::read_dir(path) {
        Ok(entries) => entries,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(DatabaseError::Io { what: "reading the database's directory", source }),
    };
    for entry in entries {
        let entry = entry.map_err(DatabaseError::io("reading the database's directory"))?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("snap.") && name.ends_with(".generating") {
            std::fs::remove_file(entry.path()).map_err(DatabaseError::io("removing a half-written snapshot"))?;
        }
    }
    Ok(())
}

/// sled never syncs the names of its files, nor `conf`.
fn sync_names(data_dir: &Path) -> Result<(), DatabaseError> {
    let path = data_dir.join(DATABASE_DIR);
    for name in ["conf", "db"] {
        let file = OpenOptions::new().read(true).open(path.join(name));
        file.and_then(|f| f.sync_all()).map_err(DatabaseError::io("syncing the database's files"))?;
    }
    sync_directory(&path)?;
    sync_directory(data_dir)?;
    match data_dir.canonicalize().ok().and_then(|p| p.parent().map(Path::to_path_buf)) {
        Some(parent) => sync_directory(&parent),
        None => Ok(()),
    }
}

fn read_meta<T: serde::de::DeserializeOwned>(trees: &Trees, key: &[u8]) -> Result<Option<T>, DatabaseError> {
    let row = trees.get(TreeId::Meta).get(key)?;
    row.map(|row| decode(TreeId::Meta, &row)).transpose()
}

/// Refuses a schema that this program does not know.
pub(super) fn schema_check(trees: &Trees) -> Result<Option<u32>, DatabaseError> {
    let found = read_meta::<u32>(trees, meta::SCHEMA)?;
    match found {
        Some(found) if found > SCHEMA_VERSION => Err(DatabaseError::NewerSchema { found, known: SCHEMA_VERSION }),
        found => Ok(found),
    }
}

/// Brings an older schema up to this program's, one step after the other.
fn migrate(db: &sled::Db, data_dir: &Path, trees: &Trees, genesis: &Genesis) -> Result<(), DatabaseError> {
    let stored = read_meta::<StoredNetwork>(trees, meta::NETWORK)?;
    // A new database is filled elsewhere; another network's is refused elsewhere.
    if stored.is_none_or(|stored| stored.genesis_hash != genesis.hash()) {
        return Ok(());
    }
    if read_meta::<u32>(trees, meta::SCHEMA)? == Some(1) {
        tracing::debug!("bringing the database to schema 2");
        super::m0002_blocks::apply(db, genesis)?;
        sync_sled(db, data_dir)?;
    }
    Ok(())
}

fn sync_sled(db: &sled::Db, data_dir: &Path) -> Result<(), DatabaseError> {
    db.flush()?;
    let file = OpenOptions::new().write(true).open(sled_file(data_dir));
    file.and_then(|f| f.sync_all()).map_err(DatabaseError::io("syncing the database"))
}

/// Fills a new database: the first migration writes the genesis, then the stamp that says
/// it is whole. Until that stamp is there, opening starts over.
fn initialise(
    db: &sled::Db,
    data_dir: &Path,
    trees: &Trees,
    genesis: &Genesis,
    public_key: Option<PublicKey>,
) -> Result<StoredNetwork, DatabaseError> {
    let network =
        StoredNetwork { network: genesis.network(), genesis_hash: genesis.hash(), public_key, log_id: rand::random() };
    super::m0001_initial::fill(db, genesis)?;
    // The stamp says that everything before it is there, so that has to be so first.
    sync_sled(db, data_dir)?;
    super::m0001_initial::stamp(db, &encode(TreeId::Meta, &network)?)?;
    sync_sled(db, data_dir)?;
    migrate(db, data_dir, trees, genesis)?;
    read_meta(trees, meta::NETWORK)?.ok_or_else(|| DatabaseError::corrupt("meta", "no network after initialising"))
}

/// The agreement's log, and its rows.
#[expect(clippy::type_complexity, reason = "both halves are used at once")]
fn read_agreement(trees: &Trees) -> Result<(Vec<AgreementRecord>, Vec<([u8; 12], u16)>), DatabaseError> {
    let (mut log, mut rows) = (Vec::new(), Vec::new());
    let tree = trees.get(TreeId::Agreement);
    for record in records::<AgreementRecord>(tree, TreeId::Agreement) {
        let (key, record) = record?;
        let parts = super::codec::record_parts(tree, TreeId::Agreement, &key)?;
        let key = key.try_into().map_err(|_| DatabaseError::corrupt("agreement", "a key of the wrong length"))?;
        log.push(record);
        rows.push((key, parts));
    }
    Ok((log, rows))
}

fn read_in_flight(trees: &Trees) -> Result<(Vec<Recovered>, VoteRows), DatabaseError> {
    let mut vote_rows = VoteRows::default();
    let mut votes: BTreeMap<Txid, Vec<VoteKind>> = BTreeMap::new();
    for record in records::<Vec<Vote>>(trees.get(TreeId::Votes), TreeId::Votes) {
        let (key, row) = record?;
        let key: [u8; 8] = key.try_into().map_err(|_| DatabaseError::corrupt("votes", "a key of the wrong length"))?;
        let commit = u64::from_be_bytes(key);
        let parts = super::codec::record_parts(trees.get(TreeId::Votes), TreeId::Votes, &commit.to_be_bytes())?;
        vote_rows.add(commit, parts, &row);
        for vote in row {
            votes.entry(vote.txid).or_default().push(vote.kind);
        }
    }
    let mut in_flight = Vec::new();
    for record in records::<StoredInFlight>(trees.get(TreeId::Locks), TreeId::Locks) {
        let (key, stored) = record?;
        let transaction = Arc::new(stored.transaction.into_transaction());
        let txid = transaction.txid();
        if key != txid.as_bytes() {
            return Err(DatabaseError::corrupt("locks", format!("the body of {txid} stands under another key")));
        }
        let mut certificates = Vec::new();
        for kind in [VoteKind::Approve, VoteKind::Abort] {
            let key = super::schema::certificate_key(&txid, kind);
            let tree = trees.get(TreeId::Certificates);
            certificates.extend(super::codec::get_record::<Certificate>(tree, TreeId::Certificates, &key)?);
        }
        // A row of `votes` may hold votes on what is settled; those are looked at no more.
        let votes = votes.remove(&txid).unwrap_or_default();
        let in_flight_row = InFlight { transaction, locked_at: stored.locked_at };
        in_flight.push(Recovered { in_flight: in_flight_row, votes, certificates });
    }
    // Rows stay while one of their votes is needed; the others need no count.
    for settled in votes.into_keys() {
        vote_rows.forget(&settled);
    }
    Ok((in_flight, vote_rows))
}

/// What an offline tool learns before it reads anything.
#[derive(Debug, Clone)]
pub(super) struct OfflineInfo {
    pub(super) schema: Option<u32>,
    pub(super) network: Option<(Network, GenesisHash)>,
}

pub(super) fn offline_info(trees: &Trees) -> Result<OfflineInfo, DatabaseError> {
    let network = read_meta::<StoredNetwork>(trees, meta::NETWORK)?.map(|n| (n.network, n.genesis_hash));
    Ok(OfflineInfo { schema: schema_check(trees)?, network })
}
