//! The atomic, durable commit, and the only maker of [`Durable`].

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, HashMap};

use super::DatabaseError;
use super::codec::{RowChange, encode, put_lists, put_record, record_parts, remove_record};
use super::confirmed::{Confirming, StoredConfirmed};
use super::finals::put_finals;
use super::guard::Stamp;
use super::outputs::{OutputRow, StoredOutput, row_of};
use super::prune::PruneBatch;
use super::schema::{
    StoredNetwork, StoredSettled, StoredTip, Subscription, SubscriptionKey, TreeId, address_key, agreement_key, meta,
    outpoint_key,
};
use super::store::{Database, DurableHead};
use crate::consensus::{Changes, LogEntry, Suspension};
use crate::types::{OutPoint, Txid, UTXOState, UnixSeconds};

/// Something that may leave the node: the commit that records it is on the platter.
///
/// Made by [`Database::commit`] for what a commit decided, by `Reader::read` for what was
/// read, which waits for the commit that wrote it, and by `Reader::snapshot` and its like for
/// what was so at a durable commit. There is no other way to make one, so code that sends only
/// `Durable` values cannot send too early.
#[derive(Debug, Clone)]
#[must_use = "what is durable was made so in order to be sent"]
pub struct Durable<T>(T);

impl<T> Durable<T> {
    pub(super) const fn new(value: T) -> Self {
        Self(value)
    }

    /// The value, on its way out.
    pub fn into_inner(self) -> T {
        self.0
    }

    /// The value made into another one.
    pub fn map<U>(self, f: impl FnOnce(T) -> U) -> Durable<U> {
        Durable(f(self.0))
    }

    /// The value taken apart; both parts are as durable as the whole.
    pub fn split<A, B>(self, f: impl FnOnce(T) -> (A, B)) -> (Durable<A>, Durable<B>) {
        let (a, b) = f(self.0);
        (Durable(a), Durable(b))
    }
}

impl<T, E> Durable<Result<T, E>> {
    /// The value, if it is one.
    pub fn transpose(self) -> Result<Durable<T>, E> {
        self.0.map(Durable)
    }
}

impl<T> Durable<Vec<T>> {
    /// Each of the values.
    pub fn each(self) -> impl Iterator<Item = Durable<T>> {
        self.0.into_iter().map(Durable)
    }
}

/// Rows that a repair writes beside the core's changes.
#[derive(Debug, Default)]
pub struct Maintenance(Vec<RowChange>);

impl Maintenance {
    pub(super) const fn of(rows: Vec<RowChange>) -> Self {
        Self(rows)
    }
}

/// All that one commit writes.
#[derive(Debug, Default)]
pub struct CommitBatch {
    /// What the core decided.
    pub changes: Changes,
    /// Subscriptions made or replaced (`Some`) and cancelled (`None`).
    pub subscriptions: BTreeMap<SubscriptionKey, Option<Subscription>>,
    /// This member must not vote any more.
    pub suspension: Option<Suspension>,
    /// The fence takes the place of a suspension.
    pub lift_suspension: bool,
    /// What confirmed blocks have made unnecessary.
    pub prune: Option<PruneBatch>,
    /// Whose database it is, with a new name for the change log.
    pub network: Option<StoredNetwork>,
    /// What a repair writes.
    pub maintenance: Maintenance,
}

impl CommitBatch {
    /// Whether there is nothing to write.
    pub fn is_empty(&self) -> bool {
        let subscriptions = self.subscriptions.is_empty();
        let rest = self.suspension.is_none() && self.prune.is_none() && self.network.is_none();
        self.changes.is_empty() && subscriptions && rest && self.maintenance.0.is_empty() && !self.lift_suspension
    }
}

/// Where the log says that something became final which no block contains yet.
#[derive(Debug, Default)]
pub(super) struct UnconfirmedRows {
    by_sequence: BTreeMap<u64, Txid>,
    by_txid: HashMap<Txid, u64>,
}

impl UnconfirmedRows {
    pub(super) fn add(&mut self, sequence: u64, txid: Txid) {
        if let std::collections::hash_map::Entry::Vacant(place) = self.by_txid.entry(txid) {
            place.insert(sequence);
            self.by_sequence.insert(sequence, txid);
        }
    }

    /// Takes in a commit whose first log entry has this number.
    fn follow(&mut self, changes: &Changes, first: u64) {
        for (sequence, entry) in (first..).zip(&changes.log) {
            if let Some(txid) = finalized_by(entry) {
                self.add(sequence, txid);
            }
        }
        for txid in changes.confirmed.keys() {
            if let Some(sequence) = self.by_txid.remove(txid) {
                self.by_sequence.remove(&sequence);
            }
        }
    }

    /// The first of them.
    fn first(&self) -> Option<u64> {
        self.by_sequence.keys().next().copied()
    }

    /// All, in the order in which they became final.
    pub(super) fn txids(&self) -> Vec<Txid> {
        self.by_sequence.values().copied().collect()
    }
}

/// The transaction that an entry of the log says to be in the chain, and since when.
fn confirmed_by(entry: &LogEntry) -> Option<(Txid, UnixSeconds)> {
    match entry {
        LogEntry::Transition(step) => match step.new_state {
            UTXOState::Confirmed { txid, confirmed_at, .. } => Some((txid, confirmed_at)),
            _ => None,
        },
        LogEntry::Block { .. } => None,
    }
}

/// The transaction that an entry of the log says to be final.
pub(super) fn finalized_by(entry: &LogEntry) -> Option<Txid> {
    match entry {
        LogEntry::Transition(step) => match step.new_state {
            UTXOState::SpentFinalized { txid, .. } => Some(txid),
            _ => None,
        },
        LogEntry::Block { .. } => None,
    }
}

/// Rows of `utxos` as they will be, by the first output of each.
type OutputRows = BTreeMap<OutPoint, OutputRow>;

impl Database {
    /// Writes a batch atomically and makes it durable; then, and only then, `outgoing`
    /// may leave. An error leaves the database unusable: stop the node and recover.
    pub fn commit<T>(&mut self, batch: CommitBatch, outgoing: T) -> Result<Durable<T>, DatabaseError> {
        if batch.is_empty() {
            return Ok(Durable::new(outgoing));
        }
        let next_commit = self.head.commit + 1;
        let (outputs, mut rows) = self.output_rows(&batch.changes)?;
        self.other_rows(&mut rows, &batch, next_commit)?;
        let kept = self.kept.after(&self.shared.trees, &rows)?;
        let value = Some(encode(TreeId::Meta, &kept)?);
        rows.push(RowChange { tree: TreeId::Meta, key: meta::KEPT.to_vec(), value });
        let sequence = self.head.sequence + batch.changes.log.len() as u64;
        let head = self.head.next(&rows_digest(&rows), sequence);
        rows.push(RowChange {
            tree: TreeId::Meta,
            key: meta::HEAD.to_vec(),
            value: Some(encode(TreeId::Meta, &head)?),
        });
        self.shared.about_to_apply(next_commit, &batch.changes);
        self.engine.apply(&rows)?;
        self.shared.applied(next_commit, &batch.changes);
        self.recent.follow(&batch.changes, outputs, &rows, self.next_body);
        let unproved = batch.prune.as_ref().map_or(&[][..], PruneBatch::unproved);
        self.shared.finals.follow(&batch.changes.finalized, unproved);
        self.engine.sync()?;
        self.engine.write_guard(Stamp { commit: head.commit, digest: head.digest })?;
        (self.head, self.kept) = (head, kept);
        self.next_body += batch.changes.finalized.len() as u64;
        let height = batch.changes.tip.as_ref().map_or(self.shared.durable_height(), |tip| tip.height);
        self.shared.now_durable(DurableHead { commit: head.commit, sequence: head.sequence, height }, &batch.changes);
        Ok(Durable::new(outgoing))
    }

    /// All but the rows of outputs.
    fn other_rows(&mut self, rows: &mut Vec<RowChange>, batch: &CommitBatch, commit: u64) -> Result<(), DatabaseError> {
        let changes = &batch.changes;
        self.flight_rows.write(rows, changes, commit)?;
        put_finals(rows, self.next_body, changes.finalized.values())?;
        self.chain_rows(rows, changes)?;
        log_rows(rows, changes, self.head.sequence + 1)?;
        for (key, subscription) in &batch.subscriptions {
            let key = key.as_bytes();
            let old = record_parts(self.shared.trees.get(TreeId::Subscriptions), TreeId::Subscriptions, key)?;
            remove_record(rows, TreeId::Subscriptions, key, old);
            if let Some(subscription) = subscription {
                put_record(rows, TreeId::Subscriptions, key, subscription)?;
            }
        }
        if let Some(reason) = batch.suspension {
            let value = Some(reason.to_string().into_bytes());
            rows.push(RowChange { tree: TreeId::Meta, key: meta::SUSPENSION.to_vec(), value });
        }
        if batch.lift_suspension {
            rows.push(RowChange { tree: TreeId::Meta, key: meta::SUSPENSION.to_vec(), value: None });
        }
        fence_rows(rows, changes)?;
        if let Some(network) = &batch.network {
            let value = Some(encode(TreeId::Meta, network)?);
            rows.push(RowChange { tree: TreeId::Meta, key: meta::NETWORK.to_vec(), value });
        }
        if let Some(prune) = &batch.prune {
            rows.extend(prune.rows()?);
        }
        rows.extend_from_slice(&batch.maintenance.0);
        Ok(())
    }

    /// The rows of outputs that come into being or are spent, with the transactions that are
    /// settled, and the index by address, which has a row for each live output. What can be
    /// derived is not written: that an output is locked (see `flight`), and that its spender is in
    /// the chain (see `confirmed`).
    fn output_rows(&self, changes: &Changes) -> Result<(OutputRows, Vec<RowChange>), DatabaseError> {
        let (reader, before) = (self.reader(), states_before(changes));
        let (mut outputs, mut rows) = (OutputRows::new(), Vec::with_capacity(8 + 2 * changes.log.len()));
        for (outpoint, utxo) in &changes.utxos {
            let (before, is_live) = (before.get(outpoint).copied().flatten(), utxo.state.is_live());
            let was_live = before.is_some_and(|state| state.is_live());
            if was_live != is_live {
                let key = address_key(&utxo.output.address, outpoint).to_vec();
                rows.push(RowChange { tree: TreeId::Addresses, key, value: is_live.then(Vec::new) });
            }
            if before.is_some() && was_live == is_live {
                continue;
            }
            let first = row_of(outpoint);
            let row = match outputs.entry(first) {
                Entry::Occupied(row) => row.into_mut(),
                // Those of one transaction come into being together.
                Entry::Vacant(place) if before.is_none() => place.insert(OutputRow::default()),
                Entry::Vacant(place) => {
                    let missing = || DatabaseError::corrupt("utxos", format!("the row of {outpoint} is missing"));
                    place.insert(self.recent.row(&reader, &first)?.ok_or_else(missing)?)
                }
            };
            row.set(outpoint, StoredOutput::of(utxo));
        }
        for ((txid, finalized), number) in changes.finalized.iter().zip(self.next_body..) {
            let row = outputs.entry(OutPoint { txid: *txid, vout: 0 }).or_default();
            row.settled = Some(StoredSettled { settled: finalized.settled, number });
        }
        outputs.iter().try_for_each(|(first, row)| row.put(&mut rows, first))?;
        Ok((outputs, rows))
    }

    /// Blocks, what they did to transactions, the tip, and the agreement's log.
    fn chain_rows(&mut self, rows: &mut Vec<RowChange>, changes: &Changes) -> Result<(), DatabaseError> {
        self.unconfirmed.follow(changes, self.head.sequence + 1);
        let confirmed_at: BTreeMap<Txid, UnixSeconds> = changes.log.iter().filter_map(confirmed_by).collect();
        let settled_now: BTreeMap<&Txid, u64> = changes.finalized.keys().zip(self.next_body..).collect();
        let mut confirming = Confirming::default();
        let reader = self.reader();
        for (txid, height) in &changes.confirmed {
            let number = match settled_now.get(txid) {
                Some(number) => Some(*number),
                None => self.recent.settled(&reader, txid)?.map(|stored| stored.number),
            };
            let unsettled = || DatabaseError::corrupt("transactions", format!("{txid} of a block is not settled"));
            let confirmed_at = confirmed_at.get(txid).copied().unwrap_or_default();
            confirming.add(number.ok_or_else(unsettled)?, StoredConfirmed { height: *height, confirmed_at });
        }
        confirming.put(rows)?;
        for (txid, dead) in &changes.dead {
            let value = Some(encode(TreeId::Dead, dead)?);
            rows.push(RowChange { tree: TreeId::Dead, key: txid.as_bytes().to_vec(), value });
        }
        for (_, decided) in &changes.blocks {
            let key = decided.block.height.to_be_bytes();
            put_record(rows, TreeId::Blocks, &key, decided.as_ref())?;
        }
        if let Some(tip) = &changes.tip {
            let next = self.head.sequence + 1 + changes.log.len() as u64;
            let stored = StoredTip::new(tip, self.unconfirmed.first().unwrap_or(next));
            let value = Some(encode(TreeId::Meta, &stored)?);
            rows.push(RowChange { tree: TreeId::Meta, key: meta::CHAIN.to_vec(), value });
            for (key, parts) in std::mem::take(&mut self.agreement_rows) {
                remove_record(rows, TreeId::Agreement, &key, parts);
            }
        }
        let height = changes.tip.as_ref().map_or(self.shared.durable_height(), |tip| tip.height);
        for (_, record) in changes.agreement.iter().filter(|(at, _)| *at == height + 1) {
            let index = u32::try_from(self.agreement_rows.len()).unwrap_or(u32::MAX);
            let key = agreement_key(height + 1, index);
            let before = rows.len();
            put_record(rows, TreeId::Agreement, &key, record)?;
            self.agreement_rows.push((key, u16::try_from(rows.len() - before).unwrap_or(u16::MAX)));
        }
        Ok(())
    }
}

/// Outpoints that this member must not vote on, and how far the fence has come.
fn fence_rows(rows: &mut Vec<RowChange>, changes: &Changes) -> Result<(), DatabaseError> {
    rows.extend(changes.fence.iter().map(|(outpoint, fenced)| RowChange {
        tree: TreeId::Fence,
        key: outpoint_key(outpoint).to_vec(),
        value: fenced.then(Vec::new),
    }));
    if let Some(state) = &changes.fence_state {
        // One that has worn off is remembered: lost votes may come back at any time.
        let value = Some(encode(TreeId::Meta, state)?);
        rows.push(RowChange { tree: TreeId::Meta, key: meta::FENCE.to_vec(), value });
    }
    Ok(())
}

/// Where each output stood before the commit, by its log; none where it came into being.
fn states_before(changes: &Changes) -> BTreeMap<OutPoint, Option<UTXOState>> {
    let mut before = BTreeMap::new();
    for entry in &changes.log {
        if let LogEntry::Transition(step) = entry {
            before.entry(step.outpoint).or_insert(step.old_state);
        }
    }
    before
}

/// The batch's log entries; the first of them has this number.
pub(super) fn log_rows(rows: &mut Vec<RowChange>, changes: &Changes, first: u64) -> Result<(), DatabaseError> {
    put_lists(rows, TreeId::Changes, first, changes.log.iter())
}

fn rows_digest(rows: &[RowChange]) -> [u8; 32] {
    let mut hasher = blake3::Hasher::new();
    for row in rows {
        hasher.update(&[row.tree as u8, u8::from(row.value.is_some())]);
        hasher.update(&(row.key.len() as u64).to_le_bytes());
        hasher.update(&row.key);
        let value = row.value.as_deref().unwrap_or_default();
        hasher.update(&(value.len() as u64).to_le_bytes());
        hasher.update(value);
    }
    *hasher.finalize().as_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::db::codec::decode;
    use crate::limits::MAX_ROW_BYTES;
    use crate::types::BlockHash;

    #[test]
    fn the_log_is_written_in_full_rows_without_a_gap() {
        let block =
            |height: u64| LogEntry::Block { height, block_hash: BlockHash::from_bytes([5; 32]), timestamp_ms: height };
        for entries in [0, 1, 137, 138, 139, 1_000] {
            let changes = Changes { log: (1..=entries).map(block).collect(), ..Changes::default() };
            let mut rows = Vec::new();
            log_rows(&mut rows, &changes, 10).unwrap();
            let (mut next, mut read) = (10_u64, Vec::new());
            for row in &rows {
                assert_eq!((row.tree, row.key.as_slice()), (TreeId::Changes, next.to_be_bytes().as_slice()));
                let value = row.value.as_ref().unwrap();
                assert!(value.len() <= MAX_ROW_BYTES);
                let entries: Vec<LogEntry> = decode(TreeId::Changes, value).unwrap();
                next += entries.len() as u64;
                read.extend(entries);
            }
            assert_eq!(read, changes.log);
            let all = bincode::serialized_size(&changes.log).unwrap();
            assert!(rows.len() as u64 <= all.div_ceil(MAX_ROW_BYTES as u64 - 100), "rows are full");
        }
    }
}
