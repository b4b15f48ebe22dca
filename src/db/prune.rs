//! Forgetting what confirmed blocks have made unnecessary: the certificates of what is in the
//! chain, and the change log behind them.
//!
//! Bodies and blocks stay, for late nodes sync from them, and so does the height of each
//! transaction: it is said to be `Confirmed` for ever, with its block as the proof. What has
//! spent an output is said for ever, too: it costs 32 bytes in a row that stays anyhow, and to
//! forget it a row. What is to go never changes any more, so it is looked up beside the writer, a little at a time,
//! and the writer only removes rows. Nothing holds it back: a wallet that comes for what
//! is gone is given a snapshot.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::DatabaseError;
use super::codec::{RowChange, decode, encode, record_parts, remove_record};
use super::finals::{proofs_at, proofs_of};
use super::schema::{TreeId, meta};
use super::store::{Reader, sequence_of};
use crate::consensus::LogEntry;
use crate::types::{Height, Txid};

/// Rows of the log that are looked through for the next block that is done.
const MAX_LOG_ROWS_AHEAD: usize = 65_536;

/// How far the past has been forgotten.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pruned {
    /// Blocks up to this height: what proved their transactions before is gone.
    pub height: Height,
    /// Transactions of the next block that are done too.
    pub entries: u64,
    /// Entries of the change log up to this number are gone.
    pub sequence: u64,
}

/// Rows to remove, and how far that is.
#[derive(Debug)]
pub struct PruneBatch {
    rows: Vec<RowChange>,
    pruned: Pruned,
    /// Whose proofs are among them.
    unproved: Vec<Txid>,
}

impl PruneBatch {
    pub(super) fn unproved(&self) -> &[Txid] {
        &self.unproved
    }

    pub(super) fn rows(&self) -> Result<Vec<RowChange>, DatabaseError> {
        let value = Some(encode(TreeId::Meta, &self.pruned)?);
        let mut rows = self.rows.clone();
        rows.push(RowChange { tree: TreeId::Meta, key: meta::PRUNED.to_vec(), value });
        Ok(rows)
    }

    /// How far it goes.
    pub const fn pruned(&self) -> Pruned {
        self.pruned
    }
}

impl Reader {
    /// How far the past has been forgotten.
    pub fn pruned(&self) -> Result<Pruned, DatabaseError> {
        let row = self.tree(TreeId::Meta).get(meta::PRUNED)?;
        Ok(row.map(|row| decode(TreeId::Meta, &row)).transpose()?.unwrap_or_default())
    }

    /// The next rows to forget, about `most` of them, if blocks up to `keep_above` are not
    /// to be kept any more. `None` if there are none. To be committed before it is asked again.
    pub fn prunable(&self, keep_above: Height, most: usize) -> Result<Option<PruneBatch>, DatabaseError> {
        let before = self.pruned()?;
        if keep_above == 0 {
            return Ok(None);
        }
        let (mut pruned, mut rows, mut proofs, mut passed) = (before, Vec::new(), BTreeSet::new(), 0);
        while pruned.height < keep_above && passed < most {
            let Some(decided) = self.block(pruned.height.saturating_add(1))? else { break };
            let done = usize::try_from(pruned.entries).unwrap_or(usize::MAX);
            for txid in decided.block.transactions.iter().skip(done) {
                if passed >= most {
                    break;
                }
                if let Some(stored) = self.stored_settled(txid)? {
                    proofs.extend(proofs_of(&self.shared.trees, stored.number)?);
                }
                passed += 1;
                pruned.entries += 1;
            }
            if pruned.entries >= decided.block.transactions.len() as u64 {
                (pruned.height, pruned.entries) = (pruned.height + 1, 0);
                passed += 1;
            }
        }
        let mut unproved = Vec::new();
        for first in proofs {
            unproved.extend(self.forget_proofs(&mut rows, first, keep_above)?);
        }
        self.prunable_log(&mut rows, &mut pruned, most)?;
        Ok((pruned != before).then_some(PruneBatch { rows, pruned, unproved }))
    }

    /// A record of proofs, if blocks that are not kept prove all that it proves; gives what.
    fn forget_proofs(
        &self,
        rows: &mut Vec<RowChange>,
        first: u64,
        keep_above: Height,
    ) -> Result<Vec<Txid>, DatabaseError> {
        let proofs = proofs_at(&self.shared.trees, first)?;
        for proof in &proofs {
            if self.confirmed(&proof.txid)?.is_none_or(|height| height > keep_above) {
                return Ok(Vec::new());
            }
        }
        let key = first.to_be_bytes();
        let parts = record_parts(self.tree(TreeId::Proofs), TreeId::Proofs, &key)?;
        remove_record(rows, TreeId::Proofs, &key, parts);
        Ok(proofs.into_iter().map(|proof| proof.txid).collect())
    }

    /// The log's rows before and with the last block whose outputs are done: whatever
    /// stands before it is done as well. What the log names as final and in no block is
    /// still needed.
    fn prunable_log(&self, rows: &mut Vec<RowChange>, pruned: &mut Pruned, most: usize) -> Result<(), DatabaseError> {
        let keep_from = self.unconfirmed_from()?.min(self.durable_head().sequence.saturating_add(1));
        let (mut passed, mut done) = (Vec::new(), 0);
        for row in self.tree(TreeId::Changes).iter().take(MAX_LOG_ROWS_AHEAD) {
            let (key, value) = row?;
            let entries: Vec<LogEntry> = decode(TreeId::Changes, &value)?;
            let last = (sequence_of(&key)? + entries.len() as u64).saturating_sub(1);
            let heights = entries.iter().filter_map(|entry| match entry {
                LogEntry::Block { height, .. } => Some(*height),
                LogEntry::Transition(_) => None,
            });
            let newest = heights.max();
            if last >= keep_from || newest.is_some_and(|height| height > pruned.height) || done >= most {
                break;
            }
            passed.push((key, last));
            if newest.is_some() {
                done = passed.len();
            }
        }
        for (key, last) in passed.into_iter().take(done.min(most)) {
            rows.push(RowChange { tree: TreeId::Changes, key: key.to_vec(), value: None });
            pruned.sequence = last;
        }
        Ok(())
    }
}
