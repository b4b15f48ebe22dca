//! Ed25519 keys and signatures, verified by the rules of ZIP-215.
//!
//! RFC 8032 leaves open how edge cases verify, and libraries differ. ZIP-215 does not,
//! and under it a batch accepts exactly what single checks accept; two nodes can never
//! disagree about one signature.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

use super::hash::{ParseHexError, fixed_bytes, parse_hex};

fixed_bytes!(
    /// An Ed25519 public key as it stands on the wire; not necessarily a curve point.
    PublicKey, 32
);
fixed_bytes!(
    /// An Ed25519 signature (RFC 8032), `R || s`.
    Signature, 64
);

impl PublicKey {
    /// Whether `signature` over `message` is this key's, by the rules of ZIP-215.
    pub fn verify(&self, message: &[u8], signature: &Signature) -> bool {
        ed25519_zebra::VerificationKey::try_from(self.0)
            .is_ok_and(|key| key.verify(&ed25519_zebra::Signature::from(signature.0), message).is_ok())
    }
}

/// A secret key: the 32-byte seed of RFC 8032, with what follows from it. Wiped when dropped,
/// never printed.
#[derive(Clone)]
pub struct SecretKey(Box<Zeroizing<ed25519_zebra::SigningKey>>);

impl SecretKey {
    /// The key of a seed.
    pub fn from_seed(seed: [u8; 32]) -> Self {
        Self(Box::new(Zeroizing::new(seed.into())))
    }

    /// A new key from the operating system's randomness.
    pub fn generate() -> Self {
        Self::from_seed(rand::random())
    }

    /// The key whose seed this lower-case hex is.
    pub fn from_hex(text: &str) -> Result<Self, ParseHexError> {
        parse_hex(text).map(Self::from_seed)
    }

    /// The seed in hex, for a key file. Keep it where nobody else reads.
    pub fn to_hex(&self) -> Zeroizing<String> {
        Zeroizing::new(hex::encode(self.0.as_ref()))
    }

    /// The public half.
    pub fn public_key(&self) -> PublicKey {
        PublicKey(ed25519_zebra::VerificationKeyBytes::from(&**self.0).into())
    }

    /// Signs with RFC 8032's deterministic nonce.
    pub fn sign(&self, message: &[u8]) -> Signature {
        Signature(self.0.sign(message).to_bytes())
    }
}

impl fmt::Debug for SecretKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("SecretKey(..)")
    }
}

/// One signature to check; the message is already folded in, so nothing is borrowed.
#[derive(Clone)]
pub struct SignatureItem(ed25519_zebra::batch::Item);

impl SignatureItem {
    /// The claim that `signature` over `message` is `key`'s.
    pub fn new(key: &PublicKey, message: &[u8], signature: &Signature) -> Self {
        let key = ed25519_zebra::VerificationKeyBytes::from(key.0);
        Self((key, ed25519_zebra::Signature::from(signature.0), message).into())
    }

    /// Checks this one alone.
    pub fn verify(self) -> bool {
        self.0.verify_single().is_ok()
    }
}

/// Checks all at once, which for many is less than half the price of one by one.
///
/// `true` means that every item is valid. `false` means that at least one is not;
/// check them singly to learn which.
pub fn verify_batch<'a>(items: impl IntoIterator<Item = &'a SignatureItem>) -> bool {
    let mut items = items.into_iter().peekable();
    let first = items.next();
    if let (Some(alone), None) = (first, items.peek()) {
        return alone.clone().verify();
    }
    let mut verifier = ed25519_zebra::batch::Verifier::new();
    for item in first.into_iter().chain(items) {
        verifier.queue(item.0.clone());
    }
    verifier.verify(rand::rng()).is_ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_batch_is_valid_only_if_each_item_is() {
        let keys: Vec<_> = (0..5).map(|i| SecretKey::from_seed([i; 32])).collect();
        let mut items: Vec<_> = keys.iter().map(|k| SignatureItem::new(&k.public_key(), b"m", &k.sign(b"m"))).collect();
        assert!(verify_batch(&items));
        items[3] = SignatureItem::new(&keys[3].public_key(), b"m", &keys[2].sign(b"m"));
        assert!(!verify_batch(&items));
        assert!(!items[3].clone().verify());
        assert!(items[2].clone().verify());
    }

    /// ZIP-215 takes the torsion points for keys and for R, canonical or not; the
    /// identity as key and as R with s = 0 verifies any message. What matters is that
    /// the single and the batched check say the same.
    #[test]
    fn small_order_points_verify_alike_single_and_batched() {
        let encodings = [
            // The identity, its non-canonical twin (y = p + 1), and points of order 2 and 4.
            "0100000000000000000000000000000000000000000000000000000000000000",
            "eeffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            "ecffffffffffffffffffffffffffffffffffffffffffffffffffffffffffff7f",
            "0000000000000000000000000000000000000000000000000000000000000000",
            "26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05",
        ];
        for key in encodings {
            for r in encodings {
                let key: PublicKey = key.parse().unwrap();
                let signature: Signature = format!("{r}{}", "00".repeat(32)).parse().unwrap();
                assert!(key.verify(b"any", &signature), "{key} {r}");
                assert!(verify_batch([&SignatureItem::new(&key, b"any", &signature)]));
            }
        }
    }

    #[test]
    fn a_non_canonical_s_is_refused() {
        let key = SecretKey::from_seed([9; 32]);
        let mut bytes = *key.sign(b"m").as_bytes();
        // s + L, the group's order, in little-endian.
        let order = hex::decode("edd3f55c1a631258d69cf7a2def9de1400000000000000000000000000000010").unwrap();
        let mut carry = 0_u16;
        for (byte, add) in bytes[32..].iter_mut().zip(order) {
            carry += u16::from(*byte) + u16::from(add);
            *byte = carry.to_le_bytes()[0];
            carry >>= 8;
        }
        let forged = Signature::from_bytes(bytes);
        assert!(!key.public_key().verify(b"m", &forged));
        assert!(!verify_batch([&SignatureItem::new(&key.public_key(), b"m", &forged)]));
    }

    #[test]
    fn a_secret_key_is_never_printed() {
        let key = SecretKey::from_seed([0xab; 32]);
        assert!(!format!("{key:?}").contains("ab"));
    }
}
