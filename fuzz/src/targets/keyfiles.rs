//! Key files: one that is accepted gives the key that it names, and no error says a word
//! of a secret.

use std::fs::{File, OpenOptions};
use std::io::{Seek, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::Path;

use serde_json::Value;
use time_masternode::keyfile::{self, KeyFile, KeyFileError};
use time_masternode::types::SecretKey;
use zeroize::Zeroizing;

use super::Outcome;

/// The passphrase of the encrypted files in the corpus.
pub const PASSPHRASE: &str = "correct horse";
/// A file that asks for more work than this (KiB times passes) is not unlocked here.
const MAX_WORK: u64 = 256;
/// What is longer than a key file may be is refused unread.
const MAX_LENGTH: usize = 16 * 1024;

/// A file that only this process can read; one for each thread, written again and again.
pub struct Scratch {
    directory: tempfile::TempDir,
    file: File,
}

impl Scratch {
    fn new() -> std::io::Result<Self> {
        let directory = tempfile::tempdir()?;
        let path = directory.path().join("file");
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(path)?;
        Ok(Self { directory, file })
    }

    /// Calls `f` with the path of a file that holds `data`.
    pub fn with<T>(data: &[u8], f: impl FnOnce(&Path) -> T) -> T {
        std::thread_local! {
            static SCRATCH: std::cell::RefCell<Scratch> =
                std::cell::RefCell::new(Scratch::new().expect("a temporary directory can be made"));
        }
        SCRATCH.with_borrow_mut(|scratch| {
            let written = scratch.file.set_len(0).and_then(|()| scratch.file.rewind());
            written.and_then(|()| scratch.file.write_all(data)).expect("a temporary file can be written");
            f(&scratch.directory.path().join("file"))
        })
    }
}

/// The bytes of a key file.
pub fn keyfiles(data: &[u8]) -> Outcome {
    if data.len() > MAX_LENGTH {
        return Outcome::Refused;
    }
    let value: Option<Value> = serde_json::from_slice(data).ok();
    match (Scratch::with(data, KeyFile::read), value) {
        (Ok(file), Some(value)) => accepted(&value, file),
        // In fields that it does not know the parser takes more than a `Value` does: bytes
        // that are no UTF-8, and numbers beyond all bounds.
        (Ok(_), None) => Outcome::Accepted,
        (Err(error), value) => refused(&value.unwrap_or_default(), &error),
    }
}

/// Every text in the file under which a seed could stand.
fn secrets(value: &Value) -> Vec<&str> {
    let block = &value["encrypted_seed"];
    let texts = [&value["secret_seed"], &block["ciphertext"], &block["salt"], &block["nonce"]];
    texts.into_iter().filter_map(Value::as_str).filter(|text| text.len() >= 16).collect()
}

fn refused(value: &Value, error: &KeyFileError) -> Outcome {
    let said = format!("{error} {error:?}");
    for secret in secrets(value) {
        assert!(!said.contains(secret), "an error repeats what stands for a secret");
    }
    Outcome::Refused
}

fn accepted(value: &Value, file: KeyFile) -> Outcome {
    let public_key = file.public_key();
    assert_eq!(value["version"], 1);
    assert_eq!(value["public_key"].as_str(), Some(public_key.to_string().as_str()));
    let block = &value["encrypted_seed"];
    let asked = std::cell::Cell::new(false);
    let passphrase = || {
        asked.set(true);
        Ok(Zeroizing::new(PASSPHRASE.to_owned()))
    };
    if block.is_null() {
        let key = file.unlock(passphrase).expect("a seed that is not encrypted needs nothing");
        assert!(!asked.get());
        assert_eq!(value["secret_seed"].as_str(), Some(key.to_hex().as_str()));
        same_key(&key, &public_key);
        return Outcome::Accepted;
    }
    assert!(value["secret_seed"].is_null(), "a file has one seed");
    let number = |name: &str| block[name].as_u64().unwrap_or(u64::MAX);
    let in_range = (1..=1024 * 1024).contains(&number("memory_kib"))
        && (1..=64).contains(&number("iterations"))
        && (1..=16).contains(&number("parallelism"));
    if in_range && number("memory_kib").saturating_mul(number("iterations")) > MAX_WORK {
        return Outcome::Accepted;
    }
    match file.unlock(passphrase) {
        Ok(key) => {
            assert!(in_range && asked.get());
            same_key(&key, &public_key);
            Outcome::Accepted
        }
        Err(error) => refused(value, &error),
    }
}

fn same_key(key: &SecretKey, public_key: &time_masternode::types::PublicKey) {
    assert_eq!(key.public_key(), *public_key);
    assert!(public_key.verify(b"m", &key.sign(b"m")));
    assert!(!format!("{key:?}").contains(&key.to_hex()[..8]));
    let directory = tempfile::tempdir().expect("a temporary directory can be made");
    let path = directory.path().join("key");
    keyfile::create(&path, key, None).expect("a new file can be written");
    assert!(keyfile::create(&path, key, None).is_err(), "a key is never overwritten");
    let again = KeyFile::read(&path).expect("what this program writes it reads");
    assert_eq!(again.public_key(), *public_key);
    let again = again.unlock(|| Err(KeyFileError::EmptyPassphrase)).expect("it is not encrypted");
    assert_eq!(*again.to_hex(), *key.to_hex());
}
