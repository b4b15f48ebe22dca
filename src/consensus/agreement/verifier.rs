//! Checks the signatures of messages and certificates for the agreement crate.

#![expect(clippy::result_large_err, reason = "the agreement crate's own error type")]

use malachitebft_core_consensus::{ConsensusMsg, ThresholdParams};
use malachitebft_core_types::{
    CertificateError, CommitCertificate, NilOrVal, PolkaCertificate, RoundCertificate, RoundCertificateType, VoteType,
};

use super::context::{BlockContext, BlockVote, Electors};
use super::message::{proposal_bytes, vote_bytes};
use crate::types::{GenesisHash, Signature, SignatureItem, verify_batch};

/// Who may vote, and on which network.
#[derive(Debug)]
pub(super) struct Verifier {
    pub(super) electors: Electors,
    pub(super) genesis_hash: GenesisHash,
}

impl Verifier {
    pub(super) fn signed_bytes(&self, message: &ConsensusMsg<BlockContext>) -> [u8; 32] {
        match message {
            ConsensusMsg::Vote(vote) => vote_bytes(&self.genesis_hash, vote),
            ConsensusMsg::Proposal(proposal) => proposal_bytes(&self.genesis_hash, proposal),
        }
    }

    pub(super) fn check_commit(
        &self,
        certificate: &CommitCertificate<BlockContext>,
    ) -> Result<(), CertificateError<BlockContext>> {
        let (height, round) = (certificate.height, certificate.round);
        let votes = certificate.commit_signatures.iter().map(|s| {
            let value = NilOrVal::Val(certificate.value_id);
            (BlockVote { kind: VoteType::Precommit, height, round, value, voter: s.address }, s.signature)
        });
        self.check_votes(votes, ThresholdParams::default().quorum)
    }

    pub(super) fn check_polka(
        &self,
        certificate: &PolkaCertificate<BlockContext>,
    ) -> Result<(), CertificateError<BlockContext>> {
        let (height, round) = (certificate.height, certificate.round);
        let votes = certificate.polka_signatures.iter().map(|s| {
            let value = NilOrVal::Val(certificate.value_id);
            (BlockVote { kind: VoteType::Prevote, height, round, value, voter: s.address }, s.signature)
        });
        self.check_votes(votes, ThresholdParams::default().quorum)
    }

    pub(super) fn check_round(
        &self,
        certificate: &RoundCertificate<BlockContext>,
    ) -> Result<(), CertificateError<BlockContext>> {
        let thresholds = ThresholdParams::default();
        let (height, round) = (certificate.height, certificate.round);
        let mut votes = Vec::with_capacity(certificate.round_signatures.len());
        for s in &certificate.round_signatures {
            let precommits_only = certificate.cert_type == RoundCertificateType::Precommit;
            if precommits_only && s.vote_type != VoteType::Precommit {
                return Err(CertificateError::InvalidVoteType(s.address));
            }
            let vote = BlockVote { kind: s.vote_type, height, round, value: s.value_id, voter: s.address };
            votes.push((vote, s.signature));
        }
        let needed = match certificate.cert_type {
            RoundCertificateType::Precommit => thresholds.quorum,
            RoundCertificateType::Skip => thresholds.honest,
        };
        self.check_votes(votes.into_iter(), needed)
    }

    /// Votes of distinct members, validly signed, of enough weight.
    fn check_votes(
        &self,
        votes: impl Iterator<Item = (BlockVote, Signature)>,
        needed: malachitebft_core_types::ThresholdParam,
    ) -> Result<(), CertificateError<BlockContext>> {
        use malachitebft_core_types::{Validator, ValidatorSet};
        let total = self.electors.total_voting_power();
        let (mut seen, mut signed, mut items) = (Vec::new(), 0_u64, Vec::new());
        for (vote, signature) in votes {
            let elector =
                self.electors.get_by_address(&vote.voter).ok_or(CertificateError::UnknownValidator(vote.voter))?;
            if seen.contains(&vote.voter) {
                return Err(CertificateError::DuplicateVote(vote.voter));
            }
            seen.push(vote.voter);
            signed += elector.voting_power();
            items.push(SignatureItem::new(&vote.voter, &vote_bytes(&self.genesis_hash, &vote), &signature));
        }
        if !needed.is_met(signed, total) {
            let expected = needed.min_expected(total);
            return Err(CertificateError::NotEnoughVotingPower { signed, total, expected });
        }
        if verify_batch(&items) { Ok(()) } else { Err(CertificateError::VerificationError(None)) }
    }
}
