//! What this module's own tests begin with: a genesis of one member and twenty coins of
//! 1 to 20 units, and transactions that nobody signed.

use std::sync::Arc;

use super::{Database, DatabaseError, MemoryDisk, Opened, Owner};
use crate::types::{
    Address, Allocation, Amount, Genesis, Input, Network, OutPoint, Output, RawGenesis, RawMasternode, SecretKey,
    Signature, Transaction,
};

fn key() -> SecretKey {
    SecretKey::from_seed([1; 32])
}

fn address() -> Address {
    Address::of_key(&key().public_key(), Network::Devnet)
}

pub(super) fn genesis() -> Genesis {
    let member = RawMasternode {
        id: "m".into(),
        public_key: key().public_key(),
        weight: 1,
        p2p_address: String::new(),
        payout_address: address().to_string(),
    };
    let allocations = (1..=20).map(|amount| Allocation { address: address().to_string(), amount }).collect();
    Genesis::try_from(RawGenesis {
        network: Network::Devnet,
        timestamp: 1,
        block_interval_ms: 1,
        min_fee: 1,
        masternodes: vec![member],
        allocations,
    })
    .expect("it is sound")
}

pub(super) fn spend(outpoint: OutPoint, amount: u64) -> Arc<Transaction> {
    let signature = Signature::from_bytes([9; 64]);
    let input = Input { previous_output: outpoint, public_key: key().public_key(), signature };
    let output = Output { amount: Amount::from_units(amount).expect("it is little"), address: address() };
    Arc::new(Transaction::from_parts(vec![input], vec![output], 0))
}

/// The member's database, or an observer's.
pub(super) fn open_sample(disk: &MemoryDisk, genesis: &Genesis, member: bool, first_start: bool) -> Opened {
    try_open_sample(disk, genesis, member, first_start).expect("a disk in memory is sound")
}

/// The same, of a disk that may not be sound.
pub(super) fn try_open_sample(
    disk: &MemoryDisk,
    genesis: &Genesis,
    member: bool,
    first_start: bool,
) -> Result<Opened, DatabaseError> {
    let public_key = member.then(|| key().public_key());
    Database::open_in_memory(disk, Owner { genesis, public_key, first_start })
}
