//! Genesis files: what is accepted can work, and its hash is the protocol's.

use std::collections::BTreeSet;

use time_masternode::consensus::Committee;
use time_masternode::types::{Amount, Genesis, GenesisError, GenesisHash, Network, RawGenesis};

use super::oracle::{Canonical, bech32m, tagged};
use super::{Outcome, oracle};

/// Longer files are not fuzzed with.
const MAX_LENGTH: usize = 1024 * 1024;

/// The JSON of a genesis file.
pub fn genesis(data: &[u8]) -> Outcome {
    if data.len() > MAX_LENGTH {
        return Outcome::Refused;
    }
    let Ok(raw) = serde_json::from_slice::<RawGenesis>(data) else { return Outcome::Refused };
    match Genesis::try_from(raw.clone()) {
        Ok(genesis) => {
            assert!(is_good(&raw), "{raw:?}");
            accepted(raw, &genesis);
            Outcome::Accepted
        }
        Err(error) => {
            assert!(!is_good(&raw), "{error:?} of {raw:?}");
            refused(&raw, &error);
            Outcome::Refused
        }
    }
}

fn network_byte(network: Network) -> u8 {
    match network {
        Network::Mainnet => 0,
        Network::Testnet => 1,
        Network::Devnet => 2,
    }
}

fn payload(raw: &RawGenesis, address: &str) -> Option<Vec<u8>> {
    let prefix = ["time", "ttime", "dtime"][usize::from(network_byte(raw.network))];
    let (hrp, payload) = bech32m(address)?;
    (hrp == prefix && payload.len() == 21 && payload[0] == 0).then_some(payload)
}

/// Whether the protocol's words (§4) let it begin a network.
fn is_good(raw: &RawGenesis) -> bool {
    let (members, max) = (&raw.masternodes, u128::from(Amount::MAX.units()));
    let ids: BTreeSet<_> = members.iter().map(|member| &member.id).collect();
    let keys: BTreeSet<_> = members.iter().map(|member| member.public_key).collect();
    let plain = |id: &str| (1..=64).contains(&id.len()) && id.bytes().all(|byte| (0x21..=0x7e).contains(&byte));
    let weight: u128 = members.iter().map(|member| u128::from(member.weight)).sum();
    let money: u128 = raw.allocations.iter().map(|allocation| u128::from(allocation.amount)).sum();
    (1..=256).contains(&members.len())
        && ids.len() == members.len()
        && keys.len() == members.len()
        && members.iter().all(|m| m.weight > 0 && plain(&m.id) && payload(raw, &m.payout_address).is_some())
        && raw.allocations.iter().all(|a| a.amount > 0 && payload(raw, &a.address).is_some())
        && weight <= max
        && money <= max
        && u128::from(raw.min_fee) <= max
}

/// The genesis hash by the protocol's words.
fn hash_of(raw: &RawGenesis) -> Option<GenesisHash> {
    let mut out = Canonical::default()
        .raw(&[network_byte(raw.network)])
        .i64(raw.timestamp)
        .u64(raw.block_interval_ms)
        .u64(raw.min_fee)
        .count(raw.masternodes.len());
    for member in &raw.masternodes {
        out = out.count(member.id.len()).raw(member.id.as_bytes()).raw(member.public_key.as_bytes());
        out = out.u64(member.weight).raw(&payload(raw, &member.payout_address)?);
    }
    out = out.u32(1).count(0).count(raw.allocations.len());
    for allocation in &raw.allocations {
        out = out.u64(allocation.amount).raw(&payload(raw, &allocation.address)?);
    }
    Some(GenesisHash::from_bytes(tagged("TIME/genesis", &out.i64(raw.timestamp).0)))
}

fn accepted(raw: RawGenesis, genesis: &Genesis) {
    assert_eq!(Some(genesis.hash()), hash_of(&raw));
    let outputs =
        genesis.transaction().outputs().iter().map(|output| (output.amount.units(), output.address.to_string()));
    let allocations = raw.allocations.iter().map(|a| (a.amount, a.address.to_ascii_lowercase()));
    assert!(outputs.eq(allocations) && genesis.transaction().inputs().is_empty());
    assert_eq!(genesis.min_fee().units(), raw.min_fee);

    let committee = Committee::of_genesis(genesis);
    let total: u64 = raw.masternodes.iter().map(|member| member.weight).sum();
    let (quorum, liars) = (committee.quorum(), (total - 1) / 3);
    assert_eq!(committee.total_weight(), total);
    assert!(2 * quorum > total + liars && quorum <= total - liars, "quorums share honest weight and can be had");
    for (index, member) in committee.indices().zip(&raw.masternodes) {
        assert_eq!(committee.index_of(&member.public_key), Some(index));
        assert_eq!((committee.weight(index), &committee.member(index).id), (member.weight, &member.id));
    }

    let json = serde_json::to_vec(&raw).expect("a genesis is JSON");
    let mut again: RawGenesis = serde_json::from_slice(&json).expect("it is read again");
    assert_eq!(again, raw);
    for member in &mut again.masternodes {
        member.p2p_address.push('x');
    }
    let moved = Genesis::try_from(again).expect("an address to dial is only a hint");
    assert_eq!(moved.hash(), genesis.hash());
}

fn refused(raw: &RawGenesis, error: &GenesisError) {
    let members = &raw.masternodes;
    let repeats = |same: &dyn Fn(usize) -> bool| (0..members.len()).filter(|i| same(*i)).count() > 1;
    let max = u128::from(Amount::MAX.units());
    let is_true = match error {
        GenesisError::NoMasternodes => members.is_empty(),
        GenesisError::TooManyMasternodes(n) => *n == members.len() && *n > 256,
        GenesisError::InvalidId(id) => members.iter().any(|member| member.id == *id),
        GenesisError::RepeatedId(id) => repeats(&|i| members[i].id == *id),
        GenesisError::RepeatedKey(key) => repeats(&|i| members[i].public_key == *key),
        GenesisError::ZeroWeight(id) => members.iter().any(|member| member.id == *id && member.weight == 0),
        GenesisError::WeightOverflow => members.iter().map(|m| u128::from(m.weight)).sum::<u128>() > max,
        GenesisError::ZeroAllocation(index) => raw.allocations[*index].amount == 0,
        GenesisError::AmountOverflow => {
            raw.allocations.iter().map(|a| u128::from(a.amount)).sum::<u128>() > max || u128::from(raw.min_fee) > max
        }
        GenesisError::TooManyAllocations(_) => false,
        GenesisError::Address { address, .. } => oracle::bech32m(address).is_none() || payload(raw, address).is_none(),
    };
    assert!(is_true, "{error:?} of {raw:?}");
}
