//! Writing an export.

use std::collections::{BTreeMap, BTreeSet};
use std::io::Write;
use std::sync::Arc;

use serde::Serialize;

use super::super::DatabaseError;
use super::super::codec::{decode, records};
use super::super::inspect::Trees as InspectTrees;
use super::super::schema::{StoredFinal, StoredNetwork, Subscription, TreeId, parse_outpoint_key};
use super::super::store::Reader;
use super::super::watcher::Watcher;
use super::{DeadRecord, FORMAT, Header, InFlightRecord, Record, SettledRecord, SubscriptionRecord, Trailer, VERSION};
use crate::consensus::{Certificate, Dead, Utxo, Vote, VoteKind};
use crate::types::{Height, Txid, UnixSeconds, UtxoEntry};

/// How often a watcher is told.
const TELL_EVERY: u64 = 256;
/// Entries of the log that are looked through at once for what is final.
const LOG_ENTRIES_AT_ONCE: usize = 4_096;

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Exported {
    /// Lines between the first and the last.
    pub records: u64,
    /// Bytes of the file.
    pub bytes: u64,
    /// What the last line says.
    pub blake3: String,
    /// The chain's height.
    pub height: Height,
    /// The last commit.
    pub commit: u64,
}

/// Writes the whole ledger to `out`. The caller makes it durable.
pub fn export(
    trees: &InspectTrees,
    out: &mut dyn Write,
    created: UnixSeconds,
    watcher: &dyn Watcher,
) -> Result<Exported, DatabaseError> {
    let unfinished = || DatabaseError::corrupt("meta", "the database was never filled to the end");
    let reader = trees.reader()?.ok_or_else(unfinished)?;
    let (head, tip, pruned) = (reader.durable_head(), reader.tip()?, reader.pruned()?);
    let StoredNetwork { network, genesis_hash, public_key, log_id } = reader.network().clone();
    let header = Header {
        format: FORMAT.into(),
        version: VERSION,
        network,
        genesis_hash,
        public_key,
        log_id: hex::encode(log_id),
        commit: head.commit,
        sequence: head.sequence,
        height: tip.height,
        block_hash: tip.hash,
        pruned_height: pruned.height,
        pruned_entries: pruned.entries,
        created,
    };
    let mut lines = Lines { out, hasher: blake3::Hasher::new(), records: 0, bytes: 0, watcher };
    lines.line(&header)?;
    let mut export = Export { reader, lines };
    export.chain(tip.height)?;
    export.unconfirmed()?;
    export.in_flight()?;
    export.dead()?;
    export.outputs()?;
    export.rest()?;
    let Export { mut lines, .. } = export;
    let (records, checksum) = (lines.records, lines.hasher.finalize().to_hex().to_string());
    lines.line(&Trailer::End { records, blake3: checksum.clone() })?;
    lines.out.flush().map_err(DatabaseError::io("writing the export"))?;
    Ok(Exported { records, bytes: lines.bytes, blake3: checksum, height: tip.height, commit: head.commit })
}

/// Lines, counted and hashed.
struct Lines<'a> {
    out: &'a mut dyn Write,
    hasher: blake3::Hasher,
    records: u64,
    bytes: u64,
    watcher: &'a dyn Watcher,
}

impl Lines<'_> {
    fn line<T: Serialize>(&mut self, value: &T) -> Result<(), DatabaseError> {
        let mut line = serde_json::to_vec(value)
            .map_err(|error| DatabaseError::Io { what: "writing the export", source: error.into() })?;
        line.push(b'\n');
        self.out.write_all(&line).map_err(DatabaseError::io("writing the export"))?;
        self.hasher.update(&line);
        self.bytes += line.len() as u64;
        Ok(())
    }

    fn record(&mut self, record: &Record) -> Result<(), DatabaseError> {
        self.records += 1;
        self.line(record)
    }
}

struct Export<'a> {
    reader: Reader,
    lines: Lines<'a>,
}

impl Export<'_> {
    fn tell(&self, what: &'static str, done: u64, total: Option<u64>) {
        if done.is_multiple_of(TELL_EVERY) {
            self.lines.watcher.progress(what, done, total);
        }
    }

    fn settled(&self, txid: &Txid, height: Option<Height>) -> Result<SettledRecord, DatabaseError> {
        let stored = self.reader.stored_final(txid)?;
        let missing = || DatabaseError::corrupt("transactions", format!("the body of {txid} is missing"));
        let StoredFinal { settled, transaction, .. } = stored.ok_or_else(missing)?;
        let certificate = self.reader.proof(txid)?.map(Arc::unwrap_or_clone);
        let transaction = transaction.into_transaction().to_raw();
        let confirmed_at = self.reader.stored_confirmed(txid)?.map(|confirmed| confirmed.confirmed_at);
        Ok(SettledRecord { transaction, settled, height, confirmed_at, certificate })
    }

    /// Every block, with its transactions after it.
    fn chain(&mut self, tip: Height) -> Result<(), DatabaseError> {
        for height in 1..=tip {
            self.tell("exporting blocks", height, Some(tip));
            let missing = || DatabaseError::corrupt("blocks", format!("block {height} is missing"));
            let decided = self.reader.block(height)?.ok_or_else(missing)?;
            let transactions = decided.block.transactions.clone();
            self.lines.record(&Record::Block(Box::new(decided)))?;
            for txid in transactions {
                let settled = self.settled(&txid, Some(height))?;
                self.lines.record(&Record::Settled(Box::new(settled)))?;
            }
        }
        Ok(())
    }

    /// What is settled and in no block, in the order in which it became so.
    fn unconfirmed(&mut self) -> Result<(), DatabaseError> {
        let end = self.reader.durable_head().sequence;
        let mut after = self.reader.unconfirmed_from()?.saturating_sub(1);
        let mut seen = BTreeSet::new();
        while after < end {
            let (txids, last) = self.reader.unconfirmed(after, end, LOG_ENTRIES_AT_ONCE)?;
            if last == after {
                break;
            }
            after = last;
            for txid in txids.into_iter().filter(|txid| seen.insert(*txid)) {
                let settled = self.settled(&txid, None)?;
                self.lines.record(&Record::Settled(Box::new(settled)))?;
            }
        }
        Ok(())
    }

    fn in_flight(&mut self) -> Result<(), DatabaseError> {
        // Bounded by what can be in flight.
        let mut votes: BTreeMap<Txid, Vec<VoteKind>> = BTreeMap::new();
        for record in records::<Vec<Vote>>(self.reader.tree(TreeId::Votes), TreeId::Votes) {
            for vote in record?.1 {
                votes.entry(vote.txid).or_default().push(vote.kind);
            }
        }
        for flight in self.reader.in_flight_after(None, usize::MAX) {
            let (transaction, locked_at) = (flight.transaction, flight.locked_at);
            let txid = transaction.txid();
            let mut certificates: Vec<Certificate> = Vec::new();
            for kind in [VoteKind::Commit, VoteKind::Abort] {
                certificates.extend(self.reader.certificate(&txid, kind)?.map(Arc::unwrap_or_clone));
            }
            let votes = votes.remove(&txid).unwrap_or_default();
            let record = InFlightRecord { transaction: transaction.to_raw(), locked_at, votes, certificates };
            self.lines.record(&Record::InFlight(Box::new(record)))?;
        }
        Ok(())
    }

    fn dead(&mut self) -> Result<(), DatabaseError> {
        for row in self.reader.tree(TreeId::Dead).iter() {
            let (key, value) = row?;
            let key = <[u8; 32]>::try_from(key.as_ref());
            let key = key.map_err(|_| DatabaseError::corrupt("dead", "a key of the wrong length"))?;
            let Dead { by, height } = decode(TreeId::Dead, &value)?;
            self.lines.record(&Record::Dead(DeadRecord { txid: Txid::from_bytes(key), by, height }))?;
        }
        Ok(())
    }

    fn outputs(&mut self) -> Result<(), DatabaseError> {
        for (done, row) in (1..).zip(self.reader.outputs()) {
            self.tell("exporting outputs", done, None);
            let (outpoint, Utxo { output, state }) = row?;
            self.lines.record(&Record::Output(UtxoEntry { outpoint, output, state }))?;
        }
        Ok(())
    }

    /// What the member must not vote on, and the wallets' subscriptions.
    fn rest(&mut self) -> Result<(), DatabaseError> {
        for row in self.reader.tree(TreeId::Fence).iter() {
            let (key, _) = row?;
            let outpoint = parse_outpoint_key(&key);
            let outpoint = outpoint.ok_or_else(|| DatabaseError::corrupt("fence", "a key of the wrong length"))?;
            self.lines.record(&Record::Fenced(outpoint))?;
        }
        let subscriptions = self.reader.subscriptions();
        for subscription in subscriptions {
            let Subscription { subscriber_id, token_hash, outpoints, addresses, last_used } = subscription?;
            let token_hash = hex::encode(token_hash);
            let record = SubscriptionRecord { subscriber_id, token_hash, outpoints, addresses, last_used };
            self.lines.record(&Record::Subscription(record))?;
        }
        Ok(())
    }
}
