//! Vote batches: what is let in is a member's, within the limits, and signed as the
//! protocol says; each of its votes proves itself alone.

use std::sync::Arc;

use time_masternode::consensus::{
    CountedVote, MemberBatch, Signed, Verified, Vote, VoteBatch, VoteError, VoteKind, sign_batch,
};
use time_masternode::limits::{MAX_FRAME_BYTES, MAX_VOTES_PER_BATCH};
use time_masternode::types::{Hash32, merkle_climb};

use super::Outcome;
use super::oracle::{Canonical, merkle_root, path_length, tagged};
use super::setting::{EQUAL, Setting, secret_of};

/// Of a longer batch not every vote's path is climbed.
const MAX_CLIMBED: usize = 16;

/// The leaf of a vote, by the protocol's words.
pub fn leaf(vote: &Vote) -> [u8; 32] {
    let kind = match vote.kind {
        VoteKind::Approve => 1,
        VoteKind::Commit => 2,
        VoteKind::Abort => 3,
    };
    tagged("TIME/vote", &[&[kind], vote.txid.as_bytes().as_slice()].concat())
}

/// What is signed for a batch with this root.
pub fn batch_message(setting: &Setting, epoch: u64, size: usize, root: &[u8; 32]) -> [u8; 32] {
    let out = Canonical::default().raw(setting.genesis.hash().as_bytes()).u64(epoch).count(size).raw(root);
    tagged("TIME/vote-batch", &out.0)
}

/// The JSON of a batch.
pub fn votes(data: &[u8]) -> Outcome {
    if data.len() > MAX_FRAME_BYTES {
        return Outcome::Refused;
    }
    let Ok(wire) = serde_json::from_slice::<VoteBatch>(data) else { return Outcome::Refused };
    let committee = &EQUAL.committee;
    let is_member = committee.members().iter().any(|member| member.public_key == wire.voter);
    match MemberBatch::new(wire.clone(), committee) {
        Err(error) => {
            let is_true = match error {
                VoteError::NotMember => !is_member,
                VoteError::WrongEpoch => wire.epoch != 0,
                VoteError::BatchSize => !(1..=MAX_VOTES_PER_BATCH).contains(&wire.votes.len()),
            };
            assert!(is_true, "{error:?} of {wire:?}");
            Outcome::Refused
        }
        Ok(batch) => {
            assert!(is_member && wire.epoch == 0 && (1..=MAX_VOTES_PER_BATCH).contains(&wire.votes.len()));
            assert_eq!((batch.wire(), batch.votes()), (&wire, wire.votes.as_slice()));
            assert_eq!(committee.member(batch.member()).public_key, wire.voter);
            let json = serde_json::to_vec(&wire).expect("a batch is JSON");
            assert_eq!(serde_json::from_slice::<VoteBatch>(&json).expect("it is read again"), wire);
            signed(&wire, batch);
            Outcome::Accepted
        }
    }
}

fn signed(wire: &VoteBatch, batch: MemberBatch) {
    let leaves: Vec<[u8; 32]> = wire.votes.iter().map(leaf).collect();
    let root = merkle_root(&leaves);
    let message = batch_message(&EQUAL, wire.epoch, leaves.len(), &root);
    let valid = wire.voter.verify(&message, &wire.signature);
    assert_eq!(Verified::check(batch).is_ok(), valid, "the signature is over the protocol's bytes");

    let Some(key) = secret_of(&wire.voter) else { return };
    let ours = sign_batch(key, &EQUAL.committee, wire.votes.clone()).expect("a member signs what is within the limits");
    let signature = ours.get().wire().signature;
    assert!(wire.voter.verify(&message, &signature));
    let again = MemberBatch::new(ours.get().wire().clone(), &EQUAL.committee).expect("it is a batch");
    let again = Verified::check(again).expect("what was signed here is verified elsewhere");
    assert_eq!(again.get().signature_items().len(), 1);
    let again = Arc::new(again);
    for index in (0..leaves.len()).take(MAX_CLIMBED) {
        let vote = CountedVote { batch: Arc::clone(&again), index }.to_signed();
        assert_eq!((vote.voter, vote.signature), (wire.voter, signature));
        assert_eq!((vote.index as usize, vote.batch_size as usize), (index, leaves.len()));
        assert_eq!(vote.path.len(), path_length(index, leaves.len()));
        let climbed = merkle_climb(Hash32::from_bytes(leaves[index]), index, leaves.len(), &vote.path);
        assert_eq!(climbed, Some(Hash32::from_bytes(root)), "each vote's path leads to the signed root");
    }
}
