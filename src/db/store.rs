//! The open database and its readers.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, RwLock, RwLockReadGuard};
use std::time::Duration;

use tokio::sync::watch;

use super::DatabaseError;
use super::codec::{decode, get_record, records};
use super::commit::{Durable, UnconfirmedRows, finalized_by};
use super::confirmed::{self, StoredConfirmed};
use super::engine::{Engine, Tree, Watch};
use super::finals;
use super::flight::{FlightRows, FlightTable};
use super::kept::Kept;
use super::outputs::{get_output, output_rows, utxo_of};
use super::recent::{Recent, RecentOutputs};
use super::recover::MAX_NUMBER;
use super::renew::Renewal;
use super::schema::{
    Head, StoredFinal, StoredNetwork, StoredSettled, StoredTip, Subscription, SubscriptionKey, TreeId, meta,
    outpoint_key, parse_outpoint_key,
};
use crate::consensus::{Certificate, ChainTip, Changes, Dead, InFlight, LogEntry, Settled, Transition, Utxo, VoteKind};
use crate::types::{Address, Amount, DecidedBlock, Height, OutPoint, Transaction, Txid, UnixSeconds, UtxoEntry};

/// How often a snapshot is begun anew because the log was pruned under it.
const SNAPSHOT_TRIES: usize = 8;

/// The trees, in the order of [`TreeId`].
#[derive(Debug, Clone)]
pub(super) struct Trees(Vec<Tree>);

impl Trees {
    pub(super) fn new(of: impl FnMut(TreeId) -> Tree) -> Self {
        Self(TreeId::ALL.into_iter().map(of).collect())
    }

    pub(super) fn get(&self, id: TreeId) -> &Tree {
        &self.0[id as usize]
    }
}

/// How far the database is on the platter.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct DurableHead {
    /// The number of the last durable commit.
    pub commit: u64,
    /// The last durable sequence of the change log.
    pub sequence: u64,
    /// The height of the last durable block.
    pub height: Height,
}

/// What the writer and the readers share.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) trees: Trees,
    /// The commit that has been, or is just being, applied in memory.
    begun: AtomicU64,
    /// The last commit that is applied in memory as a whole.
    applied: Waited,
    /// Wakes those that follow it when the log has grown.
    durable: watch::Sender<DurableHead>,
    /// Wakes those that follow it when there is a block.
    durable_tip: watch::Sender<Height>,
    /// For threads that wait without a runtime.
    durable_commit: Waited,
    network: StoredNetwork,
    flights: RwLock<FlightTable>,
    pub(super) outputs: RecentOutputs,
    pub(super) finals: finals::RecentFinals,
}

impl Shared {
    pub(super) fn new(trees: Trees, network: StoredNetwork, head: &Head, height: Height, flights: FlightTable) -> Self {
        let durable = DurableHead { commit: head.commit, sequence: head.sequence, height };
        Self {
            trees,
            begun: AtomicU64::new(head.commit),
            applied: Waited::at(head.commit),
            durable: watch::Sender::new(durable),
            durable_tip: watch::Sender::new(height),
            durable_commit: Waited::at(head.commit),
            network,
            flights: RwLock::new(flights),
            outputs: RecentOutputs::new(),
            finals: finals::RecentFinals::default(),
        }
    }

    fn flights(&self) -> RwLockReadGuard<'_, FlightTable> {
        self.flights.read().unwrap_or_else(PoisonError::into_inner)
    }

    pub(super) const fn network(&self) -> &StoredNetwork {
        &self.network
    }

    /// A commit is about to be applied: what is read from now on may be of it.
    pub(super) fn about_to_apply(&self, commit: u64, changes: &Changes) {
        self.begun.store(commit, Ordering::SeqCst);
        self.flights.write().unwrap_or_else(PoisonError::into_inner).begin(changes);
    }

    pub(super) fn applied(&self, commit: u64, changes: &Changes) {
        self.flights.write().unwrap_or_else(PoisonError::into_inner).end(changes);
        self.applied.reach(commit);
    }

    pub(super) fn now_durable(&self, head: DurableHead, changes: &Changes) {
        // The head first: whoever is woken by the other, and answers, must not be contradicted
        // by an answer as of the head.
        self.outputs.follow(changes, || {
            self.durable.send_if_modified(|durable| std::mem::replace(durable, head).sequence != head.sequence);
        });
        self.durable_tip.send_if_modified(|tip| std::mem::replace(tip, head.height) != head.height);
        self.durable_commit.reach(head.commit);
    }

    pub(super) fn durable_height(&self) -> Height {
        self.durable.borrow().height
    }

    /// Nothing more will become durable: those that wait for it wait in vain.
    pub(super) fn end(&self) {
        self.applied.end();
        self.durable_commit.end();
    }

    /// Waits until everything that a read before this call can have seen is applied as a
    /// whole, and its entries are in the log.
    fn wait_applied(&self) -> Result<(), DatabaseError> {
        self.applied.wait(self.begun.load(Ordering::SeqCst))
    }

    /// Waits until everything that a read before this call can have seen is durable.
    fn wait_durable(&self) -> Result<(), DatabaseError> {
        self.durable_commit.wait(self.begun.load(Ordering::SeqCst))
    }
}

/// The number of a commit that has come so far, for threads that wait for it.
#[derive(Debug)]
struct Waited {
    /// The commit, and whether the writer is gone: what has not come so far by then never will.
    reached: Mutex<(u64, bool)>,
    moved: Condvar,
}

impl Waited {
    const fn at(commit: u64) -> Self {
        Self { reached: Mutex::new((commit, false)), moved: Condvar::new() }
    }

    fn reach(&self, commit: u64) {
        self.reached.lock().unwrap_or_else(PoisonError::into_inner).0 = commit;
        self.moved.notify_all();
    }

    fn end(&self) {
        self.reached.lock().unwrap_or_else(PoisonError::into_inner).1 = true;
        self.moved.notify_all();
    }

    fn wait(&self, commit: u64) -> Result<(), DatabaseError> {
        let mut reached = self.reached.lock().unwrap_or_else(PoisonError::into_inner);
        loop {
            match *reached {
                (so_far, _) if so_far >= commit => return Ok(()),
                (_, true) => {
                    let source = std::io::Error::other("the writer has stopped");
                    return Err(DatabaseError::Io { what: "waiting for a commit", source });
                }
                (_, false) => reached = self.moved.wait(reached).unwrap_or_else(PoisonError::into_inner),
            }
        }
    }
}

impl Drop for Database {
    fn drop(&mut self) {
        self.shared.end();
    }
}

/// The open database. One thread owns it, and only through it is anything written.
#[derive(Debug)]
pub struct Database {
    pub(super) engine: Engine,
    pub(super) head: Head,
    pub(super) flight_rows: FlightRows,
    pub(super) unconfirmed: UnconfirmedRows,
    /// The rows of the agreement's log, with their parts.
    pub(super) agreement_rows: Vec<([u8; 12], u16)>,
    pub(super) kept: Kept,
    /// The number of the next settled transaction's body.
    pub(super) next_body: u64,
    pub(super) recent: Recent,
    pub(super) renewal: Option<Renewal>,
    pub(super) shared: Arc<Shared>,
}

impl Database {
    /// A handle for reading, from any thread.
    pub fn reader(&self) -> Reader {
        Reader { shared: Arc::clone(&self.shared) }
    }

    /// Wakes whenever the change log grows in memory. It proves nothing: read the log, up
    /// to what is durable. One task drains it and touches nothing else (a full buffer
    /// would stop the writer).
    ///
    /// `None` on a disk in memory, which tells nobody.
    pub fn watch_changes(&self) -> Option<ChangeEvents> {
        self.shared.trees.get(TreeId::Changes).watch().map(ChangeEvents)
    }
}

/// sled's subscriber on the change log.
pub struct ChangeEvents(Watch);

impl std::fmt::Debug for ChangeEvents {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("ChangeEvents(..)")
    }
}

impl ChangeEvents {
    /// Waits for an event: whether one came or may have come, or `None` if there will never be
    /// another.
    pub fn wait(&mut self, most: Duration) -> Option<bool> {
        self.0.wait(most)
    }
}

/// The live outputs of some addresses and outpoints, exactly as of one sequence.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Snapshot {
    /// The last change that it contains.
    pub sequence: u64,
    /// In order of outpoint.
    pub utxos: Vec<UtxoEntry>,
}

/// One page of the live outputs of some addresses.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AddressPage {
    /// The last change that it contains.
    pub sequence: u64,
    /// The page, in order of outpoint.
    pub utxos: Vec<UtxoEntry>,
    /// The sum over all pages.
    pub total: Amount,
    /// Where the next page begins (after this outpoint).
    pub next: Option<OutPoint>,
}

/// Reads the database from any thread.
///
/// Functions that answer strangers go through [`Reader::read`], or through those that give
/// something [`Durable`] themselves; the ledger thread, which sees only what it committed
/// itself, reads directly.
#[derive(Debug, Clone)]
pub struct Reader {
    pub(super) shared: Arc<Shared>,
}

impl Reader {
    pub(super) fn tree(&self, id: TreeId) -> &Tree {
        self.shared.trees.get(id)
    }

    /// Reads, then waits until all that may have been read is durable: only then may the
    /// answer leave. Blocks; call it where that is allowed.
    pub fn read<T>(&self, f: impl FnOnce(&Self) -> Result<T, DatabaseError>) -> Result<Durable<T>, DatabaseError> {
        let value = f(self)?;
        self.shared.wait_durable()?;
        Ok(Durable::new(value))
    }

    /// Follows how far the change log is durable. A commit that adds nothing to the log is seen by
    /// whoever looks, and wakes nobody.
    pub fn durable(&self) -> watch::Receiver<DurableHead> {
        self.shared.durable.subscribe()
    }

    /// Follows the height of the last durable block.
    pub fn durable_tip(&self) -> watch::Receiver<Height> {
        self.shared.durable_tip.subscribe()
    }

    /// How far the database is durable now.
    pub fn durable_head(&self) -> DurableHead {
        *self.shared.durable.borrow()
    }

    /// Whose database it is.
    pub fn network(&self) -> &StoredNetwork {
        &self.shared.network
    }

    /// The output at a place, if it ever came into being.
    pub fn utxo(&self, outpoint: &OutPoint) -> Result<Option<Utxo>, DatabaseError> {
        // The lock is looked up first: if it ends meanwhile, the row that is read then says so.
        let lock = self.lock(outpoint);
        let stored = get_output(&self.shared.trees, outpoint)?;
        Ok(stored.map(|stored| utxo_of(&self.shared.trees, &stored, lock)).transpose()?.flatten())
    }

    /// For what an output is locked, and since when.
    pub(super) fn lock(&self, outpoint: &OutPoint) -> Option<(Txid, UnixSeconds)> {
        self.shared.flights().lock(outpoint)
    }

    /// What blocks up to this height have spent may be forgotten, by a program of an earlier schema.
    pub(super) fn forgotten(&self) -> Result<Height, DatabaseError> {
        Ok(super::open::read_meta(&self.shared.trees, meta::FORGOTTEN)?.unwrap_or(0))
    }

    /// Every output that ever came into being and is not forgotten, in order of outpoint.
    pub fn outputs(&self) -> impl Iterator<Item = Result<(OutPoint, Utxo), DatabaseError>> + use<> {
        let reader = self.clone();
        output_rows(self.tree(TreeId::Utxos)).flat_map(move |row| {
            let one = |(outpoint, _)| reader.utxo(&outpoint).map(|utxo| Some((outpoint, utxo?))).transpose();
            match row {
                Ok((first, row)) => row.each(first).filter_map(one).collect::<Vec<_>>(),
                Err(error) => vec![Err(error)],
            }
        })
    }

    pub(super) fn stored_final(&self, txid: &Txid) -> Result<Option<StoredFinal>, DatabaseError> {
        finals::get_final(&self.shared.trees, txid)
    }

    pub(super) fn stored_settled(&self, txid: &Txid) -> Result<Option<StoredSettled>, DatabaseError> {
        finals::get_settled(&self.shared.trees, txid)
    }

    /// The summary of a final transaction.
    pub fn settled(&self, txid: &Txid) -> Result<Option<Settled>, DatabaseError> {
        Ok(self.stored_settled(txid)?.map(|stored| stored.settled))
    }

    /// A final transaction.
    pub fn finalized(&self, txid: &Txid) -> Result<Option<(Transaction, Settled)>, DatabaseError> {
        Ok(self.stored_final(txid)?.map(|stored| (stored.transaction.into_transaction(), stored.settled)))
    }

    /// The body of a final transaction. Cheap if it became final not long ago.
    pub fn body(&self, txid: &Txid) -> Result<Option<Arc<Transaction>>, DatabaseError> {
        self.shared.finals.body(&self.shared.trees, txid)
    }

    /// A transaction in flight.
    pub fn in_flight(&self, txid: &Txid) -> Result<Option<Arc<Transaction>>, DatabaseError> {
        Ok(self.shared.flights().get(txid).map(|flight| Arc::clone(&flight.transaction)))
    }

    /// Up to `limit` transactions in flight after `after`, in order of txid, with the time at
    /// which their inputs were locked.
    pub fn in_flight_after(&self, after: Option<Txid>, limit: usize) -> Vec<InFlight> {
        let flights = self.shared.flights().after(after, limit);
        flights.into_iter().map(|(_, f)| InFlight { transaction: f.transaction, locked_at: f.locked_at }).collect()
    }

    /// F(T), else C(T) (`Commit`, `Approve`), or A(T) (`Abort`).
    pub fn certificate(&self, txid: &Txid, kind: VoteKind) -> Result<Option<Arc<Certificate>>, DatabaseError> {
        let flight = self.shared.flights().get(txid).cloned();
        let held = flight.and_then(|flight| if kind == VoteKind::Abort { flight.abort } else { flight.commit });
        match held {
            Some(certificate) => Ok(Some(certificate)),
            None if kind == VoteKind::Abort => Ok(None),
            None => self.proof(txid),
        }
    }

    /// F(T) of a settled transaction, until it is pruned.
    pub(super) fn proof(&self, txid: &Txid) -> Result<Option<Arc<Certificate>>, DatabaseError> {
        self.shared.finals.proof(&self.shared.trees, txid)
    }

    /// The height of the block that contains a transaction.
    pub fn confirmed(&self, txid: &Txid) -> Result<Option<Height>, DatabaseError> {
        Ok(self.stored_confirmed(txid)?.map(|confirmed| confirmed.height))
    }

    pub(super) fn stored_confirmed(&self, txid: &Txid) -> Result<Option<StoredConfirmed>, DatabaseError> {
        confirmed::get_confirmed(&self.shared.trees, txid)
    }

    /// The height of the block that contains the transaction whose body has this number.
    pub(super) fn confirmed_by_number(&self, number: u64) -> Result<Option<Height>, DatabaseError> {
        Ok(confirmed::confirmed_by_number(&self.shared.trees, number)?.map(|confirmed| confirmed.height))
    }

    /// How a transaction died.
    pub fn dead(&self, txid: &Txid) -> Result<Option<Dead>, DatabaseError> {
        let row = self.tree(TreeId::Dead).get(txid.as_bytes())?;
        row.map(|row| decode(TreeId::Dead, &row)).transpose()
    }

    /// Whether this member must not vote on what spends this output.
    pub fn is_fenced(&self, outpoint: &OutPoint) -> Result<bool, DatabaseError> {
        Ok(self.tree(TreeId::Fence).get(outpoint_key(outpoint))?.is_some())
    }

    /// A block with the proof that it was decided.
    pub fn block(&self, height: Height) -> Result<Option<DecidedBlock>, DatabaseError> {
        get_record(self.tree(TreeId::Blocks), TreeId::Blocks, &height.to_be_bytes())
    }

    fn stored_tip(&self) -> Result<StoredTip, DatabaseError> {
        let row = self.tree(TreeId::Meta).get(meta::CHAIN)?;
        let row = row.ok_or_else(|| DatabaseError::corrupt("meta", "no chain"))?;
        decode(TreeId::Meta, &row)
    }

    /// The chain's tip. Read while commits go on, it may not be durable yet.
    pub fn tip(&self) -> Result<ChainTip, DatabaseError> {
        self.stored_tip()?.tip()
    }

    /// The sequence from which on the log may name what is final and not in the chain.
    pub fn unconfirmed_from(&self) -> Result<u64, DatabaseError> {
        Ok(self.stored_tip()?.unconfirmed_from)
    }

    /// What the log says to be final after `after`, up to `up_to`, and no block contains:
    /// up to `limit` entries of the log, and the last of them.
    pub fn unconfirmed(&self, after: u64, up_to: u64, limit: usize) -> Result<(Vec<Txid>, u64), DatabaseError> {
        let (mut found, mut last) = (Vec::new(), after);
        for (sequence, entry) in self.changes(after, up_to, limit)? {
            last = sequence;
            let Some(txid) = finalized_by(&entry).filter(|txid| found.last() != Some(txid)) else { continue };
            if self.confirmed(&txid)?.is_none() {
                found.push(txid);
            }
        }
        Ok((found, last))
    }

    /// A subscription.
    pub fn subscription(&self, key: &SubscriptionKey) -> Result<Option<Subscription>, DatabaseError> {
        get_record(self.tree(TreeId::Subscriptions), TreeId::Subscriptions, key.as_bytes())
    }

    /// Whether a transaction is final here; cheaper than reading it.
    pub fn is_final(&self, txid: &Txid) -> Result<bool, DatabaseError> {
        finals::is_final(&self.shared.trees, txid)
    }

    /// Whether a transaction is in flight here; cheaper than reading it.
    pub fn is_in_flight(&self, txid: &Txid) -> Result<bool, DatabaseError> {
        Ok(self.shared.flights().get(txid).is_some())
    }

    /// Every subscription.
    pub fn subscriptions(&self) -> impl Iterator<Item = Result<Subscription, DatabaseError>> + use<> {
        records(self.tree(TreeId::Subscriptions), TreeId::Subscriptions).map(|record| record.map(|(_, value)| value))
    }

    /// The oldest sequence that the log still has, or the next one if it is empty.
    pub fn first_sequence(&self) -> Result<u64, DatabaseError> {
        match self.tree(TreeId::Changes).first()? {
            Some((key, _)) => sequence_of(&key),
            None => Ok(self.durable_head().sequence.saturating_add(1)),
        }
    }

    /// The entries of the log after `after` and up to `up_to`, a row of them at a time.
    fn log_between(&self, after: u64, up_to: u64) -> Result<LogEntries, DatabaseError> {
        let tree = self.tree(TreeId::Changes);
        let wanted = after.saturating_add(1);
        let wanted_key = wanted.to_be_bytes().to_vec();
        let before = tree.range(Bound::Unbounded, Bound::Included(wanted_key.clone())).next_back().transpose()?;
        let start = before.map_or(wanted_key, |(key, _)| key.to_vec());
        let rows = tree.range(Bound::Included(start), Bound::Included(up_to.to_be_bytes().to_vec()));
        let entries = move |row: Result<(_, _), DatabaseError>| {
            let (key, value): (sled::IVec, sled::IVec) = row?;
            let (first, row): (u64, Vec<LogEntry>) = (sequence_of(&key)?, decode(TreeId::Changes, &value)?);
            Ok((first..).zip(row).filter(|(n, _)| *n >= wanted && *n <= up_to).collect::<Vec<_>>())
        };
        Ok(Box::new(rows.map(entries).flat_map(|row| match row {
            Ok(entries) => entries.into_iter().map(Ok).collect(),
            Err(error) => vec![Err(error)],
        })))
    }

    /// Log entries with their numbers, after `after` and up to `up_to`, at most `limit`.
    pub fn changes(&self, after: u64, up_to: u64, limit: usize) -> Result<Vec<(u64, LogEntry)>, DatabaseError> {
        self.log_between(after, up_to)?.take(limit).collect()
    }

    /// The live outputs of `addresses` and every one of `outpoints` that exists, as of a
    /// durable sequence, while commits go on. No sync is waited for.
    ///
    /// The rows are read one by one and may be of different, even of not yet durable,
    /// commits. But each change is in the log with its old state, in the same commit. So
    /// what changed after the chosen sequence is taken back with the log. If the log was pruned
    /// beyond the chosen sequence, another one is chosen.
    pub fn snapshot(&self, addresses: &[Address], outpoints: &[OutPoint]) -> Result<Durable<Snapshot>, DatabaseError> {
        for _ in 0..SNAPSHOT_TRIES {
            let snapshot = self.try_snapshot(addresses, outpoints)?;
            if self.pruned()?.sequence <= snapshot.sequence {
                return Ok(Durable::new(snapshot));
            }
        }
        let source = std::io::Error::other("the change log is pruned faster than it is read");
        Err(DatabaseError::Io { what: "reading a snapshot", source })
    }

    fn try_snapshot(&self, addresses: &[Address], outpoints: &[OutPoint]) -> Result<Snapshot, DatabaseError> {
        let sequence = self.durable_head().sequence;
        let addresses: BTreeSet<Address> = addresses.iter().copied().collect();
        let outpoints: BTreeSet<OutPoint> = outpoints.iter().copied().collect();
        let mut found: BTreeMap<OutPoint, Utxo> = BTreeMap::new();
        for address in &addresses {
            for row in self.tree(TreeId::Addresses).scan_prefix(address.payload()) {
                let (key, _) = row?;
                let outpoint = parse_outpoint_key(&key[Address::PAYLOAD_LEN..])
                    .ok_or_else(|| DatabaseError::corrupt("addresses", "a key of the wrong length"))?;
                if let Some(utxo) = self.utxo(&outpoint)? {
                    found.insert(outpoint, utxo);
                }
            }
        }
        for outpoint in &outpoints {
            if let Some(utxo) = self.utxo(outpoint)? {
                found.insert(*outpoint, utxo);
            }
        }
        self.shared.wait_applied()?;
        let mut taken_back = BTreeSet::new();
        for entry in self.log_between(sequence, u64::MAX)? {
            let (_, entry) = entry?;
            let LogEntry::Transition(Transition { outpoint, output, old_state, .. }) = entry else { continue };
            let concerned = addresses.contains(&output.address) || outpoints.contains(&outpoint);
            if !concerned || !taken_back.insert(outpoint) {
                continue;
            }
            match old_state {
                Some(state) => found.insert(outpoint, Utxo { output, state }),
                None => found.remove(&outpoint),
            };
        }
        let utxos = found
            .into_iter()
            .filter(|(outpoint, utxo)| utxo.state.is_live() || outpoints.contains(outpoint))
            .map(|(outpoint, Utxo { output, state })| UtxoEntry { outpoint, output, state })
            .collect();
        Ok(Snapshot { sequence, utxos })
    }

    /// The outputs at these places, as of one durable sequence; see [`Reader::snapshot`].
    pub fn states(&self, outpoints: &[OutPoint]) -> Result<Durable<Vec<Option<Utxo>>>, DatabaseError> {
        if let Some(states) = self.recent_states(outpoints) {
            return Ok(states);
        }
        Ok(self.snapshot(&[], outpoints)?.map(|Snapshot { utxos, .. }| {
            let found = |outpoint: &OutPoint| utxos.binary_search_by_key(outpoint, |entry| entry.outpoint).ok();
            let state = |at: usize| Utxo { output: utxos[at].output, state: utxos[at].state };
            outpoints.iter().map(|outpoint| found(outpoint).map(state)).collect()
        }))
    }

    /// The same, if all of them were made, spent or looked for lately: from memory, without waiting.
    pub fn recent_states(&self, outpoints: &[OutPoint]) -> Option<Durable<Vec<Option<Utxo>>>> {
        self.shared.outputs.get_all(outpoints).map(Durable::new)
    }

    /// A page of the live outputs of some addresses, with the total over all pages.
    pub fn address_page(
        &self,
        addresses: &[Address],
        after: Option<OutPoint>,
        limit: usize,
    ) -> Result<Durable<AddressPage>, DatabaseError> {
        let page = self.snapshot(addresses, &[])?.map(|Snapshot { sequence, utxos }| {
            let total = Amount::checked_sum(utxos.iter().map(|u| u.output.amount))
                .ok_or_else(|| DatabaseError::corrupt("utxos", "more money than there is"))?;
            let mut rest = utxos.into_iter().filter(|u| after.is_none_or(|after| u.outpoint > after));
            let page: Vec<UtxoEntry> = rest.by_ref().take(limit).collect();
            let next = rest.next().and(page.last()).map(|last| last.outpoint);
            Ok(AddressPage { sequence, utxos: page, total, next })
        });
        page.transpose()
    }

    /// Bytes on disk.
    pub fn size_on_disk(&self, data_dir: &std::path::Path) -> u64 {
        super::open::size_on_disk(data_dir)
    }
}

type LogEntries = Box<dyn Iterator<Item = Result<(u64, LogEntry), DatabaseError>>>;

pub(super) fn sequence_of(key: &[u8]) -> Result<u64, DatabaseError> {
    let key: [u8; 8] = key.try_into().map_err(|_| DatabaseError::corrupt("changes", "a key of the wrong length"))?;
    let sequence = Some(u64::from_be_bytes(key)).filter(|sequence| *sequence <= MAX_NUMBER);
    sequence.ok_or_else(|| DatabaseError::corrupt("changes", "a number that none can have"))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::consensus::{InFlight, View};
    use crate::db::codec::encode;
    use crate::db::prune::Pruned;
    use crate::db::samples::{genesis, open_sample, spend};
    use crate::db::{CommitBatch, MemoryDisk, Opened};
    use crate::types::UTXOState;

    /// A commit that locks a coin, cut off after so many writes, and what a reader then says
    /// of the coin; the coin may be remembered from before it.
    fn cut_off_lock(writes: Option<u64>, remembered: bool) -> Result<Option<Utxo>, DatabaseError> {
        let (disk, genesis) = (MemoryDisk::new(), genesis());
        let Opened { mut database, .. } = open_sample(&disk, &genesis, true, true);
        let (coin, output) = genesis.transaction().creates().last().unwrap();
        if remembered {
            database.view().utxo(&coin).unwrap();
        }
        let transaction = spend(coin, 1);
        let txid = transaction.txid();
        let mut changes = Changes::default();
        let new_state = UTXOState::Locked { txid, locked_at: 5 };
        let old_state = Some(UTXOState::Unspent);
        changes.utxos.insert(coin, Utxo { output, state: new_state });
        changes.in_flight.insert(txid, Some(InFlight { transaction, locked_at: Some(5) }));
        changes.log.push(LogEntry::Transition(Transition {
            outpoint: coin,
            output,
            old_state,
            new_state,
            timestamp: 5,
        }));
        let reader = database.reader();
        if let Some(writes) = writes {
            disk.fail_after(writes);
        }
        let committed = database.commit(CommitBatch { changes, ..CommitBatch::default() }, ());
        assert_eq!(committed.is_err(), writes.is_some());
        drop(database);
        assert_eq!(reader.recent_states(&[coin]).is_some(), remembered || writes.is_none());
        reader.states(&[coin]).map(|states| states.into_inner()[0])
    }

    #[test]
    fn a_snapshot_whose_log_is_always_pruned_comes_to_an_end() {
        let (disk, genesis) = (MemoryDisk::new(), genesis());
        let Opened { database, .. } = open_sample(&disk, &genesis, true, true);
        let (coin, output) = genesis.transaction().creates().last().unwrap();
        let reader = database.reader();
        assert_eq!(reader.snapshot(&[output.address], &[coin]).unwrap().into_inner().utxos.len(), 20);
        let pruned = Pruned { height: 0, entries: 0, sequence: u64::MAX / 4 };
        disk.damage("meta", meta::PRUNED.to_vec(), Some(encode(TreeId::Meta, &pruned).unwrap()));
        reader.snapshot(&[output.address], &[coin]).unwrap_err();
    }

    #[test]
    fn nobody_reads_a_commit_that_did_not_become_durable() {
        // Nothing of it was written: whether it would have come whole, nobody knows.
        cut_off_lock(Some(0), false).unwrap_err();
        // It was written and not synced, or its guard was not: the coin is what it was.
        for writes in [1, 2] {
            assert_eq!(cut_off_lock(Some(writes), false).unwrap().unwrap().state, UTXOState::Unspent);
        }
        // What is remembered is as it was before that commit.
        for writes in [0, 1, 2] {
            assert_eq!(cut_off_lock(Some(writes), true).unwrap().unwrap().state, UTXOState::Unspent);
        }
        for remembered in [false, true] {
            let state = cut_off_lock(None, remembered).unwrap().unwrap().state;
            assert!(matches!(state, UTXOState::Locked { locked_at: 5, .. }), "{state:?}");
        }
    }

    #[test]
    fn what_never_came_into_being_is_remembered_as_that() {
        let (disk, genesis) = (MemoryDisk::new(), genesis());
        let Opened { database, .. } = open_sample(&disk, &genesis, true, true);
        let (coin, _) = genesis.transaction().creates().last().unwrap();
        let (none, reader) = (OutPoint { vout: 99, ..coin }, database.reader());
        assert_eq!(database.view().utxo(&none), None);
        assert_eq!(reader.recent_states(&[none]).unwrap().into_inner(), [None]);
        assert!(reader.recent_states(&[none, coin]).is_none(), "one of them is not remembered");
        assert!(reader.states(&[none, coin]).unwrap().into_inner()[1].is_some());
    }
}
