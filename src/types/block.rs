//! Blocks, what members sign about them, and the digest of the UTXO set (protocol §7).

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::canonical::CanonicalWriter;
use super::hash::{ParseHexError, fixed_bytes, parse_hex};
use super::{
    BlockHash, GenesisHash, Hash32, Height, MerkleTree, OutPoint, Output, PublicKey, Signature, Txid, tagged_hash,
};

fixed_bytes!(
    /// The digest of a UTXO set: equal sets have equal digests, whatever the order in
    /// which their outputs came and went.
    StateDigest, 32
);

/// A block: settled transactions in one order, and aborts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Block {
    /// From 1.
    pub height: Height,
    /// The hash of the block before; of the first, the genesis hash.
    pub previous_hash: BlockHash,
    /// Milliseconds since the Unix epoch; rises strictly from block to block.
    pub timestamp_ms: u64,
    /// The key of the member that made it.
    pub proposer: PublicKey,
    /// The chain's UTXO set before this block.
    pub state_digest: StateDigest,
    /// Executed in this order; parents come before children.
    pub transactions: Vec<Txid>,
    /// Executed after the transactions.
    pub aborts: Vec<Txid>,
}

impl Block {
    /// `H("TIME/block", ...)`: the header and the roots of both lists.
    pub fn hash(&self, genesis_hash: &GenesisHash) -> BlockHash {
        let mut out = CanonicalWriter::with_capacity(256);
        out.raw(genesis_hash.as_bytes())
            .u64(self.height)
            .raw(self.previous_hash.as_bytes())
            .u64(self.timestamp_ms)
            .raw(self.proposer.as_bytes())
            .raw(self.state_digest.as_bytes());
        for list in [&self.transactions, &self.aborts] {
            out.count(list.len()).raw(list_root(list).as_bytes());
        }
        BlockHash::from_bytes(tagged_hash("TIME/block", &[out.bytes()]))
    }
}

/// The Merkle root over `H("TIME/block-item", txid)`; 32 zero bytes for none.
fn list_root(txids: &[Txid]) -> Hash32 {
    let leaves = txids.iter().map(|t| Hash32::from_bytes(tagged_hash("TIME/block-item", &[t.as_bytes()]))).collect();
    MerkleTree::new(leaves).map_or(Hash32::from_bytes([0; 32]), |tree| tree.root())
}

/// The two votes of Tendermint.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsensusStep {
    /// The first.
    Prevote,
    /// The second; a quorum of these decides.
    Precommit,
}

/// What a member signs when it votes on a block; `None` votes for nil.
pub fn consensus_vote_message(
    step: ConsensusStep,
    genesis_hash: &GenesisHash,
    height: Height,
    round: u32,
    block: Option<&BlockHash>,
) -> [u8; 32] {
    let tag = match step {
        ConsensusStep::Prevote => "TIME/prevote",
        ConsensusStep::Precommit => "TIME/precommit",
    };
    let block = block.map_or([0; 32], |hash| *hash.as_bytes());
    tagged_hash(tag, &[genesis_hash.as_bytes(), &height.to_le_bytes(), &round.to_le_bytes(), &block])
}

/// What the proposer of a round signs; `valid_round` is -1 for a fresh block.
pub fn proposal_message(
    genesis_hash: &GenesisHash,
    height: Height,
    round: u32,
    block: &BlockHash,
    valid_round: i64,
) -> [u8; 32] {
    tagged_hash(
        "TIME/proposal",
        &[
            genesis_hash.as_bytes(),
            &height.to_le_bytes(),
            &round.to_le_bytes(),
            block.as_bytes(),
            &valid_round.to_le_bytes(),
        ],
    )
}

/// One precommit in a commit certificate.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitSignature {
    /// The member's key.
    pub voter: PublicKey,
    /// Over the precommit's message.
    pub signature: Signature,
}

/// The proof that a block was decided: precommits of a quorum.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitVote {
    /// The block's height.
    pub height: Height,
    /// The round in which it was decided.
    pub round: u32,
    /// The block's hash.
    pub block_hash: BlockHash,
    /// Precommits of distinct members.
    pub votes: Vec<CommitSignature>,
}

/// A block and the proof that it was decided: what a syncing node verifies, and the proof
/// for a transaction that only a block settled.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DecidedBlock {
    /// The block.
    pub block: Block,
    /// Precommits of a quorum.
    pub certificate: CommitVote,
}

/// LtHash16 over BLAKE3: a hash of a set that is updated by adding and removing outputs.
///
/// 1,024 lanes of `u16` with wrap-around (Bellare and Micciancio 1997; Lewi et al.,
/// "Securing Update Propagation with Homomorphic Hashing", 2019).
#[derive(Clone, PartialEq, Eq)]
pub struct UtxoDigest {
    lanes: Box<[u16; Self::LANES]>,
}

impl UtxoDigest {
    const LANES: usize = 1024;

    /// The digest of the empty set.
    pub fn new() -> Self {
        Self { lanes: Box::new([0; Self::LANES]) }
    }

    /// Puts an output into the set. Each output is in it at most once.
    pub fn add(&mut self, outpoint: &OutPoint, output: &Output) {
        for (lane, element) in self.lanes.iter_mut().zip(element(outpoint, output).as_chunks().0) {
            *lane = lane.wrapping_add(u16::from_le_bytes(*element));
        }
    }

    /// Takes an output out of the set. It has to be in it.
    pub fn remove(&mut self, outpoint: &OutPoint, output: &Output) {
        for (lane, element) in self.lanes.iter_mut().zip(element(outpoint, output).as_chunks().0) {
            *lane = lane.wrapping_sub(u16::from_le_bytes(*element));
        }
    }

    /// The lanes, for storing the digest.
    pub fn lanes(&self) -> &[u16] {
        self.lanes.as_slice()
    }

    /// The digest with these lanes; `None` unless there are 1,024.
    pub fn from_lanes(lanes: &[u16]) -> Option<Self> {
        Some(Self { lanes: Box::new(lanes.try_into().ok()?) })
    }

    /// `H("TIME/state", lanes)`.
    pub fn digest(&self) -> StateDigest {
        let bytes: Vec<u8> = self.lanes.iter().flat_map(|lane| lane.to_le_bytes()).collect();
        StateDigest::from_bytes(tagged_hash("TIME/state", &[&bytes]))
    }
}

impl Default for UtxoDigest {
    fn default() -> Self {
        Self::new()
    }
}

impl fmt::Debug for UtxoDigest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "UtxoDigest({})", self.digest())
    }
}

/// What an output adds to each lane, two bytes for each.
fn element(outpoint: &OutPoint, output: &Output) -> [u8; 2 * UtxoDigest::LANES] {
    let seed = tagged_hash(
        "TIME/utxo",
        &[
            outpoint.txid.as_bytes(),
            &outpoint.vout.to_le_bytes(),
            &output.amount.units().to_le_bytes(),
            output.address.payload(),
        ],
    );
    let mut bytes = [0; 2 * UtxoDigest::LANES];
    blake3::Hasher::new().update(&seed).finalize_xof().fill(&mut bytes);
    bytes
}
