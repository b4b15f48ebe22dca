//! The rules of a transaction, in the order in which a rejection names them (protocol §3).
//!
//! [`check_form`] applies those that need no ledger and makes a [`Transaction`];
//! [`check_ledger`] applies the rest against a [`View`]. Signatures are the last rule
//! and are checked apart, many at once.

use std::collections::BTreeSet;

use super::verified::Signed;
use super::view::View;
use crate::limits::{MAX_INPUTS, MAX_OUTPUTS};
use crate::types::{
    Address, AddressError, Amount, GenesisHash, Network, OutPoint, Output, RawTransaction, SignatureItem, Transaction,
    Txid, UTXOState, sighash,
};

/// Why a transaction is refused: one variant per rule. A rejected transaction has changed
/// nothing and is not remembered.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Rejection {
    /// A version other than 1.
    #[error("version {0} is not known")]
    UnsupportedVersion(u32),
    /// More bytes than a transaction may have.
    #[error("the transaction is too large")]
    TooLarge,
    /// It spends nothing.
    #[error("it has no inputs")]
    NoInputs,
    /// It creates nothing.
    #[error("it has no outputs")]
    NoOutputs,
    /// More than 256 inputs.
    #[error("it has {0} inputs, more than {MAX_INPUTS}")]
    TooManyInputs(usize),
    /// More than 256 outputs.
    #[error("it has {0} outputs, more than {MAX_OUTPUTS}")]
    TooManyOutputs(usize),
    /// The given txid is not the computed one.
    #[error("its txid is {0}")]
    TxidMismatch(Txid),
    /// One outpoint is spent twice.
    #[error("it spends {0} twice")]
    DuplicateInput(OutPoint),
    /// An output of nothing.
    #[error("output {0} has amount 0")]
    ZeroAmount(usize),
    /// An address that is none.
    #[error("output {index}: {source}")]
    InvalidAddress {
        /// Which output.
        index: usize,
        /// What is wrong with it.
        source: AddressError,
    },
    /// An address of another network.
    #[error("output {0} pays to an address of another network")]
    WrongNetwork(usize),
    /// The outputs exceed 2^53-1.
    #[error("the outputs add up to more than 2^53-1")]
    AmountOverflow,
    /// It has died in a conflict and is never valid again.
    #[error("it was aborted and can never become valid")]
    Aborted {
        /// A transaction that it contradicted.
        by: Option<Txid>,
    },
    /// An input that does not exist, or not yet.
    #[error("{0} does not exist")]
    UnknownInput(OutPoint),
    /// An input that a settled transaction has spent.
    #[error("{outpoint} is spent by {by}")]
    InputSpent {
        /// Which input.
        outpoint: OutPoint,
        /// The transaction that spent it.
        by: Txid,
    },
    /// An input that is locked for another transaction.
    #[error("{outpoint} is locked for {by}")]
    InputLocked {
        /// Which input.
        outpoint: OutPoint,
        /// The transaction that holds the lock.
        by: Txid,
    },
    /// A key that does not hash to the address it spends from.
    #[error("the key of input {0} does not own what it spends")]
    WrongOwner(usize),
    /// More goes out than comes in.
    #[error("inputs of {inputs} do not cover outputs of {outputs}")]
    InsufficientFunds {
        /// What comes in.
        inputs: Amount,
        /// What goes out.
        outputs: Amount,
    },
    /// Less than the least fee.
    #[error("a fee of {fee} is below the least of {min_fee}")]
    FeeTooLow {
        /// What it leaves.
        fee: Amount,
        /// What it has to leave.
        min_fee: Amount,
    },
    /// A signature that does not verify.
    #[error("a signature does not verify")]
    InvalidSignature,
    /// The node has no room; nothing is wrong with the transaction.
    #[error("the node is busy; send it again later")]
    Busy,
}

impl Rejection {
    /// The stable code of the wire.
    pub const fn code(&self) -> &'static str {
        match self {
            Self::UnsupportedVersion(_) => "UnsupportedVersion",
            Self::TooLarge => "TooLarge",
            Self::NoInputs => "NoInputs",
            Self::NoOutputs => "NoOutputs",
            Self::TooManyInputs(_) => "TooManyInputs",
            Self::TooManyOutputs(_) => "TooManyOutputs",
            Self::TxidMismatch(_) => "TxidMismatch",
            Self::DuplicateInput(_) => "DuplicateInput",
            Self::ZeroAmount(_) => "ZeroAmount",
            Self::InvalidAddress { .. } => "InvalidAddress",
            Self::WrongNetwork(_) => "WrongNetwork",
            Self::AmountOverflow => "AmountOverflow",
            Self::Aborted { .. } => "Aborted",
            Self::UnknownInput(_) => "UnknownInput",
            Self::InputSpent { .. } => "InputSpent",
            Self::InputLocked { .. } => "InputLocked",
            Self::WrongOwner(_) => "WrongOwner",
            Self::InsufficientFunds { .. } => "InsufficientFunds",
            Self::FeeTooLow { .. } => "FeeTooLow",
            Self::InvalidSignature => "InvalidSignature",
            Self::Busy => "Busy",
        }
    }

    /// The transaction in whose favour it is refused.
    pub const fn by(&self) -> Option<Txid> {
        match self {
            Self::InputSpent { by, .. } | Self::InputLocked { by, .. } => Some(*by),
            Self::Aborted { by } => *by,
            _ => None,
        }
    }
}

/// What the rules need to know of the network.
#[derive(Debug, Clone, Copy)]
pub struct Rules {
    /// Addresses have to be of it.
    pub network: Network,
    /// The least fee.
    pub min_fee: Amount,
}

/// Applies the rules that need no ledger, from the version to the amounts.
///
/// The txid cannot be computed if an output has no valid address or amount, so that rule
/// is passed over then and the output's own rule names what is wrong.
pub fn check_form(raw: RawTransaction, rules: &Rules) -> Result<Transaction, Rejection> {
    if raw.version != Transaction::VERSION {
        return Err(Rejection::UnsupportedVersion(raw.version));
    }
    match (raw.inputs.len(), raw.outputs.len()) {
        (0, _) => return Err(Rejection::NoInputs),
        (_, 0) => return Err(Rejection::NoOutputs),
        (n, _) if n > MAX_INPUTS => return Err(Rejection::TooManyInputs(n)),
        (_, n) if n > MAX_OUTPUTS => return Err(Rejection::TooManyOutputs(n)),
        _ => {}
    }
    let outputs: Vec<_> = raw.outputs.iter().map(|o| (Amount::from_units(o.amount), o.address.parse())).collect();
    let readable: Option<Vec<Output>> = outputs
        .iter()
        .map(|(amount, address): &(_, Result<Address, _>)| {
            Some(Output { amount: (*amount)?, address: *address.as_ref().ok()? })
        })
        .collect();
    let transaction = readable.map(|outputs| Transaction::from_parts(raw.inputs.clone(), outputs, raw.timestamp));
    if let Some(computed) = transaction.as_ref().map(Transaction::txid).filter(|txid| *txid != raw.txid) {
        return Err(Rejection::TxidMismatch(computed));
    }
    let mut spent = BTreeSet::new();
    if let Some(twice) = raw.inputs.iter().map(|i| i.previous_output).find(|o| !spent.insert(*o)) {
        return Err(Rejection::DuplicateInput(twice));
    }
    for (index, (amount, address)) in outputs.iter().enumerate() {
        match (amount, address) {
            (Some(Amount::ZERO), _) => return Err(Rejection::ZeroAmount(index)),
            (_, Err(source)) => return Err(Rejection::InvalidAddress { index, source: source.clone() }),
            (_, Ok(address)) if address.network() != rules.network => return Err(Rejection::WrongNetwork(index)),
            (None, _) => return Err(Rejection::AmountOverflow),
            _ => {}
        }
    }
    transaction
        .filter(|t| Amount::checked_sum(t.outputs().iter().map(|o| o.amount)).is_some())
        .ok_or(Rejection::AmountOverflow)
}

/// Applies the rules that need the ledger, from `Aborted` to `FeeTooLow`; gives the fee.
pub fn check_ledger(transaction: &Transaction, rules: &Rules, view: &impl View) -> Result<Amount, Rejection> {
    let txid = transaction.txid();
    if let Some(dead) = view.dead(&txid) {
        return Err(Rejection::Aborted { by: dead.by });
    }
    let mut spent = Vec::with_capacity(transaction.inputs().len());
    for outpoint in transaction.spends() {
        spent.push((outpoint, view.utxo(&outpoint).ok_or(Rejection::UnknownInput(outpoint))?));
    }
    for (outpoint, utxo) in &spent {
        let outpoint = *outpoint;
        match utxo.state {
            UTXOState::Locked { txid: by, .. } if by != txid => return Err(Rejection::InputLocked { outpoint, by }),
            UTXOState::SpentFinalized { txid: by, .. } | UTXOState::Confirmed { txid: by, .. } => {
                return Err(Rejection::InputSpent { outpoint, by });
            }
            UTXOState::Unspent | UTXOState::Locked { .. } => {}
        }
    }
    for (index, (input, (_, utxo))) in transaction.inputs().iter().zip(&spent).enumerate() {
        if !utxo.output.address.is_owned_by(&input.public_key) {
            return Err(Rejection::WrongOwner(index));
        }
    }
    let sum = |outputs: &mut dyn Iterator<Item = Amount>| Amount::checked_sum(outputs).ok_or(Rejection::AmountOverflow);
    let inputs = sum(&mut spent.iter().map(|(_, utxo)| utxo.output.amount))?;
    let outputs = sum(&mut transaction.outputs().iter().map(|o| o.amount))?;
    let fee = inputs.checked_sub(outputs).ok_or(Rejection::InsufficientFunds { inputs, outputs })?;
    if fee < rules.min_fee {
        return Err(Rejection::FeeTooLow { fee, min_fee: rules.min_fee });
    }
    Ok(fee)
}

/// A well-formed transaction together with the network that its signatures are for.
#[derive(Debug, Clone)]
pub struct SignedTransaction {
    transaction: Transaction,
    genesis_hash: GenesisHash,
}

impl SignedTransaction {
    /// The claim that `transaction` is signed for the network of `genesis_hash`.
    pub const fn new(transaction: Transaction, genesis_hash: GenesisHash) -> Self {
        Self { transaction, genesis_hash }
    }

    /// The transaction.
    pub const fn transaction(&self) -> &Transaction {
        &self.transaction
    }
}

impl Signed for SignedTransaction {
    fn signature_items(&self) -> Vec<SignatureItem> {
        let message = sighash(&self.genesis_hash, &self.transaction.txid());
        let inputs = self.transaction.inputs().iter();
        inputs.map(|input| SignatureItem::new(&input.public_key, &message, &input.signature)).collect()
    }
}
