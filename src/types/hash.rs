//! Tagged hashes and the 32-byte newtypes made of them.

use std::cell::RefCell;
use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;

use serde::de::{Error as _, Visitor};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use sha2::{Digest, Sha256};

/// Tags whose beginning a thread remembers; the protocol has fewer.
const MAX_TAGS: usize = 32;

thread_local! {
    /// SHA-256 after its first block, which is the tag's alone: it is most of a short hash.
    static BEGINNINGS: RefCell<Vec<(Box<str>, Sha256)>> = const { RefCell::new(Vec::new()) };
}

/// `SHA-256(SHA-256(tag) || SHA-256(tag) || parts...)`, the tagged hash of BIP-340.
pub fn tagged_hash(tag: &str, parts: &[&[u8]]) -> [u8; 32] {
    let mut hasher = BEGINNINGS.with_borrow_mut(|known| {
        if let Some((_, beginning)) = known.iter().find(|(name, _)| **name == *tag) {
            return beginning.clone();
        }
        let beginning = beginning_of(tag);
        if known.len() < MAX_TAGS {
            known.push((tag.into(), beginning.clone()));
        }
        beginning
    });
    for part in parts {
        hasher.update(part);
    }
    hasher.finalize().into()
}

fn beginning_of(tag: &str) -> Sha256 {
    let tag = Sha256::digest(tag.as_bytes());
    let mut hasher = Sha256::new();
    hasher.update(tag);
    hasher.update(tag);
    hasher
}

/// Why a text is not the lower-case hex of a fixed number of bytes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("expected {expected} lower-case hex digits")]
pub struct ParseHexError {
    expected: usize,
}

/// Decodes lower-case hex into exactly `N` bytes; one value has one text.
pub(super) fn parse_hex<const N: usize>(text: &str) -> Result<[u8; N], ParseHexError> {
    let error = ParseHexError { expected: 2 * N };
    let mut bytes = [0; N];
    if text.bytes().any(|b| b.is_ascii_uppercase()) {
        return Err(error);
    }
    hex::decode_to_slice(text, &mut bytes).map_err(|_| error)?;
    Ok(bytes)
}

struct HexVisitor<const N: usize>;

impl<const N: usize> Visitor<'_> for HexVisitor<N> {
    type Value = [u8; N];

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} lower-case hex digits", 2 * N)
    }

    fn visit_str<E: serde::de::Error>(self, text: &str) -> Result<[u8; N], E> {
        parse_hex(text).map_err(E::custom)
    }
}

/// Hex in JSON and TOML, raw bytes in bincode.
pub(super) fn serialize_bytes<const N: usize, S: Serializer>(
    bytes: &[u8; N],
    serializer: S,
) -> Result<S::Ok, S::Error> {
    if serializer.is_human_readable() {
        let mut text = [0_u8; 128];
        let text = &mut text[..2 * N];
        hex::encode_to_slice(bytes, text).map_err(serde::ser::Error::custom)?;
        serializer.serialize_str(std::str::from_utf8(text).map_err(serde::ser::Error::custom)?)
    } else {
        use serde::ser::SerializeTuple;
        // Eight at a time, which bincode writes as the same eight bytes.
        let (words, rest) = bytes.as_chunks();
        let mut tuple = serializer.serialize_tuple(words.len() + rest.len())?;
        for word in words {
            tuple.serialize_element(&u64::from_le_bytes(*word))?;
        }
        for byte in rest {
            tuple.serialize_element(byte)?;
        }
        tuple.end()
    }
}

/// The inverse of [`serialize_bytes`].
pub(super) fn deserialize_bytes<'de, const N: usize, D: Deserializer<'de>>(
    deserializer: D,
) -> Result<[u8; N], D::Error> {
    if deserializer.is_human_readable() {
        return deserializer.deserialize_str(HexVisitor::<N>);
    }
    struct TupleVisitor<const N: usize>;
    impl<'de, const N: usize> Visitor<'de> for TupleVisitor<N> {
        type Value = [u8; N];

        fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
            write!(f, "{N} bytes")
        }

        fn visit_seq<A: serde::de::SeqAccess<'de>>(self, mut seq: A) -> Result<[u8; N], A::Error> {
            let mut bytes = [0; N];
            let (words, rest) = bytes.as_chunks_mut();
            for (i, word) in words.iter_mut().enumerate() {
                let read: u64 = seq.next_element()?.ok_or_else(|| A::Error::invalid_length(8 * i, &self))?;
                *word = read.to_le_bytes();
            }
            for (i, byte) in rest.iter_mut().enumerate() {
                *byte = seq.next_element()?.ok_or_else(|| A::Error::invalid_length(N - N % 8 + i, &self))?;
            }
            Ok(bytes)
        }
    }
    deserializer.deserialize_tuple(N / 8 + N % 8, TupleVisitor::<N>)
}

/// In order of bytes. The first eight nearly always decide.
pub(super) fn order<const N: usize>(a: &[u8; N], b: &[u8; N]) -> Ordering {
    let first = |bytes: &[u8; N]| bytes.first_chunk().map_or(0, |first| u64::from_be_bytes(*first));
    first(a).cmp(&first(b)).then_with(|| a.cmp(b))
}

/// Declares a newtype over raw bytes with hex text, ordering and serde.
macro_rules! fixed_bytes {
    ($(#[$doc:meta])* $name:ident, $len:expr) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash)]
        pub struct $name([u8; $len]);

        impl Ord for $name {
            fn cmp(&self, other: &Self) -> std::cmp::Ordering {
                $crate::types::hash::order(&self.0, &other.0)
            }
        }

        impl PartialOrd for $name {
            fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
                Some(self.cmp(other))
            }
        }

        impl $name {
            /// The value with these raw bytes.
            pub const fn from_bytes(bytes: [u8; $len]) -> Self {
                Self(bytes)
            }

            /// The raw bytes.
            pub const fn as_bytes(&self) -> &[u8; $len] {
                &self.0
            }
        }

        impl AsRef<[u8]> for $name {
            fn as_ref(&self) -> &[u8] {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&hex::encode(self.0))
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                write!(f, "{}({self})", stringify!($name))
            }
        }

        impl FromStr for $name {
            type Err = ParseHexError;

            fn from_str(text: &str) -> Result<Self, ParseHexError> {
                parse_hex(text).map(Self)
            }
        }

        impl Serialize for $name {
            fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                $crate::types::hash::serialize_bytes(&self.0, serializer)
            }
        }

        impl<'de> Deserialize<'de> for $name {
            fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                $crate::types::hash::deserialize_bytes(deserializer).map(Self)
            }
        }
    };
}
pub(super) use fixed_bytes;

fixed_bytes!(
    /// Any 32-byte hash that has no type of its own: Merkle nodes, digests, nonces.
    Hash32, 32
);
fixed_bytes!(
    /// The identity of a transaction: `H("TIME/tx", canonical bytes)`. Keys and
    /// signatures are not in it, so nobody but the author can change it.
    Txid, 32
);
fixed_bytes!(
    /// The hash of a block's header, which commits to its entries.
    BlockHash, 32
);
fixed_bytes!(
    /// The hash of the genesis file: the identity of a network, in everything signed.
    GenesisHash, 32
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_value_has_one_text() {
        let txid = Txid::from_bytes([0xab; 32]);
        let text = txid.to_string();
        assert_eq!(text.parse::<Txid>(), Ok(txid));
        assert!(text.to_uppercase().parse::<Txid>().is_err());
        assert!(text[1..].parse::<Txid>().is_err());
        assert!(format!("{text}00").parse::<Txid>().is_err());
        assert!("zz".repeat(32).parse::<Txid>().is_err());
    }

    #[test]
    fn json_is_hex_and_bincode_is_raw() {
        let txid = Txid::from_bytes([7; 32]);
        let json = serde_json::to_string(&txid).unwrap();
        assert_eq!(json, format!("\"{}\"", "07".repeat(32)));
        assert_eq!(serde_json::from_str::<Txid>(&json).unwrap(), txid);
        let raw = bincode::serialize(&txid).unwrap();
        assert_eq!(raw, [7; 32]);
        assert_eq!(bincode::deserialize::<Txid>(&raw).unwrap(), txid);
    }

    /// Also where its length is no multiple of the words in which it is written.
    #[test]
    fn bytes_of_every_length_are_written_as_they_are() {
        fn check<const N: usize>() {
            struct Raw<const N: usize>([u8; N]);
            impl<const N: usize> Serialize for Raw<N> {
                fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
                    serialize_bytes(&self.0, serializer)
                }
            }
            impl<'de, const N: usize> Deserialize<'de> for Raw<N> {
                fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
                    deserialize_bytes(deserializer).map(Self)
                }
            }
            let bytes: [u8; N] = std::array::from_fn(|i| u8::try_from(i + 1).unwrap());
            let raw = bincode::serialize(&Raw(bytes)).unwrap();
            assert_eq!(raw, bytes);
            assert_eq!(bincode::deserialize::<Raw<N>>(&raw).unwrap().0, bytes);
            assert!(bincode::deserialize::<Raw<N>>(&raw[1..]).is_err());
        }
        check::<1>();
        check::<8>();
        check::<21>();
        check::<32>();
        check::<33>();
        check::<64>();
    }

    #[test]
    fn the_order_is_that_of_the_bytes() {
        let mut state = 1_u64;
        for round in 0..10_000 {
            let mut bytes = [[0_u8; 32]; 2];
            for byte in bytes.iter_mut().flatten() {
                state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
                // Few values, so that beginnings are often the same.
                *byte = u8::try_from(state >> 56).unwrap() % 2 * 0xff;
            }
            let [a, b] = bytes.map(|bytes| if round % 2 == 0 { bytes } else { std::array::from_fn(|i| bytes[i % 9]) });
            assert_eq!(Txid::from_bytes(a).cmp(&Txid::from_bytes(b)), a.cmp(&b));
        }
        let (low, high) = ([7; 32], std::array::from_fn(|i| if i == 31 { 8 } else { 7 }));
        assert!(Txid::from_bytes(low) < Txid::from_bytes(high));
    }
}
