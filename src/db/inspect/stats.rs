//! Counts, sums and sizes of a whole database.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use super::super::DatabaseError;
use super::super::guard::Agreement;
use super::super::open;
use super::super::outputs::{OutputRow, parse_row_key, utxo_of};
use super::super::prune::Pruned;
use super::super::schema::{SCHEMA_VERSION, StoredTip, TreeId, meta};
use super::super::store::Reader;
use super::Trees;
use crate::consensus::FenceState;
use crate::types::{BlockHash, GenesisHash, Height, Network, PublicKey, StateDigest};

/// How often somebody who watches is told.
const TELL_EVERY: u64 = 4_096;
/// Entries of the log that are looked through at once for what is final.
const LOG_ENTRIES_AT_ONCE: usize = 4_096;

/// Everything about a database in numbers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Stats {
    /// Its schema.
    pub schema: Option<u32>,
    /// The schema that this program writes.
    pub newest_schema: u32,
    /// Which network.
    pub network: Option<Network>,
    /// Which one exactly.
    pub genesis_hash: Option<GenesisHash>,
    /// The member; `None` for an observer.
    pub public_key: Option<PublicKey>,
    /// The name of its change log.
    pub log_id: Option<String>,
    /// The number of the last commit.
    pub commit: u64,
    /// The last sequence of the change log.
    pub sequence: u64,
    /// The height of its chain.
    pub height: Height,
    /// The hash of its last block.
    pub block_hash: Option<BlockHash>,
    /// That block's timestamp.
    pub block_timestamp_ms: Option<u64>,
    /// The digest of the chain's outputs after it.
    pub state_digest: Option<StateDigest>,
    /// The guard beside it.
    pub guard: GuardStats,
    /// Why this member must not vote, if so.
    pub suspension: Option<String>,
    /// The fence behind which it votes, if votes were lost.
    pub fence: Option<FenceStats>,
    /// How far the past has been forgotten.
    pub pruned: Pruned,
    /// Outputs by state.
    pub outputs: BTreeMap<String, StateStats>,
    /// Money.
    pub supply: Option<SupplyStats>,
    /// Sizes by tree.
    pub trees: Vec<TreeStats>,
    /// Bytes of sled's files.
    pub bytes_on_disk: u64,
    /// Rows that could not be read.
    pub unreadable: u64,
}

/// The guard, and how it stands to the database.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct GuardStats {
    /// The last commit that it has seen.
    pub commit: Option<u64>,
    /// `equal`; `one_ahead`, an ordinary crash that the next start settles; `mismatch`.
    pub fits: &'static str,
}

/// A fence.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct FenceStats {
    /// Whether the other members have said all that is to be behind it.
    pub standing: bool,
    /// Outputs behind it.
    pub fenced: u64,
    /// The first height at which the member takes part in agreeing on a block again.
    pub agrees_from: Option<Height>,
}

/// The outputs in one state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct StateStats {
    /// How many.
    pub count: u64,
    /// Their sum in base units, where they are still somebody's money.
    pub amount: Option<u64>,
}

/// Money in base units: what there is has to be what was allocated.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct SupplyStats {
    /// Unspent and locked outputs.
    pub live: u64,
    /// Fees of what is final and in no block yet.
    pub unpaid_fees: u64,
    /// What the genesis allocated.
    pub allocated: u64,
    /// Whether it adds up.
    pub conserved: bool,
}

/// A tree.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TreeStats {
    /// Its name.
    pub name: &'static str,
    /// Its rows; a long record has several.
    pub rows: u64,
    /// Bytes of keys and values.
    pub bytes: u64,
}

impl Stats {
    /// What is not as it should be.
    pub fn findings(&self) -> Vec<String> {
        let mut findings = Vec::new();
        match (&self.network, self.guard.commit) {
            (None, None) => {
                findings.push("the database was never filled to the end: start the node, and it begins again".into());
            }
            (None, Some(_)) => findings.push("nothing is left of the database".into()),
            (Some(_), _) => {}
        }
        if self.guard.fits == "mismatch" {
            findings.push(format!(
                "the database does not fit its guard: its last commit is {}, the guard has seen {}",
                self.commit,
                self.guard.commit.unwrap_or(0)
            ));
        }
        if let Some(reason) = &self.suspension {
            findings.push(format!("this member does not vote: {reason}"));
        }
        if let Some(supply) = self.supply.as_ref().filter(|supply| !supply.conserved) {
            findings.push(format!(
                "outputs of {} and unpaid fees of {} are not the {} that were allocated",
                supply.live, supply.unpaid_fees, supply.allocated
            ));
        }
        if self.unreadable > 0 {
            findings.push(format!("{} rows cannot be read", self.unreadable));
        }
        findings
    }
}

impl Trees {
    /// Reads through every tree; `progress` is told how many rows of which tree are done.
    pub fn stats(&self, progress: &dyn Fn(&'static str, u64)) -> Result<Stats, DatabaseError> {
        let condition = self.condition()?;
        let tip = self.meta::<StoredTip>(meta::CHAIN)?.map(|stored| stored.tip()).transpose()?;
        let suspension = self.trees.get(TreeId::Meta).get(meta::SUSPENSION)?;
        let (mut outputs, mut unreadable, mut trees) = (BTreeMap::new(), 0, Vec::new());
        // Of an older schema it is told how much there is, and not what it says.
        let older = condition.schema.is_some_and(|schema| schema < SCHEMA_VERSION);
        let reader = if older { None } else { self.reader()? };
        for id in if older { &TreeId::ALL } else { TreeId::OF_THIS_SCHEMA }.iter().copied() {
            let mut size = TreeStats { name: id.name(), rows: 0, bytes: 0 };
            for row in self.trees.get(id).iter() {
                let (key, value) = row?;
                size.rows += 1;
                size.bytes += (key.len() + value.len()) as u64;
                if id == TreeId::Utxos && !older {
                    unreadable += self.count_outputs(&mut outputs, reader.as_ref(), &key, &value)?;
                }
                if size.rows.is_multiple_of(TELL_EVERY) {
                    progress(id.name(), size.rows);
                }
            }
            trees.push(size);
        }
        let fenced = trees.iter().find(|tree| tree.name == TreeId::Fence.name()).map_or(0, |tree| tree.rows);
        let fence = self.meta::<FenceState>(meta::FENCE)?.filter(|state| *state != FenceState::Down);
        let fence = fence.map(|state| FenceStats {
            standing: state != FenceState::Asking,
            fenced,
            agrees_from: state.agrees_from(),
        });
        let supply = match (&reader, &tip) {
            (Some(reader), Some(tip)) => {
                let live = outputs.values().filter_map(|stats: &StateStats| stats.amount);
                let live = live.fold(0, u64::saturating_add);
                let allocated = tip.supply.units();
                match unpaid_fees(reader) {
                    Ok(unpaid_fees) => {
                        let conserved = live.saturating_add(unpaid_fees) == allocated;
                        Some(SupplyStats { live, unpaid_fees, allocated, conserved })
                    }
                    // A row that was counted already, or one that nothing else here decodes.
                    Err(error) if error.is_damage() => {
                        unreadable = unreadable.max(1);
                        None
                    }
                    Err(error) => return Err(error),
                }
            }
            _ => None,
        };
        let network = condition.network.as_ref();
        Ok(Stats {
            schema: condition.schema,
            newest_schema: SCHEMA_VERSION,
            network: network.map(|network| network.network),
            genesis_hash: network.map(|network| network.genesis_hash),
            public_key: network.and_then(|network| network.public_key),
            log_id: network.map(|network| hex::encode(network.log_id)),
            commit: condition.commit,
            sequence: condition.sequence,
            height: condition.height,
            block_hash: tip.as_ref().filter(|tip| tip.height > 0).map(|tip| tip.hash),
            block_timestamp_ms: tip.as_ref().filter(|tip| tip.height > 0).map(|tip| tip.timestamp_ms),
            state_digest: tip.as_ref().map(|tip| tip.digest.digest()),
            guard: GuardStats { commit: condition.guarded, fits: fits(condition.agreement) },
            suspension: suspension.map(|text| String::from_utf8_lossy(&text).into_owned()),
            fence,
            pruned: self.meta::<Pruned>(meta::PRUNED)?.unwrap_or_default(),
            outputs,
            supply,
            trees,
            bytes_on_disk: open::size_on_disk(&self.data_dir),
            unreadable,
        })
    }
}

impl Trees {
    /// Counts the outputs of a row in the states that it and what else is known of them say;
    /// gives how many cannot be read.
    fn count_outputs(
        &self,
        outputs: &mut BTreeMap<String, StateStats>,
        reader: Option<&Reader>,
        key: &[u8],
        row: &[u8],
    ) -> Result<u64, DatabaseError> {
        let (Ok(first), Ok(row)) = (parse_row_key(key), OutputRow::decode(row)) else { return Ok(1) };
        let mut unreadable = 0;
        for (outpoint, stored) in row.each(first) {
            let lock = reader.and_then(|reader| reader.lock(&outpoint));
            let utxo = match utxo_of(&self.trees, &stored, lock) {
                Ok(Some(utxo)) => utxo,
                Ok(None) => continue,
                Err(error) if error.is_damage() => {
                    unreadable += 1;
                    continue;
                }
                Err(error) => return Err(error),
            };
            let stats = outputs.entry(utxo.state.name().to_owned()).or_default();
            stats.count += 1;
            if utxo.state.is_live() {
                stats.amount = Some(stats.amount.unwrap_or(0).saturating_add(utxo.output.amount.units()));
            }
        }
        Ok(unreadable)
    }
}

const fn fits(agreement: Agreement) -> &'static str {
    match agreement {
        Agreement::Equal => "equal",
        Agreement::OneAhead => "one_ahead",
        Agreement::Mismatch => "mismatch",
    }
}

/// Fees of what is final and in no block yet belong to nobody until a block pays them.
fn unpaid_fees(reader: &Reader) -> Result<u64, DatabaseError> {
    let end = reader.durable_head().sequence;
    let (mut fees, mut seen) = (0_u64, BTreeSet::new());
    let mut after = reader.unconfirmed_from()?.saturating_sub(1);
    while after < end {
        let (txids, last) = reader.unconfirmed(after, end, LOG_ENTRIES_AT_ONCE)?;
        if last == after {
            break;
        }
        after = last;
        for txid in txids.into_iter().filter(|txid| seen.insert(*txid)) {
            let fee = reader.settled(&txid)?.map_or(0, |settled| settled.fee.units());
            fees = fees.saturating_add(fee);
        }
    }
    Ok(fees)
}
