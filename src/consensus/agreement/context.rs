//! The types by which the agreement crate knows this network: heights, members, blocks
//! and the votes on them (`arc-malachitebft-core-types`, trait `Context`).

use std::cmp::Ordering;
use std::fmt;
use std::sync::Arc;

use malachitebft_core_types::{
    Address, Context, LinearTimeouts, NilOrVal, ProposalPart, Round, SignedExtension, SigningScheme, Validator,
    ValidatorSet, Value, Vote, VoteType, VotingPower,
};

use crate::consensus::committee::Committee;
use crate::types::{Block, BlockHash, GenesisHash, Height, PublicKey, SecretKey, Signature};

/// The family of types.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::consensus) struct BlockContext;

/// A height of the chain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(in crate::consensus) struct ChainHeight(pub(in crate::consensus) Height);

impl fmt::Display for ChainHeight {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl malachitebft_core_types::Height for ChainHeight {
    const ZERO: Self = Self(0);
    const INITIAL: Self = Self(1);

    fn increment_by(&self, n: u64) -> Self {
        Self(self.0.saturating_add(n))
    }

    fn decrement_by(&self, n: u64) -> Option<Self> {
        self.0.checked_sub(n).map(Self)
    }

    fn as_u64(&self) -> u64 {
        self.0
    }
}

impl Address for PublicKey {}

/// A member.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::consensus) struct Elector {
    key: PublicKey,
    weight: u64,
}

impl Validator<BlockContext> for Elector {
    fn address(&self) -> &PublicKey {
        &self.key
    }

    fn public_key(&self) -> &PublicKey {
        &self.key
    }

    fn voting_power(&self) -> VotingPower {
        self.weight
    }
}

/// The committee, in the genesis file's order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::consensus) struct Electors(Arc<Vec<Elector>>);

impl Electors {
    pub(in crate::consensus) fn of(committee: &Committee) -> Self {
        let elector = |member: &crate::types::Masternode| Elector { key: member.public_key, weight: member.weight };
        Self(Arc::new(committee.members().iter().map(elector).collect()))
    }
}

impl ValidatorSet<BlockContext> for Electors {
    fn count(&self) -> usize {
        self.0.len()
    }

    fn total_voting_power(&self) -> VotingPower {
        self.0.iter().map(|elector| elector.weight).sum()
    }

    fn get_by_address(&self, address: &PublicKey) -> Option<&Elector> {
        self.0.iter().find(|elector| elector.key == *address)
    }

    fn get_by_index(&self, index: usize) -> Option<&Elector> {
        self.0.get(index)
    }
}

/// What is agreed on: a block, known by its hash.
#[derive(Debug, Clone)]
pub(in crate::consensus) struct BlockValue {
    pub(in crate::consensus) hash: BlockHash,
    pub(in crate::consensus) block: Arc<Block>,
}

impl BlockValue {
    pub(in crate::consensus) fn new(block: Arc<Block>, genesis_hash: &GenesisHash) -> Self {
        Self { hash: block.hash(genesis_hash), block }
    }
}

impl PartialEq for BlockValue {
    fn eq(&self, other: &Self) -> bool {
        self.hash == other.hash
    }
}

impl Eq for BlockValue {}

impl PartialOrd for BlockValue {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

impl Ord for BlockValue {
    fn cmp(&self, other: &Self) -> Ordering {
        self.hash.cmp(&other.hash)
    }
}

impl Value for BlockValue {
    type Id = BlockHash;

    fn id(&self) -> BlockHash {
        self.hash
    }
}

/// A block put forward in a round.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::consensus) struct BlockProposal {
    pub(in crate::consensus) height: ChainHeight,
    pub(in crate::consensus) round: Round,
    pub(in crate::consensus) value: BlockValue,
    pub(in crate::consensus) valid_round: Round,
    pub(in crate::consensus) proposer: PublicKey,
}

impl malachitebft_core_types::Proposal<BlockContext> for BlockProposal {
    fn height(&self) -> ChainHeight {
        self.height
    }

    fn round(&self) -> Round {
        self.round
    }

    fn value(&self) -> &BlockValue {
        &self.value
    }

    fn take_value(self) -> BlockValue {
        self.value
    }

    fn pol_round(&self) -> Round {
        self.valid_round
    }

    fn validator_address(&self) -> &PublicKey {
        &self.proposer
    }
}

/// A prevote or a precommit.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::consensus) struct BlockVote {
    pub(in crate::consensus) kind: VoteType,
    pub(in crate::consensus) height: ChainHeight,
    pub(in crate::consensus) round: Round,
    pub(in crate::consensus) value: NilOrVal<BlockHash>,
    pub(in crate::consensus) voter: PublicKey,
}

impl Vote<BlockContext> for BlockVote {
    fn height(&self) -> ChainHeight {
        self.height
    }

    fn round(&self) -> Round {
        self.round
    }

    fn value(&self) -> &NilOrVal<BlockHash> {
        &self.value
    }

    fn take_value(self) -> NilOrVal<BlockHash> {
        self.value
    }

    fn vote_type(&self) -> VoteType {
        self.kind
    }

    fn validator_address(&self) -> &PublicKey {
        &self.voter
    }

    fn extension(&self) -> Option<&SignedExtension<BlockContext>> {
        None
    }

    fn take_extension(&mut self) -> Option<SignedExtension<BlockContext>> {
        None
    }

    fn extend(self, _: SignedExtension<BlockContext>) -> Self {
        self
    }
}

/// A block travels whole in its proposal.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(in crate::consensus) struct NoParts;

impl ProposalPart<BlockContext> for NoParts {
    fn is_first(&self) -> bool {
        true
    }

    fn is_last(&self) -> bool {
        true
    }
}

/// Ed25519 by the rules of ZIP-215.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(in crate::consensus) struct Ed25519;

impl SigningScheme for Ed25519 {
    type DecodingError = &'static str;
    type Signature = Signature;
    type PublicKey = PublicKey;
    type PrivateKey = SecretKey;

    fn decode_signature(bytes: &[u8]) -> Result<Signature, &'static str> {
        bytes.try_into().map(Signature::from_bytes).map_err(|_| "a signature has 64 bytes")
    }

    fn encode_signature(signature: &Signature) -> Vec<u8> {
        signature.as_bytes().to_vec()
    }

    fn decode_public_key(bytes: &[u8]) -> Result<PublicKey, &'static str> {
        bytes.try_into().map(PublicKey::from_bytes).map_err(|_| "a key has 32 bytes")
    }

    fn encode_public_key(key: &PublicKey) -> Vec<u8> {
        key.as_bytes().to_vec()
    }
}

impl Context for BlockContext {
    type Address = PublicKey;
    type Height = ChainHeight;
    type ProposalPart = NoParts;
    type Proposal = BlockProposal;
    type Validator = Elector;
    type ValidatorSet = Electors;
    type Timeouts = LinearTimeouts;
    type Value = BlockValue;
    type Vote = BlockVote;
    type Extension = ();
    type SigningScheme = Ed25519;

    /// The members take turns: from height to height, and from round to round.
    fn select_proposer<'a>(&self, electors: &'a Electors, height: ChainHeight, round: Round) -> &'a Elector {
        let round = u64::from(round.as_u32().unwrap_or(0));
        let turn = height.0.wrapping_add(round) % (electors.0.len() as u64).max(1);
        &electors.0[usize::try_from(turn).unwrap_or(0)]
    }

    fn new_proposal(
        &self,
        height: ChainHeight,
        round: Round,
        value: BlockValue,
        valid_round: Round,
        proposer: PublicKey,
    ) -> BlockProposal {
        BlockProposal { height, round, value, valid_round, proposer }
    }

    fn new_prevote(
        &self,
        height: ChainHeight,
        round: Round,
        value: NilOrVal<BlockHash>,
        voter: PublicKey,
    ) -> BlockVote {
        BlockVote { kind: VoteType::Prevote, height, round, value, voter }
    }

    fn new_precommit(
        &self,
        height: ChainHeight,
        round: Round,
        value: NilOrVal<BlockHash>,
        voter: PublicKey,
    ) -> BlockVote {
        BlockVote { kind: VoteType::Precommit, height, round, value, voter }
    }
}
