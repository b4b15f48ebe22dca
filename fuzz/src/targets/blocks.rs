//! Decided blocks: one is believed exactly when precommits of distinct members of quorum
//! weight name its hash, and it proves what it contains and nothing else.

use std::collections::BTreeSet;

use time_masternode::consensus::{BlockError, CheckedBlock, Verified};
use time_masternode::limits::{MAX_BLOCK_ABORTS, MAX_BLOCK_ENTRIES, MAX_FRAME_BYTES};
use time_masternode::types::{Block, BlockHash, DecidedBlock, Txid};

use super::Outcome;
use super::oracle::{Canonical, merkle_root, tagged};
use super::setting::{EQUAL, Setting, WEIGHTED, secret_of};

/// The JSON of a block with its commit certificate, for two committees. What the
/// certificate says of the block is also mended, and signed anew where keys are known.
pub fn blocks(data: &[u8]) -> Outcome {
    if data.len() > MAX_FRAME_BYTES {
        return Outcome::Refused;
    }
    let Ok(decided) = serde_json::from_slice::<DecidedBlock>(data) else { return Outcome::Refused };
    let json = serde_json::to_vec(&decided).expect("a block is JSON");
    assert_eq!(serde_json::from_slice::<DecidedBlock>(&json).expect("it is read again"), decided);
    let outcomes = [&*EQUAL, &*WEIGHTED].map(|setting| {
        let outcome = check(setting, &decided);
        let mended = mend(setting, &decided);
        if check(setting, &mended) == Outcome::Accepted {
            believed_stays_believed(setting, &mended);
        }
        outcome
    });
    if outcomes.contains(&Outcome::Accepted) { Outcome::Accepted } else { Outcome::Refused }
}

/// The block's hash by the protocol's words.
fn hash_of(setting: &Setting, block: &Block) -> BlockHash {
    let mut out = Canonical::default()
        .raw(setting.genesis.hash().as_bytes())
        .u64(block.height)
        .raw(block.previous_hash.as_bytes())
        .u64(block.timestamp_ms)
        .raw(block.proposer.as_bytes())
        .raw(block.state_digest.as_bytes());
    for txids in [&block.transactions, &block.aborts] {
        let leaves: Vec<_> = txids.iter().map(|txid| tagged("TIME/block-item", txid.as_bytes())).collect();
        let root = if leaves.is_empty() { [0; 32] } else { merkle_root(&leaves) };
        out = out.count(leaves.len()).raw(&root);
    }
    BlockHash::from_bytes(tagged("TIME/block", &out.0))
}

/// What a precommit of the certificate's round signs.
fn precommit(setting: &Setting, decided: &DecidedBlock, hash: &BlockHash) -> [u8; 32] {
    let out = Canonical::default()
        .raw(setting.genesis.hash().as_bytes())
        .u64(decided.block.height)
        .u32(decided.certificate.round)
        .raw(hash.as_bytes());
    tagged("TIME/precommit", &out.0)
}

fn check(setting: &Setting, decided: &DecidedBlock) -> Outcome {
    let (block, certificate) = (&decided.block, &decided.certificate);
    let members = setting.genesis.masternodes();
    let fits =
        block.transactions.len() + block.aborts.len() <= MAX_BLOCK_ENTRIES && block.aborts.len() <= MAX_BLOCK_ABORTS;
    let checked = CheckedBlock::new(decided.clone(), &setting.committee);
    if !fits {
        assert_eq!(checked.err(), Some(BlockError::TooLarge));
        return Outcome::Refused;
    }
    let hash = hash_of(setting, block);
    assert_eq!(block.hash(&setting.genesis.hash()), hash, "the hash is the protocol's");
    let weight_of = |voter| members.iter().find(|m| m.public_key == voter).map(|m| m.weight);
    let weights: Option<Vec<u64>> = certificate.votes.iter().map(|vote| weight_of(vote.voter)).collect();
    let distinct = certificate.votes.iter().map(|vote| vote.voter).collect::<BTreeSet<_>>().len();
    let total: u64 = members.iter().map(|member| member.weight).sum();
    let sound = certificate.height == block.height
        && certificate.block_hash == hash
        && distinct == certificate.votes.len()
        && weights.is_some_and(|weights| weights.iter().sum::<u64>() > 2 * total / 3);
    assert_eq!(checked.is_ok(), sound, "{decided:?}: {:?}", checked.err());
    let Ok(checked) = checked else { return Outcome::Refused };
    assert_eq!(**checked.decided(), *decided);
    let message = precommit(setting, decided, &hash);
    let valid = certificate.votes.iter().all(|vote| vote.voter.verify(&message, &vote.signature));
    assert_eq!(Verified::check(checked).is_ok(), valid, "it is believed exactly when each signature is good");
    if valid { Outcome::Accepted } else { Outcome::Refused }
}

fn mend(setting: &Setting, decided: &DecidedBlock) -> DecidedBlock {
    let mut mended = decided.clone();
    mended.certificate.height = decided.block.height;
    mended.certificate.block_hash = hash_of(setting, &decided.block);
    let message = precommit(setting, &mended, &mended.certificate.block_hash);
    for vote in mended.certificate.votes.iter_mut().take(8) {
        if let Some(key) = secret_of(&vote.voter) {
            vote.signature = key.sign(&message);
        }
    }
    mended
}

fn believed_stays_believed(setting: &Setting, decided: &DecidedBlock) {
    let prove = |decided: &DecidedBlock, txid| CheckedBlock::prove(decided.clone(), &setting.committee, txid);
    for txid in decided.block.transactions.iter().take(4) {
        assert!(prove(decided, txid).is_ok(), "it proves what it contains");
    }
    let absent = Txid::from_bytes(tagged("no transaction has this", &[]));
    if !decided.block.transactions.contains(&absent) {
        assert_eq!(prove(decided, &absent).err(), Some(BlockError::NotContained));
    }
    let mut other = decided.clone();
    other.certificate.votes.reverse();
    assert_eq!(check(setting, &other), Outcome::Accepted, "the order of the votes does not matter");
    other.certificate.round = other.certificate.round.wrapping_add(1);
    assert_eq!(check(setting, &other), Outcome::Refused, "precommits are of one round");
    other = decided.clone();
    other.block.timestamp_ms ^= 1;
    assert_eq!(check(setting, &other), Outcome::Refused, "and of one block");
    let elsewhere = if std::ptr::eq(setting, &*EQUAL) { &*WEIGHTED } else { &*EQUAL };
    assert_eq!(check(elsewhere, decided), Outcome::Refused, "and of one network");
}
