//! The networks that are played on, each made once.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use time_masternode::consensus::{Committee, Rules};
use time_masternode::types::{Address, Allocation, Genesis, Network, RawGenesis, RawMasternode, SecretKey};

use super::core_net::{COIN, MIN_FEE, Setting, wallet_address};

type Key = (Vec<u64>, u32, bool);

/// The network of members with these weights and so many first coins, of which coin `i`
/// belongs to wallet `i`. `short` plants a committee whose quorum is one short.
pub fn setting_of(weights: &[u64], coins: u32, short: bool) -> Arc<Setting> {
    static MADE: Mutex<BTreeMap<Key, Arc<Setting>>> = Mutex::new(BTreeMap::new());
    let mut made = MADE.lock().expect("nobody panics here");
    let key = (weights.to_vec(), coins, short);
    Arc::clone(made.entry(key).or_insert_with(|| Arc::new(make(weights, coins, short))))
}

fn make(weights: &[u64], coins: u32, short: bool) -> Setting {
    let keys: Vec<_> =
        (1..=weights.len()).map(|i| SecretKey::from_seed([u8::try_from(i).expect("a few members"); 32])).collect();
    let masternodes = keys.iter().zip(weights).enumerate().map(|(i, (key, weight))| RawMasternode {
        id: format!("member-{i}"),
        public_key: key.public_key(),
        weight: *weight,
        p2p_address: String::new(),
        payout_address: Address::of_key(&key.public_key(), Network::Devnet).to_string(),
    });
    let allocations =
        (0..coins).map(|wallet| Allocation { address: wallet_address(wallet).to_string(), amount: COIN }).collect();
    let raw = RawGenesis {
        network: Network::Devnet,
        timestamp: 1_700_000_000,
        block_interval_ms: 1_000,
        min_fee: MIN_FEE,
        masternodes: masternodes.collect(),
        allocations,
    };
    let genesis = Genesis::try_from(raw).expect("the genesis is sound");
    let committee = Committee::of_genesis(&genesis);
    let committee = Arc::new(if short { committee.with_short_quorum() } else { committee });
    let rules = Rules { network: genesis.network(), min_fee: genesis.min_fee() };
    Setting { committee, genesis, keys, rules }
}
