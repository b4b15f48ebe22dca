//! Everything that the database has on one thing.

use std::collections::BTreeSet;
use std::ops::Bound;
use std::sync::Arc;

use super::super::DatabaseError;
use super::super::finals::get_final;
use super::super::outputs::{OutputRow, parse_row_key, row_of};
use super::super::schema::{TreeId, address_key, agreement_key, outpoint_key};
use super::record::{self, KeyRange, Record};
use super::{Filter, Row, Trees, filter};
use crate::consensus::{Utxo, VoteKind};
use crate::types::{Address, OutPoint, Txid};

/// What is looked up.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Thing {
    /// An output: where it stands, who made it, who holds or spent it.
    OutPoint(OutPoint),
    /// A transaction: its body, votes, certificates, what it spends and creates.
    Txid(Txid),
    /// A block, and what became so by it.
    Height(u64),
    /// An entry of the change log, and the output that it is about.
    Sequence(u64),
    /// A record, by the key that [`Row::key`] has.
    Row {
        /// The tree's name.
        tree: String,
        /// The key.
        key: String,
    },
}

/// What was found.
#[derive(Debug, Default)]
pub struct Found {
    /// The records, by tree and key.
    pub rows: Vec<Row>,
    /// What could not be read on the way.
    pub unreadable: Vec<DatabaseError>,
}

/// A key that is none of its tree's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{key:?} is no key of tree {tree}: write it as `dump` prints it")]
pub struct KeyError {
    tree: String,
    key: String,
}

impl Found {
    fn take(&mut self, records: impl Iterator<Item = Result<Record, DatabaseError>>) {
        self.take_rows(records.map(|record| record.map(Record::into_row)));
    }

    fn take_rows(&mut self, rows: impl Iterator<Item = Result<Row, DatabaseError>>) {
        for row in rows {
            match row {
                Ok(row) if self.rows.contains(&row) => {}
                Ok(row) => self.rows.push(row),
                Err(error) => self.unreadable.push(error),
            }
        }
    }

    /// The value, or nothing and a note that it could not be read.
    fn read<T>(&mut self, value: Result<Option<T>, DatabaseError>) -> Option<T> {
        value.unwrap_or_else(|error| {
            self.unreadable.push(error);
            None
        })
    }
}

impl Trees {
    /// Everything on one thing. The change log has no index, so it is read through.
    pub fn about(&self, thing: &Thing) -> Result<Result<Found, KeyError>, DatabaseError> {
        let mut found = Found::default();
        match thing {
            Thing::OutPoint(outpoint) => self.about_outpoint(&mut found, outpoint)?,
            Thing::Txid(txid) => self.about_txid(&mut found, txid)?,
            Thing::Height(height) => self.about_height(&mut found, *height)?,
            Thing::Sequence(sequence) => self.about_sequence(&mut found, *sequence)?,
            Thing::Row { tree, key } => {
                let wrong = || KeyError { tree: tree.clone(), key: key.clone() };
                let Some(id) = TreeId::named(tree) else { return Ok(Err(wrong())) };
                let Some(raw) = parse_key(id, key) else { return Ok(Err(wrong())) };
                let range = match id {
                    TreeId::Changes => {
                        let sequence = key.parse().unwrap_or(0);
                        self.range(id, &Filter { sequence: Some(sequence..=sequence), ..Filter::default() })?
                    }
                    TreeId::Confirmed | TreeId::Transactions => {
                        self.range(id, &Filter { txid: key.parse().ok(), ..Filter::default() })?
                    }
                    TreeId::Utxos => self.range(id, &Filter { outpoint: key.parse().ok(), ..Filter::default() })?,
                    // These have a record for each commit, with many things in it.
                    TreeId::Locks | TreeId::Certificates | TreeId::Proofs => (Bound::Unbounded, Bound::Unbounded),
                    _ => filter::under(&raw),
                };
                let records = self.walk(id, range);
                found.take(records.filter(|record| record.as_ref().map_or(true, |record| record.key == *key)));
            }
        }
        found.rows.sort_by_key(|row| TreeId::named(row.tree));
        Ok(Ok(found))
    }

    fn walk(&self, id: TreeId, range: KeyRange) -> record::Records {
        let reader = self.reader().ok().flatten();
        record::walk(&self.trees, id, range, reader.as_ref(), self.network)
    }

    fn selected(&self, found: &mut Found, tree: TreeId, filter: Filter) -> Result<(), DatabaseError> {
        if let Some(rows) = self.select(tree.name(), filter)? {
            found.take_rows(rows);
        }
        Ok(())
    }

    fn utxo(&self, found: &mut Found, outpoint: &OutPoint) -> Option<Utxo> {
        let reader = found.read(self.reader())?;
        found.read(reader.utxo(outpoint))
    }

    /// Where an output stands now: its own row, its row of the index, its fence.
    fn place(&self, found: &mut Found, outpoint: &OutPoint) {
        let key = outpoint_key(outpoint);
        let of_row = self.walk(TreeId::Utxos, exactly(&outpoint_key(&row_of(outpoint))));
        let name = outpoint.to_string();
        found.take(of_row.filter(|record| record.as_ref().map_or(true, |record| record.key == name)));
        found.take(self.walk(TreeId::Fence, exactly(&key)));
        if let Some(utxo) = self.utxo(found, outpoint) {
            let key = address_key(&utxo.output.address, outpoint);
            found.take(self.walk(TreeId::Addresses, exactly(&key)));
        }
    }

    /// A transaction as such: body, certificates, height, end.
    fn transaction(&self, found: &mut Found, txid: &Txid) -> Result<(), DatabaseError> {
        found.take(self.walk(TreeId::Dead, filter::under(txid.as_bytes())));
        let filter = Filter { txid: Some(*txid), ..Filter::default() };
        for tree in [TreeId::Transactions, TreeId::Confirmed, TreeId::Locks, TreeId::Certificates] {
            self.selected(found, tree, filter.clone())?;
        }
        Ok(())
    }

    fn about_outpoint(&self, found: &mut Found, outpoint: &OutPoint) -> Result<(), DatabaseError> {
        self.place(found, outpoint);
        self.transaction(found, &outpoint.txid)?;
        if let Some(txid) = self.utxo(found, outpoint).and_then(|utxo| utxo.state.txid()) {
            self.transaction(found, &txid)?;
        }
        let filter = Filter { outpoint: Some(*outpoint), ..Filter::default() };
        for tree in [TreeId::Locks, TreeId::Changes, TreeId::Subscriptions] {
            self.selected(found, tree, filter.clone())?;
        }
        Ok(())
    }

    fn about_txid(&self, found: &mut Found, txid: &Txid) -> Result<(), DatabaseError> {
        self.transaction(found, txid)?;
        let mut places = BTreeSet::new();
        for row in self.trees.get(TreeId::Utxos).scan_prefix(txid.as_bytes()) {
            let (key, row) = row?;
            let row = OutputRow::decode(&row).and_then(|row| Ok((parse_row_key(&key)?, row)));
            if let Some((first, row)) = found.read(row.map(Some)) {
                places.extend(row.each(first).map(|(outpoint, _)| outpoint));
            }
        }
        let settled = found.read(get_final(&self.trees, txid));
        let settled = settled.map(|stored| Arc::new(stored.transaction.into_transaction()));
        let in_flight = found.read(self.reader()).and_then(|reader| found.read(reader.in_flight(txid)));
        for body in settled.into_iter().chain(in_flight) {
            places.extend(body.spends());
        }
        for outpoint in &places {
            self.place(found, outpoint);
        }
        let filter = Filter { txid: Some(*txid), ..Filter::default() };
        for tree in [TreeId::Votes, TreeId::Dead, TreeId::Changes] {
            self.selected(found, tree, filter.clone())?;
        }
        Ok(())
    }

    fn about_height(&self, found: &mut Found, height: u64) -> Result<(), DatabaseError> {
        let filter = Filter { height: Some(height..=height), ..Filter::default() };
        for tree in [TreeId::Blocks, TreeId::Confirmed, TreeId::Dead, TreeId::Agreement, TreeId::Changes] {
            self.selected(found, tree, filter.clone())?;
        }
        Ok(())
    }

    fn about_sequence(&self, found: &mut Found, sequence: u64) -> Result<(), DatabaseError> {
        let filter = Filter { sequence: Some(sequence..=sequence), ..Filter::default() };
        self.selected(found, TreeId::Changes, filter)?;
        let outpoint = found.rows.first().and_then(|row| {
            let step = row.value.get("Transition")?.get("outpoint")?.clone();
            serde_json::from_value::<OutPoint>(step).ok()
        });
        if let Some(outpoint) = outpoint {
            self.place(found, &outpoint);
        }
        Ok(())
    }
}

/// This key and no other.
fn exactly(key: &[u8]) -> KeyRange {
    (Bound::Included(key.to_vec()), Bound::Included(key.to_vec()))
}

/// The bytes of a readable key, or of its beginning.
fn parse_key(id: TreeId, text: &str) -> Option<Vec<u8>> {
    let outpoint = |text: &str| text.parse::<OutPoint>().ok().map(|outpoint| outpoint_key(&outpoint).to_vec());
    match id {
        TreeId::Meta => Some(text.as_bytes().to_vec()),
        TreeId::Utxos | TreeId::Fence => outpoint(text),
        TreeId::Addresses => {
            let (address, place) = text.split_once('/')?;
            let address: Address = address.parse().ok()?;
            Some([address.payload().as_slice(), &outpoint(place)?].concat())
        }
        TreeId::Votes | TreeId::Blocks | TreeId::Changes => Some(text.parse::<u64>().ok()?.to_be_bytes().to_vec()),
        TreeId::Bodies => None,
        TreeId::Certificates | TreeId::Proofs => {
            let (txid, kind) = text.split_once(':')?;
            let kind = match kind {
                "commit" => VoteKind::Commit,
                "abort" => VoteKind::Abort,
                _ => return None,
            };
            Some([txid.parse::<Txid>().ok()?.as_bytes().as_slice(), &[kind.byte()]].concat())
        }
        TreeId::Agreement => {
            let (height, index) = text.split_once('/')?;
            Some(agreement_key(height.parse().ok()?, index.parse().ok()?).to_vec())
        }
        TreeId::Locks | TreeId::Transactions | TreeId::Confirmed | TreeId::Dead | TreeId::Subscriptions => {
            hex::decode(text).ok().filter(|key| key.len() == 32)
        }
    }
}
