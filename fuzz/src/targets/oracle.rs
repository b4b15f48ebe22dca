//! The protocol's bytes a second time (PROTOCOL §1-§5, §7): plain, slow, and without any
//! of the project's own code, to compare it with.

use sha2::{Digest, Sha256};

/// `SHA-256(SHA-256(tag) || SHA-256(tag) || data)`.
pub fn tagged(tag: &str, data: &[u8]) -> [u8; 32] {
    let tag = Sha256::digest(tag.as_bytes());
    Sha256::digest([tag.as_slice(), tag.as_slice(), data].concat()).into()
}

/// The Merkle root of some leaves; of one it is the leaf itself.
pub fn merkle_root(leaves: &[[u8; 32]]) -> [u8; 32] {
    assert!(!leaves.is_empty(), "no leaves have no root");
    let mut row = leaves.to_vec();
    while row.len() > 1 {
        let pair = |pair: &[[u8; 32]]| match pair {
            [left, right] => tagged("TIME/merkle", &[*left, *right].concat()),
            odd => odd[0],
        };
        row = row.chunks(2).map(pair).collect();
    }
    row[0]
}

/// The number of siblings between the leaf at `index` of `size` leaves and the root.
pub fn path_length(mut index: usize, mut size: usize) -> usize {
    let mut length = 0;
    while size > 1 {
        if index ^ 1 < size {
            length += 1;
        }
        (index, size) = (index / 2, size.div_ceil(2));
    }
    length
}

/// Canonical bytes, appended one after the other.
#[derive(Default)]
pub struct Canonical(pub Vec<u8>);

impl Canonical {
    pub fn u32(mut self, value: u32) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn u64(mut self, value: u64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn i64(mut self, value: i64) -> Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    pub fn raw(mut self, bytes: &[u8]) -> Self {
        self.0.extend(bytes);
        self
    }

    pub fn count(self, items: usize) -> Self {
        self.u32(u32::try_from(items).expect("what is compared here was bounded before"))
    }
}

/// Decodes bech32m (BIP-350): the part for people in lower case, and the bytes. `None` for
/// anything that is not the one text of its bytes, in lower or in upper case.
pub fn bech32m(text: &str) -> Option<(String, Vec<u8>)> {
    const CHARACTERS: &[u8; 32] = b"qpzry9x8gf2tvdw0s3jn54khce6mua7l";
    if text != text.to_ascii_lowercase() && text != text.to_ascii_uppercase() {
        return None;
    }
    let text = text.to_ascii_lowercase();
    let (hrp, data) = text.rsplit_once('1')?;
    if hrp.is_empty() || !hrp.bytes().all(|byte| byte.is_ascii_graphic()) || data.len() < 6 {
        return None;
    }
    let place = |c: u8| CHARACTERS.iter().position(|known| *known == c).and_then(|place| u8::try_from(place).ok());
    let values: Vec<u8> = data.bytes().map(place).collect::<Option<_>>()?;
    let spread = hrp.bytes().map(|b| b >> 5).chain([0]).chain(hrp.bytes().map(|b| b & 31));
    let checksum = spread.chain(values.iter().copied()).fold(1_u32, |sum, value| {
        let mixed = (0..5)
            .filter(|bit| sum >> 25 >> bit & 1 == 1)
            .fold(0, |mix, bit| mix ^ [0x3b6a_57b2, 0x2650_8e6d, 0x1ea1_19fa, 0x3d42_33dd, 0x2a14_62b3][bit]);
        (sum & 0x01ff_ffff) << 5 ^ u32::from(value) ^ mixed
    });
    if checksum != 0x2bc8_30a3 {
        return None;
    }
    let bits: Vec<u8> = values[..values.len() - 6].iter().flat_map(|v| (0..5).rev().map(move |i| v >> i & 1)).collect();
    let whole = bits.len() / 8 * 8;
    let padding = &bits[whole..];
    if padding.len() > 4 || padding.contains(&1) {
        return None;
    }
    Some((hrp.to_owned(), bits[..whole].chunks(8).map(|byte| byte.iter().fold(0, |n, bit| n << 1 | bit)).collect()))
}
