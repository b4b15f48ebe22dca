//! Importing: a new database out of an export, in bounded memory, checked record by record.
//!
//! Nothing of the file is believed but that the member gave the votes that it names. Blocks
//! have to follow one another and to be decided, their transactions have to be theirs, the
//! digest that each names has to be that of the outputs which the blocks before it leave,
//! and at last the outputs in the file have to be exactly those that are left. So the ledger
//! that comes out is the one that the network decided on, whoever made the file.

use std::collections::{BTreeMap, HashMap};
use std::io::BufRead;
use std::path::Path;

use super::super::DatabaseError;
use super::super::backup::{PutInPlace, fence_and_put, network_in};
use super::super::codec::{RowChange, encode};
use super::super::commit::log_rows;
use super::super::finals::{get_final, put_bodies};
use super::super::guard::{Agreement, Stamp};
use super::super::inspect::Condition;
use super::super::open::Storage;
use super::super::outputs::{get_output, utxo_of};
use super::super::prune::Pruned;
use super::super::schema::{Head, SCHEMA_VERSION, StoredNetwork, StoredTip, TreeId, meta};
use super::super::switch::Building;
use super::super::watcher::{Watcher, watched};
use super::chain::OpenBlock;
use super::coins::Coins;
use super::lines::{Lines, Next};
use super::seal::Seal;
use super::{Header, ImportError, ImportFault, Record};
use crate::consensus::{
    Certificate, ChainTip, Changes, Committee, InFlight, LogEntry, Rules, Transition, Utxo, VoteKind,
};
use crate::types::{Genesis, OutPoint, Output, Transaction, Txid, UTXOState, tagged_hash};

/// Rows that are written at once.
const ROWS_AT_ONCE: usize = 4_096;
/// Entries of the change log that are written at once.
const LOG_ENTRIES_AT_ONCE: usize = 2_048;
/// How often a watcher is told.
const TELL_EVERY: u64 = 256;

/// Why the import stops.
#[derive(Debug)]
pub(super) enum Stop {
    /// The line that is being read is wrong.
    Here(ImportFault),
    /// An earlier line is wrong.
    At(u64, ImportFault),
    Database(DatabaseError),
}

impl<F: Into<ImportFault>> From<F> for Stop {
    fn from(fault: F) -> Self {
        Self::Here(fault.into())
    }
}

impl From<DatabaseError> for Stop {
    fn from(error: DatabaseError) -> Self {
        Self::Database(error)
    }
}

/// Something whose rows have not been written yet.
#[derive(Debug)]
pub(super) enum Recent {
    /// A settled transaction with its outputs.
    Settled(Vec<Output>),
    /// The fees of a block of this hash.
    Fees(Output),
    /// A transaction that is in flight or dead.
    Unsettled,
}

/// The kinds of records, in the order in which they come.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Stage {
    Chain,
    Settled,
    InFlight,
    Dead,
    Outputs,
    Fenced,
    Subscriptions,
    End,
}

/// A database in the making, and what is known of it so far.
pub(super) struct Import<'a> {
    pub(super) genesis: &'a Genesis,
    pub(super) committee: Committee,
    pub(super) rules: Rules,
    pub(super) storage: Storage,
    pub(super) header: Header,
    pub(super) rows: Vec<RowChange>,
    /// What the rows that have not been written yet are about.
    pub(super) recent: HashMap<Txid, Recent>,
    /// The number of the next settled transaction's body.
    pub(super) next_body: u64,
    /// The bodies before that one which have not been written yet.
    pub(super) bodies: Vec<Transaction>,
    pub(super) seal: Seal,
    pub(super) tip: ChainTip,
    /// A block some of whose transactions have not come yet.
    pub(super) open: Option<OpenBlock>,
    /// What is settled and in no block, in order.
    pub(super) unconfirmed: Vec<Txid>,
    /// Outputs that the genesis, what is settled, and the fees of blocks have made.
    pub(super) made: u64,
    /// What those that are in no block spend, create and leave.
    pub(super) unconfirmed_inputs: u64,
    pub(super) unconfirmed_outputs: u64,
    pub(super) unpaid_fees: u64,
    /// What is in flight, with the votes on it and the certificates beside it; bounded by what
    /// can be.
    pub(super) flights: BTreeMap<Txid, InFlight>,
    pub(super) votes: BTreeMap<Txid, Vec<VoteKind>>,
    pub(super) kept: BTreeMap<Txid, Vec<Certificate>>,
    pub(super) coins: Coins,
    /// The number of the line that is being read.
    pub(super) line: u64,
    stage: Stage,
}

/// Makes a new database of an export and puts it into `data_dir`, behind the fence. What was
/// there is set aside. `size` is that of the file, if it is known.
pub fn import(
    data_dir: &Path,
    input: &mut dyn BufRead,
    size: Option<u64>,
    genesis: &Genesis,
    cache_bytes: u64,
    watcher: &dyn Watcher,
) -> Result<PutInPlace, ImportError> {
    let mut lines = Lines::new(input);
    let header = lines.header()?;
    if header.genesis_hash != genesis.hash() {
        let (expected, found) = (genesis.hash(), header.genesis_hash);
        return Err(DatabaseError::OtherNetwork { expected, found }.into());
    }
    let committee = Committee::of_genesis(genesis);
    if let Some(stranger) = header.public_key.filter(|key| committee.index_of(key).is_none()) {
        return Err(lines.refuse(ImportFault::NotMember(stranger)));
    }
    let Some(network) = network_of(&header, genesis) else {
        return Err(lines.refuse(ImportFault::NotARecord("a log_id is 16 bytes in hex".into())));
    };
    if let Some(replaced) = network_in(data_dir, cache_bytes, watcher)? {
        network.is_of(replaced.genesis_hash, replaced.public_key)?;
    }
    let building = Building::begin(data_dir)?;
    let storage = watched(watcher, || Storage::open(building.path(), cache_bytes))?;
    let mut import = Import {
        genesis,
        committee,
        rules: Rules { network: genesis.network(), min_fee: genesis.min_fee() },
        storage,
        header,
        rows: Vec::new(),
        recent: HashMap::new(),
        next_body: 0,
        bodies: Vec::new(),
        seal: Seal::default(),
        tip: ChainTip::of_genesis(genesis),
        open: None,
        unconfirmed: Vec::new(),
        made: genesis.transaction().outputs().len() as u64,
        unconfirmed_inputs: 0,
        unconfirmed_outputs: 0,
        unpaid_fees: 0,
        flights: BTreeMap::new(),
        votes: BTreeMap::new(),
        kept: BTreeMap::new(),
        coins: Coins::default(),
        line: 1,
        stage: Stage::Chain,
    };
    loop {
        let next = lines.next()?;
        import.line = lines.number();
        if import.line.is_multiple_of(TELL_EVERY) {
            watcher.progress("importing", lines.bytes, size);
        }
        let (taken, ended) = match next {
            Next::Record(record) => (import.take(record), false),
            Next::End => (import.finish(&network, lines.checksum()), true),
        };
        taken.map_err(|stop| match stop {
            Stop::Here(fault) => lines.refuse(fault),
            Stop::At(line, fault) => ImportError::Refused { line, fault },
            Stop::Database(error) => error.into(),
        })?;
        if ended {
            break;
        }
    }
    let Import { header: Header { commit, sequence, height, .. }, storage, .. } = import;
    let from = Condition {
        schema: Some(SCHEMA_VERSION),
        network: Some(network),
        commit,
        sequence,
        height,
        guarded: None,
        agreement: Agreement::Equal,
    };
    Ok(fence_and_put(building, storage, from, watcher)?)
}

fn network_of(header: &Header, genesis: &Genesis) -> Option<StoredNetwork> {
    let log_id = hex::decode(&header.log_id).ok()?.try_into().ok()?;
    let (network, genesis_hash) = (genesis.network(), genesis.hash());
    Some(StoredNetwork { network, genesis_hash, public_key: header.public_key, log_id })
}

impl Import<'_> {
    fn take(&mut self, record: Record) -> Result<(), Stop> {
        self.enter(match &record {
            Record::Block(_) => Stage::Chain,
            Record::Settled(settled) if settled.height.is_some() => Stage::Chain,
            Record::Settled(_) => Stage::Settled,
            Record::InFlight(_) => Stage::InFlight,
            Record::Dead(_) => Stage::Dead,
            Record::Output(_) => Stage::Outputs,
            Record::Fenced(_) => Stage::Fenced,
            Record::Subscription(_) => Stage::Subscriptions,
        })?;
        match record {
            Record::Block(decided) => self.block(*decided)?,
            Record::Settled(settled) => self.settled(*settled)?,
            Record::InFlight(in_flight) => self.in_flight(*in_flight)?,
            Record::Dead(dead) => self.dead(&dead)?,
            Record::Output(output) => self.output(&output)?,
            Record::Fenced(outpoint) => self.fenced(&outpoint),
            Record::Subscription(subscription) => self.subscription(subscription)?,
        }
        if self.rows.len() >= ROWS_AT_ONCE { self.write() } else { Ok(()) }
    }

    /// Kinds come in order; what one needs of those before it has been written by then.
    fn enter(&mut self, stage: Stage) -> Result<(), Stop> {
        if stage < self.stage {
            return Err(ImportFault::OutOfOrder.into());
        }
        if stage > Stage::Chain {
            self.all_here()?;
        }
        if stage > Stage::Settled && self.stage <= Stage::Settled {
            let (height, hash) = (self.header.height, self.header.block_hash);
            if (self.tip.height, self.tip.hash) != (height, hash) || self.header.pruned_height > height {
                return Err(ImportFault::Tip.into());
            }
        }
        if stage > self.stage {
            self.end_row()?;
            self.stage = stage;
            self.write()?;
        }
        Ok(())
    }

    /// Writes the gathered rows. Nobody reads them before the whole database is in place, so
    /// it does not matter what a crash leaves of them.
    pub(super) fn write(&mut self) -> Result<(), Stop> {
        let bodies = std::mem::take(&mut self.bodies);
        put_bodies(&mut self.rows, self.next_body - bodies.len() as u64, bodies.iter())?;
        if !self.rows.is_empty() {
            self.storage.engine.apply(&self.rows)?;
            self.storage.engine.sync()?;
            self.rows.clear();
        }
        self.recent.clear();
        Ok(())
    }

    pub(super) fn put(&mut self, tree: TreeId, key: &[u8], value: Vec<u8>) {
        self.rows.push(RowChange { tree, key: key.to_vec(), value: Some(value) });
    }

    /// The body of a settled transaction that has been written.
    pub(super) fn body(&self, txid: &Txid) -> Result<Option<Transaction>, DatabaseError> {
        let stored = get_final(&self.storage.trees, txid)?;
        Ok(stored.map(|stored| stored.transaction.into_transaction()))
    }

    pub(super) fn utxo(&self, outpoint: &OutPoint) -> Result<Option<Utxo>, DatabaseError> {
        let trees = &self.storage.trees;
        let stored = get_output(trees, outpoint)?;
        Ok(stored.map(|stored| utxo_of(trees, &stored, None)).transpose()?.flatten())
    }

    /// The file is whole: the sums, the change log, and the word that the database is whole.
    fn finish(&mut self, network: &StoredNetwork, checksum: [u8; 32]) -> Result<(), Stop> {
        self.enter(Stage::End)?;
        self.check_seal(|seal| seal.check())?;
        self.check_sums()?;
        // Numbers go on after those of the old log, and leave one out: wherever a wallet that
        // followed the old one stands, it cannot mistake this one for its continuation.
        let before = self.header.sequence.saturating_add(1);
        let sequence = self.write_log(before)?;
        let commit = self.write_flights()?;
        let digest = match commit {
            0 => [0; 32],
            _ => tagged_hash("TIME/import", &[&checksum, &network.log_id]),
        };
        let head = Head { commit, digest, previous_digest: [0; 32], sequence };
        let (height, entries) = (self.header.pruned_height, self.header.pruned_entries);
        let pruned = Pruned { height, entries, sequence: before };
        for (key, value) in [
            (meta::CHAIN, encode(TreeId::Meta, &StoredTip::new(&self.tip, before + 1))?),
            (meta::PRUNED, encode(TreeId::Meta, &pruned)?),
            (meta::HEAD, encode(TreeId::Meta, &head)?),
            (meta::SCHEMA, encode(TreeId::Meta, &SCHEMA_VERSION)?),
            (meta::NETWORK, encode(TreeId::Meta, network)?),
        ] {
            self.put(TreeId::Meta, key, value);
        }
        if self.coins.listed < self.made {
            // Those that are not in the file were pruned by a program of an earlier schema.
            let forgotten = encode(TreeId::Meta, &height.saturating_add(1))?;
            self.put(TreeId::Meta, meta::FORGOTTEN, forgotten);
        }
        self.write()?;
        if commit > 0 {
            self.storage.engine.write_guard(Stamp { commit, digest })?;
        }
        Ok(())
    }

    pub(super) fn check_seal(&mut self, check: impl FnOnce(&mut Seal) -> Result<(), u64>) -> Result<(), Stop> {
        check(&mut self.seal).map_err(|line| Stop::At(line, ImportFault::Signature))
    }

    /// The new change log: how what is final and in no block became so, for that is where a
    /// start looks for it. Gives its last number.
    fn write_log(&mut self, before: u64) -> Result<u64, Stop> {
        let mut log = NewLog { changes: Changes::default(), next: before + 1 };
        let unconfirmed = std::mem::take(&mut self.unconfirmed);
        let mut locked = Vec::new();
        for txid in &unconfirmed {
            let Some(transaction) = self.body(txid)? else { continue };
            for outpoint in transaction.spends() {
                let Some(utxo) = self.utxo(&outpoint)? else { continue };
                log.step(outpoint, utxo.output, Some(UTXOState::Unspent), utxo.state);
            }
            for (outpoint, output) in transaction.creates() {
                log.step(outpoint, output, None, UTXOState::Unspent);
                if let Some((txid, locked_at)) = self.coins.locks.get(&outpoint).copied() {
                    locked.push((outpoint, output, UTXOState::Locked { txid, locked_at }));
                }
            }
            if log.changes.log.len() >= LOG_ENTRIES_AT_ONCE {
                log.rows(&mut self.rows)?;
                self.write()?;
            }
        }
        for (outpoint, output, state) in locked {
            log.step(outpoint, output, Some(UTXOState::Unspent), state);
        }
        log.rows(&mut self.rows)?;
        self.write()?;
        Ok(log.next - 1)
    }
}

struct NewLog {
    changes: Changes,
    next: u64,
}

impl NewLog {
    fn step(&mut self, outpoint: OutPoint, output: Output, old_state: Option<UTXOState>, new_state: UTXOState) {
        let timestamp = match new_state {
            UTXOState::Unspent => 0,
            UTXOState::Locked { locked_at, .. } => locked_at,
            UTXOState::SpentFinalized { finalized_at, .. } => finalized_at,
            UTXOState::Confirmed { confirmed_at, .. } => confirmed_at,
        };
        let step = Transition { outpoint, output, old_state, new_state, timestamp };
        self.changes.log.push(LogEntry::Transition(step));
    }

    fn rows(&mut self, rows: &mut Vec<RowChange>) -> Result<(), DatabaseError> {
        log_rows(rows, &self.changes, self.next)?;
        self.next += self.changes.log.len() as u64;
        self.changes.log.clear();
        Ok(())
    }
}
