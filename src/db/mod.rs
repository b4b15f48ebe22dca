//! Remembers: the ledger in sled trees, changed only by whole commits.
//!
//! The only room that knows sled. What is written together is written by one call of
//! [`Database::commit`], in one multi-tree transaction that is on the platter before the
//! call returns. What may leave the node is inside a [`Durable`], and only this room
//! makes those.
//!
//! # The trees
//!
//! Keys sort, so integers in them are big-endian. Values are bincode. A record of more
//! than 6 KiB is split into rows whose keys end in a `u16` part number (sled never syncs
//! the blobs that larger values become).
//!
//! | tree | key | value | what always holds |
//! |---|---|---|---|
//! | `meta` | name | `schema`, `network`, `head`, `chain`, `suspension`, `fence`, `pruned`, `forgotten`, `kept` | `head` is written by each commit and fits the guard; `chain` is the tip, with the digest of the chain's UTXO set; `kept` counts the rows of `locks`, `votes`, `certificates`, `agreement` and `fence`; `forgotten` is there if a program before schema 6 pruned outputs |
//! | `utxos` | txid, vout of the first | up to four outputs, each live or spent by a txid; in the first row of a settled transaction [`Settled`] and its number | state moves only along the protocol's transitions; that an output is locked follows from `locks`, that its spender is in the chain from `confirmed` |
//! | `addresses` | address payload, txid, vout | empty | has a row for each unspent or locked output, and no other |
//! | `locks` | commit number, part | bodies and `locked_at` of what the commit put into flight | kept while one of them is in flight; with `locked_at`, all inputs were locked for it |
//! | `votes` | commit number, part | this member's votes of that commit | kept while one of their transactions is in flight |
//! | `certificates` | commit number, part | C(T) and A(T) that the commit acted on or keeps for the chain | kept while one of their transactions is in flight; a vote `Commit` has its certificate |
//! | `transactions` | number of the first, part | bodies, as many as fit in a row | one for each settled transaction; numbers rise with each that is settled, without a gap |
//! | `proofs` | number of the first, part | F(T) of up to 64 transactions settled by one commit | whatever no block contains has its proof; kept until blocks that are pruned prove all of them |
//! | `changes` | first sequence | [`LogEntry`] list | dense from 1; agrees with the states |
//! | `subscriptions` | hash of subscriber id, part | [`Subscription`] | |
//! | `blocks` | height, part | block and commit certificate | linked from 1 up to the tip |
//! | `confirmed` | number / 64, height | `confirmed_at`, and which of the 64 | each transaction of each block is in one row, by its number in `transactions` |
//! | `dead` | txid | [`Dead`] | what a block aborted, and what this node had in flight when a block contradicted it |
//! | `agreement` | height, number, part | [`AgreementRecord`] | the write-ahead log of the height after the tip, in order |
//! | `fence` | txid, vout | empty | empty unless votes were lost; then what this member must not vote on ([`FenceState`]) |
//!
//! A guard file beside the database (see [`guard`]) says which commit was the last.

mod ahead;
mod backup;
#[cfg(test)]
mod breakable;
mod codec;
mod commit;
mod compact;
mod confirmed;
mod engine;
mod export;
mod fence;
mod finals;
mod flight;
pub mod guard;
mod held;
mod inspect;
mod kept;
mod memory;
mod migrate;
mod open;
mod outputs;
mod pack;
mod prune;
mod quick;
mod recent;
mod recover;
mod renew;
mod repair;
mod repair_fence;
mod repair_flight;
#[cfg(test)]
pub(crate) mod samples;
mod schema;
mod store;
mod switch;
mod threads;
mod verify;
mod view;
mod watcher;

#[path = "../../migrations/m0002_blocks.rs"]
mod m0002_blocks;
#[path = "../../migrations/m0003_fence.rs"]
mod m0003_fence;
#[path = "../../migrations/m0004_bodies.rs"]
mod m0004_bodies;
#[path = "../../migrations/m0005_confirmed.rs"]
mod m0005_confirmed;
#[path = "../../migrations/m0006_outputs.rs"]
mod m0006_outputs;

/// A row as a frozen migration spells it out: the tree's name, key, and value; none removes
/// it.
pub(crate) type FrozenRow = (&'static str, Vec<u8>, Option<Vec<u8>>);

/// All rows of a tree as a migration reads them, in order of key.
pub(crate) type FrozenRows = std::collections::BTreeMap<Vec<u8>, Vec<u8>>;

pub use crate::consensus::LogEntry;
pub use backup::{PutInPlace, backup, restore};
pub use commit::{CommitBatch, Durable};
pub use compact::{Compacted, compact};
pub use export::{Exported, ImportError, ImportFault, export, import};
pub use inspect::{
    Condition, FenceStats, Filter, Flight, Found, GuardStats, HeldCertificate, KeyError, Place, Row, Rows, StateStats,
    Stats, SupplyStats, TREE_NAMES, Thing, TreeStats, Trees as InspectTrees,
};
pub use memory::{DiskImage, MemoryDisk};
pub use migrate::{Migrated, migrate};
pub use prune::{PruneBatch, Pruned};
pub use recover::{Opened, Owner, RecoveredState};
pub use renew::RenewalState;
pub use repair::{Plan, PlanStep, Remedy, Repaired, fence_in_memory, fence_warning, plan, repair};
pub use schema::{SCHEMA_VERSION, StoredNetwork, Subscription, SubscriptionKey};
pub use store::{AddressPage, ChangeEvents, Database, DurableHead, Reader, Snapshot};
pub use verify::{Check, Damage, Finding, Report, VerifyOptions, check_names, verify_data_dir, verify_in_memory};
pub use view::LedgerView;
pub use watcher::Watcher;

#[cfg(doc)]
use crate::consensus::{AgreementRecord, Dead, FenceState, Settled};

/// Why the database cannot go on. The first of these stops the node.
#[derive(Debug, thiserror::Error)]
pub enum DatabaseError {
    /// Another process has it open.
    #[error("the database in {0} is in use by another process; stop that node first, or work on a copy")]
    InUse(std::path::PathBuf),
    /// There is none.
    #[error("there is no database in {0}")]
    Missing(std::path::PathBuf),
    /// A name that is taken.
    #[error("{0} exists already and is never overwritten")]
    Exists(std::path::PathBuf),
    /// It is of another network.
    #[error("the database belongs to another network: its genesis is {found}, the configured one is {expected}")]
    OtherNetwork {
        /// The configured genesis.
        expected: crate::types::GenesisHash,
        /// The stored genesis.
        found: crate::types::GenesisHash,
    },
    /// It is of another member, or of an observer.
    #[error(
        "the database belongs to {found}, and the configured key is {expected}: votes and locks in it are another's; use the directory that belongs to the key"
    )]
    OtherKey {
        /// The configured key.
        expected: String,
        /// The stored key.
        found: String,
    },
    /// It was written by a newer program.
    #[error("the database has schema {found}, and this program knows only up to {known}; use the newer program")]
    NewerSchema {
        /// The stored schema.
        found: u32,
        /// The newest known one.
        known: u32,
    },
    /// It was written by an older program, and the network's genesis is not at hand.
    #[error("the database has schema {found}, and this program writes {known}: migrate it first")]
    OlderSchema {
        /// The stored schema.
        found: u32,
        /// This program's.
        known: u32,
    },
    /// A row that cannot be read.
    #[error("a row of tree {tree} cannot be read: {what}")]
    Corrupt {
        /// The tree.
        tree: &'static str,
        /// What is wrong.
        what: String,
    },
    /// sled came apart while opening.
    #[error(
        "the database is damaged: opening it failed inside the storage engine ({0}); keep the directory and restore a backup or re-sync"
    )]
    Damaged(String),
    /// Some of what was written is not there.
    #[error(
        "the database is damaged: {0}; it is not trusted with anything: keep the directory, `time-db verify` says more and `time-db repair` what can be done"
    )]
    Unsound(String),
    /// sled says no.
    #[error("storage engine: {0}")]
    Sled(#[from] sled::Error),
    /// The file system says no.
    #[error("{what}: {source}")]
    Io {
        /// What was being done.
        what: &'static str,
        /// The system's word.
        source: std::io::Error,
    },
}

impl DatabaseError {
    pub(crate) fn io(what: &'static str) -> impl FnOnce(std::io::Error) -> Self {
        move |source| Self::Io { what, source }
    }

    /// Whether what lies there is wrong, and not who asks, or the machine at this moment.
    pub(crate) fn is_damage(&self) -> bool {
        match self {
            Self::Damaged(_) | Self::Corrupt { .. } | Self::Unsound(_) => true,
            Self::Sled(sled::Error::Io(error)) => error.kind() == std::io::ErrorKind::UnexpectedEof,
            Self::Sled(_) => true,
            _ => false,
        }
    }

    /// A short name for scripts, which stays.
    pub fn kind(&self) -> &'static str {
        match self {
            Self::InUse(_) => "in_use",
            Self::Missing(_) => "missing",
            Self::Exists(_) => "exists",
            Self::OtherNetwork { .. } => "other_network",
            Self::OtherKey { .. } => "other_key",
            Self::NewerSchema { .. } => "newer_schema",
            Self::OlderSchema { .. } => "older_schema",
            Self::Damaged(_) => "damaged",
            Self::Corrupt { .. } => "corrupt",
            Self::Unsound(_) => "unsound",
            Self::Sled(_) if self.is_damage() => "damaged",
            Self::Sled(_) | Self::Io { .. } => "io",
        }
    }

    /// What an operator does next.
    pub fn next_step(&self) -> &'static str {
        match self.kind() {
            "in_use" => "stop the node, or copy its directory while it is stopped and look at the copy",
            "missing" => {
                "check --data-dir: it is the directory that holds `db` and `guard`, as in the node's configuration"
            }
            "exists" => "give a name that is not taken",
            "other_network" => "check the genesis file and the data directory: they have to be of the same network",
            "other_key" => "use the directory that belongs to the key",
            "newer_schema" => "use the program that wrote it, or a newer one; nothing was changed",
            "older_schema" => "run `time-db migrate` on it, or give --genesis",
            "io" => "check the disk, the space left on it, and the permissions; nothing was judged or changed",
            _ => {
                "keep the directory as it is and do not start the node on it; `time-db verify` says more and `time-db \
                 repair` what can be done; or restore a backup (`time-db restore`)"
            }
        }
    }

    pub(crate) fn corrupt(tree: &'static str, what: impl std::fmt::Display) -> Self {
        Self::Corrupt { tree, what: what.to_string() }
    }
}
