//! Transactions: each refusal is true, nothing refusable is accepted, and what is accepted
//! keeps its bytes and its txid through JSON.

use std::collections::BTreeSet;

use time_masternode::consensus::{Rejection, Signed, SignedTransaction, Verified, check_form};
use time_masternode::limits::{MAX_INPUTS, MAX_OUTPUTS, MAX_TRANSACTION_BYTES};
use time_masternode::types::{
    Address, Amount, Network, RawTransaction, Signature, SignatureItem, Transaction, Txid, sighash,
};

use super::oracle::{Canonical, tagged};
use super::setting::{EQUAL, secret_of};
use super::{Outcome, oracle};

/// More signatures than this are not checked: they take all the time.
const MAX_CHECKED_INPUTS: usize = 4;

/// The JSON of a transaction. A wrong txid is mended once, so that one is no wall.
pub fn transactions(data: &[u8]) -> Outcome {
    if data.len() > MAX_TRANSACTION_BYTES {
        return Outcome::Refused;
    }
    let Ok(raw) = serde_json::from_slice::<RawTransaction>(data) else { return Outcome::Refused };
    match check_form(raw.clone(), &EQUAL.rules()) {
        Ok(transaction) => accepted(&raw, &transaction),
        Err(Rejection::TxidMismatch(computed)) => {
            refused(&raw, &Rejection::TxidMismatch(computed));
            let mended = RawTransaction { txid: computed, ..raw };
            match check_form(mended.clone(), &EQUAL.rules()) {
                Ok(transaction) => accepted(&mended, &transaction),
                Err(rejection) => refused(&mended, &rejection),
            }
        }
        Err(rejection) => refused(&raw, &rejection),
    }
}

/// The txid by the protocol's words; `None` where an output cannot be written.
fn txid_of(raw: &RawTransaction) -> Option<(Vec<u8>, Txid)> {
    let mut out = Canonical::default().u32(1).count(raw.inputs.len());
    for input in &raw.inputs {
        out = out.raw(input.previous_output.txid.as_bytes()).u32(input.previous_output.vout);
    }
    out = out.count(raw.outputs.len());
    for output in &raw.outputs {
        let (_, payload) = oracle::bech32m(&output.address).filter(|(_, payload)| payload.len() == 21)?;
        out = out.u64(output.amount).raw(&payload);
    }
    let bytes = out.i64(raw.timestamp).0;
    let txid = Txid::from_bytes(tagged("TIME/tx", &bytes));
    Some((bytes, txid))
}

fn total(raw: &RawTransaction) -> u128 {
    raw.outputs.iter().map(|output| u128::from(output.amount)).sum()
}

fn distinct_inputs(raw: &RawTransaction) -> usize {
    raw.inputs.iter().map(|input| input.previous_output).collect::<BTreeSet<_>>().len()
}

fn refused(raw: &RawTransaction, rejection: &Rejection) -> Outcome {
    let address = |index: usize| raw.outputs[index].address.parse::<Address>();
    let is_true = match rejection {
        Rejection::UnsupportedVersion(version) => *version == raw.version && raw.version != 1,
        Rejection::NoInputs => raw.inputs.is_empty(),
        Rejection::NoOutputs => raw.outputs.is_empty(),
        Rejection::TooManyInputs(n) => *n == raw.inputs.len() && *n > MAX_INPUTS,
        Rejection::TooManyOutputs(n) => *n == raw.outputs.len() && *n > MAX_OUTPUTS,
        Rejection::TxidMismatch(txid) => {
            txid_of(raw).is_some_and(|(_, computed)| computed == *txid) && *txid != raw.txid
        }
        Rejection::DuplicateInput(outpoint) => {
            raw.inputs.iter().filter(|input| input.previous_output == *outpoint).count() > 1
        }
        Rejection::ZeroAmount(index) => raw.outputs[*index].amount == 0,
        Rejection::InvalidAddress { index, source } => address(*index).as_ref() == Err(source),
        Rejection::WrongNetwork(index) => address(*index).is_ok_and(|address| address.network() != Network::Devnet),
        Rejection::AmountOverflow => total(raw) > u128::from(Amount::MAX.units()),
        _ => false,
    };
    assert!(is_true, "{rejection:?} of {raw:?}");
    Outcome::Refused
}

fn accepted(raw: &RawTransaction, transaction: &Transaction) -> Outcome {
    assert_eq!(raw.version, 1);
    assert!((1..=MAX_INPUTS).contains(&raw.inputs.len()) && (1..=MAX_OUTPUTS).contains(&raw.outputs.len()));
    assert_eq!(distinct_inputs(raw), raw.inputs.len());
    assert!(raw.outputs.iter().all(|output| output.amount > 0) && total(raw) <= u128::from(Amount::MAX.units()));
    assert!(raw.outputs.iter().all(|output| oracle::bech32m(&output.address).is_some_and(|(hrp, _)| hrp == "dtime")));
    let (bytes, txid) = txid_of(raw).expect("every output can be written");
    assert_eq!((transaction.canonical_bytes(), transaction.txid()), (bytes, txid));
    assert_eq!(raw.txid, txid);

    let written = transaction.to_raw();
    let json = serde_json::to_vec(&written).expect("a transaction is JSON");
    let read: RawTransaction = serde_json::from_slice(&json).expect("what this program writes it reads");
    assert_eq!(read, written);
    assert_eq!(check_form(read, &EQUAL.rules()).as_ref(), Ok(transaction));

    if raw.inputs.len() <= MAX_CHECKED_INPUTS {
        signatures(raw, transaction);
    }
    Outcome::Accepted
}

/// All signatures together are good exactly when each is; and those of the right keys are.
fn signatures(raw: &RawTransaction, transaction: &Transaction) {
    let genesis_hash = EQUAL.genesis.hash();
    let message = sighash(&genesis_hash, &transaction.txid());
    assert_eq!(message, tagged("TIME/sighash", &[*genesis_hash.as_bytes(), *transaction.txid().as_bytes()].concat()));
    let single = transaction.inputs().iter().all(|input| input.public_key.verify(&message, &input.signature));
    let signed = |transaction: Transaction| Verified::check(SignedTransaction::new(transaction, genesis_hash));
    assert_eq!(signed(transaction.clone()).is_ok(), single, "batched and single checks agree");

    let keys: Option<Vec<_>> = raw.inputs.iter().map(|input| secret_of(&input.public_key)).collect();
    let Some(keys) = keys else { return };
    let mut resigned = raw.clone();
    for (input, key) in resigned.inputs.iter_mut().zip(&keys) {
        input.signature = key.sign(&message);
    }
    let resigned_form = check_form(resigned.clone(), &EQUAL.rules()).expect("signatures are no part of the form");
    assert_eq!(resigned_form.txid(), transaction.txid(), "nor of the txid");
    let verified = signed(resigned_form).expect("the owners have signed");
    assert!(verified.get().signature_items().into_iter().all(SignatureItem::verify), "and it stays verified");
    let mut bytes = *resigned.inputs[0].signature.as_bytes();
    bytes[usize::from(message[0]) % bytes.len()] ^= 1 << (message[1] % 8);
    resigned.inputs[0].signature = Signature::from_bytes(bytes);
    let spoiled = check_form(resigned, &EQUAL.rules()).expect("signatures are no part of the form");
    assert!(signed(spoiled).is_err(), "one changed bit spoils it");
}
