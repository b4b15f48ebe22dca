//! The genesis file: who the members are and whose the first coins (protocol §4).

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use super::canonical::CanonicalWriter;
use super::{
    Address, AddressError, Amount, GenesisHash, Network, Output, PublicKey, Transaction, UnixSeconds, tagged_hash,
};

/// A member as the file has it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawMasternode {
    /// A name, unique among the members.
    pub id: String,
    /// Its Ed25519 key, unique among the members.
    pub public_key: PublicKey,
    /// Its voting power.
    pub weight: u64,
    /// Where others may find it: a hint, not hashed.
    pub p2p_address: String,
    /// Who gets the fees of the blocks that it proposes.
    pub payout_address: String,
}

/// A first coin.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Allocation {
    /// Its owner.
    pub address: String,
    /// Base units.
    pub amount: u64,
}

/// The file as it came. Nothing is promised about it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct RawGenesis {
    /// Which network.
    pub network: Network,
    /// When it began, Unix seconds.
    pub timestamp: UnixSeconds,
    /// How long after a block the next is due.
    pub block_interval_ms: u64,
    /// The least fee of a transaction, base units.
    pub min_fee: u64,
    /// The members.
    pub masternodes: Vec<RawMasternode>,
    /// The first coins.
    pub allocations: Vec<Allocation>,
}

/// Why a genesis file is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum GenesisError {
    /// Nobody could vote.
    #[error("it names no masternode")]
    NoMasternodes,
    /// More members than the protocol allows.
    #[error("it names {0} masternodes; at most {max} can be", max = Genesis::MAX_MEMBERS)]
    TooManyMasternodes(usize),
    /// An id is empty, too long, or has characters that no log or metric can carry.
    #[error("masternode id {0:?} is not 1 to 64 printable ASCII characters")]
    InvalidId(String),
    /// Two members of one name.
    #[error("masternode id {0:?} stands there twice")]
    RepeatedId(String),
    /// Two members of one key.
    #[error("masternode key {0} stands there twice")]
    RepeatedKey(PublicKey),
    /// A member that could not count.
    #[error("masternode {0:?} has weight 0")]
    ZeroWeight(String),
    /// The weights together exceed 2^53-1.
    #[error("the weights add up to more than 2^53-1")]
    WeightOverflow,
    /// An allocation of nothing.
    #[error("allocation {0} has amount 0")]
    ZeroAllocation(usize),
    /// The allocations together, or the fee, exceed 2^53-1.
    #[error("the allocations or the fee exceed 2^53-1")]
    AmountOverflow,
    /// More first coins than a list can hold.
    #[error("it has {0} allocations; at most {max} can be", max = Genesis::MAX_ALLOCATIONS)]
    TooManyAllocations(usize),
    /// An address is no good.
    #[error("address {address:?}: {source}")]
    Address {
        /// The text.
        address: String,
        /// What is wrong with it.
        source: AddressError,
    },
}

/// A member of the committee.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Masternode {
    /// Its name.
    pub id: String,
    /// Its key.
    pub public_key: PublicKey,
    /// Its voting power, at least 1.
    pub weight: u64,
    /// Where others may find it.
    pub p2p_address: String,
    /// Who gets its fees.
    pub payout_address: Address,
}

/// A checked genesis, with its hash and its transaction.
#[derive(Debug, Clone)]
pub struct Genesis {
    network: Network,
    timestamp: UnixSeconds,
    block_interval_ms: u64,
    min_fee: Amount,
    masternodes: Vec<Masternode>,
    transaction: Transaction,
    hash: GenesisHash,
}

impl Genesis {
    /// The most members that a committee can have.
    pub const MAX_MEMBERS: usize = 256;
    /// The most first coins.
    pub const MAX_ALLOCATIONS: usize = 16_000_000;

    /// The network it begins.
    pub const fn network(&self) -> Network {
        self.network
    }

    /// When it began.
    pub const fn timestamp(&self) -> UnixSeconds {
        self.timestamp
    }

    /// How long after a block the next is due.
    pub const fn block_interval_ms(&self) -> u64 {
        self.block_interval_ms
    }

    /// The least fee of a transaction.
    pub const fn min_fee(&self) -> Amount {
        self.min_fee
    }

    /// The members in the file's order.
    pub fn masternodes(&self) -> &[Masternode] {
        &self.masternodes
    }

    /// The transaction without inputs that creates the first coins.
    pub const fn transaction(&self) -> &Transaction {
        &self.transaction
    }

    /// The network's identity.
    pub const fn hash(&self) -> GenesisHash {
        self.hash
    }
}

impl TryFrom<RawGenesis> for Genesis {
    type Error = GenesisError;

    fn try_from(raw: RawGenesis) -> Result<Self, GenesisError> {
        let network = raw.network;
        let address = |text: &str| {
            Address::parse(text, network).map_err(|source| GenesisError::Address { address: text.into(), source })
        };
        let masternodes = check_masternodes(raw.masternodes, address)?;
        if raw.allocations.len() > Self::MAX_ALLOCATIONS {
            return Err(GenesisError::TooManyAllocations(raw.allocations.len()));
        }
        let mut outputs = Vec::with_capacity(raw.allocations.len());
        let mut total = Amount::ZERO;
        for (i, allocation) in raw.allocations.iter().enumerate() {
            let amount = Amount::from_units(allocation.amount).ok_or(GenesisError::AmountOverflow)?;
            if amount == Amount::ZERO {
                return Err(GenesisError::ZeroAllocation(i));
            }
            total = total.checked_add(amount).ok_or(GenesisError::AmountOverflow)?;
            outputs.push(Output { amount, address: address(&allocation.address)? });
        }
        let min_fee = Amount::from_units(raw.min_fee).ok_or(GenesisError::AmountOverflow)?;
        let transaction = Transaction::from_parts(Vec::new(), outputs, raw.timestamp);

        let mut out = CanonicalWriter::default();
        out.u8(network.byte()).i64(raw.timestamp).u64(raw.block_interval_ms).u64(raw.min_fee);
        out.count(masternodes.len());
        for member in &masternodes {
            out.text(&member.id).raw(member.public_key.as_bytes()).u64(member.weight);
            out.raw(member.payout_address.payload());
        }
        out.raw(&transaction.canonical_bytes());
        let hash = GenesisHash::from_bytes(tagged_hash("TIME/genesis", &[out.bytes()]));
        Ok(Self {
            network,
            timestamp: raw.timestamp,
            block_interval_ms: raw.block_interval_ms,
            min_fee,
            masternodes,
            transaction,
            hash,
        })
    }
}

fn check_masternodes(
    raw: Vec<RawMasternode>,
    address: impl Fn(&str) -> Result<Address, GenesisError>,
) -> Result<Vec<Masternode>, GenesisError> {
    if raw.is_empty() {
        return Err(GenesisError::NoMasternodes);
    }
    if raw.len() > Genesis::MAX_MEMBERS {
        return Err(GenesisError::TooManyMasternodes(raw.len()));
    }
    let (mut ids, mut keys, mut total) = (BTreeSet::new(), BTreeSet::new(), 0_u64);
    let mut masternodes = Vec::with_capacity(raw.len());
    for member in raw {
        if member.id.is_empty() || member.id.len() > 64 || !member.id.bytes().all(|b| b.is_ascii_graphic()) {
            return Err(GenesisError::InvalidId(member.id));
        }
        if !ids.insert(member.id.clone()) {
            return Err(GenesisError::RepeatedId(member.id));
        }
        if !keys.insert(member.public_key) {
            return Err(GenesisError::RepeatedKey(member.public_key));
        }
        if member.weight == 0 {
            return Err(GenesisError::ZeroWeight(member.id));
        }
        total = total
            .checked_add(member.weight)
            .filter(|total| *total <= Amount::MAX.units())
            .ok_or(GenesisError::WeightOverflow)?;
        masternodes.push(Masternode {
            payout_address: address(&member.payout_address)?,
            id: member.id,
            public_key: member.public_key,
            weight: member.weight,
            p2p_address: member.p2p_address,
        });
    }
    Ok(masternodes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::SecretKey;

    fn raw() -> RawGenesis {
        let address = |i| Address::of_key(&SecretKey::from_seed([i; 32]).public_key(), Network::Devnet).to_string();
        RawGenesis {
            network: Network::Devnet,
            timestamp: 1,
            block_interval_ms: 1000,
            min_fee: 1,
            masternodes: (1..=4)
                .map(|i| RawMasternode {
                    id: format!("m{i}"),
                    public_key: SecretKey::from_seed([i; 32]).public_key(),
                    weight: 1,
                    p2p_address: String::new(),
                    payout_address: address(i),
                })
                .collect(),
            allocations: vec![Allocation { address: address(9), amount: 5 }],
        }
    }

    fn refused(change: impl FnOnce(&mut RawGenesis)) -> GenesisError {
        let mut genesis = raw();
        change(&mut genesis);
        Genesis::try_from(genesis).unwrap_err()
    }

    #[test]
    fn the_hash_covers_all_but_the_p2p_address() {
        let hash = |change: fn(&mut RawGenesis)| {
            let mut genesis = raw();
            change(&mut genesis);
            Genesis::try_from(genesis).unwrap().hash()
        };
        let original = hash(|_| {});
        assert_eq!(hash(|g| g.masternodes[0].p2p_address = "x:1".into()), original);
        for change in [
            (|g| g.timestamp = 2) as fn(&mut RawGenesis),
            |g| g.block_interval_ms = 1,
            |g| g.min_fee = 2,
            |g| g.masternodes[0].id = "other".into(),
            |g| g.masternodes[0].weight = 2,
            |g| g.masternodes.swap(0, 1),
            |g| g.allocations[0].amount = 6,
            |g| g.masternodes[0].payout_address = g.allocations[0].address.clone(),
        ] {
            assert_ne!(hash(change), original);
        }
    }

    #[test]
    fn what_could_not_work_is_refused() {
        assert_eq!(refused(|g| g.masternodes.clear()), GenesisError::NoMasternodes);
        assert_eq!(refused(|g| g.masternodes[1].id = "m1".into()), GenesisError::RepeatedId("m1".into()));
        assert_eq!(refused(|g| g.masternodes[0].id = "a\n".into()), GenesisError::InvalidId("a\n".into()));
        let key = raw().masternodes[0].public_key;
        assert_eq!(refused(|g| g.masternodes[1].public_key = key), GenesisError::RepeatedKey(key));
        assert_eq!(refused(|g| g.masternodes[2].weight = 0), GenesisError::ZeroWeight("m3".into()));
        assert_eq!(refused(|g| g.masternodes[2].weight = 1 << 53), GenesisError::WeightOverflow);
        assert_eq!(refused(|g| g.masternodes[2].weight = u64::MAX), GenesisError::WeightOverflow);
        assert_eq!(refused(|g| g.allocations[0].amount = 0), GenesisError::ZeroAllocation(0));
        assert_eq!(refused(|g| g.allocations[0].amount = u64::MAX), GenesisError::AmountOverflow);
        assert_eq!(refused(|g| g.min_fee = u64::MAX), GenesisError::AmountOverflow);
        assert!(matches!(refused(|g| g.network = Network::Mainnet), GenesisError::Address { .. }));
        let member = raw().masternodes[0].clone();
        assert_eq!(refused(|g| g.masternodes = vec![member; 257]), GenesisError::TooManyMasternodes(257));
    }
}
