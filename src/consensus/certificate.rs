//! Certificates: votes of a quorum on one transaction (protocol §5).
//!
//! Anyone who has the genesis file can verify one offline. That of `Commit` is the
//! finality proof which wallets keep.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::committee::Committee;
use super::verified::{Signed, Verified};
use super::vote::{Vote, VoteKind, batch_message};
use crate::limits::MAX_VOTES_PER_BATCH;
use crate::types::{Hash32, PublicKey, Signature, SignatureItem, Txid, merkle_climb};

/// One vote of a batch with what proves it alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SignedVote {
    /// The member's key.
    pub voter: PublicKey,
    /// The batch's signature.
    pub signature: Signature,
    /// The vote's place in the batch.
    pub index: u32,
    /// The number of votes in the batch.
    pub batch_size: u32,
    /// The Merkle path from the vote's leaf to the batch's root.
    pub path: Vec<Hash32>,
}

/// Votes of distinct members with at least quorum weight.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Certificate {
    /// What they say.
    pub kind: VoteKind,
    /// Of which transaction.
    pub txid: Txid,
    /// The epoch of the committee.
    pub epoch: u64,
    /// One vote of each.
    pub votes: Vec<SignedVote>,
}

/// Why a certificate proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CertificateError {
    /// Another epoch than the current one.
    #[error("another epoch")]
    WrongEpoch,
    /// A voter that is no member.
    #[error("a voter is not a member")]
    NotMember,
    /// A member that is counted twice.
    #[error("a voter is repeated")]
    Repeated,
    /// An index or a path that leads nowhere.
    #[error("a vote's place in its batch is wrong")]
    BadPath,
    /// Less weight than a quorum.
    #[error("weight {weight} is short of the quorum of {quorum}")]
    NoQuorum {
        /// The weight of the voters.
        weight: u64,
        /// The weight that is needed.
        quorum: u64,
    },
    /// A signature that does not verify.
    #[error("a signature does not verify")]
    BadSignature,
}

/// A certificate that is sound but for its signatures, with what they have to sign.
#[derive(Debug, Clone)]
pub struct CheckedCertificate {
    certificate: Certificate,
    messages: Vec<[u8; 32]>,
}

impl CheckedCertificate {
    /// The certificate.
    pub const fn certificate(&self) -> &Certificate {
        &self.certificate
    }
}

impl Signed for CheckedCertificate {
    fn signature_items(&self) -> Vec<SignatureItem> {
        let votes = self.certificate.votes.iter().zip(&self.messages);
        votes.map(|(vote, message)| SignatureItem::new(&vote.voter, message, &vote.signature)).collect()
    }
}

impl Certificate {
    /// Checks everything but the signatures.
    pub fn check(self, committee: &Committee) -> Result<CheckedCertificate, CertificateError> {
        if self.epoch != committee.epoch() {
            return Err(CertificateError::WrongEpoch);
        }
        let leaf = Vote { kind: self.kind, txid: self.txid }.leaf();
        let (mut seen, mut weight) = (BTreeSet::new(), 0_u64);
        let mut messages = Vec::with_capacity(self.votes.len().min(committee.members().len()));
        for vote in &self.votes {
            let member = committee.index_of(&vote.voter).ok_or(CertificateError::NotMember)?;
            if !seen.insert(member) {
                return Err(CertificateError::Repeated);
            }
            let (index, size) = (vote.index as usize, vote.batch_size as usize);
            if size > MAX_VOTES_PER_BATCH {
                return Err(CertificateError::BadPath);
            }
            let root = merkle_climb(leaf, index, size, &vote.path).ok_or(CertificateError::BadPath)?;
            messages.push(batch_message(committee.genesis_hash(), self.epoch, vote.batch_size, &root));
            weight += committee.weight(member);
        }
        if weight < committee.quorum() {
            return Err(CertificateError::NoQuorum { weight, quorum: committee.quorum() });
        }
        Ok(CheckedCertificate { certificate: self, messages })
    }

    /// Verifies it in full, as a wallet does offline.
    pub fn verify(self, committee: &Committee) -> Result<Verified<CheckedCertificate>, CertificateError> {
        Verified::check(self.check(committee)?).map_err(|_| CertificateError::BadSignature)
    }
}
