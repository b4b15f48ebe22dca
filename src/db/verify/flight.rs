//! What is in flight: locks, own votes, and the certificates beside them.

use std::collections::{BTreeMap, BTreeSet};

use super::super::DatabaseError;
use super::super::codec::records;
use super::super::pack::StoredCertificates;
use super::super::schema::{StoredInFlight, TreeId, parse_outpoint_key};
use super::{Check, Damage, Subject};
use crate::consensus::{Vote, VoteKind};
use crate::types::{OutPoint, Txid, UTXOState};

impl Subject<'_> {
    /// This member's votes on what is in flight. They are bounded by what can be in flight.
    fn own_votes(&self) -> Result<BTreeMap<Txid, BTreeSet<VoteKind>>, DatabaseError> {
        let mut votes: BTreeMap<Txid, BTreeSet<VoteKind>> = BTreeMap::new();
        for record in records::<Vec<Vote>>(self.reader.tree(TreeId::Votes), TreeId::Votes) {
            for vote in record?.1 {
                if self.reader.is_in_flight(&vote.txid)? {
                    votes.entry(vote.txid).or_default().insert(vote.kind);
                }
            }
        }
        Ok(votes)
    }

    /// Whether an output is locked for a transaction, or was until a settled rival spent it.
    fn locked_or_beaten(&self, outpoint: &OutPoint, txid: &Txid) -> Result<bool, DatabaseError> {
        let state = self.reader.utxo(outpoint)?.map(|utxo| utxo.state);
        Ok(match state {
            Some(UTXOState::Locked { txid: by, .. }) => by == *txid,
            Some(UTXOState::SpentFinalized { txid: by, .. } | UTXOState::Confirmed { txid: by, .. }) => by != *txid,
            Some(UTXOState::Unspent) | None => false,
        })
    }

    fn has_ended(&self, txid: &Txid) -> Result<bool, DatabaseError> {
        Ok(self.reader.is_final(txid)? || self.reader.dead(txid)?.is_some())
    }

    /// A record of a commit: its number has been given, and something of it is still needed.
    fn check_commit(
        &self,
        check: &mut Check,
        tree: TreeId,
        key: &[u8],
        txids: impl Iterator<Item = Txid>,
    ) -> Result<(), DatabaseError> {
        let commit = <[u8; 8]>::try_from(key).map_or(0, u64::from_be_bytes);
        let place = || format!("{}/{commit}", tree.name());
        let told = key.len() == 8 && commit <= self.head.commit;
        check.ensure(told, Damage::Votes, place, "it is of a commit that never was");
        for txid in txids {
            let known = self.reader.is_in_flight(&txid)? || self.has_ended(&txid)?;
            check.ensure(known, Damage::Votes, place, "it is about a transaction that is not here");
        }
        Ok(())
    }
}

pub(super) fn locks(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let votes = subject.own_votes()?;
    let member = subject.reader.network().public_key.is_some();
    for record in records::<Vec<StoredInFlight>>(subject.reader.tree(TreeId::Locks), TreeId::Locks) {
        match record {
            Ok((key, _)) => subject.check_commit(check, TreeId::Locks, &key, std::iter::empty())?,
            Err(error) => check.unreadable(Damage::Votes, "locks", error)?,
        }
    }
    let mut after = None;
    loop {
        let flights = subject.reader.in_flight_after(after, 1_024);
        let Some(last) = flights.last().map(|flight| flight.transaction.txid()) else { break };
        after = Some(last);
        for flight in flights {
            subject.tell(check);
            let txid = flight.transaction.txid();
            let place = || format!("locks/{txid}");
            let approved = votes.get(&txid).is_some_and(|kinds| kinds.contains(&VoteKind::Approve));
            let locked = flight.locked_at.is_some();
            let what =
                if locked { "it holds locks and there is no vote" } else { "it was approved and holds no locks" };
            check.ensure(approved == locked, Damage::Votes, place, what);
            check.ensure(member || !locked, Damage::Votes, place, "an observer holds locks");
            for outpoint in flight.transaction.spends().filter(|_| locked) {
                let held = subject.locked_or_beaten(&outpoint, &txid)?;
                check.ensure(held, Damage::Votes, place, "one of its inputs is not locked for it");
            }
        }
    }
    Ok(())
}

pub(super) fn votes(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let reader = &subject.reader;
    for record in records::<Vec<Vote>>(reader.tree(TreeId::Votes), TreeId::Votes) {
        subject.tell(check);
        match record {
            Ok((key, row)) => {
                subject.check_commit(check, TreeId::Votes, &key, row.into_iter().map(|vote| vote.txid))?;
            }
            Err(error) => check.unreadable(Damage::Votes, "votes", error)?,
        }
    }
    for (txid, kinds) in subject.own_votes()? {
        subject.tell(check);
        let place = || format!("votes/{txid}");
        let both = kinds.contains(&VoteKind::Commit) && kinds.contains(&VoteKind::Abort);
        check.ensure(!both, Damage::Votes, place, "it was committed to and aborted");
        if kinds.contains(&VoteKind::Commit) {
            let certificate = reader.certificate(&txid, VoteKind::Approve)?;
            check.ensure(certificate.is_some(), Damage::Votes, place, "it was committed to without its certificate");
        }
    }
    Ok(())
}

pub(super) fn certificates(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let reader = &subject.reader;
    for record in records::<StoredCertificates>(reader.tree(TreeId::Certificates), TreeId::Certificates) {
        subject.tell(check);
        let whole =
            |(key, stored): (Vec<u8>, StoredCertificates)| Ok((key, stored.into_certificates(TreeId::Certificates)?));
        let (key, certificates) = match record.and_then(whole) {
            Ok(record) => record,
            Err(error) => {
                check.unreadable(Damage::Votes, "certificates", error)?;
                continue;
            }
        };
        let txids = certificates.iter().map(|certificate| certificate.txid).collect::<Vec<_>>();
        subject.check_commit(check, TreeId::Certificates, &key, txids.into_iter())?;
        for certificate in certificates {
            let place = format!("certificates/{}", certificate.txid);
            if let Some(committee) = &subject.committee
                && let Err(error) = certificate.verify(committee)
            {
                check.find(Damage::Votes, place, error.to_string());
            }
        }
    }
    if subject.committee.is_none() {
        check.left_out = Some("the members' signatures: the genesis file was not given".into());
    }
    Ok(())
}

pub(super) fn fence(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    for row in subject.reader.tree(TreeId::Fence).iter() {
        subject.tell(check);
        let (key, _) = row?;
        let place = || format!("fence/{}", hex::encode(&key));
        check.ensure(parse_outpoint_key(&key).is_some(), Damage::Votes, place, "a key of the wrong length");
    }
    Ok(())
}
