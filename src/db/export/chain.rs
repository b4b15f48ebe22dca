//! Blocks and settled transactions of an export.

use std::collections::BTreeMap;

use super::super::DatabaseError;
use super::super::codec::{RowChange, put_record};
use super::super::confirmed::{Confirming, StoredConfirmed};
use super::super::finals::{is_final, put_proofs};
use super::super::outputs::{OutputRow, StoredOutput, row_of};
use super::super::schema::{StoredSettled, TreeId, outpoint_key};
use super::import::{Import, Recent, Stop};
use super::{ImportFault, SettledRecord};
use crate::consensus::{Certificate, CheckedBlock, Rejection, Signable, SignedTransaction, VoteKind, check_form};
use crate::types::{Amount, DecidedBlock, OutPoint, Output, RawTransaction, Transaction, Txid};

/// A block some of whose transactions have not come yet.
#[derive(Debug)]
pub(super) struct OpenBlock {
    decided: DecidedBlock,
    /// How many of them have come.
    come: usize,
    fees: Amount,
    confirming: Confirming,
}

/// An output that something here has made.
struct Made {
    outpoint: OutPoint,
    output: Output,
    /// As the fees of a block: of those only their row tells.
    as_fees: bool,
}

impl Import<'_> {
    /// Every transaction of the last block has come.
    pub(super) fn all_here(&self) -> Result<(), Stop> {
        match &self.open {
            Some(open) => Err(ImportFault::MissingTransaction(open.decided.block.transactions[open.come]).into()),
            None => Ok(()),
        }
    }

    pub(super) fn block(&mut self, decided: DecidedBlock) -> Result<(), Stop> {
        self.all_here()?;
        let block = &decided.block;
        let next = block.height == self.tip.height + 1 && block.previous_hash == self.tip.hash;
        if !next || block.timestamp_ms <= self.tip.timestamp_ms {
            return Err(ImportFault::NotNext.into());
        }
        if block.state_digest != self.tip.digest.digest() {
            return Err(ImportFault::StateDigest.into());
        }
        let checked = CheckedBlock::new(decided.clone(), &self.committee).map_err(ImportFault::from)?;
        let line = self.line;
        self.check_seal(|seal| seal.add(line, Signable::Blocks(vec![checked])))?;
        put_record(&mut self.rows, TreeId::Blocks, &block.height.to_be_bytes(), &decided)?;
        let empty = block.transactions.is_empty();
        self.open = Some(OpenBlock { decided, come: 0, fees: Amount::ZERO, confirming: Confirming::default() });
        if empty { self.close_block() } else { Ok(()) }
    }

    /// All its transactions are here: its proposer gets the fees, and it is the tip.
    fn close_block(&mut self) -> Result<(), Stop> {
        let Some(OpenBlock { decided, fees, confirming, .. }) = self.open.take() else { return Ok(()) };
        confirming.put(&mut self.rows)?;
        let (block, hash) = (&decided.block, decided.certificate.block_hash);
        if fees > Amount::ZERO {
            let proposer = self.committee.index_of(&block.proposer).ok_or(ImportFault::NotNext)?;
            let address = self.committee.member(proposer).payout_address;
            let (txid, output) = (Txid::from_bytes(*hash.as_bytes()), Output { amount: fees, address });
            let outpoint = OutPoint { txid, vout: 0 };
            self.tip.digest.add(&outpoint, &output);
            // No body tells of it, so its own row does until the outputs come.
            let row = OutputRow { settled: None, outputs: vec![StoredOutput::Live(output)] };
            row.put(&mut self.rows, &outpoint)?;
            self.recent.insert(txid, Recent::Fees(output));
            self.made += 1;
        }
        (self.tip.height, self.tip.hash, self.tip.timestamp_ms) = (block.height, hash, block.timestamp_ms);
        Ok(())
    }

    pub(super) fn settled(&mut self, record: SettledRecord) -> Result<(), Stop> {
        let SettledRecord { transaction, settled, height, confirmed_at, certificate } = record;
        let transaction = self.signed(transaction)?;
        let txid = transaction.txid();
        if self.is_settled(&txid)? {
            return Err(ImportFault::Twice(txid).into());
        }
        let (inputs, fee) = self.inputs(&transaction)?;
        if fee != settled.fee {
            return Err(ImportFault::Fee.into());
        }
        match (height, confirmed_at) {
            (Some(height), Some(confirmed_at)) => {
                self.of_block(&transaction, &inputs, fee, StoredConfirmed { height, confirmed_at })?;
            }
            (Some(_), None) | (None, Some(_)) => return Err(ImportFault::OutOfOrder.into()),
            (None, None) => {
                if certificate.as_ref().is_none_or(|certificate| certificate.kind != VoteKind::Commit) {
                    return Err(ImportFault::Unproved.into());
                }
                self.unconfirmed.push(txid);
                self.unconfirmed_inputs += transaction.inputs().len() as u64;
                self.unconfirmed_outputs += transaction.outputs().len() as u64;
                self.unpaid_fees = self.unpaid_fees.saturating_add(fee.units());
            }
        }
        if let Some(certificate) = &certificate {
            if certificate.kind == VoteKind::Abort {
                return Err(ImportFault::OtherCertificate.into());
            }
            // What is in a block is proved by the block.
            self.check_certificate(&txid, certificate, height.is_none())?;
        }
        let settled = StoredSettled { settled, number: self.next_body };
        // What becomes of its outputs comes later, or is forgotten.
        for (first, row) in empty_rows(settled, &transaction) {
            row.put(&mut self.rows, &first)?;
        }
        put_proofs(&mut self.rows, self.next_body, certificate.as_slice())?;
        self.next_body += 1;
        self.recent.insert(txid, Recent::Settled(transaction.outputs().to_vec()));
        self.made += transaction.outputs().len() as u64;
        self.bodies.push(transaction);
        let complete = |open: &OpenBlock| open.come == open.decided.block.transactions.len();
        if self.open.as_ref().is_some_and(complete) { self.close_block() } else { Ok(()) }
    }

    /// The next transaction of the open block.
    fn of_block(
        &mut self,
        transaction: &Transaction,
        inputs: &[Made],
        fee: Amount,
        confirmed: StoredConfirmed,
    ) -> Result<(), Stop> {
        let txid = transaction.txid();
        let open = self.open.as_mut().ok_or(ImportFault::OutOfOrder)?;
        let expected = open.decided.block.transactions[open.come];
        if expected != txid || confirmed.height != open.decided.block.height {
            return Err(ImportFault::MissingTransaction(expected).into());
        }
        open.come += 1;
        open.fees = open.fees.checked_add(fee).ok_or(ImportFault::Fee)?;
        open.confirming.add(self.next_body, confirmed);
        for Made { outpoint, output, as_fees } in inputs {
            self.tip.digest.remove(outpoint, output);
            if *as_fees {
                let key = outpoint_key(outpoint).to_vec();
                self.rows.push(RowChange { tree: TreeId::Utxos, key, value: None });
            }
        }
        for (outpoint, output) in transaction.creates() {
            self.tip.digest.add(&outpoint, &output);
        }
        Ok(())
    }

    /// A well-formed transaction whose signatures will be checked.
    pub(super) fn signed(&mut self, raw: RawTransaction) -> Result<Transaction, Stop> {
        let transaction = check_form(raw, &self.rules).map_err(ImportFault::from)?;
        let signed = SignedTransaction::new(transaction.clone(), self.genesis.hash());
        let line = self.line;
        self.check_seal(|seal| seal.add(line, Signable::Transaction(signed)))?;
        Ok(transaction)
    }

    /// What a transaction spends, and the fee that it leaves. Every input has to be there and
    /// to belong to whoever signed for it.
    fn inputs(&self, transaction: &Transaction) -> Result<(Vec<Made>, Amount), Stop> {
        let mut inputs = Vec::with_capacity(transaction.inputs().len());
        for (index, input) in transaction.inputs().iter().enumerate() {
            let outpoint = input.previous_output;
            let made = self.made(&outpoint)?;
            let made = made.ok_or_else(|| ImportFault::from(Rejection::UnknownInput(outpoint)))?;
            if !made.output.address.is_owned_by(&input.public_key) {
                return Err(ImportFault::from(Rejection::WrongOwner(index)).into());
            }
            inputs.push(made);
        }
        let sum = Amount::checked_sum(inputs.iter().map(|made| made.output.amount));
        let outputs = Amount::checked_sum(transaction.outputs().iter().map(|output| output.amount));
        let fee = sum.zip(outputs).and_then(|(inputs, outputs)| inputs.checked_sub(outputs));
        Ok((inputs, fee.ok_or(ImportFault::Fee)?))
    }

    /// An output that the genesis, a settled transaction or a block's fees have made.
    fn made(&self, outpoint: &OutPoint) -> Result<Option<Made>, DatabaseError> {
        let at = |outputs: &[Output]| outputs.get(usize::try_from(outpoint.vout).unwrap_or(usize::MAX)).copied();
        let made = |output, as_fees| Made { outpoint: *outpoint, output, as_fees };
        if outpoint.txid == self.genesis.transaction().txid() {
            return Ok(at(self.genesis.transaction().outputs()).map(|output| made(output, false)));
        }
        match self.recent.get(&outpoint.txid) {
            Some(Recent::Settled(outputs)) => return Ok(at(outputs).map(|output| made(output, false))),
            Some(Recent::Fees(output)) => return Ok((outpoint.vout == 0).then(|| made(*output, true))),
            Some(Recent::Unsettled) | None => {}
        }
        match self.body(&outpoint.txid)? {
            Some(transaction) => Ok(at(transaction.outputs()).map(|output| made(output, false))),
            None => Ok(self.utxo(outpoint)?.map(|utxo| made(utxo.output, true))),
        }
    }

    pub(super) fn is_settled(&self, txid: &Txid) -> Result<bool, DatabaseError> {
        Ok(self.recent.contains_key(txid) || is_final(&self.storage.trees, txid)?)
    }

    /// A certificate has to be that of its transaction, and its signatures, if that is asked
    /// for, have to verify.
    pub(super) fn check_certificate(
        &mut self,
        txid: &Txid,
        certificate: &Certificate,
        verify: bool,
    ) -> Result<(), Stop> {
        if certificate.txid != *txid {
            return Err(ImportFault::OtherCertificate.into());
        }
        let checked = certificate.clone().check(&self.committee).map_err(ImportFault::from)?;
        let line = self.line;
        if verify { self.check_seal(|seal| seal.add(line, Signable::Certificate(checked))) } else { Ok(()) }
    }
}

/// The rows of a settled transaction's outputs, before anything is known of those.
fn empty_rows(settled: StoredSettled, transaction: &Transaction) -> BTreeMap<OutPoint, OutputRow> {
    let first = OutPoint { txid: transaction.txid(), vout: 0 };
    let mut rows = BTreeMap::from([(first, OutputRow { settled: Some(settled), outputs: Vec::new() })]);
    for (outpoint, _) in transaction.creates() {
        rows.entry(row_of(&outpoint)).or_default().set(&outpoint, StoredOutput::Forgotten);
    }
    rows
}
