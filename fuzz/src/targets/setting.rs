//! The network on which what comes from outside is checked: that of the test vectors,
//! whose members' and wallets' secret keys are known. With them a target can sign again
//! what the fuzzer has changed, and so reach what lies behind a good signature.

use std::sync::LazyLock;

use serde_json::Value;
use sha2::{Digest, Sha256};
use time_masternode::consensus::{Committee, Rules};
use time_masternode::types::{Address, Genesis, Network, PublicKey, RawGenesis, SecretKey};

/// A committee and its network.
pub struct Setting {
    pub genesis: Genesis,
    pub committee: Committee,
}

/// That of the vectors: four members of equal weight.
pub static EQUAL: LazyLock<Setting> = LazyLock::new(|| Setting::of("genesis"));
/// The same members with different weights, on another network.
pub static WEIGHTED: LazyLock<Setting> = LazyLock::new(|| Setting::of("weighted_genesis"));

static KEYS: LazyLock<Vec<SecretKey>> = LazyLock::new(|| {
    let numbered = |name: &'static str| (1..=4).map(move |i| format!("{name}-{i}"));
    let names = numbered("masternode").chain(numbered("payout")).chain(["alice", "bob", "carol"].map(String::from));
    names.map(|name| SecretKey::from_seed(Sha256::digest(name.as_bytes()).into())).collect()
});

/// All that the reference printed.
pub fn vectors() -> Value {
    serde_json::from_str(include_str!("../../../tests/vectors.json")).expect("the vectors are JSON")
}

impl Setting {
    fn of(section: &str) -> Self {
        let raw: RawGenesis =
            serde_json::from_value(vectors()[section]["json"].take()).expect("the vectors hold a genesis");
        let genesis = Genesis::try_from(raw).expect("the genesis of the vectors is good");
        Self { committee: Committee::of_genesis(&genesis), genesis }
    }

    pub fn rules(&self) -> Rules {
        Rules { network: Network::Devnet, min_fee: self.genesis.min_fee() }
    }
}

/// The secret key of a public key, if it is one of the vectors'.
pub fn secret_of(key: &PublicKey) -> Option<&'static SecretKey> {
    static KNOWN: LazyLock<Vec<(PublicKey, &'static SecretKey)>> =
        LazyLock::new(|| KEYS.iter().map(|key| (key.public_key(), key)).collect());
    KNOWN.iter().find(|(public, _)| public == key).map(|(_, secret)| *secret)
}

/// The key that owns an address, if it is one of the vectors'.
pub fn owner_of(address: &Address) -> Option<PublicKey> {
    KEYS.iter().map(SecretKey::public_key).find(|key| address.is_owned_by(key))
}
