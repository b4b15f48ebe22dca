//! The agreement on the next block: Tendermint, by `arc-malachitebft-core-consensus`.
//!
//! The crate is a state machine without I/O. This module gives it this network's types,
//! performs its effects, and collects what has to be logged and what may be said once
//! that is durable. Time is an argument; timers are deadlines that somebody looks at.
//!
//! *Why a restart says nothing twice.* Whatever the crate is fed is in the write-ahead log
//! in the same commit as what it made of it, and nothing is sent before that commit is
//! durable. So feeding the log again gives the same votes, and the crate compares each
//! with the one that the log holds and sends that one.

mod context;
mod message;
mod verifier;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use malachitebft_core_consensus::{
    ConsensusMsg, Effect, Error, Input, LivenessMsg, LocallyProposedValue, Params, Resumable, Resume,
    SignedConsensusMsg, State, ThresholdParams, ValuePayload, process,
};
use malachitebft_core_types::{
    CertificateError, CommitCertificate, LinearTimeouts, Round, SignedMessage, Timeout, TimeoutKind,
    VoteExtensionPolicy,
};

pub use message::{
    AgreementRecord, ConsensusMessage, ConsensusVote, Polka, Proposal, RoundChange, RoundTimer, RoundVote,
};

use self::context::{BlockContext, BlockProposal, BlockValue, ChainHeight, Electors};
use self::message::{judged, proposal_bytes, vote_bytes};
use self::verifier::Verifier;
use super::committee::Committee;
use crate::limits::{MAX_BLOCKS_OF_A_ROUND, MAX_CLOCK_AHEAD_MS, MAX_CONSENSUS_BACKLOG};
use crate::types::{Block, BlockHash, CommitSignature, CommitVote, DecidedBlock, Height, PublicKey, SecretKey};

/// How long a round's steps may take: enough to fetch a block's transactions, growing
/// until messages are faster.
const TIMEOUTS: LinearTimeouts = LinearTimeouts {
    propose: Duration::from_millis(1_000),
    propose_delta: Duration::from_millis(500),
    prevote: Duration::from_millis(500),
    prevote_delta: Duration::from_millis(250),
    precommit: Duration::from_millis(500),
    precommit_delta: Duration::from_millis(250),
    rebroadcast: Duration::from_millis(1_500),
    max_timeout: Duration::from_secs(15),
};

/// Why the agreement cannot go on.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the agreement on blocks failed: {0}")]
pub struct AgreementFault(String);

/// A member's own valid signature that its log does not hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct UnknownOwnMessage;

/// What a member has said at the open height: at most one thing of each.
type Said = BTreeMap<(bool, u32), Option<BlockHash>>;

/// A block that was put forward at the open height.
#[derive(Debug)]
struct Candidate {
    value: BlockValue,
    round: u32,
    /// Who put it forward, and whether it may be voted for.
    proposer: PublicKey,
    verdict: Option<bool>,
}

/// What came of feeding the crate.
#[derive(Debug, Default)]
pub(super) struct Outcome {
    /// To be logged before anything else happens.
    pub(super) log: Vec<(Height, AgreementRecord)>,
    /// To be sent to all members once the log is durable.
    pub(super) messages: Vec<ConsensusMessage>,
}

/// One member's part in the agreement.
pub(super) struct Agreement {
    state: State<BlockContext>,
    hands: Hands,
}

/// What the crate's effects touch.
struct Hands {
    verifier: Verifier,
    key: SecretKey,
    own: PublicKey,
    now_ms: u64,
    running: bool,
    replaying: Option<Vec<AgreementRecord>>,
    timers: Vec<(u64, Timeout)>,
    candidates: BTreeMap<BlockHash, Candidate>,
    votes_said: Said,
    proposals_said: BTreeMap<u32, BlockHash>,
    wanted: Option<u32>,
    decided: Option<DecidedBlock>,
    outcome: Outcome,
    equivocations: u64,
}

impl fmt::Debug for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (height, round) = (self.state.height(), self.state.round());
        write!(f, "Agreement(height {height}, round {round}, running {})", self.hands.running)
    }
}

impl Agreement {
    /// The part of the member with this key, after the block at `height`.
    pub(super) fn new(committee: &Committee, key: SecretKey, height: Height) -> Self {
        let electors = Electors::of(committee);
        let own = key.public_key();
        let params = Params {
            address: own,
            threshold_params: ThresholdParams::default(),
            value_payload: ValuePayload::ProposalAndParts,
            enabled: true,
        };
        let (at, backlog) = (ChainHeight(height), MAX_CONSENSUS_BACKLOG);
        let state = State::new(BlockContext, at, electors.clone(), params, 4, backlog);
        let hands = Hands {
            verifier: Verifier { electors, genesis_hash: *committee.genesis_hash() },
            key,
            own,
            now_ms: 0,
            running: false,
            replaying: None,
            timers: Vec::new(),
            candidates: BTreeMap::new(),
            votes_said: Said::new(),
            proposals_said: BTreeMap::new(),
            wanted: None,
            decided: None,
            outcome: Outcome::default(),
            equivocations: 0,
        };
        Self { state, hands }
    }

    /// Whether a height is open.
    pub(super) const fn running(&self) -> bool {
        self.hands.running
    }

    /// Opens a height. What came early for it is taken in.
    pub(super) fn start(&mut self, height: Height, now_ms: u64) -> Result<(), AgreementFault> {
        self.open(height, false, now_ms)
    }

    fn open(&mut self, height: Height, is_restart: bool, now_ms: u64) -> Result<(), AgreementFault> {
        let hands = &mut self.hands;
        hands.running = true;
        hands.timers.clear();
        hands.candidates.clear();
        hands.votes_said.clear();
        hands.proposals_said.clear();
        (hands.wanted, hands.decided) = (None, None);
        let electors = hands.verifier.electors.clone();
        let policy = VoteExtensionPolicy::Disabled;
        self.feed(Input::StartHeight(ChainHeight(height), electors, is_restart, None, policy), now_ms)
    }

    /// Leaves a height that was decided elsewhere.
    pub(super) fn abandon(&mut self) {
        self.hands.running = false;
        self.hands.timers.clear();
        self.hands.candidates.clear();
        (self.hands.wanted, self.hands.decided) = (None, None);
    }

    /// Feeds the log of the open height again, before anything else comes.
    pub(super) fn replay(
        &mut self,
        height: Height,
        records: Vec<AgreementRecord>,
        now_ms: u64,
    ) -> Result<(), AgreementFault> {
        let genesis_hash = self.hands.verifier.genesis_hash;
        let inputs: Vec<_> = records.iter().map(|record| record.to_input(&genesis_hash)).collect();
        for record in &records {
            if let AgreementRecord::Message(message) = record {
                self.hands.remember_own(message);
            }
        }
        self.state.index_wal_entries(&inputs);
        self.hands.replaying = Some(records);
        let mut outcome = self.open_again(height, now_ms);
        for input in inputs {
            if outcome.is_ok() && self.hands.decided.is_none() {
                outcome = self.feed(input, now_ms);
            }
        }
        self.state.reset_entries_index();
        self.hands.replaying = None;
        outcome
    }

    /// Opening forgets what was said; the log has just told it.
    fn open_again(&mut self, height: Height, now_ms: u64) -> Result<(), AgreementFault> {
        let votes = std::mem::take(&mut self.hands.votes_said);
        let proposals = std::mem::take(&mut self.hands.proposals_said);
        let opened = self.open(height, true, now_ms);
        self.hands.votes_said.extend(votes);
        self.hands.proposals_said.extend(proposals);
        opened
    }

    /// A message of another member came.
    pub(super) fn receive(
        &mut self,
        message: &ConsensusMessage,
        now_ms: u64,
        unix_ms: u64,
    ) -> Result<Result<(), UnknownOwnMessage>, AgreementFault> {
        if self.hands.running && message.height() == self.state.height().0 {
            if let ConsensusMessage::Proposal(proposal) = message {
                // A block that was prevoted before is compared with neither proposer nor clock.
                let fresh = proposal.valid_round < 0;
                let from_its_maker = proposal.block.proposer == proposal.proposer;
                let too_early = proposal.block.timestamp_ms > unix_ms.saturating_add(MAX_CLOCK_AHEAD_MS);
                if proposal.block.height != proposal.height || (fresh && (!from_its_maker || too_early)) {
                    return Ok(Ok(()));
                }
            }
            if self.hands.is_own_and_unknown(message) {
                return Ok(Err(UnknownOwnMessage));
            }
        }
        let input = message.to_input(&self.hands.verifier.genesis_hash);
        self.feed(input, now_ms).map(Ok)
    }

    /// Lets every timer run out that is due.
    pub(super) fn tick(&mut self, now_ms: u64) -> Result<(), AgreementFault> {
        while self.hands.running {
            let due = self.hands.timers.iter().position(|(at, _)| *at <= now_ms);
            let Some(due) = due else { break };
            let (_, timeout) = self.hands.timers.swap_remove(due);
            self.feed(Input::TimeoutElapsed(timeout), now_ms)?;
        }
        Ok(())
    }

    /// The blocks that wait for a verdict, with whoever put them forward.
    pub(super) fn unjudged(&self) -> Vec<(BlockHash, Arc<Block>, PublicKey)> {
        let open = self.hands.candidates.iter().filter(|(_, candidate)| candidate.verdict.is_none());
        open.map(|(hash, c)| (*hash, Arc::clone(&c.value.block), c.proposer)).collect()
    }

    /// Says of a block whether it may be voted for.
    pub(super) fn judge(&mut self, hash: &BlockHash, valid: bool, now_ms: u64) -> Result<(), AgreementFault> {
        let Some(candidate) = self.hands.candidates.get_mut(hash) else { return Ok(()) };
        candidate.verdict = Some(valid);
        let input = judged(candidate.value.clone(), candidate.round, valid);
        self.feed(input, now_ms)
    }

    /// Whether it is this member's turn to put a block forward.
    pub(super) const fn wants_block(&self) -> bool {
        self.hands.running && self.hands.wanted.is_some()
    }

    /// Puts a block forward.
    pub(super) fn propose(&mut self, block: Block, now_ms: u64) -> Result<(), AgreementFault> {
        let Some(round) = self.hands.wanted.take() else { return Ok(()) };
        let value = BlockValue::new(Arc::new(block), &self.hands.verifier.genesis_hash);
        let proposer = self.hands.own;
        let candidate = Candidate { value: value.clone(), round, proposer, verdict: Some(true) };
        self.hands.candidates.insert(value.hash, candidate);
        let height = ChainHeight(value.block.height);
        self.feed(Input::Propose(LocallyProposedValue::new(height, Round::new(round), value)), now_ms)
    }

    /// The block that the open height decided, once.
    pub(super) fn take_decided(&mut self) -> Option<DecidedBlock> {
        let decided = self.hands.decided.take()?;
        self.abandon();
        Some(decided)
    }

    /// What has to be logged, and said after that.
    pub(super) fn take_outcome(&mut self) -> Outcome {
        std::mem::take(&mut self.hands.outcome)
    }

    /// Members that were seen to say two things at once, counted by height.
    pub(super) const fn equivocations(&self) -> u64 {
        self.hands.equivocations
    }

    fn feed(&mut self, input: Input<BlockContext>, now_ms: u64) -> Result<(), AgreementFault> {
        let Self { state, hands } = self;
        hands.now_ms = now_ms;
        let result: Result<(), Error<BlockContext>> = process!(
            input: input,
            state: state,
            metrics: &(),
            with: effect => Ok::<_, AgreementFault>(hands.perform(effect))
        );
        match result {
            Ok(()) => Ok(()),
            Err(error @ Error::ReplayDivergence(..)) => Err(AgreementFault(error.to_string())),
            Err(error) => {
                tracing::warn!(%error, "the agreement refused an input");
                Ok(())
            }
        }
    }
}

impl Hands {
    fn perform(&mut self, effect: Effect<BlockContext>) -> Resume<BlockContext> {
        match effect {
            Effect::CancelAllTimeouts(r) => {
                self.timers.clear();
                r.resume_with(())
            }
            Effect::CancelTimeout(timeout, r) => {
                self.timers.retain(|(_, running)| *running != timeout);
                r.resume_with(())
            }
            Effect::ScheduleTimeout(timeout, r) => {
                self.timers.retain(|(_, running)| *running != timeout);
                if !matches!(timeout.kind, TimeoutKind::FinalizeHeight(_)) {
                    let wait = u64::try_from(TIMEOUTS.duration_for(timeout).as_millis()).unwrap_or(u64::MAX);
                    self.timers.push((self.now_ms.saturating_add(wait), timeout));
                }
                r.resume_with(())
            }
            Effect::StartRound(_, _, _, _, r) => {
                self.wanted = None;
                r.resume_with(())
            }
            Effect::PublishConsensusMsg(message, r) => {
                self.say(message.into());
                r.resume_with(())
            }
            Effect::PublishLivenessMsg(message, r) => {
                self.say(match message {
                    LivenessMsg::Vote(vote) => SignedConsensusMsg::Vote(vote).into(),
                    LivenessMsg::PolkaCertificate(polka) => polka.into(),
                    LivenessMsg::SkipRoundCertificate(certificate) => certificate.into(),
                });
                r.resume_with(())
            }
            Effect::RepublishVote(vote, r) => {
                self.say(vote.into());
                r.resume_with(())
            }
            Effect::RepublishRoundCertificate(certificate, r) => {
                self.say(certificate.into());
                r.resume_with(())
            }
            Effect::GetValue(_, round, _, r) => {
                self.wanted = round.as_u32();
                r.resume_with(())
            }
            // A proposal carries its whole block.
            Effect::RestreamProposal(_, _, _, _, _, r) => r.resume_with(()),
            Effect::Decide(certificate, _, r) => {
                self.decide(&certificate);
                r.resume_with(())
            }
            Effect::Finalize(_, _, evidence, r) => {
                if !evidence.is_empty() {
                    self.equivocations += 1;
                    tracing::error!(?evidence, "a member said two things at once about a block");
                }
                r.resume_with(())
            }
            Effect::SignVote(vote, r) => {
                let signature = self.key.sign(&vote_bytes(&self.verifier.genesis_hash, &vote));
                r.resume_with(SignedMessage::new(vote, signature))
            }
            Effect::SignProposal(proposal, r) => {
                let signature = self.key.sign(&proposal_bytes(&self.verifier.genesis_hash, &proposal));
                r.resume_with(SignedMessage::new(proposal, signature))
            }
            Effect::VerifySignature(message, key, r) => {
                let SignedMessage { message, signature } = message;
                let valid = key.verify(&self.verifier.signed_bytes(&message), &signature);
                if let (true, ConsensusMsg::Proposal(proposal)) = (valid, message) {
                    self.consider(proposal);
                }
                r.resume_with(valid)
            }
            Effect::VerifyCommitCertificate(certificate, _, _, r) => {
                r.resume_with(self.verifier.check_commit(&certificate))
            }
            Effect::VerifyPolkaCertificate(certificate, _, _, r) => {
                r.resume_with(self.verifier.check_polka(&certificate))
            }
            Effect::VerifyRoundCertificate(certificate, _, _, r) => {
                r.resume_with(self.verifier.check_round(&certificate))
            }
            Effect::WalAppend(height, input, r) => {
                if let Some(record) = AgreementRecord::of(input) {
                    self.log(height.0, record);
                }
                r.resume_with(())
            }
            // Blocks are synced and vote extensions used by nobody here.
            Effect::CertVerifiedSyncValue(_, _, r) | Effect::CertRejectedSyncValue(_, _, _, r) => r.resume_with(()),
            Effect::VerifyExtendedCommitCertificate(_, _, _, _, r) => {
                r.resume_with(Err(CertificateError::VerificationError(None)))
            }
            Effect::ExtendVote(_, _, _, _, r) => r.resume_with(None),
            Effect::VerifyVoteExtension(_, _, _, _, _, _, r) => r.resume_with(Ok(())),
        }
    }

    fn say(&mut self, message: ConsensusMessage) {
        self.remember_own(&message);
        self.outcome.messages.push(message);
    }

    fn remember_own(&mut self, message: &ConsensusMessage) {
        match message {
            ConsensusMessage::Vote(vote) if vote.voter == self.own => {
                self.votes_said
                    .insert((vote.step == crate::types::ConsensusStep::Precommit, vote.round), vote.block_hash);
            }
            ConsensusMessage::Proposal(proposal) if proposal.proposer == self.own => {
                self.proposals_said.insert(proposal.round, proposal.block.hash(&self.verifier.genesis_hash));
            }
            _ => {}
        }
    }

    /// Whether this member's own valid signature stands under something that it has not
    /// said at the open height.
    fn is_own_and_unknown(&self, message: &ConsensusMessage) -> bool {
        match message {
            ConsensusMessage::Vote(vote) if vote.voter == self.own => {
                let precommit = vote.step == crate::types::ConsensusStep::Precommit;
                let unknown = self.votes_said.get(&(precommit, vote.round)) != Some(&vote.block_hash);
                let bytes = crate::types::consensus_vote_message(
                    vote.step,
                    &self.verifier.genesis_hash,
                    vote.height,
                    vote.round,
                    vote.block_hash.as_ref(),
                );
                unknown && self.own.verify(&bytes, &vote.signature)
            }
            ConsensusMessage::Proposal(proposal) if proposal.proposer == self.own => {
                let hash = proposal.block.hash(&self.verifier.genesis_hash);
                let unknown = self.proposals_said.get(&proposal.round) != Some(&hash);
                let (height, round, valid_round) = (proposal.height, proposal.round, proposal.valid_round);
                let bytes =
                    crate::types::proposal_message(&self.verifier.genesis_hash, height, round, &hash, valid_round);
                unknown && self.own.verify(&bytes, &proposal.signature)
            }
            _ => false,
        }
    }

    /// Appends to the log, unless the entry is just being read from it.
    fn log(&mut self, height: Height, record: AgreementRecord) {
        if self.replaying.as_ref().is_some_and(|known| known.contains(&record)) {
            return;
        }
        self.outcome.log.push((height, record));
    }

    /// A proposal with a good signature: its block waits for a verdict.
    fn consider(&mut self, proposal: BlockProposal) {
        let BlockProposal { height, round, value, proposer, .. } = proposal;
        let round = round.as_u32().unwrap_or(0);
        // A liar fills its own rounds and nobody else's.
        let of_round = self.candidates.values().filter(|candidate| candidate.round == round).count();
        let here = height.0 == value.block.height && of_round < MAX_BLOCKS_OF_A_ROUND;
        if !here || self.candidates.contains_key(&value.hash) {
            return;
        }
        // What the log holds a verdict of is not judged again.
        let hash = value.hash;
        let known = self.replaying.iter().flatten().find_map(|record| match record {
            AgreementRecord::Judged { block, valid, .. } => {
                (block.hash(&self.verifier.genesis_hash) == hash).then_some(*valid)
            }
            _ => None,
        });
        self.candidates.insert(hash, Candidate { value, round, proposer, verdict: known });
    }

    fn decide(&mut self, certificate: &CommitCertificate<BlockContext>) {
        let Some(candidate) = self.candidates.get(&certificate.value_id) else {
            tracing::error!(height = %certificate.height, "decided a block that is not here; it will be fetched");
            return;
        };
        let vote = |signature: &malachitebft_core_types::CommitSignature<BlockContext>| CommitSignature {
            voter: signature.address,
            signature: signature.signature,
        };
        self.decided = Some(DecidedBlock {
            block: candidate.value.block.as_ref().clone(),
            certificate: CommitVote {
                height: certificate.height.0,
                round: certificate.round.as_u32().unwrap_or(0),
                block_hash: certificate.value_id,
                votes: certificate.commit_signatures.iter().map(vote).collect(),
            },
        });
    }
}
