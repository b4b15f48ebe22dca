//! Certificates as they are stored: many of one commit, without what they say twice.
//!
//! A certificate is portable: each of its votes carries the signature of a whole batch and
//! the Merkle path to the batch's root. Certificates that come into being together name the
//! same few batches, so their paths have most nodes in common, and most of those follow from
//! the votes themselves. What is stored is each batch's signature once, and of its tree only
//! the nodes that do not follow (a Merkle multiproof); the paths are made again when one of
//! them is read. Whatever would not come back exactly as it was is stored as it is.

use std::borrow::Borrow;
use std::collections::HashMap;

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
    pub(super) fn of<C: Borrow<Certificate>>(certificates: &[C]) -> Self {
        match pack(certificates) {
            Some(packed) if packed.gives_back(certificates) => packed,
            _ => Self::Plain(certificates.iter().map(|certificate| certificate.borrow().clone()).collect()),
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
        let trees = trees(&batches, &certificates)?;
        let vote = |(batch, index): &(u16, u16)| {
            let place = usize::from(*batch);
            let PackedBatch { voter, signature, size, .. } = &batches[place];
            let path = path(&trees[place], *index).copied().collect();
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

    /// Whether nothing was lost: the paths, which are all that is not stored, come back as
    /// they were.
    fn gives_back<C: Borrow<Certificate>>(&self, before: &[C]) -> bool {
        let Self::Packed { batches, certificates } = self else { return true };
        let Ok(trees) = trees(batches, certificates) else { return false };
        let same = |(packed, before): (&(u16, u16), &SignedVote)| {
            path(&trees[usize::from(packed.0)], packed.1).eq(before.path.iter())
        };
        let whole = |(packed, before): (&PackedCertificate, &C)| {
            let votes = &before.borrow().votes;
            packed.votes.len() == votes.len() && packed.votes.iter().zip(votes).all(same)
        };
        certificates.len() == before.len() && certificates.iter().zip(before).all(whole)
    }
}

/// What is packed does not fit together.
#[derive(Debug)]
struct BadPack;

/// Nodes of one level of a tree that are known, in order of place.
type Level<T> = Vec<(usize, T)>;

fn node_at<T>(level: &Level<T>, place: usize) -> Option<&T> {
    let found = level.binary_search_by_key(&place, |(place, _)| *place).ok()?;
    Some(&level[found].1)
}

/// Each batch's tree, as far as these certificates need it.
fn trees(batches: &[PackedBatch], certificates: &[PackedCertificate]) -> Result<Vec<Vec<Level<Hash32>>>, BadPack> {
    let mut leaves: Vec<Level<Hash32>> = vec![Vec::new(); batches.len()];
    for PackedCertificate { kind, txid, votes, .. } in certificates {
        let leaf = Vote { kind: *kind, txid: *txid }.leaf();
        for (batch, index) in votes {
            leaves.get_mut(usize::from(*batch)).ok_or(BadPack)?.push((usize::from(*index), leaf));
        }
    }
    batches.iter().zip(leaves).map(|(batch, leaves)| grow(batch, in_order(leaves))).collect()
}

/// Sorted by place; of several at one place, the last that came.
fn in_order<T>(mut level: Level<T>) -> Level<T> {
    level.reverse();
    level.sort_by_key(|(place, _)| *place);
    level.dedup_by_key(|(place, _)| *place);
    level
}

/// The path from a vote to the root of its batch's tree.
fn path(levels: &[Level<Hash32>], index: u16) -> impl Iterator<Item = &Hash32> {
    let place = usize::from(index);
    levels.iter().enumerate().filter_map(move |(height, level)| node_at(level, (place >> height) ^ 1))
}

/// The levels of a batch's tree, as far as they are known, from the leaves up to below the
/// root: every vote, and every sibling on its way.
fn grow(batch: &PackedBatch, leaves: Level<Hash32>) -> Result<Vec<Level<Hash32>>, BadPack> {
    let mut size = usize::try_from(batch.size).map_err(|_| BadPack)?;
    if size > MAX_VOTES_PER_BATCH || leaves.last().is_none_or(|(index, _)| *index >= size) {
        return Err(BadPack);
    }
    let (mut nodes, mut known, mut levels) = (batch.nodes.iter(), leaves, Vec::new());
    while size > 1 {
        let mut level = Vec::with_capacity(2 * known.len());
        let mut above = Vec::with_capacity(known.len());
        for pair in known.chunk_by(|(a, _), (b, _)| a / 2 == b / 2) {
            let (place, first) = pair[0];
            let node = match pair.get(1) {
                Some((_, right)) => {
                    level.extend_from_slice(pair);
                    merkle_parent(&first, right)
                }
                None if place ^ 1 >= size => {
                    level.push((place, first));
                    first
                }
                None => {
                    let sibling = *nodes.next().ok_or(BadPack)?;
                    let (left, right) = if place & 1 == 0 { (first, sibling) } else { (sibling, first) };
                    level.extend([(place & !1, left), (place | 1, right)]);
                    merkle_parent(&left, &right)
                }
            };
            above.push((place / 2, node));
        }
        levels.push(level);
        known = above;
        size = size.div_ceil(2);
    }
    if nodes.next().is_none() { Ok(levels) } else { Err(BadPack) }
}

/// Takes certificates apart; `None` if they do not fit together.
fn pack<C: Borrow<Certificate>>(certificates: &[C]) -> Option<StoredCertificates> {
    let mut places: HashMap<(PublicKey, Signature, u32), usize> = HashMap::new();
    let mut batches: Vec<(&SignedVote, Level<&[Hash32]>)> = Vec::new();
    let mut packed = Vec::with_capacity(certificates.len());
    for certificate in certificates {
        let Certificate { kind, txid, epoch, votes } = certificate.borrow();
        let mut named = Vec::with_capacity(votes.len());
        for vote in votes {
            let place = *places.entry((vote.voter, vote.signature, vote.batch_size)).or_insert(batches.len());
            if place == batches.len() {
                batches.push((vote, Vec::new()));
            }
            batches[place].1.push((usize::try_from(vote.index).ok()?, &vote.path));
            named.push((u16::try_from(place).ok()?, u16::try_from(vote.index).ok()?));
        }
        packed.push(PackedCertificate { kind: *kind, txid: *txid, epoch: *epoch, votes: named });
    }
    let batch = |(vote, paths): (&SignedVote, Level<&[Hash32]>)| {
        let nodes = missing_nodes(in_order(paths), usize::try_from(vote.batch_size).ok()?)?;
        Some(PackedBatch { voter: vote.voter, signature: vote.signature, size: vote.batch_size, nodes })
    };
    let batches = batches.into_iter().map(batch).collect::<Option<_>>()?;
    Some(StoredCertificates::Packed { batches, certificates: packed })
}

/// The nodes that do not follow from the votes whose paths these are.
fn missing_nodes(mut level: Level<&[Hash32]>, mut size: usize) -> Option<Vec<Hash32>> {
    let mut nodes = Vec::new();
    while size > 1 {
        let mut above: Level<&[Hash32]> = Vec::with_capacity(level.len());
        for pair in level.chunk_by(|(a, _), (b, _)| a / 2 == b / 2) {
            let (place, path) = pair[0];
            if pair.len() == 1 && place ^ 1 < size {
                nodes.push(*path.first()?);
            }
            above.push((place / 2, if place ^ 1 < size { path.get(1..)? } else { path }));
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
                let stored = StoredCertificates::of(&before);
                assert!(before.is_empty() || matches!(stored, StoredCertificates::Packed { .. }), "{size} {places:?}");
                assert_eq!(stored.into_certificates(TreeId::Certificates).unwrap(), before);
            }
        }
    }

    #[test]
    fn a_full_batch_costs_its_places_only() {
        let before = certificates(128, &(0..128).collect::<Vec<_>>());
        let (packed, plain) = (StoredCertificates::of(&before), StoredCertificates::Plain(before));
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
            let stored = StoredCertificates::of(&before);
            assert!(matches!(stored, StoredCertificates::Plain(_)), "{before:?}");
            assert_eq!(stored.into_certificates(TreeId::Proofs).unwrap(), before);
        }
    }

    #[test]
    fn a_damaged_pack_is_an_error() {
        let packed = StoredCertificates::of(&certificates(9, &[0, 4]));
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
