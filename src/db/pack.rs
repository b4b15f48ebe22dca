//! Certificates as they are stored: many of one commit, without what they say twice.
//!
//! A certificate is portable: each of its votes carries the signature of a whole batch and
//! the Merkle path to the batch's root. Certificates that come into being together name the
//! same few batches, so their paths have most nodes in common, and most of those follow from
//! the votes themselves. What is stored is each batch's signature once, and of its tree only
//! the nodes that do not follow (a Merkle multiproof); the paths are made again when one of
//! them is read. Whatever would not come back exactly as it was is stored as it is.

use std::collections::{BTreeMap, HashMap};

use serde::{Deserialize, Serialize};

use super::DatabaseError;
use super::schema::TreeId;
use crate::consensus::{Certificate, SignedVote, Vote, VoteKind};
use crate::limits::MAX_VOTES_PER_BATCH;
use crate::types::{Hash32, PublicKey, Signature, Txid, merkle_parent};

/// A record of `certificates` or `proofs`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum StoredCertificates {
    /// As they are.
    Plain(Vec<Certificate>),
    /// Taken apart.
    Packed { batches: Vec<PackedBatch>, certificates: Vec<PackedCertificate> },
}

/// A member's batch of votes, as far as the certificates need it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PackedBatch {
    voter: PublicKey,
    signature: Signature,
    size: u32,
    /// The nodes of its tree that do not follow from the votes: from the leaves up, in order
    /// of place.
    nodes: Vec<Hash32>,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct PackedCertificate {
    kind: VoteKind,
    txid: Txid,
    epoch: u64,
    /// For each vote: which batch, and its place in it.
    votes: Vec<(u16, u16)>,
}

impl StoredCertificates {
    /// How these are best stored.
    pub(super) fn of(certificates: Vec<Certificate>) -> Self {
        match pack(&certificates) {
            // Also proves that nothing is lost.
            Some(packed) if packed.clone().unpack().is_ok_and(|again| again == certificates) => packed,
            _ => Self::Plain(certificates),
        }
    }

    /// The certificates, portable again.
    pub(super) fn into_certificates(self, tree: TreeId) -> Result<Vec<Certificate>, DatabaseError> {
        self.unpack().map_err(|BadPack| DatabaseError::corrupt(tree.name(), "votes that are in no batch"))
    }

    fn unpack(self) -> Result<Vec<Certificate>, BadPack> {
        let (batches, certificates) = match self {
            Self::Plain(certificates) => return Ok(certificates),
            Self::Packed { batches, certificates } => (batches, certificates),
        };
        let mut leaves = vec![BTreeMap::new(); batches.len()];
        for PackedCertificate { kind, txid, votes, .. } in &certificates {
            let leaf = Vote { kind: *kind, txid: *txid }.leaf();
            for (batch, index) in votes {
                leaves.get_mut(usize::from(*batch)).ok_or(BadPack)?.insert(usize::from(*index), leaf);
            }
        }
        let trees: Vec<Vec<BTreeMap<usize, Hash32>>> =
            batches.iter().zip(leaves).map(|(batch, leaves)| grow(batch, leaves)).collect::<Result<_, _>>()?;
        let vote = |(batch, index): &(u16, u16)| {
            let place = usize::from(*batch);
            let PackedBatch { voter, signature, size, .. } = &batches[place];
            let mut at = usize::from(*index);
            let mut path = Vec::with_capacity(trees[place].len());
            for level in &trees[place] {
                path.extend(level.get(&(at ^ 1)).copied());
                at /= 2;
            }
            SignedVote { voter: *voter, signature: *signature, index: u32::from(*index), batch_size: *size, path }
        };
        let whole = |PackedCertificate { kind, txid, epoch, votes }: &PackedCertificate| Certificate {
            kind: *kind,
            txid: *txid,
            epoch: *epoch,
            votes: votes.iter().map(vote).collect(),
        };
        Ok(certificates.iter().map(whole).collect())
    }
}

/// What is packed does not fit together.
#[derive(Debug)]
struct BadPack;

/// The levels of a batch's tree, as far as they are known, from the leaves up to below the
/// root: every vote, and every sibling on its way.
fn grow(batch: &PackedBatch, leaves: BTreeMap<usize, Hash32>) -> Result<Vec<BTreeMap<usize, Hash32>>, BadPack> {
    let mut size = usize::try_from(batch.size).map_err(|_| BadPack)?;
    if size > MAX_VOTES_PER_BATCH || leaves.last_key_value().is_none_or(|(index, _)| *index >= size) {
        return Err(BadPack);
    }
    let (mut nodes, mut level, mut levels) = (batch.nodes.iter(), leaves, Vec::new());
    while size > 1 {
        for index in lonely(&level, size) {
            level.insert(index, *nodes.next().ok_or(BadPack)?);
        }
        let mut above = BTreeMap::new();
        for (index, node) in level.iter().filter(|(index, _)| *index & 1 == 0) {
            let node = level.get(&(index + 1)).map_or(*node, |right| merkle_parent(node, right));
            above.insert(index / 2, node);
        }
        levels.push(std::mem::replace(&mut level, above));
        size = size.div_ceil(2);
    }
    if nodes.next().is_none() { Ok(levels) } else { Err(BadPack) }
}

/// The siblings that a level of so many nodes lacks, in order.
fn lonely<T>(level: &BTreeMap<usize, T>, size: usize) -> Vec<usize> {
    let siblings = level.keys().map(|index| index ^ 1);
    siblings.filter(|sibling| *sibling < size && !level.contains_key(sibling)).collect()
}

/// Takes certificates apart; `None` if they do not fit together.
fn pack(certificates: &[Certificate]) -> Option<StoredCertificates> {
    let mut places: HashMap<(PublicKey, Signature, u32), usize> = HashMap::new();
    let mut batches: Vec<(&SignedVote, BTreeMap<usize, &[Hash32]>)> = Vec::new();
    let mut packed = Vec::with_capacity(certificates.len());
    for Certificate { kind, txid, epoch, votes } in certificates {
        let mut named = Vec::with_capacity(votes.len());
        for vote in votes {
            let place = *places.entry((vote.voter, vote.signature, vote.batch_size)).or_insert(batches.len());
            if place == batches.len() {
                batches.push((vote, BTreeMap::new()));
            }
            batches[place].1.insert(usize::try_from(vote.index).ok()?, &vote.path);
            named.push((u16::try_from(place).ok()?, u16::try_from(vote.index).ok()?));
        }
        packed.push(PackedCertificate { kind: *kind, txid: *txid, epoch: *epoch, votes: named });
    }
    let batch = |(vote, paths): (&SignedVote, BTreeMap<usize, &[Hash32]>)| {
        let nodes = missing_nodes(paths, usize::try_from(vote.batch_size).ok()?)?;
        Some(PackedBatch { voter: vote.voter, signature: vote.signature, size: vote.batch_size, nodes })
    };
    let batches = batches.into_iter().map(batch).collect::<Option<_>>()?;
    Some(StoredCertificates::Packed { batches, certificates: packed })
}

/// The nodes that do not follow from the votes whose paths these are.
fn missing_nodes(mut level: BTreeMap<usize, &[Hash32]>, mut size: usize) -> Option<Vec<Hash32>> {
    let mut nodes = Vec::new();
    while size > 1 {
        for index in lonely(&level, size) {
            nodes.push(*level.get(&(index ^ 1))?.first()?);
        }
        let mut above: BTreeMap<usize, &[Hash32]> = BTreeMap::new();
        for (index, path) in &level {
            let rest = if index ^ 1 < size { path.get(1..)? } else { path };
            above.insert(index / 2, rest);
        }
        level = above;
        size = size.div_ceil(2);
    }
    Some(nodes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::MerkleTree;

    fn txid(n: usize) -> Txid {
        Txid::from_bytes([n.to_le_bytes()[0]; 32])
    }

    /// Certificates of the votes at these places of three members' batches of `size`.
    fn certificates(size: usize, places: &[usize]) -> Vec<Certificate> {
        let kind = VoteKind::Approve;
        let tree = MerkleTree::new((0..size).map(|n| Vote { kind, txid: txid(n) }.leaf()).collect()).unwrap();
        let vote = |member: u8, index: usize| SignedVote {
            voter: PublicKey::from_bytes([member; 32]),
            signature: Signature::from_bytes([member; 64]),
            index: u32::try_from(index).unwrap(),
            batch_size: u32::try_from(size).unwrap(),
            path: tree.path(index),
        };
        let one = |index: &usize| Certificate {
            kind,
            txid: txid(*index),
            epoch: 0,
            votes: (0..3).map(|member| vote(member, *index)).collect(),
        };
        places.iter().map(one).collect()
    }

    fn bytes(stored: &StoredCertificates) -> usize {
        bincode::serialize(stored).unwrap().len()
    }

    #[test]
    fn what_is_packed_comes_back() {
        for size in 1..=40 {
            let every: Vec<usize> = (0..size).collect();
            let some: Vec<usize> = (0..size).filter(|n| n % 7 == size % 7).collect();
            for places in [&every, &some, &vec![size - 1], &vec![0]] {
                let before = certificates(size, places);
                let stored = StoredCertificates::of(before.clone());
                assert!(before.is_empty() || matches!(stored, StoredCertificates::Packed { .. }), "{size} {places:?}");
                assert_eq!(stored.into_certificates(TreeId::Certificates).unwrap(), before);
            }
        }
    }

    #[test]
    fn a_full_batch_costs_its_places_only() {
        let before = certificates(128, &(0..128).collect::<Vec<_>>());
        let (packed, plain) = (StoredCertificates::of(before.clone()), StoredCertificates::Plain(before));
        assert!(bytes(&packed) * 12 < bytes(&plain), "{} of {}", bytes(&packed), bytes(&plain));
    }

    /// A liar can sign so that one signature fits many trees; whatever does not fit together
    /// is kept as it came.
    #[test]
    fn what_does_not_fit_together_is_stored_as_it_is() {
        let whole = certificates(9, &[0, 1, 5]);
        let mut other_tree = whole.clone();
        other_tree[2].votes[1].path[0] = Hash32::from_bytes([9; 32]);
        other_tree[1].votes[1].path[0] = Hash32::from_bytes([9; 32]);
        let mut short = whole.clone();
        short[0].votes[0].path.pop();
        let mut long = whole.clone();
        long[0].votes[0].path.push(Hash32::from_bytes([1; 32]));
        let mut beyond = whole.clone();
        beyond[0].votes[0].index = 9;
        let mut huge = whole.clone();
        huge[0].votes[0].batch_size = u32::MAX;
        let mut twice = whole.clone();
        twice.extend(whole);
        twice[3].votes[0].path[1] = Hash32::from_bytes([3; 32]);
        for before in [other_tree, short, long, beyond, huge, twice] {
            let stored = StoredCertificates::of(before.clone());
            assert!(matches!(stored, StoredCertificates::Plain(_)), "{before:?}");
            assert_eq!(stored.into_certificates(TreeId::Proofs).unwrap(), before);
        }
    }

    #[test]
    fn a_damaged_pack_is_an_error() {
        let packed = StoredCertificates::of(certificates(9, &[0, 4]));
        let damages: [fn(&mut PackedBatch, &mut PackedCertificate); 5] = [
            |batch, _| batch.nodes.truncate(1),
            |batch, _| batch.nodes.push(Hash32::from_bytes([0; 32])),
            |batch, _| batch.size = u32::MAX,
            |_, certificate| certificate.votes[0].0 = 7,
            |_, certificate| certificate.votes[0].1 = 9,
        ];
        for damage in damages {
            let mut damaged = packed.clone();
            let StoredCertificates::Packed { batches, certificates } = &mut damaged else { panic!("it is packed") };
            damage(&mut batches[0], &mut certificates[0]);
            assert!(damaged.into_certificates(TreeId::Proofs).is_err());
        }
    }
}
