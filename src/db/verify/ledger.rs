//! Outputs, settled transactions, and the sums over them.

use std::collections::BTreeMap;

use super::super::DatabaseError;
use super::super::codec::{decode, records};
use super::super::confirmed::confirmed_of_row;
use super::super::finals::with_body;
use super::super::outputs::{StoredOutput, get_output, output_rows};
use super::super::pack::StoredCertificates;
use super::super::schema::{StoredTransaction, TreeId, address_key, parse_outpoint_key};
use super::{Check, Damage, Subject};
use crate::consensus::{Dead, SignedTransaction, Verified, VoteKind};
use crate::types::{Address, DecidedBlock, Height, OutPoint, Transaction, Txid, UTXOState, UtxoDigest};

/// Transactions whose signatures are checked together.
const SIGNATURES_AT_ONCE: usize = 256;

impl Subject<'_> {
    fn is_in_flight_with(&self, txid: &Txid, outpoint: &OutPoint) -> Result<bool, DatabaseError> {
        Ok(self.reader.in_flight(txid)?.is_some_and(|transaction| spends(&transaction, outpoint)))
    }

    /// Whether the output was made by the chain: by the genesis, by a confirmed transaction,
    /// or as a block's fees.
    fn is_of_chain(&self, outpoint: &OutPoint) -> Result<bool, DatabaseError> {
        // Whatever has no body here was made by the genesis or as fees.
        Ok(!self.reader.is_final(&outpoint.txid)? || self.reader.confirmed(&outpoint.txid)?.is_some())
    }
}

fn spends(transaction: &Transaction, outpoint: &OutPoint) -> bool {
    transaction.spends().any(|spent| spent == *outpoint)
}

/// An output whose row can be read; what cannot be read is told by the check of the outputs.
fn told_of<T>(row: Result<T, DatabaseError>) -> Result<Option<T>, DatabaseError> {
    match row {
        Ok(row) => Ok(Some(row)),
        Err(error) if error.is_damage() => Ok(None),
        Err(error) => Err(error),
    }
}

pub(super) fn utxos(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let reader = &subject.reader;
    for row in subject.reader.outputs() {
        subject.tell(check);
        let (outpoint, utxo) = match row {
            Ok(row) => row,
            Err(error) => {
                check.unreadable(Damage::Ledger, "utxos", error)?;
                continue;
            }
        };
        let place = || format!("utxos/{outpoint}");
        match utxo.state {
            UTXOState::Unspent => {}
            UTXOState::Locked { txid, .. } => {
                let held = subject.is_in_flight_with(&txid, &outpoint)?;
                check.ensure(held, Damage::Votes, place, "it is locked for a transaction that is not in flight");
            }
            UTXOState::SpentFinalized { txid, .. } => {
                let spent = reader.finalized(&txid)?.is_some_and(|(transaction, _)| spends(&transaction, &outpoint));
                check.ensure(spent, Damage::Ledger, place, "its spender is not settled here, or does not spend it");
                let open = reader.confirmed(&txid)?.is_none();
                check.ensure(open, Damage::Ledger, place, "its spender is in the chain, and it is not confirmed");
            }
            UTXOState::Confirmed { txid, block_height, .. } => {
                let spent = reader.finalized(&txid)?.is_some_and(|(transaction, _)| spends(&transaction, &outpoint));
                check.ensure(spent, Damage::Ledger, place, "its spender is not settled here, or does not spend it");
                let there = reader.confirmed(&txid)? == Some(block_height);
                check.ensure(there, Damage::Ledger, place, "its spender is not in the block that it names");
            }
        }
    }
    Ok(())
}

pub(super) fn addresses(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let tree = subject.reader.tree(TreeId::Addresses);
    for row in subject.reader.outputs() {
        subject.tell(check);
        let Some((outpoint, utxo)) = told_of(row)? else { continue };
        let indexed = tree.get(address_key(&utxo.output.address, &outpoint))?.is_some();
        let place = || format!("addresses/{}/{outpoint}", utxo.output.address);
        check.ensure(indexed == utxo.state.is_live(), Damage::Derived, place, "a row is missing, or one too many");
    }
    for row in tree.iter() {
        subject.tell(check);
        let (key, _) = row?;
        let parsed = key.split_at_checked(Address::PAYLOAD_LEN);
        let outpoint = parsed.and_then(|(payload, rest)| Some((payload, parse_outpoint_key(rest)?)));
        let utxo = match outpoint {
            Some((payload, outpoint)) => {
                let utxo = subject.reader.utxo(&outpoint)?;
                utxo.filter(|utxo| utxo.output.address.payload() == payload)
            }
            None => None,
        };
        let place = || format!("addresses/{}", hex::encode(&key));
        check.ensure(utxo.is_some(), Damage::Derived, place, "it names no output of its address");
    }
    Ok(())
}

pub(super) fn transactions(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let reader = &subject.reader;
    let (trees, forgotten) = (&reader.shared.trees, reader.forgotten()?);
    let mut signed = Vec::new();
    let mut settled = 0;
    for row in output_rows(reader.tree(TreeId::Utxos)) {
        subject.tell(check);
        // What cannot be read is told by the check of the outputs.
        let Some((first, row)) = told_of(row)? else { continue };
        let Some(stored) = row.settled else { continue };
        check.ensure(first.vout == 0, Damage::Ledger, || format!("utxos/{first}"), "it is no transaction's first row");
        settled += 1;
        let stored = match with_body(reader.tree(TreeId::Transactions), stored) {
            Ok(stored) => stored,
            Err(error) => {
                check.unreadable(Damage::Ledger, "transactions", error)?;
                continue;
            }
        };
        let transaction = stored.transaction.into_transaction();
        let txid = transaction.txid();
        let place = || format!("transactions/{txid}");
        check.ensure(first.txid == txid, Damage::Ledger, place, "its body is another transaction's");
        let height = reader.confirmed(&txid)?;
        let proved = match height {
            Some(_) => true,
            None => reader.proof(&txid)?.is_some_and(|proof| proof.kind == VoteKind::Commit),
        };
        check.ensure(proved, Damage::Ledger, place, "it is settled by neither a block nor a finality proof");
        // Whoever has spent it was in no block before.
        let forgets = height.is_some_and(|height| height <= forgotten);
        for (outpoint, output) in transaction.creates() {
            let whole = match get_output(trees, &outpoint)? {
                Some(stored) => stored.output().map_or(forgets, |stored| stored == output),
                None => false,
            };
            check.ensure(whole, Damage::Ledger, place, "an output is missing or another one");
        }
        for outpoint in transaction.spends() {
            let spent = match get_output(trees, &outpoint)? {
                Some(StoredOutput::Spent(_, by)) => by == txid,
                // Rows of none but what the genesis or a block's fees have made may be gone as a whole.
                Some(StoredOutput::Forgotten) | None => forgets,
                Some(StoredOutput::Live(_)) => false,
            };
            check.ensure(spent, Damage::Ledger, place, "an input is not spent by it");
        }
        let in_flight = reader.is_in_flight(&txid)?;
        check.ensure(!in_flight, Damage::Derived, place, "it is settled and in flight at once");
        if subject.options.full {
            signed.push(SignedTransaction::new(transaction, reader.network().genesis_hash));
            if signed.len() >= SIGNATURES_AT_ONCE {
                check_signatures(check, std::mem::take(&mut signed));
            }
        }
    }
    check_signatures(check, signed);
    proofs(subject, check)?;
    let bodies = bodies_count(subject, check)?;
    check.ensure(settled == bodies, Damage::Ledger, || "transactions".into(), "some bodies are of nothing settled");
    if subject.committee.is_none() {
        check.left_out = Some("the members' signatures: the genesis file was not given".into());
    } else if !subject.options.full {
        check.left_out = Some("the owners' signatures: use --full".into());
    }
    Ok(())
}

/// Every finality proof: of a settled transaction, and good.
fn proofs(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let reader = &subject.reader;
    for record in records::<StoredCertificates>(reader.tree(TreeId::Proofs), TreeId::Proofs) {
        subject.tell(check);
        let proofs = match record.and_then(|(_, stored)| stored.into_certificates(TreeId::Proofs)) {
            Ok(proofs) => proofs,
            Err(error) => {
                check.unreadable(Damage::Ledger, "proofs", error)?;
                continue;
            }
        };
        for proof in proofs {
            let place = format!("proofs/{}", proof.txid);
            let settled = reader.is_final(&proof.txid)?;
            check.ensure(settled, Damage::Ledger, || place.clone(), "it is the proof of what is not settled");
            if let Some(committee) = &subject.committee
                && let Err(error) = proof.verify(committee)
            {
                check.find(Damage::Ledger, place, format!("the finality proof: {error}"));
            }
        }
    }
    Ok(())
}

/// The number of bodies, which have to follow one another without a gap.
fn bodies_count(subject: &Subject<'_>, check: &mut Check) -> Result<u64, DatabaseError> {
    let tree = subject.reader.tree(TreeId::Transactions);
    let mut next = 0_u64;
    for record in records::<Vec<StoredTransaction>>(tree, TreeId::Transactions) {
        subject.tell(check);
        let (key, bodies) = match record {
            Ok(record) => record,
            Err(error) => {
                check.unreadable(Damage::Ledger, "transactions", error)?;
                continue;
            }
        };
        let place = || format!("transactions/{}", hex::encode(&key));
        let dense = key == next.to_be_bytes() && !bodies.is_empty();
        check.ensure(dense, Damage::Ledger, place, "it does not follow the record before");
        next += bodies.len() as u64;
    }
    Ok(next)
}

fn check_signatures(check: &mut Check, signed: Vec<SignedTransaction>) {
    for forged in Verified::check_all(signed).into_iter().filter_map(Result::err) {
        let place = format!("transactions/{}", forged.transaction().txid());
        check.find(Damage::Ledger, place, "an owner's signature does not verify");
    }
}

pub(super) fn confirmed(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let reader = &subject.reader;
    // Of each height, how many transactions are in its block, and how many are said to be.
    let mut counted: BTreeMap<Height, (u64, u64)> = BTreeMap::new();
    // Those that are here, not those that the tip claims: a damaged one may claim any number.
    for record in records::<DecidedBlock>(reader.tree(TreeId::Blocks), TreeId::Blocks) {
        let (key, decided) = record?;
        let height = <[u8; 8]>::try_from(key.as_slice()).map_or(0, Height::from_be_bytes);
        if height == 0 || height > subject.tip.height {
            continue;
        }
        counted.entry(height).or_default().0 += decided.block.transactions.len() as u64;
        for txid in &decided.block.transactions {
            subject.tell(check);
            let place = || format!("confirmed/{txid}");
            check.ensure(reader.confirmed(txid)? == Some(height), Damage::Ledger, place, "another height, or none");
            check.ensure(reader.is_final(txid)?, Damage::Ledger, place, "its body is missing");
        }
    }
    for row in reader.tree(TreeId::Confirmed).iter() {
        let (key, value) = row?;
        match confirmed_of_row(&key, &value) {
            Ok(all) => all.iter().for_each(|(_, told)| counted.entry(told.height).or_default().1 += 1),
            Err(error) => check.unreadable(Damage::Ledger, format!("confirmed/{}", hex::encode(&key)), error)?,
        }
    }
    for (height, (in_block, told)) in counted {
        if in_block != told {
            let what = format!("its block has {in_block} transactions, and {told} are said to be in it");
            check.find(Damage::Ledger, format!("confirmed/height {height}"), what);
        }
    }
    Ok(())
}

pub(super) fn dead(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let reader = &subject.reader;
    for row in reader.tree(TreeId::Dead).iter() {
        subject.tell(check);
        let (key, value) = row?;
        let place = || format!("dead/{}", hex::encode(&key));
        let Ok(txid) = <[u8; 32]>::try_from(key.as_ref()).map(Txid::from_bytes) else {
            check.find(Damage::Ledger, place(), "a key of the wrong length");
            continue;
        };
        let dead: Dead = decode(TreeId::Dead, &value)?;
        let killed = dead.height > 0 && dead.height <= subject.tip.height;
        check.ensure(killed, Damage::Ledger, place, "it was killed by a block that is not here");
        check.ensure(!reader.is_final(&txid)?, Damage::Ledger, place, "it is settled");
        check.ensure(!reader.is_in_flight(&txid)?, Damage::Derived, place, "it is in flight");
    }
    Ok(())
}

/// Fees of what is final and in no block yet are nobody's until a block pays them.
pub(super) fn supply(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let reader = &subject.reader;
    let (mut live, mut fees) = (0_u128, 0_u128);
    for row in subject.reader.outputs() {
        subject.tell(check);
        let Some((_, utxo)) = told_of(row)? else { continue };
        if utxo.state.is_live() {
            live += u128::from(utxo.output.amount.units());
        }
    }
    let end = subject.head.sequence;
    let mut after = subject.unconfirmed_from.saturating_sub(1);
    let mut seen = std::collections::BTreeSet::new();
    while after < end {
        let (txids, last) = reader.unconfirmed(after, end, 4_096)?;
        if last == after {
            break;
        }
        after = last;
        for txid in txids.into_iter().filter(|txid| seen.insert(*txid)) {
            fees += reader.settled(&txid)?.map_or(0, |settled| u128::from(settled.fee.units()));
        }
    }
    let expected = match subject.options.genesis {
        Some(genesis) => genesis.transaction().outputs().iter().map(|output| u128::from(output.amount.units())).sum(),
        None => u128::from(subject.tip.supply.units()),
    };
    let tip = u128::from(subject.tip.supply.units());
    check.ensure(tip == expected, Damage::Ledger, || "meta/chain".into(), "the tip's supply is not the genesis's");
    if live + fees != expected {
        let what = format!("outputs of {live} and unpaid fees of {fees} are not the supply of {expected}");
        check.find(Damage::Ledger, "utxos", what);
    }
    Ok(())
}

pub(super) fn digest(subject: &Subject<'_>, check: &mut Check) -> Result<(), DatabaseError> {
    let mut digest = UtxoDigest::new();
    for row in subject.reader.outputs() {
        subject.tell(check);
        let Some((outpoint, utxo)) = told_of(row)? else { continue };
        let spent_in_chain = matches!(utxo.state, UTXOState::Confirmed { .. });
        if !spent_in_chain && subject.is_of_chain(&outpoint)? {
            digest.add(&outpoint, &utxo.output);
        }
    }
    let same = digest.digest() == subject.tip.digest.digest();
    check.ensure(same, Damage::Ledger, || "utxos".into(), "their digest is not that of the chain's tip");
    Ok(())
}
