//! What stands in the database of a stopped node, for tools that look at one.
//!
//! No row is changed, and nothing is made that was not there (sled splits nodes where it reads,
//! which changes its file and nothing that is in it). A row that cannot be read is
//! an error of its own; the rows after it are read all the same. A damaged database may
//! make sled panic while it is read: whoever looks at a suspect one catches that.

mod filter;
mod flight;
mod lookup;
mod record;
mod stats;

use std::ops::Bound;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};

use serde_json::Value;

use self::record::KeyRange;
use super::DatabaseError;
use super::confirmed::stretch_of;
use super::engine::Engine;
use super::finals::{get_settled, record_of};
use super::flight::FlightTable;
use super::guard::{Agreement, Stamp, compare};
use super::memory::MemoryDisk;
use super::open::{self, Storage};
use super::schema::{Head, StoredNetwork, StoredSettled, StoredTip, TreeId, meta};
use super::store::{Reader, Shared, Trees as StoreTrees, sequence_of};
use crate::types::{Genesis, Height, Network};

pub use filter::Filter;
pub use flight::{Flight, HeldCertificate, Place};
pub use lookup::{Found, KeyError, Thing};
pub use stats::{FenceStats, GuardStats, StateStats, Stats, SupplyStats, TreeStats};

/// The names of the trees, as `dump --tree` takes them.
pub const TREE_NAMES: [&str; 15] = [
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
    "proofs",
];

/// Bytes of the cache where nobody says how many.
const CACHE_BYTES: u64 = 64 * 1024 * 1024;

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

/// Who a database belongs to and how far it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Condition {
    /// Its schema; `None` if it was never filled.
    pub schema: Option<u32>,
    /// Whose it is; `None` if it was never filled to the end.
    pub network: Option<StoredNetwork>,
    /// The number of the last commit.
    pub commit: u64,
    /// The last sequence of the change log.
    pub sequence: u64,
    /// The height of its chain.
    pub height: Height,
    /// The last commit that the guard has seen.
    pub guarded: Option<u64>,
    /// Whether that is the same.
    pub agreement: Agreement,
}

impl Condition {
    pub(super) fn of(trees: &StoreTrees, stamp: Option<Stamp>) -> Result<Self, DatabaseError> {
        let head = open::read_meta::<Head>(trees, meta::HEAD)?.unwrap_or(Head::EMPTY);
        let tip = open::read_meta::<StoredTip>(trees, meta::CHAIN)?.map(|stored| stored.tip()).transpose()?;
        Ok(Self {
            schema: open::read_meta(trees, meta::SCHEMA)?,
            network: open::read_meta(trees, meta::NETWORK)?,
            commit: head.commit,
            sequence: head.sequence,
            height: tip.map_or(0, |tip| tip.height),
            guarded: stamp.map(|stamp| stamp.commit),
            agreement: compare(stamp, &head),
        })
    }

    /// Refuses another network's.
    pub(super) fn belongs_to(&self, genesis: &Genesis) -> Result<(), DatabaseError> {
        match self.network.as_ref().map(|network| network.genesis_hash).filter(|found| *found != genesis.hash()) {
            Some(found) => Err(DatabaseError::OtherNetwork { expected: genesis.hash(), found }),
            None => Ok(()),
        }
    }
}

/// The trees of a stopped node's database.
#[derive(Debug)]
pub struct Trees {
    trees: StoreTrees,
    network: Network,
    stamp: Option<Stamp>,
    data_dir: PathBuf,
    /// The database as the node reads it, once somebody has asked for that.
    reader: OnceLock<Option<Reader>>,
    engine: Engine,
}

/// Rows in order of key.
pub type Rows = Box<dyn Iterator<Item = Result<Row, DatabaseError>>>;

impl Trees {
    /// Opens the database in `data_dir` for inspection. It has to exist, and no other
    /// process may have it open.
    pub fn open(data_dir: &Path) -> Result<Self, DatabaseError> {
        Self::open_with_cache(data_dir, CACHE_BYTES)
    }

    /// The same with another cache.
    pub fn open_with_cache(data_dir: &Path, cache_bytes: u64) -> Result<Self, DatabaseError> {
        Self::of(Storage::look(data_dir, cache_bytes)?, data_dir)
    }

    /// The same of a disk in memory, for tests. It has no directory.
    pub fn in_memory(disk: &MemoryDisk) -> Result<Self, DatabaseError> {
        Self::of(Storage::memory(disk), Path::new(""))
    }

    fn of(storage: Storage, data_dir: &Path) -> Result<Self, DatabaseError> {
        let Storage { engine, trees, stamp } = storage;
        let schema = open::schema_check(&trees)?;
        tracing::debug!(schema, "opened for inspection");
        let network = open::read_meta::<StoredNetwork>(&trees, meta::NETWORK)?.map(|stored| stored.network);
        let network = network.unwrap_or(Network::Devnet);
        Ok(Self { trees, network, stamp, data_dir: data_dir.to_path_buf(), reader: OnceLock::new(), engine })
    }

    /// Makes durable what looking at it has made the storage engine rearrange in its file.
    pub(in crate::db) fn sync(&self) -> Result<(), DatabaseError> {
        self.engine.sync()
    }

    fn meta<T: serde::de::DeserializeOwned>(&self, key: &[u8]) -> Result<Option<T>, DatabaseError> {
        open::read_meta(&self.trees, key)
    }

    /// Who it belongs to and how far it is.
    pub fn condition(&self) -> Result<Condition, DatabaseError> {
        Condition::of(&self.trees, self.stamp)
    }

    /// Refuses the database of another network.
    pub fn belongs_to(&self, genesis: &Genesis) -> Result<(), DatabaseError> {
        self.condition()?.belongs_to(genesis)
    }

    /// Which network it is of.
    pub const fn network(&self) -> Network {
        self.network
    }

    /// The database as the node reads it. `None` if it was never filled to the end.
    pub(super) fn reader(&self) -> Result<Option<Reader>, DatabaseError> {
        match self.reader.get() {
            Some(reader) => Ok(reader.clone()),
            None => {
                let reader = self.new_reader()?;
                Ok(self.reader.get_or_init(|| reader).clone())
            }
        }
    }

    fn new_reader(&self) -> Result<Option<Reader>, DatabaseError> {
        open::is_migrated(&self.trees)?;
        let condition = self.condition()?;
        let Some(network) = condition.network else { return Ok(None) };
        let head = self.meta::<Head>(meta::HEAD)?.unwrap_or(Head::EMPTY);
        let (flights, ..) = FlightTable::read(&self.trees, true)?;
        let shared = Shared::new(self.trees.clone(), network, &head, condition.height, flights);
        Ok(Some(Reader { shared: Arc::new(shared) }))
    }

    /// The records of one tree, in order of their rows' keys. `None` if there is no such tree; an error if
    /// the database is of another schema.
    pub fn rows(&self, name: &str) -> Result<Option<Rows>, DatabaseError> {
        self.select(name, Filter::default())
    }

    /// Those that a filter admits; see [`Self::rows`].
    pub fn select(&self, name: &str, filter: Filter) -> Result<Option<Rows>, DatabaseError> {
        let Some(id) = TreeId::named(name) else { return Ok(None) };
        open::is_migrated(&self.trees)?;
        let network = self.network;
        // Without it the rows are shown as they lie there; what is in its way shows itself.
        let reader = self.reader().ok().flatten();
        let records = record::walk(&self.trees, id, self.range(id, &filter)?, reader.as_ref(), network);
        Ok(Some(Box::new(records.filter_map(move |record| match record {
            Ok(record) => filter.admits(&record.content, network).then(|| Ok(record.into_row())),
            Err(error) => Some(Err(error)),
        }))))
    }

    /// Where the wanted records stand. A row of the log holds several entries, so the first
    /// wanted one may stand in the row before; the height of a transaction stands under its
    /// number.
    fn range(&self, id: TreeId, filter: &Filter) -> Result<KeyRange, DatabaseError> {
        if let (TreeId::Confirmed | TreeId::Transactions, Some(txid)) = (id, &filter.txid)
            && let Ok(settled) = get_settled(&self.trees, txid)
        {
            // What is not settled has no number, and no key begins like this.
            let Some(StoredSettled { number, .. }) = settled else { return Ok(filter::under(&[0xff; 32])) };
            return Ok(match id {
                TreeId::Confirmed => filter::under(&stretch_of(number)),
                // A record that may have others beside it.
                _ => filter::under(&record_of(self.trees.get(id), number)?.unwrap_or(number).to_be_bytes()),
            });
        }
        let (from, to) = filter.range(id);
        match (id, from) {
            (TreeId::Changes, Bound::Included(from)) => {
                let before = self.trees.get(id).range(Bound::Unbounded, Bound::Included(from.clone())).next_back();
                let start = before.transpose()?.map_or(from, |(key, _)| key.to_vec());
                Ok((Bound::Included(start), to))
            }
            (_, from) => Ok((from, to)),
        }
    }

    /// The first number in the change log, if it has any.
    pub fn log_begins(&self) -> Result<Option<u64>, DatabaseError> {
        self.trees.get(TreeId::Changes).first()?.map(|(key, _)| sequence_of(&key)).transpose()
    }
}
