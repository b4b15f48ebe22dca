//! Decided blocks as others show them: what has to be right before they are believed.

use std::collections::BTreeSet;
use std::sync::Arc;

use super::committee::Committee;
use super::verified::{Signed, Verified};
use crate::limits::{MAX_BLOCK_ABORTS, MAX_BLOCK_ENTRIES};
use crate::types::{ConsensusStep, DecidedBlock, SignatureItem, Txid, consensus_vote_message};

/// Why a block with its commit certificate proves nothing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum BlockError {
    /// More entries than a block can have.
    #[error("the block has too many entries")]
    TooLarge,
    /// The certificate is for another block.
    #[error("the certificate is for another block")]
    OtherBlock,
    /// A voter that is no member.
    #[error("a voter is not a member")]
    NotMember,
    /// A member that is counted twice.
    #[error("a voter is repeated")]
    Repeated,
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
    /// The transaction that it is to prove is not in it.
    #[error("the block does not contain the transaction")]
    NotContained,
}

/// A decided block that is sound but for its signatures.
#[derive(Debug, Clone)]
pub struct CheckedBlock {
    decided: Arc<DecidedBlock>,
    message: [u8; 32],
}

impl CheckedBlock {
    /// Checks everything but the signatures: size, hash, voters, weight.
    pub fn new(decided: DecidedBlock, committee: &Committee) -> Result<Self, BlockError> {
        let (block, certificate) = (&decided.block, &decided.certificate);
        if block.transactions.len() + block.aborts.len() > MAX_BLOCK_ENTRIES || block.aborts.len() > MAX_BLOCK_ABORTS {
            return Err(BlockError::TooLarge);
        }
        let hash = block.hash(committee.genesis_hash());
        if certificate.height != block.height || certificate.block_hash != hash {
            return Err(BlockError::OtherBlock);
        }
        let (mut seen, mut weight) = (BTreeSet::new(), 0_u64);
        for vote in &certificate.votes {
            let member = committee.index_of(&vote.voter).ok_or(BlockError::NotMember)?;
            if !seen.insert(member) {
                return Err(BlockError::Repeated);
            }
            weight += committee.weight(member);
        }
        if weight < committee.quorum() {
            return Err(BlockError::NoQuorum { weight, quorum: committee.quorum() });
        }
        let message = consensus_vote_message(
            ConsensusStep::Precommit,
            committee.genesis_hash(),
            block.height,
            certificate.round,
            Some(&hash),
        );
        Ok(Self { decided: Arc::new(decided), message })
    }

    /// The block with its certificate.
    pub const fn decided(&self) -> &Arc<DecidedBlock> {
        &self.decided
    }

    /// Verifies in full that a block was decided and contains a transaction, as a wallet
    /// does offline.
    pub fn prove(decided: DecidedBlock, committee: &Committee, txid: &Txid) -> Result<Verified<Self>, BlockError> {
        let checked = Self::new(decided, committee)?;
        if !checked.decided.block.transactions.contains(txid) {
            return Err(BlockError::NotContained);
        }
        Verified::check(checked).map_err(|_| BlockError::BadSignature)
    }
}

impl Signed for CheckedBlock {
    fn signature_items(&self) -> Vec<SignatureItem> {
        let votes = self.decided.certificate.votes.iter();
        votes.map(|vote| SignatureItem::new(&vote.voter, &self.message, &vote.signature)).collect()
    }
}
