//! What is in flight: since when, with which own votes and certificates, and what it holds.

use std::collections::BTreeMap;

use serde::Serialize;

use super::super::DatabaseError;
use super::super::codec::records;
use super::super::schema::TreeId;
use super::super::store::Reader;
use super::Trees;
use crate::consensus::{InFlight, Vote, VoteKind};
use crate::types::{OutPoint, Output, RawTransaction, Txid, UTXOState, UnixSeconds};

/// Transactions that are looked at together.
const AT_ONCE: usize = 1_024;

/// A certificate that is kept beside a transaction.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct HeldCertificate {
    /// What it says.
    pub kind: VoteKind,
    /// How many members say so.
    pub votes: usize,
}

/// An output that a transaction in flight spends.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Place {
    /// Which.
    pub outpoint: OutPoint,
    /// Amount and owner; `None` if it has not come into being here.
    pub output: Option<Output>,
    /// Where it stands.
    pub state: Option<UTXOState>,
}

/// A transaction in flight.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Flight {
    /// Which.
    pub txid: Txid,
    /// When this member locked its inputs; `None` where it holds no locks for it.
    pub locked_at: Option<UnixSeconds>,
    /// This member's votes on it.
    pub votes: Vec<VoteKind>,
    /// The certificates that are kept for it.
    pub certificates: Vec<HeldCertificate>,
    /// The outputs that are locked for it.
    pub holds: Vec<Place>,
    /// The inputs that are not: spent, locked for another one, free, or not here.
    pub lacks: Vec<Place>,
    /// Its body.
    pub transaction: RawTransaction,
}

impl Trees {
    /// Every transaction in flight, in order of txid.
    pub fn in_flight(&self) -> Result<impl Iterator<Item = Result<Flight, DatabaseError>> + use<'_>, DatabaseError> {
        // Bounded by what can be in flight.
        let mut votes: BTreeMap<Txid, Vec<VoteKind>> = BTreeMap::new();
        for record in records::<Vec<Vote>>(self.trees.get(TreeId::Votes), TreeId::Votes) {
            for vote in record?.1 {
                votes.entry(vote.txid).or_default().push(vote.kind);
            }
        }
        let reader = self.reader()?;
        let (mut after, mut page) = (None, Vec::new().into_iter());
        Ok(std::iter::from_fn(move || {
            let reader = reader.as_ref()?;
            let next = page.next().or_else(|| {
                page = reader.in_flight_after(after, AT_ONCE).into_iter();
                page.next()
            })?;
            after = Some(next.transaction.txid());
            Some(flight(reader, &next, &votes))
        }))
    }
}

fn flight(
    reader: &Reader,
    in_flight: &InFlight,
    votes: &BTreeMap<Txid, Vec<VoteKind>>,
) -> Result<Flight, DatabaseError> {
    let (transaction, locked_at) = (&in_flight.transaction, in_flight.locked_at);
    let txid = transaction.txid();
    let mut certificates = Vec::new();
    for kind in [VoteKind::Commit, VoteKind::Abort] {
        let held = reader.certificate(&txid, kind)?;
        certificates.extend(held.map(|held| HeldCertificate { kind: held.kind, votes: held.votes.len() }));
    }
    let (mut holds, mut lacks) = (Vec::new(), Vec::new());
    for outpoint in transaction.spends() {
        let utxo = reader.utxo(&outpoint)?;
        let (output, state) = (utxo.map(|utxo| utxo.output), utxo.map(|utxo| utxo.state));
        let held = matches!(state, Some(UTXOState::Locked { txid: holder, .. }) if holder == txid);
        let place = Place { outpoint, output, state };
        if held { holds.push(place) } else { lacks.push(place) }
    }
    let votes = votes.get(&txid).cloned().unwrap_or_default();
    Ok(Flight { txid, locked_at, votes, certificates, holds, lacks, transaction: transaction.to_raw() })
}
