//! What is in flight in an export, what died, what is fenced, and subscriptions.

use std::sync::Arc;

use super::super::codec::{RowChange, encode, put_record};
use super::super::pack::StoredCertificates;
use super::super::schema::{StoredInFlight, Subscription, SubscriptionKey, TreeId, outpoint_key};
use super::import::{Import, Recent, Stop};
use super::{DeadRecord, ImportFault, InFlightRecord, SubscriptionRecord};
use crate::consensus::{Dead, InFlight, Vote, VoteKind};
use crate::limits::{MAX_SUBSCRIPTION_FILTERS, MAX_TEXT};
use crate::types::{OutPoint, Txid};

/// Transactions in flight of one record, with their votes and certificates.
const FLIGHTS_IN_RECORD: usize = 128;

impl Import<'_> {
    pub(super) fn in_flight(&mut self, record: InFlightRecord) -> Result<(), Stop> {
        let InFlightRecord { transaction, locked_at, votes, certificates } = record;
        let transaction = self.signed(transaction)?;
        let txid = transaction.txid();
        if self.is_settled(&txid)? || self.is_in_flight(&txid) {
            return Err(ImportFault::Twice(txid).into());
        }
        let said = |kind: VoteKind| votes.iter().filter(|vote| **vote == kind).count();
        let certified = certificates.iter().any(|certificate| certificate.kind != VoteKind::Abort);
        let wrong = if VoteKind::ALL.into_iter().any(|kind| said(kind) > 1) {
            Some("one of them twice")
        } else if self.header.public_key.is_none() && (!votes.is_empty() || locked_at.is_some()) {
            Some("an observer gives none")
        } else if said(VoteKind::Commit) > 0 && said(VoteKind::Abort) > 0 {
            Some("it was committed to and aborted")
        } else if said(VoteKind::Commit) > 0 && !certified {
            Some("it was committed to without its certificate")
        } else if (said(VoteKind::Approve) > 0) != locked_at.is_some() {
            Some("it was approved without locks, or locked without approval")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            return Err(ImportFault::Votes(wrong).into());
        }
        let mut slots = Vec::new();
        for certificate in certificates {
            let abort = certificate.kind == VoteKind::Abort;
            if slots.contains(&abort) {
                return Err(ImportFault::OtherCertificate.into());
            }
            slots.push(abort);
            self.check_certificate(&txid, &certificate, true)?;
            self.kept.entry(txid).or_default().push(certificate);
        }
        self.votes.insert(txid, votes);
        self.flights.insert(txid, InFlight { transaction: Arc::new(transaction), locked_at });
        self.recent.insert(txid, Recent::Unsettled);
        Ok(())
    }

    pub(super) fn is_in_flight(&self, txid: &Txid) -> bool {
        self.recent.contains_key(txid) || self.flights.contains_key(txid)
    }

    /// What is in flight, as so many further commits would have written it: one record has to
    /// be far below what a record may hold. Gives the number of the last.
    pub(super) fn write_flights(&mut self) -> Result<u64, Stop> {
        let mut commit = self.header.commit;
        let (flights, mut votes) = (std::mem::take(&mut self.flights), std::mem::take(&mut self.votes));
        let mut kept = std::mem::take(&mut self.kept);
        let flights: Vec<_> = flights.into_iter().collect();
        for begun in flights.chunks(FLIGHTS_IN_RECORD) {
            commit += 1;
            let key = commit.to_be_bytes();
            let bodies: Vec<_> = begun.iter().map(|(_, flight)| StoredInFlight::new(flight)).collect();
            put_record(&mut self.rows, TreeId::Locks, &key, &bodies)?;
            let of = |txid: &Txid| votes.remove(txid).unwrap_or_default();
            let given = begun.iter().map(|(txid, _)| *txid).zip(begun.iter().map(|(txid, _)| txid).map(of));
            let given: Vec<_> =
                given.flat_map(|(txid, kinds)| kinds.into_iter().map(move |kind| Vote { kind, txid })).collect();
            if !given.is_empty() {
                put_record(&mut self.rows, TreeId::Votes, &key, &given)?;
            }
            let held: Vec<_> = begun.iter().filter_map(|(txid, _)| kept.remove(txid)).flatten().collect();
            if !held.is_empty() {
                put_record(&mut self.rows, TreeId::Certificates, &key, &StoredCertificates::of(&held))?;
            }
            self.write()?;
        }
        Ok(commit)
    }

    pub(super) fn dead(&mut self, record: &DeadRecord) -> Result<(), Stop> {
        let DeadRecord { txid, by, height } = *record;
        if height == 0 || height > self.tip.height {
            return Err(ImportFault::NoSuchBlock.into());
        }
        let known = self.storage.trees.get(TreeId::Dead).get(txid.as_bytes())?.is_some();
        if known || self.is_settled(&txid)? || self.is_in_flight(&txid) {
            return Err(ImportFault::Twice(txid).into());
        }
        let row = encode(TreeId::Dead, &Dead { by, height })?;
        self.put(TreeId::Dead, txid.as_bytes(), row);
        self.recent.insert(txid, Recent::Unsettled);
        Ok(())
    }

    /// The new fence is put up around everything; what was behind the old one stays fenced.
    pub(super) fn fenced(&mut self, outpoint: &OutPoint) {
        let key = outpoint_key(outpoint).to_vec();
        self.rows.push(RowChange { tree: TreeId::Fence, key, value: Some(Vec::new()) });
    }

    pub(super) fn subscription(&mut self, record: SubscriptionRecord) -> Result<(), Stop> {
        let SubscriptionRecord { subscriber_id, token_hash, outpoints, addresses, last_used } = record;
        let token_hash = hex::decode(&token_hash).ok().and_then(|hash| <[u8; 32]>::try_from(hash).ok());
        let token_hash = token_hash.ok_or(ImportFault::Subscription)?;
        let named = !subscriber_id.is_empty() && subscriber_id.len() <= MAX_TEXT;
        let foreign = addresses.iter().any(|address| address.network() != self.rules.network);
        if !named || foreign || outpoints.len() + addresses.len() > MAX_SUBSCRIPTION_FILTERS {
            return Err(ImportFault::Subscription.into());
        }
        let key = SubscriptionKey::of(&subscriber_id);
        let subscription = Subscription { subscriber_id, token_hash, outpoints, addresses, last_used };
        put_record(&mut self.rows, TreeId::Subscriptions, key.as_bytes(), &subscription)?;
        Ok(())
    }
}
