//! Key files, and how they are protected.
//!
//! A key file is JSON. Version 1 has `version`, `public_key` and exactly one of the others:
//!
//! ```json
//! {
//!   "version": 1,
//!   "public_key": "64 hex digits",
//!   "secret_seed": "64 hex digits: the 32-byte Ed25519 seed of RFC 8032",
//!   "encrypted_seed": {
//!     "kdf": "argon2id", "memory_kib": 65536, "iterations": 3, "parallelism": 1,
//!     "salt": "32 hex digits",
//!     "cipher": "xchacha20poly1305", "nonce": "48 hex digits",
//!     "ciphertext": "96 hex digits: the 32-byte seed and the 16-byte tag"
//!   }
//! }
//! ```
//!
//! The cipher's key is Argon2id (version 0x13, 32 bytes) of the passphrase; its associated
//! data are the 32 bytes of the public key, so a block cannot be moved to another file.
//! A file belongs to no network: the same key has an address on each.
//!
//! What it must not do: overwrite a file, read one that others can read, print or return
//! secret bytes outside of [`SecretKey`] and `Zeroizing`. Errors of the JSON parser quote
//! what they met, so only line and column of them are passed on.

use std::path::Path;

use crate::types::{PublicKey, SecretKey};
use argon2::{Algorithm, Argon2, Params, Version};
use chacha20poly1305::aead::{Aead, KeyInit, Payload};
use chacha20poly1305::{Key, XChaCha20Poly1305, XNonce};
use serde::{Deserialize, Deserializer, Serialize, Serializer};
use zeroize::Zeroizing;

use crate::files::{self, FileError};

const VERSION: u32 = 1;
const KDF: &str = "argon2id";
const CIPHER: &str = "xchacha20poly1305";
/// Bytes that a key file or a seed file may have.
const MAX_BYTES: u64 = 16 * 1024;
/// What new files use: 64 MiB and three passes, beyond OWASP's minimum of 2024.
const MEMORY_KIB: u32 = 64 * 1024;
const ITERATIONS: u32 = 3;
const PARALLELISM: u32 = 1;
/// What a file may demand; it must not be able to exhaust the machine that opens it.
const MAX_MEMORY_KIB: u32 = 1024 * 1024;
const MAX_ITERATIONS: u32 = 64;
const MAX_PARALLELISM: u32 = 16;

/// Why a key was not written or not opened.
#[derive(Debug, thiserror::Error)]
pub enum KeyFileError {
    /// The file itself.
    #[error(transparent)]
    File(#[from] FileError),
    /// Not JSON of a key file.
    #[error("{path}: not a key file (line {line}, column {column})")]
    Format {
        /// Which file.
        path: String,
        /// Where the parser stopped.
        line: usize,
        /// Where the parser stopped.
        column: usize,
    },
    /// A version of another program.
    #[error("key files of version {0} are not known")]
    Version(u32),
    /// Neither kind of seed, or both.
    #[error("a key file has either secret_seed or encrypted_seed")]
    Seeds,
    /// Not a seed.
    #[error("a seed is 64 lower-case hex digits")]
    Seed,
    /// A way of encryption that this program does not know, or that asks for too much.
    #[error("the key file's encryption is not known or its parameters are out of range")]
    Encryption,
    /// The passphrase, or a changed file.
    #[error("the passphrase is wrong, or the key file is damaged")]
    WrongPassphrase,
    /// The seed is of another key than the file says.
    #[error("the key file's public key is not that of its seed")]
    KeyMismatch,
    /// Nothing to encrypt with.
    #[error("the passphrase is empty")]
    EmptyPassphrase,
    /// Typed differently the second time.
    #[error("the two passphrases differ")]
    PassphrasesDiffer,
    /// No terminal to ask at.
    #[error("cannot ask for the passphrase ({0}); give --passphrase-file")]
    Prompt(std::io::Error),
}

/// A text that is wiped when dropped and that cannot be printed.
struct SecretText(Zeroizing<String>);

impl Serialize for SecretText {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&self.0)
    }
}

impl<'de> Deserialize<'de> for SecretText {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer).map(|text| Self(Zeroizing::new(text)))
    }
}

#[derive(Serialize, Deserialize)]
struct EncryptedSeed {
    kdf: String,
    memory_kib: u32,
    iterations: u32,
    parallelism: u32,
    salt: String,
    cipher: String,
    nonce: String,
    ciphertext: String,
}

#[derive(Serialize, Deserialize)]
struct RawKeyFile {
    version: u32,
    public_key: PublicKey,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    secret_seed: Option<SecretText>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    encrypted_seed: Option<EncryptedSeed>,
}

enum Seed {
    Plain(SecretKey),
    Encrypted(EncryptedSeed),
}

/// A key file that was read; its seed may still be encrypted.
pub struct KeyFile {
    public_key: PublicKey,
    seed: Seed,
}

impl KeyFile {
    /// Reads a file; the public key of an unencrypted one is checked against its seed.
    pub fn read(path: &Path) -> Result<Self, KeyFileError> {
        let bytes = files::read_secret(path, MAX_BYTES)?;
        let raw: RawKeyFile = serde_json::from_slice(&bytes).map_err(|error| KeyFileError::Format {
            path: path.display().to_string(),
            line: error.line(),
            column: error.column(),
        })?;
        if raw.version != VERSION {
            return Err(KeyFileError::Version(raw.version));
        }
        let seed = match (raw.secret_seed, raw.encrypted_seed) {
            (Some(text), None) => Seed::Plain(SecretKey::from_hex(&text.0).map_err(|_| KeyFileError::Seed)?),
            (None, Some(block)) => Seed::Encrypted(block),
            _ => return Err(KeyFileError::Seeds),
        };
        match &seed {
            Seed::Plain(key) if key.public_key() != raw.public_key => Err(KeyFileError::KeyMismatch),
            _ => Ok(Self { public_key: raw.public_key, seed }),
        }
    }

    /// The public half, which needs no passphrase.
    pub const fn public_key(&self) -> PublicKey {
        self.public_key
    }

    /// The secret key; `passphrase` is asked only if the file is encrypted.
    pub fn unlock(
        self,
        passphrase: impl FnOnce() -> Result<Zeroizing<String>, KeyFileError>,
    ) -> Result<SecretKey, KeyFileError> {
        match self.seed {
            Seed::Plain(key) => Ok(key),
            Seed::Encrypted(block) => {
                let key = block.decrypt(&self.public_key, &passphrase()?)?;
                if key.public_key() == self.public_key { Ok(key) } else { Err(KeyFileError::KeyMismatch) }
            }
        }
    }
}

impl EncryptedSeed {
    fn encrypt(key: &SecretKey, passphrase: &str) -> Result<Self, KeyFileError> {
        let (salt, nonce): ([u8; 16], [u8; 24]) = (rand::random(), rand::random());
        let mut block = Self {
            kdf: KDF.into(),
            memory_kib: MEMORY_KIB,
            iterations: ITERATIONS,
            parallelism: PARALLELISM,
            salt: hex::encode(salt),
            cipher: CIPHER.into(),
            nonce: hex::encode(nonce),
            ciphertext: String::new(),
        };
        let mut seed = Zeroizing::new([0_u8; 32]);
        hex::decode_to_slice(key.to_hex().as_bytes(), seed.as_mut_slice()).map_err(|_| KeyFileError::Seed)?;
        let public_key = key.public_key();
        let payload = Payload { msg: seed.as_slice(), aad: public_key.as_bytes() };
        let sealed = block.cipher_of(passphrase)?.encrypt(&XNonce::from(nonce), payload);
        block.ciphertext = hex::encode(sealed.map_err(|_| KeyFileError::Encryption)?);
        Ok(block)
    }

    fn decrypt(&self, public_key: &PublicKey, passphrase: &str) -> Result<SecretKey, KeyFileError> {
        if self.kdf != KDF || self.cipher != CIPHER {
            return Err(KeyFileError::Encryption);
        }
        let mut nonce = [0; 24];
        hex::decode_to_slice(&self.nonce, &mut nonce).map_err(|_| KeyFileError::Encryption)?;
        let ciphertext = hex::decode(&self.ciphertext).map_err(|_| KeyFileError::Encryption)?;
        let payload = Payload { msg: ciphertext.as_slice(), aad: public_key.as_bytes() };
        let opened = self.cipher_of(passphrase)?.decrypt(&XNonce::from(nonce), payload);
        let opened = Zeroizing::new(opened.map_err(|_| KeyFileError::WrongPassphrase)?);
        let mut seed = Zeroizing::new([0_u8; 32]);
        if opened.len() != seed.len() {
            return Err(KeyFileError::Seed);
        }
        seed.copy_from_slice(&opened);
        Ok(SecretKey::from_seed(*seed))
    }

    fn cipher_of(&self, passphrase: &str) -> Result<XChaCha20Poly1305, KeyFileError> {
        let in_range = (1..=MAX_MEMORY_KIB).contains(&self.memory_kib)
            && (1..=MAX_ITERATIONS).contains(&self.iterations)
            && (1..=MAX_PARALLELISM).contains(&self.parallelism);
        if !in_range {
            return Err(KeyFileError::Encryption);
        }
        let mut salt = [0; 16];
        hex::decode_to_slice(&self.salt, &mut salt).map_err(|_| KeyFileError::Encryption)?;
        let mut key = Zeroizing::new([0_u8; 32]);
        let parameters = Params::new(self.memory_kib, self.iterations, self.parallelism, Some(key.len()))
            .map_err(|_| KeyFileError::Encryption)?;
        Argon2::new(Algorithm::Argon2id, Version::V0x13, parameters)
            .hash_password_into(passphrase.as_bytes(), &salt, key.as_mut_slice())
            .map_err(|_| KeyFileError::Encryption)?;
        let key: &Key = (&*key).into();
        Ok(XChaCha20Poly1305::new(key))
    }
}

/// Writes a new key file, encrypted if there is a passphrase; durable on return.
pub fn create(path: &Path, key: &SecretKey, passphrase: Option<&str>) -> Result<(), KeyFileError> {
    let (secret_seed, encrypted_seed) = match passphrase {
        Some("") => return Err(KeyFileError::EmptyPassphrase),
        Some(passphrase) => (None, Some(EncryptedSeed::encrypt(key, passphrase)?)),
        None => (Some(SecretText(key.to_hex())), None),
    };
    let raw = RawKeyFile { version: VERSION, public_key: key.public_key(), secret_seed, encrypted_seed };
    // With room for all of it, for a vector that grows leaves copies of the seed behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(4096));
    serde_json::to_writer_pretty(&mut *bytes, &raw).map_err(|_| KeyFileError::Seed)?;
    bytes.push(b'\n');
    Ok(files::create_new(path, 0o600, &bytes)?)
}

/// Reads a seed as 64 hex digits from a file or, for `-`, from standard input.
pub fn read_seed(path: &Path) -> Result<SecretKey, KeyFileError> {
    let bytes = files::read(path, MAX_BYTES)?;
    let text = std::str::from_utf8(&bytes).map_err(|_| KeyFileError::Seed)?;
    SecretKey::from_hex(text.trim()).map_err(|_| KeyFileError::Seed)
}

/// Where a passphrase comes from: the first line of a file, or the terminal.
pub fn passphrase(file: Option<&Path>) -> Result<Zeroizing<String>, KeyFileError> {
    let passphrase = match file {
        Some(path) => {
            let bytes = files::read(path, MAX_BYTES)?;
            let text = std::str::from_utf8(&bytes).map_err(|_| KeyFileError::WrongPassphrase)?;
            Zeroizing::new(text.lines().next().unwrap_or_default().to_owned())
        }
        None => Zeroizing::new(rpassword::prompt_password("Passphrase: ").map_err(KeyFileError::Prompt)?),
    };
    if passphrase.is_empty() { Err(KeyFileError::EmptyPassphrase) } else { Ok(passphrase) }
}

/// Asks for a new passphrase twice.
pub fn new_passphrase() -> Result<Zeroizing<String>, KeyFileError> {
    let first = passphrase(None)?;
    let again = Zeroizing::new(rpassword::prompt_password("The same again: ").map_err(KeyFileError::Prompt)?);
    if first == again { Ok(first) } else { Err(KeyFileError::PassphrasesDiffer) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_block_opens_with_its_passphrase_under_its_key_only() {
        let key = SecretKey::from_seed([7; 32]);
        let block = EncryptedSeed::encrypt(&key, "correct horse").unwrap();
        assert!(!block.ciphertext.contains(&hex::encode([7; 8])));
        let opened = block.decrypt(&key.public_key(), "correct horse").unwrap();
        assert_eq!(opened.to_hex(), key.to_hex());
        assert!(matches!(block.decrypt(&key.public_key(), "wrong"), Err(KeyFileError::WrongPassphrase)));
        let other = SecretKey::from_seed([8; 32]).public_key();
        assert!(matches!(block.decrypt(&other, "correct horse"), Err(KeyFileError::WrongPassphrase)));
    }

    #[test]
    fn a_file_cannot_exhaust_the_machine() {
        let key = SecretKey::from_seed([7; 32]);
        let mut block = EncryptedSeed::encrypt(&key, "p").unwrap();
        block.memory_kib = u32::MAX;
        assert!(matches!(block.decrypt(&key.public_key(), "p"), Err(KeyFileError::Encryption)));
        block.memory_kib = MEMORY_KIB;
        block.iterations = u32::MAX;
        assert!(matches!(block.decrypt(&key.public_key(), "p"), Err(KeyFileError::Encryption)));
    }
}
