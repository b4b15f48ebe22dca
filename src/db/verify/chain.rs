//! Blocks, the digests that they name, and the agreement's log.

use std::collections::HashMap;

use super::super::DatabaseError;
use super::super::codec::records;
use super::super::schema::TreeId;
use super::{Check, Damage, Subject};
use crate::consensus::{AgreementRecord, CheckedBlock, Verified};
use crate::types::{BlockHash, DecidedBlock, OutPoint, Output, Txid, UtxoDigest};

pub(super) fn blocks(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let genesis_hash = subject.reader.network().genesis_hash;
    let (mut hash, mut timestamp_ms) = (BlockHash::from_bytes(*genesis_hash.as_bytes()), 0);
    let mut replay = subject.options.genesis.filter(|_| subject.options.full).map(|_| Replay::new(subject));
    for height in 1..=subject.tip.height {
        subject.tell(check);
        let place = || format!("blocks/{height}");
        let decided = match subject.reader.block(height) {
            Ok(Some(decided)) => decided,
            Ok(None) => {
                check.find(Damage::Ledger, place(), "it is missing");
                return Ok(());
            }
            Err(error) => {
                check.unreadable(Damage::Ledger, place(), error)?;
                return Ok(());
            }
        };
        let block = &decided.block;
        let follows = block.height == height && block.previous_hash == hash && block.timestamp_ms > timestamp_ms;
        check.ensure(follows, Damage::Ledger, place, "it does not follow the one before");
        hash = block.hash(&genesis_hash);
        timestamp_ms = block.timestamp_ms;
        check.ensure(decided.certificate.block_hash == hash, Damage::Ledger, place, "its certificate is another's");
        if let Some(replay) = &mut replay {
            replay.block(check, &decided)?;
        }
        if let Some(committee) = &subject.committee {
            let proved = CheckedBlock::new(decided, committee).map(Verified::check);
            check.ensure(matches!(proved, Ok(Ok(_))), Damage::Ledger, place, "no quorum has decided it");
        }
    }
    let rows = records::<DecidedBlock>(subject.reader.tree(TreeId::Blocks), TreeId::Blocks).count() as u64;
    check.ensure(rows == subject.tip.height, Damage::Ledger, || "blocks".into(), "there are blocks above the tip");
    check.ensure(hash == subject.tip.hash, Damage::Ledger, || "meta/chain".into(), "the tip is another block");
    if subject.committee.is_none() {
        check.left_out = Some("the members' signatures: the genesis file was not given".into());
    } else if replay.is_none() {
        check.left_out = Some("the state digest of each block: use --full".into());
    }
    Ok(())
}

/// The chain's UTXO set, executed anew from the genesis.
struct Replay<'a> {
    subject: &'a Subject<'a>,
    digest: UtxoDigest,
    /// The fees of blocks, which no transaction's body tells.
    fees: HashMap<OutPoint, Output>,
}

impl<'a> Replay<'a> {
    fn new(subject: &'a Subject<'a>) -> Self {
        let mut digest = UtxoDigest::new();
        for (outpoint, output) in subject.options.genesis.iter().flat_map(|genesis| genesis.transaction().creates()) {
            digest.add(&outpoint, &output);
        }
        Self { subject, digest, fees: HashMap::new() }
    }

    fn output(&self, outpoint: &OutPoint) -> Result<Option<Output>, DatabaseError> {
        if let Some(output) = self.fees.get(outpoint) {
            return Ok(Some(*output));
        }
        let genesis = self.subject.options.genesis.map(|genesis| genesis.transaction());
        let at = |outputs: &[Output]| outputs.get(usize::try_from(outpoint.vout).unwrap_or(usize::MAX)).copied();
        match genesis.filter(|genesis| genesis.txid() == outpoint.txid) {
            Some(genesis) => Ok(at(genesis.outputs())),
            None => Ok(self.subject.reader.finalized(&outpoint.txid)?.and_then(|(body, _)| at(body.outputs()))),
        }
    }

    fn block(&mut self, check: &mut Check, decided: &DecidedBlock) -> Result<(), DatabaseError> {
        let block = &decided.block;
        let place = || format!("blocks/{}", block.height);
        let same = self.digest.digest() == block.state_digest;
        check.ensure(same, Damage::Ledger, place, "its state digest is not that of the blocks before it");
        let mut fees = 0_u64;
        for txid in &block.transactions {
            let Some((transaction, _)) = self.subject.reader.finalized(txid)? else {
                check.find(Damage::Ledger, place(), format!("the body of {txid} is missing"));
                continue;
            };
            for outpoint in transaction.spends() {
                let Some(output) = self.output(&outpoint)? else {
                    check.find(Damage::Ledger, place(), format!("{txid} spends {outpoint}, which never was"));
                    continue;
                };
                self.digest.remove(&outpoint, &output);
                self.fees.remove(&outpoint);
                fees = fees.saturating_add(output.amount.units());
            }
            for (outpoint, output) in transaction.creates() {
                self.digest.add(&outpoint, &output);
                fees = fees.saturating_sub(output.amount.units());
            }
        }
        let proposer = self
            .subject
            .committee
            .as_ref()
            .and_then(|committee| Some(committee.member(committee.index_of(&block.proposer)?).payout_address));
        let amount = crate::types::Amount::from_units(fees).filter(|amount| amount.units() > 0);
        if let (Some(address), Some(amount)) = (proposer, amount) {
            let outpoint = OutPoint { txid: Txid::from_bytes(*decided.certificate.block_hash.as_bytes()), vout: 0 };
            let output = Output { amount, address };
            self.digest.add(&outpoint, &output);
            self.fees.insert(outpoint, output);
        }
        Ok(())
    }
}

pub(super) fn agreement(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let next = subject.tip.height.saturating_add(1);
    let tree = subject.reader.tree(TreeId::Agreement);
    for (index, record) in (0_u32..).zip(records::<AgreementRecord>(tree, TreeId::Agreement)) {
        subject.tell(check);
        match record {
            Ok((key, _)) => {
                let place = || format!("agreement/{}", hex::encode(&key));
                let expected = super::super::schema::agreement_key(next, index);
                let of_next = key == expected;
                check.ensure(of_next, Damage::Votes, place, "it is of another height, or one before it is missing");
            }
            Err(error) => check.unreadable(Damage::Votes, "agreement", error)?,
        }
    }
    Ok(())
}
