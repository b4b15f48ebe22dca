//! Whether a database is what it should be: every invariant by name.
//!
//! Memory is bounded, whatever the size of the database: everything is read as a stream,
//! and where rows have to be held against many others, they are looked up, or the work is
//! done in several passes. No row is changed (sled splits nodes where it reads, which changes its
//! file and nothing that is in it).
//!
//! What is found is of one of four kinds, which is what a repair goes by ([`Damage`]).

mod chain;
mod flight;
mod ledger;
mod log;
mod records;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;

use serde::Serialize;

use super::DatabaseError;
use super::flight::FlightTable;
use super::guard::{Agreement, compare};
use super::kept::Kept;
use super::open::Storage;
use super::schema::{Head, StoredNetwork, StoredTip, TreeId, meta};
use super::store::{Reader, Shared};
use crate::consensus::{ChainTip, Committee, FenceState};
use crate::types::Genesis;

/// Findings of one check that are told one by one; the rest is counted.
const MAX_TOLD: usize = 100;

/// What a finding means for a repair.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Damage {
    /// Something that can be made anew from the rest is wrong.
    Derived,
    /// Votes or locks may be missing: this member may have said what it no longer knows.
    Votes,
    /// The ledger itself is not what was decided. It has to be fetched from the others.
    Ledger,
    /// The check could not be carried out.
    Unreadable,
}

/// Something that is not as it should be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// What it means for a repair.
    pub damage: Damage,
    /// Where: a tree and a key, readable.
    pub place: String,
    /// What is wrong there.
    pub what: String,
}

/// One invariant, and how it was found.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Check {
    /// Its name.
    pub name: &'static str,
    /// What has to hold.
    pub holds: &'static str,
    /// Rows, entries or blocks that were looked at.
    pub checked: u64,
    /// Why it was not (fully) checked, if so.
    pub left_out: Option<String>,
    /// How much is wrong.
    pub wrong: u64,
    /// How much of that is of which kind.
    pub damages: BTreeMap<Damage, u64>,
    /// The first of it.
    pub findings: Vec<Finding>,
}

impl Check {
    const fn new(name: &'static str, holds: &'static str) -> Self {
        Self { name, holds, checked: 0, left_out: None, wrong: 0, damages: BTreeMap::new(), findings: Vec::new() }
    }

    /// A check that has found these.
    #[cfg(test)]
    pub(super) fn of(name: &'static str, findings: impl Iterator<Item = Finding>) -> Self {
        let mut check = Self::new(name, "it holds");
        findings.for_each(|finding| check.add(finding));
        check
    }

    pub(super) fn add(&mut self, finding: Finding) {
        self.wrong += 1;
        *self.damages.entry(finding.damage).or_default() += 1;
        if self.findings.len() < MAX_TOLD {
            self.findings.push(finding);
        }
    }

    fn find(&mut self, damage: Damage, place: impl Into<String>, what: impl Into<String>) {
        self.add(Finding { damage, place: place.into(), what: what.into() });
    }

    /// Something that cannot be read. That the machine fails at this moment is no finding.
    fn unreadable(
        &mut self,
        damage: Damage,
        place: impl Into<String>,
        error: DatabaseError,
    ) -> Result<(), DatabaseError> {
        if !error.is_damage() {
            return Err(error);
        }
        self.find(damage, place, error.to_string());
        Ok(())
    }

    /// Something that has to be there, or else.
    fn ensure(&mut self, holds: bool, damage: Damage, place: impl FnOnce() -> String, what: &str) {
        if !holds {
            self.find(damage, place(), what);
        }
    }
}

/// What was checked, and what is wrong.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Report {
    /// In the order in which they were made.
    pub checks: Vec<Check>,
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.checks.iter().all(|check| check.wrong == 0)
    }

    /// The worst of what is wrong.
    pub fn worst(&self) -> Option<Damage> {
        self.checks.iter().filter_map(|check| check.damages.keys().next_back()).max().copied()
    }

    /// Every finding that is told, with the name of its check.
    pub fn findings(&self) -> impl Iterator<Item = (&'static str, &Finding)> {
        self.checks.iter().flat_map(|check| check.findings.iter().map(|finding| (check.name, finding)))
    }
}

/// How to verify.
#[derive(Clone, Copy)]
pub struct VerifyOptions<'a> {
    /// The network. Without it no signature can be checked.
    pub genesis: Option<&'a Genesis>,
    /// Also whatever takes long: signatures of transactions, the digest of every block.
    pub full: bool,
    /// Told now and then which check is being made and how far it is.
    pub progress: &'a dyn Fn(&'static str, u64),
}

impl std::fmt::Debug for VerifyOptions<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "VerifyOptions(full: {})", self.full)
    }
}

/// What the checks look at.
struct Subject<'a> {
    reader: Reader,
    head: Head,
    tip: ChainTip,
    unconfirmed_from: u64,
    committee: Option<Committee>,
    options: VerifyOptions<'a>,
}

type Run = fn(&Subject<'_>, &mut Check) -> Result<(), DatabaseError>;

/// The invariants, in the order in which they are checked.
const CHECKS: [(&str, &str, Run); 16] = [
    ("records", "each row of a record has all the others beside it", records::whole),
    ("utxos", "each output's state names a transaction that is in flight, settled or confirmed", ledger::utxos),
    ("addresses", "the index has a row for each unspent or locked output, and no other", ledger::addresses),
    ("transactions", "each settled transaction has its proof or its block, and its outputs", ledger::transactions),
    ("confirmed", "each transaction of a block has its height, and no other has one", ledger::confirmed),
    ("dead", "what is dead is neither settled nor in flight", ledger::dead),
    ("supply", "unspent and locked outputs and unpaid fees are what the genesis allocated", ledger::supply),
    ("digest", "the chain's outputs have the digest of the tip", ledger::digest),
    ("locks", "each lock has its transaction, its vote and its outputs, and the other way round", flight::locks),
    ("votes", "each vote has its transaction; no commit without its certificate, none beside an abort", flight::votes),
    ("certificates", "each certificate proves what it is kept for", flight::certificates),
    ("fence", "each row of the fence names an output", flight::fence),
    ("changes", "the change log is dense, its steps are legal, and they lead to the states", log::changes),
    ("blocks", "each block follows the one before and was decided by a quorum", chain::blocks),
    ("agreement", "the agreement's log is of the height after the tip", chain::agreement),
    ("subscriptions", "each subscription stands under its name", log::subscriptions),
];

/// The names of the checks that take long, in the order in which they are made.
pub fn check_names() -> impl Iterator<Item = &'static str> {
    CHECKS.iter().map(|(name, ..)| *name)
}

/// Checks every invariant of an open database. A damaged one may make the storage engine
/// panic while it is read: then that check is unreadable, and the others are made all the
/// same. Where the machine fails to read it at all, nothing can be told.
pub(super) fn verify(storage: Storage, options: VerifyOptions<'_>) -> Result<Report, DatabaseError> {
    let (meta, subject) = check_meta(storage, options)?;
    let mut checks = vec![meta];
    if let Some(subject) = subject {
        for (name, holds, run) in CHECKS {
            (options.progress)(name, 0);
            let mut check = Check::new(name, holds);
            let outcome = std::panic::catch_unwind(AssertUnwindSafe(|| run(&subject, &mut check)));
            match outcome {
                Ok(Ok(())) => {}
                Ok(Err(error)) => check.unreadable(Damage::Ledger, name, error)?,
                Err(_) => check.find(Damage::Unreadable, name, "the storage engine came apart while reading it"),
            }
            checks.push(check);
        }
    }
    Ok(Report { checks })
}

/// Who it belongs to, how it stands to its guard, whether it is whole.
fn check_meta(storage: Storage, options: VerifyOptions<'_>) -> Result<(Check, Option<Subject<'_>>), DatabaseError> {
    let holds = "it is whole, of this network, fits its guard, and votes";
    let mut check = Check::new("meta", holds);
    let mut read = || -> Result<Option<Subject<'_>>, DatabaseError> {
        check.checked = storage.trees.get(TreeId::Meta).count()?;
        let Some(network) = storage.meta::<StoredNetwork>(meta::NETWORK)? else {
            check.find(Damage::Ledger, "meta/network", "it was never filled to the end");
            return Ok(None);
        };
        let head = storage.meta::<Head>(meta::HEAD)?.unwrap_or(Head::EMPTY);
        let member = network.public_key.is_some();
        if compare(storage.stamp, &head) == Agreement::Mismatch {
            let guard = storage.stamp.map_or(0, |stamp| stamp.commit);
            let what = format!("the last commit here is {}, the guard has seen {guard}", head.commit);
            check.find(if member { Damage::Votes } else { Damage::Derived }, "meta/head", what);
        }
        if let Some(reason) = storage.trees.get(TreeId::Meta).get(meta::SUSPENSION)? {
            check.find(Damage::Votes, "meta/suspension", String::from_utf8_lossy(&reason));
        }
        if let Some(expected) = options.genesis.map(Genesis::hash).filter(|hash| *hash != network.genesis_hash) {
            return Err(DatabaseError::OtherNetwork { expected, found: network.genesis_hash });
        }
        let Some(stored) = storage.meta::<StoredTip>(meta::CHAIN)? else {
            check.find(Damage::Ledger, "meta/chain", "there is no tip");
            return Ok(None);
        };
        let kept = storage.meta::<Kept>(meta::KEPT)?;
        let same = match kept.map(|kept| Ok::<_, DatabaseError>(Kept::read(&storage.trees)? == kept)).transpose() {
            Ok(same) => same.unwrap_or(true),
            Err(error) if error.is_damage() => false,
            Err(error) => return Err(error),
        };
        let what = "rows with locks, votes, certificates, words on the next block or fenced outputs are missing";
        check.ensure(same, Damage::Votes, || "meta/kept".into(), what);
        let asking = storage.meta::<FenceState>(meta::FENCE)? == Some(FenceState::Asking);
        check.ensure(!asking || member, Damage::Derived, || "meta/fence".into(), "an observer has no votes to fence");
        let (tip, unconfirmed_from) = (stored.tip()?, stored.unconfirmed_from);
        // What is in flight is read as a whole; if that fails, the checks say where.
        let flights = FlightTable::read(&storage.trees, true).map(|(flights, ..)| flights);
        let flights = match flights {
            Ok(flights) => flights,
            Err(error) => {
                check.unreadable(Damage::Votes, "locks", error)?;
                FlightTable::default()
            }
        };
        let shared = Shared::new(storage.trees.clone(), network, &head, tip.height, flights);
        let reader = Reader { shared: std::sync::Arc::new(shared) };
        let committee = options.genesis.map(Committee::of_genesis);
        Ok(Some(Subject { reader, head, tip, unconfirmed_from, committee, options }))
    };
    let outcome = std::panic::catch_unwind(AssertUnwindSafe(&mut read));
    let subject = match outcome {
        Ok(Ok(subject)) => subject,
        Ok(Err(error)) => {
            check.unreadable(Damage::Ledger, "meta", error)?;
            None
        }
        Err(_) => {
            check.find(Damage::Unreadable, "meta", "the storage engine came apart while reading it");
            None
        }
    };
    Ok((check, subject))
}

impl Subject<'_> {
    /// Says now and then how far a check is.
    fn tell(&self, check: &mut Check) {
        check.checked += 1;
        if check.checked.is_multiple_of(4_096) {
            (self.options.progress)(check.name, check.checked);
        }
    }
}

/// Verifies the database of a stopped node. It has to exist, and nobody else may have it
/// open. A database so damaged that it cannot be opened is an error.
pub fn verify_data_dir(
    data_dir: &std::path::Path,
    cache_bytes: u64,
    options: VerifyOptions<'_>,
) -> Result<Report, DatabaseError> {
    if !super::open::is_there(data_dir) {
        return Err(DatabaseError::Missing(data_dir.to_path_buf()));
    }
    let storage = Storage::look(data_dir, cache_bytes)?;
    super::open::is_migrated(&storage.trees)?;
    verify(storage, options)
}

/// The same of a disk in memory, for simulations.
pub fn verify_in_memory(disk: &super::MemoryDisk, options: VerifyOptions<'_>) -> Result<Report, DatabaseError> {
    verify(Storage::memory(disk), options)
}
