//! Verifies finality proofs against the genesis, without asking anybody.
//!
//! A proof is good or it is not: nothing here takes a node's word, and only a certificate
//! of kind `Commit` proves finality. No I/O.

use serde_json::Value;
use time_masternode::consensus::{BlockError, CertificateError, CheckedBlock, Committee, VoteKind};
use time_masternode::net::FinalityProof;
use time_masternode::types::{PublicKey, Txid};

use super::report::printable;

/// Why a proof proves nothing.
#[derive(Debug, thiserror::Error)]
pub enum ProofError {
    /// Not one of the forms that a proof can have.
    #[error("not a proof: {0}")]
    Format(String),
    /// A status without a proof.
    #[error("PROOF INVALID: there is none, finality_proof is null")]
    Missing,
    /// A proof of another transaction.
    #[error("PROOF INVALID: it is about {found}, not about {expected}")]
    OtherTransaction {
        /// The wanted transaction.
        expected: Txid,
        /// The proof's.
        found: Txid,
    },
    /// Votes of another kind.
    #[error("PROOF INVALID: votes of kind {0:?} do not make a transaction final, only those of kind Commit do")]
    NotCommit(VoteKind),
    /// The votes do not hold.
    #[error("PROOF INVALID: {0}")]
    Certificate(#[from] CertificateError),
    /// The block does not prove it.
    #[error("PROOF INVALID: {0}")]
    Block(#[from] BlockError),
    /// A block contains many transactions; which one is to be proved has to be said.
    #[error("a block proof: say which transaction it is to prove")]
    WhichTransaction,
}

impl ProofError {
    /// Whether the proof was judged and found bad; otherwise it could not be judged.
    pub const fn is_refusal(&self) -> bool {
        !matches!(self, Self::Format(_) | Self::WhichTransaction)
    }
}

/// What a good proof says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Proven {
    /// The final transaction.
    pub txid: Txid,
    /// The block that proves it, where a block does.
    pub block_height: Option<u64>,
    /// Members that committed, to it or to the block.
    pub members: usize,
    /// Members there are.
    pub total_members: usize,
    /// The weight of those that committed.
    pub weight: u64,
    /// The weight of all.
    pub total_weight: u64,
    /// The weight that is enough.
    pub quorum: u64,
}

impl Proven {
    /// One sentence for people.
    pub fn text(&self) -> String {
        let to = self.block_height.map_or_else(String::new, |height| format!(" to block {height}, which contains it"));
        format!(
            "{} is final: {} of {} masternodes committed{to}, weight {} of {} (quorum {})",
            self.txid, self.members, self.total_members, self.weight, self.total_weight, self.quorum
        )
    }

    /// The same for programs.
    pub fn json(&self) -> Value {
        serde_json::json!({
            "txid": self.txid, "final": true, "proof": "verified", "block_height": self.block_height,
            "masternodes": self.members, "total_masternodes": self.total_members,
            "weight": self.weight, "total_weight": self.total_weight, "quorum": self.quorum,
        })
    }
}

/// Reads a bare certificate, a [`FinalityProof`] or a whole `TransactionStatus`.
///
/// A status names a transaction beside its proof; that it is the same one is checked here.
pub fn read(bytes: &[u8]) -> Result<FinalityProof, ProofError> {
    let value: Value = serde_json::from_slice(bytes).map_err(|error| ProofError::Format(error.to_string()))?;
    let value = match value {
        Value::Object(mut map) if map.len() == 1 => match map.remove("TransactionStatus") {
            Some(status) => status,
            None => Value::Object(map),
        },
        other => other,
    };
    let Value::Object(mut map) = value else {
        return Err(ProofError::Format("a JSON object is expected".into()));
    };
    let Some(proof) = map.remove("finality_proof") else {
        return from_value(Value::Object(map));
    };
    if proof.is_null() {
        return Err(ProofError::Missing);
    }
    let expected = map.remove("txid").ok_or_else(|| ProofError::Format("a status without a txid".into()))?;
    let expected: Txid = serde_json::from_value(expected).map_err(|error| format_error(&error))?;
    let proof = from_value(proof)?;
    match &proof {
        FinalityProof::Commit(certificate) if certificate.txid != expected => {
            Err(ProofError::OtherTransaction { expected, found: certificate.txid })
        }
        _ => Ok(proof),
    }
}

fn format_error(error: &serde_json::Error) -> ProofError {
    ProofError::Format(printable(&error.to_string()))
}

fn from_value(value: Value) -> Result<FinalityProof, ProofError> {
    if value.get("votes").is_some() {
        return serde_json::from_value(value).map(FinalityProof::Commit).map_err(|error| format_error(&error));
    }
    serde_json::from_value(value).map_err(|error| format_error(&error))
}

/// Verifies a proof; `expected` pins the transaction that it has to be about.
pub fn verify(proof: &FinalityProof, committee: &Committee, expected: Option<Txid>) -> Result<Proven, ProofError> {
    let certificate = match proof {
        FinalityProof::Commit(certificate) => certificate,
        FinalityProof::Block(decided) => {
            let txid = expected.ok_or(ProofError::WhichTransaction)?;
            let proven = CheckedBlock::prove(decided.as_ref().clone(), committee, &txid)?.into_inner();
            let certificate = &proven.decided().certificate;
            let voters = certificate.votes.iter().map(|vote| vote.voter);
            return Ok(count(txid, Some(certificate.height), voters, committee));
        }
    };
    if let Some(expected) = expected.filter(|txid| *txid != certificate.txid) {
        return Err(ProofError::OtherTransaction { expected, found: certificate.txid });
    }
    if certificate.kind != VoteKind::Commit {
        return Err(ProofError::NotCommit(certificate.kind));
    }
    let checked = certificate.as_ref().clone().verify(committee)?.into_inner();
    let voters = checked.certificate().votes.iter().map(|vote| vote.voter);
    Ok(count(certificate.txid, None, voters, committee))
}

fn count(
    txid: Txid,
    block_height: Option<u64>,
    voters: impl Iterator<Item = PublicKey> + Clone,
    committee: &Committee,
) -> Proven {
    let members = voters.clone().count();
    let voters = voters.filter_map(|voter| committee.index_of(&voter));
    Proven {
        txid,
        block_height,
        members,
        total_members: committee.members().len(),
        weight: voters.map(|index| committee.weight(index)).sum(),
        total_weight: committee.total_weight(),
        quorum: committee.quorum(),
    }
}
