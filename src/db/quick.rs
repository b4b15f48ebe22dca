//! What a start looks at before it trusts a database: of the invariants, what takes no
//! longer than opening it.
//!
//! Damage to one stretch of sled's file can take away the rows that were last written there
//! without a word, while the last commit is there and fits the guard. But each step of an
//! output and each block has a number in the change log, without a gap. So the end of the
//! log is walked, and what it names has to be where it leads; and what is in flight has to
//! fit together, by what stands there twice and by the count of its rows. Older rows stand where sled's snapshot says, with a checksum: reading them
//! is an error, or gives them as they were. `verify` looks at everything.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Bound;

use super::DatabaseError;
use super::codec::records;
use super::confirmed::last_confirmed;
use super::finals::next_number;
use super::kept::Kept;
use super::open::read_meta;
use super::outputs::row_of;
use super::schema::{TreeId, address_key, meta, outpoint_key};
use super::store::Reader;
use crate::consensus::{AgreementRecord, ChainTip, LogEntry, Recovered, Vote, VoteKind};
use crate::limits::{FEED_READ, MAX_CHECKED_AT_START, MAX_LINKED_OUTPUTS, MAX_LINKED_ROWS};
use crate::types::{BlockHash, Height, OutPoint, Output, Txid, UTXOState};

/// The trees that grow at their ends, and those that are small.
const ENDS: [TreeId; 7] = [
    TreeId::Changes,
    TreeId::Transactions,
    TreeId::Proofs,
    TreeId::Blocks,
    TreeId::Confirmed,
    TreeId::Dead,
    TreeId::Subscriptions,
];
/// Rows that may stand in one page of sled's, and some of the page before.
const ROWS_OF_A_PAGE: usize = 32;

/// What a start goes on with, as far as it is looked at.
pub(super) struct Start<'a> {
    pub(super) reader: &'a Reader,
    /// The last number of the change log.
    pub(super) sequence: u64,
    /// The rows that a member's votes stand on, as they are counted now.
    pub(super) kept: Kept,
    pub(super) tip: &'a ChainTip,
    pub(super) in_flight: &'a [Recovered],
    pub(super) agreement: &'a [AgreementRecord],
}

fn ensure(holds: bool, what: impl FnOnce() -> String) -> Result<(), DatabaseError> {
    if holds { Ok(()) } else { Err(DatabaseError::Unsound(what())) }
}

impl Start<'_> {
    /// Says the first thing that is not as it should be.
    pub(super) fn check(&self) -> Result<(), DatabaseError> {
        let kept = read_meta::<Kept>(&self.reader.shared.trees, meta::KEPT)?;
        ensure(kept.is_none_or(|kept| kept == self.kept), || {
            "rows with locks, votes, certificates, words on the next block or fenced outputs are missing".into()
        })?;
        let lately = self.walk()?;
        self.check_ends()?;
        self.check_links(&lately)?;
        for (outpoint, (output, state)) in &lately.outputs {
            self.check_output(outpoint, output, state)?;
        }
        for txid in &lately.made {
            let known = lately.blocks.iter().any(|(_, hash)| hash.as_bytes() == txid.as_bytes());
            ensure(known || self.is_whole(txid)?, || format!("{txid} has outputs and is not here"))?;
        }
        self.check_blocks(&lately)?;
        for recovered in self.in_flight {
            self.check_in_flight(recovered)?;
        }
        self.check_votes()?;
        for record in self.agreement {
            let AgreementRecord::Message(message) = record else { continue };
            let of_next = message.height() == self.tip.height.saturating_add(1);
            ensure(of_next, || "the agreement's log is of another height than the next".into())?;
        }
        Ok(())
    }

    /// Nothing stands where the next commit will write: it would be taken for a part of that.
    fn check_ends(&self) -> Result<(), DatabaseError> {
        let reader = self.reader;
        let behind = reader.changes(self.sequence, u64::MAX, 1)?;
        ensure(behind.is_empty(), || format!("the change log goes on behind its last entry {}", self.sequence))?;
        let (last, next) = (last_confirmed(&reader.shared.trees)?, next_number(reader.tree(TreeId::Transactions))?);
        ensure(last.is_none_or(|last| last < next), || format!("a block has the body {last:?}, which is not here"))
    }

    /// Where a page of sled's has gone back to what it was before it was split, each row is found by
    /// its key, and whoever walks through the tree passes over some. So the ends of the trees
    /// that grow at their ends, and the places of the last outputs, are walked both ways.
    fn check_links(&self, lately: &Lately) -> Result<(), DatabaseError> {
        let linked = |id: TreeId, end: Bound<Vec<u8>>, most: usize| {
            let linked = self.reader.tree(id).is_linked(end, most)?;
            ensure(linked, || format!("rows of tree {} are passed over", id.name()))
        };
        for id in ENDS {
            linked(id, Bound::Unbounded, MAX_LINKED_ROWS)?;
        }
        for (outpoint, (output, state)) in lately.outputs.iter().take(MAX_LINKED_OUTPUTS) {
            let row = outpoint_key(&row_of(outpoint)).to_vec();
            linked(TreeId::Utxos, Bound::Included(row), ROWS_OF_A_PAGE)?;
            if state.is_live() {
                let row = address_key(&output.address, outpoint).to_vec();
                linked(TreeId::Addresses, Bound::Included(row), ROWS_OF_A_PAGE)?;
            }
        }
        Ok(())
    }

    /// The end of the log, dense up to the last commit's number.
    fn walk(&self) -> Result<Lately, DatabaseError> {
        let (mut lately, pruned) = (Lately::default(), self.reader.pruned()?.sequence);
        let first = pruned.saturating_add(1).max(self.sequence.saturating_sub(MAX_CHECKED_AT_START));
        let mut next = first;
        while next <= self.sequence {
            for (number, entry) in self.reader.changes(next - 1, self.sequence, FEED_READ)? {
                ensure(number == next, || format!("the change log lacks its entry {next}"))?;
                next += 1;
                lately.add(entry);
            }
            // An empty page leaves `next` where it is, and so did the page before.
            if self.reader.changes(next - 1, self.sequence, 1)?.is_empty() {
                break;
            }
        }
        ensure(next == self.sequence.saturating_add(1), || {
            format!("the change log ends before its entry {}", self.sequence)
        })?;
        Ok(lately)
    }

    fn check_output(&self, outpoint: &OutPoint, output: &Output, state: &UTXOState) -> Result<(), DatabaseError> {
        let reader = self.reader;
        let utxo = reader.utxo(outpoint)?;
        let same = utxo.is_none_or(|utxo| utxo.output == *output);
        ensure(same, || format!("{outpoint} is of another amount or owner than the change log says"))?;
        let stands = utxo.map(|utxo| utxo.state);
        let forgotten = match state {
            // A program of an earlier schema forgot it before it forgot the log.
            UTXOState::Confirmed { block_height, .. } => stands.is_none() && *block_height <= reader.forgotten()?,
            _ => false,
        };
        ensure(forgotten || stands == Some(*state), || {
            format!("{outpoint} is {stands:?}, and by the change log it is {state:?}")
        })?;
        let indexed = reader.tree(TreeId::Addresses).get(address_key(&output.address, outpoint))?.is_some();
        ensure(indexed == state.is_live(), || format!("the index of addresses is wrong about {outpoint}"))?;
        match state {
            UTXOState::Unspent => Ok(()),
            UTXOState::Locked { txid, .. } => {
                let held = reader.is_in_flight(txid)?;
                ensure(held, || format!("{outpoint} is locked for {txid}, which is not in flight"))
            }
            UTXOState::SpentFinalized { txid, .. } => {
                let open = reader.is_final(txid)? && reader.confirmed(txid)?.is_none();
                ensure(open, || format!("{txid} spends {outpoint}, and is not settled or in a block"))?;
                let proof = reader.certificate(txid, VoteKind::Commit)?;
                let proved = proof.is_some_and(|proof| proof.kind == VoteKind::Commit);
                ensure(proved, || format!("{txid} is settled without its proof"))
            }
            UTXOState::Confirmed { txid, block_height, .. } => {
                let there = reader.is_final(txid)? && reader.confirmed(txid)? == Some(*block_height);
                ensure(there, || format!("{txid} spends {outpoint}, and is not in block {block_height}"))
            }
        }
    }

    fn check_blocks(&self, lately: &Lately) -> Result<(), DatabaseError> {
        let (reader, tip) = (self.reader, self.tip);
        if let Some((height, hash)) = lately.blocks.last() {
            let last = (*height, *hash) == (tip.height, tip.hash);
            ensure(last, || format!("the tip is block {}, and by the change log it is {height}", tip.height))?;
        }
        let newest = lately.blocks.iter().map(|(height, _)| *height).chain([tip.height]).filter(|height| *height > 0);
        for height in newest.collect::<BTreeSet<_>>() {
            let block = reader.block(height)?;
            let hash = block.as_ref().map(|decided| decided.block.hash(&reader.network().genesis_hash));
            let told = lately.blocks.iter().find(|(at, _)| *at == height).map_or(tip.hash, |(_, hash)| *hash);
            ensure(hash == Some(told), || format!("block {height} is not here, or is another one"))?;
            for txid in block.iter().flat_map(|decided| &decided.block.transactions) {
                let there = reader.confirmed(txid)? == Some(height) && reader.is_final(txid)?;
                ensure(there, || format!("{txid} of block {height} is not here"))?;
            }
        }
        ensure(reader.block(tip.height.saturating_add(1))?.is_none(), || "there is a block above the tip".into())
    }

    /// Whether a settled transaction is here with its body; what there is of its proof is read.
    fn is_whole(&self, txid: &Txid) -> Result<bool, DatabaseError> {
        let Some((transaction, _)) = self.reader.finalized(txid)? else { return Ok(false) };
        self.reader.proof(txid)?;
        Ok(transaction.txid() == *txid)
    }

    /// Whatever this member has voted on is here. Votes stay as long as one of those that were
    /// given together with them is needed.
    fn check_votes(&self) -> Result<(), DatabaseError> {
        let reader = self.reader;
        for record in records::<Vec<Vote>>(reader.tree(TreeId::Votes), TreeId::Votes) {
            for Vote { txid, kind } in record?.1 {
                let here = reader.is_in_flight(&txid)? || reader.is_final(&txid)? || reader.dead(&txid)?.is_some();
                ensure(here, || format!("{txid}, on which this member voted {kind:?}, is not here"))?;
            }
        }
        Ok(())
    }

    /// Locks, own votes and certificates of what is in flight go together.
    fn check_in_flight(&self, recovered: &Recovered) -> Result<(), DatabaseError> {
        let Recovered { in_flight, votes, certificates } = recovered;
        let txid = in_flight.transaction.txid();
        let over = self.reader.is_final(&txid)? || self.reader.dead(&txid)?.is_some();
        ensure(!over, || format!("{txid} is in flight, and settled or dead"))?;
        let locked = in_flight.locked_at.is_some();
        let approved = votes.contains(&VoteKind::Approve);
        ensure(locked == approved, || format!("{txid} has locks without a vote, or a vote without locks"))?;
        for outpoint in in_flight.transaction.spends().filter(|_| locked) {
            let held = match self.reader.utxo(&outpoint)?.map(|utxo| utxo.state) {
                Some(UTXOState::Locked { txid: by, .. }) => by == txid,
                // A settled rival has spent it.
                Some(UTXOState::SpentFinalized { txid: by, .. } | UTXOState::Confirmed { txid: by, .. }) => by != txid,
                Some(UTXOState::Unspent) | None => false,
            };
            ensure(held, || format!("{outpoint} is not locked for {txid}, which was approved"))?;
        }
        let committed = votes.contains(&VoteKind::Commit);
        let proved = certificates.iter().any(|certificate| certificate.kind != VoteKind::Abort);
        ensure(!committed || proved, || format!("{txid} was committed to without its certificate"))?;
        let both = committed && votes.contains(&VoteKind::Abort);
        ensure(!both, || format!("{txid} was committed to and aborted"))
    }
}

/// What the end of the log names.
#[derive(Default)]
struct Lately {
    /// Where each output's steps lead.
    outputs: BTreeMap<OutPoint, (Output, UTXOState)>,
    /// The transactions that made outputs.
    made: BTreeSet<Txid>,
    blocks: Vec<(Height, BlockHash)>,
}

impl Lately {
    fn add(&mut self, entry: LogEntry) {
        match entry {
            LogEntry::Transition(step) => {
                if step.old_state.is_none() {
                    self.made.insert(step.outpoint.txid);
                }
                self.outputs.insert(step.outpoint, (step.output, step.new_state));
            }
            LogEntry::Block { height, block_hash, .. } => self.blocks.push((height, block_hash)),
        }
    }
}

#[cfg(test)]
mod tests {
    use crate::consensus::LogEntry;
    use crate::db::codec::encode;
    use crate::db::samples::{genesis, open_sample, try_open_sample};
    use crate::db::schema::TreeId;
    use crate::db::{DatabaseError, MemoryDisk};
    use crate::types::BlockHash;

    #[test]
    fn what_stands_where_the_next_commit_writes_is_noticed() {
        let (genesis, sound) = (genesis(), MemoryDisk::new());
        let head = open_sample(&sound, &genesis, true, true).database.reader().durable_head();
        let image = sound.image();
        let entry = LogEntry::Block { height: 1, block_hash: BlockHash::from_bytes([1; 32]), timestamp_ms: 1 };
        let entry = encode(TreeId::Changes, &vec![entry]).unwrap();
        let confirmed = encode(TreeId::Confirmed, &vec![(5_i64, 1_u64)]).unwrap();
        let stretch = [9_u64.to_be_bytes(), 1_u64.to_be_bytes()].concat();
        for (tree, key, value) in [
            ("changes", (head.sequence + 1).to_be_bytes().to_vec(), entry.clone()),
            ("changes", u64::MAX.to_be_bytes().to_vec(), entry),
            ("confirmed", stretch, confirmed),
        ] {
            sound.put_back(&image, true);
            drop(try_open_sample(&sound, &genesis, true, true).unwrap());
            sound.damage(tree, key, Some(value));
            let refused = try_open_sample(&sound, &genesis, true, true).unwrap_err();
            assert!(matches!(refused, DatabaseError::Unsound(_) | DatabaseError::Corrupt { .. }), "{tree}: {refused}");
        }
    }
}
