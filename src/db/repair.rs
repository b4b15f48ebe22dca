//! What to do about a database that is not as it should be: a plan first, then the deed.
//!
//! Three things can be done, and each is safe for a reason that the plan says. What can be
//! made anew from the rest is made anew. Where votes may be missing, the database goes
//! behind the fence: the ledger is kept, and the member votes only on what comes into being
//! after it has asked the others. Where the ledger itself is wrong, or nothing can be read,
//! the database is set aside and fetched from the others, behind the fence too. No vote and
//! nothing final disappears silently: a fenced member says that it is fenced, and what was
//! set aside or changed stays beside it as a copy.
//!
//! Repairing twice is the same as once: what is sound afterwards needs nothing more.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Serialize;

use super::backup::copy_files;
use super::codec::{RowChange, get_record};
use super::commit::{CommitBatch, Maintenance};
use super::guard::{Guard, sync_directory};
use super::open::{DATABASE_DIR, Storage, is_there};
use super::outputs::{StoredOutput, output_rows};
use super::repair_fence::{put_behind_fence, suspend};
use super::repair_flight::{restart_log, settle_flight};
use super::schema::{StoredNetwork, Subscription, SubscriptionKey, TreeId, address_key, meta};
use super::store::{Database, Reader};
use super::switch::{SET_ASIDE, free_name};
use super::verify::{Check, Damage, Report, VerifyOptions, verify_data_dir};
use super::{DatabaseError, MemoryDisk, Owner};
use crate::consensus::{Committee, Vote};
use crate::types::{Genesis, PublicKey};

/// What is said where a fence can never stand.
const NEVER_FENCED: &str = "the other members are no quorum, so nobody can say what this member must not vote on: it \
    follows and never votes again. A network of so few does not survive the loss of a member's votes";

/// Rows that one commit of a repair writes.
const ROWS_AT_ONCE: usize = 4_096;

/// One thing that a repair does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Remedy {
    /// Make the index of addresses and other derived rows anew.
    Rebuild,
    /// Put the database behind the fence.
    Fence,
    /// Set the database aside and fetch the ledger from the others, behind the fence.
    Resync,
}

impl Remedy {
    /// What it does.
    pub const fn what(self) -> &'static str {
        match self {
            Self::Rebuild => {
                "make anew what follows from the rest (the index of addresses) and drop subscriptions that cannot be read"
            }
            Self::Fence => {
                "keep the ledger and put it behind the fence: the node asks the other members what it must not \
                 vote on, and votes on what comes into being after that"
            }
            Self::Resync => {
                "set the database aside (it is kept) and let the node fetch the ledger from the other members, \
                 behind the fence"
            }
        }
    }

    /// Why that is safe.
    pub const fn why(self) -> &'static str {
        match self {
            Self::Rebuild => "nothing that was said depends on rows that the others determine",
            Self::Fence => {
                "whatever this member may have voted on and lost is named by a quorum of the others, and it never \
                 votes on that again"
            }
            Self::Resync => {
                "every block comes with the proof that a quorum decided it, and the fence covers the votes that \
                 were lost"
            }
        }
    }
}

/// One remedy with its reasons.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PlanStep {
    /// What is to be done.
    pub remedy: Remedy,
    /// The same in words.
    pub what: &'static str,
    /// Why that is safe.
    pub why: &'static str,
    /// The names of the invariants that are broken.
    pub because: BTreeSet<String>,
}

/// What a repair would do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Plan {
    /// In this order. Empty: there is nothing to repair.
    pub steps: Vec<PlanStep>,
    /// Why the database cannot be opened, if so.
    pub unopenable: Option<String>,
    /// Why this member does not vote again even so, if that is known.
    pub warning: Option<&'static str>,
    /// There is no database any more, because a repair has set it aside: the node has to be
    /// started, and fetches the ledger.
    pub set_aside: Option<PathBuf>,
    /// What was found in it otherwise.
    pub report: Option<Report>,
}

impl Plan {
    fn of(report: Report) -> Self {
        let because = |damages: &[Damage]| -> BTreeSet<String> {
            let of = |check: &&Check| damages.iter().any(|damage| check.damages.contains_key(damage));
            report.checks.iter().filter(of).map(|check| check.name.to_owned()).collect()
        };
        let step = |remedy: Remedy, damages: &[Damage]| {
            let because = because(damages);
            (!because.is_empty()).then(|| PlanStep { remedy, what: remedy.what(), why: remedy.why(), because })
        };
        let steps = match step(Remedy::Resync, &[Damage::Ledger, Damage::Unreadable]) {
            Some(resync) => vec![resync],
            None => {
                let rebuild = step(Remedy::Rebuild, &[Damage::Derived]);
                rebuild.into_iter().chain(step(Remedy::Fence, &[Damage::Votes])).collect()
            }
        };
        Self { steps, unopenable: None, warning: None, set_aside: None, report: Some(report) }
    }

    /// Says so if the network does not survive the loss of this member's votes.
    fn warned(mut self, genesis: Option<&Genesis>, member: Option<PublicKey>) -> Self {
        let loses_votes = self.has(Remedy::Fence) || self.has(Remedy::Resync);
        if let (true, Some(genesis), Some(member)) = (loses_votes, genesis, member) {
            self.warning = fence_warning(genesis, &member);
        }
        self
    }

    /// Whether this remedy is part of it.
    pub fn has(&self, remedy: Remedy) -> bool {
        self.steps.iter().any(|step| step.remedy == remedy)
    }
}

/// Why a member that has lost votes never votes again, if the others are too few for a fence.
pub fn fence_warning(genesis: &Genesis, member: &PublicKey) -> Option<&'static str> {
    let committee = Committee::of_genesis(genesis);
    let own = committee.index_of(member)?;
    (!committee.has_quorum_without(own)).then_some(NEVER_FENCED)
}

/// Looks what is wrong and says what would be done about it. Changes nothing.
///
/// What is wrong is looked at twice: sled passes over what it cannot read at one moment, and a
/// disk that fails now and then is no reason to put a member's votes aside.
pub fn plan(data_dir: &Path, cache_bytes: u64, options: VerifyOptions<'_>) -> Result<Plan, DatabaseError> {
    let first = look(data_dir, cache_bytes, options)?;
    if first.steps.is_empty() {
        return Ok(first);
    }
    let second = look(data_dir, cache_bytes, options)?;
    if first.steps != second.steps {
        let source = std::io::Error::other("two looks at it differ: the disk or the memory fails now and then");
        return Err(DatabaseError::Io { what: "looking at the database", source });
    }
    Ok(second)
}

fn look(data_dir: &Path, cache_bytes: u64, options: VerifyOptions<'_>) -> Result<Plan, DatabaseError> {
    match verify_data_dir(data_dir, cache_bytes, options) {
        Ok(report) => {
            let plan = Plan::of(report);
            let member = if plan.steps.is_empty() { None } else { owner_of(data_dir, cache_bytes)?.flatten() };
            Ok(plan.warned(options.genesis, member))
        }
        // An earlier repair was all that can be done here.
        Err(DatabaseError::Missing(missing)) => match last_set_aside(data_dir) {
            Some(kept) => {
                let set_aside = Some(kept);
                Ok(Plan { steps: Vec::new(), unopenable: None, warning: None, set_aside, report: None })
            }
            None => Err(DatabaseError::Missing(missing)),
        },
        // What nobody can read is fetched again. Everything else is no matter of repair.
        Err(error) if error.is_damage() => {
            let remedy = Remedy::Resync;
            let because = BTreeSet::from(["opening".to_owned()]);
            let step = PlanStep { remedy, what: remedy.what(), why: remedy.why(), because };
            let unopenable = Some(error.to_string());
            let plan = Plan { steps: vec![step], unopenable, warning: None, set_aside: None, report: None };
            Ok(plan.warned(options.genesis, owner_of(data_dir, cache_bytes)?.flatten()))
        }
        Err(error) => Err(error),
    }
}

/// What a repair did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Repaired {
    /// Where what was there before is kept.
    pub kept: PathBuf,
    /// Outputs that are behind the fence now.
    pub fenced: Option<u64>,
    /// Votes that did not fit together with the rest and were taken out. Nothing is voted on
    /// in their place: the fence is around their transactions.
    pub votes_taken_out: Vec<Vote>,
    /// What is found afterwards; `None` where the node has to fetch the ledger first.
    pub report: Option<Report>,
}

/// Carries a plan out. What was there before is kept as a copy.
pub fn repair(
    data_dir: &Path,
    cache_bytes: u64,
    plan: &Plan,
    options: VerifyOptions<'_>,
) -> Result<Repaired, DatabaseError> {
    if plan.has(Remedy::Resync) {
        let kept = set_aside(data_dir)?;
        // Without a database and without the word that this is a first start, the node makes
        // one behind the fence. With the genesis at hand that is done here.
        let report = match options.genesis {
            Some(genesis) => match owner_of(&kept, cache_bytes)? {
                Some(public_key) => {
                    drop(Database::open(data_dir, Owner { genesis, public_key, first_start: false }, cache_bytes)?);
                    Some(verify_data_dir(data_dir, cache_bytes, options)?)
                }
                None => None,
            },
            None => None,
        };
        return Ok(Repaired { kept, fenced: None, votes_taken_out: Vec::new(), report });
    }
    let kept = free_name(data_dir, "before-repair");
    copy_files(data_dir, &kept)?;
    if plan.has(Remedy::Rebuild) {
        rebuild(&mut Database::open_offline(data_dir, cache_bytes)?)?;
    }
    let (mut fenced, mut votes_taken_out) = (None, Vec::new());
    if plan.has(Remedy::Fence) {
        (fenced, votes_taken_out) = fence_in_place(|| Database::open_offline(data_dir, cache_bytes))?;
    }
    let report = Some(verify_data_dir(data_dir, cache_bytes, options)?);
    Ok(Repaired { kept, fenced, votes_taken_out, report })
}

/// Keeps the ledger and puts it behind the fence. Gives how many outputs are behind it, and
/// which votes were taken out.
fn fence_in_place(
    open: impl Fn() -> Result<Database, DatabaseError>,
) -> Result<(Option<u64>, Vec<Vote>), DatabaseError> {
    let mut database = open()?;
    suspend(&mut database)?;
    let votes_taken_out = settle_flight(&mut database)?;
    restart_log(&mut database)?;
    // What is in flight is read again from the rows that were written.
    drop(database);
    let fenced = put_behind_fence(&mut open()?)?;
    Ok((fenced, votes_taken_out))
}

/// Puts a database in memory behind the fence where it is, as a repair does with one that may
/// have lost votes; for simulations.
pub fn fence_in_memory(disk: &MemoryDisk) -> Result<(), DatabaseError> {
    fence_in_place(|| Database::of_storage(Storage::memory(disk), true)).map(|_| ())
}

/// Whose database it was, if that can still be read.
#[expect(clippy::option_option, reason = "it cannot be read; it is an observer's; it is a member's")]
fn owner_of(kept: &Path, cache_bytes: u64) -> Result<Option<Option<PublicKey>>, DatabaseError> {
    let network = Storage::look(kept, cache_bytes).and_then(|files| files.meta::<StoredNetwork>(meta::NETWORK));
    match network {
        Ok(network) => Ok(network.map(|network| network.public_key)),
        Err(error) if error.is_damage() => Ok(None),
        Err(error) => Err(error),
    }
}

/// Where the last repair has put a database that was set aside.
fn last_set_aside(data_dir: &Path) -> Option<PathBuf> {
    (1..).map(|n: u64| data_dir.join(format!("{SET_ASIDE}-{n}"))).take_while(|path| path.exists()).last()
}

/// Moves sled's files and the guard out of the way, in one step that is durable.
fn set_aside(data_dir: &Path) -> Result<PathBuf, DatabaseError> {
    let kept = free_name(data_dir, SET_ASIDE);
    let moved = || {
        std::fs::create_dir_all(&kept)?;
        // The guard goes first: a database without its guard is a mismatch and does not vote.
        for name in [Guard::FILE_NAME, DATABASE_DIR] {
            match std::fs::rename(data_dir.join(name), kept.join(name)) {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
                _ => {}
            }
        }
        Ok(())
    };
    moved().map_err(DatabaseError::io("setting the database aside"))?;
    super::open::was_moved_to(&kept);
    sync_directory(&kept)?;
    sync_directory(data_dir)?;
    debug_assert!(!is_there(data_dir), "nothing is left behind");
    Ok(kept)
}

/// Makes the derived rows what the others say.
fn rebuild(database: &mut Database) -> Result<(), DatabaseError> {
    let reader = database.reader();
    let mut rows = Vec::new();
    for row in reader.tree(TreeId::Addresses).iter() {
        let (key, _) = row?;
        let place = key.get(crate::types::Address::PAYLOAD_LEN..).and_then(super::schema::parse_outpoint_key);
        let utxo = match place {
            Some(outpoint) => reader.utxo(&outpoint)?.filter(|utxo| utxo.state.is_live()),
            None => None,
        };
        let right = utxo.is_some_and(|utxo| key.starts_with(utxo.output.address.payload()));
        if !right {
            rows.push(RowChange { tree: TreeId::Addresses, key: key.to_vec(), value: None });
        }
        write_full(database, &mut rows, ROWS_AT_ONCE)?;
    }
    for row in output_rows(reader.tree(TreeId::Utxos)) {
        let (first, row) = row?;
        for (outpoint, stored) in row.each(first) {
            let StoredOutput::Live(output) = stored else { continue };
            let key = address_key(&output.address, &outpoint);
            if reader.tree(TreeId::Addresses).get(key)?.is_none() {
                rows.push(RowChange { tree: TreeId::Addresses, key: key.to_vec(), value: Some(Vec::new()) });
            }
        }
        write_full(database, &mut rows, ROWS_AT_ONCE)?;
    }
    sweep_subscriptions(&reader, &mut rows)?;
    if reader.network().public_key.is_none() {
        // An observer has no votes to fence.
        rows.push(RowChange { tree: TreeId::Meta, key: meta::FENCE.to_vec(), value: None });
    }
    write_full(database, &mut rows, 1)
}

/// Subscriptions that cannot be read, or stand under another name: their wallets subscribe
/// anew.
fn sweep_subscriptions(reader: &Reader, rows: &mut Vec<RowChange>) -> Result<(), DatabaseError> {
    let tree = reader.tree(TreeId::Subscriptions);
    for row in tree.iter() {
        let (key, _) = row?;
        let base = key.len().checked_sub(2).map_or(&key[..], |end| &key[..end]);
        let stored = get_record::<Subscription>(tree, TreeId::Subscriptions, base).ok().flatten();
        let right = stored.is_some_and(|stored| SubscriptionKey::of(&stored.subscriber_id).as_bytes() == base);
        if !right {
            rows.push(RowChange { tree: TreeId::Subscriptions, key: key.to_vec(), value: None });
        }
    }
    Ok(())
}

/// Commits rows once there are so many.
fn write_full(database: &mut Database, rows: &mut Vec<RowChange>, at: usize) -> Result<(), DatabaseError> {
    if rows.len() < at {
        return Ok(());
    }
    let batch = CommitBatch { maintenance: Maintenance::of(std::mem::take(rows)), ..CommitBatch::default() };
    database.commit(batch, ()).map(super::Durable::into_inner)
}

#[cfg(test)]
mod tests {
    use super::super::verify::Finding;
    use super::*;

    #[test]
    fn the_worst_counts_however_many_stand_before_it() {
        let finding = |damage| Finding { damage, place: "there".into(), what: "it is wrong".into() };
        let mut report = Report { checks: vec![Check::of("votes", (0..500).map(|_| finding(Damage::Votes)))] };
        assert!(Plan::of(report.clone()).has(Remedy::Fence));
        report.checks[0].add(finding(Damage::Ledger));
        assert_eq!(report.worst(), Some(Damage::Ledger));
        assert!(report.findings().count() < 500, "the rest is only counted");
        assert!(Plan::of(report).has(Remedy::Resync));
    }
}
