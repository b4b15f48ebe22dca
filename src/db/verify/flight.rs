//! What is in flight: locks, own votes, and the certificates beside them.

use std::collections::BTreeMap;

use super::super::DatabaseError;
use super::super::codec::records;
use super::super::schema::{StoredInFlight, TreeId, certificate_slot};
use super::{Check, Damage, Subject};
use crate::consensus::{Certificate, Vote, VoteKind};
use crate::types::{OutPoint, Txid, UTXOState};

impl Subject<'_> {
    /// This member's votes on what is in flight. They are bounded by what can be in flight.
    fn own_votes(&self) -> Result<BTreeMap<Txid, Vec<VoteKind>>, DatabaseError> {
        let mut votes: BTreeMap<Txid, Vec<VoteKind>> = BTreeMap::new();
        for record in records::<Vec<Vote>>(self.reader.tree(TreeId::Votes), TreeId::Votes) {
            for vote in record?.1 {
                if self.reader.is_in_flight(&vote.txid)? {
                    votes.entry(vote.txid).or_default().push(vote.kind);
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
}

pub(super) fn locks(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let votes = subject.own_votes()?;
    let member = subject.reader.network().public_key.is_some();
    for record in records::<StoredInFlight>(subject.reader.tree(TreeId::Locks), TreeId::Locks) {
        subject.tell(check);
        let (key, stored) = match record {
            Ok(record) => record,
            Err(error) => {
                check.find(Damage::Votes, "locks", error.to_string());
                continue;
            }
        };
        let transaction = stored.transaction.into_transaction();
        let txid = transaction.txid();
        let place = || format!("locks/{txid}");
        check.ensure(key == txid.as_bytes(), Damage::Votes, place, "its body is another transaction's");
        let approved = votes.get(&txid).is_some_and(|kinds| kinds.contains(&VoteKind::Approve));
        let locked = stored.locked_at.is_some();
        let what = if locked { "it holds locks and there is no vote" } else { "it was approved and holds no locks" };
        check.ensure(approved == locked, Damage::Votes, place, what);
        check.ensure(member || !locked, Damage::Votes, place, "an observer holds locks");
        for outpoint in transaction.spends().filter(|_| locked) {
            let held = subject.locked_or_beaten(&outpoint, &txid)?;
            check.ensure(held, Damage::Votes, place, "one of its inputs is not locked for it");
        }
    }
    Ok(())
}

pub(super) fn votes(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let reader = &subject.reader;
    for record in records::<Vec<Vote>>(reader.tree(TreeId::Votes), TreeId::Votes) {
        subject.tell(check);
        let (key, row) = match record {
            Ok(record) => record,
            Err(error) => {
                check.find(Damage::Votes, "votes", error.to_string());
                continue;
            }
        };
        let commit = <[u8; 8]>::try_from(key.as_slice()).map_or(0, u64::from_be_bytes);
        let place = || format!("votes/{commit}");
        let told = commit > 0 && commit <= subject.head.commit;
        check.ensure(told, Damage::Votes, place, "they are of a commit that never was");
        let mut needed = false;
        for vote in row {
            let in_flight = reader.is_in_flight(&vote.txid)?;
            needed |= in_flight;
            let ended = in_flight || reader.is_final(&vote.txid)? || reader.dead(&vote.txid)?.is_some();
            check.ensure(ended, Damage::Votes, place, "a vote on a transaction that is not here");
        }
        check.ensure(needed, Damage::Derived, place, "none of them is on anything in flight");
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
    for record in records::<Certificate>(reader.tree(TreeId::Certificates), TreeId::Certificates) {
        subject.tell(check);
        let (key, certificate) = match record {
            Ok(record) => record,
            Err(error) => {
                check.find(Damage::Ledger, "certificates", error.to_string());
                continue;
            }
        };
        let txid = certificate.txid;
        let place = || format!("certificates/{txid}");
        let fits = key.len() == 33 && key[..32] == *txid.as_bytes() && key[32] == certificate_slot(certificate.kind);
        check.ensure(fits, Damage::Ledger, place, "it stands under another transaction or in another slot");
        let needed = reader.is_in_flight(&txid)? || reader.is_final(&txid)?;
        check.ensure(needed, Damage::Derived, place, "its transaction is neither in flight nor settled");
        if let Some(committee) = &subject.committee
            && let Err(error) = certificate.verify(committee)
        {
            check.find(Damage::Ledger, place(), error.to_string());
        }
    }
    if subject.committee.is_none() {
        check.left_out = Some("the members' signatures: the genesis file was not given".into());
    }
    Ok(())
}
