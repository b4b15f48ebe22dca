//! Who votes, and how many votes are enough.

use std::collections::BTreeMap;

use crate::types::{Genesis, GenesisHash, Masternode, PublicKey};

/// The weight that makes a quorum: `floor(2 * total / 3) + 1`.
///
/// Let `q` be the quorum and `f` the greatest weight that may lie, `f < total / 3`.
/// *Intersection:* two quorums share weight of at least `2q - total`. Since
/// `q > 2 * total / 3`, this exceeds `total / 3`, hence `f`: some honest member is in
/// both. *Availability:* the honest weight is more than `2 * total / 3`; being a whole
/// number it is at least `floor(2 * total / 3) + 1 = q`, so the honest members alone
/// are a quorum. The test below checks both for every small total.
pub const fn quorum(total_weight: u64) -> u64 {
    // Totals are at most 2^53-1, so doubling cannot overflow.
    total_weight * 2 / 3 + 1
}

/// A member's place in the committee; cheap to copy and to order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct MemberIndex(u16);

impl MemberIndex {
    /// The place as an index into [`Committee::members`].
    pub const fn get(self) -> usize {
        self.0 as usize
    }
}

/// The members of the current epoch, and the network that they vote on.
#[derive(Debug, Clone)]
pub struct Committee {
    genesis_hash: GenesisHash,
    members: Vec<Masternode>,
    index: BTreeMap<PublicKey, MemberIndex>,
    total_weight: u64,
    #[cfg(feature = "planted-flaws")]
    is_quorum_short: bool,
}

impl Committee {
    /// The committee of the genesis: epoch 0, the only one until membership can change.
    pub fn of_genesis(genesis: &Genesis) -> Self {
        let members = genesis.masternodes().to_vec();
        let index = (0..).zip(&members).map(|(i, m)| (m.public_key, MemberIndex(i))).collect();
        let total_weight = members.iter().map(|m| m.weight).sum();
        Self {
            genesis_hash: genesis.hash(),
            members,
            index,
            total_weight,
            #[cfg(feature = "planted-flaws")]
            is_quorum_short: false,
        }
    }

    /// Plants a bug: the same members with a quorum of one less than is safe.
    #[cfg(feature = "planted-flaws")]
    pub fn with_short_quorum(self) -> Self {
        Self { is_quorum_short: true, ..self }
    }

    /// The epoch in which these are the members.
    pub const fn epoch(&self) -> u64 {
        0
    }

    /// The network's identity, which stands in everything that is signed.
    pub const fn genesis_hash(&self) -> &GenesisHash {
        &self.genesis_hash
    }

    /// The members in the genesis file's order.
    pub fn members(&self) -> &[Masternode] {
        &self.members
    }

    /// Every member's index.
    pub fn indices(&self) -> impl Iterator<Item = MemberIndex> + use<> {
        (0..self.members.len()).filter_map(|i| u16::try_from(i).ok()).map(MemberIndex)
    }

    /// The member with this key.
    pub fn index_of(&self, key: &PublicKey) -> Option<MemberIndex> {
        self.index.get(key).copied()
    }

    /// The member at this place.
    pub fn member(&self, index: MemberIndex) -> &Masternode {
        &self.members[index.get()]
    }

    /// Its voting power.
    pub fn weight(&self, index: MemberIndex) -> u64 {
        self.member(index).weight
    }

    /// The weight of all.
    pub const fn total_weight(&self) -> u64 {
        self.total_weight
    }

    /// Whether the others decide without this member. If not, the network does not survive the
    /// loss of its votes.
    pub fn has_quorum_without(&self, member: MemberIndex) -> bool {
        self.total_weight - self.weight(member) >= self.quorum()
    }

    /// The weight that decides.
    pub const fn quorum(&self) -> u64 {
        #[cfg(feature = "planted-flaws")]
        if self.is_quorum_short {
            return quorum(self.total_weight) - 1;
        }
        quorum(self.total_weight)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// For every total and every lying weight below a third: any two quorums share more
    /// than the liars, and the honest are a quorum. One less would break the first.
    #[test]
    fn quorums_intersect_in_honest_weight_and_the_honest_suffice() {
        for total in 1..=400_u64 {
            let q = quorum(total);
            let f = (total - 1) / 3;
            assert!(2 * q > total + f, "two quorums of {total} share honest weight");
            assert!(total - f >= q, "the honest of {total} are a quorum");
            assert!(
                2 * (q - 1) <= total + f || 3 * f + 1 != total,
                "and the quorum of {total} is not larger than needed"
            );
        }
    }

    #[test]
    fn the_largest_total_does_not_overflow() {
        assert_eq!(quorum((1 << 53) - 1), ((1_u64 << 53) - 1) / 3 * 2 + 1);
    }
}
