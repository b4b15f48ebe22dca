//! Votes and the batches in which they are signed (protocol §5).

use std::sync::Arc;

use serde::{Deserialize, Serialize};

use super::certificate::SignedVote;
use super::committee::{Committee, MemberIndex};
use super::verified::{Signed, Verified};
use crate::limits::MAX_VOTES_PER_BATCH;
use crate::types::tagged_hash;
use crate::types::{
    CanonicalWriter, GenesisHash, Hash32, MerkleTree, PublicKey, SecretKey, Signature, SignatureItem, Txid,
};

/// What a member says of a transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum VoteKind {
    /// It is valid and its inputs are locked for it here.
    Approve,
    /// A quorum approved it, and this member will never commit to a rival.
    Commit,
    /// It is contradicted, and this member will never commit to it.
    Abort,
}

impl VoteKind {
    /// All three, in the order of their bytes.
    pub const ALL: [Self; 3] = [Self::Approve, Self::Commit, Self::Abort];

    /// The byte that is signed: 1, 2 or 3.
    pub const fn byte(self) -> u8 {
        match self {
            Self::Approve => 1,
            Self::Commit => 2,
            Self::Abort => 3,
        }
    }

    /// The kind of a byte.
    pub fn from_byte(byte: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|kind| kind.byte() == byte)
    }
}

/// One statement on one transaction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct Vote {
    /// What is said.
    pub kind: VoteKind,
    /// Of which transaction.
    pub txid: Txid,
}

impl Vote {
    /// Its leaf in the batch's Merkle tree: `H("TIME/vote", kind || txid)`.
    pub fn leaf(&self) -> Hash32 {
        Hash32::from_bytes(tagged_hash("TIME/vote", &[&[self.kind.byte()], self.txid.as_bytes()]))
    }
}

/// What is signed for a batch of `size` votes with this Merkle root.
pub fn batch_message(genesis_hash: &GenesisHash, epoch: u64, size: u32, root: &Hash32) -> [u8; 32] {
    let mut out = CanonicalWriter::with_capacity(76);
    out.raw(genesis_hash.as_bytes()).u64(epoch).u32(size).raw(root.as_bytes());
    tagged_hash("TIME/vote-batch", &[out.bytes()])
}

/// A batch on the wire: what one durable commit recorded, under one signature.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VoteBatch {
    /// The member's key.
    pub voter: PublicKey,
    /// The epoch in which it is a member.
    pub epoch: u64,
    /// 1 to 4,096 votes.
    pub votes: Vec<Vote>,
    /// Over [`batch_message`].
    pub signature: Signature,
}

/// Why a batch is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum VoteError {
    /// The voter is no member of the committee.
    #[error("the voter is not a member")]
    NotMember,
    /// Votes of another epoch than the current one.
    #[error("another epoch")]
    WrongEpoch,
    /// No votes, or more than 4,096.
    #[error("a batch has 1 to {MAX_VOTES_PER_BATCH} votes")]
    BatchSize,
}

/// A batch of a member, with its tree; [`Verified`] once the signature is checked.
///
/// Votes are kept as references to their batch: a certificate's paths are computed from
/// it when somebody needs them.
#[derive(Debug, Clone)]
pub struct MemberBatch {
    member: MemberIndex,
    batch: VoteBatch,
    tree: MerkleTree,
    message: [u8; 32],
}

impl MemberBatch {
    /// Checks all but the signature.
    pub fn new(batch: VoteBatch, committee: &Committee) -> Result<Self, VoteError> {
        let member = committee.index_of(&batch.voter).ok_or(VoteError::NotMember)?;
        if batch.epoch != committee.epoch() {
            return Err(VoteError::WrongEpoch);
        }
        let size = u32::try_from(batch.votes.len()).map_err(|_| VoteError::BatchSize)?;
        if batch.votes.len() > MAX_VOTES_PER_BATCH {
            return Err(VoteError::BatchSize);
        }
        let tree = MerkleTree::new(batch.votes.iter().map(Vote::leaf).collect()).ok_or(VoteError::BatchSize)?;
        let message = batch_message(committee.genesis_hash(), batch.epoch, size, &tree.root());
        Ok(Self { member, batch, tree, message })
    }

    /// Who voted.
    pub const fn member(&self) -> MemberIndex {
        self.member
    }

    /// The votes, in the order of the leaves.
    pub fn votes(&self) -> &[Vote] {
        &self.batch.votes
    }

    /// The batch as it goes over the wire.
    pub const fn wire(&self) -> &VoteBatch {
        &self.batch
    }
}

impl Signed for MemberBatch {
    fn signature_items(&self) -> Vec<SignatureItem> {
        vec![SignatureItem::new(&self.batch.voter, &self.message, &self.batch.signature)]
    }
}

/// Signs up to 4,096 votes; `None` if there are none or too many, or the key is no member's.
pub fn sign_batch(key: &SecretKey, committee: &Committee, votes: Vec<Vote>) -> Option<Verified<MemberBatch>> {
    let voter = key.public_key();
    let placeholder = Signature::from_bytes([0; 64]);
    let unsigned = VoteBatch { voter, epoch: committee.epoch(), votes, signature: placeholder };
    let mut batch = MemberBatch::new(unsigned, committee).ok()?;
    batch.batch.signature = key.sign(&batch.message);
    Some(Verified::made_here(batch))
}

/// One vote, kept as its place in a verified batch.
#[derive(Debug, Clone)]
pub struct CountedVote {
    /// The batch that it stands in.
    pub batch: Arc<Verified<MemberBatch>>,
    /// Its place among the batch's votes.
    pub index: usize,
}

impl CountedVote {
    /// The vote with what proves it alone: a certificate's element.
    pub fn to_signed(&self) -> SignedVote {
        let batch = self.batch.get();
        // A batch has at most 4,096 votes, so neither number can be too large.
        SignedVote {
            voter: batch.batch.voter,
            signature: batch.batch.signature,
            index: u32::try_from(self.index).unwrap_or(u32::MAX),
            batch_size: u32::try_from(batch.tree.size()).unwrap_or(u32::MAX),
            path: batch.tree.path(self.index),
        }
    }
}
