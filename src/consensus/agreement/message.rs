//! What members say to each other about blocks, and what the write-ahead log keeps of it:
//! the agreement crate's types in a form that can be sent and stored.

use std::sync::Arc;

use malachitebft_core_consensus::{Input, ProposedValue, SignedConsensusMsg};
use malachitebft_core_types::{
    NilOrVal, PolkaCertificate, PolkaSignature, Round, RoundCertificate, RoundCertificateType, RoundSignature,
    SignedMessage, Timeout, TimeoutKind, Validity, ValueOrigin, VoteType,
};
use serde::{Deserialize, Serialize};

use super::context::{BlockContext, BlockProposal, BlockValue, BlockVote, ChainHeight};
use crate::types::{
    Block, BlockHash, CommitSignature, ConsensusStep, GenesisHash, Height, PublicKey, Signature,
    consensus_vote_message, proposal_message,
};

/// A message of the agreement on blocks (Tendermint; Buchman, Kwon, Milosevic 2018).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum ConsensusMessage {
    /// A block, put forward by the round's proposer.
    Proposal(Proposal),
    /// A prevote or precommit of a member.
    Vote(ConsensusVote),
    /// Prevotes of a quorum for one block.
    Polka(Polka),
    /// Votes that justify entering a later round.
    RoundChange(RoundChange),
}

/// A block, put forward in a round.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Proposal {
    /// The height it is for.
    pub height: Height,
    /// The round.
    pub round: u32,
    /// The block, whole but for its transactions' bodies.
    pub block: Arc<Block>,
    /// The round in which a quorum prevoted it before; -1 for a fresh block.
    pub valid_round: i64,
    /// The round's proposer.
    pub proposer: PublicKey,
    /// Over `H("TIME/proposal", ...)`.
    pub signature: Signature,
}

/// A vote on a block, or (`null`) on none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ConsensusVote {
    /// Prevote or precommit.
    pub step: ConsensusStep,
    /// The height it is for.
    pub height: Height,
    /// The round.
    pub round: u32,
    /// The block; `null` for nil.
    pub block_hash: Option<BlockHash>,
    /// The member.
    pub voter: PublicKey,
    /// Over `H("TIME/prevote" or "TIME/precommit", ...)`.
    pub signature: Signature,
}

/// Prevotes of a quorum for one block.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Polka {
    /// The height it is for.
    pub height: Height,
    /// The round.
    pub round: u32,
    /// The block.
    pub block_hash: BlockHash,
    /// Prevotes of distinct members.
    pub votes: Vec<CommitSignature>,
}

/// Votes of one round that justify entering another: precommits of a quorum for anything,
/// or votes of more than a third from a later round.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundChange {
    /// The height it is for.
    pub height: Height,
    /// The round of the votes.
    pub round: u32,
    /// Whether the votes let one skip to their round; otherwise they end it.
    pub skip: bool,
    /// Votes of distinct members.
    pub votes: Vec<RoundVote>,
}

/// A vote of a [`RoundChange`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RoundVote {
    /// Prevote or precommit.
    pub step: ConsensusStep,
    /// The block; `null` for nil.
    pub block_hash: Option<BlockHash>,
    /// The member.
    pub voter: PublicKey,
    /// Over the vote's message.
    pub signature: Signature,
}

impl ConsensusMessage {
    /// The height that it is about.
    pub const fn height(&self) -> Height {
        match self {
            Self::Proposal(m) => m.height,
            Self::Vote(m) => m.height,
            Self::Polka(m) => m.height,
            Self::RoundChange(m) => m.height,
        }
    }

    pub(super) fn to_input(&self, genesis_hash: &GenesisHash) -> Input<BlockContext> {
        match self {
            Self::Proposal(m) => {
                let message = BlockProposal {
                    height: ChainHeight(m.height),
                    round: Round::new(m.round),
                    value: BlockValue::new(Arc::clone(&m.block), genesis_hash),
                    valid_round: u32::try_from(m.valid_round).map_or(Round::Nil, Round::new),
                    proposer: m.proposer,
                };
                Input::Proposal(SignedMessage::new(message, m.signature))
            }
            Self::Vote(m) => {
                let message = BlockVote {
                    kind: kind_of(m.step),
                    height: ChainHeight(m.height),
                    round: Round::new(m.round),
                    value: m.block_hash.map_or(NilOrVal::Nil, NilOrVal::Val),
                    voter: m.voter,
                };
                Input::Vote(SignedMessage::new(message, m.signature))
            }
            Self::Polka(m) => Input::PolkaCertificate(PolkaCertificate {
                height: ChainHeight(m.height),
                round: Round::new(m.round),
                value_id: m.block_hash,
                polka_signatures: m.votes.iter().map(|v| PolkaSignature::new(v.voter, v.signature)).collect(),
            }),
            Self::RoundChange(m) => {
                let vote = |v: &RoundVote| {
                    let value = v.block_hash.map_or(NilOrVal::Nil, NilOrVal::Val);
                    RoundSignature::new(kind_of(v.step), value, v.voter, v.signature)
                };
                Input::RoundCertificate(RoundCertificate {
                    height: ChainHeight(m.height),
                    round: Round::new(m.round),
                    cert_type: if m.skip { RoundCertificateType::Skip } else { RoundCertificateType::Precommit },
                    round_signatures: m.votes.iter().map(vote).collect(),
                })
            }
        }
    }
}

const fn kind_of(step: ConsensusStep) -> VoteType {
    match step {
        ConsensusStep::Prevote => VoteType::Prevote,
        ConsensusStep::Precommit => VoteType::Precommit,
    }
}

const fn step_of(kind: VoteType) -> ConsensusStep {
    match kind {
        VoteType::Prevote => ConsensusStep::Prevote,
        VoteType::Precommit => ConsensusStep::Precommit,
    }
}

pub(super) fn hash_of(value: &NilOrVal<BlockHash>) -> Option<BlockHash> {
    match value {
        NilOrVal::Nil => None,
        NilOrVal::Val(hash) => Some(*hash),
    }
}

fn round_of(round: Round) -> u32 {
    round.as_u32().unwrap_or(0)
}

/// What is signed for a vote.
pub(super) fn vote_bytes(genesis_hash: &GenesisHash, vote: &BlockVote) -> [u8; 32] {
    let block = hash_of(&vote.value);
    consensus_vote_message(step_of(vote.kind), genesis_hash, vote.height.0, round_of(vote.round), block.as_ref())
}

/// What is signed for a proposal.
pub(super) fn proposal_bytes(genesis_hash: &GenesisHash, proposal: &BlockProposal) -> [u8; 32] {
    let (height, round) = (proposal.height.0, round_of(proposal.round));
    proposal_message(genesis_hash, height, round, &proposal.value.hash, proposal.valid_round.as_i64())
}

impl From<SignedMessage<BlockContext, BlockVote>> for ConsensusMessage {
    fn from(vote: SignedMessage<BlockContext, BlockVote>) -> Self {
        let SignedMessage { message, signature } = vote;
        Self::Vote(ConsensusVote {
            step: step_of(message.kind),
            height: message.height.0,
            round: round_of(message.round),
            block_hash: hash_of(&message.value),
            voter: message.voter,
            signature,
        })
    }
}

impl From<SignedMessage<BlockContext, BlockProposal>> for ConsensusMessage {
    fn from(proposal: SignedMessage<BlockContext, BlockProposal>) -> Self {
        let SignedMessage { message, signature } = proposal;
        Self::Proposal(Proposal {
            height: message.height.0,
            round: round_of(message.round),
            block: message.value.block,
            valid_round: message.valid_round.as_i64(),
            proposer: message.proposer,
            signature,
        })
    }
}

impl From<SignedConsensusMsg<BlockContext>> for ConsensusMessage {
    fn from(message: SignedConsensusMsg<BlockContext>) -> Self {
        match message {
            SignedConsensusMsg::Vote(vote) => vote.into(),
            SignedConsensusMsg::Proposal(proposal) => proposal.into(),
        }
    }
}

impl From<PolkaCertificate<BlockContext>> for ConsensusMessage {
    fn from(polka: PolkaCertificate<BlockContext>) -> Self {
        let vote = |v: PolkaSignature<BlockContext>| CommitSignature { voter: v.address, signature: v.signature };
        Self::Polka(Polka {
            height: polka.height.0,
            round: round_of(polka.round),
            block_hash: polka.value_id,
            votes: polka.polka_signatures.into_iter().map(vote).collect(),
        })
    }
}

impl From<RoundCertificate<BlockContext>> for ConsensusMessage {
    fn from(certificate: RoundCertificate<BlockContext>) -> Self {
        let vote = |v: RoundSignature<BlockContext>| RoundVote {
            step: step_of(v.vote_type),
            block_hash: hash_of(&v.value_id),
            voter: v.address,
            signature: v.signature,
        };
        Self::RoundChange(RoundChange {
            height: certificate.height.0,
            round: round_of(certificate.round),
            skip: certificate.cert_type == RoundCertificateType::Skip,
            votes: certificate.round_signatures.into_iter().map(vote).collect(),
        })
    }
}

/// Which timer of a round has run out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum RoundTimer {
    /// No block was put forward in time.
    Propose,
    /// The prevotes do not agree.
    Prevote,
    /// The precommits do not agree.
    Precommit,
}

/// An entry of the write-ahead log: what the agreement was fed. Fed again after a restart,
/// in order, it says exactly what was said before.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub enum AgreementRecord {
    /// A message, of another member or this one's own.
    Message(ConsensusMessage),
    /// A timer ran out.
    Timeout {
        /// Which.
        timer: RoundTimer,
        /// Of which round.
        round: u32,
    },
    /// What this member found of a block.
    Judged {
        /// The round in which it came.
        round: u32,
        /// The block.
        block: Arc<Block>,
        /// Whether it may be voted for.
        valid: bool,
    },
}

impl AgreementRecord {
    /// The entry for an input; `None` for what is not kept.
    pub(super) fn of(input: Input<BlockContext>) -> Option<Self> {
        Some(match input {
            Input::Vote(vote) => Self::Message(vote.into()),
            Input::Proposal(proposal) => Self::Message(proposal.into()),
            Input::PolkaCertificate(polka) => Self::Message(polka.into()),
            Input::TimeoutElapsed(timeout) => Self::Timeout {
                timer: match timeout.kind {
                    TimeoutKind::Propose => RoundTimer::Propose,
                    TimeoutKind::Prevote => RoundTimer::Prevote,
                    TimeoutKind::Precommit => RoundTimer::Precommit,
                    TimeoutKind::Rebroadcast | TimeoutKind::FinalizeHeight(_) => return None,
                },
                round: round_of(timeout.round),
            },
            Input::ProposedValue(value, _) => Self::Judged {
                round: round_of(value.round),
                block: value.value.block,
                valid: value.validity.is_valid(),
            },
            Input::StartHeight(..) | Input::Propose(_) | Input::RoundCertificate(_) | Input::SyncValueResponse(_) => {
                return None;
            }
        })
    }

    pub(super) fn to_input(&self, genesis_hash: &GenesisHash) -> Input<BlockContext> {
        match self {
            Self::Message(message) => message.to_input(genesis_hash),
            Self::Timeout { timer, round } => {
                let kind = match timer {
                    RoundTimer::Propose => TimeoutKind::Propose,
                    RoundTimer::Prevote => TimeoutKind::Prevote,
                    RoundTimer::Precommit => TimeoutKind::Precommit,
                };
                Input::TimeoutElapsed(Timeout::new(Round::new(*round), kind))
            }
            Self::Judged { round, block, valid } => {
                judged(BlockValue::new(Arc::clone(block), genesis_hash), *round, *valid)
            }
        }
    }
}

/// The verdict on a block, for the agreement.
pub(super) fn judged(value: BlockValue, round: u32, valid: bool) -> Input<BlockContext> {
    let proposed = ProposedValue {
        height: ChainHeight(value.block.height),
        round: Round::new(round),
        valid_round: Round::Nil,
        proposer: value.block.proposer,
        validity: Validity::from_bool(valid),
        value,
    };
    Input::ProposedValue(proposed, ValueOrigin::Consensus)
}
