//! Transactions (protocol §3).
//!
//! [`RawTransaction`] is the JSON as it came. [`Transaction`] is one that passed every
//! rule that needs no ledger (`consensus::validate::check_form` makes it) and carries
//! its computed txid; whether its signatures verify is said by yet another type.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use super::canonical::CanonicalWriter;
use super::{Address, Amount, GenesisHash, PublicKey, Signature, Txid, UnixSeconds, tagged_hash};

/// The place of an output: the transaction that made it and the index among its outputs.
///
/// Text: `txid:vout`. Outputs of fees stand under a block's hash instead of a txid.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct OutPoint {
    /// The creating transaction.
    pub txid: Txid,
    /// The index of the output.
    pub vout: u32,
}

/// Why a text is not an outpoint.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("an outpoint is written txid:vout, 64 lower-case hex digits and a number")]
pub struct OutPointError;

impl FromStr for OutPoint {
    type Err = OutPointError;

    fn from_str(text: &str) -> Result<Self, OutPointError> {
        let (txid, vout) = text.split_once(':').ok_or(OutPointError)?;
        let number: u32 = vout.parse().map_err(|_| OutPointError)?;
        // `+7` and `007` are numbers to the parser, but one outpoint has one text.
        if number.to_string() != vout {
            return Err(OutPointError);
        }
        Ok(Self { txid: txid.parse().map_err(|_| OutPointError)?, vout: number })
    }
}

impl fmt::Display for OutPoint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.txid, self.vout)
    }
}

/// What an input spends and by which right.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawInput {
    /// The output that is spent.
    pub previous_output: OutPoint,
    /// The key that the output's address commits to.
    pub public_key: PublicKey,
    /// Over the transaction's [`sighash`].
    pub signature: Signature,
}

/// An output as it came: any number, any text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawOutput {
    /// Base units.
    pub amount: u64,
    /// Bech32m text.
    pub address: String,
}

/// A transaction as it came. Nothing is promised about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawTransaction {
    /// What the sender says its txid is.
    pub txid: Txid,
    /// The format; 1 is the only one.
    pub version: u32,
    /// What it spends.
    pub inputs: Vec<RawInput>,
    /// What it creates.
    pub outputs: Vec<RawOutput>,
    /// The wallet's own clock, not validated.
    pub timestamp: UnixSeconds,
}

/// An input of a well-formed transaction.
pub type Input = RawInput;

/// An amount and its owner.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Output {
    /// More than zero in a transaction of a wallet.
    pub amount: Amount,
    /// Who may spend it.
    pub address: Address,
}

/// A well-formed transaction; its txid is computed, not believed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Transaction {
    txid: Txid,
    inputs: Vec<Input>,
    outputs: Vec<Output>,
    timestamp: UnixSeconds,
}

impl Transaction {
    /// The only version there is.
    pub const VERSION: u32 = 1;

    /// A transaction of these parts. The caller answers for the rules of §3; the genesis,
    /// which has no inputs, is made this way too.
    pub fn from_parts(inputs: Vec<Input>, outputs: Vec<Output>, timestamp: UnixSeconds) -> Self {
        let mut transaction = Self { txid: Txid::from_bytes([0; 32]), inputs, outputs, timestamp };
        transaction.txid = Txid::from_bytes(tagged_hash("TIME/tx", &[&transaction.canonical_bytes()]));
        transaction
    }

    /// `H("TIME/tx", canonical bytes)`.
    pub const fn txid(&self) -> Txid {
        self.txid
    }

    /// What it spends.
    pub fn inputs(&self) -> &[Input] {
        &self.inputs
    }

    /// What it creates.
    pub fn outputs(&self) -> &[Output] {
        &self.outputs
    }

    /// The wallet's own clock.
    pub const fn timestamp(&self) -> UnixSeconds {
        self.timestamp
    }

    /// The outpoints that it spends, in order.
    pub fn spends(&self) -> impl Iterator<Item = OutPoint> + '_ {
        self.inputs.iter().map(|input| input.previous_output)
    }

    /// The outpoints that it creates, with their outputs.
    pub fn creates(&self) -> impl Iterator<Item = (OutPoint, Output)> + '_ {
        (0..).zip(&self.outputs).map(|(vout, output)| (OutPoint { txid: self.txid, vout }, *output))
    }

    /// What the txid commits to: neither keys nor signatures.
    pub fn canonical_bytes(&self) -> Vec<u8> {
        let mut out = CanonicalWriter::with_capacity(20 + 36 * self.inputs.len() + 29 * self.outputs.len());
        out.u32(Self::VERSION).count(self.inputs.len());
        for input in &self.inputs {
            out.raw(input.previous_output.txid.as_bytes()).u32(input.previous_output.vout);
        }
        out.count(self.outputs.len());
        for output in &self.outputs {
            out.u64(output.amount.units()).raw(output.address.payload());
        }
        out.i64(self.timestamp);
        out.into_bytes()
    }

    /// The JSON form.
    pub fn to_raw(&self) -> RawTransaction {
        RawTransaction {
            txid: self.txid,
            version: Self::VERSION,
            inputs: self.inputs.clone(),
            outputs: self
                .outputs
                .iter()
                .map(|o| RawOutput { amount: o.amount.units(), address: o.address.to_string() })
                .collect(),
            timestamp: self.timestamp,
        }
    }
}

/// What every input signs: `H("TIME/sighash", genesis_hash || txid)`.
pub fn sighash(genesis_hash: &GenesisHash, txid: &Txid) -> [u8; 32] {
    tagged_hash("TIME/sighash", &[genesis_hash.as_bytes(), txid.as_bytes()])
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_outpoint_has_one_text() {
        let outpoint = OutPoint { txid: Txid::from_bytes([3; 32]), vout: 7 };
        let text = outpoint.to_string();
        assert_eq!(text.parse(), Ok(outpoint));
        let txid = "03".repeat(32);
        for bad in ["", ":", "7", &txid, &format!("{txid}:"), &format!("{txid}:+7"), &format!("{txid}:07")] {
            assert_eq!(bad.parse::<OutPoint>(), Err(OutPointError), "{bad}");
        }
        assert_eq!(format!("{txid}:4294967296").parse::<OutPoint>(), Err(OutPointError));
        assert_eq!(format!("{txid}:1:2").parse::<OutPoint>(), Err(OutPointError));
    }
}
