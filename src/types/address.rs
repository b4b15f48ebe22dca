//! Networks and addresses (protocol §2).

use std::fmt;
use std::str::FromStr;

use bech32::primitives::decode::UncheckedHrpstring;
use bech32::{Bech32m, Hrp};
use serde::{Deserialize, Deserializer, Serialize, Serializer};

use super::hash::{deserialize_bytes, serialize_bytes, tagged_hash};
use super::keys::PublicKey;

/// Which network: it decides the prefix of addresses and the default ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// Real money; addresses start with `time1`.
    Mainnet,
    /// The public test network; addresses start with `ttime1`.
    Testnet,
    /// A network of one's own; addresses start with `dtime1`.
    Devnet,
}

impl Network {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Mainnet, Self::Testnet, Self::Devnet];

    /// The byte that stands for the network in the genesis hash.
    pub const fn byte(self) -> u8 {
        match self {
            Self::Mainnet => 0,
            Self::Testnet => 1,
            Self::Devnet => 2,
        }
    }

    /// The human-readable part of its addresses.
    pub const fn hrp(self) -> &'static str {
        match self {
            Self::Mainnet => "time",
            Self::Testnet => "ttime",
            Self::Devnet => "dtime",
        }
    }

    /// The first of its three default ports: peers, then HTTP, then WebSocket.
    pub const fn base_port(self) -> u16 {
        match self {
            Self::Mainnet | Self::Devnet => 24_000,
            Self::Testnet => 24_100,
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Mainnet => "mainnet",
            Self::Testnet => "testnet",
            Self::Devnet => "devnet",
        })
    }
}

/// Why a text is not an address.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    /// No separator, or characters that no address has.
    #[error("not a bech32m text")]
    Format,
    /// Upper and lower case in one address.
    #[error("an address is all lower or all upper case")]
    MixedCase,
    /// A typing error somewhere.
    #[error("the checksum does not fit")]
    Checksum,
    /// A prefix that belongs to no network of this protocol.
    #[error("unknown prefix {0:?}")]
    Prefix(String),
    /// An address version that this program does not know.
    #[error("unknown address version {0}")]
    Version(u8),
    /// Not 21 bytes, or padding bits that are not zero.
    #[error("wrong length")]
    Length,
    /// A good address of another network.
    #[error("an address of {found}, not of {expected}")]
    Network {
        /// The network that was wanted.
        expected: Network,
        /// The network that the prefix names.
        found: Network,
    },
}

/// Who owns an output: a network and the hash of a public key.
///
/// Text: bech32m (BIP-350) of `version || H("TIME/address", key)[..20]`. In canonical
/// bytes and in the database it is the 21 payload bytes; the network goes without
/// saying there, for nothing of another network gets that far.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Address {
    network: Network,
    payload: [u8; 21],
}

impl Address {
    /// Bytes of the payload: the version and the hash.
    pub const PAYLOAD_LEN: usize = 21;
    const VERSION: u8 = 0;

    /// The address that `key` spends from.
    pub fn of_key(key: &PublicKey, network: Network) -> Self {
        let hash = tagged_hash("TIME/address", &[key.as_bytes()]);
        let mut payload = [Self::VERSION; Self::PAYLOAD_LEN];
        payload[1..].copy_from_slice(&hash[..20]);
        Self { network, payload }
    }

    /// The address with this payload; an error names an unknown version.
    pub fn from_payload(network: Network, payload: [u8; 21]) -> Result<Self, AddressError> {
        if payload[0] == Self::VERSION { Ok(Self { network, payload }) } else { Err(AddressError::Version(payload[0])) }
    }

    /// The network of its prefix.
    pub const fn network(&self) -> Network {
        self.network
    }

    /// The version byte and the 20 bytes of the hash.
    pub const fn payload(&self) -> &[u8; 21] {
        &self.payload
    }

    /// Whether `key` is the one that the address commits to.
    pub fn is_owned_by(&self, key: &PublicKey) -> bool {
        Self::of_key(key, self.network).payload == self.payload
    }

    /// Parses an address that has to be of `network`.
    pub fn parse(text: &str, network: Network) -> Result<Self, AddressError> {
        let address: Self = text.parse()?;
        if address.network == network {
            Ok(address)
        } else {
            Err(AddressError::Network { expected: network, found: address.network })
        }
    }
}

impl FromStr for Address {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, AddressError> {
        let upper = text.bytes().any(|b| b.is_ascii_uppercase());
        if upper && text.bytes().any(|b| b.is_ascii_lowercase()) {
            return Err(AddressError::MixedCase);
        }
        let unchecked = UncheckedHrpstring::new(text).map_err(|_| AddressError::Format)?;
        unchecked.validate_checksum::<Bech32m>().map_err(|_| AddressError::Checksum)?;
        let hrp = unchecked.hrp().to_lowercase();
        let network = Network::ALL
            .into_iter()
            .find(|n| n.hrp() == hrp)
            .ok_or_else(|| AddressError::Prefix(hrp.chars().take(16).collect()))?;
        let mut payload = [0; Self::PAYLOAD_LEN];
        let checked = unchecked.remove_checksum::<Bech32m>();
        let mut bytes = checked.byte_iter();
        for byte in &mut payload {
            *byte = bytes.next().ok_or(AddressError::Length)?;
        }
        if bytes.next().is_some() {
            return Err(AddressError::Length);
        }
        let address = Self::from_payload(network, payload)?;
        // Any other text with these bytes has stray padding bits or an extra character.
        if address.to_string() == text.to_ascii_lowercase() { Ok(address) } else { Err(AddressError::Length) }
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let hrp = Hrp::parse(self.network.hrp()).map_err(|_| fmt::Error)?;
        bech32::encode_lower_to_fmt::<Bech32m, _>(f, hrp, &self.payload).map_err(|_| fmt::Error)
    }
}

impl fmt::Debug for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Address({self})")
    }
}

/// A payload as raw bytes.
struct Payload([u8; Address::PAYLOAD_LEN]);

impl Serialize for Payload {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serialize_bytes(&self.0, serializer)
    }
}

impl<'de> Deserialize<'de> for Payload {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserialize_bytes(deserializer).map(Self)
    }
}

impl Serialize for Address {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        if serializer.is_human_readable() {
            serializer.collect_str(self)
        } else {
            (self.network, Payload(self.payload)).serialize(serializer)
        }
    }
}

impl<'de> Deserialize<'de> for Address {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        use serde::de::Error as _;
        if deserializer.is_human_readable() {
            let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
            text.parse().map_err(D::Error::custom)
        } else {
            let (network, Payload(payload)) = Deserialize::deserialize(deserializer)?;
            Self::from_payload(network, payload).map_err(D::Error::custom)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::types::SecretKey;

    fn address() -> Address {
        Address::of_key(&SecretKey::from_seed([1; 32]).public_key(), Network::Devnet)
    }

    fn encode(hrp: &str, payload: &[u8]) -> String {
        bech32::encode::<Bech32m>(Hrp::parse(hrp).unwrap(), payload).unwrap()
    }

    #[test]
    fn text_round_trips_in_either_case() {
        let text = address().to_string();
        assert!(text.starts_with("dtime1q"));
        assert_eq!(text.parse(), Ok(address()));
        assert_eq!(text.to_uppercase().parse(), Ok(address()));
    }

    #[test]
    fn every_error_says_which() {
        let text = address().to_string();
        let mut payload = *address().payload();
        assert_eq!(format!("{}Q", &text[..text.len() - 1]).parse::<Address>(), Err(AddressError::MixedCase));
        assert_eq!("".parse::<Address>(), Err(AddressError::Format));
        assert_eq!("dtime1".parse::<Address>(), Err(AddressError::Checksum));
        assert_eq!(encode("bc", &payload).parse::<Address>(), Err(AddressError::Prefix("bc".into())));
        assert_eq!(encode("dtime", &payload[..20]).parse::<Address>(), Err(AddressError::Length));
        assert_eq!(encode("dtime", &[&payload[..], &[0]].concat()).parse::<Address>(), Err(AddressError::Length));
        assert_eq!(
            Address::parse(&text, Network::Mainnet),
            Err(AddressError::Network { expected: Network::Mainnet, found: Network::Devnet })
        );
        let old_checksum = bech32::encode::<bech32::Bech32>(Hrp::parse("dtime").unwrap(), &payload).unwrap();
        assert_eq!(old_checksum.parse::<Address>(), Err(AddressError::Checksum));
        payload[0] = 1;
        assert_eq!(encode("dtime", &payload).parse::<Address>(), Err(AddressError::Version(1)));
    }

    #[test]
    fn any_single_changed_character_is_noticed() {
        let text = address().to_string();
        for i in 0..text.len() {
            for c in "qpzry9x8gf2tvdw0s3jn54khce6mua7l".chars() {
                let mut changed: Vec<char> = text.chars().collect();
                if changed[i] == c {
                    continue;
                }
                changed[i] = c;
                assert!(changed.iter().collect::<String>().parse::<Address>().is_err());
            }
        }
    }
}
